"One-line entry: same settings, same hash and same run as the commands; the old names keep working"

import contextlib
import inspect
import io
import json
import subprocess
import sys
import pytest
import semidetr
from semidetr.cli import commands as cli
from semidetr.cli import training, use
from semidetr.core import ConfigError, DataError
from semidetr.data.catalog import open_dataset
from semidetr.train import api
from semidetr.train.config import config_hash, from_dict, to_dict
from semidetr.train.metrics import evaluate as coco_metrics
from test_cli import FAST, make_coco, make_folder

NAMES = ('data', 'unlabelled', 'val', 'method', 'preset', 'percent', 'count', 'split_file', 'iters', 'seed')


def shell(*args):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as e:
        cli.main([str(a) for a in args])
    return e.value.code, out.getvalue()


@pytest.fixture(scope='module')
def coco(tmp_path_factory):
    return make_coco(tmp_path_factory.mktemp('api') / 'shapes', 12, 3)


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp('api') / 'photos')


@pytest.fixture(scope='module')
def run(tmp_path_factory, coco):
    out = tmp_path_factory.mktemp('api') / 'run'
    options = dict(percent=50, method='mean_teacher', threads=1, settings=FAST)
    return semidetr.train(data=coco, out=out, progress=False, say=None, **options)


def options_of(*args):
    "Words of the command line for keywords of the call"
    words, settings = [], []
    for k, v in dict(*args).items():
        if k == 'settings':
            settings = v
        else:
            words += [f"--{k.replace('_', '-')}", str(v)]
    return [*words, *settings]


@pytest.mark.parametrize(
    'options',
    [
        dict(),
        dict(percent=10),
        dict(percent=10, method='semi_detr', seed=3),
        dict(count=5, method='mean_teacher', iters=900),
        dict(preset='coco-5', data='COCO', method='semi_detr'),
        dict(data='COCO', unlabelled='PHOTOS'),
        dict(data='COCO', count=4, settings=['optim.lr=0.002', 'data.dev=1', 'view.short_sides=[64,80]']),
        dict(data='COCO', config='FILE', iters=7),
    ],
    ids=lambda o: ' '.join(o) or 'nothing',
)
def test_a_command_and_a_call_make_the_same_run(options, coco, photos, tmp_path):
    "Same configuration, so same hash; the derived settings too"
    file = tmp_path / 'c.toml'
    file.write_text('[data]\ndev = 3\n[optim]\niters = 9\nlr = 0.5\n')
    places = dict(COCO=str(coco), PHOTOS=str(photos), FILE=str(file))
    options = {k: places.get(v, v) if isinstance(v, str) else v for k, v in options.items()}
    code, text = shell('train', '--show-config', *options_of(options))
    assert code == 0, text
    plan = api.plan_run(**options, threads=0)
    assert to_dict(plan.cfg) == json.loads(text)
    assert config_hash(plan.cfg) == config_hash(from_dict(json.loads(text)))


def test_the_two_signatures_agree():
    "Every option of a command is one of the call, with the same default"
    of = lambda fn: inspect.signature(fn).parameters
    call, command = of(api.train), of(training.train)
    for name in NAMES:
        assert call[name].default == command[name].default, name
    assert set(command) - set(call) == {'quiet', 'show_config'}
    assert set(call) - set(command) == {'progress', 'say'}
    assert str(call['out'].default) == str(command['out'].default)
    call, command = of(api.predict), of(use.predict)
    for name in ('threshold', 'which', 'device', 'batch', 'draw'):
        assert call[name].default == command[name].default, name
    assert of(api.open_predictor)['threshold'].default == command['threshold'].default
    assert of(semidetr.Predictor.__init__)['threshold'].default == command['threshold'].default
    assert set(command) - set(call) == {'quiet'} and set(call) - set(command) == {'progress'}
    assert list(of(semidetr.train)) == list(of(api.train))


def test_settings_as_a_dict(coco):
    as_list = ['optim.lr=0.002', 'run.test=false', 'optim.steps=[10, 20]', 'optim.schedule=step']
    as_dict = {'optim.lr': 0.002, 'run.test': False, 'optim.steps': [10, 20], 'optim.schedule': 'step'}
    a, b = (api.plan_run(data=str(coco), settings=s).cfg for s in (as_list, as_dict))
    assert a == b and a.optim.steps == (10, 20)
    nested = api.plan_run(data=str(coco), config=dict(optim=dict(lr=0.002))).cfg
    assert nested == api.plan_run(data=str(coco), settings={'optim.lr': 0.002}).cfg
    mine = api.plan_run(data=str(coco), config=dict(data=dict(dev=1))).cfg
    assert mine.data.dev == 1, 'a setting of the dict is not adapted to the data'


