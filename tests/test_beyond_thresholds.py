"Mixture thresholds of classes and the density guard: values, state, whole runs of every detector"

import math
import pytest
import torch
from semidetr.core import ConfigError
from semidetr.matching.losses import CriterionConfig, set_criterion
import semidetr.semi.thresholds as thresholds
from semidetr.semi.fit import detectors_of
from semidetr.semi.methods import SemiDETR
from semidetr.semi.mining import MiningConfig, mining_threshold
from semidetr.semi.thresholds import ClassMixtures, background_weights, expected_boxes, mixture_score
from semidetr.semi.variants import (
    ClassRates,
    class_memory,
    class_rates,
    density_guard,
    fit_mixture_sklearn,
    label_filters,
)
from semidetr.train.checkpoint import load_checkpoint
from semidetr.train.config import config_hash, override, preset
from semidetr.train.trainer import Trainer
from test_beyond_losses import denoising_queries, predictions, same
from test_every_detector import ALL, EMPTY, log_of, small, stages
from test_trainer import same as same_weights, stop_after

EVERYTHING = ['criterion.class_cost=modulated', 'criterion.soft_targets=true', 'method.density_guard=0.5']
MIXTURE = ['mining.sup_filter=class_mixture']


def image(scores, labels=None):
    return dict(
        scores=torch.tensor(scores), labels=torch.tensor(labels or [0] * len(scores), dtype=torch.long)
    )


# --- the fit -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    'scores,kept',
    [([0.9, 0.8, 0.3, 0.1], 3), ([0.9], 1), ([], 0), ([0.01] * 5, 1), ([0.9] * 5, 5), ([0.1], 1)],
)
def test_boxes_that_enter_the_fit(scores, kept):
    assert expected_boxes(torch.tensor(scores)) == kept


@pytest.mark.parametrize('fit', [None, fit_mixture_sklearn], ids=['torch', 'sklearn'])
@pytest.mark.parametrize(
    'scores,want',
    [
        ([0.06, 0.08, 0.1, 0.12, 0.7, 0.75, 0.8, 0.9], 0.8),
        ([0.5, 0.52, 0.54, 0.56], 0.54),
        ([0.9, 0.8, 0.7], 0),
        ([], 0),
        ([0.3] * 6, 0.3),
    ],
)
def test_threshold_of_a_class(scores, want, fit):
    x = torch.tensor(scores)
    kwargs = {} if fit is None else dict(fit=fit)
    assert mixture_score(x, **kwargs).item() == pytest.approx(want)
    assert mixture_score(x.flip(0), **kwargs) == mixture_score(x, **kwargs)


def test_raw_scores_stop_the_fit_near_its_start():
    tau, mixture = mining_threshold(-torch.tensor([0.06, 0.08, 0.1, 0.12, 0.7, 0.75, 0.8, 0.9]))
    assert -tau.item() == pytest.approx(0.7)
    assert (-mixture.means).tolist() == pytest.approx([0.493, 0.386], abs=1e-3)


def test_scale_and_shift_of_the_scores_move_the_threshold_with_them():
    g = torch.Generator().manual_seed(0)
    x = torch.cat([torch.rand(30, generator=g) * 0.2 + 0.1, torch.rand(20, generator=g) * 0.2 + 0.7])
    assert mixture_score(0.3 * x + 0.2).item() == pytest.approx(0.3 * mixture_score(x).item() + 0.2, abs=1e-6)


# --- the queue -----------------------------------------------------------------------------------
def test_the_queue_keeps_the_last_scores_of_each_class():
    rule = ClassMixtures(3, width=5)
    assert rule.add([image([0.9, 0.8, 0.3, 0.1], [0, 1, 0, 0])]).tolist() == [0, 0, 0]  # the best three
    assert rule.scores[0].tolist() == [-math.inf] * 3 + [pytest.approx(0.9), pytest.approx(0.3)]
    assert rule.scores[1, -1] == pytest.approx(0.8) and not rule.scores[2].isfinite().any()
    before = rule.add([image([0.7, 0.6, 0.65], [0, 0, 0]), image([], [])])
    assert rule.scores[0].tolist() == pytest.approx([0.9, 0.3, 0.7, 0.65, 0.6])
    assert before[0] == mixture_score(rule.scores[0]) and before[1:].tolist() == [0, 0]
    assert rule.add([image([], [])]).equal(before)  # nothing new, nothing changed
    rule.add([image([0.5] * 9)])
    assert rule.scores[0].tolist() == [0.5] * 5


