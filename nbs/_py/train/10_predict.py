# %% [markdown]
# # Prediction {#sec-predict}
#
# > Detect objects in your own images with a trained run, draw them, and write them in COCO's result format.
#
# This chapter goes from the folder of a run to boxes on a photo. The folder is all that is needed: its
# checkpoint holds the configuration, the class names and both networks. Use the *teacher*; it is the smoother
# of the two, and the tables of this book report it.
#
# Two things go wrong here in practice. Boxes come out in the wrong pixels, because the network saw a resized
# view. And a folder of ten thousand photos holds one broken file, which must not stop the other 9999 from
# being processed.

# %%
#| default_exp train.predict

# %%
#| hide
import warnings

warnings.filterwarnings('ignore', message='IProgress')

# %%
#| export
import io
import json
from pathlib import Path
import numpy as np
import torch
from PIL import Image
from semidetr.core import ConfigError, DataError, atomic_write, pick_device
from semidetr.draw import draw_on_image
from semidetr.data.files import load_image, read_folder, reason
from semidetr.data.datasets import CocoDataset, Sample
from semidetr.data.augment import eval_view
from semidetr.data.loader import collate
from semidetr.detectors.contract import build_detector, post_process
from semidetr.train.config import from_saved
from semidetr.train.checkpoint import load_checkpoint, load_weights
from semidetr.train.evaluation import to_device
from semidetr.train.exported import from_safetensors, load_onnx

# %%
#| hide
import tempfile
import matplotlib.pyplot as plt
from semidetr.boxes import normalize_boxes
from semidetr.train.checkpoint import save_checkpoint
from semidetr.train.config import override, preset, to_dict
from semidetr.data.catalog import open_dataset
from semidetr.draw import show_image
from semidetr.train.run_data import resolve


# %% [markdown]
# ## From a run to a network
#
# `load_model` reads a checkpoint and builds the detector that it describes. The weights of the backbone are
# part of the checkpoint, so prediction needs no other file. A file that is no checkpoint of this package, or
# an incomplete one, raises an error that names it.

# %%
#| export
def load_model(
    path,  # folder of a run, its .pt file, or a .safetensors or .onnx file
    which: str = 'teacher',  # or 'student'
    device='cpu',  # where to put the detector
    like=None,  # Config with settings classes of your own, if the run has such
):  # (detector in eval mode, Config, class names)
    "The detector of a run; the file with the pre-trained backbone is not needed"
    if which not in ('teacher', 'student'):
        raise ConfigError(f"'{which}' is not a network of a run; known: student, teacher")
    if str(path).endswith('.onnx'):
        return load_onnx(path)
    state = from_safetensors(path) if str(path).endswith('.safetensors') else load_checkpoint(path)
    for key in ('config', 'classes', which):
        if key not in state:
            raise DataError(
                f"{path}: this checkpoint holds no '{key}'; give the folder of a run, or its last.pt"
            )
    try:
        cfg = from_saved(state['config'], like)
    except ConfigError as e:
        why = 'written by another version of semidetr, or with settings classes of its own (give `like`)'
        raise DataError(f'{path}: {e}; {why}') from None
    model = build_detector(cfg.detector.untrained())
    load_weights(model, state[which], path)
    return model.to(device).eval().requires_grad_(False), cfg, list(state['classes'])


# %% [markdown]
# As an example, a checkpoint of a tiny, untrained detector:

# %%
scenes = open_dataset('digits:n=6,size=96', 'val')
small = [
    'detector.backbone.weights=none',
    'detector.transformer.d_model=32',
    'detector.transformer.n_heads=4',
    'detector.transformer.num_queries=20',
    'detector.transformer.ffn=32',
]
tiny = resolve(override(preset('digits'), small), scenes.classes)
folder = Path(tempfile.mkdtemp())
torch.manual_seed(0)
network = build_detector(tiny.detector)
weights = network.state_dict()
save_checkpoint(
    folder / 'last.pt', config=to_dict(tiny), classes=scenes.classes, student=weights, teacher=weights
)
loaded, loaded_cfg, loaded_classes = load_model(folder)
assert loaded_cfg == tiny
assert all(torch.equal(a, b) for a, b in zip(weights.values(), loaded.state_dict().values()))
loaded_classes


