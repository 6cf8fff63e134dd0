# %% [markdown]
# # The optimiser {#sec-optim}
#
# > Set up the optimiser: learning rates, a schedule, and one gradient for all processes.
#
# A detection transformer is trained with AdamW, a constant or decaying learning rate, and strong gradient
# clipping. The backbone is pre-trained on another task and gets a smaller rate, or it would lose its features
# faster than the transformer learns to use them.

# %%
#| default_exp train.optim

# %%
#| export
import math
import torch
import torch.distributed as dist
from semidetr.core import rank, world_size
from semidetr.detectors.contract import has_suppressor

# %%
#| hide
from types import SimpleNamespace
import matplotlib.pyplot as plt


# %% [markdown]
# ## Groups of parameters
#
# $$
# \eta_t(\theta) = \eta\, m(\theta)\, f(t), \qquad m(\theta) = \text{backbone_mult, points_mult or 1}
# $$ {#eq-optim-rate}
#
# The base rate $\eta$ is multiplied by $m$ for each group, and by the schedule $f$ in each iteration $t$.
# Modules that a method trains beside the detector, such as the projector of the cross-view queries
# (@sec-consistency), join the group with $m=1$.

# %% [markdown]
# A learned suppressor (@sec-suppressor) is a small network on top of a large one. Clipped together, its gradient
# is scaled by whatever the detector's losses are in that step, and it learns slowly.
# `suppressor_mult` gives it a group of its own, with its own rate and its own clipping.

# %%
#| export
def build_optimizer(
    model,  # a detector; its `param_groups` are 'backbone', 'rest' and perhaps 'points' (@sec-contract)
    cfg,  # OptimConfig
    parts=(),  # other modules that are trained along
):
    "AdamW with a smaller rate for the backbone; frozen parameters are left out"
    groups = model.param_groups()
    others = [p for m in parts for p in m.parameters()]
    apart = {}  # parameters of a learned suppressor with a rate of its own
    if cfg.suppressor_mult and has_suppressor(model):
        apart = dict.fromkeys(p for p in model.suppressor.parameters() if p.requires_grad)
    rates = [
        ([*others, *(p for p in groups['rest'] if p not in apart)], 1.0),
        (groups['backbone'], cfg.backbone_mult),
        (groups.get('points', []), cfg.points_mult),
    ]
    params = [dict(params=ps, lr=cfg.lr * mult, base_lr=cfg.lr * mult) for ps, mult in rates if ps]
    if apart:
        lr = cfg.lr * cfg.suppressor_mult
        params.append(dict(params=list(apart), lr=lr, base_lr=lr, apart=True))
    optimizer = torch.optim.AdamW(params, weight_decay=cfg.weight_decay, fused=True)
    if cfg.sharded and world_size() > 1:
        shard(optimizer)
    return optimizer


# %%
backbone, head = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
toy_groups = dict(backbone=list(backbone.parameters()), rest=list(head.parameters()))
toy = SimpleNamespace(param_groups=lambda: toy_groups)
toy_cfg = SimpleNamespace(
    lr=1e-3, backbone_mult=0.1, points_mult=1.0, suppressor_mult=0, weight_decay=1e-4, sharded=False
)
optimizer = build_optimizer(toy, toy_cfg, [torch.nn.Linear(3, 3)])
assert [len(g['params']) for g in optimizer.param_groups] == [4, 2]
assert optimizer.param_groups[1]['lr'] == 1e-4
[(len(g['params']), g['lr']) for g in optimizer.param_groups]


# %% [markdown]
# ## The schedule
#
# The factor $f(t)$ is the product of a linear warm-up and one of three schedules: constant, half a cosine, or
# a tenth at each of the given steps.

# %%
#| export
def lr_factor(
    step: int,  # iteration, from 0
    cfg,  # OptimConfig
) -> float:  # multiplies every group's rate
    "Linear warm-up times schedule: $f(t)$ of @eq-optim-rate"
    warm = min(1.0, (step + 1) / (cfg.warmup + 1))
    if cfg.schedule == 'constant':
        return warm
    if cfg.schedule == 'cosine':
        return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, cfg.iters))))
    return warm * 0.1 ** sum(step >= s for s in cfg.steps)  # 'step'


# %%
cosine = SimpleNamespace(iters=100, schedule='cosine', warmup=9, steps=())
assert lr_factor(0, cosine) == 0.1 and abs(lr_factor(50, cosine) - 0.5) < 1e-9 and lr_factor(100, cosine) == 0
[round(lr_factor(t, cosine), 2) for t in (0, 4, 9, 25, 50, 75, 100)]

