# %% [markdown]
# # Views: one image, three augmentations, one matrix each {#sec-augment}
#
# > Turn a sample into a labelled, weak or strong view, and map any box between two views of the same image.
#
# The teacher gets a weakly augmented image and the student a strongly augmented one. The teacher's boxes are
# in the pixels of *its* view; the student needs them in its own. So each view keeps the 3x3 matrix that maps
# the original image to it, and the map from teacher to student is a product of two matrices. If a matrix is
# wrong by a few pixels, nothing crashes: the pseudo labels are slightly misplaced, and small objects are
# missed. That is why this chapter tests matrices by drawing a marker and locating it in the view.

# %%
#| default_exp data.augment

# %%
#| export
import math
import random
from dataclasses import dataclass, replace
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from semidetr.boxes import transform_boxes
from semidetr.core import ConfigError, one_of, stable_hash, suggest


# %% [markdown]
# ## The settings
#
# The constants are those of the method's training pipeline. Sizes are meant to be changed:
# `scaled_views(320)` gives the same *relative* sizes (0.6 to 1.0 of the evaluation size in eleven steps, long
# side at most 5/3 of it) for small images.

# %%
#| export
@dataclass(frozen=True)
class ViewConfig:
    "Sizes and strengths of the views; the defaults are the paper's setting for COCO"

    short_sides: tuple = tuple(range(480, 801, 32))  # training: the short side is one of these, pixels
    max_side: int = 1333  # the long side never exceeds this
    min_side: int = 32  # no side is made shorter than this: a very long image is stretched instead
    eval_short: int = 800  # short side in evaluation
    mean: tuple = (0.485, 0.456, 0.406)  # of RGB in [0,1], as the backbone expects
    std: tuple = (0.229, 0.224, 0.225)  # likewise
    flip: float = 0.5  # probability of a horizontal flip
    fill: int = 125  # grey level of uncovered and erased pixels
    translate: float = 0.1  # at most this share of the side
    rotate: float = 30.0  # at most, degrees
    shear: float = 30.0  # at most, "degrees" through tanh
    erase_patches: tuple = (1, 4)  # fewest and most erased patches; (0, 0): none
    erase_side: float = 0.2  # a patch is at most this share of either side
    min_box: float = 1.0  # boxes whose shorter side is not above this after the transform are dropped, pixels
    pad_multiple: int = 1  # batches are padded to a multiple of this
    # strong views: 'geometric' (also turned, shifted, erased), or 'photometric' (@sec-photometric)
    strong: str = 'geometric'

    def __post_init__(self):
        for k in ('short_sides', 'mean', 'std', 'erase_patches'):
            object.__setattr__(self, k, tuple(getattr(self, k)))
        if not self.short_sides:
            raise ConfigError('short_sides is empty; name at least one training size')
        small = min(*self.short_sides, self.eval_short)
        if small < self.min_side:
            raise ConfigError(
                f'a short side of {small} is below min_side={self.min_side}; raise it, or lower min_side'
            )
        if self.max_side < max(*self.short_sides, self.eval_short):
            raise ConfigError(f'max_side={self.max_side} is below the largest short side; raise max_side')
        if not 0 <= self.flip <= 1 or not 0 <= self.fill <= 255:
            raise ConfigError('flip is a probability and fill is a grey in 0..255')
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ConfigError('mean and std are three numbers each, std above 0')
        few = self.erase_patches
        if len(few) != 2 or not 0 <= few[0] <= few[1] or not 0 <= self.erase_side < 1:
            raise ConfigError('erase_patches is (fewest, most) and erase_side a share below 1')
        if self.pad_multiple < 1 or self.min_side < 1:
            raise ConfigError('pad_multiple and min_side are at least 1')
        one_of('view', self, strong=('geometric', 'photometric'))


# %%
#| export
def scaled_views(
    eval_short: int,  # short side in evaluation, pixels
    smallest: float = 0.6,  # smallest training short side, as a share of it
    steps: int = 11,  # number of training sizes
    **other,  # any field of `ViewConfig`
) -> ViewConfig:
    "The sizes of the COCO setting, scaled to smaller images"
    low, sides = round(eval_short * smallest), [eval_short]
    if steps > 1:
        sides = sorted({round(low + (eval_short - low) * k / (steps - 1)) for k in range(steps)})
    sizes = dict(short_sides=sides, eval_short=eval_short, max_side=math.ceil(eval_short * 5 / 3))
    return ViewConfig(**{**sizes, **other})


