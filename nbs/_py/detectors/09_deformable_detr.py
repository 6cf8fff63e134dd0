# %% [markdown]
# # Deformable-DETR {#sec-deformable-detr}
#
# > Build Deformable-DETR in its three forms, read its published weights, train it with every method.
#
# *Why.* A method that is tested on one detector may owe its gain to that detector. Deformable-DETR (Zhu et al.
# 2021) is the parent of DINO and the base of many semi-supervised detectors. It has three forms, and each
# adds one idea: *plain*, with learned queries; *refine*, in which each layer corrects the box of the one
# before; *two-stage*, in which the queries start at proposals of the encoder. Backbone, pyramid, encoder and
# decoder layers are those of @sec-transformer. What differs is small and easy to miss: this chapter lists
# the differences, and the tests compare every output with values of the original code.
#
# | | Deformable-DETR | DINO (@sec-detector) |
# |---|---|---|
# | temperature of the token positions; offset of the count | 10000; -0.5 | 20; 0 |
# | query position | one for all layers | new in each layer, from the box |
# | box code of a proposal | order $x, y, w, h$ | order $y, x, w, h$ |
# | heads | one pair per layer (*plain*: one pair) | one pair |
# | LayerNorm between decoder and heads | no | yes |
# | look forward | once | twice |
# | denoising queries | no | yes |

# %%
#| default_exp detectors.deformable_detr

# %%
#| hide
import warnings

warnings.filterwarnings('ignore', message='IProgress')

# %%
#| export
import copy
import re
from dataclasses import dataclass, replace
import torch
from torch import nn, Tensor
from semidetr.boxes import inverse_sigmoid
from semidetr.core import ConfigError, at_least_float32, one_of
from semidetr.detectors.backbone import BackboneConfig, InputProj, build_backbone
from semidetr.detectors.contract import Outputs, add_suppressed, build_detector, split_parameters
from semidetr.detectors.denoising import combine_extras
from semidetr.detectors.detector import collect_outputs, level_masks, make_heads
from semidetr.detectors.group import GroupConfig, add_second, build_group, parallel_group, parallel_parts
from semidetr.detectors.suppressor import SuppressorConfig, build_suppressor
from semidetr.detectors.transformer import DecoderLayer, Encoder, TransformerConfig
from semidetr.detectors.transformer import (
    Geometry,
    _kept_geometry,
    init_transformer,
    propose,
    select_queries,
    sine_embed_boxes,
)

# %%
import math
import matplotlib.pyplot as plt
import torchvision.transforms.functional as TF
from semidetr.boxes import denormalize_boxes
from semidetr.data.digits import DigitsScenes
from semidetr.detectors.attention import sampling_locations
from semidetr.detectors.backbone import sine_position
from semidetr.detectors.contract import DetectionTransformer
from semidetr.detectors.denoising import ExtraQueries
from semidetr.detectors.transformer import token_geometry
from semidetr.draw import draw_boxes, draw_points, show_image


# %% [markdown]
# ## Settings
#
# The number of layers holds for the encoder and for the decoder. The sizes are those of the release; its
# single-scale model has `levels=1` and `out_strides=(32,)`.

# %%
#| export
@dataclass(frozen=True)
class DeformableDETRConfig:
    "Everything that determines the network; the defaults are those of the release, without its refinements"

    num_classes: int  # C; 0 in a configuration means: as many as the data have
    backbone: BackboneConfig = BackboneConfig('resnet50', out_strides=(8, 16, 32))
    d_model: int = 256  # width d of every token and query, a multiple of 8
    levels: int = 4  # L feature maps, the coarsest ones made by stride-2 convolutions
    heads: int = 8  # M
    points: int = 4  # K samples per head and level
    layers: int = 6  # of the encoder, and as many of the decoder
    ffn: int = 1024  # hidden width of the feed-forward blocks
    num_queries: int = 300  # Q
    form: str = 'plain'  # 'plain'; 'refine': iterative refinement; 'two_stage': refinement of proposals
    dropout: float = 0.1  # of attention weights among queries, after attention and in feed-forward blocks
    kind: str = 'deformable_detr'  # tells these settings from others in a file
    enc_tokens: str = 'selected'  # in `enc_outputs` while training: 'selected'; 'all' tokens (two_stage only)
    suppressor: SuppressorConfig = SuppressorConfig()  # of duplicates; off by default
    group: GroupConfig = GroupConfig()  # one-to-many queries beside the matching ones (two_stage only)
    second_head: bool = False  # second class heads for one-to-many targets, in training (@sec-group)

    def __post_init__(self):
        one_of(
            'detector',
            self,
            form=('plain', 'refine', 'two_stage'),
            kind=('deformable_detr',),
            enc_tokens=('selected', 'all'),
        )
        for name, on in (("enc_tokens='all'", self.enc_tokens == 'all'), ('group.queries', self.group.on)):
            if on and self.form != 'two_stage':
                raise ConfigError(f"detector.{name} needs form='two_stage', not '{self.form}'")
        if self.num_classes < 0:
            raise ConfigError(f'num_classes={self.num_classes} must not be negative')
        if self.d_model % 8:
            raise ConfigError(f'detector.d_model={self.d_model} must be a multiple of 8')
        self.transformer  # checks the other sizes

    @property
    def transformer(self) -> TransformerConfig:
        "The same sizes for the shared layers; proposals are ranked by class 0, and invalid tokens compete"
        return TransformerConfig(
            d_model=self.d_model,
            n_heads=self.heads,
            n_levels=self.levels,
            n_points=self.points,
            enc_layers=self.layers,
            dec_layers=self.layers,
            ffn=self.ffn,
            dropout=self.dropout,
            num_queries=self.num_queries,
            select_score='class0',
            select_invalid=True,
        )

    @property
    def parallel(self) -> tuple:  # of 'group', 'second_head'
        "Parts that are trained one-to-many beside the matching queries (@sec-group)"
        return parallel_parts(self)

    def build(self) -> nn.Module:  # DeformableDETR
        "The network of these settings"
        return DeformableDETR(self)

    def untrained(self) -> 'DeformableDETRConfig':
        "The same settings with random weights for the backbone"
        return replace(self, backbone=replace(self.backbone, weights='none'))


