# %% [markdown]
# # Start from a backbone you have {#sec-backbone-weights}
#
# > Put a classifier of torchvision or timm under a detector, with a word on every tensor.
#
# *Why.* Most published weights are classifiers: a ResNet of torchvision, a network of timm. A detector uses the
# part of them that gives feature maps and has no place for the rest, so a careless loader cannot tell a layer
# that is rightly left out from one that it failed to find. Here the file is compared with the whole classifier
# first: what the classifier lacks is an error, and only then is the part of the detector taken.

# %%
#| default_exp detectors.backbone_weights

# %%
#| hide
import warnings

warnings.filterwarnings('ignore', message='IProgress')

# %%
#| export
import torch
import torchvision
from semidetr.core import ConfigError, DataError
from semidetr.detectors.backbone import HEADS, _plain, _timm
from semidetr.detectors.contract import build_detector
from semidetr.detectors.weight_names import COUNTER, Report, Row, Rule, _reason, foreign_name
from semidetr.detectors.weights import RESNETS, Converted, _numbers

# %%
import matplotlib.pyplot as plt
from semidetr.detectors.backbone import _read_state, lite0_weights, match_by_order
from semidetr.detectors.from_detr import named_detector


# %% [markdown]
# ## Which network?
#
# timm writes the name of the network next to the weights: `architecture` in the `config.json` of a folder,
# `arch` in a checkpoint of its training. Without such a name two families show in the tensors: a ResNet has
# its number of blocks per stage, an EfficientNet-Lite has a stem, blocks and no *squeeze and excitation*. For
# all others the user names the network, as `timm:NAME`.
#
# The ResNets of both libraries are the same functions. EfficientNet-Lite0 is not: with TensorFlow's padding
# (`tf_efficientnet_lite0`) and without (`efficientnet_lite0`) it has the same names and shapes, and no file
# tells which. The one with published weights is assumed, and the report says so.

# %%
#| export
def whole_network(
    name: str,  # of a `BackboneConfig`
) -> torch.nn.Module:
    "The classifier that a backbone is cut from, with random weights"
    if name.startswith('timm:'):
        return _timm().create_model(name.removeprefix('timm:'))
    if name == 'efficientnet_lite0':
        return _timm().create_model('tf_efficientnet_lite0')
    return getattr(torchvision.models, name.removesuffix('_dc5'))()


def _of_architecture(architecture):
    "Our name of a network of timm; '' if timm has none of this name"
    name = architecture.split('.')[0]
    if name in RESNETS.values():
        return name
    if name == 'tf_efficientnet_lite0':
        return 'efficientnet_lite0'
    return f'timm:{name}' if name and _timm().is_model(name) else ''


def recognise_backbone(
    state,  # names of tensors
    architecture: str = '',  # as timm wrote it
    origin: str = '',  # for the error
) -> tuple:  # (name of a `BackboneConfig`, sentences about what was assumed)
    "Which backbone has these tensors; `DataError` asks for its name"
    if name := _of_architecture(architecture):
        return name, []
    names = [k.removeprefix('backbone.') for k in state]
    blocks = [_numbers(names, rf'layer{s}\.(\d+)\.') for s in (1, 2, 3, 4)]
    convolutions = 3 if any(k.startswith('layer') and '.conv3.' in k for k in names) else 2
    name = RESNETS.get((*blocks, convolutions))
    if name and 'conv1.0.weight' not in names:
        return name, []
    is_lite = any(k.startswith(('conv_stem.', '_conv_stem.', 'blocks.', '_blocks.')) for k in names)
    if is_lite and not any('.se.' in k or '_se_' in k for k in names):
        assumed = (
            'taken as tf_efficientnet_lite0; that of timm without this padding is timm:efficientnet_lite0'
        )
        is_timm = any(k.startswith('blocks.') for k in names)
        return 'efficientnet_lite0', [assumed] if is_timm else []
    raise DataError(f'{origin}: the names do not tell which backbone this is; name it: --backbone timm:NAME')


# %%
blocks = {f'layer{s}.{b}.conv3.weight': () for s, n in enumerate((3, 4, 23, 3), 1) for b in range(n)}
assert recognise_backbone(blocks) == ('resnet101', [])
assert recognise_backbone(['stem.0.weight'], 'convnext_atto.d2_in1k')[0] == 'timm:convnext_atto'
recognise_backbone(['conv_stem.weight', 'blocks.0.0.conv_dw.weight'])

