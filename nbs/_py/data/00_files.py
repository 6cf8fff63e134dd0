# %% [markdown]
# # Images and annotation records {#sec-records}
#
# > Decode images as their annotations assume, and report what is wrong in a file, and how to fix it.

# %%
#| default_exp data.files

# %% [markdown]
# A detector trained on wrong boxes does not crash; it learns badly. Three causes are common. The annotation
# tool turned an image by its EXIF tag and the loader does not. A converter wrote corners where width and
# height were expected. A class id is missing from the list of categories, and the loss of its class stays at
# zero for days. None of them shows in a loss curve.
#
# So this chapter reads *records*: the content of annotation files in one form, whatever their format. A list
# of rules then checks the records. Loading stops at the first error (@sec-datasets); the doctor collects all
# of them (@sec-doctor). Both apply the same rules, so they cannot disagree.

# %%
#| export
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
import numpy as np
from PIL import Image
from semidetr.core import DataError, printable, suggest
from semidetr.data.bounds import bounded, outside
from semidetr.data.entries import (
    FLAGS,
    area_fault,
    as_flag,
    bbox_fault,
    coco_entries,
    doubtful,
    is_id,
    tidy_values,
)

# %% [markdown]
# ## Pixels in the orientation of the annotations
#
# A camera held upright often stores the picture on its side and adds a tag, the EXIF orientation, which tells
# viewers to turn it. Whether the boxes were drawn before or after the turn is recorded nowhere, but the
# annotation file gives the size of the image. With the raw size $(h, w)$, the size after the turn $(h', w')$
# and the declared size $(H, W)$ the rule is
#
# $$
# \text{turn} \iff \lnot\,[\,(H, W) = (h, w) \neq (h', w')\,]
# $$ {#eq-records-turn}
#
# In words: turn, as every viewer does, unless the raw size alone agrees with the annotations. Half turns and
# mirrorings do not change the size; there the rule turns, and the doctor adds a note to its report.

# %%
#| export
IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff', '.ppm', '.pgm', '.gif', '.jfif')
_NO_PICTURES = {
    'BUFR',
    'EPS',
    'FITS',
    'GRIB',
    'HDF5',
    'IPTC',
    'MPEG',
    'WMF',
    'XBM',
    'XPM',
}  # or not photographs
_ORIENTATION, _QUARTER_TURNS = 0x0112, (5, 6, 7, 8)
_DEEP = {'I': '32 bits', 'F': 'float'}  # mode -> depth; grey ones of 16 bits begin with I;16

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(
    path,  # image file
):  # PIL image, not yet decoded
    "Open an image; an OSError for a pipe or a device, which never ends, a bomb error for too many pixels"
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError('a folder' if os.path.isdir(path) else 'a pipe or a device')
    return bounded(Image.open(path))


def _turn(img, size):  # EXIF orientation to undo (0: none); `size` is (H, W) in the annotations, or None
    o = img.getexif().get(_ORIENTATION, 1)
    if o not in _UPRIGHT:
        return 0
    raw = (img.height, img.width)
    upright = raw[::-1] if o in _QUARTER_TURNS else raw
    return 0 if size is not None and tuple(size) == raw != upright else o


def image_orientation(
    path,  # image file
) -> int:  # 1: upright
    "EXIF orientation, read from the header alone"
    with open_image(path) as img:
        return img.getexif().get(_ORIENTATION, 1)


def upright_size(
    img,  # PIL image
) -> tuple[int, int]:  # (H, W)
    "Size after the turn that the EXIF tag asks for"
    return (img.width, img.height) if _turn(img, None) in _QUARTER_TURNS else (img.height, img.width)


def read_size(
    path,  # image file
) -> tuple[int, int]:  # (H, W) of the upright image
    "Size of an image, read from the header alone"
    with open_image(path) as img:
        return upright_size(img)


# %% [markdown]
# All other modes become RGB: grey, palette, CMYK, transparency. Images of 16 bits are scaled. Pillow's own
# conversion would clip them at 255, and a microscope picture would come out white. The mode decides, never
# the brightest pixel of one image, or two images of one camera would get two scales. Where the mode cannot
# tell, as with floats, or with 12 bits in files of 16, `white` does. Of colours with 16 bits Pillow keeps the
# high byte, so that 65535 is white; another `white` is refused, since the low byte is lost.

