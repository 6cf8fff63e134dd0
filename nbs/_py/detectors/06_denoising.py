# %% [markdown]
# # Denoising queries {#sec-denoising}
#
# > Give the decoder, during training, extra queries with known targets, and separate them from the others.
#
# Early in training the matching between queries and objects is nearly random and changes from step to step:
# the target of a query is a cat in one step and background in the next. Queries that start from a *known*
# object need no matching. Take a true box, add noise to it, give the decoder the (sometimes wrong) class, and
# train it to predict the clean box: a stable target that teaches it to use the image around a box. Boxes with
# too much noise must be rejected, which teaches the decoder to keep one query per object and to suppress its
# neighbours. The extra queries contain the true boxes, so the ordinary ones must not attend to them; a mask
# prevents it. At test time there are no extra queries.

# %%
#| default_exp detectors.denoising

# %%
#| hide
import warnings

warnings.filterwarnings('ignore', message='IProgress')

# %%
#| export
from dataclasses import dataclass, field
import torch
from torch import nn, Tensor
from semidetr.boxes import cxcywh_to_xyxy, inverse_sigmoid, xyxy_to_cxcywh
from semidetr.core import ConfigError, one_of
from semidetr.many import common_stream, counts_of_all

# %%
import matplotlib.pyplot as plt
from semidetr.boxes import denormalize_boxes, normalize_boxes
from semidetr.data.digits import DigitsScenes
from semidetr.draw import draw_boxes, show_image


# %% [markdown]
# ## Extra queries of any kind
#
# Denoising is not the only reason to send more queries through the decoder; the cross-view consistency of
# Semi-DETR is another. All kinds share one class and one rule: the $Q$ matching queries attend to no extra
# query, sets of extra queries do not attend to each other, and every extra query attends to all matching
# queries. Inside a set its own mask decides. In the attention the extras come first, the matching queries
# last. A set with `sees='self'` does without the matching queries: the parallel group of @sec-group.

# %%
#| export
@dataclass
class ExtraQueries:
    "Queries that go through the decoder in front of the matching queries, and come out separately"

    content: Tensor  # (B,P,d)
    boxes: Tensor  # (B,P,4) cxcywh in logit space
    mask: Tensor  # (P,P) bool, True: row may not attend to column
    name: str  # key of `outputs['extra']`
    meta: dict = field(default_factory=dict)  # passed on to the outputs
    sees: str = 'all'  # beside itself: 'all' matching queries, or only it'self'

    def __post_init__(self):
        one_of('ExtraQueries', self, sees=('all', 'self'))


def combine_extras(
    extras,  # list of `ExtraQueries`, in the order of the decoder's input
    num_queries: int,  # Q matching queries, which come last
) -> tuple:  # (content (B,P,d), boxes (B,P,4) logits, blocked (P+Q,P+Q) bool, {name: slice}), or Nones and {}
    "One decoder input of several sets: no set attends to another, matching queries to none; see `sees`"
    if not extras:
        return None, None, None, {}
    if len({e.name for e in extras}) < len(extras):
        raise ConfigError(f'extra queries share a name: {[e.name for e in extras]}')
    content, boxes = torch.cat([e.content for e in extras], 1), torch.cat([e.boxes for e in extras], 1)
    total = content.shape[1]
    size = total + num_queries
    blocked = torch.zeros(size, size, dtype=torch.bool, device=content.device)
    blocked[:, :total] = True
    slices, start = {}, 0
    for e in extras:
        end = start + e.content.shape[1]
        slices[e.name] = slice(start, end)
        blocked[start:end, start:end] = e.mask
        if e.sees == 'self':
            blocked[start:end, total:] = True
        start = end
    return content, boxes, blocked, slices


# %% [markdown]
# Two sets of two and one queries in front of two matching queries. A row has a 1 in each column that its query
# may not attend to:

# %%
def free_set(n, name, sees='all'):
    no_mask = torch.zeros(n, n, dtype=torch.bool)
    return ExtraQueries(torch.zeros(1, n, 4), torch.zeros(1, n, 4), no_mask, name, sees=sees)


_, _, small_mask, where = combine_extras([free_set(2, 'a'), free_set(1, 'b')], num_queries=2)
assert small_mask.int().tolist() == [
    [0, 0, 1, 0, 0],
    [0, 0, 1, 0, 0],
    [1, 1, 0, 0, 0],
    [1, 1, 1, 0, 0],
    [1, 1, 1, 0, 0],
]
where, small_mask.int()

