# %% [markdown]
# # Take a trained detector elsewhere {#sec-export}
#
# > Write the weights of a run as one safe file, or as a folder that the library transformers loads.
#
# *Why.* A checkpoint (@sec-checkpoint) holds what training needs: two networks, moments, random states. To
# use a detector, one network, its settings and the class names are enough, in a file that runs no code when
# it is read. And a program that already works with `transformers` can load a detector without this package.
#
# | format | what it is | read by |
# |---|---|---|
# | `safetensors` | one network, its settings and classes | this package, safetensors |
# | `transformers` | a folder: settings, weights, preprocessing | `from_pretrained` |
# | `onnx` | the computation as a graph (@sec-onnx) | onnxruntime and other engines |
# | `torch` | a program of `torch.export` (@sec-onnx) | torch, without this package |
#
# The first two are the subject of this chapter. They hold weights; the program that uses them is elsewhere.

# %%
#| default_exp train.export

# %%
#| hide
import warnings

warnings.filterwarnings('ignore', message='IProgress')

# %%
#| export
import json
import re
from dataclasses import replace
from pathlib import Path
import torch
from semidetr.core import ConfigError, DataError, atomic_write, need
from semidetr.detectors.deformable_detr import DeformableDETRConfig
from semidetr.detectors.detr import DETRConfig
from semidetr.detectors.group import for_inference
from semidetr.detectors.pyramid import PyramidDetector
from semidetr.detectors.weight_names import COUNTER, foreign_name, rules_of
from semidetr.train.exported import SAFE_FORMAT, description
from semidetr.train.predict import load_model

# %%
#| hide
import dataclasses
import tempfile
import matplotlib.pyplot as plt
from semidetr.detectors.backbone import BackboneConfig
from semidetr.detectors.contract import build_detector
from semidetr.train.checkpoint import save_checkpoint
from semidetr.train.config import Config, override, preset, to_dict
from semidetr.train.run_data import resolve


# %% [markdown]
# ## Where it goes
#
# An export takes time and may be all that is left of a run, so nothing is overwritten unless asked for.

# %%
#| export
def output_path(
    run,  # folder of a run, or its .pt file
    name: str,  # of the file or folder to write, if `out` is None
    out=None,  # where to write; None: `name` in the folder of the run
    overwrite: bool = False,  # replace what is there
) -> Path:
    "Where an export goes; `ConfigError` if something is there already, `DataError` if there is no run"
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    path = folder / name if out is None else Path(out)
    if not Path(run).exists():
        raise DataError(f'{run}: no checkpoint here; give the folder of a run or a .pt file')
    if path.exists() and not overwrite:
        raise ConfigError(f'{path}: exists already; choose another output, or overwrite=True to replace it')
    return path


def refuse_assigned(
    model,  # a detector
    run,  # where it comes from, for the message
    format: str,  # that is to be written
):
    "`ConfigError` for a detector whose suppression is part of it (@sec-pyramid)"
    if isinstance(model, PyramidDetector):
        name = type(model).__name__
        raise ConfigError(
            f'{run}: {name} suppresses boxes inside, which {format} cannot hold; use safetensors'
        )


def _plain_tensors(state):
    "Copies that share no memory, as a safetensors file wants them"
    return {name: t.detach().cpu().contiguous().clone() for name, t in state.items()}


# %% [markdown]
# As an example, a run of a tiny, untrained Deformable-DETR with classes whose names are not ASCII:

# %%
net = DeformableDETRConfig(
    0,
    BackboneConfig('resnet18', 'none', out_strides=(8, 16)),
    d_model=32,
    levels=3,
    heads=4,
    layers=2,
    ffn=32,
    num_queries=10,
    form='two_stage',
)
names = ['Zelle', 'größer', '細胞']
mine = dataclasses.replace(Config(), detector=net, view=preset('digits').view)
mine = resolve(mine, names)
torch.manual_seed(0)
weights = build_detector(mine.detector).state_dict()
folder = Path(tempfile.mkdtemp())
save_checkpoint(folder / 'last.pt', config=to_dict(mine), classes=names, student=weights, teacher=weights)
default, chosen = output_path(folder, 'model.onnx'), output_path(folder, 'model.onnx', folder / 'x.onnx')
assert (default.name, chosen.name) == ('model.onnx', 'x.onnx')
default.name, chosen.name


