# %% [markdown]
# # The native op {#sec-native}
#
# > Run deformable attention in C++ or CUDA where a compiler is found, in plain PyTorch where not, and know
# > which of the two runs.
#
# *Why.* On a CPU deformable attention (@sec-attention) takes a large share of a DETR's training step
# (@sec-speed). In plain PyTorch it is a chain of `grid_sample` calls: one big tensor per level, written, read
# and written again. The arithmetic is small; the traffic is not. A kernel that walks over the queries keeps
# everything in cache. The price of such kernels has always been the build: the field's op must be compiled by
# hand, for one CUDA version. So here the op builds itself at first use, in a few seconds, and where it
# cannot, nothing breaks.

# %%
#| default_exp detectors.native

# %%
#| export
import ctypes, hashlib, logging, warnings
import os, platform, shutil, subprocess, sys, tempfile, time
from contextlib import contextmanager
from pathlib import Path
import torch
from torch import Tensor
from semidetr.core import ConfigError

# %%
import matplotlib.pyplot as plt
from torch._subclasses.fake_tensor import FakeTensorMode
from semidetr.draw import show_image, draw_points

# %% [markdown]
# ## Two forms of one sum
#
# For query $q$ and head $m$, with $L$ levels and $P$ points, both forms compute
#
# $$o_{qm}=\sum_{l=1}^{L}\sum_{p=1}^{P} a_{qmlp}\; v_m^{l}\!\left(x_{qmlp}\right)$$ {#eq-native-sum}
#
# where $v_m^l(x)$ is the bilinear value of head $m$'s map of level $l$ at position $x$. In the *plain* form
# locations $x$ and weights $a$ are given. In the *fused* form the op also does what stands before them in
# every DETR: the softmax of the logits $z$ and the sum of reference point $r$ and offset $\delta$,
#
# $$a_{qm}=\operatorname{softmax}(z_{qm}),\qquad x_{qmlp}=r_{ql}+\frac{\delta_{qmlp}}{(W_l,H_l)}\quad\text{or}\quad x_{qmlp}=c_{ql}+\frac{\delta_{qmlp}}{2P}\odot(w,h)_{ql}$$ {#eq-native-fused}
#
# the second for a reference box $(c, w, h)$, and it reads padded pixels as zero. Six passes over tensors of
# $B\,Q\,M\,L\,P$ numbers disappear, and twice as many in the backward pass.
#
# The operators have names and schemas even where nothing was built: a fake kernel (shapes only, for
# `torch.compile` and `torch.export`), a gradient and an autocast rule belong to the schema, not to the
# library.

# %%
#| export
_SCHEMAS = dict(
    ms_deform_attn='(Tensor value, int[] spatial_shapes, Tensor locations, Tensor weights) -> Tensor',
    ms_deform_attn_backward='(Tensor grad, Tensor value, int[] spatial_shapes, Tensor locations, Tensor weights) -> (Tensor, Tensor, Tensor)',
    fused_ms_deform_attn='(Tensor value, int[] spatial_shapes, Tensor reference, Tensor offsets, Tensor logits, Tensor? padding_mask) -> Tensor',
    fused_ms_deform_attn_backward='(Tensor grad, Tensor value, int[] spatial_shapes, Tensor reference, Tensor offsets, Tensor logits, '
    'Tensor? padding_mask, bool reference_grad) -> (Tensor, Tensor, Tensor, Tensor)',
)


def _fakes():
    "What each operator returns, without the numbers"

    def plain(value, shapes, locations, weights):
        return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])

    def plain_back(grad, value, shapes, locations, weights):
        return tuple(t.new_empty(t.shape) for t in (value, locations, weights))

    def fused(value, shapes, reference, offsets, logits, mask):
        return plain(value, shapes, offsets, logits)

    def fused_back(grad, value, shapes, reference, offsets, logits, mask, reference_grad):
        ref = reference.new_empty(reference.shape if reference_grad else (0,))
        return (
            value.new_empty(value.shape),
            ref,
            offsets.new_empty(offsets.shape),
            logits.new_empty(logits.shape),
        )

    return dict(zip(_SCHEMAS, (plain, plain_back, fused, fused_back)))


