# %% [markdown]
# # One owner {#sec-lock}
#
# > Let one process at a time write into the folder of a run, and take over from one that has died.
#
# Two commands for the same folder, one of them forgotten in another window, write each step twice, and the
# last one to save wins. Processes of `torchrun` that outlive their launcher do the same when the run is started
# again. So a run owns its folder: a file says which process of which host trains there. A second one is
# refused in one line. The file of a process that was killed must not need a cure by hand, so it is taken over.

# %%
#| default_exp train.lock

# %%
#| export
import contextlib
import fcntl
import json
import os
import re
import socket
import threading
import time
from pathlib import Path
from semidetr.core import DataError, atomic_write, tell

# %% [markdown]
# ## Who is it?
#
# A process number alone is not enough: numbers are used again, and each container counts its own. The time at
# which a process began and the name space of its numbers make it one process of one host.

# %%
#| export
LOCK = 'owner.json'
BEAT = 20.0  # seconds between two signs of life
DEAD = 300.0  # seconds without one after which a process of another host counts as dead


def begin_of(
    pid: int,  # of a process of this host
) -> str:  # time since the start of the system, '' if it is not known
    "When a process began"
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]
    except (OSError, IndexError):
        return ''


def this_process() -> dict:  # host, space, pid, begin
    "What the lock says of this process"
    try:
        space = os.readlink('/proc/self/ns/pid')
    except OSError:
        space = ''
    return dict(host=socket.gethostname(), space=space, pid=os.getpid(), begin=begin_of(os.getpid()))


def is_alive(
    pid: int,  # of a process of this host
    begin: str = '',  # when it began; '': not known
) -> bool:
    "Does this very process exist?"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass  # it belongs to another user
    return not begin or begin_of(pid) in ('', begin)


# %%
#| hide
import subprocess
import sys
import tempfile
import warnings
import matplotlib.pyplot as plt

# %%
me = this_process()
ended = subprocess.Popen([sys.executable, '-c', ''])
ended.wait()
assert is_alive(me['pid'], me['begin']) and not is_alive(ended.pid)
assert not me['begin'] or not is_alive(me['pid'], 'another time')
sorted(me)


# %% [markdown]
# ## What a lock means
#
# | the lock is of | and | then |
# | :--- | :--- | :--- |
# | this host | its process lives | refused |
# | this host | its process is dead | taken over, with a line |
# | another host | sign of life within 5 minutes | refused |
# | another host | no sign of life for longer | taken over, with a line |
#
# The process of another host cannot be asked, so an owner touches the file every 20 seconds. Ages are
# differences between times of the file system that holds the folder; clocks of hosts play no part.

# %%
#| export
def _read(path):
    "Content of a lock; {} if there is none, or if it is damaged"
    try:
        owner = json.loads(path.read_text(encoding='utf-8'))
        known = isinstance(owner, dict) and isinstance(owner.get('pid'), int) and owner['pid'] > 0
    except (OSError, ValueError, RecursionError):
        known = False
    if not known:
        return {}
    return owner | {k: str(owner.get(k, '')) for k in ('host', 'space', 'begin')}


def _age(path):
    "Seconds since the last sign of life, by the clock of the file system"
    now = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        now.write_text('')
        return now.stat().st_mtime - path.stat().st_mtime
    except OSError:
        return time.time() - path.stat().st_mtime if path.exists() else 0.0
    finally:
        with contextlib.suppress(OSError):
            now.unlink(missing_ok=True)


def other_owner(
    folder,  # of a run
) -> tuple:  # (who else owns it, is that one alive?); ('', False) if nobody does
    "Read the lock of a folder"
    path, me = Path(folder) / LOCK, this_process()
    owner = _read(path)
    if not owner:
        return '', False
    who = f"process {owner['pid']} on {owner['host']}"
    if (owner['host'], owner['space']) == (me['host'], me['space']):
        return who, is_alive(owner['pid'], owner['begin'])
    return who, _age(path) < DEAD


def refuse_if_owned(
    folder,  # of a run
):
    "`DataError` if another process trains in this folder"
    who, alive = other_owner(folder)
    if alive:
        owner, me = _read(Path(folder) / LOCK), this_process()
        here = [owner.get(k) for k in ('host', 'space')] == [me['host'], me['space']]
        far = '' if here else '; 5 minutes after its death the same command goes on'
        raise DataError(f'{folder}: {who} trains in this folder; end it, or choose another folder{far}')


# %%
toy = Path(tempfile.mkdtemp())
cases = {'alive': me, 'ended': me | dict(pid=ended.pid), 'elsewhere': me | dict(host='node7'), 'damaged': []}
meanings = {}
for name, content in cases.items():
    (toy / LOCK).write_text(json.dumps(content))
    meanings[name] = other_owner(toy)[1]
os.utime(toy / LOCK, (0, 0))
(toy / LOCK).write_text(json.dumps(cases['elsewhere']))
os.utime(toy / LOCK, (time.time() - 400,) * 2)
meanings['elsewhere, 400 s ago'] = other_owner(toy)[1]
assert list(meanings.values()) == [True, False, True, False, False]
meanings

