# %% [markdown]
# # The command line {#sec-cli}
#
# > Put the commands together, and add replay and the book's own: demo, ablate, site.
#
# This is the module that the command `semidetr` starts. Each command stands in a chapter of its kind:
#
# | chapter | commands |
# | :--- | :--- |
# | @sec-prepare | `doctor`, `build-ops`, `split`, `recipe` |
# | @sec-training | `train` |
# | @sec-use | `eval`, `predict` |
# | @sec-weight-commands | `import`, `export` |
# | this one | `replay`, `demo`, `ablate`, `site` |
#
# A chapter registers its commands when it is imported, so a further one needs a line among the imports below;
# their order is that of `semidetr --help`. The commands contain little logic: each checks its options, calls a
# function of an earlier chapter, and prints.

# %%
#| default_exp cli.commands

# %%
#| hide
import warnings

warnings.filterwarnings('ignore', message='IProgress')

# %%
#| export
import contextlib
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated
import typer
from semidetr.cli import prepare, training, use, weights  # noqa: F401 (importing a chapter registers its commands)
from semidetr.cli.terminal import _HINT, Device, Out, Quiet, _bad, _fail, _free, _opt, _say, command, main
from semidetr.cli.terminal import read_options, read_seeds

# %%
#| hide
import functools
import inspect
import tempfile
import matplotlib.pyplot as plt
from semidetr.cli import terminal

# %% [markdown]
# In the cells below, `shell` runs a command line as a terminal would, and shows both streams and the exit
# code.

# %%
home = Path(tempfile.mkdtemp())
shell = functools.partial(terminal.shell, home=home)
assert shell('semidetr --version') == 0


# %% [markdown]
# ## Repeat a failed step
#
# A step whose losses or gradients are not finite leaves a file in the folder of its run (@sec-capsule).

# %%
#| export
@command('replay')
def replay_step(
    file: Annotated[Path, typer.Argument(help='failed_step_N.pt in the folder of a run')],
    device: Device = 'cpu',
):
    """Repeat a step that was not finite, from the file that it left, and name what failed first.

    Prints every loss as it was recorded and as it is now (equal on the same machine), the first layer, loss
    or gradient that is not finite, and the images. Needs no data. Exit code 1 if all is finite this time.

    Example: semidetr replay runs/mine/failed_step_120.pt
    """
    from semidetr.train.replay import replay, replay_lines

    found = replay(file, device)
    for line in replay_lines(found):
        _say(line)
    if not found.replayed:
        raise typer.Exit(1)


# %%
assert shell('semidetr replay last.pt') == 2


# %% [markdown]
# ## The book itself

# %%
#| export
@command()
def demo(
    out: Out = Path('runs/demo'),
    labels: _opt(int, 'number of labelled scenes', min=1) = 20,
    seed: _opt(list[int], 'seed of split and training (may be repeated)') = [0],  # noqa: B006 (--help shows it)
    workers: _opt(int, 'runs at a time; 0: one per core', min=0) = 0,
    quiet: Quiet = False,
):
    """Learn to detect handwritten digits from 20 labelled scenes and thousands without labels.

    Supervised against mean teacher and Semi-DETR, some minutes on two cores; table and pictures at the end.

    Example: semidetr demo -o runs/demo
    """
    from semidetr.lab.demo import run_demo
    from semidetr.train import machine

    machine.prepare()
    run_demo(_free(out), labels, tuple(seed), not quiet, workers, _say)


