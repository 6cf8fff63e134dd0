# %% [markdown]
# # YOLO {#sec-yolo}
#
# > Read folders of YOLO, and decide from all lines of a set what a longer line means.

# %%
#| default_exp data.yolo

# %%
#| export
import os
from pathlib import Path
from semidetr.core import DataError, MissingSplit
from semidetr.data.entries import as_number
from semidetr.data.files import Fault, Source, files_under, images_under, outside_faults, read_size, reason
from semidetr.data.formats import folder_like, other_spelling, plain_name
from semidetr.reading import read_yaml
from semidetr.text import SMALL_MB, read_lines, read_text


# %% [markdown]
# *Why.* YOLO keeps one text file per image. A line holds the class, the centre and the size as fractions of the
# image, so $x_1 = (c_x - w/2)\,W$. An image without a text file is an image without objects.
#
# What longer lines mean is written nowhere, and a wrong guess gives wrong boxes without a word. So all lines
# of a set decide together: with `kpt_shape` in data.yaml they are poses, whose first four numbers are the
# box; five numbers are a box with a confidence or a track id, six with a whole number at the end are a box
# with both; other even counts are polygons, whose box is the hull. Lines that could be poses or polygons are
# refused, and so are six numbers with 0 or 1 at the end that could be a triangle.

# %%
#| export
def yolo_label(
    image: Path,  # images/.../a.jpg
) -> Path:  # labels/.../a.txt, or the text file beside the image
    "The text file of an image; folder names in any capitals"
    parts = list(image.parts)
    for n in range(len(parts) - 2, -1, -1):
        if parts[n].lower() == 'images':
            root = folder_like(
                Path(*parts[:n]), {'images': 'labels', 'IMAGES': 'LABELS'}.get(parts[n], 'Labels')
            )
            there = (root / Path(*parts[n + 1 :])).with_suffix('.txt')
            beside = image.with_suffix('.txt')
            return beside if beside.is_file() and not there.is_file() else there
    return image.with_suffix('.txt')


def _label_words(names):  # {label: name} -> {name: label}, None for a name that two labels have
    words = {}
    for label, name in names.items():
        words[name] = None if name in words else label
    return {name: label for name, label in words.items() if not name.isdigit()}


def _yolo_rows(label, words=()):  # -> [(line number, class, numbers)], [(number, what cannot be read)]
    rows, wrong = [], []
    text = read_text(label, most_mb=SMALL_MB) if label.exists() else ''
    for n, line in enumerate(text.split('\n'), 1):
        first, *numbers = line.split() or ['']
        if not first:
            continue
        if first in words and words[first] is None:
            wrong.append((n, f'two labels have the name {first[:40]!r}'))
            continue
        try:
            c = words[first] if first in words else as_number(first)
            v = list(map(as_number, numbers))
            ok = c == int(c) and len(v) >= 4 and all(abs(x) < 1e6 for x in v)
        except (ValueError, OverflowError):
            ok = False
        if ok:
            rows.append((n, int(c), v))
        else:
            wrong.append((n, repr(line[:60])))
    return rows, wrong


def _inside(v, step):  # do the points lie in the box of the first four numbers?
    x, y, w, h = v[:4]
    points = [(px, py) for px, py in zip(v[4::step], v[5::step]) if px or py]
    return all(abs(px - x) <= w / 2 + 0.01 and abs(py - y) <= h / 2 + 0.01 for px, py in points)


# %%
#| export
def _may_be_pose(long, rows):  # `long` of `rows`: box and points inside it, or flags where poses have them?
    n = len(long[0]) if long else 0
    if {len(v) for v in long} != {n} or (len(long) < 3 and len(long) < len(rows)):
        return False  # of different lengths, or one or two among boxes
    three = (n - 4) % 3 < 2  # x, y and a third number of each point, and perhaps a confidence at the end
    flags = three and n > 12 and all(set(v[6::3]) <= {0, 1, 2} for v in long)
    within = all(_inside(v, 2) for v in long) or (three and all(_inside(v, 3) for v in long))
    return n > 9 and (flags or within)


