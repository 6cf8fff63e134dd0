"Steps that are not finite: the file that they leave repeats them; a run stops, leaves them out or goes back."

import dataclasses, functools, json, math, random, warnings
from types import SimpleNamespace
import numpy as np
import pytest, torch
from rivals import PARTNER, WEIGHTS, whole_of
from test_every_detector import small
from test_many import STAGES, share, whole
from test_trainer import T, same, tiny
from together import run_together
from semidetr.cli.commands import main
from semidetr.core import rank
from semidetr.detectors.from_detr import DETECTORS
from semidetr.matching.matching import NonFiniteError
from semidetr.semi.methods import METHODS
from semidetr.train.capsule import MOST_BACK, Tape
from semidetr.train.checkpoint import load_checkpoint, save_checkpoint
from semidetr.train.config import Config, config_hash, override
from semidetr.train.replay import KINDS, Watch, load_capsule, replay
from semidetr.train.step import clip_and_step

NAN, HUGE = math.nan, 1e39  # the second is infinite in float32


class Quiet:
    "In the place of log and bar"

    log = SimpleNamespace(write=lambda row: None)

    def show(self, run, scalars):
        pass


def failed(run, batches):
    "The file that one iteration leaves"
    with warnings.catch_warnings(), pytest.raises(NonFiniteError, match='semidetr replay'):
        warnings.simplefilter('ignore')
        run.iterate(batches, Quiet())
    return run.dir / f'failed_step_{run.step}.pt'


@functools.cache
def prepared(name, stage, folder):
    "A run of a method in a stage, and its first batch"
    cfg = share(whole_of(name, f'method.T1={STAGES[stage]}', 'data.dev=0'), 2)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        run = T.Trainer(cfg, folder / f'{name} {stage}', progress=False)
    return run, next(run.batches())


def with_nan(batches, part):
    "The same with NaN in the second image of a part"
    images = batches[0][part]['images'].clone()
    images[1, 0, 5, 5] = NAN
    return [batches[0] | {part: batches[0][part] | dict(images=images)}]


def huge_weight(run):
    "Settings with a loss weight that is infinite in float32"
    c = run.cfg
    if c.method.needs_unlabelled:
        return dataclasses.replace(c, method=dataclasses.replace(c.method, unsup_weight=HUGE))
    return dataclasses.replace(c, criterion=dataclasses.replace(c.criterion, loss_l1=HUGE))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('runs')


CASES = [(name, stage) for name in METHODS for stage in STAGES if stage == 'o2m' or name not in PARTNER]


@pytest.mark.parametrize('name,stage', CASES)
def test_nan_in_an_image(name, stage, folder):
    "Of each part that a network sees: the replay names the network and the image"
    run, batches = prepared(name, stage, folder)
    for part in run.method.views:
        found = replay(failed(run, with_nan(batches, part)))
        assert found.equal and found.replayed and (part == 'weak') == ('weak view' in found.replayed)
        assert found.layer.startswith('student.backbone.') or (part == 'weak' and not found.layer)
        assert found.images == [batches[0][part]['targets'][1]['image_id']] and not found.weight
        assert bool(found.rows) == (found.term.startswith('loss'))


@pytest.mark.parametrize('name,stage', CASES)
def test_nan_in_a_weight(name, stage, folder):
    "The replay names the weight and its layer; the state is that before the step"
    run, batches = prepared(name, stage, folder)
    weight = WEIGHTS.get(name, 'transformer.decoder.layers.1.linear1.weight')
    old = run.student.get_parameter(weight).data[3, 2].clone()
    run.student.get_parameter(weight).data[3, 2] = NAN
    try:
        path = failed(run, batches)
    finally:
        run.student.get_parameter(weight).data[3, 2] = old
    saved = load_capsule(path)
    assert saved['teacher'][weight].isfinite().all(), 'the teacher moved before the state was kept'
    found = replay(path)
    assert found.equal and found.weight == f'student.{weight}'
    assert found.layer == f'student.{weight.removesuffix(".weight")}'
    rows_are_regions = name == 'soft_teacher'  # no hint at single images
    parts = batches[0].values() if rows_are_regions else [batches[0]['labelled']]
    assert set(found.images) <= {t['image_id'] for part in parts for t in part['targets']}