# %% [markdown]
# ## Names of EfficientNet-Lite0
#
# The package that carries the weights of Lite0 numbers its sixteen blocks through, while timm counts stages and
# blocks of a stage. @sec-backbone matches the two by their order. A table of rules can do more: it names a tensor
# that is missing.

# %%
#| export
LITE0_BLOCKS = (1, 2, 2, 3, 3, 4, 1)  # blocks of each stage
_FIRST = dict(_depthwise_conv='conv_dw', _bn1='bn1', _project_conv='conv_pw', _bn2='bn2')
_OTHERS = dict(_expand_conv='conv_pw', _bn0='bn1', _depthwise_conv='conv_dw', _bn1='bn2')
_OTHERS |= dict(_project_conv='conv_pwl', _bn2='bn3')
_ENDS = dict(_conv_stem='conv_stem', _bn0='bn1', _conv_head='conv_head', _bn1='bn2', _fc='classifier')


def lite0_rules() -> list:  # of `Rule`
    "From the names of the package with the weights of EfficientNet-Lite0 to those of timm"
    rules = [Rule(f'{a}.', f'{b}.') for a, b in _ENDS.items()]
    n = 0
    for stage, count in enumerate(LITE0_BLOCKS):
        for block in range(count):
            for a, b in (_OTHERS if stage else _FIRST).items():
                rules.append(Rule(f'_blocks.{n}.{a}.', f'blocks.{stage}.{block}.{b}.'))
            n += 1
    return rules


def _named(key, rules):
    "The name by rules; unchanged if none fits"
    return next((new for r in rules if (new := r.apply(key)) is not None), key)


# %%
package = _read_state(lite0_weights())
lite0_settings = named_detector('dino').small(3)
by_order = match_by_order(whole_network('efficientnet_lite0'), package)
assert all(_named(key, lite0_rules()) == name for key, name in zip(package, by_order))
list(zip(package, by_order))[42]


# %% [markdown]
# ## Conversion
#
# Let $F$ be the names in the file, $W$ those of the whole classifier, $H \subset W$ the ones behind its last
# map, and $D \subset W \setminus H$ the ones that the detector uses. A file is complete if
#
# $$
# W \setminus H \subseteq F \subseteq W
# $$ {#eq-backbone-weights-complete}
#
# and all shapes outside $H$ agree; counters of batch norms may be absent, as in older files. Then $F \cap D$ is
# taken and the rest is reported as unused. The detector's other tensors, *fresh* in the report, are random.

# %%
#| export
def _needed(cfg, whole):
    "Plain names of what a file must hold: all but the head for classes"
    if cfg.name.startswith('timm:'):
        maps = _timm().create_model(cfg.name.removeprefix('timm:'), features_only=True)
        return {_plain(k) for k in maps.state_dict()}
    return {_plain(k) for k in whole if not k.startswith(HEADS)}


