# %% [markdown]
# # Other ways to share the queries {#sec-assigners}
#
# > Replace the one-to-many assignment by Max-IoU, ATSS or SimOTA, and see what becomes of each when the boxes
# > are wrong.
#
# Several queries an object is an old idea: before transformers every detector did it. Max-IoU takes what
# overlaps the object by one half, ATSS what overlaps it more than its neighbourhood does, SimOTA as many as
# the overlaps suggest. All of them were made for boxes drawn by people. A pseudo box is off by a tenth of its
# width, sometimes by a third, and an assignment that trusts it will call good queries background. This
# chapter puts the alternatives behind the signature of @sec-matching, so that one word of the configuration
# swaps them, and measures what a wrong box does to each.

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
    _blame,
    _of_class,
    aligned_metric,
    pairwise_overlap,
    soft_targets,
)

# %%
import matplotlib.pyplot as plt
from semidetr.boxes import denormalize_boxes
from semidetr.draw import curve, draw_boxes, draw_matches
from semidetr.matching.matching import assign_o2m, assign_o2o, pad_targets


# %% [markdown]
# ## What they share
#
# With the IoU $u_{ji}$ of query $j$ and object $i$, an assignment is a set of wanted pairs. Three rules are
# common to all, so that only the choice of the pairs is compared:
#
# * a query that does not overlap an object at all is never its positive;
# * a query wanted by several objects goes to the one it overlaps most (SimOTA: for which it is cheapest), on
#   a tie to the first;
# * positives learn the soft targets of @eq-matching-soft. That metric falls with the sixth power of the
#   overlap, so a positive with a poor overlap weighs little even where the rule lets it in.
#
# Everything runs detached, for all layers and images at once.

# %%
#| export
def _metric(logits, boxes, padded, labels, alpha, beta):
    "Labels to match with, metric and IoU (L,B,Q,N) of all pairs; unused places have neither"
    labels = (padded.labels if labels is None else labels).expand(logits.shape[0], -1, -1)
    m, iou = aligned_metric(logits, boxes, labels, padded.boxes, alpha, beta)
    if not m.isfinite().all():
        _blame(dict(score=_of_class(logits.float(), labels).sigmoid(), iou=iou), padded.ids)
    return labels, m * padded.valid[:, None], iou * padded.valid[:, None]


def _one_owner(keep, score):
    "Leave each query to the object with the highest score among those that want it; ties: the first"
    if not keep.numel():
        return keep
    owner = torch.where(keep, score, -torch.inf).argmax(-1, keepdim=True)
    return keep & (owner == torch.arange(keep.shape[-1], device=keep.device))


def _matches(positive, m, iou):
    "Pairs and soft targets of (L,B,Q,N) positives"
    index = positive.nonzero(as_tuple=True)
    return Matches(*index, soft_targets(m, iou, positive)[index])


# %% [markdown]
# The scene for this chapter: sixty queries scattered around three objects of one class. The better a query
# overlaps its object, the surer it is, with noise.

# %%
def scene(images=1, queries=60, spread=0.2, seed=3):  # -> logits (1,B,Q,1), boxes (1,B,Q,4), targets
    g = torch.Generator().manual_seed(seed)
    place = torch.tensor([[0.27, 0.3], [0.73, 0.3], [0.5, 0.72]]) + 0.05 * torch.randn(
        images, 3, 2, generator=g
    )
    gt = torch.cat([place, torch.rand(images, 3, 2, generator=g) * 0.2 + 0.2], -1)
    boxes = gt[:, torch.arange(queries) % 3]
    boxes = (boxes + spread * torch.randn(boxes.shape, generator=g) * boxes[..., [2, 3, 2, 3]]).clamp(
        0.02, 0.98
    )
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
# The second set sees to it that an object is not forgotten while the network is still poor.

