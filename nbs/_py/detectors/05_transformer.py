# %% [markdown]
# # Transformer {#sec-transformer}
#
# > Turn feature maps into object queries: encode, select proposals, refine them layer by layer.
#
# The first DETR starts from queries that are the same for every image, and each attends to the whole image. It
# needs hundreds of epochs before a query has learned where to attend. The cure has three parts. In the
# *encoder* each cell of the feature pyramid attends to a few others, on all levels. *Query selection* scores
# the encoded cells and starts the queries at the best ones. With *iterative refinement* each decoder layer
# gets a box and predicts only a correction. This chapter holds the three; backbone and heads belong to
# @sec-detector.

# %%
#| default_exp detectors.transformer

# %%
#| hide
import warnings

warnings.filterwarnings('ignore', message='IProgress')

# %%
#| export
import math
from dataclasses import dataclass
from functools import lru_cache
import torch
import torch.nn.functional as F
from torch import nn, Tensor
from semidetr.detectors.attention import MSDeformAttn
from semidetr.detectors.backbone import sine_position
from semidetr.boxes import inverse_sigmoid
from semidetr.core import ConfigError, one_of
from semidetr.detectors.self_attention import SelfAttention


# %% [markdown]
# ## Sizes and variants

# %%
#| export
@dataclass(frozen=True)
class TransformerConfig:
    "Size and variant of encoder and decoder; the defaults are those of the paper's DINO"

    d_model: int = 256  # width d of every token and query
    n_heads: int = 8  # M
    n_levels: int = 4  # L feature maps, the coarsest ones made by stride-2 convolutions
    n_points: int = 4  # K samples per head and level
    enc_layers: int = 6  # layers of the encoder
    dec_layers: int = 6  # layers of the decoder
    ffn: int = 2048  # hidden width of the feed-forward blocks
    dropout: float = 0.0  # after attention and in the feed-forward block (DINO 0, Deformable-DETR .1)
    activation: str = 'relu'  # 'relu' or 'gelu'
    num_queries: int = 900  # Q
    query_content: str = 'learned'  # 'learned': a table (DINO); 'memory': the selected tokens, detached
    select_score: str = (
        'max'  # of a token: 'max' over the classes (DINO), 'class0': for class-agnostic targets
    )
    select_invalid: bool = False  # do padding and border cells compete for the queries? (official code: yes)
    position_unit: str = (
        'canvas'  # of a query's position code: 'canvas', padding included (official), 'image'
    )

    def __post_init__(self):
        one_of(
            'transformer',
            self,
            activation=('relu', 'gelu'),
            query_content=('learned', 'memory'),
            select_score=('max', 'class0'),
            position_unit=('canvas', 'image'),
        )
        if self.d_model % self.n_heads or self.d_model % 4:
            raise ConfigError(
                f'transformer.d_model={self.d_model} must be a multiple of 4 and of n_heads={self.n_heads}'
            )
        if min(self.num_queries, self.n_levels, self.dec_layers) < 1:
            raise ConfigError('transformer: num_queries, n_levels and dec_layers must be at least 1')


# %% [markdown]
# ## Tokens and their positions
#
# The maps of all $L$ levels are flattened into one sequence of $S=\sum_l H_lW_l$ *tokens*. A batch is padded
# at the right and the bottom, so a token needs two positions: relative to the valid part of its image, for
# boxes; and relative to the padded map, for sampling. The first is the centre of cell $(i,j)$ divided by the
# valid width and height $W'_l,H'_l$ in cells; the second is the first times the *valid ratio*
# $r_l=(W'_l/W_l,\;H'_l/H_l)$:
#
# $$
# p_{ij}=\left(\frac{j+.5}{W'_l},\;\frac{i+.5}{H'_l}\right),\qquad \hat p_{ij}^{(l')}=p_{ij}\odot r_{l'}
# $$ {#eq-transformer-points}

# %%
#| export
def cell_centres(
    shapes,  # L pairs (H, W) of the feature maps
    valid_wh: Tensor,  # (B or 1, L, 2) valid width and height, in cells
) -> Tensor:  # (B or 1, S, 2) x, y; 1 is the end of the valid part
    "Positions of tokens in their image (@eq-transformer-points)"
    out = []
    for (h, w), wh in zip(shapes, valid_wh.unbind(1)):
        x, y = torch.arange(w, device=wh.device) + 0.5, torch.arange(h, device=wh.device) + 0.5
        out.append(torch.stack(torch.meshgrid(x, y, indexing='xy'), -1).flatten(0, 1) / wh[:, None])
    return torch.cat(out, 1)


