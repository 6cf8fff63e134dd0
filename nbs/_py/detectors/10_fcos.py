# %% [markdown]
# # FCOS {#sec-fcos}
#
# > Train a detector of one stage, which predicts a box at every point, behind the same contract.
#
# *Why.* Dense Teacher (Zhou et al. 2022) asks whether pseudo labels need boxes at all: a detector that predicts
# at every point of its maps can learn from another network's predictions at the same points, without threshold,
# suppression and assignment. It is built on FCOS (Tian et al. 2019), which has no anchors: each point predicts
# classes and the distances to the four sides of its object. This chapter makes it of torchvision's parts.
#
# ## Points and their targets
#
# Point $p$ of a map with stride $s$ predicts class logits, distances $(l,t,r,b)\ge 0$ in units of $s$, and a
# quality $q$. It learns object $j$ if it lies in the box, nearer than $1.5\,s$ to its centre in both
# directions, and if the largest distance fits the map: from 4 to 8 strides, on the finest map from 0 and on the
# coarsest without end. Of several objects it learns the smallest; every other point is background. With $n^+$ positive
# points
#
# $$
# L_{cls}=\tfrac{1}{n^+}\sum_{p,c} FL(z_{pc}), \quad
# L_{box}=\tfrac{1}{n^+}\sum_{+}(1-GIoU), \quad
# L_{q}=\tfrac{1}{n^+}\sum_{+}BCE\big(\sigma(q),\,IoU\big),
# $$ {#eq-fcos-loss}
#
# where $FL$ is the focal loss (.25, 2) and the IoU is that of predicted and true box, without gradient. The score of
# a detection is $\sqrt{\sigma(z)\,\sigma(q)}$: a box that fits badly is to lose in the suppression.

# %%
#| default_exp detectors.fcos

# %%
#| export
from dataclasses import dataclass
from typing import NamedTuple
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.fcos import FCOS as TorchvisionFCOS
from torchvision.models.detection.fcos import FCOSHead
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from semidetr.core import ConfigError, in_range, one_of
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
import torchvision.transforms.functional as TF
from semidetr.boxes import normalize_boxes
from semidetr.data.digits import DigitsScenes
from semidetr.detectors.contract import build_detector, post_process
from semidetr.draw import draw_boxes, show_image


# %% [markdown]
# ## Settings
#
# The defaults are those of Dense Teacher: ResNet-50, maps of strides 8 to 128, four convolutions with group norm
# in each tower, quality by IoU. `fcos_small` has the three maps of EfficientNet-Lite0 and two convolutions. In
# the original FCOS the quality is *centre-ness*, how central the point lies; `quality=centreness` switches to it.

# %%
#| export
@dataclass(frozen=True)
class FCOSConfig(PyramidConfig):
    "Everything that determines the network and its targets"

    nms: float = 0.6  # IoU of the suppression within a class
    convs: int = 4  # convolutions in each of the two towers
    extra_maps: int = 2  # coarser maps behind those of the backbone: 0 or 2
    quality: str = 'iou'  # what scores are weighted by: 'iou', or 'centreness' as in the original
    radius: float = 1.5  # largest distance of a positive point from the centre of its object, strides
    kind: str = 'fcos'  # tells these settings from others in a file
    structure = 'points'

    def __post_init__(self):
        super().__post_init__()
        one_of('detector', self, kind=('fcos',), quality=('iou', 'centreness'), extra_maps=(0, 2))
        in_range('detector', self, convs=1, radius=0)
        if self.d_model % 64:
            raise ConfigError(
                f'detector.d_model={self.d_model} must be a multiple of 64, for 32 groups of a norm'
            )

    @property
    def strides(self) -> tuple:
        "Strides of the maps"
        s = self.backbone.out_strides
        return (*s, *(s[-1] * 2 ** (i + 1) for i in range(self.extra_maps)))

    def build(self) -> nn.Module:  # FCOS
        "The network of these settings"
        return FCOS(self)


def fcos_r50(
    num_classes: int,  # C
) -> FCOSConfig:
    "The network of Dense Teacher: ResNet-50, maps of strides 8 to 128"
    return FCOSConfig(num_classes)


def fcos_small(
    num_classes: int,  # C
) -> FCOSConfig:
    "For a few CPU cores: EfficientNet-Lite0 at strides 8, 16 and 32, width 128"
    backbone = BackboneConfig('efficientnet_lite0', out_strides=(8, 16, 32))
    return FCOSConfig(num_classes, backbone, d_model=128, convs=2, extra_maps=0, min_score=0.001)


# %%
settings = fcos_small(10)
assert settings.strides == (8, 16, 32) and fcos_r50(80).strides == (8, 16, 32, 64, 128)
settings


# %% [markdown]
# ## Losses
#
# A new network predicts distances by a ReLU around zero: 63 % of its boxes have no area, and the GIoU loss of such a
# box is 1 even against itself. Starting the bias at 1 stride leaves none.

