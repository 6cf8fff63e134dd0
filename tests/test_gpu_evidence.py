"The kit of long trainings: its arithmetic, marks that keep arms equal, a record that survives, its page."

import json, multiprocessing, os, re, signal, subprocess, sys, time
from types import SimpleNamespace
import pytest, torch
from conftest import ROOT
from semidetr.core import ConfigError
from semidetr.lab.plan import plan
from semidetr.train.config import config_hash, override

sys.path.insert(0, str(ROOT / 'benchmarks'))
import gpu_evidence as E  # noqa: E402
import side_by_side as S  # noqa: E402

SCRIPT = ROOT / 'benchmarks' / 'gpu_evidence.py'
STUDIES = ROOT / 'nbs/ablations/studies.toml'


def arguments(*words):
    "Options as a call would have them, with `settled` applied"
    args = E.options(['--device', 'cpu', *words])
    assert E.settled(args) == ''
    return args


# --- arithmetic ---------------------------------------------------------------------------------------------
def test_schedule_by_hand():
    "85 % of the slowest rate times the seconds, cut to a multiple of the way between marks"
    s = E.schedule(dict(a=2.0, b=4.0), 100.0, 5000, 20)
    assert (s['slowest'], s['every'], s['iterations']) == ('a', 8, 168)  # int(.85 * 2 * 100) = 170
    s = E.schedule(dict(a=100.0), 1000.0, 5000, 20)
    assert (s['every'], s['iterations']) == (250, 5000)
    assert E.schedule(dict(a=1.0), 10.0, 6, 2)['iterations'] == 6


@pytest.mark.parametrize('seconds', [-5.0, 0.0, 0.1])
def test_schedule_without_time(seconds):
    "One iteration at least: the record then says how slow it was"
    s = E.schedule(dict(a=1.0), seconds, 5000)
    assert (s['every'], s['iterations']) == (1, 1)


def test_the_way_to_the_next_mark():
    "50 iterations took 10 seconds, so the next 50 end at 20"
    assert E.goes_on(now=10.0, started=0.0, step=50, every=50, end=20.0)
    assert not E.goes_on(now=10.0, started=0.0, step=50, every=50, end=19.9)


def test_reserve_and_share():
    probes = [dict(evaluation_s=2.0, dev=100, test=300), dict(evaluation_s=1.0, dev=0, test=0)]
    assert E.reserve(probes) == pytest.approx(1.3 * 8.0 + 2.0) and E.reserve([]) == 2.0
    assert E.share(100.0, 500.0, 0.25) == 200.0


def test_the_parts_of_the_time_fit():
    "Measurements, burn-in and ending leave more than half of nine minutes to the arms"
    assert E.TOTAL == 540 and E.BURN_SHARE < 0.3 and E.PROBE < 10 and E.ENDING <= 10
    assert E.TOTAL * (1 - E.BURN_SHARE) - E.ENDING - E.PROBE > E.TOTAL / 2


# --- what is trained ----------------------------------------------------------------------------------------
@pytest.mark.parametrize('study, group', E.STUDIES.items())
def test_settings_are_those_of_the_study(tmp_path, study, group):
    "At the length of the study, and in float32, every run has the hash that the study gives it"
    made = E.runs_of(study, group, arguments('--amp', 'off', '--seeds', '1'), tmp_path)
    of_study = {r.arm: r.cfg for r in plan(STUDIES, study, seeds=[1], only=(group,))}
    plain = lambda cfg: config_hash(override(cfg, ['run.init=']))
    for arm in ('burn_in', *E.ARMS):
        cfg, folder, _ = made[study, group, 1, arm]
        assert plain(cfg) == plain(of_study[arm]) and cfg.run.test == (arm != 'burn_in')
        assert cfg.run.init == ('' if arm == 'burn_in' else str(folder.with_name('burn_in')))
    if 'plus' in of_study:
        assert plain(made[study, group, 1, E.BUNDLE][0]) == plain(of_study['plus'])
    assert {k[3] for k in made} == {'burn_in', *E.ARMS, E.BUNDLE}


def test_control_and_length(tmp_path):
    "The control differs in precision alone; a longer run keeps the shares of its stages"
    made = E.runs_of('fod12', 'k5', arguments('--control', 'semi_detr', '--weights', 'none'), tmp_path)
    cfg = {arm: cfg for (_, _, _, arm), (cfg, _, _) in made.items()}
    assert cfg['semi_detr'].run.amp == 'bf16' and cfg['semi_detr_fp32'].run.amp == 'off'
    assert config_hash(override(cfg['semi_detr_fp32'], ['run.amp=bf16'])) == config_hash(cfg['semi_detr'])
    assert all(c.detector.backbone.weights == 'none' for c in cfg.values())
    T1 = {arm: E.lengthened(c, 3000).method.T1 for arm, c in cfg.items()}
    assert T1['burn_in'] == 2100 and T1['semi_detr'] == 1000 and T1[E.BUNDLE] == 3000 and not T1['supervised']
    assert E.lengthened(cfg['semi_detr'], 3000).optim.iters == 3000


