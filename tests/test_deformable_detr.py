"Deformable-DETR: outputs of the original code, names of its state dicts, the contract, trainings"

import dataclasses
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from semidetr import Trainer
from semidetr.core import ConfigError
from semidetr.detectors import deformable_detr as dd
from semidetr.detectors.backbone import _RESNET, Backbone, BackboneConfig, _Chain
from semidetr.detectors.contract import build_detector
from semidetr.detectors.deformable_detr import DeformableDETRConfig, from_original
from semidetr.detectors.transformer import token_geometry
from semidetr.semi.fit import methods_of
from semidetr.semi.methods import METHODS
from test_contract import check_contract
from test_trainer import tiny
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops.misc import FrozenBatchNorm2d

FORMS = ('plain', 'refine', 'two_stage')
SMALL = Path(__file__).parent / 'golden' / 'deformable_detr.npz'
FULL = Path(os.environ.get('SEMIDETR_GOLDEN', Path(__file__).parents[2] / 'shared' / 'golden' / 'detectors'))
FOLDERS = dict(plain='ddetr_single_a', refine='ddetr_refine_a', two_stage='ddetr_two_stage_a')
needs_full = pytest.mark.skipif(
    not FULL.is_dir(), reason=f'no golden values of the original detectors in {FULL}: set SEMIDETR_GOLDEN'
)
CLOSE = dict(rtol=0, atol=1e-4)


def small(form, layers=2, **changed):
    "Settings of a detector that is built in a second"
    backbone = BackboneConfig('efficientnet_lite0', 'none', (8, 16))
    sizes = dict(d_model=32, levels=3, heads=4, points=2, layers=layers, ffn=48, num_queries=15)
    return DeformableDETRConfig(4, backbone, **{**sizes, **changed}, form=form)


# --- all of the original's outputs ----------------------------------------------------------
def tiny_resnet(cfg):
    "The backbone of the golden values: one bottleneck per stage, 2 to 16 planes"
    net = ResNet(Bottleneck, [1, 1, 1, 1], norm_layer=FrozenBatchNorm2d)
    net.inplanes = 64
    for i, planes in enumerate((2, 4, 8, 16), 1):
        setattr(net, f'layer{i}', net._make_layer(Bottleneck, planes, 1, stride=1 + (i > 1)))
    steps, levels = _RESNET
    keep = [levels[s] for s in cfg.out_strides]
    channels = [{4: 8, 8: 16, 16: 32, 32: 64}[s] for s in cfg.out_strides]
    return Backbone(_Chain(net, steps, keep), cfg.out_strides, channels, 'layer1', 'layer4', True)


def golden(form):
    "(settings, original state dict, inputs and outputs)"
    from safetensors.torch import load_file

    folder = FULL / FOLDERS[form]
    c = json.loads((folder / 'info.json').read_text())['config']
    backbone = BackboneConfig('resnet50', 'none', (8, 16, 32) if c['first'] == 2 else (16, 32))
    sizes = dict(d_model=32, levels=c['L'], heads=c['heads'], points=c['K'], layers=2, ffn=c['ffn'])
    settings = DeformableDETRConfig(c['C'], backbone, **sizes, num_queries=c['Q'], form=form)
    return settings, load_file(folder / 'original.safetensors'), load_file(folder / 'io.safetensors')


def all_layers(outputs, key):
    return torch.stack([*(layer[key] for layer in outputs['aux_outputs']), outputs[key]])


@needs_full
@pytest.mark.parametrize('form', FORMS)
def test_outputs_are_those_of_the_original(form, monkeypatch):
    "From images to boxes: features, memory, references, logits and boxes of all layers, proposals"
    monkeypatch.setattr(dd, 'build_backbone', tiny_resnet)
    settings, state, io = golden(form)
    model = build_detector(settings).eval()
    model.load_state_dict(from_original(state, settings))
    images = io['images'].float()
    with torch.no_grad():
        for i, found in enumerate(model.backbone(images)):
            torch.testing.assert_close(found, io[f'feat.{i}'], **CLOSE)
        encoded = model.encode(images, io['mask'])
        out = model.decode(encoded)
    valid = ~encoded.padding_mask
    torch.testing.assert_close(encoded.memory[valid], io['memory'][valid], **CLOSE)
    reference = encoded.queries.start.sigmoid()[..., : io['init_reference'].shape[-1]]
    torch.testing.assert_close(reference, io['init_reference'], **CLOSE)
    torch.testing.assert_close(out['hs'], io['hs'], **CLOSE)
    for key in ('pred_logits', 'pred_boxes'):
        torch.testing.assert_close(all_layers(out, key), io[key], **CLOSE)
    assert ('enc_outputs' in out) == (form == 'two_stage')
    if form == 'two_stage':
        for key, name in (('pred_logits', 'enc_logits'), ('pred_boxes', 'enc_boxes')):
            index = encoded.selected[..., None].expand(-1, -1, io[name].shape[-1])
            torch.testing.assert_close(out['enc_outputs'][key], io[name].gather(1, index), **CLOSE)
        best = io['enc_logits'][..., 0].gather(1, io['enc_topk'])
        torch.testing.assert_close(out['enc_outputs']['pred_logits'][..., 0], best, **CLOSE)
        anchors_valid = token_geometry(encoded.shapes, 32, dd.level_masks(io['mask'], encoded.features)).valid
        assert (~anchors_valid.gather(1, encoded.selected)).sum(1).tolist()[1] == 14


