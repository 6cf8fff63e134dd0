# %% [markdown]
# # Multi-scale deformable attention {#sec-attention}
#
# > Let every query read the image at a handful of places that it chooses itself, over all levels of a feature pyramid.

# %%
#| default_exp attention

# %%
#| export
import math
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from semidetr.core import ConfigError


# %%
#| export
def sampling_locations(
    reference_points:Tensor, # (B,Q,L,2) points, or (B,Q,L,4) cxcywh boxes, in [0,1] of the padded map
    offsets:Tensor, # (B,Q,M,L,P,2) what the query asks for, (x,y)
    spatial_shapes:list, # L pairs (h, w)
)->Tensor: # (B,Q,M,L,P,2) normalised (x,y), at least float32
    "Where each sample falls: around a point in cells of the level, around a box in units of its half size"
    ref = reference_points.to(torch.promote_types(reference_points.dtype, torch.float32))[:, :, None, :, None]
    offsets = offsets.to(ref.dtype)
    if ref.shape[-1] == 2: return ref + offsets/ref.new_tensor([(w, h) for h, w in spatial_shapes])[:, None]
    if ref.shape[-1] == 4: return ref[..., :2] + offsets/offsets.shape[-2]*ref[..., 2:]*.5
    raise ValueError(f'reference_points must end in 2 or 4 numbers, got {tuple(reference_points.shape)}')


# %%
#| export
def _split_levels(value, spatial_shapes, loc):
    "Values of each level, after a check that the level sizes add up"
    sizes = [h*w for h, w in spatial_shapes]
    if sum(sizes) != value.shape[1] or len(sizes) != loc.shape[3]:
        raise ValueError(f'levels {list(spatial_shapes)} have {sum(sizes)} cells; value has {value.shape[1]}, sampling_locations {loc.shape[3]} levels')
    return value.split(sizes, 1)

def ms_deform_attn_grid(
    value:Tensor, # (B,S,M,D) projected values, levels one after another, S = sum of h*w
    spatial_shapes:list, # L pairs (h, w) of python ints
    sampling_locations:Tensor, # (B,Q,M,L,P,2) (x,y) in [0,1] of the map; outside reads zero
    attention_weights:Tensor, # (B,Q,M,L,P) sums to 1 over (L,P)
)->Tensor: # (B,Q,M*D)
    "The sum over levels and points, one `grid_sample` per level, computed in float32 or better"
    (B, _, M, D), Q, dt = value.shape, sampling_locations.shape[1], torch.promote_types(value.dtype, torch.float32)
    grid, weight = 2*sampling_locations.to(dt) - 1, attention_weights.to(dt)
    out = value.new_zeros(B*M, D, Q, dtype=dt)
    for l, (v, (h, w)) in enumerate(zip(_split_levels(value, spatial_shapes, grid), spatial_shapes)):
        v = v.to(dt).permute(0, 2, 3, 1).reshape(B*M, D, h, w)
        g = grid[:, :, :, l].transpose(1, 2).flatten(0, 1)  # (B*M, Q, P, 2)
        a = weight[:, :, :, l].transpose(1, 2).flatten(0, 1)  # (B*M, Q, P)
        out = out + (F.grid_sample(v, g, mode='bilinear', padding_mode='zeros', align_corners=False)*a[:, None]).sum(-1)
    return out.view(B, M*D, Q).transpose(1, 2).to(value.dtype)


# %%
#| export
def ms_deform_attn_gather(
    value:Tensor, # (B,S,M,D)
    spatial_shapes:list, # L pairs (h, w)
    sampling_locations:Tensor, # (B,Q,M,L,P,2)
    attention_weights:Tensor, # (B,Q,M,L,P)
)->Tensor: # (B,Q,M*D)
    "The same sum written out: four neighbours, four weights. Runs under `torch.use_deterministic_algorithms(True)` on any device"
    (B, S, M, D), dt = value.shape, torch.promote_types(value.dtype, torch.float32)
    loc, weight = sampling_locations.to(dt), attention_weights.to(dt)
    rows = value.to(dt).transpose(1, 2).reshape(B*M*S, D)  # one row for each (image, head, cell)
    first = torch.arange(B*M, device=value.device).view(B, 1, M, 1)*S
    out = rows.new_zeros(*loc.shape[:3], D)
    for l, (v, (h, w)) in enumerate(zip(_split_levels(value, spatial_shapes, loc), spatial_shapes)):
        x, y = (loc[:, :, :, l]*loc.new_tensor([w, h]) - .5).unbind(-1)  # (B,Q,M,P) in cells
        x0, y0 = x.detach().floor(), y.detach().floor()
        for cx, cy in ((x0, y0), (x0+1, y0), (x0, y0+1), (x0+1, y0+1)):
            inside = (cx >= 0) & (cx < w) & (cy >= 0) & (cy < h)
            cell = cx.long().clamp(0, w-1) + cy.long().clamp(0, h-1)*w
            near = (1 - (x-cx).abs())*(1 - (y-cy).abs())*weight[:, :, :, l]
            taken = rows.index_select(0, (first + cell).flatten()).view(*cell.shape, D)
            out = out + (taken*near.where(inside, 0.)[..., None]).sum(-2)
        first = first + h*w
    return out.flatten(2).to(value.dtype)


