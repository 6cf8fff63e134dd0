"Scores in targets, losses and costs that know the place: hand-computed values; off, nothing changes"

import dataclasses
import pytest
import torch
from semidetr.core import ConfigError
from semidetr.matching.losses import (
    CriterionConfig,
    layer_losses,
    set_criterion,
    sigmoid_focal_loss,
    soft_focal_loss,
    varifocal_loss,
)
from semidetr.matching.matching import Matches, assign_o2m, assign_o2o, pad_targets
from semidetr.semi.methods import keep_boxes
from semidetr.semi.teacher import transport

A = torch.tensor([[0.5, 0.5, 0.4, 0.4]])
P = torch.tensor(
    [[0.50, 0.50, 0.40, 0.40], [0.52, 0.50, 0.40, 0.40], [0.60, 0.50, 0.40, 0.40], [0.20, 0.20, 0.10, 0.10]]
)
LOSSES = ('focal', 'task_aligned', 'varifocal')
STAGES = ('o2m', 'o2o')


def predictions(layers=3, B=2, Q=12, C=3, seed=0):
    "Outputs of some layers and the encoder, and targets with scores"
    g = torch.Generator().manual_seed(seed)

    def layer():
        boxes = torch.rand(B, Q, 4, generator=g) * 0.3 + 0.3
        return dict(pred_logits=torch.randn(B, Q, C, generator=g) - 1, pred_boxes=boxes)

    rows = [layer() for _ in range(layers)]
    outputs = {**rows[-1], 'aux_outputs': rows[:-1], 'enc_outputs': layer()}
    targets = [
        dict(labels=torch.tensor([2, 0]), boxes=torch.tensor([[0.4, 0.4, 0.4, 0.4], [0.6, 0.6, 0.3, 0.5]])),
        dict(labels=torch.tensor([1]), boxes=torch.tensor([[0.5, 0.5, 0.4, 0.4]])),
    ]
    return outputs, targets


def scored(targets, *scores):
    "The targets with one score for each object"
    return [dict(t, scores=torch.tensor(s)) for t, s in zip(targets, scores)]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- scores as targets ---------------------------------------------------------------------------
def test_targets_of_the_specification():
    "Soft targets .405118, 1, .085055 times .6; score .7 and IoU .8 at p=.6"
    logits = torch.tensor([[0.2], [0.9], [0.9], [0.9]]).logit()
    padded = pad_targets([dict(labels=torch.tensor([0]), boxes=A, scores=torch.tensor([0.6]))])
    m = assign_o2m(logits[None, None], P[None, None], padded)
    soft = m.weight * padded.scores[m.image, m.target]
    assert m.query.tolist() == [0, 1, 2]
    assert torch.allclose(soft, torch.tensor([0.243071, 0.6, 0.051033]), atol=2e-6)
    loss = varifocal_loss(torch.tensor(0.6).logit(), torch.tensor(0.56))
    assert abs(loss - 0.385969) < 1e-6


def test_one_to_many_targets_in_the_loss():
    "The class loss is smallest, and zero, where the scores of the queries are the targets times .6"
    want = torch.tensor([[0.243071], [0.6], [0.051033], [1e-7]])
    objects = [dict(labels=torch.tensor([0]), boxes=A, scores=torch.tensor([0.6]))]
    padded = pad_targets(objects)
    m = assign_o2m(torch.tensor([[[[0.2], [0.9], [0.9], [0.9]]]]).logit(), P[None, None], padded)
    args = want.logit()[None, None], P[None, None], padded, padded.labels[None], m
    on, off = (layer_losses(*args, CriterionConfig(soft_targets=s), 'o2m') for s in (True, False))
    assert on['cls'] < 1e-9 < 1e-2 < off['cls']
    assert on['l1'] == off['l1'] and on['giou'] == off['giou']


@pytest.mark.parametrize('kind', LOSSES)
def test_one_to_one_target(kind):
    "u x score towards the IoU, the score itself with the focal loss: the loss is stationary there"
    u, score = 0.904762, 0.7
    target = score if kind == 'focal' else u * score
    padded = pad_targets([dict(labels=torch.tensor([0]), boxes=A, scores=torch.tensor([score]))])
    logit = torch.tensor([target], dtype=torch.float64).logit().requires_grad_()
    zero = torch.zeros(1, dtype=torch.long)
    m = Matches(zero, zero, zero, zero, torch.ones(1))
    cfg = CriterionConfig(cls_loss=kind, soft_targets=True)
    boxes = P[None, None, 1:2].double()
    layer_losses(logit[None, None, None], boxes, padded, padded.labels[None], m, cfg, 'o2o')['cls'].backward()
    assert abs(logit.grad.item()) < 1e-5


