"Averaging, pseudo labels, transport: spec items 25, 33, 36, 39"

import math
import pytest
import torch
from torch import nn
from semidetr.matching.matching import NonFiniteError
from semidetr.semi.teacher import (
    EmaConfig,
    ema_decay,
    fixed_threshold,
    in_both_views,
    keep_boxes,
    make_teacher,
    PseudoConfig,
    teacher_detections,
    transport,
    update_teacher,
)


@pytest.mark.parametrize(
    't,m', [(0, 0.0), (1, 0.5), (9, 0.9), (998, 0.998999), (999, 0.999), (100_000, 0.999)]
)
def test_decay_values(t, m):
    assert abs(ema_decay(t) - m) < 1e-6


def test_decay_of_a_teacher_that_was_trained_before():
    "No ramp by itself; `start` is the number of updates that the first teacher stands for, 0 the whole ramp"
    assert [ema_decay(t, EmaConfig(0.99), True) for t in (0, 5, 500)] == [0.99] * 3
    assert (
        [ema_decay(t, EmaConfig(0.99, start=0), True) for t in (0, 1, 9, 500)]
        == [ema_decay(t, EmaConfig(0.99)) for t in (0, 1, 9, 500)]
        == [0, 0.5, 0.9, 0.99]
    )
    assert [ema_decay(t, EmaConfig(0.99, start=9), known) for known in (True, False) for t in (0, 1)] == [
        0.9,
        1 - 1 / 11,
    ] * 2


def test_decay_warmup_follows_longer():
    assert ema_decay(10, EmaConfig(warmup=9)) == pytest.approx(0.5)


def test_mean_of_students_until_999():
    torch.manual_seed(0)
    student = nn.Linear(3, 2)
    teacher = make_teacher(student)
    total = torch.zeros(2, 3, dtype=torch.float64)
    worst = 0
    for t in range(999):
        with torch.no_grad():
            student.weight.copy_(torch.randn(2, 3))
        total += student.weight.double()
        update_teacher(teacher, student, ema_decay(t))
        worst = max(worst, float((teacher.weight.double() - total / (t + 1)).abs().max()))
    assert worst < 1e-5


def test_teacher_is_frozen_and_buffers_follow():
    student = nn.BatchNorm1d(2)
    teacher = make_teacher(student)
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training
    student(torch.randn(8, 2))
    update_teacher(teacher, student, 0.9)
    assert torch.equal(teacher.running_mean, student.running_mean)


def outputs(boxes, logits):
    return dict(pred_boxes=torch.tensor([boxes]), pred_logits=torch.tensor([logits]))


def test_suppression_is_per_class():
    near = [[0.5, 0.5, 0.4, 0.4], [0.505, 0.5, 0.4, 0.4]]
    same = teacher_detections(outputs(near, [[3.0, -9.0], [2.0, -9.0]]), [dict(size=(100, 100))])
    other = teacher_detections(outputs(near, [[3.0, -9.0], [-9.0, 2.0]]), [dict(size=(100, 100))])
    assert [len(d['boxes']) for d in same + other] == [1, 2]


@pytest.mark.parametrize('iou,kept', [(1.0, [1, 0]), (0.99, [1, 0]), (0.6, [1])])
def test_one_box_per_place(iou, kept):
    "Boxes of two classes with an IoU of .975: the higher score stays where `cross_nms` is below that"
    near = [[0.5, 0.5, 0.4, 0.4], [0.505, 0.5, 0.4, 0.4]]
    found = teacher_detections(
        outputs(near, [[2.0, -9.0], [-9.0, 3.0]]), [dict(size=(100, 100))], PseudoConfig(cross_nms=iou)
    )[0]
    assert (
        found['labels'].tolist() == kept
        and found['scores'].tolist() == sorted(found['scores'].tolist(), reverse=True)
        and len(found['boxes']) == len(kept)
    )


def test_one_box_per_place_of_nothing():
    assert (
        len(
            teacher_detections(
                outputs([[0.5, 0.5, 0.4, 0.4]], [[-9.0, -9.0]]),
                [dict(size=(100, 100))],
                PseudoConfig(cross_nms=0.5),
            )[0]['boxes']
        )
        == 0
    )


