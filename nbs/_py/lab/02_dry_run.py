# %% [markdown]
# # Before the first iteration {#sec-dry-run}
#
# > Know what a study would run, what is missing for it, and how much memory it takes.
#
# A study of forty-five runs on eight GPUs may stop after a night because a folder is misspelt, or because the
# fourth arm needs two more gigabytes. Both can be known before: configurations, data, finished runs and
# memory.
#
# `--dry-run` builds every configuration, opens its data, and lists what would run. How much memory a run
# takes is estimated from what it must keep: $w$ weights in five copies (student, gradient, two moments,
# teacher) and, for each image of the student, all that autograd saves between forward and backward pass. The
# saved bytes are counted on two small images, $b_1$ at $p_1$ pixels and $b_2$ at $p_2$, and extrapolated
# linearly to the $p$ pixels of the largest view:
#
# $$
# M \approx 5 \cdot 4\,w + n\,\Bigl(b_1 + \frac{b_2-b_1}{p_2-p_1}\,(p-p_1)\Bigr) + 0.9\,\mathrm{GB},
# $$ {#eq-ablate-memory}
#
# with $n$ images in a batch of one process, and 0.9 GB for the libraries. Losses, other views and fragmented
# memory come on top.

# %%
#| default_exp lab.dry_run

# %%
#| export
import dataclasses
import functools
from pathlib import Path
import torch
from semidetr.core import DataError, printable
from semidetr.reading import read_record
from semidetr.detectors.contract import build_detector
from semidetr.lab.plan import open_all, state
from semidetr.train.config import config_hash
from semidetr.train.evaluation import same_rng

# %%
#| hide
import tempfile
import matplotlib.pyplot as plt
from semidetr.lab.plan import plan
from semidetr.train.config import override, preset

# %%
#| export
SIDES = 256, 320  # pixels of the two small images


@functools.cache
def kept_bytes(
    detector,  # DetectorConfig
    sides=SIDES,  # pixels
) -> tuple:  # (weights, [bytes for one image of side x side])
    "What autograd keeps of one image, parameters aside: each storage that a hook is given, once"
    classes = detector.num_classes or 80
    with same_rng():
        model = build_detector(dataclasses.replace(detector.untrained(), num_classes=classes)).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    totals = []
    for side in sides:
        saved = {}

        def note(x):
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            # held until all is counted, so that no address is used twice
            out = model(torch.zeros(1, 3, side, side))
            if 'criterion' in out:  # heads that run with their losses (@sec-pyramid)
                out = out['criterion'](
                    [dict(labels=torch.zeros(0, dtype=torch.long), boxes=torch.zeros(0, 4))]
                )
        totals.append(sum(size for address, size in saved.items() if address not in weights))
        del out
    return sum(p.numel() for p in model.parameters()), totals


def images_per_batch(
    cfg,  # Config
) -> int:  # on one process
    "Images that the student sees between two backward passes"
    return cfg.loader.n_labelled + (cfg.loader.n_unlabelled if cfg.method.needs_unlabelled else 0)


def memory_estimate(
    cfg,  # Config
) -> int:  # MB, one process
    "@eq-ablate-memory"
    weights, (small, large) = kept_bytes(cfg.detector)
    p1, p2 = (s * s for s in SIDES)
    one = small + (large - small) / (p2 - p1) * (max(cfg.view.short_sides) * cfg.view.max_side - p1)
    return round((20 * weights + images_per_batch(cfg) * one + 0.9e9) / 2**20)


# %% [markdown]
# The two presets for one core. Committed runs of the first took 1.1 to 1.4 GB (@sec-abl-components):

# %%
toy_cfg = {name: override(preset(name), ['method.name=mean_teacher']) for name in ('digits', 'small')}
estimates = {name: memory_estimate(cfg) for name, cfg in toy_cfg.items()}
assert 900 < estimates['digits'] < 1400 < estimates['small']
estimates

