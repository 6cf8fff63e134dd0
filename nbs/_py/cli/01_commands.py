# %% [markdown]
# # The command line {#sec-cli}
#
# > Use the package from a shell: demo, doctor, split, train, eval, predict, ablate, site.
#
# The commands of this chapter contain little logic: each checks its options, adapts defaults to the data,
# calls a function of an earlier chapter, and prints. They behave as @sec-terminal describes: a mistake is one line and exit code 2,
# results are written completely or not at all, `--help` is fast. Two rules are added for training:
#
# - Ctrl-C ends a training run after the current iteration with a checkpoint and exit code 130; the same
#   command resumes it;
# - a finished run is not repeated; `train` on its folder prints the result (@sec-run-folder).

# %%
#| default_exp cli.commands

# %%
#| hide
import warnings

warnings.filterwarnings('ignore', message='IProgress')

# %%
#| export
import contextlib
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated
import typer
import semidetr
from semidetr.cli.terminal import (
    Device,
    Nms,
    Out,
    Quiet,
    Run,
    _HINT,
    _bad,
    _fail,
    _free,
    _no_nan,
    _opt,
    _say,
    command,
    main,
    read_options,
    read_seeds,
)

# %%
#| hide
import functools
import tempfile
import matplotlib.pyplot as plt
from PIL import Image
from semidetr.cli import terminal
from semidetr.draw import show_image

# %% [markdown]
# In the cells below, `shell` runs a command line as a terminal would, and shows both streams and the exit
# code.

# %%
home = Path(tempfile.mkdtemp())
shell = functools.partial(terminal.shell, home=home)
assert shell('semidetr --version') == 0


# %% [markdown]
# ## Check the data first
#
# `doctor` (@sec-doctor) is the first command to run on data of your own. Without a data set it describes the
# installation, which is the first thing to paste into a bug report.

# %%
#| export
@command()
def doctor(
    data: Annotated[str, typer.Argument(help=_HINT + ', or folder of images', show_default=False)] = '',
    other: _opt(
        list[str],
        'data set that must not overlap with it, e.g. the unlabelled one (may be repeated); '
        'default: its val and test splits',
    ) = None,
    split_file: _opt(list[Path], 'split file to check (may be repeated)') = None,
    split: _opt(str, 'which split of DATA') = 'train',
    out: _opt(Path, 'write report.json and contact_sheet.png to this folder', '--out', '-o') = None,
    quick: _opt(bool, 'do not decode the images') = False,
    env: _opt(
        bool, 'examine this machine instead: versions, cores, GPU, attention op, speed of bfloat16', '--env'
    ) = False,
):
    """Examine a data set: counts, classes, and every fault with file, item and cure.

    Exit code 2 if it has errors. Without DATA: what is installed, without the bfloat16 probe of --env.

    Example: semidetr doctor path/to/coco --out report

    Example: semidetr doctor --env
    """
    if env and data:
        raise _bad('give either DATA or --env')
    if not data:
        from semidetr.train.machine import environment_lines

        last = f'To examine data: semidetr doctor DATA, where DATA is a {_HINT}'
        return _say('\n'.join([f'semidetr {semidetr.__version__}', *environment_lines(env), last]))
    from semidetr import check_dataset, contact_sheet, open_dataset
    from semidetr.core import atomic_write

    if out:
        _free(out)
    report = check_dataset(data, other or None, split_file or [], split, quick)
    if report.of('error', 'cannot-open') and not report.counts:
        f = report.errors[0]
        raise _bad(f"{'' if data in f.item else f'{data}: '}{f.item}; {f.cure}")
    _say(report.to_text())
    if out:
        atomic_write(out / 'report.json', report.to_json())
        if not report.errors:
            contact_sheet(open_dataset(data, split)).save(out / 'contact_sheet.png')
        sheet = '' if report.errors else f" and {out / 'contact_sheet.png'}"
        _say(f"written: {out / 'report.json'}{sheet}")
    if report.errors:
        raise typer.Exit(2)


# %%
assert shell('semidetr doctor digits:n=30,size=96 --out report') == 0

