"The Semi-DETR step: losses against a slow reference, the published order of passes, switches, resume"

import dataclasses, json, math
import numpy as np, pytest, torch
from scipy.optimize import linear_sum_assignment
from sklearn.mixture import GaussianMixture
from semidetr.train.config import Config, override
from semidetr.semi.consistency import (
    ConsistencyConfig,
    Projector,
    cross_view_extras,
    cross_view_losses,
    pair_boxes,
)
from semidetr.detectors.detector import Detector
from semidetr.matching.losses import CriterionConfig, set_criterion
from semidetr.semi.methods import MethodConfig, has_denoising, mine_pseudo_labels, weighted
from semidetr.semi.mining import MiningConfig
from semidetr.semi.teacher import PseudoConfig, keep_boxes, make_teacher
from semidetr.semi.variants import CostMemory, box_picker
from semidetr.train.trainer import Trainer
from test_methods import part, small

SHIFT = torch.tensor([[1.0, 0, 9], [0, 1, -5], [0, 0, 1]], dtype=torch.float64)


def nets(dtype=torch.float64, seed=4):
    torch.manual_seed(seed)
    s = Detector(small()).to(dtype)
    with torch.no_grad():
        for p in s.class_head.parameters():
            p.add_(torch.randn_like(p) * 0.4)  # a teacher that is sure of some things
        for p in s.box_head.layers[-1].parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return s.train(), make_teacher(s)


def cast(p, dtype):
    targets = [{k: v.to(dtype) if k == 'boxes' else v for k, v in t.items()} for t in p['targets']]
    return dict(images=p['images'].to(dtype), mask=p['mask'], targets=targets)


def batch(dtype=torch.float64, n=3):
    weak, strong = part(n, None, 1), part(n, None, 2)
    for t in strong['targets']:
        t['matrix'] = SHIFT
    for p, w in ((weak, 60), (strong, 52)):
        for t in p['targets']:
            t['size'] = (64, w)
        p['mask'][:, :, w:] = True
    return {k: cast(v, dtype) for k, v in dict(labelled=part(2, (3, 0)), weak=weak, strong=strong).items()}


def build(dtype=torch.float64, T1=10, mining=None, con=None, crit=None, pseudo=None, **method):
    torch.manual_seed(5)
    cfg = dataclasses.replace(
        Config(),
        detector=small(),
        method=MethodConfig(**{'name': 'semi_detr', 'T1': T1, **method}),
        criterion=CriterionConfig(**{'k': 3, **(crit or {})}),
        pseudo=PseudoConfig(**{'threshold': 0.3, 'min_score': 0.0, **(pseudo or {})}),
        mining=MiningConfig(**(mining or {})),
        consistency=ConsistencyConfig(**{'hidden': 16, **(con or {})}),
    )
    return cfg.method.build(cfg).to(dtype).train()


def run(method, step=3, seed=1, nets=None, data=None, dtype=torch.float64):
    student, teacher = nets or globals()['nets'](dtype)
    torch.manual_seed(seed)
    losses, scalars, _ = method.step(student, teacher, data or batch(dtype), step)
    return losses, scalars, student, teacher


def backward(losses, student, method):
    student.zero_grad()
    method.zero_grad()
    sum(losses.values()).backward()
    return [
        p.grad.clone() if p.grad is not None else torch.zeros_like(p)
        for m in (student, method)
        for p in m.parameters()
    ]


# --- the slow reference: plain loops in float64, from the formulas of the specification ---


def sig(x):
    return 1 / (1 + math.exp(-x))


def corners(b):
    return b[0] - b[2] / 2, b[1] - b[3] / 2, b[0] + b[2] / 2, b[1] + b[3] / 2


def overlaps(a, b):
    a, b = corners(a), corners(b)
    inter = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return inter / union, inter / union - (hull - union) / hull


def bce(p, y):
    return -(y * math.log(p) + (1 - y) * math.log(1 - p)) if 0 < y < 1 else -math.log(p if y else 1 - p)


def l1(a, b):
    return sum(abs(x - y) for x, y in zip(a, b))