def _full_size(shapes, device):
    return torch.tensor([[[w, h] for h, w in shapes]], device=device, dtype=torch.float32)  # (1,L,2)


# %% [markdown]
# One level of 2x4 cells whose last two columns are padding: the valid columns lie at a quarter and three
# quarters of the image, the padding beyond 1.

# %%
centres = cell_centres([(2, 4)], torch.tensor([[[2.0, 2.0]]]))
assert centres[0, :, 0].tolist() == [0.25, 0.75, 1.25, 1.75] * 2
centres[0]


# %% [markdown]
# ## One anchor for each token
#
# The proposal of a token of level $l$ starts from a box around its cell whose side depends on the level only:
#
# $$
# a = \left(p_{ij},\; 0.05\cdot 2^l,\; 0.05\cdot 2^l\right)
# $$ {#eq-transformer-anchor}
#
# The box head corrects it in logit space, where 0 and 1 are infinitely far away. Anchors with a coordinate
# outside $(0.01, 0.99)$, and those of padding, are therefore *invalid*: their logit is $+\infty$, their box
# $(1,1,1,1)$.

# %%
#| export
def anchor_logits(
    shapes,  # L pairs (H, W) of the feature maps
    valid_wh: Tensor = None,  # (B,L,2) valid width and height, in cells; None: no padding
    device=None,  # of the result, if there is no `valid_wh`
) -> tuple:  # ((B or 1, S, 4) logits, +inf where invalid; (B or 1, S) bool: valid)
    "The anchor of each token, in logit space (@eq-transformer-anchor)"
    centres = cell_centres(shapes, _full_size(shapes, device) if valid_wh is None else valid_wh)
    sides = [torch.full((h * w,), 0.05 * 2**l, device=centres.device) for l, (h, w) in enumerate(shapes)]
    anchors = torch.cat([centres, torch.cat(sides)[:, None].expand(*centres.shape)], -1)
    valid = ((anchors > 0.01) & (anchors < 0.99)).all(-1)
    return torch.logit(anchors).masked_fill(~valid[..., None], math.inf), valid


# %%
logits, valid = anchor_logits([(4, 4), (2, 2)])
anchors = logits[0].sigmoid()
assert torch.allclose(anchors[0], torch.tensor([0.125, 0.125, 0.05, 0.05]))
assert torch.allclose(anchors[16], torch.tensor([0.25, 0.25, 0.1, 0.1]))
anchors[[0, 16]]


# %% [markdown]
# The best-scoring tokens become queries. A token has one logit for each class; its score is the largest of
# them. If there are fewer tokens than queries, all tokens are taken, the invalid ones last.

# %%
#| export
def select_queries(
    logits: Tensor,  # (B,S,C) class logits of all tokens
    num_queries: int,  # Q; capped at S
    valid: Tensor = None,  # (B or 1, S) bool; None: all compete
    score: str = 'max',  # 'max' over the classes, or 'class0'
) -> Tensor:  # (B,Q) token indices, best first; invalid ones only where fewer than Q are valid
    "The tokens that become queries"
    rank = logits[..., 0] if score == 'class0' else logits.amax(-1)
    if valid is not None:
        rank = rank.masked_fill(~valid, -math.inf)
    return rank.topk(min(num_queries, rank.shape[1]), dim=1).indices


# %%
token_logits = torch.tensor([[[0.0, 1.0], [5.0, 0.0], [9.0, 9.0], [2.0, 3.0]]])
third_is_invalid = torch.tensor([[True, True, False, True]])
first_two = select_queries(token_logits, 2, third_is_invalid)
everything = select_queries(token_logits, 900, third_is_invalid)
assert first_two.tolist() == [[1, 3]] and everything.tolist() == [[1, 3, 0, 2]]
first_two, everything

# %% [markdown]
# ::: {.callout-note}
# ## Paper vs. code
# In the official code invalid tokens compete too: their features are set to zero before the heads, so all of
# them share one score, and more padding means more of them. Here they are ranked last, so that padding cannot
# displace a proposal; `select_invalid=True` restores the official ranking.
# :::

# %%
import matplotlib.pyplot as plt
from semidetr.draw import draw_boxes, draw_points

