# %% [markdown]
# # The teacher {#sec-teacher}
#
# > Average a student into a teacher, turn what it sees into pseudo labels, and carry those to the student's
# > view.
#
# A network that labels its own training images soon believes its own mistakes. The mean teacher breaks the
# loop in two places. Its weights are an average over many students, so the noise of single steps cancels; and
# it looks at a gently changed (*weak*) view while the student must find the same objects in a heavily changed
# (*strong*) one. What remains to be decided is which of its detections to trust, and how a box found in one
# view becomes a target in the other.

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


# %% [markdown]
# ## An average that starts as a mean
#
# Let $\theta_t$ be the student before iteration $t$ and $\theta'_t$ the teacher.
#
# $$
# \theta'_t = m_t\,\theta'_{t-1} + (1-m_t)\,\theta_t, \qquad m_t = \min\left(m,\; 1-\frac{1+w}{t+t_0+1+w}\right)
# $$ {#eq-teacher-ema}
#
# With $w=0$ and $t_0=0$ the first step copies the student ($m_0=0$), and until $m_t$ reaches its ceiling $m$
# the teacher is exactly the arithmetic mean of the students seen. A fixed $m=0.999$ from the start would
# instead hold on to the random initial weights for a thousand steps.

# %%
#| export
@dataclass(frozen=True)
class EmaConfig:
    "How the teacher follows the student (paper: decay .999; code: @eq-teacher-ema)"

    decay: float = 0.999  # ceiling m of the decay
    warmup: int = 0  # w; larger follows the student for longer
    start: int = -1  # t_0, updates that the first teacher already stands for; -1: 0 for a new network, and past the ramp for a trained one (run.init)

    def __post_init__(self):
        in_range('ema', self, decay=(0, 1), warmup=0, start=-1)


def ema_decay(
    step: int,  # t, counted from the first update
    cfg: EmaConfig = EmaConfig(),
    trained: bool = False,  # does the teacher begin as a trained network?
) -> float:  # m_t in [0, cfg.decay]
    "Decay of update `step` (@eq-teacher-ema)"
    if trained and cfg.start < 0:
        return cfg.decay
    return min(cfg.decay, 1 - (1 + cfg.warmup) / (step + max(0, cfg.start) + 1 + cfg.warmup))


# %%
assert [round(ema_decay(t), 6) for t in (0, 1, 9, 998, 999)] == [0, 0.5, 0.9, 0.998999, 0.999]
[ema_decay(t) for t in (0, 1, 9, 99, 999, 9999)]

# %% [markdown]
# The ramp forgets the start on purpose, which is right for a random one. A run that goes on from a *trained*
# network (`run.init`) must not: the optimiser is new, its first steps are rough, and with $m_0=0$ the teacher
# would be that rough student. Its scores fall below the threshold, hardly a pseudo label is left, and the
# student is told that unlabelled images are empty. So after `run.init` the decay is $m$ from the first step,
# unless `ema.start` says how many updates the first teacher stands for.

# %%
cold, warm = ([ema_decay(t, trained=known) for t in range(3)] for known in (False, True))
assert cold == [0, 0.5, 1 - 1 / 3] and warm == [0.999] * 3
cold, warm


# %%
#| export
def make_teacher(student: nn.Module) -> nn.Module:  # a frozen copy in eval mode
    "A teacher that starts as its student and never sees a gradient"
    teacher = copy.deepcopy(student).eval()
    return teacher.requires_grad_(False)


@torch.no_grad()
def update_teacher(
    teacher: nn.Module,  # changed in place
    student: nn.Module,
    decay: float,  # m_t
):
    "One step of @eq-teacher-ema over all parameters; buffers (frozen statistics) are copied"
    pairs = [(t, s) for t, s in zip(teacher.parameters(), student.parameters()) if s.requires_grad]
    if pairs:
        torch._foreach_lerp_([t for t, _ in pairs], [s.detach() for _, s in pairs], 1 - decay)
    for t, s in zip(teacher.buffers(), student.buffers()):
        t.copy_(s)


# %% [markdown]
# After $t\le 998$ updates the teacher is the plain mean of the students it saw:

# %%
student = nn.Linear(1, 1, bias=False)
teacher, seen = make_teacher(student), []
for t in range(7):
    with torch.no_grad():
        student.weight.fill_(float(t * t))
    seen.append(student.weight.item())
    update_teacher(teacher, student, ema_decay(t))
assert abs(teacher.weight.item() - sum(seen) / len(seen)) < 1e-5
teacher.weight.item(), sum(seen) / len(seen)

# %%
#| hide
import matplotlib.pyplot as plt

# %%
#| label: fig-teacher-decay
#| fig-cap: "A fixed decay of .999 remembers the random start for a thousand steps; the ramp has forgotten it after the first and is a plain mean until the two meet."
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
# The teacher sees the weak view, without gradient. Its detections pass per-class non-maximum suppression (a
# one-to-many stage leaves duplicates behind), and a filter on the score. Boxes stay in pixels of the weak
# view, together with their scores.
#
# Per class means that an object which the teacher takes for a 3 as well as for an 8 keeps two boxes, and the
# student is taught that two queries belong there. Where objects hardly ever share a place, `cross_nms` leaves
# the best box of each; the paper has no such step (@sec-abl-nms has counts).

