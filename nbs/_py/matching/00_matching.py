# %% [markdown]
# # Matching {#sec-matching}
#
# > Assign predictions to objects: several per object in the first stage of training, one in the second.
#
# A detection transformer predicts a fixed number of boxes in no particular order. Before a loss can be
# computed, each object has to be assigned to predictions. *One-to-one* matching gives each object a single
# query. The detector then needs no non-maximum suppression, but an inaccurate pseudo box spoils the only
# positive that an object has, and few queries learn. *One-to-many* matching gives each object several
# queries, weighted by their quality. Training is faster and tolerates inaccurate boxes, but the detector
# produces duplicates. Semi-DETR uses both, one after the other: *stage-wise hybrid matching*.

# %%
#| default_exp matching.matching

# %%
#| export
from dataclasses import dataclass
import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from semidetr.boxes import cxcywh_to_xyxy
from semidetr.core import DataError, SemiDETRError, at_least_float32
from semidetr.detectors.contract import sigmoid_logits

# %%
import itertools
import matplotlib.pyplot as plt
from semidetr.boxes import denormalize_boxes
from semidetr.draw import draw_matches


# %% [markdown]
# ## The two stages
#
# Let $t$ be the iteration, counted from 0, and $T_1$ the first iteration of the second stage. Labelled and
# unlabelled images, every decoder layer and the encoder output are matched by the rule of the current stage.

# %%
#| export
def stage_of(
    step: int,  # iteration t, counted from 0
    T1: int,  # first iteration of the one-to-one stage; 0 = one-to-one from the start
) -> str:  # 'o2m' or 'o2o'
    "Stage of an iteration: one-to-many matching before T1, one-to-one from T1 on"
    return 'o2m' if step < T1 else 'o2o'


# %%
stages = [stage_of(t, T1=60_000) for t in (0, 59_999, 60_000, 119_999)]
assert stages == ['o2m', 'o2m', 'o2o', 'o2o'] and stage_of(0, T1=0) == 'o2o'
stages


# %% [markdown]
# ## Padded targets
#
# Images contain different numbers of objects. Padding them to the largest number $N$ in the batch lets one
# tensor operation serve all $B$ images and all $L$ layers, at a cost that grows with $B$. The common
# alternative, costs between *all* predictions and *all* objects of the batch, grows with $B^2$ and discards
# nearly all of it.

# %%
#| export
@dataclass(frozen=True)
class PaddedTargets:
    "The targets of a batch as rectangular tensors; N is the largest number of objects in an image"

    labels: Tensor  # (B,N) int64, 0 in unused places
    boxes: Tensor  # (B,N,4) cxcywh normalised, float32 at least; (.5,.5,.5,.5) in unused places
    valid: Tensor  # (B,N) bool, True for objects, False for padding
    counts: list  # number of objects of each image
    ids: list  # image ids, for messages
    scores: Tensor  # (B,N) float32 at least: the teacher's, 1 for labelled objects; 0 in unused places


# %%
#| export
def pad_targets(
    targets: list,  # dicts with `labels` (n,), `boxes` (n,4) cxcywh; perhaps `image_id`, `scores` (n,)
    num_classes: int | None = None,  # C; None = labels are not checked
) -> PaddedTargets:
    "Stack the targets of a batch; n may be 0. DataError where a label is not in 0..C-1"
    labels = [t['labels'].reshape(-1).long() for t in targets]
    boxes = [at_least_float32(t['boxes'].detach()).reshape(-1, 4) for t in targets]
    scores = [at_least_float32(t.get('scores', b.new_ones(len(b))).detach()) for t, b in zip(targets, boxes)]
    counts = [len(x) for x in labels]
    ids = [t.get('image_id', b) for b, t in enumerate(targets)]
    padded = pad_sequence(labels, batch_first=True)
    valid = torch.arange(padded.shape[1]) < torch.tensor(counts)[:, None]
    if num_classes is not None and padded.numel():
        bad = ((padded < 0) | (padded >= num_classes)).any(1)
        if bad.any():
            b = int(bad.nonzero()[0])
            raise DataError(
                f'image {ids[b]}: labels {labels[b].tolist()} are not all in 0..{num_classes - 1}; '
                'run `semidetr doctor` on the data set'
            )
    padded_boxes = pad_sequence(boxes, batch_first=True, padding_value=0.5)
    padded_scores = pad_sequence(scores, batch_first=True)
    return PaddedTargets(padded, padded_boxes, valid.to(padded.device), counts, ids, padded_scores)


