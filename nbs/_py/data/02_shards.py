# %% [markdown]
# # Images in archives {#sec-shards}
#
# > Use a pool of millions of unlabelled images as a few hundred tar files, in any order and from any step.

# %%
#| default_exp data.shards

# %% [markdown]
# *Why.* Ten million small files are slow to copy, to list and to back up, and some file systems run out of
# entries before they run out of space. A common remedy, known from WebDataset, is to put the images of a
# pool into tar files of about a gigabyte, *shards*. Programs that stream shards from the beginning can
# shuffle only what is in a buffer, and after an interruption they have to find their place again. Nothing of
# that is needed: a plain tar file stores each image in one piece, so an index of places makes every image as
# reachable as a file in a folder. Drawing, seeds and resuming (@sec-loader) then are those of a folder.
#
# With shards $k = 0, 1, \dots$ that hold $n_k$ images, image number $i$ is in the shard $k$ with
#
# $$
# c_k \le i < c_{k+1}, \qquad c_k = \sum_{j<k} n_j,
# $$ {#eq-shards-place}
#
# at the byte `start[i]`, and takes `size[i]` bytes.

# %%
#| export
import io
import os
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple
import numpy as np
from PIL import Image
from semidetr.core import DataError, printable
from semidetr.data.bounds import bounded
from semidetr.data.columns import Texts
from semidetr.data.datasets import DetectionDataset, Sample, no_objects
from semidetr.data.files import TILES, Fault, PixelRange, decode_image, image_suffixes, reason, upright_size

# %%
import tempfile
import matplotlib.pyplot as plt
from semidetr.data.datasets import ImageFolder

# %% [markdown]
# ## Names of shards
#
# `pool-{0000..0099}.tar` stands for a hundred files. A folder of tar files, or a single one, will do as well.

# %%
#| export
_RANGE = re.compile(r'(.*)\{(\d{1,9})\.\.(\d{1,9})\}([^{}]*\.tar)', re.S)
_MOST_SHARDS = 100_000


def shard_range(
    spec: str,  # such as 'pool-{0000..0099}.tar'
):  # list of paths as text, or None if it is not of this form
    "The files that a range of numbers stands for; DataError for a range that is empty or too long"
    found = _RANGE.fullmatch(spec)
    if not found:
        return None
    head, first, last, tail = found.groups()
    numbers = range(int(first), int(last) + 1)
    if not 0 < len(numbers) <= _MOST_SHARDS:
        raise DataError(f'{spec}: {first}..{last} are {len(numbers)} shards; give 1 to {_MOST_SHARDS:,}')
    return [f'{head}{n:0{len(first)}}{tail}' for n in numbers]


# %%
assert shard_range('images') is None and shard_range('a{9..10}.tar') == ['a9.tar', 'a10.tar']
shard_range('pool-{008..010}.tar')

# %% [markdown]
# ## The index
#
# `tarfile` walks from header to header and skips the pixels. Directories and hidden files count for nothing,
# as in a folder. Links, devices, files that are no images, and images that are cut off are counted and said.
# A compressed archive has no places to go to and is refused.

# %%
#| export
_LARGEST = 512 * 10**6  # bytes of one image in its file


def _kind(member, end, known):
    "Why a member of an archive is left out; '' if it is an image; None if it counts for nothing"
    parts = member.name.split('/')
    if member.isdir() or any(p[:1] == '.' and p not in ('.', '..') or p == '__MACOSX' for p in parts):
        return None
    if not member.isreg() or member.issparse():
        return 'links or devices'
    suffix = os.path.splitext(member.name)[1].lower()
    if suffix not in known:
        return suffix or 'no suffix'
    if member.offset_data + member.size > end:
        return 'cut off'
    return 'too large' if member.size > _LARGEST else ''


def _members(tar, left_out):
    "Entries of an open archive; one that breaks off, or has a damaged header, is counted in `left_out`"
    member = tar.next()
    while member is not None:
        yield member
        tar.members.clear()  # it keeps them all
        try:
            member = tar.next()
        except tarfile.TarError:
            member = None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(512) != bytes(512):
        left_out['the end'] += 1


