"Scores in targets, losses and costs that know the place: hand-computed values; off, nothing changes"

import dataclasses
import pytest
import torch
from semidetr.core import ConfigError
from semidetr.matching.losses import (
    CriterionConfig,
    layer_losses,
    position_targets,
    set_criterion,
    sigmoid_focal_loss,
    soft_focal_loss,
    varifocal_loss,
)
from semidetr.matching.matching import (
    Matches,
    NonFiniteError,
    assign_o2m,
    assign_o2o,
    hungarian,
    pad_targets,
    pair_cost,
    pairwise_overlap,
    placement,
)
from semidetr.semi.mining import matched_costs
from semidetr.semi.teacher import keep_boxes, transport
from semidetr.train.config import config_hash, override, preset

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
    t = dict(
        labels=torch.tensor([0]), boxes=A.bfloat16(), scores=torch.tensor([0.3]).bfloat16().requires_grad_()
    )
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


# --- the place in the loss -----------------------------------------------------------------------
def two_pairs(*u):
    "One image with a query for each object of class 0, shifted so that their IoUs are u"
    n = len(u)
    gt = torch.tensor([[0.5, 0.5, 0.4, 0.4]], dtype=torch.float64).repeat(n, 1)
    shift = torch.tensor([0.4 * (1 - x) / (1 + x) for x in u], dtype=torch.float64)
    boxes = gt + torch.stack([shift, *torch.zeros(3, n, dtype=torch.float64)], 1)
    padded = pad_targets([dict(labels=torch.zeros(n, dtype=torch.long), boxes=gt)])
    each, zero = torch.arange(n), torch.zeros(n, dtype=torch.long)
    return boxes[None, None], padded, Matches(zero, zero, each, each, torch.ones(n))


def class_sum(boxes, padded, m, p, cfg, stage='o2o'):
    logits = torch.full((1, 1, boxes.shape[2], 1), p, dtype=torch.float64).logit()
    return layer_losses(logits, boxes, padded, padded.labels[None], m, cfg, stage)['cls'].item()


def test_position_supervised_loss_of_the_specification():
    "IoU .904762 and .6: targets 1 and .439778, losses .020433 and .004736 at p=.6, weight 6"
    cfg = CriterionConfig(cls_loss='position')
    got = class_sum(*two_pairs(0.904762, 0.6), 0.6, cfg)
    assert got == pytest.approx(6 * (0.020433 + 0.004736), abs=1e-5)
    lone = class_sum(*two_pairs(0.3), 0.6, cfg)  # a lone bad match still learns 1
    assert lone == pytest.approx(6 * 0.020433, abs=1e-5)
    assert class_sum(*two_pairs(0.3), 0.6, CriterionConfig(cls_loss='position', w_position=2.0)) == (
        pytest.approx(lone / 3)
    )


def test_position_target_times_score():
    "After the rescaling: the best pair of score .5 learns .5"
    boxes, padded, m = two_pairs(0.904762, 0.6)
    scored_too = dataclasses.replace(padded, scores=torch.tensor([[0.5, 0.8]]))
    cfg = CriterionConfig(cls_loss='position', soft_targets=True)
    got = class_sum(boxes, scored_too, m, 0.6, cfg)
    y, p = torch.tensor([0.5, 0.8 * 0.439778]), torch.tensor(0.6)
    want = (0.25 * (y - p) ** 2 * -(y * p.log() + (1 - y) * (1 - p).log())).sum()
    assert got == pytest.approx(6 * want.item(), abs=1e-6)


def test_position_targets_of_each_layer_and_image():
    g = torch.Generator().manual_seed(0)
    u = torch.rand(3, 2, 5, 4, generator=g) * (torch.rand(3, 2, 5, 4, generator=g) < 0.3)
    u[1, 1] = 0  # an image without a pair that overlaps
    t = position_targets(u)
    for l in range(3):
        for b in range(2):
            largest = float(u[l, b].max()) ** 2
            want = u[l, b] ** 2 * (max(1, 1 / largest) if largest else 1)
            assert torch.allclose(t[l, b], want, rtol=1e-6)
    assert t.isfinite().all() and (t[1, 1] == 0).all() and t[0, 0].max() == 1


