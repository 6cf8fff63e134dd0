# %% [markdown]
# # Building the op {#sec-build}
#
# > Compile the C++ or CUDA kernels of the next chapter, once, on the machine that runs them.
#
# *Why.* Kernels for deformable attention (@sec-native) make training several times faster, and many people
# never use them, because the usual extension needs a compiler, the right CUDA toolkit and the right torch at
# install time. A library that comes ready in a package fits one version of torch and the smallest common
# instruction set. So the package ships the sources and compiles them at first use, for this CPU. That must
# not surprise anybody: nothing is built twice, a stopped build leaves nothing behind, several processes do not
# get into each other's way, and no library is loaded from a folder that somebody else can write to.

# %%
#| default_exp detectors.build

# %%
#| export
import hashlib, logging, os, platform, shutil, subprocess, sys, tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
import torch
from semidetr.core import ConfigError

# %%
import matplotlib.pyplot as plt

# %% [markdown]
# ## Compiler and flags
#
# The sources lie in the package's folder `csrc/`, in the wheel too. They use torch's stable ABI: no Python
# header, no pybind, nothing that changes with the torch version, so that a build takes seconds (the ordinary
# `torch/extension.h` alone takes longer). The kernels are compiled once per instruction set, each with its
# own vector width, and the library picks one when it is loaded. A build on first use compiles only the one
# that this CPU needs.

# %%
#| export
_MIN_TORCH = (2, 10)  # first version whose stable ABI has all that the sources use
_ISA_FLAGS = dict(
    base='',
    v3='-mavx2 -mfma -mbmi -mbmi2 -mf16c',
    v4='-mavx2 -mfma -mbmi -mbmi2 -mf16c '
    '-mavx512f -mavx512bw -mavx512cd -mavx512dq -mavx512vl -mprefer-vector-width=512',
)
_FLAGS = (
    '-std=c++17 -O3 -fPIC -fvisibility=hidden '
    '-fno-math-errno -fno-trapping-math -ffp-contract=fast -Wno-psabi'
)
_ABI = '-DTORCH_TARGET_VERSION=0x020a000000000000'
_NVCC_FLAGS = '-std=c++17 -O3 -DUSE_CUDA -Xcompiler -fPIC -Xcompiler -fvisibility=hidden'


def package_folder() -> Path:
    "Where the package lies: libraries that came with it, and the folder of the sources"
    return Path(sys.modules[ConfigError.__module__].__file__).resolve().parent


def _cpu_isa() -> str:
    "Widest of the three instruction sets that this CPU has"
    if platform.machine().lower() not in ('x86_64', 'amd64'):
        return 'base'
    cap = torch.backends.cpu.get_cpu_capability()
    return 'v4' if 'AVX512' in cap or 'AMX' in cap else 'v3' if 'AVX2' in cap else 'base'


def _compiler() -> list[str]:
    "The C++ compiler's command; empty where there is none"
    installed = filter(shutil.which, ('c++', 'g++', 'clang++'))
    words = (os.environ.get('CXX') or next(installed, '')).split()
    path = shutil.which(words[0]) if words else None
    return [path, *words[1:]] if path else []


def _nvcc() -> str:
    "The CUDA compiler; empty where there is none"
    homes = [os.environ.get('CUDA_HOME'), os.environ.get('CUDA_PATH'), '/usr/local/cuda']
    found = [str(Path(h) / 'bin' / 'nvcc') for h in homes if h and (Path(h) / 'bin' / 'nvcc').exists()]
    return found[0] if found else shutil.which('nvcc') or ''


# %%
assert _cpu_isa() in _ISA_FLAGS
{name: flags.count('-mavx512') for name, flags in _ISA_FLAGS.items()}


# %% [markdown]
# ## Compile and link
#
# A build is a few compiler calls, run in parallel, and a link. It happens in a folder of its own; only the
# finished library is moved, in one step, to its place.