@pytest.mark.parametrize('name,stage', CASES)
def test_infinite_loss_weight(name, stage, folder):
    "Every loss is repeated bit for bit; no layer is blamed; random states are left as they are"
    run, batches = prepared(name, stage, folder)
    usual = run.cfg
    run.cfg = run.method.cfg = huge_weight(run)
    try:
        path = failed(run, batches)
    finally:
        run.cfg = run.method.cfg = usual
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    found = replay(path)
    assert torch.equal(states[0], torch.get_rng_state()) and states[2] == random.getstate()
    assert states[1] == np.random.get_state()[1].tolist()
    assert found.equal and found.layer == found.weight == found.gradient == ''
    assert found.term == next(k for _, k, a, _ in found.rows if not math.isfinite(a))
    assert len(found.rows) > 5 and sum(math.isfinite(a) for *_, a, _ in found.rows) > 3


VARIANTS = {  # what a step reads besides: earlier views, annotations of all labelled images, or a precision
    'mixing': (4, ['mixing.mixup=1', 'mixing.mosaic=1', 'view.erase_patches=[0,0]', 'loader.two_views=true']),
    'counts': (1, ['mining.sup_filter=class_rate', 'method.density_guard=.5', 'mining.memory=2']),
    'bf16': (1, ['run.amp=bf16', 'method.T1=0']),
}


@pytest.mark.parametrize('what', VARIANTS)
def test_variants(what, tmp_path):
    "After some iterations, so that caches are filled"
    steps, items = VARIANTS[what]
    base = share(whole('semi_detr', 'data.dev=0', 'method.T1=9', 'optim.iters=9'), 2)
    run = T.Trainer(override(base, items), tmp_path, progress=False)
    run.fit(until=steps)
    batches = next(run.batches())
    run.cfg = run.method.cfg = huge_weight(run)
    found = replay(failed(run, batches))
    assert found.equal and found.layer == '' and found.step == steps and found.term.startswith('loss_unsup')
    assert what != 'mixing' or any('mosaic' in name for _, name, *_ in found.rows)


@pytest.mark.parametrize('name', DETECTORS)
def test_every_detector(name, tmp_path):
    "A finite forward pass of any detector is not blamed, and its losses are repeated"
    items = ['method.burn_in_iters=0', 'method.T1=0', f'method.unsup_weight={HUGE}', 'pseudo.threshold=0']
    run = T.Trainer(small(name, 'mean_teacher', *items), tmp_path, progress=False)
    found = replay(failed(run, next(run.batches())))
    assert found.equal and found.layer == '' and found.term.startswith('loss_unsup')


@pytest.mark.parametrize('over', ['batch', 'step'])
def test_gradients(over, tmp_path):
    "All losses are finite, the norm of the gradient is not; two batches per step"
    items = 'optim.accumulate=2', f'optim.normalise={over}', 'data.dev=0'
    cfg = tiny('criterion.loss_l1=1e37', *items, method='supervised')
    run = T.Trainer(cfg, tmp_path, progress=False)
    batches = next(run.batches())
    found = replay(failed(run, batches))
    assert found.equal and found.replayed == 'the gradient is not finite' and found.term == found.layer == ''
    assert found.gradient and {n for n, *_ in found.rows} == {0, 1}
    assert found.images == list(
        dict.fromkeys(t['image_id'] for b in batches for t in b['labelled']['targets'])
    )
    spoilt = [batches[0], *with_nan(batches[1:], 'labelled')]
    found = replay(failed(run, spoilt))
    assert found.equal and found.images == [batches[1]['labelled']['targets'][1]['image_id']]
    assert {n for n, *_ in found.rows} == ({0} if over == 'batch' else set())  # it comes before all losses


