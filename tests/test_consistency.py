"Cross-view queries: levels, features, boxes, masks, loss, gradients, empty batches (acceptance 8, 28-32)"

import copy
import itertools
import math
from dataclasses import replace
import pytest
import torch
from torch import nn
from torchvision.ops import roi_align
import semidetr.detectors.detector as detector
from semidetr.boxes import denormalize_boxes, inverse_sigmoid
from semidetr.core import ConfigError
from semidetr.detectors.denoising import denoising_queries
from semidetr.detectors.detector import Detector, DetectorConfig
from semidetr.detectors.transformer import TransformerConfig
from semidetr.matching.matching import pair_cost
from semidetr.semi import consistency
from semidetr.semi.consistency import (
    ConsistencyConfig,
    Projector,
    consistency_active,
    consistency_loss,
    cross_view_extras,
    cross_view_losses,
    cross_view_queries,
    pair_boxes,
    pyramid_strides,
    roi_features,
    roi_level,
)
from semidetr.semi.teacher import in_both_views, keep_boxes, transport
from semidetr.semi.variants import box_picker, grid_boxes, hungarian_consistency, match_views, random_boxes

CFG, D = ConsistencyConfig(), 32
TINY = TransformerConfig(
    d_model=D, n_heads=4, n_levels=3, n_points=2, enc_layers=1, dec_layers=3, ffn=48, num_queries=20
)
EYE = torch.eye(3, dtype=torch.float64)


class ToyBackbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.channels, self.strides = [16, 24], (8, 16)
        self.steps = nn.ModuleList([nn.Conv2d(3, 16, 8, 8), nn.Conv2d(16, 24, 2, 2)])

    def forward(self, x):
        a = torch.tanh(self.steps[0](x))
        return [a, torch.tanh(self.steps[1](a))]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def student(monkeypatch):
    "A detector whose parameters are away from their fresh zeros"
    monkeypatch.setattr(detector, 'build_backbone', lambda cfg: ToyBackbone())
    model = Detector(DetectorConfig(4, transformer=TINY))
    for n, p in model.named_parameters():
        if p.ndim > 1 and 'backbone' not in n:
            nn.init.normal_(p, std=0.15)
    return model.train()


def teacher_of(model, moved=0.02):
    "A slightly different frozen copy"
    t = copy.deepcopy(model).eval().requires_grad_(False)
    for p in t.parameters():
        p += moved * torch.randn_like(p)
    return t


def view(size=(64, 64), matrix=EYE, i=0):
    return dict(size=size, matrix=matrix, image_id=i, orig_size=size)