# %%
#| export
def split_points(
    model: nn.Module,  # with deformable attention
) -> dict:  # 'backbone', 'rest', 'points' -> list of trainable parameters
    "The groups of `split_parameters`, with sampling offsets and reference points in a group of their own"
    groups = split_parameters(model)
    named = model.named_parameters()
    points = [p for n, p in named if p.requires_grad and ('sampling_offsets' in n or 'reference_points' in n)]
    own = {id(p) for p in points}
    return dict(groups, rest=[p for p in groups['rest'] if id(p) not in own], points=points)


def deformable_detr_r50(
    num_classes: int,  # C
    form: str = 'plain',  # 'plain', 'refine' or 'two_stage'
) -> DeformableDETRConfig:
    "The release: ResNet-50 at strides 8, 16, 32 and one more level; 6+6 layers, width 256, 300 queries"
    return DeformableDETRConfig(num_classes, form=form)


def deformable_detr_small(
    num_classes: int,  # C
    form: str = 'two_stage',  # 'plain', 'refine' or 'two_stage'
) -> DeformableDETRConfig:
    "For a few CPU cores: EfficientNet-Lite0 at strides 8, 16 and one more level; 2+2 layers of width 128"
    backbone = BackboneConfig('efficientnet_lite0', out_strides=(8, 16))
    sizes = dict(d_model=128, levels=3, layers=2, ffn=512, num_queries=100)
    return DeformableDETRConfig(num_classes, backbone, **sizes, form=form, dropout=0.0)


# %%
release = deformable_detr_r50(91, 'two_stage')
try:
    deformable_detr_r50(91, 'two-stage')
except ConfigError as error:
    message = str(error)
assert (release.ffn, release.num_queries, release.dropout) == (1024, 300, 0.1) and 'two_stage' in message
message

# %% [markdown]
# ## The centre of a cell
#
# The position code of a token counts the valid cells up to it. DINO encodes the count itself, so that the
# first of $n$ cells lies at $1/n$ and the last one at 1. Here the count is reduced by one half, and a cell
# lies at its centre:
#
# $$
# \theta_i = 2\pi\,\frac{i-\frac12}{n+10^{-6}}, \qquad i = 1,\dots,n
# $$ {#eq-deformable-position}
#
# with sine and cosine as in @eq-backbone-sine and a temperature of 10000. In columns of padding alone $n$ is 0
# and the angle very large; no value is read there.

# %%
#| export
POSITION = dict(temperature=10000.0, offset=-0.5)  # of `sine_position` (@eq-deformable-position)

# %%
column = sine_position(torch.zeros(1, 4, 1, dtype=torch.bool), 2, **POSITION)[0, :2, :, 0]
turns = torch.tensor([1, 3, 5, 7]) / 8
centre_codes = torch.stack([(2 * math.pi * turns).sin(), (2 * math.pi * turns).cos()])
assert torch.allclose(column, centre_codes, atol=1e-5)
column.round(decimals=3)


# %% [markdown]
# ## A point is a box of 2K cells
#
# In the one-stage forms a query starts with a point and samples around it in units of cells; after a
# refinement it has a box and samples in units of the box (@eq-attention-where). Extra queries always bring
# boxes, and a layer may have both kinds. No second code path is needed: with a box of
#
# $$
# (w, h) = \left(\frac{2K}{w_l}, \frac{2K}{h_l}\right), \qquad
# \frac{\Delta}{K}\cdot\frac{(w,h)}{2} = \frac{\Delta}{(w_l,h_l)}
# $$ {#eq-deformable-point}
#
# on level $l$ both definitions give the same location. So every query has one *area* of sampling per level.

# %%
#| export
def box_areas(
    boxes: Tensor,  # (B,N,4) cxcywh in [0,1] of the image
    levels: int,  # L
    valid_ratios: Tensor = None,  # (B,L,2); None: no padding
) -> Tensor:  # (B,N,L,4) in units of the padded maps
    "Areas of sampling of boxes: the box itself on every level"
    areas = boxes[:, :, None].expand(-1, -1, levels, -1)
    return areas if valid_ratios is None else areas * valid_ratios.repeat(1, 1, 2)[:, None].to(boxes.dtype)


def point_areas(
    points: Tensor,  # (B,N,2) x, y in [0,1] of the image
    shapes,  # L pairs (H, W) of the feature maps
    n_points: int,  # K
    valid_ratios: Tensor = None,  # (B,L,2); None: no padding
) -> Tensor:  # (B,N,L,4) in units of the padded maps
    "Areas of sampling of points: 2K cells to each axis on every level (@eq-deformable-point)"
    centres = points[:, :, None].expand(-1, -1, len(shapes), -1)
    if valid_ratios is not None:
        centres = centres * valid_ratios[:, None].to(points.dtype)
    sizes = 2 * n_points / points.new_tensor([(w, h) for h, w in shapes])
    return torch.cat([centres, sizes.expand(*centres.shape)], -1)


