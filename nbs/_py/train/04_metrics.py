# %% [markdown]
# # Metrics {#sec-metrics}
#
# > Measure a set of detections with the numbers that papers report, and know what those numbers leave out.
#
# Average precision is quoted to a tenth and computed in a dozen ways. The COCO numbers here come from
# pycocotools, the reference implementation, wrapped so that it is silent, accepts image ids of any type and
# handles empty sets. The PASCAL VOC number is simple enough to implement here, and serves to explain both. A
# third measure compares *pseudo labels* with hidden ground truth; it is for monitoring a run, never for
# training.

# %%
#| default_exp train.metrics

# %%
#| export
import contextlib
import io
import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from semidetr.boxes import box_iou
from semidetr.core import DataError

# %%
from types import SimpleNamespace
import matplotlib.pyplot as plt


# %% [markdown]
# ## Hits
#
# The detections of one class in one image are taken in order of their scores. Each is compared with the
# object that it overlaps most. If the IoU is at least .5 and the object is still free, the detection is a hit
# (a true positive); a second detection of the same object is a false positive. Crowds and difficult objects
# are ignored: they need not be found, and detections that fall on them are not counted.

# %%
#| export
def match_detections(
    boxes,  # (K,4) xyxy detections of one class in one image, best score first
    gt,  # (N,4) xyxy objects of that class, same unit
    ignore=None,  # (N,) bool: crowd or difficult, neither hit nor miss; None = none
    iou: float = 0.5,  # smallest overlap of a hit
) -> np.ndarray:  # (K,) 1 hit, 0 false positive, -1 not counted
    "PASCAL VOC rule: each detection is compared with the object it overlaps most; an object counts once"
    boxes = torch.as_tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    gt = torch.as_tensor(gt, dtype=torch.float64).reshape(-1, 4)
    ignore = np.zeros(len(gt), bool) if ignore is None else np.asarray(ignore, bool)
    out, taken = np.zeros(len(boxes), int), ignore.copy()
    if not len(gt):
        return out
    best, index = box_iou(boxes, gt).max(1)
    for i, (overlap, j) in enumerate(zip(best.tolist(), index.tolist())):
        if overlap < iou:
            continue
        if ignore[j]:
            out[i] = -1
        elif not taken[j]:
            out[i], taken[j] = 1, True
    return out


# %%
cell = (0, 0, 10, 10)
other = (50, 50, 60, 60)
verdict = match_detections([cell, (0, 0, 10, 9), (50, 50, 60, 54)], [cell, other])
assert verdict.tolist() == [1, 0, 0]  # found; found again; overlap .4
assert match_detections([cell, cell], [cell], ignore=[True]).tolist() == [-1, -1]
verdict


# %% [markdown]
# ## Precision, recall, and the area between
#
# Sort the detections of all images by score. Let $h_i$ be 1 if the $i$-th of them is a hit and 0 otherwise,
# and $n$ the number of objects. After $k$ detections
#
# $$
# \mathrm{recall}_k = \frac{1}{n}\sum_{i\le k} h_i, \qquad \mathrm{precision}_k = \frac{1}{k}\sum_{i\le k} h_i.
# $$ {#eq-metrics-pr}
#
# Precision zigzags. For average precision, each value is first raised to the best one at the same or a higher
# recall; then the area under the curve is taken:
#
# $$
# \mathrm{AP} = \sum_k (\mathrm{recall}_k-\mathrm{recall}_{k-1})\,\max_{l\ge k}\mathrm{precision}_l.
# $$ {#eq-metrics-ap}

# %%
#| export
def precision_recall(
    scores,  # (K,) scores of all detections of a class, any order
    hits,  # (K,) 1 hit, 0 false positive, -1 not counted
    n_gt: int,  # objects to be found; 0: recall is nan
):  # (recall, precision), one point per counted detection, best score first
    "Recall and precision after each detection (@eq-metrics-pr)"
    order = np.argsort(-np.asarray(scores, float), kind='stable')
    hits = np.asarray(hits)[order]
    hits = hits[hits >= 0]
    tp = hits.cumsum()
    recall = tp / n_gt if n_gt else np.full(len(hits), np.nan)
    return recall, tp / np.arange(1, len(hits) + 1)


