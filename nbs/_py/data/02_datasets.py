# %% [markdown]
# # Data sets {#sec-datasets}
#
# > Use every source as the same kind of object, and hide labels so that they stay hidden.

# %%
#| default_exp data.datasets

# %% [markdown]
# New data should not require a new loader, and unlabelled data should be *just a folder*. Here every source
# becomes the same kind of object. Its item number $i$ is
#
# $$
# \text{ds}[i] = (\text{image}_i,\; B_i \in \mathbb{R}^{N_i \times 4},\; c_i \in \{0,\dots,C-1\}^{N_i},\; g_i \in \{0,1\}^{N_i})
# $$ {#eq-datasets-sample}
#
# where $B_i$ are the boxes in pixels (xyxy), $c_i$ their labels, and $g_i$ marks the boxes to be ignored:
# crowd regions and difficult objects. `annotation(i)` gives the same without decoding the image. $N_i = 0$ is
# normal.
#
# Hiding labels matters as much as reading them. A semi-supervised result is worthless if boxes of the
# unlabelled pool leak into training. `Unlabelled` prevents that in one place.

# %%
#| export
import copy
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from semidetr.core import DataError
from semidetr.data.coco import class_names, pack
from semidetr.data.columns import Columns, Numbers, Texts, as_column
from semidetr.data.entries import as_area
from semidetr.data.files import (
    TILES,
    PixelRange,
    Source,
    declared_size,
    is_ignored,
    label_order,
    load_image,
    read_folder,
    read_size,
    reason,
)
from semidetr.data.formats import read_coco, read_voc
from semidetr.data.yolo import read_yolo


# %% [markdown]
# ## Samples and data sets

# %%
#| export
@dataclass
class Sample:
    "One image with its annotations"

    image: Image.Image  # RGB, upright
    image_id: int | str  # as in the annotation file
    boxes: Tensor  # (N,4) xyxy pixels of `image`, float32
    labels: Tensor  # (N,) int64, 0..C-1
    ignore: Tensor  # (N,) bool: crowd or difficult; neither learnt from nor counted
    path: str | None = None  # file of the image

    @property
    def size(self) -> tuple[int, int]:  # (H, W)
        return self.image.height, self.image.width


def no_objects() -> dict:  # boxes (0,4), labels (0,), ignore (0,)
    "The annotations of an image without objects"
    empty = dict(labels=torch.zeros(0, dtype=torch.int64), ignore=torch.zeros(0, dtype=torch.bool))
    return dict(boxes=torch.zeros(0, 4), **empty)


class DetectionDataset:
    "What every data set offers; subclasses define `__getitem__` and `annotation`"

    name: str = ''  # shown in reports
    classes: list[str] = []  # label -> name
    ids: list = []  # image ids, in order
    has_boxes: bool = True  # False: no image has annotations

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i: int) -> Sample:
        "Image `i` with its annotations"
        raise NotImplementedError

    def annotation(self, i: int) -> dict:  # boxes (N,4) xyxy, labels (N,), ignore (N,), size (H,W)
        "What is known of image `i` without decoding it"
        raise NotImplementedError

    def index_of(self, image_id) -> int:  # position of that image
        "Position of an image id; DataError if there is none"
        if '_index' not in vars(self):
            self._index = {k: n for n, k in enumerate(self.ids)}
        if image_id in self._index:
            return self._index[image_id]
        first = next(iter(self.ids), None)
        raise DataError(
            f'{self.name}: no image with id {image_id!r} ({len(self)} images, the first is {first!r}); '
            'ids are compared with their type'
        )

    def _arrays(self, i):  # `annotation` as arrays
        return {k: v.numpy() if isinstance(v, Tensor) else v for k, v in self.annotation(i).items()}

    def _strip(self):  # the same images, as far as possible without boxes in memory
        return self

    def __repr__(self):
        return f'{type(self).__name__}({self.name}: {len(self)} images, {len(self.classes)} classes)'


# %%
sample = Sample(
    Image.new('RGB', (60, 40)), 7, torch.tensor([[1.0, 2, 11, 22]]), torch.tensor([1]), torch.tensor([False])
)
assert sample.size == (40, 60)  # sizes are (height, width) everywhere
sample.size


# %% [markdown]
# Two functions work for every data set. The *fingerprint* is stored with splits and runs: it changes if a
# box, a class or an id changes, and then an old split is refused; it does not change if the folder moves.
# `coco_dict` is what the evaluation of @sec-metrics reads.

