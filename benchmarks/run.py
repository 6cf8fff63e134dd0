"""All measurements, as JSON: `make bench`, or

    python benchmarks/run.py                    everything, about ten minutes on a quiet machine; results in benchmarks/results/
    python benchmarks/run.py --quick            a smoke version: few cases, few turns; results in build/bench/
    python benchmarks/run.py --only op step     some parts; the others' results stay

Every part runs in a process of its own for each number of threads, and its file is written as soon as it is done."""

import argparse, importlib, json, os, subprocess, sys, tempfile, time
from pathlib import Path

HERE = Path(__file__).resolve().parent
# part: (module, function, numbers of threads)
PARTS = {
    'matcher': ('matcher', 'run', (1,)),
    'roofline': ('roofline', 'run', (1,)),
    'memory': ('op', 'run_memory', (1,)),
    'step': ('step', 'run', (1, 2)),
    'op': ('op', 'run', (1, 2)),
    'scaling': ('op', 'run_scaling', (1,)),
    'semi': ('semi', 'run', (1,)),
    'kept': ('step', 'run_kept', (1,)),
}
# glibc gives large blocks back to the system and pays for them again at every step; the part 'kept' repeats some cases without that, for both sides
KEPT = dict(MALLOC_MMAP_MAX_='0', MALLOC_TRIM_THRESHOLD_='100000000000', MALLOC_TOP_PAD_='268435456')


def child(part, threads, quick, out):
    "One part in this process"
    import torch
    from timing import machine

    torch.set_num_threads(threads)
    module, function, _ = PARTS[part]
    about = machine()
    start = time.perf_counter()
    result = getattr(importlib.import_module(module), function)(
        threads, quick, lambda text: print(f'{threads} thread{"s" * (threads > 1)}  {text}', flush=True)
    )
    Path(out).write_text(
        json.dumps(
            dict(machine=about, load_after=os.getloadavg()[0], seconds=time.perf_counter() - start, **result)
        )
    )


def measure(part, threads, quick, rounds=None):  # result of a child
    "Start the process of a part; its messages are shown"
    env = {k: v for k, v in os.environ.items() if not k.startswith('MALLOC_')} | (
        KEPT if part == 'kept' else {}
    )
    env |= dict(
        OMP_NUM_THREADS=str(threads),
        HF_HUB_OFFLINE='1',
        TRANSFORMERS_VERBOSITY='error',
        PYTHONWARNINGS='ignore',
        **({'BENCH_ROUNDS': str(rounds)} if rounds else {}),
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / 'part.json'
        done = subprocess.run(
            [sys.executable, __file__, '--child', part, str(threads), str(int(quick)), str(out)], env=env
        )
        if done.returncode:
            sys.exit(f'{part} with {threads} thread(s) failed (exit code {done.returncode})')
        return json.loads(out.read_text())


def join(results):  # one result of several numbers of threads
    "Rows of all; what else there is comes from the first"
    first = results[0]
    load = max([r['machine']['load'] for r in results] + [r['load_after'] for r in results])
    return {
        **first,
        'rows': [row for r in results for row in r['rows']],
        'seconds': sum(r['seconds'] for r in results),
        'load': load,
    }


def plain(x):  # numbers to four significant digits
    "What is written: short and stable"
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    if isinstance(x, list):
        return [plain(v) for v in x]
    return float(f'{x:.4g}') if isinstance(x, float) else x


def main(argv=None):
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument('--quick', action='store_true', help='smoke version')
    ask.add_argument(
        '--only', nargs='+', choices=PARTS, default=list(PARTS), metavar='PART', help=', '.join(PARTS)
    )
    ask.add_argument(
        '--threads', type=int, nargs='+', help='numbers of threads, instead of those of each part'
    )
    ask.add_argument('--rounds', type=int, help='at most so many turns of each, for a look in between')
    ask.add_argument('--out', type=Path, help='folder of the results')
    ask.add_argument('--child', nargs=4, help=argparse.SUPPRESS)
    args = ask.parse_args(argv)
    if args.child:
        return child(args.child[0], int(args.child[1]), args.child[2] == '1', args.child[3])
    out, start = (
        args.out or (HERE.parent / 'build' / 'bench' if args.quick else HERE / 'results'),
        time.perf_counter(),
    )
    out.mkdir(parents=True, exist_ok=True)
    if os.getloadavg()[0] > 0.5:
        print(f'the machine is busy (load {os.getloadavg()[0]:.1f}): ratios will be less exact', flush=True)
    for part in args.only:
        result = join(
            [
                measure(part, n, args.quick, args.rounds)
                for n in args.threads or PARTS[part][2][: 1 if args.quick else None]
            ]
        )
        (out / f'{part}.json').write_text(
            json.dumps(plain(dict(part=part, quick=args.quick, **result)), indent=1) + '\n'
        )
        print(
            f'{part}: {len(result["rows"])} rows in {result["seconds"]:.0f} s, {time.perf_counter() - start:.0f} s since the start',
            flush=True,
        )


if __name__ == '__main__':
    main()
