# %% [markdown]
# # Other one-to-many assignments {#sec-assigners}
#
# > Replace the one-to-many assignment by Max-IoU, ATSS or SimOTA, and compare them on imprecise boxes.
#
# Dense detectors have always assigned several predictions to an object. Max-IoU takes the predictions that
# overlap the object by at least one half, ATSS those that overlap it more than nearby predictions do on average,
# SimOTA a number of them that follows from the overlaps. All three were designed for annotated boxes. A
# pseudo box is off by a tenth of its width, sometimes by a third, and an assignment that relies on it labels
# good queries as background. This chapter implements the three with the signature of `assign_o2m`
# (@sec-matching), so that they can be exchanged for it, and measures the effect of inaccurate boxes on each.
# Semi-DETR uses none of them.

# %%
#| default_exp matching.assigners

# %%
#| export
import torch
import torch.nn.functional as F
from torch import Tensor
from semidetr.matching.matching import (
    Matches,
    PaddedTargets,
    aligned_metric,
    label_logits,
    pairwise_overlap,
    raise_non_finite,
    soft_targets,
)

# %%
import matplotlib.pyplot as plt
from semidetr.boxes import denormalize_boxes
from semidetr.draw import curve, draw_boxes, draw_matches
from semidetr.matching.matching import assign_o2m, assign_o2o, pad_targets


# %% [markdown]
# ## Common rules
#
# Let $u_{ji}$ be the IoU of query $j$ with object $i$. Each rule below selects candidate pairs. Three rules
# are common to all, so that only the selection of candidates is compared:
#
# * a query with IoU 0 is never a positive of the object;
# * a query that is a candidate of several objects goes to the one with the largest IoU (SimOTA: with the
#   lowest cost), in case of a tie to the first;
# * positives learn the soft targets of @eq-matching-soft. The metric falls with the sixth power of the IoU,
#   so positives with a low IoU have little weight.
#
# Matching is detached and computed for all layers and images at once.

# %%
#| export
def _metric(logits, boxes, padded, labels, alpha, beta):
    "Labels to match with, metric and IoU (L,B,Q,N) of all pairs; both are 0 in padding"
    labels = (padded.labels if labels is None else labels).expand(logits.shape[0], -1, -1)
    m, iou = aligned_metric(logits, boxes, labels, padded.boxes, alpha, beta)
    if not m.isfinite().all():
        raise_non_finite(dict(score=label_logits(logits.float(), labels).sigmoid(), iou=iou), padded.ids)
    return labels, m * padded.valid[:, None], iou * padded.valid[:, None]


def _one_owner(keep, score):
    "Keep of each query only the candidate pair with the highest score; ties: the first object"
    if not keep.numel():
        return keep
    owner = torch.where(keep, score, -torch.inf).argmax(-1, keepdim=True)
    return keep & (owner == torch.arange(keep.shape[-1], device=keep.device))


def _matches(positive, m, iou):
    "Pairs and soft targets of (L,B,Q,N) positives"
    index = positive.nonzero(as_tuple=True)
    return Matches(*index, soft_targets(m, iou, positive)[index])


# %% [markdown]
# The example of this chapter: sixty queries scattered around three objects of one class. The score of a query
# rises with its IoU, plus noise.

# %%
def scene(images=1, queries=60, spread=0.2, seed=3):
    "logits (1,B,Q,1), boxes (1,B,Q,4), targets"
    g = torch.Generator().manual_seed(seed)
    places = torch.tensor([[0.27, 0.3], [0.73, 0.3], [0.5, 0.72]])
    centres = places + 0.05 * torch.randn(images, 3, 2, generator=g)
    gt = torch.cat([centres, torch.rand(images, 3, 2, generator=g) * 0.2 + 0.2], -1)
    boxes = gt[:, torch.arange(queries) % 3]
    boxes = boxes + spread * torch.randn(boxes.shape, generator=g) * boxes[..., [2, 3, 2, 3]]
    boxes = boxes.clamp(0.02, 0.98)
    fit = pairwise_overlap(boxes, gt)[0].amax(-1)
    logits = (6 * fit - 4 + torch.randn(fit.shape, generator=g))[..., None]
    return logits[None], boxes[None], [dict(labels=torch.zeros(3, dtype=torch.long), boxes=b) for b in gt]


logits, boxes, targets = scene()
objects = pad_targets(targets)
logits.shape, boxes.shape, objects.counts


