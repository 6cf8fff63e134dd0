# %% [markdown]
# # The detector {#sec-detector}
#
# > Build the paper's detection transformer and run it on a padded batch.
#
# Backbone, encoder, query selection, decoder and denoising are there; this chapter joins them into one network
# that fulfils the contract of @sec-contract. It maps images to a dictionary of tensors and is independent of
# losses, teachers and pseudo labels. The forward pass has two halves, `encode`, which is expensive, and
# `decode`, which a method may repeat with other extra queries. All decoder layers share their heads, and so do
# the matching queries and all extra ones, so that one pass of the heads serves everything.

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
from dataclasses import dataclass, replace
import torch
from torch import nn, Tensor
from semidetr.core import ConfigError
from semidetr.detectors.backbone import BackboneConfig, InputProj, build_backbone, resize_mask
from semidetr.detectors.contract import Outputs, add_suppressed, split_parameters
from semidetr.detectors.denoising import DenoisingConfig, combine_extras, denoising_queries
from semidetr.detectors.group import GroupConfig, add_second, build_group, parallel_group, parallel_parts
from semidetr.detectors.suppressor import SuppressorConfig, build_suppressor
from semidetr.detectors.transformer import MLP, Encoded, Transformer, TransformerConfig, predict_boxes

# %%
import matplotlib.pyplot as plt
import torchvision.transforms.functional as TF
from torchvision.ops import box_iou
from semidetr.boxes import denormalize_boxes, normalize_boxes
from semidetr.data.digits import DigitsScenes
from semidetr.detectors.contract import DetectionTransformer, build_detector
from semidetr.detectors.transformer import cell_centres
from semidetr.draw import draw_boxes, draw_points, show_image


# %% [markdown]
# ## Settings

# %%
#| export
@dataclass(frozen=True)
class DetectorConfig:
    "Everything that determines the detector's network"

    num_classes: int  # C; 0 in a configuration means: as many as the data have
    backbone: BackboneConfig = BackboneConfig()
    transformer: TransformerConfig = TransformerConfig()
    denoising: DenoisingConfig = DenoisingConfig()
    look_forward_twice: bool = True  # the loss of a layer also trains the layer before (DINO)
    prior: float = 0.01  # probability that an untrained class head gives to every class
    suppressor: SuppressorConfig = SuppressorConfig()  # of duplicates; off by default
    group: GroupConfig = GroupConfig()  # one-to-many queries beside the matching ones; off by default
    second_head: bool = False  # a second class head for one-to-many targets, in training (@sec-group)

    def __post_init__(self):
        if self.num_classes < 0:
            raise ConfigError(f'num_classes={self.num_classes} must not be negative')
        if not 0 < self.prior < 1:
            raise ConfigError(f'prior={self.prior} must lie between 0 and 1')

    @property
    def d_model(self) -> int:
        "Width of feature maps and queries"
        return self.transformer.d_model

    @property
    def parallel(self) -> tuple:  # of 'group', 'second_head'
        "Parts that are trained one-to-many beside the matching queries (@sec-group)"
        return parallel_parts(self)

    def build(self) -> nn.Module:  # Detector
        "The network of these settings"
        return Detector(self)

    def untrained(self) -> 'DetectorConfig':
        "The same settings with random weights for the backbone"
        return replace(self, backbone=replace(self.backbone, weights='none'))


# %%
#| export
def detector_small(
    num_classes: int,  # C
) -> DetectorConfig:
    "For a few CPU cores: EfficientNet-Lite0 at strides 8, 16 and one more level; 1+3 layers of width 128"
    sizes = dict(d_model=128, n_levels=3, enc_layers=1, dec_layers=3, ffn=512, num_queries=100)
    return DetectorConfig(
        num_classes,
        BackboneConfig('efficientnet_lite0', out_strides=(8, 16)),
        TransformerConfig(**sizes, query_content='memory', position_unit='image'),
        DenoisingConfig(num=40),
    )


def dino_r50(
    num_classes: int,  # C
) -> DetectorConfig:
    "The paper's DINO: ResNet-50 at strides 8, 16, 32 and one more level; 6+6 layers, width 256, 900 queries"
    backbone = BackboneConfig('resnet50', out_strides=(8, 16, 32))
    return DetectorConfig(num_classes, backbone, TransformerConfig(), DenoisingConfig(label_rows=82))


