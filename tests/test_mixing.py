"Mixed views: geometry, erasing, cache, what reaches the student, exact resume, off is off"

import dataclasses
import math
import random
import pytest
import torch
from semidetr.boxes import cxcywh_to_xyxy, denormalize_boxes, normalize_boxes
from semidetr.core import ConfigError
from semidetr.data.augment import ViewConfig, image_bytes, normalize_image
from semidetr.semi import mixing as M
from semidetr.semi.methods import MeanTeacher, SemiDETR, Supervised
from semidetr.semi.mining import MiningConfig, mean_std
from semidetr.semi.mixing import Mixing, MixingConfig, Unmixed, build_mixing, mixing_needs
from semidetr.semi.variants import earlier_filter
from semidetr.train import trainer as T
from semidetr.train.checkpoint import load_checkpoint
from semidetr.train.config import LEGACY_DEFAULTS, Config, config_hash, override, preset, to_dict
from test_methods import nets, small  # noqa: F401 (a fixture)
from test_trainer import tiny
from together import run_together

VIEW = ViewConfig(
    short_sides=(64,),
    eval_short=64,
    max_side=160,
    flip=0.5,
    erase_patches=(0, 0),
    mean=(0.5,) * 3,
    std=(0.5,) * 3,
)
BARE = dict(erase_patches=(0, 0))
ON = ['mixing.mixup=1', 'mixing.mosaic=1', 'view.erase_patches=[0,0]']


def marked(size, box, value=255):
    "A black view with a bright rectangle, and its box"
    x1, y1, x2, y2 = box
    image = torch.zeros(3, *size, dtype=torch.uint8)
    image[:, y1:y2, x1:x2] = value
    return normalize_image(image, VIEW), torch.tensor([box], dtype=torch.float32)


def part_of(views, ids=None, scores=1.0):
    "One part of a batch, padded, and its targets with boxes"
    h, w = (max(x.shape[k] for x, _ in views) for k in (1, 2))
    images = torch.zeros(len(views), 3, h, w)
    targets = []
    for i, (out, (x, boxes)) in enumerate(zip(images, views)):
        size = tuple(x.shape[-2:])
        out[:, : size[0], : size[1]] = x
        matrix = torch.eye(3, dtype=torch.float64)
        target = dict(image_id=ids[i] if ids else i, orig_size=size, size=size, matrix=matrix)
        rows = dict(boxes=normalize_boxes(boxes, size), labels=torch.arange(len(boxes)))
        targets.append(target | rows | dict(scores=torch.full((len(boxes),), scores)))
    return dict(images=images, mask=torch.zeros(len(views), h, w, dtype=torch.bool), targets=targets)


def random_part(n, seed):
    r = random.Random(seed)
    views = []
    for _ in range(n):
        h, w = r.randint(40, 70), r.randint(40, 90)
        x, y = r.randint(2, w - 22), r.randint(2, h - 22)
        views.append(marked((h, w), (x, y, x + r.randint(8, 18), y + r.randint(8, 18))))
    return part_of(views)


def filled(cfg, n=2, seed=0):
    mixing, k = Mixing(cfg, VIEW, n, seed), 0
    while not mixing.full:
        part = random_part(n, 100 + k)
        mixing.add(part, part['targets'])
        k += 1
    return mixing


# --- values of the specification -------------------------------------------------------


def test_values_of_the_specification():
    box = torch.tensor([[10.0, 10, 30, 30]])
    shares = [float(M.erased_share(box, torch.tensor([[0, 0, x, 30]]))) for x in (25, 24)]
    assert [round(s, 6) for s in shares] == [0.75, 0.7]
    assert M.fit_into((208, 156), (150, 150)) == (150, 112)
    canvas, places = M.mosaic_layout([(150, 112), (104, 150), (150, 150), (130, 120)])
    assert canvas == (320, 320) and places == [(48, 10), (160, 56), (10, 160), (160, 160)]
    small = preset('small')
    assert round(small.mixing.tile * small.view.eval_short) == 128


@pytest.mark.parametrize('x2,left', [(25, 0), (24, 0), (23, 1)])
def test_a_box_is_dropped_from_seven_tenths(x2, left):
    none = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0).long(), scores=torch.zeros(0))
    (t,) = part_of([marked((40, 50), (10, 10, 30, 30))])['targets']
    t |= dict(source=torch.tensor([0]), others=none, patches=torch.tensor([[0, 0, x2, 30]]))
    (out,) = M.complete([t], None, 0.7)
    assert len(out['boxes']) == len(out['labels']) == len(out['scores']) == len(out['source']) == left


