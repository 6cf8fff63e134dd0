# %% [markdown]
# # What a machine can do {#sec-machine}
#
# > Find out what a machine offers to a training run, and apply the settings that cost nothing.
#
# The same step takes a second on one machine and ten on another of the same price. Usually one of four things
# is the reason: no compiler, so that deformable attention runs in plain PyTorch (@sec-native); more threads
# than cores, because a container may use only two of the 64 cores that it reports; a C library that returns
# memory to the system after each tensor and requests it again; or fast bfloat16 instructions that are not
# used. `semidetr doctor --env` (@sec-cli) prints what this chapter finds.

# %%
#| default_exp train.machine

# %%
import tempfile
import matplotlib.pyplot as plt
from semidetr.train.config import Config, override

# %%
#| export
import ctypes
import dataclasses
import math
import os
import platform
import sys
import time
from pathlib import Path
from statistics import median
import torch
import torch.nn.functional as F
from semidetr.train.checkpoint import LAST, PREVIOUS, Damaged, load_checkpoint
from semidetr.train.generations import check_fields as check_saved
from semidetr.core import ConfigError, DataError, all_reduce_mean, is_main, pick_device, world_size
from semidetr.detectors.build import build_ops
from semidetr.detectors.native import ops_status


# %% [markdown]
# ## Cores
#
# What counts is not how many cores a machine has, but how many this process may use. Two limits apply: the
# affinity of the process and the quota of its container.

# %%
#| export
def usable_cores(
    cgroup='/sys/fs/cgroup',  # folder of the control group
) -> int:  # at least 1
    "Number of cores that this process may use, by affinity and container quota"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1

    for files in (('cpu.max',), ('cpu/cpu.cfs_quota_us', 'cpu/cpu.cfs_period_us')):  # version 2 and version 1
        try:
            quota, period = ' '.join((Path(cgroup) / f).read_text() for f in files).split()
        except (OSError, ValueError):
            continue
        if quota.isdigit() and int(quota) > 0:
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)


def fit_threads() -> int:  # threads in use
    "Lower torch's threads to the usable cores, unless the user set OMP_NUM_THREADS"
    if not os.environ.get('OMP_NUM_THREADS') and torch.get_num_threads() > usable_cores():
        torch.set_num_threads(usable_cores())
    return torch.get_num_threads()


# %%
assert 1 <= usable_cores() <= os.cpu_count() and usable_cores('/no/such/folder') >= usable_cores()
assert fit_threads() >= 1


# %% [markdown]
# A quota is an amount of CPU time, in microseconds per period. Half a core still needs one thread; one and a
# half cores use two:

# %%
def with_quota(share):
    "Cores under a quota of `share` cores"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, 'cpu.max').write_text(f'{int(share * 100_000)} 100000')
        return usable_cores(folder)


assert with_quota(0.5) == 1 and with_quota(10**6) == usable_cores('/no/such/folder')

# %%
#| label: fig-machine-cores
#| fig-cap: "Cores that a process uses under a quota: the quota rounded up, and never more than there are."
#| fig-alt: "A staircase that rises with the quota until all cores of the machine are reached, and stays there"
quotas = [0.1 * i for i in range(1, 41)]
fig, ax = plt.subplots(figsize=(4, 2), dpi=80)
ax.step(quotas, [with_quota(q) for q in quotas], where='post')
ax.set(xlabel='quota, cores', ylabel='cores used', ylim=(0, None))
plt.show()


# %% [markdown]
# ## Keeping memory
#
# A training step allocates the same tensors as the step before. glibc returns large blocks to the system as
# soon as they are free, and the system fills each page with zeros before it hands the page out again. Three
# settings make glibc keep the blocks. They take effect at once and for this process only. Without glibc
# nothing happens, and the user's own `MALLOC_...` variables take precedence. The gain depends on the system:
# from nothing to a few percent of a step.

# %%
#| export
def keep_memory() -> bool:  # False where it does not apply
    "Let glibc keep freed memory; SEMIDETR_KEEP_MEMORY=0 or any MALLOC_* variable leaves glibc as it is"
    if sys.platform != 'linux' or platform.libc_ver()[0] != 'glibc':
        return False
    if os.environ.get('SEMIDETR_KEEP_MEMORY') == '0' or any(k.startswith('MALLOC_') for k in os.environ):
        return False
    if 'glibc.malloc' in os.environ.get('GLIBC_TUNABLES', ''):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    options = {-4: 0, -1: 2**31 - 1, -2: 256 << 20}  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h
    return all([mallopt(option, value) for option, value in options.items()])


