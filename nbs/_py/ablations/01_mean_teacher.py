# %% [markdown]
# # Twenty labels, thousands of images {#sec-abl-demo}
#
# > See what unlabelled images are worth on the built-in scenes: supervised training, mean teacher and
# > Semi-DETR in paired comparison.

# %% tags=["parameters"]
#| hide
results = 'results'  # folder of results
own = '../../runs/demo'  # folder of the run of `make book`, if there is one

# %%
#| hide
import json
from pathlib import Path
import matplotlib.pyplot as plt
from IPython.display import Markdown as markdown
from semidetr.lab.demo import picture, table
from semidetr.lab.report import (
    arm_table,
    difference,
    finding,
    plot_arms,
    read_records,
    scale_line,
    statement,
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

# %%
#| echo: false
gains = {a: difference(runs, a, 'supervised') for a in names if a != 'supervised'}
assert all(g['n'] >= 3 for g in gains.values())
both = (runs, 'shm_cqc_cpm', 'mean_teacher')
more = difference(runs, 'shm_cqc_cpm', 'mean_teacher')
text = finding(
    statement('with twenty labelled scenes the mean teacher', 'supervised training', gains['mean_teacher']),
    statement('Semi-DETR', 'supervised training', gains['shm_cqc_cpm']),
    statement('Semi-DETR', 'the mean teacher', more),
)
markdown(text)

# %%
#| label: fig-abl-demo-gain
#| fig-cap: "AP of the methods, one line per seed. Seeds differ by as much as methods do, so methods are compared within a seed."
#| fig-alt: "AP of the methods, one line per seed"
#| echo: false
plot_arms(runs, names)
plt.show()

# %%
#| label: tbl-abl-demo-seeds
#| tbl-cap: "COCO AP on 300 test scenes, in percent: mean and standard deviation over the seeds of the committed study, and the paired difference to supervised training with its 95 % interval."
#| echo: false
markdown(arm_table(runs, names, 'supervised'))

# %% [markdown]
# ## Detections

# %%
#| label: fig-abl-demo-pictures
#| fig-cap: "Ground truth and detections of all methods on the same test scenes; score at least 0.3."
#| fig-alt: "Grid of scenes with true boxes and the detections of all methods"
#| echo: false
picture(mine or committed, n=4)

# %% [markdown]
# ## Your run {.fold}
#
# The result of the run that `make book` made before it executed this page:

# %%
#| echo: false
no_run = '*No run of `make book` was found; the pictures above are those of the committed study.*'
markdown('\n'.join(table(mine)) if mine else no_run)

# %% [markdown]
# ## How it was measured {.fold}
#
# All arms continue from the same burn-in checkpoint, use the same twenty labelled scenes, and train for the
# same number of iterations with eight images per iteration. Seeds change the labelled scenes, the initial
# weights and the order of the data. The numbers are those of the averaged network (the teacher; for
# supervised training, the same average of the student) on the test split, without non-maximum suppression
# (NMS). `make book` trains the first seed again and executes this page with the result.

# %% [markdown]
# ## Every comparison {.fold}

# %%
#| echo: false
lines = [verdict(f'{names[a]} against supervised', g) for a, g in gains.items()]
lines.append(verdict('Semi-DETR against mean teacher', difference(*both)))
lines.append(verdict('the same, both with NMS', difference(*both, 'AP_nms')))
lines.append(verdict('the same, students instead of their averages', difference(*both, who='student')))
bullets = '\n'.join(f'* {line}' for line in lines)
more = 'What each component of Semi-DETR adds, and why NMS matters: @sec-abl-components.'
markdown(f'{bullets}\n\n{scale_line(runs, names)}\n\n{more}')

# %% [markdown]
# ## Pseudo labels against the hidden ground truth {.fold}
#
# The method has no access to the boxes of the unlabelled scenes; only the health monitor (@sec-health)
# compares with them.

# %%
#| label: fig-abl-demo-health
#| fig-cap: "Quality of the mean teacher's pseudo labels by hidden ground truth, over a moving window: at this threshold many boxes are wrong, and many objects are missed."
#| fig-alt: "Precision and recall of the pseudo labels over the iterations"
#| echo: false
fig, ax = plt.subplots(figsize=(5, 2.8), dpi=80)
for r in runs:
    c = r['arms']['mean_teacher']['curve']
    ax.plot(c['step'], c['pseudo_precision'], color='black', label='precision' if r is runs[0] else None)
    ax.plot(c['step'], c['pseudo_recall'], color='grey', label='recall' if r is runs[0] else None)
ax.set(xlabel='iteration', ylim=(0, 1))
ax.legend()
plt.show()

# %% [markdown]
# ## Summary
#
# - With twenty labels the detector is far below what its size allows; unlabelled scenes add several points of
#   AP on average.
# - The gain is paired: same split, same initial checkpoint, same number of images.
# - At this threshold many pseudo labels are wrong, and the student still gains.
# - To reproduce the whole study: `semidetr ablate components`; one seed of it, with pictures:
#   `semidetr demo`.