# %%
padded_toy = pad_targets(
    [
        dict(labels=torch.tensor([2, 0]), boxes=torch.rand(2, 4)),
        dict(labels=torch.zeros(0), boxes=torch.zeros(0, 4)),
        dict(labels=torch.tensor([1]), boxes=torch.rand(1, 4), scores=torch.tensor([0.6])),  # a pseudo label
    ],
    num_classes=3,
)
assert padded_toy.counts == [2, 0, 1] and padded_toy.boxes.shape == (3, 2, 4)
assert torch.equal(padded_toy.scores, torch.tensor([[1, 1], [0, 0], [0.6, 0]]))
padded_toy.valid, padded_toy.scores

# %% [markdown]
# A label outside of the classes would index memory out of bounds, which a GPU reports as an assertion
# somewhere else. Here the error names the image:

# %%
try:
    pad_targets(
        [dict(labels=torch.tensor([7]), boxes=torch.rand(1, 4), image_id='cells_0042')], num_classes=3
    )
except DataError as e:
    refusal = str(e)
assert 'cells_0042' in refusal
refusal


# %% [markdown]
# ## Overlap of all pairs
#
# Both matchings use the IoU $u_{ji}$ of prediction $j$ with object $i$. The example of this chapter has four
# predictions around one object: the first is exact, the second and third are shifted to the right, the
# fourth lies elsewhere.

# %%
#| export
# `losses.box_losses` (matched pairs) and `boxes.box_iou` have formulas of their own: they round and floor
# areas differently, so one formula for all would change values and gradients in the last digits.
def pairwise_overlap(
    a: Tensor,  # (...,Q,4) cxcywh
    b: Tensor,  # (...,N,4) cxcywh, same unit; leading dimensions broadcast
    eps: float = 1e-12,  # lower bound of the areas in the denominators
):  # (IoU (...,Q,N) in [0,1], GIoU (...,Q,N) in [-1,1])
    "IoU and generalised IoU of all pairs of an image, for any number of images and layers at once"
    ax, ay, aX, aY = cxcywh_to_xyxy(a)[..., :, None, :].unbind(-1)
    bx, by, bX, bY = cxcywh_to_xyxy(b)[..., None, :, :].unbind(-1)
    inter = (aX.minimum(bX) - ax.maximum(bx)).clamp(min=0) * (aY.minimum(bY) - ay.maximum(by)).clamp(min=0)
    union = (aX - ax) * (aY - ay) + (bX - bx) * (bY - by) - inter
    hull = (aX.maximum(bX) - ax.minimum(bx)) * (aY.maximum(bY) - ay.minimum(by))
    iou = inter / union.clamp(min=eps)
    return iou, iou - (hull - union) / hull.clamp(min=eps)


# %%
A = torch.tensor([[0.5, 0.5, 0.4, 0.4]])  # the object
P = torch.tensor(
    [[0.50, 0.50, 0.40, 0.40], [0.52, 0.50, 0.40, 0.40], [0.60, 0.50, 0.40, 0.40], [0.20, 0.20, 0.10, 0.10]]
)  # the predictions
u, giou = pairwise_overlap(P, A)
assert torch.allclose(u[:, 0], torch.tensor([1, 0.904762, 0.6, 0]), atol=1e-6)
u[:, 0], giou[:, 0]


