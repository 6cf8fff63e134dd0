"The learned suppressor: check values of the original, its mask, its loss; off, it changes nothing"

import dataclasses
import json
import math
import warnings
import pytest
import torch
from semidetr.boxes import box_iou, cxcywh_to_xyxy
from semidetr.core import ConfigError
from semidetr.detectors.contract import add_suppressed, build_detector, has_suppressor, post_process, reported
from semidetr.detectors.deformable_detr import deformable_detr_small
from semidetr.detectors.self_attention import SelfAttention
from semidetr.detectors.suppressor import (
    Suppressor,
    SuppressorConfig,
    build_suppressor,
    by_confidence,
    relative_boxes,
    visible,
)
from semidetr.detectors.transformer import TransformerConfig
from semidetr.lab.plan import plan
from semidetr.matching.losses import CriterionConfig
from semidetr.matching.rescoring import (
    doubtful_entries,
    kept_by_nms,
    quality_loss,
    suppression_loss,
    sure_and_doubtful,
    suppressor_loss,
)
from semidetr.semi.methods import MethodConfig, suppressor_advice
from semidetr.semi.teacher import teacher_detections
from semidetr.train.config import config_hash, from_saved, override, preset, to_dict
from semidetr.train.optim import build_optimizer
from semidetr.train.predict import Predictor, load_model
from semidetr.train.trainer import Trainer, clip_and_step
from test_contract import check_contract, check_extra_queries, check_gradients, check_outputs, padded_batch
from test_study import BOOK
from test_trainer import TINY

P = torch.tensor(
    [[0.50, 0.50, 0.40, 0.40], [0.52, 0.50, 0.40, 0.40], [0.60, 0.50, 0.40, 0.40], [0.20, 0.20, 0.10, 0.10]]
)
SIZES = TransformerConfig(d_model=16, n_heads=2, ffn=32)
ON = ['detector.suppressor.head=residual', 'detector.suppressor.n_best=15', 'method.T1=6']


