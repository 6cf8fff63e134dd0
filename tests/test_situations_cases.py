"The collection of small data sets in $SEMIDETR_CASES: each opens with the right values, or is one line"

import json
import os
import shutil
from pathlib import Path
import pytest
from test_situations_commands import run, train
from semidetr.core import DataError
from semidetr.data.catalog import open_dataset
from semidetr.data.doctor import check_dataset

CASES = Path(os.environ.get('SEMIDETR_CASES', 'none'))
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason='SEMIDETR_CASES names no folder')
FIRST = [99, 55, 146, 87]  # corners of the first object of the first drawing, in all of them
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
FOLDERS = dict(folder_named_train=9, heic_mixed=3, img_16bit_as_object=1, unlabelled_one_broken=6)


@pytest.mark.parametrize('case', BOXES)
def test_boxes(case):
    ds = open_dataset(str(CASES / case))
    found = [ds.annotation(i) for i in range(len(ds))]
    boxes = sum(len(a['labels']) for a in found)
    ignored = sum(int(a['ignore'].sum()) for a in found)
    assert (len(ds), boxes, ignored, list(ds.classes)) == BOXES[case]
    assert found[0]['boxes'][0].tolist() == pytest.approx(FIRST, abs=0.6)
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
