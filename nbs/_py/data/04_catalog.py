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
import os
from pathlib import Path
from semidetr.core import DataError, suggest
from semidetr.data.datasets import DetectionDataset, FileDataset
from semidetr.data.digits import DigitsScenes
from semidetr.data.files import Source, read_folder
from semidetr.data.formats import read_coco, read_voc, read_yolo

# %%
import json
import tempfile
from PIL import Image
from semidetr.data.datasets import Unlabelled
from semidetr.draw import image_grid

# %%
#| export
_ALIAS = {'val': ('val', 'valid', 'validation'), 'unlabeled': ('unlabeled', 'unlabelled')}


def _json_of(root, split):  # COCO file of one split in one of the common layouts, or None
    for s in _ALIAS.get(split, (split,)):
        names = [
            f'instances_{s}.json',
            f'instances_{s}2017.json',
            f'instances_{s}2014.json',
            f'{s}.json',
            f'image_info_{s}.json',
            f'image_info_{s}2017.json',
        ]
        places = [folder / n for folder in (root, root / 'annotations') for n in names]
        for f in [*places, root / s / '_annotations.coco.json']:
            if f.is_file():
                return f


def _splits_in(root):  # COCO files that are there, for the error message
    patterns = ('instances_*.json', 'annotations/*.json', '*/_annotations.coco.json')
    return sorted(f.relative_to(root).as_posix() for p in patterns for f in root.glob(p))


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


def read_source(
    spec,  # path or name, as for `open_dataset`
    split: str = 'train',  # 'train', 'val', 'test', ...
    data_root=None,  # where names are looked up; None: $SEMIDETR_DATA
) -> Source:
    "Detect the format and read the annotations; they may still hold faults"
    root = _locate(str(spec), data_root)
    if root.is_file():
        return read_coco(root)
    if f := _json_of(root, split):
        return read_coco(f)
    if there := _splits_in(root):
        raise DataError(f"{root}: no annotation file for the split '{split}'; found {', '.join(there[:6])}")
    if any((root / n).is_file() for n in ('data.yaml', 'data.yml', 'dataset.yaml')):
        return read_yolo(root, split)
    if (root / 'Annotations').is_dir() and (root / 'JPEGImages').is_dir():
        return read_voc(root, split)
    return read_folder(root / split if (root / split).is_dir() else root)


def open_dataset(
    spec: str,  # 'digits', 'digits:n=2000,size=96', a folder, an annotation file, or a name in $SEMIDETR_DATA
    split: str = 'train',  # 'train', 'val', 'test', ...
    data_root=None,  # where names are looked up; None: $SEMIDETR_DATA
) -> DetectionDataset:
    "Open a data set whatever its format; DataError says what was looked for, and where"
    if str(spec).partition(':')[0] == 'digits' and not Path(spec).exists():
        return _digits(spec, split)
    return FileDataset(read_source(spec, split, data_root))


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
    images=[dict(id=1, file_name='a.png'), dict(id=2, file_name='b.png')],
    categories=[dict(id=1, name='dog')],
    annotations=[dict(id=1, image_id=1, category_id=1, bbox=[5, 5, 20, 25])],
)
(root / 'instances_train.json').write_text(json.dumps(objects))
toy = open_dataset(root)
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
