# %% [markdown]
# # Losses {#sec-losses}
#
# > Compute the losses of matched predictions: of decoder layers, encoder output and denoising queries.
#
# Of nine hundred queries, five match an object: nearly every class score of a detection transformer is
# background, and a plain cross-entropy is dominated by scores that are already right. Focal losses weight
# each entry by its error. In the one-to-one stage the target of a query is 0 or 1; in the one-to-many stage
# it is a soft target between them, and the loss must have its minimum there. Boxes are compared by
# coordinates and by overlap. The rest of the chapter is about normalisation: what each sum is divided by, on
# one process and on several.

# %%
#| default_exp matching.losses

# %%
#| export
from dataclasses import dataclass, replace
import torch
import torch.nn.functional as F
from torch import Tensor
from semidetr.boxes import cxcywh_to_xyxy
from semidetr.core import ConfigError, all_reduce_mean, at_least_float32, one_of
from semidetr.detectors.contract import has_no_object, sigmoid_logits
from semidetr.detectors.group import parallel_outputs
from semidetr.many import OVER, normaliser
from semidetr.matching.matching import Matches, PaddedTargets, assign_o2m, assign_o2o, pad_targets

# %%
import dataclasses
import matplotlib.pyplot as plt
from semidetr.matching.matching import one_to_many


# %% [markdown]
# ## Class losses
#
# Let $p=\sigma(z)$ be the predicted probability of a class, and $y$ its target. With hard targets
# $y\in\{0,1\}$ the **focal loss** is
#
# $$
# \mathrm{FL}(p,y) = \alpha_y\,|y-p|^{\gamma}\,\mathrm{BCE}(p,y), \qquad \alpha_1=.25,\;\alpha_0=.75,\;\gamma=2
# $$ {#eq-losses-focal}
#
# where $\mathrm{BCE}(p,y)=-y\ln p-(1-y)\ln(1-p)$. With soft targets $\hat m\in[0,1]$ (@eq-matching-soft) the
# **task-aligned focal loss** keeps the distance as weight and drops the $\alpha$:
#
# $$
# \mathrm{TL}(p,\hat m) = |\hat m-p|^{\gamma}\,\mathrm{BCE}(p,\hat m).
# $$ {#eq-losses-tal}
#
# Both are computed from the logit $z$, so that large logits neither overflow nor give infinite losses.

# %%
#| export
def sigmoid_focal_loss(
    logits: Tensor,  # (...) raw scores z
    target: Tensor,  # (...) y, 0 or 1
    alpha: float = 0.25,  # weight of the positives; the negatives have 1-alpha
    gamma: float = 2.0,  # focusing power
) -> Tensor:  # (...) loss of each entry
    "Focal loss (@eq-losses-focal): entries that are predicted well have little weight"
    p = logits.sigmoid()
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction='none')
    wrong = p + target - 2 * p * target  # 1-p for positives, p for negatives
    return (alpha * target + (1 - alpha) * (1 - target)) * wrong**gamma * bce


def task_aligned_focal(
    logits: Tensor,  # (...) raw scores z
    target: Tensor,  # (...) soft target in [0,1]; 0 = background
    gamma: float = 2.0,  # focusing power
) -> Tensor:  # (...) loss of each entry
    "Focal loss towards a soft target (@eq-losses-tal), weighted by the distance to the target, without alpha"
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction='none')
    return (target - logits.sigmoid()).abs() ** gamma * bce


def varifocal_loss(
    logits: Tensor,  # (...) raw scores z
    target: Tensor,  # (...) soft target in [0,1]; 0 = background
    alpha: float = 0.75,  # weight of the background
    gamma: float = 2.0,  # focusing power of the background
) -> Tensor:  # (...) loss of each entry
    "Cross-entropy of positives weighted by their target, focal loss of background (not part of Semi-DETR)"
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction='none')
    return torch.where(target > 0, target, alpha * logits.sigmoid() ** gamma) * bce


def soft_focal_loss(
    logits: Tensor,  # (...) raw scores z
    target: Tensor,  # (...) soft target in [0,1]; 0 = background
    alpha: float = 0.25,  # weight of the positives; the negatives have 1-alpha
    gamma: float = 2.0,  # focusing power
) -> Tensor:  # (...) loss of each entry
    "Focal loss for soft targets (@eq-losses-soft-focal); for hard ones that of @eq-losses-focal"
    return torch.where(target > 0, alpha, 1 - alpha) * task_aligned_focal(logits, target, gamma)


# %%
p = torch.tensor([[0.3, 0.2], [0.6, 0.1]])  # two queries, two classes
y = torch.tensor([[0.8, 0.0], [0.0, 0.0]])  # query 0: soft target .8 for class 0; query 1: background
entries = task_aligned_focal(p.logit(), y)
assert abs(2 * entries.sum() - 1.196945) < 1e-6
2 * entries.sum(), entries

# %% [markdown]
# The score .6 of a background entry contributes most. The task-aligned loss is smallest where the score
# equals the target; the focal loss of a positive falls until the score is 1:

# %%
#| label: fig-losses-class
#| fig-cap: "The focal loss of a positive falls until its score is 1; the task-aligned loss has its minimum at the soft target, so a poorly placed query learns a low score."
#| fig-alt: "Loss against score from 0 to 1: the focal loss of a positive falls to zero at one; three task-aligned curves reach their minimum at .2, .5 and .8."
scores = torch.linspace(0.01, 0.99, 99)
fig, ax = plt.subplots(figsize=(5, 2.8), dpi=80, layout='constrained')
ax.plot(scores, sigmoid_focal_loss(scores.logit(), torch.ones(99)), color='black', label='focal, object')
for target, shade in ((0.2, '#9ecae1'), (0.5, '#4292c6'), (0.8, '#08519c')):
    line = task_aligned_focal(scores.logit(), torch.full((99,), target))
    assert abs(scores[line.argmin()] - target) < 0.011
    ax.plot(scores, line, color=shade, label=f'task-aligned, target {target}')
