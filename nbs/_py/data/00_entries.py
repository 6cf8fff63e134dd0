# %% [markdown]
# # Values in annotation files {#sec-entries}
#
# > Read flags, areas and ids in every unambiguous spelling, and leave the others to be refused.

# %%
#| default_exp data.entries

# %% [markdown]
# *Why.* A table of annotations goes through a spreadsheet and comes back with text where numbers were. In most
# languages the text "0" is true, so that every object becomes a crowd region: nothing is learnt, and nothing
# is reported. Here such values get the meaning that they had. What could mean two things keeps its form, and
# the rules of @sec-records refuse it.

# %%
#| export
import re
from collections import Counter
from itertools import chain
from typing import NamedTuple
import numpy as np

# %%
#| export
FLAGS = ('iscrowd', 'ignore', 'difficult')


def coco_entries(
    data,  # content of a COCO file, perhaps malformed
    key: str,  # 'images', 'annotations' or 'categories'
) -> list[dict]:
    "The objects in one list of a COCO file; empty if there is no such list"
    rows = data.get(key) if isinstance(data, dict) else None
    if not isinstance(rows, list):
        return []
    return rows if all(isinstance(x, dict) for x in rows) else [x for x in rows if isinstance(x, dict)]


def is_id(
    x,  # any value
) -> bool:
    "Can it be the id of an image, a category or an annotation?"
    return isinstance(x, (int, str)) and not isinstance(x, bool)


def as_flag(
    value,  # as found in a file: True, 1, '0', 'yes', None ...
):  # bool, or None if it is none of these
    "The truth value that a number or a word stands for"
    if isinstance(value, (bool, int, float)) or value is None:
        return bool(value) if value in (0, 1, None) else None
    word = str(value).strip().lower()
    if word in ('1', 'true', 'yes', 'y', 't', 'on', '1.0'):
        return True
    return False if word in ('0', 'false', 'no', 'n', 'f', 'off', '0.0', '', 'none', 'null') else None


# %%
assert [as_flag(v) for v in ('0', 'True', 1, None, 'maybe', 2)] == [False, True, True, False, None, None]
coco_entries(dict(images=[3, dict(id=1)]), 'images')

# %% [markdown]
# Tables that pass through other programs come back with text where numbers were. A column that is text
# throughout has one meaning, and is converted with a note. Where only some entries are text, ids 7 and "7"
# may be two images; those stay as they are, and the rules below refuse them.

# %%
#| export
_AREA = re.compile(r'\s*(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)\s*(?:sq\.? ?)?(?:px|pixels?)?(?:\^2|²)?\s*$')


def as_area(
    value,  # as found in a file: 1504, '1504', '1504 px', None ...
):  # float, 0 if there is none, None if it cannot be read
    "Area of an object in pixels"
    if type(value) is int or type(value) is float:
        return float(value) if abs(value) < 1e300 else None  # None for nan, too
    if value is None or value == '':
        return 0.0
    found = _AREA.match(value) if isinstance(value, str) else None
    return as_area(float(found.group(1))) if found else None


def area_contradicts(
    area,  # () or (N,) in pixels
    size,  # () or (N,) (w + 1) * (h + 1) of the box
):  # bool, () or (N,)
    "Does the area contradict the box? A mask is smaller than its box, but not below one pixel in a large box"
    return (area > size) | ((area < 1) & (size > 144))


def as_number(
    text: str,  # '12', '12.5' ...
) -> float:
    "A number as files write it; ValueError otherwise, also for '1_5', which Python reads as 15"
    if '_' in text:
        raise ValueError(f'{text!r} is not a number')
    return float(text)


def _number(v):  # text -> int or float, else unchanged
    try:
        number = as_number(v) if isinstance(v, str) else v
        return int(number) if isinstance(number, float) and number.is_integer() else number
    except ValueError:
        return v


# %%
assert as_number('1.5') == 1.5 and _number('7') == 7 and _number('1_5') == '1_5'
as_number('1.5')


# %%
#| export
def _convert(rows, key, new):  # a column becomes new(value); -> was anything changed?
    for r in rows:
        r[key] = new(r[key])
    return key


