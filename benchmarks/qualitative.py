"""What a page cannot compute in seconds: detections, boxes during training, sampling points, query features.

    python benchmarks/qualitative.py runs/studies/components/seed0 --to nbs/ablations/results/qualitative.json

The folder is a finished seed of the study `components`. Its full method is trained once more (two minutes) to
record the teacher's boxes on the way; both teachers must end equal.
"""

import argparse, json, tempfile
from pathlib import Path
import torch
from sklearn.manifold import TSNE
from sklearn.neighbors import KNeighborsClassifier
from torchvision.ops import box_iou
from semidetr.detectors.attention import sampling_locations
from semidetr.boxes import cxcywh_to_xyxy
from semidetr.train.config import from_saved, override
from semidetr.core import atomic_write
from semidetr.data.catalog import open_dataset
from semidetr.data.datasets import Subset
from semidetr.lab.demo import keep_detections, shown_scenes
from semidetr.train.evaluation import detect
from semidetr.data.loader import EvalLoader
from semidetr.train.predict import load_model
from semidetr.train.trainer import Trainer

ARMS = ('supervised', 'mean_teacher', 'shm_cqc_cpm')


def rounded(x, digits=1):
    return [rounded(v, digits) for v in x] if isinstance(x, list) else round(x, digits)


def through_training(run, times=5, images=3):  # of a finished run
    "The teacher's boxes on a few unlabelled images, `times` times from its start to its end"
    done = json.loads((run / 'run.json').read_text())
    cfg = override(from_saved(done['config']), ['run.threads=1'])
    with tempfile.TemporaryDirectory() as folder:
        again, notes = Trainer(cfg, folder, progress=False), []
        ds = Subset(again.data.unlabelled, range(images))
        at = [round(i * cfg.optim.iters / (times - 1)) for i in range(times)]

        def note():
            found = {}
            for i, d in detect(again.teacher, ds, cfg.view, nms=cfg.pseudo.nms).items():
                keep = d['scores'] >= cfg.pseudo.threshold
                found[str(i)] = {k: rounded(v[keep].tolist(), 2) for k, v in d.items()}
            notes.append(dict(step=again.step, found=found))

        batches = again.batches

        def noted():
            for accumulated in batches():
                if again.step in at:
                    note()
                yield accumulated

        again.batches = noted
        again.fit(until=cfg.optim.iters)
        note()
        first = load_model(run)[0].state_dict()
        assert all(torch.equal(first[k], v) for k, v in again.teacher.state_dict().items()), (
            f'{run}: trained again, the teacher is another one; '
            'was the run made with these settings and this number of threads?'
        )
    truth = {}
    for i in ds.ids:
        s = again.data.truth[again.data.truth.index_of(i)]
        truth[str(s.image_id)] = dict(boxes=rounded(s.boxes.tolist()), labels=s.labels.tolist())
    facts = dict(hash=done['hash'], threshold=cfg.pseudo.threshold)
    return dict(**facts, truth=truth, notes=notes, data=cfg.data.data)


@torch.no_grad()
def decoded(run, ds):  # per image: target, truth, boxes, scores, features, sampling points and their weights
    "Outputs of the last decoder layer of a run, with the sampling points of its cross-attention"
    model, cfg, _ = load_model(run)
    attention, sampled = model.transformer.decoder.layers[-1].cross_attn, {}

    def record(module, args):
        query, reference, value, shapes = args[:4]
        B, Q, heads = *query.shape[:2], (module.n_heads, module.n_levels, module.n_points)
        offsets = module.sampling_offsets(query).view(B, Q, *heads, 2)
        sampled['xy'] = sampling_locations(reference, offsets, shapes).reshape(B, Q, -1, 2)
        weights = module.attention_weights(query).view(B, Q, module.n_heads, -1).softmax(-1)
        sampled['weights'] = weights.view(B, Q, -1)

    attention.register_forward_pre_hook(record)
    for part in EvalLoader(ds, cfg.view, 1):  # one at a time: no padding
        out, t = model(part['images'], part['mask']), part['targets'][0]
        a = ds.annotation(ds.index_of(t['image_id']))
        boxes, scores = cxcywh_to_xyxy(out['pred_boxes'][0]), out['pred_logits'][0].sigmoid()
        yield t, a, boxes, scores, out['hs'][-1, 0], sampled['xy'][0], sampled['weights'][0]


def on_objects(t, a, boxes):  # -> (index of the query that fits each object best, IoU)
    w, h = t['orig_size'][1], t['orig_size'][0]
    iou, query = box_iou(a['boxes'] / torch.tensor([w, h, w, h]), boxes).max(1)
    return query, iou


def attention_points(run, ds, objects=2):
    "Sampling points of the queries that fit the first objects of each image, in units of the image"
    out = {}
    for t, a, boxes, scores, _, xy, weights in decoded(run, ds):
        query, _ = on_objects(t, a, boxes)
        found = out[str(t['image_id'])] = []
        for q in query[:objects]:
            best = dict(score=rounded(scores[q].max().item(), 2), label=int(scores[q].argmax()))
            points = dict(xy=rounded(xy[q].tolist(), 3), weights=rounded(weights[q].tolist(), 4))
            found.append(dict(box=rounded(boxes[q].tolist(), 3), **best, **points))
    return out


def query_features(run, ds, min_iou=0.5):
    "Features of the query that fits each object, in a plane, and how well its neighbours predict its class"
    features, labels, images, objects = [], [], [], 0
    for n, (t, a, boxes, _, hs, *_) in enumerate(decoded(run, ds)):
        query, iou = on_objects(t, a, boxes)
        keep, objects = iou >= min_iou, objects + len(iou)
        features.append(hs[query[keep]])
        labels += a['labels'][keep].tolist()
        images += [n] * int(keep.sum())
    x, y, half = torch.cat(features).numpy(), torch.tensor(labels), torch.tensor(images) < len(ds) // 2
    neighbours = KNeighborsClassifier(5).fit(x[half], y[half])  # from other images
    accuracy = neighbours.score(x[~half], y[~half])
    plane = TSNE(random_state=0, init='pca', perplexity=min(30, (len(x) - 1) / 3)).fit_transform(x)
    counts = dict(objects=objects, told=accuracy, asked=int((~half).sum()))
    return dict(plane=rounded(plane.tolist()), labels=labels, **counts)


if __name__ == '__main__':
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument('seed', type=Path, help='folder of a finished seed')
    ask.add_argument('--images', type=int, default=150, help='test scenes for the features')
    ask.add_argument('--to', type=Path, required=True)
    args = ask.parse_args()
    torch.set_num_threads(1)
    runs, val = {a: args.seed / a for a in ARMS}, open_dataset('digits', 'val')
    records = {a: json.loads((r / 'run.json').read_text()) for a, r in runs.items()}
    arms = {a: {k: r[k] for k in ('hash', 'commit', 'iterations')} for a, r in records.items()}
    out = dict(
        arms=arms,
        labelled=records['supervised']['data']['labelled'],
        images=args.images,
        detections={a: keep_detections(r, shown_scenes()) for a, r in runs.items()},
        training=through_training(runs['shm_cqc_cpm']),
        attention={a: attention_points(r, shown_scenes(3)) for a, r in runs.items() if a != 'mean_teacher'},
        features={a: query_features(r, Subset(val, range(args.images))) for a, r in runs.items()},
    )
    atomic_write(args.to, json.dumps(out))
