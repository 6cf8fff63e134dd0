# %% [markdown]
# # Another number of processes {#sec-processes}
#
# > Go on with a run on another number of processes only if its numbers stay those of an unbroken run.
#
# A run that began on two GPUs is to be finished on one, or the other way round. The same command with one
# process instead of two takes half as many images per step: another experiment under the same name. With as
# many images per step as before, the numbers are those of the unbroken run, since losses are divided by counts
# of all processes and random numbers come from one stream (@sec-many). That holds unless something belongs
# to a process: the draws of the published sampler, dropout, a cache of views. So a run is either converted, in
# one line, or refused with a cure.

# %%
#| default_exp train.processes

# %%
#| export
import dataclasses
import os
from numbers import Number
from torch import nn
from semidetr.core import ConfigError, is_main, tell, world_size
from semidetr.train.config import from_saved
from semidetr.train.generations import read_parts

# %% [markdown]
# ## Images per step
#
# The settings name images of *one* process. What makes an experiment is their number over all processes,
#
# $$ n = N\,n_{\text{process}}. $$ {#eq-processes-images}
#
# Two processes with 2 + 2 images and one with 4 + 4 draw the same images in the same views: draws are numbered
# over the processes (@sec-loader). So a configuration with the same $n$ is compared with that of the
# checkpoint as if it had the numbers of the checkpoint.

# %%
#| export
SHARED = ('n_labelled', 'n_unlabelled')  # settings of `loader`, per process


def images_per_step(
    cfg,  # Config
    world: int,  # processes
) -> tuple:  # (labelled, unlabelled) images per step over all processes
    "How many images one batch of a configuration has (@eq-processes-images)"
    return tuple(world * getattr(cfg.loader, name) for name in SHARED)


def as_before(
    cfg,  # Config that is to resume a run
    saved: dict,  # main file of a generation
    world: int | None = None,  # processes today; None: as many as there are
):  # Config
    "`cfg` with the images per process of a checkpoint, if both have as many per step"
    now = world or world_size()
    then = saved.get('world', now)
    if then == now:
        return cfg
    old = from_saved(saved['config'], like=cfg)
    if images_per_step(cfg, now) != images_per_step(old, then):
        return cfg
    sizes = {name: getattr(old.loader, name) for name in SHARED}
    return dataclasses.replace(cfg, loader=dataclasses.replace(cfg.loader, **sizes))


# %%
#| hide
import matplotlib.pyplot as plt

# %%
from semidetr.train.config import override, preset, to_dict

# %%
pair = override(preset('digits'), ['loader.n_labelled=2', 'loader.n_unlabelled=2', 'loader.ratio=fixed'])
single = override(pair, ['loader.n_labelled=4', 'loader.n_unlabelled=4'])
of_pair = dict(config=to_dict(pair), world=2)
assert images_per_step(pair, 2) == images_per_step(single, 1) == (4, 4)
assert as_before(single, of_pair, 1) == pair
assert as_before(pair, of_pair, 1) == pair and as_before(single, of_pair, 3) == single
as_before(single, of_pair, 1).loader


# %% [markdown]
# ## What belongs to a process
#
# | part | why its numbers are others on another number of processes |
# | :--- | :--- |
# | `loader.ratio=binomial` | each process draws how many of its images are labelled |
# | `criterion.normalise=process`, `consistency.normalise=process` | counts of each process are asked for |
# | dropout, batch norm that is trained | masks and statistics of each process |
# | random regions (@sec-faster-rcnn) | each process draws which of its regions train |
# | views of earlier batches (@sec-mixing) | each process has its own |

# %%
#| export
def _drops(module):
    "Does a module draw numbers in training?"
    rate = getattr(module, 'dropout', 0), getattr(module, 'drop_prob', 0), getattr(module, 'p', 0)
    return module.training and any(isinstance(r, Number) and r > 0 for r in rate)


def _moves(module):
    "Is it a batch norm that uses the statistics of a batch?"
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training


