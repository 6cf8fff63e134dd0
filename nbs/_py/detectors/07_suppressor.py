# %% [markdown]
# # A learned suppressor {#sec-suppressor}
#
# > Let the surest of several queries on an object keep its score, and lower those of the others.
#
# *Why.* One-to-many matching trains the better detector, and one that predicts each object several times.
# Suppression by a fixed IoU removes the duplicates, and true neighbours with them. One-to-one matching removes
# them too, but an inaccurate pseudo box then spoils the only positive of an object. Both need not happen in
# the same layer. Here all decoder layers stay one-to-many, and one light layer behind them scores the queries
# anew. A query attends only to queries that are *surer* than itself, so all that it has to learn is "a surer
# one covers me": a question of geometry, which a few labelled images can teach.

# %%
#| default_exp detectors.suppressor

# %%
#| export
import math
from dataclasses import dataclass
import torch
import torch.nn.functional as F
from torch import nn, Tensor
from semidetr.boxes import box_iou, cxcywh_to_xyxy
from semidetr.core import at_least_float32, in_range, one_of
from semidetr.detectors.self_attention import SelfAttention
from semidetr.detectors.transformer import MLP, TransformerConfig


# %% [markdown]
# ## Who sees whom
#
# Let $z_i$ be the largest class logit of query $i$ in the last one-to-many layer, without gradient. Query $i$
# attends to query $j$ only if $j$ comes before it in the order of confidence,
#
# $$
# j \prec i \iff z_j > z_i \;\text{ or }\; (z_j = z_i \text{ and } j < i),
# $$ {#eq-suppressor-order}
#
# never to itself. So the score of a query does not depend on any query that is less sure. Logits are compared
# in float32, and equal ones by their number: in bfloat16 ties are frequent, and two duplicates with equal
# logits that do not see each other would both survive.

# %%
#| export
def visible(
    z: Tensor,  # (...,N) confidence, the largest class logit
    strict: bool = False,  # True: queries with equal logits do not see each other
) -> Tensor:  # (...,N,N) bool, True: row attends to column
    "Which queries each query attends to (@eq-suppressor-order)"
    row, column = z[..., :, None], z[..., None, :]
    number = torch.arange(z.shape[-1], device=z.device)
    if strict:
        return column > row
    return (column > row) | ((column == row) & (number < number[:, None]))


def _ranked(z):
    "Numbers of the queries (B,Q), the surest first; ties in the order of their numbers"
    return z.sort(dim=1, descending=True, stable=True).indices


def by_confidence(
    logits: Tensor,  # (B,Q,C) of the last one-to-many layer
    n_best: int,  # n
) -> Tensor:  # (B, n or Q) numbers of the surest queries, the surest first
    "The order of confidence, without gradient"
    return _ranked(at_least_float32(logits.detach()).amax(-1))[:, :n_best]


# %%
confidence = torch.tensor([2.0, 1.0, 1.0, -1.0])
strict, with_ties = visible(confidence, strict=True).int(), visible(confidence).int()
assert strict.tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]]
assert with_ties.tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]
with_ties

# %% [markdown]
# Sorted by confidence, the mask is the same strict triangle for every image. Only the $n$ surest queries
# (`n_best`) are read, because the cost grows with $n^2$; $n$ should be at least three times the largest number
# of objects in an image. The other queries are not reported at all.

# %%
shuffled = torch.tensor([[[-1.0], [1.0], [2.0], [1.0]]])
order = by_confidence(shuffled, 3)
assert order.tolist() == [[2, 1, 3]]
order


# %% [markdown]
# ## Where the surer one lies
#
# The second thing that a query needs to know is where the others lie. From the boxes of the last layer,
# without gradient, the relative box of $j$ as seen from $i$ is
#
# $$
# e_{ij} = \left[\ln\left(\frac{|x_j-x_i|}{w_i}+1\right),\; \ln\left(\frac{|y_j-y_i|}{h_i}+1\right),\;
# \ln\frac{w_i}{w_j},\; \ln\frac{h_i}{h_j}\right]
# $$ {#eq-suppressor-box}
#
# with $10^{-6}$ added to each denominator. It does not change when the image is scaled or shifted. Sine and
# cosine of $e_{ijk}/10000^{m/F}$, $m=0,\dots,F-1$, go through two linear layers to one number per head; the
# mean with the number of the pair $(j,i)$ is the bias $\beta_{ij}$ of the attention. It takes the place of the
# position code: queries and keys are the content alone. The last linear layer starts at zero.
#
# What suppression asks is whether the *overlap* of two boxes is large, a steep function of all four numbers
# that a small network learns slowly. With `overlap=True` it reads the IoU $u_{ij}$ and $u_{ij}^4$ as well.

