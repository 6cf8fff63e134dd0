"A run that ends before its end: signals to a process or a group, errors anywhere; nothing finished is lost."

import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from test_trainer import T, run, same, tiny
from together import run_together
from semidetr.core import DataError, SemiDETRError
from semidetr.data.loader import WorkerLost
from semidetr.train import api
from semidetr.train.checkpoint import load_checkpoint, read_seal
from semidetr.train.lock import LOCK, this_process
from semidetr.train.stop import RESUME, Stop, ended_by, is_out_of_memory

TESTS = str(Path(__file__).parent)
CFG = ('run.test=false', 'run.log_every=1', 'run.checkpoint_every=100')


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs') / 'whole'
    run(tiny(*CFG), folder)
    return folder


def fail(trainer, step, error, where='step'):
    "Raise an error in an iteration: after the forward pass, before the update, or while it is made"
    if where == 'step':
        real = trainer.method.step

        def broken(*args):
            result = real(*args)
            if trainer.step == step:
                raise error
            return result

        trainer.method.step = broken
    else:
        real = trainer.optimizer.step if where == 'update' else trainer.scalars_of

        def broken(*args, **kwargs):
            if trainer.step == step:
                if where == 'update':
                    trainer.snapshot.phase = 'moving'
                raise error
            return real(*args, **kwargs)

        setattr(*((trainer.optimizer, 'step') if where == 'update' else (trainer, 'scalars_of')), broken)


ERRORS = dict(
    image=(DataError('photos/7.jpg: image 7 cannot be read; restore the file'), DataError, 'step'),
    memory=(MemoryError(), SemiDETRError, 'scalars'),
    worker=(WorkerLost('DataLoader worker (pid(s) 7) exited unexpectedly'), WorkerLost, 'step'),
    bug=(ZeroDivisionError('division by zero'), ZeroDivisionError, 'scalars'),
    ctrl_c=(KeyboardInterrupt(), KeyboardInterrupt, 'step'),
)


@pytest.mark.parametrize('kind', ERRORS)
def test_any_error_saves_the_last_finished_iteration(whole, tmp_path, kind):
    "In the burn-in (1) or after it (4); the rest of the run is that of an unbroken one"
    error, shown, where = ERRORS[kind]
    step = 1 if kind == 'image' else 4
    t = T.Trainer(tiny(*CFG), tmp_path, progress=False)
    fail(t, step, error, where)
    with pytest.raises(shown) as e:
        t.fit()
    said = ' '.join([str(e.value), *getattr(e.value, '__notes__', [])])
    assert f'after iteration {step}' in said and RESUME in said and '\n' not in said
    assert load_checkpoint(tmp_path)['step'] == step and not (tmp_path / LOCK).exists()
    torch.manual_seed(99)
    run(tiny(*CFG), tmp_path)
    assert same(load_checkpoint(tmp_path), load_checkpoint(whole))
    assert (tmp_path / 'log.jsonl').read_text() == (whole / 'log.jsonl').read_text()


def test_an_interrupted_update_is_not_saved(tmp_path):
    "Half of the weights may have moved: the checkpoint before counts, and the message says so"
    t = T.Trainer(tiny(*CFG, 'run.checkpoint_every=2'), tmp_path, progress=False)
    fail(t, 3, MemoryError(), 'update')
    with pytest.raises(SemiDETRError, match='saved after iteration 2.*iteration 3 could not be saved'):
        t.fit()
    assert load_checkpoint(tmp_path)['step'] == 2


def test_a_method_with_a_projector_and_a_memory_goes_back(tmp_path):
    "Running statistics and cost memory of semi_detr are those before the unfinished iteration"
    t = T.Trainer(tiny(*CFG, method='semi_detr'), tmp_path, progress=False)
    t.fit(until=3)
    t = T.Trainer(tiny(*CFG, method='semi_detr'), tmp_path, progress=False)
    before = {k: v.clone() for k, v in t.method.state_dict().items() if isinstance(v, torch.Tensor)}
    nets = [x.clone() for n in (t.student, t.teacher) for x in n.state_dict().values()]
    fail(t, 3, RuntimeError('a bug'), 'scalars')
    with pytest.raises(RuntimeError, match='a bug'):
        t.fit()
    after = t.method.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert all(map(torch.equal, nets, [x for n in (t.student, t.teacher) for x in n.state_dict().values()]))


