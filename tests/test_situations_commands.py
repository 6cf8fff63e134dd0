"Commands on data as people have them: what is said, saved, drawn and measured"

import contextlib
import io
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path
import numpy as np
import pytest
import torch
from PIL import Image
from semidetr.cli import commands  # noqa: F401  registers the commands
from semidetr.cli.terminal import main
from semidetr.core import ConfigError, Note, pick_device, tell
from semidetr.data.doctor import check_dataset
from semidetr.draw import draw_on_image, font_for
from semidetr.train.metrics import evaluate

TINY = [
    'run.test=false',
    'loader.n_labelled=2',
    'loader.n_unlabelled=2',
    'loader.num_workers=0',
    'view.short_sides=[64]',
    'view.eval_short=64',
    'detector.backbone.weights=none',
    'detector.transformer.d_model=32',
    'detector.transformer.n_heads=4',
    'detector.transformer.ffn=32',
    'detector.transformer.num_queries=20',
    'detector.denoising.num=8',
]


def run(home, *words):
    "(exit code, standard output, error output) of one command in this process"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(home):
        with pytest.raises(SystemExit) as stop:
            main([str(w) for w in words])
    return stop.value.code, out.getvalue(), err.getvalue()


def train(home, *words, iters=2, out='run'):
    return run(home, 'train', '--iters', iters, '-q', '-o', out, *words, *TINY)


