# %% [markdown]
# # Health of the pseudo labels {#sec-health}
#
# > Find out during training whether the teacher's labels are worth learning from.
#
# Semi-supervised training fails silently. With a threshold too high the teacher labels nothing, the
# unsupervised loss is a small number that looks like success, and a day later the result equals the
# supervised one. With a threshold too low the student learns its own mistakes. Both show in a few numbers,
# and this chapter follows them.

# %%
#| default_exp train.health

# %%
#| export
from collections import deque
from semidetr.many import rows_of_all
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
# Labelled and unlabelled images show similar scenes, so the ratio $\rho$ of box counts should approach 1.
# Precision $P$ and recall $R$ need the boxes $G_i$ of the unlabelled images, which no method gets; only the
# monitor uses them, where a data set has them. A pseudo box is a true positive when it overlaps a true box of
# its class with an IoU of at least 0.5. Where a method mines (@sec-mining), precision and recall of the mined
# boxes and of those it chooses from are followed as well.

# %%
#| export
NUMBERS = ('pseudo_boxes', 'labelled_boxes', 'pseudo_score', 'empty_images')  # scalars that are averaged
CURVES = tuple(
    f'{name}_{what}' for name in ('pseudo', 'mined', 'initial') for what in ('precision', 'recall')
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
        self.truth, self.window = truth, window
        self.warned = False
        self.rows = deque(maxlen=window)

    def add(
        self,
        scalars: dict,  # of a step (@sec-methods)
        boxes: dict,  # of a step: name -> boxes per image; nothing is counted without 'pseudo'
    ) -> str | None:  # a warning, at most once per run
        "Count one step"
        if 'pseudo' not in boxes:
            return None
        row = {k: scalars.get(k, 0.0) for k in (*NUMBERS, 'top_score')}
        for name, found in boxes.items():
            row[f'{name}_tp'], row[f'{name}_n'], truth_n = truth_counts(found, self.truth)
            if name == 'pseudo':
                row['truth_n'] = truth_n
        self.rows.append(row)
        if (
            self.warned
            or 'region_points' in scalars  # labels at points (@sec-dense-teacher) are no boxes
            or len(self.rows) < self.window
            or any(r['pseudo_boxes'] for r in self.rows)
        ):
            return None
        self.warned = True
        score = f'{row["top_score"]:.2f}'
        return (
            f'no pseudo label in {self.window} iterations (best score of the teacher: {score}): the '
            'unlabelled images teach nothing. Lower its threshold (of most methods pseudo.threshold), '
            'lengthen method.burn_in_iters, or check that both data sets show the same things.'
        )

    def summary(self) -> dict:  # means over the window; precision and recall where the truth is known
        "What goes into the log, over all processes; each of them must call it"
        rows = rows_of_all(list(self.rows))
        if not rows:
            return {}
        out = {k: sum(r[k] for r in rows) / len(rows) for k in NUMBERS}
        names = dict.fromkeys(k.removesuffix('_tp') for r in rows for k in r if k.endswith('_tp'))
        truth_n = sum(r['truth_n'] for r in rows)
        for name in names:
            tp, n = (sum(r.get(f'{name}_{k}', 0) for r in rows) for k in ('tp', 'n'))
            if n or (name == 'pseudo' and truth_n):
                out[f'{name}_precision'] = _share(tp, n)
                out[f'{name}_recall'] = _share(tp, truth_n)
        return out

    def state_dict(self) -> dict:
        return dict(rows=list(self.rows), warned=self.warned)

    def load_state_dict(self, state: dict):
        self.rows.extend(r if isinstance(r, dict) else dict(zip(LIST_ORDER, r)) for r in state['rows'])
        self.warned = state['warned']


def _share(part, whole):
    "nan without boxes, or where scenes are truly empty"
    return part / whole if whole else float('nan')


LIST_ORDER = (  # of a row in checkpoints of version 0.1.0, which were lists
    *NUMBERS,
    'top_score',
    *('pseudo_tp', 'pseudo_n', 'truth_n'),
    *('mined_tp', 'mined_n', 'initial_tp', 'initial_n'),
)

# %% [markdown]
# ## The effect of a threshold
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
    n = int(keep.sum())
    predictions = dict(image_id=0, boxes=boxes[keep], labels=torch.zeros(n, dtype=torch.long))
    scalars = dict(pseudo_boxes=float(n), labelled_boxes=10.0, top_score=float(scores.max()))
    return scalars, dict(pseudo=[predictions])


thresholds = [i / 20 for i in range(19)]
summaries = []
for th in thresholds:
    g, monitor = torch.Generator().manual_seed(0), HealthMonitor(Scenes(), 50)
    for _ in range(50):
        monitor.add(*toy_step(th, g))
    summaries.append(monitor.summary())
assert summaries[0]['pseudo_recall'] == 1 and summaries[0]['pseudo_precision'] == 0.5
assert summaries[-2]['pseudo_precision'] == 1
summaries[8]

# %%
#| label: fig-health-threshold
#| fig-cap: "A higher threshold trades recall for precision; the number of boxes, which needs no truth, shows where half of the objects have been lost."
#| fig-alt: "Precision, recall and ratio of box counts against the threshold"
fig, ax = plt.subplots(figsize=(5, 2.8), dpi=80)
ax.plot(thresholds, [x['pseudo_precision'] for x in summaries], color=COLORS['teacher'], label='precision')
ax.plot(thresholds, [x['pseudo_recall'] for x in summaries], color=COLORS['student'], label='recall')
share = [x['pseudo_boxes'] / 10 for x in summaries]
ax.plot(thresholds, share, color='grey', label='boxes, relative to the true number')
ax.set(xlabel='threshold', ylim=(0, 2))
ax.legend()
plt.show()

# %% [markdown]
# ## The warning
#
# A teacher whose best score stays under the threshold labels nothing at all. After a whole window of that the
# monitor warns, once:

# %%
monitor = HealthMonitor(window=3)
silent = dict(pseudo_boxes=0.0, labelled_boxes=4.0, empty_images=1.0, top_score=0.12)
warnings = [monitor.add(silent, dict(pseudo=[])) for _ in range(5)]
assert [m is not None for m in warnings] == [False, False, True, False, False]
warnings[2]

# %% [markdown]
# ## Summary
#
# - The number of pseudo boxes per image, relative to labelled images, is the first thing to look at: it needs
#   no hidden truth.
# - Precision and recall are measured where a data set knows its boxes; the method never gets them.
# - A whole window without pseudo labels raises one warning that says what to change.
# - The window is part of the checkpoint, so a resumed run continues it.
#
# ## Exercises
#
# 1. In the toy, which threshold makes the number of pseudo boxes right, and what are precision and recall
#    there?
# 2. Why may $\rho=1$ hide a bad teacher?
# 3. What does the monitor report when labelled images were chosen because they are crowded?
