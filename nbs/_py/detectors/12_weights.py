# %% [markdown]
# # Start from weights you have {#sec-weights}
#
# > Read the weights of other programs completely, or learn in one line which tensor is in the way.
#
# *Why.* A detector that was trained for weeks is a better start than a random one, but its file has other names,
# other conventions, and often other classes. A loader that skips what it does not know starts from a network
# that is partly random, and nothing fails: the average precision is only lower than it could be. So every
# tensor of a file is accounted for here: it becomes a tensor of ours, it is left out for a stated reason, or
# the import stops and names it.
#
# | file | recognised as |
# |---|---|
# | `.pth` of the original DETR, Deformable-DETR (three forms), DINO (four and five levels) | `detr`, `deformable_detr`, `dino` |
# | `.pth` of the official Semi-DETR: student, teacher, projector | `semi_detr` |
# | folder or `.safetensors` of `transformers`, DETR and Deformable-DETR | `hf_detr`, `hf_deformable_detr` |
# | a ResNet of torchvision, a network of timm | `backbone`: for `detector.backbone.weights`, not for an import |
# | a run of ours | `ours` |

# %%
#| default_exp detectors.weights

# %%
#| hide
import warnings

warnings.filterwarnings('ignore', message='IProgress')

# %%
#| export
import argparse
import json
import pickle
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
import torch
from torch import Tensor
from semidetr.core import DataError
from semidetr.detectors.backbone import BackboneConfig
from semidetr.detectors.contract import build_detector
from semidetr.detectors.deformable_detr import DeformableDETRConfig
from semidetr.detectors.denoising import DenoisingConfig
from semidetr.detectors.detector import DetectorConfig
from semidetr.detectors.transformer import TransformerConfig

# %%
import tempfile
import matplotlib.pyplot as plt
from semidetr.detectors.deformable_detr import deformable_detr_small


# %% [markdown]
# ## Reading files
#
# A pickle can run any code when it is read. `weights_only=True` allows tensors and plain values; checkpoints of
# Deformable-DETR and DINO also hold their command line as an `argparse.Namespace`, which does no more than
# hold values and is allowed. What needs more is refused. Safetensors hold nothing but tensors.

# %%
#| export
@dataclass
class WeightFile:
    "What a file or a folder holds"

    path: str  # for messages
    state: dict  # name -> tensor; of a run of ours: everything in its checkpoint
    config: dict = field(default_factory=dict)  # content of a config.json next to the weights
    classes: list = None  # names of the class rows, if the file tells them
    others: list = field(default_factory=list)  # what else is in the file: optimizer, epoch, ...


def _load_pickle(path):
    "Content of a file of `torch.save`, tensors and plain values only"
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as e:
        found = re.search(r'(?:GLOBAL|global|class) [`\']?([\w.]+)', str(e))
        what = found.group(1) if found else ' '.join(str(e).split())[:120]
        raise DataError(
            f'{path}: refused, it needs more than tensors and plain values to be read ({what}), which could '
            'run any code; save its state dict alone where you trust it'
        ) from None
    except Exception as e:
        why = (str(e) or type(e).__name__).splitlines()[0][:100]
        raise DataError(f'{path}: cannot be read as weights ({why}); fetch the file again') from None


def _load_safetensors(path):
    "Tensors of a safetensors file"
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as e:
        raise DataError(f'{path}: not a whole safetensors file ({str(e)[:100]}); fetch it again') from None


def _load_folder(folder):
    "(tensors, content of config.json) of a folder of `transformers`, whole or in shards"
    try:
        config = json.loads((folder / 'config.json').read_text())
    except (OSError, ValueError) as e:
        raise DataError(f'{folder}: no readable config.json ({e}); give a file, or a whole folder') from None
    index = folder / 'model.safetensors.index.json'
    if (folder / 'model.safetensors').is_file():
        return _load_safetensors(folder / 'model.safetensors'), config
    if not index.is_file():
        raise DataError(f'{folder}: holds neither model.safetensors nor {index.name}; fetch the folder again')
    state, where = {}, json.loads(index.read_text())['weight_map']
    for name in sorted(set(where.values())):
        if not (folder / name).is_file():
            raise DataError(f'{folder}: {name} is missing, {index.name} lists it; fetch the folder again')
        state |= _load_safetensors(folder / name)
    if lost := sorted(set(where) - set(state)):
        raise DataError(f'{folder}: no shard holds {lost[0]}; fetch the folder again')
    return state, config


