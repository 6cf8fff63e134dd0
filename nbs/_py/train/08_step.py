# %% [markdown]
# # One step {#sec-step}
#
# > Compute the losses and gradients of a step on many batches and processes, clip them, and update.
#
# A step is computed in two places: in the training loop (@sec-trainer), and once more when its failure is
# repeated (@sec-replay). Both must compute the same, so both use the class of this chapter.
#
# With $A$ batches of $W$ processes each, the gradient of a step is the mean over all of them,
#
# $$ g = \frac1{AW} \sum_{a=1}^{A} \sum_{w=1}^{W} \nabla \ell_{a,w}. $$ {#eq-step}

# %%
#| default_exp train.step

# %%
#| export
import contextlib
import math
import queue
import threading
from functools import partial
import torch
import torch.distributed as dist
from semidetr.core import rank, rng_state, seed_everything, set_rng_state, world_size
from semidetr.detectors.contract import build_detector
from semidetr.many import on_same_gpu
from semidetr.matching.matching import NonFiniteError
from semidetr.semi.teacher import check_finite, ema_decay, make_teacher, update_teacher
from semidetr.train.capsule import FILLING, Elsewhere, Tape, listed, replaced
from semidetr.train.checkpoint import start_from
from semidetr.train.config import Config
from semidetr.train.evaluation import same_rng, to_device
from semidetr.train.optim import average_gradients, build_optimizer, lr_factor
from semidetr.train.stop import Snapshot

# %%
#| hide
from types import SimpleNamespace
import matplotlib.pyplot as plt
from semidetr.many import normaliser
from semidetr.train.config import override


# %% [markdown]
# ## Losses and their gradients
#
# The gradients of `accumulate` batches add up before the optimiser step, so one GPU, or a laptop, takes the
# steps of many GPUs, in more time. The average over processes is one message after the last batch, so it does
# not matter which parameters a stage leaves unused.
#
# A loss that is not finite ends the step, and what then happens is a setting (@sec-capsule-policy).

# %%
#| export
def total_loss(
    losses: dict,  # of a step
) -> torch.Tensor:  # scalar, float32
    "Sum of all terms; NonFiniteError names those that are not finite"
    total = torch.stack([v.float() for v in losses.values()]).sum()
    if not torch.isfinite(total):
        raise NonFiniteError('not finite: ' + ', '.join(k for k, v in losses.items() if not v.isfinite()))
    return total


# %%
caught = []
for toy_losses in (dict(loss_cls=1.0, loss_l1=2.0), dict(loss_cls=1.0, loss_l1=math.nan)):
    try:
        caught.append(total_loss({k: torch.tensor(v) for k, v in toy_losses.items()}).item())
    except NonFiniteError as e:
        caught.append(str(e))
assert caught == [3.0, 'not finite: loss_l1']
caught


# %% [markdown]
# ## The update
#
# The gradient is clipped to the norm $c$, $g \leftarrow g \min(1, c/\lVert g\rVert)$. A learned suppressor with
# a rate of its own is clipped by itself.

# %%
#| export
def clip_and_step(
    optimizer,
    scaler,  # torch.amp.GradScaler
    clip: float,  # largest L2 norm of the gradient; 0: any
    factor: float,  # of the learning rates, from `lr_factor`
) -> float:  # norm of the gradient before clipping, without groups that are `apart`
    "Clip (groups that are `apart` each by itself), update"
    apart = [g['params'] for g in optimizer.param_groups if g.get('apart')]
    together = [p for g in optimizer.param_groups if not g.get('apart') for p in g['params']]
    scaler.unscale_(optimizer)
    norms = [torch.nn.utils.clip_grad_norm_(params, clip or math.inf).item() for params in (together, *apart)]
    if not all(map(math.isfinite, norms)) and not scaler.is_enabled():
        raise NonFiniteError('the gradient is not finite')
    for g in optimizer.param_groups:
        g['lr'] = g['base_lr'] * factor
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norms[0]


# %%
with same_rng():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.ones(3))
(weight * torch.tensor([3.0, 4.0, 0.0])).sum().backward()
toy_optimizer = torch.optim.SGD([dict(params=[weight], base_lr=1.0)], lr=1.0)
norm = clip_and_step(toy_optimizer, torch.amp.GradScaler('cpu', enabled=False), 1.0, 0.5)
assert norm == 5.0 and torch.allclose(weight.detach(), torch.tensor([0.7, 0.6, 1.0]))
norm, weight.detach()


