"The criterion against a slow float64 loop that shares no code with it, and its properties"

import dataclasses
import math
import time
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torchvision.ops import generalized_box_iou_loss
from torchvision.ops import sigmoid_focal_loss as torchvision_focal
import semidetr.matching.losses as losses
from semidetr.boxes import cxcywh_to_xyxy
from semidetr.core import ConfigError, DataError
from semidetr.detectors.denoising import DenoisingConfig, denoising_queries
from semidetr.matching.assigners import ASSIGNERS
from semidetr.matching.losses import (
    CriterionConfig,
    box_losses,
    match_stats,
    set_criterion,
    sigmoid_focal_loss,
    task_aligned_focal,
    varifocal_loss,
)
from semidetr.matching.matching import NonFiniteError, pad_targets


def make(sizes=(3, 0, 2), layers=3, Q=12, C=4, seed=0, enc=True, dn=True, dtype=torch.float64, grad=False):
    g = torch.Generator().manual_seed(seed)

    def boxes(*n):
        return (
            torch.cat(
                [torch.rand(*n, 2, generator=g) * 0.4 + 0.3, torch.rand(*n, 2, generator=g) * 0.4 + 0.1], -1
            )
            .to(dtype)
            .requires_grad_(grad)
        )

    def logits(*n):
        return (torch.randn(*n, C, generator=g) - 1).to(dtype).requires_grad_(grad)

    B = len(sizes)
    out = [dict(pred_logits=logits(B, Q), pred_boxes=boxes(B, Q)) for _ in range(layers)]
    o = {**out[-1], 'aux_outputs': out[:-1]}
    if enc:
        o['enc_outputs'] = dict(pred_logits=logits(B, Q), pred_boxes=boxes(B, Q))
    if dn:
        n = max(sizes)
        slots = []
        for s in sizes:
            if not s:
                slots.append([-3] * (4 * n))
                continue
            pos, neg = [i if i < s else -2 for i in range(n)], [-1 if i < s else -2 for i in range(n)]
            slots.append((pos + neg) * 2)
        o['extra'] = dict(
            denoising=dict(
                pred_logits=logits(layers, B, 4 * n),
                pred_boxes=boxes(layers, B, 4 * n),
                meta=dict(groups=2, n_max=n, target=torch.tensor(slots)),
            )
        )
    return o, [
        dict(labels=torch.randint(0, C, (s,), generator=g), boxes=boxes(s).detach(), image_id=i)
        for i, s in enumerate(sizes)
    ]


def leaves(o):
    parts = (
        [o, *o['aux_outputs']]
        + ([o['enc_outputs']] if 'enc_outputs' in o else [])
        + ([o['extra']['denoising']] if 'extra' in o else [])
    )
    return [p[k] for p in parts for k in ('pred_logits', 'pred_boxes')]


def total(d):
    return sum(v for k, v in d.items() if k.startswith('loss_'))


# --- the slow reference: plain numbers, one formula per line ---------------------------
def sig(z):
    return 1 / (1 + math.exp(-z))


def bce(p, y):
    return -(y * math.log(p) + (1 - y) * math.log(1 - p))


def corners(b):
    x, y, w, h = b
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


def area(c):
    return max(0, c[2] - c[0]) * max(0, c[3] - c[1])


def iou_giou(a, b):
    a, b = corners(a), corners(b)
    i = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    h = area((min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])))
    u = area(a) + area(b) - i
    return i / u, i / u - (h - u) / h


def l1(a, b):
    return sum(abs(x - y) for x, y in zip(a, b))


def focal(p, y):
    return 0.25 * (1 - p) ** 2 * -math.log(p) if y else 0.75 * p**2 * -math.log(1 - p)


