# %% [markdown]
# # Splits that are the same on every machine {#sec-splits}
#
# > Divide a data set into labelled, unlabelled and development images, equally on every machine.
#
# "10 % of COCO" stands for a *list of images*. The lists behind published tables were often drawn with a seed
# that nobody wrote down, stored as positions in a list whose order depends on a library, or kept on a drive
# that no longer exists. Then two results with the same percentage were trained on different images, and with
# one percent of the labels the choice of images changes the result by several points. So a split here is
# computed, not drawn: whoever has the data has the list.

# %%
#| default_exp data.splits

# %%
#| export
import json
import typing
from collections import Counter
from dataclasses import asdict, dataclass
from fractions import Fraction
from numbers import Integral
from pathlib import Path
from semidetr.core import ConfigError, DataError, atomic_write, stable_hash, tell
from semidetr.reading import check, check_fields, read_small_json


# %% [markdown]
# ## A rank for every image
#
# Rank the images of fold $f$ by a hash of their *id*,
#
# $$ r_f(i)=\operatorname{rank}\; h(s, f, i), \qquad L_{p,f}=\{\, i : r_f(i) < \lfloor pN/100 \rfloor \,\} $$ {#eq-splits-rank}
#
# with seed $s$, percentage $p$ and $N$ images. Three properties follow. The list depends on the ids alone,
# neither on file order nor on a random generator. Within a fold the sets are *nested*: every image of the
# first 1 % is among the first 5 %, so a larger percentage only adds labels. And different folds are different
# shuffles.
#
# The development images $D$ are ranked by a hash that depends neither on the fold nor on the percentage. They
# are taken out first, so that one fixed set of labelled images serves to choose thresholds and checkpoints
# for all runs, and the test split is never used for that.

# %%
#| export
def _plain(image_id):
    "An image id as a Python int or str, so that its repr is the same whatever library it came from"
    return int(image_id) if isinstance(image_id, Integral) else str(image_id)


def _share(percent, n):
    "Images that a percentage of `n` stands for; exact, where floats would round"
    return int(Fraction(str(percent)) * n / 100)


def rank_ids(
    ids,  # image ids, int or str, in any order
    *key,  # what the ranking depends on: seed, fold, ...
) -> list:  # the same ids in rank order
    "Sort image ids by a hash of (key, id): a shuffle without a generator"
    ids = [_plain(i) for i in ids]
    return sorted(ids, key=lambda i: (stable_hash(*key, i), repr(i)))


# %%
a = rank_ids([10, 11, 12, 13, 14], 'demo', 0)
assert a == rank_ids([14, 12, 10, 13, 11], 'demo', 0), 'file order does not matter'
assert a != rank_ids([10, 11, 12, 13, 14], 'demo', 1), 'another fold is another shuffle'
a


# %% [markdown]
# ## The split
#
# A `Split` is three lists of image ids, the settings that produced them, and the name and `fingerprint` of
# the data set (a hash of ids, sizes, annotations and classes), so that a stored split cannot be used with
# other data.

# %%
#| export
@dataclass(frozen=True)
class Split:
    "Which images are labelled, unlabelled and for development; all by image id"

    labelled: list[int | str]  # image ids, in rank order
    unlabelled: list[int | str]  # image ids, in rank order; empty at 100 %
    dev: list[int | str]  # image ids; the only ones that settings may be chosen on
    percent: float | None = None  # of all images of the data set
    count: int | None = None  # or this number of labelled images
    fold: int = 0  # which shuffle
    seed: int = 0  # of all hashes
    fingerprint: str = ''  # of the data set
    dataset: str = ''  # its name
    shots: int | None = None  # or this number of labelled images of each class

    def indices(
        self,
        ds,  # the data set that was split
        part: str = 'labelled',  # 'labelled', 'unlabelled' or 'dev'
    ) -> list:  # positions in `ds`
        "Positions of one part's images in the data set"
        return [ds.index_of(i) for i in getattr(self, part)]

    def __repr__(self):
        what = f'{self.count} images' if self.shots is None else f'{self.shots} images per class'
        if self.percent is not None:
            what = f'{self.percent:g} %'
        return (
            f'Split({self.dataset!r}, {what}, fold {self.fold}: {len(self.labelled)} labelled, '
            f'{len(self.unlabelled)} unlabelled, {len(self.dev)} dev)'
        )