# %%
#| export
def short_hash(
    *parts,  # arrays, and whatever JSON can hold
) -> str:  # 16 hex digits
    "A hash of the content of a data set"
    return _hash(parts)


def _hash(parts):  # iterable
    h = hashlib.sha256()
    for p in parts:
        h.update(p.tobytes() if isinstance(p, np.ndarray) else json.dumps(p).encode())
    return h.hexdigest()[:16]


def fingerprint(ds: DetectionDataset) -> str:  # 16 hex digits
    "Changes when an id, a size, a box, a label or a class changes; not when the folder moves"

    def parts():
        yield ds.classes
        for i, image_id in enumerate(ds.ids):
            a = ds._arrays(i)
            yield from ([image_id, *a['size']], a['boxes'], a['labels'], a['ignore'])

    return _hash(parts())


def coco_dict(ds: DetectionDataset) -> dict:  # COCO ground truth; category id = label + 1, iscrowd = ignore
    "The data set in the form that pycocotools reads"
    images, anns = [], []
    for i, image_id in enumerate(ds.ids):
        a = ds.annotation(i)
        images.append(dict(id=image_id, height=a['size'][0], width=a['size'][1], file_name=str(image_id)))
        area = a.get('area')
        for k, (box, label, ignore) in enumerate(
            zip(a['boxes'].tolist(), a['labels'].tolist(), a['ignore'].tolist())
        ):
            x1, y1, x2, y2 = box
            anns.append(
                dict(
                    id=len(anns) + 1,
                    image_id=image_id,
                    category_id=label + 1,
                    bbox=[x1, y1, x2 - x1, y2 - y1],
                    iscrowd=int(ignore),
                    area=(x2 - x1) * (y2 - y1) if area is None else float(area[k]),
                )
            )
    return dict(
        info={'description': ds.name},
        images=images,
        annotations=anns,
        categories=[dict(id=n + 1, name=c) for n, c in enumerate(ds.classes)],
    )


DetectionDataset.fingerprint = fingerprint
DetectionDataset.coco_dict = coco_dict


# %% [markdown]
# Your own data set needs `ids`, `classes` and two methods; the base class provides the rest.

# %%
class Squares(DetectionDataset):
    "Black images with one white square each"

    name, classes = 'squares', ['square']

    def __init__(self, n):
        self.ids = list(range(n))

    def annotation(self, i):
        return dict(
            boxes=torch.tensor([[i, i, i + 8.0, i + 8]]),
            labels=torch.tensor([0]),
            ignore=torch.tensor([False]),
            size=(32, 32),
        )

    def __getitem__(self, i):
        a, img = self.annotation(i), Image.new('RGB', (32, 32))
        img.paste((255, 255, 255), (i, i, i + 8, i + 8))
        return Sample(img, self.ids[i], a['boxes'], a['labels'], a['ignore'])


# %%
squares = Squares(5)
assert squares.fingerprint() != Squares(6).fingerprint() and squares.index_of(3) == 3
squares, squares.coco_dict()['annotations'][2]


# %% [markdown]
# ## Files on disk
#
# `_refuse` raises the first error that the rules of @sec-records find. `pack` turns the annotations into
# four arrays, sorted by image, so that a million boxes take little memory and a copy for a worker process is
# cheap. Boxes are clipped to the image; boxes without area are left out and counted in `dropped`.

# %%
#| export
def _areas(anns):  # areas of the file, 0 where there is none
    values = [a.get('area', 0) for a in anns]
    if set(map(type, values)) != {float}:  # in most files all are
        values = [as_area(v) or 0 for v in values]
    return np.array(values, dtype=np.float64)


# %%
some_areas = [dict(area='7 px'), dict(area=900), dict(area='1_5'), dict(area=[3])]
assert _areas(some_areas).tolist() == [7, 900, 0, 0]
_areas(some_areas[:2])


# %%
#| export
def _cure(e, where, has_boxes):  # of an image that cannot be read
    if isinstance(e, PixelRange):
        return 'set data.white: the value of a white pixel, e.g. 1, 255 or 65535'
    if isinstance(e, Image.DecompressionBombError):
        return TILES
    if not has_boxes:
        return 'restore it, or leave it out with data.skip_broken=1 or more'
    return f'restore the file (to train without it, delete its entry from {where} and choose another folder)'


# %%
assert _cure(PixelRange(), 'toy.json', True).startswith('set data.white')
_cure(OSError(), 'photos', False)


