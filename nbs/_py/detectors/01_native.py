# %% [markdown]
# # The native op {#sec-native}
#
# > Run deformable attention in C++ or CUDA where there is a compiler, in plain PyTorch elsewhere.
#
# *Why.* On a CPU deformable attention (@sec-attention) takes a large share of a DETR's training step
# (@sec-speed). In plain PyTorch it is a chain of `grid_sample` calls: one big tensor per level, written, read
# and written again. The arithmetic is cheap; the memory traffic is not. A kernel that loops over the queries keeps
# everything in cache. The library with the kernels comes with the package or is compiled at first use
# (@sec-build); where neither is possible, plain PyTorch takes its place.

# %%
#| default_exp detectors.native

# %%
#| export
import ctypes, os, warnings
import torch
from torch import Tensor
from semidetr.core import ConfigError, at_least_float32
from semidetr.detectors.build import build_ops, package_folder

# %%
import matplotlib.pyplot as plt
from torch._subclasses.fake_tensor import FakeTensorMode
from semidetr.draw import show_image, draw_points

# %% [markdown]
# ## Two forms of one sum
#
# For query $q$ and head $m$, with $L$ levels and $P$ points, both forms compute
#
# $$o_{qm}=\sum_{l=1}^{L}\sum_{p=1}^{P} a_{qmlp}\; v_m^{l}\!\left(x_{qmlp}\right)$$ {#eq-native-sum}
#
# where $v_m^l(x)$ is the bilinear value of head $m$'s map of level $l$ at position $x$. In the *plain* form
# locations $x$ and weights $a$ are given. In the *fused* form the op also does what stands before them in
# every DETR: the softmax of the logits $z$ and the sum of reference point $r$ and offset $\delta$,
#
# $$a_{qm}=\operatorname{softmax}(z_{qm}),\qquad x_{qmlp}=r_{ql}+\frac{\delta_{qmlp}}{(W_l,H_l)}\quad\text{or}\quad x_{qmlp}=c_{ql}+\frac{\delta_{qmlp}}{2P}\odot(w,h)_{ql}$$ {#eq-native-fused}
#
# the second for a reference box $(c, w, h)$, and it reads padded pixels as zero. Six passes over tensors of
# $B\,Q\,M\,L\,P$ numbers disappear, and twice as many in the backward pass.
#
# The operators have names and schemas even where nothing was built: a fake kernel (shapes only, for
# `torch.compile` and `torch.export`), a gradient and an autocast rule belong to the schema, not to the
# library.

# %%
#| export
_PLAIN = 'Tensor value, int[] spatial_shapes, Tensor locations, Tensor weights'
_FUSED = (
    'Tensor value, int[] spatial_shapes, Tensor reference, Tensor offsets, Tensor logits, '
    'Tensor? padding_mask'
)
_SCHEMAS = dict(
    ms_deform_attn=f'({_PLAIN}) -> Tensor',
    ms_deform_attn_backward=f'(Tensor grad, {_PLAIN}) -> (Tensor, Tensor, Tensor)',
    fused_ms_deform_attn=f'({_FUSED}) -> Tensor',
    fused_ms_deform_attn_backward=f'(Tensor grad, {_FUSED}, bool reference_grad) '
    '-> (Tensor, Tensor, Tensor, Tensor)',
)


def _fakes():
    "What each operator returns, without the numbers"

    def plain(value, shapes, locations, weights):
        return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])

    def plain_back(grad, value, shapes, locations, weights):
        return tuple(t.new_empty(t.shape) for t in (value, locations, weights))

    def fused(value, shapes, reference, offsets, logits, mask):
        return plain(value, shapes, offsets, logits)

    def fused_back(grad, value, shapes, reference, offsets, logits, mask, reference_grad):
        ref = reference if reference_grad else reference.new_empty(0)
        return tuple(t.new_empty(t.shape) for t in (value, ref, offsets, logits))

    return dict(zip(_SCHEMAS, (plain, plain_back, fused, fused_back)))


# %% [markdown]
# The gradient formulas call the backward operators. Reference points get a gradient only where one is needed:
# never in an encoder, but in the first decoder layer of Deformable-DETR.