# %% [markdown]
# The gradient formulas call the backward operators. Reference points get a gradient only when something asks
# for it: an encoder never does, and Deformable-DETR's first decoder layer does.

# %%
#| export
def _gradients(ops):
    "Autograd formulas of the two forms: {operator: (setup_context, backward)}"

    def setup(ctx, inputs, output):
        value, ctx.shapes, *rest = inputs
        ctx.save_for_backward(value, *rest)

    def plain(ctx, grad):
        value, locations, weights = ctx.saved_tensors
        gv, gl, gw = ops.ms_deform_attn_backward(grad, value, ctx.shapes, locations, weights)
        return gv, None, gl, gw

    def fused(ctx, grad):
        value, reference, offsets, logits, mask = ctx.saved_tensors
        need = ctx.needs_input_grad[2]
        gv, gr, go, gl = ops.fused_ms_deform_attn_backward(
            grad, value, ctx.shapes, reference, offsets, logits, mask, need
        )
        return gv, None, gr if need else None, go, gl, None

    return dict(ms_deform_attn=(setup, plain), fused_ms_deform_attn=(setup, fused))


# %% [markdown]
# Under autocast the value takes the lower precision; locations and reference points never do: bfloat16 has
# eight bits, and in a map 160 pixels wide that is an error of half a pixel.

# %%
#| export
def _autocast(ops, device):
    "Autocast kernels of the two forms for one device type"

    def low(t):
        return (
            t.to(torch.get_autocast_dtype(device))
            if t.is_floating_point() and t.dtype != torch.float64
            else t
        )

    def full(t):
        return t if t.dtype == torch.float64 else t.float()

    def plain(value, shapes, locations, weights):
        with torch.autocast(device, enabled=False):
            return ops.ms_deform_attn(low(value), shapes, full(locations), full(weights))

    def fused(value, shapes, reference, offsets, logits, mask):
        value = low(value)
        if offsets.dtype != logits.dtype or offsets.dtype != value.dtype:
            offsets, logits = full(offsets), full(logits)
        with torch.autocast(device, enabled=False):
            return ops.fused_ms_deform_attn(value, shapes, full(reference), offsets, logits, mask)

    return dict(ms_deform_attn=plain, fused_ms_deform_attn=fused)


_LIBS = {}


def _register(
    ns: str = 'semidetr',  # namespace under torch.ops
):
    "Define the four operators in a namespace: schema, fake kernel, gradient, autocast rule; once"
    ops = getattr(torch.ops, ns)
    if hasattr(ops, 'ms_deform_attn'):
        return ops
    lib = _LIBS[ns] = torch.library.Library(ns, 'FRAGMENT')
    for name, schema in _SCHEMAS.items():
        lib.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    for name, fake in _fakes().items():
        torch.library.register_fake(f'{ns}::{name}', fake, lib=lib)
    for name, (setup, backward) in _gradients(ops).items():
        torch.library.register_autograd(f'{ns}::{name}', backward, setup_context=setup, lib=lib)
    for device, key in (('cpu', 'AutocastCPU'), ('cuda', 'AutocastCUDA')):
        for name, f in _autocast(ops, device).items():
            lib.impl(name, f, key)
    return ops


_register();

# %% [markdown]
# With fake tensors there are shapes and no numbers. This is what `torch.compile` and `torch.export` see: an
# encoder layer of a COCO image, and nothing is computed.

# %%
with FakeTensorMode():
    pyramid = [(100, 167), (50, 84), (25, 42), (13, 21)]
    S_coco = sum(h * w for h, w in pyramid)
    faked = torch.ops.semidetr.fused_ms_deform_attn(
        torch.empty(2, S_coco, 8, 32),
        [n for hw in pyramid for n in hw],
        torch.empty(2, S_coco, 4, 2),
        torch.empty(2, S_coco, 8, 4, 4, 2),
        torch.empty(2, S_coco, 8, 16),
        None,
    )
assert faked.shape == (2, 22223, 256)
faked.shape

