"Splits: sizes, nesting, stability over machines, files, lists of other projects."

import json, subprocess, sys
from collections import Counter
import numpy as np
import pytest
from semidetr.core import ConfigError, DataError
from semidetr.data.splits import load_split, make_split, rank_ids, read_index_list, save_split, split_from_ids


class Fake:
    "The protocol that splits need; every 10th image has no box, class of image i is i % 7"

    def __init__(self, n=1000, ids=None, name='fake', print_='abcd'):
        self.ids = list(ids) if ids is not None else [3 * i + 5 for i in range(n)]
        self.name, self.classes, self._print = name, list('abcdefg'), print_
        self._at = {v: k for k, v in enumerate(self.ids)}

    def __len__(self):
        return len(self.ids)

    def index_of(self, image_id):
        return self._at[image_id]

    def fingerprint(self):
        return self._print

    def annotation(self, i):
        if i % 10 == 9:
            return dict(
                labels=[i % 7] * (i % 20 == 19), ignore=[True] * (i % 20 == 19)
            )  # empty, or only a crowd
        return dict(labels=[i % 7], ignore=[False])


def test_coco_sizes_folds_and_complement():
    ds = Fake(118_287)
    splits = {p: make_split(ds, percent=p, dev=0) for p in (1, 5, 10)}
    assert [len(splits[p].labelled) for p in (1, 5, 10)] == [1182, 5914, 11828]
    for s in splits.values():
        assert set(s.labelled).isdisjoint(s.unlabelled) and set(s.labelled) | set(s.unlabelled) == set(ds.ids)
        assert len(s.labelled) + len(s.unlabelled) == len(ds)


def test_folds_differ_like_independent_draws():
    ds = Fake(1000)
    folds = [set(make_split(ds, percent=10, fold=f, dev=0).labelled) for f in range(5)]
    for i in range(5):
        for j in range(i):
            assert 0 <= len(folds[i] & folds[j]) < 30  # 10 expected of 100


@pytest.mark.parametrize('fold', [0, 3])
def test_nested_within_a_fold_and_dev_is_fixed(fold):
    ds, last = Fake(1000), []
    for p in (0.1, 1, 2.5, 5, 10, 50, 99, 100):
        s = make_split(ds, percent=p, fold=fold, dev=100)
        assert s.labelled[: len(last)] == last and len(s.labelled) >= len(last)
        assert s.dev == make_split(ds, count=7, fold=0, dev=100).dev
        assert Counter(s.labelled + s.unlabelled + s.dev) == Counter(ds.ids)
        last = s.labelled
    assert len(last) == 900 and make_split(ds, percent=100, fold=fold).unlabelled == []


def test_dev_grows_by_adding():
    ds = Fake(500)
    small, large = make_split(ds, percent=10, dev=20).dev, make_split(ds, percent=10, dev=100).dev
    assert large[:20] == small


def test_no_reading_order_no_library_type():
    ds, back = Fake(300), Fake(ids=reversed(Fake(300).ids))
    numpy_ids = Fake(ids=np.array(ds.ids))
    a = make_split(ds, percent=10, dev=30)
    for other in (back, numpy_ids):
        b = make_split(other, percent=10, dev=30)
        assert (a.labelled, a.unlabelled, a.dev) == (b.labelled, b.unlabelled, b.dev)
        assert all(type(i) is int for i in b.labelled)


def test_stable_over_processes_and_time():
    "The list itself is frozen here: a change of the hash would change every published number"
    code = "from semidetr.data.splits import rank_ids\n"
    code += "print(rank_ids(range(8), 0, 0), rank_ids(['b', 'a', 'c'], 0, 'dev'))"
    out = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        check=True,
        env={'PYTHONHASHSEED': '77', 'OMP_NUM_THREADS': '1', 'PATH': ''},
    ).stdout
    assert out.strip() == f"{rank_ids(range(8), 0, 0)} {rank_ids(['c', 'b', 'a'], 0, 'dev')}"
    assert rank_ids(range(8), 0, 0) == [3, 7, 1, 4, 5, 6, 2, 0]


def test_percent_is_exact_decimal():
    assert len(make_split(Fake(1000), percent=0.7, dev=0).labelled) == 7
    assert len(make_split(Fake(1000), percent=2.9, dev=0).labelled) == 29  # .029*1000 is 28.999... in floats
    assert len(make_split(Fake(50), percent=1, dev=0).labelled) == 1  # at least one


def test_cover_classes():
    ds = Fake(1000)
    s = make_split(ds, count=7, dev=100, cover_classes=True)
    assert {ds.index_of(i) % 7 for i in s.labelled} == set(range(7))
    assert all(ds.index_of(i) % 10 != 9 for i in s.labelled)  # crowds and empty images cover nothing
    more = make_split(ds, percent=5, dev=100, cover_classes=True)
    assert more.labelled[:7] == s.labelled and not set(more.labelled) & set(more.dev)
    with pytest.raises(DataError, match='at least 7'):
        make_split(ds, count=3, cover_classes=True)


