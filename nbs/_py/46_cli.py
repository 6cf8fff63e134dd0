# %% [markdown]
# # The command line {#sec-cli}
#
# > `semidetr demo`, `doctor`, `split`, `train`, `eval`, `predict`, `site`: the book's functions, one command each.
#
# The commands hold no logic of their own. Each opens what it is given, calls a function of an earlier chapter, and prints. A mistake in the input ends with one line that names the file, the item and the cure, and exit code 2; a traceback means a mistake in this package.

# %%
#| default_exp cli

# %%
#| export
import json
import sys
import warnings
from pathlib import Path
from typing import Annotated
import typer

# %%
#| export
app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
                  help='Train detection transformers from few labelled and many unlabelled images (Semi-DETR).')
Data = Annotated[str, typer.Option('--data', '-d', help="COCO JSON, folder with instances_train.json, VOC root, folder of images, a name under SEMIDETR_DATA, or 'digits'")]
Out = Annotated[Path, typer.Option('--out', '-o', help='folder for the results')]
Device = Annotated[str, typer.Option(help='auto, cpu, cuda, cuda:N')]
Quiet = Annotated[bool, typer.Option('--quiet', '-q', help='no progress bars')]

def _say(text=''): print(text, flush=True)

def _row(name, m):
    "One line of metrics"
    value = lambda k: '   -' if m.get(k) != m.get(k) or m.get(k) is None else f'{m[k]:5.1f}'
    return f"  {name:10s} AP {value('AP')}  AP50 {value('AP50')}  AP75 {value('AP75')}"


# %%
#| export
@app.command()
def doctor(
    data:Annotated[str, typer.Argument(help='data set to examine')]='',
    other:Annotated[str, typer.Option(help='unlabelled data set that goes with it')]='',
    split:Annotated[list[Path], typer.Option(help='split file to check (may be repeated)')]=[],
    out:Annotated[Path, typer.Option('--out', '-o', help='write report.json and a contact sheet here')]=None,
    quick:Annotated[bool, typer.Option(help='do not decode the images')]=False,
):
    """Examine a data set: counts, classes, and every fault with file, item and cure. Exit code 2 if it cannot be trained on.

    Example: semidetr doctor path/to/coco --out report
    """
    from semidetr.doctor import check_dataset, contact_sheet
    report = check_dataset(data, other or None, tuple(split), quick=quick)
    _say(report.to_text())
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out/'report.json').write_text(report.to_json())
        if not report.errors: contact_sheet(data).save(out/'contact_sheet.png'); _say(f'contact sheet: {out/"contact_sheet.png"}')
    if report.errors: raise typer.Exit(2)


# %%
#| export
@app.command()
def split(
    data:Data,
    out:Annotated[Path, typer.Option('--out', '-o', help='JSON file to write')],
    percent:Annotated[float, typer.Option(help='percent of the images that keep their labels')]=0.,
    count:Annotated[int, typer.Option(help='or: number of labelled images')]=0,
    fold:Annotated[int, typer.Option(help='which draw')]=0,
    dev:Annotated[int, typer.Option(help='images held out to choose settings on')]=100,
    seed:int=0,
    cover_classes:Annotated[bool, typer.Option(help='each class has a labelled image')]=False,
    from_file:Annotated[Path, typer.Option('--from', help='published list of indices or ids instead of a draw')]=None,
):
    """Divide training images into labelled, unlabelled and development part; the same on every machine.

    Example: semidetr split --data path/to/coco --percent 5 --fold 0 -o split.json
    """
    from semidetr.datasets import open_dataset
    from semidetr.splits import make_split, read_index_list, save_split
    ds = open_dataset(data, 'train')
    if from_file:
        s, convention = read_index_list(from_file, ds, percent or None, fold)
        _say(f'{from_file}: {convention}')
    else: s = make_split(ds, percent or None, count or None, fold, dev, seed, cover_classes)
    save_split(s, out)
    _say(f'{out}: {len(s.labelled)} labelled, {len(s.unlabelled)} unlabelled, {len(s.dev)} development images')


# %% [markdown]
# ## Training

# %%
#| export
@app.command()
def train(
    settings:Annotated[list[str], typer.Argument(help='single settings, e.g. optim.lr=1e-3 pseudo.threshold=.3')]=None,
    data:Data='',
    unlabelled:Annotated[str, typer.Option(help='more images without labels: a folder is enough')]='',
    val:Annotated[str, typer.Option(help='test split; default: the val split of --data')]='',
    method:Annotated[str, typer.Option(help='supervised or mean_teacher')]='',
    preset:Annotated[str, typer.Option(help='starting point: digits, small, coco-1, coco-5, coco-10, coco-full, voc')]='',
    config:Annotated[Path, typer.Option(help='TOML or JSON file with the settings that differ from the preset')]=None,
    percent:Annotated[float, typer.Option(help='percent of the training images that keep their labels; default: all')]=None,
    iters:Annotated[int, typer.Option(help='iterations')]=None,
    seed:Annotated[int, typer.Option(help='seed')]=None,
    out:Out=Path('runs/train'),
    device:Device=None, quiet:Quiet=False,
    show:Annotated[bool, typer.Option(help='print the resolved settings and stop')]=False,
):
    """Train a detector. A folder that holds a stopped run is gone on with. With several GPUs: torchrun --nproc-per-node N -m semidetr.cli train ...

    Example: semidetr train --data path/to/coco --percent 5 --method mean_teacher -o runs/mine
    """
    from semidetr.config import load_config, override, to_dict
    from semidetr.config import preset as named
    from semidetr.study import run_config
    cfg = named(preset or ('digits' if not data or data.startswith('digits') else 'small'))
    if config: cfg = load_config(config, cfg)
    flags = {'data.data': data or None, 'data.unlabelled': unlabelled or None, 'data.val': val or None, 'method.name': method or None,
             'data.percent': percent, 'optim.iters': iters, 'run.seed': seed, 'run.device': device}
    if percent is not None: flags['data.count'] = 0
    cfg = override(cfg, [f'{k}={v}' for k, v in flags.items() if v is not None]+list(settings or []))
    if show: return _say(json.dumps(to_dict(cfg), indent=1))
    result = run_config(cfg, out, not quiet)
    _summary(result, out)


