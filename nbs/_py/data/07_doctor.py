# %% [markdown]
# # The doctor {#sec-doctor}
#
# > Find every fault of a data set in one pass, with file, item and cure, before a training run finds the
# > first.

# %%
#| default_exp data.doctor

# %% [markdown]
# The dear faults of a data set are found one at a time: fix one, start again, find the next. The dearest are
# not found at all. A validation image that also lies among the labelled ones raises every score. A class that
# the unlabelled set does not share makes its pseudo labels wrong.
#
# The doctor looks at everything once and stops at nothing. *Error* means what it means in @sec-records:
# loading would refuse it, or a result would be worthless. The exit code of the command is 2 if there is one,
# else 0. A set without any box to learn from has no error, since its images may serve as unlabelled ones;
# training on it alone is refused, and the last line of the report says so.
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
import json
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm
from semidetr.core import DataError, stable_hash
from semidetr.data.catalog import open_dataset, read_source
from semidetr.data.datasets import DetectionDataset, FileDataset
from semidetr.draw import draw_on_image
from semidetr.data.files import Fault, Source, coco_faults, image_orientation, load_image, read_size, reason

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
        return 2 if self.of('error') else 0

    @property
    def verdict(
        self,
    ) -> (
        str
    ):  # what the set is good for; `box_sizes` knows the boxes that have an area and are not to be ignored
        if self.errors:
            return 'not fit for training'
        return 'fit for training' if self.box_sizes else 'fit as unlabelled data only, no box to learn from'

    def to_json(self) -> str:
        "Everything, for a machine"
        kinds = {k: Counter(f.kind for f in self.of(k)) for k in _LEVELS}
        return json.dumps(
            asdict(self) | dict(verdict=self.verdict, exit_code=self.exit_code, kinds=kinds), indent=1
        )

    def to_text(
        self,
        most: int = 3,  # faults shown of each kind; the rest is counted
    ) -> str:
        "Everything, for a person: numbers first, then the faults, worst first"
        return '\n'.join([f'{self.name} ({self.where})', *_number_lines(self), *_fault_lines(self, most)])

    __str__ = to_text


# %%
#| export
def _number_lines(r):
    if r.counts:
        yield '  ' + ', '.join(f'{v:,} {k}' for k, v in r.counts.items())
    if r.box_sizes:
        yield '  box size (square root of the area, px): ' + ', '.join(
            f'{k} {v:.0f}' for k, v in r.box_sizes.items()
        )
    top = max(r.histogram.values(), default=0)
    rows = sorted(r.histogram.items(), key=lambda kv: -kv[1])
    for name, n in rows[:20]:
        yield f"  {name[:24]:<24} {n:>8,} {'#' * math.ceil(40 * n / top) if top else ''}"
    if len(rows) > 20:
        yield f'  ... and {len(rows) - 20} classes more, {sum(n for _, n in rows[20:]):,} boxes'


def _fault_lines(r, most):
    for level in _LEVELS:
        for kind, n in Counter(f.kind for f in r.of(level)).most_common():
            yield f'{level}: {kind} ({n:,})'
            yield from (f'    {f}' for f in r.of(level, kind)[:most])
            if n > most:
                yield f'    ... and {n - most:,} more'
    n = {k: len(r.of(k)) for k in _LEVELS}
    yield f'{r.verdict}: ' + ', '.join(
        f"{n[k]:,} {word}{'s' * (n[k] != 1)}" for k, word in zip(_LEVELS, ('error', 'warning', 'note'))
    )


# %%
made_up = Report(
    'toy',
    'toy.json',
    dict(images=3),
    dict(dog=30, cat=10),
    {'median': 31.0},
    [
        Fault(
            'warning',
            'zero-area',
            'toy.json',
            'annotation 4: box [9, 9, 0, 4] has no area and is dropped',
            'delete the annotation',
        ),
        *(
            Fault('error', 'missing-image', f'{n}.jpg', f'image {n}: no such file', 'restore it')
            for n in range(5)
        ),
    ],
)
assert made_up.exit_code == 2 and len(made_up.of('error')) == 5
print(made_up.to_text(most=2))


# %% [markdown]
# ## Numbers, and what they betray
#
# The counts must survive any file, so nothing is assumed of its entries. Some things are wrong in no single
# entry: a class that no box has, a box that stands there twice.