# %%
recall, precision = precision_recall([0.9, 0.8, 0.7, 0.6, 0.5], hits=[1, 0, 1, 0, 1], n_gt=4)
assert np.allclose(precision, [1, 1 / 2, 2 / 3, 2 / 4, 3 / 5])
assert np.allclose(recall, [0.25, 0.25, 0.5, 0.5, 0.75])
recall, precision


# %%
#| export
def average_precision(
    recall,  # (K,) never falling
    precision,  # (K,)
) -> float:  # in 0..1
    "Area under the raised precision-recall curve, over all points (@eq-metrics-ap)"
    steps = np.diff(np.concatenate([[0.0], recall]))
    envelope = np.maximum.accumulate(np.asarray(precision, float)[::-1])[::-1]
    return float((steps * envelope).sum())


# %% [markdown]
# By hand: hit, miss, hit, miss, hit, with four objects. Each hit is a step of $\tfrac14$ in recall, at raised
# precisions $1$, $\tfrac23$ and $\tfrac35$. The fourth object is never found and adds nothing.

# %%
by_hand = (1 + 2 / 3 + 3 / 5) / 4
assert abs(average_precision(recall, precision) - by_hand) < 1e-12
average_precision(recall, precision), by_hand

# %%
#| label: fig-metrics-pr
#| fig-cap: "Average precision is the shaded area under the raised curve: a false positive costs only until a later hit makes up for it, an object that is never found costs its whole strip."
#| fig-alt: "Precision against recall: a zigzag of five points, a staircase above it, and the shaded area under the staircase from recall 0 to .75."
envelope = np.maximum.accumulate(precision[::-1])[::-1]
corners_r = np.repeat([0, *recall], 2)[1:-1]
corners_p = np.repeat(envelope, 2)
fig, ax = plt.subplots(figsize=(4.5, 2.8), dpi=80, layout='constrained')
ax.fill_between(corners_r, corners_p, color='#1f77b4', alpha=0.2)
ax.plot(corners_r, corners_p, color='#1f77b4', label='raised')
ax.plot(recall, precision, 'o:', color='black', ms=4, label='as counted')
ax.annotate('never found', (0.875, 0.05), ha='center', fontsize=9)
ax.axvline(0.75, color='grey', lw=0.5)
ax.set(xlim=(0, 1), ylim=(0, 1.05), xlabel='recall', ylabel='precision', title=f'AP = {by_hand:.3f}')
ax.legend(fontsize=9, loc='lower left')
plt.show()


# %% [markdown]
# ## Detections and ground truth
#
# Detections are a dictionary from image id to `scores` (K,), `labels` (K,) and `boxes` (K,4), corners in
# pixels of the *original* image. An image without an entry has no detections. Invalid input (an unknown
# image, a label outside the classes, a NaN) raises an error that names the image.

# %%
#| export
def _array(x):
    "A tensor or sequence as a float64 array"
    return np.asarray(torch.as_tensor(x).detach().cpu(), float)


def _check(ds, detections):
    "{image_id: (scores, labels, boxes)} as arrays, best score first; `DataError` if any of it is invalid"
    known, out = set(ds.ids), {}
    for image_id, d in detections.items():
        if image_id not in known:
            name = getattr(ds, 'name', 'the data set')
            raise DataError(f'detections for image {image_id!r}, which is not in {name}')
        s, l, b = _array(d['scores']), _array(d['labels']), _array(d['boxes']).reshape(-1, 4)
        if not len(s) == len(l) == len(b):
            raise DataError(f'image {image_id!r}: {len(s)} scores, {len(l)} labels, {len(b)} boxes')
        if not (np.isfinite(s).all() and np.isfinite(b).all()):
            raise DataError(f'image {image_id!r}: a detection has a NaN or infinite score or box')
        if len(l) and not (0 <= l.min() and l.max() < len(ds.classes)):
            raise DataError(f'image {image_id!r}: a label is not in 0..{len(ds.classes) - 1}')
        order = np.argsort(-s, kind='stable')
        out[image_id] = (s[order], l[order].astype(int), b[order])
    return out


