# %% [markdown]
# # Variants {#sec-variants}
#
# > Exchange parts of Semi-DETR for the alternatives that studies compare it with.
#
# The chapters before this one contain the algorithm of the paper and of its code. A study replaces one part
# of it at a time: the filter of pseudo labels, the boxes of the consistency loss, the one-to-many assignment.
# The parts are functions, passed as arguments, and a setting holds the name of the function. This chapter has
# the alternatives, and for each setting the function that turns its value into the function to pass. For the
# default value that is always the function of the earlier chapter.
#
# | setting | default | function that returns the part | passed to |
# |---|---|---|---|
# | `criterion.o2m` | `task_aligned` | `one_to_many_assigner` | `set_criterion` (@sec-losses) |
# | `mining.init` | `mean_std` | `initial_filter` | `initial_boxes` (@sec-mining) |
# | `mining.solver` | `torch` | `mixture_solver` | `mining_threshold` (@sec-mining) |
# | `mining.sup_filter`, `mining.con_filter` | `score`, `cpm` | `label_filters` | `mine` (@sec-mining) |
# | `method.density_guard` | 0 | `density_guard` | `set_criterion` (@sec-thresholds) |
# | `consistency.boxes`, `consistency.density` | `mined`, `sparse` | `box_picker` | `pair_boxes` (@sec-consistency) |

# %%
#| default_exp semi.variants

# %%
#| export
import math
import warnings
from functools import partial
import torch
from torch import nn, Tensor
from semidetr.boxes import denormalize_boxes, normalize_boxes, xyxy_to_cxcywh
from semidetr.core import ConfigError, all_gather_cat
from semidetr.detectors.contract import class_scores, suppressor_on
from semidetr.detectors.denoising import noise_boxes
from semidetr.detectors.group import parallel_parts
from semidetr.many import common_stream, counts_of_all, together
from semidetr.matching.assigners import ASSIGNERS
from semidetr.matching.losses import CriterionConfig, parallel_losses
from semidetr.matching.matching import assign_o2m, hungarian
from semidetr.semi.consistency import ConsistencyConfig, con_boxes, consistency_loss
from semidetr.semi.mining import MiningConfig, Mixture, confident_boxes, fit_mixture, mean_std, mined_boxes
from semidetr.semi.teacher import fixed_threshold, keep_boxes, transport
from semidetr.semi.thresholds import ClassMixtures, background_weights

# %%
#| hide
warnings.filterwarnings('ignore', message='IProgress')

# %%
from types import SimpleNamespace
import matplotlib.pyplot as plt
from semidetr.boxes import box_iou, transform_boxes
from semidetr.data.augment import ViewConfig, strong_view, weak_view
from semidetr.data.digits import DigitsScenes
from semidetr.data.loader import collate
from semidetr.detectors.backbone import BackboneConfig
from semidetr.detectors.detector import Detector, DetectorConfig
from semidetr.detectors.transformer import TransformerConfig
from semidetr.draw import COLORS, draw_boxes, show_image
from semidetr.matching.losses import match_stats
from semidetr.semi.mining import mine, mining_threshold
from semidetr.semi.teacher import make_teacher


# %% [markdown]
# ## One-to-many assignments
#
# The alternatives are those of @sec-assigners. They share the powers of the metric with the task-aligned
# assignment; its $k$ does not apply to them.

# %%
#| export
def one_to_many_assigner(
    cfg: CriterionConfig = CriterionConfig(),  # `o2m`
):  # (logits, boxes, padded, labels, k, alpha, beta) -> Matches
    "The assignment that `criterion.o2m` names"
    if cfg.o2m == 'task_aligned':
        return assign_o2m
    rule = ASSIGNERS[cfg.o2m]

    def assigner(logits, boxes, padded, labels, k, alpha, beta):
        return rule(logits, boxes, padded, labels, alpha=alpha, beta=beta)

    return assigner


# %%
g = torch.Generator().manual_seed(0)
outputs = dict(
    pred_logits=torch.randn(2, 20, 3, generator=g) - 2,
    pred_boxes=torch.rand(2, 20, 4, generator=g) * 0.5 + 0.2,
)
objects = [
    dict(labels=torch.tensor([2, 0]), boxes=torch.tensor([[0.4, 0.4, 0.4, 0.4], [0.6, 0.6, 0.3, 0.5]])),
    dict(labels=torch.zeros(0), boxes=torch.zeros(0, 4)),
]
positives = {}
for name in ('task_aligned', 'max_iou', 'atss', 'simota'):
    cfg = CriterionConfig(o2m=name)
    positives[name] = match_stats(outputs, objects, 'o2m', cfg, one_to_many_assigner(cfg))['positives']