# %% [markdown]
# The tensors lie under a key such as `model` or `state_dict`, next to what training needed. `ema_model` holds
# averaged weights in some files of DINO; the usual ones are taken unless you ask for it.

# %%
#| export
STATE_KEYS = ('model', 'state_dict', 'ema_model')


def _inner_state(content, path, key):
    "(state dict, other keys) of the content of a file"
    if not isinstance(content, dict):
        raise DataError(f'{path}: holds {type(content).__name__}, no named tensors; save a state dict')
    known = [k for k in STATE_KEYS if isinstance(content.get(k), dict)]
    if key and key not in known:
        raise DataError(f"{path}: holds no '{key}'; it holds {', '.join(map(str, content))[:200]}")
    if 'format' in content and 'config' in content:
        return content, []
    if known:
        key = key or known[0]
        return content[key], [k for k in content if k != key]
    return content, []


def read_weights(
    path,  # .pth, .pt, .bin or .safetensors; a folder of `transformers`; the folder of a run of ours
    key: str = '',  # 'ema_model' of a file that holds several; '': the first of STATE_KEYS
) -> WeightFile:
    "Read tensors without running code; a one-line `DataError` if that is not possible"
    path, config, others, classes = Path(path), {}, [], None
    if not path.exists():
        raise DataError(f'{path}: no such file or folder')
    if path.is_dir() and (path / 'last.pt').is_file():
        path = path / 'last.pt'
    if path.is_dir():
        state, config = _load_folder(path)
    elif path.suffix == '.safetensors':
        state = _load_safetensors(path)
    else:
        content = _load_pickle(path)
        state, others = _inner_state(content, path, key)
        meta = content.get('meta') or {}
        classes = list(meta.get('CLASSES') or content.get('classes') or []) or None
        if 'format' not in state and not all(isinstance(v, Tensor) for v in state.values()):
            wrong = next(k for k, v in state.items() if not isinstance(v, Tensor))
            raise DataError(f'{path}: {wrong} is no tensor; give a file that holds a state dict')
    if config.get('id2label'):
        classes = [name for _, name in sorted(config['id2label'].items(), key=lambda item: int(item[0]))]
    if all(k.startswith('module.') for k in state):
        state = {k.removeprefix('module.'): v for k, v in state.items()}
    return WeightFile(str(path), state, config, classes, others)


# %%
class Evil:
    def __reduce__(self):
        return print, ('code of the file runs',)


with tempfile.TemporaryDirectory() as folder:
    torch.save(dict(model=dict(a=torch.zeros(2)), args=argparse.Namespace(lr=1e-4)), f'{folder}/good.pth')
    torch.save(dict(model=dict(a=torch.zeros(2)), extra=Evil()), f'{folder}/evil.pth')
    good = read_weights(f'{folder}/good.pth')
    try:
        read_weights(f'{folder}/evil.pth')
    except DataError as error:
        refusal = str(error).replace(folder, '')
assert list(good.state) == ['a'] and good.others == ['args'] and 'refused' in refusal
refusal

# %% [markdown]
# ## Which program wrote it?
#
# Some names occur in one kind of file only. The test looks at beginnings of names that many tensors share, so
# that a file in which one tensor is missing or misspelt is still recognised, and the error names the tensor.

