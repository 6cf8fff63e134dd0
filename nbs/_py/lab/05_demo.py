# %% [markdown]
# # The demonstration {#sec-demo}
#
# > Train on twenty labelled images, and improve the result with thousands of unlabelled ones.
#
# The built-in scenes are small photographs with handwritten digits on them (@sec-digits). Twenty of them keep
# their labels. A short supervised burn-in gives a first detector. Three runs continue from its checkpoint:
# one is trained on the twenty alone, one adds the unlabelled scenes through a mean teacher, and one through
# Semi-DETR. All use eight images per iteration, for the same number of iterations.

# %%
#| default_exp lab.demo

# %%
#| export
import json
from pathlib import Path
import torch
from semidetr.core import atomic_write, stable_hash
from semidetr.data.catalog import open_dataset
from semidetr.data.datasets import Subset
from semidetr.draw import compare
from semidetr.lab.report import markdown_table
from semidetr.lab.study import paired, record
from semidetr.train.config import config_hash, override, preset
from semidetr.train.evaluation import detect
from semidetr.train.predict import load_model

# %%
#| export
BURN_IN = ['optim.iters=300', 'method.T1=200', 'loader.n_labelled=8', 'optim.lr=2e-3']
MIXED = ['loader.n_labelled=2', 'loader.n_unlabelled=6', 'pseudo.threshold=0.3', 'method.unsup_weight=2']
ARMS = dict(
    supervised=['method.name=supervised', 'loader.n_labelled=8'],
    mean_teacher=['method.name=mean_teacher', *MIXED],
    semi_detr=['method.name=semi_detr', 'method.T1=100', *MIXED],
)
# of all continuations
LATER = 'method.T1=0 optim.iters=300 optim.lr=1e-3 optim.schedule=cosine optim.warmup=30'.split()


def shown_scenes(
    n: int = 6,  # number of scenes
):  # data set
    "The first scenes of the test split, which the page shows"
    return Subset(open_dataset('digits', 'val'), range(n))


def keep_detections(
    run,  # folder of a finished run
    ds,  # small data set
    min_score: float = 0.3,  # of a detection that is kept
) -> dict:  # image id -> plain lists, small enough to commit
    "Detections of a few images, for the pictures of a page"
    model, cfg, _ = load_model(run)
    out = {}
    for i, d in detect(model, ds, cfg.view).items():
        ok = d['scores'] >= min_score
        out[str(i)] = dict(
            boxes=[[round(v, 1) for v in b] for b in d['boxes'][ok].tolist()],
            labels=d['labels'][ok].tolist(),
            scores=[round(s, 3) for s in d['scores'][ok].tolist()],
        )
    return out


# %% [markdown]
# ## The table
#
# Every comparison is printed in the same form: all methods of a seed in one row, with the gain of the last
# over the first.

# %%
#| export
def table(
    result: dict,  # content of results.json
    part: str = 'val',  # 'val' = test split, 'dev' = development part
    who: str = 'teacher',  # which network; without unlabelled images the teacher is the averaged student
) -> list:  # lines of Markdown
    "AP and AP50 of every run, and the gain pair by pair"
    names = list(result['runs'][0]['arms'])
    columns = ['seed', *(f'{n.replace("_", " ")}: AP / AP50' for n in names), 'gain in AP', 'gain in AP50']
    points = []  # per seed and arm: (AP, AP50)
    for r in result['runs']:
        found = [r['arms'][name]['metrics'][part][who] for name in names]
        points.append([(m['AP'], m['AP50']) for m in found])
    gains = [(row[-1][0] - row[0][0], row[-1][1] - row[0][1]) for row in points]

    def cells(title, row, gain):
        return [title, *(f'{ap:.1f} / {ap50:.1f}' for ap, ap50 in row), *(f'{g:+.1f}' for g in gain)]

    average = lambda pairs: [sum(xs) / len(xs) for xs in zip(*pairs)]
    rows = [cells(r['seed'], row, gain) for r, row, gain in zip(result['runs'], points, gains)]
    if len(rows) > 1:
        rows.append(cells('mean', [average(arm) for arm in zip(*points)], average(gains)))
    return markdown_table(columns, rows).splitlines()


# %%
metrics = lambda ap, ap50: dict(metrics=dict(val=dict(teacher=dict(AP=ap, AP50=ap50))))
toy = dict(runs=[])
for seed, ap in ((0, 10.0), (1, 12.0)):
    toy_arms = dict(supervised=metrics(ap, 2 * ap), mean_teacher=metrics(ap + 3, 2 * ap + 4))
    toy['runs'].append(dict(seed=seed, arms=toy_arms))
assert table(toy)[-1].endswith('| +3.0 | +4.0 |')
print('\n'.join(table(toy)))


# %% [markdown]
# ## Pictures
#
# A page shows truth and detections on a few scenes; what it needs is kept as plain lists in `results.json`.

# %%
#| export
def stored(
    detections: dict,  # of `keep_detections`
    ds,  # data set they were made on
) -> list:  # per image dict of tensors
    "Plain lists back to tensors, in the order of the data set"
    out = []
    for i in ds.ids:
        kept = detections.get(str(i), dict(boxes=[], labels=[], scores=[]))
        out.append(
            dict(
                boxes=torch.tensor(kept['boxes']).reshape(-1, 4),
                labels=torch.tensor(kept['labels'], dtype=torch.long),
                scores=torch.tensor(kept['scores']),
            )
        )
    return out


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


def save_picture(
    result: dict,  # content of results.json
    path,  # PNG file
):
    "`picture` as a file"
    import matplotlib

    matplotlib.use('agg', force=False)
    picture(result).savefig(path, dpi=110, bbox_inches='tight')


# %% [markdown]
# ## All of it

# %%
#| export
def run_demo(
    out,  # folder of the runs and of results.json
    labels: int = 20,  # labelled scenes
    seeds=(0,),  # of split and training
    progress: bool = True,  # bars
    workers: int = 0,  # processes at a time; 0: one per core
    say=print,  # is given each line of output
) -> dict:  # content of results.json
    "Burn-in, all continuations, their metrics and some of their detections"
    out, base = Path(out), override(preset('digits'), [f'data.count={labels}'])
    arms = {name: LATER + own for name, own in ARMS.items()}
    key = stable_hash(config_hash(base), str(BURN_IN), str(arms), open_dataset('digits').fingerprint())
    study = (
        out / f'{key:016x}'[:8]
    )  # other settings, or other scenes of a later release, get their own folder
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


# %% [markdown]
# ## The scenes
#
# The scenes of the test split; their digits and photographs appear in no training scene.

# %%
#| hide
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
# ## Summary
#
# - One burn-in, three continuations, the same number of images and iterations: only the method differs.
# - The continuations run side by side, one thread each.
# - Finished runs are looked up, so a second call trains nothing.
# - Numbers, curves and some detections are kept in one JSON file that the result page reads.
#
# ## Exercises
#
# 1. How does the gain change with `--labels 50`?
# 2. Why does the supervised continuation get eight labelled images per iteration?
# 3. What would be unfair about evaluating the student of one method and the teacher of the other?
