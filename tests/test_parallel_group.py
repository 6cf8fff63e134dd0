"A parallel group and a second class head: kept apart, one-to-many, absent after training; off, no change"

import copy
import dataclasses
import json
import math
import warnings
import pytest
import torch
from semidetr.core import ConfigError
from semidetr.detectors.backbone import BackboneConfig
from semidetr.detectors.contract import build_detector
from semidetr.detectors.deformable_detr import DeformableDETR, DeformableDETRConfig, deformable_detr_small
from semidetr.detectors.denoising import DenoisingConfig, ExtraQueries, combine_extras, denoising_queries
from semidetr.detectors.detr import DETRConfig
from semidetr.detectors.group import (
    GroupConfig,
    add_second,
    for_inference,
    parallel_group,
    parallel_outputs,
    token_anchors,
)
from semidetr.detectors.transformer import token_geometry
from semidetr.lab.plan import plan
from semidetr.matching.losses import CriterionConfig, parallel_losses, scored, set_criterion
from semidetr.matching.matching import assign_o2m, pad_targets
from semidetr.semi.consistency import cross_view_queries
from semidetr.semi.variants import parallel_advice, parallel_stages, unsup_parallel
from semidetr.train.config import config_hash, from_saved, override, preset, to_dict
from semidetr.train.predict import Predictor, load_model
from semidetr.train.trainer import Trainer
from test_contract import check_extra_queries, check_gradients, check_outputs, check_parameters
from test_contract import all_predictions, padded_batch, some_targets
from test_study import BOOK
from test_trainer import TINY, WORKER
from together import run_together

ON = ['detector.group.queries=12', 'method.T1=0']
KINDS = {
    'dino_main': dict(group=GroupConfig(12, 'main', 4)),
    'dino_own': dict(group=GroupConfig(12, 'own')),
    'dino_table': dict(group=GroupConfig(12, 'own'), query_content='learned'),
    'deformable_main': dict(group=GroupConfig(9, 'main', 4)),
    'deformable_own': dict(group=GroupConfig(9)),
}
kinds = pytest.mark.parametrize('kind', KINDS)


def tiny_config(*more):
    return override(preset('digits'), [*TINY, *more])


def tiny_deformable(*more):
    sizes = ['d_model=32', 'heads=4', 'ffn=32', 'num_queries=20', 'backbone.weights=none']
    items = ['detector=deformable_detr_two_stage', *(f'detector.{x}' for x in sizes)]
    return override(preset('digits'), [*(x for x in TINY if 'detector' not in x), *items, *more])


def settings_of(kind, **more):
    "Settings of a tiny detector with three classes"
    values = dict(KINDS.get(kind, {})) | more
    if kind.startswith('deformable'):
        sizes = dict(d_model=32, heads=4, ffn=32, num_queries=12, dropout=0.0)
        return dataclasses.replace(deformable_detr_small(3), **sizes, **values).untrained()
    base = tiny_config().detector
    content = values.pop('query_content', base.transformer.query_content)
    transformer = dataclasses.replace(base.transformer, query_content=content)
    return dataclasses.replace(base, num_classes=3, transformer=transformer, **values)


def network(settings, train=True):
    "In float64, without the zeros of a new network"
    torch.manual_seed(0)
    model = build_detector(settings).double()
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return model.train(train)


def images_and_mask():
    torch.manual_seed(1)
    return padded_batch(64, 96)


def of_group(outputs):
    return outputs['extra']['group']


# --- masks -------------------------------------------------------------------------------------
def all_sets():
    "Every kind of extra queries, in the order in which a method adds them, and the matching queries last"
    targets = [dict(labels=torch.tensor([1, 2]), boxes=torch.rand(2, 4))]
    denoising = denoising_queries(targets, torch.nn.Embedding(3, 4), 3, DenoisingConfig(num=8))
    counts, content = [2], torch.randn(2, 4)
    cross = cross_view_queries(content, counts, [torch.rand(2, 4)], groups=2)
    mirror = cross_view_queries(content, counts, [torch.rand(2, 4)], name='consistency_mirror')
    free = torch.zeros(5, 5, dtype=torch.bool)
    group = ExtraQueries(torch.zeros(1, 5, 4), torch.zeros(1, 5, 4), free, 'group', {}, 'self')
    return [cross, mirror, group, denoising]