def cost_matrix(logits, boxes, labels, gt):
    C = np.zeros((len(logits), len(labels)))
    for q, (z, b) in enumerate(zip(logits, boxes)):
        for i, (c, g) in enumerate(zip(labels, gt)):
            p = sig(z[c])
            C[q, i] = (
                2 * (-0.25 * (1 - p) ** 2 * math.log(p + 1e-12) + 0.75 * p**2 * math.log(1 - p + 1e-12))
                + 5 * l1(b, g)
                - 2 * overlaps(b, g)[1]
            )
    return C


def o2m(logits, boxes, labels, gt, k):
    "Query -> (object, soft target)"
    owner = {}
    m = [[sig(z[c]) * overlaps(b, g)[0] ** 6 for z, b in zip(logits, boxes)] for c, g in zip(labels, gt)]
    u = [[overlaps(b, g)[0] for b in boxes] for g in gt]
    for i in range(len(labels)):
        for q in sorted(range(len(logits)), key=lambda q: -m[i][q])[:k]:
            if m[i][q] > 0 and (q not in owner or u[i][q] > u[owner[q]][q]):
                owner[q] = i
    out = {}
    for q, i in owner.items():
        group = [j for j in owner if owner[j] == i]
        out[q] = i, m[i][q] / (max(m[i][j] for j in group) + 1e-7) * max(u[i][j] for j in group)
    return out


def detection_losses(layers, targets, stage, k, name='', zero_labels=False):
    "Class, L1 and GIoU loss of one layer: `layers` holds logits and boxes of every image as lists"
    cls = reg_l1 = reg_giou = z = 0.0
    for (logits, boxes), (labels, gt) in zip(layers, targets):
        labels = [0] * len(labels) if zero_labels else labels
        if stage == 'o2m':
            found = o2m(logits, boxes, labels, gt, k)
        else:
            q, t = linear_sum_assignment(cost_matrix(logits, boxes, labels, gt)) if labels else ((), ())
            found = {int(a): (int(b), 1.0) for a, b in zip(q, t)}
        for j, row in enumerate(logits):
            for c, x in enumerate(row):
                p, hit = sig(x), j in found and labels[found[j][0]] == c
                y = found[j][1] if hit else 0.0
                if stage == 'o2m':
                    cls += abs(y - p) ** 2 * bce(p, y)
                else:
                    cls += 0.25 * (1 - p) ** 2 * bce(p, 1) if hit else 0.75 * p**2 * bce(p, 0)
        for j, (i, w) in found.items():
            reg_l1 += w * l1(boxes[j], gt[i])
            reg_giou += w * (1 - overlaps(boxes[j], gt[i])[1])
            z += w
    z = max(1.0, z)
    return {
        f'loss_cls{name}': 2 * cls / z,
        f'loss_l1{name}': 10 * reg_l1 / z,
        f'loss_giou{name}': 2 * reg_giou / z,
    }


def denoising_losses(dn, targets):
    out, slots = {}, dn['meta']['target'].tolist()
    z = max(1, sum(s >= 0 for row in slots for s in row))
    for d, (logits, boxes) in enumerate(zip(dn['pred_logits'].tolist(), dn['pred_boxes'].tolist())):
        cls = a = g = 0.0
        for row, z_, b_, (labels, gt) in zip(slots, logits, boxes, targets):
            for s, zs, box in zip(row, z_, b_):
                if s == -3:
                    continue
                for c, x in enumerate(zs):
                    p = sig(x)
                    cls += (
                        0.25 * (1 - p) ** 2 * bce(p, 1)
                        if s >= 0 and labels[s] == c
                        else 0.75 * p**2 * bce(p, 0)
                    )
                if s >= 0:
                    a += l1(box, gt[s])
                    g += 1 - overlaps(box, gt[s])[1]
        out |= {
            f'loss_cls_dn_{d}': 2 * cls / z,
            f'loss_l1_dn_{d}': 10 * a / z,
            f'loss_giou_dn_{d}': 2 * g / z,
        }
    return out


