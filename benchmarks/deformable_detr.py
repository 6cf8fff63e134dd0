"""Deformable DETR (one stage, no box refinement) of the original paper, made of semidetr's modules.

`twins(name)` builds transformers' model from a configuration (nothing is downloaded) and copies its weights
into ours; `agreement` measures how far the two are apart."""

import dataclasses, math, re, tempfile
from pathlib import Path
from unittest import mock
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet
from semidetr.boxes import inverse_sigmoid
from semidetr.detectors import backbone as B
from semidetr.detectors.contract import split_parameters
from semidetr.detectors.detector import level_masks, make_heads
from semidetr.detectors.transformer import DecoderLayer, Encoder, TransformerConfig, token_geometry
from semidetr.matching.losses import CriterionConfig, set_criterion

# the backbones of the comparison: kind of block, stem, widths and blocks of the stages
RESNETS = dict(
    tiny=('basic', 32, (32, 64, 128, 256), (2, 2, 2, 2)),
    resnet18=('basic', 64, (64, 128, 256, 512), (2, 2, 2, 2)),
    resnet50=('bottleneck', 64, (256, 512, 1024, 2048), (3, 4, 6, 3)),
)
SIZE = TransformerConfig(
    d_model=128, n_heads=8, n_levels=4, n_points=4, enc_layers=3, dec_layers=3, ffn=512, num_queries=100
)
CLASSES = 80
# the weights of transformers, in cost and loss
CRITERION = CriterionConfig(w_cls=1.0, cost_l1=5.0, w_giou=2.0, loss_l1=5.0)


