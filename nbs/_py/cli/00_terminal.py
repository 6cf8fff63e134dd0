# %% [markdown]
# # How a command behaves {#sec-terminal}
#
# > Turn a function into a command whose foreseeable failures are one line each.
#
# A misspelt folder should not end in forty lines of traceback. All commands of this book (@sec-cli) behave
# alike, because they share the code of this chapter:
#
# - a mistake in the input is *one line* on the error stream, `error: ...`, that names file, item and cure;
#   the exit code is 2, and nothing is left half-written. A traceback means a bug in this package;
# - Ctrl-C ends with exit code 130 and a line that says how to resume;
# - `--help` is fast, because nothing heavy is imported before a command needs it.

# %%
#| default_exp cli.terminal

# %%
#| export
import contextlib
import functools
import io
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated
import typer
import semidetr

# %%
#| hide
import tempfile
import matplotlib.pyplot as plt
from semidetr.core import DataError


# %% [markdown]
# ## One line for an error
#
# Which errors can the user cure? Those that the package raises as `SemiDETRError`, those of the operating
# system about a file (no permission, disk full), and a lack of memory. `_one_line` turns these into a
# sentence and leaves everything else alone. It looks the classes up instead of importing them: if torch was
# never imported, none of its errors can have been raised.

# %%
#| export
def _one_line(e):
    "A sentence for the user, or None if the exception is a bug of this package"
    known = getattr(sys.modules.get('semidetr.core'), 'SemiDETRError', ())
    if isinstance(e, known):
        return ' '.join(str(e).split())
    if isinstance(e, OSError) and e.strerror and not isinstance(e, BrokenPipeError):
        cure = 'choose another place, or change its permissions'
        return f'{e.filename}: {e.strerror}; {cure}' if e.filename else e.strerror
    out_of_memory = type(e).__name__ in ('OutOfMemoryError', 'MemoryError')
    if out_of_memory or "DefaultCPUAllocator: can't allocate" in str(e):
        return (
            'memory ran out; take a smaller loader.n_labelled, loader.n_unlabelled, view.max_side or --batch '
            '(optim.accumulate keeps the effective batch)'
        )


def _bad(text):
    "The error for a mistake of the user"
    from semidetr.core import DataError

    return DataError(text)


def _shown(text):
    "Text whose lines a terminal can show: names from files may hold its control codes"
    printable = getattr(sys.modules.get('semidetr.core'), 'printable', None)  # without it no file was read
    return '\n'.join(map(printable, str(text).split('\n'))) if printable else str(text)


def _say(text=''):
    "Print, in the first of several processes"
    if os.environ.get('RANK', '0') == '0':
        print(_shown(text), flush=True)


def _fail(text, code=2):
    "Print an error; returns the exit that ends a command"
    print(_shown(text if code == 130 else f'error: {text}'), file=sys.stderr, flush=True)
    return typer.Exit(code)


# %%
assert _one_line(DataError('a.jpg: cut off;\nrestore it')) == 'a.jpg: cut off; restore it'
assert _one_line(KeyError('x')) is None
_one_line(PermissionError(13, 'Permission denied', 'runs/a'))

# %% [markdown]
# `command` registers a function with [typer](https://typer.tiangolo.com) and handles its errors in this way.
# `main` does the same for errors before a command starts, such as an unknown option.

# %%
#| export
app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help='Train detection transformers from few labelled and many unlabelled images (Semi-DETR).',
    epilog='Example: semidetr demo      Each command has its own: semidetr COMMAND --help',
)


def command(
    name: str = None,  # on the command line; None: that of the function
):  # decorator; the function itself stays as it is
    "A command whose foreseeable failures are one line and an exit code"

    def register(fn):
        @functools.wraps(fn)
        def run(*args, **kwargs):
            try:
                return fn(*args, **kwargs)
            except KeyboardInterrupt as e:
                raise _fail(str(e) or 'stopped', 130) from None
            except Exception as e:
                if (line := _one_line(e)) is None:
                    raise
                raise _fail(line) from None

        app.command(name)(run)
        return fn

    return register


@app.callback(invoke_without_command=True)
def _start(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option('--version', help='print the version and stop')] = False,
):
    if version:
        _say(f'semidetr {semidetr.__version__}')
    elif ctx.invoked_subcommand is None:
        _say(ctx.get_help())


# %%
#| export
def _show_warning(message, category, filename, lineno, file=None, line=None):
    text, note = ' '.join(str(message).split()), getattr(sys.modules.get('semidetr.core'), 'Note', ())
    if issubclass(category, note):
        return _say(f'note: {text}')
    print(_shown(f'warning: {text}'), file=sys.stderr, flush=True)


def _never_fail():
    "Characters that the terminal cannot show are written as their code"
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')


def main(
    argv=None,  # arguments without the program's name; None: those of the process
):
    "Entry point: ends with SystemExit, code 0, 2 (the user can cure it) or 130 (Ctrl-C)"
    _never_fail()
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            code = app(argv, prog_name='semidetr', standalone_mode=False)
        except KeyboardInterrupt:
            code = 130
        except Exception as e:
            if not hasattr(e, 'format_message'):
                raise
            ctx = getattr(e, 'ctx', None)
            path = ctx.command_path if ctx is not None else 'semidetr'
            message = ' '.join(e.format_message().split()).rstrip('.')
            code = _fail(f'{message}; see {path} --help').exit_code
    sys.exit(code if isinstance(code, int) else 0)