# %%
#| export
def _is_box(b):
    return isinstance(b, list | tuple) and len(b) == 4 and all(isinstance(v, int | float) for v in b)


def _statistics(data):  # COCO dict, perhaps faulty -> counts, histogram, box sizes
    rows = lambda k: (
        [x for x in data.get(k) or [] if isinstance(x, dict)]
        if isinstance(data, dict) and isinstance(data.get(k), list)
        else []
    )
    anns, names = rows('annotations'), {str(c.get('id')): str(c.get('name')) for c in rows('categories')}
    crowd = [bool(a.get('iscrowd') or a.get('ignore') or a.get('difficult')) for a in anns]
    seen = Counter(str(a.get('category_id')) for a, c in zip(anns, crowd) if not c)
    histogram = {name: seen.get(c, 0) for c, name in names.items()}
    boxes = [a['bbox'] for a, c in zip(anns, crowd) if not c and _is_box(a.get('bbox'))]
    side = [math.sqrt(b[2] * b[3]) for b in boxes if b[2] > 0 and b[3] > 0 and math.isfinite(b[2] * b[3])]
    sizes = (
        dict(
            zip(
                ('5 %', '25 %', 'median', '75 %', '95 %'),
                np.quantile(side, [0.05, 0.25, 0.5, 0.75, 0.95]).tolist(),
            )
        )
        if side
        else {}
    )
    filled = {str(a.get('image_id')) for a in anns}
    counts = {
        'images': len(rows('images')),
        'boxes': len(anns),
        'ignored boxes': sum(crowd),
        'classes': len(names),
        'images without a box': sum(str(im.get('id')) not in filled for im in rows('images')),
    }
    return counts, histogram, sizes


def _content_faults(data, where, counts, histogram):  # what is not wrong in any one entry, but worth knowing
    if not isinstance(data, dict) or not isinstance(data.get('images'), list):
        return
    if not data.get('annotations'):
        if 'annotations' in data:
            yield Fault(
                'warning',
                'no-annotations',
                where,
                'there is no annotation',
                'fit as unlabelled data; to learn from it, add boxes',
            )
        return
    empty = counts['images without a box']
    if empty:
        yield Fault(
            'info',
            'images-without-boxes',
            where,
            f'{empty:,} of {counts["images"]:,} images have no box',
            'fine if nothing is on them; otherwise their annotations are missing',
        )
    for name, n in histogram.items():
        if n == 0:
            yield Fault(
                'warning',
                'class-never-seen',
                where,
                f"class '{name}' has no box that counts",
                'its AP is undefined; delete the class or add examples',
            )
    ids = sorted(c['id'] for c in data['categories'] if isinstance(c, dict) and isinstance(c.get('id'), int))
    if ids and ids not in (list(range(len(ids))), list(range(1, len(ids) + 1))):
        yield Fault(
            'warning',
            'gaps-in-class-ids',
            where,
            f'{len(ids)} class ids between {ids[0]} and {ids[-1]}',
            'handled: labels are contiguous inside, `cat_ids` keeps the ids',
        )
    same = Counter(
        (str(a.get('image_id')), str(a.get('category_id')), str(a.get('bbox')))
        for a in data['annotations']
        if isinstance(a, dict)
    )
    for (image_id, cat, box), n in same.items():
        if n > 1:
            yield Fault(
                'warning',
                'repeated-box',
                where,
                f'image {image_id}: box {box} of class id {cat} stands there {n} times',
                'keep one',
            )


# %%
herd = dict(
    images=[dict(id=1, file_name='a.jpg'), dict(id=2, file_name='b.jpg')],
    categories=[dict(id=1, name='cow'), dict(id=7, name='yak')],
    annotations=[
        dict(id=1, image_id=1, category_id=1, bbox=[0, 0, 10, 40]),
        dict(id=2, image_id=1, category_id=1, bbox=[0, 0, 10, 40]),
    ],
)
counts, histogram, sizes = _statistics(herd)
notes = [f.kind for f in _content_faults(herd, 'herd.json', counts, histogram)]
assert histogram == {'cow': 2, 'yak': 0} and sizes['median'] == 20
assert notes == ['images-without-boxes', 'class-never-seen', 'gaps-in-class-ids', 'repeated-box']
counts, notes


