# %% [markdown]
# # A recipe for your GPUs {#sec-recipe}
#
# > Get the settings of the paper's step for another number of GPUs, and their memory, in one command.
#
# *Why.* A preset of the paper is meant for eight processes of five images. On one GPU the same command takes a
# step of 5 images instead of 40, at the same learning rate: users of the published code report several points
# of AP less, or a loss that diverges. `semidetr recipe` says how many images go into a batch, how many batches
# are accumulated, and what follows for rate and iterations.
#
# A *share* is the batch of one published process, $n_l$ labelled and $n_u$ unlabelled images; the published step
# has $P$ shares. On $G$ GPUs each takes $s$ shares per step, as $A$ accumulated batches of $k$ shares:
#
# $$s = k A = \lceil P / G \rceil, \qquad N = G\, k\, A\, (n_l + n_u)$$ {#eq-recipe-step}
#
# $k$ is the largest divisor of $s$ whose memory fits (@eq-ablate-memory), because large batches need fewer
# passes. If $N$ differs from the published $N_0$, the learning rate is multiplied by $f = N / N_0$, and
# iterations, $T_1$ and the steps of the schedule are divided by it: as many images are seen.
#
# An accumulated batch divides its losses by its own objects, and its mixture is fitted to its own costs, unless
# `optim.normalise=step` says that they are those of the whole step (@sec-step-turns). This costs one more forward
# pass of each batch, without gradient.

# %%
#| default_exp lab.recipe

# %%
#| hide
import warnings

warnings.filterwarnings('ignore', message='IProgress')

# %%
#| export
import math
from dataclasses import dataclass
from semidetr.core import ConfigError, suggest
from semidetr.lab.dry_run import memory_estimate
from semidetr.train.config import PRESETS, config_hash, override, preset

# %%
#| hide
import matplotlib.pyplot as plt

# %% [markdown]
# ## Shares, batches, images
#
# The presets of the paper with the number of their processes; others are trained in one process as they are:

# %%
#| export
PROCESSES = {'coco-1': 8, 'coco-5': 8, 'coco-10': 8, 'coco-full': 8, 'voc': 8}  # of the published runs


def shares_per_gpu(
    gpus: int,  # G
    shares: int,  # P, of the whole step
) -> int:  # s
    "Shares of a step that each GPU takes; rounded up, so that none is left (@eq-recipe-step)"
    return max(1, math.ceil(shares / gpus))