def pictures(folder, names, size=64):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        seed = zlib.crc32(name.encode())  # equal names, equal pixels
        pixels = np.random.RandomState(seed).randint(0, 255, (size, size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)


def coco(path, names, boxes=1, classes=('bar', 'square'), size=64):
    "A COCO file with `boxes` boxes in each image, or as many as the list says"
    each = [boxes] * len(names) if isinstance(boxes, int) else boxes
    images = [dict(id=n, file_name=f'images/{f}', width=size, height=size) for n, f in enumerate(names)]
    anns = []
    for n, count in enumerate(each):
        for k in range(count):
            box = [2 + k % 12 * 4, 2 + k // 12 * 4, 4, 4]
            anns.append(dict(id=len(anns) + 1, image_id=n, category_id=1 + k % len(classes), bbox=box))
    cats = [dict(id=n + 1, name=c) for n, c in enumerate(classes)]
    path.write_text(json.dumps(dict(images=images, annotations=anns, categories=cats)), encoding='utf-8')


@pytest.fixture
def shop(tmp_path):
    names = [f'{n}.png' for n in range(6)]
    pictures(tmp_path / 'images', names)
    coco(tmp_path / 'instances_train.json', names)
    return tmp_path


def notes(text):
    return [line for line in text.splitlines() if line.startswith('note: ')]


# ---- what is told, once


def test_a_note_is_told_once_and_many_are_counted():
    with pytest.warns(Note) as seen:
        tell(['a', 'b', 'a'])
    assert [str(w.message) for w in seen] == ['a', 'b']
    with pytest.warns(Note) as seen:
        tell(str(n) for n in range(20))
    assert len(seen) == 8 and '13 more notes' in str(seen[-1].message)


def test_notes_of_a_training_and_an_evaluation_come_once(shop):
    (shop / 'images' / '5.png').unlink()
    for n in (6, 7, 8, 9):
        pictures(shop / 'images', [f'{n}.png'])
    more = shop / 'more'
    pictures(more, ['x.png', 'y.png'])
    (more / 'c.heic').write_bytes(b'no picture here')
    coco(shop / 'instances_train.json', [f'{n}.png' for n in (0, 1, 2, 3)], [1, 1, 0, 0])
    code, out, err = train(shop, '--data', '.', '--unlabelled', 'more', 'data.dev=0')
    assert code == 0 and not err
    assert sum('.heic' in n for n in notes(out)) == 1
    assert sum('2 labelled images without a box are used as negatives' in n for n in notes(out)) == 1
    assert '4 labelled' in out
    code, out, err = run(shop, 'predict', '--run', 'run', '-s', 'more', '-q', '-o', 'found')
    assert code == 0 and sum('1 .heic' in n for n in notes(out)) == 1


def test_split_says_what_is_drawn(shop):
    coco(shop / 'instances_train.json', [f'{n}.png' for n in range(6)], [1, 0, 0, 1, 0, 1])
    words = ('split', '--data', '.', '--count', 6, '--dev', 0)
    code, out, _ = run(shop, *words, '-o', 'a.json')
    assert code == 0 and '3 of the labelled images have no box; they are used as negatives' in out
    d = json.loads((shop / 'instances_train.json').read_text())
    d['annotations'][0]['iscrowd'] = '1'
    (shop / 'instances_train.json').write_text(json.dumps(d))
    code, out, _ = run(shop, *words, '-o', 'b.json')
    assert '1 of the labelled images have only boxes to be ignored' in out
    coco(shop / 'instances_train.json', [f'{n}.png' for n in range(6)])
    code, out, _ = run(shop, *words, '-o', 'c.json')
    assert code == 0 and not notes(out)


# ---- text


@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16', 'utf-16-le', 'utf-16-be'])
def test_settings_and_splits_in_every_encoding(shop, encoding):
    (shop / 'c.toml').write_bytes('[optim]\nlr = 3e-4  # für später\n'.encode(encoding))
    code, out, _ = run(shop, 'train', '--data', '.', '--config', 'c.toml', '--show-config')
    assert code == 0 and json.loads(out)['optim']['lr'] == 3e-4
    run(shop, 'split', '--data', '.', '--count', 2, '--dev', 1, '-o', 's.json')
    (shop / 's.json').write_bytes((shop / 's.json').read_text().encode(encoding))
    assert run(shop, 'doctor', '.', '--split-file', 's.json', '--quick')[0] == 0
    code, out, err = train(shop, '--data', '.', '--split-file', 's.json', iters=1)
    assert code == 0 and '2 labelled' in out


@pytest.mark.parametrize('kind', ['config', 'split'])
def test_what_is_no_text_is_one_line_with_file_byte_and_cure(shop, kind):
    (shop / 'x.toml').write_bytes(b'# caf\xe9\n')
    (shop / 'x.json').write_bytes(b'{"a": "caf\xe9"}')
    words = ('--config', 'x.toml') if kind == 'config' else ('--split-file', 'x.json')
    code, out, err = train(shop, '--data', '.', *words)
    assert code == 2 and err.count('\n') == 1
    assert words[1] in err and 'byte ' in err and '0xE9' in err and '; ' in err


def test_a_terminal_without_the_characters(shop):
    coco(shop / 'instances_train.json', [f'{n}.png' for n in range(6)], classes=('方块', 'Größe ✓'))
    env = os.environ | dict(LANG='C', LC_ALL='C', PYTHONIOENCODING='ascii')
    words = [sys.executable, '-m', 'semidetr.cli', 'doctor', '.', '--out', 'report']
    done = subprocess.run(words, cwd=shop, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert rb'\u65b9\u5757' in done.stdout and rb'Gr\xf6' in done.stdout
    assert '方块' in json.loads((shop / 'report' / 'report.json').read_text())['histogram']


# ---- class names in pictures


def test_letters_of_english_use_the_font_of_before():
    from PIL import ImageFont

    assert font_for('cat', 12).getmask('cat').getbbox() == ImageFont.load_default(12).getmask('cat').getbbox()


@pytest.mark.parametrize('name', ['Größe ✓', 'Жук', 'σφήκα'])
def test_class_names_of_other_scripts_are_drawn(name):
    pytest.importorskip('matplotlib')
    blank, box = Image.new('RGB', (200, 100)), [[20.0, 40, 60, 80]]
    a, b = (np.asarray(draw_on_image(blank, box, [0], None, [n])) for n in (name, name[::-1]))
    assert (a != b).any()  # different glyphs, not a row of equal boxes
    assert font_for(name, 12) is not None


def test_a_name_that_no_font_shows_is_a_number_and_said(monkeypatch):
    blank, box, name = Image.new('RGB', (200, 100)), [[20.0, 40, 60, 80]], 'x\uffff'
    with pytest.warns(Note, match="class name .* is drawn as #1; set the environment variable SEMIDETR_FONT"):
        odd = draw_on_image(blank, box, [1], [0.5], ['', name])
    assert np.array_equal(odd, draw_on_image(blank, box, [1], [0.5], ['', '#1']))


def test_a_font_of_the_user(monkeypatch, tmp_path):
    (tmp_path / 'f.ttf').write_text('no font')
    monkeypatch.setenv('SEMIDETR_FONT', str(tmp_path / 'f.ttf'))
    with pytest.raises(ConfigError, match='f.ttf: cannot be read as a font; give'):
        font_for('Größe of no cache', 13)


# ---- devices


@pytest.mark.parametrize('name', ['mps', 'xpu', 'cuda:9', 'meta', 'hpu', 'tpu'])
def test_devices_that_do_not_work_are_one_line(shop, name):
    code, _, err = train(shop, '--data', '.', '--device', name)
    assert code == 2 and err.count('\n') == 1 and name in err
    with pytest.raises(ConfigError):
        pick_device(name)


# ---- limits


def test_limits_are_said_and_can_be_lifted(shop):
    coco(shop / 'instances_train.json', [f'{n}.png' for n in range(6)], [130, 1, 1, 1, 1, 1], ('pill',))
    code, out, _ = train(shop, '--data', '.', 'data.dev=0')
    [queries, counted] = notes(out)
    assert 'at most 20 per image; set detector.transformer.num_queries=130' in queries
    assert '--max-dets 130' in counted
    code, out, _ = run(shop, 'doctor', '.')
    assert code == 0 and 'many-objects' in out and 'up to 130' in out
    words = (
        'eval',
        '--run',
        'run',
        '--data',
        '.',
        '--part',
        'train',
        '-q',
        '--max-dets',
        130,
        '-o',
        'm.json',
    )
    code, out, err = run(shop, *words)
    assert code == 0, err
    assert 'AR130' in json.loads((shop / 'm.json').read_text())['teacher']
    assert run(shop, 'eval', '--run', 'run', '--max-dets', 0)[0] == 2


def test_more_detections_count_more_objects(shop):
    from semidetr.data.catalog import open_dataset

    coco(shop / 'instances_train.json', [f'{n}.png' for n in range(6)], [130, 1, 1, 1, 1, 1], ('pill',))
    ds = open_dataset(str(shop))
    found = {}
    for i, image_id in enumerate(ds.ids):
        boxes = ds[i].boxes
        found[image_id] = dict(scores=torch.linspace(1, 0.5, len(boxes)), labels=ds[i].labels, boxes=boxes)
    at_100, at_130 = evaluate(ds, found), evaluate(ds, found, max_dets=130)
    assert at_130['AP'] == pytest.approx(100) and at_130['AR130'] == pytest.approx(100)
    assert at_100['AR100'] == pytest.approx(100 * 105 / 135) and at_100['AP'] < 80


# ---- doctor


def test_doctor_warns_of_constant_images_and_depths(shop):
    for n in range(3):
        dark = np.random.RandomState(n).randint(0, 300, (64, 64), np.uint16)
        Image.fromarray(dark).save(shop / 'images' / f'{n}.png')
    Image.new('RGB', (64, 64), 'white').save(shop / 'images' / '3.png')
    report = check_dataset(str(shop), progress=False)
    found = report.of('warning', 'constant-image')
    assert [Path(f.where).name for f in found] == ['0.png', '1.png', '2.png', '3.png']
    assert 'data.white, e.g. to 299' in found[0].cure and 'white' not in found[3].cure
    [depths] = report.of('warning', 'mixed-depths')
    assert '3 of 16 bits' in depths.item and '3 of 8 bits' in depths.item
    code, out, _ = train(shop, '--data', '.', 'data.dev=0')
    assert code == 0 and sum('16 bits' in n and 'data.white' in n for n in notes(out)) == 1
    code, out, _ = train(shop, '--data', '.', 'data.dev=0', 'data.white=300', out='b')
    assert code == 0 and not notes(out)


def test_doctor_is_silent_about_usual_images(shop):
    assert {f.kind for f in check_dataset(str(shop), progress=False).faults} == {'class-never-seen'}


@pytest.mark.parametrize('quick', [False, True])
def test_doctor_compares_another_set_with_every_split(shop, quick):
    pictures(shop / 'images', ['v0.png', 'v1.png'], 60)
    pictures(shop / 'apart', ['z.png'], 50)
    coco(shop / 'instances_val.json', ['v0.png', 'v1.png'], size=60)
    report = check_dataset(str(shop), other=str(shop / 'images'), quick=quick, progress=False)
    shared = report.of(None, 'shared-image')
    assert len(shared) == 8 and sum('instances_val.json' in f.item for f in shared) == 2
    assert not check_dataset(str(shop), other=str(shop / 'apart'), quick=quick).of(None, 'shared-image')
    (shop / 'apart' / 'link.png').symlink_to(shop / 'images' / 'v0.png')
    [one] = check_dataset(str(shop), other=str(shop / 'apart'), quick=quick).of(None, 'shared-image')
    assert 'link.png' in one.item and 'instances_val.json' in one.item
