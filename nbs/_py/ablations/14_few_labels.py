# %% [markdown]
# # From one labelled image per class {#sec-abl-few-labels}
#
# > Train with k labelled images per class, on photographs and on digits, and see who needs how many.
#
# A later comparison (arXiv 2601.13380) reports that Semi-DETR collapses with one and with five labelled images
# per class, more than other methods do. A teacher that has seen a dozen images finds little and is often wrong.
# Here the split takes the rarest class first and adds images until it has $k$ of them; an image counts for all
# its classes (`semidetr split --shots K`).
#
# Two sets: `fod12`, photographs of debris on floors, twelve classes and one object per image, with
# some 2,400 unlabelled images; and the digits scenes. For each $k$ and seed there is one supervised burn-in.
# Four runs of equal length start from its checkpoint, with the same number of images per iteration: supervised
# training, a mean teacher, Semi-DETR as in the paper, and the method of this book, `semi_detr_plus`
# (@sec-abl-plus). Its settings come from digits (@sec-abl-suppressor). On `fod12` two things were chosen, with
# seed 0, $k=5$ and on the development part: the learning rate of the burn-in (of 1e-3 and 2e-3) and the length
# of the arms (of 300 and 600 iterations, which made no difference). The test split, videos that no training
# image comes from, was read for this page, and once before for two supervised burn-ins with $k=5$, to see
# whether supervised training leaves room at this $k$.

# %% tags=["parameters"]
results = 'results'  # folder of results

# %%
#| hide
from pathlib import Path
from statistics import mean
import matplotlib.pyplot as plt
from IPython.display import Markdown as markdown
from semidetr.draw import COLORS
from semidetr.lab.report import (
    class_values,
    difference,
    found,
    markdown_table,
    plus_minus,
    read_records,
    scale_line,
    spread,
    values,
    with_interval,
)
from semidetr.lab.study import paired_difference

# %%
#| hide
names = dict(
    supervised='supervised', mean_teacher='mean teacher', semi_detr='Semi-DETR', plus='Semi-DETR plus'
)
colors = dict(supervised='grey', mean_teacher=COLORS['teacher'], semi_detr=COLORS['student'], plus='black')


def shots(study):
    "k -> records, of the groups that have been measured"
    places = {k: f'{study}/k{k}' for k in (1, 2, 5, 10, 50)}
    return {k: read_records(results, p, names) for k, p in places.items() if (Path(results) / p).is_dir()}


studies = dict(fod12=shots('fod12'), digits=shots('digits_shots'))
titles = dict(fod12='Photographs: fod12', digits='Digits scenes')
plateau = read_records(results, 'fod12_plateau')[0]['arms']
full = plateau['all']['metrics']['val']['teacher']['AP']


def table(found_studies):
    "Every k and method: AP without and with NMS, the difference to two controls"
    rows = []
    for k, runs in found_studies.items():
        images = runs[0]['arms']['plus']['data']['labelled']
        for arm, name in names.items():
            ap = [spread(values(runs, arm, key)) for key in ('AP', 'AP_nms')]
            gains = [
                '' if arm == b else plus_minus(difference(runs, arm, b))
                for b in ('supervised', 'mean_teacher')
            ]
            rows.append([k, images, name, *ap, *(gains if arm != 'supervised' else ['', ''])])
    columns = ['k', 'images', 'method', 'AP', 'AP with NMS', 'against supervised', 'against the mean teacher']
    return markdown_table(columns, rows, align='rrlrrrr')


# %%
#| echo: false
lines = []
for name, groups in studies.items():
    for k, runs in groups.items():
        gains = {b: difference(runs, 'plus', b) for b in names if b != 'plus'}
        text = ', '.join(f'{plus_minus(d)} against {names[b]}' for b, d in gains.items())
        lines.append(f"* {name}, k = {k}: Semi-DETR plus has {mean(values(runs, 'plus')):.1f} AP; {text}.")
markdown('\n'.join(lines))

# %%
#| label: fig-abl-few-labels
#| fig-cap: "AP without NMS on the test split over the number of labelled images per class: mean and each seed."
#| fig-alt: "AP over k for four methods, one panel per data set; the line of Semi-DETR plus lies highest"
#| echo: false
fig, axes = plt.subplots(1, len(studies), figsize=(8, 3.2), dpi=80, layout='constrained', squeeze=False)
for ax, (name, groups) in zip(axes[0], studies.items()):
    for arm, label in names.items():
        ks, ap = list(groups), [values(runs, arm) for runs in groups.values()]
        ax.plot(ks, [mean(a) for a in ap], 'o-', color=colors[arm], label=label, markersize=4)
        for k, a in zip(ks, ap):
            ax.plot([k] * len(a), a, '.', color=colors[arm], alpha=0.4, markersize=4)
    if name == 'fod12':
        ax.axhline(full, linestyle='--', color='grey', linewidth=0.8, label='all labels, supervised')
    ax.set(xscale='log', xticks=list(groups), xticklabels=list(groups), xlabel='labelled images per class, k')
    ax.set_title(titles[name], fontsize=10)
    ax.minorticks_off()
