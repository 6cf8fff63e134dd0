# %% [markdown]
# # Mining pseudo labels {#sec-mining}
#
# > Find the pseudo boxes that teacher and student agree on, without choosing a threshold by hand.
#
# A score threshold asks the teacher how sure it is, and believes the answer. But scores are not calibrated:
# an early teacher says .2 to boxes that are right, a late one .7 to boxes that are wrong, and the number that
# separates them moves through the whole of training. Semi-DETR asks a second witness. The student has seen a
# different, heavily changed view of the same image; what would it cost to match its predictions to the
# teacher's boxes? A box that both found costs little, a box that one of them dreamt costs much. The costs of
# a batch form two heaps, a mixture of two Gaussians finds the heaps, and the lower one says which boxes to
# keep.

# %%
#| default_exp semi.mining

# %%
#| export
import math
import warnings
from dataclasses import dataclass
import torch
from torch import nn, Tensor
from semidetr.core import ConfigError, all_gather_cat, suggest
from semidetr.matching.losses import CriterionConfig
from semidetr.matching.matching import hungarian
from semidetr.semi.teacher import fixed_threshold, mean_std

# %%
import matplotlib.pyplot as plt
from semidetr.boxes import box_iou, cxcywh_to_xyxy
from semidetr.draw import COLORS, curve, draw_mixture


# %% [markdown]
# ## Three sets of boxes
#
# Of all detections of the teacher on an image,
#
# * $B^{0}$ are those that get a cost: by default the ones whose score stands out of the image's own scores by
#   a standard deviation;
# * $B^{sup}$ are those of $B^0$ that are trusted with everything: their score is at least .4 as well. A
#   confident box that is not in $B^0$ trains nothing. They are targets of the class and box losses, and
#   denoising queries are made of them;
# * $B^{con}$ serve the consistency between views (@sec-consistency) alone. For this a box has to cover an
#   object, not to fit it tightly, so more boxes are better: those that were mined, and $B^{sup}$.

# %%
#| export
@dataclass(frozen=True)
class MiningConfig:
    "Which of the teacher's boxes train the student, and which only its consistency; the defaults are those of the published code"

    con_filter: str = 'cpm'  # B^con: 'cpm' (mined), 'score' (the same as B^sup), 'mean_std', 'top_k', 'per_class', 'class_rate', 'all'
    sup_filter: str = 'score'  # B^sup, out of B^0: 'score' (threshold of the pseudo labels), 'mean_std', 'top_k', 'per_class', 'class_rate', 'all', 'cpm' (hurts, says the paper)
    init: str = 'mean_std'  # B^0: 'mean_std' (code), 'score' (paper), 'all'
    union: bool = True  # B^con includes B^sup (code); False: the filter's boxes alone (paper)
    top_k: int = 10  # boxes an image that 'top_k' keeps
    quantile: float = 0.5  # 'per_class' drops this share of the boxes of each class in an image
    class_thresholds: tuple[float, ...] = ()  # 'per_class' with these: one score a class instead of a share
    rate_window: int = 20  # 'class_rate': iterations whose scores set the thresholds
    memory: int = 0  # costs of so many past iterations join the fit; 0 = this batch alone (code)
    solver: str = 'torch'  # who fits the mixture: 'torch' (on the device) or 'sklearn' (reference)

    def __post_init__(self):
        known = dict(
            con_filter=(*FILTERS, 'cpm', 'class_rate'),
            sup_filter=(*FILTERS, 'cpm', 'class_rate'),
            init=('mean_std', 'score', 'all'),
            solver=('torch', 'sklearn'),
        )
        for key, words in known.items():
            if getattr(self, key) not in words:
                raise ConfigError(
                    f"mining.{key}='{getattr(self, key)}' is unknown; {suggest(getattr(self, key), words)}"
                )
        if self.memory < 0 or self.top_k < 1:
            raise ConfigError(
                f'mining.memory={self.memory} must be at least 0 and mining.top_k={self.top_k} at least 1'
            )
        if self.rate_window < 1:
            raise ConfigError(f'mining.rate_window={self.rate_window} must be at least 1')
        if not 0 <= self.quantile <= 1:
            raise ConfigError(f'mining.quantile={self.quantile} must lie between 0 and 1')


# %% [markdown]
# The other filters are what mining is compared with. They share one signature, so that an ablation is a word
# in the configuration. A filter says *which boxes of $B^0$*: to compare filters on everything that the
# teacher said, set `init='all'`.

# %%
#| export
def _top_k(scores, k):
    return torch.zeros_like(scores, dtype=torch.bool).index_fill(
        0, scores.topk(min(k, len(scores))).indices, True
    )


