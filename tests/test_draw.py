"Drawing: every kind of image, zero boxes, and colours checked in the pixels"

import subprocess, sys
from pathlib import Path
import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt, numpy as np, pytest, torch
from matplotlib.colors import to_hex, to_rgb
from PIL import Image
from semidetr.core import ConfigError, DataError
from semidetr.draw import (
    COLORS,
    STYLES,
    compare,
    curve,
    dots,
    draw_boxes,
    draw_matches,
    draw_mixture,
    draw_on_image,
    draw_points,
    image_grid,
    show_image,
    to_pil,
)

H, W = 40, 60
RGB = np.random.default_rng(0).integers(0, 256, (H, W, 3)).astype(np.uint8)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NORMAL = (torch.tensor(RGB).permute(2, 0, 1) / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[
    :, None, None
]
NAN = float('nan')
NONE = [torch.zeros(0, 4), [], None, np.zeros((0, 4))]


def rgb(kind):
    return tuple(round(255 * v) for v in to_rgb(COLORS[kind]))


@pytest.fixture
def ax():
    fig, ax = plt.subplots(dpi=50)
    yield ax
    fig.canvas.draw()
    plt.close(fig)  # everything drawn can also be rendered


def test_colour_code():
    assert (
        COLORS['student'] == '#1f77b4'
        and COLORS['teacher'] == '#ff7f0e'
        and COLORS['truth'] == '#2ca02c'
        and STYLES['mined'] == '--'
    )
    assert set(STYLES) == set(COLORS)
    with pytest.raises(ConfigError, match="did you mean 'teacher'"):
        draw_on_image(Image.new('RGB', (9, 9)), None, kind='teachr')


# --- images ----------------------------------------------------------------------------
KINDS = dict(
    pil=Image.fromarray(RGB),
    hwc=RGB,
    hwc_tensor=torch.tensor(RGB),
    chw=torch.tensor(RGB).permute(2, 0, 1),
    chw_array=RGB.transpose(2, 0, 1),
    unit=torch.tensor(RGB).permute(2, 0, 1) / 255,
    unit_array=RGB / 255,
    half=(torch.tensor(RGB).permute(2, 0, 1) / 255).double(),
)


@pytest.mark.parametrize('name', KINDS)
def test_all_kinds_of_images(name, ax):
    assert (np.asarray(to_pil(KINDS[name])) == RGB).all()
    show_image(ax, KINDS[name], title=name)
    assert (*ax.get_xlim(), *ax.get_ylim()) == (0, W, H, 0)


def test_normalised_images(ax):
    assert (np.asarray(to_pil(NORMAL, MEAN, STD)) == RGB).all()
    show_image(ax, NORMAL.requires_grad_(), MEAN, STD)
    with pytest.raises(DataError, match='mean and std'):
        to_pil(NORMAL)
    bad = NORMAL.detach().clone()
    bad[0, 0, 0] = NAN
    with pytest.raises(DataError, match='NaN'):
        to_pil(bad, MEAN, STD)


def test_grey_alpha_palette_and_tiny():
    for img in (RGB[..., 0], torch.tensor(RGB[..., 0])[None], RGB[..., :1], Image.fromarray(RGB[..., 0])):
        assert (np.asarray(to_pil(img)) == RGB[..., :1]).all()
    for mode in ('RGBA', 'P', 'CMYK', '1', 'L'):
        assert to_pil(Image.fromarray(RGB).convert(mode)).mode == 'RGB'
    assert to_pil(torch.zeros(3, 1, 1)).size == (1, 1)
    three = torch.zeros(3, 5, 3, dtype=torch.uint8)  # ambiguous: a tensor is CHW, an array HWC
    assert to_pil(three).size == (3, 5) and to_pil(three.numpy()).size == (5, 3)


@pytest.mark.parametrize('bad', [torch.zeros(2, 3, 8, 8), torch.zeros(5, 8, 8), torch.zeros(8)])
def test_what_is_no_image(bad):
    with pytest.raises(DataError, match='shape'):
        to_pil(bad)


# --- boxes on axes ---------------------------------------------------------------------
@pytest.mark.parametrize('none', NONE)
def test_zero_boxes(none, ax):
    assert draw_boxes(ax, none, torch.zeros(0), torch.zeros(0), ['a']) == [] and not ax.texts
    assert draw_on_image(RGB, none, [], [], ['a']).tobytes() == RGB.tobytes()
    image_grid([RGB], [none]).canvas.draw()
    compare([RGB], {'student': [none]}, [none]).canvas.draw()
    assert draw_matches(ax, none, none, ([], [])) == []


@pytest.mark.parametrize('kind', COLORS)
def test_draw_boxes(kind, ax):
    r = draw_boxes(
        ax,
        torch.tensor([[1.0, 2, 11, 22], [NAN, 0, 1, 1], [30, 20, 20, 10]]),
        torch.tensor([1, 0, 7]),
        [0.25, 0.5, NAN],
        ['cat', 'dog'],
        kind,
    )
    assert [p.get_bbox().extents.tolist() for p in r] == [[1, 2, 11, 22], [20, 10, 30, 20]]
    assert {to_hex(p.get_edgecolor()) for p in r} == {COLORS[kind]} and {p.get_linestyle() for p in r} == {
        STYLES[kind]
    }
    assert [t.get_text() for t in ax.texts] == [
        'dog 0.25',
        '7 nan',
        '1 not finite',
    ]  # an unknown class is its number, a NaN score is seen


def test_grid(ax):
    fig = image_grid(
        [RGB] * 5,
        {
            'truth': [[[1, 1, 5, 5]]] * 5,
            'student': [None] * 4
            + [{'boxes': torch.tensor([[2.0, 2, 9, 9]]), 'scores': torch.tensor([0.5])}],
        },
        titles='abcde',
        ncols=3,
    )
    assert (
        [len(a.patches) for a in fig.axes] == [1, 1, 1, 1, 2, 0]
        and fig.axes[4].get_title() == 'e'
        and fig.axes[4].texts[0].get_text() == '0.50'
    )
    assert not plt.fignum_exists(fig.number)  # closed: shown once, never leaked
    image_grid(
        [NORMAL.detach()],
        [torch.tensor([[1.0, 1, 2, 2]])],
        [torch.tensor([0])],
        [torch.tensor([0.5])],
        ['a'],
        mean=MEAN,
        std=STD,
    ).canvas.draw()
    image_grid([]).canvas.draw()


# --- compare ---------------------------------------------------------------------------
def det(*rows):
    return dict(
        boxes=torch.tensor([r[:4] for r in rows]).float().reshape(-1, 4),
        labels=torch.tensor([int(r[4]) for r in rows]),
        scores=torch.tensor([float(r[5]) for r in rows]),
    )


def test_compare_by_id_by_place_and_by_sample():
    a, b = det((1, 1, 9, 9, 0, 0.9), (1, 1, 5, 5, 1, 0.1), (2, 2, 6, 6, 1, NAN)), det()
    t = {'boxes': torch.tensor([[1.0, 1, 9, 9]]), 'labels': torch.tensor([0])}

    class S:
        def __init__(self, i):
            self.image, self.image_id, self.boxes, self.labels = (
                Image.fromarray(RGB),
                i,
                t['boxes'],
                t['labels'],
            )

    for fig in (
        compare(
            {'x': RGB, 'y': RGB},
            {'student': {'x': a}, 'teacher': {'x': b, 'y': a}},
            {'x': t, 'y': t},
            ['c', 'd'],
        ),
        compare([RGB, RGB], {'student': [a, None], 'teacher': [b, a]}, [t, t], ['c', 'd']),
        compare([S('x'), S('y')], {'student': {'x': a}, 'teacher': {'x': b, 'y': a}}, classes=['c', 'd']),
    ):
        assert [p.get_title() for p in fig.axes] == ['truth', 'student', 'teacher', '', '', '']
        assert [len(p.patches) for p in fig.axes] == [
            1,
            1 + 2,
            1,
            1,
            1,
            1 + 2,
        ]  # a NaN score is drawn, a low one is not
        assert (
            to_hex(fig.axes[1].patches[-1].get_edgecolor()) == COLORS['student']
            and to_hex(fig.axes[5].patches[-1].get_edgecolor()) == COLORS['teacher']
        )
        assert [x.get_text() for x in fig.axes[1].texts] == ['c 0.90', 'd nan']
        fig.canvas.draw()
    fig = compare([RGB], {'ours': [a]}, [t], threshold=0, kinds={'ours': 'mined'})
    assert len(fig.axes[1].patches) == 4 and fig.axes[1].patches[-1].get_linestyle() == '--'
    compare([], {'student': []}, []).canvas.draw()
    assert [len(p.patches) for p in compare([RGB], {'student': [a]}).axes] == [0, 2]  # no truth known


# --- pixels ----------------------------------------------------------------------------
def frame(x1, y1, x2, y2, width=1):
    m = np.zeros((H, W), bool)
    m[y1:y2, x1:x2] = True
    m[y1 + width : y2 - width, x1 + width : x2 - width] = False
    return m


@pytest.mark.parametrize('kind', ['student', 'teacher', 'truth'])
@pytest.mark.parametrize('width', [1, 3])
def test_pixels_of_the_frame(kind, width):
    grey = Image.new('RGB', (W, H), (9, 9, 9))
    out = np.asarray(draw_on_image(grey, [[5, 7, 25, 30]], kind=kind, width=width))
    on = (out == rgb(kind)).all(-1)
    assert (on == frame(5, 7, 25, 30, width)).all() and (out[~on] == 9).all()
    assert grey.getextrema() == ((9, 9),) * 3  # a copy was drawn on


def test_pixels_of_mined_are_dashed():
    on = (
        np.asarray(draw_on_image(Image.new('RGB', (W, H)), [[5, 7, 45, 35]], kind='mined', width=1))
        == rgb('mined')
    ).all(-1)
    full = frame(5, 7, 45, 35)
    assert not (on & ~full).any() and 0.4 < on.sum() / full.sum() < 0.6
    for line in (on[7, 5:45], on[34, 5:45], on[7:35, 5], on[7:35, 44]):
        assert 2 <= np.abs(np.diff(line.astype(int))).sum()  # on every side


@pytest.mark.parametrize(
    'box,want',
    [
        ([-10, -10, 200, 200], (0, 0, W, H)),
        ([0, 0, W, H], (0, 0, W, H)),
        ([5.4, 7.2, 24.6, 29.5], (5, 7, 25, 30)),
        ([25, 30, 5, 7], (5, 7, 25, 30)),
        ([10, 10, 11, 11], (10, 10, 11, 11)),
        ([10, 10, 10, 10], (10, 10, 11, 11)),
        ([W, H, W, H], (W - 1, H - 1, W, H)),
        ([500, 5, 600, 9], (W - 1, 5, W, 9)),
        ([-9, -9, -2, -2], (0, 0, 1, 1)),
    ],
)
def test_odd_boxes_in_pixels(box, want):
    on = (
        np.asarray(draw_on_image(Image.new('RGB', (W, H)), [box], kind='truth', width=1)) == rgb('truth')
    ).all(-1)
    assert (on == frame(*want)).all()


def test_not_finite_is_written_in_red():
    out = np.asarray(
        draw_on_image(Image.new('RGB', (200, 100)), torch.tensor([[NAN, 0, 5, 5], [0, 0, float('inf'), 5]]))
    )
    assert (out[..., 0] > 200).any() and out[..., 1:].max() == 0 and not (out == rgb('student')).all(-1).any()


def test_captions_lie_inside():
    for size in ((12, 12), (300, 40), (1333, 800)):
        img = Image.new('RGB', size)
        out = np.asarray(
            draw_on_image(
                img,
                [[size[0] - 3, 0, size[0], size[1]], [0, 0, 2, 2]],
                [0, 5],
                [0.5, 0.25],
                ['ein sehr langer Name é'],
                'teacher',
            )
        )
        assert out.shape == (size[1], size[0], 3) and (out == rgb('teacher')).all(-1).any()
    a = np.asarray(draw_on_image(Image.new('RGB', (200, 100)), [[50, 50, 90, 90]], [0], None, ['cat']))
    b = np.asarray(draw_on_image(Image.new('RGB', (200, 100)), [[50, 50, 90, 90]], [0], None, ['dog']))
    assert (a[:50] != b[:50]).any() and (a[50:] == b[50:]).all()  # the caption stands above the box


def test_draw_on_image_needs_no_matplotlib():
    code = (
        "import sys\nfrom semidetr.draw import draw_on_image, to_pil\nfrom PIL import Image\n"
        "draw_on_image(Image.new('RGB', (50, 50)), [[1, 1, 9, 9]], [0], [.5], ['a'])\n"
        "assert 'matplotlib' not in sys.modules\n"
        "assert not {'nbdev', 'fastcore', 'IPython'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, '-c', code], check=True, cwd=Path(__file__).resolve().parents[1])


# --- curves ----------------------------------------------------------------------------
def test_curve_mean_spread_and_n(ax):
    y = np.array([[1.0, 2, 4], [3.0, 2, 8], [5, 2, 0]])
    line = curve(ax, [0, 1, 2], y, 'ours', 'teacher')
    assert (
        line.get_ydata().tolist() == [3, 2, 4]
        and line.get_label() == 'ours (n=3)'
        and line.get_color() == COLORS['teacher']
    )
    band = ax.collections[0].get_paths()[0].vertices
    assert {(0.0, 1.0), (0.0, 5.0), (1.0, 2.0), (2.0, 0.0), (2.0, 8.0)} <= {
        tuple(map(float, v)) for v in band.round(9)
    }  # n-1 in the denominator
    assert (
        curve(ax, [0, 1], [[1, 2]], 'a', 'mined').get_linestyle() == '--' and len(ax.collections) == 1
    )  # one run: no band
    assert (
        curve(ax, [0, 1], [1.0, 2.0]).get_label() == ' (n=1)'
        and curve(ax, [0, 1], []).get_label() == ' (n=0)'
    )
    gap = curve(ax, [0, 1], torch.tensor([[1.0, NAN], [1, 2]]), color='k')
    assert np.isnan(gap.get_ydata()).tolist() == [False, True] and gap.get_color() == 'k'
    with pytest.raises(DataError, match="'x': 3 steps but a run of 2"):
        curve(ax, [0, 1, 2], [[1, 2]], 'x')
    with pytest.raises(DataError, match="'x'"):
        curve(ax, [0, 1, 2], [[1, 2, 3], [1, 2]], 'x')
    with pytest.raises(ConfigError):
        curve(ax, [0], [[1]], 'x', 'nobody')


def test_dots(ax):
    dots(ax, {'a': [1, 2, 3], 'b': [5.0], 'c': []}, paper={'a': 4, 'z': 9}, kinds={'b': 'teacher'})
    assert [t.get_text() for t in ax.get_yticklabels()] == [
        'a (n=3)',
        'b (n=1)',
        'c (n=0)',
    ] and ax.get_ylim() == (2.5, -0.5)
    rings = [l for l in ax.lines if l.get_markeredgecolor() == COLORS['paper']]
    assert [r.get_xdata().tolist() for r in rings] == [[4]]


def test_matches_points_mixture(ax):
    lines = draw_matches(
        ax,
        [[0, 0, 4, 4], [9, 9, 9, 9]],
        torch.tensor([[10.0, 10, 20, 30]]),
        (torch.tensor([1]), torch.tensor([0])),
        weights=[0.0],
    )
    assert lines[0].get_xydata().tolist() == [[9, 9], [15, 20]] and lines[0].get_alpha() == 0.05
    assert (
        len(draw_matches(ax, [[0, 0, 4, 4]], [[1, 1, 2, 2]], ([0], [0], [0.5]))) == 1
    )  # a third entry (weights of the matcher) is allowed
    assert (
        draw_points(ax, torch.rand(2, 3, 2).view(-1, 2)).get_sizes().tolist() == [60] * 6
        and len(draw_points(ax, torch.zeros(0, 2)).get_sizes()) == 0
    )
    for v, k in (([], 0), ([1.0], 1), (torch.randn(30), 2)):
        draw_mixture(ax, v, [0.0] * k, [1.0] * k, [1 / max(k, 1)] * k, threshold=0.5)