def denoising_queries():
    "Outputs of four denoising queries per image, after three layers"
    g = torch.Generator().manual_seed(5)
    return dict(
        pred_logits=torch.randn(3, 2, 4, 3, generator=g),
        pred_boxes=torch.rand(3, 2, 4, 4, generator=g) * 0.3 + 0.3,
        meta=dict(target=torch.tensor([[0, 1, -1, -1], [0, -2, -1, -2]])),
    )


def test_position_acts_in_the_one_to_one_stage_alone():
    outputs, targets = predictions()
    plain, place = CriterionConfig(cls_loss='varifocal'), CriterionConfig(cls_loss='position')
    assert same(set_criterion(outputs, targets, 'o2m', plain), set_criterion(outputs, targets, 'o2m', place))
    a, b = (set_criterion(outputs, targets, 'o2o', c) for c in (plain, place))
    assert {k for k in a if a[k] != b[k]} == {k for k in a if k.startswith('loss_cls')}


def test_class_weight_of_denoising_queries():
    outputs, targets = predictions()
    outputs['extra'] = dict(denoising=denoising_queries())
    one, two = (
        set_criterion(outputs, targets, 'o2o', CriterionConfig(cls_loss='position', w_position_dn=w))
        for w in (1.0, 2.0)
    )
    ratio = {k: (two[k] / one[k]).item() for k in one}
    assert all(v == pytest.approx(2 if 'cls_dn' in k else 1) for k, v in ratio.items())


@pytest.mark.parametrize('stage', STAGES)
def test_position_loss_without_objects_and_with_gradients(stage):
    outputs, targets = predictions()
    free = {k: v.clone().requires_grad_() for k, v in outputs.items() if k.startswith('pred')}
    empty = [dict(labels=torch.zeros(0), boxes=torch.zeros(0, 4))] * 2
    cfg = CriterionConfig(cls_loss='position', class_cost='modulated', soft_targets=True)
    for t in (empty, targets, [targets[0], empty[0]]):
        total = sum(set_criterion(free, t, stage, cfg).values())
        total.backward()
        assert total.isfinite() and all(v.grad.isfinite().all() for v in free.values())


# --- the place in the cost -----------------------------------------------------------------------
AB, LABELS = torch.tensor([[0.50, 0.5, 0.4, 0.4], [0.54, 0.5, 0.4, 0.4]]), torch.tensor([0, 1])
LOGITS = torch.tensor([[0.2, 0.1], [0.9, 0.1], [0.9, 0.1], [0.9, 0.1]]).logit()


def test_modulated_cost_of_the_specification():
    "p .2, .878310, .804984, .477078 for A; costs of A, plain and modulated"
    plain, moved = (pair_cost(LOGITS, P, LABELS, AB, kind=k)[:, 0] for k in ('focal', 'modulated'))
    assert torch.allclose(plain, torch.tensor([-1.498368, -4.506638, -3.497114, 4.078919]), atol=1e-5)
    assert torch.allclose(moved, torch.tensor([-1.498368, -4.145829, -2.284780, 6.755878]), atol=1e-5)
    p = LOGITS.sigmoid()[:, :1] * placement(pairwise_overlap(P, AB)[1])[:, :1]
    assert torch.allclose(p[:, 0], torch.tensor([0.2, 0.878310, 0.804984, 0.477078]), atol=1e-6)