# %% [markdown]
# ## Max-IoU
#
# $$
# P_i = \{j:\; u_{ji}\ge\tfrac12\}\;\cup\;\{\operatorname{arg\,max}_j u_{ji}\}
# $$ {#eq-assigners-max-iou}
#
# The second set gives every object that is overlapped at all a positive, also early in training.

# %%
#| export
def assign_max_iou(
    logits: Tensor,  # (L,B,Q,C) raw class scores; only the soft targets use them
    boxes: Tensor,  # (L,B,Q,4) cxcywh normalised
    padded: PaddedTargets,  # of the B images
    labels: Tensor | None = None,  # (L,B,N) labels to match with; None = those of `padded`
    threshold: float = 0.5,  # minimum IoU of a positive
    alpha: float = 1.0,  # power of the score in the soft targets
    beta: float = 6.0,  # power of the IoU in the soft targets
) -> Matches:
    "Queries with an IoU of at least `threshold`, and the one with the largest IoU (@eq-assigners-max-iou)"
    _, m, iou = _metric(logits, boxes, padded, labels, alpha, beta)
    if not iou.numel():
        return _matches(iou > 0, m, iou)
    best = torch.zeros_like(iou, dtype=torch.bool).scatter(-2, iou.argmax(-2, keepdim=True), True)
    wanted = ((iou >= threshold) | best) & (iou > 0)
    return _matches(_one_owner(wanted, iou), m, iou)


# %%
overlap = pairwise_overlap(boxes, objects.boxes)[0][0, 0]  # (60,3)
found = assign_max_iou(logits, boxes, objects)
assert (overlap[found.query, found.target] >= 0.5).all() and len(found) == (overlap >= 0.5).any(1).sum()
lonely = assign_max_iou(logits[:, :, :1], boxes[:, :, :1], objects)  # one query is left
assert len(lonely) == 1
len(found), torch.bincount(found.target), overlap[0, lonely.target]


# %% [markdown]
# ## ATSS
#
# *Adaptive training sample selection* derives a threshold for each object from its neighbourhood. Let $K_i$ be
# the $k=9$ queries whose centres are nearest to that of the object, and $m_i$, $s_i$ the mean and (unbiased)
# standard deviation of their IoUs:
#
# $$
# P_i = \{j\in K_i:\; u_{ji}\ge m_i+s_i,\ \text{centre of } j \text{ inside object } i\}
# $$ {#eq-assigners-atss}
#
# It was designed for anchors on a grid, most of which overlap the object poorly. The queries of a transformer
# move to the object; nine near queries then have similar IoUs, and only one or two exceed the threshold.

# %%
#| export
def assign_atss(
    logits: Tensor,  # (L,B,Q,C) raw class scores; only the soft targets use them
    boxes: Tensor,  # (L,B,Q,4) cxcywh normalised
    padded: PaddedTargets,  # of the B images
    labels: Tensor | None = None,  # (L,B,N) labels to match with; None = those of `padded`
    k: int = 9,  # candidates per object
    alpha: float = 1.0,  # power of the score in the soft targets
    beta: float = 6.0,  # power of the IoU in the soft targets
) -> Matches:
    "Of the k nearest queries, those with an IoU of at least their mean + deviation (@eq-assigners-atss)"
    _, m, iou = _metric(logits, boxes, padded, labels, alpha, beta)
    if not iou.numel():
        return _matches(iou > 0, m, iou)
    apart = boxes.detach()[..., :, None, :2] - padded.boxes[:, None, :, :2]  # (L,B,Q,N,2)
    near = apart.square().sum(-1).topk(min(k, iou.shape[-2]), dim=-2, largest=False).indices
    u = iou.gather(-2, near)  # (L,B,k,N)
    min_iou = u.mean(-2) + (u.std(-2) if u.shape[-2] > 1 else 0)
    inside = (apart.abs() < padded.boxes[:, None, :, 2:] / 2).all(-1)
    near = torch.zeros_like(inside).scatter(-2, near, True)
    wanted = near & inside & (iou > 0) & (iou >= min_iou[..., None, :])
    return _matches(_one_owner(wanted, iou), m, iou)


# %%
few = assign_atss(logits, boxes, objects)
assert 0 < len(few) <= 9 * 3 and len(few) < len(found)
torch.bincount(few.target, minlength=3), overlap[few.query, few.target]


