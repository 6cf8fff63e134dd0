# %% [markdown]
# # The site: one book, two renderers {#sec-site}
#
# > Turn the notebooks into the web site that you are reading, with Quarto or without it.
#
# Quarto renders such books well, but it is a large program that no Python package index offers, so on a plain
# machine a fresh clone would have no site. The book therefore has one description, `_quarto.yml`, and two
# renderers: Quarto where it is installed, and otherwise the small Python package *smalldocs*, to which this
# module adds what a book needs: chapter numbers, cross-references and formulas. Both get the same pages
# (@sec-pages), and both builds fail on the same faults.

# %%
#| default_exp book.site

# %%
#| export
import argparse
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from semidetr.book.pages import (
    CALLOUT,
    REF,
    CrossRefs,
    cell_text,
    chapter_files,
    cross_references,
    fail,
    filter_notebook,
    fresh_copy,
    load_pages,
    make_cell,
    need,
    outside_code,
    read_book,
    split_directives,
    stored_notebook,
    symbol_index,
    title_index,
)

# %%
import matplotlib.pyplot as plt

# %% [markdown]
# ## Formulas without a script
#
# Most sites draw formulas with a script that every reader downloads from another host. Browsers show MathML
# without one. `mathml` converts LaTeX, for example
#
# $$
# \mathrm{IoU}(a, b) = \frac{\lvert a \cap b \rvert}{\lvert a \cup b \rvert} ,
# $$ {#eq-site-mathml}
#
# and raises an error for a command that the converter does not know, instead of printing it raw.

# %%
#| export
_EQ = re.compile(r'\$\$(.+?)\$\$[ \t]*(?:\{#(eq-[\w-]+)\})?', re.S)
_INLINE = re.compile(r'(?<![\\$\w])\$(?!\s)([^$\n]+?)(?<!\s)\$(?![\d$])')


def mathml(
    tex: str,  # LaTeX
    display: bool = False,  # a line of its own
) -> str:  # MathML, which a browser shows without a script
    "LaTeX to MathML; a command that the converter does not know is an error"
    known = re.sub(r'\\operatorname\*?\{arg\\,\s*(min|max)\}', r'\\arg\1', tex.strip())
    out = need('latex2mathml.converter').convert(known, display='block' if display else 'inline')
    unknown = re.findall(r'\\arg(?:min|max)', tex) + re.findall(r'>(\\[A-Za-z]+)<', out)
    if unknown:
        where = ' '.join(tex.split())
        raise ValueError(f'LaTeX command {unknown[0]} is not known to both renderers, in: {where}')
    return out


# %%
formula = mathml(r'\frac{1}{2}')
assert '<mfrac>' in formula
formula


# %% [markdown]
# ## What smalldocs does not do
#
# smalldocs has no cross-references, formulas or heading numbers. `resolve` and `number_headings` write them
# into the Markdown before it renders the page.

# %%
#| export
def resolve(
    refs: CrossRefs,  # labels of the whole book
    text: str,  # Markdown
    page: str,  # path of its page
) -> str:  # Markdown without `@label` and `$`
    "Replace references, formulas and caption labels of one piece of Markdown"

    def ref(m):
        if m.group(1) not in refs.labels:
            return m.group(0)
        target, text, _ = refs.labels[m.group(1)]
        url = os.path.relpath(Path(target).with_suffix('.html'), os.path.dirname(page) or '.')
        return f"[{text}]({'' if target == page else url}#{m.group(1)})"

    def equation(m):
        formula, label = mathml(m.group(1), display=True), m.group(2)
        if not label:
            return formula
        number = f'<span>({refs.labels[label][2]})</span>'
        return f'<div id="{label}" class="equation"><div>{formula}</div>{number}</div>'

    def caption(m):
        return f': {refs.labels[m.group(2)][1]}: {m.group(1)} {{#{m.group(2)}'

    def picture(m):
        return f'![{refs.labels[m.group(3)][1]}: {m.group(1)}]{m.group(2)}'

    def replace(t):
        t = re.sub(r'!\[([^\]]*)\](\([^)]*\)\{#(fig-[\w-]+))', picture, t)
        return REF.sub(ref, _INLINE.sub(lambda m: mathml(m.group(1)), _EQ.sub(equation, t)))

    sources = lambda t: re.sub(r'(\]\((?!\w+:)[^)\s]*?)\.(?:qmd|ipynb)(#[^)\s]*)?\)', r'\1.html\2)', t)
    captions = lambda t: re.sub(r'^: (.*?) \{#(tbl-[\w-]+)', caption, t, flags=re.M)
    try:
        return outside_code(lambda t: replace(sources(t)), outside_code(captions, text, inline=False))
    except ValueError as e:
        raise ValueError(f'{page}: {e}') from None


