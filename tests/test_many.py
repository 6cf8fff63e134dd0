"One process with all images of a step, and two with half of them each: the same losses, gradients and logs."

import dataclasses, functools, json, warnings
from pathlib import Path
import pytest, torch
from test_trainer import tiny
from together import run_together
from semidetr.core import ConfigError, is_main, rank, start_processes, world_size  # noqa: F401
from semidetr.many import rows_of_all
from semidetr.matching.losses import CriterionConfig, set_criterion
from semidetr.semi import methods
from semidetr.semi.fit import methods_of
from semidetr.semi.methods import METHODS, SemiDETRPlus
from semidetr.train.config import config_hash, override, with_detector
from semidetr.train.optim import average_gradients
from semidetr.train.trainer import Trainer, make_loader

STAGES = dict(o2m=9, o2o=0)  # T1
KEPT = {'all': None, 'no': 0}  # boxes that each image of the second process keeps
VARIANTS = {  # what else could depend on the split: one-to-many stage of semi_detr
    'both directions': ['consistency.cross=both', 'consistency.groups=2'],
    'other view': ['consistency.cross=swap', 'consistency.slot_weights=slots'],
    'jittered': ['consistency.boxes=jittered', 'consistency.projector=mlp'],
    'random': ['consistency.boxes=random', 'consistency.n_random=3'],
    'dense': ['consistency.density=dense', 'consistency.norm=false'],
    'hungarian': ['consistency.correspondence=hungarian'],
    'class rates': ['mining.sup_filter=class_rate', 'mining.memory=2'],
    'class mixtures': ['mining.con_filter=class_mixture', 'method.density_guard=.5'],
    'parallel': ['detector.group.queries=3', 'detector.second_head=true', 'method.T1=0'],
    'soft': ['criterion.soft_targets=true', 'method.T1=0', 'criterion.cls_loss=position'],
    'sure boxes': ['detector.suppressor.head=own', 'method.mds_unsup=sure', 'criterion.mds_target=both'],
}


def whole(name, *items):
    "Settings of a method, four images of each kind on one process"
    cfg = tiny(
        'data.count=12',
        'run.test=false',
        'method.burn_in_iters=0',
        'loader.n_labelled=4',
        'loader.n_unlabelled=4',
        'consistency.hidden=8',
        'mining.init=all',
        'pseudo.min_score=0',
        'pseudo.top_k=5',
        'pseudo.threshold=0.0105',
        method=name,
    )
    own = SemiDETRPlus.items(cfg) if METHODS[name] is SemiDETRPlus else []
    return override(cfg, [*own, *items])


def softmax():
    "A detector whose class losses are divided by weights"
    cfg = with_detector(whole('mean_teacher', 'method.T1=0'), 'detr')
    return override(cfg, ['detector.num_queries=20', 'detector.dropout=0', 'detector.ffn=32'])


def cases():
    "Name -> (settings, boxes that images of the second process keep)"
    found = {}
    for name in methods_of(None, METHODS):  # the others: test_soft_teacher, test_dense_teacher
        for stage, t1 in STAGES.items():
            for what, kept in KEPT.items():
                found[f'{name} {stage} {what} boxes'] = whole(name, f'method.T1={t1}'), kept
    for what, items in VARIANTS.items():
        found[f'{what} two boxes'] = whole('semi_detr', 'method.T1=9', *items), 2
    no_rows = whole('semi_detr', 'method.T1=9', *VARIANTS['other view'])
    found['no row for the projector'] = no_rows, 0
    return found | {f'softmax {what} boxes': (softmax(), kept) for what, kept in KEPT.items()}


def share(cfg, n):
    "The settings of one of n processes"
    sizes = dict(n_labelled=cfg.loader.n_labelled // n, n_unlabelled=cfg.loader.n_unlabelled // n)
    return override(cfg, [f'loader.{k}={v}' for k, v in sizes.items()])


def thinned(rows, kept):
    "Detections or targets; of the second half of all images only some boxes"
    half, first = len(rows) * world_size() // 2, len(rows) * rank()
    of_boxes = 'boxes', 'labels', 'scores'
    out = []
    for i, row in enumerate(rows):
        few = first + i >= half
        out.append({k: v[:kept] if few and k in of_boxes else v for k, v in row.items()})
    return out


@functools.cache
def parts_of(detector, cfg, folder):
    """Trainer and first batch, in float64: with float32 rounding decides on which side of a ReLU a few
    numbers are. The cases share the networks, which nothing changes"""
    run = Trainer(share(cfg, world_size()), folder, progress=False)
    batch = next(iter(make_loader(run.cfg, run.data, 0, False)))
    for network in (run.student, run.teacher):
        network.double()
    for part in batch.values():
        part['images'] = part['images'].double()
    run.student.train()
    return run, batch


def step(cfg, kept, folder):
    "Losses, gradients and buffers of the first step, averaged over the processes"
    warnings.simplefilter('ignore')
    base = whole('mean_teacher')
    run, batch = parts_of(str(cfg.detector), dataclasses.replace(base, detector=cfg.detector), folder)
    cfg = dataclasses.replace(cfg, detector=run.cfg.detector)
    torch.manual_seed(0)
    method = cfg.method.build(cfg, run.data.labelled).double()
    torch.manual_seed(rank())
    targets = thinned(batch['labelled']['targets'], kept)
    batch = batch | dict(labelled=batch['labelled'] | dict(targets=targets))
    with pytest.MonkeyPatch.context() as patch:
        for k in ('teacher_predict', 'teacher_detections'):
            patch.setattr(methods, k, lambda *args, f=getattr(methods, k): thinned(f(*args), kept))
        result = method.step(run.student, run.teacher, batch, 0)
    run.student.zero_grad()
    sum(result.losses.values()).backward()
    named = [*run.student.named_parameters(), *method.named_parameters()]
    average_gradients(p for _, p in named)
    rows = rows_of_all([{k: v.item() for k, v in result.losses.items()}])
    losses = {k: sum(r.get(k, 0) for r in rows) / len(rows) for row in rows for k in row}
    flat = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for _, p in named])
    return dict(losses=losses, grads=flat, buffers=dict(method.named_buffers()))


