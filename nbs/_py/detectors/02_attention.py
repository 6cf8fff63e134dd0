# %% [markdown]
# # Multi-scale deformable attention {#sec-attention}
#
# > Let every query sample the image at a few locations of its own choice, on all feature levels.
#
# Plain attention compares every query with every cell. An image of 800 x 1333 pixels has about 22,000 cells
# over four levels: 22,000 queries against 22,000 cells in each encoder layer is far too much, and an
# untrained softmax over so many cells is nearly flat, so that the first detection transformers needed 500
# epochs. *Deformable attention* (Deformable DETR, Zhu et al. 2021) drops the comparison. A query predicts, with
# a linear layer each, *where* to sample (a few offsets from its reference point) and *how much* each sample
# counts. The cost per query no longer depends on the size of the map.

# %%
#| default_exp detectors.attention

# %%
#| export
import math
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from semidetr.core import ConfigError, at_least_float32
from semidetr.detectors.native import native_available, native_fused_ms_deform_attn, native_ms_deform_attn

# %%
import itertools
import numpy as np
import matplotlib.pyplot as plt
from skimage import data
from semidetr.draw import show_image, draw_boxes, COLORS


# %% [markdown]
# ## The equation
#
# A query $q$ has content $z_q$ and one reference $p_q^{(l)}$ per level. Head $m$ of $M$, level $l$ of $L$ and
# point $k$ of $K$ give one sample:
#
# $$
# \mathrm{MSDA}(z_q) = b + \sum_{m=1}^{M} W_m \sum_{l=1}^{L}\sum_{k=1}^{K} A_{mlqk}\; x^{l}_m(\phi_{mlqk}), \qquad \sum_{l,k} A_{mlqk} = 1
# $$ {#eq-attention-msda}
#
# * $x^l_m$: the *values*, one linear layer of the level's features, cut into $M$ heads of $D=d/M$ channels;
# * $\phi_{mlqk}$: a location in the map; $x(\phi)$ is read by bilinear interpolation, zero outside;
# * $A_{mlqk}$: weights from a linear layer of $z_q$ and **one** softmax over the $L \cdot K$ samples of a
#   head;
# * $W_m, b$: the output projection. The code calls $K$ `n_points` and, in shapes, $P$; $Q$ is the number of
#   queries, $S=\sum_l h_l w_l$ the number of cells.
#
# ## Where a query samples
#
# Locations are pairs $(x,y)$ from 0 to 1 over the whole padded map. The network predicts offsets
# $\Delta_{mlqk}$; their unit depends on the reference:
#
# $$
# \phi = p_q^{(l)} + \Delta \,/\, (w_l, h_l) \qquad\text{or}\qquad \phi = (c_x, c_y) + \frac{\Delta}{K} \cdot \frac{(w, h)}{2}
# $$ {#eq-attention-where}
#
# Around a *point* (encoder) an offset of 1 is one cell of that level. Around a *box* $(c_x,c_y,w,h)$
# (decoder) the offset scales with the box: $\Delta = K$ lies on the box's edge, so that one layer serves
# small and large objects alike.

# %%
#| export
def sampling_locations(
    reference_points: Tensor,  # (B,Q,L,2) points, or (B,Q,L,4) cxcywh boxes, in [0,1] of the padded map
    offsets: Tensor,  # (B,Q,M,L,P,2) predicted by the query, (x,y)
    spatial_shapes: list,  # L pairs (h, w)
) -> Tensor:  # (B,Q,M,L,P,2) normalised (x,y), at least float32
    "Where each sample falls: around a point in cells of the level, around a box in units of its half size"
    ref = at_least_float32(reference_points)[:, :, None, :, None]
    offsets = offsets.to(ref.dtype)
    if ref.shape[-1] == 2:
        cells = ref.new_tensor([(w, h) for h, w in spatial_shapes])
        return ref + offsets / cells[:, None]
    if ref.shape[-1] == 4:
        return ref[..., :2] + offsets / offsets.shape[-2] * ref[..., 2:] * 0.5
    raise ValueError(f'reference_points must end in 2 or 4 numbers, got {tuple(reference_points.shape)}')


