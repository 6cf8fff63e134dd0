"Studies as data: overrides are checked before the first run, and committed records keep their hashes"

import json, re
from dataclasses import replace
from pathlib import Path
import pytest
from semidetr.core import ConfigError
import semidetr.lab.demo as demo
from semidetr.train.config import config_hash, override
from semidetr.lab.plan import open_all, plan
from semidetr.lab.rivals import RATES, RIVALS
from semidetr.lab.study import load_study, read_studies
from test_trainer import TINY

ROOT = Path(__file__).parent.parent
BOOK = ROOT / 'nbs' / 'ablations' / 'studies.toml'
LATER = (
    'optim.iters=2 method.T1=1 mining.init=all pseudo.threshold=.02 pseudo.min_score=0 consistency.hidden=8'
).split()
ARMS = dict(
    supervised=['method.name=supervised'],
    semi_detr=['method.name=semi_detr', 'loader.n_labelled=1', 'loader.n_unlabelled=1'],
)


def write(tmp_path, **change):
    study = {
        'preset': '"digits"',
        'base': json.dumps(TINY),
        'burn_in': '["optim.iters=2"]',
        'later': json.dumps(LATER),
        **change,
    }
    settings = ''.join(f'{k} = {v}\n' for k, v in study.items() if v)
    arms = ''.join(f'{k} = {json.dumps(v)}\n' for k, v in ARMS.items())
    (tmp_path / 'studies.toml').write_text(f'[toy]\n{settings}[toy.arms]\n{arms}')
    return tmp_path / 'studies.toml'


@pytest.mark.parametrize(
    'change,words',
    [
        (dict(later='["optim.iter=2"]'), ['toy', 'supervised', 'optim.iter', 'iters']),
        (dict(burn_in='["method.name=semi"]'), ['burn_in', 'semi_detr']),
        (dict(preset=''), ['lacks preset']),
        (dict(preset='"digit"'), ['digits']),
        (dict(base='[1'), ['studies.toml']),
    ],
)
def test_mistakes_are_found_before_the_first_run(tmp_path, change, words):
    with pytest.raises(ConfigError) as e:
        load_study(write(tmp_path, **change), 'toy')
    assert all(w in str(e.value) for w in words) and '\n' not in str(e.value)


def test_unknown_study_and_file(tmp_path):
    with pytest.raises(ConfigError, match='components'):
        load_study(BOOK, 'component')
    with pytest.raises(ConfigError, match='no such file'):
        load_study(tmp_path / 'none.toml', 'toy')


def test_the_studies_of_the_book_are_valid():
    "At every scale that they have; the built-in data have digits of all studies at smoke scale"
    for name in read_studies(BOOK)[0]:
        assert load_study(BOOK, name)['arms']
        small = load_study(BOOK, name, 'smoke')
        assert all(
            c.data.data.startswith('digits:') and not c.data.unlabelled for c in small['groups'].values()
        )
        assert all(
            override(c, arm).optim.iters <= 10
            for c in small['groups'].values()
            for arm in small['arms'].values()
        )
        assert all(
            r.cfg.method.burn_in_iters < r.cfg.optim.iters for r in plan(BOOK, name, 'smoke')
        )  # every unlabelled image would be left out


def test_pages_name_studies_that_exist():
    "In the commands of result pages, of guides and of what the page of the rivals waits for"
    known = set(read_studies(BOOK)[0]) | {'all'}
    pages = [*(ROOT / 'nbs/_py/ablations').glob('*.py'), *(ROOT / 'nbs/guides').glob('*.qmd')]
    texts = [f.read_text(encoding='utf-8') for f in (*pages, ROOT / 'README.md', ROOT / 'index.qmd')]
    commands = [c for text in texts for c in re.findall(r'semidetr ablate((?: [a-z0-9_]+)+)', text)]
    named = {name for command in commands for name in command.split()}
    waited = {s.partition('/')[0] for r in RIVALS for s in r.studies.values()} | {RATES}
    assert len(named) > 5 and named | waited <= known, (named | waited) - known


def test_every_study_finds_its_images_at_smoke_scale():
    "An arm may say how many images are labelled, as a group or the base does: the scale has the last word"
    data = {}
    for name in read_studies(BOOK)[0]:
        data |= {replace(r.cfg.data, fold=0): r.title for r in plan(BOOK, name, 'smoke')}
    found = {title: open_all(d) for d, title in data.items()}
    assert {title: errors for title, (_, errors) in found.items() if errors} == {}
    assert {counts for counts, _ in found.values()} == {(6, 48)}