# %%
#| label: fig-cli-sheet
#| fig-cap: "The contact sheet of the doctor: all numbers of a report can be right while the boxes miss the objects; a picture shows it."
#| fig-alt: "Twelve scenes with handwritten digits and a box around each"
fig, ax = plt.subplots(figsize=(4.4, 3.4), dpi=80)
show_image(ax, Image.open(home / 'report' / 'contact_sheet.png'))
plt.show()

# %%
assert shell('semidetr doctor no/such/folder') == 2


# %%
#| export
@command('build-ops')
def build_the_op(
    device: _opt(str, 'cpu, or cuda for the GPU kernel') = 'cpu',
    archs: _opt(
        str, 'of --device cuda: architectures such as 80,90; default: that of the GPU here'
    ) = 'native',
    force: _opt(bool, 'build even if the library is there', '--force') = False,
):
    """Compile the deformable-attention op for this machine, ahead of the first run.

    Training does this by itself; here it says where, how long, and what is missing (exit code 2).

    Example: semidetr build-ops
    """
    from semidetr.train.machine import build_lines

    for line in build_lines(device, force, tuple(archs.split(','))):
        _say(line)


# %% [markdown]
# ## Divide the images
#
# @sec-splits explains what a split is. In a small data set a development part of 100 images would leave no
# image to train on, so at most a fifth is held out by default.

