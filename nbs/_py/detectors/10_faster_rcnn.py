# %% [markdown]
# # Faster R-CNN {#sec-faster-rcnn}
#
# > Train a detector of two stages, with anchors, proposals and suppression, behind the same contract.
#
# *Why.* Soft Teacher (Xu et al. 2021) uses what a DETR does not have: a box head that can be asked about *any*
# box. It weights background by the teacher's opinion of the same region, and measures the reliability of a box
# by refining shifted copies of it. Both need Faster R-CNN (Ren et al. 2015), so here it is, made of
# torchvision's parts on our backbones. It also shows what a DETR does without: hand-made anchor sizes, two
# assignments with thresholds, two samplers and two suppressions.
#
# ## Two stages
#
# The *region proposal network* scores three anchors (ratios 1/2, 1, 2) at each cell of each map and corrects
# them; after suppression the best become *proposals*. The second stage pools a 7 x 7 window of each proposal
# (or *region*) from the map that fits its size, and predicts a softmax over background and classes and a
# correction for each class. A correction of box $b=(x,y,w,h)$ (centre, sides) towards $b^*$ is
#
# $$
# \delta = \Big(\lambda_x\tfrac{x^*-x}{w},\; \lambda_x\tfrac{y^*-y}{h},\;
# \lambda_w\log\tfrac{w^*}{w},\; \lambda_w\log\tfrac{h^*}{h}\Big),
# $$ {#eq-faster-rcnn-delta}
#
# with $\lambda_x=10$, $\lambda_w=5$ in the second stage and 1 in the first. A region is positive where its IoU with
# an object is at least .5. Of the regions of an image $N$ are sampled, at most a quarter of them positive, and
# the losses of the second stage are
#
# $$
# L_{cls}=\frac{1}{N}\sum_i CE_i, \qquad
# L_{box}=\frac{1}{N}\sum_{i\in pos}\lVert\delta_i-\delta^*_i\rVert_1 .
# $$ {#eq-faster-rcnn-loss}
#
# Both are divided by the number of all sampled regions.

# %%
#| default_exp detectors.faster_rcnn

# %%
#| export
from dataclasses import dataclass
from typing import NamedTuple
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign, clip_boxes_to_image
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import initLevelMapper
from semidetr.core import in_range, one_of
from semidetr.detectors.backbone import BackboneConfig
from semidetr.many import normaliser
from semidetr.detectors.pyramid import (
    EncodedPyramid,
    PyramidConfig,
    PyramidDetector,
    StrideAnchors,
    pixel_targets,
)

# %%
import matplotlib.pyplot as plt
from semidetr.boxes import normalize_boxes
from semidetr.data.digits import DigitsScenes
from semidetr.detectors.contract import build_detector, post_process
from semidetr.draw import draw_boxes, show_image
import torchvision.transforms.functional as TF


# %% [markdown]
# ## Settings
#
# The defaults are those of the published code: ResNet-50, strides 4 to 64, anchors of 8 strides, 2000 proposals
# per map before suppression and 1000 after, 256 anchors and 512 regions sampled per image.
# `faster_rcnn_small` is for images of about 200 pixels on a few cores: anchors of 3 strides overlap 91 % of the
# boxes of txl_pbc and voc07_mini with an IoU of .5 or more (2 strides: 71 and 65 %), and a region of 112 pixels
# is pooled from stride 16, since the usual 224 would pool nearly all regions from the finest map.

# %%
#| export
@dataclass(frozen=True)
class FasterRCNNConfig(PyramidConfig):
    "Everything that determines the network, and how its targets are sampled"

    backbone: BackboneConfig = BackboneConfig('resnet50', out_strides=(4, 8, 16, 32))
    hidden: int = 1024  # width of the two layers of the box head
    anchor_scale: float = 8.0  # side of a square anchor, in strides of its map
    canonical: float = 224.0  # side of a region that is pooled from the map of stride 16, pixels
    proposals_before: int = 2000  # best of each map that enter the suppression
    proposals: int = 1000  # kept per image
    rpn_nms: float = 0.7  # IoU of the suppression of proposals
    rpn_samples: int = 256  # anchors per image with a loss, at most half of them positive
    roi_samples: int = 512  # regions per image with a loss, at most a quarter of them positive
    kind: str = 'faster_rcnn'  # tells these settings from others in a file
    structure = 'regions'

    def __post_init__(self):
        super().__post_init__()
        one_of('detector', self, kind=('faster_rcnn',))
        counts = dict.fromkeys(('hidden', 'proposals_before', 'proposals', 'rpn_samples', 'roi_samples'), 1)
        in_range('detector', self, **counts, rpn_nms=(0, 1), anchor_scale=0, canonical=1)

    @property
    def strides(self) -> tuple:
        "Strides of the maps: those of the backbone, and one more"
        s = self.backbone.out_strides
        return (*s, 2 * s[-1])

    def build(self) -> nn.Module:  # FasterRCNN
        "The network of these settings"
        return FasterRCNN(self)


