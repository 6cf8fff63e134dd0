# %% [markdown]
# # One process or many {#sec-many}
#
# > Train on one process or on many with the same numbers: shared counts, statistics and random draws.
#
# *Why.* A run on two GPUs with four images each should be the run on one GPU with eight. Gradients are averaged
# over the processes (@sec-optim), so all that is left is what a process computes from *its* images alone:
# a number of objects to divide by, the mean of a batch norm, the largest number of boxes, random draws, a line
# of the log. Each of these makes the split of the batch part of the result. A study on one GPU then says
# little about a run on eight, and a run that is continued on other hardware becomes another run.
#
# With $W$ processes and the sum $s_w$ of the losses on process $w$, averaged gradients minimise
#
# $$
# \frac{1}{W}\sum_{w=1}^{W}\frac{s_w}{z_w},\qquad
# z_w=\max\Big(\frac{1}{W},\;\frac{1}{W}\sum_{v=1}^{W} n_v\Big)
# \quad\Longrightarrow\quad \frac{\sum_w s_w}{\max(1,\sum_v n_v)},
# $$ {#eq-many-normaliser}
#
# the loss of one process that has all images, if every process divides by the same $z$, the *mean* of the counts
# $n_v$. The published code divides some losses by the count of each process, $z_w=\max(1, n_w)$. An object
# then weighs more where there are few of them.
#
# | quantity | over all processes | switch to each process alone |
# |---|---|---|
# | boxes, and positives of one-to-many matching | sum of weights, by @eq-many-normaliser | none: the published code does the same, but with at least 1 instead of $1/W$ |
# | class losses of one-to-one matching, also of denoising and of detectors with softmax (@sec-losses) | sum of weights | `criterion.normalise=process` |
# | losses of a learned suppressor (@sec-rescoring) | objects, or scores that are kept | the same: at least 1 instead of $1/W$ |
# | consistency (@sec-consistency) | boxes, weights, largest number of boxes | `consistency.normalise=process` |
# | batch norms of the projector | mean, variance, running averages | the same |
# | costs of the mixture, scores for class thresholds (@sec-mining) | all | none |
# | noise and groups of denoising queries (@sec-denoising) | the first process draws for all images | none |
# | views of an image (@sec-loader) | seeded by the number of its draw, whoever draws it | none |
# | gradient norms, clipping, lines of the log, the health monitor | average gradient, means | none |
#
# Batches that are accumulated into a step are as processes to each other if `optim.normalise=step`
# (@sec-step-turns). Then $W$ is the number of batches of all processes.
#
# What still depends on the split: dropout; the size to which images of one batch are padded, which a
# convolution feels near the border of a smaller image; `loader.ratio=binomial`, where each *process* draws how
# many of its images are labelled; earlier views and mosaics (@sec-mixing), which each process has for itself;
# the batch norms of a backbone that is not frozen; and ratios in the log, such as the mean score of pseudo
# labels, which are means of the ratios of the processes. The tests compare one process with two for every
# method in both stages, and one batch with two that take turns: losses and gradients agree to rounding (in
# float64 to $10^{-14}$). Over many iterations the rounding of float32 grows, as between two machines.

# %%
#| default_exp many

# %%
#| export
from contextlib import contextmanager
import torch
import torch.distributed as dist
from torch import Tensor, nn
from semidetr.core import all_gather_cat, all_reduce_mean, is_main, rank, world_size

# %%
#| hide
import matplotlib.pyplot as plt

# %% [markdown]
# ## Counts
#
# `normaliser` is $z$ of @eq-many-normaliser for both readings. Where a decoder gets queries in padded slots, the
# largest number of boxes of an image decides how many slots there are, and empty slots take part in
# attention. So that number is one of all images, too, and a process needs to know how many images stand before
# its own.

# %%
#| export
OVER = ('all', 'process')  # what a batch is: the images of all processes, or those of each alone


def together(
    over: str,  # 'all' or 'process'
) -> bool:
    "Is there anything to share with other processes?"
    return over == 'all' and world_size() > 1


