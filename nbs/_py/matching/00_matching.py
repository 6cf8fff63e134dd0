# %% [markdown]
# # Matching {#sec-matching}
#
# > Decide which prediction answers for which object: several of them while the network is young, exactly one
# > when it is grown.
#
# A detection transformer says a fixed number of boxes, in no order. Before a loss can be computed somebody
# has to say which box should have been which object. *One-to-one* matching gives each object one query: no
# duplicates, hence no non-maximum suppression, but a wrong pseudo box then spoils the only positive an object
# has, and few queries learn. *One-to-many* matching gives each object several queries and weights them by
# quality: it learns fast and forgives bad boxes, but leaves duplicates behind. Semi-DETR uses both, one after
# the other.

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
from semidetr.core import DataError, SemiDETRError

# %%
import itertools
import matplotlib.pyplot as plt
from semidetr.boxes import denormalize_boxes
from semidetr.draw import draw_matches


# %% [markdown]
# ## The stage rule
#
# Let $t$ be the iteration, counted from 0, and $T_1$ the first iteration of the second stage. The rule is
# global: labelled and unlabelled images, every decoder layer and the encoder output follow it.

# %%
#| export
def stage_of(
    step: int,  # iteration, counted from 0
    T1: int,  # first iteration of the one-to-one stage; 0 = one-to-one from the start
) -> str:  # 'o2m' or 'o2o'
    "The stage rule: many predictions an object before T1, exactly one from T1 on"
    return 'o2m' if step < T1 else 'o2o'


# %%
stages = [stage_of(t, T1=60_000) for t in (0, 59_999, 60_000, 119_999)]
assert stages == ['o2m', 'o2m', 'o2o', 'o2o'] and stage_of(0, T1=0) == 'o2o'
stages


# %% [markdown]
# ## Targets in a rectangle
#
# Images hold different numbers of objects. Padding them to the largest number $N$ of the batch lets one
# tensor operation serve all images and all layers, at a cost that grows with the number of images $B$.
# Computing the costs between *all* predictions and *all* objects of the batch, as is often done, grows with
# $B^2$ and throws nearly all of it away.

# %%
#| export
@dataclass(frozen=True)
class PaddedTargets:
    "The targets of a batch as rectangular tensors: N is the most objects of an image"

    labels: Tensor  # (B,N) int64, 0 in unused places
    boxes: Tensor  # (B,N,4) cxcywh normalised, float32 at least; (.5,.5,.5,.5) in unused places
    valid: Tensor  # (B,N) bool, True for real objects
    counts: list  # objects of each image
    ids: list  # image ids, for messages


# %%
#| export
def _at_least_float32(x):
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def pad_targets(
    targets: list,  # dicts with `labels` (n,), `boxes` (n,4) cxcywh normalised and perhaps `image_id`
    num_classes: int | None = None,  # C; None = labels are not checked
) -> PaddedTargets:
    "Stack the targets of a batch; images without objects are welcome. DataError where a label is not a class"
    labels = [t['labels'].reshape(-1).long() for t in targets]
    boxes = [_at_least_float32(t['boxes']).reshape(-1, 4) for t in targets]
    counts, ids = [len(x) for x in labels], [t.get('image_id', b) for b, t in enumerate(targets)]
    padded = pad_sequence(labels, batch_first=True)
    valid = torch.arange(padded.shape[1]) < torch.tensor(counts)[:, None]
    if num_classes is not None and padded.numel():
        bad = ((padded < 0) | (padded >= num_classes)).any(1)
        if bad.any():
            b = int(bad.nonzero()[0])
            raise DataError(
                f'image {ids[b]}: labels {labels[b].tolist()} are not all in 0..{num_classes - 1}; run `semidetr doctor` on the data set'
            )
    return PaddedTargets(
        padded, pad_sequence(boxes, batch_first=True, padding_value=0.5), valid.to(padded.device), counts, ids
    )