# %%
#| export
def centreness(
    distances: Tensor,  # (...,4) left, top, right, bottom, above 0 inside a box
) -> Tensor:  # (...) in [0,1]
    "How central a point lies in its box: 1 in the middle, 0 at a side"
    pairs = distances.reshape(*distances.shape[:-1], 2, 2)  # (left, top), (right, bottom)
    low, high = pairs.amin(-2), pairs.amax(-2)
    return (low / high.clamp(min=1e-6)).prod(-1).clamp(min=0).sqrt()


def paired_iou(
    a: Tensor,  # (N,4) xyxy
    b: Tensor,  # (N,4) xyxy
) -> Tensor:  # (N,)
    "IoU of each box with its partner; 0 where both are empty"
    inter = (torch.minimum(a, b)[:, 2:] - torch.maximum(a, b)[:, :2]).clamp(min=0).prod(-1)
    area = lambda x: (x[:, 2:] - x[:, :2]).clamp(min=0).prod(-1)
    return inter / (area(a) + area(b) - inter).clamp(min=1e-9)


class QualityHead(FCOSHead):
    "Torchvision's head with the losses of @eq-fcos-loss, divided by the positives of all processes"

    def __init__(self, cfg: FCOSConfig):
        super().__init__(cfg.d_model, 1, cfg.num_classes, cfg.convs)
        self.quality = cfg.quality
        nn.init.constant_(self.regression_head.bbox_reg.bias, 1.0)

    def compute_loss(
        self,
        targets: list,  # per image dict(labels (N,), boxes (N,4) xyxy pixels)
        head_outputs: dict,  # of the head: cls_logits, bbox_regression, bbox_ctrness
        anchors: list,  # per image (n,4): squares of one stride around the points
        matched_idxs: list,  # per image (n,) object of each point; -1: background
    ) -> dict:  # loss_cls, loss_giou, loss_quality
        "Losses of all points of a batch"
        matched, anchors = torch.stack(matched_idxs), torch.stack(anchors)
        logits, positive = head_outputs['cls_logits'], matched >= 0
        image, point = positive.nonzero(as_tuple=True)
        offsets = torch.tensor([0] + [len(t['labels']) for t in targets]).cumsum(0)[:-1].to(matched.device)
        row = offsets[image] + matched[image, point]
        labels, boxes = (torch.cat([t[k] for t in targets])[row] for k in ('labels', 'boxes'))
        n, wanted = normaliser(positive.sum().to(logits.dtype)), torch.zeros_like(logits)
        wanted[image, point, labels] = 1
        at = anchors[image, point]
        found = self.box_coder.decode(head_outputs['bbox_regression'][image, point], at)
        boxes = boxes.to(found.dtype)
        if self.quality == 'iou':
            quality = paired_iou(found.detach(), boxes)
        else:
            quality = centreness(self.box_coder.encode(at, boxes))
        q = head_outputs['bbox_ctrness'][image, point, 0]
        return dict(
            loss_cls=sigmoid_focal_loss(logits, wanted, reduction='sum') / n,
            loss_giou=generalized_box_iou_loss(found, boxes, reduction='sum') / n,
            loss_quality=F.binary_cross_entropy_with_logits(q, quality.to(q.dtype), reduction='sum') / n,
        )


# %%
pairs = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 2.0], [0.0, 1.0, 4.0, 1.0]])
central = centreness(pairs)
assert torch.allclose(central, torch.tensor([1.0, (1 / 3) ** 0.5, 0.0]))
same_box = paired_iou(torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([[0.0, 0, 4, 2]]))
assert same_box.item() == 0.5
central, same_box


# %% [markdown]
# ## The network
#
# `dense` gives the predictions of all points, one map after another; `valid` tells which points lie in the image
# and not in the padding. Dense Teacher works on these.

# %%
#| export
class DensePrediction(NamedTuple):
    "Predictions of all points of a batch"

    logits: Tensor  # (B,n,C) of the classes
    distances: Tensor  # (B,n,4) left, top, right, bottom, at least 0, in strides
    quality: Tensor  # (B,n) logits
    anchors: list  # per image (n,4) xyxy pixels: squares of one stride around the points
    counts: list  # points of each map
    valid: Tensor  # (B,n) bool, False in the padding


class _Points(TorchvisionFCOS):
    "Torchvision's rules of assignment and suppression, around a head; it has no backbone"

    def __init__(self, cfg, head):
        stub = nn.Identity()
        stub.out_channels = cfg.d_model
        anchors = StrideAnchors(cfg.strides, tuple((s,) for s in cfg.strides))
        rules = dict(score_thresh=cfg.min_score, nms_thresh=cfg.nms, detections_per_img=cfg.detections)
        more = dict(anchor_generator=anchors, head=head, center_sampling_radius=cfg.radius)
        super().__init__(stub, cfg.num_classes, **more, **rules)