# %%
#| export
class PixelRange(ValueError):
    "The mode of an image does not say which value is white"


def scale_pixels(
    a,  # (...) numbers of more than 8 bits
    white: float = 0,  # value that becomes 255; 0: 65535 for 16 bits, `PixelRange` for floats and 32 bits
) -> np.ndarray:  # (...) uint8
    "Pixels in 8 bits, with one scale for all images of a kind; values outside 0..white are clipped"
    if not white and a.dtype not in (np.uint16, np.int16):
        raise PixelRange(f'{a.dtype} does not say which value is white')
    a = np.asarray(a, np.float32)
    scaled = a * np.float32(255 / white) + np.float32(0.5) if white else a / 256
    return np.nan_to_num(scaled).clip(0, 255).astype(np.uint8)


def image_depth(
    img,  # PIL image, as it was opened
) -> str:  # '8 bits', '16 bits', '32 bits', 'float'
    "Depth of the pixels in the file; a decoded image is looked up there again, since Pillow forgets it"
    if img.mode.startswith('I;16'):
        return '16 bits'
    tile = getattr(img, 'tile', None)
    if not tile and img.format in ('PNG', 'TIFF') and os.path.isfile(getattr(img, 'filename', '')):
        with open_image(img.filename) as again:
            tile = again.tile
    raw = tile[0][3] if tile else ''  # raw mode, alone or first of several values
    raw = raw[0] if isinstance(raw, tuple) and raw else raw
    return '16 bits' if ';16' in str(raw) else _DEEP.get(img.mode, '8 bits')


def pixel_depth(
    path,  # image file
) -> str:  # '8 bits', '16 bits', '32 bits', 'float'
    "Depth of the pixels, read from the header alone"
    with open_image(path) as img:
        return image_depth(img)


def to_rgb(
    img,  # PIL image of any mode
    white: float = 0,  # as for `scale_pixels`
) -> Image.Image:  # RGB
    "Any image in 8-bit colours; `PixelRange` for colours of 16 bits with another `white` than 65535"
    if img.mode.startswith('I;16'):
        img = Image.fromarray(scale_pixels(np.asarray(img).astype(np.uint16), white))
    elif img.mode in _DEEP:
        img = Image.fromarray(scale_pixels(np.asarray(img), white))
    elif white not in (0, 65535) and image_depth(img) == '16 bits':
        raise PixelRange(f'colours of 16 bits are read with 65535 as white, not {white:g}; scale them to it')
    return img.convert('RGB')


def decode_image(
    img,  # PIL image, as it was opened
    size=None,  # as for `load_image`
    white: float = 0,  # as for `scale_pixels`
) -> Image.Image:  # RGB
    "Pixels of an opened image; it is turned by its EXIF tag unless only the raw size agrees with `size`"
    rgb, o = to_rgb(img, white), _turn(img, size)
    return rgb.transpose(_UPRIGHT[o]) if o else rgb


def load_image(
    path,  # image file of any mode
    size=None,  # (H, W) that the annotations were made for, if known
    white: float = 0,  # as for `scale_pixels`
) -> Image.Image:  # RGB
    "Decode one image file, see `decode_image`"
    with open_image(path) as img:
        return decode_image(img, size, white)


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
panels = (
    (as_raw, [40, 4, 54, 18], 'declared 40 x 60: raw'),
    (as_viewed, [22, 40, 36, 54], 'declared 60 x 40: turned'),
)
for ax, (img, box, title) in zip(axes, panels):
    show_image(ax, img, title=title)
    draw_boxes(ax, torch.tensor([box]).float())
plt.show()

# %%
deep = Image.fromarray(np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8))
deep.save(root / 'deep.png')
gray = np.asarray(load_image(root / 'deep.png'))
assert gray.shape == (8, 8, 3) and 120 < gray.mean() < 135
assert scale_pixels(np.float32([0, 0.5, 1, 2]), white=1).tolist() == [0, 128, 255, 255]
gray[0, :, 0], gray[-1, :, 0]


