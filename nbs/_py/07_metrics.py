# %% [markdown]
# # Metrics {#sec-metrics}

# %%
#| default_exp metrics

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
#| export
def match_detections(
    boxes, # (K,4) xyxy detections of one class in one image, best score first
    gt, # (N,4) xyxy objects of that class
    ignore=None, # (N,) bool: crowd or difficult, neither hit nor miss; None = none
    iou:float=.5, # least overlap of a hit
)->np.ndarray: # (K,) 1 hit, 0 false alarm, -1 not counted
    "PASCAL VOC rule: each detection looks at the object it overlaps most; an object counts once"
    boxes, gt = (torch.as_tensor(x, dtype=torch.float64).reshape(-1, 4) for x in (boxes, gt))
    ignore = np.zeros(len(gt), bool) if ignore is None else np.asarray(ignore, bool)
    out, taken = np.zeros(len(boxes), int), ignore.copy()
    if not len(gt): return out
    best, index = box_iou(boxes, gt).max(1)
    for i, (o, j) in enumerate(zip(best.tolist(), index.tolist())):
        if o < iou: continue
        if ignore[j]: out[i] = -1
        elif not taken[j]: out[i], taken[j] = 1, True
    return out


# %%
#| export
def precision_recall(
    scores, # (K,) scores of all detections of a class, any order
    hits, # (K,) 1 hit, 0 false alarm, -1 not counted
    n_gt:int, # objects to be found
): # (recall, precision), one point a counted detection, best score first
    "Precision and recall after each detection"
    scores, hits = np.asarray(scores, float), np.asarray(hits)
    order = np.argsort(-scores, kind='stable')
    h = hits[order]; h = h[h >= 0]
    tp = h.cumsum()
    return tp/n_gt if n_gt else np.full(len(h), np.nan), tp/np.arange(1, len(h)+1)

def average_precision(
    recall, # (K,) rising
    precision, # (K,)
)->float: # in 0..1
    "Area under the precision-recall curve after each precision is raised to the best one at higher recall (all points)"
    r = np.concatenate([[0.], recall])
    envelope = np.maximum.accumulate(np.asarray(precision, float)[::-1])[::-1]
    return float((np.diff(r)*envelope).sum())


# %%
#| export
def _check(ds, detections):
    "Detections as float64 arrays; unknown images, unknown classes and non-finite numbers are refused"
    known, out = set(ds.ids), {}
    for image_id, d in detections.items():
        if image_id not in known: raise DataError(f'detections for image {image_id!r}, which is not in {getattr(ds, "name", "the data set")}')
        s, l, b = (np.asarray(torch.as_tensor(d[k]).detach().cpu(), float) for k in ('scores', 'labels', 'boxes'))
        b = b.reshape(-1, 4)
        if not len(s) == len(l) == len(b): raise DataError(f'image {image_id!r}: {len(s)} scores, {len(l)} labels, {len(b)} boxes')
        if not (np.isfinite(s).all() and np.isfinite(b).all()): raise DataError(f'image {image_id!r}: a detection has a NaN or infinite score or box')
        if len(l) and not (0 <= l.min() and l.max() < len(ds.classes)): raise DataError(f'image {image_id!r}: a label is not in 0..{len(ds.classes)-1}')
        order = np.argsort(-s, kind='stable')
        out[image_id] = (s[order], l[order].astype(int), b[order])
    return out

def _truth(ds):
    "{image_id: (labels, xyxy boxes, ignore)} from the data set's COCO dictionary"
    rows = {i: [] for i in ds.ids}
    for a in ds.coco_dict()['annotations']:
        x, y, w, h = a['bbox']
        rows[a['image_id']].append((a['category_id']-1, x, y, x+w, y+h, bool(a.get('iscrowd', 0))))
    out = {}
    for i, r in rows.items():
        t = np.array(r, float).reshape(-1, 6)
        out[i] = (t[:, 0].astype(int), t[:, 1:5], t[:, 5].astype(bool))
    return out


# %%
#| export
def _mean(x):
    "Mean over what is defined, nan if nothing is"
    x = np.asarray(x, float); x = x[~np.isnan(x)]
    return float(x.mean()) if len(x) else float('nan')

