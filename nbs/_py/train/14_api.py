# %% [markdown]
# # One line of Python {#sec-api}
#
# > Train, evaluate and predict with one call each; same defaults and settings as the commands.
#
# `semidetr.train(data='photos', unlabelled='more')` must train what `semidetr train --data photos --unlabelled
# more` trains. If a notebook and a command line derived their settings in two places, the two would differ
# some day, and nobody would see it in a loss curve. So the settings of a run are made here, in `plan_run`, and
# the commands (@sec-training) only call it. Equal options give equal configurations, and so the same hash
# (@sec-config) and the same run.
#
# ```python
# import semidetr
#
# run = semidetr.train(data='path/to/coco', percent=5, method='mean_teacher', out='runs/mine')
# run.metrics['dev']['teacher']['AP']
# semidetr.predict(run, 'photo.jpg')
# semidetr.evaluate(run, data='path/to/other')
# ```

# %%
#| default_exp train.api

# %%
#| hide
import warnings

warnings.filterwarnings('ignore', message='IProgress')

# %%
#| export
import contextlib
import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from semidetr.core import ConfigError, DataError, is_main, pick_device, tell
from semidetr.reading import CONFIG, check_fields, read_result
from semidetr.data.catalog import open_dataset
from semidetr.semi.fit import check_fit, without_effect
from semidetr.semi.methods import METHODS, WITH_UNLABELLED, MethodConfig
from semidetr.train import metrics
from semidetr.train.config import (
    Config,
    config_hash,
    from_dict,
    from_saved,
    load_config,
    read_config,
    override,
    with_detector,
)
from semidetr.train.config import preset as preset_named
from semidetr.train.evaluation import evaluate_model
from semidetr.train.lock import LOCK
from semidetr.train.machine import prepare
from semidetr.train.predict import Predictor
from semidetr.train.predict_files import is_video, predict_folder, predict_video, read_formats
from semidetr.train.run_data import build_data, by_name, test_split, with_white
from semidetr.train.processes import tell_other_processes
from semidetr.train.run_folder import finished
from semidetr.train.trainer import Trainer

# %%
#| hide
import inspect
import tempfile
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
    "(Config, names of the settings that the user gave)"
    build = lambda base: override(_with_file(config, base), items)
    choose = lambda base: with_detector(base, detector) if detector else base
    data = build(choose(Config())).data.data
    cfg = build(choose(starting_point(preset, data)))
    if not cfg.data.data:
        raise ConfigError(
            "no data: give --data, a data set of a kind that `semidetr doctor --help` lists, or 'digits'"
        )
    given = {i.partition('=')[0].strip() for i in items}
    return cfg, given | {f'{group}.{k}' for group, fields in _content(config).items() for k in fields}


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
    if d.unlabelled and 'method.name' not in given:
        yield (
            f'method.name={WITH_UNLABELLED}',
            f'--unlabelled is given: method {WITH_UNLABELLED} (--method supervised leaves those images out)',
        )


def _fit_to_method(cfg, given):
    "Overrides that the method derives from the other settings, each with a line about it for the user"
    for name, (value, reason) in cfg.method.implementation.derived(cfg).items():
        if name not in given:
            yield f'{name}={value}', f'{name}={value}: {reason}'


# %%
#| export
def check_method(cfg: Config):  # iterator of lines
    "Lines about settings that do not go together; `ConfigError` if the run cannot work"
    d, m, n = cfg.data, cfg.method, cfg.optim.iters
    partly = d.unlabelled or d.split_file or d.count or d.shots or d.percent not in (0, 100)
    if not m.needs_unlabelled and partly:
        others = ' or '.join(name for name in METHODS if MethodConfig(name).needs_unlabelled)
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
    "What will be run"

    cfg: Config
    notes: tuple  # one line for each setting that was adapted, or that has no effect


