# %% [markdown]
# # A parallel group {#sec-group}
#
# > Train one-to-many queries beside one-to-one queries, and keep them apart from each other.
#
# *Why.* One-to-many matching gives a detector many positives, and inaccurate pseudo boxes do it little harm
# (@sec-assigners). But its queries report each object several times. One-to-one matching does not, and learns
# from one query per object. Semi-DETR has one stage after the other and changes the targets of every query in
# between. The two can also stand side by side (H-DETR, Jia et al. 2023): a *group* of further queries goes
# through the same decoder and the same heads and is trained one-to-many; the ordinary queries are one-to-one
# from the first iteration to the last. After training the group is dropped. A cheaper form has no further
# queries at all, only a second class head (MS-DETR, Zhao et al. 2024).

# %%
#| default_exp detectors.group

# %%
#| hide
import warnings

warnings.filterwarnings('ignore', message='IProgress')

# %%
#| export
import copy
import math
from dataclasses import dataclass, replace
import torch
from torch import nn, Tensor
from semidetr.boxes import inverse_sigmoid
from semidetr.core import in_range, one_of
from semidetr.detectors.contract import Outputs
from semidetr.detectors.denoising import ExtraQueries
from semidetr.detectors.transformer import Geometry, TransformerConfig, _full_size, anchor_logits, propose

# %%
from types import SimpleNamespace
import matplotlib.pyplot as plt
import torch.nn.functional as F
from torchvision.ops import box_iou
from semidetr.boxes import cxcywh_to_xyxy
from semidetr.detectors.denoising import combine_extras, group_mask
from semidetr.detectors.transformer import MLP


# %% [markdown]
# ## Kept apart
#
# The group is a set of extra queries with `sees='self'` (@sec-denoising). With $s(i)$ the set of query $i$, the
# attention among queries (@eq-selfatt) has
#
# $$
# B_{ij} = \begin{cases} 0 & s(i)=s(j) \\ -\infty & \text{else} \end{cases}
# \qquad\text{for } s(i) = \text{group or } s(i)=\text{matching.}
# $$ {#eq-group-mask}
#
# If the matching queries saw the group, they would depend on queries that do not exist at test time. And if the group
# saw the matching queries, it would see which of them reports an object, and could leave that object to it.
# Denoising and cross-view queries still attend to the matching ones.

# %%
def toy_set(n, name, sees, mask=None):
    mask = torch.zeros(n, n, dtype=torch.bool) if mask is None else mask
    return ExtraQueries(torch.zeros(1, n, 4), torch.zeros(1, n, 4), mask, name, {}, sees)


toy_sets = [toy_set(5, 'group', 'self'), toy_set(8, 'denoising', 'all', group_mask(2, 4))]
_, _, blocked, where = combine_extras(toy_sets, num_queries=6)
assert blocked[:5, 5:].all() and blocked[5:, :5].all() and not blocked[:5, :5].any()
assert not blocked[5:13, 13:].any() and blocked[13:, :13].all()
where

# %%
#| label: fig-group-mask
#| fig-cap: "Allowed attention (white): the group and the matching queries see themselves only; denoising queries see their own part and the matching queries."
#| fig-alt: "Square matrix; a white block for the group without any other white cell in its rows and columns, two small white blocks for denoising with white columns at the right, a white block for the matching queries"
fig, ax = plt.subplots(figsize=(3, 3), dpi=80)
ax.imshow(blocked, cmap='gray_r', vmin=0, vmax=1.3)
ax.set(xlabel='key', ylabel='query')
names, places = ['group', 'denoising', 'matching'], [2, 8.5, 15.5]
ax.set_xticks(places, names)
ax.set_yticks(places, names, rotation=90, va='center')
for at in (4.5, 12.5):
    ax.axhline(at, color='grey', lw=0.5)
    ax.axvline(at, color='grey', lw=0.5)
plt.show()


