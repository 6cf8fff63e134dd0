# %% [markdown]
# # Names of other programs {#sec-weight-names}
#
# > Recognise weights of other programs by the names of their tensors, and give the tensors our names.
#
# *Why.* Two programs that implement the same network call its parts differently, store some of them several times,
# and cut others into pieces. All of that can be written down as a table of rules. A table is easy to check,
# works in both directions, and has no place where a tensor could get lost: @sec-weights uses it for imports, and
# names a tensor that is missing as the file would.

# %%
#| default_exp detectors.weight_names

# %%
#| hide
import warnings

warnings.filterwarnings('ignore', message='IProgress')

# %%
#| export
import re
from dataclasses import asdict, dataclass, field
import torch
from torch import Tensor
from semidetr.core import DataError

# %%
import matplotlib.pyplot as plt

# %% [markdown]
# ## Which program wrote it?
#
# Some names occur in one kind of file only. The test looks at beginnings of names that many tensors share, so
# that a file in which one tensor is missing or misspelt is still recognised, and the error names the tensor.

# %%
#| export
KINDS = {  # kind -> words for people
    'official': 'the official Semi-DETR',
    'hf_deformable_detr': 'Deformable-DETR of transformers',
    'hf_detr': 'DETR of transformers',
    'dino': 'the original DINO',
    'deformable_detr': 'the original Deformable-DETR',
    'detr': 'the original DETR',
    'ours': 'semidetr',
    'backbone': 'a backbone without a detector',
}


def recognise(
    state,  # names of tensors
    origin: str = '',  # file, for the error
) -> str:  # a key of KINDS
    "The kind of a state dict; `DataError` if it is none of them"
    has = lambda pattern: any(re.match(pattern, k) for k in state)
    tests = {
        'official': r'(student|teacher)\.bbox_head\.',
        'hf_deformable_detr': r'model\..*\.encoder_attn\.sampling_offsets\.',
        'hf_detr': r'(class_labels_classifier|bbox_predictor)\.',
        'ours': r'(backbone\.body\.|student$)',
        'dino': r'transformer\.(tgt_embed|enc_out_)',
        'deformable_detr': r'transformer\..*\.sampling_offsets\.',
        'detr': r'(detr\.)?transformer\..*\.multihead_attn\.',
        'backbone': r'(backbone\.)?(conv1\.|_?conv_stem\.|layer\d\.|_?blocks?\.|stem|stages?\.|patch_embed)',
    }
    for kind, pattern in tests.items():
        if has(pattern):
            return kind
    first = ', '.join(list(state)[:3])
    where = f'{origin}: ' if origin else ''
    raise DataError(f'{where}names such as {first} belong to no program that is known ({", ".join(tests)})')


# %%
names_of_dino = ['transformer.level_embed', 'transformer.tgt_embed.weight', 'class_embed.0.weight']
assert recognise(names_of_dino) == 'dino' and recognise(['layer1.0.conv1.weight']) == 'backbone'
recognise(['class_labels_classifier.bias'])


# %% [markdown]
# ## Rules
#
# A rule replaces the beginning of a name; `{i}` stands for a number. The first rule that fits is used, in both
# directions: an error about a tensor of ours names it as the file would. Three things are more than names.
#
# * DETR normalises after self-attention with `norm1` and after cross-attention with `norm2`; Deformable-DETR and
#   DINO number them the other way round. `transformers` names norms by their role.
# * `transformers` has three matrices where others have one: the rows $0..d-1$ of `in_proj` belong to the
#   queries, the next ones to keys and values,
#
# $$
# W_{\text{in}} = \begin{bmatrix} W_q \\ W_k \\ W_v \end{bmatrix} \in \mathbb{R}^{3d\times d}
# $$ {#eq-weights-fused}
#
# * Most programs store one head several times. DINO and plain Deformable-DETR use the same head in each layer,
#   so all copies must be equal; an error says so if they are not. In the other forms head $j$ has its place
#   under two prefixes, a file of `transformers` may hold either, and where only head 0 is stored it serves
#   every layer.

