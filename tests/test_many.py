"One process with all images of a step, and two with half of them each: the same losses and gradients."

import warnings
import pytest, torch
from test_trainer import tiny
from together import run_together
from semidetr.core import rank, world_size
from semidetr.many import rows_of_all
from semidetr.semi import methods
from semidetr.semi.methods import METHODS, SemiDETRPlus
from semidetr.train.config import override
from semidetr.train.optim import average_gradients
from semidetr.train.trainer import Trainer, make_loader

STAGES = dict(o2m=9, o2o=0)  # T1
MINING = ['mining.init=all', 'pseudo.min_score=0', 'pseudo.top_k=5', 'pseudo.threshold=0.0105']


def whole(name, *items):
    "Settings of a method, four images of each kind on one process"
    cfg = tiny(
        'data.count=12',
        'run.test=false',
        'method.burn_in_iters=0',
        'loader.n_labelled=4',
        'loader.n_unlabelled=4',
        'consistency.hidden=8',
        *MINING,
        method=name,
    )
    return override(cfg, [*(SemiDETRPlus.items(cfg) if METHODS[name] is SemiDETRPlus else []), *items])


def cases():
    "Name -> (settings, what is missing on the second process)"
    found = {}
    for name in METHODS:
        for stage, t1 in STAGES.items():
            for missing in ('nothing', 'boxes'):
                found[f'{name} {stage} without {missing}'] = whole(name, f'method.T1={t1}'), missing
    return found


def share(cfg, n):
    "The settings of one of n processes"
    c = cfg.loader
    return override(cfg, [f'loader.n_labelled={c.n_labelled // n}', f'loader.n_unlabelled={c.n_unlabelled // n}'])


def without(rows, missing):
    "Detections or targets, empty for the second half of all images if boxes are missing"
    if missing == 'nothing':
        return rows
    half = len(rows) * world_size() // 2
    keys = 'boxes', 'labels', 'scores'
    return [
        {k: v[:0] if k in keys and i + len(rows) * rank() >= half else v for k, v in row.items()}
        for i, row in enumerate(rows)
    ]


def step(cfg, missing, folder):
    "Losses, gradients and buffers of the first step, averaged over the processes"
    warnings.simplefilter('ignore')
    run = Trainer(share(cfg, world_size()), folder, progress=False)
    batch = next(iter(make_loader(run.cfg, run.data, 0, False)))
    for module in (run.student, run.teacher, run.method):
        module.double()  # float32 would leave it to rounding which side of a ReLU a number is on
    for part in batch.values():
        part['images'] = part['images'].double()
    real = {k: getattr(methods, k) for k in ('teacher_predict', 'teacher_detections')}
    batch['labelled']['targets'] = without(batch['labelled']['targets'], missing)
    for k, f in real.items():
        setattr(methods, k, lambda *args, f=f: without(f(*args), missing))
    try:
        run.student.train()
        result = run.method.step(run.student, run.teacher, batch, 0)
    finally:
        for k, f in real.items():
            setattr(methods, k, f)
    sum(result.losses.values()).backward()
    params = [*run.student.parameters(), *run.method.parameters()]
    average_gradients(params)
    rows = rows_of_all([{k: v.item() for k, v in result.losses.items()}])
    losses = {k: sum(r.get(k, 0) for r in rows) / len(rows) for r in rows for k in r}
    grads = {
        name: p.grad.clone()
        for part in ('student', 'method')
        for name, p in getattr(run, part).named_parameters()
        if p.grad is not None
    }
    return dict(losses=losses, grads=grads, buffers=dict(run.method.named_buffers()), scalars=result.scalars)


WORKER = '''
import pickle, torch
import test_many
from semidetr.core import is_main, start_processes
start_processes()
for name, (cfg, missing) in test_many.cases().items():
    out = test_many.step(cfg, missing, sys.argv[1] + '/run')
    if is_main():
        torch.save(out, f'{sys.argv[1]}/{name}.pt')
'''


@pytest.fixture(scope='module')
def halves(tmp_path_factory):
    "Results of two processes, by the name of the case"
    folder = tmp_path_factory.mktemp('two')
    run_together(WORKER, folder)
    return {name: torch.load(folder / f'{name}.pt') for name in cases()}


def largest_difference(a, b):
    "Over tensors of the same names, relative to the largest number in each"
    assert {k for k in a if a[k].any()} == {k for k in b if b[k].any()}
    found = [((a[k] - b[k]).abs().max() / a[k].abs().max()).item() for k in a if a[k].any()]
    return max(found, default=0)


@pytest.mark.parametrize('name', cases())
def test_two_processes_take_the_step_of_one(name, halves, tmp_path):
    cfg, missing = cases()[name]
    one, two = step(cfg, missing, tmp_path), halves[name]
    assert one['losses'].keys() == two['losses'].keys()
    wrong = {k: (v, two['losses'][k]) for k, v in one['losses'].items() if abs(v - two['losses'][k]) > 1e-5 * max(1, abs(v))}
    assert not wrong
    flat = [torch.cat([x['grads'][k].flatten() for k in one['grads'] if k in two['grads']]) for x in (one, two)]
    assert (flat[0] - flat[1]).norm() <= 1e-5 * flat[0].norm()
    for k, v in one['buffers'].items():
        torch.testing.assert_close(two['buffers'][k], v, rtol=1e-5, atol=1e-6)
