# %% [markdown]
# # Losses {#sec-losses}

# %%
#| default_exp losses

# %%
#| export
from dataclasses import dataclass
import torch
import torch.nn.functional as F
from torch import Tensor
from semidetr.boxes import cxcywh_to_xyxy
from semidetr.core import ConfigError, all_reduce_mean, suggest
from semidetr.matching import Matches, PaddedTargets, assign_o2m, assign_o2o, pad_targets


# %%
#| export
def sigmoid_focal_loss(
    logits:Tensor, # (...) raw scores
    target:Tensor, # (...) 0 or 1
    alpha:float=.25, # weight of the positives; the negatives have 1-alpha
    gamma:float=2., # focusing power
)->Tensor: # (...) loss of each entry
    "Focal loss (@eq-losses-focal): what is already right hardly counts"
    p = logits.sigmoid()
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction='none')
    wrong = p+target-2*p*target # 1-p for positives, p for negatives
    return (alpha*target+(1-alpha)*(1-target))*wrong**gamma*bce

def task_aligned_focal(
    logits:Tensor, # (...) raw scores
    target:Tensor, # (...) soft target in [0,1]; 0 = background
    gamma:float=2., # focusing power
)->Tensor: # (...) loss of each entry
    "Focal loss towards a soft target (@eq-losses-tal): no alpha, the distance to the target is the weight"
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction='none')
    return (target-logits.sigmoid()).abs()**gamma*bce

def varifocal_loss(
    logits:Tensor, # (...) raw scores
    target:Tensor, # (...) soft target in [0,1]; 0 = background
    alpha:float=.75, # weight of the background
    gamma:float=2., # focusing power of the background
)->Tensor: # (...) loss of each entry
    "Positives weighted by their target, background by the focal rule (an option of this project, not of the paper)"
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction='none')
    return torch.where(target > 0, target, alpha*logits.sigmoid()**gamma)*bce


# %%
#| export
def box_losses(
    pred:Tensor, # (P,4) cxcywh normalised
    gt:Tensor, # (P,4) cxcywh normalised
): # (L1 (P,), 1-GIoU (P,), IoU (P,) detached)
    "Loss of each matched pair: L1 summed over the four coordinates, and one minus generalised IoU"
    a, b = cxcywh_to_xyxy(pred), cxcywh_to_xyxy(gt)
    inner = (a[:, 2:].minimum(b[:, 2:])-a[:, :2].maximum(b[:, :2])).clamp(min=0).prod(-1)
    union = (pred[:, 2:].prod(-1)+gt[:, 2:].prod(-1)-inner).clamp(min=1e-12)
    hull = (a[:, 2:].maximum(b[:, 2:])-a[:, :2].minimum(b[:, :2])).prod(-1).clamp(min=1e-12)
    iou = inner/union
    return (pred-gt).abs().sum(-1), 1-iou+(hull-union)/hull, iou.detach()


# %%
#| export
@dataclass(frozen=True)
class CriterionConfig:
    "Weights and switches of matching and losses; the defaults are those of the published code"
    w_cls:float=2. # class term, in matching cost and loss
    w_l1:float=5. # L1 term of the matching cost (paper and code: 5)
    w_giou:float=2. # GIoU term, in matching cost and loss
    l1_weight:float=10. # L1 term of the loss: 10 = what the code effectively does, 5 = what the paper says
    enc_labels:str='zero' # classes that the encoder output learns: 'zero' = object or not (code), 'true' (DINO)
    cls_loss:str='focal' # class loss of the one-to-one stage: 'focal' (paper), 'task_aligned', 'varifocal' (ours, towards the IoU)
    k:int=13 # one-to-many: most positives of an object
    alpha:float=1. # one-to-many: power of the score
    beta:float=6. # one-to-many: power of the IoU
    focal_alpha:float=.25 # weight of positives in the focal loss
    gamma:float=2. # focusing power of all class losses
    w_enc:float=1. # factor on the losses of the encoder output
    w_dn:float=1. # factor on the losses of the denoising queries

    def __post_init__(self):
        for key, known in dict(enc_labels=('zero', 'true'), cls_loss=('focal', 'task_aligned', 'varifocal')).items():
            if getattr(self, key) not in known: raise ConfigError(f"{key}='{getattr(self, key)}' is unknown; {suggest(getattr(self, key), known)}")
        if self.k < 1: raise ConfigError(f'k={self.k}: an object needs at least one positive')


