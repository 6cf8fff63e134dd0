# %% [markdown]
# # Generations of a run {#sec-generations}
#
# > Keep the last two whole checkpoints of a run, each one step of all its processes.
#
# With several processes a checkpoint is several files: the weights once, and from every process the random
# state that is its own. A run that is killed while they are written leaves files of different steps. A resume
# that mixes them is silent about it and gives numbers that no unbroken run has. So the main file, written
# last, names the digest of every other one (@sec-checkpoint). It is one *generation* with exactly these files.
# The generation before is kept: if the newest cannot be read, a run goes on from there and says so.

# %%
#| default_exp train.generations

# %%
#| export
import math
import os
import shutil
import time
import warnings
from pathlib import Path
import torch
from semidetr.core import all_gather_cat, is_main, rank, world_size
from semidetr.train.checkpoint import LAST, PREVIOUS, Damaged, load_checkpoint, read_seal, save_checkpoint


# %% [markdown]
# ## The files
#
# | file | written by | holds |
# | :--- | :--- | :--- |
# | `last.pt` | process 0 | weights, optimiser, its own random state; digests of the parts |
# | `last.rank1.pt`, ... | process 1, ... | the part: random state, health window, numbers since the last log line; with `optim.sharded` the moments of its share |
# | `previous.pt`, `previous.rank1.pt`, ... | | the generation before |
# | `next.pt`, `next.rank1.pt`, ... | | while they are written |
#
# The main file holds all moments, those of the parts too, so `optim.sharded` may be switched when a run continues.
#
# Files are renamed in an order that leaves a whole generation at every moment. A part is looked up by its
# digest, under whatever name it has. Only what belongs to the generation that the run goes on from becomes the
# previous one: a damaged `last.pt`, and parts that a killed process left there, are replaced and not kept.

# %%
#| export
def file_of(
    kind: str,  # 'last', 'previous' or 'next'
    number: int,  # of the process
) -> str:  # name in the folder of a run
    "Name of the file that a process writes"
    return f'{kind}.pt' if number == 0 else f'{kind}.rank{number}.pt'


def _gathered(digest, device):
    "Digests of all processes, '0...' for an empty one; nobody goes on before all have written"
    row = torch.tensor(list(bytes.fromhex(digest or '00' * 32)), dtype=torch.uint8, device=device)
    return [bytes(r.tolist()).hex() for r in all_gather_cat(row[None])]


def _keep(folder, number):
    "Make the last file of a process the previous one as well; a link, so the last one is never missing"
    last, previous = (folder / file_of(kind, number) for kind in ('last', 'previous'))
    between = previous.with_name(f'.{previous.name}.{os.getpid()}.tmp')
    if not last.exists():
        return
    between.unlink(missing_ok=True)
    try:
        os.link(last, between)
    except OSError:  # a file system without links
        shutil.copyfile(last, between)
    os.replace(between, previous)
    between.unlink(missing_ok=True)  # a rename between two names of one file leaves both


def _seal_of(path):
    "Digest of a file, None if it is damaged"
    try:
        return read_seal(path)
    except Damaged:
        return None


def _belongs(folder, number, digests):
    "Is the last part of a process the one with its digest? Another one is left over from a kill"
    path = folder / file_of('last', number)
    return number <= len(digests) and path.is_file() and _seal_of(path) == digests[number - 1]


# %%
#| export
def with_moments(
    folder: Path,  # of the run, where each other process has written its `next` file
    state: dict,  # of the main process
    world: int,  # processes
) -> dict:  # the same, with the moments of all parameters in the order of the parameters
    "Collect the moments that other processes keep (`optim.sharded`), as one process would have them"
    if not state.get('config', {}).get('optim', {}).get('sharded'):
        return state
    parts = [load_checkpoint(folder / file_of('next', number))['moments'] for number in range(1, world)]
    moments = sorted(item for part in (state['optimizer']['state'], *parts) for item in part.items())
    return state | dict(optimizer=state['optimizer'] | dict(state=dict(moments)))


def commit(
    folder: Path,  # of the run, where each other process has written its `next` file
    state: dict,  # of the main process
    digests: list,  # of the parts of process 1, 2, ...
    kept: list | None = (),  # digests of the parts of the generation in `last.pt`; None: it is not whole
):
    "Write the main file and make everything the last generation; called by the main process"
    state = with_moments(folder, state, 1 + len(digests))
    save_checkpoint(folder / file_of('next', 0), **state, ranks=list(digests), world=1 + len(digests))
    for number in (*range(1, len(digests) + 1), 0):
        if kept is not None and (not number or _belongs(folder, number, kept)):
            _keep(folder, number)
        if number:
            os.replace(folder / file_of('next', number), folder / file_of('last', number))
    os.replace(folder / file_of('next', 0), folder / LAST)


