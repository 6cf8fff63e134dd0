"Faster R-CNN and FCOS: contract, exact places, sizes that are no multiple of a stride, losses against loops"

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from rivals import rival
from semidetr.boxes import normalize_boxes
from semidetr.core import ConfigError
from semidetr.data.augment import ViewConfig
from semidetr.detectors.backbone import BackboneConfig
from semidetr.detectors.contract import DetectionTransformer, build_detector, class_scores, post_process
from semidetr.detectors.faster_rcnn import FasterRCNNConfig, region_box_loss
from semidetr.detectors.fcos import FCOSConfig, paired_iou
from semidetr.detectors.from_detr import DETECTORS
from semidetr.detectors.pyramid import as_outputs, pixel_targets
from semidetr.matching.losses import set_criterion
from semidetr.semi.fit import check_fit, structure_of
from semidetr.semi.methods import METHODS, MethodConfig
from semidetr.train.api import plan_run
from semidetr.train.config import config_hash, from_dict, from_saved, override, preset, to_dict, with_detector
from test_contract import check_settings, padded_batch, some_targets

BODY = BackboneConfig('efficientnet_lite0', weights='none', out_strides=(8, 16, 32))
SMALL = dict(
    faster_rcnn=FasterRCNNConfig(
        4, BODY, d_model=32, hidden=32, anchor_scale=3.0, canonical=112.0, min_score=0.001, roi_samples=64
    ),
    fcos=FCOSConfig(4, BODY, d_model=64, convs=1, extra_maps=0, min_score=0.001),
    fcos_5=FCOSConfig(4, BODY, d_model=64, convs=1, quality='centreness'),
)
every = pytest.mark.parametrize('name', SMALL)
two = pytest.mark.parametrize('name', ['faster_rcnn', 'fcos'])


@pytest.fixture(scope='module')
def models():
    torch.manual_seed(0)
    return {k: build_detector(s) for k, s in SMALL.items()}


# --- contract ----------------------------------------------------------------------------------
@two
def test_settings_and_state(models, name):
    check_settings(SMALL[name])
    model = copy.deepcopy(models[name]).double()
    assert isinstance(model, DetectionTransformer)
    groups = model.param_groups()
    wanted = [p for n, p in model.named_parameters() if p.requires_grad and n.startswith('backbone.')]
    assert [id(p) for p in groups['backbone']] == [id(p) for p in wanted]
    assert all(p.requires_grad for p in groups['rest'])
    again = build_detector(SMALL[name]).double()
    again.load_state_dict(model.state_dict())
    images, mask = padded_batch(75, 61)
    with torch.no_grad():
        first, second = (m.eval()(images, mask) for m in (model, again))
    assert all(torch.equal(first[k], second[k]) for k in first)