def plan_run(
    preset: str = '',  # starting point; '': digits or small
    config: str | Path | dict | None = None,  # file or nested dict with the settings that differ from it
    settings: Sequence[str] | dict = (),  # single settings, 'group.field=value' or {'group.field': value}
    detector: str = '',  # a name of `DETECTORS`; '': that of the preset
    **options,  # keys of OPTIONS; None or '': not given
) -> Plan:
    "Settings of a run: the only place where options become a configuration, for the command and for Python"
    cfg, given = _settings(preset, config, options_to_settings(options) + settings_list(settings), detector)
    pick_device(cfg.run.device)
    check_fit(cfg, METHODS)
    changes = [*_fit_to_data(cfg, given), *_fit_to_method(cfg, given)]
    cfg = override(cfg, [c for c, _ in changes])
    return Plan(cfg, (*(text for _, text in changes), *check_method(cfg), *without_effect(cfg, given)))


# %%
plan = plan_run(data='digits:n=40,size=64', percent=50, method='mean_teacher')
assert plan.cfg.data.dev == 8 and plan.cfg.method.name == 'mean_teacher'
plan.notes


# %% [markdown]
# ## A run in a folder
#
# `Run` is what `train` returns: the folder and what is in it. Another day `Run('runs/mine')` opens it again.

# %%
#| export
class Run:
    "A trained detector: folder, metrics, classes, and `predictor()`"

    def __init__(
        self,
        folder: str | Path,  # of a finished run
        result: dict | None = None,  # content of its run.json; None: read it
    ):
        self.folder = Path(folder)
        path = self.folder / 'run.json'
        if result is None and not path.is_file():
            raise DataError(f'{path}: no such file; this run is not finished, or the folder holds none')
        if result is None:
            result = check_fields(read_result(path), dict(config=CONFIG), path, cure='train again')
            check_fields(result['data'], dict(classes=list[str]), f'{path}: data', cure='train again')
        self.result = result

    @property
    def config(self) -> Config:
        "All settings"
        try:
            return from_saved(self.result['config'])
        except ConfigError as e:
            raise ConfigError(f"{self.folder / 'run.json'}: {e}") from None

    @property
    def hash(self) -> str:
        "Name of the settings"
        return self.result['hash']

    @property
    def metrics(self) -> dict:  # 'dev' or 'val' -> 'teacher' or 'student' -> metrics of `evaluate`, 0..100
        "COCO metrics on the development part and on the test split, where the run has them"
        return self.result['metrics']

    @property
    def classes(self) -> list:
        "Names, in the order of the labels"
        return self.result['data']['classes']

    def predictor(
        self,
        **options,  # device, threshold, nms, which, classes of `Predictor`
    ) -> Predictor:
        "The network of this run, ready for images"
        return Predictor(self.folder, **options)

    def __repr__(self):
        parts = []
        for part, networks in self.metrics.items():
            parts.append(f"{part} AP {networks['teacher']['AP']:.1f}")
        return ', '.join([f"Run('{self.folder}'", *parts]) + ')'


# %%
#| export
@contextlib.contextmanager
def no_debris(
    folder: Path,  # of a run
):  # yields a list for the trainer
    "A run that fails before its first iteration leaves no folder behind, unless it was there or has an owner"
    new, trainers = not folder.exists(), []
    try:
        yield trainers
    except BaseException:
        used = any(t.step for t in trainers) or list(folder.glob('*.pt')) or (folder / LOCK).exists()
        if new and is_main() and not used:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def run_plan(
    plan: Plan,
    out: str | Path,  # folder of the run
    progress: bool = True,  # a bar
) -> Run:
    "Look up a finished run in the folder, resume a stopped one, or start a new one"
    out = Path(out)
    prepare()
    with no_debris(out) as trainers:
        if (result := finished(plan.cfg, out)) is None:
            trainers.append(Trainer(plan.cfg, out, progress))
            result = trainers[0].fit()
        else:
            tell_other_processes(result, out)
        return Run(out, result)


