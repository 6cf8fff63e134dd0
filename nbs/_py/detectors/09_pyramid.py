# %% [markdown]
# # Feature pyramids and assigned targets {#sec-pyramid}
#
# > Put a detector with anchors or points behind the contract of the detection transformers.
#
# *Why.* Soft Teacher and Dense Teacher were not published with a DETR but with Faster R-CNN and FCOS. To
# compare methods on the same images, splits, views and schedules, those two networks must come behind the same
# contract (@sec-contract). They differ from a DETR in two ways. Which prediction learns which object is not
# matched in a loss that all detectors share: each network *assigns* targets by rules of its own. And an
# object is found many times, so detections are what is left after non-maximum suppression. This chapter holds
# what both networks have in common: the pyramid of maps, boxes in pixels, anchors at exact places, and a way
# from detections to outputs.
#
# ## Two additions to the contract
#
# In training, `forward` returns outputs with one entry, `criterion`: a function from targets to losses, which
# `set_criterion` calls in place of the matching. In evaluation it returns $K$ detections with score $s$ and
# class $c$ as logits
#
# $$
# z_{kc'} = \begin{cases} \log\dfrac{s_k}{1-s_k} & c' = c_k\\ -M & \text{otherwise,}\end{cases}
# $$ {#eq-pyramid-logits}
#
# with the largest number $M$ of the type, so that everything that reads boxes from a DETR reads them from here:
# evaluation, prediction, pseudo labels. An infinite logit would look like a fault (@sec-replay).
# The settings say how a network predicts, so that a method can tell whether it can train it: `structure` is
# `'regions'` or `'points'`, without it `'queries'`.

# %%
#| default_exp detectors.pyramid

# %%
#| export
from collections import OrderedDict
from dataclasses import dataclass, replace
import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork
from semidetr.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from semidetr.core import ConfigError, at_least_float32
from semidetr.detectors.backbone import BackboneConfig, build_backbone
from semidetr.detectors.contract import Outputs, split_parameters

# %%
import matplotlib.pyplot as plt
from semidetr.detectors.contract import post_process
from semidetr.draw import draw_boxes, show_image


# %% [markdown]
# ## Sizes and boxes in pixels
#
# A batch is padded at the right and the bottom (@sec-loader). Torchvision's parts take the tensor together with
# the sizes before padding, and boxes as corners in pixels. Its Faster R-CNN counts classes from 1, since class 0
# is the background; FCOS counts from 0.

# %%
#| export
def unpadded_sizes(
    images: Tensor,  # (B,3,H,W)
    mask: Tensor = None,  # (B,H,W) bool, True=padding; None: no padding
) -> list:  # per image (h, w)
    "Sizes of the images in a padded batch"
    if mask is None:
        return [tuple(images.shape[-2:])] * len(images)
    heights, widths = (~mask).any(2).sum(1), (~mask).any(1).sum(1)
    return list(zip(heights.tolist(), widths.tolist()))


def pixel_targets(
    targets: list,  # per image dict(labels (N,), boxes (N,4) cxcywh in [0,1])
    sizes: list,  # per image (h, w)
    first_label: int = 0,  # number of the first class
) -> list:  # per image dict(labels (N,), boxes (N,4) xyxy pixels, at least float32)
    "Targets as torchvision's detectors take them"
    out = []
    for t, (h, w) in zip(targets, sizes):
        boxes = at_least_float32(t['boxes'])
        corners = cxcywh_to_xyxy(boxes) * boxes.new_tensor([w, h, w, h])
        out.append(dict(boxes=corners.reshape(-1, 4), labels=t['labels'] + first_label))
    return out


# %%
padding = torch.zeros(2, 40, 60, dtype=torch.bool)
padding[1, 30:] = True
padding[1, :, 50:] = True
sizes = unpadded_sizes(torch.zeros(2, 3, 40, 60), padding)
half = dict(labels=torch.tensor([0]), boxes=torch.tensor([[0.5, 0.5, 0.4, 0.2]]))
in_pixels = pixel_targets([half, half], sizes, first_label=1)
assert sizes == [(40, 60), (30, 50)]
wanted = torch.tensor([15.0, 12, 35, 18])
assert torch.allclose(in_pixels[1]['boxes'][0], wanted) and in_pixels[1]['labels'].tolist() == [1]
sizes, in_pixels[1]['boxes']


# %% [markdown]
# ## Detections as outputs
#
# Images have different numbers of detections. Rows that are missing have the score 0 for every class and are
# never reported.

# %%
#| export
def as_outputs(
    detections: list,  # per image dict(boxes (K,4) xyxy pixels, labels (K,) from 0, scores (K,))
    sizes: list,  # per image (h, w)
    num_classes: int,  # C
) -> Outputs:  # pred_logits (B,K,C) and pred_boxes (B,K,4) cxcywh in [0,1], K of the fullest image
    "Detections after suppression in the form of a DETR's outputs (@eq-pyramid-logits)"
    most = max((len(d['scores']) for d in detections), default=0)
    dtype = detections[0]['boxes'].dtype if detections else torch.float32
    device = detections[0]['boxes'].device if detections else None
    largest = torch.finfo(dtype).max
    logits = torch.full((len(detections), most, num_classes), -largest, dtype=dtype, device=device)
    boxes = torch.zeros(len(detections), most, 4, dtype=dtype, device=device)
    for z, b, d, (h, w) in zip(logits, boxes, detections, sizes):
        rows = torch.arange(len(d['scores']), device=device)
        z[rows, d['labels']] = d['scores'].to(dtype).logit().clamp(-largest, largest)
        b[rows] = xyxy_to_cxcywh(d['boxes'] / b.new_tensor([w, h, w, h]))
    return dict(pred_logits=logits, pred_boxes=boxes)