# %%
#| export
def _summary(result, out):
    "What a finished run has to say"
    _say(f"{out}: {result['iterations']} iterations in {result['seconds']/60:.1f} min ({result['cpu_seconds']/60:.1f} CPU-min), "
         f"{result['data']['labelled']} labelled and {result['data']['unlabelled']} unlabelled images")
    for part, title in (('dev', 'development part'), ('val', 'test split')):
        for i, (who, m) in enumerate(result['metrics'].get(part, {}).items()):
            if not i: _say(f" {title}")
            _say(_row(who, m))
    if h := result.get('health'):
        quality = f", precision {h['pseudo_precision']:.2f}, recall {h['pseudo_recall']:.2f} against hidden truth" if 'pseudo_recall' in h else ''
        _say(f" pseudo labels: {h['pseudo_boxes']:.1f} boxes an image (labelled images: {h['labelled_boxes']:.1f}){quality}")
    _say(f' next: semidetr predict --run {out} --source IMAGES')

@app.command('eval')
def evaluate(
    run:Annotated[Path, typer.Option(help='folder of a run, or a checkpoint')],
    data:Annotated[str, typer.Option('--data', '-d', help='data set; default: the one of the run')]='',
    part:Annotated[str, typer.Option(help='train or val')]='val',
    nms:Annotated[float, typer.Option(help='IoU of per-class suppression; 0: none')]=0.,
    out:Annotated[Path, typer.Option('--out', '-o', help='write metrics to this JSON file')]=None,
    device:Device='auto', quiet:Quiet=False,
):
    """COCO metrics of a run's two networks, per class too.

    Example: semidetr eval --run runs/mine --data path/to/coco
    """
    from semidetr.core import DataError, atomic_write, pick_device
    from semidetr.datasets import open_dataset
    from semidetr.predict import load_model
    from semidetr.evaluation import evaluate_model
    dev, result = pick_device(device), {}
    for which in ('teacher', 'student'):
        model, cfg, classes = load_model(run, which, dev)
        ds = open_dataset(data or cfg.data.val or cfg.data.data, part)
        if list(ds.classes) != classes: raise DataError(f'{data}: its classes {ds.classes} are not those of the run {classes}; evaluate on data with the same classes')
        result[which] = m = evaluate_model(model, ds, cfg.view, dev, nms or None, '' if quiet else which)
        _say(_row(which, m))
    width = max(map(len, classes))
    for name, m in result['teacher']['per_class'].items(): _say(f"    {name:{width}s} {_row('', m).strip()}")
    if out: atomic_write(out, json.dumps(result, indent=1))


# %%
#| export
@app.command()
def predict(
    run:Annotated[Path, typer.Option(help='folder of a run, or a checkpoint')],
    source:Annotated[Path, typer.Option(help='an image or a folder of images')],
    out:Out=Path('runs/predict'),
    threshold:Annotated[float, typer.Option(help='least score')]=.3,
    nms:Annotated[float, typer.Option(help='IoU of per-class suppression; 0: none')]=0.,
    draw:Annotated[bool, typer.Option(help='write pictures')]=True,
    device:Device='auto', quiet:Quiet=False,
):
    """Detect objects in an image or a folder: drawn pictures and detections.json in COCO's result format.

    Example: semidetr predict --run runs/mine --source photos -o runs/predict
    """
    from tqdm.auto import tqdm
    from semidetr.predict import Predictor, predict_folder
    found = predict_folder(Predictor(run, device, threshold, nms or None), source, out, draw, lambda x: tqdm(x, desc='predict', disable=quiet))
    _say(f"{len(found)} detections in {out/'detections.json'}"+(f', pictures in {out}' if draw else ''))


# %% [markdown]
# ## The book itself

# %%
#| export
@app.command()
def demo(
    out:Out=Path('runs/demo'),
    labels:Annotated[int, typer.Option(help='number of labelled scenes')]=20,
    seed:Annotated[list[int], typer.Option(help='seed of split and training (may be repeated)')]=[0],
    quiet:Quiet=False,
):
    """Learn to detect handwritten digits from 20 labelled and 1000 unlabelled scenes: supervised against mean teacher, minutes on two cores.

    Example: semidetr demo -o runs/demo
    """
    from semidetr.demo import run_demo
    run_demo(out, labels, tuple(seed), progress=not quiet, say=_say)

@app.command()
def site(
    engine:Annotated[str, typer.Option(help='auto, quarto or fallback')]='auto',
):
    """Render the book to _docs/ (needs a checkout and the extra [book]).

    Example: semidetr site
    """
    from semidetr.site import main as render
    raise typer.Exit(render(['--engine', engine]))


# %%
#| export
def main():
    "Entry point: errors that a user can cure are one line and exit code 2"
    from semidetr.core import SemiDETRError
    warnings.showwarning = lambda m, c, f, l, file=None, line=None: print(f'warning: {m}' if issubclass(c, UserWarning) else f'{c.__name__}: {m}', file=sys.stderr)
    try: app()
    except SemiDETRError as e: print(f'error: {e}', file=sys.stderr); sys.exit(2)
    except KeyboardInterrupt as e: print(e or 'stopped', file=sys.stderr); sys.exit(130)

if __name__ == '__main__': main()