def _per_class(scores, labels, cfg, threshold):
    "A score for each class, or the best share of each class of the image"
    if cfg.class_thresholds:
        least = scores.new_tensor([*cfg.class_thresholds, threshold])  # classes without a number: `threshold`
        return scores >= least[labels.clamp(max=len(cfg.class_thresholds))]
    same = labels[:, None] == labels
    better = (same & (scores > scores[:, None])).sum(1)
    return better < ((1 - cfg.quantile) * same.sum(1)).ceil()


FILTERS = dict(  # name -> filter(scores (K,), labels (K,), cfg, threshold) -> (K,) bool, for one image
    score=lambda scores, labels, cfg, threshold: fixed_threshold(scores, threshold),
    mean_std=lambda scores, labels, cfg, threshold: (
        torch.ones_like(scores, dtype=torch.bool) if cfg.init == 'mean_std' else mean_std(scores)
    ),
    top_k=lambda scores, labels, cfg, threshold: _top_k(scores, cfg.top_k),
    per_class=_per_class,
    all=lambda scores, labels, cfg, threshold: torch.ones_like(scores, dtype=torch.bool),
)


# %%
#| export
@torch.no_grad()
def initial_boxes(
    detections: list,  # per image dict(scores (K,), boxes (K,4) xyxy of the weak view), after NMS
    cfg: MiningConfig = MiningConfig(),  # `init`
    threshold: float = 0.4,  # score for init='score'
) -> list:  # per image (K,) bool
    "B^0, the boxes that get a cost: those that stand out of the scores of their own image, and have an area"

    def passes(scores):
        if cfg.init == 'mean_std':
            return mean_std(scores)
        return fixed_threshold(scores, threshold if cfg.init == 'score' else -math.inf)

    return [passes(d['scores']) & (d['boxes'][:, 2:] > d['boxes'][:, :2]).all(1) for d in detections]


# %% [markdown]
# *Mean + std* keeps the one box that stands out, and nothing of an image with one detection, or with two of
# different scores (@sec-teacher):

# %%
def detections_of(*scores):  # every box with an area, class 0
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
# It has a pitfall where objects are many and alike. Cells in a blood smear, or digits: 18 boxes that score .9
# and 18 that score .05 have mean .475 and deviation .431, and no score reaches .906. The image keeps nothing,
# and the better the teacher gets, the more often. There, start from the score:

# %%
crowded = detections_of([0.9] * 18 + [0.05] * 18)
level = crowded[0]['scores'].mean() + crowded[0]['scores'].std()
sizes = {
    init: int(initial_boxes(crowded, MiningConfig(init=init))[0].sum())
    for init in ('mean_std', 'score', 'all')
}
assert sizes == dict(mean_std=0, score=18, all=36) and abs(level - 0.906) < 1e-3
sizes, level


# %% [markdown]
# ## A price for every box
#
# The boxes of $B^0$ are carried to the strong view (@sec-teacher) and matched one-to-one to what the
# student's last layer predicts there: without gradient, without denoising queries, with the cost of
# @eq-matching-cost. Whatever the stage of training, each box gets exactly one query and pays for it. Where an
# image has more boxes than the student has queries, those that went away empty-handed cost infinitely much.

# %%
#| export
@torch.no_grad()
def matched_costs(
    outputs: dict,  # `pred_logits` (B,Q,C) and `pred_boxes` (B,Q,4) of the student's last layer on the strong view
    targets: list,  # per image dict(labels (K,), boxes (K,4) cxcywh of the strong view): B^0 after transport
    criterion: CriterionConfig = CriterionConfig(),  # weights of the cost
) -> list:  # per image (K,) float32, one cost a box; inf where there were fewer queries than boxes
    "What the best assignment to the student's predictions costs each box (@eq-matching-cost)"
    found = hungarian(
        outputs,
        targets,
        with_cost=True,
        w_cls=criterion.w_cls,
        w_l1=criterion.cost_l1,
        w_giou=criterion.w_giou,
    )
    return [
        c.new_full((len(t['labels']),), math.inf).scatter(0, i, c) for t, (_, i, c) in zip(targets, found)
    ]


def gather_costs(
    costs: list,  # per image (K,)
) -> Tensor:  # (n,) finite costs of all processes, in the order of the ranks
    "The costs of the whole batch, over all processes; every process must call it, with or without boxes"
    mine = torch.cat(costs) if costs else torch.zeros(0)
    return all_gather_cat(mine[mine.isfinite()])


# %% [markdown]
# The student says class 0 on the left and nothing else. The teacher claims the same box, the same place with
# another class, and a box on the right:

