"Losses of the original DETR, Deformable-DETR and DINO: every term, the matching, all gradients"

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from semidetr.detectors import deformable_detr as dd
from semidetr.detectors import detector as dino
from semidetr.detectors import detr
from semidetr.detectors import weights as W
from semidetr.detectors.backbone import BackboneConfig
from semidetr.detectors.contract import build_detector
from semidetr.detectors.denoising import ExtraQueries
from semidetr.detectors.from_detr import DETECTORS
from semidetr.detectors.transformer import token_geometry
from semidetr.matching.losses import CriterionConfig, set_criterion, sigmoid_focal_loss
from semidetr.matching.matching import hungarian_layers
from test_deformable_detr import FULL, needs_full, tiny_resnet
from torch.nn.functional import linear

GOLDEN = Path(__file__).parent / 'golden'
COPY = GOLDEN / 'losses.npz'
CASES = {  # folder -> (our name of the detector, strides of its backbone)
    'detr_a': ('detr', (32,)),
    'ddetr_single_a': ('deformable_detr', (8, 16, 32)),
    'ddetr_refine_a': ('deformable_detr_refine', (16, 32)),
    'ddetr_two_stage_a': ('deformable_detr_two_stage', (16, 32)),
    'dino_a': ('dino', (8, 16, 32)),
}
OFFICIAL_DINO = dict(w_cls=1.0, cost_cls=2.0, loss_l1=5.0, enc_labels='true')  # ours follows Semi-DETR's code
TERMS = dict(cls='ce', l1='bbox', giou='giou')
TOLERANCE = 1e-4  # absolute below 1, relative above


def criterion(case):
    return CriterionConfig(**(OFFICIAL_DINO if case == 'dino_a' else DETECTORS[CASES[case][0]].criterion))


def original_name(name, layers=2):
    "loss_l1_dn_1 -> loss_bbox_dn: the original gives the last layer no number"
    term, _, suffix = name.removeprefix('loss_').partition('_')
    suffix = 'dn' if suffix == f'dn_{layers - 1}' else suffix
    return f'loss_{TERMS[term]}' + (f'_{suffix}' if suffix else '')


def close(found, wanted):
    return abs(found - wanted) <= TOLERANCE * max(1, abs(wanted))


def check_losses(losses, info):
    "Each term times its weight, none missing, and their sum"
    compared = set()
    for name, value in losses.items():
        theirs = original_name(name)
        if theirs not in info['losses']:
            theirs = theirs.replace('_enc', '_interm')
        wanted = info['losses'][theirs] * info['weights'][theirs]
        assert close(float(value.detach()), wanted), (name, float(value.detach()), wanted)
        compared.add(theirs)
    assert compared == set(info['losses']) & set(info['weights'])
    assert close(float(sum(losses.values()).detach()), info['total'])


def check_matching(outputs, targets, info, cfg):
    "The pairs of every decoder layer, and of the encoder"
    layers = [*outputs['aux_outputs'], outputs]
    groups = [(hungarian_layers(layers, targets, **cfg.cost), info['matching'])]
    if 'enc_outputs' in outputs:
        labels = torch.zeros_like if cfg.enc_labels == 'zero' else torch.clone
        own = [dict(labels=labels(t['labels']), boxes=t['boxes']) for t in targets]
        found = hungarian_layers([outputs['enc_outputs']], own, **cfg.cost)
        groups.append((found, [info['matching_enc']]))
    for found, wanted in groups:
        assert [[[q.tolist(), t.tolist()] for q, t in layer] for layer in found] == wanted


def check_gradients(model, names, info, only=''):
    "The L2 norm of the gradient of every parameter; no gradient counts as zero"
    ours, compared = dict(model.named_parameters()), set()
    for theirs, wanted in info['grad_norms'].items():
        name = names.get(theirs, theirs)
        if not name.startswith(only):
            continue
        grad = ours[name].grad
        found = 0.0 if grad is None else float(grad.norm())
        assert close(found, wanted or 0.0), (name, found, wanted)
        compared.add(name)
    assert compared == {name for name in ours if name.startswith(only)}
    return len(compared)


