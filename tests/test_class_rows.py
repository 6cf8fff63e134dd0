"A trained head keeps its AP when classes change their order, are added or are left out"

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from semidetr.detectors.contract import build_detector
from semidetr.data.catalog import open_dataset
from semidetr.train import trainer as T
from semidetr.train.checkpoint import load_checkpoint
from semidetr.train.config import override, preset
from semidetr.train.evaluation import evaluate_model
from semidetr.train.imports import import_weights
from semidetr.train.predict import load_model

COLOURS = dict(red=(220, 40, 40), green=(40, 200, 60), blue=(50, 70, 220))
OLD = ['red', 'green', 'blue']
NEW = {
    'order': ['blue', 'red', 'green'],
    'more': ['green', 'yellow', 'blue', 'red'],
    'less': ['blue', 'red'],
    'both': ['yellow', 'green'],
}
SMALL = [
    'data.dev=0',
    'data.count=0',
    'method.name=supervised',
    'run.test=false',
    'view.short_sides=[64]',
    'view.eval_short=64',
    'view.flip=0',
    'optim.lr=2e-3',
    'optim.schedule=cosine',
    'loader.n_labelled=2',
    'loader.num_workers=0',
    'ema.decay=.9',
]
DETECTORS = {  # of two stages: all 84 tokens are queries, so that no class changes which ones are
    'dino': ['detector.transformer.num_queries=84', 'detector.transformer.dec_layers=2', 'optim.iters=60'],
    'deformable_detr': ['detector.num_queries=30', 'optim.iters=150'],
    'deformable_detr_two_stage': ['detector.num_queries=84', 'detector.layers=2', 'optim.iters=60'],
    'detr': [
        'detector.num_queries=20',
        'detector.layers=1',
        'detector.d_model=64',
        'detector.ffn=128',
        'detector.backbone.out_strides=[8]',
        'criterion.no_object=0.3',
        'criterion.w_cls=3',
        'optim.clip=1',
        'optim.iters=600',
    ],
}
CASES = [pytest.param(name, marks=pytest.mark.slow) if name == 'detr' else name for name in DETECTORS]


def squares(root, classes):
    "The same two images with the boxes of some classes, as COCO; ids in the order of the classes"
    (root / 'images').mkdir(parents=True)
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(2):
        pixels = np.full((64, 64, 3), 128, np.uint8)
        for j, (name, colour) in enumerate(COLOURS.items()):
            x, y = (int(v) for v in rng.integers(0, 8, 2))
            x, y = x + 32 * (j % 2), y + 32 * (j // 2)
            pixels[y : y + 22, x : x + 22] = colour
            if name in classes:
                box = dict(bbox=[x, y, 22, 22], area=484, iscrowd=0)
                category = classes.index(name) + 1
                annotations.append(dict(id=len(annotations) + 1, image_id=i + 1, category_id=category, **box))
        Image.fromarray(pixels).save(root / 'images' / f'{i}.png')
        images.append(dict(id=i + 1, file_name=f'{i}.png', height=64, width=64))
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(classes)]
    content = dict(images=images, annotations=annotations, categories=categories)
    (root / 'instances_train.json').write_text(json.dumps(content))
    return root


def config(detector, data, *more):
    cfg = override(preset('digits'), [f'detector={detector}', *SMALL, f'data.data={data}'])
    return override(cfg, [*DETECTORS[detector], *more])


@pytest.fixture(scope='module', params=CASES)
def trained(request, tmp_path_factory):
    "(name of the detector, folder of a run that has learned its two images, metrics of its teacher)"
    folder = tmp_path_factory.mktemp(request.param)
    torch.set_num_threads(1)
    run = T.Trainer(config(request.param, squares(folder / 'data', OLD)), folder / 'run', progress=False)
    run.fit()
    metrics = evaluate_model(run.teacher, run.data.labelled, run.cfg.view)
    assert metrics['AP'] > 30 and min(v['AP'] for v in metrics['per_class'].values()) > 20
    return request.param, folder / 'run', metrics


def same_ap(metrics, wanted, classes):
    "AP and AP50 of each class that both know"
    for name in set(classes) & set(OLD):
        for key in ('AP', 'AP50'):
            assert abs(metrics['per_class'][name][key] - wanted['per_class'][name][key]) < 1e-6
    assert list(metrics['per_class']) == classes