# %%
#| export
@dataclass(frozen=True)
class Rule:
    "The beginning of a name in a file, and of the same name here"

    foreign: str
    own: str
    part: int = None  # 0, 1, 2: query, key or value rows of one of our matrices

    def apply(
        self,
        name: str,
        back: bool = False,  # from our name to that of the file
    ) -> str | None:  # None: the rule does not fit; a number without a counterpart becomes 0
        "The other name"
        old, new = (self.own, self.foreign) if back else (self.foreign, self.own)
        if not name.startswith(old.split('{')[0]):
            return None
        found = re.match(re.sub(r'\\\{(\w)\\\}', r'(?P<\1>\\d+)', re.escape(old)), name)
        if found is None:
            return None
        return re.sub(r'\{(\w)\}', lambda m: found.groupdict().get(m[1], '0'), new) + name[found.end() :]


def _original_rules(kind, form):
    "Rules of the original programs"
    rules = [Rule('backbone.0.body.', 'backbone.body.')]
    if kind == 'dino':
        for a, b in (('class_embed', 'class_head'), ('bbox_embed', 'box_head')):
            rules += [Rule(f'{prefix}{a}.{{j}}.', f'{b}.') for prefix in ('', 'transformer.decoder.')]
        rules.append(Rule('transformer.enc_out_class_embed.', 'enc_class_head.'))
        rules.append(Rule('transformer.enc_out_bbox_embed.', 'enc_box_head.'))
        rules.append(Rule('transformer.tgt_embed.', 'transformer.query_content.'))
    if kind == 'deformable_detr':
        rules += _layer_heads(form, 'transformer.decoder.')
    return [*rules, Rule('', '')]


def _layer_heads(form, prefix):
    "Rules of heads that may have a second place"
    j = '0' if form == 'plain' else '{j}'
    names = ('class_embed', 'bbox_embed')
    return [Rule(f'{p}{name}.{{j}}.', f'{name}.{j}.') for name in names for p in ('', prefix)]


def _semi_detr_rules(network):
    "Rules of one network of the official Semi-DETR, 'student' or 'teacher'; or of its 'projector'"
    if network == 'projector':
        pairs = dict(conv1='convs.0', conv2='convs.1', bn1='norms.0', bn2='norms.1', bn='norms.2')
        rules = [Rule(f'projector.{a}.', f'projector.{b}.') for a, b in pairs.items()]
        return [*rules, Rule('projector.', 'projector.')]
    head = f'{network}.bbox_head.'
    return [
        Rule(f'{network}.backbone.', 'backbone.body.'),
        Rule(f'{head}fc_cls.{{j}}.', 'class_head.'),
        Rule(f'{head}fc_reg.{{j}}.', 'box_head.'),
        Rule(f'{head}fc_enc_cls.', 'enc_class_head.'),
        Rule(f'{head}fc_enc_reg.', 'enc_box_head.'),
        Rule(f'{head}transformer.tgt_embed.', 'transformer.query_content.'),
        Rule(head, ''),
    ]


# %%
of_dino = _original_rules('dino', None)
foreign = 'transformer.decoder.class_embed.3.bias'
own = next(new for rule in of_dino if (new := rule.apply(foreign)))
back = next(old for rule in of_dino if (old := rule.apply('class_head.bias', back=True)))
assert (own, back) == ('class_head.bias', 'class_embed.0.bias')
foreign, own, back

# %% [markdown]
# The names of `transformers` on disk are the same in all its releases; those of a module in memory changed with
# 5.1 (`o_proj`, `mlp.fc1`), and both are read. Its own ResNet counts stages and convolutions from 0.

# %%
#| export
HF_BACKBONES = (  # where a backbone is: with a configuration of timm, usually, in memory since 5.1
    'model.backbone.conv_encoder.model._backbone.',
    'model.backbone.conv_encoder.model.',
    'model.backbone.model.',
)