def targets_of(io):
    return [dict(labels=io[f'target.{b}.labels'], boxes=io[f'target.{b}.boxes']) for b in range(2)]


def slots_of(targets, groups, n_max):
    "Codes of official denoising slots: an object, or -1 for whatever trains as background"
    code = torch.full((len(targets), groups, 2, n_max), -1)
    for b, target in enumerate(targets):
        code[b, :, 0, : len(target['labels'])] = torch.arange(len(target['labels']))
    return code.flatten(1)


def denoising(io, info, targets, table=None):
    "The stored denoising queries; with `table` (rows, d), their content is looked up there"
    content, n = io['dn.content'], info['dn']['pad_size']
    if table is not None:
        row = torch.cdist(content, table.detach()).argmin(-1)
        content = table[row].masked_fill((content == 0).all(-1, keepdim=True), 0)
        assert torch.equal(content.detach(), io['dn.content'])
    groups = info['dn']['num_dn_group']
    meta = dict(target=slots_of(targets, groups, n // (2 * groups)))
    blocked = io['dn.attn_mask'][:n, :n]
    return ExtraQueries(content, io['dn.box_logits'], blocked, 'denoising', meta)


# --- the whole network -----------------------------------------------------------------------
def full(case):
    "(our detector in training mode, original name -> ours, tensors, info)"
    from safetensors.torch import load_file

    folder = FULL / case
    info = json.loads((folder / 'info.json').read_text())
    io, state = load_file(folder / 'io.safetensors'), load_file(folder / 'original.safetensors')
    backbone = BackboneConfig('resnet50', 'none', CASES[case][1])
    done = W.convert(state, heads=info['config']['heads'], backbone=backbone)
    settings = done.settings
    if case != 'dino_a':
        settings = dataclasses.replace(settings, num_queries=info['config']['Q'], dropout=0.0)
    if case == 'ddetr_two_stage_a':
        settings = dataclasses.replace(settings, enc_tokens='all')
    model = build_detector(settings).train()
    model.load_state_dict(done.state)
    return model, {row.key: row.name for row in done.report.rows}, io, info


@needs_full
@pytest.mark.parametrize('case', CASES)
def test_a_training_step_is_that_of_the_original(case, monkeypatch):
    "From images to losses and back: losses, matching, gradient of every parameter"
    for module in (dd, detr, dino):
        monkeypatch.setattr(module, 'build_backbone', tiny_resnet)
    model, names, io, info = full(case)
    targets = targets_of(io)
    extras = [denoising(io, info, targets, model.label_enc.weight)] if case == 'dino_a' else []
    outputs = model.decode(model.encode(io['images'].float(), io['mask']), extras)
    losses = set_criterion(outputs, targets, 'o2o', criterion(case))
    check_losses(losses, info)
    check_matching(outputs, targets, info, criterion(case))
    sum(losses.values()).backward()
    assert check_gradients(model, names, info) == len(info['grad_norms'])


# --- a part of it that is always there ---------------------------------------------------------
KEPT = ('losses', 'weights', 'total', 'matching', 'matching_enc', 'grad_norms', 'dn')


def small_copy(case):
    "What `golden/losses.npz` holds of a case: outputs, decoder states, class heads, targets, expected values"
    from safetensors.torch import load_file

    folder = FULL / case
    io, state = load_file(folder / 'io.safetensors'), load_file(folder / 'original.safetensors')
    prefixes = ('pred_', 'hs', 'target.', 'enc_logits', 'enc_boxes', 'dn.')
    kept = {k: v.numpy() for k, v in io.items() if k.startswith(prefixes)}
    kept |= {k: v.numpy() for k, v in state.items() if k.startswith('class_embed.')}
    info = json.loads((folder / 'info.json').read_text())
    kept['info'] = np.array(json.dumps({k: info[k] for k in KEPT if k in info}))
    return {f'{case}/{k}': v for k, v in kept.items()}


def stored(case):
    "(tensors, info) of the small copy"
    arrays = {k.removeprefix(f'{case}/'): v for k, v in np.load(COPY).items() if k.startswith(case)}
    info = json.loads(str(arrays.pop('info')))
    return {k: torch.from_numpy(v) for k, v in arrays.items()}, info


def outputs_of(case, io, info):
    "The stored outputs as our detectors return them"
    layers = [dict(pred_logits=z, pred_boxes=b) for z, b in zip(io['pred_logits'], io['pred_boxes'])]
    if DETECTORS[CASES[case][0]].softmax:
        detr.add_scores(layers)
    outputs = dict(layers[-1], aux_outputs=layers[:-1])
    if 'enc_logits' in io:
        outputs['enc_outputs'] = dict(pred_logits=io['enc_logits'], pred_boxes=io['enc_boxes'])
    if 'dn.pred_logits' in io:
        meta = denoising(io, info, targets_of(io)).meta
        noised = dict(pred_logits=io['dn.pred_logits'], pred_boxes=io['dn.pred_boxes'], meta=meta)
        outputs['extra'] = dict(denoising=noised)
    return outputs


@pytest.mark.parametrize('case', CASES)
def test_losses_of_stored_outputs_are_those_of_the_original(case):
    io, info = stored(case)
    outputs, targets = outputs_of(case, io, info), targets_of(io)
    check_losses(set_criterion(outputs, targets, 'o2o', criterion(case)), info)
    check_matching(outputs, targets, info, criterion(case))


@pytest.mark.parametrize('case', [c for c in CASES if c != 'dino_a'])
def test_gradients_of_class_heads_are_those_of_the_original(case):
    "From stored decoder states; DINO's head serves its denoising queries too, whose states are not stored"
    io, info = stored(case)
    norms = {k.removeprefix('transformer.decoder.'): v for k, v in info['grad_norms'].items()}
    heads = sorted({k.rpartition('.')[0] for k in norms if k.startswith('class_embed')})
    parts = [{k: io[f'{h}.{k}'].requires_grad_() for k in ('weight', 'bias')} for h in heads]
    used = parts if len(parts) > 1 else parts * 2
    logits = [linear(h, p['weight'], p['bias']) for h, p in zip(io['hs'], used)]
    torch.testing.assert_close(torch.stack(logits), io['pred_logits'], rtol=0, atol=1e-4)
    outputs = outputs_of(case, io | dict(pred_logits=torch.stack(logits)), info)
    sum(set_criterion(outputs, targets_of(io), 'o2o', criterion(case)).values()).backward()
    compared = 0
    for name, part in zip(heads, parts):
        if part['weight'].grad is None:
            continue  # the head of the encoder
        for kind, p in part.items():
            found, wanted = float(p.grad.norm()), norms[f'{name}.{kind}']
            assert close(found, wanted), (name, kind, found, wanted)
            compared += 1
    assert compared == (2 if len(heads) == 1 else 4)


@needs_full
@pytest.mark.parametrize('case', CASES)
def test_small_copies_are_up_to_date(case):
    with np.load(COPY) as file:
        found = {k: v for k, v in file.items() if k.startswith(case)}
    wanted = small_copy(case)
    assert found.keys() == wanted.keys() and COPY.stat().st_size < 300_000
    assert all(np.array_equal(found[k], v) for k, v in wanted.items())


# --- gradients of whole decoders, from weights that other tests store ---------------------------
class Features(torch.nn.Module):
    "Stored features of a backbone"

    def __init__(self, channels, stored):
        super().__init__()
        self.channels, self.stored = channels, stored

    def forward(self, images):
        return self.stored


def test_gradients_of_detr_are_those_of_the_original(monkeypatch):
    "Everything behind the backbone"
    arrays = {k: torch.tensor(v) for k, v in np.load(GOLDEN / 'detr.npz').items()}
    io, info = stored('detr_a')
    monkeypatch.setattr(detr, 'build_backbone', lambda cfg: Features([64], [arrays['io/feat.0']]))
    sizes = dict(d_model=32, heads=4, layers=2, ffn=64, num_queries=16, dropout=0.0)
    model = build_detector(detr.DETRConfig(7, BackboneConfig('resnet50', 'none', (32,)), **sizes)).train()
    model.load_state_dict({k: v for k, v in arrays.items() if not k.startswith('io/')})
    outputs = model(None, arrays['io/mask'])
    losses = set_criterion(outputs, targets_of(io), 'o2o', criterion('detr_a'))
    check_losses(losses, info)
    sum(losses.values()).backward()
    info['grad_norms'] = {k: v for k, v in info['grad_norms'].items() if not k.startswith('backbone.')}
    assert check_gradients(model, {}, info) == len(info['grad_norms'])


def test_gradients_of_a_two_stage_decoder_are_those_of_the_original(monkeypatch):
    "Everything behind the encoder, with losses of all its tokens"
    arrays = {k: torch.tensor(v) for k, v in np.load(GOLDEN / 'deformable_detr.npz').items()}
    arrays = {k.removeprefix('two_stage/'): v for k, v in arrays.items() if k.startswith('two_stage/')}
    io, info = stored('ddetr_two_stage_a')
    monkeypatch.setattr(dd, 'build_backbone', lambda cfg: Features([32, 64], []))
    sizes = dict(d_model=32, levels=3, heads=4, points=4, layers=2, ffn=48, num_queries=16, dropout=0.0)
    settings = dd.DeformableDETRConfig(7, **sizes, form='two_stage', enc_tokens='all')
    model = build_detector(settings).train()
    model.load_state_dict({k: v for k, v in arrays.items() if not k.startswith('io/')}, strict=False)
    shapes = [tuple(s) for s in arrays['io/shapes'].tolist()]
    masks = [
        m.view(-1, h, w)
        for m, (h, w) in zip(arrays['io/padding'].split([h * w for h, w in shapes], 1), shapes)
    ]
    geo = token_geometry(tuple(shapes), 32, masks, **dd.POSITION)
    monkeypatch.setattr(
        model.transformer, 'encode_tokens', lambda features, masks: (arrays['io/memory'], geo)
    )
    monkeypatch.setattr(model.input_proj, 'forward', lambda features: [])
    losses = set_criterion(model(None), targets_of(io), 'o2o', criterion('ddetr_two_stage_a'))
    check_losses(losses, info)
    sum(losses.values()).backward()
    names = {k: k.replace('transformer.decoder.class', 'class') for k in info['grad_norms']}
    names = {k: v.replace('transformer.decoder.bbox', 'bbox') for k, v in names.items()}
    parts = ('transformer.decoder.', 'transformer.enc_output', 'transformer.pos_trans', 'class_', 'bbox_')
    counts = [check_gradients(model, names, info, part) for part in parts]
    assert counts[-2:] == [6, 18] and min(counts) > 0


# --- what the golden batches do not hold --------------------------------------------------------
@pytest.mark.parametrize('official', [True, False])
def test_denoising_slots_of_an_image_without_boxes(official):
    "DINO trains them as background (-1); Semi-DETR's code, which is ours, does not train them (-3)"
    torch.manual_seed(0)
    targets = [
        dict(labels=torch.tensor([2]), boxes=torch.tensor([[0.5, 0.5, 0.2, 0.3]])),
        dict(labels=torch.zeros(0, dtype=torch.long), boxes=torch.zeros(0, 4)),
    ]
    layer = dict(pred_logits=torch.randn(2, 5, 7), pred_boxes=torch.rand(2, 5, 4))
    z, slots = torch.randn(1, 2, 4, 7), slots_of(targets, 2, 1)
    assert slots.tolist() == [[0, -1, 0, -1], [-1, -1, -1, -1]]
    if not official:
        slots[1] = -3
    noised = dict(pred_logits=z, pred_boxes=torch.rand(1, 2, 4, 4), meta=dict(target=slots))
    losses = set_criterion({**layer, 'extra': dict(denoising=noised)}, targets, 'o2o', criterion('dino_a'))
    y = torch.zeros(2, 4, 7)
    y[0, 0, 2] = y[0, 2, 2] = 1
    entries = sigmoid_focal_loss(z[0], y)[: 2 if official else 1]
    torch.testing.assert_close(losses['loss_cls_dn_0'], entries.sum() / 2)
