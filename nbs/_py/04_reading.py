# %% [markdown]
# # Reading what others wrote {#sec-reading}
#
# > Read settings, splits, results and logs so that a damaged or hostile file is one line, never a crash.

# %%
#| default_exp reading

# %% [markdown]
# *Why.* A file comes from another machine, another program, another year, or from somebody who means harm. A
# list where a number should be, a number with five hundred digits, or a reference that unfolds to gigabytes
# would end in a traceback at some later place, or in a result that is wrong. So each kind of file has one
# reader, and nothing passes it unchecked:
#
# $$ \text{bytes} \to \text{text} \to \text{values} \to \text{checked values} $$ {#eq-reading-steps}
#
# The first two arrows are @sec-text. The third parses, with limits on size, depth and numbers; the fourth
# compares the values with the types that the program declares. A refusal names file, place and cure.

# %%
#| export
import functools
import json
import tomllib
import typing
from pathlib import Path
from pydantic import TypeAdapter, ValidationError
from semidetr.core import ConfigError, DataError
from semidetr.text import DEPTH, SMALL_MB, parse_json, read_bytes, read_text, too_deep, too_dotted

# %%
import tempfile
import matplotlib.pyplot as plt

# %% [markdown]
# ## Values within bounds
#
# A short file can hold a number with thousands of digits, and keys such as `a.a.a.a` nest without a bracket.
# Whole numbers of more than 64 bits have no meaning in any file of this package, except as the name of an
# image, which may be text then. A walk with a list of its own instead of recursion sees every value once.

# %%
#| export
WHOLE = 2**63  # whole numbers lie below, in absolute value


def excess(
    value,  # nested lists and dicts of plain values
    most: int = DEPTH,  # levels
) -> str:  # what is too deep or too large; '' if nothing is
    "Bounds on depth and whole numbers, without recursion"
    todo = [(value, 0)]
    while todo:
        x, depth = todo.pop()
        if depth > most:
            return f'values lie more than {most} levels deep'
        if isinstance(x, dict):
            todo += [(v, depth + 1) for v in x.values()]
        elif isinstance(x, list):
            todo += [(v, depth + 1) for v in x]
        elif type(x) is int and abs(x) >= WHOLE:
            return f'a number has {len(str(abs(x)))} digits, and 18 are the limit'
    return ''


def _bounded(value, path, error, cure):
    if what := excess(value):
        raise error(f'{path}: {what}; {cure}')
    return value


# %%
nested = []
for _ in range(500):
    nested = [nested]
assert excess({'a': [1, 2.5, 'x' * 999, None]}) == ''
excess(nested), excess([10**40])

# %% [markdown]
# ## JSON and TOML
#
# Settings, splits, results and studies are small: 16 MB of JSON, 1 MB of TOML. Python's TOML parser recurses
# for each bracket, so brackets are counted before.

# %%
#| export
TOML_MB = 1


def read_small_json(
    path,  # file, UTF-8, UTF-16 or UTF-32
    error: type = DataError,  # class of the exception
    cure: str = 'write it again',  # what to do, for the message
    once: bool = True,  # refuse an object with the same name twice
    most_mb: float = SMALL_MB,  # megabytes that it may have
):  # its content
    "A JSON file of settings, a split or a result: at most 16 MB, 64 levels, numbers of 64 bits"
    text = read_text(path, error, most_mb=most_mb)
    return _bounded(parse_json(text, path, error, cure, 'a JSON file', once), path, error, cure)


def parse_toml(
    text: str,  # of a file
    path,  # for the message
    error: type = ConfigError,  # class of the exception
    cure: str = 'correct it',  # what to do, for the message
) -> dict:
    "Text as TOML; an error names the line where it breaks"
    if too_deep(text):
        raise error(f'{path}: has more than {DEPTH} brackets in brackets; {cure}')
    if too_dotted(text):
        raise error(f'{path}: has a key of more than {DEPTH} parts; {cure}')
    try:
        return _bounded(tomllib.loads(text), path, error, cure)
    except (ValueError, RecursionError) as e:
        what = ' '.join(str(e).split())[:120] or 'nested too deep'
        raise error(f'{path}: {what}; {cure}') from None


