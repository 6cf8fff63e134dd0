# %% [markdown]
# # Images and annotation records {#sec-records}
#
# > Decode any image the way its annotations mean it, and say of an annotation file what is wrong, where, and
# > what to do.

# %%
#| default_exp data.files

# %% [markdown]
# A detector that learns from wrong boxes does not crash; it learns badly. Three causes recur. An image was
# turned by its EXIF tag in the annotation tool and not in the loader. A converter wrote corners where width
# and height were meant. A class id is in no list, and its loss stays at zero for days. None of them shows in
# a loss curve.
#
# So this chapter reads *records*: what the files say, in one form, whatever the format. A list of rules then
# judges the records. Loading stops at the first error (@sec-datasets); the doctor collects them all
# (@sec-doctor). One list serves both, so they cannot disagree.

# %%
#| export
import json
import math
import os
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from pathlib import Path
import numpy as np
from PIL import Image
from semidetr.core import DataError, suggest

# %% [markdown]
# ## Pixels, the way the annotations mean them
#
# A camera held upright often stores the picture lying on its side and adds a tag, the EXIF orientation: *turn
# me*. Viewers obey it. Whether the boxes were drawn before or after the turn is written nowhere, but the
# annotation file says how large the image was. With the raw size $(h, w)$, the size after the turn $(h', w')$
# and the declared size $(H, W)$ the rule is
#
# $$
# \text{turn} \iff \lnot\,[\,(H, W) = (h, w) \neq (h', w')\,]
# $$ {#eq-records-turn}
#
# In words: turn, as every viewer does, unless the raw size alone agrees with the annotations. Half turns and
# mirrorings do not change the size; there the rule turns, and the doctor leaves a note.

# %%
#| export
IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff', '.ppm', '.pgm', '.gif', '.jfif')
_ORIENTATION, _QUARTER_TURNS = 0x0112, (5, 6, 7, 8)

_UPRIGHT = {
    2: [Image.Transpose.FLIP_LEFT_RIGHT],
    3: [Image.Transpose.ROTATE_180],
    4: [Image.Transpose.FLIP_TOP_BOTTOM],
    5: [Image.Transpose.TRANSPOSE],
    6: [Image.Transpose.ROTATE_270],
    7: [Image.Transpose.TRANSVERSE],
    8: [Image.Transpose.ROTATE_90],
}


def _turn(img, size):  # EXIF orientation to apply (0: none); `size` is what the annotations were made for
    o = img.getexif().get(_ORIENTATION, 1)
    if o not in _UPRIGHT:
        return 0
    raw = (img.height, img.width)
    upright = raw[::-1] if o in _QUARTER_TURNS else raw
    return 0 if size is not None and tuple(size) == raw != upright else o


def image_orientation(
    path,  # image file
) -> int:  # 1: upright
    "EXIF orientation, from the header alone"
    with Image.open(path) as img:
        return img.getexif().get(_ORIENTATION, 1)


def read_size(
    path,  # image file
) -> tuple[int, int]:  # (H, W) of the upright image
    "Size from the header alone"
    with Image.open(path) as img:
        return (img.width, img.height) if _turn(img, None) in _QUARTER_TURNS else (img.height, img.width)


# %% [markdown]
# All other modes become RGB: grey, palette, CMYK, transparency. Images of 16 bits are scaled. Pillow's own
# conversion would cut them off at 255, and a microscope picture would come out white.

# %%
#| export
def _rgb(img):  # any PIL mode -> RGB; 16 bits are scaled, not cut off
    if img.mode[:1] in 'IF':
        a = np.asarray(img, dtype=np.float32)
        img = Image.fromarray((a / 256 if a.max(initial=0) > 255 else a).clip(0, 255).astype(np.uint8))
    return img.convert('RGB')


def load_image(
    path,  # image file of any mode
    size=None,  # (H, W) that the annotations were made for, if known
) -> Image.Image:  # RGB
    "Decode one image; it is turned by its EXIF tag unless only the raw size agrees with the annotations"
    with Image.open(path) as img:
        img.load()
        o = _turn(img, size)
        return _rgb(img.transpose(_UPRIGHT[o][0]) if o else img)


