"Settings that a detector and a method do not read: named where a user gave them, and truly without effect"

import copy
from dataclasses import fields

import pytest
import torch
from rivals import FILTERS
from semidetr.semi.fit import check_fit, detectors_of, unread, without_effect
from semidetr.semi.methods import METHODS
from semidetr.train.api import plan_run
from semidetr.train.config import Config, override, preset, with_detector
from semidetr.train.trainer import Trainer, make_loader
from test_every_detector import small

LISTED = {name for name, m in METHODS.items() if 'unread' in vars(m)}
PAIRS = [(d, m) for m in METHODS for d in detectors_of(METHODS[m])]
OTHER = dict(  # another value of each setting that may be without effect
    criterion=dict(
        w_cls=9, cost_l1=9, w_giou=9, loss_l1=9, enc_labels='true', cls_loss='task_aligned', o2m='atss', k=2,
        alpha=2, beta=2, focal_alpha=0.5, gamma=1, w_enc=3, w_dn=3, cost_cls=4, class_cost='probability',
        no_object=0.5, w_position=3, w_position_dn=3, w_mds=3, w_group=3, mds_cost='one_to_many',
        mds_target='nms', normalise='process', soft_targets='false',
    ),
    method=dict(
        T1=1, unsup_weight=7, unsup_ramp=9, unsup_cdn='always', burn_in_iters=3, mds_unsup='nms',
        mds_threshold=0.1, density_guard=0.5, group_threshold=0.01,
    ),
    optim=dict(suppressor_mult=5),
    pseudo=dict(threshold=0.9, nms=0.2, cross_nms=0.3, min_score=0.5, top_k=1, min_side=30),
    mining=dict(
        con_filter='all', sup_filter='all', init='all', union='false', top_k=1, quantile=0.1,
        class_thresholds=[0.1], rate_window=3, memory=4, solver='sklearn',
    ),
    consistency=dict(
        weight=3, cross='both', norm='false', until='end', groups=2, boxes='random', jitter=0.1, n_random=3,
        correspondence='hungarian', density='dense', grid=3, slot_weights='slots', projector='mlp',
        hidden=16, top=3, normalise='process',
    ),
)  # fmt: skip


def items_of(names):
    "`group.field=value` for names of groups and fields"
    found = []
    for name in names:
        group, _, field = name.partition('.')
        if not (field == 'density_guard' and group == 'method'):
            found += [f'{group}.{k}={v}' for k, v in OTHER[group].items() if field in ('', k)]
    return found


def test_all_fields_have_another_value():
    for group in ('criterion', 'pseudo', 'mining', 'consistency'):
        assert set(OTHER[group]) == {f.name for f in fields(getattr(Config(), group))}


def test_every_method_of_the_package_has_a_list():
    "But for the two that read everything that the detector reads"
    assert set(METHODS) - LISTED == {'semi_detr', 'semi_detr_plus'}


@pytest.mark.parametrize('name,method', PAIRS)
def test_what_is_said(name, method):
    "One line with the given names alone; nothing where none was given"
    cfg = override(with_detector(preset('digits'), name), [f'method.name={method}'])
    assert check_fit(cfg, METHODS) == ''
    assert without_effect(cfg, set()) == without_effect(cfg, {'optim.lr', 'data.count', 'run.seed'}) == []
    given = {'criterion.k', 'criterion.w_dn', 'mining.top_k', 'consistency.weight', 'pseudo.nms', 'optim.lr'}
    lost = set()
    if name in ('faster_rcnn', 'fcos'):
        lost |= {'criterion.k', 'criterion.w_dn'}
    if not name.startswith('dino'):
        lost |= {'criterion.w_dn'}
    if method not in ('semi_detr', 'semi_detr_plus'):
        lost |= {'mining.top_k', 'consistency.weight'}
    if method in ('supervised', 'soft_teacher', 'dense_teacher'):
        lost |= {'pseudo.nms'}
    said = without_effect(cfg, given)
    kind = 'dino' if name.startswith('dino') else name.partition('_refine')[0].partition('_two')[0]
    wanted = [f"no effect with {kind} and {method}: {', '.join(sorted(lost))}"] if lost else []
    assert said == wanted


def test_users_are_told(tmp_path):
    "Options, files and dicts; a preset is silent"
    common = dict(data='digits:n=20,size=64', count=5, detector='fcos', method='mean_teacher')
    quiet = plan_run(**common, settings=['optim.lr=1e-3'])
    assert not any('no effect' in n for n in quiet.notes)
    wanted = 'no effect with fcos and mean_teacher: criterion.k, mining.top_k'
    path = tmp_path / 'c.toml'
    path.write_text('[criterion]\nk = 3\n')
    for config in (dict(criterion=dict(k=3)), path):
        assert wanted in plan_run(**common, config=config, settings=['mining.top_k=3']).notes


# --- the truth ------------------------------------------------------------------------------------
SHOWN = ['dino', 'detr', 'deformable_detr', 'faster_rcnn', 'fcos']


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "A detector with its teacher, and a batch with unlabelled images, on demand"
    made = {}

    def make(name, method):
        photo = method == 'dense_teacher'
        if (name, photo) not in made:
            own = 'dense_teacher' if photo else 'mean_teacher'
            cfg = small(name, own, 'method.burn_in_iters=0')
            run = Trainer(cfg, tmp_path_factory.mktemp('runs') / 'r', progress=False)
            made[name, photo] = run, next(iter(make_loader(run.cfg, run.data, 0, False)))
        return made[name, photo]

    return make


@pytest.mark.parametrize(
    'name,method',
    [(d, m) for d, m in PAIRS if d in SHOWN and (m in LISTED or (d, m) == ('dino', 'semi_detr'))],
)
def test_they_have_no_effect(runs, name, method):
    "The losses of a step in both stages are the same, bit for bit, whatever their values"
    run, batch = runs(name, method)
    fixed = ['pseudo.threshold=0', 'mining.init=all', *(FILTERS['boxes'] if method == 'soft_teacher' else [])]
    plain = override(run.cfg, [f'method.name={method}', 'method.T1=3', 'consistency.hidden=8', *fixed])
    others = override(plain, items_of(unread(plain)))
    assert others != plain
    for t in (0, 5):
        found = []
        for cfg in (plain, others):
            torch.manual_seed(0)
            built = METHODS[method](cfg, run.data.labelled)
            student = copy.deepcopy(run.student).train()
            found.append(built.step(student, run.teacher, batch, t).losses)
        assert found[0].keys() == found[1].keys() and len(found[0]) > 1
        assert all(torch.equal(v, found[1][k]) for k, v in found[0].items())