def test_watch_names_the_first_gradient(folder):
    "Later ones are not named, and nothing watches afterwards"
    run, _ = prepared('supervised', 'o2o', folder)
    with Watch(run) as watch:
        watch.see_gradient('student.a', torch.ones(2))
        watch.see_gradient('student.b', torch.tensor([1.0, NAN]))
        watch.see_gradient('student.c', torch.tensor([NAN]))
    assert watch.gradient == 'student.b' and watch.largest[1] == 'student.a'
    assert not any(m._forward_hooks for m in run.student.modules())


# --- damaged files


@pytest.fixture(scope='module')
def capsule(folder):
    run, batches = prepared('supervised', 'o2o', folder)
    return failed(run, with_nan(batches, 'labelled'))


def command(*words):
    "Exit code of the command"
    with pytest.raises(SystemExit) as e:
        main(['replay', *map(str, words)])
    return e.value.code


def test_command(capsule, capsys):
    assert command(capsule) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith('iteration 0: image') and any('bit for bit' in line for line in out)
    assert out[-1].startswith('images: ')


def changed(capsule, path, **changes):
    saved = load_checkpoint(capsule) | changes
    saved.pop('format')
    save_checkpoint(path, **{k: v for k, v in saved.items() if v is not KINDS})
    return path


def test_a_fault_that_does_not_replay(capsule, tmp_path, capsys):
    "The image was repaired: exit code 1, and a line"
    batch = load_checkpoint(capsule)['batches'][0]
    images = batch['labelled']['images'].nan_to_num(0)
    batch = batch | dict(labelled=batch['labelled'] | dict(images=images))
    path = changed(capsule, tmp_path / 'a.pt', batches=[batch])
    assert command(path) == 1 and 'does not replay' in capsys.readouterr().out
    found = replay(path)
    assert not found.equal and found.replayed == found.term == found.layer == '' and found.images == []


def test_other_numbers_are_said(folder, tmp_path):
    "A recorded loss that differs in its last bit"
    run, batches = prepared('supervised', 'o2m', folder)
    usual = run.cfg
    run.cfg = run.method.cfg = huge_weight(run)
    path = failed(run, batches)
    run.cfg = run.method.cfg = usual
    losses = load_checkpoint(path)['losses']
    name = next(k for k, v in losses[0].items() if v.isfinite() and v)
    losses[0][name] = torch.nextafter(losses[0][name], torch.tensor(0.0))
    found = replay(changed(path, tmp_path / 'a.pt', losses=losses))
    assert found.replayed and not found.equal


FAULTS = {
    'losses': [[3], [{'a': 'x'}], {}],
    'batches': [
        [],
        [3],
        [{}],
        [dict(labelled=dict(images=3))],
        [dict(labelled=dict(images=torch.ones(1), targets=[3]))],
    ],
    'labelled': [{}, 3, dict.fromkeys(('counts', 'boxes', 'labels', 'ignore'), 3)],
    'rank': ['1', 1, -1],
    'threads': [0, 10**9, 1.5],
    'received': [[3], [[3]], None],
    'error': [None],
    'moved': [7],
    'student': [{}, 3],
    'optimizer': [{}, dict(state={}, param_groups=[])],
    'rng': [{}, dict(torch=torch.ones(3))],
    'config': [{}, dict(nothing=3), dict(method=dict(name='none'))],
    'step': [-1, 10**30, '3'],
    'faults': [3, dict(skipped=-1, went_back=0)],
    'parts': [3],
}


@pytest.mark.parametrize('name', FAULTS)
def test_fields(name, capsule, tmp_path, capsys):
    "Another type, form or range: one line that names the file"
    for value in FAULTS[name]:
        path = changed(capsule, tmp_path / 'a.pt', **{name: value})
        assert command(path) == 2, value
        err = capsys.readouterr().err
        assert err.count('\n') == 1 and err.startswith(f'error: {path}: '), (value, err)


