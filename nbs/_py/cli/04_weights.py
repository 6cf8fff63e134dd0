# %% [markdown]
# # Commands for weights {#sec-weight-commands}
#
# > Bring weights of other programs in, and take a trained detector elsewhere: import, export.
#
# Most users have weights already, and most trained detectors end in a program that does not import this
# package. `import` makes a run of a file or folder of another program and reports every tensor (@sec-weights,
# @sec-imports). `export` writes the detector of a run for other programs (@sec-export, @sec-onnx).

# %%
#| default_exp cli.weights

# %%
#| hide
import warnings

warnings.filterwarnings('ignore', message='IProgress')

# %%
#| export
import os
from pathlib import Path
from typing import Annotated
import typer
from semidetr.cli.terminal import Run, _bad, _free, _opt, _say, command

# %%
#| hide
import functools
import tempfile
from dataclasses import replace
import matplotlib.pyplot as plt
import torch
from semidetr.cli import terminal
from semidetr.data.digits import DigitsScenes
from semidetr.detectors.contract import build_detector
from semidetr.detectors.deformable_detr import deformable_detr_small
from semidetr.draw import draw_boxes, show_image
from semidetr.train.predict import Predictor


# %% [markdown]
# ## Import

# %%
#| export
def _names(text):
    "Names of classes, separated by commas, or one per line of a file"
    if not text:
        return None
    if os.path.isfile(text):  # for a long list of names Path.is_file fails
        from semidetr.text import read_lines

        return [line.strip() for line in read_lines(Path(text)) if line.strip()]
    return [name.strip() for name in text.split(',')]


@command('import')
def import_(
    file: Annotated[
        Path,
        typer.Argument(help='.pth, .pt or .safetensors file, or folder of transformers', show_default=False),
    ],
    out: _opt(Path, 'folder of the new run', '--out', '-o'),
    classes: _opt(
        str, 'names of the rows of the class head, a,b,c or a file; default: those of the file'
    ) = '',
    to: _opt(str, 'your classes, a,b,c or a file: rows move by name; default: all of the file') = '',
    key: _opt(str, 'which state dict of a file with several, e.g. ema_model') = '',
    detector: _opt(
        str, 'for a backbone alone: the detector around it, as of semidetr train; default: dino'
    ) = '',
    backbone: _opt(str, 'for a backbone alone: timm:NAME, where the file does not tell it') = '',
    heads: _opt(int, 'attention heads; default: as config.json says, or 8') = None,
    dilated: _opt(bool, 'DC5: the last stage of the backbone is dilated', '--dilated') = False,
    every: _opt(bool, 'print a line for every tensor', '--all') = False,
):
    """Make a run of weights of another program.

    Reads official Semi-DETR checkpoints, the releases of DETR, Deformable-DETR and DINO, folders of
    transformers, backbones of torchvision and timm, and runs. What is done with every tensor is in
    OUT/report.json. Nothing is written if one does not fit.

    Example: semidetr import r50_deformable_detr.pth -o runs/release
    """
    from semidetr.train.imports import import_weights

    _free(out)
    names = _names(classes), _names(to)
    report = import_weights(
        file, out, *names, key, heads, dilated or None, detector=detector, backbone=backbone
    )
    for row in report.rows if every else ():
        _say(f'{row}')
    _say(str(report))
    usual = f'; next: semidetr predict --run {out} --source IMAGES, or train with run.init={out}'
    _say(f'written to {out}{"" if report.kind == "backbone" else usual}')


# %% [markdown]
# ## Export

# %%
#| export
@command('export')
def export(
    folder: Annotated[Path, typer.Argument(metavar='RUN', help='as --run', show_default=False)] = None,
    run: Run = None,
    format: _opt(str, 'onnx, safetensors, transformers or torch', '--format', '-f') = 'onnx',
    out: _opt(Path, 'file or folder to write; default: in the folder of the run', '--out', '-o') = None,
    nms: _opt(float, 'onnx: IoU of a per-class suppression inside the graph; 0: none') = 0.0,
    which: _opt(str, 'teacher or student') = 'teacher',
    overwrite: _opt(bool, 'replace what is there') = False,
):
    """Write the detector of a run for other programs.

    Formats: onnx (any runtime; needs the extra [export]), safetensors (weights with settings and classes),
    transformers (a folder for from_pretrained; DETR and Deformable-DETR), torch (a torch.export program).

    Example: semidetr export runs/mine --format onnx
    """
    if bool(folder) == bool(run):
        raise _bad('give one run: semidetr export RUN')
    from semidetr.train.onnx import export_run

    path = export_run(folder or run, format, out, nms or None, which, overwrite=overwrite)
    _say(f'written to {path}')


# %% [markdown]
# ## Both ways
#
# A small Deformable-DETR with random weights under the names of its release, imported and exported:

# %%
home = Path(tempfile.mkdtemp())
shell = functools.partial(terminal.shell, home=home)
torch.manual_seed(0)
settings = replace(deformable_detr_small(10, 'refine').untrained(), layers=2)
settings = replace(settings, backbone=replace(settings.backbone, name='resnet18', out_strides=(16, 32)))
source = build_detector(settings)
state = {k.replace('backbone.body.', 'backbone.0.body.'): v for k, v in source.state_dict().items()}
state |= {f'transformer.decoder.{k}': v for k, v in state.items() if k.startswith('bbox_embed.')}
torch.save(dict(model=state), home / 'release.pth')
assert shell(f'semidetr import {home}/release.pth -o {home}/run --classes 0,1,2,3,4,5,6,7,8,9') == 0

# %%
assert shell(f'semidetr export {home}/run --format safetensors') == 0
assert shell(f'semidetr export --run {home}/run --format caffe') == 2

# %%
#| label: fig-weight-commands
#| fig-cap: "Detections of the imported run and of the exported file are the same boxes; with random weights they mean nothing."
#| fig-alt: "Two panels with the same scene of digits and the same boxes"
scene = DigitsScenes('train', n=2)[1]
exported = sorted(home.glob('run/*.safetensors'))[0]
found = [Predictor(p, 'cpu', threshold=0)(scene.image) for p in (home / 'run', exported)]
assert torch.equal(found[0]['boxes'], found[1]['boxes'])
fig, axes = plt.subplots(1, 2, figsize=(5, 2.5), dpi=80, layout='constrained')
for ax, boxes, title in zip(axes, found, ('imported run', 'exported file')):
    show_image(ax, scene.image, title=title)
    draw_boxes(ax, boxes['boxes'][:10], kind='teacher')
plt.show()

# %% [markdown]
# ## Summary
#
# - `semidetr import FILE --out DIR` makes a run of weights of other programs.
# - `semidetr export RUN --format F` writes a detector for other programs.
# - Both refuse what does not fit, in one line.
#
# ## Exercises
#
# 1. Import with `--to` and a class that the file does not have. What does the report say?
# 2. Export with `--nms .6` and compare the detections with those of `semidetr predict --nms .6`.