# %% [markdown]
# ## Every image
#
# Decoding is the slow part; threads share it, since the decoders release Python's lock. `quick` reads headers
# only: it finds missing files and wrong sizes, not files that break off in the middle.

# %%
#| export
def _digest(img):
    return hashlib.blake2b(img.tobytes(), digest_size=12, key=repr(img.size).encode()).hexdigest()


def _size_fault(found, said, bad, path, where):
    if (
        said
        and tuple(found) != tuple(said)
        and not (image_orientation(path) != 1 and tuple(found) == tuple(said)[::-1])
    ):
        return bad(
            'error',
            'size-mismatch',
            f'is {found[0]}x{found[1]}, but {where} says {said[0]:g}x{said[1]:g} (height x width)',
            'its boxes would be wrong: correct the entry or restore the image',
        )
    if min(found) < 32:
        return bad(
            'warning', 'tiny-image', f'is {found[0]}x{found[1]}', 'too small for a detector; leave it out'
        )
    if image_orientation(path) != 1:
        return bad(
            'info',
            'exif-rotated',
            'carries an EXIF rotation',
            'handled: it is turned unless only the raw size agrees with the annotations; look at the contact sheet',
        )


def _look(job):  # one image file -> (content hash or None, fault or None)
    path, image_id, size, where, quick = job
    bad = lambda level, kind, what, cure: Fault(level, kind, str(path), f'image {image_id!r}: {what}', cure)
    try:
        if quick:
            return None, _size_fault(read_size(path), size, bad, path, where)
        img = load_image(path, size)
    except FileNotFoundError:
        return None, bad(
            'error', 'missing-image', 'no such file', f'restore it, or delete its entry from {where}'
        )
    except Exception as e:
        return None, bad(
            'error',
            'unreadable-image',
            f'cannot be decoded ({reason(e)})',
            f'restore it, or delete its entry from {where}',
        )
    return _digest(img), _size_fault((img.height, img.width), size, bad, path, where)


# %%
#| export
def _check_generated(source, quick):  # a data set that makes its images itself
    hashes, faults, ds = {}, [], source.folder
    for i, image_id in enumerate(ds.ids if not quick else []):
        try:
            hashes[str(image_id)] = _digest(ds[i].image)
        except DataError as e:
            faults.append(
                Fault('error', 'unreadable-image', source.where, f'image {image_id!r}: {e}', 'restore it')
            )
    return hashes, faults


def check_images(
    source: Source,  # images and where they are
    quick: bool = False,  # look at the headers only; no content hashes then
    threads: int = 4,  # decoders
    progress: bool | None = None,  # bar; None: on a terminal
) -> tuple[dict, list[Fault]]:  # image id -> content hash; faults
    "Open every image"
    if isinstance(source.folder, DetectionDataset):
        return _check_generated(source, quick)
    images = source.data.get('images') if isinstance(source.data, dict) else None
    images = (
        [im for im in images or [] if isinstance(im, dict) and isinstance(im.get('file_name'), str)]
        if isinstance(images, list)
        else []
    )
    size = lambda im: (
        (im['height'], im['width'])
        if all(isinstance(im.get(k), int | float) and im[k] > 0 for k in ('height', 'width'))
        else None
    )
    jobs = [
        (Path(source.folder) / im['file_name'], im.get('id'), size(im), source.where, quick) for im in images
    ]
    with ThreadPoolExecutor(threads) as pool:
        found = list(
            tqdm(
                pool.map(_look, jobs),
                total=len(jobs),
                desc=f'images of {source.name}',
                unit='img',
                disable=None if progress is None else not progress,
            )
        )
    hashes = {str(im.get('id')): h for im, (h, _) in zip(images, found) if h}
    return hashes, [f for _, f in found if f]


# %%
import tempfile
import matplotlib.pyplot as plt
from semidetr.draw import show_image

# %%
root = Path(tempfile.mkdtemp()) / 'ward'
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
hashes, broken_images = check_images(read_source(root))
assert sorted(hashes) == ['1', '3'] and hashes['1'] == hashes['3']
[(f.kind, f.item) for f in broken_images]


# %% [markdown]
# ## Between sets and splits
#
# Sets that are compared must share their classes and no image. Equal ids alone mean little, since many tools
# count from 1 in every file. The parts of a split file (@sec-splits) must be disjoint as well, by id and by
# content.