@every
@pytest.mark.parametrize('size', [(75, 61), (33, 47)])
def test_outputs_of_any_size(models, name, size):
    "No side needs to be a multiple of a stride; padding does not change which image a box belongs to"
    model, C = models[name].eval(), 4
    images, mask = (x.float() if x.dtype == torch.float64 else x for x in padded_batch(*size))
    with torch.no_grad():
        out = model(images, mask, some_targets(1, 2))
        encoded = model.encode(images, mask)
        found = model.detect(encoded)
        assert torch.isfinite(class_scores(model(images))).all(), 'without a mask'
    assert encoded.sizes == [size, (size[0] // 2, size[1] - 20)]
    assert all(f.shape[:2] == (2, SMALL[name].d_model) for f in encoded.features)
    Q = out['pred_boxes'].shape[1]
    assert class_scores(out).shape == (2, Q, C) and Q <= 100
    assert out['pred_boxes'].min() >= 0 and out['pred_boxes'].max() <= 1
    for d, read, s in zip(found, post_process(out, encoded.sizes), encoded.sizes):
        kept = d['scores'] > 0
        torch.testing.assert_close(read['scores'], d['scores'][kept], rtol=1e-5, atol=1e-7)
        assert torch.equal(read['labels'], d['labels'][kept])
        torch.testing.assert_close(read['boxes'], d['boxes'][kept], rtol=1e-4, atol=1e-3)
        assert (d['boxes'] <= torch.tensor([s[1], s[0]] * 2)).all()
    with pytest.raises(ConfigError, match='no queries'):
        model.decode(encoded, ['extra'])


@two
def test_gradients(models, name):
    "Every trainable parameter has one, also without any box, and with one image"
    model = models[name]
    for counts in ((2, 0), (0, 0), (3,)):
        model.train().zero_grad()
        images = torch.randn(len(counts), 3, 75, 61)
        targets = [{k: v.float() if k == 'boxes' else v for k, v in t.items()} for t in some_targets(*counts)]
        losses = set_criterion(model(images), targets)
        assert all(torch.isfinite(v) for v in losses.values())
        sum(losses.values()).backward()
        for n, p in model.named_parameters():
            if p.requires_grad:
                assert p.grad is not None and torch.isfinite(p.grad).all(), f'{n}, boxes: {counts}'
        if not sum(counts):
            assert all(v == 0 for k, v in losses.items() if k.endswith(('l1', 'giou', 'quality')))
    assert model.denoise(some_targets(2)) == []


def test_frozen_norms_stay(models):
    "A step in training mode leaves the statistics of the backbone alone"
    model = models['fcos'].train()
    before = {k: v.clone() for k, v in model.named_buffers()}
    model(torch.randn(1, 3, 64, 64))['criterion'](some_targets(0))
    assert all(torch.equal(v, before[k]) for k, v in model.named_buffers()) and before


# --- glue (spec 20, 21, 22) -----------------------------------------------------------------------
def test_anchors_and_levels(models):
    model = models['faster_rcnn'].eval()
    encoded = model.encode(torch.zeros(1, 3, 208, 208))
    assert [f.shape[-1] for f in encoded.features] == [26, 13, 7, 4]
    anchors = model.rpn.anchor_generator(encoded.images, encoded.features)[0]
    second = anchors[3 * 26 * 26 :][:3]
    assert second[:, 2:].tolist() == [[34, 17], [24, 24], [17, 34]]
    assert anchors[-2].tolist() == [192 - 96, 192 - 96, 192 + 96, 192 + 96]  # the last cell of stride 64
    squares = [torch.tensor([[0.0, 0, s, s]]) for s in (55, 111, 112, 224)]
    assert [model.heads.box_roi_pool.map_levels([b]).item() for b in squares] == [0, 0, 1, 2]


def test_scales_do_not_depend_on_the_first_image():
    "Torchvision would infer them from it: 2 cells of stride 32 for 33 pixels look like stride 16"
    model = build_detector(SMALL['faster_rcnn']).eval()
    twin, image = copy.deepcopy(model), torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        twin(torch.randn(1, 3, 33, 33))
        assert torch.equal(twin(image)['pred_boxes'], model(image)['pred_boxes'])


def test_scores_of_points(models):
    "p = .64 and q = .25 give .4; the class of a detection counts from 0"
    model = models['fcos'].eval()
    d = model.dense(model.encode(torch.zeros(1, 3, 64, 64)))
    z = torch.full_like(d.logits, -20.0)
    z[0, 5, 3] = torch.tensor(0.64).logit()
    q = torch.full_like(d.quality, torch.tensor(0.25).logit().item())
    model.dense, real = lambda encoded: d._replace(logits=z, quality=q), model.dense
    found = model.detect(model.encode(torch.zeros(1, 3, 64, 64)))[0]
    del model.dense
    assert real(model.encode(torch.zeros(1, 3, 64, 64))).counts == d.counts
    assert found['scores'].tolist() == pytest.approx([0.4], abs=1e-6) and found['labels'].tolist() == [3]


def test_outputs_without_detections():
    none = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long), scores=torch.zeros(0))
    out = as_outputs([none, none], [(9, 9)] * 2, 3)
    assert out['pred_logits'].shape == (2, 0, 3)
    assert [len(d['scores']) for d in post_process(out, [(9, 9)] * 2)] == [0, 0]
    assert [len(d['scores']) for d in post_process(out, [(9, 9)] * 2, nms=0.5, score_threshold=0.1)] == [0, 0]


def test_outputs_are_finite():
    "A score of one, and classes and rows without a detection: an infinite logit would look like a fault"
    boxes, scores = torch.tensor([[1.0, 2, 5, 6]] * 2), torch.tensor([1.0, 0.5])
    some = dict(boxes=boxes, labels=torch.tensor([1, 0]), scores=scores)
    none = {k: v[:0] for k, v in some.items()}
    z = as_outputs([some, none], [(9, 9)] * 2, 3)['pred_logits']
    assert z.isfinite().all()
    assert z.sigmoid().tolist() == [[[0, 1, 0], [0.5, 0, 0]], [[0, 0, 0]] * 2]


