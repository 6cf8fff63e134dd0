# %% [markdown]
# # Checks of a whole data set {#sec-checks}
#
# > Find faults that no single entry shows: copies, unreadable images, overlapping parts of a split.

# %%
#| default_exp data.checks

# %% [markdown]
# The rules of @sec-records look at one entry at a time. Some faults are in no single entry: a class that has
# no box, a box that is listed twice, an image of another size than declared. The most expensive ones are
# between sets. A validation image that is also among the labelled ones raises every score. A class that the
# unlabelled set does not share makes its pseudo labels wrong.
#
# Images are compared by content, not by name. Two images are the same if their keys agree,
#
# $$
# k(I) = \operatorname{hash}(H, W, I_{11}, I_{12}, \dots, I_{HW})
# $$ {#eq-doctor-key}
#
# with the decoded pixels $I_{yx}$ of the upright $H \times W$ image. A new name, new metadata or another
# lossless format leave $k$ unchanged; a new JPEG compression does not.

# %%
#| export
import hashlib
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
from PIL import Image
from tqdm import tqdm
from semidetr.core import DataError, printable
from semidetr.reading import check_fields, read_small_json
from semidetr.data.datasets import DetectionDataset
from semidetr.data.entries import box_sides, by_text, perhaps_repeated
from semidetr.data.shards import first_bytes, place_of
from semidetr.data.splits import SPLIT_MB, load_split
from semidetr.data.files import (
    TILES,
    Fault,
    PixelRange,
    Source,
    coco_entries,
    declared_size,
    decode_image,
    faults_at,
    image_depth,
    is_ignored,
    label_order,
    open_image,
    pixel_depth,
    reason,
    upright_size,
)


# %% [markdown]
# ## Numbers
#
# The statistics must work for any file, so nothing is assumed of its entries.

# %%
#| export
def lists_images(source: Source) -> bool:
    "Does it hold a list of images? Otherwise nothing can be said about its content"
    return isinstance(source.data, dict) and isinstance(source.data.get('images'), list)


def statistics(
    data,  # content of a COCO file, perhaps faulty
) -> tuple[dict, dict, dict]:  # counts, histogram {class: boxes}, {quantile: square root of the area, pixels}
    "Numbers of a report; the histogram and the sizes leave out the boxes to be ignored"
    images, anns = coco_entries(data, 'images'), coco_entries(data, 'annotations')
    names = {str(c.get('id')): str(c.get('name')) for c in coco_entries(data, 'categories')}
    counted = [a for a in anns if not is_ignored(a)]
    per_class = by_text([a.get('category_id') for a in counted])
    side = box_sides(counted)
    with_boxes = by_text([a.get('image_id') for a in anns])
    counts = {
        'images': len(images),
        'boxes': len(anns),
        'ignored boxes': len(anns) - len(counted),
        'classes': len(names),
        'images without a box': sum(str(im.get('id')) not in with_boxes for im in images),
    }
    histogram = {name: per_class.get(c, 0) for c, name in names.items()}
    if not len(side):
        return counts, histogram, {}
    quantiles = np.quantile(side, [0.05, 0.25, 0.5, 0.75, 0.95]).tolist()
    return counts, histogram, dict(zip(('5 %', '25 %', 'median', '75 %', '95 %'), quantiles))


# %%
herd = dict(
    images=[dict(id=1, file_name='a.jpg'), dict(id=2, file_name='b.jpg')],
    categories=[dict(id=1, name='cow'), dict(id=7, name='yak')],
    annotations=[
        dict(id=1, image_id=1, category_id=1, bbox=[0, 0, 10, 40]),
        dict(id=2, image_id=1, category_id=1, bbox=[0, 0, 10, 40]),
    ],
)
counts, histogram, sizes = statistics(herd)
assert histogram == {'cow': 2, 'yak': 0} and sizes['median'] == 20
counts

# %% [markdown]
# ## Within one set
#
# As in @sec-records, a check yields the kind of a fault and what is wrong; a table gives the level and the
# cure.

