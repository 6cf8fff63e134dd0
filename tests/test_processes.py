"A run on another number of processes: the numbers of an unbroken one, or a refusal with a cure."

import dataclasses, json, shutil, warnings
from pathlib import Path
import pytest, torch
from rivals import whole_of
from test_many import share, whole
from test_trainer import TINY, run, tiny
from together import run_together
from semidetr.core import ConfigError, Note, is_main
from semidetr.semi.methods import METHODS
from semidetr.train import processes as P
from semidetr.train.api import plan_run, run_plan
from semidetr.train.checkpoint import load_checkpoint
from semidetr.train.config import override, to_dict, with_detector
from semidetr.train.trainer import Trainer

STOP = 3


def settings(world, *more):
    "Both stages; the run is stopped between two lines of the log. At a usual rate AdamW enlarges rounding"
    items = ['method.T1=2', 'optim.iters=6', 'run.log_every=2', 'optim.lr=1e-6', 'data.dev=0', *more]
    return share(whole('semi_detr', *items), world)


def lines(folder):
    return [json.loads(x) for x in (Path(folder) / 'log.jsonl').read_text().splitlines()]


def told(cfg, folder):
    "Lines that are said when a run goes on, and the trainer"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        trainer = Trainer(cfg, folder, progress=False)
    return [str(w.message) for w in said], trainer


def on_two(folder):
    "What two processes do: an unbroken run, a stopped one, and one that a single process began"
    Trainer(settings(2), folder / 'two', progress=False).fit()
    Trainer(settings(2), folder / 'stopped two', progress=False).fit(until=STOP)
    refusal = ''
    try:
        Trainer(settings(1), folder / 'stopped one', progress=False)
    except ConfigError as e:
        refusal = str(e)
    said, trainer = told(settings(2), folder / 'one on two')
    trainer.fit()
    if is_main():
        (folder / 'said.json').write_text(json.dumps(dict(refusal=refusal, said=said)))


WORKER = """
from pathlib import Path
import test_processes
from semidetr.core import start_processes
start_processes()
test_processes.on_two(Path(sys.argv[1]))
"""


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')
    run(settings(1), folder / 'one')
    Trainer(settings(1), folder / 'stopped one', progress=False).fit(until=STOP)
    shutil.copytree(folder / 'stopped one', folder / 'one on two')
    run_together(WORKER, folder)
    return folder


def assert_same(a, b, begun):
    "Logs and weights of two runs agree to 1e-5; a mean score is one of the means of the processes"
    one, two = lines(a), lines(b)
    assert len(one) == len(two) == 3
    for x, y in zip(one, two):
        assert x.keys() == y.keys()
        for name, rel in (('pseudo_score', 1e-2), ('cost_threshold', 1e-4)):  # of a fit, in single precision
            assert x.pop(name, 0) == pytest.approx(y.pop(name, 0), rel=rel)
        assert x == pytest.approx(y, rel=1e-5, abs=1e-5, nan_ok=True)
    one, two = load_checkpoint(a), load_checkpoint(b)
    for network in ('student', 'teacher'):
        first, second = flat(one[network]), flat(two[network])
        assert (first - second).norm() <= 1e-5 * second.norm()
    moved = flat(two['student']) - flat(load_checkpoint(begun)['student'])
    assert (flat(one['student']) - flat(two['student'])).norm() <= 0.01 * moved.norm()


def flat(weights):
    "Without projections that group norm follows: on a map of one pixel their gradient is rounding alone"
    return torch.cat([x.flatten().double() for k, x in weights.items() if not k.startswith('input_proj')])


def test_one_process_goes_on_with_the_run_of_two(runs, tmp_path):
    folder = shutil.copytree(runs / 'stopped two', tmp_path / 'r')
    said, trainer = told(settings(1), folder)
    assert len(said) == 1 and said[0].endswith(
        'was trained by 2 processes until iteration 3, is continued by 1 with as many images per step: the '
        'same numbers, up to rounding'
    )
    assert len(trainer.recent) == 1 and len(trainer.health.rows) == STOP
    trainer.fit()
    assert_same(folder, runs / 'two', runs / 'stopped two')


def test_two_processes_go_on_with_the_run_of_one(runs):
    assert_same(runs / 'one on two', runs / 'one', runs / 'stopped one')
    said = json.loads((runs / 'said.json').read_text())
    assert any('was trained by 1 process until iteration 3, is continued by 2' in x for x in said['said'])
    assert 'take 8 and 8; go on with 1 process, or with loader.n_labelled=2' in said['refusal']
    assert load_checkpoint(runs / 'one on two')['world'] == 2


def test_the_same_command_with_fewer_processes_is_refused(runs, tmp_path):
    "It would take half as many images per step"
    folder = shutil.copytree(runs / 'stopped two', tmp_path / 'r')
    with pytest.raises(ConfigError) as e:
        Trainer(settings(2), folder, progress=False)
    text = str(e.value)
    assert '\n' not in text and '4 labelled and 4 unlabelled images per step' in text
    assert 'go on with 2 processes, or with loader.n_labelled=4 loader.n_unlabelled=4' in text
    with pytest.raises(ConfigError, match='other settings.*optim.lr'):
        Trainer(settings(1, 'optim.lr=1e-3'), folder, progress=False)
    assert load_checkpoint(folder)['step'] == STOP


