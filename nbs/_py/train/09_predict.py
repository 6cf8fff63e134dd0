# %% [markdown]
# # Prediction {#sec-predict}
#
# > Detect objects in your own images with a trained run, draw them, and write them in COCO's result format.
#
# A detector that was trained and never looked at teaches nothing. This chapter goes from a run's folder to
# boxes on a photo. The folder is all that is needed: its checkpoint holds the configuration, the class names
# and both networks. The *teacher* is the one to use; it is the smoother of the two, and the one that the
# tables of this book report.
#
# Two things go wrong here in practice. Boxes come out in the wrong pixels, because the network saw a resized
# view. And a folder of ten thousand photos holds one broken file, which must not cost the other 9999.

# %%
#| default_exp train.predict

# %%
#| hide
import warnings

warnings.filterwarnings('ignore', message='IProgress')

# %%
#| export
import dataclasses
import io
import json
from pathlib import Path
import numpy as np
import torch
from PIL import Image
from semidetr.data.augment import eval_view
from semidetr.train.checkpoint import load_checkpoint, load_weights
from semidetr.train.config import from_dict
from semidetr.core import ConfigError, DataError, atomic_write, pick_device
from semidetr.data.datasets import CocoDataset, Sample
from semidetr.detectors.contract import post_process
from semidetr.detectors.detector import Detector
from semidetr.draw import draw_on_image
from semidetr.data.loader import collate
from semidetr.data.files import load_image, read_folder, reason

# %%
#| hide
import tempfile
import matplotlib.pyplot as plt
from semidetr.boxes import normalize_boxes
from semidetr.train.checkpoint import save_checkpoint
from semidetr.train.config import override, preset, to_dict
from semidetr.data.catalog import open_dataset
from semidetr.draw import show_image
from semidetr.train.trainer import resolve


# %% [markdown]
# ## From a run to a network
#
# `load_model` reads a checkpoint and builds the detector it describes. The backbone's starting weights are
# not looked up again, they are part of the checkpoint: prediction needs no file but this one. What is not a
# checkpoint of this package, or only part of one, is refused with the file's name.

# %%
#| export
def load_model(
    path,  # folder of a run, or its .pt file
    which: str = 'teacher',  # or 'student'
    device='cpu',
):  # (Detector in eval mode, Config, class names)
    "The detector of a run, without needing the files its backbone was started from"
    if which not in ('teacher', 'student'):
        raise ConfigError(f"'{which}' is not a network of a run; known: student, teacher")
    state = load_checkpoint(path)
    if lost := [k for k in ('config', 'classes', which) if k not in state]:
        raise DataError(
            f"{path}: this checkpoint holds no '{lost[0]}'; give the folder of a run, or its last.pt"
        )
    try:
        cfg = from_dict(state['config'])
    except ConfigError as e:
        raise DataError(f'{path}: {e}; written by another version of semidetr') from None
    bare = dataclasses.replace(
        cfg.detector, backbone=dataclasses.replace(cfg.detector.backbone, weights='none')
    )
    model = Detector(bare)
    load_weights(model, state[which], path)
    return model.to(device).eval().requires_grad_(False), cfg, list(state['classes'])


# %% [markdown]
# To have something to load, here is a checkpoint of a tiny detector that was never trained.

# %%
scenes = open_dataset('digits:n=6,size=96', 'val')
tiny = resolve(
    override(
        preset('digits'),
        [
            'detector.backbone.weights=none',
            'detector.transformer.d_model=32',
            'detector.transformer.n_heads=4',
            'detector.transformer.num_queries=20',
            'detector.transformer.ffn=32',
        ],
    ),
    scenes.classes,
)
folder = Path(tempfile.mkdtemp())
torch.manual_seed(0)
network = Detector(tiny.detector)
save_checkpoint(
    folder / 'last.pt',
    config=to_dict(tiny),
    classes=scenes.classes,
    student=network.state_dict(),
    teacher=network.state_dict(),
)
loaded, loaded_cfg, loaded_classes = load_model(folder)
assert loaded_cfg == tiny and all(
    torch.equal(a, b) for a, b in zip(network.state_dict().values(), loaded.state_dict().values())
)
loaded_classes


# %% [markdown]
# ## Any kind of image
#
# A path, a PIL image or an array of 8-bit RGB all become a `Sample` without boxes. A path is decoded as the
# training images were (@sec-records): turned by its EXIF tag, 16 bits scaled to 8.

