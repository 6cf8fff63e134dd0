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
import math
import torch
from semidetr.core import world_size
from semidetr.detectors.contract import build_detector
from semidetr.matching.matching import NonFiniteError
from semidetr.semi.teacher import ema_decay, make_teacher, update_teacher
from semidetr.train.capsule import Elsewhere, Tape
from semidetr.train.checkpoint import start_from
from semidetr.train.config import Config
from semidetr.train.evaluation import to_device
from semidetr.train.optim import average_gradients, build_optimizer, lr_factor
from semidetr.train.stop import Snapshot

# %%
#| hide
from types import SimpleNamespace
import matplotlib.pyplot as plt
from semidetr.train.evaluation import same_rng


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


# %%
#| export
class Step(Built):
    "A step; the run also has `cfg`, `device`, and `rate`, a factor of its learning rate"

    def autocast(self):
        "The precision of `run.amp`"
        kind = self.cfg.run.amp
        dtype = torch.float16 if kind == 'fp16' else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=kind != 'off')

    def passes(
        self,
        batches,  # of one optimiser step
    ) -> tuple:  # (StepResult, loss) of the last batch
        "Update the teacher; losses and gradients of all batches; NonFiniteError where a loss is not finite"
        init, self.losses = bool(self.cfg.run.init), []
        update_teacher(self.teacher, self.student, ema_decay(self.step, self.cfg.ema, init))
        self.student.train()
        for batch in batches:
            self.suspect = [batch]
            self.losses.append({})
            with self.autocast():
                part = to_device(batch, self.device)
                result = self.method.step(self.student, self.teacher, part, self.step)
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
# A network of one weight that fits $y=2x$ with the loss $(wx-2x)^2$, averaged over a batch: a step on two
# batches of four is the step on all eight.

# %%
class ToyStep(Step):
    "Fits y = 2x"

    rate = 1.0

    def __init__(self):
        self.device, self.step, self.tape, self.cfg = torch.device('cpu'), 0, Tape(), Config()
        self.student, self.teacher = (torch.nn.Linear(1, 1, bias=False) for _ in range(2))
        torch.nn.init.zeros_(self.student.weight)
        groups = [dict(params=[*self.student.parameters()], base_lr=0.1)]
        self.optimizer = torch.optim.SGD(groups, lr=0.1)
        self.scaler, self.method = torch.amp.GradScaler('cpu', enabled=False), SimpleNamespace(step=self.fit)

    def fit(self, student, teacher, part, t):
        return SimpleNamespace(losses=dict(loss=(student(part['x']) - 2 * part['x']).square().mean()))


numbers = torch.linspace(-1, 1, 8)[:, None]
found = []
for batches in ([dict(x=numbers)], [dict(x=numbers[::2]), dict(x=numbers[1::2])]):
    toy = ToyStep()
    toy.passes(batches)
    toy.average()
    found.append((toy.student.weight.grad.item(), toy.update(), len(toy.losses)))
assert abs(found[0][0] - found[1][0]) < 1e-6 and (found[0][2], found[1][2]) == (1, 2)
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
# - The losses of all batches are kept until the next step, as evidence.
#
# ## Exercises
#
# 1. Why is a loss divided by the number of batches before `backward`, and not the gradient afterwards?
# 2. The gradient of one process is NaN. What do the others see after the mean, and how do they know that it
#    was not theirs?
