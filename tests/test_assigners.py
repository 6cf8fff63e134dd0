"The other one-to-many assignments against their definitions, and where there is nothing to choose from"

import math
import statistics
import pytest
import torch
from semidetr.matching.assigners import (
    ASSIGNERS,
    assign_atss,
    assign_max_iou,
    assign_simota,
    misplaced_background,
)
from semidetr.boxes import box_iou, cxcywh_to_xyxy
from semidetr.matching.matching import Matches, NonFiniteError, assign_o2m, assign_o2o, pad_targets

every = pytest.mark.parametrize('assign', ASSIGNERS.values(), ids=ASSIGNERS)


def case(sizes, Q=20, C=4, layers=2, seed=0, near=True, dtype=torch.float64):
    "Predictions of some layers, half of them around the objects, and targets"
    g = torch.Generator().manual_seed(seed)

    def boxes(*n):
        return torch.cat(
            [torch.rand(*n, 2, generator=g) * 0.5 + 0.25, torch.rand(*n, 2, generator=g) * 0.4 + 0.05], -1
        ).to(dtype)

    targets = [
        dict(labels=torch.randint(0, C, (n,), generator=g), boxes=boxes(n), image_id=f'img{i}')
        for i, n in enumerate(sizes)
    ]
    pred = boxes(layers, len(sizes), Q)
    for b, n in enumerate(sizes if near else []):
        if n:
            pred[:, b, ::2] = (
                targets[b]['boxes'].repeat(Q, 1)[: (Q + 1) // 2]
                + 0.03 * torch.randn(layers, (Q + 1) // 2, 4, generator=g).to(dtype)
            ).clamp(0.02, 0.98)
    return torch.randn(layers, len(sizes), Q, C, generator=g).to(dtype), pred, targets


# --- the definitions, one number at a time ---------------------------------------------
def sig(z):
    return 1 / (1 + math.exp(-z))


def wants_max_iou(z, boxes, u, labels, gt, threshold=0.5):
    "{(query, object): rank among those who want the query}, larger is better"
    out = {}
    for i in range(len(gt)):
        top = max(range(len(boxes)), key=lambda j: u[j][i])
        for j in range(len(boxes)):
            if u[j][i] >= threshold or (j == top and u[j][i] > 0):
                out[j, i] = u[j][i]
    return out


def wants_atss(z, boxes, u, labels, gt, k=9):
    out = {}
    for i, (x, y, w, h) in enumerate(gt):
        near = sorted(range(len(boxes)), key=lambda j: (boxes[j][0] - x) ** 2 + (boxes[j][1] - y) ** 2)[:k]
        values = [u[j][i] for j in near]
        min_iou = sum(values) / len(values) + (statistics.stdev(values) if len(values) > 1 else 0)
        for j in near:
            if (
                u[j][i] > 0
                and u[j][i] >= min_iou
                and abs(boxes[j][0] - x) < w / 2
                and abs(boxes[j][1] - y) < h / 2
            ):
                out[j, i] = u[j][i]
    return out


def wants_simota(z, boxes, u, labels, gt, k=10, w_iou=3.0):
    out = {}
    for i in range(len(gt)):
        cost = {}
        for j in range(len(boxes)):
            if u[j][i] <= 0:
                continue
            bce = sum(-math.log(sig(v) if c == labels[i] else 1 - sig(v)) for c, v in enumerate(z[j]))
            cost[j] = bce - w_iou * math.log(u[j][i])
        number = max(1, int(sum(sorted((u[j][i] for j in range(len(boxes))), reverse=True)[:k])))
        for j in sorted(cost, key=cost.get)[:number]:
            out[j, i] = -cost[j]
    return out


def slow(wants, z, boxes, target, alpha=1.0, beta=6.0, **kw):
    "{query: (object, soft target)} of one image and layer"
    if not len(target['boxes']) or not len(boxes):
        return {}
    u = box_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target['boxes'].to(boxes))).tolist()
    labels, gt = target['labels'].tolist(), target['boxes'].tolist()
    want = wants(z.tolist(), boxes.tolist(), u, labels, gt, **kw)
    owner = {
        j: max((i for q, i in want if q == j), key=lambda i: (want[j, i], -i)) for j in {q for q, _ in want}
    }
    m = {j: sig(float(z[j, labels[i]])) ** alpha * u[j][i] ** beta for j, i in owner.items()}
    peak = {
        i: (max(m[j] for j in owner if owner[j] == i), max(u[j][i] for j in owner if owner[j] == i))
        for i in owner.values()
    }
    return {j: (i, m[j] / (peak[i][0] + 1e-7) * peak[i][1]) for j, i in owner.items()}


def check(assign, wants, logits, boxes, targets, labels=None, **kw):
    found = assign(logits, boxes, pad_targets(targets), labels, **kw)
    got = {}
    for layer, b, q, t, w in zip(
        *(getattr(found, f).tolist() for f in ('layer', 'image', 'query', 'target', 'weight'))
    ):
        assert got.setdefault((layer, b), {}).setdefault(q, (t, w)) == (t, w)  # one object a query
    for layer in range(len(boxes)):
        for b, target in enumerate(targets):
            want = slow(wants, logits[layer, b], boxes[layer, b], target, **kw)
            have = got.get((layer, b), {})
            assert {j: i for j, (i, _) in have.items()} == {j: i for j, (i, _) in want.items()}, (layer, b)
            for j in want:
                assert have[j][1] == pytest.approx(want[j][1], abs=1e-9)
    return found