# %% [markdown]
# ## One safe file
#
# The format *safetensors* stores a header in JSON, then the bytes of all tensors. Its metadata are pairs of
# texts, and there the description goes (@sec-exported). Reading it back gives the same bits. What serves training
# only, a parallel group or a second class head (@sec-group), is left out.

# %%
#| export
def to_safetensors(
    run,  # folder of a run, or its .pt file
    out=None,  # file to write; None: model.safetensors in the folder of the run
    which: str = 'teacher',  # or 'student'
    like=None,  # Config with settings classes of your own, if the run has such
    overwrite: bool = False,  # replace an existing file
) -> Path:  # of the file
    "One network of a run with its configuration and classes; `Predictor` reads the file like a run"
    path = output_path(run, 'model.safetensors', out, overwrite)
    write = need('safetensors.torch', 'semidetr export', 'export').save
    model, cfg, classes = load_model(run, which, 'cpu', like)
    detector, state = for_inference(cfg.detector, model.state_dict())
    cfg = replace(cfg, detector=detector)
    about = dict(description(cfg, classes), semidetr=SAFE_FORMAT, network=which, format='pt')
    atomic_write(path, write(_plain_tensors(state), about))
    return path


# %%
file = to_safetensors(folder, like=mine)
again, again_cfg, again_names = load_model(file, like=mine)
assert again_cfg == mine and again_names == names
assert all(torch.equal(t, weights[k]) for k, t in again.state_dict().items())
try:
    to_safetensors(folder, like=mine)
except ConfigError as e:
    print(str(e).replace(str(folder), 'run'))
before, after = (p.stat().st_size / 1e6 for p in (folder / 'last.pt', file))
f'checkpoint {before:.1f} MB, {file.name} {after:.1f} MB'

# %% [markdown]
# ## The names of transformers
#
# `transformers` has the same network under other names. The weights of self-attention, which are one matrix
# here, are three there: its rows are those of queries, keys and values,
#
# $$ W_{\text{in}} = \begin{pmatrix} W_q \\ W_k \\ W_v \end{pmatrix}\in\mathbb{R}^{3d\times d}. $$ {#eq-export-split}
#
# The rest is renamed. Norms are called by their role, and the role of `norm1` differs: in a layer of the
# encoder it follows self-attention, in one of the decoder it follows the attention to the image.

# %%
#| export
_ENCODER = dict(norm1='self_attn_layer_norm', norm2='final_layer_norm', linear1='fc1', linear2='fc2')
_DECODER = dict(
    norm1='encoder_attn_layer_norm',
    norm2='self_attn_layer_norm',
    norm3='final_layer_norm',
    cross_attn='encoder_attn',
    linear1='fc1',
    linear2='fc2',
)
_RESNET_BLOCK = (
    (r'\.conv(\d)\.', lambda m: f'.layer.{int(m[1]) - 1}.convolution.'),
    (r'\.bn(\d)\.', lambda m: f'.layer.{int(m[1]) - 1}.normalization.'),
    (r'\.downsample\.0\.', '.shortcut.convolution.'),
    (r'\.downsample\.1\.', '.shortcut.normalization.'),
)


def resnet_name(
    name: str,  # torchvision's, such as layer1.0.conv2.weight
) -> str:
    "The name of a tensor of a ResNet in transformers"
    stem = re.match(r'(conv|bn)1\.(.*)', name)
    if stem:
        part = dict(conv='convolution', bn='normalization')[stem[1]]
        return f'embedder.embedder.{part}.{stem[2]}'
    for pattern, new in _RESNET_BLOCK:
        name = re.sub(pattern, new, name)
    return re.sub(r'^layer(\d)\.', lambda m: f'encoder.stages.{int(m[1]) - 1}.layers.', name)


