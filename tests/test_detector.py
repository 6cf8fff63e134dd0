"The whole detector: fresh state, isolation of extra queries, gradients, empty batches, official names, post-processing"

import copy, dataclasses, time
from pathlib import Path
import pytest, torch
from torch import nn
from torchvision.ops import box_iou
import semidetr.detectors.detector as detector
from semidetr.detectors.backbone import BackboneConfig
from semidetr.boxes import cxcywh_to_xyxy
from semidetr.core import ConfigError
from semidetr.detectors.denoising import DenoisingConfig, ExtraQueries, denoising_queries, group_mask
from semidetr.detectors.detector import (
    Detector,
    DetectorConfig,
    detector_small,
    dino_r50,
    level_masks,
    post_process,
)
from semidetr.detectors.transformer import TransformerConfig

GOLDEN = Path(__file__).parent / 'golden'


class ToyBackbone(nn.Module):
    "Strided convolutions: maps at strides 8, 16, (32)"

    def __init__(self, channels=(16, 24)):
        super().__init__()
        self.channels, self.strides, _first = list(channels), tuple(8 * 2**i for i in range(len(channels))), 3
        self.steps = nn.ModuleList(
            nn.Conv2d(a, b, k, k) for a, b, k in zip((3, *channels), channels, (8, 2, 2))
        )

    def forward(self, x):
        out = []
        for s in self.steps:
            x = torch.tanh(s(x))
            out.append(x)
        return out


TINY = TransformerConfig(
    d_model=32, n_heads=4, n_levels=3, n_points=2, enc_layers=1, dec_layers=3, ffn=48, num_queries=20
)


@pytest.fixture
def toy(monkeypatch):
    "A detector of a toy backbone; parameters away from their fresh zeros unless asked for"

    def make(fresh=False, channels=(16, 24), transformer=TINY, C=4, **kw):
        monkeypatch.setattr(detector, 'build_backbone', lambda cfg: ToyBackbone(channels))
        torch.manual_seed(0)
        model = Detector(DetectorConfig(C, transformer=transformer, **kw))
        if not fresh:
            for n, p in model.named_parameters():
                if p.ndim > 1 and 'backbone' not in n:
                    nn.init.normal_(p, std=0.15)
        return model

    return make


def target(n, C=4):
    return dict(labels=torch.randint(C, (n,)), boxes=torch.rand(n, 4) * 0.2 + 0.4)


def images(B=2, H=64, W=64):
    return torch.randn(B, 3, H, W)


def everything(o):
    "All differentiable results as one number"
    parts = [*o['aux_outputs'], o, o['enc_outputs'], *o['extra'].values()]
    return sum(p['pred_logits'].square().sum() + p['pred_boxes'].sum() for p in parts)


# --- configuration and shapes -------------------------------------------------------------------------------


def test_outputs_of_the_contract(toy):
    model = toy().train()
    out = model(images(), torch.zeros(2, 64, 64, dtype=torch.bool), [target(2), target(0)])
    assert set(out) == {'pred_logits', 'pred_boxes', 'aux_outputs', 'enc_outputs', 'hs', 'extra', 'states'}
    assert (
        out['pred_logits'].shape == (2, 20, 4)
        and out['pred_boxes'].shape == (2, 20, 4)
        and out['hs'].shape == (3, 2, 20, 32)
    )
    assert len(out['aux_outputs']) == 2 and out['enc_outputs']['pred_logits'].shape == (2, 20, 4)
    dn = out['extra']['denoising']
    assert (
        dn['pred_logits'].shape == (3, 2, 200, 4)
        and dn['hs'].shape == (3, 2, 200, 32)
        and dn['meta']['target'].shape == (2, 200)
    )
    for b in (out['pred_boxes'], dn['pred_boxes']):
        assert b.min() >= 0 and b.max() <= 1


def test_denoising_needs_training_and_targets(toy):
    model = toy()
    t = [target(2)] * 2
    assert model.train()(images(), None, None)['extra'] == {}
    assert model.eval()(images(), None, t)['extra'] == {}


def test_bad_configurations():
    with pytest.raises(ConfigError, match='num_classes=-1'):
        DetectorConfig(-1)
    with pytest.raises(ConfigError, match='num_classes'):
        Detector(DetectorConfig(0))  # 0 waits for the data


