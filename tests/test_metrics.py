"Average precision against values computed by hand, and what happens at the borders"

import math
from types import SimpleNamespace
import numpy as np
import pytest
import torch
from semidetr.core import DataError
from semidetr.train.metrics import (
    average_precision,
    evaluate,
    match_detections,
    precision_recall,
    pseudo_quality,
    voc_ap50,
)


def dataset(truth, classes=('cat', 'dog')):
    "truth: {image_id: [(label, x1, y1, x2, y2[, ignore])]}"
    anns = [
        dict(
            id=0,
            image_id=i,
            category_id=r[0] + 1,
            bbox=[r[1], r[2], r[3] - r[1], r[4] - r[2]],
            iscrowd=int(len(r) > 5 and r[5]),
        )
        for i, rows in truth.items()
        for r in rows
    ]
    coco = dict(
        images=[dict(id=i, width=200, height=200) for i in truth],
        categories=[dict(id=c + 1, name=n) for c, n in enumerate(classes)],
        annotations=anns,
    )
    return SimpleNamespace(name='toy', classes=list(classes), ids=list(truth), coco_dict=lambda: coco)


def det(*rows):
    "rows: (score, label, x1, y1, x2, y2)"
    t = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return dict(scores=t[:, 0], labels=t[:, 1].long(), boxes=t[:, 2:])


BOX, BOX2, FAR = (0, 0, 10, 10), (50, 50, 60, 60), (100, 100, 110, 110)


def APPROX(x):
    return pytest.approx(x, abs=1e-9)


def same(out, value, *keys):
    return [out[k] for k in keys] == [APPROX(value)] * len(keys)


def test_average_precision_by_hand():
    # hit, miss, hit, miss, hit of 4 objects: precision 1, 1/2, 2/3, 2/4, 3/5, raised to 1, 2/3, 2/3, 3/5,
    # 3/5; each hit is a step of 1/4 in recall
    r, p = precision_recall([0.9, 0.8, 0.7, 0.6, 0.5], [1, 0, 1, 0, 1], 4)
    assert p.tolist() == [1, 1 / 2, 2 / 3, 2 / 4, 3 / 5] and r.tolist() == [0.25, 0.25, 0.5, 0.5, 0.75]
    assert average_precision(r, p) == APPROX((1 + 2 / 3 + 3 / 5) / 4)
    shuffled = precision_recall([0.5, 0.7, 0.9, 0.6, 0.8], [1, 1, 1, 0, 0], 4)
    assert np.array_equal(shuffled, (r, p))
    assert average_precision(*precision_recall([], [], 4)) == 0
    assert average_precision(*precision_recall([0.3], [0], 4)) == 0
    r, p = precision_recall([0.9, 0.8, 0.7], [1, -1, 1], 2)  # what is ignored does not count
    assert p.tolist() == [1, 1] and average_precision(r, p) == 1


def test_matching_rule():
    def matched(*args):
        return match_detections(*args).tolist()

    assert matched([BOX, BOX, BOX2], [BOX, BOX2]) == [1, 0, 1]  # a second detection is a false positive
    assert matched([BOX, BOX], [BOX], [True]) == [-1, -1]
    assert matched([BOX], np.zeros((0, 4))) == [0]
    assert matched([], [BOX]) == []
    assert matched([(0, 0, 10, 5)], [BOX]) == [1]  # .5 is enough
    assert matched([(0, 0, 10, 4.99)], [BOX]) == [0]


def test_perfect():
    ds = dataset({1: [(0, *BOX), (1, *BOX2)], 2: [(0, *FAR)]})
    out = evaluate(ds, {1: det((0.9, 0, *BOX), (0.8, 1, *BOX2)), 2: det((0.7, 0, *FAR))})
    assert same(out, 100, 'AP', 'AP50', 'AP75', 'APs', 'AR100', 'voc_AP50')
    assert math.isnan(out['APm']) and math.isnan(out['APl'])  # no object of that size
    assert list(out['per_class']) == ['cat', 'dog']
    assert all(same(m, 100, 'AP', 'AP50') for m in out['per_class'].values())