def slow_match(z, boxes, labels, gt, stage, c):
    "[(query, object, weight)] of one image"
    Q, N = len(boxes), len(gt)
    if not N:
        return []
    p = [[sig(z[j][labels[i]]) for i in range(N)] for j in range(Q)]
    if stage == 'o2o':
        cost = [
            [
                c.w_cls * (focal(p[j][i], 1) - focal(p[j][i], 0))
                + c.cost_l1 * l1(boxes[j], gt[i])
                - c.w_giou * iou_giou(boxes[j], gt[i])[1]
                for i in range(N)
            ]
            for j in range(Q)
        ]
        return [(q, t, 1.0) for q, t in zip(*linear_sum_assignment(cost))]
    u = [[iou_giou(boxes[j], gt[i])[0] for i in range(N)] for j in range(Q)]
    m = [[p[j][i] ** c.alpha * u[j][i] ** c.beta for i in range(N)] for j in range(Q)]
    wants = {}
    for i in range(N):
        for j in sorted(range(Q), key=lambda j: -m[j][i])[: c.k]:
            if m[j][i] > 0:
                wants.setdefault(j, []).append(i)
    own = {j: max(w, key=lambda i: (u[j][i], -i)) for j, w in wants.items()}
    peak = {
        i: (max(m[j][i] for j in own if own[j] == i), max(u[j][i] for j in own if own[j] == i))
        for i in own.values()
    }
    return [(j, i, m[j][i] / (peak[i][0] + 1e-7) * peak[i][1]) for j, i in own.items()]


def slow_layer(z, boxes, targets, labels, pairs, stage, c, live=None, soft=None):
    "(cls, l1, giou) of one layer: sums over the images, normalised"
    cls = box = giou = n = 0.0
    for b, found in enumerate(pairs):
        y, gt = {}, targets[b]['boxes'].tolist()
        for q, t, w in found:
            u, g = iou_giou(boxes[b][q], gt[t])
            y[q, labels[b][t]] = u if soft else w
            box += w * l1(boxes[b][q], gt[t])
            giou += w * (1 - g)
            n += w
        for q in range(len(z[b])):
            if live is not None and not live[b][q]:
                continue
            for k, zz in enumerate(z[b][q]):
                p, t = sig(zz), y.get((q, k), 0.0)
                if stage == 'o2m' or soft == 'task_aligned':
                    cls += abs(t - p) ** 2 * bce(p, t)
                elif soft == 'varifocal':
                    cls += (t if t else 0.75 * p**2) * bce(p, t)
                else:
                    cls += focal(p, t)
    n = max(1, n)
    return c.w_cls * cls / n, c.loss_l1 * box / n, c.w_giou * giou / n


def slow_criterion(o, targets, stage, c, denoising=True):
    names = [f'_{i}' for i in range(len(o['aux_outputs']))] + ['', '_enc']
    out = {}
    for name, layer in zip(names, [*o['aux_outputs'], o, o.get('enc_outputs')]):
        if layer is None:
            continue
        z, b = layer['pred_logits'].tolist(), layer['pred_boxes'].tolist()
        labels = [
            [0] * len(t['labels']) if name == '_enc' and c.enc_labels == 'zero' else t['labels'].tolist()
            for t in targets
        ]
        pairs = [
            slow_match(z[i], b[i], labels[i], t['boxes'].tolist(), stage, c) for i, t in enumerate(targets)
        ]
        soft = None if c.cls_loss == 'focal' or stage == 'o2m' else c.cls_loss
        for term, v in zip(
            ('cls', 'l1', 'giou'), slow_layer(z, b, targets, labels, pairs, stage, c, soft=soft)
        ):
            out[f'loss_{term}{name}'] = v * (c.w_enc if name == '_enc' else 1)
    if denoising and 'extra' in o:
        dn = o['extra']['denoising']
        slot = dn['meta']['target'].tolist()
        pairs = [[(p, t, 1.0) for p, t in enumerate(row) if t >= 0] for row in slot]
        live = [[t != -3 for t in row] for row in slot]
        for d, (z, b) in enumerate(zip(dn['pred_logits'].tolist(), dn['pred_boxes'].tolist())):
            v = slow_layer(
                z,
                b,
                targets,
                [t['labels'].tolist() for t in targets],
                pairs,
                'o2o',
                c,
                live,
                soft=None if c.cls_loss == 'focal' else c.cls_loss,
            )
            for term, x in zip(('cls', 'l1', 'giou'), v):
                out[f'loss_{term}_dn_{d}'] = c.w_dn * x
    return out