def test_mask_of_all_pairs_of_sets():
    sets = all_sets()
    _, _, blocked, where = combine_extras(sets, num_queries=6)
    n = len(blocked)
    where = where | dict(matching=slice(n - 6, n))
    own = {e.name: e.mask for e in sets} | dict(matching=torch.zeros(6, 6, dtype=torch.bool))
    assert len(where) == 5
    for row, rows in where.items():
        for column, columns in where.items():
            part = blocked[rows, columns]
            if row == column:
                assert torch.equal(part, own[row])
            elif column == 'matching' and row != 'group':
                assert not part.any(), (row, column)
            else:
                assert part.all(), (row, column)
    assert not blocked.all(1).any()


def test_sets_before_the_group_have_their_old_mask():
    sets = all_sets()
    without = [e for e in sets if e.name != 'group']
    _, _, old, places = combine_extras(without, num_queries=6)
    _, _, new, where = combine_extras(sets, num_queries=6)
    keep = torch.ones(len(new), dtype=torch.bool)
    keep[where['group']] = False
    assert torch.equal(new[keep][:, keep], old) and set(places) < set(where)


def test_unknown_words():
    with pytest.raises(ConfigError, match='sees'):
        ExtraQueries(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4), torch.zeros(1, 1), 'x', {}, 'none')
    with pytest.raises(ConfigError, match='main'):
        GroupConfig(10, 'mian')
    with pytest.raises(ConfigError, match='two_stage'):
        DeformableDETRConfig(3, group=GroupConfig(10))
    assert not hasattr(DETRConfig(3), 'group')


# --- independence ------------------------------------------------------------------------------
@kinds
def test_group_and_matching_queries_do_not_see_each_other(kind):
    model, (images, mask) = network(settings_of(kind)), images_and_mask()
    encoded = model.encode(images, mask)
    (group,) = parallel_group(model, encoded)
    alone, both = model.decode(encoded), model.decode(encoded, [group])
    for a, b in zip(all_predictions(alone), all_predictions({**both, 'extra': {}}), strict=True):
        assert (a['pred_logits'] - b['pred_logits']).abs().max() < 1e-5
        assert (a['pred_boxes'] - b['pred_boxes']).abs().max() < 1e-5
    changed = copy.copy(encoded)
    if kind.startswith('dino'):
        changed.content = torch.randn_like(encoded.content)
        changed.reference_logits = torch.randn_like(encoded.reference_logits)
    else:
        moved = (torch.randn_like(x) for x in (encoded.queries.content, encoded.queries.pos))
        start, areas = torch.randn_like(encoded.queries.start), encoded.queries.areas.flip(1)
        changed.queries = type(encoded.queries)(*moved, start, areas)
    other = model.decode(changed, [group])
    assert (other['pred_logits'] - both['pred_logits']).abs().max() > 1e-3
    for key in ('pred_logits', 'pred_boxes', 'hs'):
        assert (of_group(other)[key] - of_group(both)[key]).abs().max() < 1e-5
    later = model.decode(encoded, [group], alone)
    assert (of_group(later)['hs'] - of_group(both)['hs']).abs().max() < 1e-5
    assert later['pred_logits'] is alone['pred_logits']


@kinds
def test_group_is_another_function_than_the_matching_queries(kind):
    model, (images, mask) = network(settings_of(kind)), images_and_mask()
    out = model(images, mask)
    own, main = parallel_outputs(out)['group'], out
    n = own['pred_logits'].shape[1]
    assert n == KINDS[kind]['group'].queries and len(own['aux_outputs']) == len(main['aux_outputs'])
    assert (own['pred_logits'] - main['pred_logits'][:, :n]).abs().max() > 1e-3
    assert ('enc_outputs' in own) == ('main' not in kind)


def test_with_the_same_start_it_would_be_the_same_function():
    "What mark and slots are for"
    model, (images, mask) = (
        network(settings_of('dino_main', group=GroupConfig(20, 'main', 0))),
        images_and_mask(),
    )
    with torch.no_grad():
        model.group.vector.zero_()
    out = model(images, mask)
    assert torch.allclose(of_group(out)['pred_logits'][-1], out['pred_logits'], atol=1e-9)