# %%
torch.manual_seed(0)
two_maps, some_offsets = [(6, 8), (3, 4)], torch.randn(1, 5, 4, 2, 3, 2)
some_points, half_valid = torch.rand(1, 5, 2), torch.tensor([[[0.5, 1.0], [0.5, 1.0]]])
by_cells = sampling_locations(some_points[:, :, None] * half_valid[:, None], some_offsets, two_maps)
by_area = sampling_locations(point_areas(some_points, two_maps, 3, half_valid), some_offsets, two_maps)
assert torch.allclose(by_cells, by_area, atol=1e-6)
(by_cells - by_area).abs().max().item()

# %%
#| label: fig-deformable-areas
#| fig-cap: "The area of a point (dot) covers the same number of cells on each level (dashed), so that it is larger on coarse levels; the area of a box is the box on every level (solid)."
#| fig-alt: "Two grids of cells, 12x16 and 6x8, each with a dashed square around a point, small on the fine grid and large on the coarse one, and a solid box of the same place and size on both"
pic_maps, pic_point = [(12, 16), (6, 8)], torch.tensor([0.3, 0.4])
of_point = point_areas(pic_point.view(1, 1, 2), pic_maps, n_points=2)
of_box = box_areas(torch.tensor([[[0.7, 0.6, 0.3, 0.5]]]), levels=2)
pic_areas = torch.cat([of_point, of_box], 1)
assert torch.allclose(pic_areas[0, 0, 1, 2:], 2 * pic_areas[0, 0, 0, 2:])
fig, axes = plt.subplots(1, 2, figsize=(5.6, 2.3), dpi=80, layout='constrained')
for l, (ax, (h, w)) in enumerate(zip(axes, pic_maps)):
    ax.set(xlim=(0, 160), ylim=(120, 0), aspect='equal', title=f'level {l}')
    ax.set_xticks([160 * i / w for i in range(w + 1)], [])
    ax.set_yticks([120 * i / h for i in range(h + 1)], [])
    ax.grid(True, lw=0.5)
    point_area, box_area = denormalize_boxes(pic_areas[0, :, l], (120, 160))
    draw_boxes(ax, point_area[None], kind='mined')
    draw_boxes(ax, box_area[None], kind='student')
    draw_points(ax, pic_point[None] * torch.tensor([160.0, 120.0]), kind='student', size=25)
plt.show()


# %% [markdown]
# ## Decoder
#
# Let $o_l$ be the output of decoder layer $l$, $\Delta_l$ the box head of that layer, and $s_l$ the *start* of
# its box in logit space. The box is
#
# $$
# b_l=\sigma\left(\Delta_l(o_l)+s_l\right), \qquad
# s_0=\left[\sigma^{-1}(p), 0, 0\right] \;\text{(point)} \quad\text{or}\quad \sigma^{-1}(b) \;\text{(box)}
# $$ {#eq-deformable-box}
#
# In the plain form $s_l=s_0$ in all layers, and so is the area of sampling. With refinement the box of a layer,
# without gradient, is start and area of the next one:
#
# $$
# s_{l+1}=\sigma^{-1}\left(\mathrm{sg}[b_l]\right)
# $$ {#eq-deformable-refine}
#
# The predicted box *is* the next start (look forward once), so the decoder returns it. In contrast to
# @sec-transformer there is no LayerNorm after a layer, and the position of a query stays the same.

# %%
#| export
@dataclass
class QueryStart:
    "Queries before the first decoder layer"

    content: Tensor  # (B,N,d)
    pos: Tensor  # (B,N,d) position, the same for all layers
    start: Tensor  # (B,N,4) what the first layer's correction is added to, in logit space
    areas: Tensor  # (B,N,L,4) areas of sampling in the first layer, cxcywh in units of the padded maps


class DeformableDecoder(nn.Module):
    "A stack of decoder layers; with `refine`, each one starts from the boxes of the one before"

    def __init__(self, cfg: TransformerConfig, refine: bool):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(cfg) for _ in range(cfg.dec_layers))
        self.refine = refine

    def forward(
        self,
        queries: QueryStart,  # N queries
        memory: Tensor,  # (B,S,d) tokens after the encoder
        shapes,  # L pairs (H, W)
        box_heads,  # one callable (B,N,d) -> (B,N,4) per layer
        padding: Tensor = None,  # (B,S) bool, True=padding
        valid_ratios: Tensor = None,  # (B,L,2); None: no padding
        blocked: Tensor = None,  # (N,N) bool, True: row may not attend to column
        states=None,  # of an earlier pass over the same memory: its queries are attended to as well
    ) -> tuple:  # (hs (layers,B,N,d), boxes (layers,B,N,4), states: (content, pos) before each layer)
        "Outputs and boxes of all layers (@eq-deformable-box), and the inputs of all layers"
        x, pos, start, areas = queries.content, queries.pos, queries.start, queries.areas
        hs, boxes, new_states = [], [], []
        for i, (layer, box_head) in enumerate(zip(self.layers, box_heads)):
            new_states.append((x, pos))
            others = None if states is None else states[i]
            x = layer(x, pos, areas, memory, shapes, padding, blocked, others)
            hs.append(x)
            boxes.append((box_head(x).to(start.dtype) + start).sigmoid())
            if self.refine:
                now = boxes[-1].detach()
                start, areas = inverse_sigmoid(now), box_areas(now, len(shapes), valid_ratios)
        return torch.stack(hs), torch.stack(boxes), new_states