def test_the_queue_is_state():
    a, b = ClassMixtures(2), ClassMixtures(2)
    g = torch.Generator().manual_seed(0)

    def batch():
        return [image(torch.rand(6, generator=g).tolist(), [0, 1] * 3) for _ in range(3)]

    for _ in range(5):
        a.add(batch())
    assert set(a.state_dict()) == {'scores', 'thresholds'}
    b.load_state_dict(a.state_dict())
    more = batch()
    assert a.add(more).equal(b.add(more)) and a.scores.equal(b.scores)


def test_the_scores_of_all_processes_enter_the_queue(monkeypatch):
    "Each process chooses its own boxes; with what is gathered all have the same thresholds"
    here, there = [image([0.9, 0.8, 0.3, 0.1])], [image([0.7, 0.6])]
    alone = ClassMixtures(1, width=10)
    alone.add([*here, *there])
    gathered = iter([torch.tensor([0.7, 0.6]), torch.tensor([0, 0])])
    monkeypatch.setattr(thresholds, 'all_gather_cat', lambda x: torch.cat([x, next(gathered)]))
    rule = ClassMixtures(1, width=10)
    t_c = rule.add(here)
    assert rule.scores.equal(alone.scores) and t_c.equal(alone.thresholds) and t_c > 0


def test_filter_by_name():
    cfg = MiningConfig(sup_filter='class_mixture', con_filter='class_mixture')
    found = dict(scores=torch.tensor([0.9, 0.5, 0.5]), labels=torch.tensor([0, 0, 1]))
    for keep in label_filters(cfg, torch.tensor([0.6, 0.4])):
        assert keep(found, torch.zeros(3), 0.0, 0.4).tolist() == [True, False, True]
    assert isinstance(class_memory(cfg, None, 4), ClassMixtures)
    assert class_memory(MiningConfig(), None, 4) is None
    with pytest.raises(ConfigError, match='class_rate.*class_mixture.*for both'):
        MiningConfig(sup_filter='class_rate', con_filter='class_mixture')


# --- the guard -----------------------------------------------------------------------------------
class Labelled:
    "88 boxes in five images: 17.6 per image"

    counts = (17, 18, 18, 17, 18)

    def __len__(self):
        return 5

    def annotation(self, i):
        n = self.counts[i]
        ignore = torch.arange(n + 2) >= n  # boxes to be ignored do not count
        return dict(labels=torch.arange(n + 2) % 3, ignore=ignore)


def test_weight_of_the_specification():
    "6.2 of 17.6 boxes: .7045"
    assert class_rates(Labelled(), 3).sum().item() == pytest.approx(17.6)
    guard = density_guard(0.5, Labelled(), 3)
    weights = guard([dict(labels=torch.zeros(n)) for n in (0, 6, 7, 9, 40)])
    assert weights.tolist() == pytest.approx([0, 6 / 8.8, 7 / 8.8, 1, 1])
    mean = 0.8 * weights[1] + 0.2 * weights[2]  # 6.2 boxes on average
    assert mean.item() == pytest.approx(0.7045, abs=1e-4)
    assert density_guard(0.0, None, 3)([]) is None
    assert background_weights([dict(labels=torch.zeros(0))], 0.0).tolist() == [1]
    with pytest.raises(ConfigError, match='pass the data set'):
        density_guard(0.5, None, 3)
    with pytest.raises(ConfigError, match='density_guard'):
        override(preset('digits'), ['method.density_guard=-1'])


@pytest.mark.parametrize('kind', ['focal', 'varifocal', 'position'])
@pytest.mark.parametrize('stage', ['o2m', 'o2o'])
def test_only_the_background_is_scaled(stage, kind):
    "Gradients of entries with a target stay; others are scaled by the weight of their image"
    outputs, targets = predictions(layers=1)
    outputs = {k: outputs[k] for k in ('pred_logits', 'pred_boxes')}
    cfg, w = CriterionConfig(cls_loss=kind), torch.tensor([0.25, 1.0])

    def gradient(background):
        logits = outputs['pred_logits'].clone().requires_grad_()
        losses = set_criterion(dict(outputs, pred_logits=logits), targets, stage, cfg, background=background)
        return torch.autograd.grad(losses['loss_cls'], logits)[0], losses

    (plain, a), (guarded, b) = gradient(None), gradient(w)
    ratio = guarded / plain
    near = lambda x, y: (x - y).abs() < 1e-4
    assert near(ratio[1], 1).all() and (near(ratio[0], 0.25) | near(ratio[0], 1)).all()
    assert near(ratio[0], 0.25).sum() > 20 and 1 <= near(ratio[0], 1).sum() <= 14
    assert a['loss_l1'] == b['loss_l1'] and a['loss_giou'] == b['loss_giou']
    assert same(gradient(torch.ones(2))[1], a)