def read_toml(
    path,  # file, UTF-8, UTF-16 or UTF-32
    error: type = ConfigError,  # class of the exception
    cure: str = 'correct it',  # what to do, for the message
) -> dict:
    "A TOML file: at most 1 MB, 64 levels, numbers of 64 bits"
    return parse_toml(read_text(path, error, most_mb=TOML_MB), path, error, cure)


# %%
place = Path(tempfile.mkdtemp())
(place / 'deep.toml').write_text('a = ' + '[' * 3000)
(place / 'many.toml').write_text('.'.join('a' * 900) + ' = 1')
(place / 'digits.toml').write_text('lr = ' + '9' * 500)
refusals = []
for odd in ('deep', 'many', 'digits'):
    try:
        read_toml(place / f'{odd}.toml')
    except ConfigError as e:
        refusals.append(str(e).replace(f'{place}/', ''))
assert len(refusals) == 3
refusals

# %% [markdown]
# ## YAML
#
# YAML has references: `&a` names a value, `*a` repeats it. Nine references to nine references, eight times,
# are $9^8$ values from a few hundred bytes. In memory they are one value each, until something writes them out.
# So references are counted as what they stand for, and 100,000 values are the limit; ImageNet's 21,000 classes
# are 42,000. All scalars stay text: `no`, `007` and `1e3` may be names of classes.

# %%
#| export
YAML_MB, YAML_VALUES = 1, 100_000


def _weigh(node, known, above):
    "Number of values below a node of YAML, references unfolded; no key may occur twice in a mapping"
    import yaml

    if id(node) in above:
        raise ValueError('a reference (*) lies in the value that it repeats')
    if id(node) in known:
        return known[id(node)]
    above.add(id(node))
    total, keys = 1, set()
    for item in node.value if isinstance(node, yaml.CollectionNode) else ():
        for part in item if isinstance(item, tuple) else (item,):
            total += _weigh(part, known, above)
        key = item[0].value if isinstance(item, tuple) else None
        if isinstance(key, str) and key in keys:
            raise ValueError(f'the key {key[:40]!r} occurs twice')
        keys.add(key if isinstance(key, str) else None)
        if total > YAML_VALUES:
            raise ValueError(f'its references (*) stand for more than {YAML_VALUES:,} values')
    above.discard(id(node))
    known[id(node)] = total
    return total


# %%
#| export
def parse_yaml(
    text: str,  # of a file
    path,  # for the message
    error: type = DataError,  # class of the exception
    cure: str = 'correct it',  # what to do, for the message
):  # its content; every scalar is text
    "Text as YAML without types; an error names the line where it breaks"
    import yaml

    where = ''
    try:
        if too_deep(text):
            raise ValueError(f'has more than {DEPTH} brackets in brackets')
        top = yaml.compose(text, Loader=yaml.BaseLoader)
        if top is None:
            return None
        _weigh(top, {}, set())
        value = yaml.BaseLoader('').construct_document(top)
        if what := excess(value):
            raise ValueError(what)
        return value
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        where, what = f'line {mark.line + 1}: ' if mark else '', e.problem or e.context
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        what = 'is nested too deep' if isinstance(e, RecursionError) else ' '.join(str(e).split())[:120]
    raise error(f'{path}: {where}{what}; {cure}')


def read_yaml(
    path,  # file, UTF-8, UTF-16 or UTF-32
    error: type = DataError,  # class of the exception
    cure: str = 'correct it',  # what to do, for the message
):  # its content; every scalar is text
    "A YAML file: at most 1 MB, 64 levels, 100,000 values"
    return parse_yaml(read_text(path, error, most_mb=YAML_MB), path, error, cure)


# %%
levels = ['a0: &a0 [dog]']
levels += [f'a{n + 1}: &a{n + 1} [{", ".join([f"*a{n}"] * 9)}]' for n in range(8)]
bomb = '\n'.join(levels)
try:
    parse_yaml(bomb, 'data.yaml')
except DataError as e:
    unfolded = str(e)
