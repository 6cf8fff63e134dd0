"Dense Teacher: published numbers, correspondence of points, gradients, resuming, processes, prediction"

import copy
import dataclasses
import math

import pytest
import torch
from rivals import resumed_and_read, rival
from semidetr.core import ConfigError
from semidetr.data.augment import ViewConfig
from semidetr.data.digits import DigitsScenes
from semidetr.data.loader import SemiLoader
from semidetr.data.photometric import draw_photometric, photometric
from semidetr.detectors.fcos import DensePrediction
from semidetr.semi import dense_teacher as D
from semidetr.semi.teacher import EmaConfig, ema_decay
from semidetr.train.config import override
from semidetr.train.trainer import Trainer, make_loader


# --- numbers of the specification -------------------------------------------------------------
def test_quality_focal_loss():
    "11"
    p = torch.tensor([0.2, 0.7, 0.9, 0.2, 0.9, 0.01], dtype=torch.float64)
    y = torch.tensor([0.7, 0.7, 0.7, 0.0, 0.0, 0.0], dtype=torch.float64)
    wanted = [0.298387, 0.0, 0.030581, 0.008926, 1.865094, 1.005034e-6]
    assert D.quality_focal(p.logit(), y).tolist() == pytest.approx(wanted, abs=1e-6, rel=1e-5)
    far = torch.tensor([-200.0, 200.0])
    assert torch.isfinite(D.quality_focal(far, torch.tensor([1.0, 0.0]))).all()


def test_region_is_pooled():
    "12 and 19: over both images, not per image; one point where there are fewer than 100"
    m = torch.tensor([0.1, 0.8, 0.3, 0.05, 0.6, 0.2, 0.02, 0.9, 0.4, 0.15])
    found = D.dense_region(m, 0.3)
    assert found.nonzero().flatten().tolist() == [1, 4, 7] and m[found].sum().item() == pytest.approx(2.3)
    assert D.dense_region(m[:9], 0.01).sum() == 1 and D.dense_region(m[:1]).tolist() == [True]
    ties = D.dense_region(torch.full((200,), 0.5), 0.01)
    assert ties.sum() == 2


def points(p, distances, quality):
    "Predictions of three points of one image"
    p = torch.tensor(p, dtype=torch.float64)
    d = torch.tensor([distances] * 3, dtype=torch.float64)[None]
    q = torch.full((1, 3), quality, dtype=torch.float64)
    return DensePrediction(p.logit()[None], d, q, [], [3], torch.ones(1, 3, dtype=torch.bool))


def test_losses():
    "13, 14, 15 and 16"
    teacher = points([[0.8, 0.1], [0.3, 0.2], [0.05, 0.02]], [1.0, 2, 3, 2], 1.0)
    student = points([[0.5, 0.1], [0.4, 0.1], [0.1, 0.05]], [2.0, 2, 2, 2], 0.5)
    losses, region = D.dense_losses(student, teacher)
    assert region.tolist() == [[True, False, False]]
    wanted = dict(loss_cls=0.182938, loss_giou=0.4, loss_quality=0.608548)
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(wanted, abs=1e-6)
    whole = 4 * losses['loss_cls'] + losses['loss_giou'] + losses['loss_quality']
    assert whole.item() == pytest.approx(1.740302, abs=2e-6)
    assert whole.item() * D.ramp(7500, 5000) == pytest.approx(0.870151, abs=1e-6)
    region_alone = D.quality_focal(student.logits[0, 0], teacher.logits[0, 0].sigmoid()).sum() / 0.8
    assert region_alone.item() == pytest.approx(0.077979, abs=1e-6)
    equal = D.dense_losses(teacher, teacher)[0]
    assert equal['loss_quality'].item() == pytest.approx(0.582203, abs=1e-6)


def test_giou_of_distances():
    "14"
    a = torch.tensor([[2.0, 2, 2, 2], [4, 1, 1, 2], [0, 0, 0, 0]])
    b = torch.tensor([[1.0, 2, 3, 2], [1, 2, 3, 1], [0, 0, 0, 0]])
    assert D.distance_giou(a, b).tolist() == pytest.approx([0.4, 1.004658, 1.0], abs=1e-6)


def test_ramp():
    "16"
    assert [D.ramp(t, 5000) for t in (0, 5000, 5001, 7500, 10000, 99999)] == [0, 0, 0.0002, 0.5, 1, 1]
    assert [D.ramp(t, 0) for t in (0, 5)] == [1, 1]