def test_missing_data_are_named(tmp_path, monkeypatch, capsys):
    "A data set that is not there is left out with a line; where none is there, an earlier record stays"
    monkeypatch.setenv('SEMIDETR_DATA', str(tmp_path))
    args = arguments('--out', str(tmp_path / 'r.json'), '--runs', str(tmp_path / 'runs'))
    kit = E.Kit(args, time.monotonic())
    assert kit.go() == 1 and list(tmp_path.iterdir()) == []
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith('left out: ') for line in lines)
    assert len(kit.record['left_out']) == 2 and 'fod12' in kit.record['left_out'][0]


def test_unknown_groups_are_errors(tmp_path):
    for study, group, why in (('fod12', 'k7', "no group 'k7'"), ('precision', '', 'no arm semi_detr')):
        with pytest.raises(ConfigError, match=why):
            E.runs_of(study, group, arguments(), tmp_path)


# --- processes ----------------------------------------------------------------------------------------------
def pretend(conn):
    "A process that trains nothing: it answers a job as the real ones do"
    while True:
        try:
            job = conn.recv()
        except EOFError:
            return
        if job is None:
            return
        how, pause, steps, every = job[1].values()
        if how == 'error':
            conn.send(('failed', 'ValueError: wrong'))
            continue
        for step in range(1, steps + 1):
            time.sleep(pause)
            if how == 'death' and step == every:
                os._exit(7)
            if step % every == 0 and step < steps and not S.wait_at(conn, step):
                break
        conn.send(('done', step))


@pytest.fixture
def sides(monkeypatch):
    "Three processes that pretend to train"
    monkeypatch.setattr(S, 'child', pretend)
    made = {k: S.Side(multiprocessing.get_context('fork')) for k in 'abc'}
    yield made
    for side in made.values():
        side.stop()


def jobs(every=2, steps=8, **how):
    "A job for each process: (how it ends, seconds per step)"
    return {k: ('train', dict(how=h, pause=p, steps=steps, every=every)) for k, (h, p) in how.items()}


def ends(sides, given, decide, seconds=20.0, group_of=lambda k: ''):
    found = {}
    S.together(
        sides, given, group_of, decide, time.monotonic() + seconds, lambda k, s, v: found.update({k: (s, v)})
    )
    return found


def test_arms_end_at_the_same_mark(sides):
    "However fast each one is; another comparison is not asked to end"
    asked = []

    def decide(group, step):
        asked.append((group, step))
        return group == 'other' or step < 4

    given = jobs(a=('', 0.0), b=('', 0.02), c=('', 0.0))
    found = ends(sides, given, decide, group_of=lambda k: 'other' if k == 'c' else 'pair')
    assert found == dict(a=('done', 4), b=('done', 4), c=('done', 8))
    assert [s for g, s in asked if g == 'pair'] == [2, 4] and [s for g, s in asked if g == 'other'] == [
        2,
        4,
        6,
    ]


def test_a_failure_leaves_the_others_alone(sides):
    "An error and a process that dies do not keep the rest waiting"
    found = ends(sides, jobs(a=('error', 0.0), b=('death', 0.0), c=('', 0.01)), lambda group, step: True)
    assert found['a'] == ('failed', 'ValueError: wrong') and found['c'] == ('done', 8)
    assert found['b'] == ('failed', 'its process ended with exit code 7')
    again = ends(sides, jobs(b=('', 0.0)), lambda group, step: True)
    assert again['b'][0] == 'failed'


def test_what_finds_no_time_is_stopped(sides):
    start = time.monotonic()
    found = ends(sides, jobs(a=('', 0.0), b=('', 60.0)), lambda group, step: True, 0.5, lambda k: k)
    assert found['a'] == ('done', 8) and found['b'][0] == 'out of time'
    assert time.monotonic() - start < 10 and not sides['b'].process.is_alive()


