"""Plain deformable attention for the tests of the native op: grid_sample calls, in any precision."""

import torch
import torch.nn.functional as F


def plain(value, shapes, locations, weights):
    B, S, M, D = value.shape
    _, Q, _, L, P, _ = locations.shape
    parts, out = value.split([h * w for h, w in shapes], 1), []
    for l, (h, w) in enumerate(shapes):
        maps = parts[l].permute(0, 2, 3, 1).reshape(B * M, D, h, w)
        grid = (2 * locations[:, :, :, l] - 1).transpose(1, 2).flatten(0, 1)
        out.append(F.grid_sample(maps, grid, mode='bilinear', padding_mode='zeros', align_corners=False))
    a = weights.transpose(1, 2).reshape(B * M, 1, Q, L * P)
    return (torch.cat(out, -1) * a).sum(-1).view(B, M * D, Q).transpose(1, 2)


def fused(value, shapes, reference, offsets, logits, mask=None):
    if mask is not None:
        value = value.masked_fill(mask[..., None, None], 0)
    B, Q, M, L, P, _ = offsets.shape
    if reference.shape[-1] == 2:
        wh = torch.tensor([[w, h] for h, w in shapes], dtype=reference.dtype)
        locations = reference[:, :, None, :, None] + offsets / wh[:, None]
    else:
        centre, size = reference[:, :, None, :, None].split(2, -1)
        locations = centre + offsets / P * size * 0.5
    return plain(value, shapes, locations, logits.softmax(-1).view(B, Q, M, L, P))


def case(B, Q, M, D, shapes, P, dtype=torch.float32, ref_dim=2, mask=False, spread=1.3, seed=0, raw=None):
    "Inputs of both forms: (plain inputs, fused inputs, gradient of the output)"
    g = torch.Generator().manual_seed(seed)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    L, S = len(shapes), sum(h * w for h, w in shapes)
    n = lambda *s, d=real: torch.randn(*s, generator=g, dtype=torch.float64).to(d)
    u = lambda *s: torch.rand(*s, generator=g, dtype=torch.float64).to(real)
    value, grad = n(B, S, M, D, d=dtype), n(B, Q, M * D, d=dtype)
    a = (value, shapes, (u(B, Q, M, L, P, 2) - 0.5) * spread + 0.5, u(B, Q, M, L, P))
    b = (
        value,
        shapes,
        u(B, Q, L, ref_dim),
        n(B, Q, M, L, P, 2, d=raw or real) * 2,
        n(B, Q, M, L * P, d=raw or real),
        (u(B, S) < 0.2) if mask else None,
    )
    return a, b, grad


def error(a, b):
    "Largest difference relative to the largest value"
    if not b.numel():
        return 0.0
    a, b = a.double(), b.double()
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


def errors(ops, inputs, grad, oracle):
    "Errors of the output and of each gradient against the oracle in float64; `ops` = (forward, backward)"
    is_number = [torch.is_tensor(t) and t.is_floating_point() for t in inputs]
    leaves = [t.double().requires_grad_() if n else t for t, n in zip(inputs, is_number)]
    want = oracle(*leaves)
    wrt = [t for t, n in zip(leaves, is_number) if n]
    wanted = torch.autograd.grad(want, wrt, grad.double(), allow_unused=True)
    flat = [n for hw in inputs[1] for n in hw]
    args = (inputs[0], flat, *inputs[2:])
    got = ops[0](*args)
    back = ops[1](grad, *args, *([True] if len(inputs) == 6 else []))
    assert torch.isfinite(got).all() and all(torch.isfinite(b).all() for b in back)
    return [error(got, want)] + [error(b, w) for b, w in zip(back, wanted)]