# %%
#| export
def index_shard(
    path,  # tar file
    known=None,  # suffixes of images; None: those that can be read
) -> tuple[list, list, list, Counter]:  # names, first bytes, numbers of bytes; what was left out
    "Where the images of an archive are; DataError if it is not a plain tar file"
    names, starts, sizes, left_out = [], [], [], Counter()
    known, end = image_suffixes() if known is None else known, 0
    try:
        if not os.path.isfile(path):
            raise FileNotFoundError
        end = os.path.getsize(path)
        with tarfile.open(path, 'r:') as tar:
            for member in _members(tar, left_out):
                kind = _kind(member, end, known)
                if kind == '':
                    names.append(printable(member.name.removeprefix('./')))
                    starts.append(member.offset_data)
                    sizes.append(member.size)
                elif kind:
                    left_out[kind] += 1
    except (tarfile.TarError, OSError, ValueError, OverflowError, EOFError) as e:
        what = 'no such file' if isinstance(e, FileNotFoundError) else f'cannot be read ({reason(e)})'
        cure = 'restore it' if os.path.isfile(path) else 'give shards that exist'
        raise DataError(
            f'{path}: {what}; {cure}; a shard is a plain tar file, not a compressed one'
        ) from None
    return names, starts, sizes, left_out


# %%
root = Path(tempfile.mkdtemp())
(root / 'photos').mkdir()
for n in range(5):
    Image.new('RGB', (40 + n, 30), (50 * n, 120, 90)).save(root / f'photos/{n}.png')
(root / 'photos/notes.txt').write_text('x')
for k, inside in enumerate((('0.png', '1.png', 'notes.txt'), ('2.png', '3.png', '4.png'))):
    with tarfile.open(root / f'pool-{k}.tar', 'w') as tar:
        for name in inside:
            tar.add(root / 'photos' / name, arcname=name)
index_a = index_shard(root / 'pool-0.tar')
assert index_a[0] == ['0.png', '1.png'] and index_a[3] == {'.txt': 1}
index_a[1], index_a[2]


# %% [markdown]
# ## The data set
#
# The id of an image is its name in the archive; if two archives use the same name, the later one gets the
# name of its archive in front, with a number if that is not enough. Each access opens the archive, reads the
# bytes of one image, and closes it: nothing is shared between worker processes.

# %%
#| export
def _unique(groups, shards):
    "Names of all images; a name that was used before gets that of its shard in front"
    out, used = [], set()
    for names, shard in zip(groups, shards):
        for name in names:
            new, n = name, 1
            while new in used:
                new, n = f'{shard.name}/{name}' if n == 1 else f'{shard.name}/{n}/{name}', n + 1
            used.add(new)
            out.append(new)
    return out


# %%
#| export
class InShard(NamedTuple):
    "An image in a tar file"

    shard: Path
    start: int  # first byte
    size: int  # bytes
    name: str  # id of the image

    def __str__(self):
        return f'{self.shard}: {self.name}'


def place_of(
    image,  # path of an image, or `InShard`
) -> tuple:  # (what is equal for one place on the disk, bytes)
    "Where an image is, under whatever name; OSError if it is not there"
    if isinstance(image, InShard):
        return image[:2], image.size
    found = os.stat(image)
    return (found.st_dev, found.st_ino), found.st_size


def first_bytes(
    image,  # path of an image, or `InShard`
    size: int = -1,  # at most so many; -1: all
) -> bytes:
    "The beginning of an image in its format, not decoded"
    path, start, whole = image[:3] if isinstance(image, InShard) else (image, 0, -1)
    with open(path, 'rb') as f:
        f.seek(start)
        return f.read(whole if size < 0 else size if whole < 0 else min(size, whole))


# %%
#| export
class _Shards(DetectionDataset):
    "Places of images in tar files"

    has_boxes = False

    def __init__(
        self,
        paths: list,  # tar files, in the order of the images
        where: str = '',  # how they were given, for messages
    ):
        self.shards, self.where = [Path(p) for p in paths], where or str(paths[0])
        self.name, self.classes, self.faults = Path(self.where).name, [], []
        found, left_out = [index_shard(p) for p in self.shards], Counter()
        for *_, counts in found:
            left_out.update(counts)
        self._first = np.cumsum([0, *(len(names) for names, *_ in found)])  # c_k
        self._starts = np.concatenate([np.array(starts, dtype=np.int64) for _, starts, _, _ in found])
        self._sizes = np.concatenate([np.array(sizes, dtype=np.int64) for _, _, sizes, _ in found])
        self.ids = self.files = Texts.of(_unique([names for names, *_ in found], self.shards))
        self._say(left_out)
        self.notes = [str(f) for f in self.faults]
        if not len(self):
            raise DataError(f'{self.where}: no image in {len(self.shards)} tar files; give others')

    def _say(self, counts):
        "Lines about what was left out"
        ends = counts.pop('the end', 0)
        if counts:
            text = ', '.join(f'{n} {kind}' for kind, n in counts.most_common(8))
            cure = 'fine if they belong to the images, such as captions'
            self.faults.append(
                Fault('warning', 'skipped-files', self.where, f'not read as images: {text}', cure)
            )
        if ends:
            item = f'{ends} tar files break off or are damaged, and what comes after that is not read'
            cure = 'compare their sizes with the originals'
            self.faults.append(Fault('warning', 'cut-off', self.where, item, cure))

    def place(
        self,
        i: int,  # number of an image
    ) -> InShard:
        "Where an image is (@eq-shards-place)"
        n = range(len(self))[i]
        k = int(np.searchsorted(self._first, n, side='right')) - 1
        return InShard(self.shards[k], int(self._starts[n]), int(self._sizes[n]), self.ids[n])