# %% [markdown]
# Which corrections does the box of a layer depend on? Free corrections in place of the heads show it: on its
# own only. In both forms the boxes also depend on the start, in the refined form those of the first layer only.

# %%
def gradient_pattern(refine, n=4):
    "Row l: gradient of the box of layer l with respect to the correction of each layer, and to the start"
    torch.manual_seed(0)
    sizes = dict(d_model=16, n_heads=2, n_levels=1, n_points=1, ffn=16)
    decoder = DeformableDecoder(TransformerConfig(**sizes, dec_layers=n), refine)
    deltas = [torch.zeros(1, 1, 4, requires_grad=True) for _ in range(n)]
    start = torch.zeros(1, 1, 4, requires_grad=True)
    queries = QueryStart(torch.randn(1, 1, 16), torch.randn(1, 1, 16), start, torch.full((1, 1, 1, 4), 0.5))
    heads = [lambda x, d=d: d for d in deltas]
    boxes = decoder(queries, torch.randn(1, 4, 16), [(2, 2)], heads)[1]
    leaves = [*deltas, start]
    rows = [torch.autograd.grad(b.sum(), leaves, retain_graph=True, allow_unused=True) for b in boxes]
    return torch.tensor([[g is not None and bool(g.any()) for g in row] for row in rows])


plain_pattern, refine_pattern = gradient_pattern(False), gradient_pattern(True)
assert torch.equal(plain_pattern[:, :4], torch.eye(4) > 0) and plain_pattern[:, 4].all()
assert torch.equal(refine_pattern[:, :4], torch.eye(4) > 0)
assert refine_pattern[:, 4].tolist() == [True, False, False, False]
refine_pattern.int()


# %% [markdown]
# ## Where queries come from
#
# **One-stage forms.** A table has a row of $2d$ numbers per query; the first half is its position $q$, the
# second half its content. A linear layer turns the position into the point:
#
# $$
# p=\sigma(W_p\,q+b_p)
# $$ {#eq-deformable-point-of-query}
#
# These queries are the same for every image.
#
# **Two-stage form.** Every token makes a proposal as in @sec-transformer: class head and box head number $D$,
# after those of the $D$ decoder layers, correct its anchor. The $Q$ tokens with the largest logit of class 0
# become queries; during training that class stands for *any object*. Position *and* content come from the box
# $b$, without gradient, through its sine code $e(b)\in\mathbb R^{2d}$ in the order $x,y,w,h$:
#
# $$
# [\,q,\;c\,]=\mathrm{LN}\left(W_t\,e(b)+b_t\right)
# $$ {#eq-deformable-proposal}
#
# **Extra queries** bring content and box. In the two-stage form their position is the first half of
# @eq-deformable-proposal. The one-stage forms have no layer for boxes; there the position is the sine code
# itself, with $d/4$ numbers per coordinate. It has no weights, and the state dict stays that of the original.
#
# ::: {.callout-note}
# ## Paper vs. code
# The originals have no extra queries, so their treatment is ours: they start from their box as the queries of a
# refined layer do, also in the plain form. The shared box head then predicts a size for queries with a point
# and a correction for those with a box; content and position tell it which.
# :::

# %%
#| export
def table_queries(
    table: Tensor,  # (Q,2d) position, content
    to_point: nn.Module,  # linear layer (..., d) -> (..., 2)
    geo: Geometry,  # of the pyramid
    n_points: int,  # K
    batch: int,  # B
) -> QueryStart:  # Q queries
    "One-stage queries: the same for every image (@eq-deformable-point-of-query)"
    pos, content = table.expand(batch, -1, -1).chunk(2, -1)
    with torch.autocast(table.device.type, enabled=False):  # half precision would round the points
        points = to_point(pos).sigmoid()
    start = torch.cat([inverse_sigmoid(points), torch.zeros_like(points)], -1)
    return QueryStart(content, pos, start, point_areas(points, geo.shapes, n_points, geo.valid_ratios))


# %% [markdown]
# The two halves of the table are easily exchanged, and nothing would fail but the results. Here they are told
# apart: the point follows from the first half only.

# %%
torch.manual_seed(0)
toy_table, toy_linear = torch.randn(3, 32), nn.Linear(16, 2)
toy_geo = token_geometry([(4, 4), (2, 2)], 16, **POSITION)
toy_queries = table_queries(toy_table, toy_linear, toy_geo, n_points=2, batch=2)
by_hand = toy_linear(toy_table[:, :16]).sigmoid()
assert torch.allclose(toy_queries.start[1, :, :2].sigmoid(), by_hand, atol=1e-5)
assert torch.equal(toy_queries.content[0], toy_table[:, 16:]) and not toy_queries.start[..., 2:].any()
by_hand