# %%
#| export
def ms_deform_attn(
    value:Tensor, # (B,S,M,D) projected values, levels one after another
    spatial_shapes:list, # L pairs (h, w) of python ints
    sampling_locations:Tensor, # (B,Q,M,L,P,2) (x,y) in [0,1]
    attention_weights:Tensor, # (B,Q,M,L,P)
)->Tensor: # (B,Q,M*D)
    "The one door to the operation: whichever form suits the device and the settings. All forms agree"
    form = ms_deform_attn_gather if value.is_cuda and torch.are_deterministic_algorithms_enabled() else ms_deform_attn_grid
    return form(value, spatial_shapes, sampling_locations, attention_weights)


# %%
#| export
def star_offsets(
    n_heads:int, # M
    n_levels:int, # L
    n_points:int, # P
)->Tensor: # (M,L,P,2) the offsets of an untrained query, (x,y)
    "Head m looks in direction 2 pi m/M, point k is k+1 steps away on the edge of a square"
    angle = torch.arange(n_heads, dtype=torch.float32)*(2*math.pi/n_heads)
    way = torch.stack((angle.cos(), angle.sin()), -1)
    way = way/way.abs().max(-1, keepdim=True).values
    return way.view(n_heads, 1, 1, 2)*torch.arange(1., n_points+1).view(1, 1, n_points, 1).expand(1, n_levels, -1, -1)


# %%
#| export
class MSDeformAttn(nn.Module):
    "Multi-scale deformable attention (Deformable DETR, Eq. 3) with its own initialisation"
    def __init__(self,
        d_model:int=256, # width of queries and values
        n_levels:int=4, # L maps of the pyramid
        n_heads:int=8, # M, divides d_model
        n_points:int=4, # P samples a head takes on each level
    ):
        super().__init__()
        if d_model % n_heads: raise ConfigError(f'd_model={d_model} must be a multiple of n_heads={n_heads}')
        self.d_model, self.n_levels, self.n_heads, self.n_points = d_model, n_levels, n_heads, n_points
        samples = n_heads*n_levels*n_points
        self.sampling_offsets, self.attention_weights = nn.Linear(d_model, 2*samples), nn.Linear(d_model, samples)
        self.value_proj, self.output_proj = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        "Offsets: the star, whatever the query says. Weights: uniform. Projections: Xavier. Call again after any outer initialisation"
        for p in self.parameters(): p.zero_()
        self.sampling_offsets.bias.copy_(star_offsets(self.n_heads, self.n_levels, self.n_points).flatten())
        for lin in (self.value_proj, self.output_proj): nn.init.xavier_uniform_(lin.weight)

    def forward(self,
        query:Tensor, # (B,Q,d) content plus position
        reference_points:Tensor, # (B,Q,L,2) or (B,Q,L,4), valid ratio already applied
        value:Tensor, # (B,S,d) tokens of all levels
        spatial_shapes:list, # L pairs (h, w)
        padding_mask:Tensor|None=None, # (B,S) True = padding, reads as zero
    )->Tensor: # (B,Q,d)
        B, Q, heads = *query.shape[:2], (self.n_heads, self.n_levels, self.n_points)
        v = self.value_proj(value)
        if padding_mask is not None: v = v.masked_fill(padding_mask[..., None], 0.)
        offsets = self.sampling_offsets(query).view(B, Q, *heads, 2)
        weights = self.attention_weights(query).view(B, Q, self.n_heads, heads[1]*heads[2]).softmax(-1).view(B, Q, *heads)
        where = sampling_locations(reference_points, offsets, spatial_shapes)
        return self.output_proj(ms_deform_attn(v.view(*v.shape[:2], self.n_heads, -1), spatial_shapes, where, weights))