# %%
#| label: fig-transformer-anchors
#| fig-cap: "Padding gives no proposals: each level has one anchor per cell of the valid part (dots), with a side that doubles with the level (boxes); the queries start at the tokens with the best scores (filled)."
#| fig-alt: "Two grids of cells, 8x8 and 4x4; the right quarter is padding and empty; dots on the valid cells, a few of them filled, and an anchor box on each level"
pic_shapes, pic_wh = [(8, 8), (4, 4)], torch.tensor([[[6.0, 8.0], [3.0, 4.0]]])
pic_logits, pic_valid = anchor_logits(pic_shapes, pic_wh)
pic_size = torch.tensor([96.0, 128.0])  # of an image in a canvas of 128x128
pic_xy = cell_centres(pic_shapes, pic_wh)[0] * pic_size
score = -(pic_xy - torch.tensor([40.0, 50.0])).norm(dim=-1)  # as if an object lay at (40,50)
chosen = select_queries(score[None, :, None], 9, pic_valid)[0]
fig, axes = plt.subplots(1, 2, figsize=(5.4, 2.8), dpi=80)
for l, (ax, part) in enumerate(zip(axes, (slice(0, 64), slice(64, 80)))):
    ax.set(xlim=(0, 128), ylim=(128, 0), aspect='equal', title=f'level {l}', xticks=[], yticks=[])
    ax.axvspan(96, 128, color='#dddddd')
    ok, here = pic_valid[0, part], pic_xy[part]
    ax.plot(*here[ok].T, 'o', ms=3, mfc='none', color='grey')
    picked = chosen[(chosen >= part.start) & (chosen < part.stop)]
    draw_points(ax, pic_xy[picked], kind='student', size=30)
    side = 0.05 * 2**l * pic_size
    first = torch.cat([here[0] - side / 2, here[0] + side / 2])
    draw_boxes(ax, first[None], kind='truth')
plt.show()


# %% [markdown]
# ## From a box to a position code
#
# A decoder layer needs the position of its box. With $F$ numbers per coordinate (128 in the paper) and
# $T=10000$, the code of a coordinate $v$ is
#
# $$
# e_{2i}(v)=\sin\frac{2\pi v}{T^{2i/F}},\qquad e_{2i+1}(v)=\cos\frac{2\pi v}{T^{2i/F}}
# $$ {#eq-transformer-sine}
#
# and the code of a box is the four codes in the order $y, x, w, h$. Two linear layers then turn it into the
# query's position.

# %%
#| export
@lru_cache(maxsize=16)
def _frequencies(n, temperature, device, dtype):
    with torch.inference_mode(False):
        return 2 * math.pi / temperature ** (torch.arange(n, device=device, dtype=dtype) / n)


def sine_embed_boxes(
    boxes: Tensor,  # (..., 4) cxcywh in [0,1]
    num_feats: int = 128,  # F, even
    temperature: float = 10000.0,  # T
) -> Tensor:  # (..., 4*F), blocks in the order y, x, w, h
    "Sine code of a box (@eq-transformer-sine)"
    frequencies = _frequencies(num_feats // 2, temperature, boxes.device, boxes.dtype)
    angle = boxes[..., [1, 0, 2, 3], None] * frequencies
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-3)


