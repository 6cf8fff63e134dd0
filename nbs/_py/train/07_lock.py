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
# which a process began and the name space of its numbers make it one process of one host. A host that was
# restarted has the same name and counts anew; Linux gives each start of the system a number of its own.

# %%
#| export
LOCK = 'owner.json'
BEAT = 20.0  # seconds between two signs of life
DEAD = 300.0  # seconds without one after which a process of another host counts as dead
SILENT = 100.0  # the same for a host that was started again: no living owner is silent for that long
PAUSE = 1.0  # seconds between two looks for a sign of life


def begin_of(
    pid: int,  # of a process of this host
) -> str:  # time since the start of the system, '' if it is not known
    "When a process began"
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]
    except (OSError, IndexError):
        return ''


def this_process(
    folder=None,  # of a run; None: whichever
) -> dict:  # host, boot, disk, space, pid, begin; '' for what the system does not tell
    "What the lock says of this process"
    me = dict(host=socket.gethostname(), boot='', disk='', space='', pid=os.getpid())
    with contextlib.suppress(OSError):
        me['boot'] = Path('/proc/sys/kernel/random/boot_id').read_text().strip()
        me['space'] = os.readlink('/proc/self/ns/pid')
    return me | dict(begin=begin_of(os.getpid()), disk='' if folder is None else str(os.stat(folder).st_dev))


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
# | this host and container | its process lives | refused |
# | | its process is dead | taken over, with a line |
# | another container of this host, such as this one before its restart | the system still holds its lock on the file | refused |
# | | the system has released it | taken over, with a line |
# | a host of the same name that was started at another time | a sign of life comes | refused |
# | | none since 100 seconds | taken over, with a line |
# | another host | sign of life within 5 minutes | refused |
# | | no sign of life for longer | taken over, with a line |
#
# A process in another container cannot be asked, but one system knows the locks of all its processes, and
# releases them when they die. Two mounts of a network disk may be two file systems to it, so this counts only
# where the disk has the same number. The process of another host cannot be asked either, so an owner touches
# the file every 20 seconds. A host with the name of this one, but another start, was most likely restarted;
# but two hosts may have one name. So the next sign of life is waited for, unless the last one is older than 100
# seconds. Ages are differences between times of the file system that holds the folder; clocks of hosts play
# no part.

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
    return owner | {k: str(owner.get(k, '')) for k in ('host', 'boot', 'disk', 'space', 'begin')}


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


def _is_held(path):
    "Does a living process of this system hold its lock on the file? None on a disk without locks"
    try:
        with path.open() as f:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None


# %%
#| export
def _gives_a_sign(path, who):
    "Is there a sign of life before the last one is `SILENT` seconds old?"
    try:
        last = path.stat().st_mtime_ns
        for n in range(int(SILENT / PAUSE)):
            if path.stat().st_mtime_ns != last:
                return True
            if (age := _age(path)) >= SILENT:
                break
            if not n:
                tell([f'{path.parent}: waiting {SILENT - age:.0f} s for a sign of life of {who}'])
            time.sleep(PAUSE)
    except FileNotFoundError:
        pass  # it has ended
    return False


def rule_of(
    owner: dict,  # content of a lock
    me: dict,  # from `this_process`
) -> (
    str
):  # by its 'number', by its lock, if 'held', by 'signs' of life that come, or by the 'age' of the last one
    "How to find out whether the owner of a lock is alive"
    is_known = bool(owner['boot'] and me['boot'])  # not for a lock of an older version
    is_here = owner['boot'] == me['boot'] if is_known else owner['host'] == me['host']
    if is_here and owner['space'] == me['space']:
        return 'number'
    if is_known and is_here and owner['disk'] == me['disk']:
        return 'held'
    return 'signs' if is_known and (is_here or owner['host'] == me['host']) else 'age'


# %%
#| export
def other_owner(
    folder,  # of a run
) -> tuple:  # (who else owns it, is that one alive?, rule that told); ('', False, '') if nobody does
    "Read the lock of a folder"
    path = Path(folder) / LOCK
    owner = _read(path)
    if not owner:
        return '', False, ''
    who, rule = f"process {owner['pid']} on {owner['host']}", rule_of(owner, this_process(folder))
    if rule == 'number':
        return who, is_alive(owner['pid'], owner['begin']), rule
    if rule == 'held' and (held := _is_held(path)) is not None:
        return who, held, rule
    return who, _age(path) < DEAD if rule == 'age' else _gives_a_sign(path, who), rule


def refuse_if_owned(
    folder,  # of a run
):
    "`DataError` if another process trains in this folder"
    who, alive, rule = other_owner(folder)
    if alive:
        far = '; 5 minutes after its death the same command goes on' if rule == 'age' else ''
        raise DataError(f'{folder}: {who} trains in this folder; end it, or choose another folder{far}')


# %%
toy = Path(tempfile.mkdtemp())
cases = {
    'alive': me,
    'ended': me | dict(pid=ended.pid),
    'ended in another container': this_process(toy) | dict(space='another'),
    'elsewhere': me | dict(host='node7', boot='another'),
    'damaged': [],
}
meanings = {}
for name, content in cases.items():
    (toy / LOCK).write_text(json.dumps(content))
    meanings[name] = other_owner(toy)[1]
os.utime(toy / LOCK, (0, 0))
for name, content, age in (
    ('elsewhere', cases['elsewhere'], 400),
    ('restarted', me | dict(boot='another'), 110),
):
    (toy / LOCK).write_text(json.dumps(content))
    os.utime(toy / LOCK, (time.time() - age,) * 2)
    meanings[f'{name}, {age} s ago'] = other_owner(toy)[1]
(toy / LOCK).write_text(json.dumps(cases['elsewhere']))
assert list(meanings.values()) == [True, False, False, True, False, False, False] or not me['boot']
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


def _written(path, me):
    "Write a lock; a file on which the system holds it for as long as this process lives"
    atomic_write(path, json.dumps(me))
    file = path.open('r+')
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX)
    return file


# %%
#| export
class Owner:
    "The lock of a folder that this process owns"

    def __init__(self, folder):
        self.path, self.lost = Path(folder) / LOCK, False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.me = this_process(self.path.parent)
        with _alone(self.path.parent):
            refuse_if_owned(self.path.parent)
            who, *_ = other_owner(self.path.parent)
            self._file = _written(self.path, self.me)
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
                    self._file.close()
                    self._file = _written(self.path, self.me)

    def __exit__(self, *_):
        self._ended.set()
        self._thread.join(5)
        if _read(self.path) == self.me:
            with contextlib.suppress(OSError):
                self.path.unlink()
        self._file.close()


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
# - `owner.json` names host, start of the system, process and the time at which it began; it is removed when the
#   run ends.
# - A living owner is respected, a dead one is replaced with a line.
# - Files that a killed process did not finish are removed by the next owner.
#
# ## Exercises
#
# 1. Why is a process number without the time of its begin not enough?
# 2. Two hosts share a folder, and the clock of one is an hour late. What would go wrong with the time of the
#    host in place of that of the file system?
# 3. Why does a suspended process write nothing when it wakes up?
