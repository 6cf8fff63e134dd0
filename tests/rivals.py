"Tiny runs of the detectors with anchors and points, for several test files."

import json, math
import pytest, torch
from semidetr import Predictor
from semidetr.core import world_size
from semidetr.train.api import evaluate_run
from semidetr.train.checkpoint import load_checkpoint
from semidetr.train.config import override, preset, with_detector
from semidetr.train.optim import average_gradients
from semidetr.train.trainer import Trainer, make_loader
from test_many import in_batches, losses_of, whole
from test_trainer import TINY, same, stop_after

OWN = dict(
    faster_rcnn=[
        'detector.d_model=32',
        'detector.hidden=32',
        'detector.roi_samples=32',
        'detector.proposals=50',
    ],
    fcos=['detector.d_model=64', 'detector.convs=1'],
)
FILTERS = dict(  # so low that an untrained teacher has pseudo labels, and so high that it has none
    boxes=['method.candidate_score=0', 'method.class_score=0', 'method.max_uncertainty=9'],
    empty=['method.candidate_score=1'],
)
MATCHING = dict(
    soft_teacher=FILTERS['boxes'],
    dense_teacher=['view.strong=photometric', 'method.dense_ratio=.2', 'pseudo.threshold=0'],
)


PARTNER = dict(soft_teacher='faster_rcnn', dense_teacher='fcos')  # method that needs a detector -> detector
WEIGHTS = dict(  # of a layer behind the backbone
    soft_teacher='heads.box_head.fc6.weight',
    dense_teacher='points.head.classification_head.cls_logits.weight',
)


def rival(name, method, *more):
    "Settings of six iterations, two of them burn-in"
    own = [item for item in TINY if not item.startswith('detector.')]
    cfg = with_detector(override(preset('digits'), own), name)
    first = f'method.name={method}', 'pseudo.top_k=5', 'pseudo.threshold=0', 'pseudo.min_score=0'
    return override(
        cfg, [*first, 'detector.backbone.weights=none', *OWN[name], *MATCHING.get(method, []), *more]
    )


def whole_of(name, *items):
    "As `whole` of test_many for every method, also for those that do not train a transformer"
    if name not in PARTNER:
        return whole(name, *items)
    images = 'loader.n_labelled=4', 'loader.n_unlabelled=4', 'data.count=12'
    return rival(PARTNER[name], name, *images, 'run.test=false', 'method.burn_in_iters=0', *items)


def resumed_and_read(cfg, folder):
    "(result, rows of the log) of a run; one that is stopped after two iterations ends like it"
    result = Trainer(cfg, folder / 'whole', progress=False).fit()
    rows = [json.loads(line) for line in (folder / 'whole' / 'log.jsonl').read_text().splitlines()]
    rows = [row for row in rows if 'loss' in row]
    assert all(0 < row['loss'] < math.inf for row in rows)
    run = Trainer(cfg, folder / 'r', progress=False)
    stop_after(run, 2)
    with pytest.raises(KeyboardInterrupt, match='same command'):
        run.fit()
    torch.manual_seed(123)
    Trainer(cfg, folder / 'r', progress=False).fit()
    assert same(load_checkpoint(folder / 'r'), load_checkpoint(folder / 'whole'))
    assert set(evaluate_run(folder / 'whole', part='dev')[1]) == {'teacher', 'student'}
    found = Predictor(folder / 'whole', threshold=0.0)(torch.rand(3, 61, 83))
    assert found['boxes'].shape[1] == 4 and len(found['scores']) == len(found['names'])
    return result, rows


def shared_step(name, folder, *items):
    "Losses and gradients of two images of each kind in one batch or two, on one process or two, in float64"
    n = 2 // world_size()
    more = ['data.data=digits:n=8,size=48', 'data.count=4', 'data.dev=0', 'view.short_sides=[48]']
    more += ['run.test=false', 'method.burn_in_iters=0']
    more += [f'loader.n_labelled={n}', f'loader.n_unlabelled={n}', *items]
    run = Trainer(rival(PARTNER[name], name, *more), folder, progress=False)
    batch = next(iter(make_loader(run.cfg, run.data, 0, False)))
    for network in (run.student, run.teacher):
        network.double()
    for part in batch.values():
        part['images'] = part['images'].double()
    run.method.double()
    run.passes(in_batches(batch, run.cfg.optim.accumulate))
    average_gradients(run.student.parameters())
    losses = torch.tensor([v for _, v in sorted(losses_of(run).items())], dtype=torch.float64)
    if world_size() > 1:
        torch.distributed.all_reduce(losses)
        losses /= world_size()
    grads = torch.cat([p.grad.flatten() for p in run.student.parameters() if p.requires_grad])
    return dict(losses=losses, grads=grads)