# %%
#| export
_CURES = {  # kind of fault: (level, what to do)
    'no-annotations': ('warning', 'fit as unlabelled data; to learn from it, add boxes'),
    'images-without-boxes': ('info', 'fine if they show no object; otherwise their annotations are missing'),
    'class-never-seen': ('warning', 'its AP is undefined; delete the class or add examples'),
    'gaps-in-class-ids': ('warning', 'handled: labels are contiguous inside, `cat_ids` keeps the ids'),
    'repeated-box': ('warning', 'keep one'),
    'duplicate-image': ('warning', 'keep one: a copy in another split would leak'),
    'many-objects': ('warning', 'see `semidetr eval --max-dets` and the number of queries of the detector'),
    'mixed-depths': ('warning', 'save all in one kind, or set data.white and look at the contact sheet'),
    'class-mismatch': ('error', 'give both files the same categories'),
    'shared-image': ('error', 'take it out of one of the two'),
    'shared-file-name': ('warning', 'are they the same images? then the two sets overlap'),
    'shared-ids': ('info', 'harmless as long as the two files are not merged'),
    'bad-split': ('error', 'make the split again with `semidetr split`'),
    'stale-split': ('error', 'make it again for this data set'),
    'unknown-split-id': ('error', 'make the split again for this data set'),
    'split-overlap': ('error', 'an image belongs to one part only'),
}


def _content(source, counts, histogram):
    if not lists_images(source):
        return
    if not source.data.get('annotations'):
        if 'annotations' in source.data:
            yield 'no-annotations', 'there is no annotation'
        return
    anns = coco_entries(source.data, 'annotations')
    per_image = by_text([a.get('image_id') for a in anns])
    most = max(per_image.values(), default=0)
    if most > 100:
        n = sum(v > 100 for v in per_image.values())
        yield (
            'many-objects',
            f'{n:,} images have more than 100 objects (up to {most}); AP counts 100 per image',
        )
    empty = counts['images without a box']
    if empty:
        yield 'images-without-boxes', f"{empty:,} of {counts['images']:,} images have no box"
    for name, n in histogram.items():
        if n == 0:
            yield 'class-never-seen', f"class '{name}' has no box that counts"
    ids = sorted(c['id'] for c in coco_entries(source.data, 'categories') if isinstance(c.get('id'), int))
    if ids and ids not in (list(range(len(ids))), list(range(1, len(ids) + 1))):
        yield 'gaps-in-class-ids', f'{len(ids)} class ids between {ids[0]} and {ids[-1]}'
    keys = ('image_id', 'category_id', 'bbox')
    same = Counter(tuple(str(anns[n].get(k)) for k in keys) for n in perhaps_repeated(anns))
    for (image_id, cat, box), n in same.items():
        if n > 1:
            yield 'repeated-box', f'image {image_id}: box {box} of class id {cat} is listed {n} times'


def content_faults(
    source: Source,
    counts: dict,  # from `statistics`
    histogram: dict,  # from `statistics`
):  # iterator of Fault
    "What is wrong in no single entry, but worth knowing"
    return faults_at(source.where, _content(source, counts, histogram), _CURES)


# %%
notes = list(content_faults(Source('herd', 'herd.json', herd), counts, histogram))
kinds = ['images-without-boxes', 'class-never-seen', 'gaps-in-class-ids', 'repeated-box']
assert [f.kind for f in notes] == kinds
print(*notes, sep='\n')


# %% [markdown]
# ## Every image
#
# Decoding is the slow part; threads share it, since the decoders release Python's lock. `quick` reads headers
# only: it finds missing files and wrong sizes, but not truncated files.

# %%
#| export
def image_key(
    img,  # PIL image
) -> str:  # 24 hex digits
    "Key of an image's content (@eq-doctor-key)"
    return hashlib.blake2b(img.tobytes(), digest_size=12, key=repr(img.size).encode()).hexdigest()


def constant_fault(
    img,  # RGB image
    path,  # its file
    depth: str | None = None,  # of the file; None: read it
):  # (level, kind, what is wrong, cure) or None
    "An image that shows nearly nothing; one of more than 8 bits may have been scaled by the wrong white"
    ranges = img.getextrema()
    if max(high - low for low, high in ranges) >= 8:
        return None
    between = dict.fromkeys(f'{low} and {high}' for low, high in ranges)
    what, cure = f"is nearly constant: its pixels lie between {', '.join(between)} of 255", 'look at it'
    if (depth or pixel_depth(path)) != '8 bits':
        with open_image(path) as raw:
            depth, grey = image_depth(raw), raw.mode[0] in 'IF'
            largest = np.nan_to_num(np.asarray(raw)).max()
        cure = f'it has {depth}, and its largest value is {largest:g}: set data.white, e.g. to {largest:g}'
        if not grey:
            cure = f'its colours have {depth}, and 65535 is white: scale them to this range'
    return 'warning', 'constant-image', what, cure


