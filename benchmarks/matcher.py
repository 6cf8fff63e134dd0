"""One-to-one matching against transformers' `DeformableDetrHungarianMatcher`: equal pairs, and their time."""

import torch
from semidetr.matching.matching import assign_o2o, hungarian, hungarian_layers, pad_targets, pair_cost
from timing import compare, interleave

IMAGES, QUERIES, CLASSES, OBJECTS = 16, 900, 80, 20


def batch(images=IMAGES, queries=QUERIES, seed=0):  # (outputs of one layer, targets)
    "Random predictions, and 10 to 30 objects per image"
    torch.manual_seed(seed)

    def boxes(n):
        return torch.cat([0.2 + 0.6 * torch.rand(n, 2), 0.02 + 0.3 * torch.rand(n, 2)], -1)

    outputs = dict(
        pred_logits=torch.randn(images, queries, CLASSES) - 3,
        pred_boxes=boxes(images * queries).view(images, queries, 4),
    )
    counts = torch.randint(OBJECTS // 2, OBJECTS * 3 // 2 + 1, (images,)).tolist()
    return outputs, [dict(labels=torch.randint(CLASSES, (n,)), boxes=boxes(n)) for n in counts]


def theirs(class_cost=2, bbox_cost=5, giou_cost=2):
    "Their matcher as a function of our outputs and targets, which it is given under its own names"
    from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher

    matcher = DeformableDetrHungarianMatcher(class_cost=class_cost, bbox_cost=bbox_cost, giou_cost=giou_cost)

    def match(outputs, targets):
        renamed = [dict(class_labels=t['labels'], boxes=t['boxes']) for t in targets]
        return matcher(dict(logits=outputs['pred_logits'], pred_boxes=outputs['pred_boxes']), renamed)

    return match


def pairs(matched):
    return [set(zip(q.tolist(), t.tolist())) for q, t in matched]


def row(outputs, targets, match, rounds, threads):  # of one layer
    assert pairs(match(outputs, targets)) == pairs(hungarian(outputs, targets)), 'the assignments differ'
    jobs = dict(
        theirs=lambda: match(outputs, targets) and None, ours=lambda: hungarian(outputs, targets) and None
    )
    t = interleave(jobs, rounds)
    what = dict(images=len(targets), objects=sum(len(t['labels']) for t in targets), threads=threads)
    return compare(t['theirs']['all'], t['ours']['all'], name='one layer', **what)


def tell(rows, say):
    texts = []
    for r in rows:
        times = f"{r['theirs_ms']:.0f} -> {r['ours_ms']:.1f} ms"
        texts.append(f"{r['name']} of {r['images']} images {r['ratio'][1]:.1f}x ({times})")
    say('matcher: ' + ', '.join(texts))


def rows(threads, say, rounds, images=(IMAGES,)):
    "One layer at several batch sizes"
    found = [row(*batch(n), theirs(), rounds, threads) for n in images]
    tell(found, say)
    return found


def run(threads, quick, say):
    "Rows: one layer at several batch sizes, seven layers at once (as DINO has); and the shares of our time"
    found, match, (outputs, targets) = rows(threads, say, 3 if quick else 25, (4, IMAGES)), theirs(), batch()
    logits, boxes = outputs['pred_logits'], outputs['pred_boxes']
    layers = []
    for i in range(2 if quick else 7):
        layers.append(dict(pred_logits=logits.roll(i, 1), pred_boxes=boxes.roll(2 * i, 1)))
    wanted = [pairs(match(o, targets)) for o in layers]
    assert wanted == [pairs(m) for m in hungarian_layers(layers, targets)], 'the assignments differ'
    jobs = dict(
        theirs=lambda: [match(o, targets) for o in layers] and None,
        ours=lambda: hungarian_layers(layers, targets) and None,
    )
    t = interleave(jobs, 3 if quick else 9)
    what = dict(name=f'{len(layers)} layers', images=IMAGES, threads=threads)
    found.append(compare(t['theirs']['all'], t['ours']['all'], **what))
    tell(found[-1:], say)
    return dict(rows=found, parts=parts(outputs, targets, 3 if quick else 25))


def parts(outputs, targets, rounds):  # {part: ms}
    "The shares of our time, for one layer"
    padded = pad_targets(targets, CLASSES)
    logits, boxes = outputs['pred_logits'][None], outputs['pred_boxes'][None]
    jobs = dict(
        targets=lambda: pad_targets(targets, CLASSES) and None,
        cost=lambda: pair_cost(logits, boxes, padded.labels[None], padded.boxes) is None,
        all=lambda: assign_o2o(logits, boxes, padded) and None,
    )
    t = interleave(jobs, rounds)
    ms = {k: 1e3 * sorted(v['all'])[len(v['all']) // 2] for k, v in t.items()}
    return dict(targets=ms['targets'], cost=ms['cost'], assignment=ms['all'] - ms['cost'])