def _networks(settings, origin):
    "State of a fresh detector and of the whole classifier; the same in each call"
    name = settings.backbone.name
    if name.startswith('timm:') and not _timm().is_model(name.removeprefix('timm:')):
        raise ConfigError(
            f"{origin}: timm has no model '{name.removeprefix('timm:')}'; see timm.list_models()"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_detector(settings.untrained())
        return model.state_dict(), whole_network(name).state_dict()


def _verdict(name, value, wanted, needed, own, last):
    "(status, reason) of a tensor; status 'fault': the reason completes a sentence that begins with its name"
    if name not in needed:
        return 'unused', 'head for classes'
    if value.shape != wanted.shape:
        return 'fault', f'is {tuple(value.shape)}, not {tuple(wanted.shape)}'
    if wanted.is_floating_point() and not value.is_floating_point():
        return 'fault', f'has whole numbers ({value.dtype}), not weights'
    if name in own:
        return 'renamed', ''
    counter = _plain(COUNTER)
    if name.endswith(counter) and name.replace(counter, 'running.mean') in own:
        return 'unused', 'counter of a batch norm that is frozen here'
    return 'unused', f'layer behind the last map in use, stride {last}'


# %%
#| export
def convert_backbone(
    state: dict,  # name -> tensor, of a classifier or of its part without head
    settings,  # of the detector, with the backbone's name and the number of classes
    origin: str = 'the weights',  # for messages
) -> Converted:
    "A fresh detector on this backbone; `DataError` names what is missing, unknown or does not fit"
    cfg, rows, faults = settings.backbone, [], []
    fresh, whole = _networks(settings, origin)
    rules = lite0_rules() if cfg.name == 'efficientnet_lite0' else []
    start = 'backbone.' if all(k.startswith('backbone.') for k in state) else ''
    names = {_plain(k): k for k in whole}
    needed = _needed(cfg, whole)
    own = {_plain(k.removeprefix('backbone.body.')): k for k in fresh if k.startswith('backbone.body.')}
    found = {}
    for key, value in state.items():
        name, shape = _plain(_named(key.removeprefix(start), rules)), tuple(value.shape)
        if why := _reason(key):
            rows.append(Row(key, shape, 'unused', '', why))
            continue
        if name not in names or name in found:
            faults.append(f'{key} is there twice' if name in found else f'unknown {key}')
            continue
        found[name] = value
        status, why = _verdict(name, value, whole[names[name]], needed, own, cfg.out_strides[-1])
        if status == 'fault':
            faults.append(f'{key} {why}')
        rows.append(Row(key, shape, status, own[name] if status == 'renamed' else '', why))
    is_package = '_conv_stem.weight' in state or any(k.startswith('_blocks.') for k in state)
    for name, key in names.items():
        if name in needed and name not in found and not key.endswith(COUNTER):
            faults.append(f'missing {start}{foreign_name(key, rules) if is_package else key}')
    if faults:
        _refuse(origin, cfg.name, faults)
    taken = {own[name]: value for name, value in found.items() if name in own and name in needed}
    report = Report('backbone', origin, rows, fresh=[k for k in fresh if k not in taken])
    return Converted(settings, fresh | taken, report)


def _refuse(origin, name, faults):
    "One line for everything that does not fit"
    more = f' and {len(faults) - 5} more' if len(faults) > 5 else ''
    raise DataError(
        f'{origin}: not the weights of {name}, {len(faults)} mismatches: {"; ".join(faults[:5])}{more}; '
        'fetch the file again, or name its network: --backbone timm:NAME'
    )


# %% [markdown]
# The weights of Lite0 under a small DINO: stages 5 and 6 lie behind its last map of stride 16.

# %%
converted = convert_backbone(package, lite0_settings, 'lite0.pth')
report, network = converted.report, build_detector(lite0_settings.untrained())
network.load_state_dict(converted.state)
taken = [row for row in report.rows if row.status == 'renamed']
assert all(torch.equal(network.state_dict()[row.name], package[row.key]) for row in taken)
assert len(report.rows) == len(package) and len(taken) + len(report.fresh) == len(converted.state)
print(report)

# %%
damaged = {k.replace('_blocks.4._bn1.bias', '_blocks.4._bn1.bais'): v for k, v in package.items()}
try:
    convert_backbone(damaged, lite0_settings, 'lite0.pth')
except DataError as error:
    fault = str(error)
assert 'missing _blocks.4._bn1.bias' in fault and 'unknown _blocks.4._bn1.bais' in fault
fault

# %%
#| label: fig-backbone-weights
#| fig-cap: "Numbers in the file of EfficientNet-Lite0 by their use in the small DINO: most lie in the last stages and in the head for classes, which the detector does not have."
#| fig-alt: "Three bars, millions of numbers: used about half a million, later layers about one and a half, head about one and a half."
use = {'used': 0, 'layer': 0, 'head': 0}
for row in report.rows:
    use['used' if row.status == 'renamed' else row.why.split()[0]] += package[row.key].numel() / 1e6
assert abs(sum(use.values()) - sum(v.numel() for v in package.values()) / 1e6) < 1e-6
fig, ax = plt.subplots(figsize=(4, 1.8), dpi=80, layout='constrained')
ax.bar(['used', 'later layers', 'head'], list(use.values()), color='0.5')
ax.set_ylabel('millions')
plt.show()

# %% [markdown]
# ## Summary
#
# - A backbone is recognised by the name that timm wrote or by its tensors; otherwise the user names it.
# - The file is compared with the whole classifier: one tensor missing, renamed or of another shape is an error.
# - The report lists what is used, what is unused and why, and what of the detector is untrained.
# - `import_weights` (@sec-imports) writes the result as a folder that training starts from.
#
# ## Exercises
#
# 1. Which other networks of timm have the same names and shapes but another function?
# 2. A file lacks `fc.weight`. Why is this no error, and when should it be one?