def save_generation(
    folder,  # of the run
    state: dict,  # what this process saves
    device='cpu',  # for the exchange of digests
    kept: list | None = (),  # of the generation in `last.pt`, as for `commit`
) -> list:  # digests of the parts, in the main process
    "Save one generation; every process calls it after the same step"
    folder, digest = Path(folder), ''
    if not is_main():
        digest = save_checkpoint(folder / file_of('next', rank()), **state)
    digests = _gathered(digest, device) if world_size() > 1 else []
    if is_main():
        commit(folder, state, digests[1:], kept)
    return digests[1:]


# %%
#| hide
import tempfile
import matplotlib.pyplot as plt

# %%
toy, before = Path(tempfile.mkdtemp()), []
for step in (10, 20, 30):
    part_digest = save_checkpoint(toy / 'next.rank1.pt', step=step, rng=step + 1)
    commit(toy, dict(step=step), [part_digest], before)
    before = [part_digest]
found = {p.name: load_checkpoint(p)['step'] for p in sorted(toy.iterdir())}
assert found == {'last.pt': 30, 'last.rank1.pt': 30, 'previous.pt': 20, 'previous.rank1.pt': 20}
found


# %% [markdown]
# ## Read a generation
#
# A part must have the digest that the main file names. Runs of older versions have no digests: there the step
# is compared, and a part of another step is not used.

# %%
#| export
def _part(folder, saved, number):
    "What a process saved beside the main file, None if the run had fewer processes then"
    digests = saved.get('ranks')
    if digests is None:
        return _old_part(folder / file_of('last', number), saved['step'])
    if number > len(digests):
        return None
    for kind in ('last', 'previous'):
        path = folder / file_of(kind, number)
        if path.is_file() and _seal_of(path) == digests[number - 1]:
            return load_checkpoint(path)
    raise Damaged(f'{folder}: the part of process {number} that belongs to iteration {saved["step"]} is gone')


def _old_part(path, step):
    "The part of a run of an older version, None if it is of another step"
    part = load_checkpoint(path) if path.is_file() else dict(step=None)
    if part['step'] == step:
        return part
    warnings.warn(f'{path}: not of iteration {step}; process {rank()} takes new random numbers')
    return None


def read_generation(
    folder,  # of the run
    name: str = LAST,  # or PREVIOUS
) -> tuple:  # (state of the main process, that of this one if it is another, or None)
    "Read what one step of all processes left; `Damaged` if that is not all there"
    folder = Path(folder)
    saved = load_checkpoint(folder / name)
    return saved, None if is_main() else _part(folder, saved, rank())


def read_parts(
    folder,  # of the run
    saved: dict,  # main file of a generation
) -> list:  # what process 1, 2, ... saved beside it
    "The parts of a generation; `Damaged` if one is missing"
    parts = [_part(Path(folder), saved, number) for number in range(1, 1 + len(saved.get('ranks', ())))]
    for number, part in enumerate(parts, 1):
        check_fields(part, Path(folder) / file_of('last', number), saved['step'], OWN)
    return parts


# %%
first, no_part = read_generation(toy)
assert first['step'] == 30 and first['world'] == 2 and no_part is None
first['ranks'][0][:12], read_generation(toy, PREVIOUS)[0]['step']

# %% [markdown]
# ## Fields
#
# A file with the right digest may still be of another program, or edited: `step` $10^9$ would count as a
# finished run, a missing field ends in a traceback. So names, types and ranges are compared before anything is
# used.

# %%
#| export
FIELDS = dict(  # of the main file
    config=dict,
    classes=list,
    split=str,
    step=int,
    student=dict,
    teacher=dict,
    optimizer=dict,
    scaler=dict,
    history=list,
    spent=dict,
    rng=dict,
    health=dict,
    recent=list,
)
# newer than the first checkpoints
OPTIONAL = dict(parts=dict, roles=dict, ranks=list, world=int, moments=dict, broken=list)
OWN = ('step', 'rng', 'health', 'recent')  # fields of a part


def _is(value, kind):
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def _number(value):
    "Is it a finite number that is not negative?"
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def check_fields(
    saved: dict,  # content of a file
    path,  # of the file, for the message
    iters: int | None = None,  # of the run: no step lies beyond; None: any
    names=tuple(FIELDS),  # fields that must be there
):
    "`Damaged` unless the fields of a checkpoint have the right names, types and ranges"
    for name, kind in (FIELDS | OPTIONAL).items():
        if name not in saved and name in names:
            raise Damaged(f"{path}: holds no '{name}'")
        if name in saved and not _is(saved[name], kind):
            raise Damaged(f"{path}: '{name}' is of type {type(saved[name]).__name__}, not {kind.__name__}")
    step, limit = saved['step'], math.inf if iters is None else iters
    if not 0 <= step <= limit:
        raise Damaged(f'{path}: step {step} does not lie between 0 and {limit}, the length of the run')
    for row in saved.get('history', ()):
        if not (isinstance(row, dict) and _is(row.get('step'), int) and 0 <= row['step'] <= step):
            raise Damaged(f"{path}: 'history' has an entry that is not of a step up to {step}")
    spent = saved.get('spent', dict(seconds=0.0, cpu=0.0))
    if set(spent) != {'seconds', 'cpu'} or not all(map(_number, spent.values())):
        raise Damaged(f"{path}: 'spent' holds other numbers than seconds and CPU-seconds")
    if not all(isinstance(row, dict) for row in saved.get('recent', ())):
        raise Damaged(f"{path}: 'recent' has an entry that is not the numbers of a step")