def _hf_backbone_rules(state):
    "Rules of a ResNet in `transformers`: its own one, or that of timm"
    p = next((p for p in HF_BACKBONES if any(k.startswith(p) for k in state)), HF_BACKBONES[1])
    if not any('.embedder.' in k or '.stages.' in k for k in state):
        return [Rule(p, 'backbone.body.')]
    rules = [Rule(f'{p}embedder.embedder.convolution.', 'backbone.body.conv1.')]
    rules.append(Rule(f'{p}embedder.embedder.normalization.', 'backbone.body.bn1.'))
    for s in range(4):
        foreign, own = f'{p}encoder.stages.{s}.layers.{{b}}.', f'backbone.body.layer{s + 1}.{{b}}.'
        for k in range(3):
            rules.append(Rule(f'{foreign}layer.{k}.convolution.', f'{own}conv{k + 1}.'))
            rules.append(Rule(f'{foreign}layer.{k}.normalization.', f'{own}bn{k + 1}.'))
        rules.append(Rule(f'{foreign}shortcut.convolution.', f'{own}downsample.0.'))
        rules.append(Rule(f'{foreign}shortcut.normalization.', f'{own}downsample.1.'))
    return rules


def _hf_layer_rules(layer, cross, norms):
    "Rules of the layers of an encoder or a decoder; `norms`: role -> number of our norm"
    foreign, own = f'model.{layer}.layers.{{i}}.', f'transformer.{layer}.layers.{{i}}.'
    rules = []
    attentions = [('self_attn', 'self_attn'), *([('encoder_attn', cross)] if cross else [])]
    for a, b in attentions:
        for part, letter in enumerate('qkv'):
            rules.append(Rule(f'{foreign}{a}.{letter}_proj.', f'{own}{b}.in_proj_', part))
        rules.append(Rule(f'{foreign}{a}.out_proj.', f'{own}{b}.out_proj.'))
        rules.append(Rule(f'{foreign}{a}.o_proj.', f'{own}{b}.out_proj.'))
        rules.append(Rule(f'{foreign}{a}.', f'{own}{b}.'))
    for n in (1, 2):
        rules += [Rule(f'{foreign}{p}fc{n}.', f'{own}linear{n}.') for p in ('', 'mlp.')]
    return rules + [Rule(f'{foreign}{role}_layer_norm.', f'{own}norm{n}.') for role, n in norms.items()]


# %%
#| export
def _hf_rules(kind, form, state):
    "Rules of `transformers`"
    rules = _hf_backbone_rules(state) + _hf_layer_rules('encoder', '', dict(self_attn=1, final=2))
    if kind == 'hf_detr':
        norms = dict(self_attn=1, encoder_attn=2, final=3)
        rules += _hf_layer_rules('decoder', 'multihead_attn', norms)
        rules.append(Rule('model.input_projection.', 'input_proj.'))
        rules.append(Rule('model.decoder.layernorm.', 'transformer.decoder.norm.'))
        rules.append(Rule('class_labels_classifier.', 'class_embed.'))
        rules.append(Rule('bbox_predictor.', 'bbox_embed.'))
    else:
        norms = dict(encoder_attn=1, self_attn=2, final=3)
        rules += _hf_layer_rules('decoder', 'cross_attn', norms)
        rules += _layer_heads(form, 'model.decoder.')
        rules.append(Rule('model.input_proj.', 'input_proj.'))
    rules.append(Rule('model.query_position_embeddings.', 'query_embed.'))
    return [*rules, Rule('model.', 'transformer.')]


def rules_of(
    kind: str,  # from `recognise`
    state,  # names of the tensors
    form: str = None,  # of Deformable-DETR; None: from the names
    network: str = 'student',  # of the official Semi-DETR, or 'projector'
) -> list:  # of `Rule`
    "How the names of a file become ours"
    if kind == 'official':
        return _semi_detr_rules(network)
    if kind.startswith('hf_'):
        return _hf_rules(kind, form or form_of(state), state)
    return _original_rules(kind, form or form_of(state))


def foreign_name(
    name: str,  # ours
    rules: list,  # of `Rule`
) -> str:
    "How a file would call a tensor of ours"
    return next((old for r in rules if (old := r.apply(name, back=True)) is not None), name)