# %%
#| export
def as_sample(
    image,  # path, PIL image (taken as it is), or (H,W,3) uint8 array
) -> Sample:  # without boxes
    "An image of any kind, ready for a view; DataError if it is none"
    path = str(image) if isinstance(image, (str, Path)) else None
    if path:
        try:
            image = load_image(path)
        except Exception as e:
            raise DataError(
                f'{path}: cannot be read as an image ({reason(e)}); restore it or leave it out'
            ) from None
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise DataError(f'an array must be uint8 of shape (H, W, 3), not {image.dtype} {image.shape}')
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise DataError(f'{type(image).__name__} is not an image; give a path, a PIL image or a uint8 array')
    return Sample(
        image.convert('RGB'),
        path or 'image',
        torch.zeros(0, 4),
        torch.zeros(0, dtype=torch.long),
        torch.zeros(0, dtype=torch.bool),
        path,
    )


# %%
photo = scenes[0].image
photo.save(folder / 'photo.png')
assert np.array_equal(as_sample(folder / 'photo.png').image, as_sample(np.asarray(photo)).image)
try:
    as_sample(np.zeros((4, 4)))
except DataError as e:
    print(e)


# %% [markdown]
# ## Back to the pixels of the file
#
# The network sees a view of size $(h,w)$ and answers in parts of it: $(c_x,c_y,b_w,b_h)\in[0,1]^4$. The view
# is the whole image, resized, so the same parts hold in the file of size $(H,W)$, and the resize never has to
# be undone:
#
# $$ x_{1,2} = W\left(c_x \mp \tfrac{1}{2}b_w\right), \qquad y_{1,2} = H\left(c_y \mp \tfrac{1}{2}b_h\right) $$ {#eq-predict-pixels}
#
# Several images go through the network together *only if their views have the same size*. Images of different
# sizes would be padded, and a convolution sees the padding: the answer for a photo would then depend on its
# neighbours in the batch. With equal sizes it does not, up to the rounding of floats.

# %%
#| export
class Predictor:
    "Detect objects in images: `Predictor('runs/mine')('photo.jpg')`"

    def __init__(
        self,
        path,  # folder of a run, or its .pt file
        device: str = 'auto',
        threshold: float = 0.3,  # least score of a detection
        nms: float = None,  # IoU of per-class suppression; None: none, as DETR is meant to be used
        which: str = 'teacher',  # or 'student'
    ):
        if not 0 <= threshold <= 1:
            raise ConfigError(f'threshold={threshold} is outside [0, 1]; scores are probabilities')
        if nms is not None and not 0 < nms <= 1:
            raise ConfigError(f'nms={nms} is outside (0, 1]; it is an IoU')
        self.device = pick_device(device)
        self.model, self.cfg, self.classes = load_model(path, which, self.device)
        self.threshold, self.nms = threshold, nms

    def _same_size(self, views):  # views of one size -> detections in pixels of the files
        part = collate(views, self.cfg.view.pad_multiple)
        with torch.inference_mode():
            out = self.model(part['images'].to(self.device), part['mask'].to(self.device))
        found = post_process(out, [v.orig_size for v in views], nms=self.nms, score_threshold=self.threshold)
        return [
            {k: v.cpu().clone() for k, v in f.items()}
            | dict(names=[self.classes[i] for i in f['labels'].tolist()])
            for f in found
        ]

    def __call__(
        self,
        image,  # path, PIL image, (H,W,3) uint8 array, or a list of these
        batch: int = 8,  # most images at a time
    ):  # dict(boxes (K,4) xyxy pixels, labels (K,), scores (K,) descending, names), or a list of these
        "Detections of one image or of several, in pixels of the files (@eq-predict-pixels)"
        if not isinstance(image, (list, tuple)):
            return self([image])[0]
        views, sizes, out = [eval_view(as_sample(i), self.cfg.view) for i in image], {}, {}
        for n, v in enumerate(views):
            sizes.setdefault(v.size, []).append(n)
        groups = [g[i : i + batch] for g in sizes.values() for i in range(0, len(g), batch)]
        for g in groups:
            out |= dict(zip(g, self._same_size([views[n] for n in g])))
        return [out[n] for n in range(len(views))]

    def draw(
        self,
        image,  # as for a call, one image
        found: dict = None,  # its detections; None: detect them
    ) -> Image.Image:
        "The image with its detections"
        image = as_sample(image).image
        found = self(image) if found is None else found
        return draw_on_image(
            image, found['boxes'], found['labels'], found['scores'], self.classes, kind='teacher'
        )


# %% [markdown]
# An untrained network is sure of nothing; with the threshold at zero it still shows that batches change
# nothing, whatever the sizes.

# %%
predictor = Predictor(folder, 'cpu', threshold=0.0)
mixed = [scenes[0].image, scenes[1].image.resize((140, 96)), scenes[2].image]
together, alone = predictor(mixed), [predictor(m) for m in mixed]
worst = max(float((a[k] - b[k]).abs().max()) for a, b in zip(together, alone) for k in ('boxes', 'scores'))
assert worst < 1e-3 and all(a['names'] == b['names'] for a, b in zip(together, alone))
f'largest difference between a batch and single images: {worst:.0e} pixels'