# %% [markdown]
# ## The build
#
# The sources lie in `csrc/`, beside this module, in the wheel too. They use torch's stable ABI: no Python
# header, no pybind, nothing that changes with the torch version, so that a build takes seconds (the ordinary
# `torch/extension.h` alone takes longer). The kernels are compiled once per instruction set, each with the
# vector width that this set has, and the library picks one when it is loaded. A build on first use makes only
# the one that this CPU needs.

# %%
#| export
_MIN_TORCH = (2, 10)  # first version whose stable ABI has all that the sources use
_ISA_FLAGS = dict(
    base='',
    v3='-mavx2 -mfma -mbmi -mbmi2 -mf16c',
    v4='-mavx2 -mfma -mbmi -mbmi2 -mf16c -mavx512f -mavx512bw -mavx512cd -mavx512dq -mavx512vl -mprefer-vector-width=512',
)
_FLAGS = '-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wno-psabi'
_ABI = '-DTORCH_TARGET_VERSION=0x020a000000000000'
_NVCC_FLAGS = '-std=c++17 -O3 -DUSE_CUDA -Xcompiler -fPIC -Xcompiler -fvisibility=hidden'


def _package() -> Path:
    return Path(sys.modules[ConfigError.__module__].__file__).resolve().parent


def _cpu_isa() -> str:
    "Widest of the three instruction sets that this CPU has"
    if platform.machine().lower() not in ('x86_64', 'amd64'):
        return 'base'
    cap = torch.backends.cpu.get_cpu_capability()
    return 'v4' if 'AVX512' in cap or 'AMX' in cap else 'v3' if 'AVX2' in cap else 'base'


def _compiler() -> list[str]:
    "The C++ compiler's command; empty where there is none"
    names = [os.environ['CXX']] if os.environ.get('CXX') else ['c++', 'g++', 'clang++']
    for n in names:
        words = n.split()
        if words and shutil.which(words[0]):
            return [shutil.which(words[0]), *words[1:]]
    return []


def _nvcc() -> str:
    "The CUDA compiler; empty where there is none"
    homes = [os.environ.get('CUDA_HOME'), os.environ.get('CUDA_PATH'), '/usr/local/cuda']
    found = [str(Path(h) / 'bin' / 'nvcc') for h in homes if h and (Path(h) / 'bin' / 'nvcc').exists()]
    return found[0] if found else shutil.which('nvcc') or ''


# %% [markdown]
# A build is a handful of compiler calls, run side by side, and a link. It happens in a folder of its own;
# only the finished library is moved, in one step, to its place in the cache. Its name there holds a hash of
# the sources, the flags, the torch version and the instruction set: another torch, another library.

# %%
#| export
def _run(commands, timeout):
    "Run commands side by side; the first one that fails gives a ConfigError with the compiler's own words"
    jobs = []
    try:
        for c in commands:
            jobs.append(
                (
                    c,
                    subprocess.Popen(
                        c,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT,
                        text=True,
                        errors='replace',
                    ),
                )
            )
        end = time.monotonic() + timeout
        for c, job in jobs:
            out, _ = job.communicate(timeout=max(1.0, end - time.monotonic()))
            if job.returncode:
                lines = [o.strip() for o in out.splitlines() if o.strip()]
                said = next(
                    (o for o in lines if 'error' in o.lower()),
                    lines[-1] if lines else f'exit code {job.returncode}',
                )
                raise ConfigError(f'the build failed: {said}')
    except subprocess.TimeoutExpired:
        raise ConfigError(f'the build took longer than {timeout:.0f} s') from None
    except OSError as e:
        raise ConfigError(f'the compiler could not be started: {e}') from None
    finally:
        for _, job in jobs:
            if job.poll() is None:
                job.kill()
                job.wait()
            job.stdout.close()


# %%
#| export
def _torch_paths():
    "Include folder and library folder of the installed torch"
    root = Path(torch.__file__).resolve().parent
    return root / 'include', root / 'lib'


