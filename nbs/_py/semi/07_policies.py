# %% [markdown]
# # Label policies apart from their detectors {#sec-policies}
#
# > Give a detection transformer the labels of Soft Teacher or Dense Teacher, and nothing else of them.
#
# *Why.* A table that compares Soft Teacher on Faster R-CNN with Semi-DETR on DINO compares two things at once: what the
# student learns from, and which network learns it. To tell them apart, the policies of the two rivals are put on the
# networks of this book as far as they make sense there. A DETR has no box head that could be asked about any box, and
# no points; it has queries with boxes. So both policies are translated, and the translation is ours.
#
# ## Background that the teacher believes in
#
# Soft Teacher weights a region of the background by the teacher's probability of background there
# (@eq-soft-teacher-background). Here the teacher's detections $k$ with scores $s_k$, also those below the threshold, are
# moved to the strong view, and a query with box $b$ that has no target gets the weight
#
# $$
# w(b) = 1 - \max_{k:\; IoU(b,b_k)\ge .5} s_k, \qquad w=1 \text{ without such a } k.
# $$ {#eq-policies-background}
#
# ## Soft targets for the likeliest queries
#
# Dense Teacher trains the likeliest points of the teacher as objects, with all their class probabilities
# (@eq-dense-teacher-class). Here the likeliest *queries* of the teacher are taken: the $\rho B Q$ with the largest
# $m_i=\max_c p^T_{ic}$ of a batch of $B$ images with $Q$ queries. They are moved to the strong view, matched one-to-one with the
# student's queries, and
#
# $$
# L_{cls}=\frac1S\sum_{q,c}|y_{qc}-p_{qc}|^2\,BCE(p_{qc},y_{qc}),\qquad y_q=\begin{cases}p^T_i & q \text{ matched to } i\\
# 0 & \text{otherwise,}\end{cases}\qquad S=\sum_i m_i .
# $$ {#eq-policies-soft}
#
# Box losses are those of the criterion, divided by the number of targets.

# %%
#| default_exp semi.policies

# %%
#| export
from dataclasses import dataclass
import torch
from torch import Tensor
from semidetr.boxes import box_iou, cxcywh_to_xyxy, denormalize_boxes
from semidetr.core import all_reduce_mean, at_least_float32, in_range, one_of
from semidetr.detectors.contract import class_scores, sigmoid_logits
from semidetr.many import normaliser
from semidetr.matching.losses import box_losses
from semidetr.matching.matching import assign_o2o, pad_targets, stage_of
from semidetr.semi.dense_teacher import dense_region, quality_focal
from semidetr.semi.methods import METHODS, MeanTeacher, MethodConfig, StepResult, Supervised
from semidetr.semi.methods import has_denoising, unsup_weight, weighted
from semidetr.semi.teacher import keep_boxes, pseudo_stats, teacher_detections, to_original, transport

# %%
import matplotlib.pyplot as plt


# %%
#| export
def teacher_background(
    boxes: Tensor,  # (L,B,Q,4) cxcywh in [0,1] of the student's queries
    detections: list,  # per image dict(boxes (K,4) cxcywh, scores (K,)): of the teacher, in the same view
    overlap: float = 0.5,  # smallest IoU of a detection that counts
) -> Tensor:  # (L,B,Q) in [0,1]
    "How sure the teacher is that there is nothing (@eq-policies-background)"
    weights = torch.ones(boxes.shape[:3], device=boxes.device, dtype=boxes.dtype)
    for b, d in enumerate(detections):
        if len(d['scores']):
            iou = box_iou(cxcywh_to_xyxy(boxes[:, b].detach()), cxcywh_to_xyxy(d['boxes']).to(boxes))
            scores = torch.where(iou >= overlap, d['scores'].to(boxes), torch.zeros_like(iou[0, 0, 0]))
            weights[:, b] = 1 - scores.amax(-1)
    return weights


