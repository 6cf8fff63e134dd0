# %% [markdown]
# # From records to sentences {#sec-report}
#
# > Compute the tables, intervals, plots and sentences of a page of results from the records of a study.
#
# A sentence about a result is easily older than the result: settings change, seeds are added, and the
# sentence stays. Here sentences are computed. A page names the two arms that it compares; the records give
# the difference, its interval, and whether a difference was found at all.

# %%
#| default_exp lab.report

# %%
#| export
import os
import re
from math import isfinite
from pathlib import Path
from statistics import mean, stdev
import matplotlib.pyplot as plt
from markupsafe import Markup
from scipy.stats import t as student_t
from semidetr.core import ConfigError, DataError, suggest
from semidetr.reading import check, check_fields, read_record, read_toml
from semidetr.draw import COLORS
from semidetr.lab.study import paired_difference

# %%
#| hide
import json
import tempfile
from IPython.display import Markdown as markdown

# %% [markdown]
# ## A table
#
# Markdown, because both renderers of the book show it without a script.

# %%
#| export
_CODE_SPAN = re.compile('`[^`]+`')
_NO_SPAN = re.compile(r'``|\\`')  # other runs of backticks, and escaped ones


def cell_text(
    value,  # anything with a `str`; `Markup`: HTML that this package made
) -> str:
    "A cell of a Markdown table: tags and columns of a name or a setting are shown, not obeyed"
    if isinstance(value, Markup):
        return str(value)
    text, out, pos = ' '.join(str(value).split('\n')), [], 0
    for m in _CODE_SPAN.finditer('' if _NO_SPAN.search(text) else text):
        out += [text[pos : m.start()].replace('<', '&lt;'), m[0]]
        pos = m.end()
    out.append(text[pos:].replace('<', '&lt;'))
    return re.sub(r'(?<!\\)\|', r'\\|', ''.join(out))


def markdown_table(
    columns: list,  # headings
    rows: list,  # lists of cells, as for `cell_text`
    align: str = '',  # one of l, c, r for each column; default: first left, the others right
) -> str:
    "A Markdown table"
    align = align or 'l' + 'r' * (len(columns) - 1)
    rule = [dict(l=':---', c=':---:', r='---:')[a] for a in align]
    return '\n'.join('| ' + ' | '.join(map(cell_text, row)) + ' |' for row in [columns, rule, *rows])


# %%
table = markdown_table(['labels', 'AP'], [[20, 1.5], [50, 2.5]])
assert table.splitlines()[1] == '| :--- | ---: |'
print(table)


# %% [markdown]
# ## Reading
#
# `semidetr ablate` writes one record per seed (@sec-study). A page takes the seeds that have all the arms
# that it compares; a seed that lacks one cannot be paired.

# %%
#| export
def _has_page(results, study):
    "Does the book that the records belong to list a page of the executed runs of this study?"
    page = f'/runs/{study}.ipynb'
    books = [d / '_quarto.yml' for d in Path(os.path.realpath(results)).parents]
    return any(page in book.read_text() for book in books if book.is_file())


def read_records(
    results,  # folder of results
    study: str,  # and group, e.g. 'txl_semi/p5'
    arms=(),  # only seeds that have all of these
) -> list:  # records, by seed; each says in `executed` whether the book has a page of the executed runs
    "The committed records of a study"
    folder, name = Path(results) / study, study.partition('/')[0]
    executed = _has_page(results, name)
    runs = [read_record(p) | dict(executed=executed, path=p) for p in folder.glob('seed*.json')]
    runs = sorted((r for r in runs if set(arms) <= set(r['arms'])), key=lambda r: r['seed'])
    if not runs:
        missing = ', '.join(arms) or 'a record'
        raise DataError(f'{folder}: no seed with {missing}; run `semidetr ablate {name}`')
    return runs


