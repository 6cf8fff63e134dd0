"""The op's C++ code and its CUDA kernels (through cuda_on_cpu.h) under address and undefined-behaviour sanitizers: `make ops-sanitize`.

With an argument `run LIB...` it is the child process, started with the sanitizer's run time loaded first."""

import os, subprocess, sys, tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SAN = '-g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer'


def build(out):
    from semidetr.detectors import native

    src, base = native._package() / 'csrc', '-std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -Wno-psabi'
    isas = ['base'] + ([native._cpu_isa()] if native._cpu_isa() != 'base' else [])
    have = ' '.join(f'-DSEMIDETR_HAVE_{i.upper()}' for i in isas)
    cpu = native._compile(
        [(src / f'msda_cpu_{i}.cpp', f'{base} {SAN} {native._ISA_FLAGS[i]}') for i in isas]
        + [(src / 'msda_ops.cpp', f'{base} {SAN} {native._ABI} {have}')],
        Path(out) / 'cpu_asan.so',
        link=SAN,
    )
    return cpu, shim(Path(out) / 'shim_asan.so', SAN)


def shim(out, flags='-O2', source=None):
    "The CUDA kernels, launchers and binding as a library of CPU operators in the namespace semidetr_shim"
    from semidetr.detectors import native

    source = source or native._package() / 'csrc' / 'msda_cuda.cu'
    return native._compile(
        [
            (
                source,
                f'-x c++ -std=c++17 -fPIC -DSEMIDETR_CUDA_ON_CPU -I {HERE} -Wno-unknown-pragmas {native._ABI} {flags}',
            )
        ],
        out,
        link=flags if 'sanitize' in flags else '',
    )


def run(cpu, cuda):
    import torch

    sys.path.insert(0, str(HERE))
    import oracle as O
    from semidetr.detectors import native

    torch.ops.load_library(cpu)
    torch.ops.load_library(cuda)
    count = 0
    for name in ('semidetr', 'semidetr_shim'):
        ops = native._register(name)
        for dtype in (torch.float32, torch.bfloat16) + ((torch.float64,) if name == 'semidetr' else ()):
            for D in (6, 8, 32, 33):
                large = (
                    [(8, [(9, 9), (8, 8)], 8, 700), (8, [(40, 60)], 4, 3)] if name == 'semidetr' else []
                )  # gradients of megabytes, packed and not
                for M, shapes, P, Q in [
                    (2, [(3, 4), (2, 2), (1, 1)], 3, 5),
                    (2, [(9, 7)], 1, 1),
                    (2, [(5, 4)] * 4, 5, 2),
                    (2, [(5, 4)] * 4, 5, 2),
                    (2, [(9, 9), (8, 8)], 3, 20),
                    *large,
                ]:
                    torch.set_num_threads(
                        1 + 2 * (count % 2)
                    )  # three threads: the backward pass is cut by level, too
                    a, b, grad = O.case(1, Q, M, D, shapes, P, dtype, ref_dim=4 if D % 4 else 2, mask=Q > 1)
                    a[2].view(-1)[::7] = float('nan')
                    a[2].view(-1)[1::11] = 1e30
                    a[2].view(-1)[2::13] = -float('inf')
                    flat = [n for hw in shapes for n in hw]
                    outs = [
                        ops.ms_deform_attn(a[0], flat, *a[2:]),
                        *ops.ms_deform_attn_backward(grad, a[0], flat, *a[2:]),
                        ops.fused_ms_deform_attn(b[0], flat, *b[2:]),
                        *ops.fused_ms_deform_attn_backward(grad, b[0], flat, *b[2:], True),
                    ]
                    assert all(torch.isfinite(o).all() for o in outs)
                    count += 1
    print(f'ops-sanitize: {count} cases clean under address and undefined-behaviour sanitizers')


def preload():
    "Run time of the sanitizers, to be loaded before Python"
    from semidetr.detectors import native

    libs = [
        subprocess.run(
            [*native._compiler(), f'-print-file-name={n}'], capture_output=True, text=True
        ).stdout.strip()
        for n in ('libasan.so', 'libubsan.so', 'libstdc++.so')
    ]
    return ' '.join(x for x in libs if os.path.isabs(x))


def check(cpu, cuda):
    env = dict(
        os.environ,
        LD_PRELOAD=preload(),
        ASAN_OPTIONS='detect_leaks=0:verify_asan_link_order=0',
        OMP_NUM_THREADS='1',
        SEMIDETR_OPS='torch',
    )
    return subprocess.run(
        [sys.executable, __file__, 'run', str(cpu), str(cuda)], env=env, capture_output=True, text=True
    )


if __name__ == '__main__':
    if sys.argv[1:2] == ['run']:
        run(*sys.argv[2:])
    else:
        from semidetr.detectors import native

        if not native._compiler():
            print('ops-sanitize: skipped, no C++ compiler')
            sys.exit(0)
        with tempfile.TemporaryDirectory() as tmp:
            done = check(*build(sys.argv[1] if len(sys.argv) > 1 else tmp))
        print(done.stdout[-2000:], done.stderr[-3000:], sep='', end='')
        sys.exit(done.returncode)