# %% [markdown]
# ## Train
#
# Every option has the name and the default of the command's.

# %%
#| export
def train(
    data: str | Path = '',  # see `open_dataset`; '': that of preset and config, else 'digits'
    unlabelled: str | Path = '',  # more images without labels: a folder is enough
    val: str | Path = '',  # test split; '': the val split of `data`
    images: str | Path = '',  # folder of the images of a COCO file; '': look in the usual places
    method: str = '',  # '': with unlabelled images a semi-supervised one, else supervised
    detector: str = '',  # a name of `DETECTORS`, e.g. 'deformable_detr_two_stage'; '': that of the preset
    preset: str = '',  # starting point; '': digits or small
    config: str | Path | dict | None = None,  # TOML or JSON file, or nested dict, with what differs from it
    percent: float | None = None,  # percent of the training images that keep their labels; None: all
    count: int | None = None,  # or: number of images that keep their labels
    shots: int | None = None,  # or: number of labelled images of each class
    split_file: str | Path = '',  # or: file of `save_split`
    iters: int | None = None,  # iterations; None: as the preset says
    seed: int | None = None,  # None: as the preset says
    threads: int = 0,  # CPU threads; 0: all cores
    out: str | Path = 'runs/train',  # folder of the run
    device: str | None = None,  # auto, cpu, cuda, cuda:N; None: as the preset says
    settings: Sequence[str] | dict = (),  # 'group.field=value' or {'group.field': value}
    progress: bool = True,  # a bar
    say: Callable[[str], Any] | None = print,  # gets one line for each setting that was adapted; None: silent
) -> Run:
    """Train a detector as `semidetr train` does; finished runs are looked up, stopped ones resumed.

    `DataError` and `ConfigError` say in one line what is wrong with data or settings.
    """
    names = locals()
    options = {k: names[k] for k in OPTIONS}
    plan = plan_run(preset, config, settings, detector, **options)
    for text in plan.notes if say else ():
        say(f'note: {text}')
    return run_plan(plan, out, progress)


# %%
toy = dict(
    data='digits:n=20,size=64',
    percent=50,
    iters=2,
    settings={
        'view.short_sides': [64],
        'view.eval_short': 64,
        'run.test': False,
        'loader.num_workers': 0,
        'loader.n_labelled': 2,
        'detector.backbone.weights': 'none',
        'detector.transformer.d_model': 32,
        'detector.transformer.n_heads': 4,
        'detector.transformer.ffn': 32,
        'detector.transformer.num_queries': 20,
        'detector.denoising.num': 8,
    },
)
folder = Path(tempfile.mkdtemp())
run = train(**toy, out=folder / 'run', progress=False)
assert run.hash == config_hash(plan_run(**toy).cfg) and len(run.classes) == 10
assert Run(folder / 'run').hash == run.hash and Run(folder / 'run').metrics.keys() == {'dev'}
repr(run).replace(str(folder), 'runs')


# %% [markdown]
# ## Predict and evaluate

# %%
#| export
def open_predictor(
    run,  # Run, folder of a run, checkpoint, or Predictor
    device: str = 'auto',  # as for `pick_device`
    threshold: float = 0.3,  # lowest score that is reported
    nms: float | None = None,  # IoU of per-class suppression; None or 0: none
    which: str = 'teacher',  # or 'student'
    classes: str | Sequence[str] = (),  # name of the class to keep, or names; empty: all
) -> Predictor:
    "The network that a command or a call names; every kind of file with a network is opened here"
    if isinstance(run, Predictor):
        return run
    path = run.folder if isinstance(run, Run) else run
    names = [classes] if isinstance(classes, str) else list(classes)
    return Predictor(path, device, threshold, nms or None, which, classes=list(filter(None, names)) or None)