def _match_ids(rows, key, entries):  # ids of one column as the type that the entries have
    kinds, ids = set(map(type, (r.get(key) for r in rows))), [e.get('id') for e in entries]
    if not kinds <= {str, int, float} or (float not in kinds and kinds & set(map(type, ids))):
        return None
    known = {str(_number(i) if isinstance(i, float) else i): i for i in ids if is_id(i)}
    spelt = lambda v: str(_number(v) if isinstance(v, float) else v).strip()
    if len(known) == len(ids) and all(spelt(r[key]) in known for r in rows):
        return _convert(rows, key, lambda v: known[spelt(v)])


def tidy_values(
    data,  # content of a COCO file, changed in place
) -> list[str]:  # columns that were converted
    "Columns of numbers that are text throughout become numbers, ids get the type of the entries they name"
    images, anns, cats = (coco_entries(data, k) for k in ('images', 'annotations', 'categories'))
    out = []
    for rows in (images, cats):
        if rows and all(isinstance(r.get('id'), float) for r in rows):
            out.append(_convert(rows, 'id', _number))
    for key in ('width', 'height'):
        if images and all(isinstance(im.get(key), str) for im in images):
            out.append(_convert(images, key, _number))
    for key, entries in (('image_id', images), ('category_id', cats)):
        if anns and entries and type(anns[0].get(key)) is not type(entries[0].get('id')):
            out.append(_match_ids(anns, key, entries))
    first = anns[0].get('bbox') if anns else None
    if isinstance(first, list) and any(isinstance(v, str) for v in first):
        rows = [a for a in anns if isinstance(a.get('bbox'), list)]
        out.append(_convert(rows, 'bbox', lambda box: [_number(v) for v in box]))
    return list(filter(None, out))


# %%
table = dict(images=[dict(id=1, width='60')], annotations=[dict(image_id='1', bbox=['1', '2', '3.5', '4'])])
assert tidy_values(table) == ['width', 'image_id', 'bbox']
assert as_area('1504 px') == 1504
assert all(as_area(v) is None for v in ('much', '1_5', [3], True, float('nan')))
assert area_contradicts(40, 30) and not area_contradicts(20, 30)
table

# %%
import matplotlib.pyplot as plt

# %%
#| label: fig-entries-flags
#| fig-cap: "Words and numbers that stand for a flag; a word that is neither is refused."
#| fig-alt: "A row of coloured cells with spellings: 0, '0', 'no' and None are off, 1, 'True' and 'yes' are on, 'maybe' is neither."
spellings = (0, '0', 'no', None, 1, 'True', 'yes', 'maybe')
meanings = [as_flag(v) for v in spellings]
fig, ax = plt.subplots(figsize=(6, 0.8), dpi=80)
for n, (value, meaning) in enumerate(zip(spellings, meanings)):
    colour = {True: 'tab:green', False: 'lightgrey', None: 'tab:red'}[meaning]
    ax.add_patch(plt.Rectangle((n, 0), 0.95, 1, color=colour))
    ax.text(n + 0.5, 0.5, repr(value), ha='center', va='center')
ax.set(xlim=(0, len(spellings)), ylim=(0, 1))
ax.axis('off')
plt.show()

# %% [markdown]
# ## Boxes and areas
#
# A box $[x, y, w, h]$ has $x_2 = x + w$ and $y_2 = y + h$. A negative size is refused, because nobody can
# tell what was meant. A box of size zero is dropped and counted. A box that leaves the image a little is
# clipped; one that lies outside altogether is refused, since it indicates a wrong scale or a wrong order of
# the numbers.

# %%
#| export
_NUMBERS = frozenset((int, float))