# %%
#| export
def relative_boxes(
    boxes: Tensor,  # (B,N,4) cxcywh
    eps: float = 1e-6,  # added to denominators, and the smallest side
) -> Tensor:  # (B,N,N,4), at least float32, without gradient
    "The box of column j as seen from row i (@eq-suppressor-box)"
    boxes = at_least_float32(boxes.detach())
    centre, side = boxes[..., :2], boxes[..., 2:].clamp(min=eps)
    apart = (centre[:, :, None] - centre[:, None]).abs() / (side[:, :, None] + eps)
    ratio = side[:, :, None] / (side[:, None] + eps)
    return torch.cat([(apart + 1).log(), ratio.log()], -1)


def sine_numbers(
    e: Tensor,  # (...,k) real numbers
    frequencies: int,  # F
) -> Tensor:  # (..., 2Fk)
    "Sine and cosine of each number at F frequencies"
    scale = 10000 ** (torch.arange(frequencies, device=e.device, dtype=e.dtype) / frequencies)
    angle = e[..., None] / scale
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(-2)


class PairBias(nn.Module):
    "A bias of the attention for each pair of boxes and each head, symmetric, zero at the start"

    def __init__(self, frequencies: int, hidden: int, n_heads: int, overlap: bool = False):
        super().__init__()
        self.frequencies, self.overlap = frequencies, overlap
        self.mlp = MLP(8 * frequencies + 2 * overlap, hidden, n_heads, 2)
        for p in self.mlp.layers[-1].parameters():
            nn.init.zeros_(p)

    def forward(
        self,
        boxes: Tensor,  # (B,N,4) cxcywh
    ) -> Tensor:  # (B,M,N,N)
        code = sine_numbers(relative_boxes(boxes), self.frequencies)
        if self.overlap:
            corners = cxcywh_to_xyxy(boxes.detach())
            iou = box_iou(corners, corners).to(code.dtype)
            code = torch.cat([code, iou[..., None], iou[..., None] ** 4], -1)
        bias = self.mlp(code.to(self.mlp.layers[0].weight.dtype))
        return ((bias + bias.transpose(1, 2)) / 2).permute(0, 3, 1, 2)


# %%
P = torch.tensor(
    [[0.50, 0.50, 0.40, 0.40], [0.52, 0.50, 0.40, 0.40], [0.60, 0.50, 0.40, 0.40], [0.20, 0.20, 0.10, 0.10]]
)
e = relative_boxes(P[None])[0]
assert torch.allclose(e[0, 1], torch.tensor([0.048790, 0, 0, 0]), atol=1e-5)
assert torch.allclose(e[0, 3], torch.tensor([0.559615, 0.559615, 1.386294, 1.386294]), atol=1e-5)
assert torch.allclose(e[3, 0], torch.tensor([1.386294, 1.386294, -1.386294, -1.386294]), atol=1e-5)
assert relative_boxes(torch.zeros(1, 2, 4)).isfinite().all()
flat_bias = PairBias(4, 16, n_heads=2, overlap=True)(P[None])
assert flat_bias.shape == (1, 2, 4, 4) and not flat_bias.any()
e[0]


# %% [markdown]
# ## Tokens: what there is without a surer one
#
# The surest query sees no other one; a softmax over nothing is not a number. And a query whose surer ones are
# all far away must be able to attend to "nothing here". $T=10$ learned *tokens*, pairs of key and value, are
# therefore visible to all. With a learned bias per head and token that starts at $-\ln T$, and all other logits
# zero, the tokens together weigh as much as one query,
#
# $$
# \sum_{t=1}^{T} e^{-\ln T} = 1 .
# $$ {#eq-suppressor-tokens}
#
# They are `others` of the attention (@sec-selfatt): content is the value, and content plus position the key.