# %%
#| export
def _refuse(source):  # the first error, as one line
    for f in source.all_faults():
        if f.level == 'error':
            raise DataError(f'{f} (semidetr doctor lists all faults)')


def _of_entries(images, anns, cats, sizes):
    "Columns of the entries of a COCO file without errors; sizes: (height, width) of each image or None"
    cats = label_order(cats)
    index, label = ({e['id']: n for n, e in enumerate(entries)} for entries in (images, cats))
    xywh = np.array([a['bbox'] for a in anns], dtype=np.float64).reshape(-1, 4)
    block = dict(
        image=np.array([index[a['image_id']] for a in anns], dtype=np.int64),
        xywh=xywh,
        labels=np.array([label[a['category_id']] for a in anns], dtype=np.int64),
        ignore=np.array([is_ignored(a) for a in anns], dtype=bool),
        area=_areas(anns),
    )
    known = np.array([s or (0, 0) for s in sizes], dtype=np.float64).reshape(-1, 2)
    packed, starts, dropped = pack([block], known)
    return Columns(
        ids=as_column([im['id'] for im in images]),
        files=Texts.of([im['file_name'] for im in images]),
        sizes=np.array([s or (-1, -1) for s in sizes], dtype=np.int64).reshape(-1, 2),
        starts=starts,
        **packed,
        classes=class_names(cats),
        cat_ids=[c['id'] for c in cats],
        dropped=dropped,
        has_boxes=len(anns) > 0,
    )


# %%
#| export
class _FileColumns(DetectionDataset):
    "What is known of images in a folder"

    def __init__(self, source: Source):
        _refuse(source)
        self.name, self.where, self.folder = source.name, source.where, Path(source.folder)
        self.notes = [str(f) for f in source.faults if f.level != 'error']  # what reading changed or left out
        c = source.columns or self._columns(source.data)
        self.ids, self.files, self.sizes = c.ids, c.files, c.sizes
        self.classes, self.cat_ids = list(c.classes), list(c.cat_ids)  # label -> name, category id
        self.has_boxes, self.dropped, self._starts = c.has_boxes, c.dropped, c.starts
        self._packed = dict(boxes=c.boxes, labels=c.labels, ignore=c.ignore, area=c.area)

    def _columns(self, data):  # content of a COCO file; boxes are clipped, so with them every size is read
        images, anns = data['images'], data.get('annotations') or []
        self.ids, self.files = [im['id'] for im in images], [im['file_name'] for im in images]
        self.has_boxes, sizes = len(anns) > 0, [declared_size(im) for im in images]
        if self.has_boxes:
            sizes = [s or self._read(n, read_size) for n, s in enumerate(sizes)]
        return _of_entries(images, anns, data['categories'], sizes)

    def _size(self, n):  # (H, W) of image n, or None
        h, w = self.sizes[n].tolist()
        return (h, w) if h > 0 else None

    def _read(self, n, read, *args):  # `load_image` or `read_size` of file number n; a DataError names it
        path = self.folder / self.files[n]
        try:
            return read(path, *args)
        except Exception as e:
            raise DataError(
                f'{path}: image {self.ids[n]!r} cannot be read ({reason(e)}); '
                f'{_cure(e, self.where, self.has_boxes)}'
            ) from None


# %%
#| export
class FileDataset(_FileColumns):
    "Images in a folder, annotations in memory; images are decoded on access, no file stays open"

    def annotation(self, i: int) -> dict:  # boxes (N,4) xyxy; labels, ignore, area (N,); size (H,W)
        "What the file says about image `i`, without decoding it"
        arrays = self._arrays(i)
        return {k: torch.from_numpy(v) if k != 'size' else v for k, v in arrays.items()}

    def _arrays(self, i):
        n = range(len(self))[i]
        size = self._size(n) or self._read(n, read_size)
        rows = slice(self._starts[n], self._starts[n + 1])
        return {k: np.array(v[rows]) for k, v in self._packed.items()} | dict(size=size)

    def __getitem__(self, i: int) -> Sample:
        n = range(len(self))[i]
        path, image_id, size = self.folder / self.files[n], self.ids[n], self._size(n)
        image = self._read(n, load_image, size, getattr(self, 'white', 0))  # `data.white` of a run
        if size and (image.height, image.width) != size:
            raise DataError(
                f'{path}: image {image_id!r} is {image.height}x{image.width}, but {self.where} says '
                f'{size[0]}x{size[1]} (height x width); its boxes would be wrong: '
                'correct the entry or restore the image'
            )
        a = self.annotation(n) if size else no_objects()
        return Sample(image, image_id, a['boxes'], a['labels'], a['ignore'], str(path))

    def _strip(self):
        ds = copy.copy(self)
        ds._packed = {k: v[:0] for k, v in self._packed.items()}
        ds._starts, ds.has_boxes = np.zeros_like(self._starts), False
        return ds


