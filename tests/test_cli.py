"The command line: every command on tiny data sets of every kind; every mistake is one line and an exit code"

import json, os, shutil, signal, subprocess, sys, time
import numpy as np, pytest, typer
from PIL import Image
from semidetr.cli import commands as cli
from semidetr.cli import terminal, training
from semidetr.train.checkpoint import load_checkpoint
from semidetr.core import DataError
from test_trainer import TINY

FAST = [s for s in TINY if not s.startswith('data.')] + [
    'optim.iters=2',
    'method.burn_in_iters=1',
    'run.log_every=1',
]
NAMES = ['disc', 'bar']


def picture(seed, size=(48, 64)):
    rng = np.random.default_rng(seed)
    a = np.full((*size, 3), 200, np.uint8)
    x, y = rng.integers(2, 20, 2)
    a[y : y + 20, x : x + 24] = rng.integers(0, 120, 3)
    return Image.fromarray(a), [int(x), int(y), 24, 20]


def make_coco(root, n=12, val=0, first=0):
    "Folder with instances_train.json, perhaps instances_val.json, and images/"
    (root / 'images').mkdir(parents=True)
    for split, k in (('train', n), ('val', val)):
        if not k:
            continue
        images, anns = [], []
        for i in range(k):
            img, box = picture(first + i + 1000 * (split == 'val'))
            name = f'{split}{i:03d}.jpg'
            img.save(root / 'images' / name, quality=95)
            images.append(dict(id=i + 1, file_name=name, height=48, width=64))
            anns.append(dict(id=i + 1, image_id=i + 1, category_id=5 + i % 2, bbox=box, area=480, iscrowd=0))
        (root / f'instances_{split}.json').write_text(
            json.dumps(
                dict(
                    images=images,
                    annotations=anns,
                    categories=[dict(id=5 + j, name=c) for j, c in enumerate(NAMES)],
                )
            )
        )
    return root


def make_voc(root, n=10):
    for d in ('Annotations', 'JPEGImages', 'ImageSets/Main'):
        (root / d).mkdir(parents=True)
    for i in range(n):
        img, (x, y, w, h) = picture(i)
        img.save(root / 'JPEGImages' / f'{i:06d}.jpg')
        (root / 'Annotations' / f'{i:06d}.xml').write_text(
            '<annotation><size><width>64</width><height>48</height><depth>3</depth></size>'
            '<object><name>dog</name><difficult>0</difficult>'
            f'<bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax>'
            '</bndbox></object></annotation>'
        )
    (root / 'ImageSets' / 'Main' / 'trainval.txt').write_text(''.join(f'{i:06d}\n' for i in range(n - 2)))
    (root / 'ImageSets' / 'Main' / 'test.txt').write_text(''.join(f'{i:06d}\n' for i in range(n - 2, n)))
    return root


def make_folder(root, n=6):
    root.mkdir(parents=True)
    for i in range(n):
        picture(500 + i, (40 + 8 * (i % 2), 64))[0].save(root / f'p{i}.jpg')
    return root