# %%
#| export
@dataclass(frozen=True)
class SuppressorConfig:
    "A last layer that scores queries anew, so that each object is reported once (MDS-DETR)"

    head: str = (
        'none'  # 'none': no such layer; 'residual': a change of the one-to-many logits; 'own': new ones
    )
    n_best: int = 100  # queries that it reads, the surest ones; the others are not reported
    tokens: int = 10  # T keys and values that all queries attend to
    frequencies: int = 4  # F, per number of a relative box (original code: 16)
    hidden: int = 16  # width between relative box and bias (original code: 128)
    overlap: bool = False  # the bias reads the IoU of the two boxes, too
    detach: bool = False  # stop the gradient to the decoder: the layers before learn as without suppressor

    def __post_init__(self):
        one_of('detector.suppressor', self, head=('none', 'residual', 'own'))
        in_range('detector.suppressor', self, n_best=1, tokens=1, frequencies=1, hidden=1)

    @property
    def on(self) -> bool:
        "Is there a suppressor?"
        return self.head != 'none'


# %% [markdown]
# ## The layer
#
# Attention, a feed-forward block, a class head. The head `own` gives new logits and starts at the prior of
# @eq-detector-prior. The head `residual` adds a change, zero at the start, to the one-to-many logits:
#
# $$
# \tilde z_{ic} = \operatorname{sg}(z_{ic}) + (W h_i + b)_c
# $$ {#eq-suppressor-residual}
#
# ($\operatorname{sg}$ stops the gradient), so an untrained suppressor changes no score, and training mostly has
# to push duplicates down. Boxes are copied, without gradient: this layer only scores.

# %%
#| export
def _rows(x, index):
    "Rows `index` (B,n) of x (B,Q,k)"
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


class Suppressor(nn.Module):
    "Masked self-attention in the order of confidence and a class head (@eq-suppressor-order)"

    def __init__(
        self,
        cfg: SuppressorConfig,
        sizes: TransformerConfig,  # width d, heads M and width of the feed-forward block
        num_classes: int,  # C
        prior: float = 0.01,  # probability that an untrained head 'own' gives to every class
    ):
        super().__init__()
        self.cfg, d = cfg, sizes.d_model
        self.self_attn = SelfAttention(d, sizes.n_heads)
        self.keys = nn.Parameter(nn.init.xavier_uniform_(torch.empty(cfg.tokens, d)))
        self.values = nn.Parameter(nn.init.xavier_uniform_(torch.empty(cfg.tokens, d)))
        self.token_bias = nn.Parameter(torch.full((sizes.n_heads, cfg.tokens), -math.log(cfg.tokens)))
        self.pair_bias = PairBias(cfg.frequencies, cfg.hidden, sizes.n_heads, cfg.overlap)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.linear1, self.linear2 = nn.Linear(d, sizes.ffn), nn.Linear(sizes.ffn, d)
        self.class_head = nn.Linear(d, num_classes)
        if cfg.head == 'residual':
            nn.init.zeros_(self.class_head.weight)
            nn.init.zeros_(self.class_head.bias)
        else:
            nn.init.constant_(self.class_head.bias, -math.log((1 - prior) / prior))

    def biases(
        self,
        boxes: Tensor,  # (B,n,4) cxcywh, the surest first
    ) -> Tensor:  # (B,M,n,n+T)
        "Biases of the attention: of pairs of queries, then of tokens"
        pairs = self.pair_bias(boxes)
        B, M, n, _ = pairs.shape
        return torch.cat([pairs, self.token_bias[None, :, None].to(pairs.dtype).expand(B, M, n, -1)], -1)

    def features(
        self,
        x: Tensor,  # (B,n,d) outputs of the decoder, the surest first
        boxes: Tensor,  # (B,n,4) their boxes
    ) -> Tensor:  # (B,n,d)
        "What the class head reads: a row depends on the rows before it and on itself"
        B, n, _ = x.shape
        number = torch.arange(n + len(self.keys), device=x.device)
        blocked = (number >= number[:n, None]) & (number < n)
        values = self.values.to(x.dtype).expand(B, -1, -1)
        tokens = values, (self.keys - self.values).to(x.dtype).expand(B, -1, -1)
        surer = self.self_attn(x, torch.zeros_like(x), blocked, tokens, self.biases(boxes))
        x = self.norm1(x + surer)
        return self.norm2(x + self.linear2(F.relu(self.linear1(x))))

    def forward(
        self,
        hs: Tensor,  # (B,Q,d) outputs of the last decoder layer
        logits: Tensor,  # (B,Q,C) its class logits
        boxes: Tensor,  # (B,Q,4) its boxes
    ) -> dict:  # pred_logits (B,n,C), pred_boxes (B,n,4) without gradient, index (B,n) of the queries
        "New logits of the n surest queries, the surest first"
        index = by_confidence(logits, self.cfg.n_best)
        boxes = _rows(boxes.detach(), index)
        new = self.class_head(self.features(_rows(hs.detach() if self.cfg.detach else hs, index), boxes))
        if self.cfg.head == 'residual':
            new = new + _rows(logits.detach(), index).to(new.dtype)
        return dict(pred_logits=new, pred_boxes=boxes, index=index)


