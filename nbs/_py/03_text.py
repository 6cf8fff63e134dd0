# %% [markdown]
# # Text files {#sec-text}
#
# > Read text in the encodings that editors and tools write, and name the byte that is in none of them.

# %%
#| default_exp text

# %% [markdown]
# *Why.* An editor on one system puts a mark in front of a list of images, and the first image is not found. A
# shell writes its output as UTF-16, and a file of settings becomes unreadable. An old tool writes class names
# in the code page of its country. Every text file of this package is read here, so that all of them are
# treated alike: annotations, lists, labels and settings. A file may also come from somebody who means harm: a
# pipe that never ends, or ten gigabytes of brackets. So only regular files are read, up to a size that is
# checked before, and JSON only up to a depth.
#
# The bytes decide, in this order: a mark (UTF-8, UTF-16, UTF-32); every second byte zero (UTF-16 without a
# mark); the encoding that an XML file declares; UTF-8. Nothing else is guessed, since most byte strings are
# valid text in several code pages, and only one of these texts is what was meant.

# %%
#| export
import codecs
import json
import os
import re
import stat
from collections import Counter
from pathlib import Path
import numpy as np
from semidetr.core import DataError

# %%
#| export
_MARKS = (
    (codecs.BOM_UTF8, 'utf-8-sig'),
    (codecs.BOM_UTF32_LE, 'utf-32'),
    (codecs.BOM_UTF32_BE, 'utf-32'),
    (codecs.BOM_UTF16_LE, 'utf-16'),
    (codecs.BOM_UTF16_BE, 'utf-16'),
)
_DECLARED = re.compile(rb'\s*<\?xml[^>]*?encoding\s*=\s*["\']([\w.:-]+)')


def text_encoding(
    raw: bytes,  # start of a file, or all of it
) -> str:  # name for `bytes.decode`
    "The encoding that the bytes show: a mark, zeros in every second place, an XML declaration, else UTF-8"
    for mark, name in _MARKS:
        if raw.startswith(mark):
            return name
    head = raw[:64]
    if len(head) > 1 and 0 in head and not any(head[::2]):
        return 'utf-16-be'
    if len(head) > 1 and 0 in head and head[1::2].count(0) > len(head) // 4 and 0 not in head[::2]:
        return 'utf-16-le'
    if len(head) > 1 and 0 in head and head[::2].count(0) > len(head) // 4 and 0 not in head[1::2]:
        return 'utf-16-be'
    declared = _DECLARED.match(raw[:200])
    name = declared.group(1).decode().lower() if declared else 'utf-8'
    return 'utf-8' if name.startswith(('utf-16', 'utf16', 'ucs', 'unicode')) else name


# %%
assert text_encoding('dog'.encode('utf-16')) == 'utf-16' and text_encoding(b'dog') == 'utf-8'
assert text_encoding('dog'.encode('utf-16-le')) == 'utf-16-le'
text_encoding(b'<?xml version="1.0" encoding="gbk"?><annotation/>')

# %%
import tempfile
import matplotlib.pyplot as plt

# %% [markdown]
# ## Bytes
#
# A file is opened without waiting, and what was opened is asked whether it is a regular file: a look at the
# path beforehand would see another file than the one that is opened later. The size is known before the first
# byte is read, and no more is read of a file that grows meanwhile.

# %%
#| export
MB = 10**6
TEXT_MB = 4000  # largest text file: 10 million boxes of COCO are 2 GB
SMALL_MB = 16  # largest file of settings, of a split's or a run's description, of class names


def read_bytes(
    path,  # regular file
    error: type = DataError,  # class of the exception
    most_mb: float = TEXT_MB,  # megabytes that it may have
    wanted: str = 'a text file',  # for the message
) -> bytes:
    "Content of a regular file; a pipe, a device, a folder and a file that is too large are errors"
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, 'O_NONBLOCK', 0))
        with open(handle, 'rb') as f:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise error(f'{path}: is a pipe or a device; give {wanted}')
            raw = f.read(found.st_size) if found.st_size <= most_mb * MB else None
    except (OSError, ValueError) as e:
        folder = isinstance(e, IsADirectoryError) or os.path.isdir(path)
        what = 'is a directory' if folder else (getattr(e, 'strerror', None) or 'cannot be read').lower()
        raise error(f'{path}: {what}; give {wanted}') from None
    if raw is None:
        raise error(f'{path}: has {found.st_size / MB:,.0f} MB, {most_mb:g} MB are the limit; give {wanted}')
    return raw


