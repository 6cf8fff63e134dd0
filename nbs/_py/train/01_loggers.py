# %% [markdown]
# # Where the numbers of a run go {#sec-loggers}
#
# > Send the numbers of a run to TensorBoard, MLflow or Weights & Biases through one small interface.
#
# *Why.* A laboratory that follows its trainings on one page wants these runs there, too. A call of its program
# in the training loop would make that program a dependency of everybody, and end a training of a day when its
# server does not answer. So the loop knows one interface, two functions; each program is an optional extra
# behind it; and a logger that fails is left out with a warning, since the numbers are in `log.jsonl` anyway.
#
# | name | program | extra |
# | :--- | :--- | :--- |
# | `tensorboard` | TensorBoard; always on, files in the folder of the run | none |
# | `mlflow` | MLflow; where to: its variable MLFLOW_TRACKING_URI | `mlflow` |
# | `wandb` | Weights & Biases; project: its variable WANDB_PROJECT, or semidetr | `wandb` |
#
# ```bash
# semidetr train --data path/to/data --percent 5 --log mlflow
# ```

# %%
#| default_exp train.loggers

# %%
#| hide
import warnings

warnings.filterwarnings('ignore', message='IProgress')

# %%
#| export
import json
import os
import warnings
from pathlib import Path
from semidetr.core import ConfigError, atomic_write, need, suggest
from semidetr.reading import read_small_json

# %%
import sys
import tempfile
from types import ModuleType, SimpleNamespace
import matplotlib.pyplot as plt


# %% [markdown]
# ## The interface
#
# A logger is made when the loop begins and when it resumes: with the folder, the number of finished iterations
# and all settings. A program that names its runs gets the name that it gave before, from the file
# `loggers.json` in the folder, so a resumed run is one curve.

# %%
#| export
class Logger:
    "What a training sends its numbers to; subclasses say where they go"

    def __init__(
        self,
        folder: Path,  # of the run
        step: int,  # finished iterations
        settings: dict,  # name -> value of all settings of the run
    ):
        self.folder, self.step = Path(folder), step

    def write(
        self,
        numbers: dict,  # name -> int or float
        step: int,  # finished iterations
    ):
        "Numbers of an iteration"
        raise NotImplementedError

    def close(self):
        "The training ended or stopped"


def known_name(
    folder: Path,  # of the run
    logger: str,  # name of the logger
    name: str = '',  # that the program gave to this run; '': read it
) -> str:  # '' if there is none
    "The name of a run in another program, kept in `loggers.json`"
    path = Path(folder) / 'loggers.json'
    names = read_small_json(path) if path.exists() else {}
    names = names if isinstance(names, dict) else {}
    if name and names.get(logger) != name:
        atomic_write(path, json.dumps(names | {logger: name}))
    return name or str(names.get(logger, ''))


# %%
place = Path(tempfile.mkdtemp())
assert known_name(place, 'mlflow') == '' and known_name(place, 'mlflow', 'a1') == 'a1'
known_name(place, 'mlflow')


# %%
#| export
class TensorBoard(Logger):
    "Event files in the folder of the run; what was written after the checkpoint is dropped"

    def __init__(self, folder, step, settings):
        super().__init__(folder, step, settings)
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(folder), purge_step=step)

    def write(self, numbers, step):
        for name, value in numbers.items():
            self.board.add_scalar(name, value, step)

    def close(self):
        self.board.close()


class MLflow(Logger):
    "A run of MLflow: settings as parameters, numbers as metrics"

    def __init__(self, folder, step, settings):
        super().__init__(folder, step, settings)
        self.mlflow = need('mlflow', 'logging to mlflow', 'mlflow')
        before = known_name(folder, 'mlflow')
        run = self.mlflow.start_run(run_id=before or None, run_name=self.folder.name)
        known_name(folder, 'mlflow', run.info.run_id)
        texts = [(name, str(value)[:500]) for name, value in settings.items()]  # its limits: 500, 100 at once
        for first in range(0, 0 if before else len(texts), 100):
            self.mlflow.log_params(dict(texts[first : first + 100]))

    def write(self, numbers, step):
        self.mlflow.log_metrics(numbers, step=step)

    def close(self):
        self.mlflow.end_run()


class WandB(Logger):
    "A run of Weights & Biases; the axis of its curves is `iteration`, so a run may go back"

    def __init__(self, folder, step, settings):
        super().__init__(folder, step, settings)
        wandb = need('wandb', 'logging to wandb', 'wandb')
        self.run = wandb.init(
            project=os.environ.get('WANDB_PROJECT', 'semidetr'),
            name=self.folder.name,
            dir=str(folder),
            id=known_name(folder, 'wandb') or None,
            resume='allow',
            config=settings,
        )
        known_name(folder, 'wandb', self.run.id)
        self.run.define_metric('*', step_metric='iteration')

    def write(self, numbers, step):
        self.run.log(numbers | dict(iteration=step))

    def close(self):
        self.run.finish()


