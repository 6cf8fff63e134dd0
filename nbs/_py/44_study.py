# %% [markdown]
# # Paired studies {#sec-study}
#
# > Compare methods so that the difference is the method: one burn-in, one split, one seed, several continuations.
#
# Two detectors trained on the same twenty images with different seeds differ by several points of AP before any method enters. An unpaired comparison of two methods mostly measures that. Here every method starts from the *same checkpoint*, with the same labelled images and the same number of iterations; what differs is the method, and the difference is taken pair by pair.

# %%
#| default_exp study

# %%
#| hide
import tempfile

# %%
#| export
import dataclasses
import json
import multiprocessing
import os
import tomllib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from semidetr.config import config_hash, override, preset, to_dict, from_dict
from semidetr.core import ConfigError, DataError, SemiDETRError, atomic_write, suggest
from semidetr.datasets import open_dataset
from semidetr.machine import choose_amp, prepare
from semidetr.trainer import Trainer


# %% [markdown]
# ## A run that is done is not done again

# %%
#| export
def finished(
    cfg, # Config
    folder, # of the run
)->dict: # content of its run.json, or None
    "The result of a run, if this very configuration has been run in this folder, on these very data, to its end"
    path = Path(folder)/'run.json'
    if not path.is_file(): return None
    try: result = json.loads(path.read_text())
    except json.JSONDecodeError: raise DataError(f'{path}: damaged; delete it, and the run is evaluated again from its checkpoint') from None
    same = result['hash'] == config_hash(cfg) and result['data']['fingerprint'] == open_dataset(cfg.data.data, 'train').fingerprint()
    return result if same else None

def run_config(
    cfg, # Config
    folder, # of the run
    progress:bool=True,
    position:int=0, # line of the progress bar when several runs share a terminal
)->dict: # content of run.json
    "Run, go on with, or look up"
    cfg = choose_amp(cfg, folder)
    return finished(cfg, folder) or Trainer(cfg, folder, progress, position).fit()

def _job(values, folder, progress, position):
    "`run_config` in a process of its own; errors come back as text, whatever they hold"
    prepare()
    try: return run_config(from_dict(values), folder, progress, position)
    except SemiDETRError as e: return dict(error=f'{folder}: {e}')


# %% [markdown]
# ## Several at a time
#
# Two processes of one thread each finish more work than one process of two threads: a step of a small model has too little in it to share.

# %%
#| export
def run_many(
    jobs:list, # pairs (Config, folder)
    workers:int=0, # processes at a time; 0: one a core
    progress:bool=True,
)->list: # results in the order of the jobs
    "Independent runs, each in its own process; one failure does not stop the others, and is raised at the end"
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    if workers <= 1: return [run_config(c, f, progress) for c, f in jobs]
    context = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting = [pool.submit(_job, to_dict(c), str(f), progress, i % workers) for i, (c, f) in enumerate(jobs)]
        results = [w.result() for w in waiting]
    if bad := [r['error'] for r in results if 'error' in r]: raise SemiDETRError('; '.join(bad))
    return results


# %%
#| export
def paired(
    base, # Config: data, split, detector, optimiser of all runs
    burn_in:list, # overrides of the shared start, `group.field=value`
    arms:dict, # name -> overrides of a continuation
    folder, # runs go to folder/<name>
    seeds=(0,), # each seeds the run and is the fold of the split
    workers:int=0,
    progress:bool=True,
)->list: # of dict(seed, burn_in=result, arms={name: result})
    "For each seed one burn-in and, from its checkpoint, every arm"
    folder, seeded = Path(folder), {s: override(base, [f'run.seed={s}', f'data.fold={s}']) for s in seeds}
    if 'run.test' not in str(burn_in): burn_in = [*burn_in, 'run.test=false']
    first = [(override(override(c, ['method.name=supervised', 'method.burn_in_iters=0']), burn_in), folder/f'seed{s}'/'burn_in') for s, c in seeded.items()]
    starts = run_many(first, workers, progress)
    init = lambda s: f"run.init={folder/f'seed{s}'/'burn_in'}"
    second = [(override(c, ['method.burn_in_iters=0', init(s), *o]), folder/f'seed{s}'/name) for s, c in seeded.items() for name, o in arms.items()]
    ends = run_many(second, workers, progress)
    n = len(arms)
    return [dict(seed=s, burn_in=starts[i], arms=dict(zip(arms, ends[i*n:(i+1)*n]))) for i, s in enumerate(seeds)]


# %% [markdown]
# ## What is kept
#
# A study's committed record is small: for every run its hash, commit, times and metrics, and the curve of its log. Pages read these records and nothing else.

# %%
#| export
CURVES = {'step', 'loss', 'pseudo_boxes', 'pseudo_precision', 'pseudo_recall', 'pseudo_score', 'empty_images', 'grad_norm', 'con_boxes', 'initial_boxes', 'mined_precision',
          'mined_recall', 'initial_precision', 'initial_recall', 'cost_threshold', 'cost_mean_low', 'cost_mean_high', 'positives_per_object', 'loss_con', 'parts_grad_norm'}