# %%
#| export
def _gradients(ops):
    "Autograd formulas of the two forms: {operator: (setup_context, backward)}"

    def setup(ctx, inputs, output):
        value, ctx.shapes, *rest = inputs
        ctx.save_for_backward(value, *rest)

    def plain(ctx, grad):
        value, locations, weights = ctx.saved_tensors
        gv, gl, gw = ops.ms_deform_attn_backward(grad, value, ctx.shapes, locations, weights)
        return gv, None, gl, gw

    def fused(ctx, grad):
        value, reference, offsets, logits, mask = ctx.saved_tensors
        need = ctx.needs_input_grad[2]
        gv, gr, go, gl = ops.fused_ms_deform_attn_backward(
            grad, value, ctx.shapes, reference, offsets, logits, mask, need
        )
        return gv, None, gr if need else None, go, gl, None

    return dict(ms_deform_attn=(setup, plain), fused_ms_deform_attn=(setup, fused))


# %% [markdown]
# Under autocast the value takes the lower precision; locations and reference points never do: bfloat16 has
# eight bits, and in a map 160 pixels wide that is an error of half a pixel.

# %%
#| export
def _autocast(ops, device):
    "Autocast kernels of the two forms for one device type"

    def low(t):
        is_rounded = t.is_floating_point() and t.dtype != torch.float64
        return t.to(torch.get_autocast_dtype(device)) if is_rounded else t

    full = at_least_float32

    def plain(value, shapes, locations, weights):
        with torch.autocast(device, enabled=False):
            return ops.ms_deform_attn(low(value), shapes, full(locations), full(weights))

    def fused(value, shapes, reference, offsets, logits, mask):
        value = low(value)
        if offsets.dtype != logits.dtype or offsets.dtype != value.dtype:
            offsets, logits = full(offsets), full(logits)
        with torch.autocast(device, enabled=False):
            return ops.fused_ms_deform_attn(value, shapes, full(reference), offsets, logits, mask)

    return dict(ms_deform_attn=plain, fused_ms_deform_attn=fused)


_LIBS = {}


def _register(
    ns: str = 'semidetr',  # namespace under torch.ops
):
    "Define the four operators in a namespace: schema, fake kernel, gradient, autocast rule; once"
    ops = getattr(torch.ops, ns)
    if hasattr(ops, 'ms_deform_attn'):
        return ops
    lib = _LIBS[ns] = torch.library.Library(ns, 'FRAGMENT')
    for name, schema in _SCHEMAS.items():
        lib.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    for name, fake in _fakes().items():
        torch.library.register_fake(f'{ns}::{name}', fake, lib=lib)
    for name, (setup, backward) in _gradients(ops).items():
        torch.library.register_autograd(f'{ns}::{name}', backward, setup_context=setup, lib=lib)
    for device, key in (('cpu', 'AutocastCPU'), ('cuda', 'AutocastCUDA')):
        for name, f in _autocast(ops, device).items():
            lib.impl(name, f, key)
    return ops


_OPS = _register()

# %% [markdown]
# Fake tensors have shapes and no numbers. This is what `torch.compile` and `torch.export` work with: an
# encoder layer of a COCO image, and nothing is computed.

# %%
with FakeTensorMode():
    pyramid = [(100, 167), (50, 84), (25, 42), (13, 21)]
    S_coco = sum(h * w for h, w in pyramid)
    faked = torch.ops.semidetr.fused_ms_deform_attn(
        torch.empty(2, S_coco, 8, 32),
        [n for hw in pyramid for n in hw],
        torch.empty(2, S_coco, 4, 2),
        torch.empty(2, S_coco, 8, 4, 4, 2),
        torch.empty(2, S_coco, 8, 16),
        None,
    )
assert faked.shape == (2, 22223, 256)
faked.shape

# %% [markdown]
# ## Loading
#
# First choice is a library that came with the package, then one built on this machine, now or earlier, then
# plain PyTorch with one warning. `SEMIDETR_OPS` chooses: `auto` is that order, `torch` never loads anything,
# `native` raises an error where `auto` would warn.

# %%
#| export
_DTYPES = dict(
    cpu=(torch.float32, torch.float64, torch.bfloat16), cuda=(torch.float32, torch.float16, torch.bfloat16)
)
_MAX_POINTS, _MAX_LEVELS = 128, 16
_TRIED: dict = {}  # device type -> dict(ready, source, path, reason)
_WARNED: list = []


