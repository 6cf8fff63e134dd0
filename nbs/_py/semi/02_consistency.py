# %% [markdown]
# # Cross-view queries {#sec-consistency}
#
# > Ask two decoders about the same box in two views of one image, and train the student to answer as the
# > teacher does.
#
# A detector should say the same of an object whatever was done to its picture. To train that, an output for
# the strong view needs its partner for the weak one. Dense detectors have it for free: the same cell sees the
# same place. A transformer does not. Each view selects its own proposals, query 7 here and query 7 there look
# at different things, and a learned content vector knows nothing of the image. Cross-view queries bring their
# partner along: a vector cut out of the teacher's features at a pseudo box goes into *both* decoders, each at
# the place of that box in its own view. Both are asked the same question, so their answers may be compared.

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
from torchvision.ops import roi_align
from semidetr.boxes import denormalize_boxes, inverse_sigmoid, normalize_boxes, xyxy_to_cxcywh
from semidetr.core import ConfigError, suggest
from semidetr.detectors.denoising import ExtraQueries, group_mask, noise_boxes
from semidetr.matching.matching import hungarian, stage_of
from semidetr.semi.teacher import transport

# %%
import matplotlib.pyplot as plt
from semidetr.data.augment import ViewConfig, strong_view, weak_view
from semidetr.detectors.backbone import BackboneConfig
from semidetr.boxes import box_iou, transform_boxes
from semidetr.detectors.denoising import DenoisingConfig, combine_extras, denoising_queries
from semidetr.detectors.detector import Detector, DetectorConfig
from semidetr.data.digits import DigitsScenes
from semidetr.draw import COLORS, draw_boxes, show_image
from semidetr.data.loader import collate
from semidetr.semi.teacher import make_teacher
from semidetr.detectors.transformer import TransformerConfig

# %% [markdown]
# The problem in one cell. A fresh detector, two views of four scenes: its proposals carry numbers, and we
# carry those of the weak view to the strong one. Proposals of the same number hardly ever overlap.

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
look = ViewConfig(short_sides=(96,), mean=student.backbone.mean, std=student.backbone.std)
scenes = DigitsScenes('train', n=16)


def two_views(numbers, seed=0):
    "(weak part, strong part, boxes in the weak view) of some scenes"
    weak = [weak_view(scenes[i], look, seed + i) for i in numbers]
    found = [dict(boxes=v.boxes, labels=v.labels, scores=torch.ones(len(v.labels))) for v in weak]
    return (
        collate(weak),
        collate([strong_view(scenes[i], look, 100 + seed + i) for i in numbers], truth=False),
        found,
    )


weak, strong, found = two_views([3, 5, 9, 11])
with torch.no_grad():
    a, b = (student.encode(p['images'], p['mask']).reference_logits.sigmoid() for p in (weak, strong))
moved = [
    transform_boxes(denormalize_boxes(x, w['size']), s['matrix'] @ w['matrix'].inverse(), s['size'])[0]
    for x, w, s in zip(a, weak['targets'], strong['targets'])
]
share = (
    torch.stack(
        [box_iou(m, denormalize_boxes(x, s['size'])).diag() for m, x, s in zip(moved, b, strong['targets'])]
    )
    .gt(0.5)
    .float()
    .mean()
    .item()
)
assert share < 0.2
print(f'{share:.0%} of the proposals with the same number overlap by half')


# %% [markdown]
# ## What can be chosen
#
# The official code differs from the paper's text in most details of this part. Every difference is a field;
# the boxes *Paper vs. code* below say which.