# %% [markdown]
# ## Heads
#
# A class head gives one logit for each class, a box head a correction in logit space. All decoder layers share
# one pair of heads; the encoder's proposals have copies of their own. An untrained class head predicts
# $\pi=0.01$ for every class: with thousands of background queries a start at one half would dominate all other
# losses in the first steps,
#
# $$
# b_{cls}=-\ln\frac{1-\pi}{\pi}=-\ln 99
# $$ {#eq-detector-prior}
#
# An untrained box head has zeros in its last layer and so leaves every reference box as it is.

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
    "The padding mask of each level"
    if mask is None or not mask.any():
        return None
    return [resize_mask(mask, f.shape[-2:]) for f in features]


# %%
class_head, box_head = make_heads(8, 3)
probabilities = class_head(torch.zeros(8)).sigmoid()
assert torch.allclose(probabilities, torch.tensor(0.01)) and not box_head(torch.randn(8)).any()
probabilities


# %% [markdown]
# ## The forward pass
#
# Extra queries stand in front of the matching queries in the decoder. Its results are sorted by set of queries
# into the outputs of @sec-contract. `states` holds content and position code of the matching queries before
# each layer: extra queries that are added later attend to them.

# %%
#| export
def collect_outputs(
    encoded: Encoded,  # has the proposals; `enc_logits` is None without query selection
    hs: Tensor,  # (layers,B,P+Q,d)
    cls: Tensor,  # (layers,B,P+Q,C) logits
    box: Tensor,  # (layers,B,P+Q,4) cxcywh
    extras=(),  # list of `ExtraQueries`, P queries in all
    slices=None,  # name -> slice of the P extra slots
    states=(),  # per layer (content, pos), each (B,P+Q,d)
    cached: Outputs = None,  # outputs of the matching queries; then there are only the P extra slots
) -> Outputs:
    "The decoder's results, sorted by set of queries"
    extra = {}
    for e in extras:
        s = slices[e.name]
        extra[e.name] = dict(pred_logits=cls[:, :, s], pred_boxes=box[:, :, s], hs=hs[:, :, s], meta=e.meta)
    if cached is not None:
        return {**cached, 'extra': {**cached['extra'], **extra}}
    P = sum(e.content.shape[1] for e in extras)
    layers = [dict(pred_logits=c[:, P:], pred_boxes=b[:, P:]) for c, b in zip(cls, box)]
    outputs = dict(
        **layers[-1],
        aux_outputs=layers[:-1],
        hs=hs[:, :, P:],
        extra=extra,
        states=[(x[:, P:], p[:, P:]) for x, p in states],
    )
    if encoded.enc_logits is not None:
        outputs['enc_outputs'] = dict(pred_logits=encoded.enc_logits, pred_boxes=encoded.enc_boxes)
    return outputs


def _with_extras(encoded, extras, alone=False):
    "(content, boxes in [0,1], mask, slices) of extra and matching queries, or of the extra ones alone"
    content, logits, blocked, slices = combine_extras(extras, encoded.content.shape[1])
    queries, references = encoded.content, encoded.reference_logits
    if alone:
        blocked = blocked[: content.shape[1]]
        queries, references = content.to(queries.dtype), logits.to(references.dtype)
    elif slices:
        queries = torch.cat([content.to(queries.dtype), queries], 1)
        references = torch.cat([logits.to(references.dtype), references], 1)
    return queries, references.sigmoid(), blocked, slices


# %% [markdown]
# Parts that are trained beside the matching queries (@sec-group) start as copies of heads that are there:

# %%
#| export
class _Heads(nn.Module):
    "The heads of a detector that further parts start from"

    def selection_heads(self) -> tuple:  # (layers between token and heads, class head, box head)
        "What selects the matching queries, to copy it for a group"
        embed = nn.Sequential(self.transformer.enc_output, self.transformer.enc_output_norm)
        return embed, self.enc_class_head, self.enc_box_head

    def main_class_head(self) -> nn.Module:
        "What a second class head starts as"
        return self.class_head