PAIRS = dict(
    max_iou=(assign_max_iou, wants_max_iou, [{}, dict(threshold=0.3)]),
    atss=(assign_atss, wants_atss, [{}, dict(k=3), dict(k=1), dict(k=50)]),
    simota=(
        assign_simota,
        wants_simota,
        [{}, dict(k=3), dict(w_iou=0.5), dict(k=50), dict(alpha=0.5, beta=2.0)],
    ),
)


@pytest.mark.parametrize('name', PAIRS)
def test_against_the_definition(name):
    assign, wants, options = PAIRS[name]
    total = 0
    for kw in options:
        for sizes, Q, near, seed in (
            ((6, 0, 1, 9), 20, True, 0),
            ((3, 2), 20, False, 1),
            ((7, 9), 4, True, 2),
            ((2,), 1, True, 3),
            ((4, 1), 60, True, 4),
        ):
            total += len(check(assign, wants, *case(sizes, Q, near=near, seed=seed), **kw))
    assert total > 60 * len(options)  # not compared on empty air


@every
def test_names(assign):
    assert set(ASSIGNERS) == set(PAIRS)


@every
def test_nothing_to_choose_from(assign):
    for sizes, Q in (((0, 0), 5), ((2, 0), 0), ((3,), 1)):
        logits, boxes, targets = case(sizes, Q)
        found = assign(logits, boxes, pad_targets(targets))
        assert isinstance(found, Matches) and len(found) <= Q * 2 and found.weight.shape == found.query.shape
    logits, boxes, _ = case((1,))
    for far in (
        (0.99, 0.99, 0.01, 0.01),
        (0.5, 0.5, 0.0, 0.0),
    ):  # an object that nothing overlaps; one without an area
        assert (
            len(
                assign(
                    logits,
                    boxes * torch.tensor([0.3, 0.3, 0.1, 0.1]),
                    pad_targets([dict(labels=torch.tensor([0]), boxes=torch.tensor([far]))]),
                )
            )
            == 0
        )


@every
def test_layers_images_and_padding_do_not_mix(assign):
    logits, boxes, targets = case((3, 0, 7, 1), layers=3)
    together = assign(logits, boxes, pad_targets(targets))
    n = 0
    for layer in range(3):
        for b in range(4):
            one = assign(
                logits[layer : layer + 1, b : b + 1],
                boxes[layer : layer + 1, b : b + 1],
                pad_targets(targets[b : b + 1]),
            )
            here = (together.layer == layer) & (together.image == b)
            assert one.query.equal(together.query[here]) and one.target.equal(together.target[here])
            torch.testing.assert_close(one.weight, together.weight[here])
            n += len(one)
    assert n == len(together) > 0


@every
def test_labels_can_be_given(assign):
    logits, boxes, targets = case((3, 2))
    zeros = torch.zeros(2, 2, 3, dtype=torch.long)
    a = assign(logits, boxes, pad_targets(targets), zeros)
    b = assign(logits, boxes, pad_targets([dict(t, labels=torch.zeros_like(t['labels'])) for t in targets]))
    assert a.query.equal(b.query) and a.weight.equal(b.weight)


@every
def test_permuting_the_objects(assign):
    logits, boxes, (t,) = case((6,))
    perm = torch.tensor([3, 0, 5, 1, 4, 2])
    a, b = (
        assign(logits, boxes, pad_targets([t])),
        assign(logits, boxes, pad_targets([{k: v[perm] if k != 'image_id' else v for k, v in t.items()}])),
    )
    assert a.query.equal(b.query) and a.target.equal(perm[b.target])


@every
def test_no_gradient_and_half_precision(assign):
    logits, boxes, targets = case((2, 3), dtype=torch.float32)
    for x in (logits, boxes):
        x.requires_grad_()
    half = assign(logits.bfloat16(), boxes.bfloat16(), pad_targets(targets))
    exact = assign(logits.bfloat16().float(), boxes.bfloat16().float(), pad_targets(targets))
    assert half.weight.dtype == torch.float32 and not half.weight.requires_grad
    assert half.query.equal(exact.query) and half.target.equal(exact.target)


@every
def test_broken_predictions_are_named(assign):
    for i, term in enumerate(('pred_logits', 'pred_boxes')):
        x = list(case((2, 3)))
        x[i][1, 1] = float('nan')
        with pytest.raises(NonFiniteError, match=f'img1.*layer 1.*{term}'):
            assign(*x[:2], pad_targets(x[2]))


def row(*boxes):
    return torch.tensor(boxes)[None, None]


A = (0.5, 0.5, 0.4, 0.4)