# %%
#| export
KINDS = {  # kind -> words for people
    'semi_detr': 'the official Semi-DETR',
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
) -> str:  # a key of KINDS
    "The kind of a state dict; `DataError` if it is none of them"
    has = lambda pattern: any(re.match(pattern, k) for k in state)
    tests = {
        'semi_detr': r'(student|teacher)\.bbox_head\.',
        'hf_deformable_detr': r'model\..*\.encoder_attn\.sampling_offsets\.',
        'hf_detr': r'(class_labels_classifier|bbox_predictor)\.',
        'ours': r'(backbone\.body\.|student$)',
        'dino': r'transformer\.(tgt_embed|enc_out_)',
        'deformable_detr': r'transformer\..*\.sampling_offsets\.',
        'detr': r'(detr\.)?transformer\..*\.multihead_attn\.',
        'backbone': r'(conv1\.weight|layer\d\.|conv_stem\.|stem|blocks?\.|stages?\.|patch_embed)',
    }
    for kind, pattern in tests.items():
        if has(pattern):
            return kind
    first = ', '.join(list(state)[:3])
    raise DataError(f'names such as {first} belong to no program that is known here ({", ".join(tests)})')


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
    "The beginning of a name of theirs and of ours"

    theirs: str
    ours: str
    part: int = None  # 0, 1, 2: query, key or value rows of one of our matrices

    def apply(
        self,
        name: str,
        back: bool = False,  # from ours to theirs
    ) -> str | None:  # None: the rule does not fit; a number without a counterpart becomes 0
        "The other name"
        old, new = (self.ours, self.theirs) if back else (self.theirs, self.ours)
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
theirs = 'transformer.decoder.class_embed.3.bias'
ours = next(new for rule in of_dino if (new := rule.apply(theirs)))
back = next(old for rule in of_dino if (old := rule.apply('class_head.bias', back=True)))
assert (ours, back) == ('class_head.bias', 'class_embed.0.bias')
theirs, ours, back

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
        theirs, ours = f'{p}encoder.stages.{s}.layers.{{b}}.', f'backbone.body.layer{s + 1}.{{b}}.'
        for k in range(3):
            rules.append(Rule(f'{theirs}layer.{k}.convolution.', f'{ours}conv{k + 1}.'))
            rules.append(Rule(f'{theirs}layer.{k}.normalization.', f'{ours}bn{k + 1}.'))
        rules.append(Rule(f'{theirs}shortcut.convolution.', f'{ours}downsample.0.'))
        rules.append(Rule(f'{theirs}shortcut.normalization.', f'{ours}downsample.1.'))
    return rules


def _hf_layer_rules(layer, cross, norms):
    "Rules of the layers of an encoder or a decoder; `norms`: role -> number of our norm"
    theirs, ours = f'model.{layer}.layers.{{i}}.', f'transformer.{layer}.layers.{{i}}.'
    rules = []
    for a, b in (('self_attn', 'self_attn'), ('encoder_attn', cross)):
        for part, letter in enumerate('qkv'):
            rules.append(Rule(f'{theirs}{a}.{letter}_proj.', f'{ours}{b}.in_proj_', part))
        rules.append(Rule(f'{theirs}{a}.out_proj.', f'{ours}{b}.out_proj.'))
        rules.append(Rule(f'{theirs}{a}.o_proj.', f'{ours}{b}.out_proj.'))
        rules.append(Rule(f'{theirs}{a}.', f'{ours}{b}.'))
    for n in (1, 2):
        rules += [Rule(f'{theirs}{p}fc{n}.', f'{ours}linear{n}.') for p in ('', 'mlp.')]
    return rules + [Rule(f'{theirs}{role}_layer_norm.', f'{ours}norm{n}.') for role, n in norms.items()]


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
    if kind == 'semi_detr':
        return _semi_detr_rules(network)
    if kind.startswith('hf_'):
        return _hf_rules(kind, form or form_of(state), state)
    return _original_rules(kind, form or form_of(state))


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

    def count(self, status: str) -> int:
        "Number of tensors with a status"
        return sum(row.status == status for row in self.rows)

    def __str__(self) -> str:
        states = ('matched', 'renamed', 'joined', 'copy', 'unused')
        counts = ', '.join(f'{self.count(s)} {s}' for s in states if self.count(s))
        head = f'{self.origin}: {len(self.rows)} tensors of {KINDS[self.kind]}: {counts}; none missing'
        unused = [f'unused: {r.key} ({r.why})' for r in self.rows if r.status == 'unused']
        more = [f'... and {len(unused) - 3} more unused, see report.json'] if len(unused) > 3 else []
        return '\n'.join([head, *unused[:3], *more, *self.notes])

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

# %% [markdown]
# ## Settings from shapes
#
# Sizes are read off from the tensors: classes from the rows of the class head, layers from the numbers in the
# names, the points $K$ from the rows of a sampling head with $M$ heads and $L$ levels,
#
# $$
# \text{rows} = 2MLK
# $$ {#eq-weights-points}
#
# and the strides from the widths of the maps that `input_proj` takes. Three things leave no trace: $M$ (8 in
# all releases; a `config.json` tells it), a dilated last stage (DC5), and dropout.