# %%
#| export
class ShardImages(_Shards):
    "Images in tar files, without boxes: what `data.unlabelled` needs"

    def _open(self, i, use):
        "`use` of the PIL image number i, not yet decoded; a DataError names it"
        place = self.place(i)
        try:
            with bounded(Image.open(io.BytesIO(first_bytes(place)))) as img:
                return use(img)
        except Exception as e:
            cure = 'restore the shard, or leave the image out with data.skip_broken=1 or more'
            if isinstance(e, PixelRange):
                cure = 'set data.white: the value of a white pixel, e.g. 1, 255 or 65535'
            elif isinstance(e, Image.DecompressionBombError):
                cure = TILES
            item = f'image {place.name!r} cannot be read ({reason(e)})'
            raise DataError(f'{place.shard}: {item}; {cure}') from None

    def annotation(self, i: int) -> dict:
        return dict(no_objects(), area=no_objects()['boxes'][:, 0], size=self._open(i, upright_size))

    def __getitem__(self, i: int) -> Sample:
        image = self._open(i, lambda img: decode_image(img, None, getattr(self, 'white', 0)))
        return Sample(image, self.ids[i], **no_objects(), path=None)


# %%
pool = ShardImages([root / 'pool-0.tar', root / 'pool-1.tar'])
assert (
    pool.ids == [f'{n}.png' for n in range(5)]
    and pool[3].size == (30, 43)
    and pool.annotation(4)['size'] == (30, 44)
)
twice = ShardImages([root / 'pool-0.tar', root / 'pool-0.tar'])
assert twice.ids[2:] == ['pool-0.tar/0.png', 'pool-0.tar/1.png']
pool, pool.notes[0].partition(': ')[2]

# %% [markdown]
# The same pixels come from a folder of the same images:

# %%
as_files = ImageFolder(root / 'photos')
assert as_files.ids == pool.ids
assert all(as_files[n].image.tobytes() == pool[n].image.tobytes() for n in range(5))
pool.place(2)[1:3], pool[2].image.getpixel((0, 0))

# %%
#| label: fig-shards-places
#| fig-cap: "Two shards and the bytes of their images: any of them is reached by one jump."
#| fig-alt: "Two horizontal bars, one per tar file, with coloured stretches at the places of images 0 to 4 and grey between them."
fig, ax = plt.subplots(figsize=(5, 1.8), dpi=80)
for n in range(5):
    shard, begin, length, _ = pool.place(n)
    row = pool.shards.index(shard)
    ax.barh(row, length, left=begin, height=0.5, color=f'C{n}')
    ax.text(begin, row + 0.32, str(n), fontsize=9)
for row, shard in enumerate(pool.shards):
    ax.barh(row, pool._starts.max() + 1024, height=0.5, color='lightgrey', zorder=0)
ax.set(yticks=[0, 1], yticklabels=[s.name for s in pool.shards], xlabel='byte', ylim=(-0.5, 1.7))
plt.show()

# %% [markdown]
# ## Summary
#
# * `InShard` is to an image in a shard what a path is to a file: both can be compared (@sec-checks).
# * `shard_range` unfolds `pool-{0000..0099}.tar`; `index_shard` lists the images of one archive.
# * `ShardImages` is a data set like a folder: image $i$ is one jump away, so nothing else changes.
#
# ## Exercises
#
# 1. Why can a compressed archive not be used so?
# 2. The index is made anew at each start. What does it read of a shard of a gigabyte with 10,000 images?
