"""Deformable attention alone: the native op against the grid_sample form, forward and backward, time and memory, as JSON.

    python benchmarks/bench_op.py --threads 1 --seconds 5 --out benchmarks/op.json

The baseline is Hugging Face's `MultiScaleDeformableAttention` where `transformers` is installed, else the same chain of grid_sample
calls written out below. Both run in one process, in turns, on the same inputs; a figure is the median of the turns (`--best`: the
fastest turn, for a machine that is not quiet). Locations: encoder queries look around their own place, decoder queries anywhere."""
import argparse, json, os, platform, statistics, subprocess, sys, time

p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
p.add_argument('--threads', type=int, default=1)
p.add_argument('--seconds', type=float, default=4., help='time for each case')
p.add_argument('--cases', nargs='*', help='names such as enc256 (default: all)')
p.add_argument('--best', action='store_true', help='fastest turn instead of the median')
p.add_argument('--cpu-time', action='store_true', help='CPU time of this thread instead of the clock (one thread only)')
p.add_argument('--memory', action='store_true', help='also the extra memory, in processes of their own')
p.add_argument('--peak', nargs=2, help=argparse.SUPPRESS)
p.add_argument('--out', help='JSON file')
if __name__ == '__main__': args = p.parse_args(); os.environ['OMP_NUM_THREADS'] = str(args.threads)

import torch # noqa: E402  (threads are set before)
import torch.nn.functional as F # noqa: E402
from semidetr import native # noqa: E402

SIZES = {'256': ([(32, 32), (16, 16), (8, 8), (4, 4)], 2), '512': ([(64, 64), (32, 32), (16, 16), (8, 8)], 2),
         'COCO': ([(100, 167), (50, 84), (25, 42), (13, 21)], 1)}
M, D, P = 8, 32, 4

def grid_form(value, shapes, locations, weights):
    B, S, M, D = value.shape
    Q, L, P = locations.shape[1], len(shapes), locations.shape[4]
    grid, out = 2*locations-1, []
    for l, (v, (h, w)) in enumerate(zip(value.split([h*w for h, w in shapes], 1), shapes)):
        v = v.flatten(2).transpose(1, 2).reshape(B*M, D, h, w)
        out.append(F.grid_sample(v, grid[:, :, :, l].transpose(1, 2).flatten(0, 1), mode='bilinear', padding_mode='zeros', align_corners=False))
    w = weights.transpose(1, 2).reshape(B*M, 1, Q, L*P)
    return (torch.stack(out, -2).flatten(-2)*w).sum(-1).view(B, M*D, Q).transpose(1, 2).contiguous()

def baseline():
    "(name, function of value, shapes, locations, weights)"
    try:
        from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention
        import transformers
        module = MultiScaleDeformableAttention()
        def hf(value, shapes, locations, weights):
            return module(value, torch.tensor(shapes), shapes, None, locations, weights, 64)
        return f'transformers {transformers.__version__}', hf
    except Exception: return 'grid_sample chain', grid_form

def inputs(kind, size):
    torch.manual_seed(0)
    shapes, B = SIZES[size]
    S, L = sum(h*w for h, w in shapes), len(shapes)
    if kind == 'enc':
        Q = S
        own = [torch.stack(torch.meshgrid((torch.arange(h)+.5)/h, (torch.arange(w)+.5)/w, indexing='ij')[::-1], -1).reshape(-1, 2) for h, w in shapes]
        ref = torch.cat(own)[None, :, None].expand(B, -1, L, -1).contiguous()
    else: Q, ref = 400, torch.rand(B, 400, L, 2)
    wh = torch.tensor([[w, h] for h, w in shapes], dtype=torch.float32)
    off, logits = 2*torch.randn(B, Q, M, L, P, 2), torch.randn(B, Q, M, L*P)
    return dict(value=torch.randn(B, S, M, D), shapes=shapes, ref=ref, off=off, logits=logits, wh=wh, grad=torch.randn(B, Q, M*D),
                loc=ref[:, :, None, :, None]+off/wh[:, None], weight=logits.softmax(-1).view(B, Q, M, L, P))

def forms(x, base, dtype=torch.float32):
    "{name: (leaves, function of the leaves)} of everything that is timed"
    v, (B, Q) = x['value'], x['ref'].shape[:2]
    def pipeline(v, off, z): return base(v, x['shapes'], x['ref'][:, :, None, :, None]+off/x['wh'][:, None], z.softmax(-1).view(B, Q, M, -1, P))
    low = lambda t: t.bfloat16()
    return {'reference': ((v, x['loc'], x['weight']), lambda v, x_, w: base(v, x['shapes'], x_, w)),
            'native': ((v, x['loc'], x['weight']), lambda v, x_, w: native.native_ms_deform_attn(v, x['shapes'], x_, w)),
            'native bf16': ((low(v), x['loc'], x['weight']), lambda v, x_, w: native.native_ms_deform_attn(v, x['shapes'], x_, w)),
            'reference pipeline': ((v, x['off'], x['logits']), pipeline),
            'fused': ((v, x['off'], x['logits']), lambda v, o, z: native.native_fused_ms_deform_attn(v, x['shapes'], x['ref'], o, z)),
            'fused bf16': ((low(v), low(x['off']), low(x['logits'])), lambda v, o, z: native.native_fused_ms_deform_attn(v, x['shapes'], x['ref'], o, z))}

