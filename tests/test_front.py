"The front door: command and call train the same; defaults, resuming, hints, bars and lines, cards, loggers"

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
import pytest
import semidetr
import torch
from semidetr import progress
from semidetr.core import ConfigError, DataError, Note
from semidetr.data.catalog import open_dataset
from semidetr.train import api, card, loggers, run_folder
from semidetr.train.checkpoint import RunLog
from semidetr.train.config import config_hash, load_config, override, preset, to_dict
from semidetr.train.plan import plan_run
from semidetr.train.predict import MANY, nms_hint, removed_by_nms
from test_cli import FAST, make_coco, shell  # noqa: F401 (a fixture)
from test_trainer import TINY

DATA = 'digits:n=24,size=64'
SMALL = [s for s in FAST if s.partition('.')[0] in ('view', 'detector', 'loader', 'pseudo')]
TINY_RUN = [*SMALL, 'run.log_every=1', 'run.test=false']


# --- the same run, whoever asks for it -------------------------------------------------------------
def numbers_of(folder):
    result = json.loads((folder / 'run.json').read_text())
    rows = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
    return result['hash'], result['metrics'], result['history'], rows


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A finished run of two iterations, one of them with pseudo labels, by the call"
    out = tmp_path_factory.mktemp('front') / 'run'
    options = dict(percent=50, iters=2, threads=1, settings=TINY_RUN)
    return semidetr.train(data=DATA, out=out, progress=False, say=None, **options)


def test_a_command_a_call_and_a_trainer_train_the_same(run, shell, tmp_path):  # noqa: F811
    "Same options: same hash, same losses and same metrics, to the last digit; method and burn-in are derived"
    words = ['--data', DATA, '--percent', 50, '--iters', 2, '--threads', 1, '-q', '-o', tmp_path / 'a']
    code, out, err = shell('train', *words, *TINY_RUN)
    assert code == 0, err
    settings = TINY_RUN
    plan = semidetr.plan_run(data=DATA, percent=50, iters=2, threads=1, settings=settings)
    semidetr.Trainer(plan.cfg, tmp_path / 'b', progress=False).fit()
    found = [numbers_of(folder) for folder in (run.folder, tmp_path / 'a', tmp_path / 'b')]
    assert found[0] == found[1] == found[2] and found[0][0] == plan.hash
    assert run.config.method.name == 'mean_teacher' and run.config.method.burn_in_iters == 1
    assert any('loss_unsup_cls' in row or 'pseudo_boxes' in row for row in found[0][3]), 'the second half'
    states = [torch.load(folder / 'last.pt', weights_only=True) for folder in (run.folder, tmp_path / 'a')]
    pairs = zip(states[0]['teacher'].values(), states[1]['teacher'].values())
    assert all(torch.equal(a, b) for a, b in pairs)
    for line in plan.notes:
        assert f'note: {line}' in out


# --- defaults --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    'options,name',
    [
        (dict(percent=5), 'mean_teacher'),
        (dict(count=3), 'mean_teacher'),
        (dict(shots=1), 'mean_teacher'),
        (dict(unlabelled='digits:n=9,size=64'), 'mean_teacher'),
        (dict(percent=100), 'supervised'),
        (dict(percent=5, method='supervised'), 'supervised'),
        (dict(percent=5, config=dict(method=dict(name='semi_detr'))), 'semi_detr'),
        (dict(percent=5, preset='coco-5'), 'semi_detr'),
        (dict(percent=5, detector='detr'), 'mean_teacher'),
    ],
    ids=str,
)
def test_images_without_labels_are_learned_from(options, name):
    plan = plan_run(**dict(preset='small', data=DATA) | options)
    assert plan.cfg.method.name == name
    said = [line for line in plan.notes if line.startswith('method mean_teacher: it learns')]
    assert len(said) == (name == 'mean_teacher')
    assert all('--method supervised' in line and 'semi_detr_plus' in line for line in said)