# %%
said = dict(
    pred_logits=torch.tensor([[[3.0, -4.0], [-4.0, -4.0], [-4.0, -4.0]]]),
    pred_boxes=torch.tensor([[[0.3, 0.5, 0.3, 0.4], [0.6, 0.2, 0.3, 0.3], [0.2, 0.8, 0.3, 0.3]]]),
)
claims = [
    dict(labels=torch.tensor([k]), boxes=torch.tensor([b]))
    for k, b in ((0, [0.3, 0.5, 0.3, 0.4]), (1, [0.3, 0.5, 0.3, 0.4]), (0, [0.8, 0.5, 0.3, 0.4]))
]
agreed, wrong_class, elsewhere = (matched_costs(said, [claim])[0].item() for claim in claims)
assert agreed < -6 and min(wrong_class, elsewhere) > agreed + 4
agreed, wrong_class, elsewhere


# %% [markdown]
# Agreement in class *and* place has a price that neither alone can buy.
#
# ## Two heaps
#
# Let $c_1,\dots,c_n$ be the costs of the whole batch, over all processes. Their density is modelled as
#
# $$
# p(c) = \sum_{k=0}^{1}\pi_k\,\mathcal{N}(c;\,\mu_k,\sigma_k^2)
# $$ {#eq-mining-mixture}
#
# and fitted by expectation maximisation. Each round asks whose each cost is, and then lets each Gaussian move
# to what it owns:
#
# $$
# r_{nk} = \frac{\pi_k\,\mathcal{N}(c_n;\mu_k,\sigma_k^2)}{p(c_n)},\quad
# \pi_k = \frac1n\sum_n r_{nk},\quad
# \mu_k = \frac{\sum_n r_{nk}c_n}{\sum_n r_{nk}},\quad
# \sigma_k^2 = \frac{\sum_n r_{nk}(c_n-\mu_k)^2}{\sum_n r_{nk}}+10^{-5}
# $$ {#eq-mining-em}
#
# Nothing is random: $\mu_0$ starts at the smallest cost and $\mu_1$ at the largest, both variances at 1 and
# both weights at one half. It ends when the mean log-likelihood changes by less than $10^{-3}$, or after 100
# rounds. So component 0 is the heap of agreement by construction.
#
# The published code calls scikit-learn for it. The fit below takes the same steps in torch: costs on a GPU
# stay there, and any number of fits run side by side, which is used for pictures and for statistics.

# %%
#| export
@dataclass
class Mixture:
    "Two Gaussians on the line; component 0 started at the smallest value. All tensors (...,2) float64"

    weights: Tensor
    means: Tensor
    variances: Tensor


def log_joint(
    x: Tensor,  # (...,n)
    mixture: Mixture,
) -> Tensor:  # (...,n,2)
    "Logarithm of weight times density of each component"
    w, mu, var = (v[..., None, :] for v in (mixture.weights, mixture.means, mixture.variances))
    return w.log() - 0.5 * (math.log(2 * math.pi) + var.log() + (x[..., None] - mu) ** 2 / var)


# %%
#| export
def _m_step(x, r, reg):
    "Mixture of data (...,n) with responsibilities (...,n,2)"
    n = r.sum(-2) + 10 * torch.finfo(x.dtype).eps
    mu = (r * x[..., None]).sum(-2) / n
    var = (r * (x[..., None] - mu[..., None, :]) ** 2).sum(-2) / n + reg
    return Mixture(n / n.sum(-1, keepdim=True), mu, var)


@torch.no_grad()
def fit_mixture(
    costs: Tensor,  # (...,n); leading dimensions are fitted side by side
    mask: Tensor | None = None,  # (...,n) bool, False = not there
    reg: float = 1e-5,  # added to the variances
    max_iter: int = 100,
    tol: float = 1e-3,  # stop when the mean log-likelihood changes by less
) -> Mixture:  # (...,2); NaN where there is no cost
    "EM from (minimum, maximum), unit variances and equal weights, in float64 on the device of the costs"
    x = costs.double()
    mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    n, x = mask.sum(-1), torch.where(mask, x, 0.0)
    ends = [
        f(torch.where(mask, x, s * math.inf), -1).values if x.shape[-1] else x.sum(-1) * math.nan
        for f, s in ((torch.min, 1), (torch.max, -1))
    ]
    mix = Mixture(
        *(torch.stack(v, -1) for v in ([x.new_full(n.shape, 0.5)] * 2, ends, [x.new_ones(n.shape)] * 2))
    )
    bound, done = x.new_full(n.shape, -math.inf), n == 0
    for _ in range(max_iter):
        joint = log_joint(x, mix)
        total = joint.logsumexp(-1)
        new = _m_step(x, (joint - total[..., None]).exp() * mask[..., None], reg)
        mix = Mixture(
            *(
                torch.where(done[..., None], a, b)
                for a, b in (
                    (mix.weights, new.weights),
                    (mix.means, new.means),
                    (mix.variances, new.variances),
                )
            )
        )
        level = (total * mask).sum(-1) / n
        done, bound = done | ((level - bound).abs() < tol), level
        if done.all():
            break
    empty = (n == 0)[..., None]
    return Mixture(*(v.masked_fill(empty, math.nan) for v in (mix.weights, mix.means, mix.variances)))


