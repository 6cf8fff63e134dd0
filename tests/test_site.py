"The site as a reader gets it: links, pictures, formulas, navigation, a phone; and faults that stop the build"

import html, html.parser, json, os, re, shutil, subprocess, sys, urllib.parse
import nbformat, pytest
from conftest import ROOT, copy_book
from semidetr.core import ConfigError
from semidetr.book.pages import (
    CrossRefs,
    chapter_files,
    cross_references,
    filter_notebook,
    fresh_copy,
    load_pages,
    read_book,
    stored_notebook,
    symbol_index,
    title_index,
    write_home,
)
from semidetr.book.site import build_site, figure_output, main, mathml, number_headings, resolve
from semidetr.lab.report import markdown_table

FILES = chapter_files(read_book(ROOT))
RESULT = next((f for f in FILES if f.startswith('nbs/ablations/01_')), None)
RESULTS = [f for f in FILES if re.match(r'nbs/(ablations|benchmarks)/[0-9]', f)]
TITLES = title_index(ROOT, FILES)


class Links(html.parser.HTMLParser):
    "Ids and links of one page"

    def __init__(self, text):
        super().__init__()
        self.ids, self.links = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        if a.get('id'):
            self.ids.append(a['id'])
        self.links += [a[k] for k in ('href', 'src') if a.get(k)]


def test_links(site):
    "Every local link leads to a file, and every #fragment to an id on it"
    pages = {f.resolve(): Links(f.read_text(encoding='utf-8')) for f in site.rglob('*.html')}
    assert len(pages) == len(FILES)
    bad, count = [], 0
    for f, page in pages.items():
        for link in page.links:
            u = urllib.parse.urlsplit(link)
            if u.scheme or u.netloc or link == '#':
                continue
            target = (f.parent / urllib.parse.unquote(u.path)).resolve() if u.path else f
            if target.is_dir():
                target /= 'index.html'
            count += 1
            if not target.exists():
                bad.append(f'{f.name}: no file {link}')
            elif u.fragment and target in pages and urllib.parse.unquote(u.fragment) not in pages[target].ids:
                bad.append(f'{f.name}: no id {link}')
    assert bad == [] and count > 10 * len(pages)


def test_nothing_from_elsewhere(site):
    "No page loads a script, a style, a picture or a font from another host"

    class Loads(html.parser.HTMLParser):
        found = []

        def handle_starttag(self, tag, attributes):
            a = dict(attributes)
            url = (
                a.get('src')
                if tag in ('script', 'img', 'iframe', 'source')
                else a.get('href')
                if tag == 'link'
                else None
            )
            if url and url.startswith(('http:', 'https:', '//')):
                Loads.found.append(url)

    for f in site.rglob('*.html'):
        Loads().feed(f.read_text(encoding='utf-8'))
    assert Loads.found == []


def test_no_loose_ends(site):
    "No unresolved reference, include, formula or directive is left in the text of a page"

    class Text(html.parser.HTMLParser):
        depth, out = 0, ''

        def handle_starttag(self, tag, attributes):
            self.depth += tag in ('code', 'pre', 'script', 'style')

        def handle_endtag(self, tag):
            self.depth -= tag in ('code', 'pre', 'script', 'style')

        def handle_data(self, data):
            self.out += data if self.depth == 0 else ''

    for f in site.rglob('*.html'):
        t = Text()
        t.feed(f.read_text(encoding='utf-8'))
        for loose in ('?@', '@fig-', '@tbl-', '@eq-', '@sec-', '{{<', '$$', '#|', '{#', ':::'):
            assert loose not in t.out, (f.name, loose)