def with_arm(
    runs: list,  # of `read_records`: variants
    others: list,  # records of the study whose burn-ins they start from
    arm: str,  # of the others
    name: str,  # what it is called among the variants, before which it is put
) -> list:  # records of the seeds that both have
    "Variants and their reference, which belongs to another study"
    start = {r['seed']: r for r in others if arm in r['arms']}
    both = []
    for r in runs:
        if r['seed'] not in start:
            continue
        other = start[r['seed']]
        if r['burn_in']['hash'] != other['burn_in']['hash']:
            raise DataError(
                f"{r['study']} and {arm}: seed {r['seed']} starts from another burn-in; "
                f"run `semidetr ablate {r['study']}`"
            )
        both.append(r | dict(arms={name: other['arms'][arm], **r['arms']}))
    if not both:
        raise DataError(
            f"{runs[0]['study']}: no seed of it has {arm}, which it is compared with; "
            f"run `semidetr ablate {others[0]['study']}`"
        )
    return both


# %%
#| export
def values(
    runs: list,  # of `read_records`
    arm: str,  # of the study
    key: str = 'AP',  # of the metrics
    who: str = 'teacher',  # or 'student'
    part: str = 'val',  # or 'dev'
) -> list:  # percent, one per seed
    "One number of each seed"
    found = []
    for r in runs:
        where = f"{r.get('path') or r.get('study', 'record')}, seed {r['seed']}, arm {arm!r}"
        try:
            x = r['arms'][arm]['metrics'][part][who][key]
        except KeyError as e:
            raise DataError(
                f'{where}: has no {e} among its metrics/{part}/{who}/{key}; run its study again'
            ) from None
        if not (isinstance(x, dict) if key == 'per_class' else isinstance(x, (int, float)) and isfinite(x)):
            raise DataError(
                f'{where}: {key} is {x if isinstance(x, float) else type(x).__name__}; run its study again'
            )
        found.append(x)
    return found


def class_values(
    runs: list,  # of `read_records`
    arm: str,  # of the study
    name: str,  # of the class
) -> list:  # AP in percent, one per seed
    "AP of one class"
    kind = dict[str, dict]
    found = [check(kind, classes, f'classes of arm {arm!r}') for classes in values(runs, arm, 'per_class')]
    if lost := [c for c in found if not isinstance(c.get(name, {}).get('AP'), (int, float))]:
        raise DataError(f'arm {arm!r} has no AP of the class {name!r}; {suggest(name, lost[0])}')
    return [classes[name]['AP'] for classes in found]


# %% [markdown]
# ## A difference and its interval
#
# With $d_s$ the difference of two arms in seed $s$, $n$ seeds, and $t_{n-1}$ the quantile of Student's
# distribution,
# $$
# \bar d \pm t_{n-1}(0.975)\,\frac{\operatorname{std}(d)}{\sqrt n}
# $$ {#eq-report-interval}
#
# contains the true mean difference in 95 % of all repetitions, if differences are roughly normal. For three
# seeds $t_2(0.975) = 4.3$: few seeds give wide intervals.

# %%
#| export
def difference(
    runs: list,  # of `read_records`
    arm: str,  # of the study
    base: str,  # arm that it is compared with
    key: str = 'AP',  # of the metrics
    who: str = 'teacher',  # or 'student'
) -> dict:  # mean, std, each, n, and half: half the width of the interval
    "How much `arm` is above `base`, pair by pair (@eq-report-interval)"
    return with_interval(paired_difference(values(runs, base, key, who), values(runs, arm, key, who)))


def with_interval(
    d: dict,  # of `paired_difference`
) -> dict:  # the same with `half`; infinite for one seed
    "Half the width of the 95 % interval"
    n = d['n']
    half = student_t.ppf(0.975, n - 1) * d['std'] / n**0.5 if n > 1 else float('inf')
    return d | dict(half=half)


# %%
three = with_interval(paired_difference([0.0, 0.0, 0.0], [1.0, 2.0, 3.0]))
assert round(three['half'], 3) == 2.484
three


# %% [markdown]
# A difference is *found* if its interval excludes zero. The sentence about it says which of the two holds.

# %%
#| export
def found(
    d: dict,  # of `difference`
) -> bool:
    "Does the interval exclude zero?"
    return abs(d['mean']) > d['half']


