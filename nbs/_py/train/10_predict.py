# %% [markdown]
# # Prediction {#sec-predict}
#
# > Detect objects with a trained run: in files, arrays, tensors, lists and folders, on any device.
#
# This chapter goes from the folder of a run to boxes on a photo. The folder is all that is needed: its
# checkpoint holds the configuration, the class names and both networks. Use the *teacher*; it is the smoother
# of the two, and the tables of this book report it.
#
# Three things go wrong here in practice. Boxes come out in the wrong pixels, because the network saw a resized
# view. The same picture gives other detections as an array than as a file, because its pixels were scaled
# twice. And a folder of ten thousand photos holds one broken file, which must not stop the other 9999 from
# being processed.

# %%
#| default_exp train.predict

# %%
#| hide
import warnings

warnings.filterwarnings('ignore', message='IProgress')

# %%
#| export
import warnings
from pathlib import Path
import numpy as np
import torch
from PIL import Image
from torchvision.ops import batched_nms
from semidetr.core import ConfigError, DataError, pick_device, suggest
from semidetr.draw import draw_on_image
from semidetr.data.files import TILES, PixelRange, load_image, read_folder, reason, scale_pixels, to_rgb
from semidetr.data.datasets import Sample
from semidetr.data.augment import eval_view
from semidetr.data.loader import collate
from semidetr.detectors.contract import build_detector, post_process
from semidetr.train.config import from_saved
from semidetr.train.checkpoint import is_backbone_alone, load_checkpoint, load_weights
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
    if str(path).endswith('.pt2'):
        raise ConfigError(f'{path}: a torch program runs without this package (torch.export.load); use onnx')
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
    if is_backbone_alone(state):
        warnings.warn(f'{path}: only its backbone is trained; its detections mean nothing', stacklevel=2)
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
# A path, a PIL image, an array or a tensor becomes a `Sample` without boxes:
#
# | kind | shape | values |
# | :--- | :--- | :--- |
# | path | | decoded like the training images (@sec-records): turned by its EXIF tag |
# | PIL image | | all modes; not turned |
# | numpy array | $(H,W,3)$ RGB, $(H,W)$ grey | 8 or 16 bits, or floats |
# | tensor, on any device | $(3,H,W)$ RGB, $(1,H,W)$ grey | 8 bits, or floats in $[0,1]$ |
#
# All are scaled like the training images: 16 bits by the type, floats in files, PIL images and arrays by the
# run's `data.white`. Nothing is guessed from the values. A tensor of floats outside of $[0,1]$ is an error: it
# has another scale, or it was normalised already, and the detector would normalise it again.

# %%
#| export
_WHITE = 'set `white` (in training data.white): the value of a white pixel, e.g. 1, 255 or 65535'


def _array_pixels(a, white=0):
    "uint8 pixels (H,W,3) or (H,W) of an array; floats and 16 bits are scaled"
    if a.ndim == 3 and a.shape[2] == 1:
        a = a[..., 0]
    deep = a.dtype == np.uint16 or a.dtype.kind == 'f'
    if not (deep or a.dtype == np.uint8) or not (a.ndim == 2 or (a.ndim == 3 and a.shape[2] == 3)):
        raise DataError(
            'an array must be uint8, uint16 or float of shape (H, W, 3), or (H, W) for grey, '
            f'not {a.dtype} {a.shape}; convert it first'
        )
    try:
        return scale_pixels(a, white) if deep and a.size else a
    except PixelRange as e:
        raise DataError(f'array: {e}; give uint8, or {_WHITE}') from None


def _tensor_pixels(t):
    "uint8 pixels (H,W,3) or (H,W) of a tensor (3,H,W) or (1,H,W)"
    shape, t = tuple(t.shape), t.detach().cpu()
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise DataError(f'a tensor must have the shape (3, H, W), or (1, H, W) for grey, not {shape}')
    if t.dtype.is_floating_point:
        t = t.float()
        if not ((t >= 0) & (t <= 1)).all():
            raise DataError(
                f'a tensor of floats must lie in [0, 1], not {t.min():.3g} to {t.max():.3g}; '
                'give pixels / 255, not normalised'
            )
        t = (255 * t).round().to(torch.uint8)
    if t.dtype != torch.uint8:
        raise DataError(f'a tensor must be uint8, or float in [0, 1], not {t.dtype}; convert it first')
    return _array_pixels(t.permute(1, 2, 0).numpy())


