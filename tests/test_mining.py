"Mining: the specification, recorded thresholds of the official code, scikit-learn on hundreds of data sets"

import dataclasses
import json
import math
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
import numpy as np
import pytest
import torch
from torch import nn
from semidetr.core import ConfigError
from semidetr.matching.losses import CriterionConfig
from semidetr.matching.matching import hungarian, pair_cost
from semidetr.semi.mining import (
    MiningConfig,
    Mixture,
    confident_boxes,
    fit_mixture,
    gather_costs,
    initial_boxes,
    log_joint,
    matched_costs,
    mean_std,
    mine,
    mined_boxes,
    mining_threshold,
)
from semidetr.semi.teacher import fixed_threshold
from semidetr.semi.variants import (
    ClassRates,
    CostMemory,
    class_rates,
    fit_mixture_sklearn,
    initial_filter,
    label_filters,
    mixture_solver,
)

GOLDEN = json.loads((Path(__file__).parent / 'golden' / 'gmm.json').read_text())
SOLVERS = ('torch', 'sklearn')
FILTERS = ('score', 'mean_std', 'top_k', 'per_class', 'all', 'cpm')
solvers = pytest.mark.parametrize('solver', SOLVERS)


def tau(costs, solver='torch'):
    return float(mining_threshold(costs, mixture_solver(MiningConfig(solver=solver)))[0])


def mine_as(detections, costs, tau, threshold=0.4, min_scores=None, **settings):
    "`mine` with the filters and the union that the settings name"
    cfg = MiningConfig(**settings)
    return mine(detections, costs, tau, threshold, cfg.union, *label_filters(cfg, min_scores))


def initial_as(images, init, threshold=0.4):
    return initial_boxes(images, initial_filter(MiningConfig(init=init), threshold))


def data_sets():
    "Costs of all sorts: (name, (n,) float64)"
    rng = np.random.default_rng(0)
    for i in range(200):  # like the real ones: two overlapping clusters of any size, a few outliers
        n, share = rng.integers(2, 120), rng.uniform(0, 1)
        x = np.where(
            rng.random(n) < share,
            rng.normal(-rng.uniform(0, 5), rng.uniform(0.02, 1.5), n),
            rng.normal(rng.uniform(-1, 3), rng.uniform(0.02, 1.5), n),
        )
        yield f'clusters {i}', x
    for scale in (
        1e-6,
        1e-3,
        30.0,
        1e3,
    ):  # tiny scales sit in the regularisation of the variance, large ones fit in a step
        for i in range(10):
            yield f'scale {scale} {i}', scale * rng.normal(rng.integers(0, 2, 40) * 3, 1)
    for n in (2, 3, 5, 40):
        yield f'equal {n}', np.full(n, 1.25)
        yield f'two values {n}', np.where(np.arange(n) % 2, -2.0, 3.0)
        yield f'one far {n}', np.r_[np.full(n - 1, -2.0), 50.0]
        yield f'line {n}', np.linspace(-1, 1, n) ** 3
    for i in range(40):
        yield f'two costs {i}', rng.normal(0, 10.0 ** rng.integers(-3, 3), 2)


def slow_fit(x, reg=1e-5):
    "The algorithm one number at a time: weights, means, variances"
    w, mu, var, bound = [0.5, 0.5], [min(x), max(x)], [1.0, 1.0], -math.inf
    for _ in range(100):
        joint = [
            [
                math.log(w[k]) - 0.5 * (math.log(2 * math.pi * var[k]) + (v - mu[k]) ** 2 / var[k])
                for k in (0, 1)
            ]
            for v in x
        ]
        peak = [max(j) for j in joint]
        total = [p + math.log(sum(math.exp(a - p) for a in j)) for j, p in zip(joint, peak)]
        r = [[math.exp(a - t) for a in j] for j, t in zip(joint, total)]
        n = [sum(row[k] for row in r) + 10 * np.finfo(float).eps for k in (0, 1)]
        mu = [sum(row[k] * v for row, v in zip(r, x)) / n[k] for k in (0, 1)]
        var = [sum(row[k] * (v - mu[k]) ** 2 for row, v in zip(r, x)) / n[k] + reg for k in (0, 1)]
        w = [n[k] / sum(n) for k in (0, 1)]
        level, bound = bound, sum(total) / len(x)
        if abs(bound - level) < 1e-3:
            break
    return w, mu, var