def prepare():
    "Apply what costs nothing and helps every run on a CPU: `fit_threads` and `keep_memory`"
    fit_threads()
    keep_memory()


# %% [markdown]
# ## bfloat16
#
# With `run.amp=bf16` matrix products and convolutions run in 16 bits. Some CPUs have instructions for this;
# others emulate them and become slower. So the gain is measured, on a convolution, a norm and two linear
# layers, forward and backward, in float32 and bfloat16 by turns. A whole step gains less than this probe,
# because much of it stays in float32. The default is `off`: all numbers published in this book were computed
# in float32. `run.amp=auto` selects by machine: the probe decides on a CPU, the hardware on a GPU. The choice
# is written into the run's configuration, and a resumed run keeps it, also on another machine.

# %%
#| export
def bf16_speed(
    device='cpu',  # where to measure
    rounds: int = 7,  # paired measurements, after one to warm up
) -> float:  # above 1: bfloat16 is faster
    "Time of a small network in float32 over its time in bfloat16, forward and backward (median of rounds)"
    gen = torch.Generator().manual_seed(0)  # the global generator stays as it is

    def make(*shape):
        return (torch.randn(*shape, generator=gen) / shape[-1] ** 0.5).to(device).requires_grad_()

    image, kernel, up, down = make(2, 64, 48, 48), make(64, 64, 3, 3), make(512, 64), make(64, 512)

    def step(low):
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=low):
            x = F.layer_norm(F.conv2d(image, kernel, padding=1).flatten(2).transpose(1, 2), (64,))
            loss = F.linear(F.linear(x, up).relu(), down).float().square().mean()
        loss.backward()
        return loss.item()

    def timed(low):
        start = time.perf_counter()
        step(low)
        return time.perf_counter() - start

    pairs = [(timed(False), timed(True)) for _ in range(rounds + 1)][1:]
    return median(a / b for a, b in pairs)


# %%
#| export
def _amp_of(folder):
    "The precision of the newest generation that is whole, '' without one"
    for path in (folder / LAST, folder / PREVIOUS):
        try:
            if path.is_file():
                saved = load_checkpoint(path)
                check_saved(saved, path)
                return saved['config']['run']['amp']
        except Damaged:
            continue
    return ''


def choose_amp(
    cfg,  # Config
    folder='',  # of the run, which may have a checkpoint already
    min_gain: float = 1.3,  # `bf16_speed` from which a whole step gains too
):  # Config without 'auto'
    "Resolve `run.amp=auto`: a resumed run keeps its choice, a new one uses bfloat16 where that is faster"
    if cfg.run.amp != 'auto':
        return cfg
    device = pick_device(cfg.run.device)
    if saved := _amp_of(Path(folder)):
        amp = saved
    elif device.type == 'cuda':
        amp = 'bf16' if torch.cuda.is_bf16_supported() else 'fp16'
    else:
        gain = torch.tensor(bf16_speed(device) if is_main() else 0.0)
        gain = all_reduce_mean(gain) * world_size()  # the main process decides for all
        amp = 'bf16' if gain >= min_gain else 'off'
    return dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, amp=amp))


# %%
ratio = bf16_speed(rounds=3)
assert 0.01 < ratio < 100
chosen = choose_amp(override(Config(), ['run.amp=auto', 'run.device=cpu'])).run.amp
assert chosen in ('off', 'bf16') and choose_amp(Config()) == Config()


# %% [markdown]
# ## The report
#
# One fact per line. Training needs none of this; it helps to find out why a run is slow, and belongs in a bug
# report.

# %%
#| export
def _cpu_name():
    "Name of the processor, as the system reports it"
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return (models[0] if models else '') or platform.processor() or platform.machine()