# %%
#| export
def as_sample(
    image,  # path, PIL image, (H,W,3) or (H,W) array, (3,H,W) or (1,H,W) tensor: uint8 or in [0,1]
    white: float = 0,  # value of a white pixel if the type cannot tell, as for `scale_pixels`
) -> Sample:  # without boxes
    "An image of any kind, ready for a view; `DataError` if it is not an image"
    path = str(image) if isinstance(image, (str, Path)) else None
    if path:
        try:
            image = load_image(path, white=white)
        except PixelRange as e:
            raise DataError(f'{path}: {e}; {_WHITE}') from None
        except Exception as e:
            raise DataError(
                f'{path}: cannot be read as an image ({reason(e)}); '
                f'{TILES if isinstance(e, Image.DecompressionBombError) else "restore it or leave it out"}'
            ) from None
    if isinstance(image, torch.Tensor):
        image = _tensor_pixels(image)
    if isinstance(image, np.ndarray):
        image = _array_pixels(image, white)
        if not image.size:
            raise DataError(f'an image needs at least one pixel, not the shape {image.shape}')
        image = Image.fromarray(np.ascontiguousarray(image))
    if not isinstance(image, Image.Image):
        kind = type(image).__name__
        raise DataError(f'{kind} is not an image; give a path, a PIL image, an array or a tensor')
    try:
        image = to_rgb(image, white)
    except PixelRange as e:
        raise DataError(f'{path or "image"}: {e}; {_WHITE}') from None
    return Sample(
        image,
        path or 'image',
        torch.zeros(0, 4),
        torch.zeros(0, dtype=torch.long),
        torch.zeros(0, dtype=torch.bool),
        path,
    )


# %%
photo = scenes[0].image
photo.save(folder / 'photo.png')
pixels = np.array(photo)
tensor = torch.from_numpy(pixels).permute(2, 0, 1)
forms = [folder / 'photo.png', photo, pixels, tensor, tensor / 255, tensor.half() / 255]
assert all(np.array_equal(as_sample(f).image, pixels) for f in forms)
refused = []
for wrong in (np.zeros((4, 4)), tensor * 1.0, tensor.long()):
    try:
        as_sample(wrong)
    except DataError as e:
        refused.append(str(e))
assert len(refused) == 3
refused


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


def _readable(files, folder, broken, white=0):
    "[(file, image)] of the files that can be decoded; errors of the others are appended to `broken`"
    out = []
    for f in files:
        try:
            out.append((f, as_sample(folder / f, white).image))
        except DataError as e:
            broken.append(str(e))
    return out


def _check_names(names, classes):
    "Labels of class names, None for all; `ConfigError` if there is no such class"
    for name in names or ():
        if name not in classes:
            raise ConfigError(f"the run has no class '{name}'; {suggest(name, classes)}")
    return torch.tensor([classes.index(name) for name in names]) if names else None


def _one_image(image):
    "Is it one image? A list, a tuple, a batch (four dimensions) and a folder are several"
    if isinstance(image, (str, Path)):
        return not Path(image).is_dir()
    return not isinstance(image, (list, tuple)) and getattr(image, 'ndim', 3) != 4


# %%
assert [_one_image(i) for i in ('a.jpg', folder, [photo], torch.zeros(2, 3, 4, 4))] == [
    True,
    False,
    False,
    False,
]
_check_names(['7', '2'], scenes.classes)


