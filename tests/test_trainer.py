"Whole runs of a tiny detector: learning, exact resume, evidence of failures, several processes"

import json, os, signal, subprocess
import pytest, torch
from semidetr.detectors.contract import build_detector
from semidetr.train import trainer as T
from semidetr.train.checkpoint import git_commit, load_checkpoint
from semidetr.train.config import override, preset
from semidetr.core import ConfigError, SemiDETRError
from semidetr.train.health import HealthMonitor
from semidetr.matching.matching import NonFiniteError
from semidetr.train.optim import build_optimizer, lr_factor
from semidetr.lab.study import finished, paired, paired_difference, run_config
from together import run_together

TINY = [
    'data.data=digits:n=40,size=64',
    'data.val=digits:n=6,size=64',
    'data.count=6',
    'data.dev=4',
    'view.short_sides=[64]',
    'view.eval_short=64',
    'run.threads=1',
    'detector.transformer.d_model=32',
    'detector.transformer.ffn=32',
    'detector.transformer.n_heads=4',
    'detector.transformer.dec_layers=2',
    'detector.transformer.num_queries=20',
    'detector.backbone.weights=none',
    'detector.denoising.num=8',
    'loader.num_workers=0',
    'loader.n_labelled=2',
    'loader.n_unlabelled=2',
    'method.burn_in_iters=2',
    'pseudo.threshold=0.005',
    'optim.iters=6',
    'run.log_every=2',
    'run.checkpoint_every=3',
]


def tiny(*more, method='mean_teacher'):
    return override(preset('digits'), [f'method.name={method}', *TINY, *more])


def stop_after(trainer, steps):
    "Let the process get the signal of Ctrl-C in the last of so many steps, which is still completed"
    real = trainer.method.step

    def step(*args):
        if args[-1] + 1 == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    trainer.method.step = step


def run(cfg, folder):
    return T.Trainer(cfg, folder, progress=False).fit()


def weights(folder):
    return load_checkpoint(folder)


def same(a, b):
    return all(torch.equal(a[w][k], b[w][k]) for w in ('student', 'teacher') for k in a[w])


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs') / 'whole'
    return folder, run(tiny(), folder)


def test_run_json_tells_all(whole):
    folder, r = whole
    assert json.loads((folder / 'run.json').read_text()) == json.loads(json.dumps(r))
    assert {
        'hash',
        'config',
        'versions',
        'commit',
        'device',
        'data',
        'seconds',
        'cpu_seconds',
        'peak_memory_mb',
        'metrics',
    } <= r.keys()
    assert (
        set(r['metrics']) == {'dev', 'val'}
        and set(r['metrics']['val']) == {'teacher', 'student'}
        and r['iterations'] == 6
    )
    rows = [json.loads(l) for l in (folder / 'log.jsonl').read_text().splitlines()]
    assert (
        [x['step'] for x in rows] == [2, 4, 6]
        and 'pseudo_recall' in rows[-1]
        and rows[-1]['pseudo_boxes'] > 0
    )
    assert list(folder.glob('events.*'))


@pytest.mark.parametrize('stop,workers', [(1, 0), (3, 2), (5, 0)])
def test_exact_resume(whole, tmp_path, stop, workers):
    "Stopped in the burn-in, after it, with worker processes: weights, log and metrics of an unbroken run"
    folder = tmp_path / 'r'
    t = T.Trainer(tiny(f'loader.num_workers={workers}'), folder, progress=False)
    stop_after(t, stop)
    with pytest.raises(KeyboardInterrupt, match='same command'):
        t.fit()
    assert load_checkpoint(folder)['step'] == stop and not (folder / 'run.json').exists()
    torch.manual_seed(123)  # whatever the process did meanwhile
    again = run(tiny(f'loader.num_workers={workers}'), folder)
    assert (
        same(weights(folder), weights(whole[0]))
        and (folder / 'log.jsonl').read_text() == (whole[0] / 'log.jsonl').read_text()
    )
    assert again['metrics'] == whole[1]['metrics'] or str(again['metrics']) == str(whole[1]['metrics'])


