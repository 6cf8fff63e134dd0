# %% [markdown]
# # Studies by one command {#sec-ablate}
#
# > Repeat any comparison of the book, on one core, on many, or on a cluster: `semidetr ablate components`.
#
# Many tables in papers cannot be reproduced: the script that called the training script is gone, or a crashed
# run was started by hand with slightly other settings, and nobody knows which. Here a study is a table in a
# file (@sec-study), and one command turns it into runs, notebooks and records. Finished runs are not
# repeated; stopped ones resume from their checkpoints; a run that fails is named and does not stop the
# others.
#
# Each run is an execution of one notebook, @sec-abl-run, with other parameters. The executed copy stays
# beside the checkpoint as `run.ipynb`: a reader who doubts a number can look at the run behind it.

# %%
#| default_exp lab.ablate

# %%
#| export
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from semidetr.core import ConfigError, DataError, atomic_write, need, suggest
from semidetr.reading import read_record, read_result, read_rows, read_small_json
from semidetr.lab.plan import STUDIES, Run, distinct, plan, state, without_data
from semidetr.lab.study import pick_studies, record
from semidetr.progress import Progress
from semidetr.train.config import config_hash, to_dict
from semidetr.train.machine import usable_cores
from semidetr.train.run_folder import finished

# %%
#| hide
from dataclasses import dataclass
import matplotlib.pyplot as plt

# %% [markdown]
# ## One run, one notebook
#
# papermill injects the parameters after the cell with the tag `parameters`. Without that tag it puts them
# first, the notebook's own values overwrite them, and the wrong experiment runs silently. So `check_notebook`
# looks for the tag, and the notebook compares the hash of its configuration with the expected one. The copy
# is called `run.part.ipynb` until the last cell has run.

# %%
#| export
NOTEBOOK = Path('nbs/ablations/train_run.ipynb')
ENGINES = ('local', 'slurm', 'submitit-local')
PARAMETERS = ('title', 'folder', 'expected', 'processes')  # of the run notebook


def check_notebook(
    path,  # run notebook
):
    "ConfigError unless exactly one cell has the tag `parameters`, and a value for each of them"
    cure = f'bring it back with `make nb-export NB=ablations/{Path(path).stem}`'
    if not Path(path).is_file():
        raise ConfigError(f'{path}: no such notebook; run this in a checkout of the book')
    try:
        cells = read_small_json(path, ConfigError)['cells']
        tagged = [''.join(c['source']) for c in cells if 'parameters' in c['metadata'].get('tags', [])]
    except (ConfigError, KeyError, TypeError, AttributeError):
        raise ConfigError(f'{path}: damaged, not a notebook; {cure}') from None
    if len(tagged) != 1:
        raise ConfigError(f"{path}: {len(tagged)} cells have the tag 'parameters', one must; {cure}")
    assigned = {line.partition('=')[0].strip() for line in tagged[0].splitlines()}
    if lost := [p for p in PARAMETERS if p not in assigned]:
        raise ConfigError(f"{path}: the cell with the tag 'parameters' has no '{lost[0]}'; {cure}")


def _kernels(alive, log):
    "Class of kernel managers: each adds its process to the set `alive`; its stderr goes to the file `log`"
    from jupyter_client import AsyncKernelManager

    class Kernel(AsyncKernelManager):
        def __init__(self, **kwargs):
            # sockets in files: no port that another process may take meanwhile
            file = Path(tempfile.mkdtemp()) / 'kernel.json'
            transport = 'ipc' if os.name == 'posix' else 'tcp'
            super().__init__(transport=transport, connection_file=str(file), **kwargs)

        async def start_kernel(self, **kwargs):
            env = {'OMP_NUM_THREADS': '1', **os.environ}
            env.pop('MPLBACKEND', None)  # pictures go into the notebook
            with open(log, 'wb') as stderr:
                await super().start_kernel(env=env, stderr=stderr, **kwargs)
            alive.add(self.provisioner.pid)

    return Kernel


