# %% [markdown]
# # The end before the end {#sec-stop}
#
# > End a run at any moment, by a signal or by an error, and lose at most the step that was not finished.
#
# Schedulers send SIGTERM, people press Ctrl-C twice, a photograph is cut off in the middle, memory runs out, a
# disk is full: hours after the start something ends the run. What it has learnt until then must be saved, and
# what is saved must be whole steps: a teacher after its update beside a student before it would continue as
# another run. So each step begins with a copy of what it changes early, and an error brings the copy back
# before the run is saved.

# %%
#| default_exp train.stop

# %%
#| export
import contextlib
import errno
import os
import signal
import time
import warnings
from pathlib import Path
import torch
from semidetr.core import (
    DataError,
    SemiDETRError,
    all_reduce_mean,
    is_main,
    rank,
    rng_state,
    set_rng_state,
    world_size,
)
from semidetr.data.loader import WorkerLost
from semidetr.train.checkpoint import (
    LAST,
    PREVIOUS,
    Damaged,
    is_out_of_memory,
    load_weights,
    pack_rng,
    unpack_rng,
)
from semidetr.train.config import to_dict
from semidetr.train.generations import (
    OWN,
    check_fields,
    file_of,
    read_generation,
    save_alone,
    save_generation,
)
from semidetr.train.lock import Owner, refuse_if_owned
from semidetr.train.processes import as_before, part_of_today
from semidetr.train.run_folder import check_same_run

# %% [markdown]
# ## Signals
#
# The first Ctrl-C or SIGTERM ends a run after its current iteration, and so does a terminal that is closed. A
# scheduler, `torchrun` and a terminal may send the same wish two or three times within a second, so only a
# Ctrl-C that comes two seconds later ends it at once. An update is completed even then. While networks are
# evaluated there is nothing to complete: the first signal ends it. A process that `torchrun` started also
# stops when `torchrun` is gone, since the run will be started again.

# %%
#| export
PATIENCE = 2.0  # seconds after which another Ctrl-C is not the same one


class Stop(list):
    "Signals that ask a run to end, in the order in which they came"

    def __init__(self):
        super().__init__()
        self.since, self.held, self.is_due, self.is_patient = 0.0, 0, False, True
        self.launcher = os.getppid() if 'TORCHELASTIC_RUN_ID' in os.environ else None

    def is_asked(self) -> bool:
        "Shall the run end after this iteration?"
        return bool(self) or (self.launcher is not None and os.getppid() != self.launcher)

    def note(self, sig, frame=None):
        "Handle a signal; KeyboardInterrupt where it ends the run at once"
        now = time.monotonic()
        self.since = self.since if self else now
        self.append(sig)
        if not self.is_patient or (sig == signal.SIGINT and now - self.since > PATIENCE):
            self.is_due = True
            self._raise_if_due()

    def _raise_if_due(self):
        if self.is_due and not self.held:
            self.is_due = False
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def hold(self):
        "What is inside is completed, whatever comes"
        self.held += 1
        try:
            yield
        finally:
            self.held -= 1
        self._raise_if_due()

    @contextlib.contextmanager
    def at_once(self):
        "What is inside need not be completed; several processes complete it, since they wait for each other"
        self.is_patient = world_size() > 1
        try:
            if self and not self.is_patient:
                raise KeyboardInterrupt
            yield
        finally:
            self.is_patient = True


# %%
#| export
@contextlib.contextmanager
def stop_gently():
    "Signals that end a program are collected in a `Stop`; outside the main thread they stay as they are"
    stop, old = Stop(), {}
    try:
        for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if sig != signal.SIGHUP or signal.getsignal(sig) != signal.SIG_IGN:  # `nohup` ignores it
                old[sig] = signal.signal(sig, stop.note)
    except ValueError:
        pass  # not the main thread
    try:
        yield stop
    finally:
        for sig, handler in old.items():
            signal.signal(sig, handler)