# %%
#| export
@dataclass(frozen=True)
class PseudoConfig:
    "Which of the teacher's detections become pseudo labels (paper section 3; code values)"

    threshold: float = (
        0.4  # score from which a box trains the student (B^sup; with `semi_detr` out of B^0); above 1: none
    )
    nms: float = 0.6  # IoU of the per-class suppression
    cross_nms: float = 1.0  # IoU of a suppression across classes after it; 1: none, as the paper and its code
    min_score: float = 0.01  # floor before anything else
    top_k: int = 300  # most detections an image
    min_side: float = 1.0  # pixels; smaller boxes after transport are dropped (the official code keeps them)

    def __post_init__(self):
        in_range('pseudo', self, threshold=0, nms=(0, 1), cross_nms=(0, 1), min_score=(0, 1), top_k=1)


@torch.no_grad()
def teacher_detections(
    outputs: dict,  # the teacher's on the weak view
    targets: list,  # of the weak view; gives the sizes
    cfg: PseudoConfig = PseudoConfig(),
) -> list:  # per image dict(boxes (K,4) xyxy pixels of the weak view, labels (K,), scores (K,) descending)
    "Everything the teacher would swear to at `min_score`, after per-class NMS, and at `cross_nms < 1` one box a place"
    found = post_process(
        outputs, [t['size'] for t in targets], top_k=cfg.top_k, nms=cfg.nms, score_threshold=cfg.min_score
    )
    return (
        found
        if cfg.cross_nms >= 1
        else [
            {k: v[keep] for k, v in d.items()}
            for d in found
            for keep in [nms(d['boxes'], d['scores'], cfg.cross_nms)]
        ]
    )


# %% [markdown]
# Filters share one signature, so that an ablation swaps one for another. *Mean + std* keeps what stands out
# of an image's own scores; it keeps nothing of a single detection, nor of two with different scores, because
# no sample lies a full (unbiased) deviation above the mean of two.

# %%
#| export
def fixed_threshold(
    scores: Tensor,  # (K,) of one image
    threshold: float = 0.4,
) -> Tensor:  # (K,) bool
    "Scores of at least `threshold`"
    return scores >= threshold


def mean_std(
    scores: Tensor,  # (K,) of one image
) -> Tensor:  # (K,) bool
    "Scores of at least mean + unbiased standard deviation; an image with one detection keeps none"
    if len(scores) < 2:
        return torch.zeros_like(scores, dtype=torch.bool)
    return scores >= scores.mean() + scores.std()


# %%
kept = [mean_std(torch.tensor(s)).tolist() for s in ([0.9, 0.1, 0.1, 0.1], [0.9, 0.8], [0.9], [])]
assert kept == [[True, False, False, False], [False, False], [False], []]
kept


# %%
#| export
def keep_boxes(
    detections: list,  # per image dict of tensors with the same first dimension
    masks: list,  # per image (K,) bool
) -> list:  # the same dicts, fewer rows
    "Apply one mask an image"
    return [{k: v[m] for k, v in d.items()} for d, m in zip(detections, masks)]


# %% [markdown]
# ## From the weak view to the strong one
#
# Both views remember the matrix that took the original pixels to theirs, $M_t$ for the teacher's and $M_s$
# for the student's. A box moves by
#
# $$
# M = M_s\,M_t^{-1}
# $$ {#eq-teacher-transport}
#
# applied to its four corners; the hull of the four images, cut at the border of the view, is the new box.
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
) -> (
    list
):  # per image: the strong target plus boxes (K,4) cxcywh, labels, scores, source (index into detections)
    "Carry boxes to the strong view (@eq-teacher-transport); boxes that leave it are dropped"
    out = []
    for d, w, s in zip(detections, weak, strong):
        matrix = s['matrix'].double() @ torch.linalg.inv(w['matrix'].double())
        xyxy, keep = transform_boxes(d['boxes'], matrix, s['size'], min_side)
        out.append(
            {
                **s,
                'boxes': normalize_boxes(xyxy[keep], s['size']),
                'labels': d['labels'][keep],
                'scores': d['scores'][keep],
                'source': keep.nonzero().flatten(),
            }
        )
    return out


# %% [markdown]
# A flip in a view of width 100 sends the box (10,20,30,40) to (70,20,90,40); a shift by 500 pixels sends it
# out of the picture.

# %%
det = [dict(boxes=torch.tensor([[10.0, 20, 30, 40]]), labels=torch.tensor([3]), scores=torch.tensor([0.8]))]
eye = torch.eye(3, dtype=torch.float64)
flip, shift = eye.clone(), eye.clone()
flip[0, 0], flip[0, 2], shift[0, 2] = -1, 100, 500
there = transport(det, [dict(matrix=eye, size=(100, 100))], [dict(matrix=flip, size=(100, 100))])
gone = transport(det, [dict(matrix=eye, size=(100, 100))], [dict(matrix=shift, size=(100, 100))])
assert torch.allclose(there[0]['boxes'], torch.tensor([[0.8, 0.3, 0.2, 0.2]])) and len(gone[0]['boxes']) == 0
there[0]['boxes'], gone[0]['boxes']

# %% [markdown]
# ## Summary
#
# - The teacher is an average of students: exactly the mean at first, exponential later.
# - It labels weak views without gradient; duplicates go by NMS, doubtful boxes by a score filter.
# - A box moves between views by two recorded matrices, and disappears when it leaves the view.
# - Every piece is a function of tensors; the training step that joins them is in @sec-methods.
#
# ## Exercises
#
# 1. How many steps back does a teacher with decay .999 remember half of its weight?
# 2. Why does *mean + std* keep nothing of two different scores?
# 3. Rotate a square box by 45 degrees and back: how much larger is it, and why?