def form_of(
    state,  # names of the tensors of a Deformable-DETR
) -> str:  # 'plain', 'refine', 'two_stage'
    "Two-stage has layers for proposals, refine a second place for box heads"
    if any('.enc_output.' in k or '.pos_trans' in k for k in state):
        return 'two_stage'
    return 'refine' if any('.decoder.bbox_embed.' in k for k in state) else 'plain'


# %%
example = 'model.decoder.layers.4.self_attn.k_proj.weight'
rule = next(r for r in _hf_rules('hf_detr', 'plain', []) if r.apply(example))
assert rule.part == 1 and rule.apply(rule.apply(example), back=True) == example
rule.apply(example)


# %% [markdown]
# ## Report
#
# One row per tensor of the file, and one sentence per thing that was assumed. It is written next to the
# imported weights as `report.json`.

# %%
#| export
@dataclass
class Row:
    "What became of one tensor of a file"

    key: str  # name in the file
    shape: tuple
    status: str  # 'matched' (same name), 'renamed', 'joined' (rows of a larger one), 'copy', 'unused'
    name: str = ''  # ours; '' if unused
    why: str = ''  # it is not used, or what it is a copy of


@dataclass
class Report:
    "What became of every tensor of a file"

    kind: str  # of KINDS
    origin: str = ''  # file or folder
    rows: list = field(default_factory=list)  # of `Row`, in the order of the file
    filled: list = field(default_factory=list)  # tensors of ours that copy another one: 'name = name'
    notes: list = field(default_factory=list)  # sentences about what was assumed, changed or left out
    fresh: list = field(default_factory=list)  # tensors of ours that a backbone does not have: untrained

    def count(self, status: str) -> int:
        "Number of tensors with a status"
        return sum(row.status == status for row in self.rows)

    def __str__(self) -> str:
        states = ('matched', 'renamed', 'joined', 'copy', 'unused')
        counts = ', '.join(f'{self.count(s)} {s}' for s in states if self.count(s))
        head = f'{self.origin}: {len(self.rows)} tensors of {KINDS[self.kind]}: {counts}; none missing'
        if self.fresh:
            parts = ', '.join(sorted({name.split('.')[0] for name in self.fresh}))
            head += f'\nfresh: {len(self.fresh)} tensors of the rest of the detector ({parts})'
        reasons = {}
        for row in self.rows:
            if row.status == 'unused':
                reasons.setdefault(row.why, []).append(row.key)
        unused = [
            f'unused: {keys[0]}{f" and {len(keys) - 1} more" if len(keys) > 1 else ""} ({why})'
            for why, keys in reasons.items()
        ]
        return '\n'.join([head, *unused, *self.notes])

    def to_dict(self) -> dict:  # plain values
        "For report.json"
        return asdict(self)


# %%
short = Report('dino', 'a.pth', [Row('x', (2,), 'renamed', 'y'), Row('z', (), 'unused', '', 'a counter')])
assert '1 renamed, 1 unused' in str(short)
print(short)

# %% [markdown]
# ## Renaming
#
# Counters of operations are left out, and so are the mask heads of a panoptic DETR. Counters of batch norms are
# left out where ours are frozen and have none.

# %%
#| export
COUNTER = 'num_batches_tracked'  # of a batch norm
UNUSED = {  # pattern -> reason
    r'.*total_(ops|params)$': 'counter of a profiler',
    r'(bbox_attention|mask_head)\.': 'head for masks',
}


def equal(a: Tensor, b: Tensor) -> bool:  # of tensors without data: have they the same shape?
    "Are two tensors copies of each other?"
    return a.shape == b.shape and (a.is_meta or b.is_meta or torch.equal(a, b))


def _reason(key):
    "Why a tensor has no place; None: it needs one"
    return next((why for pattern, why in UNUSED.items() if re.match(pattern, key)), None)


def _join(parts, sources):
    "Fused matrices from their parts; faults where one is missing"
    joined, faults = {}, []
    for name, found in parts.items():
        if len(found) < 3:
            lost = next(n for n in range(3) if n not in found)
            have = sources[name][0]
            faults.append(f'missing {re.sub("[qkv]_proj", "qkv"[lost] + "_proj", have)}')
            continue
        values = [found[n] for n in range(3)]
        shapes = [v.shape for v in values]
        if len(set(shapes)) > 1:
            odd = next((n for n in range(3) if shapes.count(shapes[n]) == 1), 0)
            faults.append(f'{sources[name][odd]} is {tuple(shapes[odd])}, unlike the other two')
            continue
        joined[name] = torch.cat(values)
    return joined, faults


