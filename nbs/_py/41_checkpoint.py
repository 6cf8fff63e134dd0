# %% [markdown]
# # Checkpoints {#sec-checkpoint}
#
# > All state in, all state out: a run that was stopped goes on as if nothing had happened.
#
# A checkpoint that forgets the random state, or the position in the data, or the optimiser's moments, does not continue a run: it starts another one from the same weights. Everything random or counted is therefore in one file, and the file holds tensors and plain Python values only, so that it can be read without running any code from it.

# %%
#| default_exp checkpoint

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
FORMAT = 1 # raised when the layout of the file changes

def pack_rng(
    state:dict, # of `rng_state`
)->dict: # the same in tensors, lists and numbers
    "Make the generators' state readable with `weights_only=True`"
    name, keys, pos, has_gauss, cached = state['numpy']
    return {**state, 'numpy': (name, torch.from_numpy(keys.astype('int64')), pos, has_gauss, cached)}

def unpack_rng(
    state:dict, # of `pack_rng`
)->dict: # for `set_rng_state`
    "Undo `pack_rng`"
    name, keys, pos, has_gauss, cached = state['numpy']
    version, internal, gauss = state['python']
    return {**state, 'numpy': (name, keys.numpy().astype('uint32'), pos, has_gauss, cached),
            'python': (version, tuple(internal), gauss)}


# %%
#| export
def save_checkpoint(
    path, # file
    **state, # tensors, state dicts and plain values
):
    "Write all state at once: a crash while writing leaves the old file as it was"
    buffer = io.BytesIO()
    torch.save(dict(format=FORMAT, **state), buffer)
    atomic_write(path, buffer.getvalue())

def load_checkpoint(
    path, # file written by `save_checkpoint`, or a run's folder (its `last.pt`)
    device='cpu',
)->dict:
    "Read a checkpoint without running code from it; a DataError says what is wrong with the file"
    path = Path(path)
    if path.is_dir(): path = path/'last.pt'
    if not path.is_file(): raise DataError(f'{path}: no checkpoint here; give the folder of a run or a .pt file')
    try: state = torch.load(path, map_location=device, weights_only=True)
    except Exception as e: raise DataError(f'{path}: not readable as a checkpoint ({str(e).splitlines()[0][:100]}); the file is damaged or from another program') from e
    if not isinstance(state, dict) or 'format' not in state:
        raise DataError(f'{path}: holds no semidetr checkpoint; it was written by another program')
    if state['format'] > FORMAT: raise DataError(f"{path}: written by a newer semidetr (format {state['format']}, this one reads {FORMAT}); upgrade")
    return state


# %%
#| export
def load_weights(
    model, # nn.Module
    state:dict, # its state dict
    origin='', # named in the error
):
    "Strict loading whose error says which tensors differ, in one line"
    own = model.state_dict()
    missing, extra = sorted(set(own)-set(state)), sorted(set(state)-set(own))
    shape = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or extra or shape:
        parts = [f'{len(v)} {what} (first: {v[0]})' for v, what in ((missing, 'missing'), (extra, 'not known'), (shape, 'of another shape')) if v]
        raise DataError(f'{origin}: weights do not fit this model: {", ".join(parts)}; use the configuration it was trained with')
    model.load_state_dict(state)


# %% [markdown]
# ## What a run writes
#
# A run's folder holds `run.json` (the resolved configuration, versions, commit, data fingerprint, times, metrics), `log.jsonl` (a line every `log_every` iterations), `last.pt` (all state) and TensorBoard events. Reports read `run.json` and `log.jsonl` and nothing else.

# %%
#| export
def environment()->dict: # plain values for run.json
    "Versions, machine and commit of this run"
    import numpy, torchvision
    from semidetr import __version__
    here = Path(sys.modules['semidetr'].__file__).parent
    try: commit = subprocess.run(['git', 'describe', '--always', '--dirty', '--abbrev=12'], cwd=here, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError): commit = ''
    return dict(versions=dict(semidetr=__version__, torch=torch.__version__, torchvision=torchvision.__version__,
                              numpy=numpy.__version__, python=platform.python_version()),
                commit=commit or None, machine=platform.machine(), cores=os.cpu_count(),
                threads=torch.get_num_threads(), processes=world_size())

def cpu_seconds()->float:
    "CPU time of this process and of its finished children"
    return sum(r.ru_utime+r.ru_stime for r in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))

def peak_memory_mb()->float:
    "Largest resident size of this process so far, MB"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(1024**2 if sys.platform == 'darwin' else 1024)


# %%
#| export
class RunLog:
    "log.jsonl and TensorBoard of the main process; what was logged after the checkpoint of a resumed run is dropped"
    def __init__(self,
        folder, # of the run
        step:int=0, # iterations done
    ):
        self.path, self.board = Path(folder)/'log.jsonl', None
        if not is_main(): return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = self.path.read_text().splitlines() if self.path.exists() else []
        atomic_write(self.path, ''.join(r+'\n' for r in rows if json.loads(r)['step'] <= step))
        from torch.utils.tensorboard import SummaryWriter
        self.board = SummaryWriter(str(self.path.parent), purge_step=step)

    def write(self, row:dict):
        "One line; `step` counts finished iterations"
        if not is_main(): return
        with self.path.open('a') as f: f.write(json.dumps(row)+'\n')
        for k, v in row.items():
            if isinstance(v, (int, float)) and k != 'step': self.board.add_scalar(k, v, row['step'])

    def close(self):
        if self.board is not None: self.board.close()