# %%
#| export
class BatchPredictor:
    "The network of a run, and what is kept of its detections"

    def __init__(
        self,
        path,  # folder of a run, its .pt file, a .safetensors or .onnx file, or a `Run`
        device: str = 'auto',  # as for `pick_device`
        threshold: float = 0.3,  # scores must be larger
        nms: float
        | None = None,  # IoU of per-class suppression; None or 0: none, as DETR is meant to be used
        which: str = 'teacher',  # or 'student'
        like=None,  # Config with settings classes of your own, if the run has such
        classes=None,  # names of the classes to keep; None: all
        suppressor: bool = True,  # read the scores of a learned suppressor, if the detector has one
    ):
        if not 0 <= threshold <= 1:
            raise ConfigError(f'threshold={threshold} is outside [0, 1]; scores are probabilities')
        if nms is not None and not 0 <= nms <= 1:
            raise ConfigError(f'nms={nms} is outside [0, 1]; it is an IoU, and 0 stands for no suppression')
        path = path if isinstance(path, (str, Path)) else getattr(path, 'folder', path)
        self.device, self.which = pick_device(device), which
        self.model, self.cfg, self.classes = load_model(path, which, self.device, like)
        self.threshold, self.nms, self.suppressor = threshold, nms or None, suppressor
        self.keep = _check_names(classes, self.classes)

    def _same_size(self, views):
        "Detections of views of one size, in pixels of the files"
        batch = to_device(collate(views, self.cfg.view.pad_multiple), self.device)
        with torch.inference_mode():
            outputs = self.model(batch['images'], batch['mask'])
        sizes = [v.orig_size for v in views]
        detections = []
        rules = dict(nms=self.nms, score_threshold=self.threshold, suppressor=self.suppressor)
        for d in post_process(outputs, sizes, **rules):
            d = {k: v.cpu().clone() for k, v in d.items()}  # ordinary tensors, not those of inference mode
            if self.keep is not None:
                kept = torch.isin(d['labels'], self.keep)
                d = {k: v[kept] for k, v in d.items()}
            detections.append(d | dict(names=[self.classes[i] for i in d['labels'].tolist()]))
        return detections


# %%
#| export
class Predictor(BatchPredictor):
    "Detect objects in images: `Predictor('runs/mine')('photo.jpg')`"

    def __call__(
        self,
        image,  # image as for `as_sample`, list of such, (B,3,H,W) tensor, (B,H,W,3) array, or a folder
        batch: int = 8,  # maximum number of images per forward pass
    ):  # dict(boxes (K,4) xyxy pixels, labels (K,), scores (K,) descending, names); a list; {file: dict}
        "Detections of one image, of several, or of a folder, in pixels of the files (@eq-predict-pixels)"
        if _one_image(image):
            return self([image])[0]
        if isinstance(image, (str, Path)):
            return self.folder(image, batch)
        views = [eval_view(as_sample(i, self.cfg.data.white), self.cfg.view) for i in image]
        by_size, out = {}, [None] * len(views)
        for n, v in enumerate(views):
            by_size.setdefault(v.size, []).append(n)
        for numbers in by_size.values():
            for group in _batches(numbers, batch):
                for n, detections in zip(group, self._same_size([views[n] for n in group])):
                    out[n] = detections
        return out

    def files(
        self,
        folder: Path,  # where the files are
        files: list,  # paths below it
        batch: int = 8,  # images in memory, and maximum number per forward pass
        broken: list = None,  # a line for each file that cannot be read is appended
        progress=lambda x: x,  # wraps the list of batches
    ):  # iterator of (file, PIL image, its detections)
        "Detections file by file, whatever their number; files that cannot be read are left out"
        broken = [] if broken is None else broken
        for group in progress(_batches(files, batch)):
            images = _readable(group, Path(folder), broken, self.cfg.data.white)
            detections = self([image for _, image in images], batch)
            for (f, image), found in zip(images, detections):
                yield f, image, found

    def folder(
        self,
        folder: Path,  # with its subfolders
        batch: int = 8,  # maximum number of images per forward pass
    ) -> dict:  # path below the folder -> detections
        "Detections of a folder; a warning for each file that cannot be read, an error if none can"
        names, broken = [image['file_name'] for image in read_folder(folder).data['images']], []
        out = {f: found for f, _, found in self.files(folder, names, batch, broken)}
        if not out:
            raise DataError(broken[0])
        for line in broken:
            warnings.warn(line)
        return out

    def draw(
        self,
        image,  # one image, as for a call
        found: dict = None,  # its detections; None: detect them
    ) -> Image.Image:  # of the same size
        "The image with its detections"
        image = as_sample(image, self.cfg.data.white).image
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
# Whether suppression would change much can be counted without any truth: it is the share of the boxes shown
# that overlap a better one of their class. `nms_hint` says so above 15 %, which separates the runs on fod12
# with two labels per class (@sec-abl-few-labels). On 40 test images, among boxes with scores above 0.3:
#
# | run (seed) | share | AP | AP with suppression |
# | :--- | ---: | ---: | ---: |
# | mean teacher (0) | 29 % | 27.9 | 29.4 |
# | Semi-DETR (0) | 22 % | 27.4 | 29.4 |
# | Semi-DETR (1) | 30 % | 23.0 | 25.1 |
# | supervised (0) | 11 % | 27.5 | 27.8 |
# | Semi-DETR plus (0) | 0 % | 31.2 | 31.1 |
# | Semi-DETR plus (1) | 0 % | 27.8 | 27.7 |