def _mode() -> str:
    mode = os.environ.get('SEMIDETR_OPS', 'auto') or 'auto'
    if mode not in ('auto', 'native', 'torch'):
        raise ConfigError(f"SEMIDETR_OPS='{mode}' is not known; use auto, native or torch")
    return mode


def _has_kernel(kind):
    return torch._C._dispatch_has_kernel_for_dispatch_key('semidetr::ms_deform_attn', kind.upper())


def _libraries(kind):
    "(file, source) of the libraries to try: shipped, built, and built again if the cached file is damaged"
    for path in sorted(package_folder().glob('_C_cuda*.so' if kind == 'cuda' else '_C.*so')):
        yield path, 'prebuilt'
    if kind == 'cuda' and not torch.cuda.is_available():
        raise ConfigError('torch sees no GPU')
    yield build_ops(kind), 'built'
    yield build_ops(kind, force=True), 'built'


def _load_error(path, kind):
    "Load a library; why it is of no use, '' if it is"
    try:
        torch.ops.load_library(str(path))
    except Exception as e:
        return f'{path.name} cannot be loaded ({str(e).splitlines()[0]})'
    return '' if _has_kernel(kind) else f'{path.name} holds no {kind} kernel'


def _load(
    kind: str,  # 'cpu' or 'cuda'
) -> dict:  # ready, source, path, reason
    "Find or build the library of one device type and load it; never raises"
    if _has_kernel(kind):
        return dict(ready=True, source='loaded before', path='', reason='')
    errors = []
    try:
        for path, source in _libraries(kind):
            errors.append(_load_error(path, kind))
            if not errors[-1]:
                return dict(ready=True, source=source, path=str(path), reason='')
    except Exception as e:
        errors.append(str(e).splitlines()[0] if str(e) else type(e).__name__)
    return dict(ready=False, source='', path='', reason='; '.join(errors))


# %%
#| export
_CURE = dict(
    cpu='install g++ or clang++ and run `semidetr build-ops`',
    cuda='install the CUDA toolkit (nvcc), set CUDA_HOME and run `semidetr build-ops`',
)


def _refuse(kind, reason, cure):
    "Warn once in a process, or raise the error that SEMIDETR_OPS=native asks for"
    text = (
        f'deformable attention runs in plain PyTorch, many times slower: {reason}. '
        f'To get the native op: {cure}'
    )
    if _mode() == 'native':
        raise ConfigError(f'SEMIDETR_OPS=native, but {text}')
    if not _WARNED:
        _WARNED.append(text)
        warnings.warn(text, RuntimeWarning, stacklevel=3)
    return False


@torch.compiler.assume_constant_result
def native_available(
    dtype: torch.dtype = torch.float32,  # of the value
    device='cpu',  # of the value: name or torch.device
    points: int = 1,  # points per head: levels times points per level
    levels: int = 1,  # levels
) -> bool:
    "Can the native op take such a value? Loads or builds the library at the first call; warns once if not"
    kind = torch.device(device).type
    if _mode() == 'torch' or kind == 'meta':
        return False
    if kind not in _DTYPES:
        return _refuse(kind, f'no kernel for the device {kind}', 'use the CPU or a CUDA GPU')
    if kind not in _TRIED:
        _TRIED[kind] = _load(kind)
    if not _TRIED[kind]['ready']:
        return _refuse(kind, _TRIED[kind]['reason'], _CURE[kind])
    if dtype not in _DTYPES[kind]:
        known = ', '.join(str(d).removeprefix('torch.') for d in _DTYPES[kind])
        return _refuse(kind, f'no {kind} kernel for {dtype}', f'use {known}')
    if points > _MAX_POINTS or levels > _MAX_LEVELS:
        reason = f'{levels} levels, {points} points per head'
        return _refuse(kind, reason, f'at most {_MAX_LEVELS} and {_MAX_POINTS}')
    return True