# %% [markdown]
# ## Any kind of image
#
# A path, a PIL image or an 8-bit RGB array becomes a `Sample` without boxes. A file is decoded like the
# training images (@sec-records): rotated by its EXIF tag, 16 bits scaled to 8.

# %%
#| export
def as_sample(
    image,  # path, PIL image (used as it is), or (H,W,3) uint8 array
) -> Sample:  # without boxes
    "An image of any kind, ready for a view; `DataError` if it is not an image"
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
# The network sees a view of size $(h,w)$ and predicts boxes as fractions of it:
# $(c_x,c_y,b_w,b_h)\in[0,1]^4$. The view is the whole image, resized, so the same fractions hold in the file
# of size $(H,W)$, and the resize need not be undone:
#
# $$ x_{1,2} = W\left(c_x \mp \tfrac{1}{2}b_w\right), \qquad y_{1,2} = H\left(c_y \mp \tfrac{1}{2}b_h\right) $$ {#eq-predict-pixels}
#
# Images share a batch *only if their views have the same size*. Images of different sizes would be padded,
# and convolutions read the padding: the detections of a photo would then depend on its neighbours in the
# batch. With equal sizes they do not, up to floating-point rounding.

# %%
#| export
def _batches(items, size):
    "Lists of at most `size` items, in order"
    return [items[i : i + size] for i in range(0, len(items), size)]


class Predictor:
    "Detect objects in images: `Predictor('runs/mine')('photo.jpg')`"

    def __init__(
        self,
        path,  # folder of a run, or its .pt file
        device: str = 'auto',  # as for `pick_device`
        threshold: float = 0.3,  # scores must be larger
        nms: float = None,  # IoU of per-class suppression; None: none, as DETR is meant to be used
        which: str = 'teacher',  # or 'student'
        like=None,  # Config with settings classes of your own, if the run has such
    ):
        if not 0 <= threshold <= 1:
            raise ConfigError(f'threshold={threshold} is outside [0, 1]; scores are probabilities')
        if nms is not None and not 0 < nms <= 1:
            raise ConfigError(f'nms={nms} is outside (0, 1]; it is an IoU')
        self.device = pick_device(device)
        self.model, self.cfg, self.classes = load_model(path, which, self.device, like)
        self.threshold, self.nms = threshold, nms

    def _same_size(self, views):
        "Detections of views of one size, in pixels of the files"
        batch = to_device(collate(views, self.cfg.view.pad_multiple), self.device)
        with torch.inference_mode():
            outputs = self.model(batch['images'], batch['mask'])
        sizes = [v.orig_size for v in views]
        detections = []
        for d in post_process(outputs, sizes, nms=self.nms, score_threshold=self.threshold):
            d = {k: v.cpu().clone() for k, v in d.items()}  # ordinary tensors, not those of inference mode
            detections.append(d | dict(names=[self.classes[i] for i in d['labels'].tolist()]))
        return detections

    def __call__(
        self,
        image,  # path, PIL image, (H,W,3) uint8 array, or a list of these
        batch: int = 8,  # maximum number of images per forward pass
    ):  # dict(boxes (K,4) xyxy pixels, labels (K,), scores (K,) descending, names), or a list of these
        "Detections of one image or of several, in pixels of the files (@eq-predict-pixels)"
        if not isinstance(image, (list, tuple)):
            return self([image])[0]
        views = [eval_view(as_sample(i), self.cfg.view) for i in image]
        by_size, out = {}, [None] * len(views)
        for n, v in enumerate(views):
            by_size.setdefault(v.size, []).append(n)
        for numbers in by_size.values():
            for group in _batches(numbers, batch):
                for n, detections in zip(group, self._same_size([views[n] for n in group])):
                    out[n] = detections
        return out

    def draw(
        self,
        image,  # one image, as for a call
        found: dict = None,  # its detections; None: detect them
    ) -> Image.Image:  # of the same size
        "The image with its detections"
        image = as_sample(image).image
        d = self(image) if found is None else found
        return draw_on_image(image, d['boxes'], d['labels'], d['scores'], self.classes, kind='teacher')


# %% [markdown]
# The scores of an untrained network are low. With a threshold of zero it still shows that batches change
# nothing, whatever the sizes:

