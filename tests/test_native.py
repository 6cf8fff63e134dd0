"""The native op: against grid_sample in float64, as an operator, its build, its CUDA kernels on the CPU."""

import json, os, subprocess, sys, warnings
from pathlib import Path
import pytest, torch
from semidetr.core import ConfigError
from semidetr.detectors import build, native

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / 'csrc'))
import oracle as O
import sanitize

needs_compiler = pytest.mark.skipif(not build._compiler(), reason='no C++ compiler on this machine')
PYRAMID = [(6, 9), (3, 5), (2, 2), (1, 1)]
LIMIT = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 8e-3, torch.float16: 2e-3}


@pytest.fixture(scope='session')
def library():
    "The op for all instruction sets, built once and kept in the user's cache"
    if not build._compiler():
        pytest.skip('no C++ compiler on this machine')
    path = build.build_ops(isas=('all',))
    if not native._has_kernel('cpu'):
        torch.ops.load_library(str(path))
    return path


@pytest.fixture
def ops(library):
    return torch.ops.semidetr


def both(ops):
    return (ops.ms_deform_attn, ops.ms_deform_attn_backward), (
        ops.fused_ms_deform_attn,
        ops.fused_ms_deform_attn_backward,
    )


def worst(ops, *args, **kw):
    a, b, grad = O.case(*args, **kw)
    plain, fused = both(ops)
    return max(O.errors(plain, a, grad, O.plain)), max(O.errors(fused, b, grad, O.fused))


# ---- numbers -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    'B,Q,M,D,shapes,P,ref_dim,mask',
    [
        (2, 76, 8, 32, PYRAMID, 4, 2, True),  # packed
        (2, 2, 8, 32, [(16, 20), (8, 10)], 4, 4, True),  # not packed
        (1, 5, 1, 16, [(1, 1)], 1, 4, False),  # one pixel, one point
        (1, 9, 3, 32, [(5, 7)] * 5, 7, 2, True),  # 35 points: more than one block
        (2, 40, 1, 64, PYRAMID[:2], 3, 4, True),
        (1, 3, 2, 80, [(20, 30)], 5, 2, False),
    ],
)
def test_equals_grid_sample(ops, dtype, B, Q, M, D, shapes, P, ref_dim, mask):
    plain, fused = worst(ops, B, Q, M, D, shapes, P, dtype, ref_dim=ref_dim, mask=mask)
    assert plain < LIMIT[dtype] and fused < 3 * LIMIT[dtype]


@pytest.mark.parametrize('D', [1, 6, 8, 12, 16, 20, 24, 33, 48, 64])
def test_head_widths(ops, D):
    for dtype in (torch.float32, torch.bfloat16):
        assert max(worst(ops, 1, 11, 2, D, PYRAMID, 4, dtype, ref_dim=4, mask=True)) < 3 * LIMIT[dtype]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    'D,P', [(32, 4), (24, 4), (16, 7)]
)  # whole cache lines; the value's rows are not; neither are the points'
def test_large_gradients_are_the_same_bits(ops, dtype, D, P):
    """Gradients of megabytes bypass the caches

    What 40 queries get must not depend on 2000 others that have no gradient."""
    few, flat = 40, [n for hw in PYRAMID for n in hw]
    for ref_dim, raw in ((2, None), (4, torch.bfloat16 if dtype == torch.bfloat16 else None)):
        a, b, grad = O.case(1, 2000, 8, D, PYRAMID, P, dtype, ref_dim=ref_dim, mask=True, raw=raw)
        grad[:, few:] = 0
        for inputs, (_, backward), more in ((a, both(ops)[0], []), (b, both(ops)[1], [True])):
            rows = [t if t is None or t.shape[1] != 2000 else t[:, :few] for t in inputs[2:]]
            value, *large = backward(grad, inputs[0], flat, *inputs[2:], *more)
            value_, *small = backward(grad[:, :few], inputs[0], flat, *rows, *more)
            assert torch.equal(value, value_)
            for x, y in zip(large, small):
                assert torch.equal(x[:, :few], y) and (x[:, few:] == 0).all()
            assert sum(t.numel() * t.element_size() for t in large) > 1 << 20


def test_large_map_and_few_queries(ops):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert max(worst(ops, 1, 3, 8, 32, [(64, 48)], 4, dtype, ref_dim=4, mask=True)) < 3 * LIMIT[dtype]


def test_wide_map_keeps_precision(ops):
    assert worst(ops, 1, 50, 1, 32, [(100, 167)], 4)[0] < 1e-6


