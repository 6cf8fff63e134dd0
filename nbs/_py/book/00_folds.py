# %% [markdown]
# # What a page shows first {#sec-folds}
#
# > Fold away what few readers need, show a picture at once, and refer to sections by their titles.
#
# A page of results holds its finding and the evidence for it: seeds, classes, hashes, commits. A reader who
# wants the finding should not have to scroll past the evidence, and one who doubts it should not have to look
# for it elsewhere. Here a heading with `.fold` hides what follows it until it is clicked. A chapter shows its
# first figure below its title. And a reference reads *Boxes*, not *Chapter 10*, which tells a reader nothing.
#
# All of it is done on the cells of a notebook, before a renderer starts, so that both renderers show the same.

# %%
#| default_exp book.folds

# %%
#| export
import html
import os
import re

# %%
import json
from pathlib import Path
import matplotlib.pyplot as plt

# %% [markdown]
# ## Headings
#
# A markdown cell is divided at its headings. A line of a code block is none, and the title of a box is none
# either.

# %%
#| export
HEADING = re.compile(r'^(#{1,6}) +(.*?)\s*(?:\{([^{}]*)\})?\s*$')
_BOX = re.compile(r'^:{3,} *\{\.callout')


def at_headings(
    text: str,  # Markdown
) -> list[str]:  # pieces; all but the first begin with a heading
    "Divide Markdown before each of its headings"
    pieces, fence, before = [[]], '', ''
    for line in text.split('\n'):
        mark = re.match(r'^\s*(`{3,}|~{3,})', line)
        if mark and not fence:
            fence = mark.group(1)
        elif mark and line.strip().startswith(fence):
            fence = ''
        elif not fence and HEADING.match(line) and not _BOX.match(before):
            pieces.append([])
        pieces[-1].append(line)
        before = line if line.strip() else before
    return ['\n'.join(p) for p in pieces]


# %%
toy_text = (
    'Before.\n\n# Title {#sec-toy}\n\nText.\n\n```\n# no heading\n```\n\n## Every seed {.fold}\n\nMore.'
)
pieces = at_headings(toy_text)
assert [p.split('\n')[0] for p in pieces] == ['Before.', '# Title {#sec-toy}', '## Every seed {.fold}']
assert '\n'.join(pieces) == toy_text
pieces[1]


# %% [markdown]
# ## Folds
#
# A fold reaches from its heading to the next one. `<details>` needs no script, opens when a reference leads
# into it, and is printed in every browser. Its line says what is inside.

# %%
#| export
def _contents(cells):
    "What a fold holds, in words"
    text = '\n'.join(c['source'] for c in cells if c['cell_type'] == 'code')
    labels = re.findall(r'^#\|\s*label:\s*(fig|tbl)-', text, re.M)
    names = dict(tbl='table', fig='figure')
    counts = [(labels.count(kind), name) for kind, name in names.items()]
    return ', '.join(f"{n} {name}{'s' * (n > 1)}" for n, name in counts if n) or 'details'


# %%
#| export
def fold_cells(
    cells: list,  # of a notebook; every source is a string
) -> list:  # cells, those below a heading with `.fold` between `<details>` and `</details>`
    "Hide what follows the headings that ask for it"
    out, inside = [], None

    def add(text, like, part):
        if text.strip():
            name = {'id': f"{like['id']}-{part}"} if 'id' in like else {}
            out.append({**like, 'source': text.strip('\n'), **name})

    def close(like, part):
        nonlocal inside
        if inside is not None:
            summary = _contents(out[inside + 1 :])
            out[inside]['source'] = f'<details class="fold">\n<summary>Show {summary}</summary>'
            add('</details>', like, part)
        inside = None

    for cell in cells:
        pieces = at_headings(cell['source']) if cell['cell_type'] == 'markdown' else [cell['source']]
        folds = any('.fold' in p.split('\n')[0] for p in pieces[1:])
        if len(pieces) == 1 or (inside is None and not folds):
            out.append(cell)
            continue
        for i, piece in enumerate(pieces):
            head, _, rest = piece.partition('\n')
            if i == 0:
                add(piece, cell, 0)
                continue
            close(cell, f'{i}c')
            found = HEADING.match(head)
            if '.fold' not in (found.group(3) or ''):
                add(piece, cell, i)
                continue
            add(head, cell, i)
            add('<details>', cell, f'{i}o')
            inside = len(out) - 1
            add(rest, cell, f'{i}r')
    close(dict(cell_type='markdown', metadata={}, id='fold'), 'end')
    return out


# %%
toy_cells = [
    dict(cell_type='markdown', id='a', source=toy_text),
    dict(cell_type='code', id='b', source='#| label: tbl-toy\ntable()'),
    dict(cell_type='markdown', id='c', source='## Summary\n\nShort.'),
]
folded = fold_cells(toy_cells)
assert [c['source'].split('\n')[0] for c in folded[2:]] == [
    '## Every seed {.fold}',
    '<details class="fold">',
    'More.',
    '#| label: tbl-toy',
    '</details>',
    '## Summary',
]
assert len({c['id'] for c in folded}) == len(folded)
folded[3]['source']


# %% [markdown]
# ## A picture at once
#
# A chapter shows its first labelled figure a second time, small, below its title, and the picture leads to
# the place where it is made.

# %%
#| export
def _first_figure(cells):
    "Label, options and base64 of the first figure, or None"
    for c in cells:
        found = re.search(r'^#\|\s*label:\s*(fig-[\w-]+)', c['source'], re.M)
        for o in c.get('outputs', []) if found and c['cell_type'] == 'code' else []:
            if 'image/png' in o.get('data', {}):
                png = o['data']['image/png']
                return found.group(1), c['source'], ''.join(png).replace('\n', '')
    return None


