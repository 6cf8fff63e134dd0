# %% [markdown]
# # From options to settings {#sec-run-plan}
#
# > Turn a few options into all settings of a run; adapt what you left open, and say each change.
#
# *Why.* `semidetr.train(data='photos', percent=5)` must train what `semidetr train --data photos --percent 5`
# trains. If a notebook and a command line derived their settings in two places, the two would differ some day,
# and nobody would see it in a loss curve. So `plan_run` alone makes the settings of a run; the commands
# (@sec-training) and the calls in Python (@sec-api) use it. Equal options give equal configurations, and so the
# same hash (@sec-config) and the same run.

# %%
#| default_exp train.plan

# %%
#| hide
import warnings

warnings.filterwarnings('ignore', message='IProgress')

# %%
#| export
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from semidetr.core import ConfigError, DataError, pick_device
from semidetr.data.catalog import open_dataset
from semidetr.semi.fit import check_fit, methods_of, without_effect
from semidetr.semi.methods import METHODS, WITH_UNLABELLED, MethodConfig
from semidetr.train.card import flat_settings
from semidetr.train.config import (
    Config,
    config_hash,
    from_dict,
    load_config,
    override,
    read_config,
    with_detector,
)
from semidetr.train.config import preset as preset_named
from semidetr.train.run_data import test_split

# %%
#| hide
import matplotlib.pyplot as plt

# %% [markdown]
# ## Options are settings
#
# An option such as `percent=5` is a short name for the setting `data.percent=5`. The options that divide the
# images exclude each other, and reset what the preset says about it.

# %%
#| export
OPTIONS = dict(  # option of `train` -> setting
    data='data.data',
    unlabelled='data.unlabelled',
    val='data.val',
    images='data.images',
    split_file='data.split_file',
    method='method.name',
    percent='data.percent',
    count='data.count',
    shots='data.shots',
    iters='optim.iters',
    seed='run.seed',
    device='run.device',
    threads='run.threads',
)


def options_to_settings(
    options: dict,  # keys of OPTIONS; None or '': not given
) -> list:  # of 'group.field=value'
    "Options of `train` as settings; `ConfigError` where they contradict each other"
    for name in options:
        if name not in OPTIONS:
            raise ConfigError(f"option '{name}' is unknown; known: {', '.join(OPTIONS)}")
    given = {k: v for k, v in options.items() if v not in (None, '')}
    percent = given.get('percent')
    if percent is not None and not 0 < percent <= 100:
        raise ConfigError(f"--percent {percent:g} is outside (0, 100]; 10 means ten percent")
    for k in ('count', 'shots', 'iters'):
        if k in given and given[k] < 1:
            raise ConfigError(f'--{k} {given[k]} must be at least 1')
    divided = [k for k in ('percent', 'count', 'shots', 'split_file') if k in given]
    if len(divided) > 1:
        raise ConfigError('give one of --percent, --count, --shots and --split-file')
    reset = [f'data.{k}=0' for k in ('percent', 'count', 'shots')] if divided else []
    return reset + [f'{name}={given[k]}' for k, name in OPTIONS.items() if k in given]


def settings_list(
    settings,  # list of 'group.field=value', or dict {'group.field': value}
) -> list:  # of 'group.field=value'
    "Single settings, however they are given"
    if not isinstance(settings, dict):
        return [settings] if isinstance(settings, str) else list(settings or ())
    text = lambda v: str(v) if isinstance(v, (str, Path)) else json.dumps(v)
    return [f'{k}={text(v)}' for k, v in settings.items()]


# %%
assert options_to_settings(dict(data='a', percent=5, seed=None)) == [
    'data.percent=0',
    'data.count=0',
    'data.shots=0',
    'data.data=a',
    'data.percent=5',
]
assert settings_list({'optim.lr': 1e-3, 'view.short_sides': [64, 80]}) == [
    'optim.lr=0.001',
    'view.short_sides=[64, 80]',
]
settings_list({'optim.lr': 1e-3, 'run.test': False})


# %% [markdown]
# ## Settings of a run
#
# They come from four places: preset, configuration file, options, single settings (@sec-config); a later one
# replaces an earlier one. Then they are adapted to the data where you did not set them yourself, and each
# change is a note of one line.

# %%
#| export
def starting_point(
    preset: str,  # name; '': 'digits' for the built-in scenes, else 'small'
    data: str,  # as for `open_dataset`
) -> Config:
    "The configuration that everything else changes"
    return preset_named(preset or ('digits' if data.partition(':')[0] == 'digits' else 'small'))


def _with_file(config, base):
    "`base`, changed by a configuration file or by a nested dict"
    if not config:
        return base
    return from_dict(config, base) if isinstance(config, dict) else load_config(config, base)


def _content(config):
    "Nested values of a configuration that has been checked"
    if not config or isinstance(config, dict):
        return config or {}
    return read_config(config)


