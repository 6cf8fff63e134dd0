"The detector contract: one check for every detector, and reading boxes from outputs"

import copy, dataclasses
import pytest, torch
from torchvision.ops import box_iou
from semidetr.boxes import cxcywh_to_xyxy
from semidetr.core import ConfigError
from semidetr.detectors import detector
from semidetr.detectors.backbone import BackboneConfig
from semidetr.detectors.contract import DetectionTransformer, build_detector, class_scores, post_process
from semidetr.detectors.denoising import DenoisingConfig, ExtraQueries, group_mask
from semidetr.detectors.detector import Detector, DetectorConfig
from semidetr.detectors.group import parallel_outputs
from semidetr.detectors.transformer import TransformerConfig

CLOSE = dict(rtol=1e-6, atol=1e-8)


# --- the check: call it with the settings of a detector --------------------------------
def check_contract(
    settings,  # of a detector: at least two classes, small
):
    "AssertionError where a detector breaks the contract"
    check_settings(settings)
    torch.manual_seed(0)
    model = build_detector(settings.untrained()).double()
    with torch.no_grad():  # zeros of a new network would hide mistakes
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    assert isinstance(model, DetectionTransformer)
    check_parameters(model, settings)
    for size in ((64, 96), (75, 61)):
        check_outputs(model, settings, *padded_batch(*size))
    check_gradients(model, settings.num_classes)
    check_extra_queries(model, settings)


