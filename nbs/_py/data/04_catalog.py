# %% [markdown]
# # Open a data set by path or name {#sec-catalog}
#
# > Open any data set by path or name, whatever its layout, or learn what was looked for.

# %%
#| default_exp data.catalog

# %% [markdown]
# Boxes are kept in COCO files, Pascal VOC folders and YOLO folders, and unlabelled images in no format at
# all. A command need not ask for the format, because the folder shows it. `open_dataset` looks, in this
# order, for COCO files (`instances_train.json`, `annotations/instances_train2017.json`,
# `train/_annotations.coco.json`), YOLO's `data.yaml`, VOC's `Annotations/`, and last for the images
# themselves. A folder that holds the annotations of *another* split is never taken for a plain folder of
# images: the images of a validation set without its boxes would pass for unlabelled ones, and nobody would
# notice.
#
# This is the only place that knows all formats (@sec-formats) and the built-in scenes (@sec-digits). To add a
# format, write a reader and add one line here.

# %%
#| export
import contextlib
import copy
import os
import re
from time import time_ns
from pathlib import Path
from semidetr.core import DataError, MissingSplit, suggest
from semidetr.data.datasets import DetectionDataset, FileDataset
from semidetr.data.digits import DigitsScenes
from semidetr.data.entries import coco_entries
from semidetr.data.files import Fault, Source, declared_size, files_under, image_suffixes, read_folder
from semidetr.data.formats import read_coco, read_coco_columns, read_voc, voc_folders
from semidetr.data.shards import ShardImages, shard_range
from semidetr.data.yolo import read_yolo, yolo_file
from semidetr.text import read_text

# %%
import json
import tempfile
from PIL import Image
from semidetr.data.datasets import Unlabelled
from semidetr.draw import image_grid

# %%
#| export
_ALIAS = {'val': ('val', 'valid', 'validation'), 'unlabeled': ('unlabeled', 'unlabelled')}


_SPLITS = {
    'train',
    'trainval',
    'val',
    'valid',
    'validation',
    'dev',
    'test',
    'unlabeled',
    'unlabelled',
    'images',
}
_SPLITS |= {f'{s}{year}' for s in ('train', 'val', 'test', 'unlabeled') for year in (2014, 2017)}
_COCO_START = re.compile(r'"(images|annotations|categories)"\s*:\s*\[')
_WHOLE = (
    'result.json',
    'instances_default.json',
    'annotations/instances_default.json',
)  # one file, no splits


def _json_of(root, split):  # COCO file of one split in one of the common layouts, or None
    there = {f.as_posix().lower(): root / f for f in _coco_files(root)}
    for s in _ALIAS.get(split, (split,)):
        names = [
            f'instances_{s}.json',
            f'instances_{s}2017.json',
            f'instances_{s}2014.json',
            f'{s}.json',
            f'image_info_{s}.json',
            f'image_info_{s}2017.json',
        ]
        places = [f'{folder}{n}' for folder in ('', 'annotations/') for n in names]
        for name in [*places, f'{s}/_annotations.coco.json']:
            if name in there:
                return there[name]
    if split in ('train', _split_of(root)):
        whole = [there[n] for n in (*_WHOLE, '_annotations.coco.json') if n in there]
        if whole:
            return whole[0]
    return None


def _split_of(root):  # the split that a folder is by its name: rf/valid -> 'val'
    name = root.absolute().name.lower()
    return next((s for s, names in _ALIAS.items() if name in names), name)


def _coco_files(root):  # JSON files where the layouts put COCO files, relative to `root`
    found = []
    for folder in [root, *sorted(d for d in root.iterdir() if d.is_dir())]:
        for f in folder.glob('*.json'):
            near = folder == root or folder.name.lower() == 'annotations'
            if f.is_file() and (near or f.name == '_annotations.coco.json'):
                found.append(f.relative_to(root))
    return found


def _is_coco(path):  # does a JSON file look like COCO's? The start decides; a file that breaks off counts
    with open(path, 'rb') as f:
        head = f.read(4096)
    text = head.decode('utf-16' if head[:2] in (b'\xff\xfe', b'\xfe\xff') else 'utf-8', errors='ignore')
    return bool(_COCO_START.search(text)) or path.name.startswith(('instances_', '_annotations'))


def _splits_in(root):  # COCO files that are there, for the error message
    nested = [f.relative_to(root) for f in root.glob('annotations/*/*.json')]
    named = [f for f in _coco_files(root) if f.parent.name.lower() == 'annotations' or _is_coco(root / f)]
    return sorted(f.as_posix() for f in {*named, *nested})


