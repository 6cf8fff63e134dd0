# %% [markdown]
# # Semi-DETR plus {#sec-abl-plus}
#
# > See what was changed against the paper, why, what each change brought, and what did not work.

# %% tags=["parameters"]
#| hide
results = 'results'  # folder of results
step_costs = '../../benchmarks/results/remedies.json'  # record of `python benchmarks/remedies.py`

# %%
#| hide
import json
from pathlib import Path
import matplotlib.pyplot as plt
from IPython.display import Markdown as markdown
from semidetr.lab.report import (
    METHOD_COLORS,
    difference,
    finding,
    found,
    markdown_table,
    plus_minus,
    read_records,
    spread,
    statement,
    values,
    with_arm,
)

# %%
#| hide
basis = read_records(results, 'components')
fifty = with_arm(
    read_records(results, 'distilled_50'), read_records(results, 'components_50'), 'supervised', 'supervised'
)
for old, new in dict(mean_teacher='mean_teacher', shm_cqc_cpm='semi_detr').items():
    fifty = with_arm(fifty, read_records(results, 'components_50'), old, new)
twenty = with_arm(read_records(results, 'distilled'), basis, 'supervised', 'supervised')
for old, new in dict(mean_teacher='mean_teacher', shm_cqc_cpm='semi_detr').items():
    twenty = with_arm(twenty, basis, old, new)
sets = {'digits, 20 labels': (twenty, 'distilled'), 'digits, 50 labels': (fifty, 'distilled')}
for k in (1, 2, 5, 10, 50):
    if (Path(results) / f'fod12/k{k}').is_dir():
        sets[f'fod12, k = {k}'] = read_records(results, f'fod12/k{k}', ['plus']), 'plus'
controls = dict(supervised='supervised', mean_teacher='the mean teacher', semi_detr='Semi-DETR')

# %%
#| echo: false
told = [
    statement('it', 'Semi-DETR', difference(runs, arm, 'semi_detr'), when=f'on {name}')
    for name, (runs, arm) in sets.items()
]
text = finding(
    '`semi_detr_plus` keeps one-to-many matching to the end and learns to suppress duplicates; '
    'it needs no NMS',
    *told,
)
markdown(text)

# %%
#| label: fig-abl-plus
#| fig-cap: "Gain in AP without NMS of `semi_detr_plus` over three controls, with 95 % intervals."
#| fig-alt: "Points with intervals, one group per data set; all points lie to the right of zero"
#| echo: false
fig, ax = plt.subplots(figsize=(6.5, 1 + 0.5 * len(sets)), dpi=80, layout='constrained')
shades = METHOD_COLORS
for i, (base, label) in enumerate(controls.items()):
    gains = [difference(runs, arm, base) for runs, arm in sets.values()]
    at = [y + 0.22 * (i - 1) for y in range(len(sets))]
    style = dict(fmt='o', markersize=4, capsize=3, color=shades[base], label=f'against {label}')
    ax.errorbar([d['mean'] for d in gains], at, xerr=[d['half'] for d in gains], **style)
ax.axvline(0, color='black', linewidth=0.8)
ax.set(yticks=range(len(sets)), yticklabels=list(sets), xlabel='AP')
ax.invert_yaxis()
ax.legend(fontsize=9, loc='center left', bbox_to_anchor=(1, 0.5))
plt.show()

# %%
#| label: tbl-abl-plus
#| tbl-cap: "Test split, averaged network: AP of `semi_detr_plus` without and with NMS, and its paired differences in AP without NMS with their 95 % intervals."
#| echo: false
rows = []
for name, (runs, arm) in sets.items():
    ap = [spread(values(runs, arm, key)) for key in ('AP', 'AP_nms')]
    rows.append([name, len(runs), *ap, *(plus_minus(difference(runs, arm, b)) for b in controls)])
columns = ['data', 'seeds', 'AP', 'AP with NMS', *(f'against {name}' for name in controls.values())]
markdown(markdown_table(columns, rows, align='lrrrrrr'))

# %% [markdown]
# ## What was changed {.fold}
#
# The paper trains with one-to-many matching while pseudo boxes are rough and ends with one-to-one matching, so
# that no suppression is needed. Measured on few labels, this costs more than it saves: one-to-many matching to
# the end trains the better detector (@sec-abl-nms), and what one-to-one matching leaves are still
# duplicates. `semi_detr_plus` keeps one-to-many matching and lets a layer behind the decoder learn to
# suppress.
#
# | part | paper | `semi_detr_plus` | why |
# |---|---|---|---|
# | matching | one-to-many, then one-to-one after $T_1$ | one-to-many to the end (`method.T1`) | few labels do not teach the decoder both where objects are and which query may say so |
# | duplicates | removed by one-to-one matching | lowered by a learned suppressor (`detector.suppressor.head=residual`) | one layer sees the queries in the order of their scores, and the image no more |
# | what trains it | | what per-class NMS keeps of the same output (`criterion.mds_target=nms`) | a target that needs no labels |
# | on which images | | labelled and unlabelled (`method.mds_unsup=nms`) | scores on labelled images are those of a network that knows the answer |
# | gradient | | ends at the suppressor (`detector.suppressor.detach`), own rate and clipping (`optim.suppressor_mult=10`) | the detector is the one that one-to-many matching trains |
# | overlap | | the layer is given the IoU of each pair (`detector.suppressor.overlap`) | whether a box is suppressed depends on it |
#
# Mining and cross-view consistency are those of the paper, to the end of the training. The layer is described
# in @sec-suppressor, its target in @sec-rescoring, and the steps that led to it in @sec-abl-suppressor.
#
# ```bash
# semidetr train --data path/to/images --percent 5 --method semi_detr_plus
# ```

