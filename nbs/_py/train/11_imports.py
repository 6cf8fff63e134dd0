# %% [markdown]
# # Import weights as a run {#sec-imports}
#
# > Turn a file of another program into the folder of a run, to predict with or to train on.
#
# *Why.* Weights under the right names (@sec-weights) are not enough to use them: predictions need settings and
# names of classes, training needs a place to start from. The folder of a run has all of this. So an import
# writes one: `Predictor` and `semidetr predict` take it as they take any run, `run.init` starts from it, and
# training from a checkpoint of the official Semi-DETR has its teacher and its projector as well.

# %%
#| default_exp train.imports

# %%
#| hide
import warnings

warnings.filterwarnings('ignore', message='IProgress')

# %%
#| export
import json
from dataclasses import replace
from pathlib import Path
import torch
from semidetr.core import ConfigError, DataError, atomic_write
from semidetr.detectors.backbone import BackboneConfig, build_backbone
from semidetr.detectors.backbone_weights import convert_backbone, recognise_backbone
from semidetr.detectors.contract import build_detector
from semidetr.detectors.weight_files import map_class_rows, read_weights, row_names
from semidetr.detectors.weight_names import KINDS, Report, Row, recognise
from semidetr.detectors.weights import Converted, convert
from semidetr.train.checkpoint import is_backbone_alone, load_checkpoint, save_checkpoint
from semidetr.train.config import Config, from_saved, preset, to_dict, with_detector

# %%
import tempfile
import matplotlib.pyplot as plt
from semidetr.detectors.deformable_detr import deformable_detr_small
from semidetr.train.predict import Predictor


# %% [markdown]
# ## Names of classes
#
# The names of the rows come from the file where it has them (`id2label`, `CLASSES`), from you (`classes`), or
# from the number of rows: 91 rows are ids of COCO, 80 its classes, 20 those of VOC. Such a guess is said in the
# report. Rows of ids that no image has are dropped; with `to`, rows move to the names of your data
# (@eq-weights-rows).
#
# DINO has a table of labels for its denoising queries, with more rows than classes. It is cut to two rows more
# than classes, as in the released Semi-DETR, whose presets are then settings that fit.

# %%
#| export
def select_classes(
    converted: Converted,
    names: list,  # of the rows; 'N/A': not used
    to: list = None,  # names of the wanted classes; None: all that are used
) -> tuple:  # (Converted with these rows, wanted names)
    "Keep, move and add rows of classes by name; the report says so"
    to = list(to) if to else [name for name in names if name != 'N/A']
    repeated = sorted({name for name in to if to.count(name) > 1})
    if repeated:
        raise DataError(f"{converted.report.origin}: class '{repeated[0]}' occurs twice; names must differ")
    if to == names:
        return converted, to
    unique = [name if name != 'N/A' else f'unused row {i}' for i, name in enumerate(names)]
    settings = replace(converted.settings, num_classes=len(to))
    if hasattr(settings, 'denoising') and settings.denoising.label_rows:
        rows = len(to) + min(2, max(0, settings.denoising.label_rows - len(names) + 1))
        settings = replace(settings, denoising=replace(settings.denoising, label_rows=rows))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = build_detector(settings.untrained()).state_dict()
    networks, notes = {}, []
    for network in ('state', 'teacher'):
        if (state := getattr(converted, network)) is not None:
            networks[network], notes = map_class_rows(state, unique, to, fresh)
    report = replace(converted.report, notes=[*converted.report.notes, *notes])
    return replace(converted, settings=settings, report=report, **networks), to


# %% [markdown]
# ## The folder
#
# `last.pt` holds configuration, classes and both networks, as in a run that has just begun. The images are
# resized and normalised as in the releases (short side 800, at most 1333, statistics of ImageNet). Half precision
# becomes float32.

# %%
#| export
def _float32(state):
    "Tensors as float32 that are stored in another precision of floating point"
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}


def _run_config(kind, settings) -> Config:
    "The configuration of an imported run: that of the paper for its own code, else its views alone"
    paper = preset('coco-10')
    base = paper if kind == 'official' else replace(Config(), view=paper.view)
    return replace(base, detector=settings)


def _write(out, converted, cfg, classes, **more):
    "last.pt, config.json and report.json"
    student = _float32(converted.state)
    teacher = student if converted.teacher is None else _float32(converted.teacher)
    save_checkpoint(
        out / 'last.pt',
        config=to_dict(cfg),
        classes=classes,
        step=0,
        student=student,
        teacher=teacher,
        parts=converted.parts or {},
        imported=dict(kind=converted.report.kind, origin=converted.report.origin, **more),
    )
    atomic_write(out / 'config.json', json.dumps(to_dict(cfg), indent=1))
    atomic_write(
        out / 'report.json', json.dumps(converted.report.to_dict() | dict(classes=classes), indent=1)
    )