class FCOS(PyramidDetector):
    "Classes, a box and its quality at every point of a pyramid"

    def __init__(self, cfg: FCOSConfig):
        super().__init__(cfg, LastLevelP6P7(cfg.d_model, cfg.d_model) if cfg.extra_maps else None)
        self.points = _Points(cfg, QualityHead(cfg))

    def dense(self, encoded: EncodedPyramid) -> DensePrediction:
        "Predictions of all points, finest map first"
        features, p = encoded.features, self.points
        with self.full_precision(encoded):
            out = p.head(features)
        anchors = p.anchor_generator(encoded.images, features)
        centres = (anchors[0][:, :2] + anchors[0][:, 2:]) / 2
        limit = centres.new_tensor([(w, h) for h, w in encoded.sizes])
        counts = [f.shape[-2] * f.shape[-1] for f in features]
        valid = (centres < limit[:, None]).all(-1)
        quality = out['bbox_ctrness'][..., 0]
        return DensePrediction(out['cls_logits'], out['bbox_regression'], quality, anchors, counts, valid)

    def losses(
        self,
        encoded: EncodedPyramid,
        targets: list,  # per image dict(labels (N,), boxes (N,4) cxcywh in [0,1])
    ) -> dict:  # loss_cls, loss_giou, loss_quality
        "Losses of all points (@eq-fcos-loss)"
        return self.dense_losses(self.dense(encoded), pixel_targets(targets, encoded.sizes))

    def dense_losses(
        self,
        d: DensePrediction,
        targets: list,  # per image dict(labels (N,), boxes (N,4) xyxy pixels)
    ) -> dict:  # as `losses`
        "The same for predictions that are there already"
        out = dict(cls_logits=d.logits, bbox_regression=d.distances, bbox_ctrness=d.quality[..., None])
        return self.points.compute_loss(targets, out, d.anchors, d.counts)

    def detect(
        self, encoded: EncodedPyramid
    ) -> list:  # per image dict(boxes (K,4) xyxy pixels, labels (K,), scores (K,) descending)
        "Detections after suppression within classes"
        d = self.dense(encoded)
        per_map = dict(
            cls_logits=d.logits.split(d.counts, 1),
            bbox_regression=d.distances.split(d.counts, 1),
            bbox_ctrness=d.quality[..., None].split(d.counts, 1),
        )
        anchors = [a.split(d.counts) for a in d.anchors]
        return self.points.postprocess_detections(per_map, anchors, encoded.sizes)


# %%
torch.manual_seed(0)
scenes = DigitsScenes('train', n=8, size=96)
sample = scenes[3]
image = TF.to_tensor(sample.image)[None]
truth = [dict(labels=sample.labels, boxes=normalize_boxes(sample.boxes, (96, 96)))]
model = build_detector(settings.untrained())
losses = model(image)['criterion'](truth)
dense = model.dense(model.encode(image))
assert set(losses) == {'loss_cls', 'loss_giou', 'loss_quality'}
assert dense.counts == [144, 36, 9] and (dense.distances.amin(-1) > 0).all()
{k: round(v.item(), 3) for k, v in losses.items()}

# %%
optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
history = []
for _ in range(20):
    losses = model.train()(image)['criterion'](truth)
    sum(losses.values()).backward()
    optimizer.step()
    optimizer.zero_grad()
    history.append(sum(losses.values()).item())
with torch.no_grad():
    read = post_process(model.eval()(image), [(96, 96)], top_k=5)[0]
assert history[-1] < history[0] and (read['scores'].diff() <= 0).all()
history[0], history[-1], read['scores']

# %% [markdown]
# The picture shows what the rules assign: a few points near the middle of each object. Everything else is
# background, also points well inside an object.

# %%
#| label: fig-fcos-points
#| fig-cap: "Only points near the centre of an object learn it (blue); all other points, inside the boxes too, are background."
#| fig-alt: "A scene with digits and green boxes; a few blue dots in the middle of each, small grey dots on a grid everywhere else."
matched = []
model.points.head.compute_loss = lambda targets, outputs, anchors, idx: matched.extend(idx)
model.points.compute_loss([dict(labels=sample.labels, boxes=sample.boxes)], {}, dense.anchors, dense.counts)
del model.points.head.compute_loss
centres = (dense.anchors[0][:, :2] + dense.anchors[0][:, 2:]) / 2
fig, ax = plt.subplots(figsize=(3.2, 3.2), dpi=80, layout='constrained')
show_image(ax, image[0])
draw_boxes(ax, sample.boxes, kind='truth')
ax.plot(*centres[:144].T.tolist(), '.', color='grey', ms=2)
ax.plot(*centres[matched[0] >= 0].T.tolist(), '.', color='#1f77b4', ms=7)
plt.show()

# %% [markdown]
# ## Summary
#
# - FCOS behind the contract: `semidetr train --detector fcos`.
# - No anchors, but still an assignment with hand-made ranges and a radius, and a suppression at the end.
# - A new head predicts boxes without area unless its bias says otherwise.
#
# ## Exercises
#
# 1. On images of 200 pixels nearly all objects belong to the finest map. What follows for the other maps?
# 2. Set `radius=3`. How many points learn the objects of the scene?
# 3. Why is the quality a loss of positives alone, and what does it predict for background then?