# %%
import tempfile
import matplotlib.pyplot as plt
import torch
from semidetr.draw import draw_boxes, show_image

# %%
root = Path(tempfile.mkdtemp())
scene = Image.new('RGB', (60, 40), (70, 130, 180))
scene.paste((220, 60, 40), (40, 4, 54, 18))  # a red square, top right
tag = Image.Exif()
tag[0x0112] = 6  # "turn me clockwise"
scene.save(root / 'phone.png', exif=tag)

as_raw, as_viewed = load_image(root / 'phone.png', (40, 60)), load_image(root / 'phone.png', (60, 40))
assert as_raw.size == (60, 40) and as_viewed.size == (40, 60)
assert load_image(root / 'phone.png').size == (40, 60)  # nothing declared: what a viewer shows
assert as_viewed.getpixel((30, 46)) == (220, 60, 40) and as_raw.getpixel((47, 10)) == (220, 60, 40)
read_size(root / 'phone.png')

# %%
#| label: fig-records-exif
#| fig-cap: "One file, two sizes in the annotations: the box fits in both cases, because the size decides about the turn."
#| fig-alt: "Left, an image lying on its side with a box around its red square; right, the same image upright, again with a box around the square."
fig, axes = plt.subplots(1, 2, figsize=(4, 2.2), dpi=80)
for ax, img, box, title in zip(
    axes,
    (as_raw, as_viewed),
    ([40, 4, 54, 18], [22, 40, 36, 54]),
    ('declared 40 x 60: raw', 'declared 60 x 40: turned'),
):
    show_image(ax, img, title=title)
    draw_boxes(ax, torch.tensor([box]).float())
plt.show()

# %%
deep = Image.fromarray(np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8))
deep.save(root / 'deep.png')
gray = np.asarray(load_image(root / 'deep.png'))
assert gray.shape == (8, 8, 3) and 120 < gray.mean() < 135
gray[0, :, 0], gray[-1, :, 0]


# %% [markdown]
# ## Faults
#
# A fault has a place and a cure. `where` is the file, `item` the entry within it and what is seen there.
# Three levels: an *error* is refused by loading, a *warning* is handled but deserves a look, a note is only
# said.

# %%
#| export
@dataclass(frozen=True)
class Fault:
    "One thing wrong with a data set"

    level: str  # 'error': loading refuses it; 'warning': handled, but look; 'info'
    kind: str  # short name, the same for all faults of a kind
    where: str  # file
    item: str  # image, annotation or class within it, and what is seen there
    cure: str  # what to do

    def __str__(self):
        return f'{self.where}: {self.item}; {self.cure}'


@dataclass
class Source:
    "Annotations as read from disk, in COCO's terms, whatever the format was"

    name: str
    where: str  # annotation file or folder, for messages
    data: dict  # images, annotations, categories
    folder: Path = Path('.')  # `file_name` is relative to it
    faults: list[Fault] = field(default_factory=list)  # found while reading

    def all_faults(self):  # iterator
        "Reading faults, then those of the content"
        yield from self.faults
        yield from coco_faults(self.data, self.where)


# %% [markdown]
# The rules take each entry as it comes and assume nothing of it: it may be a number where an object was
# meant. A rule never raises; it yields.

# %%
#| export
def _is_id(x):
    return isinstance(x, (int, str)) and not isinstance(x, bool)