assert one_to_many_assigner() is assign_o2m and len(set(positives.values())) > 1
positives


# %% [markdown]
# ## Initial boxes and the fit of the mixture
#
# $B^0$ may also be selected by the score, as in the paper, or contain all detections. The mixture may be
# fitted by scikit-learn, as in the published code.

# %%
#| export
def initial_filter(
    cfg: MiningConfig = MiningConfig(),  # `init`
    threshold: float = 0.4,  # score for init='score'
):  # scores (K,) -> (K,) bool
    "The filter of B^0 that `mining.init` names"
    if cfg.init == 'mean_std':
        return mean_std
    return partial(fixed_threshold, threshold=threshold if cfg.init == 'score' else -math.inf)


@torch.no_grad()
def fit_mixture_sklearn(
    costs: Tensor,  # (n,)
) -> Mixture:
    "The fit of `fit_mixture` by scikit-learn, on the host"
    if len(costs) < 2:
        return fit_mixture(costs)  # scikit-learn needs two samples
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
    fitted = model.weights_, model.means_, model.covariances_
    return Mixture(*(torch.from_numpy(v.reshape(2)).to(costs.device) for v in fitted))


def mixture_solver(
    cfg: MiningConfig = MiningConfig(),  # `solver`
):  # costs (n,) -> Mixture
    "The fit that `mining.solver` names"
    return dict(torch=fit_mixture, sklearn=fit_mixture_sklearn)[cfg.solver]


# %%
cluster = torch.cat([torch.randn(40, generator=g) * 0.7 - 3, torch.randn(60, generator=g) + 1])
by_torch, by_sklearn = fit_mixture(cluster), fit_mixture_sklearn(cluster)
gap = max(
    float((getattr(by_torch, f) - getattr(by_sklearn, f)).abs().max())
    for f in ('weights', 'means', 'variances')
)
assert gap < 1e-5 and mining_threshold(cluster)[0] == mining_threshold(cluster, fit_mixture_sklearn)[0]
by_sklearn, gap


# %% [markdown]
# ## Filters of pseudo labels
#
# A filter returns which boxes of $B^0$ to keep; to compare filters on all detections of the teacher, set
# `mining.init=all`. Besides the two of @sec-mining there are: all boxes, mean + std of the scores, the $k$ best
# of an image, a share or a threshold per class, class rates (next section), and mixtures of the scores of each
# class (@sec-thresholds).

# %%
#| export
def top_k(
    scores: Tensor,  # (K,) of one image
    k: int,
) -> Tensor:  # (K,) bool
    "The k highest scores"
    best = scores.topk(min(k, len(scores))).indices
    return torch.zeros_like(scores, dtype=torch.bool).index_fill(0, best, True)


def per_class(
    scores: Tensor,  # (K,) of one image
    labels: Tensor,  # (K,)
    cfg: MiningConfig,  # `quantile`, `class_thresholds`
    threshold: float,  # score for classes without a number in `class_thresholds`
) -> Tensor:  # (K,) bool
    "A threshold for each class, or the best share of each class of the image"
    if cfg.class_thresholds:
        min_scores = scores.new_tensor([*cfg.class_thresholds, threshold])
        return scores >= min_scores[labels.clamp(max=len(cfg.class_thresholds))]
    same = labels[:, None] == labels
    better = (same & (scores > scores[:, None])).sum(1)
    return better < ((1 - cfg.quantile) * same.sum(1)).ceil()


def label_filters(
    cfg: MiningConfig = MiningConfig(),  # `sup_filter`, `con_filter` and their numbers
    min_scores: Tensor = None,  # (C,) of `ClassRates` or `ClassMixtures`, for 'class_rate', 'class_mixture'
):  # (filter of B^sup, filter of B^con), each (detection, costs, tau, threshold) -> (K,) bool
    "The filters that `mining.sup_filter` and `mining.con_filter` name; B^con by 'score' is the same as B^sup"

    def all_boxes(detection, costs, tau, threshold):
        return torch.ones_like(detection['scores'], dtype=torch.bool)

    def by_mean_std(detection, costs, tau, threshold):
        return mean_std(detection['scores'])

    def by_rank(detection, costs, tau, threshold):
        return top_k(detection['scores'], cfg.top_k)

    def by_class(detection, costs, tau, threshold):
        return per_class(detection['scores'], detection['labels'], cfg, threshold)

    def by_rate(detection, costs, tau, threshold):
        return detection['scores'] >= min_scores[detection['labels']]

    filters = dict(score=confident_boxes, cpm=mined_boxes, all=all_boxes, top_k=by_rank, per_class=by_class)
    filters |= dict(class_rate=by_rate, class_mixture=by_rate)
    filters |= dict(mean_std=all_boxes if cfg.init == 'mean_std' else by_mean_std)
    sup = filters[cfg.sup_filter]
    return sup, sup if cfg.con_filter == 'score' else filters[cfg.con_filter]