ax.set(xlabel='score', ylabel='loss', ylim=(0, 1))
ax.legend(fontsize=9)
plt.show()


# %% [markdown]
# ::: {.callout-note}
# ## Paper vs. code
# `varifocal_loss` is not part of Semi-DETR. It is here because small detectors that are trained for minutes
# profit from scores that reflect the quality of the box. The setting is `criterion.cls_loss`: `focal` (the
# paper, the default), `task_aligned` or `varifocal`; the latter two take the IoU of the matched pair as
# target in the one-to-one stage. `position` is in @sec-position-loss. The one-to-many stage always uses
# @eq-losses-tal.
# :::
#
# ## Box losses
#
# The losses of a matched pair $(b,\hat b)$ are the L1 distance of its four normalised coordinates,
# $\lVert b-\hat b\rVert_1$, and $1-\mathrm{GIoU}(b,\hat b)$. The first measures an error in absolute terms,
# the second relative to the size of the boxes.

# %%
#| export
def box_losses(
    pred: Tensor,  # (P,4) cxcywh normalised
    gt: Tensor,  # (P,4) cxcywh normalised
):  # (L1 (P,), 1-GIoU (P,), IoU (P,) detached)
    "Losses of each matched pair: L1 summed over the four coordinates, and one minus generalised IoU"
    a, b = cxcywh_to_xyxy(pred), cxcywh_to_xyxy(gt)
    inner = (a[:, 2:].minimum(b[:, 2:]) - a[:, :2].maximum(b[:, :2])).clamp(min=0).prod(-1)
    union = (pred[:, 2:].prod(-1) + gt[:, 2:].prod(-1) - inner).clamp(min=1e-12)
    hull = (a[:, 2:].maximum(b[:, 2:]) - a[:, :2].minimum(b[:, :2])).prod(-1).clamp(min=1e-12)
    iou = inner / union
    return (pred - gt).abs().sum(-1), 1 - iou + (hull - union) / hull, iou.detach()


# %%
truth = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.04, 0.04]])
l1, giou, iou = box_losses(truth + torch.tensor([0.02, 0, 0, 0]), truth)  # both shifted by .02
assert torch.allclose(l1, torch.tensor([0.02, 0.02])) and giou[1] > 6 * giou[0]
l1, giou, iou


# %% [markdown]
# The same shift is a twentieth of the width of the large box and half of that of the small one.

# %% [markdown]
# ## Softmax with a no-object class {#sec-softmax}
#
# DETR (@sec-detr) predicts one distribution over $C$ classes and a last one, *no object*. A sigmoid of such a logit
# is no probability. So matching, costs and mining read the logits of equal probabilities,
#
# $$
# z'_c = \log\frac{p_c}{1-p_c}, \qquad c < C, \qquad \sigma(z'_c) = p_c
# $$ {#eq-softmax-logits}
#
# (`sigmoid_logits` of @sec-contract). The class cost of the original code (Carion et al. 2020) is not the focal
# one of @eq-matching-focal but minus the probability, in `pair_cost` the kind `'probability'`:
#
# $$
# \mathcal{C}^{cls}_{ji} = -\,p_{j,c_i}
# $$ {#eq-softmax-cost}
#
# The class loss differs too. Let $y_{jc}\in[0,1]$ be the target of query $j$ for class $c$, at most one of them positive: 1 or, with
# one-to-many assignment, the soft target of @eq-matching-soft. What is left is no object. With the weight
# $\omega$ (the setting `no_object`, .1) of that class
#
# $$
# \mathcal{L}_{cls} = \frac{\sum_j \left[-\sum_{c<C} y_{jc}\log p_{jc} - \omega\left(1-\sum_{c<C} y_{jc}\right)
# \log p_{jC}\right]}{\sum_j \left[\sum_{c<C} y_{jc} + \omega\left(1-\sum_{c<C} y_{jc}\right)\right]}
# $$ {#eq-softmax-loss}
#
# over all queries of the batch. For hard targets it is the weighted cross-entropy of the original code. It is a
# mean over queries and not a sum per object, so its size does not depend on the number of objects. For soft
# targets, as in the first stage of Semi-DETR, it is the cross-entropy to the mixed distribution: the paper has
# no such case, since its detectors have sigmoids.

# %%
#| export
def softmax_losses(
    logits: Tensor,  # (L,B,Q,C+1) raw class scores, the no-object class at the end
    y: Tensor,  # (L,B,Q,C) targets in [0,1], at most one positive per query
    no_object: float = 0.1,  # weight of the no-object class
    background: Tensor | None = None,  # (B,) or (L,B,Q) factor on the losses of queries without a target
) -> tuple:  # (sum (L,) over the queries, sum of their weights (L,))
    "Numerator and denominator of the class loss (@eq-softmax-loss) of each layer"
    log_p, rest = logits.log_softmax(-1), no_object * (1 - y.sum(-1))
    losses = -(y * log_p[..., :-1]).sum(-1) - rest * log_p[..., -1]
    if background is not None:
        factor = background[:, None] if background.ndim == 1 else background
        losses = torch.where(y.sum(-1) > 0, losses, losses * factor)
    return losses.flatten(1).sum(1), (y.sum(-1) + rest).flatten(1).sum(1)


# %%
torch.manual_seed(0)
some_logits, classes = torch.randn(1, 2, 5, 4), torch.tensor([[3, 0, 3, 3, 1], [3, 3, 2, 3, 3]])
some_targets = F.one_hot(classes, 4)[None, ..., :3].float()
total, weight = softmax_losses(some_logits, some_targets)
class_weights = torch.tensor([1.0, 1.0, 1.0, 0.1])
reference = F.cross_entropy(some_logits[0].flatten(0, 1), classes.flatten(), class_weights)
assert abs(total / weight - reference) < 1e-6
(total / weight).item()