def test_valid_points(models):
    "Points at (column, row) x stride; those beyond the image are padding"
    model = models['fcos'].eval()
    images, mask = torch.zeros(2, 3, 64, 96), torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[1, 40:], mask[1, :, 50:] = True, True
    d = model.dense(model.encode(images, mask))
    assert d.counts == [96, 24, 6] and d.valid[0].all()
    wanted = [sum(x < 50 and y < 40 for y in range(0, 64, s) for x in range(0, 96, s)) for s in (8, 16, 32)]
    assert [int(v.sum()) for v in d.valid[1].split(d.counts)] == wanted


# --- losses ----------------------------------------------------------------------------------------
def test_region_losses(models):
    "Spec 9 and 10: one positive of three regions; corrections towards an object"
    deltas, labels = torch.zeros(3, 8), torch.tensor([1, 0, 0])
    deltas[0, 4:] = torch.tensor([0.05, 0.2, -0.3, 0.0])
    assert region_box_loss(deltas, labels, torch.zeros(3, 4)).item() == pytest.approx(0.183333, abs=1e-6)
    coder = models['faster_rcnn'].heads.box_coder
    wanted = coder.encode([torch.tensor([[12.0, 14, 36, 46]])], [torch.tensor([[10.0, 10, 30, 50]])])[0][0]
    assert wanted.tolist() == pytest.approx([2, 0, 0.911608, -1.115718], abs=1e-5)


def test_sampled_losses_against_torchvision(models):
    "With one process and without L1 they are torchvision's"
    torch.manual_seed(1)
    model, images = models['faster_rcnn'].train(), torch.randn(2, 3, 64, 64)
    boxes = normalize_boxes(torch.tensor([[10.0, 12, 34, 36]]), (64, 64))
    targets = [dict(labels=torch.tensor([2]), boxes=boxes), dict(labels=torch.tensor([0]), boxes=boxes * 0.9)]
    encoded = model.encode(images)
    torch.manual_seed(5)
    ours = model.losses(encoded, targets)
    torch.manual_seed(5)
    in_pixels = pixel_targets(targets, encoded.sizes, 1)
    rpn = copy.deepcopy(model.rpn)
    rpn.compute_loss = super(type(rpn), rpn).compute_loss
    proposals, theirs = rpn(encoded.images, encoded.maps, in_pixels)
    s = model.sample(proposals, in_pixels)
    logits, _ = model.regions(encoded, s.boxes)
    assert ours['loss_rpn_cls'].item() == pytest.approx(theirs['loss_objectness'].item(), rel=1e-5)
    assert ours['loss_rpn_l1'].item() == pytest.approx(theirs['loss_rpn_box_reg'].item(), rel=1e-5)
    assert ours['loss_cls'].item() == pytest.approx(F.cross_entropy(logits, s.labels).item(), rel=1e-5)
    assert set(s.labels.tolist()) >= {0, 1, 3}


@pytest.mark.parametrize('name', ['fcos', 'fcos_5'])
def test_point_losses_against_torchvision(models, name):
    "All but the quality by IoU are those of torchvision's head"
    torch.manual_seed(2)
    model, images = models[name].train(), torch.randn(2, 3, 96, 96)
    boxes = torch.tensor([[10.0, 12, 34, 36], [40, 40, 90, 80]])
    targets = [
        dict(labels=torch.tensor([2, 1]), boxes=normalize_boxes(boxes, (96, 96))),
        dict(labels=torch.zeros(0, dtype=torch.long), boxes=torch.zeros(0, 4)),
    ]
    encoded = model.encode(images)
    ours, head = model.losses(encoded, targets), model.points.head
    head.compute_loss = super(type(head), head).compute_loss
    theirs = model.losses(encoded, targets)
    del head.compute_loss
    assert ours['loss_cls'].item() == pytest.approx(theirs['classification'].item(), rel=1e-5)
    assert ours['loss_giou'].item() == pytest.approx(theirs['bbox_regression'].item(), rel=1e-5)
    if name == 'fcos_5':
        assert ours['loss_quality'].item() == pytest.approx(theirs['bbox_ctrness'].item(), rel=1e-5)
    else:
        assert ours['loss_quality'] != theirs['bbox_ctrness'] and ours['loss_quality'] > 0


