"""How often does a teacher label one object twice?

Pseudo boxes on unlabelled images, after per-class suppression and above the threshold, against hidden boxes.

    python benchmarks/overlaps.py runs/studies/components/seed0 --to nbs/ablations/results/overlaps.json
"""

import argparse, json
from pathlib import Path
import torch
from torchvision.ops import box_iou
from semidetr.core import atomic_write
from semidetr.data.datasets import Subset
from semidetr.train.evaluation import detect
from semidetr.train.predict import load_model
from semidetr.train.run_data import build_data

ARMS = ('burn_in', 'supervised', 'mean_teacher', 'shm_cqc_cpm')


def overlaps(run, images, threshold=0.3):  # of a finished run
    "Counts over images: boxes, objects, objects with a box at an IoU of .5, with several"
    model, cfg, _ = load_model(run)
    data = build_data(cfg.data)
    out = dict(boxes=0, objects=0, covered=0, several=0)
    some = Subset(data.unlabelled, range(min(images, len(data.unlabelled))))
    for i, d in detect(model, some, cfg.view, nms=cfg.pseudo.nms).items():
        truth = data.truth.annotation(data.truth.index_of(i))['boxes']
        boxes = d['boxes'][d['scores'] >= threshold]
        hits = (box_iou(truth, boxes) >= 0.5).sum(1)
        out['boxes'] += len(boxes)
        out['objects'] += len(truth)
        out['covered'] += int((hits > 0).sum())
        out['several'] += int((hits > 1).sum())
    return out | dict(hash=json.loads((run / 'run.json').read_text())['hash'])


if __name__ == '__main__':
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument(
        'seeds', nargs='+', type=Path, help='folders of finished seeds of the study `components`'
    )
    ask.add_argument('--images', type=int, default=100)
    ask.add_argument('--to', type=Path, required=True)
    args = ask.parse_args()
    torch.set_num_threads(1)
    out = []
    for s in args.seeds:
        arms = {a: overlaps(s / a, args.images) for a in ARMS}
        out.append(dict(seed=s.name, images=args.images, arms=arms))
    atomic_write(args.to, json.dumps(out))
