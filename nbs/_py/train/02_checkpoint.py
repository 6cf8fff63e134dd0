# %% [markdown]
# # Checkpoints {#sec-checkpoint}
#
# > All state in, all state out: a run that was stopped goes on as if nothing had happened.
#
# A checkpoint that forgets the random state, or the position in the data, or the optimiser's moments, does
# not continue a run: it starts another one from the same weights. Everything random or counted is therefore
# in one file, and the file holds tensors and plain Python values only, so that it can be read without running
# any code from it.

# %%
#| default_exp train.checkpoint

# %%
#| export
import io
import json
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
import torch
from semidetr.core import DataError, atomic_write, is_main, world_size

# %%
#| export
FORMAT = 1  # raised when the layout of the file changes


def pack_rng(
    state: dict,  # of `rng_state`
) -> dict:  # the same in tensors, lists and numbers
    "Make the generators' state readable with `weights_only=True`"
    name, keys, pos, has_gauss, cached = state['numpy']
    return {**state, 'numpy': (name, torch.from_numpy(keys.astype('int64')), pos, has_gauss, cached)}


def unpack_rng(
    state: dict,  # of `pack_rng`
) -> dict:  # for `set_rng_state`
    "Undo `pack_rng`"
    name, keys, pos, has_gauss, cached = state['numpy']
    version, internal, gauss = state['python']
    return {
        **state,
        'numpy': (name, keys.numpy().astype('uint32'), pos, has_gauss, cached),
        'python': (version, tuple(internal), gauss),
    }


# %%
#| export
def save_checkpoint(
    path,  # file
    **state,  # tensors, state dicts and plain values
):
    "Write all state at once: a crash while writing leaves the old file as it was"
    buffer = io.BytesIO()
    torch.save(dict(format=FORMAT, **state), buffer)
    atomic_write(path, buffer.getvalue())


def load_checkpoint(
    path,  # file written by `save_checkpoint`, or a run's folder (its `last.pt`)
    device='cpu',
) -> dict:
    "Read a checkpoint without running code from it; a DataError says what is wrong with the file"
    path = Path(path)
    if path.is_dir():
        path = path / 'last.pt'
    if not path.is_file():
        raise DataError(f'{path}: no checkpoint here; give the folder of a run or a .pt file')
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as e:
        raise DataError(
            f'{path}: not readable as a checkpoint ({str(e).splitlines()[0][:100]}); the file is damaged or from another program'
        ) from e
    if not isinstance(state, dict) or 'format' not in state:
        raise DataError(f'{path}: holds no semidetr checkpoint; it was written by another program')
    if state['format'] > FORMAT:
        raise DataError(
            f"{path}: written by a newer semidetr (format {state['format']}, this one reads {FORMAT}); upgrade"
        )
    return state


# %%
#| export
def load_weights(
    model,  # nn.Module
    state: dict,  # its state dict
    origin='',  # named in the error
):
    "Strict loading whose error says which tensors differ, in one line"
    own = model.state_dict()
    missing, extra = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    shape = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or extra or shape:
        parts = [
            f'{len(v)} {what} (first: {v[0]})'
            for v, what in ((missing, 'missing'), (extra, 'not known'), (shape, 'of another shape'))
            if v
        ]
        raise DataError(
            f'{origin}: weights do not fit this model: {", ".join(parts)}; use the configuration it was trained with'
        )
    model.load_state_dict(state)


# %% [markdown]
# ## What a run writes
#
# A run's folder holds `run.json` (the resolved configuration, versions, commit, data fingerprint, times,
# metrics), `log.jsonl` (a line every `log_every` iterations), `last.pt` (all state), `best.pt` (the weights
# that were best on the development part, where it is evaluated on the way) and TensorBoard events. Reports
# read `run.json` and `log.jsonl` and nothing else.

# %%
#| export
WRITTEN = ('nbs/ablations/results', 'nbs/ablations/runs')  # by the runs themselves


