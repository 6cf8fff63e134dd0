# %% [markdown]
# # Values that are not finite {#sec-capsule}
#
# > Keep the evidence of a step with NaN or infinity, and stop, leave the step out, or go back.
#
# A loss becomes NaN after nine hours. Was it an image, a weight, the learning rate? Rerunning for nine hours
# does not tell, because by then the state that led to it is gone. So the state is kept: everything that the
# step depends on, as it was before the step, in one file. `semidetr replay` repeats the step from it
# (@sec-replay).
#
# Let $s_t$ be the state before step $t$ (both networks, the method, moments, random states), $b_t$ its batches,
# and $m_t$ what the other processes sent during the step. The losses are a function of these alone,
#
# $$ (\ell_1, \dots, \ell_n) = f(s_t, b_t, m_t), $$ {#eq-capsule}
#
# so a file with all three repeats them to the last bit on the same machine. Leaving $m_t$ out would be easier,
# but losses are divided by counts over all processes (@sec-many), and one process cannot know those.

# %%
#| default_exp train.capsule

# %%
#| export
import contextlib
import functools
import hashlib
import warnings
import torch
import torch.distributed as dist
from semidetr.core import is_main, rank, world_size
from semidetr.matching.matching import NonFiniteError
from semidetr.train.checkpoint import Damaged, save_checkpoint
from semidetr.train.generations import file_of
from semidetr.train.stop import Resumable

# %%
#| hide
import tempfile
from pathlib import Path
from types import SimpleNamespace
import matplotlib.pyplot as plt

# %% [markdown]
# ## What other processes send
#
# In a step a process receives sums, gathered rows and the random state of the first process. All of it comes
# through three functions of `torch.distributed`, which fill their first argument. While a step runs, they are
# replaced by functions that do the same and keep a copy of what came: some numbers for each loss. The mean of
# the gradients comes after that and is not kept.
#
# A process that finds NaN leaves its step at a place where the others do not, and they wait for a message that
# never comes. With the policy *stop* that ends them, as it should. With the other two all must leave the step
# together. So each message is preceded by a question, *has one of us failed?*, and so is the end of the step.

# %%
#| export
FILLING = ('all_reduce', 'all_gather', 'broadcast')  # they write into their first argument


class Elsewhere(NonFiniteError):
    "Another process has found values that are not finite"


class Diverged(NonFiniteError):
    "A repeated step asks the other processes for something else than the recorded one did"


@contextlib.contextmanager
def replaced(
    functions: dict,  # name in `torch.distributed` -> function
):
    "Other functions in `torch.distributed` inside"
    old = {name: getattr(dist, name) for name in functions}
    try:
        for name, function in functions.items():
            setattr(dist, name, function)
        yield
    finally:
        for name, function in old.items():
            setattr(dist, name, function)


def listed(out):
    "The first argument of one of `FILLING` as a list of tensors"
    return list(out) if isinstance(out, (list, tuple)) else [out]


# %%
#| export
class Tape:
    "What a process received from the others during a step, in order"

    def __init__(
        self,
        received=(),  # for each message a list of tensors
    ):
        self.received = list(received)

    @contextlib.contextmanager
    def recording(
        self,
        device,  # of the run
        together: bool = False,  # shall all processes leave the step if one fails?
    ):
        "Record what comes inside; with `together`, `Elsewhere` where another process fails"
        self.received = []
        if world_size() == 1:
            yield
            return
        real = {name: getattr(dist, name) for name in FILLING}

        def ask(failed=False):
            flag = torch.tensor(float(failed), device=device)
            real['all_reduce'](flag)
            if flag > 0 and not failed:
                raise Elsewhere('another process has found values that are not finite')

        def recorded(name, out, *args, **kwargs):
            if together:
                ask()
            done = real[name](out, *args, **kwargs)
            self.received.append([t.clone() for t in listed(out)])
            return done

        try:
            with replaced({name: functools.partial(recorded, name) for name in FILLING}):
                yield
            if together:
                ask()
        except NonFiniteError as e:
            if together and not isinstance(e, Elsewhere):
                ask(failed=True)
            raise

    @contextlib.contextmanager
    def playing(
        self,
        number: int,  # of the process that is repeated
        world: int,  # number of processes
    ):
        "Inside, this process is one of several and receives what was recorded; `Diverged` beyond that"
        left = iter(self.received)

        def given(out, *args, **kwargs):
            tensors, found = listed(out), next(left, [])
            if [t.shape for t in tensors] != [t.shape for t in found]:
                raise Diverged('the step exchanges other numbers with the other processes than recorded')
            for tensor, recorded in zip(tensors, found):
                tensor.copy_(recorded)

        there = dict(
            is_initialized=lambda: True,
            get_rank=lambda group=None: number,
            get_world_size=lambda group=None: world,
        )
        with replaced(there | dict.fromkeys(FILLING, given)) if world > 1 else contextlib.nullcontext():
            yield


