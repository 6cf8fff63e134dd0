# %% [markdown]
# # The images of a run {#sec-run-data}
#
# > Divide a data set into the parts that a run may learn from, choose on, and report on.
#
# A semi-supervised result depends on which images had labels, and is worth nothing if one of the others leaked
# its boxes. The training images are divided once (@sec-splits), and each part has one role:
#
# | part | boxes | used for |
# | :--- | :--- | :--- |
# | `labelled` | yes | supervised losses |
# | `unlabelled` | removed | pseudo labels |
# | `dev` | yes | choosing settings; never trained on |
# | `val` | yes | reported numbers only |
# | `truth` | of the unlabelled images | the health monitor only (@sec-health) |
#
# The classes and the number of classes follow from the data, not from a setting.

# %%
#| default_exp train.run_data

# %%
#| export
import dataclasses
import os
import warnings
import torch
from semidetr.core import ConfigError, DataError, MissingSplit, tell
from semidetr.data.catalog import open_dataset, open_further
from semidetr.data.checks import constant_fault, image_files, same_files
from semidetr.data.datasets import DetectionDataset, Joined, Subset, Unlabelled
from semidetr.data.files import pixel_depth
from semidetr.data.splits import load_split, make_split
from semidetr.train.config import DataConfig
from semidetr.train.run_folder import pool_names

# %%
from semidetr.draw import image_grid
from semidetr.train.config import preset


# %%
#| export
@dataclasses.dataclass
class RunData:
    "The images of a run by their roles; each part but the split and the classes is a data set"

    labelled: object  # with boxes
    unlabelled: object  # stripped of every box; may be None
    dev: object  # held out of training: the only part that settings are chosen on
    val: object  # test split, for reported numbers; may be None
    truth: object  # data set that knows the boxes of the unlabelled images, for the health monitor alone
    split: object  # `Split` that divided the training images
    classes: list  # names, in the order of the labels
    notes: list = dataclasses.field(default_factory=list)  # what was left out or mapped, a line each
    marks: dict = dataclasses.field(
        default_factory=dict
    )  # of further images: 'pool', 'test' -> 16 hex digits


def test_split(
    cfg,  # DataConfig
    train=None,  # the training images, if they are open already
):  # (data set or None, why there is none)
    "Images for the reported numbers: `val`, or the val split of `data` if that is not the training set again"
    if cfg.val:
        return open_further(cfg.val, 'val', cfg.images), ''
    try:
        val = open_further(cfg.data, 'val', cfg.images)
    except MissingSplit as e:
        return None, str(e)
    train = open_dataset(cfg.data, 'train', images=cfg.images) if train is None else train
    # the defaults differ, so data sets that lack `where` are never the same
    same_place = getattr(val, 'where', 0) == getattr(train, 'where', None)
    if same_place and list(val.ids) == list(train.ids):
        return None, f'{cfg.data}: has no split of its own for testing'
    return val, ''


# %% [markdown]
# ## Images without a box
#
# An image that is listed without any box shows what is *no* object. `data.background=negatives` draws it like
# the other labelled images; `left_out` is the published behaviour. An image all of whose boxes are to be
# ignored is never drawn: its objects would count as background. What is left out is in no count.

# %%
#| export
def drawn_positions(
    ds,  # data set with boxes
    positions,  # of the images that are labelled
    background: str = 'negatives',  # as `data.background`
) -> tuple:  # (positions that are drawn, number of images without a box among all)
    "Labelled images that a run learns from"
    kept, empty, boxes = [], 0, 0
    for i in positions:
        ignore = ds.annotation(i)['ignore']
        is_empty = len(ignore) == 0
        empty += is_empty
        has_object = not bool(ignore.all())
        boxes += has_object
        if (is_empty and background == 'negatives') or has_object:
            kept.append(i)
    if len(positions) and not boxes:
        raise DataError(
            f'{ds.name}: no labelled image has a box; check the annotations with `semidetr doctor`'
        )
    return kept, empty