@pytest.mark.parametrize(
    'kw, error, words',
    [
        (dict(), ConfigError, 'one of percent, count and shots'),
        (dict(percent=1, count=1), ConfigError, 'one of percent, count and shots'),
        (dict(percent=0), ConfigError, r'\(0, 100\]'),
        (dict(percent=101), ConfigError, 'ten percent'),
        (dict(count=0), ConfigError, 'at least one'),
        (dict(percent=10, dev=50), DataError, 'lower dev'),
        (dict(percent=10, dev=-1), DataError, 'dev'),
        (dict(count=45, dev=10), DataError, '40 images are left'),
    ],
)
def test_bad_requests(kw, error, words):
    with pytest.raises(error, match=words) as e:
        make_split(Fake(50), **kw)
    assert '\n' not in str(e.value)


def test_double_id():
    with pytest.raises(DataError, match="7 occurs more than once"):
        make_split(Fake(ids=[1, 7, 2, 7]), count=1, dev=0)


def test_files(tmp_path):
    ds, path = Fake(200), tmp_path / 'a' / 's.json'
    s = make_split(ds, percent=10, fold=2, dev=20, seed=5)
    save_split(s, path)
    assert load_split(path) == s and load_split(path, ds) == s
    assert str(tmp_path) not in path.read_text()
    with pytest.raises(DataError, match='fingerprint abcd.*make the split again'):
        load_split(path, Fake(200, print_='ffff'))
    with pytest.raises(DataError, match='no such file'):
        load_split(tmp_path / 'none.json')
    for text, words in (
        ('{', 'cannot be read'),
        ('[1]', 'read_index_list'),
        ('{"semidetr_split": 1, "labeled": []}', 'damaged'),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=words):
            load_split(path)


def test_indices():
    ds = Fake(100)
    s = make_split(ds, percent=10, dev=10)
    assert [ds.ids[i] for i in s.indices(ds)] == s.labelled and [
        ds.ids[i] for i in s.indices(ds, 'dev')
    ] == s.dev


def test_plain_lists(tmp_path):
    ds, path = Fake(100), tmp_path / 'l.json'  # ids 5, 8, ..., 302

    def read(values, **kw):
        path.write_text(json.dumps(values))
        s, how = read_index_list(path, ds, **kw)
        assert Counter(s.labelled + s.unlabelled + s.dev) == Counter(ds.ids)
        return s.labelled, how

    assert read([302, 5]) == ([302, 5], 'image ids')
    assert read([0, 99]) == ([5, 302], 'positions in the data set')
    with pytest.raises(DataError, match='both ids and positions'):
        read([5, 8])
    assert read([5, 8], convention='ids')[0] == [5, 8] and read([5, 8], convention='positions')[0] == [20, 29]
    with pytest.raises(DataError, match='1000 is not an image'):
        read([5, 1000])
    with pytest.raises(ConfigError, match='convention'):
        read([5], convention='index')
    for bad in ([], 3, 'x'):
        with pytest.raises(DataError):
            read(bad)
    names = Fake(ids=['a', 'b', 'c'])
    path.write_text('["c", "a"]')
    assert read_index_list(path, names)[0].labelled == ['c', 'a']
    same = Fake(ids=range(10))  # ids are positions: no ambiguity
    path.write_text('[3, 4]')
    assert read_index_list(path, same)[0].labelled == [3, 4]


def test_unbiased_teacher_lists(tmp_path):
    ds, path = (
        Fake(ids=[3 * i + 5 for i in range(1000)][::-1]),
        tmp_path / 'l.txt',
    )  # file order is not id order
    boxed = sorted(i for i in ds.ids if ds.index_of(i) % 10 != 9)
    assert len(boxed) == 900
    table = {
        '1.0': {'1': list(range(891, 900)), '2': list(range(9))},
        '2.0': {'1': list(range(980, 1000))},
        '5.0': {'1': [1, 2, 3]},
    }
    path.write_text(json.dumps(table))
    s, how = read_index_list(path, ds, percent=1, fold=1, dev=100)
    assert (s.percent, s.fold, len(s.dev), len(s.unlabelled)) == (1, 1, 100, 891)
    assert s.labelled == boxed[891:] and 'with boxes' in how
    s, how = read_index_list(path, ds, percent=2, fold=1)
    assert s.labelled == sorted(ds.ids)[980:] and 'all images' in how
    for kw, words in (
        (dict(percent=5, fold=1), 'fit neither'),
        (dict(percent=7, fold=1), 'percent=7'),
        (dict(percent=1, fold=9), 'fold=9'),
        (dict(), 'percent=None'),
    ):
        with pytest.raises(DataError, match=words):
            read_index_list(path, ds, **kw)


def test_split_from_ids():
    ds = Fake(100)
    s = split_from_ids(ds, [302, 5], percent=2, fold=1, dev=10)
    assert (
        s.labelled == [302, 5]
        and Counter(s.labelled + s.unlabelled + s.dev) == Counter(ds.ids)
        and len(s.dev) == 10
    )
    for bad, words in (([], 'no labelled'), ([5, 5], 'twice'), ([4], 'not an image')):
        with pytest.raises(DataError, match=words):
            split_from_ids(ds, bad)