# %%
toy_black = Image.new('RGB', (40, 40))
assert constant_fault(toy_black, 'black.jpg', '8 bits')[1] == 'constant-image'
constant_fault(toy_black, 'black.jpg', '8 bits')[2]


# %%
#| export
def _size_fault(size, declared, turned, where):  # -> (level, kind, what is wrong, cure) or None
    text = f'is {size[0]}x{size[1]}'
    if declared and size != tuple(declared) and not (turned and size == tuple(declared)[::-1]):
        what = f'{text}, but {where} says {declared[0]:g}x{declared[1]:g} (height x width)'
        cure = 'its boxes would be wrong: correct the entry or restore the image'
        return 'error', 'size-mismatch', what, cure
    if min(size) < 32:
        return 'warning', 'tiny-image', text, 'too small for a detector; leave it out'
    if turned:
        cure = 'handled: it is turned unless only the raw size agrees with the annotations; '
        cure += 'look at the contact sheet'
        return 'info', 'exif-rotated', 'carries an EXIF rotation', cure


def _check_file(path, image_id, declared, where, quick):
    "Content key or None, depth of the pixels or None, fault or None of one image, which is opened once"
    key, depth, cure = None, None, f'restore it, or delete its entry from {where}'
    try:
        with open_image(path) as raw:
            depth = image_depth(raw)
            img = None if quick else decode_image(raw, declared)
            size, turned = upright_size(raw), raw.getexif().get(0x0112, 1) != 1
        if img:
            size, key = (img.height, img.width), image_key(img)
        fault = _size_fault(size, declared, turned, where)
        if fault is None and img:
            fault = constant_fault(img, path, depth)
    except PixelRange as e:
        fault = 'warning', 'unknown-white', str(e), 'set data.white, e.g. to 1, 255 or 65535'
    except FileNotFoundError:
        fault = 'error', 'missing-image', 'no such file', cure
    except Image.DecompressionBombError as e:
        fault = 'error', 'too-large', f'is {reason(e)}', TILES
    except Exception as e:
        fault = 'error', 'unreadable-image', f'cannot be decoded ({reason(e)})', cure
    if fault is None:
        return key, depth, None
    level, kind, what, cure = fault
    return key, depth, Fault(level, kind, str(path), f'image {image_id!r}: {what}', cure)


# %%
#| export
def _check_generated(ds, where):  # a data set that makes its images itself
    keys, faults = {}, []
    for i, image_id in enumerate(ds.ids):
        try:
            keys[str(image_id)] = image_key(ds[i].image)
        except DataError as e:
            faults.append(Fault('error', 'unreadable-image', where, f'image {image_id!r}: {e}', 'restore it'))
    return keys, faults


def _depth_faults(source, images, found):  # images of one set with different depths
    depths = {}
    for im, depth in zip(images, found):
        if depth:  # what has no header is reported as unreadable
            depths.setdefault(depth, []).append(Path(source.folder) / im['file_name'])
    if len(depths) > 1:
        parts = ', '.join(f'{len(v):,} of {k} (e.g. {v[0]})' for k, v in sorted(depths.items()))
        yield from faults_at(source.where, [('mixed-depths', f'pixels of several depths: {parts}')], _CURES)


