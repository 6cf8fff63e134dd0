"""What all parts of the benchmark share: turns, ratios with quartiles, a description of the machine."""

import datetime, gc, os, statistics, subprocess, time
from pathlib import Path


def interleave(
    jobs,  # {name: function}; what a function returns as a dict of seconds are its own phases
    rounds=15,  # turns of each
    warm=1,  # turns that do not count
    seconds=None,  # continue until so much time is used, at most 10 times `rounds`
):  # {name: {phase: [seconds of each turn]}}; the phase of the whole call is 'all'
    "Let all take turns, so that a slow moment of the machine affects all of them; without garbage collection"
    rounds, times = min(rounds, int(os.environ.get('BENCH_ROUNDS', rounds))), {name: {} for name in jobs}
    for _ in range(warm):
        for f in jobs.values():
            f()
    gc.collect()
    gc.disable()
    try:
        end, n = time.perf_counter() + (seconds or 0), 0
        while n < rounds or (seconds and n < 10 * rounds and time.perf_counter() < end):
            n += 1
            for name, f in jobs.items():
                start = time.perf_counter()
                phases = f()
                spent = dict(all=time.perf_counter() - start)
                for k, v in (spent | (phases if isinstance(phases, dict) else {})).items():
                    times[name].setdefault(k, []).append(v)
    finally:
        gc.enable()
    return times


def quartiles(values):  # [lower quartile, median, upper quartile]
    "Location and spread of the values"
    if len(values) < 2:
        return [values[0]] * 3
    return statistics.quantiles(values, n=4, method='inclusive')


def compare(
    theirs,  # seconds of each turn
    ours,  # the same, in the same order
    **what,  # what was measured: case, name, quantity
):  # a row of a result file
    "How many times faster ours is: median over the turns, each compared with its neighbour"
    return dict(
        **what,
        theirs_ms=1e3 * statistics.median(theirs),
        ours_ms=1e3 * statistics.median(ours),
        ratio=quartiles([a / b for a, b in zip(theirs, ours)]),
        rounds=len(ours),
    )


def _lines(path):
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def caches():  # {'L1': bytes, ...}
    "Data caches of the first core, as the system reports them"
    out = {}
    for d in sorted(Path('/sys/devices/system/cpu/cpu0/cache').glob('index*')):
        kind, level, size = (next(iter(_lines(d / f)), '') for f in ('type', 'level', 'size'))
        if kind in ('Data', 'Unified') and size[:-1].isdigit():
            out[f'L{level}'] = int(size[:-1]) * dict(K=1024, M=1024**2)[size[-1]]
    return out


ISA = ('avx2', 'fma', 'avx512f', 'avx512_bf16', 'amx_bf16', 'asimd', 'bf16', 'sve')


def machine():  # plain values
    "On what, with what and when"
    import platform, torch
    from semidetr.detectors import native

    pairs = [line.split(':', 1) for line in _lines('/proc/cpuinfo') if ':' in line]
    info = {
        key.strip(): value.strip() for key, value in reversed(pairs)
    }  # the first core comes last, and stays
    flags = (info.get('flags') or info.get('Features') or '').split()
    try:
        import transformers

        hf = transformers.__version__
    except ImportError:
        hf = None
    command = ['git', 'describe', '--always', '--dirty', '--abbrev=12']
    git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    cpu = native.ops_status()['cpu']
    return dict(
        cpu=info.get('model name') or platform.processor() or platform.machine(),
        cores=os.cpu_count(),
        isa=[f for f in ISA if f in flags],
        caches=caches(),
        versions=dict(python=platform.python_version(), torch=torch.__version__, transformers=hf),
        torch_isa=torch.backends.cpu.get_cpu_capability(),
        op=cpu.get('isa') if cpu['ready'] else None,
        malloc={k: v for k, v in os.environ.items() if k.startswith('MALLOC_')},
        commit=git.stdout.strip() or None,
        date=datetime.datetime.now().astimezone().isoformat(timespec='minutes'),
        load=os.getloadavg()[0],
    )


def need_op():
    "The library of the op, loaded; the program ends where there is none"
    from semidetr.detectors import native

    if not native.native_available():
        raise SystemExit('no native op to measure: ' + native.ops_status()['cpu']['reason'])
