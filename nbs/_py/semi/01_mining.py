# %% [markdown]
# # Mining pseudo labels {#sec-mining}
#
# > Find the pseudo boxes on which teacher and student agree, without a hand-tuned threshold.
#
# A threshold on the score relies on the confidence of the teacher. But scores are not calibrated: early in
# training correct boxes score .2, later wrong ones score .7, and the score that separates them changes all the
# time. The *cost-based pseudo label mining* of Semi-DETR compares the teacher with the student instead, which
# has predicted on a different, heavily augmented view of the same image. The comparison is the cost of
# matching the student's predictions to the teacher's boxes: low for a box that both networks predict, high
# for a box that only one of them does. The costs of a batch are fitted by a mixture of two Gaussians, and its
# component of low costs gives the threshold below which boxes are mined.

# %%
#| default_exp semi.mining

# %%
#| export
import math
from dataclasses import dataclass
import torch
from torch import Tensor
from semidetr.core import ConfigError, all_gather_cat, in_range, one_of
from semidetr.matching.losses import CriterionConfig
from semidetr.matching.matching import hungarian
from semidetr.semi.teacher import fixed_threshold, keep_boxes, pseudo_stats, to_original

# %%
import matplotlib.pyplot as plt
from semidetr.boxes import box_iou, cxcywh_to_xyxy
from semidetr.draw import COLORS, curve, draw_mixture

# %% [markdown]
# ## Three sets of boxes
#
# Let the teacher detect $K$ boxes in an image, with scores $s_1,\dots,s_K$ of mean $\bar s$ and unbiased
# standard deviation $\sigma_s$. Of these,
#
# $$
# B^{0} = \{b:\; s_b \ge \bar s+\sigma_s\}, \qquad
# B^{sup} = \{b\in B^0:\; s_b\ge\tau_s\}, \qquad
# B^{con} = \{b\in B^0:\; c_b\le\tau_c\}\cup B^{sup}
# $$ {#eq-mining-sets}
#
# * $B^{0}$, the initial boxes, are those whose score is high for their image. Each of them gets a cost $c_b$;
# * $B^{sup}$ are confident as well, $\tau_s=.4$. They are the targets of the class and box losses, and
#   denoising queries are made of them. A confident box outside of $B^0$ is not used;
# * $B^{con}$ are the mined boxes, with costs up to the threshold $\tau_c$ of this chapter, and $B^{sup}$. They
#   are used by the consistency between views (@sec-consistency) alone. There a box has to cover an object but
#   does not have to fit it tightly, so more boxes are better.

# %%
#| export
_FILTERS = ('score', 'mean_std', 'top_k', 'per_class', 'class_rate', 'class_mixture', 'all', 'cpm')


@dataclass(frozen=True)
class MiningConfig:
    "Settings of mining; the defaults are those of the published code, other filters are in @sec-variants"

    # filters: 'score', 'mean_std', 'top_k', 'per_class', 'class_rate', 'class_mixture', 'all', 'cpm'
    con_filter: str = 'cpm'  # B^con: 'cpm' (mined), 'score' (the same as B^sup), or another filter
    sup_filter: str = 'score'  # B^sup: 'score' (pseudo.threshold), 'cpm' (worse in the paper), or another
    init: str = 'mean_std'  # B^0: 'mean_std' (code), 'score' (paper), 'all'
    union: bool = True  # B^con includes B^sup (code); False: the boxes of the filter alone (paper)
    top_k: int = 10  # 'top_k': boxes per image
    quantile: float = 0.5  # 'per_class': share of the boxes of each class in an image that is dropped
    class_thresholds: tuple[float, ...] = ()  # 'per_class' with these: one score per class instead
    rate_window: int = 20  # 'class_rate': iterations whose scores set the thresholds
    memory: int = 0  # past iterations whose costs join the fit; 0 = this batch alone (code)
    solver: str = 'torch'  # fit of the mixture: 'torch' (on the device) or 'sklearn' (as the code)

    def __post_init__(self):
        one_of(
            'mining',
            self,
            con_filter=_FILTERS,
            sup_filter=_FILTERS,
            init=('mean_std', 'score', 'all'),
            solver=('torch', 'sklearn'),
        )
        in_range('mining', self, memory=0, top_k=1, rate_window=1, quantile=(0, 1))
        if {self.sup_filter, self.con_filter} == {'class_rate', 'class_mixture'}:
            raise ConfigError(
                f'mining.sup_filter={self.sup_filter} and mining.con_filter={self.con_filter}: use one of '
                'class_rate and class_mixture for both'
            )


