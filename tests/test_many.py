"One process with all images of a step, two with half each, and two batches: the same losses and gradients."

import copy, dataclasses, functools, json, threading, warnings
from pathlib import Path
import pytest, torch
from test_trainer import tiny
from together import run_together
from semidetr.core import ConfigError, is_main, rank, start_processes, world_size  # noqa: F401
from semidetr.many import rows_of_all, total_of_all
from semidetr.matching.losses import CriterionConfig, set_criterion
from semidetr.semi import methods
from semidetr.semi.fit import methods_of
from semidetr.semi.methods import METHODS, SemiDETRPlus
from semidetr.train.config import config_hash, override, with_detector
from semidetr.train.optim import average_gradients
from semidetr.train.step import take_turns
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
BOTH = 'semi_detr o2m no boxes'
NORMED = 'code'  # projector whose gradient is not that of one batch: it flows through batch norms
BATCHES = [
    f'{name} {stage}' for name in methods_of(None, METHODS) for stage in ('o2m no boxes', 'o2o all boxes')
]
BATCHES += ['jittered two boxes', 'class mixtures two boxes', 'softmax all boxes']


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


@functools.cache
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


def in_batches(batch, n):
    "A batch as n of an nth of its images"
    size, out = len(batch['labelled']['targets']) // n, []
    for i in range(n):
        own = slice(i * size, (i + 1) * size)
        out.append({k: {name: x[own] for name, x in part.items()} for k, part in batch.items()})
    return out


def losses_of(run):
    "Means of the losses of the batches of a step"
    names = dict.fromkeys(k for r in run.losses for k in r)
    return {k: sum(float(r.get(k, 0)) for r in run.losses) / len(run.losses) for k in names}


def step(cfg, kept, folder):
    "Losses, gradients and buffers of the first step, averaged over batches and processes"
    warnings.simplefilter('ignore')
    base = whole('mean_teacher')
    shared, batch = parts_of(str(cfg.detector), dataclasses.replace(base, detector=cfg.detector), folder)
    run = copy.copy(shared)
    run.cfg = cfg = dataclasses.replace(cfg, detector=run.cfg.detector)
    torch.manual_seed(0)
    run.method = method = cfg.method.build(cfg, run.data.labelled).double()
    torch.manual_seed(rank())
    targets = thinned(batch['labelled']['targets'], kept)
    batch = batch | dict(labelled=batch['labelled'] | dict(targets=targets))
    run.student.zero_grad()
    with pytest.MonkeyPatch.context() as patch:
        for k in ('teacher_predict', 'teacher_detections'):
            patch.setattr(methods, k, lambda *args, f=getattr(methods, k): thinned(f(*args), kept))
        run.passes(in_batches(batch, cfg.optim.accumulate))
    named = [*run.student.named_parameters(), *method.named_parameters()]
    average_gradients(p for _, p in named)
    rows = rows_of_all([losses_of(run)])
    losses = {k: sum(r.get(k, 0) for r in rows) / len(rows) for row in rows for k in row}
    flat = [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for _, p in named]
    own = torch.cat(flat[: -len([*method.parameters()]) or None])  # without those of the projector
    buffers = dict(method.named_buffers())
    return dict(losses=losses, grads=torch.cat(flat), own=own, buffers=buffers, rng=torch.get_rng_state())


@functools.cache
def of_one(name, folder):
    "The step of a case on one process"
    return step(*cases()[name], folder)


def turns(cfg):
    "The same step in two batches that take turns"
    return override(cfg, ['optim.accumulate=2', 'optim.normalise=step'])


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
cfg, kept = many.cases()[many.BOTH]
results['both'] = many.step(many.turns(cfg), kept, sys.argv[1] + '/run')
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
    one, two = of_one(name, folder), halves[name]
    assert one['losses'].keys() == two['losses'].keys() and one['grads'].norm() > 0
    assert two['losses'] == pytest.approx(one['losses'], rel=1e-9, abs=1e-9)
    assert (one['grads'] - two['grads']).norm() <= 1e-9 * one['grads'].norm()
    for k, v in one['buffers'].items():
        torch.testing.assert_close(two['buffers'][k], v, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize('name', BATCHES)
def test_batches_that_take_turns_take_the_step_of_one(name, folder):
    "For every method that there is, also where one batch has no box at all; random numbers go on as after it"
    cfg, kept = cases()[name]
    one, two = of_one(name, folder), step(turns(cfg), kept, folder)
    assert two['losses'] == pytest.approx(one['losses'], rel=1e-9, abs=1e-9)
    part = 'own' if cfg.consistency.projector == NORMED else 'grads'
    assert (one[part] - two[part]).norm() <= 1e-9 * one[part].norm() and one[part].norm() > 0
    for k, v in one['buffers'].items():
        torch.testing.assert_close(two['buffers'][k], v, rtol=1e-6, atol=1e-9)
    assert torch.equal(one['rng'], two['rng'])


def test_batches_of_two_processes_take_the_step_of_one(halves, folder):
    "Four batches in all"
    one, four = of_one(BOTH, folder), halves['both']
    assert four['losses'] == pytest.approx(one['losses'], rel=1e-9, abs=1e-9)
    assert (one['own'] - four['own']).norm() <= 1e-9 * one['own'].norm()


def test_batches_alone_take_another_step(folder):
    "Without the switch; and with it, a single batch is as without"
    cfg, kept = cases()['supervised o2m no boxes']
    one, same = step(cfg, kept, folder), step(override(cfg, ['optim.normalise=step']), kept, folder)
    assert torch.equal(one['grads'], same['grads']) and one['losses'] == same['losses']
    alone = step(override(turns(cfg), ['optim.normalise=batch']), kept, folder)
    assert abs(alone['losses']['loss_cls'] / one['losses']['loss_cls'] - 1) > 0.01


def test_an_error_ends_the_turns():
    "All of them, and the functions of torch are put back"
    real, before = torch.distributed.all_reduce, threading.active_count()
    with pytest.raises(ZeroDivisionError):
        take_turns([lambda: total_of_all(1), lambda: 1 / 0])
    with pytest.raises(RuntimeError, match='different messages'):
        take_turns([lambda: total_of_all(1), lambda: None])
    assert torch.distributed.all_reduce is real and threading.active_count() == before


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
    usual = config_hash(cfg)
    assert config_hash(override(cfg, ['optim.normalise=step'])) == usual  # of one batch
    assert config_hash(turns(cfg)) != config_hash(override(cfg, ['optim.accumulate=2']))