def view(m, size=(100, 100)):
    return dict(matrix=torch.tensor(m, dtype=torch.float64), size=size, image_id=0)


EYE = [[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize(
    'm,want',
    [
        ([[-1.0, 0, 100], [0, 1, 0], [0, 0, 1]], [70, 20, 90, 40]),
        ([[0.0, -1, 100], [1, 0, 0], [0, 0, 1]], [60, 10, 80, 30]),
    ],
)
def test_transport_values(m, want):
    det = [
        dict(boxes=torch.tensor([[10.0, 20, 30, 40]]), labels=torch.tensor([1]), scores=torch.tensor([0.5]))
    ]
    t = transport(det, [view(EYE)], [view(m)])[0]
    cx, cy, w, h = (t['boxes'][0] * 100).tolist()
    assert [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2] == pytest.approx(want, abs=1e-4) and t[
        'source'
    ].tolist() == [0]


def test_transport_drops_what_left_and_keeps_order():
    det = [
        dict(
            boxes=torch.tensor([[60.0, 20, 90, 40], [0, 0, 20, 20]]),
            labels=torch.tensor([1, 2]),
            scores=torch.tensor([0.5, 0.6]),
        )
    ]
    t = transport(det, [view(EYE)], [view([[1.0, 0, 50], [0, 1, 0], [0, 0, 1]])])[0]
    assert t['labels'].tolist() == [2] and t['source'].tolist() == [1]
    empty = [dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long), scores=torch.zeros(0))]
    assert transport(empty, [view(EYE)], [view(EYE)])[0]['boxes'].shape == (0, 4)


def test_keep_boxes_and_threshold():
    d = [dict(boxes=torch.zeros(3, 4), scores=torch.tensor([0.5, 0.4, 0.39]))]
    assert keep_boxes(d, [fixed_threshold(d[0]['scores'])])[0]['scores'].tolist() == pytest.approx([0.5, 0.4])


def test_keep_boxes_leaves_the_rest_of_a_target():
    "What belongs to boxes is selected, also where another entry happens to have as many rows"
    t = view(EYE) | dict(
        boxes=torch.rand(3, 4), labels=torch.arange(3), scores=torch.rand(3), source=torch.tensor([0, 4, 5])
    )
    (kept,) = keep_boxes([t], [torch.tensor([True, False, True])])
    assert kept['labels'].tolist() == [0, 2] and kept['source'].tolist() == [0, 5]
    assert kept['matrix'] is t['matrix'] and kept['size'] is t['size'] and len(t['boxes']) == 3


def test_boxes_in_both_views():
    "Rows that `transport` has dropped go; the others know their place in the strong view"
    det = [
        dict(
            boxes=torch.tensor([[60.0, 20, 90, 40], [0, 0, 20, 20]]),
            labels=torch.tensor([1, 2]),
            scores=torch.tensor([0.5, 0.6]),
        )
    ]
    moved = transport(det, [view(EYE)], [view([[1.0, 0, 50], [0, 1, 0], [0, 0, 1]])])
    (both,) = in_both_views(det, moved)
    assert both['labels'].tolist() == [2] and both['boxes'].tolist() == [[0, 0, 20, 20]]
    assert both['boxes_strong'].equal(moved[0]['boxes']) and set(det[0]) == {'boxes', 'labels', 'scores'}


def test_outputs_that_are_not_finite_are_an_error():
    "Of the teacher; not an image without pseudo labels"
    outputs = dict(pred_logits=torch.zeros(3, 4, 2), pred_boxes=torch.rand(3, 4, 4))
    targets = [dict(size=(9, 9), image_id=f'{k}.jpg') for k in range(3)]
    assert len(teacher_detections(outputs, targets)) == 3
    for name, value in (('pred_logits', math.nan), ('pred_boxes', math.inf)):
        bad = outputs | {name: outputs[name].clone()}
        bad[name][1, 3, 0] = value
        with pytest.raises(NonFiniteError, match=r'image 1.jpg \(number 1 of the batch\)'):
            teacher_detections(bad, targets)