# %%
def translate(logits):
    return sigmoid_logits(dict(pred_logits=logits, scores=logits.softmax(-1)[..., :-1]))


three = torch.tensor([[2.0, 0.0, 1.0], [-1.0, 0.5, 3.0], [200.0, 0.0, 0.0]])
translated = translate(three)
assert (
    torch.allclose(translated.sigmoid(), three.softmax(-1)[:, :2], atol=1e-6) and translated.isfinite().all()
)
translated

# %% [markdown]
# With one query on an object and 99 without, the others have $99\cdot.1=9.9$ times its weight; without
# $\omega$ they would have 99 times. The weight of the no-object class decides how soon an untrained detector
# stops to predict "no object" everywhere:

# %%
#| label: fig-softmax-weight
#| fig-cap: "Share of the object in the gradient of the class loss of 100 untrained queries, one of them matched: with a weight of .1 it is ten times as large."
#| fig-alt: "A falling curve over the weight of the no-object class from .01 to 1, with a dot at .1"
weights_axis = torch.logspace(-2, 0, 50)
shares = 1 / (1 + 99 * weights_axis)
assert abs(shares[-1] - 0.01) < 1e-6
fig, ax = plt.subplots(figsize=(4, 2.2), dpi=80, layout='constrained')
ax.semilogx(weights_axis, 100 * shares)
ax.plot([0.1], [100 / 10.9], 'o')
ax.set(xlabel='weight of the no-object class', ylabel='share of the object in %')
plt.show()

# %% [markdown]
# ## Targets that know how sure they are {#sec-soft-targets}
#
# A pseudo label is an object with the probability that the teacher gives it, its score $s$. With
# `criterion.soft_targets` the score multiplies the class target: $y_{jc}=\hat m_j\,s$ with one-to-many
# assignment, $u_j\,s$ in the one-to-one stage with a loss towards the IoU $u_j$, and $s$ with the focal loss,
# which for targets between 0 and 1 becomes
#
# $$
# \mathrm{SFL}(p,y) = \alpha_y\,|y-p|^{\gamma}\,\mathrm{BCE}(p,y), \qquad \alpha_y=.25\text{ for } y>0,\;.75\text{ for } y=0.
# $$ {#eq-losses-soft-focal}
#
# The student is asked for the score of its teacher and not for certainty. Labelled objects have $s=1$.
# Box losses and normalisers stay as they are: the score says whether there is an object, not where. RT-DETR-SSOD
# (PaddleDetection) trains with such targets. Since they are at most as large as the scores that made them,
# scores fall from round to round; labelled images must hold them up.

# %%
soft_entry = torch.tensor([0.6]).logit()
soft_values = [
    varifocal_loss(soft_entry, torch.tensor([0.7 * 0.8])).item(),  # score .7, IoU .8
    soft_focal_loss(soft_entry, torch.tensor([0.7])).item(),
    soft_focal_loss(soft_entry, torch.tensor([1.0])).item(),
]
assert abs(soft_values[0] - 0.385969) < 1e-6
assert abs(soft_values[2] - sigmoid_focal_loss(soft_entry, torch.ones(1)).item()) < 1e-7
soft_values


# %% [markdown]
# ## Targets from the place {#sec-position-loss}
#
# In the one-to-one stage with the focal loss, the matched query learns a score of 1 wherever its box is; in the
# next layer or iteration another query may be the better one and learns 1 as well. The *position-supervised*
# loss of Stable-DINO (S. Liu et al. 2023; `criterion.cls_loss='position'`) lets the place alone decide how high
# the score should be. With the IoU $u_j$ of a matched pair,
#
# $$
# t_j = u_j^2\,\max\left(1,\;\frac{1}{\max_{j'} u_{j'}^2}\right)
# $$ {#eq-losses-position}
#
# where the maximum is over the pairs of the same image and layer, and the class loss is @eq-losses-soft-focal
# with $y=t_j$, without gradient through $t_j$. Its entries are small, since they vanish at the target, so the
# class weight is 6 instead of 2 (`criterion.w_position`; denoising queries 1, `criterion.w_position_dn`). The
# score of a pseudo label, if it counts, multiplies $t_j$ afterwards. The best pair of an image always has the
# target 1, even if it is a bad one.

# %%
#| export
def position_targets(
    iou: Tensor,  # (L,B,Q,C) IoU of the matched pairs, 0 elsewhere
) -> Tensor:  # (L,B,Q,C) in [0,1]
    "Squared IoU, rescaled so that the best pair of a layer and image has the target 1 (@eq-losses-position)"
    t = iou**2
    largest = t.flatten(2).amax(-1)[..., None, None]
    return t / torch.where(largest == 0, 1, largest)


# %%
overlaps = torch.zeros(1, 2, 4, 1)
overlaps[0, :, 1, 0] = torch.tensor([0.904762, 0.3])  # the second image has one pair, a bad one
overlaps[0, 0, 2, 0] = 0.6
t_place = position_targets(overlaps)
assert torch.allclose(t_place[0, 0, :, 0], torch.tensor([0, 1, 0.439778, 0]), atol=1e-6)
assert t_place[0, 1, 1, 0] == 1
place_losses = soft_focal_loss(torch.full((2,), 0.6).logit(), t_place[0, 0, 1:3, 0])
assert torch.allclose(place_losses, torch.tensor([0.020433, 0.004736]), atol=1e-6)
t_place[0, :, :, 0], place_losses


# %% [markdown]
# ## Weights and switches

