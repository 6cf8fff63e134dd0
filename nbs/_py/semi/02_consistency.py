# %% [markdown]
# # Cross-view query consistency {#sec-consistency}
#
# > Give two decoders the same query in two views of an image, and train the student towards the teacher.
#
# A detector should give the same output for an object in every view of an image. Training this needs pairs of
# outputs, one of the strong view and one of the weak view. Dense detectors have them: the same cell covers the
# same place. In a transformer each view selects its own proposals, so the queries of the same number belong to
# different objects. Cross-view queries provide the correspondence: a content vector is computed from the
# teacher's features at a pseudo box and given to *both* decoders, each with the position of that box in its
# own view. The two outputs then belong to the same object and can be compared.

# %%
#| default_exp semi.consistency

# %%
#| hide
import warnings

warnings.filterwarnings('ignore', message='IProgress')

# %%
#| export
import math
from dataclasses import dataclass
import torch
import torch.nn.functional as F
from torch import nn, Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import roi_align
from semidetr.boxes import denormalize_boxes, inverse_sigmoid, normalize_boxes
from semidetr.core import ConfigError, all_reduce_mean, at_least_float32, in_range, one_of, world_size
from semidetr.detectors.denoising import ExtraQueries, group_mask
from semidetr.many import OVER, counts_of_all, synced_norm, together, total_of_all
from semidetr.matching.matching import stage_of
from semidetr.semi.teacher import in_both_views, transport

# %%
import matplotlib.pyplot as plt
from semidetr.boxes import box_iou, transform_boxes
from semidetr.data.augment import ViewConfig, strong_view, weak_view
from semidetr.data.digits import DigitsScenes
from semidetr.data.loader import collate
from semidetr.detectors.backbone import BackboneConfig
from semidetr.detectors.denoising import DenoisingConfig, combine_extras, denoising_queries
from semidetr.detectors.detector import Detector, DetectorConfig
from semidetr.detectors.transformer import TransformerConfig
from semidetr.draw import COLORS, draw_boxes, show_image
from semidetr.semi.teacher import make_teacher

# %% [markdown]
# The problem in an example: an untrained detector and two views of four scenes. The proposals of the weak
# view are moved to the strong view. Proposals of the same number rarely overlap:

# %%
torch.manual_seed(0)
student = Detector(
    DetectorConfig(
        10,
        BackboneConfig('efficientnet_lite0', out_strides=(8,)),
        TransformerConfig(d_model=64, n_levels=2, enc_layers=1, dec_layers=3, ffn=128, num_queries=30),
    )
).train()
teacher = make_teacher(student)
view_cfg = ViewConfig(short_sides=(96,), mean=student.backbone.mean, std=student.backbone.std)
scenes = DigitsScenes('train', n=16)


def two_views(numbers, seed=0):
    "(weak part, strong part, true boxes as detections in the weak view) of some scenes"
    weak = [weak_view(scenes[i], view_cfg, seed + i) for i in numbers]
    strong = [strong_view(scenes[i], view_cfg, 100 + seed + i) for i in numbers]
    detections = [dict(boxes=v.boxes, labels=v.labels, scores=torch.ones(len(v.labels))) for v in weak]
    return collate(weak), collate(strong, truth=False), detections


weak, strong, detections = two_views([3, 5, 9, 11])
with torch.no_grad():
    a, b = (student.encode(p['images'], p['mask']).reference_logits.sigmoid() for p in (weak, strong))
ious = []
for x, y, w, s in zip(a, b, weak['targets'], strong['targets']):
    matrix = s['matrix'] @ w['matrix'].inverse()
    x_strong, _ = transform_boxes(denormalize_boxes(x, w['size']), matrix, s['size'])
    ious.append(box_iou(x_strong, denormalize_boxes(y, s['size'])).diag())
share = torch.stack(ious).gt(0.5).float().mean().item()
assert share < 0.2
print(f'{share:.0%} of the proposals with the same number overlap by half')


# %% [markdown]
# ## Settings
#
# The official code differs from the paper's text in most details of this part. Every difference is a setting,
# and the boxes *Paper vs. code* below explain them. The settings of comparisons (`jittered`, `random`,
# `dense`, `hungarian`) are implemented in @sec-variants.