def signed(
    x: float,  # a difference
) -> str:
    "One digit with a sign; what rounds to zero is `+0.0`"
    return f'{round(x, 1) + 0.0:+.1f}'


def plus_minus(
    d: dict,  # of `difference`
) -> str:
    "Mean and interval, or the bare difference of one seed"
    return f"{signed(d['mean'])}\u00a0±\u00a0{d['half']:.1f}" if d['n'] > 1 else signed(d['mean'])


def spread(
    numbers: list,  # one per seed
) -> str:
    "Mean and standard deviation"
    if len(numbers) == 1:
        return f'{numbers[0]:.1f}'
    return f'{mean(numbers):.1f}\u00a0±\u00a0{stdev(numbers):.1f}'


def three_digits(
    v,  # a number, or None
) -> str:
    "Three digits, whole numbers from 100 on; nothing where nothing was measured"
    if v is None:
        return ''
    return f'{v:.3g}' if v < 100 else f'{v:.0f}'


def verdict(
    what: str,  # 'a against b'
    d: dict,  # of `difference`
    unit: str = 'AP',  # behind the number
) -> str:
    "The sentence about a difference, with its numbers; it says so if no difference was found"
    if d['n'] == 1:
        return f"{what}: {signed(d['mean'])} {unit}, one seed."
    each = ', '.join(map(signed, d['each']))
    text = f"{what}: {signed(d['mean'])} {unit} on average over {d['n']} seeds"
    text += f", 95 % interval ±{d['half']:.1f} (each: {each})"
    return text + ('.' if found(d) else '; no difference found at this scale.')


# %%
#| export
def statement(
    a: str,  # name of an arm at the start of a sentence
    b: str,  # name of the arm that it is compared with
    d: dict,  # of `difference`
    unit: str = 'AP',  # behind the number
    when: str = '',  # where it holds, before the statement
) -> str:  # without a full stop
    "A difference as a statement for the top of a page: more, less, or none found"
    before = f'{when}, ' if when else ''
    if d['n'] == 1:
        return f"{before}{a} has {signed(d['mean'])} {unit} against {b} in the one seed"
    if not found(d):
        return f'{before}no difference was found between {a} and {b} ({plus_minus(d)} {unit})'
    more = 'more' if d['mean'] > 0 else 'less'
    return f"{before}{a} has {abs(d['mean']):.1f}\u00a0±\u00a0{d['half']:.1f} {unit} {more} than {b}"


def sorted_out(
    runs: list,  # of `read_records`
    names: dict,  # arm -> its name on the page
    base: str,  # arm that the others are compared with
    key: str = 'AP',  # of the metrics
) -> list:  # sentences without full stops
    "Which arms are better than one, which are worse, and for how many no difference was found"
    others = {n: difference(runs, a, base, key) for a, n in names.items() if a != base}
    listed = lambda keep: ', '.join(f'{n} ({plus_minus(d)})' for n, d in others.items() if keep(d))
    better, worse = (listed(lambda d: found(d) and sign * d['mean'] > 0) for sign in (1, -1))
    open_ = [n for n, d in others.items() if not found(d)]
    out = [f'better than {names[base]}: {better}'] if better else []
    out += [f'worse than {names[base]}: {worse}'] if worse else []
    which = ', '.join(open_) if len(open_) < 6 else f"any of {len(open_)} {'others' if out else 'arms'}"
    return out + ([f'no difference to {names[base]} was found for {which}'] if open_ else [])


def finding(
    *sentences: str,  # with or without a full stop
) -> str:  # Markdown
    "What a page found, in a box at its top"
    whole = [s[:1].upper() + s[1:].rstrip('.') + '.' for s in sentences if s]
    return f"::: {{.finding}}\n{cell_text(' '.join(whole))}\n:::\n"


