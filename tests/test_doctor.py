"""The doctor finds all faults at once; every data set here is made to be ill."""

import json, math, os, random
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pytest
from PIL import Image
from semidetr.core import DataError
from semidetr.data import checks, entries as E, formats
from semidetr.data.catalog import open_dataset
from semidetr.data.datasets import CocoDataset, Subset, Unlabelled
from semidetr.data.digits import DigitsScenes
from semidetr.data.doctor import Fault, check_dataset, contact_sheet
from semidetr.data.files import coco_faults
from semidetr.data.splits import make_split, save_split
from test_datasets import REAL, base, picture, voc


def kinds(report, level=None):
    return sorted({f.kind for f in report.of(level)})


def make(root, data=None, name='instances_train.json', files='abc', images='images'):
    for n in files:
        picture(root / images / f'{n}.jpg')
    text = data if isinstance(data, str) else json.dumps(base() if data is None else data)
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)
    return root / name


def test_healthy(tmp_path):
    data = base()
    data['annotations'].pop()
    for c, n in zip(data['categories'], (3, 1, 2)):
        c['id'] = n
    for a, n in zip(data['annotations'], (2, 1, 1)):
        a['category_id'] = n
    data['annotations'][1]['iscrowd'] = 0
    data['annotations'].append(dict(id=9, image_id=11, category_id=3, bbox=[0, 0, 8, 8]))
    data['annotations'][2]['bbox'] = [50, 30, 10, 10]
    make(tmp_path, data)
    r = check_dataset(str(tmp_path), split='train')
    assert r.faults == [] and r.exit_code == 0
    assert 'fit for training: 0 errors, 0 warnings, 0 notes' in r.to_text()
    assert r.counts['images'] == 3 and r.counts['boxes'] == 4
    assert r.histogram == {'zebra': 1, 'ant': 2, 'dog': 1}
    assert r.box_sizes['95 %'] > r.box_sizes['median'] > r.box_sizes['5 %'] > 4


def test_handled_things_are_no_errors(tmp_path):
    r = check_dataset(str(make(tmp_path)))
    handled = ['class-never-seen', 'gaps-in-class-ids', 'images-without-boxes', 'overhang', 'zero-area']
    assert kinds(r) == handled and kinds(r, 'error') == [] and r.exit_code == 0
    unused = r.of(kind='class-never-seen')[0]  # its only box is a crowd region
    assert unused.item == "class 'zebra' has no box that counts"
    for name in ('ignored boxes', 'images without a box', 'boxes without area, dropped'):
        assert r.counts[name] == 1
    assert r.of('info', 'images-without-boxes') and r.of('warning', 'zero-area')