# --- in a browser ----------------------------------------------------------------------
@pytest.fixture
def visit(browser, address):
    "Open a page, and fail at its end on errors of the page or requests to other hosts"
    opened, faults = [], []

    def go(path, width=1280, height=900):
        p = browser.new_page(viewport=dict(width=width, height=height))
        p.on('pageerror', lambda e: faults.append(str(e)))
        p.on('console', lambda m: m.type == 'error' and faults.append(m.text))
        p.on(
            'request',
            lambda r: (
                None
                if r.url.startswith((address, 'data:', 'blob:'))
                else faults.append(f'outside request: {r.url}')
            ),
        )
        p.goto(f'{address}/{path}', wait_until='load')
        opened.append(p)
        return p

    yield go
    for p in opened:
        p.close()
    assert faults == []


def html_of(path):
    return path.rsplit('.', 1)[0] + '.html'


LOOKED_AT = ['index.html', 'nbs/01_boxes.html'] + ([html_of(RESULT)] if RESULT else [])


@pytest.mark.parametrize('path', LOOKED_AT)
def test_pictures_load(visit, path):
    p = visit(path)
    p.evaluate("document.querySelectorAll('img').forEach(i => i.loading = 'eager')")
    p.wait_for_function('[...document.images].every(i => i.complete)')
    widths = p.evaluate('[...document.images].map(i => i.naturalWidth)')
    assert all(w > 0 for w in widths) and (widths or path != 'nbs/01_boxes.html')
    assert p.evaluate("[...document.querySelectorAll('main img')].every(i => i.alt.trim())"), (
        'a picture without a description'
    )


def test_home_page(visit):
    p = visit('index.html')
    assert 'semidetr' in p.title() and p.locator('h1').count() >= 1
    text = p.inner_text('main')
    assert 'make book' in text and 'make test' in text


def test_formulas(visit):
    p = visit('nbs/01_boxes.html')
    boxes = p.evaluate(
        "[...document.querySelectorAll('math')]"
        '.map(m => m.getBoundingClientRect()).map(r => r.width*r.height)'
    )
    assert boxes and min(boxes) > 0


@pytest.mark.skipif(not RESULT, reason='the result page is not in the book yet')
def test_result_page(visit):
    p = visit(html_of(RESULT))
    assert p.locator('main table').count() >= 1 and p.locator('main img').count() >= 1


def test_navigation(visit):
    "From the home page through the contents to a chapter, and on to the next"
    p = visit('index.html')
    p.locator('#quarto-sidebar .sidebar-item-section', has_text='Foundations').locator('a').first.click()
    p.locator(
        'nav a[href*="00_core"], aside a[href*="00_core"], #quarto-sidebar a[href*="00_core"]'
    ).first.click()
    p.wait_for_url('**/nbs/00_core.html')
    following = p.locator('.nav-page-next a, a.pagination-link[aria-label], .page-navigation a').last
    following.click()
    p.wait_for_url('**/nbs/01_boxes.html')


def test_reference_leads_to_its_figure(visit, site):
    has_reference = lambda f: any(
        link.startswith('#fig-') for link in Links(f.read_text(encoding='utf-8')).links
    )
    page = next(f for f in sorted(site.glob('nbs/**/*.html')) if has_reference(f))
    p = visit(page.relative_to(site).as_posix())
    p.locator('main a[href^="#fig-"]').first.click()
    assert p.evaluate('document.querySelector(decodeURIComponent(location.hash)) !== null')


@pytest.mark.parametrize('path', LOOKED_AT)
def test_phone(visit, path):
    "Nothing is wider than a phone: long code and tables scroll within themselves"
    p = visit(path, width=390, height=800)
    assert p.evaluate('document.documentElement.scrollWidth <= window.innerWidth')


WIDE = """() => {
    document.querySelectorAll('details').forEach(d => d.open = true);
    const wide = e => e.clientWidth > 0 && e.scrollWidth > e.clientWidth + 1;
    const inside = ['pre', 'table', 'math[display=block]', '.equation > div', '.cell-output-markdown'];
    const page = e => e.closest('[data-page]').dataset.page;
    const name = e => page(e) + ' ' + e.tagName + ': ' + e.textContent.slice(0, 50);
    return [...document.querySelectorAll(inside.map(x => 'main ' + x).join(','))].filter(wide).map(name);
}"""


