# %% [markdown]
# # From records to sentences {#sec-report}
#
# > Tables, intervals and plots of a study, and a sentence that withdraws itself when the numbers do not carry
# > it.
#
# A page of results makes a claim, and the claim outlives the run that it came from: settings change, seeds
# are added, and the sentence stays. Here sentences are computed. A page says which arm it compares with
# which; the records say by how much, with which interval, and whether anything was found at all.

# %%
#| default_exp lab.report

# %%
#| export
import json
import tomllib
from pathlib import Path
from statistics import mean, stdev
import matplotlib.pyplot as plt
from scipy.stats import t as student_t
from semidetr.core import DataError
from semidetr.draw import COLORS
from semidetr.lab.study import paired_difference

# %%
#| hide
import tempfile
from IPython.display import Markdown as markdown


# %% [markdown]
# ## A table
#
# Markdown, which both renderers of the book show without a script.

# %%
#| export
def markdown_table(
    columns: list,  # headings
    rows: list,  # lists of cells, anything with a `str`
    align: str = '',  # one of l, c, r for each column; default: first left, the others right
) -> str:
    "A Markdown table, which both renderers show without a script"
    align = align or 'l' + 'r' * (len(columns) - 1)
    rule = [dict(l=':---', c=':---:', r='---:')[a] for a in align]
    return '\n'.join('| ' + ' | '.join(map(str, row)) + ' |' for row in [columns, rule, *rows])


# %%
table = markdown_table(['labels', 'AP'], [[20, 1.5], [50, 2.5]])
assert table.splitlines()[1] == '| :--- | ---: |'
print(table)


# %% [markdown]
# ## Reading
#
# `semidetr ablate` writes one record a seed (@sec-study). A page takes the seeds that have all the arms it
# wants to compare; a seed that lacks one cannot be paired.

# %%
#| export
def read_records(
    results,  # folder of results
    study: str,  # and group, e.g. 'txl_semi/p5'
    arms=(),  # only seeds that have all of these
) -> list:  # records, by seed
    "The committed records of a study, and whether the book has a page of its executed runs"
    folder, page = Path(results) / study, f"/runs/{study.partition('/')[0]}.ipynb"
    listed = any(
        page in (d / '_quarto.yml').read_text()
        for d in Path(results).resolve().parents
        if (d / '_quarto.yml').is_file()
    )
    runs = sorted(
        (json.loads(p.read_text()) | dict(executed=listed) for p in folder.glob('seed*.json')),
        key=lambda r: r['seed'],
    )
    runs = [r for r in runs if set(arms) <= set(r['arms'])]
    if not runs:
        raise DataError(
            f'{folder}: no seed with {", ".join(arms) or "a record"}; run `semidetr ablate {study.partition("/")[0]}`'
        )
    return runs


def with_arm(
    runs: list,  # of `read_records`: variants
    others: list,  # records of the study whose burn-ins they start from
    arm: str,  # of the others
    name: str,  # what it is called among the variants, before which it is put
) -> list:  # records of the seeds that both have
    "Variants and their reference, which belongs to another study"
    start = {r['seed']: r for r in others if arm in r['arms']}
    for r in runs:
        if r['seed'] in start and r['burn_in']['hash'] != start[r['seed']]['burn_in']['hash']:
            raise DataError(
                f"{r['study']} and {arm}: seed {r['seed']} starts from another burn-in; run `semidetr ablate {r['study']}`"
            )
    both = [
        r | dict(arms={name: start[r['seed']]['arms'][arm], **r['arms']}) for r in runs if r['seed'] in start
    ]
    if not both:
        raise DataError(
            f"{runs[0]['study']}: no seed of it has {arm}, which it is compared with; run `semidetr ablate {others[0]['study']}`"
        )
    return both


def values(
    runs: list,  # of `read_records`
    arm: str,
    key: str = 'AP',  # of the metrics
    who: str = 'teacher',  # or 'student'
    part: str = 'val',  # or 'dev'
) -> list:  # percent, one a seed
    "One number of each seed"
    return [r['arms'][arm]['metrics'][part][who][key] for r in runs]


