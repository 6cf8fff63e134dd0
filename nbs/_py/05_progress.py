# %% [markdown]
# # Bars and lines of progress {#sec-progress}
#
# > Show how far a long job is: a bar on a terminal, a plain line now and then everywhere else.
#
# *Why.* A bar redraws one line of a terminal, with characters that move the cursor. In the log file of a job
# that runs overnight, or in a pipe, the same bar is one line of a megabyte in which the error at its end is
# hard to find. So a bar is drawn on terminals only. Elsewhere a job prints a line for every tenth of its work,
# but never two within five seconds, and one at its end. With $n$ of $N$ parts done after $t$ seconds, and $n'$,
# $t'$ at the last line, a line is due if
#
# $$ n - n' \ge N/10 \quad\text{and}\quad t - t' \ge 5 . $$ {#eq-progress-due}
#
# A job whose length is not known, such as a video, prints a line every thirty seconds.

# %%
#| default_exp progress

# %%
#| export
import sys
import time
from tqdm import tqdm

# %%
import io
import matplotlib.pyplot as plt

# %%
#| export
TENTHS, PAUSE, LONG = 10, 5.0, 30.0  # lines per job, seconds between lines, seconds where no length is known


def on_terminal(
    stream,  # a text stream
) -> bool:
    "Can a bar be redrawn there?"
    return bool(getattr(stream, 'isatty', lambda: False)())


def line_is_due(
    done: int,  # parts that are done
    total: int | None,  # parts of the job; None: not known
    seconds: float,  # since the last line
    before: int,  # parts that were done at the last line
) -> bool:
    "Is a line due before the end of the job (@eq-progress-due)?"
    if total is None:
        return seconds >= LONG
    return done - before >= total / TENTHS and seconds >= PAUSE


# %%
assert [line_is_due(n, 100, s, 20) for n, s in ((29, 9.0), (30, 9.0), (30, 1.0))] == [False, True, False]
line_is_due(5, None, 31.0, 4)


# %%
#| export
def _times(n, total, start, now):  # seconds spent, and left if that is known
    spent, done = now - start[1], n - start[0]
    known = total is not None and 0 < done and n < total
    return [f'{spent:.0f} s', *([f'{spent * (total - n) / done:.0f} s left'] if known else [])]


# %%
#| export
class Progress:
    "How far a job is: a bar of tqdm on a terminal, lines elsewhere, on the error stream"

    def __init__(
        self,
        total: int | None = None,  # parts of the job; None: not known
        desc: str = '',  # name of the job
        unit: str = 'it',  # name of a part
        initial: int = 0,  # parts that were done before
        show: bool = True,  # False: nothing at all
        leave: bool = True,  # on a terminal: the bar stays when the job is done
        position: int = 0,  # line of the bar when several share a terminal
        stream=None,  # where to; None: the error stream
        clock=time.monotonic,  # seconds; another one for tests
    ):
        self.stream = sys.stderr if stream is None else stream
        self.desc, self.total, self.unit, self.n, self.clock = desc, total, unit, initial, clock
        self.show, self.shown, self.bar = show, {}, None
        self.start = self.last = (initial, clock())
        if show and on_terminal(self.stream):
            self.bar = tqdm(
                total=total,
                desc=desc,
                unit=unit,
                initial=initial,
                leave=leave,
                position=position,
                file=self.stream,
            )

    def text(self) -> str:
        "The line of this moment: `name: 120/1200 it, 34 s, 306 s left, loss=3.2`"
        count = f'{self.n}' if self.total is None else f'{self.n}/{self.total}'
        parts = [f'{count} {self.unit}', *_times(self.n, self.total, self.start, self.clock())]
        return f"{self.desc}: {', '.join([*parts, *(f'{k}={v}' for k, v in self.shown.items())])}"

    def values(
        self,
        shown: dict,  # name -> text
    ):
        "Values beside the bar, or in the next line"
        self.shown = shown
        if self.bar is not None:
            self.bar.set_postfix(shown, refresh=False)

    def update(
        self,
        n: int = 1,  # parts that were done since the last call
    ):
        "Count parts that are done"
        self.n += n
        if self.bar is not None:
            self.bar.update(n)
        elif self.show and line_is_due(self.n, self.total, self.clock() - self.last[1], self.last[0]):
            self._line()

    def write(
        self,
        text: str,  # a line
    ):
        "Print a line without damage to the bar"
        if self.bar is not None:
            tqdm.write(text, file=self.stream)
        elif self.show:
            print(text, file=self.stream, flush=True)

    def _line(self):
        self.last = (self.n, self.clock())
        print(self.text(), file=self.stream, flush=True)

    def close(self):
        "End the bar, or print the last line if something was done since the one before"
        if self.bar is not None:
            self.bar.close()
        elif self.show and self.n != self.last[0]:
            self._line()
        self.show = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


# %% [markdown]
# A job of 1200 iterations, two per second, whose output is no terminal, and its lines:

# %%
now, file = [0.0], io.StringIO()
with Progress(1200, 'runs/mine', initial=200, stream=file, clock=lambda: now[0]) as job:
    times = []
    for i in range(1000):
        now[0] += 0.5
        job.values(dict(loss=f'{9 - i / 200:.1f}'))
        job.update()
        times.append((now[0], file.getvalue().count('\n')))
lines = file.getvalue().splitlines()
assert lines[0] == 'runs/mine: 320/1200 it, 60 s, 440 s left, loss=8.4'
assert (
    len(lines) == 9
    and lines[-1] == 'runs/mine: 1200/1200 it, 500 s, loss=4.0'
    and '\r' not in file.getvalue()
)
lines[0], lines[-1]


# %% [markdown]
# `track` counts the parts of a loop:

# %%
#| export
def track(
    items,  # iterable
    desc: str = '',  # name of the job
    unit: str = 'it',  # name of a part
    show: bool = True,  # False: nothing at all
    leave: bool = True,  # on a terminal: the bar stays when the job is done
):  # iterator of the items
    "Show how far a loop is: `for x in track(images, 'predict')`"
    total = len(items) if hasattr(items, '__len__') else None
    with Progress(total, desc, unit, show=show, leave=leave) as progress:
        for item in items:
            yield item
            progress.update()


# %%
assert [*track('abc', show=False)] == ['a', 'b', 'c']
on_terminal(io.StringIO())

# %%
#| label: fig-progress-lines
#| fig-cap: "Lines printed by the job above: one for every tenth of its 1200 iterations, whatever its speed."
#| fig-alt: "Staircase of the number of lines against seconds, nine steps of equal height"
fig, ax = plt.subplots(figsize=(4.5, 2.2), dpi=80)
ax.step(*zip(*times), color='#1f77b4', where='post')
ax.set(xlabel='seconds', ylabel='lines')
plt.show()

# %% [markdown]
# ## Summary
#
# - A bar is drawn on a terminal only; a pipe or a file gets a line for every tenth of the work.
# - No line is printed within five seconds of the one before, so a short job prints one line, at its end.
#
# ## Exercises
#
# 1. How many lines does a job of 20 seconds print, and when?
# 2. Why does `close` print nothing if the last line has the final count already?
