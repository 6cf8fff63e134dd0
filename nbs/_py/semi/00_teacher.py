# %% [markdown]
# # The teacher {#sec-teacher}
#
# > Average the student into a teacher, filter its detections, and move them between views.
#
# A network that is trained on its own predictions reinforces its own errors. The mean teacher counters this
# in two ways. Its weights are an average over many students, so the noise of single updates cancels. And the
# teacher predicts on a mildly augmented (*weak*) view of an image, while the student has to find the same
# objects in a heavily augmented (*strong*) view. Two questions remain: which of the teacher's detections
# become pseudo labels, and how a box of one view becomes a target in the other.

# %%
#| default_exp semi.teacher

# %%
#| export
import copy
from dataclasses import dataclass
import torch
from torch import nn, Tensor
from torchvision.ops import nms
from semidetr.boxes import normalize_boxes, transform_boxes
from semidetr.core import in_range
from semidetr.detectors.contract import post_process
from semidetr.matching.matching import NonFiniteError

# %%
import matplotlib.pyplot as plt


# %% [markdown]
# ## Exponential moving average
#
# Let $\theta_t$ be the weights of the student before iteration $t$, and $\theta'_t$ those of the teacher:
#
# $$
# \theta'_t = m_t\,\theta'_{t-1} + (1-m_t)\,\theta_t, \qquad m_t = \min\left(m,\; 1-\frac{1+w}{t+t_0+1+w}\right)
# $$ {#eq-teacher-ema}
#
# With $w=0$ and $t_0=0$ the first update copies the student ($m_0=0$), and until $m_t$ reaches its ceiling
# $m$, the teacher is exactly the arithmetic mean of all students so far. With a fixed $m=0.999$ from the
# start, the random initial weights would keep a large share for a thousand iterations.

# %%
#| export
@dataclass(frozen=True)
class EmaConfig:
    "How the teacher follows the student (paper: decay .999; code: @eq-teacher-ema)"

    decay: float = 0.999  # ceiling m of the decay
    warmup: int = 0  # w; with a larger one the decay rises more slowly
    start: int = -1  # t_0: updates that the first teacher stands for; -1: 0, but no ramp after run.init
    copy: int = 0  # first iterations in which the teacher is a copy of the student (Dense Teacher: 3000)

    def __post_init__(self):
        in_range('ema', self, decay=(0, 1), warmup=0, start=-1, copy=0)


def ema_decay(
    step: int,  # t, counted from the first update
    cfg: EmaConfig = EmaConfig(),  # m, w and t_0
    trained: bool = False,  # does the teacher begin as a trained network?
) -> float:  # m_t in [0, cfg.decay]
    "Decay of update `step` (@eq-teacher-ema)"
    if step < cfg.copy:
        return 0.0
    if trained and cfg.start < 0:
        return cfg.decay
    return min(cfg.decay, 1 - (1 + cfg.warmup) / (step + max(0, cfg.start) + 1 + cfg.warmup))


# %%
assert [round(ema_decay(t), 6) for t in (0, 1, 9, 998, 999)] == [0, 0.5, 0.9, 0.998999, 0.999]
[ema_decay(t) for t in (0, 1, 9, 99, 999, 9999)]

# %% [markdown]
# The ramp discards the initial weights, which is right for random ones. In a run that starts from a *trained*
# network (`run.init`) it would do harm: the optimiser has no state yet, its first updates are rough, and with
# $m_0=0$ the teacher would copy the degraded student. Its scores would fall below the threshold, hardly any
# pseudo label would be left, and the student would learn that unlabelled images are empty. So after
# `run.init` the decay is $m$ from the first update, unless `ema.start` gives the number of updates that the
# first teacher stands for.

# %%
cold = [ema_decay(t) for t in range(3)]
warm = [ema_decay(t, trained=True) for t in range(3)]
assert cold == [0, 0.5, 1 - 1 / 3] and warm == [0.999] * 3
cold, warm


# %%
#| export
def make_teacher(
    student: nn.Module,  # any network
) -> nn.Module:  # a frozen copy in eval mode
    "A teacher that starts as a copy of the student and has no gradients"
    teacher = copy.deepcopy(student).eval()
    return teacher.requires_grad_(False)