def number_headings(
    text: str,  # Markdown of a cell
    n,  # chapter number or letter; 0 leaves the text as it is
    count: list[int],  # running numbers of the levels 2 and 3, updated in place
) -> str:
    "Write `3.1` before the headings of levels 2 and 3"

    def number(m):
        if m.group(1):
            return m.group(0)
        level = len(m.group(2))
        count[level - 2] += 1
        if level == 2:
            count[1] = 0
        return f"{m.group(2)} {'.'.join(map(str, [n, *count[: level - 1]]))} {m.group(3)}"

    heading = rf'({CALLOUT})?^(#{{2,3}}) (?!.*\.unnumbered)(.*)'
    return outside_code(lambda t: re.sub(heading, number, t, flags=re.M), text) if n else text


# %%
refs = CrossRefs()
toy_text = '# Boxes {#sec-a}\n## Overlap {#sec-b}\n$$x$$ {#eq-x}\n\n: Of `a` {#tbl-a}'
refs.scan('a.qmd', [('markdown', toy_text), ('code', '#| label: fig-a\nplot()')], n=3)
resolved = resolve(refs, 'See @fig-a and @sec-b; the code `@fig-a` stays.', 'b.qmd')
assert resolved == 'See [Figure 3.1](a.html#fig-a) and [Overlap](a.html#sec-b); the code `@fig-a` stays.'
assert resolve(refs, ': Of `a` {#tbl-a}', 'b.qmd') == ': Table 3.1: Of `a` {#tbl-a}'
fence = 3 * ':'  # a box: its title is no section
headings = f'## One\n### Half\n{fence} {{.callout-note}}\n## A title\n{fence}\n## Two'
numbered = number_headings(headings, 3, [0, 0])
[line for line in numbered.splitlines() if line.startswith('#')]


# %% [markdown]
# ## Figures with captions that may hold formulas
#
# smalldocs shows captions as plain text. `figure_output` makes the figure itself, so that a caption may hold
# a formula, a reference or `code`, as it may under Quarto.

# %%
#| export
def _option(options, key):
    "Value of a `#| key: value` line, or ''"
    m = re.search(rf'^#\|\s*{key}:\s*(.*)$', '\n'.join(options), re.M)
    return (need('yaml').safe_load(m.group(1)) if m else None) or ''


def figure_output(
    png: str,  # base64
    caption: str,  # Markdown, after `resolve`
    alt: str,  # text for those who cannot see the picture
) -> dict:  # a notebook output
    "One picture with its caption as HTML"
    text = need('markdown_it').MarkdownIt('commonmark', {'html': True}).renderInline(caption)
    image = f'<img class="img-fluid" alt="{html.escape(alt)}" src="data:image/png;base64,{png}">'
    figure = f'<figure class="figure">{image}\n<figcaption>{text}</figcaption></figure>'
    return dict(output_type='display_data', metadata={}, data={'text/html': figure})