# %%
#| export
def _class_loss(logits, y, cfg, stage):
    "Loss of every entry; hard targets in the focal loss, soft ones in the other two"
    if stage == 'o2m' or cfg.cls_loss == 'task_aligned': return task_aligned_focal(logits, y, cfg.gamma)
    if cfg.cls_loss == 'varifocal': return varifocal_loss(logits, y, gamma=cfg.gamma)
    return sigmoid_focal_loss(logits, y, cfg.focal_alpha, cfg.gamma)

def layer_losses(
    logits:Tensor, # (L,B,Q,C) raw class scores of L layers
    boxes:Tensor, # (L,B,Q,4) cxcywh normalised
    padded:PaddedTargets, # targets of the B images
    labels:Tensor, # (L,B,N) labels to learn
    m:Matches, # pairs of all layers
    cfg:CriterionConfig, # weights
    stage:str, # 'o2m' or 'o2o'
    slot_weight:Tensor|None=None, # (B,Q) weight of each query in the class loss
): # dict of cls, l1, giou, each (L,): weighted sums over the batch, not yet normalised
    "Sums of the three losses for all layers at once; zeros that are connected to the graph where nothing is matched"
    n_layers = logits.shape[0]
    l1, giou, iou = box_losses(boxes[m.layer, m.image, m.query], padded.boxes[m.image, m.target].to(boxes.dtype))
    y = torch.zeros_like(logits)
    hit = iou if stage == 'o2o' and cfg.cls_loss != 'focal' else m.weight
    y[m.layer, m.image, m.query, labels[m.layer, m.image, m.target]] = hit.to(y.dtype)
    cls = _class_loss(logits, y, cfg, stage)
    if slot_weight is not None: cls = cls*slot_weight[..., None]
    def by_layer(x): return x.new_zeros(n_layers).index_add(0, m.layer, x*m.weight.to(x.dtype))
    return dict(cls=cfg.w_cls*cls.flatten(1).sum(1), l1=cfg.l1_weight*by_layer(l1), giou=cfg.w_giou*by_layer(giou))


# %%
#| export
def denoising_matches(
    target:Tensor, # (B,P) object of a positive slot; -1, -2 background; -3 no weight
    n_layers:int, # decoder layers
)->Matches: # the same pairs in every layer
    "Denoising queries know their object: no matching is needed"
    image, slot = (target >= 0).nonzero(as_tuple=True)
    layer = torch.arange(n_layers, device=target.device).repeat_interleave(len(image))
    return Matches(layer, image.repeat(n_layers), slot.repeat(n_layers), target[image, slot].repeat(n_layers), torch.ones(len(layer), device=target.device))

def _float(x): return x.to(torch.promote_types(x.dtype, torch.float32))

def _stacked(outputs):
    "Decoder layers in order and, where shapes allow, the encoder output last: (L,B,Q,C), (L,B,Q,4), names"
    layers = [*outputs.get('aux_outputs', ()), outputs]
    names = [f'_{i}' for i in range(len(layers)-1)]+['']
    if 'enc_outputs' in outputs: layers, names = [*layers, outputs['enc_outputs']], [*names, '_enc']
    logits, boxes = (torch.stack([o[key] for o in layers]) for key in ('pred_logits', 'pred_boxes'))
    return _float(logits), _float(boxes), names


# %%
#| export
def _check_stage(stage):
    if stage not in ('o2m', 'o2o'): raise ConfigError(f"stage '{stage}' is unknown; known: o2m, o2o (see matching.stage_of)")

def assign(
    logits:Tensor, # (L,B,Q,C)
    boxes:Tensor, # (L,B,Q,4) cxcywh normalised
    padded:PaddedTargets, # of the B images
    labels:Tensor, # (L,B,N)
    stage:str, # 'o2m' or 'o2o'
    cfg:CriterionConfig, # costs, k, alpha, beta
)->Matches:
    "The matching of the stage, for all layers"
    _check_stage(stage)
    if stage == 'o2m': return assign_o2m(logits, boxes, padded, labels, cfg.k, cfg.alpha, cfg.beta)
    return assign_o2o(logits, boxes, padded, labels, w_cls=cfg.w_cls, w_l1=cfg.w_l1, w_giou=cfg.w_giou)