def test_all_faults_in_one_pass(tmp_path):
    d = base()
    d['images'] += [
        dict(id=20, file_name='gone.jpg', width=60, height=40),
        dict(id=21, file_name='cut.jpg', width=60, height=40),
        dict(id=22, file_name='text.jpg', width=60, height=40),
        dict(id=23, file_name='size.jpg', width=60, height=41),
        dict(id=7, file_name='twin.jpg', width=60, height=40),
        dict(id=24, file_name='a.jpg', width=60, height=40),
        dict(id=25),
        'x',
        dict(id=26, file_name='neg.jpg', width=-1, height=40),
    ]
    bad = dict(image_id=7, category_id=1)
    d['annotations'] += [
        bad | dict(id=1, bbox=[1, 1, 5, 5]),
        bad | dict(id=10, bbox=[9, 9, -3, 4]),
        bad | dict(id=11, bbox=[500, 500, 5, 5]),
        bad | dict(id=12, bbox=[1, 1, float('inf'), 4]),
        bad | dict(id=13, bbox='1 2 3 4'),
        bad | dict(id=14, bbox=[1, 1, 1.5, 30]),
        bad | dict(id=15, category_id=77, bbox=[1, 1, 5, 5]),
        bad | dict(id=16, image_id=99, bbox=[1, 1, 5, 5]),
        dict(id=17),
        4,
        bad | dict(id=18, bbox=[1, 1, 5, 5]),
    ]
    d['categories'] += [dict(id=1, name='again'), dict(id=5, name='dog'), dict(id=6)]
    path = make(tmp_path, d, files=['a', 'b', 'c', 'cut', 'size', 'twin', 'neg'])
    (tmp_path / 'images/cut.jpg').write_bytes((tmp_path / 'images/cut.jpg').read_bytes()[:900])
    (tmp_path / 'images/text.jpg').write_text('no image')
    r = check_dataset(str(path))
    assert kinds(r, 'error') == [
        'bad-annotation',
        'bad-bbox',
        'bad-category',
        'bad-image-entry',
        'bad-image-size',
        'duplicate-annotation-id',
        'duplicate-category-id',
        'duplicate-image-id',
        'missing-image',
        'negative-box',
        'not-finite',
        'outside',
        'size-mismatch',
        'unknown-class',
        'unknown-image',
        'unreadable-image',
    ]
    assert {
        'duplicate-file-name',
        'duplicate-category-name',
        'repeated-box',
        'zero-area',
        'overhang',
        'gaps-in-class-ids',
        'class-never-seen',
    } <= set(kinds(r, 'warning'))
    assert (
        'tiny-box' in kinds(r, 'info')
        and len(r.of(kind='unreadable-image')) == 2
        and len(r.of(kind='bad-image-entry')) == 2
    )
    assert r.exit_code == 2 and 'not fit for training' in r.to_text()
    for f in r.faults:
        assert (
            f.where and f.item and f.cure and f.level in ('error', 'warning', 'info') and '\n' not in str(f)
        )
    gone = r.of(kind='missing-image')[0]
    assert gone.where.endswith('gone.jpg') and '20' in gone.item and str(path) in gone.cure
    with pytest.raises(DataError):
        CocoDataset(path)


def test_every_error_of_the_annotations_stops_loading_and_the_other_way_round(tmp_path):
    from test_datasets import REFUSED

    for case, (edit, _) in REFUSED.items():
        d = base()
        d = edit(d) or d
        path = make(tmp_path / case, d)
        assert check_dataset(str(path), quick=True).exit_code == 2, case


@pytest.mark.parametrize(
    'text,word',
    [('', 'empty'), ('{"images": [\n{"id": 1,}]}', 'line 2'), ('[1, 2]', 'list'), ('{"a": 1}', "'images'")],
)
def test_broken_file(tmp_path, text, word):
    r = check_dataset(str(make(tmp_path, text)))
    assert (
        r.exit_code == 2
        and len(r.of('error')) == 1
        and word in str(r.faults[0])
        and 'instances_train.json' in str(r.faults[0])
    )
    json.loads(r.to_json())


@pytest.mark.parametrize(
    'spoil,kind',
    [
        (lambda d: d['images'][0].update(width='60'), 'bad-image-size'),
        (lambda d: d.pop('categories'), 'schema'),
        (lambda d: d.update(annotations=3), 'schema'),
        (lambda d: d.update(categories=[4, {}]), 'bad-category'),
    ],
)
def test_entries_of_the_wrong_type_are_faults(tmp_path, spoil, kind):
    d = base()
    spoil(d)
    report = check_dataset(str(make(tmp_path, d)), quick=True)
    assert report.of('error', kind) and report.exit_code == 2


def test_nothing_there(tmp_path, monkeypatch):
    monkeypatch.delenv('SEMIDETR_DATA', raising=False)
    r = check_dataset(str(tmp_path / 'nowhere'))
    assert r.exit_code == 2 and 'SEMIDETR_DATA' in str(r.faults[0])


def test_missing_folder_is_one_fault_and_boxes_are_still_checked(tmp_path):
    d = base()
    d['annotations'][0]['category_id'] = 5
    r = check_dataset(str(make(tmp_path, d, files='')))
    assert kinds(r, 'error') == ['missing-image-folder', 'unknown-class']


def test_empty_annotations(tmp_path):
    d = base()
    d['annotations'] = []
    r = check_dataset(str(make(tmp_path, d)))
    assert (
        kinds(r) == ['no-annotations']
        and r.exit_code == 0
        and f'\n{UNLABELLED}: 0 errors, 1 warning, 0 notes' in r.to_text()
    )