# --- a part of them that is always there -----------------------------------------------------
class Features(torch.nn.Module):
    "A backbone of given widths that is never run"

    channels = [32, 64]


@pytest.mark.parametrize('form', ['refine', 'two_stage'])
def test_decoder_is_that_of_the_original(form, monkeypatch):
    "From the encoder's memory to boxes: two layers of two_stage, the first one of refine (2-d references)"
    monkeypatch.setattr(dd, 'build_backbone', lambda cfg: Features())
    stored = {
        k.removeprefix(f'{form}/'): torch.tensor(v) for k, v in np.load(SMALL).items() if k.startswith(form)
    }
    sizes = dict(refine=dict(layers=1, points=2, num_queries=17), two_stage=dict(points=4, num_queries=16))
    model = build_detector(dataclasses.replace(small(form), num_classes=7, **sizes[form])).eval()
    state = {k: v for k, v in stored.items() if not k.startswith('io/')}
    io = {k.removeprefix('io/'): v for k, v in stored.items() if k.startswith('io/')}
    lost = model.load_state_dict(state, strict=False)
    assert lost.unexpected_keys == []
    assert all(
        k.startswith(('input_proj.', 'transformer.encoder.', 'transformer.level_embed'))
        for k in lost.missing_keys
    )
    shapes = [tuple(s) for s in io['shapes'].tolist()]
    masks = list(io['padding'].split([h * w for h, w in shapes], 1))
    masks = [m.view(-1, h, w) for m, (h, w) in zip(masks, shapes)]
    geo = token_geometry(tuple(shapes), 32, masks, **dd.POSITION)
    monkeypatch.setattr(model.transformer, 'encode_tokens', lambda features, masks: (io['memory'], geo))
    monkeypatch.setattr(model.backbone, 'forward', lambda images: [])
    monkeypatch.setattr(model.input_proj, 'forward', lambda features: [])
    with torch.no_grad():
        out = model(None)
    for key in ('pred_logits', 'pred_boxes'):
        torch.testing.assert_close(all_layers(out, key), io[key], **CLOSE)


def test_position_code_against_a_loop():
    "Counts minus one half, temperature 10000, y before x, sine before cosine"
    mask = torch.ones(1, 5, 6, dtype=torch.bool)
    mask[:, :4, :3] = False
    code = token_geometry([(5, 6)], 16, [mask], **dd.POSITION).position.view(5, 6, 16)
    for i in range(4):
        for j in range(3):
            for axis, share in enumerate(((i + 0.5) / 4, (j + 0.5) / 3)):
                for k in range(4):
                    angle = 2 * math.pi * share / 10000 ** (2 * k / 8)
                    found = code[i, j, 8 * axis + 2 * k : 8 * axis + 2 * k + 2].tolist()
                    assert found == pytest.approx([math.sin(angle), math.cos(angle)], abs=1e-5)


# --- names ---------------------------------------------------------------------------------
def full_keys(name):
    rows = (FULL / f'keys_deformable_detr_r50_{name}.tsv').read_text().splitlines()[2:]
    pairs = (row.split('\t') for row in rows)
    return {k: torch.zeros([int(n) for n in s.split('x')] if s else []) for k, s in pairs}


@needs_full
@pytest.mark.parametrize('name,form', [('single', 'plain'), ('refine', 'refine'), ('two_stage', 'two_stage')])
def test_names_and_shapes_of_the_release(name, form):
    "Every key of the full-size files is used, and nothing is missing"
    settings = dd.deformable_detr_r50(91, form)
    found = from_original(full_keys(name), settings)
    assert set(found) == set(build_detector(settings.untrained()).state_dict())