def _layer_name(name):
    "The name of a tensor in a layer of encoder or decoder, without the split of self-attention"
    stack, number, part, rest = re.match(r'transformer\.(\w+)\.layers\.(\d+)\.(\w+)\.(.*)', name).groups()
    roles = _ENCODER if stack == 'encoder' else _DECODER
    return f'model.{stack}.layers.{number}.{roles.get(part, part)}.{rest}'


# %%
assert resnet_name('bn1.bias') == 'embedder.embedder.normalization.bias'
assert _layer_name('transformer.decoder.layers.1.norm1.bias').endswith('encoder_attn_layer_norm.bias')
resnet_name('layer2.0.downsample.0.weight')


# %% [markdown]
# Heads are the other difference. The one pair of heads of the plain form serves all layers; in the other two
# forms each layer has its own, and `transformers` keeps a second name for it in the decoder. Its releases
# leave different copies out when they write a file, and fill in different ones when they read it, so the
# export writes all of them.

# %%
#| export
def _heads(state, layers, form):
    "Class and box heads under all names that some release of transformers reads"
    out = {}
    for name, t in state.items():
        match = re.match(r'(class|bbox)_embed\.(\d+)\.(.*)', name)
        if not match:
            continue
        kind, number, rest = match.groups()
        for j in range(layers) if form == 'plain' else [int(number)]:
            out[f'{kind}_embed.{j}.{rest}'] = t
            if form == 'two_stage' or (form == 'refine' and kind == 'bbox'):
                out[f'model.decoder.{kind}_embed.{j}.{rest}'] = t
    return out


def deformable_names(
    state: dict,  # state dict of a `DeformableDETR` with a ResNet
    settings: DeformableDETRConfig,  # of the same network
) -> dict:  # state dict as on the disk
    "The weights under the names of transformers; attention among queries split (@eq-export-split)"
    out = _heads(state, settings.layers, settings.form)
    for name, t in state.items():
        if name.startswith(('class_embed.', 'bbox_embed.')) or name.endswith('num_batches_tracked'):
            continue
        if name.startswith('backbone.body.'):
            part = resnet_name(name.removeprefix('backbone.body.'))
            out[f'model.backbone.conv_encoder.model.{part}'] = t
        elif '.in_proj_' in name:
            before, kind = _layer_name(name.replace('.in_proj_', '.')).rsplit('.', 1)
            for letter, rows in zip('qkv', t.chunk(3)):
                out[f'{before}.{letter}_proj.{kind}'] = rows
        elif '.layers.' in name:
            out[_layer_name(name)] = t
        elif name.startswith('query_embed.'):
            out[name.replace('query_embed', 'model.query_position_embeddings')] = t
        else:
            out['model.' + name.removeprefix('transformer.')] = t
    return out


# %%
theirs = deformable_names(weights, mine.detector)
in_proj = weights['transformer.decoder.layers.0.self_attn.in_proj_weight']
assert torch.equal(theirs['model.decoder.layers.0.self_attn.k_proj.weight'], in_proj[32:64])
len(weights), len(theirs)


# %% [markdown]
# DETR has one pair of heads and needs no second names. Its table is the one of the import (@sec-weight-names),
# read backwards.

# %%
#| export
def detr_names(
    state: dict,  # state dict of a `DETR` with a ResNet
    with_timm: bool = False,  # name the backbone as timm does, for a dilated one
) -> dict:  # state dict as on the disk
    "The weights under the names of transformers; fused attention is split (@eq-export-split)"
    rules, out = rules_of('hf_detr', () if with_timm else ('model.stages.',)), {}
    for name, t in state.items():
        if name.endswith(COUNTER):
            continue
        if '.in_proj_' not in name:
            out[foreign_name(name, rules)] = t
            continue
        for part, rows in enumerate(t.chunk(3)):
            out[foreign_name(name, [r for r in rules if r.part == part])] = rows
    return out


