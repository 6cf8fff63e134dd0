"torchrun --max-restarts: a process is killed, all start again, and the result is that of an unbroken run."

import importlib.util, json, os, signal, subprocess, sys, time
from pathlib import Path
import pytest
from conftest import ROOT
from test_trainer import TINY

WORDS = [
    *['train', '--preset', 'digits', '-q', 'method.name=semi_detr', *TINY],
    *['run.test=false', 'data.dev=2', 'method.T1=4', 'optim.iters=9'],
]


def module(name):
    "A program of benchmarks/ as a module"
    spec = importlib.util.spec_from_file_location(name, ROOT / 'benchmarks' / f'{name}.py')
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def start(folder, said):
    options = ['--standalone', '--nproc-per-node', '2', '--max-restarts', '2', '-m', 'semidetr.cli']
    return subprocess.Popen(
        [sys.executable, '-m', 'torch.distributed.run', *options, *WORDS, '-o', str(folder)],
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)},
        stdout=said,
        stderr=said,
    )


def process_of(launcher, rank):
    "Number of the process with this rank that a launcher has started"
    for pid in Path(f'/proc/{launcher}/task/{launcher}/children').read_text().split():
        if f'RANK={rank}'.encode() in Path(f'/proc/{pid}/environ').read_bytes().split(b'\0'):
            return int(pid)
    raise AssertionError(f'no process with rank {rank}')


def step_of(folder):
    "Last iteration in the log"
    path = folder / 'log.jsonl'
    rows = path.read_text().splitlines() if path.exists() else []
    return json.loads(rows[-1])['step'] if rows else 0


def owner_of(folder):
    "Number of the process that trains in a folder, None if there is none"
    path = folder / 'owner.json'
    return json.loads(path.read_text())['pid'] if path.exists() else None


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs') / 'whole'
    with open(f'{folder}.txt', 'w') as said:
        assert start(folder, said).wait(600) == 0, Path(f'{folder}.txt').read_text()[-3000:]
    return folder


@pytest.mark.skipif(not Path('/proc/self/environ').exists(), reason='needs /proc')
def test_killed_processes_are_started_again(whole, tmp_path):
    "First process 0, which owns the folder, and later process 1"
    folder, text = tmp_path / 'r', tmp_path / 'said.txt'
    with text.open('w') as said:
        p = start(folder, said)
        killed = None
        for rank, step in ((0, 4), (1, 6)):
            end = time.monotonic() + 300
            while step_of(folder) < step or owner_of(folder) in (None, killed):
                assert p.poll() is None and time.monotonic() < end, text.read_text()[-3000:]
                time.sleep(0.05)
            killed = process_of(p.pid, rank)
            os.kill(killed, signal.SIGKILL)
        assert p.wait(600) == 0, text.read_text()[-3000:]
    found, tensors = module('soak').compare(folder, whole)
    assert not found and tensors > 300
    assert text.read_text().count('has ended without a word; this process takes its place') == 1