# %%
#| export
@dataclass(frozen=True)
class ConsistencyConfig:
    "Cross-view query consistency (paper section 3.3); the defaults are the official code's, but for `groups`"

    weight: float = 10.0  # factor of the loss before w_u (code: 10; paper: w_c=1 on a plain MSE, not multiplied by w_u: 1/w_u here); 0: no cross-view queries at all
    cross: str = 'one'  # 'one': teacher features for both decoders (code); 'swap': each decoder gets the other view's (paper); 'both': 'one' and its mirror image
    norm: bool = True  # compare directions, i.e. L2-normalised outputs (code); False: plain MSE (paper)
    until: str = 'T1'  # 'T1': the one-to-many stage only (code); 'end': the whole training (paper)
    groups: int = (
        1  # identical copies of the queries (code: 5, the same loss and gradients at five times the cost)
    )
    boxes: str = (
        'mined'  # 'mined': B^con (paper); 'score': B^sup; 'jittered': B^sup with noise; 'random'; 'none'
    )
    jitter: float = 0.4  # 'jittered': corners move by up to this share of half the size
    n_random: int = 10  # 'random': boxes an image
    correspondence: str = 'cross_view'  # 'hungarian': no extra queries; matching queries of both networks are paired by their predictions
    density: str = 'sparse'  # 'dense': more queries, from all teacher detections of an image or, where there are none, from a grid
    grid: int = 4  # 'dense': cells a side
    slot_weights: str = 'code'  # 'code': mean weight times mean distance (official shape slip); 'slots': real slots count 1, dummies 0
    projector: str = (
        'code'  # 'code': two convolutions, two linear layers; 'mlp': the linear layers alone (paper's word)
    )
    hidden: int = 1024  # width between the linear layers
    top: int = 100  # 'hungarian': best teacher queries an image

    def __post_init__(self):
        known = dict(
            cross=('one', 'swap', 'both'),
            until=('T1', 'end'),
            boxes=('mined', 'score', 'jittered', 'random', 'none'),
            density=('sparse', 'dense'),
            correspondence=('cross_view', 'hungarian'),
            slot_weights=('code', 'slots'),
            projector=('code', 'mlp'),
        )
        for f, values in known.items():
            if getattr(self, f) not in values:
                raise ConfigError(
                    f"consistency.{f}='{getattr(self, f)}' is unknown; {suggest(getattr(self, f), values)}"
                )
        for f, least in dict(weight=0, groups=1, jitter=0, n_random=0, grid=1, hidden=1, top=1).items():
            if not getattr(self, f) >= least:
                raise ConfigError(f'consistency.{f}={getattr(self, f)} must be at least {least}')
        if self.jitter >= 1:
            raise ConfigError(f'consistency.jitter={self.jitter} must be below 1, or boxes turn inside out')

    @property
    def asks(self) -> bool:  # needs a `Projector`
        "Are there cross-view queries at all?"
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
    cfg: ConsistencyConfig = ConsistencyConfig(),
) -> bool:
    "Does the loss count at this step? With `until='T1'` and T1=0 it never does"
    return cfg.weight > 0 and (cfg.until == 'end' or stage_of(step, T1) == 'o2m')


# %%
assert [consistency_active(t, T1=10) for t in (9, 10)] == [True, False]
assert consistency_active(10, T1=10, cfg=ConsistencyConfig(until='end'))
ConsistencyConfig()


# %% [markdown]
# ::: {.callout-note}
# ## Paper vs. code
# In the paper the loss stands outside the two stages and lasts for the whole training (`until='end'`). The
# code sets its weight to zero when one-to-one matching begins (`until='T1'`).
# :::
#
# ## From a box to a vector
#
# The features are the pyramid between backbone and encoder. Its level $\ell$ has stride $s_\ell=2^\ell s_0$:
# so many pixels make a cell. A box $b$ of $w\times h$ pixels is cut out of the level
#
# $$
# \ell(b) = \min\left(L-1,\; \max\left(0,\; \left\lfloor \log_2\left(\frac{\sqrt{wh}}{7\,s_0}+10^{-6}\right) \right\rfloor\right)\right)
# $$ {#eq-consistency-level}
#
# of the $L$ levels. What is cut out has $7\times7$ bins, so on its level a medium box has between one and two
# cells a bin: nothing is skipped, nothing is repeated. With the usual $s_0=8$ the limits are 112, 224 and 448
# pixels.

# %%
#| export
def pyramid_strides(
    features,  # L maps (B,d,h,w)
    frame,  # (H, W) of the padded batch that they were made of
) -> list:  # L pairs: pixels a cell, down and across
    "How many pixels a cell of each level stands for; deformable attention lays the maps over the frame in the same way"
    return [(frame[0] / f.shape[-2], frame[1] / f.shape[-1]) for f in features]