def test_by_hand_coco_and_voc():
    # one class, 2 objects: hit, false positive, hit -> precision 1, 1/2, 2/3
    # all points: .5*1 + .5*2/3; 101 points: 51 at 1 (recall 0...0.50), 50 at 2/3
    ds = dataset({'a': [(0, *BOX)], 'b': [(0, *BOX2)]}, ['cell'])
    d = {'a': det((0.9, 0, *BOX), (0.8, 0, *FAR)), 'b': det((0.7, 0, *BOX2))}
    out = evaluate(ds, d)
    assert same(out, 100 * (51 + 50 * 2 / 3) / 101, 'AP50', 'AP75')
    assert out['voc_AP50'] == APPROX(100 * (0.5 + 0.5 * 2 / 3)) and out['AR100'] == APPROX(100)


def test_overlap_thresholds():
    # a detection with IoU .7 is a hit at .5, .55, .6, .65, .7: 5 of 10 thresholds
    ds = dataset({1: [(0, 0, 0, 100, 100)]}, ['x'])
    out = evaluate(ds, {1: det((0.9, 0, 0, 0, 100, 70))})
    assert same(out, 50, 'AP', 'APl') and same(out, 100, 'AP50', 'voc_AP50')
    assert out['AP75'] == 0


def test_classes_without_objects_do_not_count():
    ds = dataset({1: [(0, *BOX)]}, ['cat', 'dog', 'owl'])
    out = evaluate(ds, {1: det((0.9, 0, *BOX), (0.9, 1, *BOX))})
    assert same(out, 100, 'AP', 'voc_AP50')
    assert math.isnan(out['per_class']['dog']['AP']) and math.isnan(out['per_class']['owl']['AP50'])
    mean, per_class = voc_ap50(ds, {1: det((0.9, 0, *BOX))}, per_class=True)
    assert mean == APPROX(100) and math.isnan(per_class['dog'])


def test_one_class_missed_halves_the_mean():
    ds = dataset({1: [(0, *BOX), (1, *BOX2)]})
    out = evaluate(ds, {1: det((0.9, 0, *BOX), (0.8, 0, *BOX2))})
    assert same(out, 50, 'AP', 'AP50', 'voc_AP50') and out['per_class']['dog']['AP'] == 0


def test_nothing_detected_and_nothing_there():
    ds = dataset({1: [(0, *BOX)], 2: []})
    for d in ({}, {1: det(), 2: det()}):
        out = evaluate(ds, d)
        assert out['AP'] == out['AP50'] == out['AR100'] == out['voc_AP50'] == 0
        assert out['per_class']['cat']['AP'] == 0 and math.isnan(out['per_class']['dog']['AP'])
    for none in (dataset({1: [], 2: []}), dataset({})):
        out = evaluate(none, {} if not none.ids else {1: det((0.9, 0, *BOX))})
        assert all(math.isnan(out[k]) for k in ('AP', 'AP50', 'AP75', 'APs', 'AR100', 'voc_AP50'))


def test_ignored_objects_are_neither_hit_nor_miss():
    ds = dataset({1: [(0, *BOX), (0, *BOX2, True)]}, ['cat'])
    for d in (
        det((0.9, 0, *BOX)),
        det((0.9, 0, *BOX), (0.95, 0, *BOX2)),
        det((0.9, 0, *BOX), (0.95, 0, *BOX2), (0.99, 0, *BOX2)),
    ):
        out = evaluate(ds, {1: d})
        assert same(out, 100, 'AP', 'voc_AP50')
    assert evaluate(ds, {1: det((0.9, 0, *BOX), (0.95, 0, *FAR))})['AP50'] == APPROX(50)
    only = dataset({1: [(0, *BOX, True)]}, ['cat'])
    assert math.isnan(evaluate(only, {1: det((0.9, 0, *BOX))})['AP'])
    assert math.isnan(voc_ap50(only, {}))


def test_ids_of_any_kind_and_order():
    truth = {'img_b': [(0, *BOX)], 'img_a': [(1, *BOX2)], '7': [(0, *FAR)]}
    d = {'7': det((0.3, 0, *FAR)), 'img_a': det((0.8, 1, *BOX2)), 'img_b': det((0.9, 0, *BOX))}
    assert evaluate(dataset(truth), d)['AP'] == APPROX(100)
    ints = {0: [(0, *BOX)], 10**12: [(0, *BOX2)]}  # id 0 and ids beyond 32 bits
    d = {0: det((0.5, 0, *BOX)), 10**12: det((0.4, 0, *BOX2))}
    assert evaluate(dataset(ints), d)['AP'] == APPROX(100)


