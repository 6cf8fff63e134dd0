# %% [markdown]
# # Boxes {#sec-boxes}
#
# > Convert between box formats, measure overlap, and map boxes from one view of an image to another.

# %%
#| default_exp boxes

# %%
#| export
import torch
from torch import Tensor
from torchvision.ops import box_convert

# %%
import matplotlib.pyplot as plt
from semidetr.draw import COLORS, draw_boxes


# %% [markdown]
# ## Why
#
# Teacher and student get the same image in two views of different size, flipped, sheared, rotated. A pseudo
# label is useful only if it lies where the object *is* in the student's view; a box that is mapped wrongly
# teaches the detector to look beside the object, and the loss still decreases. So each view records a matrix,
# and this chapter maps boxes by it. The rest are the details that go wrong most often: the format, the unit,
# and what a box without area or a NaN does to the formulas.

# %% [markdown]
# ## Two formats
#
# `xyxy` $=(x_1,y_1,x_2,y_2)$ are two corners in pixels of the image or view in question. Coordinates refer to
# the edges of pixels, not to their centres: the first pixel covers $[0,1]\times[0,1]$, and a view of size
# $(H,W)$ ends at $x=W$, $y=H$. `cxcywh` $=(c_x,c_y,w,h)$ are centre and sides as fractions of the size of the
# unpadded view:
#
# $$ c_x = \frac{x_1+x_2}{2W}, \quad c_y = \frac{y_1+y_2}{2H}, \quad w = \frac{x_2-x_1}{W}, \quad h = \frac{y_2-y_1}{H} $$ {#eq-boxes-format}

# %%
#| export
def cxcywh_to_xyxy(
    boxes: Tensor,  # (..., 4) centre, width, height
) -> Tensor:  # (..., 4) two corners, same unit
    "Centre and size to corners"
    return box_convert(boxes, 'cxcywh', 'xyxy')


def xyxy_to_cxcywh(
    boxes: Tensor,  # (..., 4) two corners
) -> Tensor:  # (..., 4) centre, width, height, same unit
    "Corners to centre and size"
    return box_convert(boxes, 'xyxy', 'cxcywh')


# %%
corner_box = torch.tensor([[10.0, 20.0, 30.0, 40.0]])
assert torch.equal(cxcywh_to_xyxy(xyxy_to_cxcywh(corner_box)), corner_box)
xyxy_to_cxcywh(corner_box)


# %%
#| export
def _scale(boxes, size):  # (W, H, W, H) like the boxes
    h, w = (int(s) for s in size)
    return boxes.new_tensor([w, h, w, h])


def normalize_boxes(
    xyxy: Tensor,  # (N,4) pixels
    size,  # (H, W) of the unpadded image
) -> Tensor:  # (N,4) cxcywh in [0,1]
    "Pixels to the normalised boxes that a detector predicts (@eq-boxes-format)"
    return xyxy_to_cxcywh(xyxy / _scale(xyxy, size))


def denormalize_boxes(
    cxcywh: Tensor,  # (N,4) in [0,1]
    size,  # (H, W) of the unpadded image
) -> Tensor:  # (N,4) xyxy pixels
    "The normalised boxes that a detector predicts to pixels"
    return cxcywh_to_xyxy(cxcywh) * _scale(cxcywh, size)


# %% [markdown]
# Sizes are $(H,W)$, as in arrays, while boxes are $(x,y)$. In a view of 100 rows and 200 columns:

# %%
relative = normalize_boxes(corner_box, (100, 200))
assert torch.allclose(denormalize_boxes(relative, (100, 200)), corner_box)
assert normalize_boxes(torch.zeros(0, 4), (100, 200)).shape == (0, 4)
relative


# %% [markdown]
# ## Logits of coordinates
#
# A decoder layer does not predict a box but an offset $\Delta$ to the box of the previous layer, in logits,
# so that no coordinate can leave $[0,1]$: $b' = \sigma(\Delta + \sigma^{-1}(b))$, with
#
# $$ \sigma^{-1}(x) = \log \frac{\max(x, \epsilon)}{\max(1-x, \epsilon)} $$ {#eq-boxes-logit}
#
# and $\epsilon=10^{-5}$, so that a coordinate on the border has a large but finite logit.

