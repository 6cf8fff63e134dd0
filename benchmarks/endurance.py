"""Let a run go on for long, and watch its memory and its handles from outside.

Two runs through the command line, each in a process of its own: `tiny` trains Semi-DETR at the smallest
settings for 10,000 iterations through its stages, with workers, images of several sizes, evaluations and
checkpoints; `small` trains with the preset of that name. While a run goes on, its processes are read from
/proc every few seconds: memory of the main process and of its workers in MB of 2^20 bytes, open files,
threads, processes. The iteration is that of the last line of the log.

    SEMIDETR_DATA=DIR python benchmarks/endurance.py      # both; `small` needs the data set fod12 in DIR
    python benchmarks/endurance.py --cases tiny --iters 300 --out record.json
"""

import argparse, json, os, subprocess, sys, tempfile, time
from pathlib import Path
import psutil
from timing import machine

RECORD = Path(__file__).parent / 'results' / 'endurance.json'
ITERS = dict(tiny=10_000, small=1_200)
TINY = [
    'data.data=digits:n=48,size=64',
    'data.count=12',
    'data.dev=6',
    'view.short_sides=[48,56,64,72,80]',
    'view.eval_short=64',
    'detector.transformer.d_model=16',
    'detector.transformer.ffn=16',
    'detector.transformer.n_heads=2',
    'detector.transformer.enc_layers=1',
    'detector.transformer.dec_layers=1',
    'detector.transformer.num_queries=20',
    'detector.backbone.name=timm:mobilenetv3_small_050',
    'detector.backbone.weights=none',
    'detector.backbone.out_strides=[8,16]',
    'detector.denoising.num=4',
    'loader.n_labelled=1',
    'loader.n_unlabelled=2',
    'loader.num_workers=2',
    'run.threads=1',
    'pseudo.threshold=0.005',
]


def command(case, iters, folder):  # -> arguments of `semidetr train`
    "A run whose stages, evaluations and checkpoints are spread over its length"
    shared = ['--method', 'semi_detr', '--out', str(folder), '--device', 'cpu', '-q']
    stages = [f'optim.iters={iters}', f'method.burn_in_iters={iters // 5}', f'method.T1={3 * iters // 5}']
    often = [f'run.eval_every={iters // 5}', f'run.checkpoint_every={iters // 20}', 'run.log_every=10']
    if case == 'tiny':
        return [*shared, *TINY, *stages, *often]
    data = ['--preset', 'small', '--data', 'fod12', 'data.count=60', 'run.threads=1']
    return [*shared, *data, *stages, *often]


def iteration(folder):  # -> the last one in the log
    "How far a run is"
    try:
        with open(folder / 'log.jsonl', 'rb') as f:
            f.seek(0, os.SEEK_END)
            f.seek(max(0, f.tell() - 20_000))
            lines = [line for line in f.read().split(b'\n')[:-1] if line.startswith(b'{')]
        return max((json.loads(line).get('step', 0) for line in lines), default=0)
    except FileNotFoundError:
        return 0


def reading(process, folder):  # -> one row
    "What the run holds now"
    children = process.children(recursive=True)
    memory = [p.memory_info().rss / 2**20 for p in (process, *children)]
    return dict(
        iteration=iteration(folder),
        main_mb=round(memory[0]),
        all_mb=round(sum(memory)),
        handles=process.num_fds(),
        threads=process.num_threads(),
        processes=1 + len(children),
    )


def watch(case, iters, every):  # name, iterations, seconds between two readings; -> the result of one run
    "Train, and read until the end"
    with tempfile.TemporaryDirectory(prefix='endurance-') as folder:
        run, start = Path(folder) / 'run', time.time()
        env = {k: v for k, v in os.environ.items() if not k.startswith('MALLOC_')}
        args = [sys.executable, '-m', 'semidetr.cli', 'train', *command(case, iters, run)]
        log = open(Path(folder) / 'output', 'w+')
        child = subprocess.Popen(args, stdout=log, stderr=subprocess.STDOUT, env=env)
        process, rows = psutil.Process(child.pid), []
        while child.poll() is None:
            try:
                rows.append(reading(process, run))
            except psutil.Error:  # a process ended while it was read
                pass
            time.sleep(every)
        log.seek(0)
        if child.returncode:
            sys.exit(f'{case}: {log.read()[-600:]}')
        result = json.loads((run / 'run.json').read_text())
    rows = [r for r in rows if r['iteration']]
    print(case, json.dumps(rows[-1]), flush=True)
    about = dict(case=case, iterations=result['iterations'], cpu_seconds=round(result['cpu_seconds'], 1))
    return about | dict(seconds=round(time.time() - start, 1), rows=thinned(rows))


def thinned(rows, most=400):  # readings; how many to keep at most
    "Readings at equal distances, and the highest ones"
    step = max(1, len(rows) // most)
    highest = {max(range(len(rows)), key=lambda i: rows[i][k]) for k in ('all_mb', 'handles')}
    return [r for i, r in enumerate(rows) if i % step == 0 or i in highest or i == len(rows) - 1]


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--cases', nargs='*', choices=list(ITERS), default=list(ITERS), help='which runs')
    p.add_argument('--iters', type=int, help='iterations of each, instead of 10,000 and 1,200')
    p.add_argument('--every', type=float, default=2, help='seconds between two readings')
    p.add_argument('--out', type=Path, default=RECORD, help='write the record, as JSON')
    a = p.parse_args()
    for case in a.cases:
        new = dict(machine=machine()) | watch(case, a.iters or ITERS[case], a.every)
        old = json.loads(a.out.read_text())['runs'] if a.out.exists() else []
        runs = sorted(
            [r for r in old if r['case'] != case] + [new], key=lambda r: list(ITERS).index(r['case'])
        )
        a.out.write_text(json.dumps(dict(what='endurance', runs=runs), indent=1) + '\n')


if __name__ == '__main__':
    main()
