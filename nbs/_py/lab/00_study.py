# %% [markdown]
# # Paired studies {#sec-study}
#
# > Compare methods in pairs: one burn-in, one split, one seed, several continuations.
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
import multiprocessing
import os
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from semidetr.core import ConfigError, SemiDETRError, suggest
from semidetr.reading import check, read_rows, read_toml
from semidetr.semi.methods import METHODS
from semidetr.train import health, trainer
from semidetr.train.config import override, preset
from semidetr.train.machine import prepare
from semidetr.train.run_folder import finished


# %% [markdown]
# ## A finished run is not repeated
#
# `finished` (@sec-run-folder) looks for the result of a run in its folder. Where there is none, the trainer
# starts the run, or resumes it from its checkpoint.

# %%
#| export
def run_config(
    cfg,  # Config
    folder,  # of the run
    progress: bool = True,  # a bar
    position: int = 0,  # line of the progress bar when several runs share a terminal
) -> dict:  # content of run.json
    "Look up a finished run, resume a stopped one, or start a new one"
    return finished(cfg, folder) or trainer.Trainer(cfg, folder, progress, position).fit()


def _job(cfg, folder, progress, position):
    "`run_config` in a process of its own; errors come back as text, whatever they hold"
    prepare()
    try:
        return run_config(cfg, folder, progress, position)
    except SemiDETRError as e:
        return dict(error=f'{folder}: {e}')


# %% [markdown]
# ## Several at a time
#
# Two processes with one thread each finish more work than one process with two threads, because a training
# step of a small model offers little to run in parallel.

# %%
#| export
def run_many(
    jobs: list,  # pairs (Config, folder)
    workers: int = 0,  # processes at a time; 0: one per core
    progress: bool = True,  # bars
) -> list:  # results in the order of the jobs
    "Independent runs, each in its own process; a failure does not stop the others, and is raised at the end"
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    if workers <= 1:
        return [run_config(c, f, progress) for c, f in jobs]
    context = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting = []
        for i, (cfg, folder) in enumerate(jobs):
            waiting.append(pool.submit(_job, cfg, str(folder), progress, i % workers))
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
    base = override(base, [f'run.seed={seed}', f'data.fold={seed}'])
    folder = Path(folder) / f'seed{seed}'
    runs, start = {}, []
    if burn_in:
        own = burn_in if 'run.test' in str(burn_in) else [*burn_in, 'run.test=false']
        first = Path(start_folder or folder.parent) / folder.name / 'burn_in'
        runs['burn_in'] = override(base, ['method.name=supervised', 'method.burn_in_iters=0', *own]), first
        start = ['method.burn_in_iters=0', f'run.init={first}']
    return runs | {name: (override(base, [*start, *own]), folder / name) for name, own in arms.items()}


def paired(
    base,  # Config of all runs, as for `branches`
    burn_in: list,  # overrides of the shared start
    arms: dict,  # name -> overrides of a continuation
    folder,  # of the study
    seeds=(0,),  # one group of runs per seed
    workers: int = 0,  # processes at a time; 0: one per core
    progress: bool = True,  # bars
) -> list:  # of dict(seed, burn_in=result, arms={name: result}), in the order of the seeds
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
# A study's committed record is small: for every run its hash, commit, times and metrics, and the curves of
# its log. Pages read these records and nothing else.

# %%
#| export
# numbers that a record keeps for every logged iteration, where a result does not name its own
CURVES = {*trainer.CURVES, *health.CURVES, *(k for m in METHODS.values() for k in m.curves)}
KEPT = (
    'name hash commit versions machine cores threads device data iterations seconds cpu_seconds '
    'peak_memory_mb health metrics history config'
).split()


def record(
    result: dict,  # content of run.json
    folder='',  # of the run, for the curve
) -> dict:  # small enough to commit
    "What a page needs of a run"
    out = {k: result[k] for k in KEPT if k in result}
    log = Path(folder) / 'log.jsonl'
    if folder and log.is_file():
        rows = [r for r in read_rows(log)[0] if 'loss' in r]
        names = sorted({k for r in rows for k in r} & set(result.get('curves', CURVES)))
        short = lambda v: round(v, 4) if isinstance(v, float) else v
        out['curve'] = {k: [short(r.get(k)) for r in rows] for k in names}
    return out


def paired_difference(
    a: list,  # one number per seed
    b: list,  # the same seeds
) -> dict:  # mean, std and each difference of b - a
    "How much b is above a, pair by pair"
    d = [y - x for x, y in zip(a, b)]
    return dict(mean=mean(d), std=stdev(d) if len(d) > 1 else float('nan'), each=d, n=len(d))


# %% [markdown]
# Three seeds that differ by up to ten points, and a method that adds two to each:

# %%
gain = paired_difference([30.0, 35.0, 40.0], [32.0, 37.0, 42.0])
assert gain['mean'] == 2 and gain['std'] == 0
gain