# %% [markdown]
# A detector builds it last. Its random numbers leave the state of the generator as it was, so the rest of a
# run, and what a study compares it with, draws the same numbers with and without suppressor.

# %%
#| export
def build_suppressor(
    cfg: SuppressorConfig,
    sizes: TransformerConfig,  # of the decoder
    num_classes: int,  # C
    prior: float = 0.01,  # of the head 'own'
) -> Suppressor | None:  # None where `cfg.head` is 'none'
    "The suppressor of some settings; torch's random state stays as it was"
    if not cfg.on:
        return None
    with torch.random.fork_rng(devices=[]):
        return Suppressor(cfg, sizes, num_classes, prior)


# %%
torch.manual_seed(0)
sizes = TransformerConfig(d_model=16, n_heads=2, ffn=32)
untrained = build_suppressor(SuppressorConfig('residual'), sizes, num_classes=3)
hs, z_logits, some_boxes = torch.randn(2, 7, 16), torch.randn(2, 7, 3), torch.rand(2, 7, 4)
same = untrained(hs, z_logits, some_boxes)
assert torch.equal(same['pred_logits'], _rows(z_logits, same['index']))
same['index']

# %% [markdown]
# The weights of the attention for the four confidences of above, with all other logits zero: the tokens weigh
# 1, then a half, a third and a quarter. (If equal ones did not see each other, the third row would have a half.)

# %%
with torch.no_grad():
    untrained.self_attn.in_proj_weight[:32].zero_()
    bias = untrained.biases(P[None])[0, 0]
hidden_pairs = torch.cat([~visible(confidence), torch.zeros(4, 10, dtype=torch.bool)], 1)
attention = bias.masked_fill(hidden_pairs, -math.inf).softmax(-1)
token_mass = attention[:, 4:].sum(-1)
assert torch.allclose(token_mass, torch.tensor([1, 1 / 2, 1 / 3, 1 / 4]), atol=1e-5)
token_mass

# %% [markdown]
# Changing the least sure query changes nothing but its own score:

# %%
torch.manual_seed(1)
trained = build_suppressor(SuppressorConfig('own'), sizes, 3)
first = trained(hs, z_logits, some_boxes)
last = first['index'][0, -1]
other_hs = hs.clone()
other_hs[0, last] += 1
second = trained(other_hs, z_logits, some_boxes)
moved = (first['pred_logits'] - second['pred_logits']).abs().amax(-1)[0]
assert moved[:-1].max() < 1e-6 < moved[-1]
moved

# %%
#| hide
import matplotlib.pyplot as plt
from semidetr.draw import draw_boxes, show_image

# %%
#| label: fig-suppressor-mask
#| fig-cap: "Six queries in the order of their numbers (left) and sorted by confidence (right): sorted, the mask is the same triangle for every image; the tokens at the right are visible to all."
#| fig-alt: "Two matrices of six rows; on the left scattered blue cells, on the right a lower triangle without its diagonal; ten blue columns follow in both"
six = torch.tensor([0.3, 2.0, -1.0, 1.0, 2.5, 0.0])
fig, axes = plt.subplots(1, 2, figsize=(6, 2.4), dpi=80, layout='constrained')
for ax, values, name in zip(axes, (six, six.sort(descending=True).values), ('as numbered', 'sorted')):
    ax.imshow(torch.cat([visible(values), torch.ones(6, 10) > 0], 1), cmap='Blues', vmin=0, vmax=1.5)
    ax.axvline(5.5, color='grey', lw=1)
    ax.set(title=name, xlabel='key: queries, then tokens', ylabel='query', yticks=range(6))
    ax.set_yticklabels([f'{v:.1f}' for v in values.tolist()])
