# %% [markdown]
# # A detector without this package {#sec-onnx}
#
# > Write the computation itself as a graph for ONNX or torch, check it, and predict with a short script.
#
# *Why.* On a microscope's computer or a phone there is often no torch, and code of a research project is not
# wanted. An ONNX file holds the weights *and* the computation, as a graph of standard operations that many
# engines run, `onnxruntime` among them. The file of this chapter takes any number of images of any size, and
# carries class names and view settings (@sec-export) as metadata.
#
# Writing such a graph means running the network once and recording each operation (*tracing*). What a trace
# does not see is Python: a number that Python computed from a size is recorded as a constant, an `if` as the
# branch that was taken. Such a file is correct for the size it was traced with, and wrong for others without
# an error. Two things guard against it: the few functions that compute with sizes have a second form here, and
# each exported file is compared with the network at two other sizes before it is written.

# %%
#| default_exp train.onnx

# %%
#| hide
import warnings

warnings.filterwarnings('ignore', message='IProgress')

# %%
#| export
import io
import json
import math
import warnings
from contextlib import contextmanager
from pathlib import Path
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn, Tensor
from semidetr.boxes import cxcywh_to_xyxy
from semidetr.core import ConfigError, atomic_write, need, suggest
from semidetr.detectors import attention, backbone, deformable_detr, detector, detr, suppressor, transformer
from semidetr.detectors.contract import candidate_scores, reported
from semidetr.train.exported import description, open_session
from semidetr.train.export import output_path, refuse_assigned, to_safetensors, to_transformers
from semidetr.train.predict import Predictor, load_model

# %%
#| hide
import subprocess
import sys
import tempfile
import matplotlib.pyplot as plt
from semidetr.data.catalog import open_dataset
from semidetr.detectors.contract import build_detector
from semidetr.draw import show_image
from semidetr.train.checkpoint import save_checkpoint
from semidetr.train.config import override, preset, to_dict
from semidetr.train.run_data import resolve


# %% [markdown]
# ## Sizes that a trace can follow
#
# In a trace the height of a map is a tensor as long as only tensor operations use it. `torch.tensor([h, w])`
# ends that: it copies two numbers. The sum of $w$ ones is a $w$ that stays in the graph. Padding is the other
# case. For a map of $n$ cells, a kernel of $k$ and a stride of $s\le k$, TensorFlow's rule *same* pads
#
# $$ \left(\lceil n/s\rceil - 1\right)s + k - n \;=\; k - 1 - \bigl((n-1) \bmod s\bigr) $$ {#eq-onnx-same}
#
# cells in all. The right side needs integer operations only.

# %%
#| export
def _count(n, like):
    "n as a float tensor that a trace follows"
    return torch.ones(n, device=like.device).sum()


def _cells(shapes, like):
    "(L,2) width and height of each level, in cells"
    return torch.stack([torch.stack([_count(w, like), _count(h, like)]) for h, w in shapes])


def _in_order(z):
    "`suppressor._ranked`: in ONNX equal numbers stay in order without asking for it"
    return z.argsort(1, descending=True)


def _same_padding(size, k, s):
    "(before, after), by @eq-onnx-same"
    total = k - 1 - (size - 1) % s
    return total // 2, total - total // 2


def _conv_norm(conv, norm, x):
    "norm(conv(x)); engines merge the two themselves"
    padding = conv.padding
    if type(conv).__name__ == 'Conv2dSame':
        (kh, kw), (sh, sw) = conv.kernel_size, conv.stride
        (top, bottom), (left, right) = _same_padding(x.shape[2], kh, sh), _same_padding(x.shape[3], kw, sw)
        x, padding = F.pad(x, (left, right, top, bottom)), 0
    return norm(F.conv2d(x, conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups))


# %%
assert all(
    _same_padding(n, k, s) == backbone._pads(n, k, s) for n in range(1, 40) for k in (3, 5) for s in (1, 2)
)
_same_padding(17, 3, 2)


# %% [markdown]
# The other functions follow the ones they stand in for, in the same order of arguments: sampling locations and
# areas (@sec-attention, @sec-deformable-detr), the position code, masks of levels, and the selection of
# queries. The last one sorts instead of taking the best $Q$, because an image may have fewer than $Q$ tokens.