def _last_line(text):
    return (str(text).strip().splitlines() or ['no message'])[-1].strip()


def _why(error, folder):
    "Why a cell failed, in one line; if it had started processes, the last error that one of them printed"
    log = folder / 'kernel.log'
    if error.ename == 'CalledProcessError' and log.is_file():
        lines = log.read_text(errors='replace').splitlines()
        printed = [line.removeprefix('error: ') for line in lines if line.startswith('error: ')]
        if printed:
            return f'{printed[-1]} (all of it: {log})'
    return f'{error.ename}: {_last_line(error.evalue)}'


# %%
#| export
def run_notebook(
    run: Run,  # of `plan`
    notebook=NOTEBOOK,  # that is executed
    processes: int = 1,  # of this run, each with its own device
    alive=None,  # set that gets the process of the kernel
) -> str:  # '' or, in one line, why it failed
    "Execute the run notebook for one run; errors come back as text"
    import papermill
    from papermill.exceptions import PapermillExecutionError
    from papermill.iorw import papermill_io

    # shared by all threads; two that end at the same time leave the folder of an earlier command in it
    papermill_io.get_handler('local').cwd(None)
    _, obstacle = state(run)
    if obstacle:
        return obstacle
    part, key = run.folder / 'run.part.ipynb', config_hash(run.cfg)
    atomic_write(run.folder / 'config.json', json.dumps(to_dict(run.cfg), indent=1))
    copy = f'executed notebook: {part}'
    try:
        papermill.execute_notebook(
            notebook,
            part,
            dict(title=run.title, folder=run.folder.as_posix(), expected=key, processes=processes),
            kernel_name='python3',
            progress_bar=False,
            start_timeout=600,
            kernel_manager_class=_kernels(set() if alive is None else alive, run.folder / 'kernel.log'),
            extra_arguments=['--IPKernelApp.log_level=50'],
        )
    except PapermillExecutionError as e:
        return f'{run.title}: cell [{e.exec_count}]: {_why(e, run.folder)}; {copy}'
    except Exception as e:  # the kernel died
        return f'{run.title}: {type(e).__name__}: {_last_line(e)}; {copy}'
    if not finished(run.cfg, run.folder):
        return f'{run.title}: the notebook ended without the result of {key}; {copy}'
    part.replace(run.notebook)
    return ''


# %% [markdown]
# ## Where runs run
#
# An *engine* takes a run and returns a job with `done()` and `result()`. There are two: threads of this
# process, each with one kernel, and [submitit](https://github.com/facebookincubator/submitit), which submits
# runs to Slurm or, to try that out, to processes of its own. A stopped engine lets every run save a
# checkpoint first.

# %%
#| export
class LocalEngine:
    "Kernels on this machine, one for each of `jobs` threads"

    def __init__(self, jobs: int):
        self.pool, self.alive = ThreadPoolExecutor(jobs), set()

    def submit(self, *args):
        return self.pool.submit(run_notebook, *args, alive=self.alive)

    def stop(self, how=signal.SIGTERM):
        "SIGTERM: every run saves a checkpoint and ends; SIGKILL: it ends at once"
        for pid in self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, how)


class ClusterJob:
    "`run_notebook` that is queued again when Slurm takes its machine away"

    def __call__(self, *args):
        return run_notebook(*args)

    def checkpoint(self, *args):
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *args)


class SubmititEngine:
    "Runs as jobs of Slurm, or of submitit's local executor"

    def __init__(
        self,
        folder,  # for the files of submitit
        cluster: str = 'slurm',  # or 'local'
        options: dict = None,  # of submitit.AutoExecutor: timeout_min, slurm_partition, gpus_per_node, ...
    ):
        submitit, self.jobs = need('submitit', 'this engine', 'cluster'), []
        try:
            self.executor = submitit.AutoExecutor(Path(folder).absolute(), cluster)
            self.executor.update_parameters(**{'name': 'semidetr', 'timeout_min': 1440, **(options or {})})
        except (RuntimeError, NameError, TypeError) as e:
            raise ConfigError(f'submitit: {_last_line(e)}') from None

    def submit(self, *args):
        self.jobs.append(self.executor.submit(ClusterJob(), *args))
        return self.jobs[-1]

    def stop(self, how=None):
        for job in self.jobs:
            job.cancel()


