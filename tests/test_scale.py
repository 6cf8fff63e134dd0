"Large annotation files: the quick reader and its cache say what the reader of faults says, or nothing."

import copy, io, json, os, random, sys, warnings
import numpy as np
import pytest
from PIL import Image
from conftest import ROOT
from semidetr.core import DataError, Note
from semidetr.data import catalog, coco, columns
from semidetr.data.catalog import open_dataset
from semidetr.data.datasets import FileDataset, Subset, Unlabelled, fingerprint
from semidetr.data.files import Source
from semidetr.data.formats import read_coco
from semidetr.text import read_json

sys.path.insert(0, str(ROOT / 'benchmarks'))

ARRAYS = ('sizes', 'starts', 'boxes', 'labels', 'ignore', 'area')


def content(n=12, seed=0):
    "A COCO file with all that is allowed: gaps in ids, crowds, boxes that overhang or have no area"
    rng = random.Random(seed)
    images = [dict(id=3 * i + 5, file_name=f'd/{i}ä.png', width=60, height=40 + i) for i in range(n)]
    rng.shuffle(images)
    rows = []
    for k in range(4 * n):
        x, y, w, h = (
            rng.uniform(-3, 55),
            rng.uniform(0, 35),
            rng.choice([0, 7, 9.5, 20.25]),
            rng.uniform(1, 20),
        )
        row = dict(id=k, image_id=rng.choice(images)['id'], category_id=rng.choice([2, 9, 4]))
        row['bbox'] = [round(x, 2), round(y, 2), w + max(0, -x), round(h, 3)]
        row |= rng.choice([{}, dict(area=w * h), dict(area=7), dict(area=None), dict(area=0.25)])
        row |= rng.choice([{}, dict(iscrowd=0), dict(iscrowd=1), dict(ignore=True), dict(difficult=False)])
        row |= rng.choice(
            [{}, dict(segmentation=[[1, 2, 3.5]]), dict(segmentation=dict(counts='},{', size=[1, 2]))]
        )
        rows.append(row)
    categories = [dict(id=9, name='dog'), dict(id=2, name='cat'), dict(id=4, name='dog')]
    return dict(info={'year': 2026}, licenses=[], annotations=rows, images=images, categories=categories)


def slow(path):
    "What the reader of faults makes of a file: a data set, or its message"
    try:
        return FileDataset(read_coco(path, path.parent))
    except DataError as e:
        return str(e)


def quick(raw, window=2**23):
    "What the quick reader makes of bytes: columns, or None"
    try:
        return coco._parse(io.BytesIO(raw), window)[0]
    except coco._NOT_PLAIN:
        return None


def agree(found, ds):
    "The same content, bit for bit"
    assert isinstance(ds, FileDataset), ds
    assert (
        found.ids == ds.ids
        and found.files == ds.files
        and list(map(type, found.ids)) == list(map(type, ds.ids))
    )
    assert (found.classes, found.cat_ids) == (ds.classes, ds.cat_ids)
    assert (found.dropped, found.has_boxes) == (ds.dropped, ds.has_boxes)
    theirs = ds._packed | dict(sizes=ds.sizes, starts=ds._starts)
    for k in ARRAYS:
        mine = getattr(found, k)
        assert (
            mine.dtype == theirs[k].dtype
            and mine.shape == theirs[k].shape
            and mine.tobytes() == theirs[k].tobytes()
        )


@pytest.fixture
def folder(tmp_path):
    "A place where the images of `content` are"
    (tmp_path / 'd').mkdir()
    for i in range(12):
        Image.new('RGB', (60, 40 + i)).save(tmp_path / f'd/{i}ä.png')
    return tmp_path


def texts(data):
    "The same content as programs write it"
    yield json.dumps(data)
    yield json.dumps(data, ensure_ascii=False, indent=1)
    yield json.dumps(data, separators=(',', ':'))
    yield '\r\n' + json.dumps(data, indent=3).replace('\n', '\r\n') + '\n'
    yield json.dumps(dict(sorted(data.items(), reverse=True)))


def test_both_readers_agree_in_every_spelling(folder):
    "Also with windows that are smaller than an entry, and with ids that are texts"
    path = folder / 'a.json'
    for seed in range(3):
        data = content(seed=seed)
        named = copy.deepcopy(data)
        for im in named['images']:
            im['id'] = f'image {im["id"]}'
        for a in named['annotations']:
            a['image_id'] = f'image {a["image_id"]}'
        unlabelled = {k: v for k, v in data.items() if k != 'annotations'}
        for d in (data, named, unlabelled, data | dict(annotations=[])):
            for text in texts(d):
                path.write_bytes(text.encode())
                ds = slow(path)
                agree(quick(text.encode()), ds)
                for window in (64, 257, 1000, 4096):
                    if (found := quick(text.encode(), window)) is not None:
                        agree(found, ds)
        path.write_text(json.dumps(data))
        plain = json.dumps(data).replace('},{', 'x').encode()
        agree(quick(plain, 1000), slow(path))  # in several pieces