def check_images(
    source: Source,  # images and where they are
    quick: bool = False,  # read headers only; no content keys then
    threads: int = 4,  # decoders
    progress: bool | None = None,  # bar; None: on a terminal
) -> tuple[dict, list[Fault]]:  # {image id as text: content key}, faults
    "Open every image"
    if isinstance(source.folder, DetectionDataset):
        return ({}, []) if quick else _check_generated(source.folder, source.where)
    images = [im for im in coco_entries(source.data, 'images') if isinstance(im.get('file_name'), str)]

    def check(im):
        path = Path(source.folder) / im['file_name']
        return _check_file(path, im.get('id'), declared_size(im), source.where, quick)

    bar = dict(total=len(images), desc=printable(f'images of {source.name}'), unit='img')
    with ThreadPoolExecutor(threads) as pool:
        found = list(tqdm(pool.map(check, images), disable=None if progress is None else not progress, **bar))
    keys = {str(im.get('id')): key for im, (key, _, _) in zip(images, found) if key}
    faults = [fault for _, _, fault in found if fault]
    return keys, faults + list(_depth_faults(source, images, [depth for _, depth, _ in found]))


def copy_faults(
    source: Source,
    keys: dict,  # from `check_images`
):  # iterator of Fault
    "Images of one set that have the same pixels"
    first, found = {}, []
    for image_id, key in keys.items():
        if key in first:
            found.append(('duplicate-image', f'image {image_id} is pixel for pixel image {first[key]}'))
        first.setdefault(key, image_id)
    return faults_at(source.where, found, _CURES)


# %%
import json
import tempfile
from semidetr.data.digits import DigitsScenes
from semidetr.draw import image_grid

# %%
root = Path(tempfile.mkdtemp())
scene = DigitsScenes(n=1)[0].image
for file in ('a.png', 'copy.bmp', 'again.jpg', 'cut.png'):
    scene.save(root / file)
(root / 'cut.png').write_bytes((root / 'a.png').read_bytes()[:2000])  # the disk was full
files = ['a.png', 'copy.bmp', 'again.jpg', 'cut.png', 'gone.png']
stored = Source('toy', 'toy.json', dict(images=[dict(id=f, file_name=f) for f in files]), root)
keys, damaged = check_images(stored, progress=False)
assert list(keys) == files[:3] and keys['a.png'] == keys['copy.bmp'] != keys['again.jpg']
assert [f.kind for f in damaged] == ['unreadable-image', 'missing-image']
[f.item for f in copy_faults(stored, keys)]

# %%
#| label: fig-checks-key
#| fig-cap: "Another lossless format leaves the key of an image unchanged; a JPEG copy looks the same to us, but has another key."
#| fig-alt: "Three times the same photograph with digits; the titles give file name and key: a.png and copy.bmp have the same key, again.jpg another."
titles = [f'{f}: {key[:6]}' for f, key in keys.items()]
image_grid([Image.open(root / f) for f in keys], titles=titles, ncols=3, cell=1.6)


# %% [markdown]
# ## Between sets
#
# Sets that are compared must share their classes and no image. Equal ids alone mean little, since many tools
# count from 1 in every file.

# %%
#| export
def _class_names(source):  # in the order of the labels
    return [str(c.get('name')) for c in label_order(coco_entries(source.data, 'categories'))]


def _file_of(source):  # image id as text -> file name
    return {str(im.get('id')): im.get('file_name') for im in coco_entries(source.data, 'images')}


def _class_mismatch(a, b):  # how the class names differ, or None
    names_a, names_b = _class_names(a), _class_names(b)
    if not names_a or not names_b or names_a == names_b:
        return None
    differ = []
    for s, only in ((a, set(names_a) - set(names_b)), (b, set(names_b) - set(names_a))):
        if only:
            differ.append(f"only in {s.where}: {', '.join(sorted(only)[:5])}")
    return '; '.join(differ) or 'same names, another order'


# %%
names = [Source(n, n, dict(categories=[dict(id=1, name=n), dict(id=2, name='yak')])) for n in ('cow', 'goat')]
assert _class_mismatch(names[0], names[0]) is None
_class_mismatch(*names)


# %%
#| export
def _paths(source, keys):  # [(image id, path)] of images without a content key: not decoded, or broken
    if isinstance(source.folder, DetectionDataset):
        return []
    files = [(i, f) for i, f in _file_of(source).items() if isinstance(f, str) and i not in keys]
    return [(i, os.path.join(source.folder, f)) for i, f in files]


def _same_file(a, b, keys_a, keys_b):  # images that are one file, found without decoding
    first, second = _paths(a, keys_a), _paths(b, keys_b)
    for j, i in sorted(same_files([p for _, p in first], [p for _, p in second]).items()):
        yield 'shared-image', f'image {second[j][0]} is the same file as image {first[i][0]} of {a.where}'