# %%
digit_scenes = open_dataset('digits:n=40')
assert drawn_positions(digit_scenes, [3, 1]) == ([3, 1], 0)
drawn_positions(digit_scenes, [3, 1])


# %% [markdown]
# ## Classes by name
#
# Labels are positions in a list of names. Two files may list the same names in another order, and then equal
# labels mean different classes. So the classes of a test set are mapped to those of the run by name. A class
# that the run does not know cannot be predicted; its boxes are left out of the numbers, and a note says so.

# %%
#| export
class ByName(DetectionDataset):
    "A data set whose labels follow another list of the same class names"

    def __init__(
        self,
        ds,  # data set; boxes of a class that is not in `classes` are left out
        classes: list,  # names in the wanted order
    ):
        self._ds, self.name, self.classes, self.ids = ds, ds.name, list(classes), ds.ids
        self.has_boxes = ds.has_boxes
        label = {c: n for n, c in enumerate(classes)}
        self._label = torch.tensor([label.get(c, -1) for c in ds.classes], dtype=torch.int64)

    def __getitem__(self, i):
        s = self._ds[i]
        labels = self._label[s.labels]
        known = labels >= 0
        kept = dict(boxes=s.boxes[known], labels=labels[known], ignore=s.ignore[known])
        return dataclasses.replace(s, **kept)

    def annotation(self, i):
        a = self._ds.annotation(i)
        labels = self._label[a['labels']]
        known = labels >= 0
        rows = {k: v[known] for k, v in a.items() if isinstance(v, torch.Tensor)}
        return a | rows | dict(labels=labels[known])


def by_name(
    ds,  # data set
    classes: list,  # names in the wanted order
) -> tuple:  # (the same images with labels in that order, line about it or '')
    "Map the classes of a data set by name"
    if list(ds.classes) == list(classes) or not ds.classes:
        return ds, ''
    fewer, more = ([c for c in a if c not in b] for a, b in ((classes, ds.classes), (ds.classes, classes)))
    if not set(classes) & set(ds.classes):
        raise DataError(
            f'{ds.name}: none of its classes ({", ".join(ds.classes[:5])}) is one of the run '
            f'({", ".join(classes[:5])}); give both the same names'
        )
    text = f'{ds.name}: its classes are mapped to those of the run by name'
    if fewer:
        text += f'; it has no class {", ".join(map(repr, fewer[:5]))}'
    if more:
        text += f'; the run has no class {", ".join(map(repr, more[:5]))}, whose boxes are left out'
    return ByName(ds, classes), text


# %%
turned, turned_note = by_name(digit_scenes, digit_scenes.classes[::-1])
assert turned[0].labels.tolist() == [9 - c for c in digit_scenes[0].labels.tolist()]
turned_note


# %% [markdown]
# ## Unlabelled images that cannot be read
#
# A labelled image that cannot be read stops a run. Among many thousand unlabelled ones a broken file matters
# little: the next readable image takes its place, up to `data.skip_broken` broken files in each process that
# trains. Its workers share one table of the broken ones, so the bound does not depend on their number, and each is
# reported once. The table is in the checkpoint: the bound is one of the whole run.

# %%
#| export
class SkipBroken(DetectionDataset):
    "Images; in the place of one that cannot be read stands the next one that can"

    has_boxes = False

    def __init__(
        self,
        ds,  # data set without boxes
        most: int,  # broken images that are skipped, in each process
    ):
        self._ds, self.most = ds, most
        self._flags = torch.zeros(len(ds), dtype=torch.uint8).share_memory_()
        self.name, self.classes, self.ids = ds.name, ds.classes, ds.ids

    @property
    def broken(self) -> list:
        "Positions of the images that were skipped, here or in a worker"
        return self._flags.nonzero().flatten().tolist()

    @broken.setter
    def broken(self, positions):
        self._flags.zero_()
        self._flags[list(positions)] = 1

    def __getitem__(self, i):
        first = range(len(self))[i]  # an IndexError beyond the end, which ends a loop over the images
        for n in range(len(self)):
            at = (first + n) % len(self)
            try:
                return self._ds[at]
            except DataError as e:
                self._count(at, e)
        raise DataError(f'{self.name}: no unlabelled image can be read; check the folder')

    def _count(self, at, error):
        "Mark an image as broken; a DataError beyond the bound"
        if self._flags[at]:
            return
        if not self.most:
            raise error
        what = str(error).rpartition('; ')[0] or str(error)  # without its cure
        if (n := len(self.broken)) >= self.most:
            bound = f'more than data.skip_broken={self.most} unlabelled images cannot be read'
            raise DataError(f'{what}; {bound}; restore them, or allow more') from None
        self._flags[at] = 1
        warnings.warn(f'{what}; skipped ({n + 1} of at most {self.most})')

    def annotation(self, i):
        return self._ds.annotation(i)