def normaliser(
    count: Tensor,  # (...) number of objects, or sum of weights, on this process
    over: str = 'all',  # 'process' only changes the smallest value, from one object in all to one each
) -> Tensor:  # (...) mean over the processes, detached
    "What sums of losses are divided by (@eq-many-normaliser); every process must call it"
    return all_reduce_mean(count).clamp(min=1 / world_size() if over == 'all' else 1)


def total_of_all(
    n: int,  # of this process
    device='cpu',  # of the run
) -> int:
    "Sum over the processes; every process must call it"
    if world_size() == 1:
        return n
    total = torch.tensor([n], device=device)
    dist.all_reduce(total)
    return int(total)


def counts_of_all(
    counts: list,  # numbers, one for each image of this process
    over: str = 'all',  # 'process': those of this process only
    device='cpu',  # of the run
) -> tuple:  # (numbers of all images in the order of the ranks, slice of the own ones)
    "Numbers for the images of all processes; every process must call it"
    if not together(over):
        return list(counts), slice(0, len(counts))
    rows = torch.tensor([(rank(), c) for c in counts], device=device).reshape(-1, 2)
    rows = all_gather_cat(rows).tolist()
    first = sum(r < rank() for r, _ in rows)
    return [c for _, c in rows], slice(first, first + len(counts))


# %% [markdown]
# In one process each of them returns what it got, and nothing is below 1:

# %%
assert normaliser(torch.tensor([0.0, 3.0])).tolist() == [1, 3]
assert counts_of_all([2, 0, 5]) == ([2, 0, 5], slice(0, 3)) and total_of_all(7) == 7
assert not together('all')
normaliser(torch.tensor([0.0, 3.0]))

# %% [markdown]
# What the reading is worth, by hand: one process holds 1 object, the other 9. With counts of its own each object
# of the first process weighs $1/2\cdot 1/1$ after averaging, those of the second $1/2\cdot 1/9$. With the mean, 5,
# all weigh $1/10$, as in one process.

# %%
objects = torch.tensor([1.0, 9.0])
alone = 1 / objects / 2
shared = 1 / objects.mean().expand(2) / 2
assert torch.allclose(shared, torch.tensor([0.1, 0.1])) and torch.allclose(
    alone, torch.tensor([1 / 2, 1 / 18])
)
alone, shared

# %%
#| label: fig-many-weights
#| fig-cap: "Eight processes of five images: divided by its own count, an object weighs up to several times as much on one process as on another; divided by the mean, all weigh the same."
#| fig-alt: "Bars of the weight of one object on each of eight processes, uneven; a horizontal line shows the common weight"
toy = torch.Generator().manual_seed(0)
per_image = torch.randint(0, 9, (8, 5), generator=toy).float()
per_process = per_image.sum(1)
fig, ax = plt.subplots(figsize=(5, 2.4), dpi=80)
ax.bar(range(8), 100 / per_process / 8, color='#1f77b4', label='process')
ax.axhline(100 / per_process.sum(), color='#ff7f0e', label='all')
ax.set(xlabel='process', ylabel='weight of an object (%)')
ax.legend()
plt.show()


# %% [markdown]
# ## Random draws
#
# The noise of a denoising query has to be the same, whichever process holds its image. The first process lends
# its generator: all draw from it the numbers for the images of *all* processes, in the order of the ranks, and
# keep the rows of their own. Its generator goes on where this ends, so that it stays in the state that a single
# process would have. Draws that need not agree, such as dropout, use each process's own generator.

# %%
#| export
def _global_generator(device):
    "The generator that torch draws from if none is given"
    device = torch.device(device)
    if device.type != 'cuda':
        return torch.default_generator
    return torch.cuda.default_generators[
        torch.cuda.current_device() if device.index is None else device.index
    ]


def on_same_gpu(
    work,  # function without argument
):  # such a function
    "For another thread, which would begin with the first GPU"
    if not torch.cuda.is_initialized():
        return work
    gpu = torch.cuda.current_device()

    def there():
        torch.cuda.set_device(gpu)
        return work()

    return there


@contextmanager
def common_stream(
    device,  # where numbers are drawn
    generator: torch.Generator = None,  # None: torch's global one
    over: str = 'all',  # 'process': each draws from its own
):  # context: a generator to draw the numbers of all images from, or None for torch's global one
    "The random stream of the first process, for all: each must draw the same numbers from it"
    if not together(over):
        yield generator
        return
    lent = _global_generator(device) if generator is None else generator
    state = lent.get_state().to(device)
    dist.broadcast(state, 0)
    common = torch.Generator(device)
    common.set_state(state.cpu())
    yield common
    if is_main() or generator is not None:
        lent.set_state(common.get_state())


