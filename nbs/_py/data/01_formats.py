# %% [markdown]
# # COCO, VOC and YOLO {#sec-formats}
#
# > Read the three common annotation formats into one form, and know which pixels each of them means.

# %%
#| default_exp data.formats

# %% [markdown]
# The formats disagree on everything that matters: corners or sizes, pixels or fractions, counted from 0 or
# from 1, one file for all images or one file per image. A detector should not know any of it. Each reader in
# this chapter turns one format into a `Source` (@sec-records), that is, into COCO's terms. It looks for the
# images where the common tools put them, and records what is wrong with the files instead of stopping, so
# that the doctor can report everything at once.
#
# With the size $(H, W)$ of the image, a box becomes $[x, y, w, h]$ in pixels as in @tbl-formats-box.
#
# | format | box in the file | box in the source |
# |:--|:--|:--|
# | COCO | $x, y, w, h$ | $[x, y, w, h]$ |
# | VOC | $x_{\min}, y_{\min}, x_{\max}, y_{\max}$ | $[x_{\min}-1, y_{\min}-1, x_{\max}-x_{\min}+1, y_{\max}-y_{\min}+1]$ |
# | YOLO | $c_x, c_y, w', h'$ | $[(c_x-w'/2)W, (c_y-h'/2)H, w'W, h'H]$ |
#
# : Boxes of the three formats. {#tbl-formats-box}

# %%
#| export
import os
import xml.etree.ElementTree as ET
from pathlib import Path
from semidetr.core import DataError
from semidetr.data.files import (
    IMAGE_SUFFIXES,
    Fault,
    Source,
    coco_entries,
    images_under,
    read_json,
    read_size,
    reason,
)


# %% [markdown]
# ## COCO
#
# A COCO file names its images but not their folder. A few file names are tried in the usual places, and the
# place that has most of them is taken.

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
    tried = ', '.join(dict.fromkeys(map(str, places)))
    return places[0], Fault(
        'error',
        'missing-image-folder',
        str(json_path),
        f'image {probe[0]} was not found in {tried}',
        'put the images there or name their folder (image_dir)',
    )


def read_coco(
    json_path,  # instances_*.json
    image_dir=None,  # where the images are; None: look in the usual places
) -> Source:
    "A COCO annotation file; DataError if it cannot be read at all"
    path, fault = Path(json_path), None
    data = read_json(path)
    if image_dir is None:
        files = [im.get('file_name') for im in coco_entries(data, 'images')]
        folder, fault = _find_images(path, [f for f in files if isinstance(f, str)])
    else:
        folder = Path(image_dir)
        if not folder.is_dir():
            item, cure = f'no such image folder: {folder}', 'name the folder that holds the images'
            fault = Fault('error', 'missing-image-folder', str(path), item, cure)
    home = path.parent.parent if path.parent.name == 'annotations' else path.parent
    return Source(f'{home.absolute().name}/{path.stem}', str(path), data, folder, [fault] if fault else [])


# %%
import json
import tempfile
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from semidetr.draw import draw_boxes, show_image

# %% [markdown]
# One scene will be written in all three formats: a picture of 60 x 40 pixels with one object from $(12, 8)$
# to $(36, 32)$.

# %%
root = Path(tempfile.mkdtemp())
scene = Image.new('RGB', (60, 40), (200, 210, 190))
scene.paste((60, 60, 120), (12, 8, 36, 32))
(root / 'coco' / 'images').mkdir(parents=True)
scene.save(root / 'coco' / 'images' / 'a.jpg')
content = dict(
    images=[dict(id=1, file_name='a.jpg', width=60, height=40)],
    annotations=[dict(id=1, image_id=1, category_id=3, bbox=[12, 8, 24, 24])],
    categories=[dict(id=3, name='dog')],
)
(root / 'coco' / 'instances_train.json').write_text(json.dumps(content))
coco = read_coco(root / 'coco' / 'instances_train.json')
assert coco.folder == root / 'coco' / 'images' and list(coco.all_faults()) == []
coco.name, coco.data['annotations']