def _compile(
    sources,  # [(source file, flags as one string)]
    out: Path,  # library to write; appears only when it is whole
    link: str = '',  # more flags for the link
    compiler=None,  # command as a list; default: the C++ compiler that is found
    timeout: float = 600.0,  # seconds
) -> Path:
    "Compile sources side by side and link them to a shared library next to torch's own; ConfigError says what went wrong"
    compiler = compiler or _compiler()
    if not compiler:
        raise ConfigError('no C++ compiler was found')
    include, lib = _torch_paths()
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.build-', dir=out.parent) as tmp:
        objects = [str(Path(tmp) / f'{i}.o') for i in range(len(sources))]
        _run(
            [
                [*compiler, *flags.split(), '-I', str(include), '-c', str(src), '-o', o]
                for (src, flags), o in zip(sources, objects)
            ],
            timeout,
        )
        made = str(Path(tmp) / 'made.so')
        _run(
            [[*compiler, '-shared', *objects, '-o', made, '-L', str(lib), '-ltorch_cpu', *link.split()]],
            timeout,
        )
        os.replace(made, out)
    return out


# %% [markdown]
# A failed build says what the compiler said, in one line, and leaves nothing behind.

# %%
if _compiler():
    with tempfile.TemporaryDirectory() as folder:
        broken = Path(folder) / 'broken.cpp'
        broken.write_text('int f() { return no_such_name; }')
        try:
            _compile([(broken, '')], Path(folder) / 'broken.so')
        except ConfigError as e:
            print(str(e).replace(folder, '...'))
        assert not (Path(folder) / 'broken.so').exists()


# %%
#| export
def _plan(
    device: str = 'cpu',  # 'cpu' or 'cuda'
    isas=(
        'auto',
    ),  # instruction sets to compile for: 'base', 'v3', 'v4'; 'auto' = the one of this CPU, 'all'
    archs=('native',),  # CUDA architectures such as 80 or 90; 'native' = that of the first GPU
):
    "What to compile: sources with their flags, flags for the link, compiler, and the key of the result"
    src = _package() / 'csrc'
    if device == 'cuda':
        if 'native' in archs:
            if not torch.cuda.is_available():
                raise ConfigError(
                    'no GPU is visible here, so its architecture is not known; name it, e.g. semidetr build-ops --device cuda --archs 80,90'
                )
            archs = ['{}{}'.format(*torch.cuda.get_device_capability())]
        if bad := [a for a in archs if not a.isdigit()]:
            raise ConfigError(f"'{bad[0]}' is not a CUDA architecture; write 80, 90, ...")
        gen = (
            ' '.join(f'-gencode arch=compute_{a},code=sm_{a}' for a in archs)
            + f' -gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}'
        )
        sources, compiler, link = (
            [(src / 'msda_cuda.cu', f'{_NVCC_FLAGS} {_ABI} {gen}')],
            [_nvcc()],
            '-ltorch_cuda',
        )
    else:
        if 'all' in isas:
            isas = ('base', 'v3', 'v4') if platform.machine().lower() in ('x86_64', 'amd64') else ('base',)
        isas = tuple(_cpu_isa() if i == 'auto' else i for i in isas)
        have = ' '.join(f'-DSEMIDETR_HAVE_{i.upper()}' for i in isas)
        sources = [(src / f'msda_cpu_{i}.cpp', f'{_FLAGS} {_ISA_FLAGS[i]}') for i in isas] + [
            (src / 'msda_ops.cpp', f'{_FLAGS} {_ABI} {have}')
        ]
        compiler, link = _compiler(), ''
    text = [p.read_bytes() for p in sorted(src.iterdir()) if p.suffix in ('.h', '.cpp', '.cu', '.cuh')]
    what = repr(
        (
            text,
            [(p.name, f) for p, f in sources],
            link,
            torch.__version__,
            platform.system(),
            platform.machine(),
            '' if device == 'cuda' else _cpu_isa(),
        )
    )
    return sources, link, compiler, f'{device}-{hashlib.sha256(what.encode()).hexdigest()[:16]}'


# %% [markdown]
# **Where it is kept.** The user's cache folder; if that cannot be written, a folder of the user's own in the
# temporary directory. A lock file makes several processes that start at once (the ranks of one run) build
# once: the others wait and load. The operating system drops the lock when a process dies, and where locks do
# not work the builds run in parallel and replace each other's equal result.