# %% [markdown]
# Without an intersection the IoU is 0 at any distance; only the generalised IoU still measures how far the
# fourth prediction is away. Both are ratios of areas, so normalised boxes give the same values as pixels.
#
# ## The cost of a pair
#
# With the probability $p_{j,c}=\sigma(z_{j,c})$ of class $c$, the box $b_j$ of query $j$, and an object of
# class $c_i$ with box $\hat b_i$, the cost is
#
# $$
# C_{ji} = w_{cls}\,[f^+(p_{j,c_i})-f^-(p_{j,c_i})] + w_{L1}\,\lVert b_j-\hat b_i\rVert_1 - w_{giou}\,\mathrm{GIoU}(b_j,\hat b_i)
# $$ {#eq-matching-cost}
#
# $$
# f^+(p) = -\alpha(1-p)^\gamma\ln(p+10^{-12}), \qquad f^-(p) = -(1-\alpha)\,p^\gamma\ln(1-p+10^{-12})
# $$ {#eq-matching-focal}
#
# with $\alpha=.25$, $\gamma=2$ and weights 2, 5, 2. $f^+$ is the focal loss of a query whose target is the
# class, $f^-$ that of a query whose target is background. Their difference is what it costs to make the query
# a positive.

# %%
#| export
def label_logits(
    logits: Tensor,  # (...,Q,C) raw class scores
    labels: Tensor,  # (...,N) class c_i of each object
) -> Tensor:  # (...,Q,N) raw score of every query for the class of every object
    "The columns of `logits` that belong to the classes of the objects"
    index = labels[..., None, :].expand(*logits.shape[:-1], labels.shape[-1])
    return logits.gather(-1, index)


def class_cost(
    logits: Tensor,  # (...,Q,C) raw class scores
    labels: Tensor,  # (...,N) classes of the objects
    alpha: float = 0.25,  # weight of the positive focal term
    gamma: float = 2.0,  # focusing power
    factor: Tensor | None = None,  # (...,Q,N) multiplies the probabilities (@eq-matching-modulated)
) -> Tensor:  # (...,Q,N): negative where the class is predicted
    "Focal loss of a query as the object minus its focal loss as background (@eq-matching-focal)"
    p = label_logits(logits, labels).sigmoid()
    p = p if factor is None else p * factor
    pos = -alpha * (1 - p) ** gamma * (p + 1e-12).log()
    neg = -(1 - alpha) * p**gamma * (1 - p + 1e-12).log()
    return pos - neg


# %%
two = class_cost(torch.tensor([[0.2], [0.9]]).logit(), torch.tensor([0]))[:, 0]
assert torch.allclose(2 * two, torch.tensor([0.50163, -2.79711]), atol=1e-5)
2 * two


# %% [markdown]
# ### Probabilities that know the place
#
# A query with a high score far from an object is cheap for that object because of its class term. The
# *position-modulated* cost of Stable-DINO (S. Liu et al. 2023; `criterion.class_cost='modulated'`) replaces the
# probability in the class term by
#
# $$
# p'_{ji} = p_{j,c_i}\,\sqrt{\lambda\,v_{ji}}, \qquad v_{ji} = \tfrac12\left(1+\mathrm{GIoU}(b_j,\hat b_i)\right), \qquad \lambda = \max\left(1,\;\frac{1}{\max_{j,i} v_{ji}}\right)
# $$ {#eq-matching-modulated}
#
# with the maximum over all pairs of an image. The published code stores $v$ by class, so that of two objects of
# a class one overwrites the other; here every pair has its own.

# %%
#| export
def placement(
    giou: Tensor,  # (...,Q,N) generalised IoU of all pairs
    valid: Tensor | None = None,  # (...,N) bool: objects, not padding; None: all
) -> Tensor:  # (...,Q,N) in [0,1]
    "Factor of the probabilities of a modulated cost: the root of lambda times v (@eq-matching-modulated)"
    v = (giou + 1) / 2
    if not v.numel():
        return v
    if valid is not None:
        v = v * valid[..., None, :]
    largest = v.amax((-2, -1), keepdim=True)
    return (v / torch.where(largest == 0, 1, largest)).clamp(min=0).sqrt()


# %%
placed = torch.tensor([[0.2], [0.9], [0.9], [0.9]]) * placement(giou)
assert torch.allclose(placed[:, 0], torch.tensor([0.2, 0.878310, 0.804984, 0.477078]), atol=1e-6)
placed[:, 0]


