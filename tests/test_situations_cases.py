"The collection of small data sets in $SEMIDETR_CASES: each opens with the right values, or is one line"

import json
import os
import shutil
from pathlib import Path
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_situations_commands import notes, run, train
from semidetr.core import DataError
from semidetr.data.catalog import open_dataset
from semidetr.data.doctor import check_dataset
from semidetr.data.loader import SemiLoader
from semidetr.train.checkpoint import load_checkpoint
from semidetr.train.config import DataConfig
from semidetr.train.metrics import evaluate
from semidetr.train.predict import Predictor, as_sample
from semidetr.train.run_data import build_data

CASES = Path(os.environ.get('SEMIDETR_CASES', ROOT.parent / 'shared' / 'cases'))
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason=f'no {CASES}: set SEMIDETR_CASES')
DRAWINGS = [  # corners of the two objects of each drawing, the square before the bar
    [[99, 55, 146, 87], [125, 63, 157, 92]],
    [[18, 34, 42, 72], [50, 28, 85, 68]],
    [[13, 12, 63, 33], [34, 79, 77, 108]],
    [[35, 49, 62, 87], [118, 62, 157, 82]],
    [[28, 52, 55, 81], [104, 72, 126, 92]],
    [[96, 47, 135, 75], [85, 8, 129, 35]],
    [[107, 12, 152, 50], [39, 86, 60, 106]],
    [[52, 85, 82, 109], [9, 66, 40, 104]],
]
SHAPES, SORTED = ['square', 'bar'], ['bar', 'square']
BOXES = {  # case -> images, boxes, ignored boxes, classes
    'background_images': (12, 12, 0, SHAPES),
    'coco_area_text': (6, 12, 0, SHAPES),
    'coco_crowd_mixed': (8, 16, 0, SHAPES),
    'coco_crowd_text': (6, 12, 0, SHAPES),
    'coco_ls_folder': (6, 12, 0, SHAPES),
    'coco_utf16': (6, 12, 0, SHAPES),
    'img_16bit_dark': (4, 8, 0, SHAPES),
    'img_float01': (4, 8, 0, SHAPES),
    'init_swapped_classes/first': (8, 16, 0, SHAPES),
    'init_swapped_classes/second': (8, 16, 0, SORTED),
    'labelled_and_rest_in_one_folder': (8, 16, 0, SHAPES),
    'names_unicode': (8, 16, 0, ['方块', 'Größe ✓']),
    'rf': (4, 8, 0, SHAPES),
    'rf/train': (4, 8, 0, SHAPES),
    'voc_difficult_word': (3, 6, 3, ['square']),
    'voc_list_bom': (3, 6, 0, SORTED),
    'voc_list_utf16': (3, 6, 0, SORTED),
    'voc_no_lists': (4, 8, 0, SORTED),
    'yolo_Images_Labels': (3, 6, 0, SHAPES),
    'yolo_beside': (3, 6, 0, SHAPES),
    'yolo_conf_rows': (3, 6, 0, SHAPES),
    'yolo_label_bom': (3, 6, 0, SHAPES),
    'yolo_label_utf16': (3, 6, 0, SHAPES),
    'yolo_pose_2d': (3, 6, 0, SHAPES),
    'yolo_yaml_codes': (3, 6, 0, ['007', '1e3']),
    'yolo_yaml_utf16': (3, 6, 0, SHAPES),
    'yolo_yaml_words': (3, 6, 0, ['no', 'yes']),
}
NAMES = {  # the names of the two objects where they are others
    'init_swapped_classes/second': ['bar', 'square'],
    'names_unicode': ['方块', 'Größe ✓'],
    'voc_difficult_word': ['square', 'square'],
    'yolo_yaml_codes': ['007', '1e3'],
    'yolo_yaml_words': ['no', 'yes'],
}
FOLDERS = dict(folder_named_train=9, heic_mixed=3, img_16bit_as_object=1, unlabelled_one_broken=6)


@pytest.mark.parametrize('case', BOXES)
def test_boxes(case):
    ds = open_dataset(str(CASES / case))
    found = [ds.annotation(i) for i in range(len(ds))]
    boxes = sum(len(a['labels']) for a in found)
    ignored = sum(int(a['ignore'].sum()) for a in found)
    assert (len(ds), boxes, ignored, list(ds.classes)) == BOXES[case]
    moved = [0.5, 0.25, 0, 0] if case == 'voc_difficult_word' else [0, 0, 0, 0]  # its corners are fractions
    for a, corners in zip(found, DRAWINGS):
        if len(a['boxes']):
            wanted = torch.tensor(corners) + torch.tensor(moved)
            assert (a['boxes'] - wanted).abs().max() < 1e-3
            assert [ds.classes[k] for k in a['labels'].tolist()] == NAMES.get(case, ['square', 'bar'])
    with_boxes = [len(a['boxes']) > 0 for a in found]
    assert with_boxes == [n < boxes / 2 for n in range(len(ds))]  # two in each drawing
    assert not check_dataset(str(CASES / case), progress=False).errors


