"Core: errors, whole files, hashes, generators, and sums over two real processes"

import hashlib, json, os, pickle, random, subprocess, sys, textwrap, time
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pytest, torch
from semidetr import core
from semidetr.core import (
    ConfigError,
    DataError,
    SemiDETRError,
    all_gather_cat,
    all_reduce_mean,
    atomic_write,
    in_range,
    is_main,
    pick_device,
    rank,
    rng_state,
    seed_everything,
    set_rng_state,
    stable_hash,
    suggest,
    world_size,
)

ROOT = Path(__file__).resolve().parents[1]
ENV = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}


# --- errors ----------------------------------------------------------------------------
def test_errors_are_one_family():
    for kind in (DataError, ConfigError):
        assert issubclass(kind, SemiDETRError) and not issubclass(kind, (ValueError, KeyError))


@pytest.mark.parametrize(
    'word,known,want',
    [
        ('metod', ['method', 'seed'], "did you mean 'method'?"),
        ('zzz', ['b', 'a'], 'known: a, b'),
        ('x', [], 'known: '),
        (3, [1, 2], 'known: 1, 2'),
        ('digit', {'digits': 0}, "did you mean 'digits'?"),
    ],
)
def test_suggest(word, known, want):
    assert suggest(word, known) == want


@pytest.mark.parametrize(
    'value,range_,want',
    [
        (0, 1, 'g.x=0 must be at least 1'),
        (2.0, (0, 1), 'g.x=2.0 must lie between 0 and 1'),
        (float('nan'), 0, 'g.x=nan must be at least 0'),
        (1, 1, None),
        (0.0, (0, 1), None),
        (1, (0, 1), None),
        (float('inf'), 0, None),
        (None, (0, 1), None),
    ],
)
def test_in_range(value, range_, want):
    said = None
    try:
        in_range('g', SimpleNamespace(x=value), x=range_)
    except ConfigError as e:
        said = str(e)
    assert said == want


# --- files -----------------------------------------------------------------------------
def test_atomic_write_text_bytes_folders(tmp_path):
    f = tmp_path / 'a' / 'b' / 'c.json'
    atomic_write(f, 'Straße')
    assert f.read_bytes() == 'Straße'.encode()
    atomic_write(str(f), b'\x00\xff')
    assert f.read_bytes() == b'\x00\xff'
    atomic_write(f, '')
    assert f.read_bytes() == b''
    assert [p.name for p in f.parent.iterdir()] == ['c.json']


@pytest.mark.parametrize('where', ['write', 'rename'])
def test_atomic_write_failure_keeps_the_old_file(tmp_path, monkeypatch, where):
    f = tmp_path / 'run.json'
    atomic_write(f, 'old')

    def boom(*a, **k):
        raise OSError('disk full')

    monkeypatch.setattr(core.os, 'fsync' if where == 'write' else 'replace', boom)
    with pytest.raises(OSError):
        atomic_write(f, 'new')
    assert f.read_text() == 'old' and [p.name for p in tmp_path.iterdir()] == ['run.json']


WRITER = """
import sys
from semidetr.core import atomic_write
print('go', flush=True)
while True:
    for c in (b'a', b'b'):
        atomic_write(sys.argv[1], c * 300_000)
"""


def test_atomic_write_survives_a_kill(tmp_path):
    f = tmp_path / 'big'
    atomic_write(f, b'a' * 300_000)
    p = subprocess.Popen([sys.executable, '-c', WRITER, str(f)], env=ENV, stdout=subprocess.PIPE)
    try:
        assert p.stdout.readline() == b'go\n'
        contents = set()
        for _ in range(60):
            data = f.read_bytes()
            assert len(data) == 300_000 and len(set(data)) == 1
            contents.add(data[:1])
            time.sleep(0.005)
    finally:
        p.kill()
        p.wait()
    data = f.read_bytes()
    assert len(data) == 300_000 and len(set(data)) == 1 and contents == {b'a', b'b'}


# --- hashes ----------------------------------------------------------------------------
FIXED = [
    ((), 8203414616412130826),
    ((0,), 3456079177858693020),
    (('fold', 0), 1522483012523347845),
    ((0, 'view', 12), 7195142557710022539),
    (('a', ('b', 1.5), None, True), 6835905250069774909),
    ((123, 'münchen'), 3314440554022494833),
]


@pytest.mark.parametrize('parts,want', FIXED)
def test_stable_hash_numbers(parts, want):
    assert stable_hash(*parts) == want  # changing them changes every published split


def test_stable_hash_is_what_the_equation_says():
    assert stable_hash('fold', 0) == int(hashlib.sha256(b"'fold'\x1f0").hexdigest()[:16], 16) // 2


def test_stable_hash_types_and_borders():
    assert stable_hash(np.int64(3), (np.float64(0.5), np.str_('a'))) == stable_hash(3, (0.5, 'a'))
    assert stable_hash((1, 2)) == stable_hash([1, 2])
    different = [
        (1,),
        ('1',),
        (1.0,),
        (1, 1),
        ((1,),),
        ((1, 1),),
        ('a', 'b'),
        ('ab',),
        ('a\x1fb',),
        ("a'\x1f'b",),
        (True,),
        (None,),
    ]
    assert len({stable_hash(*p) for p in different}) == len(different)
    for bad in (torch.tensor(3), np.zeros(2), object(), (1, torch.zeros(2)), lambda: 0):
        with pytest.raises(TypeError, match='stable_hash cannot'):
            stable_hash(bad)