def _six(rows):  # lines of six numbers -> 'box', 'polygon', or why neither is certain
    six = [v for v in rows if len(v) == 6]
    if any(v[5] > 1 and v[5] == int(v[5]) for v in six):
        return 'box'
    if not all(v[5] in (0, 1) for v in six) or any(len(v) > 6 for v in rows):
        return 'polygon'
    triangles = all(0 <= x <= 1 for v in six for x in v) and all(_twice_area(v) > 1e-6 for v in six)
    if not triangles or any(len(v) == 5 for v in rows):
        return 'box'
    if not all(_fits_image(v) for v in six):
        return 'polygon'
    what = '6 numbers may be a box with confidence and track id or a triangle'
    return f'{what}: leave out the last two, or repeat a corner'


def _twice_area(v):  # of the triangle of three points
    return abs((v[2] - v[0]) * (v[5] - v[1]) - (v[4] - v[0]) * (v[3] - v[1]))


def _fits_image(v):  # are the first four numbers a box in the image?
    return all(s > 0 and s / 2 - 0.01 <= c <= 1.01 - s / 2 for c, s in zip(v[:2], v[2:4]))


# %%
small = [0.5, 0.5, 0.2, 0.2]
assert _six([[*small, 0.9, 7], [*small, 0.9, 1]]) == _six([[*small, 0.9, 1], [*small, 0.8]]) == 'box'
assert _six([[*small, 0.9, 0.3]]) == _six([[0.1, 0.1, 0.4, 0.2, 0.9, 1]]) == 'polygon'
_six([[*small, 0.9, 1]])


# %%
#| export
def yolo_kind(
    rows: list,  # numbers after the class, of all lines of a set
    kpt_shape=None,  # (points, numbers of each) in data.yaml
):  # function: numbers of one line -> 'box', 'polygon', or what is wrong with it
    "Decide what the lines of a set mean; `kpt_shape` of no points says that there are no poses"
    long, six = [v for v in rows if len(v) >= 6], _six(rows)
    counts, unknown = {len(v) for v in long}, kpt_shape is None
    alike = unknown and len(counts) == 1 and len(long) > 2
    visible = alike and (min(counts) - 4) % 3 == 0 and all(set(v[6::3]) <= {0, 1, 2} for v in long)
    pose = unknown and _may_be_pose(long, rows)
    pose_size = None if unknown else kpt_shape[0] * kpt_shape[1]

    def kind(v):
        n = len(v)
        if n < 6 or (pose_size and n - 4 in (pose_size, pose_size + 1)):
            return 'box'
        if pose_size:
            return f'{n} numbers after the class, but kpt_shape means {4 + pose_size}'
        if n == 6 or visible:
            return six if n == 6 else 'box'
        if pose:
            other, cure = (' or a polygon', ', [0, 2] for polygons') if n % 2 == 0 else ('', '')
            return f'{n} numbers may be a pose{other}: write kpt_shape in data.yaml{cure}'
        return 'polygon' if n % 2 == 0 else f'{n} numbers are no box, polygon or pose'

    return kind


def _yolo_box(v, kind, h, w):  # numbers of one line -> [x, y, w, h] in pixels
    if kind == 'box':
        return [(v[0] - v[2] / 2) * w, (v[1] - v[3] / 2) * h, v[2] * w, v[3] * h]
    x, y = min(v[::2]), min(v[1::2])
    return [x * w, y * h, (max(v[::2]) - x) * w, (max(v[1::2]) - y) * h]


# %%
import tempfile
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from semidetr.draw import draw_boxes, show_image