def test_same_seed_same_numbers_other_seed_other(whole, tmp_path):
    run(tiny(), tmp_path / 'a')
    run(tiny('run.seed=1'), tmp_path / 'b')
    assert same(weights(tmp_path / 'a'), weights(whole[0])) and not same(
        weights(tmp_path / 'b'), weights(whole[0])
    )


def test_finished_runs_are_not_repeated(whole):
    assert (
        finished(tiny(), whole[0]) == json.loads((whole[0] / 'run.json').read_text())
        and finished(tiny('run.seed=1'), whole[0]) is None
    )
    with pytest.raises(ConfigError, match='run.seed: 0 -> 1'):
        run_config(tiny('run.seed=1'), whole[0], progress=False)


def test_nan_is_caught_named_and_kept(tmp_path):
    t = T.Trainer(tiny(method='supervised'), tmp_path / 'r', progress=False)
    real = t.method.step

    def broken(student, teacher, batch, step):
        result = real(student, teacher, batch, step)
        if step == 2:
            result.losses['loss_l1'] = result.losses['loss_l1'] * float('nan')
        return result

    t.method.step = broken
    with pytest.raises(NonFiniteError, match='iteration 2.*loss_l1.*images'):
        t.fit()
    kept = load_checkpoint(tmp_path / 'r' / 'failed_step_2.pt')
    assert (
        kept['step'] == 2
        and kept['batches'][0]['labelled']['images'].ndim == 4
        and {'rng', 'student', 'optimizer'} <= kept.keys()
    )


def test_accumulation_counts_steps(tmp_path):
    r = run(tiny('optim.accumulate=2', 'optim.iters=2', method='supervised'), tmp_path / 'r')
    assert r['iterations'] == 2


def test_schedules():
    o = lambda **k: override(preset('digits'), [f'optim.{a}={b}' for a, b in k.items()]).optim
    assert lr_factor(0, o(warmup=9)) == pytest.approx(0.1) and lr_factor(9, o(warmup=9)) == 1
    assert lr_factor(50, o(schedule='cosine', iters=100)) == pytest.approx(0.5)
    steps = o(schedule='step', steps='[10,20]')
    assert [round(lr_factor(t, steps), 6) for t in (9, 10, 20)] == [1, 0.1, 0.01]
    with pytest.raises(ConfigError, match='cosine'):
        lr_factor(0, o(schedule='linear'))


def test_backbone_gets_its_own_rate():
    t = build_optimizer(
        build_detector(T.resolve(tiny(), list('0123456789')).detector),
        tiny('optim.lr=1e-3', 'optim.backbone_mult=.2').optim,
    )
    assert sorted(g['lr'] for g in t.param_groups) == pytest.approx([2e-4, 1e-3]) and all(
        p.requires_grad for g in t.param_groups for p in g['params']
    )


def test_health_warns_once_and_measures_against_hidden_truth():
    class Truth:
        has_boxes = True

        def index_of(self, i):
            return i

        def annotation(self, i):
            return dict(
                boxes=torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]]),
                labels=torch.tensor([0, 1]),
                ignore=torch.tensor([False, False]),
            )

    base = dict(pseudo_boxes=1.0, labelled_boxes=2.0, pseudo_score=0.5, empty_images=0.0, top_score=0.5)
    h = HealthMonitor(Truth(), window=3)
    hit = dict(image_id=0, boxes=torch.tensor([[0.0, 0, 10, 9]]), labels=torch.tensor([0]))
    wrong = dict(hit, labels=torch.tensor([1]))
    h.add(base, dict(pseudo=[hit]))
    h.add(base, dict(pseudo=[wrong]))
    assert h.summary()['pseudo_precision'] == 0.5 and h.summary()['pseudo_recall'] == 0.25
    silent = {**base, 'pseudo_boxes': 0.0, 'top_score': 0.1}
    nothing = [dict(image_id=0, boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))]
    messages = [h.add(silent, dict(pseudo=nothing)) for _ in range(6)]
    assert [m is not None for m in messages] == [False, False, True, False, False, False]
    assert 'pseudo.threshold' in messages[2]