# %%
#| export
class DeformableTransformer(nn.Module):
    "Encoder, decoder and the layers that make queries; heads are passed in, because the detector owns them"

    def __init__(self, cfg: TransformerConfig, form: str):
        super().__init__()
        d = cfg.d_model
        self.cfg, self.two_stage, self._cache = cfg, form == 'two_stage', {}
        self.level_embed = nn.Parameter(torch.empty(cfg.n_levels, d))
        self.encoder, self.decoder = Encoder(cfg), DeformableDecoder(cfg, form != 'plain')
        if self.two_stage:
            self.enc_output, self.enc_output_norm = nn.Linear(d, d), nn.LayerNorm(d)
            self.pos_trans, self.pos_trans_norm = nn.Linear(2 * d, 2 * d), nn.LayerNorm(2 * d)
        else:
            self.reference_points = nn.Linear(d, 2)
        self.reset_parameters()

    def reset_parameters(self):
        "The initial values of `init_transformer`; a reference point starts without bias"
        init_transformer(self)
        if not self.two_stage:
            nn.init.zeros_(self.reference_points.bias)

    def encode_tokens(
        self,
        features,  # L maps (B,d,h,w)
        masks=None,  # L masks (B,h,w), True=padding; None: no padding
    ) -> tuple:  # (memory (B,S,d), `Geometry`)
        "Tokens of all levels through the encoder"
        geo = _kept_geometry(self._cache, features, masks, **POSITION)
        tokens = torch.cat([f.flatten(2).transpose(1, 2) for f in features], 1)
        level = torch.cat([e.expand(h * w, -1) for e, (h, w) in zip(self.level_embed, geo.shapes)])
        points = geo.reference_points.to(tokens.dtype).expand(tokens.shape[0], -1, -1, -1)
        pos = geo.position.to(tokens.dtype) + level
        return self.encoder(tokens, pos, points, geo.shapes, geo.padding), geo

    def embed_token(
        self,
        x: Tensor,  # (B,N,d) encoded tokens
    ) -> Tensor:  # (B,N,d)
        "The layer between encoder and proposal heads (two-stage)"
        return self.enc_output_norm(self.enc_output(x))

    def box_queries(
        self,
        boxes: Tensor,  # (B,N,4) cxcywh in [0,1], without gradient
        content: Tensor,  # (B,N,d); None: from the box as well (two-stage only)
        dtype: torch.dtype,  # of positions
        valid_ratios: Tensor = None,  # (B,L,2); None: no padding
    ) -> QueryStart:  # N queries
        "Queries of proposals (@eq-deformable-proposal) and of extra queries"
        num_feats = self.cfg.d_model // (2 if self.two_stage else 4)
        pos = sine_embed_boxes(boxes[..., [1, 0, 2, 3]], num_feats).to(dtype)  # in the order x, y, w, h
        if self.two_stage:
            pos, from_box = self.pos_trans_norm(self.pos_trans(pos)).chunk(2, -1)
            content = from_box if content is None else content
        areas = box_areas(boxes, self.cfg.n_levels, valid_ratios)
        return QueryStart(content, pos, inverse_sigmoid(boxes), areas)


# %% [markdown]
# The order of a box code: for a two-stage query of width $d$, the first $d/2$ numbers depend on $x$.

# %%
codes = sine_embed_boxes(torch.tensor([[0.1, 0.5, 0.2, 0.2], [0.9, 0.5, 0.2, 0.2]])[:, [1, 0, 2, 3]], 8)
differs = (codes[0] != codes[1]).nonzero()[:, 0]
assert differs.max() < 8 == codes.shape[1] // 4
differs.tolist()


# %% [markdown]
# ## All tokens, for the loss of the encoder
#
# The original trains the encoder's heads on *every* token, not only on the $Q$ selected ones: the matching may
# give an object to a token that was not selected, and all other tokens learn that they are background. With
# `enc_tokens='all'` the outputs of the training mode hold all $S$ tokens. The anchor of an invalid token is
# $+\infty$ in logit space, so its box is $(1,1,1,1)$ and passes no gradient.

# %%
#| export
def propose_all(
    memory: Tensor,  # (B,S,d) encoder output
    geo: Geometry,  # anchors, and which are valid
    embed,  # (B,N,d) -> (B,N,d): layers between token and heads
    class_head,  # (B,N,d) -> (B,N,C)
    box_head,  # (B,N,d) -> (B,N,4)
    cfg: TransformerConfig,  # number of queries, kind of score
) -> tuple:  # (logits (B,S,C), boxes (B,S,4) in [0,1], embedded tokens (B,S,d), index (B,Q)), with gradient
    "As `propose`, but of all tokens; an invalid one is a token of zeros with the box 1, 1, 1, 1"
    h = embed(memory.masked_fill(~geo.valid[..., None], 0))
    logits, valid = class_head(h), None if cfg.select_invalid else geo.valid
    boxes = (box_head(h) + geo.anchors.to(torch.promote_types(memory.dtype, torch.float32))).sigmoid()
    return logits, boxes, h, select_queries(logits.detach(), cfg.num_queries, valid, cfg.select_score)


# %%
torch.manual_seed(0)
right_half = torch.tensor([[[False, False, True, True]] * 2])
padded_geo = token_geometry([(2, 4)], 16, [right_half], **POSITION)
toy_memory = torch.randn(1, 8, 16, requires_grad=True)
toy_heads, toy_sizes = (nn.Linear(16, 3), nn.Linear(16, 4)), TransformerConfig(d_model=16, num_queries=3)
_, toy_boxes, _, toy_index = propose_all(toy_memory, padded_geo, nn.Identity(), *toy_heads, toy_sizes)
toy_boxes.sum().backward()
is_invalid = right_half.flatten()
assert (toy_boxes[0, is_invalid] == 1).all() and (toy_boxes[0, ~is_invalid] < 1).all()
assert toy_index.shape == (1, 3) and not is_invalid[toy_index].any()
assert not toy_memory.grad[0, is_invalid].any() and toy_memory.grad[0, ~is_invalid].any()
toy_boxes[0, :4].detach().round(decimals=2)