def criterion(outputs, targets, stage, k, denoising):
    out, layers = {}, [*outputs['aux_outputs'], outputs, outputs['enc_outputs']]
    names = [f'_{i}' for i in range(len(layers) - 2)] + ['', '_enc']
    for o, name in zip(layers, names):
        rows = list(zip(o['pred_logits'].tolist(), o['pred_boxes'].tolist()))
        out |= detection_losses(rows, targets, stage, k, name, name == '_enc')
    if denoising:
        out |= denoising_losses(outputs['extra']['denoising'], targets)
    return out


def suppress(scores, labels, boxes, iou=0.6):
    keep = []
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):

        def same(j):
            return labels[i] == labels[j] and overlaps([*boxes[i]], [*boxes[j]])[0] > iou

        if not any(same(j) for j in keep):
            keep.append(i)
    return keep


def pseudo_labels(theirs, ours, weak, strong, cfg):
    "B^sup and B^con of every image in the strong view, in normalised cxcywh, from the raw outputs"
    first, costs = [], []
    for b, (w, s) in enumerate(zip(weak, strong)):
        z, boxes = theirs['pred_logits'][b].tolist(), theirs['pred_boxes'][b].tolist()
        flat = [(sig(x), c, q) for q, row in enumerate(z) for c, x in enumerate(row)]

        def clip(q):
            x1, y1, x2, y2 = (min(max(v, 0), 1) for v in corners(boxes[q]))
            return [
                (x1 + x2) / 2 * w['size'][1],
                (y1 + y2) / 2 * w['size'][0],
                (x2 - x1) * w['size'][1],
                (y2 - y1) * w['size'][0],
            ]

        cand = [(p, c, clip(q)) for p, c, q in flat]
        kept = [cand[i] for i in suppress(*zip(*cand))][:300]
        scores = [k[0] for k in kept]
        mean = sum(scores) / len(scores)
        std = math.sqrt(sum((x - mean) ** 2 for x in scores) / (len(scores) - 1))
        moved = []
        for p, c, (x, y, bw, bh) in kept:
            if p < mean + std or bw <= 0 or bh <= 0:
                continue
            h, v = s['size']
            x1, y1, x2, y2 = x - bw / 2 + 9, y - bh / 2 - 5, x + bw / 2 + 9, y + bh / 2 - 5
            x1, x2, y1, y2 = min(max(x1, 0), v), min(max(x2, 0), v), min(max(y1, 0), h), min(max(y2, 0), h)
            if x2 - x1 > 1 and y2 - y1 > 1:
                moved.append((p, c, [(x1 + x2) / 2 / v, (y1 + y2) / 2 / h, (x2 - x1) / v, (y2 - y1) / h]))
        C = cost_matrix(
            ours['pred_logits'][b].tolist(),
            ours['pred_boxes'][b].tolist(),
            [m[1] for m in moved],
            [m[2] for m in moved],
        )
        q, t = linear_sum_assignment(C)
        first.append(moved)
        costs.append([C[q[list(t).index(i)], i] for i in range(len(moved))])
    x = np.array(sum(costs, []))[:, None]
    mix = GaussianMixture(
        2,
        covariance_type='diag',
        reg_covar=1e-5,
        weights_init=[0.5, 0.5],
        means_init=[[x.min()], [x.max()]],
        precisions_init=[[1.0], [1.0]],
    ).fit(x)
    low = mix.predict(x) == 0
    tau = x[np.where(low, mix.score_samples(x), -np.inf).argmax(), 0]
    sup = [[m for m in row if m[0] >= cfg.pseudo.threshold] for row in first]
    con = [
        [m for m, c in zip(row, cs) if m[0] >= cfg.pseudo.threshold or c <= tau + 1e-9]
        for row, cs in zip(first, costs)
    ]
    return sup, con, tau


def consistency(ours, theirs):
    "loss_con of every layer from the decoders' outputs"
    out, a, b = {}, ours['extra']['consistency'], theirs['extra']['consistency']
    w = a['meta']['weight'].tolist()
    for d, (s, t) in enumerate(zip(a['hs'].tolist(), b['hs'].tolist())):
        total = slots = real = 0.0
        for i in range(len(w)):
            for j in range(len(w[i])):
                if w[i][j] < 0:
                    continue
                ns, nt = math.sqrt(sum(v * v for v in s[i][j])), math.sqrt(sum(v * v for v in t[i][j]))
                total += sum((x / ns - y / nt) ** 2 for x, y in zip(s[i][j], t[i][j]))
                slots += 1
                real += w[i][j]
        out[f'loss_con_{d}'] = 10 * (real / slots) * total / (slots * len(s[0][0]))
    return out


