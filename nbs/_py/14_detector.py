# %% [markdown]
# # The detector {#sec-detector}
#
# > Build a detection transformer, run it on a padded batch, and read boxes from its output.

# %%
#| default_exp detector

# %%
#| export
import copy
import math
from dataclasses import dataclass
import torch
from torch import nn, Tensor
from torchvision.ops import batched_nms
from semidetr.backbone import BackboneConfig, InputProj, build_backbone, resize_mask
from semidetr.boxes import cxcywh_to_xyxy
from semidetr.core import ConfigError
from semidetr.denoising import DenoisingConfig, combine_extras, denoising_queries
from semidetr.transformer import MLP, Encoded, Transformer, TransformerConfig, predict_boxes


# %%
#| export
@dataclass(frozen=True)
class DetectorConfig:
    "All that fixes the shape of a detector"
    num_classes:int # C; 0 in a configuration means: as many as the data have
    backbone:BackboneConfig = BackboneConfig()
    transformer:TransformerConfig = TransformerConfig()
    denoising:DenoisingConfig = DenoisingConfig()
    look_forward_twice:bool = True # the box of a layer also trains the layer before (DINO)
    prior:float = .01 # probability that a fresh class head gives to every class

    def __post_init__(self):
        if self.num_classes < 0: raise ConfigError(f'num_classes={self.num_classes} must not be negative')
        if 0 < self.denoising.label_rows < self.num_classes:
            raise ConfigError(f'denoising.label_rows={self.denoising.label_rows} is less than num_classes={self.num_classes}; use 0 for one row a class')


# %%
#| export
def detector_small(
    num_classes:int, # C
)->DetectorConfig:
    "Trains on a few CPU cores: EfficientNet-Lite0 at strides 8, 16 and one more level; 1+3 layers of width 128"
    return DetectorConfig(num_classes, BackboneConfig('efficientnet_lite0', out_strides=(8, 16)),
        TransformerConfig(d_model=128, n_levels=3, enc_layers=1, dec_layers=3, ffn=512, num_queries=100, query_content='memory', position_unit='image'),
        DenoisingConfig(num=40))

def dino_r50(
    num_classes:int, # C
)->DetectorConfig:
    "The paper's DINO: ResNet-50 at strides 8, 16, 32 and one more level; 6+6 layers of width 256, 900 queries"
    return DetectorConfig(num_classes, BackboneConfig('resnet50', out_strides=(8, 16, 32)), TransformerConfig(),
                          DenoisingConfig(label_rows=max(82, num_classes)))


# %%
#| export
class Detector(nn.Module):
    "A detection transformer with query selection, box refinement and room for extra queries (DINO)"
    def __init__(self, cfg:DetectorConfig):
        super().__init__()
        self.cfg, t, d = cfg, cfg.transformer, cfg.transformer.d_model
        self.backbone = build_backbone(cfg.backbone)
        self.input_proj = InputProj(self.backbone.channels, d, t.n_levels)
        self.transformer = Transformer(t)
        self.class_head, self.box_head = nn.Linear(d, cfg.num_classes), MLP(d, d, 4, 3)
        nn.init.constant_(self.class_head.bias, -math.log((1-cfg.prior)/cfg.prior))
        nn.init.zeros_(self.box_head.layers[-1].weight); nn.init.zeros_(self.box_head.layers[-1].bias)
        self.enc_class_head, self.enc_box_head = copy.deepcopy(self.class_head), copy.deepcopy(self.box_head)
        self.label_enc = nn.Embedding(cfg.denoising.label_rows or cfg.num_classes, d)

    def encode(self,
        images:Tensor, # (B,3,H,W) normalised, zero padded at the right and the bottom
        mask:Tensor=None, # (B,H,W) bool, True=padding; None: nothing is padded
    )->Encoded:
        "Everything up to the proposals; needed once for any number of `decode`"
        features = self.input_proj(self.backbone(images))
        return self.transformer.encode(features, level_masks(mask, features), self.enc_class_head, self.enc_box_head)

    def decode(self,
        encoded:Encoded,
        extras=(), # `ExtraQueries` to send along, in this order, in front of the matching queries
    )->dict: # outputs; see the table below
        "Queries through the decoder and the heads"
        content, logits, blocked, slices = combine_extras(extras, encoded.content.shape[1])
        queries, references = encoded.content, encoded.reference_logits
        if slices: queries, references = torch.cat([content.to(queries.dtype), queries], 1), torch.cat([logits.to(references.dtype), references], 1)
        ratios = None if encoded.valid_ratios is None else encoded.valid_ratios.to(references.dtype)
        hs, references = self.transformer.decoder(queries, references.sigmoid(), encoded.memory, encoded.shapes, self.box_head,
                                                  encoded.padding_mask, ratios, blocked)
        cls, box = self.class_head(hs), predict_boxes(references, self.box_head(hs), self.cfg.look_forward_twice)
        if self.training and 'denoising' not in slices: cls = cls+0*self.label_enc.weight.sum() # every parameter has a gradient
        return collect_outputs(encoded, hs, cls, box, extras, slices)

    def forward(self,
        images:Tensor, # (B,3,H,W)
        mask:Tensor=None, # (B,H,W) bool
        targets:list=None, # given in training mode: denoising queries are made of them
    )->dict: # outputs
        "Encode and decode; with `targets`, in training, also denoise"
        encoded, extras = self.encode(images, mask), []
        if self.training and targets is not None:
            extras = [denoising_queries(targets, self.label_enc, self.cfg.num_classes, self.cfg.denoising)]
        return self.decode(encoded, [e for e in extras if e is not None])