# %% [markdown]
# ## The step of a run
#
# All processes get the mean of the gradients, so if the gradient of one is not finite, no update is finite. Which
# one it was tells the norm of each before the mean.

# %%
#| export
class Built:
    "What a configuration trains, on `device`"

    def build(
        self,
        cfg: Config,
        detector,  # settings of the networks
        labelled,  # data set with boxes, for the method
        init='',  # run whose weights it starts from
    ):
        "Both networks, method, optimiser, and what a step keeps beside them"
        self.cfg = cfg
        self.student = build_detector(detector)
        self.student.to(self.device, memory_format=torch.channels_last)  # a third faster on CPUs
        self.teacher = make_teacher(self.student)
        self.method = cfg.method.build(cfg, labelled).to(self.device)
        if init:
            start_from(self, init)
        self.optimizer = build_optimizer(self.student, cfg.optim, [self.method])
        self.snapshot = Snapshot(self.student, self.teacher, self.method, self.optimizer)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=cfg.run.amp == 'fp16')
        self.step, self.recent, self.history, self.spent = 0, [], [], dict(seconds=0.0, cpu=0.0)
        self.faults, self.tape = dict(skipped=0, went_back=0), Tape()


# %% [markdown]
# ## Batches that take turns {#sec-step-turns}
#
# The mean of @eq-step is the gradient of one large batch only if each $\ell_{a,w}$ is divided by what all
# batches have in common (@sec-many): where one batch holds 1 object and the next 9, the first object weighs
# nine times as much. With `optim.normalise=step` the batches of a step are to each other as processes are:
#
# 1. all batches are computed without gradient, in turns. Where a process would wait for a message of the
#    others, a batch stops and the next one goes on; when all have come there, the message is made;
# 2. random states, running averages and memories are put back;
# 3. each batch is computed with its gradient, and gets the messages from the record (`Tape`).
#
# So whatever is that of all processes is then that of all batches too: counts, slots, noise, costs of the
# mixture, class thresholds. `criterion.normalise=process` and `consistency.normalise=process` except the same
# quantities. Batches of several processes are $AW$ processes. The price is one more forward pass, and that
# meanwhile the outputs of all batches, without their graph, are in memory.
#
# What a batch cannot get from a record is a gradient. In the batch norms of the projector mean and variance
# are those of all boxes, but what flows back through them is that of the batch alone, times $A$. Earlier views
# (@sec-mixing) are remembered of the last batch; running averages of a backbone that trains its batch norms
# move once for each batch.

# %%
#| export
class _Turn(threading.Thread):
    "Work that rests whenever it has a message for others"

    def __init__(self, work):
        super().__init__(daemon=True)
        self.work, self.go, self.said = on_same_gpu(work), queue.SimpleQueue(), queue.SimpleQueue()
        self.start()

    def run(self):
        try:
            self.rest()
            self.work()
            self.said.put(None)
        except BaseException as e:
            self.said.put(e)

    def rest(self):
        if self.go.get() == 'end':
            raise SystemExit

    def say(self, *message):
        self.said.put(message)
        self.rest()

    def next(self):
        self.go.put('on')
        return self.said.get()

    def end(self):
        self.go.put('end')
        self.join()


# %%
#| export
def _made(messages):
    "What all get: sum, rows, or the first; over all processes"
    name, first, _ = messages[0]
    if name == 'broadcast':
        rows = first.clone()
        if world_size() > 1:
            dist.broadcast(rows, 0)
        return [rows]
    rows = torch.stack([args[0] if name == 'all_gather' else out for _, out, args in messages])
    if name == 'all_reduce':
        rows = rows.sum(0)
        if world_size() > 1:
            dist.all_reduce(rows)
        return [rows]
    parts = [rows]
    if world_size() > 1:
        parts = [torch.zeros_like(rows) for _ in range(world_size())]
        dist.all_gather(parts, rows)
    return [row for part in parts for row in part]


