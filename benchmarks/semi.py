"""semidetr's own training steps: the cost of a teacher and unlabelled images, the gain of the native op."""

import contextlib, dataclasses, gc, itertools, os, subprocess, sys, tempfile, time
import torch
from semidetr.semi.methods import METHODS
from semidetr.semi.teacher import ema_decay, teacher_detections, update_teacher
from semidetr.train.config import override, preset
from semidetr.train.optim import lr_factor
from semidetr.train.trainer import Trainer, clip_and_step, make_loader, total_loss
from timing import compare, interleave

LABELLED, UNLABELLED = 4, 8  # images of a step with a teacher; the supervised step has as many, all labelled
BOXES = 3.5  # pseudo boxes per image, as many as the scenes have objects
DATA = {'digits': 'digits:n=200', 'small': 'digits:n=200,size=208'}
STAGES = {'one-to-many': 10**6, 'one-to-one': 0}  # the value of method.T1


def make_run(folder, name, method, stage='one-to-one', threads=1, batches=5):  # (Trainer, batches)
    "A run of a preset on the built-in scenes, with batches made in advance; the tiny rate keeps the weights"
    n = (LABELLED + UNLABELLED, 0) if method == 'supervised' else (LABELLED, UNLABELLED)
    settings = f'''
        data.data={DATA[name]} data.count=20 data.dev=4
        method.name={method} method.burn_in_iters=0 method.T1={STAGES[stage]}
        loader.n_labelled={n[0]} loader.n_unlabelled={n[1]} loader.num_workers=0 loader.ratio=fixed
        optim.lr=1e-7 run.threads={threads} run.device=cpu
    '''
    cfg = override(preset(name), settings.split())
    run = Trainer(cfg, folder, progress=False)
    stream = iter(make_loader(run.cfg, run.data, 0, False))
    with contextlib.closing(stream):
        made = list(itertools.islice(stream, batches))
    run.step = 300
    return run, made


@torch.no_grad()
def teacher_scores(run, batches, pseudo):  # (K,) descending
    "Scores of the teacher's detections on the weak views"
    scores = []
    for part in (b['weak'] for b in batches):
        outputs = run.teacher(part['images'], part['mask'])
        scores += [d['scores'] for d in teacher_detections(outputs, part['targets'], pseudo)]
    return torch.cat(scores).sort(descending=True).values


def set_thresholds(run, batches):
    """Thresholds for an untrained teacher, whose scores are all low

    As many boxes as there are objects pass, and six times as many reach the suppression."""
    images = sum(len(b['weak']['targets']) for b in batches)
    free = dataclasses.replace(run.cfg.pseudo, min_score=0.0, nms=None, top_k=10**4)
    scores = teacher_scores(run, batches, free)
    floor = float(scores[min(len(scores) - 1, int(6 * BOXES * images))])
    pseudo = dataclasses.replace(run.cfg.pseudo, min_score=floor)
    kept = teacher_scores(run, batches, pseudo)
    threshold = float(kept[min(len(kept) - 1, int(BOXES * images))])
    run.method.cfg = dataclasses.replace(run.cfg, pseudo=dataclasses.replace(pseudo, threshold=threshold))


def train_step(run, batch):  # scalars of the method
    "One iteration as `Trainer.fit` has it"
    update_teacher(run.teacher, run.student, ema_decay(run.step, run.cfg.ema))
    run.student.train()
    with run.autocast():
        result = run.method.step(run.student, run.teacher, batch, run.step)
    loss = total_loss(result.losses)
    run.scaler.scale(loss).backward()
    run.scalars_of(result, loss)
    clip_and_step(run.optimizer, run.scaler, run.cfg.optim.clip, lr_factor(run.step, run.cfg.optim))
    return result.scalars


def stepper(run, batches):  # (function, pseudo boxes per image of each call)
    "A function that takes the next batch each time it is called"
    turn, pseudo_boxes = itertools.cycle(batches), []

    def step():
        pseudo_boxes.append(train_step(run, next(turn)).get('pseudo_boxes'))

    return step, pseudo_boxes


def method_rows(threads, quick, say):
    "Every method of the trainer against the supervised step of as many images"
    rows = []
    for stage in list(STAGES)[quick:]:
        with tempfile.TemporaryDirectory() as folder:
            jobs, counts = {}, {}
            for method in METHODS:
                run, batches = make_run(f'{folder}/{method}', 'digits', method, stage, threads)
                if method != 'supervised':
                    set_thresholds(run, batches)
                jobs[method], counts[method] = stepper(run, batches)
            t = interleave(jobs, 3 if quick else 15)
        texts, base = [], t.pop('supervised')['all']
        for m, times in t.items():
            boxes = sum(counts[m]) / len(counts[m]) if counts[m][0] is not None else None
            what = dict(name=m, quantity='cost of a step', case='digits', stage=stage, threads=threads)
            r = compare(base, times['all'], **what, pseudo_boxes=boxes)
            r['cost'] = [1 / v for v in reversed(r['ratio'])]
            rows.append(r)
            spent = f"{r['theirs_ms']:.0f} -> {r['ours_ms']:.0f} ms, {boxes or 0:.1f} boxes"
            texts.append(f"{m} costs {r['cost'][1]:.2f} supervised steps ({spent})")
        say(f'semi {stage}: {", ".join(texts)}')
    return rows


# --- plain PyTorch against the native op: in processes of their own, which take turns -----------------------
class Worker:
    "A process that takes one training step per call"

    def __init__(self, name, ops, threads):
        command, env = [sys.executable, __file__, name, str(threads)], {**os.environ, 'SEMIDETR_OPS': ops}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.process = subprocess.Popen(command, env=env, text=True, **pipes)

    def step(self):
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
            jobs = {}
            for ops in ('torch', 'native'):
                jobs[ops] = stack.enter_context(contextlib.closing(Worker(name, ops, threads))).step
            t = interleave(jobs, 3 if quick else 15)
        what = dict(name='native op', quantity='training step', case=name, threads=threads)
        r = compare(t['torch']['step'], t['native']['step'], **what)
        rows.append(r)
        times = f"{r['theirs_ms']:.0f} -> {r['ours_ms']:.0f} ms"
        say(f"semi {name}: native op {r['ratio'][1]:.2f}x ({times})")
    return rows


def run(threads, quick, say):
    return dict(rows=method_rows(threads, quick, say) + op_rows(threads, quick, say))


if __name__ == '__main__':
    serve(sys.argv[1], int(sys.argv[2]))