# %%
#| export
def _pool(ds, dev, seed, fold):
    "Development ids and the other ids in the rank order of a fold"
    ids = [_plain(i) for i in ds.ids]
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise DataError(f"{ds.name}: image id {twice!r} occurs more than once; give every image its own id")
    if not 0 <= dev < len(ids):
        raise DataError(
            f"{ds.name}: {len(ids)} images cannot give {dev} development images and still train; lower dev"
        )
    held = rank_ids(ids, seed, 'dev')[:dev]
    taken = set(held)
    return held, rank_ids([i for i in ids if i not in taken], seed, fold)


def _labels(ds, image_id):
    "Classes in an image; boxes to be ignored do not count"
    a = ds.annotation(ds.index_of(image_id))
    return {int(c) for c, skip in zip(a['labels'], a['ignore']) if not skip}


def _cover_first(ds, order):
    "Images that add a class come first; -> (order, number of those images)"
    covered, front, rest = set(), [], []
    for i in order:
        new = _labels(ds, i) - covered if len(covered) < len(ds.classes) else set()
        (front if new else rest).append(i)
        covered |= new
    return front + rest, len(front)


# %% [markdown]
# With very few labels a rare class may have no example at all, and then no method can learn it.
# `cover_classes=True` moves images that add a class to the front of the ranking. This *reads labels that are
# supposed to be hidden*, so it is off by default, and a table that uses it should say so. The sets stay
# nested.
#
# Few-shot studies label $k$ images of every class ($k=1$ is "one shot"). The classes take turns, the rarest
# first; each takes its next image in rank order unless the images so far already show it often enough, since
# an image counts for all its classes. After $k$ rounds each class has $k$ images, or all that there are. The
# sets are nested in $k$. This, too, reads hidden labels.

# %%
#| export
def _few_shots(ds, order, shots):
    "The order with k images of each class first; -> (order, number of those images, classes with fewer)"
    queues = {c: [] for c in range(len(ds.classes))}
    labels = {i: _labels(ds, i) for i in order}
    for i in order:
        for c in labels[i]:
            queues[c].append(i)
    chosen, counts = {}, dict.fromkeys(queues, 0)
    rarest_first = sorted(queues, key=lambda c: (len(queues[c]), c))
    for k in range(1, shots + 1):
        for c in rarest_first:
            new = next((i for i in queues[c] if i not in chosen), None)
            if counts[c] < k and new is not None:
                chosen[new] = True
                counts = {d: n + (d in labels[new]) for d, n in counts.items()}
    short = [c for c in rarest_first if counts[c] < shots]
    return [*chosen, *(i for i in order if i not in chosen)], len(chosen), short


# %%
class ThreeImages:
    "Three images with the classes a and b, b, b and c"

    name, classes, ids = 'three', ['a', 'b', 'c'], [1, 2, 3]

    def annotation(self, i):
        labels = [[0, 1], [1], [1, 2]][i]
        return dict(labels=labels, ignore=[False] * len(labels))

    def index_of(self, image_id):
        return image_id - 1


assert _few_shots(ThreeImages(), [1, 2, 3], 1) == ([1, 3, 2], 2, [])
_few_shots(ThreeImages(), [1, 2, 3], 2)


