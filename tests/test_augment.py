"Views: constants, frequencies, and matrices that agree with where the pixels are."

import math, pickle, random
from collections import Counter
from dataclasses import replace
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F
from semidetr.data.augment import (
    COLOR_OPS,
    GEOMETRIC_OPS,
    ViewConfig,
    between_views,
    color_value,
    draw_ops,
    eval_view,
    labelled_view,
    normalize_image,
    op_matrix,
    render,
    resize_to,
    scaled_views,
    strong_view,
    weak_view,
)
from semidetr.boxes import transform_boxes
from semidetr.core import ConfigError
from semidetr.data.datasets import Sample

COCO, SMALL = ViewConfig(), scaled_views(160, smallest=0.75)


def sample(w=120, h=90, boxes=((10, 20, 30, 40),), ignore=None, image=None, seed=0):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    if image is None:
        image = Image.fromarray(np.random.RandomState(seed).randint(0, 255, (h, w, 3), dtype=np.uint8))
    return Sample(
        image,
        7,
        boxes,
        torch.arange(len(boxes)),
        torch.tensor(ignore or [False] * len(boxes), dtype=torch.bool),
    )


def marker(x, y, w, h, r=3):
    "A white square of side 2r+1 whose centre is (x+.5, y+.5), on the fill grey"
    a = np.full((h, w, 3), 125, np.uint8)
    a[y - r : y + r + 1, x - r : x + r + 1] = 255
    return Image.fromarray(a)


def find(image):
    "Centre of what differs from the background, and how much of it there is"
    d = image[0].double()
    d = (d - d.median()).abs()
    ys, xs = (torch.arange(n).double() + 0.5 for n in d.shape)
    return np.array([(d.sum(0) * xs).sum() / d.sum(), (d.sum(1) * ys).sum() / d.sum()]), d


# --- constants and frequencies (spec 41, 42) -------------------------------------------


def test_magnitudes():
    assert [color_value('solarize', m) for m in (1, 9, 10)] == [25, 230, 255]
    for op in ('color', 'contrast', 'brightness', 'sharpness'):
        assert (round(color_value(op, 1), 6), round(color_value(op, 9), 6)) == (0.28, 1.72)
    assert [color_value('posterize', m) for m in range(1, 10)] == [4, 4, 3, 3, 2, 2, 2, 1, 1]
    assert (
        ViewConfig().short_sides == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
        and ViewConfig().max_side == 1333
    )
    assert ViewConfig().fill == 125 and ViewConfig().flip == 0.5


N = 9000


@pytest.fixture(scope='module')
def drawn():
    return [draw_ops('strong', s, COCO) for s in range(N)]


def near(count, p, n=N):
    return abs(count - n * p) < 4.5 * math.sqrt(n * p * (1 - p))


def test_frequencies(drawn):
    names = Counter(n for ops in drawn for n, _ in ops)
    assert all(near(names[c], 1 / 9) for c in COLOR_OPS) and sum(names[c] for c in COLOR_OPS) == N
    assert all(near(names[g], 1 / 4) for g in GEOMETRIC_OPS) and sum(names[g] for g in GEOMETRIC_OPS) == N
    assert near(names['flip'], 0.5) and names['resize'] == names['erase'] == N
    sizes = Counter(ops[0][1] for ops in drawn)
    assert set(sizes) == set(COCO.short_sides) and all(near(c, 1 / 11) for c in sizes.values())
    mu = Counter(v for ops in drawn for n, v in ops if n in COLOR_OPS)
    assert set(mu) == set(range(1, 10)) and all(near(c, 1 / 9) for c in mu.values())
    assert near(
        sum(
            [n in COLOR_OPS for n, _ in ops].index(True) < [n in GEOMETRIC_OPS for n, _ in ops].index(True)
            for ops in drawn
        ),
        0.5,
    )
    assert all(
        ops[0][0] == 'resize' and ops[-1][0] == 'erase' and (len(ops) == 4 or ops[1][0] == 'flip')
        for ops in drawn
    )