# %%
#| export
def _same_images(hashes, where):  # within one set
    first = {}
    for image_id, h in hashes.items():
        if h in first:
            yield Fault(
                'warning',
                'duplicate-image',
                where,
                f'image {image_id} is pixel for pixel image {first[h]}',
                'keep one: a copy in another split would leak',
            )
        first.setdefault(h, image_id)


def _between(a, b, hashes_a, hashes_b):  # two sets that should have no image in common
    names = lambda s: [
        str(c.get('name'))
        for c in sorted(
            (c for c in s.data.get('categories') or [] if isinstance(c, dict)),
            key=lambda c: (isinstance(c.get('id'), str), c.get('id') or 0),
        )
    ]
    na, nb = names(a), names(b)
    if na and nb and na != nb:
        differ = [
            f"only in {s.where}: {', '.join(sorted(only)[:5])}"
            for s, only in ((a, set(na) - set(nb)), (b, set(nb) - set(na)))
            if only
        ] or ['same names, another order']
        yield Fault(
            'error',
            'class-mismatch',
            b.where,
            f"classes differ from those of {a.where} ({'; '.join(differ)})",
            'give both files the same categories',
        )
    level = 'error' if b.data.get('annotations') else 'warning'
    where_is = {h: k for k, h in hashes_a.items()}
    for k, h in hashes_b.items():
        if h in where_is:
            yield Fault(
                level,
                'shared-image',
                b.where,
                f'image {k} is pixel for pixel image {where_is[h]} of {a.where}',
                'take it out of one of the two',
            )
    ids = lambda s: {
        str(im.get('id')): im.get('file_name') for im in s.data.get('images') or [] if isinstance(im, dict)
    }
    ia, ib = ids(a), ids(b)
    both = ia.keys() & ib.keys()
    files = [k for k in both if ia[k] == ib[k]]
    if files:
        yield Fault(
            'warning',
            'shared-file-name',
            b.where,
            f'{len(files):,} images share id and file name with {a.where}, e.g. {files[0]} ({ia[files[0]]})',
            'are they the same images? then the two sets overlap',
        )
    elif both:
        yield Fault(
            'info',
            'shared-ids',
            b.where,
            f'{len(both):,} image ids also occur in {a.where}, with other files',
            'harmless as long as the two files are not merged',
        )


# %%
#| export
def split_faults(
    path,  # JSON with lists of image ids: labelled, unlabelled, dev
    ids,  # image ids of the data set
    hashes: dict,  # image id -> content hash, may be empty
    fingerprint: str | None = None,  # of the data set, if it can be loaded
):  # iterator of Fault
    "Overlaps between the parts of a split, by id and by content, and ids that do not exist"
    try:
        split = json.loads(Path(path).read_text())
    except (OSError, ValueError) as e:
        yield Fault('error', 'bad-split', str(path), f'cannot be read ({reason(e)})', 'make it again')
        return
    parts = {
        k: split[k]
        for k in ('labelled', 'unlabelled', 'dev')
        if isinstance(split, dict) and isinstance(split.get(k), list)
    }
    if 'labelled' not in parts:
        yield Fault('error', 'bad-split', str(path), "has no list 'labelled'", 'this is not a split file')
        return
    if fingerprint and split.get('fingerprint') not in (None, '', fingerprint):
        yield Fault(
            'error',
            'stale-split',
            str(path),
            f"was made for data {split['fingerprint']}, this is {fingerprint}",
            'make it again for this data set',
        )
    owner, known = {}, set(ids)
    for part, members in parts.items():
        for m in members:
            if m not in known:
                yield Fault(
                    'error',
                    'unknown-split-id',
                    str(path),
                    f'{part}: no image with id {m!r}',
                    'make the split again for this data set',
                )
            for key in (m, hashes.get(str(m))):
                if key is None:
                    continue
                at = owner.setdefault(key, (part, m))
                if at == (part, m):
                    continue
                if at[0] != part:
                    yield Fault(
                        'error',
                        'split-overlap',
                        str(path),
                        f'image {m!r} of {part} is also {at[1]!r} of {at[0]}',
                        'an image belongs to one part only',
                    )
                break