# %%
#| export
RESNETS = {  # (blocks per stage, convolutions per block) -> name
    (2, 2, 2, 2, 2): 'resnet18',
    (3, 4, 6, 3, 2): 'resnet34',
    (3, 4, 6, 3, 3): 'resnet50',
    (3, 4, 23, 3, 3): 'resnet101',
}


def _numbers(names, pattern):
    "One more than the largest number that `pattern` finds in names"
    found = [int(m[1]) for k in names if (m := re.match(pattern, k))]
    return max(found) + 1 if found else 0


def backbone_of(
    shapes: dict,  # our names -> shape
    origin: str = '',  # for the error
    dilated: bool = False,  # is its last stage dilated (DC5)?
) -> BackboneConfig:
    "Which ResNet, and which strides it hands out"
    blocks = [_numbers(shapes, rf'backbone\.body\.layer{s}\.(\d+)\.') for s in (1, 2, 3, 4)]
    convolutions = 3 if any(re.match(r'backbone\.body\.layer\d\.\d+\.conv3\.', k) for k in shapes) else 2
    name = RESNETS.get((*blocks, convolutions))
    if name is None:
        known = ', '.join(RESNETS.values())
        raise DataError(f'{origin}: a backbone of {blocks} blocks is none of {known}; give `backbone`')
    width = 64 * (4 if convolutions == 3 else 1)
    stride = {width * 2**i: 4 * 2**i for i in range(4)}
    maps = [shape for k, shape in shapes.items() if re.match(r'input_proj\.(\d+\.0\.)?weight$', k)]
    widths = [s[1] for s in maps if len(s) == 4 and s[2] == 1]
    if not widths or any(w not in stride for w in widths):
        raise DataError(f'{origin}: input_proj takes maps of width {widths}, {name} has {list(stride)}')
    strides = tuple(stride[w] for w in widths)
    if dilated and strides != (32,):
        raise DataError(f'{origin}: a dilated backbone (DC5) with several maps; it needs one')
    if dilated:
        return BackboneConfig(f'{name}_dc5', out_strides=(16,))
    return BackboneConfig(name, out_strides=strides)


# %%
#| export
class _Shapes(dict):
    "Shapes by our names; a missing one is an error that names it as the file would"

    def __init__(self, state, rules, origin):
        super().__init__({k: tuple(v.shape) for k, v in state.items()})
        self.rules, self.origin = rules, origin

    def __missing__(self, name):
        raise DataError(f'{self.origin}: missing {their_name(name, self.rules)}; fetch the file again')


def their_name(
    name: str,  # ours
    rules: list,  # of `Rule`
) -> str:
    "How a file would call a tensor of ours"
    return next((old for r in rules if (old := r.apply(name, back=True)) is not None), name)


def infer_settings(
    kind: str,  # a detector of KINDS
    shapes: dict,  # our names -> shape
    form: str = None,  # of Deformable-DETR
    heads: int = 8,  # M
    backbone: BackboneConfig = None,  # None: from the names
    dilated: bool = False,  # its last stage (DC5)
    origin: str = '',  # for errors
):  # settings of the detector
    "The settings of the network that has these tensors"
    backbone = backbone or backbone_of(shapes, origin, dilated)
    encoder = _numbers(shapes, r'transformer\.encoder\.layers\.(\d+)\.')
    layers = _numbers(shapes, r'transformer\.decoder\.layers\.(\d+)\.')
    ffn, d = shapes['transformer.decoder.layers.0.linear1.weight']
    if kind in ('detr', 'hf_detr'):
        from semidetr.detectors.detr import DETRConfig

        queries, more = shapes['query_embed.weight'][0], {}
        if encoder != layers:
            more = dict(enc_layers=encoder)
        sizes = dict(d_model=d, heads=heads, layers=layers, ffn=ffn, **more)
        return DETRConfig(shapes['class_embed.weight'][0] - 1, backbone, **sizes, num_queries=queries)
    levels = _numbers(shapes, r'input_proj\.(\d+)\.')
    offsets = shapes['transformer.decoder.layers.0.cross_attn.sampling_offsets.weight'][0]
    points = offsets // (2 * heads * levels)
    if kind in ('deformable_detr', 'hf_deformable_detr'):
        if encoder != layers:
            raise DataError(
                f'{origin}: {encoder} layers of the encoder, {layers} of the decoder; must be equal'
            )
        sizes = dict(d_model=d, levels=levels, heads=heads, points=points, layers=layers, ffn=ffn)
        queries = 300 if form == 'two_stage' else shapes['query_embed.weight'][0]
        classes = shapes['class_embed.0.weight'][0]
        return DeformableDETRConfig(classes, backbone, **sizes, num_queries=queries, form=form)
    sizes = dict(d_model=d, n_heads=heads, n_levels=levels, n_points=points, ffn=ffn)
    queries = shapes['transformer.query_content.weight'][0]
    transformer = TransformerConfig(
        **sizes, enc_layers=encoder, dec_layers=layers, num_queries=queries, select_invalid=True
    )
    denoising = DenoisingConfig(label_rows=shapes['label_enc.weight'][0])
    return DetectorConfig(shapes['class_head.weight'][0], backbone, transformer, denoising)