assert 'stand for more than 100,000 values' in unfolded and len(bomb) < 500
assert parse_yaml('names: &n [no, 007]\nagain: *n', 'x') == {'names': ['no', '007'], 'again': ['no', '007']}
len(bomb), unfolded


# %% [markdown]
# ## Types
#
# What a value must be is written once, as Python's types: `list[int | str]`, or the fields of a dataclass.
# `pydantic` compares; nothing is converted, so `"7"` is no number and `true` is no 1. The values go on as they
# are.

# %%
#| export
@functools.cache
def _adapter(kind):
    return TypeAdapter(kind)


def _place(loc, value):
    "The path to a value as far as it leads, and the value: ('labelled[3]', 1.5)"
    name = ''
    for step in loc:
        if isinstance(value, list) and isinstance(step, int) and step < len(value):
            name, value = f'{name}[{step}]', value[step]
        elif isinstance(value, dict) and step in value:
            name, value = f'{name}.{step}' if name else str(step), value[step]
        else:
            break
    return name, value


def check(
    kind,  # type, such as list[int | str]
    value,  # plain values
    where,  # file, or file and name of the value
    error: type = DataError,  # class of the exception
    cure: str = 'write it again',  # what to do, for the message
):  # the value itself
    "An error unless the value has this type"
    try:
        _adapter(kind).validate_python(value, strict=True)
    except ValidationError as e:
        fault = e.errors(include_url=False, include_context=False, include_input=False)[0]
        name, found = _place(fault['loc'], value)
        text = repr(found) if isinstance(found, (int, float, str, type(None))) else type(found).__name__
        what = fault['msg'].removeprefix('Input ').split('\n')[0]
        shown = f'{text[:40]}...' if len(text) > 40 else text
        raise error(f'{where}: {name or "the content"} is {shown}, {what}; {cure}') from None
    return value


def check_fields(
    value,  # should be a dict
    kinds: dict,  # name -> type
    where,  # file, for the message
    error: type = DataError,  # class of the exception
    cure: str = 'write it again',  # what to do, for the message
    optional=(),  # names that may be missing
) -> dict:  # the value itself
    "An error unless the value is an object that has these names with these types; others are not looked at"
    if not isinstance(value, dict):
        raise error(f'{where}: holds {type(value).__name__}, no object; {cure}')
    if missing := [k for k in kinds if k not in value and k not in optional]:
        raise error(f'{where}: lacks {", ".join(missing[:4])}; {cure}')
    for name, kind in kinds.items():
        if name in value:
            check(dict[str, kind], {name: value[name]}, where, error, cure)
    return value


# %%
ids = check(list[int | str], [1, 'a.png'], 'split.json')
wrong = []
for odd in ([1, True], {'a': 1}, [1, 2.5]):
    try:
        check(list[int | str], odd, 'split.json')
    except DataError as e:
        wrong.append(str(e))
assert ids == [1, 'a.png'] and len(wrong) == 3 and wrong[2].startswith('split.json: [1] is 2.5, should be')
wrong

# %% [markdown]
# ## Results, records and logs
#
# A run writes `run.json`, a study writes a record per seed, and a running training appends lines to
# `log.jsonl`. A line may be cut off where a process was killed; such lines are left out and counted. The log
# was written by a program that may have died, so bytes that are no text do not stop its reader.

# %%
#| export
_Classes = dict[str, dict[str, typing.Any]]  # class -> name -> number
Metrics = dict[str, dict[str, dict[str, float | _Classes]]]  # part -> network -> name -> number
RESULT_MB = 256  # a thousand classes in a hundred evaluations are 24
RESULT = dict(hash=str, data=dict[str, typing.Any], metrics=Metrics)
CONFIG = dict[str, dict[str, typing.Any]]  # group -> setting -> value
_MORE = dict(config=CONFIG, iterations=int, seconds=float, cpu_seconds=float, peak_memory_mb=float)
RUN = RESULT | _MORE | dict(commit=str | None, health=dict[str, typing.Any] | None)
_TIMES = dict(cpu_seconds=float, seconds=float, iterations=int)
ARM = dict(hash=str, metrics=Metrics, data=dict[str, typing.Any], commit=str | None, machine=str) | _TIMES