def test_decay_after_the_copy():
    "17: a copy, then three students of 2; half of it is forgotten after 1732.5 steps"
    cfg = EmaConfig(decay=0.9996, copy=3000)
    assert ema_decay(2999, cfg) == 0.0 == ema_decay(2999, cfg, trained=True)
    value = 1.0
    for t in (3000, 3001, 3002):
        value = ema_decay(t, cfg) * value + (1 - ema_decay(t, cfg)) * 2
    assert value == pytest.approx(1.001200, abs=1e-6)
    assert math.log(0.5) / math.log(0.9996) == pytest.approx(1732.5, abs=0.1)
    with pytest.raises(ConfigError, match='ema.copy'):
        EmaConfig(copy=-1)


# --- views ----------------------------------------------------------------------------------------
def test_strong_views_are_made_of_weak_ones():
    "The same sizes and matrices; other pixels; labelled pairs too"
    ds = DigitsScenes('train', n=8, size=64)
    cfg = ViewConfig(short_sides=(56, 64, 72), eval_short=64, max_side=99, strong='photometric')
    kw = dict(n_labelled=2, n_unlabelled=4, view=cfg, seed=3, two_views=True)
    b = next(SemiLoader(ds, ds, num_workers=0, **kw))
    D.same_places(b['weak']['targets'], b['strong']['targets'])
    D.same_places(b['labelled']['targets'][:2], b['labelled']['targets'][2:])
    assert torch.equal(b['weak']['mask'], b['strong']['mask'])
    assert not torch.equal(b['weak']['images'], b['strong']['images'])
    usual = next(
        SemiLoader(ds, ds, num_workers=0, **{**kw, 'view': dataclasses.replace(cfg, strong='geometric')})
    )
    assert torch.equal(usual['weak']['images'], b['weak']['images'])
    with pytest.raises(ConfigError, match='view.strong=photometric'):
        D.same_places(usual['weak']['targets'], usual['strong']['targets'])


def test_photometric_operations_of_any_size():
    "Also on images of a few pixels"
    for size in ((1, 1), (3, 40), (33, 7)):
        image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
        for seed in range(20):
            for name, value in draw_photometric(seed):
                changed = photometric(image, name, value)
                assert changed.shape == image.shape and changed.dtype == torch.uint8


# --- one step -------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    "Trainer and a batch with unlabelled images of 72 pixels"
    more = ['view.short_sides=[72]', 'view.eval_short=72', 'method.burn_in_iters=0', 'data.dev=0']
    cfg = rival('fcos', 'dense_teacher', *more, 'run.test=false')
    run = Trainer(cfg, tmp_path_factory.mktemp('runs') / 'r', progress=False)
    return run, next(iter(make_loader(run.cfg, run.data, 0, False)))


def step(parts, *items, batch=None, t=0):
    "Result of a step, and gradients of the unsupervised losses"
    run, usual = parts
    cfg = override(run.cfg, items)
    student, teacher = copy.deepcopy(run.student).train(), copy.deepcopy(run.teacher)
    result = cfg.method.build(cfg, run.data.labelled).step(student, teacher, batch or usual, t)
    unsup = [v for k, v in result.losses.items() if 'unsup' in k]
    if unsup:
        sum(unsup).backward()
    assert all(p.grad is None for p in teacher.parameters())
    for k, v in teacher.state_dict().items():
        assert torch.equal(v, run.teacher.state_dict()[k])
    for k, v in student.named_buffers():
        assert torch.equal(v, dict(run.student.named_buffers())[k])
    return result, {n: p.grad for n, p in student.named_parameters() if p.requires_grad}


def test_the_weights_of_the_losses(parts):
    "23: the classes have the weight lambda, everything the ramp"
    one, grads = step(parts, 'method.unsup_weight=2', 'method.burn_in_iters=10', t=30)
    two, doubled = step(parts, 'method.unsup_weight=4', 'method.burn_in_iters=10', t=30)
    half, halved = step(parts, 'method.unsup_weight=2', 'method.burn_in_iters=10', t=15)
    none, _ = step(parts, 'method.burn_in_iters=10', t=10)
    assert not any('unsup' in k for k in none.losses)
    assert two.losses['loss_unsup_cls'].item() == pytest.approx(2 * one.losses['loss_unsup_cls'].item())
    assert two.losses['loss_unsup_giou'].item() == pytest.approx(one.losses['loss_unsup_giou'].item())
    for k, v in one.losses.items():
        assert half.losses[k].item() == pytest.approx(v.item() * (0.5 if 'unsup' in k else 1), rel=1e-5)
    for k, g in grads.items():
        torch.testing.assert_close(halved[k], g / 2, rtol=1e-4, atol=1e-7)