# %%
few = dict(
    boxes=torch.tensor([[10.0, 5.0, 40.0, 25.0]]), labels=torch.tensor([2]), scores=torch.tensor([0.8])
)
none = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long), scores=torch.zeros(0))
outputs = as_outputs([few, none], [(40, 60), (30, 50)], num_classes=3)
read = post_process(outputs, [(40, 60), (30, 50)])
assert torch.allclose(read[0]['boxes'], few['boxes']) and read[0]['labels'].tolist() == [2]
assert abs(read[0]['scores'].item() - 0.8) < 1e-6 and len(read[1]['scores']) == 0
read[0]


# %% [markdown]
# ## Anchors at exact places
#
# An anchor is a box at a cell of a map; its network predicts a correction. Torchvision infers the stride of a map
# as $\lfloor\text{padded side}/\text{map side}\rfloor$. With sides that are no multiple of the coarsest stride
# that is wrong: a map of stride 32 over 208 pixels has 7 cells, which gives 29, and the anchors of the last cell
# are 18 pixels off. Padding every image to a multiple would cost up to half of the computation on small images.
# `StrideAnchors` is told the strides instead. Sides are rounded as torchvision does: half sides are whole
# numbers.

# %%
#| export
class StrideAnchors(AnchorGenerator):
    "Torchvision's anchors at multiples of known strides, in float32 at least"

    def __init__(
        self,
        strides: tuple,  # of the maps, pixels
        sizes: tuple,  # per map a tuple of sides, pixels
        ratios: tuple = (1.0,),  # height / width
    ):
        super().__init__(tuple(sizes), (tuple(ratios),) * len(strides))
        self.strides = tuple(strides)

    def forward(
        self,
        image_list: ImageList,
        feature_maps: list,  # (B,d,h,w) each
    ) -> list:  # per image (n,4) xyxy pixels, maps one after another
        x = feature_maps[0]
        self.set_cell_anchors(torch.promote_types(x.dtype, torch.float32), x.device)
        steps = [[torch.tensor(s, device=x.device)] * 2 for s in self.strides]
        grid = self.grid_anchors([f.shape[-2:] for f in feature_maps], steps)
        return [torch.cat(grid)] * len(image_list.image_sizes)


# %%
maps_208 = [torch.zeros(1, 8, n, n) for n in (26, 13, 7)]
images_208 = ImageList(torch.zeros(1, 3, 208, 208), [(208, 208)])
exact = StrideAnchors((8, 16, 32), ((8,), (16,), (32,)))(images_208, maps_208)[0]
inferred = AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * 3)(images_208, maps_208)[0]
centre = lambda box: ((box[:2] + box[2:]) / 2).tolist()
assert centre(exact[-1]) == [192, 192] and centre(inferred[-1]) == [174, 174]
shapes = StrideAnchors((16,), ((48,),), (0.5, 1.0, 2.0))(images_208, maps_208[1:2])[0][:3]
assert (shapes[:, 2:]).tolist() == [[34, 17], [24, 24], [17, 34]]  # half sides
centre(exact[-1]), centre(inferred[-1])


# %% [markdown]
# ## What both networks share
#
# The pyramid gives each map of the backbone the width $d$ and adds to it the coarser map, enlarged; coarser maps
# may follow. Backbone and pyramid run in the precision of the run (`run.amp`); heads and box arithmetic in
# float32.

# %%
#| export
@dataclass
class EncodedPyramid:
    "Images after backbone and pyramid"

    images: ImageList  # padded tensor, and sizes without padding
    maps: OrderedDict  # name -> (B,d,h,w), finest first

    @property
    def features(self) -> list:  # of (B,d,h,w)
        "The maps, finest first"
        return list(self.maps.values())

    @property
    def sizes(self) -> list:  # per image (h, w)
        "Sizes of the images without padding"
        return self.images.image_sizes


