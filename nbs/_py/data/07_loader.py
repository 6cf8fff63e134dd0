# %% [markdown]
# # Batches as a function of the step {#sec-loader}
#
# > Feed a semi-supervised run from any labelled and unlabelled data sets, and resume it exactly.
#
# A loader usually *has a state*: a shuffled list, a position, generators in several worker processes.
# Resuming then means replaying, or accepting other batches than an uninterrupted run would get. Here a batch
# is a pure function of the seed and the step number. The state is one integer; workers may be stopped and
# restarted; and any batch can be made again later, for example the one that produced a NaN.

# %%
#| default_exp data.loader

# %%
#| export
import functools
import itertools
import multiprocessing
import os
import signal
import threading
from dataclasses import dataclass, replace
from functools import lru_cache
import numpy as np
import torch
from torch.utils.data import DataLoader
from semidetr.data.augment import (
    ViewConfig,
    eval_view,
    labelled_view,
    normalize_image,
    strong_view,
    weak_view,
)
from semidetr.boxes import normalize_boxes
from semidetr.core import ConfigError, DataError, SemiDETRError, in_range, one_of, stable_hash
from semidetr.data.photometric import photometric_view
from semidetr.data.repeat import Repeats, labels_of, repeat_factors


# %% [markdown]
# ## The settings

# %%
#| export
@dataclass(frozen=True)
class LoaderConfig:
    "How many images of each kind make one batch on one process"

    n_labelled: int = 1  # paper: 5 images on a GPU, 1 : 4
    n_unlabelled: int = 4  # 0: labelled images alone
    ratio: str = 'binomial'  # 'binomial' (code: the numbers vary around the ratio) or 'fixed'
    num_workers: int = 2  # processes that load images; 0: in the training process
    two_views: bool = False  # labelled images in a weak and a strong view instead of one labelled view
    repeat_threshold: float = 0.0  # t of @eq-repeat-factor: rare classes are drawn more often; 0: never

    def __post_init__(self):
        one_of('loader', self, ratio=('binomial', 'fixed'))
        in_range('loader', self, n_labelled=1, n_unlabelled=0, num_workers=0, repeat_threshold=0)


# %% [markdown]
# ## Which image is draw number $k$?
#
# A pool of $n$ images is traversed in epochs, each with its own permutation $\pi_e$:
#
# $$ \text{image}(k)=\pi_{\lfloor k/n\rfloor}(k \bmod n). $$ {#eq-loader-draw}
#
# Every image is used once before any is used twice, and $k$ may be arbitrarily large: a pool smaller than the
# batch is simply traversed several times.

# %%
#| export
def _random(*parts):
    "NumPy's legacy generator, whose sequence is frozen, seeded by a hash"
    h = stable_hash(*parts)
    return np.random.RandomState([h & 0xFFFFFFFF, h >> 32])


@lru_cache(maxsize=8)
def _permutation(seed, pool, n, epoch):
    return _random(seed, 'order', pool, epoch).permutation(n)


