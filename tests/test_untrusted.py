"What comes from elsewhere is read in bounds or refused in one line, and is not live on a page or terminal"

import json, os, re, signal, time, warnings
from pathlib import Path
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from smalldocs.markdown import make_parser
from semidetr.book.pages import filter_notebook, inert
from semidetr.cli.terminal import _fail, _say
from semidetr.core import SemiDETRError
from semidetr.data import catalog, formats
from semidetr.data.bounds import most_pixels, outside
from semidetr.data.catalog import open_dataset
from semidetr.data.doctor import check_dataset
from semidetr.data.files import load_image, read_folder
from semidetr.data.splits import load_split, make_split, read_index_list, save_split
from semidetr.detectors.weight_files import read_weights
from semidetr.lab.ablate import check_notebook, steps_done
from semidetr.lab.report import arm_table, as_published, cell_text, markdown_table, published, read_records
from semidetr.lab.study import read_studies
from semidetr.lab.study import record as keep_record
from semidetr.reading import excess, parse_yaml, read_rows, read_small_json, read_toml
from semidetr.text import read_bytes, read_json, read_text, too_deep, too_dotted
from semidetr.train.api import Run
from semidetr.train.checkpoint import RunLog
from semidetr.train.config import Config, load_config, override, to_dict
from semidetr.train.exported import from_safetensors
from semidetr.train.predict_files import _pictures, _sources

LONG_AGO = 10**9  # seconds


@pytest.fixture(autouse=True)
def no_waiting():
    "A reader that waits for a pipe fails instead of keeping the tests"

    def ring(*_):
        raise TimeoutError('waits')

    old = signal.signal(signal.SIGALRM, ring)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


def refusal(read, *args, **kwargs):
    "The one line of the error, without control characters"
    with pytest.raises(SemiDETRError) as e:
        read(*args, **kwargs)
    text = str(e.value)
    assert len(text.splitlines()) == 1 and not re.search('[\x00-\x1f\x7f-\x9f]', text) and len(text) < 3000
    return text


def image(path, n=0, size=(16, 12)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, (40 * n % 256, 120, 150)).save(path)


def coco(root, names=('0.png', '1.png'), classes=('dog', 'cat'), make=True, **size):
    size = size or dict(width=16, height=12)
    for n, name in enumerate(names if make else ()):
        image(root / 'images' / name, n)
    root.mkdir(parents=True, exist_ok=True)
    images = [dict(id=n, file_name=name, **size) for n, name in enumerate(names)]
    boxes = [dict(id=n, image_id=n, category_id=1, bbox=[2, 3, 5, 4]) for n in range(len(names))]
    cats = [dict(id=n + 1, name=c) for n, c in enumerate(classes)]
    content = dict(images=images, annotations=boxes, categories=cats)
    (root / 'instances_train.json').write_text(json.dumps(content))
    return root


# --- bytes and text ----------------------------------------------------------------------------
READERS = [read_bytes, read_text, read_json, read_small_json, read_toml, read_rows, load_config]


@pytest.mark.parametrize('read', READERS, ids=lambda f: f.__name__)
def test_pipes_devices_and_folders(tmp_path, read):
    os.mkfifo(tmp_path / 'pipe.json')
    assert 'pipe.json: is a pipe or a device; give' in refusal(read, tmp_path / 'pipe.json')
    (tmp_path / 'link.json').symlink_to('/dev/zero')
    assert 'link.json: is a pipe or a device; give' in refusal(read, tmp_path / 'link.json')
    (tmp_path / 'folder.json').mkdir()
    assert 'folder.json: is a directory; give' in refusal(read, tmp_path / 'folder.json')
    assert 'none.json: no such' in refusal(read, tmp_path / 'none.json')


def test_a_file_is_measured_before_it_is_read(tmp_path):
    with open(tmp_path / 'hole.json', 'wb') as f:
        f.truncate(10**12)  # takes no place on the disk
    assert '4000 MB are the limit' in refusal(read_json, tmp_path / 'hole.json')
    assert '16 MB are the limit' in refusal(read_small_json, tmp_path / 'hole.json')
    assert '1 MB are the limit' in refusal(read_toml, tmp_path / 'hole.json')