def record(
    result:dict, # content of run.json
    folder='', # of the run, for the curve
)->dict: # small enough to commit
    "What a page needs of a run"
    keep = ('name', 'hash', 'commit', 'versions', 'machine', 'cores', 'threads', 'device', 'data', 'iterations', 'seconds', 'cpu_seconds', 'peak_memory_mb', 'health', 'metrics', 'history', 'config')
    out = {k: result[k] for k in keep if k in result}
    log = Path(folder)/'log.jsonl'
    if folder and log.is_file():
        rows = [r for r in map(json.loads, log.read_text().splitlines()) if 'loss' in r]
        names = sorted({k for r in rows for k in r} & CURVES)
        out['curve'] = {k: [round(r[k], 4) if isinstance(r.get(k), float) else r.get(k) for r in rows] for k in names}
    return out

def paired_difference(
    a:list, b:list, # one number a seed
)->dict: # mean, std and each difference of b - a
    "How much b is above a, pair by pair"
    d = [y-x for x, y in zip(a, b)]
    return dict(mean=mean(d), std=stdev(d) if len(d) > 1 else float('nan'), each=d, n=len(d))


# %% [markdown]
# ## A study is data
#
# Which arms a study has is written down in a TOML file, as settings on top of a common base. A new arm is a new line.

# %%
#| export
def load_study(
    path, # TOML file: a table for each study with preset, base, burn_in, later and arms
    name:str, # of the study
)->dict: # base: Config, burn_in: overrides, arms: name -> overrides
    "The configurations of a study; every override is tried, so that a misspelt one fails before the first run"
    path = Path(path)
    if not path.is_file(): raise ConfigError(f'{path}: no such file of studies')
    try: studies = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as e: raise ConfigError(f'{path}: {e}') from None
    if name not in studies: raise ConfigError(f"{path}: has no study '{name}'; {suggest(name, studies)}")
    s = studies[name]
    if missing := {'preset', 'arms'}-set(s): raise ConfigError(f'{path}: study {name} lacks {", ".join(sorted(missing))}')
    base, burn_in, arms = override(preset(s['preset']), s.get('base', [])), s.get('burn_in', []), {k: s.get('later', [])+v for k, v in s['arms'].items()}
    for arm, items in dict(burn_in=burn_in, **arms).items():
        try: override(base, items)
        except ConfigError as e: raise ConfigError(f'{path}: study {name}, {arm}: {e}') from None
    return dict(base=base, burn_in=burn_in, arms=arms)

def run_study(
    path, name:str, # see `load_study`
    folder, # of the runs
    results, # folder for one JSON a seed
    seeds=(0,),
    workers:int=1,
    progress:bool=True,
)->list: # of the records, a dict a seed
    "Run a study seed by seed and keep each seed's record as soon as it is there"
    study, out = load_study(path, name), []
    for seed in seeds:
        r, = paired(study['base'], study['burn_in'], study['arms'], Path(folder)/name, (seed,), workers, progress)
        where = Path(folder)/name/f'seed{seed}'
        r = dict(study=name, seed=seed, burn_in=record(r['burn_in']), arms={arm: record(a, where/arm) for arm, a in r['arms'].items()})
        atomic_write(Path(results)/name/f'seed{seed}.json', json.dumps(r))
        out.append(r)
    return out


# %%
toy_file = Path(tempfile.mkdtemp())/'studies.toml'
toy_file.write_text('[toy]\npreset="digits"\nbase=["data.count=5"]\nlater=["optim.iters=3"]\n[toy.arms]\nmt=["method.name=mean_teacher"]\n')
toy = load_study(toy_file, 'toy')
assert toy['base'].data.count == 5 and toy['arms'] == {'mt': ['optim.iters=3', 'method.name=mean_teacher']}
toy['arms']

# %% [markdown]
# ## Why pairs
#
# Toy numbers: AP of three seeds under two methods that start from the same burn-in. The spread between seeds is as large as the gain; the spread of the *differences* is not.

# %%
#| hide
import matplotlib.pyplot as plt

# %%
supervised, teacher = [16., 20., 15.], [20., 23., 18.]
difference = paired_difference(supervised, teacher)
assert abs(difference['mean']-10/3) < 1e-9 and difference['std'] < stdev(teacher) < stdev(supervised)
difference

# %%
#| label: fig-study-pairs
#| fig-cap: "Unpaired, the two methods overlap; paired, every line rises."
#| fig-alt: "AP of three seeds under two methods, joined by lines"
fig, ax = plt.subplots(figsize=(4, 2.6), dpi=80)
for a, b in zip(supervised, teacher): ax.plot([0, 1], [a, b], 'o-', color='#ff7f0e')
ax.set(xticks=[0, 1], xticklabels=['supervised', 'mean teacher'], ylabel='AP', xlim=(-.3, 1.3)); plt.show()

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