# %%
fused = {'transformer.decoder.layers.0.multihead_attn.in_proj_bias': torch.arange(6)}
assert torch.equal(detr_names(fused)['model.decoder.layers.0.encoder_attn.v_proj.bias'], torch.tensor([4, 5]))
list(detr_names(fused))

# %% [markdown]
# ## A folder for `from_pretrained`
#
# Three files: `config.json` with the sizes of the network and the classes, `model.safetensors`, and
# `preprocessor_config.json` with the view. Neither writing nor checking the names needs `transformers`.
#
# Three things cannot go there, and each is refused in one line:
#
# - **DINO**, which `transformers` does not have.
# - **A backbone other than ResNet.** `transformers` replaces each batch norm by one with
#   $\epsilon=10^{-5}$ and no activation. In EfficientNet-Lite0 $\epsilon$ is $10^{-3}$ and the activation is
#   part of the norm, so its features would change without an error.
# - **A Deformable-DETR of a width that 32 does not divide**: the groups of its group norms are always 32.
#
# The ResNet of `transformers` cannot be dilated, so a backbone *DC5* is written under the names of timm, and
# the program that loads it needs timm.

# %%
#| export
_RESNETS = {  # name -> (depths of the stages, kind of block, widths of the stages)
    'resnet18': ([2, 2, 2, 2], 'basic', [64, 128, 256, 512]),
    'resnet34': ([3, 4, 6, 3], 'basic', [64, 128, 256, 512]),
    'resnet50': ([3, 4, 6, 3], 'bottleneck', [256, 512, 1024, 2048]),
    'resnet101': ([3, 4, 23, 3], 'bottleneck', [256, 512, 1024, 2048]),
}
_STAGE = {4: 'stage1', 8: 'stage2', 16: 'stage3', 32: 'stage4'}  # stride -> name of the map
OTHER_FORMATS = 'use onnx, torch or safetensors'


def _is_dilated(b):
    "Is the last stage of a ResNet dilated (DC5)?"
    return b.name.endswith('_dc5')


def _backbone_settings(b):
    "config.json's part for a ResNet, cut after the last stage in use"
    if _is_dilated(b):
        return _timm_settings(b)
    if b.name not in _RESNETS:
        raise ConfigError(
            f"transformers cannot run the backbone '{b.name}' (it drops activation and epsilon of its norms)"
            f'; {OTHER_FORMATS}, or train with one of {", ".join(_RESNETS)}'
        )
    if any(s not in _STAGE for s in b.out_strides):
        raise ConfigError(f'transformers has no map of stride {min(b.out_strides)}; {OTHER_FORMATS}')
    depths, block, widths = _RESNETS[b.name]
    used = int(_STAGE[b.out_strides[-1]][-1])
    return dict(
        model_type='resnet',
        embedding_size=64,
        depths=depths[:used],
        layer_type=block,
        hidden_sizes=widths[:used],
        hidden_act='relu',
        out_features=[_STAGE[s] for s in b.out_strides],
    )


def _timm_settings(b):
    "config.json's part for a dilated ResNet; timm counts its maps from stride 2, two of them have stride 16"
    if b.out_strides != (16,):
        raise ConfigError(f'transformers has one map of {b.name}, not {b.out_strides}; {OTHER_FORMATS}')
    return dict(
        model_type='timm_backbone',
        backbone=b.name.removesuffix('_dc5'),
        output_stride=16,
        out_indices=[4],
        use_pretrained_backbone=False,
    )


def _class_settings(classes):
    "config.json's part for the names of classes"
    return dict(
        id2label={str(i): c for i, c in enumerate(classes)}, label2id={c: i for i, c in enumerate(classes)}
    )