# --- the record ---------------------------------------------------------------------------------------------
def finished_run(ap=30.0):
    "What a training returns, as far as the kit reads it"
    metrics = dict(AP=ap, AP50=2 * ap, AP75=1.0, AP_nms=ap + 1, per_class={'a': dict(AP=ap, AP50=ap)})
    both = dict(teacher=metrics, student=metrics)
    cost = dict(hash='0', seconds=3.0, waited_s=1.0, wall_s=4.0, peak_gpu_mb=None, health={})
    curve = dict(step=[1], loss=[2.0], grad_norm=[3.0])
    data = dict(labelled=5, unlabelled=6, dev=7, val=8, classes=['a'])
    return dict(iterations=9, metrics=dict(dev=both, val=both), curve=curve, data=data, **cost)


def test_the_record_is_written_with_every_run(tmp_path):
    args = arguments('--smoke', '--out', str(tmp_path / 'r.json'))
    kit = E.Kit(args, time.monotonic())
    for arm in ('burn_in', 'supervised'):
        kit.rows['fod12', 'k5', 0, arm] = dict(study='fod12', arm=arm, state='planned')
    kit.ended(('fod12', 'k5', 0, 'burn_in'), 'done', finished_run())
    record = json.loads((tmp_path / 'r.json').read_text())
    first, second = record['runs']
    assert first['state'] == 'done' and second['state'] == 'planned' and not record['ok']
    assert first['metrics']['val']['teacher'] == dict(AP=30.0, AP50=60.0, AP75=1.0, AP_nms=31.0)
    assert first['metrics']['val']['classes'] == dict(a=30.0) and first['curve'] == dict(step=[1], loss=[2.0])
    assert first['images'] == dict(labelled=5, unlabelled=6, dev=7, val=8)
    kit.ended(('fod12', 'k5', 0, 'supervised'), 'failed', 'OutOfMemoryError: too large')
    record = json.loads((tmp_path / 'r.json').read_text())
    assert record['runs'][1]['reason'] == 'OutOfMemoryError: too large' and not record['ok']
    assert [p.name for p in tmp_path.iterdir()] == ['r.json']


def kit(*options, **env):
    command = [sys.executable, SCRIPT, *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | env)


@pytest.mark.slow
def test_smoke(tmp_path):
    "Every part on the CPU: equal iterations, metrics with and without suppression"
    done = kit('--smoke', '--device', 'cpu', '--out', tmp_path / 'r.json', '--runs', tmp_path / 'runs')
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    record = json.loads((tmp_path / 'r.json').read_text())
    assert record['ok'] and record['ended'] and record['smoke'] and record['seconds'] < record['limit_s']
    assert list(record['wall_s']) == ['start', 'measure burn-in', 'burn-in', 'measure arms', 'arms']
    by_arm = {r['arm']: r for r in record['runs']}
    assert set(by_arm) == {'burn_in', *E.ARMS, E.BUNDLE, 'mean_teacher_fp32'}
    assert {r['iterations'] for r in record['runs']} == {6}
    assert len(record['plan']['arms']['fod12']['rates']) == 5
    for arm, r in by_arm.items():
        assert set(r['metrics']) == ({'dev'} if arm == 'burn_in' else {'dev', 'val'})
        assert {'AP', 'AP_nms'} <= set(r['metrics']['dev']['teacher'])
    assert 'AP_o2m' in by_arm[E.BUNDLE]['metrics']['val']['teacher']
    assert by_arm['mean_teacher_fp32']['amp'] == 'off'
    starts = [f for f in (tmp_path / 'runs').rglob('config.json') if f.parent.name in E.ARMS]
    for f in starts:
        assert json.loads(f.read_text())['run']['init'].endswith('burn_in')


@pytest.mark.slow
def test_a_kit_that_is_stopped_leaves_what_is_done(tmp_path):
    "Stopped after the burn-in: its row is in the record, and no process is left"
    out = tmp_path / 'r.json'
    command = [sys.executable, SCRIPT, '--smoke', '--device', 'cpu', '--control', 'none', '--out', out]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if line.startswith('burn-in:'):
                break
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and 'stopped; what is done is in' in errors
    record = json.loads(out.read_text())
    states = {r['arm']: r['state'] for r in record['runs']}
    assert states['burn_in'] == 'done' and 'done' not in [s for arm, s in states.items() if arm != 'burn_in']
    assert not record['ended'] and not record['ok']


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_without_a_gpu():
    for options in (('--device', 'cuda'), ()):
        done = kit(*options)
        assert done.returncode == 1 and 'torch sees no GPU; --smoke --device cpu' in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_what_is_missing_is_said_in_a_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(E, 'NEEDED', dict(torch='torch', no_such_module='no-such-package'))
    assert E.main(['--smoke', '--device', 'cpu']) == 1
    assert 'missing packages: no-such-package' in capsys.readouterr().err
    args = E.options(['--smoke', '--device', 'cpu', '--data', str(tmp_path / 'nowhere')])
    assert 'no such folder' in E.settled(args)