# %%
#| export
def _cache_dirs() -> list[Path]:
    "Folders that may hold the library, best first"
    named = os.environ.get('SEMIDETR_CACHE')
    base = (
        Path(named)
        if named
        else Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'semidetr'
    )
    uid = os.getuid() if hasattr(os, 'getuid') else os.environ.get('USERNAME', 'user')
    return [base / 'ops', Path(tempfile.gettempdir()) / f'semidetr-ops-{uid}']


def _trusted(folder: Path) -> bool:
    "Can nobody but this user (or root) write to the folder? Code is loaded from it"
    s = folder.stat()
    return not hasattr(os, 'getuid') or (s.st_uid in (0, os.getuid()) and not s.st_mode & 0o022)


def _usable(folder: Path) -> bool:
    "Make the folder; is it safe, and can this user write to it?"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            return _trusted(folder)
    except OSError:
        return False


@contextmanager
def _locked(path, timeout=600.0):
    "Hold a lock on a file while others wait; go on without it where that is not possible"
    try:
        import fcntl

        f = open(path, 'w')
    except (ImportError, OSError):
        yield
        return
    end = time.monotonic() + timeout
    try:
        while time.monotonic() < end:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
            except OSError:
                break
        yield
    finally:
        f.close()


# %%
#| export
_log = logging.getLogger('semidetr')


def build_ops(
    device: str = 'cpu',  # 'cpu' or 'cuda'
    out=None,  # library to write; default: in the cache, where it is found at the next start
    isas=('auto',),  # instruction sets: 'base', 'v3', 'v4', 'auto' = that of this CPU, 'all'
    archs=('native',),  # CUDA architectures such as 80 or 90
    force: bool = False,  # build even if the library is there
) -> Path:  # the library
    "Build the op with the C++ compiler (or nvcc) of this machine; raises ConfigError with the reason and the cure"
    if tuple(int(n) for n in torch.__version__.split('+')[0].split('.')[:2]) < _MIN_TORCH:
        raise ConfigError(
            f'the op needs torch {_MIN_TORCH[0]}.{_MIN_TORCH[1]} or later, this is {torch.__version__}'
        )
    if device == 'cuda' and not _nvcc():
        raise ConfigError('no CUDA compiler (nvcc) was found; set CUDA_HOME')
    if device != 'cuda' and not _compiler():
        raise ConfigError('no C++ compiler was found; install g++ or clang++, or set CXX')
    sources, link, compiler, key = _plan(device, isas, archs)
    if out:
        return _compile(sources, Path(out), link, compiler)
    dirs = _cache_dirs()
    kept = [d / f'{key}.so' for d in dirs if (d / f'{key}.so').exists() and not force and _trusted(d)]
    if kept:
        return kept[0]
    home = next((d for d in dirs if _usable(d)), None) or Path(tempfile.mkdtemp(prefix='semidetr-ops-'))
    with _locked(home / f'{key}.lock'):
        target = home / f'{key}.so'
        if force or not target.exists():
            _log.info('building the deformable-attention op in %s', home)
            _compile(sources, target, link, compiler)
    return target


# %% [markdown]
# The key of a library follows everything that its bytes depend on. Two plans for two instruction sets are two
# libraries; the same plan again is the same one.

# %%
assert _plan()[3] == _plan()[3] != _plan(isas=('all',))[3]
[(source.name, flags.split()[-1]) for source, flags in _plan(isas=('all',))[0]]

# %% [markdown]
# ## Loading, and saying so
#
# The order is: a library that came with the package, then one built here, now or earlier, then plain PyTorch
# with one warning. `SEMIDETR_OPS` chooses: `auto` is that order, `torch` never loads anything, `native`
# insists, and raises an error where `auto` would warn.

# %%
#| export
_DTYPES = dict(
    cpu=(torch.float32, torch.float64, torch.bfloat16), cuda=(torch.float32, torch.float16, torch.bfloat16)
)
_MAX_POINTS, _MAX_LEVELS = 128, 16
_TRIED: dict = {}  # device type -> dict(ready, source, path, reason)
_WARNED: list = []


