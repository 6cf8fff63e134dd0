# %% [markdown]
# # Paired studies {#sec-study}
#
# > Compare methods so that the difference is the method: one burn-in, one split, one seed, several
# > continuations.
#
# Two detectors trained on the same twenty images with different seeds differ by several points of AP before
# any method enters. An unpaired comparison of two methods mostly measures that. Here every method starts from
# the *same checkpoint*, with the same labelled images and the same number of iterations; what differs is the
# method, and the difference is taken pair by pair.

# %%
#| default_exp lab.study

# %%
#| hide
import tempfile

# %%
#| export
import itertools
import json
import multiprocessing
import os
import re
import tomllib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from semidetr.train.config import config_hash, override, preset, to_dict, from_dict
from semidetr.core import ConfigError, DataError, SemiDETRError, suggest
from semidetr.data.catalog import open_dataset
from semidetr.train.machine import prepare
from semidetr.train.trainer import Trainer


# %% [markdown]
# ## A run that is done is not done again

# %%
#| export
def finished(
    cfg,  # Config
    folder,  # of the run
) -> dict:  # content of its run.json, or None
    "The result of a run, if this very configuration has been run in this folder, on these very data, to its end"
    path = Path(folder) / 'run.json'
    if not path.is_file():
        return None
    try:
        result = json.loads(path.read_text())
    except ValueError:
        result = None
    if not isinstance(result, dict) or not {'hash', 'data', 'metrics'} <= set(result):
        raise DataError(f'{path}: damaged; delete it, and the run is evaluated again from its checkpoint')
    if cfg.run.amp == 'auto':
        cfg = override(cfg, [f"run.amp={result['config']['run']['amp']}"])  # what was chosen when it began
    same = (
        result['hash'] == config_hash(cfg)
        and result['data']['fingerprint'] == open_dataset(cfg.data.data, 'train').fingerprint()
    )
    return result if same else None


def run_config(
    cfg,  # Config
    folder,  # of the run
    progress: bool = True,
    position: int = 0,  # line of the progress bar when several runs share a terminal
) -> dict:  # content of run.json
    "Run, go on with, or look up"
    return finished(cfg, folder) or Trainer(cfg, folder, progress, position).fit()


def _job(values, folder, progress, position):
    "`run_config` in a process of its own; errors come back as text, whatever they hold"
    prepare()
    try:
        return run_config(from_dict(values), folder, progress, position)
    except SemiDETRError as e:
        return dict(error=f'{folder}: {e}')


# %% [markdown]
# ## Several at a time
#
# Two processes of one thread each finish more work than one process of two threads: a step of a small model
# has too little in it to share.

# %%
#| export
def run_many(
    jobs: list,  # pairs (Config, folder)
    workers: int = 0,  # processes at a time; 0: one a core
    progress: bool = True,
) -> list:  # results in the order of the jobs
    "Independent runs, each in its own process; one failure does not stop the others, and is raised at the end"
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    if workers <= 1:
        return [run_config(c, f, progress) for c, f in jobs]
    context = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting = [
            pool.submit(_job, to_dict(c), str(f), progress, i % workers) for i, (c, f) in enumerate(jobs)
        ]
        results = [w.result() for w in waiting]
    if bad := [r['error'] for r in results if 'error' in r]:
        raise SemiDETRError('; '.join(bad))
    return results


# %%
#| export
def branches(
    base,  # Config: data, split, detector, optimiser of all runs
    burn_in: list,  # overrides of the shared start, `group.field=value`; empty: no shared start
    arms: dict,  # name -> overrides of a continuation
    folder,  # of the study
    seed: int = 0,  # of the run, and the fold of the split
    start_folder=None,  # of the study whose burn-in it is, if not of this one
) -> dict:  # name -> (Config, folder of the run); the shared start, `burn_in`, comes first
    "The runs of one seed: a burn-in, and every arm from its checkpoint"
    base, folder, start = (
        override(base, [f'run.seed={seed}', f'data.fold={seed}']),
        Path(folder) / f'seed{seed}',
        [],
    )
    runs = {}
    if burn_in:
        own, first = (
            burn_in if 'run.test' in str(burn_in) else [*burn_in, 'run.test=false'],
            Path(start_folder or folder.parent) / folder.name / 'burn_in',
        )
        runs['burn_in'] = override(base, ['method.name=supervised', 'method.burn_in_iters=0', *own]), first
        start = ['method.burn_in_iters=0', f'run.init={first}']
    return runs | {name: (override(base, [*start, *own]), folder / name) for name, own in arms.items()}