# %% [markdown]
# If the second set sees itself only, its row is blocked for the matching queries, too:

# %%
_, _, apart, _ = combine_extras([free_set(2, 'a'), free_set(1, 'b', 'self')], num_queries=2)
assert apart.int().tolist()[2] == [1, 1, 0, 1, 1] and (apart != small_mask).sum() == 2
apart.int()[2]


# %% [markdown]
# ## Groups
#
# With few boxes there is room for many noisy copies. Let $n$ be the largest number of boxes in an image of the
# batch, and $N$ the number of slots to fill (200 in the paper). A *group* holds $n$ positive and then $n$
# negative slots; there are
#
# $$
# G=\max\left(1,\left\lfloor\frac{N}{2n}\right\rfloor\right)
# $$ {#eq-denoising-groups}
#
# groups, so $P=2nG$ slots. A group must not attend to another one: it would find the same object there with
# other noise, and could average the noise away without the image.

# %%
#| export
@dataclass(frozen=True)
class DenoisingConfig:
    "Contrastive denoising (paper's code: 200, .5, .4)"

    num: int = 200  # slots N to fill, positive and negative together; 0: no denoising
    label_noise: float = 0.5  # half of this share of the labels is drawn anew
    box_noise: float = 0.4  # most noise, in half sizes; for negatives twice that (mmdetection's DINO: 1.)
    label_rows: int = 0  # rows of the label table, if that is more than classes (released checkpoints: 82)