def shell(
    line: str,  # 'semidetr ...'
    home: Path,  # folder that it is typed in; written as ~
) -> int:  # exit code
    "Run a command line in this process and print what a terminal would show"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(home):
        try:
            main(line.split()[1:])
        except SystemExit as e:
            code = e.code
    print(f'$ {line}\n{out.getvalue()}{err.getvalue()}[exit {code}]'.replace(str(home.resolve()), '~'))
    return code


# %% [markdown]
# ## What the commands share
#
# Options that mean the same are declared once. `_free` checks an output path *before* the work: an hour of
# training must not end at a folder that cannot be written. It creates nothing. The images for the reported
# numbers are found by `test_split` (@sec-trainer), which says why there are none; an annotation file given as
# `--data` is not a test split of itself.

# %%
#| export
def _opt(kind, text, *names, **kwargs):
    "Annotation of an option"
    return Annotated[kind, typer.Option(*names, help=text, **kwargs)]


Out = _opt(Path, 'folder for the results', '--out', '-o')
Quiet = _opt(bool, 'no progress bars', '--quiet', '-q')
Run = _opt(Path, 'folder of a run, or a checkpoint', '--run', '-r')
Images = _opt(str, 'folder of the images of a COCO file; default: look in the usual places')
Device = _opt(str, 'auto, cpu, cuda, cuda:N')
Nms = _opt(float, 'IoU of per-class suppression; 0: none, as DETR is meant to be used')
_HINT = (
    "COCO JSON, folder with instances_train.json, VOC or YOLO folder, a name under SEMIDETR_DATA, or 'digits'"
)


def _free(path, option='--out', folder=True):
    "DataError if results cannot be written there; nothing is created"
    from semidetr.core import writable_place

    return writable_place(path, option, folder)


def _no_nan(x):
    "None for each NaN, because JSON has none"
    if isinstance(x, dict):
        return {k: _no_nan(v) for k, v in x.items()}
    return None if isinstance(x, float) and x != x else x


# %%
#| export
def read_seeds(
    text: str,  # '5': the first five, 0 to 4; '0,2' or '3-4': these; '3-3': this one
) -> list:  # of int; None: those of the study
    "Seeds as written on the command line"
    if text.isdecimal() and int(text):
        return [*range(int(text))]
    try:
        parts = [[int(x) for x in p.split('-')] for p in text.split(',') if p]
    except ValueError:
        parts = [[]]
    if text == '0' or any(len(p) not in (1, 2) or p[0] > p[-1] for p in parts):
        raise _bad(
            f"--seeds '{text}' is no number of seeds and no list; write 5 for the first five, "
            '0,2 or 3-4 for these, 0-0 for seed 0 alone'
        )
    return [s for p in parts for s in range(p[0], p[-1] + 1)] or None


def read_options(
    items: list,  # 'key=value'
) -> dict:  # numbers where they are whole
    "Options of the cluster as written on the command line"
    if bad := [i for i in items if '=' not in i]:
        raise _bad(f"--option '{bad[0]}' is not of the form key=value, e.g. timeout_min=600")
    options = {}
    for item in items:
        key, _, value = item.partition('=')
        options[key] = int(value) if value.isdigit() else value
    return options


# %%
assert read_seeds('0,2-4') == [0, 2, 3, 4]
assert read_seeds('2-2') == [2] and read_seeds('') is None
read_seeds('5')

# %% [markdown]
# A toy command, and what a terminal shows of it:

# %%
home = Path(tempfile.mkdtemp())


@command()
def halve(number: int, out: Out = Path('half.txt')):
    """Half of an even number.

    Example: semidetr halve 4
    """
    if number % 2:
        raise DataError(f'{number} is odd; give an even number')
    _say(f'{number // 2} goes to {_free(out, folder=False)}')


@command()
def noop():
    "Nothing; if there were one command only, typer would omit its name"


calls = ('halve 4', 'halve 3', 'halve three', 'halve 4 --out .', 'have 4')
codes = [shell(f'semidetr {call}', home) for call in calls]
assert codes == [0, 2, 2, 2, 2]

# %%
#| label: fig-terminal-codes
#| fig-cap: "One call of five succeeds; the four mistakes end with code 2 and one line each. Code 1 is for what fails after the work began."
#| fig-alt: "Exit codes of five calls of the toy command"
fig, ax = plt.subplots(figsize=(5, 1.8), dpi=80)
ax.barh(calls, codes, color='#d62728')
ax.set(xlabel='exit code', xticks=[0, 1, 2])
ax.invert_yaxis()
plt.show()

# %% [markdown]
# ## Summary
#
# - Errors that a user can cure are one line with place and cure and exit code 2; anything else is a
#   traceback, because it is a bug.
# - The output path is checked before the work.
# - Options that mean the same in several commands are declared once.
#
# ## Exercises
#
# 1. Why does `_one_line` not simply catch every exception?
# 2. What would a user see if the disk became full while a checkpoint is written?