# %%
#| export
@dataclass(frozen=True)
class CriterionConfig:
    "Weights and switches of matching and losses; the defaults are those of the published code"

    w_cls: float = 2.0  # class term, in matching cost and loss
    cost_l1: float = 5.0  # L1 term of the matching cost (paper and code: 5)
    w_giou: float = 2.0  # GIoU term, in matching cost and loss
    loss_l1: float = 10.0  # L1 term of the loss (effective weight of the code: 10; paper: 5)
    enc_labels: str = 'zero'  # labels of the encoder output: 'zero' = object or not (code), 'true' (DINO)
    # one-to-one stage: 'focal' (paper); 'task_aligned', 'varifocal' (to the IoU); 'position'
    cls_loss: str = 'focal'
    o2m: str = 'task_aligned'  # one-to-many assignment; for comparison 'max_iou', 'atss', 'simota'
    k: int = 13  # task_aligned: maximum number of positives per object
    alpha: float = 1.0  # one-to-many: power of the score
    beta: float = 6.0  # one-to-many: power of the IoU
    focal_alpha: float = 0.25  # weight of positives in the focal loss
    gamma: float = 2.0  # focusing power of all class losses
    w_enc: float = 1.0  # factor on the losses of the encoder output
    w_dn: float = 1.0  # factor on the losses of the denoising queries
    cost_cls: float = 0.0  # class term of the matching cost; 0: w_cls
    # class term of the matching cost: 'focal', 'probability' (DETR), 'modulated' (@eq-matching-modulated)
    class_cost: str = 'focal'
    no_object: float = 0.1  # detectors with softmax: weight of the no-object class (@eq-softmax-loss)
    soft_targets: bool = False  # the scores of pseudo labels multiply their class targets (@sec-soft-targets)
    w_position: float = 6.0  # class weight of the loss 'position' instead of w_cls (Stable-DINO)
    w_position_dn: float = 1.0  # the same of denoising queries
    w_mds: float = 1.0  # factor on the loss of a learned suppressor (@sec-rescoring)
    w_group: float = 1.0  # factor on the losses of a parallel group or second class head (@sec-group)
    mds_cost: str = 'suppressor'  # scores in its matching cost: 'suppressor' (its own), or 'one_to_many'
    mds_target: str = (
        'match'  # its targets on labelled images: 'match'ed objects, what 'nms' keeps, or 'both'
    )
    # one-to-one class losses are divided by the objects of 'all' processes, or of each 'process' (code)
    normalise: str = 'all'

    def __post_init__(self):
        one_of(
            'criterion',
            self,
            enc_labels=('zero', 'true'),
            cls_loss=('focal', 'task_aligned', 'varifocal', 'position'),
            o2m=('task_aligned', 'max_iou', 'atss', 'simota'),
            class_cost=('focal', 'probability', 'modulated'),
            mds_cost=('suppressor', 'one_to_many'),
            mds_target=('match', 'nms', 'both'),
            normalise=OVER,
        )
        if not self.no_object > 0:
            raise ConfigError(f'criterion.no_object={self.no_object} must be above 0')
        if self.k < 1:
            raise ConfigError(f'k={self.k}: an object needs at least one positive')

    @property
    def cost(self) -> dict:
        "Weights of the matching cost, for `pair_cost`"
        w_cls = self.cost_cls or self.w_cls
        return dict(w_cls=w_cls, w_l1=self.cost_l1, w_giou=self.w_giou, kind=self.class_cost)

    @property
    def mining_cost(self) -> dict:
        "The same for mining (@sec-mining), whose costs are compared between images: never modulated"
        return self.cost | (dict(kind='focal') if self.class_cost == 'modulated' else {})


# %% [markdown]
# ::: {.callout-note}
# ## Paper vs. code
# *L1 weight.* The paper gives 5. In the published code two logged parts of the L1 term (of the centre and of
# the size) have "loss" in their names and are summed into the total once more: the effective weight is
# **10**, for the decoder, the encoder and the denoising queries, in the supervised baseline as well. The
# default follows the code, `loss_l1=5` the paper. The weight in the matching cost is 5 in both (`cost_l1`).
#
# *Encoder labels.* The code trains the encoder output with all labels set to class 0, as Deformable-DETR
# does, though queries are selected by the largest score over all classes. `enc_labels='true'` is DINO's way.
#
# *Class weight.* 2; the original DINO uses 1 in the loss and 2 in the cost.
# :::
#
# An unknown value raises an error with the nearest known one:

# %%
try:
    CriterionConfig(enc_labels='zeros')
except ConfigError as e:
    answer = str(e)
assert "'zero'" in answer
answer


# %% [markdown]
# ## The losses of one layer
#
# Let $j$ run over the queries of all images, $pos$ be the matched ones with weights $\hat m_j$ (1 in the
# one-to-one stage), and $y_{jc}=\hat m_j$ if $j$ is matched to an object of class $c$, else 0. The loss of
# one layer in the first stage is
#
# $$
# L^{o2m} = \frac{1}{Z_m}\Big( w_{cls}\sum_{j,c}\mathrm{TL}(p_{jc},y_{jc}) + \sum_{j\in pos}\hat m_j\big[w_{giou}(1-\mathrm{GIoU}_j) + w_{L1}\lVert b_j-\hat b_j\rVert_1\big] \Big)
# $$ {#eq-losses-o2m}
#
# with $w_{L1}$ the setting `loss_l1` and $Z_m$ the mean of $\sum_j\hat m_j$ over the processes, at least $1/W$
# on $W$ processes (@eq-many-normaliser), so that the split of a batch over processes does not matter. In the
# second stage $\mathrm{FL}$ replaces $\mathrm{TL}$, and $\sum_j\hat m_j$ is the number of positives.
#
# ::: {.callout-note}
# ## Paper vs. code
# The published code divides the class term of the second stage by the positives of *this process*, the box
# terms by the mean over the processes, both at least 1 (`normalise='process'`). On one process this is the
# same. What it changes on several is measured at the end of the criterion.
# :::
#
# All layers share the targets, so they are stacked and computed together. A decoder of six layers needs
# hardly more calls than one of a single layer, which determines the speed of small models on a CPU.