# %%
#| export
@torch.no_grad()
def fit_mixture_sklearn(
    costs: Tensor,  # (n,)
) -> Mixture:  # (2,)
    "The same fit by scikit-learn, on the host: the reference"
    if len(costs) < 2:
        return fit_mixture(costs)  # scikit-learn asks for two samples
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    x = costs.detach().double().cpu().numpy()[:, None]
    model = GaussianMixture(
        2,
        covariance_type='diag',
        reg_covar=1e-5,
        weights_init=[0.5, 0.5],
        means_init=[[x.min()], [x.max()]],
        precisions_init=[[1.0], [1.0]],
    )
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', ConvergenceWarning)
        model.fit(x)
    return Mixture(
        *(
            torch.from_numpy(v.reshape(2)).to(costs.device)
            for v in (model.weights_, model.means_, model.covariances_)
        )
    )


# %%
g = torch.Generator().manual_seed(0)
cluster = torch.cat([torch.randn(40, generator=g) * 0.7 - 3, torch.randn(60, generator=g) + 1])
ours, theirs = fit_mixture(cluster), fit_mixture_sklearn(cluster)
gap = max(
    float((getattr(ours, f) - getattr(theirs, f)).abs().max()) for f in ('weights', 'means', 'variances')
)
assert gap < 1e-5
ours


# %% [markdown]
# ## The threshold
#
# Of the costs that belong to the heap of agreement, the likeliest one is the threshold:
#
# $$
# \tau_c = \operatorname{arg\,max}_{c\,\in\,\{c_n:\; r_{n0}\ge r_{n1}\}}\; p(c).
# $$ {#eq-mining-threshold}
#
# This is the *mode* of the heap and not the border between the two. About half of the heap lies above its
# mode and is given up, in exchange for a distance to everything doubtful.

# %%
#| export
@torch.no_grad()
def mining_threshold(
    costs,  # (n,) tensor or list of numbers; what is not finite is left out
    solver: str = 'torch',  # 'torch' or 'sklearn'
):  # (cost threshold: 0-d tensor, one of the costs, or 0 without any; Mixture)
    "The cost with the highest likelihood in the cluster of low costs (@eq-mining-threshold)"
    x = costs.detach().flatten() if isinstance(costs, Tensor) else torch.tensor(costs, dtype=torch.float64)
    x = x[x.isfinite()].sort().values
    mix = (fit_mixture if solver == 'torch' else fit_mixture_sklearn)(x)
    if not len(x):
        return x.new_zeros(()), mix
    joint = log_joint(x.double(), mix)
    low = (
        joint[:, 0] >= joint[:, 1] - 1e-9
    )  # what is smaller is rounding; a tie is component 0, as in scikit-learn
    score = joint.logsumexp(-1).masked_fill(
        ~(low | ~low.any()), -math.inf
    )  # nobody in component 0: component 1
    likely = score >= score.max() - 1e-9  # equally likely: the larger cost
    return x[torch.where(likely, x, -math.inf).argmax()], mix


# %% [markdown]
# The threshold is always one of the costs, in whatever order they come, and few costs are no special case:

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
for solver in ('torch', 'sklearn'):
    assert [float(mining_threshold(c, solver)[0]) for c in batches] == [0, 1.5, 1, 0, 0, -2.8, -4.9]
[(c, float(mining_threshold(c)[0])) for c in batches]