def test_depth():
    for text, deep in (('[' * 64, False), ('[' * 65, True), ('{"a":' * 65, True), ('[]' * 500, False)):
        assert too_deep(text) is deep
    assert not too_deep('"' + '[' * 500 + '"') and not too_deep('"\\"' + '[' * 500 + '"')
    assert too_deep('[]' * 600_000 + '[' * 65)  # over several blocks


@pytest.mark.parametrize(
    'text',
    ['[' * 100_000, '{"a":' * 3000, '9' * 5000, '[' + '9' * 400 + ']', '{"a": 1, "a": 2}', '', ' ', '{"a": '],
)
def test_json(tmp_path, text):
    (tmp_path / 'x.json').write_text(text)
    assert 'x.json: ' in refusal(read_small_json, tmp_path / 'x.json')


@pytest.mark.parametrize(
    'text',
    [
        'a = ' + '[' * 5000,
        '.'.join('a' * 3000) + ' = 1',
        'a = ' + '9' * 400,
        'a = 1\na = 2',
        'a = ',
        '[' * 90,
    ],
)
def test_toml(tmp_path, text):
    (tmp_path / 'x.toml').write_text(text)
    assert 'x.toml: ' in refusal(read_toml, tmp_path / 'x.toml')
    assert 'x.toml: ' in refusal(load_config, tmp_path / 'x.toml')
    assert 'x.toml: ' in refusal(read_studies, tmp_path / 'x.toml')


def test_what_a_search_would_take_hours_for(tmp_path):
    "A string that is not closed, and keys of very many parts: a search that starts again at each of them"
    start = time.process_time()
    assert too_deep('[' * 65 + '"' + '\\"' * 500_000) and too_deep('[' * 65 + '"\\')
    (tmp_path / 'x.toml').write_text('a.' * 400_000 + 'a = 1')
    assert 'more than 64 parts' in refusal(read_toml, tmp_path / 'x.toml')
    refusal(override, Config(), ['optim.lr={' + 'a.' * 400_000 + 'a=1}'])
    assert not too_dotted('lr = [' + '0.5, ' * 200 + ']\npath = "' + '../' * 90 + '"')
    assert time.process_time() - start < 5


def test_references_of_yaml():
    levels = ['a0: &a0 [dog]', *(f'a{n + 1}: &a{n + 1} [{", ".join([f"*a{n}"] * 9)}]' for n in range(9))]
    for wrong in (
        '\n'.join(levels),
        'a: &a [*a]',
        'a: &a {b: *a}',
        '- ' * 2000,
        'a: ' * 400,
        '[' * 90,
        'a: 1\na: 2',
    ):
        assert refusal(parse_yaml, wrong, 'data.yaml').startswith('data.yaml: ')
    assert parse_yaml('a: &x [1, no]\nb: *x', 'x') == {'a': ['1', 'no'], 'b': ['1', 'no']}
    many = 'names:\n' + ''.join(f'  {n}: class {n}\n' for n in range(3000))
    assert len(parse_yaml(many, 'x')['names']) == 3000


def test_excess_takes_no_recursion():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert 'levels deep' in excess(deep)
    while deep:  # without a deep chain of destructors
        deep = deep[0]
    assert excess({'a': [2**63 - 1, 1e308, True]}) == '' and '20 digits' in excess([10**19])


# --- splits and lists ----------------------------------------------------------------------------
@pytest.fixture
def ds(tmp_path):
    return open_dataset(str(coco(tmp_path / 'set', [f'{n}.png' for n in range(6)])))


