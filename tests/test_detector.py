"The whole detector: initial state, isolation of extra queries, gradients, empty batches, official names"

import copy, time
from dataclasses import replace
from pathlib import Path
import pytest, torch
from torch import nn
import semidetr.detectors.detector as detector
from semidetr.core import ConfigError
from semidetr.detectors.contract import build_detector, post_process
from semidetr.detectors.denoising import DenoisingConfig, ExtraQueries, denoising_queries, group_mask
from semidetr.detectors.detector import Detector, DetectorConfig, detector_small, dino_r50, level_masks
from semidetr.detectors.transformer import TransformerConfig

GOLDEN = Path(__file__).parent / 'golden'


class ToyBackbone(nn.Module):
    "Strided convolutions: maps at strides 8, 16, (32)"

    def __init__(self, channels=(16, 24)):
        super().__init__()
        self.channels, self.strides = list(channels), tuple(8 * 2**i for i in range(len(channels)))
        sizes = zip((3, *channels), channels, (8, 2, 2))
        self.steps = nn.ModuleList(nn.Conv2d(a, b, k, k) for a, b, k in sizes)

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
    "A detector with a toy backbone; parameters away from their initial zeros unless `fresh`"

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


# --- configuration and shapes ----------------------------------------------------------


def test_outputs(toy):
    model = toy().train()
    out = model(images(), torch.zeros(2, 64, 64, dtype=torch.bool), [target(2), target(0)])
    assert set(out) == {'pred_logits', 'pred_boxes', 'aux_outputs', 'enc_outputs', 'hs', 'extra', 'states'}
    assert out['pred_logits'].shape == out['pred_boxes'].shape == (2, 20, 4)
    assert out['hs'].shape == (3, 2, 20, 32)
    assert len(out['aux_outputs']) == 2 and out['enc_outputs']['pred_logits'].shape == (2, 20, 4)
    dn = out['extra']['denoising']
    assert dn['pred_logits'].shape == (3, 2, 200, 4) and dn['hs'].shape == (3, 2, 200, 32)
    assert dn['meta']['target'].shape == (2, 200)
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
        build_detector(DetectorConfig(0))  # 0: as many as the data have


def test_presets():
    small, full = detector_small(7), dino_r50(20)
    t = small.transformer
    assert (small.num_classes, small.backbone.name) == (7, 'efficientnet_lite0')
    assert (t.d_model, t.n_levels, t.num_queries) == (128, 3, 100)
    assert full.transformer == TransformerConfig(
        d_model=256,
        n_levels=4,
        enc_layers=6,
        dec_layers=6,
        ffn=2048,
        num_queries=900,
        dropout=0.0,
        query_content='learned',
        position_unit='canvas',
    )
    assert full.denoising == DenoisingConfig(num=200, label_noise=0.5, box_noise=0.4, label_rows=82)
    assert full.backbone.out_strides == (8, 16, 32) and full.look_forward_twice
    hash(full)  # frozen at all depths


# --- initial state (acceptance 5) ------------------------------------------------------


def test_fresh_heads(toy):
    model = toy(fresh=True)
    for head in (model.class_head, model.enc_class_head):
        assert torch.allclose(head(torch.zeros(1, 32)).sigmoid(), torch.tensor(0.01), atol=1e-7)
    out = model(images())
    model.encode(images())
    for layer in [*out['aux_outputs'], out]:
        assert torch.allclose(layer['pred_boxes'], out['enc_outputs']['pred_boxes'], atol=1e-5)
    assert model.enc_box_head is not model.box_head
    assert model.enc_class_head.weight is not model.class_head.weight
    assert torch.equal(model.enc_class_head.weight, model.class_head.weight)


# --- isolation of extra queries (acceptance 8) -----------------------------------------