def _op_line(kind, status):
    "Which implementation of deformable attention runs on a device type, and how to get the fast one"
    s = status[kind]
    op = f'attention op ({kind})'
    if status['mode'] == 'torch':
        return f'{op}: plain PyTorch, because SEMIDETR_OPS=torch'
    if s['ready']:
        isa = f"instruction set {s['isa']}" if s.get('isa') else ''
        return f'{op}: native, ' + ', '.join(filter(None, (s['source'], isa, s['path'])))
    command = 'semidetr build-ops' + (' --device cuda' if kind == 'cuda' else '')
    return f"{op}: plain PyTorch, many times slower: {s['reason']}. Cure: {command} says what is missing"


def environment_lines(
    probe: bool = True,  # measure bfloat16 (takes a second)
):  # yields lines
    "What this machine offers to a run, one fact per line"
    import torchvision

    versions = f'torch {torch.__version__}, torchvision {torchvision.__version__}'
    yield f'Python {sys.version.split()[0]}, {versions}, {platform.system()} {platform.machine()}'
    cores = f'{usable_cores()} of {os.cpu_count()} cores usable, {torch.get_num_threads()} threads'
    yield f'CPU {_cpu_name()}: {torch.backends.cpu.get_cpu_capability()}, {cores}'
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield f"GPU {', '.join(gpus) or 'none that torch can use'}; device {pick_device()}"
    status = ops_status()
    for kind in ('cpu', *(['cuda'] if gpus else [])):
        yield _op_line(kind, status)
    mode = os.environ.get('SEMIDETR_OPS') or 'auto'
    yield f'SEMIDETR_OPS={mode}: auto, native or torch choose the form of the op'
    if root := os.environ.get('SEMIDETR_DATA'):
        names = sorted(p.name for p in Path(root).glob('*/'))
        yield f"SEMIDETR_DATA={root}: {', '.join(names) or 'no data set there'}"
    else:
        yield 'SEMIDETR_DATA is not set: it may name the folder that holds your data sets'
    if probe:
        speed = f'{bf16_speed():.1f} times the speed of float32 in a small network'
        yield f'bfloat16: {speed} (run.amp=bf16, or auto; default off)'


# %% [markdown]
# The op is built at first use. `semidetr build-ops` builds it ahead of time, for a container image or for a
# machine that will have no compiler later.

# %%
#| export
def build_lines(
    device: str = 'cpu',  # 'cpu' or 'cuda'
    force: bool = False,  # build even if the library is there
    archs=('native',),  # instruction sets, as for `build_ops`
):  # yields lines
    "Build the op; report its path, build time and instruction set. `ConfigError` says what is missing"
    if device not in ('cpu', 'cuda'):
        raise ConfigError(f"device '{device}' is unknown; known: cpu, cuda")
    start, clock = time.time(), time.perf_counter()
    path = build_ops(device, archs=archs, force=force)
    seconds = time.perf_counter() - clock
    is_new = path.stat().st_mtime >= start - 1
    status = ops_status()
    op = status[device]
    if status['mode'] != 'torch' and not op['ready'] and op['reason'] != 'not tried':
        raise DataError(f"{path}: built, but not usable: {op['reason']}")
    done = f'built in {seconds:.0f} s' if is_new else 'there already (--force builds it again)'
    yield f'{path}: {done}' + (f", instruction set {op['isa']}" if op.get('isa') else '')
    if status['mode'] == 'torch':
        yield 'note: SEMIDETR_OPS=torch, so it will not be used'


# %%
report = list(environment_lines(probe=False))
assert report[0].startswith('Python') and any('attention op (cpu)' in line for line in report)
report[0].split(',')[0].split('.')[0]

# %% [markdown]
# ## Summary
#
# * `usable_cores` counts the cores that affinity and container allow; `fit_threads` lowers the number of
#   threads to that.
# * `keep_memory` saves the system calls for large tensors; `semidetr train` and `semidetr demo` switch it on.
# * `bf16_speed` measures what bfloat16 gains on this CPU; it is used with `run.amp=bf16` or `auto` only.
# * `environment_lines` reports all of this, with the state of the op, in `semidetr doctor --env`.
#
# ## Exercises
#
# 1. Run `SEMIDETR_OPS=torch semidetr doctor --env`. Which line changes, and how long does a training step
#    take then?
# 2. Start a container with `--cpus=1.5`. How many threads are used, and why not one?
# 3. Count the page faults of ten training steps with and without `keep_memory` (`resource.getrusage`).