@pytest.mark.parametrize(
    'change',
    [
        dict(labelled=3),
        dict(labelled=[[1]]),
        dict(labelled=[True]),
        dict(labelled=[1.5]),
        dict(labelled={'0': 1}),
        dict(dev=None),
        dict(seed='1'),
        dict(fold=2.5),
        dict(percent='ten'),
        dict(fingerprint=7),
        dict(other=1),
        dict(labelled=[0, 0]),
        dict(labelled=[0], dev=[0]),
        dict(labelled=[10**30]),
    ],
)
def test_splits(tmp_path, ds, change):
    path = tmp_path / 'split.json'
    save_split(make_split(ds, count=2, dev=1), path)
    assert load_split(path, ds).count == 2
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    text = refusal(load_split, path)
    assert 'split.json: ' in text and 'semidetr split' in text
    report = check_dataset(str(tmp_path / 'set'), split_files=path, progress=False)
    kinds = {f.kind for f in report.of('error')}
    assert kinds <= {'bad-split', 'split-overlap', 'unknown-split-id', 'stale-split'}
    assert kinds or not {'labelled', 'dev'} & set(change) or change == dict(labelled=[0, 0])


@pytest.mark.parametrize(
    'values',
    [3, 'x', [[0]], [True], [1.5], [-1], {'50': [0]}, {'50': {'0': ['a']}}, {'fifty': {'0': [0, 1, 2]}}]
    + [{'50': {'zero': [0, 1, 2]}}, {'50': {'0': [-1, 0, 1]}}, {'50': {'0': {'a': 1}}}, [None], [10**30]],
)
def test_index_lists(tmp_path, ds, values):
    (tmp_path / 'list.json').write_text(json.dumps(values))
    assert 'list.json: ' in refusal(read_index_list, tmp_path / 'list.json', ds, percent=50, fold=0)


# --- settings --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    'item',
    [
        'optim.lr=' + '9' * 6000,
        'optim.lr=' + '9' * 400,
        'optim.steps=' + '[' * 5000,
        'optim.steps=' + '[' * 300,
    ]
    + [
        '.'.join('a' * 3000) + '=1',
        'optim.iters=' + '{"a":' * 500,
        'optim=3',
        'optim.iters=[1]',
        'view.mean=[1,2]',
    ]
    + ['view.short_sides=["a"]', 'view.erase_patches=[1]', 'view.erase_patches=[[1],[2]]', 'method.name=[1]']
    + ['optim.lr=nan', 'optim.lr=1e999', 'run.seed=true', 'x', '=', '.=1', 'optim.=1', 'detector.kind=[1]']
    + ['mixing.erase_patches=["a", "b"]', 'optim.lr={"a": 1}', 'run.amp=\x1b[31m', 'a=' + 'x' * 20_000],
)
def test_overrides(item):
    refusal(override, Config(), [item])


@pytest.mark.parametrize(
    'values', [[], 3, 'x', None, {'optim': 3}, {'optim': {'lr': [1]}}, {'x': {}}, {'optim': []}]
)
def test_settings_in_json(tmp_path, values):
    (tmp_path / 'c.json').write_text(json.dumps(values))
    assert 'c.json: ' in refusal(load_config, tmp_path / 'c.json')


# --- results, records, logs ------------------------------------------------------------------------
METRICS = dict(AP=41.5, AP50=60.0, AP_nms=41.0, per_class={'<script>alert(1)</script>': dict(AP=41.5)})


def result(**change):
    data = dict(classes=['dog'], labelled=1, unlabelled=2)
    times = dict(iterations=4, seconds=1.5, cpu_seconds=2, peak_memory_mb=700.5, commit='c', machine='m')
    metrics = dict(val=dict(teacher=METRICS, student=METRICS))
    return dict(hash='h', data=data, metrics=metrics, config=to_dict(Config()), **times) | change


WRONG = [dict(metrics=3), dict(metrics={'val': 3}), dict(metrics={'val': {'teacher': [1]}}), dict(data=[])]
WRONG += [
    dict(data={}),
    dict(data={'classes': [1]}),
    dict(hash=7),
    dict(config='x'),
    dict(config={'optim': 3}),
]
WRONG += [dict(config={'optim': {'lr': 'x'}}), dict(seconds='1'), dict(iterations=2.5), dict(health=[1])]