@torch.no_grad()
def update_teacher(
    teacher: nn.Module,  # changed in place
    student: nn.Module,  # of the same structure
    decay: float,  # m_t
):
    "One update of all trainable parameters (@eq-teacher-ema); buffers (frozen statistics) are copied"
    pairs = [(t, s) for t, s in zip(teacher.parameters(), student.parameters()) if s.requires_grad]
    if pairs:
        torch._foreach_lerp_([t for t, _ in pairs], [s.detach() for _, s in pairs], 1 - decay)
    for t, s in zip(teacher.buffers(), student.buffers()):
        t.copy_(s)


# %% [markdown]
# During the first 999 updates the teacher is the mean of the students:

# %%
student = nn.Linear(1, 1, bias=False)
teacher, students = make_teacher(student), []
for t in range(7):
    with torch.no_grad():
        student.weight.fill_(float(t * t))
    students.append(student.weight.item())
    update_teacher(teacher, student, ema_decay(t))
assert abs(teacher.weight.item() - sum(students) / len(students)) < 1e-5
teacher.weight.item(), sum(students) / len(students)

# %%
#| label: fig-teacher-decay
#| fig-cap: "With a fixed decay of .999 the random initial weights keep a large share for a thousand iterations; with the ramp their share is zero after the first update."
#| fig-alt: "Share of the initial weights left in the teacher against the iteration, for a fixed decay and for the ramp"
steps = list(range(3000))
share, left = [], 1.0
for t in steps:
    left *= ema_decay(t)
    share.append(left)
fig, ax = plt.subplots(figsize=(5, 2.6), dpi=80)
ax.plot(steps, [0.999 ** (t + 1) for t in steps], '--', color='grey', label='fixed .999')
ax.plot(steps, share, color='#ff7f0e', label='ramp')
ax.set(xlabel='iteration', ylabel='share of the random start')
ax.legend()
plt.show()


# %% [markdown]
# ## Pseudo labels
#
# The teacher predicts on the weak view, without gradient. Its detections pass non-maximum suppression within
# each class (the one-to-many stage produces duplicates) and a filter on the score. Boxes are kept in pixels of
# the weak view, together with their scores.
#
# Suppression within a class leaves two boxes on an object that the teacher predicts as a 3 and as an 8, and
# the student is trained to have a query for each. Where objects hardly ever overlap, `cross_nms` keeps only
# the box with the highest score; the paper has no such step (@sec-abl-nms has counts).

# %%
#| export
@dataclass(frozen=True)
class PseudoConfig:
    "Which of the teacher's detections become pseudo labels (paper section 3; values of the code)"

    threshold: float = 0.4  # minimum score of B^sup (with `semi_detr` out of B^0); above 1: no box
    nms: float = 0.6  # IoU of the suppression within a class
    cross_nms: float = 1.0  # IoU of a suppression across classes after it; 1: none, as in paper and code
    min_score: float = 0.01  # minimum score of a detection
    top_k: int = 300  # maximum number of detections per image
    min_side: float = 1.0  # pixels; smaller boxes are dropped after transport (the code keeps them)

    def __post_init__(self):
        in_range('pseudo', self, threshold=0, nms=(0, 1), cross_nms=(0, 1), min_score=(0, 1), top_k=1)


# %%
#| export
_PER_BOX = ('boxes', 'labels', 'scores', 'source', 'boxes_strong')  # entries with one row per box


def keep_boxes(
    detections: list,  # per image a dict of tensors with one row per box, perhaps among other entries
    masks: list,  # per image (K,) bool, or indices of rows
) -> list:  # the same dicts with fewer boxes
    "Select boxes by one mask per image; entries that do not belong to boxes stay as they are"
    return [{k: v[m] if k in _PER_BOX else v for k, v in d.items()} for d, m in zip(detections, masks)]


def check_finite(
    values: list,  # tensors (B,...)
    targets: list,  # of the B images
    what: str,  # is checked, for the message
):
    """`NonFiniteError` for the first image with NaN or infinity. A score that is NaN passes no threshold, so
    without it the image would have no pseudo label, and nobody would notice"""
    fine = torch.stack([v.isfinite().flatten(1).all(1) for v in values]).all(0)
    if not fine.all():
        b = fine.int().argmin().item()
        raise NonFiniteError(
            f'image {targets[b]["image_id"]} (number {b} of the batch): {what} are NaN or infinite; '
            'look at this image and its weak view, or lower the learning rate'
        )


