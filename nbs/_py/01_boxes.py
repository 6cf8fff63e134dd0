# %% [markdown]
# # Boxes {#sec-boxes}
#
# > Formats, overlap, and moving a box from one view of an image to another.

# %%
#| default_exp boxes

# %%
#| export
import torch
from torch import Tensor
from torchvision.ops import box_convert
from torchvision.ops import box_iou as _box_iou, generalized_box_iou as _generalized_box_iou


# %%
#| export
def cxcywh_to_xyxy(
    boxes:Tensor, # (..., 4) centre, width, height
)->Tensor: # (..., 4) two corners, same unit
    "Centre form to corner form"
    return box_convert(boxes, 'cxcywh', 'xyxy')

def xyxy_to_cxcywh(
    boxes:Tensor, # (..., 4) two corners
)->Tensor: # (..., 4) centre, width, height, same unit
    "Corner form to centre form"
    return box_convert(boxes, 'xyxy', 'cxcywh')

def _scale(boxes, size):
    h, w = (int(s) for s in size)
    return boxes.new_tensor([w, h, w, h])

def normalize_boxes(
    xyxy:Tensor, # (N,4) pixels
    size, # (H, W) of the un-padded image
)->Tensor: # (N,4) cxcywh in [0,1]
    "Pixels to what a detector learns"
    return xyxy_to_cxcywh(xyxy/_scale(xyxy, size))

def denormalize_boxes(
    cxcywh:Tensor, # (N,4) in [0,1]
    size, # (H, W) of the un-padded image
)->Tensor: # (N,4) xyxy pixels
    "What a detector says to pixels"
    return cxcywh_to_xyxy(cxcywh)*_scale(cxcywh, size)


# %%
#| export
def inverse_sigmoid(
    x:Tensor, # values; clipped to [0,1]
    eps:float=1e-5, # floor of both odds terms
)->Tensor:
    "Logit with a floor (spec of Deformable-DETR's box refinement)"
    x = x.clamp(0, 1)
    return (x.clamp(min=eps)/(1-x).clamp(min=eps)).log()


# %%
#| export
def box_iou(
    a:Tensor, # (N,4) xyxy
    b:Tensor, # (M,4) xyxy, same unit
)->Tensor: # (N,M) in [0,1]; 0 where both boxes are empty
    "Intersection over union of all pairs, in float32 at least"
    dt = torch.promote_types(a.dtype, torch.float32)
    return _box_iou(a.to(dt), b.to(dt)).nan_to_num(0.)

def generalized_box_iou(
    a:Tensor, # (N,4) xyxy
    b:Tensor, # (M,4) xyxy, same unit
)->Tensor: # (N,M) in [-1,1]
    "Generalised IoU of all pairs: it still has a slope where boxes do not touch"
    dt = torch.promote_types(a.dtype, torch.float32)
    return _generalized_box_iou(a.to(dt), b.to(dt)).nan_to_num(0.)


# %%
#| export
def transform_boxes(
    xyxy:Tensor, # (N,4) pixels of the source view
    matrix:Tensor, # (3,3) source pixels -> target pixels
    size, # (H, W) of the un-padded target view
    min_side:float=1., # boxes with a shorter side are not kept, pixels
): # ((N,4) xyxy pixels of the target, clamped; (N,) bool: is it still a box)
    "Map the four corners, take their hull, clamp it to the view (spec of the pseudo-label transport)"
    h, w = (int(s) for s in size)
    m = matrix.to(device=xyxy.device, dtype=torch.float64)
    x1, y1, x2, y2 = xyxy.to(torch.float64).unbind(-1)
    corners = torch.stack([torch.stack([x, y, torch.ones_like(x)], -1) for x, y in ((x1, y1), (x2, y1), (x1, y2), (x2, y2))], 1)
    p = corners @ m.T
    p = p[..., :2]/p[..., 2:]
    lo, hi = p.amin(1), p.amax(1)
    limit = p.new_tensor([w, h])
    out = torch.cat([lo.clamp(min=0).minimum(limit), hi.clamp(min=0).minimum(limit)], -1).to(xyxy.dtype)
    keep = (out[:, 2:]-out[:, :2] > min_side).all(-1)
    return out, keep