def padded_batch(H, W):
    "(images, mask) of two images; the second one is smaller"
    images, mask = torch.randn(2, 3, H, W, dtype=torch.float64), torch.zeros(2, H, W, dtype=torch.bool)
    mask[1, H // 2 :], mask[1, :, W - 20 :] = True, True
    return images.masked_fill(mask[:, None], 0), mask


def some_targets(*counts, classes=2):
    "Targets of as many images, with so many boxes each"
    return [
        dict(labels=torch.randint(classes, (n,)), boxes=torch.rand(n, 4, dtype=torch.float64) * 0.2 + 0.4)
        for n in counts
    ]


def all_predictions(outputs):
    "Every pair of logits and boxes that training may use"
    others = [*outputs.get('aux_outputs', []), *outputs.get('extra', {}).values()]
    named = [outputs[k] for k in ('enc_outputs', 'suppressed') if k in outputs]
    for o in parallel_outputs(outputs).values():
        named += [o, *o['aux_outputs'], *([o['enc_outputs']] if 'enc_outputs' in o else [])]
    return [outputs, *others, *named]


def tensors(outputs, sets=True):
    "All differentiable tensors, in a fixed order; with or without those of extra queries"
    predictions = all_predictions(outputs if sets else {**outputs, 'extra': {}})
    return [p[k] for p in predictions for k in ('pred_logits', 'pred_boxes', 'hs') if k in p]


def check_settings(settings):
    hash(settings)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.num_classes = 7
    with pytest.raises(ConfigError, match='num_classes must be at least 1'):
        build_detector(dataclasses.replace(settings, num_classes=0))
    bare = settings.untrained()
    assert (bare.num_classes, bare.d_model) == (settings.num_classes, settings.d_model)
    assert bare.untrained() == bare and dataclasses.replace(bare, num_classes=3).num_classes == 3


def check_parameters(model, settings):
    groups = model.param_groups()
    wanted = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert [id(p) for p in groups['backbone']] == [id(p) for n, p in wanted if n.startswith('backbone.')]
    others = sorted(id(p) for key, group in groups.items() if key != 'backbone' for p in group)
    assert others == sorted(id(p) for n, p in wanted if not n.startswith('backbone.')), 'param_groups: rest'
    again = build_detector(settings.untrained()).double()
    again.load_state_dict(model.state_dict())
    images, mask = padded_batch(64, 64)
    with torch.no_grad():
        first = model.eval()(images, mask)['pred_logits']
        assert torch.equal(again.eval()(images, mask)['pred_logits'], first), 'state outside the state dict'
        twin = copy.deepcopy(model)
        for p in twin.parameters():
            p.zero_()
        assert torch.equal(model(images, mask)['pred_logits'], first), 'a copy shares its parameters'


def check_outputs(model, settings, images, mask):
    B, C, d = len(images), settings.num_classes, settings.d_model
    encoded = model.eval().encode(images, mask)
    assert all(f.shape[:2] == (B, d) for f in encoded.features), 'features'
    out = model(images, mask, some_targets(1, 2))
    assert not out.get('extra'), 'denoising queries outside training'
    Q = out['pred_boxes'].shape[1]
    for p in all_predictions(out):
        assert p['pred_logits'].shape[:2] == p['pred_boxes'].shape[:2] and p['pred_boxes'].shape[2] == 4
        assert torch.isfinite(p['pred_logits']).all()
        assert p['pred_boxes'].min() >= 0 and p['pred_boxes'].max() <= 1
    assert class_scores(out).shape == (B, Q, C)
    if 'hs' in out:
        assert out['hs'].shape == (1 + len(out.get('aux_outputs', [])), B, Q, d)
    for found in post_process(out, [(40, 50)] * B, top_k=9):
        assert len(found['scores']) == min(9, Q * C) and found['labels'].max() < C
        assert (found['boxes'] <= torch.tensor([50, 40, 50, 40])).all()
    assert torch.isfinite(model(images)['pred_logits']).all(), 'without a mask'


def check_gradients(model, classes):
    images, mask = padded_batch(75, 61)
    for counts in (None, (2, 0), (0, 0)):
        model.train().zero_grad()
        out = model(images, mask, counts and some_targets(*counts, classes=classes))
        sum(t.square().sum() for t in tensors(out)).backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                assert p.grad is not None and torch.isfinite(p.grad).all(), f'{name}, boxes: {counts}'
    assert model.denoise(some_targets(0, 0)) == [], 'denoising queries without boxes'


def extra_set(name, size, width):
    content = torch.randn(2, size, width, dtype=torch.float64, requires_grad=True)
    boxes, mask = torch.randn(2, size, 4, dtype=torch.float64), group_mask(1, size)
    return ExtraQueries(content, boxes, mask, name, dict(note=name))


def check_extra_queries(model, settings):
    images, mask = padded_batch(64, 96)
    encoded = model.eval().encode(images, mask)
    alone = model.decode(encoded)
    own = [extra_set('one', 5, settings.d_model), extra_set('two', 3, settings.d_model)]
    if 'hs' not in alone:
        with pytest.raises(ConfigError):
            model.decode(encoded, own)
        return
    sets = [*own, *model.denoise(some_targets(2, 1, classes=settings.num_classes))]
    common = model.decode(encoded, sets)
    assert list(common['extra']) == [e.name for e in sets]
    for a, b in zip(tensors(alone), tensors(common, sets=False), strict=True):
        torch.testing.assert_close(a, b, **CLOSE, msg='extra queries change the matching queries')
    for e in sets:
        found, shape = common['extra'][e.name], (len(alone['hs']), 2, e.content.shape[1])
        assert found['meta'] == e.meta and found['hs'].shape == (*shape, settings.d_model)
        assert found['pred_logits'].shape[:3] == found['pred_boxes'].shape[:3] == shape
        by_itself = model.decode(encoded, [e])['extra'][e.name]
        torch.testing.assert_close(by_itself['hs'], found['hs'], **CLOSE, msg='sets influence each other')
    for e in own:
        (grad,) = torch.autograd.grad(common['extra'][e.name]['hs'].sum(), e.content, retain_graph=True)
        assert grad.abs().sum() > 0, 'no gradient to the content of extra queries'
    assert all(torch.equal(a, b) for a, b in zip(tensors(alone), tensors(model.decode(encoded, [], alone))))
    trained = [p for p in model.parameters() if p.requires_grad]
    results = []
    for out in (common, model.decode(encoded, sets, alone)):
        values = tensors(out)
        weights = [torch.linspace(-1, 1, v.numel(), dtype=v.dtype).view_as(v) for v in values]
        total = sum((v * w).sum() for v, w in zip(values, weights))
        grads = torch.autograd.grad(total, trained, retain_graph=True, allow_unused=True)
        results.append([*values, *(g for g in grads if g is not None)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **CLOSE, msg='cached outputs give other results than a common pass')


# --- detectors -------------------------------------------------------------------------
def small(backbone='efficientnet_lite0', look_forward_twice=True, **transformer):
    sizes = dict(d_model=32, n_heads=4, n_levels=3, n_points=2, enc_layers=1, dec_layers=3, ffn=48)
    return DetectorConfig(
        4,
        BackboneConfig(backbone, weights='none', out_strides=(8, 16)),
        TransformerConfig(**{**sizes, 'num_queries': 15, **transformer}),
        DenoisingConfig(num=12),
        look_forward_twice,
    )


@pytest.mark.parametrize(
    'settings',
    [
        small(),
        small(query_content='memory', position_unit='image', dropout=0.1, dec_layers=1),
        small('resnet18', False, select_invalid=True, select_score='class0', num_queries=900),
    ],
    ids=['small', 'memory', 'resnet18'],
)
def test_detector_keeps_the_contract(settings):
    check_contract(settings)


def test_settings_know_their_width_and_need_no_file():
    settings = DetectorConfig(4, BackboneConfig('resnet18', weights='none_such.pth'))
    assert settings.d_model == settings.transformer.d_model
    assert settings.untrained().backbone == BackboneConfig('resnet18', weights='none')
    with pytest.raises(ConfigError, match='no such file'):
        build_detector(settings)


def visible_extras(extras, num_queries, combine=detector.combine_extras):
    content, boxes, blocked, slices = combine(extras, num_queries)
    return content, boxes, None if blocked is None else blocked & False, slices


def one_parameter_less(model):
    groups = detector.split_parameters(model)
    return dict(groups, rest=groups['rest'][1:])


def other_states(model, encoded, extras=(), cached=None, decode=Detector.decode):
    if cached is not None:
        cached = {**cached, 'states': [(x + 1, pos) for x, pos in cached['states']]}
    return decode(model, encoded, extras, cached)


@pytest.mark.parametrize(
    'where,name,fault,message',
    [
        (detector, 'combine_extras', visible_extras, 'change the matching queries'),
        (Detector, 'param_groups', one_parameter_less, 'param_groups: rest'),
        (Detector, 'decode', other_states, 'other results than a common pass'),
        (
            Detector,
            'denoise',
            lambda model, targets: [extra_set('x', 2, 32)],
            'denoising queries without boxes',
        ),
    ],
)
def test_faults_are_noticed(monkeypatch, where, name, fault, message):
    monkeypatch.setattr(where, name, fault)
    with pytest.raises(AssertionError, match=message):
        check_contract(small())


# --- reading boxes (acceptance 38, 39) -------------------------------------------------
def best_pairs(outputs, b, above=0.0):
    "(score, query, class) of all pairs of one image, best first"
    scores = outputs['pred_logits'][b].sigmoid()
    pairs = [(s.item(), q, c) for q, row in enumerate(scores) for c, s in enumerate(row) if s > above]
    return sorted(pairs, reverse=True)


def test_top_k_over_queries_and_classes_against_a_loop():
    torch.manual_seed(0)
    out = dict(pred_logits=torch.randn(2, 30, 5), pred_boxes=torch.rand(2, 30, 4))
    sizes = [(50, 80), (20, 10)]
    for b, found in enumerate(post_process(out, sizes, top_k=40)):
        pairs = best_pairs(out, b)[:40]
        assert torch.allclose(found['scores'], torch.tensor([s for s, _, _ in pairs]))
        assert found['labels'].tolist() == [c for _, _, c in pairs]
        h, w = sizes[b]
        size = torch.tensor([w, h, w, h])
        xyxy = cxcywh_to_xyxy(out['pred_boxes'][b, [q for _, q, _ in pairs]]) * size
        assert torch.allclose(found['boxes'], xyxy.clamp(min=0).minimum(size), atol=1e-4)
        assert len({q for _, q, _ in pairs}) < 40  # a query is reported with several classes


def test_top_300_of_many():
    out = dict(pred_logits=torch.randn(1, 900, 80), pred_boxes=torch.rand(1, 900, 4))
    found = post_process(out, [(100, 100)])[0]
    assert len(found['scores']) == 300 and (found['scores'].diff() <= 0).all() and found['labels'].max() < 80
    few = dict(pred_logits=torch.randn(1, 4, 3), pred_boxes=torch.rand(1, 4, 4))
    assert len(post_process(few, [(9, 9)])[0]['scores']) == 12


def test_nms_is_per_class():
    boxes = torch.tensor([[[0.5, 0.5, 0.4, 0.4], [0.51, 0.5, 0.4, 0.4]]])  # IoU .95
    low = -20.0
    different = dict(pred_logits=torch.tensor([[[3.0, low], [low, 2.0]]]), pred_boxes=boxes)
    same = dict(pred_logits=torch.tensor([[[3.0, low], [2.0, low]]]), pred_boxes=boxes)
    kw = dict(nms=0.6, score_threshold=0.01)
    assert post_process(different, [(100, 100)], **kw)[0]['labels'].tolist() == [0, 1]
    (score,) = post_process(same, [(100, 100)], **kw)[0]['scores']
    assert abs(score - torch.tensor(3.0).sigmoid()) < 1e-6
    assert len(post_process(same, [(100, 100)], score_threshold=0.01)[0]['scores']) == 2


def test_nms_against_a_loop_and_before_the_cut():
    torch.manual_seed(0)
    out = dict(pred_logits=torch.randn(1, 60, 3) * 2 - 1, pred_boxes=torch.rand(1, 60, 4) * 0.3 + 0.35)
    xyxy, kept = cxcywh_to_xyxy(out['pred_boxes'][0]).clamp(0, 1) * 100, []
    for s, q, c in best_pairs(out, 0, above=0.01):
        rivals = [other for _, other, label in kept if label == c]
        if not rivals or box_iou(xyxy[q : q + 1], xyxy[rivals]).max() <= 0.6:
            kept.append((s, q, c))
    for k in (300, 7):
        found = post_process(out, [(100, 100)], top_k=k, nms=0.6, score_threshold=0.01)[0]
        assert found['labels'].tolist() == [c for _, _, c in kept[:k]]
        assert torch.allclose(found['scores'], torch.tensor([s for s, _, _ in kept[:k]]))


def test_nothing_above_the_threshold():
    out = dict(pred_logits=torch.full((2, 5, 3), -9.0), pred_boxes=torch.rand(2, 5, 4))
    for kw in ({}, dict(nms=0.6)):
        for found in post_process(out, [(10, 10)] * 2, score_threshold=0.5, **kw):
            assert found['boxes'].shape == (0, 4) and found['scores'].shape == (0,)


def test_scores_of_a_softmax_with_a_no_object_class():
    "Each query reports its best class, never the last one; the sigmoids of the logits play no part"
    torch.manual_seed(0)
    logits = torch.randn(2, 6, 4)
    out = dict(pred_logits=logits, scores=logits.softmax(-1)[..., :3], pred_boxes=torch.rand(2, 6, 4))
    for b, found in enumerate(post_process(out, [(10, 10)] * 2)):
        scores, labels = out['scores'][b].max(-1)
        order = scores.argsort(descending=True)
        assert torch.equal(found['scores'], scores[order]) and torch.equal(found['labels'], labels[order])
    assert class_scores(dict(out, scores=out['scores'].bfloat16())).dtype == torch.float32
