# %% [markdown]
# # Detection without NMS {#sec-abl-nms}
#
# > See which kind of matching leaves duplicates, what non-maximum suppression (NMS) adds after each kind, and
# > why the first stage is one-to-many in spite of its duplicates.

# %% tags=["parameters"]
#| hide
results = 'results'  # folder of results

# %%
#| hide
import json
from pathlib import Path
from statistics import mean
import matplotlib.pyplot as plt
from IPython.display import Markdown as markdown
from semidetr.draw import COLORS
from semidetr.lab.report import (
    difference,
    finding,
    markdown_table,
    plus_minus,
    read_records,
    scale_line,
    spread,
    statement,
    values,
    verdict,
    with_arm,
    with_interval,
)
from semidetr.lab.study import paired_difference

# %%
#| hide
names = dict(only_o2m='one-to-many only', only_o2o='one-to-one only', hybrid='hybrid')
sources = {name: read_records(results, name) for name in ('nms_free', 'leave_one_out', 'components', 'hyper')}


def interval(before, after):
    "Paired difference of two lists of values, with its interval"
    return with_interval(paired_difference(before, after))


runs = with_arm(sources['nms_free'], sources['leave_one_out'], 'no_shm', 'only_o2o')
runs = with_arm(runs, sources['components'], 'shm_cqc_cpm', 'hybrid')
assert all([r['arms'][a]['config']['method']['T1'] for a in names] == [300, 0, 100] for r in runs)
gain = {arm: interval(values(runs, arm), values(runs, arm, 'AP_nms')) for arm in names}

# %%
#| echo: false
best = difference(runs, 'hybrid', 'only_o2o')
text = finding(
    f'NMS adds {plus_minus(gain["only_o2m"])} AP after one-to-many matching, '
    f'{plus_minus(gain["hybrid"])} after '
    f'hybrid matching and {plus_minus(gain["only_o2o"])} after one-to-one matching: none of them '
    'is free of duplicates',
    statement('without NMS, hybrid matching', 'one-to-one matching alone', best),
)
assert all(d['mean'] > 0.5 for d in gain.values())
markdown(text)

# %%
#| label: fig-abl-nms
#| fig-cap: "AP of each seed without NMS (left) and with NMS (right): a rising line means that there were duplicates."
#| fig-alt: "Lines from AP without NMS to AP with NMS for three kinds of matching"
#| echo: false
fig, axes = plt.subplots(1, 3, figsize=(7, 2.6), dpi=80, layout='constrained', sharey=True)
for ax, (arm, name), color in zip(axes, names.items(), (COLORS['student'], 'grey', COLORS['teacher'])):
    for a, b in zip(values(runs, arm), values(runs, arm, 'AP_nms')):
        ax.plot([0, 1], [a, b], 'o-', color=color)
    ax.set(xticks=[0, 1], xticklabels=['without', 'with NMS'], title=name, xlim=(-0.3, 1.3))
axes[0].set_ylabel('AP')
plt.show()

# %%
#| label: tbl-abl-nms
#| tbl-cap: "COCO AP on 300 test scenes without NMS and with per-class NMS at an IoU of 0.6; means over the seeds, and the paired difference with its 95 % interval."
#| echo: false
markdown(
    markdown_table(
        ['matching', 'AP', 'AP with NMS', 'AP50', 'AP50 with NMS', 'NMS adds to AP'],
        [
            [
                name,
                spread(values(runs, arm)),
                *(f'{mean(values(runs, arm, k)):.1f}' for k in ('AP_nms', 'AP50', 'AP50_nms')),
                plus_minus(gain[arm]),
            ]
            for arm, name in names.items()
        ],
    )
)

# %% [markdown]
# ## How it was measured {.fold}
#
# One-to-many matching assigns several queries to each object, so the detector predicts each object several
# times and needs NMS. One-to-one matching needs no NMS, but it suffers more from wrong pseudo boxes.
# Stage-wise hybrid matching uses one after the other. Here Semi-DETR continues from the burn-ins of
# @sec-abl-components with twenty labels in three ways: one-to-many to the end ($T_1=300$), one-to-one from
# the start ($T_1=0$), and hybrid ($T_1=100$), which is the full method of that page. $T_1$ also sets the end
# of consistency (with $T_1=0$ it is active to the end) and the iteration from which unlabelled images get
# denoising queries (@sec-methods).

# %% [markdown]
# ## Every comparison {.fold}

# %%
#| echo: false
assert len(runs) >= 3
across = interval(values(runs, 'only_o2m', 'AP_nms'), values(runs, 'hybrid'))
lines = [
    verdict('hybrid against one-to-one only, both without NMS', difference(runs, 'hybrid', 'only_o2o')),
    verdict('hybrid without NMS against one-to-many only with NMS', across),
    verdict('what NMS adds after one-to-many only', gain['only_o2m']),
    verdict('what NMS adds after hybrid matching', gain['hybrid']),
]
markdown('\n'.join(f'* {line}' for line in lines) + '\n\n' + scale_line(runs, names))

