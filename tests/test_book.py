"The rules of the book that a machine can check: what CONTRIBUTING.md asks of a notebook."

import ast, json, re
from pathlib import Path
import pytest
from conftest import ROOT
from nbtool import NBS, notebooks
from semidetr.book.layers import LAYERS, import_graph, reading_order, upward_imports
from semidetr.book.pages import (
    CrossRefs,
    chapter_files,
    cross_references,
    defined_names,
    is_exported,
    link_names,
    load_pages,
    notebook_module,
    read_book,
    split_directives,
)


def cells_of(path):
    "(kind, words for nbdev, option lines, source) of every cell"
    for c in json.loads(path.read_text(encoding='utf-8'))['cells']:
        source = ''.join(c['source'])
        words, options, code = split_directives(source) if c['cell_type'] == 'code' else (set(), [], source)
        yield c, words, options, code


CHAPTERS = [f for f in notebooks() if f.parent == NBS or f.parent.name in LAYERS]
PAGES = notebooks()
chapter = pytest.mark.parametrize('path', CHAPTERS, ids=lambda f: f.stem)
page = pytest.mark.parametrize('path', PAGES, ids=lambda f: f.stem)


def size(code):
    "Statements, docstrings aside: a wide line holds no more of them than a narrow one"
    nodes = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.stmt)]
    return sum(
        not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) and isinstance(n.value.value, str))
        for n in nodes
    )


def has_definition(code):
    return any(isinstance(n, (ast.FunctionDef, ast.ClassDef)) for n in ast.parse(code).body)


@chapter
def test_size(path):
    "One sitting: 20 to 250 exported statements, cells of at most 40 statements, at most 60 cells"
    cells = list(cells_of(path))
    exported = [size(code) for c, words, _, code in cells if is_exported(words)]
    assert 20 <= sum(exported) <= 250
    assert max(size(code) for c, _, _, code in cells if c['cell_type'] == 'code') <= 40
    assert len(cells) <= 60


@page
def test_opening(path):
    "Title with a label, then what the reader can do afterwards"
    first = next(cells_of(path))
    lines = [line for line in first[3].splitlines() if line.strip()]
    assert first[0]['cell_type'] == 'markdown' and re.fullmatch(r'# \S.* \{#sec-[\w-]+\}', lines[0]), (
        'first line: # Title {#sec-name}'
    )
    assert lines[1].startswith('> '), 'second line: > what the reader can do afterwards'
    if path in CHAPTERS:  # the exporter takes this one line as the docstring of the module
        assert (
            len(lines[1]) <= 106
            and lines[1].endswith('.')
            and not any(line.startswith('>') for line in lines[2:])
        )


@chapter
def test_lesson(path):
    "Prose, in the chapters on the method a formula, a check, a picture, a summary and exercises"
    cells = list(cells_of(path))
    prose = '\n'.join(code for c, _, _, code in cells if c['cell_type'] == 'markdown')
    assert len(prose.split()) >= 120
    assert '$' in prose or path.parent.name not in ('detectors', 'matching', 'semi'), 'no formula'
    assert any(
        'assert ' in code
        for c, words, _, code in cells
        if c['cell_type'] == 'code' and not is_exported(words)
    ), 'no assert in a lesson cell'
    pictures = [
        o
        for c, _, _, _ in cells
        for o in c.get('outputs', [])
        if {'image/png', 'image/svg+xml'} & set(o.get('data', {}))
    ]
    assert pictures, 'no picture'
    headings = re.findall(r'^##+ (.*?)\s*(?:\{.*)?$', prose, re.M)
    assert 'Summary' in headings and 'Exercises' in headings


@page
def test_figures_are_labelled(path):
    "Every saved picture has a label, a caption that is a sentence, and a description"
    for c, _, options, code in cells_of(path):
        if not any({'image/png', 'image/svg+xml'} & set(o.get('data', {})) for o in c.get('outputs', [])):
            continue
        keys = dict(re.match(r'#\|\s*([\w-]+):\s*(.*)', o).groups() for o in options)
        assert keys.get('label', '').startswith('fig-'), code[:80]
        assert len(keys.get('fig-cap', '').split()) >= 4 and keys.get('fig-alt', '').strip('"\''), keys.get(
            'label'
        )