def earlier_filter(
    cfg: MiningConfig,  # `init`, `sup_filter` and their numbers
    threshold: float,  # tau_s
    min_scores: Tensor = None,  # (C,) of `ClassRates` or `ClassMixtures`
):  # dict(scores (K,), labels (K,)) of one image -> (K,) bool
    "B^sup of an earlier view (@sec-mixing), by the same filters; 'cpm' needs costs and cannot be used"

    def keep(detection):
        scores = None if min_scores is None else min_scores.to(detection['labels'].device)
        first, (second, _) = initial_filter(cfg, threshold), label_filters(cfg, scores)
        return first(detection['scores']) & second(detection, None, None, threshold)

    return keep


# %%
assert label_filters() == (confident_boxes, mined_boxes)
image = dict(
    scores=torch.tensor([0.9, 0.8, 0.7, 0.6, 0.1, 0.5, 0.4]), labels=torch.tensor([0, 0, 0, 0, 1, 2, 2])
)


def kept_by(name, **kw):  # indices of the boxes that become labels
    sup_filter, _ = label_filters(MiningConfig(sup_filter=name, init='all', **kw))
    sup, _ = mine([image], [torch.zeros(7)], -1.0, sup_filter=sup_filter)
    return sup[0].nonzero().flatten().tolist()


kept = {name: kept_by(name) for name in ('score', 'mean_std', 'per_class', 'all')}
kept['top_3'] = kept_by('top_k', top_k=3)
kept['earlier'] = earlier_filter(MiningConfig(), 0.4)(image).nonzero().flatten().tolist()
kept['class_thresholds'] = kept_by('per_class', class_thresholds=(0.75, 0.05))
assert kept['per_class'] == [0, 1, 4, 5] and kept['top_3'] == [0, 1, 2]
assert kept['class_thresholds'] == [0, 1, 4, 5, 6] and kept['earlier'] == kept['mean_std']
kept


# %% [markdown]
# ## Class rates
#
# A single threshold treats all classes alike, but rare and small classes have lower scores: a score of .3 may
# keep nine of ten common objects and half of the rare ones. The student then learns that the rare class is
# background, and the teacher, its average, predicts it less and less. A threshold for each class
# (`mining.class_thresholds`) helps at first. But scores grow during training whether boxes are correct or
# not, and a fixed threshold accepts more and more wrong boxes.
#
# The frequency of classes does not change. Labelled and unlabelled images have the same distribution, so a
# class should get as many pseudo boxes per image as it has true boxes per labelled image (Chen et al., Label
# Matching Semi-Supervised Object Detection, CVPR 2022, choose thresholds by this rule). With $r_c$ the number
# of labelled boxes of class $c$ per image, and the scores of the last iterations on $n$ images,
# $$
# t_c = \text{the } \max(1, \lfloor r_c\, n \rceil) \text{-th largest score of class } c \quad (r_c > 0) .
# $$ {#eq-mining-rate}
#
# `mining.sup_filter=class_rate` keeps the boxes with a score of at least $t_c$. The filter is applied to $B^0$,
# so it needs a low score there (`mining.init=score pseudo.threshold=0.1`). It is not part of Semi-DETR, and
# off by default. With very few labelled images $r_c$ is a rough estimate.

# %%
#| export
def class_rates(
    labelled,  # data set
    num_classes: int,  # C
) -> Tensor:  # (C,) boxes per image, without those to be ignored
    "Number r_c of boxes of each class per labelled image"
    counts = torch.zeros(num_classes)
    for i in range(len(labelled)):
        a = labelled.annotation(i)
        counts += a['labels'][~a['ignore']].bincount(minlength=num_classes)
    return counts / max(1, len(labelled))