class Listener:
    "A detector whose decoder outputs are kept"

    def __init__(self, net):
        self.net, self.heard = net, []

    def __getattr__(self, name):
        return getattr(self.net, name)

    def decode(self, *a, **k):
        self.heard.append(self.net.decode(*a, **k))
        return self.heard[-1]

    def __call__(self, images, mask, targets=None):
        self.heard.append(self.net(images, mask, targets))
        return self.heard[-1]


def plain(targets):
    return [(t['labels'].tolist(), t['boxes'].tolist()) for t in targets]


@pytest.mark.parametrize('step,stage', [(3, 'o2m'), (10, 'o2o')])
def test_every_loss_of_a_step_against_the_slow_reference(step, stage):
    student, teacher = map(Listener, nets())
    method, data = build(unsup_weight=4.0), batch()
    losses, stats, *_ = run(method, step, nets=(student, teacher), data=data)
    labelled, ours, theirs = student.heard[0], student.heard[-1], teacher.heard[0]
    want = criterion(labelled, plain(data['labelled']['targets']), stage, 3, True)
    sup, con, tau = pseudo_labels(
        theirs, student.heard[1], data['weak']['targets'], data['strong']['targets'], method.cfg
    )
    assert sum(map(len, sup)) > 2 and sum(map(len, con)) > sum(map(len, sup))  # the example is alive
    assert stats['cost_threshold'] == pytest.approx(tau, abs=1e-9)
    assert stats['con_boxes'] == sum(map(len, con)) / 3 and stats['strong_boxes'] == sum(map(len, sup)) / 3
    if stage == 'o2m':
        rows = zip(ours['pred_logits'].tolist(), ours['pred_boxes'].tolist(), sup)
        assert stats['positives_per_object'] == sum(
            len(o2m(z, b, [m[1] for m in row], [m[2] for m in row], 3)) for z, b, row in rows
        ) / sum(map(len, sup))
    unsup = criterion(
        ours, [([m[1] for m in row], [m[2] for m in row]) for row in sup], stage, 3, stage == 'o2o'
    )
    if stage == 'o2m':
        unsup |= consistency(ours, teacher.heard[-1])
    want |= {f"loss_unsup_{k.removeprefix('loss_')}": 4 * v for k, v in unsup.items()}
    assert losses.keys() == want.keys()
    for k, v in want.items():
        assert losses[k].item() == pytest.approx(v, rel=1e-7, abs=1e-10), k
    assert len(student.heard) == 3 and len(teacher.heard) == (2 if stage == 'o2m' else 1)


# --- one pass for two ------------------------------------------------------------------


def published_order(student, teacher, data, step, method):
    "The step in the order of the published code: a pass for the costs, every view encoded again each time"
    cfg = method.cfg
    weak, strong = data['weak'], data['strong']
    part_ = data['labelled']
    stage = 'o2m' if step < cfg.method.T1 else 'o2o'
    losses = set_criterion(
        student(part_['images'], part_['mask'], part_['targets']), part_['targets'], stage, cfg.criterion
    )
    with torch.no_grad():
        taught = teacher(weak['images'], weak['mask'])
        first = student(strong['images'], strong['mask'])
    mined = mine_pseudo_labels(taught, first, weak['targets'], strong['targets'], cfg)
    targets, cdn = keep_boxes(mined['strong'], mined['sup']), has_denoising(stage, cfg.method)
    extras, con = student.denoise(targets) if cdn else [], {}
    asked = []
    if stage == 'o2m':
        picked = box_picker(cfg.consistency)(
            *(keep_boxes(mined['weak'], mined[k]) for k in ('con', 'sup')),
            [t['size'] for t in weak['targets']],
        )
        pairs = pair_boxes(picked, weak['targets'], strong['targets'], cfg.consistency)
        asked, same = cross_view_extras(
            method.projector,
            teacher.encode(weak['images'], weak['mask']),
            student.encode(strong['images'], strong['mask']),
            pairs,
            [p['images'].shape[-2:] for p in (weak, strong)],
            cfg.consistency,
        )
    outputs = student.decode(student.encode(strong['images'], strong['mask']), [*asked, *extras])
    if stage == 'o2m':
        with torch.no_grad():
            answers = teacher.decode(teacher.encode(weak['images'], weak['mask']), same)
        con = cross_view_losses(outputs, answers, cfg.consistency)
    return losses | weighted(
        {**set_criterion(outputs, targets, stage, cfg.criterion, denoising=cdn), **con},
        cfg.method.unsup_weight,
        'unsup',
    )