def group_sizes(
    n_max: int,  # n, most boxes of one image in the batch
    num: int = 200,  # slots N to fill
) -> tuple:  # (groups G, slots P)
    "How often the boxes fit into the slots; at least one group (@eq-denoising-groups)"
    groups = max(1, num // (2 * n_max))
    return groups, 2 * n_max * groups


def group_mask(
    groups: int,  # G
    size: int,  # slots of a group
) -> Tensor:  # (G*size, G*size) bool, True: row may not attend to column
    "Each group attends to itself only"
    g = torch.arange(groups * size) // size
    return g[:, None] != g[None]


# %%
sizes = {n: group_sizes(n) for n in (1, 3, 7, 50, 100, 101)}
assert list(sizes.values()) == [(100, 200), (33, 198), (14, 196), (2, 200), (1, 200), (1, 202)]
sizes


# %% [markdown]
# ## Noise
#
# A label is drawn anew, uniformly over the $C$ classes, with probability $\lambda/2$ (the true one may be drawn
# again, so that a share $\frac{\lambda}{2}(1-\frac1C)$ changes). Each of the four corner coordinates of a box
# of width $w$ and height $h$ moves independently:
#
# $$
# x' = x \pm r\,\beta\,\frac{w}{2},\qquad y' = y \pm r\,\beta\,\frac{h}{2},\qquad r\sim\begin{cases}U[0,1) & \text{positive}\\ U[1,2) & \text{negative}\end{cases}
# $$ {#eq-denoising-noise}
#
# with equal probability for each sign, $\beta=0.4$. So a negative is always further from the object than a
# positive, but still close to it: it teaches how precise a box has to be.

# %%
#| export
def noise_labels(
    labels: Tensor,  # (...) int64
    num_classes: int,  # C
    share: float = 0.5,  # lambda
    generator: torch.Generator = None,  # None: torch's global one
) -> Tensor:  # same shape
    "Draw share/2 of the labels anew, uniformly: the true one may be drawn again"
    kw = dict(device=labels.device, generator=generator)
    redraw = torch.rand(labels.shape, **kw) < share / 2
    return torch.where(redraw, torch.randint(num_classes, labels.shape, **kw), labels)


def noise_boxes(
    cxcywh: Tensor,  # (...,4) normalised
    negative: Tensor,  # (...) bool: noise of a negative
    scale: float = 0.4,  # beta
    generator: torch.Generator = None,  # None: torch's global one
) -> Tensor:  # (...,4) xyxy normalised, not yet clamped
    "Move every corner coordinate (@eq-denoising-noise)"
    kw = dict(device=cxcywh.device, generator=generator)
    r = torch.rand(cxcywh.shape, dtype=cxcywh.dtype, **kw) + negative[..., None]
    sign = torch.randint(2, cxcywh.shape, **kw) * 2 - 1
    size = torch.cat([cxcywh[..., 2:], cxcywh[..., 2:]], -1)
    return cxcywh_to_xyxy(cxcywh) + sign * r * scale * size / 2


# %%
torch.manual_seed(0)
one_box = torch.tensor([0.5, 0.5, 0.4, 0.2]).expand(1000, 4)
half_sizes = torch.tensor([0.2, 0.1, 0.2, 0.1])
steps = {}
for name, is_negative in (('positive', False), ('negative', True)):
    noisy = noise_boxes(one_box, torch.full((1000,), is_negative))
    steps[name] = (noisy - cxcywh_to_xyxy(one_box)).abs() / half_sizes
assert steps['positive'].max() < 0.4 <= steps['negative'].min() and steps['negative'].max() < 0.8
{name: (round(s.min().item(), 2), round(s.max().item(), 2)) for name, s in steps.items()}

# %%
relabelled = (noise_labels(torch.zeros(20000, dtype=torch.long), num_classes=10) > 0).float().mean().item()
assert abs(relabelled - 0.25 * 0.9) < 0.02
relabelled


# %% [markdown]
# ## The queries and their targets
#
# Content is the embedding of the (noisy) label, the reference is the noisy box. Images with fewer than $n$
# boxes have unused slots with zero content and a zero logit, the box $(.5,.5,.5,.5)$. An image without any box
# gets one fake box in the middle, so that all images have the same shape; it has no weight in the loss. On
# several processes $n$ and the noise are those of all images (@sec-many), so that a query does not depend on
# the process that holds its image.
#
# `meta` gives the criterion the target of each slot: `groups` $G$, `n_max` $n$, and `target` of shape $(B,P)$:
#
# | `target` | slot | trained to |
# |---|---|---|
# | $i\ge 0$ | positive | box and label of the image's $i$-th object |
# | $-1$ | negative | background |
# | $-2$ | not used, in an image with boxes | background |
# | $-3$ | any slot of an image without boxes | nothing: weight 0 |

# %%
#| export
def _padded(targets, counts, own, num_classes, generator):
    """Labels (A,n), boxes (A,n,4) with a row for each of the A images of all processes, filled in for the own
    ones; used (B,n), real (B,) of the own ones. An image without boxes gets a fake one"""
    device, n = targets[0]['labels'].device, max(counts)
    labels = torch.zeros(len(counts), n, dtype=torch.long, device=device)
    boxes = torch.full((len(counts), n, 4), 0.5, device=device)
    for i, t in enumerate(targets, own.start):
        labels[i, : counts[i]] = t['labels']
        boxes[i, : counts[i]] = t['boxes'].float()
    for i, count in enumerate(counts):
        if count == 0:
            labels[i, 0] = torch.randint(num_classes, (), device=device, generator=generator)
    here = torch.tensor(counts[own], device=device)
    return labels, boxes, torch.arange(n, device=device) < here.clamp(min=1)[:, None], here > 0


def denoising_queries(
    targets: list,  # per image: labels (N,), boxes (N,4) cxcywh normalised; N may be 0
    label_embed: nn.Embedding,  # table (rows, d), rows >= C
    num_classes: int,  # C
    cfg: DenoisingConfig = DenoisingConfig(),  # number of slots, noise
    generator: torch.Generator = None,  # None: torch's global one
) -> ExtraQueries | None:  # name 'denoising'; None if no image has a box or cfg.num is 0
    """Noisy copies of the true boxes: G groups of n positive and n negative slots (DINO section 3.3 and code)

    Every process must call it: n and the noise are those of the images of all processes (@sec-many).
    """
    if not cfg.num:
        return None
    device = label_embed.weight.device
    counts, own = counts_of_all([len(t['labels']) for t in targets], device=device)
    if not any(counts):
        return None
    n = max(counts)
    G, P = group_sizes(n, cfg.num)

    def spread(x):
        return x[:, None, None].expand(len(x), G, 2, n, *x.shape[2:])

    with common_stream(device, generator) as stream:
        labels, boxes, used, real = _padded(targets, counts, own, num_classes, stream)
        negative = torch.tensor([[False], [True]], device=device).expand(G, 2, n)
        xyxy = noise_boxes(spread(boxes), negative.expand(len(boxes), -1, -1, -1), cfg.box_noise, stream)
        noisy = noise_labels(spread(labels), num_classes, cfg.label_noise, stream)
    if not any(counts[own]):
        return None
    B, unused, xyxy = len(targets), ~spread(used), xyxy[own].clamp(0, 1)
    content = label_embed(noisy[own]).masked_fill(unused[..., None], 0)
    logits = inverse_sigmoid(xyxy_to_cxcywh(xyxy)).masked_fill(unused[..., None], 0)
    target = torch.where(negative, -1, torch.arange(n, device=device)).masked_fill(unused, -2)
    target = target.masked_fill(~real.view(B, 1, 1, 1), -3)
    meta = dict(groups=G, n_max=n, target=target.reshape(B, P))
    mask = group_mask(G, 2 * n).to(device)
    return ExtraQueries(content.reshape(B, P, -1), logits.reshape(B, P, 4), mask, 'denoising', meta)


# %% [markdown]
# Three images with two, one and no boxes; two groups of four slots each:

# %%
torch.manual_seed(0)
two_boxes = torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.7, 0.6, 0.3, 0.4]])
some = [dict(labels=torch.arange(k), boxes=two_boxes[:k]) for k in (2, 1, 0)]
queries = denoising_queries(some, nn.Embedding(10, 4), num_classes=10, cfg=DenoisingConfig(num=8))
assert queries.meta['target'].tolist() == [[0, 1, -1, -1] * 2, [0, -2, -1, -2] * 2, [-3] * 8]
queries.meta