def flipped(width):
    return torch.tensor([[-1.0, 0, width], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)


def boxes(n, size=(64, 64), seed=0):
    "n boxes inside a view"
    g = torch.Generator().manual_seed(seed)
    xy = torch.rand(n, 2, generator=g) * 0.5
    return torch.cat([xy, xy + 0.1 + 0.4 * torch.rand(n, 2, generator=g)], 1) * torch.tensor(
        [size[1], size[0]] * 2
    )


def detections(n, **kw):
    return dict(boxes=boxes(n, **kw), labels=torch.arange(n) % 4, scores=torch.linspace(0.9, 0.1, n))


class World:
    "Two images in two views (the strong ones flipped and padded), a student and a teacher"

    def __init__(self, student, counts=(3, 1), cfg=CFG, double=False):
        self.cfg, self.student, self.teacher = cfg, student, teacher_of(student)
        torch.manual_seed(1)
        self.projector = Projector(D, 16, cfg.projector)
        self.weak, self.strong = (
            [view(), view((64, 48))],
            [view((72, 64), flipped(64)), view((64, 48), flipped(48))],
        )
        self.picked = [
            detections(n, size=w['size'], seed=i) for i, (n, w) in enumerate(zip(counts, self.weak))
        ]
        self.x_weak, self.x_strong = torch.randn(2, 3, 64, 64), torch.randn(2, 3, 72, 64)
        self.masks = [torch.zeros(2, *x.shape[-2:], dtype=torch.bool) for x in (self.x_weak, self.x_strong)]
        for m, side in zip(self.masks, (self.weak, self.strong)):
            for b, t in enumerate(side):
                m[b, t['size'][0] :] = True
                m[b, :, t['size'][1] :] = True
        if double:
            for m in (self.student, self.teacher, self.projector):
                m.double()
            self.x_weak, self.x_strong = self.x_weak.double(), self.x_strong.double()

    def encode(self):
        with torch.no_grad():
            t = self.teacher.encode(self.x_weak, self.masks[0])
        return t, self.student.encode(self.x_strong, self.masks[1])

    def extras(self, enc=None):
        t, s = enc or self.encode()
        pairs = pair_boxes(self.picked, self.weak, self.strong, self.cfg)
        return cross_view_extras(
            self.projector, t, s, pairs, (self.x_weak.shape[-2:], self.x_strong.shape[-2:]), self.cfg
        )

    def outputs(self, enc=None):
        t, s = enc or self.encode()
        q_s, q_t = self.extras((t, s))
        with torch.no_grad():
            teacher_out = self.teacher.decode(t, q_t)
        return self.student.decode(s, q_s), teacher_out

    def losses(self):
        return cross_view_losses(*self.outputs(), self.cfg)


def gradients(world):
    "(total loss, gradients of student and projector)"
    modules = [world.student, world.projector]
    for m in modules:
        m.zero_grad(set_to_none=True)
    total = sum(world.losses().values())
    total.backward()
    return total.detach(), {
        f'{i}.{n}': p.grad
        for i, m in enumerate(modules)
        for n, p in m.named_parameters()
        if p.grad is not None
    }


# --- configuration ---------------------------------------------------------------------


def test_defaults_and_bad_values():
    assert (CFG.weight, CFG.cross, CFG.norm, CFG.until, CFG.boxes, CFG.slot_weights) == (
        10,
        'one',
        True,
        'T1',
        'mined',
        'code',
    )
    hash(CFG)
    for field, value, text in (
        ('cross', 'bth', "did you mean 'both'"),
        ('until', 'T2', 'T1'),
        ('boxes', 'x', 'jittered'),
        ('density', 'x', 'sparse'),
        ('correspondence', 'hungary', 'hungarian'),
        ('slot_weights', 'slot', 'slots'),
        ('projector', 'x', 'mlp'),
        ('weight', -1, 'at least 0'),
        ('weight', float('nan'), 'at least 0'),
        ('groups', 0, 'at least 1'),
        ('jitter', 1.0, 'below 1'),
        ('n_random', -1, 'at least 0'),
        ('grid', 0, 'at least 1'),
        ('hidden', 0, 'at least 1'),
        ('top', 0, 'at least 1'),
    ):
        with pytest.raises(ConfigError, match=f'consistency.{field}=.*{text}'):
            ConsistencyConfig(**{field: value})


def test_until():
    assert [consistency_active(t, 10, CFG) for t in (0, 9, 10, 11)] == [True, True, False, False]
    assert all(consistency_active(t, 10, replace(CFG, until='end')) for t in (0, 10, 99))
    assert not consistency_active(0, 0, CFG) and not consistency_active(0, 10, replace(CFG, weight=0.0))


# --- levels and features (acceptance 28) -----------------------------------------------


def test_levels():
    side = torch.tensor([100.0, 112, 223, 224, 448])
    square = torch.stack([side * 0, side * 0, side, side], 1) + 8
    assert roi_level(square, 4).tolist() == [0, 1, 1, 2, 3]
    assert roi_level(
        torch.tensor([[0.0, 0, 56, 224], [0, 0, 4000, 4000], [5, 5, 5, 5], [9, 9, 3, 3]]), 4
    ).tolist() == [1, 3, 0, 0]
    assert roi_level(square, 2).tolist() == [0, 1, 1, 1, 1] and roi_level(square, 1).tolist() == [0] * 5
    assert roi_level(square / 2, 4, stride=4).tolist() == [0, 1, 1, 2, 3]  # only the size in cells counts
    assert roi_level(torch.zeros(0, 4), 4).shape == (0,)


def test_levels_against_a_loop():
    b = torch.rand(200, 4) * 300
    b[:, 2:] += b[:, :2]
    for box, level in zip(b.tolist(), roi_level(b, 4, 16.0).tolist()):
        side, wanted = ((box[2] - box[0]) * (box[3] - box[1])) ** 0.5, 0
        while wanted < 3 and side >= 2 * 7 * 16 * 2**wanted:
            wanted += 1
        assert level == wanted


def test_features_against_one_call_a_box():
    pyramid = [
        torch.randn(2, 5, 64 // k, 96 // k) for k in (1, 2, 4, 8)
    ]  # strides 8 to 64 of a frame of 512 x 768
    per_image = [boxes(9, (500, 700), 1), boxes(6, (512, 600), 2)]
    out = roi_features(pyramid, per_image, [8, 16, 32, 64])
    rows, levels = [(i, b) for i, bs in enumerate(per_image) for b in bs], set()
    assert out.shape == (15, 5, 7, 7)
    for got, (i, b) in zip(out, rows):
        level = roi_level(b[None], 4).item()
        levels.add(level)
        wanted = roi_align(pyramid[level][i : i + 1], [b[None]], 7, 1 / (8 * 2**level), -1, True)[0]
        assert torch.allclose(got, wanted, atol=1e-6)
    assert len(levels) >= 3  # the test sees several levels


def test_features_of_a_ramp_are_places():
    "Maps of the x and y of their cells give the centres of the bins: half-pixel alignment, both strides"
    frame, shapes = (
        (200, 150),
        [(26, 19), (13, 10)],
    )  # not multiples: a cell is 7.7 x 7.9 and 15.4 x 15 pixels

    def ramp(h, w):
        return torch.stack(
            [
                ((torch.arange(w) + 0.5) * frame[1] / w).expand(h, w),
                ((torch.arange(h) + 0.5) * frame[0] / h)[:, None].expand(h, w),
            ]
        )[None]

    pyramid = [ramp(h, w) for h, w in shapes]
    strides = pyramid_strides(pyramid, frame)
    assert strides == [(200 / 26, 150 / 19), (200 / 13, 15.0)]
    b = torch.tensor([[10.0, 12, 40, 50], [16.0, 20, 140, 180], [16.0, 12, 60, 90]])
    assert roi_level(b, 2).tolist() == [0, 1, 0]
    for size in (7, 2):
        out = roi_features(pyramid, [b], strides, size)
        for box, f in zip(b, out):
            centre = (torch.arange(size) + 0.5) / size
            x, y = box[0] + (box[2] - box[0]) * centre, box[1] + (box[3] - box[1]) * centre
            assert torch.allclose(f[0], x.expand(size, size), atol=1e-3) and torch.allclose(
                f[1], y[:, None].expand(size, size), atol=1e-3
            )


def test_features_keep_order_gradient_and_precision():
    pyramid = [
        torch.randn(1, 3, 32, 32, dtype=torch.float64, requires_grad=True),
        torch.randn(1, 3, 16, 16, dtype=torch.float64, requires_grad=True),
    ]
    big, small = torch.tensor([[0.0, 0, 200, 200]]), torch.tensor([[8.0, 8, 30, 30]])
    a, b = (
        roi_features(pyramid, [torch.cat([big, small])], [8, 16]),
        roi_features(pyramid, [torch.cat([small, big])], [8, 16]),
    )
    assert a.dtype == torch.float64 and torch.equal(a.flip(0), b)
    a[0].sum().backward()
    assert pyramid[0].grad is None or not pyramid[0].grad.any()
    assert pyramid[1].grad.any()
    half = roi_features([p.detach().to(torch.bfloat16) for p in pyramid], [big], [8, 16])
    assert half.dtype == torch.float32 and half.isfinite().all()


def test_features_of_nothing():
    assert roi_features([torch.randn(2, 5, 8, 8)], [torch.zeros(0, 4)] * 2, [8]).shape == (0, 5, 7, 7)
    some = roi_features([torch.randn(2, 5, 8, 8)], [torch.zeros(0, 4), boxes(1)], [8])
    assert some.shape == (1, 5, 7, 7)


# --- projector -------------------------------------------------------------------------


def test_projector_layers():
    code, mlp = Projector(8, 16), Projector(8, 16, 'mlp')
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert count(code) == 2 * (8 * 8 * 9) + 2 * 2 * 8 + 2 * 16 + (8 * 49 * 16 + 16) + (16 * 8 + 8) and count(
        mlp
    ) == (8 * 49 * 16 + 16) + (16 * 8 + 8)
    x = torch.randn(6, 8, 7, 7)
    assert (code(x) >= 0).all() and (mlp(x) < 0).any()  # the code ends with a ReLU
    y = x
    for conv, bn in zip(code.convs, code.norms):  # batch statistics, by hand
        y = conv(y)
        y = (
            (y - y.mean((0, 2, 3), keepdim=True))
            / (y.var((0, 2, 3), unbiased=False, keepdim=True) + bn.eps).sqrt()
        ).relu()
    y = code.fc1(y.flatten(1))
    y = ((y - y.mean(0)) / (y.var(0, unbiased=False) + 1e-5).sqrt()).relu()
    assert torch.allclose(code(x), code.fc2(y).relu(), atol=1e-5)


def test_projector_on_one_and_no_box():
    p = Projector(8, 16).train()
    for _ in range(3):
        p(torch.randn(9, 8, 7, 7) + 1)
    before = {k: v.clone() for k, v in p.state_dict().items()}
    x = torch.randn(1, 8, 7, 7)
    one, none = p(x), p(torch.zeros(0, 8, 7, 7))
    assert all(torch.equal(v, before[k]) for k, v in p.state_dict().items())  # one box moves no statistics
    assert torch.allclose(one, p.eval()(x)) and one.isfinite().all() and none.shape == (0, 8)
    p.train()(x).sum().backward()
    assert p.convs[0].weight.grad.any()


def test_projector_precision():
    p = Projector(8, 16)
    with torch.autocast('cpu', torch.bfloat16):
        assert p(torch.randn(3, 8, 7, 7).bfloat16()).dtype == torch.float32
    assert p.double()(torch.randn(3, 8, 7, 7)).dtype == torch.float64


def test_idle_projector():
    p = Projector(8, 16)
    (p.idle() + 1).backward()
    assert p.idle() == 0 and all(q.grad is not None and not q.grad.any() for q in p.parameters())


# --- boxes -----------------------------------------------------------------------------


def test_which_boxes():
    con, sup, sizes = [detections(3), detections(0)], [detections(1), detections(0)], [(64, 64), (48, 64)]

    def pick(generator=None, **kw):
        return box_picker(replace(CFG, **kw))(con, sup, sizes, generator)

    for name, wanted in (('mined', con), ('score', sup)):
        assert all(torch.equal(a[k], b[k]) for a, b in zip(pick(boxes=name), wanted) for k in a)
    assert [len(p['boxes']) for p in pick(boxes='none')] == [0, 0]
    g = lambda: torch.Generator().manual_seed(5)
    moved = pick(g(), boxes='jittered', jitter=0.3)
    step = (
        (moved[0]['boxes'] - sup[0]['boxes'])
        / (sup[0]['boxes'][:, 2:] - sup[0]['boxes'][:, :2]).repeat(1, 2)
        * 2
    )
    assert (
        0 < step.abs().max() <= 0.3 + 1e-4
        and len(moved[1]['boxes']) == 0
        and torch.equal(moved[0]['labels'], sup[0]['labels'])
    )
    assert torch.equal(pick(g(), boxes='jittered', jitter=0.3)[0]['boxes'], moved[0]['boxes'])
    assert torch.allclose(pick(boxes='jittered', jitter=0.0)[0]['boxes'], sup[0]['boxes'], atol=1e-4)
    anywhere = pick(boxes='random', n_random=7)
    for p, (h, w) in zip(anywhere, sizes):
        assert p['boxes'].shape == (7, 4) and p['labels'].shape == p['scores'].shape == (7,)
        assert (
            p['boxes'].min() >= 0
            and p['boxes'][:, 2].max() <= w + 1e-3
            and p['boxes'][:, 3].max() <= h + 1e-3
        )
    assert [len(p['boxes']) for p in pick(boxes='random', n_random=0)] == [0, 0]


def test_random_boxes_fill_the_view():
    b = random_boxes((50, 200), 5000, torch.zeros(1))
    wh = (b[:, 2:] - b[:, :2]) / torch.tensor([200.0, 50])
    assert (
        wh.min() >= 0.1 - 1e-5
        and wh.max() <= 1 + 1e-5
        and wh.min() < 0.11
        and wh.max() > 0.99
        and abs(wh.mean() - 0.55) < 0.02
    )


def test_dense_boxes():
    con, sizes = [detections(2), detections(0)], [(64, 64), (48, 80)]

    def pick(proposals=None, **kw):
        return box_picker(replace(CFG, density='dense', **kw))(con, con, sizes, proposals=proposals)

    dense = pick(grid=2)
    assert [len(p['boxes']) for p in dense] == [6, 4]
    assert dense[1]['boxes'].tolist() == [[0, 0, 40, 24], [40, 0, 80, 24], [0, 24, 40, 48], [40, 24, 80, 48]]
    assert torch.equal(dense[0]['boxes'][:2], con[0]['boxes'])
    assert dense[0]['labels'].shape == dense[0]['scores'].shape == (6,)
    found = [detections(5, seed=3), detections(1, seed=4)]
    given = pick(found, boxes='none')
    assert all(torch.equal(a[k], b[k]) for a, b in zip(given, found) for k in a)
    half = pick([found[0], detections(0)], boxes='none', grid=2)  # no detection: a grid
    assert torch.equal(half[0]['boxes'], found[0]['boxes'])
    assert torch.equal(half[1]['boxes'], dense[1]['boxes'])
    area = (lambda b: (b[:, 2:] - b[:, :2]).prod(1).sum())(grid_boxes((30, 70), 3, torch.zeros(0)))
    assert torch.allclose(area, torch.tensor(2100.0))


def test_pairs_are_the_same_box_in_both_views():
    picked = [
        dict(
            boxes=torch.tensor([[10.0, 20, 30, 40], [-90, 0, -80, 9], [0, 0, 50, 50]]),
            labels=torch.tensor([1, 2, 3]),
            scores=torch.rand(3),
        ),
        detections(0),
    ]
    weak, strong = [view((100, 100)), view((40, 80))], [view((100, 100), flipped(100)), view((60, 120))]
    a, b = pair_boxes(picked, weak, strong)
    assert torch.allclose(a['weak'], picked[0]['boxes'][[0, 2]], atol=1e-3)
    assert torch.allclose(a['strong'], torch.tensor([[70.0, 20, 90, 40], [50, 0, 100, 50]]), atol=1e-3) and a[
        'weight'
    ].tolist() == [1, 1]
    for side in ('weak', 'strong'):
        assert torch.allclose(denormalize_boxes(a[side + '_ref'], (100, 100)), a[side])
    assert (
        b['weight'].tolist() == [0]
        and b['weak'].tolist() == [[20, 10, 60, 30]]
        and b['strong'].tolist() == [[30, 15, 90, 45]]
    )  # the middle half
    assert len(pair_boxes(picked, weak, strong, replace(CFG, slot_weights='slots'))[1]['weight']) == 0


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_boxes_are_transported_once(monkeypatch, dtype):
    "Mined boxes keep their place in the strong view: the same bits as if they were moved again"

    def turned(shift, c=math.cos(0.3), s=math.sin(0.3)):
        return torch.tensor([[c, -s, shift], [s, c, -5.1], [0, 0, 1]], dtype=torch.float64)

    sizes = [(640, 480), (333, 500), (96, 96), (64, 48)]
    weak = [view((h, w), flipped(w)) for h, w in sizes]
    strong = [view((h + 40, w - 7), turned(0.4 * w)) for h, w in sizes]
    b0 = [detections(n, size=s, seed=n) for n, s in zip((60, 7, 1, 0), sizes)]
    b0 = [d | dict(boxes=d['boxes'].to(dtype)) for d in b0]
    moved = transport(b0, weak, strong, 2.0)
    first = in_both_views(b0, moved)
    assert 0 < sum(len(d['boxes']) for d in first) < 68  # some have left the view
    g = torch.Generator().manual_seed(0)
    for share in (1.0, 0.5, 0.1):
        con = keep_boxes(first, [torch.rand(len(d['scores']), generator=g) < share for d in first])
        for slots in ('code', 'slots'):
            cfg = replace(CFG, slot_weights=slots)
            plain = [{k: v for k, v in d.items() if k != 'boxes_strong'} for d in con]
            twice = pair_boxes(plain, weak, strong, cfg, 2.0)
            with monkeypatch.context() as patch:
                patch.setattr(consistency, 'transport', None)  # must not be called
                once = pair_boxes(box_picker(cfg)(con, con, sizes), weak, strong, cfg, 2.0)
            assert all(torch.equal(a[k], b[k]) for a, b in zip(once, twice, strict=True) for k in b)


# --- queries and mask (acceptance 8, 30) -----------------------------------------------


def test_slots():
    content, refs = torch.randn(3, D), [torch.rand(2, 4), torch.zeros(0, 4), torch.rand(1, 4)]
    q = cross_view_queries(content, [2, 0, 1], refs, 5, [torch.ones(2), torch.zeros(0), torch.zeros(1)])
    assert (
        q.name == 'consistency'
        and q.content.shape == (3, 10, D)
        and q.boxes.shape == (3, 10, 4)
        and q.mask.shape == (10, 10)
    )
    assert (
        q.meta['groups'] == 5
        and q.meta['n_max'] == 2
        and q.meta['weight'].tolist() == [[1, 1] * 5, [-1, -1] * 5, [0, -1] * 5]
    )
    flat = iter(content)
    for i, r in enumerate(refs):
        for j in range(2):
            c = next(flat) if j < len(r) else torch.zeros(D)
            for g in range(5):
                assert torch.equal(q.content[i, 2 * g + j], c)
                assert torch.equal(
                    q.boxes[i, 2 * g + j], inverse_sigmoid(r[j]) if j < len(r) else torch.zeros(4)
                )
    assert all(q.mask[a, b].item() == (a // 2 != b // 2) for a in range(10) for b in range(10))
    assert (
        cross_view_queries(content[:0], [0, 0], [refs[1]] * 2) is None
        and cross_view_queries(content[:0], [], []) is None
    )


def test_queries_stand_in_their_own_view(student):
    w = World(student)
    q_s, q_t = w.extras()
    assert torch.equal(q_s[0].content, q_t[0].content) and not torch.equal(q_s[0].boxes, q_t[0].boxes)
    assert q_s[0].content.requires_grad and not q_t[0].content.requires_grad
    b, t = (
        denormalize_boxes(q_s[0].boxes[0, :3].sigmoid(), (72, 64)),
        denormalize_boxes(q_t[0].boxes[0, :3].sigmoid(), (64, 64)),
    )
    assert torch.allclose(t, w.picked[0]['boxes'], atol=0.01)
    assert torch.allclose(b, torch.stack([64 - t[:, 2], t[:, 1], 64 - t[:, 0], t[:, 3]], 1), atol=0.02)
    assert q_s[0].meta['weight'].tolist() == [[1, 1, 1], [1, -1, -1]]


@pytest.mark.parametrize('double,tol', [(False, 1e-5), (True, 1e-12)])
@pytest.mark.parametrize('cross', ['one', 'both'])
def test_matching_and_denoising_queries_do_not_notice(student, double, tol, cross):
    w = World(student, cfg=replace(CFG, groups=3, cross=cross), double=double)
    t, s = w.encode()
    dtype = torch.float64 if double else torch.float32
    targets = [dict(labels=torch.tensor([0, 3]), boxes=torch.rand(2, 4, dtype=dtype) * 0.2 + 0.4)] * 2
    dn = denoising_queries(targets, student.label_enc, 4)
    q_s, _ = w.extras((t, s))
    plain, crowded = student.decode(s), student.decode(s, q_s + [dn])
    for k in ('pred_logits', 'pred_boxes', 'hs'):
        assert (plain[k] - crowded[k]).abs().max() < tol
    alone, both = student.decode(s, [dn])['extra']['denoising'], crowded['extra']['denoising']
    for k in ('pred_logits', 'pred_boxes', 'hs'):
        assert (alone[k] - both[k]).abs().max() < tol
    other = student.decode(s, q_s)['extra']
    for q in q_s:
        assert (other[q.name]['hs'] - crowded['extra'][q.name]['hs']).abs().max() < tol


@pytest.mark.parametrize(
    'cfg',
    [CFG, replace(CFG, slot_weights='slots'), replace(CFG, norm=False), replace(CFG, cross='both')],
    ids=lambda c: f'{c.slot_weights}-{c.norm}-{c.cross}',
)
@pytest.mark.parametrize('counts', [(3, 1), (2, 0)])
def test_groups_are_copies(student, cfg, counts):
    w = World(student, counts, replace(cfg, groups=5), double=True)
    t, s = w.encode()
    hs = w.outputs((t, s))[0]['extra']['consistency']['hs']
    n = max(counts)
    assert hs.shape[2] == 5 * n
    for g in range(1, 5):
        assert (hs[:, :, g * n : (g + 1) * n] - hs[:, :, :n]).abs().max() < 1e-12
    five = gradients(w)
    w.cfg = cfg
    one = gradients(w)
    assert abs(five[0] - one[0]) < 1e-12 * (1 + one[0]) and set(five[1]) == set(one[1])
    for k in one[1]:
        assert torch.allclose(five[1][k], one[1][k], rtol=1e-9, atol=1e-12), k
    assert one[0] > 0


# --- loss (acceptance 29) --------------------------------------------------------------


def test_scale():
    e = torch.eye(256)[:2].expand(6, 1, 2, 256)
    w = torch.ones(1, 2)
    for teacher, wanted in ((3 * e, 0.0), (e.flip(2), 0.078125), (-e, 0.15625)):
        for cfg in (CFG, replace(CFG, slot_weights='slots')):
            loss = consistency_loss(e, teacher, w, cfg)
            assert list(loss) == [f'loss_con_{i}' for i in range(6)] and all(
                abs(v.item() - wanted) < 1e-6 for v in loss.values()
            )
    assert (
        abs(consistency_loss(e, -e, w, replace(CFG, norm=False, weight=1.0))['loss_con_0'].item() - 4 / 256)
        < 1e-7
    )
    assert consistency_loss(e, 3 * e, w, replace(CFG, norm=False))['loss_con_5'] > 0


@pytest.mark.parametrize('norm', [True, False])
@pytest.mark.parametrize('slots', ['code', 'slots'])
def test_loss_against_a_loop(norm, slots):
    s, t = torch.randn(3, 2, 6, 8, dtype=torch.float64), torch.randn(3, 2, 6, 8, dtype=torch.float64)
    weight = torch.tensor([[1.0, 1, -1, 1, 1, -1], [0, -1, -1, 0, -1, -1]])
    got = consistency_loss(s, t, weight, replace(CFG, norm=norm, slot_weights=slots, weight=7.0))
    for layer in range(3):
        total, weights, n, real = 0.0, 0.0, 0, 0.0
        for b, p in itertools.product(range(2), range(6)):
            w = weight[b, p].item()
            if w < 0:
                continue
            x, y = s[layer, b, p].tolist(), t[layer, b, p].tolist()
            if norm:
                x, y = ([v / sum(u * u for u in z) ** 0.5 for v in z] for z in (x, y))
            distance = sum((u - v) ** 2 for u, v in zip(x, y)) / 8
            total, weights, n, real = total + distance, weights + w, n + 1, real + w * distance
        wanted = 7 * (total / n) * (weights / n) if slots == 'code' else 7 * real / weights
        assert abs(got[f'loss_con_{layer}'].item() - wanted) < 1e-12


def test_unused_slots_and_dummies():
    s, t, weight = torch.randn(1, 2, 2, 8), torch.randn(1, 2, 2, 8), torch.tensor([[1.0, -1], [0, -1]])
    junk = s.clone()
    junk[:, :, 1] = torch.nan
    for mode in ('code', 'slots'):
        assert torch.equal(
            *(
                consistency_loss(h, t, weight, replace(CFG, slot_weights=mode))['loss_con_0']
                for h in (s, junk)
            )
        )
    far = s.clone()
    far[:, 1, 0] *= -1
    a, b = (consistency_loss(h, t, weight, CFG)['loss_con_0'] for h in (s, far))
    assert a != b  # the shape slip: a dummy takes part in the mean distance ...
    a, b = (
        consistency_loss(h, t, weight, replace(CFG, slot_weights='slots'))['loss_con_0'] for h in (s, far)
    )
    assert a == b  # ... and does not where slots are weighted


def test_loss_in_low_precision_is_computed_in_float32():
    s, t = torch.randn(2, 1, 4, 16), torch.randn(2, 1, 4, 16)
    out = consistency_loss(s.bfloat16(), t.bfloat16(), torch.ones(1, 4), CFG)['loss_con_0']
    assert (
        out.dtype == torch.float32
        and abs(out - consistency_loss(s, t, torch.ones(1, 4), CFG)['loss_con_0']) < 0.02
    )


def test_memory_grows_with_the_slots_only():
    "2000 slots of width 256: the pairwise tensor of the official code would take 4 GB a layer"
    s, t = torch.randn(1, 4, 500, 256, requires_grad=True), torch.randn(1, 4, 500, 256)
    largest = 0

    def watch(x):
        nonlocal largest
        largest = max(largest, x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(watch, lambda x: x):
        consistency_loss(s, t, torch.ones(4, 500), CFG)
    assert 0 < largest <= s.numel()


# --- gradients (acceptance 31) ---------------------------------------------------------


@pytest.mark.parametrize('cross', ['one', 'swap', 'both'])
@pytest.mark.parametrize('projector', ['code', 'mlp'])
def test_who_learns(student, cross, projector):
    w = World(student, cfg=replace(CFG, cross=cross, projector=projector))
    for p in w.teacher.parameters():
        p.requires_grad_(True)  # even then
    t, s = w.teacher.encode(w.x_weak, w.masks[0]), w.student.encode(w.x_strong, w.masks[1])
    q_s, q_t = w.extras((t, s))
    sum(cross_view_losses(student.decode(s, q_s), w.teacher.decode(t, q_t), w.cfg).values()).backward()
    assert all(p.grad is None for p in w.teacher.parameters())
    assert all(
        p.grad is not None and p.grad.any() for n, p in w.projector.named_parameters() if 'bias' not in n
    )
    learned = {n for n, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert {
        'backbone.steps.0.weight',
        'transformer.encoder.layers.0.linear1.weight',
        'transformer.decoder.layers.2.linear2.weight',
    } <= learned


def test_no_gradient_when_inactive(student):
    w = World(student, cfg=replace(CFG, weight=0.0))
    assert w.extras() == ([], []) and w.losses() == {}
    w.projector.idle().backward()
    assert not any(p.grad.any() for p in w.projector.parameters())


# --- directions ------------------------------------------------------------------------


def test_both_adds_the_mirrored_term(student):
    w = World(student)
    enc = w.encode()
    frames = (w.x_weak.shape[-2:], w.x_strong.shape[-2:])
    one = cross_view_losses(*w.outputs(enc), w.cfg)
    pairs = pair_boxes(w.picked, w.weak, w.strong)
    c_s = w.projector(
        roi_features(
            enc[1].features, [p['strong'] for p in pairs], pyramid_strides(enc[1].features, frames[1])
        )
    )

    def sets(side):
        return [cross_view_queries(c_s, [len(p['weight']) for p in pairs], [p[side] for p in pairs])]

    mirror = consistency_loss(
        student.decode(enc[1], sets('strong_ref'))['extra']['consistency']['hs'],
        w.teacher.decode(enc[0], sets('weak_ref'))['extra']['consistency']['hs'],
        torch.tensor([[1.0, 1, 1], [1, -1, -1]]),
    )
    w.cfg = replace(w.cfg, cross='both')
    both = cross_view_losses(*w.outputs(enc), w.cfg)
    assert list(both) == list(one) == list(mirror)
    for k in both:
        assert (
            torch.allclose(both[k], one[k] + mirror[k], atol=1e-6)
            and mirror[k] > 0
            and not torch.isclose(one[k], mirror[k], rtol=1e-3)
        )


def test_swap_gives_each_decoder_the_features_of_the_other(student):
    w = World(student, cfg=replace(CFG, cross='both'))
    enc = w.encode()
    q_s, q_t = w.extras(enc)
    w.cfg = replace(w.cfg, cross='swap')
    swap_s, swap_t = w.extras(enc)
    assert len(swap_s) == len(swap_t) == 1 and torch.equal(
        swap_s[0].content, q_s[0].content
    )  # student: teacher's features
    assert torch.equal(swap_t[0].content, q_t[1].content) and torch.equal(
        swap_t[0].boxes, q_t[0].boxes
    )  # teacher: student's
    assert not torch.equal(swap_s[0].content, swap_t[0].content) and not swap_t[0].content.requires_grad
    assert [q.name for q in q_s] == [q.name for q in q_t] == ['consistency', 'consistency_mirror']


def test_identical_networks_and_views_agree(student):
    "Nothing to learn where there is no difference; the gradient vanishes too"
    w = World(student)
    w.teacher = copy.deepcopy(student)
    w.strong, w.x_strong, w.masks = w.weak, w.x_weak, [w.masks[0]] * 2
    for cross in ('one', 'swap', 'both'):
        w.cfg = replace(CFG, cross=cross)
        total, grads = gradients(w)
        assert total < 1e-9 and max(g.abs().max() for g in grads.values()) < 1e-4


# --- empty (acceptance 32) -------------------------------------------------------------


@pytest.mark.parametrize('cross', ['one', 'swap', 'both'])
@pytest.mark.parametrize('projector', ['code', 'mlp'])
def test_batch_without_any_box(student, cross, projector):
    w = World(student, (0, 0), replace(CFG, cross=cross, projector=projector, groups=5))
    out, _ = w.outputs()
    assert (
        out['extra']['consistency']['hs'].shape[2] == 5
        and out['extra']['consistency']['meta']['weight'].eq(0).all()
    )
    total, grads = gradients(w)
    assert (
        total == 0
        and all(g.isfinite().all() and not g.any() for g in grads.values())
        and any(k.startswith('1.') for k in grads)
    )


def test_batch_without_any_box_and_without_dummies(student):
    w = World(student, (0, 0), replace(CFG, slot_weights='slots'))
    assert w.extras() == ([], []) and w.losses() == {}
    empty = consistency_loss(
        torch.randn(2, 1, 0, 8, requires_grad=True), torch.randn(2, 1, 0, 8), torch.zeros(1, 0), CFG
    )
    assert all(v == 0 and v.requires_grad for v in empty.values())
    w.cfg = replace(CFG, boxes='none')
    assert w.extras() == ([], [])


def test_one_box_in_the_whole_batch(student):
    for slots in ('code', 'slots'):
        total, grads = gradients(World(student, (1, 0), replace(CFG, slot_weights=slots)))
        assert total.isfinite() and total > 0 and all(g.isfinite().all() for g in grads.values())


def test_code_mode_halves_the_loss_of_a_batch_with_an_empty_image():
    "One real slot and one dummy of equal distance: factor one half"
    e = torch.eye(8)[:1].expand(1, 2, 1, 8)
    assert torch.allclose(
        consistency_loss(e, -e, torch.tensor([[1.0], [0.0]]))['loss_con_0'], torch.tensor(10 * 4 / 8 / 2)
    )


# --- the Hungarian alternative ---------------------------------------------------------


def predictions(Q, C=3, layers=2, d=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return dict(
        pred_logits=torch.randn(2, Q, C, generator=g),
        pred_boxes=torch.rand(2, Q, 4, generator=g) * 0.3 + 0.3,
        hs=torch.randn(layers, 2, Q, d, generator=g),
    )


def test_hungarian_against_all_permutations():
    s, t = predictions(5), predictions(5, seed=1)
    weak, strong = [view((100, 100))] * 2, [view((100, 100), flipped(100))] * 2
    cfg = replace(CFG, correspondence='hungarian', top=3)
    pairs, total = match_views(s, t, weak, strong, cfg), [0.0, 0.0]
    for b, (qs, qt) in enumerate(pairs):
        score, label = t['pred_logits'][b].sigmoid().max(-1)
        best = sorted(range(5), key=lambda i: -score[i])[:3]
        there = t['pred_boxes'][b].clone()
        there[:, 0] = 1 - there[:, 0]  # the flip
        cost = pair_cost(s['pred_logits'][b], s['pred_boxes'][b], label[best], there[best])
        wanted = min(
            itertools.permutations(range(5), 3), key=lambda p: sum(cost[q, i].item() for i, q in enumerate(p))
        )
        assert {(q, best[i]) for i, q in enumerate(wanted)} == set(zip(qs.tolist(), qt.tolist()))
        for i, q in enumerate(wanted):
            for layer in range(2):
                u, v = s['hs'][layer, b, q], t['hs'][layer, b, best[i]]
                total[layer] += ((u / u.norm() - v / v.norm()) ** 2).mean().item() / 6
    got = hungarian_consistency(s, t, weak, strong, cfg)
    assert [round(v.item() / 10, 6) for v in got.values()] == [round(v, 6) for v in total]


def test_hungarian_finds_a_permutation_and_leaves_out_what_is_gone():
    t = predictions(6)
    t['pred_logits'] += 3 * torch.eye(3).repeat(2, 1)[None]
    order = torch.randperm(6)
    s = {k: v[:, order] if k != 'hs' else v[:, :, order] for k, v in t.items()}
    same = [view((100, 100))] * 2
    assert all(v < 1e-12 for v in hungarian_consistency(s, t, same, same, CFG).values())
    gone = [
        view((100, 100)),
        view((100, 100), torch.tensor([[1.0, 0, 500], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)),
    ]
    pairs = match_views(s, t, same, gone, CFG)
    assert [len(p[0]) for p in pairs] == [6, 0]


def test_hungarian_pairs_keep_their_numbers_when_others_leave():
    "The teacher's best query leaves the strong view; the second still meets its own partner"
    t = dict(
        pred_logits=torch.tensor([[[-9.0, 0.0], [3.0, -9], [2.0, -9]]]),
        pred_boxes=torch.tensor([[[0.6, 0.5, 0.2, 0.2], [0.2, 0.5, 0.2, 0.2], [0.8, 0.5, 0.2, 0.4]]]),
        hs=torch.eye(3)[None, None],
    )
    s = dict(t, pred_boxes=t['pred_boxes'] - torch.tensor([0.4, 0, 0, 0]))
    shift = EYE.clone()
    shift[0, 2] = -40
    ((qs, qt),) = match_views(s, t, [view((100, 100))], [view((100, 100), shift)], CFG)
    assert set(zip(qs.tolist(), qt.tolist())) == {(0, 0), (2, 2)}
    assert hungarian_consistency(s, t, [view((100, 100))], [view((100, 100), shift)], CFG)['loss_con_0'] == 0


def test_hungarian_with_nothing_to_match():
    s, t = predictions(4), predictions(4, seed=1)
    s['hs'].requires_grad_()
    t['hs'].requires_grad_()
    gone = [view((100, 100), torch.tensor([[1.0, 0, 500], [0, 1, 0], [0, 0, 1]], dtype=torch.float64))] * 2
    loss = sum(hungarian_consistency(s, t, [view((100, 100))] * 2, gone, CFG).values())
    loss.backward()
    assert loss == 0 and not s['hs'].grad.any() and t['hs'].grad is None


def test_hungarian_on_networks(student):
    w = World(student)
    t, s = w.encode()
    loss = hungarian_consistency(student.decode(s), w.teacher.decode(t), w.weak, w.strong, w.cfg)
    assert list(loss) == ['loss_con_0', 'loss_con_1', 'loss_con_2'] and all(v > 0 for v in loss.values())
    sum(loss.values()).backward()
    assert student.backbone.steps[0].weight.grad.any()


# --- it teaches ------------------------------------------------------------------------


def test_a_few_steps_bring_the_answers_together(student):
    w = World(student)
    opt = torch.optim.Adam([*student.parameters(), *w.projector.parameters()], lr=1e-3)
    history = []
    for _ in range(15):
        opt.zero_grad()
        loss = sum(w.losses().values())
        loss.backward()
        opt.step()
        history.append(loss.item())
    assert history[-1] < 0.5 * history[0]