def test_missing_fields_and_other_files(capsule, tmp_path, capsys):
    lines = []
    for name in KINDS:
        saved = {k: v for k, v in load_checkpoint(capsule).items() if k not in (name, 'format')}
        save_checkpoint(tmp_path / 'a.pt', **saved)
        assert command(tmp_path / 'a.pt') == 2
        lines.append(capsys.readouterr().err)
        assert f"holds no '{name}'" in lines[-1]
    data = bytearray(capsule.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / 'bit.pt').write_bytes(data)
    (tmp_path / 'cut.pt').write_bytes(data[:1000])
    (tmp_path / 'text.pt').write_text('no checkpoint')
    for name in ('bit.pt', 'cut.pt', 'text.pt', 'none.pt', '.'):
        assert command(tmp_path / name) == 2
        lines.append(capsys.readouterr().err)
    assert all(line.count('\n') == 1 and str(tmp_path) in line for line in lines)


def test_tape():
    "Only what was recorded is played, in its form; the functions of torch are put back"
    real = torch.distributed.all_reduce
    with pytest.raises(NonFiniteError), Tape([[torch.ones(2)]]).playing(0, 2):
        torch.distributed.all_reduce(torch.ones(3))
    assert torch.distributed.all_reduce is real and rank() == 0
    with Tape().playing(0, 1):
        assert torch.distributed.all_reduce is real


# --- policies


def broken(run, at, rates=(1, 0.5, 0.25, 0.125)):
    "Losses are NaN in these iterations, while the learning rate has one of these factors"
    real = run.method.step

    def step(student, teacher, batch, t):
        result = real(student, teacher, batch, t)
        if t in at and run.rate in rates:
            result.losses['loss_l1'] = result.losses['loss_l1'] * NAN
        return result

    run.method.step = step
    return run


def lines(folder):
    return [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]


def equal(a, b):
    "Weights, moments, method and random state of two checkpoints"
    a, b = (load_checkpoint(x / 'last.pt') for x in (a, b))
    flat = [torch.utils._pytree.tree_leaves([x[k] for k in ('optimizer', 'parts', 'rng')]) for x in (a, b)]
    others = [torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(*flat, strict=True)]
    return same(a, b) and all(others)


SEMI = dict(method='semi_detr')
LENGTH = 'run.log_every=1', 'run.test=false', 'data.dev=0', 'method.burn_in_iters=1'


@pytest.fixture(scope='module')
def skipping(folder):
    "A run that leaves out iteration 3"
    cfg = tiny('run.non_finite=skip', *LENGTH, **SEMI)
    run = broken(T.Trainer(cfg, folder / 'skip', progress=False), [3])
    with pytest.warns(
        UserWarning, match='iteration 3.*loss_l1.*failed_step_3.*left out, number 1 of at most 10'
    ):
        result = run.fit()
    return cfg, run, result


def test_skip_is_a_step_left_out(skipping, folder):
    "The run in which this iteration does nothing, bit for bit; counted in log, checkpoint and run.json"
    cfg, run, result = skipping
    other = T.Trainer(override(cfg, ['run.non_finite=stop']), folder / 'left out', progress=False)
    real = other.iterate

    def iterate(batches, progress):
        if other.step != 3:
            return real(batches, progress)
        other.step += 1
        other.write_due(progress.log)

    other.iterate = iterate
    other.fit()
    assert equal(run.dir, other.dir)
    log = lines(run.dir)
    assert [row.pop('skipped', 0) for row in log] == [0, 0, 0, 1, 1, 1] and log == lines(other.dir)
    assert result['non_finite'] == dict(skipped=1, went_back=0) and result['iterations'] == 6
    assert load_checkpoint(run.dir)['faults'] == result['non_finite']
    assert 'non_finite' not in json.loads((other.dir / 'run.json').read_text())
    found = replay(run.dir / 'failed_step_3.pt')
    assert not found.replayed, 'the fault was put in from outside'


