# %% [markdown]
# # The detector {#sec-detector}
#
# > Build a detection transformer, run it on a padded batch, and read boxes from its output.
#
# Backbone, encoder, query selection, decoder and denoising are there; this chapter joins them into one
# network that maps images to a dictionary of tensors and knows nothing of losses, teachers or pseudo labels.
# Semi-supervised training asks for more than a call: one student must decode the same image several times,
# with and without extra queries, with and without gradient. So the forward pass comes apart into `encode`,
# which is expensive, and `decode`, which may be repeated.

# %%
#| default_exp detectors.detector

# %%
#| hide
import warnings

warnings.filterwarnings('ignore', message='IProgress')

# %%
#| export
import copy
import math
from dataclasses import dataclass
import torch
from torch import nn, Tensor
from torchvision.ops import batched_nms
from semidetr.detectors.backbone import BackboneConfig, InputProj, build_backbone, resize_mask
from semidetr.boxes import cxcywh_to_xyxy
from semidetr.core import ConfigError
from semidetr.detectors.denoising import DenoisingConfig, combine_extras, denoising_queries
from semidetr.detectors.transformer import MLP, Encoded, Transformer, TransformerConfig, predict_boxes

# %%
import matplotlib.pyplot as plt
import torchvision.transforms.functional as TF
from torchvision.ops import box_iou
from semidetr.boxes import denormalize_boxes, normalize_boxes
from semidetr.data.digits import DigitsScenes
from semidetr.draw import draw_boxes, draw_points, show_image
from semidetr.detectors.transformer import cell_centres


# %% [markdown]
# ## Configurations

# %%
#| export
@dataclass(frozen=True)
class DetectorConfig:
    "All that fixes the shape of a detector"

    num_classes: int  # C; 0 in a configuration means: as many as the data have
    backbone: BackboneConfig = BackboneConfig()
    transformer: TransformerConfig = TransformerConfig()
    denoising: DenoisingConfig = DenoisingConfig()
    look_forward_twice: bool = True  # the box of a layer also trains the layer before (DINO)
    prior: float = 0.01  # probability that a fresh class head gives to every class

    def __post_init__(self):
        if self.num_classes < 0:
            raise ConfigError(f'num_classes={self.num_classes} must not be negative')
        if not 0 < self.prior < 1:
            raise ConfigError(f'prior={self.prior} must lie between 0 and 1')


# %%
#| export
def detector_small(
    num_classes: int,  # C
) -> DetectorConfig:
    "Trains on a few CPU cores: EfficientNet-Lite0 at strides 8, 16 and one more level; 1+3 layers of width 128"
    return DetectorConfig(
        num_classes,
        BackboneConfig('efficientnet_lite0', out_strides=(8, 16)),
        TransformerConfig(
            d_model=128,
            n_levels=3,
            enc_layers=1,
            dec_layers=3,
            ffn=512,
            num_queries=100,
            query_content='memory',
            position_unit='image',
        ),
        DenoisingConfig(num=40),
    )


def dino_r50(
    num_classes: int,  # C
) -> DetectorConfig:
    "The paper's DINO: ResNet-50 at strides 8, 16, 32 and one more level; 6+6 layers of width 256, 900 queries"
    return DetectorConfig(
        num_classes,
        BackboneConfig('resnet50', out_strides=(8, 16, 32)),
        TransformerConfig(),
        DenoisingConfig(label_rows=82),
    )


# %% [markdown]
# ## The forward pass
#
# A class head gives one logit for each class, a box head a correction in logit space. All decoder layers
# share one pair of heads; the encoder's proposals have copies of their own. A fresh class head says
# $\pi=0.01$ for every class: with thousands of background queries a start at one half would drown everything
# else in the first steps,
#
# $$
# b_{cls}=-\ln\frac{1-\pi}{\pi}=-\ln 99
# $$ {#eq-detector-prior}
#
# A fresh box head has zeros in its last layer and so leaves every reference box as it is.