# %%
#| export
def _locations(reference_points, offsets, shapes):
    "`sampling_locations`"
    ref = reference_points[:, :, None, :, None]
    if ref.shape[-1] == 2:
        return ref + offsets / _cells(shapes, ref)[:, None]
    return ref[..., :2] + offsets / offsets.shape[-2] * ref[..., 2:] * 0.5


def _point_areas(points, shapes, n_points, valid_ratios):
    "`point_areas`"
    centres = points[:, :, None].expand(-1, -1, len(shapes), -1) * valid_ratios[:, None]
    sizes = 2 * n_points / _cells(shapes, points)
    return torch.cat([centres, sizes.expand(centres.shape)], -1)


def _position(mask, num_feats, temperature=20, offset=0.0):
    "`sine_position`; whole numbers are counted, because ONNX cannot add truth values"
    power = torch.arange(num_feats // 2, device=mask.device, dtype=torch.float32) * 2 / num_feats
    codes = []
    for axis in (1, 2):
        count = (~mask).long().cumsum(axis).float()
        last = count.amax(axis, keepdim=True)
        angle = ((count + offset) / (last + 1e-6) * 2 * math.pi)[..., None] / temperature**power
        codes.append(torch.stack((angle.sin(), angle.cos()), -1).flatten(-2))
    return torch.cat(codes, -1).permute(0, 3, 1, 2)


def _masks(mask, features):
    "`level_masks`, also where nothing is padded"
    return [backbone.resize_mask(mask, f.shape[-2:]) for f in features]


def _select(logits, num_queries, valid=None, score='max'):
    "`select_queries`"
    rank = logits[..., 0] if score == 'class0' else logits.amax(-1)
    if valid is not None:
        rank = rank.masked_fill(~valid, -math.inf)
    return rank.argsort(1, descending=True)[:, :num_queries]


def _full_size(shapes, device):
    "(1,L,2) width and height of each level, in cells"
    return _cells(shapes, torch.ones(1, device=device))[None]


_TABLE_QUERIES = deformable_detr.table_queries


def _table_queries(table, to_point, geo, n_points, batch):
    "`table_queries`, with the batch size of the masks"
    return _TABLE_QUERIES(table, to_point, geo, n_points, geo.valid_ratios.shape[0])


@contextmanager
def traceable():
    "Within it the functions that compute with sizes have the form that a trace follows; not thread-safe"
    forms = [
        (attention, 'native_available', lambda *args: False),
        (attention, 'sampling_locations', _locations),
        (backbone, '_conv_norm', _conv_norm),
        (deformable_detr, 'level_masks', _masks),
        (deformable_detr, 'point_areas', _point_areas),
        (deformable_detr, 'table_queries', _table_queries),
        (detector, 'level_masks', _masks),
        (detr, 'level_masks', _masks),
        (suppressor, '_ranked', _in_order),
        (transformer, '_frequencies', transformer._frequencies.__wrapped__),
        (transformer, '_full_size', _full_size),
        (transformer, 'select_queries', _select),
        (transformer, 'sine_position', _position),
    ]
    usual = [(module, name, getattr(module, name)) for module, name, _ in forms]
    try:
        for module, name, form in forms:
            setattr(module, name, form)
        yield
    finally:
        for module, name, form in usual:
            setattr(module, name, form)


# %% [markdown]
# A network in this form gives what it gives otherwise. The example is a run of the small DINO with random
# weights for the transformer:

# %%
scenes = open_dataset('digits:n=6,size=96', 'val')
small = ['detector.backbone.weights=none', 'detector.transformer.num_queries=40']
tiny = resolve(override(preset('digits'), small), scenes.classes)
folder = Path(tempfile.mkdtemp())
torch.manual_seed(0)
network = build_detector(tiny.detector).eval().requires_grad_(False)
for p in network.class_head.parameters():
    p.normal_(0, 0.1)
for p in network.box_head.layers[-1].parameters():
    p.normal_(0, 0.1)
state = network.state_dict()
save_checkpoint(
    folder / 'last.pt', config=to_dict(tiny), classes=scenes.classes, student=state, teacher=state
)
images, mask = torch.randn(2, 3, 90, 110), torch.zeros(2, 90, 110, dtype=torch.bool)
mask[1, :, 80:] = True
usual = network(images, mask)
with traceable():
    traced = network(images, mask)
gap = float((usual['pred_logits'] - traced['pred_logits']).abs().max())
assert gap < 1e-3 and detector.level_masks is not _masks
f'largest difference of a logit: {gap:.0e}'


# %% [markdown]
# ## Suppression inside the graph
#
# The standard operation `NonMaxSuppression` keeps triples (image, class, query), by the rule of @sec-predict.
# The graph must return arrays of fixed meaning, so suppressed pairs get a score of zero and all others keep
# theirs. A threshold above zero then gives the same detections as suppression after the network.

# %%
#| export
class Scored(nn.Module):
    "A detector whose outputs are the two arrays that a file has"

    def __init__(
        self,
        model: nn.Module,  # a `DetectionTransformer`; its mode is kept
        corners: bool = False,  # also return what suppression needs
    ):
        super().__init__()
        self.model, self.corners = model, corners
        self.train(model.training)  # the exporter sets the mode of all parts to that of the whole afterwards

    def forward(
        self,
        images: Tensor,  # (B,3,H,W) normalised, zero padded at the right and the bottom
        mask: Tensor,  # (B,H,W) bool, True=padding
    ) -> tuple:  # scores (B,Q,C), boxes (B,Q,4) cxcywh in [0,1]; corners (B,Q,4) y, x, y, x, inside the image
        outputs = reported(self.model(images, mask))
        scores, boxes = candidate_scores(outputs), outputs['pred_boxes']
        if not self.corners:
            return scores, boxes
        return scores, boxes, cxcywh_to_xyxy(boxes).clamp(0, 1)[..., [1, 0, 3, 2]]


def _suppress(proto, iou):
    "Per-class suppression of `all_scores` by `corners`, which stop being an output; changes the graph"
    onnx = need('onnx', 'semidetr export', 'export')
    node, number = onnx.helper.make_node, onnx.numpy_helper.from_array
    graph = proto.graph
    graph.initializer.extend(
        [
            number(np.array([2**31 - 1], np.int64), 'nms_most'),
            number(np.array([iou], np.float32), 'nms_iou'),
            number(np.array([0, 2, 1], np.int64), 'nms_order'),
        ]
    )
    zero = onnx.helper.make_tensor('zero', onnx.TensorProto.FLOAT, [1], [0.0])
    triples = ['corners', 'nms_by_class', 'nms_most', 'nms_iou']
    graph.node.extend(
        [
            node('Transpose', ['all_scores'], ['nms_by_class'], perm=[0, 2, 1]),
            node('NonMaxSuppression', triples, ['nms_kept']),
            node('Gather', ['nms_kept', 'nms_order'], ['nms_index'], axis=1),
            node('GatherND', ['all_scores', 'nms_index'], ['nms_scores']),
            node('Shape', ['all_scores'], ['nms_shape']),
            node('ConstantOfShape', ['nms_shape'], ['nms_zeros'], value=zero),
            node('ScatterND', ['nms_zeros', 'nms_index', 'nms_scores'], ['scores']),
        ]
    )
    graph.output[0].name = 'scores'
    del graph.output[2]


# %%
three = Scored(network, corners=True)(images, mask)
assert [tuple(o.shape) for o in three] == [(2, 40, 10), (2, 40, 4), (2, 40, 4)]
[o.shape[-1] for o in three]

# %% [markdown]
# ## Writing and checking
#
# The graph is recorded with one image. Axes of size one broadcast, so it holds for any number. After that it
# is run by `onnxruntime` with one image and with a padded batch of two, at sizes other than the traced one.
# The order of queries with nearly equal scores may change by rounding, so each query is compared with the
# nearest one of the other result.

# %%
#| export
OPSETS = (17, 20)  # first and last version of ONNX's operations that can be written
TOLERANCE = 1e-3  # of scores and of boxes in [0,1]


def _record(model, nms, opset):
    "The graph of a network as ONNX"
    onnx = need('onnx', 'semidetr export', 'export')
    axes = {'images': {0: 'batch', 2: 'height', 3: 'width'}, 'mask': {0: 'batch', 1: 'height', 2: 'width'}}
    outputs = ['scores', 'boxes'] if nms is None else ['all_scores', 'boxes', 'corners']
    for name in outputs:
        axes[name] = {0: 'batch', 1: 'queries'}
    images, mask = torch.zeros(1, 3, 160, 192), torch.zeros(1, 160, 192, dtype=torch.bool)
    buffer = io.BytesIO()
    with torch.no_grad(), traceable(), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of the tracer, about what `_check` tests
        torch.onnx.export(
            Scored(model, nms is not None),
            (images, mask),
            buffer,
            dynamo=False,
            opset_version=opset,
            input_names=['images', 'mask'],
            output_names=outputs,
            dynamic_axes=axes,
        )
    proto = onnx.load_model_from_string(buffer.getvalue())
    if nms is not None:
        _suppress(proto, nms)
    return proto


def unmatched(
    a,  # (scores (B,Q,C), boxes (B,Q,4)) tensors
    b,  # likewise, of the same sizes
    tolerance: float = TOLERANCE,  # of both
) -> float:  # in [0,1]
    "Share of the queries of `a` that no query of `b` equals in scores and box"
    x, y = torch.cat(a, -1), torch.cat(b, -1)
    nearest = torch.stack([(q[:, None] - r[None]).abs().amax(-1).amin(1) for q, r in zip(x, y)])
    return float((nearest > tolerance).float().mean())


def _check(model, session, path):
    "`ConfigError` unless a graph without suppression gives what the network gives, at two sizes"
    generator = torch.Generator().manual_seed(0)
    for batch, h, w in ((1, 192, 224), (2, 233, 189)):
        images = torch.randn(batch, 3, h, w, generator=generator)
        mask = torch.zeros(batch, h, w, dtype=torch.bool)
        if batch > 1:
            mask[1, :, w // 2 :] = True
            images[1, :, :, w // 2 :] = 0
        with torch.no_grad():
            wanted = Scored(model)(images, mask)
        got = session.run(['scores', 'boxes'], dict(images=images.numpy(), mask=mask.numpy()))
        share = unmatched(wanted, [torch.from_numpy(g) for g in got])
        if share > 0.02:
            raise ConfigError(
                f'{path}: not written, {share:.0%} of the queries of the graph differ from those of the '
                f'network at {h} x {w}; a layer computes with sizes in Python; use safetensors'
            )


# %%
order = torch.randperm(40)
shuffled = [o[:, order] for o in three[:2]]
assert unmatched(three[:2], shuffled) == 0
unmatched(three[:2], [shuffled[0] + 0.1, shuffled[1]])


# %%
#| export
def _check_iou(nms):
    if nms is not None and not 0 < nms <= 1:
        raise ConfigError(f'nms={nms} is outside (0, 1]; it is an IoU')


def to_onnx(
    run,  # folder of a run, its .pt file, or a .safetensors file
    out=None,  # file to write; None: model.onnx in the folder of the run
    nms: float = None,  # IoU of a per-class suppression inside the graph; None: none
    opset: int = 17,  # version of ONNX's operations, within OPSETS
    which: str = 'teacher',  # or 'student'
    like=None,  # Config with settings classes of your own, if the run has such
    overwrite: bool = False,  # replace an existing file
) -> Path:  # of the file
    "A graph from images (B,3,H,W) and mask (B,H,W) to scores (B,Q,C) and boxes (B,Q,4) cxcywh in [0,1]"
    _check_iou(nms)
    if not OPSETS[0] <= opset <= OPSETS[1]:
        raise ConfigError(f'opset={opset} cannot be written; choose one of {OPSETS[0]}..{OPSETS[1]}')
    path = output_path(run, 'model.onnx', out, overwrite)
    need('onnx', 'semidetr export', 'export')
    need('onnxruntime', 'semidetr export', 'export')
    model, cfg, classes = load_model(run, which, 'cpu', like)
    refuse_assigned(model, run, 'onnx')
    if not isinstance(model, nn.Module):
        raise ConfigError(f'{run}: is exported already; give the folder of the run')
    proto = _record(model, None, opset)
    _check(model, open_session(proto.SerializeToString(), path), path)
    if nms is not None:
        proto = _record(model, nms, opset)
        open_session(proto.SerializeToString(), path)
    about = dict(description(cfg, classes), semidetr='1', network=which, nms=json.dumps(nms))
    for key, text in about.items():
        proto.metadata_props.add(key=key, value=text)
    atomic_write(path, proto.SerializeToString())
    return path


# %%
file = to_onnx(folder)
f'{file.name}: {file.stat().st_size / 1e6:.1f} MB'

# %% [markdown]
# ## Predicting with the file
#
# `Predictor` needs a network, a configuration and class names, and takes them from such a file as from a run
# (@sec-exported). A session of `onnxruntime` stands for the network.

# %%
ours, theirs = (Predictor(path, 'cpu', threshold=0.5) for path in (folder, file))
photos = [scenes[i].image for i in range(3)]
pairs = list(zip(ours(photos), theirs(photos)))
assert all(a['names'] == b['names'] for a, b in pairs) and sum(len(a['names']) for a, b in pairs)
worst = max(float((a['boxes'] - b['boxes']).abs().max()) for a, b in pairs if len(a['names']))
assert worst < 0.05
f'{worst:.0e} pixels'

# %% [markdown]
# ## Without this package
#
# The program below needs `onnxruntime`, NumPy and Pillow. Class names, sizes and normalisation come from the
# file.

# %%
#| export
SCRIPT = """\
import json, sys
import numpy as np, onnxruntime
from PIL import Image, ImageOps

net = onnxruntime.InferenceSession(sys.argv[1])
about = net.get_modelmeta().custom_metadata_map
view, classes = json.loads(about['view']), json.loads(about['classes'])
image = ImageOps.exif_transpose(Image.open(sys.argv[2])).convert('RGB')
scale = min(view['eval_short'] / min(image.size), view['max_side'] / max(image.size))
size = [max(view['min_side'], int(s * scale + 0.5)) for s in image.size]
small = image.resize(size, Image.Resampling.BILINEAR)
x = ((np.asarray(small) / 255 - view['mean']) / view['std']).astype('float32').transpose(2, 0, 1)[None]
inputs = dict(images=x, mask=np.zeros_like(x[:, 0], bool))
scores, boxes = (y[0] for y in net.run(['scores', 'boxes'], inputs))
for q, c in np.argwhere(scores > float(sys.argv[3])):
    corners = np.concatenate([boxes[q, :2] - boxes[q, 2:] / 2, boxes[q, :2] + boxes[q, 2:] / 2])
    print(classes[c], f'{scores[q, c]:.3f}', *(corners.clip(0, 1) * (image.size * 2)).round(1))
"""

# %%
photos[0].save(folder / 'photo.png')
(folder / 'detect.py').write_text(SCRIPT)
command = [sys.executable, folder / 'detect.py', file, folder / 'photo.png', '0.5']
done = subprocess.run(command, capture_output=True, text=True)
lines = done.stdout.splitlines()
found = ours(photos[0])
assert done.returncode == 0 and sorted(r.split()[0] for r in lines) == sorted(found['names'])
print(SCRIPT)
lines[:3]

# %% [markdown]
# Its boxes differ from ours by a fraction of a pixel, because Pillow and torch round resized pixels
# differently. It does not pad: with `view.pad_multiple` above 1 the difference is larger.

# %%
#| label: fig-onnx-same
#| fig-cap: "The same scene through the run and through the graph. The network is untrained: the boxes only show that both agree."
#| fig-alt: "Two copies of a scene of digits with the same boxes"
fig, axes = plt.subplots(1, 2, figsize=(5, 2.6), dpi=80)
for ax, (title, p) in zip(axes, (('run', ours), ('model.onnx', theirs))):
    d = {k: v[:3] for k, v in p(photos[0]).items()}
    show_image(ax, p.draw(photos[0], d), title=title)
plt.tight_layout()
plt.show()


# %% [markdown]
# ## A program for torch
#
# `torch.export` records a program that torch loads without this package. It follows the sizes as symbols, so
# every number that depends on them must come from a shape, not from `len`, which is a plain Python number. The
# three sizes of the example differ: equal ones would become one symbol. Symbols take time, for DINO a minute or
# more; a program for one shape only (`size`) is recorded in seconds.

# %%
#| export
def to_exported(
    run,  # folder of a run, its .pt file, or a .safetensors file
    out=None,  # file to write; None: model.pt2 in the folder of the run
    size=None,  # (B, H, W) that the program is for; None: any
    which: str = 'teacher',  # or 'student'
    like=None,  # Config with settings classes of your own, if the run has such
    overwrite: bool = False,  # replace an existing file
) -> Path:  # of the file; `torch.export.load(path).module()` takes images (B,3,H,W) and mask (B,H,W)
    "The network as a program of `torch.export` with the outputs of `to_onnx`, for any batch and any size"
    path = output_path(run, 'model.pt2', out, overwrite)
    model, cfg, classes = load_model(run, which, 'cpu', like)
    refuse_assigned(model, run, 'a torch program')
    if not isinstance(model, nn.Module):
        raise ConfigError(f'{run}: is exported already; give the folder of the run')
    b, h, w = size or (2, cfg.view.eval_short, cfg.view.eval_short * 5 // 4)
    images, mask = torch.zeros(b, 3, h, w), torch.zeros(b, h, w, dtype=torch.bool)
    free = torch.export.Dim.AUTO
    symbols = None if size else ({0: free, 2: free, 3: free}, {0: free, 1: free, 2: free})
    with torch.no_grad(), traceable(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        program = torch.export.export(Scored(model), (images, mask), dynamic_shapes=symbols, strict=False)
    buffer = io.BytesIO()
    about = dict(description(cfg, classes), semidetr='1', network=which)
    torch.export.save(program, buffer, extra_files={f'{k}.json': text for k, text in about.items()})
    atomic_write(path, buffer.getvalue())
    return path


FORMATS = ('onnx', 'safetensors', 'transformers', 'torch')


def export_run(
    run,  # folder of a run, or its .pt file
    format: str = 'onnx',  # one of FORMATS
    out=None,  # file or folder to write; None: in the folder of the run
    nms: float = None,  # IoU of a suppression inside the graph; onnx only
    which: str = 'teacher',  # or 'student'
    like=None,  # Config with settings classes of your own, if the run has such
    overwrite: bool = False,  # replace what is there
) -> Path:  # of what was written
    "Write the detector of a run in a format that other programs read"
    if format not in FORMATS:
        raise ConfigError(f"format '{format}' is unknown; {suggest(format, FORMATS)}")
    if nms is not None and format != 'onnx':
        raise ConfigError(f'nms={nms}: suppression goes into onnx only, not into {format}; leave it out')
    if format == 'onnx':
        return to_onnx(run, out, nms, which=which, like=like, overwrite=overwrite)
    write = dict(safetensors=to_safetensors, transformers=to_transformers, torch=to_exported)[format]
    return write(run, out, which=which, like=like, overwrite=overwrite)


# %%
refused = []
for bad in (dict(format='onx'), dict(format='torch', nms=0.5), dict(format='onnx')):
    try:
        export_run(folder, **bad)
    except ConfigError as e:
        refused.append(str(e).replace(str(folder), 'run'))
assert len(refused) == 3
refused

# %% [markdown]
# ## Summary
#
# - An ONNX file holds weights, computation, class names and view settings; batch and size are free.
# - It is compared with the network before it is written, and not written if it differs.
# - Suppression inside the graph sets the scores of suppressed pairs to zero.
# - `Predictor` takes runs and exported files alike; a short script does without this package.
# - A torch program takes any batch and size as well, or one shape if it has to be recorded quickly.
#
# ## Exercises
#
# 1. Trace with `level_masks` in its usual form and a mask without padding. What does the file do with a padded
#    batch?
# 2. Add `pad_multiple` to the script.
# 3. Compare the time of `theirs` and `ours` on a large image. Which operation of the graph takes longest?