# %%
#| hide
from types import SimpleNamespace
import matplotlib.pyplot as plt
from torch import nn

# %%
with stop_gently() as stop:
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)  # the same wish
    after_signals = 'still here'
assert stop == [signal.SIGTERM, signal.SIGINT] and stop.is_asked()
after_signals, [signal.Signals(s).name for s in stop]

# %%
at_once = []
with stop_gently() as stop:
    stop.note(signal.SIGINT)
    stop.since -= 3  # three seconds later
    try:
        with stop.hold():
            signal.raise_signal(signal.SIGINT)
            at_once.append('update completed')
    except KeyboardInterrupt:
        at_once.append('stopped')
assert at_once == ['update completed', 'stopped']
at_once


# %% [markdown]
# ## The beginning of a step
#
# Before the optimiser's update an iteration changes the teacher, running statistics, the state of the method
# and the random state. `Snapshot` copies these: about the memory of one network, and about the time of the
# teacher's update (6 and 5 ms for the small detector). The optimiser's update itself cannot be undone; an
# error inside it is the one case where the last checkpoint counts.

# %%
#| export
class Snapshot:
    "What an iteration changes before its update, as it was when the iteration began"

    def __init__(self, student, teacher, method, optimizer):
        self.nets, self.method, self.optimizer = (student, teacher), method, optimizer
        self.phase, self._kept = 'whole', []
        optimizer.register_step_pre_hook(self._moves)

    def _moves(self, *_):
        self.phase = 'moving'

    def _live(self):
        "Tensors of both networks that change before the update"
        student, teacher = self.nets
        pairs = zip(teacher.parameters(), student.parameters())
        return [t.detach() for t, s in pairs if s.requires_grad] + [b for n in self.nets for b in n.buffers()]

    def take(self):
        "Called when an iteration begins"
        live = self._live()
        if len(self._kept) != len(live):
            self._kept = [x.clone() for x in live]
        else:
            torch._foreach_copy_(self._kept, live)
        weights = {k for k, _ in self.method.named_parameters()}
        parts = self.method.state_dict().items()
        self._parts = {k: _held(v) for k, v in parts if k not in weights}
        self.rng, self.phase = pack_rng(rng_state()), 'begun'

    def done(self):
        "Called after the update"
        self.phase = 'whole'

    def back(self):
        "Everything as it was when the iteration began"
        if self.phase != 'begun':
            return
        torch._foreach_copy_(self._live(), self._kept)
        self.method.load_state_dict(self._parts, strict=False)
        self.optimizer.zero_grad(set_to_none=True)
        set_rng_state(unpack_rng(self.rng))
        self.phase = 'whole'


def _held(value):
    "A copy of tensors and containers; a tensor in a container is replaced by methods, never changed"
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {k: v if isinstance(v, torch.Tensor) else _held(v) for k, v in value.items()}
    if isinstance(value, list):
        return [v if isinstance(v, torch.Tensor) else _held(v) for v in value]
    return value


# %%
def toy_nets():
    student, teacher = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), nn.Linear(2, 2)
    return student, teacher, nn.BatchNorm1d(2, affine=False)


torch.manual_seed(0)
toy_student, toy_teacher, toy_method = toy_nets()
toy_optimizer = torch.optim.SGD(toy_student.parameters(), lr=0.1)
snapshot = Snapshot(toy_student, toy_teacher, toy_method, toy_optimizer)
snapshot.take()
before = [x.clone() for x in snapshot._live()], toy_method.running_mean.clone(), torch.rand(())
with torch.no_grad():
    toy_teacher.weight.add_(1)
toy_method(toy_student(torch.randn(4, 2))).sum().backward()
snapshot.back()
same = [torch.equal(a, b) for a, b in zip(before[0], snapshot._live())]
assert (
    all(same) and torch.equal(before[1], toy_method.running_mean) and torch.equal(torch.rand(()), before[2])
)
assert toy_student[0].weight.grad is None
len(same), snapshot.phase


