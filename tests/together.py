"Run one script in several processes that train together, as torchrun starts them."

import os, subprocess, sys
from pathlib import Path

TESTS = Path(__file__).parent


def run_together(
    script,  # text of the script; `sys.argv[1]` is the folder
    folder,  # where the script is written to, and what it gets
    *options,  # of torchrun
    n=2,  # processes
    timeout=1200,  # seconds
    check=True,  # the script must end well
):
    "The finished torchrun; the script can import the package and what is in the folder of the tests"
    path = Path(folder) / 'together.py'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'import sys\nsys.path[:0] = [{str(TESTS)!r}, {str(TESTS.parent)!r}]\n{script}')
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(n)]
    done = subprocess.run(
        [*launcher, *options, str(path), str(folder)],
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0 or not check, done.stderr[-3000:]
    return done