# %%
#| export
@command()
def split(
    data: _opt(str, _HINT, '--data', '-d'),
    out: _opt(Path, 'JSON file to write', '--out', '-o'),
    percent: _opt(float, 'percent of the images that keep their labels') = None,
    count: _opt(int, 'or: number of labelled images') = None,
    fold: _opt(int, 'which draw') = 0,
    dev: _opt(
        int, 'images held out to choose settings on; default: 100, at most a fifth; with --from 0'
    ) = None,
    seed: _opt(int, 'another seed, another development part') = 0,
    cover_classes: _opt(bool, 'each class has a labelled image') = False,
    from_file: _opt(Path, 'published list of indices or ids instead of a draw', '--from') = None,
    convention: _opt(str, 'what the numbers of --from are: auto, ids, positions') = 'auto',
):
    """Divide training images into labelled, unlabelled and development part; the same on every machine.

    Example: semidetr split --data path/to/coco --percent 5 --fold 0 -o split.json
    """
    from semidetr import make_split, open_dataset, read_index_list, save_split

    _free(out, folder=False)
    ds = open_dataset(data, 'train')
    if from_file:
        s, found = read_index_list(from_file, ds, percent, fold, convention, dev or 0, seed)
        _say(f'{from_file}: read as {found}')
    else:
        dev = min(100, len(ds) // 5) if dev is None else dev
        s = make_split(ds, percent, count, fold, dev, seed, cover_classes)
    save_split(s, out)
    counts = f'{len(s.labelled)} labelled, {len(s.unlabelled)} unlabelled, {len(s.dev)} development images'
    _say(f'{out}: {counts}')


# %%
assert shell('semidetr split --data digits:n=30,size=96 --percent 20 --out split.json') == 0
assert shell('semidetr split --data digits:n=30,size=96 --percent 120 --out other.json') == 2
assert not (home / 'other.json').exists()


# %% [markdown]
# ## Settings of a run
#
# A run's settings come from four places: preset, `--config` file, options, single settings
# `group.field=value` (@sec-config); a later one replaces an earlier one. Then the command adapts to the data
# what you did not set yourself, and prints one line per change.

# %%
#| export
def _settings(preset, config, items):
    "(Config, names of the settings that the user gave)"
    from semidetr.train.config import Config, load_config, override
    from semidetr.train.config import preset as named

    build = lambda base: override(load_config(config, base) if config else base, items)
    data = build(Config()).data.data
    cfg = build(named(preset or ('digits' if data.partition(':')[0] == 'digits' else 'small')))
    if not cfg.data.data:
        raise _bad(f'no data: give --data, a {_HINT}')
    given = {i.partition('=')[0].strip() for i in items}
    if config:
        given |= {f'{group}.{k}' for group, fields in _file(config).items() for k in fields}
    return cfg, given


def _file(path):
    "Content of a configuration file that has been checked"
    import tomllib

    return (json.loads if path.suffix == '.json' else tomllib.loads)(path.read_text())


def _fit_to_data(cfg, given):
    "Overrides that these data need, each with a line about it for the user"
    from semidetr.data.catalog import open_dataset

    d, train = cfg.data, open_dataset(cfg.data.data, 'train')
    if not train.has_boxes:
        raise _bad(f'{d.data}: no box to learn from; images without labels belong to --unlabelled')
    most = len(train) // 5
    if 'data.dev' not in given and not d.split_file and d.dev > most:
        yield (
            f'data.dev={most}',
            f'{len(train)} images: {most} of them, not {d.dev}, are held out as development part (data.dev)',
        )
    if cfg.run.test and 'run.test' not in given:
        from semidetr.train.run_data import test_split

        val, why = test_split(d, train)
        if val is None:
            yield (
                'run.test=false',
                f'no test split ({why}): the development part alone is measured; --val names one',
            )
        elif list(val.classes) != list(train.classes):
            raise _bad(
                f'{d.val or d.data}: the classes of the test split are {val.classes[:10]}, those of the '
                f'training images {train.classes[:10]}; give both the same'
            )
    if d.unlabelled and 'method.name' not in given:
        from semidetr.semi.methods import WITH_UNLABELLED

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
def _check_method(cfg):
    "Lines about settings that do not go together"
    from semidetr.semi.methods import METHODS, MethodConfig

    d, m, n = cfg.data, cfg.method, cfg.optim.iters
    partly = d.unlabelled or d.split_file or d.count or d.percent not in (0, 100)
    if not m.needs_unlabelled and partly:
        others = ' or '.join(name for name in METHODS if MethodConfig(name).needs_unlabelled)
        yield f'method {m.name}: unlabelled images are not used (--method {others} learns from them)'
    if m.needs_unlabelled and not partly:
        raise _bad(
            f'method {m.name} needs unlabelled images: --unlabelled FOLDER, or keep the labels of a part '
            'with --percent or --count'
        )
    if m.needs_unlabelled and m.burn_in_iters >= n:
        yield (
            f'method.burn_in_iters={m.burn_in_iters} takes all of the {n} iterations; no unlabelled image '
            'will be used'
        )


@contextlib.contextmanager
def _no_debris(folder):
    "A run that fails before its first checkpoint leaves no folder behind, unless there was one before"
    new = not folder.exists()
    try:
        yield
    except BaseException:
        if new and not list(folder.glob('*.pt')):
            shutil.rmtree(folder, ignore_errors=True)
        raise


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
    method: _opt(
        str, 'supervised, mean_teacher or semi_detr; default: mean_teacher with --unlabelled, else supervised'
    ) = '',
    preset: _opt(
        str,
        'starting point: digits, small, coco-1, coco-5, coco-10, coco-full, voc; default: digits or small',
    ) = '',
    config: _opt(Path, 'TOML or JSON file with the settings that differ from the preset') = None,
    percent: _opt(float, 'percent of the training images that keep their labels; default: all') = None,
    count: _opt(int, 'or: number of images that keep their labels') = None,
    split_file: _opt(str, 'or: file of semidetr split') = '',
    iters: _opt(int, 'iterations') = None,
    seed: _opt(int, 'seed') = None,
    threads: _opt(int, 'CPU threads; 0: all cores') = 0,
    out: Out = Path('runs/train'),
    device: Device = None,
    quiet: Quiet = False,
    show_config: _opt(bool, 'print the settings as JSON and stop', '--show-config') = False,
):
    """Train a detector. A stopped run in the folder is resumed.

    With several GPUs: torchrun --nproc-per-node N -m semidetr.cli train ...

    Example: semidetr train --data path/to/coco --percent 5 --method mean_teacher -o runs/mine
    """
    from semidetr.train.config import override, to_dict
    from semidetr.core import pick_device
    from semidetr.train.machine import prepare
    from semidetr.lab.study import run_config

    items = _flags(locals()) + list(settings or [])
    cfg, given = _settings(preset, config, items)
    pick_device(cfg.run.device)
    changes = [*_fit_to_data(cfg, given), *_fit_to_method(cfg, given)]
    cfg = override(cfg, [c for c, _ in changes])
    notes = [text for _, text in changes] + list(_check_method(cfg))
    if show_config:
        return _say(json.dumps(to_dict(cfg), indent=1))
    _free(out)
    for text in notes:
        _say(f'note: {text}')
    prepare()
    with _no_debris(out):
        _summary(run_config(cfg, out, not quiet), out)