# %%
#| export
@dataclass(frozen=True)
class ConsistencyConfig:
    "Cross-view query consistency (paper section 3.3); the defaults are the official code's, but for `groups`"

    weight: float = 10.0  # factor before w_u (paper: w_c=1 without w_u, so 1/w_u here); 0: no queries at all
    cross: str = 'one'  # features of the queries: 'one' teacher's (code), 'swap' other view's (paper), 'both'
    norm: bool = True  # compare L2-normalised outputs (code); False: plain MSE (paper)
    until: str = 'T1'  # 'T1': the one-to-many stage only (code); 'end': the whole training (paper)
    groups: int = 1  # identical copies of the queries (code: 5, the same gradients at five times the cost)
    boxes: str = 'mined'  # 'mined': B^con (paper); 'score': B^sup; 'jittered': noisy B^sup; 'random'; 'none'
    jitter: float = 0.4  # 'jittered': corners move by up to this share of half the size
    n_random: int = 10  # 'random': boxes per image
    correspondence: str = 'cross_view'  # 'hungarian': matched predictions of both networks, no extra queries
    density: str = 'sparse'  # 'dense': also all teacher detections of an image; without any, a grid
    grid: int = 4  # 'dense': cells per side
    slot_weights: str = 'code'  # 'code': mean weight times mean distance; 'slots': boxes count 1, dummies 0
    projector: str = 'code'  # 'code': two convolutions, two linear layers; 'mlp': linear layers alone (paper)
    hidden: int = 1024  # width between the linear layers
    top: int = 100  # 'hungarian': best teacher queries per image
    # means and batch norms over the boxes of 'all' processes, or of each 'process' (code)
    normalise: str = 'all'

    def __post_init__(self):
        one_of(
            'consistency',
            self,
            cross=('one', 'swap', 'both'),
            until=('T1', 'end'),
            boxes=('mined', 'score', 'jittered', 'random', 'none'),
            density=('sparse', 'dense'),
            correspondence=('cross_view', 'hungarian'),
            slot_weights=('code', 'slots'),
            projector=('code', 'mlp'),
            normalise=OVER,
        )
        in_range('consistency', self, weight=0, groups=1, jitter=0, n_random=0, grid=1, hidden=1, top=1)
        if self.jitter >= 1:
            raise ConfigError(f'consistency.jitter={self.jitter} must be below 1, or boxes turn inside out')

    @property
    def needs_queries(self) -> bool:
        "Are there cross-view queries, which need a `Projector`?"
        return (
            self.weight > 0
            and self.correspondence == 'cross_view'
            and (self.boxes != 'none' or self.density == 'dense')
        )


# %%
#| export
def consistency_active(
    step: int,  # iteration t
    T1: int,  # first iteration of the one-to-one stage
    cfg: ConsistencyConfig = ConsistencyConfig(),  # `weight`, `until`
) -> bool:
    "Is the loss part of this step? With `until='T1'` and T1=0 it never is"
    return cfg.weight > 0 and (cfg.until == 'end' or stage_of(step, T1) == 'o2m')


# %%
assert [consistency_active(t, T1=10) for t in (9, 10)] == [True, False]
assert consistency_active(10, T1=10, cfg=ConsistencyConfig(until='end'))
ConsistencyConfig()


# %% [markdown]
# ::: {.callout-note}
# ## Paper vs. code
# In the paper the loss is independent of the two stages and part of the whole training (`until='end'`). The
# code sets its weight to zero when one-to-one matching begins (`until='T1'`).
# :::
#
# ## Features of a box
#
# The features are the pyramid between backbone and encoder. The cells of its level $\ell$ have a side of
# $s_\ell=2^\ell s_0$ pixels. The features of a box $b$ of $w\times h$ pixels are sampled from the level
#
# $$
# \ell(b) = \min\left(L-1,\; \max\left(0,\; \left\lfloor \log_2\left(\frac{\sqrt{wh}}{7\,s_0}+10^{-6}\right) \right\rfloor\right)\right)
# $$ {#eq-consistency-level}
#
# of the $L$ levels, in a grid of $7\times7$ bins. On that level a bin of a medium box is between one and two
# cells wide, so that all cells are used and none is repeated. With the usual $s_0=8$ the limits are boxes of
# 112, 224 and 448 pixels.

# %%
#| export
def pyramid_strides(
    features,  # L maps (B,d,h,w)
    frame,  # (H, W) of the padded batch that they were computed from
) -> list:  # L pairs: pixels per cell, down and across
    "The size of a cell of each level in pixels, as deformable attention defines it"
    return [(frame[0] / f.shape[-2], frame[1] / f.shape[-1]) for f in features]


def roi_level(
    xyxy: Tensor,  # (N,4) pixels
    n_levels: int,  # L
    stride: float = 8.0,  # s_0 of the finest level; it doubles from level to level
) -> Tensor:  # (N,) int64 in 0..L-1
    "The level whose cells suit the size of the box (@eq-consistency-level)"
    side = (xyxy[:, 2:] - xyxy[:, :2]).clamp(min=0).prod(1).sqrt()
    return (side / (7 * stride) + 1e-6).log2().floor().clamp(0, n_levels - 1).long()


