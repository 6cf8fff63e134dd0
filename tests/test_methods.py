"One training step of each method: what reaches the student, with which weight"

import dataclasses
import pytest, torch
from semidetr.core import ConfigError
from semidetr.detectors.detector import Detector, detector_small
from semidetr.semi.methods import METHODS, Method, MethodConfig, StepResult, to_original, unsup_weight
from semidetr.semi.teacher import PseudoConfig, make_teacher
from semidetr.train.config import Config


def small():
    c = detector_small(3)
    return dataclasses.replace(
        c,
        backbone=dataclasses.replace(c.backbone, weights='none'),
        transformer=dataclasses.replace(
            c.transformer, d_model=32, ffn=32, num_queries=12, dec_layers=2, n_heads=4
        ),
    )


def part(n, boxes, seed=0, size=64):
    g = torch.Generator().manual_seed(seed)
    t = [
        dict(image_id=i, orig_size=(size, size), size=(size, size), matrix=torch.eye(3, dtype=torch.float64))
        for i in range(n)
    ]
    if boxes is not None:
        for x, k in zip(t, boxes):
            x |= dict(
                boxes=torch.rand(k, 4, generator=g) * 0.3 + 0.2, labels=torch.randint(0, 3, (k,), generator=g)
            )
    return dict(
        images=torch.randn(n, 3, size, size, generator=g),
        mask=torch.zeros(n, size, size, dtype=torch.bool),
        targets=t,
    )


@pytest.fixture(scope='module')
def nets():
    torch.manual_seed(0)
    s = Detector(small())
    return s.train(), make_teacher(s)


def batch():
    return dict(labelled=part(2, (2, 0)), weak=part(2, None, 1), strong=part(2, None, 2))


def method(threshold=0.0, **m):
    settings = MethodConfig(**{'name': 'mean_teacher', **m})
    pseudo = PseudoConfig(threshold=threshold, min_score=0.0)
    cfg = dataclasses.replace(Config(), method=settings, pseudo=pseudo, detector=small())
    return cfg.method.build(cfg)


def grads(student, losses):
    student.zero_grad()
    sum(losses.values()).backward()
    return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


def unsup(nets, weight, step=5, **k):
    torch.manual_seed(1)
    losses, scalars, _ = method(unsup_weight=weight, **k).step(*nets, batch(), step)
    return {k: v for k, v in losses.items() if '_unsup_' in k}, scalars


def test_doubling_the_weight_doubles_the_unsupervised_gradient_only(nets):  # spec item 40
    one, _ = unsup(nets, 1.0)
    g1 = grads(nets[0], one)
    two, _ = unsup(nets, 2.0)
    g2 = grads(nets[0], two)
    assert g1.abs().max() > 0 and torch.allclose(2 * g1, g2, atol=1e-5 * float(g2.abs().max()))
    torch.manual_seed(1)
    a = method(unsup_weight=1.0).step(*nets, batch(), 5).losses
    torch.manual_seed(1)
    b = method(unsup_weight=2.0).step(*nets, batch(), 5).losses
    assert all(torch.equal(a[k], b[k]) for k in a if '_unsup_' not in k)


def test_burn_in_is_supervised(nets):
    torch.manual_seed(1)
    a, _, boxes = method(burn_in_iters=10).step(*nets, batch(), 9)
    torch.manual_seed(1)
    b = method(name='supervised', burn_in_iters=10).step(*nets, batch(), 9).losses
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) and boxes == {}


@pytest.mark.parametrize('step,want', [(0, 0.0), (9, 0.0), (10, 1.0), (11, 2.0), (13, 4.0), (99, 4.0)])
def test_ramp(step, want):
    assert unsup_weight(
        step, MethodConfig(burn_in_iters=10, unsup_ramp=3, unsup_weight=4.0)
    ) == pytest.approx(want)


@pytest.mark.parametrize(
    'rule,T1,has', [('stage2', 0, True), ('stage2', 10, False), ('always', 10, True), ('never', 0, False)]
)
def test_denoising_of_pseudo_labels(nets, rule, T1, has):  # spec table 2.1, item 34
    losses, stats = unsup(nets, 1.0, unsup_cdn=rule, T1=T1)
    assert stats['pseudo_boxes'] > 0 and any('_dn' in k for k in losses) is has


def test_no_pseudo_label_is_normal(nets):
    losses, stats = unsup(nets, 1.0, threshold=1.0)
    assert (
        stats['pseudo_boxes'] == 0
        and stats['empty_images'] == 1
        and all(torch.isfinite(v) for v in losses.values())
    )
    assert torch.isfinite(grads(nets[0], losses)).all()


def test_no_unlabelled_image_is_normal(nets):
    b = batch()
    del b['weak'], b['strong']
    losses = method().step(*nets, b, 5).losses
    assert all('_unsup_' not in k for k in losses)


def test_teacher_gets_no_gradient(nets):
    grads(nets[0], unsup(nets, 1.0)[0])
    assert all(p.grad is None for p in nets[1].parameters())


def test_hidden_boxes_change_nothing(nets):
    torch.manual_seed(1)
    a = method().step(*nets, batch(), 5).losses
    b = batch()
    for name in ('weak', 'strong'):
        for t in b[name]['targets']:
            t |= dict(boxes=torch.rand(4, 4), labels=torch.zeros(4, dtype=torch.long))
    torch.manual_seed(1)
    c = method().step(*nets, b, 5).losses
    assert all(torch.equal(a[k], c[k]) for k in a)


def test_to_original():
    m = torch.tensor([[-2.0, 0, 200], [0, 2, 0], [0, 0, 1]], dtype=torch.float64)
    d = [dict(boxes=torch.tensor([[20.0, 20, 60, 40]]), labels=torch.tensor([0]), scores=torch.tensor([0.9]))]
    assert to_original(d, [dict(image_id=7, matrix=m, orig_size=(100, 100))])[0]['boxes'].tolist() == [
        [70.0, 10.0, 90.0, 20.0]
    ]


def test_unknown_names():
    with pytest.raises(ConfigError, match='mean_teacher'):
        MethodConfig(name='mean')
    with pytest.raises(ConfigError, match='stage2'):
        MethodConfig(unsup_cdn='x')


@pytest.mark.parametrize('name', METHODS)
def test_what_a_method_says_of_itself(name):
    "What is shown on the bar is also drawn; burn-in and data follow from the views"
    cls = METHODS[name]
    assert 'labelled' in cls.views and set(cls.views) <= {'labelled', 'weak', 'strong'}
    assert MethodConfig(name=name).needs_unlabelled is ('weak' in cls.views)
    assert not set(cls.shown) - set(cls.curves)
    assert MethodConfig(name=name, burn_in_iters=7).burn_in(5) == (5 if 'weak' in cls.views else 0)


def test_a_step_without_code_says_so():
    with pytest.raises(NotImplementedError):
        Method(Config()).step(None, None, {}, 0)
    assert StepResult({}, {}, {})._fields == ('losses', 'scalars', 'boxes')