# %% [markdown]
# A toy: process 1 of 2 received a sum of 7 and the rows of both processes. Played back, its code finds two
# processes, and exactly these numbers:

# %%
tape = Tape([[torch.tensor([7.0])], [torch.tensor([1.0]), torch.tensor([2.0])]])
with tape.playing(1, 2):
    total, rows = torch.tensor([4.0]), [torch.zeros(1), torch.zeros(1)]
    dist.all_reduce(total)
    dist.all_gather(rows, torch.tensor([2.0]))
    where = rank(), world_size()
    try:
        dist.all_reduce(total)
    except Diverged as e:
        beyond = str(e)
assert where == (1, 2) and total == 7 and rows == [1, 2] and (rank(), world_size()) == (0, 1)
where, total, rows, beyond


# %% [markdown]
# ## The capsule
#
# | in the file | because |
# | :--- | :--- |
# | everything that a checkpoint of the main process holds, as it was *before* the step (@sec-stop) | the teacher and batch norms move early in a step |
# | the batches of the step: images, masks, targets | the photographs may be gone tomorrow |
# | boxes and classes of the labelled images | some methods count them when they are built |
# | number of this process and of all, what it received | @eq-capsule |
# | threads and device | the order of sums depends on them |
# | each loss of the step as far as it came, the error, and a digest of what had moved by then | what a replay is compared with |
#
# Each process that fails writes its own: `failed_step_120.pt`, `failed_step_120.rank1.pt`. If there is no room
# for it, the message says so, and the run ends or goes on as its policy says.

# %%
#| export
def annotations(
    ds,  # data set with boxes
) -> dict:  # counts (n,), boxes (N,4) xyxy, labels (N,), ignore (N,) of all n images, one after the other
    "The annotations of a data set in four tensors"
    rows = [ds.annotation(i) for i in range(len(ds))]
    out = dict(counts=torch.tensor([len(r['labels']) for r in rows], dtype=torch.long))
    empty = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0).long(), ignore=torch.zeros(0).bool())
    return out | {k: torch.cat([none, *(r[k] for r in rows)]) for k, none in empty.items()}


def state_digest(
    run,  # with student, teacher and method
) -> str:  # 64 hex digits
    "SHA-256 of what a step moves before its update: teacher, running statistics, method, random state"
    digest = hashlib.sha256(torch.get_rng_state().numpy())
    for state in (run.teacher.state_dict(), dict(run.student.named_buffers()), run.method.state_dict()):
        for value in filter(torch.is_tensor, state.values()):
            digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# %%
toy_run = SimpleNamespace(
    teacher=torch.nn.Linear(1, 1), student=torch.nn.ReLU(), method=torch.nn.BatchNorm1d(2)
)
digest_before = state_digest(toy_run)
toy_run.method(torch.randn(3, 2, generator=torch.Generator().manual_seed(0)))  # moves its running mean
assert state_digest(toy_run) != digest_before
digest_before[:12], state_digest(toy_run)[:12]


# %%
#| export
def image_ids(
    batches: list,  # of a step
) -> dict:  # part -> image ids
    "Which images batches hold"
    found = {}
    for batch in batches:
        for name, part in batch.items():
            found[name] = found.get(name, []) + [t['image_id'] for t in part['targets']]
    return found