# %%
#| export
def _run(
    command: list,  # words of the command
    timeout: float,  # seconds
):
    "Run a compiler; `ConfigError` with its own message if it fails"
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        done = subprocess.run(command, **pipes, text=True, errors='replace', timeout=timeout)
    except subprocess.TimeoutExpired:
        raise ConfigError(f'the build took longer than {timeout:.0f} s') from None
    except OSError as e:
        raise ConfigError(f'the compiler could not be started: {e}') from None
    if done.returncode:
        lines = [o.strip() for o in done.stdout.splitlines() if o.strip()]
        errors = [o for o in lines if 'error' in o.lower()]
        message = errors[:1] or lines[-1:] or [f'exit code {done.returncode}']
        raise ConfigError(f'the build failed: {message[0]}')


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
    "Compile sources in parallel and link them against torch; `ConfigError` says what went wrong"
    compiler = compiler or _compiler()
    if not compiler:
        raise ConfigError('no C++ compiler was found')
    include, lib = _torch_paths()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.build-', dir=out.parent) as tmp:
        objects = [f'{tmp}/{i}.o' for i in range(len(sources))]
        commands = [
            [*compiler, *flags.split(), '-I', str(include), '-c', str(src), '-o', o]
            for (src, flags), o in zip(sources, objects)
        ]
        with ThreadPoolExecutor(len(commands)) as pool:
            list(pool.map(lambda c: _run(c, timeout), commands))
        linked = f'{tmp}/linked.so'
        libraries = ['-L', str(lib), '-ltorch_cpu', *link.split()]
        _run([*compiler, '-shared', *objects, '-o', linked, *libraries], timeout)
        os.replace(linked, out)
    return out


# %% [markdown]
# A failed build gives the compiler's message in one line and leaves nothing behind.

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


# %% [markdown]
# ## The name of a library
#
# In the cache a library is named by a key that follows everything that its bytes depend on:
#
# $$ k = \mathrm{SHA256}_{64}\big(\text{sources},\ \text{flags},\ \text{link},\ v_{\text{torch}},\ \text{system},\ \text{CPU}\big) $$ {#eq-build-key}
#
# where $\mathrm{SHA256}_{64}$ are the first 64 bits of the hash and $v_{\text{torch}}$ is the version of torch.
# With another torch another library is built; an equal plan finds the one that is there.

# %%
#| export
def _cpu_sources(isas):
    "(file, flags) of the C++ sources for some instruction sets"
    src = package_folder() / 'csrc'
    if 'all' in isas:
        isas = ('base', 'v3', 'v4') if platform.machine().lower() in ('x86_64', 'amd64') else ('base',)
    isas = tuple(_cpu_isa() if i == 'auto' else i for i in isas)
    kernels = [(src / f'msda_cpu_{i}.cpp', f'{_FLAGS} {_ISA_FLAGS[i]}') for i in isas]
    have = ' '.join(f'-DSEMIDETR_HAVE_{i.upper()}' for i in isas)
    return [*kernels, (src / 'msda_ops.cpp', f'{_FLAGS} {_ABI} {have}')]


def _cuda_sources(archs):
    "(file, flags) of the CUDA source for some architectures"
    if 'native' in archs:
        if not torch.cuda.is_available():
            raise ConfigError(
                'no GPU is visible here, so its architecture is not known; '
                'name it, e.g. semidetr build-ops --device cuda --archs 80,90'
            )
        archs = ['{}{}'.format(*torch.cuda.get_device_capability())]
    if bad := [a for a in archs if not a.isdigit()]:
        raise ConfigError(f"'{bad[0]}' is not a CUDA architecture; write 80, 90, ...")
    targets = [f'arch=compute_{a},code=sm_{a}' for a in archs]
    targets.append(f'arch=compute_{archs[-1]},code=compute_{archs[-1]}')
    gen = ' '.join(f'-gencode {t}' for t in targets)
    return [(package_folder() / 'csrc' / 'msda_cuda.cu', f'{_NVCC_FLAGS} {_ABI} {gen}')]