def peak(case, name):
    "Largest extra resident memory of one forward and backward pass in a process of its own, MB; None where the system does not say"
    try: done = subprocess.run([sys.executable, __file__, '--peak', case, name], capture_output=True, text=True, check=True)
    except subprocess.CalledProcessError: return None
    return float(done.stdout.split()[-1])

def measure_peak(case, name):
    "The child's part: warm up on a small case, then look at the high-water mark of the resident memory"
    def rss(key): return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith(key))/1024
    def step(case):
        x = inputs(case[:3], case[3:])
        leaves, f = forms(x, baseline()[1])[name]
        ls = [t.detach().requires_grad_() for t in leaves]
        def run(): return torch.autograd.grad(f(*ls), ls, x['grad'].to(ls[0].dtype))
        return run
    native.native_available(); step('dec256')()
    run = step(case)
    with open('/proc/self/clear_refs', 'w') as c: c.write('5')
    before = rss('VmRSS'); run()
    print(rss('VmHWM')-before)

def bench(kind, size, base, args):
    x = inputs(kind, size)
    clock = time.thread_time if args.cpu_time else time.perf_counter
    jobs, memory = {}, {}
    for name, (leaves, f) in forms(x, base).items():
        grad = x['grad'].to(leaves[0].dtype)
        def forward(f=f, leaves=leaves):
            with torch.no_grad(): return f(*leaves)
        def step(f=f, leaves=leaves, grad=grad):
            ls = [t.detach().requires_grad_() for t in leaves]
            return torch.autograd.grad(f(*ls), ls, grad)
        jobs[name, 'forward'], jobs[name, 'step'] = forward, step
        forward(); step()
        if args.memory and 'bf16' not in name: memory[name] = peak(kind+size, name)
    times, end = {k: [] for k in jobs}, time.monotonic()+args.seconds
    while time.monotonic() < end or min(map(len, times.values())) < 3:
        for k, f in jobs.items(): t = clock(); f(); times[k].append(clock()-t)
    pick = min if args.best else statistics.median
    ms = {k: 1e3*pick(v) for k, v in times.items()}
    row = dict(case=kind+size, turns=len(next(iter(times.values()))))
    for name in ('reference', 'native', 'native bf16', 'reference pipeline', 'fused', 'fused bf16'):
        ref = 'reference pipeline' if name.startswith('fused') else 'reference'
        row[name] = dict(forward_ms=ms[name, 'forward'], step_ms=ms[name, 'step'], extra_MB=memory.get(name),
                         forward_ratio=ms[ref, 'forward']/ms[name, 'forward'], step_ratio=ms[ref, 'step']/ms[name, 'step'])
    return row

def main(args):
    torch.set_num_threads(args.threads)
    if not native.native_available(): sys.exit('the native op is not available: '+native.ops_status()['cpu']['reason'])
    name, base = baseline()
    result = dict(baseline=name, threads=args.threads, torch=torch.__version__, machine=platform.machine(), isa=native.ops_status()['cpu'].get('isa'),
                  statistic='fastest' if args.best else 'median', load=os.getloadavg()[0], cases=[])
    print(f'baseline {name}, {args.threads} thread(s)\n{"case":8} {"forward":>10} {"step":>8} {"bf16":>8} {"fused fwd":>10} {"step":>8} {"bf16":>8}  extra MB')
    for case in args.cases or [k+s for k in ('enc', 'dec') for s in SIZES]:
        r = bench(case[:3], case[3:], base, args); result['cases'].append(r)
        print(f'{case:8} {r["native"]["forward_ratio"]:9.1f}x {r["native"]["step_ratio"]:7.1f}x {r["native bf16"]["step_ratio"]:7.1f}x {r["fused"]["forward_ratio"]:9.1f}x {r["fused"]["step_ratio"]:7.1f}x '
              f'{r["fused bf16"]["step_ratio"]:7.1f}x  {r["reference"]["extra_MB"] or 0:.0f} -> {r["native"]["extra_MB"] or 0:.0f}', flush=True)
    if args.out:
        with open(args.out, 'w') as f: json.dump(result, f, indent=1)

if __name__ == '__main__': measure_peak(*args.peak) if args.peak else main(args)
