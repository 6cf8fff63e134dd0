# %% [markdown]
# # Losses {#sec-losses}
#
# > Turn matched pairs into numbers to minimise, the same way for every decoder layer, for the encoder and for
# > the denoising queries.
#
# Nine hundred queries and five objects: nearly every class score of a detection transformer is background, so
# a plain cross-entropy is spent on what is already right. Focal losses weigh an entry by how wrong it is. In
# the one-to-one stage a query is an object or it is not; in the one-to-many stage it is an object *to a
# degree*, and the loss must aim at that degree. Boxes are compared by coordinates and by overlap. The rest of
# the chapter is bookkeeping that is easy to get wrong: what each sum is divided by, on one process and on
# several.

# %%
#| default_exp matching.losses

# %%
#| export
from dataclasses import dataclass
import torch
import torch.nn.functional as F
from torch import Tensor
from semidetr.matching.assigners import ASSIGNERS
from semidetr.boxes import cxcywh_to_xyxy
from semidetr.core import ConfigError, all_reduce_mean, suggest
from semidetr.matching.matching import Matches, PaddedTargets, assign_o2m, assign_o2o, pad_targets

# %%
import dataclasses
import matplotlib.pyplot as plt
from semidetr.matching.matching import one_to_many


# %% [markdown]
# ## Class losses
#
# Let $p=\sigma(z)$ be the probability that a query has a class, and $y$ its target. With hard targets
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
# Both are computed from the raw score $z$, so that a score of 80 does no harm.

# %%
#| export
def sigmoid_focal_loss(
    logits: Tensor,  # (...) raw scores
    target: Tensor,  # (...) 0 or 1
    alpha: float = 0.25,  # weight of the positives; the negatives have 1-alpha
    gamma: float = 2.0,  # focusing power
) -> Tensor:  # (...) loss of each entry
    "Focal loss (@eq-losses-focal): what is already right hardly counts"
    p = logits.sigmoid()
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction='none')
    wrong = p + target - 2 * p * target  # 1-p for positives, p for negatives
    return (alpha * target + (1 - alpha) * (1 - target)) * wrong**gamma * bce


def task_aligned_focal(
    logits: Tensor,  # (...) raw scores
    target: Tensor,  # (...) soft target in [0,1]; 0 = background
    gamma: float = 2.0,  # focusing power
) -> Tensor:  # (...) loss of each entry
    "Focal loss towards a soft target (@eq-losses-tal): no alpha, the distance to the target is the weight"
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction='none')
    return (target - logits.sigmoid()).abs() ** gamma * bce


def varifocal_loss(
    logits: Tensor,  # (...) raw scores
    target: Tensor,  # (...) soft target in [0,1]; 0 = background
    alpha: float = 0.75,  # weight of the background
    gamma: float = 2.0,  # focusing power of the background
) -> Tensor:  # (...) loss of each entry
    "Positives weighted by their target, background by the focal rule (an option of this project, not of the paper)"
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction='none')
    return torch.where(target > 0, target, alpha * logits.sigmoid() ** gamma) * bce


# %%
p = torch.tensor([[0.3, 0.2], [0.6, 0.1]])  # two queries, two classes
y = torch.tensor([[0.8, 0.0], [0.0, 0.0]])  # the first is class 0 to a degree of .8, the second background
entries = task_aligned_focal(p.logit(), y)
assert abs(2 * entries.sum() - 1.196945) < 1e-6
2 * entries.sum(), entries

# %% [markdown]
# The score .6 on background pays most. The task-aligned loss is smallest where the score equals the target,
# whatever the target is; the focal loss always pulls a positive towards 1:

# %%
#| label: fig-losses-class
#| fig-cap: "The focal loss of a positive falls until its score is 1; the task-aligned loss has its minimum at the soft target, so a badly placed query is taught to be modest."
#| fig-alt: "Loss against score from 0 to 1: the focal loss of a positive falls to zero at one; three task-aligned curves reach their minimum at .2, .5 and .8."
scores = torch.linspace(0.01, 0.99, 99)
fig, ax = plt.subplots(figsize=(5, 2.8), dpi=80, layout='constrained')
ax.plot(scores, sigmoid_focal_loss(scores.logit(), torch.ones(99)), color='black', label='focal, object')
for target, shade in ((0.2, '#9ecae1'), (0.5, '#4292c6'), (0.8, '#08519c')):
    line = task_aligned_focal(scores.logit(), torch.full((99,), target))
    assert abs(scores[line.argmin()] - target) < 0.011
    ax.plot(scores, line, color=shade, label=f'task-aligned, target {target}')