# %%
assert scaled_views(800).short_sides == ViewConfig().short_sides
scaled_views(96, smallest=0.75, steps=4)

# %% [markdown]
# ## Draw the operations first
#
# A view is made in two steps: `draw_ops` draws the operations from a seed alone, and `render` applies them.
# So a view can be reproduced exactly, frequencies can be counted over thousands of seeds without touching a
# pixel, and no global random generator is used, which keeps resumed runs reproducible.
#
# | view | operations |
# |---|---|
# | labelled | resize, flip, one colour operation |
# | weak (teacher) | resize, flip |
# | strong (student) | resize, flip, then one colour and one geometric operation in random order, then erasing |
# | evaluation | resize to `eval_short` |
#
# The colour operation is uniform over nine, its magnitude $\mu$ a uniform integer in 1..9; the geometric
# operation is uniform over four.

# %%
#| export
COLOR_OPS = (
    'identity',
    'autocontrast',
    'equalize',
    'solarize',
    'color',
    'contrast',
    'brightness',
    'sharpness',
    'posterize',
)
GEOMETRIC_OPS = ('translate_x', 'translate_y', 'rotate', 'shear')
VIEW_KINDS = ('labelled', 'weak', 'strong', 'eval')


def color_value(
    name: str,  # one of COLOR_OPS
    mu: int,  # magnitude, 1..9
):  # threshold (solarize), bits (posterize), factor (color, contrast, brightness, sharpness), or None
    "The parameter of a colour operation at a magnitude"
    if name == 'solarize':
        return min(int(25.6 * mu), 255)
    if name == 'posterize':
        return 4 - int(0.4 * mu)
    return 0.18 * mu + 0.1 if name in ('color', 'contrast', 'brightness', 'sharpness') else None


# %%
#| export
def _geometric(r, cfg):
    "One geometric operation and its amount, relative to the image size"
    name = GEOMETRIC_OPS[int(r() * 4)]
    if name == 'rotate':
        return name, (2 * r() - 1) * cfg.rotate
    if name != 'shear':
        return name, (2 * r() - 1) * cfg.translate
    x, y = (math.radians((2 * r() - 1) * cfg.shear) for _ in range(2))
    return name, (math.tanh(-x), math.tanh(y))


def draw_ops(
    kind: str,  # 'labelled', 'weak', 'strong' or 'eval'
    seed: int,  # the same seed gives the same operations; different kinds are independent
    cfg: ViewConfig,
) -> tuple:  # of (name, value)
    "Draw the operations of a view, without the image"
    if kind not in VIEW_KINDS:
        raise ConfigError(f"view '{kind}' is unknown; {suggest(kind, VIEW_KINDS)}")
    if kind == 'eval':
        return (('resize', cfg.eval_short),)
    r = random.Random(stable_hash(kind, int(seed))).random  # its sequence is the same in all Python versions
    ops = [('resize', cfg.short_sides[int(r() * len(cfg.short_sides))])]
    if r() < cfg.flip:
        ops.append(('flip', None))
    if kind == 'weak':
        return tuple(ops)
    color = COLOR_OPS[int(r() * 9)], 1 + int(r() * 9)
    if kind == 'labelled':
        return (*ops, color)
    pair = [color, _geometric(r, cfg)]
    if r() < 0.5:
        pair.reverse()
    low, high = cfg.erase_patches
    patches = tuple((r() * cfg.erase_side, r(), r()) for _ in range(low + int(r() * (high - low + 1))))
    return (*ops, *pair, *([('erase', patches)] if patches else []))


# %%
drawn = [draw_ops('strong', s, ViewConfig()) for s in range(4000)]
colors = [v[0] for ops in drawn for v in ops if v[0] in COLOR_OPS]
share = {c: round(colors.count(c) / len(colors), 3) for c in COLOR_OPS}
assert all(abs(v - 1 / 9) < 0.02 for v in share.values()) and draw_ops('strong', 7, ViewConfig()) == drawn[7]
print(drawn[7])
share