# %% [markdown]
# ## Conversion
#
# The network of the settings is built without memory (on the device `meta`), and its names and shapes are
# compared with those of the file. Whatever does not fit is listed; there is no partial result.

# %%
#| export
@dataclass
class Converted:
    "Weights under our names"

    settings: object  # of the detector
    state: dict  # of the detector; of the official Semi-DETR: of its student
    report: Report
    teacher: dict = None  # of the official Semi-DETR
    parts: dict = None  # likewise: what its method trains beside the networks, the projector


def wanted_shapes(
    settings,  # of a detector
) -> dict:  # name -> shape
    "Tensors of the network of some settings, without memory for them"
    with torch.device('meta'):
        return {k: tuple(v.shape) for k, v in build_detector(settings.untrained()).state_dict().items()}


def _complain(origin, kind, faults, about=''):
    "One line for everything that does not fit"
    more = f' and {len(faults) - 5} more' if len(faults) > 5 else ''
    raise DataError(
        f'{origin}: not the weights of {KINDS[kind]}{about}, {len(faults)} mismatches: '
        f'{"; ".join(faults[:5])}{more}; fetch the file again'
    )


def _compare(state, wanted, rules, sources):
    "Sentences about tensors that are missing, unknown or of another shape, under the names of the file"
    faults = [f'missing {their_name(k, rules)}' for k in wanted if k not in state]
    for name, value in state.items():
        key = sources.get(name, name)
        if name not in wanted:
            faults.append(f'unknown {key}')
        elif tuple(value.shape) != tuple(wanted[name]):
            faults.append(f'{key} is {tuple(value.shape)}, not {tuple(wanted[name])}')
    return faults


def _convert_network(state, kind, rules, origin, settings=None, form=None, **known):
    "(settings, tensors, rows, filled) of one network"
    renamed, rows, faults = rename(state, rules)
    if faults:
        _complain(origin, kind, faults)
    shapes, filled = _Shapes(renamed, rules, origin), []
    if form:
        layers = _numbers(renamed, r'transformer\.decoder\.layers\.(\d+)\.')
        filled = fill_heads(renamed, form, layers)
        shapes.update({k: tuple(v.shape) for k, v in renamed.items()})
    if settings is None:
        settings = infer_settings(kind, shapes, form, origin=origin, **known)
    wanted = wanted_shapes(settings)
    for row in rows:
        if row.name.endswith(COUNTER) and row.name not in wanted:
            renamed.pop(row.name, None)
            row.status, row.name, row.why = 'unused', '', 'counter of a batch norm that is frozen here'
    faults = _compare(renamed, wanted, rules, {r.name: r.key for r in rows[::-1]})
    if faults:
        about = f' ({settings.num_classes} classes, width {settings.d_model})'
        _complain(origin, kind, faults, about)
    return settings, renamed, rows, filled


# %%
#| export
def _convert_semi_detr(state, origin, settings, **known):
    "Student, teacher and projector"
    groups = dict(student={}, teacher={}, projector={})
    for key, value in state.items():
        group = key.split('.')[0]
        if group not in groups:
            raise DataError(f'{origin}: unknown {key}; names start with {", ".join(groups)}')
        groups[group][key] = value
    report, networks = Report('semi_detr', origin), {}
    for network in ('student', 'teacher'):
        if not groups[network]:
            raise DataError(f'{origin}: missing {network}.*; give the whole checkpoint, with both networks')
        rules = rules_of('semi_detr', state, network=network)
        settings, networks[network], rows, _ = _convert_network(
            groups[network], 'semi_detr', rules, origin, settings, **known
        )
        report.rows += rows
    parts, rows = _projector(groups['projector'], origin, settings.d_model)
    report.rows += rows
    report.notes.append('training goes on from its student, its teacher and its projector')
    return Converted(settings, networks['student'], report, networks['teacher'], parts)