def ops_status(
    load: bool = True,  # try to load now; False only reports what was tried before
) -> dict:  # mode, cpu and cuda: each ready, source, path, reason; cpu also isa
    "What is in use, and why: for `semidetr doctor --env`"
    status = dict(mode=_mode())
    for kind in ('cpu', 'cuda'):
        present = kind == 'cpu' or torch.cuda.is_available()
        if load and present and kind not in _TRIED and status['mode'] != 'torch':
            _TRIED[kind] = _load(kind)
        status[kind] = dict(_TRIED.get(kind) or dict(ready=False, source='', path='', reason='not tried'))
    if path := status['cpu']['path']:
        isa = ctypes.CDLL(path).semidetr_isa
        isa.restype = ctypes.c_char_p
        status['cpu']['isa'] = isa().decode()
    return status


# %% [markdown]
# ## The two functions
#
# They take what @sec-attention has computed. Locations, weights and reference points are brought to float32
# (float64 for a float64 value); offsets and logits may stay in bfloat16 with a bfloat16 value.

# %%
#| export
def _flat(shapes):
    return [n for hw in shapes for n in hw]


def native_ms_deform_attn(
    value: Tensor,  # (B,S,M,D) projected features of all levels, head by head
    spatial_shapes,  # [(h,w)] of the L levels, sum of h*w = S
    locations: Tensor,  # (B,Q,M,L,P,2) sampling locations (x,y); [0,1] is the map
    weights: Tensor,  # (B,Q,M,L,P) attention weights
) -> Tensor:  # (B,Q,M*D)
    "Deformable attention's sampling and sum (@eq-native-sum) by the native op; ask `native_available` first"
    real = torch.promote_types(value.dtype, torch.float32)
    shapes = _flat(spatial_shapes)
    return _OPS.ms_deform_attn(value, shapes, locations.to(real), weights.to(real))


def native_fused_ms_deform_attn(
    value: Tensor,  # (B,S,M,D)
    spatial_shapes,  # [(h,w)] of the L levels
    reference_points: Tensor,  # (B,Q,L,2) points or (B,Q,L,4) cxcywh boxes, times the valid ratios
    raw_offsets: Tensor,  # (B,Q,M,L,P,2) as the linear layer gives them
    logits: Tensor,  # (B,Q,M,L*P) before the softmax
    padding_mask=None,  # (B,S) bool, True = padding, or None
) -> Tensor:  # (B,Q,M*D)
    "Softmax, locations (@eq-native-fused), masking and sampling in one native op"
    real = torch.promote_types(value.dtype, torch.float32)
    raw = value.dtype if raw_offsets.dtype == logits.dtype == value.dtype else real
    reference_points, raw_offsets, logits = reference_points.to(real), raw_offsets.to(raw), logits.to(raw)
    shapes = _flat(spatial_shapes)
    return _OPS.fused_ms_deform_attn(value, shapes, reference_points, raw_offsets, logits, padding_mask)


# %% [markdown]
# What is in use here? On a machine without a compiler `ready` is False, and the op's examples below are
# skipped.

# %%
ready = native_available()
{k: v for k, v in ops_status()['cpu'].items() if k in ('ready', 'source', 'isa')}


# %% [markdown]
# ## Check by hand
#
# A map of 3 x 4 pixels holds 0 to 11. Half way between pixels 5 and 6 the value is 5.5; on the left edge one
# of the two taps lies outside, where everything is zero, so that pixel 4 counts half. A location that is
# infinite or not a number is outside, too.

# %%
def sample(x, y):
    "Value of the little map at a place given in pixels"
    little_map = torch.arange(12.0).view(1, 12, 1, 1)
    place = torch.tensor([x / 4, y / 3]).view(1, 1, 1, 1, 1, 2)
    return native_ms_deform_attn(little_map, [(3, 4)], place, torch.ones(1, 1, 1, 1, 1)).item()


if ready:
    by_hand = [sample(x, 1.5) for x in (2.5, 2, 0, float('nan'), float('inf'))]
    assert by_hand == [6, 5.5, 2, 0, 0]
    print(by_hand)

# %% [markdown]
# ## What a query reads
#
# The gradient of one query's output with respect to the value is one number per pixel: the total weight with
# which the query reads it. Here one head samples four points per level around the centre of the image. Each
# point spreads over its four nearest pixels.

