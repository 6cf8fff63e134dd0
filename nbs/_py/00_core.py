# %% [markdown]
# # Core {#sec-core}
#
# > Make runs that can be repeated, stopped and resumed, on one process or many.

# %%
#| default_exp core

# %%
#| export
import difflib
import hashlib
import math
import os
import random
import re
import warnings
from importlib import import_module
from pathlib import Path
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

# %%
import pickle
import tempfile
from types import SimpleNamespace
import matplotlib.pyplot as plt
from semidetr.draw import COLORS

# %% [markdown]
# ## Why
#
# Results of semi-supervised detection are hard to reproduce: they depend on which 1 % of the images was
# labelled, on the order of the batches and on where a run was resumed. Three rules solve most of this. What
# must be the same everywhere (which images are labelled, the seed of a view) is a *hash*, not a random draw.
# What is drawn comes from generators whose state is part of the checkpoint. And files are written completely
# or not at all. This chapter implements these rules; nothing in it is about detection.

# %% [markdown]
# ## Errors that say how to fix them
#
# A fault that the user can fix is a `SemiDETRError`: the command line prints its message in one line and
# exits with code 2. Everything else is a bug of the package and keeps its traceback.

# %%
#| export
_CONTROL = re.compile('[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]')


def printable(
    text: str,  # may hold names from files
) -> str:  # the same; control characters and broken Unicode as escapes
    "One line that a terminal can show"
    text = ' '.join(line.strip() for line in text.splitlines()) if len(text.splitlines()) > 1 else text
    return _CONTROL.sub(lambda c: c[0].encode('unicode_escape').decode(), text)


class SemiDETRError(Exception):
    "Base of the errors that a user can fix: the message names file, item and cure in one line"

    def __str__(self):
        text = printable(super().__str__())
        return text if len(text) <= 2000 else f'{text[:1200]} ... {text[-700:]}'  # a name may fill a page


class DataError(SemiDETRError):
    "Something in a data set: an image, a box, an annotation file, a split"


class MissingSplit(DataError):
    "A data set has no split of this name, which for validation and test is no fault"


class ConfigError(SemiDETRError):
    "Something in a configuration: an unknown key, a value out of range"


class Note(UserWarning):
    "What was changed, left out or assumed: a line for the user, no fault"


def tell(
    lines,  # iterable of sentences
    most: int = 8,  # lines; the rest is counted
):
    "Each different line once as a `Note`, in the first of several processes; commands print `note: ...`"
    lines = list(dict.fromkeys(lines)) if rank() == 0 else []
    if len(lines) > most:
        lines[most - 1 :] = [f'{len(lines) - most + 1} more notes; `semidetr doctor` shows those of the data']
    for text in lines:
        warnings.warn(text, Note, stacklevel=3)


def suggest(
    word: str,  # what was written
    known,  # iterable of what may be written
    before: str = '',  # what stands before the word, such as its group
) -> str:  # sentence to append to an error message
    "The most similar known word, or the list of all"
    known = sorted(map(str, known))
    near = difflib.get_close_matches(str(word), known, n=1, cutoff=0.6)
    return f"did you mean '{before}{near[0]}'?" if near else f"known: {', '.join(known)}"


def need(
    module: str,  # one that comes with an extra of this package
    user: str,  # what needs it, for the message
    extra: str = 'book',  # name of the extra
):  # the module
    "Import an optional module; the `ConfigError` says what to install"
    try:
        return import_module(module)
    except ImportError as e:
        raise ConfigError(
            f"{user} needs '{e.name}', which comes with the extra [{extra}]: pip install 'semidetr[{extra}]'"
        ) from None


def one_of(
    group: str,  # name of the group of settings, for the message
    cfg,  # has the fields
    **known,  # field -> its allowed values
):
    "`ConfigError` unless each named field of `cfg` has one of its allowed values"
    for name, values in known.items():
        if (v := getattr(cfg, name)) not in values:
            raise ConfigError(f"{group}.{name}='{v}' is unknown; {suggest(v, values)}")


def in_range(
    group: str,  # name of the group of settings, for the message
    cfg,  # has the fields
    **ranges,  # field -> smallest allowed number, or (smallest, largest)
):
    "`ConfigError` unless each named field of `cfg` is None or lies in its range; nan never does"
    for name, r in ranges.items():
        low, high = r if isinstance(r, tuple) else (r, math.inf)
        if (v := getattr(cfg, name)) is not None and not low <= v <= high:
            wanted = f'be at least {low}' if high == math.inf else f'lie between {low} and {high}'
            raise ConfigError(f'{group}.{name}={v} must {wanted}')