# %%
root = Path(tempfile.mkdtemp())
os.mkfifo(root / 'pipe')
(root / 'large').write_bytes(bytes(3000))
refusals = []
for odd in ('pipe', 'large'):
    try:
        read_bytes(root / odd, most_mb=0.002)
    except DataError as e:
        refusals.append(str(e).replace(f'{root}/', ''))
assert refusals[0] == 'pipe: is a pipe or a device; give a text file' and 'limit' in refusals[1]
refusals


# %% [markdown]
# ## Text

# %%
#| export
def decode(
    raw: bytes,  # content of a text file
    path,  # for the message
    error: type = DataError,  # class of the exception
    cure: str = 'save it as UTF-8',  # what to do, for the message
) -> str:  # lines end in \n
    "Bytes as text; an error names the file, the byte that is not text, and the cure"
    name = text_encoding(raw)
    try:
        text = raw.decode(name)
    except UnicodeDecodeError as e:
        line, byte = raw.count(b'\n', 0, e.start) + 1, raw[e.start]
        what = f'byte {e.start} (0x{byte:02X}, line {line}) is not {name.upper().removesuffix("-SIG")}'
        raise error(f'{path}: {what}; {cure}') from None
    except (LookupError, ValueError):
        raise error(f"{path}: declares the encoding '{name}', which is unknown; {cure}") from None
    if not isinstance(text, str):
        raise error(f"{path}: declares the encoding '{name}', which is none of text; {cure}")
    return text.replace('\r\n', '\n').replace('\r', '\n') if b'\r' in raw else text


def read_text(
    path,  # text file
    error: type = DataError,  # class of the exception
    cure: str = 'save it as UTF-8',  # what to do, for the message
    most_mb: float = TEXT_MB,  # megabytes that it may have
) -> str:  # lines end in \n
    "Content of a text file (`read_bytes`, `decode`)"
    return decode(read_bytes(path, error, most_mb), path, error, cure)


def read_lines(
    path,  # text file, for example a list of images
) -> list[str]:  # without blanks at the ends
    "The lines of a text file that are not blank"
    return [line.strip() for line in read_text(path).split('\n') if line.strip()]


# %%
for encoding in ('utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le', 'utf-32'):
    (root / 'list.txt').write_bytes('Käfer 1\r\nKäfer 2\r\n'.encode(encoding))
    assert read_lines(root / 'list.txt') == ['Käfer 1', 'Käfer 2']
(root / 'list.txt').write_bytes('one\nKäfer 1\n'.encode('cp1252'))
try:
    read_text(root / 'list.txt')
except DataError as e:
    refusal = str(e).replace(f'{root}/', '')
assert refusal == 'list.txt: byte 5 (0xE4, line 2) is not UTF-8; save it as UTF-8'
refusal

# %% [markdown]
# ## JSON
#
# A JSON file that breaks off names the line where it does. Of two lists with the same name, as when two files
# were pasted together, Python keeps the last; here the file is refused.
#
# Brackets in brackets in brackets: Python's parser stops at some depth with an error of its own, and just below
# it every later step that walks through the values, even a message, would. No file of this package is deeper
# than ten; the limit is 64. Opening and closing brackets are counted in blocks before parsing, since a
# pure Python loop over the letters of a large file takes longer than parsing it.

# %%
#| export
DEPTH = 64  # brackets in brackets that a file may have
_STRING = re.compile(r'"(?:[^"\\]|\\.)*(?:"|\\?\Z)', re.S)  # one that is not closed ends with the text
_KEYS = re.compile(r'[^\w\-. \t"\']+')  # what parts the dotted keys of TOML


def _deepest(text, block=1 << 20):
    "Largest number of open brackets, those in strings counted too"
    most, now = 0, 0
    for n in range(0, len(text), block):
        b = np.frombuffer(text[n : n + block].encode('utf-8', 'surrogatepass'), np.uint8)
        b = b[b >= 91]  # [ \ ] { | } and letters
        step = ((b == 91) | (b == 123)).astype(np.int8) - ((b == 93) | (b == 125))
        height = np.cumsum(step, dtype=np.int64)
        most = max(most, now + int(height.max(initial=0)))
        now += int(height[-1]) if len(height) else 0
    return most


def too_deep(
    text: str,  # JSON or TOML
    most: int = DEPTH,
) -> bool:
    "Are more than `most` brackets open at some place? Those in quoted strings do not count"
    return _deepest(text) > most and _deepest(_STRING.sub('""', text)) > most


def too_dotted(
    text: str,  # TOML
    most: int = DEPTH,
) -> bool:
    "Has a key more than `most` dots? Each is a table in a table, and a search of all before it"
    plain = _STRING.sub('""', text) if text.count('.') > most else ''
    return any(keys.count('.') > most for keys in _KEYS.split(plain))