def test_bfloat16_offsets_and_logits(ops):
    _, fused = worst(ops, 1, 30, 2, 32, PYRAMID, 4, torch.bfloat16, mask=True, raw=torch.bfloat16)
    assert fused < LIMIT[torch.bfloat16]


def test_hand_values(library):
    value = torch.arange(12.0).view(1, 12, 1, 1)
    at = lambda x, y: native.native_ms_deform_attn(
        value, [(3, 4)], torch.tensor([x, y]).view(1, 1, 1, 1, 1, 2), torch.ones(1, 1, 1, 1, 1)
    ).item()
    assert at(2.5 / 4, 1.5 / 3) == 6 and at(2 / 4, 1.5 / 3) == 5.5 and at(0.0, 1.5 / 3) == 2


@pytest.mark.parametrize('name', ['msda2', 'msda4'])
def test_golden(library, name):
    golden = json.loads((HERE / 'golden' / 'msda.json').read_text())[name]
    w = {k: torch.tensor(v) for k, v in golden.pop('state').items()}
    g = {k: torch.tensor(v) for k, v in golden.items()}
    shapes = [(int(h), int(v)) for h, v in g['shapes']]

    def lin(k, x):
        return torch.nn.functional.linear(x, w[k + '.weight'], w[k + '.bias'])

    q, mem, pad = g['q'], g['mem'], g['pad'].bool()
    B, Q, d = q.shape
    L = len(shapes)
    n = w['attention_weights.bias'].numel()
    M = {24: 4}.get(n, 4)
    P = n // (M * L)
    value = lin('value_proj', mem).view(B, -1, M, d // M)
    ref = g['ref'] if g['ref'].dim() == 4 else g['ref'][:, :, None].expand(-1, -1, L, -1)
    offsets = lin('sampling_offsets', q).view(B, Q, M, L, P, 2)
    logits = lin('attention_weights', q).view(B, Q, M, L * P)
    out = native.native_fused_ms_deform_attn(value, shapes, ref, offsets, logits, pad)
    assert torch.allclose(lin('output_proj', out), g['out'], atol=2e-6)


def test_gradcheck(library):
    for ref_dim in (2, 4):
        _, (value, shapes, ref, off, logits, mask), _ = O.case(
            1, 3, 2, 4, [(3, 4), (2, 2)], 2, torch.float64, ref_dim=ref_dim, mask=True
        )
        leaves = [t.clone().requires_grad_() for t in (value, ref, off, logits)]
        assert torch.autograd.gradcheck(
            lambda v, r, o, z: native.native_fused_ms_deform_attn(v, shapes, r, o, z, mask),
            leaves,
            eps=1e-7,
            atol=1e-5,
        )
    (value, shapes, loc, w), _, _ = O.case(1, 3, 2, 4, [(3, 4), (2, 2)], 2, torch.float64)
    leaves = [t.clone().requires_grad_() for t in (value, loc, w)]
    assert torch.autograd.gradcheck(
        lambda v, x, a: native.native_ms_deform_attn(v, shapes, x, a), leaves, eps=1e-7, atol=1e-5
    )


@pytest.mark.parametrize('Q', [2, 80])  # unpacked and packed
def test_outside_is_zero_and_finite(ops, Q):
    (value, shapes, loc, w), (_, _, ref, off, logits, _), grad = O.case(1, Q, 2, 16, [(9, 7), (4, 4)], 4)
    flat = [n for hw in shapes for n in hw]
    for bad in (float('nan'), float('inf'), -float('inf'), 1e30, -1e30, 3e9, 2.0, -1.0):
        x = loc.clone()
        x[..., ::2, 0] = bad
        out = ops.ms_deform_attn(value, flat, x, w)
        keep = w.clone()
        keep[..., ::2] = 0
        inside = torch.where(x == loc, x, torch.full_like(x, 0.5))
        assert torch.equal(out, ops.ms_deform_attn(value, flat, inside, keep))
        gv, gx, gw = ops.ms_deform_attn_backward(grad, value, flat, x, w)
        assert torch.isfinite(gv).all() and (gx[..., ::2, 0] == 0).all() and (gw[..., ::2] == 0).all()
        o = off.clone()
        o[..., 1, 1] = bad * 1e3
        for t in (
            ops.fused_ms_deform_attn(value, flat, ref, o, logits, None),
            *ops.fused_ms_deform_attn_backward(grad, value, flat, ref, o, logits, None, True),
        ):
            assert torch.isfinite(t).all()


def test_on_the_borders(ops):
    shapes, value = [(2, 4)], torch.randn(1, 8, 1, 16, dtype=torch.float64)
    for x in (0.0, 0.125, 0.25, 0.5, 0.875, 1.0, 1.1, 1.124, -0.1249):
        loc = torch.tensor([x, 0.4], dtype=torch.float64).view(1, 1, 1, 1, 1, 2)
        w = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
        out = ops.ms_deform_attn(value, [2, 4], loc, w)
        assert torch.allclose(out, O.plain(value, shapes, loc, w), atol=1e-14), x


@pytest.mark.parametrize('Q', [2, 80])
def test_padding_is_not_read(ops, Q):
    _, (value, shapes, *rest, mask), grad = O.case(2, Q, 2, 16, [(9, 7), (4, 4)], 4, mask=True, ref_dim=4)
    flat, other = [n for hw in shapes for n in hw], value.masked_fill(mask[..., None, None], float('nan'))
    out, same = (ops.fused_ms_deform_attn(v, flat, *rest, mask) for v in (value, other))
    assert torch.equal(out, same)
    a, b = (ops.fused_ms_deform_attn_backward(grad, v, flat, *rest, mask, True) for v in (value, other))
    assert all(torch.equal(x, y) for x, y in zip(a, b)) and (a[0][mask] == 0).all()


def test_nan_logits_stay_nan(ops):
    _, (value, shapes, ref, off, logits, _), _ = O.case(1, 3, 2, 16, PYRAMID, 4)
    logits[0, 1, 0, 3] = float('nan')
    out = ops.fused_ms_deform_attn(value, [n for hw in shapes for n in hw], ref, off, logits, None).view(
        1, 3, 2, 16
    )
    assert out[0, 1, 0].isnan().all() and torch.isfinite(out[0, [0, 2]]).all()


def test_large_logits(ops):
    _, (value, shapes, ref, off, logits, _), _ = O.case(1, 9, 2, 16, PYRAMID, 4)
    for scale in (30.0, 300.0, 1e30):
        z = logits * scale
        want = O.fused(value.double(), shapes, ref.double(), off.double(), z.double())
        assert O.error(native.native_fused_ms_deform_attn(value, shapes, ref, off, z), want) < 3e-6


def test_empty_and_strided(ops):
    (value, shapes, loc, w), (_, _, ref, off, logits, _), grad = O.case(2, 6, 2, 16, PYRAMID, 4)
    flat = [n for hw in shapes for n in hw]
    want = ops.ms_deform_attn(value, flat, loc, w)
    turned = value.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    turned_loc = loc.transpose(0, 1).contiguous().transpose(0, 1)
    assert not turned.is_contiguous() and not turned_loc.is_contiguous()
    assert torch.equal(ops.ms_deform_attn(turned, flat, turned_loc, w), want)
    g = torch.ones(1, 1, 1).expand_as(want)
    strided = ops.ms_deform_attn_backward(g, turned, flat, loc, w)
    plain = ops.ms_deform_attn_backward(g.contiguous(), value, flat, loc, w)
    assert all(torch.equal(a, b) for a, b in zip(strided, plain))
    # no queries
    assert ops.ms_deform_attn(value, flat, loc[:, :0], w[:, :0]).shape == (2, 0, 32)
    gv, gl, gw = ops.ms_deform_attn_backward(grad[:, :0], value, flat, loc[:, :0], w[:, :0])
    assert (gv == 0).all() and gl.numel() == gw.numel() == 0
    out = ops.fused_ms_deform_attn_backward(
        grad[:, :0], value, flat, ref[:, :0], off[:, :0], logits[:, :0], None, True
    )
    assert (out[0] == 0).all() and out[1].shape == (2, 0, 4, 2)
    # no images
    assert ops.ms_deform_attn(value[:0], flat, loc[:0], w[:0]).shape == (0, 6, 32)
    one = ops.ms_deform_attn_backward(grad[:0], value[:0], flat, loc[:0], w[:0])
    two = ops.fused_ms_deform_attn_backward(
        grad[:0], value[:0], flat, ref[:0], off[:0], logits[:0], None, True
    )
    assert [len(t) for t in (*one, *two)] == [0] * 7


def test_wrong_shapes_are_named(ops):
    (value, shapes, loc, w), _, _ = O.case(1, 3, 2, 16, PYRAMID, 4)
    for args, words in (
        ((value, [6, 9], loc, w), 'spatial_shapes'),
        ((value, [6, 9, 3, 5, 2, 2, 1, 2], loc, w), 'pixels'),
        ((value, [6, 9, 3, 5, 2, 2, 1, 1], loc, w[..., :3]), 'weights'),
        ((value, [6, 9, 3, 5, 2, 2, 1, 1], loc.double(), w), 'float32'),
    ):
        with pytest.raises(RuntimeError, match=words):
            ops.ms_deform_attn(*args)


def test_same_bits_for_any_number_of_threads(ops):
    before = torch.get_num_threads()
    try:
        for dtype in (torch.float32, torch.bfloat16):
            for Q, M in ((3, 2), (150, 2), (1500, 8)):
                a, b, grad = O.case(1, Q, M, 32, [(12, 16), (6, 8), (3, 4)], 3, dtype, ref_dim=4, mask=True)
                flat, results = [n for hw in a[1] for n in hw], []
                for n in (1, 2, 3, 7):
                    torch.set_num_threads(n)
                    results.append(
                        [
                            ops.ms_deform_attn(a[0], flat, *a[2:]),
                            *ops.ms_deform_attn_backward(grad, a[0], flat, *a[2:]),
                            ops.fused_ms_deform_attn(b[0], flat, *b[2:]),
                            *ops.fused_ms_deform_attn_backward(grad, b[0], flat, *b[2:], True),
                        ]
                    )
                assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other))
    finally:
        torch.set_num_threads(before)