@chapter
def test_definitions_are_followed_by_examples(path):
    "Never more than six exported cells with definitions in a row"
    run = longest = 0
    for c, words, _, code in cells_of(path):
        if c['cell_type'] != 'code' or words & {'hide'}:
            continue
        run = run + 1 if is_exported(words) and has_definition(code) else 0
        longest = max(longest, run)
    assert longest <= 6


@page
def test_import_cells(path):
    "A cell imports or does something, not both; no star imports"
    for c, words, _, code in cells_of(path):
        if c['cell_type'] != 'code' or words & {'hide'} or code.lstrip().startswith('%'):
            continue
        body = ast.parse(code).body
        imports = [n for n in body if isinstance(n, (ast.Import, ast.ImportFrom))]
        assert len(imports) in (0, len(body)), code[:120]
        assert not any(a.name == '*' for n in imports for a in n.names), code[:120]


@chapter
def test_names_are_assigned_once(path):
    "What a lesson cell calls x is x to the end of the chapter"
    seen, twice = {}, set()
    for i, (c, words, _, code) in enumerate(cells_of(path)):
        if c['cell_type'] != 'code' or is_exported(words) or words & {'hide'}:
            continue
        targets = [t for n in ast.parse(code).body if isinstance(n, ast.Assign) for t in n.targets]
        names = {
            n.id
            for t in targets
            for n in ast.walk(t)
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        }
        twice |= {n for n in names - {'fig', 'ax', 'axes', '_'} if seen.setdefault(n, i) != i}
    assert twice == set()


@chapter
def test_docstrings(path):
    "Every public function and class says what it is for"
    bare = [
        n.name
        for c, words, _, code in cells_of(path)
        if is_exported(words)
        for n in ast.parse(code).body
        if isinstance(n, (ast.FunctionDef, ast.ClassDef))
        and not n.name.startswith('_')
        and not ast.get_docstring(n)
    ]
    assert bare == []


@page
def test_outputs(path):
    "Saved outputs hold no warnings and no path of one machine"
    for c, _, _, _ in cells_of(path):
        for o in c.get('outputs', []):
            text = ''.join(o.get('text', '')) + ''.join(
                ''.join(v) for k, v in o.get('data', {}).items() if k.startswith('text/')
            )
            assert o.get('name') != 'stderr', text[:200]
            assert not re.search(r'(?<![\w.])/(home|root|usr|tmp|work|Users)/', text), text[:200]


@page
def test_figures_are_there(path):
    "A cell with a figure's label has a picture among its saved outputs"
    for c, _, _, _ in cells_of(path):
        if re.search(r'^#\| label: fig-', ''.join(c['source']), re.M):
            assert any(
                'image/png' in o.get('data', {}) or 'image/svg+xml' in o.get('data', {}) for o in c['outputs']
            ), ''.join(c['source'])[:80]


def test_every_notebook_is_in_the_book():
    files = [f for f in chapter_files(read_book(ROOT)) if f.endswith('.ipynb')]
    listed, executed = ([f for f in files if ('/runs/' in f) == flag] for flag in (False, True))
    assert executed and all(
        (ROOT / f).is_file() for f in executed
    )  # a study that was just run may have a page more
    assert sorted(listed) == sorted(f.relative_to(ROOT).as_posix() for f in PAGES)
    place = lambda f: (list(LAYERS).index(Path(f).parent.name) if Path(f).parent.name in LAYERS else -1, f)
    numbered = [f for f in listed if ROOT / f in CHAPTERS]
    assert numbered == sorted(numbered, key=place), 'reading order is the order of layers and numbers'


def test_references():
    "Every @label exists, once"
    assert cross_references(load_pages(ROOT, chapter_files(read_book(ROOT)))).problems == []