# %%
#| export
def assign_max_iou(
    logits: Tensor,  # (L,B,Q,C); read by the soft targets alone
    boxes: Tensor,  # (L,B,Q,4) cxcywh normalised
    padded: PaddedTargets,  # of the B images
    labels: Tensor | None = None,  # (L,B,N) labels to match with; None = those of `padded`
    threshold: float = 0.5,  # least IoU of a positive
    alpha: float = 1.0,
    beta: float = 6.0,  # powers of the metric behind the soft targets
) -> Matches:
    "Positives overlap the object by `threshold`; the query that overlaps it most is one in any case"
    _, m, iou = _metric(logits, boxes, padded, labels, alpha, beta)
    if not iou.numel():
        return _matches(iou > 0, m, iou)
    best = torch.zeros_like(iou, dtype=torch.bool).scatter(-2, iou.argmax(-2, keepdim=True), True)
    return _matches(_one_owner(((iou >= threshold) | best) & (iou > 0), iou), m, iou)


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
# *Adaptive training sample selection* sets the bar for each object from its neighbourhood. Let $K_i$ be the
# $k=9$ queries whose centres are nearest to that of the object, and $m_i$, $s_i$ the mean and (unbiased)
# standard deviation of their overlaps:
#
# $$
# P_i = \{j\in K_i:\; u_{ji}\ge m_i+s_i,\ \text{centre of } j \text{ inside object } i\}
# $$ {#eq-assigners-atss}
#
# It was designed for anchors on a grid, of which most are poor. The queries of a transformer come to the
# object by themselves; nine good neighbours are then much alike, and only one or two stand out.

# %%
#| export
def assign_atss(
    logits: Tensor,  # (L,B,Q,C); read by the soft targets alone
    boxes: Tensor,  # (L,B,Q,4) cxcywh normalised
    padded: PaddedTargets,  # of the B images
    labels: Tensor | None = None,  # (L,B,N) labels to match with; None = those of `padded`
    k: int = 9,  # candidates of an object
    alpha: float = 1.0,
    beta: float = 6.0,  # powers of the metric behind the soft targets
) -> Matches:
    "Of the k queries nearest to the object's centre, those inside it that overlap it by mean + standard deviation of the k"
    _, m, iou = _metric(logits, boxes, padded, labels, alpha, beta)
    if not iou.numel():
        return _matches(iou > 0, m, iou)
    apart = boxes.detach()[..., :, None, :2] - padded.boxes[:, None, :, :2]  # (L,B,Q,N,2)
    near = apart.square().sum(-1).topk(min(k, iou.shape[-2]), dim=-2, largest=False).indices
    u = iou.gather(-2, near)  # (L,B,k,N)
    least = u.mean(-2) + (u.std(-2) if u.shape[-2] > 1 else 0)
    inside = (apart.abs() < padded.boxes[:, None, :, 2:] / 2).all(-1)
    near = torch.zeros_like(inside).scatter(-2, near, True)
    return _matches(_one_owner(near & inside & (iou > 0) & (iou >= least[..., None, :]), iou), m, iou)


# %%
few = assign_atss(logits, boxes, objects)
assert 0 < len(few) <= 9 * 3 and len(few) < len(found)
torch.bincount(few.target, minlength=3), overlap[few.query, few.target]


# %% [markdown]
# ## SimOTA
#
# SimOTA (YOLOX's shortcut to optimal transport) lets the predictions decide both how many and which. The
# number of positives is the sum of the best $k=10$ overlaps, rounded down; they are the overlapping queries
# with the lowest cost,
#
# $$
# n_i = \max\left(1,\;\left\lfloor\sum_{10\ \text{best}} u_{ji}\right\rfloor\right),\qquad
# c_{ji} = \sum_{c}\mathrm{BCE}(p_{jc},\mathbb{1}[c=c_i]) - 3\ln u_{ji}.
# $$ {#eq-assigners-simota}
#
# From raw scores the class term is $\sum_c\ln(1+e^{z_{jc}})-z_{j,c_i}$. The original asks in addition that
# the centre of a cell lies near the object; queries have no cells.