class ClassRates(nn.Module):
    "Thresholds t_c that keep as many boxes of each class per image as the labels have (@eq-mining-rate)"

    def __init__(
        self,
        rates: Tensor,  # (C,) of `class_rates`
        window: int = 20,  # iterations whose scores count
        width: int = 256,  # scores per class and iteration that are stored
    ):
        super().__init__()
        self.register_buffer('rates', rates.float())
        self.register_buffer('scores', torch.full((window, len(rates), width), -math.inf))  # oldest first
        self.register_buffer('images', torch.zeros(window, dtype=torch.long))

    @torch.no_grad()
    def add(
        self,
        detections: list,  # per image dict(scores (K,), labels (K,)): all of the teacher's
    ) -> Tensor:  # (C,) t_c; inf for a class without labels, -inf while there are fewer scores than needed
        "Store the scores of an iteration of all processes, return the thresholds; every process must call it"
        scores, labels = (
            all_gather_cat(torch.cat([d[k] for d in detections]).to(self.rates.device))
            for k in ('scores', 'labels')
        )
        new = scores.new_full(self.scores.shape[1:], -math.inf, dtype=self.scores.dtype)
        for c in labels.unique().tolist():
            best = scores[labels == c].sort(descending=True).values[: new.shape[1]]
            new[c, : len(best)] = best.to(new)
        images = all_gather_cat(self.images.new_tensor([len(detections)])).sum()
        self.scores.copy_(torch.cat([self.scores[1:], new[None]]))
        self.images.copy_(torch.cat([self.images[1:], images[None]]))
        ranked = self.scores.transpose(0, 1).flatten(1).sort(1, descending=True).values
        n = (self.rates * self.images.sum()).round().long().clamp(1, ranked.shape[1])
        return torch.where(self.rates > 0, ranked.gather(1, n[:, None] - 1)[:, 0], math.inf)


def class_memory(
    cfg: MiningConfig,  # `sup_filter`, `con_filter` and their numbers
    labelled,  # data set; only 'class_rate' reads it
    num_classes: int,  # C
) -> nn.Module | None:  # `ClassRates`, `ClassMixtures` (@sec-thresholds), or None for the other filters
    "What remembers scores to find a threshold for each class"
    filters = cfg.sup_filter, cfg.con_filter
    if 'class_rate' in filters:
        return ClassRates(class_rates(labelled, num_classes), cfg.rate_window)
    return ClassMixtures(num_classes, fit=mixture_solver(cfg)) if 'class_mixture' in filters else None


def density_guard(
    share: float,  # `method.density_guard`
    labelled,  # data set; 0 does not read it
    num_classes: int,  # C
):  # pseudo labels of the images of a batch -> (B,) weights of their background, or None
    """The rule that `method.density_guard` sets (@eq-thresholds-guard); ConfigError without a data set

    For the main losses; those of parallel parts (@sec-losses-parallel) keep the weight 1.
    """
    if not share:
        return lambda targets: None
    if labelled is None:
        raise ConfigError(
            'method.density_guard counts labelled boxes: pass the data set to `Method.__init__`'
        )
    per_image = float(class_rates(labelled, num_classes).sum())
    return partial(background_weights, per_image=per_image, share=share)


# %% [markdown]
# Class 0 has two boxes per image, class 1 one in every second image. When all scores double, the thresholds
# double, and the number of boxes stays the same:

# %%
rate_rule = ClassRates(torch.tensor([2.0, 0.5]), window=1)


def keep_by_rate(factor):  # -> (threshold of each class, boxes kept)
    two = [
        dict(scores=factor * torch.tensor(s), labels=torch.tensor(c))
        for s, c in (([0.9, 0.8, 0.3, 0.2], [0, 0, 0, 1]), ([0.7, 0.6, 0.1, 0.4], [0, 0, 0, 1]))
    ]
    t_c = rate_rule.add(two)
    return t_c, sum(int((d['scores'] >= t_c[d['labels']]).sum()) for d in two)


(low, n_low), (high, n_high) = keep_by_rate(0.5), keep_by_rate(1.0)
assert n_low == n_high == 5 and high.allclose(2 * low)
low, high, n_high

