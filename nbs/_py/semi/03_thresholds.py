# %% [markdown]
# # Thresholds from scores {#sec-thresholds}
#
# > Find a score threshold for each class, and train less background where the teacher is unsure.
#
# *Why.* A threshold is a decision about all classes and all of training, made before either is known. Too high,
# it loses the objects of rare classes; the student then learns from every lost object that it is background. Two
# remedies of other methods need no labels and no tuning. *Consistent-Teacher* (X. Wang et al., CVPR 2023) fits a
# mixture of two Gaussians to the recent scores of each class, as Semi-DETR does with costs (@sec-mining). And
# where the teacher finds far fewer boxes than labelled images have, a *density guard* lowers the weight of the
# background: some of it are objects that were missed. Both are off by default.

# %%
#| default_exp semi.thresholds

# %%
#| export
import math
import torch
from torch import nn, Tensor
from semidetr.core import all_gather_cat
from semidetr.semi.mining import fit_mixture, mining_threshold

# %%
import matplotlib.pyplot as plt


# %% [markdown]
# ## How many boxes of an image count
#
# Most of the teacher's detections have scores near 0, and a mixture of all of them would describe those. If
# scores were probabilities, an image would hold $\sum_k s_k$ objects. Of its $K$ detections the $n+1$ best
# enter the fit,
#
# $$
# n = \min\left(\left\lfloor \textstyle\sum_k s_k + \tfrac12 \right\rfloor,\; K-1\right).
# $$ {#eq-thresholds-count}

# %%
#| export
def expected_boxes(
    scores: Tensor,  # (K,) of one image
) -> int:  # 0..K
    "How many of the best detections enter the fit: n + 1 (@eq-thresholds-count)"
    return min(int(scores.sum() + 0.5), len(scores) - 1) + 1


# %%
counted = [expected_boxes(torch.tensor(s)) for s in ([0.9, 0.8, 0.3, 0.1], [0.9], [])]
assert counted == [3, 1, 0]
counted


# %% [markdown]
# ## The threshold of a class
#
# Let $s_1,\dots,s_m$ be the last 100 such scores of a class, with mean $\bar s$ and standard deviation
# $\sigma$. The threshold $t_c$ is that of @eq-mining-threshold for the costs
#
# $$
# c_i = -\frac{s_i-\bar s}{\sigma}, \qquad t_c = \bar s - \sigma\,\tau(c_1,\dots,c_m),
# $$ {#eq-thresholds-mixture}
#
# the likeliest score of the upper component; with fewer than four scores it is 0. The fit starts with variances
# of 1. Scores between 0 and 1 vary less: both components are alike for them at the start, and the fit stops
# nearby. Standardised scores have a standard deviation of 1.

# %%
#| export
def mixture_score(
    scores: Tensor,  # (m,) of one class
    fit=fit_mixture,  # costs (m,) -> Mixture
) -> Tensor:  # 0-d: one of the scores, or 0 where there are fewer than four
    "The likeliest score of the upper of two components (@eq-thresholds-mixture)"
    if len(scores) < 4:
        return scores.new_zeros(())
    x = scores.double()
    cost = (x.mean() - x) / x.std().clamp(min=1e-12)
    tau, _ = mining_threshold(cost, fit)
    return scores[(cost - tau).abs().argmin()]


# %%
two_groups = torch.tensor([0.06, 0.08, 0.1, 0.12, 0.7, 0.75, 0.8, 0.9])
raw, _ = mining_threshold(-two_groups)
cut = mixture_score(two_groups)
assert abs(cut - 0.8) < 1e-6 and abs(-raw - 0.7) < 1e-6  # raw scores: the fit has hardly begun
one_group = mixture_score(torch.tensor([0.5, 0.52, 0.54, 0.56]))
assert abs(one_group - 0.54) < 1e-6  # half of a single group is lost, as in mining
cut, -raw, one_group


# %% [markdown]
# `ClassMixtures` keeps the scores of each class in a buffer, which belongs to the state of the method: a resumed
# run has the same thresholds. Only classes with new scores are fitted again. Select it by
# `mining.sup_filter=class_mixture`. The filter is applied to $B^0$, so that needs a low score, as with
# class rates (@sec-variants): `mining.init=score pseudo.threshold=0.1`. That score is also the threshold of a
# class with fewer than four scores.
#
# ::: {.callout-note}
# ## Paper vs. code
# Consistent-Teacher is built on a dense detector and fits raw scores by scikit-learn. The queue of 100 scores,
# the four scores and the rule of @eq-thresholds-count are those of its code. Standardised scores, and the
# smaller of two equally likely scores, are ours.
# :::

# %%
#| export
class ClassMixtures(nn.Module):
    "Thresholds t_c from mixtures of the last scores of each class (@eq-thresholds-mixture)"

    def __init__(
        self,
        num_classes: int,  # C
        width: int = 100,  # scores per class that are stored
        fit=fit_mixture,  # costs (m,) -> Mixture
    ):
        super().__init__()
        self.fit = fit
        self.register_buffer('scores', torch.full((num_classes, width), -math.inf))  # oldest first
        self.register_buffer('thresholds', torch.zeros(num_classes))

    @torch.no_grad()
    def add(
        self,
        detections: list,  # per image dict(scores (K,), labels (K,)): all of the teacher's
    ) -> Tensor:  # (C,) t_c; 0 for a class with fewer than four scores
        "Store the scores of an iteration of all processes, return the thresholds; every process must call it"
        scores, labels = [], []
        for d in detections:
            best = d['scores'].topk(expected_boxes(d['scores'])).indices
            scores.append(d['scores'][best])
            labels.append(d['labels'][best])
        scores, labels = (all_gather_cat(torch.cat(x).to(self.scores.device)) for x in (scores, labels))
        for c in labels.unique().tolist():
            new = scores[labels == c].to(self.scores)
            self.scores[c] = torch.cat([self.scores[c], new])[-self.scores.shape[1] :]
            self.thresholds[c] = mixture_score(self.scores[c][self.scores[c].isfinite()], self.fit)
        return self.thresholds.clone()


