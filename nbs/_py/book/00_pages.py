# %% [markdown]
# # The pages: from notebooks to a book {#sec-pages}
#
# > Turn notebooks into pages: choose what is shown, link names, and stop at a broken reference.
#
# A book of many notebooks breaks without notice. A figure is renamed, and the references of three chapters
# lead nowhere; a function moves, and its links break; a number is typed once and is wrong a week later.
# Renderers only warn about such things. Here the pages are made, numbered and checked before a renderer
# starts, by functions small enough to call on a toy notebook.

# %%
#| default_exp book.pages

# %%
#| export
import ast
import json
import os
import re
import string
from importlib import import_module
from pathlib import Path
from semidetr.book.describe import fill_markers
from semidetr.book.folds import fold_cells, lead_picture, link_titles, section_titles

# %%
import tempfile
import matplotlib.pyplot as plt


# %% [markdown]
# ## What the book consists of
#
# `_quarto.yml` lists parts and chapters. Everything below starts from that list: a notebook that is not on it
# is not in the book, and a test fails. The tools of this chapter belong to the extra `[book]`; without it a
# one-line error names what to install.

# %%
#| export
def fail(
    message: str,  # one line that names the cure
):
    "Raise a ConfigError; it is imported only here, because the import takes longer than a whole build"
    from semidetr.core import ConfigError

    raise ConfigError(message)


def need(
    module: str,  # a module of the extra [book]
):
    "Import it; without it a one-line error names what to install"
    try:
        return import_module(module)
    except ImportError:
        from semidetr.core import need as explain

        return explain(module, 'the site')


def read_book(
    root='.',  # folder of the checkout, which holds `_quarto.yml`
) -> dict:  # the whole configuration
    "Read the description of the book"
    path = Path(root) / '_quarto.yml'
    if not path.exists():
        fail(f"no _quarto.yml in '{root}': the site is built in a checkout of the project, in its top folder")
    yaml = need('yaml')
    try:
        book = yaml.safe_load(path.read_text(encoding='utf-8'))
        book['project'], book['book']['chapters'], book['format']['html']
    except (yaml.YAMLError, KeyError, TypeError) as e:
        what = f'lacks {e}' if isinstance(e, KeyError) else 'not the description of a book'
        fail(f'{path}: {what}; compare it with the one of the project')
    return book


def chapter_files(
    book: dict,  # `_quarto.yml` as a dictionary
) -> list[str]:  # paths of the pages in reading order, the home page first
    "Flatten parts, chapters and appendices"

    def walk(items):
        for item in items or []:
            if isinstance(item, str):
                yield item
                continue
            if str(item.get('part', '')).endswith(('.qmd', '.md', '.ipynb')):
                yield item['part']
            yield from walk(item.get('chapters'))

    return [*walk(book['book']['chapters']), *walk(book['book'].get('appendices'))]


# %%
toy_part = {'part': 'Data', 'chapters': ['nbs/01_boxes.ipynb', 'nbs/02_draw.ipynb']}
toy_book = {'book': {'chapters': ['index.qmd', toy_part], 'appendices': ['notes.qmd']}}
assert chapter_files(toy_book) == ['index.qmd', 'nbs/01_boxes.ipynb', 'nbs/02_draw.ipynb', 'notes.qmd']
chapter_files(toy_book)


# %% [markdown]
# ## From a notebook to a page
#
# A code cell starts with lines of two kinds: `#| word` is for nbdev (`export`, `hide`, `slow`), `#| key:
# value` for the renderer (`label`, `fig-cap`). The filter applies and removes the first, and keeps the
# second.

# %%
#| export
def split_directives(
    source: str,  # a code cell
):  # (words for nbdev, lines for the renderer, the code)
    "Take the `#|` lines off the top of a cell"
    lines = source.split('\n')
    n = next((i for i, line in enumerate(lines) if not line.startswith('#|')), len(lines))
    option = re.compile(r'#\|\s*[\w-]+\s*:')
    words = {line[2:].split()[0] for line in lines[:n] if line[2:].strip() and not option.match(line)}
    return words, [line for line in lines[:n] if option.match(line)], '\n'.join(lines[n:])


