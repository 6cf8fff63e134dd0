"Reference: every public name and setting is described; `help` shows the page; pages come from the source"

import ast
import inspect
import pydoc
import subprocess
import sys
import pytest
import yaml
import semidetr
from conftest import ROOT
from semidetr.book.describe import (
    EXAMPLES,
    chapter_of,
    commands_page,
    example_of,
    fill_markers,
    names_page,
    plain,
    public_modules,
    settings_of,
    settings_page,
)
from semidetr.docs import describe_source, document, full_text, module_names
from semidetr.train.card import flat_settings
from semidetr.train.config import Config, to_dict
from test_cli import COMMANDS

PUBLIC = {**public_modules(ROOT / 'semidetr'), 'train': 'train.api'}
BUILT_IN = {'', 'int', 'float', 'str', 'bool', 'list', 'dict', 'tuple', 'object', 'Any', 'Path'}


def described(name):
    return module_names(f'semidetr.{PUBLIC[name]}')[name]


def returns_something(name):
    path = ROOT / 'semidetr' / f"{PUBLIC[name].replace('.', '/')}.py"
    for node in ast.parse(path.read_text()).body:
        if getattr(node, 'name', '') == name:
            return any(isinstance(n, ast.Return) and n.value is not None for n in ast.walk(node))


def test_all_public_names_are_listed():
    assert set(PUBLIC) | {'__version__'} == set(semidetr.__all__)


@pytest.mark.parametrize('name', PUBLIC)
def test_a_public_name_is_described(name):
    "What it does; each parameter with its meaning, unless its type is a class of the package; the result"
    d = described(name)
    assert len(d.doc.split()) >= 3, f'{name}: no docstring'
    for p in d.described:
        assert p.about or p.kind not in BUILT_IN, f'{name}: say what {p.name} is, in a comment behind it'
    if d.kind == 'function' and returns_something(name):
        assert d.returns, f'{name}: say what it returns, in a comment behind the colon'
    for m in d.methods:
        inherited = any(m.name.rpartition('.')[2] in ('annotation', 'index_of', 'size') for _ in (0,))
        assert m.doc or inherited, f'{m.name}: no docstring'


@pytest.mark.parametrize('name', PUBLIC)
def test_help_shows_what_the_page_shows(name):
    "Docstring, parameters, result and errors"
    value = semidetr.train if name == 'train' else getattr(semidetr, name)
    text = inspect.getdoc(value)
    d = described(name)
    assert ' '.join(d.doc.split()[:4]) in ' '.join(text.split())
    if d.kind != 'value':
        for p in d.described:
            assert p.about in text and p.name in text
        assert all(r in text for r in d.raises) and d.returns in text
    assert document(value) is value and inspect.getdoc(value) == text, 'twice is once'


def test_help_of_methods():
    text = pydoc.plain(pydoc.render_doc(semidetr.Predictor))
    assert 'maximum number of images per forward pass' in text and 'scores must be larger' in text
    assert 'of `Predictor`' in pydoc.render_doc(semidetr.Run.predictor)


def test_import_stays_cheap():
    code = "import sys, semidetr; dir(semidetr); assert 'semidetr.docs' not in sys.modules"
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_the_page_of_names():
    "Every name once, with signature; an example for most, and for those that users meet first"
    page = names_page()
    heads = [p.split()[1] for p in page if p.startswith('### ')]
    assert sorted(heads) == sorted(PUBLIC)
    assert all(f'`semidetr.{module}.{name}`' in '\n'.join(page) for name, module in PUBLIC.items())
    found = {n: EXAMPLES.get(n) or example_of(n, chapter_of(m, ROOT / 'nbs')) for n, m in PUBLIC.items()}
    for name in (
        'train',
        'predict',
        'evaluate',
        'Run',
        'Predictor',
        'open_dataset',
        'make_split',
        'plan_run',
    ):
        assert found[name], name
    assert [n for n, e in found.items() if not e] == []
    for text in found.values():
        ast.parse(text)


def test_examples_that_no_chapter_runs_are_run():
    space = dict(semidetr=semidetr)
    for name, text in EXAMPLES.items():
        if name not in ('Detector', 'load_config'):  # minutes, and a file of the reader
            exec(text, space)