def test_health_of_a_checkpoint_with_rows_by_position():
    "Version 0.1.0 kept lists; a run that it began is continued"
    h = HealthMonitor(window=3)
    h.load_state_dict(dict(rows=[[2.0, 4.0, 0.5, 0.0, 0.9, 3, 4, 6, 2, 3, 1, 5]], warned=False))
    summary = h.summary()
    assert (summary['pseudo_boxes'], summary['pseudo_precision'], summary['pseudo_recall']) == (
        2.0,
        0.75,
        0.5,
    )
    assert (summary['mined_precision'], summary['initial_recall']) == (2 / 3, 1 / 6)


def test_health_of_scenes_that_are_truly_empty():
    "Boxes where nothing is: precision 0, no recall, and no division by the objects that there are not"

    class Truth:
        has_boxes = True

        def index_of(self, i):
            return i

        def annotation(self, i):
            return dict(
                boxes=torch.zeros(0, 4),
                labels=torch.zeros(0, dtype=torch.long),
                ignore=torch.zeros(0, dtype=torch.bool),
            )

    h = HealthMonitor(Truth(), window=3)
    some = [dict(image_id=0, boxes=torch.tensor([[0.0, 0, 10, 9]]), labels=torch.tensor([0]))]
    scalars = dict(pseudo_boxes=1.0, labelled_boxes=2.0, pseudo_score=0.5, empty_images=0.0, top_score=0.5)
    h.add(scalars, dict(pseudo=some, mined=some, initial=some))
    said = h.summary()
    assert all(
        said[f'{k}_precision'] == 0 and said[f'{k}_recall'] != said[f'{k}_recall']
        for k in ('pseudo', 'mined', 'initial')
    )
    json.dumps(said)


def test_log_averages_over_the_steps_that_have_a_number(tmp_path):
    "A step without boxes has no cost threshold, which is not a threshold of 0; a missing loss is 0"
    lines, steps = [], [dict(loss=4.0, loss_con=2.0, cost_threshold=-3.0), dict(loss=2.0)]

    class Log:
        def write(self, row):
            lines.append(row)

    t = T.Trainer(tiny('run.eval_every=0'), tmp_path / 'r', progress=False)
    for s in steps:
        t.step += 1
        t.count(s, {}, Log())
    assert (lines[0]['loss'], lines[0]['loss_con'], lines[0]['cost_threshold']) == (3.0, 1.0, -3.0)