def test_a_folder_in_which_a_step_was_taken_stays_even_if_nothing_could_be_saved(tmp_path, monkeypatch):
    out = tmp_path / 'r'
    full = OSError(28, 'No space left on device', str(out / 'last.pt'))

    def no_room(*args, **kwargs):
        raise full

    monkeypatch.setattr('semidetr.train.generations.save_checkpoint', no_room)
    with pytest.raises(DataError, match='No space left.*make room.*iteration 6 could not be saved'):
        api.run_plan(api.Plan(tiny(*CFG), []), out, False)
    assert (out / 'log.jsonl').is_file()


def test_a_run_that_never_took_a_step_leaves_no_folder(tmp_path):
    with pytest.raises(SemiDETRError):
        api.run_plan(api.Plan(tiny(*CFG, 'data.dev=40'), []), tmp_path / 'r', False)
    assert not (tmp_path / 'r').exists()


# --- messages -------------------------------------------------------------------------
class At:
    step, saved, dir = 12, 12, 'runs/a'


def test_cures_are_those_after_which_the_same_command_goes_on():
    line = str(ended_by(MemoryError(), At, Stop()))
    first, other = line.split('; smaller')
    assert 'loader.num_workers=0' in first and RESUME in first and 'another folder' in other
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert not is_out_of_memory(RuntimeError('shapes'))


def test_a_worker_lost_while_a_stop_is_pending_counts_as_a_stop():
    stop = Stop()
    assert isinstance(ended_by(WorkerLost('x'), At, stop), WorkerLost)
    stop.note(signal.SIGTERM)
    assert isinstance(ended_by(WorkerLost('x'), At, stop), KeyboardInterrupt)