def class_values(
    runs: list,
    arm: str,  # see `values`
    name: str,  # of the class
) -> list:  # AP in percent, one a seed
    "AP of one class"
    return [v['per_class'][name]['AP'] for v in (r['arms'][arm]['metrics']['val']['teacher'] for r in runs)]


# %% [markdown]
# ## A difference and its interval
#
# With $d_s$ the difference of two arms in seed $s$, $n$ seeds, and $t_{n-1}$ the quantile of Student's
# distribution,
# $$
# \bar d \pm t_{n-1}(0.975)\,\frac{\operatorname{std}(d)}{\sqrt n}
# $$ {#eq-report-interval}
#
# holds the true mean difference in 95 % of all repetitions, if differences are roughly normal. Three seeds
# give $t_2 = 4.3$: the price of few seeds is paid openly.

# %%
#| export
def difference(
    runs: list,
    arm: str,
    base: str,
    key: str = 'AP',
    who: str = 'teacher',  # see `values`
) -> dict:  # mean, std, each, n, and half: half the width of the interval
    "How much `arm` is above `base`, pair by pair (@eq-report-interval)"
    return with_interval(paired_difference(values(runs, base, key, who), values(runs, arm, key, who)))


def with_interval(
    d: dict,  # of `paired_difference`
) -> dict:  # the same with `half`; infinite for one seed
    "Half the width of the 95 % interval"
    return d | dict(
        half=student_t.ppf(0.975, d['n'] - 1) * d['std'] / d['n'] ** 0.5 if d['n'] > 1 else float('inf')
    )


def found(d: dict) -> bool:
    "Does the interval leave out zero?"
    return abs(d['mean']) > d['half']


def plus_minus(d: dict) -> str:
    "Mean and interval, or the bare difference of one seed"
    return f"{d['mean']:+.1f}\u00a0±\u00a0{d['half']:.1f}" if d['n'] > 1 else f"{d['mean']:+.1f}"


def spread(
    numbers: list,  # one a seed
) -> str:
    "Mean and standard deviation"
    return (
        f'{mean(numbers):.1f}\u00a0±\u00a0{stdev(numbers):.1f}' if len(numbers) > 1 else f'{numbers[0]:.1f}'
    )


def verdict(
    what: str,  # 'a against b'
    d: dict,  # of `difference`
    unit: str = 'AP',
) -> str:
    "The sentence: with its numbers, and taken back where they do not carry it"
    if d['n'] == 1:
        return f"{what}: {d['mean']:+.1f} {unit}, one seed."
    text = f"{what}: {d['mean']:+.1f} {unit} on average over {d['n']} seeds, 95 % interval ±{d['half']:.1f} (each: {', '.join(f'{x:+.1f}' for x in d['each'])})"
    return text + ('.' if found(d) else '; no difference found at this scale.')


# %%
toy = Path(tempfile.mkdtemp())
(toy / 'toy').mkdir()
for seed, (a, b) in enumerate([(16.0, 20.0), (20.0, 23.0), (15.0, 18.5)]):
    arm = lambda ap: dict(
        hash='0' * 12,
        commit='0' * 12,
        cpu_seconds=60,
        seconds=70,
        iterations=10,
        data=dict(labelled=20, unlabelled=80),
        machine='toy',
        metrics=dict(val=dict(teacher=dict(AP=ap, AP50=2 * ap, AP_nms=ap))),
    )
    (toy / 'toy' / f'seed{seed}.json').write_text(
        json.dumps(
            dict(
                study='toy',
                seed=seed,
                burn_in=arm(10.0) | dict(commit='0' * 12),
                arms=dict(supervised=arm(a), teacher=arm(b), noise=arm(a + (-1) ** seed)),
            )
        )
    )
runs = read_records(toy, 'toy')
gain, noise = (difference(runs, arm, 'supervised') for arm in ('teacher', 'noise'))
assert (
    found(gain)
    and not found(noise)
    and verdict('noise', noise).endswith('no difference found at this scale.')
)
markdown(
    '\n'.join(
        f'* {verdict(name, d)}'
        for name, d in {'teacher against supervised': gain, 'noise against supervised': noise}.items()
    )
)


