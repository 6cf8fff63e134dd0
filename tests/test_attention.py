"Deformable attention against plain loops, golden values, numeric gradients, and the acceptance list"

import copy, json, math
from pathlib import Path
import pytest, torch
from torch.autograd import gradcheck, gradgradcheck
from semidetr.detectors.attention import (
    MSDeformAttn,
    ms_deform_attn,
    ms_deform_attn_gather,
    ms_deform_attn_grid,
    sampling_locations,
    star_offsets,
)
from semidetr.core import ConfigError

FORMS = [ms_deform_attn, ms_deform_attn_grid, ms_deform_attn_gather]
GOLDEN = json.loads((Path(__file__).parent / 'golden' / 'msda.json').read_text())


def pixel(v, y, x):
    "Value at an integer cell, zero outside"
    h, w = v.shape[:2]
    return v[y, x] if 0 <= y < h and 0 <= x < w else torch.zeros_like(v[0, 0])


def loops(value, shapes, loc, weight):
    "The definition, one number at a time"
    B, S, M, D = value.shape
    out = torch.zeros(B, loc.shape[1], M, D, dtype=value.dtype)
    for b in range(B):
        for q in range(loc.shape[1]):
            for m in range(M):
                start = 0
                for l, (h, w) in enumerate(shapes):
                    v = value[b, start : start + h * w, m].reshape(h, w, D)
                    start += h * w
                    for p in range(loc.shape[4]):
                        x, y = (loc[b, q, m, l, p, i].item() * n - 0.5 for i, n in enumerate((w, h)))
                        x0, y0 = math.floor(x), math.floor(y)
                        fx, fy = x - x0, y - y0
                        got = (1 - fy) * ((1 - fx) * pixel(v, y0, x0) + fx * pixel(v, y0, x0 + 1)) + fy * (
                            (1 - fx) * pixel(v, y0 + 1, x0) + fx * pixel(v, y0 + 1, x0 + 1)
                        )
                        out[b, q, m] += weight[b, q, m, l, p] * got
    return out.flatten(2)


def case(B=2, Q=3, M=2, D=4, P=3, shapes=((4, 5), (2, 3)), dtype=torch.float64, seed=0, spread=1.6):
    "Random arguments; `spread` above 1 sends part of the samples outside the maps"
    g = torch.Generator().manual_seed(seed)
    S, L = sum(h * w for h, w in shapes), len(shapes)
    rand = lambda *s: torch.rand(*s, generator=g, dtype=torch.float64).to(dtype)
    loc = (rand(B, Q, M, L, P, 2) - 0.5) * spread + 0.5
    weight = rand(B, Q, M, L * P).softmax(-1).view(B, Q, M, L, P)
    return rand(B, S, M, D) - 0.5, list(shapes), loc, weight


