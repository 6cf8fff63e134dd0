"DETR: outputs of the original and of transformers, names of state dicts, the contract, extra queries"

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from semidetr.core import ConfigError
from semidetr.detectors import deformable_detr as dd
from semidetr.detectors import detr
from semidetr.detectors.backbone import BackboneConfig, build_backbone
from semidetr.detectors.contract import build_detector, post_process
from semidetr.detectors.denoising import ExtraQueries
from semidetr.detectors.detr import DETRConfig, from_original, to_original
from test_contract import check_contract
from test_deformable_detr import FULL, golden, needs_full, tiny_resnet
from torch import nn

SMALL = Path(__file__).parent / 'golden' / 'detr.npz'
CLOSE = dict(rtol=1e-5, atol=1e-5)


def small(**changed):
    "Settings of a detector that is built in a second"
    backbone = BackboneConfig('efficientnet_lite0', 'none', (16,))
    sizes = dict(d_model=32, heads=4, layers=2, ffn=48, num_queries=15)
    return DETRConfig(4, **{'backbone': backbone, **sizes, **changed})


def all_layers(outputs, key):
    return torch.stack([*(layer[key] for layer in outputs['aux_outputs']), outputs[key]])


# --- the original's outputs -------------------------------------------------------------------
GOLDEN_SETTINGS = DETRConfig(
    7, BackboneConfig('resnet50', 'none', (32,)), d_model=32, heads=4, layers=2, ffn=64, num_queries=16
)


def check_outputs(out, io):
    for key in ('pred_logits', 'pred_boxes'):
        torch.testing.assert_close(all_layers(out, key), io[key], **CLOSE)
    torch.testing.assert_close(out['hs'], io['hs'], **CLOSE)
    torch.testing.assert_close(all_layers(out, 'scores'), io['pred_logits'].softmax(-1)[..., :-1], **CLOSE)


@needs_full
def test_outputs_are_those_of_the_original(monkeypatch):
    "From images to boxes, and the original's post-processing: one label per query"
    from safetensors.torch import load_file

    monkeypatch.setattr(detr, 'build_backbone', tiny_resnet)
    state, io = (load_file(FULL / 'detr_a' / f'{name}.safetensors') for name in ('original', 'io'))
    model = build_detector(GOLDEN_SETTINGS).eval()
    model.load_state_dict(from_original(state, GOLDEN_SETTINGS))
    assert {k: v.tolist() for k, v in to_original(model.state_dict()).items()} == {
        k: v.tolist() for k, v in state.items()
    }
    images = io['images'].float()
    with torch.no_grad():
        torch.testing.assert_close(model.backbone(images)[0], io['feat.0'], **CLOSE)
        encoded = model.encode(images, io['mask'])
        out = model.decode(encoded)
    valid = ~encoded.padding_mask
    torch.testing.assert_close(encoded.memory[valid], io['memory'][valid], **CLOSE)
    check_outputs(out, io)
    for b in range(2):
        score, label = out['scores'][b].max(-1)
        torch.testing.assert_close(score, io[f'post.{b}.scores'], **CLOSE)
        assert torch.equal(label, io[f'post.{b}.labels'])


class Features(nn.Module):
    "Stored features of a backbone of width 64"

    channels = [64]

    def __init__(self, stored):
        super().__init__()
        self.stored = stored

    def forward(self, images):
        return [self.stored]


def test_transformer_is_that_of_the_original(monkeypatch):
    "From the features of the backbone to boxes; the same values, always there"
    stored = {k: torch.tensor(v) for k, v in np.load(SMALL).items()}
    io = {k.removeprefix('io/'): v for k, v in stored.items() if k.startswith('io/')}
    monkeypatch.setattr(detr, 'build_backbone', lambda cfg: Features(io['feat.0']))
    model = build_detector(GOLDEN_SETTINGS).eval()
    model.load_state_dict({k: v for k, v in stored.items() if not k.startswith('io/')})
    with torch.no_grad():
        check_outputs(model(None, io['mask']), io)
        moved = model(None)  # the mask counts
    assert (moved['pred_logits'] - io['pred_logits'][-1]).abs().max() > 0.1


