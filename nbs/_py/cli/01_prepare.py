# %% [markdown]
# # Before a training {#sec-prepare}
#
# > Examine data and machine, compile the op, divide images, plan a step: doctor, build-ops, split, recipe.
#
# An hour of training on boxes in the wrong places, on a machine whose attention op was never compiled, is an
# hour lost. The commands of this chapter take seconds, and show it first. They contain little logic: each
# checks its options, calls a function of an earlier chapter, and prints. How commands behave is the subject of
# @sec-terminal: a mistake is one line and exit code 2, results are written completely or not at all, `--help`
# is fast.

# %%
#| default_exp cli.prepare

# %%
#| hide
import warnings

warnings.filterwarnings('ignore', message='IProgress')

# %%
#| export
import shlex
from pathlib import Path
from typing import Annotated
import typer
import semidetr
from semidetr.cli.terminal import _HINT, Images, _bad, _free, _opt, _say, command

# %%
#| hide
import functools
import tempfile
import matplotlib.pyplot as plt
from PIL import Image
from semidetr.cli import terminal
from semidetr.draw import show_image

# %% [markdown]
# In the cells below, `shell` runs a command line as a terminal would, and shows both streams and the exit
# code.

# %%
home = Path(tempfile.mkdtemp())
shell = functools.partial(terminal.shell, home=home)
assert shell('semidetr --version') == 0


# %% [markdown]
# ## Check the data first
#
# `doctor` (@sec-doctor) is the first command to run on data of your own. Without a data set it describes the
# installation, which is the first thing to paste into a bug report.

# %%
#| export
@command()
def doctor(
    data: Annotated[str, typer.Argument(help=_HINT + ', or folder of images', show_default=False)] = '',
    other: _opt(
        list[str],
        'data set that must not overlap with it, e.g. the unlabelled one (may be repeated); '
        'its own val and test splits are always compared',
    ) = None,
    split_file: _opt(list[Path], 'split file to check (may be repeated)') = None,
    split: _opt(str, 'which split of DATA') = 'train',
    images: Images = '',
    out: _opt(Path, 'write report.json and contact_sheet.png to this folder', '--out', '-o') = None,
    quick: _opt(bool, 'do not decode the images') = False,
    env: _opt(
        bool, 'examine this machine instead: versions, cores, GPU, attention op, speed of bfloat16', '--env'
    ) = False,
):
    """Examine a data set: counts, classes, and every fault with file, item and cure.

    Exit code 2 if it has errors. Without DATA: what is installed, without the bfloat16 probe of --env.

    Example: semidetr doctor path/to/coco --out report

    Example: semidetr doctor --env
    """
    if env and data:
        raise _bad('give either DATA or --env')
    if not data:
        from semidetr.train.machine import environment_lines

        last = f'To examine data: semidetr doctor DATA, where DATA is a {_HINT}'
        return _say('\n'.join([f'semidetr {semidetr.__version__}', *environment_lines(env), last]))
    from semidetr import check_dataset, contact_sheet, open_dataset
    from semidetr.core import atomic_write

    if out:
        _free(out)
    report = check_dataset(data, other or None, split_file or [], split, quick, images=images)
    if report.of('error', 'cannot-open') and not report.counts:
        f = report.errors[0]
        raise _bad(f"{'' if data in f.item else f'{data}: '}{f.item}; {f.cure}")
    _say(report.to_text())
    if out:
        atomic_write(out / 'report.json', report.to_json())
        if not report.errors:
            contact_sheet(open_dataset(data, split, images=images)).save(out / 'contact_sheet.png')
        sheet = '' if report.errors else f" and {out / 'contact_sheet.png'}"
        _say(f"written: {out / 'report.json'}{sheet}")
    if report.errors:
        raise typer.Exit(2)
    if report.verdict == 'fit for training' and split == 'train':
        _say(f'next: semidetr train --data {shlex.quote(data)} --percent 5 -o runs/mine')


# %%
assert shell('semidetr doctor digits:n=30,size=96 --out report') == 0

# %%
#| label: fig-cli-sheet
#| fig-cap: "The contact sheet of the doctor: all numbers of a report can be right while the boxes miss the objects; a picture shows it."
#| fig-alt: "Twelve scenes with handwritten digits and a box around each"
fig, ax = plt.subplots(figsize=(4.4, 3.4), dpi=80)
show_image(ax, Image.open(home / 'report' / 'contact_sheet.png'))
plt.show()

# %%
assert shell('semidetr doctor no/such/folder') == 2