@pytest.mark.parametrize('step,groups', [(3, 1), (3, 5), (10, 1)])
def test_one_pass_gives_the_losses_and_gradients_of_the_published_order(step, groups):
    student, teacher = nets()
    method = build(con=dict(groups=groups), unsup_cdn='always')
    a = run(method, step, nets=(student, teacher))[0]
    ga = backward(a, student, method)
    torch.manual_seed(1)
    b = published_order(student, teacher, batch(), step, method)
    gb = backward(b, student, method)
    assert a.keys() == b.keys() and any('_dn' in k for k in a) and ('loss_unsup_con_0' in a) is (step == 3)
    for k in a:
        assert a[k].item() == pytest.approx(b[k].item(), rel=1e-9), k
    for x, y in zip(ga, gb):
        assert torch.allclose(x, y, atol=1e-9 * max(1.0, float(y.abs().max())), rtol=1e-7)
    assert sum(float(g.abs().sum()) > 0 for g in ga) > 100


def test_groups_change_neither_loss_nor_gradient():
    student, teacher = nets()
    one, five = (
        run(method, nets=(student, teacher))
        and backward(run(method, nets=(student, teacher))[0], student, method)
        for method in (build(), build(con=dict(groups=5)))
    )
    for x, y in zip(one, five):
        assert torch.allclose(x, y, atol=1e-9 * max(1.0, float(y.abs().max())), rtol=1e-6)


# --- stages, weights, gradients --------------------------------------------------------


@pytest.mark.parametrize('step,o2m_stage', [(9, True), (10, False)])  # spec items 31, 34
def test_what_acts_in_which_stage(step, o2m_stage):
    losses, stats, student, teacher = run(method := build(), step)
    assert ('loss_unsup_con_0' in losses) is o2m_stage and any(
        'unsup' in k and '_dn' in k for k in losses
    ) is not o2m_stage
    assert any(k.startswith('loss_cls_dn') for k in losses)  # of labelled images in both
    backward(losses, student, method)
    moved = sum(float(p.grad.abs().sum()) for p in method.projector.parameters() if p.grad is not None)
    assert (moved > 0) is o2m_stage and all(p.grad is None for p in teacher.parameters())
    assert o2m_stage or stats['positives_per_object'] == 1


def test_doubling_the_weight_doubles_every_unsupervised_gradient():  # spec item 40
    student, teacher = nets()

    def unsup(w):
        method = build(unsup_weight=w)
        return backward(
            {k: v for k, v in run(method, nets=(student, teacher))[0].items() if 'unsup' in k},
            student,
            method,
        )

    for x, y in zip(unsup(1.0), unsup(2.0)):
        assert torch.allclose(2 * x, y, rtol=1e-9, atol=1e-12)


def test_without_consistency_and_mining_it_is_the_mean_teacher():
    student, teacher = nets()
    for step in (3, 10):
        a, s, *_ = run(
            build(mining=dict(init='score', con_filter='score'), con=dict(weight=0.0)),
            step,
            nets=(student, teacher),
        )
        method = build(name='mean_teacher')
        torch.manual_seed(1)
        b, r, _ = method.step(student, teacher, batch(), step)
        assert a.keys() == b.keys() and s['strong_boxes'] == r['strong_boxes'] > 0
        for k in a:
            assert a[k].item() == pytest.approx(b[k].item(), rel=1e-9), k