def voc_ap50(
    ds, # data set: `classes`, `ids`, `coco_dict()`
    detections:dict, # image_id -> scores (K,), labels (K,), boxes (K,4) xyxy pixels
    iou:float=.5, # least overlap of a hit
    per_class:bool=False, # also return {class name: AP}
): # mean AP over the classes that occur, 0..100; nan without any
    "PASCAL VOC AP (all points, difficult objects not counted, at most all detections)"
    det, truth, aps = _check(ds, detections), _truth(ds), {}
    for c, name in enumerate(ds.classes):
        scores, hits, n_gt = [], [], 0
        for image_id, (labels, boxes, ignore) in truth.items():
            mine = labels == c
            n_gt += int((mine & ~ignore).sum())
            if image_id not in det: continue
            s, l, b = det[image_id]
            scores.append(s[l == c]); hits.append(match_detections(b[l == c], boxes[mine], ignore[mine], iou))
        s, h = (np.concatenate(x) if x else np.zeros(0) for x in (scores, hits))
        aps[name] = 100*average_precision(*precision_recall(s, h, n_gt)) if n_gt else float('nan')
    return (_mean(list(aps.values())), aps) if per_class else _mean(list(aps.values()))


# %%
#| export
def _coco(images, categories, annotations):
    "A pycocotools object from rows, without a file and without a word"
    coco = COCO()
    coco.dataset = dict(images=images, categories=categories, annotations=annotations)
    with contextlib.redirect_stdout(io.StringIO()): coco.createIndex()
    return coco

def _coco_eval(ds, det):
    "COCOeval after accumulate(); image ids become 1..n, annotation ids start at 1 (pycocotools reads id 0 as unmatched)"
    number = {image_id: n for n, image_id in enumerate(ds.ids, 1)}
    data = ds.coco_dict()
    images = [dict(id=n) for n in number.values()]
    categories = [dict(id=c+1, name=name) for c, name in enumerate(ds.classes)]
    gt, dt = [], []
    for a in data['annotations']:
        area = a['area'] if a.get('area') is not None else a['bbox'][2]*a['bbox'][3]
        gt.append(dict(id=len(gt)+1, image_id=number[a['image_id']], category_id=a['category_id'], bbox=list(a['bbox']), area=area, iscrowd=int(a.get('iscrowd', 0))))
    for image_id, (s, l, b) in det.items():
        for score, label, (x, y, X, Y) in zip(s.tolist(), l.tolist(), b.tolist()):
            dt.append(dict(id=len(dt)+1, image_id=number[image_id], category_id=label+1, bbox=[x, y, X-x, Y-y], area=(X-x)*(Y-y), iscrowd=0, score=score))
    with contextlib.redirect_stdout(io.StringIO()):
        e = COCOeval(_coco(images, categories, gt), _coco(images, categories, dt), 'bbox')
        e.evaluate(); e.accumulate()
    return e


# %%
#| export
def evaluate(
    ds, # data set: `classes`, `ids`, `coco_dict()`
    detections:dict, # image_id -> scores (K,), labels (K,), boxes (K,4) xyxy in pixels of the original image
)->dict: # AP, AP50, AP75, APs, APm, APl, AR100, voc_AP50 in 0..100 (nan where undefined), per_class={name: {AP, AP50}}
    "COCO metrics (at most 100 detections an image) and VOC AP50; images without an entry have no detections"
    det = _check(ds, detections)
    e = _coco_eval(ds, det)
    precision, recall = (np.where(e.eval[k] < 0, np.nan, 100*e.eval[k]) for k in ('precision', 'recall'))
    p, r = precision[..., -1], recall[..., -1] # the last of maxDets 1, 10, 100; p (T,R,classes,areas), r (T,classes,areas)
    at = {round(100*t): i for i, t in enumerate(e.params.iouThrs)}
    out = dict(AP=_mean(p[:, :, :, 0]), AP50=_mean(p[at[50], :, :, 0]), AP75=_mean(p[at[75], :, :, 0]),
               APs=_mean(p[..., 1]), APm=_mean(p[..., 2]), APl=_mean(p[..., 3]), AR100=_mean(r[:, :, 0]))
    out['per_class'] = {name: dict(AP=_mean(p[:, :, c, 0]), AP50=_mean(p[at[50], :, c, 0])) for c, name in enumerate(ds.classes)}
    return {**out, 'voc_AP50': voc_ap50(ds, detections)}


# %%
#| export
def pseudo_quality(
    boxes:Tensor, # (K,4) xyxy pseudo boxes, best first
    labels:Tensor, # (K,)
    gt_boxes:Tensor, # (N,4) xyxy hidden truth, same unit
    gt_labels:Tensor, # (N,)
    iou:float=.5, # least overlap of a hit
)->tuple[int,int,int]: # (hits, pseudo boxes, objects): precision is hits/boxes, recall hits/objects
    "How many pseudo labels are right: class and overlap must agree, each object counts once"
    overlap = box_iou(boxes.reshape(-1, 4), gt_boxes.reshape(-1, 4))*(labels[:, None] == gt_labels[None])
    o, hits = overlap.detach().cpu().numpy().copy(), 0
    for row in o if o.size else ():
        j = int(row.argmax())
        if row[j] >= iou: hits += 1; o[:, j] = 0
    return hits, len(boxes), len(gt_boxes)