# %% [markdown]
# An offset of $(1, 0)$ on maps of 8 x 8 and 4 x 4 cells: from a point it moves 1/8 and 1/4 of the map. From a
# box of width .4 and with $K=1$ it moves to the right edge, .2 away, on both.

# %%
shapes = [(8, 8), (4, 4)]
right = torch.tensor([1.0, 0.0]).expand(1, 1, 1, 2, 1, 2)
point = torch.tensor([0.5, 0.5]).expand(1, 1, 2, 2)
box = torch.tensor([0.5, 0.5, 0.4, 0.1]).expand(1, 1, 2, 4)
x_point, x_box = (sampling_locations(r, right, shapes)[0, 0, 0, :, 0, 0] for r in (point, box))
assert torch.allclose(x_point, torch.tensor([0.625, 0.75]))
assert torch.allclose(x_box, torch.tensor([0.7, 0.7]))
x_point, x_box


# %% [markdown]
# ## Reading between cells
#
# Cell $i$ of a row of $w$ cells has its centre at $(i+\frac12)/w$. A location between four centres gets their
# mean, weighted by nearness. A centre outside the map counts as **zero**, it is not clamped: a query that
# samples across the edge reads less, and can learn that. This is `grid_sample` with `align_corners=False` and
# zero padding; its coordinates run from -1 to 1, hence the $2\phi-1$.
#
# All sampling is done in float32 (or float64), whatever the type of the values: in bfloat16 a location on a
# map of 167 cells would be wrong by up to half a cell.

# %%
#| export
def _level_sizes(value, spatial_shapes, loc):
    "Cells of each level, after a check that they add up"
    sizes = [h * w for h, w in spatial_shapes]
    if sum(sizes) != value.shape[1] or len(sizes) != loc.shape[3]:
        raise ValueError(
            f'levels {list(spatial_shapes)} have {sum(sizes)} cells; '
            f'value has {value.shape[1]}, sampling_locations {loc.shape[3]} levels'
        )
    return sizes


def _split_levels(value, spatial_shapes, loc):
    return value.split(_level_sizes(value, spatial_shapes, loc), 1)


def ms_deform_attn_grid(
    value: Tensor,  # (B,S,M,D) projected values, levels one after another, S = sum of h*w
    spatial_shapes: list,  # L pairs (h, w) of python ints
    sampling_locations: Tensor,  # (B,Q,M,L,P,2) (x,y) in [0,1] of the map; outside reads zero
    attention_weights: Tensor,  # (B,Q,M,L,P) sums to 1 over (L,P)
) -> Tensor:  # (B,Q,M*D)
    "The sum over levels and points, one `grid_sample` per level, computed in float32 or better"
    (B, _, M, D), Q = value.shape, sampling_locations.shape[1]
    dt = torch.promote_types(value.dtype, torch.float32)
    grid, weight = 2 * sampling_locations.to(dt) - 1, attention_weights.to(dt)
    out = value.new_zeros(B * M, D, Q, dtype=dt)
    for l, (v, (h, w)) in enumerate(zip(_split_levels(value, spatial_shapes, grid), spatial_shapes)):
        v = v.to(dt).permute(0, 2, 3, 1).reshape(B * M, D, h, w)
        g = grid[:, :, :, l].transpose(1, 2).flatten(0, 1)  # (B*M, Q, P, 2)
        a = weight[:, :, :, l].transpose(1, 2).flatten(0, 1)  # (B*M, Q, P)
        samples = F.grid_sample(v, g, mode='bilinear', padding_mode='zeros', align_corners=False)
        out = out + (samples * a[:, None]).sum(-1)
    return out.view(B, M * D, Q).transpose(1, 2).to(value.dtype)


# %% [markdown]
# A map of 3 x 4 cells holds the numbers 0 to 11. One query, one head, one point, weight 1: the output is the
# map's value at that point.

# %%
ramp = torch.arange(12.0).view(1, 12, 1, 1)


def read(x, y, form=ms_deform_attn_grid):
    "Value at (x, y), given in cells of the 3 x 4 map"
    where = torch.tensor([x / 4, y / 3]).view(1, 1, 1, 1, 1, 2)
    return round(form(ramp, [(3, 4)], where, torch.ones(1, 1, 1, 1, 1)).item(), 4)


