"Boxes: formats, overlap against counted pixels, and transport between views (acceptance item 36)"

import math
import pytest, torch, torchvision
from semidetr.boxes import (
    box_iou,
    cxcywh_to_xyxy,
    denormalize_boxes,
    generalized_box_iou,
    inverse_sigmoid,
    normalize_boxes,
    transform_boxes,
    xyxy_to_cxcywh,
)

NAN = float('nan')
EMPTY = torch.zeros(0, 4)


def random_boxes(n, side=100.0, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    lo, hi = torch.rand(2, n, 2, generator=g, dtype=dtype) * side
    return torch.cat([torch.minimum(lo, hi), torch.maximum(lo, hi) + 0.5], 1)


def mat(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def flip(w):
    return mat([-1, 0, w], [0, 1, 0], [0, 0, 1])


def scale(sx, sy):
    return mat([sx, 0, 0], [0, sy, 0], [0, 0, 1])


def shift(dx, dy):
    return mat([1, 0, dx], [0, 1, dy], [0, 0, 1])


def rotate(deg, cx, cy):
    a = math.radians(deg)
    return (
        shift(cx, cy)
        @ mat([math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0], [0, 0, 1])
        @ shift(-cx, -cy)
    )


def shear(fx, fy):
    return mat([1, fx, 0], [0, 1, 0], [0, 0, 1]) @ mat([1, 0, 0], [fy, 1, 0], [0, 0, 1])


# --- formats ---------------------------------------------------------------------------
def test_formats_by_hand():
    assert xyxy_to_cxcywh(torch.tensor([10.0, 20, 30, 60])).tolist() == [20, 40, 20, 40]
    b = normalize_boxes(torch.tensor([[10.0, 20, 30, 60]]), (100, 200))  # (H, W)
    assert torch.allclose(b, torch.tensor([[0.1, 0.4, 0.1, 0.4]]))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('size', [(100, 100), (480, 1333), torch.Size((37, 5)), torch.tensor([640, 427])])
def test_format_round_trips(dtype, size):
    x = random_boxes(50, dtype=dtype)
    assert torch.allclose(cxcywh_to_xyxy(xyxy_to_cxcywh(x)), x, atol=1e-4)
    y = denormalize_boxes(normalize_boxes(x, size), size)
    assert torch.allclose(y, x, atol=1e-4) and y.dtype == dtype
    assert torch.allclose(
        normalize_boxes(torch.tensor([[0.0, 0, int(size[1]), int(size[0])]]), size),
        torch.tensor([[0.5, 0.5, 1, 1]]),
    )


def test_formats_keep_leading_axes_and_gradient():
    x = torch.rand(6, 2, 5, 4, requires_grad=True)
    assert cxcywh_to_xyxy(x).shape == x.shape and cxcywh_to_xyxy(x).requires_grad


def test_inverse_sigmoid():
    x = torch.linspace(0.001, 0.999, 99)
    assert torch.allclose(inverse_sigmoid(x).sigmoid(), x, atol=1e-6) and torch.allclose(
        inverse_sigmoid(x), torch.logit(x), atol=1e-5
    )
    edge = inverse_sigmoid(torch.tensor([-3.0, 0.0, 1.0, 7.0]))
    assert torch.allclose(edge, torch.tensor([-1.0, -1, 1, 1]) * math.log(1e5), atol=1e-3)
    assert inverse_sigmoid(torch.tensor(NAN)).isnan()
    e = torch.tensor([0.0, 1.0], requires_grad=True)
    inverse_sigmoid(e).sum().backward()
    assert e.grad.isfinite().all()
    assert inverse_sigmoid(EMPTY).shape == (0, 4)


# --- overlap ---------------------------------------------------------------------------
def counted(a, b):
    "IoU and GIoU of integer boxes by counting unit squares"

    def cells(r):
        return {(x, y) for x in range(r[0], r[2]) for y in range(r[1], r[3])}

    p, q = cells(a), cells(b)
    hull = max(0, max(a[2], b[2]) - min(a[0], b[0])) * max(0, max(a[3], b[3]) - min(a[1], b[1]))
    iou = len(p & q) / len(p | q) if p | q else 0.0
    return iou, iou - ((hull - len(p | q)) / hull if hull else 0.0)


def test_overlap_against_counted_pixels():
    g = torch.Generator().manual_seed(1)
    lo = torch.randint(0, 8, (40, 2), generator=g)
    a = torch.cat([lo, lo + torch.randint(0, 6, (40, 2), generator=g)], 1)  # some are empty
    iou, giou = box_iou(a.float(), a.float()), generalized_box_iou(a.float(), a.float())
    for i in range(40):
        for j in range(40):
            want = counted(a[i].tolist(), a[j].tolist())
            assert iou[i, j].item() == pytest.approx(want[0], abs=1e-6) and giou[
                i, j
            ].item() == pytest.approx(want[1], abs=1e-6), (a[i], a[j])
    assert (
        torch.allclose(box_iou(a, a), iou) and box_iou(a, a).dtype == torch.float32
    )  # whole numbers are welcome


def test_overlap_against_torchvision():
    a, b = random_boxes(30, seed=2), random_boxes(20, seed=3)
    assert torch.allclose(box_iou(a, b), torchvision.ops.box_iou(a, b), atol=1e-6)
    assert torch.allclose(generalized_box_iou(a, b), torchvision.ops.generalized_box_iou(a, b), atol=1e-6)
    assert torch.allclose(
        generalized_box_iou(a / 100, b / 100), generalized_box_iou(a, b), atol=1e-4
    )  # no unit in it
    pairs = generalized_box_iou(a[:20, None], b[:, None])[:, 0, 0]
    assert torch.allclose(pairs, generalized_box_iou(a[:20], b).diagonal())


def test_specified_ious():
    "the four proposals of the acceptance list"
    truth = torch.tensor([[30.0, 30, 70, 70]])
    p = torch.tensor(
        [[0.5, 0.5, 0.4, 0.4], [0.52, 0.5, 0.4, 0.4], [0.6, 0.5, 0.4, 0.4], [0.2, 0.2, 0.1, 0.1]]
    )
    assert torch.allclose(
        box_iou(denormalize_boxes(p, (100, 100)), truth)[:, 0],
        torch.tensor([1.0, 0.904762, 0.6, 0.0]),
        atol=1e-5,
    )


@pytest.mark.parametrize('f', [box_iou, generalized_box_iou])
def test_overlap_of_nothing(f):
    a = random_boxes(3)
    assert f(EMPTY, a).shape == (0, 3) and f(a, EMPTY).shape == (3, 0) and f(EMPTY, EMPTY).shape == (0, 0)
    x = EMPTY.clone().requires_grad_()
    f(x, a).sum().backward()
    assert x.grad.shape == (0, 4)


@pytest.mark.parametrize('f', [box_iou, generalized_box_iou])
def test_nan_stays_visible(f):
    a = random_boxes(3, seed=4)
    for k in range(4):
        bad = a.clone()
        bad[1, k] = NAN
        for out in (f(bad, a), f(a, bad).T, f(bad, torch.zeros(2, 4)), f(bad, bad)[:, [1]]):
            assert out[1].isnan().all()
        assert f(bad, a)[[0, 2]].isfinite().all()


DEGENERATE = torch.tensor(
    [
        [5.0, 5, 5, 5],
        [5, 5, 5, 9],
        [5, 5, 9, 5],
        [9, 9, 5, 5],
        [9, 5, 5, 9],
        [0, 0, 0, 0],
        [2, 2, 4, 4],
        [-3, -3, 8, 8],
    ]
)


def test_degenerate_boxes():
    "points, lines and swapped corners are empty boxes; values stay in range"
    iou, giou = box_iou(DEGENERATE, DEGENERATE), generalized_box_iou(DEGENERATE, DEGENERATE)
    assert iou.isfinite().all() and giou.isfinite().all()
    assert (iou[:6] == 0).all() and (iou >= 0).all() and (iou <= 1).all()
    assert (giou >= -1).all() and (giou <= iou + 1e-6).all()
    assert (
        iou[6, 6] == 1 and giou[0, 0] == 0 and giou[0, 5] == -1
    )  # one point; two points with a hull between them
    assert torch.allclose(giou, giou.T) and torch.allclose(iou, iou.T)


@pytest.mark.parametrize('f', [box_iou, generalized_box_iou])
def test_gradients_are_finite(f):
    x = DEGENERATE.clone().requires_grad_()
    (f(x, DEGENERATE) * torch.arange(1.0, 65).view(8, 8)).sum().backward()
    assert x.grad.isfinite().all()
    y = random_boxes(8, seed=5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: f(v, random_boxes(5, seed=6, dtype=torch.float64)), y)


def test_giou_pulls_a_far_box_home():
    b, t = torch.tensor([[80.0, 80, 90, 90]], requires_grad=True), torch.tensor([[10.0, 10, 20, 20]])
    (1 - generalized_box_iou(b, t)).sum().backward()
    assert (b.grad[0, :2] > 0).all()  # descent moves it to the left and up
    c = b.detach().clone().requires_grad_()
    box_iou(c, t).sum().backward()
    assert (c.grad == 0).all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_raised(dtype):
    a = torch.tensor([[0.0, 0, 1024, 1024]], dtype=dtype)
    for f in (box_iou, generalized_box_iou):
        assert f(a, a).dtype == torch.float32 and f(a, a).item() == 1


# --- transport (item 36) ---------------------------------------------------------------
BOX = torch.tensor([[10.0, 20, 30, 40]])


@pytest.mark.parametrize(
    'm,want,kept',
    [
        (flip(100), [70, 20, 90, 40], True),
        (mat([0, -1, 100], [1, 0, 0], [0, 0, 1]), [60, 10, 80, 30], True),
        (shift(500, 0), [100, 20, 100, 40], False),
    ],
)
def test_item_36_values(m, want, kept):
    out, keep = transform_boxes(BOX, m, (100, 100))
    assert out.tolist() == [want] and keep.tolist() == [kept] and out.dtype == torch.float32


@pytest.mark.parametrize(
    'm', [flip(100), scale(1.7, 0.6), shift(13.5, -4), flip(100) @ scale(2, 2) @ shift(3, 3)]
)
def test_there_and_back_is_the_identity(m):
    g = torch.Generator().manual_seed(0)
    c = 30 + 40 * torch.rand(50, 2, generator=g)
    x = torch.cat([c - 5, c + 9], 1)  # far from the borders: nothing is clipped ...
    there, keep = transform_boxes(x, shift(1000, 1000) @ m, (9999, 9999))  # ... and room on all sides
    back, keep2 = transform_boxes(there, (shift(1000, 1000) @ m).inverse(), (100, 100))
    assert torch.allclose(back, x, atol=2e-3) and keep.all() and keep2.all()
    back64, _ = transform_boxes(
        transform_boxes(x.double(), shift(1000, 1000) @ m, (9999, 9999))[0],
        (shift(1000, 1000) @ m).inverse(),
        (100, 100),
    )
    assert torch.allclose(back64, x.double(), atol=1e-9) and back64.dtype == torch.float64


@pytest.mark.parametrize('deg', [-30, -7, 1, 15, 30, 90, 170])
def test_rotating_back_contains_the_box(deg):
    x = random_boxes(40, side=60, seed=deg % 7).double() + 200
    m = rotate(deg, 230, 230)
    there, _ = transform_boxes(x, m, (1000, 1000))
    back, _ = transform_boxes(there, m.inverse(), (1000, 1000))
    assert (back[:, :2] <= x[:, :2] + 1e-9).all() and (back[:, 2:] >= x[:, 2:] - 1e-9).all()
    area = lambda b: (b[:, 2:] - b[:, :2]).prod(1)
    if deg % 90:
        assert (area(back) > area(x)).all()
    else:
        assert torch.allclose(back, x)


@pytest.mark.parametrize(
    'm', [rotate(25, 50, 50), shear(0.5, -0.3), shear(-0.4, 0.2) @ rotate(-12, 20, 80) @ scale(1.5, 0.7)]
)
def test_hull_contains_every_point_and_touches_it(m):
    x = random_boxes(20, seed=8).double()
    m = shift(500, 500) @ m
    out, _ = transform_boxes(x, m, (2000, 2000))
    t = torch.linspace(0, 1, 21, dtype=torch.float64)
    for b, h in zip(x, out):
        px = b[0] + (b[2] - b[0]) * t
        py = b[1] + (b[3] - b[1]) * t
        pts = (
            torch.stack([*torch.meshgrid(px, py, indexing='ij'), torch.ones(21, 21)], -1).reshape(-1, 3) @ m.T
        )
        assert torch.allclose(torch.cat([pts[:, :2].amin(0), pts[:, :2].amax(0)]), h)


def test_teacher_to_student_is_original_to_student():
    mt, ms = flip(100) @ scale(2, 2), shift(300, 200) @ flip(80) @ scale(0.8, 0.8)
    x = random_boxes(20, side=40, seed=9) + 10
    weak, _ = transform_boxes(x, shift(200, 0) @ mt, (500, 500))
    strong, _ = transform_boxes(weak, ms @ (shift(200, 0) @ mt).inverse(), (500, 500))
    assert torch.allclose(strong, transform_boxes(x, ms, (500, 500))[0], atol=1e-3)


def test_clamp_and_mask():
    x = torch.tensor([[-20.0, -20, 50, 50], [90, 10, 150, 20], [10, 10, 10.5, 90], [200, 200, 300, 300]])
    out, keep = transform_boxes(x, torch.eye(3), (60, 100))  # (H, W)
    assert out.tolist() == [
        [0, 0, 50, 50],
        [90, 10, 100, 20],
        [10, 10, 10.5, 60],
        [100, 60, 100, 60],
    ] and keep.tolist() == [True, True, False, False]
    assert transform_boxes(x, torch.eye(3), (60, 100), min_side=0.1)[1].tolist() == [True, True, True, False]
    assert transform_boxes(x, torch.eye(3), torch.Size((60, 100)), min_side=0)[1].tolist() == [
        True,
        True,
        True,
        False,
    ]


def test_transport_of_nothing_and_of_nan():
    out, keep = transform_boxes(EMPTY, rotate(20, 1, 1), (100, 100))
    assert (
        out.shape == (0, 4) and keep.shape == (0,) and keep.dtype == torch.bool and out.dtype == torch.float32
    )
    bad = torch.tensor([[NAN, 0, 10, 10], [0, 0, 10, 10]])
    out, keep = transform_boxes(bad, torch.eye(3), (100, 100))
    assert out[0].isnan().any() and keep.all() and out[1].tolist() == [0, 0, 10, 10]


def test_inputs_are_left_alone():
    x, m = BOX.clone(), flip(100)
    transform_boxes(x, m, (10, 10))
    assert torch.equal(x, BOX) and torch.equal(m, flip(100))