# %% [markdown]
# ::: {.callout-note}
# ## Paper vs. code
# The paper writes the threshold as the cost that the reliable component likes best,
# $\operatorname{arg\,max}_c P(\text{reliable}\mid c)$. Read literally that is a cost at the far end of the
# cheap heap (the smallest one, unless that heap is much the narrower), and hardly anything would pass; the
# code takes the most likely sample of the cluster, as here. Two costs that are equally likely are told apart
# by rounding in scikit-learn; here the larger one is taken, which makes both solvers and any order of the
# costs agree.
# :::
#
# ## Why can a Gaussian mixture pick good pseudo labels?
#
# Three things have to hold, and none of them is about Gaussians.
#
# 1. *Right boxes agree for a reason, wrong ones by accident.* An object is there in both views. A
#    hallucination was caused by some texture, scale or border of one view, and the other has been flipped,
#    recoloured and erased.
# 2. *The cost measures the agreement on one scale.* Class, distance and overlap must all be good for a low
#    cost (@eq-matching-cost), and all images share the scale, so one fit serves the batch.
# 3. *There are two heaps.* Then a model with two bumps finds them whatever the numbers are. The fit is
#    repeated in every iteration, so the threshold follows the detector by itself.
#
# To see it, here are a teacher and a student of a given skill between 0 and 1. The better they are, the
# tighter their boxes sit around the five objects of an image, and the surer the student is of the class. The
# teacher adds four ghosts to each image, and the student shares one of them. A pseudo box is *right* if it
# overlaps an object of its class by one half.

# %%
def simulate(
    skill, seed=0, images=24, objects=5, classes=6
):  # -> teacher's detections, the same as targets, student's outputs, which are right
    g = torch.Generator().manual_seed(seed)

    def some_boxes(n):
        return torch.cat(
            [torch.rand(n, 2, generator=g) * 0.7 + 0.15, torch.rand(n, 2, generator=g) * 0.25 + 0.1], 1
        )

    def moved(boxes, by):
        return (boxes + by * torch.randn(boxes.shape, generator=g) * boxes[:, [2, 3, 2, 3]]).clamp(0.02, 0.98)

    def some_classes(n):
        return torch.randint(0, classes, (n,), generator=g)

    rows = []
    for _ in range(images):
        truth, kind, ghosts = some_boxes(objects), some_classes(objects), some_boxes(4)
        found = torch.rand(objects, generator=g) < 0.5 + 0.5 * skill
        boxes, labels = (
            torch.cat([moved(truth[found], 0.16 - 0.1 * skill), ghosts]),
            torch.cat([kind[found], some_classes(4)]),
        )
        right = (
            (box_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(truth)) >= 0.5) & (labels[:, None] == kind)
        ).any(1)
        scores = (
            torch.where(right, 3.5 * skill - 1.5, 1.5 * skill - 2) + torch.randn(len(boxes), generator=g)
        ).sigmoid()
        queries = torch.cat(
            [moved(truth.repeat(3, 1), 0.2 - 0.14 * skill), moved(ghosts[:1], 0.2), some_boxes(30)]
        )
        logits, sure = torch.randn(len(queries), classes, generator=g) - 4, 3 * objects + 1
        logits[range(sure), torch.cat([kind.repeat(3), labels[-4:-3]])] += (
            1 + 5 * skill * torch.rand(sure, generator=g).sqrt()
        )
        rows.append(
            (
                dict(scores=scores, labels=labels, boxes=100 * cxcywh_to_xyxy(boxes)),
                dict(labels=labels, boxes=boxes),
                logits,
                queries,
                right,
            )
        )
    seen, targets, logits, queries, right = zip(*rows)
    return (
        seen,
        targets,
        dict(pred_logits=torch.stack(logits), pred_boxes=torch.stack(queries)),
        torch.cat(right),
    )


# %%
#| label: fig-mining-heaps
#| fig-cap: "Right boxes cost little and wrong ones much, and the fit finds the two heaps without being told which is which. The dashed threshold sits on the top of the cheaper heap: few wrong boxes lie to its left."
#| fig-alt: "Histogram of costs between minus four and four with outlines of right boxes on the left and wrong ones on the right, two Gaussian curves, and a dashed vertical line at the peak of the left one."
seen, claimed, student, right = simulate(0.6)
costs = matched_costs(student, claimed)
pool = gather_costs(costs)
tau, mixture = mining_threshold(pool)
fig, ax = plt.subplots(figsize=(5.6, 3), dpi=80, layout='constrained')
draw_mixture(
    ax,
    pool,
    mixture.means.tolist(),
    mixture.variances.sqrt().tolist(),
    mixture.weights.tolist(),
    tau,
    bins=24,
)
edges = torch.linspace(pool.min().item(), pool.max().item(), 25).tolist()
for name, which, color in (('right', right, COLORS['truth']), ('wrong', ~right, 'crimson')):
    share = torch.full((int(which.sum()),), 1 / len(pool) / (edges[1] - edges[0]))
    ax.hist(
        pool[which].tolist(),
        bins=edges,
        weights=share.tolist(),
        histtype='step',
        color=color,
        lw=1.5,
        label=f'{name} ({int(which.sum())})',
    )
ax.set(xlabel='matching cost', ylabel='density')
ax.legend(fontsize=8)
plt.show()