# %%
#| export
def verdicts(
    runs: list,
    names: dict,
    base: str,  # see `difference`; arm -> how the page calls it
    keys=('AP', 'AP_nms'),
) -> str:  # Markdown list
    "A line an arm: what separates it from `base`, as it is and suppressed"
    lines = []
    for arm, name in names.items():
        if arm == base:
            continue
        one, *more = (difference(runs, arm, base, key) for key in keys)
        lines.append(
            f'* {verdict(name, one)}'
            + ''.join(
                f" With NMS {plus_minus(d)}{'' if d['n'] == 1 or found(d) else ' (no difference found)'}."
                for d in more
            )
        )
    return '\n'.join(lines)


# %% [markdown]
# ## Tables
#
# A row an arm: what it reached, seed by seed, what suppression would add, the difference to the arm that it
# is compared with, and what it cost.

# %%
#| export
def arm_rows(
    runs: list,  # of `read_records`
    names: dict,  # arm -> how the page calls it
    base: str = '',  # arm that the others are compared with
    classes=(),  # columns with the AP of these classes
) -> tuple:  # headings, rows
    "One study, a row an arm"
    columns = [
        'arm',
        'AP',
        'AP50',
        'AP with NMS',
        *classes,
        'AP of each seed',
        *([f'against {names[base]}'] if base else []),
        'CPU-minutes',
    ]
    rows = []
    for arm, name in names.items():
        counted = all('AP_nms' in r['arms'][arm]['metrics']['val']['teacher'] for r in runs)
        rows.append(
            [
                name,
                spread(values(runs, arm)),
                f"{mean(values(runs, arm, 'AP50')):.1f}",
                f"{mean(values(runs, arm, 'AP_nms')):.1f}" if counted else 'not counted',
                *(f'{mean(class_values(runs, arm, c)):.1f}' for c in classes),
                ', '.join(f'{x:.1f}' for x in values(runs, arm)),
                *(['' if arm == base else plus_minus(difference(runs, arm, base))] if base else []),
                f"{mean(r['arms'][arm]['cpu_seconds'] for r in runs) / 60:.1f}",
            ]
        )
    return columns, rows


def arm_table(*args, **kwargs) -> str:  # see `arm_rows`
    "One study as a Markdown table"
    return markdown_table(*arm_rows(*args, **kwargs))


def scale_line(
    runs: list,
    names: dict,  # see `arm_rows`
) -> str:  # Markdown: a paragraph, and a folded table
    "What a table was measured on: images, iterations, time, machine; and every run with commit, configuration and time"
    first, arms = next(iter(names)), [r['arms'][a] for r in runs for a in names]
    a, start = runs[0]['arms'][first], runs[0].get('burn_in')
    cpu, wall = (sum(x[key] for x in arms) / 60 for key in ('cpu_seconds', 'seconds'))
    rows = [
        [
            r['seed'],
            name,
            f"`{x['hash']}`",
            f"`{x['commit']}`",
            x['iterations'],
            f"{x['cpu_seconds'] / 60:.1f}",
            f"{x['seconds'] / 60:.1f}",
        ]
        for r in runs
        for arm, name in names.items()
        for x in [r['arms'][arm]]
    ]
    return (
        f"*Scale: {len(runs)} seed{'s' * (len(runs) > 1)}; {a['data']['labelled']} labelled and {a['data']['unlabelled']} unlabelled images; {a['iterations']} iterations"
        + (
            f" after a burn-in of {start['iterations']} ({mean(r['burn_in']['cpu_seconds'] for r in runs) / 60:.1f} CPU-minutes)"
            if start
            else ''
        )
        + f"; {a.get('threads', 1)} thread{'s' * (a.get('threads', 1) != 1)} of {a['machine']}; {cpu:.0f} CPU-minutes for all arms, {wall:.0f} minutes by the clock one after the other.*"
        + (
            f" Executed runs: @sec-runs-{runs[0]['study'].replace('_', '-')}."
            if runs[0].get('executed')
            else ''
        )
        + '\n\n<details><summary>Every run</summary>\n\n'
        + markdown_table(
            ['seed', 'arm', 'configuration', 'commit', 'iterations', 'CPU-minutes', 'minutes'],
            rows,
            align='rlllrrr',
        )
        + '\n\n</details>\n'
    )