# %%
#| export
def _digits(spec, split):  # 'digits:n=2000,size=96' -> DigitsScenes
    known = ('n', 'size', 'seed')
    try:
        args = {k.strip(): int(v) for k, v in (p.split('=') for p in spec.partition(':')[2].split(',') if p)}
    except ValueError:
        raise DataError(f"data set '{spec}': write digits:n=2000,size=96") from None
    for k in args:
        if k not in known:
            raise DataError(f"data set '{spec}': no option '{k}', {suggest(k, known)}")
    return DigitsScenes(split, **args)


# %%
#| export
def _locate(spec, data_root=None):  # path of a data set given by path or name
    path, root = Path(spec), data_root or os.environ.get('SEMIDETR_DATA')
    if path.exists():
        if not (path.is_file() or path.is_dir()):
            raise DataError(f"data set '{spec}': is a pipe or a device; give a folder or an annotation file")
        return path
    wanted = "give a folder, an annotation file or 'digits'"
    if not root:
        raise DataError(
            f"data set '{spec}': nothing at {path.absolute()}; "
            f'SEMIDETR_DATA is not set: let it name the folder that holds your data sets, or {wanted}'
        )
    if (Path(root) / spec).exists():
        return Path(root) / spec
    known = [p.name for p in Path(root).iterdir() if p.is_dir()] if Path(root).is_dir() else []
    hint = f' ({suggest(spec, known)})' if known else ''
    raise DataError(
        f"data set '{spec}': nothing at {path.absolute()} and {Path(root) / spec}; {wanted}{hint}"
    )


def _coco_alone(spec, images):  # only COCO files leave open where their images are
    if images:
        raise DataError(f'{spec}: no COCO file, and only those need --images (data.images); leave it out')


def _no_coco(path):  # does the name of a file say that it holds no COCO annotations?
    suffix = path.suffix.lower()
    return suffix in ('.xml', '.txt', '.csv', '.tar') or suffix in image_suffixes()


def _read_file(path, split, images=None):  # a file that was given itself
    suffix = path.suffix.lower()
    if suffix in ('.yaml', '.yml'):
        _coco_alone(path, images)
        return read_yolo(path.parent, split)
    if suffix == '.tar':
        _coco_alone(path, images)
        return _shard_source([path], str(path))
    if _no_coco(path):
        raise DataError(f'{path}: not an annotation file of COCO; give the folder of the data set')
    return read_coco(path, images)


def _is_voc(folder):  # is the first XML file one of VOC? CVAT's own format is refused with its cure
    first = sorted(folder.glob('*.xml'))[0]
    try:
        start = read_text(first)[:4000]
    except DataError:
        return True  # the reader reports the file
    if '<annotations' in start:
        raise DataError(f"{first}: CVAT's own XML is not read; export the task as 'COCO 1.0' or 'PASCAL VOC'")
    return '<annotation' in start


# %%
#| export
def _shard_source(paths, where):  # tar files of images
    ds = ShardImages(paths, where)
    images = [dict(id=i, file_name=i) for i in ds.ids]
    return Source(ds.name, where, dict(images=images, categories=[]), ds, list(ds.faults))


def _shard_files(
    spec, data_root
):  # files that a range of numbers stands for, here or in the folder of data sets
    names, root = shard_range(spec), data_root or os.environ.get('SEMIDETR_DATA')
    if names and root and not os.path.exists(names[0]):
        return [os.path.join(root, n) for n in names]
    return names


def _plain_folder(root, split):  # images alone; annotations that lie there are never left out in silence
    part, known = root / split, image_suffixes()
    noted, there = None, files_under(root)
    if part.is_dir():
        others = {f.parts[0] for f in there if f.suffix.lower() in known}  # folders, and images beside them
        strange = sorted(d for d in others if d.lower() not in _SPLITS)
        if strange:
            item = f"{part.name}/ lies beside {', '.join(strange[:3])} and is not taken for a split"
            noted = Fault(
                'warning', 'folder-like-split', str(root), item, f'for this folder alone give {part}'
            )
        else:
            root, there = part, files_under(part)
            if any(root.glob('*.xml')) and _is_voc(root):
                return read_voc(root, 'train')
    shards = [root / f for f in there if f.suffix.lower() == '.tar']
    if shards and not any(f.suffix.lower() in known for f in there):
        return _shard_source(shards, str(root))
    source = read_folder(root, there)
    source.faults += [noted] if noted else []
    stems = {os.path.splitext(im['file_name'])[0] for im in source.data['images']}
    beside = [f for f in there if f.suffix.lower() in ('.xml', '.json', '.txt')]
    twins = [f for f in beside if f.with_suffix('').as_posix() in stems]
    if twins:
        item = f'{len(twins)} annotation files beside the images are not read, such as {twins[0]}'
        cure = 'for YOLO add data.yaml or classes.txt; for others export COCO or VOC'
        source.faults.append(Fault('warning', 'annotations-beside', str(root), item, cure))
    return source