def published(over):
    "Means over the processes of one-to-one losses: random outputs, four images with 5, 0, 1 and 0 objects"
    g = torch.Generator().manual_seed(0)
    outputs = dict(
        pred_logits=torch.randn(4, 9, 3, generator=g), pred_boxes=torch.rand(4, 9, 4, generator=g) * 0.4 + 0.3
    )
    targets = []
    for n in (5, 0, 1, 0):
        targets.append(dict(labels=torch.arange(n) % 3, boxes=torch.rand(n, 4, generator=g) * 0.4 + 0.3))
    cfg = CriterionConfig(normalise=over)
    if world_size() == 1:
        halves = [slice(0, 2), slice(2, 4)]
    else:
        halves = [slice(2 * rank(), 2 * rank() + 2)]
    rows = []
    for s in halves:
        losses = set_criterion({k: v[s] for k, v in outputs.items()}, targets[s], 'o2o', cfg)
        rows.append({k: v.item() for k, v in losses.items()})
    whole = {k: v.item() for k, v in set_criterion(outputs, targets, 'o2o', cfg).items()}
    return rows_of_all(rows), whole


def fit(folder):
    """Lines of the log of four iterations over both stages. At a usual rate the first updates of AdamW would
    turn the rounding of gradients that are almost zero into differences of that size"""
    items = ['method.T1=2', 'optim.iters=4', 'run.log_every=1', 'optim.lr=1e-7', 'data.dev=0']
    cfg = share(whole('semi_detr', *items), world_size())
    Trainer(cfg, folder, progress=False).fit()
    return [json.loads(line) for line in (Path(folder) / 'log.jsonl').read_text().splitlines()]


WORKER = """
import torch
import test_many as many
many.start_processes()
results = {name: many.step(*case, sys.argv[1] + '/run') for name, case in many.cases().items()}
results['all'], results['process'] = many.published('all')[0], many.published('process')[0]
results['log'] = many.fit(sys.argv[1] + '/fit')
if many.is_main():
    torch.save(results, sys.argv[1] + '/results.pt')
"""


@pytest.fixture(scope='module')
def halves(tmp_path_factory):
    "Results of two processes, by name"
    folder = tmp_path_factory.mktemp('two')
    run_together(WORKER, folder)
    return torch.load(folder / 'results.pt')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "For the networks of one process"
    return tmp_path_factory.mktemp('one')


@pytest.mark.parametrize('name', cases())
def test_two_processes_take_the_step_of_one(name, halves, folder):
    "For every method that there is, in both stages, also where one process has no box at all"
    one, two = step(*cases()[name], folder), halves[name]
    assert one['losses'].keys() == two['losses'].keys() and one['grads'].norm() > 0
    assert two['losses'] == pytest.approx(one['losses'], rel=1e-9, abs=1e-9)
    assert (one['grads'] - two['grads']).norm() <= 1e-9 * one['grads'].norm()
    for k, v in one['buffers'].items():
        torch.testing.assert_close(two['buffers'][k], v, rtol=1e-6, atol=1e-9)


def test_class_losses_of_each_process_are_a_switch(halves):
    "Two processes with 5 and 1 objects: with 'process' the mean of the losses of both halves, else the whole"
    rows, whole_batch = published('process')
    for over, mean in (('process', sum(r['loss_cls'] for r in rows) / 2), ('all', whole_batch['loss_cls'])):
        assert sum(r['loss_cls'] for r in halves[over]) / 2 == pytest.approx(mean, rel=1e-5)
        for k in ('loss_l1', 'loss_giou'):
            assert sum(r[k] for r in halves[over]) / 2 == pytest.approx(whole_batch[k], rel=1e-5)
    assert rows == published('all')[0]  # one process: both readings are the same


def test_the_log_is_that_of_all_processes(halves, tmp_path):
    "Losses, counts and gradient norms of four iterations, in float32"
    one, two = fit(tmp_path / 'r'), halves['log']
    others = 'grad_norm', 'parts_grad_norm', 'pseudo_boxes', 'labelled_boxes', 'cost_threshold'
    names = [k for k in one[0] if k.startswith('loss') or k in others]
    assert len(one) == len(two) == 4 and len(names) > 8
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        here = [k for k in names if k in a]
        assert {k: b[k] for k in here} == pytest.approx({k: a[k] for k in here}, rel=1e-3)


def test_the_switches_name_another_run():
    "But the default leaves the hash of a record as it was"
    cfg = whole('semi_detr')
    for name in ('criterion', 'consistency'):
        assert config_hash(override(cfg, [f'{name}.normalise=process'])) != config_hash(cfg)
        with pytest.raises(ConfigError, match=f'{name}.normalise'):
            override(cfg, [f'{name}.normalise=rank'])