# %% [markdown]
# ## One matrix per operation
#
# Coordinates are continuous: pixel $(i, j)$ covers the square from $(i, j)$ to $(i+1, j+1)$, its centre is at
# $(i+\tfrac12, j+\tfrac12)$, and box corners live in the same system. With width $W$, height $H$ of the image
# at that moment, scales $s_x, s_y$, angle $\varphi$ and shears $a, b$,
#
# $$ A_{resize}=\operatorname{diag}(s_x,s_y,1),\qquad A_{flip}:x\mapsto W-x,\qquad A_{rotate}=T(\tfrac W2,\tfrac H2)\,R(\varphi)\,T(-\tfrac W2,-\tfrac H2),\qquad A_{shear}=\begin{bmatrix}1&0&0\\ b&1&0\\ 0&0&1\end{bmatrix}\begin{bmatrix}1&a&0\\ 0&1&0\\ 0&0&1\end{bmatrix} $$ {#eq-augment-ops}
#
# and the view's matrix is built by multiplying from the left, one operation after the other:
# $M\leftarrow A_{op}\,M$. Colour operations and erasing change neither $M$ nor the boxes.
#
# **Paper vs. code.** The published code rotates about $((W-1)/2,(H-1)/2)$ in pixel *indices*, which is the
# image centre in continuous coordinates; the picture is the same, but its recorded matrix treats indices and
# box corners as one system and so is off by up to half a pixel. The matrix here is exact. As in the published
# code, the fixed point of the shear is the top left corner and the canvas keeps its size.

# %%
#| export
def resize_to(
    size,  # (H, W) of the image
    short: int,  # wanted short side
    cfg: ViewConfig,
):  # (H, W)
    "Size with the wanted short side and the same ratio; long side within max_side, no side below min_side"
    h, w = size
    s = min(short / min(h, w), cfg.max_side / max(h, w))
    return max(cfg.min_side, int(h * s + 0.5)), max(cfg.min_side, int(w * s + 0.5))


def op_matrix(
    name: str,  # operation
    value,  # its drawn value
    size,  # (H, W) of the image it is applied to
    cfg: ViewConfig,
) -> np.ndarray:  # (3,3) float64, pixels before -> pixels after
    "The matrix of one operation (@eq-augment-ops)"
    (h, w), m = size, np.eye(3)
    if name == 'resize':
        nh, nw = resize_to(size, value, cfg)
        m[0, 0], m[1, 1] = nw / w, nh / h
    elif name == 'flip':
        m[0] = -1, 0, w
    elif name == 'translate_x':
        m[0, 2] = value * w
    elif name == 'translate_y':
        m[1, 2] = value * h
    elif name == 'shear':
        a, b = value
        m[0, 1], m[1] = a, (b, 1 + a * b, 0)
    elif name == 'rotate':
        c, s = math.cos(math.radians(value)), math.sin(math.radians(value))
        m[:2] = (c, -s, w / 2 - c * w / 2 + s * h / 2), (s, c, h / 2 - s * w / 2 - c * h / 2)
    return m


# %%
resized = op_matrix('resize', 96, (100, 200), scaled_views(96))
flipped = op_matrix('flip', None, (96, 160), ViewConfig())
assert resize_to((100, 200), 96, scaled_views(96)) == (80, 160), 'the long side is the limit'
assert resize_to((20, 1000), 96, scaled_views(96)) == (32, 160), 'stretched, not shrunk to three pixels'
flipped @ resized

# %% [markdown]
# ## Pixels
#
# All operations work on 8-bit pixels; only the last step converts to floats. Resizing uses torchvision's
# 8-bit kernel with antialiasing; colours and warps use Pillow, where they are two to five times faster on one
# thread. A warp samples at pixel centres with the inverse matrix, which is the convention of @eq-augment-ops.

# %%
#| export
_COLOR = dict(
    autocontrast=lambda x, v: F.autocontrast(x),
    equalize=lambda x, v: F.equalize(x),
    solarize=F.solarize,
    color=F.adjust_saturation,
    contrast=F.adjust_contrast,
    brightness=F.adjust_brightness,
    sharpness=F.adjust_sharpness,
    posterize=F.posterize,
)