# %% [markdown]
# ## SimOTA
#
# SimOTA (the approximation of optimal transport in YOLOX) derives both the number of positives and the
# positives themselves from the predictions. The number is the sum of the $k=10$ largest IoUs, rounded down;
# the positives are the overlapping queries with the lowest cost,
#
# $$
# n_i = \max\left(1,\;\left\lfloor\sum_{10\ \text{largest}} u_{ji}\right\rfloor\right),\qquad
# c_{ji} = \sum_{c}\mathrm{BCE}(p_{jc},\mathbb{1}[c=c_i]) - 3\ln u_{ji}.
# $$ {#eq-assigners-simota}
#
# In terms of logits the class term is $\sum_c\ln(1+e^{z_{jc}})-z_{j,c_i}$. The original also requires that
# the centre of the cell lies near the object; queries have no cells.

# %%
#| export
def assign_simota(
    logits: Tensor,  # (L,B,Q,C) raw class scores
    boxes: Tensor,  # (L,B,Q,4) cxcywh normalised
    padded: PaddedTargets,  # of the B images
    labels: Tensor | None = None,  # (L,B,N) labels to match with; None = those of `padded`
    k: int = 10,  # IoUs that are summed to the number of positives
    w_iou: float = 3.0,  # weight of the IoU in the cost
    alpha: float = 1.0,  # power of the score in the soft targets
    beta: float = 6.0,  # power of the IoU in the soft targets
) -> Matches:
    "The cheapest queries, as many as the k largest IoUs sum to, at least one (@eq-assigners-simota)"
    labels, m, iou = _metric(logits, boxes, padded, labels, alpha, beta)
    if not iou.numel():
        return _matches(iou > 0, m, iou)
    z = logits.detach().to(iou.dtype)
    cost = F.softplus(z).sum(-1, keepdim=True) - label_logits(z, labels) - w_iou * iou.clamp(min=1e-12).log()
    cost = cost.masked_fill(iou <= 0, torch.inf)
    k = min(k, iou.shape[-2])
    number = iou.topk(k, dim=-2).values.sum(-2, keepdim=True).int().clamp(min=1)  # (L,B,1,N)
    cheapest = cost.topk(k, dim=-2, largest=False)  # in ascending order
    wanted = (torch.arange(k, device=iou.device)[:, None] < number) & cheapest.values.isfinite()
    keep = torch.zeros_like(iou, dtype=torch.bool).scatter(-2, cheapest.indices, wanted)
    return _matches(_one_owner(keep, -cost), m, iou)


# %%
#| export
ASSIGNERS = dict(max_iou=assign_max_iou, atss=assign_atss, simota=assign_simota)  # name in `criterion.o2m`

# %%
some = assign_simota(logits, boxes, objects)
expected = overlap.topk(10, dim=0).values.sum(0).int()
assert (torch.bincount(some.target, minlength=3) <= expected).all()  # fewer where objects share a candidate
torch.bincount(some.target, minlength=3), expected

# %%
#| label: fig-assigners-scene
#| fig-cap: "Five assignments of the same sixty queries. Task-aligned and Max-IoU assignment give each object many positives, SimOTA a few, ATSS two, one or none, the Hungarian method exactly one."
#| fig-alt: "Six panels with three green boxes each: all queries, then lines from the objects to their queries: many for task-aligned and Max-IoU, six for SimOTA, two, one and none for ATSS, one for Hungarian."
ways = {
    'Hungarian': assign_o2o,
    'task-aligned': assign_o2m,
    'Max-IoU': assign_max_iou,
    'ATSS': assign_atss,
    'SimOTA': assign_simota,
}
fig, axes = plt.subplots(2, 3, figsize=(6, 4), dpi=80, layout='constrained')
pixels, truth_px = (denormalize_boxes(x, (100, 100)) for x in (boxes[0, 0], targets[0]['boxes']))
draw_boxes(axes[0, 0], pixels, kind='student', lw=0.4)
draw_boxes(axes[0, 0], truth_px)
for ax, (name, way) in zip(axes.flat[1:], ways.items()):
    pairs = way(logits, boxes, objects)
    draw_matches(
        ax, pixels[pairs.query], truth_px, (range(len(pairs)), pairs.target.tolist()), weights=pairs.weight
    )
    ax.set_title(f'{name}: {len(pairs)}', fontsize=9)
axes[0, 0].set_title('all queries', fontsize=9)
for ax in axes.flat:
    ax.set(xlim=(0, 100), ylim=(100, 0), xticks=[], yticks=[])
plt.show()


# %% [markdown]
# ## Inaccurate boxes
#
# Now the objects are pseudo boxes: true boxes with normal noise on each coordinate, whose standard deviation
# is a given share of the width or height. The queries stay the same. First, the number of positives per
# object.