# %% [markdown]
# ## Faults and sources
#
# A fault has a place and a cure. `where` is the file; `item` names the entry in it and says what is wrong.
# There are three levels: loading refuses an *error*, it handles a *warning* that the user should check, and a
# *note* is information only.
#
# A `Source` is what a reader makes of a data set on disk: COCO's lists of images, annotations and categories,
# the folder of the images, and the faults that the reader met on the way. The readers of the formats follow
# in @sec-formats.

# %%
#| export
@dataclass(frozen=True)
class Fault:
    "One thing wrong with a data set"

    level: str  # 'error': loading refuses it; 'warning': handled, but check it; 'info'
    kind: str  # short name, the same for all faults of a kind
    where: str  # file
    item: str  # image, annotation or class in the file, and what is wrong with it
    cure: str  # what to do

    def __str__(self):
        return printable(f'{self.where}: {self.item}; {self.cure}')


@dataclass
class Source:
    "Annotations as read from disk, in COCO's terms, whatever the format was"

    name: str
    where: str  # annotation file or folder, for messages
    data: dict  # images, annotations, categories
    folder: Path = Path('.')  # `file_name` is relative to it
    faults: list[Fault] = field(default_factory=list)  # found while reading
    columns: object = None  # `Columns` in place of `data`, of a file whose content has no errors

    def __post_init__(self):
        for key in tidy_values(self.data):
            item, cure = f"the column '{key}' is text or of another type", 'converted; check the export'
            self.faults.append(Fault('info', 'converted', self.where, item, cure))

    def all_faults(self):  # iterator of Fault
        "Faults of reading, then those of the content"
        yield from self.faults
        if self.columns is None:
            yield from coco_faults(self.data, self.where)


# %% [markdown]
# ## Rules
#
# A rule is a kind of fault with its level and its cure; the table below lists those that annotations alone
# can break. The checks assume nothing about an entry: it may be a number where an object was expected. They
# never raise; they yield the kind of a fault and what is wrong with which entry.

# %%
#| export
CURES = {  # kind of fault: (level, what to do)
    'schema': ('error', "a COCO annotation file is one object with 'images', 'annotations' and 'categories'"),
    'no-images': ('error', 'the file describes no image'),
    'bad-image-entry': ('error', "give each image an 'id' (number or text) and a 'file_name'"),
    'bad-image-size': ('error', 'write the size of the image in pixels, or leave it out'),
    'duplicate-image-id': ('error', 'give each image its own id'),
    'duplicate-file-name': ('warning', 'keep one entry'),
    'bad-category': ('error', "give each category an 'id' and a 'name'"),
    'unprintable-name': ('error', 'write the name in letters that a terminal shows'),
    'duplicate-category-id': ('error', 'give each category its own id'),
    'duplicate-category-name': ('warning', 'merge the two, or rename one'),
    'bad-annotation': ('error', "an annotation needs 'image_id', 'category_id' and 'bbox'"),
    'duplicate-annotation-id': ('error', 'give each annotation its own id'),
    'unknown-image': ('error', 'add the image or delete the annotation; 7 and "7" are different ids'),
    'unknown-class': ('error', 'add the category or correct the id'),
    'bad-flag': ('error', 'write 0 or 1'),
    'area': ('warning', 'correct it or leave it out; the evaluation takes width x height'),
    'bad-bbox': ('error', 'write [x, y, width, height] in pixels'),
    'not-finite': ('error', 'delete the annotation or write its true box'),
    'negative-box': ('error', 'swap the corners; COCO wants [x, y, width, height]'),
    'zero-area': ('warning', 'delete the annotation'),
    'outside': ('error', 'check the scale and the order of the numbers: pixels, [x, y, width, height]'),
    'overhang': ('warning', 'check that boxes and images have the same scale'),
    'tiny-box': ('info', 'no detector finds such a box; consider ignoring it'),
}


def faults_at(
    where: str,  # file, for the messages
    found,  # iterable of (kind, entry and what is wrong with it)
    cures: dict = CURES,  # kind: (level, what to do)
):  # iterator of Fault
    "What a check yields, as faults of one file"
    for kind, item in found:
        level, cure = cures[kind]
        yield Fault(level, kind, where, item, cure)


