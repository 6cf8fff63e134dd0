# %% [markdown]
# # Long runs, kills and damaged files {#sec-endurance}
#
# > Does a long run need more memory at its end, a killed one go on exactly, a damaged file get one line?

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
soak = json.loads(Path('../../benchmarks/results/soak.json').read_text())
fuzz = json.loads(Path('../../benchmarks/results/fuzz.json').read_text())


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
ends = f'{soak["equal"]} of {len(soak["runs"])} runs, killed {soak["kills"]} times in all and started again,'
found = f'{fuzz["inputs"]:,} damaged inputs to {len(fuzz["formats"])} readers,'
sentences += [
    f'{ends} end equal to an unbroken run to the last bit',
    f'of {found} {len(fuzz["findings"]) or "none"} ended in a traceback, a hang or a refusal without a file',
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
# ## Killed and continued {.fold}
#
# `make soak` draws points in the course of each method's run, kills its process there with SIGKILL, and starts
# the same command again until the run ends. Points lie in all three stages, and in the middle of files and of
# lines of the log. Then every tensor, the random states and the log are compared with those of an unbroken run.

# %%
#| label: tbl-endurance-kills
#| tbl-cap: "Kills by method and kind of run: all runs end equal to the unbroken one."
#| echo: false
kinds = list(dict.fromkeys(run['settings'] for run in soak['runs']))
cells = {(run['method'], run['settings']): run for run in soak['runs']}
assert not any(run['faults'] for run in soak['runs'])
rows = [[name, *(len(cells[name, kind]['kills']) for kind in kinds)] for name in soak['by_method']]
markdown(markdown_table(['method', *kinds], rows))

# %% [markdown]
# ## Damaged files {.fold}
#
# `make fuzz` damages a small valid input of each kind (bits, bytes, lines, values, nesting, names, links) and
# reads it as the commands do. It must open with the right boxes, or be refused in one line that names the
# file. More than ten seconds or a gigabyte for one input count as findings.

# %%
#| label: tbl-endurance-inputs
#| tbl-cap: "Damaged inputs of each kind, and how many of them were refused; the others opened."
#| echo: false
rows = []
for kind, found in fuzz['formats'].items():
    refused = sum(n for what, n in found.items() if what in ('DataError', 'ConfigError', 'Damaged'))
    rows.append([kind, f'{sum(found.values()):,}', f'{refused:,}'])
seconds = f"{fuzz['cpu_seconds']:,} CPU-seconds in all."
markdown(markdown_table(['kind', 'inputs', 'refused'], rows) + f'\n\n{seconds}')

# %% [markdown]
# ## How memory was measured {.fold}
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
# * What was killed goes on to the same bits; what is damaged opens rightly or is refused in one line.

# %%
#| hide
for case, run in runs.items():
    memory = [r['main_mb'] for r in during(case, 0.3, 0.99)]
    assert max(memory) < 1.05 * min(memory), 'memory grows'
    assert max(handles[case], early[case]) < 25
    assert {r['processes'] for r in during(case, 0.1, 0.9)} == {typical(case, 'processes', 0.1, 0.9)}
assert runs['tiny']['iterations'] == 10_000