def test_denoising_and_group_beside_each_other():
    "Denoising queries give what they gave without the group"
    model, (images, mask) = network(settings_of('dino_main')), images_and_mask()
    encoded = model.encode(images, mask)
    noisy, group = model.denoise(some_targets(2, 1)), parallel_group(model, encoded)
    with_group = model.decode(encoded, [*group, *noisy])['extra']['denoising']
    without = model.decode(encoded, noisy)['extra']['denoising']
    assert torch.allclose(with_group['hs'], without['hs'], atol=1e-9)


def test_anchors_are_those_of_the_encoder():
    shapes = ((6, 8), (3, 4))
    masks = [torch.zeros(2, h, w, dtype=torch.bool) for h, w in shapes]
    for m in masks:
        m[1, :, m.shape[2] * 3 // 4 :] = True
    for some in (masks, None):
        geo = token_geometry(shapes, 8, some)
        encoded = dataclasses.make_dataclass('E', ['memory', 'shapes', 'valid_ratios', 'padding_mask'])(
            torch.zeros(1), shapes, geo.valid_ratios, geo.padding
        )
        found = token_anchors(encoded)
        assert torch.equal(found.anchors, geo.anchors) and torch.equal(found.valid, geo.valid)


# --- contract ----------------------------------------------------------------------------------
@pytest.mark.parametrize('kind', [*KINDS, 'dino_second', 'deformable_second'])
def test_contract(kind):
    settings = settings_of(kind, second_head='second' in kind)
    model = network(settings)
    check_parameters(model, settings)
    check_outputs(model, settings, *padded_batch(64, 96))
    check_gradients(model, 3)
    check_extra_queries(model, settings)


@kinds
def test_nothing_of_it_in_evaluation(kind):
    settings = settings_of(kind, second_head=True)
    off = dataclasses.replace(settings, group=GroupConfig(), second_head=False)
    on = network(settings, train=False)
    plain = build_detector(off).double().eval()
    _, state = for_inference(settings, on.state_dict())
    plain.load_state_dict(state)
    images, mask = images_and_mask()
    a, b = on(images, mask), plain(images, mask)
    assert a.keys() == b.keys() and a['extra'] == {} and 'second' not in a
    assert torch.equal(a['pred_logits'], b['pred_logits']) and torch.equal(a['pred_boxes'], b['pred_boxes'])
    assert for_inference(off, state)[1] is state


@kinds
def test_the_rest_of_the_network_is_the_same_with_and_without(kind):
    settings = settings_of(kind, second_head=True)
    off = dataclasses.replace(settings, group=GroupConfig(), second_head=False)
    torch.manual_seed(3)
    plain, state = build_detector(off), torch.get_rng_state()
    torch.manual_seed(3)
    on = build_detector(settings)
    assert torch.equal(torch.get_rng_state(), state)
    own = on.state_dict()
    assert all(torch.equal(v, own[k]) for k, v in plain.state_dict().items())
    names = {k.split('.')[0] for k in set(own) - set(plain.state_dict())}
    assert names == {'group', 'second_head'}


# --- losses ------------------------------------------------------------------------------------
def test_two_objects_and_eight_queries():
    "k=3: six different queries, three on each object; by score-weighted soft targets"
    objects = torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2]])
    shift = torch.tensor([0.0, 0.01, 0.02, 0.03])[:, None] * torch.tensor([1.0, 0, 0, 0])
    boxes = torch.cat([objects[:1] + shift, objects[1:] + shift])
    logits = torch.zeros(1, 1, 8, 2)
    targets = [dict(labels=torch.tensor([0, 1]), boxes=objects, scores=torch.tensor([0.9, 0.5]))]
    args = logits, boxes[None, None], pad_targets(targets, 2), None, 3, 1.0, 6.0
    plain, m = assign_o2m(*args), scored(assign_o2m)(*args)
    assert sorted(m.query.tolist()) == [0, 1, 2, 4, 5, 6] and m.target.tolist() == [0] * 3 + [1] * 3
    assert torch.allclose(m.weight, plain.weight * torch.tensor([0.9] * 3 + [0.5] * 3))
    best = [float(m.weight[m.target == i].max()) for i in (0, 1)]
    assert best == pytest.approx([0.9, 0.5], abs=1e-5)
    out = dict(extra=dict(group=dict(pred_logits=logits, pred_boxes=boxes[None, None], meta=dict(slots=0))))
    losses = parallel_losses(out, targets, CriterionConfig(k=3, w_group=2.0))
    bce = lambda t: -t * math.log(0.5) - (1 - t) * math.log(0.5)
    y = torch.zeros(8, 2)
    y[m.query, m.target] = m.weight
    by_hand = sum(abs(t - 0.5) ** 2 * bce(t) for t in y.flatten().tolist()) * 2 / float(m.weight.sum())
    assert losses['loss_group_cls'].item() == pytest.approx(2 * by_hand, rel=1e-4)
    assert set(losses) == {'loss_group_cls', 'loss_group_l1', 'loss_group_giou'}