# %%
padded_toy = pad_targets(
    [
        dict(labels=torch.tensor([2, 0]), boxes=torch.rand(2, 4)),
        dict(labels=torch.zeros(0), boxes=torch.zeros(0, 4)),
    ],
    num_classes=3,
)
assert padded_toy.counts == [2, 0] and padded_toy.boxes.shape == (2, 2, 4)
padded_toy.valid

# %% [markdown]
# A label that is not a class would be read from a place that does not exist, which a GPU reports as an
# assertion far away. Here the image is named:

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
# Both matchings need the overlap $u_{ji}$ of prediction $j$ with object $i$. Four proposals around one object
# are enough to see everything in this chapter: the first is exact, the second a little off, the third more
# so, the last elsewhere.

# %%
#| export
def pairwise_overlap(
    a: Tensor,  # (...,Q,4) cxcywh
    b: Tensor,  # (...,N,4) cxcywh, same unit; leading dimensions broadcast
    eps: float = 1e-12,  # floor of the areas that are divided by
):  # (IoU (...,Q,N) in [0,1], GIoU (...,Q,N) in [-1,1])
    "IoU and generalised IoU of all pairs of one image, for any number of images and layers at once"
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
)  # the proposals
u, giou = pairwise_overlap(P, A)
assert torch.allclose(u[:, 0], torch.tensor([1, 0.904762, 0.6, 0]), atol=1e-6)
u[:, 0], giou[:, 0]


# %% [markdown]
# Only the generalised IoU still tells the last proposal how far away it is. Neither depends on the unit:
# normalised boxes serve as well as pixels.
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
# with $\alpha=.25$, $\gamma=2$ and weights 2, 5, 2. $f^+$ is the loss of a query that is asked to be the
# object and $f^-$ that of being background: the difference is what the choice costs.

# %%
#| export
def _of_class(logits, labels):
    "Column of each object's class: (...,Q,C), (...,N) -> (...,Q,N)"
    index = labels[..., None, :].expand(*logits.shape[:-1], labels.shape[-1])
    return logits.gather(-1, index)


def class_cost(
    logits: Tensor,  # (...,Q,C) raw class scores
    labels: Tensor,  # (...,N) classes of the objects
    alpha: float = 0.25,  # weight of the positive focal term
    gamma: float = 2.0,  # focusing power
) -> Tensor:  # (...,Q,N): negative where the class is predicted
    "What it costs to call a query an object instead of background, in focal loss (first term of @eq-matching-cost)"
    p = _of_class(logits, labels).sigmoid()
    pos = -alpha * (1 - p) ** gamma * (p + 1e-12).log()
    neg = -(1 - alpha) * p**gamma * (1 - p + 1e-12).log()
    return pos - neg


# %%
two = class_cost(torch.tensor([[0.2], [0.9]]).logit(), torch.tensor([0]))[:, 0]
assert torch.allclose(2 * two, torch.tensor([0.50163, -2.79711]), atol=1e-5)
2 * two


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
    parts: bool = False,  # return the weighted terms instead of their sum
):  # (...,Q,N) cost of every pair, detached, float32; or a dict of three such tensors
    "Cost of matching each query with each object of its image; leading dimensions (layers, images) are batched"
    logits, boxes, gt = (_at_least_float32(x) for x in (logits, boxes, gt))
    l1 = sum((boxes[..., :, None, i] - gt[..., None, :, i]).abs() for i in range(4))
    terms = dict(
        cls=w_cls * class_cost(logits, labels), l1=w_l1 * l1, giou=-w_giou * pairwise_overlap(boxes, gt)[1]
    )
    return terms if parts else terms['cls'] + terms['l1'] + terms['giou']


# %% [markdown]
# A second object B of another class lies a little to the right of A. The proposals score .2, .9 and .9 for
# A's class and .1 for B's. The cheapest proposal of both objects is the second one:

# %%
AB, labels = torch.tensor([[0.50, 0.5, 0.4, 0.4], [0.54, 0.5, 0.4, 0.4]]), torch.tensor([0, 1])
logits = torch.tensor([[0.2, 0.1], [0.9, 0.1], [0.9, 0.1], [0.9, 0.1]]).logit()
cost = pair_cost(logits, P, labels, AB)
assert torch.allclose(
    cost[:3], torch.tensor([[-1.4984, -0.5054], [-4.5066, -0.7786], [-3.4971, -0.2473]]), atol=1e-4
) and cost.argmin(0).tolist() == [1, 1]
cost


# %% [markdown]
# ## One-to-one: the Hungarian method
#
# The matching is the assignment of objects to different queries with the least total cost,
#
# $$
# \hat\pi = \operatorname{arg\,min}_{\pi} \sum_{i=1}^{N} C_{\pi(i),\,i}.
# $$ {#eq-matching-hungarian}
#
# A matching for all layers and images is a flat list of pairs; everything behind it (losses, statistics) then
# needs no loop. A cost that is NaN ends the matching. Which image, which layer and which term it was is worth
# more to a user than a message of the solver, so it is looked up and said.

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


def _blame(terms, ids):
    "Raise for the first image with a term that is not finite"
    for name, t in terms.items():
        bad = (~t.isfinite()).flatten(2).any(-1)  # (L,B)
        if bad.any():
            l, b = bad.nonzero()[0].tolist()
            what = 'pred_logits' if name in ('cls', 'score') else 'pred_boxes or the target boxes'
            raise NonFiniteError(
                f"image {ids[b]} (number {b} of the batch), layer {l}: the term '{name}' of the matching is NaN or infinite, "
                f'so {what} are; lower the learning rate, or look at this image'
            )
    raise NonFiniteError('the matching is not finite although each of its terms is')


# %%
#| export
def _host_costs(logits, boxes, padded, labels, weights):
    "For each layer the cost (Q,n) of each image, in numpy; large ones on a CPU image by image, so that their terms stay in the cache"
    L, B, Q = logits.shape[:3]
    labels = labels.expand(L, *padded.labels.shape)
    if logits.device.type == 'cpu' and B * Q * padded.labels.shape[1] > 2**16:
        for l in range(L):
            yield [
                pair_cost(logits[l, b], boxes[l, b], labels[l, b, :n], padded.boxes[b, :n], **weights).numpy()
                for b, n in enumerate(padded.counts)
            ]
        return
    C = pair_cost(logits, boxes, labels, padded.boxes, **weights).cpu().numpy()
    for layer in C:
        yield [c[:, :n] for c, n in zip(layer, padded.counts)]


def assign_o2o(
    logits: Tensor,  # (L,B,Q,C)
    boxes: Tensor,  # (L,B,Q,4) cxcywh normalised
    padded: PaddedTargets,  # of the B images
    labels: Tensor | None = None,  # (L,B,N) labels to match with; None = those of `padded` in all layers
    **weights,  # w_cls, w_l1, w_giou of `pair_cost`
) -> Matches:
    "Hungarian matching of all layers and images: one batched cost, one copy to the host, one assignment an image and layer"
    labels = padded.labels if labels is None else labels
    rows, least = [], []
    for l, layer in enumerate(_host_costs(logits, boxes, padded, labels, weights)):
        for b, C in enumerate(layer):
            if not np.isfinite(C).all():
                _blame(pair_cost(logits, boxes, labels, padded.boxes, parts=True, **weights), padded.ids)
            q, t = linear_sum_assignment(C)
            rows.append(np.stack([np.full_like(q, l), np.full_like(q, b), q, t]))
            least.append(C[q, t])
    if not rows:
        return Matches(*padded.labels.new_zeros(4, 0), *padded.boxes.new_zeros(2, 0))
    index, c = (torch.from_numpy(np.concatenate(x, -1)).to(logits.device) for x in (rows, least))
    return Matches(*index, torch.ones_like(c), c)


# %% [markdown]
# The solver runs on the host, one small problem an image and layer; the costs go there in a single copy. For
# readers, and wherever one layer is enough, the pairs come per image:

# %%
#| export
def _split(m, n_layers, n_images, *fields):
    "Matches -> for each layer, for each image a tuple of tensors"
    sizes = torch.bincount(m.layer * n_images + m.image, minlength=n_layers * n_images).tolist()
    rows = list(zip(*(getattr(m, f).split(sizes) for f in fields)))
    return [rows[l * n_images : (l + 1) * n_images] for l in range(n_layers)]


def _stack(outputs):
    return torch.stack([o['pred_logits'].detach() for o in outputs]), torch.stack(
        [o['pred_boxes'].detach() for o in outputs]
    )


def hungarian_layers(
    outputs: list,  # one dict with `pred_logits` (B,Q,C) and `pred_boxes` (B,Q,4) a layer
    targets: list,  # dicts with `labels` and `boxes`, one an image
    with_cost: bool = False,  # return the cost of each pair too
    **weights,  # w_cls=2, w_l1=5, w_giou=2
) -> list:  # for each layer, for each image: (query_idx, target_idx[, cost])
    "One-to-one matching of several layers at once"
    logits, boxes = _stack(outputs)
    m = assign_o2o(logits, boxes, pad_targets(targets, logits.shape[-1]), **weights)
    return _split(m, len(outputs), len(targets), 'query', 'target', *(['cost'] if with_cost else []))


def hungarian(
    outputs: dict,  # `pred_logits` (B,Q,C), `pred_boxes` (B,Q,4) of one layer
    targets: list,  # dicts with `labels` and `boxes`, one an image
    **kw,  # as `hungarian_layers`
) -> list:  # for each image (query_idx, target_idx[, cost])
    "One-to-one matching of least total cost (@eq-matching-hungarian)"
    return hungarian_layers([outputs], targets, **kw)[0]


# %%
outputs = dict(pred_logits=logits[None], pred_boxes=P[None])
targets = [dict(labels=labels, boxes=AB)]
((query_idx, target_idx, paid),) = hungarian(outputs, targets, with_cost=True)
assert (
    list(zip(query_idx.tolist(), target_idx.tolist())) == [(0, 1), (1, 0)] and abs(paid.sum() + 5.012) < 1e-3
)
query_idx, target_idx, paid

# %% [markdown]
# B has to give way: the second proposal answers for A, and B gets the first although it fits A perfectly.
# Trying every assignment says that nothing is cheaper:

# %%
best = min(itertools.permutations(range(4), 2), key=lambda pi: float(cost[pi[0], 0] + cost[pi[1], 1]))
assert best == (1, 0)
best

# %% [markdown]
# No objects, no pairs; a broken prediction is named, and so is the term it broke:

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
# ## One-to-many: aligned in task
#
# The first stage scores a pair by how well the query does *both* of its tasks. With
# $s_{ji}=\sigma(z_{j,c_i})$ and the IoU $u_{ji}$,
#
# $$
# m_{ji} = s_{ji}^{\alpha}\,u_{ji}^{\beta}, \qquad \alpha=1,\;\beta=6.
# $$ {#eq-matching-metric}
#
# The high power of the overlap makes a query that is confident but badly placed worth little.

# %%
#| export
def aligned_metric(
    logits: Tensor,  # (...,Q,C) raw class scores
    boxes: Tensor,  # (...,Q,4) cxcywh normalised
    labels: Tensor,  # (...,N)
    gt: Tensor,  # (...,N,4) cxcywh normalised
    alpha: float = 1.0,  # power of the score
    beta: float = 6.0,  # power of the IoU
):  # (m (...,Q,N), IoU (...,Q,N))
    "Task-aligned metric of every pair (@eq-matching-metric): score and overlap must both be good"
    logits, boxes, gt = (_at_least_float32(x) for x in (logits, boxes, gt))
    iou = pairwise_overlap(boxes, gt)[0]
    return _of_class(logits, labels).sigmoid() ** alpha * iou**beta, iou