# %%
#| export
class Evidence(Resumable):
    "For a run whose step has kept `losses` of each batch, its `tape`, and the batches that are `suspect`"

    def capsule(
        self,
        error,  # NonFiniteError
        batches: list,  # of the step
        moved: str,  # digest of the state when the error came
    ) -> dict:
        "All that the step depends on, and what came of it; the state must be that before the step"
        return self.state_dict(whole=True) | dict(
            batches=batches,
            labelled=annotations(self.data.labelled),
            rank=rank(),
            world=world_size(),
            received=[[t.cpu() for t in tensors] for tensors in self.tape.received],
            threads=torch.get_num_threads(),
            device=str(self.device),
            losses=[{k: v.cpu().clone() for k, v in terms.items()} for terms in self.losses],
            moved=moved,
            error=str(error),
        )

    def evidence(self, error, batches) -> str:
        "Bring back the state before the step and save it; one line that says what happened and where it is"
        moved = state_digest(self)
        self.snapshot.back()
        line = f'iteration {self.step}: {error}'
        if isinstance(error, Elsewhere):
            name = f'failed_step_{self.step}'
            return f'{line}; it leaves {name}.pt or {name}.rankN.pt in {self.dir}'
        path = self.dir / file_of(f'failed_step_{self.step}', rank())
        line = f'{line}; images {image_ids(self.suspect)}'
        try:
            save_checkpoint(path, **self.capsule(error, batches, moved))
        except OSError as e:
            return f'{line}; the evidence could not be written: {path}: {e.strerror or e}'
        return f'{line}; `semidetr replay {path}` repeats it'


# %%
class Toy(Evidence):
    "A run of one number"

    def __init__(self, folder):
        self.dir, self.step, self.device, self.tape = Path(folder), 3, 'cpu', Tape()
        self.snapshot = SimpleNamespace(back=lambda: None)
        self.data = SimpleNamespace(labelled=())
        self.student = self.teacher = self.method = torch.nn.ReLU()
        self.losses = [dict(loss_cls=torch.tensor(float('nan')))]
        self.suspect = [dict(labelled=dict(targets=[dict(image_id=7)]))]

    def state_dict(self, whole=False):
        return dict(step=self.step)


toy_folder = tempfile.mkdtemp()
line = Toy(toy_folder).evidence(NonFiniteError('not finite: loss_cls'), [])
lost = Toy(Path(toy_folder) / 'failed_step_3.pt' / 'no').evidence(NonFiniteError('not finite: loss_cls'), [])
assert (
    (Path(toy_folder) / 'failed_step_3.pt').exists()
    and "'labelled': [7]" in line
    and 'not be written' in lost
)
line.replace(toy_folder, 'runs/mine'), lost.replace(toy_folder, 'runs/mine')

# %% [markdown]
# ## What then? {#sec-capsule-policy}
#
# `run.non_finite` chooses. None of the three changes a number of a run without such values.
#
# | policy | what happens | bound |
# | :--- | :--- | :--- |
# | `stop` | the run ends with the line above | |
# | `skip` | this iteration is left out, the next one takes the next batch | `run.max_skipped` iterations, then it stops |
# | `back` | the run continues from its last checkpoint (@sec-generations), with half the learning rate from there to the end | 3 times, then it stops |
#
# *What left out means.* The iteration counts: the schedule, the stages of the method and the position in the
# data advance. Nothing else does: weights, moments, teacher, batch norms, caches and random states are those
# before the iteration. So its random draws are made again by the next iteration, and the run equals, bit for
# bit, one in which that iteration does nothing (the tests compare them).
#
# *Going back* repeats the iterations since the checkpoint on the same batches, but with smaller steps. With
# this policy a run saves itself before its first iteration too. After $k$ returns the rate is $2^{-k}$ times
# that of the schedule; $k$ is in the checkpoint.
#
# Both counts are in the checkpoint, in each line of the log from then on (`skipped`, `went_back`) and in
# `run.json`. A run that stopped may be continued with another policy in the same folder.
#
# *Half precision.* With `run.amp=fp16` gradients overflow now and then, the scaler leaves out that update and
# lowers its scale. That is normal, and no matter for these policies; a loss that is not finite is.

# %%
#| export
MOST_BACK = 3  # times that a run goes back


def faults_of(
    saved: dict,  # content of a checkpoint
    path,  # of it, for the message
) -> dict:  # skipped, went_back
    "The counts in a checkpoint; zeros in one that is older than them, `Damaged` if they are no counts"
    found = saved.get('faults', dict(skipped=0, went_back=0))
    is_dict = isinstance(found, dict) and set(found) == {'skipped', 'went_back'}
    if not is_dict or any(type(n) is not int or n < 0 for n in found.values()):
        raise Damaged(f"{path}: 'faults' holds something else than the counts of skipped and went_back")
    return dict(found)