@torch.no_grad()
def teacher_detections(
    outputs: dict,  # of the teacher on the weak view
    targets: list,  # of the weak view, for the sizes
    cfg: PseudoConfig = PseudoConfig(),
) -> list:  # per image dict(boxes (K,4) xyxy pixels of the weak view, labels (K,), scores (K,) descending)
    """Detections above `min_score` after suppression within classes, with `cross_nms < 1` also across them

    They are read from the last decoder layer, also where a learned suppressor follows it (@sec-suppressor).
    `NonFiniteError` where an output is NaN or infinite.
    """
    read = [outputs[k] for k in ('pred_logits', 'scores', 'pred_boxes') if k in outputs]
    check_finite(read, targets, "the teacher's outputs")
    sizes = [t['size'] for t in targets]
    rules = dict(top_k=cfg.top_k, nms=cfg.nms, score_threshold=cfg.min_score)
    detections = post_process(outputs, sizes, **rules, suppressor=False)
    if cfg.cross_nms >= 1:
        return detections
    return keep_boxes(detections, [nms(d['boxes'], d['scores'], cfg.cross_nms) for d in detections])


# %%
#| export
def fixed_threshold(
    scores: Tensor,  # (K,) of one image
    threshold: float = 0.4,
) -> Tensor:  # (K,) bool
    "Scores of at least `threshold`"
    return scores >= threshold


# %%
three = [
    dict(image_id=1, boxes=torch.rand(3, 4), labels=torch.arange(3), scores=torch.tensor([0.9, 0.3, 0.6]))
]
confident = keep_boxes(three, [fixed_threshold(d['scores'], 0.5) for d in three])[0]
assert confident['labels'].tolist() == [0, 2] and confident['image_id'] == 1
confident['scores']

# %% [markdown]
# A teacher that sees NaN says nothing. That is an error, or the step is left out (@sec-capsule-policy):

# %%
try:
    check_finite(
        [torch.tensor([[0.5, 0.5], [0.5, torch.nan]])], [dict(image_id=7), dict(image_id=8)], 'pixels'
    )
except NonFiniteError as e:
    of_image = str(e)
assert of_image.startswith('image 8 (number 1 of the batch): pixels are NaN')
of_image


# %% [markdown]
# ## From the weak view to the strong one
#
# Each view records the matrix that maps pixels of the original image to its own: $M_t$ for the teacher's
# view, $M_s$ for the student's. A box is moved by
#
# $$
# M = M_s\,M_t^{-1}
# $$ {#eq-teacher-transport}
#
# which is applied to its four corners. The new box is the bounding box of the four points, clipped to the
# view.
#
# ::: {.callout-note}
# ## Paper vs. code
# A box that leaves the strong view collapses to zero size. The official code keeps such boxes as targets:
# one-to-many matching never assigns them, one-to-one matching must. They are dropped here (`min_side`).
# :::

# %%
#| export
def transport(
    detections: list,  # per image, pixels of the weak view
    weak: list,  # targets of the weak views (`matrix`, `size`)
    strong: list,  # targets of the strong views of the same images
    min_side: float = 1.0,  # pixels
) -> list:  # per image the strong target plus boxes (K,4) cxcywh, labels, scores, source (row before)
    "Move boxes to the strong view (@eq-teacher-transport); boxes that leave it are dropped"
    out = []
    for d, w, s in zip(detections, weak, strong):
        matrix = s['matrix'].double() @ torch.linalg.inv(w['matrix'].double())
        xyxy, keep = transform_boxes(d['boxes'], matrix, s['size'], min_side)
        moved = dict(
            boxes=normalize_boxes(xyxy[keep], s['size']),
            labels=d['labels'][keep],
            scores=d['scores'][keep],
            source=keep.nonzero().flatten(),
        )
        out.append({**s, **moved})
    return out


def in_both_views(
    detections: list,  # per image, pixels of the weak view
    moved: list,  # the same boxes after `transport`
) -> list:  # per image the boxes that are still there, with `boxes_strong` (K,4) cxcywh
    "The detections that `transport` has kept, together with their boxes in the strong view"
    kept = keep_boxes(detections, [t['source'] for t in moved])
    return [{**d, 'boxes_strong': t['boxes']} for d, t in zip(kept, moved)]


# %% [markdown]
# In a view of width 100, a flip moves the box (10,20,30,40) to (70,20,90,40); a shift by 500 pixels moves it
# out of the view.