# %% [markdown]
# ## Initial boxes

# %%
#| export
def mean_std(
    scores: Tensor,  # (K,) of one image
) -> Tensor:  # (K,) bool
    "Scores of at least mean + unbiased standard deviation (@eq-mining-sets); none of fewer than two scores"
    if len(scores) < 2:
        return torch.zeros_like(scores, dtype=torch.bool)
    return scores >= scores.mean() + scores.std()


@torch.no_grad()
def initial_boxes(
    detections: list,  # per image dict(scores (K,), boxes (K,4) xyxy of the weak view), after suppression
    score_filter=mean_std,  # scores (K,) -> (K,) bool
) -> list:  # per image (K,) bool
    "B^0, the boxes that get a cost: those that pass the filter and have an area"
    return [score_filter(d['scores']) & (d['boxes'][:, 2:] > d['boxes'][:, :2]).all(1) for d in detections]


# %% [markdown]
# An image with one detection keeps none, nor does one with two different scores: no value lies a full
# (unbiased) standard deviation above the mean of two.

# %%
def detections_of(*scores):  # boxes with an area, class 0
    return [
        dict(
            scores=torch.tensor(s),
            labels=torch.zeros(len(s), dtype=torch.long),
            boxes=torch.tensor([[0.0, 0, 9, 9]]).expand(len(s), 4),
        )
        for s in scores
    ]


four = initial_boxes(detections_of([0.9, 0.1, 0.1, 0.1], [0.9, 0.8], [0.9], []))
assert [m.tolist() for m in four] == [[True, False, False, False], [False, False], [False], []]
four

# %% [markdown]
# The rule fails for many similar objects, such as cells in a blood smear or digits. Of 18 boxes that score .9
# and 18 that score .05, the mean is .475 and the standard deviation .431, and no score reaches .906. The image
# keeps no box, and this happens more often as the teacher improves. For such data, start from the score
# (`mining.init=score`):

# %%
crowded = detections_of([0.9] * 18 + [0.05] * 18)
min_score = crowded[0]['scores'].mean() + crowded[0]['scores'].std()
sizes = {f.__name__: int(initial_boxes(crowded, f)[0].sum()) for f in (mean_std, fixed_threshold)}
assert sizes == dict(mean_std=0, fixed_threshold=18) and abs(min_score - 0.906) < 1e-3
sizes, min_score


# %% [markdown]
# ## The cost of a box
#
# The boxes of $B^0$ are moved to the strong view (@sec-teacher) and matched one-to-one to the predictions of
# the student's last layer: without gradient, without denoising queries, with the cost of @eq-matching-cost. In
# both stages of training each box gets exactly one query, and $c_b$ is the cost of that pair. If an image has
# more boxes than the student has queries, the boxes without a query have infinite cost.

# %%
#| export
@torch.no_grad()
def matched_costs(
    outputs: dict,  # student's last layer on the strong view: `pred_logits` (B,Q,C), `pred_boxes` (B,Q,4)
    targets: list,  # B^0 after transport: per image dict(labels (K,), boxes (K,4) cxcywh of the strong view)
    criterion: CriterionConfig = CriterionConfig(),  # weights of the cost
) -> list:  # per image (K,) float32; inf where there were fewer queries than boxes
    "Cost c_b of each box in the best assignment to the student's predictions (@eq-matching-cost)"
    costs, pairs = [], hungarian(outputs, targets, with_cost=True, **criterion.mining_cost)
    for t, (_, box, cost) in zip(targets, pairs):
        costs.append(cost.new_full((len(t['labels']),), math.inf).scatter(0, box, cost))
    return costs


def gather_costs(
    costs: list,  # per image (K,)
) -> Tensor:  # (n,) finite costs of all processes, in the order of the ranks
    "The costs of the whole batch, over all processes; every process must call it, with or without boxes"
    own = torch.cat(costs) if costs else torch.zeros(0)
    return all_gather_cat(own[own.isfinite()])


# %% [markdown]
# An example: the student predicts class 0 on the left and nothing else. The teacher predicts the same box, the
# same place with another class, or a box on the right:

# %%
student_out = dict(
    pred_logits=torch.tensor([[[3.0, -4.0], [-4.0, -4.0], [-4.0, -4.0]]]),
    pred_boxes=torch.tensor([[[0.3, 0.5, 0.3, 0.4], [0.6, 0.2, 0.3, 0.3], [0.2, 0.8, 0.3, 0.3]]]),
)
teacher_boxes = [
    dict(labels=torch.tensor([k]), boxes=torch.tensor([b]))
    for k, b in ((0, [0.3, 0.5, 0.3, 0.4]), (1, [0.3, 0.5, 0.3, 0.4]), (0, [0.8, 0.5, 0.3, 0.4]))
]
agreed, wrong_class, elsewhere = (matched_costs(student_out, [box])[0].item() for box in teacher_boxes)
assert agreed < -6 and min(wrong_class, elsewhere) > agreed + 4
agreed, wrong_class, elsewhere


# %% [markdown]
# The cost is low only where both the class and the place agree.
#
# ## A mixture of two Gaussians
#
# Let $c_1,\dots,c_n$ be the costs of the whole batch, over all processes. Their density is modelled as
#
# $$
# p(c) = \sum_{k=0}^{1}\pi_k\,\mathcal{N}(c;\,\mu_k,\sigma_k^2)
# $$ {#eq-mining-mixture}
#
# and fitted by expectation maximisation. Each iteration computes the responsibilities $r_{nk}$ of the
# components for the costs, and from these the weights, means and variances:
#
# $$
# r_{nk} = \frac{\pi_k\,\mathcal{N}(c_n;\mu_k,\sigma_k^2)}{p(c_n)},\quad
# \pi_k = \frac1n\sum_n r_{nk},\quad
# \mu_k = \frac{\sum_n r_{nk}c_n}{\sum_n r_{nk}},\quad
# \sigma_k^2 = \frac{\sum_n r_{nk}(c_n-\mu_k)^2}{\sum_n r_{nk}}+10^{-5}
# $$ {#eq-mining-em}
#
# The fit is deterministic: $\mu_0$ starts at the smallest cost and $\mu_1$ at the largest, both variances at 1
# and both weights at one half, so component 0 is the one of low costs. It ends when the mean log-likelihood
# changes by less than $10^{-3}$, or after 100 iterations.
#
# The published code uses scikit-learn. The fit below takes the same steps in torch, so costs on a GPU stay
# there (@sec-variants compares the two).

# %%
#| export
@dataclass
class Mixture:
    "Two Gaussians over costs; component 0 started at the smallest cost. All tensors (2,) float64"

    weights: Tensor  # pi
    means: Tensor  # mu
    variances: Tensor  # sigma squared


def log_joint(
    x: Tensor,  # (n,) costs
    mixture: Mixture,
) -> Tensor:  # (n,2)
    "Logarithm of weight times density of each component (a summand of @eq-mining-mixture)"
    w, mu, var = mixture.weights, mixture.means, mixture.variances
    return w.log() - 0.5 * (math.log(2 * math.pi) + var.log() + (x[:, None] - mu) ** 2 / var)


@torch.no_grad()
def fit_mixture(
    costs: Tensor,  # (n,)
    reg: float = 1e-5,  # added to the variances
    max_iter: int = 100,
    tol: float = 1e-3,  # stop when the mean log-likelihood changes by less
) -> Mixture:  # nan without costs
    "Expectation maximisation (@eq-mining-em) in float64, on the device of the costs"
    x = costs.double()
    if not len(x):
        return Mixture(*x.new_full((3, 2), math.nan))
    mixture = Mixture(x.new_full((2,), 0.5), torch.stack([x.min(), x.max()]), x.new_ones(2))
    bound = -math.inf
    for _ in range(max_iter):
        joint = log_joint(x, mixture)
        total = joint.logsumexp(1)  # (n,) log p(c_n)
        r = (joint - total[:, None]).exp()  # (n,2)
        n = r.sum(0) + 10 * torch.finfo(x.dtype).eps  # as in scikit-learn
        mu = (r * x[:, None]).sum(0) / n
        var = (r * (x[:, None] - mu) ** 2).sum(0) / n + reg
        mixture = Mixture(n / n.sum(), mu, var)
        likelihood = total.sum() / len(x)
        if (likelihood - bound).abs() < tol:
            break
        bound = likelihood
    return mixture


