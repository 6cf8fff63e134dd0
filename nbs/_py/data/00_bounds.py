# %% [markdown]
# # Bounds of a data set {#sec-bounds}
#
# > Refuse an image that would fill the memory, and see which files lie outside of their folder.

# %%
#| default_exp data.bounds

# %% [markdown]
# *Why.* Two things that a data set from elsewhere can do go unseen until they hurt. A PNG of 20 kB can hold
# 13,000 by 13,000 pixels of one colour; decoded and copied they are 2 GB. And an annotation file can name
# `../../private/a.jpg`, or a link can lead there: the image is learnt from, drawn and written out, although
# nobody gave that folder. The first is refused before decoding. The second has honest uses, such as images
# on another disk, so it is said in one line with the first path.

# %%
#| export
import os
import warnings
from pathlib import Path
from PIL import Image
from semidetr.core import ConfigError

# %%
import tempfile
import matplotlib.pyplot as plt
import numpy as np

# %% [markdown]
# ## Pixels
#
# The header tells the size, so the check costs nothing. The limit is the number above which Pillow warns,
# `PIL.Image.MAX_IMAGE_PIXELS`, 89 megapixels; Pillow itself decodes up to twice as many. Whoever has larger
# images and the memory sets the variable `SEMIDETR_MEGAPIXELS`, which processes of a loader inherit.

# %%
#| export
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)  # refused below, not warned of


def most_pixels(
    text: str,  # of the variable: millions of pixels
    default: int | None = Image.MAX_IMAGE_PIXELS,
) -> int | None:
    "Pixels that an image may have; `ConfigError` if the text is no positive number"
    if not text:
        return default
    try:
        most = int(float(text) * 1e6)
    except (ValueError, OverflowError):
        most = 0
    if most < 1:
        raise ConfigError(f'SEMIDETR_MEGAPIXELS={text}: no positive number; set it to, e.g., 200')
    return most


Image.MAX_IMAGE_PIXELS = most_pixels(os.environ.get('SEMIDETR_MEGAPIXELS', ''))


def bounded(
    img,  # PIL image, not yet decoded
):  # the same
    "An image that may be decoded; `DecompressionBombError` if it has too many pixels"
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and img.width * img.height > most:
        img.close()
        raise Image.DecompressionBombError(f'{img.width} x {img.height} pixels')
    return img


# %%
assert most_pixels('200') == 200_000_000 and most_pixels('') == Image.MAX_IMAGE_PIXELS
root = Path(tempfile.mkdtemp())
Image.new('1', (13_000, 13_000)).save(root / 'large.png')
size = (root / 'large.png').stat().st_size
try:
    bounded(Image.open(root / 'large.png'))
except Image.DecompressionBombError as e:
    refusal = str(e)
assert refusal == '13000 x 13000 pixels' and size < 40_000
size, refusal


# %% [markdown]
# ## Places
#
# A name leads outside if the folder that it ends in lies, links resolved, in none of the given folders. Links
# to single files are found in the listing of their folder, which costs one call per folder, not per file.

# %%
#| export
def _within(path, roots):
    return any(path == r or path.startswith(r.rstrip(os.sep) + os.sep) for r in roots)


def _links(folder):
    "Names of the links in a folder"
    try:
        with os.scandir(folder) as entries:
            return {e.name for e in entries if e.is_symlink()}
    except OSError:
        return set()


def outside(
    folder,  # of the images
    names,  # paths relative to it, as annotations give them
    homes=(),  # further folders that the images may lie in
) -> tuple[int, str]:  # how many lead out of all these folders, the first of them with its target
    "Count names that lead out of the folders of a data set by `..`, as absolute paths or by links"
    roots = [os.path.realpath(d) for d in (folder, *homes)]
    known, count, first = {}, 0, ''
    for name in names:
        head, tail = os.path.split(name)
        if head not in known:
            place = os.path.realpath(os.path.join(folder, head))
            known[head] = _within(place, roots), _links(place)
        inside, links = known[head]
        target = os.path.join(folder, name)
        if inside and tail in links:
            inside = _within(os.path.realpath(target), roots)
        if not inside:
            count += 1
            first = first or f'{name!r}, which is {os.path.realpath(target)}'
    return count, first


# %%
for part in ('mine/a.jpg', 'other/b.jpg'):
    (root / part).parent.mkdir()
    (root / part).write_bytes(b'x')
(root / 'mine/c.jpg').symlink_to(root / 'other/b.jpg')
(root / 'mine/d.jpg').symlink_to(root / 'mine/a.jpg')
found = outside(root / 'mine', ['a.jpg', 'c.jpg', 'd.jpg', '../other/b.jpg', str(root / 'other/b.jpg')])
assert found[0] == 3 and found[1].startswith("'c.jpg'")
assert outside(root / 'mine', ['../other/b.jpg'], [root / 'other']) == (0, '')
found[0]

# %%
#| label: fig-bounds-pixels
#| fig-cap: "One colour compresses to nearly nothing: the file grows to 30 kB where the decoded image takes half a gigabyte, so the size of a file says nothing about its pixels."
#| fig-alt: "Two curves over the side of a square image on logarithmic axes: the decoded bytes rise from a million to a billion, the bytes of the file stay below a hundred thousand."
sides = np.array([500, 1000, 2000, 4000, 8000])
on_disk = []
for side in sides:
    Image.new('1', (int(side), int(side))).save(root / 'one.png')
    on_disk.append((root / 'one.png').stat().st_size)
fig, ax = plt.subplots(figsize=(5, 2.6), dpi=80)
ax.loglog(sides, 3.0 * sides**2, 'o-', label='decoded, RGB')
ax.loglog(sides, on_disk, 'o-', label='file')
ax.axvline(Image.MAX_IMAGE_PIXELS**0.5, color='grey', linestyle='--', linewidth=0.8)
ax.set(xlabel='side in pixels', ylabel='bytes')
ax.legend(fontsize=9)
plt.show()

# %% [markdown]
# ## Summary
#
# * `bounded` refuses an image by its header, before a pixel is decoded.
# * `outside` counts names that lead out of the folders that were given, links resolved.
#
# ## Exercises
#
# 1. Why is the size of the file no bound on the memory that an image takes?
# 2. A folder is a link to another disk. Are the images in it outside? What if only one of them is a link?