# %% [markdown]
# ## The loop
#
# Start what can start, collect what is done, sleep. A seed's record is written as soon as all its runs are
# finished.

# %%
#| export
def steps_done(
    folder,  # of a run
) -> int:  # iterations, as far as the log tells
    "How far a run is, for the bar"
    try:
        return read_rows(Path(folder) / 'log.jsonl', last=2)[0][-1]['step']
    except (DataError, IndexError):
        return 0


def _outcome(run, job):
    "'' or why a job of an engine failed; of an engine's own error the first line, since the rest is its log"
    try:
        return job.result()
    except Exception as e:
        line = str(e).strip().partition(chr(10))[0]
        return f'{run.title}: {type(e).__name__}: {line}'


def drive(
    runs: list,  # of Run
    engine,  # with submit and stop
    notebook=NOTEBOOK,  # that is executed for each run
    processes: int = 1,  # of each run
    limit: int = 1,  # runs at a time
    ended=lambda run, cause: None,  # called with each run that ended, and why it failed
    pause: float = 0.2,  # seconds between two rounds
) -> dict:  # folder -> why it failed
    "Run everything that is not finished, a burn-in before its arms; a failure stops only what depends on it"
    waiting, running, failed = list(runs), {}, {}
    unfinished = {r.folder for r in runs}
    try:
        while waiting or running:
            for r in list(waiting):
                if r.start in failed:
                    waiting.remove(r)
                    failed[r.folder] = f'{r.title}: its burn-in failed'
                    ended(r, failed[r.folder])
                elif len(running) < limit and r.start not in unfinished:
                    waiting.remove(r)
                    running[r.folder] = r, engine.submit(r, notebook, processes)
            time.sleep(pause)
            for folder, (r, job) in list(running.items()):
                if not job.done():
                    continue
                del running[folder]
                unfinished.discard(folder)
                if cause := _outcome(r, job):
                    failed[folder] = cause
                ended(r, cause)
            ended(None, '')
    except KeyboardInterrupt:
        _wind_up(engine, running)
        raise KeyboardInterrupt('stopped; the same command goes on from there') from None
    return failed


# %%
#| export
def _wind_up(engine, running):
    "Every run may save a checkpoint; a second Ctrl-C ends them at once"
    try:
        engine.stop()
        while not all(job.done() for _, job in running.values()):
            time.sleep(0.1)
    except KeyboardInterrupt:
        engine.stop(signal.SIGKILL)


# %% [markdown]
# A toy engine whose jobs take one round per 100 iterations shows the order. The second worker takes the
# burn-in of seed 1 while the arms of seed 0 still wait for theirs:

# %%
toy_file = Path(tempfile.mkdtemp()) / 'studies.toml'
toy_file.write_text("""
[toy]
preset = "digits"
seeds = [0, 1]
burn_in = ["optim.iters=200"]
later = ["optim.iters=300"]
[toy.arms]
supervised = ["method.name=supervised"]
mean_teacher = ["method.name=mean_teacher"]
""")
toy = plan(toy_file, 'toy')
assert [r.arm for r in toy[:3]] == ['burn_in', 'supervised', 'mean_teacher']
[r.title for r in toy]