UNLABELLED = 'fit as unlabelled data only, no box to learn from'


def test_missing_annotations(tmp_path):
    d = base()
    del d['annotations']
    r = check_dataset(str(path := make(tmp_path, d)))
    assert [(f.level, f.kind, f.where) for f in r.faults] == [
        ('warning', 'missing-annotations', str(path))
    ] and r.exit_code == 0
    assert (
        f'\n{UNLABELLED}: 0 errors, 1 warning, 0 notes' in r.to_text()
        and json.loads(r.to_json())['verdict'] == r.verdict == UNLABELLED
    )
    (tmp_path / 'images/a.jpg').unlink()
    assert check_dataset(str(tmp_path)).verdict == 'not fit for training'


@pytest.mark.parametrize('spoil', [dict(iscrowd=1), dict(bbox=[1, 1, 0, 5])])
def test_no_box_that_counts(tmp_path, spoil):
    "All to be ignored, or without area: loading takes it, training does not"
    from semidetr.data.loader import SemiLoader

    d = base()
    for a in d['annotations']:
        a.update(spoil)
    r = check_dataset(str(path := make(tmp_path, d)), quick=True)
    assert r.exit_code == 0 and r.verdict == UNLABELLED
    with pytest.raises(DataError, match='no labelled image has a box'):
        SemiLoader(CocoDataset(path), num_workers=0)


def test_unlabelled_sets(tmp_path):
    ds = CocoDataset(make(tmp_path / 'a'))
    picture(tmp_path / 'f/a.jpg')
    d = base()
    del d['annotations']
    for s in (Unlabelled(ds), str(tmp_path / 'f')):  # without boxes by nature: nothing is missing
        r = check_dataset(s)
        assert r.faults == [] and r.verdict == UNLABELLED, s
    r = check_dataset(ds, other=str(make(tmp_path / 'b', d)), quick=True)
    assert (
        r.verdict == 'fit for training' and len(r.of('warning', 'missing-annotations')) == 1
    )  # what the images are compared with needs no box


def test_json_and_text(tmp_path):
    r = check_dataset(str(make(tmp_path)))
    j = json.loads(r.to_json())
    assert (
        r.errors == []
        and j['exit_code'] == 0
        and j['kinds']['warning']['zero-area'] == 1
        and j['faults'][0].keys() == {'level', 'kind', 'where', 'item', 'cure'}
    )
    r.faults += [Fault('error', 'made-up', 'f', f'i{n}', 'c') for n in range(10)]
    text = r.to_text(most=2)
    assert 'made-up (10)' in text and 'f: i1; c' in text and 'f: i2; c' not in text and 'and 8 more' in text
    assert text.index('made-up') < text.index('zero-area')  # worst first


def test_quick_reads_headers_only(tmp_path):
    path = make(tmp_path)
    f = tmp_path / 'images/a.jpg'
    f.write_bytes(f.read_bytes()[:900])
    picture(tmp_path / 'images/b.jpg', 61, 40)
    (tmp_path / 'images/c.jpg').unlink()
    assert kinds(check_dataset(str(path), quick=True), 'error') == ['missing-image', 'size-mismatch']
    assert kinds(check_dataset(str(path)), 'error') == ['missing-image', 'size-mismatch', 'unreadable-image']


def test_exif_is_a_note_and_no_mismatch(tmp_path):
    e = Image.Exif()
    e[0x0112] = 6
    d = base()
    for im in d['images'][:2]:
        im.update(width=40, height=60)
    for a in d['annotations']:
        a['bbox'] = [1, 1, 9, 9]
    path = make(tmp_path, d, files='c')
    picture(tmp_path / 'images/a.jpg', 60, 40, exif=e)
    picture(tmp_path / 'images/b.jpg', 40, 60, exif=e)  # boxes on the upright, boxes on the raw image
    for quick in (False, True):
        r = check_dataset(str(path), quick=quick)
        assert r.exit_code == 0 and len(r.of(kind='exif-rotated')) == 2