def test_ranges(drawn):
    values = {g: np.array([v for ops in drawn for n, v in ops if n == g]) for g in GEOMETRIC_OPS}
    for g, limit in (('translate_x', 0.1), ('translate_y', 0.1), ('rotate', 30)):
        assert (
            abs(values[g]).max() <= limit
            and values[g].min() < -0.95 * limit
            and values[g].max() > 0.95 * limit
            and abs(values[g].mean()) < 0.05 * limit
        )
    assert (
        abs(values['shear']).max() <= math.tanh(math.pi / 6)
        and abs(np.corrcoef(values['shear'].T)[0, 1]) < 0.1
    )
    assert abs(values['shear']).max(0).min() > 0.95 * math.tanh(math.pi / 6)
    patches = [v for ops in drawn for n, v in ops if n == 'erase']
    counts = Counter(map(len, patches))
    assert set(counts) == {1, 2, 3, 4} and all(near(c, 1 / 4) for c in counts.values())
    r = np.array([p[0] for v in patches for p in v])
    assert 0 <= r.min() and 0.19 < r.max() < 0.2 and abs(r.mean() - 0.1) < 0.002


def test_kinds():
    for s in range(300):
        weak, lab = draw_ops('weak', s, COCO), draw_ops('labelled', s, COCO)
        assert {n for n, _ in weak} <= {'resize', 'flip'}
        assert lab[-1][0] in COLOR_OPS and {n for n, _ in lab[:-1]} <= {'resize', 'flip'}
    assert draw_ops('eval', 3, COCO) == (('resize', 800),)
    with pytest.raises(ConfigError, match="did you mean 'weak'"):
        draw_ops('week', 0, COCO)


def test_weak_and_strong_are_independent_even_with_one_seed():
    pairs = [(draw_ops('weak', s, COCO), draw_ops('strong', s, COCO)) for s in range(3000)]
    same_size = sum(w[0] == t[0] for w, t in pairs)
    same_flip = sum((w[-1][0] == 'flip') == (t[1][0] == 'flip') for w, t in pairs)
    assert near(same_size, 1 / 11, 3000) and near(same_flip, 1 / 2, 3000)


# --- matrices (spec 36, 43) ------------------------------------------------------------

OPS = [
    ('resize', 64),
    ('resize', 133),
    ('flip', None),
    ('translate_x', 0.083),
    ('translate_x', -0.1),
    ('translate_y', 0.037),
    ('rotate', 30.0),
    ('rotate', -17.3),
    ('shear', (0.48, -0.3)),
    ('shear', (-0.2, 0.48)),
    ('shear', (0.0, 0.3)),
    *[(c, 5) for c in COLOR_OPS],
]


@pytest.mark.parametrize('op', OPS, ids=lambda o: f'{o[0]}-{o[1]}')
@pytest.mark.parametrize('x, y', [(40, 35), (62, 50), (75, 30)])
def test_marker_one_op(op, x, y):
    view = render(sample(image=marker(x, y, 120, 90)), [op], replace(SMALL, max_side=400), raw=True)
    where, d = find(view.image)
    told = (view.matrix @ torch.tensor([x + 0.5, y + 0.5, 1.0], dtype=torch.float64)).numpy()[:2]
    if op[0] in ('posterize', 'solarize') and d.sum() == 0:
        pytest.fail('marker lost')
    assert np.abs(where - told).max() < 0.15, (where, told)  # far below the pixel that is asked for


@pytest.mark.parametrize('seed', range(60))
def test_marker_random_chains(seed):
    "Long chains in any order, with the marker kept inside"
    r = random.Random(seed)
    ops = [('resize', r.choice((150, 170, 200)))]
    for _ in range(4):
        g = r.choice(('resize', 'flip', 'translate_x', 'translate_y', 'rotate', 'shear'))
        ops.append(
            (
                g,
                dict(
                    resize=r.choice((140, 180, 220)),
                    flip=None,
                    rotate=r.uniform(-30, 30),
                    shear=(r.uniform(-0.2, 0.2), r.uniform(-0.2, 0.2)),
                ).get(g, r.uniform(-0.1, 0.1)),
            )
        )
    x, y = r.randint(90, 150), r.randint(80, 120)
    view = render(sample(image=marker(x, y, 240, 200, r=4)), ops, scaled_views(200), raw=True)
    told = (view.matrix @ torch.tensor([x + 0.5, y + 0.5, 1.0], dtype=torch.float64)).numpy()[:2]
    h, w = view.size
    if not (20 < told[0] < w - 20 and 20 < told[1] < h - 20):
        pytest.skip('marker near or over the edge')
    assert np.abs(find(view.image)[0] - told).max() < 0.5