# %% [markdown]
# ## Save and continue
#
# A run saves a generation (@sec-generations), and continues from the newest that is whole. A checkpoint of
# another run is refused; that is a question of its content, not of its health.

# %%
#| export
def on_any_process(flag: bool, device) -> bool:
    "Is the flag set on any process? A signal may reach one before the others"
    if world_size() == 1:
        return flag
    return bool(all_reduce_mean(torch.tensor(float(flag), device=device)))


RESUME = 'the same command goes on from there'


def _stamp(folder):
    "Changes when another process saves in this folder; None without a checkpoint"
    path = folder / LAST
    return (path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else None


# %%
#| export
class Saving:
    "Saving, for a run with networks, method, optimiser and `state_dict`"

    saved = 0  # iteration of the last generation
    stamp = None  # of its file
    parts = []  # digests of its parts; None if it is damaged
    owner = None  # `Owner` of the folder while the run trains

    @property
    def own_file(self) -> Path:
        "The checkpoint of this process"
        return self.dir / file_of('last', rank())

    def save(self):
        "Save a generation; every process calls it after the same iteration"
        self.stop_if_lost()
        self.parts = save_generation(self.dir, self.state_dict(), self.device, self.parts)
        self.mark()

    def stop_if_lost(self):
        "`DataError` if this process was suspended for so long that another one trains in the folder"
        if self.is_lost():
            raise DataError(f'{self.dir}: another process has taken over this folder; this one ends')

    def is_lost(self) -> bool:
        "Has another process taken over? Asked before anything is written"
        if self.owner is not None:
            self.owner.check()
        return self.owner is not None and self.owner.lost

    def mark(self):
        "Remember which checkpoint is the one of this process"
        self.saved, self.stamp = self.step, _stamp(self.dir)

    def keep(self) -> str:  # why that failed, '' if it did not
        "Save the last finished iteration, whatever has happened in the present one"
        self.snapshot.back()
        if not self.step or self.saved == self.step:
            return ''
        if self.is_lost():
            return 'another process has taken over'
        if self.snapshot.phase != 'whole':
            return 'the update of the weights was interrupted'
        try:
            if save_alone(self.dir, self.state_dict(), kept=self.parts):
                self.mark()
                return ''
            return 'not all processes have saved it' if is_main() else ''
        except Exception as e:
            return f'{type(e).__name__}: {e}'


# %%
#| export
class _Restoring(Saving):
    def _taken(self, saved, own, path):
        "Set everything to a saved state; why that is impossible, or ''"
        try:
            load_weights(self.student, saved['student'], path)
            load_weights(self.teacher, saved['teacher'], path)
            self.method.load_state_dict(saved.get('parts', {}))
            self.optimizer.load_state_dict(saved['optimizer'])
            self.scaler.load_state_dict(saved['scaler'])
            self.history, self.spent, self.step = saved['history'], saved['spent'], saved['step']
            if own is not None:
                self.method.load_state_dict(own.get('parts', {}), strict=False)  # caches of views
                saved = own
            self.recent = saved['recent']
            self.health.rows.clear()  # a generation that failed here may have left some
            self.health.load_state_dict(saved['health'])
            set_rng_state(unpack_rng(saved['rng']))
        except DataError as e:
            return str(e)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as e:
            if is_out_of_memory(e):
                raise
            return f'{path}: damaged ({type(e).__name__}: {str(e).splitlines()[0][:80] if str(e) else ""})'
        return ''


# %%
#| export
class Resumable(_Restoring):
    "Saving and continuing, for a run with networks, method, optimiser, scaler, health and `state_dict`"

    is_of_today = True  # has the checkpoint the places, roles and processes of this session?

    def load(self):
        """Continue from the newest generation that is whole; an error if it belongs to another run.

        One with other places or processes counts as not saved, so that this session saves its own."""
        faults = []
        for name in (LAST, PREVIOUS):
            if not (self.dir / name).is_file():
                continue
            fault = self._continued(name)
            if not on_any_process(bool(fault), self.device):
                break
            faults.append(fault or f'{self.dir / name}: damaged for another process')
        else:
            cure = 'no generation before it is left: choose another folder, or delete this one'
            raise DataError(f'{faults[0]}; {cure}')
        if faults and is_main():
            warnings.warn(f'{faults[0]}; the run goes on from iteration {self.step}, in {name}')
        self.mark()
        if not self.is_of_today:
            self.saved = 0

    def _continued(self, name):
        "Take over one generation; why it cannot be used, or ''"
        path = self.dir / name
        try:
            saved, own = read_generation(self.dir, name)
            check_fields(saved, path)
            check_same_run(
                saved['config'],
                as_before(self.cfg, saved),
                saved['split'],
                self.data.split.fingerprint,
                self.dir,
                saved.get('roles'),
                self.roles,
            )
            check_fields(saved, path, self.cfg.optim.iters)
            if own is not None:
                check_fields(own, self.own_file, self.cfg.optim.iters, OWN)
            self.parts = saved.get('ranks', []) if name == LAST else None
            today = to_dict(self.cfg), self.roles, world_size()
            self.is_of_today = (saved['config'], saved.get('roles'), saved.get('world')) == today
            return self._taken(saved, part_of_today(self, saved, own), path)
        except Damaged as e:
            return str(e)


# %% [markdown]
# ## The folder while it trains
#
# The main process owns the folder (@sec-lock). Between reading the checkpoint and owning the folder another
# process may have trained; then the state in memory is old.

# %%
#| export
def refuse_others(
    folder,  # of a run
    device,  # for the exchange between processes
):
    "`DataError`, in all processes of a run, if a process of another one trains in this folder"
    fault = ''
    if is_main():
        try:
            refuse_if_owned(folder)
        except DataError as e:
            fault = str(e)
    if on_any_process(bool(fault), device):
        raise DataError(fault or f'{folder}: a process of another run trains in this folder')


@contextlib.contextmanager
def owned(
    run,  # has dir, stamp, owner
):
    "Own the folder of a run while it trains"
    if not is_main():
        yield
        return
    with Owner(run.dir) as run.owner:
        if _stamp(run.dir) != run.stamp:
            raise DataError(f'{run.dir}: another process has trained here meanwhile; repeat the command')
        yield
    run.owner = None


# %% [markdown]
# ## Whatever ends a run
#
# Every exception saves the last finished iteration, and then ends the run with a line that says from where
# the same command goes on. So the line must not propose a cure after which the command is refused, because it
# trains something else: smaller images are another run.

# %%
#| export
def _is_loss_of_others(e):
    "Did a message between processes fail, because another one has ended?"
    words = ('Connection closed by peer', 'Connection reset', 'gloo', 'NCCL', 'Broken pipe')
    return isinstance(e, RuntimeError) and any(w in str(e) for w in words)


def ended_by(
    e,  # BaseException
    run,  # with step, saved, dir
    stop,  # Stop
    fault: str = '',  # why the last finished iteration could not be saved
) -> BaseException:  # to raise; `e` itself where there is nothing to say
    "The error of a run that ends before its end, in one line that says what is saved"
    is_known = run.saved == run.step or is_main()  # other processes do not see what the main one has saved
    kept = f'; {run.dir} is saved after iteration {run.saved}: {RESUME}' if run.saved and is_known else ''
    lost = f' (iteration {run.step} could not be saved: {fault})' if fault else ''
    kept += lost
    others = _is_loss_of_others(e)
    if isinstance(e, KeyboardInterrupt) or (stop.is_asked() and (others or isinstance(e, WorkerLost))):
        where = (f'stopped after iteration {run.saved}; {RESUME}' if run.saved else 'stopped') + lost
        return KeyboardInterrupt(str(e) if isinstance(e, KeyboardInterrupt) and str(e) else where)
    if is_out_of_memory(e):
        return SemiDETRError(
            f'iteration {run.step}: memory ran out; free some, or use loader.num_workers=0{kept}; smaller '
            'batches or images (loader.n_labelled, loader.n_unlabelled, view.max_side) are another run in '
            'another folder' + (f', which run.init={run.dir} starts from these weights' if kept else '')
        )
    if others:
        return SemiDETRError(f'iteration {run.step}: another process of this run has ended{kept}')
    if isinstance(e, SemiDETRError):
        return type(e)(f'{e}{kept}')
    if isinstance(e, OSError) and e.strerror:
        cure = 'make room' if e.errno in (errno.ENOSPC, errno.EDQUOT) else 'make it accessible again'
        return DataError(f'{e.filename or run.dir}: {e.strerror}; {cure}{kept}')
    if kept:
        e.add_note(kept.removeprefix('; '))
    return e


@contextlib.contextmanager
def keep_progress(
    run,  # has step, saved, dir and keep()
    stop=None,  # Stop
):
    "Whatever ends the run inside saves it first; the message says at which iteration"
    stop = Stop() if stop is None else stop
    try:
        yield
    except BaseException as e:
        with stop.hold():
            fault = run.keep()
        error = ended_by(e, run, stop, fault)
        if error is e:
            raise
        raise error from None


# %%
toy_run = SimpleNamespace(step=120, saved=0, dir='runs/mine')
toy_run.keep = lambda: setattr(toy_run, 'saved', toy_run.step) or ''
ends = []
for cause in (
    DataError('photos/7.jpg: image 7 cannot be read; restore it'),
    MemoryError(),
    KeyboardInterrupt(),
    OSError(28, 'No space left on device', 'runs/mine/log.jsonl'),
):
    try:
        with keep_progress(toy_run):
            raise cause
    except BaseException as e:
        ends.append(f'{type(e).__name__}: {e}')
assert all('iteration 120' in line and RESUME in line for line in ends)
ends

# %% [markdown]
# A worker that is lost while a stop is pending was most likely ended by the same signal:

# %%
with stop_gently() as stop:
    signal.raise_signal(signal.SIGTERM)
    stopped = ended_by(WorkerLost('worker 3 exited'), toy_run, stop)
assert isinstance(stopped, KeyboardInterrupt)
str(stopped), str(ended_by(WorkerLost('worker 3 exited'), toy_run, Stop()))

# %%
#| label: fig-stop-lost
#| fig-cap: "Iterations lost when a run ends at iteration 130 with a checkpoint every 100: before, an error lost those since the last checkpoint; with the copy at the beginning of a step only the unfinished one is repeated."
#| fig-alt: "Two bars: 30 iterations lost from the last checkpoint alone, 1 with the copy"
fig, ax = plt.subplots(figsize=(4, 1.5), dpi=80)
ax.barh(['last checkpoint', 'last finished iteration'], [130 % 100, 1], color=['#d62728', '#2ca02c'])
ax.set(xlabel='iterations lost')
ax.invert_yaxis()
plt.show()

# %% [markdown]
# ## Summary
#
# - A signal ends a run after its iteration, whoever of the process group gets it; an update is always completed.
# - `Snapshot` brings an unfinished iteration back to its beginning, so what is saved is a whole step.
# - Whatever ends a run, `keep_progress` saves it and says from where the same command goes on.
# - `Resumable.load` continues from the newest generation that is whole.
#
# ## Exercises
#
# 1. Which of the four things in a snapshot, if it were left out, would change the rest of a run least?
# 2. Why may an evaluation be interrupted in one process, but not in one of several?
# 3. Why can an error inside the optimiser's update not be undone, and what would it cost to change that?