# %%
mined = pool <= tau
purity, caught = right[mined].float().mean().item(), mined[right].float().mean().item()
assert purity > right.float().mean() + 0.2 and pool[right].mean() < mixture.means.mean() < pool[~right].mean()
dict(
    boxes=len(pool),
    mined=int(mined.sum()),
    right_of_all=right.float().mean().item(),
    right_of_mined=purity,
    mined_of_right=caught,
)


# %% [markdown]
# Now let both networks learn. The threshold falls with the costs of the right boxes, from positive to
# strongly negative values, without anybody moving it. The score threshold, in the same place all the time,
# first rejects most of what is right and later lets the confident ghosts in.

# %%
def judge(
    skill, seed
):  # -> threshold, mean cost of right and wrong boxes; precision and recall of mining and of a score of .4
    seen, claimed, student, right = simulate(skill, seed)
    pool = torch.cat(matched_costs(student, claimed))
    tau, _ = mining_threshold(pool)
    picked = (pool <= tau, torch.cat([d['scores'] for d in seen]) >= 0.4)
    quality = [x for p in picked for x in (float(right[p].float().mean()), float(p[right].float().mean()))]
    return [float(tau), float(pool[right].mean()), float(pool[~right].mean()), *quality]


skills = [0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95]
story = torch.tensor([[judge(skill, seed) for skill in skills] for seed in range(4)]).permute(
    2, 0, 1
)  # (7 numbers, seeds, skills)
assert (story[0].diff(dim=1).mean(0) < 0).all() and (story[3] > story[5]).float().mean() > 0.8
story.mean(1)

# %%
#| label: fig-mining-moves
#| fig-cap: "As the detector gets better the threshold falls by itself (left). For all but beginners, what is mined is purer than what passes a fixed score; the price is that nearly half of the right boxes are left (right)."
#| fig-alt: "Left: the threshold falls with the mean cost of right boxes while that of wrong boxes hardly moves. Right: precision of mining rises above that of the fixed score; recall of the fixed score rises from .2 to 1, that of mining stays near .6."
fig, axes = plt.subplots(1, 2, figsize=(6, 3), dpi=80, layout='constrained')
for row, name, color in (
    (1, 'right boxes', COLORS['truth']),
    (2, 'wrong boxes', 'crimson'),
    (0, 'threshold', COLORS['mined']),
):
    curve(axes[0], skills, story[row], name, color=color)
for row, name, kind, color in (
    (3, 'mined: precision', 'student', COLORS['mined']),
    (5, 'score .4: precision', 'student', COLORS['paper']),
    (4, 'mined: recall', 'mined', COLORS['mined']),
    (6, 'score .4: recall', 'mined', COLORS['paper']),
):
    curve(axes[1], skills, story[row], name, kind, color)
axes[0].set(xlabel='skill', ylabel='matching cost')
axes[1].set(xlabel='skill', ylim=(0, 1.02))
for ax in axes:
    ax.legend(fontsize=7)
plt.show()

# %% [markdown]
# This also says what $B^{con}$ is a union of: early on mining finds what the score rejects, later the score
# finds the half that mining gives up.
#
# The same picture tells when to distrust it. The mixture *always* returns a threshold. If all boxes are right
# there is one heap, and half of it is given up for nothing. If all are wrong, the cheaper half of the wrong
# ones passes:

# %%
ghosts_only = pool[~right]
passing = float((ghosts_only <= mining_threshold(ghosts_only)[0]).float().mean())
assert 0 < passing < 1 and mining_threshold(ghosts_only)[0] > tau
passing, mining_threshold(ghosts_only)[0]


# %% [markdown]
# And a mistake that both networks make in both views is cheap, so it is mined: a student that copies its
# teacher's error has become a witness for it. That is why mined boxes go to the consistency loss alone, where
# they can teach no class. Precision of the mined set on images with hidden truth (@sec-health) is the number
# to watch.
#
# ## Which boxes in the end

# %%
#| export
@torch.no_grad()
def mine(
    detections: list,  # per image dict(scores (K,), labels (K,), ...): B^0
    costs: list,  # per image (K,) of `matched_costs`
    tau,  # cost threshold of `mining_threshold`
    cfg: MiningConfig = MiningConfig(),  # the filters
    threshold: float = 0.4,  # score of a trusted box
    least=None,  # (C,) score from which a class is kept by 'class_rate', of `ClassRates`
):  # (B^sup, B^con), each per image (K,) bool
    "Which boxes train classes and boxes, and which only the consistency between views"

    def chosen(name):
        if name == 'class_rate':
            return [d['scores'] >= least[d['labels']] for d in detections]
        return [
            c <= tau if name == 'cpm' else FILTERS[name](d['scores'], d['labels'], cfg, threshold)
            for d, c in zip(detections, costs)
        ]

    sup = chosen(cfg.sup_filter)
    con = sup if cfg.con_filter == 'score' else chosen(cfg.con_filter)
    return sup, [a | b for a, b in zip(sup, con)] if cfg.union else con