def _truth(ds):
    "{image_id: (labels, xyxy boxes, ignore)} as arrays, from the data set's COCO dictionary"
    rows = {i: [] for i in ds.ids}
    for a in ds.coco_dict()['annotations']:
        x, y, w, h = a['bbox']
        rows[a['image_id']].append((a['category_id'] - 1, x, y, x + w, y + h, bool(a.get('iscrowd', 0))))
    out = {}
    for i, r in rows.items():
        t = np.array(r, float).reshape(-1, 6)
        out[i] = (t[:, 0].astype(int), t[:, 1:5], t[:, 5].astype(bool))
    return out


# %%
blood = dict(
    images=[dict(id='a'), dict(id='b')],
    annotations=[
        dict(image_id='a', category_id=1, bbox=[0, 0, 10, 10]),
        dict(image_id='b', category_id=1, bbox=[50, 50, 10, 10]),
    ],
)
ds = SimpleNamespace(name='blood', classes=['cell', 'platelet'], ids=['a', 'b'], coco_dict=lambda: blood)


def detected(*rows):
    "Detections of one image from rows (score, label, x1, y1, x2, y2)"
    t = torch.tensor(rows).reshape(-1, 6)
    return dict(scores=t[:, 0], labels=t[:, 1].long(), boxes=t[:, 2:])


try:
    _check(ds, {'a': detected((0.9, 2, 0, 0, 10, 10))})
except DataError as e:
    refusal = str(e)
assert '0..1' in refusal
refusal


# %% [markdown]
# ## PASCAL VOC
#
# VOC AP is the mean of @eq-metrics-ap over the classes, at IoU .5. A class without objects has no AP (`nan`)
# and does not enter the mean.

# %%
#| export
def _mean(x):
    "Mean of the values that are defined, nan if none is"
    x = np.asarray(x, float)
    x = x[~np.isnan(x)]
    return float(x.mean()) if len(x) else float('nan')


def voc_ap50(
    ds,  # data set: `classes`, `ids`, `coco_dict()`
    detections: dict,  # image_id -> scores (K,), labels (K,), boxes (K,4) xyxy pixels
    iou: float = 0.5,  # smallest overlap of a hit
    per_class: bool = False,  # also return {class name: AP}
):  # mean AP over the classes that occur, 0..100; nan if none does
    "PASCAL VOC AP: all points of the curve, all detections, difficult objects ignored"
    det, truth, aps = _check(ds, detections), _truth(ds), {}
    for c, name in enumerate(ds.classes):
        scores, hits, n_gt = [np.zeros(0)], [np.zeros(0, int)], 0
        for image_id, (labels, boxes, ignore) in truth.items():
            mine = labels == c
            n_gt += int((mine & ~ignore).sum())
            if image_id not in det:
                continue
            s, l, b = det[image_id]
            scores.append(s[l == c])
            hits.append(match_detections(b[l == c], boxes[mine], ignore[mine], iou))
        curve = precision_recall(np.concatenate(scores), np.concatenate(hits), n_gt)
        aps[name] = 100 * average_precision(*curve) if n_gt else float('nan')
    mean = _mean(list(aps.values()))
    return (mean, aps) if per_class else mean


# %% [markdown]
# Two cells; the detector finds one, makes a false detection, then finds the other:
# $\tfrac12\cdot 1+\tfrac12\cdot\tfrac23$.

# %%
detections = {
    'a': detected((0.9, 0, 0, 0, 10, 10), (0.8, 0, 100, 100, 110, 110)),
    'b': detected((0.7, 0, 50, 50, 60, 60)),
}
voc, per_class = voc_ap50(ds, detections, per_class=True)
assert abs(voc - 100 * (1 / 2 + 1 / 2 * 2 / 3)) < 1e-9 and np.isnan(per_class['platelet'])
per_class


# %% [markdown]
# ## COCO
#
# COCO's AP differs in four points. It is averaged over ten IoU thresholds .50, .55, ..., .95. The raised
# precision is sampled at 101 recalls 0, .01, ..., 1 instead of being integrated. At most 100 detections per
# image count. And a detection takes the best object that is still *free*. The letters s, m, l restrict it to
# objects below $32^2$, up to $96^2$, and above that many pixels; AR100 is the mean recall.
#
# Two quirks of pycocotools are handled here: it prints, and it treats an object with annotation id 0 as
# unmatched.