# %%
#| export
def _class_loss(logits, y, cfg, stage):
    "Loss of every entry; the focal loss has hard targets unless they carry scores, the others have soft ones"
    if stage == 'o2m' or cfg.cls_loss == 'task_aligned':
        return task_aligned_focal(logits, y, cfg.gamma)
    if cfg.cls_loss == 'varifocal':
        return varifocal_loss(logits, y, gamma=cfg.gamma)
    if cfg.soft_targets or cfg.cls_loss == 'position':
        return soft_focal_loss(logits, y, cfg.focal_alpha, cfg.gamma)
    return sigmoid_focal_loss(logits, y, cfg.focal_alpha, cfg.gamma)


def layer_losses(
    logits: Tensor,  # (L,B,Q,C) raw class scores of L layers
    boxes: Tensor,  # (L,B,Q,4) cxcywh normalised
    padded: PaddedTargets,  # targets of the B images
    labels: Tensor,  # (L,B,N) labels to learn
    m: Matches,  # pairs of all layers
    cfg: CriterionConfig,  # weights
    stage: str,  # 'o2m' or 'o2o'
    slot_weight: Tensor | None = None,  # (B,Q) weight of each query in the class loss
    softmax: bool = False,  # do the logits (L,B,Q,C+1) end with a no-object class?
    background=None,  # (B,) weight of the entries without a target in the class loss, or boxes -> (L,B,Q)
):  # dict of cls, l1, giou, each (L,): weighted sums over the batch, not yet normalised; softmax: z_cls too
    "Sums of the three losses of all layers (@eq-losses-o2m); without pairs 0, still connected to the graph"
    n_layers = logits.shape[0]
    truth = padded.boxes[m.image, m.target].to(boxes.dtype)
    l1, giou, iou = box_losses(boxes[m.layer, m.image, m.query], truth)
    y = torch.zeros_like(logits[..., :-1] if softmax else logits)
    y_matched = iou if stage == 'o2o' and cfg.cls_loss != 'focal' else m.weight
    at = m.layer, m.image, m.query, labels[m.layer, m.image, m.target]
    y[at] = y_matched.to(y.dtype)
    by_place = stage == 'o2o' and cfg.cls_loss == 'position'
    if by_place:
        y = position_targets(y)
    if cfg.soft_targets:
        y[at] = y[at] * padded.scores[m.image, m.target].to(y.dtype)
    background = background(boxes) if callable(background) else background
    if softmax:
        cls, z_cls = softmax_losses(logits, y, cfg.no_object, background)
    else:
        cls = _class_loss(logits, y, cfg, stage)
        if background is not None:
            factor = background[:, None] if background.ndim == 1 else background
            cls = torch.where(y > 0, cls, cls * factor[..., None])
    if slot_weight is not None:
        cls = cls * slot_weight[..., None]

    def by_layer(x):
        return x.new_zeros(n_layers).index_add(0, m.layer, x * m.weight.to(x.dtype))

    box_terms = dict(l1=cfg.loss_l1 * by_layer(l1), giou=cfg.w_giou * by_layer(giou))
    if softmax:
        return dict(cls=cfg.w_cls * cls, **box_terms, z_cls=z_cls)
    w_cls = cfg.w_position if by_place else cfg.w_cls
    return dict(cls=w_cls * cls.flatten(1).sum(1), **box_terms)


# %%
toy = dict(
    pred_logits=torch.tensor([[[0.3, 0.2], [0.6, 0.1]]]).logit(),
    pred_boxes=torch.tensor([[[0.5, 0.5, 0.4, 0.4], [0.2, 0.2, 0.1, 0.1]]]),
)
objects = [dict(labels=torch.tensor([0]), boxes=torch.tensor([[0.5, 0.5, 0.4, 0.5]]))]
zero = torch.tensor([0])
pair = Matches(zero, zero, zero, zero, torch.tensor([0.8]))  # layer, image, query and object 0, weight .8
sums = layer_losses(
    toy['pred_logits'][None],
    toy['pred_boxes'][None],
    pad_targets(objects),
    torch.tensor([[[0]]]),
    pair,
    CriterionConfig(),
    'o2m',
)
assert abs(sums['cls'] - 1.196945) < 1e-6
assert abs(sums['l1'] - 10 * 0.8 * 0.1) < 1e-6 and abs(sums['giou'] - 2 * 0.8 * 0.2) < 1e-6
sums


# %% [markdown]
# The three numbers can be checked by hand: the class loss computed above; ten times .8 times an error of .1
# in the height; two times .8 times one minus a GIoU of .8.
#
# ## Denoising queries
#
# Denoising queries (@sec-denoising) are made from true boxes, so their object is known and they need no
# matching. Each slot has a code: a number $\ge 0$ is the object that the query was made from; $-1$ is a
# negative and $-2$ an unused slot, both of which learn background; $-3$ belongs to an image without boxes and
# has no loss. Class and box losses are divided by the positives, as in the second stage, whose losses they have
# in both stages.

# %%
#| export
def denoising_matches(
    target: Tensor,  # (B,P) object of a positive slot; -1, -2 background; -3 no weight
    n_layers: int,  # decoder layers
) -> Matches:  # the same pairs in every layer
    "Pairs of the denoising queries, read from the codes of their slots"
    image, slot = (target >= 0).nonzero(as_tuple=True)
    layer = torch.arange(n_layers, device=target.device).repeat_interleave(len(image))
    return Matches(
        layer,
        image.repeat(n_layers),
        slot.repeat(n_layers),
        target[image, slot].repeat(n_layers),
        torch.ones(len(layer), device=target.device),
    )