# %%
#| export
def pair_cost(
    logits: Tensor,  # (...,Q,C) raw class scores
    boxes: Tensor,  # (...,Q,4) predicted boxes, cxcywh normalised
    labels: Tensor,  # (...,N) classes of the objects
    gt: Tensor,  # (...,N,4) their boxes, cxcywh normalised
    w_cls: float = 2.0,  # weight of the class term
    w_l1: float = 5.0,  # weight of the L1 term
    w_giou: float = 2.0,  # weight of the GIoU term
    kind: str = 'focal',  # class term: 'focal', 'modulated', 'probability' (@eq-softmax-cost)
    parts: bool = False,  # return the weighted terms instead of their sum
    valid: Tensor | None = None,  # (...,N) bool: objects, not padding; only 'modulated' needs it
):  # (...,Q,N) cost of every pair, detached, float32; or a dict of three such tensors
    "Cost C_ji of each query and each object of its image (@eq-matching-cost); layers and images are batched"
    logits, boxes, gt = (at_least_float32(x.detach()) for x in (logits, boxes, gt))
    l1 = sum((boxes[..., :, None, i] - gt[..., None, :, i]).abs() for i in range(4))
    giou = pairwise_overlap(boxes, gt)[1]
    if kind == 'probability':
        cls = -label_logits(logits, labels).sigmoid()
    else:
        cls = class_cost(logits, labels, factor=placement(giou, valid) if kind == 'modulated' else None)
    terms = dict(cls=w_cls * cls, l1=w_l1 * l1, giou=-w_giou * giou)
    return terms if parts else terms['cls'] + terms['l1'] + terms['giou']


# %% [markdown]
# A second object B of another class lies slightly to the right of A. The predictions score .2, .9, .9 and .9
# for the class of A, and .1 for that of B. The second prediction is the cheapest one for both objects:

# %%
AB, labels = torch.tensor([[0.50, 0.5, 0.4, 0.4], [0.54, 0.5, 0.4, 0.4]]), torch.tensor([0, 1])
logits = torch.tensor([[0.2, 0.1], [0.9, 0.1], [0.9, 0.1], [0.9, 0.1]]).logit()
cost = pair_cost(logits, P, labels, AB)
expected = torch.tensor([[-1.4984, -0.5054], [-4.5066, -0.7786], [-3.4971, -0.2473]])
assert torch.allclose(cost[:3], expected, atol=1e-4)
assert cost.argmin(0).tolist() == [1, 1]
cost

# %% [markdown]
# With the modulated cost the third and the fourth prediction, which have the same score but lie farther away,
# cost more than before:

# %%
modulated = pair_cost(logits, P, labels, AB, kind='modulated')
expected_A = torch.tensor([-1.498368, -4.145829, -2.284780, 6.755878])
assert torch.allclose(modulated[:, 0], expected_A, atol=1e-5)
modulated[:, 0] - cost[:, 0]


# %% [markdown]
# ## One-to-one: the Hungarian method
#
# The matching is the assignment $\pi$ of objects to different queries with the smallest total cost,
#
# $$
# \hat\pi = \operatorname{arg\,min}_{\pi} \sum_{i=1}^{N} C_{\pi(i),\,i}.
# $$ {#eq-matching-hungarian}
#
# The pairs of all layers and images are stored in one flat list, so losses and statistics need no loop. A
# cost that is NaN or infinite has no assignment; the error names the image, the layer and the term of the
# cost.

# %%
#| export
@dataclass(frozen=True)
class Matches:
    "Pairs (query, object) of all layers and images in one flat list, ordered by layer, image, query"

    layer: Tensor  # (P,)
    image: Tensor  # (P,)
    query: Tensor  # (P,)
    target: Tensor  # (P,) number of the object in its image
    weight: Tensor  # (P,) one-to-many: the soft target; one-to-one: 1
    cost: Tensor | None = None  # (P,) one-to-one only: cost of the pair

    def __len__(self):
        return len(self.query)


# %%
#| export
class NonFiniteError(SemiDETRError):
    "A cost or a metric is NaN or infinite: the message names the image, the layer and the term"


def raise_non_finite(
    terms: dict,  # name -> (L,B,Q,N) terms of a cost or a metric
    ids: list,  # image ids of the batch
):
    "Raise NonFiniteError for the first image with a term that is not finite"
    for name, t in terms.items():
        bad = (~t.isfinite()).flatten(2).any(-1)  # (L,B)
        if bad.any():
            l, b = bad.nonzero()[0].tolist()
            what = 'pred_logits' if name in ('cls', 'score') else 'pred_boxes or the target boxes'
            raise NonFiniteError(
                f"image {ids[b]} (number {b} of the batch), layer {l}: the term '{name}' of the matching is "
                f'NaN or infinite, so {what} are; lower the learning rate, or look at this image'
            )
    raise NonFiniteError('the matching is not finite although each of its terms is')