# %%
root = Path(tempfile.mkdtemp())
scene = Image.new('RGB', (60, 40), (200, 210, 190))
scene.paste((60, 60, 120), (12, 8, 36, 32))
(root / 'yolo' / 'images').mkdir(parents=True)
(root / 'yolo' / 'labels').mkdir()
scene.save(root / 'yolo' / 'images' / 'a.jpg')
(root / 'yolo' / 'labels' / 'a.txt').write_text('1 0.4 0.5 0.4 0.6\n0 0.1 0.2 0.3 0.2 0.3 0.6\n0 0.5 oops\n')
rows, wrong = _yolo_rows(yolo_label(root / 'yolo' / 'images' / 'a.jpg'))
kind_of = yolo_kind([v for _, _, v in rows])
found = [_yolo_box(v, kind_of(v), 40, 60) for _, _, v in rows]
assert np.allclose(found, [[12, 8, 24, 24], [6, 8, 12, 16]]) and wrong == [(3, "'0 0.5 oops'")]
assert _label_words({1: 'cat', 2: 'dog', 3: 'dog'}) == {'cat': 1, 'dog': None}
rows, wrong

# %%
#| export
YOLO_CONFIGS = ('data.yaml', 'data.yml', 'dataset.yaml', 'dataset.yml')
_NAME_LISTS = ('classes.txt', 'obj.names', 'labels.txt')  # labelImg, Label Studio; darknet, CVAT


def yolo_file(
    root,  # folder
):  # Path of data.yaml, or of the list of class names; None if there is neither
    "The file that makes a folder a YOLO data set"
    there = {f.name.lower(): f for f in Path(root).iterdir() if f.is_file()} if Path(root).is_dir() else {}
    name = next((n for n in (*YOLO_CONFIGS, *_NAME_LISTS) if n in there), None)
    return there.get(name)


def _yolo_names(path, conf):  # class names as they are written: no, 007 and 1e3 stay text
    labels = _names_by_label(path, conf)
    if str(conf.get('nc', len(labels))).strip() != str(len(labels)):
        there = f"'nc' is {conf['nc']}, but 'names' has {len(labels)} classes"
        raise DataError(f'{path}: {there}; correct one of the two')
    return labels


def _names_by_label(path, conf):
    names = conf.get('names') if isinstance(conf, dict) else None
    if isinstance(names, list) and all(isinstance(n, str) for n in names) and names:
        return dict(enumerate(names))
    if not isinstance(names, dict) or not names:
        raise DataError(f"{path}: no class 'names'; list them in the order of the label numbers")
    if not all(k.isdecimal() and len(k) < 10 and isinstance(v, str) for k, v in names.items()):
        raise DataError(f"{path}: 'names' has keys that are no label numbers; write 0: name, 1: name")
    labels = {int(k): v for k, v in names.items()}
    if len(labels) < len(names):
        raise DataError(f"{path}: 'names' gives two names to one label; write each label once")
    return labels


# %%
#| export
def _yaml(path):  # content of data.yaml, in which everything stays text and no key occurs twice
    return read_yaml(path, cure='a YOLO data set has a data.yaml with names and splits')


# %%
(root / 'names.yaml').write_text('train: images\nnames: [no, 007]\n')
assert _yolo_names('names.yaml', _yaml(root / 'names.yaml')) == {0: 'no', 1: '007'}
_yaml(root / 'names.yaml')


# %%
#| export
def _kpt_shape(shape, path):  # (points, 2 or 3) of poses, or None
    if not shape:
        return None
    numbers = [int(n) for n in shape if isinstance(n, str) and n.isdecimal() and len(n) < 10]
    if not isinstance(shape, list) or len(shape) != 2 or len(numbers) != 2 or numbers[1] not in (2, 3):
        raise DataError(f'{path}: kpt_shape is no list of two numbers; write [points, 2] or [points, 3]')
    return numbers


def _yolo_config(root):  # -> (path of data.yaml or of the list of names, its content, {label: name})
    path = yolo_file(root) or root / 'data.yaml'
    if path.suffix not in ('.yaml', '.yml'):
        lists = {k: root / f'{k}.txt' for k in ('train', 'val', 'valid', 'test')}
        conf = {k: f.name for k, f in lists.items() if f.is_file()}
        folders = {k: f'images/{k}' for k in ('train', 'val', 'test') if (root / 'images' / k).is_dir()}
        return path, conf or folders or dict(train='.'), dict(enumerate(read_lines(path)))
    conf = _yaml(path)
    return path, conf, _yolo_names(path, conf)