FAULTS = {
    'no list': lambda d: d.pop('images'),
    'nothing': lambda d: d['images'].clear(),
    'null': lambda d: d.update(annotations=None),
    'no categories': lambda d: d.pop('categories'),
    'categories': lambda d: d.update(categories={}),
    'category': lambda d: d['categories'].append(7),
    'category twice': lambda d: d['categories'].append(d['categories'][0]),
    'category number': lambda d: [c.update(id=float(c['id'])) for c in d['categories']],
    'class': lambda d: d['categories'][0].update(name='\x1b[31m'),
    'image': lambda d: d['images'].append(None),
    'no name': lambda d: d['images'][0].update(file_name=''),
    'image twice': lambda d: d['images'].append(d['images'][0]),
    'image kinds': lambda d: d['images'][0].update(id='x'),
    'no size': lambda d: d['images'][0].pop('width'),
    'zero size': lambda d: d['images'][0].update(width=0),
    'half size': lambda d: d['images'][0].update(width=60.5),
    'text size': lambda d: [im.update(width='60') for im in d['images']],
    'large id': lambda d: d['images'][0].update(id=2**70),
    'box id twice': lambda d: d['annotations'][1].update(id=0),
    'text box id': lambda d: d['annotations'][1].update(id='0'),
    'unknown image': lambda d: d['annotations'][1].update(image_id=4),
    'text image': lambda d: [a.update(image_id=str(a['image_id'])) for a in d['annotations']],
    'float image': lambda d: d['annotations'][1].update(image_id=5.0),
    'true image': lambda d: d['annotations'][1].update(image_id=True),
    'unknown class': lambda d: d['annotations'][1].update(category_id=3),
    'text class': lambda d: [a.update(category_id=str(a['category_id'])) for a in d['annotations']],
    'flag': lambda d: d['annotations'][1].update(iscrowd=2),
    'text flag': lambda d: d['annotations'][1].update(iscrowd='1'),
    'text area': lambda d: d['annotations'][1].update(area='7 px'),
    'area': lambda d: d['annotations'][1].update(area=float('nan')),
    'large area': lambda d: d['annotations'][1].update(area=10**400),
    'outside': lambda d: d['annotations'][1].update(bbox=[60, 0, 5, 5]),
    'left': lambda d: d['annotations'][1].update(bbox=[-5, 0, 5, 5]),
    'negative': lambda d: d['annotations'][1].update(bbox=[5, 0, -5, 5]),
    'infinite': lambda d: d['annotations'][1].update(bbox=[5, 0, float('inf'), 5]),
    'far': lambda d: d['annotations'][1].update(bbox=[1e9, 0, 1, 5]),
    'three': lambda d: d['annotations'][1].update(bbox=[1, 0, 5]),
    'texts': lambda d: d['annotations'][1].update(bbox=['1', '2', '3', '4']),
    'no box': lambda d: d['annotations'][1].pop('bbox'),
    'deep': lambda d: d['annotations'][1].update(segmentation=json.loads('[' * 80 + ']' * 80)),
    'surrogate': lambda d: d['images'][0].update(file_name='\ud800.png'),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_what_is_unusual_is_left_to_the_reader_of_faults(fault, folder):
    data = content()
    FAULTS[fault](data)
    assert quick(json.dumps(data).encode()) is None


BROKEN = {
    'empty': b'',
    'cut': lambda raw: raw[:-2],
    'mark': lambda raw: b'\xef\xbb\xbf' + raw,
    'wide': lambda raw: raw.decode().encode('utf-16'),
    'latin': lambda raw: raw.replace('ä'.encode(), b'\xe4'),
    'behind': lambda raw: raw + b' 1',
    'twice': lambda raw: raw[:-1] + b', "images": []}',
    'inside': lambda raw: raw.replace(b'"year"', b'"images"'),
    'comma': lambda raw: raw.replace(b'}]', b'},]'),
    'no comma': lambda raw: raw.replace(b'}, {', b'} {', 1),
    'space': lambda raw: raw.replace(b'}, {', b'},\x0c{', 1),
    'list': lambda raw: b'[' + raw + b']',
}


@pytest.mark.parametrize('how', BROKEN)
def test_what_is_no_plain_json_is_left_too(how):
    raw = json.dumps(content(), ensure_ascii=False).encode()
    change = BROKEN[how]
    assert quick(raw) is not None and quick(change(raw) if callable(change) else change) is None


def test_random_changes_of_the_text_never_divide_the_readers(folder):
    "What the quick reader takes, the other one takes too, with the same result"
    rng, path, taken = random.Random(5), folder / 'a.json', 0
    raw = json.dumps(content(3), ensure_ascii=False).encode()
    marks = [
        b'"',
        b',',
        b'{',
        b'}',
        b'[',
        b']',
        b'0',
        b'-',
        b'.',
        b'e5',
        b'\\',
        b'null',
        b'true',
        b'\xff',
        b' ',
        b'9',
    ]
    for _ in range(1500):
        new = bytearray(raw)
        for _ in range(rng.choice([1, 1, 2, 3])):
            at = rng.randrange(len(new))
            new[at : at + rng.choice([0, 0, 1, 1, 4])] = rng.choice(marks)
        found = quick(bytes(new), rng.choice([300, 2**23]))
        if found is None:
            continue
        taken += 1
        path.write_bytes(new)
        agree(found, FileDataset(Source('x', 'x', read_json(path), folder)))
    assert 50 < taken < 1400


# --- the cache ---------------------------------------------------------------------------------------
@pytest.fixture
def large(folder, monkeypatch):
    "An annotation file that counts as large, an empty cache, and the list of calls of the parser"
    path, calls, parse = folder / 'instances_train.json', [], coco._parse
    path.write_text(json.dumps(content()))
    monkeypatch.setattr(coco, '_LARGE', 0)
    monkeypatch.setattr(coco, '_parse', lambda file: calls.append(file.name) or parse(file))
    monkeypatch.setenv('SEMIDETR_CACHE', str(folder / 'cache'))
    monkeypatch.delenv('SEMIDETR_ANNOTATIONS')
    catalog._KEPT.clear()
    yield path, calls
    catalog._KEPT.clear()


def opened(path):
    catalog._KEPT.clear()
    return open_dataset(str(path))


def same(a, b):
    assert a.fingerprint() == b.fingerprint() == fingerprint(Subset(b, range(len(b)))) and a.ids == b.ids
    assert (a.classes, a.cat_ids, a.dropped, a.notes, a.name, a.where) == (
        b.classes,
        b.cat_ids,
        b.dropped,
        b.notes,
        b.name,
        b.where,
    )
    for i in range(len(a)):
        x, y = a.annotation(i), b.annotation(i)
        assert x['size'] == y['size'] and list(x) == list(y)
        assert all(
            (x[k] == y[k]).all() and x[k].dtype == y[k].dtype for k in ('boxes', 'labels', 'ignore', 'area')
        )


def test_a_large_file_is_parsed_once_for_all_commands(large):
    path, calls = large
    first, again = opened(path), opened(path)
    assert len(calls) == 1 and isinstance(again._packed['boxes'].base, np.memmap) is (
        again._packed['boxes'].nbytes > 4096
    )
    expected = FileDataset(read_coco(path))
    same(first, expected)
    same(again, expected)
    assert again[2].boxes.tolist() == expected[2].boxes.tolist() and again.index_of(8) == expected.index_of(8)
    assert Unlabelled(again).ids == expected.ids and not Unlabelled(again).has_boxes


def test_the_key_is_the_content(large, folder):
    "A file with another place is found, one with the same place, size and time but other content is not"
    path, calls = large
    first = opened(path)
    moved = folder / 'moved.json'
    path.rename(moved)
    assert opened(moved).fingerprint() == first.fingerprint() and len(calls) == 1
    found = moved.stat()
    moved.write_text(moved.read_text().replace('"name": "cat"', '"name": "cow"'))
    os.utime(moved, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert moved.stat().st_size == found.st_size and opened(moved).classes[0] == 'cow' and len(calls) == 2


def test_a_damaged_cache_is_parsed_again(large, folder):
    path, calls = large
    expected = opened(path).fingerprint()
    files = sorted((folder / 'cache').rglob('*.*'))
    files = [f for f in files if f.is_file()]
    assert len(files) == 10
    for n, f in enumerate(files):
        raw = bytearray(f.read_bytes())
        raw[random.Random(n).randrange(len(raw))] ^= 1 << n % 8
        f.write_bytes(raw)
        assert opened(path).fingerprint() == expected and len(calls) == n + 2
        f.write_bytes(b'')
        assert opened(path).fingerprint() == expected
        f.unlink()
        assert opened(path).fingerprint() == expected
        calls[:] = calls[: n + 2]
    assert opened(path).fingerprint() == expected and len(calls) == len(files) + 1


def test_images_are_looked_for_every_time(large, folder):
    "The cache holds what the file says; where the images are is seen anew"
    path, calls = large
    opened(path)
    (folder / 'd/0ä.png').rename(folder / 'd/0Ä.PNG')
    ds = opened(path)
    assert len(calls) == 1 and 'd/0Ä.PNG' in list(ds.files) and 'another spelling' in ds.notes[0]
    same(ds, FileDataset(read_coco(path)))
    (folder / 'd').rename(folder / 'elsewhere')
    with pytest.raises(DataError) as quick_error:
        opened(path)
    with pytest.raises(DataError) as slow_error:
        FileDataset(read_coco(path))
    assert str(quick_error.value) == str(slow_error.value) and len(calls) == 1


def test_a_fault_has_the_same_message(large):
    path, calls = large
    data = content()
    data['annotations'][3]['bbox'] = [900, 0, 5, 5]
    path.write_text(json.dumps(data))
    with pytest.raises(DataError) as quick_error:
        opened(path)
    with pytest.raises(DataError) as slow_error:
        FileDataset(read_coco(path))
    assert str(quick_error.value) == str(slow_error.value) and columns.cache_folder().exists() is False


@pytest.mark.parametrize('value', ['off', ' OFF '])
def test_no_cache_is_wanted(value, large, monkeypatch, tmp_path):
    path, calls = large
    monkeypatch.setenv('SEMIDETR_ANNOTATIONS', value)
    for _ in range(2):
        opened(path)
    assert len(calls) == 2 and columns.cache_folder() is None


def test_the_usual_place_of_the_cache(large, monkeypatch, tmp_path):
    path, calls = large
    monkeypatch.delenv('SEMIDETR_CACHE')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))
    opened(path)
    assert len(list((tmp_path / 'xdg/semidetr/annotations').iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_one_line(large, folder, monkeypatch):
    path, calls = large
    (folder / 'file').write_text('')
    monkeypatch.setenv('SEMIDETR_CACHE', str(folder / 'file'))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        ds = opened(path)
    lines = [str(w.message) for w in told if w.category is Note]
    assert len(lines) == 1 and 'SEMIDETR_CACHE' in lines[0] and len(ds) == 12


def test_few_entries_are_kept(large, folder, monkeypatch):
    path, calls = large
    monkeypatch.setattr(columns, '_KEPT', 2)
    home = columns.cache_folder()
    home.mkdir(parents=True)
    (home / '.rest').mkdir()
    os.utime(home / '.rest', (1, 1))
    for n in range(4):
        path.write_text(json.dumps(content(seed=n)))
        opened(path)
        for k, entry in enumerate(sorted(home.iterdir(), key=lambda d: d.stat().st_mtime_ns)):
            os.utime(entry, (k + 1, k + 1))
    assert len(list(home.iterdir())) == 2 and opened(path) and len(calls) == 4


def test_columns_behave_like_lists():
    texts_, numbers = columns.Texts.of(['a', '', '\ud800b']), columns.Numbers(np.arange(200_000))
    assert (
        texts_ == ['a', '', '\ud800b']
        and ['a', '', 'c'] != texts_
        and texts_[-1] == '\ud800b'
        and texts_ != 'abc'
    )
    assert numbers == range(200_000) and numbers[70_000:70_003] == [70_000, 70_001, 70_002] and 7 in numbers
    assert (
        json.dumps(numbers[5]) == '5'
        and list(columns.Texts.of([])) == []
        and repr(numbers).endswith('Ellipsis]')
    )
    with pytest.raises(IndexError):
        texts_[3]


# --- the benchmark -----------------------------------------------------------------------------------
def test_the_benchmark_measures_openings(tmp_path):
    import scale

    parsed, cached = scale.measure_open(2000, rounds=1)  # just large enough to be kept
    assert parsed['images'] == cached['images'] == 2000 and parsed['boxes'] == cached['boxes'] == 20_000
    assert (
        parsed['cache_mb'] > 0
        and 0 < cached['cpu_seconds'] < 60
        and cached['peak_mb'] > cached['above_mb'] >= 0
    )
    files = [scale.write_set(tmp_path / name, 5) for name in 'ab']
    assert files[0].read_bytes() == files[1].read_bytes()
    assert len(json.loads(files[0].read_text())['annotations']) == 50
    [row] = scale.measure_predict(30, rounds=1)
    assert row['files'] == 30 and row['case'] == 'predict'


def test_the_record_is_the_median_of_equal_turns():
    import scale

    turns = [dict(images=2, cpu_seconds=s, seconds=s, peak_mb=100 + s, above_mb=s) for s in (9.0, 1.0, 2.0)]
    record = scale.summary(turns)
    assert (record['cpu_seconds'], record['peak_mb'], record['above_mb']) == (2.0, 102, 2) and record[
        'turns'
    ] == 3
    turns[1]['images'] = 3
    with pytest.raises(SystemExit, match='turns differ'):
        scale.summary(turns)