# --- tests -----------------------------------------------------------------------------
CONFIGS = [
    CriterionConfig(),
    CriterionConfig(loss_l1=5, enc_labels='true', k=3),
    CriterionConfig(w_cls=1, cost_l1=3, w_giou=0.5, w_enc=0.5, w_dn=0.25, alpha=0.5, beta=2),
    CriterionConfig(cls_loss='task_aligned'),
    CriterionConfig(cls_loss='varifocal'),
]


@pytest.mark.parametrize('stage', ['o2o', 'o2m'])
@pytest.mark.parametrize('cfg', CONFIGS, ids=range(len(CONFIGS)))
def test_every_term_is_its_definition(stage, cfg):
    for sizes, seed in (((3, 0, 2), 0), ((1,), 1), ((7, 4), 2)):
        o, targets = make(sizes, seed=seed)
        got, want = set_criterion(o, targets, stage, cfg), slow_criterion(o, targets, stage, cfg)
        assert got.keys() == want.keys()
        for key in want:
            assert got[key].item() == pytest.approx(want[key], rel=1e-6, abs=1e-7), key


def test_keys():
    o, targets = make(layers=3)
    suffixes = ['', '_0', '_1', '_enc', '_dn_0', '_dn_1', '_dn_2']
    assert set(set_criterion(o, targets, 'o2o')) == {
        f'loss_{t}{s}' for t in ('cls', 'l1', 'giou') for s in suffixes
    }
    assert set(set_criterion(o, targets, 'o2m', denoising=False)) == {
        f'loss_{t}{s}' for t in ('cls', 'l1', 'giou') for s in suffixes[:4]
    }
    one, targets = make(layers=1, enc=False, dn=False)
    assert set(set_criterion(one, targets)) == {'loss_cls', 'loss_l1', 'loss_giou'}
    del one['aux_outputs']
    assert set(set_criterion(one, targets)) == {'loss_cls', 'loss_l1', 'loss_giou'}


def test_value_of_the_specification():  # 20
    p = torch.tensor([[0.3, 0.2], [0.6, 0.1]])
    y = torch.tensor([[0.8, 0.0], [0.0, 0.0]])
    assert 2 * task_aligned_focal(p.logit(), y).sum().item() == pytest.approx(1.196945, abs=1e-6)


def test_against_torchvision():
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(50, generator=g) * 5, (torch.rand(50, generator=g) < 0.3).float()
    torch.testing.assert_close(sigmoid_focal_loss(z, y), torchvision_focal(z, y))
    assert (
        varifocal_loss(z, y).isfinite().all()
        and sigmoid_focal_loss(torch.tensor([80.0, -80.0]), torch.tensor([0.0, 1.0])).isfinite().all()
    )
    o, _ = make()
    a, b = o['pred_boxes'].flatten(0, 1)[:15], o['pred_boxes'].flatten(0, 1)[15:30]
    torch.testing.assert_close(
        box_losses(a, b)[1],
        generalized_box_iou_loss(cxcywh_to_xyxy(a), cxcywh_to_xyxy(b)),
        atol=1e-6,
        rtol=1e-5,
    )


@pytest.mark.parametrize('stage', ['o2o', 'o2m'])
def test_doubling_a_weight_doubles_its_terms(stage):
    o, targets = make()
    base, cfg = set_criterion(o, targets, stage), CriterionConfig()
    for field, hits in dict(
        loss_l1=lambda k: '_l1' in k, w_enc=lambda k: k.endswith('_enc'), w_dn=lambda k: '_dn_' in k
    ).items():
        twice = set_criterion(o, targets, stage, dataclasses.replace(cfg, **{field: 2 * getattr(cfg, field)}))
        for k in base:
            assert twice[k].item() == pytest.approx(base[k].item() * (2 if hits(k) else 1), rel=1e-9), (
                field,
                k,
            )
    both = set_criterion(
        o, targets, stage, dataclasses.replace(cfg, w_cls=4, w_giou=4, cost_l1=10, loss_l1=20)
    )  # costs keep their proportions
    for k in base:
        assert both[k].item() == pytest.approx(2 * base[k].item(), rel=1e-9)