# %%
(root / 'split.json').write_text(json.dumps(dict(labelled=[1, 2], unlabelled=[2, 4], dev=[3, 9])))
overlaps = list(split_faults(root / 'split.json', [1, 2, 3, 4], hashes))
assert [f.kind for f in overlaps] == ['split-overlap', 'split-overlap', 'unknown-split-id']
[f.item for f in overlaps]  # image 3 has the pixels of image 1


# %% [markdown]
# ## All together

# %%
#| export
def _as_source(spec, split, data_root):  # -> Source; what cannot be opened becomes a source with one fault
    if isinstance(spec, Source):
        return spec
    try:
        return _spec_source(spec, split, data_root)
    except DataError as e:
        what, _, cure = str(e).rpartition('; ')
        return Source(
            str(spec),
            str(spec),
            None,
            faults=[
                Fault(
                    'error',
                    'cannot-open',
                    str(spec),
                    (what or str(e)).removeprefix(f'{spec}: '),
                    cure if what else 'see above',
                )
            ],
        )


def _read(
    spec, split, data_root
):  # a file that does not even hold the list of boxes: meant so, or lost in an export
    source = read_source(spec, split, data_root)
    if (
        Path(source.where).is_file()
        and isinstance(source.data, dict)
        and isinstance(source.data.get('images'), list)
        and 'annotations' not in source.data
    ):
        source.faults.append(
            Fault(
                'warning',
                'missing-annotations',
                source.where,
                "there is no list 'annotations'",
                'fit as unlabelled data; to learn from it, export it with its boxes',
            )
        )
    return source


def _spec_source(spec, split, data_root):  # a data set as a Source again
    if not isinstance(spec, DetectionDataset):
        if str(spec).partition(':')[0] != 'digits' or Path(str(spec)).exists():
            return _read(spec, split, data_root)
        spec = open_dataset(spec, split)
    data = spec.coco_dict()
    if not spec.has_boxes:
        del data['annotations']
    if not isinstance(spec, FileDataset):
        return Source(spec.name, spec.name, data, spec)
    for im, file in zip(data['images'], spec.files):
        im['file_name'] = file
    return Source(spec.name, spec.where, data, spec.folder)


def _others(spec, other, source, split, data_root):  # what the set must not overlap with
    if other is not None:
        return [
            _as_source(o, 'val', data_root) for o in (other if isinstance(other, list | tuple) else [other])
        ]
    out = []
    if split == 'train' and isinstance(spec, str | Path) and source.data is not None:
        for s in ('val', 'test'):
            try:
                o = _spec_source(spec, s, data_root)
            except DataError:
                continue
            if all(o.name != x.name for x in (source, *out)):
                out.append(o)
    return out


# %%
#| export
def _examine(source, report, quick, threads, progress):  # faults and hashes of one set
    report.faults += source.faults
    if source.data is None:
        return {}
    report.faults += list(coco_faults(source.data, source.where))
    counts, histogram, sizes = _statistics(source.data)
    report.faults += list(_content_faults(source.data, source.where, counts, histogram))
    if not report.counts:
        report.counts, report.histogram, report.box_sizes = counts, histogram, sizes
    if any(f.kind in ('schema', 'missing-image-folder') and f.where == source.where for f in report.faults):
        return {}
    hashes, faults = check_images(source, quick, threads, progress)
    report.faults += faults + list(_same_images(hashes, source.where))
    return hashes


def check_dataset(
    spec,  # path or name as for `open_dataset`, or a data set
    other=None,  # one or several more that must not overlap with it; None: the val and test splits beside it, if any
    split_files=(),  # files from `save_split` made for it
    split: str = 'train',  # of `spec`
    quick: bool = False,  # headers only: no decoding, no search for equal images
    data_root=None,  # where names are looked up; None: $SEMIDETR_DATA
    threads: int = 4,  # image decoders
    progress: bool | None = None,  # bar; None: on a terminal
) -> Report:
    "Examine a data set and do not stop at the first fault"
    source = _as_source(spec, split, data_root)
    report = Report(source.name, source.where)
    hashes = _examine(source, report, quick, threads, progress)
    for o in _others(spec, other, source, split, data_root):
        seen = _examine(o, report, quick, threads, progress)
        if all(isinstance(s.data, dict) and isinstance(s.data.get('images'), list) for s in (source, o)):
            report.faults += list(_between(source, o, hashes, seen))
    fingerprint = None
    if not report.exit_code and not isinstance(source.folder, DetectionDataset):
        ds = FileDataset(source)
        fingerprint = ds.fingerprint() if split_files else None
        if ds.dropped:
            report.counts['boxes without area, dropped'] = ds.dropped
    ids = (
        [im.get('id') for im in source.data['images'] if isinstance(im, dict)]
        if isinstance(source.data, dict) and isinstance(source.data.get('images'), list)
        else []
    )
    for f in [split_files] if isinstance(split_files, str | Path) else split_files:
        report.faults += list(split_faults(f, ids, hashes, fingerprint))
    return report