# %%
predictor = Predictor(folder, 'cpu', threshold=0.0)
mixed = [scenes[0].image, scenes[1].image.resize((140, 96)), scenes[2].image]
together, alone = predictor(mixed), [predictor(m) for m in mixed]
pairs = list(zip(together, alone))
worst = max(float((a[k] - b[k]).abs().max()) for a, b in pairs for k in ('boxes', 'scores'))
assert worst < 1e-3 and all(a['names'] == b['names'] for a, b in pairs)
f'largest difference between a batch and single images: {worst:.0e} pixels'


# %% [markdown]
# ## Threshold or suppression?
#
# A stand-in for a trained network shows the effect of both settings. It returns the true boxes like a
# detector whose training was stopped too early: each object once with a high score, and once more, shifted,
# with a lower one.

# %%
class Hasty(torch.nn.Module):
    "Every object of the first scene twice: (score .9, right place) and (score .4, shifted)"

    def forward(self, images, mask):
        s = scenes[0]
        twice = normalize_boxes(torch.cat([s.boxes, s.boxes + 3]), s.size).clamp(0, 1)
        scores = torch.tensor([0.9, 0.4]).repeat_interleave(len(s.boxes))
        p = torch.full((len(twice), 10), 1e-3)
        p[torch.arange(len(twice)), s.labels.repeat(2)] = scores
        return dict(pred_logits=p.logit()[None], pred_boxes=twice[None])


settings = {'threshold .3': (0.3, None), 'threshold .5': (0.5, None), 'threshold .3, NMS .5': (0.3, 0.5)}
hasty = {}
for name, (threshold, nms) in settings.items():
    hasty[name] = Predictor(folder, 'cpu', threshold, nms)
    hasty[name].model = Hasty()
answers = {name: p(photo) for name, p in hasty.items()}
strict = answers['threshold .5']
n_true = len(scenes[0].boxes)
assert [len(a['boxes']) for a in answers.values()] == [2 * n_true, n_true, n_true]
assert torch.allclose(strict['boxes'].sort(0).values, scenes[0].boxes.sort(0).values, atol=1e-3)
strict['names'], [scenes.classes[i] for i in scenes[0].labels]

# %%
#| label: fig-predict-knobs
#| fig-cap: "Duplicates are removed by a threshold above their score, or by suppression. A detector that is trained with one-to-one matching gives them low scores and needs no suppression."
#| fig-alt: "The same scene with doubled boxes, and twice with one box per object"
fig, axes = plt.subplots(1, 3, figsize=(6, 2.4), dpi=80)
for ax, (name, p) in zip(axes, hasty.items()):
    show_image(ax, p.draw(photo.resize((150, 150))), title=name)
plt.tight_layout()
plt.show()


# %% [markdown]
# The boxes are drawn on a larger copy of the scene and lie in the right places, by @eq-predict-pixels.
#
# ## COCO's result format
#
# One dictionary per detection: `image_id`, `category_id`, `bbox` as $(x,y,w,h)$ in pixels, `score`. The
# *image id is the file name* below the folder, and the category id is label + 1, because a folder of photos
# defines no other ids. The class name is added for human readers; tools ignore the extra key. Where an
# annotation file exists, its ids can be used instead, and `pycocotools` reads the result directly.

# %%
#| export
def to_coco(
    found: dict,  # boxes (K,4) xyxy pixels, labels (K,), scores (K,), names; from `Predictor`
    image_id,  # file name, or the id in a COCO file
    category_ids=None,  # label -> id; None: label + 1
) -> list:  # of dicts in COCO's result format, boxes xywh pixels
    "Detections of one image as COCO results"
    boxes = found['boxes'].clone()
    boxes[:, 2:] -= boxes[:, :2]
    labels, scores = found['labels'].tolist(), found['scores'].tolist()
    results = []
    for label, name, box, score in zip(labels, found['names'], boxes.tolist(), scores):
        category = label + 1 if category_ids is None else category_ids[label]
        row = dict(image_id=image_id, category_id=category, category=name)
        results.append(row | dict(bbox=[round(x, 2) for x in box], score=round(score, 4)))
    return results


def coco_ids(
    files,  # paths below `folder`
    folder,  # of the images
    path,  # COCO annotation file that names them
    classes: list,  # of the run
):  # (file -> image id, label -> category id)
    "Ids that an annotation file gives to images and classes; `DataError` where it lacks one of them"
    ds = CocoDataset(path, folder)
    by_path = dict(zip(ds.files, ds.ids))
    known = {Path(f).name: i for f, i in by_path.items()} | by_path
    ids = {f: known.get(f, known.get(Path(f).name)) for f in files}
    for f, i in ids.items():
        if i is None:
            raise DataError(f'{path}: does not name the image {f}; leave the file out, or the image')
    for c in classes:
        if c not in ds.classes:
            known = ', '.join(ds.classes[:10])
            raise DataError(f"{path}: does not have the class '{c}' of the run; it has {known}")
    return ids, [ds.cat_ids[ds.classes.index(c)] for c in classes]


