# %% [markdown]
# # The detector contract {#sec-contract}
#
# > Exchange the detector without a change to losses, methods, trainer or evaluation.
#
# *Why.* Matching, losses, pseudo labels and evaluation only need a network that maps images to logits and
# boxes. Without a contract they come to depend on details of the one detector that exists: on its
# configuration class, on the names of its layers, on outputs that another detector does not have. This chapter
# lists what they may use: the *outputs*, the *methods* of the network, and its *settings*. The detector of the
# paper (@sec-detector) is one implementation; the tests check any other one with the same function,
# `check_contract` in `tests/test_contract.py`.

# %%
#| default_exp detectors.contract

# %%
#| export
from typing import Callable, NotRequired, Protocol, TypedDict, runtime_checkable
import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms
from semidetr.boxes import cxcywh_to_xyxy
from semidetr.core import ConfigError, at_least_float32

# %%
from dataclasses import dataclass
from types import SimpleNamespace
import matplotlib.pyplot as plt
from semidetr.draw import draw_boxes, show_image


# %% [markdown]
# ## Outputs
#
# For $B$ images, $Q$ queries, $C$ classes and width $d$ a detector returns a dictionary. Boxes are cxcywh,
# relative to the image without its padding. Only `pred_logits` and `pred_boxes` are always there; code that
# reads another key must handle its absence.

# %%
#| export
class Prediction(TypedDict):
    "Logits and boxes of the queries after one layer"

    pred_logits: Tensor  # (B,Q,C), or (B,Q,C+1) as in `Outputs`
    pred_boxes: Tensor  # (B,Q,4) cxcywh in [0,1]
    scores: NotRequired[Tensor]  # (B,Q,C) as in `Outputs`
    index: NotRequired[Tensor]  # (B,Q) numbers of the matching queries, where these are some of them


class ExtraPrediction(TypedDict):
    "One set of P extra queries after all layers"

    pred_logits: Tensor  # (layers,B,P,C)
    pred_boxes: Tensor  # (layers,B,P,4) cxcywh in [0,1]
    hs: Tensor  # (layers,B,P,d) outputs of the decoder layers, normalised
    meta: dict  # that of the `ExtraQueries`


class Outputs(TypedDict, total=False):
    "What a detector returns; all keys but the first two may be absent"

    pred_logits: Tensor  # (B,Q,C) of the last layer; (B,Q,C+1) with softmax and a no-object class at the end
    pred_boxes: Tensor  # (B,Q,4) cxcywh in [0,1] of the last layer
    scores: Tensor  # (B,Q,C) probabilities of the classes; absent where they are the sigmoids of the logits
    aux_outputs: list[Prediction]  # the layers before the last one, in order; absent with one layer
    enc_outputs: Prediction  # proposals of the encoder; absent without query selection
    hs: Tensor  # (layers,B,Q,d) outputs of the decoder layers, normalised; absent without queries
    extra: dict[str, ExtraPrediction]  # name of a set of extra queries -> its outputs; {} without sets
    suppressed: Prediction  # of `forward`: queries with new logits, copied boxes; absent without suppressor
    second: 'Outputs'  # in training: the same boxes with one-to-many logits (@sec-group); absent without
    states: list  # what `decode` needs to add extra queries later; absent where it needs nothing
    # targets -> losses, alone and in training, of a detector that assigns targets itself (@sec-pyramid)
    criterion: Callable


# %% [markdown]
# ## The network
#
# Semi-supervised training needs more than one call: the student decodes the same images several times, with
# and without extra queries (@sec-denoising), with and without gradient. So the forward pass has two halves:
# `encode`, which is expensive, and `decode`, which may be repeated. Let $f(e, X)$ be `decode` of the encoded
# images $e$ with extra queries $X$, and $f(e, X \mid o)$ the same with `cached` outputs $o$. Then
#
# $$
# f(e, X)_{\text{matching}} = f(e, \emptyset)_{\text{matching}}, \qquad f\big(e, X \mid f(e, \emptyset)\big) = f(e, X)
# $$ {#eq-contract-extras}
#
# extra queries have no influence on the matching queries, and may be added later with equal outputs and
# gradients. In training every trainable parameter gets a gradient, also for images without boxes, since
# distributed training needs all of them.