def batch_sizes(
    share: int,  # s, of one GPU
) -> list:  # pairs (k shares in a batch, A batches), the largest batch first
    "All ways to take the shares of a GPU in equal batches"
    return [(k, share // k) for k in range(share, 0, -1) if share % k == 0]


# %%
assert [shares_per_gpu(g, 8) for g in (1, 2, 3, 8, 16)] == [8, 4, 3, 1, 1]
assert batch_sizes(8) == [(8, 1), (4, 2), (2, 4), (1, 8)]
batch_sizes(3)


# %% [markdown]
# ## Rate and iterations
#
# With the published number of images nothing changes. With half of them per step, the rate is halved and the
# run has twice as many steps. This linear rule is common for other optimisers and detectors; it was not tested
# here at the paper's scale.

# %%
#| export
def scaled(
    cfg,  # Config of the published step
    factor: float,  # f: images per step over the published number
) -> list:  # settings 'group.field=value' that change; empty for factor 1
    "Learning rate times f; iterations, T1 and steps of the schedule over f"
    if factor == 1:
        return []
    o = cfg.optim
    count = lambda n: max(1, round(n / factor))
    items = [
        f'optim.lr={o.lr * factor:.3g}',
        f'optim.iters={count(o.iters)}',
        f'method.T1={count(cfg.method.T1)}',
    ]
    if o.steps:
        items.append(f'optim.steps=[{",".join(str(count(s)) for s in o.steps)}]')
    return items


# %%
half = scaled(preset('coco-full'), 0.5)
assert half[1:] == ['optim.iters=480000', 'method.T1=240000', 'optim.steps=[240000,320000]']
half


# %% [markdown]
# ## The recipe

# %%
#| export
@dataclass(frozen=True)
class Recipe:
    "The settings of a step on some GPUs"

    preset: str
    gpus: int
    batch: tuple  # (labelled, unlabelled) images of a batch on one GPU
    accumulate: int  # batches per step
    images: int  # per step, on all GPUs
    published: int  # images of the published step
    gigabytes: float  # estimated memory of one GPU, float32
    fits: bool  # into the memory that was given
    items: tuple  # 'group.field=value': what differs from the preset
    cfg: object  # Config with all of it


def _estimate(cfg):
    "GB of one process, as a dry run estimates them (@sec-dry-run)"
    return memory_estimate(cfg) / 1024


# %%
#| export
def _with_batch(cfg, k, accumulate):
    "Settings of a batch of k shares, where they differ from those of the preset"
    n_l, n_u = k * cfg.loader.n_labelled, k * cfg.loader.n_unlabelled
    items = [f'loader.n_labelled={n_l}', f'loader.n_unlabelled={n_u}'] if k > 1 else []
    return items + ([f'optim.accumulate={accumulate}'] if accumulate > 1 else [])


def make_recipe(
    name: str = 'coco-10',  # of a preset of the paper
    gpus: int = 1,  # G
    memory: float = 24.0,  # GB of each
    images: int = 0,  # per step; 0: as published
    settings: tuple = (),  # more settings, 'group.field=value', e.g. smaller views
    estimate=_estimate,  # Config -> GB of one process
) -> Recipe:
    "The largest batch that fits, and what follows from it; if none fits, the smallest one with `fits=False`"
    if name not in PROCESSES:
        why = 'is for one process as it is' if name in PRESETS else 'is unknown'
        cure = suggest(name, PROCESSES)
        raise ConfigError(f"preset '{name}' {why}; recipes are for the presets of the paper ({cure})")
    if gpus < 1 or images < 0 or not 0 < memory < math.inf:
        raise ConfigError(f'{gpus} GPUs of {memory} GB, {images} images: give positive numbers')
    own = {item.partition('=')[0].strip() for item in settings}
    if fixed := own & {'loader.n_labelled', 'loader.n_unlabelled', 'optim.accumulate'}:
        raise ConfigError(
            f'{min(fixed)} follows from the number of GPUs, their memory and the images per step'
        )
    base = override(preset(name), settings)
    each = base.loader.n_labelled + base.loader.n_unlabelled
    published = PROCESSES[name] * each
    share = shares_per_gpu(gpus, math.ceil((images or published) / each))
    total = gpus * share * each
    rates = [item for item in scaled(base, total / published) if item.partition('=')[0] not in own]
    for k, accumulate in batch_sizes(share):
        items = _with_batch(base, k, accumulate) + rates
        cfg = override(base, items)
        gigabytes = estimate(cfg)
        fits = gigabytes <= memory
        if fits:
            break
    batch = cfg.loader.n_labelled, cfg.loader.n_unlabelled
    return Recipe(name, gpus, batch, accumulate, total, published, gigabytes, fits, (*settings, *items), cfg)


# %% [markdown]
# With an invented estimate of 4 GB and 2.5 GB per image, 24 GB hold one share of five images:

# %%
invented = lambda cfg: 4 + 2.5 * (cfg.loader.n_labelled + cfg.loader.n_unlabelled)
toy = make_recipe('coco-10', 1, 24, estimate=invented)
assert (toy.batch, toy.accumulate, toy.images, toy.fits) == ((1, 4), 8, 40, True)
assert make_recipe('coco-10', 2, 60, estimate=invented).batch == (4, 16)
toy.items

# %%
assert not make_recipe('coco-10', 1, 10, estimate=invented).fits
assert make_recipe('coco-10', 8, 24, estimate=invented).items == ()  # the published step
config_hash(make_recipe('coco-10', 8, 24, estimate=invented).cfg)


# %% [markdown]
# ## The command

# %%
#| export
def _plural(n, word, more=None):
    return f'{n} {word if n == 1 else more or word + "s"}'


def recipe_lines(
    r: Recipe,
    memory: float,  # GB of a GPU that were given
) -> list:  # of str
    "What a recipe says, line by line; the last one is the command"
    usual, o = preset(r.preset), r.cfg.optim
    first = (
        f'{PROCESSES[r.preset]} processes, 1 batch of {usual.loader.n_labelled} + {usual.loader.n_unlabelled}'
    )
    batches = _plural(r.accumulate, 'batch', 'batches')
    here = f'{_plural(r.gpus, "process", "processes")}, {batches} of {r.batch[0]} + {r.batch[1]}'
    changed = lambda new, old: f'{new:g}' if new == old else f'{new:g} (published: {old:g})'
    lines = [
        f'published step: {first} images (labelled + unlabelled), {r.published} in all',
        f'this step:      {here} images, {r.images} in all',
        f'learning rate   {changed(o.lr, usual.optim.lr)}',
        f'iterations      {changed(o.iters, usual.optim.iters)}',
        f'T1              {changed(r.cfg.method.T1, usual.method.T1)}',
        f'memory          about {r.gigabytes:.1f} of {memory:g} GB on each GPU (estimated for float32)',
    ]
    if not r.fits:
        lines.append(
            'note: this does not fit; try run.amp=bf16 (the estimate does not know it), or smaller views: '
            'view.max_side=1000 view.short_sides=[480,600]'
        )
    if r.images != r.published:
        lines.append(
            f'note: {r.images} instead of {r.published} images per step: rate and iterations follow the '
            'linear rule, which was not tested at this scale; ema.decay stays, so the teacher averages over '
            'another number of images'
        )
    if r.accumulate > 1:
        lines.append(
            f'note: losses and mining are those of each of the {r.accumulate} batches alone; '
            'optim.normalise=step makes them those of the whole step, for one more forward pass; '
            f'without it, mining.memory={r.accumulate - 1} adds the costs of the batches before'
        )
    start = 'semidetr train' if r.gpus == 1 else 'torchrun --standalone --nproc-per-node '
    start += '' if r.gpus == 1 else f'{r.gpus} -m semidetr.cli train'
    start += f' --preset {r.preset} --data DATA -o runs/{r.preset}'
    return [*lines, ' '.join([start, *r.items])]


# %%
shown = recipe_lines(toy, 24)
assert shown[-1].endswith('optim.accumulate=8')
print('\n'.join(shown))

# %%
#| label: fig-recipe-gpus
#| fig-cap: "Batches that one GPU accumulates per step of 40 images, by number of GPUs and memory, with the invented estimate above."
#| fig-alt: "Three curves for 24, 48 and 96 GB: accumulated batches fall with the number of GPUs"
counts = (1, 2, 4, 8)
fig, ax = plt.subplots(figsize=(4.2, 2.4), dpi=80)
for size in (24, 48, 96):
    needed = [make_recipe('coco-10', g, size, estimate=invented).accumulate for g in counts]
    ax.plot(counts, needed, 'o-', label=f'{size} GB')
ax.set(xlabel='GPUs', ylabel='accumulated batches', xticks=counts)
ax.legend(fontsize=9)
plt.show()

# %% [markdown]
# ## Summary
#
# - Images per step, learning rate and iterations belong together; a recipe keeps the published ones where the
#   number of GPUs divides eight, and says what it changes elsewhere.
# - The largest batch that fits is taken; the rest of the step is accumulated.
# - Memory is an estimate: activations counted on small images and extrapolated, in float32 (@sec-dry-run).
#
# ## Exercises
#
# 1. Which recipe has three GPUs, and why does it have 45 images per step?
# 2. The estimate counts the student alone. What else does a Semi-DETR step keep in memory, and for how long?