def soft_targets(
    outputs: dict,  # of the teacher, last layer
    ratio: float,  # rho
) -> list:  # per image dict(boxes (K,4) cxcywh, labels (K,), scores (K,), probabilities (K,C))
    "The likeliest queries of a batch of all processes, with all their class probabilities"
    p, boxes = class_scores(outputs), at_least_float32(outputs['pred_boxes'])
    best, labels = p.max(-1)
    region = dense_region(best.flatten(), ratio).reshape(best.shape)
    out = []
    for i, chosen in enumerate(region):
        rows = dict(boxes=boxes[i][chosen], labels=labels[i][chosen], scores=best[i][chosen])
        out.append(rows | dict(probabilities=p[i][chosen]))
    return out


# %%
queries = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.52, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]])[None, None]
one_seen = [dict(boxes=torch.tensor([[0.5, 0.5, 0.2, 0.2]]), scores=torch.tensor([0.3]))]
background = teacher_background(queries, one_seen)
assert torch.allclose(background, torch.tensor([[[0.7, 0.7, 1.0]]]))
nothing = [dict(boxes=torch.zeros(0, 4), scores=torch.zeros(0))]
assert (teacher_background(queries, nothing) == 1).all()
toy = dict(
    pred_logits=torch.tensor([[0.8, 0.1], [0.3, 0.2], [0.05, 0.02]]).logit()[None], pred_boxes=queries[0]
)
likely = soft_targets(toy, 0.5)
assert likely[0]['labels'].tolist() == [0] and torch.allclose(
    likely[0]['probabilities'], torch.tensor([[0.8, 0.1]])
)
background, likely[0]['probabilities']


# %%
#| export
def soft_set_losses(
    outputs: dict,  # of the student: all decoder layers
    targets: list,  # per image dict(boxes, labels, scores, probabilities) of `soft_targets`, in its view
    cfg,  # CriterionConfig: cost of the matching, weights of the box losses
) -> dict:  # loss_cls, loss_l1, loss_giou, with suffixes _0, ... for the layers before the last
    "Losses towards soft targets that are matched one-to-one (@eq-policies-soft)"
    layers = [*outputs.get('aux_outputs', ()), outputs]
    logits = torch.stack([at_least_float32(sigmoid_logits(o)) for o in layers])
    boxes = torch.stack([at_least_float32(o['pred_boxes']) for o in layers])
    padded, n = pad_targets(targets, logits.shape[-1]), len(layers)
    m = assign_o2o(logits, boxes, padded, padded.labels.expand(n, -1, -1), **cfg.cost)
    full = torch.nn.utils.rnn.pad_sequence([t['probabilities'].to(logits) for t in targets], batch_first=True)
    y = torch.zeros_like(logits)
    y[m.layer, m.image, m.query] = full[m.image, m.target]
    total = all_reduce_mean(padded.scores.sum().to(logits)).clamp(min=1e-6)
    count = normaliser(logits.new_tensor(float(sum(padded.counts))))
    truth = padded.boxes[m.image, m.target].to(boxes)
    l1, giou, _ = box_losses(boxes[m.layer, m.image, m.query], truth)
    by_layer = lambda x: x.new_zeros(n).index_add(0, m.layer, x)
    sums = dict(
        cls=cfg.w_cls * quality_focal(logits, y).flatten(1).sum(1) / total,
        l1=cfg.loss_l1 * by_layer(l1) / count,
        giou=cfg.w_giou * by_layer(giou) / count,
    )
    names = [f'_{i}' for i in range(n - 1)] + ['']
    return {f'loss_{k}{name}': v for k, x in sums.items() for name, v in zip(names, x.unbind())}


# %% [markdown]
# ## The method
#
# `method.name=label_policy` is a mean teacher whose pseudo labels follow `method.policy`: `background` or `soft`. With
# `background` everything else is as for `mean_teacher`; with `soft` there is no threshold, and denoising queries and
# encoder output learn nothing from unlabelled images.

# %%
#| export
@dataclass(frozen=True)
class LabelPolicyConfig(MethodConfig):
    "Settings of the label policies"

    name: str = 'label_policy'
    policy: str = 'background'  # or 'soft'
    overlap: float = 0.5  # smallest IoU of a detection that weights the background
    soft_ratio: float = 0.05  # rho, share of the teacher's queries that are soft targets

    def __post_init__(self):
        super().__post_init__()
        one_of('method', self, policy=('background', 'soft'))
        in_range('method', self, overlap=(0, 1), soft_ratio=(0, 1))


