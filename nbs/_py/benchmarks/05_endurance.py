# %% [markdown]
# # Memory over a long run {#sec-endurance}
#
# > Does a run that goes on for ten thousand iterations need more memory or open files at its end?

# %%
#| hide
import json
from pathlib import Path
from statistics import median
import matplotlib.pyplot as plt
from IPython.display import Markdown as markdown
from semidetr.lab.report import finding, markdown_table

# %%
#| hide
record = json.loads(Path('../../benchmarks/results/endurance.json').read_text())
runs = {run['case']: run for run in record['runs']}


def during(case, begin, end):
    "Readings between two fractions of a run"
    n = runs[case]['iterations']
    return [r for r in runs[case]['rows'] if begin * n <= r['iteration'] <= end * n]


def typical(case, key, begin, end):
    "Median of a quantity between two fractions of a run"
    return median(r[key] for r in during(case, begin, end))


handles = {case: max(r['handles'] for r in during(case, 0.6, 1)) for case in runs}
early = {case: max(r['handles'] for r in during(case, 0, 0.6)) for case in runs}

# %%
#| echo: false
sentences = [
    f'Over {run["iterations"]:,} iterations (`{case}`) the memory of the main process stays between '
    f'{min(r["main_mb"] for r in during(case, 0.3, 0.99)):,} and '
    f'{max(r["main_mb"] for r in during(case, 0.3, 0.99)):,} MB after the burn-in, and it has at most '
    f'{max(handles[case], early[case])} open files'
    for case, run in runs.items()
]
markdown(finding(*sentences))

# %%
#| label: fig-endurance
#| fig-cap: "Memory of the main process and of all processes, and open files of the main process. The grey lines are the changes of stage."
#| fig-alt: "Two rows of two panels over the iteration: memory in MB and open files, for the tiny and the small run."
#| echo: false
fig, axes = plt.subplots(len(runs), 2, figsize=(8, 2.6 * len(runs)), dpi=80, squeeze=False)
for row, (case, run) in zip(axes, runs.items()):
    steps = [r['iteration'] for r in run['rows']]
    row[0].plot(steps, [r['all_mb'] for r in run['rows']], label='all processes')
    row[0].plot(steps, [r['main_mb'] for r in run['rows']], label='main process')
    row[1].plot(steps, [r['handles'] for r in run['rows']], color='C2')
    row[0].set(ylabel='MB', ylim=(0, None), title=case)
    row[1].set(ylabel='open files', ylim=(0, None), title=case)
    row[0].legend(fontsize=9)
    for ax in row:
        ax.set(xlabel='iteration')
        for stage in (run['iterations'] // 5, 3 * run['iterations'] // 5):
            ax.axvline(stage, color='.8', zorder=0)
fig.tight_layout()
plt.show()

# %%
#| label: tbl-endurance
#| tbl-cap: "Highest readings of each run, and medians of the first fifth and the last tenth."
#| echo: false
table = []
for case, run in runs.items():
    peak = max(r['main_mb'] for r in run['rows'])
    first, last = typical(case, 'main_mb', 0, 0.2), typical(case, 'main_mb', 0.9, 1)
    whole = max(r['all_mb'] for r in run['rows'])
    table.append([case, f'{run["iterations"]:,}', f'{first:,.0f}', f'{last:,.0f}', f'{peak:,}', f'{whole:,}'])
names = ['run', 'iterations', 'first fifth, MB', 'last tenth, MB', 'main process, peak', 'all, peak']
markdown(markdown_table(names, table))

# %% [markdown]
# ## How it was measured {.fold}
#
# `python benchmarks/endurance.py` wrote the record of this page. It trains Semi-DETR by the command line,
# and every few seconds reads from outside what the processes hold. The run `tiny` has the smallest settings
# and 10,000 iterations, with two workers, images of several sizes, five evaluations and twenty checkpoints;
# `--cases small` adds 1,200 iterations with the preset `small` on photographs (`fod12`). Both pass through
# burn-in, one-to-many and one-to-one matching.
#
# Memory rises once, where the burn-in ends: from there on Semi-DETR decodes the teacher's view as well, and
# two views of every unlabelled image. Open files rise by up to three for a moment, and fall again. At the end
# the workers are gone. Each worker counts the libraries that it shares with the main process once more.
#
# ## Summary
#
# * A long run needs no more open files, threads or processes at its end than at its beginning.
# * Its memory is that of its last stage.

# %%
#| hide
for case, run in runs.items():
    memory = [r['main_mb'] for r in during(case, 0.3, 0.99)]
    assert max(memory) < 1.05 * min(memory), 'memory grows'
    assert max(handles[case], early[case]) < 25
    assert {r['processes'] for r in during(case, 0.1, 0.9)} == {typical(case, 'processes', 0.1, 0.9)}
assert runs['tiny']['iterations'] == 10_000