ax.set(xlabel='score', ylabel='loss', ylim=(0, 1))
ax.legend(fontsize=8)
plt.show()


# %% [markdown]
# ::: {.callout-note}
# ## Paper vs. code
# `varifocal_loss` is not part of Semi-DETR. It is here because small detectors that are trained for minutes
# profit from scores that know how well the box fits. The switch is `CriterionConfig.cls_loss`: `focal` (the
# paper, the default), `task_aligned` or `varifocal`; the latter two take the IoU of the matched pair as
# target in the one-to-one stage. The one-to-many stage always uses @eq-losses-tal.
# :::
#
# ## Box losses
#
# A matched pair $(b,\hat b)$ pays the distance of its four normalised coordinates, $\lVert b-\hat b\rVert_1$,
# and $1-\mathrm{GIoU}(b,\hat b)$. The first treats all boxes alike in absolute terms, the second in relative
# ones.

# %%
#| export
def box_losses(
    pred: Tensor,  # (P,4) cxcywh normalised
    gt: Tensor,  # (P,4) cxcywh normalised
):  # (L1 (P,), 1-GIoU (P,), IoU (P,) detached)
    "Loss of each matched pair: L1 summed over the four coordinates, and one minus generalised IoU"
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
# The same shift is little for the large box and half of the small one.
#
# ## Weights and switches

# %%
#| export
@dataclass(frozen=True)
class CriterionConfig:
    "Weights and switches of matching and losses; the defaults are those of the published code"

    w_cls: float = 2.0  # class term, in matching cost and loss
    cost_l1: float = 5.0  # L1 term of the matching cost (paper and code: 5)
    w_giou: float = 2.0  # GIoU term, in matching cost and loss
    loss_l1: float = 10.0  # L1 term of the loss: 10 = what the code effectively does, 5 = what the paper says
    enc_labels: str = (
        'zero'  # classes that the encoder output learns: 'zero' = object or not (code), 'true' (DINO)
    )
    cls_loss: str = 'focal'  # class loss of the one-to-one stage: 'focal' (paper), 'task_aligned', 'varifocal' (ours, towards the IoU)
    o2m: str = 'task_aligned'  # one-to-many assignment: 'task_aligned' (paper), or for comparison 'max_iou', 'atss', 'simota'
    k: int = 13  # task_aligned: most positives of an object
    alpha: float = 1.0  # one-to-many: power of the score
    beta: float = 6.0  # one-to-many: power of the IoU
    focal_alpha: float = 0.25  # weight of positives in the focal loss
    gamma: float = 2.0  # focusing power of all class losses
    w_enc: float = 1.0  # factor on the losses of the encoder output
    w_dn: float = 1.0  # factor on the losses of the denoising queries

    def __post_init__(self):
        for key, known in dict(
            enc_labels=('zero', 'true'),
            cls_loss=('focal', 'task_aligned', 'varifocal'),
            o2m=('task_aligned', *ASSIGNERS),
        ).items():
            if getattr(self, key) not in known:
                raise ConfigError(
                    f"{key}='{getattr(self, key)}' is unknown; {suggest(getattr(self, key), known)}"
                )
        if self.k < 1:
            raise ConfigError(f'k={self.k}: an object needs at least one positive')


# %% [markdown]
# ::: {.callout-note}
# ## Paper vs. code
# *L1 weight.* The paper says 5. In the published code two logged parts of the L1 term (of the centre and of
# the size) carry the word "loss" in their names and are summed into the total once more: the effective weight
# is **10**, for the decoder, the encoder and the denoising queries, in the supervised baseline as well. The
# default follows the code, `loss_l1=5` the paper. The matching cost keeps 5 in both.
#
# *Encoder labels.* The code trains the encoder output with all labels set to class 0, as Deformable-DETR
# does, though queries are selected by the largest score over all classes. `enc_labels='true'` is DINO's way.
#
# *Class weight.* 2; the original DINO uses 1 in the loss and 2 in the cost.
# :::
#
# A word that is not known is refused with the nearest one that is:

# %%
try:
    CriterionConfig(enc_labels='zeros')
except ConfigError as e:
    answer = str(e)
assert "'zero'" in answer
answer


# %% [markdown]
# ## One layer, all layers
#
# Let $j$ run over the queries of all images, $pos$ be the matched ones with weights $\hat m_j$ (1 in the
# one-to-one stage), and $y_{jc}=\hat m_j$ if $j$ is matched to an object of class $c$, else 0. One layer of
# the first stage costs
#
# $$
# L^{o2m} = \frac{1}{Z_m}\Big( w_{cls}\sum_{j,c}\mathrm{TL}(p_{jc},y_{jc}) + \sum_{j\in pos}\hat m_j\big[w_{giou}(1-\mathrm{GIoU}_j) + w_{L1}\lVert b_j-\hat b_j\rVert_1\big] \Big)
# $$ {#eq-losses-o2m}
#
# with $Z_m=\max(1,\;\text{mean over the processes of }\sum_j\hat m_j)$. In the second stage $\mathrm{FL}$
# takes the place of $\mathrm{TL}$; its sum is divided by the number of positives *of this process*, that of
# the boxes by its mean over the processes, both at least 1.
#
# Layers share the targets, so they are stacked and computed together: a decoder of six layers costs hardly
# more calls than one of a single layer, which is what counts for small models on a CPU.

# %%
#| export
def _class_loss(logits, y, cfg, stage):
    "Loss of every entry; hard targets in the focal loss, soft ones in the other two"
    if stage == 'o2m' or cfg.cls_loss == 'task_aligned':
        return task_aligned_focal(logits, y, cfg.gamma)
    if cfg.cls_loss == 'varifocal':
        return varifocal_loss(logits, y, gamma=cfg.gamma)
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
):  # dict of cls, l1, giou, each (L,): weighted sums over the batch, not yet normalised
    "Sums of the three losses for all layers at once; zeros that are connected to the graph where nothing is matched"
    n_layers = logits.shape[0]
    l1, giou, iou = box_losses(
        boxes[m.layer, m.image, m.query], padded.boxes[m.image, m.target].to(boxes.dtype)
    )
    y = torch.zeros_like(logits)
    hit = iou if stage == 'o2o' and cfg.cls_loss != 'focal' else m.weight
    y[m.layer, m.image, m.query, labels[m.layer, m.image, m.target]] = hit.to(y.dtype)
    cls = _class_loss(logits, y, cfg, stage)
    if slot_weight is not None:
        cls = cls * slot_weight[..., None]

    def by_layer(x):
        return x.new_zeros(n_layers).index_add(0, m.layer, x * m.weight.to(x.dtype))

    return dict(
        cls=cfg.w_cls * cls.flatten(1).sum(1), l1=cfg.loss_l1 * by_layer(l1), giou=cfg.w_giou * by_layer(giou)
    )


# %%
toy = dict(
    pred_logits=torch.tensor([[[0.3, 0.2], [0.6, 0.1]]]).logit(),
    pred_boxes=torch.tensor([[[0.5, 0.5, 0.4, 0.4], [0.2, 0.2, 0.1, 0.1]]]),
)
objects = [dict(labels=torch.tensor([0]), boxes=torch.tensor([[0.5, 0.5, 0.4, 0.5]]))]
pair = Matches(
    *torch.tensor([[0], [0], [0], [0]]), torch.tensor([0.8])
)  # layer 0, image 0, query 0, object 0, weight .8
sums = layer_losses(
    toy['pred_logits'][None],
    toy['pred_boxes'][None],
    pad_targets(objects),
    torch.tensor([[[0]]]),
    pair,
    CriterionConfig(),
    'o2m',
)
assert (
    abs(sums['cls'] - 1.196945) < 1e-6
    and abs(sums['l1'] - 10 * 0.8 * 0.1) < 1e-6
    and abs(sums['giou'] - 2 * 0.8 * 0.2) < 1e-6
)
sums