# %%
#| label: fig-variants-rates
#| fig-cap: "Pseudo boxes per image while the scores of a detector grow. A fixed threshold keeps more and more of the same detections; the class rate keeps as many as the labels have."
#| fig-alt: "Boxes per image against the mean score: three rising curves for fixed thresholds and a level line at three boxes for the class rate."
means = []
per_image = {name: [] for name in ('score .3', 'score .4', 'score .5', 'class rate')}
growing = ClassRates(torch.tensor([3.0]), window=1)
for power in (4, 3, 2, 1.5, 1, 0.75, 0.5):
    scores = [torch.rand(12, generator=torch.Generator().manual_seed(i)) ** power for i in range(50)]
    (t_c,) = growing.add([dict(scores=s, labels=torch.zeros(12, dtype=torch.long)) for s in scores]).tolist()
    means.append(float(torch.cat(scores).mean()))
    for name, level in zip(per_image, (0.3, 0.4, 0.5, t_c)):
        per_image[name].append([float((s >= level).sum()) for s in scores])
fig, ax = plt.subplots(figsize=(4.8, 2.6), dpi=80, layout='constrained')
for name, color in zip(per_image, ('#cccccc', '#999999', '#666666', COLORS['teacher'])):
    ax.plot(means, torch.tensor(per_image[name]).mean(1), color=color, label=name)
ax.set(xlabel='mean score', ylabel='boxes per image', ylim=(0, 12))
ax.legend(fontsize=9)
assert torch.tensor(per_image['class rate']).mean(1).allclose(torch.tensor(3.0))
plt.show()


# %% [markdown]
# ## One-to-many beside one-to-one
#
# A parallel group or a second class head (@sec-group) takes the part of the first stage, and `method.T1` is 0. What
# is trained one-to-many can learn from a wider set of boxes than the one-to-one queries do: all detections of
# the teacher above `method.group_threshold`, each weighted by its score (@eq-losses-scored),
#
# $$
# B^{wide} = \{\, i : \hat s_i \ge .2 \,\}.
# $$ {#eq-variants-wide}

# %%
#| export
def sup_parallel(
    outputs: dict,  # of the student
    targets: list,  # labelled boxes
    cfg,  # Config: `detector`, `criterion`
) -> dict:  # of `parallel_losses`; {} where the detector has nothing beside its matching queries
    "One-to-many losses of the parallel parts on labelled images"
    if not parallel_parts(cfg.detector):
        return {}
    return parallel_losses(outputs, targets, cfg.criterion, one_to_many_assigner(cfg.criterion))


def unsup_parallel(
    outputs: dict,  # of the student in the strong view
    detections: list,  # of the teacher, in pixels of the weak views
    weak: list,  # targets of the weak views
    strong: list,  # targets of the strong views
    cfg,  # Config: `detector`, `criterion`, `method.group_threshold`, `pseudo.min_side`
) -> dict:  # of `parallel_losses`; {} where the detector has nothing beside its matching queries
    "One-to-many losses of the parallel parts on the wide set (@eq-variants-wide)"
    if not parallel_parts(cfg.detector):
        return {}
    masks = [fixed_threshold(d['scores'], cfg.method.group_threshold) for d in detections]
    wide = transport(keep_boxes(detections, masks), weak, strong, cfg.pseudo.min_side)
    return sup_parallel(outputs, wide, cfg)


def parallel_advice(
    cfg,  # Config of the run
) -> str:  # one line; '' where all is well
    "What to change where a part is trained one-to-many beside queries that are one-to-many as well"
    parts = parallel_parts(cfg.detector)
    if not parts or cfg.method.T1 <= 0 or suppressor_on(cfg.detector):
        return ''
    return (
        f'method.T1={cfg.method.T1}: the matching queries are one-to-many until then, but '
        f'detector.{parts[0]} is meant to be one-to-many beside one-to-one queries; set method.T1=0'
    )


def parallel_stages(
    cfg,  # Config of the run
    consistency: bool = False,  # does the method have cross-view queries?
) -> dict:  # 'group.field' -> (value, reason) as in `Method.derived`; {} without such parts
    "One-to-one matching throughout for the matching queries, and consistency to the end"
    out = {}
    if parallel_advice(cfg):
        out['method.T1'] = (0, 'one-to-one matching throughout, beside a part that is one-to-many throughout')
    if parallel_parts(cfg.detector) and consistency and cfg.consistency.until == 'T1':
        out['consistency.until'] = ('end', 'there is no first stage for it to end with')
    return out


# %%
beside_cfg = SimpleNamespace(
    method=SimpleNamespace(T1=100),
    detector=DetectorConfig(3, second_head=True),
    consistency=ConsistencyConfig(),
)
derived = parallel_stages(beside_cfg, consistency=True)
assert derived['method.T1'][0] == 0 and derived['consistency.until'][0] == 'end'
parallel_advice(beside_cfg)


