# %% [markdown]
# # Digits scenes {#sec-digits}
#
# > A detection task that needs no download, costs about a millisecond a scene, and never shows the same digit or the same patch of background in two splits.

# %%
#| default_exp digits

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
from semidetr.datasets import DetectionDataset, Sample, _digest

# %%
#| export
_SPLITS = {'train': (0, 3000), 'val': (10_000_000, 300), 'test': (20_000_000, 300)} # first image id, scenes
_BANDS = {'train': (0., .5), 'val': (.5, .75), 'test': (.75, 1.)} # part of the width of every photograph
_PHOTOS = [('sklearn', f'datasets/images/{f}') for f in ('china.jpg', 'flower.jpg')] + [('skimage', f'data/{f}') for f in (
    'astronaut.png', 'chelsea.png', 'coffee.png', 'rocket.jpg', 'camera.png', 'grass.png', 'gravel.png', 'brick.png', 'hubble_deep_field.jpg', 'ihc.png', 'motorcycle_left.png')]

@lru_cache(None)
def photos(
    split:str, # 'train', 'val' or 'test'
)->list[tuple[Image.Image,int]]: # (RGB band, longest side of a patch: the same in every split)
    "The vertical band of each photograph that belongs to the split; they lie in the scikit-learn and scikit-image wheels"
    out, (a, b) = [], _BANDS[split]
    for package, file in _PHOTOS:
        path = Path(importlib.util.find_spec(package).submodule_search_locations[0])/file
        if not path.is_file(): raise DataError(f'{path}: this release of {package} does not ship the photograph; install scikit-learn>=1.4 and scikit-image>=0.22,<0.27')
        img = Image.open(path).convert('RGB')
        out.append((img.crop((round(a*img.width), 0, round(b*img.width), img.height)), img.width//4))
    return out

@lru_cache(None)
def glyphs(
    split:str, # 'train', 'val' or 'test'
)->list[tuple[int,Image.Image]]: # (digit, ink 0..255 at 64 x 64)
    "The handwritten digits of the split: of five in a row three are for training, one each for val and test"
    from sklearn.datasets import load_digits
    data = load_digits()
    mine = [n for n in range(len(data.target)) if ('train', 'train', 'train', 'val', 'test')[n % 5] == split]
    curve = [max(0, min(255, (v-70)*3)) for v in range(256)]
    up = lambda a: Image.fromarray((a*15.9).astype(np.uint8)).resize((64, 64), Image.Resampling.BICUBIC).point(curve)
    return [(int(data.target[n]), up(data.images[n])) for n in mine]


# %%
#| export
def _iou(a, b):
    w, h = min(a[2], b[2])-max(a[0], b[0]), min(a[3], b[3])-max(a[1], b[1])
    if w <= 0 or h <= 0: return 0.
    return w*h/((a[2]-a[0])*(a[3]-a[1])+(b[2]-b[0])*(b[3]-b[1])-w*h)

def layout(
    rng:random.Random, # its first draws decide the layout
    split:str, # which glyphs
    size:int, # side of the scene in pixels
    most:int=6, # objects
)->list[tuple[int,tuple,Image.Image]]: # (digit, (x1,y1,x2,y2), ink of exactly that size)
    "Where which digit stands: 1 to 6 of them, the longer side 12-40 % of the scene, hardly overlapping"
    pool, out = glyphs(split), []
    for _ in range(rng.randint(1, most)):
        digit, ink = rng.choice(pool)
        ink = ink.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR, expand=True)
        ink = ink.crop(ink.getbbox())
        k = size*(.12+.28*rng.random()**1.5)/max(ink.size)
        w, h = (max(2, round(s*k)) for s in ink.size)
        ink = ink.resize((w, h), Image.Resampling.BOX if k < .5 else Image.Resampling.BILINEAR).point(lambda v: 0 if v < 64 else v)
        trim = ink.getbbox()
        ink = ink.crop(trim); w, h = ink.size
        for _ in range(20):
            x, y = rng.randint(0, size-w), rng.randint(0, size-h)
            box = (x, y, x+w, y+h)
            if all(_iou(box, o[1]) < .05 for o in out): out.append((digit, box, ink)); break
    return out

def background(
    rng:random.Random, # continues after the layout
    split:str, # which bands
    size:int, # side of the scene in pixels
)->Image.Image: # RGB
    "A random patch of a random photograph, mirrored or not, brighter or darker"
    img, longest = rng.choice(photos(split))
    side = longest*rng.uniform(.6, 1)
    x, y = rng.uniform(0, img.width-side), rng.uniform(0, img.height-side)
    img = img.resize((size, size), Image.Resampling.BILINEAR, box=(x, y, x+side, y+side))
    if rng.random() < .5: img = img.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    gain, shift = rng.uniform(.5, 1.1), rng.uniform(-20, 50)
    return img.point([max(0, min(255, round(v*gain+shift))) for v in range(256)]*3)


# %%
#| export
def _luma(c): return .299*c[0]+.587*c[1]+.114*c[2]

def paint(
    img:Image.Image, # drawn upon
    box, # (x1,y1,x2,y2)
    ink:Image.Image, # opacity, of the size of the box
    rng:random.Random,
):
    "Draw one digit in a random colour that differs from what lies behind it, strongly or hardly"
    behind = _luma(img.resize((1, 1), Image.Resampling.BOX, box=box).getpixel((0, 0)))
    contrast = rng.uniform(35, 110)
    for _ in range(30):
        colour = tuple(rng.randrange(256) for _ in range(3))
        if abs(_luma(colour)-behind) >= contrast: break
    else: colour = (255,)*3 if behind < 128 else (0,)*3
    img.paste(colour, box[:2], ink)

class DigitsScenes(DetectionDataset):
    "Handwritten digits on photographs, ten classes; scene `i` is a function of (seed, split, i) alone"
    def __init__(self,
        split:str='train', # 'train', 'val', 'test'
        n:int|None=None, # scenes; None: 3000 to train, 300 to validate or test
        size:int=96, # side in pixels
        seed:int=0, # another seed is another data set made of the same parts
    ):
        if split not in _SPLITS: raise DataError(f"digits: no split '{split}'; known: {', '.join(_SPLITS)}")
        first, usual = _SPLITS[split]
        n = usual if n is None else int(n)
        if not 1 <= n < 10_000_000 or not 32 <= size <= 1024: raise DataError(f'digits: n={n}, size={size}; n is at least 1, size is 32 to 1024')
        self.name, self.split, self.n, self.size, self.seed = f'digits-{split}', split, n, int(size), int(seed)
        self.classes, self.ids = [str(d) for d in range(10)], list(range(first, first+n))
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
        for _, box, ink in objects: paint(img, box, ink, rng)
        return Sample(img, self.ids[n], **_tensors(objects))
    def fingerprint(self): return _digest(['digits', 1, self.split, self.n, self.size, self.seed])

def _tensors(objects):
    boxes = torch.tensor([o[1] for o in objects], dtype=torch.float32).reshape(-1, 4)
    return dict(boxes=boxes, labels=torch.tensor([o[0] for o in objects], dtype=torch.int64), ignore=torch.zeros(len(objects), dtype=torch.bool))
