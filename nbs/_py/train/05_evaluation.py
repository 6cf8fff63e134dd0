# %% [markdown]
# # Evaluation {#sec-evaluation}
#
# > Run a network over a data set, and get detections in pixels of the files and COCO metrics.
#
# A detector sees a resized view and predicts in its coordinates; the metric is computed in those of the file.
# Between the two lie one scale factor per axis and one decision: whether to suppress duplicates. A detection
# transformer trained one-to-one needs no suppression, so there is none by default; switching it on is an
# experiment.

# %%
#| default_exp train.evaluation

# %%
#| export
import contextlib
import torch
import torch.distributed as dist
from torchvision.ops import batched_nms
from semidetr.core import rank, rng_state, set_rng_state, world_size
from semidetr.data.datasets import Subset
from semidetr.detectors.contract import has_suppressor, post_process
from semidetr.progress import track
from semidetr.data.loader import EvalLoader
from semidetr.semi.teacher import keep_boxes
from semidetr.train.metrics import evaluate


# %%
#| export
def to_device(
    batch,  # nested dicts and lists of tensors and other values
    device,  # where the tensors go
):  # the same nesting
    "Move every tensor of a batch; other values stay as they are"
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {k: to_device(v, device) for k, v in batch.items()}
    if isinstance(batch, list):
        return [to_device(v, device) for v in batch]
    return batch


@torch.no_grad()
def detect(
    model,  # Detector
    ds,  # DetectionDataset
    view,  # ViewConfig
    device='cpu',  # where the model is
    batch_size: int = 8,  # images
    nms=None,  # IoU of per-class suppression; None: none
    top_k: int = 300,  # most detections per image
    progress: str = '',  # text of the progress bar; '' for no bar
    num_workers: int = 0,  # processes that load images
    suppressor: bool = True,  # read the scores of a learned suppressor, if the detector has one
) -> dict:  # image_id -> dict(scores (K,), labels (K,), boxes (K,4) xyxy in pixels of the file)
    "Detections of a whole data set"
    training = model.training
    model.eval()
    min_score = 0.0 if nms is None else 0.01
    out = {}
    try:
        loader = EvalLoader(ds, view, batch_size, num_workers)
        for batch in track(loader, progress, 'batch', show=bool(progress), leave=False):
            batch = to_device(batch, device)
            outputs = model(batch['images'], batch['mask'])
            sizes = [t['size'] for t in batch['targets']]
            rules = dict(top_k=top_k, nms=nms, score_threshold=min_score, suppressor=suppressor)
            detections = post_process(outputs, sizes, **rules)
            for t, d in zip(batch['targets'], detections):
                h, w = t['size']
                file_h, file_w = t['orig_size']
                factors = file_w / w, file_h / h, file_w / w, file_h / h
                d['boxes'] = d['boxes'] * torch.tensor(factors, device=d['boxes'].device)
                out[t['image_id']] = {k: v.cpu() for k, v in d.items()}
    finally:
        model.train(training)
    return out


# %%
#| export
@contextlib.contextmanager
def same_rng():
    "Restore the random state on leaving (starting worker processes draws a number)"
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


def suppress(
    detections: dict,  # from `detect`
    iou: float = 0.6,  # above it, the lower-scoring of two boxes of a class is removed
    min_score: float = 0.01,  # scores must be larger
) -> dict:  # the same with fewer detections
    """Per-class suppression after the cut to `top_k`.

    In its first stage the published code suppresses before that cut: `detect(nms=.6)`.
    """
    kept = list(detections.values())
    kept = keep_boxes(kept, [d['scores'] > min_score for d in kept])
    kept = keep_boxes(kept, [batched_nms(d['boxes'], d['scores'], d['labels'], iou) for d in kept])
    return dict(zip(detections, kept))