@pytest.mark.parametrize('change', WRONG)
def test_results(tmp_path, change):
    (tmp_path / 'run.json').write_text(json.dumps(result()))
    assert Run(tmp_path).config == Config()
    (tmp_path / 'run.json').write_text(json.dumps(result(**change)))
    assert 'run.json: ' in refusal(lambda: Run(tmp_path).config)


@pytest.mark.parametrize('text', ['', '{', '[]', 'null', '[' * 9000, '"x"', '\ufeff{}', '{"hash": 1e999}'])
def test_results_that_are_no_json(tmp_path, text):
    (tmp_path / 'run.json').write_text(text)
    assert 'run.json: ' in refusal(Run, tmp_path)


LOG = b'{"step": 1, "loss": 2.0}\n{"step": 2, "lo\n[3]\n"x"\n\xff\xfe\n{"step": "4"}\n' + b'[' * 9000 + b'\n'
LOG += b'{"loss": 1}\n{"step": true}\n{"step": 5, "loss": 1.0}\n{"step": 9, "loss": 1.0}\n{"step": 6'


def test_lines_of_a_log(tmp_path):
    (tmp_path / 'log.jsonl').write_bytes(LOG)
    rows, bad = read_rows(tmp_path / 'log.jsonl')
    assert [r['step'] for r in rows] == [1, 5, 9] and bad == [2, 3, 4, 5, 6, 7, 8, 9, 12]
    assert steps_done(tmp_path) == 9 and keep_record(result(), tmp_path)['curve']['step'] == [1, 5, 9]
    with pytest.warns(UserWarning, match='9 lines are damaged and left out, the first is line 2'):
        RunLog(tmp_path, step=5).close()
    assert (tmp_path / 'log.jsonl').read_text() == '{"step": 1, "loss": 2.0}\n{"step": 5, "loss": 1.0}\n'


def test_a_line_that_a_crash_cut_off_needs_no_word(tmp_path):
    (tmp_path / 'log.jsonl').write_text('{"step": 1}\n{"step": 2')
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        RunLog(tmp_path, step=1).close()
    assert (tmp_path / 'log.jsonl').read_text() == '{"step": 1}\n'


@pytest.mark.parametrize(
    'change', [dict(arms=3), dict(arms={'a': 3}), dict(arms={'a': {}}), dict(seed='0'), dict(burn_in=[1])]
)
def test_records(tmp_path, change):
    (tmp_path / 'toy').mkdir()
    value = dict(seed=0, study='toy', burn_in=None, arms=dict(a=result()))
    (tmp_path / 'toy/seed0.json').write_text(json.dumps(value | change))
    assert 'seed0.json: ' in refusal(read_records, tmp_path, 'toy')


@pytest.mark.parametrize(
    'text', ['', 'table = 3', '[other]', '[table]', '[table]\nrows = 3', '[table]\nrows = [1]']
)
def test_published_numbers(tmp_path, text):
    (tmp_path / 'paper_results.toml').write_text(text)
    assert 'paper_results.toml: ' in refusal(published, tmp_path / 'results', 'table')


@pytest.mark.parametrize(
    'text', ['', '[]', '{}', '{"cells": 3}', '{"cells": [3]}', '{"cells": [{"metadata": []}]}']
)
def test_run_notebooks(tmp_path, text):
    (tmp_path / 'x.ipynb').write_text(text)
    assert 'x.ipynb: ' in refusal(check_notebook, tmp_path / 'x.ipynb')


# --- weights ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    'index', [[], {}, {'weight_map': 3}, {'weight_map': {'a': 3}}, {'weight_map': {'a': '../x.safetensors'}}]
)
def test_shards_stay_in_their_folder(tmp_path, index):
    save_file(dict(a=torch.zeros(2)), tmp_path / 'x.safetensors')
    folder = tmp_path / 'w'
    folder.mkdir()
    (folder / 'config.json').write_text('{"model_type": "detr"}')
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
    assert 'fetch the folder again' in refusal(read_weights, folder)