def _flags(v):
    "Options of `train` as settings"
    if sum(bool(v[k]) for k in ('percent', 'count', 'split_file')) > 1:
        raise _bad('give one of --percent, --count and --split-file')
    if v['percent'] is not None and not 0 < v['percent'] <= 100:
        raise _bad(f"--percent {v['percent']:g} is outside (0, 100]; 10 means ten percent")
    for k in ('count', 'iters'):
        if v[k] is not None and v[k] < 1:
            raise _bad(f'--{k} {v[k]} must be at least 1')
    names = dict(
        data='data.data',
        unlabelled='data.unlabelled',
        val='data.val',
        split_file='data.split_file',
        method='method.name',
        percent='data.percent',
        count='data.count',
        iters='optim.iters',
        seed='run.seed',
        device='run.device',
        threads='run.threads',
    )
    divided = v['percent'] is not None or v['count'] or v['split_file']
    reset = ['data.percent=0', 'data.count=0'] if divided else []
    return reset + [f'{name}={v[k]}' for k, name in names.items() if v[k] not in (None, '')]


# %%
assert shell('semidetr train --data digits:n=30,size=96 --method mean_teecher') == 2
assert shell('semidetr train --data digits:n=30,size=96 optim.irts=3') == 2
assert shell('semidetr train --data digits:n=30,size=96 --percent 20 --device cuda:99') == 2


# %% [markdown]
# ## Evaluate and predict
#
# `eval` measures both networks of a run, class by class for the teacher. Without `--data` it opens the run's
# own: its test split, or with `--part dev` the images that were held out to choose settings on. `predict`
# needs no annotations (@sec-predict). If some files of a folder cannot be read, the others are processed;
# each bad file is a line on the error stream, and the exit code is 2, so that a script notices.

# %%
#| export
def _eval_part(cfg, data, part):
    "The data set to measure on"
    from semidetr.data.catalog import open_dataset
    from semidetr.train.run_data import build_data, test_split

    known = ('val', 'train', 'test') if data else ('val', 'dev', 'train')
    if part not in known:
        raise _bad(f"--part '{part}' is unknown{' with --data' if data else ''}; known: {', '.join(known)}")
    if data or part == 'train':
        return open_dataset(data or cfg.data, part)
    dev = 'the run held no development part out'
    ds, why = test_split(cfg) if part == 'val' else (build_data(cfg).dev, dev)
    if ds is None:
        raise _bad(f'{why}; give --data, or another --part (val, dev, train)')
    return ds


@command('eval')
def evaluate(
    run: Run,
    data: _opt(str, 'data set; default: the one of the run', '--data', '-d') = '',
    part: _opt(str, 'val, train, or without --data also dev') = 'val',
    nms: Nms = 0.0,
    out: _opt(Path, 'write all metrics to this JSON file', '--out', '-o') = None,
    device: Device = 'auto',
    quiet: Quiet = False,
):
    """COCO metrics of a run's two networks, per class too.

    Example: semidetr eval --run runs/mine --data path/to/coco
    """
    from semidetr.core import atomic_write
    from semidetr.train.evaluation import evaluate_model
    from semidetr.train.predict import Predictor

    if out:
        _free(out, folder=False)
    result, ds = {}, None
    for which in ('teacher', 'student'):
        p = Predictor(run, device, nms=nms or None, which=which)
        ds = ds or _eval_part(p.cfg.data, data, part)
        if not ds.has_boxes:
            raise _bad(f'{ds.name}: no box to measure against; to draw detections there is semidetr predict')
        if list(ds.classes) != p.classes:
            raise _bad(
                f'{data or ds.name}: its classes ({", ".join(ds.classes[:5])}, ...) are not those of the run '
                f'({", ".join(p.classes[:5])}, ...); evaluate on data with the same classes'
            )
        bar = '' if quiet else f'evaluate {which}'
        result[which] = evaluate_model(p.model, ds, p.cfg.view, p.device, p.nms, bar)
    _say(f'{ds.name}: {len(ds)} images')
    for which, m in result.items():
        _say(_row(which, m))
    _say(' teacher, class by class')
    width = max(10, *map(len, p.classes))
    for name, m in result['teacher']['per_class'].items():
        _say(f"  {name:{width}s} {_row('', m).strip()}")
    if out:
        atomic_write(out, json.dumps(_no_nan(result), indent=1))
        _say(f'written: {out}')


