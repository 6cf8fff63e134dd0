"""A binary wheel, then tried in an empty venv: `make wheel`.

It is the pure wheel plus the op compiled for all x86-64 instruction sets. The library uses torch's stable ABI
and no Python symbol, so one file serves every Python from 3.11 and every torch from 2.10. The manylinux tag
is read from the newest glibc symbol that the library needs."""

import platform, re, shutil, subprocess, sys, tempfile, venv
from pathlib import Path
from semidetr.detectors.build import build_ops

ROOT = Path(__file__).resolve().parents[2]


def glibc_of(lib):
    text = subprocess.run(['objdump', '-T', str(lib)], capture_output=True, text=True, check=True).stdout
    return max(tuple(map(int, m)) for m in re.findall(r'GLIBC_(\d+)\.(\d+)', text))


def run(*command):
    subprocess.run([str(c) for c in command], check=True, stdout=subprocess.DEVNULL)


def build(dist):
    dist = Path(dist)
    dist.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        run(sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', tmp, ROOT)
        (pure,) = tmp.glob('semidetr-*.whl')
        run(sys.executable, '-m', 'wheel', 'unpack', '-d', tmp / 'tree', pure)
        (tree,) = (tmp / 'tree').iterdir()
        lib = build_ops(out=tree / 'semidetr' / '_C.abi3.so', isas=('all',))
        if tool := shutil.which('strip'):
            run(tool, '--strip-unneeded', lib)
        (meta,) = tree.glob('*.dist-info/WHEEL')
        meta.write_text(meta.read_text().replace('Root-Is-Purelib: true', 'Root-Is-Purelib: false'))
        (tmp / 'packed').mkdir()
        run(sys.executable, '-m', 'wheel', 'pack', '-d', tmp / 'packed', tree)
        (packed,) = (tmp / 'packed').glob('*.whl')
        tag = 'manylinux_{}_{}_{}'.format(*glibc_of(lib), platform.machine())
        tags = f'--remove --python-tag cp311 --abi-tag abi3 --platform-tag {tag}'
        run(sys.executable, '-m', 'wheel', 'tags', *tags.split(), packed)
        (made,) = (tmp / 'packed').glob('*.whl')
        return Path(shutil.move(made, dist / made.name))


TRIAL = '''
import sys; sys.path += [p for p in {paths!r}]
import torch, semidetr
from semidetr.detectors import native
assert "{env}" in semidetr.__file__, semidetr.__file__
status = native.ops_status()["cpu"]
assert status["source"] == "prebuilt", status
v, loc = torch.arange(12.).view(1, 12, 1, 1), torch.tensor([[2/4, 1.5/3]]).view(1, 1, 1, 1, 1, 2)
w = torch.ones(1, 1, 1, 1, 1)
assert float(native.native_ms_deform_attn(v, [(3, 4)], loc, w)) == 5.5
print("wheel works in an empty venv, instruction set", status["isa"])
'''


def try_out(wheel):
    "Install without dependencies; torch and the others are taken from this environment's folder, by path"
    with tempfile.TemporaryDirectory() as tmp:
        env = Path(tmp) / 'env'
        venv.create(env, with_pip=True)
        python = env / 'bin' / 'python'
        run(python, '-m', 'pip', 'install', '-q', '--no-deps', '--no-index', Path(wheel).resolve())
        paths = [p for p in sys.path if p.endswith(('site-packages', 'dist-packages'))]
        trial = TRIAL.format(paths=paths, env=env.name)
        variables = dict(PATH='', SEMIDETR_CACHE=str(Path(tmp) / 'none'), HOME=tmp)
        subprocess.run([str(python), '-c', trial], check=True, cwd=tmp, env=variables)


if __name__ == '__main__':
    wheel = build(sys.argv[1] if len(sys.argv) > 1 else 'dist')
    print(f'{wheel} ({wheel.stat().st_size / 1e6:.1f} MB)', flush=True)
    try_out(wheel)
