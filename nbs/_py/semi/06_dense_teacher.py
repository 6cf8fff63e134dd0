# %% [markdown]
# # Dense Teacher {#sec-dense-teacher}
#
# > Train FCOS with unlabelled images from the teacher's predictions at every point, without pseudo boxes.
#
# *Why.* Pseudo boxes are made by a threshold, a suppression and an assignment, three decisions with constants, and
# each loses something that the teacher knows. Dense Teacher (Zhou et al. 2022) leaves them out: the student learns
# the teacher's class probabilities at every point. That has a price of its own. Points correspond only if both
# views have the same geometry, so the strong view differs in its pixels alone; a student whose image is turned or
# cut never sees that here. And one number remains: how many of the points count as objects.
#
# ## Targets at points
#
# All points of all images and maps are pooled. With the teacher's probabilities $p^T_i$ (no quality factor) and
# $m_i=\max_c p^T_{ic}$ let $R$ be the share $\rho=1\,\%$ of the points with the largest $m_i$, and
# $S=\sum_{i\in R}m_i$. The student's probabilities $p_i$ learn
#
# $$
# L_{cls}=\frac1S\sum_{i,c}|y_{ic}-p_{ic}|^2\,BCE(p_{ic},y_{ic}),\qquad
# y_i=\begin{cases}p^T_i & i\in R\\ 0 & \text{otherwise.}\end{cases}
# $$ {#eq-dense-teacher-class}
#
# Points outside $R$ are background, whatever the teacher says. In $R$ the student also learns distances and quality,
#
# $$
# L_{box}=\tfrac{1}{|R|}\sum_{R}\big(1-GIoU(d_i,d^T_i)\big),\qquad
# L_q=\tfrac{1}{|R|}\sum_{R} BCE\big(\sigma(q_i),\sigma(q^T_i)\big),
# $$ {#eq-dense-teacher-box}
#
# and after a burn-in of $t_b$ iterations
#
# $$
# L = L_{sup} + r_t\,(\lambda L_{cls} + L_{box} + L_q), \qquad r_t=\min\Big(1,\frac{t-t_b}{t_b}\Big).
# $$ {#eq-dense-teacher-ramp}

# %%
#| default_exp semi.dense_teacher

# %%
#| export
from dataclasses import dataclass
import torch
import torch.nn.functional as F
from torch import Tensor
from semidetr.core import ConfigError, all_gather_cat, all_reduce_mean, in_range
from semidetr.detectors.fcos import DensePrediction
from semidetr.many import counts_of_all, normaliser
from semidetr.semi.methods import METHODS, MethodConfig, StepResult, Supervised
from semidetr.semi.teacher import pseudo_stats, to_original

# %%
import matplotlib.pyplot as plt


# %% [markdown]
# ## The region
#
# Pooling means that an image with many objects gets more points than an empty one. Points in the padding take no
# part. At least one point is taken; on several processes the points of all are pooled.

# %%
#| export
def dense_region(
    best: Tensor,  # (n,) m_i of the points of this process, the padding left out
    ratio: float = 0.01,  # rho
) -> Tensor:  # (n,) bool
    "The points with the largest probabilities, max(1, floor(rho n)) of all; every process must call it"
    everything = all_gather_cat(best)
    k = max(1, int(ratio * len(everything) + 1e-9))
    counts, mine = counts_of_all([len(best)], device=best.device)
    first = sum(counts[: mine.start])
    chosen = torch.zeros_like(everything, dtype=torch.bool)
    chosen[everything.topk(min(k, len(everything))).indices] = True
    return chosen[first : first + len(best)]


# %%
#| export
def quality_focal(
    logits: Tensor,  # of the student, any shape
    targets: Tensor,  # probabilities, the same shape
) -> Tensor:  # the same shape
    "Quality focal loss with exponent 2 (@eq-dense-teacher-class), through logits"
    bce = F.binary_cross_entropy_with_logits(logits, targets, reduction='none')
    return (targets - logits.sigmoid()).square() * bce


