"Soft Teacher: published numbers, which boxes train what, gradients, resuming, processes, prediction"

import copy

import pytest
import torch
import torch.nn.functional as F
from rivals import FILTERS, resumed_and_read, rival, shared_step
from semidetr.core import ConfigError
from semidetr.matching.losses import set_criterion
from semidetr.semi import soft_teacher as S
from semidetr.semi.soft_teacher import SoftTeacherConfig
from semidetr.train.config import override
from semidetr.train.trainer import Trainer, make_loader
from together import run_together


# --- numbers of the specification -------------------------------------------------------------
LOGITS = torch.tensor([[0.0, 2, 0], [2, 0, 0], [0, 1, 0], [1, 1, 1]])
LABELS, BACKGROUND = torch.tensor([1, 0, 0, 0]), torch.tensor([1.0, 0.9, 0.2, 0.5])


def test_soft_background():
    "1 to 3: weighted, the floor of the sum, nothing but zeros"
    ce = F.cross_entropy(LOGITS, LABELS, reduction='none')
    assert ce.tolist() == pytest.approx([0.239545, 0.239545, 1.551445, 1.098612], abs=1e-6)
    loss = S.soft_class_loss(LOGITS, LABELS, BACKGROUND)
    assert loss.item() == pytest.approx(0.505665, abs=1e-6)
    assert S.soft_class_loss(LOGITS, LABELS, BACKGROUND, 'paper').item() == pytest.approx(0.911536, abs=1e-6)
    ones = torch.ones(4)
    assert S.soft_class_loss(LOGITS, LABELS, ones).item() == pytest.approx(0.782287, abs=1e-6)
    pair = S.soft_class_loss(LOGITS[1:3], torch.tensor([0, 0]), torch.tensor([0.1, 0.2]))
    assert pair.item() == pytest.approx(0.334243, abs=1e-6)  # weights sum to .3, but the floor is 1
    zeros = torch.zeros(5, 4, requires_grad=True)
    labels = torch.zeros(5, dtype=torch.long)
    full = S.soft_class_loss(zeros, labels, torch.full((5,), 0.5))
    little = S.soft_class_loss(zeros, labels, torch.full((5,), 0.06))
    assert full.item() == pytest.approx(1.386294, abs=1e-6)
    assert little.item() == pytest.approx(0.415888, abs=1e-6)
    none = S.soft_class_loss(zeros[:0], labels[:0], torch.zeros(0))
    none.backward()
    assert none == 0 and torch.equal(zeros.grad, torch.zeros(5, 4))


def test_jitter():
    "4: a copy, and the floor of one pixel"
    box = torch.tensor([[10.0, 20, 50, 100], [5, 5, 5.5, 5.2]])
    z = torch.tensor([1.0, -1, 0.5, 0]).expand(1, 2, 4)
    moved = S.jittered(box, z)[0]
    assert moved[0].tolist() == pytest.approx([12.4, 15.2, 51.2, 100])
    assert (moved[1] - box[1]).tolist() == pytest.approx([0.06, -0.06, 0.03, 0], abs=1e-6)


def test_uncertainty():
    "5 and 6: by x and y, or by the mean side as in the paper"
    tall = torch.tensor([[10.0, 20, 50, 100], [11, 20, 51, 100], [9, 20, 49, 100], [10, 22, 50, 102]])
    flat = torch.tensor([[5.0, 5, 45, 25], [5, 6, 45, 26], [5, 4, 45, 24], [5, 5, 45, 25]])
    both = torch.stack([tall, flat], 1)
    assert S.box_uncertainty(both).tolist() == pytest.approx([0.016456, 0.020412], abs=1e-6)
    assert S.box_uncertainty(both, 'mean_side').tolist() == pytest.approx([0.015137, 0.013608], abs=1e-6)
    assert S.box_uncertainty(torch.zeros(10, 0, 4)).shape == (0,)


def test_filters_are_strict():
    "7"
    rows = dict(
        scores=torch.tensor([0.95, 0.95, 0.6, 0.6, 0.9]),
        uncertainty=torch.tensor([0.01, 0.03, 0.01, 0.05, 0.02]),
    )
    for_class, for_box = S.soft_filters([rows], SoftTeacherConfig())
    assert for_class[0].tolist() == [True, True, False, False, False]
    assert for_box[0].tolist() == [True, False, True, False, False]


