"""semidetr's own training steps: what a teacher and unlabelled images cost, and what the native op saves a whole step."""

import contextlib, dataclasses, gc, itertools, os, subprocess, sys, tempfile, time
import torch
from semidetr.train.config import override, preset
from semidetr.semi.methods import METHODS, look
from semidetr.train.trainer import RunState, data_parts, train_step
from timing import compare, interleave

LABELLED, UNLABELLED = 4, 8  # images of a step with a teacher; the supervised step has as many, all labelled
BOXES = 3.5  # pseudo boxes an image, as many as the scenes have objects
DATA = {'digits': 'digits:n=200', 'small': 'digits:n=200,size=208'}
STAGES = {'one-to-many': 10**6, 'one-to-one': 0}  # the value of method.T1


def make_run(folder, name, method, stage='one-to-one', threads=1, batches=5):  # (RunState, batches)
    "A run of a preset on the built-in scenes, its batches made beforehand; the tiny rate keeps the weights where they are"
    n = (LABELLED + UNLABELLED, 0) if method == 'supervised' else (LABELLED, UNLABELLED)
    cfg = override(
        preset(name),
        [
            f'data.data={DATA[name]}',
            'data.count=20',
            'data.dev=4',
            f'method.name={method}',
            'method.burn_in_iters=0',
            f'method.T1={STAGES[stage]}',
            f'loader.n_labelled={n[0]}',
            f'loader.n_unlabelled={n[1]}',
            'loader.num_workers=0',
            'loader.ratio=fixed',
            'optim.lr=1e-7',
            f'run.threads={threads}',
            'run.device=cpu',
        ],
    )
    run = RunState(cfg, folder, progress=False)
    stream = iter(data_parts(run, False))
    with contextlib.closing(stream):
        made = list(itertools.islice(stream, batches))
    run.step = 300
    return run, made


def set_thresholds(run, batches):
    "An untrained teacher is sure of nothing: let pass as many boxes as there are objects, and six times as many up to the suppression"
    free = dataclasses.replace(run.cfg.pseudo, min_score=0.0, nms=None, top_k=10**4)
    parts = [b['weak'] for b in batches]
    scores = (
        torch.cat([d['scores'] for p in parts for d in look(run.teacher, p, free)])
        .sort(descending=True)
        .values
    )
    images = sum(len(p['targets']) for p in parts)
    floor = float(scores[min(len(scores) - 1, int(6 * BOXES * images))])
    pseudo = dataclasses.replace(run.cfg.pseudo, min_score=floor)
    kept = (
        torch.cat([d['scores'] for p in parts for d in look(run.teacher, p, pseudo)])
        .sort(descending=True)
        .values
    )
    run.cfg = dataclasses.replace(
        run.cfg,
        pseudo=dataclasses.replace(pseudo, threshold=float(kept[min(len(kept) - 1, int(BOXES * images))])),
    )


def stepper(run, batches):
    "A function that takes the next batch each time it is called"
    turn, seen = itertools.cycle(batches), []

    def step():
        seen.append(train_step(run, [next(turn)]).get('pseudo_boxes'))

    return step, seen


def method_rows(threads, quick, say):
    "Every method of the trainer against the supervised step of as many images"
    rows = []
    for stage in list(STAGES)[quick:]:
        with tempfile.TemporaryDirectory() as folder:
            jobs, seen = {}, {}
            for method in METHODS:
                run, batches = make_run(f'{folder}/{method}', 'digits', method, stage, threads)
                if method != 'supervised':
                    set_thresholds(run, batches)
                jobs[method], seen[method] = stepper(run, batches)
            t = interleave(jobs, 3 if quick else 15)
        for m in METHODS:
            if m == 'supervised':
                continue
            boxes = sum(seen[m]) / len(seen[m]) if seen[m][0] is not None else None
            r = compare(
                t['supervised']['all'],
                t[m]['all'],
                name=m,
                quantity='cost of a step',
                case='digits',
                stage=stage,
                threads=threads,
                pseudo_boxes=boxes,
            )
            rows.append(r | dict(cost=[1 / v for v in reversed(r['ratio'])]))
        say(
            f'semi {stage}: '
            + ', '.join(
                f"{r['name']} costs {r['cost'][1]:.2f} supervised steps ({r['theirs_ms']:.0f} -> {r['ours_ms']:.0f} ms, {r['pseudo_boxes'] or 0:.1f} boxes)"
                for r in rows
                if r['stage'] == stage
            )
        )
    return rows


# --- plain PyTorch against the native op: in processes of their own, which take turns -----------------------
class Worker:
    "A process that makes a step when it is asked to"

    def __init__(self, name, ops, threads):
        self.process = subprocess.Popen(
            [sys.executable, __file__, name, str(threads)],
            env={**os.environ, 'SEMIDETR_OPS': ops},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self):
        self.process.stdin.write('step\n')
        self.process.stdin.flush()
        return dict(step=float(self.process.stdout.readline()))

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def serve(name, threads):
    "The child's part"
    with tempfile.TemporaryDirectory() as folder:
        step, _ = stepper(*make_run(folder, name, 'supervised', threads=threads))
        gc.collect()
        gc.disable()
        for _ in sys.stdin:
            start = time.perf_counter()
            step()
            print(time.perf_counter() - start, flush=True)


def op_rows(threads, quick, say):
    "The supervised step of two presets with and without the native op"
    rows = []
    for name in ['digits'] if quick else DATA:
        with contextlib.ExitStack() as stack:
            workers = {
                ops: stack.enter_context(contextlib.closing(Worker(name, ops, threads)))
                for ops in ('torch', 'native')
            }
            t = interleave({ops: w.ask for ops, w in workers.items()}, 3 if quick else 15)
        rows.append(
            compare(
                t['torch']['step'],
                t['native']['step'],
                name='native op',
                quantity='training step',
                case=name,
                threads=threads,
            )
        )
        say(
            f"semi {name}: native op {rows[-1]['ratio'][1]:.2f}x ({rows[-1]['theirs_ms']:.0f} -> {rows[-1]['ours_ms']:.0f} ms)"
        )
    return rows


def run(threads, quick, say):
    return dict(rows=method_rows(threads, quick, say) + op_rows(threads, quick, say))


if __name__ == '__main__':
    serve(sys.argv[1], int(sys.argv[2]))