@pytest.mark.parametrize('name', ['last.rank1.pt'])
def test_a_conversion_needs_every_part(runs, tmp_path, name):
    folder = shutil.copytree(runs / 'stopped two', tmp_path / 'r')
    (folder / name).unlink()
    with pytest.raises(Exception, match='part of process 1.*is gone.*no generation before it') as e:
        Trainer(settings(1), folder, progress=False)
    assert '\n' not in str(e.value)


def detr(dropout):
    return override(
        with_detector(whole('mean_teacher'), 'detr'),
        [f'detector.dropout={dropout}', 'detector.num_queries=20'],
    )


BOUND = {
    'loader.ratio=binomial': lambda: whole('mean_teacher', 'loader.ratio=binomial'),
    'criterion.normalise=process': lambda: whole('mean_teacher', 'criterion.normalise=process'),
    'consistency.normalise=process': lambda: whole('semi_detr', 'consistency.normalise=process'),
    'mixing with earlier views': lambda: whole(
        'mean_teacher', 'mixing.mixup=0.5', 'view.erase_patches=[0,0]'
    ),
    'dropout': lambda: detr(0.1),
    'random regions': lambda: whole_of('soft_teacher'),
}


@pytest.mark.parametrize('name', BOUND)
def test_what_belongs_to_a_process_is_refused(name, tmp_path):
    cfg = BOUND[name]()
    trainer = Trainer(cfg, tmp_path, progress=False)
    bound = P.bound_to_processes(trainer.cfg, trainer.student, trainer.method)
    assert bound == [name]
    with pytest.raises(ConfigError, match=f'{name} belongs to a process.*go on with 2 processes.*run.init='):
        P.check_processes(cfg, dict(world=2, step=3, config=to_dict(share(cfg, 2))), 'r', bound, 1)


@pytest.mark.parametrize('method', [m for m in METHODS if m != 'soft_teacher'])
def test_nothing_else_belongs_to_a_process(method, tmp_path):
    "With the settings in which two processes take the step of one, for every method that draws nothing"
    trainer = Trainer(whole_of(method), tmp_path, progress=False)
    assert P.bound_to_processes(trainer.cfg, trainer.student, trainer.method) == []
    supervised = whole('supervised', 'loader.ratio=binomial')
    assert P.bound_to_processes(supervised, trainer.student, trainer.method) == []


def test_images_that_cannot_be_shared_have_one_cure():
    cfg = tiny('loader.n_labelled=3', 'loader.n_unlabelled=2', 'loader.ratio=fixed')
    saved = dict(world=1, step=3, config=to_dict(cfg))
    with pytest.raises(ConfigError, match='go on with 1 process$'):
        P.check_processes(cfg, saved, 'r', [], 2)
    other = dataclasses.replace(cfg, loader=dataclasses.replace(cfg.loader, n_labelled=1, n_unlabelled=1))
    assert P.as_before(other, saved, 2) == other


def test_a_generation_without_a_number_of_processes_is_of_an_older_version():
    cfg = tiny()
    assert P.as_before(cfg, dict(config=to_dict(cfg)), 2) == cfg
    assert P.check_processes(cfg, dict(config=to_dict(cfg), step=1), 'r', [], 2) == ''


def test_a_row_of_all_processes():
    rows = [dict(loss_a=2.0, x=1.0, pseudo_tp=3), dict(x=3.0, pseudo_tp=1, y=5.0)]
    assert P.row_of_all(rows) == dict(loss_a=1.0, x=2.0, pseudo_tp=4.0, y=5.0)


def test_images_that_any_process_has_skipped_count_in_each():
    parts = [dict(recent=[], health=dict(rows=[], warned=False), broken=x) for x in ([4, 1], [1, 7])]
    assert P.joined(parts)['broken'] == P.joined(parts, is_first=False)['broken'] == [1, 4, 7]


def test_a_finished_run_of_other_processes_is_said(tmp_path, monkeypatch):
    "The same command with another number of processes shows the result, and whose it is"
    folder = tmp_path / 'r'
    plan = plan_run('digits', None, [*TINY, 'optim.iters=1', 'run.test=false', 'data.dev=0'], '')
    with warnings.catch_warnings():
        warnings.simplefilter('error', Note)
        result = run_plan(plan, folder, False).result
        assert run_plan(plan, folder, False).result['hash'] == result['hash']
    (folder / 'run.json').write_text(json.dumps(result | dict(processes=2)))
    with pytest.warns(
        Note, match='r: is finished, and the result is that of 2 processes; this command has 1'
    ):
        run_plan(plan, folder, False)
    monkeypatch.setenv('WORLD_SIZE', '2')
    with warnings.catch_warnings():
        warnings.simplefilter('error', Note)
        run_plan(plan, folder, False)