def _plan(
    device: str = 'cpu',  # 'cpu' or 'cuda'
    isas=('auto',),  # instruction sets: 'base', 'v3', 'v4', 'auto' = that of this CPU, 'all'
    archs=('native',),  # CUDA architectures such as 80 or 90; 'native' = that of the first GPU
) -> tuple:  # (sources with their flags, flags of the link, compiler, key of the result)
    "What to compile and how, and the name of the result (@eq-build-key)"
    if device == 'cuda':
        sources, link, compiler, cpu = _cuda_sources(archs), '-ltorch_cuda', [_nvcc()], ''
    else:
        sources, link, compiler, cpu = _cpu_sources(isas), '', _compiler(), _cpu_isa()
    files = sorted((package_folder() / 'csrc').iterdir())
    text = [p.read_bytes() for p in files if p.suffix in ('.h', '.cpp', '.cu', '.cuh')]
    names = [(p.name, flags) for p, flags in sources]
    bytes_of = text, names, link, torch.__version__, platform.system(), platform.machine(), cpu
    digest = hashlib.sha256(repr(bytes_of).encode()).hexdigest()
    return sources, link, compiler, f'{device}-{digest[:16]}'


# %% [markdown]
# Plans for five choices of instruction sets, and which of them are the same library:

# %%
choices = ('auto', 'base', 'v3', 'v4', 'all')
keys = [_plan(isas=(c,))[3] for c in choices]
assert keys[0] == _plan()[3] and keys[0] in keys[1:4]
[(source.name, flags.split()[-1]) for source, flags in _plan(isas=('all',))[0]]

# %%
#| label: fig-build-keys
#| fig-cap: "Every choice of instruction sets is a library of its own; `auto` is the library of the widest set that this CPU has."
#| fig-alt: "A five by five matrix of equal keys: the diagonal, and the pair of auto and one instruction set."
fig, ax = plt.subplots(figsize=(2.6, 2.6), dpi=80)
ax.imshow([[a == b for a in keys] for b in keys], cmap='Blues', vmin=0, vmax=1.5)
ax.set(xticks=range(5), yticks=range(5), xticklabels=choices, yticklabels=choices)
plt.show()


# %% [markdown]
# ## Where it is kept
#
# In the user's cache folder, or, if that is not writable, in a folder of the user's own in the temporary
# directory. Thanks to a lock file, several processes that start at once (the ranks of one run) build once:
# the others wait and load. The operating system drops the lock when a process dies. Where locks do not work
# the builds run in parallel, and each replaces the equal result of the others.

# %%
#| export
def _cache_dirs() -> list[Path]:
    "Folders that may hold the library, best first"
    base = os.environ.get('SEMIDETR_CACHE')
    if not base:
        base = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'semidetr'
    uid = os.getuid() if hasattr(os, 'getuid') else os.environ.get('USERNAME', 'user')
    return [Path(base) / 'ops', Path(tempfile.gettempdir()) / f'semidetr-ops-{uid}']


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
def _locked(path):
    "Hold a lock on a file while others wait; continue without it where the system has no locks"
    with ExitStack() as stack:
        with suppress(ImportError, OSError):
            import fcntl

            file = stack.enter_context(open(path, 'w'))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# %% [markdown]
# A folder that others can write to is not trusted, since code is loaded from it:

# %%
with tempfile.TemporaryDirectory() as own_folder:
    private = _usable(Path(own_folder))
    Path(own_folder).chmod(0o777)
    shared = _usable(Path(own_folder))
assert private and (not shared or not hasattr(os, 'getuid'))
private, shared

# %% [markdown]
# ## One call
#
# `build_ops` puts the pieces together. It is what `semidetr build-ops` runs, and what happens at the first use
# of the op where no library is found.

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
    "Build the op with the C++ compiler (or nvcc) of this machine; `ConfigError` says what is missing"
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
# What cannot be built is said before anything is compiled:

# %%
try:
    build_ops('cuda', archs=('8.0',))
except ConfigError as e:
    refusal = str(e)
assert '\n' not in refusal and ('nvcc' in refusal or '8.0' in refusal)
refusal

# %% [markdown]
# ## Summary
#
# * The sources come with the package; the op is compiled at first use, for this CPU, in seconds.
# * The key of a library covers sources, flags, torch, system and CPU: nothing stale is ever loaded.
# * A library appears whole or not at all; processes that start together build once.
# * Libraries are loaded only from folders that nobody else can write to.
# * Every failure is a `ConfigError` of one line.
#
# ## Exercises
#
# 1. The key does not cover the compiler. Which updates of the compiler would call for a new build?
# 2. Why is the temporary folder of a build made beside the library and not in the system's temporary folder?
# 3. Two ranks on two machines share a home directory, and their CPUs differ. What do they build?
