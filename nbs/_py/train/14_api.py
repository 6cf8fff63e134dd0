# %% [markdown]
# # One line of Python {#sec-api}
#
# > Train, evaluate and predict with one call each; same defaults and settings as the commands.
#
# *Why.* Whoever works in a notebook should not have to know less, or more, than whoever types commands. Each
# command has a call of the same options and defaults, and does its work with it, so both give the same run, the
# same numbers and the same files. Settings are made by `plan_run` (@sec-run-plan).
#
# ```python
# import semidetr
#
# run = semidetr.train(data='path/to/coco', percent=5, out='runs/mine')
# run.metrics['dev']['teacher']['AP']
# semidetr.predict(run, 'photo.jpg')
# semidetr.evaluate(run, data='path/to/other')
# ```
#
# | command | call |
# | :--- | :--- |
# | `semidetr train` | `semidetr.train`, a `Run`; its settings alone: `semidetr.plan_run` |
# | `semidetr eval` | `semidetr.evaluate` |
# | `semidetr predict` | `semidetr.predict`, or a `Predictor` for many calls |
# | `semidetr split` | `semidetr.split` |
# | `semidetr doctor` | `semidetr.check_dataset` |
# | `semidetr import`, `semidetr export` | `semidetr.import_weights`, `semidetr.export_run` |

# %%
#| default_exp train.api

# %%
#| hide
import warnings

warnings.filterwarnings('ignore', message='IProgress')

# %%
#| export
import contextlib
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
import torch
from semidetr.core import ConfigError, DataError, is_main, tell, writable_place
from semidetr.progress import track
from semidetr.reading import CONFIG, check_fields, read_result
from semidetr.data.catalog import open_dataset
from semidetr.data.checks import image_files
from semidetr.data.splits import Split, make_split, read_index_list, save_split
from semidetr.train import metrics
from semidetr.train.card import model_card
from semidetr.train.checkpoint import LAST, PREVIOUS
from semidetr.train.config import Config, config_hash, from_saved
from semidetr.train.evaluation import evaluate_model, suppress
from semidetr.train.lock import LOCK
from semidetr.train.loggers import read_loggers
from semidetr.train.machine import prepare
from semidetr.train.plan import (  # noqa: F401 (readers look for them here)
    OPTIONS,
    Plan,
    check_method,
    options_to_settings,
    plan_run,
    settings_list,
    starting_point,
)
from semidetr.train.predict import Predictor, nms_hint
from semidetr.train.predict_files import is_video, predict_folder, predict_video, read_formats
from semidetr.train.run_data import build_data, by_name, drawn_positions, test_split, with_white
from semidetr.train.processes import tell_other_processes
from semidetr.train.run_folder import finished
from semidetr.train.trainer import Trainer

# %%
#| hide
import inspect
import tempfile
import matplotlib.pyplot as plt


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

    @property
    def card(self) -> str:  # Markdown
        "Model card: data, splits, settings, metrics and limits (@sec-card)"
        return model_card(self.result)

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
    progress: bool = True,  # a bar, or lines where there is no terminal
    log: str | Sequence = (),  # 'mlflow', 'wandb', or subclasses of `Logger`; TensorBoard is always on
    say: Callable[[str], Any]
    | None = None,  # gets the notes of the plan, or a line about what is there already
) -> Run:
    """Look up a finished run in the folder, resume a stopped one, or start a new one.

    The notes of a plan are told once: not again when a run goes on, or is looked up.
    """
    say = say or (lambda line: None)
    out, loggers = writable_place(out), read_loggers(log)
    prepare()
    with no_debris(out) as trainers:
        if (result := finished(plan.cfg, out)) is None:
            begun = any((out / name).exists() for name in (LAST, PREVIOUS))
            for line in () if begun else plan.notes:
                say(line)
            trainers.append(Trainer(plan.cfg, out, progress))
            trainers[0].loggers = loggers
            if begun:
                say(f'{out}: goes on after iteration {trainers[0].step} of {plan.cfg.optim.iters}')
            result = trainers[0].fit()
        else:
            say(f'{out}: this run is finished, its result follows; to train again, choose another folder')
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
    method: str = '',  # '': mean_teacher where there are images without labels, else supervised
    detector: str = '',  # a name of `DETECTORS`, e.g. 'deformable_detr_two_stage'; '': that of the preset
    preset: str = '',  # starting point; '': digits or small
    config: str
    | Path
    | dict
    | Config
    | None = None,  # TOML or JSON file or nested dict with what differs from it
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
    log: str | Sequence = (),  # 'mlflow', 'wandb', or subclasses of `Logger`; TensorBoard is always on
    progress: bool = True,  # a bar, or lines where there is no terminal
    say: Callable[[str], Any] | None = print,  # gets one line for each setting that was adapted; None: silent
) -> Run:
    """Train a detector as `semidetr train` does; finished runs are looked up, stopped ones resumed.

    `DataError` and `ConfigError` say in one line what is wrong with data or settings. The folder of the run
    holds its settings, checkpoints, log, metrics and model card; `Run(out)` opens it another day.

    Example: `semidetr.train(data='path/to/coco', percent=5, out='runs/mine').metrics['dev']['teacher']['AP']`
    """
    names = locals()
    options = {k: names[k] for k in OPTIONS}
    plan = plan_run(preset, config, settings, detector, **options)
    return run_plan(plan, out, progress, log, say and (lambda line: say(f'note: {line}')))


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