def test_presets():
    small, full = detector_small(7), dino_r50(20)
    assert (
        small.num_classes,
        small.backbone.name,
        small.transformer.d_model,
        small.transformer.n_levels,
        small.transformer.num_queries,
    ) == (7, 'efficientnet_lite0', 128, 3, 100)
    t = full.transformer
    assert (t.d_model, t.n_levels, t.enc_layers, t.dec_layers, t.ffn, t.num_queries, t.dropout) == (
        256,
        4,
        6,
        6,
        2048,
        900,
        0,
    )
    assert (
        full.denoising == DenoisingConfig(num=200, label_noise=0.5, box_noise=0.4, label_rows=82)
        and full.look_forward_twice
    )
    assert full.backbone.out_strides == (8, 16, 32) and (t.query_content, t.position_unit) == (
        'learned',
        'canvas',
    )
    hash(full)  # frozen through and through


# --- fresh state (acceptance 5) -----------------------------------------------------------------------------


def test_fresh_heads(toy):
    model = toy(fresh=True)
    for head in (model.class_head, model.enc_class_head):
        assert torch.allclose(head(torch.zeros(1, 32)).sigmoid(), torch.tensor(0.01), atol=1e-7)
    out = model(images())
    model.encode(images())
    for layer in [*out['aux_outputs'], out]:
        assert torch.allclose(layer['pred_boxes'], out['enc_outputs']['pred_boxes'], atol=1e-5)
    assert (
        model.enc_box_head is not model.box_head
        and model.enc_class_head.weight is not model.class_head.weight
    )
    assert torch.equal(model.enc_class_head.weight, model.class_head.weight)


# --- isolation of extra queries (acceptance 8) --------------------------------------------------------------


