# %% [markdown]
# # The loss of the suppressor {#sec-rescoring}
#
# > Train one query of each object to keep its score, with pseudo boxes that are only partly reliable.
#
# *Why.* The learned suppressor (@sec-suppressor) copies boxes and gives new class logits. Its loss therefore has
# one term, and it is the only one of the detector that is one-to-one. Which query of an object should keep its
# score is again a matching problem. And with the teacher's boxes as targets there is a second question: a query
# without a target is background only if the teacher would have seen an object there. Where the teacher has an
# unsure box, nobody knows, and the loss must not say "background".

# %%
#| default_exp matching.rescoring

# %%
#| export
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms
from semidetr.boxes import cxcywh_to_xyxy
from semidetr.core import at_least_float32
from semidetr.many import normaliser
from semidetr.matching.losses import CriterionConfig, box_losses
from semidetr.matching.matching import assign_o2o, pad_targets, pairwise_overlap

# %%
import matplotlib.pyplot as plt


# %% [markdown]
# ## Quality as target
#
# With the probability $p=\sigma(\tilde z)$ of a class, and the IoU $u$ of the query's box with its object,
#
# $$
# \mathrm{VFL}(p,u)=\begin{cases} u\,\mathrm{BCE}(p,u) & \text{matched, } u>0\\ .75\,p^2\,\mathrm{BCE}(p,0) & \text{else}\end{cases}
# $$ {#eq-rescoring-vfl}
#
# Weights have no gradient. In that the function differs from `varifocal_loss` of @sec-losses, which has the
# same values: there the weight $p^2$ of the background is differentiated as well.

# %%
#| export
def quality_loss(
    logits: Tensor,  # (...) raw scores
    target: Tensor,  # (...) IoU of the matched pair, 0 = background
) -> Tensor:  # (...) loss of each entry
    "Varifocal loss whose weights have no gradient (@eq-rescoring-vfl)"
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction='none')
    return torch.where(target > 0, target, 0.75 * logits.detach().sigmoid() ** 2) * bce


# %%
entry = torch.tensor([0.6]).logit().requires_grad_()
values = [quality_loss(entry, torch.tensor([u])) for u in (0.8, 0.0)]
assert abs(values[0].item() - 0.473535) < 1e-5 and abs(values[1].item() - 0.247398) < 1e-5
values[1].backward()
assert abs(entry.grad.item() - 0.75 * 0.6**2 * 0.6) < 1e-6
[v.item() for v in values]


# %% [markdown]
# ## Sure and doubtful boxes
#
# A teacher's box with a score of at least .4 (`method.mds_threshold`) is *sure*: it is a target, and its score
# $s$ multiplies the quality, $u\,s$. Every other box of the teacher is *doubtful*. The entry of query $i$ and
# class $c$ is left out of the loss if $i$ has no target of class $c$ and overlaps a doubtful box of that class
# by more than one half.

# %%
#| export
def sure_and_doubtful(
    boxes: list,  # per image the teacher's boxes in the strong view: dict(boxes, labels, scores)
    threshold: float,  # smallest score of a sure box
) -> tuple:  # two such lists
    "The teacher's boxes in two parts, by score"
    parts = []
    for sure in (True, False):
        masks = [(d['scores'] >= threshold) == sure for d in boxes]
        rows = ('boxes', 'labels', 'scores')
        parts.append([{**d, **{k: d[k][m] for k in rows}} for d, m in zip(boxes, masks)])
    return tuple(parts)


def doubtful_entries(
    boxes: Tensor,  # (B,n,4) cxcywh of the queries
    num_classes: int,  # C
    doubtful: list,  # per image dict(boxes (k,4) cxcywh, labels (k,))
    iou: float = 0.5,  # overlaps must be larger
) -> Tensor:  # (B,n,C) bool
    "Entries of query and class where a doubtful box of that class is"
    padded = pad_targets(doubtful, num_classes)
    met = (pairwise_overlap(boxes.detach(), padded.boxes)[0] > iou) & padded.valid[:, None]
    of_class = F.one_hot(padded.labels, num_classes).to(boxes.dtype)  # (B,k,C)
    return met.to(boxes.dtype) @ of_class > 0


# %%
three_queries = torch.tensor([[[0.5, 0.5, 0.4, 0.4], [0.52, 0.5, 0.4, 0.4], [0.2, 0.2, 0.1, 0.1]]])
seen_by_teacher = [
    dict(
        boxes=torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.2, 0.2, 0.1, 0.1]]),
        labels=torch.tensor([1, 0]),
        scores=torch.tensor([0.9, 0.2]),
    )
]
sure, doubtful = sure_and_doubtful(seen_by_teacher, 0.4)
ignored = doubtful_entries(three_queries, 2, doubtful)
assert sure[0]['labels'].tolist() == [1] and doubtful[0]['labels'].tolist() == [0]
assert ignored[0].tolist() == [[False, False], [False, False], [True, False]]
ignored[0]