# %%
toy = Path(tempfile.mkdtemp())
(toy / 'toy').mkdir()
toy_run = dict(
    hash='0' * 12,
    commit='0' * 12,
    cpu_seconds=60,
    seconds=70,
    iterations=10,
    data=dict(labelled=20, unlabelled=80),
    machine='toy',
)
metrics = lambda ap: dict(val=dict(teacher=dict(AP=ap, AP50=2 * ap, AP_nms=ap)))
for seed, (a, b) in enumerate([(16.0, 20.0), (20.0, 23.0), (15.0, 18.5)]):
    points = dict(supervised=a, teacher=b, noise=a + (-1) ** seed)
    toy_arms = {arm: toy_run | dict(metrics=metrics(ap)) for arm, ap in points.items()}
    toy_record = dict(study='toy', seed=seed, burn_in=toy_run | dict(metrics=metrics(10.0)), arms=toy_arms)
    (toy / 'toy' / f'seed{seed}.json').write_text(json.dumps(toy_record))
runs = read_records(toy, 'toy')
gain, noise = (difference(runs, arm, 'supervised') for arm in ('teacher', 'noise'))
sentences = [verdict('teacher against supervised', gain), verdict('noise against supervised', noise)]
assert found(gain) and not found(noise)
assert (
    statement('teacher', 'labels alone', gain) == 'teacher has 3.5\u00a0±\u00a01.2 AP more than labels alone'
)
assert statement('noise', 'labels alone', noise).startswith(
    'no difference was found between noise and labels alone'
)
both = dict(supervised='labels alone', teacher='teacher', noise='noise')
assert sorted_out(runs, both, 'supervised') == [
    'better than labels alone: teacher (+3.5\u00a0±\u00a01.2)',
    'no difference to labels alone was found for noise',
]
assert signed(-0.04) == '+0.0' and signed(-0.06) == '-0.1'
assert sentences[1].endswith('no difference found at this scale.')
assert [three_digits(v) for v in (None, 0.12345, 12.345, 1234.5)] == ['', '0.123', '12.3', '1234']
markdown('\n'.join(f'* {sentence}' for sentence in sentences))


# %%
#| export
def verdicts(
    runs: list,  # of `read_records`
    names: dict,  # arm -> its name on the page
    base: str,  # arm that the others are compared with
    keys=('AP', 'AP_nms'),  # metrics: the first in a sentence, the others behind it
) -> str:  # Markdown list
    "One line per arm: its difference to `base`, without and with NMS"
    lines = []
    for arm in names:
        if arm == base:
            continue
        first, *more = (difference(runs, arm, base, key) for key in keys)
        line = f'* {verdict(names[arm], first)}'
        for d in more:
            doubt = '' if d['n'] == 1 or found(d) else ' (no difference found)'
            line += f' With NMS {plus_minus(d)}{doubt}.'
        lines.append(cell_text(line))
    return '\n'.join(lines)


# %% [markdown]
# ## Tables
#
# One row per arm: its AP, seed by seed, what suppression would add, the difference to the arm that it is
# compared with, and its cost.

# %%
#| export
def arm_rows(
    runs: list,  # of `read_records`
    names: dict,  # arm -> its name on the page
    base: str = '',  # arm that the others are compared with
    classes=(),  # columns with the AP of these classes
) -> tuple:  # headings, rows
    "One study, one row per arm"
    columns = ['arm', 'AP', 'AP50', 'AP with NMS', *classes]
    columns += [f'against {names[base]}', 'CPU-minutes'] if base else ['CPU-minutes']
    rows = []
    for arm, name in names.items():
        row = [name, spread(values(runs, arm)), f"{mean(values(runs, arm, 'AP50')):.1f}"]
        counted = all('AP_nms' in r['arms'][arm]['metrics']['val']['teacher'] for r in runs)
        row.append(f"{mean(values(runs, arm, 'AP_nms')):.1f}" if counted else 'not counted')
        row += [f'{mean(class_values(runs, arm, c)):.1f}' for c in classes]
        if base:
            row.append('' if arm == base else plus_minus(difference(runs, arm, base)))
        row.append(f"{mean(r['arms'][arm]['cpu_seconds'] for r in runs) / 60:.1f}")
        rows.append(row)
    return columns, rows


def arm_table(*args, **kwargs) -> str:  # those of `arm_rows`
    "One study as a Markdown table"
    return markdown_table(*arm_rows(*args, **kwargs))