def test_first_annotation_counts():
    "pycocotools reads annotation id 0 as unmatched; every id of the toy set is 0"
    assert evaluate(dataset({1: [(0, *BOX)]}, ['cat']), {1: det((0.5, 0, *BOX))})['AR100'] == APPROX(100)


def test_at_most_100_detections():
    ds = dataset({1: [(0, *BOX)]}, ['cat'])
    flood = det(*[(0.9, 0, *FAR)] * 100, (0.5, 0, *BOX))
    out = evaluate(ds, {1: flood})
    assert out['AP'] == 0 and out['voc_AP50'] == APPROX(100 / 101)  # VOC counts them all


def test_the_better_score_takes_the_object():
    "In any order of the detections, the best is the hit and its duplicate the false positive"
    ds = dataset({1: [(0, *BOX), (0, *BOX2)]}, ['cat'])
    rows = (0.3, 0, *BOX), (0.9, 0, *BOX), (0.5, 0, *BOX2), (0.8, 0, *BOX2)
    assert same(evaluate(ds, {1: det(*rows)}), 100, 'AP', 'voc_AP50')
    assert voc_ap50(ds, {1: det(*rows[::-1])}) == APPROX(100)


def test_silent(capsys):
    evaluate(dataset({1: [(0, *BOX)]}), {1: det((0.5, 0, *BOX))})
    got = capsys.readouterr()
    assert not got.out and not got.err


def test_agreement_on_random_scenes():
    """VOC (all points) and COCO AP50 (101 points) differ by less than a step of recall.

    No detection overlaps two objects, so both rules match alike.
    """
    g = np.random.default_rng(0)
    truth, d = {}, {}
    for i in range(12):
        cells = g.permutation(16)[:6]
        boxes = [(40 * (c % 4), 40 * (c // 4), 40 * (c % 4) + 30, 40 * (c // 4) + 30) for c in cells]
        truth[i] = [(int(g.integers(2)), *b) for b in boxes]
        rows = []
        for label, *box in truth[i]:
            if g.random() < 0.8:
                score = g.random()
                label = int(g.integers(2)) if g.random() < 0.3 else label
                rows.append((score, label, *(np.array(box) + g.integers(-5, 6, 4))))
        d[i] = det(*rows)
    out = evaluate(dataset(truth), d)
    assert 20 < out['AP50'] < 90 and abs(out['AP50'] - out['voc_AP50']) < 2
    assert evaluate(dataset(truth), d, brief=True) == {k: out[k] for k in ('AP', 'AP50')}


def test_bad_detections_are_named():
    ds = dataset({1: [(0, *BOX)]})
    for d, words in (
        ({2: det((0.9, 0, *BOX))}, 'image 2'),
        ({1: det((0.9, 2, *BOX))}, r'0\.\.1'),
        ({1: det((float('nan'), 0, *BOX))}, 'image 1.*NaN'),
        ({1: dict(det((0.9, 0, *BOX)), scores=torch.zeros(2))}, '2 scores'),
    ):
        with pytest.raises(DataError, match=words):
            evaluate(ds, d)


def test_pseudo_quality():
    t = torch.tensor
    gt = t([BOX, BOX2, FAR], dtype=torch.float32)
    labels = t([0, 1, 0])
    assert pseudo_quality(gt, labels, gt, labels) == (3, 3, 3)
    assert pseudo_quality(gt, t([1, 1, 0]), gt, labels) == (2, 3, 3)  # class must agree
    assert pseudo_quality(gt[[0, 0]], t([0, 0]), gt, labels) == (1, 2, 3)  # an object counts once
    empty, none = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    assert pseudo_quality(empty, none, gt, labels) == (0, 0, 3)
    assert pseudo_quality(gt, labels, empty, none) == (0, 3, 0)
    assert pseudo_quality(empty, none, empty, none) == (0, 0, 0)
    shifted = gt + t([0.0, 0, -6, 0])
    assert pseudo_quality(shifted, labels, gt, labels)[0] == 0
    assert pseudo_quality(shifted, labels, gt, labels, iou=0.4)[0] == 3