def faster_rcnn_r50(
    num_classes: int,  # C
) -> FasterRCNNConfig:
    "The network of Soft Teacher: ResNet-50, maps of strides 4 to 64"
    return FasterRCNNConfig(num_classes)


def faster_rcnn_small(
    num_classes: int,  # C
) -> FasterRCNNConfig:
    "For a few CPU cores: EfficientNet-Lite0 at strides 8, 16, 32 and one more map, width 128"
    sizes = dict(d_model=128, hidden=256, anchor_scale=3.0, canonical=112.0, min_score=0.001)
    samples = dict(proposals_before=500, proposals=300, rpn_samples=128, roi_samples=128)
    backbone = BackboneConfig('efficientnet_lite0', out_strides=(8, 16, 32))
    return FasterRCNNConfig(num_classes, backbone, **sizes, **samples)


# %%
settings = faster_rcnn_small(10)
assert settings.strides == (8, 16, 32, 64) and faster_rcnn_r50(80).strides == (4, 8, 16, 32, 64)
settings


# %% [markdown]
# ## Losses
#
# Sums over the images of all processes, divided by the number of samples of all (@sec-many); one process alone
# has exactly the losses of @eq-faster-rcnn-loss. A region without weight, or a batch without positives, gives a
# loss of 0 that is still connected to the network.

# %%
#| export
class RegionProposals(RegionProposalNetwork):
    "Torchvision's proposal network; its losses are divided by the samples of all processes"

    def compute_loss(self, objectness, pred_bbox_deltas, labels, regression_targets):
        positive, negative = (torch.cat(m).bool() for m in self.fg_bg_sampler(labels))
        chosen, target = positive | negative, torch.cat(labels).to(objectness.dtype)
        n = normaliser(chosen.sum().to(objectness.dtype))
        wanted = torch.cat(regression_targets).to(pred_bbox_deltas.dtype)[positive]
        box = F.smooth_l1_loss(pred_bbox_deltas[positive], wanted, beta=1 / 9, reduction='sum')
        z = objectness.flatten()[chosen]
        return F.binary_cross_entropy_with_logits(z, target[chosen], reduction='sum') / n, box / n


def region_class_loss(
    logits: Tensor,  # (N,C+1), background first
    labels: Tensor,  # (N,) 0 is background
) -> Tensor:  # scalar
    "Mean cross-entropy over the sampled regions (@eq-faster-rcnn-loss)"
    n = normaliser(logits.new_tensor(float(len(labels))))
    return F.cross_entropy(logits, labels, reduction='sum') / n


