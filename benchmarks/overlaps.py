"""How often does a teacher label one object twice? Pseudo boxes on unlabelled images, after per-class suppression and above the threshold, against the hidden boxes.

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
from semidetr.train.trainer import build_data

ARMS = ('burn_in', 'supervised', 'mean_teacher', 'shm_cqc_cpm')


def overlaps(run, images, threshold=0.3):  # of a finished run
    "Counts over images: boxes, objects, objects with a box at an IoU of .5, with several"
    model, cfg, _ = load_model(run)
    data = build_data(cfg.data)
    out = dict(boxes=0, objects=0, covered=0, several=0)
    for i, d in detect(
        model, Subset(data.unlabelled, range(min(images, len(data.unlabelled)))), cfg.view, nms=cfg.pseudo.nms
    ).items():
        truth, boxes = (
            data.truth.annotation(data.truth.index_of(i))['boxes'],
            d['boxes'][d['scores'] >= threshold],
        )
        on = (box_iou(truth, boxes) >= 0.5).sum(1)
        for key, n in dict(
            boxes=len(boxes), objects=len(truth), covered=(on > 0).sum(), several=(on > 1).sum()
        ).items():
            out[key] += int(n)
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
    atomic_write(
        args.to,
        json.dumps(
            [
                dict(seed=s.name, images=args.images, arms={a: overlaps(s / a, args.images) for a in ARMS})
                for s in args.seeds
            ]
        ),
    )