plt.show()


# %% [markdown]
# ## Duplicates, suppressed
#
# Can geometry and order alone tell a duplicate from a neighbour? A test without images: two to three objects,
# six jittered queries on each, confidences at random, contents that are noise. The target is 1 for the surest
# query of each object and 0 for the others. (In a detector the targets come from matching, @sec-rescoring.)

# %%
def crowd(n, seed):
    "Contents (n,18,16), logits (n,18,1), boxes (n,18,4) and targets (n,18) of three objects in each image"
    g = torch.Generator().manual_seed(seed)
    objects = torch.tensor([[0.25, 0.3, 0.3, 0.3], [0.62, 0.35, 0.3, 0.4], [0.5, 0.78, 0.5, 0.25]])
    objects = objects + 0.05 * torch.randn(n, 3, 4, generator=g)
    boxes = objects.repeat_interleave(6, 1) + 0.02 * torch.randn(n, 18, 4, generator=g)
    z = torch.randn(n, 18, generator=g)
    winner = z.view(n, 3, 6).argmax(-1)
    target = F.one_hot(winner, 6).view(n, 18).float()
    return torch.randn(n, 18, 16, generator=g), z[..., None], boxes.clamp(0.02, 1), target


torch.manual_seed(0)
toy = build_suppressor(SuppressorConfig('residual'), sizes, num_classes=1)
optimiser = torch.optim.AdamW(toy.parameters(), lr=1e-2, weight_decay=0)
for step in range(150):
    content, z, boxes, target = crowd(32, step)
    found = toy(content, z, boxes)
    loss = F.binary_cross_entropy_with_logits(found['pred_logits'], _rows(target[..., None], found['index']))
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
content, z, boxes, target = crowd(200, 1000)
with torch.no_grad():
    found = toy(content, z, boxes)
wanted = _rows(target[..., None], found['index']) > 0
scores = found['pred_logits'].sigmoid()
kept, lowered = scores[wanted].mean().item(), scores[~wanted].mean().item()
assert kept > 0.8 and lowered < 0.1
f'mean score of the surest query of an object {kept:.2f}, of its duplicates {lowered:.2f}'

# %%
#| label: fig-suppressor-duplicates
#| fig-cap: "The scores of a one-to-many detector do not tell duplicates apart (left); after the suppressor one query of each object is left above .5 (right)."
#| fig-alt: "Three objects; on the left many overlapping boxes around each, on the right one box on each"
fig, axes = plt.subplots(1, 2, figsize=(5.4, 2.4), dpi=80, layout='constrained')
before, after = _rows(z, found['index'])[0, :, 0].sigmoid(), scores[0, :, 0]
for ax, s, name in zip(axes, (before, after), ('one-to-many scores', 'after the suppressor')):
    show_image(ax, torch.ones(3, 100, 100), title=f'{name}: {int((s > 0.5).sum())} above .5')
    c, half = found['pred_boxes'][0, s > 0.5, :2] * 100, found['pred_boxes'][0, s > 0.5, 2:] * 50
    draw_boxes(ax, torch.cat([c - half, c + half], -1), kind='student', lw=1)
plt.show()

# %% [markdown]
# ::: {.callout-note}
# ## Paper vs. code
# In MDS-DETR queries with equal logits do not see each other (`visible(z, strict=True)`), all queries are read, the
# relative box is encoded at 16 frequencies with a hidden width of 128, and the head is `own`. The order by
# number, the $n$ surest queries, the lighter encoding, `overlap`, `residual` and `detach` are additions of this
# project.
# :::
#
# ## Summary
#
# - The suppressor reads the outputs of the last one-to-many layer: contents, logits and boxes.
# - A query attends to surer queries only, with a bias that depends on the two boxes, and to ten tokens.
# - It gives new class logits to the $n$ surest queries; boxes are copied, without gradient.
# - With `head='residual'` it starts as the one-to-many detector. Its loss is the subject of @sec-rescoring.
#
# ## Exercises
#
# 1. In `crowd`, move two objects onto each other. At which IoU does the suppressor lose one of them?
# 2. Why must a query not see itself?
# 3. Let two layers follow each other. Which information does a query get that one layer cannot give it?
