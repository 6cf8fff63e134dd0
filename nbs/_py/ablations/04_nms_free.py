# %% [markdown]
# # Free of suppression {#sec-abl-nms}
#
# > Which matching leaves duplicates behind, what suppression is worth after each, and why the first stage is one-to-many although that leaves them.
#
# One-to-many matching gives an object several queries, so its detector says everything more than once and needs suppression (NMS) afterwards. One-to-one matching does not, but it learns from wrong boxes what it should not. Stage-wise hybrid matching takes one after the other. Here Semi-DETR continues from the same burn-in with fifty labels in three ways: one-to-many to the end ($T_1=300$), one-to-one from the start ($T_1=0$), and hybrid ($T_1=100$). These runs are older than the others of the book: their average begins with the ramp (`ema.start=0`, @sec-abl-txl-semi), and they see twelve images an iteration.

# %% tags=["parameters"]
results = 'results'  # folder of results

# %%
#| hide
import json
from pathlib import Path
from statistics import mean
import matplotlib.pyplot as plt
from IPython.display import Markdown as markdown
from semidetr.draw import COLORS
from semidetr.pages import markdown_table
from semidetr.report import difference, plus_minus, read_records, scale_line, spread, values, verdict, with_interval
from semidetr.study import paired_difference

# %%
#| hide
names = dict(only_o2m='one-to-many only', only_o2o='one-to-one only', hybrid='hybrid')
runs = read_records(results, 'nms_free', names)
gain = {arm: with_interval(paired_difference(values(runs, arm), values(runs, arm, 'AP_nms'))) for arm in names}

# %% [markdown]
# ## What suppression is worth

# %%
#| label: tbl-abl-nms
#| tbl-cap: "COCO AP on 300 test scenes as it is, and after per-class suppression at an IoU of .6; means over the seeds, the paired difference with its 95 % interval."
#| echo: false
markdown(markdown_table(['matching', 'AP', 'AP with NMS', 'AP50', 'AP50 with NMS', 'NMS adds to AP', 'AP of each seed'],
                        [[name, spread(values(runs, arm)), *(f'{mean(values(runs, arm, k)):.1f}' for k in ('AP_nms', 'AP50', 'AP50_nms')), plus_minus(gain[arm]), ', '.join(f'{x:.1f}' for x in values(runs, arm))] for arm, name in names.items()]))

# %%
#| echo: false
assert len(runs) >= 3
across = with_interval(paired_difference(values(runs, 'only_o2m', 'AP_nms'), values(runs, 'hybrid')))
lines = [verdict('hybrid against one-to-one only, neither suppressed', difference(runs, 'hybrid', 'only_o2o')), verdict('hybrid without suppression against one-to-many only with it', across),
         verdict('what suppression adds after one-to-many only', gain['only_o2m']), verdict('what it adds after hybrid matching', gain['hybrid'])]
markdown('\n'.join(f'* {line}' for line in lines)+'\n\n'+scale_line(runs, names))

# %%
#| label: fig-abl-nms
#| fig-cap: "AP of each seed without (left ends) and with suppression (right ends): a rising line means that duplicates were there."
#| fig-alt: "Lines from AP without to AP with suppression for three ways of matching"
#| echo: false
fig, axes = plt.subplots(1, 3, figsize=(7, 2.6), dpi=80, layout='constrained', sharey=True)
for ax, (arm, name), color in zip(axes, names.items(), (COLORS['student'], 'grey', COLORS['teacher'])):
    for a, b in zip(values(runs, arm), values(runs, arm, 'AP_nms')): ax.plot([0, 1], [a, b], 'o-', color=color)
    ax.set(xticks=[0, 1], xticklabels=['without', 'with NMS'], title=name, xlim=(-.3, 1.3))
axes[0].set_ylabel('AP'); plt.show()

# %% [markdown]
# The order is the paper's: one-to-many matching with suppression finds most, and without it is useless; one-to-one matching alone learns less from boxes that are off; hybrid matching lies between. What differs is the distance: after two hundred iterations of one-to-one matching a part of the duplicates is still there, in the supervised and mean-teacher arms as well (@sec-abl-components), because the burn-in was one-to-many for two thirds. The paper gives the second stage sixty thousand iterations. Here a longer one is what would be needed. A shorter first stage exchanges one for the other:

# %%
#| label: tbl-abl-nms-stage
#| tbl-cap: "Length of the first stage, of 300 iterations: AP of seed 0 on the development part."
#| echo: false
stages = [runs[0]['arms'][arm] for arm in ('only_o2o', 'shorter_o2m', 'hybrid', 'only_o2m')]
markdown(markdown_table(['T1', 'AP', 'AP with NMS', 'of the student: AP', 'with NMS', 'configuration'],
                        [[r['config']['method']['T1'], *(f"{r['metrics']['dev'][who][k]:.1f}" for who in ('teacher', 'student') for k in ('AP', 'AP_nms')), r['hash']] for r in stages]))