@pytest.fixture
def shell(capsys):
    "Run a command in this process: (exit code, stdout, stderr)"

    def call(*args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            cli.main([str(a) for a in args])
        return e.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def refused(shell):
    "Run a command that must end with one line that holds all `words`, and exit code 2"

    def call(*args, words=()):
        code, out, err = shell(*args)
        assert (
            code == 2 and err.startswith('error: ') and err.count('\n') == 1 and 'Traceback' not in out + err
        ), (code, out, err)
        assert all(w in err for w in words), err
        return err

    return call


@pytest.fixture(scope='session')
def coco(tmp_path_factory):
    return make_coco(tmp_path_factory.mktemp('cli') / 'shapes', 12, 3)


@pytest.fixture(scope='session')
def run(tmp_path_factory, coco):
    "A finished tiny run"
    out = tmp_path_factory.mktemp('cli') / 'run'
    with pytest.raises(SystemExit) as e:
        cli.main(
            [
                'train',
                '--data',
                str(coco),
                '-q',
                '--threads',
                '1',
                '--percent',
                '50',
                '--method',
                'mean_teacher',
                '-o',
                str(out),
                *FAST,
            ]
        )
    assert e.value.code == 0
    return out


# --- help, version, usage --------------------------------------------------------------
COMMANDS = [
    'ablate',
    'build-ops',
    'demo',
    'doctor',
    'eval',
    'export',
    'import',
    'predict',
    'recipe',
    'replay',
    'site',
    'split',
    'train',
]


def test_help_is_fast():
    "Nothing heavy is imported before a command needs it, and never the tools of the book"
    heavy = {'torch', 'numpy', 'PIL', 'nbdev', 'fastcore', 'IPython'}
    code = (
        'import sys\nfrom semidetr.cli.commands import main\n'
        'try: main(sys.argv[1:])\nexcept SystemExit: pass\n'
        f'print({heavy} & set(sys.modules), file=sys.stderr)'
    )
    for args in (['--help'], ['train', '--help'], ['--version'], ['train', '--unknown']):
        done = subprocess.run([sys.executable, '-c', code, *args], capture_output=True, text=True)
        assert done.stderr.splitlines()[-1] == 'set()', done.stderr


def test_help_and_version(shell):
    from semidetr import __version__

    assert shell('--version')[:2] == (0, f'semidetr {__version__}\n')
    for args in ((), ('--help',)):
        code, out, _ = shell(*args)
        assert code == 0 and all(f'\n  {c} ' in out for c in COMMANDS)


@pytest.mark.parametrize('name', COMMANDS)
def test_every_command_has_an_example_that_parses(shell, name):
    code, out, _ = shell(name, '--help')
    assert code == 0
    example = ' '.join(out.split('Example: ')[1].split('\n\n')[0].split()).split()
    assert example[:2] == ['semidetr', name]
    command = typer.main.get_command(terminal.app).commands[name]
    command.make_context(name, example[2:])


def test_changed_data_are_not_an_old_result(refused, run, coco, tmp_path):
    "The same command on a finished run looks the result up, until the data under it change"
    data, out = tmp_path / 'shapes', tmp_path / 'run'
    shutil.copytree(coco, data)
    args = ['train', '--data', data, '-q', '--threads', '1', '-o', out, *FAST]
    for _ in range(2):
        with pytest.raises(SystemExit) as e:
            cli.main([str(a) for a in args])
        assert e.value.code == 0
    stamp = (out / 'last.pt').stat().st_mtime_ns
    path = data / 'instances_train.json'
    d = json.loads(path.read_text())
    d['annotations'][0]['bbox'][2] -= 5
    path.write_text(json.dumps(d))
    refused(*args, words=['data have changed', 'another folder'])
    assert (out / 'last.pt').stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    'args,words',
    [
        (['trian'], ['trian', "'train'"]),
        (['train', '--persent', '3'], ['--persent', '--percent', 'train --help']),
        (['predict', '--run', 'x'], ['--source']),
        (['eval'], ['--run']),
        (['train', '--percent', 'many'], ['--percent', 'train --help']),
        (['predict', '--run', 'x', '--source', 'y', '--batch', '0'], ['--batch']),
        (['split', '--data', 'digits'], ['--out']),
    ],
)
def test_usage_errors(refused, args, words):
    refused(*args, words=words)


def test_what_is_a_bug_stays_a_traceback(monkeypatch):
    import semidetr.lab.demo

    def broken(*a):
        raise KeyError('inside')

    monkeypatch.setattr(semidetr.lab.demo, 'run_demo', broken)
    with pytest.raises(KeyError):
        cli.main(['demo'])


def test_system_and_memory_errors_are_lines(refused, monkeypatch, tmp_path):
    import semidetr.lab.demo

    for e, words in (
        (PermissionError(13, 'Permission denied', 'a/b'), ['a/b: Permission denied']),
        (OSError(28, 'No space left on device', 'c'), ['c: No space left']),
        (MemoryError(), ['memory', '--batch']),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), ['memory']),
        (DataError('x:\ny; z'), ['x: y; z']),
    ):

        def broken(*a, e=e):
            raise e

        monkeypatch.setattr(semidetr.lab.demo, 'run_demo', broken)
        refused('demo', '-o', tmp_path / 'd', words=words)