def defined_names(
    code: str,  # an exported cell
) -> list[str]:  # functions, classes, `Class.method` and constants; nothing private
    "The public names that a cell defines"
    out = []
    for node in ast.parse(code).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            out.append(node.name)
        if isinstance(node, ast.ClassDef):
            out += [f'{node.name}.{m.name}' for m in node.body if isinstance(m, ast.FunctionDef)]
        if isinstance(node, ast.Assign):
            out += [t.id for t in node.targets if isinstance(t, ast.Name)]
    return [name for name in out if not any(part.startswith('_') for part in name.split('.'))]


# %%
toy_cell = '#| export\n#| label: fig-toy\ndef area(w, h): return w*h\n'
toy_cell += 'class Box:\n    def side(self): return 1\n_private = 3'
words, options, code = split_directives(toy_cell)
assert words == {'export'} and options == ['#| label: fig-toy']
defined_names(code)


# %% [markdown]
# Names in `backticks` become links to their definitions, as in `chapter_files`. The index is made from the
# notebooks themselves. A short name that two modules define is ambiguous and gets no link.

# %%
#| export
def cell_text(
    source,  # a string, or a list of lines as notebooks are stored
) -> str:
    "The text of a cell or an output"
    return ''.join(source) if isinstance(source, list) else source


def notebook_module(
    nb: dict,  # a notebook
) -> str:  # 'semidetr.core', or '' if nothing is exported
    "The module that a notebook exports to"
    for c in nb['cells']:
        found = re.search(r'^#\|\s*default_exp\s+(\S+)', cell_text(c['source']), re.M)
        if found and c['cell_type'] == 'code':
            return f'semidetr.{found.group(1)}'
    return ''


def is_exported(
    words: set,  # of `split_directives`
) -> bool:
    "Does nbdev export a cell with these words?"
    return bool(words & {'export', 'exports', 'exporti'})


def symbol_index(
    root,  # folder of the checkout
    pages: list[str],  # from `chapter_files`
) -> dict[str, tuple[str, str]]:  # name -> (page, anchor)
    "Where every exported name is defined"
    index, twice = {}, set()
    for page in (p for p in pages if p.endswith('.ipynb')):
        nb = json.loads((Path(root) / page).read_text(encoding='utf-8'))
        module = notebook_module(nb)
        for c in nb['cells']:
            if c['cell_type'] != 'code' or not module:
                continue
            words, _, code = split_directives(cell_text(c['source']))
            for name in defined_names(code) if is_exported(words) else []:
                if name in index and index[name][0] != page:
                    twice.add(name)
                index[name] = index[f'{module}.{name}'] = (page, f'{module}.{name}')
    return {k: v for k, v in index.items() if k not in twice}


def title_index(
    root,  # folder of the checkout
    pages: list[str],  # from `chapter_files`
) -> dict[str, tuple[str, str]]:  # label -> (page, title)
    "What the sections with a label are called (@sec-folds)"
    index = {}
    for page in pages:
        text = (Path(root) / page).read_text(encoding='utf-8')
        texts = [text]
        if page.endswith('.ipynb'):
            cells = json.loads(text)['cells']
            texts = [cell_text(c['source']) for c in cells if c['cell_type'] == 'markdown']
        for label, title in section_titles(texts).items():
            index.setdefault(label, (page, title))
    return index


# %% [markdown]
# Links are made outside headings, other links and code blocks.

# %%
#| export
def link_names(
    text: str,  # Markdown
    index: dict,  # from `symbol_index`
    page_dir: str,  # folder of the page, relative to the root
) -> str:
    "Turn `name` into a link to its definition; headings, links and code blocks stay as they are"

    def link(m):
        if m.group(1) not in index:
            return m.group(0)
        page, anchor = index[m.group(1)]
        url = os.path.relpath(page, page_dir or '.').removesuffix('.ipynb') + '.html'
        return f'[{m.group(0)}]({url}#{anchor})'

    out, fenced = [], False
    for line in text.split('\n'):
        if line.lstrip().startswith(('```', '~~~')):
            fenced = not fenced
        elif not fenced and not line.startswith('#'):
            line = re.sub(r'(?<![\[`\w])`([A-Za-z][\w.]*)(?:\(\))?`(?![\]`])', link, line)
        out.append(line)
    return '\n'.join(out)