# %% [markdown]
# ## Each remedy alone {.fold}
#
# Other papers remove duplicates or mend pseudo labels in other ways. Each is a switch, off by default; here
# each one alone is added to Semi-DETR with twenty labelled digits scenes, from the same burn-ins and for as many
# iterations. The cost is that of a step against one of Semi-DETR, first in its one-to-many stage, then in its
# one-to-one stage.

# %%
#| hide
about = {
    'distilled/distilled': 'one-to-many, suppressor trained by NMS (`semi_detr_plus`)',
    'nms_free/only_o2m': 'one-to-many to the end, no suppressor',
    'parallel/group': 'parallel one-to-many group beside one-to-one queries',
    'parallel/second_head': 'second class head, one-to-many beside one-to-one',
    'remedies/position': 'position-supervised loss',
    'remedies/modulated': 'position-modulated cost',
    'remedies/position_modulated': 'both of these',
    'remedies/soft_targets': "soft targets: the teacher's score",
    'remedies/soft_wide': 'soft targets, threshold 0.2',
    'remedies/class_mixture': 'a mixture of scores per class as threshold',
    'remedies/density_guard': 'less background where boxes are missing',
    'mixing/two_views': 'labelled images in two views',
    'mixing/mixup': 'mixup of strong views',
    'mixing/mosaic': 'mosaic of strong views',
    'mixing/mixup_mosaic': 'mixup and mosaic',
}
measured = {}
for name in about:
    study, _, arm = name.partition('/')
    if (Path(results) / study).is_dir():
        runs = with_arm(read_records(results, study, [arm]), basis, 'shm_cqc_cpm', 'hybrid')
        measured[name] = runs, arm, difference(runs, arm, 'hybrid'), difference(runs, arm, 'hybrid', 'AP_nms')
cost = {}
for r in json.loads(Path(step_costs).read_text())['rows']:
    cost.setdefault(r['name'], []).append(r['cost'][1])

# %%
#| label: tbl-abl-plus-remedies
#| tbl-cap: "Twenty labelled digits scenes, test split, averaged network: AP without and with NMS, the paired differences to Semi-DETR of the same seeds with their 95 % intervals, and the cost of a step against one of its two stages."
#| echo: false
rows = []
for name, (runs, arm, plain, suppressed) in measured.items():
    ap = [spread(values(runs, arm, key)) for key in ('AP', 'AP_nms')]
    costs = ', '.join(f'{c:.2f}' for c in cost.get(name, [])) or 'not timed'
    rows.append([about[name], len(runs), *ap, plus_minus(plain), plus_minus(suppressed), costs])
columns = ['remedy', 'seeds', 'AP', 'with NMS', 'difference', 'difference with NMS', 'cost of a step']
markdown(markdown_table(columns, rows, align='lrrrrrr'))

# %%
#| echo: false
helps = [about[n] for n, (_, _, d, _) in measured.items() if found(d) and d['mean'] > 0]
harms = [about[n] for n, (_, _, d, _) in measured.items() if found(d) and d['mean'] < 0]
nothing = [about[n] for n, (_, _, d, _) in measured.items() if not found(d)]
lines = [
    f"* Better than Semi-DETR by more than the interval: {'; '.join(helps) or 'none'}.",
    f"* Worse by more than the interval: {'; '.join(harms) or 'none'}.",
    f"* No difference found: {'; '.join(nothing) or 'none'}.",
    f"* Built and not yet measured: {'; '.join(t for n, t in about.items() if n not in measured) or 'none'}.",
]
markdown('\n'.join(lines))

# %% [markdown]
# ## What a step costs {.fold}
#
# A step has one more light layer, and cross-view consistency to the end: @sec-abl-suppressor has the times against
# both stages of Semi-DETR. At inference the layer is kept; `Predictor(..., suppressor=False)` reads the
# one-to-many output below it, which needs NMS.
#
# ## Limits
#
# - Without unlabelled images the suppressor learns from labelled ones alone, and what it learns there does not
#   hold elsewhere (@tbl-abl-suppressor-attempts).
# - It learns what per-class suppression does, so it also inherits its error: two true objects of one class that
#   overlap by more than the threshold of NMS are one.
# - All measurements are of small detectors on small images, with hundreds of iterations. No GPU has run the
#   longer trainings that are prepared (@sec-gpu-evidence).
#
# ## Summary
#
# - One-to-many matching to the end, a suppressor that learns from NMS, and the rest of Semi-DETR.
# - Its gain over Semi-DETR on digits and on photographs is in @tbl-abl-plus.
# - To reproduce: `semidetr ablate components distilled components_50 distilled_50`, `semidetr ablate fod12`.