# %% [markdown]
# ## The detector
#
# The heads start at the prior of @eq-detector-prior and at corrections of zero, but for the size of a box
# without a reference size: with $s_0=0$ an untrained head would predict half the image. A bias of -2 makes it
# $\sigma(-2)=0.12$. It belongs to the shared head (*plain*) or to that of the first layer (*refine*); proposals
# have a size.

# %%
#| export
def layer_heads(
    d_model: int,  # d
    num_classes: int,  # C
    layers: int,  # D
    form: str,  # 'plain': one pair; 'refine': D pairs; 'two_stage': D+1 pairs, the last one of the encoder
) -> tuple:  # (class heads, box heads), two `nn.ModuleList`
    "Untrained heads, copies of one pair but for the bias of box sizes"
    class_head, box_head = make_heads(d_model, num_classes)
    count = dict(plain=1, refine=layers, two_stage=layers + 1)[form]
    class_heads = nn.ModuleList(copy.deepcopy(class_head) for _ in range(count))
    box_heads = nn.ModuleList(copy.deepcopy(box_head) for _ in range(count))
    if form != 'two_stage':
        nn.init.constant_(box_heads[0].layers[-1].bias[2:], -2.0)
    return class_heads, box_heads


# %% [markdown]
# One pass of the encoder serves any number of decoder passes. Extra queries stand in front of the matching ones:

# %%
#| export
@dataclass
class EncodedImages:
    "A batch of images after the encoder: all that any number of decoder passes need"

    features: list  # L maps (B,d,h,w): the pyramid before the encoder
    memory: Tensor  # (B,S,d) tokens after it
    padding_mask: Tensor  # (B,S) bool, True=padding; None: no padding
    shapes: tuple  # L pairs (H, W)
    valid_ratios: Tensor  # (B,L,2) valid share of width and height; None: no padding
    queries: QueryStart  # the matching queries
    enc_logits: Tensor = None  # (B,Q or S,C) class logits of proposals, with gradient; None: one-stage
    enc_boxes: Tensor = None  # (B,Q or S,4) their boxes, cxcywh in [0,1], with gradient
    selected: Tensor = None  # (B,Q) index of the token of each proposal


def _with_extras(encoded, extras, transformer, alone):
    "(queries, mask, slices) of extra and matching queries, or of the extra ones alone"
    own = encoded.queries
    content, logits, blocked, slices = combine_extras(extras, own.content.shape[1])
    if not extras:
        return own, None, slices
    boxes, dtype = at_least_float32(logits.detach()).sigmoid().to(own.start.dtype), own.content.dtype
    added = transformer.box_queries(boxes, content.to(dtype), dtype, encoded.valid_ratios)
    if alone:
        return added, blocked[: content.shape[1]], slices
    pairs = zip(vars(added).values(), vars(own).values())
    return QueryStart(*(torch.cat([a.to(o.dtype), o], 1) for a, o in pairs)), blocked, slices


# %% [markdown]
# First the methods that read no image. Parts that are trained beside the matching queries (@sec-group) start as
# copies of heads that are there.

# %%
#| export
class _Parts(nn.Module):
    "What methods and optimiser ask of a Deformable-DETR, apart from its forward pass"

    def denoise(
        self,
        targets: list,  # per image dict(labels (N,), boxes (N,4) cxcywh in [0,1])
    ) -> list:  # empty
        "No denoising queries"
        return []

    def selection_heads(
        self,
    ) -> tuple:  # (layers between token and heads, class head, box head); () one-stage
        "What selects the matching queries, to copy it for a group"
        if self.cfg.form != 'two_stage':
            return ()
        embed = nn.Sequential(self.transformer.enc_output, self.transformer.enc_output_norm)
        return embed, self.class_embed[-1], self.bbox_embed[-1]

    def main_class_head(self) -> nn.Module:
        "What second class heads start as: those of the decoder layers"
        return self.class_embed[: self.cfg.layers]

    def param_groups(self) -> dict:  # 'backbone', 'rest', 'points' -> trainable parameters
        "Parameters for the optimiser; sampling offsets and reference points are a group of their own"
        return split_points(self)