@pytest.mark.parametrize(
    'iters,method,expected',
    [
        (1200, 'semi_detr', (500, 850)),
        (600, 'semi_detr', (500, 550)),
        (300, 'semi_detr', (125, 212)),
        (300, 'mean_teacher', (125, 125)),
        (2, 'mean_teacher', (1, 1)),
        (1, 'mean_teacher', (0, 0)),
    ],
)
def test_a_short_run_has_a_short_burn_in(iters, method, expected):
    "It keeps the proportions of the preset; what was given stays"
    plan = plan_run('small', data=DATA, percent=10, method=method, iters=iters)
    assert (plan.cfg.method.burn_in_iters, plan.cfg.method.T1) == expected
    assert not any('no unlabelled image will be used' in line for line in plan.notes)
    mine = plan_run(
        'small', data=DATA, percent=10, method=method, iters=iters, settings=['method.burn_in_iters=999']
    )
    if iters < 999:
        assert mine.cfg.method.burn_in_iters == 999 and 'no unlabelled image' in mine.notes[-1]


def test_what_a_file_says_of_a_part_is_not_derived_anew(tmp_path):
    "Nested settings count as given: the printed settings of a run, changed in one place, make that run"
    plan = plan_run('small', data=DATA, percent=10, method='semi_detr_plus')
    values = to_dict(plan.cfg)
    values['detector']['suppressor']['overlap'] = False
    (tmp_path / 'all.json').write_text(json.dumps(values))
    again = plan_run(config=tmp_path / 'all.json').cfg
    assert again.detector.suppressor.overlap is False and to_dict(again) == values
    assert load_config(tmp_path / 'all.json') == again


def test_a_config_is_taken_as_it_is():
    mine = override(preset('digits'), [f'data.data={DATA}', 'data.dev=4', 'method.name=semi_detr'])
    plan = plan_run(config=mine, threads=3)
    assert plan.cfg == override(mine, ['run.threads=3']) and plan.hash == config_hash(mine)
    assert 'method.T1 stays as the Config has it; without it: method.T1=600' in plan.notes[0]
    derived = plan_run(config=override(mine, ['method.T1=600']))
    assert derived.notes == ()
    with pytest.raises(ConfigError, match='give one of them'):
        plan_run('small', mine)


# --- going on elsewhere ----------------------------------------------------------------------------
@pytest.fixture(scope='module')
def stopped_run(tmp_path_factory):
    "A run of two iterations on files, stopped after the first: (data, settings, folder)"
    home = tmp_path_factory.mktemp('stopped')
    data = make_coco(home / 'here' / 'shapes', 8, 2)
    settings = [*SMALL, 'optim.iters=2', 'run.test=false', 'run.threads=1']
    plan = plan_run(data=str(data), settings=settings)
    semidetr.Trainer(plan.cfg, home / 'run', progress=False).fit(until=1)
    return data, settings, home / 'run'


@pytest.mark.parametrize(
    'change',
    [
        'run.threads=2',
        'run.device=cpu',
        'loader.num_workers=1',
        'run.log_every=1 run.checkpoint_every=1',
        'COPY',
        'RELATIVE',
        'IMAGES',
    ],
)
def test_the_machine_never_stands_in_the_way_of_a_resume(change, stopped_run, tmp_path, monkeypatch):
    "Threads, device, workers, how often it writes, and where the same files are"
    data, settings, stopped = stopped_run
    folder = Path(shutil.copytree(stopped, tmp_path / 'run'))
    changes = [c for c in change.split() if '=' in c]
    names = {c.partition('=')[0] for c in changes}
    options = dict(
        data=str(data), settings=[s for s in settings if s.partition('=')[0] not in names] + changes
    )
    if change == 'COPY':
        options['data'] = str(shutil.copytree(data, tmp_path / 'there' / 'shapes'))
    if change == 'RELATIVE':
        monkeypatch.chdir(data.parent)
        options['data'] = 'shapes'
    if change == 'IMAGES':
        options['images'] = str(data / 'images')
    cfg = plan_run(**options).cfg
    trainer = semidetr.Trainer(cfg, folder, progress=False)
    assert trainer.step == 1
    if change in ('COPY', 'loader.num_workers=1'):
        assert trainer.fit()['iterations'] == 2
        assert run_folder.finished(cfg, folder)['iterations'] == 2