# %% [markdown]
# ## Pascal VOC
#
# VOC counts pixels from 1 and includes both ends. Pixel number $n$ covers the stretch from $n-1$ to $n$, so
#
# $$
# x_1 = x_{\min} - 1, \qquad x_2 = x_{\max}
# $$ {#eq-formats-voc}
#
# and a box from 1 to 60 is as wide as an image of 60 pixels. Objects marked *difficult* are neither learnt
# from nor counted: in COCO's terms they become crowd regions.
#
# ::: {.callout-note}
# ## Paper vs. code
# The usual converters subtract 1 from all four numbers, which makes each box one pixel narrower and lower.
# @eq-formats-voc keeps the pixels that VOC means.
# :::

# %%
#| export
VOC_CLASSES = (
    'aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person '
    'pottedplant sheep sofa train tvmonitor'
).split()


def _voc_file(path):  # one XML file -> (class name, box xywh, difficult) of each object, (height, width)
    root = ET.parse(path).getroot()
    size = [float(root.findtext(f'size/{k}') or 0) for k in ('height', 'width')]
    objects = []
    for o in root.iter('object'):
        x1, y1, x2, y2 = (float(o.findtext(f'bndbox/{k}')) for k in ('xmin', 'ymin', 'xmax', 'ymax'))
        w, h = x2 - x1, y2 - y1
        if w >= 0 and h >= 0:  # swapped corners keep their negative size and are refused
            w, h = w + 1, h + 1
        name, difficult = o.findtext('name') or '', o.findtext('difficult') or '0'
        objects.append((name.strip(), [x1 - 1, y1 - 1, w, h], difficult.strip() == '1'))
    return objects, size if all(size) else (None, None)


def _voc_ids(root, split):  # -> (image ids, file that lists them or None)
    lists = root / 'ImageSets' / 'Main'
    for s in {'train': ('train', 'trainval'), 'val': ('val', 'test')}.get(split, (split,)):
        f = lists / f'{s}.txt'
        if f.is_file():
            return [line.split()[0] for line in f.read_text().splitlines() if line.strip()], f
    if lists.is_dir():
        there = ', '.join(sorted(f.name for f in lists.glob('*.txt'))[:8]) or 'none'
        raise DataError(f"{lists}: no list for the split '{split}'; found {there}")
    return sorted(f.stem for f in (root / 'Annotations').glob('*.xml')), None


# %%
(root / 'one.xml').write_text(
    '<annotation><size><width>60</width><height>40</height></size><object><name>dog</name>'
    '<difficult>1</difficult><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>60</xmax><ymax>40</ymax></bndbox></object></annotation>'
)
objects, size = _voc_file(root / 'one.xml')
assert objects == [('dog', [0, 0, 60, 40], True)] and size == [40, 60]  # the whole image
objects


# %% [markdown]
# Without a list of classes the 20 of VOC are taken if they cover all names, and else the names that occur.
# They are collected over *all* annotation files, so that every split of a data set has the same labels.

# %%
#| export
def _voc_annotations(root, ids, all_files):  # -> {image id: content of its file}, faults
    files = [root / 'Annotations' / f'{i}.xml' for i in ids]
    if all_files:
        files = sorted({*(root / 'Annotations').glob('*.xml'), *files})
    content, faults, wanted = {}, [], set(ids)
    for f in files:
        try:
            content[f.stem] = _voc_file(f)
        except (ET.ParseError, TypeError, ValueError, OSError) as e:
            if f.stem in wanted:
                cure = 'restore the file, or take the image out of the split list'
                faults.append(Fault('error', 'bad-xml', str(f), f'image {f.stem!r}: {reason(e)}', cure))
    return content, faults