# %%
#| export
def take_turns(
    works,  # functions without argument: what one sends to other processes is sent to the other works too
    turn=lambda n: contextlib.nullcontext(),  # context of the work of this number, whenever it goes on
) -> list:  # for each message what all received, for `Tape`
    "Run works as if each were a process; in several processes all call it with as many works"
    received, now, turns = [], 0, [_Turn(work) for work in works]
    first, world = rank() * len(works), world_size() * len(works)
    there = dict(
        is_initialized=lambda: True,
        get_rank=lambda group=None: first + now,
        get_world_size=lambda group=None: world,
        **{name: lambda *args, name=name: turns[now].say(name, args[0], args[1:]) for name in FILLING},
    )
    try:
        while True:
            said = []
            with replaced(there):
                for now, one in enumerate(turns):
                    with turn(now):
                        said.append(one.next())
                    if isinstance(said[-1], BaseException):
                        raise said[-1]
            if len({message and message[0] for message in said}) > 1:
                raise RuntimeError('the batches of a step exchange different messages')
            if said[0] is None:
                return received
            received.append(_made(said))
            for _, out, _ in said:
                for tensor, row in zip(listed(out), received[-1]):
                    tensor.copy_(row)
    finally:
        for one in turns:
            one.end()


# %% [markdown]
# Two works of which each sees a count of its own. Both divide by the mean:

# %%
divided = []
heard = take_turns([lambda n=n: divided.append(normaliser(torch.tensor(n)).item()) for n in (1.0, 9.0)])
assert divided == [5, 5] and heard == [[10]]
divided, heard


# %%
#| export
def moving(
    run,  # has `method`
) -> tuple:  # (random states, state of the method without its weights)
    "What the pass of a batch moves, beside running averages of the student"
    weights = {k for k, _ in run.method.named_parameters()}
    parts = {k: v for k, v in run.method.state_dict().items() if k not in weights}
    return rng_state(), {k: v.clone() if torch.is_tensor(v) else v for k, v in parts.items()}


def move(
    run,  # has `method`
    state: tuple,  # of `moving`
):
    "Put it back"
    set_rng_state(state[0])
    run.method.load_state_dict(state[1], strict=False)


# %%
#| export
class Turns(Built):
    "The batches of a step as processes"

    def turns_of(
        self,
        batches,  # of one optimiser step
    ):
        "For each batch a context, for its pass with gradient; `optim.normalise=step`: it gets the messages"
        if self.cfg.optim.normalise == 'batch' or len(batches) == 1:
            yield from (contextlib.nullcontext() for _ in batches)
            return
        starts, ends, world = self.starts(len(batches)), [], len(batches) * world_size()
        tape = Tape(self.listen(batches, list(starts)))
        for n, start in enumerate(starts):
            move(self, start)
            yield tape.playing(len(batches) * rank() + n, world)
            ends.append(rng_state())
        set_rng_state(ends[0])  # as after one large batch

    def starts(self, n):
        "Where each batch starts: all with the same memories, each with random numbers of its own"
        found = [moving(self)]
        with same_rng():
            while len(found) < n:
                seed_everything(int(torch.randint(2**31, ())))
                found.append(moving(self))
        return found

    def listen(self, batches, states):
        "The messages of a step; afterwards the student is as before"
        before = [b.clone() for b in self.student.buffers()]

        @contextlib.contextmanager
        def turn(n):
            self.suspect = [batches[n]]
            move(self, states[n])
            yield
            states[n] = moving(self)

        received = take_turns([partial(torch.no_grad()(self.forward), b) for b in batches], turn)
        for b, old in zip(self.student.buffers(), before):
            b.copy_(old)
        return received


# %% [markdown]
# ## All of it

# %%
#| export
class Step(Turns):
    "A step; the run also has `cfg`, `device`, and `rate`, a factor of its learning rate"

    def autocast(self):
        "The precision of `run.amp`"
        kind = self.cfg.run.amp
        dtype = torch.float16 if kind == 'fp16' else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=kind != 'off')

    def forward(self, batch):
        "`StepResult` of a batch; `NonFiniteError` for a weak view whose pixels are not finite"
        with self.autocast():
            part = to_device(batch, self.device)
            if 'weak' in part:
                check_finite([part['weak']['images']], part['weak']['targets'], 'pixels of its weak view')
            return self.method.step(self.student, self.teacher, part, self.step)

    def passes(
        self,
        batches,  # of one optimiser step
    ) -> tuple:  # (StepResult, loss) of the last batch
        "Update the teacher; losses and gradients of all batches; NonFiniteError where a loss is not finite"
        init, self.losses = bool(self.cfg.run.init), []
        update_teacher(self.teacher, self.student, ema_decay(self.step, self.cfg.ema, init))
        self.student.train()
        for batch, turn in zip(batches, self.turns_of(batches), strict=True):
            self.suspect = [batch]
            self.losses.append({})
            with turn:
                result = self.forward(batch)
            self.losses[-1] = {k: v.detach() for k, v in result.losses.items()}
            loss = total_loss(result.losses)
            self.scaler.scale(loss / len(batches)).backward()
        self.suspect = batches
        return result, loss

    def average(self):
        "Average the gradients over the processes; `own_norm` is that of this one alone"
        params = [p for g in self.optimizer.param_groups for p in g['params']]
        grads = [p.grad for p in params if p.grad is not None]
        self.own_norm = torch.nn.utils.get_total_norm(grads) if world_size() > 1 else None
        average_gradients(params)

    def update(self) -> float:  # norm of the gradient
        "Update the weights; `Elsewhere` if the gradient of another process is not finite"
        optim = self.cfg.optim
        factor = lr_factor(self.step, optim) * self.rate
        try:
            return clip_and_step(self.optimizer, self.scaler, optim.clip, factor)
        except NonFiniteError as e:
            if self.own_norm is not None and self.own_norm.isfinite():
                raise Elsewhere('the gradient of another process is not finite') from e
            raise