@pytest.mark.parametrize('case', FOLDERS)
def test_folders_of_images(case):
    assert len(open_dataset(str(CASES / case))) == FOLDERS[case]


def test_refused():
    for case, file in (('yolo_yaml_gbk', 'data.yaml'), ('config_encodings', 'config_encodings')):
        with pytest.raises(DataError, match=f'{file}: .*; ') as e:
            open_dataset(str(CASES / case))
        assert '\n' not in str(e.value)


def test_settings_in_several_encodings(tmp_path):
    for file in ('bom.toml', 'bom.json', 'utf16.toml'):
        code, out, _ = run(tmp_path, 'train', '--config', CASES / 'config_encodings' / file, '--show-config')
        assert code == 0 and json.loads(out)['data']['count'] == 20
    code, _, err = run(tmp_path, 'train', '--config', CASES / 'config_encodings' / 'cp1252.toml')
    assert code == 2 and 'cp1252.toml: byte 21 (0xFC, line 2) is not UTF-8; save it as UTF-8' in err


def test_linked_photographs(tmp_path):
    shutil.copytree(CASES / 'symlink_photos', tmp_path / 'a')
    (tmp_path / 'a' / 'only').mkdir()
    for folder in ('photos', 'only'):
        (tmp_path / 'a' / folder / 'cam1').symlink_to(tmp_path / 'a' / 'disk2' / 'cam1')
    assert [len(open_dataset(str(tmp_path / 'a' / f))) for f in ('photos', 'only')] == [7, 5]


def test_training_with_the_folder_of_all_images(tmp_path):
    shutil.copytree(CASES / 'labelled_and_rest_in_one_folder', tmp_path / 'a')
    words = ['--data', 'a', '--unlabelled', 'a/images', '--method', 'mean_teacher', 'method.burn_in_iters=1']
    code, out, _ = train(tmp_path, *words, '--count', 4, 'data.dev=2')
    assert code == 0 and '4 labelled and 2 unlabelled images' in out
    assert '12 of 12 images leave the unlabelled pool' in out and '4 test' in out


def test_training_on_floats_needs_white(tmp_path):
    code, _, err = train(tmp_path, '--data', CASES / 'img_float01')
    assert code == 2 and 'set data.white' in err and err.count('\n') == 1
    code, _, err = train(tmp_path, '--data', CASES / 'img_float01', 'data.white=1')
    assert code == 0 and not err
    words = ('predict', '--run', 'run', '-s', CASES / 'img_float01' / 'images', '-q', '-o', 'found')
    assert run(tmp_path, *words)[0] == 0


# --- scale of the pixels -------------------------------------------------------------------------
def gray(sample):
    return np.asarray(sample.image)[..., 0]


@pytest.mark.parametrize('white, wanted', [(None, (12, 3)), (4095, (192, 54))])
def test_a_16_bit_file_object_and_array_are_the_same_picture(white, wanted):
    "3083 and 867 of 65535 or of 4095, in steps of 1/255"
    path = CASES / 'img_16bit_as_object' / 'images' / '000.png'
    with Image.open(path) as picture:
        kinds = [path, picture, np.asarray(picture)]
        for kind in kinds:
            found = gray(as_sample(kind, white or 0))
            assert (int(found.max()), int(found.min())) == wanted


def test_dark_16_bit_images_have_one_scale():
    "No image decides for itself; one decision for the set makes them visible"
    ds = open_dataset(str(CASES / 'img_16bit_dark'))
    assert [int(gray(ds[i]).max()) for i in range(4)] == [1, 0, 1, 0]  # maxima 301, 225, 299 and 224, by 256
    report = check_dataset(str(CASES / 'img_16bit_dark'), progress=False)
    assert len(report.of('warning', 'constant-image')) == 4
    data = build_data(DataConfig(data=str(CASES / 'img_16bit_dark'), count=2, dev=0, white=301.0))
    found = [gray(p[i]) for p in (data.labelled, data.unlabelled) for i in range(2)]
    assert sorted(int(f.max()) for f in found) == [190, 191, 253, 255]  # 224, 225, 299 and 301 of 301


