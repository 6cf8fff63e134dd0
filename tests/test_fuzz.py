"Damaged files open with the right boxes, or are refused in one line; relatives of what fuzzing found"

import json, os, runpy, signal
import pytest
from conftest import ROOT
from semidetr.core import DataError, printable
from semidetr.data.catalog import open_dataset
from semidetr.data.doctor import check_dataset
from semidetr.data.entries import as_flag, as_number
from semidetr.data.files import load_image, read_size
from semidetr.text import read_json, read_text

FUZZ = runpy.run_path(str(ROOT / 'benchmarks' / 'fuzz.py'))


def run_many(cases):
    "Counts and findings; the handlers of signals stay as they were"
    old = {s: signal.getsignal(s) for s in (signal.SIGALRM, signal.SIGPROF)}
    try:
        return FUZZ['run_many'](cases)
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


@pytest.mark.parametrize('kind', FUZZ['FORMATS'])
def test_damaged_inputs(kind):
    counts, findings = run_many([(kind, 1_000_000 + n) for n in range(130)])
    assert not findings, findings
    assert sum(counts.values()) == 130 and len(counts) > 1  # some open, some are refused


def test_the_record_of_a_run():
    "What is written is what was counted; the committed one has 300,000 inputs of all formats and no finding"
    counts = {('coco', 'opened'): 3, ('voc', 'DataError'): 4, ('coco', 'DataError'): 2, ('voc', 'finding'): 1}
    new = FUZZ['record'](counts, {'voc:75': 'a fault'}, 12, 20, 70)
    assert (new['inputs'], new['first'], new['seconds'], new['cpu_seconds']) == (10, 70, 12, 20)
    assert new['formats'] == dict(coco=dict(opened=3, DataError=2), voc=dict(DataError=4, finding=1))
    assert new['findings'] == {'voc:75': 'a fault'}
    kept = json.loads((ROOT / 'benchmarks' / 'results' / 'fuzz.json').read_text())
    assert kept.keys() == new.keys() and kept['findings'] == {}
    assert kept['formats'].keys() == FUZZ['FORMATS'].keys()
    assert kept['inputs'] == sum(sum(v.values()) for v in kept['formats'].values()) >= 300_000


@pytest.mark.parametrize('kind', FUZZ['FORMATS'])
def test_an_undamaged_input_opens(tmp_path, kind):
    "So that what is refused is refused for its damage"
    FUZZ['FORMATS'][kind][1](tmp_path)
    FUZZ['read_input'](kind, tmp_path)


@pytest.mark.parametrize('kind', ['coco', 'yolo', 'voc', 'beside'])
def test_the_oracle_agrees_on_the_valid_set(tmp_path, kind):
    FUZZ['FORMATS'][kind][1](tmp_path)
    ds = open_dataset(str(tmp_path))
    oracle = FUZZ['FORMATS'][kind][2]
    FUZZ['check_opened'](ds, oracle and oracle(tmp_path, ds))
    assert sum(len(ds.annotation(n)['boxes']) for n in range(len(ds))) == (2 if kind == 'beside' else 3)


# --- relatives of what fuzzing found -------------------------------------------------------
def refused(root, *words):
    with pytest.raises(DataError) as e:
        open_dataset(str(root))
    text = str(e.value)
    assert len(text.splitlines()) == 1 and all(w in text for w in words), text


def coco(root, edit):
    FUZZ['make_coco'](root)
    data = FUZZ['coco_content']()
    edit(data)
    (root / 'instances_train.json').write_text(json.dumps(data))
    return root


@pytest.mark.parametrize('name', ['a.png', 'list.txt', 'a.json'])
def test_pipes_and_folders_are_no_files(tmp_path, name):
    os.mkfifo(tmp_path / name)
    (tmp_path / 'folder.png').mkdir()
    for path, what in ((tmp_path / name, 'a pipe or a device'), (tmp_path / 'folder.png', 'a ')):
        for read in (read_size, load_image):
            with pytest.raises(OSError, match=what):
                read(path)
        for read in (read_text, read_json):
            with pytest.raises(DataError, match='give a text file'):
                read(path)


@pytest.mark.parametrize('key', ['images', 'annotations', 'categories'])
def test_two_lists_of_one_name(tmp_path, key):
    FUZZ['make_coco'](tmp_path)
    path = tmp_path / 'instances_train.json'
    path.write_text(path.read_text()[:-1] + f', "{key}": []}}')
    refused(tmp_path, 'instances_train.json', f"'{key}' occurs twice")


def test_ids_that_differ_in_type_only(tmp_path):
    refused(coco(tmp_path / 'a', lambda d: d['images'][2].update(id='0')), "image '0'", 'used before')
    refused(coco(tmp_path / 'b', lambda d: d['categories'][1].update(id='7')), "category '7'", 'used before')
    refused(coco(tmp_path / 'c', lambda d: d['annotations'][1].update(id='0')), 'used before')