def of_class(
    deltas: Tensor,  # (N,4(C+1)) one correction for each class, background first
    labels: Tensor,  # (N,) which of them
) -> Tensor:  # (N,4)
    "The correction of each region's own class"
    deltas = deltas.reshape(len(labels), deltas.shape[1] // 4, 4)
    return deltas[torch.arange(len(labels), device=labels.device), labels]


def region_box_loss(
    deltas: Tensor,  # (N,4(C+1))
    labels: Tensor,  # (N,) 0 is background
    wanted: Tensor,  # (N,4) of @eq-faster-rcnn-delta; rows of the background do not count
) -> Tensor:  # scalar
    "L1 of the positives' corrections, divided by the number of all regions (@eq-faster-rcnn-loss)"
    positive = labels > 0
    n = normaliser(deltas.new_tensor(float(len(labels))))
    own = of_class(deltas[positive], labels[positive])
    return (own - wanted[positive].to(own.dtype)).abs().sum() / n


# %%
one_positive = torch.zeros(3, 8)
one_positive[0, 4:] = torch.tensor([0.05, 0.2, -0.3, 0.0])  # class 1
box_loss = region_box_loss(one_positive, torch.tensor([1, 0, 0]), torch.zeros(3, 4))
nothing = region_box_loss(one_positive, torch.tensor([0, 0, 0]), torch.zeros(3, 4))
assert abs(box_loss - 0.183333) < 1e-6 and nothing == 0
box_loss


# %% [markdown]
# ## The network
#
# `regions` predicts for any boxes, `sample` assigns targets to proposals: both are what Soft Teacher needs from
# the outside. Torchvision infers at which scale it pools from the first batch that it sees and keeps the answer;
# a first image of 40 pixels would spoil all later ones, so the scales are given.
#
# ::: {.callout-note}
# ## Paper vs. code
# mmdetection, on which Soft Teacher is built, has L1 in both stages. The first stage here is torchvision's, with
# smooth L1 (below an error of 1/9 quadratic).
# :::

# %%
#| export
class RegionSample(NamedTuple):
    "Regions with assigned targets"

    boxes: list  # per image (n,4) xyxy pixels
    labels: Tensor  # (N,) of all images one after another; 0 is background
    deltas: Tensor  # (N,4) wanted corrections


# %%
#| export
class FasterRCNN(PyramidDetector):
    "Proposals from anchors, then classes and boxes of the proposals"

    draws = ('random regions',)  # whose numbers depend on the process that has an image

    def __init__(self, cfg: FasterRCNNConfig):
        super().__init__(cfg, LastLevelMaxPool())
        d, strides, ratios = cfg.d_model, cfg.strides, (0.5, 1.0, 2.0)
        anchors = StrideAnchors(strides, tuple((cfg.anchor_scale * s,) for s in strides), ratios)
        before, after = (
            dict.fromkeys(('training', 'testing'), n) for n in (cfg.proposals_before, cfg.proposals)
        )
        self.rpn = RegionProposals(
            anchors, RPNHead(d, len(ratios)), 0.7, 0.3, cfg.rpn_samples, 0.5, before, after, cfg.rpn_nms
        )
        maps = [str(i) for i in range(len(strides) - 1)]
        pool = MultiScaleRoIAlign(maps, 7, 2, canonical_scale=cfg.canonical)
        pool.scales = [1 / s for s in strides[:-1]]
        pool.map_levels = initLevelMapper(*(strides[k].bit_length() - 1 for k in (0, -2)), cfg.canonical)
        head, predictor = TwoMLPHead(49 * d, cfg.hidden), FastRCNNPredictor(cfg.hidden, cfg.num_classes + 1)
        rules = 0.5, 0.5, cfg.roi_samples, 0.25, None, cfg.min_score, cfg.nms, cfg.detections
        self.heads = RoIHeads(pool, head, predictor, *rules)

    def regions(
        self,
        encoded: EncodedPyramid,
        boxes: list,  # per image (n,4) xyxy pixels
    ) -> tuple:  # (logits (N,C+1) with the background first, corrections (N,4(C+1)))
        "Predictions for any boxes, images one after another"
        h = self.heads
        padded = [tuple(encoded.images.tensors.shape[-2:])] * len(boxes)
        return h.box_predictor(h.box_head(h.box_roi_pool(encoded.maps, boxes, padded)))

    def sample(
        self,
        proposals: list,  # per image (n,4) xyxy pixels
        targets: list,  # per image dict(labels (N,) from 1, boxes (N,4) xyxy pixels)
    ) -> RegionSample:
        "Sampled regions of proposals and targets, with the class and correction that they learn"
        boxes, _, labels, deltas = self.heads.select_training_samples(list(proposals), targets)
        return RegionSample(boxes, torch.cat(labels), torch.cat(deltas))

    def refine(
        self,
        encoded: EncodedPyramid,
        boxes: list,  # per image (n,4) xyxy pixels
        labels: list,  # per image (n,) classes from 0
    ) -> list:  # per image (n,4) xyxy pixels, clipped to the image
        "The boxes that the second stage makes of these boxes, for their classes"
        counts = [len(b) for b in boxes]
        if not sum(counts):
            return boxes
        _, deltas = self.regions(encoded, boxes)
        own = of_class(deltas, torch.cat(labels) + 1)
        refined = self.heads.box_coder.decode(own, boxes).reshape(-1, 4).split(counts)
        return [clip_boxes_to_image(b, size) for b, size in zip(refined, encoded.sizes)]

    def losses(
        self,
        encoded: EncodedPyramid,
        targets: list,  # per image dict(labels (N,), boxes (N,4) cxcywh in [0,1])
    ) -> dict:  # loss_cls, loss_l1, loss_rpn_cls, loss_rpn_l1
        "Losses of both stages"
        targets = pixel_targets(targets, encoded.sizes, first_label=1)
        proposals, rpn = self.rpn(encoded.images, encoded.maps, targets)
        s = self.sample(proposals, targets)
        logits, deltas = self.regions(encoded, s.boxes)
        return dict(
            loss_cls=region_class_loss(logits, s.labels),
            loss_l1=region_box_loss(deltas, s.labels, s.deltas),
            loss_rpn_cls=rpn['loss_objectness'],
            loss_rpn_l1=rpn['loss_rpn_box_reg'],
        )

    def detect(
        self, encoded: EncodedPyramid
    ) -> list:  # per image dict(boxes (K,4) xyxy pixels, labels (K,) from 0, scores (K,) descending)
        "Detections after suppression within classes"
        proposals, _ = self.rpn(encoded.images, encoded.maps)
        found = self.heads.postprocess_detections(*self.regions(encoded, proposals), proposals, encoded.sizes)
        return [dict(boxes=b, labels=c - 1, scores=s) for b, s, c in zip(*found)]


# %%
torch.manual_seed(0)
scenes = DigitsScenes('train', n=8, size=96)
sample = scenes[3]
image = TF.to_tensor(sample.image)[None]
truth = [dict(labels=sample.labels, boxes=normalize_boxes(sample.boxes, (96, 96)))]
model = build_detector(settings.untrained())
losses = model(image)['criterion'](truth)
assert set(losses) == {'loss_cls', 'loss_l1', 'loss_rpn_cls', 'loss_rpn_l1'}
assert all(v.isfinite() for v in losses.values())
{k: round(v.item(), 3) for k, v in losses.items()}

# %% [markdown]
# Twenty steps on one scene: the classes of the sampled regions are learned first. The price of the assignment is
# visible in the numbers: most of the anchors of a scene have no loss at all.

# %%
optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
history = []
for _ in range(20):
    losses = model.train()(image)['criterion'](truth)
    sum(losses.values()).backward()
    optimizer.step()
    optimizer.zero_grad()
    history.append({k: v.item() for k, v in losses.items()})
first, last = sum(history[0].values()), sum(history[-1].values())
encoded = model.eval().encode(image)
anchors = model.rpn.anchor_generator(encoded.images, encoded.features)[0]
assigned, _ = model.rpn.assign_targets_to_anchors([anchors], [dict(boxes=sample.boxes)])
positive = int((assigned[0] == 1).sum())
assert last < first and 0 < positive < len(anchors) / 10
first, last, f'{positive} of {len(anchors)} anchors are positive'

# %%
#| label: fig-faster-rcnn-anchors
#| fig-cap: "Of hundreds of anchors only those that overlap an object by an IoU of .7, or more than all others, are positive (blue); objects are green."
#| fig-alt: "A scene with digits; green boxes around them, blue anchors of about the same size near them."
fig, ax = plt.subplots(figsize=(3.2, 3.2), dpi=80, layout='constrained')
show_image(ax, image[0])
draw_boxes(ax, anchors[assigned[0] == 1], kind='student', lw=0.8)
draw_boxes(ax, sample.boxes, kind='truth')
plt.show()

# %% [markdown]
# Detections come through the same door as those of a DETR.

# %%
with torch.no_grad():
    read = post_process(model(image), [(96, 96)], top_k=5)[0]
assert read['boxes'].shape[1] == 4 and (read['scores'].diff() <= 0).all()
read['scores']

# %% [markdown]
# ## Summary
#
# - Faster R-CNN behind the contract: `semidetr train --detector faster_rcnn`.
# - What a DETR does not need: anchor sizes that fit the data, two thresholds and two samplers for the assignment,
#   two suppressions.
# - What a DETR cannot do: predict class and correction of any given box.
#
# ## Exercises
#
# 1. Set `anchor_scale=8` for the scene. How many anchors are positive now, and why is it not zero?
# 2. What happens to the losses if `roi_samples` is doubled?
# 3. Which loss trains the box of a region of the background?