def test_overlapping_patches_count_twice_and_no_patch_covers_nothing():
    box = torch.tensor([[0.0, 0, 10, 10]])
    assert float(M.erased_share(box, torch.tensor([[0, 0, 5, 8]] * 2))) == pytest.approx(0.8)
    assert M.erased_share(box, torch.zeros(0, 4)).tolist() == [0.0]
    assert M.erased_share(torch.zeros(0, 4), torch.tensor([[0, 0, 5, 5]])).shape == (0,)


# --- geometry --------------------------------------------------------------------------


def test_fit_into_is_the_largest_that_fits():
    r = random.Random(0)
    for _ in range(500):
        size, tile = ((r.randint(1, 300), r.randint(1, 300)) for _ in range(2))
        h, w = M.fit_into(size, tile)
        assert h <= tile[0] and w <= tile[1] and (h == tile[0] or w == tile[1])
        s = min(tile[0] / size[0], tile[1] / size[1])
        assert abs(h - s * size[0]) <= 1 and abs(w - s * size[1]) <= 1


def test_tiles_touch_at_the_centre_and_stay_on_the_canvas():
    r = random.Random(1)
    for _ in range(200):
        sizes = [(r.randint(1, 200), r.randint(1, 200)) for _ in range(4)]
        (H, W), places = M.mosaic_layout(sizes)
        assert H % 32 == W % 32 == 0
        for j, ((h, w), (x, y)) in enumerate(zip(sizes, places)):
            assert 0 <= x and 0 <= y and x + w <= W and y + h <= H
            corner = x if j % 2 else x + w, y if j > 1 else y + h
            assert corner == (W // 2, H // 2)


def centre(image):
    "Centre and size of the bright pixels of a view"
    light = image[0] > image[0].max() - 0.1
    ys, xs = light.any(1).nonzero().flatten(), light.any(0).nonzero().flatten()
    return [int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1]


@pytest.mark.parametrize('seed', range(6))
def test_boxes_stay_on_their_objects(seed):
    "Both views of a blend are searched for their bright rectangle, each against a black other view"
    cfg, size, other = MixingConfig(mixup=1.0, mosaic=0, **BARE), (50, 64), (60, 41)
    black = marked(size, (0, 0, 1, 1), 0)[0], marked(other, (0, 0, 1, 1), 0)[0]
    seen, earlier = marked(size, (12, 20, 30, 33)), marked(other, (5, 30, 25, 52))
    for now, before in ((seen, (black[1], earlier[1])), ((black[0], seen[1]), earlier)):
        mixing = Mixing(cfg, dataclasses.replace(VIEW, fill=0), 1, seed)
        for _ in range(mixing.capacity):
            mixing.add(part_of([before]), part_of([before])['targets'])
        part = part_of([now])
        mixed = mixing.strong(part)
        (t,), image = mixed['targets'], mixed['images'][0]
        assert t['size'] == (60, 64) == tuple(image.shape[-2:])
        own = M.transform_boxes(now[1], t['matrix'], t['size'])[0]
        box = own if now is seen else t['others']['boxes']
        assert centre(image) == box[0].round().int().tolist()


def test_a_blend_is_half_of_each():
    a, b = (torch.rand(3, 30, 40) for _ in range(2))
    cfg = MixingConfig(mixup=1.0, **BARE)
    view = dataclasses.replace(VIEW, flip=0.0)
    mixing = Mixing(cfg, view, 1)
    none = torch.zeros(0, 4)
    for _ in range(mixing.capacity):
        mixing.add(part_of([(b, none)]), part_of([(b, none)])['targets'])
    mixed = mixing.strong(part_of([(a, none)]))['images'][0]
    assert torch.allclose(mixed, (a + b) / 2, atol=1 / 255)


@pytest.mark.parametrize('seed', range(4))
def test_objects_of_a_mosaic_are_in_their_boxes(seed):
    cfg = MixingConfig(mosaic=1, **BARE)
    mixing = filled(cfg, seed=seed)
    part = mixing.mosaic()
    (t,), image = part['targets'], part['images'][0]
    boxes = denormalize_boxes(t['boxes'], t['size'])
    assert len(boxes) == 4 and not part['mask'].any() and t['size'] == tuple(image.shape[-2:])
    light = image[0] > 0.5
    for x1, y1, x2, y2 in boxes.tolist():
        inner = light[math.ceil(y1) + 1 : int(y2) - 1, math.ceil(x1) + 1 : int(x2) - 1]
        assert inner.numel() and inner.all()
    around = torch.zeros_like(light)
    for x1, y1, x2, y2 in boxes.tolist():
        around[max(0, int(y1) - 1) : math.ceil(y2) + 1, max(0, int(x1) - 1) : math.ceil(x2) + 1] = True
    assert not (light & ~around).any()


def test_patches_lie_inside_and_are_as_large_as_they_may_be():
    cfg = MixingConfig(erase_patches=(1, 19), erase_side=0.1)
    counts = set()
    for seed in range(300):
        patches = M.draw_patches((60, 90), cfg, random.Random(seed).random)
        counts.add(len(patches))
        w, h = (patches[:, 2:] - patches[:, :2]).unbind(1)
        assert (patches >= 0).all() and (patches[:, 2] <= 90).all() and (patches[:, 3] <= 60).all()
        assert (w <= 9).all() and (h <= 6).all()
    assert counts == set(range(1, 20))


def test_erasing_paints_grey_and_nothing_else():
    mixing = Mixing(MixingConfig(mixup=1.0, erase_patches=(3, 3), erase_side=0.5), VIEW, 2)
    part = random_part(2, 7)
    before = part['images'].clone()
    erased = mixing.strong(part)  # the cache is empty: nothing is blended
    assert torch.equal(part['images'], before)
    for i, t in enumerate(erased['targets']):
        h, w = t['size']
        hidden = torch.zeros(h, w, dtype=torch.bool)
        for x1, y1, x2, y2 in t['patches'].tolist():
            hidden[y1:y2, x1:x2] = True
        x = erased['images'][i, :, :h, :w]
        assert torch.equal(x[:, ~hidden], before[i, :, :h, :w][:, ~hidden])
        assert torch.allclose(x[:, hidden], torch.tensor(125 / 127.5 - 1))
        assert len(t['others']['boxes']) == 0 and len(t['patches']) == 3


# --- boxes -----------------------------------------------------------------------------


def test_the_rule_of_the_moment_chooses_among_all_scores():
    "The cache keeps every box of the teacher; a threshold is applied when it is used"
    mixing = Mixing(MixingConfig(mixup=1.0, mosaic=1, **BARE), VIEW, 1)
    image, _ = marked((40, 40), (5, 5, 20, 20))
    boxes = torch.tensor([[5.0, 5, 20, 20], [20, 20, 35, 35], [1, 25, 12, 39]])
    part = part_of([(image, boxes)])
    part['targets'][0]['scores'] = torch.tensor([0.9, 0.4, 0.1])
    for _ in range(mixing.capacity):
        mixing.add(part, part['targets'])
    assert mixing.entries[0]['scores'].tolist() == pytest.approx([0.9, 0.4, 0.1])
    (t,) = mixing.strong(part)['targets']
    t |= part['targets'][0] | dict(size=t['size'], source=torch.arange(3))
    for threshold, n in ((0.5, 1), (0.3, 2), (0.0, 3)):
        rule = lambda d: d['scores'] >= threshold
        (done,) = mixing.complete([t], rule)
        assert len(done['boxes']) == 3 + n and (done['source'] < 0).sum() == n
        assert len(mixing.mosaic(rule)['targets'][0]['boxes']) == 4 * n
    assert mixing.mosaic(lambda d: d['scores'] > 1) is None


def test_filter_of_earlier_views():
    d = dict(scores=torch.tensor([0.9, 0.5, 0.2, 0.1]), labels=torch.tensor([0, 1, 1, 0]))
    assert earlier_filter(MiningConfig(init='all'), 0.4)(d).tolist() == [True, True, False, False]
    assert torch.equal(earlier_filter(MiningConfig(), 0.0)(d), mean_std(d['scores']))
    rate = MiningConfig(init='all', sup_filter='class_rate')
    assert earlier_filter(rate, 0.4, torch.tensor([0.95, 0.2]))(d).tolist() == [False, True, True, False]


# --- the cache -------------------------------------------------------------------------


def test_the_oldest_leave_and_pixels_are_bytes():
    mixing = Mixing(MixingConfig(mixup=1.0), VIEW, 2)
    parts = [random_part(2, k) for k in range(5)]
    assert mixing.capacity == 6
    for k, part in enumerate(parts):
        assert mixing.full == (k >= 3)
        mixing.add(part, part['targets'])
    for entry, (part, i) in zip(mixing.entries, [(p, i) for p in parts[2:] for i in (0, 1)]):
        h, w = part['targets'][i]['size']
        assert entry['image'].dtype == torch.uint8
        assert torch.equal(entry['image'], image_bytes(part['images'][i, :, :h, :w], VIEW))
        assert torch.allclose(
            entry['boxes'], denormalize_boxes(part['targets'][i]['boxes'], (h, w)), atol=1e-4
        )


def test_a_cache_that_is_too_small_is_refused():
    with pytest.raises(ConfigError, match='mixing.cache=8 .* give 10 or more'):
        Mixing(MixingConfig(mosaic=1, cache=8), VIEW, 6)
    assert Mixing(MixingConfig(mosaic=1, cache=10), VIEW, 6).capacity == 10
    assert Mixing(MixingConfig(mosaic=1), VIEW, 6).capacity == 12


def test_bytes_and_back():
    for view in (VIEW, ViewConfig()):
        x = torch.randint(0, 256, (2, 3, 9, 7), dtype=torch.uint8)
        assert torch.equal(image_bytes(normalize_image(x, view), view), x)


def test_no_global_generator_is_used_and_the_state_is_enough():
    cfg = MixingConfig(mixup=0.5, mosaic=1)
    mixing, part = filled(cfg), random_part(2, 1)
    torch.manual_seed(0)
    states = torch.get_rng_state(), random.getstate()
    copy = Mixing(cfg, VIEW, 2)
    copy.load_state_dict(mixing.state_dict())
    for _ in range(5):
        a, b = mixing.strong(part), copy.strong(part)
        assert torch.equal(a['images'], b['images']) and torch.equal(
            mixing.mosaic()['images'], copy.mosaic()['images']
        )
        for m in (mixing, copy):
            m.add(part, part['targets'])
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    other = Mixing(cfg, VIEW, 2, seed=5)
    other.load_state_dict(mixing.state_dict())
    assert not torch.equal(other.mosaic()['images'], mixing.mosaic()['images'])


def test_patches_change_from_step_to_step_while_the_cache_is_empty():
    mixing = Mixing(MixingConfig(mixup=1.0), VIEW, 2)
    part = random_part(2, 3)
    a, b = (mixing.strong(part, False)['targets'][0]['patches'].tolist() for _ in range(2))
    assert a != b


# --- settings --------------------------------------------------------------------------


def test_off_by_default_and_hashes_stay():
    assert not MixingConfig().on and {f'mixing.{f.name}' for f in dataclasses.fields(MixingConfig)} <= set(
        LEGACY_DEFAULTS
    )
    assert config_hash(Config()) == '28af17dd9d34' and config_hash(preset('small')) == 'fabd5da25299'
    unused = override(Config(), ['mixing.weight=2', 'mixing.cache=9', 'mixing.erase_patches=[0,3]'])
    assert config_hash(unused) == config_hash(Config())
    ons = [
        override(Config(), x)
        for x in (['mixing.mixup=1'], ['mixing.mosaic=1'], ['mixing.mosaic=1', 'mixing.weight=2'])
    ]
    assert len({config_hash(c) for c in (Config(), *ons)}) == 4
    assert 'mixing' in to_dict(Config())


@pytest.mark.parametrize(
    'item', ['mixup=2', 'mosaic=3', 'weight=-1', 'cache=-1', 'tile=2', 'erased=-1', 'erase_patches=[3,1]']
)
def test_impossible_numbers(item):
    with pytest.raises(ConfigError, match='mixing.' + item.partition('=')[0]):
        override(Config(), ['mixing.' + item])


def test_other_settings_that_mixing_needs():
    cfg = tiny('mixing.mixup=1')
    with pytest.raises(ConfigError, match=r'set view.erase_patches=\[0,0\]'):
        build_mixing(cfg, True)
    needs = mixing_needs(tiny('mixing.mixup=1', method='supervised'), False)
    assert set(needs) == {'view.erase_patches', 'loader.two_views'}
    given = [f'{k}={v}' for k, (v, _) in needs.items()]
    assert isinstance(build_mixing(tiny('mixing.mixup=1', *given, method='supervised'), False), Mixing)
    assert mixing_needs(tiny(), True) == {} and isinstance(build_mixing(tiny(), True), Unmixed)
    with pytest.raises(ConfigError, match='cpm'):
        build_mixing(tiny(*ON, 'mining.sup_filter=cpm', method='semi_detr'), True)
    for method in (Supervised, MeanTeacher, SemiDETR):
        assert 'view.erase_patches' in method.derived(cfg) and 'view.erase_patches' not in method.derived(
            tiny()
        )
    assert build_mixing(tiny(*ON, 'loader.ratio=binomial'), True).capacity == 7  # up to 3 of 4 are unlabelled


# --- steps -----------------------------------------------------------------------------


def method(name, *items):
    cfg = tiny(
        'method.burn_in_iters=0',
        'pseudo.threshold=0',
        'pseudo.min_score=0',
        'mining.init=all',
        *items,
        method=name,
    )
    cfg = dataclasses.replace(cfg, detector=small())
    return cfg.method.build(cfg)


def batch(seed, labelled=2):
    weak, strong = random_part(2, seed), random_part(2, seed)
    for p in (weak, strong):
        p['targets'] = [
            {k: v for k, v in t.items() if k in ('image_id', 'orig_size', 'size', 'matrix')}
            for t in p['targets']
        ]
    return dict(labelled=random_part(labelled, seed + 50), weak=weak, strong=strong)


@pytest.mark.parametrize('name', ['mean_teacher', 'semi_detr'])
def test_boxes_of_earlier_views_reach_the_student(nets, name, monkeypatch):  # noqa: F811
    on = method(
        name, *ON, 'mixing.erase_patches=[0,0]', 'method.T1=100', 'consistency.hidden=8', 'pseudo.top_k=5'
    )
    seen = []
    real = on.criterion
    on.criterion = lambda outputs, targets, *args: seen.append(targets) or real(outputs, targets, *args)
    for k in range(4):
        seen.clear()
        losses = on.step(*nets, batch(k), k).losses
        assert on.mixing.full == (k >= 2)
    labelled, strong, mosaic = seen
    assert any((t['source'] < 0).any() for t in strong) and any((t['source'] >= 0).any() for t in strong)
    assert len(mosaic) == 1 and len(mosaic[0]['boxes']) > 0 and all('source' not in t for t in labelled)
    for t in (*strong, *mosaic):
        corners = cxcywh_to_xyxy(t['boxes'])
        assert (corners >= -1e-5).all() and (corners <= 1 + 1e-5).all()
    mosaics = {k: v for k, v in losses.items() if 'unsup_mosaic' in k}
    assert 'loss_unsup_mosaic_cls' in mosaics and all(v.isfinite() for v in losses.values())
    sum(mosaics.values()).backward()
    nets[0].zero_grad()


def test_weight_of_the_mosaic(nets):  # noqa: F811
    values = []
    for weight in (0.5, 1.0):
        torch.manual_seed(0)
        on = method('mean_teacher', *ON, f'mixing.weight={weight}', 'method.unsup_cdn=never')
        for k in range(4):
            losses = on.step(*nets, batch(k), k).losses
        values.append({k: v.item() for k, v in losses.items() if 'mosaic' in k})
    assert values[0] and all(values[1][k] == pytest.approx(2 * v, rel=1e-5) for k, v in values[0].items())


def test_supervised_training_mixes_its_strong_views(nets):  # noqa: F811
    on = method('supervised', *ON, 'loader.two_views=true', 'mixing.erase_patches=[0,0]')
    seen, real = [], on.criterion
    on.criterion = lambda outputs, targets, *args: seen.append(targets) or real(outputs, targets, *args)
    for k in range(4):
        seen.clear()
        part = batch(k, labelled=4)['labelled']
        losses, scalars, _ = on.step(*nets, dict(labelled=part), k)
    first, mosaic = seen
    assert [len(t['boxes']) for t in first] == [1, 1, 2, 2]  # weak views stay, strong ones have boxes of both
    for got, want in zip(first[:2], part['targets']):
        assert torch.equal(got['boxes'], want['boxes']) and got['size'] == want['size']
    assert len(mosaic[0]['boxes']) == 4 and 'loss_mosaic_cls' in losses and scalars['labelled_boxes'] == 1.5


def test_labelled_views_beside_a_teacher_are_erased_only(nets):  # noqa: F811
    on = method('mean_teacher', *ON, 'loader.two_views=true')
    part = batch(0, labelled=4)['labelled']
    out = on.mixing.labelled(part)
    assert [t['size'] for t in out['targets']] == [
        t['size'] for t in part['targets']
    ] and not on.mixing.entries
    for i, t in enumerate(out['targets']):
        h, w = t['size']
        same = torch.equal(out['images'][i, :, :h, :w], part['images'][i, :, :h, :w])
        assert same == (i < 2)
        assert torch.equal(
            out['mask'][i],
            torch.ones_like(out['mask'][i]).index_fill(0, torch.arange(h), 0)
            | (torch.arange(out['mask'].shape[2]) >= w),
        )
    alone = method('mean_teacher', *ON)
    assert alone.mixing.labelled(part) is part


def test_off_is_off(nets):  # noqa: F811
    for name in ('supervised', 'mean_teacher', 'semi_detr'):
        off = method(name, 'consistency.hidden=8')
        assert isinstance(off.mixing, Unmixed) and not any('extra_state' in k for k in off.state_dict())
        part = batch(0)
        assert (
            off.mixing.strong(part['strong']) is part['strong']
            and off.mixing.labelled(part['labelled']) is part['labelled']
        )


# --- runs ------------------------------------------------------------------------------

WORKER = '''
import os, torch
from semidetr.train.trainer import Trainer
from test_trainer import tiny
from together import run_together


def train(name, until=None):
    t = Trainer(tiny({more}), sys.argv[1] + '/' + name, progress=False)
    mixing, mosaics = t.method.mixing, []
    real = mixing.losses
    mixing.losses = lambda *args: mosaics.append(real(*args)) or mosaics[-1]
    t.fit(until)
    weights = [p.detach() for p in t.student.parameters()]
    images = [float(e['image'].float().mean()) for e in mixing.entries]
    return dict(weights=weights, images=images, count=mixing.count, mosaics=sum(map(bool, mosaics)))


whole = train('whole')
train('broken', 5)
torch.save((whole, train('broken')), sys.argv[1] + '/rank' + os.environ['RANK'] + '.pt')
'''

MIXED = dict(
    mean_teacher=['method.burn_in_iters=1', 'loader.two_views=true'],
    semi_detr=[
        'method.burn_in_iters=1',
        'method.T1=4',
        'mining.init=all',
        'pseudo.min_score=0',
        'pseudo.top_k=5',
        'consistency.hidden=8',
    ],
    supervised=['loader.two_views=true', 'loader.repeat_threshold=1'],
)


@pytest.mark.parametrize('name', MIXED)
def test_exact_resume(tmp_path, name):
    "Stopped when the cache is full: weights, cache and optimiser of an unbroken run"
    cfg = tiny(*ON, 'run.test=false', *MIXED[name], method=name)
    T.Trainer(cfg, tmp_path / 'whole', progress=False).fit()
    T.Trainer(cfg, tmp_path / 'broken', progress=False).fit(until=5)
    resumed = T.Trainer(cfg, tmp_path / 'broken', progress=False)
    assert resumed.step == 5 and resumed.method.mixing.full
    resumed.fit()
    a, b = (load_checkpoint(tmp_path / x) for x in ('whole', 'broken'))
    assert all(torch.equal(a[n][k], b[n][k]) for n in ('student', 'teacher') for k in a[n])
    first, second = (x['parts']['mixing._extra_state'] for x in (a, b))
    assert first['count'] == second['count'] > 0 and len(first['entries']) == len(second['entries']) > 0
    for x, y in zip(first['entries'], second['entries']):
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def test_two_processes(tmp_path):
    "Each mixes views of its own, both end with the same weights, and a resumed pair ends with them too"
    items = [
        *ON,
        'run.test=false',
        'data.dev=0',
        'loader.ratio=binomial',
        'optim.iters=7',
        'run.checkpoint_every=5',
    ]
    run_together(WORKER.format(more=f'*{items}'), tmp_path)
    (a, a2), (b, b2) = (torch.load(tmp_path / f'rank{i}.pt') for i in (0, 1))
    for other in (b, a2, b2):
        assert all(torch.equal(x, y) for x, y in zip(a['weights'], other['weights']))
    for whole, resumed in ((a, a2), (b, b2)):
        assert (whole['count'], whole['images']) == (resumed['count'], resumed['images'])
    assert a['images'] != b['images'] and a['mosaics'] == b['mosaics'] > 0