# %%
code = sine_embed_boxes(torch.tensor([0.25, 0.5, 0.0, 0.0]), num_feats=2).view(4, 2)
by_hand = torch.tensor([[0.0, -1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])  # y=.5, x=.25, w=h=0
assert torch.allclose(code, by_hand, atol=1e-6)
code


# %% [markdown]
# ## Refinement, and looking forward twice
#
# Decoder layer $d$ gets the box $b_{d-1}$ and predicts a correction $\Delta_d$. With $\mathrm{sg}$ for *no
# gradient through this*,
#
# $$
# \tilde b_d=\sigma\left(\Delta_d+\sigma^{-1}(b_{d-1})\right),\qquad b_d=\mathrm{sg}[\tilde b_d]
# $$ {#eq-transformer-refine}
#
# $\sigma^{-1}$ clips its argument at a distance of $10^{-5}$ from 0 and 1, so that the chain stays finite
# even from an invalid anchor. The next layer starts from $b_d$, without gradient: each layer is responsible
# for one step. But the box of layer $d$ that enters the *loss* starts from the box with gradient, and uses the
# correction predicted from the normalised output, $\Delta'_d$:
#
# $$
# \hat b_d=\sigma\left(\Delta'_d+\sigma^{-1}(\tilde b_{d-1})\right)
# $$ {#eq-transformer-lft}
#
# So the loss of layer $d$ also trains layer $d-1$ to give a better start, and no earlier layer.

# %%
#| export
def refine(
    reference: Tensor,  # (..., 4) cxcywh in [0,1]
    delta: Tensor,  # (..., 4) correction in logit space
) -> Tensor:  # (..., 4) in [0,1], in the type of `reference`
    "Move a box in logit space (@eq-transformer-refine)"
    return (delta.to(reference.dtype) + inverse_sigmoid(reference)).sigmoid()


def predict_boxes(
    references: Tensor,  # (layers,B,N,4) the box before each layer, with gradient
    deltas: Tensor,  # (layers,B,N,4) box head of the normalised outputs
    look_forward_twice: bool = True,  # False: the loss of a layer trains its own correction only
) -> Tensor:  # (layers,B,N,4) cxcywh in [0,1]
    "Boxes for the loss (@eq-transformer-lft)"
    return refine(references if look_forward_twice else references.detach(), deltas)


# %%
moved = refine(torch.tensor([0.5, 0.5, 0.5, 1.0]), torch.tensor([0.0, math.log(3), -math.log(3), 0.0]))
assert torch.allclose(moved, torch.tensor([0.5, 0.75, 0.25, 1.0]), atol=1e-4)
moved


# %% [markdown]
# ## Building blocks
#
# The self-attention among queries has the weights of `nn.MultiheadAttention` in the same layout, and its boolean
# mask (True: this row may not attend to this column). It is written out because queries and keys share their
# input while values do not: two matrix products instead of three.

# %%
#| export
class MLP(nn.Module):
    "Linear layers with ReLU between"

    def __init__(
        self,
        d_in: int,  # width of the input
        d_hidden: int,  # width between the layers
        d_out: int,  # width of the output
        n_layers: int,  # number of linear layers
    ):
        super().__init__()
        sizes = [d_in] + [d_hidden] * (n_layers - 1) + [d_out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


# %% [markdown]
# ## Encoder
#
# A token samples a few locations near itself on each level (@sec-attention): query = token + position, where
# the position is the sine code of its cell in the valid part plus a learned vector for its level. Then follows
# a feed-forward block. LayerNorm comes after each sum; there is none after the last layer.

# %%
#| export
class _FeedForward(nn.Module):
    "The block that ends both kinds of layer; a base class, so that the weights keep their usual names"

    def _build_ffn(self, cfg):
        self.linear1, self.linear2 = nn.Linear(cfg.d_model, cfg.ffn), nn.Linear(cfg.ffn, cfg.d_model)
        self.dropout = nn.Dropout(cfg.dropout) if cfg.dropout else nn.Identity()
        self.activation = dict(relu=F.relu, gelu=F.gelu)[cfg.activation]

    def _ffn(self, x):
        return self.dropout(self.linear2(self.dropout(self.activation(self.linear1(x)))))


def _deform_attn(cfg):
    return MSDeformAttn(cfg.d_model, cfg.n_levels, cfg.n_heads, cfg.n_points)


class EncoderLayer(_FeedForward):
    "Deformable self-attention of the tokens, then a feed-forward block; LayerNorm after each"

    def __init__(self, cfg: TransformerConfig):
        super().__init__()
        self.self_attn = _deform_attn(cfg)
        self.norm1, self.norm2 = nn.LayerNorm(cfg.d_model), nn.LayerNorm(cfg.d_model)
        self._build_ffn(cfg)

    def forward(
        self,
        x: Tensor,  # (B,S,d) tokens
        pos: Tensor,  # (B or 1, S, d) position codes
        reference_points: Tensor,  # (B,S,L,2) in units of the padded maps
        shapes,  # L pairs (H, W)
        padding: Tensor = None,  # (B,S) bool, True=padding
    ) -> Tensor:  # (B,S,d)
        x = self.norm1(x + self.dropout(self.self_attn(x + pos, reference_points, x, shapes, padding)))
        return self.norm2(x + self._ffn(x))


# %%
#| export
class Encoder(nn.Module):
    "A stack of encoder layers; no norm after the last"

    def __init__(self, cfg: TransformerConfig):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(cfg) for _ in range(cfg.enc_layers))

    def forward(
        self,
        x: Tensor,  # (B,S,d) tokens
        pos: Tensor,  # (B or 1, S, d) position codes
        reference_points: Tensor,  # (B,S,L,2) in units of the padded maps
        shapes,  # L pairs (H, W)
        padding: Tensor = None,  # (B,S) bool, True=padding
    ) -> Tensor:  # (B,S,d)
        for layer in self.layers:
            x = layer(x, pos, reference_points, shapes, padding)
        return x


# %% [markdown]
# ## Decoder
#
# A query is a pair of *content* and box. In a layer the queries attend to each other (values are the content
# alone, without position), then to the image around their boxes, and pass a feed-forward block. The weights
# are named as in Deformable-DETR: `norm2` follows the self-attention, `norm1` the attention to the image,
# `norm3` the feed-forward block.

# %%
#| export
class DecoderLayer(_FeedForward):
    "Self-attention of the queries, deformable attention to the memory, feed-forward; LayerNorm after each"

    def __init__(self, cfg: TransformerConfig):
        super().__init__()
        self.self_attn = SelfAttention(cfg.d_model, cfg.n_heads, cfg.dropout)
        self.norm2 = nn.LayerNorm(cfg.d_model)
        self.cross_attn = _deform_attn(cfg)
        self.norm1, self.norm3 = nn.LayerNorm(cfg.d_model), nn.LayerNorm(cfg.d_model)
        self._build_ffn(cfg)

    def forward(
        self,
        x: Tensor,  # (B,N,d) queries
        pos: Tensor,  # (B,N,d) position codes
        reference_boxes: Tensor,  # (B,N,L,4) in units of the padded maps
        memory: Tensor,  # (B,S,d) tokens after the encoder
        shapes,  # L pairs (H, W)
        padding: Tensor = None,  # (B,S) bool, True=padding
        blocked: Tensor = None,  # (N,N) bool, True: row may not attend to column
        others=None,  # (content, pos) of further queries, as in `SelfAttention`
    ) -> Tensor:  # (B,N,d)
        x = self.norm2(x + self.dropout(self.self_attn(x, pos, blocked, others)))
        x = self.norm1(x + self.dropout(self.cross_attn(x + pos, reference_boxes, memory, shapes, padding)))
        return self.norm3(x + self._ffn(x))


# %% [markdown]
# Between the layers the box is refined. The correction is predicted from the layer's output as it is; the heads
# get that output after one more LayerNorm, shared by all layers. The box head is passed in as a function: the
# decoder owns no head.

# %%
#| export
class Decoder(nn.Module):
    "A stack of decoder layers that refine the reference boxes one after another"

    def __init__(self, cfg: TransformerConfig):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(cfg) for _ in range(cfg.dec_layers))
        self.norm = nn.LayerNorm(cfg.d_model)
        self.ref_point_head = MLP(2 * cfg.d_model, cfg.d_model, cfg.d_model, 2)
        self.num_feats, self.canvas = cfg.d_model // 2, cfg.position_unit == 'canvas'

    def forward(
        self,
        x: Tensor,  # (B,N,d) content of the queries
        reference: Tensor,  # (B,N,4) cxcywh in [0,1]: boxes to start from
        memory: Tensor,  # (B,S,d) tokens after the encoder
        shapes,  # L pairs (H, W)
        box_head,  # callable (B,N,d) -> (B,N,4) corrections
        padding: Tensor = None,  # (B,S) bool, True=padding
        valid_ratios: Tensor = None,  # (B,L,2); None: no padding
        blocked: Tensor = None,  # (N,N) bool, True: row may not attend to column
        states=None,  # of an earlier pass over the same memory: its queries are attended to as well
    ) -> tuple:  # (hs (layers,B,N,d), references (layers,B,N,4), states: (content, pos) before each layer)
        "Outputs after the norm; boxes before each layer, with gradient to the layer before; inputs of layers"
        hs, references, new_states, scale = [], [reference.detach()], [], None
        if valid_ratios is not None:
            scale = valid_ratios.repeat(1, 1, 2)[:, None]  # (B,1,L,4)
        for i, layer in enumerate(self.layers):
            now = references[-1].detach()
            per_level = now[:, :, None]
            per_level = per_level.expand(-1, -1, len(shapes), -1) if scale is None else per_level * scale
            code = sine_embed_boxes(per_level[:, :, 0] if self.canvas else now, self.num_feats)
            pos = self.ref_point_head(code.to(x.dtype))
            new_states.append((x, pos))
            others = None if states is None else states[i]
            x = layer(x, pos, per_level, memory, shapes, padding, blocked, others)
            hs.append(self.norm(x))
            if i + 1 < len(self.layers):
                references.append(refine(now, box_head(x)))
        return torch.stack(hs), torch.stack(references), new_states