def _pil(x):
    return x if isinstance(x, Image.Image) else Image.fromarray(x.permute(1, 2, 0).contiguous().numpy())


def _tensor(x):
    return x if isinstance(x, Tensor) else F.pil_to_tensor(x)


def _warp(image, matrix, fill):
    "Move the content of an image by a matrix; the canvas stays"
    back = np.linalg.inv(matrix)[:2].ravel().tolist()
    return image.transform(
        image.size, Image.Transform.AFFINE, back, Image.Resampling.BILINEAR, fillcolor=(fill,) * 3
    )


def _erase(x, patches, fill):
    "Overwrite patches (share of both sides, relative position) with grey"
    h, w = x.shape[-2:]
    for r, v, u in patches:
        ph, pw = int(r * h), int(r * w)
        top, left = int(v * (h - ph + 1)), int(u * (w - pw + 1))
        x[:, top : top + ph, left : left + pw] = fill
    return x


def apply_op(
    image,  # PIL image or uint8 tensor (3,H,W)
    name: str,  # operation
    value,  # its drawn value
    cfg: ViewConfig,
):  # PIL image or uint8 tensor
    "Apply one operation to the pixels"
    if name == 'identity':
        return image
    if name in _COLOR:
        return _COLOR[name](_pil(image), color_value(name, value))
    if name in GEOMETRIC_OPS:
        return _warp(_pil(image), op_matrix(name, value, F.get_size(image), cfg), cfg.fill)
    if name == 'resize':
        return F.resize(_tensor(image), list(resize_to(F.get_size(image), value, cfg)), antialias=True)
    if name == 'flip':
        return F.horizontal_flip(_tensor(image))
    return _erase(_tensor(image), value, cfg.fill)


# %% [markdown]
# ## The view
#
# A box is mapped by its four corners; their hull is clamped to the view (@sec-boxes). What remains of a box
# that was moved over the edge may be a sliver.
#
# **Paper vs. code.** The published pipeline keeps boxes that collapsed to zero size; matching then assigns
# queries to objects that are not there. Here boxes whose shorter side is not above `min_box` pixels are
# dropped together with their labels. `min_box=-1` keeps all.

# %%
#| export
@dataclass
class View:
    "An augmented image with its boxes and the matrix that leads to it"

    image: Tensor  # (3,H,W) float32, normalised; uint8 if raw
    boxes: Tensor  # (N,4) xyxy pixels of the view
    labels: Tensor  # (N,) int64
    matrix: Tensor  # (3,3) float64, original pixels -> view pixels
    size: tuple  # (H, W) of the view
    image_id: int | str
    orig_size: tuple  # (H, W) of the original image
    ops: tuple = ()  # (name, value) in the order they were applied


def normalize_image(
    image: Tensor,  # (..., 3, H, W) uint8
    cfg: ViewConfig,
) -> Tensor:  # float32, the same shape
    "8-bit pixels to what the backbone expects: (x/255 - mean) / std"
    mean = torch.tensor(cfg.mean, dtype=torch.float32, device=image.device)[:, None, None]
    std = torch.tensor(cfg.std, dtype=torch.float32, device=image.device)[:, None, None]
    x = image.to(torch.float32, memory_format=torch.contiguous_format)
    return x.mul_(1 / (255 * std)).sub_(mean / std)


def image_bytes(
    image: Tensor,  # (..., 3, H, W) float32, from `normalize_image`
    cfg: ViewConfig,
) -> Tensor:  # uint8, the same shape
    "Back to 8-bit pixels; exact for what `normalize_image` made of 8-bit pixels"
    mean, std = (torch.tensor(v, dtype=torch.float32, device=image.device) for v in (cfg.mean, cfg.std))
    x = (image.float() * std[:, None, None] + mean[:, None, None]) * 255
    return x.round().clamp(0, 255).to(torch.uint8)


# %%
levels = torch.arange(256, dtype=torch.uint8).repeat(3, 1)[:, :, None]
assert torch.equal(image_bytes(normalize_image(levels, ViewConfig()), ViewConfig()), levels)
normalize_image(levels, ViewConfig())[:, [0, 255], 0]