def test_train_returns_the_run(run, coco, capsys):
    stored = json.loads((run.folder / 'run.json').read_text())
    assert run.hash == stored['hash'] and run.classes == ['disc', 'bar']
    assert set(run.metrics) == {'dev', 'val'} and {'teacher', 'student'} == set(run.metrics['val'])
    assert config_hash(run.config) == run.hash
    assert 'val AP' in repr(run)
    stamp = (run.folder / 'last.pt').stat().st_mtime_ns
    options = dict(percent=50, method='mean_teacher', threads=1, settings=FAST, progress=False)
    again = semidetr.train(data=coco, out=run.folder, **options)
    assert again.hash == run.hash and (run.folder / 'last.pt').stat().st_mtime_ns == stamp
    assert 'this run is finished' in capsys.readouterr().out
    words = ['--percent', 50, '--method', 'mean_teacher', '--threads', 1, '-q', '-o', run.folder, *FAST]
    code, _ = shell('train', '--data', coco, *words)
    assert code == 0 and (run.folder / 'last.pt').stat().st_mtime_ns == stamp, 'the command finds the run'


def test_a_run_is_opened_again(run, tmp_path):
    assert semidetr.Run(run.folder).classes == run.classes
    for text in ('', '[]', '{"hash": 1}'):
        (tmp_path / 'run.json').write_text(text)
        with pytest.raises(DataError, match='run.json.*damaged'):
            semidetr.Run(tmp_path)
    with pytest.raises(DataError, match='not finished'):
        semidetr.Run(tmp_path / 'none')


@pytest.mark.parametrize(
    'options,words',
    [
        (dict(percent=120), r'120 is outside'),
        (dict(percent=5, count=3), 'one of'),
        (dict(iters=0), 'at least 1'),
        (dict(method='mean_teecher'), "did you mean 'mean_teacher'"),
        (dict(settings=['optim.irts=3']), "did you mean 'optim.iters'"),
        (dict(settings={'optim.iters': 'many'}), 'must be int'),
        (dict(method='mean_teacher'), 'needs unlabelled images'),
        (dict(unlabelled='no/where'), 'no/where'),
        (dict(device='gpu'), "'gpu'"),
    ],
    ids=str,
)
def test_mistakes_leave_nothing(options, words, coco, tmp_path):
    with pytest.raises((ConfigError, DataError), match=words):
        semidetr.train(data=coco, out=tmp_path / 'r', progress=False, say=None, **options)
    assert not (tmp_path / 'r').exists()


def test_evaluate_is_what_the_command_prints(run, tmp_path):
    code, _ = shell('eval', '--run', run.folder, '-q', '-o', tmp_path / 'm.json')
    assert code == 0
    stored = json.loads((tmp_path / 'm.json').read_text())
    for given in (run, run.folder, str(run.folder)):
        scores = semidetr.evaluate(given)
        for who in ('teacher', 'student'):
            assert scores[who]['AP'] == stored[who]['AP']
            assert scores[who]['AP'] == pytest.approx(run.metrics['val'][who]['AP'], abs=1e-6)
    with pytest.raises(ConfigError, match='val, dev, train'):
        semidetr.evaluate(run, part='all')


def test_evaluate_of_detections_as_before():
    "The call of the metrics: data set and detections, by place or by name"
    ds = open_dataset('digits:n=4,size=64', 'val')
    found = {}
    for i, image_id in enumerate(ds.ids):
        a = ds.annotation(i)
        ones = a['boxes'].new_ones(len(a['boxes']))
        found[image_id] = dict(boxes=a['boxes'] + 2, labels=a['labels'], scores=ones)
    brief = coco_metrics(ds, found, True)
    assert 0 < brief['AP'] < 100 and set(brief) == {'AP', 'AP50'}
    assert semidetr.evaluate(ds, found, True) == brief
    assert semidetr.evaluate(ds, found, brief=True) == brief
    assert semidetr.evaluate(ds=ds, detections=found, brief=True) == brief
    assert semidetr.evaluate(ds, found)['AP'] == brief['AP']
    assert semidetr.evaluate(ds, {})['AP'] == 0
    with pytest.raises(ConfigError, match='give a run'):
        semidetr.evaluate()


def test_a_package_that_can_be_called():
    "`semidetr.train` is a function and a package, whichever is used first, and costs nothing to import"
    for first in ('import semidetr.train.config', 'from semidetr.train import config', 'pass'):
        code = (
            f'import sys, semidetr\n{first}\n'
            "assert callable(semidetr.train) and 'semidetr.train.api' not in sys.modules\n"
            'import semidetr.train.optim, inspect\n'
            "assert semidetr.train.optim.lr_factor and semidetr.train is sys.modules['semidetr.train']\n"
            "assert list(inspect.signature(semidetr.train).parameters)[0] == 'data'\n"
            'from semidetr import train, Trainer\nassert train is semidetr.train\n'
            "assert {'train', 'predict', 'evaluate', 'Run'} <= set(dir(semidetr))"
        )
        done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_documented_and_typed():
    for fn in (api.train, api.predict, api.evaluate):
        assert fn.__doc__ and all(
            p.annotation is not p.empty or p.name in ('run', 'ds')
            for p in inspect.signature(fn).parameters.values()
        )