def _mode() -> str:
    mode = os.environ.get('SEMIDETR_OPS', 'auto') or 'auto'
    if mode not in ('auto', 'native', 'torch'):
        raise ConfigError(f"SEMIDETR_OPS='{mode}' is not known; use auto, native or torch")
    return mode


def _has_kernel(kind):
    return torch._C._dispatch_has_kernel_for_dispatch_key('semidetr::ms_deform_attn', kind.upper())


def _load(
    kind: str,  # 'cpu' or 'cuda'
) -> dict:  # ready, source, path, reason
    "Find or build the library of one device type and load it; never raises"
    why = []

    def attempt(path, source):
        try:
            torch.ops.load_library(str(path))
        except Exception as e:
            why.append(f'{Path(path).name} cannot be loaded ({str(e).splitlines()[0]})')
            return None
        if _has_kernel(kind):
            return dict(ready=True, source=source, path=str(path), reason='')
        why.append(f'{Path(path).name} holds no {kind} kernel')

    if _has_kernel(kind):
        return dict(ready=True, source='loaded before', path='', reason='')
    for lib in sorted(_package().glob('_C_cuda*.so' if kind == 'cuda' else '_C.*so')):
        if done := attempt(lib, 'prebuilt'):
            return done
    try:
        if kind == 'cuda' and not torch.cuda.is_available():
            raise ConfigError('torch sees no GPU')
        path = build_ops(kind)
        if done := attempt(path, 'built'):
            return done
        if done := attempt(build_ops(kind, force=True), 'built'):
            return done  # a damaged file in the cache
    except Exception as e:
        why.append(str(e).splitlines()[0] if str(e) else type(e).__name__)
    return dict(ready=False, source='', path='', reason='; '.join(why))


# %%
#| export
_CURE = dict(
    cpu='install g++ or clang++ and run `semidetr build-ops`',
    cuda='install the CUDA toolkit (nvcc), set CUDA_HOME and run `semidetr build-ops`',
)


def _refuse(kind, reason, cure):
    "One warning in the life of the process, or the error that SEMIDETR_OPS=native asks for"
    text = f'deformable attention runs in plain PyTorch, many times slower: {reason}. To get the native op: {cure}'
    if _mode() == 'native':
        raise ConfigError(f'SEMIDETR_OPS=native, but {text}')
    if not _WARNED:
        _WARNED.append(text)
        warnings.warn(text, RuntimeWarning, stacklevel=3)
    return False


@torch.compiler.assume_constant_result
def native_available(
    dtype: torch.dtype = torch.float32,  # of the value
    device='cpu',  # of the value: name or torch.device
    points: int = 1,  # points of one head: levels times points a level
    levels: int = 1,  # levels
) -> bool:
    "Can the native op take such a value? The first call loads the library, and builds it if need be; a no is said once, in one warning"
    kind = torch.device(device).type
    if _mode() == 'torch' or kind == 'meta':
        return False
    if kind not in _DTYPES:
        return _refuse(kind, f'no kernel for the device {kind}', 'use the CPU or a CUDA GPU')
    if kind not in _TRIED:
        _TRIED[kind] = _load(kind)
    if not _TRIED[kind]['ready']:
        return _refuse(kind, _TRIED[kind]['reason'], _CURE[kind])
    if dtype not in _DTYPES[kind]:
        return _refuse(
            kind, f'no {kind} kernel for {dtype}', f'use {", ".join(str(d)[6:] for d in _DTYPES[kind])}'
        )
    if points > _MAX_POINTS or levels > _MAX_LEVELS:
        return _refuse(
            kind, f'{levels} levels, {points} points a head', f'at most {_MAX_LEVELS} and {_MAX_POINTS}'
        )
    return True


def ops_status(
    load: bool = True,  # try to load now; False only tells what happened so far
) -> dict:  # mode, cpu and cuda: each ready, source, path, reason; cpu also isa
    "What is in use, and why: for `semidetr doctor --env`"
    status = dict(mode=_mode())
    for kind in ('cpu', 'cuda'):
        if (
            load
            and kind not in _TRIED
            and status['mode'] != 'torch'
            and (kind == 'cpu' or torch.cuda.is_available())
        ):
            _TRIED[kind] = _load(kind)
        status[kind] = dict(_TRIED.get(kind) or dict(ready=False, source='', path='', reason='not tried'))
    if path := status['cpu']['path']:
        isa = ctypes.CDLL(path).semidetr_isa
        isa.restype = ctypes.c_char_p
        status['cpu']['isa'] = isa().decode()
    return status