# %% [markdown]
# Three helpers read entries that may be malformed. They serve the checks, the data sets and the doctor alike.

# %%
#| export
def declared_size(
    image: dict,  # entry of 'images'
):  # (H, W) in pixels, or None
    "Size of an image according to its entry"
    size = image.get('height'), image.get('width')
    return size if all(isinstance(s, (int, float)) and s > 0 for s in size) else None


def is_ignored(
    annotation: dict,  # entry of 'annotations'
) -> bool:
    "Is it a crowd region or a difficult object? Those are neither learnt from nor counted"
    if not (annotation.get('iscrowd') or annotation.get('ignore') or annotation.get('difficult')):
        return False
    return any(as_flag(annotation.get(k)) for k in FLAGS)


def label_order(
    categories: list[dict],  # entries of 'categories'
) -> list[dict]:
    "Categories in the order of their labels: by id, numbers before text"

    def key(c):
        cat = c.get('id')
        return isinstance(cat, str), cat if is_id(cat) else 0

    return sorted(categories, key=key)


# %%
assert not is_ignored(dict(iscrowd='0', difficult='no')) and is_ignored(dict(iscrowd='0', ignore='yes'))
malformed = dict(images=[3, dict(id=1, height=40, width='60')], categories=None)
assert coco_entries(malformed, 'images') == malformed['images'][1:]
assert coco_entries(malformed, 'categories') == []
assert declared_size(malformed['images'][1]) is None
[c['id'] for c in label_order([dict(id='b'), dict(id=10), dict(id=9)])]


# %%
#| export
def _image_faults(images):
    ids, files = set(), {}
    for n, im in enumerate(images):
        file = im.get('file_name') if isinstance(im, dict) else None
        if not isinstance(file, str) or not file or not is_id(im.get('id')):
            yield 'bad-image-entry', f'images[{n}] is {str(im)[:80]}'
            continue
        item = f"image {im['id']!r} ({file})"
        if str(im['id']) in ids:
            yield 'duplicate-image-id', f'{item}: this id was used before'
        if file in files:
            yield 'duplicate-file-name', f'{item}: same file as image {files[file]!r}'
        size = [im.get('width'), im.get('height')]
        if not all(s is None or (type(s) in (int, float) and 0 < s < 1e9 and s == int(s)) for s in size):
            yield 'bad-image-size', f'{item}: width, height = {size}'
        ids.add(str(im['id']))  # 7 and '7' would be one image in splits and results
        files[file] = im['id']


def _category_faults(categories):
    ids, names = set(), {}
    for n, c in enumerate(categories):
        if not isinstance(c, dict) or not is_id(c.get('id')) or not isinstance(c.get('name'), str):
            yield 'bad-category', f'categories[{n}] is {str(c)[:80]}'
            continue
        item, name = f"category {c['id']!r}", c['name']
        if printable(name) != name:
            yield 'unprintable-name', f'{item}: its name {name!r} holds control characters'
        if str(c['id']) in ids:
            yield 'duplicate-category-id', f'{item} ({name}): this id was used before'
        if name in names:
            yield 'duplicate-category-name', f"{item}: '{name}' is also category {names[name]!r}"
        ids.add(str(c['id']))
        names[name] = c['id']


# %%
twice = [dict(id=1, file_name='a.jpg'), dict(id=1, file_name='b.jpg'), dict(id=True)]
found = list(faults_at('train.json', _image_faults(twice)))
assert [f.kind for f in found] == ['duplicate-image-id', 'bad-image-entry']
print(*found, sep='\n')


# %%
#| export
def _known(wrong, ids):  # a known id that resembles the wrong one, or the list of the known ids
    if isinstance(wrong, str):
        return suggest(wrong, ids)
    return 'known: ' + ', '.join(map(repr, ids[:12])) + (', ...' if len(ids) > 12 else '')


def _same_id(key):  # 7 for 7 and '7'; a number takes no memory that it does not have already
    text = str(key)
    return int(text) if len(text) < 19 and text.isdecimal() and str(int(text)) == text else text