# %%
#| export
def _coco(images, categories, annotations):
    "A pycocotools object from rows, without a file and without output"
    coco = COCO()
    coco.dataset = dict(images=images, categories=categories, annotations=annotations)
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _coco_eval(ds, det, brief=False, max_dets=100):
    "COCOeval after accumulate(), with image ids 1..n and annotation ids from 1 on"
    number = {image_id: n for n, image_id in enumerate(ds.ids, 1)}
    images = [dict(id=n) for n in number.values()]
    categories = [dict(id=c, name=name) for c, name in enumerate(ds.classes, 1)]
    gt, dt = [], []
    for a in ds.coco_dict()['annotations']:
        row = dict(id=len(gt) + 1, image_id=number[a['image_id']], category_id=a['category_id'])
        area = a['area'] if a.get('area') is not None else a['bbox'][2] * a['bbox'][3]
        gt.append(row | dict(bbox=list(a['bbox']), area=area, iscrowd=int(a.get('iscrowd', 0))))
    for image_id, (s, l, b) in det.items():
        for score, label, (x, y, X, Y) in zip(s.tolist(), l.tolist(), b.tolist()):
            row = dict(id=len(dt) + 1, image_id=number[image_id], category_id=label + 1, score=score)
            dt.append(row | dict(bbox=[x, y, X - x, Y - y], area=(X - x) * (Y - y), iscrowd=0))
    with contextlib.redirect_stdout(io.StringIO()):
        e = COCOeval(_coco(images, categories, gt), _coco(images, categories, dt), 'bbox')
        e.params.maxDets = [1, min(10, max_dets), max_dets]
        if brief:
            e.params.areaRng, e.params.areaRngLbl = e.params.areaRng[:1], e.params.areaRngLbl[:1]  # 'all'
        e.evaluate()
        e.accumulate()
    return e


# %%
#| export
def _percent(values):
    "A result of COCOeval (...,areas,limits) in 0..100 at its largest limit of detections, nan instead of -1"
    return np.where(values < 0, np.nan, 100 * values)[..., -1]


def evaluate(
    ds,  # data set: `classes`, `ids`, `coco_dict()`
    detections: dict,  # image_id -> scores (K,), labels (K,), boxes (K,4) xyxy, pixels of the original image
    brief: bool = False,  # only AP and AP50: no sizes, no classes, less to compute
    max_dets: int = 100,  # detections per image that count; another number renames AR100
) -> dict:  # AP, AP50, AP75, APs, APm, APl, AR100, voc_AP50; per_class={name: {AP, AP50}}
    """COCO metrics of the `max_dets` best detections per image, and VOC AP50; 0..100, nan where undefined.

    An image without an entry has no detections; invalid detections raise `DataError`.
    """
    e = _coco_eval(ds, _check(ds, detections), brief, max_dets)
    p = _percent(e.eval['precision'])  # (IoU thresholds, recalls, classes, areas)
    r = _percent(e.eval['recall'])  # (IoU thresholds, classes, areas)
    at = {round(100 * t): i for i, t in enumerate(e.params.iouThrs)}
    out = dict(AP=_mean(p[:, :, :, 0]), AP50=_mean(p[at[50], :, :, 0]))
    if brief:
        return out
    out |= dict(
        AP75=_mean(p[at[75], :, :, 0]), APs=_mean(p[..., 1]), APm=_mean(p[..., 2]), APl=_mean(p[..., 3])
    )
    out[f'AR{max_dets}'] = _mean(r[:, :, 0])
    out['per_class'] = {
        name: dict(AP=_mean(p[:, :, c, 0]), AP50=_mean(p[at[50], :, c, 0]))
        for c, name in enumerate(ds.classes)
    }
    return {**out, 'voc_AP50': voc_ap50(ds, detections)}


