# %% [markdown]
# # The native op {#sec-native}
#
# > Run deformable attention in C++ or CUDA where a compiler is found, in plain PyTorch where not, and know which of the two runs.
#
# *Why.* A DETR spends a third to a half of a CPU training step in deformable attention (@sec-attention). In plain PyTorch it is a chain of `grid_sample` calls: one big tensor per level,
# written, read and written again. The arithmetic is small; the traffic is not. A kernel that walks over the queries keeps everything in cache. The price of such kernels has always been the
# build: the field's op must be compiled by hand, for one CUDA version. So here the op builds itself at first use, in a few seconds, and where it cannot, nothing breaks.

# %%
#| default_exp native

# %%
#| export
import ctypes
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
import torch
from torch import Tensor
from semidetr.core import ConfigError

# %% [markdown]
# ## Two forms of one sum
#
# For query $q$ and head $m$, with $L$ levels and $P$ points, both forms compute
#
# $$o_{qm}=\sum_{l=1}^{L}\sum_{p=1}^{P} a_{qmlp}\; v_m^{l}\!\left(x_{qmlp}\right)$$ {#eq-native-sum}
#
# where $v_m^l(x)$ is the bilinear value of head $m$'s map of level $l$ at position $x$. In the *plain* form locations $x$ and weights $a$ are given. In the *fused* form the op also does what stands before them
# in every DETR: the softmax of the logits $z$ and the sum of reference point $r$ and offset $\delta$,
#
# $$a_{qm}=\operatorname{softmax}(z_{qm}),\qquad x_{qmlp}=r_{ql}+\frac{\delta_{qmlp}}{(W_l,H_l)}\quad\text{or}\quad x_{qmlp}=c_{ql}+\frac{\delta_{qmlp}}{2P}\odot(w,h)_{ql}$$ {#eq-native-fused}
#
# the second for a reference box $(c, w, h)$, and it reads padded pixels as zero. Six passes over tensors of $B\,Q\,M\,L\,P$ numbers disappear, and twice as many in the backward pass.
#
# The operators have names and schemas even where nothing was built: a fake kernel (shapes only, for `torch.compile` and `torch.export`), a gradient and an autocast rule belong to the schema, not to the library.

# %%
#| export
_SCHEMAS = dict(
    ms_deform_attn='(Tensor value, int[] spatial_shapes, Tensor locations, Tensor weights) -> Tensor',
    ms_deform_attn_backward='(Tensor grad, Tensor value, int[] spatial_shapes, Tensor locations, Tensor weights) -> (Tensor, Tensor, Tensor)',
    fused_ms_deform_attn='(Tensor value, int[] spatial_shapes, Tensor reference, Tensor offsets, Tensor logits, Tensor? padding_mask) -> Tensor',
    fused_ms_deform_attn_backward='(Tensor grad, Tensor value, int[] spatial_shapes, Tensor reference, Tensor offsets, Tensor logits, '
                                  'Tensor? padding_mask, bool reference_grad) -> (Tensor, Tensor, Tensor, Tensor)')

def _fakes():
    "What each operator returns, without the numbers"
    def plain(value, shapes, locations, weights): return value.new_empty(value.shape[0], locations.shape[1], value.shape[2]*value.shape[3])
    def plain_back(grad, value, shapes, locations, weights):
        return tuple(t.new_empty(t.shape) for t in (value, locations, weights))
    def fused(value, shapes, reference, offsets, logits, mask): return plain(value, shapes, offsets, logits)
    def fused_back(grad, value, shapes, reference, offsets, logits, mask, reference_grad):
        ref = reference.new_empty(reference.shape if reference_grad else (0,))
        return (value.new_empty(value.shape), ref, offsets.new_empty(offsets.shape), logits.new_empty(logits.shape))
    return dict(zip(_SCHEMAS, (plain, plain_back, fused, fused_back)))


# %% [markdown]
# The gradient formulas call the backward operators. Reference points get a gradient only when something asks for it: an encoder never does, and Deformable-DETR's first decoder layer does.

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
        gv, gr, go, gl = ops.fused_ms_deform_attn_backward(grad, value, ctx.shapes, reference, offsets, logits, mask, need)
        return gv, None, gr if need else None, go, gl, None
    return dict(ms_deform_attn=(setup, plain), fused_ms_deform_attn=(setup, fused))