# %%
#| export
class CocoDataset(FileDataset):
    "COCO instances; category ids may have gaps (`cat_ids` keeps them), crowd regions are to be ignored"

    def __init__(self, json_path, image_dir=None):
        super().__init__(read_coco(json_path, image_dir))


class VocDataset(FileDataset):
    "Pascal VOC; difficult objects are marked to be ignored, or left out"

    def __init__(self, root, split='trainval', classes=None, keep_difficult=True):
        super().__init__(read_voc(root, split, classes, keep_difficult))


class YoloDataset(FileDataset):
    "YOLO text files beside the images, described by data.yaml"

    def __init__(self, root, split='train'):
        super().__init__(read_yolo(root, split))


class ImageFolder(FileDataset):
    "Any folder of images, for unlabelled data and prediction"

    def __init__(self, root):
        super().__init__(read_folder(root))


# %%
import tempfile
from semidetr.draw import image_grid

# %%
root = Path(tempfile.mkdtemp()) / 'toy'
(root / 'images').mkdir(parents=True)
for name, colour in (('a', (190, 200, 210)), ('b', (210, 200, 190)), ('c', (200, 210, 190))):
    canvas = Image.new('RGB', (60, 40), colour)
    canvas.paste((60, 60, 120), (5, 5, 25, 30))
    canvas.save(root / 'images' / f'{name}.png')
truth = dict(
    images=[
        dict(id=n, file_name=f'{name}.png', width=60, height=40)
        for n, name in ((7, 'a'), (3, 'b'), (11, 'c'))
    ],
    categories=[dict(id=90, name='zebra'), dict(id=18, name='dog')],  # ids with gaps, out of order
    annotations=[
        dict(id=1, image_id=7, category_id=18, bbox=[5, 5, 20, 25]),
        dict(id=2, image_id=7, category_id=90, bbox=[50, 20, 14, 10]),
        dict(id=3, image_id=3, category_id=90, bbox=[5, 5, 20, 25], iscrowd=1),
        dict(id=4, image_id=3, category_id=90, bbox=[9, 9, 0, 4]),
    ],
)
(root / 'instances_train.json').write_text(json.dumps(truth))
toy = CocoDataset(root / 'instances_train.json')
assert toy.classes == ['dog', 'zebra'] and toy.cat_ids == [18, 90]  # labels 0, 1; the file's ids are kept
assert toy[0].boxes.tolist() == [[5, 5, 25, 30], [50, 20, 60, 30]]  # clipped at the border
assert toy[1].ignore.tolist() == [True] and toy.dropped == 1 and len(toy[2].boxes) == 0
toy, toy.annotation(0)

# %% [markdown]
# A fault that cannot be handled stops the program here, not after a night of training:

# %%
typo = json.loads(json.dumps(truth))
typo['annotations'][0]['category_id'] = 19
(root / 'typo.json').write_text(json.dumps(typo))
try:
    CocoDataset(root / 'typo.json')
except DataError as e:
    refusal = str(e).replace(f'{root}/', '')
assert 'annotation 1 of image 7' in refusal and '(known: 90, 18)' in refusal
refusal

# %%
import pickle

# %%
copied = pickle.loads(pickle.dumps(toy))  # what a worker process gets: no open file, no decoded image
assert copied.fingerprint() == toy.fingerprint() and copied[0].image.tobytes() == toy[0].image.tobytes()
len(pickle.dumps(toy))


# %% [markdown]
# ## Parts of a data set
#
# `Subset` selects images. `Unlabelled` removes the boxes: of an annotated file it keeps a copy with empty
# arrays, so that the boxes are not even in memory. Only the health monitor reads the hidden ground truth,
# from the original object and by image id.