# %%
trusted, covered = mine(seen, costs, tau)
n_sup, n_con = (int(sum(m.sum() for m in s)) for s in (trusted, covered))
assert n_sup < n_con < len(pool) and not any((s & ~c).any() for s, c in zip(trusted, covered))
off = mine(seen, costs, tau, MiningConfig(con_filter='score'))[1]
assert all(a.equal(b) for a, b in zip(off, trusted))  # without mining there is one set
n_sup, n_con, len(pool)


# %% [markdown]
# ::: {.callout-note}
# ## Paper vs. code
# *$B^0$.* The paper filters the initial boxes by the score .4 (`init='score'`); the code by mean + std of
# each image, and the score decides on $B^{sup}$ only. *Union.* In the paper the mined boxes are the ones with
# a cost of at most $\tau_c$ (`union=False`); the code adds $B^{sup}$. *Use.* The paper reports that mined
# boxes hurt when they also train classes and boxes: `sup_filter='cpm'` tries it.
# :::
#
# ## As many as there are labels
#
# One threshold treats all classes alike, and the rare and small ones score low: a score of .3 may keep nine
# of ten common objects and half of the rare ones. The student then learns that the rare class is background,
# and the teacher, its average, says it less and less. A threshold for each class (`class_thresholds`) helps
# at first. But scores grow as training goes on, whatever is right, and a fixed number lets in more wrong
# boxes from epoch to epoch.
#
# What does not move is how often things occur. Labelled and unlabelled images come from one world, so a class
# should get as many pseudo boxes an image as it has true ones among the labels (Chen et al., Label Matching
# Semi-Supervised Object Detection, CVPR 2022, choose thresholds by this rule). With $r_c$ the labelled boxes
# of class $c$ an image, and the scores of the last iterations on $n$ images,
# $$
# t_c = \text{the } \max(1, \lfloor r_c\, n \rceil) \text{-th largest score of class } c \quad (r_c > 0) .
# $$ {#eq-mining-rate}
#
# `sup_filter='class_rate'` keeps what scores at least $t_c$. The filter sees what $B^0$ has left: begin with
# a low score (`init='score'`, `pseudo.threshold=0.1`). It is not part of Semi-DETR, and off by default. With
# very few labelled images $r_c$ is itself a guess.

# %%
#| export
def class_rates(
    labelled,  # data set
    num_classes: int,
) -> Tensor:  # (C,) boxes an image, without those to be ignored
    "How often each class occurs where labels are known"
    counts = torch.zeros(num_classes)
    for i in range(len(labelled)):
        a = labelled.annotation(i)
        counts += a['labels'][~a['ignore']].bincount(minlength=num_classes)
    return counts / max(1, len(labelled))


class ClassRates(nn.Module):
    "Thresholds that follow the scores: each class keeps as many boxes an image as the labels have (@eq-mining-rate)"

    def __init__(
        self,
        rates: Tensor,  # (C,) of `class_rates`
        window: int = 20,  # iterations whose scores count
        width: int = 256,  # scores kept of a class in an iteration
    ):
        super().__init__()
        self.register_buffer('rates', rates.float())
        self.register_buffer('scores', torch.full((window, len(rates), width), -math.inf))  # oldest first
        self.register_buffer('images', torch.zeros(window, dtype=torch.long))

    @torch.no_grad()
    def add(
        self,
        detections: list,  # per image dict(scores (K,), labels (K,)): everything the teacher said
    ) -> Tensor:  # (C,) least score of each class; inf for a class without labels, -inf while fewer scores than asked for were seen
        "Take in an iteration of all processes, give the thresholds; every process must call it"
        scores, labels = (
            all_gather_cat(torch.cat([d[k] for d in detections]).to(self.rates.device))
            for k in ('scores', 'labels')
        )
        new = scores.new_full(self.scores.shape[1:], -math.inf, dtype=self.scores.dtype)
        for c in labels.unique().tolist():
            best = scores[labels == c].sort(descending=True).values[: new.shape[1]]
            new[c, : len(best)] = best.to(new)
        self.scores.copy_(torch.cat([self.scores[1:], new[None]]))
        self.images.copy_(
            torch.cat(
                [self.images[1:], all_gather_cat(self.images.new_tensor([len(detections)])).sum()[None]]
            )
        )
        ranked = self.scores.transpose(0, 1).flatten(1).sort(1, descending=True).values
        n = (self.rates * self.images.sum()).round().long().clamp(1, ranked.shape[1])
        return torch.where(self.rates > 0, ranked.gather(1, n[:, None] - 1)[:, 0], math.inf)


