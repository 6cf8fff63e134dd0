"""Deformable attention against Hugging Face's `MultiScaleDeformableAttention`: time, memory, scaling."""

import contextlib, ctypes, subprocess, sys, time
from pathlib import Path
import torch
from semidetr.detectors import native
from timing import compare, interleave, need_op

M, D, P, QUERIES = 8, 32, 4, 400
SIZES = {
    '256': ([(32, 32), (16, 16), (8, 8), (4, 4)], 2),
    '512': ([(64, 64), (32, 32), (16, 16), (8, 8)], 2),
    'COCO': ([(100, 167), (50, 84), (25, 42), (13, 21)], 1),
}
CASES = [k + s for k in ('enc', 'dec') for s in SIZES]


def reference(value, shapes, locations, weights):
    "Their operation, as their model calls it"
    from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

    return MultiScaleDeformableAttention()(value, torch.tensor(shapes), shapes, None, locations, weights, 64)


def cell_centres(h, w):  # (h*w,2) x, y in [0,1]
    y, x = torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing='ij')
    return torch.stack([x, y], -1).reshape(-1, 2)


def inputs(shapes, B, Q=None, seed=0):  # Q None: a query for every cell, with samples around it
    "Random values, offsets of a few cells, logits, and a gradient"
    torch.manual_seed(seed)
    S, L = sum(h * w for h, w in shapes), len(shapes)
    if Q is None:
        own = [cell_centres(h, w) for h, w in shapes]
        near = torch.rand(B, S, 1, 2) * 0.002  # no sample on the border of a cell, where the gradient jumps
        Q, ref = S, (torch.cat(own)[None, :, None] + near).expand(-1, -1, L, -1).contiguous()
    else:
        ref = torch.rand(B, Q, 1, 2).expand(-1, -1, L, -1).contiguous()
    wh = torch.tensor([[w, h] for h, w in shapes], dtype=torch.float32)
    off, logits = 2 * torch.randn(B, Q, M, L, P, 2), torch.randn(B, Q, M, L * P)
    x = dict(value=torch.randn(B, S, M, D), shapes=shapes, ref=ref, off=off, logits=logits, wh=wh)
    x['grad'] = torch.randn(B, Q, M * D)
    x['loc'] = ref[:, :, None, :, None] + off / wh[:, None]
    x['weight'] = logits.softmax(-1).view(B, Q, M, L, P)
    return x


def case_inputs(case):
    return inputs(*SIZES[case[3:]], None if case[:3] == 'enc' else QUERIES)


def forms(x):  # {name: (leaves, function of the leaves)}
    "All that is timed: the operation alone, and the pipeline from raw offsets and logits to the output"
    v, (B, Q) = x['value'], x['ref'].shape[:2]

    def pipeline(v, off, z):
        locations = x['ref'][:, :, None, :, None] + off / x['wh'][:, None]
        return reference(v, x['shapes'], locations, z.softmax(-1).view(B, Q, M, -1, P))

    def op(v, loc, w):
        return native.native_ms_deform_attn(v, x['shapes'], loc, w)

    def fused(v, o, z):
        return native.native_fused_ms_deform_attn(v, x['shapes'], x['ref'], o, z)

    low, plain, raw = torch.Tensor.bfloat16, (x['loc'], x['weight']), (x['off'], x['logits'])
    return {
        'theirs': ((v, *plain), lambda v, loc, w: reference(v, x['shapes'], loc, w)),
        'op': ((v, *plain), op),
        'op bf16': ((low(v), *plain), op),
        'their pipeline': ((v, *raw), pipeline),
        'fused': ((v, *raw), fused),
        'fused bf16': ((low(v), *map(low, raw)), fused),
    }


BASE = {'op': 'theirs', 'op bf16': 'theirs', 'fused': 'their pipeline', 'fused bf16': 'their pipeline'}


def once(leaves, f, grad):  # (output, gradients, {'forward': s})
    "Forward and backward, and the time of the forward part"
    leaves = [t.detach().requires_grad_() for t in leaves]
    start = time.perf_counter()
    out = f(*leaves)
    forward = time.perf_counter() - start
    return out, torch.autograd.grad(out, leaves, grad.to(out.dtype)), dict(forward=forward)


@torch.no_grad()
def difference(a, b, but=0):
    "Largest difference of two tensors in units of the largest value, without the `but` largest differences"
    d = (a.double() - b.double()).abs().flatten()
    return float(d.kthvalue(d.numel() - but).values / a.double().abs().max().clamp(min=1e-30))


