"""All measurements, as JSON: `make bench`, or

    python benchmarks/run.py                    everything, a quarter of an hour on a quiet machine
    python benchmarks/run.py --quick            a smoke version: few cases, few turns
    python benchmarks/run.py --only op step     some parts; the others' results stay

Results are written to benchmarks/results/, those of the smoke version to build/bench/. Every part runs in a
process of its own for each number of threads, and its file is written as soon as it is done."""

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
    'detectors': ('detectors', 'run', (1,)),
}
# glibc returns large blocks to the system and requests them again at every step; the part 'kept' repeats some
# cases without that, for both sides
KEPT = dict(MALLOC_MMAP_MAX_='0', MALLOC_TRIM_THRESHOLD_='100000000000', MALLOC_TOP_PAD_='268435456')


def child(part, threads, quick, out):
    "One part in this process"
    import torch
    from timing import machine

    torch.set_num_threads(threads)
    module, function, _ = PARTS[part]
    about = machine()

    def say(text):
        print(f'{threads} thread{"s" * (threads > 1)}  {text}', flush=True)

    start = time.perf_counter()
    result = getattr(importlib.import_module(module), function)(threads, quick, say)
    about = dict(machine=about, load_after=os.getloadavg()[0], seconds=time.perf_counter() - start)
    Path(out).write_text(json.dumps(about | result))


def measure(part, threads, quick, rounds=None):  # result of a child
    "Start the process of a part; its messages are shown"
    env = {k: v for k, v in os.environ.items() if not k.startswith('MALLOC_')}
    env |= dict(OMP_NUM_THREADS=str(threads), PYTHONWARNINGS='ignore')
    env |= dict(HF_HUB_OFFLINE='1', TRANSFORMERS_VERBOSITY='error')
    if part == 'kept':
        env |= KEPT
    if rounds:
        env['BENCH_ROUNDS'] = str(rounds)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / 'part.json'
        command = [sys.executable, __file__, '--child', part, str(threads), str(int(quick)), str(out)]
        done = subprocess.run(command, env=env)
        if done.returncode:
            sys.exit(f'{part} with {threads} thread(s) failed (exit code {done.returncode})')
        return json.loads(out.read_text())


def join(results):  # one result of several numbers of threads
    "Rows of all; what else there is comes from the first"
    rows = [row for r in results for row in r['rows']]
    load = max([r['machine']['load'] for r in results] + [r['load_after'] for r in results])
    return {**results[0], 'rows': rows, 'seconds': sum(r['seconds'] for r in results), 'load': load}


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
    parts = dict(nargs='+', choices=PARTS, default=list(PARTS), metavar='PART')
    ask.add_argument('--only', **parts, help=', '.join(PARTS))
    ask.add_argument(
        '--threads', type=int, nargs='+', help='numbers of threads, instead of those of each part'
    )
    ask.add_argument('--rounds', type=int, help='at most so many turns of each, for a look in between')
    ask.add_argument('--out', type=Path, help='folder of the results')
    ask.add_argument('--child', nargs=4, help=argparse.SUPPRESS)
    args = ask.parse_args(argv)
    if args.child:
        return child(args.child[0], int(args.child[1]), args.child[2] == '1', args.child[3])
    start = time.perf_counter()
    out = args.out or (HERE.parent / 'build' / 'bench' if args.quick else HERE / 'results')
    out.mkdir(parents=True, exist_ok=True)
    if os.getloadavg()[0] > 0.5:
        print(f'the machine is busy (load {os.getloadavg()[0]:.1f}): ratios will be less exact', flush=True)
    for part in args.only:
        threads = args.threads or PARTS[part][2][: 1 if args.quick else None]
        result = join([measure(part, n, args.quick, args.rounds) for n in threads])
        written = plain(dict(part=part, quick=args.quick, **result))
        (out / f'{part}.json').write_text(json.dumps(written, indent=1) + '\n')
        spent = f'{result["seconds"]:.0f} s, {time.perf_counter() - start:.0f} s since the start'
        print(f'{part}: {len(result["rows"])} rows in {spent}', flush=True)


if __name__ == '__main__':
    main()