assert read(2.5, 1.5) == 6  # the centre of row 1, column 2
assert read(2.0, 1.5) == 5.5  # half way between columns 1 and 2
assert read(0.0, 1.5) == 2  # the left edge: half of cell value 4, half of nothing
ramp.view(3, 4), [read(x, 1.5) for x in (2.5, 2.0, 0.0, -1.0)]

# %%
#| label: fig-attention-bilinear
#| fig-cap: "Between two cell centres the value is a straight line; beyond the last centre it falls to zero within one cell, because the missing neighbour counts as zero."
#| fig-alt: "Line plot of the value along the middle row: zero left of minus one half, rising to 4 at one half, then linearly to 7, falling to zero at four and a half. Dots mark the four cells."
xs = np.linspace(-1, 5, 121)
fig, ax = plt.subplots(figsize=(5, 2.4), dpi=80)
ax.plot(xs, [read(float(x), 1.5) for x in xs], color=COLORS['student'])
ax.plot([0.5, 1.5, 2.5, 3.5], [4, 5, 6, 7], 'o', color=COLORS['truth'], label='cells of the middle row')
ax.axvspan(0, 4, color='0.93', label='inside the map')
ax.set_xlabel('x in cells')
ax.set_ylabel('value read')
ax.legend(fontsize=9, loc='upper left')
fig.tight_layout()
plt.show()


# %% [markdown]
# ## The same sum, written out
#
# `grid_sample` hides the four neighbours. The second form names them: cell, weight, and whether the cell
# exists. It is slower on a CPU and needs more memory, but it has two uses. It is an independent check of the
# first. And on a GPU the backward pass of `grid_sample` adds in an order that differs from run to run, so
# that PyTorch refuses it in deterministic mode; `index_select` is allowed there. The weights are
# differentiable in the location, the corner itself (`floor`) is not: hence the `detach`.

# %%
#| export
def ms_deform_attn_gather(
    value: Tensor,  # (B,S,M,D)
    spatial_shapes: list,  # L pairs (h, w)
    sampling_locations: Tensor,  # (B,Q,M,L,P,2)
    attention_weights: Tensor,  # (B,Q,M,L,P)
) -> Tensor:  # (B,Q,M*D)
    "The same sum as four neighbours with four weights; allowed under `torch.use_deterministic_algorithms`"
    (B, S, M, D), dt = value.shape, torch.promote_types(value.dtype, torch.float32)
    loc, weight = sampling_locations.to(dt), attention_weights.to(dt)
    rows = value.to(dt).transpose(1, 2).reshape(B * M * S, D)  # one row for each (image, head, cell)
    first = torch.arange(B * M, device=value.device).view(B, 1, M, 1) * S
    out = rows.new_zeros(*loc.shape[:3], D)
    for l, (v, (h, w)) in enumerate(zip(_split_levels(value, spatial_shapes, loc), spatial_shapes)):
        x, y = (loc[:, :, :, l] * loc.new_tensor([w, h]) - 0.5).unbind(-1)  # (B,Q,M,P) in cells
        x0, y0 = x.detach().floor(), y.detach().floor()
        for cx, cy in ((x0, y0), (x0 + 1, y0), (x0, y0 + 1), (x0 + 1, y0 + 1)):
            inside = (cx >= 0) & (cx < w) & (cy >= 0) & (cy < h)
            cell = cx.long().clamp(0, w - 1) + cy.long().clamp(0, h - 1) * w
            near = (1 - (x - cx).abs()) * (1 - (y - cy).abs()) * weight[:, :, :, l]
            taken = rows.index_select(0, (first + cell).flatten()).view(*cell.shape, D)
            out = out + (taken * near.where(inside, 0.0)[..., None]).sum(-2)
        first = first + h * w
    return out.flatten(2).to(value.dtype)


# %% [markdown]
# Both forms on random numbers, with two levels and some locations outside, and their gradients:

# %%
torch.manual_seed(0)
sizes = [(4, 5), (2, 3)]
value = torch.randn(2, 26, 2, 4, dtype=torch.float64)
where = torch.rand(2, 3, 2, 2, 3, 2, dtype=torch.float64) * 1.4 - 0.2
weights = torch.rand(2, 3, 2, 6, dtype=torch.float64).softmax(-1).view(2, 3, 2, 2, 3)


def results(form):
    "Output and the gradients of its sum of squares"
    leaves = [t.clone().requires_grad_() for t in (value, where, weights)]
    out = form(leaves[0], sizes, *leaves[1:])
    return out, *torch.autograd.grad(out.square().sum(), leaves)


pairs = zip(results(ms_deform_attn_grid), results(ms_deform_attn_gather))
gaps = [(a - b).abs().max().item() for a, b in pairs]
assert max(gaps) < 1e-12
dict(zip(('output', 'value', 'locations', 'weights'), gaps))


# %% [markdown]
# ## Choosing a form
#
# The rest of the package calls one function. It takes the native operator of @sec-native where that can be
# loaded or built, the gather form on a GPU in deterministic mode, and `grid_sample` otherwise. All forms have
# the same arguments and, up to rounding, the same result.

# %%
#| export
def ms_deform_attn(
    value: Tensor,  # (B,S,M,D) projected values, levels one after another
    spatial_shapes: list,  # L pairs (h, w) of python ints
    sampling_locations: Tensor,  # (B,Q,M,L,P,2) (x,y) in [0,1]
    attention_weights: Tensor,  # (B,Q,M,L,P)
) -> Tensor:  # (B,Q,M*D)
    "Deformable attention in the form that suits the device and the settings; all forms agree"
    _level_sizes(value, spatial_shapes, sampling_locations)
    levels, points = sampling_locations.shape[3:5]
    if _deterministic(value):
        form = ms_deform_attn_gather
    elif native_available(value.dtype, value.device, levels * points, levels):
        form = native_ms_deform_attn
    else:
        form = ms_deform_attn_grid
    return form(value, spatial_shapes, sampling_locations, attention_weights)


def _deterministic(value):
    return value.is_cuda and torch.are_deterministic_algorithms_enabled()


# %% [markdown]
# Empty is normal: no queries give an empty answer that still has a gradient (zero) for the values.

# %%
vals = torch.randn(1, 26, 2, 4, requires_grad=True)
none = ms_deform_attn(vals, sizes, torch.zeros(1, 0, 2, 2, 3, 2), torch.zeros(1, 0, 2, 2, 3))
none.sum().backward()
assert none.shape == (1, 0, 8) and (vals.grad == 0).all()
none.shape


# %% [markdown]
# ## Where an untrained query samples
#
# Offsets start independent of the query: their weight is zero and the bias holds a star. Head $m$ gets the
# direction $2\pi m/M$, point $k$ (from 0) lies $k+1$ steps out. Directions are divided by their larger
# component, so that diagonal heads land on cell centres: (1,1), (2,2), ... All attention weights start equal.
# So at first the layer is a fixed, sparse blur in eight directions, which training then adapts.

# %%
#| export
def star_offsets(
    n_heads: int,  # M
    n_levels: int,  # L
    n_points: int,  # P
) -> Tensor:  # (M,L,P,2) the offsets of an untrained query, (x,y)
    "Head m samples in direction 2 pi m/M, point k is k+1 steps away on the edge of a square"
    angle = torch.arange(n_heads, dtype=torch.float32) * (2 * math.pi / n_heads)
    direction = torch.stack((angle.cos(), angle.sin()), -1)
    direction = direction / direction.abs().max(-1, keepdim=True).values
    steps = torch.arange(1.0, n_points + 1).view(1, 1, n_points, 1).expand(1, n_levels, -1, -1)
    return direction.view(n_heads, 1, 1, 2) * steps


# %%
star = star_offsets(8, 4, 4)
assert torch.allclose(star[1, 0], torch.tensor([[1.0, 1], [2, 2], [3, 3], [4, 4]]))
assert torch.allclose(star[2, 0], torch.tensor([[0.0, 1], [0, 2], [0, 3], [0, 4]]), atol=1e-6)
star[:3, 0].round(decimals=3)