@pytest.mark.parametrize('size', [10**30, 16.5, True, 'wide'])
def test_sizes_that_no_image_has(tmp_path, size):
    refused(coco(tmp_path, lambda d: d['images'][0].update(width=size)), 'image 0 (0.png)')


@pytest.mark.parametrize('value', [2, -1, float('nan'), 0.5, '2', 'maybe'])
def test_numbers_that_are_no_flags(tmp_path, value):
    assert as_flag(value) is None
    refused(coco(tmp_path, lambda d: d['annotations'][0].update(iscrowd=value)), 'iscrowd', 'write 0 or 1')


@pytest.mark.parametrize('name', ['x' * 300 + '.png', 'a\0b.png', '\ud800.png', 'a\nb.png', '\u202egnp.a'])
def test_names_that_no_file_can_have(tmp_path, name):
    root = coco(tmp_path, lambda d: d['images'][0].update(file_name=name))
    try:
        ds = open_dataset(str(root))
        with pytest.raises(DataError) as e:
            ds[0]
    except DataError as refusal:
        assert printable(str(refusal)) == str(refusal)
    else:
        assert printable(str(e.value)) == str(e.value) and 'image 0' in str(e.value)


def test_numbers_with_underscores(tmp_path):
    for text in ('1_5', '_1', '1__0'):
        with pytest.raises(ValueError):
            as_number(text)
    FUZZ['make_yolo'](tmp_path / 'a' if (tmp_path / 'a').mkdir() is None else None)
    (tmp_path / 'a/labels/train/0.txt').write_text('0 0.5 0.5 0.2_5 0.3\n')
    refused(tmp_path / 'a', '0.txt', 'line 1')


@pytest.mark.parametrize(
    'old,new,words',
    [
        ('<xmin>3</xmin>', '<xmin>3</xmin><xmin>4</xmin>', '2 numbers xmin'),
        ('<ymax>7</ymax>', '', '0 numbers ymax'),
        ('<xmin>3</xmin>', '<xmin>0_3</xmin>', "'0_3' is not a number"),
        ('</bndbox>', '</bndbox><bndbox><xmin>1</xmin></bndbox>', '2 numbers xmin'),
    ],
)
def test_boxes_of_voc_that_are_not_one(tmp_path, old, new, words):
    FUZZ['make_voc'](tmp_path)
    path = tmp_path / 'Annotations/0.xml'
    path.write_text(path.read_text().replace(old, new, 1))
    refused(tmp_path, '0.xml', words)


@pytest.mark.parametrize(
    'text,words',
    [
        ('train: images\nnames: [dog\n', 'line '),
        ('train: images\nnames: {0: dog, 0: cat}\n', "the key '0' occurs twice"),
        ('train: images\nnames: {0: dog, 00: cat}\n', 'two names to one label'),
        ('train: images\ntrain: other\nnames: [dog]\n', "the key 'train' occurs twice"),
        ('train: {a: b}\nnames: [dog, cat]\n', 'no path'),
        ('train: [[images]]\nnames: [dog, cat]\n', 'no path'),
        ('train: images/train\nkpt_shape: 12\nnames: [dog, cat]\n', 'kpt_shape'),
        ('train: images/train\nkpt_shape: [[4], 2]\nnames: [dog, cat]\n', 'kpt_shape'),
        ('train: images/train\nkpt_shape: [4, 5]\nnames: [dog, cat]\n', 'kpt_shape'),
        (FUZZ['YAML_BOMB'].decode(), 'stand for more than 100,000 values'),
    ],
)
def test_data_yaml(tmp_path, text, words):
    FUZZ['make_yolo'](tmp_path)
    (tmp_path / 'data.yaml').write_text(text)
    refused(tmp_path, 'data.yaml', words)


def test_a_link_to_itself_and_a_list_of_folders(tmp_path):
    FUZZ['make_folder'](tmp_path)
    (tmp_path / 'loop').symlink_to(tmp_path / 'loop')
    assert len(open_dataset(str(tmp_path))) == 7
    FUZZ['make_voc'](tmp_path / 'voc' if (tmp_path / 'voc').mkdir() is None else None)
    (tmp_path / 'voc/ImageSets/Main/train.txt').write_text('0\nfolder/\n')
    refused(tmp_path / 'voc', 'no such file')


def test_the_doctor_does_not_wait_for_a_pipe(tmp_path):
    FUZZ['make_folder'](tmp_path)
    (tmp_path / 'e.png').unlink()
    os.mkfifo(tmp_path / 'e.png')
    for quick in (False, True):
        report = check_dataset(str(tmp_path), quick=quick, progress=False)
        assert [f.where.endswith('e.png') for f in report.of('error')] == [True]


def test_inputs_that_were_findings():
    "Records without a part, with a text or a table as a metric, in a loop of links; long names"
    numbers = dict(record=(10033, 10141, 10534, 10793, 3729, 7807), weights=(10625,))
    cases = [(kind, n) for kind, ns in numbers.items() for n in ns]
    counts, findings = run_many(cases)
    assert findings == {} and sum(counts.values()) == len(cases)