def _stacked(outputs):
    """Groups of layers with equally many predictions: lists of predictions, names. The decoder layers in
    order, then the encoder output where there is one; it is a group of its own where it holds all tokens"""
    layers = [*outputs.get('aux_outputs', ()), outputs]
    names = [f'_{i}' for i in range(len(layers) - 1)] + ['']
    proposals = outputs.get('enc_outputs')
    if proposals is None:
        return [(layers, names)]
    if proposals['pred_boxes'].shape == outputs['pred_boxes'].shape:
        return [([*layers, proposals], [*names, '_enc'])]
    return [(layers, names), ([proposals], ['_enc'])]


# %%
slots = torch.tensor([[0, 1, -1, -1], [0, -2, -1, -2], [-3, -3, -3, -3]])  # images with 2, 1 and 0 objects
known = denoising_matches(slots, n_layers=2)
assert len(known) == 2 * 3
list(zip(known.layer.tolist(), known.image.tolist(), known.query.tolist(), known.target.tolist()))


# %% [markdown]
# ## The matching of a stage
#
# The second stage matches one-to-one. The assignment of the first stage is an argument: by default the
# task-aligned one of @sec-matching, for comparison one of those in @sec-assigners. The setting `criterion.o2m`
# holds its name, and `one_to_many_assigner` (@sec-variants) returns the function of that name.

# %%
#| export
def assign(
    logits: Tensor,  # (L,B,Q,C) raw class scores
    boxes: Tensor,  # (L,B,Q,4) cxcywh normalised
    padded: PaddedTargets,  # of the B images
    labels: Tensor,  # (L,B,N) labels to match with
    stage: str,  # 'o2m' or 'o2o'
    cfg: CriterionConfig,  # weights of the cost, k, alpha, beta
    o2m=assign_o2m,  # one-to-many assignment (logits, boxes, padded, labels, k, alpha, beta) -> Matches
) -> Matches:
    "The matching of the stage, for all layers; ConfigError where `cfg.o2m` names another function than `o2m`"
    if stage == 'o2o':
        return assign_o2o(logits, boxes, padded, labels, **cfg.cost)
    if stage != 'o2m':
        raise ConfigError(f"stage '{stage}' is unknown; known: o2m, o2o (see matching.stage_of)")
    if o2m is assign_o2m and cfg.o2m != 'task_aligned':
        raise ConfigError(
            f"criterion.o2m='{cfg.o2m}' needs its function: pass o2m=one_to_many_assigner(cfg), "
            'which is in semidetr.semi.variants'
        )
    return o2m(logits, boxes, padded, labels, cfg.k, cfg.alpha, cfg.beta)


def _named(sums, names, z_cls, z_box, factor):
    "{'loss_cls_0': ..., ...}: divide by the normalisers and give each scalar its name"
    out = {}
    for term, x in sums.items():
        for name, value in zip(names, (x * factor / (z_cls if term == 'cls' else z_box)).unbind()):
            out[f'loss_{term}{name}'] = value
    return out


class _Group:
    "Predictions of some layers, stacked, and their matching"

    def __init__(self, layers, names, targets, stage, cfg, o2m):
        boxes = torch.stack([o['pred_boxes'] for o in layers])
        logits = torch.stack([o['pred_logits'] for o in layers])
        self.names, self.softmax = names, has_no_object(layers[0])
        self.logits, self.boxes = at_least_float32(logits), at_least_float32(boxes)
        read = torch.stack([sigmoid_logits(o) for o in layers]) if self.softmax else self.logits
        self.padded = pad_targets(targets, read.shape[-1])
        self.labels = self.padded.labels.expand(len(names), -1, -1).clone()
        if names[-1] == '_enc' and cfg.enc_labels == 'zero':
            self.labels[-1] = 0
        self.matches = assign(read, self.boxes, self.padded, self.labels, stage, cfg, o2m)

    def weights(self):
        "Sum of the weights of the pairs of each layer"
        m, zeros = self.matches, self.logits.new_zeros(len(self.names))
        return zeros.index_add(0, m.layer, m.weight.to(zeros.dtype))

    def losses(self, cfg, stage, z_cls, z_box, background):
        "Named losses, divided by the normalisers"
        args = self.logits, self.boxes, self.padded, self.labels, self.matches, cfg, stage
        sums = layer_losses(*args, softmax=self.softmax, background=background)
        factor = self.logits.new_tensor([cfg.w_enc if n == '_enc' else 1.0 for n in self.names])
        z_cls = sums.pop('z_cls', z_cls)
        if self.softmax and cfg.normalise == 'all':
            z_cls = all_reduce_mean(z_cls)
        return _named(sums, self.names, z_cls, z_box, factor)


# %% [markdown]
# ## The criterion
#
# The criterion returns all losses of a batch by name: no suffix for the last decoder layer, `_0`, `_1`, ...
# for those before it, `_enc` for the encoder output, `_dn_0`, ... for the denoising queries of each layer.
# Training minimises their sum.
#
# The normalisers of all layers and of the denoising queries are exchanged between the processes in **one**
# call, whatever a batch contains: a process whose images are all empty must not leave the others waiting.
# (With softmax each group of layers has one more, for the weights of its queries.)