def test_scores_count_once():
    "By value: soft targets multiply the score into the main class targets, not again into these"
    object_box = torch.tensor([[0.5, 0.5, 0.4, 0.4]])
    targets = [dict(labels=torch.tensor([0]), boxes=object_box, scores=torch.tensor([0.6]))]
    head = dict(pred_logits=torch.zeros(1, 1, 1), pred_boxes=object_box[None], aux_outputs=[])
    for soft in (False, True):
        cfg = CriterionConfig(k=1, soft_targets=soft)
        losses = parallel_losses(dict(second=head), targets, cfg)
        assert losses['loss_second_cls'].item() == pytest.approx(2 * 0.1**2 * math.log(2), rel=1e-4)
    main = set_criterion(head, targets, 'o2m', cfg)
    assert main['loss_cls'].item() == pytest.approx(losses['loss_second_cls'].item(), rel=1e-4)
    worse = dict(head, pred_boxes=object_box[None] + torch.tensor([0.02, 0, 0, 0]))
    places = [
        parallel_losses(dict(second=worse), [dict(targets[0], scores=torch.tensor([s]))])['loss_second_l1']
        for s in (1.0, 0.6)
    ]
    u = 0.38 / 0.42  # IoU, the soft target of a score of one
    assert places[0].item() == pytest.approx(10 * 0.02 * u, rel=1e-4)
    assert places[1].item() == pytest.approx(10 * 0.02 * u * 0.6, rel=1e-4)


def test_scores_of_several_images_and_of_none():
    targets = [
        dict(labels=torch.zeros(0, dtype=torch.long), boxes=torch.zeros(0, 4), scores=torch.zeros(0)),
        dict(
            labels=torch.tensor([0]), boxes=torch.tensor([[0.5, 0.5, 0.4, 0.4]]), scores=torch.tensor([0.3])
        ),
        dict(
            labels=torch.tensor([1]), boxes=torch.tensor([[0.5, 0.5, 0.4, 0.4]]), scores=torch.tensor([0.7])
        ),
    ]
    boxes = torch.tensor([0.5, 0.5, 0.4, 0.4]).expand(2, 3, 4, 4)
    logits = torch.zeros(2, 3, 4, 2)
    args = logits, boxes, pad_targets(targets), None, 1, 1.0, 6.0
    m = scored(assign_o2m)(*args)
    assert m.image.tolist() == [1, 2, 1, 2] and torch.allclose(m.weight, torch.tensor([0.3, 0.7] * 2))
    empty = [targets[0]] * 3
    assert len(scored(assign_o2m)(logits, boxes, pad_targets(empty), None, 1, 1.0, 6.0)) == 0