@needs_full
def test_names_and_shapes_of_the_single_scale_release():
    backbone = BackboneConfig('resnet50', 'none', (32,))
    from_original(full_keys('single_scale'), DeformableDETRConfig(91, backbone, levels=1))


def original_names(settings):
    "A state dict as the originals write it"
    names = {}
    for key, value in build_detector(settings).state_dict().items():
        names[key.replace('backbone.body.', 'backbone.0.body.')] = value
        copies = dict(plain=(), refine=('bbox',), two_stage=('bbox', 'class'))[settings.form]
        if key.startswith(tuple(f'{c}_embed.' for c in copies)):
            names[f'transformer.decoder.{key}'] = value
        if settings.form == 'plain' and '_embed.0.' in key:
            names[key.replace('.0.', '.1.', 1)] = value
    return names


@pytest.mark.parametrize('form', FORMS)
def test_names_round_trip_and_misfits_are_told(form):
    settings = dataclasses.replace(small(form), backbone=BackboneConfig('resnet18', 'none', (8, 16)))
    names = original_names(settings)
    build_detector(settings).load_state_dict(
        from_original({**names, 'x.total_ops': torch.zeros(1)}, settings)
    )
    last = 'class_embed.1.bias' if form == 'plain' else 'transformer.decoder.bbox_embed.0.layers.0.bias'
    for change, message in (
        ({'surplus': torch.zeros(1)}, 'unknown surplus'),
        ({last: names[last] + 1}, f'{last} differs from its copy'),
        ({'transformer.level_embed': torch.zeros(2, 32)}, r'level_embed is \(2, 32\), not \(3, 32\)'),
    ):
        with pytest.raises(ConfigError, match=message):
            from_original({**names, **change}, settings)
    names.pop('input_proj.0.0.bias')
    with pytest.raises(ConfigError, match='missing input_proj.0.0.bias'):
        from_original(names, settings)


# --- the contract, and trainings ----------------------------------------------------------
@pytest.mark.parametrize('form', FORMS)
def test_it_honours_the_contract(form):
    check_contract(small(form))


def test_one_layer_and_more_queries_than_tokens_honour_the_contract():
    check_contract(small('two_stage', layers=1, num_queries=900))
    check_contract(small('refine', layers=1))


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="detector.form='two-stage' is unknown"):
        small('two-stage')
    with pytest.raises(ConfigError, match='d_model=36 must be a multiple of 8'):
        small('plain', d_model=36)


@pytest.mark.parametrize('form', FORMS)
def test_an_untrained_network_starts_where_the_release_does(form):
    model = build_detector(small(form, layers=3)).eval()
    out = model(torch.randn(1, 3, 64, 64))
    table = 'query_embed' in dict(model.named_children())
    assert (
        table == (form != 'two_stage') and len(model.bbox_embed) == dict(plain=1, refine=3, two_stage=4)[form]
    )
    for head in model.class_embed:
        assert torch.allclose(head.bias, torch.tensor(-math.log(99)))
    biases = [head.layers[-1].bias.tolist() for head in model.bbox_embed]
    assert biases == [[0, 0, -2, -2] if i == 0 and table else [0, 0, 0, 0] for i in range(len(biases))]
    if table:
        torch.testing.assert_close(out['pred_boxes'][..., 2:], torch.full((1, 15, 2), 0.1192), **CLOSE)


@pytest.mark.parametrize(
    'method,form',
    [*((m, 'two_stage') for m in methods_of(None, METHODS)), ('semi_detr', 'plain'), ('semi_detr', 'refine')],
)
def test_it_trains_with_every_method(tmp_path, method, form):
    cfg = tiny('run.test=false', 'pseudo.top_k=5', 'pseudo.min_score=0', 'mining.init=all', method=method)
    cfg = dataclasses.replace(cfg, detector=dataclasses.replace(small(form), num_classes=0))
    run = Trainer(cfg, tmp_path / 'r', progress=False)
    before = {n: p.detach().clone() for n, p in run.student.named_parameters() if p.requires_grad}
    result = run.fit()
    assert result['config']['detector']['form'] == form
    after = dict(run.student.named_parameters())
    assert [n for n, p in before.items() if torch.equal(p, after[n])] == []
    rows = [json.loads(line) for line in (tmp_path / 'r' / 'log.jsonl').read_text().splitlines()]
    assert all(0 < row['loss'] < math.inf for row in rows if 'loss' in row)
    if method != 'supervised':
        assert rows[-1]['pseudo_boxes'] > 0 and 'loss_unsup_l1' in rows[-1]
    if method == 'semi_detr':
        assert any(row.get('loss_con', 0) > 0 for row in rows)