def roi_level(
    xyxy: Tensor,  # (N,4) pixels
    n_levels: int,  # L
    stride: float = 8.0,  # of the finest level, each further one doubles it
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
# RoIAlign samples the level bilinearly and averages within each bin. Padding lies right of and below an
# image, so pixels of a view are pixels of the padded batch; a cell is as large as the frame divided by the
# map, in each direction.

# %%
#| export
def roi_features(
    pyramid,  # L maps (B,d,h,w)
    boxes,  # per image (n_i,4) xyxy, pixels of its view; padding lies to the right and below and does not move them
    strides,  # L numbers, or L pairs (down, across), as of `pyramid_strides`
    size: int = 7,  # cells a side of what is cut out
) -> Tensor:  # (N,d,size,size), N = sum of n_i, in the order of `boxes`; float32 at least
    "Cut boxes out of their levels of a pyramid (RoIAlign: half-pixel aligned, adaptive sampling, average)"
    xyxy, dtype = (
        torch.cat([b.reshape(-1, 4) for b in boxes]),
        torch.promote_types(pyramid[0].dtype, torch.float32),
    )
    if not len(xyxy):
        return pyramid[0].new_zeros(0, pyramid[0].shape[1], size, size, dtype=dtype)
    scale = (
        xyxy.new_tensor([s if isinstance(s, (tuple, list)) else (s, s) for s in strides]).flip(1).repeat(1, 2)
    )  # (L,4): x,y,x,y
    image = torch.repeat_interleave(
        torch.arange(len(boxes), device=xyxy.device),
        torch.tensor([len(b) for b in boxes], device=xyxy.device),
    )
    level = roi_level(xyxy, len(pyramid), 2.0 ** round(math.log2(max(scale[0].tolist()))))
    rois = torch.cat([image[:, None].to(xyxy.dtype), xyxy / scale[level]], 1).to(dtype)
    where = [(level == i).nonzero().flatten() for i in range(len(pyramid))]
    parts = [roi_align(f.to(dtype), rois[w], size, aligned=True) for f, w in zip(pyramid, where) if len(w)]
    return torch.cat(parts)[torch.cat(where).argsort()]


# %% [markdown]
# A map that holds the $x$ coordinate of each cell gives the middle of each bin back. So the corners are where
# they should be, to a fraction of a cell:

# %%
ramp = (torch.arange(12.0) + 0.5).mul(8).expand(1, 1, 12, 12)
bins = roi_features([ramp], [torch.tensor([[13.0, 20, 69, 60]])], pyramid_strides([ramp], (96, 96)))
assert torch.allclose(bins[0, 0, 0], 13 + 8 * (torch.arange(7) + 0.5), atol=1e-4)
bins[0, 0, 0]


# %% [markdown]
# A small network $P$ turns the $7\times7$ cells into a content vector. It belongs to neither detector: one
# instance learns through the student's decoder, is never averaged and not needed after training. Its batch
# norms use the statistics of the boxes at hand. A single box has none, and so takes the running averages
# instead of failing.

# %%
#| export
def _norm(bn, x):
    "Batch statistics where there is a batch; a single box falls back on the running ones"
    if len(x) > 1:
        return bn(x)
    return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)


class Projector(nn.Module):
    "Features of a box -> content of a query; one instance, trained through the student's decoder, never averaged"

    def __init__(
        self,
        d_model: int,  # d
        hidden: int = 1024,  # width between the two linear layers
        kind: str = 'code',  # 'code' or 'mlp', see `ConsistencyConfig.projector`
        size: int = 7,  # cells a side of the features
    ):
        super().__init__()
        self.kind = kind
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
        if not len(x):
            return x.new_zeros(0, self.fc2.out_features, dtype=self.fc2.weight.dtype)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.fc1.weight.dtype)
            if self.kind == 'mlp':
                return self.fc2(F.relu(self.fc1(x.flatten(1))))
            for conv, bn in zip(self.convs, self.norms):
                x = F.relu(_norm(bn, conv(x)))
            return F.relu(self.fc2(F.relu(_norm(self.norms[2], self.fc1(x.flatten(1))))))

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
# The paper speaks of backbone features and an MLP (`projector='mlp'`); the code takes the projected pyramid
# and puts two convolutions in front (`'code'`), each layer with batch norm and ReLU, the last one with ReLU
# alone.
# :::
#
# ## Which boxes
#
# A consistency target may be wrong in a way in which a detection target may not. Nobody learns "here is a
# car" from it, only "answer as the teacher does", so a box has to cover something worth asking about, not fit
# it tightly. That is why the large set $B^{con}$ of @sec-mining feeds it. The other choices are controls: the
# sure boxes alone, the same boxes shaken, boxes anywhere, a dense net of boxes.

# %%
#| export
def grid_boxes(
    size,  # (H, W) of the view
    n: int,  # cells a side
    like: Tensor,  # device and dtype
) -> Tensor:  # (n*n,4) xyxy pixels, row by row
    "The cells of a grid over a view"
    h, w = size
    i = torch.arange(n, device=like.device, dtype=like.dtype)
    y, x = torch.meshgrid(i * h / n, i * w / n, indexing='ij')
    return torch.stack([x, y, x + w / n, y + h / n], -1).flatten(0, 1)


def random_boxes(
    size,  # (H, W) of the view
    n: int,
    like: Tensor,  # device and dtype
    generator: torch.Generator = None,
) -> Tensor:  # (n,4) xyxy pixels inside the view
    "Boxes of a tenth to all of each side, anywhere"
    r = torch.rand(n, 4, generator=generator, device=like.device, dtype=like.dtype)
    wh = 0.1 + 0.9 * r[:, 2:]
    corner = r[:, :2] * (1 - wh)
    return torch.cat([corner, corner + wh], 1) * like.new_tensor([size[1], size[0]] * 2)


