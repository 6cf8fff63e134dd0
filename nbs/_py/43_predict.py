# %% [markdown]
# # Prediction {#sec-predict}
#
# > Detect objects in images with a trained run, draw them, and write them as COCO JSON.
#
# A run's folder is all that is needed: its checkpoint holds the configuration, the class names and the weights. The teacher is the network to use; it is the smoother of the two, and the one that every table of this book reports.

# %%
#| default_exp predict

# %%
#| export
import dataclasses
import json
from pathlib import Path
import numpy as np
import torch
from PIL import Image
from semidetr.augment import eval_view
from semidetr.checkpoint import load_checkpoint, load_weights
from semidetr.config import from_dict
from semidetr.core import ConfigError, DataError, atomic_write, pick_device
from semidetr.datasets import ImageFolder, Sample
from semidetr.detector import Detector, post_process
from semidetr.draw import draw_on_image
from semidetr.loader import collate


# %% [markdown]
# ## From a run to a model

# %%
#| export
def load_model(
    path, # folder of a run, or its .pt file
    which:str='teacher', # or 'student'
    device='cpu',
): # (Detector in eval mode, Config, class names)
    "The detector of a run, without needing the files its backbone was started from"
    state = load_checkpoint(path)
    if which not in ('teacher', 'student'): raise ConfigError(f"'{which}' is not a network of a run; known: student, teacher")
    cfg = from_dict(state['config'])
    bare = dataclasses.replace(cfg.detector, backbone=dataclasses.replace(cfg.detector.backbone, weights='none'))
    model = Detector(bare)
    load_weights(model, state[which], path)
    return model.to(device).eval().requires_grad_(False), cfg, list(state['classes'])


# %%
#| export
class Predictor:
    "Detect objects in images: `Predictor('runs/mine')('photo.jpg')`"
    def __init__(self,
        path, # folder of a run, or its .pt file
        device:str='auto',
        threshold:float=.3, # least score of a detection
        nms:float=None, # IoU of per-class suppression; None: none, as DETR is meant to be used
        which:str='teacher', # or 'student'
    ):
        self.device = pick_device(device)
        self.model, self.cfg, self.classes = load_model(path, which, self.device)
        self.threshold, self.nms = threshold, nms

    def __call__(self,
        image, # path, PIL image, (H,W,3) uint8 array, or a list of these
    ): # dict(boxes (K,4) xyxy pixels, labels (K,), scores (K,) descending, names), or a list of these
        "Detections of one image or of several"
        if isinstance(image, (list, tuple)): return [self(i) for i in image]
        sample = as_sample(image)
        part = collate([eval_view(sample, self.cfg.view)])
        with torch.inference_mode():
            out = self.model(part['images'].to(self.device), part['mask'].to(self.device))
        size = part['targets'][0]['size']
        found = post_process(out, [size], nms=self.nms, score_threshold=self.threshold)[0]
        h, w = sample.size
        scale = torch.tensor([w/size[1], h/size[0]]*2)
        labels = found['labels'].cpu()
        return dict(boxes=found['boxes'].cpu()*scale, labels=labels, scores=found['scores'].cpu(), names=[self.classes[i] for i in labels.tolist()])

    def draw(self,
        image, # as for a call
    )->Image.Image:
        "The image with its detections"
        sample, found = as_sample(image), self(image)
        return draw_on_image(sample.image, found['boxes'], found['labels'], found['scores'], self.classes, kind='teacher')


# %%
#| export
def as_sample(
    image, # path, PIL image or (H,W,3) uint8 array
)->Sample:
    "An image of any kind as a sample without boxes"
    if isinstance(image, (str, Path)):
        path = Path(image)
        return ImageFolder(path.parent, files=[path.name])[0]
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3: raise DataError(f'an array must be uint8 of shape (H, W, 3), not {image.dtype} {image.shape}')
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image): raise DataError(f'{type(image).__name__} is not an image; give a path, a PIL image or a uint8 array')
    none = torch.zeros(0, 4)
    return Sample(image.convert('RGB'), 'image', none, torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.bool), None)


# %% [markdown]
# ## A folder at a time

# %%
#| export
def to_coco(
    found:dict, # of `Predictor`
    image_id, # file name, or the id in a COCO file
)->list: # of dicts in COCO's result format, boxes xywh pixels
    "Detections as COCO results; category_id is label + 1, the order of the class names"
    boxes = found['boxes'].clone()
    boxes[:, 2:] -= boxes[:, :2]
    return [dict(image_id=image_id, category_id=int(c)+1, category=n, bbox=[round(x, 2) for x in b], score=round(float(s), 4))
            for b, c, s, n in zip(boxes.tolist(), found['labels'], found['scores'], found['names'])]

def predict_folder(
    predictor:Predictor,
    source, # image or folder of images
    out, # folder for pictures and detections.json
    draw:bool=True,
    progress=lambda x: x, # wraps the iterator
)->list: # COCO results of all images
    "Detect in every image of a folder; pictures and one JSON file are written"
    source, out = Path(source), Path(out)
    if not source.exists(): raise DataError(f'{source}: no such image or folder')
    ds = ImageFolder(source) if source.is_dir() else ImageFolder(source.parent, files=[source.name])
    results = []
    for i in progress(range(len(ds))):
        sample = ds[i]
        found = predictor(sample.image)
        results += to_coco(found, sample.image_id)
        if draw:
            path = out/f'{Path(str(sample.image_id)).with_suffix("")}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            draw_on_image(sample.image, found['boxes'], found['labels'], found['scores'], predictor.classes, kind='teacher').save(path)
    atomic_write(out/'detections.json', json.dumps(results))
    return results