def test_floats_are_scaled_by_white():
    ds = open_dataset(str(CASES / 'img_float01'))
    with pytest.raises(DataError, match='data.white'):
        ds[0]
    files = sorted((CASES / 'img_float01' / 'images').iterdir())
    lights = [(int(f.min()), int(f.max())) for f in (gray(as_sample(p, 1.0)) for p in files)]
    assert lights == [(54, 192), (52, 192), (80, 191), (94, 191)]
    report = check_dataset(str(CASES / 'img_float01'), progress=False)
    assert len(report.of('warning', 'unknown-white')) == 4


# --- what is drawn -------------------------------------------------------------------------------
@pytest.mark.parametrize('how, drawn', [('negatives', 12), ('left_out', 6)])
def test_background_images_are_drawn_or_left_out(how, drawn):
    data = build_data(DataConfig(data=str(CASES / 'background_images'), dev=0, background=how))
    loader = SemiLoader(data.labelled, n_labelled=4, num_workers=0, keep_empty=True)
    seen = {data.labelled.ids[i] for t in range(12) for _, i in loader.draws(t)[0]}
    names = [1, 2, 3, 4, 5, 6] + [100, 101, 102, 103, 104, 105] * (how == 'negatives')
    assert sorted(seen) == sorted(data.labelled.ids) == names and len(names) == drawn
    assert sum('6 labelled images without a box' in n for n in data.notes) == 1


def test_150_objects(tmp_path):
    "All of them are read, what 20 queries and 100 detections leave out is said, and perfect detections count"
    path = str(CASES / 'dense150')
    ds = open_dataset(path)
    rows = [ds.annotation(i)['boxes'] for i in range(3)]
    corners = [[4 + 20 * (k % 15), 4 + 22 * (k // 15)] for k in range(150)]
    wanted = torch.tensor([[x, y, x + 10, y + 10] for x, y in corners])
    assert all(torch.equal(boxes, wanted.float()) for boxes in rows) and ds.classes == ['pill']
    code, out, _ = train(tmp_path, '--data', path, 'data.dev=1')
    queries, counted = [n for n in notes(out) if 'objects (up to 150)' in n]
    assert code == 0 and 'at most 20 per image; set detector.transformer.num_queries=150' in queries
    assert '--max-dets 150' in counted
    found = {}
    for i, image_id in enumerate(ds.ids):
        a = ds.annotation(i)
        found[image_id] = dict(scores=torch.linspace(1, 0.5, 150), labels=a['labels'], boxes=a['boxes'])
    assert evaluate(ds, found)['AR100'] == pytest.approx(100 * 100 / 150)
    assert evaluate(ds, found, max_dets=150)['AP'] == pytest.approx(100)


# --- classes by name -----------------------------------------------------------------------------
def test_the_rows_of_swapped_classes_move(tmp_path):
    first, second = (str(CASES / 'init_swapped_classes' / name) for name in ('first', 'second'))
    assert train(tmp_path, '--data', first, 'data.dev=2')[0] == 0
    words = ['--data', second, 'data.dev=2', f'run.init={tmp_path / "run" / "last.pt"}', 'optim.lr=1e-30']
    code, out, err = train(tmp_path, *words, 'optim.weight_decay=0', iters=1, out='next')
    assert code == 0 and '2 of 2 rows by name' in err and err.count('\n') == 1
    old, new = load_checkpoint(tmp_path / 'run'), load_checkpoint(tmp_path / 'next')
    assert old['classes'] == SHAPES and new['classes'] == SORTED
    for key in ('class_head.weight', 'class_head.bias', 'enc_class_head.weight'):
        rows = new['teacher'][key]
        assert torch.allclose(rows.flip(0), old['teacher'][key], atol=1e-6)
        assert 'bias' in key or (rows - old['teacher'][key]).abs().max() > 1e-4
    assert torch.allclose(
        new['teacher']['label_enc.weight'][:2].flip(0), old['teacher']['label_enc.weight'][:2]
    )
    assert Predictor(tmp_path / 'next', 'cpu').classes == SORTED


def test_a_folder_with_a_broken_photograph(tmp_path):
    "Named by the doctor and by the training, which goes on where the setting allows it"
    folder = CASES / 'unlabelled_one_broken'
    [fault] = check_dataset(str(folder), progress=False).of('error')
    assert fault.kind == 'unreadable-image' and 'u3.jpg' in fault.item
    data = ('--data', CASES / 'labelled_and_rest_in_one_folder', '--unlabelled', folder)
    words = [*data, '--method', 'mean_teacher', 'method.burn_in_iters=1']
    code, _, err = train(tmp_path, *words, 'data.skip_broken=0', iters=4)
    assert code == 2 and err.count('\n') == 1 and 'u3.jpg' in err and 'data.skip_broken=1' in err
    code, _, err = train(tmp_path, *words, 'data.skip_broken=1', iters=4, out='other')
    assert code == 0 and err.count('u3.jpg: ') == 1 and 'skipped (1 of at most 1)' in err
