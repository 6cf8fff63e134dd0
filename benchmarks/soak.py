"""Kill runs at random points and give the same command again: the end must be that of an unbroken run.

Every method is trained in tiny runs on one process, on one with workers that load images, with accumulated
gradients and on two processes. A run is killed (SIGKILL) up to five times, each time at a point drawn from
the seed: after the update of the teacher, between losses and gradients, inside an update, in the middle of a
line of the log, of a checkpoint or of the result, before or after each of the renames that make a checkpoint
the last one. Both stages are among the steps: burn-in, one-to-many, one-to-one. Then the last checkpoint of
each process (every tensor, by `torch.equal`), the log and the metrics are compared with those of an unbroken
run. Of two processes sometimes one alone is killed, sometimes both.

    python benchmarks/soak.py                                  # 20 kills for each method
    python benchmarks/soak.py --methods semi_detr --kills 4 --processes 2 --seed 1

A process that has imported everything starts the runs, so that each takes a second or two.
"""

import argparse, functools, json, os, random, shutil, signal, socket, sys, tempfile, time
from pathlib import Path
import torch
import torch.utils.tensorboard  # noqa: F401  what a run imports late, once for all
import timm  # noqa: F401
from semidetr import core
from semidetr.cli import commands  # noqa: F401  registers the commands
from semidetr.cli.terminal import main as semidetr
from semidetr.semi.methods import METHODS
from semidetr.train import api, checkpoint, stop, trainer  # noqa: F401
from semidetr.train import step as stepping
from semidetr.train.checkpoint import environment, load_checkpoint

RECORD = Path(__file__).parent / 'results' / 'soak.json'
ITERS, BURN_IN, T1, SAVED, LOGGED = 7, 2, 4, 2, 2
CHAIN = 5  # most kills of one run
PATIENCE = 300  # seconds that the processes of a run may take
TINY = [
    'data.data=digits:n=24,size=64',
    'data.count=6',
    'data.dev=2',
    'view.short_sides=[64]',
    'view.eval_short=64',
    'run.threads=1',
    'run.test=false',
    f'run.log_every={LOGGED}',
    f'run.checkpoint_every={SAVED}',
    'detector.backbone.weights=none',
    'loader.n_labelled=2',
    'loader.n_unlabelled=2',
    'pseudo.threshold=0.005',
    f'method.burn_in_iters={BURN_IN}',
    f'method.T1={T1}',
    f'optim.iters={ITERS}',
]
DINO = [
    'detector.transformer.d_model=32',
    'detector.transformer.ffn=32',
    'detector.transformer.n_heads=4',
    'detector.transformer.dec_layers=2',
    'detector.transformer.num_queries=20',
    'detector.denoising.num=8',
]
OTHERS = {  # method -> (detector that it needs, settings)
    'soft_teacher': (
        'faster_rcnn',
        [
            'detector.d_model=32',
            'detector.hidden=32',
            'detector.roi_samples=32',
            'detector.proposals=50',
            'method.candidate_score=0',
            'method.class_score=0',
            'method.max_uncertainty=9',
        ],
    ),
    'dense_teacher': ('fcos', ['detector.d_model=64', 'detector.convs=1', 'method.dense_ratio=0.2']),
}
SETTINGS = {  # name -> (processes, settings); a run of one of them is compared with an unbroken one of `LIKE`
    'one process': (1, ['loader.num_workers=0']),
    'two processes': (2, ['loader.num_workers=0']),
    'accumulation': (1, ['loader.num_workers=0', 'optim.accumulate=2', 'optim.normalise=step']),
    'workers': (1, ['loader.num_workers=2']),
}
LIKE = {'workers': 'one process'}
ALWAYS = ('teacher', 'losses', 'gradients', 'update')  # places in every iteration


# --- points ----------------------------------------------------------------------------------------
def places(step, rank):
    "Where a process can be killed in iteration number `step`"
    saves = (step + 1) % SAVED == 0 or step + 1 == ITERS
    out = [*ALWAYS, *['write'] * 4 * saves]
    if rank == 0:
        out += ['log'] * ((step + 1) % LOGGED == 0) + ['report'] * (step + 1 == ITERS)
    return out