# %% [markdown]
# A network of one weight that fits $y=2x$ for the numbers $x$ above 0, with the sum of $(wx-2x)^2$ divided by
# how many there are. Two batches with 1 and 3 of them: with `optim.normalise=step` their step is that on all
# eight numbers; otherwise the single one counts as much as the three together.

# %%
class ToyMethod(torch.nn.Module):
    "Fits y = 2x where x > 0"

    def step(self, student, teacher, part, t):
        x = part['x'][part['x'] > 0][:, None]
        n = normaliser(torch.tensor(float(len(x))))
        return SimpleNamespace(losses=dict(loss=(student(x) - 2 * x).square().sum() / n))


class ToyStep(Step):
    "A step of one weight"

    rate = 1.0

    def __init__(self, *items):
        self.device, self.step, self.tape = torch.device('cpu'), 0, Tape()
        self.cfg, self.method = override(Config(), items), ToyMethod()
        self.student, self.teacher = (torch.nn.Linear(1, 1, bias=False) for _ in range(2))
        torch.nn.init.zeros_(self.student.weight)
        groups = [dict(params=[*self.student.parameters()], base_lr=0.1)]
        self.optimizer = torch.optim.SGD(groups, lr=0.1)
        self.scaler = torch.amp.GradScaler('cpu', enabled=False)


numbers = torch.tensor([-1.0, 1, -2, -3, 2, 3, 4, -4])
halves, found = [dict(x=numbers[:4]), dict(x=numbers[4:])], []
for batches, over in (([dict(x=numbers)], 'batch'), (halves, 'step'), (halves, 'batch')):
    toy = ToyStep(f'optim.normalise={over}')
    toy.passes(batches)
    toy.average()
    found.append((toy.student.weight.grad.item(), len(toy.losses)))
    toy.update()
assert found[:2] == [(-30, 1), (-30, 2)] and abs(found[2][0] + 2 + 58 / 3) < 1e-5
found

# %%
norms, moved = [0.25 * n for n in range(1, 13)], []
for size in norms:
    one = torch.nn.Parameter(torch.zeros(1))
    one.grad = torch.full((1,), size)
    sgd = torch.optim.SGD([dict(params=[one], base_lr=1.0)], lr=1.0)
    clip_and_step(sgd, torch.amp.GradScaler('cpu', enabled=False), 1.0, 1.0)
    moved.append(-one.item())
assert max(moved) <= 1 and moved[:3] == norms[:3]
moved[-1]

# %%
#| label: fig-step-clip
#| fig-cap: "Clipping bounds the length of an update: up to the norm c = 1 it is that of the gradient, beyond it stays 1."
#| fig-alt: "Length of the update against the norm of the gradient: a line that bends at 1 and is flat from there"
fig, ax = plt.subplots(figsize=(4, 2.4), dpi=80)
ax.plot(norms, moved, 'o-', color='#1f77b4')
ax.set(xlabel='norm of the gradient', ylabel='length of the update', ylim=(0, 2))
plt.show()

# %% [markdown]
# ## Summary
#
# - The gradient of a step is the mean over its batches and over all processes.
# - A loss that is not finite ends the step before its gradient is computed, a gradient before the update.
# - With `optim.normalise=step` accumulated batches are divided by common counts, as one large batch is.
# - The losses of all batches are kept until the next step, as evidence.
#
# ## Exercises
#
# 1. Why is a loss divided by the number of batches before `backward`, and not the gradient afterwards?
# 2. Why can the messages of the first pass be replayed in the second, and why not its gradients?
# 3. The gradient of one process is NaN. What do the others see after the mean, and how do they know that it
#    was not theirs?