def paired(
    base,
    burn_in: list,
    arms: dict,
    folder,  # see `branches`
    seeds=(0,),
    workers: int = 0,
    progress: bool = True,
) -> list:  # of dict(seed, burn_in=result, arms={name: result})
    "For each seed one burn-in and, from its checkpoint, every arm"
    runs = [branches(base, burn_in, arms, folder, s) for s in seeds]
    starts = run_many([r['burn_in'] for r in runs], workers, progress)
    ends = iter(run_many([r[name] for r in runs for name in arms], workers, progress))
    return [
        dict(seed=s, burn_in=start, arms={name: next(ends) for name in arms})
        for s, start in zip(seeds, starts)
    ]


# %% [markdown]
# ## What is kept
#
# A study's committed record is small: for every run its hash, commit, times and metrics, and the curve of its
# log. Pages read these records and nothing else.

# %%
#| export
CURVES = {
    'step',
    'loss',
    'pseudo_boxes',
    'pseudo_precision',
    'pseudo_recall',
    'pseudo_score',
    'empty_images',
    'grad_norm',
    'con_boxes',
    'initial_boxes',
    'mined_precision',
    'mined_recall',
    'initial_precision',
    'initial_recall',
    'cost_threshold',
    'cost_mean_low',
    'cost_mean_high',
    'positives_per_object',
    'loss_con',
    'parts_grad_norm',
}


def _line(text):  # of a log; what was cut off while it was written is left out
    try:
        return json.loads(text)
    except ValueError:
        return {}


def record(
    result: dict,  # content of run.json
    folder='',  # of the run, for the curve
) -> dict:  # small enough to commit
    "What a page needs of a run"
    keep = (
        'name',
        'hash',
        'commit',
        'versions',
        'machine',
        'cores',
        'threads',
        'device',
        'data',
        'iterations',
        'seconds',
        'cpu_seconds',
        'peak_memory_mb',
        'health',
        'metrics',
        'history',
        'config',
    )
    out = {k: result[k] for k in keep if k in result}
    log = Path(folder) / 'log.jsonl'
    if folder and log.is_file():
        rows = [r for r in map(_line, log.read_text().splitlines()) if 'loss' in r]
        names = sorted({k for r in rows for k in r} & CURVES)
        out['curve'] = {
            k: [round(r[k], 4) if isinstance(r.get(k), float) else r.get(k) for r in rows] for k in names
        }
    return out


def paired_difference(
    a: list,
    b: list,  # one number a seed
) -> dict:  # mean, std and each difference of b - a
    "How much b is above a, pair by pair"
    d = [y - x for x, y in zip(a, b)]
    return dict(mean=mean(d), std=stdev(d) if len(d) > 1 else float('nan'), each=d, n=len(d))


# %% [markdown]
# Three seeds that differ by ten points, and a method that adds two to each:

# %%
gain = paired_difference([30.0, 35.0, 40.0], [32.0, 37.0, 42.0])
assert gain['mean'] == 2 and gain['std'] == 0
gain

# %% [markdown]
# ## A study is data
#
# Which arms a study has is written down in a TOML file, as settings on top of a common base. A new arm is a
# new line. `groups` crosses the arms with something else, say the number of labels or the data set: each
# combination is a group with its own burn-in.
#
# A study that comes `after` another one begins where that one's burn-in ended: it has its preset, base,
# groups and burn-in, and arms of its own (`later` may be its own as well). What changes after the burn-in
# needs no second one.
#
# The same study runs at several scales. What a *scale* changes is written either in the study (`[name.gpu]`:
# keys that replace those of the study) or, for all studies at once, under `[scales]`, whose settings come
# after the study's own.