# %%
#| export
def _annotation_faults(data):
    sizes = {im['id']: declared_size(im) for im in coco_entries(data, 'images') if is_id(im.get('id'))}
    cats = [c['id'] for c in coco_entries(data, 'categories') if is_id(c.get('id'))]
    known, used, anns = set(cats), set(), data['annotations']
    for n in doubtful(anns, sizes, known):
        a = anns[n]
        if not isinstance(a, dict) or not is_id(a.get('image_id')) or not is_id(a.get('category_id')):
            yield 'bad-annotation', f'annotations[{n}] is {str(a)[:80]}'
            continue
        cat, key, image, found = a['category_id'], a.get('id'), a['image_id'], []
        if key is not None:
            key = key if type(key) is int else _same_id(key)
            if key in used:
                found.append(('duplicate-annotation-id', 'this id was used before'))
            used.add(key)
        if image not in sizes:
            found.append(('unknown-image', "'images' has no such id"))
        if cat not in known:
            what = f"class id {cat!r} is not among 'categories' ({_known(cat, cats)})"
            found.append(('unknown-class', what))
        if fault := bbox_fault(a.get('bbox'), sizes.get(image)):
            found.append((fault[0], f"box {a.get('bbox')} {fault[1]}"))
        kept = fault is None or fault[0] in ('overhang', 'tiny-box')
        if kept and 'area' in a and (what := area_fault(a['area'], a['bbox'])):
            found.append(('area', f"area {a['area']!r} {what} {a['bbox']}"))
        if a.get('iscrowd') or a.get('ignore') or a.get('difficult'):
            found += [('bad-flag', f'{k} is {a[k]!r}') for k in FLAGS if as_flag(a.get(k)) is None]
        for kind, what in found:
            yield kind, f"annotation {a.get('id', f'#{n}')} of image {image!r}: {what}"


# %%
#| export
def _content_faults(data):
    if not isinstance(data, dict):
        yield 'schema', f'the top level is a {type(data).__name__}'
        return
    needed = [k for k in ('images', 'annotations', 'categories') if k != 'annotations' or k in data]
    missing = [repr(k) for k in needed if not isinstance(data.get(k), list)]
    if missing:
        yield 'schema', f"no list {' and '.join(missing)}; found {sorted(map(str, data))[:6]}"
        return
    if not data['images']:
        yield 'no-images', "'images' is empty"
        return
    yield from _image_faults(data['images'])
    yield from _category_faults(data['categories'])
    if data.get('annotations'):
        yield from _annotation_faults(data)


def coco_faults(
    data,  # content of a COCO file
    where: str,  # its name, for the messages
):  # iterator of Fault
    "All that the annotations alone can tell; loading stops at the first error, the doctor collects all"
    return faults_at(where, _content_faults(data))


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


# %% [markdown]
# ## Folders
#
# The simplest source is a folder of images without any annotation. Linked folders are followed, each real
# folder once, so that a link to a folder above cannot lead in circles. Which suffixes count depends on the
# installed Pillow; files with others are counted and reported.

# %%
#| export
def image_suffixes() -> set[str]:  # lower case, with the dot
    "Suffixes of the images that the installed Pillow reads, its plug-ins included"
    read = {
        s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN.keys() - _NO_PICTURES
    }
    return read.union(IMAGE_SUFFIXES)


def files_under(
    root,  # folder
) -> list[Path]:  # relative to `root`, sorted
    "All files below a folder; links are followed, each real folder once; hidden ones are skipped"
    found, visited = [], set()
    todo, linked = [Path(root)], []
    while todo or linked:
        folder = todo.pop() if todo else linked.pop(0)
        real = os.path.realpath(folder)
        if real in visited or (folder != Path(root) and not os.access(folder, os.R_OK | os.X_OK)):
            continue
        visited.add(real)
        for entry in os.scandir(folder):
            if entry.name[0] == '.' or entry.name == '__MACOSX':
                continue
            if not os.path.isdir(entry.path if entry.is_symlink() else entry):
                found.append(Path(entry.path).relative_to(root))
            else:
                (linked if entry.is_symlink() else todo).append(Path(entry.path))
    return sorted(found, key=lambda f: f.parts)