def git_commit(
    package,  # folder of the package
) -> str:  # first 12 digits; None if that is not a checkout of this project
    "Commit of the checkout; with `-dirty` if files that git knows have changed since, other than results"

    def git(*args):
        return subprocess.run(
            ['git', *args], cwd=package, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        if Path(git('rev-parse', '--show-toplevel')).resolve() != Path(package).resolve().parent:
            return None
        changed = git(
            'status',
            '--porcelain',
            '--untracked-files=no',
            '--',
            ':/',
            *(f':(top,exclude){f}' for f in WRITTEN),
        )
        return git('rev-parse', '--short=12', 'HEAD') + ('-dirty' if changed else '')
    except (OSError, subprocess.SubprocessError):
        return None


def environment() -> dict:  # plain values for run.json
    "Versions, machine and commit of this run"
    import numpy, torchvision
    from semidetr import __version__

    return dict(
        versions=dict(
            semidetr=__version__,
            torch=torch.__version__,
            torchvision=torchvision.__version__,
            numpy=numpy.__version__,
            python=platform.python_version(),
        ),
        commit=git_commit(Path(sys.modules['semidetr'].__file__).parent),
        machine=platform.machine(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        processes=world_size(),
    )


def cpu_seconds() -> float:
    "CPU time of this process and of its finished children"
    return sum(
        r.ru_utime + r.ru_stime
        for r in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def peak_memory_mb() -> float:
    "Largest resident size of this process so far, MB"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1024**2 if sys.platform == 'darwin' else 1024
    )


# %%
#| export
class RunLog:
    "log.jsonl and TensorBoard of the main process; what was logged after the checkpoint of a resumed run is dropped"

    def __init__(
        self,
        folder,  # of the run
        step: int = 0,  # iterations done
    ):
        self.path, self.board = Path(folder) / 'log.jsonl', None
        if not is_main():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = self.path.read_text().splitlines() if self.path.exists() else []
        whole = [r for r in rows if r.endswith('}')]  # a crash may have cut the last line
        atomic_write(self.path, ''.join(r + '\n' for r in whole if json.loads(r)['step'] <= step))
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(self.path.parent), purge_step=step)

    def write(self, row: dict):
        "One line; `step` counts finished iterations"
        if not is_main():
            return
        with self.path.open('a') as f:
            f.write(json.dumps(row) + '\n')
        for k, v in row.items():
            if isinstance(v, (int, float)) and k != 'step':
                self.board.add_scalar(k, v, row['step'])

    def close(self):
        if self.board is not None:
            self.board.close()


# %% [markdown]
# ## Going on as if nothing had happened
#
# Ten draws, a snapshot, five more draws; and from the file, in any later process, the same five:

# %%
#| hide
import tempfile
import random
import numpy as np
import matplotlib.pyplot as plt
from semidetr.core import rng_state, seed_everything, set_rng_state

# %%
seed_everything(3)
draw = lambda: [random.random(), float(np.random.rand()), float(torch.rand(()))]
before = [draw() for _ in range(10)]
folder = Path(tempfile.mkdtemp())
layer = torch.nn.Linear(2, 2)
save_checkpoint(folder / 'last.pt', model=layer.state_dict(), rng=pack_rng(rng_state()), step=10)
after = [draw() for _ in range(5)]
seed_everything(99)
back = load_checkpoint(folder)
set_rng_state(unpack_rng(back['rng']))
assert [draw() for _ in range(5)] == after and back['step'] == 10
after[0]

# %%
#| label: fig-checkpoint-rng
#| fig-cap: "Restoring weights alone continues with other random numbers (grey); restoring everything continues the very sequence (orange on blue)."
#| fig-alt: "A random walk, continued with and without the saved random state"
set_rng_state(unpack_rng(back['rng']))
same = np.cumsum([draw()[2] - 0.5 for _ in range(40)])
seed_everything(4)
other = np.cumsum([draw()[2] - 0.5 for _ in range(40)])
set_rng_state(unpack_rng(back['rng']))
unbroken = np.cumsum([draw()[2] - 0.5 for _ in range(40)])
fig, ax = plt.subplots(figsize=(5, 2.4), dpi=80)
ax.plot(unbroken, lw=4, color='#1f77b4', label='unbroken')
ax.plot(same, '--', color='#ff7f0e', label='resumed, all state')
ax.plot(other, color='grey', label='resumed, weights only')
ax.set(xlabel='draws after the checkpoint')
ax.legend(fontsize=8)
plt.show()

# %% [markdown]
# A file that is damaged, or somebody else's, is one clear error:

# %%
(folder / 'broken.pt').write_bytes((folder / 'last.pt').read_bytes()[:100])
messages = []
for name in ('broken.pt', 'none.pt'):
    try:
        load_checkpoint(folder / name)
    except DataError as e:
        messages.append(str(e).replace(str(folder), 'run'))
try:
    load_weights(torch.nn.Linear(3, 2), back['model'], 'run')
except DataError as e:
    messages.append(str(e))
assert len(messages) == 3
messages

# %% [markdown]
# ## Summary
#
# - One file holds all state; it is written at once and read without running code from it.
# - Random states of Python, NumPy and torch are part of it.
# - Loading is strict and says what does not fit.
# - `run.json` and `log.jsonl` are the run's memory for pages and people.
#
# ## Exercises
#
# 1. Which part of the state would you miss first if it were lost: moments, data position, or random state?
# 2. Why is the temporary file in the same folder as the checkpoint?
# 3. What can a malicious file do to `torch.load` without `weights_only=True`?