@pytest.mark.parametrize('dtype,tol', [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize(
    'names', [('denoising',), ('consistency', 'denoising'), ('denoising', 'consistency')]
)
def test_matching_queries_do_not_notice_extras(toy, dtype, tol, names):
    model = toy().to(dtype).train()
    enc = model.encode(images().to(dtype))
    sets = dict(
        denoising=denoising_queries([target(3), target(1)], model.label_enc, 4),
        consistency=ExtraQueries(
            torch.randn(2, 15, 32, dtype=dtype),
            torch.randn(2, 15, 4, dtype=dtype),
            group_mask(5, 3),
            'consistency',
        ),
    )
    plain, crowded = model.decode(enc), model.decode(enc, [sets[n] for n in names])
    for a, b in zip([*plain['aux_outputs'], plain], [*crowded['aux_outputs'], crowded]):
        for k in ('pred_logits', 'pred_boxes'):
            assert (a[k] - b[k]).abs().max() <= tol
    assert (plain['hs'] - crowded['hs']).abs().max() <= tol and set(crowded['extra']) == set(names)
    alone = {n: model.decode(enc, [sets[n]])['extra'][n] for n in names}  # nor do the sets notice each other
    for n in names:
        assert (alone[n]['hs'] - crowded['extra'][n]['hs']).abs().max() <= tol


def test_groups_do_not_notice_each_other_but_see_the_matching_queries(toy):
    model = toy().double().eval()
    enc = model.encode(images().double())
    e = ExtraQueries(torch.randn(2, 6, 32).double(), torch.randn(2, 6, 4).double(), group_mask(2, 3), 'x')
    a = model.decode(enc, [e])['extra']['x']['hs']
    e.content[:, 3:] += 1.0
    b = model.decode(enc, [e])['extra']['x']['hs']
    assert (a[:, :, :3] - b[:, :, :3]).abs().max() <= 1e-12 and (a[:, :, 3:] - b[:, :, 3:]).abs().max() > 1e-3
    enc.content = enc.content + 1.0
    assert (model.decode(enc, [e])['extra']['x']['hs'] - b).abs().max() > 1e-3


def test_gradient_of_extras_reaches_their_content(toy):
    model = toy().train()
    c = torch.randn(2, 4, 32, requires_grad=True)
    out = model.decode(model.encode(images()), [ExtraQueries(c, torch.randn(2, 4, 4), group_mask(1, 4), 'x')])
    out['extra']['x']['hs'][-1].square().sum().backward()
    assert c.grad.abs().sum() > 0


# --- gradients, empty batches -------------------------------------------------------------------------------


@pytest.mark.parametrize('content', ['learned', 'memory'])
@pytest.mark.parametrize('counts', [None, (2, 0), (0, 0), (3,)])
@pytest.mark.parametrize('masked', [False, True])
def test_every_parameter_has_a_finite_gradient(toy, content, counts, masked):
    from dataclasses import replace

    model = toy(transformer=replace(TINY, query_content=content)).train()
    B = len(counts or (0, 0))
    mask = torch.zeros(B, 64, 64, dtype=torch.bool)
    if masked:
        mask[0, 40:], mask[0, :, 24:] = True, True
    everything(model(images(B), mask, counts and [target(n) for n in counts])).backward()
    for n, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), n


def test_box_gradients_stay_finite_with_more_queries_than_valid_tokens(toy):
    from dataclasses import replace

    model = toy(transformer=replace(TINY, num_queries=300)).train()
    mask = torch.ones(2, 64, 64, dtype=torch.bool)
    mask[:, :16, :16] = False
    out = model(images(), mask, [target(1), target(0)])
    assert out['pred_logits'].shape[1] == 64 + 16 + 4
    loss = everything(out)
    assert torch.isfinite(loss)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert all(torch.isfinite(d['boxes']).all() for d in post_process(out, [(16, 16)] * 2))


def test_images_of_a_batch_do_not_meet(toy):
    model, x = toy().eval(), images(3)
    whole, single = model(x), model(x[1:2])
    assert torch.allclose(whole['pred_logits'][1:2], single['pred_logits'], atol=1e-5)


def test_encode_once_decode_often(toy):
    model, x = toy().eval(), images()
    enc = model.encode(x)
    with torch.no_grad():
        a = model.decode(enc)
    b = model.decode(enc)
    assert (
        torch.equal(a['pred_boxes'], b['pred_boxes']) and not a['hs'].requires_grad and b['hs'].requires_grad
    )
    assert [tuple(f.shape) for f in enc.features] == [(2, 32, 8, 8), (2, 32, 4, 4), (2, 32, 2, 2)]


def test_teacher_copy_is_independent(toy):
    model = toy().eval()
    x = images()
    before = model(x)['pred_boxes']
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.class_head.weight.add_(1.0)
        twin.box_head.layers[-1].bias.add_(1.0)
    assert torch.equal(model(x)['pred_boxes'], before) and not torch.equal(twin(x)['pred_boxes'], before)


def test_look_forward_once_is_a_switch(toy):
    out = {}
    for twice in (True, False):
        model = toy(look_forward_twice=twice).train()
        torch.manual_seed(1)
        o = model(images())
        out[twice] = (
            o['pred_boxes'],
            torch.autograd.grad(o['pred_boxes'].sum(), model.transformer.decoder.layers[1].linear2.weight)[0],
        )
    assert torch.equal(out[True][0], out[False][0]) and not torch.allclose(out[True][1], out[False][1])


def test_level_masks():
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[:, :, 40:] = True
    maps = [torch.empty(1, 1, 8, 8), torch.empty(1, 1, 4, 4)]
    a, b = level_masks(mask, maps)
    assert a[0, 0].tolist() == [False] * 5 + [True] * 3 and b[0, 0].tolist() == [False] * 3 + [True]
    assert level_masks(None, maps) is None and level_masks(torch.zeros_like(mask), maps) is None


def test_more_padding_same_detections(toy):
    "1x1 convolutions for the projection: its GroupNorm and 3x3 convolution do look at the padding; the transformer must not"
    from dataclasses import replace

    model = toy(transformer=replace(TINY, position_unit='image')).eval()
    model.input_proj = nn.ModuleList(nn.Conv2d(c, 32, 1) for c in (16, 24))
    model.input_proj.forward = lambda f: [p(x) for p, x in zip(nn.ModuleList.__iter__(model.input_proj), f)]
    cfg = replace(TINY, position_unit='image', n_levels=2)
    model.transformer = toy(transformer=cfg).transformer.eval()
    x = images(1, 64, 96)
    found = []
    for H, W in ((64, 96), (96, 96), (128, 160)):
        canvas, mask = torch.zeros(1, 3, H, W), torch.ones(1, H, W, dtype=torch.bool)
        canvas[:, :, :64, :96], mask[:, :64, :96] = x, False
        found.append(post_process(model(canvas, mask), [(64, 96)], top_k=20)[0])
    for f in found[1:]:
        assert torch.equal(f['labels'], found[0]['labels']) and torch.allclose(
            f['scores'], found[0]['scores'], atol=1e-4
        )
        assert torch.allclose(f['boxes'], found[0]['boxes'], atol=1e-2)  # pixels: 1e-4 of the image


# --- official checkpoint ------------------------------------------------------------------------------------

RENAMED = {
    'bbox_head.': '',
    'transformer.tgt_embed.': 'transformer.query_content.',
    'fc_enc_cls.': 'enc_class_head.',
    'fc_enc_reg.': 'enc_box_head.',
}


def our_name(official):
    "Our name of a tensor of the released checkpoint; None for the projector, which is not part of the detector"
    if not official.startswith('student.'):
        return None
    name = official.removeprefix('student.')
    for a, b in RENAMED.items():
        name = name.replace(a, b)
    for a, b in (
        ('fc_cls.', 'class_head.'),
        ('fc_reg.', 'box_head.'),
    ):  # one copy a decoder layer, all the same
        if name.startswith(a):
            name = b + name.removeprefix(a).split('.', 1)[1]
    return name


def test_every_official_tensor_has_its_place(toy):
    cfg = TransformerConfig(enc_layers=2, dec_layers=2, ffn=64)
    model = toy(channels=(16, 24, 32), transformer=cfg, C=5, denoising=DenoisingConfig(label_rows=82))
    ours = {k: tuple(v.shape) for k, v in model.state_dict().items() if not k.startswith('backbone.')}
    rows = [
        line.split('\t')
        for line in (GOLDEN / 'official_checkpoint_keys.tsv').read_text().splitlines()
        if line and line[0] != '#'
    ][1:]
    official = {
        our_name(k): tuple(int(n) for n in shape.split('x') if n)
        for k, shape in rows
        if our_name(k) and 'backbone' not in k
    }
    assert official == ours and len(official) > 90


# --- post-processing (acceptance 38, 39) --------------------------------------------------------------------


def test_top_k_over_queries_and_classes_against_a_loop():
    torch.manual_seed(0)
    out = dict(pred_logits=torch.randn(2, 30, 5), pred_boxes=torch.rand(2, 30, 4))
    for b, d in enumerate(post_process(out, [(50, 80), (20, 10)], top_k=40)):
        pairs = sorted(
            ((out['pred_logits'][b, q, c].sigmoid().item(), q, c) for q in range(30) for c in range(5)),
            reverse=True,
        )[:40]
        assert torch.allclose(d['scores'], torch.tensor([p[0] for p in pairs])) and d['labels'].tolist() == [
            p[2] for p in pairs
        ]
        h, w = [(50, 80), (20, 10)][b]
        xyxy = cxcywh_to_xyxy(out['pred_boxes'][b, [p[1] for p in pairs]]) * torch.tensor([w, h, w, h])
        want = torch.stack(
            [xyxy[:, 0].clamp(0, w), xyxy[:, 1].clamp(0, h), xyxy[:, 2].clamp(0, w), xyxy[:, 3].clamp(0, h)],
            1,
        )
        assert torch.allclose(d['boxes'], want, atol=1e-4)
        assert len({p[1] for p in pairs}) < 40  # a query appears with several classes


def test_top_300_of_many():
    out = dict(pred_logits=torch.randn(1, 900, 80), pred_boxes=torch.rand(1, 900, 4))
    d = post_process(out, [(100, 100)])[0]
    assert len(d['scores']) == 300 and (d['scores'].diff() <= 0).all() and d['labels'].max() < 80
    assert (
        len(
            post_process(dict(pred_logits=torch.randn(1, 4, 3), pred_boxes=torch.rand(1, 4, 4)), [(9, 9)])[0][
                'scores'
            ]
        )
        == 12
    )


def test_nms_is_per_class():
    box = torch.tensor([[[0.5, 0.5, 0.4, 0.4], [0.51, 0.5, 0.4, 0.4]]])  # IoU .95
    low = -20.0
    different = dict(pred_logits=torch.tensor([[[3.0, low], [low, 2.0]]]), pred_boxes=box)
    same = dict(pred_logits=torch.tensor([[[3.0, low], [2.0, low]]]), pred_boxes=box)
    kw = dict(nms=0.6, score_threshold=0.01)
    assert post_process(different, [(100, 100)], **kw)[0]['labels'].tolist() == [0, 1]
    d = post_process(same, [(100, 100)], **kw)[0]
    assert len(d['scores']) == 1 and abs(d['scores'][0] - torch.tensor(3.0).sigmoid()) < 1e-6
    assert len(post_process(same, [(100, 100)], score_threshold=0.01)[0]['scores']) == 2


def test_nms_against_a_loop_and_before_the_cut():
    torch.manual_seed(0)
    out = dict(pred_logits=torch.randn(1, 60, 3) * 2 - 1, pred_boxes=torch.rand(1, 60, 4) * 0.3 + 0.35)
    pairs = sorted(
        ((out['pred_logits'][0, q, c].sigmoid().item(), q, c) for q in range(60) for c in range(3)),
        reverse=True,
    )
    xyxy, kept = (cxcywh_to_xyxy(out['pred_boxes'][0]).clamp(0, 1)) * 100, []
    for s, q, c in pairs:
        if s > 0.01 and all(
            c != c2 or box_iou(xyxy[q : q + 1], xyxy[q2 : q2 + 1]) <= 0.6 for _, q2, c2 in kept
        ):
            kept.append((s, q, c))
    for k in (300, 7):
        d = post_process(out, [(100, 100)], top_k=k, nms=0.6, score_threshold=0.01)[0]
        assert d['labels'].tolist() == [c for _, _, c in kept[:k]] and torch.allclose(
            d['scores'], torch.tensor([s for s, _, _ in kept[:k]])
        )


def test_nothing_above_the_threshold():
    out = dict(pred_logits=torch.full((2, 5, 3), -9.0), pred_boxes=torch.rand(2, 5, 4))
    for kw in ({}, dict(nms=0.6)):
        for d in post_process(out, [(10, 10)] * 2, score_threshold=0.5, **kw):
            assert d['boxes'].shape == (0, 4) and d['scores'].shape == (0,)


# --- real models --------------------------------------------------------------------------------------------


def test_small_preset_trains_a_step():
    cfg = detector_small(4)
    model = Detector(
        DetectorConfig(
            4,
            BackboneConfig('efficientnet_lite0', weights='none', out_strides=(8, 16)),
            cfg.transformer,
            cfg.denoising,
        )
    ).train()
    out = model(images(2, 96, 96), None, [target(3), target(0)])
    everything(out).backward()
    assert out['hs'].shape == (3, 2, 100, 128) and out['extra']['denoising']['hs'].shape[2] == 36
    for n, p in model.named_parameters():
        assert (p.grad is not None and torch.isfinite(p.grad).all()) == p.requires_grad, n


def test_full_size_model_runs_forward_and_backward():
    start = time.time()
    cfg = dino_r50(80)
    model = Detector(
        DetectorConfig(
            80,
            BackboneConfig('resnet50', weights='none', out_strides=(8, 16, 32)),
            cfg.transformer,
            cfg.denoising,
        )
    ).train()
    n = sum(p.numel() for p in model.parameters())
    assert 45e6 < n < 50e6, n  # 47 million: the size of DINO-4scale R50
    out = model(images(1, 256, 256), None, [target(3, 80)])
    assert out['pred_logits'].shape == (1, 900, 80) and out['extra']['denoising']['pred_logits'].shape == (
        6,
        1,
        198,
        80,
    )
    everything(out).backward()
    for name, p in model.named_parameters():
        assert not p.requires_grad or torch.isfinite(p.grad).all(), name
    print(f'{time.time() - start:.0f} s')


@pytest.mark.parametrize('dtype,tol', [(torch.float32, 1e-5), (torch.float64, 1e-11)])
def test_extras_may_come_later(dtype, tol):
    "Two sets of extra queries after a look at the matching queries: outputs and all gradients of one common pass"
    torch.manual_seed(0)
    c = detector_small(3)
    c = dataclasses.replace(
        c,
        backbone=dataclasses.replace(c.backbone, weights='none'),
        transformer=dataclasses.replace(c.transformer, d_model=32, ffn=32, num_queries=12, n_heads=4),
    )
    model = Detector(c).to(dtype).train()
    images, mask = torch.randn(2, 3, 64, 96, dtype=dtype), torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[0, :, 80:] = True
    targets = [
        dict(
            labels=torch.tensor([0, 2]),
            boxes=torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.6, 0.5, 0.3, 0.2]], dtype=dtype),
        ),
        dict(labels=torch.tensor([1]), boxes=torch.tensor([[0.5, 0.5, 0.4, 0.4]], dtype=dtype)),
    ]
    extras = [
        denoising_queries(targets, model.label_enc, 3, c.denoising),
        ExtraQueries(
            torch.randn(2, 5, 32, dtype=dtype), torch.randn(2, 5, 4, dtype=dtype), torch.eye(5) == 0, 'other'
        ),
    ]

    def run(later):
        model.zero_grad()
        e = model.encode(images, mask)
        out = model.decode(e, extras, model.decode(e)) if later else model.decode(e, extras)
        parts = [
            out['pred_logits'],
            out['pred_boxes'],
            out['hs'],
            *(v[k] for v in out['extra'].values() for k in ('pred_logits', 'pred_boxes', 'hs')),
        ]
        sum((p * torch.linspace(-1, 1, p.numel(), dtype=dtype).view_as(p)).sum() for p in parts).backward(
            retain_graph=True
        )
        return parts, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    (a, ga), (b, gb) = run(False), run(True)
    assert len(a) == len(b) == 9 and len(ga) == len(gb)
    for x, y in zip([*a, *ga], [*b, *gb]):
        assert torch.allclose(x, y, atol=tol * max(10.0, 10 * x.detach().abs().max().item()), rtol=0)
    e = model.encode(images, mask)
    out = model.decode(e)
    assert model.decode(e, [], out) is out
