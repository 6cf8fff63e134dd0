# %% [markdown]
# # Attention among queries {#sec-selfatt}
#
# > Let queries attend to each other, and add queries later without computing the first ones again.
#
# Queries must attend to each other, or several would predict one object. Ordinary attention does it. Two
# things are special in a detector: some queries must be hidden from others (@sec-denoising), and a few hundred
# queries are so little work that the fixed cost of a fused kernel counts.
#
# $$
# \operatorname{Attn}(X) = \operatorname{softmax}\left(\frac{(X+P)W_q\,((X+P)W_k)^\top}{\sqrt{d/M}} + B\right) X W_v W_o
# $$ {#eq-selfatt}
#
# $X$ is the content of the queries and $P$ the code of their boxes; $P$ decides which queries attend to which
# and stays out of the values. $M$ heads of width $d/M$ work in parallel. $B$ is $-\infty$ where a row may not
# attend to a column, and elsewhere 0, or a bias that says how much a pair has to do with each other.

# %%
#| default_exp detectors.self_attention

# %%
#| export
import math
import torch
import torch.nn.functional as F
from torch import nn, Tensor


# %% [markdown]
# In bfloat16 on a CPU the gradient of the fused form has a fixed cost of milliseconds; below a thousand keys
# it is faster to write the three products out.

# %%
#| export
def _attend(q, k, v, blocked, dropout, bias=None):
    "softmax(q k^T + bias) v (B,M,N,d/M); written out where that is faster: bfloat16 gradients on a CPU"
    if bias is not None:
        return _attend_biased(q, k, v, blocked, dropout, bias)
    low_on_cpu = q.device.type == 'cpu' and q.dtype == torch.bfloat16 and torch.is_grad_enabled()
    if not low_on_cpu or dropout or k.shape[2] > 1200:
        allowed = None if blocked is None else ~blocked
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout)
    bias = q.new_zeros(1, q.shape[2], k.shape[2])
    if blocked is not None:
        bias = bias.masked_fill(blocked, -math.inf)
    rows, columns = q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)
    with torch.autocast('cpu', enabled=False):
        weight = torch.baddbmm(bias, rows, columns, alpha=q.shape[-1] ** -0.5).softmax(-1)
        return (weight @ v.flatten(0, 1)).view(v.shape[:2] + (-1, v.shape[-1]))


# %% [markdown]
# A bias per pair of queries and head (@sec-suppressor) is added to the logits. The three products are written
# out here as well: a fused kernel has no gradient for a bias on a CPU.

# %%
#| export
def _attend_biased(q, k, v, blocked, dropout, bias):
    "As `_attend`, with a bias (B or 1, M or 1, N, N') of the logits"
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias.to(q.dtype)
    if blocked is not None:
        logits = logits.masked_fill(blocked, -math.inf)
    return F.dropout(logits.softmax(-1), dropout).to(v.dtype) @ v


# %% [markdown]
# Queries that come later attend to the earlier ones as `others`, which only add keys and values. Since the
# earlier ones never attend to the later ones, the result is that of one common pass with a mask, for less
# work.

# %%
#| export
class SelfAttention(nn.Module):
    "Multi-head attention among queries; weights are laid out as in `nn.MultiheadAttention`"

    def __init__(
        self,
        d_model: int,  # d
        n_heads: int,  # M, divides d
        dropout: float = 0.0,  # of the attention weights, in training
    ):
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * d_model, d_model))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * d_model))
        self.out_proj = nn.Linear(d_model, d_model)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        x: Tensor,  # (B,N,d) content: the values
        pos: Tensor,  # (B,N,d) added to it for queries and keys
        blocked: Tensor = None,  # (N,N) bool, with `others` (N,N+M); True: row may not attend to column
        others=None,  # (content, pos), each (B,M,d), of M further queries: keys and values after the N
        bias: Tensor = None,  # (B or 1, heads, N, N), with `others` (..., N+M): added to the logits
    ) -> Tensor:  # (B,N,d)
        b, n, d = x.shape
        w, c = self.in_proj_weight, self.in_proj_bias

        def heads(y):
            return y.view(b, -1, self.n_heads, d // self.n_heads).transpose(1, 2)

        if others is None:
            content = x
            both = F.linear(x + pos, w[: 2 * d], c[: 2 * d])
            q, k = both.view(b, n, 2, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        else:
            content = torch.cat([x, others[0]], 1)
            q = heads(F.linear(x + pos, w[:d], c[:d]))
            all_pos = torch.cat([pos, others[1]], 1)
            k = heads(F.linear(content + all_pos, w[d : 2 * d], c[d : 2 * d]))
        v = heads(F.linear(content, w[2 * d :], c[2 * d :]))
        out = _attend(q, k, v, blocked, self.dropout if self.training else 0.0, bias)
        return self.out_proj(out.transpose(1, 2).reshape(b, n, d))


# %%
#| hide
import matplotlib.pyplot as plt

# %%
torch.manual_seed(0)
att = SelfAttention(8, 2)
first, late = torch.randn(1, 4, 8), torch.randn(1, 2, 8)
both, zero = torch.cat([late, first], 1), torch.zeros(1, 6, 8)
hidden = torch.zeros(6, 6, dtype=torch.bool)
hidden[:, :2] = True  # no query attends to the late ones ...
hidden[:2, :2] = False  # ... except themselves
common = att(both, zero, hidden)
alone = att(late, zero[:, :2], hidden[:2], (first, zero[:, :4]))
assert torch.allclose(common[:, :2], alone, atol=1e-6)
assert torch.allclose(common[:, 2:], att(first, zero[:, :4]), atol=1e-6)
(common[:, :2] - alone).abs().max().item()

# %% [markdown]
# A bias of minus infinity blocks a pair as the mask does; one of $\ln 2$ gives it the weight of two:

# %%
as_bias = torch.zeros(1, 2, 6, 6).masked_fill(hidden, -math.inf)
assert torch.allclose(att(both, zero, bias=as_bias), common, atol=1e-6)
twin_keys = torch.cat([first, first[:, -1:]], 1)
double = torch.zeros(1, 2, 4, 4)
double[..., -1] = math.log(2)
weighed = att(first, zero[:, :4], bias=double)
assert torch.allclose(weighed, att(twin_keys, zero[:, :5])[:, :4], atol=1e-6)
weighed.shape

# %%
#| label: fig-selfatt-mask
#| fig-cap: "Rows attend to blue columns: the first four queries never attend to the two late ones, so the late ones can follow in a pass of their own."
#| fig-alt: "A six by six matrix; the first two columns are blocked for the last four rows"
fig, ax = plt.subplots(figsize=(2.6, 2.6), dpi=80)
ax.imshow(~hidden, cmap='Blues', vmin=0, vmax=1.5)
ax.set(xlabel='key', ylabel='query', xticks=range(6), yticks=range(6))
plt.show()

# %% [markdown]
# ## Summary
#
# - Queries attend to each other with content as values and content plus position as queries and keys.
# - A mask blocks pairs of queries; a blocked pair gets weight zero.
# - Queries that no earlier query attends to may come later, alone, with equal results.
#
# ## Exercises
#
# 1. Why must the position stay out of the values?
# 2. What would change if the first queries attended to the late ones?
