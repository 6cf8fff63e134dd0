# %% [markdown]
# # Columns of a data set {#sec-columns}
#
# > Hold a million images in a few arrays, and open them again in seconds from a cache that is verified.

# %%
#| default_exp data.columns

# %% [markdown]
# *Why.* A Python object costs 50 to 250 bytes before it holds anything, and the garbage collector visits it
# again and again. Ten million boxes as dictionaries are 8 GB; the same boxes are 290 MB as arrays. And a file
# of a gigabyte is parsed again by every command and by every process, always with the same result. So a data
# set is a handful of arrays here: numbers as they are, texts in one buffer, and boxes sorted by image. Arrays
# can be written to the disk and mapped from there, which takes no time and no memory of its own.
#
# With $A$ boxes in $N$ images, image $i$ owns the rows
#
# $$
# \{ k : s_i \le k < s_{i+1} \}, \qquad s_0 = 0,\; s_N = A
# $$ {#eq-columns-rows}
#
# of every column of boxes, where $s$ is the array `starts`.

# %%
#| export
import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
import numpy as np
from semidetr.core import tell

# %%
import tempfile
import matplotlib.pyplot as plt
import sys

# %% [markdown]
# ## Texts and numbers
#
# Both behave like lists that cannot be changed: an item is a `str` or an `int` of Python, made when it is
# asked for.

# %%
#| export
_BLOCK = 1 << 16  # items that iteration unpacks at once


class _Column(Sequence):
    "What both kinds of columns share; subclasses define `_slice` and `__len__`"

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(len(self))[i]]
        n = range(len(self))[i]
        return self._slice(n, n + 1)[0]

    def __iter__(self):
        for start in range(0, len(self), _BLOCK):
            yield from self._slice(start, min(start + _BLOCK, len(self)))

    def __eq__(self, other):
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = None

    def __repr__(self):
        return repr([*self[:6], ...] if len(self) > 6 else self[:6])


class Numbers(_Column):
    "Whole numbers in one array"

    def __init__(
        self,
        values,  # (N,) int64
    ):
        self._values = values

    def __len__(self):
        return len(self._values)

    def _slice(self, start, end):
        return self._values[start:end].tolist()


class Texts(_Column):
    "Texts in one buffer of bytes"

    def __init__(
        self,
        data,  # (B,) uint8: all texts as UTF-8, one after another
        ends,  # (N+1,) int64: text n is data[ends[n]:ends[n+1]]
    ):
        self._data, self._ends = data, ends

    @classmethod
    def of(
        cls,
        texts,  # list of str
    ):  # Texts
        "Pack a list"
        parts = [t.encode('utf-8', 'surrogatepass') for t in texts]
        ends = np.zeros(len(parts) + 1, dtype=np.int64)
        np.cumsum([len(p) for p in parts], out=ends[1:])
        return cls(np.frombuffer(b''.join(parts), np.uint8), ends)

    def __len__(self):
        return len(self._ends) - 1

    def _slice(self, start, end):
        ends = self._ends[start : end + 1].tolist()
        raw, first = self._data[ends[0] : ends[-1]].tobytes(), ends[0]
        return [str(raw[a - first : b - first], 'utf-8', 'surrogatepass') for a, b in zip(ends, ends[1:])]


# %%
names = Texts.of(['a.jpg', 'sub/ä.jpg', ''])
numbers = Numbers(np.array([7, 3, 5]))
assert names == ['a.jpg', 'sub/ä.jpg', ''] and names[-2] == 'sub/ä.jpg' and list(numbers) == [7, 3, 5]
assert type(numbers[0]) is int and numbers.index(3) == 1 and [3, 7] != numbers and numbers[1:] == [3, 5]
names._data.nbytes, names._ends.tolist()


# %% [markdown]
# Image ids are numbers or texts. A mixture of both, or a number of more than 64 bits, stays a list.

# %%
#| export
def as_column(
    values,  # list of numbers, of texts, or of both
):  # Numbers, Texts, or the list
    "The column that holds these values unchanged"
    kinds = set(map(type, values))
    if kinds == {str}:
        return Texts.of(values)
    if kinds == {int} and -(2**63) <= min(values) and max(values) < 2**63:
        return Numbers(np.array(values, dtype=np.int64))
    return list(values)


def joined(
    columns,  # list of columns of one kind
):  # one column
    "Columns one after another"
    if all(isinstance(c, Numbers) for c in columns):
        return Numbers(np.concatenate([c._values for c in columns]))
    lengths = np.concatenate([np.diff(c._ends) for c in columns])
    ends = np.concatenate([[0], np.cumsum(lengths)])
    return Texts(np.concatenate([c._data for c in columns]), ends)


# %%
assert isinstance(as_column(['7', 7]), list) and isinstance(as_column([2**64]), list)
assert joined([names, as_column(['b'])]) == ['a.jpg', 'sub/ä.jpg', '', 'b']
joined([numbers, as_column([9])])