# %%
skipping = SkipBroken(Unlabelled(digit_scenes), 1)
assert skipping[2].image_id == digit_scenes.ids[2] and not skipping.broken
assert [s.image_id for s in skipping] == list(digit_scenes.ids)
skipping


# %% [markdown]
# ## One role for every file
#
# A folder of all photographs as unlabelled images is convenient, and holds the development and test images
# too. Files that have another role leave the unlabelled pool. A labelled or development image in the test
# split cannot be repaired here; it is said.

# %%
#| export
def outside(
    pool,  # data set of unlabelled images
    roles: dict,  # name of a role -> data set or None
    name: str,  # of the pool, for the note
) -> tuple:  # (pool without the files that have another role, or None if none is left; line or '')
    "Take files that have another role out of the unlabelled pool"
    files, counts, taken, example = image_files(pool), {}, set(), ''
    for role, ds in roles.items():
        if ds is None:
            continue
        others = image_files(ds)
        found = {j: i for j, i in same_files(others, files).items() if j not in taken}
        if found:
            counts[role] = len(found)
            first = min(found)
            example = example or f'{files[first]} is {others[found[first]]}'
            taken |= set(found)
    if not taken:
        return pool, ''
    parts = ', '.join(f'{n} {role}' for role, n in counts.items())
    text = (
        f'{name}: {len(taken)} of {len(pool)} images leave the unlabelled pool, since they are also {parts}'
    )
    left = [i for i in range(len(pool)) if i not in taken]
    return Subset(pool, left) if left else None, f'{text} (e.g. {example})'


def shared_with_test(
    val,  # test split, or None
    roles: dict,  # name of a role -> data set or None
):  # iterator of lines
    "Training and development images that are also in the test split"
    for role, ds in roles.items():
        if val is not None and ds is not None and (found := same_files(image_files(ds), image_files(val))):
            first = min(found)
            yield (
                f'{val.name}: {len(found)} test images are also {role} images, e.g. '
                f'{image_files(val)[first]}; their numbers are too good: take them out of one of the two'
            )


# %%
assert outside(Unlabelled(digit_scenes), dict(labelled=digit_scenes), 'digits')[1] == ''  # no files


# %% [markdown]
# ## The parts of a run

# %%
#| export
def with_white(ds, white):
    "The data set that reads its files with this value of white"
    if ds is not None and white and hasattr(ds, 'files'):
        ds.white = white
    return ds


def _dark(train, kept, most=8):
    "Line about labelled images of more than 8 bits that show nearly nothing; '' if the first few are fine"
    files = image_files(train)
    for i in kept[:most]:
        try:
            found = (
                files[i] and pixel_depth(files[i]) != '8 bits' and constant_fault(train[i].image, files[i])
            )
        except Exception:
            continue  # an image that cannot be read is reported by whoever draws it
        if found:
            return f'{files[i]}: {found[2]}; {found[3]}'
    return ''


