"Label policies of the rivals on detection transformers: weights of the background, soft targets"

import pytest
import torch
from semidetr.core import ConfigError
from semidetr.matching.losses import CriterionConfig, set_criterion, softmax_losses
from semidetr.semi import policies as P
from semidetr.train.config import override
from test_trainer import tiny


def outputs(layers=2, Q=6, C=3):
    g = torch.Generator().manual_seed(0)
    made = []
    for _ in range(layers):
        boxes = torch.rand(2, Q, 4, generator=g) * 0.3 + 0.3
        made.append(dict(pred_logits=torch.randn(2, Q, C, generator=g), pred_boxes=boxes))
    return made[-1] | dict(aux_outputs=made[:-1])


def targets():
    box = torch.tensor([[0.45, 0.45, 0.3, 0.3]])
    return [dict(labels=torch.tensor([1]), boxes=box), dict(labels=torch.zeros(0).long(), boxes=box[:0])]


def test_weights_of_the_background():
    "The highest score that overlaps by half or more; a box apart, and an image without detections, weigh 1"
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]]).expand(2, 2, 2, 4)
    near = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.51, 0.5, 0.2, 0.2], [0.5, 0.5, 0.9, 0.9]])
    seen = [
        dict(boxes=near, scores=torch.tensor([0.3, 0.6, 0.9])),
        dict(boxes=near[:0], scores=torch.zeros(0)),
    ]
    wanted = torch.tensor([[0.4, 1.0], [1.0, 1.0]]).expand(2, 2, 2)
    torch.testing.assert_close(P.teacher_background(boxes, seen), wanted)


@pytest.mark.parametrize('stage', ['o2m', 'o2o'])
def test_the_criterion_takes_weights_of_queries(stage):
    "Ones change nothing; the same weight for all queries is that of their image; only class losses change"
    out, cfg = outputs(), CriterionConfig(k=2)
    plain = set_criterion(out, targets(), stage, cfg)
    ones = set_criterion(out, targets(), stage, cfg, background=lambda b: torch.ones(b.shape[:3]))
    image = set_criterion(out, targets(), stage, cfg, background=torch.tensor([0.5, 0.25]))
    each = torch.tensor([0.5, 0.25])[None, :, None]
    query = set_criterion(out, targets(), stage, cfg, background=lambda b: each.expand(b.shape[:3]))
    for k in plain:
        assert torch.equal(plain[k], ones[k])
        torch.testing.assert_close(query[k], image[k])
        assert (plain[k] != image[k]) == k.startswith('loss_cls')


def test_softmax_losses_take_weights_of_queries():
    z, y = torch.randn(2, 2, 5, 4), torch.zeros(2, 2, 5, 3)
    y[:, 0, 1, 2] = 1
    w = torch.tensor([0.5, 0.1])
    a, b = (softmax_losses(z, y, background=x) for x in (w, w[None, :, None].expand(2, 2, 5)))
    for x, x2 in zip(a, b):
        torch.testing.assert_close(x, x2)


def test_soft_targets_are_pooled():
    "The likeliest queries of both images, with all probabilities"
    out = outputs(layers=1)
    rows = P.soft_targets(out, 0.25)
    p = out['pred_logits'].sigmoid()
    best = p.amax(-1).flatten().topk(3)
    assert sum(len(r['labels']) for r in rows) == 3
    assert sorted(torch.cat([r['scores'] for r in rows]).tolist()) == pytest.approx(
        sorted(best.values.tolist())
    )
    for i, r in enumerate(rows):
        assert torch.equal(r['probabilities'].amax(1), r['scores'])
        assert torch.equal(r['probabilities'].argmax(1), r['labels'])


def test_soft_losses_against_a_loop():
    "A student that repeats the teacher has no loss at its targets; the rest is background"
    out, cfg = outputs(), CriterionConfig()
    rows = P.soft_targets(out, 0.25)
    losses = P.soft_set_losses(out, rows, cfg)
    assert set(losses) == {f'loss_{k}{i}' for k in ('cls', 'l1', 'giou') for i in ('', '_0')}
    assert losses['loss_l1'].item() == pytest.approx(0, abs=1e-6) and losses['loss_l1_0'] > 0.1
    z, p = out['pred_logits'], out['pred_logits'].sigmoid()
    chosen = p.amax(-1) >= torch.cat([r['scores'] for r in rows]).min()
    loss = sum(
        p[b, q, c] ** 2 * -(1 - p[b, q, c]).log()
        for b in range(2) for q in range(6) for c in range(3) if not chosen[b, q]
    )  # fmt: skip
    total = p.amax(-1)[chosen].sum()
    assert losses['loss_cls'].item() == pytest.approx((cfg.w_cls * loss / total).item(), rel=1e-5)
    none = [{k: v[:0] for k, v in r.items()} for r in rows]
    empty = P.soft_set_losses(out, none, cfg)
    assert empty['loss_l1'] == empty['loss_giou'] == 0 and empty['loss_cls'].isfinite()
    assert z.shape == (2, 6, 3)


def test_wrong_settings():
    for item in ('policy=hard', 'overlap=2', 'soft_ratio=-1'):
        with pytest.raises(ConfigError, match=f"method.{item.split('=')[0]}"):
            override(tiny(method='label_policy'), [f'method.{item}'])