@pytest.mark.parametrize(
    'config',
    [{'id2label': 3}, {'id2label': {'x': 'a'}}, {'id2label': {'0': 1}}, {'id2label': {'9' * 5000: 'a'}}, []],
)
def test_config_of_weights(tmp_path, config):
    save_file(dict(a=torch.zeros(2)), tmp_path / 'model.safetensors')
    config = {'model_type': 'detr'} | config if isinstance(config, dict) else config
    (tmp_path / 'config.json').write_text(json.dumps(config))
    refusal(read_weights, tmp_path)


@pytest.mark.parametrize('classes', [80, [1, 2], {'a': 0}, {0: 'a', 2: 'b'}, 'ab'])
def test_entries_of_a_weight_file_that_name_no_classes(tmp_path, classes):
    torch.save(dict(model=dict(a=torch.zeros(2)), classes=classes), tmp_path / 'w.pth')
    with pytest.warns(UserWarning, match='w.pth: its entry for the classes is no list of names'):
        assert read_weights(tmp_path / 'w.pth').classes is None
    torch.save(dict(model=dict(a=torch.zeros(2)), classes={1: 'b', 0: 'a'}), tmp_path / 'w.pth')
    assert read_weights(tmp_path / 'w.pth').classes == ['a', 'b']


@pytest.mark.parametrize(
    'about', [dict(config='{'), dict(config='[]'), dict(classes='3'), dict(classes='[1]'), dict(semidetr='x')]
)
def test_metadata_of_exported_files(tmp_path, about):
    about = dict(semidetr='1', config='{}', classes='["a"]') | about
    save_file(dict(a=torch.zeros(2)), tmp_path / 'm.safetensors', about)
    assert 'm.safetensors: ' in refusal(from_safetensors, tmp_path / 'm.safetensors')


# --- images ------------------------------------------------------------------------------------------
def test_an_image_is_measured_before_it_is_decoded(tmp_path):
    "13,000 x 13,000 pixels in 20 kB; Pillow alone would decode them"
    coco(tmp_path, ['0.png'], width=13_000, height=13_000)
    Image.new('1', (13_000, 13_000)).save(tmp_path / 'images/0.png')
    assert (tmp_path / 'images/0.png').stat().st_size < 40_000
    start = time.process_time()
    with pytest.raises(Image.DecompressionBombError):
        load_image(tmp_path / 'images/0.png')
    ds = open_dataset(str(tmp_path))
    assert '89 megapixels are the limit' in refusal(ds.__getitem__, 0)
    assert {f.kind for f in check_dataset(str(tmp_path), progress=False).errors} == {'too-large'}
    assert time.process_time() - start < 2


def test_who_needs_larger_images_says_so(tmp_path, monkeypatch):
    image(tmp_path / 'a.png', size=(50, 40))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1999)
    with pytest.raises(Image.DecompressionBombError):
        load_image(tmp_path / 'a.png')
    for most in (2000, None):
        monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', most)
        assert load_image(tmp_path / 'a.png').size == (50, 40)
    assert most_pixels('200') == 200_000_000 and most_pixels('0.5') == 500_000
    for wrong in ('0', '-1', 'many', 'nan', 'inf', '1e999'):
        assert f'SEMIDETR_MEGAPIXELS={wrong}: no positive number' in refusal(most_pixels, wrong)


# --- places ------------------------------------------------------------------------------------------
def outer(ds):
    return [n for n in ds.notes if 'lie outside of' in n]


def test_coco_files_that_lead_elsewhere(tmp_path):
    image(tmp_path / 'private/x.png')
    root = coco(tmp_path / 'a')
    assert outer(open_dataset(str(root))) == []
    for name in ('../../private/x.png', str(tmp_path / 'private/x.png')):
        ds = open_dataset(str(coco(root, ['0.png', name], make=False)))
        assert (
            len(outer(ds)) == 1 and '1 images lie outside' in outer(ds)[0] and 'private/x.png' in outer(ds)[0]
        )
    (root / 'images/link.png').symlink_to(tmp_path / 'private/x.png')
    assert len(outer(open_dataset(str(coco(root, ['0.png', 'link.png'], make=False))))) == 1
    (root / 'images/sub').symlink_to(tmp_path / 'private')
    assert len(outer(open_dataset(str(coco(root, ['0.png', 'sub/x.png'], make=False))))) == 1
    report = check_dataset(str(root), progress=False)
    assert 'outside-folder' in {f.kind for f in report.of('warning')}