# %% [markdown]
# Under autocast the value takes the lower precision; locations and reference points never do: bfloat16 has eight bits, and in a map 160 pixels wide that is an error of half a pixel.

# %%
#| export
def _autocast(ops, device):
    "Autocast kernels of the two forms for one device type"
    def low(t): return t.to(torch.get_autocast_dtype(device)) if t.is_floating_point() and t.dtype != torch.float64 else t
    def full(t): return t if t.dtype == torch.float64 else t.float()
    def plain(value, shapes, locations, weights):
        with torch.autocast(device, enabled=False):
            return ops.ms_deform_attn(low(value), shapes, full(locations), full(weights))
    def fused(value, shapes, reference, offsets, logits, mask):
        value = low(value)
        if offsets.dtype != logits.dtype or offsets.dtype != value.dtype: offsets, logits = full(offsets), full(logits)
        with torch.autocast(device, enabled=False):
            return ops.fused_ms_deform_attn(value, shapes, full(reference), offsets, logits, mask)
    return dict(ms_deform_attn=plain, fused_ms_deform_attn=fused)

_LIBS = {}

def _register(
    ns:str='semidetr', # namespace under torch.ops
):
    "Define the four operators in a namespace: schema, fake kernel, gradient, autocast rule; once"
    if ns in _LIBS: return getattr(torch.ops, ns)
    lib = _LIBS[ns] = torch.library.Library(ns, 'FRAGMENT')
    for name, schema in _SCHEMAS.items(): lib.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    ops = getattr(torch.ops, ns)
    for name, fake in _fakes().items(): torch.library.register_fake(f'{ns}::{name}', fake, lib=lib)
    for name, (setup, backward) in _gradients(ops).items():
        torch.library.register_autograd(f'{ns}::{name}', backward, setup_context=setup, lib=lib)
    for device, key in (('cpu', 'AutocastCPU'), ('cuda', 'AutocastCUDA')):
        for name, f in _autocast(ops, device).items(): lib.impl(name, f, key)
    return ops

_register();


# %% [markdown]
# ## The build
#
# The sources lie in `csrc/`, beside this module, in the wheel too. They use torch's stable ABI: no Python header, no pybind, nothing that changes with the torch version, so that a build
# takes seconds (the ordinary `torch/extension.h` alone takes longer). The kernels are compiled once per instruction set, each with the vector width that this set has, and the library picks one when it is loaded.
# A build on first use makes only the one that this CPU needs.

# %%
#| export
_MIN_TORCH = (2, 10) # first version whose stable ABI has all that the sources use
_ISA_FLAGS = dict(
    base='', v3='-mavx2 -mfma -mbmi -mbmi2 -mf16c',
    v4='-mavx2 -mfma -mbmi -mbmi2 -mf16c -mavx512f -mavx512bw -mavx512cd -mavx512dq -mavx512vl -mprefer-vector-width=512')
_FLAGS = '-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wno-psabi'
_ABI = '-DTORCH_TARGET_VERSION=0x020a000000000000'
_NVCC_FLAGS = '-std=c++17 -O3 -Xcompiler -fPIC -Xcompiler -fvisibility=hidden'

def _csrc()->Path: return Path(__file__).resolve().parent/'csrc' if '__file__' in globals() else Path(torch.__file__)

def _cpu_isa()->str:
    "Widest of the three instruction sets that this CPU has"
    if platform.machine().lower() not in ('x86_64', 'amd64'): return 'base'
    cap = torch.backends.cpu.get_cpu_capability()
    return 'v4' if 'AVX512' in cap or 'AMX' in cap else 'v3' if 'AVX2' in cap else 'base'

def _compiler()->list[str]:
    "The C++ compiler's command; empty where there is none"
    names = [os.environ['CXX']] if os.environ.get('CXX') else ['c++', 'g++', 'clang++']
    for n in names:
        words = n.split()
        if words and shutil.which(words[0]): return [shutil.which(words[0]), *words[1:]]
    return []