# %%
det = [dict(boxes=torch.tensor([[10.0, 20, 30, 40]]), labels=torch.tensor([3]), scores=torch.tensor([0.8]))]
eye = torch.eye(3, dtype=torch.float64)
flip, shift = eye.clone(), eye.clone()
flip[0, 0], flip[0, 2], shift[0, 2] = -1, 100, 500
here, there = ([dict(matrix=m, size=(100, 100))] for m in (eye, flip))
flipped, shifted = transport(det, here, there), transport(det, here, [dict(matrix=shift, size=(100, 100))])
assert torch.allclose(flipped[0]['boxes'], torch.tensor([[0.8, 0.3, 0.2, 0.2]]))
assert len(shifted[0]['boxes']) == 0
in_both_views(det, flipped), in_both_views(det, shifted)


# %% [markdown]
# ## Back to the file, and into the log
#
# The health monitor (@sec-health) compares pseudo labels with hidden truth, which is in pixels of the file. And
# the log keeps how many pseudo labels there are and how high their scores are.

# %%
#| export
@torch.no_grad()
def teacher_predict(
    teacher,  # detector in eval mode
    part: dict,  # the weak views
    cfg: PseudoConfig,
) -> list:  # per image detections of `teacher_detections`
    "The teacher's detections in the weak views"
    return teacher_detections(teacher(part['images'], part['mask']), part['targets'], cfg)


def to_original(
    detections: list,  # per image, pixels of a view
    targets: list,  # of that view
) -> list:  # per image: image_id, boxes (K,4) xyxy in pixels of the file, labels, scores
    "Take boxes back to the pixels of the image file, where the hidden truth is known"
    out = []
    for d, t in zip(detections, targets):
        to_file = torch.linalg.inv(t['matrix'].double())
        boxes, _ = transform_boxes(d['boxes'], to_file, t['orig_size'], 0.0)
        row = dict(image_id=t['image_id'], boxes=boxes.cpu())
        out.append(row | dict(labels=d['labels'].cpu(), scores=d['scores'].cpu()))
    return out


def pseudo_stats(
    detections: list,  # of the teacher, per image
    pseudo: list,  # those that passed the filter; in `SemiDETR` also inside the strong view
    targets: list,  # those that are left in the strong view
) -> dict:  # plain numbers
    "Number and scores of the pseudo labels, per image"
    n = max(1, len(detections))
    scores = torch.cat([p['scores'] for p in pseudo]) if pseudo else torch.zeros(0)
    best = [float(d['scores'].max()) for d in detections if len(d['scores'])]
    return dict(
        pseudo_boxes=sum(len(p['scores']) for p in pseudo) / n,
        strong_boxes=sum(len(t['labels']) for t in targets) / n,
        pseudo_score=float(scores.mean()) if len(scores) else 0.0,
        empty_images=sum(len(p['scores']) == 0 for p in pseudo) / n,
        top_score=sum(best) / n,
    )


# %%
two_images = [dict(scores=torch.tensor([0.9, 0.5, 0.2])), dict(scores=torch.tensor([0.1]))]
two_confident = keep_boxes(two_images, [d['scores'] >= 0.4 for d in two_images])
still_there = [dict(labels=torch.zeros(1)), dict(labels=torch.zeros(0))]  # one box left the strong view
toy_stats = pseudo_stats(two_images, two_confident, still_there)
assert toy_stats['pseudo_boxes'] == 1.0 and toy_stats['empty_images'] == 0.5
{k: round(v, 3) for k, v in toy_stats.items()}

# %%
on_file = to_original(det, [here[0] | dict(image_id=7, orig_size=(100, 100))])
assert torch.allclose(on_file[0]['boxes'], det[0]['boxes']) and on_file[0]['image_id'] == 7
on_file[0]['boxes']

# %% [markdown]
# ## Summary
#
# - The teacher is an average of students: their exact mean at first, an exponential average later.
# - It labels weak views without gradient. Non-maximum suppression removes duplicates, a threshold on the score
#   uncertain detections.
# - Two recorded matrices move a box between views; a box that leaves the view is dropped.
# - These are functions of tensors; the training step that combines them is in @sec-methods.
#
# ## Exercises
#
# 1. After how many iterations has a student lost half of its weight in a teacher with decay .999?
# 2. Two classes overlap by .7 on one object. Which boxes are left with `nms=.6`, with `cross_nms=.6`?
# 3. Rotate a square box by 45 degrees and back: how much larger is it, and why?