def _told(hint, p):
    "Tell a hint once for each Predictor"
    if hint and not getattr(p, 'hinted', False):
        p.hinted = True
        tell([hint])


def predict(
    run: 'Run | Predictor | str | Path',  # folder and checkpoint too; a Predictor has its own settings
    source: Any,  # image of any kind (`as_sample`), list of images, folder, or video file
    threshold: float = 0.3,  # lowest score that is reported, in [0, 1]
    nms: float | None = None,  # IoU of per-class suppression; None or 0: none
    classes: str | Sequence[str] = (),  # name of the class to keep, or names; empty: all
    which: str = 'teacher',  # or 'student'
    device: str = 'auto',  # auto, cpu, cuda, cuda:N
    batch: int = 8,  # maximum number of images per forward pass
    out: str | Path | None = None,  # folder: write pictures and files as `semidetr predict` does
    formats: str | Sequence[str] = ('json',),  # of these files: json, csv, yolo
    draw: bool = True,  # write pictures, or the annotated video, to `out`
    ids: str | Path | None = None,  # with `out`: COCO file whose image and category ids to write
    progress: bool = False,  # a bar, or lines where there is no terminal
) -> dict | list:  # dict(boxes (K,4) xyxy pixels, labels (K,), scores (K,), names), or several
    """Detect objects; a warning for each file that cannot be read.

    An image gives a dict, a list of images a list, a folder {file: dict}, a video {frame number: dict}.
    `DataError` where nothing can be read, `ConfigError` for options that contradict each other.

    Example: `semidetr.predict('runs/mine', 'photo.jpg', nms=0.7)['names']`
    """
    formats = read_formats(formats)
    p = open_predictor(run, device, threshold, nms, which, classes)
    path = Path(source) if isinstance(source, (str, Path)) else None
    if path is None and out is not None:
        raise ConfigError(f'out={out} is for images in files; give a path, or draw with Predictor.draw')
    if ids and (out is None or is_video(path)):
        raise ConfigError(f'ids={ids} is for the files of images; give out, and a folder or an image')
    if path is None or (out is None and not is_video(path)):
        found = p(source, batch)
        several = found if isinstance(found, list) else found.values() if path and path.is_dir() else [found]
        if not p.nms:
            _told(nms_hint(several, p.threshold), p)
        return found
    results = predict_to_files(p, path, out, draw, ids, batch, formats if out else (), progress)
    for line in results.notes(p):
        _told(line, p)
    for line in results.broken:
        warnings.warn(line)
    return results.found if path.is_dir() or is_video(path) else results.found[path.name]


# %%
#| export
def predict_to_files(
    predictor: Predictor,  # with network, threshold and suppression
    source: str | Path,  # image, folder or video file
    out: str | Path | None,  # folder for pictures and files; None, for a video: none are written
    draw: bool = True,  # write pictures, or the annotated video
    ids: str | Path | None = None,  # COCO file whose image and category ids to write
    batch: int = 8,  # maximum number of images per forward pass
    formats: tuple = ('json',),  # from `FORMATS`; (): no files of results
    progress: bool = True,  # a bar, or lines where there is no terminal
):  # ResultFiles
    "What `semidetr predict` does: detections of a source, pictures and files of results"
    video = is_video(source)
    bar = lambda items: track(items, 'predict', 'frame' if video else 'batch', progress)
    place = '.' if out is None else writable_place(out)
    if video:
        return predict_video(predictor, source, place, draw and out is not None, batch, bar, formats)
    return predict_folder(predictor, source, place, draw, ids, batch, bar, formats)


# %%
found = predict(run, open_dataset('digits:n=4,size=64', 'val')[0].image, threshold=0.0)
assert len(found['boxes']) == len(found['names']) > 0
sorted(found)


# %% [markdown]
# `evaluate` takes a run, or a network of it, or detections that are there already, whether they stand in a
# dict, in the order of the images, or as rows of COCO's result format.

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