NARROW = '''
import sys, ctypes; sys.path.insert(0, {here!r})
import torch, oracle as O
from semidetr.detectors import native
torch.ops.load_library({lib!r})
f = ctypes.CDLL({lib!r}).semidetr_isa; f.restype = ctypes.c_char_p; assert f().decode() == {isa!r}, f()
ops = torch.ops.semidetr
plain = ops.ms_deform_attn, ops.ms_deform_attn_backward
fused = ops.fused_ms_deform_attn, ops.fused_ms_deform_attn_backward
for dtype, limit in ((torch.float32, 3e-6), (torch.float64, 1e-13), (torch.bfloat16, 8e-3)):
    for D, Q, M in ((32, 40, 2), (32, 2, 2), (6, 9, 2), (64, 5, 2), (32, 2000, 8)):
        a, b, grad = O.case(1, Q, M, D, [(6, 9), (3, 5)], 3, dtype, ref_dim=4, mask=True)
        e = O.errors(plain, a, grad, O.plain) + O.errors(fused, b, grad, O.fused)
        assert max(e) < limit, (dtype, D, Q, e)
'''


@pytest.mark.parametrize('isa', ['base', 'v3'])
def test_narrower_instruction_sets(library, isa):
    if isa not in ('base', build._cpu_isa()) and build._cpu_isa() != 'v4':
        pytest.skip(f'this CPU has no {isa}')
    script = NARROW.format(here=str(HERE / 'csrc'), lib=str(library), isa=isa)
    done = subprocess.run(
        [sys.executable, '-c', script],
        env=dict(os.environ, SEMIDETR_ISA=isa, SEMIDETR_OPS='torch'),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-1500:]