class PyramidDetector(nn.Module):
    """Base of detectors that assign their targets themselves.

    A subclass has `losses(encoded, targets)`, with targets as for `forward`, and `detect(encoded)`, which
    returns detections as for `as_outputs`.
    """

    def __init__(
        self,
        cfg,  # settings: num_classes, backbone, d_model
        extra: nn.Module = None,  # torchvision's block for coarser maps
    ):
        super().__init__()
        self.cfg, self.backbone = cfg, build_backbone(cfg.backbone)
        self.pyramid = FeaturePyramidNetwork(self.backbone.channels, cfg.d_model, extra)

    def encode(
        self,
        images: Tensor,  # (B,3,H,W) normalised, zero padded at the right and the bottom
        mask: Tensor = None,  # (B,H,W) bool, True=padding
    ) -> EncodedPyramid:
        "Maps of a batch"
        maps = self.pyramid(OrderedDict((str(i), f) for i, f in enumerate(self.backbone(images))))
        maps = OrderedDict((k, at_least_float32(f)) for k, f in maps.items())
        return EncodedPyramid(ImageList(images, unpadded_sizes(images, mask)), maps)

    def decode(
        self,
        encoded: EncodedPyramid,  # from `encode`
        extras=(),  # of a DETR: there are no queries here
        cached: Outputs = None,  # likewise
    ) -> Outputs:  # in training `criterion`, otherwise detections (@eq-pyramid-logits)
        "Detections, in training a function from targets to losses; `ConfigError` for extra queries"
        if extras:
            raise ConfigError(f'{type(self).__name__} has no queries to which others could be added')
        with self.full_precision(encoded):
            if not self.training:
                return as_outputs(self.detect(encoded), encoded.sizes, self.cfg.num_classes)

        def criterion(targets):
            with self.full_precision(encoded):
                return self.losses(encoded, targets)

        return dict(criterion=criterion)

    def full_precision(self, encoded):
        "Heads and box arithmetic run in float32, whatever `run.amp` says"
        return torch.autocast(encoded.images.tensors.device.type, enabled=False)

    def forward(
        self,
        images: Tensor,  # (B,3,H,W) as in `encode`
        mask: Tensor = None,  # (B,H,W) bool, True=padding
        targets: list = None,  # not used: the criterion gets them
    ) -> Outputs:
        "Encode and decode"
        return self.decode(self.encode(images, mask))

    def denoise(
        self,
        targets: list,  # per image dict(labels (N,), boxes (N,4) cxcywh in [0,1])
    ) -> list:  # empty
        "No denoising queries"
        return []

    def param_groups(self) -> dict:  # 'backbone', 'rest' -> trainable parameters
        "Parameters for the optimiser: the pretrained backbone usually gets a smaller learning rate"
        return split_parameters(self)


# %% [markdown]
# `PyramidConfig` holds the settings that both networks have. Detections below `min_score` are dropped before
# suppression. The published tests use .05; a smaller value raises AP, as the readme of Soft Teacher reports (from
# 33.78 to 34.7 with 10 % of COCO), because AP counts every detection that is correct, however low its score is.

# %%
#| export
@dataclass(frozen=True)
class PyramidConfig:
    "Settings of a detector on a feature pyramid"

    num_classes: int  # C; 0 in a configuration means: as many as the data have
    backbone: BackboneConfig = BackboneConfig('resnet50', out_strides=(8, 16, 32))
    d_model: int = 256  # width of the pyramid
    min_score: float = 0.05  # smallest score of a detection
    nms: float = 0.5  # IoU of the suppression within a class
    detections: int = 100  # most per image

    def __post_init__(self):
        if self.num_classes < 0:
            raise ConfigError(f'num_classes={self.num_classes} must not be negative')
        strides = self.backbone.out_strides
        if [2 * s for s in strides[:-1]] != list(strides[1:]):
            raise ConfigError(f'backbone.out_strides={strides}: each must be twice the one before')
        if not 0 <= self.min_score < 1 or not 0 < self.nms <= 1 or self.detections < 1:
            raise ConfigError('detector: min_score lies in [0, 1), nms in (0, 1], detections is at least 1')

    def untrained(self):  # settings of the same class
        "The same settings with random weights for the backbone"
        return replace(self, backbone=replace(self.backbone, weights='none'))


# %%
try:
    PyramidConfig(3, BackboneConfig(out_strides=(8, 32)))
except ConfigError as error:
    message = str(error)
assert 'twice the one before' in message
message

# %%
#| label: fig-pyramid-anchors
#| fig-cap: "Torchvision's inferred strides move the anchors of the coarse map towards the top left (orange); known strides put them in the right places (blue)."
#| fig-alt: "A square of 208 pixels with two grids of points: blue points every 32 pixels, orange points every 29 pixels."
fig, ax = plt.subplots(figsize=(3.2, 3.2), dpi=80, layout='constrained')
show_image(ax, torch.ones(3, 208, 208))
draw_boxes(ax, exact[-1:], kind='student')
for box_rows, color in ((exact[-49:], '#1f77b4'), (inferred[-49:], '#ff7f0e')):
    centres = (box_rows[:, :2] + box_rows[:, 2:]) / 2
    ax.plot(*centres.T.tolist(), '.', color=color)
plt.show()

# %% [markdown]
# ## Summary
#
# - A detector that assigns targets itself returns a `criterion` in training and its detections as logits
#   otherwise; trainer, evaluation and prediction do not change.
# - Anchors are placed by known strides, so that images of any size need no padding.
#
# ## Exercises
#
# 1. Which of the 49 anchors of the coarse map has the right place under inferred strides?
# 2. What does `post_process` return for rows of $-M$ with `score_threshold=0`?
# 3. Where would a detector with both queries and anchors (DETR with dense auxiliary heads) put its losses?