def read_result(
    path,  # run.json
    cure: str = 'train again',  # what to do, for the message
) -> dict:
    "What a run found: hash, data, metrics; a DataError if it is damaged or of another kind"
    try:
        return check_fields(read_small_json(path, most_mb=RESULT_MB), RUN, path, optional={*RUN} - {*RESULT})
    except DataError as e:
        what = str(e).removeprefix(f'{path}: ').rpartition(';')[0]
        raise DataError(f'{path}: damaged, or not the result of a run ({what}); {cure}') from None


def read_record(
    path,  # seedN.json
    cure: str = 'run its study again',  # what to do, for the message
) -> dict:
    "What a study keeps of one seed; a DataError if it is damaged or of another kind"
    value = read_small_json(path, cure=f'damaged record: {cure}')
    kinds = dict(seed=int, study=str, arms=dict[str, dict], burn_in=dict | None)
    check_fields(value, kinds, path, cure=f'no record of a study: {cure}', optional=('study', 'burn_in'))
    cure = f'no record of a study: {cure}'
    check_fields(value.get('burn_in') or {}, ARM, f'{path}: burn-in', cure=cure, optional=ARM)
    for name, arm in value['arms'].items():
        check_fields(arm, ARM, f'{path}: arm {name!r}', cure=cure)
        check_fields(arm['data'], dict(labelled=int, unlabelled=int), f'{path}: data of {name!r}', cure=cure)
    return value


def read_rows(
    path,  # log.jsonl
    last: int = 0,  # only so many lines from the end; 0: all
) -> tuple[
    list, list
]:  # (rows: dicts with a whole number `step`; numbers of the lines that are none, from 1)
    "The lines of a log; one that is cut off, or is no object of JSON, is left out"
    text = read_bytes(path, wanted='the log of a run').decode(errors='replace')
    lines = [(n, line) for n, line in enumerate(text.split('\n'), 1) if line.strip()]
    rows, bad = [], []
    for n, line in lines[-last:]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        fits = isinstance(row, dict) and type(row.get('step')) is int and not excess(row)
        (rows if fits else bad).append(row if fits else n)
    return rows, bad

# %%
(place / 'log.jsonl').write_text(
    '{"step": 1, "loss": 2.0}\n{"step": 2, "lo\n[3]\n{"step": "4"}\n{"step": 5}\n'
)
rows, bad = read_rows(place / 'log.jsonl')
assert [r['step'] for r in rows] == [1, 5] and bad == [2, 3, 4]
(place / 'run.json').write_text('{"hash": "x", "data": {}, "metrics": {"val": {"teacher": 3}}}')
try:
    read_result(place / 'run.json')
except DataError as e:
    not_one = str(e).replace(f'{place}/', '')
assert not_one.startswith('run.json: damaged, or not the result of a run (metrics.val.teacher is 3, should')
not_one

# %%
#| label: fig-reading-bomb
#| fig-cap: "A file of YAML grows by thirty bytes per level; the values that its references stand for grow ninefold, and pass the limit at the sixth."
#| fig-alt: "Two curves over the number of levels on a logarithmic axis: bytes stay in the hundreds, values rise to millions and cross a dashed line at 100,000."
sizes = [len('\n'.join(levels[: n + 1])) for n in range(9)]
values = [9**n for n in range(9)]
fig, ax = plt.subplots(figsize=(5, 2.6), dpi=80)
ax.semilogy(range(9), sizes, 'o-', color='tab:blue', label='bytes of the file')
ax.semilogy(range(9), values, 'o-', color='tab:orange', label='values it stands for')
ax.axhline(100_000, color='grey', linestyle='--', linewidth=0.8)
ax.set(xlabel='levels of references')
ax.legend(fontsize=9)
plt.show()

# %% [markdown]
# ## Summary
#
# * Each kind of file has one reader: JSON, TOML, YAML, results, records, logs.
# * Size, depth and numbers are bounded before they cost memory or time.
# * Types are compared, never converted; a refusal is one line with file, place and cure.
#
# ## Exercises
#
# 1. Why does `excess` keep a list of what it has to see instead of calling itself?
# 2. Which of the limits would a file of 10 million boxes meet first, and which reader is it for?