# %%
#| hide
# the order that the next paragraph states
ap = {arm: mean(values(runs, arm)) for arm in names}
suppressed = {arm: mean(values(runs, arm, 'AP_nms')) for arm in names}
assert min(ap, key=ap.get) == max(suppressed, key=suppressed.get) == 'only_o2m'
assert ap['hybrid'] > ap['only_o2o'] and suppressed['hybrid'] > suppressed['only_o2o']

# %% [markdown]
# ## In words {.fold}
#
# One-to-many matching finds the most objects, but each of them several times: it has the highest mean of the
# three with NMS and the lowest without. One-to-one matching alone is below hybrid matching, with NMS and
# without. As far as the paper's comparison is known (one-to-many with NMS above hybrid; hybrid above
# one-to-one), the order is the same; its numbers could not be obtained. Two hundred iterations of one-to-one
# matching do not remove all duplicates here. Some are left in the supervised and mean-teacher arms as well
# (@sec-abl-components), because two thirds of the burn-in were one-to-many. In the paper the second stage has
# sixty thousand iterations.

# %% [markdown]
# ## How long should the first stage be? {.fold}
#
# Between these extremes lie other lengths $T_1$ of the first stage, out of three hundred iterations.

# %%
#| hide
lengths = {0: 'only_o2o', 50: 'T1_50', 100: 'hybrid', 150: 'T1_150', 300: 'only_o2m'}
stages = with_arm(runs, sources['hyper'], 'T1_50', 'T1_50')
stages = with_arm(stages, sources['hyper'], 'T1_150', 'T1_150')
assert all(r['arms'][arm]['config']['method']['T1'] == T1 for r in stages for T1, arm in lengths.items())

# %%
#| label: fig-abl-nms-stage
#| fig-cap: "AP against the length of the first stage, without and with NMS: thin lines are seeds, dots their mean. The gap between the two colours is due to duplicates."
#| fig-alt: "AP without and with NMS for five lengths of the first stage"
#| echo: false
fig, ax = plt.subplots(figsize=(5.5, 3), dpi=80, layout='constrained')
for key, label, color in (
    ('AP', 'without NMS', COLORS['student']),
    ('AP_nms', 'with NMS', COLORS['teacher']),
):
    table = [values(stages, arm, key) for arm in lengths.values()]
    for seed in zip(*table):
        ax.plot(list(lengths), seed, color=color, linewidth=0.7, alpha=0.6)
    ax.plot(list(lengths), [mean(row) for row in table], 'o-', color=color, label=label)
ax.set(xlabel='$T_1$', ylabel='AP', xticks=list(lengths))
ax.legend(fontsize=9)
plt.show()

# %%
#| label: tbl-abl-nms-stage
#| tbl-cap: "The same in numbers, and for the student instead of the averaged network: mean and standard deviation over the seeds."
#| echo: false
columns = [f'$T_1$ ({len(stages)} seeds)', 'AP', 'AP with NMS', 'student: AP', 'student: AP with NMS']
measures = [(key, who) for who in ('teacher', 'student') for key in ('AP', 'AP_nms')]
rows = [
    [T1, *(spread(values(stages, arm, key, who)) for key, who in measures)] for T1, arm in lengths.items()
]
markdown(markdown_table(columns, rows))


# %%
#| echo: false
def student_ahead(key):
    "The student against the averaged network, for each length"
    parts = []
    for T1, arm in lengths.items():
        d = interval(values(stages, arm, key), values(stages, arm, key, 'student'))
        parts.append(f'{plus_minus(d)} at {T1}')
    return ', '.join(parts)


decay = stages[0]['arms']['hybrid']['config']['ema']['decay']
markdown(
    'The averaged network still contains a part of the first stage, '
    f'since a decay of {decay} averages over about a hundred iterations. '
    f'The student against the averaged network over {len(stages)} seeds, by length of the first stage: '
    f"{student_ahead('AP')}; both with NMS: {student_ahead('AP_nms')}."
)

# %% [markdown]
# ## Duplicates among the pseudo labels {.fold}
#
# NMS also adds AP to the mean teacher (@sec-abl-components), which uses no one-to-many matching after its
# burn-in. Its pseudo labels are part of the reason. NMS is applied to them class by class, so an object that
# might be a 3 or an 8 keeps two boxes, and both become targets of the student. Training raises the student's
# scores of both, and with them those of the averaged network:

# %%
#| hide
counted = json.loads((Path(results) / 'overlaps.json').read_text())
networks = dict(
    burn_in='burn-in', supervised='supervised', mean_teacher='mean teacher', shm_cqc_cpm='Semi-DETR'
)


def share(arm, part, of):
    "Percent, one value per seed"
    return [100 * m['arms'][arm][part] / m['arms'][arm][of] for m in counted]