def evaluate_model(
    model,  # Detector
    ds,  # DetectionDataset with boxes
    view,  # ViewConfig
    device='cpu',  # where the model is
    nms=None,  # IoU of per-class suppression; None: none
    progress: str = '',  # text of the progress bar; '' for no bar
    num_workers: int = 0,  # processes that load images
    both: bool = False,  # evaluate again after `suppress`: adds AP_nms and AP50_nms
    max_dets: int = 100,  # detections per image that count
    suppressor: bool = True,  # False: the last decoder layer is evaluated, whatever follows it
    measured: dict | None = None,  # gets the detections that are counted
) -> dict:  # from `evaluate`
    """COCO metrics of one network; several processes share the images

    With `both`, a detector with a learned suppressor is evaluated without it as well: keys that end in _o2m,
    AP_o2m, AP_nms_o2m and so on.
    """
    share = Subset(ds, range(rank(), len(ds), world_size())) if world_size() > 1 else ds
    reading = dict(progress=progress, num_workers=num_workers, suppressor=suppressor)
    with same_rng():
        how = dict(nms=nms, top_k=max(300, max_dets), **reading)
        found = detect(model, share, view, device, **how)
    if world_size() > 1:
        shares = [None] * world_size()
        dist.all_gather_object(shares, found)
        found = {k: v for s in shares for k, v in s.items()}
    if measured is not None:
        measured.update(found)
    result = evaluate(ds, found, max_dets=max_dets)
    if both:
        result |= {f'{k}_nms': v for k, v in evaluate(ds, suppress(found), True, max_dets).items()}
    if both and suppressor and has_suppressor(model):
        plain = evaluate_model(model, ds, view, device, nms, progress, num_workers, True, max_dets, False)
        result |= {f'{k}_o2m': plain[k] for k in ('AP', 'AP50', 'AP_nms', 'AP50_nms')}
    return result


# %% [markdown]
# ## A check with a perfect detector
#
# A stand-in that returns the true boxes, one query per object, must reach AP 100 at every size of the view.
# An error in the scale between view and file would lower it.

# %%
#| hide
import matplotlib.pyplot as plt
from semidetr.data.augment import ViewConfig
from semidetr.boxes import normalize_boxes
from semidetr.data.catalog import open_dataset


# %%
class Oracle(torch.nn.Module):
    "Returns the true boxes, scene by scene, shifted by a fraction of their width"

    def __init__(self, ds, shift=0.0):
        super().__init__()
        self.ds, self.shift, self.next = ds, shift, 0

    def forward(self, images, mask):
        logits = torch.full((len(images), 8, 10), -9.0)
        boxes = torch.full((len(images), 8, 4), 0.5)
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
# A detector that predicts every box twice loses AP to the duplicates; suppression recovers it. The difference
# between the two results shows whether a network still needs suppression:

# %%
class Twice(Oracle):
    "Returns every true box a second time, slightly shifted"

    def forward(self, images, mask):
        out = super().forward(images, mask)
        return {k: torch.cat([v, v + (0.01 if k == 'pred_boxes' else 0.0)], 1) for k, v in out.items()}


doubled = evaluate_model(Twice(scenes), scenes, view, both=True)
assert doubled['AP'] < 95 and doubled['AP_nms'] > doubled['AP']
round(doubled['AP'], 1), round(doubled['AP_nms'], 1)

# %%
#| label: fig-evaluation-shift
#| fig-cap: "A shift by a tenth of the width costs much AP and no AP50: AP averages over IoU thresholds up to 0.95."
#| fig-alt: "AP, AP50 and AP75 against the shift of all boxes"
shifts = [0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4]
rows = [evaluate_model(Oracle(scenes, s), scenes, view) for s in shifts]
fig, ax = plt.subplots(figsize=(5, 2.8), dpi=80)
for key in ('AP', 'AP50', 'AP75'):
    ax.plot(shifts, [r[key] for r in rows], 'o-', label=key)
ax.set(xlabel='shift, as a fraction of the width')
ax.legend()
plt.show()

# %% [markdown]
# ## Summary
#
# - `detect` runs a network over a data set and returns boxes in pixels of the files.
# - `evaluate_model` computes the COCO metrics; several processes share the images. With `both` it evaluates
#   with and without suppression, and a detector with a learned suppressor (@sec-suppressor) also without it.
# - Evaluation does not change the random numbers of training: the random state is restored.
# - No suppression is the default; `nms` is for one-to-many stages.
#
# ## Exercises
#
# 1. From the figure: what is the IoU of a box with a copy of itself, shifted by a tenth of the width?
# 2. Which detections does the cut to the best 300 lose when there are 900 queries and 80 classes?
# 3. Why must `detect` put the network back into training mode even after an error?