def test_nothing_overflows(site, browser):
    "At 1280 pixels no code, table or formula is wider than its column, on any page but the executed runs"
    around = (site / 'nbs' / '01_boxes.html').read_text(encoding='utf-8')
    around = re.sub(r'<script\b[^>]*\bsrc=.*?</script>', '', around, flags=re.S)
    main = re.compile(r'(<main\b[^>]*>)(.*)(</main>)', re.S)
    parts = []  # what stands in the main column of each page; many together, since loading takes the time
    for f in sorted(f for f in site.rglob('*.html') if f.parent.name != 'runs'):
        text = main.search(f.read_text(encoding='utf-8')).group(2)
        text = re.sub(r'<script\b.*?</script>', '', text, flags=re.S)
        text = re.sub(r'src="[^"]*"', 'src="data:,"', text)  # pictures never overflow
        parts.append(f'<div data-page="{f.name}">{text}</div>')
    page, together, bad = (
        browser.new_page(viewport=dict(width=1280, height=900)),
        site / 'nbs' / '_all.html',
        [],
    )
    try:
        for k in range(0, len(parts), 12):
            some = ''.join(parts[k : k + 12])
            together.write_text(main.sub(lambda m: m.group(1) + some + m.group(3), around, count=1))
            page.goto(together.as_uri(), wait_until='domcontentloaded')
            bad += page.evaluate(WIDE)
    finally:
        together.unlink()
        page.close()
    assert bad == []


def test_the_sidebar_opens_at_the_page(visit):
    "One part is open, and its current page is on the screen"
    p = visit('nbs/train/10_predict.html')
    assert p.locator('#quarto-sidebar .sidebar-section.show').count() == 1
    assert p.locator('#quarto-sidebar a[href*="/runs/"]').count() == 0
    box = p.locator('#quarto-sidebar .sidebar-link.active').bounding_box()
    assert 0 < box['y'] < 900


def test_search_finds_chapters(visit):
    "The chapter of a word comes first, the words are marked, and executed runs are not searched"
    p = visit('index.html')
    p.locator('#quarto-search input').fill('pseudo labels')
    p.wait_for_selector('.search-result')
    first = p.locator('.search-result').first
    assert 'pseudo label' in first.inner_text().lower() and p.locator('.search-result mark').count()
    links = p.eval_on_selector_all('.search-result', 'all => all.map(a => a.getAttribute("href"))')
    assert links and not any('/runs/' in link for link in links)


def test_title_and_author_once(visit):
    p = visit('index.html')
    assert p.locator('h1.title').count() == 1 and p.inner_text('h1.title') == 'semidetr'
    assert p.inner_text('main').count('semidetr authors') == 1
    assert visit('nbs/00_core.html').inner_text('main').count('semidetr authors') == 0


def test_home_is_one_screen(visit):
    "What it is, the picture, the result, install, shell, Python and links above the fold at 1280 x 900"
    p = visit('index.html')
    box = p.locator('.home').bounding_box()
    assert box['y'] + box['height'] <= 900
    assert p.locator('.home img').count() == 1 and p.locator('.home table').count() == 1
    assert p.locator('.home pre').count() == 3 and p.locator('.home a').count() >= 4


def prose(page):
    "Text of paragraphs and list items of a page"
    main = re.sub(r'<(script|style|math|pre|table|svg)\b.*?</\1>', ' ', page.split('<main', 1)[1], flags=re.S)
    parts = re.findall(r'<(?:p|li)\b[^>]*>(.*?)</(?:p|li)>', main, re.S)
    return [' '.join(html.unescape(re.sub(r'<[^>]+>', '', part)).split()) for part in parts]