# %%
#| export
def jitter_targets(
    targets: list,  # dicts with `boxes` (n,4) cxcywh
    by: float,  # standard deviation of each coordinate, in widths and heights
    seed: int = 1,  # of the noise
) -> list:  # the same with noisy boxes
    "Pseudo boxes of a known accuracy: true boxes with normal noise"
    g = torch.Generator().manual_seed(seed)
    out = []
    for t in targets:
        boxes = t['boxes']
        out.append(dict(t, boxes=boxes + by * torch.randn(boxes.shape, generator=g) * boxes[:, [2, 3, 2, 3]]))
    return out


# %%
world = scene(images=100)  # 300 objects
amounts = [0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3]
answers = {
    name: [way(*world[:2], pad_targets(jitter_targets(world[2], by))) for by in amounts]
    for name, way in ways.items()
}


def positives(m):  # (300,) number of positives of each object
    n = torch.zeros(100, 3).index_put((m.image, m.target), torch.ones(len(m)), accumulate=True)
    return n.flatten()


number = {name: torch.stack([positives(m) for m in rows], 1) for name, rows in answers.items()}  # (300,7)
kept = {
    name: (float(n[:, 4].mean() / n[:, 0].mean()), float(n[:, 4].std() / n[:, 4].mean()))
    for name, n in number.items()
}
assert kept['task-aligned'][0] > 0.95 and kept['Max-IoU'][0] < 0.6
assert kept['Max-IoU'][1] > 4 * kept['task-aligned'][1]
kept  # at .2: the mean relative to that for true boxes, and the spread over objects relative to the mean

# %%
#| label: fig-assigners-number
#| fig-cap: "Positives per object (mean and standard deviation over 300 objects) against the noise of the boxes. Task-aligned ranking always finds thirteen; Max-IoU loses half of its positives and spreads them more and more unequally; SimOTA loses some; ATSS has few from the start."
#| fig-alt: "Number of positives against jitter: a flat line at thirteen for task-aligned, a falling line with a wide band for Max-IoU, a slowly falling one for SimOTA, flat lines near one for ATSS and Hungarian."
colors = dict(zip(ways, ('#7f7f7f', '#1f77b4', '#d62728', '#9467bd', '#8c564b')))
fig, ax = plt.subplots(figsize=(5.4, 3.4), dpi=80, layout='constrained')
for name, n in number.items():
    curve(ax, amounts, n, name, color=colors[name])
ax.set(xlabel='jitter of the pseudo boxes (share of the side)', ylabel='positives per object', ylim=(0, 18))
fig.legend(fontsize=9, ncol=3, loc='outside lower center')
plt.show()


# %% [markdown]
# Second, the quality of the positives. A background query that overlaps the *true* object more than every
# positive of the object is misplaced: the loss lowers the score of the best prediction. `lost` is the share
# of objects with such a query. For one-to-many assignments it considers the best positive only, so there is a
# second number, `weight`: the share of the positive weight (soft targets) on queries with a lower IoU than
# some background query. For one-to-one matching both are the same.

# %%
#| export
@torch.no_grad()
def misplaced_background(
    m: Matches,  # made with inaccurate boxes
    boxes: Tensor,  # (L,B,Q,4) the predictions that were matched
    truth: PaddedTargets,  # true boxes, in the order of the inaccurate ones
) -> dict:  # floats: lost, weight (nan without any positive), objects with positives (int)
    "How often a query that overlaps the true object more than the positives is labelled background"
    u = pairwise_overlap(boxes.detach(), truth.boxes)[0]
    if not u.numel():
        return dict(lost=float('nan'), weight=float('nan'), objects=0)
    at = m.layer, m.image, m.query, m.target
    place = torch.zeros_like(u).index_put(at, m.weight.to(u.dtype))
    positive = torch.zeros_like(u, dtype=torch.bool).index_put(at, torch.ones_like(m.layer, dtype=torch.bool))
    background = u.masked_fill(positive.any(-1, keepdim=True), -1)
    best = background.amax(-2, keepdim=True)  # (L,B,1,N)
    has = positive.any(-2)
    lost = (best > u.masked_fill(~positive, -1).amax(-2, keepdim=True)).squeeze(-2)[has]
    share = ((place * (best > u)).sum(-2) / place.sum(-2).clamp(min=1e-12))[has]
    return dict(lost=float(lost.double().mean()), weight=float(share.double().mean()), objects=len(lost))