# %%
#| export
def set_criterion(
    outputs: dict,  # of the detector: pred_logits, pred_boxes, aux_outputs, enc_outputs, extra['denoising']
    targets: list,  # per image a dict with `labels` (n,), `boxes` (n,4) cxcywh normalised
    stage: str = 'o2o',  # 'o2m' or 'o2o' (`stage_of`)
    cfg: CriterionConfig = CriterionConfig(),  # weights and switches
    denoising: bool = True,  # False: denoising queries get no loss (unlabelled images of stage 1)
    stats: dict = None,  # gets positives_per_object of the last decoder layer, where there is an object
    o2m=assign_o2m,  # one-to-many assignment, see `assign`
    # (B,) weight of the background of each image (@eq-thresholds-guard), or boxes (L,B,Q,4) -> (L,B,Q)
    background=None,
) -> dict:  # scalars loss_cls, loss_l1, loss_giou with suffixes _0, ..., _enc, _dn_0, ...; minimise their sum
    """All losses of a batch (@eq-losses-o2m). NonFiniteError where a matching cost is NaN (an image without
    objects has none: there the loss becomes NaN), DataError where a label is not a class"""
    if 'criterion' in outputs:  # of a detector that assigns its targets itself (@sec-pyramid)
        return outputs['criterion'](targets)
    groups = [_Group(*group, targets, stage, cfg, o2m) for group in _stacked(outputs)]
    first, padded = groups[0], groups[0].padded
    if stats is not None and sum(padded.counts):
        last = int((first.matches.layer == first.names.index('')).sum())
        stats['positives_per_object'] = last / sum(padded.counts)
    dn = outputs.get('extra', {}).get('denoising') if denoising else None
    target = dn['meta']['target'] if dn else padded.labels.new_full((1, 1), -1)
    slots = (target >= 0).sum()[None].to(first.logits.dtype)
    here = torch.cat([*(g.weights() for g in groups), slots])
    mean = normaliser(here, cfg.normalise)  # one exchange between the processes, whatever this batch holds
    here = here.clamp(min=1) if cfg.normalise == 'process' else mean
    z_cls, losses, at = here if stage == 'o2o' else mean, {}, 0
    for g in groups:
        own = slice(at, at + len(g.names))
        losses |= g.losses(cfg, stage, z_cls[own], mean[own], background)
        at = own.stop
    if dn:
        losses |= _denoising_losses(dn, padded, cfg, here[-1], mean[-1])
    return losses


def _denoising_losses(dn, padded, cfg, z_cls, z_box):
    "Losses of the denoising queries of all layers, towards their own objects"
    logits, boxes = at_least_float32(dn['pred_logits']), at_least_float32(dn['pred_boxes'])
    target, n = dn['meta']['target'], len(logits)
    labels, m = padded.labels.expand(n, -1, -1), denoising_matches(target, n)
    slot_weight = (target != -3).to(logits.dtype)
    cfg = replace(cfg, w_position=cfg.w_position_dn)
    sums = layer_losses(logits, boxes, padded, labels, m, cfg, 'o2o', slot_weight)
    return _named(sums, [f'_dn_{i}' for i in range(n)], z_cls, z_box, cfg.w_dn)


# %% [markdown]
# A decoder of three layers on a batch of two images, one of them without objects:

# %%
g = torch.Generator().manual_seed(0)


def layer(B=2, Q=20, C=3):  # predictions of a layer
    return dict(
        pred_logits=torch.randn(B, Q, C, generator=g) - 2,
        pred_boxes=torch.rand(B, Q, 4, generator=g) * 0.5 + 0.2,
    )


layers = [layer() for _ in range(4)]
batch = [
    dict(labels=torch.tensor([2, 0]), boxes=torch.tensor([[0.4, 0.4, 0.4, 0.4], [0.6, 0.6, 0.3, 0.5]])),
    dict(labels=torch.zeros(0), boxes=torch.zeros(0, 4)),
]
outputs = {**layers[2], 'aux_outputs': layers[:2], 'enc_outputs': layers[3]}
losses = set_criterion(outputs, batch, 'o2m')
assert list(losses) == [
    f'loss_{term}{name}' for term in ('cls', 'l1', 'giou') for name in ('_0', '_1', '', '_enc')
]
{k: round(v.item(), 3) for k, v in losses.items()}

# %% [markdown]
# The L1 loss of the first stage, computed by hand from the pairs of @sec-matching, agrees:

# %%
(q, t, w), _ = one_to_many(layers[2], batch)
l1_of_pairs = box_losses(layers[2]['pred_boxes'][0, q], batch[0]['boxes'][t])[0]
by_hand = 10 * (w * l1_of_pairs).sum() / w.sum().clamp(min=1)
assert torch.allclose(losses['loss_l1'], by_hand)
losses['loss_l1'], by_hand

# %% [markdown]
# The paper's L1 weight halves the L1 losses and changes no other:

# %%
paper = set_criterion(outputs, batch, 'o2m', dataclasses.replace(CriterionConfig(), loss_l1=5))
ratio = {k: round((paper[k] / losses[k]).item(), 6) for k in losses}
assert all(v == (0.5 if '_l1' in k else 1) for k, v in ratio.items())
ratio

# %% [markdown]
# Without objects the box losses are zero and still connected to the graph, and the class loss lowers all
# scores:

# %%
free = {k: v.clone().requires_grad_() for k, v in layers[0].items()}
nothing = set_criterion(free, [batch[1], batch[1]], 'o2o')
sum(nothing.values()).backward()
assert nothing['loss_l1'] == 0
assert (free['pred_boxes'].grad == 0).all() and (free['pred_logits'].grad > 0).all()
{k: round(v.item(), 4) for k, v in nothing.items()}

# %% [markdown]
# What `normalise='process'` changes can be computed without a second process: what two of them would do with
# half of the images each is the mean of the losses of the halves. Here the first half has 18 objects and the
# second 4. Divided by its own count each, the class loss of eight images becomes another number; divided by
# the mean count, 11, it is that of one process.

# %%
counts = (6, 3, 4, 5, 1, 0, 2, 1)
eight = [dict(labels=torch.arange(n) % 3, boxes=torch.rand(n, 4, generator=g) * 0.3 + 0.3) for n in counts]
seen = layer(B=8)
whole = set_criterion(seen, eight)['loss_cls']
parts = [
    set_criterion({k: v[s] for k, v in seen.items()}, eight[s])['loss_cls']
    for s in (slice(0, 4), slice(4, 8))
]
own_counts, mean_count = sum(parts) / 2, (parts[0] * 18 / 11 + parts[1] * 4 / 11) / 2
assert torch.allclose(mean_count, whole) and own_counts > 1.2 * whole
dict(one_process=whole, all=mean_count, process=own_counts, ratio=own_counts / whole)


