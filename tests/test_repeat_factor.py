"Repeat-factor sampling and labelled images in two views: frequencies, no history, resuming, off is off"

import pickle
import numpy as np
import pytest
import torch
from semidetr.core import ConfigError
from semidetr.data.augment import strong_view, weak_view
from semidetr.data.loader import SemiLoader, draw_index
from semidetr.data.repeat import Repeats, labels_of, repeat_factors
from semidetr.core import stable_hash
from semidetr.train.config import Config, config_hash, override, preset
from test_loader import VIEW, Fake, ids, make, same, take

# 850 images: all with class 0, 845 with class 1, 268 with class 2, as the training images of txl_pbc
CELLS = [{0, 1, 2}] * 268 + [{0, 1}] * 577 + [{0}] * 5


# --- factors ---------------------------------------------------------------------------


def test_factors_of_blood_cells():
    r = repeat_factors(CELLS, 1.0)
    assert r[[0, 300, 849]].round(6).tolist() == [1.780910, 1.002954, 1.0]
    share = lambda x: round(float(x[:268].sum() / x.sum()), 4)
    assert (share(np.ones(850)), share(r), share(np.ceil(r))) == (0.3153, 0.4498, 0.3162)
    assert (repeat_factors(CELLS, 0.3) == 1).all() and (repeat_factors(CELLS, 0.4)[:268] > 1.1).all()


def test_images_without_objects_and_boxes_to_be_ignored():
    assert repeat_factors([set(), {1}], 1.0).tolist() == [1.0, 2**0.5]
    found = labels_of(Fake(), range(12))
    assert found[3] == set() and found[5] == set() and found[1] == {0, 1} and found[0] == {0}


# --- rounding --------------------------------------------------------------------------


@pytest.mark.parametrize('seed', [0, 1])
def test_an_epoch_holds_floor_or_ceil_of_each_factor(seed):
    factors = np.array([1.0, 1.003, 1.5, 2.75, 4.0])
    rule = Repeats(factors, seed)
    counts = np.array([np.bincount(rule.positions(e), minlength=5) for e in range(1000)])
    assert (counts >= np.floor(factors)).all() and (counts <= np.ceil(factors)).all()
    assert (np.abs(counts.mean(0) - factors) <= 1e-3).all()
    assert (counts[:, 0] == 1).all() and (counts[:, 4] == 4).all()
    assert (np.cumsum(counts, 0) == [rule.before(e + 1) for e in range(1000)]).all()


def test_rounding_is_unbiased_in_each_epoch():
    for epoch in (0, 7):
        mean = np.mean([len(Repeats([1.3] * 50, s).positions(epoch)) / 50 for s in range(200)])
        assert abs(mean - 1.3) < 4 * (0.3 * 0.7 / 10_000) ** 0.5


def test_any_draw_without_those_before_it():
    factors = repeat_factors(CELLS[::10], 1.0)
    walk = Repeats(factors, 5)
    in_order = [walk.epoch_of(k)[:2] for k in range(1000)]
    for k in (999, 0, 500, 109, 110, 111, 250):
        jump = Repeats(factors, 5).epoch_of(k)
        assert jump[:2] == in_order[k] and jump[1] <= k < jump[1] + len(jump[2])
    assert in_order[0] == (0, 0) and [e for e, _ in in_order] == sorted(e for e, _ in in_order)
    far = Repeats(factors, 5).epoch_of(10**7)
    assert far[1] <= 10**7 < far[1] + len(far[2])


# --- loader ----------------------------------------------------------------------------


def drawn(loader, steps):
    return [i for t in range(steps) for _, i in loader.draws(t)[0]]


def test_off_is_the_plain_loader_and_common_classes_change_nothing():
    plain = drawn(make(), 30)
    kept = [i for i in range(12) if i not in (3, 5)]
    assert plain == [kept[draw_index(1, 'labelled', 10, k)] for k in range(60)]
    assert drawn(make(repeat_threshold=0.0), 30) == plain
    assert drawn(make(repeat_threshold=0.05), 30) == plain  # every class is in more than 5 % of the images