# %% [markdown]
# ## Where its queries come from
#
# Decoder and heads are shared. A query of the group that starts as a matching query does, with the same content
# and the same box, would therefore be the same function with a contradicting target. There are two ways out.
#
# `own`: the group has selection heads of its own. They score all tokens, the $P$ best become its boxes, and its
# contents come from its own table. The heads learn from the one-to-many loss of these proposals.
#
# `main`: the group starts at the matching queries' proposals. A learned vector $v$ marks its contents,
#
# $$
# c_i = \operatorname{sg}(h_i) + v ,
# $$ {#eq-group-content}
#
# with $h_i$ the content of the matching query, and $T=10$ *instruction slots*, queries with a learned content
# that start at the whole image, are visible to the group and have no loss. It needs no second pass over
# the tokens. The default `auto` is `main` where contents are tokens (`query_content='memory'`), else `own`.
# Where `own` meets such contents, they are the embedded tokens of its own layer plus $v$.

# %%
#| export
@dataclass(frozen=True)
class GroupConfig:
    "A parallel group of one-to-many queries (H-DETR: 1500 beside 300); training only"

    queries: int = 0  # P; 0: no group. At most as many as there are tokens, with 'main' as matching queries
    select: str = 'auto'  # 'own' selection heads, the 'main' proposals, 'auto': by the contents of queries
    slots: int = 10  # T instruction slots of the selection 'main'

    def __post_init__(self):
        one_of('detector.group', self, select=('auto', 'own', 'main'))
        in_range('detector.group', self, queries=0, slots=0)

    @property
    def on(self) -> bool:
        "Is there a group?"
        return self.queries > 0


def token_anchors(
    encoded,  # a batch of images after the encoder: `memory`, `shapes`, `valid_ratios`, `padding_mask`
) -> Geometry:  # with anchors (B or 1,S,4) in logit space and valid (B or 1,S); the rest is None
    "The anchors of all tokens (@eq-transformer-anchor), from what a decoder pass knows"
    size = _full_size(encoded.shapes, encoded.memory.device)
    if encoded.valid_ratios is None:
        return Geometry(encoded.shapes, None, None, *anchor_logits(encoded.shapes, size))
    anchors, valid = anchor_logits(encoded.shapes, (encoded.valid_ratios * size).round().clamp(min=1))
    padding = encoded.padding_mask
    anchors = anchors.masked_fill(padding[..., None], math.inf)
    return Geometry(encoded.shapes, None, None, anchors, valid & ~padding)


def _as_extra(content, logits, meta):
    "The set 'group', which sees itself only"
    n = content.shape[1]
    mask = torch.zeros(n, n, dtype=torch.bool, device=content.device)
    return ExtraQueries(content, logits, mask, 'group', meta, 'self')


# %%
#| export
class Group(nn.Module):
    "Makes the queries of a parallel group; heads and the layer between tokens and heads start as copies"

    def __init__(
        self,
        cfg: GroupConfig,
        sizes: TransformerConfig,  # width d, kind of contents
        embed: nn.Module,  # layers between token and selection heads
        class_head: nn.Module,  # of the encoder's proposals
        box_head: nn.Module,  # likewise
    ):
        super().__init__()
        d, tokens = sizes.d_model, sizes.query_content == 'memory'
        self.own = cfg.select == 'own' or (cfg.select == 'auto' and not tokens)
        self.cfg, self.sizes = cfg, replace(sizes, num_queries=cfg.queries)
        if self.own:
            self.embed, self.class_head = copy.deepcopy(embed), copy.deepcopy(class_head)
            self.box_head = copy.deepcopy(box_head)
        elif cfg.slots:
            self.slots = nn.Parameter(nn.init.xavier_uniform_(torch.empty(cfg.slots, d)))
        if self.own and not tokens:
            self.table = nn.Parameter(nn.init.xavier_uniform_(torch.empty(cfg.queries, d)))
        else:
            self.vector = nn.Parameter(0.1 * torch.randn(d))

    def copy_heads(self, embed: nn.Module, class_head: nn.Module, box_head: nn.Module):
        "Take the weights of the main selection, trained elsewhere, as a new start"
        pairs = [(self.embed, embed), (self.class_head, class_head), (self.box_head, box_head)]
        for own, main in pairs if self.own else []:
            own.load_state_dict(main.state_dict())

    def forward(
        self,
        encoded,  # as in `token_anchors`
        content: Tensor,  # (B,Q,d) of the matching queries
        logits: Tensor,  # (B,Q,4) their boxes in logit space
    ) -> ExtraQueries:  # 'group'; meta: slots T, and with own heads `proposals`, with gradient
        "The group for one decoder pass (@eq-group-content)"
        if self.own:
            return self._own(encoded)
        n, T = self.cfg.queries, self.cfg.slots
        content, logits = content[:, :n].detach() + self.vector, logits[:, :n].detach()
        if T:
            whole = inverse_sigmoid(logits.new_tensor([0.5, 0.5, 0.9, 0.9])).expand(len(logits), T, 4)
            content = torch.cat([self.slots.expand(len(content), -1, -1), content], 1)
            logits = torch.cat([whole, logits], 1)
        return _as_extra(content, logits, dict(slots=T))

    def _own(self, encoded):
        "Queries at the best tokens of the own heads"
        geo = token_anchors(encoded)
        found = propose(encoded.memory, geo, self.embed, self.class_head, self.box_head, self.sizes)
        scores, boxes, h, index = found
        if hasattr(self, 'vector'):
            content = h.detach() + self.vector
        else:
            content = self.table[: index.shape[1]].expand(len(h), -1, -1)
        meta = dict(slots=0, proposals=dict(pred_logits=scores, pred_boxes=boxes))
        return _as_extra(content, inverse_sigmoid(boxes.detach()), meta)