def bbox_fault(
    bbox,  # as found in a file
    size,  # (H, W) of the image, None if unknown
):  # (kind, what is wrong) or None
    "What is wrong with a box"
    if not isinstance(bbox, (list, tuple)) or len(bbox) != 4:
        return 'bad-bbox', 'is not four numbers'
    if not _NUMBERS.issuperset(map(type, bbox)):
        return 'bad-bbox', 'is not four numbers'
    x, y, w, h = bbox
    if not (-1e9 < x < 1e9 and -1e9 < y < 1e9 and -1e9 < w < 1e9 and -1e9 < h < 1e9):
        return 'not-finite', 'holds a number that is not finite, or has ten digits'
    if w < 0 or h < 0:
        return 'negative-box', 'has x2 < x1 or y2 < y1'
    if w == 0 or h == 0:
        return 'zero-area', 'has no area and is dropped'
    if size is None:
        return None
    H, W = size
    if x >= W or y >= H or x + w <= 0 or y + h <= 0:
        return 'outside', f'lies outside the image of {W:g}x{H:g}'
    if min(x, y) < -1 or x + w > W + 1 or y + h > H + 1:
        return 'overhang', f'overhangs the image of {W:g}x{H:g} and is clipped'
    if min(w, h) < 2:
        return 'tiny-box', 'is under two pixels'


def area_fault(
    area,  # as found in a file
    bbox,  # four numbers x, y, w, h
):  # text, or None
    "What is wrong with the area of an object"
    value = as_area(area)
    if value is None:
        return 'is no number'
    if value and area_contradicts(value, (bbox[2] + 1) * (bbox[3] + 1)):
        return 'contradicts the box'


# %%
for bbox in (
    [1, 2, 10, 20],
    [9, 9, -3, 4],
    [5, 5, 0, 8],
    [-4, 0, 20, 20],
    [700, 9, 5, 5],
    [1, 2, float('nan'), 4],
    '1 2 3 4',
):
    print(bbox, '->', *(bbox_fault(bbox, (40, 60)) or ['fine']))
assert bbox_fault([1, 2, 10, 20], (40, 60)) is None
assert bbox_fault([0, 0, 60.4, 40], (40, 60)) is None  # within a pixel: rounding, not a fault


# %% [markdown]
# ## Many at once
#
# A million annotations are looked at one by one only where something may be wrong. The columns of all of them
# tell where that is: a comparison of arrays takes a thousandth of the time. Which fault it is, if any, decide
# the functions above. Where the columns themselves are unusual, such as ids of two types, every annotation is
# looked at.

# %%
#| export
class Plain(NamedTuple):
    "Columns of N annotations"

    images: list  # ids, all of one type
    cats: list  # likewise
    xywh: np.ndarray  # (N,4) float64, as in the file
    area: np.ndarray  # (N,) float64, 0 for none, nan for what is no number
    flagged: np.ndarray  # (N,) bool: is there a flag that is not 0?


def _of_one_type(values):
    return len(kinds := set(map(type, values))) < 2 and kinds <= {int, str}


def plain_annotations(
    anns: list,  # entries of 'annotations'
):  # Plain, or None
    "Columns of annotations with ids of one type, no id twice, and boxes of four numbers; None for others"
    if set(map(type, anns)) != {dict}:
        return None
    get = lambda k: [a.get(k) for a in anns]
    images, cats, boxes, used = get('image_id'), get('category_id'), get('bbox'), get('id')
    used = [i for i in used if i is not None]
    if not all(map(_of_one_type, (images, cats, used))) or len(set(used)) < len(used):
        return None
    if not set(map(type, boxes)) <= {list, tuple} or set(map(len, boxes)) != {4}:
        return None
    numbers = list(chain.from_iterable(boxes))
    if not set(map(type, numbers)) <= _NUMBERS:
        return None
    area = [0 if v is None else v if type(v) in _NUMBERS else np.nan for v in get('area')]
    flagged = [bool(a.get('iscrowd') or a.get('ignore') or a.get('difficult')) for a in anns]
    try:
        columns = np.array(numbers, np.float64).reshape(-1, 4), np.array(area, np.float64)
    except OverflowError:
        return None
    return Plain(images, cats, *columns, np.array(flagged))


