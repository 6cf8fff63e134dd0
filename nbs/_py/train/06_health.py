# %% [markdown]
# # Health of the pseudo labels {#sec-health}
#
# > Know whether the teacher teaches anything, while it does.
#
# Semi-supervised training fails silently. With a threshold too high the teacher labels nothing, the
# unsupervised loss is a small number that looks like success, and a day later the result equals the
# supervised one. With a threshold too low the student learns its own mistakes. Both are plain to see if
# somebody looks: this chapter looks.

# %%
#| default_exp train.health

# %%
#| export
from collections import deque
from semidetr.train.metrics import pseudo_quality

# %% [markdown]
# ## What is watched
#
# Over the last $W$ steps, with $n_i$ pseudo boxes in unlabelled image $i$ and $g_j$ true boxes in labelled
# image $j$:
#
# $$
# \rho = \frac{\frac1N\sum_i n_i}{\frac1M\sum_j g_j}, \qquad P = \frac{TP}{\sum_i n_i}, \qquad R = \frac{TP}{\sum_i G_i}
# $$ {#eq-health}
#
# Labelled and unlabelled images show the same world, so the ratio $\rho$ of box counts should approach 1.
# Precision $P$ and recall $R$ need the boxes $G_i$ of the unlabelled images, which the method never sees; the
# monitor alone may look, where a data set has them. A pseudo box is a true positive when it overlaps a true
# box of its class with an IoU of at least 0.5. Where a method mines (@sec-mining), precision and recall of
# the mined boxes and of those it chooses from are followed as well.

# %%
#| export
FIELDS = (
    'pseudo_boxes',
    'labelled_boxes',
    'pseudo_score',
    'empty_images',
    'top_score',
    'tp',
    'n_pred',
    'n_gt',
    'mined_tp',
    'mined',
    'initial_tp',
    'initial',
)


def truth_counts(
    pseudo: list,  # per image: image_id, boxes (K,4) xyxy in pixels of the file, labels (K,)
    truth,  # data set that knows the boxes, or None
) -> tuple:  # (true positives, pseudo boxes, true boxes)
    "Compare pseudo boxes with the truth of their images (@eq-health); zeros where the truth is not known"
    total = [0, 0, 0]
    for p in pseudo if getattr(truth, 'has_boxes', False) else ():
        a = truth.annotation(truth.index_of(p['image_id']))
        ok = ~a['ignore']
        counts = pseudo_quality(p['boxes'], p['labels'], a['boxes'][ok], a['labels'][ok])
        total = [t + int(c) for t, c in zip(total, counts)]
    return tuple(total)


# %%
#| export
class HealthMonitor:
    "Pseudo labels of the last `window` steps against labelled images and, where it is known, hidden truth"

    def __init__(
        self,
        truth=None,  # data set that knows the boxes of the unlabelled images
        window: int = 200,  # steps
    ):
        self.truth, self.window, self.warned, self.rows = truth, window, False, deque(maxlen=window)

    def add(
        self,
        stats: dict,  # of a method (@sec-methods)
    ) -> str | None:  # a warning, at most once a run
        "Count one step"
        if 'pseudo' not in stats:
            return None
        self.rows.append(
            [
                *(stats[k] for k in FIELDS[:5]),
                *truth_counts(stats['pseudo'], self.truth),
                *(n for k in ('mined', 'initial') for n in truth_counts(stats.get(k, ()), self.truth)[:2]),
            ]
        )
        if self.warned or len(self.rows) < self.window or any(r[0] for r in self.rows):
            return None
        self.warned = True
        return (
            f'no pseudo label in {self.window} iterations (best score of the teacher: {self.rows[-1][4]:.2f}): the unlabelled images teach '
            'nothing. Lower pseudo.threshold, lengthen method.burn_in_iters, or check that both data sets show the same things.'
        )

    def summary(self) -> dict:  # means over the window; precision and recall where the truth is known
        "What goes into the log"
        if not self.rows:
            return {}
        out = {k: sum(r[i] for r in self.rows) / len(self.rows) for i, k in enumerate(FIELDS[:4])}
        tp, n_pred, n_gt, *others = (sum(r[i] for r in self.rows) for i in range(5, len(FIELDS)))
        share = lambda part, whole: (
            part / whole if whole else float('nan')
        )  # no boxes, or scenes that are truly empty
        if n_gt or n_pred:
            out |= dict(pseudo_precision=share(tp, n_pred), pseudo_recall=share(tp, n_gt))
        for name, tp, n in zip(('mined', 'initial'), others[::2], others[1::2]):
            if n:
                out |= {f'{name}_precision': tp / n, f'{name}_recall': share(tp, n_gt)}
        return out

    def state_dict(self) -> dict:
        return dict(rows=[list(r) for r in self.rows], warned=self.warned)

    def load_state_dict(self, state: dict):
        self.rows.extend(state['rows'])
        self.warned = state['warned']