# %%
result = evaluate(ds, detections)
assert abs(result['AP50'] - 100 * (51 * 1 + 50 * 2 / 3) / 101) < 1e-9  # 51 of the 101 recalls lie in 0...0.50
{k: v if isinstance(v, dict) else round(v, 2) for k, v in result.items()}

# %% [markdown]
# 83.50 and 83.33: the same curve, sampled at 101 points and integrated. A detection whose IoU with its object
# is .7 counts at five of the ten thresholds. Without detections AP is 0, without objects it is `nan`.

# %%
loose = evaluate(ds, {'a': detected((0.9, 0, 0, 0, 10, 7)), 'b': detected((0.8, 0, 50, 50, 60, 57))})
nothing_found = evaluate(ds, {})
without_objects = SimpleNamespace(classes=['cell'], ids=['a'], coco_dict=lambda: dict(annotations=[]))
undefined = evaluate(without_objects, {'a': detected((0.9, 0, 0, 0, 10, 10))})
assert abs(loose['AP'] - 50) < 1e-9
assert nothing_found['AP'] == 0 and np.isnan(undefined['AP'])
loose['AP'], nothing_found['AP'], undefined['AP']


# %% [markdown]
# ::: {.callout-note}
# ## What a number here can be compared with
# AP, AP50 and the others come from pycocotools and are comparable with published COCO numbers on the same
# images. VOC AP50 uses all points, as VOC has done since 2010, and continuous box coordinates: the original
# toolkit counts pixels (it adds 1 to widths), which matters only for boxes of a few pixels. In the COCO
# numbers, difficult objects of VOC are treated as crowds.
# :::
#
# ## Pseudo labels against hidden truth
#
# In an experiment the labels of the "unlabelled" images exist and are hidden. Comparing pseudo boxes with
# them shows early whether a run is going wrong: where precision is low, the student learns wrong objects;
# where recall is low, it learns that objects are background.

# %%
#| export
def pseudo_quality(
    boxes: Tensor,  # (K,4) xyxy pseudo boxes, best first
    labels: Tensor,  # (K,)
    gt_boxes: Tensor,  # (N,4) xyxy hidden ground truth, same unit
    gt_labels: Tensor,  # (N,)
    iou: float = 0.5,  # smallest overlap of a hit
) -> tuple[int, int, int]:  # (hits, pseudo boxes, objects): precision is hits/boxes, recall hits/objects
    "Count correct pseudo labels: the class must agree, the IoU reach `iou`, and each object counts once"
    overlap = box_iou(boxes.reshape(-1, 4), gt_boxes.reshape(-1, 4)) * (labels[:, None] == gt_labels[None])
    free, hits = overlap.detach().cpu().numpy().copy(), 0  # (K,N), 0 in the columns of objects found before
    for row in free if free.size else ():
        j = int(row.argmax())
        if row[j] >= iou:
            hits += 1
            free[:, j] = 0
    return hits, len(boxes), len(gt_boxes)


# %%
hidden = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60], [80, 80, 99, 99]])
classes = torch.tensor([0, 1, 0])
# correct; the same object again; wrong class
pseudo = torch.tensor([[0.0, 0, 10, 9], [1, 0, 10, 10], [50, 50, 60, 60]])
hits, n_pred, n_gt = pseudo_quality(pseudo, torch.tensor([0, 0, 0]), hidden, classes)
assert (hits, n_pred, n_gt) == (1, 3, 3)
f'precision {hits / n_pred:.2f}, recall {hits / n_gt:.2f}'

# %% [markdown]
# ## Summary
#
# * A hit needs the right class, enough overlap and a free object; ignored objects do not count either way.
# * AP is the area under the raised precision-recall curve, per class, then the mean over classes that occur.
# * `evaluate` computes the COCO and VOC numbers, in 0..100; `nan` where there is nothing to find.
# * Invalid detections raise an error with the image and the reason.
# * `pseudo_quality` returns the counts from which precision and recall of pseudo labels follow.
#
# ## Exercises
#
# 1. Add a thousand detections of score .001 far from all objects: what happens to COCO AP and to VOC AP?
# 2. Give every pseudo label the class of its neighbour: does precision change, recall, or both?
# 3. Find five detections for which "most overlapping object" and "best free object" disagree.