def test_regions_go_back():
    "8: through the inverse of the strong view, hull clamped to the weak view"
    strong = [dict(matrix=torch.tensor([[-2.0, 0, 200], [0, 2, 0], [0, 0, 1]]))]
    weak = [dict(matrix=torch.eye(3), size=(100, 100))]
    regions = torch.tensor([[140.0, 40, 180, 80], [-40, -10, 40, 20], [0, 0, 0, 0]])
    back = S.carry_back([regions], strong, weak)[0]
    assert back[0].tolist() == [10, 20, 30, 40] and back[1].tolist() == [80, 0, 100, 10]
    assert back.shape == (3, 4) and S.carry_back([regions[:0]], strong, weak)[0].shape == (0, 4)


@pytest.mark.parametrize(
    'item', ['jitter=1', 'jitter_kind=x', 'spread_by=x', 'background=x', 'soft_loss=x', 'class_score=2']
)
def test_wrong_settings(item):
    with pytest.raises(ConfigError, match=f"method.{item.split('=')[0]}"):
        override(rival('faster_rcnn', 'soft_teacher'), [f'method.{item}'])


# --- one step -------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    "Trainer and a batch with unlabelled images; sides of 72 pixels, no multiple of 64"
    more = ['view.short_sides=[72]', 'view.eval_short=72', 'method.burn_in_iters=0', 'data.dev=0']
    cfg = rival('faster_rcnn', 'soft_teacher', *more, 'run.test=false')
    run = Trainer(cfg, tmp_path_factory.mktemp('runs') / 'r', progress=False)
    return run, next(iter(make_loader(run.cfg, run.data, 0, False)))


def step(parts, *items, batch=None):
    "Losses and scalars of a step, and gradients of the student"
    run, usual = parts
    cfg = override(run.cfg, items)
    torch.manual_seed(0)
    student, teacher = copy.deepcopy(run.student).train(), copy.deepcopy(run.teacher)
    result = cfg.method.build(cfg, run.data.labelled).step(student, teacher, batch or usual, 0)
    student.zero_grad()
    unsup = sum(v for k, v in result.losses.items() if 'unsup' in k)
    unsup.backward()
    assert all(p.grad is None for p in teacher.parameters())
    grads = {n: p.grad for n, p in student.named_parameters() if p.requires_grad}
    return result, grads, student, teacher


def test_the_teacher_is_left_alone(parts):
    "23: no gradient and no change of the teacher or of norms; doubling w_u doubles the gradient"
    run, _ = parts
    one, grads, student, teacher = step(parts)
    names = {k for k in one.losses if 'unsup' in k}
    assert names == {f'loss_unsup_{k}' for k in ('cls', 'l1', 'rpn_cls', 'rpn_l1')}
    for k, v in teacher.state_dict().items():
        assert torch.equal(v, run.teacher.state_dict()[k])
    for k, v in student.named_buffers():
        assert torch.equal(v, dict(run.student.named_buffers())[k])
    two, doubled, _, _ = step(parts, f'method.unsup_weight={2 * run.cfg.method.unsup_weight}')
    for k in one.losses:
        assert two.losses[k].item() == pytest.approx(
            one.losses[k].item() * (2 if k in names else 1), rel=1e-5
        )
    for k, g in grads.items():
        torch.testing.assert_close(doubled[k], 2 * g, rtol=1e-3, atol=1e-6)
    assert one.scalars['pseudo_boxes'] > 0 and one.scalars['box_targets'] > 0


def test_without_pseudo_labels(parts):
    "No box loss, but connected; the classes learn background, weighted by the teacher"
    result, grads, _, _ = step(parts, *FILTERS['empty'])
    losses = {k: v.item() for k, v in result.losses.items() if 'unsup' in k}
    assert losses['loss_unsup_l1'] == losses['loss_unsup_rpn_l1'] == 0 < losses['loss_unsup_cls']
    assert all(g is not None and torch.isfinite(g).all() for g in grads.values())
    assert result.scalars['pseudo_boxes'] == 0 == result.scalars['candidates']
    plain = step(parts, *FILTERS['empty'], 'method.background=one')[0].losses['loss_unsup_cls']
    assert plain != result.losses['loss_unsup_cls']


def test_one_image(parts):
    run, usual = parts
    few = {k: {name: x[:1] for name, x in part.items()} for k, part in usual.items()}
    result, grads, _, _ = step(parts, batch=few)
    assert all(v.isfinite() for v in result.losses.values()) and all(
        g.isfinite().all() for g in grads.values()
    )


