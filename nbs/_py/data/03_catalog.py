# %% [markdown]
# # One word opens them all {#sec-catalog}
#
# > Open any data set by its path or its name, whatever its layout, and be told what was looked for where
# > there is none.

# %%
#| default_exp data.catalog

# %% [markdown]
# People keep boxes in COCO files, Pascal VOC folders and YOLO folders, and unlabelled images in no format at
# all. A command that asks for the format asks for what it could see for itself. `open_dataset` looks, in this
# order: COCO files (`instances_train.json`, `annotations/instances_train2017.json`,
# `train/_annotations.coco.json`), YOLO's `data.yaml`, VOC's `Annotations/`, and last the images themselves. A
# folder that holds the annotations of *another* split is never mistaken for a folder of bare images: the
# images of a validation set without its boxes would look like unlabelled ones, and nobody would notice.
#
# This is the only place that knows all formats and the built-in scenes (@sec-digits) at once. Whoever adds a
# format adds a reader (@sec-records) and one line here.

# %%
#| export
import os
from pathlib import Path
from semidetr.core import DataError, suggest
from semidetr.data.datasets import DetectionDataset, FileDataset
from semidetr.data.digits import DigitsScenes
from semidetr.data.files import Source, read_coco, read_folder, read_voc, read_yolo

# %%
import json
import tempfile
import matplotlib.pyplot as plt
from PIL import Image
from semidetr.data.datasets import Unlabelled
from semidetr.draw import image_grid

# %%
#| export
_ALIAS = {
    'val': ('val', 'valid', 'validation'),
    'train': ('train',),
    'test': ('test',),
    'unlabeled': ('unlabeled', 'unlabelled'),
}


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
        for f in [
            *(root / n for n in names),
            *(root / 'annotations' / n for n in names),
            root / s / '_annotations.coco.json',
        ]:
            if f.is_file():
                return f


def _splits_in(root):  # split files that are there, for the error message
    found = [
        *root.glob('instances_*.json'),
        *root.glob('annotations/*.json'),
        *root.glob('*/_annotations.coco.json'),
    ]
    return sorted(f.relative_to(root).as_posix() for f in found)


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
    roots = (
        [data_root] if data_root else [os.environ['SEMIDETR_DATA']] if os.environ.get('SEMIDETR_DATA') else []
    )
    for p in (Path(spec), *(Path(r) / spec for r in roots)):
        if p.exists():
            return p
    looked = ' and '.join([str(Path(spec).absolute()), *(str(Path(r) / spec) for r in roots)])
    cure = '' if roots else ' SEMIDETR_DATA is not set: let it name the folder that holds your data sets, or'
    near = [p.name for r in roots if Path(r).is_dir() for p in Path(r).iterdir() if p.is_dir()]
    raise DataError(
        f"data set '{spec}': nothing at {looked};{cure} give a folder, an annotation file or 'digits'"
        + (f' ({suggest(spec, near)})' if near else '')
    )


def read_source(
    spec,  # path or name, as for `open_dataset`
    split: str = 'train',
    data_root=None,  # where names are looked up; None: $SEMIDETR_DATA
) -> Source:
    "Find out the format and read the annotations; they may still hold faults"
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
    spec: str,  # 'digits', 'digits:n=2000,size=96', a folder, an annotation file, or a name under $SEMIDETR_DATA
    split: str = 'train',  # 'train', 'val', 'test', ...
    data_root=None,  # where names are looked up; None: $SEMIDETR_DATA
) -> DetectionDataset:
    "Open a data set whatever its format; DataError says what was looked for, and where"
    if str(spec).partition(':')[0] == 'digits' and not Path(spec).exists():
        return _digits(spec, split)
    return FileDataset(read_source(spec, split, data_root))


# %% [markdown]
# Three images and a COCO file are opened by a path, by a name in the folder of data sets, and as bare images:

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
    categories=[dict(id=90, name='zebra'), dict(id=18, name='dog')],
    annotations=[
        dict(id=1, image_id=7, category_id=18, bbox=[5, 5, 20, 25]),
        dict(id=2, image_id=7, category_id=90, bbox=[40, 20, 14, 10]),
    ],
)
(root / 'instances_train.json').write_text(json.dumps(truth))
toy = open_dataset(root)
assert open_dataset('toy', data_root=root.parent).fingerprint() == toy.fingerprint()
assert len(open_dataset(root / 'images')) == 3
toy

# %% [markdown]
# What cannot be opened is answered by what was looked for, or by the word that was meant:

# %%
refusals = []
for spec, split in (('tyo', 'train'), ('toy', 'val'), ('digits:sice=64', 'train')):
    try:
        open_dataset(spec, split, data_root=root.parent)
    except DataError as e:
        refusals.append(str(e).replace(f'{root.parent}', 'DATA').replace(str(Path.cwd()), 'HERE'))
assert (
    len(refusals) == 3 and "did you mean 'toy'" in refusals[0] and 'found instances_train.json' in refusals[1]
)
print(*refusals, sep='\n')

# %%
#| label: fig-catalog-same
#| fig-cap: "A COCO file, its unlabelled twin and the built-in scenes answer to the same protocol; only the boxes differ."
#| fig-alt: "Four small images: one with two green boxes, the same without boxes, and two photographs with coloured digits in boxes."
digits = open_dataset('digits:n=2')
shown = [toy[0], Unlabelled(toy)[0], digits[0], digits[1]]
fig = image_grid(
    [s.image for s in shown],
    [s.boxes for s in shown],
    titles=['toy', 'Unlabelled(toy)', 'digits', 'digits'],
    ncols=4,
)
fig

# %% [markdown]
# ## Summary
#
# * `open_dataset` takes a path or a name and finds the format.
# * A split that is not there is an error that lists the splits that are.
# * `read_source` stops before the checks, so that @sec-doctor can list every fault instead of the first.
#
# ## Exercises
#
# 1. A folder holds both `data.yaml` and `instances_train.json`. Which is read, and which would you want?
# 2. Add a CSV format: which function has to be written, and where does its line go?
