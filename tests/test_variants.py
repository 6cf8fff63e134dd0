"Every value of a setting has its function, defaults are functions of the core, which knows no other"

import dataclasses
import pytest
import torch
from conftest import ROOT
from semidetr.book.layers import import_graph
from semidetr.matching.assigners import ASSIGNERS
from semidetr.matching.losses import CriterionConfig
from semidetr.matching.matching import assign_o2m, pad_targets
from semidetr.semi.consistency import ConsistencyConfig, con_boxes
from semidetr.semi.mining import MiningConfig, confident_boxes, fit_mixture, mean_std, mined_boxes
from semidetr.semi.variants import (
    box_picker,
    fit_mixture_sklearn,
    initial_filter,
    label_filters,
    mixture_solver,
    one_to_many_assigner,
)


def test_defaults_are_the_core():
    assert one_to_many_assigner() is assign_o2m and initial_filter() is mean_std
    assert mixture_solver() is fit_mixture and box_picker() is con_boxes
    assert label_filters() == (confident_boxes, mined_boxes)


def test_the_core_knows_no_variant():
    "What a study switches on is passed in: the core imports neither variants nor other assigners"
    graph = import_graph(ROOT / 'semidetr')
    for module in ('matching.matching', 'matching.losses', 'semi.teacher', 'semi.mining', 'semi.consistency'):
        assert not graph[module] & {'semi.variants', 'matching.assigners'}, module


@pytest.mark.parametrize('name', ASSIGNERS)
def test_assigners_by_name(name):
    "The powers of the metric are shared, k is the task-aligned assignment's alone"
    g = torch.Generator().manual_seed(0)
    logits, boxes = torch.randn(1, 2, 30, 3, generator=g), torch.rand(1, 2, 30, 4, generator=g) * 0.4 + 0.2
    padded = pad_targets([dict(labels=torch.tensor([0, 1]), boxes=boxes[0, i, :2] + 0.01) for i in range(2)])
    want = ASSIGNERS[name](logits, boxes, padded, None, alpha=0.5, beta=2.0)
    for k in (1, 13):
        got = one_to_many_assigner(CriterionConfig(o2m=name))(logits, boxes, padded, None, k, 0.5, 2.0)
        assert got.query.equal(want.query) and got.target.equal(want.target) and got.weight.equal(want.weight)


@pytest.mark.parametrize('name', ['score', 'mean_std', 'top_k', 'per_class', 'class_rate', 'all', 'cpm'])
def test_every_filter_has_a_function(name):
    image = dict(scores=torch.rand(5), labels=torch.tensor([0, 1, 1, 0, 0]))
    for field in ('sup_filter', 'con_filter'):
        for keep in label_filters(MiningConfig(**{field: name}), torch.zeros(2)):
            mask = keep(image, torch.rand(5), 0.5, 0.4)
            assert mask.dtype == torch.bool and mask.shape == (5,)


def test_every_other_setting_has_a_function():
    scores = torch.tensor([0.9, 0.1, 0.1, 0.1, 0.3])
    passed = {
        init: int(initial_filter(MiningConfig(init=init), 0.2)(scores).sum())
        for init in ('mean_std', 'score', 'all')
    }
    assert passed == dict(mean_std=1, score=2, all=5)
    assert mixture_solver(MiningConfig(solver='sklearn')) is fit_mixture_sklearn
    con = [dict(boxes=torch.rand(3, 4).cumsum(1) * 9, labels=torch.arange(3), scores=torch.rand(3))]
    sup = [{k: v[:1] for k, v in con[0].items()}]
    for density, more in (('sparse', 0), ('dense', 4)):
        numbers = {}
        for boxes in ('mined', 'score', 'jittered', 'random', 'none'):
            cfg = ConsistencyConfig(boxes=boxes, density=density, grid=2, n_random=7)
            (p,) = box_picker(cfg)(con, sup, [(40, 40)])
            numbers[boxes] = len(p['boxes'])
            assert len(p['labels']) == len(p['scores']) == len(p['boxes'])
        assert numbers == dict(mined=3 + more, score=1 + more, jittered=1 + more, random=7 + more, none=more)


def test_boxes_in_both_views_stay_so_where_nothing_is_added():
    "B^con and B^sup need no second transport; boxes that are made here do"
    d = [
        dict(
            boxes=torch.rand(3, 4),
            labels=torch.arange(3),
            scores=torch.rand(3),
            boxes_strong=torch.rand(3, 4),
        )
    ]
    kept = {
        cfg: 'boxes_strong' in box_picker(cfg)(d, d, [(40, 40)])[0]
        for cfg in (
            ConsistencyConfig(),
            ConsistencyConfig(boxes='score'),
            ConsistencyConfig(boxes='jittered'),
            ConsistencyConfig(boxes='random'),
            ConsistencyConfig(density='dense'),
        )
    }
    assert list(kept.values()) == [True, True, False, False, False]


def test_settings_keep_their_names():
    "Records of earlier runs hold these names"
    assert [f.name for f in dataclasses.fields(MiningConfig)] == (
        'con_filter sup_filter init union top_k quantile class_thresholds rate_window memory solver'.split()
    )
    assert [f.name for f in dataclasses.fields(ConsistencyConfig)] == (
        'weight cross norm until groups boxes jitter n_random correspondence density grid slot_weights '
        'projector hidden top normalise'.split()
    )