def test_the_background_of_softmax_detectors():
    outputs, targets = predictions(layers=1)
    logits = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(3))
    o = dict(pred_logits=logits, scores=logits.softmax(-1)[..., :-1], pred_boxes=outputs['pred_boxes'])
    plain, ones, zeros, half = (
        set_criterion(o, targets, 'o2o', background=w)['loss_cls']
        for w in (None, torch.ones(2), torch.zeros(2), torch.full((2,), 0.5))
    )
    assert plain == ones > half > zeros > 0 and torch.allclose(2 * half, plain + zeros)
    nothing = [dict(labels=torch.zeros(0), boxes=torch.zeros(0, 4))] * 2
    assert set_criterion(o, nothing, 'o2o', background=torch.zeros(2))['loss_cls'] == 0


def test_denoising_queries_and_encoder():
    outputs, targets = predictions()
    outputs['extra'] = dict(denoising=denoising_queries())
    a, b = (set_criterion(outputs, targets, background=w) for w in (None, torch.tensor([0.0, 0.5])))
    assert {k for k in a if a[k] != b[k]} == {'loss_cls', 'loss_cls_0', 'loss_cls_1', 'loss_cls_enc'}


# --- whole runs ----------------------------------------------------------------------------------
@pytest.mark.parametrize('pseudo', ['boxes', 'empty'])
@pytest.mark.parametrize('name', detectors_of(SemiDETR))
def test_every_detector_trains_with_all_of_them(tmp_path, name, pseudo):
    wanted = ALL if pseudo == 'boxes' else EMPTY
    loss = 'focal' if name == 'detr' else 'position'
    items = [*stages('semi_detr'), *wanted, *EVERYTHING, *MIXTURE, f'criterion.cls_loss={loss}']
    run = Trainer(small(name, 'semi_detr', *items), tmp_path / 'r', progress=False)
    run.fit()
    rows = log_of(tmp_path / 'r')
    assert len(rows) == 3 and all(0 < row['loss'] < math.inf for row in rows)
    assert any(k.startswith('loss_unsup') for k in rows[-1])
    queued = int(run.method.rates.scores.isfinite().sum())
    assert queued > 0


def test_the_mean_teacher_has_the_guard(tmp_path):
    "Without pseudo labels an unlabelled image has no class loss at all"
    off, on = (
        small('dino', 'mean_teacher', *stages('mean_teacher'), *EMPTY, f'method.density_guard={s}')
        for s in (0, 0.5)
    )
    rows = []
    for cfg, folder in ((off, 'off'), (on, 'on')):
        Trainer(cfg, tmp_path / folder, progress=False).fit()
        rows.append(log_of(tmp_path / folder)[1])
    assert rows[0]['loss_unsup_cls'] > 0 == rows[1]['loss_unsup_cls']


def test_a_stopped_run_has_the_same_queue(tmp_path):
    cfg = small('dino', 'semi_detr', *stages('semi_detr'), *ALL, *EVERYTHING, *MIXTURE)
    whole = Trainer(cfg, tmp_path / 'whole', progress=False)
    whole.fit()
    run = Trainer(cfg, tmp_path / 'r', progress=False)
    stop_after(run, 2)
    with pytest.raises(KeyboardInterrupt, match='same command'):
        run.fit()
    torch.manual_seed(123)
    again = Trainer(cfg, tmp_path / 'r', progress=False)
    assert again.step == 2 and again.method.rates.scores.isfinite().any()
    again.fit()
    assert same_weights(load_checkpoint(tmp_path / 'r'), load_checkpoint(tmp_path / 'whole'))
    kept, want = again.method.state_dict(), whole.method.state_dict()
    assert 'rates.scores' in want and all(torch.equal(kept[k], want[k]) for k in want)


def test_hashes():
    base = preset('digits')
    names = ['method.density_guard=0.5', 'mining.sup_filter=class_mixture', 'method.density_guard=0']
    hashes = [config_hash(override(base, [item])) for item in names]
    assert len({*hashes, config_hash(base)}) == 3 and hashes[2] == config_hash(base)


def test_class_rates_are_found_as_before():
    cfg = MiningConfig(sup_filter='class_rate', rate_window=7)
    rule = class_memory(cfg, Labelled(), 3)
    assert isinstance(rule, ClassRates) and rule.images.shape == (7,)
    assert rule.rates.sum().item() == pytest.approx(17.6)
