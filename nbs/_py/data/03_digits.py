# %% [markdown]
# # Digits scenes {#sec-digits}
#
# > Use a detection task without a download, whose splits share neither a digit nor a background.

# %%
#| default_exp data.digits

# %% [markdown]
# A book that runs everywhere needs a task that is always available: real enough that a detector must localise
# and classify, small enough that it learns within minutes on two cores. Handwritten digits on photographs are
# such a task, and both come with packages that are installed anyway. Nothing is downloaded.
#
# Scene $i$ of a split $s$ is a pure function
#
# $$
# (\text{image}_i, B_i, c_i) = f\big(h(\text{seed}, s, i)\big)
# $$ {#eq-digits-scene}
#
# with $h$ the stable hash of @sec-core. The order of access, the number of workers and the length of the data
# set do not matter.
#
# What the splits share does matter. If a glyph or a patch of background occurs in both training and
# validation, a model may memorise it. Here they share neither.

# %%
#| export
import importlib.util
import random
from functools import lru_cache
from pathlib import Path
import numpy as np
import torch
from PIL import Image
from semidetr.core import DataError, stable_hash
from semidetr.data.datasets import DetectionDataset, Sample, short_hash

# %% [markdown]
# ## Splits without common parts
#
# Each photograph is cut into three vertical bands: the left half is for training, the next quarter for
# validation, the last for testing. All splits thus have the same kinds of background without sharing a pixel.
# Patches are at most a quarter of the photograph wide in every split, so that all splits have the same scale.
# Of five consecutive glyphs three go to training, one to validation and one to testing.

# %%
#| export
_SPLITS = {'train': (0, 3000), 'val': (10_000_000, 300), 'test': (20_000_000, 300)}  # first image id, scenes
_BANDS = {'train': (0.0, 0.5), 'val': (0.5, 0.75), 'test': (0.75, 1.0)}  # share of a photograph's width
_PHOTOS = {  # package: photographs in it
    'sklearn': 'datasets/images/china.jpg datasets/images/flower.jpg',
    'skimage': 'data/astronaut.png data/chelsea.png data/coffee.png data/rocket.jpg data/camera.png '
    'data/grass.png data/gravel.png data/brick.png data/hubble_deep_field.jpg data/ihc.png '
    'data/motorcycle_left.png',
}


def _photo(package, file):
    path = Path(importlib.util.find_spec(package).submodule_search_locations[0]) / file
    if not path.is_file():
        raise DataError(
            f'{path}: this release of {package} does not ship the photograph; '
            'install scikit-learn>=1.4 and scikit-image>=0.22,<0.27'
        )
    return Image.open(path).convert('RGB')


@lru_cache(None)
def photos(
    split: str,  # 'train', 'val' or 'test'
) -> list[tuple[Image.Image, int]]:  # (RGB band, longest side of a patch: the same in every split)
    "The split's band of each photograph that comes with scikit-learn and scikit-image"
    left, right = _BANDS[split]
    out = []
    for package, files in _PHOTOS.items():
        for file in files.split():
            img = _photo(package, file)
            band = img.crop((round(left * img.width), 0, round(right * img.width), img.height))
            out.append((band, img.width // 4))
    return out


@lru_cache(None)
def glyphs(
    split: str,  # 'train', 'val' or 'test'
) -> list[tuple[int, Image.Image]]:  # (digit, ink 0..255 at 64 x 64)
    "The handwritten digits of the split: of five in a row three for training, one each for val and test"
    from sklearn.datasets import load_digits

    data = load_digits()
    owner = ('train', 'train', 'train', 'val', 'test')
    contrast = [max(0, min(255, (v - 70) * 3)) for v in range(256)]
    out = []
    for n, (image, digit) in enumerate(zip(data.images, data.target)):
        if owner[n % 5] == split:
            small = Image.fromarray((image * 15.9).astype(np.uint8))
            ink = small.resize((64, 64), Image.Resampling.BICUBIC).point(contrast)
            out.append((int(digit), ink))
    return out


# %%
parts = {s: (len(glyphs(s)), len(photos(s)), sum(p.width * p.height for p, _ in photos(s))) for s in _SPLITS}
assert [n for n, _, _ in parts.values()] == [1079, 359, 359]
inks = [{ink.tobytes() for _, ink in glyphs(s)} for s in _SPLITS]
assert not (inks[0] & inks[1] or inks[0] & inks[2] or inks[1] & inks[2])
parts  # glyphs, photographs, pixels of background


# %% [markdown]
# ## A scene
#
# First the layout: one to six digits, each rotated by up to 15 degrees, its longer side 20 to 45 % of the
# scene. A digit that would overlap another is moved, and left out after twenty attempts. The ink is cropped
# to its own extent before it is placed, so the box is tight by construction.

# %%
#| export
def _iou(a, b):  # of two tuples: for a single pair `boxes.box_iou` on tensors takes a hundred times as long
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    return w * h / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h)


def layout(
    rng: random.Random,  # its first draws decide the layout
    split: str,  # which glyphs
    size: int,  # side of the scene in pixels
    most: int = 6,  # objects
) -> list[tuple[int, tuple, Image.Image]]:  # (digit, (x1,y1,x2,y2), ink of exactly that size)
    "Which digits are where: 1 to 6 of them, the longer side 20-45 % of the scene, IoU below 0.05"
    pool, out = glyphs(split), []
    for _ in range(rng.randint(1, most)):
        digit, ink = rng.choice(pool)
        ink = ink.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR, expand=True)
        ink = ink.crop(ink.getbbox())
        k = size * rng.uniform(0.2, 0.45) / max(ink.size)
        w, h = (max(2, round(s * k)) for s in ink.size)
        ink = ink.resize((w, h), Image.Resampling.BOX if k < 0.5 else Image.Resampling.BILINEAR)
        ink = ink.point(lambda v: 0 if v < 64 else v)
        ink = ink.crop(ink.getbbox())
        w, h = ink.size
        for _ in range(20):
            x, y = rng.randint(0, size - w), rng.randint(0, size - h)
            box = (x, y, x + w, y + h)
            if all(_iou(box, o[1]) < 0.05 for o in out):
                out.append((digit, box, ink))
                break
    return out