# %%
class ToyEngine:
    "Runs that compute nothing: 100 iterations take one round"

    def __init__(self):
        self.now, self.bars = 0, []

    def submit(self, run, *args):
        job = ToyJob(self, run.title, self.now, self.now + run.cfg.optim.iters // 100)
        self.bars.append(job)
        return job

    def round_ended(self, run, cause):
        self.now += run is None


@dataclass
class ToyJob:
    engine: object
    title: str
    first: int
    last: int

    def done(self):
        return self.engine.now + 1 >= self.last

    def result(self):
        return 'toy seed 1: broken' if self.title == 'toy seed 1 burn_in' else ''


engine = ToyEngine()
failures = drive(toy, engine, limit=2, ended=engine.round_ended, pause=0)
order = ['seed 0 burn_in', 'seed 1 burn_in', 'seed 0 supervised', 'seed 0 mean_teacher']
assert [b.title for b in engine.bars] == [f'toy {name}' for name in order] and len(failures) == 3
list(failures.values())

# %%
#| label: fig-ablate-timeline
#| fig-cap: "Two workers: arms start as soon as their burn-in is finished; the failed burn-in of seed 1 stops its own arms and nothing else."
#| fig-alt: "Bars of the runs of a toy study over time"
fig, ax = plt.subplots(figsize=(5, 2), dpi=80)
for i, b in enumerate(engine.bars):
    color = '#d62728' if 'seed 1' in b.title else '#1f77b4' if 'burn' in b.title else '#ff7f0e'
    ax.barh(i, b.last - b.first, left=b.first, color=color)
ax.set(yticks=range(len(engine.bars)), xlabel='rounds')
ax.set_yticklabels([b.title for b in engine.bars], fontsize=9)
ax.invert_yaxis()
plt.show()


# %% [markdown]
# ## The whole study

# %%
#| export
def keep(
    runs: list,  # of Run, all of one group and seed, all finished
    results,  # folder of the records
) -> Path:  # the JSON
    "Write the record of a seed, unless it is there already"
    made, first = {}, runs[0]
    for r in runs:
        result = read_result(r.folder / 'run.json')
        made[r.arm] = record(result, r.folder) | dict(notebook=r.notebook.as_posix())
    path = Path(results) / first.where / f'seed{first.seed}.json'
    about = dict(study=first.study, scale=first.scale, group=first.group, seed=first.seed)
    text = json.dumps(about | dict(burn_in=made.pop('burn_in', None), arms=made))
    if not path.is_file() or path.read_text() != text:
        atomic_write(path, text)
    return path


def seed_line(
    path,  # of a record
) -> str:
    "AP of the teacher, arm by arm, on the test split if it was measured there"
    arms = []
    for arm, a in read_record(path)['arms'].items():
        metrics = a['metrics'].get('val') or a['metrics'].get('dev') or {}
        ap = metrics.get('teacher', {}).get('AP')
        arms.append(f'{arm} {ap:.1f}' if isinstance(ap, (int, float)) else f'{arm} -')
    return f'{path}: ' + ', '.join(arms)


# %%
#| export
def run_all(
    runs: list,  # of Run
    engine,  # as for `drive`
    results,  # folder of the records
    notebook=NOTEBOOK,  # that is executed for each run
    processes: int = 1,  # of each run
    limit: int = 1,  # runs at a time
    progress: bool = True,  # a bar
    say=print,  # is given a line per record
    lost: tuple = (),  # folders of runs that cannot run
) -> list:  # why runs failed, a line each
    "Run what is not finished, keep the records, show how far it is"
    todo = [r for r in distinct(runs) if r.folder in lost or state(r)[0] != 'finished']
    seeds, left, broken = {}, {r.folder for r in todo}, set(lost)
    for r in runs:
        seeds.setdefault((r.where, r.seed), []).append(r)

    def seed_done(r):
        if not left & {x.folder for x in seeds[r.where, r.seed]}:
            say(seed_line(keep(seeds[r.where, r.seed], results)))

    for group in seeds.values():
        seed_done(group[0])
    iters = {r.folder: r.cfg.optim.iters for r in runs}

    def done(folder):
        if folder in broken:
            return 0
        return steps_done(folder) if folder in left else iters[folder]

    before = sum(n for folder, n in iters.items() if folder not in left)
    bar = Progress(sum(iters.values()), 'runs', initial=before, show=progress)

    def ended(r, cause):
        if cause:
            broken.add(r.folder)
            bar.write(f'failed: {cause}')
        elif r is not None:
            left.discard(r.folder)
            seed_done(r)
        failed = f', {len(broken)} failed' if broken else ''
        bar.values(dict(runs=f'{len(iters) - len(left)}/{len(iters)}{failed}'))
        bar.update(sum(map(done, iters)) - bar.n)

    can_run = [r for r in todo if r.folder not in lost]
    with contextlib.closing(bar), stoppable():
        return list(drive(can_run, engine, notebook, processes, limit, ended).values())


# %%
#| export
@contextlib.contextmanager
def stoppable():
    "SIGTERM is Ctrl-C: every run saves a checkpoint"

    def stop(*_):
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


# %% [markdown]
# ## The command
#
# `semidetr ablate` (@sec-cli) calls `ablate` in the top folder of the checkout.

# %%
#| export
def _write_pages(names, scale, out, data, say):
    "Pages of executed runs: the book is not part of the wheel, so a program of its own writes them"
    command = [sys.executable, '-m', 'semidetr.book.runs', *names]
    command += ['--scale', scale, '--out', str(out), '--data', data]
    done = subprocess.run(command, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        say(line)
    if done.returncode:
        say(f'the pages of executed runs were not written: {_last_line(done.stderr)}')


def ablate(
    names: list,  # of studies; 'all': every study that has the scale
    scale: str = '',  # as for `plan`
    seeds=None,  # those of the study if None
    data: str = '',  # data set instead of the studies' own
    only: tuple = (),  # names of groups; empty: all
    out='runs/studies',  # folder of the runs
    results='',  # folder of the records; '': that of the book; at scale smoke or with other data OUT/results
    jobs: int = 0,  # runs at a time; 0: one per core, with Slurm all
    engine: str = 'local',  # one of ENGINES
    options: dict = None,  # of `SubmititEngine`
    processes: int = 1,  # of each run, started by torchrun
    dry=None,  # `dry_run` (@sec-dry-run) or another function of its arguments, called instead of running
    progress: bool = True,  # a bar
    say=print,  # is given each line of output
) -> list:  # why runs failed, a line each
    "Run studies in the checkout that is the working directory"
    if engine not in ENGINES:
        raise ConfigError(f"engine '{engine}' is unknown; {suggest(engine, ENGINES)}")
    if options and engine == 'local':
        raise ConfigError(f"--option {next(iter(options))} is for a cluster; add --engine slurm")
    names = pick_studies(STUDIES, names, scale, only)
    runs = [r for name in names for r in plan(STUDIES, name, scale, seeds, out, data, only)]
    book = STUDIES.parent / 'results'
    results = Path(results or (Path(out) / 'results' if scale == 'smoke' or data else book))
    check_notebook(NOTEBOOK)
    if dry:
        return dry(distinct(runs), results, processes, say)
    need('papermill', 'a study')
    lost, causes = without_data(runs)
    jobs = jobs or (len(runs) if engine == 'slurm' else usable_cores())
    if engine == 'local':
        where = LocalEngine(jobs)
    else:
        where = SubmititEngine(Path(out) / 'jobs', engine.removeprefix('submitit-'), options)
    failed = causes + run_all(runs, where, results, NOTEBOOK, processes, jobs, progress, say, lost)
    if results == book:
        _write_pages(names, scale, out, data, say)
    return failed

# %% [markdown]
# ## Summary
#
# - A study is a table, a run is a notebook, a record is a JSON file; one command makes the last from the
#   first.
# - Finished runs are looked up by hash and data, stopped ones resume, failed ones are named and stop only
#   what depends on them.
# - The same command runs at three scales, on one core, on all, or on a cluster.
#
# ## Exercises
#
# 1. `drive` starts arms in the order of the study. With two workers and arms of very different length, which
#    order would finish first?