# %% [markdown]
# A typo is answered by the most similar word, an unknown word by the list, a number out of range by the
# range:

# %%
assert suggest('trheshold', ['threshold', 'decay']) == "did you mean 'threshold'?"
try:
    raise ConfigError(f"unknown key 'speed'; {suggest('speed', ['threshold', 'decay'])}")
except SemiDETRError as e:
    message = str(e)
try:
    in_range('photo', SimpleNamespace(side=96, zoom=3), side=1, zoom=(0, 1))
except SemiDETRError as e:
    bound = str(e)
assert bound == 'photo.zoom=3 must lie between 0 and 1'
message, bound


# %% [markdown]
# ## Files that are complete
#
# A run may be stopped at any moment, and a page may read a result while it is written. So every file is
# written beside its target, flushed to disk and then renamed: within one folder a rename is atomic.

# %%
#| export
def atomic_write(
    path,  # file to write; missing folders are made
    data: str | bytes,  # its whole content; text is written as UTF-8
):
    "Write a file so that readers, also after a crash, find either the old content or the new one"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        with open(tmp, 'wb') as f:
            f.write(data.encode() if isinstance(data, str) else data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def writable_place(
    path,  # where results go; it need not exist
    option: str = 'out',  # name of the option, for the message
    folder: bool = True,  # is it a folder, or a file?
) -> Path:
    "The path, if results can be written there, else a `DataError`; nothing is created"
    path = Path(path)
    if path.exists() and path.is_dir() != folder:
        raise DataError(f"{path}: is {'a file' if folder else 'a folder'}; choose another {option}")
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if there.is_file() and there != path:
        raise DataError(f'{there}: is a file, so {path} cannot be made; choose another {option}')
    if not os.access(there, os.W_OK):
        raise DataError(f'{there}: no permission to write; choose another {option}')
    return path


# %% [markdown]
# A write that fails (here because the content has the wrong type) leaves the old file and no temporary one:

# %%
with tempfile.TemporaryDirectory() as d:
    target = Path(d) / 'runs' / 'run.json'
    atomic_write(target, '{"AP": 30.5}')
    try:
        atomic_write(target, 30.5)
    except TypeError:
        pass
    left = {p.name: p.read_text() for p in target.parent.iterdir()}
    try:
        writable_place(target)
    except DataError as e:
        assert 'is a file; choose another out' in str(e)
assert left == {'run.json': '{"AP": 30.5}'}
left


# %% [markdown]
# ## Choices by hash
#
# Let $p_1,\dots,p_n$ be the parts that a choice depends on: a seed, a fold, an image id. Their hash is
#
# $$ h(p_1,\dots,p_n) = \left\lfloor \tfrac12\, \mathrm{SHA256}_{64}\big(r(p_1)\,|\,\dots\,|\,r(p_n)\big) \right\rfloor \in [0, 2^{63}) $$ {#eq-core-hash}
#
# where $r(p)$ is the text that Python prints for $p$, the bar is a separator that no printed text contains,
# and $\mathrm{SHA256}_{64}$ are the first 64 bits of the digest. Python's own `hash` differs between
# processes; a random generator depends on all draws before; $h$ depends on its parts alone. Objects whose
# text is not stable (one that prints its address, a tensor that prints rounded numbers) are refused.

# %%
#| export
def _stable_repr(p):
    "Text of a part; the same with NumPy 1 and 2, refused where it would not be stable"
    if isinstance(p, np.generic):
        p = p.item()
    if isinstance(p, (tuple, list)):
        return f"({','.join(map(_stable_repr, p))})"
    if isinstance(p, (Tensor, np.ndarray)) or ' at 0x' in repr(p):
        raise TypeError(
            f'stable_hash cannot hash a {type(p).__name__}: its text is not the same everywhere; '
            'pass ints, floats, strings or tuples of them'
        )
    return repr(p)


def stable_hash(
    *parts,  # ints, floats, strings, or tuples of them
) -> int:  # in [0, 2**63)
    "A hash that does not change with the machine, the Python version or the process (@eq-core-hash)"
    text = '\x1f'.join(map(_stable_repr, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], 'big') >> 1


# %% [markdown]
# The number below is the same on every computer; a test checks it. The type matters: image `7` and image
# `'7'` are two images.

# %%
assert stable_hash('fold', 0) == stable_hash('fold', np.int64(0)) < 2**63
assert stable_hash(7) != stable_hash('7') and stable_hash('a', 'b') != stable_hash('ab')
stable_hash('fold', 0)

# %% [markdown]
# An application: rank the images by $h(\text{seed}, \text{fold}, \text{id})$ and label the first $p$ percent.
# The order does not depend on how many are taken, so the 1 % are contained in the 5 %, and those in the 10 %;
# another fold is another order; and adding an image to the data set does not change the order of the others.

# %%
#| label: fig-core-hash
#| fig-cap: "The labelled images of 1, 5 and 10 % are nested within a fold and spread evenly over the ids: a hash is as good as a random draw, and reproducible."
#| fig-alt: "For three folds, three rows of marks each over image ids 0 to 199; every mark of the 1 % row is also in the 5 % row, every mark of the 5 % row in the 10 % row."
fig, ax = plt.subplots(figsize=(5.5, 2.2), dpi=80)
chosen = {}
for fold in range(3):
    order = sorted(range(200), key=lambda i: stable_hash(0, fold, i))
    for k, percent in enumerate((1, 5, 10)):
        ids = chosen[fold, percent] = set(order[: 200 * percent // 100])
        style = dict(ms=9, mew=2, color=COLORS['truth'], alpha=1 - 0.3 * k)
        ax.plot(sorted(ids), [4 * fold + k] * len(ids), '|', **style)
ax.set(xlabel='image id', yticks=[4 * f + k for f in range(3) for k in range(3)])
ax.invert_yaxis()
ax.set_yticklabels([f'fold {f}, {p} %' for f in range(3) for p in (1, 5, 10)], fontsize=9)
for fold in range(3):
    assert chosen[fold, 1] <= chosen[fold, 5] <= chosen[fold, 10]
assert chosen[0, 10] != chosen[1, 10]


# %% [markdown]
# ## Random generators that can be resumed
#
# The rest (dropout, the noise of denoising queries, initial weights) is drawn. A resumed run must draw the
# same numbers as an uninterrupted one.

# %%
#| export
def seed_everything(
    seed: int,  # any non-negative int; seeds Python, NumPy and torch (all devices)
):
    "Seed every generator that the package draws from"
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict:  # picklable
    "State of all generators of this process"
    state = dict(python=random.getstate(), numpy=np.random.get_state(), torch=torch.get_rng_state())
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(
    state: dict,  # from `rng_state`
):
    "Set all generators to a saved state"
    random.setstate(state['python'])
    np.random.set_state(state['numpy'])
    torch.set_rng_state(state['torch'].cpu())
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state['cuda']])


# %% [markdown]
# Draw, save the state, draw again; restore the state (pickled, as in a checkpoint) and repeat the draw:

# %%
def draws():
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


seed_everything(0)
before = draws()
snapshot = pickle.dumps(rng_state())
first = draws()
set_rng_state(pickle.loads(snapshot))
again = draws()
assert again == first != before
again


# %% [markdown]
# ## The device

# %%
#| export
def pick_device(
    name: str = 'auto',  # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
) -> torch.device:
    "The device to run on; `auto` takes a GPU if there is one; `ConfigError` if the device is not there"
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        dev = torch.device(name)
    except RuntimeError:
        raise ConfigError(
            f"device '{name}' is not one that torch knows; use auto, cpu, cuda or cuda:N"
        ) from None
    if dev.type == 'cuda':
        if not torch.cuda.is_available():
            raise ConfigError(f"device '{name}' was asked for, but torch sees no GPU; use --device cpu")
        dev = torch.device('cuda', int(os.environ.get('LOCAL_RANK', 0)) if dev.index is None else dev.index)
        if dev.index >= torch.cuda.device_count():
            raise ConfigError(
                f"device '{dev}' was asked for, but torch sees {torch.cuda.device_count()} GPU(s); "
                'count from cuda:0'
            )
        torch.cuda.set_device(dev)
        return dev
    try:
        torch.zeros(1, device=dev).item()
    except Exception as e:
        why = (str(e).splitlines() or [type(e).__name__])[0][:80]
        raise ConfigError(f"device '{name}' does not work here ({why}); use auto, cpu or cuda") from None
    return dev


# %%
try:
    pick_device('gpu')
except ConfigError as e:
    answer = str(e)
assert pick_device('cpu').type == 'cpu' and pick_device().type in ('cpu', 'cuda')
answer


# %% [markdown]
# Half precision is sufficient for the network, but not for costs, boxes and losses. Those are computed in
# float32 at least, whatever the input is:

# %%
#| export
def at_least_float32(
    x: Tensor,  # any floating dtype
) -> Tensor:  # float32 where `x` is half precision, else `x` itself
    "`x` in a precision that costs, box maths and losses can be computed in"
    return x.to(torch.promote_types(x.dtype, torch.float32))


# %%
assert at_least_float32(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
at_least_float32(torch.ones(1, dtype=torch.bfloat16)).dtype


# %% [markdown]
# ## One process or many
#
# A launcher may start $W$ processes, one per device, each with its own images. Every function below is the
# identity in a single process, so that no other chapter needs to check how many there are. With
# `torchrun --max-restarts 3` the processes are started again when one has ended; they meet under another name,
# since under the old one they would find addresses at which nobody listens.

# %%
#| export
def _distributed():
    return dist.is_available() and dist.is_initialized()


def start_processes():
    "Join the process group that torchrun describes; nothing to do for a single process"
    env, world = os.environ, int(os.environ.get('WORLD_SIZE', 1))
    if world == 1 or dist.is_initialized():
        return
    place, again = {}, env.get('TORCHELASTIC_RESTART_COUNT', '0')
    is_kept = env.get('TORCHELASTIC_USE_AGENT_STORE') == 'True' and env.get('LOCAL_WORLD_SIZE') == str(world)
    if (
        again != '0' and is_kept
    ):  # the store of the launcher still holds the addresses of those that have ended
        store = dist.TCPStore(env['MASTER_ADDR'], int(env['MASTER_PORT']), is_master=False)
        place = dict(store=dist.PrefixStore(f'again {again}', store), rank=int(env['RANK']), world_size=world)
    dist.init_process_group('nccl' if torch.cuda.is_available() else 'gloo', **place)


def world_size() -> int:
    "Number of processes that train together; 1 without torch.distributed"
    return dist.get_world_size() if _distributed() else 1


def rank() -> int:
    "Number of this process among them"
    return dist.get_rank() if _distributed() else 0


def is_main() -> bool:
    "True in the one process that writes files"
    return rank() == 0


# %%
assert is_main() == (rank() == 0)
world_size(), rank(), is_main()


# %% [markdown]
# Losses are divided by the number of boxes, and every process must divide by the *same* number; otherwise a
# box would weigh more on a process with few boxes. With $x_w$ the count on process $w$,
#
# $$ \bar x = \frac1W \sum_{w=0}^{W-1} x_w $$ {#eq-core-mean}
#
# is that number: gradients are averaged over the $W$ processes afterwards, so that in total they are divided
# by the number of all boxes, $W\bar x$.

# %%
#| export
def all_reduce_mean(
    x: Tensor,  # any shape; the same on every process
) -> Tensor:  # mean over the processes, detached
    "Mean over all processes (@eq-core-mean); the identity on one"
    if world_size() == 1:
        return x.detach()
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / world_size()


# %%
assert all_reduce_mean(torch.tensor([3.0])).item() == 3
all_reduce_mean(torch.tensor([3.0], requires_grad=True))


# %% [markdown]
# Cost-based mining fits a mixture to the matching costs of *all* processes, which may have different numbers
# of them, or none. So the lengths are exchanged first, then the rows, padded to the longest, and the padding
# is removed. The result is the same on every process and in the order of the ranks.

# %%
#| export
def all_gather_cat(
    x: Tensor,  # (n, ...); n may differ from process to process and may be 0
) -> Tensor:  # (sum of n, ...), in the order of the ranks, detached
    "Rows of all processes; the identity on one"
    x = x.detach()
    if world_size() == 1:
        return x
    n = torch.tensor([len(x)], device=x.device)
    counts = [torch.zeros_like(n) for _ in range(world_size())]
    dist.all_gather(counts, n)
    counts = [int(c) for c in counts]
    if max(counts) == 0:
        return x
    padded = x.new_zeros((max(counts), *x.shape[1:]))
    padded[: len(x)] = x
    parts = [torch.zeros_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([p[:c] for p, c in zip(parts, counts)])


# %% [markdown]
# In a single process it returns its rows, even if there are none. (The tests run it in two processes with
# lengths 3 and 0.)

# %%
assert all_gather_cat(torch.zeros(0, 4)).shape == (0, 4)
all_gather_cat(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))

# %% [markdown]
# ## Summary
#
# * A fault that a user can fix is a `DataError` or a `ConfigError` of one line that says how.
# * `atomic_write` leaves either the old file or the new one.
# * What must be the same everywhere is a `stable_hash` of what it depends on; percentages of a hashed order
#   are nested.
# * Random draws can be resumed: `rng_state` goes into every checkpoint.
# * `all_reduce_mean` and `all_gather_cat` are the identity in a single process.
#
# ## Exercises
#
# 1. Rank the images by `random.Random(seed).shuffle` instead of by hash. What happens to the 1 % when ten
#    images join the data set?
# 2. Two processes have 1 and 9 boxes. What is the loss gradient of one box on each if every process divides
#    by its own count? And with @eq-core-mean?
# 3. Why must the temporary file of `atomic_write` lie in the folder of its target and not in `/tmp`?