SHAPES = [
    ((1, 1),),
    ((7, 3),),
    ((1, 9),),
    ((9, 1), (1, 1)),
    ((4, 5), (2, 3)),
    ((8, 8), (4, 4), (2, 2), (1, 1)),
]


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('shapes', SHAPES)
def test_equals_loops(form, shapes):
    for P in (1, 3):
        a = case(shapes=shapes, P=P, B=1, Q=3)
        torch.testing.assert_close(form(*a), loops(*a), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('D', [1, 6, 8, 16, 24, 32, 64])
@pytest.mark.parametrize('shapes', SHAPES)
def test_both_forms_agree_with_gradients(D, shapes):
    value, shapes, loc, weight = case(D=D, shapes=shapes, Q=11, P=2, seed=D)
    seed = torch.randn(2, 11, 2 * D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = []
    for form in (ms_deform_attn_grid, ms_deform_attn_gather):
        leaves = [t.clone().requires_grad_() for t in (value, loc, weight)]
        out = form(leaves[0], shapes, *leaves[1:])
        got.append((out, *torch.autograd.grad(out, leaves, seed)))
    for a, b in zip(*got):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('form', [ms_deform_attn_grid, ms_deform_attn_gather])
@pytest.mark.parametrize('shapes', [((1, 1),), ((3, 4), (2, 1))])
def test_gradcheck(form, shapes):
    value, shapes, loc, weight = case(B=2, Q=2, M=2, D=3, P=2, shapes=shapes, seed=5)
    leaves = [t.requires_grad_() for t in (value, loc, weight)]
    assert gradcheck(lambda v, x, a: form(v, shapes, x, a), leaves, eps=1e-7, atol=1e-5)


def test_gather_second_derivative():
    value, shapes, loc, weight = case(B=1, Q=1, M=1, D=2, P=1, shapes=((3, 4),), seed=5)
    assert gradgradcheck(
        lambda v, x, a: ms_deform_attn_gather(v, shapes, x, a),
        [t.requires_grad_() for t in (value, loc, weight)],
    )


@pytest.mark.parametrize('form', FORMS)
def test_spec_1_ramp(form):
    "Acceptance 1: pixel centres at (i+.5)/W, zeros outside"
    value = torch.arange(12.0).view(1, 12, 1, 1)
    at = lambda x, y: form(
        value, [(3, 4)], torch.tensor([x, y]).view(1, 1, 1, 1, 1, 2), torch.ones(1, 1, 1, 1, 1)
    ).item()
    assert at(2.5 / 4, 1.5 / 3) == pytest.approx(6, abs=1e-5)
    assert at(2 / 4, 1.5 / 3) == pytest.approx(5.5, abs=1e-5)
    assert at(0, 1.5 / 3) == pytest.approx(2.0, abs=1e-5)
    assert at(-0.5 / 4, 1.5 / 3) == 0 and at(5, 0.5) == 0 and at(0.5, -3e4) == 0


@pytest.mark.parametrize('form', FORMS)
def test_far_locations_are_zero_and_finite(form):
    value, shapes, loc, weight = case()
    for far in (1e6, -1e6, 1e30, -1e30):
        v = value.clone().requires_grad_()
        out = form(v, shapes, torch.full_like(loc, far), weight)
        out.sum().backward()
        assert (out == 0).all() and (v.grad == 0).all()


@pytest.mark.parametrize('form', FORMS)
def test_non_contiguous(form):
    value, shapes, loc, weight = case(D=6)
    odd = lambda t: t.transpose(0, -1).contiguous().transpose(0, -1)
    assert not odd(value).is_contiguous() and not odd(loc).is_contiguous()
    torch.testing.assert_close(
        form(odd(value), shapes, odd(loc), odd(weight)), form(value, shapes, loc, weight)
    )
    wide = torch.cat([value, value], -1)[..., 6:]
    torch.testing.assert_close(form(wide, shapes, loc, weight), form(value, shapes, loc, weight))


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('dtype,tol', [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 2e-5)])
def test_low_precision_values_sampled_in_float32(form, dtype, tol):
    "A half-precision value costs one rounding; the locations keep their precision on a wide map"
    value, shapes, loc, weight = case(shapes=((5, 167),), spread=1.0)
    out = form(value.to(dtype), shapes, loc.float(), weight.to(dtype))
    want = form(value.to(dtype).double(), shapes, loc.float().double(), weight.to(dtype).double())
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), want, rtol=tol, atol=tol / 10)


@pytest.mark.parametrize('form', FORMS)
def test_no_queries(form):
    value, shapes, loc, weight = case(Q=0)
    out = form(value.requires_grad_(), shapes, loc, weight)
    assert out.shape == (2, 0, 8)
    out.sum().backward()
    assert (value.grad == 0).all()


@pytest.mark.parametrize('form', FORMS)
def test_wrong_level_sizes_are_named(form):
    value, shapes, loc, weight = case()
    with pytest.raises(ValueError, match='26'):
        form(value, [(4, 5), (3, 3)], loc, weight)
    with pytest.raises(ValueError, match='levels'):
        form(value, [(26, 1)], loc, weight)


def test_gather_is_deterministic_mode_safe():
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        grads = []
        for _ in range(2):
            value, shapes, loc, weight = case(dtype=torch.float32, Q=50)
            leaves = [t.requires_grad_() for t in (value, loc, weight)]
            out = ms_deform_attn_gather(leaves[0], shapes, *leaves[1:])
            grads.append(torch.autograd.grad(out.square().sum(), leaves))
        assert all(torch.equal(a, b) for a, b in zip(*grads))
    finally:
        torch.use_deterministic_algorithms(was)