# %%
#| export
@command()
def predict(
    run: Run,
    source: _opt(Path, 'an image or a folder of images', '--source', '-s'),
    out: Out = Path('runs/predict'),
    threshold: _opt(float, 'least score') = 0.3,
    nms: Nms = 0.0,
    which: _opt(str, 'teacher or student') = 'teacher',
    draw: _opt(bool, 'write pictures') = True,
    ids: _opt(
        Path, 'COCO annotation file whose image and category ids to write; default: file names, label + 1'
    ) = None,
    batch: _opt(int, 'images of one size at a time', min=1) = 8,
    device: Device = 'auto',
    quiet: Quiet = False,
):
    """Detect objects in an image or a folder: drawn pictures, and detections.json in COCO's result format.

    Files that cannot be read are named and left out; the exit code is then 2.

    Example: semidetr predict --run runs/mine --source photos -o runs/predict
    """
    from tqdm import tqdm
    from semidetr.train.predict import Predictor, predict_folder

    model = Predictor(run, device, threshold, nms or None, which)
    bar = lambda x: tqdm(x, desc='predict', unit='batch', disable=quiet)
    found, broken = predict_folder(model, source, _free(out), draw, ids, batch, bar)
    _say(f"{len(found)} detections in {out / 'detections.json'}" + (f', pictures in {out}' if draw else ''))
    if not found:
        _say(f'note: no score reaches {threshold:g}; try a lower --threshold')
    for line in broken:
        _fail(line)
    if broken:
        raise typer.Exit(2)


# %%
(home / 'empty').mkdir()
assert shell('semidetr predict --run empty --source empty') == 2
assert shell('semidetr eval') == 2


# %% [markdown]
# ## The book itself

# %%
#| export
@command()
def demo(
    out: Out = Path('runs/demo'),
    labels: _opt(int, 'number of labelled scenes', min=1) = 20,
    seed: _opt(list[int], 'seed of split and training (may be repeated)') = [0],  # noqa: B006 (--help shows it)
    workers: _opt(int, 'runs at a time; 0: one per core', min=0) = 0,
    quiet: Quiet = False,
):
    """Learn to detect handwritten digits from 20 labelled scenes and thousands without labels.

    Supervised against mean teacher and Semi-DETR, some minutes on two cores; table and pictures at the end.

    Example: semidetr demo -o runs/demo
    """
    from semidetr.lab.demo import run_demo
    from semidetr.train.machine import prepare

    prepare()
    run_demo(_free(out), labels, tuple(seed), not quiet, workers, _say)