# %% [markdown]
# ## A study is data
#
# Which arms a study has is written down in a TOML file, as settings on top of a common base. A new arm is a
# new line. `groups` crosses the arms with something else, such as the number of labels or the data set: each
# combination is a group with its own burn-in.
#
# A study that comes `after` another one starts from that one's burn-in: it shares its preset, base, groups
# and burn-in, and has arms of its own (and `later`, if it names one). What changes only after the burn-in
# needs no second burn-in.
#
# The same study runs at several scales. What a *scale* changes is written either in the study (`[name.gpu]`:
# keys that replace those of the study) or, for all studies at once, under `[scales]`, whose settings come
# after the study's own.

# %%
#| export
SCALES = ('smoke', 'small', 'gpu')  # seconds on a core, minutes on a core, the paper's machines
# settings of all runs, of the burn-in, of all arms before their own ones, and of all runs after all others
LISTS = ('base', 'burn_in', 'later', 'last')
KEYS = {'about', 'after', 'preset', 'scale', 'seeds', 'groups', 'arms', *LISTS, *SCALES}
SHARED = ('preset', 'base', 'burn_in', 'last', 'groups')  # taken from the study that this one comes `after`


def _is_settings(x):
    return isinstance(x, list) and all(isinstance(i, str) for i in x)


def _is_named_settings(x):
    if not isinstance(x, dict):
        return False
    return all(_is_settings(v) and re.fullmatch(r'[\w+-][\w.+-]*', k) for k, v in x.items())


def _is_groups(x):
    return isinstance(x, dict) and all(map(_is_named_settings, x.values()))


def _is_seeds(x):
    return isinstance(x, list) and x and all(type(i) is int and i >= 0 for i in x)


VALUES = {  # key -> (what it must be, check)
    'seeds': ('a list of whole numbers, e.g. [0, 1, 2]', _is_seeds),
    'arms': (
        'lists of settings with plain names, e.g. mt = ["method.name=mean_teacher"] under [NAME.arms]',
        _is_named_settings,
    ),
    'groups': (
        'tables of lists of settings, e.g. p1 = ["data.percent=1"] under [NAME.groups.labels]',
        _is_groups,
    ),
    **dict.fromkeys(LISTS, ('a list of settings, e.g. ["optim.iters=300"]', _is_settings)),
    **dict.fromkeys(('about', 'after', 'preset', 'scale'), ('a text', lambda x: isinstance(x, str))),
    **dict.fromkeys(SCALES, ('a table', lambda x: isinstance(x, dict))),
}


def _check_table(path, where, table):
    "ConfigError unless each key of a study or a scale is known and holds what it must"
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: '{where}' is no table; a study begins with [NAME]")
    for key, value in table.items():
        if key not in KEYS:
            arms = f'; arms stand under [{where}.arms]' if _is_settings(value) and value else ''
            raise ConfigError(f"{path}: {where} has an unknown key '{key}'; {suggest(key, KEYS)}{arms}")
        what, fits = VALUES[key]
        if not fits(value):
            raise ConfigError(f'{path}: {where}.{key} must be {what}')
        if key in SCALES:
            _check_table(path, f'{where}.{key}', value)


# %%
#| export
def read_studies(
    path,  # TOML file
) -> tuple:  # studies: name -> table; scales: name -> table
    "The file of studies; keys that mean nothing are errors"
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f'{path}: no such file of studies')
    studies = read_toml(path)
    scales = check(
        dict[str, dict], studies.pop('scales', {}), f'{path}: scales', ConfigError, 'write [scales.NAME]'
    )
    for name, table in studies.items():
        _check_table(path, name, table)
    for name, table in scales.items():
        _check_table(path, f'scales.{name}', table)
    return studies, scales