def _image_faults(images, where):
    ids, files = set(), {}
    for n, im in enumerate(images):
        if (
            not isinstance(im, dict)
            or not _is_id(im.get('id'))
            or not isinstance(im.get('file_name'), str)
            or not im['file_name']
        ):
            yield Fault(
                'error',
                'bad-image-entry',
                where,
                f'images[{n}] is {str(im)[:80]}',
                "give each image an 'id' (number or text) and a 'file_name'",
            )
            continue
        item = f"image {im['id']!r} ({im['file_name']})"
        if im['id'] in ids:
            yield Fault(
                'error',
                'duplicate-image-id',
                where,
                f'{item}: this id was used before',
                'give each image its own id',
            )
        if im['file_name'] in files:
            yield Fault(
                'warning',
                'duplicate-file-name',
                where,
                f"{item}: same file as image {files[im['file_name']]!r}",
                'keep one entry',
            )
        size = [im.get('width'), im.get('height')]
        if any(s is not None and (not isinstance(s, (int, float)) or not 0 < s < math.inf) for s in size):
            yield Fault(
                'error',
                'bad-image-size',
                where,
                f'{item}: width, height = {size}',
                'write the size of the image in pixels, or leave it out',
            )
        ids.add(im['id'])
        files[im['file_name']] = im['id']


def _category_faults(categories, where):
    ids, names = set(), {}
    for n, c in enumerate(categories):
        if not isinstance(c, dict) or not _is_id(c.get('id')) or not isinstance(c.get('name'), str):
            yield Fault(
                'error',
                'bad-category',
                where,
                f'categories[{n}] is {str(c)[:80]}',
                "give each category an 'id' and a 'name'",
            )
            continue
        if c['id'] in ids:
            yield Fault(
                'error',
                'duplicate-category-id',
                where,
                f"category {c['id']!r} ({c['name']}): this id was used before",
                'give each category its own id',
            )
        if c['name'] in names:
            yield Fault(
                'warning',
                'duplicate-category-name',
                where,
                f"category {c['id']!r}: '{c['name']}' is also category {names[c['name']]!r}",
                'merge the two, or rename one',
            )
        ids.add(c['id'])
        names[c['name']] = c['id']


# %%
twice = [dict(id=1, file_name='a.jpg'), dict(id=1, file_name='b.jpg'), dict(id=True)]
found = list(_image_faults(twice, 'train.json'))
assert [f.kind for f in found] == ['duplicate-image-id', 'bad-image-entry']
print(*found, sep='\n')


# %% [markdown]
# A box $[x, y, w, h]$ has $x_2 = x + w$ and $y_2 = y + h$. A negative size is refused, for nobody can tell
# what was meant. A size of zero is dropped and counted. A box that leaves the image a little is clipped; one
# that lies outside altogether is refused, since it betrays a wrong scale or a wrong order of numbers.

# %%
#| export
def _bbox_fault(bbox, size):  # -> (level, kind, what, cure) or None
    if (
        not isinstance(bbox, (list, tuple))
        or len(bbox) != 4
        or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in bbox)
    ):
        return 'error', 'bad-bbox', 'is not four numbers', 'write [x, y, width, height] in pixels'
    if not all(map(math.isfinite, bbox)):
        return (
            'error',
            'not-finite',
            'holds a number that is not finite',
            'delete the annotation or write its true box',
        )
    x, y, w, h = bbox
    if w < 0 or h < 0:
        return (
            'error',
            'negative-box',
            'has x2 < x1 or y2 < y1',
            'swap the corners; COCO wants [x, y, width, height]',
        )
    if w == 0 or h == 0:
        return 'warning', 'zero-area', 'has no area and is dropped', 'delete the annotation'
    if size is None:
        return None
    H, W = size
    if x >= W or y >= H or x + w <= 0 or y + h <= 0:
        return (
            'error',
            'outside',
            f'lies outside the image of {W:g}x{H:g}',
            'check the scale and the order of the numbers: pixels, [x, y, width, height]',
        )
    if min(x, y) < -1 or x + w > W + 1 or y + h > H + 1:
        return (
            'warning',
            'overhang',
            f'overhangs the image of {W:g}x{H:g} and is clipped',
            'check that boxes and images have the same scale',
        )
    if min(w, h) < 2:
        return 'info', 'tiny-box', 'is under two pixels', 'no detector finds such a box; consider ignoring it'