def test_stable_hash_is_uniform():
    u = np.array([stable_hash('u', i) for i in range(4000)], float) / 2**63
    assert 0 <= u.min() and u.max() < 1
    count = np.histogram(u, 20, (0, 1))[0]
    assert ((count - 200) ** 2 / 200).sum() < 43.8  # chi square, 19 degrees of freedom, 0.1 %


# --- generators ------------------------------------------------------------------------
def _draw():
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        *torch.randn(3).tolist(),
    ]


@pytest.mark.parametrize('through', [lambda s: s, lambda s: pickle.loads(pickle.dumps(s))])
def test_rng_state_round_trip(through):
    seed_everything(5)
    random.gauss(0, 1)
    np.random.randn()  # both keep a spare Gaussian: it belongs to the state
    state = through(rng_state())
    a = _draw()
    _draw()
    set_rng_state(state)
    assert _draw() == a


def test_rng_state_through_torch_save(tmp_path):
    seed_everything(6)
    torch.save(rng_state(), tmp_path / 's.pt')
    a = _draw()
    set_rng_state(torch.load(tmp_path / 's.pt', weights_only=False))
    assert _draw() == a


def test_snapshot_is_a_copy():
    seed_everything(1)
    state = rng_state()
    a = _draw()
    assert [(set_rng_state(state), _draw())[1] for _ in range(2)] == [a, a]


def test_seed_everything():
    seed_everything(3)
    a = _draw()
    seed_everything(3)
    assert _draw() == a
    seed_everything(4)
    assert _draw() != a
    seed_everything(stable_hash('seed'))  # 63 bits are fine


# --- device ----------------------------------------------------------------------------
def test_pick_device(monkeypatch):
    assert pick_device('cpu') == torch.device('cpu')
    with pytest.raises(ConfigError, match='auto, cpu, cuda'):
        pick_device('gpu')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert pick_device() == torch.device('cpu')
    with pytest.raises(ConfigError, match='--device cpu'):
        pick_device('cuda')


def test_pick_device_counts_gpus(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
    monkeypatch.setenv('LOCAL_RANK', '1')
    assert pick_device() == torch.device('cuda', 1) == chosen[-1]
    assert pick_device('cuda:0') == torch.device('cuda', 0) == chosen[-1]
    with pytest.raises(ConfigError, match='2 GPU'):
        pick_device('cuda:2')


# --- processes -------------------------------------------------------------------------
def test_alone_everything_is_the_identity():
    assert (world_size(), rank(), is_main()) == (1, 0, True)
    x = torch.randn(3, 2, requires_grad=True)
    for y in (all_reduce_mean(x), all_gather_cat(x)):
        assert torch.equal(y, x) and not y.requires_grad


WORKER = textwrap.dedent('''
    import json, sys, torch, torch.distributed as dist
    from semidetr.core import all_gather_cat, all_reduce_mean, is_main, rank, stable_hash, world_size
    store, r, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    dist.init_process_group('gloo', init_method='file://'+store, rank=r, world_size=2)
    x = torch.tensor([1. if r == 0 else 4.], requires_grad=True)
    n = [3, 0][r]
    res = dict(hash=stable_hash('fold', 0), pyhash=hash('fold'),
               world=world_size(), rank=rank(), main=is_main(),
               mean=all_reduce_mean(x).tolist(), untouched=x.tolist(), grad=all_reduce_mean(x).requires_grad,
               mean_int=all_reduce_mean(torch.tensor(2*r+1)).item(),
               first=all_gather_cat(torch.arange(n*2.).view(n, 2)+1).tolist(),
               last=all_gather_cat(torch.arange([0, 2][r])*10).tolist(),
               uneven=all_gather_cat(torch.full((r+1, 1), float(r), requires_grad=True)).tolist(),
               none=list(all_gather_cat(torch.zeros(0, 4)).shape),
               bools=all_gather_cat(torch.tensor([True, False][:r+1])).tolist(),
               strided=all_gather_cat(torch.arange(6.).view(2, 3).T[:2+r]).tolist(),
               nan=all_gather_cat(torch.tensor([float('nan')]*(1-r))).isnan().tolist())
    open(out, 'w').write(json.dumps(res)); dist.destroy_process_group()
''')


def test_two_processes(tmp_path):
    ps = [
        subprocess.Popen(
            [sys.executable, '-c', WORKER, str(tmp_path / 'store'), str(r), str(tmp_path / f'{r}.json')],
            env={**ENV, 'PYTHONHASHSEED': str(r + 1)},
        )
        for r in (0, 1)
    ]
    try:
        assert [p.wait(timeout=120) for p in ps] == [0, 0]
    finally:
        for p in ps:
            p.kill()
    a, b = (json.loads((tmp_path / f'{r}.json').read_text()) for r in (0, 1))
    assert (a['world'], a['rank'], a['main'], b['rank'], b['main']) == (2, 0, True, 1, False)
    assert (a['untouched'], b['untouched']) == ([1.0], [4.0]) and not a['grad']
    assert (
        a['hash'] == b['hash'] == 1522483012523347845 and a['pyhash'] != b['pyhash']
    )  # Python's own hash differs between processes
    want = dict(
        mean=[2.5],
        mean_int=2.0,
        first=[[1, 2], [3, 4], [5, 6]],
        last=[0, 10],
        uneven=[[0], [1], [1]],
        none=[0, 4],
        bools=[True, True, False],
        strided=[[0, 3], [1, 4], [0, 3], [1, 4], [2, 5]],
        nan=[True],
    )
    for k, v in want.items():
        assert a[k] == b[k] == v, k
