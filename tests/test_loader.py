"Loader: batches as a function of (seed, step), ratios, resume, workers, hidden labels, errors, shutdown."

import itertools, json, os, pickle, subprocess, sys, time
from collections import Counter
import numpy as np
import pytest
import torch
from PIL import Image
from semidetr.data import loader as L
from semidetr.data.augment import labelled_view, scaled_views, strong_view, weak_view
from semidetr.boxes import denormalize_boxes
from semidetr.core import ConfigError, DataError, SemiDETRError, stable_hash
from semidetr.data.datasets import CocoDataset, DetectionDataset, ImageFolder, Sample, Subset, Unlabelled
from semidetr.data.loader import EvalLoader, SemiLoader, collate, draw_index, labelled_counts, plan_draws

VIEW = scaled_views(48, smallest=0.75, steps=3)


class Fake(DetectionDataset):
    "Images of several sizes with truth; image 3 has none, image 5 only a crowd; image ids are 100+i"

    name, classes, has_boxes = 'fake', ['a', 'b'], True

    def __init__(self, n=12, bad=None, slow=0.0):
        self.n, self.bad, self.slow, self.ids = n, bad, slow, [100 + i for i in range(n)]

    def __len__(self):
        return self.n

    def annotation(self, i):
        k = 0 if i % 12 == 3 else 1 + i % 2
        return dict(
            boxes=torch.tensor([[4.0, 6, 30, 36]]).repeat(k, 1),
            labels=torch.arange(k),
            ignore=torch.full((k,), i % 12 == 5),
            size=(40 + i, 60),
        )

    def __getitem__(self, i):
        if i == self.bad:
            raise DataError(f'{self.name}/{i}.jpg: image {100 + i} cannot be read; delete it')
        if self.bad == 'crash':
            os._exit(9)
        if self.bad == 'bug':
            raise KeyError('a bug, not bad data')
        time.sleep(self.slow)
        a = self.annotation(i)
        pixels = np.random.RandomState(i).randint(0, 255, (*a['size'], 3), dtype=np.uint8)
        return Sample(Image.fromarray(pixels), 100 + i, a['boxes'], a['labels'], a['ignore'])


def make(**kw):
    kw = dict(n_labelled=2, n_unlabelled=3, view=VIEW, seed=1, num_workers=0) | kw
    return SemiLoader(kw.pop('labelled', Fake()), kw.pop('unlabelled', Fake(20)), **kw)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b and type(a) is type(b)


def take(loader, n):
    return list(itertools.islice(loader, n))


def ids(part):
    return [t['image_id'] for t in part['targets']]


# --- draws -----------------------------------------------------------------------------


