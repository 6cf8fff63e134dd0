"Semi-DETR plus: the settings it bundles, where they come from, and that it is the step of Semi-DETR"

import tomllib
from pathlib import Path
import pytest
import torch
from semidetr.semi.methods import METHODS, SemiDETRPlus
from semidetr.train.api import plan_run
from semidetr.train.checkpoint import load_checkpoint
from semidetr.train.config import override, preset, with_detector
from semidetr.train.trainer import Trainer
from test_trainer import TINY

STUDIES = tomllib.loads((Path(__file__).parents[1] / 'nbs' / 'ablations' / 'studies.toml').read_text())
LABELS = ['data.count=6', 'data.dev=4', 'pseudo.top_k=5', 'pseudo.min_score=0', 'mining.init=all']


def values(cfg):
    "The bundled settings of a configuration"
    s, m = cfg.detector.suppressor, cfg.method
    found = s.head, s.overlap, s.detach, cfg.criterion.mds_target, m.mds_unsup, cfg.optim.suppressor_mult
    return (*found, m.T1)


BUNDLE = ('residual', True, True, 'nms', 'nms', 10.0)


@pytest.mark.parametrize('study,arm', [('distilled', 'distilled'), ('fod12', 'plus')])
def test_the_studies_measure_this_bundle(study, arm):
    "What an arm of a study sets by hand is what the method derives"
    items = [i for i in STUDIES[study]['arms'][arm] if not i.startswith('method.name')]
    cfg = override(preset('digits'), ['optim.iters=300'])
    assert values(override(cfg, items)) == values(override(cfg, SemiDETRPlus.items(cfg))) == (*BUNDLE, 300)


@pytest.mark.parametrize('name', ['digits', 'small'])
def test_presets(name):
    plus, plain = preset(f'{name}-plus'), preset(name)
    assert values(plus) == (*BUNDLE, plain.optim.iters) and plus.method.name == 'semi_detr_plus'
    assert override(plus, ['method.name=semi_detr_plus']) == plus
    assert plus.view == plain.view and plus.loader == plain.loader


def test_a_command_sets_the_bundle_and_says_so():
    plan = plan_run(data='digits:n=60,size=64', count=6, method='semi_detr_plus', iters=40)
    assert values(plan.cfg) == (*BUNDLE, 40)
    assert sum('suppressor' in line for line in plan.notes) >= 4
    same = plan_run(preset='digits-plus', data='digits:n=60,size=64', count=6, iters=40)
    assert same.cfg == plan.cfg


def test_what_the_user_sets_stays():
    settings = ['detector.suppressor.overlap=false', 'method.mds_unsup=none']
    cfg = plan_run(data='digits:n=60,size=64', count=6, method='semi_detr_plus', settings=settings).cfg
    assert values(cfg)[:6] == ('residual', False, True, 'nms', 'none', 10.0)


def test_without_a_suppressor_there_is_a_warning():
    cfg = override(preset('digits'), ['method.name=semi_detr_plus'])
    with pytest.warns(UserWarning, match='detector.suppressor.head=residual'):
        cfg.method.build(with_classes(cfg))
    none = with_detector(cfg, 'detr')
    assert not any('suppressor' in k for k in SemiDETRPlus.derived(none))
    with pytest.warns(UserWarning, match='this detector cannot'):
        none.method.build(with_classes(none))


def with_classes(cfg):
    return override(cfg, ['detector.num_classes=3'])


def test_its_step_is_that_of_semi_detr(tmp_path):
    "The same settings under the other name: the same weights, bit for bit"
    base = override(preset("digits"), [*TINY, *LABELS, 'optim.iters=3', "method.burn_in_iters=1"])
    plus = override(base, SemiDETRPlus.items(base))
    other = override(plus, ['method.name=semi_detr'])
    assert issubclass(METHODS['semi_detr_plus'], METHODS['semi_detr'])
    states = []
    for name, cfg in (('a', plus), ('b', other)):
        Trainer(cfg, tmp_path / name, progress=False).fit()
        states.append(load_checkpoint(tmp_path / name))
    for net in ('student', 'teacher'):
        a, b = (s[net] for s in states)
        assert all(torch.equal(a[k], b[k]) for k in a) and any('suppressor' in k for k in a)