# %%
#| export
def read_source(
    spec,  # path or name, as for `open_dataset`
    split: str = 'train',  # 'train', 'val', 'test', ...
    data_root=None,  # where names are looked up; None: $SEMIDETR_DATA
    images=None,  # folder of the images of a COCO file; None or '': look in the usual places
) -> Source:
    "Detect the format and read the annotations; they may still hold faults"
    if shards := _shard_files(str(spec), data_root):
        _coco_alone(spec, images)
        return _shard_source(shards, str(spec))
    root = _locate(str(spec), data_root)
    if root.is_file():
        return _read_file(root, split, images or None)
    if f := _json_of(root, split):
        return read_coco(f, images or None)
    if there := _splits_in(root):
        cure = f'; give one of these files instead of the folder, such as {root / there[0]}'
        found = ', '.join(there[:6])
        raise MissingSplit(f"{root}: no annotation file for the split '{split}'; found {found}{cure}")
    _coco_alone(root, images)
    if f := yolo_file(root):
        if f.suffix in ('.yaml', '.yml') or any(
            g.suffix == '.txt' and g.name != f.name for g in files_under(root)
        ):
            return read_yolo(root, split)
    xmls = voc_folders(root)[0]
    if xmls.is_dir() and any(xmls.glob('*.xml')) and _is_voc(xmls):
        return read_voc(root, split)
    if (root / 'Annotations').is_dir() and (root / 'JPEGImages').is_dir():
        return read_voc(root, split)
    return _plain_folder(root, split)


# %%
assert _split_of(Path('rf/valid')) == 'val' and _no_coco(Path('list.txt'))
_split_of(Path('rf/valid'))

# %% [markdown]
# ## Parsed once
#
# A command opens the training images several times: to choose settings, to divide them, to look for a test
# split. Parsing is most of the time that this takes, so the last few COCO files are kept as they were opened.
# An entry counts as long as the file and the folders of its images have the same time, size and place; entries
# whose files were written in the last two seconds are not kept, since a change within a tick of the clock of
# the disk would not be seen. A file about which there is something to say is read again, and so is one without
# sizes. Between commands, large files are kept as columns on the disk (@sec-columns), by their content.

# %%
#| export
_KEPT, _MOST = {}, 4  # (file, folder of images) -> (stamps, data set)


def _stamps(places):  # time, size and place on the disk of files and folders
    out = {}
    for p in places:
        s = os.stat(p)
        out[str(p)] = s.st_mtime_ns, s.st_size, s.st_ino, s.st_dev
    return out


def _parsed(path, images):  # a COCO file as a data set, from memory where nothing has changed
    key = str(Path(path).absolute()), str(Path(images).absolute()) if images else ''
    with contextlib.suppress(OSError, KeyError):
        stamps, ds = _KEPT[key]
        if _stamps(stamps) == stamps:
            _KEPT[key] = _KEPT.pop(key)  # the last one used is the last one dropped
            return copy.copy(ds)
    _KEPT.pop(key, None)
    with contextlib.suppress(OSError):
        before = _stamps([path])
        source = read_coco_columns(path, images) or read_coco(path, images)
        ds = FileDataset(source)
        folders = {os.path.dirname(f) for f in ds.files}
        stamps = before | _stamps([ds.folder, *(os.path.join(ds.folder, d) for d in folders)])
        newest = max(time for time, *_ in stamps.values())
        sized = source.columns or all(map(declared_size, coco_entries(source.data, 'images')))
        if sized and not source.faults and time_ns() - newest > 2e9:
            _KEPT[key] = stamps, ds
            while len(_KEPT) > _MOST:
                del _KEPT[next(iter(_KEPT))]
            return copy.copy(ds)
        return ds
    return FileDataset(read_coco(path, images))