def _projector_shapes(d, hidden):
    "Names and shapes of the projector in the state of a method: two convolutions, two linear layers"
    shapes = {f'convs.{i}.weight': (d, d, 3, 3) for i in (0, 1)}
    for i, width in enumerate((d, d, hidden)):
        for name in ('weight', 'bias', 'running_mean', 'running_var'):
            shapes[f'norms.{i}.{name}'] = (width,)
        shapes[f'norms.{i}.{COUNTER}'] = ()
    shapes |= {'fc1.weight': (hidden, 49 * d), 'fc1.bias': (hidden,)}
    shapes |= {'fc2.weight': (d, hidden), 'fc2.bias': (d,)}
    return {f'projector.{name}': shape for name, shape in shapes.items()}


def _projector(state, origin, d_model):
    "(tensors under the names of the method's state, rows) of the projector"
    rules = rules_of('semi_detr', state, network='projector')
    renamed, rows, faults = rename(state, rules)
    if not state:
        raise DataError(f'{origin}: missing projector.*; give the whole checkpoint')
    shapes = _Shapes(renamed, rules, origin)
    wanted = _projector_shapes(d_model, shapes['projector.fc1.weight'][0])
    faults += _compare(renamed, wanted, rules, {r.name: r.key for r in rows})
    if faults:
        _complain(origin, 'semi_detr', faults)
    return renamed, rows


# %%
#| export
def _from_config(config, origin):
    "What a config.json of `transformers` tells: form, heads, queries, dilated; unknown parts are an error"
    backbone = config.get('backbone_config') or {}
    if config.get('position_embedding_type', 'sine') != 'sine':
        raise DataError(f'{origin}: its position codes are learned, here they are sines; not supported')
    if config.get('activation_function', 'relu') != 'relu':
        raise DataError(f"{origin}: activation '{config['activation_function']}', here relu; not supported")
    form = 'refine' if config.get('with_box_refine') else 'plain'
    return dict(
        form='two_stage' if config.get('two_stage') else form,
        heads=config.get('decoder_attention_heads'),
        queries=config.get('num_queries'),
        dilated=bool(config.get('dilation')) or backbone.get('output_stride') == 16,
    )


def convert(
    state: dict,  # name -> tensor
    config: dict = None,  # content of a config.json of `transformers`
    settings=None,  # of the detector; None: read off from names and shapes
    origin: str = 'the weights',  # for messages
    heads: int = None,  # M; None: as `config` says, or 8
    backbone: BackboneConfig = None,  # None: read off
    dilated: bool = None,  # is the last stage of the backbone dilated (DC5)? None: as `config` says, or no
) -> Converted:
    "Give weights our names, completely; `DataError` names a tensor that is missing, unknown or does not fit"
    kind, told = recognise(state), _from_config(config, origin) if config else {}
    if kind == 'backbone':
        raise DataError(f'{origin}: a backbone alone; give it as detector.backbone.weights={origin}')
    if kind == 'ours':
        raise DataError(f'{origin}: has our names already; give the folder of its run')
    known = dict(heads=heads or told.get('heads') or 8, backbone=backbone)
    if kind == 'semi_detr':
        return _convert_semi_detr(state, origin, settings, **known)
    known['dilated'] = told.get('dilated', False) if dilated is None else dilated
    is_deformable = kind in ('deformable_detr', 'hf_deformable_detr')
    form = (told.get('form') or form_of(state)) if is_deformable else None
    rules = rules_of(kind, state, form)
    found, renamed, rows, filled = _convert_network(state, kind, rules, origin, settings, form, **known)
    report = Report(kind, origin, rows, filled)
    if settings is not None:
        return Converted(found, renamed, report)
    if form == 'two_stage':
        found = replace(found, num_queries=told.get('queries') or 300)
        if not told.get('queries'):
            report.notes.append('two-stage weights do not tell the number of queries: 300 as in the release')
    if not (heads or told.get('heads')):
        report.notes.append('weights do not tell the number of attention heads: 8 as in the releases')
    if dilated is None and not told and known['backbone'] is None and len(found.backbone.out_strides) == 1:
        report.notes.append('weights do not tell a dilated last stage (DC5): taken as not dilated')
    return Converted(found, renamed, report)