# %%
torch.manual_seed(0)
shapes = [(24, 32), (12, 16), (6, 8)]
value = torch.zeros(1, sum(h * w for h, w in shapes), 1, 1, requires_grad=True)
reference = torch.full((1, 1, 3, 2), 0.5)
offsets, logits = torch.randn(1, 1, 1, 3, 4, 2), torch.randn(1, 1, 1, 12)
if ready:
    native_fused_ms_deform_attn(value, shapes, reference, offsets, logits).sum().backward()
read = torch.zeros_like(value) if value.grad is None else value.grad
assert not ready or abs(read.sum() - 1) < 1e-6
read.sum().item()

# %% [markdown]
# The weights of a softmax sum to one, and so do the pixels, as long as no point leaves the map.

# %%
#| label: fig-native-read
#| fig-cap: "A query reads at most four pixels per point: with 12 points on three levels, at most 48 of 1008 pixels."
#| fig-alt: "Three dark maps of 24 by 32, 12 by 16 and 6 by 8 pixels; on each, a few pixels around four dots are bright."
figure, panels = plt.subplots(1, 3, figsize=(6, 1.8), dpi=80, layout='constrained')
brightness = (read.flatten() / read.max().clamp(min=1e-9)).clamp(0, 1)
weights = logits.softmax(-1).view(3, 4)
per_level = brightness.split([h * w for h, w in shapes])
for l, (h, w) in enumerate(shapes):
    places = torch.tensor([w, h]) / 2 + offsets[0, 0, 0, l]
    show_image(panels[l], per_level[l].view(h, w), title=f'level {l}: {h} x {w}')
    draw_points(panels[l], places, weights[l], kind='teacher', size=30)
plt.show()

# %% [markdown]
# ## How the CPU kernel is fast
#
# * **One task is one head of one image.** No other task writes to its slice of the value's gradient: no
#   atomics, and the same bits for any number of threads.
# * **The slice is packed first, with a frame of zeros**, when queries are many. A tap outside the map reads a
#   zero and needs no test; a point far outside is moved to where all its weight lies on the frame.
# * **Two phases.** Sixteen points at a time become pixel indices and weights, for four queries in a row, so
#   that the latency of one is hidden by work for another. Then channels are summed, one vector at a time.
# * **Dot products are reduced by a tree** in the backward pass: sixteen of them become one vector in fifteen
#   steps, each one blend, one shuffle and one addition.
# * **Rows are prefetched, and large gradients bypass the caches.** A head's rows lie $M$ rows apart, so that
#   the hardware prefetcher misses them: each query prefetches the rows of a later one. An ordinary write
#   loads the old cache line first and evicts another; a whole line of a gradient that no cache will keep is
#   written without either. Large results request large pages.
# * **The fraction of a pixel comes from one rounded multiplication and addition.** In a map 160 pixels wide
#   this keeps five bits that the usual formula loses.
#
# The CUDA kernels follow the usual division of labour: a group of lanes per head and query, shuffles for dot
# products, atomics in float32 for the value's gradient. Machines that run the tests often have no GPU. So the
# same source (kernels, launchers, binding) is also compiled as C++ against a small header in which a block's
# threads are fibers that meet at shuffles and barriers. The tests compare it with `grid_sample`, plant three
# faults in it and check that each is noticed, and repeat everything under sanitizers. What this cannot show
# are races between threads, and speed.
#
# ::: {.callout-note}
# ## Paper vs. code
# The papers' CUDA op takes float32 only, is built at install time and exists for GPUs alone; on a CPU the
# official code stops with an error. `SEMIDETR_OPS=torch` gives the plain PyTorch form that all
# implementations share.
# :::
#
# ## Summary
#
# * The op has a plain and a fused form; the fused one also does softmax, locations and masking.
# * Its library comes prebuilt in a wheel, or is built once, for this CPU, in the user's cache.
# * No compiler, a failed build, an unknown device or dtype: plain PyTorch, one warning with reason and cure.
# * Locations stay in float32 under autocast; the value may be bfloat16.
# * `ops_status` reports what is in use; `SEMIDETR_OPS` chooses.
#
# ## Exercises
#
# 1. Move the reference point to a corner of the image. Why is the sum over the read pixels now below one?
# 2. Set `SEMIDETR_ISA=base` before Python starts and time the op: how much do wide vectors gain?
# 3. Give a head two points at the same place. What is the gradient of the loss with respect to the two
#    offsets, and with respect to the two logits?
