# %% [markdown]
# # Evaluation {#sec-evaluation}
#
# > From a network and a data set to detections in pixels of the files, and to COCO metrics.
#
# A detector sees a resized view and speaks in its coordinates; the metric counts in those of the file.
# Between the two lies one scale an axis, and one decision: whether to suppress duplicates. A detection
# transformer trained one-to-one needs no suppression, so the default is none, and asking for it is an
# experiment.

# %%
#| default_exp train.evaluation

# %%
#| export
import contextlib
import torch
import torch.distributed as dist
from torchvision.ops import batched_nms
from tqdm import tqdm
from semidetr.core import rank, rng_state, set_rng_state, world_size
from semidetr.data.datasets import Subset
from semidetr.detectors.contract import post_process
from semidetr.data.loader import EvalLoader
from semidetr.train.metrics import evaluate


# %%
#| export
def to_device(
    part,  # nested dicts and lists of tensors
    device,
):
    "Move every tensor of a batch"
    if isinstance(part, torch.Tensor):
        return part.to(device, non_blocking=True)
    if isinstance(part, dict):
        return {k: to_device(v, device) for k, v in part.items()}
    if isinstance(part, list):
        return [to_device(v, device) for v in part]
    return part


@torch.no_grad()
def detect(
    model,  # Detector
    ds,  # DetectionDataset
    view,  # ViewConfig
    device='cpu',
    batch_size: int = 8,
    nms=None,  # IoU of per-class suppression; None: none
    top_k: int = 300,
    progress: str = '',  # text of the bar; '' for no bar
    num_workers: int = 0,
) -> dict:  # image_id -> dict(scores, labels, boxes xyxy in pixels of the file)
    "Detections of a whole data set"
    training = model.training
    model.eval()
    out = {}
    try:
        loader = EvalLoader(ds, view, batch_size, num_workers)
        for part in tqdm(loader, desc=progress, disable=not progress, leave=False):
            part = to_device(part, device)
            found = post_process(
                model(part['images'], part['mask']),
                [t['size'] for t in part['targets']],
                top_k=top_k,
                nms=nms,
                score_threshold=0.0 if nms is None else 0.01,
            )
            for t, d in zip(part['targets'], found):
                h, w = t['size']
                oh, ow = t['orig_size']
                scale = torch.tensor([ow / w, oh / h, ow / w, oh / h], device=d['boxes'].device)
                out[t['image_id']] = dict(
                    scores=d['scores'].cpu(), labels=d['labels'].cpu(), boxes=(d['boxes'] * scale).cpu()
                )
    finally:
        model.train(training)
    return out


# %%
#| export
@contextlib.contextmanager
def same_rng():
    "What runs inside leaves the random state as it found it (starting worker processes draws a number)"
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


def suppress(
    found: dict,  # of `detect`
    iou: float = 0.6,  # of two boxes of one class, of which the lower score goes
    least: float = 0.01,  # score
) -> dict:  # the same with fewer detections
    "Per-class suppression of the detections that are there. (The published code suppresses before it cuts to `top_k` in its first stage: `detect(nms=.6)`)"
    out = {}
    for i, d in found.items():
        d = {k: v[d['scores'] > least] for k, v in d.items()}
        keep = batched_nms(d['boxes'], d['scores'], d['labels'], iou)
        out[i] = {k: v[keep] for k, v in d.items()}
    return out


def evaluate_model(
    model,  # Detector
    ds,  # DetectionDataset with boxes
    view,  # ViewConfig
    device='cpu',
    nms=None,  # IoU; None: no suppression
    progress: str = '',
    num_workers: int = 0,
    both: bool = False,  # count again with `suppress`: adds AP_nms and AP50_nms
) -> dict:  # of `evaluate`
    "COCO metrics of one network; several processes share the images"
    part = Subset(ds, range(rank(), len(ds), world_size())) if world_size() > 1 else ds
    with same_rng():
        found = detect(model, part, view, device, nms=nms, progress=progress, num_workers=num_workers)
    if world_size() > 1:
        parts = [None] * world_size()
        dist.all_gather_object(parts, found)
        found = {k: v for p in parts for k, v in p.items()}
    result = evaluate(ds, found)
    if both:
        result |= {f'{k}_nms': v for k, v in evaluate(ds, suppress(found), brief=True).items()}
    return result