# %%
report = check_dataset(root, split_files=root / 'split.json', progress=False)
expected = {
    'unknown-class',
    'negative-box',
    'unreadable-image',
    'missing-image',
    'shared-image',
    'split-overlap',
    'unknown-split-id',
}
assert {f.kind for f in report.of('error')} == expected and report.exit_code == 2
print(report.to_text().replace(f'{root}/', ''))

# %% [markdown]
# The built-in scenes are in good health, and their splits share no image:

# %%
healthy = check_dataset(scenes, other=open_dataset('digits:n=6', 'val'))
assert (
    healthy.exit_code == 0 and not healthy.of(kind='shared-image') and healthy.verdict == 'fit for training'
)
json.loads(healthy.to_json())['kinds']

# %% [markdown]
# An export that lost its boxes, or never had any, is still good for something:

# %%
(root / 'bare.json').write_text(json.dumps(dict(images=[entry(1, 'val.png')], categories=[])))
bare = check_dataset(root / 'bare.json', progress=False)
assert bare.exit_code == 0 and [f.kind for f in bare.faults] == ['missing-annotations']
print(bare.to_text().replace(f'{root}/', ''))


# %% [markdown]
# ## What only eyes can see
#
# No rule notices that a label is wrong, or that all boxes stand ten pixels too far to the left. A page of
# images does, in ten seconds. What cannot be decoded says so on its tile.

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
    img = s.image.resize(
        (max(1, round(s.image.width * k)), max(1, round(s.image.height * k))),
        Image.Resampling.BILINEAR if k > 1 else Image.Resampling.BOX,
    )
    for kind, rows in (('truth', ~s.ignore), ('mined', s.ignore)):
        if rows.any():
            img = draw_on_image(
                img, s.boxes[rows] * k, s.labels[rows], classes=ds.classes, kind=kind, width=1
            )
    tile.paste(img, ((cell - img.width) // 2, (cell - img.height) // 2))
    return tile


def contact_sheet(
    ds,  # data set, or its path or name
    n: int = 12,  # images, drawn by hash
    ncols: int = 4,  # in a row
    cell: int = 220,  # side of a cell in pixels
    seed: int = 0,  # another seed, other images
) -> Image.Image:  # RGB
    "A page of images with their boxes: the check that no program can make; what is to be ignored is dashed"
    if not isinstance(ds, DetectionDataset):
        ds = open_dataset(ds)
    chosen = sorted(sorted(range(len(ds)), key=lambda i: stable_hash('contact', seed, ds.ids[i]))[:n])
    ncols = max(1, min(ncols, len(chosen)))
    sheet = Image.new('RGB', (ncols * cell, -(-len(chosen) // ncols) * cell), (255, 255, 255))
    for k, i in enumerate(chosen):
        sheet.paste(_tile(ds, i, cell), (k % ncols * cell, k // ncols * cell))
    return sheet


# %%
#| label: fig-doctor-sheet
#| fig-cap: "A contact sheet shows in a glance whether the boxes sit where the objects are."
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
# * Errors are what loading would refuse or what would spoil a result; then the exit code is 2. A set without
#   boxes is fit as unlabelled data only.
# * Images are compared by their pixels.
# * `to_text` is for people, `to_json` for programs; `quick` reads headers only.
# * A contact sheet completes it.
#
# ## Exercises
#
# 1. @eq-doctor-key misses a copy that was compressed again. Which key would find it, and which different
#    images would it then call equal?
# 2. Is a labelled image that also lies in the unlabelled folder harmful? Argue for the training and for the
#    numbers of the health monitor.
# 3. Add a warning for classes that are frequent in one set and rare in the other. How large must a difference
#    be before it is more than chance?