# ---- as operators of torch ---------------------------------------------------------------------------------
def test_opcheck(ops):
    (value, shapes, loc, w), (_, _, ref, off, logits, mask), grad = O.case(
        1, 4, 2, 16, [(3, 4), (2, 2)], 2, mask=True
    )
    flat = [n for hw in shapes for n in hw]
    r = lambda *ts: [t.clone().requires_grad_() for t in ts]
    v, x, a = r(value, loc, w)
    torch.library.opcheck(ops.ms_deform_attn.default, (v, flat, x, a))
    v, rr, o, z = r(value, ref, off, logits)
    for m in (mask, None):
        torch.library.opcheck(ops.fused_ms_deform_attn.default, (v, flat, rr, o, z, m))
    torch.library.opcheck(ops.ms_deform_attn_backward.default, (grad, value, flat, loc, w))
    torch.library.opcheck(
        ops.fused_ms_deform_attn_backward.default, (grad, value, flat, ref, off, logits, mask, True)
    )


def test_reference_gradient_only_on_demand(library):
    _, (value, shapes, ref, off, logits, _), _ = O.case(1, 4, 2, 16, PYRAMID, 2)
    off.requires_grad_()
    native.native_fused_ms_deform_attn(value, shapes, ref, off, logits).sum().backward()
    assert off.grad is not None and ref.grad is None