# %%
sides = torch.tensor([100.0, 112, 223, 224, 448])
squares = torch.stack([0 * sides, 0 * sides, sides, sides], 1)
assert roi_level(squares, 4).tolist() == [0, 1, 1, 2, 3]
dict(zip(sides.tolist(), roi_level(squares, 4).tolist()))


# %% [markdown]
# RoIAlign samples the level bilinearly and averages within each bin. Padding is to the right of and below an
# image, so pixels of a view are pixels of the padded batch. The size of a cell is the size of the batch
# divided by that of the map, in each direction.

# %%
#| export
def roi_features(
    pyramid,  # L maps (B,d,h,w)
    boxes,  # per image (n_i,4) xyxy, pixels of its view
    strides,  # L numbers, or L pairs (down, across), as of `pyramid_strides`
    size: int = 7,  # bins per side
) -> Tensor:  # (N,d,size,size), N = sum of n_i, in the order of `boxes`; float32 at least
    "Features of boxes from their levels of a pyramid (RoIAlign: half-pixel aligned, adaptive, average)"
    xyxy = torch.cat([b.reshape(-1, 4) for b in boxes])
    dtype = torch.promote_types(pyramid[0].dtype, torch.float32)
    if not len(xyxy):
        return pyramid[0].new_zeros(0, pyramid[0].shape[1], size, size, dtype=dtype)
    down_across = [s if isinstance(s, (tuple, list)) else (s, s) for s in strides]
    scale = xyxy.new_tensor(down_across).flip(1).repeat(1, 2)  # (L,4): x,y,x,y
    counts = torch.tensor([len(b) for b in boxes], device=xyxy.device)
    image = torch.repeat_interleave(torch.arange(len(boxes), device=xyxy.device), counts)
    level = roi_level(xyxy, len(pyramid), 2.0 ** round(math.log2(max(scale[0].tolist()))))
    rois = torch.cat([image[:, None].to(xyxy.dtype), xyxy / scale[level]], 1).to(dtype)
    where = [(level == i).nonzero().flatten() for i in range(len(pyramid))]
    found = [roi_align(f.to(dtype), rois[w], size, aligned=True) for f, w in zip(pyramid, where) if len(w)]
    return torch.cat(found)[torch.cat(where).argsort()]


# %% [markdown]
# A map whose values are the $x$ coordinates of its cells must return the centres of the bins:

# %%
ramp = (torch.arange(12.0) + 0.5).mul(8).expand(1, 1, 12, 12)
bins = roi_features([ramp], [torch.tensor([[13.0, 20, 69, 60]])], pyramid_strides([ramp], (96, 96)))
assert torch.allclose(bins[0, 0, 0], 13 + 8 * (torch.arange(7) + 0.5), atol=1e-4)
bins[0, 0, 0]


# %% [markdown]
# ## The projector
#
# A small network $P$ maps the $7\times7$ features to a content vector. It belongs to neither detector: there
# is one instance, trained through the student's decoder, not averaged, and not used after training. Its batch
# normalisation uses the statistics of the boxes of the step, those of all processes (@eq-many-norm). A single box
# has none and is normalised by the running averages.

# %%
#| export
def _norm(bn, x, n, over):
    "Batch statistics where there is a batch of n boxes; for a single box the running ones"
    if n > 1:
        return synced_norm(bn, x) if together(over) else bn(x)
    return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)


class Projector(nn.Module):
    "P: features of a box -> content of a query; one instance, trained through the student's decoder"

    def __init__(
        self,
        d_model: int,  # d
        hidden: int = 1024,  # width between the two linear layers
        kind: str = 'code',  # 'code' or 'mlp', see `ConsistencyConfig.projector`
        size: int = 7,  # bins per side of the features
        normalise: str = 'all',  # see `ConsistencyConfig.normalise`
    ):
        super().__init__()
        self.kind, self.over = kind, normalise
        if kind == 'code':
            self.convs = nn.ModuleList(
                nn.Conv2d(d_model, d_model, 3, padding=1, bias=False) for _ in range(2)
            )
            self.norms = nn.ModuleList(
                [nn.BatchNorm2d(d_model), nn.BatchNorm2d(d_model), nn.BatchNorm1d(hidden)]
            )
        self.fc1, self.fc2 = nn.Linear(d_model * size * size, hidden), nn.Linear(hidden, d_model)

    def forward(
        self,
        x: Tensor,  # (N,d,size,size); N may be 0
    ) -> Tensor:  # (N,d), in the precision of the weights, whatever the autocast
        n = total_of_all(len(x), x.device) if together(self.over) else len(x)
        if not n:
            return x.new_zeros(0, self.fc2.out_features, dtype=self.fc2.weight.dtype)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.fc1.weight.dtype)
            if self.kind == 'mlp':
                return self.fc2(F.relu(self.fc1(x.flatten(1))))
            for conv, bn in zip(self.convs, self.norms):
                x = F.relu(_norm(bn, conv(x), n, self.over))
            return F.relu(self.fc2(F.relu(_norm(self.norms[2], self.fc1(x.flatten(1)), n, self.over))))

    def idle(self) -> Tensor:  # scalar 0
        "Zero with a zero gradient for every parameter: for steps without cross-view queries"
        return sum(0 * p.sum() for p in self.parameters())


