"""How often does matching with imprecise boxes make the better-placed query of a trained detector background?

    python benchmarks/misplaced.py RUN --to nbs/ablations/results/misplaced.json

RUN is a folder such as runs/studies/components_50/seed0/burn_in.
"""

import argparse, json
from functools import partial
from pathlib import Path
import torch
from tqdm import tqdm
from semidetr.matching.assigners import ASSIGNERS, jitter_targets, misplaced_background
from semidetr.boxes import normalize_boxes, transform_boxes
from semidetr.core import atomic_write
from semidetr.data.datasets import Subset
from semidetr.data.loader import EvalLoader
from semidetr.matching.matching import assign_o2m, assign_o2o, pad_targets
from semidetr.train.predict import load_model
from semidetr.train.run_data import build_data

AMOUNTS = [0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3]


def assigners(k):  # as the criterion uses them
    return {
        'Hungarian': assign_o2o,
        'Max-IoU': ASSIGNERS['max_iou'],
        'ATSS': ASSIGNERS['atss'],
        'SimOTA': ASSIGNERS['simota'],
        f'task-aligned, k={k}': partial(assign_o2m, k=k),
    }


@torch.no_grad()
def predictions(run, images):  # last decoder layer on unlabelled images of the run, and their hidden boxes
    "logits (1,B,Q,C), boxes (1,B,Q,4), targets"
    model, cfg, _ = load_model(run)
    data, logits, boxes, targets = build_data(cfg.data), [], [], []
    some = Subset(data.unlabelled, range(min(images, len(data.unlabelled))))
    for part in tqdm(EvalLoader(some, cfg.view, 8), leave=False):
        out = model.eval()(part['images'], part['mask'])
        logits.append(out['pred_logits'])
        boxes.append(out['pred_boxes'])
        for t in part['targets']:
            a = data.truth.annotation(data.truth.index_of(t['image_id']))
            inside, _ = transform_boxes(a['boxes'], t['matrix'], t['size'])
            targets.append(dict(labels=a['labels'], boxes=normalize_boxes(inside, t['size'])))
    return torch.cat(logits)[None], torch.cat(boxes)[None], targets, cfg


if __name__ == '__main__':
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument('runs', nargs='+', type=Path, help='folders of finished runs')
    ask.add_argument('--images', type=int, default=300)
    ask.add_argument('--to', type=Path, required=True)
    args, out = ask.parse_args(), []
    for run in args.runs:
        logits, boxes, targets, cfg = predictions(run, args.images)
        truth, objects = pad_targets(targets), sum(len(t['labels']) for t in targets)
        rates = {}
        for name, assign in assigners(cfg.criterion.k).items():
            rates[name] = []
            for amount in AMOUNTS:
                matched = assign(logits, boxes, pad_targets(jitter_targets(targets, amount)))
                rates[name].append(misplaced_background(matched, boxes, truth))
        done = json.loads((run / 'run.json').read_text())
        record = dict(run='/'.join(run.parts[-2:]), hash=done['hash'], commit=done['commit'])
        counts = dict(images=len(targets), objects=objects, queries=boxes.shape[2])
        out.append(dict(**record, **counts, amounts=AMOUNTS, rates=rates))
    atomic_write(args.to, json.dumps(out))