@pytest.mark.parametrize('until', [4])
def test_resume_after_a_skip(skipping, tmp_path, until):
    "Stopped right after the iteration: the same run"
    cfg, run, _ = skipping
    for steps in (until, None):
        again = broken(T.Trainer(cfg, tmp_path / 'r', progress=False), [3])
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            again.fit(until=steps)
    assert equal(run.dir, again.dir) and lines(run.dir) == lines(again.dir)
    assert again.faults == dict(skipped=1, went_back=0)


def test_skip_is_bounded_and_may_follow_a_stop(tmp_path):
    "A run that stopped at a loss goes on in its folder with the other policy, up to the bound"
    cfg = tiny('run.max_skipped=1', *LENGTH, method='supervised')
    with pytest.raises(NonFiniteError, match='iteration 2.*run.non_finite=skip.*saved after iteration 2'):
        broken(T.Trainer(cfg, tmp_path, progress=False), [2, 3]).fit()
    cfg = override(cfg, ['run.non_finite=skip'])
    wanted = '1 iterations are left out already, and run.max_skipped=1; .*saved after iteration 3'
    with (
        pytest.warns(UserWarning, match='number 1 of at most 1'),
        pytest.raises(NonFiniteError, match=wanted),
    ):
        broken(T.Trainer(cfg, tmp_path, progress=False), [2, 3]).fit()
    run = T.Trainer(cfg, tmp_path, progress=False)
    assert run.step == 3 and run.faults == dict(skipped=1, went_back=0)


def test_back_halves_the_rate(tmp_path):
    "Iteration 4 fails, the checkpoint is that after 3: the run from there with half the rate, bit for bit"
    cfg = tiny('run.non_finite=back', *LENGTH, **SEMI)
    run = broken(T.Trainer(cfg, tmp_path / 'a', progress=False), [4], [1])
    with pytest.warns(UserWarning, match='back to iteration 3, with 0.5 times the learning rate'):
        result = run.fit()
    assert result['non_finite'] == dict(skipped=0, went_back=1) and run.rate == 0.5
    log = lines(run.dir)
    assert [r['step'] for r in log] == [1, 2, 3, 4, 5, 6]
    assert [r['lr'] / cfg.optim.lr for r in log] == [1, 1, 1, 0.5, 0.5, 0.5]
    T.Trainer(cfg, tmp_path / 'b', progress=False).fit(until=3)
    other = T.Trainer(cfg, tmp_path / 'b', progress=False)
    other.faults['went_back'] = 1
    other.fit()
    assert equal(run.dir, other.dir)


def test_back_is_bounded_and_starts_with_a_checkpoint(tmp_path):
    "Before the first checkpoint of the usual kind; the factor survives a stop"
    cfg = tiny('run.non_finite=back', *LENGTH, method='supervised')
    run = broken(T.Trainer(cfg, tmp_path, progress=False), [1])
    match = f'iteration 1.*went back {MOST_BACK} times already'
    with pytest.warns(UserWarning, match='back to iteration 0'), pytest.raises(NonFiniteError, match=match):
        run.fit()
    again = T.Trainer(cfg, tmp_path, progress=False)
    assert again.rate == 0.125 and again.step == 1
    again.fit()
    assert {r['lr'] / cfg.optim.lr for r in lines(tmp_path)[1:]} == {0.125}


def test_an_overflow_in_half_precision_is_left_to_the_scaler():
    p = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([dict(params=[p], base_lr=1.0)], lr=1.0)
    scaler = torch.amp.GradScaler('cpu', init_scale=4.0)
    (scaler.scale(p.sum()) * math.inf).backward()
    assert clip_and_step(optimizer, scaler, 1.0, 1.0) == math.inf
    assert p == 1 and scaler.get_scale() == 2
    (scaler.scale(p.sum()) * math.inf).backward()
    with pytest.raises(NonFiniteError):
        clip_and_step(optimizer, torch.amp.GradScaler('cpu', enabled=False), 1.0, 1.0)


