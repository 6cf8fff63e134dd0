# %% [markdown]
# # One pass over a COCO file {#sec-coco}
#
# > Parse ten million boxes within three gigabytes, and leave unusual files to the reader of faults.

# %%
#| default_exp data.coco

# %% [markdown]
# *Why.* The reader that names every fault needs the whole file as Python objects: ten million boxes would take
# 8 GB and a minute and a half. Most large files have no fault at all. So a large file is first read in
# pieces of some megabytes, with types that are fixed in advance, and each piece becomes columns before the
# next one is read. Whatever is unusual, a fault, a text where a number belongs, an unknown size, ends this
# attempt, and the other reader starts from the beginning. It alone writes messages, so both can never disagree
# about one.

# %%
#| export
import hashlib
import json
import os
import re
import stat
from itertools import chain
import msgspec
import numpy as np
from semidetr.data.columns import (
    Columns,
    Texts,
    as_column,
    cache_folder,
    cached_columns,
    file_digest,
    joined,
    store_columns,
)
from semidetr.data.entries import area_contradicts
from semidetr.data.files import coco_faults, label_order
from semidetr.text import MB, TEXT_MB

# %%
import io
import tempfile
import tracemalloc
from pathlib import Path
import matplotlib.pyplot as plt


# %% [markdown]
# ## Boxes of all images in the order of the images
#
# Corners are clipped to the image, and boxes without area are dropped. `pack` takes blocks, since the
# intermediate numbers of ten million boxes need more memory than the result.

# %%
#| export
def class_names(
    categories: list,  # entries of 'categories', in the order of the labels
) -> list[str]:
    "Names of the classes; a name that occurs twice gets its id"
    names = [c['name'] for c in categories]
    return [n if names.count(n) == 1 else f'{n} (id {c["id"]})' for n, c in zip(names, categories)]


def _clipped(block, sizes):
    "Corners as float32, and areas: one that is missing or contradicts the box is width x height"
    xywh, area, size = block.pop('xywh'), block.pop('area'), sizes[block['image'], ::-1]  # width, height
    corners = xywh[:, :2], xywh[:, :2] + xywh[:, 2:]
    boxes = np.concatenate([c.clip(0, size).astype(np.float32) for c in corners], 1)
    wrong = area_contradicts(area, (xywh[:, 2:] + 1).prod(1)) | np.isnan(area)
    area = np.where(wrong, 0, area).astype(np.float32)
    return block | dict(boxes=boxes, area=np.where(area > 0, area, (boxes[:, 2:] - boxes[:, :2]).prod(1)))


def pack(
    blocks: list,  # dicts: image (K,) position, xywh (K,4), labels, ignore, area (K,), 0 for none; emptied
    sizes,  # (N,2) float64: height, width
) -> tuple[dict, np.ndarray, int]:  # columns of the boxes, first row of each image (N+1,), boxes without area
    "Boxes clipped and sorted by image (@eq-columns-rows)"
    done = []
    while blocks:
        done.append(_clipped(blocks.pop(0), sizes))
    kinds = dict(image=(0,), boxes=(0, 4), labels=(0,), ignore=(0,), area=(0,))
    types = dict(image=np.int64, boxes=np.float32, labels=np.int64, ignore=bool, area=np.float32)
    empty = {k: np.zeros(shape, types[k]) for k, shape in kinds.items()}
    whole = {k: np.concatenate([empty[k], *(b.pop(k) for b in done)]) for k in kinds}
    keep = (whole['boxes'][:, 2:] > whole['boxes'][:, :2]).all(1)
    image = whole.pop('image')
    order = np.flatnonzero(keep)[np.argsort(image[keep], kind='stable')]
    starts = np.searchsorted(image[order], np.arange(len(sizes) + 1))
    return {k: whole.pop(k)[order] for k in list(whole)}, starts, int((~keep).sum())


# %%
block_a = dict(
    image=np.array([1, 0, 1]),
    xywh=np.array([[5.0, 5, 10, 10], [2, 2, 4, 4], [30, 0, 0, 5]]),
    labels=np.array([2, 1, 0]),
    ignore=np.array([False, True, False]),
    area=np.array([0.0, 12, 0]),
)
packed, first_rows, lost = pack([block_a], np.array([[20.0, 20], [12, 12]]))
assert packed['boxes'].tolist() == [[2, 2, 6, 6], [5, 5, 12, 12]] and lost == 1
assert class_names([dict(id=1, name='a'), dict(id=2, name='a')]) == ['a (id 1)', 'a (id 2)']
first_rows.tolist(), packed['labels'].tolist(), packed['area'].tolist()