# %%
#| export
def make_split(
    ds,  # a data set with name, ids, classes, annotation(i), index_of(id), fingerprint()
    percent: float | None = None,  # labelled share of all images, in (0, 100]; 100 = all but dev
    count: int | None = None,  # or the number of labelled images
    fold: int = 0,  # 0, 1, 2, ...: another shuffle of the same pool
    dev: int = 100,  # development images, taken out first, the same for every fold and percentage
    seed: int = 0,  # of all hashes
    cover_classes: bool = False,  # put at least one image of every class first (reads hidden labels)
    shots: int | None = None,  # or the number of labelled images of each class (reads hidden labels)
) -> Split:
    "Divide a data set by hashes of image ids (@eq-splits-rank); at least one image is labelled"
    if (percent, count, shots).count(None) != 2:
        raise ConfigError('a split needs one of percent, count and shots')
    if shots is not None and shots < 1:
        raise ConfigError(f'shots={shots}: each class needs at least one labelled image')
    if percent is not None and not 0 < percent <= 100:
        raise ConfigError(f'percent={percent} is outside (0, 100]; 10 means ten percent')
    if count is not None and count < 1:
        raise ConfigError(f'count={count}: at least one image must be labelled')
    held, order = _pool(ds, dev, seed, fold)
    if shots is not None:
        order, n, short = _few_shots(ds, order, shots)
        names = ', '.join(ds.classes[c] for c in short[:5])
        tell(
            [f'{ds.name}: fewer than {shots} images beside the development part show {names}']
            if short
            else []
        )
        if not n:
            raise DataError(f'{ds.name}: no image has a box; shots needs images of each class')
        settings = dict(fold=fold, seed=seed, fingerprint=ds.fingerprint(), dataset=ds.name, shots=shots)
        return Split(order[:n], order[n:], held, **settings)
    n = count if count is not None else max(1, _share(percent, len(ds.ids)))
    if count is not None and count > len(order):
        raise DataError(
            f'{ds.name}: count={count}, but only {len(order)} images are left beside {dev} development images'
        )
    if percent == 100:
        n = len(order)
    if cover_classes:
        order, need = _cover_first(ds, order)
        if n < need:
            raise DataError(
                f'{ds.name}: {n} labelled images do not cover all classes in this fold; '
                f'ask for at least {need}, or cover_classes=False'
            )
    return Split(order[:n], order[n:], held, percent, count, fold, seed, ds.fingerprint(), ds.name)


# %% [markdown]
# An example: twenty images with ids 100 to 119, one of three classes each.

# %%
class TwentyImages:
    "What `make_split` needs of a data set"

    name, classes = 'twenty', ['a', 'b', 'c']
    ids = list(range(100, 120))

    def annotation(self, i):
        return dict(labels=[0 if i < 15 else i % 3], ignore=[False])

    def index_of(self, image_id):
        return image_id - 100

    def fingerprint(self):
        return 'f00d'


class Sixty(TwentyImages):
    ids = list(range(100, 160))


twenty = TwentyImages()
small, large = (make_split(twenty, percent=p, dev=4) for p in (10, 50))
assert (len(small.labelled), len(large.labelled)) == (2, 10) and set(small.labelled) < set(large.labelled)
assert small.dev == make_split(twenty, percent=50, fold=3, dev=4).dev
assert sorted(large.labelled + large.unlabelled + large.dev) == twenty.ids
small, large

# %%
covered = make_split(twenty, count=4, dev=4, cover_classes=True)
assert {c for i in covered.labelled for c in _labels(twenty, i)} == {0, 1, 2}
[(i, _labels(twenty, i)) for i in covered.labelled]

# %%
one_shot, two_shots = (make_split(Sixty(), shots=k, dev=6) for k in (1, 2))
shown = [c for i in two_shots.labelled for c in _labels(twenty, i)]
assert [shown.count(c) for c in range(3)] == [2, 2, 2]
assert set(one_shot.labelled) < set(two_shots.labelled)
two_shots

# %% [markdown]
# For COCO the counts are those of the literature: 1,182 / 5,914 / 11,828 of 118,287 images. In
# @fig-splits-strip a column is one image, and each row is a percentage of one fold.

# %%
#| hide
import matplotlib.pyplot as plt
import numpy as np