def finish_code_cell(
    cell: dict,  # a code cell, after `filter_notebook`
    refs: CrossRefs,  # labels of the whole book
    page: str,  # path of the page
) -> dict:
    "Number captions, resolve references in captions and outputs"
    _, options, code = split_directives(cell['source'])
    label = _option(options, 'label')
    name = f'{refs.labels[label][1]}: ' if label in refs.labels else ''
    figure, table = (resolve(refs, _option(options, key), page) for key in ('fig-cap', 'tbl-cap'))
    outputs = []
    for o in cell.get('outputs', []):
        data = o.get('data', {})
        if figure and 'image/png' in data:
            png = cell_text(data['image/png']).strip()
            o = figure_output(png, name + figure, _option(options, 'fig-alt'))
        elif 'text/markdown' in data:
            text = resolve(refs, cell_text(data['text/markdown']), page)
            if table and text.lstrip().startswith('|'):
                text = f'{text.rstrip()}\n\n: {name}{table}\n'
            o = {**o, 'data': {'text/markdown': text}}
        outputs.append(o)
    kept = [o for o in options if not re.match(r'#\|\s*(fig|tbl)-', o)]
    return {**cell, 'source': '\n'.join([*kept, code]), 'outputs': outputs}


# %%
toy_source = '#| label: fig-a\n#| fig-cap: "A line, see @sec-b"\n#| fig-alt: "a line"\nplot()'
toy_figure = make_cell('code', toy_source, outputs=[dict(data={'image/png': 'AAAA'})])
shown_figure = finish_code_cell(toy_figure, refs, 'a.qmd')['outputs'][0]['data']['text/html']
assert 'Figure 3.1: A line, see <a href="#sec-b">Overlap</a>' in shown_figure
shown_figure[-90:]


# %% [markdown]
# ## Rendering
#
# `stage` writes the processed book to a folder that smalldocs renders as a plain web site. `build_site`
# chooses the renderer, and replaces the old site only when the new one is complete.

# %%
#| export
def _titled(cells, n):
    "Move `# Title {#sec-id}` to the front matter, where smalldocs reads it; the id stays as an anchor"
    is_title = lambda c: c['cell_type'] == 'markdown' and c['source'].lstrip().startswith('# ')
    i = next((i for i, c in enumerate(cells) if is_title(c)), None)
    if i is None:
        return cells
    head, _, rest = cells[i]['source'].lstrip().partition('\n')
    m = re.match(r'# (.*?)\s*(?:\{([^}]*)\})?$', head)
    label = re.search(r'#([\w-]+)', m.group(2) or '')
    anchor = f'<span id="{label.group(1)}"></span>\n\n' if label else ''
    title = json.dumps(f'{n} {m.group(1)}' if n else m.group(1), ensure_ascii=False)
    settings = [c['source'].strip('-\n') for c in cells[:i] if c['cell_type'] == 'raw']
    front = make_cell('raw', '\n'.join(['---', f'title: {title}', *settings, '---']), id='title')
    before = [c for c in cells[:i] if c['cell_type'] != 'raw']
    return [front, *before, {**cells[i], 'source': anchor + rest}, *cells[i + 1 :]]


def _front(book):
    "Title and author of the book, which stand on the home page alone, as under Quarto"
    about = {key: book['book'][key] for key in ('title', 'author') if key in book['book']}
    return make_cell('raw', '---\n' + need('yaml').safe_dump(about) + '---')


def _contents(chapters, pages):
    "The chapters, the home page by its heading"
    text = pages[0][2][0][1]
    heading = re.search(r'^# (.*?)\s*(?:\{[^}]*\})?$', text, re.M)
    home = dict(href=chapters[0], text=heading.group(1)) if heading else chapters[0]
    return [home, *chapters[1:]]


def _copy_assets(root, dest, book):
    "Style sheets, favicon and other resources"
    css = book['format']['html'].get('css', [])
    patterns = [*([css] if isinstance(css, str) else css), *book['project'].get('resources', [])]
    patterns += [book['book'].get('favicon', ''), book['format']['html'].get('include-after-body', '')]
    for pattern in filter(None, patterns):
        for file in Path(root).glob(pattern):
            target = Path(dest) / file.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, target)