@pytest.mark.parametrize('name', ['run.init', 'detector.backbone.weights'])
def test_files_that_a_run_started_from_may_move(name, tmp_path):
    "Another path of the same file, or the same name where the old one is gone; another file is another run"
    there, other = tmp_path / 'there' / 'w.pt', tmp_path / 'other.pt'
    there.parent.mkdir()
    there.touch()
    other.touch()
    cfg = override(preset('digits'), [f'data.data={DATA}'])
    of = lambda path: override(cfg, [f'{name}={path}'])
    check = lambda old, new: run_folder.check_same_run(to_dict(of(old)), of(new), 'f', 'f', 'runs/a')
    check(there, tmp_path / 'there' / '..' / 'there' / 'w.pt')
    with pytest.warns(Note, match='is gone'):
        check(tmp_path / 'gone' / 'w.pt', there)
    for old, new in ((there, other), (tmp_path / 'gone.pt', other), (there, tmp_path / 'gone' / 'w.pt')):
        with pytest.raises(ConfigError, match=name):
            check(old, new)


def test_a_place_that_cannot_be_written_is_said_before_the_training(tmp_path):
    (tmp_path / 'file').touch()
    for out in (tmp_path / 'file', tmp_path / 'file' / 'below'):
        with pytest.raises(DataError, match='is a file'):
            semidetr.train(data=DATA, out=out, say=None, progress=False)


# --- evaluate and predict --------------------------------------------------------------------------
def test_evaluate_takes_whatever_holds_detections(run):
    "A run, its folder, a Predictor; a dict, a list and COCO's rows of the same detections"
    whole = semidetr.evaluate(run, part='dev', device='cpu')
    p = semidetr.Predictor(run, 'cpu', threshold=0.0)
    same = lambda a, b: json.dumps(a) == json.dumps(b)  # NaN is not equal to itself
    assert same(semidetr.evaluate(p, part='dev'), dict(teacher=whole['teacher']))
    assert semidetr.evaluate(semidetr.Predictor(run, 'cpu', which='student'), part='dev').keys() == {
        'student'
    }
    assert same(semidetr.evaluate(str(run.folder), part='dev', device='cpu'), whole)
    ds = open_dataset('digits:n=4,size=64', 'val')
    shifted = [
        dict(boxes=a['boxes'] + 2, labels=a['labels'], scores=torch.ones(len(a['boxes'])))
        for a in map(ds.annotation, range(4))
    ]
    want = semidetr.evaluate(ds, dict(zip(ds.ids, shifted)))
    assert 0 < want['AP'] < 100
    rows = []
    for image_id, d in zip(ds.ids, shifted):
        for box, label in zip(d['boxes'].tolist(), d['labels'].tolist()):
            x, y, x2, y2 = box
            rows.append(
                dict(image_id=image_id, category=ds.classes[label], bbox=[x, y, x2 - x, y2 - y], score=1.0)
            )
    for found in (shifted, rows, tuple(shifted)):
        assert semidetr.evaluate(ds, found)['AP'] == pytest.approx(want['AP'], abs=1e-3)
        assert semidetr.evaluate(found, data=ds)['AP'] == pytest.approx(want['AP'], abs=1e-3)
        assert semidetr.evaluate(found, data='digits:n=4,size=64')['AP'] == pytest.approx(
            want['AP'], abs=1e-3
        )
    twice = [{k: torch.cat([v, v]) for k, v in d.items()} for d in shifted]
    assert semidetr.evaluate(ds, twice)['AP'] < semidetr.evaluate(ds, twice, nms=0.7)['AP']
    for bad, words in (
        (shifted[:3], '3 detections for 4 images'),
        ([rows[0] | dict(image_id='nowhere')], 'has no image nowhere'),
        ([rows[0] | dict(category='cow')], "no class 'cow'"),
    ):
        with pytest.raises(DataError, match=words):
            semidetr.evaluate(ds, bad)
    with pytest.raises(ConfigError, match='data=...'):
        semidetr.evaluate(shifted)


def test_the_file_of_predict_is_measured(run, tmp_path):
    "detections.json names images by file and classes by name; the order of the images does not matter"
    data = make_coco(tmp_path / 'd', 2, 3)
    ds = open_dataset(str(data), 'val')
    found = {}
    for i, image_id in enumerate(ds.ids):
        a = ds.annotation(i)
        found[image_id] = dict(boxes=a['boxes'], labels=a['labels'], scores=torch.ones(len(a['boxes'])))
    rows = []
    for i, image_id in reversed([*enumerate(ds.ids)]):
        for box, label in zip(found[image_id]['boxes'].tolist(), found[image_id]['labels'].tolist()):
            bbox = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            row = dict(image_id=Path(ds.files[i]).name, category_id=1, category=ds.classes[label])
            rows.append(row | dict(bbox=bbox, score=1.0))
    assert semidetr.evaluate(rows, data=str(data))['AP'] == semidetr.evaluate(ds, found)['AP'] == 100


