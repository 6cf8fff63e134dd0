# %% [markdown]
# # Hyper-parameters {#sec-abl-hyper}
#
# > See the effect of the length of the first stage, queries per object, powers of score and overlap, weight
# > of the unlabelled loss, score threshold, and decay of the teacher, one at a time.

# %% tags=["parameters"]
#| hide
results = 'results'  # folder of results

# %%
#| hide
import matplotlib.pyplot as plt
from IPython.display import Markdown as markdown
from semidetr.draw import COLORS
from semidetr.lab.report import (
    arm_table,
    difference,
    finding,
    read_records,
    scale_line,
    sorted_out,
    values,
    verdicts,
    with_arm,
)

# %%
#| hide
names = dict(
    reference='reference',
    T1_50='$T_1=50$',
    T1_150='$T_1=150$',
    k_3='$k=3$',
    k_13='$k=13$',
    alpha_2=r'$\alpha=2$',
    beta_2=r'$\beta=2$',
    w_u_1='$w_u=1$',
    w_u_4='$w_u=4$',
    ema_97='decay .97',
    ema_997='decay .997',
)
axes_of = {
    'length of the first stage, $T_1$': {50: 'T1_50', 100: 'reference', 150: 'T1_150'},
    'queries per object, $k$': {3: 'k_3', 6: 'reference', 13: 'k_13'},
    r'power of the score, $\alpha$': {1: 'reference', 2: 'alpha_2'},
    r'power of the overlap, $\beta$': {2: 'beta_2', 6: 'reference'},
    'weight, $w_u$': {1: 'w_u_1', 2: 'reference', 4: 'w_u_4'},
    'threshold': {0.2: 'score_2', 0.3: 'reference', 0.4: 'score_4', 0.5: 'score_5'},
    'decay of the teacher': {0.97: 'ema_97', 0.99: 'reference', 0.997: 'ema_997'},
}
full = read_records(results, 'components')
runs = with_arm(read_records(results, 'hyper', list(names)[1:]), full, 'shm_cqc_cpm', 'reference')
thresholds = read_records(results, 'filters', ['score_2', 'score_4', 'score_5'])  # arms of another study
thresholds = with_arm(thresholds, full, 'shm_cqc_cpm', 'reference')

# %%
#| hide
chosen = runs[0]['arms']['reference']['config']
assert (
    chosen['method']['T1'],
    chosen['criterion']['k'],
    chosen['criterion']['alpha'],
    chosen['criterion']['beta'],
    chosen['method']['unsup_weight'],
    chosen['pseudo']['threshold'],
    chosen['ema']['decay'],
) == (100, 6, 1, 6, 2, 0.3, 0.99)

# %%
#| echo: false
text = finding(
    *sorted_out(runs, names, 'reference'),
    'an interval that barely excludes zero among ten is a reason for more seeds',
)
markdown(text)

# %%
#| label: fig-abl-hyper
#| fig-cap: "AP without NMS against each number: thin lines are seeds, dots their mean, the ring marks the reference."
#| fig-alt: "Seven panels, one per hyper-parameter: AP of every seed and their mean"
#| echo: false
fig, grid = plt.subplots(2, 4, figsize=(9, 4.4), dpi=80, layout='constrained', sharey=True)
for ax, (title, points) in zip(grid.flat, axes_of.items()):
    here = thresholds if title == 'threshold' else runs
    table = [values(here, arm) for arm in points.values()]
    for seed in zip(*table):
        ax.plot(range(len(points)), seed, color=COLORS['teacher'], linewidth=0.7, alpha=0.6)
    middle = [sum(row) / len(row) for row in table]
    ax.plot(range(len(points)), middle, 'o-', color='black', markersize=4)
    at = list(points.values()).index('reference')
    ax.plot(at, middle[at], 'o', markersize=10, markerfacecolor='none', color=COLORS['student'])
    ax.set(xticks=range(len(points)), xticklabels=list(points), xlim=(-0.4, len(points) - 0.6))
    ax.set_xlabel(title, fontsize=9)
for ax in grid[:, 0]:
    ax.set_ylabel('AP')
grid.flat[-1].set_axis_off()
plt.show()

# %%
#| label: tbl-abl-hyper
#| tbl-cap: "COCO AP on 300 test scenes, twenty labels: mean and standard deviation over the seeds; the paired difference to the reference with its 95 % interval. Thresholds: @tbl-abl-filters."
#| echo: false
markdown(arm_table(runs, names, 'reference'))

# %% [markdown]
# ## How it was measured {.fold}
#
# Each arm changes one number of the full method (@sec-abl-components), in one direction or, where it makes
# sense, in both. The settings were not chosen on this page: they come from the paper or, where twenty labels
# on a laptop need another value, from the development part of seed 0. The test split was read for this page.

# %% [markdown]
# ## Every comparison {.fold}

# %%
#| echo: false
markdown(verdicts(runs, names, 'reference') + '\n\n' + scale_line(runs, names))

# %% [markdown]
# ## How to read ten comparisons {.fold}
#
# With 95 % intervals, if none of the numbers had any effect, at least one of ten independent intervals would
# exclude zero with a probability of 0.4. So an arm whose interval barely excludes zero is a reason to run
# more seeds, not a finding. How large differences by chance are:

# %%
#| echo: false
of_arms = {arm: difference(runs, arm, 'reference')['mean'] for arm in names if arm != 'reference'}
best, worst = max(of_arms, key=of_arms.get), min(of_arms, key=of_arms.get)
whole, chance = values(full, 'shm_cqc_cpm'), difference(full, 'shm_cqc_cpm', 'shm_cqc')
each = ', '.join(f'{x:+.1f}' for x in chance['each'])
markdown(
    f'* The {len(whole)} seeds of the reference differ by up to {max(whole) - min(whole):.1f} AP; '
    'so arms are compared within a seed, never across seeds.\n'
    '* Within a seed, two arms for which no difference was found '
    '(the full method with and without mining) '
    f"differ by {each}: a standard deviation of {chance['std']:.1f}.\n"
    f'* The best arm of this page ({names[best]}, {of_arms[best]:+.1f}) and '
    f'the worst ({names[worst]}, {of_arms[worst]:+.1f}) differ by {of_arms[best] - of_arms[worst]:.1f} AP.'
)

# %% [markdown]
# ## Comparison with the paper {.fold}
#
# The paper uses $\alpha=1$, $\beta=6$, a threshold of 0.4, $w_u=4$ (2 for COCO-Full), a decay of 0.999 and
# half of the iterations for the first stage (for COCO-Full three quarters by its text, half by its code). Its
# $k$ is 13 for 900 queries, here 6 for 100. Its results for other values could not be obtained.
#
# ## Summary
#
# - Each arm changes one number; everything else is the same within a seed.
# - Where an interval includes zero, the computed sentences say that no difference was found.
# - To reproduce: `semidetr ablate hyper`, after `semidetr ablate components`.