# %%
#| label: fig-splits-strip
#| fig-cap: "A larger percentage only adds labels, and the development images (grey) are the same in every row. Rows: 10, 25 and 50 % of sixty images in two folds; dark: labelled, light: unlabelled."
#| fig-alt: "Six rows of sixty cells; dark labelled cells of a row are contained in the row below within each fold; grey cells are in the same columns everywhere."

rows = [(f, p, make_split(Sixty(), percent=p, fold=f, dev=6)) for f in (0, 1) for p in (10, 25, 50)]
strip = np.array([[0 if i in s.labelled else 1 if i in s.dev else 2 for i in Sixty.ids] for _, _, s in rows])
palette = np.array([[31, 119, 180], [150, 150, 150], [222, 235, 247]], np.uint8)
fig, ax = plt.subplots(figsize=(6, 1.8), dpi=80)
ax.imshow(palette[strip], aspect='auto', interpolation='nearest')
ax.set_yticks(range(6), [f'fold {f}, {p} %' for f, p, _ in rows])
ax.set_xticks([])
ax.axhline(2.5, color='k', lw=0.8)
ax.set_xticks(np.arange(-0.5, 60), minor=True)
ax.grid(which='minor', axis='x', color='w', lw=0.6)
ax.tick_params(which='minor', length=0)
plt.show()

# %% [markdown]
# ## On disk
#
# A stored split is one JSON file of ids. Its parts are disjoint and at least one image is labelled, whoever wrote the
# file. `load_split` compares fingerprints and looks up every id if it is given the data set.

# %%
#| export
PARTS = ('labelled', 'unlabelled', 'dev')
REPEAT = 'make the split again with `semidetr split`'  # the cure


def _disjoint(split, path):
    "DataError if an image is in two parts of a split, or twice in one, or if none is labelled"
    owner = {}
    for part in PARTS:
        for image_id in getattr(split, part):
            if image_id in owner:
                where = f'also in {owner[image_id]}' if owner[image_id] != part else 'there twice'
                raise DataError(f'{path}: image {image_id!r} of {part} is {where}; {REPEAT}')
            owner[image_id] = part
    if not split.labelled:
        raise DataError(f'{path}: no image is labelled; {REPEAT}')


def save_split(
    split: Split,
    path,  # JSON file
):
    "Store a split; a DataError if its parts overlap"
    _disjoint(split, path)
    atomic_write(path, json.dumps(dict(semidetr_split=1, **asdict(split))) + '\n')


# %%
#| export
SPLIT_MB = 2000  # largest file of a split or of an index list: 10**8 numbers


def _of_data(split, ds, path):
    "DataError if a split names images that a data set does not have; a note if it leaves some out"
    known = set(map(_plain, ds.ids))
    for part in PARTS:
        if odd := [i for i in getattr(split, part) if i not in known]:
            raise DataError(
                f"{path}: {part} names {len(odd)} images that '{ds.name}' does not have, e.g. {odd[0]!r} "
                f'(its first one is {_plain(ds.ids[0])!r}); {REPEAT}'
            )
    if n := len(known) - sum(len(getattr(split, part)) for part in PARTS):
        tell([f"{path}: {n} of {len(known)} images of '{ds.name}' are in no part and are not used"])


def load_split(
    path,  # file from `save_split`
    ds=None,  # if given, the split must be of exactly this data set
) -> Split:
    "Read a split; raises DataError if the file is no split, or a split of other data"
    if not Path(path).exists():
        raise DataError(f"{path}: no such file; make it with `semidetr split`")
    cure = 'make it with `semidetr split`'
    d = read_small_json(path, cure=f'it cannot be read as a split: {cure}', most_mb=SPLIT_MB)
    if not isinstance(d, dict) or d.pop('semidetr_split', None) != 1:
        raise DataError(
            f"{path}: not a split of this package; read_index_list reads index lists of other projects"
        )
    hints = typing.get_type_hints(Split)
    check_fields(d, hints, path, cure=f'damaged split: {cure}', optional=set(hints) - {'labelled'})
    try:
        split = Split(**d)
    except TypeError as e:
        raise DataError(f'{path}: damaged split ({e}); {REPEAT}') from None
    _disjoint(split, path)
    if ds is not None and split.fingerprint != ds.fingerprint():
        raise DataError(
            f"{path}: made for '{split.dataset}' with fingerprint {split.fingerprint}, "
            f"but '{ds.name}' has {ds.fingerprint()}; "
            "the images, boxes or classes changed: make the split again"
        )
    if ds is not None:
        _of_data(split, ds, path)
    return split