# %%
#| export
def _host_costs(logits, boxes, padded, labels, weights):
    "For each layer the cost (Q,n) of each image, in numpy"
    L, B, Q = logits.shape[:3]
    labels = labels.expand(L, *padded.labels.shape)
    if logits.device.type == 'cpu' and B * Q * padded.labels.shape[1] > 2**16:
        for l in range(L):  # large costs image by image, so that their terms stay in the cache
            yield [
                pair_cost(logits[l, b], boxes[l, b], labels[l, b, :n], padded.boxes[b, :n], **weights).numpy()
                for b, n in enumerate(padded.counts)
            ]
        return
    C = pair_cost(logits, boxes, labels, padded.boxes, **weights, valid=padded.valid).cpu().numpy()
    for layer in C:
        yield [c[:, :n] for c, n in zip(layer, padded.counts)]


def assign_o2o(
    logits: Tensor,  # (L,B,Q,C) raw class scores
    boxes: Tensor,  # (L,B,Q,4) cxcywh normalised
    padded: PaddedTargets,  # of the B images
    labels: Tensor | None = None,  # (L,B,N) labels to match with; None = those of `padded` in all layers
    **weights,  # w_cls, w_l1, w_giou, kind of `pair_cost`
) -> Matches:
    "Hungarian matching of all layers and images (@eq-matching-hungarian); costs are copied to the host once"
    labels = padded.labels if labels is None else labels
    rows, costs = [], []
    for l, layer in enumerate(_host_costs(logits, boxes, padded, labels, weights)):
        for b, C in enumerate(layer):
            if not np.isfinite(C).all():
                plain = weights | dict(kind='focal', parts=True)  # its class term depends on no box
                terms = pair_cost(logits, boxes, labels, padded.boxes, **plain)
                raise_non_finite(terms, padded.ids)
            q, t = linear_sum_assignment(C)
            rows.append(np.stack([np.full_like(q, l), np.full_like(q, b), q, t]))
            costs.append(C[q, t])
    if not rows:
        return Matches(*padded.labels.new_zeros(4, 0), *padded.boxes.new_zeros(2, 0))
    index, c = (torch.from_numpy(np.concatenate(x, -1)).to(logits.device) for x in (rows, costs))
    return Matches(*index, torch.ones_like(c), c)


# %% [markdown]
# The solver runs on the host, with one small problem per image and layer. For examples, and where one layer
# is enough, `hungarian` returns the pairs per image:

# %%
#| export
def _split(m, n_layers, n_images, *fields):
    "Matches -> for each layer, for each image a tuple of tensors"
    sizes = torch.bincount(m.layer * n_images + m.image, minlength=n_layers * n_images).tolist()
    rows = list(zip(*(getattr(m, f).split(sizes) for f in fields)))
    return [rows[l * n_images : (l + 1) * n_images] for l in range(n_layers)]


def _stack(outputs):
    "Logits (L,B,Q,C) and boxes (L,B,Q,4) of some layers, detached"
    logits = torch.stack([sigmoid_logits(o).detach() for o in outputs])
    boxes = torch.stack([o['pred_boxes'].detach() for o in outputs])
    return logits, boxes


def hungarian_layers(
    outputs: list,  # per layer a dict with `pred_logits` (B,Q,C) and `pred_boxes` (B,Q,4)
    targets: list,  # per image a dict with `labels` and `boxes`
    with_cost: bool = False,  # return the cost of each pair too
    **weights,  # w_cls=2, w_l1=5, w_giou=2, kind='focal'
) -> list:  # for each layer, for each image: (query_idx, target_idx[, cost])
    "One-to-one matching of several layers at once"
    logits, boxes = _stack(outputs)
    m = assign_o2o(logits, boxes, pad_targets(targets, logits.shape[-1]), **weights)
    return _split(m, len(outputs), len(targets), 'query', 'target', *(['cost'] if with_cost else []))


