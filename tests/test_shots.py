"k labelled images of each class: the rule, nesting, the command, a run"

import random
import warnings
import pytest
from semidetr.core import ConfigError, DataError
from semidetr.data.catalog import open_dataset
from semidetr.data.splits import _few_shots, load_split, make_split, save_split
from semidetr.train.api import options_to_settings
from semidetr.train.config import config_hash, override, preset
from semidetr.train.run_data import build_data
from test_cli import refused, shell  # noqa: F401 (fixtures)
from test_splits import Fake


class Scenes(Fake):
    "Images with one to three of seven classes; class 6 is rare"

    def __init__(self, n=200, seed=0):
        super().__init__(n)
        r = random.Random(seed)
        self.labels = [sorted(r.sample(range(6), r.randint(1, 3))) + [6] * (i % 40 == 3) for i in range(n)]

    def annotation(self, i):
        return dict(labels=self.labels[i], ignore=[False] * len(self.labels[i]))


def counts(ds, ids):
    shown = [c for i in ids for c in set(ds.labels[ds.index_of(i)])]
    return [shown.count(c) for c in range(7)]


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('k', [1, 2, 5])
def test_each_class_has_k_images_and_none_is_idle(seed, k):
    ds = Scenes(seed=seed)
    s = make_split(ds, shots=k, dev=0, fold=seed)
    assert min(counts(ds, s.labelled)) >= k and len(s.labelled) <= 7 * k
    assert sorted(s.labelled + s.unlabelled) == sorted(ds.ids)
    for i in s.labelled:  # no image whose classes all had enough before it
        before = counts(ds, s.labelled[: s.labelled.index(i)])
        assert any(before[c] < k for c in ds.labels[ds.index_of(i)])


def test_sets_are_nested_and_folds_differ():
    ds = Scenes()
    sets = [make_split(ds, shots=k, dev=20).labelled for k in (1, 2, 3, 5)]
    assert all(b[: len(a)] == a for a, b in zip(sets, sets[1:]))
    assert make_split(ds, shots=3, dev=20, fold=1).labelled != sets[2]
    assert not set(sets[3]) & set(make_split(ds, shots=3, dev=20).dev)


def test_a_class_with_fewer_images_is_said():
    ds = Scenes()
    with pytest.warns(Warning, match='fewer than 9 images .* show g'):
        s = make_split(ds, shots=9, dev=0)
    assert counts(ds, s.labelled)[6] == 5 and min(counts(ds, s.labelled)[:6]) >= 9
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        make_split(ds, shots=5, dev=0)


def test_boxes_to_be_ignored_do_not_count():
    ds = Fake(100)
    _, n, short = _few_shots(ds, [ds.ids[9], ds.ids[19]], 1)  # without a box; only a crowd
    assert n == 0 and len(short) == 7
    empty = Fake(ids=range(3))
    empty.annotation = lambda i: dict(labels=[], ignore=[])
    with pytest.raises(DataError, match='no image has a box'), pytest.warns(Warning):
        make_split(empty, shots=1, dev=0)


def test_file_text_and_refusals(tmp_path):
    ds = Scenes()
    s = make_split(ds, shots=2, dev=10)
    save_split(s, tmp_path / 's.json')
    assert load_split(tmp_path / 's.json', ds) == s and '2 images per class' in repr(s)
    old = make_split(ds, count=4, dev=10)
    save_split(old, tmp_path / 'old.json')
    text = (tmp_path / 'old.json').read_text()
    (tmp_path / 'old.json').write_text(text.replace(', "shots": null', ''))  # written before there were shots
    assert 'shots' in text and load_split(tmp_path / 'old.json', ds) == old
    for wrong in (dict(), dict(shots=1, count=1), dict(shots=1, percent=1)):
        with pytest.raises(ConfigError, match='one of percent, count and shots'):
            make_split(ds, **wrong)
    with pytest.raises(ConfigError, match='shots=0'):
        make_split(ds, shots=0)


def test_settings_options_and_run_data():
    assert 'data.shots=2' in options_to_settings(dict(shots=2))
    for other in (dict(count=2), dict(percent=2), dict(split_file='s.json')):
        with pytest.raises(ConfigError, match='give one of'):
            options_to_settings(dict(shots=2) | other)
    with pytest.raises(ConfigError, match='--shots 0'):
        options_to_settings(dict(shots=0))
    cfg = preset('digits')
    assert config_hash(override(cfg, ['data.shots=0'])) == config_hash(cfg)
    few = override(cfg, ['data.data=digits:n=80,size=64', 'data.dev=10', 'data.count=0', 'data.shots=2'])
    data = build_data(few.data)
    labels = [data.labelled.annotation(i)['labels'].tolist() for i in range(len(data.labelled))]
    shown = [c for of_image in labels for c in set(of_image)]
    assert all(shown.count(c) >= 2 for c in range(10))
    assert len(data.labelled) + len(data.unlabelled) == 70


def test_the_command(shell, refused, tmp_path):  # noqa: F811
    out = tmp_path / 's.json'
    code, text = shell('split', '-d', 'digits:n=80,size=64', '--shots', 2, '-o', out)[:2]
    assert code == 0 and 'labelled' in text
    ds = open_dataset('digits:n=80,size=64')
    assert load_split(out, ds).shots == 2
    refused('split', '-d', 'digits:n=80,size=64', '--shots', 2, '--count', 3, '-o', out)
