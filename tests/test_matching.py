"Matching against brute force, a slow loop, the specification and recorded outputs of the official code"

import itertools
import json
from pathlib import Path
import pytest
import torch
from semidetr.boxes import box_iou, cxcywh_to_xyxy, generalized_box_iou, normalize_boxes
from semidetr.core import DataError, SemiDETRError
from semidetr.matching.matching import (
    NonFiniteError,
    aligned_metric,
    assign_o2o,
    hungarian,
    hungarian_layers,
    one_to_many,
    pad_targets,
    pair_cost,
    pairwise_overlap,
    select_positives,
    soft_targets,
    stage_of,
)

GOLDEN = json.loads((Path(__file__).parent / 'golden' / 'assign.json').read_text())
A, B = (0.5, 0.5, 0.4, 0.4), (0.54, 0.5, 0.4, 0.4)
PROPOSALS = torch.tensor(
    [[0.50, 0.50, 0.40, 0.40], [0.52, 0.50, 0.40, 0.40], [0.60, 0.50, 0.40, 0.40], [0.20, 0.20, 0.10, 0.10]]
)


def logit(p):
    return torch.special.logit(torch.tensor(p))


def target(boxes, labels, **kw):
    return dict(
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor(labels, dtype=torch.long),
        **kw,
    )


def outputs(scores, boxes=PROPOSALS):
    return dict(pred_logits=logit(scores)[None], pred_boxes=boxes[None])


def random_case(g, sizes, Q=20, C=4, dtype=torch.float32):
    def boxes(*n):
        return torch.cat(
            [torch.rand(*n, 2, generator=g) * 0.5 + 0.25, torch.rand(*n, 2, generator=g) * 0.4 + 0.05], -1
        ).to(dtype)

    out = dict(
        pred_logits=torch.randn(len(sizes), Q, C, generator=g).to(dtype), pred_boxes=boxes(len(sizes), Q)
    )
    return out, [
        dict(labels=torch.randint(0, C, (n,), generator=g), boxes=boxes(n), image_id=f'img{i}')
        for i, n in enumerate(sizes)
    ]


def slow_one_to_many(logits, boxes, labels, gt, k, alpha, beta):
    "The definition in float64, pair by pair: {query: (object, soft target)}"
    if not len(gt):
        return {}
    p, iou = logits.double().sigmoid(), box_iou(cxcywh_to_xyxy(boxes.double()), cxcywh_to_xyxy(gt.double()))
    m = [
        [float(p[j, labels[i]] ** alpha * iou[j, i] ** beta) for i in range(len(gt))]
        for j in range(len(boxes))
    ]
    wants = {}
    for i in range(len(gt)):
        for j in sorted(range(len(boxes)), key=lambda j: -m[j][i])[:k]:
            if m[j][i] > 0:
                wants.setdefault(j, []).append(i)
    owner = {j: max(w, key=lambda i: (float(iou[j, i]), -i)) for j, w in wants.items()}
    out = {}
    for j, i in owner.items():
        group = [j2 for j2, i2 in owner.items() if i2 == i]
        out[j] = i, m[j][i] / (max(m[g][i] for g in group) + 1e-7) * max(float(iou[g, i]) for g in group)
    return out


@pytest.mark.parametrize('case', range(len(GOLDEN)))
def test_recorded_outputs_of_the_official_code(case):
    c = GOLDEN[case]
    gt, labels = (
        normalize_boxes(torch.tensor(c['gt_xyxy_px']).reshape(-1, 4), c['image_hw']),
        torch.tensor(c['gt_labels'], dtype=torch.long),
    )
    logits, boxes = torch.tensor(c['logits']), torch.tensor(c['boxes_cxcywh_norm'])
    out, targets = dict(pred_logits=logits[None], pred_boxes=boxes[None]), [dict(labels=labels, boxes=gt)]

    def scatter(q, value, fill=0):
        return torch.full((len(boxes),), fill, dtype=value.dtype).scatter(0, q, value)

    ((q, t, w),) = one_to_many(out, targets)
    assert scatter(q, t + 1).tolist() == c['o2m']['gt_index_plus1']
    assert scatter(q, labels[t], -1).tolist() == c['o2m']['label']
    m = aligned_metric(logits, boxes, labels, gt)[0]
    torch.testing.assert_close(scatter(q, m[q, t]), torch.tensor(c['o2m']['metric']), atol=1e-6, rtol=0)
    ((q, t),) = hungarian(out, targets)
    assert scatter(q, t + 1).tolist() == c['o2o_gt_index_plus1']
    if len(gt):
        parts = pair_cost(logits, boxes, labels, gt, parts=True)
        for name, x in {**parts, 'total': pair_cost(logits, boxes, labels, gt)}.items():
            torch.testing.assert_close(x, torch.tensor(c['cost_parts_and_total'][name]), atol=1e-5, rtol=0)


