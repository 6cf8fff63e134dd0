"""Compile and link the CUDA kernels for sm_80 and sm_90 with nvcc, and import the library: `make cuda-check`.

No GPU is needed."""

import shutil, subprocess, sys
from pathlib import Path
import torch
from semidetr.detectors import build, native


def main(out):
    if not build._nvcc():
        print('cuda-check: skipped, no nvcc (set CUDA_HOME)')
        return 0
    if not (build._torch_paths()[1] / 'libtorch_cuda.so').exists():
        print('cuda-check: skipped, this torch was built without CUDA')
        return 0
    lib = build.build_ops('cuda', out=Path(out) / '_C_cuda.so', archs=('80', '90'))
    dump = Path(build._nvcc()).with_name('cuobjdump')
    tool = str(dump) if dump.exists() else shutil.which('cuobjdump')
    if tool:
        listed = subprocess.run([tool, '--list-elf', str(lib)], capture_output=True, text=True).stdout
        missing = [a for a in ('sm_80', 'sm_90') if a not in listed]
        if missing:
            print(f'cuda-check: no code for {missing}')
            return 1
    torch.ops.load_library(str(lib))
    if not native._has_kernel('cuda'):
        print('cuda-check: the library registers no CUDA kernel')
        return 1
    print(f'cuda-check: compiled, linked and imported, sm_80 and sm_90, {lib.stat().st_size / 1e6:.1f} MB')
    return 0


if __name__ == '__main__':
    sys.exit(main(*sys.argv[1:]))
