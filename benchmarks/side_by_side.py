"""Trainings side by side on one machine: a process for each of them, which waits at marks for the others.

`Side` is such a process as its parent sees it, `together` gives each one a job and answers their marks.
A mark is an iteration at which all trainings of a comparison are let go on, or end, together."""

import contextlib, gc, multiprocessing, os, signal, time, warnings
from multiprocessing import connection
import torch
from semidetr.lab.study import record
from semidetr.train.config import override
from semidetr.train.machine import prepare
from semidetr.train.trainer import Trainer

FOREVER = 10**6  # iterations of a training whose end is a time
WARM = 3  # iterations that a probe does not count: kernels are chosen, workers start


# --- in the process of a training ---------------------------------------------------------------------------
class TimeIsUp(Exception):
    "The training ends here"


class Watched(Trainer):
    "A training that calls `after(step)` after each iteration, and ends where that returns True"

    def __init__(self, cfg, folder, after):
        super().__init__(cfg, folder, progress=False)
        self.after, self.ended = after, False

    def count(self, *args, **kw):
        super().count(*args, **kw)
        if self.after(self.step):
            self.ended = True
            raise TimeIsUp

    def go(self):  # content of run.json; None if it was ended
        "`fit`, without the error that ends it"
        try:
            return self.fit()
        except BaseException:
            if not self.ended:
                raise


def wait_at(conn, step):  # bool: go on?
    "Tell the parent, and wait for its word"
    conn.send(('mark', step))
    return conn.recv()


def probe(conn, cfg, folder, seconds):  # dict(rate, steps, evaluation_s, dev, test)
    "Iterations per second while all others are measured too, and the seconds of an evaluation"
    times = []

    def after(step):
        if step == WARM:
            wait_at(conn, step)
        if step >= WARM:
            times.append(time.monotonic())
        return len(times) > 1 and times[-1] - times[0] >= seconds

    cfg = override(cfg, [f'optim.iters={FOREVER}', f'run.checkpoint_every={FOREVER}'])
    run = Watched(cfg, folder, after)
    run.go()
    sizes = {
        part: len(ds) if ds is not None else 0 for part, ds in (('dev', run.data.dev), ('test', run.data.val))
    }
    start = time.monotonic()
    if sizes['dev']:
        run.evaluate(run.data.dev, both=True)
    steps = len(times) - 1
    spent = time.monotonic() - start
    return dict(rate=steps / (times[-1] - times[0]), steps=steps, evaluation_s=spent, **sizes)


def train(conn, cfg, folder, every):  # dict: `record` of the run, and what it cost
    "Train to the end, or to the mark at which the parent ends it; then evaluate"
    waited = []

    def after(step):
        if step % every or step == cfg.optim.iters:
            return False
        start = time.monotonic()
        ends = not wait_at(conn, step)
        waited.append(time.monotonic() - start)
        return ends

    start = time.monotonic()
    run = Watched(cfg, folder, after)
    result = run.go()
    if result is None:
        run.save()
        result = run.report()
    cost = dict(waited_s=sum(waited), wall_s=time.monotonic() - start, peak_gpu_mb=None)
    if run.device.type == 'cuda':
        cost['peak_gpu_mb'] = round(torch.cuda.max_memory_allocated() / 2**20)
    return record(result, folder) | cost


def child(conn):
    "Do one job after the other until the parent is gone"
    with contextlib.suppress(OSError):
        os.setsid()  # its workers end with it
    warnings.simplefilter('ignore')
    prepare()
    jobs = dict(probe=probe, train=train)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            job = conn.recv()
            if job is None:
                return
            name, args = job
            try:
                answer = 'done', jobs[name](conn, **args)
            except (EOFError, BrokenPipeError, ConnectionResetError):
                return
            except Exception as e:
                text = f'{type(e).__name__}: {e}'.splitlines()[0]
                answer = 'failed', text
            conn.send(answer)
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()


# --- in the parent ------------------------------------------------------------------------------------------
def context():
    "Processes that share one import of torch, where the system can"
    if 'forkserver' not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context('spawn')
    made = multiprocessing.get_context('forkserver')
    made.set_forkserver_preload(['side_by_side'])
    return made


class Side:
    "One process; `conn` carries jobs there, marks and results back"

    def __init__(self, made=None):
        made = made or context()
        self.conn, theirs = made.Pipe()
        self.process = made.Process(target=child, args=(theirs,))
        self.process.start()
        theirs.close()

    def leave(self):
        "Ask it to end; one that trains hears nothing"
        with contextlib.suppress(OSError):
            self.conn.send(None)

    def stop(self, seconds=0.0):
        "End it and its workers, at once or after it had so much time to end by itself"
        self.process.join(seconds)
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(Exception):
            self.process.kill()
        self.process.join(5)
        self.conn.close()


def heard(side):  # (word, value)
    "The next message; a process that is gone has failed"
    try:
        if side.conn.poll():
            return side.conn.recv()
    except (EOFError, OSError):
        pass
    side.process.join(1)
    return 'failed', f'its process ended with exit code {side.process.exitcode}'


def together(
    sides,  # key -> Side
    jobs,  # key -> (name of the job, its arguments)
    group_of,  # key -> the comparison that a run belongs to
    decide,  # (group, step) -> do all of them go on?
    end,  # time.monotonic() after which what still runs is stopped
    ended,  # (key, 'done' | 'failed' | 'out of time', result or reason)
):
    "Run jobs at the same time; a run that fails leaves the others alone"
    busy, waiting = {k: sides[k] for k in jobs}, {}
    for key, job in jobs.items():
        with contextlib.suppress(OSError):
            busy[key].conn.send(job)
    while busy:
        left = end - time.monotonic()
        if left <= 0:
            for key, side in busy.items():
                side.stop()
                ended(key, 'out of time', 'stopped, no time was left')
            return
        by_handle = {}
        for key, side in busy.items():
            if key not in waiting:
                by_handle |= {side.conn: key, side.process.sentinel: key}
        ready = connection.wait(list(by_handle), timeout=min(left, 1.0))
        for key in dict.fromkeys(by_handle[handle] for handle in ready):
            word, value = heard(busy[key])
            if word == 'mark':
                waiting[key] = value
            else:
                del busy[key]
                ended(key, word, value)
        for group in dict.fromkeys(map(group_of, busy)):
            members = [k for k in busy if group_of(k) == group]
            if all(k in waiting for k in members):
                answer = decide(group, min(waiting.pop(k) for k in members))
                for k in members:
                    with contextlib.suppress(OSError):
                        busy[k].conn.send(answer)
