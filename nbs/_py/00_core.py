# %% [markdown]
# # Core {#sec-core}
#
# > Seeds, devices, errors and processes: what every other chapter leans on.

# %%
#| default_exp core

# %%
#| export
import difflib
import hashlib
import os
import random
from pathlib import Path
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


# %% [markdown]
# ## Errors that name the cure

# %%
#| export
class SemiDETRError(Exception):
    "Base of the errors that a user can cure: the message names the file, the item and the cure, in one line"

class DataError(SemiDETRError):
    "Something in a data set: an image, a box, an annotation file, a split"

class ConfigError(SemiDETRError):
    "Something in a configuration: an unknown key, a value out of range"

def suggest(
    word:str, # what was written
    known, # iterable of what may be written
)->str: # sentence to append to an error message
    "The nearest known word, or the list of them all"
    known = sorted(map(str, known))
    near = difflib.get_close_matches(str(word), known, n=1, cutoff=.6)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"


# %%
#| export
def atomic_write(
    path, # file to write
    data:str|bytes, # its whole content
):
    "Write a file so that a reader, or a crash, sees the old content or the new one and nothing between"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        tmp.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(tmp, path)
    finally: tmp.unlink(missing_ok=True)


# %% [markdown]
# ## Chance

# %%
#| export
def stable_hash(
    *parts, # ints, strings, tuples: anything whose `repr` is the same on every machine
)->int: # in [0, 2**63)
    "A hash that does not change with the machine, the Python version or the process"
    text = '\x1f'.join(repr(p) for p in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], 'big') >> 1

def seed_everything(
    seed:int, # seeds Python, NumPy and torch (all devices)
):
    "Seed every generator that the package draws from"
    random.seed(seed); np.random.seed(seed % 2**32); torch.manual_seed(seed)

def rng_state()->dict: # picklable
    "Snapshot of all generators of this process"
    state = dict(python=random.getstate(), numpy=np.random.get_state(), torch=torch.get_rng_state())
    if torch.cuda.is_available(): state['cuda'] = torch.cuda.get_rng_state_all()
    return state

def set_rng_state(
    state:dict, # from `rng_state`
):
    "Put all generators back where the snapshot found them"
    random.setstate(state['python']); np.random.set_state(state['numpy']); torch.set_rng_state(state['torch'].cpu())
    if 'cuda' in state and torch.cuda.is_available(): torch.cuda.set_rng_state_all([s.cpu() for s in state['cuda']])


# %% [markdown]
# ## Device and processes

# %%
#| export
def pick_device(
    name:str='auto', # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
)->torch.device:
    "The device to run on; `auto` takes a GPU where there is one"
    if name == 'auto': name = 'cuda' if torch.cuda.is_available() else 'cpu'
    try: dev = torch.device(name)
    except RuntimeError: raise ConfigError(f"device '{name}' is not one that torch knows; use auto, cpu, cuda or cuda:N") from None
    if dev.type == 'cuda':
        if not torch.cuda.is_available(): raise ConfigError(f"device '{name}' was asked for, but torch sees no GPU; use --device cpu")
        dev = torch.device('cuda', int(os.environ.get('LOCAL_RANK', 0)) if dev.index is None else dev.index)
        torch.cuda.set_device(dev)
    return dev


# %%
#| export
def _distributed(): return dist.is_available() and dist.is_initialized()

def world_size()->int:
    "Number of processes that train together; 1 without torch.distributed"
    return dist.get_world_size() if _distributed() else 1

def rank()->int:
    "Number of this process among them"
    return dist.get_rank() if _distributed() else 0

def is_main()->bool:
    "True in the one process that writes files"
    return rank() == 0


# %%
#| export
def all_reduce_mean(
    x:Tensor, # any shape; the same on every process
)->Tensor: # mean over the processes, detached
    "Mean over all processes; the identity on one"
    if world_size() == 1: return x.detach()
    x = x.detach().clone()
    dist.all_reduce(x)
    return x/world_size()

def all_gather_cat(
    x:Tensor, # (n, ...); n may differ from process to process and may be 0
)->Tensor: # (sum of n, ...), in the order of the ranks, detached
    "Rows of all processes; the identity on one"
    x = x.detach()
    if world_size() == 1: return x
    n = torch.tensor([len(x)], device=x.device)
    counts = [torch.zeros_like(n) for _ in range(world_size())]
    dist.all_gather(counts, n)
    counts = [int(c) for c in counts]
    padded = x.new_zeros((max(counts), *x.shape[1:])); padded[:len(x)] = x
    parts = [torch.zeros_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([p[:c] for p, c in zip(parts, counts)])
