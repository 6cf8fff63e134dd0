# %% [markdown]
# # The command that trains {#sec-training}
#
# > Train from a shell: data, method and any single setting; stop, resume, look up.
#
# A training takes an hour, so its command must do three things well. It says what it changed in the settings and
# why, before it starts. Ctrl-C ends it after the current iteration with a checkpoint and exit code 130, and the
# same command resumes it. A finished run is not repeated; `train` on its folder prints the result
# (@sec-run-folder). The settings are made by `plan_run`, which `semidetr.train(...)` in Python calls as well
# (@sec-api).

# %%
#| default_exp cli.training

# %%
#| hide
import warnings

warnings.filterwarnings('ignore', message='IProgress')

# %%
#| export
import json
from pathlib import Path
from typing import Annotated
import typer
from semidetr.cli.terminal import _HINT, Device, Images, Out, Quiet, _free, _no_nan, _opt, _say, command

# %%
#| hide
import functools
import tempfile
import matplotlib.pyplot as plt
from semidetr.cli import terminal


# %% [markdown]
# ## What is printed at the end

# %%
#| export
def _row(name, m):
    "One line of metrics"
    value = lambda k: '    -' if _no_nan(m[k]) is None else f'{m[k]:5.1f}'
    return f"  {name:10s} " + '  '.join(f'{k} {value(k)}' for k in ('AP', 'AP50', 'AP75') if k in m)


def _summary(result, out):
    "Print the result of a finished run"
    d, minutes, cpu = result['data'], result['seconds'] / 60, result['cpu_seconds'] / 60
    cost = f"{result['iterations']} iterations in {minutes:.1f} min ({cpu:.1f} CPU-min)"
    _say(f"{out}: {cost}, {d['labelled']} labelled and {d['unlabelled']} unlabelled images")
    for part, title in (('dev', 'development part'), ('val', 'test split')):
        if networks := result['metrics'].get(part):
            _say(f' {title}, {d[part]} images')
            for who, m in networks.items():
                _say(_row(who, m))
    h = _no_nan(result.get('health') or {})
    share = lambda k: '-' if h[k] is None else f'{h[k]:.2f}'
    if 'pseudo_boxes' in h:
        text = f" pseudo labels: {h['pseudo_boxes']:.1f} boxes per image"
        text += f" (labelled images: {h['labelled_boxes']:.1f})"
        if 'pseudo_recall' in h:
            quality = f"precision {share('pseudo_precision')}, recall {share('pseudo_recall')}"
            text += f', {quality} against hidden truth'
        _say(text)
        of_boxes = 'region_points' not in result.get('curves', ())  # labels at points are no boxes
        if of_boxes and h['pseudo_boxes'] < h['labelled_boxes'] / 4:
            _say(' few pseudo labels: the teacher is seldom sure; train longer or lower its threshold')
    _say(f' next: semidetr predict --run {out} --source IMAGES')


# %%
toy_row = _row('teacher', dict(AP=31.25, AP50=float('nan'), AP75=30.0))
assert 'AP50     -' in toy_row
toy_row


# %% [markdown]
# ## Train
#
# The defaults are made for images of your own, all or some of them labelled, with more of them in a plain
# folder. `--show-config` prints the settings of a run instead of running it; its output is a file for
# `--config`.

