"One owner per run folder: living owners refused, dead ones replaced with a line, left-over files cleared."

import json, os, signal, subprocess, sys, threading, time, warnings
import pytest
from semidetr.core import DataError
from semidetr.train import lock as L


def write(folder, **change):
    (folder / L.LOCK).write_text(json.dumps(L.this_process(folder) | change))


def dead_pid():
    p = subprocess.Popen([sys.executable, '-c', ''])
    p.wait()
    return p.pid


def taken(folder):
    "Lines that are said when the folder is taken"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        with L.Owner(folder):
            assert json.loads((folder / L.LOCK).read_text()) == L.this_process(folder)
    assert not (folder / L.LOCK).exists()
    return [str(w.message) for w in said]


def test_a_free_folder_is_taken_without_a_word(tmp_path):
    assert taken(tmp_path / 'new') == []


def test_a_living_process_is_respected(tmp_path):
    p = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)
    try:
        write(tmp_path, pid=p.pid, begin=L.begin_of(p.pid))
        before = (tmp_path / L.LOCK).read_text()
        with pytest.raises(DataError, match=f'process {p.pid} on .* trains in this folder') as e:
            taken(tmp_path)
        assert '\n' not in str(e.value) and (tmp_path / L.LOCK).read_text() == before
    finally:
        p.communicate(b'\n')
    [line] = taken(tmp_path)
    assert f'process {p.pid}' in line and 'takes its place' in line


def test_a_number_that_is_used_again_is_another_process(tmp_path):
    if not L.begin_of(os.getpid()):
        pytest.skip('the system does not say when a process began')
    write(tmp_path, begin='1')
    assert len(taken(tmp_path)) == 1


def test_a_process_of_another_host_is_respected_while_it_gives_signs_of_life(tmp_path):
    write(tmp_path, host='node7', boot='another')
    with pytest.raises(DataError, match='node7 trains in this folder.*5 minutes after its death'):
        taken(tmp_path)
    os.utime(tmp_path / L.LOCK, (time.time() - L.DEAD - 60,) * 2)
    [line] = taken(tmp_path)
    assert 'node7' in line


linux = pytest.mark.skipif(not L.this_process()['boot'], reason='the system has no number of its start')


@linux
@pytest.mark.parametrize('ages', [[105, 105], [0, 50, 105, 105]])
def test_a_host_that_was_started_again(tmp_path, monkeypatch, ages):
    "Its number and begin are those of a living process here; at once if its last sign of life is old"
    write(tmp_path, boot='another')
    monkeypatch.setattr(L, '_age', lambda _: ages.pop(0))
    monkeypatch.setattr(L, 'PAUSE', 0.05)
    lines = 1 + (ages[0] == 0)
    *waiting, line = taken(tmp_path)
    assert 'takes its place' in line and 1 + len(waiting) == lines and not ages


@linux
def test_a_living_process_of_another_host_of_the_same_name_is_respected(tmp_path, monkeypatch):
    write(tmp_path, boot='another')
    monkeypatch.setattr(L, 'PAUSE', 0.05)
    beat = threading.Timer(0.3, os.utime, [tmp_path / L.LOCK])
    beat.start()
    with (
        pytest.warns(UserWarning, match='waiting 100 s for a sign'),
        pytest.raises(DataError, match='trains'),
    ):
        L.refuse_if_owned(tmp_path)
    beat.join()


OWN = """
import sys
from semidetr.train.lock import Owner
with Owner(sys.argv[1]):
    print('mine', flush=True)
    sys.stdin.readline()
"""


@linux
def test_another_container_of_this_host_is_asked_by_its_lock(tmp_path, monkeypatch):
    "However old its last sign of life is while it lives, and at once when it is dead"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    p = subprocess.Popen([sys.executable, '-c', OWN, str(tmp_path)], **pipes)
    assert p.stdout.readline() == 'mine\n'
    lock = json.loads((tmp_path / L.LOCK).read_text())
    (tmp_path / L.LOCK).write_text(json.dumps(lock | dict(space='another', host='restarted')))
    os.utime(tmp_path / L.LOCK, (0, 0))
    with pytest.raises(DataError, match=f'process {p.pid} on restarted trains in this folder'):
        taken(tmp_path)
    os.kill(p.pid, signal.SIGKILL)
    p.communicate()
    os.utime(tmp_path / L.LOCK)
    before = (tmp_path / L.LOCK).read_text()
    assert ['takes its place' in line for line in taken(tmp_path)] == [True]
    for number, change in enumerate((dict(disk='7'), {})):  # another mount; a disk without locks
        (tmp_path / L.LOCK).write_text(json.dumps(json.loads(before) | change))
        monkeypatch.setattr(L, 'SILENT', 0.0)
        monkeypatch.setattr(L, '_is_held', [None, lambda _: None][number])
        assert len(taken(tmp_path)) == 1


def test_a_lock_of_an_older_version_has_no_start_of_the_system():
    old = dict(host='a', boot='', disk='', space='x', begin='1')
    rules = [
        L.rule_of(old | change, old | dict(boot='b')) for change in ({}, dict(space='y'), dict(host='c'))
    ]
    assert rules == ['number', 'age', 'age']


@pytest.mark.parametrize('text', ['', '[]', '{"pid": "7"}', '{"pid": -1}', '\x00', '{"pid": 7' + '[' * 99999])
def test_a_damaged_lock_is_nobodys(tmp_path, text):
    (tmp_path / L.LOCK).write_text(text)
    assert taken(tmp_path) == []


def test_two_at_once_and_one_gets_it(tmp_path):
    "Three processes that start at the same time: one of them owns the folder"
    code = (
        'import sys, time\n'
        'from semidetr.core import DataError\n'
        'from semidetr.train.lock import Owner\n'
        'print("ready", flush=True)\n'
        'sys.stdin.readline()\n'
        'try:\n'
        '    with Owner(sys.argv[1]):\n'
        '        print("mine", flush=True)\n'
        '        sys.stdin.readline()\n'
        'except DataError as e:\n'
        '    print("refused", flush=True)\n'
    )
    write(tmp_path, pid=dead_pid(), begin='1')
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    ps = [subprocess.Popen([sys.executable, '-c', code, str(tmp_path)], **pipes) for _ in range(3)]
    for p in ps:
        assert p.stdout.readline() == 'ready\n'
    for p in ps:
        p.stdin.write('\n')
        p.stdin.flush()
    answers = sorted(p.stdout.readline().strip() for p in ps)
    for p in ps:
        p.communicate('\n')
    assert answers == ['mine', 'refused', 'refused']


def test_left_overs_of_killed_writers_are_cleared_and_nothing_else(tmp_path):
    left = ['.last.pt.7.tmp', '.next.rank1.pt.7.tmp', '.run.json.8.tmp', '.failed_step_3.pt.1.tmp', 'next.pt']
    kept = ['last.pt', 'last.rank1.pt', 'previous.pt', 'best.pt', 'log.jsonl', '.config.json.7.tmp', 'a.md']
    for name in left + kept:
        (tmp_path / name).write_text('')
    taken(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(kept)


def test_an_owner_that_was_replaced_notices_and_leaves_the_lock_alone(tmp_path):
    with L.Owner(tmp_path) as owner:
        write(tmp_path, host='node7')
        owner.check()
        assert owner.lost
    assert json.loads((tmp_path / L.LOCK).read_text())['host'] == 'node7'