# --- more than one set -----------------------------------------------------------------
def second(root, edit=lambda d: None):
    d = base()
    for im in d['images']:
        im.update(id=im['id'] + 100, file_name=im['file_name'].replace('.', '2.'))
    for a in d['annotations']:
        a['image_id'] += 100
    edit(d)
    return make(root, d, 'instances_val.json', files=['a2', 'b2', 'c2'])


def test_val_beside_train_is_checked_too(tmp_path):
    make(tmp_path)
    second(tmp_path)
    assert check_dataset(str(tmp_path)).exit_code == 0
    (tmp_path / 'images/b2.jpg').unlink()
    Image.open(tmp_path / 'images/a.jpg').save(tmp_path / 'images/a.png')
    os.replace(tmp_path / 'images/a.png', tmp_path / 'images/c2.jpg')  # same pixels, other bytes
    r = check_dataset(str(tmp_path))
    assert (
        kinds(r, 'error') == ['missing-image', 'shared-image']
        and '111' in r.of(kind='shared-image')[0].item
        and 'image 7 ' in r.of(kind='shared-image')[0].item
    )


def test_classes_must_agree(tmp_path):
    make(tmp_path)
    second(tmp_path, lambda d: d['categories'][0].update(name='okapi'))
    f = check_dataset(str(tmp_path)).of(kind='class-mismatch')[0]
    assert f.level == 'error' and 'okapi' in f.item and 'zebra' in f.item
    second(
        tmp_path,
        lambda d: (
            [d['categories'][0].update(id=0)]
            and [a.update(category_id=0) for a in d['annotations'] if a['category_id'] == 90]
        ),
    )
    assert 'another order' in check_dataset(str(tmp_path)).of(kind='class-mismatch')[0].item


def test_ids_that_start_again_are_a_note(tmp_path):
    make(tmp_path)
    second(
        tmp_path,
        lambda d: (
            [im.update(id=im['id'] - 100) for im in d['images']]
            and [a.update(image_id=a['image_id'] - 100) for a in d['annotations']]
        ),
    )
    assert [f.level for f in check_dataset(str(tmp_path)).of(kind='shared-ids')] == ['info']
    make(tmp_path, name='instances_test.json')
    r = check_dataset(str(tmp_path))
    assert len(r.of('warning', 'shared-file-name')) == 1 and len(r.of('error', 'shared-image')) == 3


def test_unlabelled_folder_that_holds_labelled_images(tmp_path):
    path = make(tmp_path / 'set')
    picture(tmp_path / 'more/x.jpg')
    (tmp_path / 'more/y.jpg').write_bytes((tmp_path / 'set/images/b.jpg').read_bytes())
    r = check_dataset(str(path), other=str(tmp_path / 'more'))
    assert [f.item for f in r.of('warning', 'shared-image')] == [
        f'image y.jpg is pixel for pixel image 3 of {path}'
    ] and r.exit_code == 0


def test_copies_within_one_set(tmp_path):
    path = make(tmp_path)
    (tmp_path / 'images/c.jpg').write_bytes((tmp_path / 'images/a.jpg').read_bytes())
    assert (
        'image 11 is pixel for pixel image 7'
        in check_dataset(str(path)).of('warning', 'duplicate-image')[0].item
    )


def test_split_files(tmp_path):
    path = make(tmp_path / 's')
    ds = CocoDataset(path)
    save_split(make_split(ds, count=1, dev=1), tmp_path / 'good.json')
    assert check_dataset(str(path), split_files=tmp_path / 'good.json').exit_code == 0
    good = json.loads((tmp_path / 'good.json').read_text())

    def report(**k):
        (tmp_path / 'bad.json').write_text(json.dumps(good | k))
        return [
            (f.kind, f.item)
            for f in check_dataset(str(path), split_files=[tmp_path / 'bad.json']).of('error')
        ]

    assert report(labelled=[7], unlabelled=[7, 3], dev=[11]) == [
        ('split-overlap', 'image 7 of unlabelled is also 7 of labelled')
    ]
    assert report(labelled=[7, 5] + good['labelled'])[0] == (
        'unknown-split-id',
        'labelled: no image with id 5',
    )
    assert report(fingerprint='0' * 16)[0][0] == 'stale-split'
    (tmp_path / 's/images/c.jpg').write_bytes(
        (tmp_path / 's/images/a.jpg').read_bytes()
    )  # the same picture under two ids
    assert report(labelled=[7], unlabelled=[3], dev=[11]) == [
        ('split-overlap', 'image 11 of dev is also 7 of labelled')
    ]
    (tmp_path / 'bad.json').write_text('{')
    assert kinds(check_dataset(str(path), split_files=[str(tmp_path / 'bad.json')]), 'error') == ['bad-split']