def read_voc(
    root,  # folder with Annotations/, JPEGImages/ and ImageSets/Main/
    split: str = 'trainval',  # a list in ImageSets/Main; 'train' falls back to trainval, 'val' to test
    classes=None,  # names in label order; None: the 20 of VOC, or, if there are others, all that occur
    keep_difficult: bool = True,  # keep them, to be ignored; False: as if they were not there
) -> Source:
    "Pascal VOC; pixels count from 1 and the last one is included (@eq-formats-voc)"
    root = Path(root)
    for folder in (root / 'Annotations', root / 'JPEGImages'):
        if not folder.is_dir():
            raise DataError(
                f'{folder}: no such folder; a VOC data set has Annotations/, JPEGImages/ and ImageSets/Main/'
            )
    ids, listed = _voc_ids(root, split)
    if not ids:
        raise DataError(f'{listed or root / "Annotations"}: names no image; check the split')
    content, faults = _voc_annotations(root, ids, all_files=classes is None)
    if classes is None:
        names = {o[0] for objects, _ in content.values() for o in objects}
        classes = VOC_CLASSES if names <= set(VOC_CLASSES) else sorted(names)
    there = [f for f in sorted((root / 'JPEGImages').iterdir()) if f.suffix.lower() in IMAGE_SUFFIXES]
    file_of = {f.stem: f.name for f in there}
    images, anns = [], []
    for i in ids:
        objects, (h, w) = content.get(i, ([], (None, None)))
        images.append(dict(id=i, file_name=file_of.get(i, f'{i}.jpg'), height=h, width=w))
        for c, box, difficult in objects:
            label = classes.index(c) if c in classes else c  # an unknown name is refused later
            if keep_difficult or not difficult:
                anns.append(dict(image_id=i, category_id=label, bbox=box, iscrowd=int(difficult)))
    categories = [dict(id=n, name=c) for n, c in enumerate(classes)]
    data = dict(images=images, annotations=anns, categories=categories)
    name = f'{root.absolute().name}/{split}'
    return Source(name, str(root / 'Annotations'), data, root / 'JPEGImages', faults)


# %%
for folder in ('Annotations', 'JPEGImages'):
    (root / 'voc' / folder).mkdir(parents=True)
scene.save(root / 'voc' / 'JPEGImages' / 'a.jpg')
(root / 'voc' / 'Annotations' / 'a.xml').write_text(
    '<annotation><size><width>60</width><height>40</height></size><object><name>dog</name>'
    '<bndbox><xmin>13</xmin><ymin>9</ymin><xmax>36</xmax><ymax>32</ymax></bndbox></object></annotation>'
)
voc = read_voc(root / 'voc')
assert voc.data['annotations'][0]['bbox'] == coco.data['annotations'][0]['bbox']
voc.data['annotations'], voc.data['images']


# %% [markdown]
# ## YOLO
#
# YOLO keeps one text file per image. A line holds the class, the centre and the size as fractions of the
# image, so $x_1 = (c_x - w/2)\,W$. Longer lines are polygons; their box is the hull. An image without a text
# file is an image without objects.

# %%
#| export
def _yolo_label(image):  # images/.../a.jpg -> labels/.../a.txt
    parts = list(image.parts)
    for n in range(len(parts) - 2, -1, -1):
        if parts[n] == 'images':
            parts[n] = 'labels'
            break
    return Path(*parts).with_suffix('.txt')


def _yolo_rows(label, h, w):  # -> [(class, xywh in pixels)], [(line number, line)] that cannot be read
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
(root / 'yolo' / 'images').mkdir(parents=True)
(root / 'yolo' / 'labels').mkdir()
scene.save(root / 'yolo' / 'images' / 'a.jpg')
(root / 'yolo' / 'labels' / 'a.txt').write_text('1 0.4 0.5 0.4 0.6\n0 0.1 0.2 0.3 0.2 0.3 0.6\n0 0.5 oops\n')
rows, wrong = _yolo_rows(_yolo_label(root / 'yolo' / 'images' / 'a.jpg'), 40, 60)
assert np.allclose([r[1] for r in rows], [[12, 8, 24, 24], [6, 8, 12, 16]]) and wrong == [(3, '0 0.5 oops')]
rows, wrong


# %%
#| export
def _yolo_config(root):  # -> (path of data.yaml, its content)
    import yaml

    there = (root / n for n in ('data.yaml', 'data.yml', 'dataset.yaml'))
    path = next((f for f in there if f.is_file()), root / 'data.yaml')
    try:
        conf = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as e:
        raise DataError(
            f'{path}: {reason(e)}; a YOLO data set has a data.yaml with names and splits'
        ) from None
    names = conf.get('names') if isinstance(conf, dict) else None
    if not names or not isinstance(names, (list, dict)):
        raise DataError(f"{path}: no class 'names'; list them in the order of the label numbers")
    return path, conf