def _networks(run, device, nms):
    "The networks to measure, one after the other: {name: Predictor}"
    if isinstance(run, Predictor):
        yield run.which, run
        return
    path = run.folder if isinstance(run, Run) else run
    if str(path).endswith('.onnx'):
        raise ConfigError('both networks of a run are evaluated: give its folder, not an .onnx file')
    for which in ('teacher',) if str(path).endswith('.safetensors') else ('teacher', 'student'):
        yield which, open_predictor(path, device, nms=nms, which=which)


def evaluate_run(
    run: 'Run | Predictor | str | Path',  # Run, folder of a run, checkpoint, or Predictor
    data: Any = '',  # data set, or what `open_dataset` opens; '': the one of the run
    part: str = 'val',  # val, train, with `data` also test, without it also dev
    nms: float | None = None,  # IoU of per-class suppression; None or 0: none, or that of the Predictor
    device: str = 'auto',  # auto, cpu, cuda, cuda:N
    progress: bool = False,  # a bar, or lines where there is no terminal
    max_dets: int = 100,  # detections per image that count
    images: str | Path = '',  # folder of the images of a COCO file; '': that of the run, or the usual places
    option: str = 'nms',  # what switches suppression on, for the hint
):  # (data set, {'teacher': metrics, 'student': metrics}; of a file with one network its one)
    "COCO metrics of both networks of a run, and the data set that they were measured on"
    result, ds = {}, None
    for which, p in _networks(run, device, nms):
        if ds is None:
            ds = data if hasattr(data, 'annotation') else _part(p.cfg.data, str(data), part, str(images))
        if not ds.has_boxes:
            raise DataError(
                f'{ds.name}: no box to measure against; to draw detections there is semidetr predict'
            )
        notes = getattr(ds, 'notes', [])
        ds, note = by_name(with_white(ds, p.cfg.data.white), p.classes)
        if not result:
            tell([*notes, note] if note else notes)
        text, measured, iou = f'evaluate {which}' if progress else '', {}, nms or p.nms
        how = dict(max_dets=max_dets, measured=measured)
        result[which] = evaluate_model(p.model, ds, p.cfg.view, p.device, iou, text, **how)
        if not iou and len(result) == 1:
            _told(nms_hint(measured.values(), SHOWN, option), p)
    return ds, result


# %%
#| export
SHOWN = 0.3  # lowest score of the boxes that the hint about suppression counts: those that `predict` shows


def _from_rows(ds, rows):
    "Detections from rows of COCO's result format, which may name images by file and classes by name"
    known = {str(i): i for i in ds.ids}
    known |= {str(f): i for f, i in zip(image_files(ds), ds.ids) if f}
    names = {Path(f).name: i for f, i in known.items()}
    kept = {i: [] for i in ds.ids}
    for row in rows:
        key = str(row['image_id'])
        if (i := known.get(key, names.get(Path(key).name))) is None:
            raise DataError(f'{ds.name}: has no image {key}, which the detections name')
        if row.get('category') not in ds.classes:
            raise DataError(f"{ds.name}: has no class '{row.get('category')}', the 'category' of a detection")
        x, y, w, h = row['bbox']
        kept[i].append((x, y, x + w, y + h, row['score'], ds.classes.index(row['category'])))
    found = {}
    for i, values in kept.items():
        table = torch.tensor(values, dtype=torch.float32).reshape(-1, 6)
        found[i] = dict(boxes=table[:, :4], scores=table[:, 4], labels=table[:, 5].long())
    return found


def as_detections(
    ds,  # data set
    found,  # {image id: dict(boxes (K,4) xyxy pixels, labels (K,), scores (K,))}, list of such, or COCO rows
) -> dict:  # {image id: dict}
    "Detections by image id, however they are given; `DataError` where they do not belong to the data set"
    if isinstance(found, dict):
        return found
    if found and 'bbox' in found[0]:
        return _from_rows(ds, found)
    if len(found) != len(ds):
        raise DataError(
            f'{ds.name}: {len(found)} detections for {len(ds)} images; give one dict for each image, in order'
        )
    return dict(zip(ds.ids, found))


