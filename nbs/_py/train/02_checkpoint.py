# %% [markdown]
# # Checkpoints {#sec-checkpoint}
#
# > Save and restore the whole state of a run, so that it continues as if it had not been stopped.
#
# A checkpoint without the random state, the position in the data or the optimiser's moments does not continue
# a run: it starts another one from the same weights. All of this state is therefore in one file. The file
# holds tensors and plain Python values only, so that reading it runs no code.

# %%
#| default_exp train.checkpoint

# %%
#| export
import hashlib
import io
import json
import os
import platform
import resource
import subprocess
import sys
import warnings
from pathlib import Path
import torch
from semidetr.core import DataError, atomic_write, is_main, tell, world_size
from semidetr.reading import read_rows
from semidetr.detectors.group import start_parallel
from semidetr.detectors.weight_files import map_class_rows
from semidetr.train.loggers import Loggers, TensorBoard

# %%
#| export
FORMAT = 1  # goes up when the layout of the file changes


def pack_rng(
    state: dict,  # from `rng_state`
) -> dict:  # the same state as tensors, lists and numbers
    "Convert the state of the generators so that `weights_only=True` can read it"
    name, keys, pos, has_gauss, cached = state['numpy']
    return {**state, 'numpy': (name, torch.from_numpy(keys.astype('int64')), pos, has_gauss, cached)}


def unpack_rng(
    state: dict,  # from `pack_rng`
) -> dict:  # for `set_rng_state`
    "Undo `pack_rng`"
    name, keys, pos, has_gauss, cached = state['numpy']
    version, internal, gauss = state['python']
    return {
        **state,
        'numpy': (name, keys.numpy().astype('uint32'), pos, has_gauss, cached),
        'python': (version, tuple(internal), gauss),
    }


# %% [markdown]
# ## Sealed files
#
# A disk or a network may change a bit, and PyTorch reads most files with a changed bit without a word: of 60
# it loaded 59. So the digest of all bytes goes into the file itself, as the comment that ends a zip file. Other
# programs read the file as before, and one without a comment (from an older version) is accepted.

# %%
#| export
LAST, PREVIOUS = 'last.pt', 'previous.pt'  # the newest checkpoint of a run, and the one before it
_END = b'PK\x05\x06'  # begins the last record of a zip file: 22 bytes, two of them the length of the comment
_MARK = b'sha256:'
_SEAL = len(_MARK) + 64


class Damaged(DataError):
    "A checkpoint that cannot be what was written"


def seal(
    buffer: io.BytesIO,  # a zip file without a comment, as `torch.save` writes it; gets one
) -> str:  # 64 hex digits
    "Append the SHA-256 of all bytes as the comment of the archive"
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
    buffer.seek(-2, io.SEEK_END)
    buffer.write(_SEAL.to_bytes(2, 'little') + _MARK + digest.encode())
    return digest


