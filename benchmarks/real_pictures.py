"""Photographs with the detections of three methods, for the home page and the page on few labels.

    python benchmarks/real_pictures.py runs/studies/fod12/k2/seed0 --to nbs/ablations/results

The folder is a finished seed of the study `fod12`. Every test photograph is read once by every method. The
rule chooses the photographs: class by class, the first one on which the methods disagree whether the object
is found. The figure and what it shows are written; the photographs themselves are not part of the project.
"""

import argparse, json
from pathlib import Path
import matplotlib

matplotlib.use('agg')
import matplotlib.pyplot as plt
from torchvision.ops import box_iou
from semidetr.core import atomic_write
from semidetr.data.catalog import open_dataset
from semidetr.draw import show_image
from semidetr.lab.report import METHOD_COLORS, METHOD_NAMES
from semidetr.train.evaluation import detect
from semidetr.train.predict import load_model

ARMS = ('supervised', 'mean_teacher', 'semi_detr')
RULES = dict(min_score=0.3, nms=0.6, min_iou=0.5)
ROWS = 4


def right(d, truth):  # which boxes have the class of an object and enough overlap with it
    "Boxes that find the object of a photograph"
    fits = box_iou(d['boxes'], truth['boxes']) >= RULES['min_iou']
    return (fits & (d['labels'][:, None] == truth['labels'])).any(1)


def read(run, ds):  # -> per photograph the boxes above the score, and the facts of the run
    "Detections of one method after suppression"
    model, cfg, _ = load_model(run)
    found = detect(model, ds, cfg.view, nms=RULES['nms'])
    done = json.loads((run / 'run.json').read_text())
    kept = []
    for i in ds.ids:
        ok = found[i]['scores'] >= RULES['min_score']
        kept.append({k: v[ok] for k, v in found[i].items()})
    return kept, dict(hash=done['hash'])


def choose(found, truth):  # -> indices of photographs, one a class
    "Class by class, the first photograph on which the methods disagree whether the object is found"
    chosen = {}
    for i, t in enumerate(truth):
        answers = {bool(right(d[i], t).any()) for d in found.values()}
        if len(answers) > 1:
            chosen.setdefault(int(t['labels'][0]), i)
    return [chosen[c] for c in sorted(chosen)][:ROWS]


def verdict(d, truth, classes):  # -> what stands in the corner of a picture
    "Found or not, what the object was taken for, and how many other boxes there are"
    ok, on_it = right(d, truth), (box_iou(d['boxes'], truth['boxes']) >= RULES['min_iou']).any(1)
    if ok.any():
        wrong = int((~ok).sum())
        return 'found' + f', {wrong} wrong' * (wrong > 0)
    if on_it.any():
        return f"taken for {classes[int(d['labels'][on_it][0])]}"
    return 'not found'


def around(truth, size, side=128):  # -> left, top of a square of this side inside the photograph
    "Where to cut, so that the object is large enough to see"
    x0, y0, x1, y1 = truth['boxes'][0].tolist()
    low = lambda middle, length: min(max(0, middle - side / 2), length - side)
    return low((x0 + x1) / 2, size[0]), low((y0 + y1) / 2, size[1])


def outline(ax, boxes, **style):
    "Rectangles"
    for x0, y0, x1, y1 in boxes.tolist():
        ax.add_patch(plt.Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, **style))


def draw(ds, chosen, found, truth, side=128):  # -> a figure: a row is a photograph, a column is a method
    "Truth dotted green, found objects in the colour of the method, other boxes dashed white"
    fig, axes = plt.subplots(len(chosen), len(ARMS), figsize=(6.3, 2.0 * len(chosen) + 0.35), dpi=110)
    for row, i in zip(axes, chosen):
        t, image = truth[i], ds[i].image
        left, top = around(t, image.size, side)
        for ax, arm in zip(row, ARMS):
            d = found[arm][i]
            ok = right(d, t)
            show_image(ax, image)
            outline(ax, d['boxes'][~ok], ec='white', ls='--', lw=1.4)
            outline(ax, d['boxes'][ok], ec=METHOD_COLORS[arm], lw=3)
            outline(ax, t['boxes'], ec='#2cff2c', ls=':', lw=1.6)
            ax.set(xlim=(left, left + side), ylim=(top + side, top))
            look = dict(facecolor=METHOD_COLORS[arm] if ok.any() else 'black', alpha=0.85, lw=0, pad=2.5)
            text = verdict(d, t, ds.classes)
            where = dict(transform=ax.transAxes, ha='right', va='bottom')
            ax.text(0.98, 0.03, text, fontsize=12, color='white', bbox=look, **where)
    for ax, arm in zip(axes[0], ARMS):
        ax.set_title(METHOD_NAMES[arm], fontsize=15, color=METHOD_COLORS[arm], fontweight='bold')
    edges = dict(left=0.003, right=0.997, top=1 - 0.35 / fig.get_figheight(), bottom=0.003)
    fig.subplots_adjust(**edges, wspace=0.02, hspace=0.02)
    return fig


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('seed', type=Path, help='folder of a finished seed of the study fod12')
    ap.add_argument('--to', type=Path, required=True, help='folder of results')
    a = ap.parse_args()
    ds = open_dataset('fod12', 'val')
    truth = [ds.annotation(i) for i in range(len(ds))]
    found, arms = {}, {}
    for arm in ARMS:
        found[arm], facts = read(a.seed / arm, ds)
        ok = [right(d, t) for d, t in zip(found[arm], truth)]
        counts = dict(found=sum(bool(x.any()) for x in ok), wrong=sum(int((~x).sum()) for x in ok))
        arms[arm] = facts | counts
    chosen = choose(found, truth)
    draw(ds, chosen, found, truth).savefig(a.to / 'home.jpg', pil_kwargs=dict(quality=88))
    shown = []
    for i in chosen:
        name = ds.classes[int(truth[i]['labels'][0])]
        shown.append(dict(file=Path(str(ds.files[i])).name, class_name=name))
    which = dict(study='fod12', group=a.seed.parent.name, seed=int(a.seed.name.removeprefix('seed')))
    record = which | dict(images=len(ds), rules=RULES, arms=arms, shown=shown)
    atomic_write(a.to / 'real.json', json.dumps(record, indent=1) + '\n')


if __name__ == '__main__':
    main()