# %%
truth = pad_targets(world[2])
rates = {name: [misplaced_background(m, world[1], truth) for m in rows] for name, rows in answers.items()}
lost, weight = ({name: [r[key] for r in rows] for name, rows in rates.items()} for key in ('lost', 'weight'))
assert all(lost['task-aligned'][i] <= min(lost[n][i] for n in ways) for i in range(len(amounts)))
assert lost['Hungarian'] == weight['Hungarian']
assert lost['Hungarian'][4] > 0.5 > weight['task-aligned'][4] and lost['ATSS'][4] > lost['Hungarian'][4]
{name: (round(lost[name][4], 2), round(weight[name][4], 2)) for name in ways}  # at a jitter of .2

# %%
#| label: fig-assigners-misplaced
#| fig-cap: "How often the best query for the true object is labelled background. From a jitter of .1 on, one-to-one matching and ATSS do so for most objects, task-aligned ranking almost never (left); by weight it also loses least (right)."
#| fig-alt: "Two panels of rates against jitter. Left: Hungarian from one half to .7, ATSS from zero to .9, Max-IoU to .7, SimOTA to .5, task-aligned near zero. Right: the same order, task-aligned rising to one half."
fig, axes = plt.subplots(1, 2, figsize=(6, 3), dpi=80, layout='constrained', sharey=True)
for ax, rows, title in zip(axes, (lost, weight), ('objects', 'positive weight')):
    for name in ways:
        ax.plot(amounts, rows[name], color=colors[name], label=name)
    ax.set(xlabel='jitter of the pseudo boxes', title=title, ylim=(0, 1))
axes[0].set_ylabel('misplaced')
fig.legend(*axes[0].get_legend_handles_labels(), fontsize=9, ncol=3, loc='outside lower center')
plt.show()

# %% [markdown]
# This motivates the first stage of Semi-DETR. With a single positive, an inaccurate box is an inaccurate target
# and nothing compensates for it. Even with true boxes one-to-one matching misses the query with the largest
# IoU in about half of the cases, because its cost also depends on the scores; there it does little harm, as
# the chosen query fits nearly as well. How many positives a threshold on the IoU leaves depends on the error
# of the box. A ranking selects the same number of queries for every box.
#
# How much of the effect is due to the ranking, and how much to the number of thirteen? With five positives,
# about as many as SimOTA selects, the same metric is no better than SimOTA:

# %%
five = [
    misplaced_background(
        assign_o2m(*world[:2], pad_targets(jitter_targets(world[2], by)), k=5), world[1], truth
    )
    for by in amounts
]
assert abs(five[4]['lost'] - lost['SimOTA'][4]) < 0.1 and five[4]['lost'] > lost['task-aligned'][4] + 0.2
[(round(r['lost'], 2), round(r['weight'], 2)) for r in five]

# %% [markdown]
# So the *number* of positives matters most: many positives, as many for an inaccurate box as for an accurate
# one, weighted by soft targets so that poor ones do little harm. The metric determines which of them have the
# largest weight. Where queries are few (@sec-matching), $k$ has to be small, and part of the effect is lost.
#
# These are numbers of a simulation: queries scattered evenly around the true boxes, and boxes with independent
# errors. On images with hidden annotations, `misplaced_background` measures the same for a trained detector.
#
# ::: {.callout-note}
# ## Paper vs. code
# The paper compares its ranking with Max-IoU, ATSS and SimOTA. The published code contains the ranking only,
# so the details of the other three are this project's: their published rules, with the three common rules
# above, on the boxes that the layer predicts.
# :::
#
# ## Summary
#
# * The setting `criterion.o2m` names the one-to-many assignment of the first stage: `task_aligned`, `max_iou`,
#   `atss` or `simota`. The criterion gets the function as an argument (@sec-variants).
# * All share the conflict rule, the soft targets and the signature; only the candidates differ.
# * With inaccurate boxes, a rule with a threshold on the IoU changes the number of positives, a ranking does
#   not. A large constant number keeps good queries among the positives.
# * `misplaced_background` measures how often a query that overlaps the true object best is labelled
#   background: most often with a single positive or a high threshold, least often with thirteen ranked ones.
# * The effect of each rule on a training: @sec-abl-assigners.
#
# ## Exercises
#
# 1. Give `assign_max_iou` a threshold of .3. Which of the two pictures changes more?
# 2. Let SimOTA sum the 30 largest IoUs instead of 10. What happens to the number of positives and to `lost`?
# 3. Why does ATSS sometimes leave an object without any positive, and what would you add?
# 4. Add a third object on top of another one: which queries are assigned to it under each rule?