def images_under(
    root,  # folder
) -> list[str]:  # paths below `root` with forward slashes, sorted
    "The image files below a folder; linked folders are followed, hidden files and folders are skipped"
    known = image_suffixes()
    return [f.as_posix() for f in files_under(root) if f.suffix.lower() in known]


# %%
assert '.png' in image_suffixes()
image_suffixes() >= set(IMAGE_SUFFIXES)


# %%
#| export
def outside_faults(
    folder,  # of the images
    names,  # paths relative to it
    where: str,  # annotation file or folder, for the message
    homes=(),  # further folders that the images may lie in
) -> list[Fault]:  # none or one
    "The line about images that lie outside of the folders of a data set"
    n, first = outside(folder, names, homes)
    item, cure = f'{n} images lie outside of {folder}, such as {first}', 'fine if you trust who named them'
    return [Fault('warning', 'outside-folder', where, item, cure)] if n else []


def read_folder(
    root,  # folder; subfolders count
    there=None,  # paths of its files from `files_under`, if they are known
) -> Source:
    "Images without annotations; the id is the path below `root`, suffix included"
    root, known = Path(root), image_suffixes()
    if there is None:
        there = files_under(root) if root.is_dir() else []
    files = [f.as_posix() for f in there if f.suffix.lower() in known]
    skipped = Counter(f.suffix.lower() or 'no suffix' for f in there if f.suffix.lower() not in known)
    counts = ', '.join(f'{n} {suffix}' for suffix, n in skipped.most_common(8))
    if not files:
        found = f' (found {counts})' if skipped else ''
        raise DataError(
            f'{root}: no image found, in no subfolder either{found}; looked for {" ".join(IMAGE_SUFFIXES)}'
        )
    faults = []
    if skipped:
        cure = 'convert those that are images; annotations beside images are not read here'
        faults.append(Fault('warning', 'skipped-files', str(root), f'not read as images: {counts}', cure))
    faults += outside_faults(root, files, str(root))
    images = [dict(id=f, file_name=f) for f in files]
    return Source(root.absolute().name, str(root), dict(images=images, categories=[]), root, faults)


# %%
(root / 'notes.heic').write_text('no image')
(root / 'again').symlink_to(root)
folder = read_folder(root)
assert 'not read as images: 1 .heic' in str(folder.faults[0])
assert [im['id'] for im in folder.data['images']] == ['deep.png', 'phone.png']
folder.data

# %% [markdown]
# ## Files that cannot be read
#
# An error of the operating system or of Pillow is cut to the few words that matter. Text is read in
# @sec-text.

# %%
#| export
TILES = 'scale it down or cut it into tiles, its boxes too, or set SEMIDETR_MEGAPIXELS'  # it is too large


def reason(
    e: Exception,  # raised while a file was read
) -> str:
    "What went wrong with a file, in a few words"
    if isinstance(e, Image.DecompressionBombError):
        most = (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        return f'too large, not broken: {most:.0f} megapixels are the limit'
    if isinstance(e, FileNotFoundError):
        return 'no such file'
    return ' '.join(str(e).split(':')[0].split()) or type(e).__name__


# %%
assert reason(FileNotFoundError(2, 'No such file')) == 'no such file'
assert reason(Image.DecompressionBombError()).startswith('too large, not broken')
reason(OSError('image file is truncated (3 bytes not processed): more'))

# %% [markdown]
# ## Summary
#
# * Images come out RGB and upright; only a declared size that fits the raw image alone prevents the turn.
# * A `Source` holds what a reader found, in COCO's terms, with the faults of reading.
# * `coco_faults` checks its content: errors are refused by loading, warnings are handled, notes are for
#   information.
# * Every fault names file, item and cure.
# * Overhanging boxes are clipped, empty ones dropped, negative and far ones refused.
#
# ## Exercises
#
# 1. An image of 50 x 50 pixels carries orientation 6. What does @eq-records-turn do, and what could tell you
#    whether it was right?
# 2. A converter wrote $[x_1, y_1, x_2, y_2]$ into a COCO file. Which of the rules notice it, and which boxes
#    pass unnoticed?
# 3. Write a rule that warns if the boxes of one class all have the same size. Where would it go?