# %%
objects = layout(random.Random(3), 'train', 96)
assert all(
    ink.size == (x2 - x1, y2 - y1) and ink.getbbox() == (0, 0, *ink.size)
    for _, (x1, y1, x2, y2), ink in objects
)
assert layout(random.Random(3), 'train', 96)[0][1] == objects[0][1]
[(digit, box) for digit, box, _ in objects]


# %% [markdown]
# Then the background and the paint. The colour is random, but its brightness differs from that of the
# background by a random amount: some digits stand out, some are hard to see.

# %%
#| export
def background(
    rng: random.Random,  # continues after the layout
    split: str,  # which bands
    size: int,  # side of the scene in pixels
) -> Image.Image:  # RGB
    "A random patch of a random photograph, mirrored or not, brighter or darker"
    img, longest = rng.choice(photos(split))
    side = longest * rng.uniform(0.6, 1)
    x, y = rng.uniform(0, img.width - side), rng.uniform(0, img.height - side)
    img = img.resize((size, size), Image.Resampling.BILINEAR, box=(x, y, x + side, y + side))
    if rng.random() < 0.5:
        img = img.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    gain, shift = rng.uniform(0.5, 1.1), rng.uniform(-20, 50)
    return img.point([max(0, min(255, round(v * gain + shift))) for v in range(256)] * 3)


def _luma(c):
    return 0.299 * c[0] + 0.587 * c[1] + 0.114 * c[2]


def paint(
    img: Image.Image,  # drawn upon
    box,  # (x1,y1,x2,y2)
    ink: Image.Image,  # opacity, of the size of the box
    rng: random.Random,
):
    "Draw one digit in a random colour whose brightness differs from that of the background"
    behind = _luma(img.resize((1, 1), Image.Resampling.BOX, box=box).getpixel((0, 0)))
    contrast = rng.uniform(60, 130)
    for _ in range(30):
        colour = tuple(rng.randrange(256) for _ in range(3))
        if abs(_luma(colour) - behind) >= contrast:
            break
    else:
        colour = (255,) * 3 if behind < 128 else (0,) * 3
    img.paste(colour, box[:2], ink)