def distance_giou(
    a: Tensor,  # (n,4) left, top, right, bottom, at least 0
    b: Tensor,  # (n,4) likewise, from the same points
) -> Tensor:  # (n,) 1 - GIoU; 1 where both boxes are empty
    "GIoU loss of boxes around the same points (@eq-dense-teacher-box)"
    area = lambda x: (x[:, 0] + x[:, 2]) * (x[:, 1] + x[:, 3])
    inter, hull = area(torch.minimum(a, b)), area(torch.maximum(a, b))
    union = area(a) + area(b) - inter
    safe = lambda x: torch.where(x > 0, x, torch.ones_like(x))
    return 1 - inter / safe(union) + (hull - union) / safe(hull)


# %%
pooled = torch.tensor([0.1, 0.8, 0.3, 0.05, 0.6, 0.2, 0.02, 0.9, 0.4, 0.15])
chosen = dense_region(pooled, 0.3)
assert chosen.nonzero().flatten().tolist() == [1, 4, 7] and abs(pooled[chosen].sum() - 2.3) < 1e-6
assert dense_region(pooled[:3], 0.01).tolist() == [False, True, False]  # fewer than 100 points: one
p, y = torch.tensor([0.2, 0.7, 0.9, 0.2, 0.9]), torch.tensor([0.7, 0.7, 0.7, 0.0, 0.0])
q = quality_focal(p.logit(), y)
assert torch.allclose(q, torch.tensor([0.298387, 0.0, 0.030581, 0.008926, 1.865094]), atol=2e-6)
squares = torch.full((1, 4), 2.0), torch.tensor([[1.0, 2, 3, 2]])
assert abs(distance_giou(*squares) - 0.4) < 1e-6 and distance_giou(*[torch.zeros(1, 4)] * 2) == 1
chosen, q, distance_giou(*squares)


# %% [markdown]
# ## All three losses
#
# A teacher's box without area says nothing about a box and is left out of $L_{box}$.

# %%
#| export
def dense_losses(
    student: DensePrediction,
    teacher: DensePrediction,  # of the same points, without gradient
    ratio: float = 0.01,  # rho
) -> tuple:  # (loss_cls, loss_giou, loss_quality as a dict, (B,n) bool: the region)
    "Losses of the student against the teacher's predictions (@eq-dense-teacher-class, @eq-dense-teacher-box)"
    valid = teacher.valid
    z, p = student.logits[valid], teacher.logits[valid].sigmoid()
    best = p.amax(1)
    region = dense_region(best, ratio)
    y = torch.where(region[:, None], p, torch.zeros_like(p))
    size = normaliser(region.sum().to(z.dtype))
    total = all_reduce_mean(best[region].sum()).clamp(min=1e-6)
    boxes = teacher.distances[valid][region]
    has_area = (boxes[:, :2] + boxes[:, 2:] > 0).all(1)
    giou = distance_giou(student.distances[valid][region][has_area], boxes[has_area])
    q, wanted = student.quality[valid][region], teacher.quality[valid][region].sigmoid()
    found = torch.zeros_like(valid)
    found[valid] = region
    losses = dict(
        loss_cls=quality_focal(z, y).sum() / total,
        loss_giou=giou.sum() / size,
        loss_quality=F.binary_cross_entropy_with_logits(q, wanted, reduction='sum') / size,
    )
    return losses, found


def ramp(
    t: int,  # iteration
    burn_in: int,  # t_b
) -> float:  # r_t in [0,1]
    "How much the unlabelled images count (@eq-dense-teacher-ramp); 1 without a burn-in"
    return float(t >= 0) if burn_in <= 0 else min(1.0, max(0.0, (t - burn_in) / burn_in))


# %%
def three_points(p, distances, quality):
    "Predictions of three points of one image"
    p, n = torch.tensor(p), len(p)
    return DensePrediction(
        p.logit()[None],
        torch.tensor(distances)[None],
        torch.tensor(quality)[None],
        [],
        [n],
        torch.ones(1, n) > 0,
    )


