"Every detector with every method: both stages, images without pseudo labels, exact resume"

import json
import math
import os
import signal

import pytest
import torch
from semidetr.detectors.from_detr import DETECTORS
from semidetr.semi.methods import METHODS
from semidetr.train.checkpoint import load_checkpoint
from semidetr.train.config import override, preset, with_detector
from semidetr.train.trainer import Trainer
from test_trainer import TINY, same

ALL = ['pseudo.threshold=0', 'pseudo.min_score=0', 'mining.init=all']
EMPTY = ['pseudo.threshold=2', 'mining.init=score']  # no box has such a score
SMALLER = [
    'detector.backbone.weights=none',
    'run.test=false',
    'pseudo.top_k=5',
    'run.log_every=1',
    'data.data=digits:n=12,size=64',
    'data.dev=0',
    'optim.iters=3',
]
CASES = [('supervised', 'boxes')]
CASES += [(m, pseudo) for m in METHODS if m != 'supervised' for pseudo in ('boxes', 'empty')]


def small(name, method, *more):
    "A run of three steps: one of burn-in, one with one-to-many and one with one-to-one assignment"
    own = [item for item in TINY if not item.startswith('detector.')]
    base = override(preset('digits'), ['detector.transformer.num_queries=15', *own])
    cfg = with_detector(base, name)
    if hasattr(cfg.detector, 'denoising'):
        sizes = [f'detector.{x}' for x in ('transformer.d_model=32', 'transformer.ffn=32', 'denoising.num=8')]
        sizes += ['detector.transformer.n_heads=4', 'detector.transformer.dec_layers=2']
    else:
        sizes = [f'detector.{x}' for x in ('d_model=32', 'ffn=32', 'heads=4', 'layers=2', 'num_queries=15')]
    return override(cfg, [f'method.name={method}', *sizes, *SMALLER, *more])


def stages(method):
    "One-to-many assignment in the first two steps, one-to-one in the third; a burn-in of one step"
    return ['method.T1=2', *([] if method == 'supervised' else ['method.burn_in_iters=1'])]


def log_of(folder):
    return [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]


@pytest.mark.parametrize('method,pseudo', CASES)
@pytest.mark.parametrize('name', DETECTORS)
def test_it_trains_in_both_stages(tmp_path, name, method, pseudo):
    "Finite losses, and weights that move, also where no unlabelled image has a pseudo label"
    wanted = ALL if pseudo == 'boxes' else EMPTY
    run = Trainer(small(name, method, *stages(method), *wanted), tmp_path / 'r', progress=False)
    before = {n: p.detach().clone() for n, p in run.student.named_parameters() if p.requires_grad}
    run.fit()
    after = dict(run.student.named_parameters())
    assert [n for n, p in before.items() if torch.equal(p, after[n])] == []
    rows = log_of(tmp_path / 'r')
    assert len(rows) == 3 and all(0 < row['loss'] < math.inf for row in rows)
    if method != 'supervised':
        assert (rows[-1]['pseudo_boxes'] > 0) == (pseudo == 'boxes')
        assert any(k.startswith('loss_unsup') for k in rows[-1])


@pytest.mark.parametrize('name', ['detr', 'deformable_detr_two_stage'])
def test_a_stopped_run_ends_with_the_weights_of_an_unbroken_one(tmp_path, name):
    "Stopped in the first stage of Semi-DETR, between its stages"
    cfg = small(name, 'semi_detr', *stages('semi_detr'), *ALL)
    Trainer(cfg, tmp_path / 'whole', progress=False).fit()
    run = Trainer(cfg, tmp_path / 'r', progress=False)
    real = run.method.step

    def step(*args):
        if args[-1] == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    run.method.step = step
    with pytest.raises(KeyboardInterrupt, match='same command'):
        run.fit()
    assert load_checkpoint(tmp_path / 'r')['step'] == 2
    torch.manual_seed(123)
    Trainer(cfg, tmp_path / 'r', progress=False).fit()
    assert same(load_checkpoint(tmp_path / 'r'), load_checkpoint(tmp_path / 'whole'))