def test_gradients_are_those_of_the_numbers():
    o, targets = make((2, 0), layers=1, Q=4, C=2, grad=True)
    assert torch.autograd.gradcheck(lambda *x: total(set_criterion(o, targets, 'o2o')), leaves(o))


@pytest.mark.parametrize('stage', ['o2o', 'o2m'])
def test_gradient_reaches_every_prediction(stage):
    o, targets = make(grad=True)
    total(set_criterion(o, targets, stage)).backward()
    for x in leaves(o):
        assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    assert (o['pred_boxes'].grad[1] == 0).all() and (
        o['pred_logits'].grad[1] > 0
    ).all()  # an image without objects: scores go down, boxes stay
    dn = o['extra']['denoising']
    assert (dn['pred_logits'].grad[:, 1] == 0).all() and (
        dn['pred_boxes'].grad[:, dn['meta']['target'] < 0] == 0
    ).all()
    assert (dn['pred_logits'].grad[:, dn['meta']['target'] == -1] > 0).all() and (
        dn['pred_logits'].grad[:, dn['meta']['target'] == -2] > 0
    ).all()


def test_soft_targets_are_constants():
    "The gradient of stage 1 does not flow through the matching"
    o, targets = make((2,), layers=1, enc=False, dn=False, grad=True)
    (got,) = torch.autograd.grad(
        set_criterion(o, targets, 'o2m')['loss_cls'], [o['pred_boxes']], allow_unused=True
    )
    assert got is None


@pytest.mark.parametrize('kind', ['task_aligned', 'varifocal'])
def test_overlap_as_target_is_a_constant(kind):
    "The class loss must not move boxes"
    o, targets = make((2,), layers=1, enc=False, grad=True)
    d = set_criterion(o, targets, 'o2o', CriterionConfig(cls_loss=kind))
    got = torch.autograd.grad(
        d['loss_cls'] + d['loss_cls_dn_0'],
        [o['pred_boxes'], o['extra']['denoising']['pred_boxes']],
        allow_unused=True,
    )
    assert got == (None, None)


@pytest.mark.parametrize('stage', ['o2o', 'o2m'])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
def test_no_objects_at_all(stage, dtype):  # 19
    o, targets = make((0, 0), dn=False, grad=True, dtype=dtype)
    d = set_criterion(o, targets, stage)
    for k, v in d.items():
        assert v.requires_grad and v.isfinite() and (v.item() > 0) == ('cls' in k)
    total(d).backward()
    for x in leaves(o):
        assert x.grad is not None and x.grad.isfinite().all()
    assert (o['pred_logits'].grad > 0).all() and (o['pred_boxes'].grad == 0).all()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_low_precision_is_computed_in_float32(dtype):
    o, targets = make(dtype=dtype)
    assert all(v.dtype == torch.float32 for v in set_criterion(o, targets, 'o2m').values())


@pytest.mark.parametrize('over', ['all', 'process'])
def test_normalisers_with_several_processes(monkeypatch, over):
    "The mean over the processes; with 'process' classes of stage 2 and denoising: positives of this process"
    o, targets = make((3, 0, 2))
    cfg = CriterionConfig(normalise=over)
    alone = {s: set_criterion(o, targets, s, cfg) for s in ('o2o', 'o2m')}
    calls = []

    def three_times(x):
        calls.append(x.shape)
        return 3 * x

    monkeypatch.setattr('semidetr.many.all_reduce_mean', three_times)
    for stage in ('o2o', 'o2m'):
        for k, v in set_criterion(o, targets, stage, cfg).items():
            local = over == 'process' and 'cls' in k and (stage == 'o2o' or '_dn_' in k)
            assert v.item() * (1 if local else 3) == pytest.approx(alone[stage][k].item()), (stage, k)
    empty, none = make((0, 0), dn=False)
    set_criterion(empty, none, 'o2m', cfg)
    assert (
        len(calls) == 3 and len(set(calls)) == 1
    )  # the same exchange on a process without objects: no deadlock


