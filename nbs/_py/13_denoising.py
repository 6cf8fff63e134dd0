# %% [markdown]
# # Denoising queries {#sec-denoising}
#
# > Give the decoder, during training, extra queries whose answers are known, and keep them apart from the others.

# %%
#| default_exp denoising

# %%
#| export
from dataclasses import dataclass, field
import torch
from torch import nn, Tensor
from semidetr.boxes import cxcywh_to_xyxy, inverse_sigmoid, xyxy_to_cxcywh
from semidetr.core import ConfigError


# %%
#| export
@dataclass
class ExtraQueries:
    "Queries that go through the decoder in front of the matching queries, and come out separately"
    content:Tensor # (B,P,d)
    boxes:Tensor # (B,P,4) cxcywh in logit space
    mask:Tensor # (P,P) bool, True: row may not see column
    name:str # key of `outputs['extra']`
    meta:dict = field(default_factory=dict) # handed through to the outputs

def combine_extras(
    extras, # list of `ExtraQueries`, in the order in which the decoder shall see them
    num_queries:int, # Q matching queries, which come last
)->tuple: # (content (B,P,d), boxes (B,P,4) logits, blocked (P+Q,P+Q) bool, {name: slice}); (None, None, None, {}) without extras
    "One decoder input of several sets: no set sees another, all see the matching queries, which see none of them"
    if not extras: return None, None, None, {}
    if len({e.name for e in extras}) < len(extras): raise ConfigError(f'extra queries share a name: {[e.name for e in extras]}')
    total, start, slices = sum(e.content.shape[1] for e in extras), 0, {}
    blocked = torch.zeros(total+num_queries, total+num_queries, dtype=torch.bool, device=extras[0].content.device)
    blocked[:, :total] = True
    for e in extras:
        slices[e.name] = s = slice(start, start := start+e.content.shape[1])
        blocked[s, s] = e.mask
    return torch.cat([e.content for e in extras], 1), torch.cat([e.boxes for e in extras], 1), blocked, slices


# %%
#| export
@dataclass(frozen=True)
class DenoisingConfig:
    "Contrastive denoising (paper's code: 200, .5, .4)"
    num:int = 200 # slots to fill, positive and negative together; 0: no denoising
    label_noise:float = .5 # half of this share of the labels is drawn anew
    box_noise:float = .4 # corners move by up to this share of half the size (negatives: up to twice; official DINO 4-scale .4, mmdetection 1.)
    label_rows:int = 0 # rows of the label table; 0: one a class (released checkpoints: 82)

def group_sizes(
    n_max:int, # most boxes of one image in the batch
    num:int=200, # slots to fill
)->tuple: # (groups G, slots P = 2*n_max*G)
    "How often the boxes fit into the slots; one group at least (@eq-denoising-groups)"
    groups = max(1, num//(2*n_max))
    return groups, 2*n_max*groups

def group_mask(
    groups:int, # G
    size:int, # slots of a group
)->Tensor: # (G*size, G*size) bool, True: row may not see column
    "Each group sees itself only"
    g = torch.arange(groups*size)//size
    return g[:, None] != g[None]

def noise_labels(
    labels:Tensor, # (...) int64
    num_classes:int, # C
    share:float=.5, # `label_noise`
    generator=None,
)->Tensor: # same shape
    "Draw share/2 of the labels anew, uniformly: the true one may come again"
    kw = dict(device=labels.device, generator=generator)
    redraw = torch.rand(labels.shape, **kw) < share/2
    return torch.where(redraw, torch.randint(num_classes, labels.shape, **kw), labels)

def noise_boxes(
    cxcywh:Tensor, # (...,4) normalised
    negative:Tensor, # (...) bool, broadcastable: move far
    scale:float=.4, # `box_noise`
    generator=None,
)->Tensor: # (...,4) xyxy normalised, not yet clamped
    "Move every corner coordinate by r*scale of half the size, r in [0,1) or, for negatives, [1,2) (@eq-denoising-noise)"
    kw = dict(device=cxcywh.device, generator=generator)
    r = torch.rand(cxcywh.shape, dtype=cxcywh.dtype, **kw)+negative[..., None]
    sign = torch.randint(2, cxcywh.shape, **kw)*2-1
    return cxcywh_to_xyxy(cxcywh)+sign*r*scale*cxcywh[..., 2:].repeat_interleave(2, -1)[..., [0, 2, 1, 3]]/2


# %%
#| export
def _padded(targets, num_classes, generator):
    "Labels (B,n), boxes (B,n,4), used (B,n) and real (B,) of a batch; an image without boxes gets one fake box"
    counts = [len(t['labels']) for t in targets]
    n, device = max(counts), targets[0]['boxes'].device
    labels, boxes = torch.zeros(len(targets), n, dtype=torch.long, device=device), torch.full((len(targets), n, 4), .5, device=device)
    for i, t in enumerate(targets):
        if counts[i]: labels[i, :counts[i]], boxes[i, :counts[i]] = t['labels'], t['boxes'].to(boxes.dtype)
        else: labels[i, 0] = torch.randint(num_classes, (), device=device, generator=generator)
    counts = torch.tensor(counts, device=device)
    return labels, boxes, torch.arange(n, device=device) < counts.clamp(min=1)[:, None], counts > 0

def denoising_queries(
    targets:list, # per image: labels (N,), boxes (N,4) cxcywh normalised; N may be 0
    label_embed:nn.Embedding, # table (rows, d), rows >= C
    num_classes:int, # C
    cfg:DenoisingConfig=DenoisingConfig(),
    generator:torch.Generator=None, # None: torch's global one
)->ExtraQueries|None: # name 'denoising'; None if no image has a box or cfg.num is 0
    "Noised copies of the true boxes as queries, G groups of n positive and n negative slots (paper's code; DINO section 3.3)"
    if not cfg.num or not any(len(t['labels']) for t in targets): return None
    labels, boxes, used, real = _padded(targets, num_classes, generator)
    B, n = labels.shape
    G, P = group_sizes(n, cfg.num)
    slots = (B, G, 2, n)
    def spread(x): return x[:, None, None].expand(*slots, *x.shape[2:])
    negative = torch.arange(2, device=labels.device).view(2, 1).bool().expand(slots)
    xyxy = noise_boxes(spread(boxes), negative, cfg.box_noise, generator).clamp(0, 1)
    content = label_embed(noise_labels(spread(labels), num_classes, cfg.label_noise, generator))
    free = ~spread(used)[..., None]
    logits = inverse_sigmoid(xyxy_to_cxcywh(xyxy)).masked_fill(free, 0)
    target = torch.where(negative, -1, torch.arange(n, device=labels.device)).masked_fill(free[..., 0], -2)
    target = target.masked_fill(~real.view(B, 1, 1, 1), -3)
    meta = dict(groups=G, n_max=n, target=target.reshape(B, P))
    return ExtraQueries(content.masked_fill(free, 0).reshape(B, P, -1), logits.reshape(B, P, 4),
                        group_mask(G, 2*n).to(labels.device), 'denoising', meta)
