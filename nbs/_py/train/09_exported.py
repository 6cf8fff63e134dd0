# %% [markdown]
# # Reading exported detectors {#sec-exported}
#
# > Read a detector that was written for other programs as if it were a run, settings and classes included.
#
# *Why.* The two chapters on export (@sec-export, @sec-onnx) write a trained detector as one file. Prediction
# reads such a file in place of the folder of a run, so the readers come first, and they define what must be in
# the file. Weights alone do not make a detector. A reader also needs the names of the classes, in the order of
# the labels, and what was done to the pixels: the size of the view (@sec-augment) and the normalisation
#
# $$ x = \frac{p/255 - \mu}{\sigma} $$ {#eq-exported-normalise}
#
# of a pixel $p\in\{0,\dots,255\}$, with $\mu$ and $\sigma$ of its channel. A program that uses another
# $\mu$ than training did still predicts boxes, only worse ones, without an error. So each format carries these
# numbers.

# %%
#| default_exp train.exported

# %%
#| export
import json
from pathlib import Path
import torch
from torch import Tensor
from semidetr.core import ConfigError, DataError, need
from semidetr.reading import CONFIG, check, excess
from semidetr.text import parse_json
from semidetr.train.config import from_saved, to_dict

# %%
#| hide
import tempfile
import matplotlib.pyplot as plt
import numpy as np
import onnx
from safetensors.torch import save_file
from semidetr.train.config import preset


# %% [markdown]
# ## What a file says about itself
#
# Both formats have room for pairs of texts, the *metadata*. `description` fills them: values in JSON, readable
# in any language.

# %%
#| export
def description(
    cfg,  # Config of the run
    classes: list,  # names, in the order of the labels
) -> dict:  # text -> text
    "What a reader of exported weights must know, as the metadata of a file: names -> JSON"
    v = cfg.view
    sizes = dict(eval_short=v.eval_short, max_side=v.max_side, min_side=v.min_side)
    view = dict(sizes, pad_multiple=v.pad_multiple, mean=list(v.mean), std=list(v.std))
    texts = dict(config=to_dict(cfg), classes=list(classes), view=view, detector=type(cfg.detector).__name__)
    return {k: json.dumps(t, ensure_ascii=False) for k, t in texts.items()}


# %%
digits = preset('digits')
names = ['Zelle', 'größer', '細胞']
about = description(digits, names)
assert json.loads(about['classes']) == names and json.loads(about['view'])['mean'] == [0.5] * 3
about['view']

# %% [markdown]
# ## Weights
#
# The format *safetensors* stores a header in JSON, then the bytes of all tensors. Reading it runs no code. The
# file stands for a checkpoint (@sec-checkpoint) with one network.

# %%
#| export
SAFE_FORMAT = '1'  # goes up when the layout of the metadata changes


METADATA = dict(config=CONFIG, classes=list[str], nms=float | None)  # name -> type of its JSON


def _metadata(about, key, path):
    "One JSON text of the metadata of a file, checked"
    text, where, cure = about[key], f'{path}: metadata {key!r}', 'export the run again'
    value = parse_json(text, where, cure=cure, wanted='an exported file')
    if what := excess(value):
        raise DataError(f'{where}: {what}; {cure}')
    return check(METADATA[key], value, where, cure=cure)


def from_safetensors(
    path,  # written by `to_safetensors`
) -> dict:  # config, classes, and the weights under both 'teacher' and 'student': there is one network
    "The file as the state of a checkpoint; `DataError` if it is missing, damaged or of another program"
    path = Path(path)
    if not path.is_file():
        raise DataError(f'{path}: no such file; give the folder of a run, its .pt file or an exported file')
    open_file = need('safetensors', 'reading .safetensors', 'export').safe_open
    try:
        with open_file(path, 'pt') as f:
            about = f.metadata() or {}
            weights = {name: f.get_tensor(name) for name in f.keys()}
    except Exception as e:
        raise DataError(
            f'{path}: not readable as safetensors ({str(e).splitlines()[0][:100]}); export the run again'
        ) from None
    if not {'semidetr', 'config', 'classes'} <= set(about):
        raise DataError(
            f'{path}: holds no configuration of semidetr; another program wrote it, not to_safetensors'
        )
    if not about['semidetr'].isdecimal() or len(about['semidetr']) > 9:
        raise DataError(f"{path}: its format is {about['semidetr'][:20]!r}, no number; export the run again")
    if int(about['semidetr']) > int(SAFE_FORMAT):
        raise DataError(
            f"{path}: written by a newer semidetr (format {about['semidetr']}, "
            f'this one reads {SAFE_FORMAT}); upgrade'
        )
    config, classes = (_metadata(about, key, path) for key in ('config', 'classes'))
    return dict(config=config, classes=classes, teacher=weights, student=weights)


# %%
folder = Path(tempfile.mkdtemp())
tensors = {'layer.weight': torch.arange(6.0).view(2, 3), 'layer.bias': torch.ones(2)}
save_file(tensors, folder / 'a.safetensors', dict(about, semidetr=SAFE_FORMAT))
save_file(tensors, folder / 'foreign.safetensors')
state = from_safetensors(folder / 'a.safetensors')
assert state['classes'] == names and torch.equal(state['teacher']['layer.weight'], tensors['layer.weight'])
messages = []
for name in ('foreign.safetensors', 'gone.safetensors'):
    try:
        from_safetensors(folder / name)
    except DataError as e:
        messages.append(str(e).replace(str(folder), 'files'))
assert len(messages) == 2
messages