# %% [markdown]
# ## The loss
#
# The matching is the Hungarian one of @sec-matching with its weights 2, 5, 2, on the new logits and the copied
# boxes. With $\hat s_i$ the score of the object (1 for labelled ones), $K$ the entries that are kept, and $N$
# the number of objects (the mean over the processes, at least 1),
#
# $$
# L_{mds} = \frac{w_{mds}}{N} \sum_{(i,c)\in K} \mathrm{VFL}\left(p_{ic},\,u_i\,\hat s_i\right)
# $$ {#eq-rescoring-loss}
#
# The matching may choose a query that is not the surest one of its object. A surer duplicate then learns to
# yield to a query that it cannot see (@eq-suppressor-order). `criterion.mds_cost='one_to_many'` takes the class
# cost from the one-to-many scores, which have the order of the mask.

# %%
#| export
def suppressor_loss(
    outputs: dict,  # of a detector, with `suppressed`
    targets: list,  # per image dict(labels (N,), boxes (N,4) cxcywh[, scores (N,)])
    cfg: CriterionConfig = CriterionConfig(),  # weights of the cost, w_mds, mds_cost
    doubtful: list = None,  # per image boxes that are neither objects nor background
) -> dict:  # loss_mds: scalar
    "One-to-one loss of the new scores (@eq-rescoring-loss); NonFiniteError and DataError as `set_criterion`"
    new = outputs['suppressed']
    logits, boxes = (at_least_float32(new[k]) for k in ('pred_logits', 'pred_boxes'))
    padded = pad_targets(targets, logits.shape[-1])
    cost_logits = logits
    if cfg.mds_cost == 'one_to_many':
        index = new['index'][..., None].expand(-1, -1, logits.shape[-1])
        cost_logits = at_least_float32(outputs['pred_logits'].detach()).gather(1, index)
    m = assign_o2o(cost_logits[None], boxes[None], padded, **cfg.cost)
    iou = box_losses(boxes[m.image, m.query], padded.boxes[m.image, m.target])[2]
    scores = [t.get('scores', torch.ones_like(t['boxes'][:, 0])) for t in targets]
    score = torch.cat(scores).to(iou.dtype)  # in the order of the images
    first = torch.tensor([0, *padded.counts[:-1]], device=iou.device).cumsum(0)
    y = torch.zeros_like(logits)
    at = m.image, m.query, padded.labels[m.image, m.target]
    y[at] = (iou * score[first[m.image] + m.target]).to(y.dtype)
    losses = quality_loss(logits, y)
    if doubtful is not None:
        positive = torch.zeros_like(y, dtype=torch.bool)
        positive[at] = True
        unknown = doubtful_entries(boxes, logits.shape[-1], doubtful) & ~positive
        losses = losses.masked_fill(unknown, 0)
    objects = normaliser(losses.new_tensor(float(sum(padded.counts))), cfg.normalise)
    return dict(loss_mds=cfg.w_mds * losses.sum() / objects)


# %% [markdown]
# Three queries, the first two on one object of class 1: one of them becomes the positive. Without the doubtful
# box the third query is background for both classes, with it for class 1 only.

# %%
new_logits = torch.tensor([[[0.1, 0.6], [0.1, 0.5], [0.6, 0.1]]]).logit().requires_grad_()
toy = dict(suppressed=dict(pred_logits=new_logits, pred_boxes=three_queries, index=torch.arange(3)[None]))
objects = [{k: v for k, v in sure[0].items() if k != 'scores'}]
whole = suppressor_loss(toy, objects)['loss_mds']
without = suppressor_loss(toy, objects, doubtful=doubtful)['loss_mds']
background = [0.1, 0.1, 0.5, 0.6, 0.1]
by_hand = sum(quality_loss(torch.tensor(p).logit(), torch.tensor(0.0)) for p in background)
by_hand = by_hand + quality_loss(torch.tensor(0.6).logit(), torch.tensor(1.0))
assert torch.allclose(whole, by_hand, atol=1e-5)
assert abs(whole - without - 0.247398) < 1e-5
whole.item(), without.item()

# %% [markdown]
# A teacher's score of .9 lowers the target of the positive from 1 to .9; without any object the loss is that
# of the background, and still connected to the graph:

# %%
lowered = suppressor_loss(toy, sure)['loss_mds']
nothing = suppressor_loss(toy, [dict(labels=torch.zeros(0), boxes=torch.zeros(0, 4))])['loss_mds']
nothing.backward()
change = quality_loss(torch.tensor([0.6, 0.6]).logit(), torch.tensor([0.9, 1.0])).diff().item()
assert abs((whole - lowered).item() - change) < 1e-5 and (new_logits.grad > 0).all()
lowered.item(), nothing.item()