# %%
#| export
def render(
    sample,  # has image (PIL, RGB), boxes (N,4) xyxy, labels (N,), ignore (N,) bool, image_id
    ops,  # from `draw_ops`
    cfg: ViewConfig,
    raw: bool = False,  # leave the image as uint8, to be normalised later
) -> View:
    "Apply operations to a sample and its boxes; boxes marked ignore never reach a view"
    image = sample.image if sample.image.mode == 'RGB' else sample.image.convert('RGB')
    orig_size, matrix = tuple(F.get_size(image)), np.eye(3)
    for name, value in ops:
        matrix = op_matrix(name, value, F.get_size(image), cfg) @ matrix
        image = apply_op(image, name, value, cfg)
    image, matrix = _tensor(image), torch.from_numpy(matrix)
    size, counts = tuple(image.shape[-2:]), ~sample.ignore
    boxes, keep = transform_boxes(sample.boxes[counts], matrix, size, min_side=cfg.min_box)
    labels = sample.labels[counts][keep]
    if not raw:
        image = normalize_image(image, cfg)
    return View(image, boxes[keep], labels, matrix, size, sample.image_id, orig_size, tuple(ops))


def labelled_view(
    sample,  # as for `render`
    cfg: ViewConfig,
    seed: int,  # as for `draw_ops`
    raw: bool = False,  # leave the image as uint8, to be normalised later
) -> View:
    "Resize, flip, one colour operation: for images whose labels are used"
    return render(sample, draw_ops('labelled', seed, cfg), cfg, raw)


def weak_view(sample, cfg: ViewConfig, seed: int, raw: bool = False) -> View:
    "Resize and flip: the teacher's input; parameters as for `labelled_view`"
    return render(sample, draw_ops('weak', seed, cfg), cfg, raw)


def strong_view(sample, cfg: ViewConfig, seed: int, raw: bool = False) -> View:
    "Resize, flip, colour, geometry, erasing: the student's input; parameters as for `labelled_view`"
    return render(sample, draw_ops('strong', seed, cfg), cfg, raw)


def eval_view(sample, cfg: ViewConfig, raw: bool = False) -> View:
    "Resize only; parameters as for `labelled_view`"
    return render(sample, draw_ops('eval', 0, cfg), cfg, raw)


# %% [markdown]
# ## From teacher to student
#
# With $M_t$ the matrix of the weak view and $M_s$ that of the strong one, a teacher's box is mapped to the
# student's view by
#
# $$ M = M_s\,M_t^{-1}. $$ {#eq-augment-transport}

# %%
#| export
def between_views(
    source: Tensor,  # (3,3) original -> source view
    target: Tensor,  # (3,3) original -> target view
) -> Tensor:  # (3,3) float64, source view pixels -> target view pixels
    "The map from one view of an image to another (@eq-augment-transport)"
    return target.double() @ torch.linalg.inv(source.double())


# %% [markdown]
# An image of 100 x 100 pixels with one box, checked by hand: flipping maps $(10,20,30,40)$ to
# $(70,20,90,40)$.

# %%
#| hide
from types import SimpleNamespace


# %%
def toy_sample(image, boxes):
    "The fields of a sample that a view needs; all labels are 0"
    boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    labels, ignore = (torch.zeros(len(boxes), dtype=t) for t in (torch.long, torch.bool))
    return SimpleNamespace(image=image, boxes=boxes, labels=labels, ignore=ignore, image_id=7)


hundred = toy_sample(Image.new('RGB', (100, 100), (125,) * 3), [[10, 20, 30, 40]])
mirror = render(hundred, [('flip', None)], ViewConfig())
assert mirror.boxes.tolist() == [[70, 20, 90, 40]]
gone = render(hundred, [('translate_x', -0.5)], ViewConfig())
assert gone.boxes.shape == (0, 4) and gone.labels.shape == (0,), 'over the edge: box and label are dropped'
mirror.boxes, gone.boxes

# %% [markdown]
# The same photograph with digits in all three kinds of views. In @fig-augment-views each green box was mapped
# by the view's matrix alone; the pixels played no part.

# %%
#| hide
import matplotlib.pyplot as plt
from semidetr.data.digits import DigitsScenes
from semidetr.draw import draw_boxes, show_image