# %%
project = Projector(8, hidden=16)
assert project(torch.randn(5, 8, 7, 7)).shape == (5, 8) and project(torch.zeros(0, 8, 7, 7)).shape == (0, 8)
assert project(torch.randn(1, 8, 7, 7)).isfinite().all()
[tuple(p.shape) for p in project.parameters() if p.ndim > 1]


# %% [markdown]
# ::: {.callout-note}
# ## Paper vs. code
# The paper describes backbone features and an MLP (`projector='mlp'`); the code takes the projected pyramid
# and puts two convolutions in front (`'code'`), each layer with batch norm and ReLU, the last one with ReLU
# alone.
# :::
#
# ## The boxes in both views
#
# The boxes are those of $B^{con}$ (@sec-mining). A consistency target tolerates errors that a detection target
# does not: it contains no class and no box, only "the same output as the teacher's". A box therefore has to
# cover an object, but does not have to fit it tightly.
#
# Boxes are moved like pseudo labels, by the matrices of the two views (@eq-teacher-transport), and those that
# leave the strong view are dropped from both. The boxes of $B^0$ have been moved already, to get their costs;
# their position in the strong view is reused.

# %%
#| export
def con_boxes(
    con: list,  # B^con: per image dict(boxes (n,4) xyxy pixels of the weak view, labels, scores, ...)
    *args,  # what the variants need (`box_picker`); not used
    **kwargs,  # likewise
) -> list:  # per image as `con`
    "The boxes of the cross-view queries as in the paper: B^con"
    return con


def pair_boxes(
    picked: list,  # per image dict(boxes (n,4) xyxy pixels of the weak view, labels, scores[, boxes_strong])
    weak: list,  # targets of the weak views
    strong: list,  # targets of the strong views of the same images
    cfg: ConsistencyConfig = ConsistencyConfig(),  # `slot_weights`
    min_side: float = 1.0,  # pixels; boxes that are smaller in the strong view are dropped
) -> list:  # per image dict of weak, strong: (n,4) xyxy; weak_ref, strong_ref: (n,4) cxcywh; weight (n,)
    """The same boxes in both views; those with `boxes_strong` (`in_both_views`) are not moved again. With
    `slot_weights='code'` an image without boxes gets a dummy of weight 0, the middle half of the view"""
    out = []
    for p, w, s in zip(picked, weak, strong):
        if 'boxes_strong' not in p:
            (p,) = in_both_views([p], transport([p], [w], [s], min_side))
        weak_ref, strong_ref = normalize_boxes(p['boxes'], w['size']), p['boxes_strong']
        weight = weak_ref.new_ones(len(weak_ref))
        if not len(weak_ref) and cfg.slot_weights == 'code':
            weak_ref, strong_ref = weak_ref.new_full((1, 4), 0.5), strong_ref.new_full((1, 4), 0.5)
            weight = weak_ref.new_zeros(1)
        out.append(
            dict(
                weak=denormalize_boxes(weak_ref, w['size']),
                strong=denormalize_boxes(strong_ref, s['size']),
                weak_ref=weak_ref,
                strong_ref=strong_ref,
                weight=weight,
            )
        )
    return out