# %%
#| label: fig-optim-schedules
#| fig-cap: "The paper trains at a constant rate; short runs end better with a cosine, which lets the averaged weights settle."
#| fig-alt: "Three schedules over a hundred iterations"
fig, ax = plt.subplots(figsize=(4.5, 2.4), dpi=80)
for name, extra in (('constant', {}), ('cosine', {}), ('step', dict(steps=(60, 80)))):
    c = SimpleNamespace(**{'iters': 100, 'schedule': name, 'warmup': 5, 'steps': (), **extra})
    ax.plot([lr_factor(t, c) for t in range(101)], label=name)
ax.set(xlabel='iteration', ylabel='f(t)')
ax.legend()
plt.show()


# %% [markdown]
# ## One gradient for all processes
#
# Each process computes the gradient on its own images, and all take the step with the mean. The gradients are
# exchanged in one message.

# %%
#| export
@torch.no_grad()
def average_gradients(
    params,  # iterable of parameters, any shapes; the same order in every process
):
    "Replace gradients by their mean over all processes, in one message; a missing gradient counts as zero"
    if world_size() == 1:
        return
    params = [p for p in params if p.requires_grad]
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in params])
    dist.all_reduce(flat)
    flat /= world_size()
    for p, g in zip(params, flat.split([p.numel() for p in params])):
        p.grad = g.view_as(p).clone()


@torch.no_grad()
def gradient_norm(
    params,  # iterable of parameters, any shapes
) -> float:  # 0 where nothing has a gradient
    "L2 norm of the gradient over all of the parameters, for the log"
    grads = [p.grad for p in params if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0


# %%
weight = torch.nn.Parameter(torch.zeros(2))
assert gradient_norm([weight]) == 0
weight.grad = torch.tensor([3.0, 4.0])
average_gradients([weight])  # one process: nothing changes
assert gradient_norm([weight]) == 5
weight.grad


# %% [markdown]
# ## A share of the moments
#
# AdamW keeps two moments of each parameter: 8 bytes, twice the weights themselves, and every process keeps the
# same. With `optim.sharded` a process keeps and updates those of its share alone, and then sends the new
# weights of its share to the others (ZeRO, stage 1). Each parameter is updated once, with the same gradient,
# by the same function, so a run has the same numbers with and without it, to the last bit. That is also why
# tensors are not divided, and only handed out: the largest first, each to the process that has least.
#
# PyTorch's `ZeroRedundancyOptimizer` does the same, but collects the moments with messages between all
# processes. When one of them has failed the others could save nothing (@sec-generations). Its messages are one
# for each parameter, or need weights that are views of one buffer, which loses `channels_last`.

# %%
#| export
def shares_of(
    sizes: list,  # numbers of elements of the parameters
    world: int,  # processes
) -> list:  # for each process the positions of its parameters
    "Divide parameters into shares of about the same size"
    shares, filled = [[] for _ in range(world)], [0] * world
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owner = filled.index(min(filled))
        shares[owner].append(i)
        filled[owner] += sizes[i]
    return shares


def shard(
    optimizer,  # without moments; each process has one of the same parameters
):
    "Let each process keep and update its share alone; every process must take each step"
    params = [p for g in optimizer.param_groups for p in g['params']]
    shares = shares_of([p.numel() for p in params], world_size())
    own = set(shares[rank()])

    def hide(*_):
        for i, p in enumerate(params):
            p.grad = p.grad if i in own else None  # AdamW leaves a weight without gradient as it is

    @torch.no_grad()
    def exchange(*_):
        for owner, share in enumerate(shares):
            weights = [params[i] for i in share]
            flat = torch.cat([params[0].new_zeros(0), *(p.flatten() for p in weights)])
            dist.broadcast(flat, owner)
            if owner != rank():
                for p, new in zip(weights, flat.split([p.numel() for p in weights])):
                    p.copy_(new.view_as(p))

    def only_own(_, saved):
        return saved | dict(state={i: moments for i, moments in saved['state'].items() if i in own})

    optimizer.register_step_pre_hook(hide)
    optimizer.register_step_post_hook(exchange)
    optimizer.register_load_state_dict_pre_hook(only_own)


# %%
toy_sizes = [100, 60, 60, 30, 9]
toy_shares = shares_of(toy_sizes, 2)
assert sorted(toy_shares[0] + toy_shares[1]) == [0, 1, 2, 3, 4]
toy_shares, [sum(toy_sizes[i] for i in share) for share in toy_shares]

# %% [markdown]
# ## Summary
#
# - AdamW with one base rate; the backbone's rate is smaller by a factor.
# - Warm-up and schedule multiply the rate of every group by the same factor.
# - All processes use the mean of their gradients; a parameter without gradient counts as zero.
# - With `optim.sharded` each process keeps the moments of its share of the parameters; no number changes.
#
# ## Exercises
#
# 1. Why is the mean over processes not the gradient of the joint loss when each process normalises by its own
#    number of objects?
# 2. What does a cosine schedule do to the exponential moving average of the weights?