# %%
#| export
def stage(
    root,  # folder of the checkout
    dest,  # folder to write
    book: dict,  # from `read_book`
    pages: list,  # from `load_pages`
    refs: CrossRefs,  # from `cross_references`
):
    "Write the book as smalldocs can render it"
    for page, nb, cells, n in pages:
        out, count = Path(dest) / page, [0, 0]
        out.parent.mkdir(parents=True, exist_ok=True)
        finish = lambda text: number_headings(resolve(refs, text, page), n, count)
        if nb is None:  # a page of text alone is one cell
            text = make_cell(*cells[0])
            parts = [finish(c['source']) for c in (_titled([text], n) if n else [_front(book), text])]
            out.write_text('\n\n'.join(parts), encoding='utf-8')
            continue
        finished = []
        for c in _titled(nb['cells'], n):
            code = c['cell_type'] == 'code'
            finished.append(finish_code_cell(c, refs, page) if code else {**c, 'source': finish(c['source'])})
        out.write_text(json.dumps(stored_notebook({**nb, 'cells': finished})), encoding='utf-8')
    options = {**book['format']['html']}
    for done_here in ('html-math-method', 'number-sections'):
        options.pop(done_here, None)
    chapters = book['book']['chapters'] + book['book'].get('appendices', [])
    listed = _contents(book['book']['chapters'], pages)  # without appendices
    sidebar = {**book['book'].get('sidebar', {}), 'contents': listed}
    config = dict(
        project={'type': 'book', 'output-dir': '_out'},
        book={**book['book'], 'chapters': chapters, 'sidebar': sidebar},
        format={'html': options},
    )
    Path(dest, '_quarto.yml').write_text(need('yaml').safe_dump(config, sort_keys=False), encoding='utf-8')
    _copy_assets(root, dest, book)


# %%
#| export
def _run(command, cwd, **env):
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **env}, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f'{Path(command[0]).name} failed:\n{done.stdout}{done.stderr}')


def build_site(
    root='.',  # folder of the checkout
    engine: str = 'auto',  # 'auto' takes Quarto where it is on the PATH; 'quarto'; 'fallback' takes smalldocs
) -> Path:  # folder of the site
    "Check the book and render it"
    root, book = Path(root).resolve(), read_book(root)
    appendices = chapter_files({'book': {'chapters': book['book'].get('appendices', [])}})
    pages = load_pages(root, chapter_files(book), appendices)
    refs = cross_references(pages)
    if refs.problems:
        fail('the book has broken references:\n' + '\n'.join(refs.problems))
    out = root / book['project'].get('output-dir', '_docs')
    if engine == 'auto':
        engine = 'quarto' if shutil.which('quarto') else 'fallback'
    if engine == 'quarto':
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        _run(['quarto', 'render'], root, PATH=path)
        return out
    need('smalldocs')
    smalldocs = [sys.executable, '-c', 'import sys; from smalldocs.cli import main; sys.exit(main())']
    with tempfile.TemporaryDirectory() as work:
        try:
            stage(root, work, book, pages, refs)
        except ValueError as e:
            fail(str(e))
        _run([*smalldocs, 'render', work], root)
        shutil.rmtree(out, ignore_errors=True)
        shutil.move(Path(work) / '_out', out)
    return out


# %% [markdown]
# ## What a build shows
#
# @fig-site-size is made from the pages of this book as the filter leaves them.

# %%
chapters = []  # (name, cells) of every notebook but pages of results
for page, nb, cells, _ in load_pages('../..', chapter_files(read_book('../..'))):
    if nb and Path(page).parent.name not in ('ablations', 'runs', 'benchmarks'):
        chapters.append((Path(page).stem, cells))
words = [sum(len(text.split()) for kind, text in cells if kind == 'markdown') for _, cells in chapters]
lines = [sum(len(text.splitlines()) for kind, text in cells if kind == 'code') for _, cells in chapters]
assert all(w > 0 and n > 0 for w, n in zip(words, lines))
dict(chapters=len(chapters), words=sum(words), lines=sum(lines))

# %%
#| label: fig-site-size
#| fig-cap: "Words of prose (left) and lines of code (right) on the page of each chapter. No page is code alone."
#| fig-alt: "Two horizontal bar charts with one bar for each chapter."
fig, axes = plt.subplots(1, 2, figsize=(6, 0.22 * len(chapters) + 1), dpi=80, sharey=True)
for ax, values, name, color in zip(axes, (words, lines), ('words', 'lines'), ('#1f77b4', '#ff7f0e')):
    ax.barh(range(len(chapters)), values, color=color)
    ax.set_xlabel(name)