@pytest.mark.parametrize(
    'kind', ['dino_main', 'dino_own', 'deformable_own', 'dino_second', 'deformable_second']
)
def test_gradients_reach_the_shared_decoder(kind):
    settings = settings_of(kind, second_head='second' in kind)
    model, (images, mask) = network(settings), images_and_mask()
    losses = parallel_losses(model(images, mask), some_targets(2, 1), CriterionConfig(k=3))
    name = 'second' if 'second' in kind else 'group'
    assert all(k.startswith(f'loss_{name}_') for k in losses)
    sum(losses.values()).backward()
    decoder = [p for p in model.transformer.decoder.layers.parameters()]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in decoder)
    heads = model.box_head if kind.startswith('dino') else model.bbox_embed[:2]
    assert all(p.grad.abs().sum() > 0 for p in heads.parameters())
    new = model.second_head if 'second' in kind else model.group
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in new.parameters())
    assert all(p.grad.abs().sum() > 0 for p in new.parameters())
    first = model.class_head if kind.startswith('dino') else model.class_embed[:2]
    assert all((p.grad is None) == (name == 'second') for p in first.parameters())


def test_second_head_shares_boxes_and_starts_as_the_first():
    torch.manual_seed(0)
    model = build_detector(settings_of('dino_', second_head=True)).train()
    images, mask = (x.float() if x.is_floating_point() else x for x in images_and_mask())
    out = model(images, mask)
    pairs = zip([*out['aux_outputs'], out], [*out['second']['aux_outputs'], out['second']], strict=True)
    for main, second in pairs:
        assert second['pred_boxes'] is main['pred_boxes']
        assert torch.allclose(second['pred_logits'], main['pred_logits'], atol=1e-6)
    assert add_second(model, out, None) is out
    stage = set_criterion({k: v for k, v in out['second'].items()}, some_floats(), 'o2m')
    assert {k.replace('loss_', 'loss_second_') for k in stage} == set(parallel_losses(out, some_floats()))
    cached = model.decode(model.encode(images, mask), [], out)
    assert cached['second'] is out['second']


def some_floats():
    return [{k: v.float() if v.is_floating_point() else v for k, v in t.items()} for t in some_targets(2, 1)]


def test_the_wide_set():
    "Boxes of at least .2, weighted by their scores; sure ones alone give another loss"
    cfg = tiny_config('detector.second_head=true')
    boxes = torch.tensor([[10.0, 10, 40, 40], [30, 30, 60, 60], [5, 5, 20, 20]])
    found = [dict(boxes=boxes, labels=torch.tensor([0, 1, 2]), scores=torch.tensor([0.9, 0.2, 0.19]))]
    view = [dict(matrix=torch.eye(3), size=(64, 64))]
    torch.manual_seed(0)
    layer = dict(pred_logits=torch.randn(1, 6, 3), pred_boxes=torch.rand(1, 6, 4) * 0.3 + 0.2)
    out = dict(second=dict(layer, aux_outputs=[]))
    losses = unsup_parallel(out, found, view, view, cfg)
    c = (boxes[:2, :2] + boxes[:2, 2:]) / 128
    wide = torch.cat([c, (boxes[:2, 2:] - boxes[:2, :2]) / 64], 1)
    target = [dict(labels=torch.tensor([0, 1]), boxes=wide, scores=torch.tensor([0.9, 0.2]))]
    expected = parallel_losses(out, target, cfg.criterion)
    assert losses.keys() == expected.keys() and all(torch.allclose(losses[k], v) for k, v in expected.items())
    assert unsup_parallel(out, found, view, view, tiny_config()) == {}


# --- settings ----------------------------------------------------------------------------------
def test_off_keeps_every_hash():
    before = config_hash(preset('digits'))
    for item in ('criterion.w_group=3', 'method.group_threshold=.5', 'detector.group.slots=3'):
        assert config_hash(override(preset('digits'), [item])) == before
    on = [['detector.group.queries=9'], ['detector.second_head=true']]
    hashes = {config_hash(override(preset('digits'), items)) for items in on}
    hashes |= {config_hash(override(preset('digits'), [*items, 'criterion.w_group=3'])) for items in on}
    assert len(hashes | {before}) == 5
    for name in ('detr', 'deformable_detr_two_stage'):
        config_hash(override(preset('digits'), [f'detector={name}']))
    old = to_dict(preset('digits'))
    del old['detector']['group'], old['detector']['second_head']
    del old['method']['group_threshold'], old['criterion']['w_group']
    assert from_saved(json.loads(json.dumps(old))) == preset('digits')
    saved = override(preset('digits'), ['detector.group.queries=9', 'detector.group.select=own'])
    assert from_saved(json.loads(json.dumps(to_dict(saved)))) == saved