def verify(x, fs, name):  # error of ours; AssertionError if it is not theirs
    "Output and gradients of both on the same inputs (bfloat16: the same rounded numbers)"
    (_, f), (leaves, g) = fs[BASE[name]], fs[name]
    a, ga, _ = once([t.float() for t in leaves], f, x['grad'])
    b, gb, _ = once(leaves, g, x['grad'])
    jumps = (
        ga[1].numel() // 10_000
    )  # samples that rounding moves across a cell's border, where the slope jumps
    results = enumerate(zip((a, *ga), (b, *gb)))
    error = max(difference(s, t, jumps * (i == 2)) for i, (s, t) in results)
    limit = 3e-2 if 'bf16' in name else 1e-4
    assert error < limit, f'{name}: differs by {error:.1e} of the largest value, allowed {limit:.0e}'
    return error


def measure(x, names, rounds, **what):  # rows
    "Verify, then time ours and theirs in turns"
    need_op()
    fs = forms(x)
    errors = {n: verify(x, fs, n) for n in names}
    timed = dict.fromkeys([BASE[n] for n in names] + list(names))
    jobs = {n: (lambda n=n: once(*fs[n], x['grad'])[2]) for n in timed}
    t = interleave(jobs, rounds, warm=0)  # `verify` has run all of them once
    rows = []
    for n in names:
        for k, quantity in (('forward', 'forward'), ('all', 'step')):
            row = compare(t[BASE[n]][k], t[n][k], name=n, quantity=quantity, error=errors[n], **what)
            rows.append(row)
    return rows


def run(threads, quick, say):
    "Rows of all cases"
    rows = []
    for case in ['enc256', 'dec256'] if quick else CASES:
        rows += measure(case_inputs(case), list(BASE), 3 if quick else 15, case=case, threads=threads)
        texts = [f"{r['name']} {r['quantity']} {r['ratio'][1]:.1f}x" for r in rows[-8:]]
        say(f'op {case}: {", ".join(texts)}')
    return dict(rows=rows)


def run_scaling(threads, quick, say):
    "Forward and backward of the pipeline over the side of the image, the number of queries, the batch size"

    def pyramid(side):
        return [(-(-side // s),) * 2 for s in (8, 16, 32, 64)]

    plan = {
        'side': ([128, 256] if quick else [128, 192, 256, 384, 512], lambda n: inputs(pyramid(n), 1)),
        'queries': ([100, 300] if quick else [100, 300, 900, 2700], lambda n: inputs(pyramid(512), 1, n)),
        'batch': ([1, 2] if quick else [1, 2, 4, 8], lambda n: inputs(pyramid(256), n)),
    }
    rows = []
    for axis, (values, make) in plan.items():
        for n in values:
            found = measure(make(n), ['fused'], 3 if quick else 9, case=axis, value=n, threads=threads)
            rows += [r for r in found if r['quantity'] == 'step']
        texts = [f"{r['value']} {r['theirs_ms']:.1f} -> {r['ours_ms']:.2f} ms" for r in rows[-len(values) :]]
        say(f'scaling {axis}: {", ".join(texts)}')
    return dict(rows=rows)


# --- memory: each in a process of its own -------------------------------------------------------------------
def peak(case, name):  # MB; None where the system does not say
    "Largest extra resident memory of one forward and backward pass"
    command = [sys.executable, __file__, case, name]
    try:
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    except (subprocess.CalledProcessError, IndexError):
        return None


def _measure_peak(case, name):
    "The child's part: warm up on a small case, then read the high-water mark of the resident memory"

    def rss(key):
        lines = Path('/proc/self/status').read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

    need_op()
    small, x = case_inputs('dec256'), case_inputs(case)
    once(*forms(small)[name], small['grad'])
    f = forms(x)[name]
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what the warm-up freed must not serve the pass
    Path('/proc/self/clear_refs').write_text('5')
    before = rss('VmRSS')
    kept = once(*f, x['grad'])
    print(rss('VmHWM') - before, file=sys.stdout if kept else sys.stderr)


def run_memory(threads, quick, say):
    "Extra memory of the encoder's pass at 512 pixels"
    case = 'enc256' if quick else 'enc512'
    names = 'theirs', 'op', 'their pipeline', 'fused'
    rows = [dict(case=case, name=n, threads=threads, MB=peak(case, n)) for n in names]
    say(f'memory {case}: ' + ', '.join(f"{r['name']} {r['MB'] or 0:.0f} MB" for r in rows))
    return dict(rows=rows)


if __name__ == '__main__':
    _measure_peak(*sys.argv[1:3])