def _yolo_images(root, conf, split):  # -> image paths of one split
    keys = ('val', 'valid', 'validation') if split == 'val' else (split,)
    entry = next((conf[k] for k in keys if conf.get(k)), None)
    if entry is None:
        there = ', '.join(k for k in conf if k in ('train', 'val', 'valid', 'test')) or 'none'
        raise DataError(f"{root}: data.yaml has no split '{split}'; found {there}")
    out = []
    for e in entry if isinstance(entry, list) else [entry]:
        tries = [root / str(conf.get('path') or '.') / e, root / e, root / str(e).replace('../', '')]
        place = next((t for t in tries if t.exists()), None)
        if place is None:
            raise DataError(
                f"{root}: data.yaml names '{e}' for {split}, which is not there; "
                f"looked for {', '.join(dict.fromkeys(map(str, tries)))}"
            )
        if place.is_dir():
            out += [place / f for f in images_under(place)]
        else:
            out += [place.parent / line.strip() for line in place.read_text().splitlines() if line.strip()]
    return out


# %%
#| export
def read_yolo(
    root,  # folder with data.yaml
    split: str = 'train',  # a key of data.yaml
) -> Source:
    "YOLO: lines `class cx cy w h` in fractions of the image, or polygons; no text file means no object"
    root = Path(root)
    path, conf = _yolo_config(root)
    names = conf['names'].items() if isinstance(conf['names'], dict) else enumerate(conf['names'])
    cats = [dict(id=int(k), name=str(v)) for k, v in names]
    images, anns, faults = [], [], []
    for f in _yolo_images(root, conf, split):
        image_id = os.path.relpath(f, root).replace(os.sep, '/')
        try:
            h, w = read_size(f)
        except Exception as e:
            item = f'image {image_id!r}: {reason(e)}'
            faults.append(Fault('error', 'unreadable-image', str(f), item, 'restore the file or delete it'))
            continue
        images.append(dict(id=image_id, file_name=image_id, height=h, width=w))
        label, cure = _yolo_label(f), "write 'class cx cy w h' with numbers from 0 to 1"
        rows, wrong = _yolo_rows(label, h, w)
        anns += [dict(image_id=image_id, category_id=c, bbox=b) for c, b in rows]
        for n, line in wrong:
            faults.append(Fault('error', 'bad-label-line', str(label), f'line {n}: {line[:60]!r}', cure))
    data = dict(images=images, annotations=anns, categories=cats)
    return Source(f'{root.absolute().name}/{split}', str(path), data, root, faults)


# %%
(root / 'yolo' / 'data.yaml').write_text('train: images\nnames: [cat, dog]\n')
yolo = read_yolo(root / 'yolo')
assert [f.kind for f in yolo.faults] == ['bad-label-line'] and len(yolo.data['annotations']) == 2
yolo.data['images'], yolo.data['categories']

# %%
#| label: fig-formats-same
#| fig-cap: "The same object written as COCO, VOC and YOLO is read as the same box."
#| fig-alt: "Three copies of a small image with a dark square; a green box lies on the edge of the square in each."
sources = dict(COCO=coco, VOC=voc, YOLO=yolo)
boxes = {name: s.data['annotations'][0]['bbox'] for name, s in sources.items()}
assert np.allclose(list(boxes.values()), [12, 8, 24, 24])
fig, axes = plt.subplots(1, 3, figsize=(5, 1.4), dpi=80)
for ax, (name, (x, y, bw, bh)) in zip(axes, boxes.items()):
    show_image(ax, scene, title=f'{name}: {x:g}, {y:g}, {bw:g}, {bh:g}')
    draw_boxes(ax, torch.tensor([[x, y, x + bw, y + bh]]).float())
plt.show()

# %% [markdown]
# ## Summary
#
# * COCO, VOC and YOLO become one `Source` in COCO's terms; the checks of @sec-records apply to all of them.
# * The readers look for images where the common tools put them, and say where they looked.
# * VOC's pixels count from 1 and include the last one; difficult objects become crowd regions.
# * YOLO's numbers are fractions of the image; a missing text file means no object.
# * What is wrong with single files is collected in `faults`; what prevents reading at all is a `DataError`.
#
# ## Exercises
#
# 1. A VOC box has $x_{\min} = x_{\max} = 5$. How wide is the object in pixels, and how wide do the usual
#    converters make it?
# 2. A folder in YOLO's layout holds `images/images/a.jpg`. Where does `_yolo_label` look for its text file,
#    and why does it search from the right?
# 3. Write a reader for a CSV file with one box per line. Which faults does it have to find by itself, and
#    which come for free?