def _pool(cfg, split, pick, roles):
    "(Unlabelled images or None, lines about it, `pool_names` of those of `data.unlabelled`)"
    own = Unlabelled(pick(split.unlabelled)) if split.unlabelled else None
    more, pools, notes, names = None, [], [], ''
    if cfg.unlabelled:
        photos = with_white(open_further(cfg.unlabelled, 'train', cfg.images), cfg.white)
        notes += getattr(photos, 'notes', [])
        more, names = Unlabelled(photos), pool_names(photos)
    for pool, name in ((own, cfg.data), (more, cfg.unlabelled)):
        if pool is None or not len(pool):
            continue
        others = roles | {'unlabelled images of ' + cfg.data: own} if pool is more else roles
        pool, text = outside(pool, others, name)
        pools += [pool] if pool is not None else []
        notes += [text] if text else []
        last = text
    if (own or more) and not pools:
        raise DataError(f'{last}; no unlabelled image is left: give other images')
    pool = None if not pools else pools[0] if len(pools) == 1 else Joined(pools)
    pool = SkipBroken(pool, cfg.skip_broken) if pool is not None and cfg.skip_broken else pool
    return pool, notes, names


# %%
#| export
def build_data(
    cfg,  # DataConfig
    detector=None,  # its settings: limits that the data exceed are said too
) -> RunData:
    "Open the data sets, divide the training images, and give each file one role; notes are told"
    train = with_white(open_dataset(cfg.data, 'train', images=cfg.images), cfg.white)
    if cfg.split_file:
        split = load_split(cfg.split_file, train)
    else:
        wanted = dict(percent=cfg.percent or None, count=cfg.count or None, shots=cfg.shots or None)
        if not any(wanted.values()):
            wanted['percent'] = 100.0
        split = make_split(
            train, fold=cfg.fold, dev=cfg.dev, seed=cfg.split_seed, cover_classes=cfg.cover_classes, **wanted
        )

    def pick(ids):
        return Subset(train, [train.index_of(i) for i in ids])

    kept, empty = drawn_positions(train, [train.index_of(i) for i in split.labelled], cfg.background)
    dev, val = pick(split.dev) if split.dev else None, with_white(test_split(cfg, train)[0], cfg.white)
    roles = dict(labelled=pick(split.labelled), development=dev)
    marks = {} if val is None else dict(test=val.fingerprint())
    unlabelled, notes, names = _pool(cfg, split, pick, roles | dict(test=val))
    notes = [*getattr(train, 'notes', []), *getattr(val, 'notes', []), *notes]
    notes += shared_with_test(val, roles)
    if val is not None:
        val, text = by_name(val, train.classes)
        notes += [text] if text else []
    if text := _dark(train, kept):
        notes.append(text)
    if empty:
        how = 'are used as negatives' if cfg.background == 'negatives' else 'are left out'
        notes.append(f'{cfg.data}: {empty} labelled images without a box {how} (data.background)')
    if (ignored := len(split.labelled) - len(kept) - (empty if cfg.background == 'left_out' else 0)) > 0:
        notes.append(f'{cfg.data}: {ignored} labelled images have only boxes to be ignored and are left out')
    if detector is not None:
        known = [train.index_of(i) for i in (*split.labelled, *split.dev)]
        for part in (Subset(train, known), val):
            notes += limits(part, *queries_of(detector)) if part is not None else []
    tell(notes)
    return RunData(
        labelled=Subset(train, kept),
        unlabelled=unlabelled,
        dev=dev,
        val=val,
        truth=None if cfg.unlabelled else train,
        split=split,
        classes=list(train.classes),
        notes=notes,
        marks=marks | (dict(pool=names) if names else {}),
    )


# %%
toy_data = build_data(DataConfig(data='digits:n=40', count=6, dev=4))
assert (len(toy_data.labelled), len(toy_data.unlabelled), len(toy_data.dev)) == (6, 30, 4)
assert len(toy_data.unlabelled[0].boxes) == 0
toy_data.split


# %% [markdown]
# ## What must not change
#
# A checkpoint lists the images of each role: their ids, and the size of each file in bytes. Looking at the
# sizes opens no file, so a pool of 100,000 images takes less than a second.

# %%
#| export
def _file_size(path):
    try:
        return os.stat(path).st_size if isinstance(path, str) else -1
    except OSError:
        return -1


