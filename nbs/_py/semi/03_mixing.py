# %% [markdown]
# # Mixed views {#sec-mixing}
#
# > Blend strong views with earlier ones, put four of them into one image, and keep their pseudo labels.
#
# A pseudo label is missing where the teacher is unsure, and then the student is taught that the object is
# background. MixPL (Chen et al. 2023) mixes strong views with earlier ones. In a blended image half of the
# signal contradicts such a target, so the network cannot follow it with certainty; in a mosaic all objects are
# small, as are most that the teacher misses. Both are made from a cache of the last strong views and of the
# teacher's boxes in them. Everything here is off by default (`mixing.mixup=0`, `mixing.mosaic=0`). Supervised
# training can mix its labelled images in the same way, as a control.

# %%
#| default_exp semi.mixing

# %%
#| export
import random
from dataclasses import dataclass
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F
from semidetr.boxes import denormalize_boxes, normalize_boxes, transform_boxes
from semidetr.core import ConfigError, all_reduce_mean, in_range, one_of, rank, stable_hash
from semidetr.data.augment import View, ViewConfig, image_bytes, normalize_image
from semidetr.data.loader import collate
from semidetr.semi.teacher import keep_boxes, transport

# %%
from dataclasses import replace
import matplotlib.pyplot as plt
from semidetr.data.augment import strong_view
from semidetr.data.digits import DigitsScenes
from semidetr.draw import draw_boxes, show_image


# %%
#| export
@dataclass(frozen=True)
class MixingConfig:
    "Strong views mixed with earlier ones (values of MixPL, where the comment names no other)"

    mixup: float = 0.0  # probability that a strong view is blended with an earlier one (MixPL: 1)
    mosaic: int = 0  # 1: each step has a mosaic of four earlier views in addition (MixPL: 1)
    weight: float = 0.5  # of the losses of the mosaic, relative to those of the strong views
    cache: int = 0  # number of earlier views; 0: twice those of a batch, and at least four more (MixPL: 8)
    tile: float = 0.615  # smallest side of a mosaic tile as a share of view.eval_short (MixPL: .5)
    erase_patches: tuple = (1, 19)  # fewest and most patches that are erased after mixing
    erase_side: float = 0.1  # a patch is at most this share of either side
    erased: float = 0.7  # boxes are dropped of which at least this share is erased

    def __post_init__(self):
        object.__setattr__(self, 'erase_patches', tuple(self.erase_patches))
        one_of('mixing', self, mosaic=(0, 1))
        shares = dict.fromkeys(('mixup', 'tile', 'erase_side', 'erased'), (0, 1))
        in_range('mixing', self, weight=0, cache=0, **shares)
        if len(self.erase_patches) != 2 or not 0 <= self.erase_patches[0] <= self.erase_patches[1]:
            raise ConfigError('mixing.erase_patches is (fewest, most)')

    @property
    def on(self) -> bool:
        "Is any view mixed?"
        return self.mixup > 0 or self.mosaic > 0


# %% [markdown]
# ## Where the views go
#
# **Mixup.** A strong view $x$ and an earlier one $x'$ are placed at random on canvases of the larger height
# and the larger width, uncovered pixels are grey, and
#
# $$ \tilde x=\tfrac12\,x+\tfrac12\,x',\qquad \tilde B=B\cup B'. $$ {#eq-mixing-mixup}
#
# **Mosaic.** Four earlier views are fitted into tiles of random sides, with their own ratio of the sides kept,
# and touch at the centre of the canvas. With $(h_j,w_j)$ the sizes after fitting, the canvas is
#
# $$ H=2\cdot16\left\lceil\frac{\max_j h_j}{16}\right\rceil,\qquad W=2\cdot16\left\lceil\frac{\max_j w_j}{16}\right\rceil. $$ {#eq-mixing-mosaic}
#
# MixPL draws the sides of tiles from 400 to 799 pixels where images have 800. Here they are shares of
# `view.eval_short`. At the 208 pixels of the preset `small`, half a side would be 104 pixels, and the smallest
# blood cells would be as small as one cell of the finest feature map; .615 begins at 128.