# %%
toy_index = {'area': ('nbs/01_boxes.ipynb', 'semidetr.boxes.area')}
linked = link_names('# On `area`\nThe `area` of `nothing`.', toy_index, 'nbs/ablations')
assert linked.splitlines()[0] == '# On `area`', 'a heading is left alone'
linked

# %% [markdown]
# References and links stay out of code:

# %%
#| export
_CODE = re.compile(r'(^(`{3,}|~{3,})[^\n]*\n.*?^\2[ \t]*$|`[^`\n]+`)', re.S | re.M)
_FENCED = re.compile(r'^(`{3,}|~{3,})[^\n]*\n.*?^\1[ \t]*$', re.S | re.M)


def outside_code(
    f,  # function of a piece of Markdown
    text: str,  # Markdown
    inline: bool = True,  # leave `code` alone as well
) -> str:
    "Apply `f` to everything but code blocks and inline code"
    out, pos = [], 0
    for m in (_CODE if inline else _FENCED).finditer(text):
        out += [f(text[pos : m.start()]), m.group(0)]
        pos = m.end()
    return ''.join([*out, f(text[pos:])])


# %%
shouted = outside_code(str.upper, 'loud `quiet` loud')
assert shouted == 'LOUD `quiet` LOUD'
shouted


# %% [markdown]
# `filter_notebook` combines these steps: hidden cells are removed; an exported cell is shown, with a tag that
# names its module and an anchor for every name; links are set. nbdev's own processors drop the code, run the
# notebook again and print a signature. In a book about an algorithm the code *is* the text, its parameter
# comments are the parameter table, and nothing has to be executed to make the page.

# %%
#| export
def make_cell(
    kind: str,  # 'markdown', 'code' or 'raw'
    source: str,  # its text
    **more,  # outputs, id
) -> dict:
    "A cell of a notebook"
    return dict(cell_type=kind, metadata={}, source=source, **more)


def filter_notebook(
    nb: dict,  # a notebook as JSON
    index: dict,  # from `symbol_index`
    page_dir: str,  # folder of the page, relative to the root
    titles=None,  # from `title_index`; None: references to sections stay
) -> dict:  # the notebook to render
    "Hide, tag, anchor, link and fold the cells of one notebook"
    module, cells = notebook_module(nb), []
    titled = lambda text: outside_code(lambda t: link_titles(t, titles or {}, page_dir), text)
    for i, c in enumerate(fill_markers(nb)['cells']):
        source = cell_text(c['source'])
        if c['cell_type'] != 'code':
            cells.append({**c, 'source': titled(link_names(source, index, page_dir))})
            continue
        words, options, code = split_directives(source)
        if words & {'hide', 'default_exp'} or not code.strip():
            continue
        if re.search(r'^show_doc\(', code, re.M):
            options = ['#| echo: false', *options]
        elif is_exported(words) and module:
            anchors = ''.join(f'<span id="{module}.{name}"></span>' for name in defined_names(code))
            cells.append(
                make_cell('markdown', f'<span class="module-tag">{module}</span>{anchors}', id=f'tag{i:03d}')
            )
        shown = dict(outputs=[_inert_output(o, titled) for o in c['outputs']]) if 'outputs' in c else {}
        cells.append({**c, 'source': '\n'.join([*map(titled, options), code]), **shown})
    executed = Path(page_dir).name == 'runs'  # found from the pages of results, not by searching
    cells = fold_cells(cells if executed else lead_picture(cells))
    if executed:
        cells.insert(0, make_cell('raw', '---\nsearch: false\n---', id='unsearched'))
    return {**nb, 'cells': cells}


def fresh_copy(
    root,  # folder of the checkout
    page_dir: str,  # folder of the page, relative to the root
    nb: dict,  # a committed notebook
) -> dict:  # the notebook, or its copy that was executed here
    "`make book` executes a page into `runs/book`; a copy with the same cells is shown instead"
    sources = [cell_text(c['source']) for c in nb['cells']]
    for path in sorted((Path(root) / 'runs' / 'book' / page_dir).glob('*.ipynb')):
        other = json.loads(path.read_text(encoding='utf-8'))
        if [cell_text(c['source']) for c in other['cells']] == sources:
            return other
    return nb


