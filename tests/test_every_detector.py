"Every detector: with every method in both stages, exact resume, the constants and sizes of the releases"

import dataclasses
import json
import math

import pytest
import torch
from semidetr.detectors.contract import build_detector
from semidetr.detectors.from_detr import DETECTORS
from semidetr.semi.fit import detectors_of
from semidetr.semi.methods import METHODS, SemiDETR
from semidetr.train.checkpoint import load_checkpoint
from semidetr.train.config import override, preset, with_detector
from semidetr.train.trainer import Trainer
from rivals import FILTERS, rival
from test_trainer import TINY, same, stop_after

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
CASES = [(name, 'supervised', 'boxes') for name in DETECTORS]
for _method in METHODS:
    if _method != 'supervised':
        CASES += [(n, _method, p) for n in detectors_of(METHODS[_method]) for p in ('boxes', 'empty')]


def small(name, method, *more):
    "A run of three steps: one of burn-in, one with one-to-many and one with one-to-one assignment"
    own = [item for item in TINY if not item.startswith('detector.')]
    base = override(preset('digits'), ['detector.transformer.num_queries=15', *own])
    cfg = with_detector(base, name)
    if name not in detectors_of(SemiDETR):
        return override(rival(name, method), [*SMALLER, *more])
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


@pytest.mark.parametrize('name,method,pseudo', CASES)
def test_it_trains_in_both_stages(tmp_path, name, method, pseudo):
    "Finite losses, and weights that move, also where no unlabelled image has a pseudo label"
    wanted = ALL if pseudo == 'boxes' else EMPTY
    wanted = wanted + (FILTERS[pseudo] if method == 'soft_teacher' else [])
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
    stop_after(run, 2)
    with pytest.raises(KeyboardInterrupt, match='same command'):
        run.fit()
    assert load_checkpoint(tmp_path / 'r')['step'] == 2
    torch.manual_seed(123)
    Trainer(cfg, tmp_path / 'r', progress=False).fit()
    assert same(load_checkpoint(tmp_path / 'r'), load_checkpoint(tmp_path / 'whole'))


# --- presets: constants of the releases ----------------------------------------------------------
def release(name):
    return with_detector(preset('coco-10'), name)


def test_constants_of_dino_with_five_scales():
    four, five = release('dino'), release('dino_5scale')
    t = five.detector.transformer
    assert five.detector.backbone.out_strides == (4, 8, 16, 32) and t.n_levels == 5
    sizes = (t.d_model, t.n_heads, t.n_points, t.enc_layers, t.dec_layers, t.ffn, t.num_queries, t.dropout)
    assert sizes == (256, 8, 4, 6, 6, 2048, 900, 0.0)
    assert dataclasses.replace(t, n_levels=4) == four.detector.transformer
    assert (five.criterion, five.optim) == (four.criterion, four.optim)
    o = five.optim
    assert (o.lr, o.backbone_mult, o.points_mult, o.weight_decay, o.clip) == (1e-4, 0.1, 1.0, 1e-4, 0.1)


def test_constants_of_detr():
    cfg = release('detr')
    d, c, o = cfg.detector, cfg.criterion, cfg.optim
    sizes = (d.d_model, d.heads, d.layers, d.transformer.enc_layers, d.ffn, d.num_queries, d.dropout)
    assert sizes == (256, 8, 6, 6, 2048, 100, 0.1)
    assert d.backbone.name == 'resnet50' and d.backbone.out_strides == (32,)
    assert (c.w_cls, c.loss_l1, c.w_giou, c.no_object) == (1.0, 5.0, 2.0, 0.1)
    assert (c.cost['w_cls'], c.cost['w_l1'], c.cost['w_giou']) == (1.0, 5.0, 2.0)
    assert c.class_cost == 'probability'
    assert (o.lr, o.lr * o.backbone_mult, o.weight_decay, o.clip) == (1e-4, pytest.approx(1e-5), 1e-4, 0.1)


@pytest.mark.parametrize('form', ['plain', 'refine', 'two_stage'])
def test_constants_of_deformable_detr(form):
    cfg = release('deformable_detr' + ('' if form == 'plain' else f'_{form}'))
    d, c, o = cfg.detector, cfg.criterion, cfg.optim
    sizes = (d.d_model, d.levels, d.heads, d.points, d.layers, d.ffn, d.num_queries, d.dropout)
    assert d.form == form and sizes == (256, 4, 8, 4, 6, 1024, 300, 0.1)
    assert d.backbone.name == 'resnet50' and d.backbone.out_strides == (8, 16, 32)
    assert (c.w_cls, c.loss_l1, c.w_giou, c.enc_labels) == (2.0, 5.0, 2.0, 'zero')
    rates = (o.lr, o.lr * o.backbone_mult, o.lr * o.points_mult)
    assert rates == pytest.approx((2e-4, 2e-5, 2e-5)) and (o.weight_decay, o.clip) == (1e-4, 0.1)


# Millions of parameters as published, with the 91 rows of COCO's ids
PUBLISHED = dict(dino=47, dino_5scale=47, detr=41, deformable_detr=40)
PUBLISHED |= dict(deformable_detr_refine=41, deformable_detr_two_stage=41)
PUBLISHED |= dict(faster_rcnn=42, fcos=32)  # torchvision's


@pytest.fixture(scope='module')
def parameters():
    "name -> number of parameters in full size, built without memory for them"
    sizes = {}
    for name in DETECTORS:
        settings = dataclasses.replace(release(name).detector, num_classes=91)
        with torch.device('meta'):
            model = build_detector(settings.untrained())
        sizes[name] = sum(p.numel() for p in model.parameters())
    return sizes


def test_presets_have_as_many_parameters_as_published(parameters):
    assert parameters.keys() == PUBLISHED.keys()
    for name, n in parameters.items():
        assert n / 1e6 == pytest.approx(PUBLISHED[name], abs=0.55), name
    frozen = 9408 + 212_992  # first convolution and first stage of ResNet-50
    assert parameters['detr'] - frozen == 41_302_368  # as the original prints at the start of training
    assert parameters['deformable_detr'] - frozen == 39_847_265


def test_the_fifth_scale_of_dino_adds_its_projection_and_its_points(parameters):
    projection = 256 * 256 + 256 + 2 * 256  # 1 x 1 convolution, group norm
    points = 8 * 4 * 3 * (256 + 1)  # heads, points; offset x and y, weight
    added = projection + 256 + 12 * points  # the embedding of the level; six layers each
    assert parameters['dino_5scale'] - parameters['dino'] == added