def _shared(a, b, keys_a, keys_b):
    if differ := _class_mismatch(a, b):
        yield 'class-mismatch', f'classes differ from those of {a.where} ({differ})'
    id_of = {key: image_id for image_id, key in keys_a.items()}
    for image_id, key in keys_b.items():
        if key in id_of:
            yield 'shared-image', f'image {image_id} is pixel for pixel image {id_of[key]} of {a.where}'
    yield from _same_file(a, b, keys_a, keys_b)
    files_a, files_b = _file_of(a), _file_of(b)
    ids = files_a.keys() & files_b.keys()
    same = [k for k in ids if files_a[k] == files_b[k]]
    if same:
        example = f'{same[0]} ({files_a[same[0]]})'
        item = f'{len(same):,} images share id and file name with {a.where}, e.g. {example}'
        yield 'shared-file-name', item
    elif ids:
        yield 'shared-ids', f'{len(ids):,} image ids also occur in {a.where}, with other files'


def faults_between(
    a: Source,  # the first set
    b: Source,  # the set in whose file the faults are reported
    keys_a: dict,  # from `check_images`
    keys_b: dict,  # likewise
):  # iterator of Fault
    "Classes that differ and images that are in both; a shared image is no error if `b` has no boxes"
    cures = _CURES
    if not b.data.get('annotations'):
        cures = _CURES | {'shared-image': ('warning', _CURES['shared-image'][1])}
    return faults_at(b.where, _shared(a, b, keys_a, keys_b), cures)


# %% [markdown]
# Decoding every image takes minutes. Before a training run it is enough to compare *files*: two are the same
# if a link or another spelling of the path leads to one place on the disk, or if their bytes are equal. Only
# files of equal size are read, first their beginnings, then, if those agree, all of them. An image in a tar
# file (@sec-shards) is compared in the same way with its own size and bytes.

# %%
#| export
def image_files(
    ds,  # data set
) -> list:  # path of each image, or `InShard`; None for one that is in no file
    "Where the images of a data set are, without opening them"
    if hasattr(ds, 'place'):
        return [ds.place(i) for i in range(len(ds))]
    if hasattr(ds, 'folder') and hasattr(ds, 'files'):
        return [os.path.join(ds.folder, f) for f in ds.files]
    if hasattr(ds, 'parts'):
        return [f for part in ds.parts for f in image_files(part)]
    if not hasattr(ds, '_ds'):
        return [None] * len(ds)
    files = image_files(ds._ds)
    return [files[i] for i in ds.indices] if hasattr(ds, 'indices') else files


def _digest(path, size=-1):
    "Hash of the first `size` bytes of an image, or of all; None if it cannot be read"
    try:
        return hashlib.blake2b(first_bytes(path, size), digest_size=16).digest()
    except OSError:
        return None


def _narrow(pairs, key):
    "Of two lists of (position, path, key): the entries with a further key that is in both lists"
    a, b = ([(i, p, (k, key(p))) for i, p, k in entries] for entries in pairs)
    both = {k for _, _, k in a} & {k for _, _, k in b}
    return [[e for e in entries if e[2] in both and e[2][1] is not None] for entries in (a, b)]


def _stat(files):
    "[(position, path, place on the disk, size)] of the images that exist"
    out = []
    for i, path in enumerate(files):
        try:
            out.append((i, path, *place_of(path)))
        except (OSError, TypeError):
            continue
    return out


# %%
#| export
def same_files(
    first,  # of `image_files`
    second,  # likewise
) -> dict:  # position in `second` -> position in `first`
    "Images of `second` that are also in `first`: one place on the disk, or equal bytes"
    a, b = _stat(first), _stat(second)
    at = {place: i for i, _, place, _ in reversed(a)}
    found = {j: at[place] for j, _, place, _ in b if place in at}
    sizes = {e[3] for e in a} & {e[3] for e in b if e[0] not in found and e[3]}
    pairs = [[(i, p, size) for i, p, _, size in entries if size in sizes] for entries in (a, b)]
    pairs[1] = [e for e in pairs[1] if e[0] not in found]
    pairs = _narrow(_narrow(pairs, lambda p: _digest(p, 16384)), _digest)
    content = {k: i for i, _, k in reversed(pairs[0])}
    return found | {j: content[k] for j, _, k in pairs[1]}