def test_identical_views_and_weights(parts):
    "18: the boxes agree, classes have a loss from outside the region only; a mirrored view raises both"
    run, batch = parts
    twin = dict(batch, strong=batch['weak'])
    same_view = step(parts, batch=twin)[0].losses
    assert same_view['loss_unsup_giou'].item() == pytest.approx(0, abs=1e-5)
    full = step(parts, 'method.dense_ratio=1', batch=twin)[0].losses
    assert full['loss_unsup_cls'].item() == pytest.approx(0, abs=1e-6)
    assert same_view['loss_unsup_cls'] > 1e-3
    mirrored = dict(batch['weak'], images=batch['weak']['images'].flip(-1))
    other = step(parts, batch=dict(batch, strong=mirrored))[0].losses
    for k in ('loss_unsup_giou', 'loss_unsup_cls'):
        assert other[k] > same_view[k]


def test_padding_is_left_out():
    "A point in the padding is neither counted nor trained, however sure the teacher is"
    z = torch.zeros(1, 4, 2) - 3
    z[0, 3] = 9.0
    valid = torch.tensor([[True, True, True, False]])
    p = DensePrediction(z, torch.ones(1, 4, 4), torch.zeros(1, 4), [], [4], valid)
    student = p._replace(logits=torch.zeros(1, 4, 2, requires_grad=True))
    losses, region = D.dense_losses(student, p, 0.3)
    losses['loss_cls'].backward()
    assert not region[0, 3] and region.sum() == 1
    assert (student.logits.grad[0, 3] == 0).all() and (student.logits.grad[0, :3] != 0).all()


def test_boxes_without_area_are_left_out():
    teacher = points([[0.9, 0.9]] * 3, [0.0, 1, 0, 1], 0.0)
    student = points([[0.5, 0.5]] * 3, [1.0, 1, 1, 1], 0.0)
    assert D.dense_losses(student, teacher, 1.0)[0]['loss_giou'] == 0


def test_one_image_and_no_labels(parts):
    run, usual = parts
    few = {k: {name: x[:1] for name, x in part.items()} for k, part in usual.items()}
    result, grads = step(parts, batch=few)
    assert all(v.isfinite() for v in result.losses.values())
    assert all(g is not None and g.isfinite().all() for g in grads.values())
    empty = [{**t, 'labels': t['labels'][:0], 'boxes': t['boxes'][:0]} for t in usual['labelled']['targets']]
    bare = dict(usual, labelled=dict(usual['labelled'], targets=empty))
    losses = step(parts, 'pseudo.threshold=2', batch=bare)[0].losses
    assert losses['loss_giou'] == losses['loss_quality'] == 0 and all(v.isfinite() for v in losses.values())


# --- whole runs -----------------------------------------------------------------------------------
def test_it_resumes_and_predicts(tmp_path):
    "Stopped after the burn-in; eval and predict read the run"
    own = [
        'loader.two_views=true',
        'ema.copy=1',
        'run.test=false',
        'optim.iters=3',
        'data.dev=2',
        'run.log_every=1',
    ]
    cfg = rival('fcos', 'dense_teacher', *own, 'method.burn_in_iters=1')
    result, rows = resumed_and_read(cfg, tmp_path)
    last = rows[-1]
    assert last['loss_unsup_quality'] > 0 and last['region_points'] > 1 and 'pseudo_recall' in last
    assert result['config']['method']['dense_ratio'] == 0.2 and 'dev' in result['metrics']


def test_views_of_another_geometry_are_refused(tmp_path):
    cfg = rival('fcos', 'dense_teacher', 'view.strong=geometric', 'run.test=false')
    with pytest.raises(ConfigError, match='set view.strong=photometric') as e:
        Trainer(cfg, tmp_path / 'r', progress=False)
    assert '\n' not in str(e.value)