def _annotation_faults(data, where):
    sizes = {
        im['id']: (im['height'], im['width']) if im.get('height') and im.get('width') else None
        for im in data['images']
        if isinstance(im, dict) and _is_id(im.get('id'))
    }
    cats, seen = [c['id'] for c in data['categories'] if isinstance(c, dict) and _is_id(c.get('id'))], set()
    known = set(cats)
    for n, a in enumerate(data['annotations']):
        if not isinstance(a, dict) or not _is_id(a.get('image_id')) or not _is_id(a.get('category_id')):
            yield Fault(
                'error',
                'bad-annotation',
                where,
                f'annotations[{n}] is {str(a)[:80]}',
                "an annotation needs 'image_id', 'category_id' and 'bbox'",
            )
            continue
        item, ann_id = f"annotation {a.get('id', f'#{n}')} of image {a['image_id']!r}", a.get('id')
        if ann_id is not None and str(ann_id) in seen:
            yield Fault(
                'error',
                'duplicate-annotation-id',
                where,
                f'{item}: this id was used before',
                'give each annotation its own id',
            )
        seen.add(str(ann_id))
        if a['image_id'] not in sizes:
            yield Fault(
                'error',
                'unknown-image',
                where,
                f"{item}: 'images' has no such id",
                'add the image or delete the annotation; 7 and "7" are different ids',
            )
        if a['category_id'] not in known:
            yield Fault(
                'error',
                'unknown-class',
                where,
                f"{item}: class id {a['category_id']!r} is not among 'categories'",
                f'add the category or correct the id; {suggest(a["category_id"], cats) if isinstance(a["category_id"], str) else "known: " + str(cats[:12])[1:-1] + ", ..." * (len(cats) > 12)}',
            )
        f = _bbox_fault(a.get('bbox'), sizes.get(a['image_id']))
        if f:
            yield Fault(f[0], f[1], where, f"{item}: box {a.get('bbox')} {f[2]}", f[3])


# %%
for bbox in (
    [1, 2, 10, 20],
    [9, 9, -3, 4],
    [5, 5, 0, 8],
    [-4, 0, 20, 20],
    [700, 9, 5, 5],
    [1, 2, float('nan'), 4],
    '1 2 3 4',
):
    print(bbox, '->', *(_bbox_fault(bbox, (40, 60)) or ['fine'])[:3])
assert _bbox_fault([1, 2, 10, 20], (40, 60)) is None
assert _bbox_fault([0, 0, 60.4, 40], (40, 60)) is None  # within a pixel: rounding, not a fault


# %%
#| export
def coco_faults(
    data,  # content of a COCO file
    where: str,  # its name, for the messages
):  # iterator of Fault
    "Everything that the annotations alone can tell; loading stops at the first error, the doctor collects all"
    if not isinstance(data, dict):
        yield Fault(
            'error',
            'schema',
            where,
            f'the top level is a {type(data).__name__}',
            "a COCO annotation file is one object with 'images', 'annotations' and 'categories'",
        )
        return
    missing = [
        k
        for k in ('images', 'annotations', 'categories')
        if not isinstance(data.get(k), list) and (k != 'annotations' or k in data)
    ]
    if missing:
        yield Fault(
            'error',
            'schema',
            where,
            f"no list {' and '.join(map(repr, missing))}; found {sorted(map(str, data))[:6]}",
            'this is not a COCO annotation file',
        )
        return
    if not data['images']:
        yield Fault('error', 'no-images', where, "'images' is empty", 'the file describes no image')
        return
    yield from _image_faults(data['images'], where)
    yield from _category_faults(data['categories'], where)
    if data.get('annotations'):
        yield from _annotation_faults(data, where)


def read_json(path):
    "Content of a JSON file; a DataError names the line where it breaks"
    try:
        text = Path(path).read_text(encoding='utf-8-sig')
    except UnicodeDecodeError:
        raise DataError(f'{path}: not a text file; give a COCO annotation file in JSON') from None
    except OSError as e:
        raise DataError(f'{path}: {e.strerror}; give a COCO annotation file') from None
    if not text.strip():
        raise DataError(f'{path}: the file is empty; export the annotations again')
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise DataError(
            f'{path}: line {e.lineno}, column {e.colno}: {e.msg}; the file is not valid JSON (cut off?): export it again'
        ) from None