# %%
#| export
@command('build-ops')
def build_the_op(
    device: _opt(str, 'cpu, or cuda for the GPU kernel') = 'cpu',
    archs: _opt(
        str, 'of --device cuda: architectures such as 80,90; default: that of the GPU here'
    ) = 'native',
    force: _opt(bool, 'build even if the library is there', '--force') = False,
):
    """Compile the deformable-attention op for this machine, ahead of the first run.

    Training does this by itself; here it says where, how long, and what is missing (exit code 2).

    Example: semidetr build-ops
    """
    from semidetr.train.machine import build_lines

    for line in build_lines(device, force, tuple(archs.split(','))):
        _say(line)


# %% [markdown]
# ## Divide the images
#
# @sec-splits explains what a split is. In a small data set a development part of 100 images would leave no
# image to train on, so at most a fifth is held out by default.

# %%
#| export
@command()
def split(
    data: _opt(str, _HINT, '--data', '-d'),
    out: _opt(Path, 'JSON file to write', '--out', '-o'),
    percent: _opt(float, 'percent of the images that keep their labels') = None,
    count: _opt(int, 'or: number of labelled images') = None,
    shots: _opt(int, 'or: number of labelled images of each class') = None,
    fold: _opt(int, 'which draw') = 0,
    dev: _opt(
        int, 'images held out to choose settings on; default: 100, at most a fifth; with --from 0'
    ) = None,
    seed: _opt(int, 'another seed, another development part') = 0,
    cover_classes: _opt(bool, 'each class has a labelled image') = False,
    from_file: _opt(Path, 'published list of indices or ids instead of a draw', '--from') = None,
    convention: _opt(str, 'what the numbers of --from are: auto, ids, positions') = 'auto',
    images: Images = '',
):
    """Divide training images into labelled, unlabelled and development part; the same on every machine.

    Example: semidetr split --data path/to/coco --percent 5 --fold 0 -o split.json

    Example: semidetr split --data path/to/coco --shots 10 -o ten_shots.json
    """
    from semidetr.train.api import split as divide

    s = divide(
        data,
        percent,
        count,
        shots,
        fold,
        dev,
        seed,
        cover_classes,
        from_file,
        convention,
        images,
        _free(out, folder=False),
    )
    counts = f'{len(s.labelled)} labelled, {len(s.unlabelled)} unlabelled, {len(s.dev)} development images'
    _say(f'{out}: {counts}')


# %%
assert shell('semidetr split --data digits:n=30,size=96 --percent 20 --out split.json') == 0
assert shell('semidetr split --data digits:n=60,size=96 --shots 2 --out shots.json') == 0
assert shell('semidetr split --data digits:n=30,size=96 --percent 120 --out other.json') == 2
assert not (home / 'other.json').exists()


# %% [markdown]
# ## The paper's step on your GPUs
#
# `recipe` (@sec-recipe) trains nothing: it says which batch fits, how many batches make a step, and what follows
# for learning rate and iterations.

# %%
#| export
@command()
def recipe(
    settings: Annotated[
        list[str], typer.Argument(help='single settings, e.g. view.max_side=1000', show_default=False)
    ] = None,
    gpus: _opt(int, 'number of GPUs', min=1) = 1,
    memory: _opt(float, 'GB of each of them') = 24.0,
    preset: _opt(str, 'coco-1, coco-5, coco-10, coco-full or voc') = 'coco-10',
    images: _opt(int, 'images per step; 0: as published', min=0) = 0,
):
    """Print the settings of the paper's step for your GPUs.

    Images per batch, accumulated batches, learning rate, iterations, T1 and estimated memory, and the command
    that trains. Exit code 1 if the smallest batch does not fit.

    Example: semidetr recipe --gpus 1 --memory 24
    """
    from semidetr.lab.recipe import make_recipe, recipe_lines

    if not memory > 0:
        raise _bad(f'--memory {memory:g} must be above 0')
    found = make_recipe(preset, gpus, memory, images, tuple(settings or ()))
    _say('\n'.join(recipe_lines(found, memory)))
    if not found.fits:
        raise typer.Exit(1)


# %%
assert shell('semidetr recipe --preset small') == 2
assert shell('semidetr recipe --memory 0') == 2

# %% [markdown]
# ## Summary
#
# - `doctor` lists every fault of a data set with file, item and cure, and describes the installation.
# - `build-ops` compiles the attention op; training does it by itself.
# - `split` writes which images keep their labels; the same on every machine.
# - `recipe` prints the settings of the paper's step for any number of GPUs.
#
# ## Exercises
#
# 1. Which of the errors above are found before the first image is decoded?
# 2. Write the contact sheet of your own data. Would you have noticed boxes that are shifted by their own width?