def read_seal(
    path,  # a file
) -> str:  # the digest; '' for a file without a seal: of an older version, or of another program
    "Compare a file with its seal; `Damaged` if its bytes are others than those that were written"
    with open(path, 'rb') as f:
        start, size = f.read(2), f.seek(0, io.SEEK_END)
        left = max(0, size - _SEAL - 2)
        f.seek(left)
        end = f.read()
        if _MARK not in end:
            if start != _END[:2] or (end[-22:-18] == _END and end[-2:] == b'\0\0'):
                return ''
            raise Damaged('its end is missing')
        f.seek(0)
        digest = hashlib.sha256()
        while left > 0 and (block := f.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
    digest.update(b'\0\0')
    if end != _SEAL.to_bytes(2, 'little') + _MARK + digest.hexdigest().encode():
        raise Damaged('its digest does not match')
    return digest.hexdigest()


# %%
#| hide
import tempfile

# %%
sealed, plain_file = Path(tempfile.mkdtemp()) / 'a.pt', io.BytesIO()
torch.save(dict(a=torch.arange(4)), plain_file)
seal(plain_file)
sealed.write_bytes(plain_file.getvalue())
assert torch.load(sealed, weights_only=True)['a'].tolist() == [0, 1, 2, 3] and len(read_seal(sealed)) == 64
found_bits = []
for at in range(0, len(plain_file.getvalue()), 37):
    bits = bytearray(plain_file.getvalue())
    bits[at] ^= 4
    sealed.write_bytes(bits)
    try:
        found_bits.append(bool(read_seal(sealed)) and False)
    except Damaged:
        found_bits.append(True)
assert all(found_bits)
f'{sum(found_bits)} of {len(found_bits)} changed bits are found'


# %% [markdown]
# ## Write and read

# %%
#| export
def save_checkpoint(
    path,  # file to write
    **state,  # tensors, state dicts and plain values
) -> str:  # digest of the file
    "Write all state in one atomic step: a crash while writing leaves the old file as it was"
    buffer = io.BytesIO()
    torch.save(dict(format=FORMAT, **state), buffer)
    digest = seal(buffer)
    atomic_write(path, buffer.getvalue())
    return digest


def is_out_of_memory(
    e,  # an exception
) -> bool:
    "Did memory run out, on a GPU or in main memory?"
    is_known = isinstance(e, MemoryError | torch.OutOfMemoryError)
    return is_known or "DefaultCPUAllocator: can't allocate" in str(e) or 'Cannot allocate memory' in str(e)


def load_checkpoint(
    path,  # file written by `save_checkpoint`, or a run's folder: its `last.pt`, if damaged `previous.pt`
    device='cpu',  # where the tensors go
) -> dict:  # the saved state, and `format`
    "Read a checkpoint without running code from it; `DataError` if the file is missing, damaged or foreign"
    path = Path(path)
    if path.is_dir():
        return _newest(path, device)
    if not path.is_file():
        raise DataError(f'{path}: no checkpoint here; give the folder of a run or a .pt file')
    try:
        read_seal(path)
        state = torch.load(path, map_location=device, weights_only=True)
    except OSError as e:
        raise DataError(f'{path}: cannot be read now ({e.strerror or e})') from None
    except Exception as e:
        if is_out_of_memory(e):
            raise
        why = (str(e) or type(e).__name__).splitlines()[0][:100]
        raise Damaged(
            f'{path}: not readable as a checkpoint ({why}); the file is damaged or from another program'
        ) from e
    if not isinstance(state, dict) or 'format' not in state:
        raise Damaged(f'{path}: holds no semidetr checkpoint; it was written by another program')
    if not isinstance(state['format'], int) or state['format'] > FORMAT:
        newer = f"format {state['format']}, this one reads {FORMAT}"
        raise DataError(f'{path}: written by a newer semidetr ({newer}); upgrade')
    return state


def _newest(folder, device):
    "The newest checkpoint of a run that can be read"
    try:
        return load_checkpoint(folder / LAST, device)
    except Damaged as e:
        if not (folder / PREVIOUS).is_file():
            raise
        state, fault = load_checkpoint(folder / PREVIOUS, device), e
    tell([f"{fault}; {PREVIOUS} is used, of iteration {state.get('step')}"])
    return state


# %%
#| export
def load_weights(
    model,  # nn.Module
    state: dict,  # state dict with the same names and shapes
    origin='',  # file or folder to name in the error
):
    "Load weights strictly; a one-line `DataError` lists the tensors that do not fit"
    own = model.state_dict()
    mismatches = {
        'missing': sorted(set(own) - set(state)),
        'not known': sorted(set(state) - set(own)),
        'of another shape': [k for k in own if k in state and own[k].shape != state[k].shape],
    }
    faults = [f'{len(names)} {kind} (first: {names[0]})' for kind, names in mismatches.items() if names]
    if faults:
        raise DataError(
            f'{origin}: weights do not fit this model: {", ".join(faults)}; '
            'use the configuration it was trained with'
        )
    model.load_state_dict(state)


# %% [markdown]
# ## Start from another run
#
# With `run.init` a new run starts from the weights of another one: both networks from one of its two, and
# classes by name (@eq-weights-rows), since the data may have others, or the same in another order. Optimiser
# and random state stay those of a new run. A learned suppressor (@sec-suppressor) that the other run did not
# have starts untrained, a parallel group or second class head (@sec-group) with copies of the trained heads. An import of the official Semi-DETR (@sec-imports) starts student, teacher and projector
# each from its own weights. From an import of a backbone they take the backbone alone; the rest is what the seed
# of the run makes it.

# %%
#| export
def start_from(
    run,  # with cfg, data, student, teacher and method, all built
    path,  # folder of another run, or its .pt file
):
    "Start a new run from the weights of another one; one warning of one line for each thing that differs"
    saved, classes = load_checkpoint(path), list(run.data.classes)
    if is_backbone_alone(saved):
        return _start_backbone(run, saved['student'], path)
    is_pair = saved.get('imported', {}).get('pair', False)
    fresh, notes = run.student.state_dict(), []
    fresh = {k: v.clone() for k, v in fresh.items()} if list(saved['classes']) != classes else fresh
    for name in ('student', 'teacher'):
        source = name if is_pair else run.cfg.run.init_from
        state = _without_parts(saved[source], fresh)
        state, notes = map_class_rows(state, saved['classes'], classes, fresh)
        load_weights(getattr(run, name), _with_parts(state, fresh), path)
        start_parallel(getattr(run, name), [p for p in _new_parts(state, fresh) if p != 'suppressor'])
    notes = notes + _about_parts(saved[source], fresh)
    if is_pair:
        notes += _start_projector(run.method, saved['parts'], path)
    for note in notes if is_main() else []:
        warnings.warn(f'{path}: {note}', stacklevel=3)


def is_backbone_alone(
    saved: dict,  # content of a checkpoint
) -> bool:
    "Does it come from a backbone, with a detector around it that nobody trained?"
    return saved.get('imported', {}).get('kind') == 'backbone'


def _start_backbone(run, state, path):
    "Load the backbone alone into both networks; the rest stays as the run's seed made it"
    weights = {k.removeprefix('backbone.'): v for k, v in state.items() if k.startswith('backbone.')}
    for network in (run.student, run.teacher):
        own = network.backbone.state_dict()
        counters = {k: v for k, v in own.items() if k.endswith('num_batches_tracked')}
        load_weights(network.backbone, counters | weights, path)
    if is_main():
        what = (
            f'a backbone alone: its {len(weights)} tensors are loaded, the rest of the detector is untrained'
        )
        warnings.warn(f'{path}: {what}', stacklevel=4)


# %%
#| export
_PARTS = dict(suppressor='suppressor', group='parallel group', second_head='second class head')


def _new_parts(state, fresh):
    "Names of the parts in `_PARTS` that the network `fresh` has, but not the weights"
    has = [{p for p in _PARTS if any(k.startswith(f'{p}.') for k in w)} for w in (state, fresh)]
    return [p for p in _PARTS if p in has[1] - has[0]]


def _without_parts(state, fresh):
    "Weights without the parts in `_PARTS` that the network `fresh` does not have"
    old = tuple(f'{p}.' for p in _new_parts(fresh, state))
    return {k: v for k, v in state.items() if not k.startswith(old)} if old else state


def _with_parts(state, fresh):
    "Weights with those parts of the network `fresh`, untrained, that they do not have"
    new = tuple(f'{p}.' for p in _new_parts(state, fresh))
    return {k: v.detach().clone() for k, v in fresh.items() if new and k.startswith(new)} | state


def _about_parts(state, fresh):
    "A sentence for each part in `_PARTS` that only one of the two has"
    start = dict.fromkeys(_PARTS, 'starts from copies of the trained heads') | dict(
        suppressor='starts untrained'
    )
    new, old = _new_parts(state, fresh), _new_parts(fresh, state)
    notes = [f'these weights have no {_PARTS[p]}; that of this run {start[p]}' for p in new]
    return notes + [f'this run has no {_PARTS[p]}; that of the weights is not used' for p in old]


# %%
with_one = {'layer.weight': torch.ones(1), 'suppressor.weight': torch.zeros(1)}
without = {'layer.weight': torch.full((1,), 2.0)}
assert _with_parts(without, with_one) == with_one | without
assert _without_parts(with_one, without).keys() == without.keys()
assert _with_parts(with_one, with_one) == _without_parts(with_one, with_one) == with_one
_about_parts(without, with_one), _about_parts(with_one, without)


# %%
#| export
def _start_projector(method, parts, path):
    "Load what a method trains beside the networks; sentences about what is not used"
    own = method.state_dict()
    if not any(k.startswith('projector.') for k in own):
        return ['the method of this run has no projector; that of the weights is not used']
    for name, value in parts.items():
        if name not in own or own[name].shape != value.shape:
            raise DataError(
                f'{path}: {name} does not fit the projector of this run; set consistency.hidden='
                f"{len(parts['projector.fc1.bias'])} and consistency.projector=code"
            )
    method.load_state_dict(own | parts)
    return []


# %% [markdown]
# ## What a run writes
#
# The folder of a run holds `run.json` (the resolved configuration, versions, commit, data fingerprint, times,
# metrics), `log.jsonl` (one line every `log_every` iterations), `last.pt` (all state), `previous.pt` (the same,
# one checkpoint earlier), `best.pt` (the weights
# that scored best on the development part, if it is evaluated during training), events of TensorBoard
# (@sec-loggers) and, at the end, a model card (@sec-card).
# Reports read `run.json` and `log.jsonl` only.

# %%
#| export
WRITTEN = ('nbs/ablations/results', 'nbs/ablations/runs')  # runs write here: no change of the code


def git_commit(
    package,  # folder of the package
) -> str | None:  # first 12 digits; None if the folder is not in a checkout of this project
    "Commit of the checkout, with `-dirty` if tracked files other than results have changed since"

    def git(*args):
        done = subprocess.run(
            ['git', *args], cwd=package, capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        if Path(git('rev-parse', '--show-toplevel')).resolve() != Path(package).resolve().parent:
            return None
        but_results = [f':(top,exclude){folder}' for folder in WRITTEN]
        changed = git('status', '--porcelain', '--untracked-files=no', '--', ':/', *but_results)
        return git('rev-parse', '--short=12', 'HEAD') + ('-dirty' if changed else '')
    except (OSError, subprocess.SubprocessError):
        return None


def environment() -> dict:  # plain values for run.json
    "Versions, commit and machine of this run"
    import numpy
    import torchvision
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
    own = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + (children.ru_utime + children.ru_stime)


def peak_memory_mb() -> float:
    "Largest resident memory of this process so far, in MB"
    per_mb = 1024**2 if sys.platform == 'darwin' else 1024  # macOS counts bytes, Linux kB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / per_mb


# %%
#| export
class RunLog:
    "log.jsonl and loggers of the main process; on resuming, lines later than the checkpoint are dropped"

    def __init__(
        self,
        folder,  # of the run
        step: int = 0,  # finished iterations
        loggers=(),  # subclasses of `Logger`, beside TensorBoard
        settings: dict | None = None,  # name -> value, for them
    ):
        self.path = Path(folder) / 'log.jsonl'
        self.loggers = None
        if not is_main():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows, bad = read_rows(self.path) if self.path.exists() else ([], [])
        if bad[1:] or (bad and rows and bad[0] <= len(rows)):  # a crash may have cut the last line
            warnings.warn(
                f'{self.path}: {len(bad)} lines are damaged and left out, the first is line {bad[0]}'
            )
        atomic_write(self.path, ''.join(json.dumps(r) + '\n' for r in rows if r['step'] <= step))
        self.loggers = Loggers((TensorBoard, *loggers), self.path.parent, step, settings or {})

    def write(
        self,
        row: dict,  # names and plain values; `step` counts finished iterations
    ):
        "Append one line; numbers also go to the loggers"
        if not is_main():
            return
        with self.path.open('a') as f:
            f.write(json.dumps(row) + '\n')
        self.loggers.write(row)

    def results(
        self,
        metrics: dict,  # part -> network -> name -> number, of run.json
        step: int,  # finished iterations
    ):
        "Metrics of the end go to the loggers, as `val/teacher/AP`; log.jsonl is about the training"
        if is_main():
            rows = {(part, who): m for part, networks in metrics.items() for who, m in networks.items()}
            named = {f'{part}/{who}/{k}': v for (part, who), m in rows.items() for k, v in m.items()}
            self.loggers.write(named | dict(step=step))

    def close(self):
        "Close the loggers"
        if self.loggers is not None:
            self.loggers.close()


# %% [markdown]
# ## Resuming exactly
#
# Ten random draws, a checkpoint, five more draws. Restored from the file, in any later process, the
# generators give the same five:

# %%
#| hide
import random
import numpy as np
import matplotlib.pyplot as plt
from semidetr.core import rng_state, seed_everything, set_rng_state


# %%
def draw():
    "One number from each generator"
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


seed_everything(3)
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
#| fig-cap: "Restoring the weights alone continues with other random numbers (grey); restoring all state continues the same sequence (orange on blue)."
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
ax.legend(fontsize=9)
plt.show()

# %% [markdown]
# A damaged file, a missing one and weights of another model each raise an error of one line:

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
# - One file holds all state; it is written atomically and read without running code from it.
# - The random states of Python, NumPy and torch are part of it.
# - Loading is strict; the error names the tensors that do not fit.
# - `run.json` and `log.jsonl` are what pages and readers use.
#
# ## Exercises
#
# 1. Moments, data position, random state: which of them, if lost, changes the rest of a run most?
# 2. Why is the temporary file in the same folder as the checkpoint?
# 3. What can a malicious file do to `torch.load` without `weights_only=True`?