def test_denoising_slots():
    o, targets = make((3, 0, 2))
    base = set_criterion(o, targets)
    dn = o['extra']['denoising']
    target = dn['meta']['target']
    for code, counts in ((-1, True), (-2, True), (-3, False)):
        moved = dn['pred_logits'].clone()
        moved[:, target == code] += 1
        other = set_criterion({**o, 'extra': dict(denoising={**dn, 'pred_logits': moved})}, targets)
        assert (other['loss_cls_dn_0'] > base['loss_cls_dn_0']) == counts and other['loss_cls'] == base[
            'loss_cls'
        ]
        boxes = dn['pred_boxes'].clone()
        boxes[:, target == code] *= 0.5
        assert (
            set_criterion({**o, 'extra': dict(denoising={**dn, 'pred_boxes': boxes})}, targets)[
                'loss_l1_dn_1'
            ]
            == base['loss_l1_dn_1']
        )


def test_the_queries_of_the_denoising_chapter_are_understood():
    "The name and the codes that `denoising_queries` gives are those that the criterion reads"
    g = torch.Generator().manual_seed(0)
    o, targets = make((3, 0, 2), layers=2, dn=False, dtype=torch.float32)
    q = denoising_queries(targets, torch.nn.Embedding(5, 8), 4, DenoisingConfig(num=24), generator=g)
    P = q.content.shape[1]
    clean = torch.stack(
        [
            t['boxes'][row.clamp(0, len(t['boxes']) - 1)] if len(t['boxes']) else torch.full((P, 4), 0.5)
            for t, row in zip(targets, q.meta['target'])
        ]
    )
    o['extra'] = {
        q.name: dict(
            pred_logits=torch.randn(2, 3, P, 4, generator=g),
            pred_boxes=clean.expand(2, -1, -1, -1),
            meta=q.meta,
        )
    }
    d = set_criterion(o, targets)
    assert {k for k in d if '_dn_' in k} == {
        f'loss_{t}_dn_{i}' for t in ('cls', 'l1', 'giou') for i in range(2)
    }
    assert (
        d['loss_cls_dn_0'] > 0 and abs(d['loss_l1_dn_1']) < 1e-6 and abs(d['loss_giou_dn_1']) < 1e-5
    )  # boxes are the true ones


def test_perfect_predictions_cost_no_box_loss():
    o, targets = make((3, 2), dn=False)
    for layer in [o, *o['aux_outputs'], o['enc_outputs']]:
        for b, t in enumerate(targets):
            layer['pred_boxes'][b, : len(t['boxes'])] = t['boxes']
    cfg = CriterionConfig(w_cls=1e-9)
    assert all(abs(v.item()) < 1e-7 for k, v in set_criterion(o, targets, 'o2o', cfg).items())


def test_the_encoder_learns_objectness_or_classes():
    o, targets = make((3, 2), dn=False)
    renamed = [dict(t, labels=(t['labels'] + 1) % 4) for t in targets]
    zero, true = CriterionConfig(), CriterionConfig(enc_labels='true')
    assert (
        set_criterion(o, targets, 'o2o', zero)['loss_cls_enc']
        == set_criterion(o, renamed, 'o2o', zero)['loss_cls_enc']
    )
    assert (
        set_criterion(o, targets, 'o2o', true)['loss_cls_enc']
        != set_criterion(o, renamed, 'o2o', true)['loss_cls_enc']
    )


def test_bad_input_is_named():
    o, targets = make()
    with pytest.raises(ConfigError, match='o2m, o2o'):
        set_criterion(o, targets, 'one2one')
    with pytest.raises(ConfigError, match='zero'):
        CriterionConfig(enc_labels='zeros')
    with pytest.raises(ConfigError, match='task_aligned'):
        CriterionConfig(cls_loss='task-aligned')
    with pytest.raises(ConfigError, match='positive'):
        CriterionConfig(k=0)
    targets[2]['labels'][0] = 9
    with pytest.raises(DataError, match='image 2'):
        set_criterion(o, targets)
    o['aux_outputs'][1]['pred_boxes'][0] = float('nan')
    with pytest.raises(NonFiniteError, match='image 0.*layer 1'):
        set_criterion(o, make()[1], 'o2m')