def hungarian(
    outputs: dict,  # `pred_logits` (B,Q,C), `pred_boxes` (B,Q,4) of one layer
    targets: list,  # per image a dict with `labels` and `boxes`
    **kw,  # as `hungarian_layers`
) -> list:  # for each image (query_idx, target_idx[, cost])
    "One-to-one matching with the smallest total cost (@eq-matching-hungarian)"
    return hungarian_layers([outputs], targets, **kw)[0]


# %%
outputs = dict(pred_logits=logits[None], pred_boxes=P[None])
targets = [dict(labels=labels, boxes=AB)]
((query_idx, target_idx, paid),) = hungarian(outputs, targets, with_cost=True)
assert list(zip(query_idx.tolist(), target_idx.tolist())) == [(0, 1), (1, 0)]
assert abs(paid.sum() + 5.012) < 1e-3
query_idx, target_idx, paid

# %% [markdown]
# A gets the second prediction, so B gets the first, although the first fits A perfectly. Trying every
# assignment shows that none is cheaper:

# %%
best = min(itertools.permutations(range(4), 2), key=lambda pi: float(cost[pi[0], 0] + cost[pi[1], 1]))
assert best == (1, 0)
best

# %% [markdown]
# Without objects there are no pairs. A prediction that is NaN raises an error:

# %%
nothing = hungarian(outputs, [dict(labels=torch.zeros(0), boxes=torch.zeros(0, 4))])[0]
broken = dict(outputs, pred_boxes=P[None] * torch.tensor([1.0, 1.0, float('nan'), 1.0]))
try:
    hungarian(broken, [dict(targets[0], image_id='cells_0042')])
except NonFiniteError as e:
    complaint = str(e)
assert len(nothing[0]) == 0 and 'cells_0042' in complaint and 'pred_boxes' in complaint
complaint


# %% [markdown]
# ## One-to-many: task-aligned assignment
#
# The first stage scores a pair by classification *and* localisation quality. With $s_{ji}=\sigma(z_{j,c_i})$
# and the IoU $u_{ji}$, the metric is
#
# $$
# m_{ji} = s_{ji}^{\alpha}\,u_{ji}^{\beta}, \qquad \alpha=1,\;\beta=6.
# $$ {#eq-matching-metric}
#
# Because of the high power of the IoU, a query with a high score and a poorly placed box gets a low metric.

# %%
#| export
def aligned_metric(
    logits: Tensor,  # (...,Q,C) raw class scores
    boxes: Tensor,  # (...,Q,4) cxcywh normalised
    labels: Tensor,  # (...,N) classes of the objects
    gt: Tensor,  # (...,N,4) their boxes, cxcywh normalised
    alpha: float = 1.0,  # power of the score
    beta: float = 6.0,  # power of the IoU
):  # (m (...,Q,N), IoU u (...,Q,N)), detached, float32
    "Task-aligned metric m_ji of every pair (@eq-matching-metric)"
    logits, boxes, gt = (at_least_float32(x.detach()) for x in (logits, boxes, gt))
    iou = pairwise_overlap(boxes, gt)[0]
    return label_logits(logits, labels).sigmoid() ** alpha * iou**beta, iou


# %%
score = torch.tensor([[0.2], [0.9], [0.9], [0.9]])
m, u_A = aligned_metric(score.logit(), P, torch.tensor([0]), A)
assert torch.allclose(m[:, 0], torch.tensor([0.2, 0.493683, 0.041990, 0]), atol=1e-6)
m[:, 0]


# %% [markdown]
# The positives $P_i$ of object $i$ are found in three steps.
#
# 1. Take the $k=13$ queries with the largest $m_{ji}$.
# 2. Keep those with $m_{ji}>0$. There is no minimum: an object that no prediction overlaps has no positive.
# 3. A query among the candidates of several objects goes to the object with the largest *IoU* (not the
#    largest metric); ties go to the first object.