axes[0].set_yticks(range(len(chapters)), [name for name, _ in chapters], fontsize=9)
axes[0].invert_yaxis()
plt.tight_layout()
plt.show()


# %% [markdown]
# ## Parameter tables
#
# When a notebook calls `show_doc`, nbdev uses `TableRenderer` (named in `settings.ini`): it shows the
# signature, the first sentence and the table of parameters.

# %%
#| export
def TableRenderer(
    sym,  # function or class
    name=None,  # shown instead of its own name
    title_level: int = 3,  # level of the heading
):  # an object that a notebook shows as Markdown
    "`show_doc` with a parameter table and without links to a server"
    docments = need('fastcore.docments')

    class Renderer(docments.MarkdownRenderer):
        def _repr_markdown_(self):
            text = f"{'#' * title_level} {self.nm}\n\n{super()._repr_markdown_()}"
            try:
                table = docments.DocmentTbl(self.sym)
            except Exception:
                return text
            return f'{text}\n\n{table._repr_markdown_()}' if table.has_docment else text

    return Renderer(sym, name=name, title_level=title_level)


# %%
parameters = TableRenderer(mathml)._repr_markdown_()
assert '| tex | str |' in parameters
print(parameters)


# %% [markdown]
# ## What Quarto calls
#
# Quarto pipes each notebook through `python -m semidetr.book.site --filter`, in the folder of the notebook.
# Before a build it calls `--fresh`: Quarto caches filtered notebooks by the time of their last change only, so
# a change in another chapter would be missed. Without an option the module builds the site.

# %%
#| export
def _checkout(here):
    "The nearest folder upwards that holds `_quarto.yml`"
    return next((d for d in [here, *here.parents] if (d / '_quarto.yml').exists()), here)


def main(
    argv=None,  # command line, without the program's name
) -> int:  # exit code
    "`python -m semidetr.book.site`: build the site, or serve Quarto as a filter"
    ap = argparse.ArgumentParser(
        prog='python -m semidetr.book.site', description='Build the site from _quarto.yml'
    )
    engines = ['auto', 'quarto', 'fallback']
    ap.add_argument('--engine', choices=engines, default='auto', help='auto: Quarto where it is on the PATH')
    ap.add_argument(
        '--filter', action='store_true', help='for Quarto: notebook on stdin, processed notebook on stdout'
    )
    ap.add_argument(
        '--fresh', action='store_true', help='for Quarto: forget filtered notebooks that it keeps'
    )
    a, here = ap.parse_args(argv), Path.cwd()
    root = _checkout(here)
    try:
        if not a.filter and not a.fresh:
            print(f'open {os.path.relpath(build_site(root, a.engine))}/index.html')
            return 0
        files = chapter_files(read_book(root))
        if a.filter:
            index, titles = symbol_index(root, files), title_index(root, files)
            folder = os.path.relpath(here, root)
            nb = fresh_copy(root, folder, json.load(sys.stdin))
            page = filter_notebook(nb, index, folder, titles)
            json.dump(stored_notebook(page), sys.stdout)
        if a.fresh:
            for file in files:
                os.utime(root / file)
    except Exception as e:
        if type(e).__name__ not in ('ConfigError', 'RuntimeError', 'ValueError'):
            raise
        print(e, file=sys.stderr)
        return 2
    return 0


# %%
#| export
if __name__ == '__main__' and globals().get('__spec__'):
    sys.exit(main())

# %% [markdown]
# ## Summary
#
# * `_quarto.yml` describes the book once; `build_site` renders it with Quarto or, without it, with smalldocs.
# * References are checked before either renderer runs; a broken one ends the build.
# * Formulas such as @eq-site-mathml become MathML, so the site needs no script from another host and can be
#   read from a disk.
# * The old site is replaced only when the new one is complete.
# * Without the extra `[book]` a one-line error names what to install.
#
# ## Exercises
#
# 1. Write a formula with `\nocommand` into a copy of a chapter and build the site with smalldocs. Which place
#    does the message name?
# 2. Why must `--fresh` touch every notebook when only one of them has changed?
# 3. `resolve` treats captions and prose alike. Find what would go wrong if it also looked into code blocks.