def test_the_paper_scale_is_the_paper():
    "8 processes of 5 images, 120 000 iterations, half of them one-to-many; 1, 5 and 10 percent in five folds"
    runs = plan(BOOK, 'coco_partial')
    assert (
        len(runs) == 3 * 5 * 3
        and {(r.cfg.data.percent, r.cfg.data.fold) for r in runs}
        == {(p, f) for p in (1.0, 5.0, 10.0) for f in range(5)}
        and all(r.start is None for r in runs)
    )
    c = next(r.cfg for r in runs if r.arm == 'semi_detr')
    assert (
        c.loader.n_labelled,
        c.loader.n_unlabelled,
        c.optim.iters,
        c.method.T1,
        c.method.burn_in_iters,
        c.optim.lr,
    ) == (1, 4, 120_000, 60_000, 0, 1e-4)
    full, voc = (plan(BOOK, n)[-1].cfg for n in ('coco_full', 'voc'))
    assert (full.loader.n_labelled, full.loader.n_unlabelled, full.method.unsup_weight, full.optim.iters) == (
        4,
        4,
        2.0,
        240_000,
    ) and (voc.optim.iters, voc.method.T1) == (80_000, 40_000)
    parts = {r.arm: r.cfg for r in plan(BOOK, 'components', 'gpu')}
    assert (
        list(parts) == ['supervised', 'mean_teacher', 'shm', 'shm_cqc', 'shm_cqc_cpm', 'no_shm']
        and (parts['no_shm'].method.T1, parts['no_shm'].consistency.until) == (0, 'end')
        and parts['shm_cqc_cpm'].method.T1 == 60_000
        and parts['shm'].consistency.weight == 0
        and parts['mean_teacher'].method.T1 == 0
    )


def test_committed_records_are_found_again():
    "What `semidetr ablate` would run today has the hashes of the committed records"
    found = 0
    for path in (BOOK.parent / 'results').rglob('seed*.json'):
        r = json.loads(path.read_text())
        now = {
            x.arm: config_hash(x.cfg)
            for x in plan(BOOK, r['study'], r.get('scale', ''), [r['seed']])
            if x.group == r.get('group', '')
        }
        assert (
            now.items()
            >= {arm: a['hash'] for arm, a in {'burn_in': r['burn_in'], **r['arms']}.items() if a}.items()
        ), path  # an arm may be new
        found += 1
    assert found >= 3


TABLE = """
[toy]
preset = "digits"
seeds = [3, 4]
base = ["optim.lr=1"]
burn_in = ["optim.lr=2"]
later = ["optim.lr=3", "optim.clip=3"]
last = ["optim.warmup=5"]
[toy.groups.labels]
p1 = ["data.percent=1"]
p5 = ["data.percent=5"]
[toy.groups.data]
a = ["data.split_seed=1"]
b = ["data.split_seed=2"]
[toy.arms]
x = []
y = ["optim.clip=4", "optim.warmup=1"]
[toy.gpu]
burn_in = []
[toy.gpu.arms]
x = ["optim.clip=9"]
[scales.smoke]
seeds = [0]
later = ["optim.clip=7"]
last = ["optim.iters=1"]
"""


def test_groups_and_scales(tmp_path):
    path = tmp_path / 's.toml'
    path.write_text(TABLE)
    runs = plan(path, 'toy')
    assert (
        [(r.group, r.seed, r.arm) for r in runs[:4]]
        == [('p1-a', 3, 'burn_in'), ('p1-a', 3, 'x'), ('p1-a', 3, 'y'), ('p1-a', 4, 'burn_in')]
        and len(runs) == 4 * 2 * 3
        and len({r.folder for r in runs}) == 24
    )
    start, x, y = (r.cfg for r in runs[:3])
    assert (start.optim.lr, start.optim.warmup, start.method.name, start.run.test) == (
        2,
        5,
        'supervised',
        False,
    )
    assert (x.optim.lr, x.optim.clip, y.optim.clip, y.optim.warmup) == (3, 3, 4, 5) and x.run.init == str(
        runs[0].folder
    ) == str(runs[1].start)
    assert {(r.cfg.data.percent, r.cfg.data.split_seed) for r in runs} == {
        (1, 1),
        (1, 2),
        (5, 1),
        (5, 2),
    } and {r.where for r in runs} == {f'toy/{g}' for g in ('p1-a', 'p1-b', 'p5-a', 'p5-b')}
    gpu = plan(path, 'toy', 'gpu', [0])
    assert (
        [r.arm for r in gpu[:2]] == ['x', 'y']
        and gpu[0].cfg.optim.clip == 9
        and gpu[0].start is None
        and gpu[0].cfg.run.init == ''
        and gpu[0].where == 'toy-gpu/p1-a'
    )
    smoke = plan(path, 'toy', 'smoke', data='digits:n=9')
    assert [r.cfg.optim.clip for r in smoke[1:3]] == [
        7,
        4,
    ]  # the scale's settings come before those of an arm
    assert (
        {r.seed for r in smoke} == {0}
        and {r.cfg.optim.iters for r in smoke} == {1}
        and {r.cfg.data.data for r in smoke} == {'digits:n=9'}
    )


