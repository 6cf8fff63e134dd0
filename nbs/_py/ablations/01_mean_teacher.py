# %% [markdown]
# # Twenty labels, thousands of pictures {#sec-abl-demo}
#
# > What unlabelled images are worth on the built-in scenes: supervised training, mean teacher and Semi-DETR,
# > pair by pair.
#
# All continuations start from the same burn-in checkpoint, keep the same twenty labelled scenes, see eight
# images an iteration and run for the same number of iterations; seeds change the labelled scenes, the initial
# weights and the order of the data. The numbers are those of the averaged network (the teacher; for
# supervised training the same average of the student), on the test split, without non-maximum suppression.
# `make book` runs the first seed again and executes this page with what it found.

# %% tags=["parameters"]
results = 'results'  # folder of results
own = '../../runs/demo'  # folder of the run of `make book`, if there is one

# %%
#| hide
import json
from pathlib import Path
import matplotlib.pyplot as plt
from semidetr.lab.demo import picture, table
from semidetr.draw import COLORS
from IPython.display import Markdown as markdown
from semidetr.book.pages import markdown_table, write_home
from semidetr.lab.report import (
    arm_table,
    difference,
    plot_arms,
    read_records,
    scale_line,
    spread,
    values,
    verdict,
)

# %%
#| hide
names = dict(supervised='supervised', mean_teacher='mean teacher', shm_cqc_cpm='Semi-DETR')
runs = read_records(results, 'components', names)
fresh = Path(own) / 'results.json'
mine = json.loads(fresh.read_text()) if fresh.exists() else None
kept = json.loads((Path(results) / 'qualitative.json').read_text())['detections']  # of seed 0
committed = dict(runs=[dict(detections={names[a]: d for a, d in kept.items()})])

# %% [markdown]
# ## The study

# %%
#| label: tbl-abl-demo-seeds
#| tbl-cap: "COCO AP on 300 test scenes, in percent: mean and standard deviation over the seeds of the committed study, and the paired difference to supervised training with its 95 % interval."
#| echo: false
markdown(arm_table(runs, names, 'supervised'))

# %%
#| echo: false
gains = {a: difference(runs, a, 'supervised') for a in names if a != 'supervised'}
assert all(g['n'] >= 3 for g in gains.values())
markdown(
    '\n'.join(
        [
            *(f"* {verdict(f'{names[a]} against supervised', g)}" for a, g in gains.items()),
            f"* {verdict('Semi-DETR against mean teacher', difference(runs, 'shm_cqc_cpm', 'mean_teacher'))}",
            f"* {verdict('the same with suppression', difference(runs, 'shm_cqc_cpm', 'mean_teacher', 'AP_nms'))}",
            f"* {verdict('the same, students instead of their averages', difference(runs, 'shm_cqc_cpm', 'mean_teacher', who='student'))}",
        ]
    )
    + '\n\n'
    + scale_line(runs, names)
    + '\n\nWhich part of Semi-DETR adds what, and why suppression matters: @sec-abl-components.'
)

# %%
#| label: fig-abl-demo-gain
#| fig-cap: "Each line is one seed through the methods: seeds differ by as much as methods do, so methods are compared within a seed."
#| fig-alt: "AP of the methods, one line a seed"
#| echo: false
plot_arms(runs, names)
plt.show()

# %% [markdown]
# ## The teacher's labels, against the hidden truth
#
# The method never sees the boxes of the unlabelled scenes; the health monitor (@sec-health) does.

# %%
#| label: fig-abl-demo-health
#| fig-cap: "Pseudo labels of the mean teacher against the hidden truth, over a moving window: at this threshold many boxes are wrong, and many objects are missed."
#| fig-alt: "Precision and recall of the pseudo labels over the iterations"
#| echo: false
fig, ax = plt.subplots(figsize=(5, 2.8), dpi=80)
for r in runs:
    c = r['arms']['mean_teacher']['curve']
    ax.plot(
        c['step'], c['pseudo_precision'], color=COLORS['teacher'], label='precision' if r is runs[0] else None
    )
    ax.plot(c['step'], c['pseudo_recall'], color=COLORS['student'], label='recall' if r is runs[0] else None)
ax.set(xlabel='iteration', ylim=(0, 1))
ax.legend()
plt.show()

# %% [markdown]
# ## What they see

# %%
#| label: fig-abl-demo-pictures
#| fig-cap: "The same test scenes: truth and all methods, detections with a score of at least 0.3."
#| fig-alt: "Grid of scenes with true boxes and the detections of all methods"
#| echo: false
picture(mine or committed, n=4)

# %%
#| hide
picture(committed, n=3).savefig('results/home.png', dpi=90, bbox_inches='tight')
cells = [
    [
        n,
        *(spread(values(runs, a, key)) for key in ('AP', 'AP50', 'AP_nms')),
        ', '.join(f'{x:.1f}' for x in values(runs, a)),
    ]
    for a, n in names.items()
]
write_home(
    'results/_home.md',
    'nbs/ablations/results/home.png',
    'Scenes of the test split: truth, supervised training, mean teacher and Semi-DETR (seed 0), all from the same twenty labelled scenes.',
    'Three scenes with true boxes and the detections of all methods',
    markdown_table(['method', 'AP', 'AP50', 'AP with NMS', 'AP of each seed'], cells),
    f"Twenty labelled scenes, {len(runs)} seeds, means and standard deviations on 300 test scenes: unlabelled scenes add {gains['mean_teacher']['mean']:.1f} AP through a mean teacher and {gains['shm_cqc_cpm']['mean']:.1f} through Semi-DETR",
)

# %% [markdown]
# ## Your run
#
# When this page was last executed by `make book`, its own run gave:

# %%
#| echo: false
markdown(
    '\n'.join(table(mine))
    if mine
    else '*No run of `make book` was found beside this page; the pictures above are those of the committed study.*'
)

# %% [markdown]
# ## Summary
#
# - With twenty labels the detector is far from what its size allows; unlabelled scenes add several points on
#   average.
# - The gain is paired: same split, same start, same number of images.
# - At this threshold many pseudo labels are wrong, and the student gains all the same.
# - To repeat the whole study: `semidetr ablate components`; one seed of it, with pictures: `semidetr demo`.