def bound_to_processes(
    cfg,  # Config
    student,  # detector
    method,  # `Method`
) -> list:  # names of settings or parts; empty: none
    "What makes the numbers of a run depend on the number of its processes"
    out, unlabelled = [], cfg.method.needs_unlabelled and cfg.loader.n_unlabelled
    if unlabelled and cfg.loader.ratio != 'fixed':
        out.append(f'loader.ratio={cfg.loader.ratio}')
    for group in ('criterion', 'consistency'):
        if getattr(cfg, group).normalise == 'process':
            out.append(f'{group}.normalise=process')
    mode = student.training
    for name, is_one in (('dropout', _drops), ('batch norm that is trained', _moves)):
        if any(is_one(m) for m in student.train().modules()):
            out.append(name)
    student.train(mode)
    out += getattr(student, 'draws', ())
    if any(name.endswith('_extra_state') for name in method.state_dict()):
        out.append('mixing with earlier views')
    return out


# %%
plain, dropping = nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.1), nn.BatchNorm1d(2)).eval()
dropping.draws = ('random regions',)
published = override(
    pair, ['loader.ratio=binomial', 'criterion.normalise=process', 'method.name=mean_teacher']
)
assert bound_to_processes(pair, plain, plain) == []
bound = bound_to_processes(published, dropping, plain)
assert len(bound) == 5 and not dropping.training
bound


# %% [markdown]
# ## Refused, with a cure
#
# Which of the two it is depends on settings alone, so all processes decide the same.

# %%
#| export
def _per_process(numbers, world):
    "Settings for as many images per step, '' if they cannot be divided"
    if any(n % world for n in numbers) or numbers[0] < world:
        return ''
    return ' '.join(f'loader.{name}={n // world}' for name, n in zip(SHARED, numbers))


def _named(n):
    return f'{n} process' if n == 1 else f'{n} processes'


def check_processes(
    cfg,  # Config that is to resume a run
    saved: dict,  # main file of a generation
    folder,  # of the run, for the message
    bound=(),  # from `bound_to_processes`
    world: int | None = None,  # processes today; None: as many as there are
) -> str:  # what is said of a run that is converted, '' if it has as many processes as before
    "ConfigError if a run on this number of processes has other numbers than an unbroken one"
    now = world or world_size()
    then = saved.get('world', now)
    if then == now:
        return ''
    wanted = images_per_step(from_saved(saved['config'], like=cfg), then)
    found = images_per_step(cfg, now)
    begun = f'{folder}: was trained by {_named(then)} until iteration {saved["step"]}'
    cure = f'go on with {_named(then)}'
    if bound:
        raise ConfigError(
            f'{begun}, and by {now} its numbers are others ({", ".join(bound)} belongs to a process); '
            f'{cure}, or start from its weights in another folder: run.init={folder}'
        )
    if wanted != found:
        same = _per_process(wanted, now)
        raise ConfigError(
            f'{begun} with {wanted[0]} labelled and {wanted[1]} unlabelled images per step, and {now} with '
            f'these settings take {found[0]} and {found[1]}; {cure}' + (f', or with {same}' if same else '')
        )
    return f'{begun}, is continued by {now} with as many images per step: the same numbers, up to rounding'


# %%
refused = []
for settings, reasons in ((pair, []), (single, bound)):
    try:
        check_processes(settings, of_pair | dict(step=30), 'runs/mine', reasons, 1)
    except ConfigError as e:
        refused.append(str(e))
assert len(refused) == 2 and 'loader.n_labelled=4 loader.n_unlabelled=4' in refused[0]
said = check_processes(single, of_pair | dict(step=30), 'runs/mine', [], 1)
refused, said


# %% [markdown]
# ## Numbers since the last line of the log
#
# Each process keeps the numbers of its own images until they are written, and those of the last
# `run.health_window` steps. From the parts of all processes follow the numbers of a step: means, and sums where
# a number is a count of boxes. A new process takes the means; the counts go to the first one. The mean score of
# pseudo boxes is the one number of the log that is a mean of means: over processes, of the boxes of each.
# Unreadable images that one process has skipped count in every process of today.

# %%
#| export
def _is_count(name):
    return name.endswith(('_tp', '_n'))


def row_of_all(
    rows: list,  # numbers of one step, of each process
) -> dict:  # numbers of the step
    "Means over processes, sums of counts; a loss that a process does not have counts as 0"
    out = {}
    for name in dict.fromkeys(k for row in rows for k in row):
        values = [row[name] for row in rows if name in row]
        n = 1 if _is_count(name) else len(rows) if name.startswith('loss') else len(values)
        out[name] = sum(values) / n
    return out


def _without_counts(row):
    return {k: 0 if _is_count(k) else v for k, v in row.items()}