# %% [markdown]
# Class 0 occurs twice an image, class 1 every second image. When all scores double, the thresholds double,
# and the number of boxes stays:

# %%
rate_rule = ClassRates(torch.tensor([2.0, 0.5]), window=1)


def keep_by_rate(factor):  # -> (least score of each class, boxes kept)
    two = [
        dict(scores=factor * torch.tensor(s), labels=torch.tensor(c))
        for s, c in (([0.9, 0.8, 0.3, 0.2], [0, 0, 0, 1]), ([0.7, 0.6, 0.1, 0.4], [0, 0, 0, 1]))
    ]
    floor = rate_rule.add(two)
    return floor, sum(int((d['scores'] >= floor[d['labels']]).sum()) for d in two)


(low, n_low), (high, n_high) = keep_by_rate(0.5), keep_by_rate(1.0)
assert n_low == n_high == 5 and high.allclose(2 * low)
low, high, n_high


# %% [markdown]
# ## A longer memory
#
# Eight processes with four unlabelled images each fit the mixture to hundreds of costs. One process with two
# images has a dozen or two, and the threshold jumps. `CostMemory` pools the costs of the last iterations.
# They are a little stale, since the detector has moved on, so a few iterations are enough. It is not part of
# the published method, and off by default.

# %%
#| export
class CostMemory(nn.Module):
    "The costs of the last iterations, in buffers of fixed size: saved, restored and moved with the network"

    def __init__(
        self,
        memory: int = 0,  # iterations that are remembered; 0 = none
        width: int = 1024,  # costs kept of each; of more, as many are taken at equal steps of the sorted list
    ):
        super().__init__()
        self.memory, self.width = memory, width
        self.register_buffer('costs', torch.zeros(memory, width if memory else 0))  # oldest first
        self.register_buffer('counts', torch.zeros(memory, dtype=torch.long))

    @torch.no_grad()
    def add(
        self,
        costs: Tensor,  # (n,) of this iteration; n may be 0
    ) -> Tensor:  # (m,) remembered costs, oldest first, then those of this iteration
        "Pool this iteration's costs with those before it, and remember them"
        if not self.memory:
            return costs
        there = torch.arange(self.width, device=self.counts.device) < self.counts[:, None]
        pooled = torch.cat([self.costs[there].to(costs), costs])
        row = costs.to(self.costs)
        if len(row) > self.width:
            row = row.sort().values[torch.linspace(0, len(row) - 1, self.width).round().long().to(row.device)]
        new, count = self.costs.new_zeros(1, self.width), self.counts.new_tensor([len(row)])
        new[0, : len(row)] = row
        self.costs.copy_(torch.cat([self.costs[1:], new]))
        self.counts.copy_(torch.cat([self.counts[1:], count]))
        return pooled


# %%
parts = [
    torch.cat(matched_costs(*simulate(0.6, seed, images=2)[2:0:-1])) for seed in range(60)
]  # 60 small batches
memory = CostMemory(memory=8, width=64)
alone, pooled = (
    torch.stack([mining_threshold(f(c))[0] for c in parts])[8:].std() for f in (lambda c: c, memory.add)
)
assert pooled < alone
alone, pooled

# %% [markdown]
# The buffers have a fixed size and lie in the state of the network, so a run that is resumed has the same
# memory.
#
# ## Summary
#
# * Every box of $B^0$ is matched to the student's predictions; the cost says how far the two networks agree.
# * A mixture of two Gaussians, fitted in each iteration to the costs of the global batch, finds the heap of
#   agreement; its mode is the threshold.
# * The threshold needs no tuning and follows the training; it gives up half of the right boxes to stay clear
#   of the wrong ones.
# * $B^{sup}$ trains everything, $B^{con}\supseteq B^{sup}$ only the consistency.
# * It fails where both networks are wrong in the same way, and where there is only one heap.
# * What filters do to a training, and what happens when the mixture chooses labels too: @sec-abl-filters.
#
# ## Exercises
#
# 1. Take the border $r_0=r_1$ as threshold in `judge`: what do precision and recall become?
# 2. Which of the three terms of the cost separates right from wrong best, at skill .2 and at skill .8?
# 3. Fit three components. What does the one in the middle hold?
# 4. Why must the threshold be one of the given costs for the fallback of a single cost to be consistent?