def test_linear_in_value_and_weights():
    value, shapes, loc, weight = case()
    out = ms_deform_attn(value, shapes, loc, weight)
    torch.testing.assert_close(ms_deform_attn(3 * value, shapes, loc, weight), 3 * out)
    torch.testing.assert_close(ms_deform_attn(value, shapes, loc, 2 * weight), 2 * out)
    inside = loc.clamp(0.3, 0.7)
    ones = ms_deform_attn(torch.ones_like(value), shapes, inside, weight)
    torch.testing.assert_close(ones, torch.ones_like(ones))


# --- locations -------------------------------------------------------------------------
def test_spec_3_boxes_scale_points_do_not():
    offsets = torch.randn(1, 2, 2, 2, 3, 2, generator=torch.Generator().manual_seed(0))
    shapes = [(4, 8), (2, 4)]
    box = torch.tensor([0.5, 0.4, 0.2, 0.3]).expand(1, 2, 2, 4)
    big = box * torch.tensor([1, 1, 2, 2])
    near, far = (sampling_locations(b, offsets, shapes) - box[:, :, None, :, None, :2] for b in (box, big))
    torch.testing.assert_close(far, 2 * near, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(near, offsets / 3 * torch.tensor([0.2, 0.3]) / 2, rtol=1e-4, atol=1e-6)
    moved = sampling_locations(box[..., :2], offsets, shapes) - box[:, :, None, :, None, :2]
    for l, (h, w) in enumerate(shapes):
        torch.testing.assert_close(
            moved[:, :, :, l] * torch.tensor([w, h]), offsets[:, :, :, l], rtol=1e-4, atol=1e-5
        )
    with pytest.raises(ValueError, match='2 or 4'):
        sampling_locations(box[..., :3], offsets, shapes)


def test_locations_stay_float32():
    shapes, offsets = [(100, 167)], torch.zeros(1, 1, 1, 1, 1, 2, dtype=torch.bfloat16)
    ref = torch.tensor([0.7012345, 0.3012345]).view(1, 1, 1, 2)
    where = sampling_locations(ref, offsets, shapes)
    assert where.dtype == torch.float32
    torch.testing.assert_close(where.flatten(), ref.flatten())


# --- the module ------------------------------------------------------------------------
def test_spec_2_initial_star():
    star = star_offsets(8, 4, 4)
    torch.testing.assert_close(star[1, 0], torch.tensor([[1.0, 1], [2, 2], [3, 3], [4, 4]]))
    down = torch.tensor([[0.0, 1], [0, 2], [0, 3], [0, 4]])
    torch.testing.assert_close(star[2, 3], down, atol=1e-6, rtol=0)
    att = MSDeformAttn()
    torch.testing.assert_close(att.sampling_offsets.bias.view(8, 4, 4, 2), star)
    assert (att.sampling_offsets.weight == 0).all() and (att.attention_weights.weight == 0).all()
    w = att.attention_weights(torch.randn(3, 256)).view(3, 8, 16).softmax(-1)
    assert (w == 1 / 16).all()
    for lin in (att.value_proj, att.output_proj):
        bound = math.sqrt(6 / 512)
        assert (lin.bias == 0).all() and 0.9 * bound < lin.weight.abs().max() <= bound


def test_reset_after_outer_init():
    torch.manual_seed(0)
    att = MSDeformAttn(32, 2, 4, 3)
    for p in att.parameters():
        if p.dim() > 1:
            torch.nn.init.xavier_uniform_(p)
    att.reset_parameters()
    assert (att.sampling_offsets.weight == 0).all() and all(p.requires_grad for p in att.parameters())


def test_bad_width():
    with pytest.raises(ConfigError, match='multiple'):
        MSDeformAttn(30, n_heads=4)


@pytest.mark.parametrize('key', ['msda2', 'msda4'])
def test_golden(key):
    d = GOLDEN[key]
    att = MSDeformAttn(32, 2, 4, 3)
    att.load_state_dict({k: torch.tensor(v) for k, v in d['state'].items()}, strict=True)
    q, ref, mem, want = (torch.tensor(d[k]) for k in ('q', 'ref', 'mem', 'out'))
    shapes, pad = [tuple(map(int, s)) for s in d['shapes']], torch.tensor(d['pad']).bool()
    torch.testing.assert_close(att(q, ref, mem, shapes, pad), want, rtol=0, atol=5e-6)
    assert (att(q, ref, mem, shapes) - want).abs().max() > 0.1  # the mask matters here
    double = copy.deepcopy(att).double()(q.double(), ref.double(), mem.double(), shapes, pad)
    torch.testing.assert_close(double.float(), want, rtol=0, atol=5e-6)


def random_module(d=24, L=2, M=3, P=2, seed=0):
    torch.manual_seed(seed)
    att = MSDeformAttn(d, L, M, P)
    for p in att.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return att


def test_spec_4_padding_is_invisible():
    att, shapes = random_module(), [(4, 5), (2, 3)]
    q, mem = torch.randn(2, 6, 24), torch.randn(2, 26, 24)
    ref, pad = torch.rand(2, 6, 2, 2), torch.rand(2, 26) < 0.4
    a = att(q, ref, mem, shapes, pad)
    b = att(q, ref, torch.where(pad[..., None], torch.full_like(mem, 1e4), mem), shapes, pad)
    assert torch.equal(a, b)
    nothing = att(q, ref, mem, shapes, torch.ones_like(pad))  # the projection's bias is zeroed too
    torch.testing.assert_close(nothing, att.output_proj.bias.expand_as(nothing))


def test_module_from_its_parts():
    "The module is projection, locations, one softmax over levels and points, sum, projection"
    att, shapes = random_module(), [(4, 5), (2, 3)]
    q, mem, ref = torch.randn(1, 4, 24), torch.randn(1, 26, 24), torch.rand(1, 4, 2, 4)
    a = att.attention_weights(q).view(1, 4, 3, 4).softmax(-1).view(1, 4, 3, 2, 2)
    off = att.sampling_offsets(q).view(1, 4, 3, 2, 2, 2)
    loc = torch.empty_like(off)
    for l in range(2):
        centre, size = ref[:, :, None, l, :2], ref[:, :, None, l, 2:]
        for p in range(2):
            loc[:, :, :, l, p] = centre + off[:, :, :, l, p] / 2 * size / 2
    want = att.output_proj(loops(att.value_proj(mem).view(1, 26, 3, 8), shapes, loc, a))
    torch.testing.assert_close(att(q, ref, mem, shapes), want, rtol=1e-4, atol=1e-5)


def test_every_parameter_learns():
    att, shapes = random_module(), [(4, 5), (2, 3)]
    out = att(torch.randn(2, 6, 24), torch.rand(2, 6, 2, 2), torch.randn(2, 26, 24), shapes)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in att.parameters())