# %%
part_of_one = dict(step=7, rng={}, health={}, recent=[])
check_fields(part_of_one, 'a.pt', 10, OWN)
refused = []
for change in (dict(step=10**9), dict(step='7'), dict(rng=None), dict(recent=[3])):
    try:
        check_fields(part_of_one | change, 'a.pt', 10, OWN)
    except Damaged as e:
        refused.append(str(e))
assert len(refused) == 4
refused


# %% [markdown]
# ## After a failure
#
# When one process fails, the others wait for it in vain and then fail too. All stand after the same step,
# since none can finish a step without the others. So each writes its part without an exchange, and process 0
# collects them: if all parts are of its step, they are a generation; otherwise the last one counts.

# %%
#| export
def _written(folder, step, world):
    "Digests of the parts of this step, None if one is missing"
    digests = []
    for number in range(1, world):
        path = folder / file_of('next', number)
        if not path.is_file() or load_checkpoint(path)['step'] != step:
            return None
        digests.append(read_seal(path))
    return digests


def save_alone(
    folder,  # of the run
    state: dict,  # what this process saves
    seconds: float = 15.0,  # that process 0 waits for the others
    kept: list | None = (),  # of the generation in `last.pt`, as for `commit`
) -> bool:  # is this step saved? Known to process 0 alone
    """Save a generation without an exchange between processes: one of them has failed.

    Process 0 closes its connections first, so that the others stop waiting for it."""
    folder, end, world = Path(folder), time.monotonic() + seconds, world_size()
    if not is_main():
        save_checkpoint(folder / file_of('next', rank()), **state)
        return False
    if world > 1 and torch.distributed.get_backend() == 'gloo':
        torch.distributed.destroy_process_group()
    while (digests := _written(folder, state['step'], world)) is None:
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    commit(folder, state, digests, kept)
    return True


# %%
assert _written(toy, 30, 2) is None  # its part is a last one already
assert _written(toy, 30, 1) == []
save_alone(toy, dict(step=31)), load_checkpoint(toy)['step']


# %% [markdown]
# ## Killed at any moment
#
# The steps of `commit`, and a kill before each of them: which generation does a resume find? Under the
# assumption that a file is either written or not, one of the last two whole ones, always.

# %%
class Killed(BaseException):
    "Stands for SIGKILL"


def survivor(after):
    "Step that a resume finds when process 0 is killed after so many renames"
    folder, kept = Path(tempfile.mkdtemp()), []
    for step in (10, 20):
        digest = save_checkpoint(folder / 'next.rank1.pt', step=step)
        commit(folder, dict(step=step), [digest], kept)
        kept = [digest]
    digest, real, calls = save_checkpoint(folder / 'next.rank1.pt', step=30), os.replace, []

    def replace(a, b):
        calls.append(b)
        if len(calls) > after:
            raise Killed
        real(a, b)

    os.replace = replace
    try:
        commit(folder, dict(step=30), [digest], kept)
    except Killed:
        pass
    finally:
        os.replace = real
    main = load_checkpoint(folder / LAST)
    seals = [_seal_of(p) for p in folder.glob('*.rank1.pt')]
    assert main['ranks'][0] in seals
    return main['step']


steps = [survivor(n) for n in range(6)]
assert steps == [20, 20, 20, 20, 20, 30]
steps

# %%
#| label: fig-generations-killed
#| fig-cap: "A kill after any number of renames leaves a whole generation: the old one until the last rename, then the new one."
#| fig-alt: "Six bars: the step found is 20 after 0 to 4 renames and 30 after 5"
fig, ax = plt.subplots(figsize=(4, 2), dpi=80)
ax.bar(range(6), steps, color=['#1f77b4'] * 5 + ['#2ca02c'])
ax.set(xlabel='renames before the kill', ylabel='step found', yticks=[0, 10, 20, 30])
plt.show()

# %% [markdown]
# ## Summary
#
# - A generation is one step of all processes: the main file names the digests of the others.
# - The generation before is kept, and used with a line when the newest is damaged.
# - Fields are compared with names, types and ranges before they are used.
# - After a failure the processes save without an exchange, if all of them stand after the same step.
#
# ## Exercises
#
# 1. Why is the main file renamed last?
# 2. What does a resume find if the disk loses `last.rank1.pt`?
# 3. Why can two processes never be two steps apart?