# %% [markdown]
# ## All columns

# %%
#| export
@dataclass
class Columns:
    "What an annotation file says, boxes clipped and sorted by image (@eq-columns-rows)"

    ids: object  # column of N numbers or texts
    files: object  # column of N texts: paths below the folder of the images
    sizes: np.ndarray  # (N,2) int64: height, width; -1 where the file does not say
    starts: np.ndarray  # (N+1,) int64
    boxes: np.ndarray  # (A,4) float32, xyxy pixels
    labels: np.ndarray  # (A,) int64
    ignore: np.ndarray  # (A,) bool
    area: np.ndarray  # (A,) float32
    classes: list  # label -> name
    cat_ids: list  # label -> category id
    dropped: int = 0  # boxes without area
    has_boxes: bool = True  # does the file hold annotations?


# %%
def toy_columns(n, per=10):
    "Columns of n images with `per` boxes each"
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 400, (per * n, 2))
    drawn = np.concatenate([low, low + 50], 1).astype(np.float32)
    return Columns(
        ids=Numbers(np.arange(n)),
        files=Texts.of([f'{i:08}.jpg' for i in range(n)]),
        sizes=np.full((n, 2), 480),
        starts=np.arange(n + 1) * per,
        boxes=drawn,
        labels=rng.integers(0, 3, per * n),
        ignore=np.zeros(per * n, dtype=bool),
        area=np.full(per * n, 2500, dtype=np.float32),
        classes=['a', 'b', 'c'],
        cat_ids=[1, 2, 3],
    )


toy = toy_columns(3)
second = toy.boxes[toy.starts[1] : toy.starts[2]]
assert second.shape == (10, 4)
second[0].round(1).tolist()

# %% [markdown]
# ## The cache
#
# Its key is the SHA-256 of the whole annotation file, so it does not matter where the file lies, and a file
# that was changed in any way has another key: no time stamp is trusted. Every array is written with its own
# digest, and what does not agree is as good as not there. Nothing is ever unpickled.
#
# The cache is `$SEMIDETR_CACHE`, or else `semidetr` in `$XDG_CACHE_HOME` or `~/.cache`. With
# `SEMIDETR_ANNOTATIONS=off` there is none, and one that cannot be written is said in a line. It keeps the files
# that were used last, and may be deleted at any time.

# %%
#| export
_FORMAT, _KEPT, _STALE = (
    1,
    16,
    86400,
)  # of the entries; entries that are kept; seconds until a rest is removed


def cache_folder():  # Path, or None
    "Where parsed annotations are kept"
    if os.environ.get('SEMIDETR_ANNOTATIONS', '').strip().lower() == 'off':
        return None
    if given := os.environ.get('SEMIDETR_CACHE'):
        return Path(given) / 'annotations'
    home = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    return Path(home) / 'semidetr' / 'annotations' if os.path.isabs(home) else None


def file_digest(
    path,  # file
) -> str:  # 64 hex digits
    "SHA-256 of the content of a file"
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


def _flat(columns):
    "({name: array}, {name: plain value}) of all columns"
    arrays, plain = {}, {}
    for f in fields(columns):
        value = getattr(columns, f.name)
        if isinstance(value, Texts):
            arrays[f.name], arrays[f'{f.name}_ends'] = value._data, value._ends
        elif isinstance(value, Numbers):
            arrays[f.name] = value._values
        else:
            (arrays if isinstance(value, np.ndarray) else plain)[f.name] = value
    return arrays, plain


def _columns(arrays, plain):
    "The inverse of `_flat`"
    ids = arrays.pop('ids')
    ends = arrays.pop('ids_ends', None)
    ids = Numbers(ids) if ends is None else Texts(ids, ends)
    files = Texts(arrays.pop('files'), arrays.pop('files_ends'))
    return Columns(ids=ids, files=files, **arrays, **plain)


# %%
flat, plain_values = _flat(toy)
assert _columns(dict(flat), plain_values).files == toy.files
list(flat), plain_values


# %%
#| export
def _write(folder, columns):
    "All columns as files in a new folder, and their digests"
    arrays, plain = _flat(columns)
    for name, value in arrays.items():
        np.save(folder / f'{name}.npy', value, allow_pickle=False)
    digests = {name: file_digest(folder / f'{name}.npy') for name in arrays}
    text = json.dumps(dict(plain=plain, digests=digests))
    check = hashlib.sha256(text.encode()).hexdigest()
    (folder / 'columns.json').write_text(f'{check}\n{text}')


def _prune(home):
    "Remove the entries that were not used for longest, and what killed writers left"
    entries = sorted(home.iterdir(), key=lambda d: d.stat().st_mtime, reverse=True)
    rests = [d for d in entries if d.name.startswith('.')]
    for d in [d for d in entries if d not in rests][_KEPT:]:
        shutil.rmtree(d, ignore_errors=True)
    for d in rests:
        if time.time() - d.stat().st_mtime > _STALE:
            shutil.rmtree(d, ignore_errors=True)