# %%
#| hide
import tempfile

# %%
with tempfile.TemporaryDirectory() as tmp:
    save_split(small, f'{tmp}/small.json')
    text = Path(f'{tmp}/small.json').read_text()
    assert load_split(f'{tmp}/small.json', twenty) == small
print(text[:150])


# %% [markdown]
# ## Lists of other projects
#
# Two kinds of lists are in use: image ids, and *positions* in a list of images. The public file of Unbiased
# Teacher holds positions, as `{percent: {fold: [position, ...]}}`, and the list they refer to is neither in
# COCO's file order nor all of COCO: it is the images that have at least one box that is not a crowd region
# (117,266 of 118,287), sorted by image id. That is why its 1 % has 1,172 images and not 1,182.
#
# `read_index_list` checks each interpretation against the data, returns a `Split` with those labelled images,
# and says which interpretation it took. If more than one fits, it does not guess.

# %%
#| export
def _boxed_ids(ds):
    "Ids of images with a box that is not ignored, sorted: the list behind Unbiased Teacher's positions"
    ids = [_plain(i) for i in ds.ids]
    return sorted(i for i in ids if not all(ds.annotation(ds.index_of(i))['ignore']))


def _pick(table, key, what, path):
    "Entry of a dict whose keys are numbers written as text"
    try:
        found = [k for k in table if key is not None and float(k) == float(key)]
    except ValueError:
        raise DataError(f'{path}: its {what} are no numbers; write {{percent: {{fold: [...]}}}}') from None
    if len(found) != 1:
        raise DataError(f"{path}: {what}={key} is not in the file; it has {', '.join(table)}")
    return table[found[0]]


def _nested(path, table, ds, percent, fold):
    values = _pick(_pick(table, percent, 'percent', path), fold, 'fold', path)
    boxed, every = _boxed_ids(ds), sorted(map(_plain, ds.ids))
    for ids, name in (
        (boxed, 'positions among images with boxes, sorted by id'),
        (every, 'positions among all images, sorted by id'),
    ):
        inside = 0 <= min(values, default=0) and max(values, default=0) < len(ids)
        if len(values) == _share(percent, len(ids)) and inside:
            return [ids[v] for v in values], name
    raise DataError(
        f"{path}: {len(values)} positions for {percent} % fit neither the {len(boxed)} images with boxes "
        f"nor all {len(every)} images of {ds.name}"
    )


# %%
#| export
def _read_ids(path, ds, percent, fold, convention):
    "Image ids of a list, and how it was interpreted"
    data = read_small_json(path, cure='it cannot be read as a list: write it again', most_mb=SPLIT_MB)
    if convention not in ('auto', 'ids', 'positions'):
        raise ConfigError(f"convention='{convention}' is not one of auto, ids, positions")
    if isinstance(data, dict):
        check(dict[str, dict[str, list[int]]], data, path, cure='write {percent: {fold: [positions]}}')
        return _nested(path, data, ds, percent, fold)
    if not isinstance(data, list) or not data:
        raise DataError(f"{path}: expected a list of image ids or positions, or {{percent: {{fold: [...]}}}}")
    check(list[int | str], data, path, cure='write a list of image ids or positions')
    ids = [_plain(i) for i in ds.ids]
    known = set(ids)
    as_ids = all(v in known for v in data)
    as_positions = all(isinstance(v, int) and 0 <= v < len(ids) for v in data)
    by_position = [ids[v] for v in data] if as_positions else None
    if as_ids and as_positions and by_position != data and convention == 'auto':
        raise DataError(
            f"{path}: its numbers are both ids and positions of {ds.name}; "
            "give convention='ids' or 'positions'"
        )
    if as_ids and convention != 'positions':
        return data, 'image ids'
    if as_positions and convention != 'ids':
        return by_position, 'positions in the data set'
    odd = next((v for v in data if v not in known), None)
    raise DataError(f"{path}: {odd!r} is not an image of {ds.name}; the list belongs to other data")