# %%
assert not too_deep('[' * 64 + ']' * 64) and too_deep('[' * 65 + ']' * 65)
assert not too_deep('["' + '[' * 99 + '"]')
assert too_dotted('a.' * 65 + 'a = 1') and not too_dotted('a = [' + '1.5, ' * 99 + ']')
too_deep('{"a": ' * 1000 + '1' + '}' * 1000)

# %%
#| export
_LISTS = ('"images"', '"annotations"', '"categories"')


def _once(pairs):  # an object of JSON in which no name occurs twice
    out = dict(pairs)
    if len(out) < len(pairs):
        name = Counter(k for k, _ in pairs).most_common(1)[0][0]
        raise ValueError(f'the name {name[:40]!r} occurs twice in one object')
    return out


def parse_json(
    text: str,  # of a file
    path,  # for the message
    error: type = DataError,  # class of the exception
    cure: str = 'export it again',  # what to do, for the message
    wanted: str = 'a COCO annotation file',  # for a file that is no JSON at all
    once: bool = True,  # refuse an object with the same name twice
):  # its content
    "Text as JSON, at most 64 levels deep; an error names the line where it breaks"
    if not text.strip():
        raise error(f'{path}: the file is empty; {cure}')
    if too_deep(text):
        raise error(f'{path}: has more than {DEPTH} brackets in brackets; {cure}')
    try:
        return json.loads(text, object_pairs_hook=_once if once else None)
    except json.JSONDecodeError as e:
        if not text[: e.pos].strip():
            what = f'not a text file in JSON, it begins with {text.strip()[:12]!r}'
            raise error(f'{path}: {what}; give {wanted}') from None
        what = f'line {e.lineno}, column {e.colno}: {e.msg}; the file is not valid JSON (cut off?)'
        raise error(f'{path}: {what}: {cure}') from None
    except (RecursionError, ValueError) as e:
        raise error(f'{path}: {str(e)[:60]}; the file is not valid JSON: {cure}') from None


def read_json(
    path,  # annotation file
):  # its content
    "Content of a JSON file of annotations; a DataError names the line where it breaks"
    text = read_text(path, cure='save it as UTF-8, or give a COCO annotation file in JSON')
    if not text.strip():
        raise DataError(f'{path}: the file is empty; export the annotations again')
    again = any(text.count(name) > 1 for name in _LISTS)  # the hook is slow, so only where it may matter
    return parse_json(text, path, once=again)


# %%
(root / 'cut.json').write_text('{"images": [\n  {"id": 1, "file_na')
try:
    read_json(root / 'cut.json')
except DataError as e:
    message = str(e).replace(f'{root}/', '')
assert 'line 2' in message
(root / 'twice.json').write_text('{"images": [1], "images": [2]}')
try:
    read_json(root / 'twice.json')
except DataError as e:
    refused = str(e).replace(f'{root}/', '')
assert "'images' occurs twice" in refused
message, refused

# %%
#| label: fig-text-bytes
#| fig-cap: "The first bytes of one word in three encodings: a mark, or zeros in every second place, shows which it is."
#| fig-alt: "Three rows of coloured cells with byte values; the UTF-16 rows are longer, and every second cell is zero."
names = ('utf-8', 'utf-8-sig', 'utf-16')
rows = [list('dog 1'.encode(name)) for name in names]
fig, ax = plt.subplots(figsize=(6, 1.5), dpi=80)
for k, row in enumerate(rows):
    ax.imshow(np.array([row]), extent=(0, len(row), k - 0.4, k + 0.4), vmin=0, vmax=400, cmap='Blues')
    for n, byte in enumerate(row):
        ax.text(n + 0.5, k, f'{byte:02X}', ha='center', va='center', fontsize=9)
ax.set(xlim=(0, 12), ylim=(2.5, -0.5), xticks=[], yticks=range(3), yticklabels=names, aspect='auto')
plt.show()

# %% [markdown]
# ## Summary
#
# * `read_text` reads UTF-8 with and without mark, UTF-16, UTF-32 and what an XML file declares.
# * Anything else is an error that names file, byte and cure.
# * `read_bytes` reads regular files only, up to a size, and waits for no pipe.
# * `read_lines` and `read_json` build on it; JSON is refused beyond 64 levels. @sec-reading adds TOML,
#   YAML, logs and the types of what was read.
#
# ## Exercises
#
# 1. Which bytes does `café` have in UTF-8 and in Windows-1252? Why is the second an error in UTF-8?
# 2. A file in UTF-16 without a mark holds only Chinese characters. What does `text_encoding` return?