def test_names_that_stay_inside_need_no_word(tmp_path):
    "Up and down again, a link within, and a folder of images that is itself a link"
    root = coco(tmp_path / 'a', ['0.png', '../images/1.png'])
    assert outer(open_dataset(str(root))) == []
    (root / 'images/2.png').symlink_to(root / 'images/0.png')
    assert outer(open_dataset(str(coco(root, ['0.png', '2.png'], make=False)))) == []
    (root / 'images').rename(tmp_path / 'disk')
    (root / 'images').symlink_to(tmp_path / 'disk')
    assert outer(open_dataset(str(coco(root, ['0.png', '1.png'], make=False)))) == []


def test_folders_and_lists_that_lead_elsewhere(tmp_path):
    image(tmp_path / 'private/x.png')
    image(tmp_path / 'a/images/0.png')
    (tmp_path / 'a/link.png').symlink_to(tmp_path / 'private/x.png')
    (tmp_path / 'a/more').symlink_to(tmp_path / 'private')
    found = read_folder(tmp_path / 'a')
    assert ['2 images lie outside' in f.item for f in found.faults if f.kind == 'outside-folder'] == [True]
    (tmp_path / 'a/data.yaml').write_text('train: train.txt\nnames: [dog]\n')
    (tmp_path / 'a/train.txt').write_text(f'images/0.png\n{tmp_path}/private/x.png\n')
    assert len(outer(open_dataset(str(tmp_path / 'a')))) == 1
    (tmp_path / 'a/data.yaml').write_text('train: ../private\nnames: [dog]\n')
    assert len(outer(open_dataset(str(tmp_path / 'a')))) == 1
    for up in ('..', '/', '../..'):
        (tmp_path / 'a/data.yaml').write_text(f'train: {up}\nnames: [dog]\n')
        assert 'all beside it' in refusal(open_dataset, str(tmp_path / 'a'))


def test_outside_asks_once_for_each_folder(tmp_path, monkeypatch):
    (tmp_path / 'sub').mkdir()
    asked, real = [], os.path.realpath
    monkeypatch.setattr(os.path, 'realpath', lambda p, **kw: asked.append(p) or real(p, **kw))
    assert outside(tmp_path, [f'sub/{n}.png' for n in range(500)]) == (0, '') and len(asked) < 5


@pytest.mark.parametrize(
    'kind', ['json', 'data.yaml', 'classes.txt', 'label', 'list', 'xml', 'itself', 'image']
)
def test_the_doctor_waits_for_no_pipe(tmp_path, kind):
    root = tmp_path / 'set'
    image(root / 'images/train/0.png')
    (root / 'labels/train').mkdir(parents=True)
    yaml = 'train: images/train\nnames: [dog]\n'
    place = dict(json='instances_train.json', label='labels/train/0.txt', list='list.txt', xml='0.xml').get(
        kind, kind
    )
    if kind in ('label', 'list', 'image'):
        (root / 'data.yaml').write_text(yaml if kind != 'list' else 'train: list.txt\nnames: [dog]\n')
    pipe = dict(itself=tmp_path / 'pipe', image=root / 'images/train/1.png').get(kind, root / place)
    os.mkfifo(pipe)
    report = check_dataset(str(tmp_path / 'pipe' if kind == 'itself' else root), quick=True, progress=False)
    assert len(str(report)) > 0
    if kind in ('label', 'list', 'itself', 'image', 'data.yaml', 'classes.txt'):
        assert report.errors or kind in ('data.yaml', 'classes.txt')