# %%
#| label: fig-dry-run-memory
#| fig-cap: "Memory that one image takes in the small detector: a line through the two small images also meets a third one, so it can be extrapolated."
#| fig-alt: "Bytes kept for backward over pixels: two measured points, the line through them, and a third measured point on it"
sides = (256, 320, 512)
points = [b / 2**20 for b in kept_bytes(preset('small').detector, sides)[1]]
slope = (points[1] - points[0]) / (320**2 - 256**2)
assert abs(points[0] + slope * (512**2 - 256**2) - points[2]) < 0.1 * points[2]
fig, ax = plt.subplots(figsize=(5, 2.4), dpi=80)
ax.plot([0, 550**2], [points[0] - slope * 256**2, points[0] + slope * (550**2 - 256**2)], color='#7f7f7f')
ax.plot([s * s for s in sides], points, 'o', color='#1f77b4')
ax.set(xlabel='pixels', ylabel='MB per image', ylim=(0, None))
plt.show()


# %%
#| export
def measured_memory(
    results,  # folder of records
    say=print,  # is told of damaged ones
) -> dict:  # hash of a configuration -> peak memory in MB
    "What the runs of the records took"
    measured = {}
    for path in sorted(Path(results).rglob('seed*.json')):
        try:
            record = read_record(path)
            runs = [record['burn_in'], *record['arms'].values()]
            measured |= {r['hash']: r['peak_memory_mb'] for r in runs if r}
        except (DataError, KeyError, TypeError):
            cure = f'bring it back with `git checkout {path}`, or run its study again'
            say(printable(f'{path}: damaged record, not used; {cure}'))
    return measured


def dry_run(
    runs: list,  # of Run
    results,  # folder of records: a run with the same hash was measured
    processes: int = 1,  # of each run
    say=print,  # is given each line of output
) -> list:  # what is missing or in the way, a line each
    "Say what would run"
    measured, problems = measured_memory(results, say), {}
    rows = [['run', 'hash', 'iterations', 'images a step', 'labelled / unlabelled', 'state', 'memory']]
    for r in runs:
        key = config_hash(r.cfg)
        counts, errors = open_all(dataclasses.replace(r.cfg.data, fold=0), r.cfg.run.test)
        word, obstacle = ('no data', '') if errors else state(r)
        problems |= dict.fromkeys([*errors, obstacle])
        known = key in measured
        memory = f'{measured[key]} MB measured' if known else f'about {memory_estimate(r.cfg) / 1024:.1f} GB'
        rows.append(
            [
                r.title,
                key,
                r.cfg.optim.iters,
                images_per_batch(r.cfg) * r.cfg.optim.accumulate * processes,
                f'{counts[0]} / {counts[1]}' if counts else '?',
                'new, recorded' if word == 'new' and known else word,
                memory,
            ]
        )
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
    for row in rows:
        say('  '.join(f'{cell!s:<{width}}' for cell, width in zip(row, widths)).rstrip())
    say(
        f'{len(runs)} runs; records are written to {results}, in place of those of the same study and seed. '
        'Memory of one process: measured where a record has the same hash; else weights, gradients, moments '
        'and what autograd keeps for an image, counted on small images and continued to the largest view, '
        'plus 0.9 GB of libraries.'
    )
    return [line for line in problems if line]


# %% [markdown]
# A study whose second data set is not there: all configurations are shown, and the missing one is named once.

# %%
toy_file = Path(tempfile.mkdtemp()) / 'studies.toml'
toy_file.write_text("""
[toy]
preset = "digits"
[toy.groups.data]
digits = ["data.count=20"]
mine = ["data.data=no_such_set"]
[toy.arms]
supervised = ["method.name=supervised"]
mean_teacher = ["method.name=mean_teacher"]
""")
said = []
absent = dry_run(plan(toy_file, 'toy'), 'none', say=said.append)
assert len(said) == 6 and 'new' in said[1] and 'no data' in said[3]
assert len(absent) == 1 and 'no_such_set' in absent[0]
print(*said[:-1], sep='\n')

# %% [markdown]
# ## Summary
#
# - A dry run builds and hashes every configuration and opens all data; nothing is written.
# - What is missing is named once, with its cure; the configurations are shown all the same.
# - Memory is looked up where the same run was measured, and estimated from saved tensors elsewhere.
#
# ## Exercises
#
# 1. Why does the estimate grow with the square of an image's side although attention does not compare all
#    pairs of pixels?
# 2. Which arm of a study needs more than the estimate says, and why?
