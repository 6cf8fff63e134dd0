"What a run passes on to eval, predict, export and import: ONNX file, pixel scale, names, progress bars"

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import semidetr
from PIL import Image
from semidetr.core import ConfigError
from semidetr.train import api, predict_files
from semidetr.train.checkpoint import load_checkpoint, save_checkpoint
from semidetr.train.export import to_safetensors
from semidetr.train.predict import Predictor, load_model
from test_cli import NAMES, coco, make_folder, refused, run, shell  # noqa: F401 (fixtures)
from test_predict import files_in


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp('use') / 'photos', 4)


# --- export and predict --------------------------------------------------------------------------
def test_an_exported_onnx_file_predicts_what_its_run_predicts(shell, refused, run, photos, tmp_path):  # noqa: F811
    graph, found = tmp_path / 'model.onnx', {}
    code, out, err = shell('export', '--run', run, '-f', 'onnx', '-o', graph)
    assert code == 0 and str(graph) in out, err
    for name, source in dict(run=run, onnx=graph).items():
        options = ['--threshold', 0, '--no-draw', '-q', '--device', 'cpu', '-o', tmp_path / name]
        code, out, err = shell('predict', '--run', source, '-s', photos, *options)
        assert code == 0 and err == ''
        found[name] = json.loads((tmp_path / name / 'detections.json').read_text())
    assert len(found['run']) == len(found['onnx']) > 4
    for file in sorted(p.name for p in photos.iterdir()):
        rows = [[r for r in found[name] if r['image_id'] == file] for name in ('run', 'onnx')]
        assert len(rows[0]) == len(rows[1]) > 0
        scores = [[r['score'] for r in some] for some in rows]
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)
        first = [some[0] for some in rows]
        assert first[0]['category'] == first[1]['category'] in NAMES
        assert first[0]['bbox'] == pytest.approx(first[1]['bbox'], abs=0.2)
    refused('export', '--run', run, '-f', 'onnx', '-o', graph, words=['exists already'])
    refused('predict', '--run', tmp_path / 'no.onnx', '-s', photos, '-o', tmp_path / 'x', words=['no.onnx'])


# --- scale of pixels -----------------------------------------------------------------------------
WHITE = 4080  # 16 times 255


def grey_set(root, times):
    "Three grey pictures as a COCO data set: 8 bits, or 16 bits whose values are `times` as large"
    (root / 'images').mkdir(parents=True)
    values, rows, boxes = np.random.default_rng(0).integers(0, 256, (3, 48, 64)), [], []
    for i, pixels in enumerate(values):
        pixels = (pixels * times).astype(np.uint8 if times == 1 else np.uint16)
        Image.fromarray(pixels).save(root / 'images' / f'{i}.png')
        rows.append(dict(id=i, file_name=f'{i}.png', height=48, width=64))
        boxes.append(dict(id=i, image_id=i, category_id=i % 2, bbox=[4, 4, 20, 20], area=400, iscrowd=0))
    categories = [dict(id=i, name=name) for i, name in enumerate(NAMES)]
    content = dict(images=rows, annotations=boxes, categories=categories)
    (root / 'instances_val.json').write_text(json.dumps(content))
    return root


@pytest.fixture(scope='module')
def scales(tmp_path_factory, run):  # noqa: F811
    "(pictures of 8 bits, the same of 16 bits, the run with this value of white)"
    folder = tmp_path_factory.mktemp('white')
    saved = load_checkpoint(run)
    saved['config']['data']['white'] = WHITE
    del saved['format']
    save_checkpoint(folder / 'run' / 'last.pt', **saved)
    return grey_set(folder / 'bits8', 1), grey_set(folder / 'bits16', 16), folder / 'run'


def test_predict_reads_pixels_with_the_white_of_the_run(shell, run, scales, tmp_path):  # noqa: F811
    eight, sixteen, with_white = scales

    def rows(network, data, out):
        options = ['--threshold', 0, '--no-draw', '-q', '--device', 'cpu', '-o', tmp_path / out]
        assert shell('predict', '--run', network, '-s', data / 'images', *options)[0] == 0
        return json.loads((tmp_path / out / 'detections.json').read_text())

    wanted = rows(run, eight, 'a')
    assert wanted and rows(with_white, sixteen, 'b') == wanted
    assert rows(run, sixteen, 'c') != wanted, 'without it they are taken for 65535'


def test_eval_reads_pixels_with_the_white_of_the_run(shell, run, scales, monkeypatch):  # noqa: F811
    "The networks see the same images, teacher and student"
    eight, sixteen, with_white = scales
    seen, real = [], api.evaluate_model

    def evaluate(model, ds, *args, **kwargs):
        seen.append(np.stack([np.asarray(ds[i].image) for i in range(len(ds))]))
        return real(model, ds, *args, **kwargs)

    monkeypatch.setattr(api, 'evaluate_model', evaluate)
    for network, data in ((run, eight), (with_white, sixteen), (run, sixteen)):
        code, out, err = shell('eval', '--run', network, '--data', data, '-q', '--device', 'cpu')
        assert code == 0 and '3 images' in out, err
    assert len(seen) == 6
    wanted = seen[0]
    assert all((wanted == x).all() for x in seen[1:4]) and not any((wanted == x).all() for x in seen[4:])


