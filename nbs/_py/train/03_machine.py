# %% [markdown]
# # What a machine can do {#sec-machine}
#
# > Find out in a minute what a training run will meet on a machine: cores, instruction sets, the attention
# > op, bfloat16; and set what costs nothing.
#
# The same step takes a second on one machine and ten on another of the same price. Most often one of four
# things is the reason: no compiler, so that deformable attention runs in plain PyTorch (@sec-native); more
# threads than cores, because a container may use two of the sixty-four cores that it sees; a C library that
# gives memory back to the system after each tensor and asks for it again; or a CPU whose bfloat16 is fast and
# stays unused. `semidetr doctor --env` (@sec-cli) prints what this chapter finds.

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
from semidetr.train.checkpoint import load_checkpoint
from semidetr.core import ConfigError, DataError, all_reduce_mean, is_main, pick_device, world_size
from semidetr.detectors.native import build_ops, ops_status


# %% [markdown]
# ## Cores
#
# What counts is not how many cores a machine has, but how many this process may use: its affinity, and the
# quota of its container.

# %%
#| export
def usable_cores(
    cgroup='/sys/fs/cgroup',  # folder of the control group
) -> int:  # at least 1
    "Cores that this process may use: affinity and container quota"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1

    def read(name):
        return (Path(cgroup) / name).read_text().split()

    for files in (('cpu.max',), ('cpu/cpu.cfs_quota_us', 'cpu/cpu.cfs_period_us')):  # version 2 and version 1
        try:
            quota, period = sum((read(f) for f in files), [])
        except (OSError, ValueError):
            continue
        if quota.isdigit() and int(quota) > 0:
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)


def fit_threads() -> int:  # threads in use
    "Never more threads than usable cores; a number that the user set stays"
    if not os.environ.get('OMP_NUM_THREADS') and torch.get_num_threads() > usable_cores():
        torch.set_num_threads(usable_cores())
    return torch.get_num_threads()


# %%
assert 1 <= usable_cores() <= os.cpu_count() and usable_cores('/no/such/folder') >= usable_cores()
assert fit_threads() >= 1


# %% [markdown]
# A quota is a share of time, in microseconds of a period. Half a core still needs one thread, one and a half
# use two:

# %%
def with_quota(share):
    "Cores under a quota of `share` cores"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, 'cpu.max').write_text(f'{int(share * 100_000)} 100000')
        return usable_cores(folder)


assert with_quota(0.5) == 1 and with_quota(10**6) == usable_cores('/no/such/folder')

# %%
#| label: fig-machine-cores
#| fig-cap: "Cores that a process takes under a quota: the quota rounded up, and never more than there are."
#| fig-alt: "A staircase that rises with the quota until all cores of the machine are reached, and stays there"
quotas = [0.1 * i for i in range(1, 41)]
fig, ax = plt.subplots(figsize=(4, 2), dpi=80)
ax.step(quotas, [with_quota(q) for q in quotas], where='post')
ax.set(xlabel='quota, cores', ylabel='cores used', ylim=(0, None))
plt.show()


# %% [markdown]
# ## Memory that is kept
#
# A training step needs the same tensors as the step before. glibc returns large ones to the system as soon as
# they are free, and the system fills each page with zeros before it hands it out again. Three settings make
# it keep what it has. They take effect at once, for this process alone; where there is no glibc nothing
# happens, and a user's own `MALLOC_...` variables have the last word. How much it saves depends on the
# system: from nothing to a few percent of a step.

# %%
#| export
def keep_memory() -> bool:  # False where it does not apply
    "Let glibc keep freed memory for the next step; SEMIDETR_KEEP_MEMORY=0 or any MALLOC_* variable leaves it alone"
    if (
        sys.platform != 'linux'
        or platform.libc_ver()[0] != 'glibc'
        or os.environ.get('SEMIDETR_KEEP_MEMORY') == '0'
    ):
        return False
    if any(k.startswith('MALLOC_') for k in os.environ) or 'glibc.malloc' in os.environ.get(
        'GLIBC_TUNABLES', ''
    ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(
        [mallopt(-4, 0), mallopt(-1, 2**31 - 1), mallopt(-2, 256 << 20)]
    )  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD


def prepare():
    "What costs nothing and helps every run on a CPU: fitting threads, kept memory"
    fit_threads()
    keep_memory()


# %% [markdown]
# ## bfloat16
#
# With `run.amp=bf16` matrix products and convolutions run in 16 bits. Some CPUs have instructions for that,
# others imitate them and become slower, so it has to be measured: a convolution, a norm and two linear
# layers, forward and backward, in turns. A whole step gains less than the probe, because much of it stays in
# float32. The default is `off`: float32 is what all published numbers of this book were made with.
# `run.amp=auto` leaves the choice to the machine: the probe decides on a CPU, the hardware on a GPU. What was
# chosen is written into the run's configuration, and a run that is gone on with keeps it, wherever it goes
# on.

# %%
#| export
def bf16_speed(device='cpu', rounds: int = 7) -> float:  # above 1: bfloat16 is faster
    "How much faster a small network runs forward and backward in bfloat16 than in float32 (median of paired rounds)"
    gen = torch.Generator().manual_seed(0)  # the global generator is left alone

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
def choose_amp(
    cfg,  # Config
    folder='',  # of a run that may have been begun
    least: float = 1.3,  # gain of the probe from which on a whole step gains too
):  # Config without 'auto'
    "Settle `run.amp=auto`: as the run in this folder began, else bfloat16 where this machine is faster with it; the first process decides for all"
    if cfg.run.amp != 'auto':
        return cfg
    device, begun = pick_device(cfg.run.device), Path(folder) / 'last.pt'
    if begun.is_file():
        amp = load_checkpoint(begun)['config']['run']['amp']
    elif device.type == 'cuda':
        amp = 'bf16' if torch.cuda.is_bf16_supported() else 'fp16'
    else:
        amp = (
            'bf16'
            if all_reduce_mean(torch.tensor(bf16_speed(device) if is_main() else 0.0)) * world_size() >= least
            else 'off'
        )
    return dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, amp=amp))