def test_one_of_several_processes_speaks(capsys, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    cli._say('twice')
    monkeypatch.setenv('RANK', '0')
    cli._say('once')
    assert capsys.readouterr().out == 'once\n'


# --- training on one's own data --------------------------------------------------------
def train(shell, *args):
    code, out, err = shell('train', '-q', '--threads', '1', *args, *FAST)
    assert code == 0, err
    return out


def test_coco_without_test_split(shell, tmp_path):
    "A small development part, no test split, each said once; the second call looks the result up"
    data, out = make_coco(tmp_path / 'd', 12), tmp_path / 'r'
    text = train(shell, '--data', data, '-o', out)
    assert (
        'note: 12 images: 2 of them, not 100' in text
        and 'note: no test split' in text
        and 'semidetr predict --run' in text
    )
    result = json.loads((out / 'run.json').read_text())
    assert (
        (result['data']['labelled'], result['data']['dev'], result['data']['val']) == (10, 2, 0)
        and set(result['metrics']) == {'dev'}
        and result['config']['method']['name'] == 'supervised'
    )
    before = {f.name: f.stat().st_mtime_ns for f in out.iterdir()}
    again = train(shell, '--data', data, '-o', out)
    told = [line for line in again.splitlines() if line.startswith('note: ')]
    assert len(told) == 1 and 'this run is finished' in told[0], 'notes are told once'
    rest = [[line for line in t.splitlines() if not line.startswith('note: ')] for t in (again, text)]
    assert rest[0] == rest[1] and {f.name: f.stat().st_mtime_ns for f in out.iterdir()} == before
    code, _, err = shell('train', '--data', data, '-q', '--seed', '3', '-o', out, '--threads', '1', *FAST)
    assert code == 2 and 'run.seed: 0 -> 3' in err and (out / 'run.json').exists()


def test_labelled_coco_with_a_folder_of_images(shell, coco, tmp_path):
    text = train(shell, '--data', coco, '--unlabelled', make_folder(tmp_path / 'more'), '-o', tmp_path / 'r')
    result = json.loads((tmp_path / 'r' / 'run.json').read_text())
    assert 'method mean_teacher' in text and result['config']['method']['name'] == 'mean_teacher'
    assert (
        (result['data']['unlabelled'], result['data']['val']) == (6, 3)
        and 'pseudo_boxes' in result['health']
        and ' pseudo labels: ' in text
    )
    assert set(result['metrics']) == {'dev', 'val'}


def test_a_damaged_test_split_is_refused_before_training(shell, tmp_path):
    data = make_coco(tmp_path / 'shapes', 12, 3)
    val = data / 'instances_val.json'
    val.write_text(val.read_text()[:200])
    code, _, err = shell('train', '--data', data, '-q', '-o', tmp_path / 'r', *FAST)
    assert code == 2 and str(val) in err and not (tmp_path / 'r').exists()
    code, out, _ = shell('doctor', data)
    assert code == 2 and str(val) in out and 'not fit for training' in out


@pytest.mark.parametrize(
    'boxes, curves, said', [(0.2, [], True), (0.3, [], False), (0, ['region_points'], False)]
)
def test_few_pseudo_labels_are_said(capsys, boxes, curves, said):
    data = dict(labelled=2, unlabelled=6)
    health = dict(pseudo_boxes=boxes, labelled_boxes=1.0)
    end = dict(data=data, seconds=1, cpu_seconds=1, iterations=2, metrics={}, health=health, curves=curves)
    training._summary(end, 'runs/r')
    assert (' few pseudo labels' in capsys.readouterr().out) == said


def test_voc_folder(shell, tmp_path):
    train(shell, '--data', make_voc(tmp_path / 'v'), '-o', tmp_path / 'r')
    result = json.loads((tmp_path / 'r' / 'run.json').read_text())
    assert (
        result['data']['dev'] == 1
        and result['data']['labelled'] == 7
        and result['data']['val'] == 2
        and 'dog' in result['data']['classes']
    )
    assert 'AP' in result['metrics']['val']['teacher']


def config_of(shell, *args):
    code, out, err = shell('train', '--show-config', *args)
    assert code == 0, err
    return json.loads(out)


def test_settings_come_from_preset_file_options_and_data(shell, coco, tmp_path):
    c = config_of(shell, '--data', coco)
    assert (
        c['data']['dev'] == 2
        and c['run']['threads'] == 0
        and c['detector']['transformer']['num_queries'] == 300
    )
    assert (
        config_of(shell)['data']['count'] == 20
        and config_of(shell, '--percent', '10')['data'] | dict(count=0, percent=10.0)
        == config_of(shell, '--percent', '10')['data']
    )
    assert config_of(shell, '--data', coco, 'data.dev=1')['data']['dev'] == 1
    (tmp_path / 'c.toml').write_text(f'[data]\ndata = "{coco}"\ndev = 5\n[optim]\niters = 9\nlr = 0.5\n')
    c = config_of(shell, '--config', tmp_path / 'c.toml', '--iters', '7', 'run.threads=3')
    assert (
        c['data']['dev'],
        c['optim']['iters'],
        c['optim']['lr'],
        c['run']['threads'],
        c['detector']['transformer']['num_queries'],
    ) == (5, 7, 0.5, 3, 300)
    (tmp_path / 'all.json').write_text(json.dumps(c))
    assert config_of(shell, '--config', tmp_path / 'all.json', 'run.threads=3') == c


def test_an_annotation_file_is_no_test_split_of_itself(shell, refused, coco, tmp_path):
    assert (
        config_of(shell, '--data', coco / 'instances_train.json')['run']['test'] is False
        and config_of(shell, '--data', coco)['run']['test'] is True
    )
    voc = make_voc(tmp_path / 'v')
    shutil.rmtree(voc / 'ImageSets')
    assert config_of(shell, '--data', voc)['run']['test'] is False


def test_settings_that_make_no_sense_together(refused, shell, coco, tmp_path):
    refused(
        'train',
        '--data',
        coco,
        '--method',
        'mean_teacher',
        '-o',
        tmp_path / 'r',
        words=['--unlabelled', '--percent'],
    )
    text = train(shell, '--data', coco, '--percent', '50', '--method', 'supervised', '-o', tmp_path / 'r')
    assert 'unlabelled images are not used' in text
    from semidetr.train.api import check_method
    from semidetr.train.config import override, preset

    lines = lambda *items: list(
        check_method(override(preset('small'), ['method.name=mean_teacher', 'data.count=3', *items]))
    )
    assert (
        'takes all of the 500 iterations' in lines('optim.iters=500', 'method.burn_in_iters=500')[0]
        and lines('optim.iters=500', 'method.burn_in_iters=499') == []
    )


# --- mistakes --------------------------------------------------------------------------
def edit(path, change):
    d = json.loads(path.read_text())
    change(d)
    path.write_text(json.dumps(d))


BAD_DATA = dict(
    missing=(lambda d: shutil.rmtree(d), ['nothing at']),
    empty_file=(lambda d: (d / 'instances_train.json').write_text(''), ['instances_train.json', 'empty']),
    wrong_json=(
        lambda d: (d / 'instances_train.json').write_text('{"images": [}'),
        ['instances_train.json', 'line 1'],
    ),
    no_coco=(lambda d: (d / 'instances_train.json').write_text('[1]'), ['instances_train.json', 'COCO']),
    turned_box=(
        lambda d: edit(
            d / 'instances_train.json', lambda j: j['annotations'][3].update(bbox=[30, 10, -9, 5])
        ),
        ['annotation 4', 'image 4'],
    ),
    unknown_class=(
        lambda d: edit(d / 'instances_train.json', lambda j: j['annotations'][3].update(category_id=99)),
        ['99', 'annotation 4'],
    ),
    no_images=(lambda d: shutil.rmtree(d / 'images'), ['train000.jpg']),
    no_box=(lambda d: edit(d / 'instances_train.json', lambda j: j.update(annotations=[])), ['no box']),
)


def test_a_test_split_with_another_class_is_mapped_by_name(shell, tmp_path):
    "What only one side has is said; the rest is measured"
    data = make_coco(tmp_path / 'd', 6, 2)
    edit(data / 'instances_val.json', lambda j: j['categories'][0].update(name='cat'))
    code, out, err = shell('train', '--data', data, '-o', tmp_path / 'r', *FAST)
    text = ' '.join((out + err).split())
    assert code == 0 and "the run has no class 'cat', whose boxes are left out" in text, text


@pytest.mark.parametrize('kind', BAD_DATA)
def test_bad_data(refused, shell, tmp_path, kind):
    "train and split: one line, nothing written; doctor: exit code 2, and the same fault"
    data = make_coco(tmp_path / 'd', 6, 2)
    spoil, words = BAD_DATA[kind]
    spoil(data)
    refused('train', '--data', data, '-o', tmp_path / 'r', *FAST, words=words)
    if kind != 'no_box':
        refused('split', '--data', data, '--percent', '50', '-o', tmp_path / 'r', words=words)
    code, out, err = shell('doctor', data)
    assert (
        (code == 2 or kind == 'no_box')
        and 'Traceback' not in err
        and all(w in out + err for w in words if kind != 'no_box')
    ), out + err
    assert not (tmp_path / 'r').exists()


@pytest.mark.parametrize('workers', [0, 1])
def test_truncated_image_met_while_training(refused, tmp_path, workers):
    "Also in a worker process: the file is named, and no half of a run is left"
    data = make_coco(tmp_path / 'd', 6)
    for f in (data / 'images').iterdir():
        f.write_bytes(f.read_bytes()[:400])
    refused(
        'train',
        '-q',
        '--data',
        data,
        '-o',
        tmp_path / 'r',
        '--threads',
        '1',
        'data.dev=0',
        'run.test=false',
        *FAST,
        f'loader.num_workers={workers}',
        words=['.jpg', 'cannot be read', 'restore'],
    )
    assert not (tmp_path / 'r').exists()


@pytest.mark.parametrize(
    'args,words',
    [
        (['--preset', 'smal'], ["did you mean 'small'"]),
        (['--method', 'mean_teecher'], ["did you mean 'mean_teacher'"]),
        (['optim.irts=3'], ['optim.irts', "did you mean 'optim.iters'"]),
        (['optim'], ['group.field=value']),
        (['--percent', '120'], ['120', '(0, 100]']),
        (['--percent', '0'], ['(0, 100]']),
        (['--percent', '-3'], ['(0, 100]']),
        (['--percent', '5', '--count', '3'], ['one of']),
        (['--count', '0'], ['at least 1']),
        (['--count', '99'], ['count=99', '10 images']),
        (['--iters', '0'], ['--iters']),
        (['--device', 'cuda:77'], ['cuda:77']),
        (['--device', 'gpu'], ["'gpu'"]),
        (['--split-file', 'none.json'], ['none.json']),
        (['--config', 'none.toml'], ['none.toml']),
        (['--unlabelled', 'no/where'], ['no/where']),
        (['--val', 'no/where'], ['no/where']),
    ],
)
def test_bad_options_of_train(refused, coco, tmp_path, args, words):
    has = [] if args[0] in ('--count', '--percent') or args[0] == '--split-file' else ['--percent', '50']
    refused('train', '-q', '--data', coco, '-o', tmp_path / 'r', *has, *args, words=words)
    assert not (tmp_path / 'r').exists()


def test_output_that_cannot_be_written(refused, run, coco, tmp_path):
    (tmp_path / 'file').write_text('mine')
    for args in (
        ['train', '--data', coco, *FAST],
        ['predict', '--run', run, '--source', coco / 'images'],
        ['doctor', coco],
        ['demo'],
    ):
        refused(*args, '--out', tmp_path / 'file', words=['file', '--out'])
        refused(*args, '--out', tmp_path / 'file' / 'below', words=['file', '--out'])
    for args in (['split', '--data', coco, '--percent', '50'], ['eval', '--run', run]):
        refused(*args, '--out', tmp_path, words=['is a folder'])
        refused(*args, '--out', tmp_path / 'file' / 'below', words=['is a file'])
    assert (tmp_path / 'file').read_text() == 'mine' and [p.name for p in tmp_path.iterdir()] == ['file']


def test_broken_run_folders(refused, run, coco, tmp_path):
    (tmp_path / 'bare').mkdir()
    (tmp_path / 'bad').mkdir()
    (tmp_path / 'bad' / 'last.pt').write_bytes((run / 'last.pt').read_bytes()[:9000])
    for r, words in (
        (tmp_path / 'bare', ['no checkpoint']),
        (tmp_path / 'none', ['no checkpoint']),
        (tmp_path / 'bad', ['damaged']),
    ):
        refused('predict', '--run', r, '--source', coco / 'images', '-o', tmp_path / 'p', words=words)
        refused('eval', '--run', r, words=words)
    refused('train', '-q', '--data', coco, '-o', tmp_path / 'bad', *FAST, words=['damaged'])
    (tmp_path / 'bad' / 'run.json').write_text('{"hash"')
    refused('train', '-q', '--data', coco, '-o', tmp_path / 'bad', *FAST, words=['run.json'])
    (tmp_path / 'bad' / 'run.json').write_text('{}')
    refused('train', '-q', '--data', coco, '-o', tmp_path / 'bad', *FAST, words=['run.json'])
    assert not (tmp_path / 'p').exists() and (tmp_path / 'bad' / 'last.pt').exists()


# --- using a run -----------------------------------------------------------------------
def test_eval(shell, refused, run, coco, tmp_path):
    code, out, err = shell('eval', '--run', run, '-q', '-o', tmp_path / 'm.json')
    assert code == 0 and '3 images' in out and all(f'\n  {n} ' in out for n in ('teacher', 'student', *NAMES))
    m = json.loads(
        (tmp_path / 'm.json').read_text(), parse_constant=lambda c: pytest.fail(f'{c} is not JSON')
    )
    stored = json.loads((run / 'run.json').read_text())['metrics']['val']
    for who in ('teacher', 'student'):
        assert m[who]['AP'] == pytest.approx(stored[who]['AP'], abs=1e-6) and set(m[who]['per_class']) == set(
            NAMES
        )
    code, out, _ = shell('eval', '--run', run, '-q', '--part', 'dev', '--nms', '.5')
    assert code == 0 and '2 images' in out
    refused('eval', '--run', run, '--part', 'all', words=['val, dev, train'])
    refused('eval', '--run', run, '--data', make_voc(tmp_path / 'v'), words=['classes'])
    refused('eval', '--run', run, '--data', make_folder(tmp_path / 'f'), words=['no box'])


def test_predict(shell, refused, run, coco, tmp_path):
    source = make_folder(tmp_path / 'in')
    code, out, err = shell(
        'predict',
        '--run',
        run,
        '--source',
        source,
        '-o',
        tmp_path / 'p',
        '--threshold',
        '0',
        '--nms',
        '.5',
        '-q',
    )
    found = json.loads((tmp_path / 'p' / 'detections.json').read_text())
    assert (
        code == 0
        and f'{len(found)} detections' in out
        and {r['category'] for r in found} <= set(NAMES)
        and {r['category_id'] for r in found} <= {1, 2}
    )
    assert {p.name for p in (tmp_path / 'p').iterdir()} == {
        'detections.json',
        *(f'p{i}.png' for i in range(6)),
    }
    code, out, _ = shell(
        'predict',
        '--run',
        run,
        '--source',
        source / 'p0.jpg',
        '-o',
        tmp_path / 'one',
        '--threshold',
        '.99',
        '--no-draw',
        '-q',
        '--which',
        'student',
    )
    assert (
        code == 0
        and 'lower --threshold' in out
        and [p.name for p in (tmp_path / 'one').iterdir()] == ['detections.json']
    )
    code, _, _ = shell(
        'predict',
        '--run',
        run,
        '--source',
        coco / 'images',
        '--ids',
        coco / 'instances_train.json',
        '-o',
        tmp_path / 'ids',
        '-q',
    )
    assert (
        code == 2 and not (tmp_path / 'ids').exists()
    )  # the folder also holds the test images, which that file does not name
    (source / 'p2.jpg').write_bytes((source / 'p2.jpg').read_bytes()[:300])
    (source / 'p4.jpg').write_text('hello')
    code, out, err = shell('predict', '--run', run, '--source', source, '-o', tmp_path / 'q', '-q')
    lines = err.splitlines()
    assert (
        code == 2
        and len(lines) == 2
        and all(x.startswith('error: ') for x in lines)
        and 'p2.jpg' in lines[0]
        and 'p4.jpg' in lines[1]
    )
    assert {p.name for p in (tmp_path / 'q').iterdir()} == {
        'detections.json',
        *(f'p{i}.png' for i in (0, 1, 3, 5)),
    }
    for args, words in (
        (['--source', tmp_path / 'no'], ['no such image']),
        (['--source', source / 'p4.jpg'], ['p4.jpg']),
        (['--source', source, '--threshold', '2'], ['threshold']),
        (['--source', source, '--device', 'cuda:77'], ['cuda:77']),
        (['--source', source, '--which', 'both'], ['student, teacher']),
    ):
        refused('predict', '-q', '--run', run, '-o', tmp_path / 'x', *args, words=words)
    assert not (tmp_path / 'x').exists()


def test_doctor(shell, coco, tmp_path, monkeypatch):
    monkeypatch.setenv('SEMIDETR_DATA', str(coco.parent))
    code, out, _ = shell('doctor')
    assert (
        code == 0
        and 'torch' in out
        and coco.name in out
        and len(out.splitlines()) < 10
        and 'bfloat16' not in out
    )
    code, out, _ = shell('doctor', coco.name, '-o', tmp_path / 'rep')
    assert (
        code == 0
        and 'disc' in out
        and json.loads((tmp_path / 'rep' / 'report.json').read_text())['exit_code'] == 0
    )
    assert Image.open(tmp_path / 'rep' / 'contact_sheet.png').size[0] > 100
    data = make_coco(tmp_path / 'd', 6)
    f = data / 'images' / 'train002.jpg'
    f.write_bytes(f.read_bytes()[:400])
    code, out, _ = shell('doctor', data, '-o', tmp_path / 'rep2')
    assert (
        code == 2
        and 'train002.jpg' in out
        and sorted(p.name for p in (tmp_path / 'rep2').iterdir()) == ['report.json']
    )


def test_doctor_env(shell, refused, coco, monkeypatch):
    code, out, err = shell('doctor', '--env')
    assert code == 0 and not err
    for word in (
        'semidetr ',
        'Python',
        'torch',
        'threads',
        'cores usable',
        'GPU',
        'attention op (cpu): ',
        'SEMIDETR_OPS=',
        'SEMIDETR_DATA',
        'times the speed of float32',
    ):
        assert word in out
    monkeypatch.setenv('SEMIDETR_OPS', 'torch')
    assert 'plain PyTorch, because SEMIDETR_OPS=torch' in shell('doctor', '--env')[1]
    monkeypatch.setenv('SEMIDETR_OPS', 'nonsense')
    refused('doctor', '--env', words=['nonsense', 'auto, native or torch'])
    monkeypatch.delenv('SEMIDETR_OPS')
    refused('doctor', coco, '--env', words=['DATA', '--env'])


def test_doctor_tells_why_there_is_no_op(shell, monkeypatch):
    from semidetr.detectors import native

    monkeypatch.setattr(
        native,
        '_TRIED',
        {'cpu': dict(ready=False, source='', path='', reason='no C++ compiler was found; install g++')},
    )
    out = shell('doctor')[1]
    assert 'plain PyTorch, many times slower: no C++ compiler' in out and 'semidetr build-ops' in out


def test_first_stage_of_semi_detr(shell):
    "If the first stage ends with the burn-in, half of the later iterations are one-to-many; a named T1 stays"

    def T1(*settings):
        return json.loads(
            shell('train', '--data', 'digits:n=60,size=64', '--count', '10', '--show-config', *settings)[1]
        )['method']['T1']

    assert (
        T1('--method', 'semi_detr') == 600
        and T1('--method', 'semi_detr', 'method.burn_in_iters=0', '--iters', '300', 'method.T1=0') == 0
    )
    assert (
        T1('--method', 'semi_detr', 'method.T1=300') == 300
        and T1('--method', 'mean_teacher') == 250
        and T1('--method', 'semi_detr', '--iters', '401') == 400
    )


def test_build_ops(shell, refused, tmp_path, monkeypatch):
    "Where, how long, what instruction set; one line without a compiler, which is a stand-in here"
    from semidetr.train import machine
    from semidetr.detectors import build

    made = tmp_path / 'cache' / 'ops' / 'cpu-1.so'
    monkeypatch.setenv('SEMIDETR_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(build, '_plan', lambda *a: ([], '', [], 'cpu-1'))

    def compile_(sources, out, *a):
        out.write_bytes(b'x')
        return out

    monkeypatch.setattr(build, '_compile', compile_)
    monkeypatch.setattr(build, '_compiler', lambda: ['c++'])
    monkeypatch.setattr(
        machine, 'ops_status', lambda: dict(mode='auto', cpu=dict(ready=True, reason='', isa='v3'))
    )
    code, out, _ = shell('build-ops')
    assert code == 0 and str(made) in out and 'built in' in out and 'instruction set v3' in out
    os.utime(made, (1, 1))
    assert 'there already' in shell('build-ops')[1] and 'built in' in shell('build-ops', '--force')[1]
    monkeypatch.setattr(
        machine,
        'ops_status',
        lambda: dict(mode='auto', cpu=dict(ready=False, reason='cpu-1.so cannot be loaded')),
    )
    refused('build-ops', words=['cpu-1.so', 'cannot be loaded'])
    monkeypatch.setattr(build, '_compiler', list)
    refused('build-ops', words=['no C++ compiler', 'install g++'])
    refused('build-ops', '--device', 'tpu', words=['tpu', 'cpu, cuda'])


def test_split(shell, refused, coco, tmp_path):
    a, b = tmp_path / 'a.json', tmp_path / 'b.json'
    for f in (a, b):
        assert shell('split', '--data', coco, '--percent', '50', '-o', f)[:2] == (
            0,
            f'{f}: 6 labelled, 4 unlabelled, 2 development images\n',
        )
    assert a.read_text() == b.read_text()
    (tmp_path / 'ids.json').write_text('[3, 12, 1]')
    code, out, _ = shell('split', '--data', coco, '--from', tmp_path / 'ids.json', '-o', b)
    assert (
        code == 0
        and 'image ids' in out
        and '3 labelled, 9 unlabelled, 0 development' in out
        and json.loads(b.read_text())['labelled'] == [3, 12, 1]
    )
    (tmp_path / 'ids.json').write_text('[3, 11, 1]')
    refused(
        'split', '--data', coco, '--from', tmp_path / 'ids.json', '-o', b, words=['both ids and positions']
    )
    assert shell(
        'split', '--data', coco, '--from', tmp_path / 'ids.json', '--convention', 'positions', '-o', b
    )[0] == 0 and json.loads(b.read_text())['labelled'] == [4, 12, 2]
    for args, words in (
        (['--percent', '101'], ['101']),
        ([], ['one of percent, count and shots']),
        (['--count', '3', '--percent', '5'], ['one of percent, count and shots']),
        (['--count', '40'], ['40']),
        (['--percent', '9', '--dev', '12'], ['lower dev']),
    ):
        refused('split', '--data', coco, *args, '-o', tmp_path / 'c.json', words=words)
    assert not (tmp_path / 'c.json').exists()
    assert config_of(shell, '--data', coco, '--split-file', a, '--method', 'mean_teacher')['data'][
        'split_file'
    ] == str(a)


def test_demo_and_site(shell, refused, tmp_path, monkeypatch):
    import semidetr.lab.demo

    calls = []
    monkeypatch.setattr(semidetr.lab.demo, 'run_demo', lambda *a: calls.append(a))
    assert shell('demo', '-o', tmp_path / 'd', '--labels', '5', '--seed', '1', '--seed', '2', '-q')[0] == 0
    assert calls[0][:5] == (tmp_path / 'd', 5, (1, 2), False, 0)
    refused('demo', '--labels', '0', words=['--labels'])
    monkeypatch.chdir(tmp_path)
    refused('site', words=['checkout'])
    refused('site', '--engine', 'magic', words=['fallback'])
    (tmp_path / '_quarto.yml').write_text('')
    monkeypatch.setattr(cli, 'find_spec', lambda name: None)
    refused('site', words=[str(tmp_path), 'semidetr/book', 'checkout'])


def test_ctrl_c_and_go_on(shell, coco, tmp_path, monkeypatch):
    "SIGINT to `python -m semidetr.cli`: exit code 130, a checkpoint, and the same command goes on"
    out = tmp_path / 'r'
    args = [
        'train',
        '--data',
        str(coco),
        '-q',
        '--threads',
        '1',
        '-o',
        str(out),
        *FAST,
        'optim.iters=5000',
        'run.checkpoint_every=10000',
    ]
    p = subprocess.Popen(
        [sys.executable, '-m', 'semidetr.cli', *args],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )
    log, deadline = out / 'log.jsonl', time.time() + 300
    while (
        not (log.exists() and log.read_text().count('\n') >= 2)
        and p.poll() is None
        and time.time() < deadline
    ):
        time.sleep(0.1)
    p.send_signal(signal.SIGINT)
    err = p.communicate(timeout=120)[1]
    assert p.returncode == 130, err
    step = load_checkpoint(out)['step']
    assert (
        err.strip().splitlines()[-1] == f'stopped after iteration {step}; the same command goes on from there'
        and step >= 2
        and 'Traceback' not in err
    )
    from semidetr.train import step as stepping

    real = stepping.clip_and_step

    def once(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(stepping, 'clip_and_step', once)
    code, _, err = shell(*args)
    assert (
        code == 130
        and f'stopped after iteration {step + 1};' in err
        and load_checkpoint(out)['step'] == step + 1
    )