# %% [markdown]
# ::: {.callout-note}
# ## Paper vs. code
# The official code makes the position code from the box in units of the padded canvas (its valid ratio on
# level 0), so that a prediction depends a little on how much an image was padded, that is, on its neighbours
# in the batch. `position_unit='image'` removes that; without padding both are the same.
# :::
#
# The claim about gradients can be checked. Replace the box head by five free corrections and compute which of
# them each predicted box depends on:

# %%
def gradient_pattern(twice, n=5):
    "Row d: absolute gradient of the box of layer d with respect to the correction of every layer"
    torch.manual_seed(0)
    dec = Decoder(TransformerConfig(d_model=16, n_heads=2, n_levels=1, n_points=1, dec_layers=n, ffn=16))
    deltas = [torch.zeros(1, 1, 4, requires_grad=True) for _ in range(n)]
    calls = iter(deltas)
    content, memory = torch.randn(1, 1, 16), torch.randn(1, 4, 16)
    _, references, _ = dec(content, torch.full((1, 1, 4), 0.4), memory, [(2, 2)], lambda o: next(calls))
    boxes = predict_boxes(references, torch.stack(deltas), twice)
    grads = [torch.autograd.grad(b.sum(), deltas, retain_graph=True, allow_unused=True) for b in boxes]
    return torch.tensor([[0.0 if g is None else g.abs().sum() for g in row] for row in grads])