def some_suppressor(head='own', seed=0, **settings):
    "A suppressor whose zeros have become random numbers"
    torch.manual_seed(seed)
    model = Suppressor(SuppressorConfig(head, **settings), SIZES, num_classes=3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def some_queries(B=2, Q=9, seed=1):
    g = torch.Generator().manual_seed(seed)
    boxes = torch.rand(B, Q, 4, generator=g) * 0.4 + 0.3
    return torch.randn(B, Q, 16, generator=g), torch.randn(B, Q, 3, generator=g), boxes


# --- order, mask and tokens --------------------------------------------------------------------
def test_rows_of_the_mask():
    z = torch.tensor([2.0, 1.0, 1.0, -1.0])
    rows = lambda m: [''.join(str(int(v)) for v in row) for row in m]
    assert rows(visible(z, strict=True)) == ['0000', '1000', '1000', '1110']
    assert rows(visible(z)) == ['0000', '1000', '1100', '1110']


@pytest.mark.parametrize('strict,mass', [(True, [1, 0.5, 0.5, 0.25]), (False, [1, 0.5, 1 / 3, 0.25])])
def test_mass_of_the_tokens(strict, mass):
    "With zero logits the ten tokens weigh as one query"
    model = build_suppressor(SuppressorConfig('own'), SIZES, 3)
    bias = model.biases(P[None])[0, 0]
    hidden = ~visible(torch.tensor([2.0, 1.0, 1.0, -1.0]), strict)
    logits = torch.cat([bias[:, :4].masked_fill(hidden, -math.inf), bias[:, 4:]], 1)
    assert torch.allclose(logits.softmax(-1)[:, 4:].sum(-1), torch.tensor(mass), atol=1e-5)
    assert bias.shape == (4, 14) and torch.allclose(bias[:, 4:].exp().sum(-1), torch.ones(4))


def test_the_triangle_is_the_mask_of_sorted_queries():
    "Against attention with the mask of `visible`, without sorting"
    model, (hs, logits, boxes) = some_suppressor(), some_queries()
    logits[:, 3] = logits[:, 5]  # a tie
    z = logits.amax(-1)
    B, Q, _ = hs.shape
    blocked = torch.cat([~visible(z), torch.zeros(B, Q, 10, dtype=torch.bool)], -1)[:, None]
    bias = model.biases(boxes).masked_fill(blocked, -math.inf)
    tokens = [t.expand(B, -1, -1) for t in (model.values, model.keys - model.values)]
    x = model.norm1(hs + model.self_attn(hs, torch.zeros_like(hs), None, tokens, bias))
    x = model.norm2(x + model.linear2(model.linear1(x).relu()))
    found = model(hs, logits, boxes)
    expected = model.class_head(x).gather(1, found['index'][..., None].expand(-1, -1, 3))
    assert torch.allclose(found['pred_logits'], expected, atol=1e-5)


def test_order_breaks_ties_by_number_in_float32():
    assert by_confidence(torch.zeros(1, 50, 3), 50)[0].tolist() == list(range(50))
    logits = torch.tensor([[[1.0], [3.0], [3.0], [2.0], [3.0]]])
    assert by_confidence(logits, 9)[0].tolist() == [1, 2, 4, 3, 0]
    assert by_confidence(logits.bfloat16(), 3)[0].tolist() == [1, 2, 4]


def test_scores_ignore_all_less_confident_queries():
    model, (hs, logits, boxes) = some_suppressor(), some_queries()
    first = model(hs, logits, boxes)
    order = first['index']
    for place in range(9):
        changed = [t.clone() for t in (hs, boxes)]
        for b in range(2):
            for t in changed:
                t[b, order[b, place:]] = torch.rand_like(t[b, order[b, place:]])
        second = model(changed[0], logits, changed[1])
        gap = (first['pred_logits'] - second['pred_logits']).abs().amax((0, 2))
        assert (gap[:place] < 1e-5).all() and (gap[place:] > 1e-4).all()


def test_relative_boxes():
    e = relative_boxes(P[None])[0]
    for (i, j), wanted in {
        (0, 1): (0.048790, 0, 0, 0),
        (0, 3): (0.559615, 0.559615, 1.386294, 1.386294),
        (3, 0): (1.386294, 1.386294, -1.386294, -1.386294),
    }.items():
        assert torch.allclose(e[i, j], torch.tensor(wanted), atol=1e-5)
    shifted = torch.cat([P[:, :2] * 0.5 + 0.1, P[:, 2:] * 0.5], 1)
    assert torch.allclose(relative_boxes(shifted[None])[0], e, atol=1e-4)
    assert relative_boxes(torch.zeros(1, 3, 4)).isfinite().all()


def test_bias_is_symmetric_and_moves_with_the_queries():
    model = some_suppressor()
    bias = model.pair_bias(P[None])
    assert torch.allclose(bias, bias.transpose(2, 3), atol=1e-6) and bias.std() > 0
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(model.pair_bias(P[order][None]), bias[:, :, order][..., order], atol=1e-6)


def test_attention_with_a_bias_of_zero_is_attention():
    torch.manual_seed(0)
    att, x = SelfAttention(16, 4), torch.randn(2, 5, 16)
    zero, blocked = torch.zeros_like(x), torch.ones(5, 5).triu(1) > 0
    plain = att(x, zero, blocked)
    assert torch.allclose(att(x, zero, blocked, bias=torch.zeros(1, 4, 5, 5)), plain, atol=1e-6)
    assert torch.allclose(
        att(x, zero, bias=torch.zeros(5, 5).masked_fill(blocked, -math.inf)[None, None]), plain, atol=1e-6
    )


# --- heads, gradients --------------------------------------------------------------------------
def test_residual_starts_as_the_detector_and_boxes_are_copied():
    model = build_suppressor(SuppressorConfig('residual', n_best=5), SIZES, 3)
    hs, logits, boxes = some_queries()
    boxes.requires_grad_()
    hs.requires_grad_()
    logits.requires_grad_()
    found = model(hs, logits, boxes)
    index = found['index'][..., None]
    assert index.shape == (2, 5, 1)
    assert torch.equal(found['pred_logits'], logits.gather(1, index.expand(-1, -1, 3)))
    assert torch.equal(found['pred_boxes'], boxes.gather(1, index.expand(-1, -1, 4)))
    assert not found['pred_boxes'].requires_grad
    found['pred_logits'].square().sum().backward()
    assert boxes.grad is None and logits.grad is None and hs.grad is not None


def test_own_head_starts_at_the_prior():
    model = build_suppressor(SuppressorConfig('own'), SIZES, 3, prior=0.02)
    assert torch.allclose(model.class_head.bias.sigmoid(), torch.tensor(0.02))


def test_detach_stops_the_gradient():
    hs, logits, boxes = some_queries()
    hs.requires_grad_()
    some_suppressor(detach=True)(hs, logits, boxes)['pred_logits'].sum().backward()
    assert hs.grad is None


def test_unknown_head():
    with pytest.raises(ConfigError, match='residual'):
        SuppressorConfig('residul')


# --- the loss ----------------------------------------------------------------------------------
def test_quality_loss():
    z = torch.tensor(0.6).logit()
    assert abs(quality_loss(z, torch.tensor(0.8)) - 0.473535) < 1e-5
    assert abs(quality_loss(z, torch.tensor(0.0)) - 0.247398) < 1e-5


def by_hand(logits, boxes, targets, pairs, keep=None):
    "Sum over all entries, with plain loops"
    from torchvision.ops import box_iou
    from semidetr.boxes import cxcywh_to_xyxy

    total, p = 0.0, logits.double().sigmoid()
    for b, t in enumerate(targets):
        target = torch.zeros_like(p[b])
        for q, n in pairs[b]:
            u = box_iou(cxcywh_to_xyxy(boxes[b, q][None]), cxcywh_to_xyxy(t['boxes'][n][None]))[0, 0]
            target[q, t['labels'][n]] = u * t.get('scores', torch.ones(len(t['labels'])))[n]
        for q in range(p.shape[1]):
            for c in range(p.shape[2]):
                x, y = p[b, q, c], target[q, c]
                bce = -y * x.log() - (1 - y) * (1 - x).log()
                if keep is None or keep[b, q, c] or y > 0:
                    total += (y if y > 0 else 0.75 * x**2) * bce
    return total


@pytest.mark.parametrize('scored', [False, True])
def test_loss_against_loops(scored):
    from semidetr.matching.matching import hungarian

    hs, logits, boxes = some_queries()
    targets = [
        dict(labels=torch.tensor([2, 0]), boxes=boxes[0, [1, 4]] + 0.02, scores=torch.tensor([0.9, 0.5])),
        dict(labels=torch.zeros(0, dtype=torch.long), boxes=torch.zeros(0, 4), scores=torch.zeros(0)),
    ]
    if not scored:
        targets = [{k: v for k, v in t.items() if k != 'scores'} for t in targets]
    new = dict(pred_logits=logits, pred_boxes=boxes)
    pairs = [list(zip(q.tolist(), t.tolist())) for q, t in hungarian(new, targets)]
    loss = suppressor_loss(dict(suppressed=new), targets, CriterionConfig(w_mds=2.0))['loss_mds']
    assert abs(loss - 2 * by_hand(logits, boxes, targets, pairs) / 2) < 1e-4
    doubtful = [dict(labels=torch.tensor([1]), boxes=boxes[0, [2]]), targets[1]]
    ignored = doubtful_entries(boxes, 3, doubtful)
    assert ignored[0, 2, 1] and not ignored[0, :, [0, 2]].any() and not ignored[1].any()
    loss = suppressor_loss(dict(suppressed=new), targets, doubtful=doubtful)['loss_mds']
    assert abs(loss - by_hand(logits, boxes, targets, pairs, ~ignored) / 2) < 1e-4


def test_a_target_is_never_ignored():
    boxes = P[None, :1]
    new = dict(pred_logits=torch.zeros(1, 1, 2), pred_boxes=boxes)
    target = [dict(labels=torch.tensor([0]), boxes=P[:1])]
    loss = suppressor_loss(dict(suppressed=new), target, doubtful=target)['loss_mds']
    assert abs(loss - (math.log(2) + 0.75 * 0.25 * math.log(2))) < 1e-5


def test_cost_of_the_one_to_many_scores():
    "Two equal boxes: the new scores prefer the second query, the one-to-many scores the first"
    boxes = P[None, [0, 0]]
    new = dict(pred_logits=torch.tensor([[[0.0], [1.0]]]), pred_boxes=boxes, index=torch.tensor([[1, 0]]))
    outputs = dict(pred_logits=torch.tensor([[[1.0], [2.0]]]), suppressed=new)
    target = [dict(labels=torch.tensor([0]), boxes=P[:1])]
    own, of_layer = (
        suppressor_loss(outputs, target, CriterionConfig(mds_cost=c))['loss_mds']
        for c in ('suppressor', 'one_to_many')
    )
    p0, p1 = (torch.tensor(v).sigmoid() for v in (0.0, 1.0))
    assert abs(own - (-p1.log() - 0.75 * p0**2 * (1 - p0).log())) < 1e-5
    assert abs(of_layer - (-p0.log() - 0.75 * p1**2 * (1 - p1).log())) < 1e-5


def test_sure_and_doubtful():
    boxes = [dict(boxes=P, labels=torch.arange(4), scores=torch.tensor([0.9, 0.4, 0.39, 0.1]), image_id=7)]
    sure, doubtful = sure_and_doubtful(boxes, 0.4)
    assert sure[0]['labels'].tolist() == [0, 1] and doubtful[0]['labels'].tolist() == [2, 3]
    assert sure[0]['image_id'] == 7 and torch.equal(doubtful[0]['boxes'], P[2:])


# --- in a detector -----------------------------------------------------------------------------
def tiny_config(*more):
    return override(preset('digits'), [*TINY, *more])


def tiny_detector(*more):
    settings = tiny_config(*more).detector
    return dataclasses.replace(settings, num_classes=10)


@pytest.mark.parametrize('head', ['residual', 'own'])
def test_contract(head):
    check_contract(dataclasses.replace(tiny_detector(f'detector.suppressor.head={head}'), num_classes=2))


@pytest.mark.parametrize('form', ['plain', 'two_stage'])
def test_contract_of_deformable_detr(form):
    sizes = dict(
        d_model=32, heads=4, ffn=32, num_queries=12, form=form, suppressor=SuppressorConfig('residual')
    )
    settings = dataclasses.replace(deformable_detr_small(2), **sizes).untrained()
    torch.manual_seed(0)
    model = build_detector(settings).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    check_outputs(model, settings, *padded_batch(64, 96))
    check_gradients(model, 2)
    check_extra_queries(model, settings)


def test_the_rest_of_the_network_is_the_same_with_and_without():
    torch.manual_seed(3)
    off = build_detector(tiny_detector())
    state = torch.get_rng_state()
    torch.manual_seed(3)
    on = build_detector(tiny_detector('detector.suppressor.head=own'))
    assert torch.equal(torch.get_rng_state(), state)
    assert has_suppressor(on) and not has_suppressor(off)
    own = on.state_dict()
    assert all(torch.equal(v, own[k]) for k, v in off.state_dict().items())
    assert {k.split('.')[0] for k in set(own) - set(off.state_dict())} == {'suppressor'}
    images = torch.randn(2, 3, 64, 64)
    a, b = (net.eval()(images) for net in (off, on))
    assert 'suppressed' not in a and torch.equal(a['pred_logits'], b['pred_logits'])
    assert reported(b) is b['suppressed'] and reported(b, False) is b and reported(a) is a
    sizes = [(64, 64)] * 2
    plain, new, layer = (
        post_process(a, sizes),
        post_process(b, sizes),
        post_process(b, sizes, suppressor=False),
    )
    assert torch.equal(plain[0]['scores'], layer[0]['scores'])
    assert not torch.equal(plain[0]['scores'], new[0]['scores'])
    teacher = teacher_detections(b, [dict(size=s) for s in sizes])
    expected = teacher_detections(a, [dict(size=s) for s in sizes])
    assert torch.equal(teacher[1]['boxes'], expected[1]['boxes'])


def test_extra_queries_have_no_part_in_it():
    torch.manual_seed(0)
    model = build_detector(tiny_detector('detector.suppressor.head=own')).train()
    images, targets = torch.randn(1, 3, 64, 64), [dict(labels=torch.tensor([1]), boxes=P[:1])]
    encoded = model.encode(images)
    plain = model.decode(encoded)
    assert 'suppressed' not in plain
    alone, together = add_suppressed(model, plain), model(images, None, targets)
    later = model.decode(encoded, model.denoise(targets), alone)
    assert later['suppressed'] is alone['suppressed'] and add_suppressed(model, later) is later
    gap = (together['suppressed']['pred_logits'] - alone['suppressed']['pred_logits']).abs().max()
    assert gap < 1e-4 and torch.equal(together['suppressed']['index'], alone['suppressed']['index'])


# --- settings ----------------------------------------------------------------------------------
def test_off_keeps_every_hash():
    before = config_hash(preset('digits'))
    for item in ('criterion.w_mds=3', 'method.mds_unsup=sure', 'detector.suppressor.n_best=7'):
        assert config_hash(override(preset('digits'), [item])) == before
    on = config_hash(override(preset('digits'), ['detector.suppressor.head=own']))
    more = config_hash(override(preset('digits'), ['detector.suppressor.head=own', 'method.mds_unsup=sure']))
    assert len({before, on, more}) == 3
    old = to_dict(preset('digits'))
    del old['detector']['suppressor'], old['method']['mds_unsup'], old['criterion']['w_mds']
    assert from_saved(json.loads(json.dumps(old))) == preset('digits')


def test_one_to_many_to_the_end_is_advised():
    cfg = override(preset('digits'), ['detector.suppressor.head=own', 'method.T1=100', 'optim.iters=300'])
    assert 'method.T1=300' in suppressor_advice(cfg)
    for name in ('supervised', 'mean_teacher', 'semi_detr'):
        named = override(cfg, [f'method.name={name}'])
        assert named.method.implementation.derived(named)['method.T1'][0] == 300
    with pytest.warns(UserWarning, match='method.T1=300'):
        cfg.method.build(dataclasses.replace(cfg, detector=dataclasses.replace(cfg.detector, num_classes=3)))
    assert suppressor_advice(override(cfg, ['method.T1=300'])) == ''
    assert suppressor_advice(override(preset('digits'), ['method.T1=0'])) == ''
    with pytest.raises(ConfigError, match='sure'):
        MethodConfig(mds_unsup='shure')


# --- training ----------------------------------------------------------------------------------
def fit(folder, *more, until=None):
    cfg = tiny_config(*ON, *more)
    trainer = Trainer(cfg, folder, progress=False)
    return trainer, trainer.fit(until)


METHODS = dict(
    supervised=['method.name=supervised'],
    mean_teacher=['method.name=mean_teacher', 'method.mds_unsup=sure'],
    semi_detr=['method.name=semi_detr', 'method.mds_unsup=sure', 'mining.init=all', 'consistency.hidden=8'],
)
SOME_LABELS = ['pseudo.threshold=0.005', 'pseudo.min_score=0', 'method.mds_threshold=0.01', 'pseudo.top_k=5']


@pytest.mark.parametrize('name', METHODS)
def test_trains_with_every_method(name, tmp_path):
    more = [*METHODS[name], *SOME_LABELS, 'optim.iters=3', 'method.burn_in_iters=1', 'run.log_every=1']
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        warnings.filterwarnings('default', message='.*(pseudo|lr_scheduler).*')
        trainer, result = fit(tmp_path, *more)
    rows = [json.loads(line) for line in (tmp_path / 'log.jsonl').read_text().splitlines()]
    losses = [r for r in rows if 'loss' in r]
    assert all(math.isfinite(r['loss_mds']) and r['loss_mds'] > 0 for r in losses)
    assert ('loss_unsup_mds' in losses[-1]) == (name != 'supervised')
    assert trainer.student.suppressor.class_head.weight.any()
    metrics = result['metrics']['dev']['teacher']
    assert {'AP', 'AP_nms', 'AP_o2m', 'AP_nms_o2m', 'AP50_o2m'} <= set(metrics)


def test_resuming_is_exact_and_the_checkpoint_predicts(tmp_path):
    more = [*METHODS['semi_detr'], *SOME_LABELS, 'optim.iters=4', 'method.burn_in_iters=1']
    whole, _ = fit(tmp_path / 'whole', *more)
    fit(tmp_path / 'broken', *more, until=2)
    resumed, _ = fit(tmp_path / 'broken', *more)
    for which in ('student', 'teacher'):
        a, b = (getattr(t, which).state_dict() for t in (whole, resumed))
        assert all(torch.equal(a[k], b[k]) for k in a)
    model, cfg, classes = load_model(tmp_path / 'whole')
    assert cfg.detector.suppressor.head == 'residual' and has_suppressor(model)
    pixels = torch.rand(3, 64, 64)
    new, layer = (Predictor(tmp_path / 'whole', 'cpu', 0.0, suppressor=s)(pixels) for s in (True, False))
    assert len(new['scores']) == 15 * 10 and len(layer['scores']) == 20 * 10
    from semidetr.train.export import to_safetensors

    path = to_safetensors(tmp_path / 'whole')
    again = Predictor(path, 'cpu', 0.0)(pixels)
    assert torch.equal(again['scores'], new['scores'])


def test_a_burn_in_without_suppressor_starts_it_untrained(tmp_path):
    plain = Trainer(tiny_config('optim.iters=1', 'method.name=supervised'), tmp_path / 'a', progress=False)
    plain.fit()
    with pytest.warns(UserWarning, match='no suppressor'):
        later = Trainer(tiny_config(*ON, f"run.init={tmp_path / 'a'}"), tmp_path / 'b', progress=False)
    old, new, teacher = (n.state_dict() for n in (plain.teacher, later.student, later.teacher))
    assert all(torch.equal(old[k], new[k]) for k in old) and all(torch.equal(new[k], teacher[k]) for k in new)
    later.cfg = dataclasses.replace(later.cfg, optim=dataclasses.replace(later.cfg.optim, iters=1))
    later.fit()
    with pytest.warns(UserWarning, match='that of the weights is not used'):
        Trainer(tiny_config(f"run.init={tmp_path / 'b'}"), tmp_path / 'c', progress=False)


def test_onnx(tmp_path):
    pytest.importorskip('onnxruntime')
    pytest.importorskip('onnx')
    from semidetr.train.onnx import to_onnx

    fit(tmp_path, 'method.name=supervised', 'optim.iters=1', 'run.test=false')
    path = to_onnx(tmp_path)
    assert path.exists()
    predictor, network = Predictor(path, 'cpu', 0.0), Predictor(tmp_path, 'cpu', 0.0)
    pixels = torch.rand(3, 64, 64)
    a, b = predictor(pixels), network(pixels)
    assert len(a['scores']) == len(b['scores']) == 150
    assert torch.allclose(a['scores'], b['scores'], atol=1e-4)


def test_transformers_cannot_have_it():
    from semidetr.train.export import deformable_settings

    cfg = dataclasses.replace(deformable_detr_small(2), suppressor=SuppressorConfig('own'))
    with pytest.raises(ConfigError, match='suppressor'):
        deformable_settings(cfg, ['a', 'b'])


def test_study_arms():
    runs = {r.arm: r.cfg for r in plan(BOOK, 'suppressor', seeds=[0]) if r.arm != 'burn_in'}
    assert runs['residual'].detector.suppressor.head == 'residual'
    assert runs['own'].detector.suppressor.head == 'own'
    for arm in ('residual', 'own'):
        assert runs[arm].method.T1 == runs[arm].optim.iters and runs[arm].method.mds_unsup == 'none'
    assert runs['residual'].run.init == runs['own'].run.init


# --- what suppression keeps ---------------------------------------------------------------------
def slow_nms(scores, boxes, iou, min_score):
    "Per-class suppression of one image by its definition"
    corners = cxcywh_to_xyxy(boxes)
    overlap, kept = box_iou(corners, corners), torch.zeros_like(scores, dtype=torch.bool)
    for c in range(scores.shape[1]):
        for q in sorted(range(len(scores)), key=lambda q: -scores[q, c]):
            rivals = kept[:, c] & (overlap[q] > iou)
            kept[q, c] = bool(scores[q, c] > min_score) and not rivals.any()
    return kept


@pytest.mark.parametrize('iou', [0.3, 0.6])
def test_kept_by_nms_is_suppression(iou):
    g = torch.Generator().manual_seed(0)
    logits, boxes = torch.randn(3, 40, 4, generator=g) * 3 - 2, torch.rand(3, 40, 4, generator=g) * 0.4 + 0.3
    kept = kept_by_nms(logits, boxes, iou)
    wanted = torch.stack([slow_nms(s, b, iou, 0.01) for s, b in zip(logits.sigmoid(), boxes)])
    assert torch.equal(kept, wanted) and 0 < kept.sum() < (logits.sigmoid() > 0.01).sum()
    assert not kept_by_nms(torch.full((2, 5, 3), -9.0), boxes[:2, :5]).any()


def distillation(seed=0, head='residual', **settings):
    model = some_suppressor(head, seed, overlap=True, **settings)
    hs, logits, boxes = some_queries()
    hs.requires_grad_()
    return model, dict(pred_logits=logits, pred_boxes=boxes, suppressed=model(hs, logits, boxes)), hs


def test_suppression_loss_by_hand():
    model, out, hs = distillation()
    loss = suppression_loss(out, CriterionConfig(w_mds=2.0))['loss_mds']
    kept = kept_by_nms(out['pred_logits'], out['pred_boxes'])
    total, objects = 0, 0
    for b in range(2):
        for place, q in enumerate(out['suppressed']['index'][b].tolist()):
            p = out['pred_logits'][b, q].sigmoid()
            y = p * kept[b, q]
            new = out['suppressed']['pred_logits'][b, place].sigmoid()
            total = total - (p * (y * new.log() + (1 - y) * (1 - new).log())).sum()
            objects = objects + y.sum()
    assert torch.allclose(loss, 2 * total / objects.clamp(min=1), rtol=1e-5)
    loss.backward()
    assert hs.grad.abs().sum() > 0 and model.pair_bias.mlp.layers[0].weight.grad.abs().sum() > 0


def test_suppression_loss_has_its_minimum_at_what_suppression_keeps():
    _, out, _ = distillation()
    kept = kept_by_nms(out['pred_logits'], out['pred_boxes'])
    index = out['suppressed']['index'][..., None].expand(-1, -1, 3)
    target = (out['pred_logits'].sigmoid() * kept).gather(1, index).clamp(1e-6)
    best = dict(out, suppressed=dict(out['suppressed'], pred_logits=target.logit()))
    for shift in (-0.3, 0.3):
        other = dict(best, suppressed=dict(best['suppressed'], pred_logits=target.logit() + shift))
        assert suppression_loss(best)['loss_mds'] < suppression_loss(other)['loss_mds']


def test_nothing_above_the_least_score_is_a_zero_loss():
    model, out, _ = distillation()
    low = dict(out, pred_logits=torch.full((2, 9, 3), -20.0))
    loss = suppression_loss(low)['loss_mds']
    loss.backward()
    assert 0 <= loss < 1e-4


def test_overlap_is_a_function_of_the_boxes_alone():
    model, (_, _, boxes) = some_suppressor(overlap=True), some_queries()
    boxes.requires_grad_()
    bias = model.pair_bias(boxes)
    assert torch.allclose(bias, bias.transpose(2, 3), atol=1e-6)
    bias.sum().backward()
    assert boxes.grad is None
    plain = sum(p.numel() for p in some_suppressor().parameters())
    assert sum(p.numel() for p in model.parameters()) == plain + 2 * SuppressorConfig().hidden


@pytest.mark.parametrize('target,unsup', [('nms', 'nms'), ('both', 'nms'), ('both', 'sure')])
def test_methods_train_by_suppression(target, unsup, tmp_path):
    items = [*TINY, *ON, 'method.name=semi_detr', 'detector.suppressor.overlap=true', 'optim.iters=4']
    items += [f'criterion.mds_target={target}', f'method.mds_unsup={unsup}', 'run.test=false']
    items += ['optim.suppressor_mult=10']
    trainer = Trainer(override(preset('digits'), items), tmp_path / 'run', progress=False)
    rates = [g['base_lr'] for g in trainer.optimizer.param_groups]
    assert rates[-1] == 10 * rates[0]
    before = trainer.student.suppressor.class_head.weight.clone()
    trainer.fit()
    assert not torch.equal(before, trainer.student.suppressor.class_head.weight)
    logged = json.loads((tmp_path / 'run' / 'log.jsonl').read_text().splitlines()[-1])
    assert logged['loss_mds'] > 0 and logged['loss_unsup_mds'] > 0


def test_rate_of_the_suppressor_leaves_others_alone():
    "With the factor 0, or without suppressor, the groups are those of before"
    cfg = override(preset('digits'), ['detector.backbone.weights=none', 'detector.suppressor.head=residual'])
    model = build_detector(dataclasses.replace(cfg.detector, num_classes=3))
    count = lambda groups: [len(g['params']) for g in groups]
    usual = count(build_optimizer(model, cfg.optim).param_groups)
    apart = dataclasses.replace(cfg.optim, suppressor_mult=3.0)
    groups = build_optimizer(model, apart).param_groups
    assert len(groups) == len(usual) + 1 and sum(count(groups)) == sum(usual)
    assert {id(p) for p in groups[-1]['params']} == {id(p) for p in model.suppressor.parameters()}
    off = build_detector(dataclasses.replace(preset('digits').detector, num_classes=3))
    plain = build_optimizer(off, cfg.optim).param_groups
    assert count(build_optimizer(off, apart).param_groups) == count(plain)


def test_a_group_apart_is_clipped_by_itself():
    "A detector with large gradients must not shrink those of the suppressor, nor the other way round"
    sizes = {}
    for apart in (False, True):
        large, small = (torch.nn.Parameter(torch.zeros(4)) for _ in range(2))
        groups = [dict(params=[large], base_lr=1.0), dict(params=[small], base_lr=1.0, apart=apart)]
        optimizer = torch.optim.SGD(groups, lr=1.0)
        large.grad, small.grad = torch.full((4,), 50.0), torch.full((4,), 0.5)
        norm = clip_and_step(optimizer, torch.amp.GradScaler('cpu', enabled=False), 0.1, 1.0)
        sizes[apart] = large.norm().item(), small.norm().item()
    assert norm == pytest.approx(100) and sizes[True] == pytest.approx((0.1, 0.1), rel=1e-4)
    assert sizes[False][1] == pytest.approx(0.001, rel=1e-3)