# %%
#| label: fig-lock-age
#| fig-cap: "A process of another host owns the folder for five minutes after its last sign of life; a living owner renews it every 20 seconds."
#| fig-alt: "A step: owned from 0 to 300 seconds after the last sign of life, free later; a grey band marks the ages below 20 seconds that a living owner reaches"
ages = [10 * n + 5 for n in range(45)]
owned = []
for age in ages:
    os.utime(toy / LOCK, (time.time() - age,) * 2)
    owned.append(other_owner(toy)[1])
assert owned == [age < DEAD for age in ages]
fig, ax = plt.subplots(figsize=(4.5, 1.8), dpi=80)
ax.step(ages, owned, where='post')
ax.axvspan(0, BEAT, color='grey', alpha=0.4)
ax.set(xlabel='seconds since the last sign of life', yticks=[0, 1], yticklabels=['free', 'owned'])
plt.show()

# %% [markdown]
# ## What a killed process leaves
#
# A process that is killed while it writes leaves a temporary file, and parts of a generation that was never
# completed (@sec-generations). Whoever owns the folder removes both.

# %%
#| export
_RUN_FILE = r'(last|previous|next|best|failed_step_\d+)(\.rank\d+)?\.pt|run\.json|log\.jsonl|owner\.json'
LEFT_OVER = re.compile(rf'\.({_RUN_FILE})\.\d+\.tmp|next(\.rank\d+)?\.pt')


def clear_left_overs(
    folder,  # of a run, owned by this process
) -> list:  # names
    "Remove files that a killed process did not finish"
    names = sorted(p.name for p in Path(folder).iterdir() if LEFT_OVER.fullmatch(p.name))
    for name in names:
        with contextlib.suppress(OSError):
            (Path(folder) / name).unlink()
    return names


# %%
for name in ('.last.pt.71.tmp', 'next.rank1.pt', 'last.pt', 'my.tmp', '.notes.71.tmp'):
    (toy / name).write_text('')
cleared = clear_left_overs(toy)
assert cleared == ['.last.pt.71.tmp', 'next.rank1.pt'] and (toy / 'last.pt').exists()
cleared


# %% [markdown]
# ## To own a folder
#
# Reading the old lock and writing the new one must not be interrupted by another process that does the same,
# so both happen under a lock of the system on the folder itself, where the file system has one.

# %%
#| export
@contextlib.contextmanager
def _alone(folder):
    "One process of those that use this folder at a time"
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


# %%
#| export
class Owner:
    "The lock of a folder that this process owns"

    def __init__(self, folder):
        self.path, self.me, self.lost = Path(folder) / LOCK, this_process(), False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(self.path.parent):
            refuse_if_owned(self.path.parent)
            who, _ = other_owner(self.path.parent)
            atomic_write(self.path, json.dumps(self.me))
        if who:
            tell([f'{self.path.parent}: {who} has ended without a word; this process takes its place'])
        clear_left_overs(self.path.parent)
        self._thread.start()
        return self

    def _beat(self):
        while not self._ended.wait(BEAT):
            self.check()

    def check(self):
        "A sign of life; `lost` is set if another process has taken over meanwhile"
        if _read(self.path) == self.me:
            with contextlib.suppress(OSError):
                os.utime(self.path)
        elif _read(self.path):
            self.lost = True
        else:  # somebody has deleted it
            with contextlib.suppress(OSError), _alone(self.path.parent):
                if not _read(self.path):
                    atomic_write(self.path, json.dumps(self.me))

    def __exit__(self, *_):
        self._ended.set()
        self._thread.join(5)
        if _read(self.path) == self.me:
            with contextlib.suppress(OSError):
                self.path.unlink()


# %%
(toy / LOCK).write_text(json.dumps(cases['ended']))
with warnings.catch_warnings(record=True) as said, Owner(toy) as owner:
    warnings.simplefilter('always')
    try:
        refuse_if_owned(toy)
    except DataError as e:
        second = str(e).replace(str(toy), 'runs/mine')
assert 'trains in this folder' in second and not (toy / LOCK).exists()
second.replace(me['host'], 'here').replace(str(me['pid']), '71'), len(said)

# %% [markdown]
# A process that was suspended for long finds another owner when it wakes up. It stops and writes nothing.

# %%
with Owner(toy) as suspended:
    (toy / LOCK).write_text(json.dumps(cases['elsewhere']))
    suspended.check()
assert suspended.lost and (toy / LOCK).exists()
suspended.lost

# %% [markdown]
# ## Summary
#
# - `owner.json` names host, process and the time at which it began; it is removed when the run ends.
# - A living owner is respected, a dead one is replaced with a line.
# - Files that a killed process did not finish are removed by the next owner.
#
# ## Exercises
#
# 1. Why is a process number without the time of its begin not enough?
# 2. Two hosts share a folder, and the clock of one is an hour late. What would go wrong with the time of the
#    host in place of that of the file system?
# 3. Why does a suspended process write nothing when it wakes up?