# %% [markdown]
# ## One-to-many beside one-to-one {#sec-losses-parallel}
#
# The queries of a parallel group, and the second class head (@sec-group), have the losses of the first stage at
# every iteration, whatever the stage of the matching queries. Where targets are pseudo boxes with a score
# $\hat s_i$, it multiplies the soft target of a positive of object $i$,
#
# $$
# \hat m_j' = \hat s_i\,\hat m_j,
# $$ {#eq-losses-scored}
#
# so a box that the teacher is unsure of counts less, for its class as for its place. Labelled boxes have
# $\hat s_i=1$. With `criterion.soft_targets` (@sec-soft-targets) the score is not multiplied a second time.

# %%
#| export
def scored(
    o2m,  # one-to-many assignment as in `assign`
):  # an assignment
    "The same pairs; the weights of an object's positives are multiplied by its score (@eq-losses-scored)"

    def assignment(logits, boxes, padded, *args):
        m = o2m(logits, boxes, padded, *args)
        return replace(m, weight=m.weight * padded.scores[m.image, m.target].to(m.weight))

    return assignment


def parallel_losses(
    outputs: dict,  # of the detector
    targets: list,  # as for `set_criterion`, perhaps with `scores`
    cfg: CriterionConfig = CriterionConfig(),  # `w_group` and the settings of the first stage
    o2m=assign_o2m,  # one-to-many assignment, see `assign`
) -> dict:  # loss_group_cls, ..., loss_second_cls, ...; {} where the detector has neither
    """One-to-many losses of a parallel group and of a second class head; errors as `set_criterion`

    Scores count once, with or without `criterion.soft_targets`. The background has its full weight: a density
    guard (@eq-thresholds-guard) acts on the losses of `set_criterion` only.
    """
    losses, cfg = {}, replace(cfg, soft_targets=False)  # the weights of the pairs hold the scores
    for name, own in parallel_outputs(outputs).items():
        found = set_criterion(own, targets, 'o2m', cfg, o2m=scored(o2m))
        losses |= {k.replace('loss_', f'loss_{name}_', 1): cfg.w_group * v for k, v in found.items()}
    return losses


# %% [markdown]
# With these predictions in the place of a second class head, its losses are those of the first stage. A score of
# one half halves the soft targets:

# %%
sure, unsure = ([dict(batch[0], scores=torch.full((2,), s)), batch[1]] for s in (1.0, 0.5))
beside = dict(outputs, second=dict(layers[2], aux_outputs=layers[:2]))
of_sure = parallel_losses(beside, sure)
of_group = {k.replace('second_', ''): v for k, v in of_sure.items()}
assert all(torch.equal(losses[k], v) for k, v in of_group.items()) and parallel_losses(outputs, sure) == {}
stacked = [torch.stack([o[k] for o in layers[:3]]) for k in ('pred_logits', 'pred_boxes')]
plain, halved = (scored(assign_o2m)(*stacked, pad_targets(t)) for t in (sure, unsure))
assert torch.equal(halved.weight, plain.weight / 2) and torch.equal(halved.query, plain.query)
sorted(of_sure)


# %% [markdown]
# ## Statistics of the matching
#
# For the log of a run: the number of positives per object and their mean IoU. In the first stage the number
# shows whether $k$ suits the number of queries; in the second it is 1, and the IoU grows as training
# progresses.

# %%
#| export
@torch.no_grad()
def match_stats(
    outputs: dict,  # of the detector; the last decoder layer is matched
    targets: list,  # as for `set_criterion`
    stage: str = 'o2o',  # 'o2m' or 'o2o'
    cfg: CriterionConfig = CriterionConfig(),  # as for `set_criterion`
    o2m=assign_o2m,  # one-to-many assignment, see `assign`
) -> dict:  # floats: positives (of the batch), positives_per_object, matched_iou (nan without objects)
    "Number and mean IoU of the positives of the last decoder layer: for the log, not for the loss"
    logits, boxes = (at_least_float32(x[None]) for x in (sigmoid_logits(outputs), outputs['pred_boxes']))
    padded = pad_targets(targets, logits.shape[-1])
    m = assign(logits, boxes, padded, padded.labels[None], stage, cfg, o2m)
    iou = box_losses(boxes[m.layer, m.image, m.query], padded.boxes[m.image, m.target])[2]
    objects = sum(padded.counts)
    return dict(
        positives=len(m),
        positives_per_object=len(m) / objects if objects else float('nan'),
        matched_iou=float(iou.mean()),
    )


# %%
report = {stage: match_stats(outputs, batch, stage) for stage in ('o2m', 'o2o')}
assert report['o2o']['positives_per_object'] == 1 < report['o2m']['positives_per_object'] <= 13
report

# %% [markdown]
# ## Summary
#
# * The focal loss has hard targets, the task-aligned focal loss soft ones; both weight an entry by its
#   distance to the target.
# * The losses of a pair are L1 on normalised coordinates and one minus GIoU, weighted by its soft target in
#   the first stage.
# * Normalisers: the sum of soft targets in stage 1, the positives in stage 2, both over all images of all
#   processes and never below 1 object. `normalise='process'` divides class losses of stage 2 per process.
# * All layers are computed together. The encoder output learns "object or not" by default; denoising queries
#   need no matching.
# * The weight of the L1 loss is 10, as in the published code; `loss_l1=5` is the paper's.
#
# ## Exercises
#
# 1. Show that $\mathrm{TL}(p,\hat m)$ has its minimum at $p=\hat m$, and find its value there.
# 2. Why is the sum of soft targets a better normaliser than the number of positives?
# 3. Two processes hold 0 and 10 objects: compare what each divides its class losses by in the second stage, with
#    `normalise='all'` and with `'process'`.
# 4. Train with `enc_labels='true'`: which queries does the encoder select that it did not before?