# %%
toy_names = {arm: arm for arm in ('supervised', 'teacher', 'noise')}
toy_table = arm_table(runs, toy_names, 'supervised')
assert len(toy_table.splitlines()) == 2 + len(toy_names)
markdown(toy_table)


# %% [markdown]
# Below a table stands what it was measured on, and a number that was published elsewhere is marked.

# %%
#| export
def _run_table(runs, names):
    "Every run of these arms with its configuration, commit, iterations and times"
    columns = ['seed', 'arm', 'AP', 'configuration', 'commit', 'iterations', 'CPU-minutes', 'minutes']
    rows = []
    for r in runs:
        for arm, name in names.items():
            x = r['arms'][arm]
            minutes = [f"{x[key] / 60:.1f}" for key in ('cpu_seconds', 'seconds')]
            ap = f"{x['metrics']['val']['teacher']['AP']:.1f}"
            rows.append(
                [r['seed'], name, ap, f"`{x['hash']}`", f"`{x['commit']}`", x['iterations'], *minutes]
            )
    return markdown_table(columns, rows, align='rlrllrrr')


def scale_line(
    runs: list,  # of `read_records`
    names: dict,  # arm -> its name on the page
) -> str:  # Markdown: a paragraph, and a folded table of all runs
    "What a table was measured on: images, iterations, time, machine"
    arms = [r['arms'][arm] for r in runs for arm in names]
    first, start = arms[0], runs[0].get('burn_in')
    data, threads = first['data'], first.get('threads', 1)
    cpu, wall = (sum(x[key] for x in arms) / 60 for key in ('cpu_seconds', 'seconds'))
    parts = [
        f"{len(runs)} seed{'s' * (len(runs) > 1)}",
        f"{data['labelled']} labelled and {data['unlabelled']} unlabelled images",
        f"{first['iterations']} iterations",
        f"{threads} thread{'s' * (threads != 1)} of {first['machine']}",
        f'{cpu:.0f} CPU-minutes for all arms, {wall:.0f} minutes by the clock one after the other',
    ]
    if start and all({'cpu_seconds', 'iterations'} <= set(r.get('burn_in') or ()) for r in runs):
        minutes = mean(r['burn_in']['cpu_seconds'] for r in runs) / 60
        parts[2] += f" after a burn-in of {start['iterations']} ({minutes:.1f} CPU-minutes)"
    text = cell_text(f"*Scale: {'; '.join(parts)}.*")
    if runs[0].get('executed'):
        text += f" Executed runs: @sec-runs-{runs[0]['study'].replace('_', '-')}."
    details = f'<details><summary>Every run</summary>\n\n{_run_table(runs, names)}\n\n</details>'
    return f'{text}\n\n{details}\n'


def published(
    results,  # folder of results; the file of published numbers is beside it
    key: str,  # table of `paper_results.toml`
) -> list:  # its rows
    "The numbers of the paper, as far as they could be obtained"
    path = Path(results).parent / 'paper_results.toml'
    tables = check(dict[str, dict], read_toml(path), path, ConfigError)
    if key not in tables:
        raise ConfigError(f'{path}: has no table {key!r}; {suggest(key, tables)}')
    return check_fields(tables[key], dict(rows=list[dict]), f'{path}: {key}', ConfigError)['rows']


def as_published(
    text,  # anything with a `str`
) -> Markup:  # HTML that `cell_text` leaves alone; the text in it is escaped
    "A cell with a number that was not measured here: coloured, with a title where colours are not seen"
    return Markup('<span class="published" title="published, not measured here">{}</span>').format(text)


# %% [markdown]
# ## Dots and lines
#
# A bar hides its seeds. Here a dot is a run, a black line is the mean, and thin lines join the runs of a
# seed. A method has the same name and colour on every page.

# %%
#| export
_METHODS = 'supervised mean_teacher semi_detr plus'.split()
METHOD_NAMES = dict(zip(_METHODS, 'supervised, mean teacher, Semi-DETR, Semi-DETR plus'.split(', ')))
METHOD_COLORS = dict(zip(_METHODS, ('#6b6b6b', '#ff7f0e', '#1f77b4', '#9467bd')))
_SAME = dict(shm_cqc_cpm=_METHODS[2], hybrid=_METHODS[2], distilled=_METHODS[3])  # arm -> method