@pytest.mark.parametrize('case', NEW)
def test_a_start_from_a_trained_run_keeps_the_ap_of_its_classes(case, trained, tmp_path):
    detector, source, wanted = trained
    classes = NEW[case]
    cfg = config(detector, squares(tmp_path / 'data', classes), f'run.init={source}')
    with pytest.warns(UserWarning, match='classes: ') as said:
        run = T.Trainer(cfg, tmp_path / 'run', progress=False)
    assert run.data.classes == classes
    fresh = T.Trainer(override(cfg, ['run.init=']), tmp_path / 'fresh', progress=False).student
    lines = [str(w.message) for w in said if 'rows by name' in str(w.message)]
    kept = [c for c in classes if c in OLD]
    assert len(lines) == 1 and f'{len(kept)} of {len(classes)} rows by name' in lines[0]
    for name in set(classes) - set(OLD):
        assert f'new, untrained: {name}' in lines[0]
        row = classes.index(name)
        for key, value in run.student.state_dict().items():
            if 'class_head' in key or 'class_embed' in key or 'label_enc' in key:
                assert torch.equal(value[row], fresh.state_dict()[key][row])
    for name in set(OLD) - set(classes):
        assert 'left out: ' in lines[0] and name in lines[0]
    for network in (run.student, run.teacher):
        same_ap(evaluate_model(network, run.data.labelled, run.cfg.view), wanted, classes)


@pytest.mark.parametrize('case', NEW)
def test_an_import_of_a_trained_run_keeps_the_ap_of_its_classes(case, trained, tmp_path):
    _, source, wanted = trained
    classes = NEW[case]
    report = import_weights(source, tmp_path / 'run', to=classes)
    assert report.count('matched') == len(report.rows)
    model, cfg, names = load_model(tmp_path / 'run')
    assert names == classes
    ds = open_dataset(str(squares(tmp_path / 'data', classes)), 'train')
    same_ap(evaluate_model(model, ds, cfg.view), wanted, classes)


def test_without_the_names_the_rows_would_be_wrong(trained, tmp_path):
    "The measurement sees a mistake: rows left in their old order lose the AP"
    _, source, wanted = trained
    model, cfg, _ = load_model(source)
    ds = open_dataset(str(squares(tmp_path / 'data', NEW['order'])), 'train')
    assert evaluate_model(model, ds, cfg.view)['AP'] < wanted['AP'] / 2


def test_the_same_classes_say_nothing(trained, tmp_path):
    detector, source, wanted = trained
    cfg = config(detector, squares(tmp_path / 'data', OLD), f'run.init={source}')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        run = T.Trainer(cfg, tmp_path / 'run', progress=False)
    same_ap(evaluate_model(run.teacher, run.data.labelled, run.cfg.view), wanted, OLD)


def test_ids_of_coco_become_the_rows_of_their_names(trained, tmp_path):
    "91 rows of ids, of which three are trained: their AP is that of the three classes"
    from semidetr.detectors.weight_files import COCO_UNUSED, coco_id_names, map_class_rows

    detector, source, wanted = trained
    ids = dict(red=1, green=44, blue=90)  # person, bottle, toothbrush
    names = coco_id_names()
    by_id = [f'unused {i}' if i in COCO_UNUSED else name for i, name in enumerate(names)]
    saved = load_checkpoint(source)
    rename = {colour: names[i] for colour, i in ids.items()}
    model = build_detector(config(detector, source, 'detector.num_classes=91').detector.untrained())
    fresh = model.state_dict()
    old = [rename[c] for c in OLD]
    for network in ('student', 'teacher'):
        saved[network], _ = map_class_rows(saved[network], old, by_id, fresh)
    head = next(k for k in saved['teacher'] if k.startswith(('class_head', 'class_embed')) and 'bias' in k)
    assert len(saved['teacher'][head]) == 91 + (detector == 'detr')  # no object comes last
    saved['classes'] = by_id
    saved['config']['detector']['num_classes'] = 91
    shutil.copytree(source, tmp_path / 'ids')
    from semidetr.train.checkpoint import save_checkpoint

    save_checkpoint(tmp_path / 'ids' / 'last.pt', **{k: v for k, v in saved.items() if k != 'format'})
    to = [name for name in names if name != 'N/A']
    import_weights(tmp_path / 'ids', tmp_path / 'run', to=to)
    model, cfg, classes = load_model(tmp_path / 'run')
    assert classes == to and len(to) == 80
    ds = open_dataset(str(squares(tmp_path / 'data', OLD)), 'train')
    import_weights(tmp_path / 'run', tmp_path / 'three', to=old)
    model, cfg, _ = load_model(tmp_path / 'three')
    metrics = evaluate_model(model, ds, cfg.view)
    same_ap(metrics, wanted, OLD)