def test_burn_in_and_missing_images_are_supervised():
    method, data = build(burn_in_iters=5), batch()
    assert not any('unsup' in k for k in run(method, 4)[0])
    del data['weak'], data['strong']
    assert not any('unsup' in k for k in run(build(), 4, data=data)[0])


def test_sets_are_nested():  # spec item 26
    student, teacher = nets()
    data = batch()
    with torch.no_grad():
        taught, ours = (
            teacher(data['weak']['images'], data['weak']['mask']),
            student(data['strong']['images'], data['strong']['mask']),
        )

    def mined(**k):
        cfg = build(mining=k).cfg
        return mine_pseudo_labels(taught, ours, data['weak']['targets'], data['strong']['targets'], cfg)

    a, same = mined(), mined(con_filter='score')
    assert all((~s | c).all() for s, c in zip(a['sup'], a['con'])) and sum(
        int(c.sum()) for c in a['con']
    ) > sum(int(s.sum()) for s in a['sup'])
    assert all(torch.equal(s, c) for s, c in zip(same['sup'], same['con']))
    assert not any(c.requires_grad for c in a['costs'])


def test_buffers_of_the_networks_stay():
    student, teacher = nets()
    before = [b.clone() for m in (student, teacher) for b in m.buffers()]
    run(build(), nets=(student, teacher))
    assert all(
        torch.equal(a, b) for a, b in zip(before, [b for m in (student, teacher) for b in m.buffers()])
    )


@pytest.mark.parametrize('step', [3, 10])
@pytest.mark.parametrize(
    'con',
    [
        {},
        dict(slot_weights='slots'),
        dict(cross='both'),
        dict(correspondence='hungarian'),
        dict(density='dense'),
        dict(boxes='random'),
    ],
)
def test_no_pseudo_label_is_normal(step, con):  # spec item 32
    losses, stats, student, _ = run(
        method := build(pseudo=dict(threshold=1.0, min_score=0.999), con=con), step
    )
    assert stats['pseudo_boxes'] == stats['con_boxes'] == 0 and 'cost_threshold' not in stats
    grads = backward(losses, student, method)
    assert all(torch.isfinite(v) for v in losses.values()) and all(torch.isfinite(g).all() for g in grads)
    if step == 3 and not con:
        assert sum(v.item() for k, v in losses.items() if '_con_' in k) == 0


def test_float32_autocast_stays_finite():
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses, _, student, _ = run(method := build(torch.float32), dtype=torch.float32)
    assert all(torch.isfinite(g).all() for g in backward(losses, student, method))


# --- switches --------------------------------------------------------------------------

SWITCHES = {  # name -> (settings of `build`, iteration, part of the names of losses that change, must not)
    'cqc_cross': (dict(con=dict(cross='swap')), 3, 'con_', 'cls'),
    'cqc_norm': (dict(con=dict(norm=False)), 3, 'con_', 'cls'),
    'cqc_until': (dict(con=dict(until='end')), 10, 'con_', 'unsup_cls_'),
    'cqc_weight': (dict(con=dict(weight=1.0)), 3, 'con_', 'cls'),
    'cqc_boxes': (dict(con=dict(boxes='score')), 3, 'con_', 'cls'),
    'cqc_slots': (
        dict(con=dict(boxes='score', slot_weights='slots'), pseudo=dict(threshold=0.45)),
        3,
        'con_',
        None,
    ),
    'cpm_init': (dict(mining=dict(init='score')), 3, 'con_', 'loss_cls'),
    'cpm_union': (dict(mining=dict(union=False)), 3, 'con_', 'cls'),
    'sup_filter': (dict(mining=dict(sup_filter='top_k', top_k=1)), 3, 'unsup_cls', 'loss_cls'),
    'loss_l1': (dict(crit=dict(loss_l1=5.0)), 3, 'l1', 'cls'),
    'enc_labels': (dict(crit=dict(enc_labels='true')), 3, 'cls_enc', 'cls_0'),
    'unsup_cdn': (dict(unsup_cdn='always'), 3, 'unsup_cls_dn', 'unsup_con'),
    'unsup_cdn_never': (dict(unsup_cdn='never'), 10, 'unsup_cls_dn', 'loss_cls'),
    'drop_degenerate': (dict(pseudo=dict(min_side=25.0)), 3, 'unsup_l1', 'loss_cls'),
    'o2m': (dict(T1=0), 3, 'l1', None),
}