@pytest.mark.parametrize(
    'old,new,words',
    [
        ('later =', 'latter =', ["'latter'", "'later'"]),
        ('[toy.gpu]\n', '[toy.gpu]\nburnin = []\n', ['toy.gpu', "'burnin'", "'burn_in'"]),
        ('x = []', 'burn_in = []', ['burn_in', 'another name']),
        ('"data.percent=1"', '"data.percnt=1"', ['toy', 'p1-a', 'data.percnt', 'percent']),
        ('"optim.clip=9"', '"optim.clip=much"', ['optim.clip', 'float']),
        ('[scales.smoke]\n', '[scales.smoke]\nlest = []\n', ['scales.smoke', "'lest'"]),
    ],
)
def test_misspelt_keys(tmp_path, old, new, words):
    path = tmp_path / 's.toml'
    assert old in TABLE
    path.write_text(TABLE.replace(old, new))
    with pytest.raises(ConfigError) as e:
        plan(path, 'toy', 'gpu')
    assert all(w in str(e.value) for w in words) and '\n' not in str(e.value), str(e.value)


@pytest.mark.parametrize(
    'old,new,words',
    [
        ('seeds = [3, 4]', 'seeds = 3', ['toy.seeds', '[0, 1, 2]']),
        ('seeds = [3, 4]', 'seeds = "3"', ['toy.seeds']),
        ('seeds = [3, 4]', 'seeds = []', ['toy.seeds']),
        ('seeds = [3, 4]', 'seeds = [-1]', ['toy.seeds']),
        ('x = []\n', 'x = 3\n', ['toy.arms', 'mt = [']),
        ('x = []\n', 'x = [3]\n', ['toy.arms']),
        ('x = []\n', '"../x" = []\n', ['toy.arms']),
        ('base = ["optim.lr=1"]', 'base = "optim.lr=1"', ['toy.base']),
        ('[toy.groups.labels]', '[toy.groups]', ['toy.groups', 'groups.labels']),
        ('preset = "digits"', 'preset = "digit"', ['study toy', "'digits'"]),
        ('later = [', 'mt = [', ["'mt'", '[toy.arms]']),
        ('[toy.gpu.arms]\n', '[toy.gpu.arms]\nz = 3\n', ['toy.gpu.arms']),
        ('\n[toy]', '\nx = 3\n[toy]', ["'x'", '[NAME]']),
    ],
)
def test_values_of_the_wrong_kind(tmp_path, old, new, words):
    path = tmp_path / 's.toml'
    assert old in TABLE
    path.write_text(
        TABLE.replace('[toy.groups.data]\na = ["data.split_seed=1"]\nb = ["data.split_seed=2"]\n', '')
        .replace('y = ["optim.clip=4", "optim.warmup=1"]\n', '')
        .replace(old, new, 1)
    )
    with pytest.raises(ConfigError) as e:
        plan(path, 'toy', 'gpu')
    assert str(path) in str(e.value) and all(w in str(e.value) for w in words) and '\n' not in str(e.value), (
        str(e.value)
    )