# %%
#| export
def inverse_sigmoid(
    x: Tensor,  # values; clipped to [0,1]
    eps: float = 1e-5,  # floor of both odds terms
) -> Tensor:  # logits, same shape, within +-11.52
    "Logit with a floor (@eq-boxes-logit), as in the box refinement of Deformable-DETR"
    x = x.clamp(0, 1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()


# %%
odds = inverse_sigmoid(torch.tensor([0.0, 0.25, 0.5, 1.0, 1.5]))
assert odds.isfinite().all() and torch.allclose(odds[1:3].sigmoid(), torch.tensor([0.25, 0.5]))
odds


# %% [markdown]
# ## Overlap
#
# With $|A|$ the area of box $A$ and $C$ the smallest box around $A$ and $B$,
#
# $$ \mathrm{IoU} = \frac{|A\cap B|}{|A\cup B|}, \qquad \mathrm{GIoU} = \mathrm{IoU} - \frac{|C|-|A\cup B|}{|C|} $$ {#eq-boxes-giou}
#
# IoU is 0 and flat where boxes do not touch; GIoU continues to fall towards $-1$ as they move apart, so that
# a distant prediction still has a gradient. Three rules cover the special cases:
#
# * an empty box (also one whose corners are swapped) has area 0; where a denominator is 0, both boxes are
#   empty and the quotient is 0, with a finite gradient;
# * a NaN stays a NaN: a broken prediction must stay visible and not pass for a bad one;
# * everything is computed in float32 at least: in half precision the area of a box with sides of 300 pixels
#   overflows.

# %%
#| export
def _area(lo, hi):
    "Area between corners (...,2); 0 where they are swapped"
    side = (hi - lo).clamp(min=0)
    return side[..., 0] * side[..., 1]


def _ratio(x, y):
    "x/y, and 0 where y is 0 (then x is 0 too), with a finite gradient; NaN stays NaN"
    return x / torch.where(y == 0, torch.ones_like(y), y)


def _overlap(a, b):
    "Intersection and union of all pairs, and the operands in float32 at least"
    dt = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.to(dt)[..., :, None, :], b.to(dt)[..., None, :, :]
    inter = _area(torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:]))
    return a, b, inter, _area(a[..., :2], a[..., 2:]) + _area(b[..., :2], b[..., 2:]) - inter


def box_iou(
    a: Tensor,  # (...,N,4) xyxy
    b: Tensor,  # (...,M,4) xyxy, same unit
) -> Tensor:  # (...,N,M) in [0,1]; 0 where both boxes are empty
    "Intersection over union of all pairs (@eq-boxes-giou)"
    return _ratio(*_overlap(a, b)[2:])


# %% [markdown]
# Two boxes of area 4 with an intersection of 2: $2/6$. A box with itself: 1. Two empty boxes: 0. With a NaN:
# NaN.

# %%
unit_a = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
unit_b = torch.tensor(
    [[1.0, 0.0, 3.0, 2.0], [0.0, 0.0, 2.0, 2.0], [5.0, 5.0, 5.0, 5.0], [float('nan'), 0.0, 2.0, 2.0]]
)
ious = box_iou(unit_a, unit_b)
assert torch.allclose(ious[0, :3], torch.tensor([2 / 6, 1.0, 0.0])) and ious[0, 3].isnan()
assert box_iou(unit_b[2:3], unit_b[2:3]).item() == 0 and box_iou(torch.zeros(0, 4), unit_b).shape == (0, 4)
ious


# %%
#| export
def generalized_box_iou(
    a: Tensor,  # (...,N,4) xyxy
    b: Tensor,  # (...,M,4) xyxy, same unit
) -> Tensor:  # (...,N,M) in [-1,1]
    "Generalised IoU of all pairs (@eq-boxes-giou); its gradient does not vanish where boxes do not touch"
    a, b, inter, union = _overlap(a, b)
    hull = _area(torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:]))
    return _ratio(inter, union) - _ratio(hull - union, hull)


# %% [markdown]
# Leading axes broadcast: for $N$ *pairs* instead of all $N\times M$ call it with `a[:, None]` and
# `b[:, None]`. In the figure a box of side 2 moves away from a fixed one.

