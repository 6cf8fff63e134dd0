# %% [markdown]
# # The doctor {#sec-doctor}
#
# > Find all faults of a data set in one pass, with file, item and cure.

# %%
#| default_exp data.doctor

# %% [markdown]
# Faults of a data set are expensive if they are found one at a time: fix one, start again, find the next. The
# doctor runs all checks (@sec-records, @sec-checks) once and stops at nothing.
#
# *Error* means that loading would refuse the data, or that a result would be worthless. The exit code of the
# command is 2 if there is an error, else 0. A set without any box to learn from has no error, since its
# images may serve as unlabelled ones; training on it alone is refused, and the last line of the report says
# so.

# %%
#| export
import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from PIL import Image, ImageDraw
from semidetr.core import DataError, MissingSplit, printable, stable_hash
from semidetr.data.catalog import open_dataset, read_source
from semidetr.data.checks import (
    check_images,
    content_faults,
    copy_faults,
    faults_between,
    lists_images,
    split_faults,
    statistics,
)
from semidetr.data.datasets import DetectionDataset, FileDataset
from semidetr.data.files import Fault, Source, coco_entries, coco_faults, declared_size
from semidetr.draw import draw_on_image

# %% [markdown]
# ## The report

# %%
#| export
_LEVELS = ('error', 'warning', 'info')


@dataclass
class Report:
    "What the doctor found"

    name: str  # of the data set
    where: str  # annotation file or folder
    counts: dict = field(default_factory=dict)  # images, boxes, ignored, without boxes, decoded ...
    histogram: dict = field(default_factory=dict)  # class -> boxes that are not to be ignored
    box_sizes: dict = field(default_factory=dict)  # quantile -> square root of the area, pixels
    faults: list[Fault] = field(default_factory=list)
    compared: dict = field(default_factory=dict)  # further data set -> its images

    def of(
        self,
        level: str = None,  # 'error', 'warning', 'info'; None: any
        kind: str = None,  # None: any
    ) -> list[Fault]:
        "Faults of one level or kind"
        return [f for f in self.faults if level in (None, f.level) and kind in (None, f.kind)]

    @property
    def errors(self) -> list[Fault]:
        return self.of('error')

    @property
    def exit_code(self) -> int:  # 2: there are errors; 0: there are none, perhaps warnings
        return 2 if self.errors else 0

    @property
    def verdict(self) -> str:
        "What the set can be used for; `box_sizes` leaves out boxes without area and those to be ignored"
        if self.errors:
            return 'not fit for training'
        return 'fit for training' if self.box_sizes else 'fit as unlabelled data only, no box to learn from'

    def to_json(self) -> str:
        "Everything, for programs"
        kinds = {level: Counter(f.kind for f in self.of(level)) for level in _LEVELS}
        summary = dict(verdict=self.verdict, exit_code=self.exit_code, kinds=kinds)
        return json.dumps(asdict(self) | summary, indent=1)

    def to_text(
        self,
        most: int = 3,  # faults shown of each kind; the rest is counted
    ) -> str:
        "Everything, for people: numbers first, then the faults, worst first"
        lines = [f'{self.name} ({self.where})', *_number_lines(self), *_fault_lines(self, most)]
        return '\n'.join(map(printable, lines))

    __str__ = to_text

# %%
#| export


def _number_lines(r):
    if r.counts:
        yield '  ' + ', '.join(f'{v:,} {k}' for k, v in r.counts.items())
    if r.box_sizes:
        sizes = ', '.join(f'{k} {v:.0f}' for k, v in r.box_sizes.items())
        yield f'  box size (square root of the area, px): {sizes}'
    top = max(r.histogram.values(), default=0)
    rows = sorted(r.histogram.items(), key=lambda kv: -kv[1])
    for name, n in rows[:20]:
        yield f"  {name[:24]:<24} {n:>8,} {'#' * math.ceil(40 * n / top) if top else ''}"
    if len(rows) > 20:
        yield f'  ... and {len(rows) - 20} classes more, {sum(n for _, n in rows[20:]):,} boxes'
    if others := ', '.join(f'{name} ({n:,} images)' for name, n in r.compared.items()):
        yield f'examined and compared with: {others}'


def _fault_lines(r, most):
    totals = []
    for level, word in zip(_LEVELS, ('error', 'warning', 'note')):
        faults = r.of(level)
        totals.append(f"{len(faults):,} {word}{'s' * (len(faults) != 1)}")
        for kind, n in Counter(f.kind for f in faults).most_common():
            yield f'{level}: {kind} ({n:,})'
            yield from (f'    {f}' for f in r.of(level, kind)[:most])
            if n > most:
                yield f'    ... and {n - most:,} more'
    yield f'{r.verdict}: ' + ', '.join(totals)