# %%
g = torch.Generator().manual_seed(0)
low, high = torch.randn(400, generator=g) * 0.7 - 3, torch.randn(600, generator=g) + 1
fitted = fit_mixture(torch.cat([low, high]))
assert torch.allclose(fitted.means, torch.tensor([-3.0, 1.0]).double(), atol=0.1)
assert torch.allclose(fitted.weights, torch.tensor([0.4, 0.6]).double(), atol=0.02)
fitted


# %% [markdown]
# ## The threshold
#
# The threshold is the cost with the highest density among the costs that belong to component 0:
#
# $$
# \tau_c = \operatorname{arg\,max}_{c\,\in\,\{c_n:\; r_{n0}\ge r_{n1}\}}\; p(c).
# $$ {#eq-mining-threshold}
#
# This is the *mode* of the component of low costs, not the boundary between the two. About half of the
# component lies above its mode and is not mined; in exchange, the threshold keeps a distance to doubtful boxes.

# %%
#| export
@torch.no_grad()
def mining_threshold(
    costs,  # (n,) tensor or list of numbers; values that are not finite are left out
    fit=fit_mixture,  # costs (n,) -> Mixture
):  # (tau_c: 0-d tensor, one of the costs, or 0 without any; Mixture)
    "The cost with the highest likelihood in the component of low costs (@eq-mining-threshold)"
    x = costs.detach().flatten() if isinstance(costs, Tensor) else torch.tensor(costs, dtype=torch.float64)
    x = x[x.isfinite()].sort().values
    mixture = fit(x)
    if not len(x):
        return x.new_zeros(()), mixture
    joint = log_joint(x.double(), mixture)
    low = joint[:, 0] >= joint[:, 1] - 1e-9  # up to rounding; ties belong to component 0, as in scikit-learn
    allowed = low | ~low.any()  # no cost in component 0: all are allowed
    score = joint.logsumexp(1).masked_fill(~allowed, -math.inf)
    likely = score >= score.max() - 1e-9  # equally likely: the larger cost
    return x[torch.where(likely, x, -math.inf).argmax()], mixture


# %% [markdown]
# The threshold is always one of the costs and does not depend on their order. A few costs need no special
# treatment:

# %%
batches = [
    [],
    [1.5],
    [1, 5],
    [0, 0, 10, 10],
    [0, 0, 0, 0],
    [-3, -2.9, -2.8, -2.7, 1, 1.1, 1.2],
    [-5, -4.9, -4.8, 3, 3.1],
]
thresholds = [float(mining_threshold(c)[0]) for c in batches]
assert thresholds == [0, 1.5, 1, 0, 0, -2.8, -4.9]
list(zip(batches, thresholds))


# %% [markdown]
# ::: {.callout-note}
# ## Paper vs. code
# The paper writes the threshold as the cost with the largest posterior of the reliable component,
# $\operatorname{arg\,max}_c P(\text{reliable}\mid c)$. Read literally, this is a cost at the far end of that
# component (the smallest one, unless the component is much the narrower), and hardly any box would pass; the
# code takes the most likely sample of the cluster, as here. Two equally likely costs are told apart by
# rounding in scikit-learn; here the larger one is taken, so that both solvers and any order of the costs
# agree.
# :::
#
# ## Why a Gaussian mixture separates good pseudo labels
#
# Three assumptions have to hold, and none of them is about Gaussians.
#
# 1. *Correct boxes agree systematically, wrong ones by chance.* An object is visible in both views. A false
#    detection depends on some texture, scale or border of one view, and the other view has been flipped,
#    recoloured and erased.
# 2. *The cost measures agreement on one scale.* Class, distance and overlap must all agree for a low cost
#    (@eq-matching-cost), and the scale is the same for all images, so one fit serves the batch.
# 3. *The costs have two modes.* Then a model of two components finds them wherever they are. The fit is
#    repeated in every iteration, so the threshold follows the detector.
#
# The following simulation has a teacher and a student of a given skill between 0 and 1. With higher skill,
# their boxes are closer to the five objects of an image, and the student is more confident about the classes.
# The teacher adds four false positives to each image, one of which the student predicts as well. A pseudo box
# is *correct* if it overlaps an object of its class by one half.