# %%
#| export
@command('ablate')
def run_studies(
    study: Annotated[
        list[str],
        typer.Argument(
            help='names in nbs/ablations/studies.toml, or all (those of this machine, or of --scale); '
            'without a name they are listed'
        ),
    ] = None,
    scale: _opt(str, 'smoke, small or gpu; default: that of the study') = '',
    seeds: _opt(str, 'how many, e.g. 5, or which: 0,2 or 3-4; default: those of the study') = '',
    groups: _opt(str, 'e.g. p1,p5: these groups of the study; default: all') = '',
    jobs: _opt(
        int, 'runs at a time, one thread each; 0: one per core, with Slurm all', '--jobs', '-j', min=0
    ) = 0,
    dry_run: _opt(bool, 'print what would run, and what is missing for it', '--dry-run', '-n') = False,
    data: _opt(str, f'another data set: {_HINT}', '--data', '-d') = '',
    out: _opt(Path, 'folder of the runs; default: runs/studies in the checkout', '--out', '-o') = None,
    results: _opt(
        Path,
        'folder of the records; default: nbs/ablations/results, at scale smoke or with --data OUT/results',
    ) = None,
    engine: _opt(str, 'local, slurm or submitit-local (the last two: extra [cluster])') = 'local',
    option: _opt(
        list[str], 'of Slurm through submitit, e.g. slurm_partition=gpu timeout_min=600 (may be repeated)'
    ) = None,
    processes: _opt(int, 'processes of each run, started by torchrun, one GPU each', min=1) = 1,
    quiet: Quiet = False,
):
    """Run studies of the book: every arm, every seed, one executed notebook per run, one record per seed.

    Finished runs are looked up, stopped ones resumed. The record of a study and seed is replaced when its
    runs are finished. Needs a checkout and the extra [book]. Exit code 1 if runs failed.

    Example: semidetr ablate components --seeds 3 --jobs 2
    """
    from semidetr.lab.ablate import ablate
    from semidetr.lab.dry_run import dry_run as list_runs
    from semidetr.lab.plan import STUDIES, find_book
    from semidetr.lab.study import study_lines

    book = find_book()
    if not study:
        return _say('\n'.join(study_lines(book / STUDIES)))
    out = _from_book(book, _free(out or book / 'runs' / 'studies'))
    results = _from_book(book, _free(results, '--results')) if results else None
    if data and Path(data).exists():
        data = str(_from_book(book, data))
    with contextlib.chdir(book):
        bad = ablate(
            study,
            scale,
            read_seeds(seeds),
            data,
            tuple(filter(None, groups.split(','))),
            out,
            results,
            jobs,
            engine,
            read_options(option or []),
            processes,
            list_runs if dry_run else None,
            not quiet,
            _say,
        )
    for line in bad:
        _fail(line)
    if bad:
        raise typer.Exit(2 if dry_run else 1)


def _from_book(book, path):
    "A path relative to the checkout, links not followed; absolute if it is outside"
    inside = Path(os.path.abspath(path)).is_relative_to(book)
    return Path(os.path.relpath(path, book) if inside else Path(path).absolute())


@command()
def site(engine: _opt(str, 'auto, quarto or fallback') = 'auto'):
    """Render the book to _docs/. Needs a checkout and the extra [book].

    Example: semidetr site
    """
    if engine not in ('auto', 'quarto', 'fallback'):
        raise _bad(f"--engine '{engine}' is unknown; known: auto, quarto, fallback")
    root = next((d for d in (Path.cwd(), *Path.cwd().parents) if (d / '_quarto.yml').exists()), None)
    if root is None:
        raise _bad('no _quarto.yml here or above; run this in a checkout of the book')
    if not (root / 'semidetr' / 'book').is_dir() and find_spec('semidetr.book') is None:
        raise _bad(
            f'{root}: has no folder semidetr/book, which renders the book; run this in a checkout of it'
        )
    command = [sys.executable, '-m', 'semidetr.book.site', '--engine', engine]
    raise typer.Exit(subprocess.run(command, cwd=root).returncode)


# %%
assert shell('semidetr ablate components --dry-run') == 2  # not in a checkout

# %%
#| export
if __name__ == '__main__' and globals().get('__spec__'):
    main()

# %% [markdown]
# For a misspelt command the nearest one is suggested, and every command has a help text with an example:

# %%
assert shell('semidetr trian') == 2
assert shell('semidetr demo --help') == 0

# %%
#| label: fig-cli-commands
#| fig-cap: "The commands by chapter, in the order of `semidetr --help`, and the number of their options."
#| fig-alt: "Bars with the number of options, one bar per command, coloured by chapter"
colours = {'prepare': '#2ca02c', 'training': '#1f77b4', 'use': '#ff7f0e'}
registered = [c for c in terminal.app.registered_commands if c.callback.__module__.startswith('semidetr.cli')]
bars = [(c.name or c.callback.__name__, c.callback) for c in registered]
fig, ax = plt.subplots(figsize=(5, 2.4), dpi=80)
for name, fn in bars:
    colour = colours.get(fn.__module__.rpartition('.')[2], '#7f7f7f')
    ax.barh(name, len(inspect.signature(fn).parameters), color=colour)
ax.set(xlabel='arguments and options')
ax.invert_yaxis()
plt.show()

# %% [markdown]
# ## Summary
#
# - Commands contain little logic: a script can do the same with the functions of the earlier chapters
#   (@sec-api).
# - Errors that a user can cure are one line with place and cure and exit code 2; anything else is a
#   traceback, because it is a bug.
# - The output path is checked before the work, and files are written completely or not at all.
#
# ## Exercises
#
# 1. What does `semidetr --help` show if the import of `use` is removed?
# 2. Write a chapter with a command `classes`, and add it here.