def stored_notebook(
    nb: dict,  # from `filter_notebook`: the source of a cell is one string
) -> dict:  # the same: every source is a list of lines with their newlines
    "A notebook in the form that nbformat prescribes for files; Quarto's reader joins the lines as they are"
    return {**nb, 'cells': [{**c, 'source': c['source'].splitlines(keepends=True)} for c in nb['cells']]}


# %%
toy_sources = ['#| default_exp boxes', '#| export\ndef area(w, h): return w*h', '#| hide\nimport os']
toy_nb = {'cells': [make_cell('code', source) for source in toy_sources]}
page = filter_notebook(toy_nb, toy_index, 'nbs')
assert [c['source'] for c in page['cells']] == [
    '<span class="module-tag">semidetr.boxes</span><span id="semidetr.boxes.area"></span>',
    'def area(w, h): return w*h',
]
[c['cell_type'] for c in page['cells']]

# %% [markdown]
# In memory a source is one string. In a file it is a list of lines, each with its newline: a reader that
# finds a string may split it and lose the newlines, and then a paragraph becomes part of the heading above
# it.

# %%
toy_file = stored_notebook({'cells': [make_cell('markdown', '# Boxes\n\nA paragraph.')]})
assert toy_file['cells'][0]['source'] == ['# Boxes\n', '\n', 'A paragraph.']
toy_file['cells'][0]['source']

# %%
#| label: fig-pages-cells
#| fig-cap: "Cells of the chapters of this layer: prose and examples are shown as they are, exported code gets a tag, and few cells are hidden."
#| fig-alt: "Stacked horizontal bars, one for each chapter of this part: cells of prose, exported cells, examples and hidden cells."
kinds = ('prose', 'exported', 'example', 'hidden')


def kind_of(cell):
    if cell['cell_type'] != 'code':
        return 'prose'
    directives, _, body = split_directives(cell_text(cell['source']))
    if directives & {'hide', 'default_exp'} or not body.strip():
        return 'hidden'
    return 'exported' if is_exported(directives) else 'example'


chapters = {}
for f in sorted(Path().glob('0*.ipynb')):
    chapters[f.stem] = [kind_of(c) for c in json.loads(f.read_text())['cells']]
fig, ax = plt.subplots(figsize=(6, 1.8), dpi=80)
start = [0] * len(chapters)
for kind in kinds:
    width = [cells.count(kind) for cells in chapters.values()]
    ax.barh(list(chapters), width, left=start, label=kind)
    start = [a + b for a, b in zip(start, width)]
ax.invert_yaxis()
ax.set_xlabel('cells')
ax.legend(fontsize=9)
plt.show()

# %% [markdown]
# ## Numbers and references
#
# Quarto numbers figures, tables, equations and sections and resolves `@fig-name`. `CrossRefs` does the same
# before it, for the check and for the other renderer (@sec-site): `scan` collects the labels of all pages,
# `check` looks up the references. With $n$ the number of the chapter and $k$ the running number of a kind
# within it, a label is shown as
#
# $$
# \mathrm{number}(\text{label}) = n.k , \qquad k = 1, 2, \dots
# $$ {#eq-pages-number}
#
# A section is called by its title (@sec-folds).
# A reference to a label that no page defines, or a label that two pages define, is an entry in `problems`,
# and a problem fails the build: Quarto alone would print `?@fig-name` and exit 0.

# %%
#| export
KINDS = dict(fig='Figure', tbl='Table', eq='Equation', sec='Section', lst='Listing')
CALLOUT = r'^:{3,} *\{\.callout[^\n]*\n'  # the heading after it is a title, not a section
REF = re.compile(r'(?<![\w/\[])@((?:fig|tbl|eq|sec|lst)-[\w-]+)')
_LABEL = re.compile(r'^(#{1,6}) (.*?)\s*(?:\{([^}]*)\})?\s*$|\{#((?:fig|tbl|eq|lst)-[\w-]+)[^}]*\}', re.M)
_CELL_LABEL = re.compile(r'^#\|\s*label:\s*((?:fig|tbl|lst)-[\w-]+)', re.M)


