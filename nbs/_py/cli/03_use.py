# %% [markdown]
# # Commands that use a run {#sec-use}
#
# > Measure a trained run, and detect objects in images, folders and videos: eval, predict.
#
# A detector is trained once and used often, mostly by somebody who has nothing but its folder. That is all these
# commands need. `eval` measures both networks of a run, class by class for the teacher. Without `--data` it opens
# the run's own: its test split, or with `--part dev` the images that were held out to choose settings on.
# `predict` needs no annotations (@sec-predict) and writes pictures and files of results (@sec-predict-files). If
# some files of a folder cannot be read, the others are processed; each bad file is a line on the error stream,
# and the exit code is 2, so that a script notices.

# %%
#| default_exp cli.use

# %%
#| hide
import warnings

warnings.filterwarnings('ignore', message='IProgress')

# %%
#| export
import json
from pathlib import Path
import typer
from semidetr.cli.terminal import (
    Device,
    Images,
    Nms,
    Out,
    Quiet,
    Run,
    _bad,
    _fail,
    _free,
    _no_nan,
    _opt,
    _say,
    command,
)
from semidetr.cli.training import _row

# %%
#| hide
import functools
import tempfile
import matplotlib.pyplot as plt
from PIL import Image
from semidetr.cli import terminal
from semidetr.data.catalog import open_dataset
from semidetr.draw import show_image


# %% [markdown]
# ## Evaluate

# %%
#| export
@command('eval')
def evaluate(
    run: Run,
    data: _opt(str, 'data set; default: the one of the run', '--data', '-d') = '',
    part: _opt(str, 'val, train, with --data also test, without --data also dev') = 'val',
    nms: Nms = 0.0,
    max_dets: _opt(int, 'detections per image that are counted; COCO: 100', min=1) = 100,
    out: _opt(Path, 'write all metrics to this JSON file', '--out', '-o') = None,
    images: Images = '',
    device: Device = 'auto',
    quiet: Quiet = False,
):
    """COCO metrics of a run's two networks, per class too.

    Example: semidetr eval --run runs/mine --data path/to/coco
    """
    from semidetr.core import atomic_write
    from semidetr.train.api import evaluate_run

    if out:
        _free(out, folder=False)
    ds, result = evaluate_run(run, data, part, nms, device, not quiet, max_dets, images, '--nms')
    _say(f'{ds.name}: {len(ds)} images')
    for which, m in result.items():
        _say(_row(which, m))
    _say(' teacher, class by class')
    classes = result['teacher']['per_class']
    width = max(10, *map(len, classes))
    for name, m in classes.items():
        _say(f"  {name:{width}s} {_row('', m).strip()}")
    if out:
        atomic_write(out, json.dumps(_no_nan(result), indent=1))
        _say(f'written: {out}')


# %% [markdown]
# ## Predict
#
# Every option of the command is an option of `semidetr.predict` as well. Class names are separated by commas; a
# class whose name holds a comma is given by `--classes` a second time, alone, with a comma at its end.

# %%
#| export
def _class_names(texts):
    "Class names as written on the command line: 'cat,dog'; a text that ends with a comma is one name"
    names = []
    for text in texts or ():
        names += [text[:-1]] if text.endswith(',') else text.split(',')
    return [n for n in (name.strip() for name in names) if n]