# %% [markdown]
# ## The two functions
#
# They take what @sec-attention has at hand. Locations, weights and reference points are brought to float32
# (float64 for a float64 value); offsets and logits may stay in bfloat16 with a bfloat16 value.

# %%
#| export
def _flat(shapes):
    return [n for hw in shapes for n in hw]


def _real(value):
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def native_ms_deform_attn(
    value: Tensor,  # (B,S,M,D) projected features of all levels, head by head
    spatial_shapes,  # [(h,w)] of the L levels, sum of h*w = S
    locations: Tensor,  # (B,Q,M,L,P,2) sampling locations (x,y); [0,1] is the map
    weights: Tensor,  # (B,Q,M,L,P) attention weights
) -> Tensor:  # (B,Q,M*D)
    "Deformable attention's sampling and sum (@eq-native-sum) by the native op; ask `native_available` first"
    real = _real(value)
    return torch.ops.semidetr.ms_deform_attn(
        value, _flat(spatial_shapes), locations.to(real), weights.to(real)
    )


def native_fused_ms_deform_attn(
    value: Tensor,  # (B,S,M,D)
    spatial_shapes,  # [(h,w)] of the L levels
    reference_points: Tensor,  # (B,Q,L,2) points or (B,Q,L,4) cxcywh boxes, times the valid ratios
    raw_offsets: Tensor,  # (B,Q,M,L,P,2) as the linear layer gives them
    logits: Tensor,  # (B,Q,M,L*P) before the softmax
    padding_mask=None,  # (B,S) bool, True = padding, or None
) -> Tensor:  # (B,Q,M*D)
    "Softmax, locations (@eq-native-fused), masking and sampling in one native op"
    real = _real(value)
    raw = value.dtype if raw_offsets.dtype == logits.dtype == value.dtype else real
    return torch.ops.semidetr.fused_ms_deform_attn(
        value,
        _flat(spatial_shapes),
        reference_points.to(real),
        raw_offsets.to(raw),
        logits.to(raw),
        padding_mask,
    )


# %% [markdown]
# What happened here? On a machine without a compiler the same cell prints `ready: False` and the reason, and
# everything below is skipped.

# %%
ready = native_available()
{k: v for k, v in ops_status()['cpu'].items() if k in ('ready', 'source', 'isa')}


# %% [markdown]
# ## Check by hand
#
# A map of 3 x 4 pixels holds 0 to 11. Half way between pixels 5 and 6 the value is 5.5; on the left edge half
# of the two taps lies outside, where everything is zero, so that pixel 4 counts half. A location that is
# infinite or not a number is outside, too.

# %%
def sample(x, y):
    "Value of the little map at a place given in pixels"
    place = torch.tensor([x / 4, y / 3]).view(1, 1, 1, 1, 1, 2)
    return native_ms_deform_attn(
        torch.arange(12.0).view(1, 12, 1, 1), [(3, 4)], place, torch.ones(1, 1, 1, 1, 1)
    ).item()


if ready:
    by_hand = [
        sample(2.5, 1.5),
        sample(2, 1.5),
        sample(0, 1.5),
        sample(float('nan'), 1.5),
        sample(float('inf'), 1.5),
    ]
    assert by_hand == [6, 5.5, 2, 0, 0]
    print(by_hand)

# %% [markdown]
# ## What a query can change
#
# The gradient of one query's output with respect to the value is one number a pixel: the total weight with
# which the query reads it. Here one head asks for four points a level around the centre of the image. Each
# point spreads over its four nearest pixels.

# %%
torch.manual_seed(0)
shapes = [(24, 32), (12, 16), (6, 8)]
value = torch.zeros(1, sum(h * w for h, w in shapes), 1, 1, requires_grad=True)
reference = torch.full((1, 1, 3, 2), 0.5)
offsets, logits = torch.randn(1, 1, 1, 3, 4, 2), torch.randn(1, 1, 1, 12)
if ready:
    native_fused_ms_deform_attn(value, shapes, reference, offsets, logits).sum().backward()