# --- other formats ---------------------------------------------------------------------
def test_voc_and_folder_and_digits(tmp_path):
    root = voc(tmp_path / 'voc', [('dog', (1, 1, 60, 40), 0), ('cat', (9, 9, 5, 5), 0)], ids=('1', '2', '3'))
    (root / 'Annotations/2.xml').write_text('<annotation>')
    (root / 'JPEGImages/3.jpg').unlink()
    assert kinds(check_dataset(str(root)), 'error') == ['bad-xml', 'missing-image', 'negative-box']
    picture(tmp_path / 'f/a.jpg')
    (tmp_path / 'f/b.jpg').write_bytes(b'')
    r = check_dataset(str(tmp_path / 'f'))
    assert kinds(r) == ['unreadable-image'] and r.counts['images'] == 2
    assert check_dataset('digits:n=20,size=64').faults == []


def test_data_set_objects(tmp_path):
    ds = CocoDataset(make(tmp_path))
    (tmp_path / 'images/a.jpg').unlink()
    for d in (ds, Subset(ds, [0, 1]), Unlabelled(ds)):
        assert len(check_dataset(d).of('error')) == 1, d
    assert check_dataset(DigitsScenes(n=5), other=DigitsScenes('val', n=5)).exit_code == 0
    assert kinds(check_dataset(DigitsScenes(n=5), other=[DigitsScenes(n=3)]), 'error') == ['shared-image']


def test_contact_sheet(tmp_path):
    ds = CocoDataset(make(tmp_path))
    sheet = contact_sheet(ds, n=12, ncols=2, cell=100)
    assert sheet.size == (200, 200) and sheet.mode == 'RGB' and contact_sheet(ds, n=1).size == (220, 220)
    plain = np.asarray(contact_sheet(Unlabelled(ds), n=12, ncols=2, cell=100), int)
    assert (np.abs(np.asarray(sheet, int) - plain) > 30).any()  # boxes are drawn
    assert contact_sheet(ds, seed=0).tobytes() == contact_sheet(ds, seed=0).tobytes()
    assert contact_sheet(str(tmp_path)).tobytes() == contact_sheet(ds).tobytes()
    (tmp_path / 'images/a.jpg').unlink()
    contact_sheet(ds)  # says so on the tile


@pytest.mark.skipif(REAL is None, reason='SEMIDETR_DATA is not set')
@pytest.mark.parametrize(
    'name,expected',
    [
        ('coco_mini', ['class-never-seen', 'gaps-in-class-ids', 'images-without-boxes', 'tiny-box']),
        ('fod12', []),
        ('txl_pbc', ['shared-ids']),
        ('voc07_mini', []),
    ],
)
def test_real(name, expected):
    if not (Path(REAL) / name).is_dir():
        pytest.skip(f'no {name} in {REAL}')
    r = check_dataset(name, data_root=REAL, quick=True)
    assert kinds(r) == expected and r.exit_code == 0
    assert contact_sheet(open_dataset(name, 'val', REAL), n=2).size == (440, 220)