# %%
ratio = bf16_speed(rounds=3)
assert 0.01 < ratio < 100
chosen = choose_amp(override(Config(), ['run.amp=auto', 'run.device=cpu'])).run.amp
assert chosen in ('off', 'bf16') and choose_amp(Config()) == Config()


# %% [markdown]
# ## The report
#
# One fact a line. Nothing here is needed to train; all of it helps to understand why a run is slow, and
# belongs into a bug report.

# %%
#| export
def _cpu_name():
    "What the system calls its processor"
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        lines = []
    return (
        next((l.partition(':')[2].strip() for l in lines if l.startswith('model name')), '')
        or platform.processor()
        or platform.machine()
    )


def _op_line(kind, status):
    "Which form of deformable attention runs on a device type, and how to get the fast one"
    s = status[kind]
    if status['mode'] == 'torch':
        return f'attention op ({kind}): plain PyTorch, because SEMIDETR_OPS=torch'
    if s['ready']:
        return (
            f"attention op ({kind}): native, {s['source']}"
            + (f", instruction set {s['isa']}" if s.get('isa') else '')
            + (f", {s['path']}" if s['path'] else '')
        )
    return (
        f"attention op ({kind}): plain PyTorch, many times slower: {s['reason']}. Cure: semidetr build-ops"
        + (' --device cuda' if kind == 'cuda' else '')
        + ' says what is missing'
    )


def environment_lines(
    probe: bool = True,  # measure bfloat16 (a second)
):  # yields lines
    "What a run will meet on this machine"
    import torchvision

    yield f'Python {sys.version.split()[0]}, torch {torch.__version__}, torchvision {torchvision.__version__}, {platform.system()} {platform.machine()}'
    yield f'CPU {_cpu_name()}: {torch.backends.cpu.get_cpu_capability()}, {usable_cores()} of {os.cpu_count()} cores usable, {torch.get_num_threads()} threads'
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield f"GPU {', '.join(gpus) or 'none that torch can use'}; device {pick_device()}"
    status = ops_status()
    for kind in ('cpu', *(['cuda'] if gpus else [])):
        yield _op_line(kind, status)
    yield f"SEMIDETR_OPS={os.environ.get('SEMIDETR_OPS') or 'auto'}: auto, native or torch choose the form of the op"
    root = os.environ.get('SEMIDETR_DATA')
    names = sorted(p.name for p in Path(root).glob('*/')) if root else []
    yield (
        f"SEMIDETR_DATA={root}: {', '.join(names) or 'no data set there'}"
        if root
        else 'SEMIDETR_DATA is not set: it may name the folder that holds your data sets'
    )
    if probe:
        yield f'bfloat16: {bf16_speed():.1f} times the speed of float32 in a small network (run.amp=bf16, or auto; default off)'


# %% [markdown]
# The op is built at first use. `semidetr build-ops` does it ahead, for an image of a container or before a
# machine loses its compiler.

# %%
#| export
def build_lines(
    device: str = 'cpu',  # 'cpu' or 'cuda'
    force: bool = False,  # build even if the library is there
    archs=('native',),  # see `build_ops`
):  # yields lines; ConfigError says what is missing
    "Build the op and say where it is, how long it took, and for which instruction set"
    if device not in ('cpu', 'cuda'):
        raise ConfigError(f"device '{device}' is unknown; known: cpu, cuda")
    start, clock = time.time(), time.perf_counter()
    path = build_ops(device, archs=archs, force=force)
    done = (
        f'built in {time.perf_counter() - clock:.0f} s'
        if path.stat().st_mtime >= start - 1
        else 'there already (--force builds it again)'
    )
    status = ops_status()
    used = status[device]
    if status['mode'] != 'torch' and not used['ready'] and used['reason'] != 'not tried':
        raise DataError(f"{path}: built, but not usable: {used['reason']}")
    yield f'{path}: {done}' + (f", instruction set {used['isa']}" if used.get('isa') else '')
    if status['mode'] == 'torch':
        yield 'note: SEMIDETR_OPS=torch, so it will not be used'


# %%
report = list(environment_lines(probe=False))
assert report[0].startswith('Python') and any('attention op (cpu)' in line for line in report)
report[0].split(',')[0].split('.')[0]

# %% [markdown]
# ## Summary
#
# * `usable_cores` counts what affinity and container leave; `fit_threads` never starts more threads than
#   that.
# * `keep_memory` spares the system calls of large tensors; `semidetr train` and `semidetr demo` switch it on.
# * `bf16_speed` measures what 16 bits bring on this CPU; nothing is switched on by itself.
# * `environment_lines` says all of it, with the state of the op, in `semidetr doctor --env`.
#
# ## Exercises
#
# 1. Run `SEMIDETR_OPS=torch semidetr doctor --env`. Which line changes, and what does a training step cost
#    then?
# 2. Start a container with `--cpus=1.5`. How many threads are used, and why not one?
# 3. Count the page faults of ten training steps with and without `keep_memory` (`resource.getrusage`).