@needs_full
@pytest.mark.parametrize('training', [True, False])
def test_all_tokens_of_a_two_stage_encoder_are_those_of_the_original(monkeypatch, training):
    "Deformable-DETR, enc_tokens=all: logits and boxes of every token in training, else of the selected"
    monkeypatch.setattr(dd, 'build_backbone', tiny_resnet)
    settings, state, io = golden('two_stage')
    settings = dataclasses.replace(settings, enc_tokens='all', dropout=0.0)
    model = build_detector(settings).train(training)
    model.load_state_dict(dd.from_original(state, settings))
    out = model(io['images'].float(), io['mask'])
    for key in ('pred_logits', 'pred_boxes'):
        torch.testing.assert_close(all_layers(out, key), io[key], rtol=0, atol=1e-4)
    found = out['enc_outputs']
    if not training:
        assert found['pred_logits'].shape == (2, 16, 7)
        return
    torch.testing.assert_close(found['pred_logits'], io['enc_logits'], **CLOSE)
    torch.testing.assert_close(found['pred_boxes'], io['enc_boxes'], **CLOSE)
    assert (found['pred_boxes'] == 1).all(-1).any()
    (found['pred_logits'].square().sum() + (found['pred_boxes'] - 0.3).abs().sum()).backward()
    for name, p in model.named_parameters():
        assert p.grad is None or torch.isfinite(p.grad).all(), name