def _detections(boxes, like=None):
    "Boxes as detections; without a source they have class 0 and score 0"
    if like is not None:
        return dict(boxes=boxes, labels=like['labels'], scores=like['scores'])
    return dict(
        boxes=boxes,
        labels=torch.zeros(len(boxes), dtype=torch.long, device=boxes.device),
        scores=boxes.new_zeros(len(boxes)),
    )


# %%
#| export
def pick_boxes(
    con: list,  # B^con: per image dict(boxes (n,4) xyxy pixels of the weak view, labels, scores)
    sup: list,  # B^sup, likewise
    sizes,  # per image (H, W) of the weak view
    cfg: ConsistencyConfig = ConsistencyConfig(),
    generator: torch.Generator = None,  # for 'jittered' and 'random'; None: torch's global one
    proposals: list = None,  # for 'dense': all of the teacher's detections, likewise; a grid where there are none
) -> list:  # per image dict(boxes xyxy weak-view pixels, labels, scores), as `transport` takes them
    "The boxes that both decoders are asked about"
    out = []
    for i, (c, s, size) in enumerate(zip(con, sup, sizes)):
        none = _detections(c['boxes'][:0])
        if cfg.boxes == 'jittered':
            far = torch.zeros(len(s['boxes']), dtype=torch.bool, device=s['boxes'].device)
            moved = noise_boxes(normalize_boxes(s['boxes'], size), far, cfg.jitter, generator).clamp(0, 1)
            some = _detections(denormalize_boxes(xyxy_to_cxcywh(moved), size), s)
        elif cfg.boxes == 'random':
            some = _detections(random_boxes(size, cfg.n_random, c['boxes'], generator))
        else:
            some = dict(mined=c, score=s, none=none)[cfg.boxes]
        more = none
        if cfg.density == 'dense':
            more = (
                proposals[i]
                if proposals and len(proposals[i]['boxes'])
                else _detections(grid_boxes(size, cfg.grid, c['boxes']))
            )
        out.append(
            {k: torch.cat([some[k], more[k].to(some[k].dtype)]) for k in ('boxes', 'labels', 'scores')}
        )
    return out


# %%
nothing = [dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long), scores=torch.zeros(0))]
dense = pick_boxes(nothing, nothing, [(60, 90)], ConsistencyConfig(density='dense', grid=3))
assert len(dense[0]['boxes']) == 9 and dense[0]['boxes'][5].tolist() == [60, 20, 90, 40]
sure = [{k: v[:4] for k, v in found[0].items()}]  # say that four of six are sure
picks = {
    c: len(pick_boxes(found[:1], sure, [(96, 96)], ConsistencyConfig(boxes=c))[0]['boxes'])
    for c in ('mined', 'score', 'jittered', 'random', 'none')
}
assert list(picks.values()) == [6, 4, 4, 10, 0]
picks


# %% [markdown]
# Boxes travel as pseudo labels do (@eq-teacher-transport): by the two matrices of the views. What leaves the
# strong view is left out of both.

# %%
#| export
def pair_boxes(
    picked: list,  # per image, from `pick_boxes`
    weak: list,  # targets of the weak views
    strong: list,  # targets of the strong views of the same images
    cfg: ConsistencyConfig = ConsistencyConfig(),
    min_side: float = 1.0,  # pixels; boxes that are smaller in the strong view are left out
) -> list:  # per image dict(weak, strong: (n,4) xyxy pixels of either view; weak_ref, strong_ref: (n,4) cxcywh normalised; weight (n,))
    "The same boxes in both views; with `slot_weights='code'` an image without any gets a dummy of weight 0, the middle half of the view"
    out = []
    for p, w, s, t in zip(picked, weak, strong, transport(picked, weak, strong, min_side)):
        here, there = normalize_boxes(p['boxes'][t['source']], w['size']), t['boxes']
        weight = here.new_ones(len(here))
        if not len(here) and cfg.slot_weights == 'code':
            here, there, weight = here.new_full((1, 4), 0.5), there.new_full((1, 4), 0.5), here.new_zeros(1)
        out.append(
            dict(
                weak=denormalize_boxes(here, w['size']),
                strong=denormalize_boxes(there, s['size']),
                weak_ref=here,
                strong_ref=there,
                weight=weight,
            )
        )
    return out