def _settings(preset, config, items, detector):
    "(Config, what it started from, names of the settings that the user gave)"
    choose = lambda base: with_detector(base, detector) if detector else base
    if isinstance(config, Config):
        if preset:
            raise ConfigError(
                f"preset '{preset}' and a Config: give one of them; a Config holds all settings"
            )
        return override(choose(config), items), config, set()
    build = lambda base: override(_with_file(config, base), items)
    start = starting_point(preset, build(choose(Config())).data.data)
    given = {i.partition('=')[0].strip() for i in items}
    return build(choose(start)), start, given | set(flat_settings(_content(config)))


# %% [markdown]
# The rules, in their order. A setting that you gave is never changed.
#
# | setting | becomes | when |
# | :--- | :--- | :--- |
# | `data.dev` | a fifth of the images | they are fewer than five times the development part |
# | `run.test` | false | there is no test split |
# | `method.name` | `mean_teacher` | there are images without labels |
# | `method.burn_in_iters`, `method.T1` | their part of the iterations in the preset | the burn-in would take all |
# | `method.T1` and others | what the method says | always |
#
# Why is the default for images without labels a mean teacher? It is the simplest method that learns from them,
# and it trains every detector. The others are one word away.

# %%
#| export
def partly_labelled(
    data,  # DataConfig
) -> bool:
    "Are there training images without labels?"
    divided = data.split_file or data.count or data.shots or data.percent not in (0, 100)
    return bool(data.unlabelled or divided)


def _with_unlabelled(cfg):
    "Methods that train this detector, and learn from images without labels"
    return [name for name in methods_of(cfg.detector, METHODS) if MethodConfig(name).needs_unlabelled]


def _fit_to_data(cfg, given):
    "Overrides that these data need, each with a line about it for the user"
    d, train = cfg.data, open_dataset(cfg.data.data, 'train', images=cfg.data.images)
    if not train.has_boxes:
        raise DataError(f'{d.data}: no box to learn from; images without labels belong to --unlabelled')
    most = len(train) // 5
    if 'data.dev' not in given and not d.split_file and d.dev > most:
        yield (
            f'data.dev={most}',
            f'{len(train)} images: {most} of them, not {d.dev}, are held out as development part (data.dev)',
        )
    if cfg.run.test and 'run.test' not in given:
        val, why = test_split(d, train)
        if val is None:
            yield (
                'run.test=false',
                f'no test split ({why}): the development part alone is measured; --val names one',
            )
    if partly_labelled(d) and 'method.name' not in given and not cfg.method.needs_unlabelled:
        others = [n for n in _with_unlabelled(cfg) if n != WITH_UNLABELLED]
        yield (
            f'method.name={WITH_UNLABELLED}',
            f'method {WITH_UNLABELLED}: it learns from the images without labels, with any detector '
            f'(--method {", ".join(others)}: other ways; --method supervised: leave those images out)',
        )


def _fit_to_length(cfg, start, given):
    "Overrides for a run that would end before its burn-in does, with a line about it for the user"
    m, n = cfg.method, cfg.optim.iters
    if 'method.burn_in_iters' in given or not m.needs_unlabelled or m.burn_in_iters < n:
        return
    part = n / start.optim.iters
    burn_in = round(start.method.burn_in_iters * part)
    yield (
        f'method.burn_in_iters={burn_in}',
        f'method.burn_in_iters={burn_in}: the burn-in is shortened from {m.burn_in_iters}, '
        f'as the run has {n} iterations',
    )
    if 'method.T1' not in given:
        yield f'method.T1={round(start.method.T1 * part)}', ''


def _fit_to_method(cfg, given):
    "Overrides that the method derives from the other settings, each with a line about it for the user"
    for name, (value, reason) in cfg.method.implementation.derived(cfg).items():
        if name not in given:
            yield f'{name}={value}', f'{name}={value}: {reason}'


def _adapted(cfg, start, given):
    "(Config, lines): what the user left open, adapted to data, length and method"
    lines = []
    for changes in (
        lambda c: _fit_to_data(c, given),
        lambda c: _fit_to_length(c, start, given),
        lambda c: _fit_to_method(c, given),
    ):
        found = list(changes(cfg))
        cfg = override(cfg, [change for change, _ in found])
        lines += [text for _, text in found if text]
    return cfg, lines


# %% [markdown]
# A `Config` that you made yourself is taken as it is. Where the rules would have chosen otherwise, a note says
# so.

# %%
#| export
def _not_adapted(cfg):
    "Lines about settings of a Config that the method would derive otherwise"
    for name, (value, reason) in cfg.method.implementation.derived(cfg).items():
        if override(cfg, [f'{name}={value}']) != cfg:
            yield f'{name} stays as the Config has it; without it: {name}={value}, {reason}'