# %%
#| export
class CrossRefs:
    "Labels of all pages: where they are and what they are called"

    def __init__(self):
        self.labels, self.problems = {}, []

    def add(self, label, page, text, number):
        "Record one label"
        if label in self.labels:
            self.problems.append(f'{page}: label {label} is used twice, first in {self.labels[label][0]}')
        else:
            self.labels[label] = (page, text, number)

    def scan(
        self,
        page: str,  # path of the page
        cells: list,  # (kind, source) of its cells
        n,  # chapter number or letter, 0 for an unnumbered page
    ):
        "Collect and number the labels of one page"
        count, depth = dict.fromkeys(KINDS, 0), [0] * 7

        def numbered(label):
            kind = label.split('-')[0]
            count[kind] += 1
            number = f'{n}.{count[kind]}' if n else str(count[kind])
            self.add(label, page, f'{KINDS[kind]} {number}', number)

        def heading(level, title, attributes):
            depth[level] += 1
            depth[level + 1 :] = [0] * (6 - level)
            number = '.'.join(map(str, [n, *depth[2 : level + 1]]))
            if label := re.search(r'#(sec-[\w-]+)', attributes):
                self.add(label.group(1), page, title, number)

        for kind, source in cells:
            if kind == 'code':
                for m in _CELL_LABEL.finditer(source):
                    numbered(m.group(1))
                continue
            text = re.sub(rf'({CALLOUT})#+ ', r'\1', _CODE.sub('', source), flags=re.M)
            for m in _LABEL.finditer(text):
                attributes = m.group(3) or ''
                if m.group(4):
                    numbered(m.group(4))
                elif '.unnumbered' not in attributes and n:
                    heading(len(m.group(1)), m.group(2), attributes)

    def check(
        self,
        page: str,  # path of the page
        text: str,  # its Markdown, or a caption
    ):
        "Note the references in it that lead nowhere"
        for m in REF.finditer(_CODE.sub('', text)):
            if m.group(1) not in self.labels:
                self.problems.append(f'{page}: no label for @{m.group(1)}')


# %%
refs = CrossRefs()
toy_text = '# Boxes {#sec-a}\n## Overlap {#sec-b}\n$$x$$ {#eq-x}'
refs.scan('a.qmd', [('markdown', toy_text), ('code', '#| label: fig-a\nplot()')], n=3)
refs.check('a.qmd', 'See @fig-a and @fig-missing.')
called = [refs.labels[k][1] for k in ('sec-a', 'sec-b', 'eq-x', 'fig-a')]
assert called == ['Boxes', 'Overlap', 'Equation 3.1', 'Figure 3.1']
assert refs.problems == ['a.qmd: no label for @fig-missing']
refs.labels['fig-a']

# %% [markdown]
# What a run printed holds names of classes and settings, which come from files. A tag in them would be live on
# the page, so only the few tags that pages of results use stay tags; all others are shown as text.

# %%
#| export
_OURS = r'/?(?:details|summary|br|sub|sup|em|strong)\s*/?>|/?span\b(?: (?:class|title)="[^"<>]*")*>'
_TAG = re.compile(rf'<(?!{_OURS})(?=[a-z/!?])', re.I)
_SCRIPT_LINK = re.compile(r'(\]\(|^ *\[[^\]\n]+\]:)\s*(?!https?://)[^)\s]*[:&][^)\s]*', re.I | re.M)


def inert(
    text: str,  # Markdown that a run printed
) -> str:
    """The same, with every tag shown as text but the few that pages of results use. Code is no exception:
    what one parser takes for code, another one may not"""
    return _SCRIPT_LINK.sub(r'\1#', _TAG.sub('&lt;', text))


def _inert_output(o, titled=str):
    "An output without HTML, its Markdown inert, with titles for references"
    kept = {k: v for k, v in o.get('data', {}).items() if k not in ('text/html', 'application/javascript')}
    if 'text/markdown' in kept:
        kept['text/markdown'] = titled(inert(cell_text(kept['text/markdown'])))
    return {**o, 'data': kept} if 'data' in o else o


# %%
hostile = 'dog<script>alert(1)</script> <img src=x onerror=alert(2)> `<b>` <details>1 < 2</details>'
tame = inert(hostile)
assert '<script' not in tame and '<img' not in tame and '<details>1 < 2</details>' in tame
tame


# %% [markdown]
# ## The pages of a book, and the check before both renderers