# %%
#| export
def fit_into(
    size,  # (h, w) of an image
    tile,  # (h, w) of a tile
):  # (h, w), at least one of them that of the tile
    "The largest size of the same ratio that fits into a tile, rounded down"
    (h, w), (th, tw) = size, tile
    if th * w <= tw * h:
        return th, max(1, w * th // h)
    return max(1, h * tw // w), tw


def mosaic_layout(
    sizes,  # four (h, w): top left, top right, bottom left, bottom right
    multiple: int = 16,  # half the canvas is a multiple of this
):  # ((H, W), four (x, y) of the top left corners)
    "Canvas and places of four images that touch at its centre (@eq-mixing-mosaic)"
    cy, cx = (-(-max(s[k] for s in sizes) // multiple) * multiple for k in (0, 1))
    places = []
    for j, (h, w) in enumerate(sizes):
        places.append((cx if j % 2 else cx - w, cy if j > 1 else cy - h))
    return (2 * cy, 2 * cx), places


def blend_layout(
    size,  # (h, w) of the view
    other,  # (h, w) of the earlier view
    r,  # function that returns numbers in [0, 1)
):  # ((H, W), (x, y) of the view, (x, y) of the earlier view)
    "A canvas of the larger sides and random places on it (@eq-mixing-mixup)"
    canvas = tuple(max(a, b) for a, b in zip(size, other))
    places = []
    for h, w in (size, other):
        places.append((int(r() * (canvas[1] - w + 1)), int(r() * (canvas[0] - h + 1))))
    return canvas, *places


# %%
assert fit_into((208, 156), (150, 150)) == (150, 112)
canvas, places = mosaic_layout([(150, 112), (104, 150), (150, 150), (130, 120)])
assert canvas == (320, 320) and places == [(48, 10), (160, 56), (10, 160), (160, 160)]
canvas, places


# %%
#| export
def paste(
    image: Tensor,  # (3,h,w)
    canvas,  # (H, W)
    place,  # (x, y) of its top left corner
    fill,  # (3,1,1) tensor or number
) -> Tensor:  # (3,H,W)
    "An image on a canvas of one colour"
    (x, y), (h, w) = place, image.shape[-2:]
    out = image.new_empty(3, *canvas)
    out[:] = fill
    out[:, y : y + h, x : x + w] = image
    return out


def placing(
    size,  # (h, w) of the image
    new,  # (h, w) after resizing
    flip: bool,  # mirrored
    place,  # (x, y) of the top left corner afterwards
) -> Tensor:  # (3,3) float64
    "The matrix of resize, flip and shift, from pixels of an image to those of a canvas"
    m = torch.eye(3, dtype=torch.float64)
    m[0, 0], m[1, 1] = new[1] / size[1], new[0] / size[0]
    m[0, 2], m[1, 2] = place
    if flip:
        m[0, 0], m[0, 2] = -m[0, 0], place[0] + new[1]
    return m


# %%
moved = placing((208, 156), (104, 78), True, (10, 20)) @ torch.tensor([156.0, 208, 1]).double()
assert moved.tolist() == [10, 124, 1]
moved


# %% [markdown]
# ## Erased boxes
#
# Erasing (@sec-augment) comes after mixing. A box that is covered by the patches $p$ to a large part is no
# target any more: dropped are boxes with
#
# $$ e(b)=\frac{1}{|b|}\sum_p|b\cap p|\;\ge\;.7 $$ {#eq-mixing-erased}
#
# Where patches overlap, the overlap counts twice, as in MixPL. Patches have the grey of `view.fill`; MixPL
# fills with zeros.

# %%
#| export
def erased_share(
    boxes: Tensor,  # (N,4) xyxy pixels
    patches: Tensor,  # (P,4) xyxy pixels
) -> Tensor:  # (N,) 0 or more
    "How much of each box the patches cover (@eq-mixing-erased)"
    patches = patches.to(boxes)
    low = torch.maximum(boxes[:, None, :2], patches[:, :2])
    high = torch.minimum(boxes[:, None, 2:], patches[:, 2:])
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return (high - low).clamp(min=0).prod(2).sum(1) / area.clamp(min=1e-9)


def draw_patches(
    size,  # (h, w) of the image
    cfg: MixingConfig,  # `erase_patches`, `erase_side`
    r,  # function that returns numbers in [0, 1)
) -> Tensor:  # (P,4) int64 xyxy pixels
    "Random patches, each with one share of both sides"
    low, high = cfg.erase_patches
    rows = []
    for _ in range(low + int(r() * (high - low + 1))):
        share = r() * cfg.erase_side
        h, w = int(share * size[0]), int(share * size[1])
        y, x = int(r() * (size[0] - h + 1)), int(r() * (size[1] - w + 1))
        rows.append((x, y, x + w, y + h))
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 4)


def erase(
    image: Tensor,  # (3,h,w), changed in place
    patches: Tensor,  # (P,4) int64 xyxy pixels
    fill,  # (3,1,1) tensor or number
):
    "Overwrite patches"
    for x1, y1, x2, y2 in patches.tolist():
        image[:, y1:y2, x1:x2] = fill


# %%
one_box = torch.tensor([[10.0, 10, 30, 30]])
covered = [erased_share(one_box, torch.tensor([[0, 0, x, 30]])).item() for x in (25, 24)]
assert [round(v, 6) for v in covered] == [0.75, 0.7]
assert erased_share(one_box, torch.tensor([[0, 0, 20, 40]] * 2)).item() == 1.0  # overlaps count twice
covered


# %% [markdown]
# ## Boxes of a mixed view
#
# A mixed view is a view: its matrix leads from the original image to the canvas, so the teacher's boxes reach
# it by the same product of matrices as any other (@eq-teacher-transport). Two things are added to its target:
# `others`, the boxes of the view that was blended in, with all their scores, and `patches`. When the pseudo
# labels of the step are known, `complete` unites both sets and drops what is erased. Which boxes of an earlier
# view are pseudo labels is decided when it is used, by the rule of that moment.

# %%
#| export
def complete(
    targets: list,  # of mixed views, with boxes (K,4) cxcywh, labels, scores, source
    keep,  # dict(boxes, labels, scores) -> (K,) bool: which boxes of earlier views are used; None: all
    erased: float,  # as `MixingConfig.erased`
) -> list:  # the same targets: boxes of earlier views are added, those that are erased are dropped
    "The targets of mixed views; added boxes have `source` -1"
    out = []
    for t in targets:
        others = t['others']
        if keep is not None:
            others = keep_boxes([others], [keep(others)])[0]
        source = torch.full_like(others['labels'], -1)
        rows = others | dict(boxes=normalize_boxes(others['boxes'], t['size']), source=source)
        united = {k: torch.cat([t[k], rows[k].to(t[k])]) for k in ('boxes', 'labels', 'scores', 'source')}
        share = erased_share(denormalize_boxes(united['boxes'], t['size']), t['patches'])
        out += keep_boxes([t | united], [share < erased - 1e-6])
    return out


# %%
own = dict(boxes=torch.tensor([[0.2, 0.2, 0.2, 0.2]]), labels=torch.tensor([3]), scores=torch.ones(1))
others = dict(
    boxes=torch.tensor([[60.0, 60, 80, 80], [0, 60, 20, 80], [40, 40, 50, 50]]),
    labels=torch.tensor([1, 2, 5]),
    scores=torch.tensor([0.9, 0.8, 0.1]),
)
patch = torch.tensor([[0, 55, 15, 90]])
toy = own | dict(source=torch.tensor([0]), size=(100, 100), others=others, patches=patch)
(united,) = complete([toy], lambda d: d['scores'] >= 0.5, 0.7)
assert united['labels'].tolist() == [3, 1] and united['source'].tolist() == [0, -1]
united['boxes']


# %% [markdown]
# ## The cache
#
# The cache holds the last strong views before mixing and erasing, as 8-bit pixels, oldest first, with all boxes
# of the teacher and their scores. It is used as soon as it is full. Mixup pairs view $i$ of a batch with entry
# $i$; then the batch takes the place of the oldest entries, and a mosaic takes the four that are the oldest now.
#
# A run that is stopped and resumed must mix the same views in the same way. So the cache is part of the
# checkpoint, and all random numbers are hashes of seed, process and a count: no global generator is
# used. Each process has a cache of its own.

# %%
#| export
class ViewCache(nn.Module):
    "The last strong views with the teacher's boxes; the state is part of the checkpoint"

    def __init__(
        self,
        cfg: MixingConfig,
        view: ViewConfig,  # of the run
        views: int,  # most strong views of a batch
        seed: int = 0,  # of the run
    ):
        super().__init__()
        self.cfg, self.view, self.seed = cfg, view, seed
        needed = views + 4 * cfg.mosaic
        self.capacity = cfg.cache or max(2 * views, views + 4)
        if self.capacity < needed:
            raise ConfigError(
                f'mixing.cache={cfg.cache} is too small for {views} strong views per batch; give {needed} or '
                'more, or 0'
            )
        self.entries, self.count = [], 0  # oldest first; calls of `numbers`
        self.device = torch.device('cpu')  # of the last batch

    @property
    def full(self) -> bool:
        "Are there enough earlier views?"
        return len(self.entries) == self.capacity

    def get_extra_state(self) -> dict:
        "What a checkpoint keeps: entries and count"
        return dict(count=self.count, entries=list(self.entries))

    def set_extra_state(self, state: dict):
        "Continue with the cache of a checkpoint"
        self.count, self.entries = state['count'], list(state['entries'])

    def numbers(self):  # function that returns numbers in [0, 1)
        "New random numbers, in an order that the checkpoint continues"
        self.count += 1
        return random.Random(stable_hash(self.seed, rank(), 'mixing', self.count)).random

    @torch.no_grad()
    def add(
        self,
        part: dict,  # strong views before mixing and erasing
        targets: list,  # per image boxes (K,4) cxcywh in this view, labels, scores: all of the teacher's
    ):
        "Put views into the cache, in the place of the oldest"
        self.device = part['images'].device
        for x, t in zip(part['images'], targets):
            h, w = t['size']
            rows = dict(
                boxes=denormalize_boxes(t['boxes'], t['size']), labels=t['labels'], scores=t['scores']
            )
            entry = {k: v.detach().cpu().clone() for k, v in rows.items()}
            self.entries.append(entry | dict(image=image_bytes(x[:, :h, :w], self.view).cpu()))
        self.entries = self.entries[-self.capacity :]


# %% [markdown]
# ## Mixup, mosaic, erasing

# %%
#| export
def grey(
    view: ViewConfig,  # `fill`, `mean`, `std`
    device,  # where it is used
) -> Tensor:  # (3,1,1) float32
    "The colour of uncovered and erased pixels, normalised"
    return normalize_image(torch.full((3, 1, 1), view.fill, dtype=torch.uint8, device=device), view)


def blend(
    image: Tensor,  # (3,h,w) normalised
    entry: dict,  # of the cache
    view: ViewConfig,
    r,  # function that returns numbers in [0, 1)
):  # ((3,H,W) normalised, boxes (K,4) xyxy of the entry in it, (3,3) from pixels of the view to the canvas)
    "A view and an earlier one, half of each (@eq-mixing-mixup)"
    earlier, fill = entry['image'].to(image.device), grey(view, image.device)
    size, other = tuple(image.shape[-2:]), tuple(earlier.shape[-2:])
    canvas, place, there = blend_layout(size, other, r)
    flip = r() < view.flip
    earlier = normalize_image(F.horizontal_flip(earlier) if flip else earlier, view)
    mixed = (paste(image, canvas, place, fill) + paste(earlier, canvas, there, fill)) / 2
    boxes, _ = transform_boxes(entry['boxes'], placing(other, other, flip, there), canvas)
    return mixed, boxes, placing(size, size, False, place)


# %%
#| export
def four_in_one(
    entries: list,  # four of the cache
    cfg: MixingConfig,  # `tile`
    view: ViewConfig,
    r,  # function that returns numbers in [0, 1)
    keep=None,  # as for `complete`
):  # ((3,H,W) uint8, boxes (K,4) xyxy pixels, labels (K,))
    "A mosaic (@eq-mixing-mosaic); boxes that become slivers are dropped as in every view"
    short = view.eval_short
    low, sizes, flips = round(cfg.tile * short), [], []
    for entry in entries:
        tile = tuple(low + int(r() * (short - low + 1)) for _ in range(2))
        sizes.append(fit_into(tuple(entry['image'].shape[-2:]), tile))
        flips.append(r() < view.flip)
    canvas, places = mosaic_layout(sizes)
    image = torch.full((3, *canvas), view.fill, dtype=torch.uint8)
    kept = []
    for entry, (h, w), flip, (x, y) in zip(entries, sizes, flips, places):
        small = F.resize(entry['image'], [h, w], antialias=True)
        image[:, y : y + h, x : x + w] = F.horizontal_flip(small) if flip else small
        matrix = placing(tuple(entry['image'].shape[-2:]), (h, w), flip, (x, y))
        boxes, there = transform_boxes(entry['boxes'], matrix, canvas, view.min_box)
        used = there if keep is None else there & keep(entry)
        kept += keep_boxes([dict(boxes=boxes, labels=entry['labels'])], [used])
    return image, torch.cat([d['boxes'] for d in kept]), torch.cat([d['labels'] for d in kept])


# %%
small = ViewConfig(short_sides=(80, 96), eval_short=96, max_side=160, mean=(0.5,) * 3, std=(0.5,) * 3)
small = replace(small, flip=0.0, erase_patches=(0, 0))
scenes, toy_cache = DigitsScenes('train', n=8, size=96), ViewCache(MixingConfig(mosaic=1), small, 2)
for k in range(0, 6, 2):
    pair = [strong_view(scenes[i], small, seed=i) for i in (k, k + 1)]
    toy_part = collate(pair)
    toy_cache.add(toy_part, [t | dict(scores=torch.ones(len(t['labels']))) for t in toy_part['targets']])
assert toy_cache.full and toy_cache.entries[0]['image'].dtype == torch.uint8
four, four_boxes, four_labels = four_in_one(
    toy_cache.entries[:4], toy_cache.cfg, small, random.Random(0).random
)
assert four.shape[1] % 32 == four.shape[2] % 32 == 0 and len(four_boxes) == len(four_labels) > 4
tuple(four.shape), len(four_boxes)


# %% [markdown]
# ## In a step
#
# `Mixing` puts the parts together for a method (@sec-methods). With a teacher it changes the strong views of
# unlabelled images. In supervised training it changes the strong views of labelled images, for which
# `loader.two_views` has to be on (@sec-loader); the true boxes stand for the teacher's, with score 1. The
# strong views must reach it without erased patches, so `view.erase_patches` is `[0,0]`; patches of
# `mixing.erase_patches` are erased afterwards, from strong views of labelled images as well.
#
# A mosaic in which no box is left is not used: it would teach the student that four images are empty. Losses are
# normalised by counts of all processes, so a mosaic is used only in steps in which each process has one.

# %%
#| export
def on_every_process(
    flag: bool,
    device,  # of the run
) -> bool:
    "Is the flag set on every process? Each of them must ask"
    return bool(all_reduce_mean(torch.tensor(float(flag), device=device)) > 0.999)


# %%
#| export
def _view(image, target):
    "A view of a batch without its padding and its boxes"
    h, w = target['size']
    return View(
        image[:, :h, :w], None, None, target['matrix'], (h, w), target['image_id'], target['orig_size']
    )


def _stacked(views, more, multiple):
    "A part of a batch whose targets have the entries of `more` as well"
    part = collate(views, multiple, truth=False)
    targets = [t | rows for t, rows in zip(part['targets'], more)]
    return part | dict(mask=part['mask'].to(part['images'].device), targets=targets)


def _certain(targets):
    "True boxes as those of a teacher that is always right"
    return [t | dict(scores=torch.ones_like(t['boxes'][:, 0])) for t in targets]


def mixed_views(
    part: dict,  # strong views before erasing
    earlier: list | None,  # entries of the cache, at least as many; None: erase only
    cfg: MixingConfig,
    view: ViewConfig,
    r,  # function that returns numbers in [0, 1)
) -> dict:  # the same images; their targets have `others` and `patches`
    "Blend each view with probability `mixup` with the earlier one of the same number, and erase patches"
    views, more = [], []
    for i, (x, t) in enumerate(zip(part['images'], part['targets'])):
        v = _view(x.clone(), t)
        others = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0).long(), scores=torch.zeros(0))
        if earlier is not None and r() < cfg.mixup:
            v.image, boxes, shift = blend(v.image, earlier[i], view, r)
            v.size, v.matrix = tuple(v.image.shape[-2:]), shift.to(t['matrix']) @ t['matrix']
            others = dict(boxes=boxes, labels=earlier[i]['labels'], scores=earlier[i]['scores'])
        patches = draw_patches(v.size, cfg, r)
        erase(v.image, patches, grey(view, x.device))
        views.append(v)
        more.append(dict(others={k: o.to(x.device) for k, o in others.items()}, patches=patches))
    return _stacked(views, more, view.pad_multiple)


def mosaic_view(
    entries: list,  # four of the cache
    cfg: MixingConfig,
    view: ViewConfig,
    r,  # function that returns numbers in [0, 1)
    keep=None,  # as for `complete`
    device='cpu',  # of the result
):  # part of a batch with one image, with boxes; None if no box is left
    "A mosaic with patches erased"
    image, boxes, labels = four_in_one(entries, cfg, view, r, keep)
    size = tuple(image.shape[-2:])
    patches = draw_patches(size, cfg, r)
    erase(image, patches, view.fill)
    left = erased_share(boxes, patches) < cfg.erased - 1e-6
    if not left.any():
        return None
    rows = dict(labels=labels[left].to(device), boxes=normalize_boxes(boxes[left], size).to(device))
    eye = torch.eye(3, dtype=torch.float64, device=device)
    mosaic = View(normalize_image(image.to(device), view), None, None, eye, size, 'mosaic', size)
    return _stacked([mosaic], [rows], view.pad_multiple)


# %%
#| export
class Mixing(ViewCache):
    "What a method does with the strong views of a batch, the cache included"

    two_views = supervised = False  # are labelled images in two views; are there no others

    @torch.no_grad()
    def strong(
        self,
        part: dict,  # strong views before erasing
        blended: bool = True,  # False: erase only
    ) -> dict:  # the same images; their targets have `others` and `patches`
        "Blend each view with probability `mixup` with an earlier one, and erase patches"
        earlier = self.entries if blended and self.full else None
        return mixed_views(part, earlier, self.cfg, self.view, self.numbers())

    def remember(
        self,
        part: dict,  # strong views before mixing and erasing
        detections: list,  # per image all boxes of the teacher, xyxy pixels of the weak view
        weak: list,  # targets of the weak views
        min_side: float,  # as for `transport`
    ):
        "Put unlabelled views into the cache"
        self.add(part, transport(detections, weak, part['targets'], min_side))

    def complete(
        self,
        targets: list,  # of views that `strong` returned, with boxes
        keep=None,  # which boxes of earlier views are used
    ) -> list:
        "The function of this name"
        return complete(targets, keep, self.cfg.erased)

    def labelled(
        self,
        part: dict,  # labelled views, weak ones first if there are two of each image
    ) -> dict:  # with as many images
        "Mix (in supervised training) and erase the strong ones; they go into the cache if they are mixed"
        if not self.two_views:
            return part
        n, targets = len(part['targets']) // 2, part['targets']
        before, truth = dict(images=part['images'][n:], targets=targets[n:]), _certain(targets[n:])
        mixed = self.strong(before, self.supervised)
        boxes = [t | dict(boxes=denormalize_boxes(t['boxes'], t['size'])) for t in truth]
        moved = self.complete(transport(boxes, targets[n:], mixed['targets'], -1.0))
        if self.supervised:
            self.add(before, truth)
        rows = [{k: t[k] for k in ('labels', 'boxes')} for t in (*targets[:n], *moved)]
        views = [_view(x, t) for x, t in zip((*part['images'][:n], *mixed['images']), (*targets[:n], *moved))]
        return _stacked(views, rows, self.view.pad_multiple)

    @torch.no_grad()
    def mosaic(
        self,
        keep=None,  # which boxes of earlier views are used
    ):  # part of a batch with one image; None if it is off, the cache is not full, or no box is left
        "A mosaic of the four oldest views, with patches erased"
        if not self.cfg.mosaic or not self.full:
            return None
        return mosaic_view(self.entries[:4], self.cfg, self.view, self.numbers(), keep, self.device)

    def losses(
        self,
        student,  # detector in training mode
        criterion,  # (outputs, targets, t, denoising) -> losses
        t: int,  # iteration
        denoising: bool = True,  # do the boxes make denoising queries?
        keep=None,  # which boxes of earlier views are used
    ) -> dict:  # loss_mosaic_...; none if a process has no mosaic
        "The losses of a mosaic, times `weight`"
        part = self.mosaic(keep)
        if not on_every_process(part is not None, self.device):
            return {}
        outputs = student(part['images'], part['mask'], part['targets'] if denoising else None)
        losses = criterion(outputs, part['targets'], t, denoising)
        return {k.replace('loss_', 'loss_mosaic_', 1): v * self.cfg.weight for k, v in losses.items()}


# %%
#| export
class Unmixed:
    "Mixing that is off: every view stays as it is"

    def strong(self, part):
        return part

    def labelled(self, part):
        return part

    def complete(self, targets, keep=None):
        return targets

    def remember(self, part, detections, weak, min_side):
        return None

    def losses(self, student, criterion, t, denoising=True, keep=None):
        return {}


def build_mixing(
    cfg,  # Config of the run
    unlabelled: bool,  # does the method learn from unlabelled images?
):  # `Mixing`, or `Unmixed` where it is off
    "What the settings ask for; `ConfigError` where others contradict them"
    settings = getattr(cfg, 'mixing', MixingConfig())
    if not settings.on:
        return Unmixed()
    for name, (value, why) in mixing_needs(cfg, unlabelled).items():
        raise ConfigError(f'{why}; set {name}={value}')
    if unlabelled and cfg.mining.sup_filter == 'cpm':
        raise ConfigError(
            'mining.sup_filter=cpm needs costs that earlier views do not have; choose another one'
        )
    c = cfg.loader
    n = c.n_unlabelled if unlabelled else c.n_labelled
    if unlabelled and c.ratio == 'binomial':
        n = c.n_labelled + c.n_unlabelled - 1
    mixing = Mixing(settings, cfg.view, n, cfg.run.seed)
    mixing.two_views, mixing.supervised = c.two_views, not unlabelled
    return mixing


def mixing_needs(
    cfg,  # Config of the run
    unlabelled: bool,  # does the method learn from unlabelled images?
) -> dict:  # 'group.field' -> (value, the reason in one sentence)
    "Other settings that mixing needs and that differ"
    out = {}
    if not getattr(cfg, 'mixing', MixingConfig()).on:
        return out
    if any(cfg.view.erase_patches):
        out['view.erase_patches'] = '[0,0]', 'mixing erases strong views itself, after they are mixed'
    if not unlabelled and not cfg.loader.two_views:
        out['loader.two_views'] = 'true', 'supervised training mixes the strong views of labelled images'
    return out


# %% [markdown]
# Scenes of digits: a strong view of which the other half is an earlier one, and the mosaic of four.

# %%
settings = MixingConfig(mixup=1.0, mosaic=1)
mixing = Mixing(settings, small, 2)
mixing.set_extra_state(toy_cache.get_extra_state())
now = collate([strong_view(scenes[i], small, seed=20 + i) for i in (6, 7)])
mixed = mixing.strong(now)
perfect = [t | dict(boxes=denormalize_boxes(t['boxes'], t['size'])) for t in _certain(now['targets'])]
all_targets = mixing.complete(transport(perfect, now['targets'], mixed['targets']))
own_boxes, earlier_boxes = (
    sum(int(((t['source'] < 0) == e).sum()) for t in all_targets) for e in (False, True)
)
assert (
    own_boxes > 0 and earlier_boxes > 0 and mixed['targets'][0]['image_id'] == now['targets'][0]['image_id']
)
own_boxes, earlier_boxes

# %%
#| label: fig-mixing-views
#| fig-cap: "Mixing keeps every box on its object: strong view, the same view blended with an earlier one and erased, a mosaic of four earlier views (blue: boxes of this view, orange: boxes of earlier views)."
#| fig-alt: "Three pictures of digit scenes: one scene; two scenes on top of each other with small grey patches; four small scenes that touch at the centre of a grey canvas. Boxes are on the digits."
mosaic = mixing.mosaic()
shown = [
    (now, perfect[0]['boxes'], None),
    (mixed, None, all_targets[0]),
    (mosaic, None, mosaic['targets'][0]),
]
fig, axes = plt.subplots(1, 3, figsize=(6, 2.3), dpi=80)
for ax, title, (part, plain, target) in zip(axes, ('strong', 'mixup, erased', 'mosaic, erased'), shown):
    h, w = part['targets'][0]['size']
    show_image(ax, part['images'][0, :, :h, :w], small.mean, small.std)
    ax.set_title(title, fontsize=9)
    if plain is not None:
        draw_boxes(ax, plain, kind='student')
        continue
    pixels = denormalize_boxes(target['boxes'], target['size'])
    earlier = target['source'] < 0 if 'source' in target else torch.ones(len(pixels), dtype=torch.bool)
    draw_boxes(ax, pixels[~earlier], kind='student')
    draw_boxes(ax, pixels[earlier], kind='teacher')
plt.tight_layout(pad=0.3)
plt.show()

# %% [markdown]
# The state of the cache is all that a resumed run needs:

# %%
resumed = Mixing(settings, small, 2)
resumed.load_state_dict(mixing.state_dict())
assert torch.equal(resumed.strong(now)['images'], mixing.strong(now)['images'])
mixing.count, len(mixing.entries)

# %% [markdown]
# ## What it costs
#
# Mixup leaves the number of images as it is. A mosaic is one more image per step, of up to twice the sides, and
# its boxes are those of four images. In a detector that gives $k$ queries to each object, and makes two
# denoising queries of each, images with many objects need a larger number of queries and smaller $k$: blood
# cells at 17.6 boxes per image have 35 in a blended view and 70 in a mosaic.
#
# ::: {.callout-note}
# ## Paper vs. code
# MixPL sets the loss of a batch to zero if any of its images has no pseudo label; here an image without a
# pseudo label is background, as in the other methods of this book. Its cache of eight is overrun by more than
# four views per step, so ours holds two batches. It erases each tile of a mosaic, we erase the whole. A learned
# suppressor (@sec-suppressor) does not learn from mosaics.
# :::
#
# ## Summary
#
# - A mixed view is a view with a matrix: boxes reach it like any other, and boxes of the earlier view are added.
# - Erasing comes last, and boxes that are mostly erased are no targets.
# - Which boxes of earlier views are pseudo labels is decided when they are used; the cache has all scores.
# - Cache and count are in the checkpoint of each process; a resumed run mixes the same views.
# - Supervised training mixes labelled images in the same way, so that a comparison is fair.
#
# ## Exercises
#
# 1. A box is covered by two patches that both cover its left half. Is it dropped?
# 2. The teacher of ten steps ago labelled the entries of the cache. When does that matter most?
# 3. Why does a blended view have no class that the student can be certain of, and which loss of @sec-losses
#    has targets for that?