def check_method(cfg: Config):  # iterator of lines
    "Lines about settings that do not go together; `ConfigError` if the run cannot work"
    m, n, partly = cfg.method, cfg.optim.iters, partly_labelled(cfg.data)
    if not m.needs_unlabelled and partly:
        others = ' or '.join(_with_unlabelled(cfg))
        yield f'method {m.name}: unlabelled images are not used (--method {others} learns from them)'
    if m.needs_unlabelled and not partly:
        raise ConfigError(
            f'method {m.name} needs unlabelled images: --unlabelled FOLDER, or keep the labels of a part '
            'with --percent, --count or --shots'
        )
    if m.needs_unlabelled and m.burn_in_iters >= n:
        yield (
            f'method.burn_in_iters={m.burn_in_iters} takes all of the {n} iterations; no unlabelled image '
            'will be used'
        )


@dataclass(frozen=True)
class Plan:
    "What will be run: `cfg` for `Trainer`, and a line in `notes` for each setting that was adapted"

    cfg: Config
    notes: tuple  # one line for each setting that was adapted, or that has no effect

    @property
    def hash(self) -> str:
        "Name of the settings, as `config_hash` gives it"
        return config_hash(self.cfg)


# %%
#| export
def plan_run(
    preset: str = '',  # starting point; '': digits or small
    config: str
    | Path
    | dict
    | Config
    | None = None,  # what differs from it: file or nested dict; or all settings
    settings: Sequence[str] | dict = (),  # single settings, 'group.field=value' or {'group.field': value}
    detector: str = '',  # a name of `DETECTORS`; '': that of the preset
    **options,  # keys of OPTIONS; None or '': not given
) -> Plan:
    """Settings of a run: the only place where options become a configuration, for the command and for Python.

    `Trainer(plan_run(data='photos', percent=5).cfg, 'runs/mine').fit()` trains what the command trains.
    `ConfigError` for settings that contradict each other, `DataError` for data that cannot be read.
    """
    items = options_to_settings(options) + settings_list(settings)
    cfg, start, given = _settings(preset, config, items, detector)
    if not cfg.data.data:
        raise ConfigError(
            "no data: give --data, a data set of a kind that `semidetr doctor --help` lists, or 'digits'"
        )
    pick_device(cfg.run.device)
    check_fit(cfg, METHODS)
    if isinstance(config, Config):
        lines = list(_not_adapted(cfg))
    else:
        cfg, lines = _adapted(cfg, start, given)
    return Plan(cfg, (*lines, *check_method(cfg), *without_effect(cfg, given)))


# %%
plan = plan_run(data='digits:n=40,size=64', percent=50)
assert plan.cfg.data.dev == 8 and plan.cfg.method.name == 'mean_teacher'
assert plan_run(data='digits:n=40,size=64', percent=50, threads=2, device='cpu').hash == plan.hash
plan.notes

# %%
short = plan_run(data='digits:n=40,size=64', percent=50, method='semi_detr', iters=100).cfg
mine = override(
    preset_named('digits'), ['data.data=digits:n=40,size=64', 'data.dev=8', 'method.name=semi_detr']
)
as_it_is = plan_run(config=mine)
assert (short.method.burn_in_iters, short.method.T1) == (50, 75)
assert as_it_is.cfg == mine and 'T1 stays' in as_it_is.notes[0]
as_it_is.notes

# %%
#| label: fig-plan-length
#| fig-cap: "The parts of a Semi-DETR run by its length: a run that is shorter than the burn-in of its preset (800 iterations with a burn-in of 400) keeps the proportions."
#| fig-alt: "Stacked bars for runs of 100 to 1600 iterations: burn-in, one-to-many matching, one-to-one matching"
lengths = (100, 200, 400, 800, 1600)
parts = []
for n in lengths:
    m = plan_run(data='digits:n=40,size=64', count=9, method='semi_detr', iters=n).cfg.method
    parts.append((m.burn_in_iters / n, (m.T1 - m.burn_in_iters) / n, (n - m.T1) / n))
fig, ax = plt.subplots(figsize=(5, 2.2), dpi=80)
left = [0] * len(lengths)
names = ('burn-in', 'one-to-many', 'one-to-one')
for share, name, color in zip(zip(*parts), names, ('.7', '#1f77b4', '#ff7f0e')):
    ax.barh([str(n) for n in lengths], share, left=left, color=color, label=name)
    left = [a + b for a, b in zip(left, share)]
ax.set(xlabel='part of the run', ylabel='iterations', xlim=(0, 1))
ax.legend(fontsize=9, loc='upper center', bbox_to_anchor=(0.5, 1.25), ncol=3, frameon=False)
plt.show()

# %% [markdown]
# ## Summary
#
# - Options become settings in `plan_run` alone, so a command and a call with equal options are the same run.
# - What you left open is adapted to data, length and method, and each change is a note; your own settings are
#   not changed.
# - A `Config` is taken as it is, and a note says where the rules would have chosen otherwise.
#
# ## Exercises
#
# 1. Why does `threads` not change the hash?
# 2. Which rule would you add for a data set with one image?