# %%
#| export
class Subset(DetectionDataset):
    "Some images of a data set, in the order of `indices`"

    def __init__(
        self,
        ds: DetectionDataset,  # the whole data set
        indices,  # positions in it
    ):
        n, at = len(ds), np.array([int(i) for i in indices], dtype=np.int64)
        self._ds, self.indices = ds, Numbers(at)
        if ((at < 0) | (at >= n)).any():
            wrong = next(i for i in self.indices if not 0 <= i < n)
            raise DataError(
                f'{ds.name}: index {wrong} does not exist ({n} images); '
                'was the split made for another data set?'
            )
        self.name, self.classes, self.has_boxes = ds.name, ds.classes, ds.has_boxes
        self.ids = as_column([ds.ids[i] for i in self.indices])

    def __getitem__(self, i):
        return self._ds[self.indices[i]]

    def annotation(self, i):
        return self._ds.annotation(self.indices[i])

    def _arrays(self, i):
        return self._ds._arrays(self.indices[i])

    def _strip(self):
        return Subset(self._ds._strip(), self.indices)


class Unlabelled(DetectionDataset):
    "The same images without any box: what a training step gets of the unlabelled pool"

    has_boxes = False

    def __init__(
        self,
        ds: DetectionDataset,  # may have boxes; none of them is passed on
        indices=None,  # positions in it; None: all
    ):
        self._ds = (ds if indices is None else Subset(ds, indices))._strip()
        self.name, self.classes, self.ids = ds.name, list(ds.classes), self._ds.ids

    def __getitem__(self, i):
        s = self._ds[i]
        return Sample(s.image, s.image_id, **no_objects(), path=s.path)

    def annotation(self, i):
        return dict(no_objects(), area=torch.zeros(0), size=self._ds.annotation(i)['size'])


# %%
#| export
class Joined(DetectionDataset):
    "Several data sets one after another; if two share an image id, that of data set k becomes 'k/id'"

    def __init__(
        self,
        parts: list,  # data sets with the same classes, or without boxes
    ):
        self.parts, self.name, self.classes = list(parts), '+'.join(p.name for p in parts), parts[0].classes
        self.has_boxes = all(p.has_boxes for p in parts)
        self._at = [(k, i) for k, p in enumerate(parts) for i in range(len(p))]
        self.ids, used = [], set()
        for k, i in self._at:
            image_id = parts[k].ids[i]
            self.ids.append(f'{k}/{image_id}' if image_id in used else image_id)
            used.add(self.ids[-1])

    def __getitem__(self, i):
        k, n = self._at[i]
        s = self.parts[k][n]
        return Sample(s.image, self.ids[i], s.boxes, s.labels, s.ignore, s.path)

    def annotation(self, i):
        k, n = self._at[i]
        return self.parts[k].annotation(n)

    def _strip(self):
        return Joined([p._strip() for p in self.parts])


# %%
both = Joined([Unlabelled(toy), Unlabelled(toy, [1])])
assert both.ids[-1] == '1/3' and len(set(both.ids)) == len(both) and not both.has_boxes
assert both[len(both) - 1].image.tobytes() == toy[1].image.tobytes()
both.ids

# %%
hidden = Unlabelled(toy, [1, 0])
assert hidden.ids == [3, 7] and not hidden.has_boxes and hidden.coco_dict()['annotations'] == []
assert all(len(hidden[i].boxes) == 0 and len(hidden.annotation(i)['labels']) == 0 for i in range(2))
assert hidden[1].image.tobytes() == toy[0].image.tobytes() and len(toy[0].boxes) == 2
hidden[1].boxes.shape

# %%
#| label: fig-datasets-same
#| fig-cap: "A data set and its unlabelled counterpart give the same image; only the boxes differ."
#| fig-alt: "The same small image twice: with two green boxes, and without boxes."
shown = [toy[0], hidden[1]]
titles = ['toy', 'Unlabelled(toy)']
image_grid([s.image for s in shown], [s.boxes for s in shown], titles=titles, ncols=2)

# %% [markdown]
# ## Summary
#
# * Every format becomes a `DetectionDataset`: `ds[i]` decodes, `annotation(i)` does not.
# * Labels are contiguous from 0; category ids with gaps stay in `cat_ids`.
# * Errors in the annotations stop loading with a message of one line; dropped boxes are counted.
# * The fingerprint ties splits and runs to the content of the data.
# * `Unlabelled` gives images and sizes, and nothing else.
#
# ## Exercises
#
# 1. Write a `DetectionDataset` for a CSV file with one box per line. Which of the checks of @sec-records do
#    you get for free if you build a `Source` instead?
# 2. `Unlabelled` still gives the path of the file. Could a training step use it to cheat? Where would you
#    prevent that?
# 3. Why does the fingerprint of a `Subset` depend on the order of its indices, and should it?
