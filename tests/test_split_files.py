"A split file that is not one of these data is refused where it enters: training, evaluation, doctor, calls."

import json, warnings
import pytest
from test_situations_commands import pictures, run, train
from test_situations_runs import coco, one_line
from semidetr.core import DataError
from semidetr.data.catalog import open_dataset
from semidetr.data.doctor import check_dataset
from semidetr.data.splits import Split, load_split, read_index_list, save_split
from semidetr.train.config import DataConfig, preset, to_dict
from semidetr.train.run_data import build_data, images_of_roles
from semidetr.train.run_folder import check_same_run

FAULTS = {  # what is changed in the file -> words of the message
    'overlap': (dict(labelled=[1, 2], unlabelled=[2, 3]), 'image 2 of unlabelled is also in labelled'),
    'overlap with development': (dict(dev=[1]), 'image 1 of dev is also in labelled'),
    'repeated': (dict(labelled=[1, 1]), 'image 1 of labelled is there twice'),
    'repeated unlabelled': (dict(unlabelled=[4, 5, 4]), 'image 4 of unlabelled is there twice'),
    'nothing labelled': (dict(labelled=[]), 'no image is labelled'),
    'unknown': (dict(labelled=[1, 77]), "labelled names 1 images that .* does not have, e.g. 77"),
    'unknown for development': (dict(dev=[-3]), 'dev names 1 images .*e.g. -3'),
    'text for numbers': (dict(labelled=['1']), "labelled names 1 images .*e.g. '1' .its first one is 0"),
    'fraction': (dict(labelled=[1.0]), r'labelled\[0\] is 1.0'),
    'truth value': (dict(dev=[True]), r'dev\[0\] is True'),
    'list of lists': (dict(unlabelled=[[4]]), r'unlabelled\[0\] is list'),
    'one number': (dict(labelled=1), 'labelled is 1'),
    'null': (dict(dev=None), 'dev is None'),
    'no part': (dict(dev=...), 'damaged split'),
}


@pytest.fixture
def shop(tmp_path):
    "Eight images with ids 0 to 7, and a file that divides them"
    names = [f'{n}.png' for n in range(8)]
    pictures(tmp_path / 'shop' / 'images', names)
    coco(tmp_path / 'shop' / 'instances_train.json', names)
    ds = open_dataset(str(tmp_path / 'shop'))
    parts = Split([0, 1], [4, 5, 6, 7], [2, 3], count=2, fingerprint=ds.fingerprint(), dataset=ds.name)
    save_split(parts, tmp_path / 'shop' / 'split.json')
    return tmp_path / 'shop'


def build(shop):
    return build_data(DataConfig(data=str(shop), split_file=str(shop / 'split.json'), dev=2))


def change(shop, values):
    path = shop / 'split.json'
    kept = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in kept.items() if v is not ...}))


@pytest.mark.parametrize('name', FAULTS)
def test_refused_in_one_line_with_the_file_and_a_cure(shop, name):
    "By what training and evaluation on the development part open, and by the doctor"
    d = build(shop)
    assert (list(d.labelled.ids), list(d.dev.ids), len(d.unlabelled)) == ([0, 1], [2, 3], 4)
    assert check_dataset(str(shop), split_files=shop / 'split.json', progress=False).exit_code == 0
    values, words = FAULTS[name]
    change(shop, values)
    with pytest.raises(DataError, match=f'split.json: .*{words}.*`semidetr split`') as e:
        build(shop)
    assert '\n' not in str(e.value)
    report = check_dataset(str(shop), split_files=shop / 'split.json', progress=False)
    kinds = {f.kind for f in report.of('error')}
    assert kinds and kinds <= {'bad-split', 'split-overlap', 'unknown-split-id'}


def test_by_the_commands(shop):
    "semidetr train, eval of the development part, doctor"
    assert train(shop, '--data', '.', '--split-file', 'split.json')[0] == 0
    assert run(shop, 'eval', '--run', 'run', '--part', 'dev')[0] == 0
    (shop / 'run' / 'run.json').unlink()
    change(shop, dict(unlabelled=[1, 4]))
    words = 'split.json: image 1 of unlabelled is also in labelled', 'make the split again'
    one_line(train(shop, '--data', '.', '--split-file', 'split.json'), *words)
    one_line(run(shop, 'eval', '--run', 'run', '--part', 'dev'), *words)
    code, out, _ = run(shop, 'doctor', '.', '--split-file', 'split.json')
    assert code == 2 and 'split-overlap' in out


def test_another_split_of_the_same_images_is_another_run(shop):
    assert train(shop, '--data', '.', '--split-file', 'split.json')[0] == 0
    (shop / 'run' / 'run.json').unlink()
    change(shop, dict(labelled=[0, 4], unlabelled=[1, 5, 6, 7]))
    err = one_line(train(shop, '--data', '.', '--split-file', 'split.json'), 'labelled images have changed')
    assert '1 added (e.g. 4), 1 removed (e.g. 1)' in err and 'run.init=run' in err


def test_images_in_no_part_are_counted(shop):
    change(shop, dict(unlabelled=[4, 5]))
    with pytest.warns(UserWarning, match='split.json: 2 of 8 images of .* are in no part and are not used'):
        build(shop)


def test_overlapping_parts_are_not_stored(tmp_path):
    for parts, words in (
        (([1], [1], []), 'image 1 of unlabelled is also in labelled'),
        (([1, 1], [2], []), 'image 1 of labelled is there twice'),
        (([], [2], []), 'no image is labelled'),
    ):
        with pytest.raises(DataError, match=f's.json: {words}'):
            save_split(Split(*parts), tmp_path / 's.json')
    assert not list(tmp_path.iterdir())
    save_split(Split([1], ['1'], []), tmp_path / 's.json')  # a number and a text are two ids
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert load_split(tmp_path / 's.json').unlabelled == ['1']


def test_an_index_list_that_repeats_an_image_names_its_file(shop):
    (shop / 'list.json').write_text('[3, 1, 3]')
    with pytest.raises(DataError, match='list.json: .*image 3 is listed twice.*list it once'):
        read_index_list(shop / 'list.json', open_dataset(str(shop)), convention='ids')


def test_a_test_split_that_appears_or_is_gone_is_another_experiment(shop):
    roles, cfg = images_of_roles(build(shop)), preset('digits')
    assert roles['test'] == dict(ids=[], bytes=[], content='')
    assert 'test' not in images_of_roles(build(shop), False)
    more = roles | dict(test=dict(ids=[1], bytes=[3], content='x'))
    for old, new, words in ((roles, more, r'1 added \(e.g. 1\)'), (more, roles, r'1 removed \(e.g. 1\)')):
        with pytest.raises(DataError, match=f'the test images have changed since this run began: {words}'):
            check_same_run(to_dict(cfg), cfg, 'x', 'x', 'runs/a', old, new)
    unmeasured = {k: v for k, v in roles.items() if k != 'test'}
    check_same_run(to_dict(cfg), cfg, 'x', 'x', 'runs/a', unmeasured, more)
    check_same_run(to_dict(cfg), cfg, 'x', 'x', 'runs/a', more, unmeasured)