# %%
#| label: fig-boxes-giou
#| fig-cap: "Once the boxes no longer touch (shift 2), IoU is flat at 0 while GIoU still falls, so its gradient pulls even a distant box back."
#| fig-alt: "Two curves over the shift from 0 to 8: IoU falls from 1 to 0 at shift 2 and stays 0; GIoU falls from 1 through 0 at shift 2 to minus 0.6 at shift 8."
shift = torch.linspace(0, 8, 81)
moved = unit_a + shift[:, None] * torch.tensor([1.0, 0.0, 1.0, 0.0])
fig_giou, ax_giou = plt.subplots(figsize=(4.5, 2.4), dpi=80)
ax_giou.plot(shift, box_iou(moved, unit_a)[:, 0], color='black', ls='--', label='IoU')
ax_giou.plot(shift, generalized_box_iou(moved, unit_a)[:, 0], color='black', label='GIoU')
ax_giou.set(xlabel='shift (boxes have side 2)')
ax_giou.axhline(0, color='black', lw=0.5)
ax_giou.legend()
apart = torch.tensor([(8 - 12) / 12, (8 - 20) / 20])  # at shift 4 and 8: IoU 0, union 8, hull 12 and 20
assert torch.allclose(generalized_box_iou(moved[[40, 80]], unit_a)[:, 0], apart, atol=1e-6)

# %% [markdown]
# The gradient does not vanish for an empty prediction either:

# %%
dot = torch.tensor([[5.0, 5.0, 5.0, 5.0]], requires_grad=True)
generalized_box_iou(dot, unit_a).sum().backward()
assert dot.grad.isfinite().all() and dot.grad.abs().sum() > 0
dot.grad


# %% [markdown]
# ## From view to view
#
# Every view keeps a matrix $M$ that maps homogeneous pixels $(x,y,1)$ of the original image to pixels of the
# view; operations multiply from the left. With $M_t$ and $M_s$ those of the teacher's (weak) and of the
# student's (strong) view, a pseudo box is mapped by
#
# $$ M = M_s M_t^{-1}, \qquad b' = \mathrm{clamp}\Big(\mathrm{hull}\big\{ M(x_i, y_j, 1)^\top : i,j\in\{1,2\} \big\}\Big) $$ {#eq-boxes-transport}
#
# In words: all four corners are mapped, and their axis-aligned hull is clamped to $[0,W]\times[0,H]$ of the
# unpadded target.
#
# **Paper vs. code.** A box that leaves the view collapses to a line on its border. The reference
# implementation keeps such boxes as pseudo labels; `transform_boxes` returns every row *and* a mask of those
# that are still boxes, and leaves the choice to the caller.

# %%
#| export
def transform_boxes(
    xyxy: Tensor,  # (N,4) pixels of the source view
    matrix: Tensor,  # (3,3) source pixels -> target pixels
    size,  # (H, W) of the unpadded target view
    min_side: float = 1.0,  # boxes whose shorter side is not longer than this are not kept, pixels
):  # ((N,4) xyxy pixels of the target, clamped; (N,) bool: is it still a box)
    "Map four corners, clamp their hull to the view (@eq-boxes-transport); NaN rows stay NaN and are kept"
    h, w = (int(s) for s in size)
    m = matrix.to(device=xyxy.device, dtype=torch.float64)
    x1, y1, x2, y2 = xyxy.to(torch.float64).unbind(-1)
    one = torch.ones_like(x1)
    corners = [torch.stack([x, y, one], -1) for x, y in ((x1, y1), (x2, y1), (x1, y2), (x2, y2))]
    p = torch.stack(corners, 1) @ m.T
    p = p[..., :2] / p[..., 2:]
    lo, hi = p.amin(1), p.amax(1)
    limit = p.new_tensor([w, h])
    out = torch.cat([lo.clamp(min=0).minimum(limit), hi.clamp(min=0).minimum(limit)], -1).to(xyxy.dtype)
    keep = ~(out[:, 2:] - out[:, :2] <= min_side).any(-1)
    return out, keep


# %% [markdown]
# Three maps of a view of 100 x 100 that are easy to check by hand: a flip $x\mapsto W-x$, a quarter turn
# $(x,y)\mapsto(100-y,x)$, and a shift by 500 that moves the box out of the view: it collapses onto the right
# border, and its mask is false.