# %%
#| export
class DeformableDETR(_Parts):
    "Deformable-DETR in one of its three forms, with room for extra queries"

    def __init__(self, cfg: DeformableDETRConfig):
        super().__init__()
        self.cfg, d = cfg, cfg.d_model
        self.backbone = build_backbone(cfg.backbone)
        self.input_proj = InputProj(self.backbone.channels, d, cfg.levels)
        self.transformer = DeformableTransformer(cfg.transformer, cfg.form)
        if cfg.form != 'two_stage':
            self.query_embed = nn.Embedding(cfg.num_queries, 2 * d)
        self.class_embed, self.bbox_embed = layer_heads(d, cfg.num_classes, cfg.layers, cfg.form)
        self.suppressor = build_suppressor(cfg.suppressor, cfg.transformer, cfg.num_classes)
        self.group = build_group(cfg.group, cfg.transformer, *self.selection_heads())
        self.second_head = copy.deepcopy(self.main_class_head()) if cfg.second_head else None

    def encode(
        self,
        images: Tensor,  # (B,3,H,W) normalised, zero padded at the right and the bottom
        mask: Tensor = None,  # (B,H,W) bool, True=padding; None: nothing is padded
    ) -> EncodedImages:
        "Everything up to the queries; one pass serves any number of `decode`"
        features, t = self.input_proj(self.backbone(images)), self.transformer
        memory, geo = t.encode_tokens(features, level_masks(mask, features))
        encoded = EncodedImages(features, memory, geo.padding, geo.shapes, geo.valid_ratios, None)
        if self.cfg.form != 'two_stage':
            encoded.queries = table_queries(
                self.query_embed.weight, t.reference_points, geo, self.cfg.points, memory.shape[0]
            )
            return encoded
        heads = self.class_embed[-1], self.bbox_embed[-1]
        of_tokens = propose_all if self.training and self.cfg.enc_tokens == 'all' else propose
        encoded.enc_logits, boxes, _, encoded.selected = of_tokens(memory, geo, t.embed_token, *heads, t.cfg)
        encoded.enc_boxes = boxes
        if of_tokens is propose_all:
            boxes = boxes.gather(1, encoded.selected[..., None].expand(-1, -1, 4))
        encoded.queries = t.box_queries(boxes.detach(), None, memory.dtype, geo.valid_ratios)
        return encoded

    def decode(
        self,
        encoded: EncodedImages,  # from `encode`
        extras=(),  # list of `ExtraQueries`, which stand in this order in front of the matching queries
        cached: Outputs = None,  # of `decode(encoded)`: only the extras are computed
    ) -> Outputs:
        "Queries through the decoder and the heads"
        if cached is not None and not extras:
            return cached
        queries, blocked, slices = _with_extras(encoded, extras, self.transformer, cached is not None)
        repeat = self.cfg.layers if self.cfg.form == 'plain' else 1
        hs, boxes, states = self.transformer.decoder(
            queries,
            encoded.memory,
            encoded.shapes,
            [*self.bbox_embed] * repeat,
            encoded.padding_mask,
            encoded.valid_ratios,
            blocked,
            None if cached is None else cached['states'],
        )
        logits = torch.stack([head(h) for head, h in zip([*self.class_embed] * repeat, hs)])
        outputs = collect_outputs(encoded, hs, logits, boxes, extras, slices, states, cached)
        return add_second(self, outputs, [*(self.second_head or ())] * repeat)

    def forward(
        self,
        images: Tensor,  # (B,3,H,W) as in `encode`
        mask: Tensor = None,  # (B,H,W) bool, True=padding
        targets: list = None,  # not used: there is no denoising
    ) -> Outputs:
        "Encode, decode and `add_suppressed`; in training a parallel group is added, if there is one"
        encoded = self.encode(images, mask)
        return add_suppressed(self, self.decode(encoded, parallel_group(self, encoded)))


# %% [markdown]
# The three forms on two scenes of the built-in data, untrained. In the one-stage forms all boxes have the size
# $\sigma(-2)$; in the two-stage form they are the anchors of the selected tokens.

# %%
scenes = [DigitsScenes('train', n=8)[i] for i in (3, 5)]
lesson_backbone = BackboneConfig('efficientnet_lite0', out_strides=(8,))
lesson_sizes = dict(d_model=64, levels=2, layers=3, ffn=128, num_queries=30, dropout=0.0)
models, first_outputs = {}, {}
for form in ('plain', 'refine', 'two_stage'):
    torch.manual_seed(0)
    models[form] = build_detector(DeformableDETRConfig(10, lesson_backbone, **lesson_sizes, form=form)).eval()
mean, std = models['plain'].backbone.mean, models['plain'].backbone.std
images = torch.stack([TF.normalize(TF.to_tensor(s.image), mean, std) for s in scenes])
with torch.no_grad():
    for form, model in models.items():
        first_outputs[form] = model(images)
assert all(isinstance(model, DetectionTransformer) for model in models.values())
sizes_of = {form: out['pred_boxes'][..., 2:] for form, out in first_outputs.items()}
small_side = torch.sigmoid(torch.tensor(-2.0))
assert all(torch.allclose(sizes_of[form], small_side, atol=1e-4) for form in ('plain', 'refine'))
proposals = first_outputs['two_stage']['enc_outputs']['pred_boxes']
assert torch.allclose(first_outputs['two_stage']['pred_boxes'], proposals, atol=1e-4)
{form: sorted(out) for form, out in first_outputs.items()}

# %%
#| label: fig-deformable-starts
#| fig-cap: "One-stage queries start at the same points in every image, wherever the objects are; two-stage queries start at the anchors of tokens of this image. Without training the choice means little."
#| fig-alt: "Two scenes of digits, one per column; in the upper row the same thirty dots lie on both scenes, in the lower row small boxes at different places"
fig, axes = plt.subplots(2, 2, figsize=(4.4, 4.6), dpi=80, layout='constrained')
for i, scene in enumerate(scenes):
    for row, form in enumerate(('refine', 'two_stage')):
        show_image(axes[row, i], scene.image, title=form)
        draw_boxes(axes[row, i], scene.boxes, kind='truth')
    starting_boxes = denormalize_boxes(first_outputs['two_stage']['pred_boxes'][i], scene.size)
    points = first_outputs['refine']['pred_boxes'][i, :, :2] * torch.tensor([96.0, 96.0])
    draw_points(axes[0, i], points, kind='student', size=15)
    draw_boxes(axes[1, i], starting_boxes, kind='student', lw=0.8)