# %% [markdown]
# ## Threshold or suppression?
#
# A stand-in for a trained network makes the two knobs visible. It knows the truth and answers as a detector
# does that was stopped too early: each object once with a high score, and once more, shifted, with a lower
# one.

# %%
class Hasty(torch.nn.Module):
    "Every object of the first scene twice: (score .9, right place) and (score .4, shifted)"

    def forward(self, images, mask):
        s = scenes[0]
        twice = normalize_boxes(torch.cat([s.boxes, s.boxes + 3]), s.size).clamp(0, 1)
        p = torch.full((len(twice), 10), 1e-3)
        p[torch.arange(len(twice)), s.labels.repeat(2)] = torch.tensor(
            [0.9] * len(s.boxes) + [0.4] * len(s.boxes)
        )
        return dict(pred_logits=p.logit()[None], pred_boxes=twice[None])


hasty = {}
for name, th, nms in (
    ('threshold .3', 0.3, None),
    ('threshold .5', 0.5, None),
    ('threshold .3, NMS .5', 0.3, 0.5),
):
    hasty[name] = Predictor(folder, 'cpu', th, nms)
    hasty[name].model = Hasty()
answers = {name: p(photo) for name, p in hasty.items()}
n_true = len(scenes[0].boxes)
assert [len(a['boxes']) for a in answers.values()] == [2 * n_true, n_true, n_true]
assert torch.allclose(
    answers['threshold .5']['boxes'].sort(0).values, scenes[0].boxes.sort(0).values, atol=1e-3
)
answers['threshold .5']['names'], [scenes.classes[i] for i in scenes[0].labels]

# %%
#| label: fig-predict-knobs
#| fig-cap: "Duplicates go when the threshold rises above their score, or by suppression. A detector whose matching is one-to-one gives them low scores by itself and needs no suppression."
#| fig-alt: "The same scene with doubled boxes, and twice with one box an object"
fig, axes = plt.subplots(1, 3, figsize=(6, 2.4), dpi=80)
for ax, (name, p) in zip(axes, hasty.items()):
    show_image(ax, p.draw(photo.resize((150, 150))), title=name)
plt.tight_layout()
plt.show()


# %% [markdown]
# The picture was drawn on a larger copy of the scene, and the boxes are where they belong:
# @eq-predict-pixels.
#
# ## COCO's result format
#
# One dictionary a detection: `image_id`, `category_id`, `bbox` as $(x,y,w,h)$ in pixels, `score`. The *image
# id is the file name* below the folder, and the category id is label + 1, because a folder of photos knows no
# other numbers. The class name stands beside it for a human reader; tools ignore the extra key. Where an
# annotation file exists, its ids can be used instead, and `pycocotools` reads the result directly.

# %%
#| export
def to_coco(
    found: dict,  # of `Predictor`
    image_id,  # file name, or the id in a COCO file
    category_ids=None,  # label -> id; None: label + 1
) -> list:  # of dicts in COCO's result format, boxes xywh pixels
    "Detections of one image as COCO results"
    boxes = found['boxes'].clone()
    boxes[:, 2:] -= boxes[:, :2]
    ids = [c + 1 if category_ids is None else category_ids[c] for c in found['labels'].tolist()]
    return [
        dict(
            image_id=image_id,
            category_id=c,
            category=n,
            bbox=[round(x, 2) for x in b],
            score=round(float(s), 4),
        )
        for b, c, s, n in zip(boxes.tolist(), ids, found['scores'], found['names'])
    ]


def coco_ids(
    files,  # paths below `folder`
    folder,  # of the images
    path,  # COCO annotation file that names them
    classes: list,  # of the run
):  # (file -> image id, label -> category id)
    "The numbers that an annotation file gives to images and classes"
    ds = CocoDataset(path, folder)
    known = {Path(f).name: i for f, i in zip(ds.files, ds.ids)} | dict(zip(ds.files, ds.ids))
    ids = {f: known.get(f, known.get(Path(f).name)) for f in files}
    for f, i in ids.items():
        if i is None:
            raise DataError(f'{path}: does not name the image {f}; leave the file out, or the image')
    for c in classes:
        if c not in ds.classes:
            raise DataError(
                f"{path}: does not have the class '{c}' of the run; it has {', '.join(ds.classes[:10])}"
            )
    return ids, [ds.cat_ids[ds.classes.index(c)] for c in classes]


# %%
lines = to_coco(answers['threshold .5'], 'photo.png')
assert lines[0]['category_id'] == int(answers['threshold .5']['labels'][0]) + 1
lines[0]