def _import_run(file, out, to, like):
    "A run of ours: the networks of its checkpoint with the wanted classes"
    saved = load_checkpoint(file.path)
    for key in ('config', 'classes', 'student', 'teacher'):
        if key not in saved:
            raise DataError(f"{file.path}: holds no '{key}'; give the folder of a run, or its last.pt")
    if is_backbone_alone(saved):
        raise DataError(f'{file.path}: only its backbone is trained; give the file that it came from')
    cfg = from_saved(saved['config'], like)
    rows = [Row(k, tuple(v.shape), 'matched', k) for k, v in saved['student'].items()]
    report = Report('ours', file.path, rows)
    own = Converted(cfg.detector, saved['student'], report, saved['teacher'], saved.get('parts'))
    own, classes = select_classes(own, list(saved['classes']), to)
    pair = saved.get('imported', {}).get('pair', False)  # of the official Semi-DETR
    _write(out, own, replace(cfg, detector=own.settings), classes, pair=pair)
    return own.report


def _check_values(converted):
    "A note about another precision; `DataError` for weights that are not finite"
    states = [s for s in (converted.state, converted.teacher, converted.parts) if s is not None]
    for state in states:
        for name, value in state.items():
            if not value.isfinite().all():
                raise DataError(f'{converted.report.origin}: {name} (our name) is not finite; fetch it again')
    if any(v.is_floating_point() and v.dtype != torch.float32 for s in states for v in s.values()):
        converted.report.notes.append('converted to float32')


# %% [markdown]
# ## A backbone alone
#
# A classifier of torchvision or timm (@sec-backbone-weights) becomes the start of a detector: that of the
# release around a ResNet-50 or -101, the small one around all others. Only the backbone has weights: training takes
# nothing else from such a folder, and a prediction from it warns that it means nothing. `start.json` holds the settings that differ from those of a preset: the
# network, the statistics of its pixels, and the folder to start from.

# %%
#| export
def _usual_preset(name):
    "Preset whose size of detector goes with a backbone"
    return 'coco-10' if name.startswith(('resnet50', 'resnet101')) else 'small'


def _backbone_run(name, detector, pixels):
    "Configuration of a detector around a backbone"
    cfg = with_detector(preset(_usual_preset(name)), detector)
    network = BackboneConfig(name, 'none', cfg.detector.backbone.out_strides)
    built = build_backbone(network)
    mean, std = (tuple(pixels.get(k) or getattr(built, k)) for k in ('mean', 'std'))
    view = replace(cfg.view, mean=mean, std=std)
    return replace(cfg, detector=replace(cfg.detector, backbone=network), view=view)


def _start_settings(cfg, out):
    "What a training from this folder must set beside preset and detector"
    network, view = cfg.detector.backbone, cfg.view
    backbone = dict(name=network.name, weights='none', out_strides=list(network.out_strides))
    statistics = dict(mean=list(view.mean), std=list(view.std))
    return dict(detector=dict(backbone=backbone), view=statistics, run=dict(init=str(out.resolve())))


def _import_backbone(file, out, classes, detector, name):
    "A detector around a backbone, in a folder that training starts from"
    found, notes = (name, []) if name else recognise_backbone(file.state, file.architecture, file.path)
    with torch.random.fork_rng(devices=[]):
        cfg = _backbone_run(found, detector, file.config.get('pretrained_cfg') or {})
    classes = list(classes or ['object'])
    converted = convert_backbone(file.state, replace(cfg.detector, num_classes=len(classes)), file.path)
    converted.report.notes += [f'backbone {found} under {detector}', *notes]
    if file.others:
        converted.report.notes.append(f'not used: {", ".join(map(str, file.others))}')
    _check_values(converted)
    start = f'--preset {_usual_preset(found)} --detector {detector} --config {out / "start.json"}'
    converted.report.notes.append(f'next: semidetr train {start} --data DATA')
    _write(out, converted, replace(cfg, detector=converted.settings), classes, pair=False)
    atomic_write(out / 'start.json', json.dumps(_start_settings(cfg, out), indent=1))
    return converted.report