# %%
#| export
def evaluate(
    run=None,  # Run, folder of a run, checkpoint, Predictor; or detections; or a data set, as `ds`
    data: Any = '',  # data set to measure on; '': the one of the run; or detections, as `detections`
    part: str = 'val',  # val, train, with `data` also test, without it also dev
    nms: float | None = None,  # IoU of per-class suppression; None or 0: none
    device: str = 'auto',  # auto, cpu, cuda, cuda:N
    progress: bool = False,  # a bar, or lines where there is no terminal
    *,
    ds=None,  # data set, together with `detections`
    detections: dict | list | None = None,  # see `as_detections`
    brief: bool = False,  # of `detections`: AP and AP50 only
    max_dets: int = 100,  # detections per image that count
    images: str | Path = '',  # folder of the images of a COCO file; '': that of the run, or the usual places
) -> dict:  # {'teacher': metrics, 'student': metrics}, in 0..100; for detections: metrics
    """COCO metrics of a run's two networks, as `semidetr eval` prints them, or of one network or detections.

    A `Predictor` gives {its network: metrics}; scores below its threshold count as well, as COCO demands.
    `evaluate(ds, detections)` measures detections that are there already, as a dict by image id, a list in
    the order of the images, or COCO's rows. Metrics are `AP`, `AP50` and so on in 0..100 (@sec-metrics).
    `DataError` where the data have no boxes, or the detections belong to others.

    Example: `semidetr.evaluate('runs/mine', part='dev')['teacher']['AP50']`
    """
    if detections is None and isinstance(run, (dict, list, tuple)):
        detections, run, data = run, ds or data or None, ''
    if detections is None and isinstance(data, (dict, list, tuple)):
        detections, brief = data, part is True or brief
    if detections is None:
        if run is None:
            raise ConfigError('give a run, or a data set and detections')
        return evaluate_run(run, data, part, nms, device, progress, max_dets, images)[1]
    target = run if ds is None else ds
    if target is None:
        raise ConfigError('give the data set that the detections belong to: data=...')
    if isinstance(target, (str, Path)):
        target = open_dataset(str(target), part if isinstance(part, str) else 'val', images=str(images))
    found = as_detections(target, detections)
    return metrics.evaluate(target, suppress(found, nms) if nms else found, brief, max_dets)


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
assert evaluate([*perfect.values()], 'digits:n=4,size=64', brief=True)['AP'] > 99.9
list(scores)


# %% [markdown]
# ## Divide the images
#
# In a small data set a development part of 100 images would leave no image to train on, so at most a fifth is
# held out by default, as in a training.

# %%
#| export
def split(
    data: Any,  # data set, or what `open_dataset` opens
    percent: float | None = None,  # percent of the images that keep their labels, in (0, 100]
    count: int | None = None,  # or: number of labelled images
    shots: int | None = None,  # or: number of labelled images of each class
    fold: int = 0,  # which draw
    dev: int | None = None,  # development images; None: 100, at most a fifth; with `from_file` none
    seed: int = 0,  # another seed, another development part
    cover_classes: bool = False,  # each class has a labelled image (reads hidden labels)
    from_file: str | Path | None = None,  # published list of indices or ids instead of a draw
    convention: str = 'auto',  # what the numbers of `from_file` are: auto, ids, positions
    images: str | Path = '',  # folder of the images of a COCO file
    out: str | Path | None = None,  # JSON file to write, for `split_file` of `train`; None: none
) -> Split:
    """Divide training images into labelled, unlabelled and development part, as `semidetr split` does.

    The same on every machine. Notes say how many labelled images have no box, and what was read from a file.
    `ConfigError` unless exactly one of percent, count and shots is given, `DataError` for too few images.

    Example: `semidetr.split('path/to/coco', percent=5, out='split.json')`
    """
    if out is not None:
        writable_place(out, folder=False)
    ds = data if hasattr(data, 'annotation') else open_dataset(str(data), 'train', images=str(images))
    notes = [*getattr(ds, 'notes', ())]
    if from_file:
        s, found = read_index_list(from_file, ds, percent, fold, convention, dev or 0, seed)
        notes.append(f'{from_file}: read as {found}')
    else:
        dev = min(100, len(ds) // 5) if dev is None else dev
        s = make_split(ds, percent and float(percent), count, fold, dev, seed, cover_classes, shots)
    if ds.has_boxes:
        kept, empty = drawn_positions(ds, [ds.index_of(i) for i in s.labelled])
        if empty:
            text = 'of the labelled images have no box; they are used as negatives (data.background)'
            notes.append(f'{empty} {text}')
        if left := len(s.labelled) - len(kept):
            text = 'of the labelled images have only boxes to be ignored and are left out of training'
            notes.append(f'{left} {text}')
    if out is not None:
        save_split(s, out)
    tell(notes)
    return s


# %%
halves = split('digits:n=20,size=64', percent=50)
assert (len(halves.labelled), len(halves.dev)) == (10, 4)
len(halves.unlabelled)

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
# - Each command does its work with the call, so equal options give the same run, numbers and files.
# - `evaluate` takes a run, a network, or detections as a dict, a list or rows of COCO.
# - `Run` opens a finished run again.
#
# ## Exercises
#
# 1. Train with the command, then call `train` with the same options and folder. What happens, and why?
# 2. Measure the file `detections.json` of `semidetr predict` with `evaluate`. Why does its AP fall with the
#    threshold?