# %%
#| export
def doubtful(
    anns: list,  # entries of 'annotations'
    sizes: dict,  # id of an image -> (H, W), or None
    cats,  # set of the ids of the categories
):  # positions, in order
    "Annotations that may have a fault; those that are left out have none"
    plain = plain_annotations(anns)
    if plain is None:
        return range(len(anns))
    place = {i: n for n, i in enumerate(sizes)}
    image = np.array([place.get(i, -1) for i in plain.images])
    try:
        known = np.array([*(s or (np.nan, np.nan) for s in sizes.values()), (np.nan, np.nan)], np.float64)
    except OverflowError:
        return range(len(anns))
    height, width = known[image].T
    x, y, w, h = plain.xywh.T
    bad = (image < 0) | plain.flagged | np.array([c not in cats for c in plain.cats])
    bad |= ~(np.abs(plain.xywh) < 1e9).all(1) | (w <= 0) | (h <= 0)
    bad |= (x >= width) | (y >= height) | (x + w <= 0) | (y + h <= 0)
    bad |= (np.minimum(x, y) < -1) | (x + w > width + 1) | (y + h > height + 1) | (np.minimum(w, h) < 2)
    bad |= ~(np.abs(plain.area) < 1e300)
    bad |= (plain.area != 0) & area_contradicts(plain.area, (w + 1) * (h + 1))
    return np.flatnonzero(bad).tolist()


def perhaps_repeated(
    anns: list,  # entries of 'annotations'
):  # positions, in order
    "Annotations that may have image, class and box of another one; those that are left out have not"
    plain = plain_annotations(anns)
    if plain is None:
        return range(len(anns))
    rows = [np.fromiter(map(hash, ids), np.int64, len(anns)) for ids in (plain.images, plain.cats)]
    rows += list(plain.xywh.view(np.int64).T)
    mixed = np.zeros(len(anns), np.uint64)
    for row in rows:
        mixed = (mixed ^ row.view(np.uint64) ^ (mixed >> np.uint64(29))) * np.uint64(0x9E3779B97F4A7C15)
    _, first, count = np.unique(mixed, return_inverse=True, return_counts=True)
    return np.flatnonzero(count[first] > 1).tolist()


# %%
#| export
def box_sides(
    anns: list,  # entries of 'annotations'
):  # (M,) float64
    "Square roots of the areas of boxes, in pixels; what is no box or has no area is left out"
    boxes = [a.get('bbox') for a in anns]
    boxes = [b for b in boxes if isinstance(b, (list, tuple)) and len(b) == 4]
    if not set(map(type, chain.from_iterable(boxes))) <= _NUMBERS:
        boxes = [b for b in boxes if all(isinstance(v, (int, float)) for v in b)]
    sides = np.array(list(chain.from_iterable(boxes)), dtype=np.float64).reshape(-1, 4)[:, 2:]
    area = sides.prod(1)
    return np.sqrt(area[(sides > 0).all(1) & np.isfinite(area)])


def by_text(
    values,  # list of ids
) -> Counter:  # text of an id -> how often it occurs
    "Ids counted as text, so that 7 and '7' are one"
    if _of_one_type(values):
        return Counter({str(v): n for v, n in Counter(values).items()})
    return Counter(map(str, values))


# %% [markdown]
# Only the third annotation is doubtful, as its box overhangs; the first two may be the same:

# %%
many = [dict(id=n, image_id=1, category_id=1, bbox=[x, 2, 10, 20]) for n, x in enumerate((1, 1, 55, 9))]
assert doubtful(many, {1: (40, 60)}, {1}) == [2] and perhaps_repeated(many) == [0, 1]
assert by_text([7, '7', 8]) == {'7': 2, '8': 1} and box_sides(many[:1]).tolist() == [200**0.5]
assert list(doubtful([*many, 3], {1: (40, 60)}, {1})) == [0, 1, 2, 3, 4]
plain_annotations(many).xywh

# %% [markdown]
# ## Summary
#
# * `as_flag` and `as_area` read numbers and words; what they cannot read is None.
# * `tidy_values` converts columns that are text throughout, and says which.
# * `doubtful` and `perhaps_repeated` find among a million annotations those that are worth a look.
#
# ## Exercises
#
# 1. A file has image ids 7 and "7". Which annotation with the image id "7" is meant, and what does
#    `tidy_values` do?
# 2. Which spellings of a flag do you know that `as_flag` does not?