class Policy(Evidence):
    "What a run does after an iteration that is not finite; it has `faults`, the counts, and `went_back`"

    went_back = False  # in this iteration

    @property
    def rate(self) -> float:
        "Factor of the learning rate"
        return 0.5 ** self.faults['went_back']

    def _taken(self, saved, own, path):
        try:
            faults = faults_of(saved, path)
        except Damaged as e:
            return str(e)
        fault = super()._taken(saved, own, path)
        self.faults = self.faults if fault else faults
        return fault

    def after_failure(self, error, batches):
        "Leave the iteration out, or go back; NonFiniteError where the run must stop"
        run, line = self.cfg.run, self.evidence(error, batches)
        skipped, backs = self.faults['skipped'], self.faults['went_back']
        if run.non_finite == 'skip' and skipped < run.max_skipped:
            with self.stop.hold():
                self.step += 1
                self.faults['skipped'] += 1
            done = f'this iteration is left out, number {skipped + 1} of at most {run.max_skipped}'
        elif run.non_finite == 'back' and backs < MOST_BACK:
            self.load()
            self.faults['went_back'], self.went_back = backs + 1, True
            done = (
                f'back to iteration {self.step}, with {self.rate:g} times the learning rate of the settings'
            )
        else:
            raise NonFiniteError(f'{line}; {_ended(run, skipped, backs)}')
        if is_main() or not isinstance(error, Elsewhere):
            warnings.warn(f'{line}; {done}')


def _ended(run, skipped, backs):
    "Why a run stops, and what would let it go on"
    if run.non_finite == 'skip':
        return f'{skipped} iterations are left out already, and run.max_skipped={run.max_skipped}'
    if run.non_finite == 'back':
        return f'the run went back {backs} times already; a smaller optim.lr is another run'
    return 'run.non_finite=skip leaves such iterations out, back repeats them with half the learning rate'


# %%
class ToyRun(Policy, Toy):
    "The toy with a policy"

    def __init__(self, folder, **settings):
        super().__init__(folder)
        self.cfg = SimpleNamespace(run=SimpleNamespace(max_skipped=2, non_finite='stop'))
        vars(self.cfg.run).update(settings)
        self.stop = SimpleNamespace(hold=contextlib.nullcontext)
        self.faults = dict(skipped=0, went_back=0)

    def load(self):
        self.step = 2


ends = {}
for policy in ('stop', 'skip', 'back'):
    toy_policy, trace = ToyRun(toy_folder, non_finite=policy), []
    with warnings.catch_warnings(record=True):
        try:
            for _ in range(9):
                toy_policy.after_failure(NonFiniteError('not finite: loss_cls'), [])
                trace.append((toy_policy.step, toy_policy.rate))
        except NonFiniteError as e:
            ends[policy] = trace, str(e).rpartition('; ')[2]
assert [x[0] for x in ends['skip'][0]] == [4, 5]
assert [x[1] for x in ends['back'][0]] == [0.5, 0.25, 0.125]
ends

# %%
#| label: fig-capsule-policies
#| fig-cap: "Iteration 4 is not finite. With skip the count of iterations runs on and this one changes nothing; with back the run repeats those since the checkpoint after 2, at half the rate (dots)."
#| fig-alt: "Two lines of finished iterations against time: one rises steadily, the other falls back from 4 to 2 and rises again"
fig, ax = plt.subplots(figsize=(5, 2.4), dpi=80)
ax.plot(range(9), range(9), color='#1f77b4', label='skip')
ax.plot(range(5), range(5), color='#ff7f0e')
ax.plot([4, 5], [4, 2], ':', color='#ff7f0e')
ax.plot(range(5, 9), range(2, 6), 'o-', color='#ff7f0e', label='back')
ax.set(xlabel='iterations computed', ylabel='finished')
ax.legend()
plt.show()

# %% [markdown]
# ## Summary
#
# - A step that is not finite leaves a file with everything that it depends on, from each process that failed.
# - What other processes sent is part of it, so one process repeats a step of many.
# - `run.non_finite` stops the run, leaves the iteration out or goes back; the counts of both are saved, and both
#   are bounded.
#
# ## Exercises
#
# 1. Why must the question *has one of us failed?* precede every message, and not only end the step?
# 2. After an iteration that was left out, the next one makes the same random draws. Does that bias anything?
# 3. When does going back help, when does it fail at the same iteration again?