# %%
#| label: fig-augment-views
#| fig-cap: "Boxes stay on their objects through resizing, flip, colour, rotation, shear and erasing, because each view records its matrix. Columns: original, labelled, weak, and two strong views."
#| fig-alt: "Two rows of five pictures of digits on a photograph; green boxes sit on the same digits in each."

scenes, small = DigitsScenes('train', n=50, size=160), scaled_views(160, smallest=0.75)
fig, axes = plt.subplots(2, 5, figsize=(6, 2.7), dpi=80)
for row, (i, seeds) in zip(axes, ((3, (1, 2)), (8, (5, 6)))):
    s = scenes[i]
    made = [labelled_view(s, small, 3), weak_view(s, small, 1), *(strong_view(s, small, k) for k in seeds)]
    show_image(row[0], s.image)
    draw_boxes(row[0], s.boxes)
    for ax, v in zip(row[1:], made):
        show_image(ax, v.image, mean=small.mean, std=small.std)
        draw_boxes(ax, v.boxes)
for ax, name in zip(axes[0], ('original', 'labelled', 'weak', 'strong', 'strong')):
    ax.set_title(name, fontsize=9)
plt.tight_layout(pad=0.3)
plt.show()


# %% [markdown]
# ## Is the matrix right?
#
# Draw a bright marker at a known pixel, make a view, locate the centre of the marker in its pixels, and
# compare it with the position that the matrix predicts. @fig-augment-marker does so for each geometric
# operation; the tests do it for every operation and for random chains, and require an error below one pixel
# (it is about a tenth).

# %%
#| label: fig-augment-marker
#| fig-cap: "The matrix predicts the position of the marker: the cross is computed from the matrix, the white square was moved by the image operation. The largest distance over all pictures is far below one pixel."
#| fig-alt: "Six pictures with a white square on grey, each with an orange cross at the centre of the square."
def find_marker(image):
    "Centre of the white square in a grey image"
    d = (image[0].double() - 125).clamp(min=0)
    ys, xs = (torch.arange(n).double() + 0.5 for n in d.shape)
    return torch.stack([(d.sum(0) * xs).sum(), (d.sum(1) * ys).sum()]) / d.sum()


grey = np.full((60, 80, 3), 125, np.uint8)
grey[18:27, 40:49] = 255  # its centre is (44.5, 22.5)
marked, errors = toy_sample(Image.fromarray(grey), []), []
one_each = [
    ('resize', 48),
    ('flip', None),
    ('translate_x', 0.1),
    ('translate_y', -0.07),
    ('rotate', 25.0),
    ('shear', (0.3, -0.2)),
]
fig, axes = plt.subplots(1, 6, figsize=(6, 1.2), dpi=80)
for ax, op in zip(axes, one_each):
    v = render(marked, [op], replace(small, max_side=200), raw=True)
    predicted = (v.matrix @ torch.tensor([44.5, 22.5, 1.0]).double())[:2]
    errors.append((find_marker(v.image) - predicted).abs().max().item())
    show_image(ax, v.image)
    ax.plot(*predicted, '+', color='#ff7f0e', ms=14)
    ax.set_title(op[0], fontsize=9)
plt.tight_layout(pad=0.3)
plt.show()
assert max(errors) < 0.1
print(f'largest error: {max(errors):.3f} pixels')

# %% [markdown]
# ## Summary
#
# * A view is a pure function of (sample, configuration, seed); drawing the operations needs no image, and
#   they are recorded in `View.ops`.
# * Labelled: resize, flip, colour. Weak: resize, flip. Strong: resize, flip, colour and geometry in random
#   order, erasing.
# * Every operation has a 3x3 matrix in continuous pixel coordinates; the view's matrix is their product, the
#   last operation leftmost.
# * Teacher to student is $M_s M_t^{-1}$; boxes that become slivers are dropped with their labels.
# * Sizes are fields of `ViewConfig`; `scaled_views(n)` fits them to small images.
#
# ## Exercises
#
# 1. Rotate by 30 degrees and back. Why is the box larger than before, and by how much for a square?
# 2. Replace the flip's $W-x$ by $W-1-x$, the formula for pixel indices, and repeat the marker test. How large
#    is the error for a box of 8 pixels, as a share of its side?
# 3. Erasing may hide an object completely, but its box stays. For which of the two networks does that matter
#    more, and why may it still help?