def _named(sums, names, z_cls, z_box, factor):
    "{'loss_cls_0': ..., ...}: divide by the normalisers and give each scalar its name"
    out = {}
    for term, x in sums.items():
        for name, value in zip(names, (x*factor/(z_cls if term == 'cls' else z_box)).unbind()): out[f'loss_{term}{name}'] = value
    return out


# %%
#| export
def set_criterion(
    outputs:dict, # of the detector: pred_logits, pred_boxes, aux_outputs, enc_outputs, extra['dn']
    targets:list, # dicts with `labels` (n,), `boxes` (n,4) cxcywh normalised
    stage:str='o2o', # 'o2m' or 'o2o' (`stage_of`)
    cfg:CriterionConfig=CriterionConfig(), # weights and switches
    denoising:bool=True, # False: denoising queries get no loss (unlabelled images of stage 1)
)->dict: # scalars loss_cls, loss_l1, loss_giou with suffixes _0, _1, ..., _enc, _dn_0, ...; their sum is the loss
    "All losses of a batch. NonFiniteError where a prediction is NaN, DataError where a label is not a class"
    logits, boxes, names = _stacked(outputs)
    padded = pad_targets(targets, logits.shape[-1])
    labels = padded.labels.expand(len(names), -1, -1).clone()
    if names[-1] == '_enc' and cfg.enc_labels == 'zero': labels[-1] = 0
    m = assign(logits, boxes, padded, labels, stage, cfg)
    sums = layer_losses(logits, boxes, padded, labels, m, cfg, stage)
    dn = outputs.get('extra', {}).get('dn') if denoising else None
    target = dn['meta']['target'] if dn else padded.labels.new_full((1, 1), -1)
    here = torch.cat([logits.new_zeros(len(names)).index_add(0, m.layer, m.weight.to(logits.dtype)), (target >= 0).sum()[None].to(logits.dtype)])
    mean = all_reduce_mean(here).clamp(min=1) # one exchange between the processes, whatever this batch holds
    here = here.clamp(min=1)
    factor = logits.new_tensor([cfg.w_enc if n == '_enc' else 1. for n in names])
    losses = _named(sums, names, (here if stage == 'o2o' else mean)[:-1], mean[:-1], factor)
    return {**losses, **(_denoising_losses(dn, padded, cfg, here[-1], mean[-1]) if dn else {})}

def _denoising_losses(dn, padded, cfg, z_cls, z_box):
    "Losses of the denoising queries of all layers, towards their own objects"
    logits, boxes, target = _float(dn['pred_logits']), _float(dn['pred_boxes']), dn['meta']['target']
    n = len(logits)
    sums = layer_losses(logits, boxes, padded, padded.labels.expand(n, -1, -1), denoising_matches(target, n), cfg, 'o2o', (target != -3).to(logits.dtype))
    return _named(sums, [f'_dn_{i}' for i in range(n)], z_cls, z_box, cfg.w_dn)


# %%
#| export
@torch.no_grad()
def match_stats(
    outputs:dict, # of the detector; the last decoder layer is looked at
    targets:list, # as for `set_criterion`
    stage:str='o2o', # 'o2m' or 'o2o'
    cfg:CriterionConfig=CriterionConfig(), # as for `set_criterion`
)->dict: # floats: positives (of the batch), positives_per_object, matched_iou (nan without objects)
    "How many queries an object got in the last layer and how well they fit: for the log, not for the loss"
    logits, boxes = (_float(outputs[k][None]) for k in ('pred_logits', 'pred_boxes'))
    padded = pad_targets(targets, logits.shape[-1])
    m = assign(logits, boxes, padded, padded.labels[None], stage, cfg)
    iou = box_losses(boxes[m.layer, m.image, m.query], padded.boxes[m.image, m.target])[2]
    objects = sum(padded.counts)
    return dict(positives=len(m), positives_per_object=len(m)/objects if objects else float('nan'), matched_iou=float(iou.mean()))
