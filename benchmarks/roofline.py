"""How fast one core loads, copies and multiplies, and how near the op comes to that."""

import ctypes, tempfile
from pathlib import Path
import torch
from semidetr.detectors.build import _compile
from op import CASES, D, M, P, SIZES, case_inputs, forms, once
from timing import caches, interleave, need_op, quartiles


def _library(folder):
    "The loops of roofline.cpp, compiled for this CPU with the compiler that builds the op"
    source = Path(__file__).with_name('roofline.cpp')
    flags = '-std=c++17 -O3 -fPIC -march=native -ffast-math -mprefer-vector-width=512'
    out = _compile([(source, flags)], Path(folder) / 'roofline.so')
    lib = ctypes.CDLL(str(out))
    for f in (lib.read_rate, lib.copy_rate, lib.fma_rate):
        f.restype = ctypes.c_double
    return lib


def rates(seconds):  # {'read': {level: GB/s}, 'copy': GB/s, 'fma': GFLOP/s, 'mm': {dtype: GFLOP/s}}
    "Half of each cache, and memory far beyond the last one"
    size = caches() or dict(L1=32768, L2=1 << 20)
    sizes = {k: v // 2 for k, v in size.items()} | dict(memory=max(256 << 20, 4 * max(size.values())))
    buffer, other = torch.ones(sizes['memory'] // 4), torch.ones(sizes['memory'] // 4)
    p = (buffer.data_ptr() + 63) // 64 * 64
    with tempfile.TemporaryDirectory() as folder:
        lib = _library(folder)

        def best(f, *args):
            return max(f(*args, ctypes.c_double(seconds / 10)) for _ in range(20))

        read = {
            k: best(lib.read_rate, ctypes.c_void_p(p), ctypes.c_size_t((v - 64) // 1024 * 1024))
            for k, v in sizes.items()
        }
        copy = best(
            lib.copy_rate,
            ctypes.c_void_p(other.data_ptr()),
            ctypes.c_void_p(buffer.data_ptr()),
            ctypes.c_size_t(sizes['memory']),
        )
        fma = best(lib.fma_rate)
    n, mm = 1024, {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
        t = interleave(dict(mm=lambda a=a, b=b: torch.mm(a, b) is None), 5, seconds=seconds)['mm']['all']
        mm[str(dtype)[6:]] = 2e-9 * n**3 / min(t)
    return dict(read=read, copy=copy, fma=fma, mm=mm, bytes=sizes)


def floors(case, r):  # {'forward': {what: ms}, 'backward': {what: ms}}
    "Least time of the float32 op: its arithmetic, its taps out of L2, the memory that it must touch once"
    shapes, B = SIZES[case[3:]]
    S, L = sum(h * w for h, w in shapes), len(shapes)
    Q = S if case[:3] == 'enc' else 400
    taps = B * Q * M * L * P * 4  # four neighbours of each sample
    value, out, place = (
        4 * B * S * M * D,
        4 * B * Q * M * D,
        4 * B * Q * M * L * P * 3,
    )  # locations and weights: three numbers a sample

    def ms(flop, tap_bytes, memory_bytes):
        return dict(
            arithmetic=flop / r['fma'] / 1e6,
            taps=tap_bytes / r['read']['L2'] / 1e6,
            memory=memory_bytes / r['read']['memory'] / 1e6,
        )

    return dict(
        forward=ms(2 * taps * D, 4 * taps * D, value + place + out),
        backward=ms(6 * taps * D, 12 * taps * D, 2 * value + 2 * place + out),
    )


def run(threads, quick, say):
    "Rates, then the op beside its floors; one thread"
    need_op()
    r, rows = rates(0.05 if quick else 0.4), []
    say(
        'roofline: '
        + ', '.join(f'{k} {v:.0f} GB/s' for k, v in r['read'].items())
        + f", copy {r['copy']:.0f} GB/s, fma {r['fma']:.0f} GFLOP/s, mm {r['mm']}"
    )
    for case in ['enc256'] if quick else CASES:
        x = case_inputs(case)
        f = forms(x)['op']
        t = interleave(dict(op=lambda: once(*f, x['grad'])[2]), 5 if quick else 25)['op']
        times = dict(forward=t['forward'], backward=[a - b for a, b in zip(t['all'], t['forward'])])
        for part, floor in floors(case, r).items():
            bound = max(floor, key=floor.get)
            ms = 1e3 * quartiles(times[part])[1]
            rows.append(
                dict(
                    case=case,
                    part=part,
                    ours_ms=ms,
                    floor_ms=floor,
                    bound=bound,
                    distance=ms / floor[bound],
                    threads=threads,
                )
            )
    say(
        'roofline: ' + ', '.join(f"{o['case']} {o['part']} {o['distance']:.1f}x ({o['bound']})" for o in rows)
    )
    return dict(rates=r, rows=rows)
