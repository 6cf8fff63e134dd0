"Notebooks, package, text twins and metadata must agree; the package must work without the tools of the book."

import ast, configparser, hashlib, re, shutil, subprocess, sys, tomllib, zipfile
from pathlib import Path
import nbformat, pytest
import semidetr
from conftest import ROOT, copy_book
from nbtool import notebooks, stale


def ids(path):
    return path.stem


def digest(folder):
    return {
        f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest()
        for d in ('nbs', 'semidetr')
        for f in (folder / d).rglob('*')
        if f.suffix in ('.py', '.ipynb')
    }


def modules():
    "Dotted names of all modules that come from notebooks, without the name of the package"
    files = (f.relative_to(ROOT / 'semidetr').with_suffix('') for f in (ROOT / 'semidetr').rglob('*.py'))
    return {'.'.join(f.parts) for f in files if not f.name.startswith('_')}


def run(*command, **kwargs):
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


@pytest.mark.parametrize('command', ['nbdev_export', 'nbdev_clean'])
def test_leaves_the_tree_unchanged(command, tmp_path):
    "The committed modules are what the notebooks export, and the committed notebooks are clean"
    book = copy_book(tmp_path)
    before = digest(book)
    done = run(Path(sys.executable).parent / command, cwd=book)
    assert done.returncode == 0, done.stderr
    after = digest(book)
    assert sorted(f for f in before.keys() | after.keys() if before.get(f) != after.get(f)) == []


def test_every_module_comes_from_a_notebook():
    exported = {m for nb in notebooks() for m in re.findall(r'#\| default_exp ([\w.]+)', nb.read_text())}
    assert modules() == exported


def test_the_book_is_not_in_the_wheel(tmp_path):
    "A wheel holds the package without its pages, and the sources of the op"
    (tmp_path / 'book').mkdir()
    build = (
        f'from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})'  # needs no network
    )
    done = run(sys.executable, '-c', build, cwd=copy_book(tmp_path / 'book'))
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(next(tmp_path.glob('*.whl'))).namelist()
    assert {'semidetr/train/trainer.py', 'semidetr/cli/__main__.py'} <= set(names)
    assert 'semidetr/py.typed' in names and any(n.startswith('semidetr/csrc/') for n in names)
    assert not [n for n in names if n.startswith(('semidetr/book', 'nbs', 'tests'))]


def test_twins():
    assert stale() == [], 'run `make nb NB=name`'


@pytest.mark.parametrize('nb', notebooks(), ids=ids)
def test_notebook_file(nb):
    "One kernel name for all; outputs saved, none of them an error; small enough for a repository"
    content = nbformat.read(nb, 4)
    assert content.metadata.kernelspec.name == 'python3'
    outputs = [o for c in content.cells for o in c.get('outputs', [])]
    assert outputs, 'not executed: run `make nb`'
    assert not [o for o in outputs if o.output_type == 'error']
    assert nb.stat().st_size < 600_000


@pytest.mark.parametrize('nb', [f for f in notebooks() if f.parent.name == 'ablations'], ids=ids)
def test_parameters_cell(nb):
    "A notebook for papermill has exactly one tagged cell: without it the wrong experiment would run silently"
    tagged = sum('parameters' in c.metadata.get('tags', []) for c in nbformat.read(nb, 4).cells)
    assert tagged == 1 if nb.stem.endswith('_run') else tagged <= 1