# --- the fit ---------------------------------------------------------------------------
@solvers
@pytest.mark.parametrize('case', range(len(GOLDEN)))
def test_recorded_thresholds_of_the_official_code(case, solver):
    assert tau(GOLDEN[case]['costs'], solver) == pytest.approx(GOLDEN[case]['threshold'], abs=1e-5)


@solvers
@pytest.mark.parametrize(
    'costs,want',
    [
        ([], 0),
        ([1.5], 1.5),
        ([1, 5], 1),
        ([0, 0, 10, 10], 0),
        ([0, 0, 0, 0], 0),
        ([-3, -2.9, -2.8, -2.7, 1, 1.1, 1.2], -2.8),
        ([-5, -4.9, -4.8, 3, 3.1], -4.9),
    ],
)
def test_values_of_the_specification(costs, want, solver):  # 23
    assert tau(costs, solver) == want
    fit = mixture_solver(MiningConfig(solver=solver))
    t, _ = mining_threshold(torch.tensor(costs, dtype=torch.float32), fit)
    assert t.dtype == torch.float32 and t.ndim == 0 and float(t) == pytest.approx(want)


def test_torch_is_scikit_learn():
    n = 0
    for name, x in data_sets():
        a, b = fit_mixture(torch.from_numpy(x)), fit_mixture_sklearn(torch.from_numpy(x))
        for f in ('weights', 'means', 'variances'):
            torch.testing.assert_close(
                getattr(a, f),
                getattr(b, f),
                atol=1e-5,
                rtol=1e-5,
                msg=lambda m, f=f, name=name: f'{name}, {f}: {m}',
            )
        assert tau(x.tolist()) == tau(x.tolist(), 'sklearn'), name
        n += 1
    assert n > 290


def test_scikit_learn_from_end_to_end():
    "Its own labels and its own likelihoods, without a line of ours"
    from sklearn.mixture import GaussianMixture

    for name, x in list(data_sets())[:200]:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            model = GaussianMixture(
                2,
                covariance_type='diag',
                reg_covar=1e-5,
                weights_init=[0.5, 0.5],
                means_init=[[x.min()], [x.max()]],
                precisions_init=[[1.0], [1.0]],
            ).fit(x[:, None])
        label, score = model.predict(x[:, None]), model.score_samples(x[:, None])
        low = label == (0 if (label == 0).any() else 1)
        assert tau(x.tolist()) == x[low][score[low].argmax()], name


def test_fit_is_its_definition():
    for name, x in list(data_sets())[::9]:
        got = fit_mixture(torch.from_numpy(x))
        for have, want in zip((got.weights, got.means, got.variances), slow_fit(x.tolist())):
            assert have.tolist() == pytest.approx(want, rel=1e-7, abs=1e-9), name


def test_scikit_learn_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for _ in range(3):
            fit_mixture_sklearn(torch.zeros(7))
            fit_mixture_sklearn(torch.tensor(GOLDEN[1]['costs']))


# --- the threshold ---------------------------------------------------------------------
def test_threshold_is_a_cost_of_the_low_cluster_with_the_highest_likelihood():  # 24
    for name, x in list(data_sets())[::3]:
        t, mix = mining_threshold(x.tolist())
        assert float(t) in x.tolist(), name
        w, mu, var = mix.weights.tolist(), mix.means.tolist(), mix.variances.tolist()
        joint = {
            v: [
                math.log(w[k]) - 0.5 * (math.log(2 * math.pi * var[k]) + (v - mu[k]) ** 2 / var[k])
                for k in (0, 1)
            ]
            for v in x.tolist()
        }
        low = [v for v, (a, b) in joint.items() if a >= b - 1e-9] or list(joint)
        best = max(np.logaddexp(*joint[v]) for v in low)
        assert float(t) in low and np.logaddexp(*joint[float(t)]) >= best - 1e-6, name