def test_a_study_after_another_one(tmp_path):
    "It has the burn-in of the other one, in its folder, at every scale; and no preset or base of its own"
    path = tmp_path / 's.toml'
    more = '[more]\nafter = "toy"\nseeds = [0]\nlater = ["optim.clip=6"]\n[more.arms]\nz = []\n'
    path.write_text(TABLE + more)
    runs, own = plan(path, 'more'), {r.folder: r for r in plan(path, 'toy', seeds=[0])}
    assert [r.arm for r in runs] == ['burn_in', 'z'] * 4 and all(
        own[r.folder].cfg == r.cfg for r in runs[::2]
    )
    assert (
        runs[1].cfg.run.init == str(runs[0].folder) == str(runs[1].start)
        and runs[1].folder.parts[-4:] == ('more', 'p1-a', 'seed0', 'z')
        and (runs[1].cfg.optim.lr, runs[1].cfg.optim.warmup) == (1, 5)
        and runs[1].cfg.optim.clip == 6
    )
    path.write_text(
        TABLE + more.replace('later = ["optim.clip=6"]\n', '')
    )  # without a `later` of its own: that of the other one
    assert (plan(path, 'more')[1].cfg.optim.lr, plan(path, 'more')[1].cfg.optim.clip) == (3, 3)
    path.write_text(TABLE + more)
    smoke = plan(path, 'more', 'smoke')
    assert (
        smoke[0].folder.parts[-4:] == ('toy-smoke', 'p1-a', 'seed0', 'burn_in')
        and smoke[0].cfg == plan(path, 'toy', 'smoke')[0].cfg
        and smoke[1].start == smoke[0].folder
    )
    for wrong, words in (
        ('base = []\n', ['base of toy', "'after'"]),
        ('preset = "small"\n', ['preset of toy']),
    ):
        path.write_text(TABLE + more.replace('seeds', wrong + 'seeds'))
        with pytest.raises(ConfigError) as e:
            plan(path, 'more')
        assert all(w in str(e.value) for w in words), str(e.value)
    for other in ('tay', 'more'):
        path.write_text(TABLE + more.replace('"toy"', f'"{other}"'))
        with pytest.raises(ConfigError, match=f"comes after '{other}'"):
            plan(path, 'more')


def test_unknown_scale(tmp_path):
    with pytest.raises(ConfigError, match='precision has no scale .gpu.; known: smoke, small'):
        load_study(BOOK, 'precision', 'gpu')


def test_the_demonstration_is_part_of_the_component_study():
    "One set of settings, written in the package and in the file of studies: they may not drift apart"
    study = load_study(BOOK, 'components')
    assert study['burn_in'] == demo.BURN_IN
    for arm, name in dict(
        supervised='supervised', mean_teacher='mean_teacher', semi_detr='shm_cqc_cpm'
    ).items():
        of_demo, of_study = (
            override(
                study['groups'][''],
                [*items, 'loader.n_unlabelled=6', 'method.unsup_weight=2', 'pseudo.threshold=0.3'],
            )
            for items in (demo.LATER + demo.ARMS[arm], study['arms'][name])
        )
        assert of_demo == of_study, arm


def test_demonstration_runs_every_arm_and_other_settings_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, 'preset', lambda name, base=demo.preset: override(base(name), TINY))
    monkeypatch.setattr(demo, 'BURN_IN', ['optim.iters=1'])
    monkeypatch.setattr(demo, 'LATER', ['method.T1=0', 'optim.iters=1'])
    monkeypatch.setattr(demo, 'shown_scenes', lambda n=6, f=demo.shown_scenes: f(2))
    said, folders = [], []
    for labels in (6, 6, 5):
        result = demo.run_demo(tmp_path, labels, progress=False, workers=1, say=said.append)
        folders.append({p.name for p in tmp_path.iterdir() if p.is_dir()})
    assert (
        list(result['runs'][0]['arms']) == ['supervised', 'mean_teacher', 'semi_detr']
        and (tmp_path / 'detections.png').exists()
    )
    assert (
        len(folders[1]) == 1 and folders[0] == folders[1] and len(folders[2]) == 2
    )  # found again; other settings get their own folder
    assert any('semi detr' in line for line in said)


def test_auto_precision_is_chosen_once_and_kept(tmp_path, monkeypatch):
    import semidetr.train.machine as machine
    from semidetr.lab.study import run_config

    cfg = override(
        demo.preset('digits'),
        [*TINY, 'method.name=supervised', 'run.device=cpu', 'run.amp=auto', 'optim.iters=1'],
    )
    used = []
    for speed in (2.0, 0.5):  # a machine that is fast in bfloat16 begins; a slow one is asked again
        monkeypatch.setattr(machine, 'bf16_speed', lambda device, s=speed: s)
        used.append(run_config(cfg, tmp_path / 'a', progress=False))
    assert used[0]['hash'] == used[1]['hash'] and used[0]['config']['run']['amp'] == 'bf16'
    assert run_config(cfg, tmp_path / 'b', progress=False)['config']['run']['amp'] == 'off'