def test_stage_rule():  # 34
    assert [stage_of(t, 60_000) for t in (0, 59_999, 60_000, 119_999)] == [
        'o2m',
        'o2m',
        'o2o',
        'o2o',
    ] and stage_of(0, 0) == 'o2o'


def test_metric_positives_and_soft_targets():  # 12, 13, 14
    logits, gt, labels = logit([[0.2], [0.9], [0.9], [0.9]]), torch.tensor([A]), torch.tensor([0])
    m, iou = aligned_metric(logits, PROPOSALS, labels, gt)
    torch.testing.assert_close(iou[:, 0], torch.tensor([1, 0.904762, 0.6, 0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(m[:, 0], torch.tensor([0.2, 0.493683, 0.041990, 0]), atol=1e-6, rtol=0)
    valid = torch.ones(1, dtype=torch.bool)
    assert select_positives(m, iou, valid, 2)[:, 0].tolist() == [True, True, False, False]
    four = select_positives(m, iou, valid, 4)
    assert four[:, 0].tolist() == [True, True, True, False]
    torch.testing.assert_close(
        soft_targets(m, iou, four)[:, 0], torch.tensor([0.405118, 1, 0.085055, 0]), atol=2e-6, rtol=0
    )
    assert select_positives(m, iou, valid, 13).equal(four)  # k may exceed Q


def test_conflict_goes_to_the_largest_overlap():  # 15
    out = outputs([[0.2, 0.1], [0.9, 0.1], [0.9, 0.1], [0.9, 0.1]])
    ((q, t, w),) = one_to_many(out, [target([A, B], [0, 1])], k=4)
    owner = dict(zip(q.tolist(), t.tolist()))
    m, iou = aligned_metric(out['pred_logits'][0], PROPOSALS, torch.tensor([0, 1]), torch.tensor([A, B]))
    assert owner[0] == 0 and owner[2] == 1 and 3 not in owner
    assert iou[2, 1] > iou[2, 0] and m[2, 0] > m[2, 1]  # overlap decides, not the metric
    same = torch.tensor([A, A])
    ((q, t, w),) = one_to_many(out, [dict(boxes=same, labels=torch.tensor([1, 1]))], k=4)
    assert set(t.tolist()) == {0}  # equal overlap: the first object


def test_an_object_that_nothing_overlaps():  # 16, and degenerate boxes
    for far in ((0.9, 0.9, 0.1, 0.1), (0.5, 0.5, 0.0, 0.0)):
        out, t = outputs([[0.5], [0.5], [0.5], [0.5]]), [target([far], [0])]
        assert len(one_to_many(out, t)[0][0]) == 0 and len(hungarian(out, t)[0][0]) == 1


def test_never_more_than_k_positives():  # 17
    g = torch.Generator().manual_seed(0)
    boxes = torch.tensor(A) + 0.02 * torch.randn(900, 4, generator=g)
    out = dict(pred_logits=torch.randn(1, 900, 3, generator=g), pred_boxes=boxes[None])
    assert len(one_to_many(out, [target([A], [1])])[0][0]) == 13
    for k in (1, 5, 13):
        ((q, t, w),) = one_to_many(out, [target([A, B, (0.4, 0.5, 0.3, 0.3)], [1, 0, 2])], k=k)
        assert torch.bincount(t).max() <= k and len(q.unique()) == len(q)


def test_scaling_the_scores_of_a_class_changes_nothing():  # 18
    g = torch.Generator().manual_seed(1)
    out, targets = random_case(g, [3])
    p = out['pred_logits'].sigmoid()
    a = one_to_many(dict(out, pred_logits=logit((p * 0.9).tolist())), targets)[0]
    b = one_to_many(dict(out, pred_logits=logit((p * 0.45).tolist())), targets)[0]
    assert a[0].equal(b[0]) and a[1].equal(b[1])
    torch.testing.assert_close(a[2], b[2], atol=1e-3, rtol=1e-3)  # up to the 1e-7 in the denominator


def test_costs_and_the_assignment():  # 21
    cls = pair_cost(logit([[0.2], [0.9]]), PROPOSALS[:2], torch.tensor([0]), torch.tensor([A]), parts=True)[
        'cls'
    ][:, 0]
    torch.testing.assert_close(cls, torch.tensor([0.50163, -2.79711]), atol=1e-5, rtol=0)
    out, t = outputs([[0.2, 0.1], [0.9, 0.1], [0.9, 0.1]], PROPOSALS[:3]), [target([A, B], [0, 1])]
    cost = pair_cost(out['pred_logits'][0], PROPOSALS[:3], t[0]['labels'], t[0]['boxes'])
    torch.testing.assert_close(
        cost, torch.tensor([[-1.4984, -0.5054], [-4.5066, -0.7786], [-3.4971, -0.2473]]), atol=1e-4, rtol=0
    )
    ((q, i, c),) = hungarian(out, t, with_cost=True)
    assert list(zip(q.tolist(), i.tolist())) == [(0, 1), (1, 0)] and cost[:, 1].argmin() == 1
    assert c.sum().item() == pytest.approx(-5.012, abs=1e-3)


def test_permuting_objects_and_scaling_the_image():  # 22
    g = torch.Generator().manual_seed(2)
    out, (t,) = random_case(g, [5])
    perm = torch.randperm(5, generator=g)
    moved = dict(labels=t['labels'][perm], boxes=t['boxes'][perm])
    for f in (hungarian, one_to_many):
        a, b = f(out, [t])[0], f(out, [moved])[0]
        assert a[0].equal(b[0]) and a[1].equal(perm[b[1]])
    scale = torch.tensor([640.0, 480.0, 640.0, 480.0])
    x, y = (
        pairwise_overlap(out['pred_boxes'][0], t['boxes']),
        pairwise_overlap(out['pred_boxes'][0] * scale, t['boxes'] * scale),
    )
    for u, v in zip(x, y):
        torch.testing.assert_close(u, v, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize('Q,N', [(1, 1), (5, 3), (6, 2), (3, 5), (4, 4), (4, 0)])
def test_hungarian_is_optimal(Q, N):
    g = torch.Generator().manual_seed(10 * Q + N)
    out, targets = random_case(g, [N], Q=Q)
    cost = pair_cost(
        out['pred_logits'][0], out['pred_boxes'][0], targets[0]['labels'], targets[0]['boxes']
    ).double()
    n = min(Q, N)
    best = min(
        sum(float(cost[q, t]) for q, t in zip(qs, ts))
        for qs in itertools.combinations(range(Q), n)
        for ts in itertools.permutations(range(N), n)
    )
    ((q, t, c),) = hungarian(out, targets, with_cost=True)
    assert len(q) == n == len(q.unique()) == len(t.unique())
    assert float(c.double().sum()) == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize('k,alpha,beta', [(1, 1, 6), (4, 1, 6), (13, 1, 6), (50, 0.5, 2)])
def test_one_to_many_is_its_definition(k, alpha, beta):
    g = torch.Generator().manual_seed(k)
    out, targets = random_case(g, [6, 0, 1, 9, 3], dtype=torch.float64)
    for b, (q, t, w) in enumerate(one_to_many(out, targets, k, alpha, beta)):
        slow = slow_one_to_many(
            out['pred_logits'][b],
            out['pred_boxes'][b],
            targets[b]['labels'],
            targets[b]['boxes'],
            k,
            alpha,
            beta,
        )
        assert dict(zip(q.tolist(), t.tolist())) == {j: i for j, (i, _) in slow.items()}
        for j, x in zip(q.tolist(), w.tolist()):
            assert x == pytest.approx(slow[j][1], abs=1e-9)


def test_a_batch_is_its_images_and_layers_do_not_mix():
    g = torch.Generator().manual_seed(4)
    layers = [random_case(g, [3, 0, 7, 1])[0] for _ in range(3)]
    targets = random_case(g, [3, 0, 7, 1])[1]
    together = hungarian_layers(layers, targets)
    for out, found in zip(layers, together):
        for b in range(4):
            one = {k: v[b : b + 1] for k, v in out.items()}
            for x, y in zip(hungarian(one, targets[b : b + 1])[0], found[b]):
                assert x.equal(y)
            for x, y in zip(one_to_many(one, targets[b : b + 1])[0], one_to_many(out, targets)[b]):
                torch.testing.assert_close(x, y)


def test_nothing_to_match():
    g = torch.Generator().manual_seed(5)
    out, targets = random_case(g, [0, 0])
    assert (
        [len(x[0]) for x in hungarian(out, targets)]
        == [len(x[0]) for x in one_to_many(out, targets)]
        == [0, 0]
    )
    empty = {k: v[:, :0] for k, v in out.items()}
    assert (
        len(one_to_many(empty, random_case(g, [2, 1])[1])[0][0])
        == len(hungarian(empty, random_case(g, [2, 1])[1])[0][0])
        == 0
    )


def test_no_gradient_and_float32():
    g = torch.Generator().manual_seed(6)
    out, targets = random_case(g, [2, 3])
    for x in out.values():
        x.requires_grad_()
    half = {k: v.bfloat16() for k, v in out.items()}
    assert (
        pair_cost(
            half['pred_logits'][0], half['pred_boxes'][0], targets[0]['labels'], targets[0]['boxes']
        ).dtype
        == torch.float32
    )
    for q, t, w in one_to_many(half, targets):
        assert w.dtype == torch.float32 and not w.requires_grad
    assert not pair_cost(
        out['pred_logits'],
        out['pred_boxes'],
        *[torch.zeros(2, 1, dtype=torch.long), torch.full((2, 1, 4), 0.5)],
    ).requires_grad
    exact = {k: v.detach().bfloat16().float() for k, v in out.items()}
    for a, b in zip(hungarian(half, targets), hungarian(exact, targets)):
        assert a[0].equal(b[0]) and a[1].equal(b[1])


@pytest.mark.parametrize(
    'key,value,term',
    [
        ('pred_logits', float('nan'), 'pred_logits'),
        ('pred_boxes', float('nan'), 'pred_boxes'),
        ('pred_boxes', float('inf'), 'pred_boxes'),
    ],
)
@pytest.mark.parametrize('match', [hungarian, one_to_many])
def test_non_finite_names_image_and_term(match, key, value, term):
    g = torch.Generator().manual_seed(7)
    out, targets = random_case(g, [2, 3, 0])
    out[key][1] = value
    with pytest.raises(NonFiniteError, match=f'img1.*layer 0.*{term}'):
        match(out, targets)
    assert issubclass(NonFiniteError, SemiDETRError)


def test_non_finite_names_the_layer_and_the_target():
    g = torch.Generator().manual_seed(8)
    layers = [random_case(g, [2, 3])[0] for _ in range(3)]
    targets = random_case(g, [2, 3])[1]
    layers[2]['pred_logits'][0, 3, :] = float('nan')
    with pytest.raises(NonFiniteError, match='img0.*layer 2'):
        hungarian_layers(layers, targets)
    targets[1]['boxes'][0, 0] = float('nan')
    with pytest.raises(NonFiniteError, match='img1.*target boxes'):
        hungarian(layers[0], targets)


def test_label_out_of_range_is_named():
    g = torch.Generator().manual_seed(9)
    out, targets = random_case(g, [2, 3])
    targets[1]['labels'][2] = 4
    for f in (hungarian, one_to_many):
        with pytest.raises(DataError, match=r'img1.*0\.\.3'):
            f(out, targets)


def test_overlap_is_that_of_boxes():
    g = torch.Generator().manual_seed(11)
    out, (t,) = random_case(g, [6])
    iou, giou = pairwise_overlap(out['pred_boxes'][0], t['boxes'])
    a, b = cxcywh_to_xyxy(out['pred_boxes'][0]), cxcywh_to_xyxy(t['boxes'])
    torch.testing.assert_close(iou, box_iou(a, b), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(giou, generalized_box_iou(a, b), atol=1e-6, rtol=1e-5)


def test_cost_is_of_each_image_alone():
    "Padded costs grow with B, not with its square"
    g = torch.Generator().manual_seed(12)
    out, targets = random_case(g, [3, 5])
    m = assign_o2o(out['pred_logits'][None], out['pred_boxes'][None], pad_targets(targets))
    assert m.cost.shape == (8,) and m.image.tolist() == [0] * 3 + [1] * 5
    for b, q, t, c in zip(m.image, m.query, m.target, m.cost):
        one = pair_cost(
            out['pred_logits'][b], out['pred_boxes'][b], targets[b]['labels'], targets[b]['boxes']
        )
        assert c.item() == pytest.approx(one[q, t].item(), abs=1e-6)


def test_large_batches_image_by_image_are_the_same():
    "Above some size costs are made image by image on a CPU: same pairs, same costs"
    torch.manual_seed(0)
    counts = [5, 0, 31, 12]
    logits, boxes = torch.randn(2, 4, 600, 7), torch.rand(2, 4, 600, 4) * 0.5 + 0.1
    targets = [dict(labels=torch.randint(7, (n,)), boxes=torch.rand(n, 4) * 0.5 + 0.1) for n in counts]
    padded = pad_targets(targets)
    assert 4 * 600 * 31 > 2**16  # the whole batch is above the size, its images are below
    whole = assign_o2o(logits, boxes, padded)
    for b in range(4):
        one = assign_o2o(logits[:, b : b + 1], boxes[:, b : b + 1], pad_targets(targets[b : b + 1]))
        mine = whole.image == b
        assert len(one) == 2 * counts[b] and all(
            torch.equal(getattr(whole, f)[mine], getattr(one, f)) for f in ('layer', 'query', 'target')
        )
        assert torch.allclose(whole.cost[mine], one.cost, atol=1e-5)