def deformable_settings(
    settings: DeformableDETRConfig,  # of the network
    classes: list,  # names, in the order of the labels
) -> dict:  # content of config.json
    "The network's sizes under the names of transformers; `ConfigError` if it cannot run there"
    s = settings
    if s.suppressor.on:
        raise ConfigError(
            f'transformers has no learned suppressor (detector.suppressor.head={s.suppressor.head}); '
            f'{OTHER_FORMATS}'
        )
    if s.d_model % 32:
        raise ConfigError(
            f'transformers needs a width of a multiple of 32, not detector.d_model={s.d_model}; '
            f'{OTHER_FORMATS}'
        )
    if _is_dilated(s.backbone):
        raise ConfigError(f'transformers has no dilated backbone for Deformable-DETR; {OTHER_FORMATS}')
    backbone = _backbone_settings(s.backbone)
    shape = dict(d_model=s.d_model, num_queries=s.num_queries, two_stage_num_proposals=s.num_queries)
    for stack in ('encoder', 'decoder'):
        shape[f'{stack}_layers'], shape[f'{stack}_ffn_dim'] = s.layers, s.ffn
        shape[f'{stack}_attention_heads'], shape[f'{stack}_n_points'] = s.heads, s.points
    return dict(
        architectures=['DeformableDetrForObjectDetection'],
        model_type='deformable_detr',
        backbone_config=backbone,
        use_timm_backbone=False,
        num_feature_levels=s.levels,
        with_box_refine=s.form != 'plain',
        two_stage=s.form == 'two_stage',
        tie_word_embeddings=s.form == 'plain',
        dropout=s.dropout,
        attention_dropout=s.dropout,
        activation_dropout=s.dropout,
        **_class_settings(classes),
        **shape,
    )


# %%
sizes = deformable_settings(mine.detector, names)
assert sizes['id2label']['2'] == '細胞' and sizes['backbone_config']['depths'] == [2, 2, 2]
sizes['backbone_config']


# %%
#| export
def detr_settings(
    settings: DETRConfig,  # of the network
    classes: list,  # names, in the order of the labels
) -> dict:  # content of config.json
    "The network's sizes under the names of transformers; `ConfigError` if it cannot run there"
    s = settings
    shape = dict(d_model=s.d_model, num_queries=s.num_queries)
    depths = dict(encoder=s.layers if s.enc_layers is None else s.enc_layers, decoder=s.layers)
    for stack, layers in depths.items():
        shape[f'{stack}_layers'], shape[f'{stack}_ffn_dim'] = layers, s.ffn
        shape[f'{stack}_attention_heads'] = s.heads
    return dict(
        architectures=['DetrForObjectDetection'],
        model_type='detr',
        backbone_config=_backbone_settings(s.backbone),
        use_timm_backbone=False,
        dropout=s.dropout,
        attention_dropout=s.dropout,
        activation_dropout=s.dropout,
        **_class_settings(classes),
        **shape,
    )


def preprocessing(
    view,  # ViewConfig of the run
    detector: str = 'DeformableDetr',  # or 'Detr': whose image processor
) -> dict:  # content of preprocessor_config.json
    "Resizing and normalisation of a view (@eq-exported-normalise) for the image processor of transformers"
    return dict(
        image_processor_type=f'{detector}ImageProcessor',
        do_resize=True,
        size=dict(shortest_edge=view.eval_short, longest_edge=view.max_side),
        resample=2,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(view.mean),
        image_std=list(view.std),
        do_pad=True,
        format='coco_detection',
    )


# %%
release = detr_settings(DETRConfig(91, BackboneConfig('resnet50_dc5', out_strides=(16,))), ['a'] * 91)
assert release['backbone_config']['output_stride'] == 16 and release['encoder_layers'] == 6
preprocessing(mine.view)['size']


# %%
#| export
def _translated(model, detector, view, classes):
    "(config.json, preprocessor_config.json, weights) of a network that transformers can run"
    detector, state = for_inference(detector, model.state_dict())
    if isinstance(detector, DETRConfig):
        weights = detr_names(state, _is_dilated(detector.backbone))
        return detr_settings(detector, classes), preprocessing(view, 'Detr'), weights
    if isinstance(detector, DeformableDETRConfig):
        return deformable_settings(detector, classes), preprocessing(view), deformable_names(state, detector)
    name = type(model).__name__
    kind = 'DINO' if name == 'Detector' else name
    raise ConfigError(f'transformers has no class for this {kind}; {OTHER_FORMATS}')