# %%
#| export
def make_heads(
    d_model: int,  # d
    num_classes: int,  # C
    prior: float = 0.01,  # pi
) -> tuple:  # (class head (..., d) -> (..., C), box head (..., d) -> (..., 4))
    "Heads that start at the prior (@eq-detector-prior) and at a correction of zero"
    class_head, box_head = nn.Linear(d_model, num_classes), MLP(d_model, d_model, 4, 3)
    nn.init.constant_(class_head.bias, -math.log((1 - prior) / prior))
    for p in box_head.layers[-1].parameters():
        nn.init.zeros_(p)
    return class_head, box_head


def level_masks(
    mask: Tensor,  # (B,H,W) bool, True=padding; or None
    features,  # L maps (B,d,h,w)
):  # L masks (B,h,w), or None if nothing is padded
    "The padding as each level sees it"
    if mask is None or not mask.any():
        return None
    return [resize_mask(mask, f.shape[-2:]) for f in features]


# %%
class_head, box_head = make_heads(8, 3)
assert (
    torch.allclose(class_head(torch.zeros(8)).sigmoid(), torch.tensor(0.01))
    and not box_head(torch.randn(8)).any()
)
class_head(torch.zeros(8)).sigmoid()


# %% [markdown]
# What comes out, for $B$ images, $Q$ queries, $C$ classes and $D$ decoder layers:
#
# | key | value |
# |---|---|
# | `pred_logits`, `pred_boxes` | $(B,Q,C)$ logits and $(B,Q,4)$ cxcywh of the last layer |
# | `aux_outputs` | list of the same for the layers before |
# | `enc_outputs` | the same for the selected tokens of the encoder |
# | `hs` | $(D,B,Q,d)$ outputs of all layers, normalised |
# | `extra` | for every set of extra queries: `pred_logits`, `pred_boxes`, `hs`, all with a leading $D$, and its `meta` |
# | `states` | content and position of the matching queries before each layer, for extra queries that come later |

# %%
#| export
def collect_outputs(
    encoded: Encoded,
    hs: Tensor,  # (layers,B,P+Q,d)
    cls: Tensor,  # (layers,B,P+Q,C) logits
    box: Tensor,  # (layers,B,P+Q,4) cxcywh
    extras=(),  # `ExtraQueries` that were sent along, P in all
    slices=None,  # name -> slice of the P extra slots
    states=(),  # per layer (content, pos), each (B,P+Q,d)
    seen=None,  # outputs that hold the matching queries already; then there are P slots in all
) -> dict:  # outputs
    "Sort what the decoder said by who was asked"
    extra = {
        e.name: dict(pred_logits=cls[:, :, s], pred_boxes=box[:, :, s], hs=hs[:, :, s], meta=e.meta)
        for e in extras
        for s in [slices[e.name]]
    }
    if seen is not None:
        return {**seen, 'extra': {**seen['extra'], **extra}}
    P = sum(e.content.shape[1] for e in extras)
    layers = [dict(pred_logits=c[:, P:], pred_boxes=b[:, P:]) for c, b in zip(cls, box)]
    return dict(
        **layers[-1],
        aux_outputs=layers[:-1],
        hs=hs[:, :, P:],
        extra=extra,
        states=[(x[:, P:], p[:, P:]) for x, p in states],
        enc_outputs=dict(pred_logits=encoded.enc_logits, pred_boxes=encoded.enc_boxes),
    )


def _with_extras(encoded, extras, alone=False):
    "(content, boxes in [0,1], mask, slices) of extra and matching queries together, or of the extra ones alone"
    content, logits, blocked, slices = combine_extras(extras, encoded.content.shape[1])
    queries, references = encoded.content, encoded.reference_logits
    if alone:
        queries, references, blocked = (
            content.to(queries.dtype),
            logits.to(references.dtype),
            blocked[: content.shape[1]],
        )
    elif slices:
        queries, references = (
            torch.cat([content.to(queries.dtype), queries], 1),
            torch.cat([logits.to(references.dtype), references], 1),
        )
    return queries, references.sigmoid(), blocked, slices


