# %% [markdown]
# # The demonstration {#sec-demo}
#
# > One command, a few minutes, two cores: a detector learns from twenty labelled pictures, and learns more
# > from thousands without labels.
#
# The built-in scenes are small photographs with handwritten digits on them (@sec-digits). Twenty of them keep
# their labels. A short supervised burn-in gives a first detector; from its checkpoint one continuation goes
# on with the twenty, one adds the unlabelled scenes through a mean teacher, and one through Semi-DETR. All
# see eight images an iteration, for the same number of iterations.

# %%
#| default_exp lab.demo

# %%
#| export
import json
from pathlib import Path
import torch
from semidetr.train.config import config_hash, override, preset
from semidetr.core import atomic_write, stable_hash
from semidetr.data.catalog import open_dataset
from semidetr.data.datasets import Subset
from semidetr.draw import compare
from semidetr.train.evaluation import detect
from semidetr.train.predict import load_model
from semidetr.lab.study import paired, record

# %%
#| export
BURN_IN = ['optim.iters=300', 'method.T1=200', 'loader.n_labelled=8', 'optim.lr=2e-3']
MIXED = ['loader.n_labelled=2', 'loader.n_unlabelled=6', 'pseudo.threshold=0.3', 'method.unsup_weight=2']
ARMS = {
    'supervised': ['method.name=supervised', 'loader.n_labelled=8'],
    'mean_teacher': ['method.name=mean_teacher', *MIXED],
    'semi_detr': ['method.name=semi_detr', 'method.T1=100', *MIXED],
}
LATER = [
    'method.T1=0',
    'optim.iters=300',
    'optim.lr=1e-3',
    'optim.schedule=cosine',
    'optim.warmup=30',
]  # of all continuations


def shown_scenes(n: int = 6):  # (data set, its first n scenes of the test split)
    "The scenes that the page shows"
    ds = open_dataset('digits', 'val')
    return Subset(ds, range(n))


# %%
#| export
def keep_detections(
    run,  # folder of a finished run
    ds,  # small data set
    least: float = 0.3,  # score
) -> dict:  # image id -> plain lists, small enough to commit
    "Detections of a few images, for the pictures of a page"
    model, cfg, _ = load_model(run)
    out = {}
    for i, d in detect(model, ds, cfg.view).items():
        ok = d['scores'] >= least
        out[str(i)] = dict(
            boxes=[[round(v, 1) for v in b] for b in d['boxes'][ok].tolist()],
            labels=d['labels'][ok].tolist(),
            scores=[round(s, 3) for s in d['scores'][ok].tolist()],
        )
    return out


def run_demo(
    out,  # folder of the runs and of results.json
    labels: int = 20,  # labelled scenes
    seeds=(0,),
    progress: bool = True,
    workers: int = 0,  # processes at a time; 0: one a core
    say=print,
) -> dict:  # content of results.json
    "Burn-in, all continuations, their metrics and some of their detections"
    out, base, arms = (
        Path(out),
        override(preset('digits'), [f'data.count={labels}']),
        {name: LATER + own for name, own in ARMS.items()},
    )
    key = stable_hash(config_hash(base), str(BURN_IN), str(arms), open_dataset('digits').fingerprint())
    study = out / f'{key:016x}'[:8]  # other settings, or another release's scenes, get a folder of their own
    runs = paired(base, BURN_IN, arms, study, seeds, workers, progress)
    for r in runs:
        folder = study / f"seed{r['seed']}"
        r['detections'] = {name: keep_detections(folder / name, shown_scenes()) for name in ARMS}
        r['burn_in'] = record(r['burn_in'], folder / 'burn_in')
        r['arms'] = {name: record(a, folder / name) for name, a in r['arms'].items()}
    result = dict(study='demo', data='digits', labels=labels, seeds=list(seeds), runs=runs)
    atomic_write(out / 'results.json', json.dumps(result))
    for line in table(result):
        say(line)
    save_picture(result, out / 'detections.png')
    say(f"pictures: {out / 'detections.png'}    numbers: {out / 'results.json'}")
    return result