# %%
#| export
def load_pages(
    root,  # folder of the checkout
    files: list[str],  # from `chapter_files`
    appendices=(),  # those of them that are counted with letters
) -> list:  # (path, notebook or None, [(kind, source)], chapter number or letter; 0 for an unnumbered page)
    "Read and filter every page, includes written out"
    index, titles, out = symbol_index(root, files), title_index(root, files), []
    chapter, letters = 0, iter(string.ascii_uppercase)
    for page in files:
        folder = os.path.dirname(page)
        text = (Path(root) / page).read_text(encoding='utf-8')
        if page.endswith('.ipynb'):
            nb = filter_notebook(fresh_copy(root, folder, json.loads(text)), index, folder, titles)
            cells = [(c['cell_type'], c['source']) for c in nb['cells']]
        else:
            nb, whole = None, _with_includes(text, Path(root) / folder)
            linked = link_names(whole, index, folder)
            cells = [('markdown', outside_code(lambda t: link_titles(t, titles, folder), linked))]
        title = next((s for k, s in cells if k == 'markdown' and s.lstrip().startswith('# ')), '')
        number = 0
        if page != files[0] and '.unnumbered' not in title.lstrip().split('\n')[0]:
            if page in appendices:
                number = next(letters)
            else:
                number = chapter = chapter + 1
        out.append((page, nb, cells, number))
    return out


def _with_includes(text, folder):
    "Markdown with its `include` lines replaced by the files that they name"
    content = lambda m: (folder / m.group(1)).read_text(encoding='utf-8')
    return re.sub(r'\{\{< include (\S+) >\}\}', content, text)


def cross_references(
    pages: list,  # from `load_pages`
) -> CrossRefs:  # `problems` is empty if all is well
    "Labels of the whole book, every reference checked"
    refs = CrossRefs()
    for page, _, cells, n in pages:
        refs.scan(page, cells, n)
    for page, _, cells, _ in pages:
        for kind, source in cells:
            refs.check(page, source if kind == 'markdown' else '\n'.join(split_directives(source)[1]))
    return refs


# %%
with tempfile.TemporaryDirectory() as toy_root:
    Path(toy_root, 'index.qmd').write_text('# Home {.unnumbered}\nSee @sec-one and @fig-none.')
    Path(toy_root, 'one.qmd').write_text('# One {#sec-one}')
    toy_pages = load_pages(toy_root, ['index.qmd', 'one.qmd'])
problems = cross_references(toy_pages).problems
assert [n for *_, n in toy_pages] == [0, 1]
problems


# %% [markdown]
# ## Tables that come from runs
#
# No number on a page is typed by hand. A page of results builds its tables from records with `markdown_table`
# (@sec-report), and `write_home` writes a picture and a table for the home page into include files.

# %%
#| export
def write_home(
    path,  # include file of the home page, for the picture; the table stands in `<name>_table` beside it
    picture: str,  # image, relative to the top folder
    caption: str,  # of the picture
    alt: str,  # its description
    table: str,  # from `markdown_table`
    table_caption: str,  # what was run: data, scale, seeds
):
    "Write the two parts of the home page that show results"
    from semidetr.core import atomic_write

    path = Path(path)
    alt = alt.replace('"', "'")
    figure = f'![{caption}]({picture}){{#fig-home fig-alt="{alt}"}}'
    atomic_write(path, f'{figure}\n')
    atomic_write(path.with_stem(f'{path.stem}_table'), f'{table}\n\n: {table_caption} {{#tbl-home}}\n')

# %% [markdown]
# ## Summary
#
# * `chapter_files` gives the reading order; a notebook that it lacks is not in the book.
# * `filter_notebook` shows exported code with its module, anchors every public name and links the names in
#   the prose.
# * `CrossRefs` numbers labels as in @eq-pages-number, and finds references that lead nowhere and labels that
#   are used twice.
# * `write_home` writes numbers from result files to the home page; nobody types them.
#
# ## Exercises
#
# 1. Give two figures of the toy book the same label. Which line tells you where the first one is?
# 2. `link_names` skips short names that two modules define. Count them with `symbol_index`, and decide
#    whether linking within the page would be right.
# 3. Quarto warns about an unresolved reference and goes on. Why is that the wrong default for a book whose
#    numbers come from runs?