# %%
#| export
def _yolo_places(root, conf, entry):  # where a split may be
    e, base = entry.replace('\\', '/'), conf.get('path') or '.'
    base = root / base if isinstance(base, str) else root
    tries = [base / e, root / e, root / plain_name(e), root / e.replace('../', '')]
    return [*tries, folder_like(root, *plain_name(e).split('/')[:1]) / '/'.join(plain_name(e).split('/')[1:])]


# %%
#| export
def _yolo_images(root, conf, split):  # -> image paths of one split, what was found in reading its lists
    keys = ('val', 'valid', 'validation') if split == 'val' else (split,)
    entry = next((conf[k] for k in keys if conf.get(k) and conf[k] not in ('~', 'null')), None)
    if entry is None:
        there = ', '.join(k for k in conf if k in ('train', 'val', 'valid', 'test')) or 'none'
        raise MissingSplit(f"{root}: data.yaml has no split '{split}'; found {there}")
    out, faults, entries = [], [], entry if isinstance(entry, list) else [entry]
    if not all(isinstance(e, str) for e in entries):
        raise DataError(
            f"{root}: data.yaml: '{split}' is no path and no list of paths; write such as images/train"
        )
    for e in entries:
        tries = _yolo_places(root, conf, e)
        place = next((t for t in tries if os.path.exists(t)), None)
        if place is None:
            raise DataError(
                f"{root}: data.yaml names '{e}' for {split}, which is not there; "
                f"looked for {', '.join(dict.fromkeys(map(str, tries)))}"
            )
        if place.is_dir() and place.resolve() in root.resolve().parents:
            what = 'which holds the data set itself and all beside it; write a folder below'
            raise DataError(f"{root}: data.yaml names '{e}' for {split}, {what}")
        if place.is_dir():
            out += [place / f for f in images_under(place)]
        else:
            files, found = _listed_images(root, place)
            out, faults = out + files, faults + found
    return out, faults


def _listed_images(root, place):  # lines of a list: relative to the list or to the data set -> paths, faults
    out, faults, new = [], [], {}
    for line in read_lines(place):
        exact = [f for f in (place.parent / line, root / line) if os.path.isfile(f)]
        if exact:
            out.append(exact[0])
            continue
        plain = plain_name(line)
        tries = [place.parent / plain, root / plain, root / plain.partition('/')[2]]
        fits = list({os.path.realpath(f): f for f in tries if os.path.isfile(f)}.values())
        out.append(fits[0] if fits else place.parent / line)
        if len(fits) > 1:
            item = f'image {line!r} is not there; {fits[0]} and {fits[1]} fit'
            faults.append(
                Fault('error', 'ambiguous-image', str(place), item, 'write the path below the list')
            )
        elif fits:
            new[line] = os.path.relpath(fits[0], root)
    return out, faults + other_spelling(new, str(place))


# %%
#| export
def _yolo_faults(lines, anns_of, kind):  # what is wrong or unusual in the label files of a set
    cure = "write 'class cx cy w h' with numbers from 0 to 1"
    extra = 0
    for label, rows, wrong in lines:
        for n, what in wrong:
            yield Fault('error', 'bad-label-line', str(label), f'line {n}: {what}', cure)
        kinds = [(n, kind(v), len(v)) for n, _, v in rows]
        extra += sum(k == 'box' and size > 4 for _, k, size in kinds)
        for n, k, _ in kinds:
            if k not in ('box', 'polygon'):
                yield Fault('error', 'bad-label-line', str(label), f'line {n}: {k}', cure)
        odd = [n for n, k, size in kinds if (k, size > 4) != (kinds[0][1], kinds[0][2] > 4)]
        if odd:
            item = f'line {odd[0]} is of another kind than line {kinds[0][0]}'
            yield Fault('warning', 'mixed-label-lines', str(label), item, 'check that both were meant')
    if extra:
        item = f'{extra} lines hold more than a box: key points, a confidence or a track id'
        yield Fault('info', 'extra-numbers', anns_of, item, 'the first four numbers are the box')


