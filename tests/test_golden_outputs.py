"Outputs of the original DINO and one-stage Deformable-DETR, from stored features or memory; always there"

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from semidetr.detectors import deformable_detr as dd
from semidetr.detectors import detector as dino
from semidetr.detectors import weights as W
from semidetr.detectors.backbone import BackboneConfig
from semidetr.detectors.contract import build_detector, post_process
from semidetr.detectors.deformable_detr import DeformableDETRConfig, from_original
from semidetr.detectors.denoising import DenoisingConfig, ExtraQueries
from semidetr.detectors.detector import DetectorConfig
from semidetr.detectors.transformer import TransformerConfig, token_geometry
from test_deformable_detr import FULL, golden, needs_full, tiny_resnet
from test_golden_losses import Features

GOLDEN = Path(__file__).parent / 'golden'
FILES = ('dino_encoder', 'dino_decoder', 'deformable_detr_single')
BACKBONE = BackboneConfig('resnet50', 'none', (8, 16, 32))  # in place of one of widths 16, 32 and 64
CLOSE = dict(rtol=0, atol=1e-4)
SIZES = dict(d_model=32, n_heads=4, n_levels=4, n_points=4, enc_layers=2, dec_layers=2)
PIXELS = [(186, 242), (150, 214)]  # in which the original reports its boxes
KEPT = ('pred_logits', 'pred_boxes', 'hs', 'mask')


def small_copies():
    "file -> {name: array}: our names of all weights behind the backbone, inputs and outputs after `io/`"
    from safetensors.torch import load_file

    found = {}
    io, state = (load_file(FULL / 'dino_a' / f'{name}.safetensors') for name in ('io', 'original'))
    with mock.patch.object(dino, 'build_backbone', tiny_resnet):
        weights = W.convert(state, heads=4, backbone=BACKBONE).state
    weights = {k: v for k, v in weights.items() if not k.startswith('backbone.')}
    prefixes = ('input_proj.', 'transformer.encoder.', 'transformer.level_embed')
    first = {k: v for k, v in weights.items() if k.startswith(prefixes)}
    first |= {f'io/{k}': v for k, v in io.items() if k.startswith('feat.')}
    names = [k for k in io if k in KEPT or k.startswith(('enc_logits', 'enc_boxes', 'post.', 'dn.'))]
    second = {k: v for k, v in weights.items() if k not in first} | {f'io/{k}': io[k] for k in names}
    found['dino_encoder'], found['dino_decoder'] = first, second

    settings, state, io = golden('plain')
    with mock.patch.object(dd, 'build_backbone', tiny_resnet):
        weights = from_original(state, settings)
    weights = {k: v for k, v in weights.items() if not k.startswith(('backbone.', *prefixes))}
    names = [k for k in io if k in (*KEPT, 'memory', 'init_reference') or k.startswith('post.')]
    found['deformable_detr_single'] = weights | {f'io/{k}': io[k] for k in names}
    return {file: {k: v.numpy() for k, v in tensors.items()} for file, tensors in found.items()}


def stored(*files):
    "(weights, inputs and outputs)"
    tensors = {k: torch.from_numpy(v) for f in files for k, v in np.load(GOLDEN / f'{f}.npz').items()}
    weights = {k: v for k, v in tensors.items() if not k.startswith('io/')}
    return weights, {k.removeprefix('io/'): v for k, v in tensors.items() if k.startswith('io/')}


def check_layers(out, io):
    for key in ('pred_logits', 'pred_boxes'):
        layers = torch.stack([*(layer[key] for layer in out['aux_outputs']), out[key]])
        torch.testing.assert_close(layers, io[key], **CLOSE)
    torch.testing.assert_close(out['hs'], io['hs'], **CLOSE)