# %% [markdown]
# Three numbers to check by hand: the class loss from above; ten times .8 times a height that is .1 off; twice
# .8 times one minus an overlap of .8.
#
# ## Denoising queries know their object
#
# Denoising queries (@sec-denoising) are made from true boxes, so they need no matching. Each slot says what
# it is: a number $\ge 0$ is the object it was made from; $-1$ a negative and $-2$ an unused slot, both of
# which learn background; $-3$ belongs to an image without boxes and learns nothing. The class loss is divided
# by the positives of this process, the box losses by the mean over the processes, and both stages use the
# second stage's losses.

# %%
#| export
def denoising_matches(
    target: Tensor,  # (B,P) object of a positive slot; -1, -2 background; -3 no weight
    n_layers: int,  # decoder layers
) -> Matches:  # the same pairs in every layer
    "Denoising queries know their object: no matching is needed"
    image, slot = (target >= 0).nonzero(as_tuple=True)
    layer = torch.arange(n_layers, device=target.device).repeat_interleave(len(image))
    return Matches(
        layer,
        image.repeat(n_layers),
        slot.repeat(n_layers),
        target[image, slot].repeat(n_layers),
        torch.ones(len(layer), device=target.device),
    )


def _float(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _stacked(outputs):
    "Decoder layers in order and, where shapes allow, the encoder output last: (L,B,Q,C), (L,B,Q,4), names"
    layers = [*outputs.get('aux_outputs', ()), outputs]
    names = [f'_{i}' for i in range(len(layers) - 1)] + ['']
    if 'enc_outputs' in outputs:
        layers, names = [*layers, outputs['enc_outputs']], [*names, '_enc']
    logits, boxes = (torch.stack([o[key] for o in layers]) for key in ('pred_logits', 'pred_boxes'))
    return _float(logits), _float(boxes), names


# %%
slots = torch.tensor(
    [[0, 1, -1, -1], [0, -2, -1, -2], [-3, -3, -3, -3]]
)  # three images with two, one and no object
known = denoising_matches(slots, n_layers=2)
assert len(known) == 2 * 3
list(zip(known.layer.tolist(), known.image.tolist(), known.query.tolist(), known.target.tolist()))


# %% [markdown]
# ## The matching of the stage
#
# The second stage has one matching, the first a choice: `CriterionConfig.o2m` names the task-aligned
# assignment of @sec-matching, or one of those in @sec-assigners that it is compared with.

# %%
#| export
def _check_stage(stage):
    if stage not in ('o2m', 'o2o'):
        raise ConfigError(f"stage '{stage}' is unknown; known: o2m, o2o (see matching.stage_of)")


def assign(
    logits: Tensor,  # (L,B,Q,C)
    boxes: Tensor,  # (L,B,Q,4) cxcywh normalised
    padded: PaddedTargets,  # of the B images
    labels: Tensor,  # (L,B,N)
    stage: str,  # 'o2m' or 'o2o'
    cfg: CriterionConfig,  # costs, k, alpha, beta
) -> Matches:
    "The matching of the stage, for all layers"
    _check_stage(stage)
    if stage == 'o2m' and cfg.o2m != 'task_aligned':
        return ASSIGNERS[cfg.o2m](logits, boxes, padded, labels, alpha=cfg.alpha, beta=cfg.beta)
    if stage == 'o2m':
        return assign_o2m(logits, boxes, padded, labels, cfg.k, cfg.alpha, cfg.beta)
    return assign_o2o(logits, boxes, padded, labels, w_cls=cfg.w_cls, w_l1=cfg.cost_l1, w_giou=cfg.w_giou)


def _named(sums, names, z_cls, z_box, factor):
    "{'loss_cls_0': ..., ...}: divide by the normalisers and give each scalar its name"
    out = {}
    for term, x in sums.items():
        for name, value in zip(names, (x * factor / (z_cls if term == 'cls' else z_box)).unbind()):
            out[f'loss_{term}{name}'] = value
    return out


# %% [markdown]
# ## The criterion
#
# All losses of a batch, by name: no suffix for the last decoder layer, `_0`, `_1`, ... for those before it,
# `_enc` for the encoder output, `_dn_0`, ... for the denoising queries of each layer. Their plain sum is what
# is minimised.
#
# The normalisers of all layers and of the denoising queries travel between the processes in **one** exchange,
# and it takes place whatever a batch holds: a process whose images are all empty must not leave the others
# waiting.

# %%
#| export
def set_criterion(
    outputs: dict,  # of the detector: pred_logits, pred_boxes, aux_outputs, enc_outputs, extra['denoising']
    targets: list,  # dicts with `labels` (n,), `boxes` (n,4) cxcywh normalised
    stage: str = 'o2o',  # 'o2m' or 'o2o' (`stage_of`)
    cfg: CriterionConfig = CriterionConfig(),  # weights and switches
    denoising: bool = True,  # False: denoising queries get no loss (unlabelled images of stage 1)
    stats: dict = None,  # gets positives_per_object of the last decoder layer, where there is an object
) -> (
    dict
):  # scalars loss_cls, loss_l1, loss_giou with suffixes _0, _1, ..., _enc, _dn_0, ...; their sum is the loss
    "All losses of a batch (@eq-losses-o2m). NonFiniteError where a matching cost is NaN (an image without objects has none: there the loss becomes NaN), DataError where a label is not a class"
    logits, boxes, names = _stacked(outputs)
    padded = pad_targets(targets, logits.shape[-1])
    labels = padded.labels.expand(len(names), -1, -1).clone()
    if names[-1] == '_enc' and cfg.enc_labels == 'zero':
        labels[-1] = 0
    m = assign(logits, boxes, padded, labels, stage, cfg)
    if stats is not None and sum(padded.counts):
        stats['positives_per_object'] = int((m.layer == names.index('')).sum()) / sum(padded.counts)
    sums = layer_losses(logits, boxes, padded, labels, m, cfg, stage)
    dn = outputs.get('extra', {}).get('denoising') if denoising else None
    target = dn['meta']['target'] if dn else padded.labels.new_full((1, 1), -1)
    here = torch.cat(
        [
            logits.new_zeros(len(names)).index_add(0, m.layer, m.weight.to(logits.dtype)),
            (target >= 0).sum()[None].to(logits.dtype),
        ]
    )
    mean = all_reduce_mean(here).clamp(min=1)  # one exchange between the processes, whatever this batch holds
    here = here.clamp(min=1)
    factor = logits.new_tensor([cfg.w_enc if n == '_enc' else 1.0 for n in names])
    losses = _named(sums, names, (here if stage == 'o2o' else mean)[:-1], mean[:-1], factor)
    return {**losses, **(_denoising_losses(dn, padded, cfg, here[-1], mean[-1]) if dn else {})}


def _denoising_losses(dn, padded, cfg, z_cls, z_box):
    "Losses of the denoising queries of all layers, towards their own objects"
    logits, boxes, target = _float(dn['pred_logits']), _float(dn['pred_boxes']), dn['meta']['target']
    n = len(logits)
    sums = layer_losses(
        logits,
        boxes,
        padded,
        padded.labels.expand(n, -1, -1),
        denoising_matches(target, n),
        cfg,
        'o2o',
        (target != -3).to(logits.dtype),
    )
    return _named(sums, [f'_dn_{i}' for i in range(n)], z_cls, z_box, cfg.w_dn)


# %% [markdown]
# A decoder of three layers on a batch of two images, one of them without objects:

# %%
g = torch.Generator().manual_seed(0)


def layer(B=2, Q=20, C=3):  # a layer's predictions
    return dict(
        pred_logits=torch.randn(B, Q, C, generator=g) - 2,
        pred_boxes=torch.rand(B, Q, 4, generator=g) * 0.5 + 0.2,
    )


layers, batch = (
    [layer() for _ in range(4)],
    [
        dict(labels=torch.tensor([2, 0]), boxes=torch.tensor([[0.4, 0.4, 0.4, 0.4], [0.6, 0.6, 0.3, 0.5]])),
        dict(labels=torch.zeros(0), boxes=torch.zeros(0, 4)),
    ],
)
outputs = {**layers[2], 'aux_outputs': layers[:2], 'enc_outputs': layers[3]}
losses = set_criterion(outputs, batch, 'o2m')
assert list(losses) == [
    f'loss_{term}{name}' for term in ('cls', 'l1', 'giou') for name in ('_0', '_1', '', '_enc')
]
{k: round(v.item(), 3) for k, v in losses.items()}

# %% [markdown]
# The first stage by hand, from the pairs of @sec-matching, agrees:

# %%
(q, t, w), _ = one_to_many(layers[2], batch)
by_hand = (
    10 * (w * box_losses(layers[2]['pred_boxes'][0, q], batch[0]['boxes'][t])[0]).sum() / w.sum().clamp(min=1)
)
assert torch.allclose(losses['loss_l1'], by_hand)
losses['loss_l1'], by_hand

# %% [markdown]
# The switches do what they say. Half the L1 weight halves the L1 losses and nothing else:

# %%
paper = set_criterion(outputs, batch, 'o2m', dataclasses.replace(CriterionConfig(), loss_l1=5))
ratio = {k: round((paper[k] / losses[k]).item(), 6) for k in losses}
assert all(v == (0.5 if '_l1' in k else 1) for k, v in ratio.items())
ratio

# %% [markdown]
# Without any object the box losses are zero, still connected to the graph, and the scores learn to be low:

# %%
free = {k: v.clone().requires_grad_() for k, v in layers[0].items()}
nothing = set_criterion(free, [batch[1], batch[1]], 'o2o')
sum(nothing.values()).backward()
assert (
    nothing['loss_l1'] == 0 and (free['pred_boxes'].grad == 0).all() and (free['pred_logits'].grad > 0).all()
)
{k: round(v.item(), 4) for k, v in nothing.items()}


# %% [markdown]
# ## What the matching did
#
# For the log of a run: how many queries worked for an object, and how well they fitted. In the first stage
# the count tells whether $k$ suits the number of queries; in the second it is 1 and the overlap is what
# grows.

# %%
#| export
@torch.no_grad()
def match_stats(
    outputs: dict,  # of the detector; the last decoder layer is looked at
    targets: list,  # as for `set_criterion`
    stage: str = 'o2o',  # 'o2m' or 'o2o'
    cfg: CriterionConfig = CriterionConfig(),  # as for `set_criterion`
) -> dict:  # floats: positives (of the batch), positives_per_object, matched_iou (nan without objects)
    "How many queries an object got in the last layer and how well they fit: for the log, not for the loss"
    logits, boxes = (_float(outputs[k][None]) for k in ('pred_logits', 'pred_boxes'))
    padded = pad_targets(targets, logits.shape[-1])
    m = assign(logits, boxes, padded, padded.labels[None], stage, cfg)
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
# The twenty random queries of this batch overlap the objects here and there, and the four assignments take
# very different numbers of them:

# %%
taken = {
    name: match_stats(outputs, batch, 'o2m', CriterionConfig(o2m=name))['positives']
    for name in ('task_aligned', 'max_iou', 'atss', 'simota')
}
assert len(set(taken.values())) > 1 and taken['task_aligned'] == report['o2m']['positives']
taken

# %% [markdown]
# ## Summary
#
# * Focal loss for objects that are or are not, task-aligned focal loss for objects to a degree; the distance
#   to the target is the weight in both.
# * A pair pays L1 on normalised coordinates and one minus GIoU, weighted by its soft target in the first
#   stage.
# * Normalisers: sum of soft targets (mean over the processes) in stage 1; positives of the process for
#   classes and mean positives for boxes in stage 2. Never below 1.
# * All layers are computed together; the encoder output learns "object or not" unless told otherwise;
#   denoising queries skip the matching.
# * The weight of L1 is 10, as in the published code, and 5 at a word.
#
# ## Exercises
#
# 1. Show that $\mathrm{TL}(p,\hat m)$ has its minimum at $p=\hat m$, and find its value there.
# 2. Why is the sum of soft targets a better divisor than the number of positives?
# 3. Two processes hold 0 and 10 objects: compare what each divides its class and box losses by in the second
#    stage.
# 4. Train with `enc_labels='true'`: which queries does the encoder select that it did not before?