def test_threshold_forgets_the_order_and_follows_a_shift():  # 24
    rng = np.random.default_rng(1)
    for name, x in list(data_sets())[::5]:
        for s in SOLVERS:
            assert tau(rng.permutation(x).tolist(), s) == tau(x.tolist(), s), name
        if not name.startswith(('scale', 'two costs')):
            assert tau((x + 7).tolist()) == pytest.approx(tau(x.tolist()) + 7, abs=1e-9), name


def test_empty_low_component_falls_back():
    "A wide component 1 that is likelier everywhere: every cost counts"
    fitted = Mixture(
        *(torch.tensor(v, dtype=torch.float64) for v in ([0.01, 0.99], [-50.0, 2.0], [1.0, 1.0]))
    )
    assert float(mining_threshold([0.0, 1.75, 2.5, 9.0], lambda x: fitted)[0]) == 1.75


def test_costs_that_are_not_finite_are_left_out():
    x = [-3, -2.9, -2.8, -2.7, 1, 1.1, 1.2]
    for s in SOLVERS:
        assert tau([math.inf, *x, math.inf], s) == -2.8 and tau([math.inf], s) == 0


def test_about_half_of_the_low_cluster_passes():
    g = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(400, generator=g) * 0.5 - 4, torch.randn(400, generator=g) + 2])
    t, mix = mining_threshold(x)
    assert 0.35 < float((x[:400] <= t).float().mean()) < 0.65 and not (x[400:] <= t).any()
    torch.testing.assert_close(mix.means, torch.tensor([-4.0, 2.0]).double(), atol=0.15, rtol=0)
    torch.testing.assert_close(
        log_joint(x.double(), mix).logsumexp(-1).mean(), torch.tensor(-1.75).double(), atol=0.2, rtol=0
    )


# --- costs of boxes --------------------------------------------------------------------
def case(sizes, Q=20, C=4, seed=0):
    g = torch.Generator().manual_seed(seed)

    def boxes(*n):
        return torch.cat(
            [torch.rand(*n, 2, generator=g) * 0.5 + 0.25, torch.rand(*n, 2, generator=g) * 0.4 + 0.05], -1
        )

    return (
        dict(pred_logits=torch.randn(len(sizes), Q, C, generator=g), pred_boxes=boxes(len(sizes), Q)),
        [dict(labels=torch.randint(0, C, (n,), generator=g), boxes=boxes(n)) for n in sizes],
    )


def test_costs_are_those_of_the_assignment():
    out, targets = case([3, 0, 7])
    for weights in (CriterionConfig(), CriterionConfig(w_cls=1.0, cost_l1=2.0, w_giou=0.5)):
        costs = matched_costs(out, targets, weights)
        w = dict(w_cls=weights.w_cls, w_l1=weights.cost_l1, w_giou=weights.w_giou)
        assert [len(c) for c in costs] == [3, 0, 7]
        for b, (q, t) in enumerate(hungarian(out, targets, **w)):
            pairs = pair_cost(
                out['pred_logits'][b], out['pred_boxes'][b], targets[b]['labels'], targets[b]['boxes'], **w
            )
            for i, j in zip(t.tolist(), q.tolist()):
                assert float(costs[b][i]) == pytest.approx(float(pairs[j, i]), abs=1e-6)


def test_costs_move_with_their_boxes():
    out, (t,) = case([6])
    perm = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(
        matched_costs(out, [{k: v[perm] for k, v in t.items()}])[0], matched_costs(out, [t])[0][perm]
    )