@pytest.mark.parametrize('page', RESULTS)
def test_a_page_of_results_concludes(site, page):
    "Finding, picture, table, in this order; no sentence twice; nothing is minus zero"
    text = (site / html_of(page)).read_text(encoding='utf-8')
    places = [text.find(mark) for mark in ('class="finding"', '<figure', '<table', '<details class="fold"')]
    assert -1 < places[0] < places[1] < places[3] and places[0] < places[2] < places[3]
    visible = prose(text)
    assert not [part for part in visible if re.search(r'[-−]0\.0(?!\d)', part)]
    assert not re.search(r'<td[^>]*>[^<]*[-−]0\.0(?!\d)', text)
    sentences = [x for part in visible for x in re.split(r'(?<=[.;:]) ', part) if len(x) > 70]
    assert {x for x in sentences if sentences.count(x) > 1} == set()


@pytest.mark.parametrize('page', [f for f in FILES if f.startswith('nbs/') and '/runs/' not in f])
def test_a_picture_at_once(site, page):
    "Every guide and chapter has a picture near its top"
    looked_up = 'notation', 'glossary', 'references', 'reference_'
    if page.startswith(tuple(f'nbs/guides/{name}' for name in looked_up)):
        return
    text = (site / html_of(page)).read_text(encoding='utf-8').split('<main', 1)[1]
    before = re.sub(r'<[^>]+>', ' ', text[: text.index('<img')])
    assert len(before.split()) < 160, 'a screen of text above the first picture'


# --- the parts, and what goes wrong ----------------------------------------------------
def build(folder, *options):
    return subprocess.run(
        [sys.executable, '-m', 'semidetr.book.site', *options], cwd=folder, capture_output=True, text=True
    )


@pytest.fixture
def small(tmp_path):
    "A book of a home page and one chapter"
    copy_book(tmp_path)
    shutil.rmtree(tmp_path / 'nbs')
    (tmp_path / 'nbs').mkdir()
    nb = dict(
        cells=[
            dict(
                cell_type='markdown', metadata={}, id='a', source='# One {#sec-one}\n\n> Afterwards.\n\nText.'
            )
        ],
        metadata={},
        nbformat=4,
        nbformat_minor=5,
    )
    (tmp_path / 'nbs' / '00_one.ipynb').write_text(json.dumps(nb))
    (tmp_path / 'index.qmd').write_text('# Home {.unnumbered}\n\nSee @sec-one.\n')
    (tmp_path / '_quarto.yml').write_text(
        'project: {type: book, output-dir: _docs}\n'
        'book: {title: t, chapters: [index.qmd, nbs/00_one.ipynb]}\n'
        'format: {html: {theme: default}}\n'
    )
    return tmp_path


def test_small_book(small):
    assert build(small, '--engine', 'fallback').stdout.strip() == 'open _docs/index.html'
    assert 'href="nbs/00_one.html#sec-one">One</a>' in (small / '_docs' / 'index.html').read_text()


def test_a_page_of_text_alone(small):
    "A `.qmd` page has a number in title and contents, its label as anchor, and numbered sections"
    (small / 'nbs' / '01_two.qmd').write_text(
        '# Two {#sec-two}\n\n> Afterwards.\n\n## Half {#sec-half}\n\nSee @sec-one.\n'
    )
    (small / '_quarto.yml').write_text(
        (small / '_quarto.yml').read_text().replace('00_one.ipynb]', '00_one.ipynb, nbs/01_two.qmd]')
    )
    (small / 'index.qmd').write_text('# Home {.unnumbered}\n\nSee @sec-two.\n')
    assert build(small, '--engine', 'fallback').returncode == 0
    home, page = ((small / '_docs' / f).read_text() for f in ('index.html', 'nbs/01_two.html'))
    assert 'href="nbs/01_two.html#sec-two">Two</a>' in home and '2 Two' in home
    assert (
        'sec-two' in Links(page).ids and '2.1 Half' in page and 'href="00_one.html#sec-one">One</a>' in page
    )


