"""Trainings of a length that only a GPU affords, side by side on one card: `make gpu-evidence`, or

    python benchmarks/gpu_evidence.py --data FOLDER         fod12 and txl_pbc, at most nine minutes
    python benchmarks/gpu_evidence.py --smoke --device cpu  generated scenes, a few iterations, on the CPU

FOLDER holds the data sets fod12 and txl_pbc; without the option SEMIDETR_DATA names it. A data set that is
not there is left out and named. Settings are those of the studies `fod12` and `txl_semi` of the book; only
the number of iterations is another one. All arms of a data set start from one burn-in and take the same
number of iterations, which follows from a measurement: a few seconds of all trainings at once. The result,
one JSON, is written again whenever a training ends. Needs the dependencies of the package, no network;
installs nothing. The exit code is 1 if a data set was left out, or a training failed or found no time."""

import argparse, contextlib, importlib.util, json, os, shutil, signal, sys, tempfile, time
from pathlib import Path
import gpu_check

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TOTAL = 540.0  # seconds
ENDING = 10.0  # of them, for stopping what still runs
MARGIN = 0.85  # of the measured rate that the plan relies on
BURN_SHARE = 0.25  # of the time that is left after the start, for the burn-in and its measurement
PROBE, SMOKE_PROBE = 8.0, 0.5  # seconds of a measurement
PROBE_SHARE = 0.4  # of the time that is left, after which a measurement that does not end is given up
MARKS = 20  # times that the arms of a comparison wait for each other
MOST, BURN_MOST = 5000, 1000  # iterations
# study of the book: its group
STUDIES = {'fod12': 'k5', 'txl_semi': 'p1'}
ARMS = ('supervised', 'mean_teacher', 'semi_detr')  # those of every such study; the bundle is added
BUNDLE = 'semi_detr_plus'
NEEDED = dict(
    torch='torch',
    torchvision='torchvision',
    numpy='numpy',
    scipy='scipy',
    PIL='pillow',
    pycocotools='pycocotools',
    safetensors='safetensors',
    tqdm='tqdm',
    sklearn='scikit-learn',
)
KEPT = ('hash', 'iterations', 'seconds', 'waited_s', 'wall_s', 'peak_gpu_mb', 'health')
COUNTS = ('labelled', 'unlabelled', 'dev', 'val')
CURVES = ('step', 'loss', 'pseudo_boxes')