def test_more_boxes_than_queries():
    out, targets = case([9, 2], Q=4)
    costs = matched_costs(out, targets)
    assert costs[0].isinf().sum() == 5 and costs[1].isfinite().all()
    pool = gather_costs(costs)
    assert len(pool) == 6 and pool.isfinite().all()
    sup, con = mine(
        [dict(scores=torch.zeros(len(c)), labels=torch.zeros(len(c), dtype=torch.long)) for c in costs],
        costs,
        pool.max(),
    )
    assert con[0].sum() == 4 and con[1].all() and not any(m.any() for m in sup)


def test_nothing_to_mine():
    out, targets = case([0, 0])
    costs = matched_costs(out, targets)
    t, mix = mining_threshold(gather_costs(costs))
    empty = [
        dict(scores=torch.zeros(0), labels=torch.zeros(0, dtype=torch.long), boxes=torch.zeros(0, 4))
        for _ in costs
    ]
    assert float(t) == 0 and mix.means.isnan().all() and [len(m) for m in initial_boxes(empty)] == [0, 0]
    assert [[len(m) for m in s] for s in mine(empty, costs, t)] == [[0, 0], [0, 0]]
    assert len(gather_costs([])) == 0 and mine([], [], t) == ([], [])


def test_no_gradient_and_no_state():  # 27
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

    net = Net().train()
    out, targets = case([3, 2])
    before = {k: v.clone() for k, v in net.state_dict().items()}
    logits = net.norm.weight * out['pred_logits']  # depends on a parameter
    costs = matched_costs(dict(out, pred_logits=logits), targets)
    t, mix = mining_threshold(gather_costs(costs).requires_grad_())
    _, con = mine(
        [dict(scores=torch.rand(len(c)), labels=x['labels']) for c, x in zip(costs, targets)], costs, t
    )
    assert not any(x.requires_grad for x in [*costs, t, mix.means, mix.variances, *con])
    assert net.norm.weight.grad is None and all(v.equal(before[k]) for k, v in net.state_dict().items())


# --- which boxes -----------------------------------------------------------------------
def detections(*scores, labels=None):
    return [
        dict(
            scores=torch.tensor(s),
            labels=torch.zeros(len(s), dtype=torch.long) if labels is None else torch.tensor(labels),
            boxes=torch.tensor([[0.0, 0, 9, 9]]).expand(len(s), 4),
        )
        for s in scores
    ]


def kept(masks):
    return [m.nonzero().flatten().tolist() for m in masks]


def test_initial_boxes():  # 25
    images = detections([0.9, 0.1, 0.1, 0.1], [0.9, 0.8], [0.9], [])
    assert kept(initial_boxes(images)) == kept(initial_as(images, 'mean_std')) == [[0], [], [], []]
    assert kept(initial_as(images, 'score', 0.85)) == [[0], [0], [0], []]
    assert kept(initial_boxes(images, partial(fixed_threshold, threshold=0.85))) == [[0], [0], [0], []]
    assert kept(initial_as(images, 'all')) == [[0, 1, 2, 3], [0, 1], [0], []]
    assert not initial_boxes(detections([0.9] * 18 + [0.05] * 18))[0].any()  # the pitfall of crowded images
    assert initial_as(detections([0.9] * 18 + [0.05] * 18), 'score')[0].sum() == 18


@pytest.mark.parametrize(
    'scores,passed', [([0.9, 0.1, 0.1, 0.1], [0]), ([0.9, 0.8], []), ([0.9], []), ([], [])]
)
def test_mean_std(scores, passed):
    assert mean_std(torch.tensor(scores)).nonzero().flatten().tolist() == passed


def test_boxes_without_area_are_dropped():
    d = detections([0.9, 0.9, 0.9, 0.9])
    d[0]['boxes'] = torch.tensor([[0.0, 0, 9, 9], [5, 5, 5, 9], [0, 9, 9, 9], [9, 0, 0, 9]])
    assert kept(initial_as(d, 'all')) == [[0]]