# %%
#| label: fig-consistency-boxes
#| fig-cap: "One scene in both views: each box still contains its object after flip, shift and scaling, but not always on the same level of the pyramid, which depends on its size in pixels."
#| fig-alt: "Left the weak view, right the larger strong view with changed colours; the digits are framed in both, in colours that stand for levels 0 and 1 of the pyramid; three boxes change from 0 to 1"
views = [
    weak_view(scenes[3], ViewConfig(short_sides=(400,)), 2),
    strong_view(scenes[3], ViewConfig(short_sides=(640,), erase_patches=(0, 0)), 7),
]
targets = [dict(size=v.size, matrix=v.matrix) for v in views]
true_boxes = dict(boxes=views[0].boxes, labels=views[0].labels, scores=torch.ones(len(views[0].labels)))
(paired,) = pair_boxes([true_boxes], targets[:1], targets[1:])
fig, axes = plt.subplots(1, 2, figsize=(5.4, 3), dpi=80, layout='constrained')
classes = ['level 0', 'level 1', 'level 2']
for ax, v, name in zip(axes, views, ('weak', 'strong')):
    title = f'{name}, {v.size[1]} x {v.size[0]} pixels'
    show_image(ax, v.image, ViewConfig().mean, ViewConfig().std, title=title)
    for level, kind in enumerate(('truth', 'student', 'teacher')):
        on = roi_level(paired[name], 4) == level
        draw_boxes(ax, paired[name][on], torch.full((int(on.sum()),), level), classes=classes, kind=kind)
plt.show()

# %% [markdown]
# Boxes that know their place in the strong view give the same pairs as those that are moved here:

# %%
both = in_both_views([true_boxes], transport([true_boxes], targets[:1], targets[1:]))
(again,) = pair_boxes(both, targets[:1], targets[1:])
assert all(torch.equal(paired[k], again[k]) for k in paired)
sorted(both[0])


# %% [markdown]
# ## Queries for both decoders
#
# Let $F_t$ and $F_s$ be the pyramids of the teacher's weak and the student's strong view, $b_n$ a box of the
# weak view, and $Mb_n$ the same box in the strong one. Its content vectors are
#
# $$
# c_n^t = P\left(\mathrm{RoIAlign}(F_t, b_n)\right), \qquad c_n^s = P\left(\mathrm{RoIAlign}(F_s, M b_n)\right)
# $$ {#eq-consistency-content}
#
# and a decoder gets a query with one of the two as content and the box of its own view as reference:
#
# | `cross` | student, reference $Mb_n$ | teacher, reference $b_n$ |
# |---|---|---|
# | `'one'` | $c_n^t$ | $c_n^t$ |
# | `'swap'` | $c_n^t$ | $c_n^s$ |
# | `'both'` | $c_n^t$, and a second set $c_n^s$ | $c_n^t$, and a second set $c_n^s$ |
#
# There is no gradient to $F_t$ and to the teacher; $P$ and the student are trained.
#
# ::: {.callout-note}
# ## Paper vs. code
# The paper's equations and figure cross both ways (`cross='swap'`). The code uses the teacher's features
# only, for both decoders (`'one'`). The third way adds the mirror image of the code's term.
#
# The code also makes five identical copies of every set, in groups that cannot attend to each other. Equal
# queries give equal outputs: loss and gradients are those of one copy, as the tests show, so one is the
# default here (`groups=5` is the official number).
# :::
#
# Images of a batch have different numbers of boxes; each gets as many slots as the image with the most. A slot
# with a box has weight 1. In an image without boxes the code places a dummy in the middle, with weight 0. The
# remaining slots are unused and marked by -1. Slots of a group attend to each other, empty ones too, so their
# number is that of all processes.

# %%
#| export
def cross_view_queries(
    content: Tensor,  # (N,d), flat over the images
    counts,  # boxes of each image, sum N
    reference,  # per image (n_i,4) cxcywh normalised
    groups: int = 1,  # G identical copies
    weight=None,  # per image (n_i,): 1 for boxes, 0 for dummies; None: all 1
    name: str = 'consistency',
    n_max: int = 0,  # least slots per image and group: the largest count of other processes
) -> ExtraQueries | None:  # B images of G*n_max slots; None without boxes
    """One query per box, as the decoder takes them in front of the matching queries. `meta` holds the weight
    (B,G*n_max) of each slot, -1 in unused ones, `groups` and `n_max`"""
    n = max([n_max, *counts])
    if not n:
        return None

    def slots(x, fill=0.0):  # (N,...) -> (B,G*n,...)
        padded = pad_sequence(x.split(list(counts)), batch_first=True, padding_value=fill)
        if n > max(counts):
            padded = torch.cat(
                [padded, padded.new_full((len(padded), n - max(counts), *x.shape[1:]), fill)], 1
            )
        return padded.repeat(1, groups, *[1] * (x.ndim - 1))

    boxes = torch.cat(list(reference))
    w = content.new_ones(len(content)) if weight is None else torch.cat(list(weight))
    mask = group_mask(groups, n).to(content.device)
    meta = dict(weight=slots(w, -1.0), groups=groups, n_max=n)
    return ExtraQueries(slots(content), slots(inverse_sigmoid(boxes)), mask, name, meta)