@pytest.mark.parametrize('kind', [weak_view, labelled_view, strong_view])
def test_marker_in_real_views(kind):
    cfg, found = replace(scaled_views(200), erase_patches=(0, 0)), 0
    for seed in range(80):
        x, y = 100 + seed % 30, 90 + seed % 17
        view = kind(sample(image=marker(x, y, 240, 200, r=4)), cfg, seed, raw=True)
        where, d = find(view.image)
        told = (view.matrix @ torch.tensor([x + 0.5, y + 0.5, 1.0], dtype=torch.float64)).numpy()[:2]
        if d.max() == 0 or (kind is strong_view and any(n in COLOR_OPS[1:] for n, _ in view.ops[:-1])):
            continue  # colour before a warp: its fill differs from the background
        found += 1
        assert np.abs(where - told).max() < 0.5, (view.ops, where, told)
    assert found > 30


def test_between_views_carries_a_marker():
    cfg = replace(scaled_views(200), erase_patches=(0, 0))
    for seed in range(20):
        s = sample(image=marker(120, 100, 240, 200, r=4))
        w, t = (
            weak_view(s, cfg, seed, raw=True),
            render(s, [o for o in draw_ops('strong', seed, cfg) if o[0] not in COLOR_OPS], cfg, raw=True),
        )
        p = between_views(w.matrix, t.matrix) @ torch.tensor([*find(w.image)[0], 1.0])
        assert np.abs(p.numpy()[:2] - find(t.image)[0]).max() < 0.6
    box = torch.tensor([[50.0, 40, 90, 80]])
    there, _ = transform_boxes(box, between_views(w.matrix, w.matrix), w.size)
    assert torch.allclose(there, box, atol=1e-4)


def test_matrices_are_float64_and_composed_from_the_left():
    s = sample()
    ops = [('resize', 120), ('flip', None), ('shear', (0.1, 0.2)), ('translate_x', 0.1)]
    m, size = np.eye(3), (90, 120)
    for n, v in ops:
        m = op_matrix(n, v, size, SMALL) @ m
        if n == 'resize':
            size = resize_to(size, v, SMALL)
    view = render(s, ops, SMALL)
    assert (
        view.matrix.dtype == torch.float64
        and np.allclose(view.matrix, m, atol=1e-12)
        and view.size == size == tuple(view.image.shape[-2:])
    )


def test_against_torchvision_boxes():
    "torchvision's own boxes, moved by its own functions, agree"
    boxes = tv_tensors.BoundingBoxes(
        torch.tensor([[10.0, 20, 30, 40], [50, 10, 110, 80]]), format='XYXY', canvas_size=(90, 120)
    )
    s = sample(boxes=boxes.tolist())
    assert torch.allclose(
        render(s, [('flip', None)], SMALL).boxes,
        F.horizontal_flip(boxes).as_subclass(torch.Tensor),
        atol=1e-4,
    )
    small = render(s, [('resize', 45)], replace(SMALL, min_side=16))
    assert torch.allclose(small.boxes, F.resize(boxes, [45, 60]).as_subclass(torch.Tensor), atol=1e-4)
    for name, value, kw in (
        ('rotate', 20.0, dict(angle=20.0)),
        ('translate_x', 0.1, dict(translate=[12.0, 0.0])),
        ('translate_y', -0.1, dict(translate=[0.0, -9.0])),
    ):
        args = dict(angle=0.0, translate=[0.0, 0.0], scale=1.0, shear=[0.0, 0.0]) | kw
        got = render(s, [(name, value)], replace(SMALL, min_box=-1)).boxes
        expected = F.clamp_bounding_boxes(F.affine(boxes, **args)).as_subclass(torch.Tensor)
        assert torch.allclose(got, expected, atol=1e-2), name