# %% [markdown]
# The student is ahead of its average: a decay of .99 remembers a hundred iterations, and so a part of the first stage.
#
# ## Duplicates that the teacher teaches
#
# Suppression adds something to the mean teacher as well (@sec-abl-components), which never matched one-to-many after its burn-in. Its labels are part of the reason. They are suppressed class by class, so an object that might be a 3 or an 8 keeps two boxes, and the student is told that two queries belong there. Then it is surer of both, and so is its average:

# %%
#| hide
counted = json.loads((Path(results)/'overlaps.json').read_text())
people = dict(burn_in='burn-in', supervised='supervised', mean_teacher='mean teacher', shm_cqc_cpm='Semi-DETR')
def share(arm, part, of): return [100*m['arms'][arm][part]/m['arms'][arm][of] for m in counted]


# %%
#| label: tbl-abl-nms-overlaps
#| tbl-cap: "Pseudo boxes above the threshold on unlabelled scenes, suppressed per class, twenty labels: objects that have a box with an IoU of .5, and how many of those have several (mean and standard deviation over the seeds)."
#| echo: false
markdown(markdown_table(['network', 'boxes an image', 'objects with a box, %', 'of them with several, %'],
                        [[name, f"{mean(m['arms'][arm]['boxes']/m['images'] for m in counted):.1f}", spread(share(arm, 'covered', 'objects')), spread(share(arm, 'several', 'covered'))] for arm, name in people.items()]))

# %%
#| echo: false
markdown(f"*{len(counted)} seeds of the study `components`, {counted[0]['images']} unlabelled scenes each; configurations of {counted[0]['seed']}: {', '.join(m['hash'] for m in counted[0]['arms'].values())}.* Suppressing across classes (`pseudo.cross_nms`, @sec-teacher) stops this; the paper does not, so the studies here do not either.")

# %% [markdown]
# ## Why not one-to-one from the start?
#
# Because pseudo boxes are off. The detectors of the burn-in answer unlabelled scenes, whose true boxes are known here and were hidden from them; then each coordinate of the true boxes is moved by normal noise, as a teacher would, and every way of matching assigns the same predictions to the moved boxes. *Misplaced* is an object for which some query that was told to be background fits the true box better than all of its positives (@sec-assigners does the same with a toy).

# %%
#| hide
measured = json.loads((Path(results)/'misplaced.json').read_text())
amounts, ways = measured[0]['amounts'], list(measured[0]['rates'])
def rate(name, key): return [mean(m['rates'][name][i][key] for m in measured) for i in range(len(amounts))]


# %%
#| label: fig-abl-misplaced
#| fig-cap: "Left: share of objects whose better-placed query is called background. Right: share of the positive weight on queries that are worse than some background. With small errors Max-IoU loses the least; from .15 on task-aligned ranking loses the fewest objects, and from .2 on the least weight."
#| fig-alt: "Two panels: misplaced objects and misplaced positive weight against the jitter of the boxes, one line a way of matching"
#| echo: false
colors = dict(zip(ways, ('#7f7f7f', '#d62728', '#9467bd', '#8c564b', '#1f77b4')))
fig, axes = plt.subplots(1, 2, figsize=(7, 3), dpi=80, layout='constrained', sharey=True)
for ax, key, title in zip(axes, ('lost', 'weight'), ('objects', 'positive weight')):
    for name in ways: ax.plot(amounts, rate(name, key), color=colors[name], label=name)
    ax.set(xlabel='jitter of the boxes (share of the side)', title=title, ylim=(0, 1))
axes[0].set_ylabel('misplaced'); fig.legend(*axes[0].get_legend_handles_labels(), fontsize=7, ncol=5, loc='outside lower center'); plt.show()

# %%
#| echo: false
at = amounts.index(.2)
one, many = rate('Hungarian', 'lost')[at], rate(ways[-1], 'lost')[at]
word = 'less often than' if many < one else 'no less often than'
markdown(f"With boxes that are off by a fifth of their side, one-to-one matching misplaces {100*one:.0f} % of the objects; {ways[-1]} misplaces {100*many:.0f} %, {word} one-to-one. "
         f"{len(measured)} trained detectors, {sum(m['objects'] for m in measured)} objects on {measured[0]['images']} scenes each, {measured[0]['queries']} queries; runs {', '.join(m['hash'] for m in measured)}. "
         f"Even true boxes leave one-to-one matching at {100*rate('Hungarian', 'lost')[0]:.0f} %: its cost listens to the scores as well, and the query that it takes fits nearly as well as the best.")

# %% [markdown]
# ## Summary
#
# - What suppression adds tells whether a detector still needs it; every run of this book records AP with and without (@sec-evaluation).
# - One-to-one matching with imprecise boxes punishes the better query for most objects; ranking several queries rarely does.
# - To repeat: `semidetr ablate nms_free`, then `python benchmarks/misplaced.py` with the folders of its burn-ins.
