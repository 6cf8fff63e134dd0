"What a machine can do: cores, kept memory, the bfloat16 probe, the report"

import os
import subprocess
import sys
import pytest
import torch
from semidetr.train import machine as M


@pytest.mark.parametrize(
    'files,cores',
    [
        ({'cpu.max': 'max 100000'}, 8),
        ({'cpu.max': '150000 100000'}, 2),
        ({'cpu.max': '10000 100000'}, 1),
        ({'cpu/cpu.cfs_quota_us': '300000', 'cpu/cpu.cfs_period_us': '100000'}, 3),
        ({'cpu/cpu.cfs_quota_us': '-1', 'cpu/cpu.cfs_period_us': '100000'}, 8),
        ({'cpu.max': ''}, 8),
        ({}, 8),
    ],
)
def test_usable_cores(tmp_path, monkeypatch, files, cores):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(8)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + '\n')
    assert M.usable_cores(tmp_path) == cores


def test_threads_fit(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, 'get_num_threads', lambda: calls[-1] if calls else 64)
    monkeypatch.setattr(torch, 'set_num_threads', calls.append)
    monkeypatch.setattr(M, 'usable_cores', lambda: 2)
    monkeypatch.setenv('OMP_NUM_THREADS', '64')
    assert M.fit_threads() == 64 and not calls
    monkeypatch.delenv('OMP_NUM_THREADS')
    assert M.fit_threads() == 2 and calls == [2]


KEEP = '''
import resource, sys, torch
from semidetr.train.machine import keep_memory
torch.set_num_threads(1)
on = keep_memory()
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step(): a = [torch.ones(12_000_000) for _ in range(2)]; return a[0][0]
for _ in range(6): step()
before = faults()
for _ in range(5): step()
print(on, faults()-before)
'''


def kept(**env):
    "(is memory kept, page faults of five steps) in a process with these variables"
    clean = {k: v for k, v in os.environ.items() if not k.startswith('MALLOC_')}
    env = clean | dict(OMP_NUM_THREADS='1') | env
    done = subprocess.run([sys.executable, '-c', KEEP], capture_output=True, text=True, check=True, env=env)
    on, n = done.stdout.split()
    return on == 'True', int(n)


@pytest.mark.skipif(sys.platform != 'linux' or M.platform.libc_ver()[0] != 'glibc', reason='needs glibc')
def test_memory_is_kept():
    """Tensors of 48 MB, allocated five times: hardly a new page with the setting, all of them again without.

    By default glibc keeps no block above 32 MB.
    """
    on, few = kept()
    off, many = kept(SEMIDETR_KEEP_MEMORY='0')
    assert on and not off and few < many / 2  # the first blocks need new pages in any case


@pytest.mark.parametrize(
    'name, value', [('MALLOC_ARENA_MAX', '4'), ('GLIBC_TUNABLES', 'glibc.malloc.hugetlb=0')]
)
def test_memory_settings_of_the_user_come_first(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert not M.keep_memory()


def test_no_glibc(monkeypatch):
    monkeypatch.setattr(sys, 'platform', 'darwin')
    assert M.keep_memory() is False


def test_probe_leaves_the_random_state():
    state = torch.get_rng_state()
    assert 0.01 < M.bf16_speed(rounds=1) < 100 and torch.equal(state, torch.get_rng_state())


def test_report_has_one_fact_per_line(monkeypatch):
    status = dict(
        mode='auto',
        cpu=dict(ready=True, source='built', path='/x/cpu.so', reason='', isa='v4'),
        cuda=dict(ready=False, source='', path='', reason='no nvcc'),
    )
    monkeypatch.setattr(M, 'ops_status', lambda: status)
    lines = list(M.environment_lines(probe=False))
    assert all('\n' not in line for line in lines)
    assert any('native, built, instruction set v4, /x/cpu.so' in line for line in lines)
    assert 'no nvcc. Cure: semidetr build-ops --device cuda' in M._op_line('cuda', status)