def to_transformers(
    run,  # folder of a run, or its .pt file
    out=None,  # folder to write; None: transformers in the folder of the run
    which: str = 'teacher',  # or 'student'
    like=None,  # Config with settings classes of your own, if the run has such
    overwrite: bool = False,  # replace the files in an existing folder
) -> Path:  # of the folder
    "A folder for `from_pretrained` of `DetrForObjectDetection` or `DeformableDetrForObjectDetection`"
    path = output_path(run, 'transformers', out, overwrite)
    write = need('safetensors.torch', 'semidetr export', 'export').save
    model, cfg, classes = load_model(run, which, 'cpu', like)
    refuse_assigned(model, run, 'transformers')
    try:
        settings, processor, weights = _translated(model, cfg.detector, cfg.view, classes)
    except ConfigError as e:
        raise ConfigError(f'{run}: {e}') from None
    atomic_write(path / 'config.json', json.dumps(settings, indent=2, ensure_ascii=False))
    atomic_write(path / 'preprocessor_config.json', json.dumps(processor, indent=2))
    atomic_write(path / 'model.safetensors', write(_plain_tensors(weights), dict(format='pt')))
    return path


# %%
there = to_transformers(folder, like=mine)
written = sorted(p.name for p in there.iterdir())
assert written == ['config.json', 'model.safetensors', 'preprocessor_config.json']
dino = resolve(override(preset('digits'), ['detector.backbone.weights=none']), list('0123456789'))
torch.manual_seed(0)
dino_weights = build_detector(dino.detector).state_dict()
save_checkpoint(
    folder / 'dino' / 'last.pt',
    config=to_dict(dino),
    classes=list('0123456789'),
    student=dino_weights,
    teacher=dino_weights,
)
try:
    to_transformers(folder / 'dino')
except ConfigError as e:
    print(str(e).replace(str(folder), 'runs'))
written

# %% [markdown]
# In a program that has `transformers`, two lines load it: `AutoModelForObjectDetection.from_pretrained`
# and `AutoImageProcessor.from_pretrained`, both with the folder. The tests compare its logits and boxes with
# ours for DETR, also with DC5, and for the three forms of Deformable-DETR. The image processor rounds the size
# of a view in its own way, by a pixel or two where the long side is limited; boxes are fractions of the view
# and change little.
#
# Where the bytes are:

# %%
#| label: fig-export-sizes
#| fig-cap: "Size of the files of the tiny Deformable-DETR. The two networks of this checkpoint share their tensors, so it is no larger than the file with one; a real one is."
#| fig-alt: "Three bars: the checkpoint, the safetensors file, the folder for transformers"
paths = {'checkpoint': folder / 'last.pt', 'safetensors': file, 'transformers': there / 'model.safetensors'}
megabytes = {name: p.stat().st_size / 1e6 for name, p in paths.items()}
fig, ax = plt.subplots(figsize=(5, 1.8), dpi=80)
ax.barh(list(megabytes), list(megabytes.values()), color='#4c72b0')
ax.set(xlabel='MB')
plt.tight_layout()
plt.show()

# %% [markdown]
# ## Summary
#
# - Exported weights carry configuration, class names and view settings: what cannot be guessed is written.
# - A `.safetensors` file stands for a run in `Predictor`; its weights are those of the run, bit for bit.
# - DETR and Deformable-DETR with a ResNet go to `transformers`; the rest is refused.
# - Nothing is overwritten unless `overwrite=True` says so.
#
# ## Exercises
#
# 1. Load a folder in `transformers` with another `image_mean` and compare the detections. Does anything warn?
# 2. Which of the head copies could be left out for the release you have installed?
# 3. The file holds float32. How large is the change of the boxes if it is stored in float16?
