"""What a step of each remedy costs against a step of Semi-DETR, in alternation.

    python benchmarks/remedies.py runs/studies --out benchmarks/results/remedies.json
    python benchmarks/remedies.py runs/studies --arms distilled/distilled

The folder holds the finished burn-in of seed 0 of `components` (`semidetr ablate components`), from which all
start, so their pseudo labels are those of a trained teacher. The tiny rate keeps the weights as they are.
"""

import argparse, contextlib, itertools, json, os, tempfile
from pathlib import Path
from semidetr.core import atomic_write
from semidetr.lab.plan import plan
from semidetr.train.config import override
from semidetr.train.trainer import Trainer, make_loader
from semi import stepper
from timing import compare, interleave, machine

STUDIES = Path(__file__).parents[1] / 'nbs' / 'ablations' / 'studies.toml'
REFERENCE = 'components/shm_cqc_cpm'  # Semi-DETR as in the paper, in the stage that an arm begins with
DEFAULT = ['distilled/distilled']


def arm_config(name, folder):  # 'study/arm'; folder of the studies' runs
    "Settings of an arm, seed 0, with its burn-in in the folder"
    study, _, arm = name.partition('/')
    found = [r for r in plan(STUDIES, study, seeds=[0], out=folder) if r.arm == arm]
    if not found:
        raise SystemExit(f'{name}: no such arm in {STUDIES.name}')
    return found[0].cfg


def make_step(cfg, folder, batches):  # function, number of pseudo boxes of each call
    "A run whose step can be repeated, with batches made in advance"
    items = ['optim.lr=1e-7', 'run.threads=1', 'run.device=cpu', 'loader.num_workers=0']
    run = Trainer(override(cfg, items), folder, progress=False)
    stream = iter(make_loader(run.cfg, run.data, 0, False))
    with contextlib.closing(stream):
        made = list(itertools.islice(stream, batches))
    return stepper(run, made)


def measure(names, folder, rounds=15, batches=5):  # -> record
    "Steps of all arms and of the reference take turns, once in each stage of the reference"
    rows = []
    for stage, T1 in (('one-to-many', 10**6), ('one-to-one', 0)):
        with tempfile.TemporaryDirectory() as places:
            base = override(arm_config(REFERENCE, folder), [f'method.T1={T1}'])
            steps = {REFERENCE: make_step(base, f'{places}/base', batches)}
            for n, name in enumerate(names):
                steps[name] = make_step(arm_config(name, folder), f'{places}/{n}', batches)
            times = interleave({name: step for name, (step, _) in steps.items()}, rounds)
        spent = times.pop(REFERENCE)['all']
        for name, t in times.items():
            row = compare(spent, t['all'], name=name, quantity='cost of a step', stage=stage, threads=1)
            rows.append(row | dict(cost=[1 / v for v in reversed(row['ratio'])]))
    return rows


if __name__ == '__main__':
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument('folder', type=Path, help='runs of the studies, with components/seed0/burn_in')
    ask.add_argument('--arms', nargs='+', default=DEFAULT, help='study/arm')
    ask.add_argument('--rounds', type=int, default=15)
    ask.add_argument('--out', type=Path)
    args = ask.parse_args()
    load = os.getloadavg()[0]
    found = measure(args.arms, args.folder, args.rounds)
    for r in found:
        low, middle, high = r['cost']
        name, stage = r['name'], r['stage']
        print(f'{name}: {middle:.2f} of a {stage} step of Semi-DETR (quartiles {low:.2f} to {high:.2f})')
    if args.out:
        atomic_write(args.out, json.dumps(dict(machine=machine(), load=load, rows=found), indent=1) + '\n')