# %%
#| export
def assign_simota(
    logits: Tensor,  # (L,B,Q,C)
    boxes: Tensor,  # (L,B,Q,4) cxcywh normalised
    padded: PaddedTargets,  # of the B images
    labels: Tensor | None = None,  # (L,B,N) labels to match with; None = those of `padded`
    k: int = 10,  # overlaps that are summed to the number of positives
    w_iou: float = 3.0,  # weight of the overlap in the cost
    alpha: float = 1.0,
    beta: float = 6.0,  # powers of the metric behind the soft targets
) -> Matches:
    "As many of the cheapest overlapping queries as the best k overlaps sum to, at least one (@eq-assigners-simota)"
    labels, m, iou = _metric(logits, boxes, padded, labels, alpha, beta)
    if not iou.numel():
        return _matches(iou > 0, m, iou)
    z = logits.detach().to(iou.dtype)
    cost = F.softplus(z).sum(-1, keepdim=True) - _of_class(z, labels) - w_iou * iou.clamp(min=1e-12).log()
    cost = cost.masked_fill(iou <= 0, torch.inf)
    k = min(k, iou.shape[-2])
    number = iou.topk(k, dim=-2).values.sum(-2, keepdim=True).int().clamp(min=1)  # (L,B,1,N)
    cheapest = cost.topk(k, dim=-2, largest=False)  # in ascending order
    wanted = (torch.arange(k, device=iou.device)[:, None] < number) & cheapest.values.isfinite()
    return _matches(
        _one_owner(
            torch.zeros_like(wanted[..., :1, :]).expand_as(iou).scatter(-2, cheapest.indices, wanted), -cost
        ),
        m,
        iou,
    )


# %%
#| export
ASSIGNERS = dict(
    max_iou=assign_max_iou, atss=assign_atss, simota=assign_simota
)  # name in the configuration -> function

# %%
some = assign_simota(logits, boxes, objects)
expected = overlap.topk(10, dim=0).values.sum(0).int()
assert (
    torch.bincount(some.target, minlength=3) <= expected
).all()  # less where two objects wanted the same query
torch.bincount(some.target, minlength=3), expected

# %%
#| label: fig-assigners-scene
#| fig-cap: "The same sixty queries, shared in five ways. Task-aligned and Max-IoU give each object a crowd, SimOTA a handful, ATSS two, one or none, the Hungarian method exactly one."
#| fig-alt: "Six panels with three green boxes each: all queries, then lines from the objects to their queries: many for task-aligned and Max-IoU, six for SimOTA, two, one and none for ATSS, one for Hungarian."
ways = dict(
    Hungarian=assign_o2o,
    **{'task-aligned': assign_o2m, 'Max-IoU': assign_max_iou, 'ATSS': assign_atss, 'SimOTA': assign_simota},
)
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
# ## When the boxes are wrong
#
# Now the objects are pseudo boxes: the true ones, each coordinate off by normal noise of a given share of the
# width or height. The queries stay where they are. First, the number of positives of an object.

# %%
#| export
def jitter_targets(
    targets: list,  # dicts with `boxes` (n,4) cxcywh
    by: float,  # standard deviation of each coordinate, in widths and heights
    seed: int = 1,
) -> list:  # the same with boxes that are off
    "Pseudo boxes as a teacher of a known accuracy would give them"
    g = torch.Generator().manual_seed(seed)
    return [
        dict(
            t,
            boxes=t['boxes'] + by * torch.randn(t['boxes'].shape, generator=g) * t['boxes'][:, [2, 3, 2, 3]],
        )
        for t in targets
    ]