# %%
rows = to_coco(strict, 'photo.png')
assert rows[0]['category_id'] == int(strict['labels'][0]) + 1
rows[0]


# %% [markdown]
# ## A folder at a time
#
# `predict_folder` processes an image, or a folder with its subfolders. It guarantees:
#
# - a file that cannot be decoded is left out and reported, and the others are processed; if *none* can be
#   read, nothing is written;
# - each picture, and `detections.json` at the end, is written completely or not at all;
# - no picture is written over a source image, and images in the output folder are not used as sources.

# %%
#| export
def _sources(source, out):
    "(folder, paths below it) of the images to process; those in the output folder are left out"
    source, out = Path(source), Path(out)
    if not source.exists():
        raise DataError(f'{source}: no such image or folder')
    if source.is_file():
        return source.parent, [source.name]
    files = [image['file_name'] for image in read_folder(source).data['images']]
    if out.resolve() != source.resolve():
        files = [f for f in files if out.resolve() not in (source / f).resolve().parents]
    if not files:
        raise DataError(f'{source}: no image but those in the output folder {out}')
    return source, files


def _pictures(files, folder, out):
    "{file: picture to write}; `ConfigError` if one of them would overwrite an image"
    stems = [Path(f).with_suffix('').as_posix() for f in files]
    paths = {f: Path(out) / f"{s if stems.count(s) == 1 else f}.png" for f, s in zip(files, stems)}
    for p in paths.values():
        if any(p.resolve() == (folder / f).resolve() for f in {p.name, *files} if (folder / f).exists()):
            raise ConfigError(f'{p}: the picture would overwrite an image; choose another output folder')
    return paths


def _readable(files, folder, broken):
    "[(file, image)] of the files that can be decoded; errors of the others are appended to `broken`"
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
    predictor: Predictor,  # with network, threshold and suppression
    source,  # image, or folder of images with its subfolders
    out,  # folder for pictures and detections.json
    draw: bool = True,  # write pictures
    ids=None,  # COCO annotation file whose image and category ids to use; None: file names, label + 1
    batch: int = 8,  # maximum number of images per forward pass
    progress=lambda x: x,  # wraps the list of batches
):  # (COCO results of all images, one line for each file that could not be read)
    "Detect objects in every image; write pictures and one JSON file"
    out, broken, results, done = Path(out), [], [], 0
    folder, files = _sources(source, out)
    image_ids, category_ids = dict(zip(files, files)), None
    if ids:
        image_ids, category_ids = coco_ids(files, folder, ids, predictor.classes)
    pictures = _pictures(files, folder, out) if draw else {}
    for group in progress(_batches(files, batch)):
        images = _readable(group, folder, broken)
        done += len(images)
        detections = predictor([image for _, image in images], batch)
        for (f, image), found in zip(images, detections):
            results += to_coco(found, image_ids[f], category_ids)
            if draw:
                png = io.BytesIO()
                predictor.draw(image, found).save(png, 'PNG')
                atomic_write(pictures[f], png.getvalue())
    if not done:
        others = len(broken) - 1
        more = f' (and {others} more; no image of {source} can be read)' if others else ''
        raise DataError(broken[0] + more)
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
# - The folder of a run is enough for prediction; the teacher is the network to use.
# - The network predicts boxes as fractions of the image, so they are returned in pixels of the file.
# - Only images with views of equal size share a batch, so no result depends on its neighbours.
# - The threshold depends on the application; suppression is for detectors that were trained one-to-many, or
#   not long enough.
# - A broken file is reported and left out; the results have COCO's format, with file names as image ids
#   unless an annotation file gives others.
#
# ## Exercises
#
# 1. Pad the views of two images of different size into one batch and compare with single images. Which
#    convolution reads the padding?
# 2. In `Hasty`, at which shift does an NMS of .5 stop removing the second box?
# 3. Write a `Predictor` that averages the boxes of an image and its mirror image.