def test_imports_go_down_the_layers():
    "No module imports a later layer, or a later chapter of its own, wherever in its text the import stands"
    graph = import_graph(ROOT / 'semidetr', reading_order(NBS))
    assert len(graph) > 40 and upward_imports(graph) == []


@pytest.mark.parametrize(
    'text',
    [
        'from semidetr.train.trainer import Trainer',
        'def f():\n    from ..train import trainer',
        'from semidetr import Trainer',
        "from importlib import import_module\nimport_module('semidetr.train.trainer')",
        'import semidetr.train.trainer as T',
    ],
)
def test_imports_that_hide_are_found(text, tmp_path):
    for name, body in {
        '__init__': "_PUBLIC = {'train.trainer': 'Trainer'}",
        'core': '',
        'data/files': text,
        'train/trainer': 'from ..data import files',
    }.items():
        file = tmp_path / 'semidetr' / f'{name}.py'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(body)
    assert upward_imports(import_graph(tmp_path / 'semidetr')) == [('data.files', 'train.trainer')]


def test_cuda_is_named_in_few_places():
    "Device and dtype come from the inputs"
    named = {
        f.stem for f in (ROOT / 'semidetr').rglob('*.py') if re.search(r"['\"]cuda|\.cuda\b", f.read_text())
    }
    few = {'core', 'many', 'trainer', 'attention', 'build', 'native', 'checkpoint', 'machine'}
    assert named <= few, named


# --- the tools themselves --------------------------------------------------------------
def test_names_link_to_definitions():
    index = {'area': ('nbs/01_boxes.ipynb', 'semidetr.boxes.area')}
    assert (
        link_names('`area()` and `area`.', index, 'nbs')
        == '[`area()`](01_boxes.html#semidetr.boxes.area) and [`area`](01_boxes.html#semidetr.boxes.area).'
    )
    for untouched in ('# `area`', '[`area`](x)', '``area``', '`other`', '```\n`area`\n```', 'a `b area c`'):
        assert link_names(untouched, index, 'nbs') == untouched


def test_defined_names():
    method = 'class C:\n    def m(self): pass\n    def _n(self): pass'
    assert defined_names('A = 1\n_b = 2\ndef f():\n    def inner(): pass') == ['A', 'f']
    assert defined_names(method) == ['C', 'C.m']


def test_module_of_a_notebook():
    assert (
        notebook_module(
            {
                'cells': [
                    dict(cell_type='markdown', source='#| default_exp no'),
                    dict(cell_type='code', source=['#| default_exp yes\n']),
                ]
            }
        )
        == 'semidetr.yes'
    )
    assert notebook_module({'cells': []}) == ''


def test_labels():
    refs = CrossRefs()
    refs.scan(
        'a',
        [
            ('markdown', '# A {#sec-a}\n\n## X\n\n### Y {#sec-y}\n\n## Z {#sec-z}\n`{#fig-no}`'),
            ('code', '#| label: fig-a'),
            ('code', '#| label: fig-a'),
        ],
        2,
    )
    assert (
        refs.labels['sec-y'][1:] == ('Y', '2.1.1')
        and refs.labels['sec-z'][1:] == ('Z', '2.2')
        and 'fig-no' not in refs.labels
    )
    assert refs.problems == ['a: label fig-a is used twice, first in a']
    refs.check('b', 'a@fig-mail.org, `@fig-code`, @tbl-gone.')
    assert refs.problems[1:] == ['b: no label for @tbl-gone']


@pytest.mark.parametrize('path', sorted((ROOT / 'semidetr').rglob('*.py')), ids=lambda f: f.stem)
def test_comprehensions_iterate(path):
    "`for x in [value]` inside a comprehension is an assignment in disguise"
    kinds = (ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp)
    nodes = [n for n in ast.walk(ast.parse(path.read_text(encoding='utf-8'))) if isinstance(n, kinds)]
    found = [g.iter for n in nodes for g in n.generators if isinstance(g.iter, (ast.List, ast.Tuple))]
    assert [
        ast.unparse(x) for x in found if len(x.elts) == 1 and not isinstance(x.elts[0], ast.Starred)
    ] == []