# %% [markdown]
# ## A memory of costs
#
# On eight processes with four unlabelled images each, the mixture is fitted to hundreds of costs. On one
# process with two images there are a dozen, and the threshold varies strongly. `CostMemory` adds the costs of
# the last iterations (`mining.memory`). They come from earlier weights, so a few iterations are enough. It is
# not part of the published method, and off by default.

# %%
#| export
class CostMemory(nn.Module):
    "The costs of the last iterations, in buffers of fixed size: saved, restored and moved with the network"

    def __init__(
        self,
        memory: int = 0,  # number of iterations; 0 = none
        width: int = 1024,  # stored costs of each; of more, equally spaced ones of the sorted list
    ):
        super().__init__()
        self.memory, self.width = memory, width
        self.register_buffer('costs', torch.zeros(memory, width if memory else 0))  # oldest first
        self.register_buffer('counts', torch.zeros(memory, dtype=torch.long))

    @torch.no_grad()
    def add(
        self,
        costs: Tensor,  # (n,) of this iteration; n may be 0
    ) -> Tensor:  # (m,) stored costs, oldest first, then those of this iteration
        "Pool this iteration's costs with the stored ones, and store them"
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
small_batches = [
    torch.cat([torch.randn(7, generator=g) - 3, torch.randn(7, generator=g) + 1]) for _ in range(60)
]
memory = CostMemory(memory=8, width=64)
alone = torch.stack([mining_threshold(c)[0] for c in small_batches])[8:].std()
pooled = torch.stack([mining_threshold(memory.add(c))[0] for c in small_batches])[8:].std()
assert pooled < alone
alone, pooled


# %% [markdown]
# The buffers have a fixed size and are part of the state of the method, so a resumed run has the same memory.
#
# ## Boxes for the consistency loss
#
# Four alternatives to $B^{con}$ serve as controls: $B^{sup}$ alone (`score`), $B^{sup}$ with the noise of
# denoising queries (`jittered`, @eq-denoising-noise), boxes anywhere (`random`), and all detections of the
# teacher in addition (`density=dense`), or a grid in images without any.

# %%
#| export
def grid_boxes(
    size,  # (H, W) of the view
    n: int,  # cells per side
    like: Tensor,  # device and dtype
) -> Tensor:  # (n*n,4) xyxy pixels, row by row
    "The cells of a grid over a view"
    h, w = size
    i = torch.arange(n, device=like.device, dtype=like.dtype)
    y, x = torch.meshgrid(i * h / n, i * w / n, indexing='ij')
    return torch.stack([x, y, x + w / n, y + h / n], -1).flatten(0, 1)


def random_boxes(
    size,  # (H, W) of the view
    n: int,  # number of boxes
    like: Tensor,  # device and dtype
    generator: torch.Generator = None,  # None: torch's global one
) -> Tensor:  # (n,4) xyxy pixels inside the view
    "Boxes anywhere, with sides of a tenth to all of the view"
    r = torch.rand(n, 4, generator=generator, device=like.device, dtype=like.dtype)
    wh = 0.1 + 0.9 * r[:, 2:]
    corner = r[:, :2] * (1 - wh)
    return torch.cat([corner, corner + wh], 1) * like.new_tensor([size[1], size[0]] * 2)


def jittered_boxes(
    xyxy: Tensor,  # (n,4) pixels
    size,  # (H, W) of the view
    jitter: float,  # corners move by up to this share of half the size
    generator: torch.Generator = None,  # None: torch's global one
) -> Tensor:  # (n,4) xyxy pixels inside the view
    "Boxes with the noise of positive denoising queries (@eq-denoising-noise)"
    far = torch.zeros(len(xyxy), dtype=torch.bool, device=xyxy.device)
    noisy = noise_boxes(normalize_boxes(xyxy, size), far, jitter, generator).clamp(0, 1)
    return denormalize_boxes(xyxy_to_cxcywh(noisy), size)


def _as_detections(boxes):
    "Boxes as detections of class 0 with score 0"
    labels = torch.zeros(len(boxes), dtype=torch.long, device=boxes.device)
    return dict(boxes=boxes, labels=labels, scores=boxes.new_zeros(len(boxes)))