# %% [markdown]
# ## A folder at a time
#
# `predict_folder` goes through an image or a folder with its subfolders. What it promises:
#
# - a file that cannot be decoded is left out and reported, the others are finished; if *none* can be read,
#   nothing is written;
# - each picture, and `detections.json` at the end, is written whole or not at all;
# - no picture is written over a source image, and what lies in the output folder is not taken for a source.

# %%
#| export
def _sources(source, out):  # -> (folder, {path below it, also the image id}) of what is to be looked at
    source = Path(source)
    if not source.exists():
        raise DataError(f'{source}: no such image or folder')
    if source.is_file():
        return source.parent, [source.name]
    inside = Path(out).resolve()
    files = [im['file_name'] for im in read_folder(source).data['images']]
    if inside != source.resolve():
        files = [f for f in files if inside not in (source / f).resolve().parents]
    if not files:
        raise DataError(f'{source}: no image but those in the output folder {out}')
    return source, files


def _pictures(files, folder, out):  # file -> picture to write, none of them a source
    stems = [Path(f).with_suffix('').as_posix() for f in files]
    paths = {f: Path(out) / f"{s if stems.count(s) == 1 else f}.png" for f, s in zip(files, stems)}
    for p in paths.values():
        if any(p.resolve() == (folder / f).resolve() for f in {p.name, *files} if (folder / f).exists()):
            raise ConfigError(f'{p}: the picture would overwrite an image; choose another output folder')
    return paths


def _readable(files, folder, broken):  # [(file, image)] of what can be decoded; the rest goes to `broken`
    out = []
    for f in files:
        try:
            out.append((f, as_sample(folder / f).image))
        except DataError as e:
            broken.append(str(e))
    return out


# %%
#| export
def predict_folder(
    predictor: Predictor,
    source,  # image or folder of images, subfolders too
    out,  # folder for pictures and detections.json
    draw: bool = True,
    ids=None,  # COCO annotation file whose image and category ids to use; None: file names, label + 1
    batch: int = 8,  # most images at a time
    progress=lambda x: x,  # wraps the list of batches
):  # (COCO results of all images, one line for each file that could not be read)
    "Detect in every image; pictures and one JSON file are written"
    out, broken, results, done = Path(out), [], [], 0
    folder, files = _sources(source, out)
    names, cats = coco_ids(files, folder, ids, predictor.classes) if ids else (dict(zip(files, files)), None)
    pictures = _pictures(files, folder, out) if draw else {}
    for some in progress([files[i : i + batch] for i in range(0, len(files), batch)]):
        pairs = _readable(some, folder, broken)
        done += len(pairs)
        for (f, image), found in zip(pairs, predictor([i for _, i in pairs], batch)):
            results += to_coco(found, names[f], cats)
            if not draw:
                continue
            png = io.BytesIO()
            predictor.draw(image, found).save(png, 'PNG')
            atomic_write(pictures[f], png.getvalue())
    if not done:
        raise DataError(
            broken[0]
            + (f' (and {len(broken) - 1} more; no image of {source} can be read)' if len(broken) > 1 else '')
        )
    atomic_write(out / 'detections.json', json.dumps(results))
    return results, broken


# %%
many = folder / 'photos'
(many / 'more').mkdir(parents=True)
for i in range(3):
    scenes[i].image.save(many / ('more' if i else '.') / f'{i}.jpg')
(many / 'cut.jpg').write_bytes((many / '0.jpg').read_bytes()[:700])
results, broken = predict_folder(predictor, many, folder / 'out')
written = sorted(p.relative_to(folder / 'out').as_posix() for p in (folder / 'out').rglob('*.*'))
assert written == ['0.png', 'detections.json', 'more/1.png', 'more/2.png'] and len(broken) == 1
assert {r['image_id'] for r in results} == {'0.jpg', 'more/1.jpg', 'more/2.jpg'}
broken[0].replace(str(folder), '...')

# %% [markdown]
# ## Summary
#
# - A run's folder is enough to predict; the teacher is the network to use.
# - Boxes come back in pixels of the file, because they are parts of the image and not of the view's pixels.
# - Only images of equal view size share a batch, so no result depends on its neighbours.
# - The threshold belongs to the use; suppression is for detectors that were trained one-to-many, or not long
#   enough.
# - A broken file costs itself and nothing else; results are COCO's, with file names as image ids unless an
#   annotation file gives others.
#
# ## Exercises
#
# 1. Pad the views of two images of different size into one batch and compare with single images; which
#    convolution lets the padding in?
# 2. In `Hasty`, at which shift does an NMS of .5 stop removing the second box?
# 3. Write a `Predictor` that averages the boxes of an image and its mirror image.