# %%
queries = cross_view_queries(
    torch.randn(4, 8), [3, 0, 1], [torch.rand(3, 4), torch.zeros(0, 4), torch.rand(1, 4)], groups=2
)
assert queries.content.shape == (3, 6, 8) and queries.meta['weight'][2].tolist() == [1, -1, -1] * 2
queries.meta

# %% [markdown]
# The attention mask separates the sets. Matching queries must not attend to cross-view queries, whose
# positions alone reveal the pseudo boxes; the network would depend on them and miss them at test time.
# Denoising queries contain true labels, so they and the cross-view queries do not attend to each other.
# Cross-view queries may attend to the matching queries, as denoising queries do.

# %%
#| label: fig-consistency-mask
#| fig-cap: "The attention mask (white: allowed) of two groups of cross-view queries, two of denoising queries and ten matching queries. A group attends to itself and to the matching queries, which attend to each other only."
#| fig-alt: "Square matrix; four white blocks on the diagonal, white columns on the right for the matching queries, the rest dark"
noisy = denoising_queries(
    [dict(labels=torch.tensor([1, 2]), boxes=torch.full((2, 4), 0.5))] * 3,
    nn.Embedding(10, 8),
    10,
    DenoisingConfig(num=8),
)
_, _, blocked, _ = combine_extras([queries, noisy], num_queries=10)
fig, ax = plt.subplots(figsize=(3.2, 3.2), dpi=80)
ax.imshow(blocked, cmap='gray_r', vmin=0, vmax=1.3)
ticks, names = [1, 4, 7.5, 11.5, 18.5], ['C1', 'C2', 'D1', 'D2', 'matching']
ax.set(xlabel='may attend to', ylabel='query', xticks=ticks, yticks=ticks)
ax.set_xticklabels(names)
ax.set_yticklabels(names)
for at in (2.5, 5.5, 9.5, 13.5):
    ax.axhline(at, color='grey', lw=0.5)
    ax.axvline(at, color='grey', lw=0.5)
plt.show()


# %% [markdown]
# From pairs of boxes to queries for both decoders:

# %%
#| export
def cross_view_extras(
    projector,  # P: (N,d,7,7) -> (N,d)
    teacher,  # `Encoded` of the weak views
    student,  # `Encoded` of the strong views, with gradient
    pairs: list,  # from `pair_boxes`
    frames,  # ((H, W) of the padded weak batch, (H, W) of the padded strong batch)
    cfg: ConsistencyConfig = ConsistencyConfig(),  # `cross`, `groups`
) -> tuple:  # (extra queries of the student's decoder, those of the teacher's); two empty lists without boxes
    "The same queries for both decoders (@eq-consistency-content)"
    counts, weight = [len(p['weight']) for p in pairs], [p['weight'] for p in pairs]
    device = student.features[0].device
    everywhere = counts_of_all(counts, cfg.normalise, device)[0] if cfg.needs_queries else []
    n_max = max(everywhere, default=0)
    if not n_max:
        return [], []

    def content(features, frame, view):
        return projector(roi_features(features, [p[view] for p in pairs], pyramid_strides(features, frame)))

    def queries(c, view, name='consistency'):
        reference = [p[view + '_ref'] for p in pairs]
        return cross_view_queries(c, counts, reference, cfg.groups, weight, name, n_max)

    c_t = content([f.detach() for f in teacher.features], frames[0], 'weak')
    if cfg.cross == 'one':
        return [queries(c_t, 'strong')], [queries(c_t.detach(), 'weak')]
    if cfg.cross == 'swap':
        with torch.no_grad():
            c_s = content(student.features, frames[1], 'strong')
        return [queries(c_t, 'strong')], [queries(c_s, 'weak')]
    mirror = 'consistency_mirror'
    c_s = content(student.features, frames[1], 'strong')
    of_student = [queries(c_t, 'strong'), queries(c_s, 'strong', mirror)]
    of_teacher = [queries(c_t.detach(), 'weak'), queries(c_s.detach(), 'weak', mirror)]
    return of_student, of_teacher


# %% [markdown]
# The two views of the scenes above, with the true boxes as pseudo boxes. The queries of the two decoders have
# the same content and different references:

# %%
projector = Projector(64, hidden=128)
frames = weak['images'].shape[-2:], strong['images'].shape[-2:]
pairs = pair_boxes(detections, weak['targets'], strong['targets'])
with torch.no_grad():
    encoded_weak = teacher.encode(weak['images'], weak['mask'])