# %%
#| label: fig-consistency-boxes
#| fig-cap: "One scene in both views: a box keeps its object through flip, shift and scale, but not its level of the pyramid, which follows its size in pixels."
#| fig-alt: "Left the weak view, right the larger strong view with changed colours; the digits are framed in both, in colours that stand for levels 0 and 1 of the pyramid; three boxes change from 0 to 1"
views = [
    weak_view(scenes[3], ViewConfig(short_sides=(400,)), 2),
    strong_view(scenes[3], ViewConfig(short_sides=(640,), erase_patches=(0, 0)), 7),
]
sides_of = [dict(size=v.size, matrix=v.matrix) for v in views]
seen = [dict(boxes=views[0].boxes, labels=views[0].labels, scores=torch.ones(len(views[0].labels)))]
paired = pair_boxes(seen, sides_of[:1], sides_of[1:])[0]
fig, axes = plt.subplots(1, 2, figsize=(5.4, 3), dpi=80, layout='constrained')
for ax, v, name in zip(axes, views, ('weak', 'strong')):
    show_image(
        ax, v.image, ViewConfig().mean, ViewConfig().std, title=f'{name}, {v.size[1]} x {v.size[0]} pixels'
    )
    for lv, kind in enumerate(('truth', 'student', 'teacher')):
        on = roi_level(paired[name], 4) == lv
        draw_boxes(
            ax,
            paired[name][on],
            torch.full((int(on.sum()),), lv),
            classes=['level 0', 'level 1', 'level 2'],
            kind=kind,
        )
plt.show()


# %% [markdown]
# ## The same question to both
#
# Let $F_t$ and $F_s$ be the pyramids of the teacher's weak and the student's strong view, $b_n$ a box of the
# weak view, $Mb_n$ the same box in the strong one. Its content is
#
# $$
# c_n^t = P\left(\mathrm{RoIAlign}(F_t, b_n)\right), \qquad c_n^s = P\left(\mathrm{RoIAlign}(F_s, M b_n)\right)
# $$ {#eq-consistency-content}
#
# and a decoder starts a query at the box of its own view with one of the two:
#
# | `cross` | student asks at $Mb_n$ with | teacher asks at $b_n$ with |
# |---|---|---|
# | `'one'` | $c_n^t$ | $c_n^t$ |
# | `'swap'` | $c_n^t$ | $c_n^s$ |
# | `'both'` | $c_n^t$, and a second set $c_n^s$ | $c_n^t$, and a second set $c_n^s$ |
#
# No gradient reaches $F_t$ or the teacher; $P$ and the student learn.
#
# ::: {.callout-note}
# ## Paper vs. code
# The paper's equations and figure cross both ways (`cross='swap'`). The code uses the teacher's features
# only, for both decoders (`'one'`). The third way adds the mirror image of the code's term.
#
# The code also makes five identical copies of every set, in groups that cannot see each other. Equal queries
# give equal answers: loss and gradients are those of one copy, as the tests show, so one is the default here
# (`groups=5` is the official number).
# :::
#
# Images of a batch hold different numbers of boxes; each gets as many slots as the fullest one. A slot has weight 1 if a box stands in it. In an image without any box the code places a dummy in the middle, of weight 0. Other slots are unused, marked -1.

# %%
#| export
def cross_view_queries(
    content: Tensor,  # (N,d), flat over the images
    counts,  # boxes of each image, sum N
    reference,  # per image (n_i,4) cxcywh normalised
    groups: int = 1,  # G identical copies
    weight=None,  # per image (n_i,): 1 for real boxes, 0 for dummies; None: all real
    name: str = 'consistency',
) -> (
    ExtraQueries | None
):  # B images of G*n_max slots; meta: weight (B,P) (-1 in unused slots), groups, n_max. None without boxes
    "A query for every box, as the decoder takes it in front of the matching queries"
    B, n = len(counts), max(counts, default=0)
    if not n:
        return None
    row = torch.repeat_interleave(torch.arange(B), torch.tensor(counts))
    col = torch.cat([torch.arange(c) for c in counts])
    at = (row.to(content.device), col.to(content.device))

    def spread(x, fill=0.0):
        return x.new_full((B, n, *x.shape[1:]), fill).index_put(at, x).repeat(1, groups, *[1] * (x.ndim - 1))

    boxes, w = (
        torch.cat(list(reference)),
        content.new_ones(len(content)) if weight is None else torch.cat(list(weight)),
    )
    return ExtraQueries(
        spread(content),
        spread(inverse_sigmoid(boxes)),
        group_mask(groups, n).to(content.device),
        name,
        dict(weight=spread(w, -1.0), groups=groups, n_max=n),
    )


# %%
question = cross_view_queries(
    torch.randn(4, 8), [3, 0, 1], [torch.rand(3, 4), torch.zeros(0, 4), torch.rand(1, 4)], groups=2
)
assert question.content.shape == (3, 6, 8) and question.meta['weight'][2].tolist() == [1, -1, -1] * 2
question.meta