# %% [markdown]
# ## Pieces of a list
#
# A list of objects may be cut at `}, {`. If the part before is a valid list between brackets, and the part
# after it too, then so is the whole, with the same elements: JSON has one reading only. If the cut was inside
# of a text or of an inner list, the part does not parse, and the attempt ends. So no character needs to be
# looked at twice.

# %%
#| export
class Unusual(Exception):
    "A file that only the other reader understands"


_NOT_PLAIN = Unusual, msgspec.DecodeError, ValueError, OverflowError, RecursionError

_SPACE = rb'[ \t\n\r]*'
_CUT = re.compile(rb'\}' + _SPACE + rb',' + _SPACE + rb'(?=\{)')
_KEY = re.compile(_SPACE + rb'"([^"\\\x00-\x1f]*)"' + _SPACE + rb':' + _SPACE)
_COMMA = re.compile(_SPACE + rb'([,}])')
_NO_BRACKETS = bytes(set(range(256)) - set(b'[]{}'))
_LISTS = (b'"images"', b'"annotations"', b'"categories"')
_WINDOW, _LARGEST, _DEEPEST = 8 * 2**20, 256 * 2**20, 60  # bytes read at once; bytes of a piece; brackets


def _checked(piece):
    "The piece as it is; `Unusual` unless it is UTF-8 and has few brackets in brackets"
    if not piece.isascii():
        try:
            piece.decode()
        except UnicodeDecodeError:
            raise Unusual('not UTF-8') from None
    marks = np.frombuffer(piece.translate(None, _NO_BRACKETS), np.uint8)
    step = np.where((marks == 91) | (marks == 123), np.int8(1), np.int8(-1))
    if np.cumsum(step, dtype=np.int32).max(initial=0) > _DEEPEST:
        raise Unusual('deep')
    return piece


# %%
parts = [m.end() for m in _CUT.finditer(b'[{"a": 1} ,\n {"a": 2},{"b": "}, {"}]')]
assert parts == [13, 22, 32]  # the third one lies in a text: what is before it does not parse
_checked(b'{"a": [1, 2]}')


# %%
#| export
class _Bytes:
    "The bytes of a file, a window at a time"

    def __init__(self, file, window):
        self.file, self.window = file, window
        self.data, self.at, self.end = b'', 0, False  # window; position in it; was all read?
        self.hash, self.found, self.tail = hashlib.sha256(), dict.fromkeys(_LISTS, 0), b''

    def more(self):
        "Read on, and keep what was not used"
        if self.end or len(self.data) - self.at > _LARGEST:
            raise Unusual('cut off, or a piece that is too large')
        block = self.file.read(self.window)
        self.hash.update(block)
        for name in _LISTS:
            self.found[name] += (self.tail[1 - len(name) :] + block).count(name)
        self.tail = (self.tail + block)[-16:]
        self.data, self.at, self.end = self.data[self.at :] + block, 0, not block

    def match(self, pattern):
        "What the pattern says here; it may not end where the window does, since more may belong to it"
        while True:
            found = pattern.match(self.data, self.at)
            if found and (found.end() < len(self.data) or self.end):
                self.at = found.end()
                return found
            if self.end or len(self.data) - self.at > self.window:
                raise Unusual('no such thing here')
            self.more()

    def value(self):
        "One value of JSON"
        while True:
            text = self.data[self.at :].decode('utf-8', 'ignore')
            try:
                value, end = json.JSONDecoder().raw_decode(text)
            except (ValueError, RecursionError):
                self.more()
                continue
            if end < len(text) or self.end:
                size = len(text[:end].encode())
                _checked(self.data[self.at : self.at + size])
                self.at += size
                return value
            self.more()