def predict(
    run: 'Run | Predictor | str | Path',  # folder and checkpoint too; a Predictor has its own settings
    source: Any,  # image of any kind (`as_sample`), list of images, folder, or video file
    threshold: float = 0.3,  # lowest score that is reported
    nms: float | None = None,  # IoU of per-class suppression; None: none
    classes: str | Sequence[str] = (),  # name of the class to keep, or names; empty: all
    which: str = 'teacher',  # or 'student'
    device: str = 'auto',  # auto, cpu, cuda, cuda:N
    batch: int = 8,  # maximum number of images per forward pass
    out: str | Path | None = None,  # folder: write pictures and files as `semidetr predict` does
    formats: str | Sequence[str] = ('json',),  # of these files: json, csv, yolo
    draw: bool = True,  # write pictures, or the annotated video, to `out`
) -> dict | list:  # dict(boxes (K,4) xyxy pixels, labels (K,), scores (K,), names), or several
    """Detect objects; a warning for each file that cannot be read.

    An image gives a dict, a list of images a list, a folder {file: dict}, a video {frame number: dict}.
    """
    formats = read_formats(formats)
    p = open_predictor(run, device, threshold, nms, which, classes)
    path = Path(source) if isinstance(source, (str, Path)) else None
    if path is None and out is not None:
        raise ConfigError(f'out={out} is for images in files; give a path, or draw with Predictor.draw')
    if path is None or (out is None and not is_video(path)):
        return p(source, batch)
    if is_video(path):
        written = (draw, formats) if out is not None else (False, ())
        results = predict_video(p, path, out or '.', written[0], batch, formats=written[1])
    else:
        results = predict_folder(p, path, out, draw, None, batch, formats=formats)
    for line in results.broken:
        warnings.warn(line)
    return results.found if path.is_dir() or is_video(path) else results.found[path.name]


# %%
found = predict(run, open_dataset('digits:n=4,size=64', 'val')[0].image, threshold=0.0)
assert len(found['boxes']) == len(found['names']) > 0
sorted(found)


# %%
#| export
def _part(cfg, data, part, images):
    "The data set to measure on"
    cfg = replace(cfg, images=images or ('' if data else cfg.images))
    known = ('val', 'train', 'test') if data else ('val', 'dev', 'train')
    if part not in known:
        raise ConfigError(
            f"--part '{part}' is unknown{' with --data' if data else ''}; known: {', '.join(known)}"
        )
    if data or part == 'train':
        return open_dataset(data or cfg.data, part, images=cfg.images)
    dev = 'the run held no development part out'
    ds, why = test_split(cfg) if part == 'val' else (build_data(cfg).dev, dev)
    if ds is None:
        raise DataError(f'{why}; give --data, or another --part (val, dev, train)')
    return ds


def evaluate_run(
    run: 'Run | str | Path',  # Run, folder of a run, or checkpoint
    data: str | Path = '',  # data set; '': the one of the run
    part: str = 'val',  # val, train, with `data` also test, without it also dev
    nms: float | None = None,  # IoU of per-class suppression; None or 0: none
    device: str = 'auto',  # auto, cpu, cuda, cuda:N
    progress: bool = False,  # bars
    max_dets: int = 100,  # detections per image that count
    images: str | Path = '',  # folder of the images of a COCO file; '': that of the run, or the usual places
):  # (data set, {'teacher': metrics, 'student': metrics}; of a .safetensors file its one network, as teacher)
    "COCO metrics of both networks of a run, and the data set that they were measured on"
    result, ds = {}, None
    if isinstance(run, Predictor) or str(run).endswith('.onnx'):
        raise ConfigError(
            'both networks of a run are evaluated: give its folder, not a Predictor or .onnx file'
        )
    for which in ('teacher',) if str(run).endswith('.safetensors') else ('teacher', 'student'):
        p = open_predictor(run, device, nms=nms, which=which)
        ds = ds or _part(p.cfg.data, str(data), part, str(images))
        if not ds.has_boxes:
            raise DataError(
                f'{ds.name}: no box to measure against; to draw detections there is semidetr predict'
            )
        notes = getattr(ds, 'notes', [])
        ds, note = by_name(with_white(ds, p.cfg.data.white), p.classes)
        if which == 'teacher':
            tell([*notes, note] if note else notes)
        text = f'evaluate {which}' if progress else ''
        result[which] = evaluate_model(p.model, ds, p.cfg.view, p.device, p.nms, text, max_dets=max_dets)
    return ds, result