# %% [markdown]
# What the mask isolates: matching queries must not see these queries, whose place alone gives a pseudo box
# away; the network would lean on them and stand without them at test time. Denoising queries carry true
# labels and must not see or be seen either. The cross-view queries themselves may look at the matching
# queries, as denoising queries do.

# %%
#| label: fig-consistency-mask
#| fig-cap: "Who may see whom (white): two groups of cross-view queries, two of denoising queries and ten matching queries. Groups are closed to each other and open to the matching queries, which see only themselves."
#| fig-alt: "Square matrix; four white blocks on the diagonal, white columns on the right for the matching queries, the rest dark"
noisy = denoising_queries(
    [dict(labels=torch.tensor([1, 2]), boxes=torch.full((2, 4), 0.5))] * 3,
    nn.Embedding(10, 8),
    10,
    DenoisingConfig(num=8),
)
_, _, blocked, _ = combine_extras([question, noisy], num_queries=10)
fig, ax = plt.subplots(figsize=(3.2, 3.2), dpi=80)
ax.imshow(blocked, cmap='gray_r', vmin=0, vmax=1.3)
ax.set(xlabel='may look at', ylabel='query', xticks=[1, 4, 7.5, 11.5, 18.5], yticks=[1, 4, 7.5, 11.5, 18.5])
ax.set_xticklabels(['C1', 'C2', 'D1', 'D2', 'matching'])
ax.set_yticklabels(['C1', 'C2', 'D1', 'D2', 'matching'])
for at in (2.5, 5.5, 9.5, 13.5):
    ax.axhline(at, color='grey', lw=0.5)
    ax.axvline(at, color='grey', lw=0.5)
plt.show()


# %% [markdown]
# From pairs of boxes to queries for both decoders:

# %%
#| export
def cross_view_extras(
    projector,  # (N,d,7,7) -> (N,d)
    teacher,  # `Encoded` of the weak views
    student,  # `Encoded` of the strong views, with gradient
    pairs: list,  # from `pair_boxes`
    frames,  # ((H, W) of the padded weak batch, (H, W) of the padded strong batch)
    cfg: ConsistencyConfig = ConsistencyConfig(),
) -> (
    tuple
):  # (extra queries for the student's decoder, the same for the teacher's); two empty lists without boxes
    "The same questions for both decoders (@eq-consistency-content)"
    counts, weight = [len(p['weight']) for p in pairs], [p['weight'] for p in pairs]
    if not sum(counts) or not cfg.asks:
        return [], []

    def content(features, frame, view):
        return projector(roi_features(features, [p[view] for p in pairs], pyramid_strides(features, frame)))

    def ask(c, view, name='consistency'):
        return cross_view_queries(c, counts, [p[view + '_ref'] for p in pairs], cfg.groups, weight, name)

    c_t = content([f.detach() for f in teacher.features], frames[0], 'weak')
    if cfg.cross == 'one':
        return [ask(c_t, 'strong')], [ask(c_t.detach(), 'weak')]
    if cfg.cross == 'swap':
        with torch.no_grad():
            c_s = content(student.features, frames[1], 'strong')
        return [ask(c_t, 'strong')], [ask(c_s, 'weak')]
    c_s, mirror = content(student.features, frames[1], 'strong'), 'consistency_mirror'
    return [ask(c_t, 'strong'), ask(c_s, 'strong', mirror)], [
        ask(c_t.detach(), 'weak'),
        ask(c_s.detach(), 'weak', mirror),
    ]


# %% [markdown]
# The two views of the scenes above, with the boxes that are there as pseudo boxes. The contents are the same,
# the places are not:

# %%
projector, frames = Projector(64, hidden=128), (weak['images'].shape[-2:], strong['images'].shape[-2:])
pairs = pair_boxes(found, weak['targets'], strong['targets'])
with torch.no_grad():
    told = teacher.encode(weak['images'], weak['mask'])
asked, same = cross_view_extras(
    projector, told, student.encode(strong['images'], strong['mask']), pairs, frames
)
assert (
    torch.equal(asked[0].content, same[0].content)
    and asked[0].content.requires_grad
    and not same[0].content.requires_grad
)
asked[0].boxes[0, 0].sigmoid(), same[0].boxes[0, 0].sigmoid()