def test_weights_that_are_missing_are_a_line(tmp_path):
    cfg = SimpleNamespace(
        detector=next(iter(E.runs_of('fod12', 'k5', arguments('--weights', 'no.pth'), tmp_path).values()))[
            0
        ].detector
    )
    with pytest.raises(ConfigError, match="'no.pth': no such file"):
        E.check_weights(cfg)


def test_make_takes_the_python_that_is_there():
    env = {k: v for k, v in os.environ.items() if not k.startswith('MAKE')}
    command = ['make', '-n', 'gpu-evidence', 'PY=./python', 'GPU=--seeds 0 1']
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.split() == ['./python', 'benchmarks/gpu_evidence.py', '--seeds', '0', '1']


# --- the page -----------------------------------------------------------------------------------------------
def page(tmp_path, monkeypatch, records):  # text of all Markdown outputs
    "Run the code of the page beside other records"
    home, place = tmp_path / 'benchmarks/results', tmp_path / 'nbs/benchmarks'
    for folder in (home, place):
        folder.mkdir(parents=True)
    for name, record in records.items():
        (home / name).write_text(json.dumps(record))
    monkeypatch.chdir(place)
    text = (ROOT / 'nbs/_py/benchmarks/03_gpu_evidence.py').read_text()
    cells = [c for c in re.split(r'^# %%', text, flags=re.M) if not c.startswith(' [markdown]')]
    names, shown = {}, []
    for cell in cells:
        lines = cell.strip().splitlines()
        if lines and lines[-1].startswith('markdown('):
            lines[-1] = f'_shown = {lines[-1]}'
        exec('\n'.join(lines), names)
        if '_shown' in names:
            shown.append(names.pop('_shown').data)
    return '\n\n'.join(shown)


def kept_record():
    return json.loads((ROOT / 'benchmarks/results/gpu_evidence_cpu.json').read_text())


def gpu_record(seeds=(0, 1)):
    "A record as a GPU would leave it, with invented numbers"
    record = kept_record() | dict(device='cuda', smoke=False)
    record['environment'] |= dict(gpu='GPU of a test, 1 GiB')
    runs = []
    for seed in seeds:
        for i, r in enumerate(record['runs']):
            row = json.loads(json.dumps(r)) | dict(seed=seed, iterations=4000, data='fod12')
            for part in row['metrics'].values():
                part['teacher'] |= dict(AP=10.0 * i + seed, AP_nms=10.0 * i + seed + 1)
            runs.append(row)
    return record | dict(runs=runs)


def test_page_without_a_record_of_a_gpu(tmp_path, monkeypatch):
    text = page(tmp_path, monkeypatch, {'gpu_evidence_cpu.json': kept_record()})
    assert (
        text.startswith('::: {.finding}\nThe kit has not run on a GPU yet.')
        and 'No number on this page comes' in text
    )
    assert '6 of 6 trainings reached their end' in text


def test_page_with_a_record_of_a_gpu(tmp_path, monkeypatch):
    both = {'gpu_evidence_cpu.json': kept_record(), 'gpu_evidence.json': gpu_record()}
    text = page(tmp_path, monkeypatch, both)
    assert 'All numbers on this page were measured on one GPU: GPU of a test' in text
    assert 'has not run' not in text and 'No number on this page' not in text
    assert 'fod12: Semi-DETR against mean teacher: +10.0 AP on average over 2 seeds' in text
    assert '4000' in text and '12 of 12 trainings' in text


def test_page_with_a_record_that_was_cut_short(tmp_path, monkeypatch):
    "Runs without an end are listed and leave gaps, and the sentence says so; with none at all too"
    record = gpu_record([0]) | dict(ended=False)
    bare = ('study', 'group', 'data', 'seed', 'arm', 'amp', 'method', 'settings')
    record['runs'][3:] = [{k: r[k] for k in bare} | dict(state='running') for r in record['runs'][3:]]
    text = page(tmp_path, monkeypatch, {'gpu_evidence.json': record})
    assert 'cut short' in text and '3 of 6 trainings' in text and '| running |' in text
    assert 'mean teacher against supervised' in text and 'Semi-DETR against' not in text
    empty = record | dict(runs=[], plan={}, wall_s={}, left_out=['fod12: not there'])
    text = page(tmp_path / 'empty', monkeypatch, {'gpu_evidence.json': empty})
    assert 'Left out: fod12: not there' in text and 'No training reached its end.' in text