def test_sets_are_nested():  # 26
    g = torch.Generator().manual_seed(3)
    for con in FILTERS:
        for sup in FILTERS:
            images = [
                dict(
                    scores=torch.rand(n, generator=g),
                    labels=torch.randint(0, 3, (n,), generator=g),
                    boxes=torch.tensor([[0.0, 0, 9, 9]]).expand(n, 4),
                )
                for n in (0, 1, 5, 30)
            ]
            costs = [torch.randn(len(d['scores']), generator=g) for d in images]
            sets = mine_as(images, costs, torch.tensor(0.1), con_filter=con, sup_filter=sup)
            for s, c, d in zip(*sets, images):
                assert s.dtype == c.dtype == torch.bool and s.shape == c.shape == d['scores'].shape
                assert not (s & ~c).any(), (con, sup)


def test_union_and_the_paper():
    images, costs = detections([0.9, 0.5, 0.3, 0.2]), [torch.tensor([2.0, -1, -3, 0.0])]

    def sets(*threshold, **settings):
        return [kept(m) for m in mine_as(images, costs, -1.0, *threshold, **settings)]

    assert [kept(m) for m in mine(images, costs, -1.0)] == sets() == [[[0, 1]], [[0, 1, 2]]]
    assert sets(union=False) == [[[0, 1]], [[1, 2]]]
    assert sets(con_filter='score') == [[[0, 1]], [[0, 1]]]  # mining switched off: B^con = B^sup
    assert sets(con_filter='score', sup_filter='top_k', top_k=1) == [[[0]], [[0]]]
    assert sets(0.6, sup_filter='cpm') == [[[1, 2]], [[1, 2]]]
    assert sets(0.6) == [[[0]], [[0, 1, 2]]]


def test_threshold_itself_passes_in_every_precision():
    for dtype in (torch.float32, torch.float64):
        costs = [torch.tensor(GOLDEN[3]['costs'], dtype=dtype)]
        t, _ = mining_threshold(costs[0])
        for x in (t, float(t)):
            con = mine([dict(scores=torch.zeros(len(costs[0])), labels=None)], costs, x)[1][0]
            assert con.sum() == (costs[0] <= t).sum() > 0 and float(costs[0][con].max()) == float(t)


def run(name, scores, labels=None, threshold=0.4, **kw):
    "Rows that a filter of B^sup keeps"
    scores = torch.tensor(scores)
    labels = torch.zeros(len(scores), dtype=torch.long) if labels is None else torch.tensor(labels)
    keep, _ = label_filters(MiningConfig(sup_filter=name, **kw))
    mask = keep(dict(scores=scores, labels=labels), torch.zeros(len(scores)), -1.0, threshold)
    return mask.nonzero().flatten().tolist()


def test_default_filters_are_those_of_the_chapter():
    assert label_filters() == (confident_boxes, mined_boxes)
    sup, con = label_filters(MiningConfig(sup_filter='per_class', con_filter='score'))
    assert con is sup


def test_filters():
    s = [0.9, 0.1, 0.4, 0.1]
    assert run('score', s) == [0, 2] and run('all', s) == [0, 1, 2, 3]
    assert (
        run('top_k', s, top_k=1) == [0]
        and run('top_k', s, top_k=2) == [0, 2]
        and len(run('top_k', s, top_k=99)) == 4
    )
    assert run('mean_std', [0.9, 0.1, 0.1, 0.1], init='all') == [0] and run(
        'mean_std', [0.9, 0.1, 0.1, 0.1]
    ) == [0, 1, 2, 3]  # B^0 has passed it already
    labels = [0, 0, 0, 0, 1, 2, 2]
    assert run('per_class', [0.9, 0.8, 0.7, 0.6, 0.1, 0.5, 0.4], labels) == [
        0,
        1,
        4,
        5,
    ]  # the better half of each class
    assert (
        run('per_class', [0.9, 0.8, 0.7, 0.6, 0.1, 0.5, 0.4], labels, quantile=0.0) == list(range(7))
        and run('per_class', [0.9], quantile=1.0) == []
    )
    assert run('per_class', [0.9, 0.8, 0.7, 0.6, 0.1, 0.5, 0.4], labels, class_thresholds=(0.75, 0.05)) == [
        0,
        1,
        4,
        5,
        6,
    ]  # class 2: .4
    assert run(
        'per_class',
        [0.9, 0.8, 0.7, 0.6, 0.1, 0.5, 0.4],
        labels,
        class_thresholds=(0.75, 0.05),
        threshold=0.45,
    ) == [0, 1, 4, 5]
    for name in FILTERS:
        assert run(name, [], []) == []


