"Run one script in several processes that train together."

import os, subprocess, sys
from pathlib import Path

TESTS = Path(__file__).parent
FORK = '''
import os, runpy, socket, sys
import torch, torch._dynamo, semidetr.train.trainer
sys.argv = sys.argv[1:]
n = int(sys.argv.pop(0))
with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n))
children = []
for rank in map(str, range(n)):
    children.append(os.fork())
    if not children[-1]:
        os.environ.update(RANK=rank, LOCAL_RANK=rank)
        runpy.run_path(sys.argv[0], run_name='__main__')
        sys.exit()
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children))
'''


def run_together(
    script,  # text of the script; `sys.argv[1]` is the folder
    folder,  # what the script gets; it is written beside it
    *options,  # of torchrun, which starts the processes if there are any
    n=2,  # processes; without options forked from one that has imported everything, which takes half the time
    timeout=1200,  # seconds
    check=True,  # the script must end well
):
    "The finished command; the script can import the package and what is in the folder of the tests"
    path = Path(f'{folder}.py')
    Path(folder).mkdir(parents=True, exist_ok=True)
    path.write_text(f'import sys\nsys.path[:0] = [{str(TESTS)!r}, {str(TESTS.parent)!r}]\n{script}')
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node']
    done = subprocess.run(
        [sys.executable, *(torchrun if options else ['-c', FORK]), str(n), *options, str(path), str(folder)],
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0 or not check, done.stderr[-3000:]
    return done