class Step(torch.nn.Module):
    def __init__(self, shapes):
        super().__init__()
        self.shapes = shapes

    def forward(self, value, ref, off, logits):
        assert native.native_available(value.dtype, value.device)
        return native.native_fused_ms_deform_attn(value * 2, self.shapes, ref, off, logits).relu()


@pytest.mark.parametrize(
    'backend', ['aot_eager', pytest.param('inductor', marks=[pytest.mark.slow, needs_compiler])]
)
def test_compile_fullgraph(library, backend):
    _, (value, shapes, *rest, _), _ = O.case(1, 4, 2, 16, [(3, 4), (2, 2)], 2)
    f, results = Step(shapes), []
    for g in (f, torch.compile(f, fullgraph=True, backend=backend)):
        leaves = [t.clone().requires_grad_() for t in (value, *rest)]
        out = g(*leaves)
        out.sum().backward()
        results.append([out, *(t.grad for t in leaves)])
    for a, b in zip(*results):
        assert torch.allclose(a, b, atol=1e-6) if backend == 'inductor' else torch.equal(a, b)


def test_export(library):
    _, (value, shapes, *rest, _), _ = O.case(1, 4, 2, 16, [(3, 4), (2, 2)], 2)
    program = torch.export.export(Step(shapes), (value, *rest))
    assert 'fused_ms_deform_attn' in str(program.graph) and torch.equal(
        program.module()(value, *rest), Step(shapes)(value, *rest)
    )


def test_autocast_spares_the_locations(library):
    (value, shapes, loc, w), (_, _, ref, off, logits, _), _ = O.case(1, 30, 2, 32, [(50, 167)], 4)
    want = native.native_ms_deform_attn(value, shapes, loc, w)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = native.native_ms_deform_attn(value, shapes, loc, w)
        fused = native.native_fused_ms_deform_attn(value, shapes, ref, off, logits)
        assert native.native_ms_deform_attn(value.double(), shapes, loc, w).dtype == torch.float64
    assert out.dtype == fused.dtype == torch.bfloat16 and O.error(out, want) < 8e-3
    assert O.error(fused, native.native_fused_ms_deform_attn(value, shapes, ref, off, logits)) < 8e-3
    assert (
        O.error(native.native_ms_deform_attn(value, shapes, loc.bfloat16(), w), want) > 0.1
    )  # what rounding them would do


def test_autocast_trains(library):
    _, (value, shapes, ref, off, logits, _), _ = O.case(1, 6, 2, 16, PYRAMID, 4)
    leaves = [t.requires_grad_() for t in (value, ref, off, logits)]
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = native.native_fused_ms_deform_attn(leaves[0], shapes, *leaves[1:])
    out.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 and torch.isfinite(t.grad).all() for t in leaves)