def images_of_roles(
    data: RunData,
    test: bool = True,  # is the test split measured, if there is one?
) -> (
    dict
):  # role -> dict(ids, bytes: size of each file, -1 without a file of its own, content: of the test split)
    "Which images have which role, for `check_same_run`"
    roles = dict(labelled=data.labelled, unlabelled=data.unlabelled, development=data.dev)
    roles |= dict(test=data.val) if test else {}
    out = {}
    for role, ds in roles.items():
        files = image_files(ds) if ds is not None else []
        ids = [] if ds is None else list(ds.ids)
        content = (
            ds.fingerprint() if role == 'test' and ids else ''
        )  # the training set has its own fingerprint
        out[role] = dict(ids=ids, bytes=[_file_size(f) for f in files], content=content)
    return out


# %%
listed = images_of_roles(toy_data)
counts = {role: len(images['ids']) for role, images in listed.items()}
assert counts == dict(labelled=6, unlabelled=30, development=4, test=40)
listed['labelled']


# %%
#| export
def resolve(
    cfg,  # Config
    classes: list,
):  # Config
    "Fill in what the data decides"
    n = cfg.detector.num_classes
    if n not in (0, len(classes)):
        raise ConfigError(
            f'detector.num_classes={n}, but the data set has {len(classes)} classes; leave it at 0'
        )
    return dataclasses.replace(cfg, detector=dataclasses.replace(cfg.detector, num_classes=len(classes)))


def queries_of(
    detector,  # settings of a detector
) -> tuple:  # (number of queries, 0 if there is none; the setting)
    "How many objects a detector predicts per image, and what sets it"
    for part, name in (
        (detector, 'detector'),
        (getattr(detector, 'transformer', None), 'detector.transformer'),
    ):
        if getattr(part, 'num_queries', 0):
            return part.num_queries, f'{name}.num_queries'
    return 0, ''


def limits(
    ds,  # data set with boxes
    queries: int = 0,  # of the detector; 0: not known
    setting: str = 'detector.transformer.num_queries',  # that sets them
    most: int = 100,  # detections per image that COCO's AP counts
) -> list:  # lines
    "Limits that the data exceed: objects per image against queries and against the detections that AP counts"
    counts = [int((~ds.annotation(i)['ignore']).sum()) for i in range(len(ds))]
    top, out = max(counts, default=0), []
    if queries and top > queries:
        n = sum(c > queries for c in counts)
        out.append(
            f'{ds.name}: {n} images have more than {queries} objects (up to {top}), but the detector '
            f'predicts at most {queries} per image; set {setting}={top} or more'
        )
    if top > most:
        n = sum(c > most for c in counts)
        out.append(
            f'{ds.name}: {n} images have more than {most} objects (up to {top}), but AP counts the '
            f'{most} best detections per image; measure with `semidetr eval --max-dets {top}`'
        )
    return out


# %%
#| label: fig-run-data-parts
#| fig-cap: "One scene of each part as training gets it: the unlabelled one has no boxes, though its file has."
#| fig-alt: "Three scenes; the first and the third with green boxes, the middle one without."
parts = [toy_data.labelled[0], toy_data.unlabelled[0], toy_data.dev[0]]
image_grid(
    [s.image for s in parts], [s.boxes for s in parts], titles=['labelled', 'unlabelled', 'dev'], ncols=3
)

# %%
resolved = resolve(preset('digits'), toy_data.classes)
assert resolved.detector.num_classes == 10
resolved.detector.num_classes

# %% [markdown]
# ## Summary
#
# - `build_data` opens everything that `DataConfig` names and gives each image one role.
# - Files that have another role leave the unlabelled pool; labelled images without a box are negatives, or
#   left out; classes of a test set are mapped by name. Each of these is a note.
# - `limits` compares the number of objects per image with what can be predicted and counted.
# - Unlabelled images have no boxes; only the health monitor gets the data set that knows them.
# - A `val` split that is the training set again does not count as a test split.
# - `images_of_roles` lists what must not change until a run is finished.
# - `resolve` takes the number of classes from the data.
#
# ## Exercises
#
# 1. Why is `truth` None when more unlabelled images come from another folder?
# 2. Two runs use the same `split_seed` and different folds. Which parts are equal?