# %%
#| export
@runtime_checkable
class DetectionTransformer(Protocol):
    "The methods of a detector, an `nn.Module`"

    def encode(
        self,
        images: Tensor,  # (B,3,H,W) normalised, zero padded at the right and the bottom
        mask: Tensor = None,  # (B,H,W) bool, True=padding; None: no padding
    ):  # object for `decode`; its `features` are the maps (B,d,h,w) that cross-view queries are cut from
        "Everything before the queries; one pass serves any number of `decode`"

    def decode(
        self,
        encoded,  # from `encode`
        extras=(),  # list of `ExtraQueries`; `ConfigError` where a detector has no queries to add them to
        cached: Outputs = None,  # of `decode(encoded)`: only the extras are computed (@eq-contract-extras)
    ) -> Outputs:
        "Logits and boxes of the matching queries, and those of each set of extra queries under its name"

    def denoise(
        self,
        targets: list,  # per image dict(labels (N,), boxes (N,4) cxcywh in [0,1]); N may be 0
    ) -> list:  # of `ExtraQueries`; empty without denoising, or where no image has a box
        "Extra queries with known targets, made of boxes"

    def forward(
        self,
        images: Tensor,  # as in `encode`
        mask: Tensor = None,  # as in `encode`
        targets: list = None,  # as in `denoise`
    ) -> Outputs:
        "Encode, decode and `add_suppressed`; in training with `targets`, denoising queries are added"

    def param_groups(self) -> dict:  # 'backbone', 'rest', perhaps 'points' -> trainable parameters, in order
        "Parameters for the optimiser, in groups that may have different learning rates"


def split_parameters(
    model: nn.Module,  # the pretrained part is its attribute `backbone`
) -> dict:  # 'backbone', 'rest' -> list of parameters
    "Trainable parameters of a detector in the two groups of `param_groups`"
    groups = dict(backbone=[], rest=[])
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups['backbone' if name.startswith('backbone.') else 'rest'].append(p)
    return groups


# %% [markdown]
# ## Settings
#
# The settings of a detector are a frozen dataclass that builds it. So no registry is needed: another class
# with the same four names gives another detector, and a run's configuration holds all that fixes the network.

# %%
#| export
class DetectorSettings(Protocol):
    "What the settings of a detector, a frozen dataclass, must have"

    num_classes: int  # C; 0 in a configuration means: as many as the data have

    @property
    def d_model(self) -> int:  # d
        "Width of `features`, of `hs` and of the content of extra queries"

    def build(self) -> nn.Module:  # a `DetectionTransformer` in training mode
        "The network, with the pretrained weights that the settings name"

    def untrained(self) -> 'DetectorSettings':
        "The same network without pretrained weights: needs no file"


def build_detector(
    settings: DetectorSettings,  # number of classes known
) -> nn.Module:  # a `DetectionTransformer`
    "The network of some settings; the one place where detectors are built"
    if settings.num_classes < 1:
        raise ConfigError('num_classes must be at least 1 to build a detector; take it from the data')
    return settings.build()


# %% [markdown]
# What other kinds of detectors leave out, and what they must provide instead:
#
# | without | provides |
# |---|---|
# | query selection | no `enc_outputs` |
# | denoising | `denoise` returns an empty list |
# | sigmoid scores: softmax with a no-object class | `scores` without that class; matching and losses read them (@sec-softmax) |
# | queries: a convolutional detector | one prediction per cell, no `hs`; `decode` raises `ConfigError` when it gets extra queries, so that methods with cross-view queries refuse it |
#
# The last kind is the shortest example. Each cell of a map of stride 32 predicts one box:

# %%
@dataclass(frozen=True)
class CellSettings:
    num_classes: int
    d_model: int = 16

    def build(self):
        return CellDetector(self)

    def untrained(self):
        return self


