"The chapter that calls the whole package: every cell still runs, with fewer iterations than on its page"

import matplotlib
import nbformat
from conftest import ROOT

PAGE = ROOT / 'nbs' / 'guides' / 'one_sitting.ipynb'
SHORT = {  # what keeps a run to seconds, and lets an untrained teacher label something
    'optim.iters=200': 'optim.iters=2',
    'optim.iters=120': 'optim.iters=4',
    "'method.T1=60'": "'method.T1=2'",
    "'pseudo.threshold=0.3'": "'pseudo.threshold=0.01', 'pseudo.top_k=5'",
    "'data.dev=20'": "'data.dev=20', 'view.short_sides=[64]', 'detector.backbone.weights=none'",
    'run.log_every=5': 'run.log_every=1',
}


def code_cells():
    return [c.source for c in nbformat.read(PAGE, 4).cells if c.cell_type == 'code']


def test_length():
    "One sitting: at most 150 lines of code"
    lines = [line for source in code_cells() for line in source.splitlines()]
    assert sum(bool(line.strip()) and not line.startswith('#') for line in lines) <= 150


def test_every_cell_runs(monkeypatch):
    matplotlib.use('agg')
    monkeypatch.setattr('matplotlib.pyplot.show', lambda: None)
    space = {}
    for source in code_cells():
        for old, new in SHORT.items():
            source = source.replace(old, new)
        exec(compile(source, str(PAGE), 'exec'), space)
    assert set(space['results']) == {'semi_detr', 'supervised'} and len(space['losses']) > 10