def test_rare_classes_are_drawn_more_often():
    "Class 1 is in 4 of 10 images: each is drawn 1.581 times per epoch"
    some = drawn(make(repeat_threshold=1.0), 4000)
    share, r = sum(i % 2 for i in some) / len(some), (10 / 4) ** 0.5
    assert abs(share - 4 * r / (4 * r + 6)) < 1e-3
    assert set(some) == {i for i in range(12) if i not in (3, 5)}


@pytest.mark.parametrize('ratio', ['fixed', 'binomial'])
def test_processes_share_one_list_of_draws(ratio):
    "Each draw number is taken once, whatever process takes it, and means the same image in all of them"
    numbered = {}
    for rank in (0, 1):
        loader = make(repeat_threshold=1.0, ratio=ratio, rank=rank, world=2)
        for t in range(40):
            for k, i in loader.draws(t)[0]:
                assert k not in numbered
                numbered[k] = i
    assert sorted(numbered) == list(range(len(numbered)))
    alone = [d for t in range(100) for d in make(repeat_threshold=1.0).draws(t)[0]]
    assert all(numbered[k] == i for k, i in alone if k in numbered)


@pytest.mark.parametrize('workers', [0, 1])
def test_resume(workers):
    settings = dict(repeat_threshold=1.0, two_views=True, num_workers=workers)
    with make(**settings) as whole, make(**settings) as second:
        batches = take(whole, 6)
        second.load_state_dict(dict(step=4))
        rest = take(second, 2)
    assert same(rest, batches[4:])


def test_the_loader_can_be_sent_to_a_worker():
    loader = make(repeat_threshold=1.0)
    assert same(pickle.loads(pickle.dumps(loader._make)).draws(7), loader.draws(7))


# --- two views -------------------------------------------------------------------------


def test_two_views_of_the_same_images():
    loader = make(two_views=True, n_unlabelled=0, unlabelled=None)
    part, data = loader.batch(3)['labelled'], Fake()
    assert ids(part)[:2] == ids(part)[2:] and len(part['images']) == 4
    draws = loader.draws(3)[0]
    for j, (k, i) in enumerate(draws):
        weak = weak_view(data[i], VIEW, stable_hash(1, 'labelled weak', k))
        strong = strong_view(data[i], VIEW, stable_hash(1, 'labelled strong', k))
        for view, at in ((weak, j), (strong, j + 2)):
            h, w = view.size
            assert torch.equal(part['images'][at, :, :h, :w], view.image)
            assert torch.equal(part['targets'][at]['matrix'], view.matrix)
            assert len(part['targets'][at]['labels']) == len(view.boxes)


def test_two_views_leave_draws_and_unlabelled_views_alone():
    one, two = make().batch(2), make(two_views=True).batch(2)
    assert same(one['weak'], two['weak']) and same(one['strong'], two['strong'])
    assert ids(two['labelled'])[:2] == ids(one['labelled'])
    assert same(make(two_views=False).batch(2), one)


# --- settings --------------------------------------------------------------------------


def test_hashes_know_the_settings_only_when_they_are_on():
    for cfg in (Config(), preset('small')):
        off = override(cfg, ['loader.two_views=false', 'loader.repeat_threshold=0'])
        on = [override(cfg, [x]) for x in ('loader.two_views=true', 'loader.repeat_threshold=0.5')]
        assert config_hash(off) == config_hash(cfg) and len({config_hash(c) for c in (cfg, *on)}) == 3
    assert config_hash(Config()) == '28af17dd9d34' and config_hash(preset('small')) == 'fabd5da25299'
    with pytest.raises(ConfigError, match='loader.repeat_threshold=-1'):
        override(Config(), ['loader.repeat_threshold=-1'])


def test_supervised_step_takes_both_views():
    part = SemiLoader(Fake(), None, 2, 0, VIEW, num_workers=0, two_views=True).batch(0)['labelled']
    assert all('boxes' in t for t in part['targets']) and len(part['mask']) == 4