@pytest.mark.parametrize(
    'kw,word',
    [
        (dict(con_filter='gmm'), 'cpm'),
        (dict(sup_filter='scores'), "'score'"),
        (dict(init='cpm'), 'mean_std'),
        (dict(solver='sk'), 'sklearn'),
        (dict(rate_window=0), 'rate_window'),
        (dict(memory=-1), 'memory'),
        (dict(top_k=0), 'top_k'),
        (dict(quantile=1.5), 'quantile'),
    ],
)
def test_unknown_words_are_refused(kw, word):
    with pytest.raises(ConfigError, match=f'mining.*{word}'):
        MiningConfig(**kw)


# --- as many as there are labels -------------------------------------------------------
def test_class_rates_of_a_data_set():
    class Two:
        def __len__(self):
            return 4

        def annotation(self, i):
            return dict(
                labels=torch.tensor([0, 0, 2][:i], dtype=torch.long),
                ignore=torch.tensor([False, True, False][:i], dtype=torch.bool),
            )

    assert class_rates(Two(), 4).tolist() == [0.75, 0, 0.25, 0]


def by_rate(window, rates, batches, width=256):
    "The same by plain lists: thresholds after each batch"
    past, out = [], []
    for batch in batches:
        past = [*past, batch][-window:]
        images = sum(map(len, past))
        row = []
        for c, r in enumerate(rates):
            pool = sorted(
                (
                    float(s)
                    for b in past
                    for s in sorted(
                        (float(s) for d in b for s, l in zip(d['scores'], d['labels']) if l == c),
                        reverse=True,
                    )[:width]
                ),
                reverse=True,
            )
            n = min(max(1, int(torch.tensor(r * images).round())), window * width)
            row.append(math.inf if r == 0 else pool[n - 1] if n <= len(pool) else -math.inf)
        out.append(row)
    return out


@pytest.mark.parametrize('width', [256, 3])
def test_thresholds_follow_the_rates(width):
    "Against plain lists: empty images, a class without labels, too few boxes, more than the memory holds"
    g = torch.Generator().manual_seed(0)
    rates = [2.0, 0.4, 0.0, 30.0, 0.05]
    batches = [
        [
            dict(
                scores=torch.rand(n, generator=g).sort(descending=True).values,
                labels=torch.randint(0, 5, (n,), generator=g),
            )
            for n in sizes
        ]
        for sizes in ((5, 0, 20), (0, 0, 0), (9, 9, 9), (30,), (1, 40, 3))
    ]
    rule = ClassRates(torch.tensor(rates), 3, width)
    for batch, want in zip(batches, by_rate(3, rates, batches, width)):
        torch.testing.assert_close(rule.add(batch), torch.tensor(want))
    again = ClassRates(torch.zeros(5), 3, width)
    again.load_state_dict(rule.state_dict())
    assert again.add(batches[0]).equal(rule.add(batches[0]))