def test_each_epoch_is_a_permutation():
    for n in (1, 2, 7):
        assert all(
            sorted(draw_index(3, 'p', n, e * n + k) for k in range(n)) == list(range(n)) for e in range(4)
        )
    epochs = [[draw_index(3, 'p', 50, e * 50 + k) for k in range(50)] for e in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    for seed, pool in ((4, 'p'), (3, 'q')):
        assert epochs[0] != [draw_index(seed, pool, 50, k) for k in range(50)]
    frozen = [draw_index(0, 'labelled', 6, k) for k in range(6)]
    assert frozen == [2, 4, 0, 3, 5, 1]  # runs must stay repeatable


def test_binomial_counts():
    c = np.concatenate([labelled_counts(0, b, 5, 0.2).ravel() for b in range(200)])
    assert c.min() == 1 and c.max() == 4
    assert (
        abs(c.mean() - (1 + 0.8**5 - 0.2**5)) < 4 * 0.65 / np.sqrt(len(c))
        and round(1 + 0.8**5 - 0.2**5, 3) == 1.327
    )
    want = np.array(
        [0.8**5 + 5 * 0.2 * 0.8**4, 10 * 0.2**2 * 0.8**3, 10 * 0.2**3 * 0.8**2, 5 * 0.2**4 * 0.8 + 0.2**5]
    )
    assert np.abs(np.bincount(c, minlength=5)[1:] / len(c) - want).max() < 0.005


@pytest.mark.parametrize('ratio', ['fixed', 'binomial'])
@pytest.mark.parametrize('world', [1, 2])
def test_draws_tile_the_pools(ratio, world):
    "Over steps and ranks the draw numbers are 0, 1, 2, ... without gap or repetition, across blocks too"
    first, second = [], []
    for t in range(2500 if world == 1 else 1500):
        for r in range(world):
            a, b = plan_draws(t, 1, 4, ratio, 7, r, world)
            assert (
                len(a) + len(b) == 5 and len(a) >= 1 and len(b) >= 1 and (ratio == 'binomial' or len(a) == 1)
            )
            first += a
            second += b
    assert first == list(range(len(first))) and second == list(range(len(second)))


def test_binomial_far_step_is_quick_and_consistent():
    start = time.time()
    a, b = plan_draws(120_000, 1, 4, 'binomial', 0)
    assert (
        time.time() - start < 2 and a.start + b.start == 120_000 * 5 and abs(a.start / 120_000 - 1.327) < 0.01
    )


def test_no_unlabelled_means_no_chance():
    assert plan_draws(3, 4, 0, 'binomial') == (range(12, 16), range(0))


# --- collate ---------------------------------------------------------------------------


def test_collate_against_views():
    views = [labelled_view(Fake()[i], VIEW, i) for i in (0, 2, 9)]
    for m in (1, 32):
        part = collate(views, multiple=m)
        b, _, h, w = part['images'].shape
        assert (
            h % m == w % m == 0
            and h >= max(v.size[0] for v in views) > h - m
            and part['mask'].shape == (b, h, w)
        )
        for v, x, mask, t in zip(views, part['images'], part['mask'], part['targets']):
            assert torch.equal(x[:, : v.size[0], : v.size[1]], v.image)
            assert not mask[: v.size[0], : v.size[1]].any()
            assert (x[:, mask] == 0).all() and mask.sum() == h * w - v.size[0] * v.size[1]
            assert torch.allclose(denormalize_boxes(t['boxes'], t['size']), v.boxes, atol=1e-3)
            assert torch.equal(t['labels'], v.labels) and torch.equal(t['matrix'], v.matrix)
            assert all(t[k] == getattr(v, k) for k in ('orig_size', 'size', 'image_id'))
    with pytest.raises(DataError):
        collate([])


# --- batches ---------------------------------------------------------------------------


def test_batch_is_what_the_views_say():
    "8-bit images, normalised after stacking, give the same batch as collating float views"
    loader = make()
    batch = next(loader)
    first, second = loader.draws(0)
    want = collate([labelled_view(Fake()[i], VIEW, stable_hash(1, 'labelled', k)) for k, i in first])
    assert same(batch['labelled'], want)
    for kind, view in (('weak', weak_view), ('strong', strong_view)):
        want = collate([view(Fake(20)[i], VIEW, stable_hash(1, kind, k)) for k, i in second], truth=False)
        assert same(batch[kind], want)
    assert ids(batch['weak']) == ids(batch['strong']) and list(batch) == ['labelled', 'weak', 'strong']
    assert batch['labelled']['images'].dtype == torch.float32 and batch['labelled']['images'].is_contiguous()


def test_pad_multiple():
    from dataclasses import replace

    batch = next(make(view=replace(VIEW, pad_multiple=32)))
    assert all(s % 32 == 0 for p in batch.values() for s in p['images'].shape[-2:])


@pytest.mark.parametrize('ratio', ['fixed', 'binomial'])
def test_resume_equals_going_on(ratio):
    whole = take(make(ratio=ratio), 10)
    loader = make(ratio=ratio)
    take(loader, 5)
    state = json.loads(json.dumps(loader.state_dict()))
    assert state == {'step': 5}
    again = make(ratio=ratio)
    again.load_state_dict(state)
    assert same(take(again, 5), whole[5:]) and again.state_dict() == {'step': 10}
    assert same(take(make(ratio=ratio, start=8), 2), whole[8:])
    assert same(make(ratio=ratio).batch(7), whole[7])  # any batch can be made again
    assert not same(whole[0], make(ratio=ratio, seed=2).batch(0))
    loader.load_state_dict({'step': 1})  # backwards, in the same loader
    assert same(next(loader), whole[1])


def test_workers_change_nothing_and_are_reused():
    whole = take(make(), 10)
    with make(num_workers=2) as loader:
        assert same(take(loader, 4), whole[:4])
        pids = [w.pid for w in loader._loader._iterator._workers]
        assert same(take(iter(loader), 2), whole[4:6])  # a new `for` goes on, with prefetched batches
        loader.load_state_dict({'step': 2})
        assert same(take(loader, 3), whole[2:5])
        assert [w.pid for w in loader._loader._iterator._workers] == pids  # same processes after the jump
        workers = loader._loader._iterator._workers
        del loader
    deadline = time.time() + 5
    while any(w.is_alive() for w in workers) and time.time() < deadline:
        time.sleep(0.05)
    assert not any(w.is_alive() for w in workers)


def test_close_and_go_on():
    whole = take(make(), 4)
    loader = make(num_workers=1)
    a = take(loader, 2)
    loader.close()
    assert same(a + take(loader, 2), whole)
    loader.close()
    loader.close()


def test_no_global_generator_is_touched():
    import random

    state = torch.get_rng_state(), random.getstate(), np.random.get_state()
    for w in (0, 1):
        with make(num_workers=w) as loader:
            take(loader, 2)
    assert (
        torch.equal(torch.get_rng_state(), state[0])
        and random.getstate() == state[1]
        and (np.random.get_state()[1] == state[2][1]).all()
    )


@pytest.mark.parametrize('ratio', ['fixed', 'binomial'])
def test_two_ranks_are_disjoint(ratio):
    n = Fake(600)
    loaders = [make(labelled=n, unlabelled=n, ratio=ratio, rank=r, world=2) for r in range(2)]
    for pool in (0, 1):
        drawn = [[i for t in range(50) for _, i in l.draws(t)[pool]] for l in loaders]
        assert set(drawn[0]).isdisjoint(drawn[1])
        assert len(set(drawn[0])) == len(drawn[0])  # no image twice within an epoch of the pool
    a, b = (l.batch(0) for l in loaders)
    assert set(ids(a['labelled'])).isdisjoint(ids(b['labelled']))


def test_pool_smaller_than_the_batch():
    one = Subset(Fake(), [0])
    batch = make(labelled=one, n_labelled=4).batch(0)
    assert ids(batch['labelled']) == [100] * 4
    targets = make(labelled=one, n_labelled=8).batch(0)['labelled']['targets']
    assert len({tuple(t['matrix'].flatten().tolist()) for t in targets}) > 1  # other views


def test_zero_unlabelled():
    batch = next(make(n_unlabelled=0))
    assert list(batch) == ['labelled'] and next(SemiLoader(Fake(), view=VIEW, num_workers=0)).keys() == {
        'labelled'
    }


def test_images_without_boxes_are_not_labelled_data():
    drawn = Counter(i for t in range(50) for b in [make().draws(t)[0]] for _, i in b)
    assert set(drawn) == set(range(12)) - {3, 5} and max(drawn.values()) - min(drawn.values()) <= 1
    assert {i for t in range(50) for _, i in make(keep_empty=True).draws(t)[0]} == set(range(12))
    assert 103 in [
        i
        for t in range(20)
        for i in ids(make(keep_empty=True, n_labelled=1, n_unlabelled=0).batch(t)['labelled'])
    ]
    with pytest.raises(DataError, match='no labelled image has a box'):
        make(labelled=Subset(Fake(), [3, 5]))


def everything(x):
    if isinstance(x, dict):
        return set(x) | set().union(*map(everything, x.values()))
    return set().union(*map(everything, x)) if isinstance(x, (list, tuple)) else set()


@pytest.mark.parametrize('workers', [0, 1])
def test_hidden_labels_never_arrive(workers):
    "The unlabelled set has annotations; neither batch nor what a worker sends has a trace of them"
    with make(num_workers=workers) as loader:
        for batch in take(loader, 3):
            for kind in ('weak', 'strong'):
                assert not {'boxes', 'labels', 'ignore'} & everything(batch[kind])
                for t in batch[kind]['targets']:
                    assert set(t) == {'image_id', 'orig_size', 'size', 'matrix'}
            assert {'boxes', 'labels'} <= everything(batch['labelled'])
    payload = L._Work(make()._make)[0]
    assert not {'boxes', 'labels'} & everything([payload[k][1] for k in ('weak', 'strong')])
    views = make()._make(0)['weak'][0]
    assert all(v.boxes.shape == (0, 4) and len(v.labels) == 0 for v in views)


def test_truth_of_unlabelled_does_not_matter():
    class Liar(Fake):
        def __getitem__(self, i):
            s = super().__getitem__(i)
            s.boxes, s.labels, s.ignore = (
                torch.rand(9, 4),
                torch.full((9,), 99),
                torch.zeros(9, dtype=torch.bool),
            )
            return s

    assert same(make().batch(0), make(unlabelled=Liar(20)).batch(0)) and same(
        make().batch(0), make(unlabelled=Unlabelled(Fake(20))).batch(0)
    )


# --- real data on disk -----------------------------------------------------------------


def write_coco(root, n=4):
    (root / 'images').mkdir(parents=True)
    images, anns = [], []
    for i in range(n):
        Image.new('RGB', (64, 48), (i * 20, 90, 120)).save(root / 'images' / f'{i}.jpg')
        images.append(dict(id=i + 1, file_name=f'{i}.jpg', width=64, height=48))
        anns.append(dict(id=i + 1, image_id=i + 1, category_id=1, bbox=[5, 5, 20, 20], area=400, iscrowd=0))
    (root / 'instances_train.json').write_text(
        json.dumps(dict(images=images, annotations=anns, categories=[dict(id=1, name='thing')]))
    )
    return CocoDataset(root / 'instances_train.json', root / 'images')


def test_coco_with_a_plain_folder(tmp_path):
    labelled = write_coco(tmp_path / 'coco')
    (tmp_path / 'more').mkdir()
    for k in range(3):
        Image.new('RGB', (50 + k, 40), (200, k, 0)).save(tmp_path / 'more' / f'photo {k}.png')
    with SemiLoader(labelled, ImageFolder(tmp_path / 'more'), 2, 2, VIEW, num_workers=2) as loader:
        for batch in take(loader, 3):
            assert all(isinstance(i, int) for i in ids(batch['labelled'])) and all(
                isinstance(i, str) for i in ids(batch['weak'])
            )
            assert torch.isfinite(batch['strong']['images']).all()


@pytest.mark.parametrize('workers', [0, 2])
def test_unreadable_file_is_one_line(tmp_path, workers):
    ds = write_coco(tmp_path / 'coco')
    (tmp_path / 'coco' / 'images' / '2.jpg').write_bytes(b'no image')
    loader = SemiLoader(ds, n_labelled=2, view=VIEW, num_workers=workers)
    with pytest.raises(DataError) as e:
        take(loader, 5)
    assert '\n' not in str(e.value) and '2.jpg' in str(e.value) and 'Traceback' not in str(e.value)
    assert loader._loader is None  # no worker is left
    (tmp_path / 'coco' / 'images' / '2.jpg').write_bytes(
        (tmp_path / 'coco' / 'images' / '1.jpg').read_bytes()
    )
    assert len(take(loader, 2)) == 2  # cured: the same step is tried again
    loader.close()


def test_bugs_keep_their_traceback():
    with pytest.raises(KeyError, match='a bug'):
        next(make(labelled=Fake(bad='bug'), num_workers=1))


def test_dead_worker_names_a_cure():
    with pytest.raises(SemiDETRError, match='num_workers=0') as e:
        next(make(labelled=Fake(bad='crash'), num_workers=1))
    assert '\n' not in str(e.value)


@pytest.mark.parametrize(
    'kw, error',
    [
        (dict(ratio='binom'), ConfigError),
        (dict(n_labelled=0), ConfigError),
        (dict(n_unlabelled=-1), ConfigError),
        (dict(unlabelled=None), DataError),
        (dict(unlabelled=Fake(0)), DataError),
        (dict(labelled=Fake(0)), DataError),
        (dict(num_workers=-1), ConfigError),
    ],
)
def test_bad_requests(kw, error):
    with pytest.raises(error) as e:
        make(**kw)
    assert '\n' not in str(e.value)


def test_ready_for_spawn():
    "Start methods that do not fork send the work by pickle"
    work = pickle.loads(pickle.dumps(L._Work(make()._make)))
    assert same(L._receive(work[3], VIEW), make().batch(3))


# --- evaluation ------------------------------------------------------------------------


@pytest.mark.parametrize('workers', [0, 2])
def test_eval_loader(workers):
    ds = Fake(7)
    loader = EvalLoader(ds, VIEW, batch_size=3, num_workers=workers)
    for _ in range(2):  # can be gone through again
        parts = list(loader)
        assert len(loader) == len(parts) == 3 and [i for p in parts for i in ids(p)] == ds.ids
    assert parts[0]['targets'][0]['boxes'].shape == (1, 4) and parts[0]['targets'][0]['orig_size'] == (40, 60)
    assert min(parts[0]['targets'][0]['size']) == VIEW.eval_short
    shards = [
        [i for p in EvalLoader(ds, VIEW, 3, workers, rank=r, world=2) for i in ids(p)] for r in range(2)
    ]
    assert sorted(sum(shards, [])) == ds.ids
    assert 'boxes' not in next(iter(EvalLoader(Unlabelled(ds), VIEW, 2)))['targets'][0]
    assert list(EvalLoader(Fake(0), VIEW, num_workers=workers)) == []


# --- shutdown --------------------------------------------------------------------------

SCRIPT = """
import os, sys, traceback
sys.path.insert(0, {tests!r})
from test_loader import ENDS, Fake, make
for k, what in enumerate(ENDS): # one import for all: each case is a child of this process
    if os.fork(): continue
    sys.stderr = open(f'{folder}/{{k}}.err', 'w')
    loader = make(num_workers=2, unlabelled=Fake(20, slow=.02))
    next(loader)
    pids = [k] + [w.pid for w in loader._loader._iterator._workers]
    os.write(1, (' '.join(map(str, pids)) + '\\n').encode()) # one write: three processes share the pipe
    exec(what)
    break
else:
    for _ in ENDS: os.wait()
"""
INTERRUPT = """import signal
signal.signal(signal.SIGINT, signal.default_int_handler) # a shell's background jobs ignore SIGINT
signal.raise_signal(signal.SIGINT)"""
ENDS = {
    'raise ValueError("boom")': 'ValueError',
    'os.kill(os.getpid(), 9)': '',
    INTERRUPT: 'KeyboardInterrupt',
}


def alive(pid):
    try:
        return open(f'/proc/{pid}/stat').read().rsplit(')', 1)[1].split()[0] not in 'ZX'
    except OSError:
        return False


@pytest.mark.skipif(not os.path.exists('/proc/self/stat'), reason='looks for processes in /proc')
def test_no_process_is_left(tmp_path):
    "However the training process ends: by an error, killed, by Ctrl-C"
    (tmp_path / 'run.py').write_text(SCRIPT.format(tests=os.path.dirname(__file__), folder=tmp_path))
    out = subprocess.run(
        [sys.executable, str(tmp_path / 'run.py')], capture_output=True, text=True, timeout=120
    )
    cases = sorted(list(map(int, line.split())) for line in out.stdout.splitlines())
    assert [c[0] for c in cases] == [0, 1, 2], out.stderr + ''.join(
        (tmp_path / f'{k}.err').read_text() for k in range(3)
    )
    pids = [p for c in cases for p in c[1:]]
    assert len(pids) == 6
    deadline = time.time() + 30  # torch's workers look for their parent every five seconds
    while any(map(alive, pids)) and time.time() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, pids))
    for k, word in enumerate(ENDS.values()):
        err = (tmp_path / f'{k}.err').read_text()
        assert word in err and 'DataLoader' not in err and 'Exception ignored' not in err, err