# %%
#| export
class LabelPolicy(MeanTeacher):
    "Labelled losses plus w_u times losses on the teacher's detections, by the policy of a rival"

    trains = ('queries',)
    mixes = False
    settings = LabelPolicyConfig
    unread = (
        *(f'method.{name}' for name in ('mds_unsup', 'mds_threshold', 'density_guard', 'group_threshold')),
        *('mining', 'consistency'),
    )

    def step(self, student, teacher, batch, t):
        losses, scalars, _ = Supervised.step(self, student, teacher, batch, t)
        cfg, weight = self.cfg, unsup_weight(t, self.cfg.method)
        if 'weak' not in batch or weight == 0:
            return StepResult(losses, scalars, {})
        weak, strong = batch['weak'], batch['strong']
        with torch.no_grad():
            of_teacher = teacher(weak['images'], weak['mask'])
        found = teacher_detections(of_teacher, weak['targets'], cfg.pseudo)
        pseudo = keep_boxes(found, [self.confident(d) for d in found])
        soft = cfg.method.policy == 'soft'
        learn = self.soft_losses if soft else self.background_losses
        unsup, targets = learn(student, of_teacher, found, pseudo, weak, strong, t)
        scalars |= pseudo_stats(found, pseudo, targets)
        boxes = dict(pseudo=to_original(pseudo, weak['targets']))
        return StepResult(losses | weighted(unsup, weight, 'unsup'), scalars, boxes)

    def background_losses(self, student, of_teacher, found, pseudo, weak, strong, t):
        "(The mean teacher's losses with weighted background, its targets)"
        cfg, views = self.cfg, (weak['targets'], strong['targets'], self.cfg.pseudo.min_side)
        everything, targets = transport(found, *views), transport(pseudo, *views)
        denoising = has_denoising(stage_of(t, cfg.method.T1), cfg.method)
        outputs = student(strong['images'], strong['mask'], targets if denoising else None)
        background = lambda boxes: teacher_background(boxes, everything, cfg.method.overlap)
        return self.criterion(outputs, targets, t, denoising, None, background), targets

    def soft_losses(self, student, of_teacher, found, pseudo, weak, strong, t):
        "(Losses towards the likeliest queries, those that are in the strong view)"
        cfg, rows = self.cfg, soft_targets(of_teacher, self.cfg.method.soft_ratio)
        placed = [
            {**r, 'boxes': denormalize_boxes(r['boxes'], w['size'])} for r, w in zip(rows, weak['targets'])
        ]
        targets = transport(placed, weak['targets'], strong['targets'], cfg.pseudo.min_side)
        for target, r in zip(targets, rows):
            target['probabilities'] = r['probabilities'][target['source']]
        outputs = student(strong['images'], strong['mask'])
        return soft_set_losses(outputs, targets, cfg.criterion), targets


METHODS['label_policy'] = LabelPolicy

# %%
#| label: fig-policies-background
#| fig-cap: "The weight of a query of the background as its box moves away from a detection with the score .3: lower while both overlap by half or more."
#| fig-alt: "A step function: .7 for small shifts on both sides of zero, 1 beyond."
shifts = torch.linspace(-0.2, 0.2, 81)
moving = torch.tensor([0.5, 0.5, 0.2, 0.2]).repeat(81, 1)
moving[:, 0] += shifts
line = teacher_background(moving[None, None], one_seen)[0, 0]
assert line.min() < 0.71 and line[0] == 1
fig, ax = plt.subplots(figsize=(4, 2.2), dpi=80, layout='constrained')
ax.plot(shifts, line, color='#1f77b4')
ax.set(xlabel='shift (box width .2)', ylabel='weight', ylim=(0, 1.05))
plt.show()

# %% [markdown]
# ## Summary
#
# - `method.name=label_policy method.policy=background` weights the background of a DETR by the teacher's scores.
# - `method.policy=soft` trains a DETR on the likeliest queries of the teacher with all their class probabilities.
# - With them, labels and network can be varied one at a time.
#
# ## Exercises
#
# 1. Why does @eq-policies-background count detections below the threshold?
# 2. Two queries of the teacher lie on the same object. What happens to each of them under `soft`?