once, twice = gradient_pattern(False), gradient_pattern(True)
band = torch.eye(5) + torch.diag(torch.ones(4), -1)
assert torch.equal(once > 0, torch.eye(5) > 0) and torch.equal(twice > 0, band > 0)
(twice > 0).int()

# %%
#| label: fig-transformer-forward-twice
#| fig-cap: "Looking forward twice: the loss of a layer reaches its own correction and that of the layer before, never further."
#| fig-alt: "Two 5x5 matrices of gradients: only the diagonal for look forward once, the diagonal and the one below for look forward twice"
fig, axes = plt.subplots(1, 2, figsize=(4.6, 2.4), dpi=80)
for ax, m, name in zip(axes, (once, twice), ('once', 'twice')):
    ax.imshow(m, cmap='Blues', vmin=0, vmax=1)
    ax.set(title=f'look forward {name}', xlabel='correction of layer', ylabel='box of layer')
    ax.set_xticks(range(5), range(1, 6))
    ax.set_yticks(range(5), range(1, 6))
plt.tight_layout()
plt.show()


# %% [markdown]
# ## The encoder's result
#
# One pass of the encoder serves any number of decoder passes: with other extra queries, with or without
# gradient. All that they need is kept together.

# %%
#| export
@dataclass
class Encoded:
    "A batch of images after the encoder: all that any number of decoder passes need"

    features: list  # L maps (B,d,h,w): the pyramid before the encoder
    memory: Tensor  # (B,S,d) tokens after it
    padding_mask: Tensor  # (B,S) bool, True=padding; None: no padding
    shapes: tuple  # L pairs (H, W)
    valid_ratios: Tensor  # (B,L,2) valid share of width and height; None: no padding
    enc_logits: Tensor  # (B,Q,C) class logits of the selected tokens, with gradient
    enc_boxes: Tensor  # (B,Q,4) their boxes, cxcywh in [0,1], with gradient
    reference_logits: Tensor  # (B,Q,4) the same in logit space, detached and finite
    content: Tensor  # (B,Q,d) initial content of the queries
    selected: Tensor  # (B,Q) index of the token of each query


# %% [markdown]
# Everything that follows from the sizes of the maps and from the padding alone is computed once. Without
# padding it is the same for every batch of that size, and is kept.

# %%
#| export
@dataclass
class Geometry:
    "Everything that depends on sizes and padding only; leading dimension B, or 1 where nothing is padded"

    shapes: tuple  # L pairs (H, W)
    position: Tensor  # (B,S,d) sine code of each token
    reference_points: Tensor  # (B,S,L,2) positions of the tokens in units of each padded map
    anchors: Tensor  # (B,S,4) logits, +inf where invalid
    valid: Tensor  # (B,S) bool
    padding: Tensor = None  # (B,S) bool; None: no padding
    valid_ratios: Tensor = None  # (B,L,2); None: no padding