# %% [markdown]
# A detector makes its group last, without moving the state of the random generator, so that the rest of the
# network is the same with and without it.

# %%
#| export
def build_group(
    cfg: GroupConfig,
    sizes: TransformerConfig,  # of the decoder
    *heads: nn.Module,  # of the main selection: embed, class head, box head
) -> Group | None:  # None where `cfg.queries` is 0
    "The group of some settings; torch's random state stays as it was"
    if not cfg.on:
        return None
    with torch.random.fork_rng(devices=[]):
        return Group(cfg, sizes, *heads)


def parallel_group(
    model: nn.Module,  # a detector
    encoded,  # of its `encode`
) -> list:  # of `ExtraQueries` for `decode`: the group, or empty
    "The group of a detector that is being trained; empty in evaluation and for detectors without one"
    make = getattr(model, 'group', None)
    if not isinstance(make, Group) or not model.training:
        return []
    start = getattr(encoded, 'queries', None)  # Deformable-DETR keeps the start of its queries together
    if start is None:
        return [make(encoded, encoded.content, encoded.reference_logits)]
    return [make(encoded, start.content, start.start)]


# %% [markdown]
# Two levels of tokens, ten matching queries. The main proposals with the mark $v$ and three slots in front; and
# four queries at the best tokens of the own heads:

# %%
torch.manual_seed(0)
small = TransformerConfig(d_model=16, n_levels=2, num_queries=10, query_content='memory')
layers = nn.Linear(16, 16), nn.Linear(16, 3), MLP(16, 16, 4, 3)
toy_encoded = SimpleNamespace(
    memory=torch.randn(2, 80, 16), shapes=((8, 8), (4, 4)), valid_ratios=None, padding_mask=None
)
main_content, main_logits = torch.randn(2, 10, 16), torch.randn(2, 10, 4)
marked = build_group(GroupConfig(6, slots=3), small, *layers)
own = build_group(GroupConfig(4, 'own'), small, *layers)
from_main = marked(toy_encoded, main_content, main_logits)
from_tokens = own(toy_encoded, main_content, main_logits)
assert from_main.content.shape == (2, 9, 16) and from_tokens.content.shape == (2, 4, 16)
assert torch.equal(from_main.boxes[:, 3:], main_logits[:, :6])
shift = from_main.content[:, 3:] - main_content[:, :6]
assert torch.allclose(shift, marked.vector.expand_as(shift), atol=1e-6)
{k: v['pred_boxes'].shape if k == 'proposals' else v for k, v in from_tokens.meta.items()}