# %% [markdown]
# A batch without any box has nothing to denoise:

# %%
assert denoising_queries(some[2:], nn.Embedding(10, 4), 10) is None

# %% [markdown]
# ::: {.callout-note}
# ## Paper vs. code
# DINO's paper leaves two details open that the code decides. Unused slots are *not* hidden from their own
# group, and their classes *are* trained as background. The noise of boxes is $\beta=0.4$ in the released DINO
# (4 scales) and the Semi-DETR code, 1.0 in mmdetection's DINO (`box_noise`).
# :::

# %%
#| label: fig-denoising-mask
#| fig-cap: "Allowed attention (white) with two denoising groups and twelve matching queries: a group attends to itself and the matching queries, the matching queries only to each other."
#| fig-alt: "Square matrix; white blocks on the diagonal for two groups, white columns on the right for the matching queries, the rest dark"
_, _, mask, _ = combine_extras([queries], num_queries=12)
fig, ax = plt.subplots(figsize=(3, 3), dpi=80)
ax.imshow(mask, cmap='gray_r', vmin=0, vmax=1.3)
names = ['G1', 'G2', 'matching']
ax.set(xlabel='key', ylabel='query')
ax.set_xticks([1.5, 5.5, 13.5], names)
ax.set_yticks([1.5, 5.5, 13.5], names, rotation=90, va='center')
for at in (3.5, 7.5):
    ax.axhline(at, color='grey', lw=0.5)
    ax.axvline(at, color='grey', lw=0.5)
plt.show()

# %%
#| label: fig-denoising-boxes
#| fig-cap: "Noisy copies of the objects: positives stay near the truth and must be corrected to it, negatives lie further off and must be rejected."
#| fig-alt: "A scene of digits twice; green true boxes, on the left with blue noisy ones close to them, on the right with blue ones further away"
scene = DigitsScenes('train', n=8)[3]
truth = [dict(labels=scene.labels, boxes=normalize_boxes(scene.boxes, scene.size))]
three_groups = DenoisingConfig(num=6 * len(scene.labels))
shaken = denoising_queries(truth, nn.Embedding(10, 4), 10, three_groups)
slots = shaken.meta['target'][0]
fig, axes = plt.subplots(1, 2, figsize=(5.4, 2.8), dpi=80, layout='constrained')
for ax, name, chosen in zip(axes, ('positive', 'negative'), (slots >= 0, slots == -1)):
    show_image(ax, scene.image, title=name)
    draw_boxes(ax, denormalize_boxes(shaken.boxes[0, chosen].sigmoid(), scene.size), kind='student', lw=0.8)
    draw_boxes(ax, scene.boxes, kind='truth')
plt.show()

# %% [markdown]
# ## Summary
#
# - Extra queries attend to their own group and, but for `sees='self'`, to the matching queries; only their
#   group attends to them.
# - As many groups as fit into the slots; each has a positive and a negative copy of every box.
# - Targets of positives are the clean box and label, of negatives and unused slots background.
# - Images without boxes get a fake box of weight zero; a batch without boxes has no denoising at all.
# - Random numbers come from a generator or from torch's global state, which is part of a checkpoint.
#
# ## Exercises
#
# 1. What could a group learn from another one if it attended to it?
# 2. With $\beta=1$, can a positive still contain the centre of its object?
# 3. Which share of labels is wrong with $C=2$?