# %%
def simulate(skill, seed=0, images=24, objects=5, classes=6):
    "The teacher's detections, the same boxes as targets, the student's outputs, and which boxes are correct"
    g = torch.Generator().manual_seed(seed)

    def random_boxes(n):
        return torch.cat(
            [torch.rand(n, 2, generator=g) * 0.7 + 0.15, torch.rand(n, 2, generator=g) * 0.25 + 0.1], 1
        )

    def jittered(boxes, by):
        return (boxes + by * torch.randn(boxes.shape, generator=g) * boxes[:, [2, 3, 2, 3]]).clamp(0.02, 0.98)

    def random_classes(n):
        return torch.randint(0, classes, (n,), generator=g)

    detections, targets, logits, queries, correct = [], [], [], [], []
    for _ in range(images):
        truth = random_boxes(objects)
        kind = random_classes(objects)
        false = random_boxes(4)
        found = torch.rand(objects, generator=g) < 0.5 + 0.5 * skill
        boxes = torch.cat([jittered(truth[found], 0.16 - 0.1 * skill), false])
        labels = torch.cat([kind[found], random_classes(4)])
        overlap = box_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(truth)) >= 0.5
        correct.append((overlap & (labels[:, None] == kind)).any(1))
        raw = torch.where(correct[-1], 3.5 * skill - 1.5, 1.5 * skill - 2)
        scores = (raw + torch.randn(len(boxes), generator=g)).sigmoid()
        near = jittered(truth.repeat(3, 1), 0.2 - 0.14 * skill)
        copied = jittered(false[:1], 0.2)
        queries.append(torch.cat([near, copied, random_boxes(30)]))
        confident = 3 * objects + 1
        z = torch.randn(len(queries[-1]), classes, generator=g) - 4
        predicted = torch.cat([kind.repeat(3), labels[-4:-3]])
        z[range(confident), predicted] += 1 + 5 * skill * torch.rand(confident, generator=g).sqrt()
        logits.append(z)
        detections.append(dict(scores=scores, labels=labels, boxes=100 * cxcywh_to_xyxy(boxes)))
        targets.append(dict(labels=labels, boxes=boxes))
    outputs = dict(pred_logits=torch.stack(logits), pred_boxes=torch.stack(queries))
    return detections, targets, outputs, torch.cat(correct)


# %%
#| label: fig-mining-mixture
#| fig-cap: "Correct boxes have low costs and wrong ones high costs, and the fit finds the two components without labels. The dashed threshold is the mode of the component of low costs: few wrong boxes lie below it."
#| fig-alt: "Histogram of costs between minus four and four with outlines of correct boxes on the left and wrong ones on the right, two Gaussian curves, and a dashed vertical line at the peak of the left one."
detections, targets, outputs, correct = simulate(0.6)
costs = matched_costs(outputs, targets)
pool = gather_costs(costs)
tau, mixture = mining_threshold(pool)
fig, ax = plt.subplots(figsize=(5.6, 3), dpi=80, layout='constrained')
sigma = mixture.variances.sqrt()
draw_mixture(ax, pool, mixture.means.tolist(), sigma.tolist(), mixture.weights.tolist(), tau, bins=24)
edges = torch.linspace(pool.min().item(), pool.max().item(), 25).tolist()
for name, which, color in (('correct', correct, COLORS['truth']), ('wrong', ~correct, 'crimson')):
    share = torch.full((int(which.sum()),), 1 / len(pool) / (edges[1] - edges[0]))
    label = f'{name} ({int(which.sum())})'
    style = dict(histtype='step', color=color, lw=1.5, label=label)
    ax.hist(pool[which].tolist(), bins=edges, weights=share.tolist(), **style)
ax.set(xlabel='matching cost', ylabel='density')
ax.legend(fontsize=9)
plt.show()

# %%
mined = pool <= tau
precision, recall = correct[mined].float().mean().item(), mined[correct].float().mean().item()
assert precision > correct.float().mean() + 0.2
assert pool[correct].mean() < mixture.means.mean() < pool[~correct].mean()
dict(
    boxes=len(pool),
    mined=int(mined.sum()),
    precision_of_all=correct.float().mean().item(),
    precision_of_mined=precision,
    recall_of_mined=recall,
)