# %%
#| export
def rename(
    state: dict,  # name -> tensor, of the file
    rules: list,  # of `Rule`
) -> tuple:  # (name of ours -> tensor, rows of the report, faults: sentences)
    "Give every tensor of a file its name; nothing is checked against a network yet"
    renamed, rows, faults, parts, sources = {}, [], [], {}, {}
    for key, value in state.items():
        short = key.removeprefix('detr.')
        shape, why = tuple(value.shape), _reason(short)
        if why:
            rows.append(Row(key, shape, 'unused', '', why))
            continue
        rule = next((r for r in rules if r.apply(short) is not None), None)
        if rule is None:
            faults.append(f'unknown {key}')
            continue
        name = rule.apply(short)
        status = 'matched' if name == key else 'renamed'
        if rule.part is not None:
            parts.setdefault(name, {})[rule.part] = value
            status = 'joined'
        elif name not in renamed:
            renamed[name] = value
        elif equal(renamed[name], value):
            rows.append(Row(key, shape, 'copy', name, f'equal to {sources[name][0]}'))
            continue
        else:
            faults.append(f'{key} differs from its copy {sources[name][0]}')
            continue
        sources.setdefault(name, []).append(key)
        rows.append(Row(key, shape, status, name))
    joined, more = _join(parts, sources)
    return renamed | joined, rows, faults + more


# %%
#| export
def fill_heads(
    state: dict,  # of a Deformable-DETR, our names
    form: str,  # 'refine', 'two_stage'
    layers: int,  # of the decoder
) -> list:  # 'name = name' of what was filled
    "Where a file holds head 0 alone, it serves every layer; `state` is changed"
    filled, count = [], dict(plain=1, refine=layers, two_stage=layers + 1)[form]
    for head in ('class_embed', 'bbox_embed'):
        if any(re.match(rf'{head}\.[1-9]', k) for k in state):
            continue
        for key in [k for k in state if k.startswith(f'{head}.0.')]:
            for j in range(1, count):
                name = key.replace(f'{head}.0.', f'{head}.{j}.')
                state[name] = state[key]
                filled.append(f'{name} = {key}')
    return filled


# %%
three = {
    f'model.encoder.layers.0.self_attn.{c}_proj.bias': torch.full((2,), float(i)) for i, c in enumerate('qkv')
}
fused, rows, faults = rename(three, _hf_rules('hf_detr', 'plain', []))
lost = rename(dict(list(three.items())[:2]), _hf_rules('hf_detr', 'plain', []))[2]
assert faults == [] and lost == ['missing model.encoder.layers.0.self_attn.v_proj.bias']
fused

# %%
#| label: fig-weight-names-count
#| fig-cap: "Number of rules that each kind of file needs; the names of `transformers` differ most."
#| fig-alt: "Horizontal bars: a few rules for the original programs, about ten for the official Semi-DETR, dozens for transformers."
table = {kind: len(rules_of(kind, ['x.stages.'])) for kind in list(KINDS)[:6]}
assert table['detr'] == 2 and max(table, key=table.get).startswith('hf_')
fig, ax = plt.subplots(figsize=(4.5, 2), dpi=80, layout='constrained')
ax.barh(list(table), list(table.values()), color='0.5')
ax.set_xlabel('rules')
plt.show()

# %% [markdown]
# ## Summary
#
# - A few beginnings of names tell the kind of a file.
# - A rule replaces the beginning of a name, in both directions; one table per kind.
# - Copies must be equal, parts must be complete, and what has no rule is a fault.
#
# ## Exercises
#
# 1. Write the rules of a detector that you know from another program.
# 2. A file holds `class_embed.0` and `class_embed.3` alone. What should an import do, and why?
# 3. For which rules does the way back not give the name that was in the file?