# %% [markdown]
# ## A second class head
#
# The cheapest form has the same queries twice. The boxes of a layer are shared; its class head says which query
# reports an object, and a second class head $W'$ which queries lie on one,
#
# $$
# z_{ic} = (W h_i + b)_c \;\text{ one-to-one}, \qquad z'_{ic} = (W' h_i + b')_c \;\text{ one-to-many.}
# $$ {#eq-group-second}
#
# Both must be read from one and the same $h_i$, so the decoder has to keep what tells the winner from its
# neighbours apart from what all of them share. DINO has one class head for all layers and gets one more;
# Deformable-DETR has one per layer and gets as many more.

# %%
#| export
def add_second(
    model: nn.Module,  # a detector
    outputs: Outputs,  # of its decoder
    heads,  # one callable (B,Q,d) -> (B,Q,C) per layer; read only where they are needed
) -> Outputs:  # in training with `second`: the same boxes with other logits
    "The one-to-many logits of all layers (@eq-group-second), where a detector in training has a second head"
    if model.second_head is None or not model.training or 'second' in outputs:
        return outputs
    boxes = [o['pred_boxes'] for o in (*outputs['aux_outputs'], outputs)]
    rows = zip(heads, outputs['hs'], boxes)
    layers = [dict(pred_logits=head(h), pred_boxes=b) for head, h, b in rows]
    return {**outputs, 'second': dict(**layers[-1], aux_outputs=layers[:-1])}


# %% [markdown]
# ## What the loss reads
#
# Group and second head look like detectors of their own: a last layer, the layers before, and where the
# group has selection heads, proposals. The criterion of @sec-losses reads them as such, always one-to-many.

# %%
#| export
PARALLEL = ('group.', 'second_head.')  # first letters of the weights that serve training only


def parallel_outputs(
    outputs: Outputs,  # of a detector
) -> dict:  # 'group', 'second' -> `Outputs`; those that exist
    "What is trained one-to-many beside the matching queries; instruction slots are left out"
    found = {}
    if 'group' in outputs.get('extra', {}):
        group = outputs['extra']['group']
        T, meta = group['meta']['slots'], group['meta']
        rows = zip(group['pred_logits'], group['pred_boxes'])
        layers = [dict(pred_logits=c[:, T:], pred_boxes=b[:, T:]) for c, b in rows]
        found['group'] = dict(**layers[-1], aux_outputs=layers[:-1])
        if 'proposals' in meta:
            found['group']['enc_outputs'] = meta['proposals']
    if 'second' in outputs:
        found['second'] = outputs['second']
    return found


# %%
three_layers = dict(
    pred_logits=torch.zeros(3, 2, 9, 5), pred_boxes=torch.rand(3, 2, 9, 4), meta=from_main.meta
)
read = parallel_outputs(dict(extra=dict(group=three_layers)))
assert read['group']['pred_logits'].shape == (2, 6, 5) and len(read['group']['aux_outputs']) == 2
assert parallel_outputs(dict(extra={})) == {}
sorted(read['group'])


# %% [markdown]
# What is needed for training only leaves an export (@sec-export), settings and weights. And a run
# that starts from the weights of one without group gives it copies of the trained selection heads, and
# the second head a copy of the class head.

# %%
#| export
def parallel_parts(
    settings,  # of a detector
) -> tuple:  # of 'group', 'second_head'
    "The names of the settings that are on: parts that are trained one-to-many beside the matching queries"
    group, second = getattr(settings, 'group', None), getattr(settings, 'second_head', False)
    return ('group',) * (group is not None and group.on) + ('second_head',) * second


def for_inference(
    settings,  # of a detector
    state: dict,  # its weights
) -> tuple:  # (settings, weights) without a parallel group and without a second class head
    "What a detector needs after training"
    if not parallel_parts(settings):
        return settings, state
    kept = {k: v for k, v in state.items() if not k.startswith(PARALLEL)}
    return replace(settings, group=GroupConfig(), second_head=False), kept


def start_parallel(
    model: nn.Module,  # a detector with trained weights, but for the parts in `names`
    names,  # of 'group', 'second_head'
):
    "Copies of the trained heads in new parts, in place; the contents of a group stay untrained"
    if 'group' in names:
        model.group.copy_heads(*model.selection_heads())
    if 'second_head' in names:
        model.second_head.load_state_dict(model.main_class_head().state_dict())