def draw_index(
    seed: int,  # of the run
    pool: str,  # name of the pool: pools are shuffled independently
    n: int,  # its size
    k: int,  # draw number, 0, 1, 2, ...
) -> int:  # in [0, n)
    "The image that draw number `k` takes from a pool (@eq-loader-draw)"
    return int(_permutation(seed, pool, n, k // n)[k % n])


# %%
order = [draw_index(0, 'labelled', 5, k) for k in range(15)]
assert all(sorted(order[e : e + 5]) == [0, 1, 2, 3, 4] for e in (0, 5, 10))
order

# %% [markdown]
# ## How many labelled images are in batch $t$?
#
# `ratio='fixed'` uses the given numbers. `ratio='binomial'` is the published sampler: of $n$ images the
# number of labelled ones is
#
# $$ n_t=\min(\max(b,1),\,n-1),\qquad b\sim\mathrm{Binomial}(n,p),\quad p=\frac{n_{labelled}}{n}. $$ {#eq-loader-binomial}
#
# For $n=5$, $p=0.2$ the mean is $1+0.8^5-0.2^5=1.327$, not 1: the "1 : 4" of the paper is 1.33 : 3.67 in its
# code. The draws before a batch are counted in blocks, so that the pools are traversed without gaps here too
# and a batch needs no history. Batches are counted over steps and processes: two processes draw in one step
# what one process draws in two.

# %%
#| export
_BLOCK = 1024  # batches


@lru_cache(maxsize=4)
def labelled_counts(
    seed: int,  # of the run
    block: int,  # number of a block of 1024 batches, counted over steps and processes
    n: int,  # images per batch
    p: float,  # labelled share
) -> np.ndarray:  # (1024,) int
    "Labelled images in each batch of a block (@eq-loader-binomial)"
    return _random(seed, 'ratio', block).binomial(n, p, _BLOCK).clip(1, n - 1)


@lru_cache(maxsize=None)
def _block_total(*key):
    return int(labelled_counts(*key).sum())


def plan_draws(
    t: int,  # step
    n_labelled: int,  # labelled images per batch and process
    n_unlabelled: int,  # unlabelled images per batch and process
    ratio: str = 'fixed',  # or 'binomial'
    seed: int = 0,  # of the run
    rank: int = 0,  # number of this process
    world: int = 1,  # processes
):  # (range of labelled draw numbers, range of unlabelled draw numbers)
    "The draws of one process at one step: disjoint over steps and processes, without gaps"
    n, turn = n_labelled + n_unlabelled, t * world + rank
    if ratio == 'fixed' or n_unlabelled == 0:
        first, count = turn * n_labelled, n_labelled
    else:
        block, row = divmod(turn, _BLOCK)
        key = n, n_labelled / n
        counts = labelled_counts(seed, block, *key)
        first = sum(_block_total(seed, b, *key) for b in range(block)) + int(counts[:row].sum())
        count = int(counts[row])
    rest = turn * n - first
    return range(first, first + count), range(rest, rest + n - count)


# %%
sampled = np.concatenate([labelled_counts(0, b, 5, 0.2) for b in range(40)])
assert abs(sampled.mean() - 1.32736) < 0.02 and sampled.min() == 1 and sampled.max() == 4
print(f'mean number of labelled images per batch: {sampled.mean():.3f}')
[plan_draws(t, 1, 4, 'binomial') for t in range(3)]


# %% [markdown]
# ## Stacking views
#
# Images of a batch differ in size; they are padded with zeros at the right and bottom, and a mask marks the
# padding. `multiple` rounds the padded size up, so that fewer different shapes occur. Targets keep what is
# needed to map back: matrix, sizes, image id.
#
# An unlabelled image must not carry its ground truth, even if its file has annotations. So for weak and
# strong views the keys `boxes` and `labels` *do not exist*: code that tries to read them fails at once.

# %%
#| export
def _stack(views, multiple):
    "Images of several sizes in one tensor, zeros at the right and bottom"
    h, w = (-(-max(v.size[k] for v in views) // multiple) * multiple for k in (0, 1))
    out = views[0].image.new_zeros((len(views), 3, h, w))
    for o, v in zip(out, views):
        o[:, : v.size[0], : v.size[1]] = v.image
    return out


def _target(view, truth):
    "What a batch holds of a view besides its pixels"
    place = dict(image_id=view.image_id, orig_size=view.orig_size, size=view.size, matrix=view.matrix)
    if not truth:
        return place
    return dict(labels=view.labels, boxes=normalize_boxes(view.boxes, view.size), **place)


def _finish(images, targets, cfg=None):
    "Add the mask; normalise 8-bit images if a `ViewConfig` is given"
    mask = torch.ones((len(images), *images.shape[-2:]), dtype=torch.bool)
    if cfg is not None:
        images = normalize_image(images, cfg)
    for m, x, t in zip(mask, images, targets):
        h, w = t['size']
        m[:h, :w] = False
        if cfg is not None:
            x[:, h:], x[:, :, w:] = 0, 0
    return dict(images=images, mask=mask, targets=targets)


def collate(
    views,  # list of `View`
    multiple: int = 1,  # the padded size is a multiple of this
    truth: bool = True,  # include boxes and labels
) -> dict:  # images (B,3,H,W), mask (B,H,W) True = padding, targets: list of dict
    "Views to one part of a batch"
    if not views:
        raise DataError('a batch needs at least one view')
    return _finish(_stack(views, multiple), [_target(v, truth) for v in views])


# %%
#| hide
from semidetr.data.augment import View


# %%
def plain_view(h, w, boxes=()):
    image, labels = torch.ones(3, h, w), torch.zeros(len(boxes), dtype=torch.long)
    return View(image, torch.tensor(boxes).reshape(-1, 4), labels, torch.eye(3).double(), (h, w), 0, (h, w))


part = collate([plain_view(4, 6, [[0.0, 0, 3, 4]]), plain_view(5, 2)], multiple=4)
assert part['images'].shape == (2, 3, 8, 8) and (~part['mask']).sum((1, 2)).tolist() == [24, 10]
assert part['targets'][0]['boxes'].tolist() == [[0.25, 0.5, 0.5, 1.0]]  # by the size without padding
assert part['targets'][1]['boxes'].shape == (0, 4)
assert 'boxes' not in collate([plain_view(4, 6)], truth=False)['targets'][0]
{k: v for k, v in part['targets'][0].items() if k != 'matrix'}


# %% [markdown]
# ## Between processes
#
# Workers send 8-bit images, a quarter of the bytes, and the training process normalises them: that costs no
# more than mapping four times as much shared memory. Small tensors are sent as arrays inside the message, not
# as one shared file each. An error that a user can fix (a `DataError` with file, image and cure) is returned
# as a value and raised in the training process, without the traceback of a worker.
#
# Ctrl-C and SIGTERM often go to a whole process group: a terminal, `timeout` and schedulers do so. They are
# meant for the training process, which finishes its step and needs its workers for that. So workers are born
# with both signals blocked; they end when the training process asks them to, and within a second of its death.

# %%
#| export
def _to(x, kind):
    "Tensors to arrays or back, in the targets of a part"
    return [{k: kind(v) if isinstance(v, (torch.Tensor, np.ndarray)) else v for k, v in t.items()} for t in x]


class _Work:
    "Map-style data set over batch numbers: what a worker does"

    def __init__(self, make):
        self.make = make  # batch number -> {part name: (views, multiple, truth)}

    def __getitem__(self, t):
        out = {}
        try:
            for name, (views, multiple, truth) in self.make(t).items():
                targets = [_target(v, truth) for v in views]
                out[name] = _stack(views, multiple), _to(targets, torch.Tensor.numpy)
        except SemiDETRError as e:
            return type(e)(str(e))
        return out


def _receive(payload, cfg):
    "The batch that a worker sent; its error is raised here"
    if isinstance(payload, Exception):
        raise payload
    out = {}
    for name, (images, targets) in payload.items():
        out[name] = _finish(images, _to(targets, torch.from_numpy), cfg)
    return out


def _as_is(x):
    return x  # otherwise the DataLoader makes a shared tensor of every small array


_STOP = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def _end_with(parent):
    "End this worker when the training process has ended or sends it a signal; signals of others are ignored"
    while os.getppid() == parent:
        info = signal.sigtimedwait(_STOP, 1.0)
        if info is not None and info.si_pid == parent:
            break
    os._exit(0)


def _worker_start(parent, _):
    "Without `sigtimedwait` (macOS) a worker ignores Ctrl-C alone"
    if hasattr(signal, 'sigtimedwait'):
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP)


def _workers(work, steps, num_workers, persistent):
    "A DataLoader over batch numbers that draws nothing from the global generators"
    method = 'fork' if 'fork' in multiprocessing.get_all_start_methods() else 'spawn'
    return DataLoader(
        work,
        batch_size=None,
        sampler=steps,
        collate_fn=_as_is,
        num_workers=num_workers,
        persistent_workers=persistent,
        prefetch_factor=2,
        worker_init_fn=functools.partial(_worker_start, os.getpid()),
        generator=torch.Generator().manual_seed(0),
        multiprocessing_context=method,
    )


# %%
#| export
def _begin(loader):
    """Iterator of a DataLoader whose workers are born with blocked signals.

    PyTorch's handler would raise the error of a dead worker anywhere, in the middle of an update too. It is
    undone: `_next` notices a dead worker within 5 seconds.
    """
    blocked, handler = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP), signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)


class WorkerLost(SemiDETRError):
    "A worker process has died"


def _next(it):
    "Next payload; the error of a dead worker names a cure"
    try:
        return next(it)
    except (RuntimeError, ConnectionError) as e:  # the latter while a batch is received
        if isinstance(e, RuntimeError) and ('DataLoader worker' not in str(e) or 'Traceback' in str(e)):
            raise
        raise WorkerLost(
            f'{str(e).splitlines()[0].rstrip(".")}; if nobody ended it, memory or shared memory ran out: '
            'free some, or use loader.num_workers=0'
        ) from None


# %%
def dying(error):
    yield 'a payload'
    raise error


said = []
for death in (
    RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed.'),
    ConnectionResetError(104, 'Connection reset by peer'),
):
    payloads = dying(death)
    assert _next(payloads) == 'a payload'
    try:
        _next(payloads)
    except WorkerLost as e:
        said.append(str(e))
assert len(said) == 2
said


# %% [markdown]
# ## The semi-supervised loader
#
# Each unlabelled image is decoded once and used twice, in `batch['weak']` and `batch['strong']`, in the same
# order. View seeds are hashes of the draw number, so an image gets other augmentations each time it is drawn.
#
# **Paper vs. code.** The published sampler keeps wide and tall images in separate batches to save padding,
# and drops images below 32 pixels. Here batches mix orientations, and small images are enlarged by the resize
# rule (@sec-augment). Labelled images without any box are left out in both, unless `keep_empty` says that all
# images are to be drawn: a run has chosen them before (@sec-run-data).
#
# With `two_views` the labelled part holds $2n$ views of $n$ images,
#
# $$ (x^w_1,\dots,x^w_n,\;x^s_1,\dots,x^s_n), $$ {#eq-loader-two-views}
#
# weak and strong as those of unlabelled images, all with boxes. RT-DETR-SSOD trains so. Without it the student
# knows strong views only with pseudo labels as targets, and errors of the teacher and errors caused by the
# view cannot be told apart. Both views draw sizes of their own, and the step costs $n$ more images.

# %%
#| export
def _with_boxes(ds):
    "Positions of images that have a box to learn from"
    return [i for i in range(len(ds)) if not all(ds.annotation(i)['ignore'])]


def _without_truth(sample):
    "A sample without its annotations"
    return replace(sample, boxes=sample.boxes[:0], labels=sample.labels[:0], ignore=sample.ignore[:0])


# %%
#| export
class _Batches:
    "Batch number -> views; everything that a worker needs, and picklable"

    def __init__(self, labelled, unlabelled, kept, plan, view, seed, two_views=False, repeats=None):
        self.labelled, self.unlabelled, self.kept = labelled, unlabelled, kept
        self.plan, self.view, self.seed = plan, view, seed
        self.two_views, self.repeats = two_views, repeats

    def _labelled(self, k):
        "Position of labelled draw number `k`"
        if self.repeats is None:
            return self.kept[draw_index(self.seed, 'labelled', len(self.kept), k)]
        epoch, start, positions = self.repeats.epoch_of(k)
        order = _permutation(self.seed, 'labelled', len(positions), epoch)
        return self.kept[positions[order[k - start]]]

    def draws(self, t):
        "(draw number, position in the data set) of both pools"
        first, second = plan_draws(t, **self.plan)
        return (
            [(k, self._labelled(k)) for k in first],
            [(k, draw_index(self.seed, 'unlabelled', len(self.unlabelled), k)) for k in second],
        )

    def _views(self, kind, make, samples):
        "Views of one kind, seeded by (seed, kind, draw number)"
        return [make(s, self.view, stable_hash(self.seed, kind, k), raw=True) for k, s in samples]

    def _strong_views(self, kind, samples, weak):
        "Strong views with operations of their own, or made of the weak ones (@sec-photometric)"
        if self.view.strong == 'geometric':
            return self._views(kind, strong_view, samples)
        return [photometric_view(v, stable_hash(self.seed, kind, k)) for v, (k, _) in zip(weak, samples)]

    def _labelled_views(self, draws):
        "One view of each labelled image, or all weak views and then all strong ones"
        samples = ((k, self.labelled[i]) for k, i in draws)  # decoded one at a time
        if not self.two_views:
            return self._views('labelled', labelled_view, samples)
        samples = list(samples)  # decoded once for both
        weak = self._views('labelled weak', weak_view, samples)
        return weak + self._strong_views('labelled strong', samples, weak)

    def __call__(self, t):
        first, second = self.draws(t)
        multiple = self.view.pad_multiple
        out = dict(labelled=(self._labelled_views(first), multiple, True))
        if second:
            samples = [(k, _without_truth(self.unlabelled[i])) for k, i in second]  # decoded once for both
            weak = self._views('weak', weak_view, samples)
            out['weak'] = weak, multiple, False
            out['strong'] = self._strong_views('strong', samples, weak), multiple, False
        return out


# %%
#| export
class _Steps:
    "Step numbers, beginning with a loader's current step"

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return itertools.count(self.loader.step)


# %%
#| export
class _Stream:
    "Batches of consecutive steps, made here or by workers; the only state is the number of the next step"

    def __init__(self, make, view, num_workers, start):
        self._make, self.view, self.num_workers, self.step = make, view, num_workers, start
        self._loader = self._iter = None

    def batch(self, t: int) -> dict:
        "Make batch `t` in this process; the state does not change"
        return _receive(_Work(self._make)[t], self.view)

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        if self.num_workers == 0:
            out = self.batch(self.step)
        else:
            if self._loader is None:
                self._loader = _workers(_Work(self._make), _Steps(self), self.num_workers, True)
            if self._iter is None:
                self._iter = _begin(self._loader)
            try:
                out = _receive(_next(self._iter), self.view)
            except BaseException:
                self.close()
                raise
        self.step += 1
        return out

    def state_dict(self) -> dict:
        "The step whose batch comes next"
        return dict(step=self.step)

    def load_state_dict(self, state: dict):
        "Continue with the batch of the step in `state`"
        self.step, self._iter = int(state['step']), None

    def close(self):
        "Stop the workers; the next batch starts them again"
        self._iter = self._loader = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


# %%
#| export
def _check(labelled, unlabelled, n_labelled, n_unlabelled, ratio, num_workers):
    if ratio not in ('fixed', 'binomial'):
        raise ConfigError(f"ratio '{ratio}' is unknown; known: binomial, fixed")
    if n_labelled < 1 or n_unlabelled < 0:
        raise ConfigError(
            'a batch needs at least one labelled image and no negative number '
            f'(n_labelled={n_labelled}, n_unlabelled={n_unlabelled})'
        )
    if num_workers < 0:
        raise ConfigError(f'num_workers={num_workers} is negative')
    if not len(labelled):
        raise DataError(f'{labelled.name}: the labelled data set is empty')
    if n_unlabelled and (unlabelled is None or not len(unlabelled)):
        raise DataError(
            f'n_unlabelled={n_unlabelled}, but there are no unlabelled images; '
            'give some, or set n_unlabelled=0'
        )


class SemiLoader(_Stream):
    "Endless batches of labelled and unlabelled images; batch `t` is a pure function of `(seed, t)`"

    def __init__(
        self,
        labelled,  # data set with boxes
        unlabelled=None,  # any data set; if it has boxes, they are not passed on
        n_labelled: int = 4,  # labelled images per batch, in this process
        n_unlabelled: int = 0,  # unlabelled images per batch, in this process
        view: ViewConfig = ViewConfig(),  # sizes and strengths of the views
        seed: int = 0,  # of draws and views
        ratio: str = 'fixed',  # or 'binomial': the published sampler
        num_workers: int = 2,  # processes; 0: in the training process
        rank: int = 0,  # number of this process among those that train together
        world: int = 1,  # how many train together
        start: int = 0,  # first step
        keep_empty: bool = False,  # also draw labelled images without a box
        two_views: bool = False,  # labelled images in a weak and a strong view: twice `n_labelled` images
        repeat_threshold: float = 0.0,  # t of @eq-repeat-factor; 0: each image once per epoch
    ):
        _check(labelled, unlabelled, n_labelled, n_unlabelled, ratio, num_workers)
        kept = list(range(len(labelled))) if keep_empty else _with_boxes(labelled)
        if not kept:
            raise DataError(
                f'{labelled.name}: no labelled image has a box; check the annotations with `semidetr doctor`'
            )
        plan = dict(
            n_labelled=n_labelled, n_unlabelled=n_unlabelled, ratio=ratio, seed=seed, rank=rank, world=world
        )
        repeats = None
        if repeat_threshold:
            repeats = Repeats(repeat_factors(labels_of(labelled, kept), repeat_threshold), seed)
        make = _Batches(labelled, unlabelled, kept, plan, view, seed, two_views, repeats)
        super().__init__(make, view, num_workers, start)

    def draws(self, t: int):
        "(draw number, position in the data set) of step `t`, for the labelled and the unlabelled pool"
        return self._make.draws(t)


# %%
#| export
class EvalLoader:
    "One pass over a data set in order, without augmentation; yields parts as `collate` makes them"

    def __init__(
        self,
        ds,  # data set; if it has boxes, the targets have them too
        view: ViewConfig = ViewConfig(),  # only the evaluation size is used
        batch_size: int = 8,  # images per batch
        num_workers: int = 0,  # processes; 0: in this one
        rank: int = 0,  # this process takes image `rank` and then every `world`-th
        world: int = 1,  # processes that share the data set
    ):
        if batch_size < 1:
            raise ConfigError(f'batch_size={batch_size} is below 1')
        self.ds, self.view, self.batch_size, self.num_workers = ds, view, batch_size, num_workers
        self.indices = range(rank, len(ds), world)

    def __len__(self):
        return -(-len(self.indices) // self.batch_size)

    def _views(self, t):
        "Views of batch `t`"
        chosen = self.indices[t * self.batch_size : (t + 1) * self.batch_size]
        views = [eval_view(self.ds[i], self.view, raw=True) for i in chosen]
        return dict(part=(views, self.view.pad_multiple, getattr(self.ds, 'has_boxes', True)))

    def __iter__(self):
        work, steps = _Work(self._views), range(len(self))
        if self.num_workers and len(self):
            payloads = _begin(_workers(work, steps, self.num_workers, False))
        else:
            payloads = map(work.__getitem__, steps)
        for _ in steps:
            yield _receive(_next(payloads), self.view)['part']


# %% [markdown]
# ## Stop and resume
#
# Batches of the digits scenes. A loader is stopped after three batches; another one that is given only the
# step number continues with the same images.

# %%
#| hide
from semidetr.data.augment import scaled_views
from semidetr.data.digits import DigitsScenes

# %%
digits = DigitsScenes('train', n=200, size=96)
sizes = scaled_views(96, smallest=0.6, mean=(0.5,) * 3, std=(0.5,) * 3)
first = SemiLoader(digits, digits, 2, 4, sizes, num_workers=0)
whole = list(itertools.islice(first, 5))
second = SemiLoader(digits, digits, 2, 4, sizes, num_workers=0)
second.load_state_dict({'step': 3})
resumed = next(second)
assert torch.equal(resumed['strong']['images'], whole[3]['strong']['images'])
assert second.state_dict() == {'step': 4} and 'boxes' not in resumed['weak']['targets'][0]
{k: tuple(p['images'].shape) for k, p in resumed.items()}, second.draws(3)

# %%
#| hide
import matplotlib.pyplot as plt
from semidetr.boxes import denormalize_boxes
from semidetr.draw import draw_boxes, show_image, to_pil

# %%
#| label: fig-loader-batch
#| fig-cap: "Images of different sizes share one tensor; padding (blue) is at the right and bottom only, and the mask marks it. Row 1: labelled images with their boxes; row 2: weak views; row 3: strong views of the same images, in the same order, without boxes."
#| fig-alt: "Three rows of digit scenes with blue padding at the right and bottom edges; only the first row has green boxes."

fig, axes = plt.subplots(3, 4, figsize=(4.4, 3.4), dpi=80)
for ax in axes.flat:
    ax.axis('off')
for row, (kind, p) in zip(axes, whole[1].items()):
    for ax, x, m, t in zip(row, p['images'], p['mask'], p['targets']):
        pixels = np.array(to_pil(x, sizes.mean, sizes.std))
        pixels[m.numpy()] = 31, 119, 180
        show_image(ax, pixels)
        if 'boxes' in t:
            draw_boxes(ax, denormalize_boxes(t['boxes'], t['size']))
    row[0].set_title(kind, fontsize=9, loc='left')
plt.tight_layout(pad=0.3)
plt.show()

# %% [markdown]
# Labelled images in two views: row 2 has the same images as row 1, each with its boxes.

# %%
#| label: fig-loader-two-views
#| fig-cap: "With two views each labelled image is learnt from twice in a step; the boxes follow the geometry of each view, and a box that leaves the strong view is dropped."
#| fig-alt: "Two rows of the same four scenes; the lower row is shifted, rotated or sheared and has erased patches; green boxes on the digits in both rows."
twice = SemiLoader(digits, None, 4, 0, sizes, num_workers=0, two_views=True).batch(0)['labelled']
names = [t['image_id'] for t in twice['targets']]
assert len(names) == 8 and names[:4] == names[4:]
fig, axes = plt.subplots(2, 4, figsize=(4.4, 2.3), dpi=80)
for ax, x, t in zip(axes.flat, twice['images'], twice['targets']):
    h, w = t['size']
    show_image(ax, to_pil(x[:, :h, :w], sizes.mean, sizes.std))
    draw_boxes(ax, denormalize_boxes(t['boxes'], t['size']))
axes[0, 0].set_title('weak', fontsize=9, loc='left')
axes[1, 0].set_title('strong', fontsize=9, loc='left')
plt.tight_layout(pad=0.3)
plt.show()


# %% [markdown]
# Worker processes change only the speed, and an unreadable image reaches the training process as an error of
# one line.

# %%
class OneBad(DigitsScenes):
    "Digits with one file that cannot be read"

    def __getitem__(self, i):
        if i == 4:
            raise DataError('scenes/0004.png: image 4 cannot be read; restore the file or delete its entry')
        return super().__getitem__(i)


with SemiLoader(OneBad('train', n=6, size=96), None, 2, 0, sizes, num_workers=1) as broken:
    try:
        list(itertools.islice(broken, 10))
    except DataError as e:
        line = str(e)
assert '\n' not in line
line

# %% [markdown]
# ## Summary
#
# * Batch $t$ is a pure function of seed and $t$: the state is one integer, and `loader.batch(t)` makes any
#   batch again.
# * Draw numbers cover the pools over steps and processes without gap or overlap: within an epoch of a pool no
#   image is drawn twice by any process.
# * `ratio='binomial'` is the published sampler, with 1.327 labelled images where the paper says 1; `fixed`
#   uses the given numbers.
# * The annotations of unlabelled images are removed before the views are made, and their keys do not exist in
#   the targets.
# * `two_views` gives the student each labelled image weak and strong; `repeat_threshold` draws images of rare
#   classes more often (@sec-repeat). Both are off by default.
# * Workers send bytes, not floats; their errors are raised in the training process.
#
# ## Exercises
#
# 1. With 12 labelled images and 4 per batch, how often is each image drawn in 1000 steps? And with 12,000?
# 2. Two ranks, `binomial`: may they have different numbers of labelled images in the same step? What does
#    that require of a loss that is averaged over ranks?
# 3. Show that the mean of @eq-loader-binomial is $np+(1-p)^n-p^n$.