# %%
#| export
SCALES = ('smoke', 'small', 'gpu')  # seconds on a core, minutes on a core, the paper's machines
LISTS = (
    'base',
    'burn_in',
    'later',
    'last',
)  # settings of all runs, of the burn-in, of all arms before and after their own ones
KEYS = {'about', 'after', 'preset', 'scale', 'seeds', 'groups', 'arms', *LISTS, *SCALES}
SHARED = ('preset', 'base', 'burn_in', 'last', 'groups')  # what a study has of the one that it comes `after`


def _settings(x):
    return isinstance(x, list) and all(isinstance(i, str) for i in x)


def _lists(x):
    return isinstance(x, dict) and all(
        _settings(v) and re.fullmatch(r'[\w+-][\w.+-]*', k) for k, v in x.items()
    )


WANTED = {
    'seeds': (
        'a list of whole numbers, e.g. [0, 1, 2]',
        lambda x: isinstance(x, list) and x and all(type(i) is int and i >= 0 for i in x),
    ),
    'arms': (
        'lists of settings with plain names, e.g. mt = ["method.name=mean_teacher"] under [NAME.arms]',
        _lists,
    ),
    'groups': (
        'tables of lists of settings, e.g. p1 = ["data.percent=1"] under [NAME.groups.labels]',
        lambda x: isinstance(x, dict) and all(map(_lists, x.values())),
    ),
    **dict.fromkeys(LISTS, ('a list of settings, e.g. ["optim.iters=300"]', _settings)),
    **dict.fromkeys(('about', 'after', 'preset', 'scale'), ('a text', lambda x: isinstance(x, str))),
    **dict.fromkeys(SCALES, ('a table', lambda x: isinstance(x, dict))),
}


def _checked(path, where, table):  # of a study or a scale; every key is known and holds what it must
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: '{where}' is no table; a study begins with [NAME]")
    for key, value in table.items():
        if key not in KEYS:
            raise ConfigError(
                f"{path}: {where} has an unknown key '{key}'; {suggest(key, KEYS)}{f'; arms stand under [{where}.arms]' if _settings(value) and value else ''}"
            )
        what, fits = WANTED[key]
        if not fits(value):
            raise ConfigError(f'{path}: {where}.{key} must be {what}')
        if key in SCALES:
            _checked(path, f'{where}.{key}', value)


# %%
#| export
def read_studies(
    path,  # TOML file
) -> tuple:  # studies: name -> table; scales: name -> table
    "The file of studies; keys that mean nothing are errors"
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f'{path}: no such file of studies')
    try:
        studies = tomllib.loads(path.read_text(encoding='utf-8'))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f'{path}: {e}') from None
    scales = studies.pop('scales', {})
    for name, s in {**studies, **{f'scales.{k}': v for k, v in scales.items()}}.items():
        _checked(path, name, s)
    return studies, scales


def study_table(
    path,
    name: str,
    scale: str = '',  # see `load_study`
    seen: tuple = (),  # studies that come after this one
) -> tuple:  # (table of the study at this scale, settings of the scale for all studies)
    "What the file says about a study at a scale"
    studies, scales = read_studies(path)
    if name not in studies:
        raise ConfigError(f"{path}: has no study '{name}'; {suggest(name, studies)}")
    s = studies[name]
    home = s.get('scale', 'small')
    scale, known = scale or home, [k for k in SCALES if k in (home, *s, *scales)]
    if scale not in known:
        raise ConfigError(f"{path}: study {name} has no scale '{scale}'; known: {', '.join(known)}")
    own = s.get(scale, {})
    s = {**s, **own, 'arms': {**s.get('arms', {}), **own.get('arms', {})}, 'at': scale, 'home': scale == home}
    s['start'] = name
    if first := s.get('after'):
        if first not in studies or first in seen:
            raise ConfigError(f"{path}: study {name} comes after '{first}', which is not an earlier study")
        if own_too := sorted(set(SHARED) & set(s)):
            raise ConfigError(
                f"{path}: study {name} has the {own_too[0]} of {first}; take that key away, or 'after'"
            )
        whole, _ = study_table(
            path, first, scale if scale != studies[first].get('scale', 'small') else '', (*seen, name)
        )
        s = {'later': whole.get('later', []), **s, **{k: whole[k] for k in (*SHARED, 'start') if k in whole}}
    if missing := [k for k in ('preset', 'arms') if not s.get(k)]:
        raise ConfigError(f'{path}: study {name} lacks {", ".join(missing)}')
    if 'burn_in' in s['arms']:
        raise ConfigError(f"{path}: study {name}: an arm cannot be called 'burn_in'; choose another name")
    return s, scales.get(scale, {})