def test_repeated_signals_are_one_wish_and_a_late_ctrl_c_ends_at_once():
    stop = Stop()
    for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        stop.note(sig)
    stop.since -= 5
    stop.note(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        stop.note(signal.SIGINT)


def test_while_networks_are_evaluated_the_first_signal_ends_it(whole, tmp_path):
    "The iteration before is saved, and the metrics that are due are measured when the run goes on"
    cfg = tiny(*CFG, 'run.eval_every=3')
    t = T.Trainer(cfg, tmp_path, progress=False)
    real, calls = T.evaluate_model, []

    def signalled(*args, **kwargs):
        calls.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    T.evaluate_model = signalled
    try:
        with pytest.raises(KeyboardInterrupt, match='stopped after iteration 3'):
            t.fit()
    finally:
        T.evaluate_model = real
    assert len(calls) == 1 and load_checkpoint(tmp_path)['step'] == 3
    again = T.Trainer(cfg, tmp_path, progress=False)
    again.fit()
    assert [h['step'] for h in again.history] == [3, 6]
    assert same(load_checkpoint(tmp_path), load_checkpoint(whole))


def test_a_kill_while_networks_are_evaluated_loses_nothing(whole, tmp_path):
    "What lies on the disk at that moment goes on to the same weights, log and history"
    cfg, real = tiny(*CFG, 'run.eval_every=3'), T.evaluate_model

    def killed(*args, **kwargs):
        if not (tmp_path / 'killed').exists():
            shutil.copytree(tmp_path / 'r', tmp_path / 'killed')
            (tmp_path / 'killed' / LOCK).unlink()
        return real(*args, **kwargs)

    T.evaluate_model = killed
    try:
        run(cfg, tmp_path / 'r')
    finally:
        T.evaluate_model = real
    assert load_checkpoint(tmp_path / 'killed')['step'] == 3
    run(cfg, tmp_path / 'killed')
    a, b = (load_checkpoint(tmp_path / name) for name in ('r', 'killed'))
    assert same(a, b) and same(a, load_checkpoint(whole)) and repr(a['history']) == repr(b['history'])
    assert (tmp_path / 'r' / 'log.jsonl').read_text() == (tmp_path / 'killed' / 'log.jsonl').read_text()


TOGETHER = """
import os, signal, torch
from semidetr.core import start_processes
from semidetr.train.checkpoint import load_checkpoint
from test_stop import CFG, T, tiny
start_processes()
real, found = T.evaluate_model, []
def seen(*args, **kwargs):
    found.append(load_checkpoint(sys.argv[1])['step'] if T.is_main() else 0)
    return real(*args, **kwargs)
T.evaluate_model = seen
cfg = tiny(*CFG, 'optim.iters=4', 'run.eval_every=2', method='supervised')
def begun(): return T.Trainer(cfg, sys.argv[1], False)
t = begun()
step = t.method.step
def signalled(*args):
    if T.rank() == 1 and args[-1] == 1: os.kill(os.getpid(), signal.SIGTERM)
    return step(*args)
t.method.step = signalled
try: t.fit()
except KeyboardInterrupt as e: said = str(e)
assert said.startswith('stopped after iteration 2') and not found, (said, found)
begun().fit()
if T.is_main(): torch.save(found, sys.argv[1] + '/found')
"""


def test_two_processes_save_before_they_evaluate_and_leave_it_when_one_is_asked_to_end(tmp_path):
    "Teacher and student after 2 and 4 iterations, in the second session; the first one ends without waiting"
    run_together(TOGETHER, tmp_path / 'r')
    assert torch.load(tmp_path / 'r' / 'found') == [2, 2, 4, 4]
    assert [h['step'] for h in load_checkpoint(tmp_path / 'r')['history']] == [2, 4]


def test_two_runs_in_one_folder(tmp_path):
    "The second is refused in one line, before and after it has read the folder"
    first = T.Trainer(tiny(*CFG), tmp_path, progress=False)
    late = T.Trainer(tiny(*CFG), tmp_path, progress=False)
    first.fit(until=2)
    with pytest.raises(DataError, match='has trained here meanwhile; repeat the command'):
        late.fit()
    (tmp_path / LOCK).write_text(json.dumps(this_process()))
    with pytest.raises(DataError, match='trains in this folder'):
        T.Trainer(tiny(*CFG), tmp_path, progress=False)
    assert load_checkpoint(tmp_path)['step'] == 2


# --- whole processes ------------------------------------------------------------------
TRAIN = """
import sys
sys.path.insert(0, {tests!r})
from test_stop import CFG, T, tiny
from semidetr.cli import terminal
@terminal.command()
def go(): T.Trainer(tiny(*CFG, 'optim.iters=4000', 'loader.num_workers=2'), sys.argv[1], False).fit()
@terminal.command()
def noop(): pass
terminal.main(['go'])
"""


def children(pid):
    return [int(x) for x in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]


@pytest.fixture
def running(tmp_path):
    "A run with two workers in a process group of its own, after its burn-in, which has workers of its own"
    (tmp_path / 'go.py').write_text(TRAIN.format(tests=TESTS))
    out = tmp_path / 'r'
    p = subprocess.Popen(
        [sys.executable, str(tmp_path / 'go.py'), str(out)],
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    end, log = time.time() + 300, out / 'log.jsonl'
    while not (log.exists() and log.read_text().count('\n') >= 4):
        assert p.poll() is None and time.time() < end, p.communicate()[1]
        time.sleep(0.1)
    yield p, out
    if p.poll() is None:
        os.killpg(p.pid, signal.SIGKILL)
        p.wait()


linux = pytest.mark.skipif(not hasattr(signal, 'sigtimedwait'), reason='the system has no sigtimedwait')


@linux
def test_sigterm_to_the_whole_group(running):
    "As `timeout`, torchrun and schedulers send it: saved, one line, exit code 130"
    p, out = running
    os.killpg(p.pid, signal.SIGTERM)
    err = p.communicate(timeout=120)[1]
    step = load_checkpoint(out)['step']
    assert p.returncode == 130 and step >= 2
    assert err.strip().splitlines()[-1] == f'stopped after iteration {step}; {RESUME}'
    assert 'Traceback' not in err and not (out / LOCK).exists()


@linux
def test_a_killed_worker_is_one_line_and_workers_end_with_a_killed_run(running):
    p, out = running
    workers = children(p.pid)
    assert len(workers) >= 2
    os.kill(workers[0], signal.SIGKILL)
    err = p.communicate(timeout=120)[1]
    step = load_checkpoint(out)['step']
    line = err.strip().splitlines()[-1]
    assert p.returncode == 2 and 'loader.num_workers=0' in line and f'after iteration {step}' in line, err
    end = time.time() + 30
    while any(Path(f'/proc/{w}').exists() for w in workers):
        assert time.time() < end, 'a worker outlives its run'
        time.sleep(0.2)


FAILER = """
import os, sys
sys.path.insert(0, {tests!r})
from test_stop import CFG, DataError, T, fail, tiny
t = T.Trainer(tiny(*CFG, 'optim.iters=6', method='supervised'), sys.argv[1], progress=False)
if os.environ['RANK'] == sys.argv[2]: fail(t, 3, DataError('photos/7.jpg: image 7 cannot be read'))
try: t.fit()
except Exception as e: open(sys.argv[1] + '/said' + os.environ['RANK'], 'w').write(str(e)); sys.exit(1)
"""


@pytest.mark.parametrize('rank', [0, 1])
def test_a_failure_of_one_process_saves_one_step_of_both(tmp_path, rank):
    (tmp_path / 'w.py').write_text(FAILER.format(tests=TESTS))
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    words = [str(tmp_path / 'w.py'), str(tmp_path / 'r'), str(rank)]
    done = subprocess.run([*launcher, *words], env=env, capture_output=True, text=True, timeout=400)
    saved = load_checkpoint(tmp_path / 'r')
    assert done.returncode and saved['step'] == 3, done.stderr[-2000:]
    part = tmp_path / 'r' / 'last.rank1.pt'
    assert saved['ranks'] == [read_seal(part)] and load_checkpoint(part)['step'] == 3
    assert 'image 7' in (tmp_path / 'r' / f'said{rank}').read_text()


def test_images_that_were_skipped_count_in_the_next_session(tmp_path):
    "Two broken images, one in each session: a bound of one ends the second, one of two does not"
    from PIL import Image

    photos = tmp_path / 'photos'
    photos.mkdir()
    for i in range(2):
        Image.effect_noise((40, 40), 60).convert('RGB').save(photos / f'{i}.png')

    def begun(most):
        items = f'data.unlabelled={photos}', 'data.count=36', 'data.dev=4', f'data.skip_broken={most}'
        return T.Trainer(tiny(*CFG, *items), tmp_path / 'r', progress=False)

    first = begun(1)
    first.data.unlabelled.broken = [0]
    first.fit(until=3)
    (photos / '1.png').write_bytes(b'')
    again = begun(1)
    assert again.data.unlabelled.broken == [0]
    with pytest.raises(DataError, match='1.png.*more than data.skip_broken=1'):
        again.fit()
    more = begun(2)
    more.fit()
    assert more.data.unlabelled.broken == load_checkpoint(tmp_path / 'r')['broken'] == [0, 1]
    state = load_checkpoint(tmp_path / 'r') | dict(broken=[2])
    assert "'broken' holds something else" in more._taken(state, None, 'last.pt')


def test_a_broken_image_is_skipped_and_counted_over_all_workers(tmp_path):
    from PIL import Image
    from semidetr.data.datasets import Unlabelled
    from semidetr.data.catalog import open_dataset, open_further
    from semidetr.data.loader import SemiLoader
    from semidetr.train.config import Config, config_hash, override
    from semidetr.train.run_data import SkipBroken

    for i in range(8):
        Image.effect_noise((40, 40), 60).convert('RGB').save(tmp_path / f'{i}.png')
    pool = SkipBroken(Unlabelled(open_further(str(tmp_path), 'train')), 2)
    for i in (1, 5):
        (tmp_path / f'{i}.png').write_bytes(b'')
    digits = open_dataset('digits:n=8,size=64')
    view = tiny().view
    with SemiLoader(digits, pool, 1, 2, view, num_workers=2) as loader:
        for _ in range(8):
            next(loader)
    assert pool.broken == [1, 5]
    (tmp_path / '2.png').write_bytes(b'')
    with SemiLoader(digits, pool, 1, 2, view, num_workers=2) as loader:
        with pytest.raises(DataError, match='2.png.*more than data.skip_broken=2'):
            for _ in range(8):
                next(loader)
    assert len({config_hash(override(Config(), [f'data.skip_broken={n}'])) for n in (0, 1, 10)}) == 1