# %%
(root / 'link.png').symlink_to(root / 'a.png')
(root / 'twin.png').write_bytes((root / 'copy.bmp').read_bytes())
one, two = [root / 'a.png', root / 'copy.bmp'], [root / 'again.jpg', root / 'link.png', root / 'twin.png']
assert same_files(one, two) == {1: 0, 2: 1}
same_files(one, two)

# %%
pair = [Source(name, f'{name}.json', json.loads(json.dumps(herd))) for name in ('train', 'val')]
pair[1].data['categories'][1]['name'] = 'goat'
shared = list(faults_between(*pair, {'1': 'aa', '2': 'bb'}, {'1': 'cc', '2': 'aa'}))
assert [f.kind for f in shared] == ['class-mismatch', 'shared-image', 'shared-file-name']
[f.item for f in shared]


# %% [markdown]
# ## Between the parts of a split
#
# The parts of a split file (@sec-splits) must be disjoint as well, by id and by content.

# %%
#| export
def _overlaps(path, known, keys, fingerprint):
    parts = dict.fromkeys(('labelled', 'unlabelled', 'dev'), list[int | str])
    try:
        split = read_small_json(path, most_mb=SPLIT_MB)
        check_fields(split, parts, path, optional=('unlabelled', 'dev'))
    except DataError as e:
        yield 'bad-split', str(e).removeprefix(f'{path}: ').rpartition(';')[0]
        return
    if fingerprint and split.get('fingerprint') not in (None, '', fingerprint):
        yield 'stale-split', f"was made for data {split['fingerprint']}, this is {fingerprint}"
    owner = {}  # id or content key -> (part, id)
    for part in (p for p in parts if p in split):
        for image_id in split[part]:
            if image_id not in known:
                yield 'unknown-split-id', f'{part}: no image with id {image_id!r}'
            for key in (k for k in (image_id, keys.get(str(image_id))) if k is not None):
                at_part, at_id = owner.setdefault(key, (part, image_id))
                if (at_part, at_id) != (part, image_id):
                    if at_part != part:
                        yield 'split-overlap', f'image {image_id!r} of {part} is also {at_id!r} of {at_part}'
                    break
    try:
        load_split(path)  # as a training does
    except DataError as e:
        what = str(e).removeprefix(f'{path}: ').rpartition(';')[0]
        yield from [] if 'is also in' in what else [('bad-split', what)]  # said above


def split_faults(
    path,  # file from `save_split`
    ids,  # image ids of the data set
    keys: dict,  # from `check_images`; may be empty
    fingerprint: str | None = None,  # of the data set, if it can be loaded
):  # iterator of Fault
    "Overlaps between the parts of a split, by id and by content, and ids that do not exist"
    return faults_at(str(path), _overlaps(path, set(ids), keys, fingerprint), _CURES)


# %%
parts = dict(labelled=[1, 2], unlabelled=[2, 4], dev=[3, 9])
(root / 'split.json').write_text(json.dumps(parts | dict(semidetr_split=1)))
overlaps = list(split_faults(root / 'split.json', [1, 2, 3, 4], {'1': 'aa', '3': 'aa'}))
assert [f.kind for f in overlaps] == ['split-overlap', 'split-overlap', 'unknown-split-id']
[f.item for f in overlaps]  # image 3 has the pixels of image 1

# %% [markdown]
# ## Summary
#
# * `statistics` and `content_faults` look at an annotation file as a whole.
# * `check_images` opens every image and compares sizes; `quick` reads headers only.
# * `same_files` compares two sets by places on the disk and bytes, without decoding.
# * Images are the same if their pixels are; `copy_faults`, `faults_between` and `split_faults` find copies
#   within a set, between sets and between the parts of a split.
#
# ## Exercises
#
# 1. @eq-doctor-key misses a copy that was compressed again. Which key would find it, and which different
#    images would it then take for equal?
# 2. Is a labelled image that is also in the unlabelled folder harmful? Consider the training and the numbers
#    of the health monitor.
# 3. Add a warning for classes that are frequent in one set and rare in the other. How large must a difference
#    be to be significant?