# %%
#| export
def load_study(
    path,  # TOML file: a table for each study with preset, base, burn_in, groups, later, arms and last
    name: str,  # of the study
    scale: str = '',  # one of SCALES; empty: the study's own, `small` unless it says otherwise
) -> dict:  # scale, home: is it the study's own?, about, seeds, groups: name -> Config ('' if there are none), start: study whose burn-in it is, burn_in: overrides, arms: name -> overrides
    "The configurations of a study; every override is tried, so that a misspelt one fails before the first run"
    s, all_ = study_table(path, name, scale)
    own, common = ({k: t.get(k, []) for k in LISTS} for t in (s, all_))
    last = own['last'] + common['last']
    burn_in = [*own['burn_in'], *common['burn_in'], *last] if own['burn_in'] else []
    arms = {arm: [*own['later'], *common['later'], *items, *last] for arm, items in s['arms'].items()}

    def tried(where, base, items):
        try:
            return override(base, items)
        except ConfigError as e:
            raise ConfigError(f'{path}: study {name}, {where}: {e}') from None

    name_ = all_.get('preset', s['preset'])
    try:
        start = preset(name_)
    except ConfigError as e:
        raise ConfigError(f'{path}: study {name}: {e}') from None
    groups = {}
    for picked in itertools.product(*(axis.items() for axis in s.get('groups', {}).values())):
        group, items = '-'.join(k for k, _ in picked), [i for _, v in picked for i in v]
        groups[group] = tried(group or 'base', tried('preset', start, own['base']), [*items, *common['base']])
        for where, changes in dict(burn_in=burn_in, **arms).items():
            tried(f'{group}, {where}'.removeprefix(', '), groups[group], changes)
    return dict(
        scale=s['at'],
        home=s['home'],
        about=s.get('about', ''),
        seeds=all_.get('seeds', s.get('seeds', [0])),
        groups=groups,
        start=s['start'],
        burn_in=burn_in,
        arms=arms,
    )


# %%
#| export
def pick_studies(
    path,  # TOML file
    names: list,  # as given; 'all': every study that has the scale
    scale: str = '',  # '': the scale of each study itself; with 'all' those of this machine, `small`
    only: tuple = (),  # groups: of several studies those that have them
) -> list:  # names
    "Which studies are meant"
    studies, scales = read_studies(path)
    if scale and scale not in SCALES:
        raise ConfigError(f"--scale '{scale}' is unknown; {suggest(scale, SCALES)}")
    if unknown := [n for n in names if n not in studies and n != 'all']:
        raise ConfigError(f"{path}: has no study '{unknown[0]}'; {suggest(unknown[0], studies)}")
    if 'all' in names:
        names = [
            n
            for n, s in studies.items()
            if s.get('scale', 'small') == (scale or 'small') or scale in (*s, *scales)
        ]
    if only and len(names) > 1:
        names = [n for n in names if set(only) <= set(load_study(path, n, scale)['groups'])] or names
    return list(dict.fromkeys(names))


