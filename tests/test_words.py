"Plain English in the field's terms: what readers stumbled over stays out of prose, messages and names."

import ast
import re

import pytest
from conftest import ROOT

PROSE = sorted(
    [
        *(ROOT / 'nbs' / '_py').rglob('*.py'),
        *(ROOT / 'nbs' / 'guides').glob('*.qmd'),
        *(ROOT / f for f in ('README.md', 'CONTRIBUTING.md', 'index.qmd')),
    ]
)
MODULES = sorted(f for f in (ROOT / 'semidetr').rglob('*.py') if not f.name.startswith('_'))

COUNTED = """
    box(?:es)? query queries detections? objects? images? lines? seeds? cells? pixels? bytes MB seconds
    minutes
    samples? points? rows? pages? records? files? one once twice positives predictions slots? scores? levels?
    entr(?:y|ies) masks? numbers? tuple
""".split()
UNITS = """
    image object query layer level scene step run core place class record seed page side study iteration file
    split process machine device head cell row batch arm
""".split()
PER = re.compile(rf"(?<!')\b(?:{'|'.join(COUNTED)}) an? (?:{'|'.join(UNITS)})\b", re.I)
RIDDLES = re.compile(
    r'\b(heaps?|swears?|sworn|dreamt|dreams?|witness(?:es)?|young(?:er)?|grown|talkative(?:ly)?|gone on with'
    r'|goes on with|chance that|slip of the pen|house that|speaks?|second opinion|buys?|says the)\b',
    re.I,
)
# what described the package before it had layers: names that are gone, sentences that are no longer true
STALE = re.compile(
    r'\b(StepConfig|train_step|method_parts|supervised_step|RunState\.steps'
    r'|knows nothing of|smaller numbers)\b'
)
NAMES = {'story', 'desert', 'seen', 'look', 'theirs', 'ours', 'asks', 'least', 'YOUNG', 'asked'}


def found(pattern, path):
    text = path.read_text(encoding='utf-8')
    joined = re.sub(r'\n# ', '\n', text) if path.suffix == '.py' else text
    return [m.group(0) for m in pattern.finditer(re.sub(r'\s+', ' ', joined))]


def ids(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize('path', PROSE, ids=ids)
def test_per(path):
    "`per image`, not `an image`, where something is counted"
    assert found(PER, path) == []


@pytest.mark.parametrize('path', PROSE, ids=ids)
def test_riddles(path):
    "Words of our own where the field has a term: component, not heap; predicts, not swears"
    assert found(RIDDLES, path) == []


@pytest.mark.parametrize('path', PROSE, ids=ids)
def test_stale(path):
    "A method is a class with settings, state and a step; layers, not numbers, order the modules"
    assert found(STALE, path) == []


@pytest.mark.parametrize('path', MODULES, ids=ids)
def test_names(path):
    "A name says what it holds: `detections`, `cached`, `teacher_out`, `min_score`, `needs_queries`"
    names = set()
    for n in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)):
            names.add(n.name)
        elif isinstance(n, ast.arg):
            names.add(n.arg)
        elif isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store):
            names.add(n.id)
        elif isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store):
            names.add(n.attr)
    assert names & NAMES == set()


def test_the_rules_catch_what_they_are_for():
    assert PER.search('ten boxes an image') and not PER.search('boxes per image')
    assert RIDDLES.search('the costs form two heaps') and not RIDDLES.search('two components')
    assert STALE.search('The trainer knows nothing of teachers')
    assert not STALE.search('the trainer knows no name')