def doubled(n, copies):
    "n boxes far apart, `copies` of them twice"
    x = 100.0 * torch.arange(n)
    boxes = torch.stack([x, x, x + 50, x + 50], 1)
    boxes = torch.cat([boxes, boxes[:copies] + 1])
    scores = torch.cat([torch.full((n,), 0.9), torch.full((copies,), 0.5)])
    return dict(boxes=boxes, scores=scores, labels=torch.zeros(n + copies, dtype=torch.long))


def test_the_hint_comes_above_the_bound():
    "Counted by hand; other classes and boxes below the threshold do not count"
    assert MANY == 0.15
    assert removed_by_nms([doubled(9, 1), doubled(5, 5)]) == (6, 20)
    assert nms_hint([doubled(17, 3)]) == '' and nms_hint([doubled(16, 3)]).startswith('3 of 19 boxes')
    assert removed_by_nms([doubled(5, 5)], threshold=0.6) == (0, 5) and nms_hint([doubled(5, 5)], 0.6) == ''
    apart = doubled(5, 5)
    apart['labels'][5:] = 1
    assert removed_by_nms([apart]) == (0, 10) and nms_hint([]) == ''
    assert '--nms=0.7' in nms_hint([doubled(5, 5)], option='--nms')


class Twice(torch.nn.Module):
    "Predicts two equal boxes with high scores"

    def forward(self, images, mask):
        logits = torch.full((len(images), 2, 10), -9.0)
        logits[:, :, 3] = 9.0
        return dict(pred_logits=logits, pred_boxes=torch.full((len(images), 2, 4), 0.5))


def test_predict_and_eval_hint_once(run, monkeypatch, shell, tmp_path):  # noqa: F811
    "Only where suppression is off and would matter; Python is told once for each Predictor"
    p = semidetr.Predictor(run, 'cpu')
    p.model = Twice()
    scene = open_dataset('digits:n=1,size=64', 'val')[0].image
    with pytest.warns(Note, match='1 of 2 boxes') as told:
        for _ in range(3):
            assert len(semidetr.predict(p, scene)['boxes']) == 2
    assert len(told) == 1
    monkeypatch.setattr(api, 'open_predictor', lambda *a, **k: p)
    scene.save(tmp_path / 'a.png')
    words = [
        'predict',
        '--run',
        run.folder,
        '-s',
        tmp_path / 'a.png',
        '-o',
        tmp_path / 'o',
        '-q',
        '--no-draw',
    ]
    code, out, _ = shell(*words)
    assert code == 0 and 'note: 1 of 2 boxes' in out and '--nms=0.7' in out
    p.hinted = False
    code, out, _ = shell('eval', '--run', run.folder, '--part', 'dev', '-q')
    assert code == 0 and out.count('note: ') == 1 and '--nms=0.7' in out
    p.nms = 0.7
    code, out, _ = shell(*words)
    assert code == 0 and 'note' not in out
    assert semidetr.Predictor(run, 'cpu', nms=0).nms is None


def test_split_of_command_and_call(shell, tmp_path):  # noqa: F811
    "The same split, the development part at most a fifth"
    code, out, _ = shell('split', '--data', DATA, '--percent', 25, '-o', tmp_path / 'a.json')
    s = semidetr.split(DATA, percent=25, out=tmp_path / 'b.json')
    assert code == 0 and (tmp_path / 'a.json').read_text() == (tmp_path / 'b.json').read_text()
    assert (len(s.labelled), len(s.dev)) == (6, 4) and '6 labelled' in out


# --- bars and lines --------------------------------------------------------------------------------
class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal_and_lines_elsewhere():
    for stream, bars in ((Terminal(), True), (io.StringIO(), False)):
        with progress.Progress(3, 'job', stream=stream) as p:
            for i in range(3):
                p.values(dict(loss=f'{i}'))
                p.update()
            p.write('a line')
        text = stream.getvalue()
        assert ('\r' in text) == bars and 'a line\n' in text
        if not bars:
            assert re.fullmatch(r'a line\njob: 3/3 it, \d+ s, loss=2\n', text)
    quiet = io.StringIO()
    with progress.Progress(3, stream=quiet, show=False) as p:
        p.update()
        p.write('nothing')
    assert quiet.getvalue() == ''