encoded_strong = student.encode(strong['images'], strong['mask'])
(q_s,), (q_t,) = cross_view_extras(projector, encoded_weak, encoded_strong, pairs, frames)
assert torch.equal(q_s.content, q_t.content)
assert q_s.content.requires_grad and not q_t.content.requires_grad
q_s.boxes[0, 0].sigmoid(), q_t.boxes[0, 0].sigmoid()


# %% [markdown]
# ## The loss
#
# Let $h_n^s\in\mathbb{R}^d$ be the output of the student's decoder layer $i$ for box $n$, and $h_n^t$ that of
# the teacher's. With $N$ used slots in the batch, slot weights $w_n$ and their mean $\bar w$,
#
# $$
# L_{con}^{(i)} = \lambda\,\bar w\;\frac{1}{N d}\sum_{n=1}^{N}\left\lVert \frac{h_n^s}{\lVert h_n^s\rVert} - \mathrm{sg}\left[\frac{h_n^t}{\lVert h_n^t\rVert}\right]\right\rVert^2
# $$ {#eq-consistency-loss}
#
# where $\mathrm{sg}$ stops the gradient and $\lambda=10$. Orthogonal outputs are $\sqrt2$ apart, so unrelated
# outputs have a loss of $10\cdot2/256=0.078$ per layer at $d=256$, opposite ones twice that, equal ones zero.
# $N$ and $\bar w$ are those of the images of all processes; on $W$ processes the sum is divided by $N/W$, as in
# @eq-many-normaliser.
#
# ::: {.callout-note}
# ## Paper vs. code
# The paper's loss is a plain mean squared error with factor one outside of $w_u$ (`norm=False`, `weight`
# $=1/w_u$). The code was meant to weight every slot by its own $w_n$, but because of mismatched shapes it
# multiplies two means, as in @eq-consistency-loss (`slot_weights='code'`); in doing so it computes all
# $N\times N$ pairs, a gigabyte at a thousand slots. Here memory grows with $N$ alone, and
# `slot_weights='slots'` averages over the slots with boxes, without dummies.
# :::

# %%
#| export
def consistency_loss(
    hs_student: Tensor,  # (layers,B,P,d) outputs of the decoder
    hs_teacher: Tensor,  # likewise; detached
    weight: Tensor,  # (B,P) 1: box, 0: dummy, negative: unused
    cfg: ConsistencyConfig = ConsistencyConfig(),  # `weight`, `norm`, `slot_weights`
) -> dict:  # loss_con_0, loss_con_1, ... one scalar per decoder layer
    "Distance of the outputs of two decoders for the same boxes (@eq-consistency-loss)"
    used = weight >= 0
    s = at_least_float32(hs_student[:, used])
    t = hs_teacher.detach()[:, used].to(s.dtype)
    w = weight[used].to(s.dtype)
    if cfg.norm:
        s, t = F.normalize(s, dim=-1), F.normalize(t, dim=-1)
    distance = (s - t).square().mean(-1)  # (layers,N)
    n, w_sum, share = len(w), w.sum(), 1
    if together(cfg.normalise):
        n, w_sum, share = total_of_all(n, w.device), all_reduce_mean(w_sum), 1 / world_size()
    if cfg.slot_weights == 'code':
        n = max(1, n) * share
        per_layer = distance.sum(1) / n * (w_sum / n)
    else:
        per_layer = (distance * w).sum(1) / w_sum.clamp(min=share)
    return {f'loss_con_{i}': cfg.weight * v for i, v in enumerate(per_layer)}


def cross_view_losses(
    student: dict,  # outputs of a decoder with the first list of `cross_view_extras`
    teacher: dict,  # outputs of a decoder with the second
    cfg: ConsistencyConfig = ConsistencyConfig(),  # of `consistency_loss`
) -> dict:  # loss_con_0, ...; empty if there were no cross-view queries
    "Sum of the losses of all sets of cross-view queries"
    total = {}
    for name, s in student['extra'].items():
        if not name.startswith('consistency'):
            continue
        for k, v in consistency_loss(s['hs'], teacher['extra'][name]['hs'], s['meta']['weight'], cfg).items():
            total[k] = total.get(k, 0) + v
    return total


# %%
one_slot, e = torch.ones(1, 1), torch.eye(256)[:2]
costs = {
    name: consistency_loss(e[:1].expand(1, 1, 1, 256), t.expand(1, 1, 1, 256), one_slot)['loss_con_0'].item()
    for name, t in (('equal', 5 * e[:1]), ('orthogonal', e[1:]), ('opposite', -e[:1]))
}
assert [round(v, 6) for v in costs.values()] == [0, 0.078125, 0.15625]
costs