# %% [markdown]
# Now the skill of both networks increases. The threshold falls with the costs of the correct boxes, from
# positive to strongly negative values. A fixed threshold on the score first rejects most of the correct boxes
# and later accepts confident false positives.

# %%
def judge(skill, seed):
    "Threshold; mean cost of correct and wrong boxes; precision and recall of mining and of a score of .4"
    detections, targets, outputs, correct = simulate(skill, seed)
    pool = torch.cat(matched_costs(outputs, targets))
    tau, _ = mining_threshold(pool)
    row = [float(tau), float(pool[correct].mean()), float(pool[~correct].mean())]
    for chosen in (pool <= tau, torch.cat([d['scores'] for d in detections]) >= 0.4):
        row += [float(correct[chosen].float().mean()), float(chosen[correct].float().mean())]
    return row


skills = [0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95]
rows = torch.tensor([[judge(skill, seed) for skill in skills] for seed in range(4)])
judged = rows.permute(2, 0, 1)  # (7 numbers, seeds, skills)
assert (judged[0].diff(dim=1).mean(0) < 0).all()
assert (judged[3] > judged[5]).float().mean() > 0.8
judged.mean(1)

# %%
#| label: fig-mining-moves
#| fig-cap: "The threshold falls by itself as the detector improves (left). Except at the lowest skill, mined boxes are more precise than those above a fixed score; in return, nearly half of the correct boxes are not mined (right)."
#| fig-alt: "Left: the threshold falls with the mean cost of correct boxes while that of wrong boxes hardly moves. Right: precision of mining rises above that of the fixed score; recall of the fixed score rises from .2 to 1, that of mining stays near .6."
fig, axes = plt.subplots(1, 2, figsize=(6, 3), dpi=80, layout='constrained')
for row, name, color in (
    (1, 'correct boxes', COLORS['truth']),
    (2, 'wrong boxes', 'crimson'),
    (0, 'threshold', COLORS['mined']),
):
    curve(axes[0], skills, judged[row], name, color=color)
for row, name, kind, color in (
    (3, 'mined: precision', 'student', COLORS['mined']),
    (5, 'score .4: precision', 'student', COLORS['paper']),
    (4, 'mined: recall', 'mined', COLORS['mined']),
    (6, 'score .4: recall', 'mined', COLORS['paper']),
):
    curve(axes[1], skills, judged[row], name, kind, color)
axes[0].set(xlabel='skill', ylabel='matching cost')
axes[1].set(xlabel='skill', ylim=(0, 1.02))
for ax in axes:
    ax.legend(fontsize=9)
plt.show()

# %% [markdown]
# This also explains the union in $B^{con}$: early in training mining finds boxes that the score rejects, later
# the score adds the half of the correct boxes that mining leaves out.
#
# The mixture *always* returns a threshold, which is a weakness. If all boxes are correct, there is one
# component and half of it is lost. If all are wrong, the cheaper half of the wrong ones passes:

# %%
false_only = pool[~correct]
passing = float((false_only <= mining_threshold(false_only)[0]).float().mean())
assert 0 < passing < 1 and mining_threshold(false_only)[0] > tau
passing, mining_threshold(false_only)[0]


# %% [markdown]
# Errors that both networks make in both views have a low cost and are mined as well. This is why mined boxes
# are used by the consistency loss only, which trains neither classes nor boxes. The precision of the mined set
# on images with hidden annotations (@sec-health) is the number to monitor.
#
# ## The sets of a step

# %%
#| export
def confident_boxes(
    detection: dict,  # of one image: scores (K,), labels (K,)
    costs: Tensor,  # (K,) of `matched_costs`
    tau,  # tau_c of `mining_threshold`
    threshold: float,  # tau_s
) -> Tensor:  # (K,) bool
    "The filter of B^sup: s_b >= tau_s"
    return fixed_threshold(detection['scores'], threshold)


def mined_boxes(
    detection: dict,  # of one image: scores (K,), labels (K,)
    costs: Tensor,  # (K,) of `matched_costs`
    tau,  # tau_c of `mining_threshold`
    threshold: float,  # tau_s
) -> Tensor:  # (K,) bool
    "The filter of B^con: c_b <= tau_c"
    return costs <= tau