def reason(e) -> str:
    "What went wrong with a file, in few words"
    return 'no such file' if isinstance(e, FileNotFoundError) else str(e).split(':')[0] or type(e).__name__


# %%
sick = dict(
    images=[dict(id=1, file_name='a.jpg', width=60, height=40)],
    categories=[dict(id=3, name='dog')],
    annotations=[
        dict(id=1, image_id=1, category_id=4, bbox=[1, 1, 5, 5]),
        dict(id=2, image_id='1', category_id=3, bbox=[1, 1, 5, 5]),
    ],
)
faults = list(coco_faults(sick, 'train.json'))
assert [f.kind for f in faults] == ['unknown-class', 'unknown-image']
print(*faults, sep='\n')

# %%
(root / 'cut.json').write_text('{"images": [\n  {"id": 1, "file_na')
try:
    read_json(root / 'cut.json')
except DataError as e:
    message = str(e).replace(f'{root}/', '')
assert 'line 2' in message
message


# %% [markdown]
# ## Readers
#
# Each reader turns one format into a `Source`, which speaks COCO: images, annotations, categories. It looks
# for the images where the common tools put them, and reports what it found wrong on the way.

# %%
#| export
def _find_images(json_path, files):  # -> (folder in which the images of a COCO file lie, fault or None)
    p, stem = json_path.parent, json_path.stem.rsplit('_', 1)[-1]
    places = [
        p / 'images',
        p,
        p / stem,
        p / 'images' / stem,
        p.parent / stem,
        p.parent / f'{stem}2017',
        p.parent / 'images',
        p.parent / 'images' / stem,
    ]
    probe = files[:: max(1, len(files) // 5)][:6]
    hits = [sum((d / f).is_file() for f in probe) for d in places]
    if not probe or max(hits):
        return places[hits.index(max(hits))], None
    looked = ', '.join(dict.fromkeys(map(str, places)))
    return places[0], Fault(
        'error',
        'missing-image-folder',
        str(json_path),
        f'image {probe[0]} was not found in {looked}',
        'put the images there or name their folder (image_dir)',
    )


def read_coco(
    json_path,  # instances_*.json
    image_dir=None,  # where the images are; None: look in the usual places
) -> Source:
    "A COCO annotation file; DataError if it cannot be read at all"
    path, fault = Path(json_path), None
    data = read_json(path)
    images = data.get('images') if isinstance(data, dict) else None
    files = (
        [im['file_name'] for im in images if isinstance(im, dict) and isinstance(im.get('file_name'), str)]
        if isinstance(images, list)
        else []
    )
    if image_dir is None:
        folder, fault = _find_images(path, files)
    else:
        folder = Path(image_dir)
        if not folder.is_dir():
            fault = Fault(
                'error',
                'missing-image-folder',
                str(path),
                f'no such image folder: {folder}',
                'name the folder that holds the images',
            )
    home = path.parent.parent if path.parent.name == 'annotations' else path.parent
    return Source(f'{home.absolute().name}/{path.stem}', str(path), data, folder, [fault] if fault else [])


# %%
(root / 'images').mkdir()
scene.save(root / 'images' / 'a.jpg')
(root / 'instances_train.json').write_text(json.dumps(sick))
source = read_coco(root / 'instances_train.json')
assert source.folder == root / 'images' and source.faults == []
[f.kind for f in source.all_faults()]


# %%
#| export
def _images_under(root):  # relative posix paths, sorted; hidden files and folders are passed over
    found = (f.relative_to(root) for f in sorted(Path(root).rglob('*')) if f.suffix.lower() in IMAGE_SUFFIXES)
    return [f.as_posix() for f in found if not any(p[0] == '.' or p == '__MACOSX' for p in f.parts)]


def read_folder(
    root,  # folder; subfolders count
) -> Source:
    "Images without annotations; the id is the path below `root`, suffix included"
    root = Path(root)
    files = _images_under(root) if root.is_dir() else []
    if not files:
        raise DataError(
            f'{root}: no image found, in no subfolder either; looked for {" ".join(IMAGE_SUFFIXES)}'
        )
    return Source(
        root.absolute().name,
        str(root),
        dict(images=[dict(id=f, file_name=f) for f in files], categories=[]),
        root,
    )


# %% [markdown]
# **Pascal VOC** counts pixels from 1 and includes both ends. Pixel number $n$ covers the stretch from $n-1$
# to $n$, so
#
# $$
# x_1 = x_{\min} - 1, \qquad x_2 = x_{\max}
# $$ {#eq-records-voc}
#
# and a box from 1 to 60 is as wide as an image of 60 pixels. Objects marked *difficult* are neither learnt
# from nor counted: they become crowd, in COCO's terms.
#
# ::: {.callout-note}
# ## Paper vs. code
# The usual converters subtract 1 from all four numbers, which makes each box one pixel narrower and lower.
# @eq-records-voc keeps the pixels that VOC means.
# :::

# %%
#| export
VOC_CLASSES = (
    'aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep sofa train tvmonitor'
).split()


def _voc_file(path):  # one XML file -> (class names, boxes xywh, difficult flags, size or None)
    root = ET.parse(path).getroot()
    size = [float(root.findtext(f'size/{k}') or 0) for k in ('height', 'width')]
    out = []
    for o in root.iter('object'):
        x1, y1, x2, y2 = (float(o.findtext(f'bndbox/{k}')) for k in ('xmin', 'ymin', 'xmax', 'ymax'))
        box = (
            [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]
            if x2 >= x1 and y2 >= y1
            else [x1 - 1, y1 - 1, x2 - x1, y2 - y1]
        )
        out.append(((o.findtext('name') or '').strip(), box, (o.findtext('difficult') or '0').strip() == '1'))
    return out, size if all(size) else (None, None)


def _voc_ids(root, split):  # -> (ids, split file or None)
    lists = root / 'ImageSets' / 'Main'
    for s in {'train': ('train', 'trainval'), 'val': ('val', 'test')}.get(split, (split,)):
        f = lists / f'{s}.txt'
        if f.is_file():
            return [line.split()[0] for line in f.read_text().splitlines() if line.strip()], f
    if lists.is_dir():
        raise DataError(
            f"{lists}: no list for the split '{split}'; found {', '.join(sorted(f.name for f in lists.glob('*.txt'))[:8]) or 'none'}"
        )
    return sorted(f.stem for f in (root / 'Annotations').glob('*.xml')), None


# %%
(root / 'one.xml').write_text(
    '<annotation><size><width>60</width><height>40</height></size><object><name>dog</name><difficult>1</difficult>'
    '<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>60</xmax><ymax>40</ymax></bndbox></object></annotation>'
)
objects, size = _voc_file(root / 'one.xml')
assert objects == [('dog', [0, 0, 60, 40], True)] and size == [40, 60]  # the whole image
objects


# %%
#| export
def _voc_source(root, split, ids, read, faults, classes, keep_difficult):
    if classes is None:
        names = {o[0] for objects, _ in read.values() for o in objects}
        classes = VOC_CLASSES if names <= set(VOC_CLASSES) else sorted(names)
    files = {
        f.stem: f.name for f in sorted((root / 'JPEGImages').iterdir()) if f.suffix.lower() in IMAGE_SUFFIXES
    }
    images, anns = [], []
    for i in ids:
        objects, (h, w) = read.get(i, ([], (None, None)))
        images.append(dict(id=i, file_name=files.get(i, f'{i}.jpg'), height=h, width=w))
        for name, box, difficult in objects:
            if keep_difficult or not difficult:
                anns.append(
                    dict(
                        image_id=i,
                        category_id=classes.index(name) if name in classes else name,
                        bbox=box,
                        iscrowd=int(difficult),
                    )
                )
    data = dict(
        images=images, annotations=anns, categories=[dict(id=n, name=c) for n, c in enumerate(classes)]
    )
    return Source(
        f'{root.absolute().name}/{split}', str(root / 'Annotations'), data, root / 'JPEGImages', faults
    )


def read_voc(
    root,  # folder with Annotations/, JPEGImages/ and ImageSets/Main/
    split: str = 'trainval',  # a list in ImageSets/Main; 'train' falls back to trainval, 'val' to test
    classes=None,  # names in label order; None: the 20 of VOC, or, if there are others, all that occur
    keep_difficult: bool = True,  # keep them, to be ignored; False: as if they were not there
) -> Source:
    "Pascal VOC; the 1-based inclusive pixels xmin..xmax cover the stretch from xmin-1 to xmax"
    root = Path(root)
    for sub in ('Annotations', 'JPEGImages'):
        if not (root / sub).is_dir():
            raise DataError(
                f'{root / sub}: no such folder; a VOC data set has Annotations/, JPEGImages/ and ImageSets/Main/'
            )
    ids, listed = _voc_ids(root, split)
    if not ids:
        raise DataError(f'{listed or root / "Annotations"}: names no image; check the split')
    read, faults = {}, []
    wanted = set(ids)
    for f in (
        sorted({*(root / 'Annotations').glob('*.xml'), *(root / 'Annotations' / f'{i}.xml' for i in ids)})
        if classes is None
        else [root / 'Annotations' / f'{i}.xml' for i in ids]
    ):
        try:
            read[f.stem] = _voc_file(f)
        except (ET.ParseError, TypeError, ValueError, OSError) as e:
            if f.stem in wanted:
                faults.append(
                    Fault(
                        'error',
                        'bad-xml',
                        str(f),
                        f'image {f.stem!r}: {reason(e)}',
                        'restore the file, or take the image out of the split list',
                    )
                )
    return _voc_source(root, split, ids, read, faults, classes, keep_difficult)


# %% [markdown]
# **YOLO** keeps one text file an image. A line holds the class, the centre and the size as parts of the
# image, so $x_1 = (c_x - w/2)\,W$. Longer lines are polygons; their box is the hull. An image without a text
# file is an image without objects.

# %%
#| export
def _yolo_images(root, conf, split):  # -> image paths of one split
    keys = ('val', 'valid', 'validation') if split == 'val' else (split,)
    entry = next((conf[k] for k in keys if conf.get(k)), None)
    if entry is None:
        raise DataError(
            f"{root}: data.yaml has no split '{split}'; found {', '.join(k for k in conf if k in ('train', 'val', 'valid', 'test')) or 'none'}"
        )
    out = []
    for e in entry if isinstance(entry, list) else [entry]:
        tries = [root / str(conf.get('path') or '.') / e, root / e, root / str(e).replace('../', '')]
        place = next((t for t in tries if t.exists()), None)
        if place is None:
            raise DataError(
                f"{root}: data.yaml names '{e}' for {split}, which is not there; looked for {', '.join(dict.fromkeys(map(str, tries)))}"
            )
        if place.is_dir():
            out += [place / f for f in _images_under(place)]
        else:
            out += [place.parent / line.strip() for line in place.read_text().splitlines() if line.strip()]
    return out


def _yolo_label(image):  # images/.../a.jpg -> labels/.../a.txt
    parts = list(image.parts)
    for n in range(len(parts) - 2, -1, -1):
        if parts[n] == 'images':
            parts[n] = 'labels'
            break
    return Path(*parts).with_suffix('.txt')


def _yolo_rows(label, h, w):  # -> [(class, xywh in pixels)], [(line, what)]
    rows, wrong = [], []
    for n, line in enumerate(label.read_text().splitlines() if label.is_file() else [], 1):
        if not line.strip():
            continue
        try:
            c, *v = map(float, line.split())
        except ValueError:
            wrong.append((n, line))
            continue
        if len(v) == 4:
            x, y, bw, bh = v[0] - v[2] / 2, v[1] - v[3] / 2, v[2], v[3]
        elif len(v) >= 6 and len(v) % 2 == 0:
            x, y, bw, bh = min(v[::2]), min(v[1::2]), max(v[::2]) - min(v[::2]), max(v[1::2]) - min(v[1::2])
        else:
            wrong.append((n, line))
            continue
        rows.append((int(c), [x * w, y * h, bw * w, bh * h]))
    return rows, wrong


# %%
(root / 'labels').mkdir()
(root / 'labels' / 'a.txt').write_text('0 0.5 0.5 0.2 0.4\n1 0.1 0.2 0.3 0.2 0.3 0.6\n0 0.5 oops\n')
rows, wrong = _yolo_rows(_yolo_label(root / 'images' / 'a.jpg'), 40, 60)
assert np.allclose([r[1] for r in rows], [[24, 12, 12, 16], [6, 8, 12, 16]]) and wrong == [(3, '0 0.5 oops')]
rows, wrong


# %%
#| export
def read_yolo(
    root,  # folder with data.yaml
    split: str = 'train',  # a key of data.yaml
) -> Source:
    "YOLO: `class cx cy w h` in parts of the image, or a polygon; one text file an image, an absent one means no object"
    import yaml

    root = Path(root)
    path = next(
        (root / n for n in ('data.yaml', 'data.yml', 'dataset.yaml') if (root / n).is_file()),
        root / 'data.yaml',
    )
    try:
        conf = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as e:
        raise DataError(
            f'{path}: {reason(e)}; a YOLO data set has a data.yaml with names and splits'
        ) from None
    names = conf.get('names') if isinstance(conf, dict) else None
    if not names or not isinstance(names, (list, dict)):
        raise DataError(f"{path}: no class 'names'; list them in the order of the label numbers")
    cats = [
        dict(id=int(k), name=str(v))
        for k, v in (names.items() if isinstance(names, dict) else enumerate(names))
    ]
    images, anns, faults = [], [], []
    for f in _yolo_images(root, conf, split):
        image_id = os.path.relpath(f, root).replace(os.sep, '/')
        try:
            h, w = read_size(f)
        except Exception as e:
            faults.append(
                Fault(
                    'error',
                    'unreadable-image',
                    str(f),
                    f'image {image_id!r}: {reason(e)}',
                    'restore the file or delete it',
                )
            )
            continue
        images.append(dict(id=image_id, file_name=image_id, height=h, width=w))
        rows, wrong = _yolo_rows(_yolo_label(f), h, w)
        anns += [dict(image_id=image_id, category_id=c, bbox=b) for c, b in rows]
        faults += [
            Fault(
                'error',
                'bad-label-line',
                str(_yolo_label(f)),
                f'line {n}: {line[:60]!r}',
                "write 'class cx cy w h' with numbers from 0 to 1",
            )
            for n, line in wrong
        ]
    return Source(
        f'{root.absolute().name}/{split}',
        str(path),
        dict(images=images, annotations=anns, categories=cats),
        root,
        faults,
    )


# %%
(root / 'data.yaml').write_text('train: images\nnames: [cat, dog]\n')
yolo = read_yolo(root)
assert [f.kind for f in yolo.faults] == ['bad-label-line'] and len(yolo.data['annotations']) == 2
yolo.data['images'], yolo.data['categories']

# %% [markdown]
# ## Summary
#
# * Images come out RGB and upright; only a declared size that fits the raw image alone prevents the turn.
# * COCO, VOC, YOLO and plain folders become one `Source` that speaks COCO.
# * `coco_faults` judges its content: errors are refused by loading, warnings are handled, notes are said.
# * Every fault names file, item and cure.
# * Overhanging boxes are clipped, empty ones dropped, negative and far ones refused.
#
# ## Exercises
#
# 1. An image of 50 x 50 pixels carries orientation 6. What does @eq-records-turn do, and what could tell you
#    whether it was right?
# 2. A converter wrote $[x_1, y_1, x_2, y_2]$ into a COCO file. Which of the rules notice it, and which boxes
#    slip through?
# 3. Write a rule that warns if the boxes of one class all have the same size. Where would it go?