# %%
#| export
OVERLAP, MANY = 0.7, 0.15  # IoU of the suppression in question, share of boxes from which the hint is given


def removed_by_nms(
    detections,  # iterable of dict(boxes (K,4) xyxy pixels, labels (K,), scores (K,))
    threshold: float = 0.0,  # boxes with lower scores are not counted
    iou: float = OVERLAP,  # of the suppression
) -> tuple:  # (number of boxes that it removes, number of boxes)
    "What per-class suppression would remove from the detections of some images"
    gone = total = 0
    for d in detections:
        shown = d['scores'] > threshold
        boxes, scores, labels = d['boxes'][shown].float(), d['scores'][shown].float(), d['labels'][shown]
        total += len(boxes)
        gone += len(boxes) - len(batched_nms(boxes, scores, labels, iou))
    return gone, total


def nms_hint(
    detections,  # as for `removed_by_nms`
    threshold: float = 0.0,  # boxes with lower scores are not counted
    option: str = 'nms',  # what switches suppression on, for the message
) -> str:  # a line, '' if suppression would remove at most 15 % of the boxes
    "A hint where suppression would change much"
    gone, total = removed_by_nms(detections, threshold)
    if gone <= MANY * total:
        return ''
    return (
        f'{gone} of {total} boxes overlap a better one of their class (IoU above {OVERLAP}); '
        f'{option}={OVERLAP} leaves them out'
    )


# %%
assert removed_by_nms([answers['threshold .3']], iou=0.5) == (n_true, 2 * n_true)
assert nms_hint([strict]) == '' and nms_hint([]) == ''
doubled = {k: strict[k].repeat_interleave(2, 0) for k in ('boxes', 'labels', 'scores')}
nms_hint([strict, doubled])

# %% [markdown]
# The boxes are drawn on a larger copy of the scene and lie in the right places, by @eq-predict-pixels.
#
# ## Some classes, and whole folders
#
# `classes` keeps detections by name; the others are dropped after suppression, which compares boxes of one
# class only. A folder is read a batch at a time, so its size does not matter, and a file that cannot be read is
# a warning.

# %%
first = Predictor(folder, 'cpu', 0.3, 0.5, classes=[strict['names'][0]])
first.model = Hasty()
some = first(photo)
assert set(some['names']) == {strict['names'][0]}
many = folder / 'photos'
(many / 'more').mkdir(parents=True)
for i in range(3):
    scenes[i].image.save(many / ('more' if i else '.') / f'{i}.jpg')
(many / 'cut.jpg').write_bytes((many / '0.jpg').read_bytes()[:700])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    by_file = predictor(many)
assert [*by_file] == ['0.jpg', 'more/1.jpg', 'more/2.jpg'] and 'cut.jpg' in str(caught[-1].message)
{f: len(found['boxes']) for f, found in by_file.items()}

# %% [markdown]
# ## Summary
#
# - The folder of a run is enough for prediction; the teacher is the network to use.
# - The network predicts boxes as fractions of the image, so they are returned in pixels of the file.
# - Only images with views of equal size share a batch, so no result depends on its neighbours.
# - The threshold depends on the application; suppression is for detectors that were trained one-to-many, or
#   not long enough.
# - Files, PIL images, arrays and tensors of the same pixels give the same detections; anything ambiguous is an
#   error. Files of results are the subject of @sec-predict-files.
#
# ## Exercises
#
# 1. Pad the views of two images of different size into one batch and compare with single images. Which
#    convolution reads the padding?
# 2. In `Hasty`, at which shift does an NMS of .5 stop removing the second box?
# 3. Write a `Predictor` that averages the boxes of an image and its mirror image.