# %%
#| export
def _picked_by_all(pick, con, sup, sizes, generator, cfg):
    "Boxes of the own images; random ones are drawn for the images of all processes, in their order"
    if cfg.boxes not in ('jittered', 'random') or not together(cfg.normalise):
        return [pick(c, s, size, generator) for c, s, size in zip(con, sup, sizes)]
    like = con[0]['boxes']
    counts, own = counts_of_all([len(s['boxes']) for s in sup], device=like.device)
    rows = [(_as_detections(like.new_zeros(n, 4)),) * 2 + ((1, 1),) for n in counts]
    rows[own] = zip(con, sup, sizes)
    with common_stream(like.device, generator) as stream:
        return [pick(*row, stream) for row in rows][own]


def box_picker(
    cfg: ConsistencyConfig = ConsistencyConfig(),  # `boxes`, `density` and their numbers
):  # (con, sup, sizes, generator=None, proposals=None) -> per image dict(boxes, labels, scores)
    "Picks the boxes of the cross-view queries that `consistency.boxes` and `.density` name, for `pair_boxes`"

    def sparse(con, sup, size, generator):
        if cfg.boxes == 'jittered':
            boxes = jittered_boxes(sup['boxes'], size, cfg.jitter, generator)
            return dict(boxes=boxes, labels=sup['labels'], scores=sup['scores'])
        if cfg.boxes == 'random':
            return _as_detections(random_boxes(size, cfg.n_random, con['boxes'], generator))
        return dict(mined=con, score=sup, none=_as_detections(con['boxes'][:0]))[cfg.boxes]

    def pick(
        con,  # B^con: per image dict(boxes (n,4) xyxy pixels of the weak view, labels, scores)
        sup,  # B^sup, likewise
        sizes,  # per image (H, W) of the weak view
        generator=None,  # for 'jittered' and 'random'; None: torch's global one
        proposals=None,  # for 'dense': all of the teacher's detections, likewise
    ):
        picked = _picked_by_all(sparse, con, sup, sizes, generator, cfg)
        if cfg.density == 'sparse':
            return picked
        for i, (p, size) in enumerate(zip(picked, sizes)):
            more = proposals[i] if proposals else _as_detections(p['boxes'][:0])
            if not len(more['boxes']):
                more = _as_detections(grid_boxes(size, cfg.grid, p['boxes']))
            picked[i] = {k: torch.cat([p[k], more[k].to(p[k].dtype)]) for k in ('boxes', 'labels', 'scores')}
        return picked

    return con_boxes if (cfg.boxes, cfg.density) == ('mined', 'sparse') else pick


# %%
#| label: fig-variants-boxes
#| fig-cap: "The boxes of the consistency loss in one scene, with the six true boxes as mined ones and four of them as confident ones."
#| fig-alt: "Five copies of a scene of digits: with six tight boxes, with four, with four shifted ones, with ten boxes anywhere, and with the cells of a grid of four by four."
scene = DigitsScenes('train', n=16)[3]
true_boxes = dict(boxes=scene.boxes, labels=scene.labels, scores=torch.ones(len(scene.labels)))
confident = {k: v[:4] for k, v in true_boxes.items()}
size = scene.image.size[::-1]  # (H, W)
settings = {name: dict(boxes=name) for name in ('mined', 'score', 'jittered', 'random')}
settings |= dict(grid=dict(boxes='none', density='dense'))
picked = {
    name: box_picker(ConsistencyConfig(**kw))([true_boxes], [confident], [size], generator=g)[0]['boxes']
    for name, kw in settings.items()
}
fig, axes = plt.subplots(1, 5, figsize=(7, 1.6), dpi=80, layout='constrained')
for ax, (name, boxes) in zip(axes, picked.items()):
    show_image(ax, scene.image, title=name)
    draw_boxes(ax, boxes, kind='mined')
assert [len(boxes) for boxes in picked.values()] == [6, 4, 4, 10, 16]
plt.show()


# %% [markdown]
# ## Correspondence without extra queries
#
# Matching queries of the two networks can also be paired by what they predict
# (`consistency.correspondence=hungarian`). The teacher's best predictions are moved to the strong view and
# matched one-to-one to the student's by boxes and classes (@eq-matching-hungarian); the loss of
# @eq-consistency-loss compares the outputs of the pairs. The decoders need no extra queries, but the pairs are
# only as good as the predictions: early in training the two queries of a pair often belong to different
# objects.

