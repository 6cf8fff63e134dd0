"""One-to-one matching against transformers' `DeformableDetrHungarianMatcher`: the same pairs, and how long they take."""

import torch
from semidetr.matching.matching import assign_o2o, hungarian, hungarian_layers, pad_targets, pair_cost
from timing import compare, interleave

IMAGES, QUERIES, CLASSES, OBJECTS = 16, 900, 80, 20


def batch(images=IMAGES, queries=QUERIES, seed=0):  # (outputs of one layer, targets)
    "Random predictions, and 10 to 30 objects an image"
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

    match = DeformableDetrHungarianMatcher(class_cost=class_cost, bbox_cost=bbox_cost, giou_cost=giou_cost)
    return lambda outputs, targets: match(
        dict(logits=outputs['pred_logits'], pred_boxes=outputs['pred_boxes']),
        [dict(class_labels=t['labels'], boxes=t['boxes']) for t in targets],
    )


def pairs(matched):
    return [set(zip(q.tolist(), t.tolist())) for q, t in matched]


def row(outputs, targets, match, rounds, threads):  # of one layer
    assert pairs(match(outputs, targets)) == pairs(hungarian(outputs, targets)), 'the assignments differ'
    t = interleave(
        dict(
            theirs=lambda: match(outputs, targets) and None, ours=lambda: hungarian(outputs, targets) and None
        ),
        rounds,
    )
    return compare(
        t['theirs']['all'],
        t['ours']['all'],
        name='one layer',
        images=len(targets),
        objects=sum(len(t['labels']) for t in targets),
        threads=threads,
    )


def tell(rows, say):
    say(
        'matcher: '
        + ', '.join(
            f"{r['name']} of {r['images']} images {r['ratio'][1]:.1f}x ({r['theirs_ms']:.0f} -> {r['ours_ms']:.1f} ms)"
            for r in rows
        )
    )


def rows(threads, say, rounds, images=(IMAGES,)):
    "One layer at several batch sizes"
    found = [row(*batch(n), theirs(), rounds, threads) for n in images]
    tell(found, say)
    return found


def run(threads, quick, say):
    "Rows: one layer at several batch sizes, and seven layers at once (DINO with its encoder output); and where our time goes"
    found, match, (outputs, targets) = rows(threads, say, 3 if quick else 25, (4, IMAGES)), theirs(), batch()
    layers = [
        dict(pred_logits=outputs['pred_logits'].roll(i, 1), pred_boxes=outputs['pred_boxes'].roll(2 * i, 1))
        for i in range(2 if quick else 7)
    ]
    assert [pairs(match(o, targets)) for o in layers] == [
        pairs(m) for m in hungarian_layers(layers, targets)
    ], 'the assignments differ'
    t = interleave(
        dict(
            theirs=lambda: [match(o, targets) for o in layers] and None,
            ours=lambda: hungarian_layers(layers, targets) and None,
        ),
        3 if quick else 9,
    )
    found.append(
        compare(
            t['theirs']['all'], t['ours']['all'], name=f'{len(layers)} layers', images=IMAGES, threads=threads
        )
    )
    tell(found[-1:], say)
    return dict(rows=found, parts=parts(outputs, targets, 3 if quick else 25))


def parts(outputs, targets, rounds):  # {part: ms}
    "Where our time goes, for one layer"
    padded = pad_targets(targets, CLASSES)
    logits, boxes = outputs['pred_logits'][None], outputs['pred_boxes'][None]
    t = interleave(
        dict(
            targets=lambda: pad_targets(targets, CLASSES) and None,
            cost=lambda: pair_cost(logits, boxes, padded.labels[None], padded.boxes) is None,
            all=lambda: assign_o2o(logits, boxes, padded) and None,
        ),
        rounds,
    )
    ms = {k: 1e3 * sorted(v['all'])[len(v['all']) // 2] for k, v in t.items()}
    return dict(targets=ms['targets'], cost=ms['cost'], assignment=ms['all'] - ms['cost'])