def test_lint():
    ruff = shutil.which('ruff', path=str(Path(sys.executable).parent)) or shutil.which('ruff')
    assert ruff, 'ruff is missing: pip install -e .[book]'
    done = run(ruff, 'check', '--no-cache', '--output-format', 'concise', '.', cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_leftovers():
    "No notes to oneself, no debugger, no path of one machine, in any text of the tree"
    bad = re.compile(
        r'\b(TO'
        r'DO|FIX'
        r'ME|XX'
        r'X)\b|ip'
        r'db|break'
        r'point\(\)|pdb\.set'
        r'_trace|(?<![\w.:/~-])/(work|root|home|tmp|farm|opt)/[a-z]'
    )
    files = [
        f
        for d in ('nbs', 'semidetr', 'tests', 'benchmarks')
        for f in (ROOT / d).rglob('*')
        if f.suffix in ('.py', '.ipynb', '.toml', '.md', '.qmd', '.css', '.cpp', '.h', '.cu')
    ]
    files += [f for f in ROOT.iterdir() if f.suffix in ('.md', '.qmd', '.yml', '.ini', '.toml', '.py')]
    found = []
    for f in files:
        text = re.sub(r'"image/(png|jpeg)": "[^"]*"', '', f.read_text(encoding='utf-8', errors='replace'))
        found += [
            f'{f.relative_to(ROOT)}: {text[max(m.start() - 30, 0) : m.end() + 20]!r}'
            for m in bad.finditer(text)
        ]
    assert found == []


def test_public_names():
    "Everything that `from semidetr import ...` promises exists"
    missing = [n for n in semidetr.__all__ if getattr(semidetr, n, None) is None]
    assert missing == []
    with pytest.raises(AttributeError, match='nothing_of_the_kind'):
        semidetr.nothing_of_the_kind


def test_import_is_cheap():
    code = (
        "import sys, semidetr; assert semidetr.__version__; assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    assert run(sys.executable, '-c', code).returncode == 0


def test_runs_without_the_tools_of_the_book():
    "Without nbdev, Jupyter and the renderers every module can be imported, and the site says what to install"
    absent = (
        'nbdev execnb fastcore ghapi jupytext papermill nbclient nbformat ipykernel IPython jupyter_core '
        'jupyter_client smalldocs latex2mathml pytest playwright'
    )
    code = f"""
import sys
for name in {absent.split()}: sys.modules[name] = None
from importlib import import_module
for name in {sorted(modules())}: import_module(f'semidetr.{{name}}')
from semidetr.book.site import mathml, TableRenderer
from semidetr.core import ConfigError
try: mathml('x')
except ConfigError as e: assert 'latex2mathml' in str(e) and '[book]' in str(e), e
else: raise SystemExit('no error')
"""
    done = run(sys.executable, '-c', code, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_metadata():
    "One version, requirements that pip can read, no tool of the book among the runtime requirements"
    ini = configparser.ConfigParser(delimiters=['='])
    ini.read(ROOT / 'settings.ini')
    d = ini['DEFAULT']
    assert d['version'] == semidetr.__version__
    assert f"## {d['version']}" in (ROOT / 'CHANGELOG.md').read_text()
    runtime = {re.split(r'[<>=]', r)[0] for r in d['requirements'].split()}
    assert not runtime & {
        'nbdev',
        'fastcore',
        'jupytext',
        'papermill',
        'ipykernel',
        'pytest',
        'smalldocs',
        'ruff',
        'playwright',
        'pyyaml',
    }
    assert set(tomllib.loads((ROOT / 'pyproject.toml').read_text())) == {'build-system', 'tool'}
    assert 'Apache License' in (ROOT / 'LICENSE').read_text()


def test_methods_are_named_in_one_place():
    """A method is known by name to the methods themselves and to the presets; everything else asks it.

    Except for the arms of the page of the rivals.
    """
    named = re.compile(r"'(supervised|mean_teacher|semi_detr)'")
    files = [f for f in (ROOT / 'semidetr').rglob('*.py') if named.search(f.read_text(encoding='utf-8'))]
    places = {f.relative_to(ROOT / 'semidetr').as_posix() for f in files}
    assert places == {'semi/methods.py', 'train/config.py', 'lab/rivals.py'}


def test_the_loop_fits_a_screen():
    "Teacher update, losses, backward, step, log, evaluation and checkpoint in at most 40 lines"
    text = (ROOT / 'semidetr' / 'train' / 'trainer.py').read_text(encoding='utf-8')
    methods = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef) and n.name == 'fit']
    assert len(methods) == 1 and methods[0].end_lineno - methods[0].lineno < 40


def test_the_layers_fit_a_screen():
    text = (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8')
    section = re.search(r'^## The layers\n(.*?)^## ', text, re.M | re.S).group(1)
    assert len(section.splitlines()) <= 45
    assert all(f'**{what}**' in section for what in ('A method', 'A detector', 'A data format', 'A study'))