# %%
#| export
def level_masks(
    mask:Tensor, # (B,H,W) bool, True=padding, or None
    features, # L maps (B,d,h,w)
): # L masks (B,h,w), or None if nothing is padded
    "The padding as each level sees it: nearest neighbour"
    if mask is None or not mask.any(): return None
    return [resize_mask(mask, f.shape[-2:]) for f in features]

def collect_outputs(
    encoded:Encoded,
    hs:Tensor, # (layers,B,P+Q,d)
    cls:Tensor, # (layers,B,P+Q,C) logits
    box:Tensor, # (layers,B,P+Q,4) cxcywh
    extras=(), # `ExtraQueries` that were sent along
    slices:dict={}, # name -> slice of the P extra slots
)->dict:
    "Sort what the decoder said by who was asked"
    P = sum(e.content.shape[1] for e in extras)
    layers = [dict(pred_logits=c[:, P:], pred_boxes=b[:, P:]) for c, b in zip(cls, box)]
    extra = {e.name: dict(pred_logits=cls[:, :, s], pred_boxes=box[:, :, s], hs=hs[:, :, s], meta=e.meta)
             for e in extras for s in [slices[e.name]]}
    return dict(**layers[-1], aux_outputs=layers[:-1], hs=hs[:, :, P:], extra=extra,
                enc_outputs=dict(pred_logits=encoded.enc_logits, pred_boxes=encoded.enc_boxes))


# %%
#| export
@torch.no_grad()
def post_process(
    outputs:dict, # pred_logits (B,Q,C), pred_boxes (B,Q,4) cxcywh
    sizes, # per image (H, W) of the pixels to report boxes in
    top_k:int=300, # most detections an image
    nms:float=None, # IoU of a per-class suppression before the cut; None: no suppression
    score_threshold:float=0., # scores must be larger; .01 with `nms` (all Q x C pairs go into it)
)->list: # per image dict(scores (K,) descending, labels (K,), boxes (K,4) xyxy pixels)
    "The best pairs of query and class; a query may appear with several classes"
    scores = outputs['pred_logits'].float().sigmoid().flatten(1)
    boxes, C, out = cxcywh_to_xyxy(outputs['pred_boxes'].float()), outputs['pred_logits'].shape[-1], []
    for s, b, size in zip(scores, boxes, sizes):
        h, w = (float(v) for v in size)
        s, order = s.sort(descending=True) if nms is not None else s.topk(min(top_k, len(s)))
        keep = s > score_threshold
        s, order = s[keep], order[keep]
        b = (b[order//C].clamp(0, 1))*b.new_tensor([w, h, w, h])
        labels = order % C
        if nms is not None:
            keep = batched_nms(b, s, labels, nms)[:top_k]
            s, b, labels = s[keep], b[keep], labels[keep]
        out.append(dict(scores=s, labels=labels, boxes=b))
    return out