def test_modulated_cost_is_its_definition():
    "Against a loop over pairs; objects of one class each have their own factor; no pair near: rescaled"
    g = torch.Generator().manual_seed(1)
    boxes = torch.rand(5, 4, generator=g, dtype=torch.float64) * 0.2 + 0.05
    gt = torch.rand(3, 4, generator=g, dtype=torch.float64) * 0.2 + 0.6
    logits, labels = torch.randn(5, 2, generator=g, dtype=torch.float64), torch.tensor([0, 0, 1])
    giou = pairwise_overlap(boxes, gt)[1]
    v = (giou + 1) / 2
    assert v.max() < 1
    got = pair_cost(logits, boxes, labels, gt, kind='modulated', w_l1=0, w_giou=0)
    for j in range(5):
        for i in range(3):
            p = logits[j, labels[i]].sigmoid() * (v[j, i] * max(1, 1 / v.max())) ** 0.5
            pos, neg = -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log()
            assert abs(got[j, i] - 2 * (pos - neg)) < 1e-9


def test_modulated_matching_of_a_batch_is_that_of_its_images():
    "Padding does not enter the largest value; large batches are matched image by image"
    g = torch.Generator().manual_seed(2)
    B, Q, counts = 3, 40, (1, 12, 0)
    logits = torch.randn(2, B, Q, 3, generator=g)
    boxes = torch.rand(2, B, Q, 4, generator=g) * 0.1 + 0.05
    targets = [
        dict(labels=torch.randint(0, 3, (n,), generator=g), boxes=torch.rand(n, 4, generator=g) * 0.1 + 0.6)
        for n in counts
    ]
    targets[0]['boxes'][:, :2] = 0.9  # far from all predictions, which the padded boxes are not
    m = assign_o2o(logits, boxes, pad_targets(targets), kind='modulated')
    big = torch.cat([logits] * 60, 1), torch.cat([boxes] * 60, 1)  # above the limit for one tensor
    many = assign_o2o(*big, pad_targets(targets * 60), kind='modulated')
    for b, t in enumerate(targets):
        one = assign_o2o(logits[:, b : b + 1], boxes[:, b : b + 1], pad_targets([t]), kind='modulated')
        for got, image in ((m, b), (many, b), (many, b + 3)):
            mine = got.image == image
            assert got.query[mine].equal(one.query) and got.target[mine].equal(one.target)
            assert torch.allclose(got.cost[mine], one.cost, atol=1e-5)


def test_mining_keeps_the_plain_cost():
    outputs = dict(pred_logits=LOGITS[None], pred_boxes=P[None])
    targets = [dict(labels=LABELS, boxes=AB)]
    plain, moved = (CriterionConfig(class_cost=k) for k in ('focal', 'modulated'))
    assert matched_costs(outputs, targets, plain)[0].equal(matched_costs(outputs, targets, moved)[0])
    assert moved.cost['kind'] == 'modulated' and plain.mining_cost == plain.cost
    probability = CriterionConfig(class_cost='probability')
    assert probability.mining_cost == probability.cost


@pytest.mark.parametrize('key,term', [('pred_logits', 'cls'), ('pred_boxes', 'l1')])
def test_a_nan_is_named_by_its_origin(key, term):
    outputs = dict(pred_logits=LOGITS[None].clone(), pred_boxes=P[None].clone())
    outputs[key][0, 2, 1] = float('nan')
    with pytest.raises(NonFiniteError, match=f"image 7 .*the term '{term}'"):
        hungarian(outputs, [dict(labels=LABELS, boxes=AB, image_id=7)], kind='modulated')


def test_names_and_hashes():
    with pytest.raises(ConfigError, match='position'):
        CriterionConfig(cls_loss='positions')
    base = preset('digits')
    new = ['criterion.cls_loss=position', 'criterion.class_cost=modulated', 'criterion.soft_targets=true']
    hashes = {config_hash(override(base, [item])) for item in ('optim.iters=800', *new)}
    assert len(hashes) == 4
    place = override(base, new[:1])
    assert config_hash(override(place, ['criterion.w_position=2'])) != config_hash(place)
    assert config_hash(override(base, ['criterion.w_position=2'])) == config_hash(base)