def test_warp_against_grid_sample():
    "The same picture as torch's sampler makes of the inverse matrix, away from the border"
    s = sample(seed=3)
    smooth = s.image.resize((120, 90), Image.Resampling.BICUBIC, box=(40, 30, 70, 60))
    for op in (('rotate', 25.0), ('shear', (0.3, -0.2)), ('translate_x', 0.07)):
        m = op_matrix(*op, (90, 120), SMALL)
        norm = np.array([[2 / 120, 0, -1], [0, 2 / 90, -1], [0, 0, 1]])
        theta = torch.tensor((norm @ np.linalg.inv(m) @ np.linalg.inv(norm))[:2], dtype=torch.float32)
        x = F.pil_to_tensor(smooth).float()[None]
        grid = torch.nn.functional.affine_grid(theta[None], x.shape, align_corners=False)
        want = torch.nn.functional.grid_sample(x - 125, grid, align_corners=False)[0] + 125
        inside = torch.nn.functional.grid_sample(torch.ones_like(x), grid, align_corners=False)[0] > 0.999
        got = render(sample(image=smooth), [op], SMALL, raw=True).image.float()
        assert inside.float().mean() > 0.5 and (got - want)[inside].abs().max() <= 2


def test_fill_and_canvas():
    white = sample(image=Image.new('RGB', (100, 80), (255,) * 3))
    for op in (('translate_x', 0.1), ('translate_y', -0.1), ('rotate', 30.0), ('shear', (0.3, 0.3))):
        x = render(white, [op], SMALL, raw=True).image
        assert (
            x.shape == (3, 80, 100)
            and set(x.unique().tolist()) >= {125, 255}
            and ((x == 125) | (x == 255)).float().mean() > 0.95
        )
    assert (render(white, [('translate_x', 0.1)], SMALL, raw=True).image[:, :, :10] == 125).all()


# --- colours ---------------------------------------------------------------------------


def test_colors_are_the_ones_of_torchvision_tensors():
    "Pillow's and torchvision's tensor kernels: two implementations"
    s = sample(seed=1)
    x = F.pil_to_tensor(s.image).contiguous()
    for name, want in (
        ('identity', x),
        ('autocontrast', F.autocontrast(x)),
        ('equalize', F.equalize(x)),
        ('solarize', F.solarize(x, 128)),
        ('posterize', F.posterize(x, 2)),
        ('color', F.adjust_saturation(x, 1.0)),
        ('brightness', F.adjust_brightness(x, 1.0)),
    ):
        got = render(s, [(name, 5)], SMALL, raw=True).image
        assert (got.int() - want.int()).abs().max() <= 1, name
    low, high = (render(s, [('contrast', m)], SMALL, raw=True).image.float() for m in (1, 9))
    assert low.std() < 0.4 * x.float().std() < x.float().std() < high.std()
    blur, sharp = (
        render(s, [('sharpness', m)], SMALL, raw=True).image.float().diff(dim=-1).abs().mean() for m in (1, 9)
    )
    assert blur < x.float().diff(dim=-1).abs().mean() < sharp


# --- boxes -----------------------------------------------------------------------------


def test_boxes_follow_and_degenerate_ones_go():
    s = sample(
        100,
        100,
        [[10, 20, 30, 40], [95, 0, 100, 50], [0, 0, 100, 100], [40, 40, 60, 60]],
        ignore=[False, False, False, True],
    )
    v = render(s, [('translate_x', 0.1)], SMALL)
    assert v.boxes.tolist() == [[20, 20, 40, 40], [10, 0, 100, 100]] and v.labels.tolist() == [
        0,
        2,
    ]  # pushed out; ignored
    assert render(s, [('translate_x', 0.045)], SMALL).labels.tolist() == [0, 2]  # half a pixel is left
    assert render(s, [('translate_x', 0.03)], SMALL).labels.tolist() == [0, 1, 2]  # two pixels are left
    assert len(render(s, [('translate_x', 0.1)], replace(SMALL, min_box=-1)).boxes) == 3
    assert v.boxes.dtype == torch.float32 and v.labels.dtype == torch.int64


def test_no_boxes():
    for make in (labelled_view, weak_view, strong_view):
        v = make(sample(boxes=()), SMALL, 0)
        assert v.boxes.shape == (0, 4) and v.labels.shape == (0,)


def test_erasing_leaves_boxes_and_stays_in_the_image():
    s = sample(100, 80, image=Image.new('RGB', (100, 80), (0,) * 3))
    for v, u in ((0.0, 0.0), (0.999999, 0.999999), (0.5, 0.3)):
        out = render(s, [('erase', ((0.19999, v, u),))], SMALL, raw=True)
        gone = (out.image == 125).all(0)
        assert gone.sum() == 15 * 19 and torch.equal(out.boxes, s.boxes)  # int(.19999*80) x int(.19999*100)
    assert (np.asarray(s.image) == 0).all()  # the sample's own image is untouched