@pytest.mark.parametrize(
    'text, message',
    [
        ('See @fig-gone.', 'index.qmd: no label for @fig-gone'),
        ('A {#sec-x}\n\n## B {#sec-one}', 'label sec-one is used twice'),
        ('$$ \\nocommand{x} $$', 'LaTeX command \\nocommand is not known to both renderers'),
    ],
)
def test_a_broken_page_stops_the_build(small, text, message):
    "One message, exit code 2, and the old site stays as it was"
    build(small, '--engine', 'fallback')
    before = (small / '_docs' / 'index.html').read_bytes()
    page = small / ('index.qmd' if 'sec-x' not in text else 'nbs/01_two.qmd')
    page.write_text(f'# {text}')
    if page.name != 'index.qmd':
        (small / '_quarto.yml').write_text(
            (small / '_quarto.yml').read_text().replace('00_one.ipynb]', '00_one.ipynb, nbs/01_two.qmd]')
        )
    done = build(small, '--engine', 'fallback')
    assert done.returncode == 2 and message in done.stderr and 'Traceback' not in done.stderr
    assert (small / '_docs' / 'index.html').read_bytes() == before


def test_outside_a_checkout(tmp_path):
    with pytest.raises(ConfigError, match='checkout'):
        build_site(tmp_path)
    done = build(tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize('text', ['', 'book: {title: t}', 'project: {type: website}', 'a: [', '- a'])
def test_a_description_of_no_book(tmp_path, text):
    (tmp_path / '_quarto.yml').write_text(text)
    done = build(tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and '_quarto.yml' in done.stderr


def test_without_the_renderer(small, monkeypatch):
    monkeypatch.setitem(sys.modules, 'smalldocs', None)
    with pytest.raises(ConfigError, match=r'smalldocs.*\[book\]'):
        build_site(small, 'fallback')


def test_quarto_is_chosen_where_it_is(small, monkeypatch):
    "A stand-in on the PATH shows that `auto` calls `quarto render` with this Python first on the PATH"
    tool = small / 'bin' / 'quarto'
    tool.parent.mkdir()
    tool.write_text(
        '#!/bin/sh\necho "$@" > called\ncommand -v python > which\n'
        'mkdir -p _docs && echo quarto > _docs/index.html\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv('PATH', f'{tool.parent}:/usr/bin:/bin')
    build_site(small)
    assert (small / 'called').read_text().strip() == 'render'
    assert (small / 'which').read_text().strip() == f'{sys.prefix}/bin/python'
    (small / 'index.qmd').write_text('# Home\n\n@fig-gone\n')
    with pytest.raises(ConfigError, match='@fig-gone'):
        build_site(small)


def test_the_filter_that_quarto_calls(root):
    "Stdin to stdout, in the folder of the notebook; the same as the other renderer gets"
    source = (root / 'nbs' / '01_boxes.ipynb').read_text()
    done = subprocess.run(
        [sys.executable, '-m', 'semidetr.book.site', '--filter'],
        cwd=root / 'nbs',
        input=source,
        capture_output=True,
        text=True,
    )
    page = json.loads(done.stdout)
    titles = title_index(root, FILES)
    there = filter_notebook(json.loads(source), symbol_index(root, FILES), 'nbs', titles)
    assert page == stored_notebook(there)
    code = [''.join(c['source']) for c in page['cells'] if c['cell_type'] == 'code']
    assert any('def generalized_box_iou' in c for c in code), 'exported code is shown'
    assert not any(
        line.startswith(('#| export', '#| hide', '#| default_exp')) for c in code for line in c.splitlines()
    )


@pytest.mark.parametrize('page', [f for f in FILES if f.endswith('.ipynb')])
def test_what_the_filter_writes_is_a_notebook(root, page):
    "Lines keep their newlines, which Quarto loses if a source is one string; nbformat accepts the whole"
    nb = json.loads((root / page).read_text(encoding='utf-8'))
    nb = stored_notebook(filter_notebook(nb, {}, os.path.dirname(page), TITLES))
    nbformat.validate(nb)
    for c in nb['cells']:
        assert isinstance(c['source'], list) and all(line.endswith('\n') for line in c['source'][:-1])
        fences = (
            [line for line in c['source'] if line.startswith(':::')] if c['cell_type'] == 'markdown' else []
        )
        assert len(fences) % 2 == 0, 'a box that is not closed'
        shown = ''.join(
            ''.join(v)
            for o in c.get('outputs', [])
            for k, v in o.get('data', {}).items()
            if k.startswith('text/')
        )
        assert shown.count(':::') % 2 == 0, 'an output that opens a box and does not close it'


def test_mathml():
    assert mathml('x_i').startswith('<math') and 'display="block"' in mathml('x', display=True)
    assert 'IoU</mo>' in mathml(r'\operatorname{IoU}'), 'a name is one word, not a product of letters'
    assert 'arg&#x02009;min</mo>' in mathml(r'\operatorname{arg\,min}_x f')
    for unknown in (r'\argmin_x f', r'\nocommand{x}'):
        with pytest.raises(ValueError, match='not known'):
            mathml(unknown)


def test_figure_caption_is_html_and_alt_is_escaped():
    out = figure_output('AAAA', 'A *b* `c`', 'a "quoted" <alt>')['data']['text/html']
    assert '<em>b</em>' in out and '<code>c</code>' in out and 'alt="a &quot;quoted&quot; &lt;alt&gt;"' in out


def test_a_page_that_was_executed_here_is_shown(tmp_path):
    "`make book` writes into `runs/book`; the committed notebook is shown where its cells are other ones"
    cell = lambda source, out: dict(cell_type='code', metadata={}, source=source, outputs=[out])
    committed, fresh = (dict(cells=[cell('run()', out)]) for out in ('old', 'new'))
    folder = tmp_path / 'runs' / 'book' / 'nbs' / 'ablations'
    folder.mkdir(parents=True)
    (folder / 'page.ipynb').write_text(json.dumps(fresh))
    assert fresh_copy(tmp_path, 'nbs/ablations', committed) == fresh
    assert fresh_copy(tmp_path, 'nbs', committed) == committed
    changed = dict(cells=[cell('other()', 'old')])
    assert fresh_copy(tmp_path, 'nbs/ablations', changed) == changed


def test_make_book_leaves_committed_files_alone(root):
    "Its page is executed into a folder that git ignores"
    book = (root / 'Makefile').read_text().split('\nbook:')[1].split('\n\n')[0]
    assert 'nbtool.py fresh' in book and 'nbtool.py run' not in book
    assert '/runs/' in (root / '.gitignore').read_text().split()


def test_folds_and_pictures_of_a_chapter():
    "A fold ends at the next heading, whatever stands between; ids stay unique; a code block has no headings"
    text = '# A {#sec-a}\n\n> Do.\n\nWhy.\n\n## Runs {.fold}\n\n```\n# no\n```'
    figure = dict(data={'image/png': 'AAAA'})
    nb = dict(
        cells=[
            dict(cell_type='code', id='x', metadata={}, source='#| default_exp a', outputs=[]),
            dict(cell_type='markdown', id='a', metadata={}, source=text),
            dict(cell_type='code', id='b', metadata={}, source='#| label: fig-a\nplot()', outputs=[figure]),
            dict(cell_type='markdown', id='c', metadata={}, source='### Next\n\n## Last {.fold}\n\nEnd.'),
        ]
    )
    cells = filter_notebook(nb, {}, 'nbs')['cells']
    starts = [c['source'].split('\n')[0] for c in cells]
    assert starts[0] == '# A {#sec-a}' and starts[1].startswith('<div class="lead-picture"><a href="#fig-a">')
    assert starts[2:] == [
        'Why.',
        '## Runs {.fold}',
        '<details class="fold">',
        '```',
        '#| label: fig-a',
        '</details>',
        '### Next',
        '## Last {.fold}',
        '<details class="fold">',
        'End.',
        '</details>',
    ]
    assert '<summary>Show 1 figure</summary>' in cells[4]['source']
    assert len({c['id'] for c in cells}) == len(cells)


def test_references_are_titles(tmp_path):
    "In prose, captions and outputs; an unknown label stays, and is reported"
    (tmp_path / 'one.qmd').write_text('# One {#sec-one}\n\n## A `part` {#sec-part}\n')
    titles = title_index(tmp_path, ['one.qmd'])
    assert titles == {'sec-one': ('one.qmd', 'One'), 'sec-part': ('one.qmd', 'A `part`')}
    out = dict(output_type='display_data', metadata={}, data={'text/markdown': 'see @sec-part'})
    code = dict(
        cell_type='code', id='a', source='#| fig-cap: "as in @sec-one"\nx = "@sec-one"', outputs=[out]
    )
    prose = dict(cell_type='markdown', id='b', source='@sec-one, `@sec-one`, @sec-none')
    a, b = filter_notebook(dict(cells=[code, prose]), {}, 'deep', titles)['cells']
    assert a['source'] == '#| fig-cap: "as in [One](../one.html#sec-one)"\nx = "@sec-one"'
    assert a['outputs'][0]['data']['text/markdown'] == 'see [A `part`](../one.html#sec-part)'
    assert b['source'] == '[One](../one.html#sec-one), `@sec-one`, @sec-none'


def test_titles_of_callouts_are_no_sections():
    text = '# A {#sec-a}\n## One {#sec-one}\n\n::: {.callout-note}\n## Title\n:::\n\n## Two {#sec-two}\n'
    refs = CrossRefs()
    refs.scan('a.qmd', [('markdown', text)], 3)
    assert refs.labels['sec-two'][1:] == ('Two', '3.2')
    lines = number_headings(text, 3, [0, 0]).splitlines()
    assert lines[1].startswith('## 3.1 One') and '## Title' in lines and lines[-1].startswith('## 3.2 Two')


def test_table_captions_may_hold_code_and_code_may_hold_captions():
    text = ': Of `a` and @tbl-b {#tbl-a}\n\n: Other {#tbl-b}\n\n```\n: none {#tbl-c}\n```\n'
    refs = CrossRefs()
    refs.scan('a.qmd', [('markdown', text)], 3)
    assert resolve(refs, text, 'a.qmd').splitlines()[::2] == [
        ': Table 3.1: Of `a` and [Table 3.2](#tbl-b) {#tbl-a}',
        ': Table 3.2: Other {#tbl-b}',
        '```',
        '```',
    ]


def test_appendices_have_letters(tmp_path):
    for name in ('index', 'one', 'more', 'last'):
        (tmp_path / f'{name}.qmd').write_text(f'# {name} {{#sec-{name}}}\n\n## Part {{#sec-{name}-part}}\n')
    labels = cross_references(
        load_pages(tmp_path, ['index.qmd', 'one.qmd', 'more.qmd', 'last.qmd'], ['more.qmd', 'last.qmd'])
    ).labels
    names = ('one', 'one-part', 'more', 'last', 'last-part')
    assert [labels[f'sec-{k}'][2] for k in names] == ['1', '1.1', 'A', 'B', 'B.1']


def test_home_include(tmp_path):
    table = markdown_table(['a', 'b'], [[1, 2.5]])
    assert table == '| a | b |\n| :--- | ---: |\n| 1 | 2.5 |'
    write_home(tmp_path / 'deep' / '_home.md', 'x.png', 'Caption.', 'say "hi"', table, 'Table.')
    text = (tmp_path / 'deep' / '_home.md').read_text()
    assert '![Caption.](x.png){#fig-home fig-alt="say \'hi\'"}' in text
    text = (tmp_path / 'deep' / '_home_table.md').read_text()
    assert text.startswith(table) and text.rstrip().endswith(': Table. {#tbl-home}')


def test_main_reports_faults_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