# %%
#| export
def split_from_ids(
    ds,  # data set
    labelled,  # image ids
    percent=None,  # recorded only
    fold: int = 0,  # recorded only
    dev: int = 0,  # development images, taken from those that are not labelled
    seed: int = 0,  # of the hashes that order the rest
) -> Split:
    "A split whose labelled images are given; the order of the rest is that of `make_split`"
    labelled = [_plain(i) for i in labelled]
    known, chosen = {_plain(i) for i in ds.ids}, set(labelled)
    if not labelled:
        raise DataError(f'{ds.name}: no labelled image given')
    if len(chosen) < len(labelled):
        twice = next(i for i, n in Counter(labelled).items() if n > 1)
        raise DataError(f'{ds.name}: image {twice!r} is listed twice among the labelled ones; list it once')
    if chosen - known:
        raise DataError(f'{ds.name}: {sorted(map(str, chosen - known))[0]} is not an image of this data set')
    rest = rank_ids(known - chosen, seed, 'dev')
    if dev > len(rest):
        raise DataError(
            f'{ds.name}: {len(rest)} images besides the labelled ones cannot give {dev} development images; '
            'lower dev'
        )
    unlabelled = rank_ids(rest[dev:], seed, fold)
    count = None if percent is not None else len(labelled)
    return Split(labelled, unlabelled, rest[:dev], percent, count, fold, seed, ds.fingerprint(), ds.name)


# %%
#| export
def read_index_list(
    path,  # JSON: a list of ids, a list of positions, or {percent: {fold: [positions]}}
    ds,  # the data set that the list is about
    percent=None,  # for the nested form
    fold=None,  # for the nested form
    convention: str = 'auto',  # 'ids' or 'positions' (in the order of the data set) for an ambiguous list
    dev: int = 0,  # development images, taken from those that the list leaves unlabelled
    seed: int = 0,  # of the hashes that order the rest
):  # (Split with the labelled images in the order of the file; how the list was interpreted)
    "Read another project's list of labelled images and say how it was interpreted"
    ids, found = _read_ids(path, ds, percent, fold, convention)
    try:
        return split_from_ids(ds, ids, percent, fold or 0, dev, seed), found
    except DataError as e:
        raise DataError(f'{path}: {e}') from None


# %%
with tempfile.TemporaryDirectory() as tmp:
    Path(f'{tmp}/ut.json').write_text('{"10.0": {"1": [0, 7]}}')
    nested, nested_how = read_index_list(f'{tmp}/ut.json', twenty, percent=10, fold=1, dev=4)
    Path(f'{tmp}/plain.json').write_text('[103, 119]')
    plain, plain_how = read_index_list(f'{tmp}/plain.json', twenty)
assert nested.labelled == [100, 107] and plain.labelled == [103, 119]
print(nested_how, '|', plain_how)
nested

# %% [markdown]
# ## Summary
#
# * A split is a ranking of hashed image ids: same data, same list, on every machine.
# * Percentages are nested within a fold; folds are different shuffles; a percentage of the whole data set is
#   rounded down.
# * Development images are fixed before folds and percentages, and settings are chosen on them alone.
# * A stored split carries a fingerprint and refuses other data.
# * Lists of other projects become splits, and the interpretation that was taken is named.
#
# ## Exercises
#
# 1. Two folds of 10 % share about 1 % of the images. Why? Check it with `Sixty` and more folds.
# 2. Add one image to a data set of 1000. How many images of the 10 % list can change? What would a seeded
#    `shuffle` have done?
# 3. Why does `cover_classes` bias the labelled images towards rare classes, and when would that flatter a
#    result?