@pytest.mark.parametrize('part', ['detector.group.queries=9', 'detector.second_head=true'])
def test_one_to_one_throughout_is_advised(part):
    cfg = override(preset('digits'), [part, 'method.T1=100', 'optim.iters=300'])
    assert 'method.T1=0' in parallel_advice(cfg)
    for name in ('supervised', 'mean_teacher', 'semi_detr'):
        derived = (named := override(cfg, [f'method.name={name}'])).method.implementation.derived(named)
        assert derived['method.T1'][0] == 0 and ('consistency.until' in derived) == (name == 'semi_detr')
    with pytest.warns(UserWarning, match='method.T1=0'):
        cfg.method.build(dataclasses.replace(cfg, detector=dataclasses.replace(cfg.detector, num_classes=3)))
    assert parallel_advice(override(cfg, ['method.T1=0'])) == ''
    assert parallel_stages(override(preset('digits'), ['method.T1=9'])) == {}


# --- training ----------------------------------------------------------------------------------
def fit(folder, *more, until=None):
    trainer = Trainer(tiny_config(*more), folder, progress=False)
    return trainer, trainer.fit(until)


METHODS = dict(
    supervised=['method.name=supervised'],
    mean_teacher=['method.name=mean_teacher'],
    semi_detr=['method.name=semi_detr', 'mining.init=all', 'consistency.hidden=8', 'consistency.until=end'],
)
SOME_LABELS = ['pseudo.min_score=0', 'method.group_threshold=0.005', 'pseudo.top_k=5', 'optim.iters=3']
SOME_LABELS += ['method.burn_in_iters=1', 'run.log_every=1', 'run.test=false', 'data.dev=2']


def step_losses(trainer):
    "The names of the losses of each step"
    names, real = [], trainer.method.step

    def step(*args):
        result = real(*args)
        names.append(set(result.losses))
        assert all(torch.isfinite(v) for v in result.losses.values())
        return result

    trainer.method.step = step
    return names


@pytest.mark.parametrize('name', METHODS)
def test_trains_with_every_method(name, tmp_path):
    more = [*METHODS[name], *SOME_LABELS, *ON, 'detector.second_head=true']
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        warnings.filterwarnings('default', message='.*(pseudo|lr_scheduler|detections).*')
        trainer = Trainer(tiny_config(*more), tmp_path, progress=False)
        names = step_losses(trainer)
        trainer.fit()
    assert all({'loss_group_cls', 'loss_group_l1_0', 'loss_second_giou'} <= n for n in names)
    assert ('loss_unsup_group_cls' in names[-1]) == (name != 'supervised')
    assert ('loss_unsup_second_cls_0' in names[-1]) == (name != 'supervised')
    assert any('_con_' in k for k in names[-1]) == (name == 'semi_detr')
    fresh = build_detector(trainer.student.cfg)
    assert not torch.equal(trainer.student.group.vector, fresh.group.vector)


@pytest.mark.parametrize('detector', ['dino', 'deformable'])
def test_resuming_is_exact_and_the_checkpoint_predicts(detector, tmp_path):
    pytest.importorskip('safetensors')
    from semidetr.train.export import to_safetensors

    more = [*METHODS['semi_detr'], *SOME_LABELS, *ON, 'detector.second_head=true', 'optim.iters=4']
    cfg = tiny_config(*more) if detector == 'dino' else tiny_deformable(*more)

    def train(folder, until=None):
        trainer = Trainer(cfg, folder, progress=False)
        trainer.fit(until)
        return trainer

    whole = train(tmp_path / 'whole')
    train(tmp_path / 'broken', 2)
    resumed = train(tmp_path / 'broken')
    assert isinstance(whole.student, DeformableDETR) == (detector == 'deformable')
    for which in ('student', 'teacher'):
        a, b = (getattr(t, which).state_dict() for t in (whole, resumed))
        assert any(k.startswith('group.') for k in a) and all(torch.equal(a[k], b[k]) for k in a)
    model, saved_cfg, _ = load_model(tmp_path / 'whole')
    assert saved_cfg.detector.group.on and model.group is not None
    path = to_safetensors(tmp_path / 'whole')
    again, file_cfg, _ = load_model(path)
    assert again.group is None and again.second_head is None and not file_cfg.detector.parallel
    pixels = torch.rand(3, 64, 64)
    a, b = (Predictor(p, 'cpu', 0.0)(pixels) for p in (tmp_path / 'whole', path))
    assert torch.equal(a['scores'], b['scores']) and torch.equal(a['boxes'], b['boxes'])