# %%
#| export
def select_positives(
    m: Tensor,  # (...,Q,N) metric
    iou: Tensor,  # (...,Q,N)
    valid: Tensor,  # (...,N) bool: objects, not padding
    k: int = 13,  # maximum number of positives per object
) -> Tensor:  # (...,Q,N) bool, at most one object per query
    "The k best queries of each object; a query that several objects compete for goes to the largest IoU"
    Q, N = m.shape[-2:]
    if not Q * N:
        return torch.zeros_like(m, dtype=torch.bool)
    best = m.topk(min(k, Q), dim=-2, sorted=False).indices
    keep = torch.zeros_like(m, dtype=torch.bool).scatter(-2, best, True) & (m > 0) & valid[..., None, :]
    owner = torch.where(keep, iou, -1.0).argmax(-1, keepdim=True)  # ties: the first
    return keep & (owner == torch.arange(N, device=m.device))


# %%
one = torch.ones(1, dtype=torch.bool)
assert select_positives(m, u_A, one, k=2)[:, 0].tolist() == [True, True, False, False]
positive = select_positives(m, u_A, one, k=13)  # more than there are queries
assert positive[:, 0].tolist() == [True, True, True, False]
positive[:, 0]


# %% [markdown]
# Each positive learns a *soft target*: its metric, rescaled so that the best-aligned positive of the object
# gets the largest IoU in $P_i$,
#
# $$
# \hat m_j = \frac{m_{ji}}{\max_{j'\in P_i} m_{j'i}+10^{-7}}\;\max_{j'\in P_i} u_{j'i}, \qquad j\in P_i.
# $$ {#eq-matching-soft}

# %%
#| export
def soft_targets(
    m: Tensor,  # (...,Q,N) metric
    iou: Tensor,  # (...,Q,N)
    positive: Tensor,  # (...,Q,N) bool
) -> Tensor:  # (...,Q,N) in [0,1], 0 where not positive
    "Metric of the positives, rescaled to the largest IoU of the object's positives (@eq-matching-soft)"
    if not m.shape[-2]:
        return m
    m, iou = m * positive, iou * positive
    return m / (m.amax(-2, keepdim=True) + 1e-7) * iou.amax(-2, keepdim=True)


# %%
m_hat = soft_targets(m, u_A, positive)[:, 0]
assert torch.allclose(m_hat, torch.tensor([0.405118, 1, 0.085055, 0]), atol=2e-6)
m_hat


# %% [markdown]
# The second prediction has the largest metric, so its target is 1, although its IoU is .905. The first one
# has an IoU of 1 but a score of .2; its target is .405.

# %%
#| export
def assign_o2m(
    logits: Tensor,  # (L,B,Q,C) raw class scores
    boxes: Tensor,  # (L,B,Q,4) cxcywh normalised
    padded: PaddedTargets,  # of the B images
    labels: Tensor | None = None,  # (L,B,N) labels to match with; None = those of `padded`
    k: int = 13,  # maximum number of positives per object
    alpha: float = 1.0,  # power of the score
    beta: float = 6.0,  # power of the IoU
) -> Matches:
    "Task-aligned one-to-many assignment of all layers and images, without a loop"
    labels = padded.labels if labels is None else labels
    m, iou = aligned_metric(logits, boxes, labels, padded.boxes, alpha, beta)
    if not m.isfinite().all():
        score = label_logits(at_least_float32(logits.detach()), labels).sigmoid()
        raise_non_finite(dict(score=score, iou=iou), padded.ids)
    positive = select_positives(m, iou, padded.valid, k)
    index = positive.nonzero(as_tuple=True)
    return Matches(*index, soft_targets(m, iou, positive)[index])


# %%
#| export
def one_to_many(
    outputs: dict,  # `pred_logits` (B,Q,C), `pred_boxes` (B,Q,4) of one layer
    targets: list,  # per image a dict with `labels` and `boxes`
    k: int = 13,  # maximum number of positives per object; may exceed Q
    alpha: float = 1.0,  # power of the score
    beta: float = 6.0,  # power of the IoU
) -> list:  # for each image (query_idx, target_idx, soft target)
    "Task-aligned one-to-many assignment of one layer (@eq-matching-metric, @eq-matching-soft)"
    logits, boxes = _stack([outputs])
    m = assign_o2m(logits, boxes, pad_targets(targets, logits.shape[-1]), None, k, alpha, beta)
    return _split(m, 1, len(targets), 'query', 'target', 'weight')[0]