def test_entities_of_xml(tmp_path):
    for folder in ('Annotations', 'JPEGImages'):
        (tmp_path / folder).mkdir()
    image(tmp_path / 'JPEGImages/0.jpg')
    text = (
        '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><annotation><object><name>&b;</name></object>'
    )
    (tmp_path / 'Annotations/0.xml').write_text(text + '</annotation>')
    assert 'declares entities of XML' in refusal(open_dataset, str(tmp_path))


# --- terminal and page -----------------------------------------------------------------------------
ESCAPE = '\x1b]0;owned\x07\x1b[31mdog\x9b2J'


@pytest.mark.parametrize('name', [ESCAPE, 'a\nb', 'a\rb', '\u202egod', '\x00'])
def test_class_names_that_a_terminal_obeys(tmp_path, name):
    text = refusal(open_dataset, str(coco(tmp_path, classes=(name, 'cat'))))
    assert 'category 1: its name' in text and 'write the name in letters' in text
    report = str(check_dataset(str(tmp_path), progress=False))
    assert not re.search('[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]', report)


@pytest.mark.parametrize('name', ['Käfer', '方块', 'می\u200cخواهم', 'a b', 'a/b', '<b>', 'a|b', '🐕'])
def test_class_names_of_every_language(tmp_path, name):
    assert open_dataset(str(coco(tmp_path, classes=(name, 'cat')))).classes[0] == name


def test_what_is_printed_holds_no_codes(capsys):
    _say(f'first {ESCAPE}\nsecond')
    _fail(f'third {ESCAPE}')
    out, err = capsys.readouterr()
    assert (
        out.count('\n') == 2 and 'second' in out and not re.search('[\x00-\x09\x0b-\x1f\x7f-\x9f]', out + err)
    )


LIVE = ['<script>alert(1)</script>', '<img src=x onerror=alert(1)>', '<SVG/onload=alert(1)>', '</td><iframe>']
LIVE += [
    '<span class="a" onclick="x()">',
    '<details open ontoggle=x()>',
    '<!-- -->',
    '<a href="javascript:x()">',
]
LIVE += [t.format(LIVE[0]) for t in ('``{}`', '\\`{}`', '` a `` b `{}` c ``', '`a\\`{}`')]


def live(text):
    "Tags of the page that its table and our own formats do not explain, and tags with an event"
    html = make_parser().render(text)
    ours = '/?(?:div|table|thead|tbody|tr|th|td|code|p|span|details|br)\\b'
    return re.findall(f'<(?!{ours})[^>]*>', html) + re.findall(r'<[^>]*\son\w+=[^>]*>', html)


@pytest.mark.parametrize('text', LIVE)
def test_cells_are_escaped(text):
    table = markdown_table([text, 'b'], [[text, f'`{text}`'], [f'a`{text}', f'{text}`']])
    assert not live(table) and table.count('\n') == 3
    assert '<' not in str(as_published(text)).removeprefix('<span').removesuffix('</span>')
    assert '<span class="published"' in markdown_table(['a'], [[as_published('40.1')]])
    assert live(text) or '`' not in text
    assert not live(inert(f'{text} `{text}`'))


@pytest.mark.parametrize('link', ['javascript:x()', '&#106;avascript:x()', 'data:text/html,x', 'vbscript:x'])
def test_links_that_run_something(link):
    for text in (f'[a]({link})', f'![a]( {link})', f'[a][b]\n\n[b]: {link}'):
        assert not re.search('(href|src)="[^#]', make_parser().render(inert(text)))
    good = '[a](https://x.org/?a=1&b=2) [b](page.html#c)'
    assert inert(good) == good


def test_columns_and_lines_of_a_cell():
    assert (
        cell_text('a|b\\|c\nd') == 'a\\|b\\|c d' and cell_text(1.5) == '1.5' and cell_text('a & b') == 'a & b'
    )
    assert cell_text('`x < y` < z') == '`x < y` &lt; z'