def test_two_processes_stay_equal(tmp_path):
    more = [*ON, 'detector.second_head=true', 'optim.iters=3']
    folder = tmp_path / 'r'
    run_together(WORKER.format(more=', '.join(map(repr, more))), folder)
    a, b = (torch.load(folder / f'rank{i}.pt') for i in (0, 1))
    assert len(a) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_burn_in_without_the_parts(tmp_path):
    plain = Trainer(tiny_config('optim.iters=1', 'method.name=supervised'), tmp_path / 'a', progress=False)
    plain.fit()
    parts = [*ON, 'detector.group.select=own', 'detector.second_head=true']
    with pytest.warns(UserWarning, match='no parallel group'):
        later = Trainer(tiny_config(*parts, f"run.init={tmp_path / 'a'}"), tmp_path / 'b', progress=False)
    old, student, teacher = plain.teacher.state_dict(), later.student, later.teacher
    new = student.state_dict()
    assert all(torch.equal(old[k], new[k]) for k in old)
    assert all(torch.equal(new[k], v) for k, v in teacher.state_dict().items())
    assert torch.equal(new['second_head.weight'], old['class_head.weight'])
    assert torch.equal(new['group.class_head.bias'], old['enc_class_head.bias'])
    assert torch.equal(new['group.embed.0.weight'], old['transformer.enc_output.weight'])
    later.cfg = dataclasses.replace(later.cfg, optim=dataclasses.replace(later.cfg.optim, iters=1))
    later.fit()
    with pytest.warns(UserWarning, match='that of the weights is not used'):
        Trainer(tiny_config(f"run.init={tmp_path / 'b'}"), tmp_path / 'c', progress=False)


def test_exports_have_none_of_it(tmp_path):
    pytest.importorskip('onnxruntime')
    pytest.importorskip('onnx')
    from semidetr.train.onnx import to_onnx

    fit(tmp_path, *METHODS['supervised'], *SOME_LABELS, *ON, 'detector.second_head=true', 'optim.iters=1')
    import onnx

    path = to_onnx(tmp_path)
    weights = {w.name for w in onnx.load(path, load_external_data=False).graph.initializer}
    assert not any('group' in w or 'second' in w for w in weights)
    pixels = torch.rand(3, 64, 64)
    a, b = Predictor(path, 'cpu', 0.0)(pixels), Predictor(tmp_path, 'cpu', 0.0)(pixels)
    assert torch.allclose(a['scores'], b['scores'], atol=1e-4)


def test_export_to_transformers():
    from semidetr.train.export import _translated

    resnet = BackboneConfig('resnet18', 'none', out_strides=(8, 16))
    settings = settings_of('deformable_own', second_head=True, backbone=resnet)
    off = dataclasses.replace(settings, group=GroupConfig(), second_head=False)
    model, view = build_detector(settings), preset('digits').view
    plain = build_detector(off)
    plain.load_state_dict(for_inference(settings, model.state_dict())[1])
    a = _translated(model, settings, view, ['a', 'b', 'c'])
    b = _translated(plain, off, view, ['a', 'b', 'c'])
    assert a[:2] == b[:2] and a[2].keys() == b[2].keys()


def test_study_arms():
    runs = {r.arm: r.cfg for r in plan(BOOK, 'parallel', seeds=[0]) if r.arm != 'burn_in'}
    assert set(runs) == {'group', 'second_head'}
    assert runs['group'].detector.parallel == ('group',)
    assert runs['second_head'].detector.parallel == ('second_head',)
    for cfg in runs.values():
        assert (cfg.method.name, cfg.method.T1, cfg.consistency.until) == ('semi_detr', 0, 'end')