# %%
#| export
@command('ablate')
def run_studies(
    study: Annotated[
        list[str],
        typer.Argument(
            help='names in nbs/ablations/studies.toml, or all (those of this machine, or of --scale); '
            'without a name they are listed'
        ),
    ] = None,
    scale: _opt(str, 'smoke, small or gpu; default: that of the study') = '',
    seeds: _opt(str, 'how many, e.g. 5, or which: 0,2 or 3-4; default: those of the study') = '',
    groups: _opt(str, 'e.g. p1,p5: these groups of the study; default: all') = '',
    jobs: _opt(
        int, 'runs at a time, one thread each; 0: one per core, with Slurm all', '--jobs', '-j', min=0
    ) = 0,
    dry_run: _opt(bool, 'print what would run, and what is missing for it', '--dry-run', '-n') = False,
    data: _opt(str, f'another data set: {_HINT}', '--data', '-d') = '',
    out: _opt(Path, 'folder of the runs; default: runs/studies in the checkout', '--out', '-o') = None,
    results: _opt(
        Path,
        'folder of the records; default: nbs/ablations/results, at scale smoke or with --data OUT/results',
    ) = None,
    engine: _opt(str, 'local, slurm or submitit-local (the last two: extra [cluster])') = 'local',
    option: _opt(
        list[str], 'of Slurm through submitit, e.g. slurm_partition=gpu timeout_min=600 (may be repeated)'
    ) = None,
    processes: _opt(int, 'processes of each run, started by torchrun, one GPU each', min=1) = 1,
    quiet: Quiet = False,
):
    """Run studies of the book: every arm, every seed, one executed notebook per run, one record per seed.

    Finished runs are looked up, stopped ones resumed. The record of a study and seed is replaced when its
    runs are finished. Needs a checkout and the extra [book]. Exit code 1 if runs failed.

    Example: semidetr ablate components --seeds 3 --jobs 2
    """
    from semidetr.lab.ablate import ablate
    from semidetr.lab.dry_run import dry_run as list_runs
    from semidetr.lab.plan import STUDIES, find_book
    from semidetr.lab.study import study_lines

    book = find_book()
    if not study:
        return _say('\n'.join(study_lines(book / STUDIES)))
    out = _from_book(book, _free(out or book / 'runs' / 'studies'))
    results = _from_book(book, _free(results, '--results')) if results else None
    if data and Path(data).exists():
        data = str(_from_book(book, data))
    with contextlib.chdir(book):
        bad = ablate(
            study,
            scale,
            read_seeds(seeds),
            data,
            tuple(filter(None, groups.split(','))),
            out,
            results,
            jobs,
            engine,
            read_options(option or []),
            processes,
            list_runs if dry_run else None,
            not quiet,
            _say,
        )
    for line in bad:
        _fail(line)
    if bad:
        raise typer.Exit(2 if dry_run else 1)


def _from_book(book, path):
    "A path relative to the checkout, links not followed; absolute if it is outside"
    inside = Path(os.path.abspath(path)).is_relative_to(book)
    return Path(os.path.relpath(path, book) if inside else Path(path).absolute())


@command()
def site(engine: _opt(str, 'auto, quarto or fallback') = 'auto'):
    """Render the book to _docs/. Needs a checkout and the extra [book].

    Example: semidetr site
    """
    if engine not in ('auto', 'quarto', 'fallback'):
        raise _bad(f"--engine '{engine}' is unknown; known: auto, quarto, fallback")
    root = next((d for d in (Path.cwd(), *Path.cwd().parents) if (d / '_quarto.yml').exists()), None)
    if root is None:
        raise _bad('no _quarto.yml here or above; run this in a checkout of the book')
    if not (root / 'semidetr' / 'book').is_dir() and find_spec('semidetr.book') is None:
        raise _bad(
            f'{root}: has no folder semidetr/book, which renders the book; run this in a checkout of it'
        )
    command = [sys.executable, '-m', 'semidetr.book.site', '--engine', engine]
    raise typer.Exit(subprocess.run(command, cwd=root).returncode)


# %%
assert shell('semidetr ablate components --dry-run') == 2  # not in a checkout

# %%
#| export
if __name__ == '__main__' and globals().get('__spec__'):
    main()

# %% [markdown]
# For a misspelt command the nearest one is suggested, and every command has a help text with an example:

# %%
assert shell('semidetr trian') == 2
assert shell('semidetr predict --help') == 0

# %% [markdown]
# ## Summary
#
# - Commands contain little logic: a script can do the same with the functions of the earlier chapters.
# - Errors that a user can cure are one line with place and cure and exit code 2; anything else is a
#   traceback, because it is a bug.
# - The output path is checked before the work, and files are written completely or not at all.
# - Defaults are adapted to the data (development part, test split, method), and each change is printed;
#   your own settings are not changed.
# - Ctrl-C loses nothing: exit code 130, and the same command resumes the run.
#
# ## Exercises
#
# 1. Which of the errors above are found before the first image is decoded, and which can only be found while
#    training?
# 2. Why does `predict` exit with code 2 although it wrote its results? What would you choose for a nightly
#    script?
# 3. Add a command `classes` that prints the class names of a run; how many lines does it need?