# %%
#| export
class Detector(nn.Module):
    "A detection transformer with query selection, box refinement and room for extra queries (DINO)"

    def __init__(self, cfg: DetectorConfig):
        super().__init__()
        if cfg.num_classes < 1:
            raise ConfigError('num_classes must be at least 1 to build a detector; take it from the data')
        self.cfg, t, d = cfg, cfg.transformer, cfg.transformer.d_model
        self.backbone = build_backbone(cfg.backbone)
        self.input_proj = InputProj(self.backbone.channels, d, t.n_levels)
        self.transformer = Transformer(t)
        self.class_head, self.box_head = make_heads(d, cfg.num_classes, cfg.prior)
        self.enc_class_head, self.enc_box_head = copy.deepcopy(self.class_head), copy.deepcopy(self.box_head)
        self.label_enc = nn.Embedding(max(cfg.denoising.label_rows, cfg.num_classes), d)

    def encode(
        self,
        images: Tensor,  # (B,3,H,W) normalised, zero padded at the right and the bottom
        mask: Tensor = None,  # (B,H,W) bool, True=padding; None: nothing is padded
    ) -> Encoded:
        "Everything up to the proposals; needed once for any number of `decode`"
        features = self.input_proj(self.backbone(images))
        return self.transformer.encode(
            features, level_masks(mask, features), self.enc_class_head, self.enc_box_head
        )

    def decode(
        self,
        encoded: Encoded,
        extras=(),  # `ExtraQueries` to send along, in this order, in front of the matching queries
        seen: dict = None,  # outputs of `decode(encoded)`: only the extras go through, and the outputs are those of one common pass
    ) -> dict:  # outputs
        "Queries through the decoder and the heads"
        if seen is not None and not extras:
            return seen
        queries, references, blocked, slices = _with_extras(encoded, extras, seen is not None)
        ratios = None if encoded.valid_ratios is None else encoded.valid_ratios.to(references.dtype)
        hs, references, states = self.transformer.decoder(
            queries,
            references,
            encoded.memory,
            encoded.shapes,
            self.box_head,
            encoded.padding_mask,
            ratios,
            blocked,
            None if seen is None else seen['states'],
        )
        cls, box = (
            self.class_head(hs),
            predict_boxes(references, self.box_head(hs), self.cfg.look_forward_twice),
        )
        if self.training and 'denoising' not in slices:
            cls = cls + 0 * self.label_enc.weight.sum()  # every parameter gets a gradient
        return collect_outputs(encoded, hs, cls, box, extras, slices, states, seen)

    def forward(self, images: Tensor, mask: Tensor = None, targets: list = None) -> dict:
        "Encode and decode; in training with `targets`, denoising queries made of them go along"
        return self.decode(
            self.encode(images, mask), self.denoise(targets) if self.training and targets is not None else []
        )

    def denoise(self, targets: list) -> list:  # of `ExtraQueries`; empty where no image has a box
        "Denoising queries made of boxes, for `decode`"
        dn = denoising_queries(targets, self.label_enc, self.cfg.num_classes, self.cfg.denoising)
        return [] if dn is None else [dn]


# %% [markdown]
# Where a batch has no box there is nothing to denoise, and the label table would have no part in the outputs.
# Distributed training stumbles over parameters without gradient, so the table is added with weight zero.
#
# A detector small enough for a lesson, on four scenes of the built-in data. Its boxes start as the anchors of
# the selected tokens:

# %%
torch.manual_seed(0)
lesson = DetectorConfig(
    10,
    BackboneConfig('efficientnet_lite0', out_strides=(8,)),
    TransformerConfig(d_model=64, n_levels=2, enc_layers=1, dec_layers=3, ffn=128, num_queries=30),
    DenoisingConfig(num=60),
)
model = Detector(lesson).train()
scenes = [DigitsScenes('train', n=8)[i] for i in (3, 5)]
mean, std = model.backbone.mean, model.backbone.std
images = torch.stack([TF.normalize(TF.to_tensor(s.image), mean, std) for s in scenes])
targets = [dict(labels=s.labels, boxes=normalize_boxes(s.boxes, s.size)) for s in scenes]
out = model(images, None, targets)
assert torch.allclose(out['pred_boxes'], out['enc_outputs']['pred_boxes'], atol=1e-5)
{k: (tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__) for k, v in out.items()}