# %% [markdown]
# ## The loss
#
# After decoder layer $i$ the student says $h_n^s\in\mathbb{R}^d$ about box $n$ and the teacher $h_n^t$. With
# $N$ used slots in the batch, slot weights $w_n$ and their mean $\bar w$,
#
# $$
# L_{con}^{(i)} = \lambda\,\bar w\;\frac{1}{N d}\sum_{n=1}^{N}\left\lVert \frac{h_n^s}{\lVert h_n^s\rVert} - \mathrm{sg}\left[\frac{h_n^t}{\lVert h_n^t\rVert}\right]\right\rVert^2
# $$ {#eq-consistency-loss}
#
# where $\mathrm{sg}$ stops the gradient and $\lambda=10$. Two directions at right angles are $\sqrt2$ apart,
# so unrelated answers cost $10\cdot2/256=0.078$ a layer at $d=256$, opposite ones twice that, equal ones
# nothing.
#
# ::: {.callout-note}
# ## Paper vs. code
# The paper's loss is a plain mean squared error with factor one outside of $w_u$ (`norm=False`, `weight`
# $=1/w_u$). The code meant to weight every slot by its own $w_n$, but a slip of shapes multiplies two means
# instead, as in @eq-consistency-loss (`slot_weights='code'`); on the way it builds all $N\times N$ pairs, a
# gigabyte at a thousand slots. Here memory grows with $N$ alone, and `slot_weights='slots'` averages over the
# real slots, without dummies.
# :::

# %%
#| export
def consistency_loss(
    hs_student: Tensor,  # (layers,B,P,d) outputs of the decoder
    hs_teacher: Tensor,  # likewise; no gradient reaches it
    weight: Tensor,  # (B,P) 1: real, 0: dummy, negative: unused
    cfg: ConsistencyConfig = ConsistencyConfig(),
) -> dict:  # loss_con_0, loss_con_1, ... one scalar a decoder layer
    "Distance of what two decoders say about the same box (@eq-consistency-loss)"
    used, dtype = weight >= 0, torch.promote_types(hs_student.dtype, torch.float32)
    w = weight[used].to(dtype)
    s, t = (h[:, used].to(dtype) for h in (hs_student, hs_teacher.detach()))
    if cfg.norm:
        s, t = F.normalize(s, dim=-1), F.normalize(t, dim=-1)
    distance = (s - t).square().mean(-1)  # (layers,N)
    if cfg.slot_weights == 'code':
        per_layer = distance.sum(1) / max(1, len(w)) * (w.sum() / max(1, len(w)))
    else:
        per_layer = (distance * w).sum(1) / w.sum().clamp(min=1)
    return {f'loss_con_{i}': cfg.weight * v for i, v in enumerate(per_layer)}


def cross_view_losses(
    student: dict,  # outputs of a decoder that was given the first list of `cross_view_extras`
    teacher: dict,  # outputs of one that was given the second
    cfg: ConsistencyConfig = ConsistencyConfig(),
) -> dict:  # loss_con_0, ...; empty if there were no cross-view queries
    "Sum of the terms of all sets of cross-view queries"
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
    for name, t in (('equal', 5 * e[:1]), ('right angle', e[1:]), ('opposite', -e[:1]))
}
assert [round(v, 6) for v in costs.values()] == [0, 0.078125, 0.15625]
costs


# %% [markdown]
# ## A few steps
#
# The student trains on nothing but the consistency of four scenes, while the teacher stands still. Beside the
# distance between the two answers about a box we watch the distance between answers about *different* boxes.
# Were the queries to stop telling boxes apart, the loss would fall as well, and mean nothing.

# %%
def distances(out, told_out):
    "(same box, different boxes): mean 1-cosine between student's and teacher's last answers"
    on = out['extra']['consistency']['meta']['weight'] > 0
    s, t = (F.normalize(o['extra']['consistency']['hs'][-1][on].detach(), dim=-1) for o in (out, told_out))
    d, eye = 1 - s @ t.T, torch.eye(len(s), dtype=torch.bool)
    return d[eye].mean().item(), d[~eye].mean().item()


def answers():
    enc = student.encode(strong['images'], strong['mask'])
    ours, theirs = cross_view_extras(projector, told, enc, pairs, frames)
    with torch.no_grad():
        fixed = teacher.decode(told, theirs)
    return student.decode(enc, ours), fixed


optimiser = torch.optim.AdamW(
    [p for p in [*student.parameters(), *projector.parameters()] if p.requires_grad], lr=5e-4
)
history = []
for _ in range(16):
    said = answers()
    loss = sum(cross_view_losses(*said).values())
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    history.append((loss.item(), *distances(*said)))
assert history[-1][0] < 0.3 * history[0][0] and history[-1][2] > 0.5 * history[0][2]
[round(h[0], 3) for h in history[::3]]

# %%
#| label: fig-consistency-steps
#| fig-cap: "Answers about the same box in two views approach each other within a few steps, and answers about different boxes stay apart: the queries keep telling boxes apart."
#| fig-alt: "Distance against step on a logarithmic axis; the curve for the same box falls by an order of magnitude, the curve for different boxes stays level"
fig, ax = plt.subplots(figsize=(4.6, 2.6), dpi=80, layout='constrained')
ax.plot([h[1] for h in history], color=COLORS['student'], label='same box')
ax.plot([h[2] for h in history], '--', color=COLORS['paper'], label='different boxes')
ax.set(xlabel='step', ylabel='1 - cosine', yscale='log', ylim=(0.01, 1))
ax.legend()
plt.show()