# --- transformers --------------------------------------------------------------------------
def test_outputs_are_those_of_transformers():
    "Random weights copied over, a padded batch; its own ResNet"
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    body = transformers.ResNetConfig(
        embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type='basic'
    )
    body.out_features = ['stage4']
    cfg = transformers.DetrConfig(
        backbone_config=body,
        use_timm_backbone=False,
        backbone=None,
        use_pretrained_backbone=False,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_queries=15,
        num_labels=4,
    )
    theirs = transformers.DetrForObjectDetection(cfg).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.05 * torch.randn_like(p))
        for n, b in theirs.named_buffers():
            if 'running' in n:
                b.copy_(torch.rand_like(b) + 0.5)
    settings = small(backbone=BackboneConfig('resnet18', 'none', (32,)))
    ours = build_detector(settings).eval()
    tensors = {n: t for n, t in theirs.state_dict().items() if not n.endswith('num_batches_tracked')}
    ours.load_state_dict(in_our_order(tensors, ours.state_dict()))
    images, mask = torch.randn(2, 3, 96, 128), torch.zeros(2, 96, 128, dtype=torch.bool)
    mask[1, 60:], mask[1, :, 70:] = True, True
    images.masked_fill_(mask[:, None], 0)
    with torch.no_grad():
        expected, found = theirs(images, pixel_mask=(~mask).long()), ours(images, mask)
    torch.testing.assert_close(found['pred_logits'], expected.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(found['pred_boxes'], expected.pred_boxes, rtol=0, atol=1e-4)


def in_our_order(tensors, wanted):
    "Names of transformers to ours, part by part"
    found = {}
    for name, value in wanted.items():
        if name.startswith('backbone.'):
            found[name] = tensors[resnet_name(name.removeprefix('backbone.body.'), tensors)]
        elif '.in_proj_' in name:
            stem, kind = their_name(name).split('.in_proj_')
            found[name] = torch.cat([tensors[f'{stem}.{k}_proj.{kind}'] for k in 'qkv'])
        else:
            found[name] = tensors[their_name(name)]
    return found


def resnet_name(name, tensors):
    prefix = next(n for n in tensors if 'embedder.embedder' in n).split('embedder.embedder')[0]
    parts, kind = name.split('.'), name.split('.')[-1]
    layer = 'normalization' if 'bn' in name or '.downsample.1.' in name else 'convolution'
    if parts[0] in ('conv1', 'bn1'):
        return f'{prefix}embedder.embedder.{layer}.{kind}'
    block = f'{prefix}encoder.stages.{int(parts[0][-1]) - 1}.layers.{parts[1]}'
    if parts[2] == 'downsample':
        return f'{block}.shortcut.{layer}.{kind}'
    return f'{block}.layer.{int(parts[2][-1]) - 1}.{layer}.{kind}'


def their_name(name):
    norms = ('self_attn_layer_norm', 'encoder_attn_layer_norm', 'final_layer_norm')
    if '.encoder.' in name:
        norms = norms[::2]
    for i, norm in enumerate(norms, 1):
        name = name.replace(f'.norm{i}.', f'.{norm}.')
    for old, new in (
        ('transformer.decoder.norm.', 'model.decoder.layernorm.'),
        ('transformer.', 'model.'),
        ('multihead_attn', 'encoder_attn'),
        ('out_proj', 'o_proj'),
        ('linear', 'mlp.fc'),
        ('input_proj.', 'model.input_projection.'),
        ('query_embed.', 'model.query_position_embeddings.'),
        ('class_embed.', 'class_labels_classifier.'),
        ('bbox_embed.', 'bbox_predictor.'),
    ):
        name = name.replace(old, new)
    return name


# --- padding ---------------------------------------------------------------------------------
class Patches(nn.Module):
    "A backbone without borders: each cell sees its own pixels only"

    def __init__(self, stride=16):
        super().__init__()
        self.channels = [24]
        self.body = nn.Conv2d(3, 24, stride, stride=stride)

    def forward(self, images):
        return [self.body(images).relu()]


def test_an_image_alone_and_in_a_padded_batch(monkeypatch):
    "Equal outputs, extra queries included: padding and neighbours have no influence"
    monkeypatch.setattr(detr, 'build_backbone', lambda cfg: Patches())
    torch.manual_seed(0)
    model = build_detector(small()).double().eval()
    sizes = [(64, 96), (48, 32), (80, 64)]
    images = torch.full((3, 3, 80, 96), 7.0, dtype=torch.float64)
    mask = torch.ones(3, 80, 96, dtype=torch.bool)
    for b, (h, w) in enumerate(sizes):
        images[b, :, :h, :w], mask[b, :h, :w] = torch.randn(3, h, w), False
    content, boxes = torch.randn(3, 5, 32).double(), torch.randn(3, 5, 4).double()
    free = torch.zeros(5, 5, dtype=torch.bool)
    with torch.no_grad():
        together = model.decode(model.encode(images, mask), [ExtraQueries(content, boxes, free, 'x')])
        for b, (h, w) in enumerate(sizes):
            own = ExtraQueries(content[b : b + 1], boxes[b : b + 1], free, 'x')
            alone = model.decode(model.encode(images[b : b + 1, :, :h, :w]), [own])
            for key in ('pred_logits', 'pred_boxes', 'scores'):
                torch.testing.assert_close(together[key][b], alone[key][0], **CLOSE)
                torch.testing.assert_close(together['extra']['x'][key][:, b], alone['extra']['x'][key][:, 0])


@pytest.mark.parametrize('size', [(33, 50), (61, 32), (1, 97)])
def test_odd_sizes(size):
    h, w = size
    model, mask = build_detector(small()).eval(), torch.zeros(2, h, w, dtype=torch.bool)
    mask[1, :, w // 2 :] = True
    with torch.no_grad():
        out = model(torch.randn(2, 3, h, w), mask)
    assert torch.isfinite(out['pred_logits']).all() and out['pred_boxes'].shape == (2, 15, 4)
    assert len(post_process(out, [size, size], top_k=10)[1]['scores']) == 10


# --- the contract --------------------------------------------------------------------------
@pytest.mark.parametrize('changed', [{}, dict(layers=1), dict(enc_layers=0, layers=3, dropout=0.0)])
def test_it_honours_the_contract(changed):
    check_contract(small(**changed))


def test_every_prediction_has_scores_and_cached_outputs_stay():
    torch.manual_seed(0)
    model = build_detector(small()).eval()
    encoded = model.encode(torch.randn(2, 3, 64, 64))
    first = model.decode(encoded)
    own = ExtraQueries(torch.randn(2, 3, 32), torch.randn(2, 3, 4), torch.zeros(3, 3).bool(), 'x')
    later = model.decode(encoded, [own], first)
    assert later['scores'] is first['scores'] and first['extra'] == {}
    assert later['extra']['x']['scores'].shape == (2, 2, 3, 4)
    for p in (later, *later['aux_outputs'], later['extra']['x']):
        torch.testing.assert_close(p['scores'], p['pred_logits'].softmax(-1)[..., :-1])
    assert model.denoise([]) == [] and 'enc_outputs' not in later


def test_gradients_reach_every_trainable_parameter():
    "In training; zero only where zero contents meet a weight: the first self-attention of the decoder"
    torch.manual_seed(0)
    model = build_detector(small(dropout=0.0)).train()
    out = model(torch.randn(2, 3, 64, 96))
    sum(
        p[k].square().sum() for p in (out, *out['aux_outputs']) for k in ('pred_logits', 'pred_boxes')
    ).backward()
    none = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    zero = [n for n, p in model.named_parameters() if p.requires_grad and not p.grad.any()]
    assert none == []
    first = 'transformer.decoder.layers.0.'
    assert set(zero) <= {
        first + n for n in ('self_attn.in_proj_weight', 'self_attn.out_proj.weight', 'norm1.weight')
    }


def test_half_precision_keeps_boxes_whole():
    torch.manual_seed(0)
    model, images = build_detector(small()).eval(), torch.randn(2, 3, 64, 96)
    mask = torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[1, :, 50:] = True
    with torch.no_grad():
        exact = model(images, mask)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            half = model(images, mask)
    assert half['pred_boxes'].dtype == half['scores'].dtype == torch.float32
    assert (half['pred_boxes'] - exact['pred_boxes']).abs().max() < 0.05


# --- settings, names -------------------------------------------------------------------------
def test_settings_are_checked():
    with pytest.raises(ConfigError, match="detector.kind='dert' is unknown"):
        small(kind='dert')
    with pytest.raises(ConfigError, match='DETR has one map'):
        small(backbone=BackboneConfig('efficientnet_lite0', out_strides=(8, 16)))
    with pytest.raises(ConfigError, match='multiple of 4 and of n_heads=4'):
        small(d_model=34)
    with pytest.raises(ConfigError, match="enc_tokens='all' needs form='two_stage'"):
        dd.DeformableDETRConfig(4, enc_tokens='all')
    with pytest.raises(ConfigError, match='detector.kind'):
        dd.DeformableDETRConfig(4, kind='detr')


@needs_full
@pytest.mark.parametrize('dc5', [False, True])
def test_names_and_shapes_of_the_release(dc5):
    "Every key of the full-size file is used, and nothing is missing"
    rows = (FULL / 'keys_detr_r50.tsv').read_text().splitlines()[2:]
    state = {k: torch.empty([int(n) for n in s.split('x')]) for k, s in (row.split('\t') for row in rows)}
    settings = detr.detr_r50(91, dc5)
    assert len(from_original(state, settings)) == 458
    state.pop('query_embed.weight')
    with pytest.raises(ConfigError, match=r'do not fit a DETR \(1 mismatches\): missing query_embed.weight'):
        from_original(state, settings)


def test_an_untrained_network_starts_where_the_release_does():
    torch.manual_seed(0)
    model = build_detector(small(d_model=64, num_queries=100))
    assert abs(model.query_embed.weight.std() - 1) < 0.05
    fused = model.transformer.decoder.layers[0].self_attn.in_proj_weight
    assert abs(fused.abs().max() - (6 / (4 * 64)) ** 0.5) < 0.002
    for layer in (*model.transformer.encoder.layers, *model.transformer.decoder.layers):
        assert not layer.self_attn.in_proj_bias.any() and not layer.self_attn.out_proj.bias.any()
        assert layer.linear1.bias.any()


def test_dc5_is_the_same_network_at_twice_the_resolution():
    "Equal names and weights; stage 4 without stride, dilated by 2 but for its first block; merged norms too"
    plain = build_backbone(BackboneConfig('resnet50', 'none', (16, 32)))
    dense = build_backbone(BackboneConfig('resnet50_dc5', 'none', (16,)))
    dense.load_state_dict(plain.state_dict())
    blocks = dense.body['layer4']
    assert [b.conv2.dilation for b in blocks] == [(1, 1), (2, 2), (2, 2)]
    assert all(b.conv2.stride == (1, 1) for b in blocks) and blocks[0].downsample[0].stride == (1, 1)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        found = dense(images)[0]
        stage3 = plain(images)[0]
        assert found.shape == (1, 2048, 4, 6) and dense.channels == [2048]
        torch.testing.assert_close(found, blocks(stage3), rtol=1e-3, atol=1e-3)
    with pytest.raises(ConfigError, match='no map of stride 32'):
        build_backbone(BackboneConfig('resnet50_dc5', 'none', (32,)))