def test_a_new_head_has_boxes_with_area(models):
    model = build_detector(SMALL['fcos'])
    d = model.dense(model.encode(torch.randn(1, 3, 96, 96)))
    assert (d.distances > 0).all()
    a = torch.tensor([[0.0, 0, 4, 4], [0, 0, 0, 0]])
    assert paired_iou(a, torch.tensor([[2.0, 0, 6, 4], [0, 0, 0, 0]])).tolist() == pytest.approx([1 / 3, 0])


# --- names, settings, pairs --------------------------------------------------------------------------
def test_presets_choose_the_size():
    for name, width in (('faster_rcnn', 256), ('fcos', 256)):
        full, small = (with_detector(preset(p), name).detector for p in ('coco-10', 'small'))
        assert (full.backbone.name, full.d_model, full.min_score) == ('resnet50', width, 0.05)
        assert (small.backbone.name, small.d_model) == ('efficientnet_lite0', 128)
        cfg = override(
            with_detector(preset('small'), name), ['detector.min_score=.01', 'detector.d_model=64']
        )
        assert from_saved(to_dict(cfg)) == cfg and from_dict(to_dict(cfg)) == cfg
        assert config_hash(cfg) != config_hash(with_detector(preset('small'), name))
        assert cfg.detector.structure == structure_of(DETECTORS[name].small(0))
        with pytest.raises(ConfigError, match='already'):
            with_detector(with_detector(preset('small'), name), 'detr')


@pytest.mark.parametrize(
    'name,item,message',
    [
        ('fcos', 'detector.d_model=40', 'multiple of 64'),
        ('fcos', 'detector.quality=none', 'quality'),
        ('fcos', 'detector.nms=0', 'nms'),
        ('faster_rcnn', 'detector.backbone.out_strides=[8,32]', 'twice the one before'),
        ('faster_rcnn', 'detector.roi_samples=0', 'roi_samples'),
        ('faster_rcnn', 'detector.hiden=3', 'hidden'),
    ],
)
def test_wrong_settings(name, item, message):
    with pytest.raises(ConfigError, match=message) as e:
        override(with_detector(preset('digits'), name), [item])
    assert '\n' not in str(e.value)


PAIRS = dict(queries=5, regions=3, points=3)  # methods that train a structure


@pytest.mark.parametrize('name', DETECTORS)
def test_pairs(name):
    "Each pair is either built or refused in one line with names that fit"
    fitting = 0
    for method, cls in METHODS.items():
        cfg = override(with_detector(preset('digits'), name), [f'method.name={method}'])
        try:
            check_fit(cfg, METHODS)
            fitting += 1
        except ConfigError as e:
            text = str(e)
            assert '\n' not in text and f'method {method} does not train' in text
            assert all(n in text for n, d in DETECTORS.items() if structure_of(d.small(0)) in cls.trains)
            with pytest.raises(ConfigError, match='does not train'):
                cfg.method.build(cfg)
    assert fitting == PAIRS[structure_of(DETECTORS[name].small(0))]


def test_a_pair_is_refused_before_images_are_opened():
    with pytest.raises(ConfigError, match='dino is trained by supervised'):
        plan_run(method='soft_teacher', detector='dino', count=5, data='no/such/folder')
    for item in ('method.density_guard=.5', 'criterion.soft_targets=true'):
        with pytest.raises(ConfigError, match='for detectors with queries'):
            plan_run(method='mean_teacher', detector='fcos', count=5, settings=[item])
    with pytest.raises(ConfigError, match='leave mixing out'):
        plan_run(method='soft_teacher', detector='faster_rcnn', count=5, settings=['mixing.mixup=1'])
    plan = plan_run(method='dense_teacher', detector='fcos', count=5, data='digits:n=20,size=64')
    assert plan.cfg.view.strong == 'photometric' and plan.cfg.loader.two_views
    assert plan.cfg.ema.copy == 240 and plan.cfg.method.unsup_weight == 4
    cfg = rival('faster_rcnn', 'soft_teacher')
    bare = dataclasses.replace(cfg, method=MethodConfig('soft_teacher'))
    with pytest.raises(ConfigError, match='SoftTeacherConfig'):
        bare.method.build(bare)


def test_new_settings_leave_hashes_alone():
    assert config_hash(preset('digits')) != config_hash(override(preset('digits'), ['ema.copy=3']))
    photo = override(preset('digits'), ['view.strong=photometric'])
    assert config_hash(preset('digits')) != config_hash(photo)
    with pytest.raises(ConfigError, match='view.strong'):
        ViewConfig(strong='none')
    assert math.isfinite(preset('digits').optim.lr)