# %% [markdown]
# Two classes whose scores differ, in twenty iterations of four images: class 0 has correct boxes near .8 and
# wrong ones near .4, class 1 near .45 and .2. One threshold for both would lose class 1 or keep the wrong boxes
# of class 0. The two thresholds keep no wrong box and, being modes, about half of the correct ones.

# %%
mixture_rule = ClassMixtures(2)
g = torch.Generator().manual_seed(0)
seen = []
for _ in range(20):
    images = []
    for _ in range(4):
        centres = torch.tensor([0.8, 0.8, 0.4, 0.45, 0.45, 0.2])
        drawn = (centres + 0.05 * torch.randn(6, generator=g)).clamp(0.01, 0.99)
        images.append(dict(scores=drawn, labels=torch.tensor([0, 0, 0, 1, 1, 1])))
    t_c = mixture_rule.add(images)
    seen.append(torch.stack([image['scores'] for image in images]))
drawn_scores = torch.cat(seen)  # (80,6)
kept_share = (drawn_scores >= t_c[[0, 0, 0, 1, 1, 1]]).float().mean(0)
assert t_c[0] > 0.7 and 0.4 < t_c[1] < 0.5
assert (kept_share[[2, 5]] == 0).all() and (kept_share[[0, 1, 3, 4]] > 0.3).all()
t_c, kept_share


# %% [markdown]
# ## Less background where boxes are missing
#
# Let labelled images have $r$ boxes on average, and let an unlabelled image have $n$ pseudo labels. If $n$ is
# far below $r$, most objects of the image probably have no label, and the class loss of everything that is not
# matched says that they are background. With `method.density_guard` $=\rho$ these entries, those whose target is
# 0, have the weight
#
# $$
# w = \min\left(1,\; \frac{n}{\rho\,r}\right)
# $$ {#eq-thresholds-guard}
#
# in the class losses of decoder layers and encoder output; normalisers do not change. Entries with a target keep
# the weight 1, and so do denoising queries, which lie at pseudo labels. A parallel group and a second class head
# (@sec-group) learn from a wider set of boxes (@eq-variants-wide); their losses do not change. An image without
# any pseudo label has no class loss of the matching queries. $\rho=.5$ leaves images alone that have half as many
# boxes as usual. The rule is ours; Consistent-Teacher multiplies the whole loss of a batch by .01 if fewer than
# half of its images have a box.

# %%
#| export
def background_weights(
    targets: list,  # pseudo labels per image: dict(labels (n,))
    per_image: float,  # r, boxes per labelled image
    share: float = 0.5,  # rho, share of r from which on the background counts in full
) -> Tensor:  # (B,) in [0,1]
    "Weight of the background of each image (@eq-thresholds-guard); 1 where labelled images have no boxes"
    n = torch.tensor([len(t['labels']) for t in targets], dtype=torch.float32)
    n = n.to(targets[0]['labels'].device) if targets else n
    return torch.ones_like(n) if per_image <= 0 else (n / (share * per_image)).clamp(max=1)


# %%
counts = (0, 6, 9, 20)
guarded = background_weights([dict(labels=torch.zeros(n)) for n in counts], per_image=17.6)
assert torch.allclose(guarded, torch.tensor([0, 6 / 8.8, 1, 1]))
assert abs(min(1, 6.2 / (0.5 * 17.6)) - 0.7045) < 1e-4  # blood cells: 6.2 of 17.6 boxes are found on average
guarded

# %%
#| label: fig-thresholds-two
#| fig-cap: "Left: the scores of two classes and their thresholds (dashed); no single score would fit both. Right: the weight of the background grows with the number of pseudo labels, up to half the number of boxes of labelled images."
#| fig-alt: "Left: two histograms with two groups each and a dashed line in the upper group of each. Right: a line from 0 to 1 at 8.8 boxes, then level."
fig, axes = plt.subplots(1, 2, figsize=(6, 2.6), dpi=80, layout='constrained')
for c, color in enumerate(('#1f77b4', '#ff7f0e')):
    of_class = drawn_scores[:, 3 * c : 3 * c + 3].flatten().tolist()
    axes[0].hist(of_class, bins=30, range=(0, 1), color=color, alpha=0.6, label=f'class {c}')
    axes[0].axvline(t_c[c].item(), color=color, ls='--')
axes[0].set(xlabel='score', ylabel='boxes')
axes[0].legend(fontsize=9)
numbers = list(range(21))
line = background_weights([dict(labels=torch.zeros(n)) for n in numbers], per_image=17.6)
axes[1].plot(numbers, line, color='#1f77b4')
axes[1].set(xlabel='pseudo labels per image', ylabel='weight of the background')
plt.show()

# %% [markdown]
# ## Summary
#
# - `ClassMixtures` gives each class a threshold that follows its scores: the mode of the upper of two components
#   (`mining.sup_filter=class_mixture`).
# - Scores are standardised before the fit, because it starts with variances of 1.
# - It has the weakness of mining: of a class whose boxes are all correct, half are lost.
# - The density guard (`method.density_guard`) lowers the weight of the background in images with few pseudo
#   labels, for the mean teacher and for Semi-DETR.
#
# ## Exercises
#
# 1. Fit the raw scores of `two_groups` with start variances of .01. What is the threshold?
# 2. Which images does the guard harm: those with few objects, or those with many?
# 3. Keep 30 scores per class instead of 100. How much do the thresholds vary between iterations?