# %%
score = torch.tensor([[0.2], [0.9], [0.9], [0.9]])
m, u_A = aligned_metric(score.logit(), P, torch.tensor([0]), A)
assert torch.allclose(m[:, 0], torch.tensor([0.2, 0.493683, 0.041990, 0]), atol=1e-6)
m[:, 0]


# %% [markdown]
# The positives of an object are found in three steps.
#
# 1. Take the $k=13$ queries with the largest $m$.
# 2. Keep those with $m>0$. There is no least number: an object that nothing overlaps has no positive.
# 3. A query wanted by several objects goes to the one it *overlaps* most (not the one with the largest $m$);
#    on a tie to the first.

# %%
#| export
def select_positives(
    m: Tensor,  # (...,Q,N) metric
    iou: Tensor,  # (...,Q,N)
    valid: Tensor,  # (...,N) bool: real objects
    k: int = 13,  # most positives of an object
) -> Tensor:  # (...,Q,N) bool, at most one object a query
    "The k best queries of each object; a query wanted by several goes to the one it overlaps most"
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
# Positives are not equal. Each learns a *soft target*: its metric, scaled so that the best-aligned positive
# of the object gets the largest IoU of the group $P_i$,
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
    "Metric of the positives scaled so that an object's best one gets the largest IoU of its group (@eq-matching-soft)"
    if not m.shape[-2]:
        return m
    m, iou = m * positive, iou * positive
    return m / (m.amax(-2, keepdim=True) + 1e-7) * iou.amax(-2, keepdim=True)


# %%
m_hat = soft_targets(m, u_A, positive)[:, 0]
assert torch.allclose(m_hat, torch.tensor([0.405118, 1, 0.085055, 0]), atol=2e-6)
m_hat


# %% [markdown]
# The second proposal is to say 1.0 although it overlaps the object by .905: it is the one that is right in
# both respects. The perfectly placed first one scores .2 and is to say .405.

# %%
#| export
def assign_o2m(
    logits: Tensor,  # (L,B,Q,C)
    boxes: Tensor,  # (L,B,Q,4) cxcywh normalised
    padded: PaddedTargets,  # of the B images
    labels: Tensor | None = None,  # (L,B,N) labels to match with; None = those of `padded`
    k: int = 13,
    alpha: float = 1.0,
    beta: float = 6.0,  # see `one_to_many`
) -> Matches:
    "Task-aligned one-to-many assignment of all layers and images, without a loop"
    labels = padded.labels if labels is None else labels
    m, iou = aligned_metric(logits, boxes, labels, padded.boxes, alpha, beta)
    if not m.isfinite().all():
        _blame(dict(score=_of_class(_at_least_float32(logits), labels).sigmoid(), iou=iou), padded.ids)
    positive = select_positives(m, iou, padded.valid, k)
    index = positive.nonzero(as_tuple=True)
    return Matches(*index, soft_targets(m, iou, positive)[index])


# %%
#| export
def one_to_many(
    outputs: dict,  # `pred_logits` (B,Q,C), `pred_boxes` (B,Q,4) of one layer
    targets: list,  # dicts with `labels` and `boxes`, one an image
    k: int = 13,  # most positives of an object; may exceed Q
    alpha: float = 1.0,  # power of the score
    beta: float = 6.0,  # power of the IoU
) -> list:  # for each image (query_idx, target_idx, soft target)
    "Task-aligned one-to-many assignment of one layer (@eq-matching-metric, @eq-matching-soft)"
    logits, boxes = _stack([outputs])
    m = assign_o2m(logits, boxes, pad_targets(targets, logits.shape[-1]), None, k, alpha, beta)
    return _split(m, 1, len(targets), 'query', 'target', 'weight')[0]


# %% [markdown]
# With both objects there are conflicts. The first proposal is wanted by both and overlaps A more; the third
# goes to B, which it overlaps by .74, although its metric for A is larger:

# %%
((q, t, w),) = one_to_many(outputs, targets, k=4)
owner = dict(zip(q.tolist(), t.tolist()))
m2, u2 = aligned_metric(logits, P, labels, AB)
assert owner[0] == 0 and owner[2] == 1 and m2[2, 0] > m2[2, 1] and u2[2, 1] > u2[2, 0]
owner, u2

# %% [markdown]
# An object far from all proposals shows the difference between the stages: nothing to learn from in the
# first, one forced positive in the second.

# %%
far = [dict(labels=torch.tensor([0]), boxes=torch.tensor([[0.9, 0.9, 0.1, 0.1]]))]
counts = len(one_to_many(outputs, far)[0][0]), len(hungarian(outputs, far)[0][0])
assert counts == (0, 1)
counts

# %% [markdown]
# ::: {.callout-note}
# ## Paper vs. code
# The paper gives the metric, the ranking and the loss; that a query in conflict goes to the largest *IoU*,
# that there is no least number of positives, and the constant $10^{-7}$ are taken from the published code.
# That code fails when there are fewer than $k$ queries; here all of them become candidates. It also computes
# overlaps in pixels with the union floored at $10^{-6}$; normalised boxes give the same numbers to six
# digits.
# :::

# %%
#| label: fig-matching-stages
#| fig-cap: "Sixty queries around three objects. One-to-many lets many queries work for an object, the better ones more (dark lines); one-to-one leaves a single one."
#| fig-alt: "Two panels with the same three green and many blue boxes; left about eight lines to each object, of different darkness; right one line to each object."
g = torch.Generator().manual_seed(3)
gt = torch.tensor([[0.3, 0.35, 0.3, 0.4], [0.72, 0.3, 0.3, 0.3], [0.6, 0.75, 0.45, 0.3]])
near = gt.repeat(20, 1) + 0.05 * torch.randn(60, 4, generator=g)
crowd = dict(pred_logits=torch.randn(1, 60, 1, generator=g), pred_boxes=near.clamp(0.05, 0.95)[None])
objects = [dict(labels=torch.zeros(3, dtype=torch.long), boxes=gt)]
fig, axes = plt.subplots(1, 2, figsize=(6, 3.1), dpi=80, layout='constrained')
for ax, (name, (found,)) in zip(
    axes,
    {'one-to-many, k=8': one_to_many(crowd, objects, k=8), 'one-to-one': hungarian(crowd, objects)}.items(),
):
    pixels = [denormalize_boxes(x, (100, 100)) for x in (crowd['pred_boxes'][0], gt)]
    used = found[0].unique()
    row = {int(j): n for n, j in enumerate(used)}
    draw_matches(
        ax,
        pixels[0][used],
        pixels[1],
        ([row[int(j)] for j in found[0]], found[1]),
        weights=found[2] if len(found) > 2 else None,
    )
    ax.set(xlim=(0, 100), ylim=(100, 0), xticks=[], yticks=[], title=f'{name}: {len(found[0])} positives')
plt.show()

# %% [markdown]
# ## Summary
#
# * `stage_of` says which matching an iteration uses; `assign_o2m` and `assign_o2o` do it for all layers and
#   images at once, `one_to_many` and `hungarian` for readers.
# * One-to-one takes the assignment of least total cost: every object gets one query, if need be a bad one.
# * One-to-many takes the $k$ queries with the best $s\,u^6$, resolves conflicts by overlap, and grades the
#   positives by soft targets.
# * All of it runs detached, in float32, and each image is compared with its own objects only.
# * NaN is an error that names image, layer and term; zero objects and fewer queries than $k$ are not errors.
#
# ## Exercises
#
# 1. Multiply all scores of a class by $\tfrac12$: which positives and soft targets change, and which costs?
# 2. With 100 queries and 8 objects an image, how large may $k$ be before a quarter of all queries is
#    positive?
# 3. Two identical objects of the same class: what do the two matchings do?
# 4. Why would a conflict resolved by $m$ favour classes that the network already knows?