# %%
#| export
@command()
def train(
    settings: Annotated[
        list[str],
        typer.Argument(help='single settings, e.g. optim.lr=1e-3 pseudo.threshold=.3', show_default=False),
    ] = None,
    data: _opt(str, _HINT + '; default: digits', '--data', '-d') = '',
    unlabelled: _opt(str, 'more images without labels: a folder is enough') = '',
    val: _opt(str, 'test split; default: the val split of --data') = '',
    images: Images = '',
    method: _opt(
        str,
        'supervised, mean_teacher, semi_detr, semi_detr_plus, label_policy, soft_teacher (faster_rcnn) or '
        'dense_teacher (fcos); default: mean_teacher where there are images without labels (--percent, '
        '--count, --shots, --split-file, --unlabelled), else supervised',
    ) = '',
    detector: _opt(
        str,
        'dino, dino_5scale, detr, deformable_detr, deformable_detr_refine, deformable_detr_two_stage, '
        'faster_rcnn or fcos; default: dino',
    ) = '',
    preset: _opt(
        str,
        'starting point: digits, digits-plus, small, small-plus, coco-1, coco-5, coco-10, coco-full, voc; '
        'default: digits or small',
    ) = '',
    config: _opt(Path, 'TOML or JSON file with the settings that differ from the preset') = None,
    percent: _opt(float, 'percent of the training images that keep their labels; default: all') = None,
    count: _opt(int, 'or: number of images that keep their labels') = None,
    shots: _opt(int, 'or: number of labelled images of each class') = None,
    split_file: _opt(str, 'or: file of semidetr split') = '',
    iters: _opt(int, 'iterations') = None,
    seed: _opt(int, 'seed') = None,
    threads: _opt(int, 'CPU threads; 0: all cores') = 0,
    out: Out = Path('runs/train'),
    log: _opt(
        str, 'mlflow, wandb, or both with a comma (extras of these names); TensorBoard is always on'
    ) = '',
    device: Device = None,
    quiet: Quiet = False,
    show_config: _opt(bool, 'print the settings as JSON and stop', '--show-config') = False,
):
    """Train a detector. A stopped run in the folder is resumed.

    With several GPUs: torchrun --nproc-per-node N -m semidetr.cli train ...

    Example: semidetr train --data path/to/coco --percent 5 -o runs/mine
    """
    from semidetr.train.api import OPTIONS, plan_run, run_plan

    values = locals()
    options = {k: values[k] for k in OPTIONS}
    plan = plan_run(preset, config, settings, detector, **options)
    if show_config:
        from semidetr.train.config import to_dict

        return _say(json.dumps(to_dict(plan.cfg), indent=1))
    _free(out)
    say = lambda line: _say(f'note: {line}')
    _summary(run_plan(plan, out, not quiet, log, say).result, out)


# %% [markdown]
# In the cells below, `shell` runs a command line as a terminal would, and shows both streams and the exit
# code.

# %%
home = Path(tempfile.mkdtemp())
shell = functools.partial(terminal.shell, home=home)
assert shell('semidetr train --data digits:n=30,size=96 --method mean_teecher') == 2
assert shell('semidetr train --data digits:n=30,size=96 optim.irts=3') == 2
assert shell('semidetr train --data digits:n=30,size=96 --percent 20 --device cuda:99') == 2

# %% [markdown]
# A run of two iterations, and the same command again, which looks the result up:

# %%
tiny = (
    'semidetr train --data digits:n=30,size=64 --percent 50 --method mean_teacher --iters 2 -q -o run '
    'method.burn_in_iters=1 run.test=false run.log_every=1 loader.n_labelled=2 loader.n_unlabelled=2 '
    'loader.num_workers=0 view.short_sides=[64] view.eval_short=64 detector.backbone.weights=none '
    'detector.transformer.d_model=32 detector.transformer.n_heads=4 detector.transformer.ffn=32 '
    'detector.transformer.num_queries=20 detector.denoising.num=8'
)
assert shell(tiny) == 0
stamp = (home / 'run' / 'last.pt').stat().st_mtime_ns
assert shell(tiny) == 0
assert (home / 'run' / 'last.pt').stat().st_mtime_ns == stamp

# %%
#| label: fig-training-log
#| fig-cap: "What the run logs, iteration by iteration: the loss of the burn-in and that of the first step with pseudo labels."
#| fig-alt: "Two points: the loss after the first and after the second iteration"
lines = [json.loads(x) for x in (home / 'run' / 'log.jsonl').read_text().splitlines()]
losses = [(x['step'], x['loss']) for x in lines if 'loss' in x]
fig, ax = plt.subplots(figsize=(3.6, 2.0), dpi=80)
ax.plot(*zip(*losses), 'o-', color='#1f77b4')
ax.set(xlabel='iteration', ylabel='loss', xticks=[1, 2])
plt.show()

# %% [markdown]
# ## Summary
#
# - Defaults are adapted to the data (development part, test split, method), and each change is printed;
#   your own settings are not changed.
# - Ctrl-C loses nothing: exit code 130, and the same command resumes the run.
# - The same options in Python are the same run (@sec-api).
#
# ## Exercises
#
# 1. Which mistakes above are found before the data are opened, and which can only be found while training?
# 2. `--show-config` of the run above: which settings were adapted to the data?