# %% [markdown]
# ## The module
#
# > **Paper vs. code.** Padded cells are zeroed *after* the value projection, so that its bias vanishes there
# > too: the content of the padding has no influence at all. The paper does not mention padding. No switch.
#
# `padding_mask` is True where there is padding. `reset_parameters` is public because the transformer
# initialises all its matrices at once (Xavier) and then resets each attention layer.

# %%
#| export
class MSDeformAttn(nn.Module):
    "Multi-scale deformable attention (Deformable DETR, Eq. 3) with its own initialisation"

    def __init__(
        self,
        d_model: int = 256,  # width of queries and values
        n_levels: int = 4,  # L maps of the pyramid
        n_heads: int = 8,  # M, divides d_model
        n_points: int = 4,  # P samples per head on each level
    ):
        super().__init__()
        if d_model % n_heads:
            raise ConfigError(f'd_model={d_model} must be a multiple of n_heads={n_heads}')
        self.d_model, self.n_levels, self.n_heads, self.n_points = d_model, n_levels, n_heads, n_points
        samples = n_heads * n_levels * n_points
        self.sampling_offsets = nn.Linear(d_model, 2 * samples)
        self.attention_weights = nn.Linear(d_model, samples)
        self.value_proj, self.output_proj = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        "Offsets: the star, for every query. Weights: uniform. Projections: Xavier"
        for p in self.parameters():
            p.zero_()
        self.sampling_offsets.bias.copy_(star_offsets(self.n_heads, self.n_levels, self.n_points).flatten())
        for lin in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(lin.weight)

    def forward(
        self,
        query: Tensor,  # (B,Q,d) content plus position
        reference_points: Tensor,  # (B,Q,L,2) or (B,Q,L,4), valid ratio already applied
        value: Tensor,  # (B,S,d) tokens of all levels
        spatial_shapes: list,  # L pairs (h, w)
        padding_mask: Tensor | None = None,  # (B,S) True = padding, reads as zero
    ) -> Tensor:  # (B,Q,d)
        B, Q, heads = *query.shape[:2], (self.n_heads, self.n_levels, self.n_points)
        v = self.value_proj(value).view(*value.shape[:2], self.n_heads, -1)
        offsets = self.sampling_offsets(query).view(B, Q, *heads, 2)
        logits = self.attention_weights(query).view(B, Q, self.n_heads, self.n_levels * self.n_points)
        if not _deterministic(v) and native_available(v.dtype, v.device, logits.shape[-1], self.n_levels):
            out = native_fused_ms_deform_attn(
                v, spatial_shapes, reference_points, offsets, logits, padding_mask
            )
            return self.output_proj(out)
        if padding_mask is not None:
            v = v.masked_fill(padding_mask[..., None, None], 0.0)
        locations = sampling_locations(reference_points, offsets, spatial_shapes)
        weights = logits.softmax(-1).view(B, Q, *heads)
        return self.output_proj(ms_deform_attn(v, spatial_shapes, locations, weights))


# %% [markdown]
# Padding is invisible: with huge numbers in it the output is the same.

# %%
torch.manual_seed(0)
attention = MSDeformAttn(d_model=32, n_levels=2, n_heads=4, n_points=3)
query, memory, reference = torch.randn(1, 5, 32), torch.randn(1, 26, 32), torch.rand(1, 5, 2, 2)
padding = torch.zeros(1, 26, dtype=torch.bool)
padding[:, 15:20] = True  # the last row of the first level
clean = attention(query, reference, memory, sizes, padding)
dirty = attention(query, reference, memory.masked_fill(padding[..., None], 1e6), sizes, padding)
assert torch.equal(clean, dirty)
clean.shape

# %% [markdown]
# ## On a photograph
#
# Two queries on a photograph with maps of stride 8, 16, 32 and 64, as in the detector. Left, an encoder query
# around a point: the star is measured in cells, so every coarser level reaches twice as far. Right, a decoder
# query around a box: the star fills the box and all levels share it.