def test_settings_keep_the_hash():
    usual = config_hash(Config())
    for item in ('run.non_finite=skip', 'run.non_finite=back', 'run.max_skipped=3'):
        assert config_hash(override(Config(), [item])) == usual


# --- two processes

WORKER = """
import test_replay
test_replay.start(sys.argv[1])
"""


def start(folder):
    "Two processes; an image of the second one has NaN, later its gradient"
    from semidetr.core import start_processes

    start_processes()
    warnings.simplefilter('ignore')
    results = {}
    for name in METHODS:
        items = 'run.non_finite=skip', 'optim.iters=2', 'method.T1=1', 'run.log_every=1', 'data.dev=0'
        run = T.Trainer(share(whole_of(name, *items), 2), f'{folder}/{name}', progress=False)
        real = run.passes

        weight = WEIGHTS.get(name, 'transformer.decoder.layers.0.linear1.weight')

        def passes(batches, run=run, real=real, weight=weight):
            if run.step == 0 and rank() == 1:
                batches[:] = with_nan(batches, 'labelled')
            done = real(batches)
            if run.step == 1 and rank() == 1:
                run.student.get_parameter(weight).grad *= NAN
            return done

        run.passes = passes
        result = run.fit()
        results[name] = dict(faults=result['non_finite'], student=run.student.state_dict(), step=run.step)
    run = T.Trainer(share(whole('semi_detr'), 2), f'{folder}/stop', progress=False)
    real_batches = run.batches

    def batches_with_nan():
        for batches in real_batches():
            yield with_nan(batches, 'strong') if rank() == 1 else batches

    run.batches = batches_with_nan
    number = rank()  # the failure closes the connections
    try:
        run.fit()
    except Exception as e:
        results['stop'] = f'{type(e).__name__}: {e}'
    torch.save(results, f'{folder}/rank{number}.pt')


def test_two_processes(tmp_path):
    """Both leave the iteration out; the file of the second one repeats it in one process, for every method.

    A gradient of the second one is NaN in another iteration: it leaves evidence, the first one does not. With
    the policy stop both end, with one line each."""
    run_together(WORKER, tmp_path)
    a, b = (torch.load(tmp_path / f'rank{n}.pt') for n in (0, 1))
    for name in METHODS:
        assert a[name]['step'] == 2 and a[name]['faults'] == b[name]['faults'] == dict(skipped=2, went_back=0)
        assert all(torch.equal(v, b[name]['student'][k]) for k, v in a[name]['student'].items())
        files = sorted(p.name for p in (tmp_path / name).glob('failed*'))
        assert files == ['failed_step_0.rank1.pt', 'failed_step_1.rank1.pt']
        found = replay(tmp_path / name / files[0])
        assert (
            found.equal and (found.rank, found.world) == (1, 2) and found.layer.startswith('student.backbone')
        )
        assert len(found.images) == 1
        saved = load_capsule(tmp_path / name / files[1])
        assert saved['losses'] and {'student', 'optimizer'} <= saved.keys()
        again = replay(tmp_path / name / files[1])
        assert again.rows and all(x == y for *_, x, y in again.rows)
        assert any(v for v in saved['received'])
    assert a['stop'].startswith('SemiDETRError: iteration 0: another process of this run has ended')
    assert b['stop'].startswith('NonFiniteError: iteration 0: image ')
    found = replay(tmp_path / 'stop' / 'failed_step_0.rank1.pt')
    assert found.equal and found.layer.startswith('student.backbone') and len(found.images) == 1
    assert len(load_capsule(tmp_path / 'stop' / 'failed_step_0.rank1.pt')['received']) > 3