def draw_points(rng, kills, processes):
    "Points of one run, in the order of their steps: rank, step, place, how often it is passed before, all"
    points = []
    for step in sorted(rng.sample(range(ITERS), kills)):
        rank = rng.randrange(processes)
        point = dict(rank=rank, step=step, place=rng.choice(places(step, rank)))
        point['passed'] = rng.randrange(9) if point['place'] == 'write' else 0
        point['all'] = rng.random() < 0.7  # are the other processes killed at once as well?
        points.append(point)
    return points


def draw_chains(methods, kills, processes, seed):
    "Runs of each method: (method, name of the settings, points)"
    chains = []
    names = [n for n, (world, _) in SETTINGS.items() if processes in (0, world)]
    for method in methods:
        rng, left, n = random.Random(f'{seed} {method}'), kills, 0
        while left > 0:
            name = names[n % len(names)]
            points = draw_points(rng, min(CHAIN, left), SETTINGS[name][0])
            chains.append((method, name, points))
            left, n = left - CHAIN, n + 1
    return chains


# --- the hook --------------------------------------------------------------------------------------
class Hook:
    "Kills this process at a point"

    def __init__(self, point):
        self.point, self.step, self.saving, self.passed = point, -1, False, 0
        self.after(stepping, 'update_teacher', 'teacher')
        self.after(stepping, 'total_loss', 'losses')
        self.after(stepping, 'average_gradients', 'gradients')
        self.after(stepping, 'clip_and_step', 'update')
        self.iterations()
        self.log()
        self.writes()
        self.report()

    def reached(self, place):
        return self.step == self.point['step'] and place == self.point['place']

    def die(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def after(self, module, name, place):
        real = getattr(module, name)

        def wrapped(*args, **kwargs):
            out = real(*args, **kwargs)
            if self.reached(place):
                self.die()
            return out

        setattr(module, name, wrapped)

    def iterations(self):
        real = trainer.Iteration.iterate

        def iterate(run, *args):
            self.step = run.step
            return real(run, *args)

        trainer.Iteration.iterate = iterate

    def log(self):
        "Half a line"
        real = checkpoint.RunLog.write

        def write(log, row):
            if self.reached('log') and core.is_main():
                with log.path.open('a') as f:
                    f.write(json.dumps(row)[:40])
                self.die()
            return real(log, row)

        checkpoint.RunLog.write = write

    def writes(self):
        "Half a file, or between two of the operations that make it the last checkpoint"
        for name in ('fsync', 'replace', 'link'):
            setattr(os, name, self.operation(name, getattr(os, name)))
        real = stop.save_generation

        def save_generation(*args):
            self.saving = True
            real(*args)
            self.saving = False
            if self.reached('write'):
                self.die()

        stop.save_generation = save_generation

    def operation(self, name, real):
        def wrapped(*args, **kwargs):
            if self.saving and self.reached('write'):
                if self.passed == self.point['passed']:
                    if name == 'fsync':
                        os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
                    self.die()
                self.passed += 1
            return real(*args, **kwargs)

        return wrapped

    def report(self):
        "Half of run.json"
        real = trainer.atomic_write

        def write(path, data):
            if self.reached('report'):
                path.with_name(f'.{path.name}.{os.getpid()}.tmp').write_text(data[: len(data) // 2])
                self.die()
            return real(path, data)

        trainer.atomic_write = write


# --- processes -------------------------------------------------------------------------------------
def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def start(words, rank, world, port, point, log):
    "Number of a new process that runs one command"
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = (os.fdopen(n, 'w', buffering=1) for n in (1, 2))
        if world > 1:
            place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_PORT=port)
            os.environ.update({k: str(v) for k, v in place.items()}, MASTER_ADDR='127.0.0.1')
        if point is not None and point['rank'] == rank:
            Hook(point)
        semidetr(words)
    except SystemExit as e:
        code = e.code or 0
    except BaseException as e:
        print(repr(e), file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(code)


def together(words, world, point, log):
    "Run a command in one or more processes; exit codes by rank, -9 for a killed one"
    port = free_port()
    alive = {start(words, r, world, port, point, log): r for r in range(world)}
    codes, end = {}, time.monotonic() + PATIENCE
    while alive:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[alive.pop(pid)] = os.waitstatus_to_exitcode(status)
        else:
            time.sleep(0.02)
        is_killed = -signal.SIGKILL in codes.values()
        if (is_killed and point['all']) or time.monotonic() > end:
            for other in alive:
                os.kill(other, signal.SIGKILL)
    return [codes[r] for r in range(world)]


def words_of(method, settings, folder):
    "The command of a run"
    detector, own = OTHERS.get(method, ('', DINO))
    named = ['--detector', detector] if detector else []
    items = [f'method.name={method}', *TINY, *own, *SETTINGS[settings][1]]
    return ['train', '--preset', 'digits', *named, '-q', '-o', str(folder), *items]


# --- comparison ------------------------------------------------------------------------------------
def bits(x):
    "Bytes of a tensor: nan is nan, and 0 is not -0"
    return x.contiguous().reshape(-1).view(torch.uint8)


def differences(a, b, where=''):
    "Names of values that differ; tensors are compared bit for bit, times and digests are left out"
    if isinstance(a, dict) and isinstance(b, dict):
        names = [k for k in dict.fromkeys([*a, *b]) if k not in ('spent', 'ranks', 'num_workers')]
        prefix = f'{where}.' if where else ''
        return [d for k in names for d in differences(a.get(k), b.get(k), f'{prefix}{k}')]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for n, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f'{where}[{n}]')]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        return [] if same and torch.equal(bits(a), bits(b)) else [where]
    return [] if type(a) is type(b) and (a == b or (a != a and b != b)) else [where]


def tensors(state):
    "Number of tensors in a checkpoint"
    if isinstance(state, torch.Tensor):
        return 1
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return sum(map(tensors, parts))


def compare(folder, whole):
    "(What differs between two finished runs, number of tensors compared)"
    found, count = [], 0
    names = sorted(p.name for p in whole.glob('last*.pt'))
    if names != sorted(p.name for p in folder.glob('last*.pt')):
        found.append('names of the checkpoints')
    for name in names:
        a, b = load_checkpoint(folder / name), load_checkpoint(whole / name)
        found += [f'{name}: {d}' for d in differences(a, b)]
        count += tensors(b)
    if (folder / 'log.jsonl').read_text() != (whole / 'log.jsonl').read_text():
        found.append('log.jsonl')
    a, b = (json.loads((f / 'run.json').read_text()) for f in (folder, whole))
    if str(a['metrics']) != str(b['metrics']):  # text: nan is not nan
        found.append('metrics')
    left = [
        p.name for p in folder.iterdir() if p.name.endswith('.tmp') or p.name.startswith(('next', 'owner'))
    ]
    return found + [f'left over: {n}' for n in left], count


# --- the soak --------------------------------------------------------------------------------------
def unbroken(method, settings, folder):
    "An unbroken run; seconds"
    start_time = time.monotonic()
    codes = together(words_of(method, settings, folder), SETTINGS[settings][0], None, f'{folder}.txt')
    if any(codes):
        raise SystemExit(f'{method}, {settings}: exit codes {codes}; see {folder}.txt')
    return time.monotonic() - start_time


def soak_one(method, settings, points, folder, whole):
    "Kill a run at its points, let it end, compare: a row of the record"
    world, log = SETTINGS[settings][0], f'{folder}.txt'
    words, kills, faults = words_of(method, settings, folder), [], []
    for point in points:
        codes = together(words, world, point, log)
        kills.append(point | dict(codes=codes))
        if codes[point['rank']] != -signal.SIGKILL:
            faults.append(f'not killed at {point}: exit codes {codes}')
            break
    codes = together(words, world, None, log)
    found, count = ([f'exit codes {codes}'], 0) if any(codes) else compare(folder, whole)
    return dict(method=method, settings=settings, kills=kills, faults=faults + found, tensors=count)


def stage_of(step):
    return 'burn-in' if step < BURN_IN else 'one-to-many' if step < T1 else 'one-to-one'


def table(rows):
    "Lines of a summary"
    out = [f'{"method":16s} {"settings":14s} {"kills":>5s} {"inside writes":>13s} {"tensors":>8s}  result']
    for row in rows:
        inside = sum(k['place'] in ('write', 'log', 'report') for k in row['kills'])
        result = 'equal' if not row['faults'] else f'DIFFERS: {"; ".join(row["faults"][:3])}'
        name = f'{row["method"]:16s} {row["settings"]:14s}'
        out.append(f'{name} {len(row["kills"]):5d} {inside:13d} {row["tensors"]:8d}  {result}')
    return out


def counts(rows):
    "Kills by method, place and stage"
    kills = [(row['method'], k['place'], stage_of(k['step'])) for row in rows for k in row['kills']]
    return [{name: names.count(name) for name in dict.fromkeys(names)} for names in zip(*kills)] or [{}] * 3


def soak(methods=(), kills=20, processes=0, seed=0, folder=None, say=print):
    "Rows of all runs: method, settings, kills, tensors, faults"
    chains = draw_chains(methods or list(METHODS), kills, processes, seed)
    home, rows = Path(folder or tempfile.mkdtemp(prefix='soak_')), []
    home.mkdir(parents=True, exist_ok=True)
    for n, (method, settings, points) in enumerate(chains):
        like = LIKE.get(settings, settings)
        whole = home / f'{method} {like}'
        if not (whole / 'run.json').exists():
            say(f'{n}/{len(chains)} runs: {method}, {like}, unbroken: {unbroken(method, like, whole):.1f} s')
        row = soak_one(method, settings, points, home / f'{method} {settings} {n}', whole)
        text = f'{len(row["kills"])} kills, {row["faults"] or "equal"}'
        say(f'{n + 1}/{len(chains)} runs: {method}, {settings}: {text}')
        rows.append(row)
    if folder is None and not any(row['faults'] for row in rows):
        shutil.rmtree(home)
    return rows


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--methods', nargs='+', choices=list(METHODS), default=[], help='default: all')
    p.add_argument('--kills', type=int, default=20, help='for each method')
    p.add_argument('--processes', type=int, choices=(1, 2), default=0, help='default: runs of both kinds')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--folder', type=Path, help='where the runs are kept; default: a temporary folder')
    p.add_argument('--out', type=Path, help=f'record; default: {RECORD.name}, if everything is run')
    args = p.parse_args(argv)
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    began = time.monotonic()
    say = functools.partial(print, flush=True)
    rows = soak(args.methods, args.kills, args.processes, args.seed, args.folder, say)
    print('\n'.join(table(rows)))
    by_method, by_place, by_stage = counts(rows)
    record = dict(
        **environment(),
        seed=args.seed,
        seconds=round(time.monotonic() - began),
        cpu_seconds=round(sum(os.times()[:4])),
        iterations=dict(all=ITERS, burn_in=BURN_IN, T1=T1, saved_every=SAVED),
        kills=sum(by_method.values()),
        by_method=by_method,
        by_place=by_place,
        by_stage=by_stage,
        equal=sum(not row['faults'] for row in rows),
        runs=rows,
    )
    out = args.out or (RECORD if not args.methods and not args.processes and args.kills >= 20 else None)
    if out:
        core.atomic_write(out, json.dumps(record, indent=1) + '\n')
    print(f'{record["kills"]} kills, {record["equal"]} of {len(rows)} runs equal, {record["seconds"]} s')
    return int(any(row['faults'] for row in rows))


if __name__ == '__main__':
    sys.exit(main())