def _coco_of(root, split):  # the COCO file that a path means, or None
    if root.is_file():
        return None if root.suffix.lower() in ('.yaml', '.yml') else root
    return _json_of(root, split)


# %%
#| export
def open_dataset(
    spec: str,  # 'digits', 'digits:n=2000,size=96', a folder, an annotation file, or a name in $SEMIDETR_DATA
    split: str = 'train',  # 'train', 'val', 'test', ...
    data_root=None,  # where names are looked up; None: $SEMIDETR_DATA
    images=None,  # folder of the images of a COCO file; None or '': look in the usual places
) -> DetectionDataset:
    "Open a data set whatever its format; DataError says what was looked for, and where"
    if str(spec).partition(':')[0] == 'digits' and not Path(spec).exists():
        _coco_alone(spec, images)
        return _digits(spec, split)
    if shard_range(str(spec)) is None:
        path = _coco_of(_locate(str(spec), data_root), split)
        if path and not _no_coco(path):
            return _parsed(path, images or None)
    source = read_source(spec, split, data_root, images)
    return source.folder if isinstance(source.folder, ShardImages) else FileDataset(source)


def open_further(
    spec: str,  # as for `open_dataset`
    split: str = 'train',  # 'train', 'val', 'test', ...
    images='',  # folder of the images of another COCO file
) -> DetectionDataset:
    "A data set that belongs to another one: its images are in the usual places, or else in the same folder"
    try:
        return open_dataset(spec, split)
    except DataError:
        with contextlib.suppress(DataError):
            if images:
                return open_dataset(spec, split, images=images)
        raise


# %% [markdown]
# Two images and a COCO file are opened by a path, by a name in the folder of data sets, and as plain images:

# %%
root = Path(tempfile.mkdtemp()) / 'toy'
(root / 'images').mkdir(parents=True)
for file in ('a.png', 'b.png'):
    canvas = Image.new('RGB', (60, 40), (190, 200, 210))
    canvas.paste((60, 60, 120), (5, 5, 25, 30))
    canvas.save(root / 'images' / file)
objects = dict(
    images=[dict(id=n, file_name=f, width=60, height=40) for n, f in ((1, 'a.png'), (2, 'b.png'))],
    categories=[dict(id=1, name='dog')],
    annotations=[dict(id=1, image_id=1, category_id=1, bbox=[5, 5, 20, 25])],
)
(root / 'instances_train.json').write_text(json.dumps(objects))
for place in (root / 'images', root / 'instances_train.json'):
    os.utime(place, (10**9, 10**9))  # as if they were written long ago, so that the parsed file is kept
toy = open_dataset(root)
assert open_dataset(root)._packed['boxes'] is toy._packed['boxes']
assert open_dataset('toy', data_root=root.parent).fingerprint() == toy.fingerprint()
assert len(open_dataset(root / 'images')) == 2
toy

# %% [markdown]
# If nothing can be opened, the message says what was looked for, and suggests the name that was probably
# meant:

# %%
refusals = []
for spec, split in (('tyo', 'train'), ('toy', 'val'), ('digits:sice=64', 'train')):
    try:
        open_dataset(spec, split, data_root=root.parent)
    except DataError as e:
        refusals.append(str(e).replace(f'{root.parent}', 'DATA').replace(str(Path.cwd()), 'HERE'))
assert len(refusals) == 3
assert "did you mean 'toy'" in refusals[0] and 'found instances_train.json' in refusals[1]
print(*refusals, sep='\n')

# %%
#| label: fig-catalog-same
#| fig-cap: "A COCO file, its unlabelled counterpart and the built-in scenes follow the same protocol; the unlabelled one has no boxes."
#| fig-alt: "Four small images: one with a green box, the same without a box, and two photographs with coloured digits in boxes."
digits = open_dataset('digits:n=2')
shown = [toy[0], Unlabelled(toy)[0], digits[0], digits[1]]
titles = ['toy', 'Unlabelled(toy)', 'digits', 'digits']
image_grid([s.image for s in shown], [s.boxes for s in shown], titles=titles)

# %% [markdown]
# ## Summary
#
# * `open_dataset` takes a path or a name and detects the format.
# * If a split is missing, the error lists the splits that are there.
# * `read_source` does not check the content, so that @sec-doctor can list every fault instead of the first.
#
# ## Exercises
#
# 1. A folder holds both `data.yaml` and `instances_train.json`. Which is read, and which would you expect?
# 2. Add a CSV format: which function has to be written, and where does its line go?
