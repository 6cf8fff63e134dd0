"A kill of each method, three of two processes: the same command again, the same tensors, log and metrics."

import json, random, subprocess, sys
import pytest, torch
from conftest import ROOT
from test_restarts import module
from semidetr.semi.methods import METHODS


@pytest.fixture(scope='module')
def soak():
    return module('soak')


def record_of(folder, *words):
    "What a run of the program finds"
    out = folder / 'record.json'
    program = [sys.executable, str(ROOT / 'benchmarks/soak.py'), '--out', str(out), '--folder', str(folder)]
    done = subprocess.run([*program, *words], capture_output=True, text=True, timeout=900)
    assert out.exists(), done.stderr[-3000:]
    return done, json.loads(out.read_text())


def assert_equal(done, record):
    assert done.returncode == 0 and 'DIFFERS' not in done.stdout, done.stdout[-3000:]
    for row in record['runs']:
        assert not row['faults'] and row['tensors'] > 300
        assert all(k['codes'][k['rank']] == -9 for k in row['kills'])


def test_a_kill_of_every_method(tmp_path):
    done, record = record_of(tmp_path, '--kills', '1', '--processes', '1')
    assert_equal(done, record)
    assert record['by_method'] == dict.fromkeys(METHODS, 1)


def test_three_kills_of_two_processes(tmp_path):
    words = '--kills 3 --processes 2 --methods semi_detr --seed 2'
    done, record = record_of(tmp_path, *words.split())
    assert_equal(done, record)
    assert record['by_method'] == dict(semi_detr=3) and record['runs'][0]['settings'] == 'two processes'


def test_points_come_from_the_seed_and_reach_every_place(soak):
    chains = soak.draw_chains(list(METHODS), 20, 0, 0)
    assert chains == soak.draw_chains(list(METHODS), 20, 0, 0) != soak.draw_chains(list(METHODS), 20, 0, 1)
    for method in METHODS:
        mine = [(name, points) for m, name, points in chains if m == method]
        assert {name for name, _ in mine} == set(soak.SETTINGS)
        assert sum(len(points) for _, points in mine) == 20
        for _, points in mine:
            steps = [p['step'] for p in points]
            assert steps == sorted(set(steps))
    points = [p for _, _, points in chains for p in points]
    assert {p['place'] for p in points} == {*soak.ALWAYS, 'write', 'log', 'report'}
    assert {soak.stage_of(p['step']) for p in points} == {'burn-in', 'one-to-many', 'one-to-one'}
    assert {p['rank'] for p in points} == {0, 1}


def test_a_place_exists_where_it_is_drawn(soak):
    for n in range(300):
        for p in soak.draw_points(random.Random(n), 3, 2):
            if p['place'] == 'write':
                assert (p['step'] + 1) % soak.SAVED == 0 or p['step'] + 1 == soak.ITERS
            if p['place'] in ('log', 'report'):
                assert p['rank'] == 0
            assert p['place'] != 'report' or p['step'] + 1 == soak.ITERS


def test_every_difference_is_found(soak):
    nan = float('nan')
    a = dict(w=torch.tensor([1.0, nan]), n=[1, 2.0], deep=dict(x=(torch.zeros(2, 0), 'a')))
    a |= dict(s=torch.tensor(2), spent=3)
    b = a | dict(w=a['w'].clone(), spent=4)
    assert soak.differences(a, b) == [] and soak.tensors(a) == 3
    for change, where in (
        (dict(w=torch.tensor([1.0, 1e-45])), ['w']),
        (dict(w=torch.tensor([1.0, nan], dtype=torch.float64)), ['w']),
        (dict(n=[1, 2]), ['n[1]']),
        (dict(n=[1]), ['n']),
        (dict(deep=dict(x=(torch.zeros(0, 2), 'a'))), ['deep.x[0]']),
        (dict(deep=dict(x=(torch.zeros(2, 0), 'b'))), ['deep.x[1]']),
        (dict(more=1), ['more']),
        (dict(s=torch.tensor(3)), ['s']),
    ):
        assert soak.differences(a, b | change) == where