# %%
empty_box = 'annotation 4: box [9, 9, 0, 4] has no area and is dropped'
faults = [Fault('warning', 'zero-area', 'toy.json', empty_box, 'delete the annotation')]
for n in range(5):
    faults.append(Fault('error', 'missing-image', f'{n}.jpg', f'image {n}: no such file', 'restore it'))
made_up = Report('toy', 'toy.json', dict(images=3), dict(dog=30, cat=10), {'median': 31.0}, faults)
assert made_up.exit_code == 2 and len(made_up.of('error')) == 5
print(made_up.to_text(most=2))

# %% [markdown]
# ## A toy set
#
# Four images, of which one is truncated, one a copy and one missing; boxes with errors; a validation set that
# contains one of the training images; and a split whose parts overlap.

# %%
import tempfile
import matplotlib.pyplot as plt
from semidetr.draw import show_image

# %%
root = Path(tempfile.mkdtemp()) / 'sick'
(root / 'images').mkdir(parents=True)
scenes = open_dataset('digits:n=6,size=96')
for name, n in (('a.png', 0), ('b.jpg', 1), ('copy.png', 0), ('val.png', 2), ('leak.png', 0)):
    scenes[n].image.save(root / 'images' / name)
broken = (root / 'images' / 'b.jpg').read_bytes()
(root / 'images' / 'b.jpg').write_bytes(broken[: len(broken) // 2])  # the disk was full
entry = lambda n, file: dict(id=n, file_name=file, width=96, height=96)
train = dict(
    images=[entry(1, 'a.png'), entry(2, 'b.jpg'), entry(3, 'copy.png'), entry(4, 'gone.png')],
    categories=[dict(id=1, name='digit'), dict(id=2, name='letter')],
    annotations=[
        dict(id=1, image_id=1, category_id=1, bbox=[42, 18, 24, 32]),
        dict(id=2, image_id=2, category_id=3, bbox=[5, 5, 9, 9]),
        dict(id=3, image_id=3, category_id=1, bbox=[30, 30, -9, 9]),
        dict(id=4, image_id=1, category_id=1, bbox=[27, 50, 16, 27]),
    ],
)
val = dict(
    images=[entry(1, 'val.png'), entry(2, 'leak.png')],
    categories=train['categories'],
    annotations=[dict(id=1, image_id=1, category_id=2, bbox=[3, 3, 20, 20])],
)
for part, content in (('train', train), ('val', val)):
    (root / f'instances_{part}.json').write_text(json.dumps(content))
overlapping = dict(semidetr_split=1, labelled=[1, 2], unlabelled=[2, 4], dev=[3, 9])
(root / 'split.json').write_text(json.dumps(overlapping))
sorted(f.relative_to(root).as_posix() for f in root.rglob('*.*'))


# %% [markdown]
# ## All together

# %%
#| export
def _dataset_source(ds):  # a data set as a Source again
    data = ds.coco_dict()
    if not ds.has_boxes:
        del data['annotations']
    if not isinstance(ds, FileDataset):
        return Source(ds.name, ds.name, data, ds)
    for im, file in zip(data['images'], ds.files):
        im['file_name'] = file
    return Source(ds.name, ds.where, data, ds.folder)


def _open_source(spec, split, data_root, images=None):  # path, name or data set -> Source
    if isinstance(spec, DetectionDataset):
        return _dataset_source(spec)
    if str(spec).partition(':')[0] == 'digits' and not Path(str(spec)).exists():
        return _dataset_source(open_dataset(spec, split, images=images))
    source = read_source(spec, split, data_root, images)
    generated = isinstance(source.folder, DetectionDataset)
    listed = Path(source.where).is_file() and not generated and lists_images(source)
    if listed and 'annotations' not in source.data:
        item = "there is no list 'annotations'"  # left out on purpose, or lost in an export
        cure = 'fit as unlabelled data; to learn from it, export it with its boxes'
        source.faults.append(Fault('warning', 'missing-annotations', source.where, item, cure))
    return source


def _as_source(spec, split, data_root, images=None):  # the same; an error becomes a fault
    try:
        return spec if isinstance(spec, Source) else _open_source(spec, split, data_root, images)
    except DataError as e:
        return _unopened(e, spec)


def _unopened(e, spec):  # a Source whose only fault is that it cannot be opened
    what, _, cure = str(e).rpartition('; ')
    item = (what or str(e)).removeprefix(f'{spec}: ')
    fault = Fault('error', 'cannot-open', str(spec), item, cure if what else 'see above')
    return Source(str(spec), str(spec), None, faults=[fault])


# %%
#| export
def _further_source(spec, split, data_root, images):  # usual places first, then the folder of the first one
    source = _open_source(spec, split, data_root)
    if images and any(f.kind == 'missing-image-folder' for f in source.faults):
        return _open_source(spec, split, data_root, images)
    return source


def _splits(spec, known, names, data_root, images=None):  # further splits of a data set on disk
    out = []
    of_file = Path(spec).suffix.lower() == '.json' if isinstance(spec, str | Path) else True
    for s in () if of_file else names:  # a COCO file has no other splits
        try:
            o = _further_source(spec, s, data_root, images)
        except MissingSplit:
            continue
        except DataError as e:
            o = _unopened(e, f'{spec}: {s}')
        if (o.name, o.where) not in {(x.name, x.where) for x in (*known, *out)}:
            out.append(o)
    return out


def _others(spec, other, source, split, data_root, images=None):  # (own splits, splits of the other sets)
    own, given = [], []
    if split == 'train' and source.data is not None:
        own = _splits(spec, [source], ('val', 'test'), data_root, images)
        own = [o for o in own if o.name != source.name]
    for o in other if isinstance(other, list | tuple) else [other] if other is not None else []:
        first = _as_source(o, 'val', data_root)
        more = _splits(o, [first], ('train', 'test'), data_root) if first.data is not None else []
        given += [first, *(s for s in more if s.name != first.name)]
    return own, given


# %%
#| export
def _examine(source, report, quick, threads, progress):  # adds the faults of one set; -> its content keys
    report.faults += source.faults
    if source.data is None:
        return {}
    report.faults += coco_faults(source.data, source.where)
    counts, histogram, sizes = statistics(source.data)
    report.faults += content_faults(source, counts, histogram)
    if not report.counts:
        report.counts, report.histogram, report.box_sizes = counts, histogram, sizes
    if any(f.kind in ('schema', 'missing-image-folder') and f.where == source.where for f in report.faults):
        return {}
    keys, faults = check_images(source, quick, threads, progress)
    report.faults += faults
    report.faults += copy_faults(source, keys)
    return keys


# %%
#| export
def _may_drop(source, report):  # can a box lose its area where it is clipped?
    if any(f.kind in ('zero-area', 'overhang', 'tiny-box') for f in report.faults):
        return True
    return not all(map(declared_size, coco_entries(source.data, 'images')))


def check_dataset(
    spec,  # path or name as for `open_dataset`, or a data set
    other=None,  # one or several more that must not overlap with it or with its val and test splits
    split_files=(),  # files from `save_split` made for it
    split: str = 'train',  # of `spec`
    quick: bool = False,  # headers only: no decoding, no search for equal images
    data_root=None,  # where names are looked up; None: $SEMIDETR_DATA
    threads: int = 4,  # image decoders
    progress: bool | None = None,  # bar; None: on a terminal
    images=None,  # folder of the images of a COCO file; None: look in the usual places
) -> Report:
    "Examine a data set and do not stop at the first fault"
    source = _as_source(spec, split, data_root, images)
    report = Report(source.name, source.where)
    keys = _examine(source, report, quick, threads, progress)
    own, given = _others(spec, other, source, split, data_root, images)
    first = [(source, keys)]  # sets that the others must not overlap with
    for n, o in enumerate([*own, *given]):
        other_keys = _examine(o, report, quick, threads, progress)
        if o.data is not None:
            report.compared[o.name] = len(coco_entries(o.data, 'images'))
        for s, s_keys in first if n >= len(own) else first[:1]:
            if lists_images(s) and lists_images(o):
                report.faults += faults_between(s, o, s_keys, other_keys)
        first += [(o, other_keys)] if n < len(own) else []
    fingerprint = None
    generated = isinstance(source.folder, DetectionDataset)
    if not report.errors and not generated and (split_files or _may_drop(source, report)):
        ds = FileDataset(source)
        fingerprint = ds.fingerprint() if split_files else None
        if ds.dropped:
            report.counts['boxes without area, dropped'] = ds.dropped
    ids = [im.get('id') for im in coco_entries(source.data, 'images')]
    if isinstance(split_files, str | Path):
        split_files = [split_files]
    for f in split_files:
        report.faults += split_faults(f, ids, keys, fingerprint)
    return report


# %%
report = check_dataset(root, split_files=root / 'split.json', progress=False)
expected = 'unknown-class negative-box unreadable-image missing-image '
expected += 'shared-image split-overlap unknown-split-id'
assert {f.kind for f in report.errors} == set(expected.split()) and report.exit_code == 2
print(report.to_text().replace(f'{root}/', ''))

# %% [markdown]
# The built-in scenes have no fault, and their splits share no image:

# %%
healthy = check_dataset(scenes, other=open_dataset('digits:n=6', 'val'))
assert healthy.exit_code == 0 and not healthy.of(kind='shared-image')
assert healthy.verdict == 'fit for training'
json.loads(healthy.to_json())['kinds']

# %% [markdown]
# A set that lost its boxes in an export, or never had any, can still be used:

# %%
(root / 'bare.json').write_text(json.dumps(dict(images=[entry(1, 'val.png')], categories=[])))
bare = check_dataset(root / 'bare.json', progress=False)
assert bare.exit_code == 0 and [f.kind for f in bare.faults] == ['missing-annotations']
print(bare.to_text().replace(f'{root}/', ''))


# %% [markdown]
# ## What only a person can see
#
# No rule notices that a label is wrong, or that all boxes are ten pixels too far to the left. A page of
# images shows it in ten seconds. The tile of an image that cannot be decoded says so.

# %%
#| export
def _tile(ds, i, cell):  # one cell of the contact sheet
    tile = Image.new('RGB', (cell, cell), (235, 235, 235))
    try:
        s = ds[i]
    except DataError:
        ImageDraw.Draw(tile).text((6, cell // 2), f'cannot read\n{ds.ids[i]}', fill=(180, 0, 0))
        return tile
    k = (cell - 4) / max(s.size)
    size = max(1, round(s.image.width * k)), max(1, round(s.image.height * k))
    img = s.image.resize(size, Image.Resampling.BILINEAR if k > 1 else Image.Resampling.BOX)
    for kind, rows in (('truth', ~s.ignore), ('mined', s.ignore)):
        if rows.any():
            boxes, labels = s.boxes[rows] * k, s.labels[rows]
            img = draw_on_image(img, boxes, labels, classes=ds.classes, kind=kind, width=1)
    tile.paste(img, ((cell - img.width) // 2, (cell - img.height) // 2))
    return tile


def contact_sheet(
    ds,  # data set, or its path or name
    n: int = 12,  # images, chosen by hash
    ncols: int = 4,  # images per row
    cell: int = 220,  # side of a cell in pixels
    seed: int = 0,  # another seed, other images
) -> Image.Image:  # RGB
    "A page of images with their boxes, to be checked by eye; boxes to be ignored are dashed"
    if not isinstance(ds, DetectionDataset):
        ds = open_dataset(ds)
    by_hash = sorted(range(len(ds)), key=lambda i: stable_hash('contact', seed, ds.ids[i]))
    chosen = sorted(by_hash[:n])
    ncols = max(1, min(ncols, len(chosen)))
    sheet = Image.new('RGB', (ncols * cell, -(-len(chosen) // ncols) * cell), (255, 255, 255))
    for k, i in enumerate(chosen):
        sheet.paste(_tile(ds, i, cell), (k % ncols * cell, k // ncols * cell))
    return sheet


# %%
#| label: fig-doctor-sheet
#| fig-cap: "A contact sheet shows at a glance whether the boxes are where the objects are."
#| fig-alt: "Six photographs with coloured handwritten digits; a green box with the name of the class around each digit."
sheet = contact_sheet(scenes, n=6, ncols=6, cell=150)
assert sheet.size == (900, 150)
fig, ax = plt.subplots(figsize=(6, 1.1), dpi=100)
show_image(ax, sheet)
plt.show()

# %% [markdown]
# ## Summary
#
# * `check_dataset` finds all faults in one pass: annotations, files, classes, copies, leaks between sets and
#   splits.
# * Errors are what loading would refuse or what would invalidate a result; then the exit code is 2. A set
#   without boxes is fit as unlabelled data only.
# * `to_text` is for people, `to_json` for programs; `quick` reads headers only.
# * A contact sheet shows what no rule can find.
#
# ## Exercises
#
# 1. Run the doctor on the toy set of this chapter with `quick=True`. Which faults does it miss?
# 2. A class of the training set has no box in the validation set. Which fault is reported, and what does it
#    mean for the mean AP?
# 3. Five percent of the boxes of a data set are misplaced. How many images with three boxes each must a
#    contact sheet show, to contain a misplaced box with a probability of 95 %?