# %% [markdown]
# ## A threshold, seen by the monitor
#
# A toy teacher finds every object of a scene with a score between 0 and 1, and as many things that are not
# there with lower scores. The threshold trades precision for recall:

# %%
#| hide
import torch
import matplotlib.pyplot as plt
from semidetr.draw import COLORS


# %%
class Scenes:  # ten true boxes in every scene
    has_boxes = True
    boxes = torch.stack([torch.tensor([20.0 * i, 0, 20.0 * i + 10, 10]) for i in range(10)])

    def index_of(self, image_id):
        return image_id

    def annotation(self, i):
        return dict(
            boxes=self.boxes,
            labels=torch.zeros(10, dtype=torch.long),
            ignore=torch.zeros(10, dtype=torch.bool),
        )


def toy_step(threshold, g):
    good, bad = torch.rand(10, generator=g), torch.rand(10, generator=g) * 0.6
    boxes, scores = torch.cat([Scenes.boxes, Scenes.boxes + 1000]), torch.cat([good, bad])
    keep = scores >= threshold
    return dict(
        pseudo_boxes=float(keep.sum()),
        labelled_boxes=10.0,
        pseudo_score=0.0,
        empty_images=0.0,
        top_score=float(scores.max()),
        pseudo=[dict(image_id=0, boxes=boxes[keep], labels=torch.zeros(int(keep.sum()), dtype=torch.long))],
    )


thresholds = [i / 20 for i in range(19)]
seen = []
for th in thresholds:
    g, monitor = torch.Generator().manual_seed(0), HealthMonitor(Scenes(), 50)
    for _ in range(50):
        monitor.add(toy_step(th, g))
    seen.append(monitor.summary())
assert (
    seen[0]['pseudo_recall'] == 1 and seen[0]['pseudo_precision'] == 0.5 and seen[-2]['pseudo_precision'] == 1
)
seen[8]

# %%
#| label: fig-health-threshold
#| fig-cap: "A higher threshold buys precision with recall; the number of boxes, which needs no truth, shows where half of the objects have been lost."
#| fig-alt: "Precision, recall and ratio of box counts against the threshold"
fig, ax = plt.subplots(figsize=(5, 2.8), dpi=80)
for key, color, scale in (
    ('pseudo_precision', COLORS['teacher'], 1),
    ('pseudo_recall', COLORS['student'], 1),
    ('pseudo_boxes', 'grey', 10),
):
    ax.plot(
        thresholds,
        [s[key] / scale for s in seen],
        color=color,
        label=key.removeprefix('pseudo_') if scale == 1 else 'boxes, of the true number',
    )
ax.set(xlabel='threshold', ylim=(0, 2))
ax.legend()
plt.show()

# %% [markdown]
# ## Silence is an alarm
#
# A teacher whose best score stays under the threshold labels nothing at all. After a whole window of that the
# monitor speaks, once:

# %%
monitor = HealthMonitor(window=3)
silent = dict(
    pseudo_boxes=0.0, labelled_boxes=4.0, pseudo_score=0.0, empty_images=1.0, top_score=0.12, pseudo=[]
)
said = [monitor.add(silent) for _ in range(5)]
assert [m is not None for m in said] == [False, False, True, False, False]
said[2]

# %% [markdown]
# ## Summary
#
# - The number of pseudo boxes an image, against labelled images, is the first thing to look at: it needs no
#   hidden truth.
# - Precision and recall are measured where a data set knows its boxes; the method never gets them.
# - A whole window without pseudo labels raises one warning that says what to change.
# - The window is part of the checkpoint, so a resumed run watches on.
#
# ## Exercises
#
# 1. In the toy, which threshold makes the number of pseudo boxes right, and what are precision and recall
#    there?
# 2. Why may $\rho=1$ hide a bad teacher?
# 3. What does the monitor see when labelled images were chosen because they are crowded?