# %% [markdown]
# A detector of ours under the original names, and back:

# %%
torch.manual_seed(0)
source_settings = replace(deformable_detr_small(3, 'two_stage').untrained(), layers=2, num_queries=300)
source_state = build_detector(source_settings).state_dict()
as_original = {k.replace('backbone.body.', 'backbone.0.body.'): v for k, v in source_state.items()}
as_original |= {
    f'transformer.decoder.{k}': v for k, v in as_original.items() if '_embed.' in k and k[0] in 'cb'
}
converted = convert(as_original, settings=source_settings)
assert all(torch.equal(v, source_state[k]) for k, v in converted.state.items())
assert converted.report.count('copy') == 24 and len(converted.state) == len(source_state)
misspelt = {k.replace('pos_trans_norm.bias', 'pos_trans_norm.bais'): v for k, v in as_original.items()}
try:
    convert(misspelt, settings=source_settings)
except DataError as error:
    fault = str(error)
assert (
    'missing transformer.pos_trans_norm.bias' in fault and 'unknown transformer.pos_trans_norm.bais' in fault
)
fault

# %% [markdown]
# ## Rows of classes
#
# A class head has one row per class, and the number of a row means nothing but its place in a list of names.
# Two data sets order their classes differently, one has a class more, and a network that keeps its rows then
# predicts the wrong names with high scores. Rows are therefore moved by name. Let $\rho$ map a new class to the
# old one of the same name. Then
#
# $$
# W'_{c} = \begin{cases} W_{\rho(c)} & c \text{ has an old class of its name} \\ \text{untrained} &
# \text{otherwise} \end{cases}
# $$ {#eq-weights-rows}
#
# for class heads of all layers and of the encoder, their biases, and the label table of denoising. The last
# row of a softmax detector, *no object*, stays the last one.

# %%
#| export
CLASS_ROWS = r'(class_head|enc_class_head|class_embed(\.\d+)?)\.(weight|bias)$|label_enc\.weight$'


def map_class_rows(
    state: dict,  # of a detector; our names
    old_classes: list,  # names of its rows
    new_classes: list,  # names of the wanted rows
    fresh: dict = None,  # state of an untrained detector with the new classes; needed for new ones
) -> tuple:  # (state with the new rows, sentences about what changed)
    "Move the rows of classes by name (@eq-weights-rows); the same tensors where the names are the same"
    old_classes, new_classes = list(old_classes), list(new_classes)
    if old_classes == new_classes:
        return state, []
    names = [k for k in state if re.match(CLASS_ROWS, k)]
    if not names:
        raise DataError('no tensor with class rows is known in these weights; train with their own classes')
    place = {name: i for i, name in enumerate(old_classes)}
    kept = [c for c in new_classes if c in place]
    added = [c for c in new_classes if c not in place]
    if added and fresh is None:
        raise DataError(f"class '{added[0]}' is new: an untrained detector is needed for its row")
    out = dict(state)
    for key in names:
        out[key] = _moved(key, state[key], place, new_classes, None if fresh is None else fresh[key])
    return out, [_sentence(old_classes, new_classes, kept, added)]


def _moved(key, old, place, new_classes, fresh):
    "One tensor with its rows at their new places"
    has_background = not key.startswith('label_enc') and len(old) == len(place) + 1
    others = list(range(len(place), len(old)))  # no object, or rows that no class uses
    if fresh is None:
        size = len(new_classes) + len(others)
        fresh = old.new_zeros(size, *old.shape[1:])
    new = fresh.detach().to(old.dtype).clone()
    for i, name in enumerate(new_classes):
        if name in place:
            new[i] = old[place[name]]
    if has_background:
        new[len(new_classes)] = old[len(place)]
    elif key.startswith('label_enc'):
        for i, j in zip(range(len(new_classes), len(new)), others):
            new[i] = old[j]
    return new


def _sentence(old, new, kept, added):
    "What happened to the rows, in one line"
    lost = [c for c in old if c not in new]
    text = f'classes: {len(kept)} of {len(new)} rows by name'
    if added:
        text += f'; new, untrained: {", ".join(added[:5])}{" ..." if len(added) > 5 else ""}'
    if lost:
        text += f'; left out: {", ".join(map(str, lost[:5]))}{" ..." if len(lost) > 5 else ""}'
    return text