# %% [markdown]
# How much the loss depends on the split of a batch is measured without a second process: two of them with
# half of the scenes each and `normalise='process'` have the mean of the losses of the halves, each with its
# own batch norms, slots and means.

# %%
@torch.no_grad()
def loss_of(s):
    "The consistency loss of some of the scenes alone"
    of_weak = teacher.encode(weak['images'][s], weak['mask'][s])
    of_strong = student.encode(strong['images'][s], strong['mask'][s])
    own, same = cross_view_extras(projector, of_weak, of_strong, pairs[s], frames)
    return sum(
        cross_view_losses(student.decode(of_strong, own), teacher.decode(of_weak, same)).values()
    ).item()


one_process, two_processes = loss_of(slice(0, 4)), (loss_of(slice(0, 2)) + loss_of(slice(2, 4))) / 2
assert 1e-3 < abs(two_processes / one_process - 1) < 0.3
dict(all=one_process, process=two_processes, change=two_processes / one_process - 1)


# %% [markdown]
# ## A few updates
#
# The student is trained with the consistency loss of four scenes alone, and the teacher is fixed. The distance
# of the two outputs for the same box is compared with the distance of outputs for *different* boxes. If the
# outputs became equal for all boxes, the loss would fall as well, without any use.

# %%
def distances(student_out, teacher_out):
    "(same box, different boxes): mean of 1-cosine between the last outputs of student and teacher"
    s, t = student_out['extra']['consistency'], teacher_out['extra']['consistency']
    on = s['meta']['weight'] > 0
    hs_s, hs_t = (F.normalize(x['hs'][-1][on].detach(), dim=-1) for x in (s, t))
    d, same = 1 - hs_s @ hs_t.T, torch.eye(len(hs_s), dtype=torch.bool)
    return d[same].mean().item(), d[~same].mean().item()


def decode_both():
    encoded = student.encode(strong['images'], strong['mask'])
    of_student, of_teacher = cross_view_extras(projector, encoded_weak, encoded, pairs, frames)
    with torch.no_grad():
        teacher_out = teacher.decode(encoded_weak, of_teacher)
    return student.decode(encoded, of_student), teacher_out


trained = [p for p in [*student.parameters(), *projector.parameters()] if p.requires_grad]
optimiser = torch.optim.AdamW(trained, lr=5e-4)
history = []
for _ in range(16):
    outs = decode_both()
    loss = sum(cross_view_losses(*outs).values())
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    history.append((loss.item(), *distances(*outs)))
assert history[-1][0] < 0.3 * history[0][0] and history[-1][2] > 0.5 * history[0][2]
[round(h[0], 3) for h in history[::3]]

# %%
#| label: fig-consistency-steps
#| fig-cap: "Within a few updates the outputs for the same box in two views approach each other, while those for different boxes stay apart: the queries still distinguish boxes."
#| fig-alt: "Distance against update on a logarithmic axis; the curve for the same box falls by an order of magnitude, the curve for different boxes stays level"
fig, ax = plt.subplots(figsize=(4.6, 2.6), dpi=80, layout='constrained')
ax.plot([h[1] for h in history], color=COLORS['student'], label='same box')
ax.plot([h[2] for h in history], '--', color=COLORS['paper'], label='different boxes')
ax.set(xlabel='update', ylabel='1 - cosine', yscale='log', ylim=(0.01, 1))
ax.legend()
plt.show()

# %% [markdown]
# ## Summary
#
# - Two views of an image have different proposals; a cross-view query is the same in both decoders.
# - Its content is computed from the teacher's pyramid at a pseudo box, its reference is that box in the view of
#   the decoder.
# - The attention mask separates it from matching and denoising queries; copies in groups change nothing.
# - The loss compares normalised outputs after every layer; the teacher has no gradient, student and projector
#   have one.
# - A batch without boxes has loss zero. Direction, duration and weighting are settings.
# - Other boxes and a correspondence without extra queries: @sec-variants; their effect on a training:
#   @sec-abl-consistency.
#
# ## Exercises
#
# 1. Give the student's decoder the *weak* view's boxes instead of the moved ones. What does the loss train
#    then?
# 2. Why can the student not reach a loss of zero by a constant output, as long as the teacher's is not?
# 3. With half of the images empty and `slot_weights='code'`, by which factor does the loss shrink if all
#    distances are equal? What does `'slots'` do?
# 4. Let `boxes='random'`. Which part of the gain in a study could that explain?