# %% [markdown]
# ## Without extra queries
#
# One could pair the queries that are there. The teacher's best predictions move to the strong view and are
# matched with the student's by boxes and classes (@eq-matching-hungarian); the same loss compares the outputs
# of the pairs. No decoder works harder for it, but the pairs are only as good as the predictions: early in
# training a partner may look at something else altogether, and then two queries are pulled together that have
# nothing in common.

# %%
#| export
def match_views(
    student: dict,  # outputs for the strong views
    teacher: dict,  # outputs for the weak views
    weak: list,  # targets of the weak views
    strong: list,  # targets of the strong views
    cfg: ConsistencyConfig = ConsistencyConfig(),
    min_side: float = 1.0,  # pixels
) -> list:  # per image (student queries, teacher queries)
    "Pair matching queries by what the last layers predict: the teacher's best queries serve as objects of the strong view"
    seen, queries = [], []
    for logits, boxes, w in zip(teacher['pred_logits'].detach(), teacher['pred_boxes'].detach(), weak):
        score, label = logits.sigmoid().max(-1)
        best = score.topk(min(cfg.top, len(score))).indices
        queries.append(best)
        seen.append(
            dict(boxes=denormalize_boxes(boxes[best], w['size']), labels=label[best], scores=score[best])
        )
    objects = transport(seen, weak, strong, min_side)
    return [
        (q, best[t['source'][i]]) for (q, i), best, t in zip(hungarian(student, objects), queries, objects)
    ]


def hungarian_consistency(
    student: dict,  # outputs for the strong views
    teacher: dict,  # outputs for the weak views
    weak: list,  # targets of the weak views
    strong: list,  # targets of the strong views
    cfg: ConsistencyConfig = ConsistencyConfig(),
) -> dict:  # loss_con_0, ... one scalar a decoder layer
    "The alternative without extra queries: @eq-consistency-loss on matching queries that predict the same"
    pairs = match_views(student, teacher, weak, strong, cfg)

    def rows(hs, side):
        return torch.cat([hs[:, b, p[side]] for b, p in enumerate(pairs)], 1)[:, None]  # (layers,1,K,d)

    s, t = rows(student['hs'], 0), rows(teacher['hs'], 1)
    return consistency_loss(s, t, s.new_ones(1, s.shape[2]), cfg)


# %% [markdown]
# The detector of this chapter has never learned to detect; this is the situation at the start of a run. How
# many partners overlap by half, once both boxes are in the strong view?

# %%
with torch.no_grad():
    outs = [d.decode(d.encode(p['images'], p['mask'])) for d, p in ((student, strong), (teacher, weak))]
partners = match_views(*outs, weak['targets'], strong['targets'])
overlap = []
for i, (qs, qt) in enumerate(partners):
    w, s = weak['targets'][i], strong['targets'][i]
    there, _ = transform_boxes(
        denormalize_boxes(outs[1]['pred_boxes'][i, qt], w['size']),
        s['matrix'] @ w['matrix'].inverse(),
        s['size'],
    )
    overlap.append(box_iou(there, denormalize_boxes(outs[0]['pred_boxes'][i, qs], s['size'])).diag())
good = torch.cat(overlap).gt(0.5).float().mean().item()
assert share < good < 0.9  # better than by number, far from certain
print(f'{good:.0%} of the {len(torch.cat(overlap))} pairs overlap by half')

# %% [markdown]
# ## Summary
#
# - Views of one image have different proposals; a cross-view query asks both decoders about the same box.
# - Its content is cut out of the teacher's pyramid at a pseudo box, its place is that box in either view.
# - The mask keeps it from matching and denoising queries; copies in groups change nothing.
# - The loss compares directions after every layer; the teacher gets no gradient, student and projector do.
# - A batch without boxes costs nothing, and every direction, duration and weighting is a switch.
# - What other boxes, or Hungarian pairs, do to a training: @sec-abl-consistency.
#
# ## Exercises
#
# 1. Give the student's decoder the *weak* view's boxes instead of the moved ones. What does the loss teach
#    then?
# 2. Why is a constant answer no minimum that the student can reach while the teacher does not give one?
# 3. With half of the images empty and `slot_weights='code'`, by which factor does the loss shrink if all
#    distances are equal? What does `'slots'` do?
# 4. Let `boxes='random'`. Which part of the gain in a study would that explain away?