# %%
#| export
def read_yolo(
    root,  # folder with data.yaml, or with a list of class names
    split: str = 'train',  # a key of data.yaml
) -> Source:
    "YOLO: lines `class cx cy w h` in fractions of the image, polygons or poses; no text file means no object"
    root = Path(root)
    path, conf, names = _yolo_config(root)
    images, faults, lines, words = [], [], [], _label_words(names)
    files, guesses = _yolo_images(root, conf, split)
    for f in files:
        image_id = os.path.relpath(f, root).replace(os.sep, '/')
        try:
            h, w = read_size(f)
        except Exception as e:
            item = f'image {image_id!r}: {reason(e)}'
            faults.append(Fault('error', 'unreadable-image', str(f), item, 'restore the file or delete it'))
            continue
        images.append(dict(id=image_id, file_name=image_id, height=h, width=w))
        label = yolo_label(f)
        lines.append((label, *_yolo_rows(label, words)))
    shape = _kpt_shape(conf.get('kpt_shape'), path)
    kind, anns = yolo_kind([v for _, rows, _ in lines for _, _, v in rows], shape), []
    for im, (_, rows, _) in zip(images, lines):
        for _, c, v in rows:
            box = _yolo_box(v, kind(v), im['height'], im['width'])
            anns.append(dict(image_id=im['id'], category_id=c, bbox=box))
    faults += guesses + list(_yolo_faults(lines, str(path), kind))
    faults += _orphans(root, lines)
    faults += outside_faults(root, [im['file_name'] for im in images], str(path))
    cats = [dict(id=k, name=v) for k, v in names.items()]
    data = dict(images=images, annotations=anns, categories=cats)
    return Source(f'{root.absolute().name}/{split}', str(path), data, root, faults)


def _orphans(root, lines):  # label files that are there although no image finds one
    if not lines or any(label.is_file() for label, _, _ in lines):
        return []
    stems = {label.name for label, _, _ in lines}
    there = [f for f in files_under(root) if f.name in stems]
    item = f'no image has a label file, but {len(there)} lie elsewhere, such as {there[0]}' if there else ''
    cure = f'put them where they are looked for, such as {lines[0][0]}'
    return [Fault('error', 'labels-not-found', str(root), item, cure)] if there else []


# %%
(root / 'yolo' / 'data.yaml').write_text('train: images\nnames: [cat, dog]\n')
yolo = read_yolo(root / 'yolo')
assert [f.kind for f in yolo.faults] == ['bad-label-line', 'mixed-label-lines'] and len(
    yolo.data['annotations']
) == 2
yolo.data['images'], yolo.data['categories']

# %%
#| label: fig-yolo-lines
#| fig-cap: "A box and a polygon in one label file: the box of the polygon is its hull."
#| fig-alt: "A small image with a dark square in a green box; a second green box overlaps it."
fig, ax = plt.subplots(figsize=(3, 1.8), dpi=80)
corners = [[x, y, x + w, y + h] for x, y, w, h in (a['bbox'] for a in yolo.data['annotations'])]
show_image(ax, scene)
draw_boxes(ax, torch.tensor(corners).float())
plt.show()

# %% [markdown]
# ## Summary
#
# * Numbers are fractions of the image; a missing text file means no object.
# * All lines of a set decide together whether they are boxes, polygons or poses; `kpt_shape` settles it.
# * Class names stay as they are written; labels are found in any capitals, or beside the images.
#
# ## Exercises
#
# 1. A folder in YOLO's layout holds `images/images/a.jpg`. Where does `yolo_label` look for its text file,
#    and why does it search from the right?
# 2. Which polygons would `yolo_kind` refuse as possible poses, and why only if all lines are alike?