def study_lines(
    path,  # TOML file
) -> list:  # of str
    "What can be run: name, scales, groups, seeds, about"
    out = []
    for name, s in read_studies(path)[0].items():
        whole = load_study(path, name)
        scales = [
            whole['scale'],
            *(k for k in ('smoke', 'gpu') if k != whole['scale'] and (k in s or k == 'smoke')),
        ]
        groups = ', '.join(filter(None, whole['groups']))
        out += [
            f"{name}: {whole['about']}",
            f"    {len(whole['arms'])} arms, {len(whole['seeds'])} seeds; scales {', '.join(scales)}"
            + (f'; groups {groups}' if groups else ''),
        ]
    return out


# %%
toy_file = Path(tempfile.mkdtemp()) / 'studies.toml'
toy_file.write_text("""
[toy]
preset = "digits"
base = ["data.dev=5"]
burn_in = ["optim.iters=2"]
later = ["optim.iters=3"]
[toy.groups.labels]
five = ["data.count=5"]
ten = ["data.count=10"]
[toy.arms]
mt = ["method.name=mean_teacher"]
[scales.smoke]
last = ["optim.iters=1"]
""")
toy = load_study(toy_file, 'toy')
assert {name: c.data.count for name, c in toy['groups'].items()} == {'five': 5, 'ten': 10} and toy[
    'arms'
] == {'mt': ['optim.iters=3', 'method.name=mean_teacher']}
assert load_study(toy_file, 'toy', 'smoke')['arms']['mt'][-1] == 'optim.iters=1'
toy['arms']

# %% [markdown]
# A second study of the toy, that shares its burn-in:

# %%
toy_file.write_text(
    toy_file.read_text()
    + '''
[more]
after = "toy"
later = ["optim.iters=4"]
[more.arms]
slow = ["optim.lr=1e-5"]
'''
)
more = load_study(toy_file, 'more')
assert (more['start'], more['groups'], more['burn_in']) == ('toy', toy['groups'], toy['burn_in'])
{
    str(f): c.run.init
    for c, f in branches(
        more['groups']['ten'], more['burn_in'], more['arms'], 'runs/more/ten', start_folder='runs/toy/ten'
    ).values()
}

# %% [markdown]
# The runs of one seed of a group: where each is kept, how long it is, and what it starts from.

# %%
ways = branches(toy['groups']['five'], toy['burn_in'], toy['arms'], 'runs/toy/five', seed=1)
assert list(ways) == ['burn_in', 'mt'] and ways['mt'][0].data.fold == 1
{str(f): (c.optim.iters, c.run.init) for c, f in ways.values()}

# %% [markdown]
# ## Why pairs
#
# Toy numbers: AP of three seeds under two methods that start from the same burn-in. The spread between seeds
# is as large as the gain; the spread of the *differences* is not.

# %%
#| hide
import matplotlib.pyplot as plt

# %%
supervised, teacher = [16.0, 20.0, 15.0], [20.0, 23.0, 18.0]
difference = paired_difference(supervised, teacher)
assert abs(difference['mean'] - 10 / 3) < 1e-9 and difference['std'] < stdev(teacher) < stdev(supervised)
difference

# %%
#| label: fig-study-pairs
#| fig-cap: "Unpaired, the two methods overlap; paired, every line rises."
#| fig-alt: "AP of three seeds under two methods, joined by lines"
fig, ax = plt.subplots(figsize=(4, 2.6), dpi=80)
for a, b in zip(supervised, teacher):
    ax.plot([0, 1], [a, b], 'o-', color='#ff7f0e')
ax.set(xticks=[0, 1], xticklabels=['supervised', 'mean teacher'], ylabel='AP', xlim=(-0.3, 1.3))
plt.show()

# %% [markdown]
# ## Summary
#
# - A comparison starts every method from the same checkpoint, split and seed.
# - Runs that are done are looked up by their hash; a stopped study goes on where it was.
# - Independent runs share the cores, one thread each.
# - Committed records are small, and every number on a page comes from one.
#
# ## Exercises
#
# 1. How many unpaired seeds would show the gain of the toy as clearly as three pairs do?
# 2. What does pairing not control?
# 3. Why is the burn-in evaluated on the development part only?