# --- arithmetic of the time ---------------------------------------------------------------------------------
def schedule(rates, seconds, most, marks=MARKS):  # dict: what the plan is, and what it follows from
    "Iterations that all trainings of a comparison can take in a time, by the rate of the slowest"
    slowest = min(rates, key=rates.get)
    fit = int(MARGIN * rates[slowest] * max(0.0, seconds))
    wanted = max(1, min(most, fit))
    every = max(1, wanted // marks)
    return dict(
        rates=rates,
        slowest=slowest,
        seconds=seconds,
        margin=MARGIN,
        most=most,
        iterations=every * (wanted // every),
        every=every,
    )


def goes_on(now, started, step, every, end):  # bool
    "Does the way to the next mark end in time, at the pace so far?"
    return now + (now - started) / max(1, step) * every <= end


def reserve(probes):  # seconds
    "Time for the last evaluations, from those of the measurement, which read the development part alone"
    whole = [p['evaluation_s'] * (p['dev'] + p['test']) / max(1, p['dev']) for p in probes]
    return 1.3 * max(whole, default=0.0) + 2.0


def share(start, end, part):  # time.monotonic()
    "Where a part of the time between two moments ends"
    return start + part * (end - start)


# --- what is trained ----------------------------------------------------------------------------------------
def lengthened(cfg, iters):  # Config
    "The same run with another number of iterations: the stages keep their shares"
    from semidetr.train.config import override

    stage = round(cfg.method.T1 / cfg.optim.iters * iters)
    every = max(1, iters // 50)
    items = [f'optim.iters={iters}', f'method.T1={stage}', f'run.log_every={every}']
    return override(cfg, [*items, f'run.checkpoint_every={iters}'])


def runs_of(study, group, args, folder):  # {(study, group, seed, arm): (Config, folder, settings)}
    "Burn-in and arms of every seed, at the length of the study"
    from semidetr.core import ConfigError, suggest
    from semidetr.lab.study import branches, load_study
    from semidetr.semi.methods import SemiDETRPlus
    from semidetr.train.config import override

    s = load_study(ROOT / 'nbs/ablations/studies.toml', study, 'smoke' if args.smoke else '')
    if group not in s['groups']:
        raise ConfigError(f"study {study} has no group '{group}'; {suggest(group, s['groups'])}")
    if lost := [a for a in ARMS if a not in s['arms']]:
        raise ConfigError(f'study {study} has no arm {lost[0]}; choose one that has {", ".join(ARMS)}')
    workers = 0 if args.smoke else args.workers
    common = [f'run.amp={args.amp}', f'run.device={args.device}', 'run.threads=1', 'run.eval_every=0']
    common.append(f'loader.num_workers={workers}')
    if args.weights:
        common.append(f'detector.backbone.weights={args.weights}')
    base = override(s['groups'][group], common)
    arms = {name: s['arms'][name] for name in ARMS}
    arms[BUNDLE] = [*arms['semi_detr'], *SemiDETRPlus.items(override(base, arms['semi_detr']))]
    if args.control != 'none' and args.amp != 'off':
        arms[f'{args.control}_fp32'] = [*arms[args.control], 'run.amp=off']
    made = {}
    for seed in args.seeds:
        for arm, (cfg, place) in branches(
            base, s['burn_in'], arms, Path(folder) / study / group, seed
        ).items():
            own = s['burn_in'] if arm == 'burn_in' else arms[arm]
            made[study, group, seed, arm] = cfg, place, [*common, *own]
    return made


def key_text(key):
    return ' '.join([key[0], key[1], f'seed {key[2]}', key[3]]).replace('  ', ' ')


def missing_data(runs):  # str, '' if nothing is missing
    "Why the data of a study cannot be opened"
    from semidetr.lab.plan import open_all

    errors = open_all(next(iter(runs.values()))[0].data)[1]
    return errors[0] if errors else ''


def kept(result):  # dict
    "What the record keeps of a training: every AP, per class that of the teacher, and a thin curve"
    metrics = {}
    for part, networks in result['metrics'].items():
        metrics[part] = {
            who: {k: v for k, v in m.items() if k.startswith('AP')} for who, m in networks.items()
        }
        classes = networks['teacher'].get('per_class', {})
        metrics[part]['classes'] = {name: m['AP'] for name, m in classes.items()}
    curve = {k: v for k, v in result.get('curve', {}).items() if k in CURVES}
    images = {k: result['data'][k] for k in COUNTS}
    return {k: result[k] for k in KEPT} | dict(images=images, metrics=metrics, curve=curve)


# --- the kit ------------------------------------------------------------------------------------------------
class Kit:
    "Plan, processes and record of one call"

    def __init__(self, args, started):
        self.args, self.started = args, started
        self.end = started + args.seconds - min(ENDING, args.seconds / 10)
        self.runs, self.sides, self.rows, self.last = {}, {}, {}, started
        about = gpu_check.environment(args.device)
        self.record = dict(
            kit='gpu_evidence',
            device=args.device,
            smoke=args.smoke,
            ended=False,
            ok=False,
            seconds=0.0,
            limit_s=args.seconds,
            environment=about,
            settings=dict(
                studies=args.studies,
                seeds=args.seeds,
                amp=args.amp,
                control=args.control,
                workers=args.workers,
                weights=args.weights or 'as in the presets',
            ),
            left_out=[],
            plan={},
            wall_s={},
            runs=[],
        )

    def write(self):
        "The record as it is now, in one step"
        self.record['seconds'] = time.monotonic() - self.started
        self.record['runs'] = list(self.rows.values())
        self.record['ok'] = bool(self.rows) and all(r['state'] == 'done' for r in self.rows.values())
        out = self.args.out
        fresh = out.with_name(out.name + '.part')
        fresh.write_text(json.dumps(gpu_check.plain(self.record), indent=1) + '\n')
        os.replace(fresh, out)

    def phase(self, name):
        "One part of the work is over: its time"
        now = time.monotonic()
        self.record['wall_s'][name], self.last = now - self.last, now
        self.write()
        say(f'{name}: {self.record["wall_s"][name]:.0f} s')

    def keys(self, burn_in):
        "Runs of a kind that have not failed"
        mine = [k for k in self.runs if (k[3] == 'burn_in') == burn_in]
        started = {k[:3] for k, row in self.rows.items() if k[3] == 'burn_in' and row['state'] == 'done'}
        return [k for k in mine if self.rows[k]['state'] == 'planned' and (burn_in or k[:3] in started)]

    def ended(self, key, state, value):
        "Note how a training ended"
        row = self.rows[key]
        row['state'] = state
        if state == 'done':
            row |= kept(value)
            metrics = row['metrics'].get('val') or row['metrics'].get('dev') or {}
            text = f"{row['iterations']} iterations"
            text += f", AP {metrics['teacher']['AP']:.1f}" if metrics else ''
        else:
            row['reason'] = text = str(value)
        say(f'  {key_text(key)}: {state}, {text}')
        self.write()

    def measure(self, keys, seconds):  # {key: what `probe` returns}
        "All trainings at once, for a few seconds"
        from side_by_side import together

        found = {}

        def ended(key, state, value):
            if state == 'done':
                found[key] = value
            else:
                self.ended(key, state, value)

        jobs = {}
        for k in keys:
            cfg, folder, _ = self.runs[k]
            jobs[k] = 'probe', dict(cfg=cfg, folder=folder.with_name(f'{folder.name}.probe'), seconds=seconds)
        limit = share(time.monotonic(), self.end, PROBE_SHARE)
        together(self.sides, jobs, lambda k: '', lambda group, step: True, limit, ended)
        return found

    def train(self, keys, plans, end):
        "All trainings at once, to the number of iterations of their plans"
        from side_by_side import together

        started, ends = time.monotonic(), {}

        def decide(study, step):
            plan = plans[study]
            go = goes_on(time.monotonic(), started, step, plan['every'], end)
            if not go:
                ends[study] = step
                say(f'  {study}: the time ends at iteration {step} of {plan["iterations"]}')
            return go

        jobs = {}
        for k in keys:
            cfg, folder, _ = self.runs[k]
            plan = plans[k[0]]
            self.rows[k]['state'] = 'running'
            cfg = lengthened(cfg, plan['iterations'])
            jobs[k] = 'train', dict(cfg=cfg, folder=folder, every=plan['every'])
        self.write()
        together(self.sides, jobs, lambda k: k[0], decide, self.end, self.ended)
        for study, step in ends.items():
            plans[study]['ended_at'] = step

    def stage(self, burn_in, keys, end, most):
        "Measure, plan, train"
        name = 'burn-in' if burn_in else 'arms'
        probes = self.measure(keys, SMOKE_PROBE if self.args.smoke else PROBE)
        keys = [k for k in keys if k in probes]
        if not keys:
            return
        held = reserve(probes.values())
        seconds = end - held - time.monotonic()
        plans = {}
        for study in dict.fromkeys(k[0] for k in keys):
            rates = {f'seed {k[2]}, {k[3]}': probes[k]['rate'] for k in keys if k[0] == study}
            plans[study] = schedule(rates, seconds, most, 2 if self.args.smoke else MARKS)
            plans[study]['evaluation_s'] = held
            say(
                f"  {study}: {plans[study]['iterations']} iterations, for {seconds:.0f} s at "
                f"{min(rates.values()):.2f} iterations/s, of {len(keys)} trainings at once"
            )
        self.record['plan'][name] = plans
        self.phase(f'measure {name}')
        self.train(keys, plans, end - held)
        self.phase(name)

    def prepare(self):
        "Op, data and weights; a process for each arm"
        from side_by_side import Side, context

        args = self.args
        for study, group in args.studies.items():
            made = runs_of(study, group, args, args.runs)
            if why := missing_data(made):
                self.record['left_out'].append(f'{study}: {why}')
                say(f'left out: {study}: {why}')
            else:
                self.runs |= made
        if not self.runs:
            return
        for key, (cfg, _, settings) in self.runs.items():
            study, group, seed, arm = key
            about = dict(study=study, group=group, data=cfg.data.data, seed=seed, arm=arm, amp=cfg.run.amp)
            self.rows[key] = about | dict(method=cfg.method.name, settings=settings, state='planned')
        made = context()
        self.sides = {k: Side(made) for k in self.runs if k[3] != 'burn_in'}
        for k in self.runs:
            if k[3] == 'burn_in':
                self.sides[k] = self.sides[*k[:3], ARMS[0]]
        self.record['environment']['op'] = ready_op(args.device)
        check_weights(next(iter(self.runs.values()))[0])
        self.phase('start')

    def go(self):
        "All parts; the exit code"
        try:
            self.prepare()
            if self.runs:
                end = share(time.monotonic(), self.end, BURN_SHARE)
                self.stage(True, self.keys(True), end, self.args.burn_in)
                self.stage(False, self.keys(False), self.end, self.args.iterations)
                for k, row in self.rows.items():
                    if row['state'] == 'planned':
                        row |= dict(state='failed', reason='its burn-in failed')
                self.record['ended'] = True
        finally:
            processes = list({id(s): s for s in self.sides.values()}.values())
            for side in processes:
                side.leave()
            patience = time.monotonic() + 3.0
            for side in processes:
                side.stop(max(0.0, patience - time.monotonic()) if self.record['ended'] else 0.0)
            if 'start' in self.record['wall_s']:  # an earlier record stays where nothing was begun
                self.write()
        return 0 if self.record['ok'] and not self.record['left_out'] else 1


def ready_op(device):  # which implementation
    "Build the attention op once, before many processes ask for it"
    from semidetr.core import ConfigError
    from semidetr.detectors import build

    with contextlib.suppress(ConfigError):
        build.build_ops(device)
    return gpu_check.op_in_use(device)


def check_weights(cfg):
    "ConfigError if the weights of the backbone are not on this machine"
    from dataclasses import replace
    from semidetr.detectors.contract import build_detector

    build_detector(replace(cfg.detector, num_classes=2))


def say(text):
    print(text, flush=True)


def missing_packages():  # names as an installer knows them
    return [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]


def pairs(words):  # {study: group}
    "`fod12:k5` on the command line"
    return {study: group for study, _, group in (w.partition(':') for w in words)}


def options(argv=None):
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = ask.add_argument
    add('--data', type=Path, metavar='FOLDER', help='folder of the data sets; default: SEMIDETR_DATA')
    add('--device', choices=('auto', 'cuda', 'cpu'), default='auto')
    add(
        '--smoke',
        action='store_true',
        help='generated scenes, tiny networks, six iterations: seconds on a CPU',
    )
    default = [f'{k}:{v}' for k, v in STUDIES.items()]
    add('--studies', nargs='+', metavar='STUDY:GROUP', default=default, help=f'default: {" ".join(default)}')
    add('--seeds', nargs='+', type=int, default=[0], help='one set of trainings for each; default: 0')
    add('--amp', choices=('bf16', 'fp16', 'off'), default='bf16', help='precision of all arms; default: bf16')
    control = 'mean_teacher'
    add(
        '--control',
        choices=(*ARMS, 'none'),
        default=control,
        help=f'trained in float32 too; default: {control}',
    )
    add('--iterations', type=int, default=MOST, help=f'of an arm, at most; default: {MOST}')
    add('--burn-in', type=int, default=BURN_MOST, help=f'iterations of it, at most; default: {BURN_MOST}')
    add('--workers', type=int, default=1, help='processes that load images, for each training; default: 1')
    add('--weights', default='', help="of the backbone: a file, or 'none'; default: as the presets find them")
    add('--seconds', type=float, default=TOTAL, help=f'at most so many in all; default: {TOTAL:.0f}')
    add('--out', type=Path, help='default: benchmarks/results/gpu_evidence.json, or gpu_evidence_cpu.json')
    add('--runs', type=Path, help='folder that keeps the runs; default: a temporary one')
    return ask.parse_args(argv)


def settled(args):  # str: why it cannot be; '' and changed args if it can
    "Device, data, output"
    import torch

    has_gpu = torch.cuda.is_available()
    if not has_gpu and (args.device == 'cuda' or (args.device == 'auto' and not args.smoke)):
        return 'torch sees no GPU; --smoke --device cpu shows every part on the CPU'
    if args.device == 'auto':
        args.device = 'cuda' if has_gpu else 'cpu'
    if args.data:
        if not args.data.is_dir():
            return f'--data {args.data}: no such folder'
        os.environ['SEMIDETR_DATA'] = str(args.data.resolve())
    args.studies = pairs(args.studies)
    if args.smoke:
        args.studies = dict([next(iter(args.studies.items()))])
        args.iterations, args.burn_in = min(args.iterations, 6), min(args.burn_in, 6)
    name = 'gpu_evidence.json' if args.device == 'cuda' else 'gpu_evidence_cpu.json'
    args.out = args.out or HERE / 'results' / name
    args.out.parent.mkdir(parents=True, exist_ok=True)
    return ''


def main(argv=None):  # exit code
    started = time.monotonic()
    args = options(argv)
    for folder in (HERE, ROOT):
        sys.path.insert(0, str(folder))
    paths = [str(ROOT), str(HERE), os.environ.get('PYTHONPATH')]
    os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, paths))  # for the processes of the trainings
    if missing := missing_packages():
        print(f'gpu-evidence: missing packages: {" ".join(missing)}; install them first', file=sys.stderr)
        return 1
    from semidetr.core import SemiDETRError

    if why := settled(args):
        print(f'gpu-evidence: {why}', file=sys.stderr)
        return 1

    def stop(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    own = None if args.runs else tempfile.mkdtemp()
    args.runs = args.runs or Path(own)
    kit = Kit(args, started)
    try:
        code = kit.go()
    except SemiDETRError as e:
        print(f'gpu-evidence: {e}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f'gpu-evidence: stopped; what is done is in {args.out}', file=sys.stderr)
        return 130
    finally:
        if own:
            shutil.rmtree(own, ignore_errors=True)
    what = f'{kit.record["seconds"]:.0f} s, written to {args.out}' if kit.rows else 'nothing to train'
    say(f'gpu-evidence: {what}')
    return code


if __name__ == '__main__':
    sys.exit(main())