class CellDetector(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.backbone = nn.Conv2d(3, cfg.d_model, 32, stride=32)
        self.class_head, self.box_head = nn.Linear(cfg.d_model, cfg.num_classes), nn.Linear(cfg.d_model, 4)

    def encode(self, images, mask=None):
        return SimpleNamespace(features=[self.backbone(images).relu()])

    def decode(self, encoded, extras=(), cached=None):
        if extras:
            raise ConfigError('a detector without queries cannot take extra ones')
        cells = encoded.features[-1].flatten(2).transpose(1, 2)
        return dict(pred_logits=self.class_head(cells), pred_boxes=self.box_head(cells).sigmoid(), extra={})

    def denoise(self, targets):
        return []

    def forward(self, images, mask=None, targets=None):
        return self.decode(self.encode(images, mask))

    def param_groups(self):
        return split_parameters(self)


torch.manual_seed(0)
cells = build_detector(CellSettings(num_classes=3))
cell_outputs = cells(torch.randn(2, 3, 64, 96))
assert isinstance(cells, DetectionTransformer) and not isinstance(nn.Linear(1, 1), DetectionTransformer)
assert [len(group) for group in cells.param_groups().values()] == [2, 4]
{k: tuple(v.shape) for k, v in cell_outputs.items() if k != 'extra'}


# %% [markdown]
# ## Reading boxes from the outputs
#
# With logits $z_{qc}$ the score of query $q$ for class $c$ is
#
# $$
# s_{qc} = \sigma(z_{qc}) \qquad\text{or}\qquad s_{qc} = \frac{e^{z_{qc}}}{\sum_{c'=0}^{C} e^{z_{qc'}}} \quad (c < C)
# $$ {#eq-contract-score}
#
# the second for a detector with softmax and a no-object class $C$, which gives these as `scores`. Each of the
# $Q\times C$ pairs of query and class is a candidate; the best pairs are the detections, so a query may be
# reported with two classes; with softmax, as in the original code of DETR, only its best class counts. Where a
# detector has a learned suppressor (@sec-suppressor), its logits and boxes are read instead. With
# one-to-one matching that is all. A detector in its one-to-many stage predicts
# each object several times; then non-maximum suppression, within a class, removes the lower-scoring of two
# boxes that overlap.

# %%
#| export
def class_scores(
    outputs: Outputs,  # of a detector
) -> Tensor:  # (B,Q,C), at least float32
    "Probability of each class for each query (@eq-contract-score)"
    if 'scores' in outputs:
        return at_least_float32(outputs['scores'])
    return at_least_float32(outputs['pred_logits']).sigmoid()


def has_no_object(
    outputs: Outputs,  # of a detector, or the `Prediction` of a layer
) -> bool:
    "Do the logits end with a no-object class, so that one softmax gives all scores?"
    scores, logits = outputs.get('scores'), outputs.get('pred_logits')
    return scores is not None and logits is not None and logits.shape[-1] == scores.shape[-1] + 1


def candidate_scores(
    outputs: Outputs,  # of a detector
) -> Tensor:  # (B,Q,C), at least float32
    "Scores that may be reported: all; with softmax each query's best class, the others are 0"
    scores = class_scores(outputs)
    if not has_no_object(outputs):
        return scores
    return torch.where(scores == scores.amax(-1, keepdim=True), scores, torch.zeros_like(scores))


def sigmoid_logits(
    outputs: Outputs,  # of a detector, or the `Prediction` of a layer
) -> Tensor:  # (B,Q,C), at least float32 with softmax
    "Logits whose sigmoids are the class scores: log p - log(1-p) with softmax, else `pred_logits`"
    logits = outputs['pred_logits']
    if not has_no_object(outputs):
        return logits
    z = at_least_float32(logits)
    log_p = z.log_softmax(-1)[..., :-1]
    return log_p - (1 - log_p.exp()).clamp(min=torch.finfo(z.dtype).tiny).log()


# %% [markdown]
# A learned suppressor follows `decode` where its scores are needed: in `forward`, for detections and for the loss
# of labelled images. A teacher's pseudo labels are read from the last decoder layer.

# %%
#| export
def reported(
    outputs: Outputs,  # of a detector
    suppressor: bool = True,  # False: the last decoder layer, whatever follows it
) -> Outputs:  # or the `Prediction` of the suppressor
    "What detections are read from: the suppressor's scores where a detector has one (@sec-suppressor)"
    return outputs['suppressed'] if suppressor and 'suppressed' in outputs else outputs


def has_suppressor(
    model: nn.Module,  # a detector
) -> bool:
    "Does the detector score its queries anew (@sec-suppressor)? Then its attribute `suppressor` does it"
    return getattr(model, 'suppressor', None) is not None


def suppressor_on(
    settings,  # of a detector
) -> bool:
    "The same, asked of its settings; a detector whose settings do not mention one has none"
    return getattr(getattr(settings, 'suppressor', None), 'on', False)


def add_suppressed(
    model: nn.Module,  # a detector
    outputs: Outputs,  # of its `decode`
) -> Outputs:  # with `suppressed`, if the detector has a suppressor
    "The new scores of the matching queries (@sec-suppressor); extra queries have no part in them"
    if not has_suppressor(model) or 'suppressed' in outputs:
        return outputs
    new = model.suppressor(outputs['hs'][-1], outputs['pred_logits'], outputs['pred_boxes'])
    return {**outputs, 'suppressed': new}


@torch.no_grad()
def post_process(
    outputs: Outputs,  # of a detector: pred_logits (or scores) and pred_boxes
    sizes,  # per image (H, W) of the pixels to report boxes in
    top_k: int = 300,  # most detections per image
    nms: float = None,  # IoU of a per-class suppression before the cut (official stage 1: .6); None: none
    score_threshold: float = 0.0,  # scores must be larger; with `nms` use .01, or it gets all Q x C pairs
    suppressor: bool = True,  # read the scores of a learned suppressor, if there is one (`reported`)
) -> list:  # per image dict(scores (K,) descending, labels (K,), boxes (K,4) xyxy pixels, inside the image)
    "The best pairs of query and class; with softmax each query is reported once, with its best class"
    outputs = reported(outputs, suppressor)
    scores, boxes = (
        candidate_scores(outputs),
        cxcywh_to_xyxy(at_least_float32(outputs['pred_boxes'])).clamp(0, 1),
    )
    C, detections = scores.shape[-1], []
    for s, b, (h, w) in zip(scores.flatten(1), boxes, sizes):
        s, order = s.topk(min(top_k, len(s))) if nms is None else s.sort(descending=True)
        is_above = s > score_threshold
        s, order = s[is_above], order[is_above]
        b, labels = b[order // C] * b.new_tensor([w, h, w, h]), order % C
        if nms is not None:
            keep = batched_nms(b, s, labels, nms)[:top_k]
            s, b, labels = s[keep], b[keep], labels[keep]
        detections.append(dict(scores=s, labels=labels, boxes=b))
    return detections


# %% [markdown]
# Two queries on the same object, two classes. The first query is reported twice; with suppression the second
# query loses its class 0 to the first one, but not its class 1:

# %%
pair = dict(
    pred_logits=torch.tensor([[[3.0, 1.0], [2.0, 1.5]]]),
    pred_boxes=torch.tensor([[[0.5, 0.5, 0.4, 0.4], [0.51, 0.5, 0.4, 0.4]]]),
)
free = post_process(pair, [(100, 100)])[0]
suppressed = post_process(pair, [(100, 100)], nms=0.6, score_threshold=0.01)[0]
assert free['labels'].tolist() == [0, 0, 1, 1] and suppressed['labels'].tolist() == [0, 1]
suppressed

# %% [markdown]
# The same boxes from a detector with softmax and a no-object class; here the second query is none of the two:

# %%
softmax_logits = torch.tensor([[[3.0, 1.0, 0.0], [1.0, 0.5, 4.0]]])
with_no_object = dict(
    pred_logits=softmax_logits, scores=softmax_logits.softmax(-1)[..., :2], pred_boxes=pair['pred_boxes']
)
read = post_process(with_no_object, [(100, 100)], score_threshold=0.5)[0]
assert read['labels'].tolist() == [0] and abs(read['scores'] - softmax_logits.softmax(-1)[0, 0, 0]) < 1e-6
read['scores']

# %%
#| label: fig-contract-nms
#| fig-cap: "A detector in its one-to-many stage predicts every object several times (left); suppression keeps the best box of each (right)."
#| fig-alt: "Two panels with three objects; on the left six overlapping boxes around each, on the right one."
torch.manual_seed(0)
objects = torch.tensor([[0.25, 0.3, 0.3, 0.3], [0.7, 0.35, 0.25, 0.4], [0.5, 0.8, 0.5, 0.2]])
repeated = (objects[:, None] + 0.015 * torch.randn(3, 6, 4)).view(1, 18, 4)
one_to_many = dict(pred_logits=torch.randn(1, 18, 1), pred_boxes=repeated)
every_box, best_boxes = (post_process(one_to_many, [(90, 120)], nms=n)[0] for n in (None, 0.5))
assert len(every_box['boxes']) == 18 and len(best_boxes['boxes']) == 3
fig, axes = plt.subplots(1, 2, figsize=(5, 2.1), dpi=80, layout='constrained')
for ax, found, name in zip(axes, (every_box, best_boxes), ('all queries', 'after suppression')):
    show_image(ax, torch.ones(3, 90, 120), title=name)
    draw_boxes(ax, found['boxes'], kind='student', lw=1)
plt.show()

# %% [markdown]
# ## Summary
#
# - Outputs are a dictionary with documented keys, most of which may be absent.
# - A detector has `encode`, `decode`, `denoise`, `forward` and `param_groups`; its settings build it.
# - Extra queries have no influence on the matching ones and may be added later with equal results.
# - Every trainable parameter gets a gradient in every training step.
# - Detections are the best pairs of query and class; suppression is per class and optional.
#
# ## Exercises
#
# 1. Give `CellDetector` a second map of stride 64. What else must change?
# 2. Write `decode` of a detector with fixed, learned queries and without query selection. Which keys does it
#    return?
# 3. Why may suppression across classes be wrong on digits, and right on other data?