# %%
old_head = {'class_head.weight': torch.eye(3), 'class_head.bias': torch.tensor([1.0, 2.0, 3.0])}
untrained = {'class_head.weight': torch.zeros(3, 3), 'class_head.bias': torch.full((3,), -4.6)}
moved, notes = map_class_rows(old_head, ['cat', 'dog', 'cow'], ['cow', 'cat', 'owl'], untrained)
assert moved['class_head.bias'].tolist()[:2] == [3.0, 1.0] and 'owl' in notes[0] and 'dog' in notes[0]
notes

# %%
#| label: fig-weights-rows
#| fig-cap: "Rows of a class head before and after: `cow` and `cat` move with their names, `owl` is untrained, `dog` is left out."
#| fig-alt: "Two 3x3 matrices side by side; the rows of the second are the third and the first of the other, and an empty one."
fig, axes = plt.subplots(1, 2, figsize=(4, 1.8), dpi=80, layout='constrained')
panels = ((old_head, ['cat', 'dog', 'cow'], 'in the file'), (moved, ['cow', 'cat', 'owl'], 'for the data'))
for ax, (head, labels, title) in zip(axes, panels):
    ax.imshow(head['class_head.weight'], cmap='Greys', vmin=0, vmax=1.5)
    ax.set_yticks(range(3), labels)
    ax.set_xticks([])
    ax.set_title(title)
plt.show()

# %% [markdown]
# ## The ids of COCO
#
# The releases trained on COCO have a row for each category id up to 90, ten of which no image uses; row 0
# is not used either. Data sets number the 80 classes without gaps.

# %%
#| export
COCO_CLASSES = tuple(
    'person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,'
    'parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,'
    'tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,'
    'tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,'
    'hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,'
    'keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,'
    'hair drier,toothbrush'.split(',')
)
COCO_UNUSED = (0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83)  # ids below 91 without images
VOC_CLASSES = tuple(
    'aeroplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,diningtable,dog,horse,motorbike,person,'
    'pottedplant,sheep,sofa,train,tvmonitor'.split(',')
)


def coco_id_names() -> list:  # 91 names; 'N/A' where no image has the id
    "Names of the rows of a head that is indexed by category ids"
    names, used = ['N/A'] * 91, [i for i in range(91) if i not in COCO_UNUSED]
    for i, name in zip(used, COCO_CLASSES):
        names[i] = name
    return names


def row_names(
    rows: int,  # of the class head, without no object
    known: list = None,  # names that the file or the user gives
    origin: str = '',  # for the error
) -> tuple:  # (name of each row; 'N/A': not used, sentences about what was assumed)
    "Names of the rows of a class head"
    if known and list(known) == list(COCO_CLASSES) and rows == 91:
        return coco_id_names(), []
    if known and len(known) != rows:
        raise DataError(f'{origin}: {rows} rows of classes, but {len(known)} names; give one name per row')
    if known:
        return list(known), []
    guesses = {91: (coco_id_names(), 'ids of COCO'), 80: (COCO_CLASSES, 'COCO'), 20: (VOC_CLASSES, 'VOC')}
    if rows in guesses:
        names, what = guesses[rows]
        return list(names), [f'no names of classes in the file: {rows} rows taken as those of {what}']
    names = [f'class {i}' for i in range(rows)]
    return names, [f"no names of classes in the file: called 'class 0' to 'class {rows - 1}'; give `classes`"]


# %%
by_id = coco_id_names()
assert (
    len(COCO_CLASSES) == 80
    and by_id[1] == 'person'
    and by_id[90] == 'toothbrush'
    and by_id[13] == 'stop sign'
)
row_names(91)[1]

# %% [markdown]
# ## Summary
#
# - Files are read without running code; a pickle that needs more is refused.
# - Every tensor of a file is renamed, joined, a copy, or unused for a stated reason; otherwise the import stops
#   and names it.
# - Settings are read off from shapes; what leaves no trace is said.
# - Rows of classes move by name; new classes start untrained.
#
# ## Exercises
#
# 1. Which settings of a DINO could be wrong although all names and shapes fit?
# 2. Write the rules of a detector that you know from another program, and their inverse.
# 3. A file holds `class_embed.0` and `class_embed.3` alone. What should an import do, and why?