def _quoted(source, key):
    'The value of an option line of a cell'
    found = re.search(rf'^#\|\s*{key}:\s*"?(.*?)"?\s*$', source, re.M)
    return found.group(1).replace('\\"', '"') if found else ''


def _concludes(cells):
    "Does the page begin with a finding, which its first figure follows anyway?"
    shown = [o.get('data', {}).get('text/markdown', '') for c in cells for o in c.get('outputs', [])]
    return any('{.finding}' in ''.join(text) for text in shown)


def lead_picture(
    cells: list,  # of a chapter; every source is a string
) -> list:  # cells
    "The first figure of a chapter below the sentence under its title; pages of results stay as they are"
    found = _first_figure(cells)
    if not found or not cells[0]['source'].startswith('# ') or _concludes(cells):
        return cells
    label, source, png = found
    lines = cells[0]['source'].split('\n')
    quoted = [i for i, line in enumerate(lines) if line.startswith('>')]
    after = quoted[-1] + 1 if quoted else 1
    image = f'<img alt="{html.escape(_quoted(source, "fig-alt"))}" src="data:image/png;base64,{png}">'
    text = f'<div class="lead-picture"><a href="#{label}">{image}</a></div>'
    name = cells[0].get('id', 'first')
    head, rest = '\n'.join(lines[:after]), '\n'.join(lines[after:]).strip('\n')
    new = dict(cell_type='markdown', metadata={}, id=f'{name}-picture', source=text)
    more = [{**cells[0], 'id': f'{name}-rest', 'source': rest}] if rest else []
    return [{**cells[0], 'source': head}, new, *more, *cells[1:]]


# %%
toy_output = dict(data={'image/png': 'AAAA'})
toy_figure = dict(
    cell_type='code', source='#| label: fig-toy\n#| fig-alt: "a line"\nplot()', outputs=[toy_output]
)
toy_first = dict(cell_type='markdown', id='a', source='# Boxes {#sec-b}\n\n> Draw.\n\nText.')
shown = lead_picture([toy_first, toy_figure])
assert [c['source'][:4] for c in shown] == ['# Bo', '<div', 'Text', '#| l']
shown[1]['source']

# %% [markdown]
# ## References by title
#
# `section_titles` collects what every `{#sec-...}` is called; `link_titles` writes it into the text. Figures,
# tables and equations have numbers, which their captions show.

# %%
#| export
_SECTION = re.compile(r'(?<![\w/\[])@(sec-[\w-]+)')


def section_titles(
    texts: list[str],  # Markdown cells of a page
) -> dict[str, str]:  # label -> title
    "The titles of all sections with a label"
    out = {}
    for text in texts:
        for piece in at_headings(text):
            found = HEADING.match(piece.split('\n')[0])
            label = re.search(r'#(sec-[\w-]+)', found.group(3) or '') if found else None
            if label:
                out[label.group(1)] = found.group(2)
    return out


def link_titles(
    text: str,  # Markdown without code
    titles: dict,  # label -> (page, title)
    page_dir: str,  # folder of the page that the text stands on
) -> str:  # Markdown; a reference to an unknown label stays
    "Turn `@sec-name` into a link with the title of the section"

    def link(m):
        if m.group(1) not in titles:
            return m.group(0)
        target, title = titles[m.group(1)]
        url = os.path.relpath(target, page_dir or '.').rsplit('.', 1)[0] + '.html'
        return f'[{title}]({url}#{m.group(1)})'

    return _SECTION.sub(link, text)


# %%
toy_titles = {'sec-toy': ('nbs/a.ipynb', section_titles([toy_text])['sec-toy'])}
linked = link_titles('See @sec-toy and @sec-none.', toy_titles, 'nbs/data')
assert linked == 'See [Title](../a.html#sec-toy) and @sec-none.'
linked

# %% [markdown]
# ## What a reader sees
#
# How much of each page of results is folded, in lines of Markdown and of the code that makes its figures.

# %%
shares = {}
for f in sorted(Path('../ablations').glob('[0-9]*.ipynb')):
    raw = json.loads(f.read_text(encoding='utf-8'))['cells']
    texts = [dict(cell_type=c['cell_type'], source=''.join(c['source'])) for c in raw]
    hidden, n = False, [0, 0]
    for c in fold_cells(texts):
        hidden = (hidden or c['source'].startswith('<details class="fold">')) and c['source'] != '</details>'
        n[hidden] += len(c['source'].splitlines())
    shares[f.stem] = n
assert len(shares) > 10
len(shares)

# %%
#| label: fig-folds-share
#| fig-cap: "Lines of the pages of results that are shown at once, and lines that are folded."
#| fig-alt: "Stacked horizontal bars, one for each page of results: lines shown and lines folded"
fig, ax = plt.subplots(figsize=(6, 3.4), dpi=80, layout='constrained')
shown_lines, folded_lines = zip(*shares.values())
ax.barh(list(shares), shown_lines, label='shown')
ax.barh(list(shares), folded_lines, left=shown_lines, color='lightgrey', label='folded')
ax.invert_yaxis()
ax.set_xlabel('lines')
ax.legend(fontsize=9)
plt.show()

# %% [markdown]
# ## Summary
#
# * `fold_cells` hides what follows a heading with `.fold`; `<details>` does the rest.
# * `lead_picture` puts the first figure of a chapter below its title.
# * `link_titles` refers to sections by what they are called.
#
# ## Exercises
#
# 1. Why does a fold end at the next heading of any level?
# 2. Put a heading into a code block of the toy text. Which line of `at_headings` keeps it where it is?