@torch.no_grad()
def mine(
    detections: list,  # B^0: per image dict(scores (K,), labels (K,), ...)
    costs: list,  # per image (K,) of `matched_costs`
    tau,  # tau_c of `mining_threshold`
    threshold: float = 0.4,  # tau_s
    union: bool = True,  # B^con includes B^sup
    sup_filter=confident_boxes,  # for B^sup
    con_filter=mined_boxes,  # for B^con
):  # (B^sup, B^con), each per image (K,) bool
    "Which boxes of B^0 are targets and which serve the consistency between views (@eq-mining-sets)"
    sup = [sup_filter(d, c, tau, threshold) for d, c in zip(detections, costs)]
    con = [con_filter(d, c, tau, threshold) for d, c in zip(detections, costs)]
    return sup, [a | b for a, b in zip(sup, con)] if union else con


# %%
sup, con = mine(detections, costs, tau)
n_sup, n_con = (int(sum(m.sum() for m in masks)) for masks in (sup, con))
assert n_sup < n_con < len(pool) and not any((s & ~c).any() for s, c in zip(sup, con))
no_mining = mine(detections, costs, tau, con_filter=confident_boxes)[1]
assert all(a.equal(b) for a, b in zip(no_mining, sup))  # without mining, both sets are the same
n_sup, n_con, len(pool)


# %% [markdown]
# What leaves a step for the log: how many boxes each set holds, and where the threshold lies between the two
# means. $B^{sup}$, $B^{con}$ and $B^0$ go to the health monitor (@sec-health), which alone may compare them
# with hidden truth.

# %%
#| export
@torch.no_grad()
def mining_stats(
    mined: dict,  # of `mine_pseudo_labels` (@sec-methods)
    targets: list,  # B^sup in the strong view
) -> dict:  # plain numbers
    "Sizes of the sets, and the mixture where there was a box to fit"
    sup, con = (keep_boxes(mined['weak'], mined[k]) for k in ('sup', 'con'))
    n, counts = max(1, len(con)), [len(c) for c in mined['costs']]
    out = pseudo_stats(mined['detections'], sup, targets)
    out |= dict(initial_boxes=sum(counts) / n, con_boxes=sum(len(c['scores']) for c in con) / n)
    if any(counts):
        low, high = mined['mixture'].means.tolist()
        out |= dict(cost_threshold=float(mined['tau']), cost_mean_low=low, cost_mean_high=high)
    return out


def monitored_boxes(
    mined: dict,  # of `mine_pseudo_labels` (@sec-methods)
    weak: list,  # targets of the weak views
) -> dict:  # pseudo: B^sup, mined: B^con, initial: B^0, in pixels of the files
    "The three sets for the health monitor"
    sup, con = (keep_boxes(mined['weak'], mined[k]) for k in ('sup', 'con'))
    sets = dict(pseudo=sup, mined=con, initial=mined['weak'])
    return {name: to_original(boxes, weak) for name, boxes in sets.items()}

# %% [markdown]
# ::: {.callout-note}
# ## Paper vs. code
# *$B^0$.* The paper filters the initial boxes by the score .4 (`mining.init=score`); the code by mean + std of
# each image, and the score applies to $B^{sup}$ only. *Union.* In the paper the mined boxes are those with a
# cost of at most $\tau_c$ (`mining.union=false`); the code adds $B^{sup}$. *Use.* The paper reports that mined
# boxes hurt when they also train classes and boxes: `mining.sup_filter=cpm` tries it.
# :::
#
# ## Summary
#
# * Every box of $B^0$ is matched to the student's predictions; its cost measures the agreement of the two
#   networks.
# * A mixture of two Gaussians is fitted in each iteration to the costs of the global batch; the mode of the
#   component of low costs is the threshold.
# * The threshold needs no tuning and follows the training; about half of the correct boxes lie above it.
# * $B^{sup}$ trains classes, boxes and denoising, $B^{con}\supseteq B^{sup}$ the consistency only.
# * Mining fails where both networks make the same error, and where the costs have one mode.
# * Other filters: @sec-variants, @sec-thresholds; their effect on a training, and that of mining labels too:
#   @sec-abl-filters.
#
# ## Exercises
#
# 1. Take the boundary $r_0=r_1$ as threshold in `judge`: what do precision and recall become?
# 2. Which of the three terms of the cost separates correct from wrong boxes best, at skill .2 and at skill .8?
# 3. Fit three components. What does the one in the middle contain?
# 4. Why does *mean + std* keep nothing of two different scores?