of_teacher = three_points([[0.8, 0.1], [0.3, 0.2], [0.05, 0.02]], [[1.0, 2, 3, 2]] * 3, [1.0] * 3)
of_student = three_points([[0.5, 0.1], [0.4, 0.1], [0.1, 0.05]], [[2.0, 2, 2, 2]] * 3, [0.5] * 3)
values, region = dense_losses(of_student, of_teacher)
assert region.tolist() == [[True, False, False]]
assert abs(values['loss_cls'] - 0.182938) < 1e-6 and abs(values['loss_giou'] - 0.4) < 1e-6
assert abs(values['loss_quality'] - 0.608548) < 1e-6
whole = 4 * values['loss_cls'] + values['loss_giou'] + values['loss_quality']
assert abs(whole - 1.740302) < 2e-6 and abs(whole * ramp(7500, 5000) - 0.870151) < 1e-6
assert [ramp(t, 5000) for t in (5000, 5001, 7500, 10000)] == [0, 0.0002, 0.5, 1]
values


# %% [markdown]
# ## The method
#
# | setting | value of the code | here |
# |---|---|---|
# | $\lambda$, `method.unsup_weight` | 3 or 4 with few labels, 2 with all of COCO | 4 |
# | $t_b$, `method.burn_in_iters` | 5000 of 180000 | that of the preset |
# | the teacher is a copy of the student until | iteration 3000 | `ema.copy`, 3/5 of the burn-in |
# | decay of the teacher | .9996 | `ema.decay`, that of the preset |
# | $\rho$, `method.dense_ratio` | .01 | .01 |
#
# With 1 % of 22,400 points images of 800 x 1344 pixels have 224 points each in $R$. An image of 224 x 224 has 1,029
# points at strides 8 to 32 and 10 in $R$, fewer than the 18 cells of an average image of txl_pbc: sweep `dense_ratio`
# on small images. Labelled images are seen twice, weak and strong, as in the code (`loader.two_views`).
#
# ::: {.callout-note}
# ## Paper vs. code
# The code pools the points of one process; here those of all are pooled, so that two processes take the step of
# one. Points in the padding and boxes without area are left out here; the code counts them.
# :::

# %%
#| export
@dataclass(frozen=True)
class DenseTeacherConfig(MethodConfig):
    "Settings of Dense Teacher"

    name: str = 'dense_teacher'
    dense_ratio: float = 0.01  # rho, share of the points that learn from the teacher as objects

    def __post_init__(self):
        super().__post_init__()
        in_range('method', self, dense_ratio=(0, 1))


def same_places(
    weak: list,  # targets of the weak views
    strong: list,  # targets of the strong views
):
    "`ConfigError` unless both views of each image have the same geometry"
    for w, s in zip(weak, strong, strict=True):
        if tuple(w['size']) != tuple(s['size']) or not torch.equal(w['matrix'], s['matrix']):
            raise ConfigError(
                f"image {w['image_id']}: the strong view has another geometry than the weak one, but "
                'dense_teacher compares points: set view.strong=photometric'
            )