def test_lines_in_time():
    "At most one in five seconds, ten in all; where the length is not known one in thirty seconds"
    now, stream = [0.0], io.StringIO()
    with progress.Progress(100, stream=stream, clock=lambda: now[0]) as p:
        for _ in range(100):
            now[0] += 0.1
            p.update()
    assert stream.getvalue().count('\n') == 2
    stream = io.StringIO()
    with progress.Progress(None, 'film', 'frame', stream=stream, clock=lambda: now[0]) as p:
        for _ in range(100):
            now[0] += 1
            p.update()
    assert (
        stream.getvalue().splitlines()[0].startswith('film: 30 frame') and stream.getvalue().count('\n') == 4
    )


def test_a_training_in_a_pipe_writes_lines(tmp_path):
    "No character that moves a cursor, in either stream, and the last line has the end"
    words = ['train', '--data', DATA, '--iters', '2', '--threads', '1', '-o', 'run', *SMALL, 'run.test=false']
    done = subprocess.run(
        [sys.executable, '-m', 'semidetr.cli', *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert '\r' not in done.stdout + done.stderr and '\x1b' not in done.stdout + done.stderr
    assert re.search(r'^run: 2/2 it, \d+ s, loss=', done.stderr, re.M), done.stderr
    assert len(done.stderr.splitlines()) <= 3, done.stderr


# --- model card ------------------------------------------------------------------------------------
def test_every_run_has_a_card(run):
    text = (run.folder / 'card.md').read_text()
    result = json.loads((run.folder / 'run.json').read_text())
    assert text == card.model_card(result) == run.card
    for words in ('## Data', '## Training', '## Metrics', '## Limits', result['hash'], '| labelled | '):
        assert words in text
    assert '| method.name | mean\\_teacher | supervised |' in text
    assert 'No test split was measured' in text and 'The development part has 4 images' in text


def test_a_card_shows_names_as_they_are():
    "Whatever a class is called, the tables keep their columns and nothing becomes HTML"
    names = ['a|b', '<script>x</script>', '`c`', '[d](e)', 'f\ng', '@fig-x', '$x$', '&amp;', '\x1b[2J']
    result = json.loads(
        json.dumps(
            dict(
                name='n|m',
                hash='h',
                config=to_dict(preset('digits')),
                versions={},
                iterations=1,
                seconds=1.0,
                data=dict(classes=names, labelled=1, unlabelled=0, dev=5, val=0),
                metrics=dict(
                    dev=dict(teacher=dict(AP=1.0, per_class={n: dict(AP=1.0, AP50=1.0) for n in names}))
                ),
            )
        )
    )
    text = card.model_card(result)
    for line in text.splitlines():
        if line.startswith('|'):
            assert len(re.findall(r'(?<!\\)\|', line)) in (3, 4, 5, 7), line
    assert '<' not in text.replace('&lt;', '') and '\x1b' not in text and '\\[d\\](e)' in text
    assert '\\@fig-x' in text and '&amp;amp;' in text


def test_limits_are_those_of_the_numbers():
    teacher = dict(
        AP=20.0, AP_nms=20.5, per_class=dict(a=dict(AP=30.0), b=dict(AP=5.0), c=dict(AP=float('nan')))
    )
    result = dict(data=dict(dev=200, val=300), metrics=dict(dev={}, val=dict(teacher=teacher)))
    lines = card.limits_of(result)
    assert not any('No test split' in x or 'uncertain' in x or 'duplicates' in x for x in lines)
    assert any(x.startswith('Less than half') and x.endswith(' b.') for x in lines)
    assert any(x.startswith('Not measured') and x.endswith(' c.') for x in lines)
    teacher['AP_nms'] = 25.0
    assert any('suppression (nms=0.6) adds 5.0 AP' in x for x in card.limits_of(result))
    assert card.limits_of(dict(data={}, metrics={}))[0].startswith('No test split')


# --- loggers ---------------------------------------------------------------------------------------
@pytest.fixture
def wandb(monkeypatch):
    "A stand-in for the program: what it was given"
    calls = []
    run = SimpleNamespace(
        id='w1',
        define_metric=lambda *a, **k: calls.append(('metric', a, k)),
        log=lambda numbers: calls.append(('log', numbers)),
        finish=lambda: calls.append(('finish',)),
    )
    module = ModuleType('wandb')
    module.init = lambda **k: calls.append(('init', k)) or run
    monkeypatch.setitem(sys.modules, 'wandb', module)
    monkeypatch.delenv('WANDB_PROJECT', raising=False)
    return calls


@pytest.fixture
def mlflow(monkeypatch):
    calls, module = [], ModuleType('mlflow')

    def start_run(run_id, run_name):
        calls.append(('start', run_id, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id='m1'))

    module.start_run = start_run
    module.log_params = lambda params: calls.append(('params', params))
    module.log_metrics = lambda numbers, step: calls.append(('metrics', numbers, step))
    module.end_run = lambda: calls.append(('end',))
    monkeypatch.setitem(sys.modules, 'mlflow', module)
    return calls


def test_both_programs_get_the_numbers_of_a_run(mlflow, wandb, tmp_path):
    "Settings once, each row of the log, metrics at the end; a resumed run keeps its name"
    options = dict(data=DATA, iters=2, threads=1, settings=[*SMALL, 'run.test=false', 'run.log_every=1'])
    run = semidetr.train(**options, out=tmp_path / 'r', log='mlflow, WandB', progress=False, say=None)
    rows = [json.loads(x) for x in (tmp_path / 'r' / 'log.jsonl').read_text().splitlines()]
    sent = [c for c in mlflow if c[0] == 'metrics']
    assert [(n, s) for _, n, s in sent[:-1]] == [
        ({k: v for k, v in r.items() if k != 'step'}, r['step']) for r in rows
    ]
    assert sent[-1][2] == 2 and sent[-1][1]['dev/teacher/AP'] == run.metrics['dev']['teacher']['AP']
    assert [c[1] for c in wandb if c[0] == 'log'] == [n | dict(iteration=s) for _, n, s in sent]
    assert mlflow[0] == ('start', None, 'r') and mlflow[-1] == ('end',) and wandb[-1] == ('finish',)
    parameters = {k: v for c in mlflow if c[0] == 'params' for k, v in c[1].items()}
    assert parameters['optim.iters'] == '2' and all(len(c[1]) <= 100 for c in mlflow if c[0] == 'params')
    assert wandb[0][1]['config']['optim.iters'] == 2 and wandb[0][1]['project'] == 'semidetr'
    assert list((tmp_path / 'r').glob('events.out.tfevents.*')), 'TensorBoard is always on'
    mlflow.clear()
    wandb.clear()
    RunLog(tmp_path / 'r', 1, loggers.read_loggers(['wandb', 'mlflow']), {'a': 1}).close()
    assert mlflow == [('start', 'm1', 'r'), ('end',)] and wandb[0][1]['id'] == 'w1'


def test_a_program_that_is_missing_or_fails(monkeypatch, mlflow, tmp_path, shell):  # noqa: F811
    monkeypatch.setitem(sys.modules, 'wandb', None)
    code, _, err = shell('train', '--data', DATA, '--log', 'wandb', '-o', tmp_path / 'r')
    assert code == 2 and "pip install 'semidetr[wandb]'" in err and err.count('\n') == 1
    assert not (tmp_path / 'r').exists()
    with pytest.raises(ConfigError, match="'walmb' is unknown"):
        loggers.read_loggers('walmb')

    class Broken(loggers.Logger):
        def write(self, numbers, step):
            raise OSError('no answer\nfrom the server')

    with pytest.warns(UserWarning, match='Broken: no answer; left out') as told:
        log = RunLog(tmp_path / 'q', 0, [Broken])
        for n in (1, 2):
            log.write(dict(step=n, loss=1.0))
        log.close()
    assert len(told) == 1 and (tmp_path / 'q' / 'log.jsonl').read_text().count('\n') == 2
    monkeypatch.setattr(sys.modules['mlflow'], 'start_run', lambda **k: 1 / 0)
    with pytest.warns(UserWarning, match='MLflow: division'):
        assert len(loggers.Loggers([loggers.MLflow], tmp_path, 0, {}).open) == 0
    assert TINY