@pytest.mark.parametrize('name', SWITCHES)
def test_each_switch_changes_what_it_should(name):
    change, step, moved, fixed = SWITCHES[name]
    a, b = run(build(), step)[0], run(build(**change), step)[0]

    def pick(losses, word):
        return {k: round(v.item(), 9) for k, v in losses.items() if word in k}

    assert pick(a, moved) != pick(b, moved)
    if fixed == 'loss_cls':
        assert {k: v for k, v in pick(a, 'cls').items() if 'unsup' not in k} == {
            k: v for k, v in pick(b, 'cls').items() if 'unsup' not in k
        }
    elif fixed == 'cls':
        assert pick(a, 'cls') == pick(b, 'cls')
    elif fixed:
        assert pick(a, fixed) == pick(b, fixed)


def test_degenerate_boxes_may_be_kept():
    "The published code keeps boxes that collapse: one-to-many ignores them, one-to-one must match them"
    data = batch()
    for t in data['strong']['targets']:
        t['matrix'] = torch.tensor([[1.0, 0, 500], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
    dropped, kept = (run(build(pseudo=dict(min_side=s)), 10, data=data) for s in (1.0, -1.0))
    assert dropped[1]['strong_boxes'] == 0 < kept[1]['strong_boxes']
    assert (
        all(torch.isfinite(v) for v in kept[0].values())
        and kept[0]['loss_unsup_l1'] > 0 == dropped[0]['loss_unsup_l1']
    )


# --- memory, checkpoint ----------------------------------------------------------------


def test_memory_pools_costs():
    method, pair = build(mining=dict(memory=2)), nets()
    assert isinstance(method.memory, CostMemory)
    for step in range(4):
        run(method, step, nets=pair)
    assert int((method.memory.counts > 0).sum()) == 2


def test_state_belongs_to_the_method():
    def state(name, **k):
        base = dataclasses.replace(Config(), detector=small())
        cfg = override(base, [f'method.name={name}', *(f'{a}={b}' for a, b in k.items())])
        return cfg.method.build(cfg)

    assert not list(state('supervised').state_dict()) and not list(state('mean_teacher').state_dict())
    assert isinstance(state('semi_detr').projector, Projector)
    for setting in ({'consistency.correspondence': 'hungarian'}, {'consistency.weight': 0}):
        assert not list(state('semi_detr', **setting).parameters())


def test_stopped_and_continued(tmp_path):
    "Projector, its statistics and the memory of costs come back: the same numbers as without the stop"
    from test_trainer import tiny

    cfg = tiny(
        'method.name=semi_detr',
        'method.burn_in_iters=1',
        'method.T1=4',
        'optim.iters=6',
        'mining.memory=3',
        'mining.init=all',
        'mining.sup_filter=class_rate',
        'pseudo.threshold=.02',
        'pseudo.min_score=0',
        'consistency.hidden=16',
        'run.log_every=1',
    )
    whole = Trainer(cfg, tmp_path / 'whole', progress=False)
    whole.fit()
    Trainer(cfg, tmp_path / 'half', progress=False).fit(until=3)
    again = Trainer(cfg, tmp_path / 'half', progress=False)
    assert (
        again.step == 3
        and int(again.method.memory.counts.sum()) > 0
        and int(again.method.rates.images.sum()) > 0
    )
    assert again.method.rates.rates.sum() == sum(
        len(again.data.labelled.annotation(i)['labels']) for i in range(len(again.data.labelled))
    ) / len(again.data.labelled)
    again.fit()
    for m in ('student', 'teacher', 'method'):
        a, b = getattr(whole, m).state_dict(), getattr(again, m).state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), m
    logs = [
        [json.loads(x) for x in (tmp_path / d / 'log.jsonl').read_text().splitlines()]
        for d in ('whole', 'half')
    ]
    assert [r['loss'] for r in logs[0]][3:6] == [r['loss'] for r in logs[1]][-3:] and any(
        r.get('con_boxes', 0) > 0 for r in logs[0]
    )