# %%
#| export
class DenseTeacher(Supervised):
    "Labelled losses plus losses against the teacher's predictions at the points of the same view"

    views = ('labelled', 'weak', 'strong')
    trains = ('points',)
    mixes = False
    settings = DenseTeacherConfig
    unread = (
        'method.unsup_ramp',
        *(f'pseudo.{name}' for name in ('nms', 'cross_nms', 'min_score', 'min_side', 'top_k')),
        *('mining', 'consistency'),
    )
    shown = {'region_score': 'score in R'}
    curves = ('region_score', 'region_points', 'pseudo_boxes')

    def __init__(self, cfg, labelled=None):
        super().__init__(cfg, labelled)
        if cfg.view.strong != 'photometric':
            raise ConfigError(
                f'view.strong={cfg.view.strong}: dense_teacher compares points, so both views need one '
                'geometry; set view.strong=photometric'
            )

    def step(self, student, teacher, batch, t):
        losses, scalars, _ = super().step(student, teacher, batch, t)
        cfg = self.cfg.method
        weight = ramp(t, cfg.burn_in_iters)
        if 'weak' not in batch or weight == 0:
            return StepResult(losses, scalars, {})
        weak, strong = batch['weak'], batch['strong']
        same_places(weak['targets'], strong['targets'])
        with torch.no_grad():
            weak_maps = teacher.encode(weak['images'], weak['mask'])
            target = teacher.dense(weak_maps)
            with teacher.full_precision(weak_maps):
                found = teacher.detect(weak_maps)
        shown = student.encode(strong['images'], strong['mask'])
        dense = student.dense(shown)
        with student.full_precision(shown):
            unsup, region = dense_losses(dense, target, cfg.dense_ratio)
        unsup['loss_cls'] = cfg.unsup_weight * unsup['loss_cls']
        losses |= {k.replace('loss_', 'loss_unsup_'): weight * v for k, v in unsup.items()}
        best = target.logits.sigmoid().amax(-1)[region]
        likely = [{k: v[d['scores'] > self.cfg.pseudo.threshold] for k, v in d.items()} for d in found]
        scalars |= pseudo_stats(found, likely, likely)
        scalars |= dict(
            region_points=len(best) / max(1, len(found)), region_score=best.sum().item() / max(1, len(best))
        )
        return StepResult(losses, scalars, dict(pseudo=to_original(likely, weak['targets'])))

    @classmethod
    def derived(cls, cfg):
        "Views of one geometry, labelled ones too; weight of the classes; a teacher that is first a copy"
        copied = round(0.6 * cfg.method.burn_in_iters)
        return {
            'view.strong': ('photometric', 'dense_teacher compares points, so both views have one geometry'),
            'loader.two_views': ('true', 'labelled images in both views, as in the code of dense_teacher'),
            'method.unsup_weight': (4.0, 'weight of the classes in the losses of dense_teacher'),
            'ema.copy': (copied, 'the teacher is a copy of the student for 3/5 of the burn-in'),
        }


METHODS['dense_teacher'] = DenseTeacher

# %% [markdown]
# Its health monitor needs boxes, which the method has none of: for the log, detections of the teacher above
# `pseudo.threshold` are compared with hidden truth. They are not trained on.

# %%
#| label: fig-dense-teacher-region
#| fig-cap: "The teacher's best class probability at 24 x 24 points (dark is likely). Inside the red line: the 1 % of points that learn as objects; all others learn background."
#| fig-alt: "A map with three dark spots; thin red outlines around the middle of the two darkest ones."
rows, columns = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing='ij')
field = torch.zeros(24, 24)
for y0, x0, top in ((6, 6, 0.9), (15, 17, 0.75), (18, 5, 0.4)):
    field = torch.maximum(field, top * torch.exp(-((rows - y0) ** 2 + (columns - x0) ** 2) / 6))
inside = dense_region(field.flatten(), 0.01).reshape(24, 24)
assert inside.sum() == 5 and not inside[18, 5]
fig, ax = plt.subplots(figsize=(3, 3), dpi=80, layout='constrained')
ax.imshow(field, cmap='Blues', vmin=0, vmax=1)
ax.contour(inside.float(), levels=[0.5], colors='red', linewidths=1)
ax.axis('off')
plt.show()

# %% [markdown]
# ## Summary
#
# - `semidetr train --detector fcos --method dense_teacher`: the teacher's probabilities at all points are the labels.
# - No threshold, no suppression, no assignment; but one geometry for both views, and a share of points.
# - An object that the teacher finds with a low score is trained as background (the third spot of the figure).
#
# ## Exercises
#
# 1. How large must $\rho$ be for the third spot to get a point?
# 2. Student and teacher have equal weights and see the same image. Which of the three losses are 0?
# 3. Why is $L_q$ not 0 at its minimum?