def test_module_no_queries_and_autocast():
    att, shapes = random_module(), [(4, 5), (2, 3)]
    mem, pad = torch.randn(2, 26, 24), torch.zeros(2, 26, dtype=torch.bool)
    out = att(torch.zeros(2, 0, 24), torch.zeros(2, 0, 2, 4), mem, shapes, pad)
    assert out.shape == (2, 0, 24)
    out.sum().backward()
    q, ref = torch.randn(2, 6, 24), torch.rand(2, 6, 2, 2)
    full = att(q, ref, mem, shapes, pad)
    with torch.autocast('cpu', torch.bfloat16):
        half = att(q, ref, mem, shapes, pad)
    assert half.dtype == torch.bfloat16 and (half.float() - full).abs().max() < 0.1 * full.abs().max()


def test_batch_and_query_independence():
    "The output of a query depends neither on other images of the batch nor on other queries"
    att, shapes = random_module(), [(4, 5), (2, 3)]
    q, mem, ref = torch.randn(3, 5, 24), torch.randn(3, 26, 24), torch.rand(3, 5, 2, 2)
    full = att(q, ref, mem, shapes)
    alone = att(q[1:2, 2:3], ref[1:2, 2:3], mem[1:2], shapes)
    torch.testing.assert_close(alone, full[1:2, 2:3], rtol=1e-4, atol=1e-5)
