"""What does a score threshold keep of each class?

Precision and recall of a teacher on the unlabelled images of its run, by hidden truth.

    python benchmarks/thresholds.py RUN --to nbs/ablations/results/thresholds.json

RUN is a folder such as runs/studies/txl_semi/p1/seed0/burn_in.
"""

import argparse, json
from pathlib import Path
import torch
from tqdm import tqdm
from semidetr.core import atomic_write
from semidetr.data.datasets import Subset
from semidetr.data.loader import EvalLoader
from semidetr.train.metrics import pseudo_quality
from semidetr.semi.methods import to_original
from semidetr.semi.variants import class_rates
from semidetr.semi.teacher import teacher_detections
from semidetr.train.predict import load_model
from semidetr.train.run_data import build_data

THRESHOLDS = [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6]


def counts(found, truth, threshold, cls):
    "(true positives, pseudo boxes, true boxes) of one class over all images"
    total = torch.zeros(3, dtype=torch.long)
    for d in found:
        a = truth.annotation(truth.index_of(d['image_id']))
        keep, true = (d['labels'] == cls) & (d['scores'] >= threshold), (a['labels'] == cls) & ~a['ignore']
        found_here, true_here = (d['boxes'][keep], d['labels'][keep]), (a['boxes'][true], a['labels'][true])
        total += torch.tensor([int(n) for n in pseudo_quality(*found_here, *true_here)])
    return total.tolist()


@torch.no_grad()
def by_class(run, images):
    "dict of a run: for each class and threshold precision and recall, boxes per image"
    model, cfg, _ = load_model(run)
    data, found = build_data(cfg.data), []
    some = Subset(data.unlabelled, range(min(images, len(data.unlabelled))))
    for part in tqdm(EvalLoader(some, cfg.view, 8), leave=False):
        outputs = model.eval()(part['images'], part['mask'])
        detections = teacher_detections(outputs, part['targets'], cfg.pseudo)
        found += to_original(detections, part['targets'])
    classes, out = {}, json.loads((Path(run) / 'run.json').read_text())
    for c, name in enumerate(data.truth.classes):
        n = [counts(found, data.truth, t, c) for t in THRESHOLDS]
        classes[name] = dict(
            objects=n[0][2],
            precision=[tp / k if k else None for tp, k, _ in n],
            recall=[tp / g if g else None for tp, _, g in n],
            boxes=[k / len(found) for _, k, _ in n],
        )
    rates = class_rates(data.labelled, len(data.truth.classes))
    labelled = {name: round(float(r) * len(data.labelled)) for name, r in zip(data.truth.classes, rates)}
    record = dict(run='/'.join(Path(run).parts[-3:]), hash=out['hash'], commit=out['commit'])
    counted = dict(images=len(found), labelled_images=len(data.labelled), labelled=labelled)
    return dict(**record, **counted, thresholds=THRESHOLDS, classes=classes)


if __name__ == '__main__':
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument('runs', nargs='+', type=Path, help='folders of finished runs')
    ask.add_argument('--images', type=int, default=300)
    ask.add_argument('--to', type=Path, required=True)
    args = ask.parse_args()
    atomic_write(args.to, json.dumps([by_class(run, args.images) for run in args.runs]))