def study_table(
    path,  # TOML file
    name: str,  # of the study
    scale: str = '',  # as for `load_study`
    later: tuple = (),  # studies that come after this one, directly or not
) -> tuple:  # (table of the study at this scale, settings of the scale for all studies)
    "The table of a study at a scale, with what it shares with the study that it comes after"
    studies, scales = read_studies(path)
    if name not in studies:
        raise ConfigError(f"{path}: has no study '{name}'; {suggest(name, studies)}")
    s = studies[name]
    home = s.get('scale', 'small')
    scale = scale or home
    known = [k for k in SCALES if k in (home, *s, *scales)]
    if scale not in known:
        raise ConfigError(f"{path}: study {name} has no scale '{scale}'; known: {', '.join(known)}")
    own = s.get(scale, {})
    arms = {**s.get('arms', {}), **own.get('arms', {})}
    s = {**s, **own, 'arms': arms, 'at': scale, 'home': scale == home, 'start': name}
    if first := s.get('after'):
        if first not in studies or first in later:
            raise ConfigError(f"{path}: study {name} comes after '{first}', which is not an earlier study")
        if twice := sorted(set(SHARED) & set(s)):
            raise ConfigError(
                f"{path}: study {name} has the {twice[0]} of {first}; take that key away, or 'after'"
            )
        its_scale = scale if scale != studies[first].get('scale', 'small') else ''
        whole, _ = study_table(path, first, its_scale, (*later, name))
        shared = {k: whole[k] for k in (*SHARED, 'start') if k in whole}
        s = {'later': whole.get('later', []), **s, **shared}
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
) -> dict:
    """The configurations of a study; every override is tried, so a misspelt one fails before the first run

    Holds scale, home (is it the study's own?), about, seeds; groups: name -> Config, '' if there are none;
    start: study whose burn-in it is; burn_in: overrides; arms: name -> overrides
    """
    s, for_all = study_table(path, name, scale)
    own = {k: s.get(k, []) for k in LISTS}
    common = {k: for_all.get(k, []) for k in LISTS}
    last = own['last'] + common['last']
    burn_in = own['burn_in'] + common['burn_in'] + last if own['burn_in'] else []
    later = own['later'] + common['later']
    arms = {arm: later + items + last for arm, items in s['arms'].items()}

    def checked(where, change, *args):
        try:
            return change(*args)
        except ConfigError as e:
            raise ConfigError(f'{path}: study {name}{where}: {e}') from None

    start = checked('', preset, for_all.get('preset', s['preset']))
    base = checked(', preset', override, start, own['base'])
    groups = {}
    for picked in itertools.product(*(axis.items() for axis in s.get('groups', {}).values())):
        group = '-'.join(k for k, _ in picked)
        items = [i for _, settings in picked for i in settings]
        groups[group] = checked(f', {group or "base"}', override, base, items + common['base'])
        for arm, changes in dict(burn_in=burn_in, **arms).items():
            where = f', {group}, {arm}' if group else f', {arm}'
            checked(where, override, groups[group], changes)
    return dict(
        scale=s['at'],
        home=s['home'],
        about=s.get('about', ''),
        seeds=for_all.get('seeds', s.get('seeds', [0])),
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
        has_scale = lambda s: s.get('scale', 'small') == (scale or 'small') or scale in (*s, *scales)
        names = [n for n, s in studies.items() if has_scale(s)]
    if only and len(names) > 1:
        names = [n for n in names if set(only) <= set(load_study(path, n, scale)['groups'])] or names
    return list(dict.fromkeys(names))


def study_lines(
    path,  # TOML file
) -> list:  # of str
    "What can be run: name, scales, groups, seeds, about"
    out = []
    for name, s in read_studies(path)[0].items():
        study = load_study(path, name)
        more = [k for k in ('smoke', 'gpu') if k != study['scale'] and (k in s or k == 'smoke')]
        scales = ', '.join([study['scale'], *more])
        groups = ', '.join(filter(None, study['groups']))
        counts = f"    {len(study['arms'])} arms, {len(study['seeds'])} seeds; scales {scales}"
        out += [f"{name}: {study['about']}", counts + (f'; groups {groups}' if groups else '')]
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
assert {name: c.data.count for name, c in toy['groups'].items()} == {'five': 5, 'ten': 10}
assert toy['arms'] == {'mt': ['optim.iters=3', 'method.name=mean_teacher']}
assert load_study(toy_file, 'toy', 'smoke')['arms']['mt'][-1] == 'optim.iters=1'
toy['arms']

# %% [markdown]
# A second study that shares the burn-in of the first:

# %%
more_file = toy_file.with_name('more.toml')
more_text = """
[more]
after = "toy"
later = ["optim.iters=4"]
[more.arms]
slow = ["optim.lr=1e-5"]
"""
more_file.write_text(toy_file.read_text() + more_text)
more = load_study(more_file, 'more')
assert (more['start'], more['groups'], more['burn_in']) == ('toy', toy['groups'], toy['burn_in'])
ten = more['groups']['ten']
ten_runs = branches(ten, more['burn_in'], more['arms'], 'runs/more/ten', start_folder='runs/toy/ten')
{str(folder): cfg.run.init for cfg, folder in ten_runs.values()}

# %% [markdown]
# The runs of one seed of a group: the folder of each, its length, and the checkpoint that it starts from.

# %%
five_runs = branches(toy['groups']['five'], toy['burn_in'], toy['arms'], 'runs/toy/five', seed=1)
assert list(five_runs) == ['burn_in', 'mt'] and five_runs['mt'][0].data.fold == 1
{str(folder): (cfg.optim.iters, cfg.run.init) for cfg, folder in five_runs.values()}

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
assert abs(difference['mean'] - 10 / 3) < 1e-9
assert difference['std'] < stdev(teacher) < stdev(supervised)
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
# - A comparison starts every method from the same checkpoint, with the same split and seed.
# - Finished runs are looked up by their hash; a stopped study resumes where it was.
# - Independent runs share the cores, one thread each.
# - Committed records are small, and every number on a page comes from one of them.
#
# ## Exercises
#
# 1. How many unpaired seeds would show the gain of the toy as clearly as three pairs do?
# 2. What does pairing not control?
# 3. Why is the burn-in evaluated on the development part only?