# %%
with common_stream('cpu', torch.Generator().manual_seed(3)) as stream:
    drawn = torch.rand(4, generator=stream)
assert torch.equal(drawn, torch.rand(4, generator=torch.Generator().manual_seed(3)))
drawn


# %% [markdown]
# ## Batch norm
#
# $$
# \mu=\frac{1}{n}\sum_w\sum_i x_{wi},\qquad \sigma^2=\frac{1}{n}\sum_w\sum_i (x_{wi}-\mu)^2
# $$ {#eq-many-norm}
#
# with $n$ rows in all. Both sums are differentiable: the gradient of a sum over processes is the sum of the
# gradients over processes. A process without a row takes part; it has no output, but the others wait for it.
# Of batches that take turns the backward pass has one at a time, and takes its gradient for that of each.

# %%
#| export
class _SumOfAll(torch.autograd.Function):
    "Sum over the processes, there and back"

    @staticmethod
    def forward(ctx, x):
        ctx.world, x = world_size(), x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, g):
        here, g = world_size(), g.clone()
        if here > 1:
            dist.all_reduce(g)
        return g * (ctx.world / here)  # batches that take turns are not there: each stands for all


def sum_of_all(
    x: Tensor,  # any shape, the same on every process
) -> Tensor:  # sum over the processes
    "A sum whose gradient reaches every process; each must call it, and run backward through it"
    return x if world_size() == 1 else _SumOfAll.apply(x)


def synced_norm(
    bn: nn.modules.batchnorm._BatchNorm,  # with weight and bias; its running averages are updated
    x: Tensor,  # (N,C,...) rows of this process; N may be 0
) -> Tensor:  # (N,C,...)
    "Batch norm in training with the statistics of the rows of all processes (@eq-many-norm)"
    over, shape = [0, *range(2, x.ndim)], [1, -1] + [1] * (x.ndim - 2)
    n = total_of_all(x.numel() // x.shape[1], x.device)
    mean = sum_of_all(x.sum(over)) / n
    centred = x - mean.view(shape)
    var = sum_of_all(centred.square().sum(over)) / n
    with torch.no_grad():
        bn.running_mean.lerp_(mean, bn.momentum)
        bn.running_var.lerp_(var * n / max(1, n - 1), bn.momentum)
        bn.num_batches_tracked += 1
    scale = (var + bn.eps).rsqrt() * bn.weight
    return centred * scale.view(shape) + bn.bias.view(shape)


# %% [markdown]
# It agrees with torch's own on one process:

# %%
norm, same = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
rows = torch.randn(4, 3, 2, 2, generator=toy)
assert torch.allclose(synced_norm(norm, rows), same(rows), atol=1e-6)
assert torch.allclose(norm.running_var, same.running_var) and norm.num_batches_tracked == 1
norm.running_var


# %% [markdown]
# ## Plain values
#
# Lines of the log are means over iterations *and* processes: the rows of all go into one list.

# %%
#| export
def rows_of_all(
    rows: list,  # plain values of this process
) -> list:  # those of all processes, in the order of the ranks
    "One list of what all processes have; every process must call it"
    if world_size() == 1:
        return rows
    parts = [None] * world_size()
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


# %%
assert rows_of_all([dict(loss=2.0)]) == [dict(loss=2.0)]
rows_of_all([dict(loss=2.0)])

# %% [markdown]
# ## Summary
#
# * Gradients are averaged, so sums of losses are divided by the mean of the counts.
# * Slots, noise and batch norms are those of all images; the first process lends its random stream.
# * `criterion.normalise=process` and `consistency.normalise=process` bring back the published reading. On one
#   process both readings are the same.
# * A function here is called by every process or by none.
#
# ## Exercises
#
# 1. Two processes hold one object in all. What does each divide by, with at least 1 and with at least $1/W$?
# 2. Why does each process draw the noise of the whole batch, although it keeps only a part?
# 3. Why is the variance computed in a second pass, and not from the sum of squares?