# ---- finding, building, falling back -----------------------------------------------------------------------
@pytest.fixture
def fresh(monkeypatch, tmp_path):
    "As if this process had not looked for the op yet; its cache is an empty folder"
    monkeypatch.setattr(native, '_TRIED', {})
    monkeypatch.setattr(native, '_WARNED', [])
    monkeypatch.setattr(native, '_has_kernel', lambda kind: False)
    monkeypatch.delenv('SEMIDETR_OPS', raising=False)
    monkeypatch.delenv('CXX', raising=False)
    monkeypatch.setenv('SEMIDETR_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(build.tempfile, 'gettempdir', lambda: str(tmp_path / 'tmp'))
    (tmp_path / 'tmp').mkdir()
    return monkeypatch


def with_warnings(f):
    "(result, texts of the warnings)"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        value = f()
    return value, [str(w.message) for w in caught]


def test_no_compiler_one_warning(fresh):
    fresh.setenv('PATH', '')
    ok, (text,) = with_warnings(native.native_available)
    assert not ok and 'no C++ compiler' in text and 'build-ops' in text and '\n' not in text
    assert with_warnings(lambda: native.native_available(torch.float16)) == (False, [])
    assert with_warnings(lambda: native.native_available(device='mps')) == (False, [])
    assert 'no C++ compiler' in native.ops_status()['cpu']['reason']


def test_modes(fresh):
    fresh.setenv('PATH', '')
    fresh.setenv('SEMIDETR_OPS', 'torch')
    assert with_warnings(native.native_available) == (False, []) and not native._TRIED
    fresh.setenv('SEMIDETR_OPS', 'native')
    with pytest.raises(ConfigError, match='no C\\+\\+ compiler'):
        native.native_available()
    fresh.setenv('SEMIDETR_OPS', 'fast')
    with pytest.raises(ConfigError, match='auto, native or torch'):
        native.native_available()


def test_failed_build(fresh, tmp_path):
    fake = tmp_path / 'cc'
    fake.write_text('#!/bin/sh\necho "x.cpp:1: error: no such thing" >&2\nexit 1\n')
    fake.chmod(0o755)
    fresh.setenv('CXX', str(fake))
    ok, (text,) = with_warnings(native.native_available)
    assert not ok and 'error: no such thing' in text
    left = [f.name for f in (tmp_path / 'cache' / 'ops').iterdir()]
    assert not any(name.endswith('.so') or name.startswith('.build') for name in left)


def test_unsupported(fresh):
    fresh.setattr(native, '_TRIED', dict(cpu=dict(ready=True, source='', path='', reason='')))
    assert native.native_available() and native.native_available(torch.bfloat16, 'cpu', 128, 16)
    ok, (text,) = with_warnings(lambda: native.native_available(torch.float16))
    assert not ok and 'float16' in text
    assert with_warnings(lambda: native.native_available(points=129)) == (False, [])
    assert not native.native_available(device='meta')


def test_compiler_that_hangs_or_is_missing(tmp_path):
    with pytest.raises(ConfigError, match='the build took longer than 0 s'):
        build._run([sys.executable, '-c', 'import time; time.sleep(60)'], 0.1)
    with pytest.raises(ConfigError, match='the compiler could not be started'):
        build._run([str(tmp_path / 'no_such_compiler')], 1.0)
    with pytest.raises(ConfigError, match='the build failed: exit code 3'):
        build._run([sys.executable, '-c', 'raise SystemExit(3)'], 60.0)


@needs_compiler
def test_read_only_cache(fresh, tmp_path):
    (tmp_path / 'file').write_text('')
    fresh.setenv('SEMIDETR_CACHE', str(tmp_path / 'file'))
    fresh.setattr(build, '_compile', lambda sources, out, *a: (out.write_bytes(b'x'), out)[1])
    first = build.build_ops()
    assert first == build.build_ops() and first.parent.parent == tmp_path / 'tmp'
    assert first.parent.stat().st_mode & 0o077 == 0
    first.parent.chmod(0o777)  # a folder that others can write to is not trusted
    assert build.build_ops().parent != first.parent


@needs_compiler
def test_damaged_library_is_built_anew(fresh, library):
    built = []

    def compile(sources, out, *a):
        built.append(1)
        Path(out).write_bytes(b'no library' if len(built) == 1 else Path(library).read_bytes())
        return out

    fresh.setattr(build, '_compile', compile)
    fresh.setattr(native, '_has_kernel', lambda kind: len(built) == 2)
    assert native._load('cpu')['ready'] and len(built) == 2


def test_key_follows_sources_flags_and_torch(fresh):
    if not build._compiler():
        pytest.skip('no C++ compiler on this machine')
    key = build._plan()[3]
    assert key == build._plan()[3]
    fresh.setattr(build, '_FLAGS', build._FLAGS + ' -DX')
    assert key != build._plan()[3]
    fresh.undo()
    fresh.setattr(torch, '__version__', '2.99')
    assert key != build._plan()[3]


ALONE = '''
import shutil, sys; sys.path.insert(0, {here!r})
import torch, oracle as O
from semidetr.detectors import build, native
from semidetr.detectors.attention import MSDeformAttn, ms_deform_attn
def copied(sources, out, *a): shutil.copy({lib!r}, out); return out
if {lib!r}: build._compile = copied                     # a build that takes no time
(value, shapes, loc, w), _, _ = O.case(1, 5, 2, 16, [(4, 5), (2, 3)], 2)
want = O.plain(value.double(), shapes, loc.double(), w.double())
for _ in range(2): assert O.error(ms_deform_attn(value, shapes, loc, w), want) < 1e-6
m = MSDeformAttn(32, 2, 2, 2)
assert m(torch.randn(1, 5, 32), torch.rand(1, 5, 2, 2), torch.randn(1, 26, 32), shapes).isfinite().all()
print(native.ops_status()['cpu']['ready'], native.ops_status()['cpu']['path'])
'''


def alone(lib, **env):
    "(words that were printed, lines of stderr) of a new process that calls the package's attention"
    env = {k: v for k, v in dict(os.environ, **env).items() if k not in ('SEMIDETR_OPS', 'CXX')}
    script = ALONE.format(here=str(HERE / 'csrc'), lib=lib)
    command = [sys.executable, '-W', 'always::RuntimeWarning', '-c', script]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
    return done.stdout.split(), [o for o in done.stderr.splitlines() if o.strip() and not o.startswith(' ')]


def test_process_without_a_compiler_gives_the_right_numbers_and_one_line(tmp_path):
    (ready,), lines = alone('', PATH='', SEMIDETR_CACHE=str(tmp_path / 'cache'), TMPDIR=str(tmp_path))
    assert ready == 'False' and len(lines) == 1 and 'no C++ compiler' in lines[0] and 'build-ops' in lines[0]


def test_process_with_a_read_only_cache_gives_the_right_numbers_without_a_word(library, tmp_path):
    (tmp_path / 'file').write_text('')  # not even root can make a folder in a file
    (ready, path), lines = alone(str(library), SEMIDETR_CACHE=str(tmp_path / 'file'), TMPDIR=str(tmp_path))
    assert ready == 'True' and Path(path).is_relative_to(tmp_path) and lines == []


RACE = '''
import sys, torch
from semidetr.detectors import build, native
build._FLAGS = build._FLAGS.replace('-O3', '-O0')
real = build._compile
def counted(sources, out, *a): open({mark!r}, 'a').write('built\\n'); return real(sources, out, *a)
build._compile = counted
assert native.native_available(), native._TRIED
v, loc = torch.arange(12.).view(1, 12, 1, 1), torch.tensor([[2/4, 1.5/3]]).view(1, 1, 1, 1, 1, 2)
assert float(native.native_ms_deform_attn(v, [(3, 4)], loc, torch.ones(1, 1, 1, 1, 1))) == 5.5
'''


@needs_compiler
def test_two_processes_build_once(tmp_path):
    env = dict(os.environ, SEMIDETR_CACHE=str(tmp_path / 'cache'), SEMIDETR_OPS='native')
    command = [sys.executable, '-c', RACE.format(mark=str(tmp_path / 'mark'))]
    jobs = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [(j.communicate()[1][-800:], j.returncode) for j in jobs] == [('', 0)] * 2
    assert (tmp_path / 'mark').read_text() == 'built\n'
    assert len(list((tmp_path / 'cache' / 'ops').glob('*.so'))) == 1


# ---- the CUDA kernels, on the CPU --------------------------------------------------------------------------
@pytest.fixture(scope='session')
def shim(tmp_path_factory):
    "Kernels, launchers and binding of csrc/msda_cuda.cu, run through tests/csrc/cuda_on_cpu.h"
    if not build._compiler():
        pytest.skip('no C++ compiler on this machine')
    torch.ops.load_library(str(sanitize.shim(tmp_path_factory.mktemp('shim') / 'shim.so', '-O1')))
    return native._register('semidetr_shim')


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('D', [6, 7, 8, 16, 24, 32, 64])
def test_cuda_text_equals_grid_sample(shim, dtype, D):
    shapes, ref_dim = [(4, 5), (2, 3), (1, 1)], 2 if D % 16 else 4
    plain, fused = worst(shim, 1, 7, 3, D, shapes, 3, dtype, ref_dim=ref_dim, mask=True)
    assert plain < LIMIT[dtype] and fused < 3 * LIMIT[dtype]


def test_cuda_text_half_offsets_bad_locations_empty(shim):
    _, fused = worst(shim, 1, 5, 2, 16, [(4, 5), (2, 3)], 2, torch.float16, raw=torch.float16)
    assert fused < 4 * LIMIT[torch.float16]
    (value, shapes, loc, w), _, grad = O.case(1, 5, 2, 16, [(4, 5), (2, 3)], 2)
    for bad in (float('nan'), float('inf'), 1e30, -1e30):
        loc[0, 1, :, :, 0] = bad
        out = shim.ms_deform_attn(value, [4, 5, 2, 3], loc, w)
        back = shim.ms_deform_attn_backward(grad, value, [4, 5, 2, 3], loc, w)
        assert all(torch.isfinite(t).all() for t in (out, *back))
    assert shim.ms_deform_attn(value, [4, 5, 2, 3], loc[:, :0], w[:, :0]).shape == (1, 0, 32)


MUTANTS = dict(
    shuffle=('for (int d = G / 2; d; d /= 2) x +=', 'for (int d = G / 2; d > 1; d /= 2) x +='),
    mask=('bool ok = p.in && u >= 0 && u < w && v >= 0 && v < h;', 'bool ok = p.in;'),
    tail=('const bool live = item < items;', 'const bool live = true;'),
)
MUTANT_RUN = '''
import sys; sys.path.insert(0, {here!r})
import torch, oracle as O
from semidetr.detectors import native
torch.ops.load_library({lib!r}); ops = native._register('semidetr_shim')
a, b, grad = O.case(1, 3, 3, 16, [(4, 5), (2, 3)], 2)
e = O.errors((ops.ms_deform_attn, ops.ms_deform_attn_backward), a, grad, O.plain)
sys.exit(0 if max(e) < 1e-6 else 3)
'''


@pytest.mark.parametrize('mutant', ['none', *MUTANTS])
@needs_compiler
def test_mutants_of_the_cuda_kernel_are_caught(mutant, tmp_path):
    src = build.package_folder() / 'csrc'
    for f in src.glob('msda_cuda.cu*'):
        text = f.read_text()
        if mutant != 'none' and f.suffix == '.cuh':
            assert MUTANTS[mutant][0] in text
            text = text.replace(*MUTANTS[mutant])
        (tmp_path / f.name).write_text(text)
    lib = sanitize.shim(tmp_path / 'm.so', '-O0 -DSEMIDETR_FLOAT_ONLY', tmp_path / 'msda_cuda.cu')
    done = subprocess.run(
        [sys.executable, '-c', MUTANT_RUN.format(here=str(HERE / 'csrc'), lib=str(lib))],
        env=dict(os.environ, SEMIDETR_OPS='torch'),
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) == (mutant == 'none'), done.stderr[-800:]


def test_value_gradient_is_added_atomically():
    "Fibers take turns, so a race cannot show: no other way to add to the value's gradient is in the source"
    text = (build.package_folder() / 'csrc' / 'msda_cuda.cuh').read_text()
    assert 'atomicAdd(p.grad_value' in text and 'grad_value[' not in text
    assert text.count('grad_value +') == text.count('atomicAdd(p.grad_value +')


@needs_compiler
@pytest.mark.skipif(
    not os.environ.get('SEMIDETR_SLOW'),
    reason='a minute of compiling: `make ops-sanitize`, or SEMIDETR_SLOW=1',
)
def test_sanitizers(tmp_path):
    done = sanitize.check(*sanitize.build(tmp_path))
    assert done.returncode == 0 and 'clean' in done.stdout, done.stderr[-3000:]


# ---- on a GPU ----------------------------------------------------------------------------------------------
def gpu(test):
    return pytest.mark.gpu(
        pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU on this machine')(test)
    )


@gpu
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gpu(dtype):
    assert native.native_available(dtype, 'cuda')
    for D in (6, 16, 32, 64):
        a, b, grad = O.case(2, 50, 8, D, PYRAMID, 4, dtype, ref_dim=4, mask=True)
        for (forward, backward), inputs, oracle in zip(both(torch.ops.semidetr), (a, b), (O.plain, O.fused)):
            up = lambda t: t.cuda() if torch.is_tensor(t) else t
            down = lambda x: tuple(t.cpu() for t in x) if isinstance(x, tuple) else x.cpu()
            e = O.errors(
                (lambda *x: down(forward(*map(up, x))), lambda *x: down(backward(*map(up, x)))),
                inputs,
                grad,
                oracle,
            )
            assert max(e) < 3 * LIMIT[dtype], (D, e)


@gpu
def test_gpu_stream_and_device():
    (value, shapes, loc, w), _, _ = O.case(1, 50, 8, 32, PYRAMID, 4)
    with torch.cuda.stream(torch.cuda.Stream()):
        out = native.native_ms_deform_attn(value.cuda(), shapes, loc.cuda(), w.cuda())
    torch.cuda.synchronize()
    assert O.error(out.cpu(), O.plain(value, shapes, loc, w)) < 1e-6


def test_cuda_needs_an_architecture(monkeypatch):
    """Ahead of time, on a machine without a GPU, the architecture must be named

    The library is then the one that a machine with that GPU looks for."""
    monkeypatch.setattr(build, '_nvcc', lambda: 'nvcc')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(ConfigError, match='no GPU is visible.*--archs 80,90'):
        build.build_ops('cuda')
    with pytest.raises(ConfigError, match="'8.0' is not a CUDA architecture"):
        build.build_ops('cuda', archs=('8.0',))
    ahead = build._plan('cuda', archs=('90',))[3]
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda: (9, 0))
    monkeypatch.setattr(build, '_cpu_isa', lambda: 'base')
    assert build._plan('cuda')[3] == ahead != build._plan('cuda', archs=('80', '90'))[3]