# %%
#| label: tbl-abl-nms-overlaps
#| tbl-cap: "Pseudo boxes above the threshold on unlabelled scenes after per-class NMS, twenty labels: objects that have a box with an IoU of 0.5, and how many of those have several (mean and standard deviation over the seeds)."
#| echo: false
rows = []
for arm, name in networks.items():
    boxes = mean(m['arms'][arm]['boxes'] / m['images'] for m in counted)
    covered, several = share(arm, 'covered', 'objects'), share(arm, 'several', 'covered')
    rows.append([name, f'{boxes:.1f}', spread(covered), spread(several)])
columns = ['network', 'boxes per image', 'objects with a box, %', 'of them with several, %']
markdown(markdown_table(columns, rows))

# %%
#| echo: false
hashes = ', '.join(m['hash'] for m in counted[0]['arms'].values())
markdown(
    f"*{len(counted)} seeds of the study `components`, {counted[0]['images']} unlabelled scenes each; "
    f"configurations of {counted[0]['seed']}: {hashes}.* "
    'NMS across classes (`pseudo.cross_nms`, @sec-teacher) prevents this; '
    'the paper does not use it, so neither do the studies here.'
)

# %% [markdown]
# ## Why not one-to-one from the start? {.fold}
#
# The single positive is often not the query that fits best, and inaccurate boxes make this worse. Detectors
# after a burn-in with fifty labels predict on unlabelled scenes, whose true boxes are known here and were
# hidden in training. Each coordinate of the true boxes is then perturbed by Gaussian noise, which stands for
# the errors of a teacher, and each assignment rule assigns the same predictions to the perturbed boxes. An
# object is *misplaced* if some query assigned to the background fits the true box better than all its
# positives (@sec-assigners does the same with a toy example).

# %%
#| hide
measured = json.loads((Path(results) / 'misplaced.json').read_text())
amounts, ways = measured[0]['amounts'], list(measured[0]['rates'])


def rate(name, key):
    return [mean(m['rates'][name][i][key] for m in measured) for i in range(len(amounts))]


# %%
#| label: fig-abl-misplaced
#| fig-cap: "Left: share of objects with a background query that fits better than all positives. Right: share of the positive weight on queries that fit worse than some background query. With small errors Max-IoU loses the least; from 0.15 on task-aligned ranking misplaces the fewest objects, and from 0.2 on the least weight."
#| fig-alt: "Two panels: misplaced objects and misplaced positive weight against the jitter of the boxes, one line per assignment rule"
#| echo: false
colors = dict(zip(ways, ('#7f7f7f', '#d62728', '#9467bd', '#8c564b', '#1f77b4')))
fig, axes = plt.subplots(1, 2, figsize=(7, 3), dpi=80, layout='constrained', sharey=True)
for ax, key, title in zip(axes, ('lost', 'weight'), ('objects', 'positive weight')):
    for name in ways:
        ax.plot(amounts, rate(name, key), color=colors[name], label=name)
    ax.set(xlabel='jitter of the boxes (share of the side)', title=title, ylim=(0, 1))
axes[0].set_ylabel('misplaced')
fig.legend(*axes[0].get_legend_handles_labels(), fontsize=9, ncol=5, loc='outside lower center')
plt.show()

# %%
#| echo: false
at, many = amounts.index(0.2), ways[-1]
one_lost, many_lost = rate('Hungarian', 'lost'), rate(many, 'lost')
word = 'less often than' if many_lost[at] < one_lost[at] else 'no less often than'
objects = sum(m['objects'] for m in measured)
hashes = ', '.join(m['hash'] for m in measured)
markdown(
    'With noise of a fifth of the side, '
    f'one-to-one matching misplaces {100 * one_lost[at]:.0f} % of the objects '
    f'({100 * one_lost[0]:.0f} % with true boxes); '
    f'{many} misplaces {100 * many_lost[at]:.0f} % ({100 * many_lost[0]:.0f} %), {word} one-to-one, '
    f"though {100 * rate(many, 'weight')[at]:.0f} % of its positive weight lies on queries "
    'that fit worse than some background query. '
    f"{len(measured)} trained detectors, {objects} objects on {measured[0]['images']} scenes each, "
    f"{measured[0]['queries']} queries; runs {hashes}. "
    'One-to-one matching misplaces objects even with true boxes because its cost also includes the scores; '
    'the query that it chooses fits nearly as well as the best one.'
)

# %% [markdown]
# ## Summary
#
# - The gain from NMS tells whether a detector still needs it; the runs of every study record AP with and
#   without (@sec-evaluation).
# - For most objects, one-to-one matching assigns a query to the background that fits better than the
#   positive, even with true boxes. With several ranked queries this happens for few objects, but much of the
#   positive weight lies on queries that fit worse.
# - To reproduce: `semidetr ablate components leave_one_out hyper nms_free`, then
#   `python benchmarks/misplaced.py` with burn-ins of `components_50`.