def token_geometry(
    shapes,  # L pairs (H, W)
    d_model: int,  # d
    masks=None,  # L masks (B,h,w), True=padding; None: no padding
    device=None,  # of the result, if there are no masks
    **sine,  # temperature and offset of `sine_position`; none: those of DINO
) -> Geometry:
    "Positions, reference points (@eq-transformer-points) and anchors (@eq-transformer-anchor) of all tokens"
    blank = masks or [torch.zeros(1, h, w, dtype=torch.bool, device=device) for h, w in shapes]
    codes = [sine_position(m, d_model // 2, **sine) for m in blank]
    position = torch.cat([code.flatten(2).transpose(1, 2) for code in codes], 1)
    size = _full_size(shapes, blank[0].device)
    wh = torch.stack([torch.stack([(~m[:, 0]).sum(1), (~m[:, :, 0]).sum(1)], -1) for m in blank], 1)
    wh = wh.to(size).clamp(min=1)
    ratios, padding = wh / size, torch.cat([m.flatten(1) for m in blank], 1)
    points = cell_centres(shapes, wh)[:, :, None] * ratios[:, None]
    anchors, valid = anchor_logits(shapes, wh)
    anchors, valid = anchors.masked_fill(padding[..., None], math.inf), valid & ~padding
    if masks is None:
        padding = ratios = None
    return Geometry(shapes, position, points, anchors, valid, padding, ratios)


# %%
#| export
def _kept_geometry(cache, features, masks, **sine):
    "Geometry of a pyramid, from `cache` where nothing is padded (at most 32 sets of sizes stay there)"
    shapes = tuple(tuple(f.shape[-2:]) for f in features)
    d, device = features[0].shape[1], features[0].device
    if masks is not None:
        return token_geometry(shapes, d, masks, **sine)
    if (shapes, device) not in cache:
        if len(cache) >= 32:
            cache.clear()
        with torch.inference_mode(False), torch.no_grad():
            cache[shapes, device] = token_geometry(shapes, d, device=device, **sine)
    return cache[shapes, device]


# %% [markdown]
# *Mixed* query selection takes boxes from the tokens and contents from a learned table. With few training
# images the table is slow to learn; with `query_content='memory'` a query starts from the content of its token
# (without gradient, so that the decoder's losses do not compete with the encoder's own).
#
# Ranking needs no gradient. So all tokens are scored without one, and only the $Q$ chosen rows pass the heads
# again with gradient: the same values and gradients as with gradients for all tokens, at a fraction of the
# memory.

# %%
#| export
def propose(
    memory: Tensor,  # (B,S,d) encoder output
    geo: Geometry,  # anchors, and which are valid
    embed,  # (B,N,d) -> (B,N,d): layers between token and heads
    class_head,  # (B,N,d) -> (B,N,C)
    box_head,  # (B,N,d) -> (B,N,4)
    cfg: TransformerConfig,  # number of queries, kind of score
) -> tuple:  # (logits (B,Q,C), boxes (B,Q,4) in [0,1], embedded tokens (B,Q,d), index (B,Q)), with gradient
    "Query selection: the Q tokens of best score, and their anchors as corrected by the box head"
    known = memory.masked_fill(~geo.valid[..., None], 0)
    with torch.no_grad():
        logits, valid = class_head(embed(known)), None if cfg.select_invalid else geo.valid
        index = select_queries(logits, cfg.num_queries, valid, cfg.select_score)

    def pick(x):
        return x.expand(memory.shape[0], -1, -1).gather(1, index[..., None].expand(-1, -1, x.shape[-1]))

    h = embed(pick(known))
    anchors = pick(geo.anchors).to(torch.promote_types(memory.dtype, torch.float32))
    return class_head(h), (box_head(h) + anchors).sigmoid(), h, index


# %% [markdown]
# ## All together

# %%
#| export
def init_transformer(
    model: nn.Module,  # with `level_embed`; changed in place
):
    "Xavier for every matrix; deformable attention then restores its own; N(0,1) for the levels"
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.xavier_uniform_(p)
    for m in model.modules():
        if isinstance(m, MSDeformAttn):
            m.reset_parameters()
    nn.init.normal_(model.level_embed)


class Transformer(nn.Module):
    "Encoder, query selection and decoder; heads are passed in, because the detector owns them"

    def __init__(self, cfg: TransformerConfig):
        super().__init__()
        self.cfg, d = cfg, cfg.d_model
        self.level_embed = nn.Parameter(torch.empty(cfg.n_levels, d))
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
        self.enc_output, self.enc_output_norm = nn.Linear(d, d), nn.LayerNorm(d)
        if cfg.query_content == 'learned':
            self.query_content = nn.Embedding(cfg.num_queries, d)
        self._cache = {}
        self.reset_parameters()

    def reset_parameters(self):
        "The initial values of `init_transformer`, the content table included"
        init_transformer(self)

    def encode(
        self,
        features,  # L maps (B,d,h,w)
        masks,  # L masks (B,h,w), True=padding; None: no padding
        class_head,  # of the encoder: (B,N,d) -> (B,N,C)
        box_head,  # of the encoder: (B,N,d) -> (B,N,4)
    ) -> Encoded:
        "Tokens through the encoder, then the best of them as proposals"
        geo = _kept_geometry(self._cache, features, masks)
        tokens = torch.cat([f.flatten(2).transpose(1, 2) for f in features], 1)
        level = torch.cat([e.expand(h * w, -1) for e, (h, w) in zip(self.level_embed, geo.shapes)])
        points = geo.reference_points.to(tokens.dtype).expand(tokens.shape[0], -1, -1, -1)
        memory = self.encoder(tokens, geo.position.to(tokens.dtype) + level, points, geo.shapes, geo.padding)
        logits, boxes, h, index = propose(memory, geo, self.embed_token, class_head, box_head, self.cfg)
        if self.cfg.query_content == 'memory':
            content = h.detach()
        else:
            content = self.query_content.weight[: index.shape[1]].expand(memory.shape[0], -1, -1)
        return Encoded(
            features=list(features),
            memory=memory,
            padding_mask=geo.padding,
            shapes=geo.shapes,
            valid_ratios=geo.valid_ratios,
            enc_logits=logits,
            enc_boxes=boxes,
            reference_logits=inverse_sigmoid(boxes.detach()),
            content=content,
            selected=index,
        )

    def embed_token(
        self,
        x: Tensor,  # (B,N,d) encoded tokens
    ) -> Tensor:  # (B,N,d)
        "The layer between encoder and proposal heads"
        return self.enc_output_norm(self.enc_output(x))


# %% [markdown]
# A toy pyramid of 4x4 and 2x2 cells, width 16, for two images. A fresh box head whose last layer is zero
# leaves every proposal where its anchor is, and a decoder layer leaves it there too:

# %%
torch.manual_seed(0)
toy_sizes = dict(d_model=16, n_heads=2, n_levels=2, n_points=2, enc_layers=1, dec_layers=2, ffn=32)
toy = Transformer(TransformerConfig(**toy_sizes, num_queries=5))
to_class, to_box = nn.Linear(16, 3), MLP(16, 16, 4, 3)
nn.init.zeros_(to_box.layers[-1].weight)
nn.init.zeros_(to_box.layers[-1].bias)
pyramid = [torch.randn(2, 16, 4, 4), torch.randn(2, 16, 2, 2)]
encoded = toy.encode(pyramid, None, to_class, to_box)
start = encoded.reference_logits.sigmoid()
hs, refs, _ = toy.decoder(encoded.content, start, encoded.memory, encoded.shapes, to_box)
unmoved = predict_boxes(refs, to_box(hs))
assert torch.allclose(encoded.enc_boxes[0], anchors[encoded.selected[0]], atol=1e-5)
assert torch.allclose(unmoved, encoded.enc_boxes.expand(2, -1, -1, -1), atol=1e-5)
hs.shape, unmoved[-1, 0]

# %% [markdown]
# Padding must not matter: the same maps inside larger ones with other content give the same proposals.

# %%
canvases = [torch.full((2, 16, 8, 8), 9.0), torch.full((2, 16, 4, 4), 9.0)]
paddings = [torch.ones(2, 8, 8, dtype=torch.bool), torch.ones(2, 4, 4, dtype=torch.bool)]
for canvas, is_padding, small in zip(canvases, paddings, pyramid):
    n = small.shape[-1]
    canvas[:, :, :n, :n], is_padding[:, :n, :n] = small, False
padded = toy.encode(canvases, paddings, to_class, to_box)
assert torch.allclose(padded.enc_logits, encoded.enc_logits, atol=1e-4)
assert torch.allclose(padded.enc_boxes, encoded.enc_boxes, atol=1e-4)
(padded.enc_logits - encoded.enc_logits).abs().max().item()

# %% [markdown]
# ## Summary
#
# - Tokens are the cells of all levels in one sequence; each has a position in its image and in the padded canvas.
# - Every token has an anchor box; the best by class score become queries, with contents from a learned table.
# - Decoder layers correct a box in logit space, each from a start without gradient.
# - The loss of a layer also reaches the layer before (look forward twice), and no further.
# - What depends on sizes only is computed once; what needs no gradient is computed without.
#
# ## Exercises
#
# 1. Why is the side of an anchor not learned?
# 2. Let the decoder keep the gradient of all references: which pattern does @fig-transformer-forward-twice
#    show then?
# 3. Which tokens are invalid in an image with one cell on each level, and what happens to its queries?