@pytest.mark.skipif(REAL is None, reason='SEMIDETR_DATA is not set')
@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize('name', ['coco_mini', 'fod12', 'txl_pbc', 'voc07_mini'])
def test_real_pixels(name, split):
    "Every pixel of twelve images: nothing but what a small sample of the classes and tiny boxes give"
    if not (Path(REAL) / name).is_dir():
        pytest.skip(f'no {name} in {REAL}')
    ds = open_dataset(name, split, REAL)
    part = Subset(ds, range(0, len(ds), len(ds) // 12)[:12])
    boxes = sum(len(part.annotation(i)['boxes']) for i in range(12))
    r = check_dataset(part, progress=False)
    assert set(kinds(r)) <= {'class-never-seen', 'tiny-box'} and r.exit_code == 0
    assert (r.counts['images'], r.counts['boxes']) == (12, boxes)


# --- many boxes -----------------------------------------------------------------------------------
ODD = dict(  # values of a field that are looked at one by one, or are no reason to
    image_id=[1, 2, 9, '1', True, None, 1.0],
    category_id=[1, 3, '1', None],
    bbox=[
        *([1, 2, 10, 20], [1.0, 2, 10, 20], [-4, 0, 20, 20], [700, 9, 5, 5], [5, 5, 0, 8], [9, 9, -3, 4]),
        *([1, 2, 1, 4], [1, 2, math.nan, 4], [1, 2, 1e10, 4], [True, 2, 3, 4], [1, 2, 3], '1 2 3 4', None),
    ],
    area=[0, 200, 1e9, 0.5, '200 px', 'x', True, math.nan, None, 10**400],
    iscrowd=[0, 1, 'yes', 'perhaps', True],
    id=[1, 2, '1', None, 10**30],
)


def test_what_is_looked_at_one_by_one_is_all_that_can_be_wrong(monkeypatch):
    "Faults and numbers of random files are those of a look at every annotation"
    rng, found, looked = random.Random(0), [], 0
    for _ in range(300):
        anns = []
        for n in range(12):
            a = dict(id=n, image_id=rng.choice((1, 2)), category_id=1, bbox=[rng.randint(1, 9), 2, 10, 20])
            anns.append(a)
        for k in rng.sample(sorted(ODD), rng.randint(0, 2)):
            rng.choice(anns)[k] = rng.choice(ODD[k])
        images = [dict(id=1, file_name='a', width=60, height=40), dict(id=2, file_name='b')]
        found.append(dict(images=images, annotations=anns, categories=[dict(id=1, name='x')]))
        looked += len(E.doubtful(anns, {1: (40, 60), 2: None}, {1}))

    def all_of(data):
        numbers = checks.statistics(data)
        source = SimpleNamespace(data=data, where='x')
        return [
            str(f) for f in [*coco_faults(data, 'x'), *checks.content_faults(source, *numbers[:2])]
        ], numbers

    quick = [all_of(data) for data in found]
    monkeypatch.setattr(E, 'plain_annotations', lambda anns: None)
    monkeypatch.setattr(E, '_of_one_type', lambda values: False)
    assert quick == [all_of(data) for data in found] and looked < 300 * 12 / 2, looked


def test_a_file_is_read_once(tmp_path, monkeypatch):
    "It has no other splits"
    path = tmp_path / 'instances_train.json'
    path.write_text(json.dumps(dict(images=[dict(id=1, file_name='a.jpg')], categories=[], annotations=[])))
    real, calls = formats.read_json, []
    monkeypatch.setattr(formats, 'read_json', lambda *args: calls.append(args) or real(*args))
    check_dataset(path, progress=False)
    assert len(calls) == 1


def test_further_sets_are_named_and_a_damaged_split_is_an_error(tmp_path):
    "A validation file that is cut off is an error; one that is not there is none"
    for name in ('instances_train', 'instances_val'):
        data = dict(images=[], annotations=[], categories=[dict(id=1, name='dog')])
        (tmp_path / f'{name}.json').write_text(json.dumps(data))
    report = check_dataset(str(tmp_path), progress=False)
    assert [n for n in report.compared.values()] == [0] and 'compared with: ' in report.to_text()
    (tmp_path / 'instances_val.json').write_text('{"images": [')
    report = check_dataset(str(tmp_path), progress=False)
    assert 'instances_val.json' in str(report.of('error', 'cannot-open')[0])
    (tmp_path / 'instances_val.json').unlink()
    assert not check_dataset(str(tmp_path), progress=False).of('error', 'cannot-open')