@pytest.mark.parametrize('dtype,tol', [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize(
    'names', [('denoising',), ('consistency', 'denoising'), ('denoising', 'consistency')]
)
def test_extras_do_not_change_matching_queries(toy, dtype, tol, names):
    model = toy().to(dtype).train()
    enc = model.encode(images().to(dtype))
    denoising = denoising_queries([target(3), target(1)], model.label_enc, 4)
    content, boxes = torch.randn(2, 15, 32, dtype=dtype), torch.randn(2, 15, 4, dtype=dtype)
    consistency = ExtraQueries(content, boxes, group_mask(5, 3), 'consistency')
    sets = dict(denoising=denoising, consistency=consistency)
    without, together = model.decode(enc), model.decode(enc, [sets[n] for n in names])
    for a, b in zip([*without['aux_outputs'], without], [*together['aux_outputs'], together]):
        for k in ('pred_logits', 'pred_boxes'):
            assert (a[k] - b[k]).abs().max() <= tol
    assert (without['hs'] - together['hs']).abs().max() <= tol and set(together['extra']) == set(names)
    for n in names:  # nor do the sets change each other
        alone = model.decode(enc, [sets[n]])['extra'][n]
        assert (alone['hs'] - together['extra'][n]['hs']).abs().max() <= tol


def test_groups_attend_to_the_matching_queries_and_not_to_each_other(toy):
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


# --- gradients, empty batches ----------------------------------------------------------


@pytest.mark.parametrize('content', ['learned', 'memory'])
@pytest.mark.parametrize('counts', [None, (2, 0), (0, 0), (3,)])
@pytest.mark.parametrize('masked', [False, True])
def test_every_parameter_has_a_finite_gradient(toy, content, counts, masked):
    model = toy(transformer=replace(TINY, query_content=content)).train()
    B = len(counts or (0, 0))
    mask = torch.zeros(B, 64, 64, dtype=torch.bool)
    if masked:
        mask[0, 40:], mask[0, :, 24:] = True, True
    everything(model(images(B), mask, counts and [target(n) for n in counts])).backward()
    for n, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), n


def test_box_gradients_stay_finite_with_more_queries_than_valid_tokens(toy):
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
    assert torch.equal(a['pred_boxes'], b['pred_boxes'])
    assert not a['hs'].requires_grad and b['hs'].requires_grad
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
        boxes, weight = model(images())['pred_boxes'], model.transformer.decoder.layers[1].linear2.weight
        out[twice] = boxes, *torch.autograd.grad(boxes.sum(), weight)
    assert torch.equal(out[True][0], out[False][0]) and not torch.allclose(out[True][1], out[False][1])


def test_level_masks():
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[:, :, 40:] = True
    maps = [torch.empty(1, 1, 8, 8), torch.empty(1, 1, 4, 4)]
    a, b = level_masks(mask, maps)
    assert a[0, 0].tolist() == [False] * 5 + [True] * 3 and b[0, 0].tolist() == [False] * 3 + [True]
    assert level_masks(None, maps) is None and level_masks(torch.zeros_like(mask), maps) is None


def test_more_padding_same_detections(toy):
    """Padding must not influence the transformer

    The projection has 1x1 convolutions only: its GroupNorm and 3x3 convolution do depend on the padding."""
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
        assert torch.equal(f['labels'], found[0]['labels'])
        assert torch.allclose(f['scores'], found[0]['scores'], atol=1e-4)
        assert torch.allclose(f['boxes'], found[0]['boxes'], atol=1e-2)  # pixels: 1e-4 of the image


# --- official checkpoint ---------------------------------------------------------------

RENAMED = {
    'bbox_head.': '',
    'transformer.tgt_embed.': 'transformer.query_content.',
    'fc_enc_cls.': 'enc_class_head.',
    'fc_enc_reg.': 'enc_box_head.',
}


def our_name(official):
    "Our name of a tensor of the released checkpoint; None for the projector, which is not in the detector"
    if not official.startswith('student.'):
        return None
    name = official.removeprefix('student.')
    for a, b in RENAMED.items():
        name = name.replace(a, b)
    for a, b in (('fc_cls.', 'class_head.'), ('fc_reg.', 'box_head.')):  # equal copies, one per decoder layer
        if name.startswith(a):
            name = b + name.removeprefix(a).split('.', 1)[1]
    return name


def test_every_official_tensor_has_its_place(toy):
    cfg = TransformerConfig(enc_layers=2, dec_layers=2, ffn=64)
    model = toy(channels=(16, 24, 32), transformer=cfg, C=5, denoising=DenoisingConfig(label_rows=82))
    present = {k: tuple(v.shape) for k, v in model.state_dict().items() if not k.startswith('backbone.')}
    lines = (GOLDEN / 'official_checkpoint_keys.tsv').read_text().splitlines()
    rows = [line.split('\t') for line in lines if line and line[0] != '#'][1:]
    official = {}
    for name, shape in rows:
        if our_name(name) and 'backbone' not in name:
            official[our_name(name)] = tuple(int(n) for n in shape.split('x') if n)
    assert official == present and len(official) > 90


# --- real models -----------------------------------------------------------------------


def test_small_preset_trains_a_step():
    model = build_detector(detector_small(4).untrained()).train()
    out = model(images(2, 96, 96), None, [target(3), target(0)])
    everything(out).backward()
    assert out['hs'].shape == (3, 2, 100, 128) and out['extra']['denoising']['hs'].shape[2] == 36
    for n, p in model.named_parameters():
        assert (p.grad is not None and torch.isfinite(p.grad).all()) == p.requires_grad, n


def test_full_size_model_runs_forward_and_backward():
    start = time.time()
    model = build_detector(dino_r50(80).untrained()).train()
    n = sum(p.numel() for p in model.parameters())
    assert 45e6 < n < 50e6, n  # 47 million: the size of DINO-4scale R50
    out = model(images(1, 256, 256), None, [target(3, 80)])
    assert out['pred_logits'].shape == (1, 900, 80)
    assert out['extra']['denoising']['pred_logits'].shape == (6, 1, 198, 80)
    everything(out).backward()
    for name, p in model.named_parameters():
        assert not p.requires_grad or torch.isfinite(p.grad).all(), name
    print(f'{time.time() - start:.0f} s')


@pytest.mark.parametrize('dtype,tol', [(torch.float32, 1e-5), (torch.float64, 1e-11)])
def test_extras_may_come_later(dtype, tol):
    "Two sets of extra queries after the matching queries: outputs and all gradients of one common pass"
    torch.manual_seed(0)
    c = detector_small(3).untrained()
    c = replace(c, transformer=replace(c.transformer, d_model=32, ffn=32, num_queries=12, n_heads=4))
    model = build_detector(c).to(dtype).train()
    images, mask = torch.randn(2, 3, 64, 96, dtype=dtype), torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[0, :, 80:] = True
    boxes = torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.6, 0.5, 0.3, 0.2], [0.5, 0.5, 0.4, 0.4]], dtype=dtype)
    labels = torch.tensor([0, 2, 1])
    targets = [dict(labels=labels[:2], boxes=boxes[:2]), dict(labels=labels[2:], boxes=boxes[2:])]
    content, places = torch.randn(2, 5, 32, dtype=dtype), torch.randn(2, 5, 4, dtype=dtype)
    extras = [*model.denoise(targets), ExtraQueries(content, places, torch.eye(5) == 0, 'other')]

    def run(later):
        model.zero_grad()
        e = model.encode(images, mask)
        out = model.decode(e, extras, model.decode(e)) if later else model.decode(e, extras)
        results = [p[k] for p in (out, *out['extra'].values()) for k in ('pred_logits', 'pred_boxes', 'hs')]
        weights = [torch.linspace(-1, 1, r.numel(), dtype=dtype).view_as(r) for r in results]
        sum((r * w).sum() for r, w in zip(results, weights)).backward(retain_graph=True)
        return results, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    (a, ga), (b, gb) = run(False), run(True)
    assert len(a) == len(b) == 9 and len(ga) == len(gb)
    for x, y in zip([*a, *ga], [*b, *gb]):
        largest = x.detach().abs().max().item()
        assert torch.allclose(x, y, atol=tol * max(10.0, 10 * largest), rtol=0)
    e = model.encode(images, mask)
    out = model.decode(e)
    assert model.decode(e, [], out) is out