# %% [markdown]
# ## Suppression as the teacher
#
# Twenty labelled images hold few pairs of duplicates and fewer pairs of neighbours. But which of its queries
# are duplicates the detector can be told on *any* image, without a label: per-class suppression of its own
# one-to-many output says so. Let $p_{ic}$ be the one-to-many probabilities and $k_{ic}=1$ for those that
# suppression keeps. The new probabilities $\tilde p_{ic}$ learn to keep the score of these and to lower the rest,
#
# $$
# L_{nms} = \frac{w_{mds}}{N} \sum_{i,c} p_{ic}\,\mathrm{BCE}(\tilde p_{ic},\, k_{ic}\,p_{ic}),
# \qquad N = \sum_{i,c} k_{ic}\,p_{ic} ,
# $$ {#eq-rescoring-nms}
#
# each entry with the weight that it has in a precision-recall curve: its score. Suppression is needed in
# training alone. At test time one pass through the layer replaces it, and labelled images can correct it where
# true neighbours overlap (`criterion.mds_target='both'`).

# %%
#| export
def kept_by_nms(
    logits: Tensor,  # (B,Q,C)
    boxes: Tensor,  # (B,Q,4) cxcywh
    iou: float = 0.6,  # above it, the less sure of two boxes of a class is removed
    min_score: float = 0.01,  # entries below are not kept
) -> Tensor:  # (B,Q,C) bool
    "Entries of query and class that per-class suppression keeps"
    scores = at_least_float32(logits.detach()).sigmoid()
    corners, kept = (
        cxcywh_to_xyxy(at_least_float32(boxes.detach())),
        torch.zeros_like(scores, dtype=torch.bool),
    )
    for image, of_image in enumerate(scores):
        query, label = (of_image > min_score).nonzero(as_tuple=True)
        keep = batched_nms(corners[image, query], of_image[query, label], label, iou)
        kept[image, query[keep], label[keep]] = True
    return kept


def suppression_loss(
    outputs: dict,  # of a detector, with `suppressed`
    cfg: CriterionConfig = CriterionConfig(),  # w_mds
    kept: Tensor = None,  # (B,Q,C) bool; None: those of `kept_by_nms`
) -> dict:  # loss_mds: scalar
    "The new scores learn what suppression does to the old ones, without labels (@eq-rescoring-nms)"
    if kept is None:
        kept = kept_by_nms(outputs['pred_logits'], outputs['pred_boxes'])
    new = outputs['suppressed']
    index = new['index'][..., None].expand(-1, -1, kept.shape[-1])
    score = at_least_float32(outputs['pred_logits'].detach()).sigmoid().gather(1, index)
    target = score * kept.gather(1, index)
    logits = at_least_float32(new['pred_logits'])
    losses = score * F.binary_cross_entropy_with_logits(logits, target, reduction='none')
    return dict(loss_mds=cfg.w_mds * losses.sum() / normaliser(target.sum(), cfg.normalise))


# %%
both = dict(toy, pred_logits=new_logits, pred_boxes=three_queries)
kept = kept_by_nms(new_logits, three_queries)
assert kept[0].tolist() == [[True, True], [False, False], [True, True]]
distilled = suppression_loss(both)['loss_mds']
p, k = new_logits.sigmoid().detach(), kept.float()
entries = p * -(p * k * p.log() + (1 - p * k) * (1 - p).log())
assert torch.allclose(distilled, entries.sum() / (p * k).sum(), atol=1e-5)
kept[0], distilled.item()

# %%
#| label: fig-rescoring-loss
#| fig-cap: "The loss of a matched query has its minimum at the quality of its box and the larger weight the better the box; that of the background grows steeply with the score, so sure duplicates dominate it."
#| fig-alt: "Loss against score: three curves for qualities .3, .6 and .9 with minima there, and a rising one for background"
scores_axis = torch.linspace(0.01, 0.99, 99)
fig, ax = plt.subplots(figsize=(5, 2.8), dpi=80, layout='constrained')
for quality, shade in ((0.3, '#9ecae1'), (0.6, '#4292c6'), (0.9, '#08519c')):
    curve = quality_loss(scores_axis.logit(), torch.full((99,), quality))
    assert abs(scores_axis[curve.argmin()] - quality) < 0.011
    ax.plot(scores_axis, curve, color=shade, label=f'matched, quality {quality}')
ax.plot(scores_axis, quality_loss(scores_axis.logit(), torch.zeros(99)), color='black', label='background')
ax.set(xlabel='score', ylabel='loss', ylim=(0, 2))
ax.legend(fontsize=9)
plt.show()

# %% [markdown]
# ## Summary
#
# - The suppressor has one loss, on its class logits: varifocal, towards the IoU of a Hungarian match.
# - With the teacher's boxes, sure ones are targets, weighted by their score; near doubtful ones nothing is
#   background of their class.
# - Without any label, it learns what suppression would remove (@eq-rescoring-nms).
# - By default only labelled images train it, by matching (`method.mds_unsup='none'`).
#
# ## Exercises
#
# 1. Why is the box of a query detached here, though the loss depends on it through $u$?
# 2. A teacher's box of score .3 is a duplicate of a sure one. What does the suppressor learn there?