# %%
#| export
class _Windows(_Bytes):
    "Lists of objects in a file, some elements at a time"

    def piece(self):
        "(Bytes of the next elements of a list without a comma behind them, where the ones after them begin)"
        while True:
            cut = _CUT.search(self.data, self.at + self.window // 2)
            if cut and (len(self.data) - self.at >= self.window or self.end):
                return self.data[self.at : cut.start() + 1], cut.end()
            if self.end:
                return self.data[self.at :], len(self.data)
            self.more()

    def elements(self, decoder):
        "Elements of the list that begins here, some at a time"
        self.at += 1
        ended = False
        while not ended:
            piece, after = self.piece()
            try:
                rows = decoder.decode(b'[' + piece + b']')
            except msgspec.DecodeError:
                piece, after, ended = self.last_piece(piece)
                rows = decoder.decode(b'[' + piece + b']')
            _checked(piece)
            self.at = after
            yield rows

    def last_piece(self, piece):
        "(Bytes up to the end of the list, position behind its bracket, True)"
        text = '[' + piece.decode('utf-8', 'ignore')
        try:
            _, end = json.JSONDecoder().raw_decode(text)
        except (ValueError, RecursionError):
            raise Unusual('no valid list') from None
        size = len(text[1 : end - 1].encode())
        return piece[:size], self.at + size + 1, True


# %% [markdown]
# `elements` parses a piece with fixed types. Where the list ends inside of the piece, that fails once, and the
# parser of the standard library says where.

# %%
text_a = json.dumps([dict(n=k, text='},{' if k == 6 else 'x') for k in range(12)]).encode()


class Row(msgspec.Struct):
    n: int


def pieces(text, window):
    "Numbers in each piece"
    source = _Windows(io.BytesIO(text), window)
    source.more()
    return [[r.n for r in rows] for rows in source.elements(msgspec.json.Decoder(list[Row]))]


whole_list = pieces(text_a, 80)
assert sum(whole_list, []) == list(range(12)) and len(whole_list) > 3
try:
    pieces(text_a, 36)  # this one cuts in the text of row 6
except Unusual as e:
    refused = str(e)
whole_list, refused


# %% [markdown]
# ## Types
#
# These are the entries that make a usual file. A field that is not listed, such as a mask, is skipped without
# becoming an object. `bool` is not taken for a number, `7.0` not for an id.

# %%
#| export
class _Image(msgspec.Struct, gc=False):
    id: int | str
    file_name: str
    width: int | float
    height: int | float


class _Box(msgspec.Struct, gc=False):
    image_id: int | str
    category_id: int | str
    bbox: tuple[float, float, float, float]
    id: int | None = None
    area: float | None = None
    iscrowd: bool | int | None = None
    ignore: bool | int | None = None
    difficult: bool | int | None = None


# %%
#| export
class _Codes(dict):
    "Number of each value, in the order in which they appear"

    def __missing__(self, key):
        self[key] = len(self)
        return self[key]


# %%
#| export
class _Found:
    "Columns of what was read so far"

    def __init__(self):
        self.ids, self.files, self.sizes, self.blocks, self.numbers = [], [], [], [], []
        self.images, self.cats = _Codes(), _Codes()
        self.kinds = dict(image=set(), named=set(), cat=set())  # types of ids, where they stand

    def add_images(self, rows):
        "Entries of 'images'"
        ids, files = [r.id for r in rows], [r.file_name for r in rows]
        self.kinds['image'].update(map(type, ids))
        size = np.array([(r.height, r.width) for r in rows], dtype=np.float64).reshape(-1, 2)
        if not all(files) or not ((size > 0) & (size < 1e9) & (size == np.floor(size))).all():
            raise Unusual('an image without name or size')
        if rows:
            self.ids.append(np.fromiter(map(self.images.__getitem__, ids), np.int64, len(ids)))
            self.files.append(Texts.of(files))
            self.sizes.append(size)

    def add_boxes(self, rows):
        "Entries of 'annotations'"
        images, cats = [r.image_id for r in rows], [r.category_id for r in rows]
        self.kinds['named'].update(map(type, images))
        self.kinds['cat'].update(map(type, cats))
        n, numbers = len(rows), [r.id for r in rows if r.id is not None]
        self.numbers.append(np.array(numbers, dtype=np.int64))
        block = dict(
            image=np.fromiter(map(self.images.__getitem__, images), np.int64, n),
            xywh=np.fromiter(chain.from_iterable([r.bbox for r in rows]), np.float64, 4 * n).reshape(-1, 4),
            labels=np.fromiter(map(self.cats.__getitem__, cats), np.int64, n),
            ignore=np.zeros(n, dtype=bool),
            area=np.array([r.area or 0 for r in rows], dtype=np.float64),
        )
        for name in ('iscrowd', 'ignore', 'difficult'):
            values = [getattr(r, name) for r in rows]
            found = set(values)
            if not found <= {0, 1, None}:
                raise Unusual('a flag')
            block['ignore'] |= np.fromiter(map(bool, values), bool, n)
        self.blocks.append(block)


# %%
found_a = _Found()
found_a.add_images([_Image(7, 'a.jpg', 60, 40)])
found_a.add_boxes([_Box(7, 3, (1.0, 2.0, 3.0, 4.0)), _Box(8, 3, (1.0, 2.0, 3.0, 4.0), iscrowd=1)])
found_a.images, found_a.blocks[0]['image'].tolist(), found_a.blocks[0]['ignore'].tolist()


# %% [markdown]
# ## The checks
#
# They are those of `coco_faults` that refuse a file (@sec-records), on whole columns: ids that occur twice or
# are unknown, boxes that are not finite, negative, or outside of their image.

# %%
#| export
def _no_errors(block, sizes):
    "`Unusual` if a box is one that is refused"
    x, y, w, h = block['xywh'].T
    height, width = sizes[block['image']].T
    if not (np.abs(block['xywh']) < 1e9).all() or (w < 0).any() or (h < 0).any():
        raise Unusual('a box that is not finite or negative')
    outside = (x >= width) | (y >= height) | (x + w <= 0) | (y + h <= 0)
    if (outside & (w > 0) & (h > 0)).any():
        raise Unusual('a box outside of its image')


def _labels(cats, categories):
    "(Array from code to label, categories in the order of the labels)"
    sample = dict(images=[dict(id=0, file_name='x')], categories=categories)
    if not isinstance(categories, list) or not all(isinstance(c, dict) for c in categories):
        raise Unusual('categories')
    if any(f.level == 'error' for f in coco_faults(sample, '')):
        raise Unusual('categories')
    order = label_order(categories)
    at = {c['id']: n for n, c in enumerate(order)}
    place = np.full(len(cats), -1, dtype=np.int64)
    for value, code in cats.items():
        place[code] = at.get(value, -1)
    return place, order


def _same_kind(*kinds):
    "`Unusual` unless all ids have one type"
    if len(set().union(*kinds)) > 1:
        raise Unusual('ids of several types')


# %%
#| export
def _finish(found, categories):
    "Columns of a whole file"
    if not found.ids:
        raise Unusual('no image')
    codes, numbers = np.concatenate(found.ids), np.concatenate([np.zeros(0, np.int64), *found.numbers])
    numbers.sort()
    if len(np.unique(codes)) < len(codes) or (numbers[1:] == numbers[:-1]).any():
        raise Unusual('an id that occurs twice')
    place = np.full(len(found.images), -1, dtype=np.int64)  # code -> position
    place[codes] = np.arange(len(codes))
    labels, order = _labels(found.cats, categories)
    _same_kind(found.kinds['image'], found.kinds['named'])
    _same_kind(found.kinds['cat'], {type(c['id']) for c in order})
    if (place < 0).any() or (labels < 0).any():
        raise Unusual('an id that is unknown')
    values = list(found.images)
    ids = as_column(values if (place == np.arange(len(place))).all() else [values[c] for c in codes])
    if isinstance(ids, list):
        raise Unusual('ids of many digits')
    sizes, has_boxes = np.concatenate(found.sizes), any(len(b['image']) for b in found.blocks)
    for block in found.blocks:
        block['image'], block['labels'] = place[block['image']], labels[block['labels']]
        _no_errors(block, sizes)
    packed, starts, dropped = pack(found.blocks, sizes)
    about = dict(classes=class_names(order), cat_ids=[c['id'] for c in order], dropped=dropped)
    about |= dict(files=joined(found.files), has_boxes=has_boxes)
    return Columns(ids=ids, sizes=sizes.astype(np.int64), starts=starts, **packed, **about)


# %%
found_b = _Found()
found_b.add_images([_Image(7, 'a.jpg', 60, 40), _Image(5, 'b.jpg', 60, 40)])
found_b.add_boxes([_Box(5, 3, (1.0, 2.0, 3.0, 4.0)), _Box(7, 3, (50.0, 2.0, 30.0, 4.0))])
small = _finish(found_b, [dict(id=3, name='cat')])
assert small.ids == [7, 5] and small.boxes.tolist() == [[50, 2, 60, 6], [1, 2, 4, 6]]
try:
    _finish(found_a, [dict(id=3, name='cat')])
except Unusual as e:
    unknown = str(e)
small.starts.tolist(), unknown


# %% [markdown]
# ## The whole file

# %%
#| export
def _parse(file, window=_WINDOW):
    "(Columns, digest of the bytes) of an open file"
    source, found, categories = _Windows(file, window), _Found(), None
    adds = dict(images=(found.add_images, _Image), annotations=(found.add_boxes, _Box))
    mark = source.match(re.compile(_SPACE + rb'(\{)'))
    while mark.group(1) != b'}':
        key = source.match(_KEY).group(1).decode()
        if key not in adds:
            value = source.value()
            categories = value if key == 'categories' else categories
        elif source.data[source.at : source.at + 1] == b'[':
            add, kind = adds[key]
            for rows in source.elements(msgspec.json.Decoder(list[kind])):
                add(rows)
        else:
            raise Unusual('no list')
        mark = source.match(_COMMA)
    source.match(re.compile(_SPACE))
    if source.at < len(source.data) or max(source.found.values()) > 1:
        raise Unusual('more than one object, or a name that occurs twice')
    return _finish(found, categories), source.hash.hexdigest()


def parse_columns(
    path,  # annotation file
):  # (Columns, SHA-256 of the file), or None
    "The columns of a COCO file without faults whose images have sizes; None for all others"
    try:
        with open(path, 'rb') as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_size > TEXT_MB * MB:
                return None
            return _parse(file)
    except (*_NOT_PLAIN, OSError):
        return None


_LARGE = 1 * MB  # smaller files take no time


def quick_columns(
    path,  # annotation file
):  # Columns, or None
    "Columns of a large COCO file, from the cache if it was parsed before; None: it is for `read_coco`"
    if not os.path.isfile(path) or os.path.getsize(path) < _LARGE or not os.access(path, os.R_OK):
        return None
    known = cached_columns(file_digest(path)) if cache_folder() else None
    if known is None and (parsed := parse_columns(path)):
        known, digest = parsed
        store_columns(digest, known)
    return known


# %%
root = Path(tempfile.mkdtemp())


def toy_file(n, per=10):
    "A COCO file of n images"
    entries = [dict(id=i, file_name=f'{i}.jpg', width=640, height=480) for i in range(n)]
    rows = [
        dict(id=k, image_id=k % n, category_id=k % 3, bbox=[k % 90, 7.25, 20.5, 30], area=615.0)
        for k in range(per * n)
    ]
    categories = [dict(id=k, name=f'class {k}') for k in range(3)]
    (root / f'{n}.json').write_text(json.dumps(dict(images=entries, annotations=rows, categories=categories)))
    return root / f'{n}.json'


toy, key = parse_columns(toy_file(50))
assert toy.ids == range(50) and toy.boxes.shape == (500, 4) and toy.starts[-1] == 500
assert key == file_digest(root / '50.json') and quick_columns(root / '50.json') is None
odd = (root / '50.json').read_text().replace('[0, 7.25', '[-900, 7.25', 1)
(root / 'odd.json').write_text(odd)
assert parse_columns(root / 'odd.json') is None  # outside of its image
toy.files[49], toy.boxes[0].tolist()


# %%
#| label: fig-coco-memory
#| fig-cap: "Peak of the memory while a file is read: objects need several times what the finished columns need, a pass in pieces little more than these."
#| fig-alt: "Two lines over the number of boxes: the reader of objects rises steeply to about 14 megabytes at 20,000 boxes, the reader in pieces stays at a few megabytes."
def peak(job, path):
    "MB of 10^6 bytes above what was there before"
    tracemalloc.start()
    job(path)
    out = tracemalloc.get_traced_memory()[1] / MB
    tracemalloc.stop()
    return out


sides = [250, 500, 1000, 2000]
files = [toy_file(n) for n in sides]
objects = [peak(lambda f: json.loads(f.read_text()), f) for f in files]
columns = [peak(parse_columns, f) for f in files]
fig, ax = plt.subplots(figsize=(5, 2.4), dpi=80)
ax.plot([10 * n for n in sides], objects, 'o-', color='grey', label='objects')
ax.plot([10 * n for n in sides], columns, 'o-', label='pieces')
ax.set(xlabel='boxes', ylabel='MB', ylim=(0, None))
ax.legend(fontsize=9)
plt.show()

# %% [markdown]
# Here the whole file is one piece. What ten million boxes take was measured in @sec-scale.
#
# ## Summary
#
# * `parse_columns` reads a COCO file in pieces, with fixed types, into `Columns`.
# * `quick_columns` takes them from the cache where the same bytes were parsed before.
# * Neither says anything about a fault: it returns `None`, and `read_coco` reads the file again.
#
# ## Exercises
#
# 1. Why is a cut inside of a text never taken for the end of an element?
# 2. What would have to change for images without a size?