def sine(mask, num_feats, temperature=10000):  # (B,h,w) True=padding -> (B,2*num_feats,h,w)
    "Position code of Deformable DETR: `sine_position` at the centre of a cell instead of its end"
    power = 2 * torch.arange(num_feats // 2, device=mask.device) / num_feats

    def code(count, last):
        angle = ((count - 0.5) / (last + 1e-6) * 2 * math.pi)[..., None] / temperature**power
        return torch.stack((angle.sin(), angle.cos()), -1).flatten(-2)

    y, x = (~mask).cumsum(1).float(), (~mask).cumsum(2).float()
    return torch.cat((code(y, y[:, -1:]), code(x, x[:, :, -1:])), -1).permute(0, 3, 1, 2)


class DeformableDETR(nn.Module):
    "Backbone, encoder, learned queries with learned reference points, decoder, heads shared by its layers"

    def __init__(self, backbone, cfg=SIZE, num_classes=CLASSES):
        super().__init__()
        d = cfg.d_model
        self.backbone, self.input_proj = backbone, B.InputProj(backbone.channels, d, cfg.n_levels)
        self.encoder = Encoder(cfg)
        self.layers = nn.ModuleList(DecoderLayer(cfg) for _ in range(cfg.dec_layers))
        self.level_embed = nn.Parameter(torch.empty(cfg.n_levels, d))
        self.queries = nn.Embedding(cfg.num_queries, 2 * d)
        self.reference_points = nn.Linear(d, 2)
        self.class_head, self.box_head = make_heads(d, num_classes)
        self.cfg, self.cache = cfg, {}
        nn.init.normal_(self.level_embed)

    def geometry(self, features, masks):
        "Positions and reference points of the tokens; kept where nothing is padded"
        shapes, d = tuple(tuple(f.shape[-2:]) for f in features), self.cfg.d_model
        if masks is None and shapes in self.cache:
            return self.cache[shapes]
        with torch.inference_mode(False), torch.no_grad():
            blank = masks or [torch.zeros(1, *s, dtype=torch.bool, device=features[0].device) for s in shapes]
            position = torch.cat([sine(m, d // 2).flatten(2).transpose(1, 2) for m in blank], 1)
            geo = dataclasses.replace(token_geometry(shapes, d, masks, features[0].device), position=position)
        if masks is None:
            self.cache[shapes] = geo
        return geo

    def forward(self, images, mask=None):  # (B,3,H,W), (B,H,W) True=padding -> as `Detector`
        features = self.input_proj(self.backbone(images))
        geo = self.geometry(features, level_masks(mask, features))
        tokens = torch.cat([f.flatten(2).transpose(1, 2) for f in features], 1)
        level = torch.cat([e.expand(h * w, -1) for e, (h, w) in zip(self.level_embed, geo.shapes)])
        cells = geo.reference_points.expand(len(tokens), -1, -1, -1)
        memory = self.encoder(tokens, geo.position.to(tokens.dtype) + level, cells, geo.shapes, geo.padding)
        pos, x = (q.expand(len(tokens), -1, -1) for q in self.queries.weight.chunk(2, -1))
        points = self.reference_points(pos).float().sigmoid()
        per_level, hs = points[:, :, None].expand(-1, -1, len(geo.shapes), -1), []
        if geo.valid_ratios is not None:
            per_level = per_level * geo.valid_ratios[:, None]
        for layer in self.layers:
            x = layer(x, pos, per_level, memory, geo.shapes, geo.padding)
            hs.append(x)
        hs = torch.stack(hs)
        logits, delta = self.class_head(hs), self.box_head(hs).float()
        boxes = torch.cat([delta[..., :2] + inverse_sigmoid(points), delta[..., 2:]], -1).sigmoid()
        layers = [dict(pred_logits=c, pred_boxes=b) for c, b in zip(logits, boxes)]
        return dict(**layers[-1], aux_outputs=layers[:-1])

    def param_groups(self):  # as `Detector`
        return split_parameters(self)


# --- transformers' model ------------------------------------------------------------------------------------
def build_theirs(name, cfg=SIZE, num_classes=CLASSES, seed=0):
    "DeformableDetrForObjectDetection with random weights, statistics of norms and sampling offsets included"
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

    kind, stem, widths, depths = RESNETS[name]
    torch.manual_seed(seed)
    sizes = dict(embedding_size=stem, hidden_sizes=list(widths), depths=list(depths))
    resnet = ResNetConfig(layer_type=kind, **sizes, out_features=['stage2', 'stage3', 'stage4'])
    model = DeformableDetrForObjectDetection(
        DeformableDetrConfig(
            backbone_config=resnet,
            d_model=cfg.d_model,
            num_queries=cfg.num_queries,
            num_feature_levels=cfg.n_levels,
            num_labels=num_classes,
            encoder_layers=cfg.enc_layers,
            decoder_layers=cfg.dec_layers,
            encoder_ffn_dim=cfg.ffn,
            decoder_ffn_dim=cfg.ffn,
            encoder_attention_heads=cfg.n_heads,
            decoder_attention_heads=cfg.n_heads,
            encoder_n_points=cfg.n_points,
            decoder_n_points=cfg.n_points,
            dropout=0.0,
            auxiliary_loss=True,
            two_stage=False,
            with_box_refine=False,
        )
    )
    with torch.no_grad():
        for n, t in model.state_dict().items():
            if n.endswith('running_mean') or n.endswith('normalization.bias'):
                t.normal_(0, 0.1)
            elif n.endswith('running_var') or n.endswith('normalization.weight'):
                t.uniform_(0.5, 1.0)
            elif 'sampling_offsets.weight' in n or 'attention_weights.weight' in n:
                t.normal_(0, 0.02)
            elif t.ndim == 1:  # norms and biases too: otherwise exchanged ones would not be noticed
                t.add_(0.05 * torch.randn_like(t))
    for n, p in model.model.backbone.named_parameters():  # stem and first stage frozen, as in ours
        p.requires_grad_(bool(re.search(r'encoder\.stages\.[123]\.', n)))
    return model


_BLOCK = r'encoder\.stages\.(\d)\.layers\.(\d+)\.'


def _resnet_name(k):
    "Name of a backbone tensor in torchvision's ResNet"
    norm = lambda s: s.replace('normalization', 'bn').replace('convolution', 'conv')
    if m := re.fullmatch(r'embedder\.embedder\.(\w+)\.(\w+)', k):
        return f'{norm(m[1])}1.{m[2]}'
    if m := re.fullmatch(_BLOCK + r'shortcut\.(\w+)\.(\w+)', k):
        return f"layer{int(m[1]) + 1}.{m[2]}.downsample.{int(m[3] == 'normalization')}.{m[4]}"
    m = re.fullmatch(_BLOCK + r'layer\.(\d)\.(\w+)\.(\w+)', k)
    return f'layer{int(m[1]) + 1}.{m[2]}.{norm(m[4])}{int(m[3]) + 1}.{m[5]}'


_NAMES = (
    (r'model\.encoder\.', 'encoder.'),
    (r'model\.decoder\.layers', 'layers'),
    (r'\.mlp\.fc(\d)', r'.linear\1'),
    (r'encoder_attn\.', 'cross_attn.'),
    (r'^(encoder.*)self_attn_layer_norm', r'\1norm1'),
    (r'^(encoder.*)final_layer_norm', r'\1norm2'),
    (r'self_attn_layer_norm', 'norm2'),
    (r'encoder_attn_layer_norm', 'norm1'),
    (r'final_layer_norm', 'norm3'),
    (r'^(layers.*self_attn\.)o_proj', r'\1out_proj'),
    (r'model\.query_position_embeddings', 'queries'),
    (r'^class_embed\.0', 'class_head'),
    (r'^bbox_embed\.0', 'box_head'),
    (r'^model\.', ''),
)


def convert(state):  # (backbone under torchvision's names, the rest under ours)
    "Their state dict as two of ours; query, key and value of the decoder become one matrix"
    body, rest, parts = {}, {}, {}
    for k, v in state.items():
        if k.startswith('model.backbone.model.'):
            body[_resnet_name(k.removeprefix('model.backbone.model.'))] = v
        elif re.match(r'(class|bbox)_embed\.[1-9]', k):
            continue  # shared with layer 0
        else:
            for pattern, new in _NAMES:
                k = re.sub(pattern, new, k)
            if m := re.fullmatch(r'(layers\..*self_attn\.)([qkv])_proj\.(weight|bias)', k):
                parts.setdefault(f'{m[1]}in_proj_{m[3]}', {})[m[2]] = v
            else:
                rest[k] = v
    return body, rest | {k: torch.cat([p[o] for o in 'qkv']) for k, p in parts.items()}


# --- ours with the same weights -----------------------------------------------------------------------------
def _half_resnet(norm_layer, **dilation):
    "ResNet-18 of half the width"

    class Half(ResNet):
        def _make_layer(self, block, planes, *args, **kw):
            if planes == 64:
                self.inplanes = 32
            return super()._make_layer(block, planes // 2, *args, **kw)

    model = Half(BasicBlock, [2, 2, 2, 2], norm_layer=norm_layer, **dilation)
    model.conv1, model.bn1 = nn.Conv2d(3, 32, 7, 2, 3, bias=False), norm_layer(32)
    model.fc = nn.Linear(256, 1)
    return model


def build_backbone(name, weights):
    "semidetr's backbone of a state dict under torchvision's names, through its own loader"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'resnet.pt'
        torch.save(weights, path)
        known = dict(weights=str(path), out_strides=(8, 16, 32))
        if name != 'tiny':
            return B.build_backbone(B.BackboneConfig(name, **known))
        with mock.patch.object(torchvision.models, 'resnet18', _half_resnet):  # torchvision has none so small
            return B.build_backbone(B.BackboneConfig('resnet18', **known))


def build_ours(name, theirs, cfg=SIZE, num_classes=CLASSES):
    "DeformableDETR with their weights; everything must find its place"
    body, rest = convert(theirs.state_dict())
    model = DeformableDETR(build_backbone(name, body), cfg, num_classes)
    missing, unexpected = model.load_state_dict(rest, strict=False)
    missing = [k for k in missing if not k.startswith('backbone.')]
    assert not missing and not unexpected, (missing, unexpected)
    return model


def scene(size, images, num_classes=CLASSES, objects=10, seed=0):  # (images, targets)
    "Random pixels and boxes"
    torch.manual_seed(seed)

    def target():
        labels = torch.randint(num_classes, (objects,))
        centre, size = 0.2 + 0.6 * torch.rand(objects, 2), 0.05 + 0.3 * torch.rand(objects, 2)
        return dict(labels=labels, boxes=torch.cat([centre, size], -1))

    return torch.randn(images, 3, size, size), [target() for _ in range(images)]


def their_labels(targets):
    return [dict(class_labels=t['labels'], boxes=t['boxes']) for t in targets]


def their_outputs(out):
    layers = [*(out.auxiliary_outputs or ()), dict(logits=out.logits, pred_boxes=out.pred_boxes)]
    return [dict(pred_logits=o['logits'], pred_boxes=o['pred_boxes']) for o in layers]


def twins(name, cfg=SIZE, num_classes=CLASSES):  # (theirs, ours)
    theirs = build_theirs(name, cfg, num_classes).train()
    ours = build_ours(name, theirs, cfg, num_classes).train()
    counts = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (theirs, ours)]
    assert counts[0] == counts[1], f'trainable numbers: {counts}'
    return theirs, ours


def agreement(theirs, ours, images, targets, mask=None):  # {'outputs': , 'loss': , 'gradients': }
    """Largest difference of logits and boxes in all layers, relative differences of loss and gradients

    That of a gradient is in units of its norm; those of the backbone are compared by their total norm."""
    out = theirs(images, pixel_mask=None if mask is None else (~mask).long(), labels=their_labels(targets))
    mine = ours(images, mask)
    pairs = list(zip(their_outputs(out), [*mine['aux_outputs'], mine]))
    assert len(pairs) == ours.cfg.dec_layers
    loss = sum(set_criterion(mine, targets, 'o2o', CRITERION).values())
    for model, l in ((theirs, out.loss), (ours, loss)):
        model.zero_grad()
        l.backward()
    with torch.no_grad():
        far = max(float((a[k] - b[k]).abs().max()) for a, b in pairs for k in a)
        body, rest = convert({n: p.grad for n, p in theirs.named_parameters() if p.grad is not None})
        own = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
        grads = [(g, own[n]) for n, g in rest.items()]
        own_body = [g for n, g in own.items() if n.startswith('backbone.')]
        grads.append([torch.stack([g.norm() for g in gs]).norm() for gs in (list(body.values()), own_body)])
        off = max(float((a - b).norm() / a.norm().clamp(min=1e-6)) for a, b in grads)
    assert len(rest) + len(body) == len(own)
    for model in (theirs, ours):
        model.zero_grad()
    return dict(outputs=far, loss=float((out.loss - loss).detach().abs() / out.loss.detach()), gradients=off)