# %%
maps = dict(
    flip=torch.tensor([[-1.0, 0, 100], [0, 1, 0], [0, 0, 1]]),
    turn=torch.tensor([[0.0, -1, 100], [1, 0, 0], [0, 0, 1]]),
    shift=torch.tensor([[1.0, 0, 500], [0, 1, 0], [0, 0, 1]]),
)
mapped = {name: transform_boxes(corner_box, m, (100, 100)) for name, m in maps.items()}
assert mapped['flip'][0].tolist() == [[70.0, 20.0, 90.0, 40.0]]
assert mapped['turn'][0].tolist() == [[60.0, 10.0, 80.0, 30.0]]
assert mapped['shift'][0].tolist() == [[100.0, 20.0, 100.0, 40.0]] and not mapped['shift'][1].any()
{name: (box.tolist(), keep.tolist()) for name, (box, keep) in mapped.items()}

# %% [markdown]
# Flip, scale and shift can be undone. A rotation cannot: the hull of a rotated box is larger, and rotating it
# back enlarges it again.

# %%
#| label: fig-boxes-hull
#| fig-cap: "A box (green) rotated by 25 degrees needs a larger hull (orange); rotated back, the hull contains the original box but is larger (dashed)."
#| fig-alt: "Left, a green box in a frame. Middle, the same box rotated, with an orange upright box around it. Right, the green box with a larger dashed box around it."
angle = torch.deg2rad(torch.tensor(25.0, dtype=torch.float64))
to_centre, c, s = torch.eye(3, dtype=torch.float64), angle.cos(), angle.sin()
to_centre[:2, 2] = -50
turn = to_centre.inverse() @ torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]], dtype=torch.float64) @ to_centre
box = torch.tensor([[25.0, 40.0, 70.0, 65.0]])
there, _ = transform_boxes(box, turn, (100, 100))
back, _ = transform_boxes(there, turn.inverse(), (100, 100))
outline = torch.tensor([[25.0, 70, 70, 25, 25], [40, 40, 65, 65, 40], [1, 1, 1, 1, 1]], dtype=torch.float64)
fig_hull, axes = plt.subplots(1, 3, figsize=(5.4, 1.9), dpi=80)
for ax, name in zip(axes, ('the box', 'rotated', 'rotated back')):
    ax.set(xlim=(0, 100), ylim=(100, 0), xticks=[], yticks=[], aspect='equal', title=name)
draw_boxes(axes[0], box)
axes[1].plot(*(turn @ outline)[:2], color=COLORS['truth'])
draw_boxes(axes[1], there, kind='teacher')
draw_boxes(axes[2], box)
draw_boxes(axes[2], back, kind='mined')
assert (back[:, :2] <= box[:, :2]).all() and (back[:, 2:] >= box[:, 2:]).all()

# %% [markdown]
# How much larger? The IoU of the box with the box that was rotated forth and back measures it. This loss
# comes from the rotations of the strong view, not from the detector:

# %%
iou_back = box_iou(box, back).item()
assert 0.25 < iou_back < 0.35
round(iou_back, 3)

# %% [markdown]
# No boxes are a normal input:

# %%
nothing, kept = transform_boxes(torch.zeros(0, 4), turn, (100, 100))
assert nothing.shape == (0, 4) and kept.shape == (0,)
nothing, kept

# %% [markdown]
# ## Summary
#
# * `xyxy` is in pixels, `cxcywh` in fractions of the unpadded size; sizes are $(H,W)$.
# * `inverse_sigmoid` has a floor, so that a coordinate on the border has a finite logit.
# * IoU and GIoU of empty boxes are defined and differentiable; NaN stays NaN.
# * `transform_boxes` maps four corners and clamps their hull; the mask tells what is still a box.
# * Rotation and shear enlarge boxes: mapped forth and back, a box is larger than the original.
#
# ## Exercises
#
# 1. Map only two corners, $(x_1,y_1)$ and $(x_2,y_2)$. For which of flip, scale, shift, turn, shear does this
#    give the right hull?
# 2. By how much does the hull of a square grow at 30 degrees? Derive it and check it with `transform_boxes`.
# 3. Replace `_ratio` by plain division and compute the GIoU loss of an empty prediction and an empty target
#    at the same place. Which becomes NaN: the value, the gradient, or both?