def test_the_page_of_a_run_shows_tags_as_text():
    good = (
        '<span class="published" title="not measured">4</span><details><summary>x</summary>1<br>2</details>'
    )
    markdown = f'| {LIVE[0]} |\n[x](javascript:alert(1)) {good}'
    data = {'text/markdown': [markdown], 'text/html': LIVE[0], 'text/plain': LIVE[0]}
    stream = dict(output_type='stream', name='stdout', text=LIVE[0])
    cell = dict(cell_type='code', source='x', outputs=[dict(output_type='display_data', data=data), stream])
    shown = filter_notebook(dict(cells=[cell]), {}, '')['cells'][0]['outputs']
    assert shown[0]['data'].keys() == {'text/markdown', 'text/plain'} and shown[1] == stream
    text = shown[0]['data']['text/markdown']
    assert '<script' not in text and 'javascript' not in text and good in text


def test_a_table_of_results_with_a_hostile_class():
    runs = [dict(seed=0, study='toy', arms=dict(a=result(), b=result()))]
    table = arm_table(runs, dict(a=LIVE[0], b='b'), 'b', classes=[LIVE[0]])
    assert '<script' not in table and '&lt;script>' in table


# --- once, and linear --------------------------------------------------------------------------------
@pytest.fixture
def counted(monkeypatch):
    calls, read = [], formats.read_json
    monkeypatch.setattr(formats, 'read_json', lambda path: calls.append(path) or read(path))
    catalog._KEPT.clear()
    yield calls
    catalog._KEPT.clear()


def aged(root):
    for p in (root, *root.rglob('*')):
        os.utime(p, (LONG_AGO, LONG_AGO))
    return str(root)


def test_a_file_of_annotations_is_parsed_once(tmp_path, counted):
    root = coco(tmp_path / 'set')
    first = open_dataset(aged(root))
    first.white = 7
    again = open_dataset(str(root))
    assert len(counted) == 1 and not hasattr(again, 'white') and again.fingerprint() == first.fingerprint()
    assert open_dataset(str(root / 'instances_train.json')).ids == first.ids and len(counted) == 1
    text = (root / 'instances_train.json').read_text()
    (root / 'instances_train.json').write_text(text.replace('[2, 3, 5, 4]', '[2, 3, 5, 6]'))
    assert open_dataset(str(root)).fingerprint() != first.fingerprint() and len(counted) == 2


def test_what_may_have_changed_is_parsed_again(tmp_path, counted):
    root = coco(tmp_path / 'set')
    for _ in range(2):
        open_dataset(str(root))  # just written
    assert len(counted) == 2
    open_dataset(aged(root))
    (root / 'images/0.png').rename(root / 'images/0.PNG')
    assert open_dataset(str(root)).files[0] == '0.PNG' and len(counted) == 4
    whole = coco(tmp_path / 'unsized', width=None, height=None)
    for _ in range(2):
        open_dataset(aged(whole))
    assert len(counted) == 6


def test_few_files_are_kept(tmp_path, counted):
    roots = [aged(coco(tmp_path / f'{n}')) for n in range(6)]
    for root in (*roots, *roots[2:], roots[0]):
        open_dataset(root)
    assert len(counted) == 7 and len(catalog._KEPT) == 4


def test_the_files_to_predict_on_are_resolved_by_folder(tmp_path, monkeypatch):
    "Calls that ask the disk where a folder is do not grow with the number of files"
    for n in range(60):
        image(tmp_path / f'in/{n}.png', size=(2, 2))
    (tmp_path / 'in/out').mkdir()
    image(tmp_path / 'in/out/old.png', size=(2, 2))
    (tmp_path / 'in/link.png').symlink_to(tmp_path / 'in/out/old.png')
    calls, resolve = [], Path.resolve
    monkeypatch.setattr(Path, 'resolve', lambda self, *a, **k: calls.append(self) or resolve(self, *a, **k))
    folder, files = _sources(tmp_path / 'in', tmp_path / 'in/out')
    assert len(files) == 60 and 'link.png' not in files  # it is in the output folder, under another name
    assert len(_pictures(files, folder, tmp_path / 'in/out')) == 60
    assert len(calls) < 12
    assert 'would overwrite an image' in refusal(_pictures, files, folder, tmp_path / 'in')