RATES = """
import json
import sys
import torch
import torch.distributed as dist
from semidetr.semi.variants import ClassRates

store, rank, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
dist.init_process_group('gloo', init_method='file://' + store, rank=rank, world_size=2)
rule, thresholds = ClassRates(torch.tensor([1.0, 0.5]), 2), []
batches = ([[.9, .5], [.8, .1]], [[], []])[rank], ([[.7]], [[.6, .3], [.2]])[rank]  # numbers of images differ
for images in batches:
    found = [dict(scores=torch.tensor(s), labels=torch.zeros(len(s), dtype=torch.long)) for s in images]
    thresholds.append(rule.add(found).tolist())
with open(out, 'w') as f:
    json.dump([thresholds, rule.images.tolist()], f)
dist.destroy_process_group()
"""


def test_processes_have_the_same_thresholds(tmp_path):
    "Those of all images together: the checkpoint of the first process is that of all"
    running = [
        subprocess.Popen(
            [sys.executable, '-c', RATES, str(tmp_path / 'store'), str(r), str(tmp_path / f'{r}.json')]
        )
        for r in (0, 1)
    ]
    assert [p.wait(timeout=120) for p in running] == [0, 0]
    a, b = (json.loads((tmp_path / f'{r}.json').read_text()) for r in (0, 1))
    batches = [
        [dict(scores=s, labels=[0] * len(s)) for s in images]
        for images in ([[0.9, 0.5], [0.8, 0.1], [], []], [[0.7], [0.6, 0.3], [0.2]])
    ]
    assert (
        a == b
        and a[1] == [4, 3]
        and torch.tensor(a[0]).allclose(torch.tensor(by_rate(2, [1.0, 0.5], batches)))
    )


def test_growing_scores_let_no_more_boxes_in():
    "A fixed score keeps ever more; the rate keeps as many"
    g, rule, kept = torch.Generator().manual_seed(1), ClassRates(torch.tensor([3.0]), 1), []
    for power in (4, 2, 1, 0.5):
        batch = [
            dict(scores=torch.rand(20, generator=g) ** power, labels=torch.zeros(20, dtype=torch.long))
            for _ in range(6)
        ]
        t_c = rule.add(batch)
        masks, _ = mine_as(batch, [torch.zeros(20)] * 6, -1.0, min_scores=t_c, sup_filter='class_rate')
        kept.append((sum(int((d['scores'] >= 0.3).sum()) for d in batch), sum(int(m.sum()) for m in masks)))
    assert [n for _, n in kept] == [18] * 4 and kept[0][0] < kept[1][0] < kept[2][0] < kept[3][0]


# --- memory ----------------------------------------------------------------------------
def test_memory_of_nothing_passes_through():
    m, x = CostMemory(), torch.tensor([3.0, 1.0])
    assert m.add(x) is x and m.state_dict()['costs'].numel() == 0


def test_memory_keeps_the_last_iterations_in_order():
    m = CostMemory(2, width=4)
    rows = [[5.0], [4.0, 3.0], [], [2.0], [1.0, 0.0, 9.0]]
    got = [m.add(torch.tensor(r)).tolist() for r in rows]
    assert got == [[5.0], [5.0, 4.0, 3.0], [5.0, 4.0, 3.0], [4.0, 3.0, 2.0], [2.0, 1.0, 0.0, 9.0]]


def test_memory_keeps_the_shape_of_a_large_batch():
    m, x = CostMemory(1, width=5), torch.tensor([9.0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 10])
    assert m.add(x).equal(x)  # this iteration is never cut
    assert m.add(torch.zeros(0)).tolist() == [0, 2, 5, 8, 10] and m.counts.tolist() == [0]


def test_memory_is_saved():
    a, b = CostMemory(3, width=8), CostMemory(3, width=8)
    for i in range(5):
        a.add(torch.arange(i, dtype=torch.float32))
    b.load_state_dict(a.state_dict())
    x = torch.tensor([1.5])
    assert a.add(x).equal(b.add(x)) and a.costs.equal(b.costs) and set(a.state_dict()) == {'costs', 'counts'}
    assert not list(a.parameters()) and a.add(x.double()).dtype == torch.float64


def test_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MiningConfig().union = False
