# %% [markdown]
# # COCO and VOC {#sec-formats}
#
# > Read the common annotation formats into one form, and know which pixels each of them means.

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
import posixpath
import re
import unicodedata
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from semidetr.core import DataError, MissingSplit
from semidetr.data.coco import quick_columns
from semidetr.data.columns import Texts
from semidetr.data.entries import as_number
from semidetr.data.files import (
    Fault,
    Source,
    as_flag,
    coco_entries,
    image_suffixes,
    images_under,
    outside_faults,
    reason,
)
from semidetr.text import SMALL_MB, read_json, read_lines, read_text


# %% [markdown]
# ## Names of images
#
# A record names its image by a path. If no file has that path, the spelling may differ: backslashes, a
# leading `..`, blanks, another Unicode form, capitals, another suffix, another folder. Such an image is taken
# only if exactly one file fits and no other record takes the same file; the reader then adds a note. If two
# files fit, it is an error that names both.

# %%
#| export
def plain_name(
    name: str,  # path as a record gives it
) -> str:  # forward slashes, composed Unicode, no blanks at the ends, no leading '.', '..' or drive
    "A path in one spelling"
    parts = unicodedata.normalize('NFC', name.strip()).replace('\\', '/').split('/')
    while len(parts) > 1 and (parts[0] in ('', '.', '..') or parts[0].endswith(':')):
        parts.pop(0)
    return '/'.join(parts)


def _spellings(name):  # keys under which a file is looked for, the strictest first
    plain = plain_name(name)
    base = plain.rpartition('/')[2]
    return plain, plain.casefold(), base, base.casefold(), os.path.splitext(base)[0].casefold()


def _listed(folder, names):  # which of the names are files, with one listing of each folder
    folders = {}
    for name in names:
        folders.setdefault(os.path.dirname(name), []).append(name)
    out = set()
    for parent, inside in folders.items():
        there = set(os.listdir(folder / parent)) if os.path.isdir(folder / parent) else ()
        out.update(n for n in inside if os.path.basename(n) in there)
    return out


def other_spelling(
    new: dict,  # {name as given: path that was taken}
    where: str,  # annotation file, for the messages
) -> list[Fault]:  # none or one
    "The note about images that were found under another name"
    if not new:
        return []
    first = next(iter(new))
    item = f'{len(new)} images are found in another spelling, {first!r} as {new[first]}'
    return [Fault('warning', 'image-name', where, item, 'check that these are the same images')]


# %%
#| export
def resolve_names(
    folder,  # where the images are
    names: list[str],  # as the records give them
    where: str,  # annotation file, for the messages
) -> tuple[dict, list[Fault]]:  # {name as given: path of another spelling}, what was found so
    "Find the files that records name in another spelling; what is not there at all stays out"
    right = _listed(Path(folder), names)
    lost = [n for n in dict.fromkeys(names) if n not in right]
    if not lost or not Path(folder).is_dir():
        return {}, []
    index = {}
    for f in images_under(folder):
        for level, key in enumerate(_spellings(f)):
            index.setdefault((level, key), set()).add(f)
    new, owner, faults = {}, {posixpath.normpath(n): n for n in right}, []
    for name in lost:
        keys = [k for k in enumerate(_spellings(name)) if k in index]
        fits = sorted(index[keys[0]]) if keys else []
        if len(fits) == 1 and owner.setdefault(fits[0], name) == name:
            new[name] = fits[0]
        elif fits:
            other = fits[1] if len(fits) > 1 else f'{fits[0]} of record {owner[fits[0]]!r}'
            item = (
                f'image {name!r} is not there; {fits[0]} and {other} fit'
                if len(fits) > 1
                else (f'image {name!r} is not there; the only file that fits is {other}')
            )
            cure = 'write the path below the image folder'
            faults.append(Fault('error', 'ambiguous-image', where, item, cure))
    return new, faults + other_spelling(new, where)


# %% [markdown]
# ## COCO
#
# A COCO file names its images but not their folder. A few file names are tried in the usual places, and the
# place that has most of them is taken.