# %%
cat = data.chelsea()  # 300 x 451 pixels
pyramid = [(-(-300 // s), -(-451 // s)) for s in (8, 16, 32, 64)]
offsets = star_offsets(8, 4, 4)[None, None]
centre, face = torch.tensor([0.5, 0.42]), torch.tensor([0.5, 0.38, 0.44, 0.62])
star_point = sampling_locations(centre.expand(1, 1, 4, 2), offsets, pyramid)[0, 0]
star_box = sampling_locations(face.expand(1, 1, 4, 4), offsets, pyramid)[0, 0]
assert star_point.shape == star_box.shape == (8, 4, 4, 2)
reach = (star_point - centre).abs().amax((0, 2))  # (level, xy)
reach * torch.tensor([451, 300])  # pixels that the star spans to each side, level by level

# %%
#| label: fig-attention-star
#| fig-cap: "An untrained query samples along eight directions, one per head (colours). Around a point the reach doubles with every level (marker size); around a box it is the box, on every level."
#| fig-alt: "A cat's face twice. Left: coloured rays of dots spread from a point, small dots close by, large dots far out. Right: rays end at the edge of a green box around the face."
fig, axes = plt.subplots(1, 2, figsize=(6, 2.4), dpi=80, layout='constrained')
for ax, places, name in zip(axes, (star_point, star_box), ('around a point', 'around a box')):
    show_image(ax, cat, title=name)
    for m, l in itertools.product(range(8), range(4)):
        x, y = (places[m, l] * torch.tensor([451.0, 300.0])).T.numpy()
        ax.scatter(x, y, s=4 + 5 * l, color=plt.cm.hsv(m / 8), edgecolors='white', linewidths=0.3)
    ax.set_xlim(0, 451)
    ax.set_ylim(300, 0)
draw_boxes(axes[1], torch.tensor([[0.28 * 451, 0.07 * 300, 0.72 * 451, 0.69 * 300]]), kind='truth')
plt.show()

# %% [markdown]
# ## Learning where to sample
#
# A 16 x 16 map has one bright spot. A single query in the middle, with eight heads, is trained to maximise the
# value that it reads: the weights stay equal, so only moving the samples off the star's rays helps.
# Interpolation gives a gradient towards the spot only from within one cell, so the spot is blurred a little,
# as feature maps are.

# %%
torch.manual_seed(0)
ij = torch.stack(torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing='ij'), -1)
spot = torch.exp(-((ij - torch.tensor([4.0, 12.0])) ** 2).sum(-1) / 18)  # row 4, column 12
spot_values = spot.view(1, 256, 1, 1).expand(-1, -1, 8, -1)
learned_offsets = star_offsets(8, 1, 4)[None, None].clone().requires_grad_()
equal_weights = torch.full((1, 1, 8, 1, 4), 1 / 4)
optimiser = torch.optim.Adam([learned_offsets], lr=0.2)
history = []
for step in range(60):
    places = sampling_locations(torch.full((1, 1, 1, 2), 0.5), learned_offsets, [(16, 16)])
    brightness = ms_deform_attn(spot_values, [(16, 16)], places, equal_weights).mean()
    optimiser.zero_grad()
    (-brightness).backward()
    optimiser.step()
    history.append(brightness.item())
assert history[-1] > 0.95 > 0.3 > history[0]
[round(h, 3) for h in history[::12]]

# %% [markdown]
# ## Summary
#
# * A query predicts locations and weights from its content; there are no keys.
# * Offsets count cells around a point, and half sizes around a box.
# * Reading is bilinear, centres at $(i+\frac12)/w$, zero outside; padding is zero after the projection.
# * Two plain forms agree to rounding with each other, with their numeric gradients and with a slow loop (in
#   `tests/`); sampling is float32 at least.
# * An untrained layer samples along a star, one ray per head, with equal weights.
#
# ## Exercises
#
# 1. Replace `padding_mode='zeros'` by `'border'`. Which of the asserts above fails, and what can a query at
#    the image edge no longer learn?
# 2. Read the ramp with `align_corners=True`. Where does $(2.5/4, 1.5/3)$ land?
# 3. Count the numbers that a decoder layer with 900 queries reads ($M=8, L=4, K=4, D=32$), and compare with
#    plain attention over 22,000 cells.
# 4. In the last example make the spot smaller (18 to 2). Why do some heads stay where they are, and why does a
#    coarse level help?