# %%
#| export
def table(
    result: dict,  # content of results.json
    part: str = 'val',  # 'val' = test split, 'dev' = development part
    who: str = 'teacher',  # which network of a run: the tables report the teacher, which for 'supervised' is the averaged student
) -> list:  # lines of Markdown
    "AP and AP50 of every run, and the gain pair by pair"
    value = lambda r, name, key: r['arms'][name]['metrics'][part][who][key]
    names = list(result['runs'][0]['arms'])
    lines = [
        '| seed | '
        + ' | '.join(f'{n.replace("_", " ")}: AP / AP50' for n in names)
        + ' | gain in AP | gain in AP50 |',
        '|---|' + '---|' * (len(names) + 2),
    ]
    gains = []
    for r in result['runs']:
        g = [value(r, names[-1], k) - value(r, names[0], k) for k in ('AP', 'AP50')]
        gains.append(g)
        lines.append(
            f"| {r['seed']} | "
            + ' | '.join(f"{value(r, n, 'AP'):.1f} / {value(r, n, 'AP50'):.1f}" for n in names)
            + f' | {g[0]:+.1f} | {g[1]:+.1f} |'
        )
    if len(gains) > 1:
        avg = lambda xs: sum(xs) / len(xs)
        lines.append(
            '| mean | '
            + ' | '.join(
                f"{avg([value(r, n, 'AP') for r in result['runs']]):.1f} / {avg([value(r, n, 'AP50') for r in result['runs']]):.1f}"
                for n in names
            )
            + f' | {avg([g[0] for g in gains]):+.1f} | {avg([g[1] for g in gains]):+.1f} |'
        )
    return lines


def stored(
    detections: dict,  # of `keep_detections`
    ds,  # data set they were made on
) -> list:  # per image dict of tensors
    "Plain lists back to tensors, in the order of the data set"
    rows = [detections.get(str(i), dict(boxes=[], labels=[], scores=[])) for i in ds.ids]
    return [
        dict(
            boxes=torch.tensor(r['boxes']).reshape(-1, 4),
            labels=torch.tensor(r['labels'], dtype=torch.long),
            scores=torch.tensor(r['scores']),
        )
        for r in rows
    ]


# %%
#| export
def picture(
    result: dict,  # content of results.json
    run: int = 0,  # which seed
    n: int = 6,  # scenes
):  # matplotlib Figure
    "Truth and detections of all methods on the same scenes"
    ds = shown_scenes(n)
    samples = [ds[i] for i in range(len(ds))]
    truth = [dict(boxes=s.boxes, labels=s.labels) for s in samples]
    found = {name.replace('_', ' '): stored(d, ds) for name, d in result['runs'][run]['detections'].items()}
    return compare([s.image for s in samples], found, truth, ds.classes)


def save_picture(result, path):
    "`picture` as a PNG file"
    import matplotlib

    matplotlib.use('agg', force=False)
    fig = picture(result)
    fig.savefig(path, dpi=110, bbox_inches='tight')


# %% [markdown]
# ## What the detector is shown
#
# The scenes of the test split; their digits and photographs appear in no training scene.

# %%
#| hide
import matplotlib.pyplot as plt
from semidetr.draw import image_grid

# %%
#| label: fig-demo-scenes
#| fig-cap: "Handwritten digits of many sizes and contrasts on pieces of photographs: easy for people, not solved by twenty examples."
#| fig-alt: "Six scenes with boxes around their digits"
scenes = shown_scenes()
samples = [scenes[i] for i in range(len(scenes))]
assert len(samples) == 6 and all(len(s.boxes) for s in samples)
image_grid(
    [s.image for s in samples],
    [s.boxes for s in samples],
    [s.labels for s in samples],
    classes=scenes.classes,
    ncols=3,
)

# %% [markdown]
# A table of made-up results shows the form in which every comparison is printed: pairs, and their difference.

# %%
metrics = lambda ap, ap50: dict(metrics=dict(val=dict(teacher=dict(AP=ap, AP50=ap50))))
toy = dict(
    runs=[
        dict(seed=s, arms=dict(supervised=metrics(a, 2 * a), mean_teacher=metrics(a + 3, 2 * a + 4)))
        for s, a in ((0, 10.0), (1, 12.0))
    ]
)
assert table(toy)[-1].endswith('| +3.0 | +4.0 |')
print('\n'.join(table(toy)))

# %% [markdown]
# ## Summary
#
# - One burn-in, three continuations, the same number of images and iterations: what differs is the method.
# - The continuations run side by side, one thread each.
# - Finished runs are looked up, so asking again costs nothing.
# - Numbers, curves and some detections are kept in one JSON file that the result page reads.
#
# ## Exercises
#
# 1. How does the gain change with `--labels 50`?
# 2. Why is the supervised continuation given eight labelled images an iteration?
# 3. What would be unfair about evaluating the student of one method and the teacher of the other?