# %%
#| export
def _find_images(
    json_path, files
):  # files: names of the images -> (folder in which the images of a COCO file lie, fault or None)
    p, stem = json_path.parent, json_path.stem.rsplit('_', 1)[-1].partition('.')[0]
    places = [
        p / 'images',
        p,
        p / stem,
        p / 'images' / stem,
        p.parent / stem,
        p.parent / f'{stem}2017',
        p.parent / 'images',
        p.parent / 'images' / stem,
        p.parent.parent / stem,
        p.parent.parent / 'images' / stem,
    ]
    places += [d for d in (p / 'Images', p.parent / 'Images') if d.is_dir()]
    probe = files[:: max(1, len(files) // 5)][:6]
    for spelling in (str, plain_name, lambda f: plain_name(f).rpartition('/')[2]):
        hits = [sum(os.path.isfile(d / spelling(f)) for f in probe) for d in places]
        if not probe or max(hits):
            return places[hits.index(max(hits))], None
    for d in places:
        if probe and d not in (p, p.parent) and d.is_dir() and resolve_names(d, probe, '')[0]:
            return d, None
    tried = ', '.join(dict.fromkeys(map(str, places)))
    return places[0], Fault(
        'error',
        'missing-image-folder',
        str(json_path),
        f'image {probe[0]} was not found in {tried}',
        'put the images there, or name their folder: --images FOLDER (setting data.images)',
    )


def _coco_folder(
    path, names, image_dir
):  # names: of the images -> (their folder, {name: path of another spelling}, faults)
    fault = None
    if image_dir is None:
        folder, fault = _find_images(path, names)
    else:
        folder = Path(image_dir)
        if not folder.is_dir():
            item, cure = f'no such image folder: {folder}', 'name the folder that holds the images'
            fault = Fault('error', 'missing-image-folder', str(path), item, cure)
    if fault:
        return folder, {}, [fault]
    home = path.parent.parent if path.parent.name == 'annotations' else path.parent
    new, faults = resolve_names(folder, names, str(path))
    if image_dir is not None and names and not new and not faults and not _listed(folder, names):
        item = f'none of its images, such as {names[0]}, is in {folder}'
        cure = 'name the folder that holds the images'
        faults.append(Fault('error', 'missing-image-folder', str(path), item, cure))
    faults += outside_faults(folder, [new.get(n, n) for n in names], str(path), [home])
    return folder, new, faults


def _coco_name(path):  # of the data set, from the place of its file
    home = path.parent.parent if path.parent.name == 'annotations' else path.parent
    return f'{home.absolute().name}/{path.stem}'


# %%
#| export
def read_coco(
    json_path,  # instances_*.json
    image_dir=None,  # where the images are; None: look in the usual places
) -> Source:
    "A COCO annotation file; DataError if it cannot be read at all"
    path = Path(json_path)
    data = read_json(path)
    images = [im for im in coco_entries(data, 'images') if isinstance(im.get('file_name'), str)]
    folder, new, faults = _coco_folder(path, [im['file_name'] for im in images], image_dir)
    for im in images if new else ():
        im['file_name'] = new.get(im['file_name'], im['file_name'])
    return Source(_coco_name(path), str(path), data, folder, faults)


def read_coco_columns(
    json_path,  # instances_*.json
    image_dir=None,  # as for `read_coco`
):  # Source with columns, or None
    "A large COCO file without faults, from the cache or in one pass; None: it is for `read_coco`"
    path = Path(json_path)
    columns = quick_columns(path)
    if columns is None:
        return None
    names = list(columns.files)
    folder, new, faults = _coco_folder(path, names, image_dir)
    if new:
        columns = replace(columns, files=Texts.of([new.get(n, n) for n in names]))
    return Source(_coco_name(path), str(path), {}, folder, faults, columns)


# %%
import json
import tempfile
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from semidetr.draw import draw_boxes, show_image

# %% [markdown]
# One scene will be written in both formats: a picture of 60 x 40 pixels with one object from $(12, 8)$
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
foreign, notes = resolve_names(coco.folder, ['C:\\data\\a.JPG', 'b.jpg'], 'list')
assert foreign == {'C:\\data\\a.JPG': 'a.jpg'} and [f.level for f in notes] == ['warning']
coco.name, coco.data['annotations'], str(notes[0])

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


def _corner(element, key):  # one number of the one box of an object
    found = [e.text or '' for e in element.findall(f'bndbox/{key}')]
    if len(found) != 1:
        raise ValueError(f'an object has {len(found)} numbers {key}')
    return as_number(found[0])


def _voc_file(path):  # one XML -> ((name, box xywh, difficult) of each object, (height, width), file name)
    text = read_text(path, most_mb=SMALL_MB)
    if '<!ENTITY' in text:
        raise ValueError('declares entities of XML, which may unfold without end')
    root = ET.fromstring(re.sub(r'^\s*<\?xml.*?\?>', '', text, flags=re.S))
    size = [as_number(root.findtext(f'size/{k}') or '0') for k in ('height', 'width')]
    objects = []
    for o in root.iter('object'):
        x1, y1, x2, y2 = (_corner(o, k) for k in ('xmin', 'ymin', 'xmax', 'ymax'))
        w, h = x2 - x1, y2 - y1
        if w >= 0 and h >= 0:  # swapped corners keep their negative size and are refused
            w, h = w + 1, h + 1
        name, word = o.findtext('name') or '', o.findtext('difficult') or '0'
        if (difficult := as_flag(word)) is None:
            raise ValueError(f"difficult is '{word}', write 0 or 1")
        objects.append((name.strip(), [x1 - 1, y1 - 1, w, h], difficult))
    return objects, size if all(size) else (None, None), (root.findtext('filename') or '').strip()


# %%
#| export
def folder_like(
    root,  # folder
    *names: str,  # of a subfolder, the usual one first
) -> Path:  # the subfolder of that name, in any capitals; the usual one if there is none
    "Find a subfolder by name, whatever its capitals"
    there = [d for d in Path(root).iterdir() if d.is_dir()] if Path(root).is_dir() else []
    for name in names:
        fits = sorted((d for d in there if d.name.lower() == name.lower()), key=lambda d: d.name != name)
        if fits:
            return fits[0]
    return Path(root) / names[0]


def voc_folders(
    root,  # folder of the data set
) -> tuple[Path, Path]:  # folder of the XML files, folder of the images
    "Annotations/ and JPEGImages/ in any capitals, annotations/ and images/, or both kinds in one folder"
    root = Path(root)
    xmls = folder_like(root, 'Annotations', 'labels')
    if not any(xmls.glob('*.xml')) and any(root.glob('*.xml')):
        xmls = root
    images = folder_like(root, 'JPEGImages', 'images')
    return xmls, images if images.is_dir() or not xmls.is_dir() else xmls


def _voc_id(line, xmls):  # line of a list -> id of the image: marks, folders and suffixes are left out
    line = plain_name(line).rpartition('/')[2]
    tries = [line, re.sub(r'\s+-?[01]$', '', line), (line.split() or [line])[0]]
    tries += [os.path.splitext(t)[0] for t in tries]
    return next((t for t in tries if os.path.isfile(xmls / f'{t}.xml')), tries[1])


def _voc_ids(root, split):  # -> (image ids, file that lists them or None)
    lists, xmls = folder_like(root, 'ImageSets') / 'Main', voc_folders(root)[0]
    lists = lists if lists.is_dir() else lists.parent
    for s in {'train': ('train', 'trainval'), 'val': ('val', 'test')}.get(split, (split,)):
        f = lists / f'{s}.txt'
        if f.is_file():
            return [_voc_id(line, xmls) for line in read_lines(f)], f
    if lists.is_dir():
        there = ', '.join(sorted(f.name for f in lists.glob('*.txt'))[:8]) or 'none'
        raise MissingSplit(f"{lists}: no list for the split '{split}'; found {there}")
    if split not in ('train', 'trainval'):
        raise MissingSplit(
            f"{root}: no list for the split '{split}': there is no ImageSets/Main; all is 'train'"
        )
    return sorted(f.stem for f in xmls.glob('*.xml')), None


# %%
(root / 'one.xml').write_text(
    '<annotation><size><width>60</width><height>40</height></size><object><name>dog</name>'
    '<difficult>1</difficult><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>60</xmax><ymax>40</ymax></bndbox></object></annotation>'
)
objects, size, _ = _voc_file(root / 'one.xml')
assert objects == [('dog', [0, 0, 60, 40], True)] and size == [40, 60]  # the whole image
objects


# %% [markdown]
# Without a list of classes the 20 of VOC are taken if they cover all names, and else the names that occur.
# They are collected over *all* annotation files, so that every split of a data set has the same labels.

# %%
#| export
def _voc_annotations(
    root, ids, all_files
):  # root: folder of the XML files -> {image id: content of its file}, faults
    files = [root / f'{i}.xml' for i in ids]
    if all_files:
        files = sorted({*root.glob('*.xml'), *files})
    content, faults, wanted = {}, [], set(ids)
    for f in files:
        try:
            content[f.stem] = _voc_file(f)
        except (ET.ParseError, TypeError, ValueError, LookupError, DataError) as e:
            if f.stem in wanted:
                e = e if os.path.isfile(f) else FileNotFoundError()
                what = str(e).removeprefix(f'{f}: ').split(';')[0] if isinstance(e, DataError) else reason(e)
                cure = 'restore the file, or take the image out of the split list'
                faults.append(Fault('error', 'bad-xml', str(f), f'image {f.stem!r}: {what}', cure))
    return content, faults


def _voc_files(folder, ids, content, where):  # -> {image id: file name}, faults
    known = image_suffixes()
    there = {f for f in os.listdir(folder) if os.path.splitext(f)[1].lower() in known}
    by_stem, out, faults, stale = {}, {}, [], {}
    for f in sorted(there):
        by_stem.setdefault(os.path.splitext(f)[0], []).append(f)
    own = {f for i, (_, _, f) in content.items() if f in by_stem.get(i, ())}  # of records that agree
    for i in ids:
        declared, fits = content[i][2] if i in content else '', by_stem.get(i, [])
        out[i] = fits[0] if fits else declared if declared in there else f'{i}.jpg'
        if declared in fits:
            out[i] = declared
        elif fits and declared in there - own:
            fits = [fits[0], declared]
        elif fits and declared in own:
            stale[declared] = fits[0]
        if len(fits) > 1 and out[i] != declared:
            item = f'image {i!r}: {fits[0]} and {fits[1]} fit'
            cure = 'give its <filename>, or delete one'
            faults.append(Fault('error', 'ambiguous-image', where, item, cure))
    lost = {i: f for i, f in out.items() if f not in there}
    new, found = resolve_names(folder, list(lost.values()), where)
    faults += other_spelling(stale, where) + found
    out |= {i: new[f] for i, f in lost.items() if f in new}
    return out, faults + outside_faults(folder, out.values(), where)


# %%
#| export
def read_voc(
    root,  # folder with Annotations/, JPEGImages/ and ImageSets/Main/
    split: str = 'trainval',  # a list in ImageSets/Main; 'train' falls back to trainval, 'val' to test
    classes=None,  # names in label order; None: the 20 of VOC, or, if there are others, all that occur
    keep_difficult: bool = True,  # keep them, to be ignored; False: as if they were not there
) -> Source:
    "Pascal VOC; pixels count from 1 and the last one is included (@eq-formats-voc)"
    root = Path(root)
    xmls, pictures = voc_folders(root)
    for folder in (xmls, pictures):
        if not folder.is_dir():
            raise DataError(
                f'{folder}: no such folder; a VOC data set has Annotations/, JPEGImages/ and ImageSets/Main/'
            )
    ids, listed = _voc_ids(root, split)
    if not ids:
        raise DataError(f'{listed or xmls}: names no image; check the split')
    content, faults = _voc_annotations(xmls, ids, all_files=classes is None)
    if classes is None:
        names = {o[0] for objects, _, _ in content.values() for o in objects}
        classes = VOC_CLASSES if names <= set(VOC_CLASSES) else sorted(names)
    images, anns = [], []
    files, found = _voc_files(pictures, ids, content, str(xmls))
    for i in ids:
        objects, (h, w), _ = content.get(i, ([], (None, None), ''))
        images.append(dict(id=i, file_name=files[i], height=h, width=w))
        for c, box, difficult in objects:
            label = classes.index(c) if c in classes else c  # an unknown name is refused later
            if keep_difficult or not difficult:
                anns.append(dict(image_id=i, category_id=label, bbox=box, iscrowd=int(difficult)))
    categories = [dict(id=n, name=c) for n, c in enumerate(classes)]
    data = dict(images=images, annotations=anns, categories=categories)
    name = f'{root.absolute().name}/{split}'
    return Source(name, str(xmls), data, pictures, faults + found)


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

# %%
#| label: fig-formats-same
#| fig-cap: "The same object written as COCO and VOC is read as the same box."
#| fig-alt: "Two copies of a small image with a dark square; a green box lies on the edge of the square in each."
sources = dict(COCO=coco, VOC=voc)
boxes = {name: s.data['annotations'][0]['bbox'] for name, s in sources.items()}
assert np.allclose(list(boxes.values()), [12, 8, 24, 24])
fig, axes = plt.subplots(1, 2, figsize=(4, 1.6), dpi=80)
for ax, (name, (x, y, bw, bh)) in zip(axes, boxes.items()):
    show_image(ax, scene, title=f'{name}: {x:g}, {y:g}, {bw:g}, {bh:g}')
    draw_boxes(ax, torch.tensor([[x, y, x + bw, y + bh]]).float())
plt.show()

# %% [markdown]
# ## Summary
#
# * COCO and VOC, and YOLO in @sec-yolo, become one `Source` in COCO's terms; the checks of @sec-records apply to all of them.
# * The readers look for images where the common tools put them, and say where they looked.
# * VOC's pixels count from 1 and include the last one; difficult objects become crowd regions.
# * What is wrong with single files is collected in `faults`; what prevents reading at all is a `DataError`.
#
# ## Exercises
#
# 1. A VOC box has $x_{\min} = x_{\max} = 5$. How wide is the object in pixels, and how wide do the usual
#    converters make it?
# 2. Write a reader for a CSV file with one box per line. Which faults does it have to find by itself, and
#    which come for free?