# --- what a call takes ---------------------------------------------------------------------------
def test_one_format_and_one_class_may_be_texts(run, photos, tmp_path):  # noqa: F811
    options = dict(threshold=0.0, device='cpu', draw=False)
    for formats, wanted in (('csv', {'csv'}), ('csv, JSON', {'csv', 'json'}), (['json'], {'json'})):
        out = tmp_path / str(formats)
        semidetr.predict(run, photos, out=out, formats=formats, **options)
        assert set(files_in(out)) == {f'detections.{x}' for x in wanted}
    with open(tmp_path / 'csv' / 'detections.csv', newline='') as f:
        assert {row['class'] for row in csv.DictReader(f)} == set(NAMES)
    with pytest.raises(ConfigError, match="format 'xml' is unknown"):
        semidetr.predict(run, photos, out=tmp_path / 'x', formats='xml', **options)
    one = semidetr.predict(run, photos / 'p0.jpg', classes='bar', threshold=0.0, device='cpu')
    same = semidetr.predict(run, photos / 'p0.jpg', classes=['bar'], threshold=0.0, device='cpu')
    assert set(one['names']) == {'bar'} and one['scores'].equal(same['scores'])
    with pytest.raises(ConfigError, match="no class 'ba'"):
        semidetr.predict(run, photos / 'p0.jpg', classes='ba', device='cpu')


def test_more_names_of_classes_than_a_path_can_hold(shell, run, tmp_path):  # noqa: F811
    names = [f'class number {i}' for i in range(1500)] + ['bar']
    code, _, err = shell('import', run, '-o', tmp_path / 'a', '--to', ','.join(names))
    assert code == 0, err
    (tmp_path / 'names.txt').write_text('\n'.join(names))
    code, _, err = shell('import', run, '-o', tmp_path / 'b', '--to', tmp_path / 'names.txt')
    assert code == 0, err
    for folder in ('a', 'b'):
        assert load_model(tmp_path / folder)[2] == names


def test_both_networks_are_evaluated_or_the_one_that_there_is(run, tmp_path):  # noqa: F811
    _, whole = api.evaluate_run(run)
    _, one = api.evaluate_run(to_safetensors(run, tmp_path / 'm.safetensors', 'student'))
    assert set(whole) == {'teacher', 'student'} and set(one) == {'teacher'}
    assert one['teacher']['AP'] == whole['student']['AP']
    _, network = api.evaluate_run(Predictor(run, 'cpu', which='student'))
    assert network['student']['AP'] == whole['student']['AP'] and len(network) == 1
    for given in (tmp_path / 'm.onnx', str(tmp_path / 'm.onnx')):
        with pytest.raises(ConfigError, match='both networks of a run are evaluated: give its folder'):
            api.evaluate_run(given)


# --- many files ----------------------------------------------------------------------------------
class Text(str):
    "Counts its comparisons"

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other):
        Text.compared += 1
        return str.__eq__(self, other)


class Stem:
    "A path whose name without suffix counts its comparisons"

    def __init__(self, name):
        self.name = name

    def with_suffix(self, suffix):
        return self

    def as_posix(self):
        return Text(self.name.rpartition('.')[0])


def test_names_of_many_results_compare_each_name_a_few_times(monkeypatch):
    files = [f'{i}.jpg' for i in range(3000)] + ['7.png']
    monkeypatch.setattr(predict_files, 'Path', Stem)
    monkeypatch.setattr(Text, 'compared', 0)
    names = predict_files._names(files, '.txt')
    assert Text.compared < 10 * len(files)
    assert names['8.jpg'] == '8.txt' and (names['7.jpg'], names['7.png']) == ('7.jpg.txt', '7.png.txt')


def test_each_picture_of_many_is_looked_up_a_few_times(tmp_path, monkeypatch):
    files = [f'{i}.jpg' for i in range(3000)]
    for name in files:
        (tmp_path / name).touch()
    calls, real = [], Path.resolve

    def resolve(path, *args):
        calls.append(path)
        assert len(calls) < 4 * len(files), 'not linear'
        return real(path, *args)

    monkeypatch.setattr(Path, 'resolve', resolve)
    assert len(predict_files._pictures(files, tmp_path, tmp_path / 'out')) == 3000
    (tmp_path / '7.png').touch()
    calls.clear()
    with pytest.raises(ConfigError, match='7.png: the picture would overwrite an image'):
        predict_files._pictures(files, tmp_path, tmp_path)


# --- bars ----------------------------------------------------------------------------------------
def test_bars_of_predict_and_eval_are_shown_unless_quiet(shell, run, photos, tmp_path):  # noqa: F811
    predict = ['predict', '--run', run, '-s', photos, '--no-draw', '--device', 'cpu', '--batch', 1]
    commands = {'predict: 4/4 batch': predict, 'evaluate teacher': ['eval', '--run', run, '--device', 'cpu']}
    for text, words in commands.items():
        more = ['-o', tmp_path / 'out'] if words is predict else []
        code, loud, err = shell(*words, *more)
        assert code == 0 and text in err
        assert ('4/4' in err) == (words is predict)
        code, quiet, err = shell(*words, *more, '-q')
        assert code == 0 and err == '' and quiet == loud