def test_which_boxes_train_what(parts, monkeypatch):
    "Proposals and classes get those of high score, boxes those that agree; the detection is the target"
    run, batch = parts
    box = torch.tensor([[10.0, 10, 30, 34], [40, 20, 60, 50], [20, 40, 44, 60]])
    rows = dict(boxes=box, labels=torch.tensor([1, 2, 3]), scores=torch.tensor([0.95, 0.95, 0.6]))
    rows['uncertainty'] = torch.tensor([0.01, 0.03, 0.01])
    monkeypatch.setattr(S.SoftTeacher, 'candidates', lambda *args: ([rows] * 2, [rows] * 2))
    seen = []
    real = S.SoftTeacher.unsup_losses
    spy = lambda self, *args: (seen.append(args), real(self, *args))[1]
    monkeypatch.setattr(S.SoftTeacher, 'unsup_losses', spy)
    same_view = dict(batch, strong=batch['weak'])
    result = step(parts, 'method.class_score=.9', 'method.max_uncertainty=.02', batch=same_view)[0]
    targets, box_targets = seen[0][4:6]
    assert targets[0]['labels'].tolist() == [1, 2] and box_targets[0]['labels'].tolist() == [1, 3]
    h, w = targets[0]['size']
    wanted = torch.tensor([0.2 * 100 / w, 22 / h])
    torch.testing.assert_close(box_targets[0]['boxes'][0, :2], wanted, rtol=1e-5, atol=1e-6)
    assert result.losses['loss_unsup_l1'] > 0


def test_identical_views_give_the_teachers_background(parts, monkeypatch):
    "The same weights and views: the weight of a region is the student's own probability"
    run, batch = parts
    weights = []
    monkeypatch.setattr(S, 'soft_class_loss', lambda z, y, b, form: (weights.append((z, b)), z.sum() * 0)[1])
    step(parts, batch=dict(batch, strong=batch['weak']))
    z, background = weights[0]
    torch.testing.assert_close(background, z.softmax(-1)[:, 0], rtol=1e-4, atol=1e-5)


def test_switches_of_the_paper(parts):
    usual = step(parts)[0].losses['loss_unsup_cls']
    for item in ('method.soft_loss=paper', 'method.background=one'):
        assert step(parts, item)[0].losses['loss_unsup_cls'] != usual
    filters = 'method.max_uncertainty=.05', 'method.candidate_score=0'
    counts = [
        step(parts, *filters, *more)[0].scalars['box_targets']
        for more in ([], ['method.jitter_kind=uniform'])
    ]
    assert counts[0] != counts[1]


# --- whole runs -----------------------------------------------------------------------------------
def test_it_resumes_and_predicts(tmp_path):
    "Stopped after the burn-in; eval and predict read the run"
    own = (
        FILTERS['boxes'],
        ['run.test=false', 'optim.iters=3', 'data.dev=2', 'method.burn_in_iters=1', 'run.log_every=1'],
    )
    cfg = rival('faster_rcnn', 'soft_teacher', *own[0], *own[1])
    result, rows = resumed_and_read(cfg, tmp_path)
    assert 'loss_unsup_rpn_cls' in rows[-1] and rows[-1]['pseudo_boxes'] > 0
    assert result['config']['method']['name'] == 'soft_teacher' and 'dev' in result['metrics']


def test_supervised_learns(parts):
    "The loss falls over a few steps on two images"
    run, batch = parts
    student, part = copy.deepcopy(run.student).train(), batch['labelled']
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(6):
        torch.manual_seed(0)
        found = set_criterion(student(part['images'], part['mask'], part['targets']), part['targets'])
        losses.append(sum(found.values()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


# --- processes, of Dense Teacher too --------------------------------------------------------------
# nothing may be drawn: all anchors and regions are sampled, and copies are not shifted
DRAWN = ['method.jitter_scale=0', 'detector.rpn_samples=100000', 'detector.roi_samples=100000']
SHARED = dict(
    soft_teacher=[*DRAWN, 'detector.proposals=20', 'method.class_score=.1'],
    dense_teacher=['method.dense_ratio=.05'],
)
WORKER = """
import torch
import rivals
from semidetr.core import is_main, start_processes
start_processes()
found = {{name: rivals.shared_step(name, sys.argv[1] + name, *items) for name, items in {shared}.items()}}
if is_main():
    torch.save(found, sys.argv[1] + '.pt')
"""


def test_two_processes_and_two_batches_take_the_step_of_one(tmp_path):
    "Background weights are summed, and regions of points pooled, over both"
    run_together(WORKER.format(shared=SHARED), tmp_path / 'two')
    both = torch.load(tmp_path / 'two.pt')
    for name, items in SHARED.items():
        one, turns = (
            shared_step(name, tmp_path / name, *items),
            ('optim.accumulate=2', 'optim.normalise=step'),
        )
        assert one['grads'].norm() > 0
        for two in (both[name], shared_step(name, tmp_path / f'{name} 2', *items, *turns)):
            torch.testing.assert_close(two['losses'], one['losses'], rtol=1e-9, atol=1e-9)
            assert (one['grads'] - two['grads']).norm() <= 1e-8 * one['grads'].norm()