# %%
world = scene(images=100)  # 300 objects
amounts = [0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3]
answers = {
    name: [way(*world[:2], pad_targets(jitter_targets(world[2], by))) for by in amounts]
    for name, way in ways.items()
}
number = {
    name: torch.stack(
        [
            torch.zeros(100, 3).index_put((m.image, m.target), torch.ones(len(m)), accumulate=True).flatten()
            for m in rows
        ],
        1,
    )
    for name, rows in answers.items()
}  # (300 objects, 7 amounts)
kept = {
    name: (float(n[:, 4].mean() / n[:, 0].mean()), float(n[:, 4].std() / n[:, 4].mean()))
    for name, n in number.items()
}
assert (
    kept['task-aligned'][0] > 0.95
    and kept['Max-IoU'][0] < 0.6
    and kept['Max-IoU'][1] > 4 * kept['task-aligned'][1]
)
kept  # at .2: the mean relative to that for true boxes, and the spread over objects relative to the mean

# %%
#| label: fig-assigners-number
#| fig-cap: "Positives of an object (mean and deviation over 300 objects) as its box gets worse. Ranking always finds thirteen; Max-IoU loses half of them and treats objects ever more unequally; SimOTA loses some; ATSS never had many."
#| fig-alt: "Number of positives against jitter: a flat line at thirteen for task-aligned, a falling line with a wide band for Max-IoU, a slowly falling one for SimOTA, flat lines near one for ATSS and Hungarian."
colors = dict(zip(ways, ('#7f7f7f', '#1f77b4', '#d62728', '#9467bd', '#8c564b')))
fig, ax = plt.subplots(figsize=(5.4, 3), dpi=80, layout='constrained')
for name, n in number.items():
    curve(ax, amounts, n, name, color=colors[name])
ax.set(xlabel='jitter of the pseudo boxes (share of the side)', ylabel='positives of an object', ylim=(0, 18))
ax.legend(fontsize=7, ncol=3, loc='upper center')
plt.show()


# %% [markdown]
# Then, which queries they are. A query that fits the *true* object better than all positives of the object,
# and is told to be background, has been misplaced: the network is punished for being right. `lost` counts the
# objects to which this happens. It asks a one-to-many assignment only whether its best positive is good, so
# there is a second number, `weight`: the share of the positive weight (soft targets) that lies on queries
# worse than some background. For one-to-one matching both are the same.

# %%
#| export
@torch.no_grad()
def misplaced_background(
    m: Matches,  # made with boxes that may be wrong
    boxes: Tensor,  # (L,B,Q,4) the predictions that were matched
    truth: PaddedTargets,  # true boxes: object i of an image is the one that its box i was meant for
) -> dict:  # floats: lost, weight (nan without any positive), objects with positives (int)
    "How often a query that fits the true object better than the positives is told to be background"
    u = pairwise_overlap(boxes.detach(), truth.boxes)[0]
    place = torch.zeros_like(u).index_put((m.layer, m.image, m.query, m.target), m.weight.to(u.dtype))
    positive = torch.zeros_like(u, dtype=torch.bool).index_put(
        (m.layer, m.image, m.query, m.target), torch.ones_like(m.layer, dtype=torch.bool)
    )
    if not u.numel():
        return dict(lost=float('nan'), weight=float('nan'), objects=0)
    best = u.masked_fill(positive.any(-1, keepdim=True), -1).amax(
        -2, keepdim=True
    )  # (L,B,1,N) of the background
    has = positive.any(-2)
    lost = (best > u.masked_fill(~positive, -1).amax(-2, keepdim=True)).squeeze(-2)[has]
    share = ((place * (best > u)).sum(-2) / place.sum(-2).clamp(min=1e-12))[has]
    return dict(lost=float(lost.double().mean()), weight=float(share.double().mean()), objects=len(lost))