def test_match_stats():
    o, targets = make((3, 0, 2), dtype=torch.float32)
    s = match_stats(o, targets, 'o2o')
    assert s['positives'] == 5 and s['positives_per_object'] == 1 and 0 < s['matched_iou'] < 1
    assert match_stats(o, targets, 'o2m', CriterionConfig(k=3))['positives'] <= 15
    empty = match_stats(*make((0,), dn=False), 'o2m')
    assert (
        empty['positives'] == 0
        and math.isnan(empty['matched_iou'])
        and math.isnan(empty['positives_per_object'])
    )


def test_it_is_cheap():
    "3 decoder layers and the encoder, 8 images, 100 queries: a few milliseconds; the limit is generous"
    o, targets = make((6,) * 8, layers=3, Q=100, C=10, dn=False, dtype=torch.float32, grad=True)
    best = 1e9
    for _ in range(7):
        start = time.perf_counter()
        set_criterion(o, targets, 'o2o')
        best = min(best, time.perf_counter() - start)
    assert best < 0.03


def o2m_of(name):
    "An assignment with the signature that the criterion calls; k belongs to the task-aligned one"
    return lambda logits, boxes, padded, labels, k, alpha, beta: ASSIGNERS[name](
        logits, boxes, padded, labels, alpha=alpha, beta=beta
    )


@pytest.mark.parametrize('name', ASSIGNERS)
def test_another_assignment_in_the_first_stage(name):
    o, targets = make(layers=2, Q=30)
    cfg = CriterionConfig(o2m=name, alpha=0.5, beta=2.0)
    got = set_criterion(o, targets, 'o2m', cfg, o2m=o2m_of(name))
    [(layers, names)] = losses._stacked(o)
    logits, boxes = (torch.stack([x[k] for x in layers]) for k in ('pred_logits', 'pred_boxes'))
    padded = pad_targets(targets)
    labels = padded.labels.expand(3, -1, -1).clone()
    labels[-1] = 0
    m = ASSIGNERS[name](logits, boxes, padded, labels, alpha=0.5, beta=2.0)
    sums = losses.layer_losses(logits, boxes, padded, labels, m, cfg, 'o2m')
    for i, suffix in enumerate(names):
        for term in sums:
            assert got[f'loss_{term}{suffix}'].item() == pytest.approx(
                (sums[term][i] / m.weight[m.layer == i].sum().clamp(min=1)).item(), rel=1e-9
            )
    usual = set_criterion(o, targets, 'o2m', CriterionConfig(alpha=0.5, beta=2.0))
    assert any(got[k] != usual[k] for k in ('loss_cls', 'loss_l1', 'loss_giou'))
    assert got['loss_l1_dn_0'] == usual['loss_l1_dn_0']
    one = set_criterion(o, targets, 'o2o', cfg)
    for k, v in set_criterion(o, targets, 'o2o', CriterionConfig(alpha=0.5, beta=2.0)).items():
        assert one[k].equal(v)


def test_a_named_assignment_without_its_function_is_refused():
    "A setting that is silently ignored would compare an assignment with itself"
    o, targets = make(layers=2)
    for f in (set_criterion, match_stats):
        with pytest.raises(ConfigError, match="criterion.o2m='atss'.*one_to_many_assigner"):
            f(o, targets, 'o2m', CriterionConfig(o2m='atss'))


@pytest.mark.parametrize('weight', [0, -1, float('nan')])
def test_a_weight_of_no_object_that_divides_by_zero_is_refused(weight):
    with pytest.raises(ConfigError, match='criterion.no_object'):
        CriterionConfig(no_object=weight)


def test_unknown_assignment_is_refused():
    with pytest.raises(ConfigError, match="criterion.o2m='simotta'.*'simota'"):
        CriterionConfig(o2m='simotta')
    for name in ASSIGNERS:
        CriterionConfig(o2m=name)