def store_columns(
    digest: str,  # of the annotation file
    columns: Columns,
) -> bool:  # was it written?
    "Keep the columns of a file; a cache that cannot be written is said in a line"
    home = cache_folder()
    if home is None or isinstance(columns.ids, list):
        return False
    target, part = home / f'{_FORMAT}-{digest}', home / f'.{digest[:16]}.{os.getpid()}'
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        part.mkdir()
        _write(part, columns)
        shutil.rmtree(target, ignore_errors=True)  # damaged, or it would have been read
        os.rename(part, target)
        _prune(home)
    except OSError as e:
        shutil.rmtree(part, ignore_errors=True)
        if not target.is_dir():  # otherwise another process was faster
            tell([f'{home}: parsed annotations are not kept ({e.strerror}); SEMIDETR_CACHE names a folder'])
            return False
    return True


# %%
#| export
def _mapped(path, digest):
    "An array on the disk; ValueError if it is not what was written"
    if file_digest(path) != digest:
        raise ValueError(f'{path} is damaged')
    mode = 'r' if path.stat().st_size > 4096 else None  # an empty array cannot be mapped
    return np.asarray(np.load(path, mmap_mode=mode, allow_pickle=False))


def cached_columns(
    digest: str,  # of the annotation file
):  # Columns, or None
    "The columns of a file that was parsed before; None if there are none, or if they are damaged"
    home = cache_folder()
    if home is None:
        return None
    folder = home / f'{_FORMAT}-{digest}'
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        check, _, text = (folder / 'columns.json').read_text().partition('\n')
        if hashlib.sha256(text.encode()).hexdigest() == check:
            known = json.loads(text)
            arrays = {k: _mapped(folder / f'{k}.npy', d) for k, d in known['digests'].items()}
            with contextlib.suppress(OSError):
                os.utime(folder)  # used last
            return _columns(arrays, known['plain'])
    return None


# %%
before = os.environ.get('SEMIDETR_CACHE')
os.environ['SEMIDETR_CACHE'] = tempfile.mkdtemp()
key = hashlib.sha256(b'content of an annotation file').hexdigest()
assert cached_columns(key) is None and store_columns(key, toy_columns(400))
again = cached_columns(key)
assert again.ids == range(400) and (again.boxes == toy_columns(400).boxes).all()
stored = next(cache_folder().iterdir()) / 'boxes.npy'
content = bytearray(stored.read_bytes())
content[-1] ^= 1
stored.write_bytes(content)
assert cached_columns(key) is None
type(again.boxes.base).__name__, sorted(p.name for p in stored.parent.iterdir())

# %%
if before is None:
    del os.environ['SEMIDETR_CACHE']
else:
    os.environ['SEMIDETR_CACHE'] = before
cache_folder() == stored.parent.parent


# %% [markdown]
# ## How many bytes
#
# A box takes 29 bytes, whatever its class: 16 for four corners, 8 for the label, 4 for the area and one for
# the flag. An image takes its name and 40 bytes.

# %%
def per_image(columns):
    "Bytes of the arrays per image"
    return sum(a.nbytes for a in _flat(columns)[0].values()) / len(columns.ids)


entry = dict(image_id=1, category_id=2, bbox=[1.5, 2.5, 3.5, 4.5], area=12.5, iscrowd=0, id=3)
objects = sys.getsizeof(entry) + sys.getsizeof(entry['bbox']) + 5 * sys.getsizeof(1.5) + 32
box_bytes = per_image(toy_columns(1000)) - per_image(toy_columns(1000, 9))
assert round(box_bytes) == 29 and objects > 300
round(per_image(toy_columns(1000, 0))), round(box_bytes), objects

# %%
#| label: fig-columns-bytes
#| fig-cap: "Ten boxes per image: as Python objects a million images need some 4 GB, as arrays a tenth of that."
#| fig-alt: "Two bars on a logarithmic axis: dictionaries at about 4000 bytes per image, arrays at about 350."
fig, ax = plt.subplots(figsize=(5, 1.8), dpi=80)
ax.barh(['dictionaries', 'arrays'], [10 * objects, per_image(toy_columns(1000))], color=['grey', 'C0'])
ax.set(xscale='log', xlim=(100, 10_000), xlabel='bytes per image with ten boxes')
plt.show()

# %% [markdown]
# ## Summary
#
# * `Columns` holds a data set in arrays; `Texts` and `Numbers` behave like lists.
# * `store_columns` and `cached_columns` keep them on the disk, under the digest of the annotation file.
#
# ## Exercises
#
# 1. Which change of an annotation file would a key of size and time miss?
# 2. Why is the digest of each array verified, although the folder belongs to the user?
