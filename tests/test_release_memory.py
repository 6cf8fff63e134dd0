"Freed memory goes back to the system, also from between blocks that are in use."

import os, subprocess, sys
import pytest
from semidetr.train import machine as M

BETWEEN = '''
import time, torch
from semidetr.train.machine import keep_memory, release_memory
torch.set_num_threads(1)
def rss(): return int(open('/proc/self/statm').read().split()[1]) * 4096 / 2**20
print(keep_memory())
blocks = [torch.ones(2**18 + 1000 * k) for k in range(400)]  # a megabyte each, and a little more
del blocks[::2]
del blocks[:150]
before, used = rss(), float(sum(b.sum() for b in blocks))
start = time.process_time()
print(release_memory(), time.process_time() - start)
print(before, rss(), used == float(sum(b.sum() for b in blocks)))
'''


@pytest.mark.skipif(sys.platform != 'linux' or M.platform.libc_ver()[0] != 'glibc', reason='needs glibc')
def test_what_is_free_goes_back():
    env = {
        k: v for k, v in os.environ.items() if not k.startswith('MALLOC_')
    }  # a setting there has the last word
    done = subprocess.run(
        [sys.executable, '-c', BETWEEN], capture_output=True, text=True, check=True, env=env
    )
    kept, (released, seconds), (before, after, same) = (line.split() for line in done.stdout.splitlines())
    assert kept == ['True'] and released == 'True' and same == 'True' and float(seconds) < 5
    assert float(before) - float(after) > 200  # 350 of 400 blocks are free


def test_no_glibc(monkeypatch):
    monkeypatch.setattr(sys, 'platform', 'darwin')
    assert M.release_memory() is False