def evaluate(
    run=None,  # Run, folder of a run, checkpoint; or a data set, as `ds`
    data: str | Path = '',  # data set to measure on; '': the one of the run; or a dict, as `detections`
    part: str = 'val',  # val, train, with `data` also test, without it also dev
    nms: float | None = None,  # IoU of per-class suppression; None: none
    device: str = 'auto',  # auto, cpu, cuda, cuda:N
    progress: bool = False,  # bars
    *,
    ds=None,  # data set, together with `detections`
    detections: dict | None = None,  # as for `semidetr.train.metrics.evaluate`
    brief: bool = False,  # of `detections`: AP and AP50 only
    max_dets: int = 100,  # detections per image that count
    images: str | Path = '',  # folder of the images of a COCO file; '': that of the run, or the usual places
) -> dict:  # {'teacher': metrics, 'student': metrics}, in 0..100; for detections: metrics
    """COCO metrics of a run's two networks, as `semidetr eval` prints them.

    `evaluate(ds, detections)` measures detections that are there already (@sec-metrics).
    """
    if detections is None and isinstance(data, dict):
        detections, brief = data, part is True or brief
    if detections is not None:
        return metrics.evaluate(run if ds is None else ds, detections, brief, max_dets)
    if run is None:
        raise ConfigError('give a run, or a data set and detections')
    return evaluate_run(run, data, part, nms, device, progress, max_dets, images)[1]


# %%
scores = evaluate(run, part='dev', device='cpu')
assert abs(scores['teacher']['AP'] - run.metrics['dev']['teacher']['AP']) < 1e-6
toy_scenes = open_dataset('digits:n=4,size=64', 'val')
perfect = {}
for i, image_id in enumerate(toy_scenes.ids):
    a = toy_scenes.annotation(i)
    perfect[image_id] = dict(
        boxes=a['boxes'], labels=a['labels'], scores=a['boxes'].new_ones(len(a['boxes']))
    )
assert evaluate(toy_scenes, perfect, brief=True)['AP'] > 99.9
list(scores)

# %% [markdown]
# The package `semidetr.train` can be called: `semidetr.train(...)` is `train` of this chapter, while
# `import semidetr.train.trainer` finds the module as before.

# %%
#| hide
import semidetr

# %%
names = list(inspect.signature(semidetr.train).parameters)
assert names == list(inspect.signature(train).parameters)
names[:6]

# %%
#| label: fig-api-detections
#| fig-cap: "After two iterations the detector knows nothing: no score of its best detections reaches the default threshold (dashed)."
#| fig-alt: "Scores of the detections of one scene in descending order, all below a dashed line at 0.3"
fig, ax = plt.subplots(figsize=(4.5, 2.2), dpi=80)
ax.plot(found['scores'][:20], 'o', color='#ff7f0e')
ax.axhline(0.3, ls='--', color='.5')
ax.set(xlabel='detection', ylabel='score', ylim=(0, 0.5))
plt.show()

# %% [markdown]
# ## Summary
#
# - `semidetr.train`, `semidetr.predict` and `semidetr.evaluate` do what the commands of the same names do.
# - Options become settings in `plan_run` alone, so a command and a call with equal options are the same run.
# - A setting that is adapted to the data is a note; your own settings are not changed.
# - `Run` opens a finished run again.
#
# ## Exercises
#
# 1. Train with the command, then call `train` with the same options and folder. What happens, and why?
# 2. Why does `threads` not change the hash?