# %%
truth = pad_targets(world[2])
rates = {name: [misplaced_background(m, world[1], truth) for m in rows] for name, rows in answers.items()}
lost, weight = ({name: [r[key] for r in rows] for name, rows in rates.items()} for key in ('lost', 'weight'))
assert (
    all(lost['task-aligned'][i] <= min(lost[n][i] for n in ways) for i in range(len(amounts)))
    and lost['Hungarian'] == weight['Hungarian']
)
assert lost['Hungarian'][4] > 0.5 > weight['task-aligned'][4] and lost['ATSS'][4] > lost['Hungarian'][4]
{name: (round(lost[name][4], 2), round(weight[name][4], 2)) for name in ways}  # at a jitter of .2

# %%
#| label: fig-assigners-misplaced
#| fig-cap: "How often the best query for the true object is called background. From a jitter of .1 on, one-to-one matching and ATSS throw it away for most objects, task-aligned ranking almost never (left); by weight it loses the least of all as well (right)."
#| fig-alt: "Two panels of rates against jitter. Left: Hungarian from one half to .7, ATSS from zero to .9, Max-IoU to .7, SimOTA to .5, task-aligned near zero. Right: the same order, task-aligned rising to one half."
fig, axes = plt.subplots(1, 2, figsize=(6, 3), dpi=80, layout='constrained', sharey=True)
for ax, rows, title in zip(axes, (lost, weight), ('objects', 'positive weight')):
    for name in ways:
        ax.plot(amounts, rows[name], color=colors[name], label=name)
    ax.set(xlabel='jitter of the pseudo boxes', title=title, ylim=(0, 1))
axes[0].set_ylabel('misplaced')
fig.legend(*axes[0].get_legend_handles_labels(), fontsize=7, ncol=5, loc='outside lower center')
plt.show()

# %% [markdown]
# This is the motive for the first stage of Semi-DETR. With a single positive a wrong box is a wrong target
# and nothing softens it. Even with true boxes one-to-one matching passes over the query that overlaps best in
# about half of the cases, because its cost listens to the scores as well; there it does little harm, as the
# chosen one fits nearly as well. What a threshold on the overlap gives away with a bad box is a matter of
# luck. A ranking takes the same number of queries wherever the box is.
#
# How much of it is the ranking, and how much that there are thirteen? With five, about what SimOTA takes, the
# same metric is no better than SimOTA:

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
# So it is the *number* that protects the good queries: many positives, and as many for a bad box as for a
# good one, graded by soft targets so that the many do little harm. The metric decides which of them lead.
# Where queries are few (@sec-matching), $k$ has to be small, and with it goes a part of the protection.
#
# The numbers are those of a toy: queries scattered evenly around the truth, boxes with independent errors. On
# images with hidden truth `misplaced_background` measures the same for a trained detector.
#
# ::: {.callout-note}
# ## Paper vs. code
# The paper compares its ranking with Max-IoU, ATSS and SimOTA. The published code holds the ranking alone, so
# the details of the other three here are this project's: their published rules, with the three common rules
# above, on the boxes that the layer predicts.
# :::
#
# ## Summary
#
# * `CriterionConfig.o2m` names the one-to-many assignment of the first stage: `task_aligned`, `max_iou`,
#   `atss` or `simota`.
# * All share conflict rule, soft targets and signature; only the wanted pairs differ.
# * With wrong boxes, a rule with a threshold on the overlap changes the number of positives, a ranking does
#   not; a large constant number is what keeps good queries among the positives.
# * `misplaced_background` measures how often a query that is right is told to be background: most often with
#   a single positive or a high bar, least often with thirteen ranked ones.
# * What each rule does to a training: @sec-abl-assigners.
#
# ## Exercises
#
# 1. Give `assign_max_iou` a threshold of .3. Which of the two pictures changes more?
# 2. Let SimOTA sum the best 30 overlaps instead of 10. What happens to the number of positives and to `lost`?
# 3. Why does ATSS sometimes leave an object without any positive, and what would you add?
# 4. Add a third object on top of another one: who gets the queries under each rule?