plt.show()

# %% [markdown]
# Extra queries have no influence on the matching ones, and may be added later with equal results
# (@eq-contract-extras), in every form:

# %%
torch.manual_seed(0)
no_mask = torch.zeros(4, 4, dtype=torch.bool)
extra = ExtraQueries(torch.randn(2, 4, 64), torch.randn(2, 4, 4), no_mask, 'extra')
gaps = {}
with torch.no_grad():
    for form, model in models.items():
        encoded = model.encode(images)
        alone, common = model.decode(encoded), model.decode(encoded, [extra])
        later = model.decode(encoded, [extra], alone)
        unmoved = (alone['pred_logits'] - common['pred_logits']).abs().max()
        equal = (later['extra']['extra']['hs'] - common['extra']['extra']['hs']).abs().max()
        gaps[form] = max(unmoved.item(), equal.item())
assert max(gaps.values()) < 1e-4
gaps


# %% [markdown]
# ## Published weights
#
# The names are those of the original state dicts with three exceptions:
#
# | original | here |
# |---|---|
# | `backbone.0.body.` | `backbone.body.` |
# | `class_embed.0` to `class_embed.5` in the plain form: one head, six names | `class_embed.0` |
# | `transformer.decoder.bbox_embed.`, in the two-stage form also `class_embed.`: copies | left out |
#
# Copies must agree; if they differ, the file belongs to another form. A file of the release holds the state
# dict under the key `model`.

# %%
#| export
def check_fit(
    found: dict,  # state dict under our names
    settings,  # of the network that it belongs to
    network: str,  # its name, for the message
    faults=(),  # found before
):
    "`ConfigError` with `faults` and every name or shape that the network has otherwise"
    wanted, faults = build_detector(settings.untrained()).state_dict(), list(faults)
    faults += [f'missing {k}' for k in wanted if k not in found]
    for name, value in found.items():
        if name not in wanted:
            faults.append(f'unknown {name}')
        elif value.shape != wanted[name].shape:
            faults.append(f'{name} is {tuple(value.shape)}, not {tuple(wanted[name].shape)}')
    if faults:
        raise ConfigError(
            f'the weights do not fit a {network} ({len(faults)} mismatches): '
            f'{"; ".join(faults[:5])}{" ..." if len(faults) > 5 else ""}'
        )


def from_original(
    state: dict,  # state dict under the original names
    settings: DeformableDETRConfig,  # of the network that it belongs to
) -> dict:  # state dict for `load_state_dict`
    "Original names to ours; `ConfigError` where copies differ, or a name or shape does not fit"
    renamed, faults = {}, []
    for key, value in state.items():
        if key.endswith(('num_batches_tracked', 'total_ops', 'total_params')):
            continue
        name = key.replace('backbone.0.body.', 'backbone.body.', 1)
        name = re.sub(r'^transformer\.decoder\.(class|bbox)_embed\.', r'\1_embed.', name)
        if settings.form == 'plain':
            name = re.sub(r'^(class|bbox)_embed\.\d+\.', r'\1_embed.0.', name)
        if name in renamed and not torch.equal(renamed[name], value):
            faults.append(f'{key} differs from its copy')
        renamed[name] = value
    check_fit(renamed, settings, f'{settings.form} Deformable-DETR', faults)
    return renamed


# %%
def to_original(model):
    "State dict under the original names, with the copies that the originals save"
    names, layers = {}, model.cfg.layers
    for key, value in model.state_dict().items():
        names[key.replace('backbone.body.', 'backbone.0.body.')] = value
        if model.cfg.form == 'plain' and '_embed.0.' in key:
            names |= {key.replace('.0.', f'.{j}.', 1): value for j in range(1, layers)}
        if model.cfg.form != 'plain' and key.startswith('bbox_embed.'):
            names[f'transformer.decoder.{key}'] = value
    return names


plain = models['plain'].cfg
resnet_plain = replace(plain, backbone=BackboneConfig('resnet18', 'none', (16, 32)))
source = build_detector(resnet_plain)
original = to_original(source)
again = from_original(original, resnet_plain)
assert all(torch.equal(v, source.state_dict()[k]) for k, v in again.items())
try:
    from_original({**original, 'class_embed.2.bias': torch.zeros(10)}, resnet_plain)
except ConfigError as error:
    misfit = str(error)
assert 'class_embed.2.bias differs from its copy' in misfit
len(original), len(again), misfit

# %% [markdown]
# ## Summary
#
# - One network, three forms: learned queries, iterative refinement, proposals of the encoder.
# - A query's position comes from a table or from its box, once, and holds for all layers.
# - A point is sampled like a box of $2K$ cells, so that one code path serves points, boxes and extra queries.
# - Heads are separate per layer when boxes are refined; the predicted box is the next start.
# - Names in the state dict are those of the release; `from_original` accepts a file only as a whole.
#
# The losses of this book (@sec-losses) train all three forms. The original criterion differs in the weight of the
# class loss, and trains *all* tokens in the two-stage form (`enc_tokens='all'`).
#
# ## Exercises
#
# 1. Which outputs change if the two halves of the query table are exchanged, and which if $x$ and $y$ of the box
#    code are?
# 2. In the plain form the point gets a gradient from every layer. Draw the pattern for a refined decoder that
#    keeps the gradient of its boxes.
# 3. Invalid tokens compete for the queries here. When are there many of them among the best 300, and what do
#    these queries predict?
