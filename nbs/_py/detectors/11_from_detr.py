# %% [markdown]
# # From DETR to DINO {#sec-from-detr}
#
# > See what each detector changed against the one before, and choose one of them by name.
#
# *Why.* Semi-DETR was published with two detectors and is meant for any detection transformer. Six of them are
# built here. They share backbone, layers and contract (@sec-contract) and differ in few decisions, each of which
# answers a fault of its predecessor: slow training, small objects, queries without a place. This chapter puts
# the decisions side by side and gives every detector the name by which the commands know it.

# %%
#| default_exp detectors.from_detr

# %%
#| export
from dataclasses import dataclass, replace
from typing import Callable
from semidetr.core import ConfigError, suggest
from semidetr.detectors.deformable_detr import (
    DeformableDETRConfig,
    deformable_detr_r50,
    deformable_detr_small,
)
from semidetr.detectors.detector import DetectorConfig, detector_small, dino_r50
from semidetr.detectors.detr import DETRConfig, detr_r50, detr_small
from semidetr.detectors.faster_rcnn import FasterRCNNConfig, faster_rcnn_r50, faster_rcnn_small
from semidetr.detectors.fcos import FCOSConfig, fcos_r50, fcos_small

# %%
import matplotlib.pyplot as plt
import torch
import torchvision.transforms.functional as TF
from semidetr.boxes import normalize_boxes
from semidetr.data.digits import DigitsScenes
from semidetr.detectors.contract import build_detector, post_process
from semidetr.draw import draw_boxes, show_image
from semidetr.matching.losses import CriterionConfig, set_criterion


# %% [markdown]
# ## What each step changed
#
# | | DETR | Deformable-DETR | with refinement | two-stage | DINO |
# |---|---|---|---|---|---|
# | attention to the image | all tokens of one map | a few points on several maps | the same | the same | the same |
# | start of a query | learned position, content 0 | learned point and content | the same | best proposals of the encoder | boxes of proposals, learned content |
# | box of a layer | from zero | relative to the point | relative to the box before | the same | the same, with the gradient of two layers |
# | class scores | softmax with "no object" | sigmoid, focal loss | the same | the same | the same |
# | queries with known targets | no | no | no | no | denoising |
# | epochs on COCO | 500 | 50 | 50 | 50 | 12 |
#
# With the output $o_l$ of decoder layer $l$ and a box head $\Delta$ the boxes are
#
# $$
# b_l = \sigma\big(\Delta(o_l) + s_l\big), \qquad s_l = 0 \;\to\; \sigma^{-1}(p) \;\to\; \sigma^{-1}(b_{l-1})
# $$ {#eq-from-detr-box}
#
# from DETR over Deformable-DETR with its points $p$ to refinement, two-stage and DINO. Each row of the table is
# a reason why training became shorter: a token
# attends to a few points instead of thousands; a query starts where something is; a layer only has to correct;
# the denoising queries know their object.
#
# What Semi-DETR does where a detector lacks a part:
#
# | missing part | consequence |
# |---|---|
# | denoising queries | the losses of denoising are absent, with labels and with pseudo labels |
# | proposals (DETR, one-stage Deformable-DETR) | no loss of the encoder output |
# | references (DETR) | a cross-view query gets the position code of its box's centre (@sec-detr) |
# | points instead of boxes (one-stage Deformable-DETR) | a cross-view query starts from its box (@sec-deformable-detr) |
# | sigmoid scores (DETR) | scores, costs and soft targets are those of @sec-softmax |
#
# ## Names
#
# A detector has two sizes: that of its release, with ResNet-50, and a small one for a few CPU cores. The
# criterion goes with it: weights and costs of the releases differ.

# %%
#| export
@dataclass(frozen=True)
class Named:
    "A detector that the commands know by name"

    full: Callable  # number of classes -> settings of the release
    small: Callable  # number of classes -> settings for a few CPU cores
    criterion: dict  # settings of the release's criterion
    softmax: bool = False  # one softmax over the classes and "no object"


def dino_5scale_r50(
    num_classes: int,  # C
) -> DetectorConfig:
    "The paper's DINO with five scales: strides 4 to 32 and one more level (Zhang et al. 2023)"
    cfg = dino_r50(num_classes)
    backbone = replace(cfg.backbone, out_strides=(4, 8, 16, 32))
    return replace(cfg, backbone=backbone, transformer=replace(cfg.transformer, n_levels=5))


def dino_5scale_small(
    num_classes: int,  # C
) -> DetectorConfig:
    "The small DINO with five scales: strides 4, 8, 16 and 32 of EfficientNet-Lite0 and one more level"
    cfg = detector_small(num_classes)
    backbone = replace(cfg.backbone, out_strides=(4, 8, 16, 32))
    return replace(cfg, backbone=backbone, transformer=replace(cfg.transformer, n_levels=5))


_DEFORMABLE = dict(w_cls=2.0, loss_l1=5.0, cost_l1=5.0, w_giou=2.0, enc_labels='zero')
_DETR = dict(w_cls=1.0, loss_l1=5.0, cost_l1=5.0, w_giou=2.0, class_cost='probability')
_FORMS = {'': 'plain', '_refine': 'refine', '_two_stage': 'two_stage'}


