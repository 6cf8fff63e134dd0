# %% [markdown]
# # Evaluation {#sec-evaluation}
#
# > From a network and a data set to detections in pixels of the files, and to COCO metrics.
#
# A detector sees a resized view and speaks in its coordinates; the metric counts in those of the file. Between the two lies one scale an axis, and one decision: whether to suppress duplicates. A detection transformer trained one-to-one needs no suppression, so the default is none, and asking for it is an experiment.

# %%
#| default_exp evaluation

# %%
#| export
import contextlib
import torch
import torch.distributed as dist
from tqdm.auto import tqdm
from semidetr.core import rank, rng_state, set_rng_state, world_size
from semidetr.datasets import Subset
from semidetr.detector import post_process
from semidetr.loader import EvalLoader
from semidetr.metrics import evaluate


# %%
#| export
def to_device(
    part, # nested dicts and lists of tensors
    device,
):
    "Move every tensor of a batch"
    if isinstance(part, torch.Tensor): return part.to(device, non_blocking=True)
    if isinstance(part, dict): return {k: to_device(v, device) for k, v in part.items()}
    if isinstance(part, list): return [to_device(v, device) for v in part]
    return part

@torch.no_grad()
def detect(
    model, # Detector
    ds, # DetectionDataset
    view, # ViewConfig
    device='cpu',
    batch_size:int=8,
    nms=None, # IoU of per-class suppression; None: none
    top_k:int=300,
    progress:str='', # text of the bar; '' for no bar
    num_workers:int=0,
)->dict: # image_id -> dict(scores, labels, boxes xyxy in pixels of the file)
    "Detections of a whole data set"
    training = model.training
    model.eval()
    out = {}
    try:
        loader = EvalLoader(ds, view, batch_size, num_workers)
        for part in tqdm(loader, desc=progress, disable=not progress, leave=False):
            part = to_device(part, device)
            found = post_process(model(part['images'], part['mask']), [t['size'] for t in part['targets']], top_k=top_k, nms=nms)
            for t, d in zip(part['targets'], found):
                h, w = t['size']; oh, ow = t['orig_size']
                scale = torch.tensor([ow/w, oh/h, ow/w, oh/h], device=d['boxes'].device)
                out[t['image_id']] = dict(scores=d['scores'].cpu(), labels=d['labels'].cpu(), boxes=(d['boxes']*scale).cpu())
    finally: model.train(training)
    return out


# %%
#| export
@contextlib.contextmanager
def same_rng():
    "What runs inside leaves the random state as it found it (starting worker processes draws a number)"
    state = rng_state()
    try: yield
    finally: set_rng_state(state)

def evaluate_model(
    model, # Detector
    ds, # DetectionDataset with boxes
    view, # ViewConfig
    device='cpu',
    nms=None, # IoU; None: no suppression
    progress:str='',
    num_workers:int=0,
)->dict: # of `evaluate`
    "COCO metrics of one network; several processes share the images"
    part = Subset(ds, range(rank(), len(ds), world_size())) if world_size() > 1 else ds
    with same_rng(): found = detect(model, part, view, device, nms=nms, progress=progress, num_workers=num_workers)
    if world_size() > 1:
        parts = [None]*world_size()
        dist.all_gather_object(parts, found)
        found = {k: v for p in parts for k, v in p.items()}
    return evaluate(ds, found)