def test_the_page_of_settings_is_the_configuration():
    "Names and defaults as `Config()` has them, each with a meaning"
    rows, values = settings_of(), flat_settings(to_dict(Config()))
    assert {name for name, *_ in rows} == set(values)
    assert [name for name, _, about, *_ in rows if not about] == []
    for name, default, *_ in rows:
        try:
            read = ast.literal_eval(default)
        except (ValueError, SyntaxError):
            continue
        read = list(read) if isinstance(read, tuple) else read
        if name != 'detector.num_classes':  # 0 in `Config`: as many as the data have
            assert read == values[name], name
    assert '\n'.join(settings_page()).count('\n| `') == len(rows)


def test_the_page_of_commands():
    page = '\n'.join(commands_page())
    for name in COMMANDS:
        assert f'## semidetr {name} ' in page
    assert (
        '`--percent`: percent of the training images' in page and 'semidetr train --data path/to/coco' in page
    )


def test_markers_are_filled_and_nothing_else_changes():
    cell = lambda text, kind='markdown': dict(cell_type=kind, metadata={}, source=[text])
    other = [cell('# Title\n'), cell('<!-- generated: names -->', 'code'), cell('see `<!-- x -->`')]
    assert fill_markers(dict(cells=other)) == dict(cells=other)
    filled = fill_markers(dict(cells=[cell('<!-- generated: settings -->')]))['cells']
    assert len(filled) > 10 and all(c['source'].startswith('## ') for c in filled)
    assert len({c['id'] for c in filled}) == len(filled)


@pytest.mark.parametrize(
    'text,expected',
    [
        ('a < b * c', r'a &lt; b \* c'),
        ('`a*b < c` and $x$', r'`a*b < c` and \$x\$'),
        ('two\n lines', 'two lines'),
        ('a|b', r'a\|b'),
    ],
)
def test_comments_become_markdown(text, expected):
    assert plain(text, in_table=True) == expected


def test_every_form_of_a_signature():
    source = '''
def f(a, /, b: int = 1, *args, c=None, **more):  # the result
    "Doc"
    raise KeyError(a)
def g(
    x,  # first
    # above it,
    # in two lines
    y: 'A | B' = (1, 2),
    *,
    z={'a': 1},  # by name
) -> 'C':  # what comes out
    "Parameters as for nobody"
@dataclass(frozen=True)
class D(Base):
    "Data"
    n: int = (
        3  # inside
    )
    @property
    def p(self) -> int:  # a number
        "P"
    def _private(self): pass
VALUE = 3  # three
_HIDDEN = 4
'''
    d = describe_source(source)
    assert list(d) == ['f', 'g', 'D', 'VALUE']
    assert d['f'].signature == 'f(a, b: int = 1, *args, c=None, **more)' and d['f'].returns == 'the result'
    assert d['f'].raises == ('KeyError',)
    assert (
        d['g'].signature == "g(x, y: A | B = (1, 2), *, z={'a': 1})" and d['g'].returns == 'C: what comes out'
    )
    assert [p.about for p in d['g'].described] == ['first', 'above it, in two lines', 'by name']
    assert d['D'].parameters[0].about == 'inside' and d['D'].bases == ('Base',)
    assert [(m.name, m.kind, m.returns) for m in d['D'].methods] == [('D.p', 'property', 'int: a number')]
    assert d['VALUE'].doc == 'three'
    assert full_text(d['g']).splitlines()[2:4] == ['Parameters:', '    x - first']
    assert module_names('semidetr.nowhere') == {} and document(len) is len


def test_the_citation_names_paper_and_software():
    cff = yaml.safe_load((ROOT / 'CITATION.cff').read_text(encoding='utf-8'))
    assert cff['version'] == semidetr.__version__ and cff['license'] == 'Apache-2.0'
    paper, readme = cff['preferred-citation'], (ROOT / 'README.md').read_text(encoding='utf-8')
    assert paper['title'] in readme and paper['year'] == 2023
    for author in paper['authors']:
        assert f"{author['family-names']}, {author['given-names']}" in readme


def test_the_installation_shows_what_it_does():
    "pip's own lines, no silence of minutes; the README tells the size and the way without CUDA"
    lines = [line for line in (ROOT / 'Makefile').read_text().splitlines() if 'pip install' in line]
    assert lines and not any('--quiet' in line or ' -q ' in line for line in lines)
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert 'CPU build of torch' in readme and '6 GB' in readme