def check_detections(out, io):
    "Those of the original, which leaves boxes outside of the image"
    count = len(io['post.0.scores'])
    for b, found in enumerate(post_process(out, PIXELS, top_k=count)):
        h, w = PIXELS[b]
        wanted = io[f'post.{b}.boxes'].clamp(min=0).minimum(torch.tensor([w, h, w, h]).float())
        torch.testing.assert_close(found['scores'], io[f'post.{b}.scores'], **CLOSE)
        torch.testing.assert_close(found['boxes'], wanted, rtol=0, atol=0.01)
        assert torch.equal(found['labels'], io[f'post.{b}.labels'])


def test_dino(monkeypatch):
    "From features to the boxes of every layer, proposals, and denoising queries in front"
    weights, io = stored('dino_encoder', 'dino_decoder')
    features = [io[f'feat.{i}'] for i in range(3)]
    monkeypatch.setattr(dino, 'build_backbone', lambda cfg: Features([16, 32, 64], features))
    rows, ffn = len(weights['label_enc.weight']), len(weights['transformer.encoder.layers.0.linear1.bias'])
    transformer = TransformerConfig(**SIZES, ffn=ffn, num_queries=16, select_invalid=True)
    model = build_detector(DetectorConfig(7, BACKBONE, transformer, DenoisingConfig(label_rows=rows))).eval()
    model.load_state_dict(weights)
    blocked = io['dn.attn_mask'][:12, :12]
    noised = ExtraQueries(io['dn.content'], io['dn.box_logits'], blocked, 'denoising', {})
    with torch.no_grad():
        encoded = model.encode(None, io['mask'])
        out = model.decode(encoded)
        both = model.decode(encoded, [noised])
        other = model.decode(model.encode(None), [])
    check_layers(out, io)
    check_layers(both, io)
    check_detections(out, io)
    found = both['extra']['denoising']
    for key in ('pred_logits', 'pred_boxes'):
        torch.testing.assert_close(found[key], io[f'dn.{key}'], **CLOSE)
    torch.testing.assert_close(encoded.enc_logits, io['enc_logits'], **CLOSE)
    torch.testing.assert_close(encoded.enc_boxes, io['enc_boxes'], **CLOSE)
    assert (other['pred_logits'] - io['pred_logits'][-1]).abs().max() > 0.1  # the mask counts


def test_deformable_detr_of_one_stage(monkeypatch):
    "From the encoder's memory to the boxes of every layer"
    weights, io = stored('deformable_detr_single')
    monkeypatch.setattr(dd, 'build_backbone', lambda cfg: Features([16, 32, 64], []))
    ffn = len(weights['transformer.decoder.layers.0.linear1.bias'])
    sizes = dict(d_model=32, levels=4, heads=4, points=3, layers=2, ffn=ffn, num_queries=16)
    model = build_detector(DeformableDETRConfig(7, BACKBONE, **sizes, form='plain')).eval()
    lost = model.load_state_dict(weights, strict=False)
    behind = ('input_proj.', 'transformer.encoder.', 'transformer.level_embed')
    assert lost.unexpected_keys == [] and all(k.startswith(behind) for k in lost.missing_keys)
    shapes = ((12, 16), (6, 8), (3, 4), (2, 2))
    masks = dd.level_masks(io['mask'], [torch.zeros(2, 1, h, w) for h, w in shapes])
    geo = token_geometry(shapes, 32, masks, **dd.POSITION)
    monkeypatch.setattr(model.transformer, 'encode_tokens', lambda features, masks: (io['memory'], geo))
    monkeypatch.setattr(model.input_proj, 'forward', lambda features: [])
    with torch.no_grad():
        encoded = model.encode(None)
        out = model.decode(encoded)
    torch.testing.assert_close(encoded.queries.start.sigmoid()[..., :2], io['init_reference'], **CLOSE)
    check_layers(out, io)
    check_detections(out, io)


@needs_full
@pytest.mark.parametrize('file', FILES)
def test_copies_are_up_to_date(file):
    found, wanted = dict(np.load(GOLDEN / f'{file}.npz')), small_copies()[file]
    assert found.keys() == wanted.keys() and (GOLDEN / f'{file}.npz').stat().st_size < 300_000
    assert all(np.array_equal(found[k], v) for k, v in wanted.items())