# %%
#| export
class Detector(_Heads):
    "A detection transformer with query selection, box refinement and room for extra queries (DINO)"

    def __init__(self, cfg: DetectorConfig):
        super().__init__()
        self.cfg, t, d = cfg, cfg.transformer, cfg.transformer.d_model
        self.backbone = build_backbone(cfg.backbone)
        self.input_proj = InputProj(self.backbone.channels, d, t.n_levels)
        self.transformer = Transformer(t)
        self.class_head, self.box_head = make_heads(d, cfg.num_classes, cfg.prior)
        self.enc_class_head, self.enc_box_head = copy.deepcopy(self.class_head), copy.deepcopy(self.box_head)
        self.label_enc = nn.Embedding(max(cfg.denoising.label_rows, cfg.num_classes), d)
        self.suppressor = build_suppressor(cfg.suppressor, t, cfg.num_classes, cfg.prior)
        self.group = build_group(cfg.group, t, *self.selection_heads())
        self.second_head = copy.deepcopy(self.class_head) if cfg.second_head else None

    def encode(
        self,
        images: Tensor,  # (B,3,H,W) normalised, zero padded at the right and the bottom
        mask: Tensor = None,  # (B,H,W) bool, True=padding; None: nothing is padded
    ) -> Encoded:
        "Everything up to the proposals; one pass serves any number of `decode`"
        features = self.input_proj(self.backbone(images))
        masks = level_masks(mask, features)
        return self.transformer.encode(features, masks, self.enc_class_head, self.enc_box_head)

    def decode(
        self,
        encoded: Encoded,  # from `encode`
        extras=(),  # list of `ExtraQueries`, which stand in this order in front of the matching queries
        cached: Outputs = None,  # of `decode(encoded)`: only the extras are computed
    ) -> Outputs:
        "Queries through the decoder and the heads"
        if cached is not None and not extras:
            return cached
        queries, references, blocked, slices = _with_extras(encoded, extras, cached is not None)
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
            None if cached is None else cached['states'],
        )
        cls = self.class_head(hs)
        box = predict_boxes(references, self.box_head(hs), self.cfg.look_forward_twice)
        if self.training and 'denoising' not in slices:
            cls = cls + 0 * self.label_enc.weight.sum()  # every parameter gets a gradient
        outputs = collect_outputs(encoded, hs, cls, box, extras, slices, states, cached)
        return add_second(self, outputs, [self.second_head] * len(hs))

    def forward(
        self,
        images: Tensor,  # (B,3,H,W) as in `encode`
        mask: Tensor = None,  # (B,H,W) bool, True=padding
        targets: list = None,  # per image dict(labels (N,), boxes (N,4) cxcywh in [0,1])
    ) -> Outputs:
        """Encode, decode and `add_suppressed`; in training a parallel group is added, if there is one, and
        with `targets` denoising queries"""
        encoded = self.encode(images, mask)
        extras = self.denoise(targets) if self.training and targets is not None else []
        extras = [*parallel_group(self, encoded), *extras]
        return add_suppressed(self, self.decode(encoded, extras))

    def denoise(
        self,
        targets: list,  # per image dict(labels (N,), boxes (N,4) cxcywh in [0,1]); N may be 0
    ) -> list:  # of `ExtraQueries`; empty where no image has a box
        "Denoising queries made of boxes, for `decode`"
        dn = denoising_queries(targets, self.label_enc, self.cfg.num_classes, self.cfg.denoising)
        return [] if dn is None else [dn]

    def param_groups(self) -> dict:  # 'backbone', 'rest' -> trainable parameters
        "Parameters for the optimiser: the pretrained backbone usually gets a smaller learning rate"
        return split_parameters(self)


# %% [markdown]
# If no image of a batch has a box there is nothing to denoise, and the label table has no part in the outputs.
# Distributed training needs a gradient for every parameter, so the table is added with weight zero.
#
# A detector small enough for a lesson, on two scenes of the built-in data. Its boxes start as the anchors of
# the selected tokens:

# %%
torch.manual_seed(0)
lesson = DetectorConfig(
    10,
    BackboneConfig('efficientnet_lite0', out_strides=(8,)),
    TransformerConfig(d_model=64, n_levels=2, enc_layers=1, dec_layers=3, ffn=128, num_queries=30),
    DenoisingConfig(num=60),
)
model = build_detector(lesson).train()
scenes = [DigitsScenes('train', n=8)[i] for i in (3, 5)]
mean, std = model.backbone.mean, model.backbone.std
images = torch.stack([TF.normalize(TF.to_tensor(s.image), mean, std) for s in scenes])
targets = [dict(labels=s.labels, boxes=normalize_boxes(s.boxes, s.size)) for s in scenes]
out = model(images, None, targets)
assert isinstance(model, DetectionTransformer)
assert torch.allclose(out['pred_boxes'], out['enc_outputs']['pred_boxes'], atol=1e-5)
{k: (tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__) for k, v in out.items()}

# %% [markdown]
# The denoising queries have no influence on the matching queries behind them:

# %%
encoded = model.encode(images)
alone, with_extras = model.decode(encoded), model.decode(encoded, model.denoise(targets))
assert torch.allclose(alone['pred_logits'], with_extras['pred_logits'], atol=1e-5)
(alone['pred_logits'] - with_extras['pred_logits']).abs().max().item()

# %% [markdown]
# So a method may use the outputs of the matching queries to decide which extra queries to add. `decode` with
# `cached` computes these alone, against the states of the first pass; the outputs, and every gradient, are
# those of one common pass:

# %%
extras = model.denoise(targets)
together, later = model.decode(encoded, extras), model.decode(encoded, extras, alone)
difference = (together['extra']['denoising']['hs'] - later['extra']['denoising']['hs']).abs().max().item()
assert difference < 1e-4 and later['pred_logits'] is alone['pred_logits']
difference


# %% [markdown]
# ## A first training, without any matching
#
# Denoising queries have known targets. A few steps with the L1 distance to the clean boxes, on every layer,
# already teach the decoder to use the image:

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
#| fig-cap: "After forty steps the decoder moves a noisy box (dashed) towards its object, most of the way in the first layer; later layers have little left to correct."
#| fig-alt: "Left: a scene of digits with a noisy box on each, the box after the third decoder layer and the true one. Right: mean IoU with the truth for the start and the three layers; it jumps at the first layer and then stays"
torch.manual_seed(1)
with torch.no_grad():
    dn = denoising_queries(targets, model.label_enc, 10, DenoisingConfig(num=60))
    refined = model.decode(model.encode(images), [dn])['extra']['denoising']['pred_boxes']
path = torch.cat([dn.boxes.sigmoid()[None], refined])  # (1+layers,B,P,4)
index, size = dn.meta['target'][0], scenes[0].size
slots = [int((index == i).nonzero()[0]) for i in range(len(targets[0]['labels']))]
overlap = []
for boxes in path[:, 0, index >= 0]:
    iou = box_iou(denormalize_boxes(boxes, size), scenes[0].boxes)
    overlap.append(iou.gather(1, index[index >= 0, None]).mean().item())
assert overlap[1] > overlap[0] and overlap[-1] > overlap[0]
fig, axes = plt.subplots(1, 2, figsize=(5.4, 2.7), dpi=80, layout='constrained')
show_image(axes[0], scenes[0].image)
draw_boxes(axes[0], scenes[0].boxes, kind='truth')
for step, kind, lw in ((3, 'student', 1.2), (0, 'mined', 1.5)):
    draw_boxes(axes[0], denormalize_boxes(path[step, 0, slots], size), kind=kind, lw=lw)
axes[1].plot(range(len(overlap)), overlap, 'o-')
axes[1].set(xlabel='decoder layer (0: start)', ylabel='mean IoU', xticks=range(len(overlap)))
plt.show()

# %%
#| label: fig-detector-selection
#| fig-cap: "Proposals of a detector trained by denoising only: the selected tokens (dots) lie anywhere, since no loss has trained the encoder's scores. Matching and losses will do that."
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
# - Outputs are one dictionary; extra queries are returned under their names, separate from the matching ones.
# - Untrained heads predict 1 % for every class and leave every box unchanged.
# - Every trainable parameter gets a gradient in every training step.
#
# ## Exercises
#
# 1. Train the lesson detector on the classes as well: which loss do the negative slots need?
# 2. `GroupNorm` in the projection averages over the whole canvas: what does that mean for a small image in a
#    large batch?
# 3. `decode` with `cached` costs less than a common pass. Where does the saving come from?
