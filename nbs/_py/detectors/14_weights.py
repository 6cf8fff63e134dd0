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
# | `.pth` of the official Semi-DETR: student, teacher, projector | `official` |
# | folder or `.safetensors` of `transformers`, DETR and Deformable-DETR | `hf_detr`, `hf_deformable_detr` |
# | a ResNet of torchvision, a network of timm | `backbone`: the start of a detector (@sec-backbone-weights) |
# | a run of ours | `ours` |
#
# The way back, `semidetr export RUN --format transformers`, is there for DETR and Deformable-DETR.

# %%
#| default_exp detectors.weights

# %%
#| hide
import warnings

warnings.filterwarnings('ignore', message='IProgress')

# %%
#| export
import re
from dataclasses import dataclass, replace
import torch
from semidetr.core import DataError
from semidetr.detectors.backbone import BackboneConfig
from semidetr.detectors.contract import build_detector
from semidetr.detectors.deformable_detr import DeformableDETRConfig
from semidetr.detectors.denoising import DenoisingConfig
from semidetr.detectors.detector import DetectorConfig
from semidetr.detectors.transformer import TransformerConfig
from semidetr.detectors.weight_names import (
    COUNTER,
    KINDS,
    Report,
    fill_heads,
    form_of,
    foreign_name,
    recognise,
    rename,
    rules_of,
)

# %%
import matplotlib.pyplot as plt
from semidetr.detectors.deformable_detr import deformable_detr_small

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
    present = blocks[: _numbers(shapes, r'backbone\.body\.layer(\d)\.') - 1]  # the last stages may be cut off
    fit = [r for r in RESNETS if r[4] == convolutions and list(r[: len(present)]) == present]
    name = RESNETS[fit[0]] if fit and present else None
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
        raise DataError(f'{self.origin}: missing {foreign_name(name, self.rules)}; fetch the file again')


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
    points, rest = divmod(offsets, 2 * heads * levels)
    if rest:
        raise DataError(f'{origin}: {offsets} sampling offsets do not fit {heads} heads; give heads=M')
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


# %%
blocks = {
    f'backbone.body.layer{s}.{b}.conv3.weight': () for s, n in enumerate((3, 4, 6, 3), 1) for b in range(n)
}
maps = {f'input_proj.{l}.0.weight': (256, w, 1, 1) for l, w in enumerate((512, 1024, 2048))}
seen = backbone_of(blocks | maps | {'input_proj.3.0.weight': (256, 2048, 3, 3)})
assert (seen.name, seen.out_strides) == ('resnet50', (8, 16, 32))
without_stage4 = {k: v for k, v in blocks.items() if 'layer4' not in k}
cut = backbone_of(without_stage4 | {'input_proj.weight': (256, 1024, 1, 1)})
assert (cut.name, cut.out_strides) == ('resnet50', (16,))
seen


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
    faults = [f'missing {foreign_name(k, rules)}' for k in wanted if k not in state]
    for name, value in state.items():
        key = sources.get(name, name)
        if name not in wanted:
            faults.append(f'unknown {key}')
        elif tuple(value.shape) != tuple(wanted[name]):
            faults.append(f'{key} is {tuple(value.shape)}, not {tuple(wanted[name])}')
        elif not (value.is_floating_point() or name.endswith(COUNTER)):
            faults.append(f'{key} has whole numbers ({value.dtype}), not weights')
    return faults


# %%
#| export
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
    report, networks = Report('official', origin), {}
    for network in ('student', 'teacher'):
        if not groups[network]:
            raise DataError(f'{origin}: missing {network}.*; give the whole checkpoint, with both networks')
        rules = rules_of('official', state, network=network)
        settings, networks[network], rows, _ = _convert_network(
            groups[network], 'official', rules, origin, settings, **known
        )
        report.rows += rows
    parts, rows = _projector(groups['projector'], origin, settings.d_model)
    report.rows += rows
    report.notes.append('training goes on from its student, its teacher and its projector')
    return Converted(settings, networks['student'], report, networks['teacher'], parts)


# %%
#| export
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
    rules = rules_of('official', state, network='projector')
    renamed, rows, faults = rename(state, rules)
    if not state:
        raise DataError(f'{origin}: missing projector.*; give the whole checkpoint')
    shapes = _Shapes(renamed, rules, origin)
    wanted = _projector_shapes(d_model, shapes['projector.fc1.weight'][0])
    faults += _compare(renamed, wanted, rules, {r.name: r.key for r in rows})
    if faults:
        _complain(origin, 'official', faults)
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
        queries=config.get('two_stage_num_proposals' if config.get('two_stage') else 'num_queries'),
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
    kind, told = recognise(state, origin), _from_config(config, origin) if config else {}
    if kind == 'backbone':
        raise DataError(
            f'{origin}: a backbone alone; import it with `semidetr import`, or give it as '
            f'detector.backbone.weights={origin}'
        )
    if kind == 'ours':
        raise DataError(f'{origin}: has our names already; give the folder of its run')
    known = dict(heads=heads or told.get('heads') or 8, backbone=backbone)
    if kind == 'official':
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
        report.notes.append(
            'weights do not tell a dilated last stage (DC5): taken as not dilated; with one, give --dilated'
        )
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

# %%
#| label: fig-weights-report
#| fig-cap: "What became of the tensors of the file: matched, renamed, or a copy of another one; none is left."
#| fig-alt: "A bar for each of matched, renamed, joined, copy and unused, with the number of tensors."
states = ['matched', 'renamed', 'joined', 'copy', 'unused']
counts = [converted.report.count(s) for s in states]
assert sum(counts) == len(as_original)
fig, ax = plt.subplots(figsize=(4, 1.8), dpi=80, layout='constrained')
ax.bar(states, counts, color='0.5')
ax.set_ylabel('tensors')
plt.show()

# %% [markdown]
# ## Summary
#
# - Every tensor of a file is renamed, joined, a copy, or unused for a stated reason; otherwise the import stops
#   and names it.
# - Settings are read off from shapes; what leaves no trace is said.
# - `import_weights` (@sec-imports) writes the result as a run.
#
# ## Exercises
#
# 1. Which settings of a DINO could be wrong although all names and shapes fit?
# 2. Why is the network built without memory, and not compared with one that is filled with random weights?