# %% [markdown]
# ## A detector that knows everything
#
# A stand-in that returns the true boxes, one query an object, must come out with AP 100, whatever the size of
# the view. If the scale between view and file were wrong anywhere, it would not.

# %%
#| hide
import matplotlib.pyplot as plt
from semidetr.data.augment import ViewConfig
from semidetr.boxes import normalize_boxes
from semidetr.data.catalog import open_dataset


# %%
class Oracle(torch.nn.Module):
    "True boxes of scene after scene, moved by a share of their width"

    def __init__(self, ds, shift=0.0):
        super().__init__()
        self.ds, self.shift, self.next = ds, shift, 0

    def forward(self, images, mask):
        logits, boxes = torch.full((len(images), 8, 10), -9.0), torch.full((len(images), 8, 4), 0.5)
        for b in range(len(images)):
            a = self.ds.annotation(self.next)
            n = len(a['labels'])
            self.next += 1
            boxes[b, :n] = normalize_boxes(a['boxes'], a['size'])
            boxes[b, :n, 0] += self.shift * boxes[b, :n, 2]
            logits[b, torch.arange(n), a['labels']] = 9.0
        return dict(pred_logits=logits, pred_boxes=boxes)


scenes = open_dataset('digits:n=30', 'val')
view = ViewConfig(short_sides=(64,), eval_short=64, max_side=128)
perfect = evaluate_model(Oracle(scenes), scenes, view)
assert perfect['AP'] > 99.9
perfect['AP'], perfect['AP50']


# %% [markdown]
# A detector that says everything twice loses AP to its duplicates; suppression gives it back. The difference
# between the two counts tells whether a network still needs suppression:

# %%
class Twice(Oracle):
    "Every true box a second time, a little to the side"

    def forward(self, images, mask):
        out = super().forward(images, mask)
        return {k: torch.cat([v, v + (0.01 if k == 'pred_boxes' else 0.0)], 1) for k, v in out.items()}


doubled = evaluate_model(Twice(scenes), scenes, view, both=True)
assert doubled['AP'] < 95 and doubled['AP_nms'] > doubled['AP']
round(doubled['AP'], 1), round(doubled['AP_nms'], 1)

# %%
#| label: fig-evaluation-shift
#| fig-cap: "Boxes that are a tenth of their width off cost AP dearly and AP50 nothing: AP averages over IoU thresholds up to 0.95."
#| fig-alt: "AP, AP50 and AP75 against the shift of all boxes"
shifts = [0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4]
rows = [evaluate_model(Oracle(scenes, s), scenes, view) for s in shifts]
fig, ax = plt.subplots(figsize=(5, 2.8), dpi=80)
for key in ('AP', 'AP50', 'AP75'):
    ax.plot(shifts, [r[key] for r in rows], 'o-', label=key)
ax.set(xlabel='shift, of the width')
ax.legend()
plt.show()

# %% [markdown]
# ## Summary
#
# - `detect` runs a network over a data set and speaks in pixels of the files.
# - `evaluate_model` adds the COCO metrics; several processes share the images. With `both` it counts with and
#   without suppression.
# - Evaluating draws no random number that training would miss: the random state is put back.
# - No suppression is the default; `nms` is for one-to-many stages.
#
# ## Exercises
#
# 1. From the picture: which IoU does a box have that is shifted by a tenth of its width?
# 2. Which detections does the top-300 cut lose when there are 900 queries and 80 classes?
# 3. Why must `detect` put the network back into training mode even after an error?