def published(
    results,  # folder of results; the file of published numbers lies beside it
    key: str,  # table of `paper_results.toml`
) -> list:  # its rows
    "The numbers of the paper, as far as they could be obtained"
    return tomllib.loads((Path(results).parent / 'paper_results.toml').read_text())[key]['rows']


def as_published(text) -> str:
    "A cell with a number that was not measured here: coloured, and said to be published where colour is not seen"
    return f'<span class="published" title="published, not measured here">{text}</span>'


# %%
markdown(arm_table(runs, dict(supervised='supervised', teacher='teacher', noise='noise'), 'supervised'))


# %% [markdown]
# ## Dots and lines
#
# A bar hides its seeds. A dot is a run, a black line the mean, and grey lines join the runs of a seed.

# %%
#| export
def plot_arms(
    runs: list,
    names: dict,  # see `arm_rows`
    key: str = 'AP',
    ax=None,  # axes to draw into
    color=COLORS['teacher'],
):
    "Each seed a line through the arms, and the mean; returns the axes"
    ax = ax or plt.subplots(figsize=(max(4, 0.95 * len(names)), 2.8), dpi=80, layout='constrained')[1]
    table, x = [values(runs, arm, key) for arm in names], range(len(names))
    for i in range(len(runs)):
        ax.plot(x, [row[i] for row in table], 'o-', color=color, alpha=0.6, linewidth=0.8, markersize=4)
    ax.plot(x, [mean(row) for row in table], 'k_', markersize=18, markeredgewidth=2, label='mean')
    ax.set(xticks=list(x), ylabel=key.replace('_nms', ' with NMS'))
    ax.set_xticklabels(
        [
            n.replace(' + ', '\n+ ') if ' + ' in n else n if n[0] == '+' else n.replace(' ', '\n')
            for n in names.values()
        ],
        fontsize=7,
    )
    return ax


def plot_differences(
    runs: list,
    names: dict,
    base: str,  # see `arm_rows`
    keys=('AP',),  # metrics, one colour each
    ax=None,
):
    "Differences to one arm with their intervals; returns the axes"
    arms = [a for a in names if a != base]
    ax = ax or plt.subplots(figsize=(5.5, 1 + 0.28 * len(arms)), dpi=80, layout='constrained')[1]
    for i, (key, color) in enumerate(zip(keys, (COLORS['teacher'], COLORS['student'], 'grey'))):
        d = [difference(runs, arm, base, key) for arm in arms]
        at = [y + 0.25 * (i - (len(keys) - 1) / 2) for y in range(len(arms))]
        ax.errorbar(
            [x['mean'] for x in d],
            at,
            xerr=[x['half'] if x['n'] > 1 else 0 for x in d],
            fmt='o',
            color=color,
            capsize=3,
            markersize=4,
            label=key.replace('_nms', ' with NMS'),
        )
    ax.axvline(0, color='black', linewidth=0.8)
    ax.set(yticks=range(len(arms)), xlabel=f'against {names[base]}')
    ax.set_yticklabels([names[a] for a in arms], fontsize=8)
    ax.invert_yaxis()
    if len(keys) > 1:
        ax.legend(fontsize=7)
    return ax


# %%
#| label: fig-report-toy
#| fig-cap: "Toy study. Left: the seeds are far apart, the lines are nearly parallel. Right: the differences with their intervals; one leaves out zero, the other does not."
#| fig-alt: "Left, AP of three arms, one line a seed; right, two differences with intervals"
fig, axes = plt.subplots(1, 2, figsize=(7, 2.4), dpi=80, layout='constrained')
toy_names = dict(supervised='supervised', teacher='teacher', noise='noise')
plot_arms(runs, toy_names, ax=axes[0])
plot_differences(runs, toy_names, 'supervised', ax=axes[1])
plt.show()

# %% [markdown]
# ## Summary
#
# - Pages read records, pair the arms of a seed, and compute what they say.
# - A difference whose interval covers zero is called *no difference found at this scale*, by the same line
#   that would have praised it.
# - Published numbers keep a colour of their own.
#
# ## Exercises
#
# 1. How wide is the interval of three differences with a standard deviation of 1? Of five?
# 2. Twenty arms are compared with one. How many intervals leave out zero if nothing differs?
