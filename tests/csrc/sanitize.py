"""The op's C++ code and its CUDA kernels (through cuda_on_cpu.h) under sanitizers: `make ops-sanitize`.

With an argument `run LIB...` it is the child process, started with the sanitizers' run time loaded first."""

import itertools, os, subprocess, sys, tempfile
from pathlib import Path
from semidetr.detectors.build import _ABI, _ISA_FLAGS, _compile, _compiler, _cpu_isa, package_folder

HERE = Path(__file__).resolve().parent
SAN = '-g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer'


def build(out):
    src = package_folder() / 'csrc'
    flags = f'-std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -Wno-psabi {SAN}'
    isas = list(dict.fromkeys(['base', _cpu_isa()]))
    have = ' '.join(f'-DSEMIDETR_HAVE_{i.upper()}' for i in isas)
    sources = [(src / f'msda_cpu_{i}.cpp', f'{flags} {_ISA_FLAGS[i]}') for i in isas]
    sources.append((src / 'msda_ops.cpp', f'{flags} {_ABI} {have}'))
    cpu = _compile(sources, Path(out) / 'cpu_asan.so', link=SAN)
    return cpu, shim(Path(out) / 'shim_asan.so', SAN)


def shim(out, flags='-O2', source=None):
    "The CUDA kernels, launchers and binding as a library of CPU operators in the namespace semidetr_shim"
    source = source or package_folder() / 'csrc' / 'msda_cuda.cu'
    as_cpp = f'-x c++ -std=c++17 -fPIC -DSEMIDETR_CUDA_ON_CPU -I {HERE} -Wno-unknown-pragmas {_ABI} {flags}'
    return _compile([(source, as_cpp)], out, link=flags if 'sanitize' in flags else '')


def run(cpu, cuda):
    import torch

    sys.path.insert(0, str(HERE))
    import oracle as O
    from semidetr.detectors import native

    torch.ops.load_library(cpu)
    torch.ops.load_library(cuda)
    small = [
        (2, [(3, 4), (2, 2), (1, 1)], 3, 5),
        (2, [(9, 7)], 1, 1),
        (2, [(5, 4)] * 4, 5, 2),
        (2, [(5, 4)] * 4, 5, 2),
        (2, [(9, 9), (8, 8)], 3, 20),
    ]
    large = [(8, [(9, 9), (8, 8)], 8, 700), (8, [(40, 60)], 4, 3)]  # gradients of megabytes, packed and not
    halves, double = [torch.float32, torch.bfloat16], torch.float64
    count = 0
    for name, sizes, dtypes in (
        ('semidetr', small + large, [*halves, double]),
        ('semidetr_shim', small, halves),
    ):
        ops = native._register(name)
        for dtype, D, (M, shapes, P, Q) in itertools.product(dtypes, (6, 8, 32, 33), sizes):
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
    libs = []
    for name in ('libasan.so', 'libubsan.so', 'libstdc++.so'):
        ask = [*_compiler(), f'-print-file-name={name}']
        libs.append(subprocess.run(ask, capture_output=True, text=True).stdout.strip())
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
        if not _compiler():
            print('ops-sanitize: skipped, no C++ compiler')
            sys.exit(0)
        with tempfile.TemporaryDirectory() as tmp:
            done = check(*build(sys.argv[1] if len(sys.argv) > 1 else tmp))
        print(done.stdout[-2000:], done.stderr[-3000:], sep='', end='')
        sys.exit(done.returncode)