def test_labelled_and_unlabelled_and_dev_never_meet():
    d = T.build_data(tiny().data)
    parts = [set(d.split.labelled), set(d.split.unlabelled), set(d.split.dev)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 40 and [len(p) for p in parts] == [6, 30, 4]
    assert len(d.unlabelled[0].boxes) == 0


def test_unlabelled_folder_joins_the_images_without_labels(tmp_path):
    from PIL import Image

    for i in range(3):
        Image.new('RGB', (40, 40), (i, 0, 0)).save(tmp_path / f'{i}.png')
    d = T.build_data(tiny(f'data.unlabelled={tmp_path}').data)
    assert len(d.unlabelled) == 30 + 3 and len(set(d.unlabelled.ids)) == 33 and d.truth is None
    assert all(
        len(d.unlabelled[i].boxes) == 0 and len(d.unlabelled.annotation(i)['labels']) == 0
        for i in (0, 29, 30, 32)
    )


def test_own_test_split_of_a_voc_folder_and_none_of_a_single_file(tmp_path):
    from test_cli import make_voc
    from semidetr.train.config import DataConfig
    from semidetr.data.catalog import open_dataset
    from semidetr.train.run_data import test_split

    val, why = test_split(DataConfig(data=str(make_voc(tmp_path / 'v'))))
    assert not why and not set(val.ids) & set(open_dataset(str(tmp_path / 'v'), 'train').ids)


def test_best_weights_are_kept_and_load(tmp_path):
    from semidetr.train.predict import load_model

    t = T.Trainer(tiny('run.eval_every=3', method='supervised'), tmp_path / 'r', progress=False)
    t.fit()
    best = max(t.history, key=lambda h: h['teacher']['AP'])
    kept = torch.load(tmp_path / 'r' / 'best.pt', weights_only=True)
    assert [h['step'] for h in t.history] == [3, 6] and kept['step'] == best['step']
    assert load_model(tmp_path / 'r' / 'best.pt')[2] == list('0123456789')


def test_cut_log_line_is_dropped(tmp_path):
    from semidetr.train.checkpoint import RunLog

    (tmp_path / 'log.jsonl').write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    RunLog(tmp_path, 2).close()
    assert (tmp_path / 'log.jsonl').read_text() == '{"step": 1}\n{"step": 2}\n'


def test_no_labelled_image_is_one_clear_error(tmp_path):
    with pytest.raises(SemiDETRError, match='40 development images'):
        T.Trainer(tiny('data.count=6', 'data.dev=40'), tmp_path / 'r', progress=False)


def test_paired_starts_from_one_checkpoint(tmp_path):
    base = tiny('run.test=false')
    out = paired(
        base,
        ['optim.iters=2'],
        dict(supervised=['method.name=supervised', 'optim.iters=1'], mean_teacher=['optim.iters=1']),
        tmp_path,
        seeds=(0, 1),
        workers=1,
        progress=False,
    )
    assert [r['seed'] for r in out] == [0, 1] and set(out[0]['arms']) == {'supervised', 'mean_teacher'}
    assert (
        'val' not in out[0]['burn_in']['metrics']
        and out[0]['burn_in']['config']['data']['fold'] == 0
        and out[1]['burn_in']['config']['data']['fold'] == 1
    )
    assert all('burn_in' in a['config']['run']['init'] for r in out for a in r['arms'].values())
    assert paired_difference([1.0, 2.0], [2.0, 4.0])['mean'] == 1.5


def test_overfits_two_images(tmp_path):
    "AP above .9 on the two images that it trains on"
    cfg = override(
        preset('digits'),
        [
            'data.data=digits:n=2,size=64',
            'data.dev=0',
            'data.count=0',
            'method.name=supervised',
            'run.test=false',
            'view.short_sides=[64]',
            'view.eval_short=64',
            'view.flip=0',
            'optim.iters=200',
            'optim.lr=2e-3',
            'loader.n_labelled=2',
            'loader.num_workers=0',
            'optim.schedule=cosine',
            'detector.transformer.num_queries=30',
            'ema.decay=.9',
        ],
    )
    t = T.Trainer(cfg, tmp_path / 'r', progress=False)
    t.fit()
    assert t.evaluate(t.data.labelled)['teacher']['AP'] > 90


WORKER = '''
import sys, torch
from semidetr.train.config import override, preset
from semidetr.train.trainer import Trainer
from test_trainer import tiny
t = Trainer(tiny({more}), sys.argv[1], progress=False); t.fit()
rank = __import__('os').environ['RANK']
torch.save([p.detach() for p in t.student.parameters()], f'{{sys.argv[1]}}/rank{{rank}}.pt')
'''


def test_two_processes_stay_equal(tmp_path):
    "torchrun with gloo: both processes end with the same weights, and one of them writes"
    run_together(WORKER.format(more="'optim.iters=4'"), tmp_path / 'r')
    a, b = (torch.load(tmp_path / 'r' / f'rank{i}.pt') for i in (0, 1))
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert (
        json.loads((tmp_path / 'r' / 'run.json').read_text())['processes'] == 2
        and (tmp_path / 'r' / 'last.rank1.pt').exists()
    )


@pytest.mark.parametrize('every', [0, 1])
def test_final_metrics_with_and_without_suppression(tmp_path, every):
    "Whether the last iteration was evaluated on the way or not"
    metrics = T.Trainer(
        tiny('optim.iters=1', f'run.eval_every={every}', method='supervised'), tmp_path, progress=False
    ).fit()['metrics']
    assert set(metrics) == {'dev', 'val'} and all(
        {'AP', 'AP_nms', 'AP50_nms'} <= set(m) for part in metrics.values() for m in part.values()
    )


CHOOSER = '''
import json, os, sys
import semidetr.train.machine as machine
from semidetr.lab.study import run_config
from test_trainer import tiny
machine.bf16_speed = lambda device: 2. if os.environ['RANK'] == '0' else .5
cfg = tiny('optim.iters=1', 'run.amp=auto', 'run.device=cpu', 'run.test=false', method='supervised')
result = run_config(cfg, sys.argv[1], progress=False)
open(sys.argv[1]+'/amp'+os.environ['RANK'], 'w').write(result['config']['run']['amp'])
'''


def test_processes_choose_one_precision(tmp_path):
    "Where the probe says one thing to one process and another to the other, the first decides for both"
    run_together(CHOOSER, tmp_path / 'r')
    assert [(tmp_path / 'r' / f'amp{i}').read_text() for i in (0, 1)] == ['bf16', 'bf16']


STOPPER = """
import os, signal, sys
from test_trainer import T, tiny
t = T.Trainer(tiny('optim.iters=9', 'run.test=false', method='supervised'), sys.argv[1], progress=False)
real = t.method.step
def step(*args):
    if os.environ['RANK'] == '1' and t.step == 2: os.kill(os.getpid(), signal.SIGTERM)
    return real(*args)
t.method.step = step
try: t.fit()
except KeyboardInterrupt as e: open(sys.argv[1]+'/said'+os.environ['RANK'], 'w').write(str(e))
"""


def test_a_signal_to_one_process_stops_all_after_the_same_iteration(tmp_path):
    run_together(STOPPER, tmp_path / 'r')
    assert {(tmp_path / 'r' / f'said{i}').read_text() for i in (0, 1)} == {
        'stopped after iteration 3; the same command goes on from there'
    }
    assert (
        load_checkpoint(tmp_path / 'r' / 'last.pt')['step'] == 3
        and (tmp_path / 'r' / 'last.rank1.pt').exists()
    )


def test_a_continued_teacher_remembers_its_start(tmp_path):
    "After run.init the first steps hardly move the teacher; with ema.start=0 it becomes the student at once"
    T.Trainer(
        tiny('optim.iters=2', 'run.test=false', method='supervised'), tmp_path / 'a', progress=False
    ).fit()
    moved = {}
    for start in (-1, 0):
        run = T.Trainer(
            tiny(
                'optim.iters=3',
                'run.test=false',
                f"run.init={tmp_path / 'a'}",
                f'ema.start={start}',
                method='supervised',
            ),
            tmp_path / f'b{start}',
            progress=False,
        )
        first = {k: v.clone() for k, v in run.teacher.named_parameters()}
        run.fit()
        moved[start] = max(float((v - first[k]).abs().max()) for k, v in run.teacher.named_parameters())
    assert 0 < moved[-1] < 0.05 * moved[0]


# --- what run.json says of the code ----------------------------------------------------
def test_commit_is_that_of_this_project_and_dirty_where_code_changed(tmp_path):
    "None outside a checkout and in somebody else's; what runs write does not count as a change"
    package, record = tmp_path / 'semidetr', tmp_path / 'nbs/ablations/results/toy/seed0.json'
    for d in (package, record.parent):
        d.mkdir(parents=True)
    for f in (package / 'a.py', record):
        f.write_text('1')

    def git(*args):
        return subprocess.run(
            ['git', '-c', 'user.name=a', '-c', 'user.email=a@b.c', *args],
            cwd=tmp_path,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    assert git_commit(package) is None
    git('init', '-q')
    git('add', '.')
    git('commit', '-qm', 'one')
    head = git('rev-parse', 'HEAD')[:12]
    record.write_text('2')
    (package / 'new.py').write_text('')
    assert git_commit(package) == head
    (package / 'a.py').write_text('2')
    assert git_commit(package) == f'{head}-dirty'
    inside = tmp_path / '.venv/site-packages/semidetr'
    inside.mkdir(parents=True)
    assert git_commit(inside) is None