# %%
@dataclass(frozen=True)
class ToySettings:
    group: GroupConfig = GroupConfig()
    second_head: bool = False


with_both = ToySettings(GroupConfig(6), True)
toy_state = {'class_head.bias': 0, 'group.vector': 1, 'second_head.bias': 2}
assert for_inference(with_both, toy_state) == (ToySettings(), {'class_head.bias': 0})
assert for_inference(ToySettings(), toy_state) == (ToySettings(), toy_state)
parallel_parts(with_both)

# %% [markdown]
# Twelve queries around one object, with contents that are noise, and both heads as linear layers on them. The
# target of the first head is 1 for the best query, those of the second are a power of the IoU. Trained together
# they agree on the object and disagree on the duplicates:

# %%
torch.manual_seed(0)
object_box = torch.tensor([[0.5, 0.5, 0.4, 0.4]])
around = object_box + 0.05 * torch.randn(12, 4)
u = box_iou(cxcywh_to_xyxy(around), cxcywh_to_xyxy(object_box))[:, 0]
u, order = u.sort(descending=True)
h = torch.randn(12, 16, requires_grad=True)
first, second = nn.Linear(16, 1), nn.Linear(16, 1)
wanted = F.one_hot(torch.tensor(0), 12).float(), u**6 / u.max() ** 5
optimiser = torch.optim.AdamW([h, *first.parameters(), *second.parameters()], lr=0.05)
for _ in range(100):
    pairs = zip((first, second), wanted)
    loss = sum(F.binary_cross_entropy_with_logits(head(h)[:, 0], y) for head, y in pairs)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
scores = [head(h).sigmoid()[:, 0].detach() for head in (first, second)]
assert (scores[0] > 0.5).sum() == 1 and (scores[1] - wanted[1]).abs().max() < 0.1
[s.round(decimals=2).tolist()[:4] for s in scores]

# %%
#| label: fig-group-second
#| fig-cap: "Two class heads on the same twelve queries: the first reports the object once, the second gives every query the quality of its box."
#| fig-alt: "Bars of two colours for twelve queries sorted by IoU; of the first head only the first bar is high, those of the second fall with the IoU"
fig, ax = plt.subplots(figsize=(5, 2.2), dpi=80, layout='constrained')
number = torch.arange(12)
ax.bar(number - 0.2, scores[0], 0.4, label='one-to-one', color='#1f77b4')
ax.bar(number + 0.2, scores[1], 0.4, label='one-to-many', color='#9ecae1')
ax.plot(number, u, 'k.', label='IoU')
ax.set(xlabel='query', ylabel='score', xticks=range(12))
ax.legend(fontsize=9)
plt.show()

# %% [markdown]
# ::: {.callout-note}
# ## Paper vs. code
# H-DETR repeats each object six times and matches by the Hungarian method; here the group has the task-aligned
# assignment of @sec-matching, which gives soft targets and needs no number of copies. Its selection takes the
# next ranks of the same heads, which gives the group other tokens but not a choice of its own. Mark and slots
# stand in for the learned tokens of Mr. DETR. MS-DETR has a feed-forward block between its two
# predictions; the second class head alone is its form without it.
# :::
#
# ## Summary
#
# - A parallel group is a set of extra queries that sees itself only, and that nothing else sees.
# - It shares decoder and heads, and differs from the matching queries by its selection, or by a mark and slots.
# - A second class head needs no queries: it reads the outputs of the matching ones.
# - Both learn one-to-many from the first iteration to the last (@sec-losses), on unlabelled images from a wider
#   set of boxes (@sec-variants), while the matching queries are one-to-one (`method.T1=0`).
# - Neither exists at test time.
#
# ## Exercises
#
# 1. Let the matching queries see the group in training. What do they miss at test time?
# 2. Why must the group with `main` be marked, though its targets differ from those of the matching queries?
# 3. In the toy of the second head, give both heads the same weights. Which scores do they end with?