read = torch.zeros_like(value) if value.grad is None else value.grad
assert not ready or abs(read.sum() - 1) < 1e-6
read.sum().item()

# %% [markdown]
# The weights of a softmax sum to one, and so do the pixels, as long as no point leaves the map.

# %%
#| label: fig-native-read
#| fig-cap: "A query reads at most four pixels a point, on every level: with 12 points, at most 48 of 1008 pixels."
#| fig-alt: "Three dark maps of 24 by 32, 12 by 16 and 6 by 8 pixels; a few pixels around each of four dots a level are bright."
figure, panels = plt.subplots(1, 3, figsize=(6, 1.8), dpi=80, layout='constrained')
for l, (panel, (h, w), level) in enumerate(
    zip(panels, shapes, read.view(-1).split([h * w for h, w in shapes]))
):
    show_image(
        panel, (level / read.max().clamp(min=1e-9)).clamp(0, 1).view(h, w), title=f'level {l}: {h} x {w}'
    )
    draw_points(
        panel,
        torch.tensor([w, h]) / 2 + offsets[0, 0, 0, l],
        logits.softmax(-1).view(3, 4)[l],
        kind='teacher',
        size=30,
    )
plt.show()

# %% [markdown]
# ## How the CPU kernel is fast
#
# * **One task is one head of one image.** It owns its slice of the value's gradient: no atomics, and the same
#   bits for any number of threads.
# * **The slice is packed first, with a frame of zeros**, when queries are many. A tap outside the map reads a
#   zero and needs no test; a point far outside is moved to where all its weight lies on the frame.
# * **Two phases.** Sixteen points at a time become pixel numbers and weights, four queries in a row so that
#   one's waiting is filled with another's work. Then channels are summed a vector at a time.
# * **Dot products are folded by a tree** in the backward pass: sixteen of them become one vector with fifteen
#   steps, each one blend, one shuffle and one addition.
# * **Memory is asked for before it is needed, and large gradients are written past the caches.** A head's
#   rows lie $M$ rows apart, so that the CPU does not guess the next one: each query names the rows of one
#   that comes later. An ordinary write reads the old line first and pushes another line out; a whole line of
#   a gradient that no cache will keep is written without either. Large results ask the system for large
#   pages.
# * **The fraction of a pixel comes from one rounded multiplication and addition.** In a map 160 pixels wide
#   this keeps five bits that the usual formula loses.
#
# The CUDA kernels follow the usual division of labour: a group of lanes for a head of a query, shuffles for
# dot products, atomics in float32 for the value's gradient. Machines that run the tests have often no GPU. So
# the same text (kernels, launchers, binding) is also compiled as C++ against a small header in which a
# block's threads are fibers that meet at shuffles and barriers. The tests run it against `grid_sample`, spoil
# it on purpose in three ways and see that they notice, and repeat it under sanitizers. What this cannot show
# are races between threads, and speed.
#
# ::: {.callout-note}
# ## Paper vs. code
# The papers' CUDA op takes float32 only, needs the build at install time and exists for GPUs alone; on a CPU
# the official code stops with an error. `SEMIDETR_OPS=torch` gives the plain PyTorch form that all
# implementations share.
# :::
#
# ## Summary
#
# * The op has a plain and a fused form; the fused one also does softmax, locations and masking.
# * It builds itself once, for this CPU, in the user's cache, and can come ready in a wheel.
# * No compiler, a failed build, an unknown device or dtype: plain PyTorch, one warning with reason and cure.
# * Locations stay in float32 under autocast; the value may be bfloat16.
# * `ops_status` says what is in use; `SEMIDETR_OPS` chooses.
#
# ## Exercises
#
# 1. Move the reference point to a corner of the image. Why is the sum over the read pixels now below one?
# 2. Set `SEMIDETR_ISA=base` before Python starts and time the op: how much is the wide vector worth?
# 3. Give a head two points on the same place. What is the gradient of the loss with respect to the two
#    offsets, and with respect to the two logits?