def test_focal_loss_of_soft_and_hard_targets():
    p = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    for y in (0.0, 1.0):
        hard = sigmoid_focal_loss(p.logit(), torch.full_like(p, y))
        assert torch.allclose(soft_focal_loss(p.logit(), torch.full_like(p, y)), hard, rtol=1e-12)
    soft = soft_focal_loss(p.logit(), torch.full_like(p, 0.6))
    assert abs(p[soft.argmin()] - 0.6) < 1e-9 and soft.min() < 1e-12
    bce = -(0.7 * torch.tensor(0.6).log() + 0.3 * torch.tensor(0.4).log())
    by_hand = 0.25 * 0.1**2 * bce
    assert abs(soft_focal_loss(torch.tensor(0.6).logit(), torch.tensor(0.7)) - by_hand) < 1e-7


@pytest.mark.parametrize('stage', STAGES)
@pytest.mark.parametrize('kind', LOSSES)
def test_scores_of_one_and_scores_that_are_not_asked_for(stage, kind):
    "Without the switch scores change nothing; with it, scores of one change nothing but rounding"
    outputs, targets = predictions()
    off, on = (CriterionConfig(cls_loss=kind, soft_targets=s) for s in (False, True))
    with_scores = scored(targets, [0.9, 0.5], [0.4])
    plain = set_criterion(outputs, targets, stage, off)
    assert same(plain, set_criterion(outputs, with_scores, stage, off))
    ones = set_criterion(outputs, targets, stage, on)
    assert all(torch.allclose(ones[k], plain[k], rtol=1e-6) for k in plain)
    weighted = set_criterion(outputs, with_scores, stage, on)
    changed = {k for k in plain if not torch.allclose(weighted[k], plain[k], rtol=1e-4)}
    assert changed == {k for k in plain if k.startswith('loss_cls')}


def test_scores_of_softmax_detectors():
    "What the score leaves over is no object"
    outputs, targets = predictions(layers=1)
    logits = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(3))
    o = dict(outputs, pred_logits=logits, scores=logits.softmax(-1)[..., :-1])
    o = {k: v for k, v in o.items() if k not in ('enc_outputs', 'aux_outputs')}
    cfg = CriterionConfig(soft_targets=True, no_object=0.1, w_cls=1.0)
    got = set_criterion(o, scored(targets, [0.9, 0.5], [0.4]), 'o2o', cfg)['loss_cls']
    padded = pad_targets(targets)
    read = o['scores'].logit()
    m = assign_o2o(read[None], o['pred_boxes'][None], padded, **cfg.cost)
    s = torch.tensor([[0.9, 0.5], [0.4, 0]])[m.image, m.target]
    y = torch.zeros(2, 12, 4)
    y[m.image, m.query, padded.labels[m.image, m.target]] = s
    y[..., 3] = 0.1 * (1 - y.sum(-1))
    assert torch.allclose(got, -(y * logits.log_softmax(-1)).sum() / y.sum(), rtol=1e-5)


def test_transport_gives_the_scores_and_filters_keep_them():
    eye = torch.eye(3, dtype=torch.float64)
    view = [dict(matrix=eye, size=(100, 100))]
    boxes = torch.tensor([[10.0, 10, 30, 30], [200, 200, 220, 220], [40, 40, 60, 60]])
    found = [dict(boxes=boxes, labels=torch.tensor([0, 1, 2]), scores=torch.tensor([0.9, 0.8, 0.3]))]
    moved = transport(found, view, view)  # the second box is outside
    assert torch.equal(pad_targets(moved).scores, torch.tensor([[0.9, 0.3]]))
    kept = keep_boxes(moved, [torch.tensor([False, True])])
    assert torch.equal(pad_targets(kept).scores, torch.tensor([[0.3]]))


def test_scores_get_no_gradient_and_half_precision_is_computed_in_float32():
    t = dict(labels=torch.tensor([0]), boxes=A.bfloat16(), scores=torch.tensor([0.3]).bfloat16().requires_grad_())
    padded = pad_targets([t])
    assert padded.scores.dtype == torch.float32 and not padded.scores.requires_grad


def test_denoising_queries_of_pseudo_labels_learn_the_score_too():
    outputs, targets = predictions()
    slots = torch.tensor([[0, 1, -1, -1], [0, -2, -1, -2]])
    g = torch.Generator().manual_seed(5)
    dn = dict(
        pred_logits=torch.randn(3, 2, 4, 3, generator=g),
        pred_boxes=torch.rand(3, 2, 4, 4, generator=g) * 0.3 + 0.3,
        meta=dict(target=slots),
    )
    outputs['extra'] = dict(denoising=dn)
    cfg = CriterionConfig(cls_loss='varifocal', soft_targets=True)
    full, half = (
        set_criterion(outputs, t, 'o2o', cfg) for t in (targets, scored(targets, [0.5, 0.5], [0.5]))
    )
    assert all(full[f'loss_cls_dn_{i}'] != half[f'loss_cls_dn_{i}'] for i in range(3))
    assert all(full[f'loss_l1_dn_{i}'] == half[f'loss_l1_dn_{i}'] for i in range(3))