def _deformable(form):
    tokens = 'all' if form == 'two_stage' else 'selected'
    return Named(
        lambda n: replace(deformable_detr_r50(n, form), enc_tokens=tokens),
        lambda n: deformable_detr_small(n, form),
        _DEFORMABLE,
    )


DETECTORS = {
    'dino': Named(dino_r50, detector_small, {}),
    'dino_5scale': Named(dino_5scale_r50, dino_5scale_small, {}),
    'detr': Named(detr_r50, detr_small, _DETR, softmax=True),
    **{f'deformable_detr{suffix}': _deformable(form) for suffix, form in _FORMS.items()},
    'faster_rcnn': Named(faster_rcnn_r50, faster_rcnn_small, {}),
    'fcos': Named(fcos_r50, fcos_small, {}),
}
KINDS = {  # `kind` in a saved file; none: DINO
    'detr': DETRConfig,
    'deformable_detr': DeformableDETRConfig,
    'faster_rcnn': FasterRCNNConfig,
    'fcos': FCOSConfig,
}


def named_detector(
    name: str,  # a key of `DETECTORS`
) -> Named:
    "A detector by name; `ConfigError` lists the known names"
    if name not in DETECTORS:
        raise ConfigError(f"detector '{name}' is unknown; {suggest(name, DETECTORS)}")
    return DETECTORS[name]


def settings_of_kind(
    kind,  # `kind` of saved settings; None where they have none
):  # settings for 0 classes, with the defaults of their class
    "The settings that saved values change; `ConfigError` for an unknown kind"
    if kind is None:
        return DetectorConfig(num_classes=0)
    if kind not in KINDS:
        raise ConfigError(f"detector.kind='{kind}' is unknown; {suggest(kind, KINDS)}")
    return KINDS[kind](num_classes=0)


# %%
assert settings_of_kind('detr') == DETRConfig(0) and settings_of_kind(None) == DetectorConfig(0)
try:
    named_detector('deformable_dert')
except ConfigError as error:
    message = str(error)
message


# %% [markdown]
# Parameters of the releases, 80 classes, in millions:

# %%
def millions(settings):
    parameters = build_detector(settings.untrained()).parameters()
    return round(sum(p.numel() for p in parameters) / 1e6, 1)


sizes = {name: millions(detector.small(80)) for name, detector in DETECTORS.items()}
assert all(1 < size < 20 for size in sizes.values())
sizes

# %% [markdown]
# ## The same image through all
#
# A few steps on one image of digits, with the same optimiser and the same number of steps. No conclusion about
# the accuracy of the detectors follows from one image; but the order of the idea shows. A query that starts at
# a proposal of the encoder finds its object soon. DETR needs most of its steps to tell its queries apart.

# %%
scene = DigitsScenes('train', n=4)[3]
picture = TF.to_tensor(scene.image)
picture_targets = [dict(labels=scene.labels, boxes=normalize_boxes(scene.boxes, picture.shape[-2:]))]


def fit(named, steps=20):
    "(losses, detections) after some steps on the image"
    torch.manual_seed(0)
    model = build_detector(named.small(10))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    criterion, curve = CriterionConfig(**named.criterion), []
    for _ in range(steps):
        losses = set_criterion(
            model(picture[None] - 0.5, None, picture_targets), picture_targets, 'o2o', criterion
        )
        box_loss = losses['loss_l1'].item() / criterion.loss_l1
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        curve.append(box_loss)
    with torch.no_grad():
        found = post_process(model.eval()(picture[None] - 0.5), [picture.shape[-2:]], len(scene.boxes))[0]
    return curve, found


compared = ('detr', 'deformable_detr', 'deformable_detr_two_stage', 'dino')
fitted = {name: fit(DETECTORS[name]) for name in compared}
assert all(curve[-1] < curve[0] for curve, _ in fitted.values())
{name: round(curve[-1], 2) for name, (curve, _) in fitted.items()}

# %%
#| label: fig-from-detr
#| fig-cap: "One image after twenty steps of training on it: as many best boxes (blue) as there are objects (green), for each detector."
#| fig-alt: "Four panels with the same scene of digits, its true boxes in green and the predicted boxes of one detector in blue"
fig, axes = plt.subplots(1, 4, figsize=(8, 2.2), dpi=80, layout='constrained')
for ax, (name, (_, found)) in zip(axes.flat, fitted.items()):
    show_image(ax, picture, title=name)
    draw_boxes(ax, scene.boxes, kind='truth')
    draw_boxes(ax, found['boxes'], kind='student')
plt.show()

# %% [markdown]
# ## Summary
#
# - All detectors have one contract and differ in attention, queries, references, scores and denoising.
# - A name stands for a detector in two sizes, with the criterion of its release.
# - Every method trains each of them; what is missing is left out or has a counterpart.
# - DETR and Deformable-DETR with a ResNet can be exported for `transformers`; DINO has no class there.
#
# ## Exercises
#
# 1. Which decision makes the largest difference in the figure? Change one at a time.
# 2. Train with 100 steps. Which detectors still have a box on no object?
# 3. DINO starts its queries at boxes of proposals but gives them learned contents. Why not the features of the
#    proposals, as the small preset does?