@command()
def predict(
    run: Run,
    source: _opt(Path, 'an image, a folder of images, or a video', '--source', '-s'),
    out: Out = Path('runs/predict'),
    threshold: _opt(float, 'lowest score that is reported') = 0.3,
    nms: Nms = 0.0,
    classes: _opt(
        list[str], 'report these classes only, e.g. car,bus (may be repeated); default: all'
    ) = None,
    formats: _opt(str, 'files to write: json, csv, yolo; several with commas', '--format', '-f') = 'json',
    which: _opt(str, 'teacher or student') = 'teacher',
    draw: _opt(bool, 'write pictures, or the annotated video') = True,
    ids: _opt(
        Path, 'COCO annotation file whose image and category ids to write; default: file names, label + 1'
    ) = None,
    batch: _opt(int, 'images of one size at a time', min=1) = 8,
    device: Device = 'auto',
    quiet: Quiet = False,
):
    """Detect objects in an image, a folder or a video; write pictures and files of results.

    json: detections.json in COCO's result format. csv: detections.csv, one row per detection, corners in
    pixels. yolo: labels/IMAGE.txt with rows 'class cx cy w h score' in fractions of the image, and
    classes.txt. A video gives an annotated .mp4, and rows with the number of the frame.

    Files that cannot be read are named and left out; the exit code is then 2.

    Example: semidetr predict --run runs/mine --source photos -o runs/predict

    Example: semidetr predict --run runs/mine --source clip.mp4 --format csv --classes car,bus --threshold .5
    """
    from semidetr.train.api import open_predictor, predict_to_files
    from semidetr.train.predict_files import is_video, read_formats

    kinds, video = read_formats(formats), is_video(source)
    if not kinds and not draw:
        raise _bad("nothing to write: give --format, or leave --no-draw out")
    if video and ids:
        raise _bad('--ids is for images: the id of a frame is its number')
    model = open_predictor(run, device, threshold, nms, which, _class_names(classes))
    results = predict_to_files(model, source, _free(out), draw, ids, batch, kinds, not quiet)
    places = [str(p) for p in results.places()] + ([f'pictures in {out}'] if draw else [])
    _say(f"{len(results.rows)} detections in {', '.join(places)}")
    for line in results.notes(model, '--'):
        _say(f'note: {line}')
    for line in results.broken:
        _fail(line)
    if results.broken:
        raise typer.Exit(2)


# %%
assert _class_names(['car,bus', 'salt, pepper,']) == ['car', 'bus', 'salt, pepper']
_class_names(['car,bus'])

# %% [markdown]
# In the cells below, `shell` runs a command line as a terminal would, and shows both streams and the exit
# code.

# %%
home = Path(tempfile.mkdtemp())
shell = functools.partial(terminal.shell, home=home)
(home / 'empty').mkdir()
assert shell('semidetr predict --run empty --source empty') == 2
assert shell('semidetr eval') == 2
assert shell('semidetr predict --help') == 0

# %% [markdown]
# A run of two iterations knows nothing yet, but its results have the right form:

# %%
tiny = (
    'semidetr train --data digits:n=30,size=64 --iters 2 -q -o run run.test=false loader.n_labelled=2 '
    'loader.num_workers=0 view.short_sides=[64] view.eval_short=64 detector.backbone.weights=none '
    'detector.transformer.d_model=32 detector.transformer.n_heads=4 detector.transformer.ffn=32 '
    'detector.transformer.num_queries=20 detector.denoising.num=8'
)
assert shell(tiny) == 0
scene = open_dataset('digits:n=4,size=96', 'val')[0].image
scene.save(home / 'scene.png')
assert shell('semidetr eval --run run --part dev -q') == 0
use = 'semidetr predict --run run -s scene.png -o found -q --threshold 0.07 --nms .3'
assert shell(f'{use} --format json,csv,yolo') == 0
assert shell(f'{use} --classes cat') == 2

# %%
#| label: fig-use-picture
#| fig-cap: "The picture that predict writes, here of a detector that was trained for two iterations: at a threshold this low, its boxes mean nothing."
#| fig-alt: "A scene with handwritten digits and orange boxes that fit none of them"
fig, ax = plt.subplots(figsize=(2.8, 2.8), dpi=80)
show_image(ax, Image.open(home / 'found' / 'scene.png'))
plt.show()

# %% [markdown]
# ## Summary
#
# - The folder of a run is all that `eval` and `predict` need.
# - `predict` writes pictures, JSON, CSV, YOLO rows, and annotated videos.
# - Files that cannot be read are named, and the exit code is 2.
#
# ## Exercises
#
# 1. Why does `predict` exit with code 2 although it wrote its results? What would you choose for a nightly
#    script?
# 2. Add a command `classes` that prints the class names of a run; how many lines does it need?