# %%
#| export
def match_views(
    student: dict,  # outputs for the strong views
    teacher: dict,  # outputs for the weak views
    weak: list,  # targets of the weak views
    strong: list,  # targets of the strong views
    cfg: ConsistencyConfig = ConsistencyConfig(),  # `top`
    min_side: float = 1.0,  # pixels
) -> list:  # per image (student queries, teacher queries)
    "Match the student's queries to the best ones of the teacher, whose predictions serve as objects"
    detections, queries = [], []
    for scores, boxes, w in zip(class_scores(teacher).detach(), teacher['pred_boxes'].detach(), weak):
        score, label = scores.max(-1)
        best = score.topk(min(cfg.top, len(score))).indices
        queries.append(best)
        xyxy = denormalize_boxes(boxes[best], w['size'])
        detections.append(dict(boxes=xyxy, labels=label[best], scores=score[best]))
    objects = transport(detections, weak, strong, min_side)
    pairs = hungarian(student, objects)
    return [(q, best[t['source'][i]]) for (q, i), best, t in zip(pairs, queries, objects)]


def hungarian_consistency(
    student: dict,  # outputs for the strong views
    teacher: dict,  # outputs for the weak views
    weak: list,  # targets of the weak views
    strong: list,  # targets of the strong views
    cfg: ConsistencyConfig = ConsistencyConfig(),  # `top`, and those of `consistency_loss`
) -> dict:  # loss_con_0, ... one scalar per decoder layer
    "The consistency loss of matching queries that are paired by their predictions"
    pairs = match_views(student, teacher, weak, strong, cfg)

    def rows(hs, side):
        return torch.cat([hs[:, b, p[side]] for b, p in enumerate(pairs)], 1)[:, None]  # (layers,1,K,d)

    s, t = rows(student['hs'], 0), rows(teacher['hs'], 1)
    return consistency_loss(s, t, s.new_ones(1, s.shape[2]), cfg)


# %% [markdown]
# An untrained detector, as at the start of a run. How many pairs overlap by half in the strong view?

# %%
torch.manual_seed(0)
student = Detector(
    DetectorConfig(
        10,
        BackboneConfig('efficientnet_lite0', out_strides=(8,)),
        TransformerConfig(d_model=64, n_levels=2, enc_layers=1, dec_layers=3, ffn=128, num_queries=30),
    )
).train()
teacher = make_teacher(student)
view_cfg = ViewConfig(short_sides=(96,), mean=student.backbone.mean, std=student.backbone.std)
scenes = [DigitsScenes('train', n=16)[i] for i in (3, 5, 9, 11)]
weak = collate([weak_view(s, view_cfg, i) for i, s in enumerate(scenes)], truth=False)
strong = collate([strong_view(s, view_cfg, 100 + i) for i, s in enumerate(scenes)], truth=False)
with torch.no_grad():
    s_out, t_out = (
        net.decode(net.encode(p['images'], p['mask'])) for net, p in ((student, strong), (teacher, weak))
    )
ious = []
for i, (q_s, q_t) in enumerate(match_views(s_out, t_out, weak['targets'], strong['targets'])):
    w, s = weak['targets'][i], strong['targets'][i]
    t_boxes = denormalize_boxes(t_out['pred_boxes'][i, q_t], w['size'])
    t_boxes, _ = transform_boxes(t_boxes, s['matrix'] @ w['matrix'].inverse(), s['size'])
    ious.append(box_iou(t_boxes, denormalize_boxes(s_out['pred_boxes'][i, q_s], s['size'])).diag())
good = torch.cat(ious).gt(0.5).float().mean().item()
assert 0.1 < good < 0.9
print(f'{good:.0%} of the {len(torch.cat(ious))} pairs overlap by half')

# %% [markdown]
# More than proposals of the same number (@sec-consistency), but far from all.
#
# ## Summary
#
# * A setting names a part, a function of this chapter returns it, and the algorithm takes it as an argument.
# * Filters select labels by score, rank, class or class rate; class rates keep the number of pseudo boxes of
#   each class constant while scores grow.
# * `CostMemory` pools the costs of several iterations where a batch has few.
# * Grid, random and jittered boxes are controls of the consistency loss; the Hungarian correspondence needs no
#   extra queries.
# * Their effect on a training: @sec-abl-assigners, @sec-abl-filters, @sec-abl-consistency.
#
# ## Exercises
#
# 1. Which filters keep at least one box of every image, and is that desirable?
# 2. Half of the labelled images contain no object of class $c$. Does that change $r_c$, and should it?
# 3. Write a filter that keeps the mined boxes with a score above .2, and pass it to `mine`.
# 4. Pair the queries of both networks by their boxes alone. What changes early in training?