# %% [markdown]
# With both objects there are conflicts. Both have the first prediction among their candidates, and it
# overlaps A more. The third goes to B, with which it has an IoU of .74, although its metric for A is larger:

# %%
((q, t, w),) = one_to_many(outputs, targets, k=4)
owner = dict(zip(q.tolist(), t.tolist()))
m2, u2 = aligned_metric(logits, P, labels, AB)
assert owner[0] == 0 and owner[2] == 1 and m2[2, 0] > m2[2, 1] and u2[2, 1] > u2[2, 0]
owner, u2

# %% [markdown]
# An object far from all predictions shows the difference between the stages: it has no positive in the first
# stage, and one in the second, however poor.

# %%
far = [dict(labels=torch.tensor([0]), boxes=torch.tensor([[0.9, 0.9, 0.1, 0.1]]))]
counts = len(one_to_many(outputs, far)[0][0]), len(hungarian(outputs, far)[0][0])
assert counts == (0, 1)
counts

# %% [markdown]
# ::: {.callout-note}
# ## Paper vs. code
# The paper gives the metric, the ranking and the loss. Three details are taken from the published code: a
# query in conflict goes to the largest *IoU*, there is no minimum number of positives, and the constant
# $10^{-7}$. That code fails when there are fewer than $k$ queries; here all of them become candidates. It also
# computes overlaps in pixels with the union floored at $10^{-6}$; normalised boxes give the same numbers to
# six digits.
# :::

# %%
#| label: fig-matching-stages
#| fig-cap: "Sixty queries around three objects. One-to-many matching assigns several queries to each object, with larger soft targets drawn darker; one-to-one matching assigns exactly one."
#| fig-alt: "Two panels with the same three green and many blue boxes; left about eight lines to each object, of different darkness; right one line to each object."
g = torch.Generator().manual_seed(3)
gt = torch.tensor([[0.3, 0.35, 0.3, 0.4], [0.72, 0.3, 0.3, 0.3], [0.6, 0.75, 0.45, 0.3]])
near = gt.repeat(20, 1) + 0.05 * torch.randn(60, 4, generator=g)
crowd = dict(pred_logits=torch.randn(1, 60, 1, generator=g), pred_boxes=near.clamp(0.05, 0.95)[None])
objects = [dict(labels=torch.zeros(3, dtype=torch.long), boxes=gt)]
fig, axes = plt.subplots(1, 2, figsize=(6, 3.1), dpi=80, layout='constrained')
pixels, gt_pixels = (denormalize_boxes(x, (100, 100)) for x in (crowd['pred_boxes'][0], gt))
matchings = {'one-to-many, k=8': one_to_many(crowd, objects, k=8), 'one-to-one': hungarian(crowd, objects)}
for ax, (name, (found,)) in zip(axes, matchings.items()):
    used = found[0].unique()
    row = {int(j): n for n, j in enumerate(used)}
    pairs = [row[int(j)] for j in found[0]], found[1]
    draw_matches(ax, pixels[used], gt_pixels, pairs, weights=found[2] if len(found) > 2 else None)
    ax.set(xlim=(0, 100), ylim=(100, 0), xticks=[], yticks=[], title=f'{name}: {len(found[0])} positives')
plt.show()

# %% [markdown]
# ## Summary
#
# * `stage_of` gives the stage of an iteration. `assign_o2m` and `assign_o2o` match all layers and images at
#   once; `one_to_many` and `hungarian` return the pairs of one layer per image.
# * One-to-one matching minimises the total cost: every object gets exactly one query, if need be a poor one.
# * One-to-many matching takes the $k$ queries with the largest $s\,u^6$, resolves conflicts by IoU, and
#   weights the positives by soft targets.
# * Matching is detached, runs in float32, and compares each image with its own objects only.
# * NaN raises an error that names image, layer and term. Zero objects, and fewer queries than $k$, are
#   handled.
#
# ## Exercises
#
# 1. Multiply all scores of a class by $\tfrac12$: which positives and soft targets change, and which costs?
# 2. With 100 queries and 8 objects per image, how large may $k$ be before a quarter of all queries is
#    positive?
# 3. Two identical objects of the same class: what do the two matchings do?
# 4. Why would resolving conflicts by $m$ favour classes that the network already predicts well?