def joined(
    parts: list,  # what each process saved: dict(rng, recent, health, ...)
    is_first: bool = True,  # is this the first process of today?
) -> dict:  # the part of a process of today
    "What a process takes over from a run that had another number of them"
    recent, health = ([row_of_all(rows) for rows in zip(*kept)] for kept in _kept(parts))
    if not is_first:
        health = [_without_counts(row) for row in health]
    warned = any(part['health']['warned'] for part in parts)
    broken = sorted({i for part in parts for i in part.get('broken', ())})
    return dict(parts[0], recent=recent, health=dict(rows=health, warned=warned), parts={}, broken=broken)


def _kept(parts):
    "(Numbers of each process since the last line of the log, those of its health window)"
    return [part['recent'] for part in parts], [part['health']['rows'] for part in parts]


# %%
halves = [
    dict(
        recent=[dict(loss=a, loss_unsup_cls=a)],
        health=dict(rows=[dict(pseudo_boxes=a, pseudo_n=a)], warned=w),
    )
    for a, w in ((1.0, False), (3.0, True))
]
first_of_one, second_of_two = joined(halves), joined(halves, is_first=False)
assert first_of_one['recent'] == second_of_two['recent'] == [dict(loss=2.0, loss_unsup_cls=2.0)]
assert first_of_one['health'] == dict(rows=[dict(pseudo_boxes=2.0, pseudo_n=4.0)], warned=True)
assert second_of_two['health']['rows'] == [dict(pseudo_boxes=2.0, pseudo_n=0)]
first_of_one


# %%
#| export
def part_of_today(
    run,  # has cfg, student, method, dir
    saved: dict,  # main file of a generation
    own: dict | None,  # what this process saved beside it, from `read_generation`
) -> dict | None:  # what this process goes on from beside the main file
    "The same run on another number of processes: converted in one line, or a ConfigError"
    bound = bound_to_processes(run.cfg, run.student, run.method)
    line = check_processes(run.cfg, saved, run.dir, bound)
    if not line:
        return own
    part = joined([saved, *read_parts(run.dir, saved)], is_main())
    tell([line])
    return part


# %% [markdown]
# A run that is finished is looked up, whatever the number of processes; that its result is another one's is
# said.

# %%
#| export
def tell_other_processes(
    result: dict,  # content of run.json
    folder,  # of the run, for the line
):
    "Say that a result was made by another number of processes than those of this command"
    then, now = result.get('processes'), int(os.environ.get('WORLD_SIZE', 1))
    if isinstance(then, int) and then != now and os.environ.get('RANK', '0') == '0':
        tell([f'{folder}: is finished, and the result is that of {_named(then)}; this command has {now}'])


# %%
#| hide
import warnings

# %%
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter('always')
    tell_other_processes(dict(processes=1), 'runs/mine')
    tell_other_processes(dict(processes=8), 'runs/mine')
assert len(told) == 1
str(told[0].message)

# %%
#| label: fig-processes-images
#| fig-cap: "The same images per step for 1, 2 and 4 processes: draws are numbered over all processes, each takes its share."
#| fig-alt: "Three rows of eight cells; one colour in the first row, two colours of four cells in the second, four colours of two cells in the third."
fig, ax = plt.subplots(figsize=(5, 1.6), dpi=80)
for row, world in enumerate((1, 2, 4)):
    share = 8 // world
    for draw in range(8):
        ax.barh(row, 0.9, left=draw, color=f'C{draw // share}')
        ax.text(draw + 0.45, row, str(draw), ha='center', va='center', color='white')
ax.set_yticks(range(3), [f'{n} process{"es" * (n > 1)}' for n in (1, 2, 4)])
ax.invert_yaxis()
ax.set_xticks([])
ax.set_xlabel('number of the draw')
plt.show()

# %% [markdown]
# ## Summary
#
# - What makes an experiment is the number of images per step over all processes (@eq-processes-images).
# - A run is continued by another number of processes if that stays the same and nothing belongs to a process;
#   one line says so.
# - Otherwise it is refused, with settings or the number of processes that go on.
# - Numbers that are not in the log yet are joined from the parts of all processes.
#
# ## Exercises
#
# 1. A run on 8 processes has 1 + 4 images each and `loader.ratio=binomial`. Why can it not go on with 4?
# 2. Why do counts go to one process, and means to all?
# 3. Which line of the log would differ if the second process took no numbers over?