def test_max_iou_by_hand():
    near = row(
        (0.5, 0.5, 0.4, 0.4), (0.52, 0.5, 0.4, 0.4), (0.6, 0.5, 0.4, 0.4), (0.7, 0.5, 0.4, 0.4)
    )  # IoU 1, .905, .6, .333
    one = pad_targets([dict(labels=torch.tensor([0]), boxes=torch.tensor([A]))])
    z = torch.zeros(1, 1, 4, 1)
    assert assign_max_iou(z, near, one).query.tolist() == [0, 1, 2]
    assert assign_max_iou(z, near, one, threshold=0.3).query.tolist() == [0, 1, 2, 3]
    assert assign_max_iou(z[:, :, 3:], near[:, :, 3:], one).query.tolist() == [0]  # the best, however bad


def test_simota_by_hand():
    near = row(
        (0.5, 0.5, 0.4, 0.4), (0.52, 0.5, 0.4, 0.4), (0.6, 0.5, 0.4, 0.4), (0.7, 0.5, 0.4, 0.4)
    )  # overlaps sum to 2.84: two positives
    one = pad_targets([dict(labels=torch.tensor([0]), boxes=torch.tensor([A]))])
    assert assign_simota(torch.zeros(1, 1, 4, 1), near, one).query.tolist() == [0, 1]
    assert assign_simota(torch.tensor([-9.0, 0, 9, 0])[None, None, :, None], near, one).query.tolist() == [
        1,
        2,
    ]  # the class speaks too
    two = pad_targets([dict(labels=torch.tensor([0, 1]), boxes=torch.tensor([A, A]))])
    z = torch.tensor([[-3.0, 3.0]] * 4)[None, None]  # class 1 is cheaper although the overlap is the same
    assert set(assign_simota(z, near, two).target.tolist()) == {1}


# --- background that fits better -------------------------------------------------------
def slow_misplaced(m, boxes, truth):
    lost, weight = [], []
    for layer in range(boxes.shape[0]):
        for b, n in enumerate(truth.counts):
            here = [
                (q, t, w)
                for l, i, q, t, w in zip(
                    *(getattr(m, f).tolist() for f in ('layer', 'image', 'query', 'target', 'weight'))
                )
                if (l, i) == (layer, b)
            ]
            taken = {q for q, _, _ in here}
            for i in range(n):
                own = [(q, w) for q, t, w in here if t == i]
                if not own:
                    continue
                u = box_iou(cxcywh_to_xyxy(boxes[layer, b]), cxcywh_to_xyxy(truth.boxes[b, i : i + 1]))[
                    :, 0
                ].tolist()
                best = max([u[j] for j in range(len(u)) if j not in taken], default=-1)
                lost.append(best > max(u[q] for q, _ in own))
                weight.append(sum(w for q, w in own if u[q] < best) / max(1e-12, sum(w for _, w in own)))
    return len(lost), sum(lost) / max(1, len(lost)), sum(weight) / max(1, len(weight))


@pytest.mark.parametrize(
    'assign', [*ASSIGNERS.values(), assign_o2m, assign_o2o], ids=[*ASSIGNERS, 'o2m', 'o2o']
)
def test_misplaced_background(assign):
    logits, boxes, targets = case((4, 0, 2), Q=30)
    truth = pad_targets([dict(t, boxes=t['boxes'] + 0.02) for t in targets])
    m = assign(logits, boxes, pad_targets(targets))
    got, (n, lost, weight) = misplaced_background(m, boxes, truth), slow_misplaced(m, boxes, truth)
    assert (
        got['objects'] == n > 0
        and got['lost'] == pytest.approx(lost)
        and got['weight'] == pytest.approx(weight)
    )
    if assign is assign_o2o:
        assert got['lost'] == pytest.approx(got['weight'])  # a single positive


def test_misplaced_background_by_hand():
    pred = row((0.5, 0.5, 0.4, 0.4), (0.52, 0.5, 0.4, 0.4), (0.6, 0.5, 0.4, 0.4))
    truth, pseudo = (
        pad_targets([dict(labels=torch.tensor([0]), boxes=torch.tensor([b]))])
        for b in (A, (0.62, 0.5, 0.4, 0.4))
    )
    z = torch.zeros(1, 1, 3, 1)
    assert misplaced_background(assign_o2o(z, pred, truth), pred, truth) == dict(
        lost=0.0, weight=0.0, objects=1
    )
    assert misplaced_background(assign_o2o(z, pred, pseudo), pred, truth) == dict(
        lost=1.0, weight=1.0, objects=1
    )  # the shifted box takes the third
    two = assign_o2m(z, pred, pseudo, k=2)  # the second and the third; the first is background
    got = misplaced_background(two, pred, truth)
    assert two.query.tolist() == [1, 2] and got['lost'] == 1 and got['weight'] == 1
    assert misplaced_background(assign_o2m(z, pred, pseudo, k=3), pred, truth) == dict(
        lost=0.0, weight=0.0, objects=1
    )


def test_misplaced_background_of_nothing():
    logits, boxes, targets = case((0, 0))
    got = misplaced_background(assign_o2o(logits, boxes, pad_targets(targets)), boxes, pad_targets(targets))
    assert got['objects'] == 0 and math.isnan(got['lost']) and math.isnan(got['weight'])