# %%
#| export
def import_weights(
    path,  # file or folder, see `read_weights`
    out,  # folder to write, without a run
    classes: list = None,  # names of the rows of the class head; None: those of the file, or of COCO or VOC
    to: list = None,  # names of your classes: rows are moved by name; None: all classes of the file
    key: str = '',  # 'ema_model' of a file that holds several state dicts
    heads: int = None,  # attention heads; None: those of config.json, or 8
    dilated: bool = None,  # is the last stage of the backbone dilated (DC5)? None: as config.json says, or no
    like=None,  # Config with settings classes of your own, for a run that has such
    detector: str = '',  # for a backbone alone: the detector around it, a key of `DETECTORS`; '': dino
    backbone: str = '',  # for a backbone alone: timm:NAME, where the file does not tell it
) -> Report:
    "Write weights of any known program as a run; nothing is written where one tensor does not fit"
    out = Path(out)
    if (out / 'last.pt').exists() or (out / 'run.json').exists():
        raise DataError(f'{out}: holds a run already; choose another folder')
    file = read_weights(path, key)
    if 'format' in file.state:
        told = dict(classes=classes, heads=heads, dilated=dilated, detector=detector, backbone=backbone)
        if given := [name for name, value in told.items() if value]:
            raise ConfigError(f'{file.path}: a run tells its {given[0]} itself; leave it out')
        return _import_run(file, out, to, like)
    kind = 'backbone' if backbone.startswith('timm:') else recognise(file.state, file.path)
    if kind == 'backbone':
        return _import_backbone(file, out, to or classes, detector or 'dino', backbone)
    if detector or backbone:
        raise ConfigError(
            f'{file.path}: detector and backbone are read off from {KINDS[kind]}; leave them out'
        )
    converted = convert(file.state, file.config, origin=file.path, heads=heads, dilated=dilated)
    if file.others:
        converted.report.notes.append(f'not used: {", ".join(map(str, file.others))}')
    _check_values(converted)
    names, notes = row_names(converted.settings.num_classes, classes or file.classes, file.path)
    converted.report.notes += notes
    converted, names = select_classes(converted, names, to)
    _write(out, converted, _run_config(kind, converted.settings), names, pair=kind == 'official')
    return converted.report


# %% [markdown]
# ## From a file to boxes
#
# A small Deformable-DETR under the names of its release becomes a run, which detects as it did. The random
# network stands for a trained one:

# %%
torch.manual_seed(0)
settings = replace(deformable_detr_small(3, 'refine').untrained(), layers=2)
settings = replace(settings, backbone=replace(settings.backbone, name='resnet18', out_strides=(16, 32)))
source = build_detector(settings).eval()
released = {k.replace('backbone.body.', 'backbone.0.body.'): v for k, v in source.state_dict().items()}
released |= {f'transformer.decoder.{k}': v for k, v in released.items() if k.startswith('bbox_embed.')}
like = replace(Config(), detector=settings)
with tempfile.TemporaryDirectory() as folder:
    torch.save(dict(model=released, epoch=49), f'{folder}/release.pth')
    report = import_weights(f'{folder}/release.pth', f'{folder}/run', classes=['cat', 'dog', 'cow'])
    predictor = Predictor(f'{folder}/run', 'cpu', threshold=0, like=like)
same = all(torch.equal(v, source.state_dict()[k]) for k, v in predictor.model.state_dict().items())
assert same and predictor.classes == ['cat', 'dog', 'cow'] and 'epoch' in str(report)
print(str(report).replace(folder, ''))

# %%
#| label: fig-imports-rows
#| fig-cap: "What became of the tensors of the file: most have our name already or after a renaming, and some are copies."
#| fig-alt: "A bar for each of matched, renamed, joined, copy and unused, with the number of tensors."
states = ['matched', 'renamed', 'joined', 'copy', 'unused']
counts = [report.count(s) for s in states]
assert sum(counts) == len(report.rows) == len(released)
fig, ax = plt.subplots(figsize=(4, 1.8), dpi=80, layout='constrained')
ax.bar(states, counts, color='0.5')
ax.set_ylabel('tensors')
plt.show()

# %% [markdown]
# ## Start a training
#
# `run.init=OUT` starts student and teacher from one network of an imported run (`run.init_from`). After an import
# of the official Semi-DETR both networks start from their own weights and the projector from its own, so that
# training goes on semi-supervised. Rows of classes move by name to the classes of the data, for every
# `run.init`; what changed is said in one line (@sec-checkpoint).
#
# ## Summary
#
# - `import_weights` writes the folder of a run: settings, classes, networks, and a report of every tensor.
# - Names of classes come from the file, from you, or from the number of rows; a guess is said.
# - Training starts from the folder with `run.init`.
#
# ## Exercises
#
# 1. Import a DINO for two classes of COCO and one that COCO lacks. What does it predict for the new one?
# 2. Which of the settings in `config.json` of an imported run matter when you predict, and which only when you
#    train?