def arm_color(
    arm: str,  # of a study
    other: str = COLORS['teacher'],  # colour of an arm that is none of the methods
) -> str:
    "The colour of the method that an arm is"
    return METHOD_COLORS.get(_SAME.get(arm, arm), other)


def _broken_name(name):
    "Name of an arm on several lines"
    if ' + ' in name:
        return name.replace(' + ', '\n+ ')
    return name if name[0] == '+' else name.replace(' ', '\n')


def plot_arms(
    runs: list,  # of `read_records`
    names: dict,  # arm -> its name in the plot
    key: str = 'AP',  # of the metrics
    ax=None,  # axes to draw into
    color: str = '',  # of all runs; '': the methods in their colours
):
    "Each seed a line through the arms, and the mean; returns the axes"
    ax = ax or plt.subplots(figsize=(max(4, 0.95 * len(names)), 2.8), dpi=80, layout='constrained')[1]
    table, x = [values(runs, arm, key) for arm in names], range(len(names))
    for i in range(len(runs)):
        ax.plot(x, [row[i] for row in table], '-', color='grey', alpha=0.6, linewidth=0.8)
    for at, arm, numbers in zip(x, names, table):
        ax.plot([at] * len(numbers), numbers, 'o', color=color or arm_color(arm), markersize=5)
    ax.plot(x, [mean(row) for row in table], 'k_', markersize=18, markeredgewidth=2, label='mean')
    ax.set(xticks=list(x), ylabel=key.replace('_nms', ' with NMS'))
    ax.set_xticklabels(map(_broken_name, names.values()), fontsize=9)
    return ax


def plot_differences(
    runs: list,  # of `read_records`
    names: dict,  # arm -> its name in the plot
    base: str,  # arm that the others are compared with
    keys=('AP',),  # metrics, one colour each
    ax=None,  # axes to draw into
):
    "Differences to one arm with their intervals; returns the axes"
    arms = [a for a in names if a != base]
    ax = ax or plt.subplots(figsize=(5.5, 1 + 0.28 * len(arms)), dpi=80, layout='constrained')[1]
    for i, (key, color) in enumerate(zip(keys, ('black', 'grey', 'lightgrey'))):
        d = [difference(runs, arm, base, key) for arm in arms]
        at = [y + 0.25 * (i - (len(keys) - 1) / 2) for y in range(len(arms))]
        means, halves = [x['mean'] for x in d], [x['half'] if x['n'] > 1 else 0 for x in d]
        style = dict(fmt='o', color=color, capsize=3, markersize=4, label=key.replace('_nms', ' with NMS'))
        ax.errorbar(means, at, xerr=halves, **style)
    ax.axvline(0, color='black', linewidth=0.8)
    ax.set(yticks=range(len(arms)), xlabel=f'against {names[base]}')
    ax.set_yticklabels([names[a] for a in arms], fontsize=9)
    ax.invert_yaxis()
    if len(keys) > 1:
        ax.legend(fontsize=9)
    return ax


# %%
#| label: fig-report-toy
#| fig-cap: "Toy study. Left: the seeds are far apart, the lines are nearly parallel. Right: the differences with their intervals; one excludes zero, the other does not."
#| fig-alt: "Left, AP of three arms, one line per seed; right, two differences with intervals"
fig, axes = plt.subplots(1, 2, figsize=(7, 2.4), dpi=80, layout='constrained')
plot_arms(runs, toy_names, ax=axes[0])
plot_differences(runs, toy_names, 'supervised', ax=axes[1])
plt.show()

# %% [markdown]
# ## Summary
#
# - Pages read records, pair the arms of a seed, and compute their sentences.
# - A difference whose interval contains zero is reported as *no difference found at this scale*.
# - Published numbers have a colour of their own.
#
# ## Exercises
#
# 1. How wide is the interval of three differences with a standard deviation of 1? Of five?
# 2. Twenty arms are compared with one. How many intervals exclude zero if nothing differs?