# --- sizes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    'size, short, cfg, want',
    [
        ((480, 640), 800, COCO, (800, 1067)),
        ((480, 1280), 800, COCO, (500, 1333)),
        ((30, 40), 800, COCO, (800, 1067)),  # upscaled
        ((1000, 20), 96, scaled_views(96), (160, 32)),
        ((1, 1), 96, scaled_views(96), (96, 96)),
        ((96, 96), 96, scaled_views(96), (96, 96)),
    ],
)
def test_sizes(size, short, cfg, want):
    assert resize_to(size, short, cfg) == want
    v = render(sample(size[1], size[0], boxes=()), [('resize', short)], cfg)
    assert v.size == want and v.orig_size == size
    corner = v.matrix @ torch.tensor([size[1], size[0], 1.0], dtype=torch.float64)
    assert torch.allclose(
        corner, torch.tensor([want[1], want[0], 1.0], dtype=torch.float64)
    )  # the matrix knows the stretch


def test_eval_view_and_normalisation():
    s = sample(100, 80)
    cfg = scaled_views(160, mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 0.5))
    v = eval_view(s, cfg)
    assert v.size == (160, 200) and v.image.dtype == torch.float32 and v.image.is_contiguous()
    x = eval_view(s, cfg, raw=True).image.float() / 255
    assert torch.allclose(v.image, F.normalize(x, cfg.mean, cfg.std), atol=1e-5)
    assert torch.equal(normalize_image(eval_view(s, cfg, raw=True).image, cfg), v.image)


def test_scaled():
    assert scaled_views(800).short_sides == COCO.short_sides and scaled_views(800).max_side == 1334
    assert scaled_views(96, smallest=1).short_sides == (96,) and scaled_views(96, steps=1).short_sides == (
        96,
    )
    assert scaled_views(96, flip=0.0).flip == 0 and scaled_views(96, max_side=96).max_side == 96


@pytest.mark.parametrize(
    'kw',
    [
        dict(short_sides=()),
        dict(short_sides=(16,)),
        dict(eval_short=2000),
        dict(flip=2.0),
        dict(fill=300),
        dict(std=(0, 1, 1)),
        dict(mean=(1,)),
        dict(erase_patches=(3, 1)),
        dict(erase_side=1.0),
        dict(pad_multiple=0),
    ],
)
def test_bad_configs(kw):
    with pytest.raises(ConfigError) as e:
        ViewConfig(**kw)
    assert '\n' not in str(e.value)


def test_config_from_json_lists():
    assert ViewConfig(short_sides=[480], mean=[0.5] * 3) == ViewConfig(short_sides=(480,), mean=(0.5,) * 3)


# --- purity ----------------------------------------------------------------------------


def test_pure_function_of_sample_config_seed():
    s = sample(seed=5)
    before = np.asarray(s.image).copy()
    state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    for make in (labelled_view, weak_view, strong_view):
        a = make(s, SMALL, 11)
        torch.rand(3)
        random.random()
        np.random.rand()
        b = make(s, SMALL, 11)
        assert (
            torch.equal(a.image, b.image)
            and torch.equal(a.boxes, b.boxes)
            and a.ops == b.ops
            and torch.equal(a.matrix, b.matrix)
        )
        assert any(make(s, SMALL, k).ops != a.ops for k in range(3))
    torch.set_rng_state(state[0])
    random.setstate(state[2])
    for k in range(30):
        strong_view(s, SMALL, k)
    assert (
        torch.equal(torch.get_rng_state(), state[0])
        and random.getstate() == state[2]
        and (np.asarray(s.image) == before).all()
    )
    assert torch.equal(s.boxes, sample().boxes)


def test_draws_are_frozen():
    "A change of these would change every run that is resumed or repeated"
    assert draw_ops('weak', 0, COCO) == (('resize', 608), ('flip', None))
    assert [n for n, _ in draw_ops('strong', 0, COCO)] == [
        'resize',
        'flip',
        'translate_x',
        'equalize',
        'erase',
    ]


def test_any_mode_and_pickle():
    grey = sample(image=Image.new('L', (100, 80), 7))
    v = pickle.loads(pickle.dumps(strong_view(grey, SMALL, 0)))
    assert v.image.shape[0] == 3
    assert pickle.loads(pickle.dumps(COCO)) == COCO