# %% [markdown]
# The matching queries do not notice the denoising queries in front of them:

# %%
encoded = model.encode(images)
plain, crowded = (
    model.decode(encoded),
    model.decode(encoded, [denoising_queries(targets, model.label_enc, 10, lesson.denoising)]),
)
assert torch.allclose(plain['pred_logits'], crowded['pred_logits'], atol=1e-5)
(plain['pred_logits'] - crowded['pred_logits']).abs().max().item()

# %% [markdown]
# So a method may look at the matching queries first and decide then which extra queries to ask. `decode` with
# `seen` sends these alone, against the matching queries of the first pass; the outputs, and every gradient,
# are those of one common pass:

# %%
extras = [denoising_queries(targets, model.label_enc, 10, lesson.denoising)]
together, later = model.decode(encoded, extras), model.decode(encoded, extras, plain)
difference = (together['extra']['denoising']['hs'] - later['extra']['denoising']['hs']).abs().max().item()
assert difference < 1e-4 and later['pred_logits'] is plain['pred_logits']
difference


# %% [markdown]
# ## A first training, without any matching
#
# Denoising queries know their answers. So a few steps that only ask for the clean boxes, with the L1 distance
# on every layer, already teach the decoder to look:

# %%
def clean_boxes(outputs, targets):
    "Predicted and true boxes of all positive slots: (layers,K,4), (K,4)"
    dn = outputs['extra']['denoising']
    index = dn['meta']['target']
    truth = torch.stack([t['boxes'][i.clamp(min=0)] for t, i in zip(targets, index)])
    return dn['pred_boxes'][:, index >= 0], truth[index >= 0]


optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
history = []
for _ in range(40):
    predicted, wanted = clean_boxes(model(images, None, targets), targets)
    loss = (predicted - wanted).abs().sum(-1).mean()
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    history.append(loss.item())
assert sum(history[-5:]) < 0.8 * sum(history[:5])
[round(v, 3) for v in history[::8]]

# %%
#| label: fig-detector-refinement
#| fig-cap: "After forty steps the decoder pulls a shaken box (dashed) towards its object, nearly all of the way in the first layer; later layers have little left to correct."
#| fig-alt: "Left: a scene of digits with a shaken box on each, and the boxes after each of three decoder layers approaching the true one. Right: mean IoU with the truth for the start and the three layers; it jumps at the first layer and then stays"
torch.manual_seed(1)
with torch.no_grad():
    dn = denoising_queries(targets, model.label_enc, 10, DenoisingConfig(num=60))
    answer = model.decode(model.encode(images), [dn])['extra']['denoising']['pred_boxes']
path = torch.cat([dn.boxes.sigmoid()[None], answer])  # (1+layers,B,P,4)
index, size = dn.meta['target'][0], scenes[0].size
slots = [int((index == i).nonzero()[0]) for i in range(len(targets[0]['labels']))]
overlap = [
    box_iou(denormalize_boxes(b[0, index >= 0], size), scenes[0].boxes)[
        torch.arange(int((index >= 0).sum())), index[index >= 0]
    ]
    .mean()
    .item()
    for b in path
]
assert overlap[1] > overlap[0] and overlap[-1] > overlap[0]
fig, axes = plt.subplots(1, 2, figsize=(5.4, 2.7), dpi=80, layout='constrained')
show_image(axes[0], scenes[0].image)
draw_boxes(axes[0], scenes[0].boxes, kind='truth')
for step, kind, lw in ((3, 'student', 1.2), (0, 'mined', 1.5)):
    draw_boxes(axes[0], denormalize_boxes(path[step, 0, slots], size), kind=kind, lw=lw)
axes[1].plot(range(len(overlap)), overlap, 'o-')
axes[1].set(xlabel='decoder layer (0: start)', ylabel='mean IoU', xticks=range(len(overlap)))
plt.show()