# %% [markdown]
# ## Several at once

# %%
#| export
LOGGERS = dict(tensorboard=TensorBoard, mlflow=MLflow, wandb=WandB)


def read_loggers(
    log,  # 'mlflow,wandb', or a sequence of names and subclasses of `Logger`
) -> tuple:  # of subclasses of `Logger`, without TensorBoard, which is always there
    "The loggers that are asked for; `ConfigError` for an unknown one, or one whose program is missing"
    found = []
    for item in log.split(',') if isinstance(log, str) else log or ():
        name = item.strip().lower() if isinstance(item, str) else ''
        if name and name not in LOGGERS:
            raise ConfigError(f"logger '{name}' is unknown; {suggest(name, LOGGERS)}")
        if name in ('mlflow', 'wandb'):
            need(name, f'logging to {name}', name)
        kind = LOGGERS[name] if name else item
        if kind and kind is not TensorBoard:
            found.append(kind)
    return tuple(found)


class Loggers:
    "Some loggers as one; the first failure of one is a warning, and it is left out from then on"

    def __init__(
        self,
        kinds,  # subclasses of `Logger`
        folder: Path,  # of the run
        step: int,  # finished iterations
        settings: dict,  # name -> value of all settings of the run
    ):
        self.open = []
        for kind in kinds:
            if logger := self._guarded(kind, kind, folder, step, settings):
                self.open.append(logger)

    def _guarded(self, logger, call, *args):
        "The result of a call; a failure is a warning"
        try:
            return call(*args)
        except ConfigError:
            raise
        except Exception as e:
            name = getattr(logger, '__name__', type(logger).__name__)
            reason = (str(e).splitlines() or [type(e).__name__])[0]
            warnings.warn(f'{name}: {reason[:200]}; left out, the numbers are in log.jsonl', stacklevel=3)
            self.open = [o for o in self.open if o is not logger]

    def write(
        self,
        row: dict,  # of the log: names and values, `step` among them
    ):
        "The numbers of a row"
        numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and k != 'step'}
        for logger in [*self.open]:
            self._guarded(logger, logger.write, numbers, row['step'])

    def close(self):
        "Close them all"
        for logger in [*self.open]:
            self._guarded(logger, logger.close)


# %% [markdown]
# A stand-in for MLflow shows what is sent. It fails at the third row, which costs a warning and nothing else:

# %%
sent = []


def log_metrics(numbers, step):
    if step == 3:
        raise OSError('no answer')
    sent.append((step, numbers))


toy = ModuleType('mlflow')
toy.start_run = lambda run_id, run_name: SimpleNamespace(info=SimpleNamespace(run_id='a2'))
toy.log_params, toy.log_metrics, toy.end_run = lambda params: sent.append(params), log_metrics, lambda: None
before, sys.modules['mlflow'] = sys.modules.get('mlflow'), toy
folder = Path(tempfile.mkdtemp())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    loggers = Loggers(read_loggers('mlflow'), folder, 0, {'optim.lr': 0.001})
    for n in (1, 2, 3, 4):
        loggers.write(dict(step=n, loss=4.0 / n, note='not a number'))
    loggers.close()
sys.modules.pop('mlflow') if before is None else sys.modules.update(mlflow=before)
assert sent == [{'optim.lr': '0.001'}, (1, dict(loss=4.0)), (2, dict(loss=2.0))]
assert known_name(folder, 'mlflow') == 'a2' and loggers.open == []
[str(w.message) for w in caught]

# %%
#| label: fig-loggers-sent
#| fig-cap: "Four rows of a run, and the two that the stand-in received before it failed: the training went on, and log.jsonl has all of them."
#| fig-alt: "Loss against iteration, four dots, two of them filled"
fig, ax = plt.subplots(figsize=(4, 2.2), dpi=80)
ax.plot([1, 2, 3, 4], [4 / n for n in (1, 2, 3, 4)], 'o', mfc='none', color='#1f77b4', label='log.jsonl')
ax.plot([s for s, _ in sent[1:]], [n['loss'] for _, n in sent[1:]], 'o', color='#1f77b4', label='logger')
ax.set(xlabel='iteration', ylabel='loss', xticks=[1, 2, 3, 4])
ax.legend()
plt.show()

# %% [markdown]
# ## Summary
#
# - A logger has `write` and `close`; TensorBoard is always there, MLflow and Weights & Biases on demand.
# - A failure of a logger never ends a training.
# - A logger of your own is a subclass: `semidetr.train(..., log=[Mine])`.
#
# ## Exercises
#
# 1. Write a logger that appends a line to a CSV file.
# 2. A run goes back to its checkpoint. What do its curves show in each of the three programs?