axes[0, 0].set_ylabel('AP')
axes[0, 0].legend(fontsize=8)
plt.show()

# %% [markdown]
# ## Photographs

# %%
#| label: tbl-abl-few-labels-fod12
#| tbl-cap: "fod12, test split, averaged network: mean and standard deviation over the seeds, and the paired differences in AP without NMS with their 95 % intervals."
#| echo: false
markdown(table(studies['fod12']))

# %%
#| echo: false
markdown('\n\n'.join(f'**k = {k}.** {scale_line(runs, names)}' for k, runs in studies['fod12'].items()))


# %% [markdown]
# ### Class by class

# %%
#| hide
def per_class(runs, base):
    "class -> paired difference of Semi-DETR plus to another arm, with its interval"
    classes = runs[0]['arms']['plus']['data']['classes']
    gain = lambda c: paired_difference(class_values(runs, base, c), class_values(runs, 'plus', c))
    return {c: with_interval(gain(c)) for c in classes}


# %%
#| label: fig-abl-few-labels-classes
#| fig-cap: "fod12: AP of Semi-DETR plus minus that of supervised training, for each class: mean over the seeds and 95 % interval."
#| fig-alt: "Bars of the gain for each of the twelve classes, one panel per k"
#| echo: false
panels = studies['fod12']
fig, axes = plt.subplots(
    1,
    len(panels),
    figsize=(1.5 + 2.1 * len(panels), 3.4),
    dpi=80,
    layout='constrained',
    sharey=True,
    squeeze=False,
)
for ax, (k, runs) in zip(axes[0], panels.items()):
    gains = per_class(runs, 'supervised')
    at = range(len(gains))
    means, halves = ([d[key] for d in gains.values()] for key in ('mean', 'half'))
    ax.barh(at, means, xerr=halves, color=COLORS['teacher'], error_kw=dict(linewidth=0.8))
    ax.axvline(0, color='black', linewidth=0.8)
    ax.set(yticks=list(at), yticklabels=list(gains), xlabel='AP', xlim=(-40, 60))
    ax.set_title(f'k = {k}', fontsize=10)
plt.show()

# %%
#| echo: false
lines = []
for k, runs in panels.items():
    for base in ('supervised', 'mean_teacher'):
        gains = per_class(runs, base)
        worse = [f'{c} ({plus_minus(d)})' for c, d in gains.items() if d['mean'] < 0 and found(d)]
        better, fallen = sum(d['mean'] > 0 for d in gains.values()), 'worse by more than its interval'
        text = f"{fallen}: {', '.join(worse)}" if worse else f'none is {fallen}'
        lines.append(f'* k = {k}, against {names[base]}: {better} of {len(gains)} classes gain; {text}.')
markdown('\n'.join(lines))

# %% [markdown]
# ### Is supervised training at its plateau?
#
# The control would be weak if it had only been trained too briefly. One seed was trained by labels alone for
# 2000 iterations, more than twice as long as burn-in and arm together, and one with all labels.

# %%
#| label: fig-abl-few-labels-plateau
#| fig-cap: "fod12, supervised training alone: AP on the development part over the iterations, seed 0."
#| fig-alt: "Three curves that rise and level off: with two, with five and with all labelled images per class"
#| echo: false
fig, ax = plt.subplots(figsize=(5, 2.8), dpi=80, layout='constrained')
for arm, label in dict(k2='k = 2', k5='k = 5', all='all labels').items():
    history = plateau[arm]['history']
    ax.plot([h['step'] for h in history], [h['AP'] for h in history], 'o-', markersize=4, label=label)
ax.set(xlabel='iteration', ylabel='AP', ylim=(0, None))
ax.legend(fontsize=8)
plt.show()

# %%
#| echo: false
lines = []
for k in (2, 5):
    if k not in studies['fod12']:
        continue
    runs = studies['fod12'][k]
    seed0 = [r for r in runs if r['seed'] == 0]
    long, short = plateau[f'k{k}']['metrics']['val']['teacher']['AP'], values(seed0, 'supervised')[0]
    lines.append(
        f'* k = {k}, seed 0, test split: {short:.1f} AP after burn-in and arm (800 iterations), {long:.1f} '
        f"after 2000; Semi-DETR plus has {values(seed0, 'plus')[0]:.1f}. With all labels: {full:.1f}, so "
        f'supervised training has {short / full:.2f} of what all labels give.'
    )
markdown('\n'.join(lines))