# %% [markdown]
# ## Reading boxes from the output
#
# There is no background class. Each of the $Q\times C$ pairs of query and class has a probability; the best
# of all pairs are the detections, so a query may be reported with two classes. With one-to-one matching that
# is all. A detector in its one-to-many stage says each object several times; then non-maximum suppression,
# within a class, removes the lesser of two boxes that overlap.

# %%
#| export
@torch.no_grad()
def post_process(
    outputs: dict,  # pred_logits (B,Q,C), pred_boxes (B,Q,4) cxcywh
    sizes,  # per image (H, W) of the pixels to report boxes in
    top_k: int = 300,  # most detections an image
    nms: float = None,  # IoU of a per-class suppression before the cut (official stage 1: .6); None: no suppression
    score_threshold: float = 0.0,  # scores must be larger; use .01 with `nms`, or all Q x C pairs go into it
) -> list:  # per image dict(scores (K,) descending, labels (K,), boxes (K,4) xyxy pixels, inside the image)
    "The best pairs of query and class"
    logits, boxes = (
        x.to(torch.promote_types(x.dtype, torch.float32))
        for x in (outputs['pred_logits'], outputs['pred_boxes'])
    )
    scores, boxes, C, out = (
        logits.sigmoid().flatten(1),
        cxcywh_to_xyxy(boxes).clamp(0, 1),
        logits.shape[-1],
        [],
    )
    for s, b, (h, w) in zip(scores, boxes, sizes):
        s, order = s.sort(descending=True) if nms is not None else s.topk(min(top_k, len(s)))
        s, order = s[s > score_threshold], order[s > score_threshold]
        b, labels = b[order // C] * b.new_tensor([w, h, w, h]), order % C
        if nms is not None:
            keep = batched_nms(b, s, labels, nms)[:top_k]
            s, b, labels = s[keep], b[keep], labels[keep]
        out.append(dict(scores=s, labels=labels, boxes=b))
    return out


# %% [markdown]
# Two queries on the same spot, two classes. The first query is reported twice; the second loses its class 0
# to the first when suppression is on, but not its class 1:

# %%
pair = dict(
    pred_logits=torch.tensor([[[3.0, 1.0], [2.0, 1.5]]]),
    pred_boxes=torch.tensor([[[0.5, 0.5, 0.4, 0.4], [0.51, 0.5, 0.4, 0.4]]]),
)
free, suppressed = (
    post_process(pair, [(100, 100)])[0],
    post_process(pair, [(100, 100)], nms=0.6, score_threshold=0.01)[0],
)
assert free['labels'].tolist() == [0, 0, 1, 1] and suppressed['labels'].tolist() == [0, 1]
suppressed

# %%
#| label: fig-detector-selection
#| fig-cap: "Proposals of a detector that has only seen denoising: the selected tokens (dots) still lie anywhere, since nothing has taught the encoder which cells matter. That is the work of matching and losses."
#| fig-alt: "A scene of digits with thirty dots spread over it"
with torch.no_grad():
    view = model.eval().encode(images)
centres = cell_centres(view.shapes, torch.tensor([[[w, h] for h, w in view.shapes]], dtype=torch.float32))[0]
fig, ax = plt.subplots(figsize=(2.7, 2.7), dpi=80)
show_image(ax, scenes[0].image)
draw_boxes(ax, scenes[0].boxes, kind='truth')
draw_points(ax, centres[view.selected[0]] * torch.tensor([96.0, 96.0]), kind='student', size=20)
plt.show()

# %% [markdown]
# ## Summary
#
# - `encode` once, `decode` as often as needed; `forward` is both, plus denoising in training.
# - Outputs are one dictionary; extra queries come out under their names, never mixed with the matching ones.
# - Fresh heads say 1 % for every class and leave every box alone.
# - Every trainable parameter takes part in every training step.
# - Detections are the best pairs of query and class; suppression is per class and optional.
#
# ## Exercises
#
# 1. Why may suppression across classes be wrong on digits, and right on some other data?
# 2. Train the lesson detector on the classes as well: which loss do the negative slots need?
# 3. `GroupNorm` in the projection averages over the whole canvas: what does that mean for a small image in a
#    large batch?