# %%
#| label: fig-exported-layout
#| fig-cap: "The bytes of a safetensors file with two small tensors: nearly all of it is the header with settings and classes. With real weights the header is a thousandth."
#| fig-alt: "A bar of bytes: a long header, then the two tensors"
total = (folder / 'a.safetensors').stat().st_size
parts = {name: t.numel() * 4 for name, t in tensors.items()}
parts = {'header': total - sum(parts.values()), **parts}
fig, ax = plt.subplots(figsize=(5, 1.6), dpi=80)
for (name, n), left in zip(parts.items(), np.cumsum([0, *parts.values()])):
    ax.barh(['a.safetensors'], [n], left=left, label=f'{name}: {n}')
ax.set(xlabel='bytes')
ax.legend(fontsize=9, loc='center')
plt.tight_layout()
plt.show()


# %% [markdown]
# ## Graphs
#
# An ONNX file also holds the computation. `onnxruntime` runs it, in a *session*. `OnnxNetwork` calls a session
# like a detector, so that post-processing (@sec-contract) need not know which of the two it has.

# %%
#| export
def open_session(
    content: bytes,  # of an .onnx file
    name,  # of the file, for the error
):  # onnxruntime.InferenceSession
    "onnxruntime's session of a file's content, without its messages about speed"
    runtime = need('onnxruntime', 'reading .onnx', 'export')
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    try:
        return runtime.InferenceSession(content, options, providers=['CPUExecutionProvider'])
    except Exception as e:
        raise DataError(f'{name}: onnxruntime cannot read it ({str(e).splitlines()[0][:120]})') from None


class OnnxNetwork:
    "A session that is called like a detector in eval mode"

    def __init__(
        self,
        path,  # written by `to_onnx`
    ):
        path = Path(path)
        if not path.is_file():
            raise DataError(f'{path}: no such file; write it with `semidetr export`')
        self.session = open_session(path.read_bytes(), path)
        about = self.session.get_modelmeta().custom_metadata_map
        if not {'semidetr', 'config', 'classes'} <= set(about):
            raise DataError(
                f'{path}: holds no class names and view settings; write it with `semidetr export`'
            )
        self.about = {k: _metadata({'nms': 'null'} | about, k, path) for k in METADATA}

    def __call__(
        self,
        images: Tensor,  # (B,3,H,W) normalised, zero padded at the right and the bottom
        mask: Tensor,  # (B,H,W) bool, True=padding
    ) -> dict:  # scores (B,Q,C), pred_boxes (B,Q,4) cxcywh in [0,1], where `images` are
        "Outputs that `post_process` takes"
        inputs = dict(images=images.cpu().numpy(), mask=mask.cpu().numpy())
        scores, boxes = self.session.run(['scores', 'boxes'], inputs)
        scores, boxes = torch.from_numpy(scores), torch.from_numpy(boxes)
        return dict(scores=scores.to(images.device), pred_boxes=boxes.to(images.device))


def load_onnx(
    path,  # written by `to_onnx`
):  # (OnnxNetwork, Config without the detector's and the method's settings, class names)
    "What `load_model` returns, of an exported graph"
    network = OnnxNetwork(path)
    config = {k: v for k, v in network.about['config'].items() if k not in ('detector', 'method')}
    try:
        cfg = from_saved(config)
    except ConfigError as e:
        raise DataError(
            f'{path}: {e}; written by another version of semidetr: export the run again'
        ) from None
    return network, cfg, network.about['classes']


# %% [markdown]
# The smallest graph that fits the description returns two constants, whatever the image is:

# %%
def constant_graph(path, scores, boxes, about):
    "A file whose outputs do not depend on its inputs"
    value, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto
    inputs = [value('images', kind.FLOAT, ['b', 3, 'h', 'w']), value('mask', kind.BOOL, ['b', 'h', 'w'])]
    outputs = [value('scores', kind.FLOAT, scores.shape), value('boxes', kind.FLOAT, boxes.shape)]
    nodes = []
    for name, a in (('scores', scores), ('boxes', boxes)):
        nodes.append(onnx.helper.make_node('Constant', [], [name], value=onnx.numpy_helper.from_array(a)))
    graph = onnx.helper.make_graph(nodes, 'g', inputs, outputs)
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid('', 17)], ir_version=8)
    for key, text in about.items():
        proto.metadata_props.add(key=key, value=text)
    onnx.save(proto, path)


scores = np.float32([[[0.9, 0.1, 0.0]]])
boxes = np.float32([[[0.5, 0.5, 0.2, 0.4]]])
constant_graph(folder / 'a.onnx', scores, boxes, dict(about, semidetr='1', nms='null'))
network, cfg, classes = load_onnx(folder / 'a.onnx')
outputs = network(torch.zeros(1, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.bool))
assert cfg.view == digits.view and classes == names
assert torch.equal(outputs['scores'], torch.from_numpy(scores))
outputs['pred_boxes']

# %%
constant_graph(folder / 'foreign.onnx', scores, boxes, {})
try:
    load_onnx(folder / 'foreign.onnx')
except DataError as e:
    refusal = str(e).replace(str(folder), 'files')
assert 'class names' in refusal
refusal

# %% [markdown]
# ## Summary
#
# - Exported files carry configuration, class names and view settings as pairs of texts.
# - A `.safetensors` file is read like a checkpoint with one network; an `.onnx` file is called like a detector.
# - A file of another program is refused in one line.
#
# ## Exercises
#
# 1. Read the header of `a.safetensors` with `json` alone: its first eight bytes are its length.
# 2. Which settings of the view does a program need to reproduce the pixels exactly, and which only roughly?
# 3. What would go wrong if class names were sorted when they are read?