# %%
#| export
class DigitsScenes(DetectionDataset):
    "Handwritten digits on photographs, ten classes; scene `i` is a function of (seed, split, i) alone"

    def __init__(
        self,
        split: str = 'train',  # 'train', 'val', 'test'
        n: int | None = None,  # scenes; None: 3000 for training, 300 for validation or testing
        size: int = 96,  # side in pixels
        seed: int = 0,  # another seed is another data set of the same glyphs and photographs
    ):
        if split not in _SPLITS:
            raise DataError(f"digits: no split '{split}'; known: {', '.join(_SPLITS)}")
        first, default_n = _SPLITS[split]
        n = default_n if n is None else int(n)
        if not 1 <= n < 10_000_000 or not 32 <= size <= 1024:
            raise DataError(f'digits: n={n}, size={size}; n is at least 1, size is 32 to 1024')
        self.name, self.split, self.n = f'digits-{split}', split, n
        self.size, self.seed = int(size), int(seed)
        self.classes, self.ids = [str(d) for d in range(10)], list(range(first, first + n))

    def _layout(self, i):
        n = range(self.n)[i]
        rng = random.Random(stable_hash('digits', self.seed, self.split, n))
        return n, rng, layout(rng, self.split, self.size)

    def annotation(self, i):
        _, _, objects = self._layout(i)
        return _tensors(objects) | dict(size=(self.size, self.size))

    def __getitem__(self, i):
        n, rng, objects = self._layout(i)
        img = background(rng, self.split, self.size)
        for _, box, ink in objects:
            paint(img, box, ink, rng)
        return Sample(img, self.ids[n], **_tensors(objects))

    def fingerprint(self):
        return short_hash(['digits', 2, self.split, self.n, self.size, self.seed])


def _tensors(objects):
    boxes = torch.tensor([o[1] for o in objects], dtype=torch.float32).reshape(-1, 4)
    return dict(
        boxes=boxes,
        labels=torch.tensor([o[0] for o in objects], dtype=torch.int64),
        ignore=torch.zeros(len(objects), dtype=torch.bool),
    )


# %%
scenes = DigitsScenes(n=300)
late = scenes[200].image.tobytes()
first = scenes[0]
assert scenes[200].image.tobytes() == late  # in any order
assert DigitsScenes(n=201)[200].image.tobytes() == late  # whatever the length
assert torch.equal(scenes.annotation(0)['boxes'], first.boxes)  # known without painting
assert scenes.fingerprint() != DigitsScenes(n=300, seed=1).fingerprint()
scenes, first.labels, first.boxes

# %%
import matplotlib.pyplot as plt
from semidetr.draw import COLORS, image_grid

# %%
#| label: fig-digits-scenes
#| fig-cap: "Training scenes (top) and validation scenes (bottom) are of the same kind, but have no digit and no background in common."
#| fig-alt: "Two rows of five small photographs with coloured handwritten digits, each digit in a tight green box."
shown = [DigitsScenes(s)[i] for s in ('train', 'val') for i in range(5)]
image_grid([s.image for s in shown], shown, classes=scenes.classes, ncols=5, cell=1.15)

# %% [markdown]
# ## How hard is the task?
#
# It should be neither trivial nor hopeless. Sizes vary by a factor of two, all classes occur equally often,
# and the number of objects varies.

# %%
known = [scenes.annotation(i) for i in range(len(scenes))]
boxes, labels = torch.cat([a['boxes'] for a in known]), torch.cat([a['labels'] for a in known])
side = (boxes[:, 2:] - boxes[:, :2]).amax(1)
assert side.min() >= 15 and side.max() <= 0.48 * 96 and labels.bincount(minlength=10).min() > 50
labels.bincount(minlength=10)

# %%
#| label: fig-digits-sizes
#| fig-cap: "The longer side is between a fifth and almost half of the scene; crowded scenes are a little rarer, because there is not always room for another large digit."
#| fig-alt: "Two histograms: longer side of the boxes in pixels, from 20 to 45 % of the scene; number of objects per scene, from 1 to 6."
fig, axes = plt.subplots(1, 2, figsize=(5.5, 1.9), dpi=80, layout='constrained')
axes[0].hist(side, bins=15, color=COLORS['truth'])
axes[0].set(xlabel='longer side, pixels', ylabel='boxes')
objects_per_scene = [len(a['labels']) for a in known]
axes[1].bar(range(1, 7), np.bincount(objects_per_scene, minlength=7)[1:], color=COLORS['truth'])
axes[1].set(xlabel='objects per scene', ylabel='scenes')
plt.show()

# %% [markdown]
# ## Summary
#
# * Scene $i$ is a function of seed, split and $i$; nothing is stored or downloaded.
# * The splits share neither a glyph nor a pixel of background.
# * Boxes are tight to the ink by construction, and known without painting.
# * A scene costs about a millisecond, so loading never limits training.
# * Image ids differ between the splits: 0, 10 000 000 and 20 000 000 onwards.
#
# ## Exercises
#
# 1. Draw scenes with `seed=1`. What is the same as with `seed=0`, and may a model that was trained on one be
#    tested on the other?
# 2. Raise the overlap that `layout` tolerates. What happens to the duplicates that a detector without
#    suppression must avoid?
# 3. Make one class ten times rarer than the others. At which share of labels does a pseudo-labelling teacher
#    forget it?
