# %% [markdown]
# # Softmax with a no-object class {#sec-softmax}
#
# > Match and train a detector whose classes, with "no object" as one of them, share one softmax.
#
# *Why.* The matching (@sec-matching), the mining of pseudo labels and all other parts read the score of a class
# as the sigmoid of its logit. DETR (@sec-detr) predicts one distribution over $C$ classes and a last one, *no
# object*, instead. Without care a sigmoid of such a logit would be taken for a probability: no error, only a
# wrong score. This chapter translates the logits, so that the other parts need no second version, and holds
# what is really different: the class loss and the class cost of the original code (Carion et al. 2020).

# %%
#| default_exp matching.softmax

# %%
#| export
import torch
from torch import Tensor

# %%
import matplotlib.pyplot as plt
import torch.nn.functional as F
from semidetr.detectors.contract import sigmoid_logits
from semidetr.matching.matching import hungarian, one_to_many, pair_cost


# %% [markdown]
# ## Equal probabilities
#
# Let $p$ be the softmax of the logits of a query, $C$ the index of the no-object class. The logits
#
# $$
# z'_c = \log\frac{p_c}{1-p_c}, \qquad c < C
# $$ {#eq-softmax-logits}
#
# have $\sigma(z'_c)=p_c$ (`sigmoid_logits` of @sec-contract). Costs and assignments that take them compute with
# the probabilities of the softmax.

# %%
def translate(logits):
    return sigmoid_logits(dict(pred_logits=logits, scores=logits.softmax(-1)[..., :-1]))


three = torch.tensor([[2.0, 0.0, 1.0], [-1.0, 0.5, 3.0]])
translated = translate(three)
assert torch.allclose(translated.sigmoid(), three.softmax(-1)[:, :2], atol=1e-6)
translated

# %% [markdown]
# A probability of 1 has an infinite logit; in floating point it becomes a large finite one, so that no cost
# is infinite:

# %%
certain = translate(torch.tensor([[200.0, 0.0, 0.0]]))
assert certain.isfinite().all() and certain[0, 0].sigmoid() == 1
certain

# %% [markdown]
# ## Class cost
#
# The cost of the original code is not the focal one of @eq-matching-focal but minus the probability,
#
# $$
# \mathcal{C}^{cls}_{ji} = -\,p_{j,c_i}
# $$ {#eq-softmax-cost}
#
# in `pair_cost` the kind `'probability'`. One query, its class certain to .7:

# %%
box = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
query_logits = torch.tensor([[0.7, 0.2, 0.1]]).log()
terms = pair_cost(
    translate(query_logits), box, torch.tensor([0]), box, w_cls=1.0, kind='probability', parts=True
)
assert abs(terms['cls'] + 0.7) < 1e-6
terms['cls']


# %% [markdown]
# ## Class loss
#
# Let $y_{jc}\in[0,1]$ be the target of query $j$ for class $c$, at most one of them positive: 1 or, with
# one-to-many assignment, the soft target of @eq-matching-soft. What is left is no object. With the weight
# $\omega$ (the setting `no_object`, .1) of that class
#
# $$
# \mathcal{L}_{cls} = \frac{\sum_j \left[-\sum_{c<C} y_{jc}\log p_{jc} - \omega\left(1-\sum_{c<C} y_{jc}\right)
# \log p_{jC}\right]}{\sum_j \left[\sum_{c<C} y_{jc} + \omega\left(1-\sum_{c<C} y_{jc}\right)\right]}
# $$ {#eq-softmax-loss}
#
# over all queries of the batch. For hard targets it is the weighted cross-entropy of the original code. It is a
# mean over queries and not a sum per object, so its size does not depend on the number of objects. For soft
# targets, as in the first stage of Semi-DETR, it is the cross-entropy to the mixed distribution: the paper has
# no such case, since its detectors have sigmoids.

# %%
#| export
def softmax_losses(
    logits: Tensor,  # (L,B,Q,C+1) raw class scores, the no-object class at the end
    y: Tensor,  # (L,B,Q,C) targets in [0,1], at most one positive per query
    no_object: float = 0.1,  # weight of the no-object class
) -> tuple:  # (sum (L,) over the queries, sum of their weights (L,))
    "Numerator and denominator of the class loss (@eq-softmax-loss) of each layer"
    log_p, rest = logits.log_softmax(-1), no_object * (1 - y.sum(-1))
    losses = -(y * log_p[..., :-1]).sum(-1) - rest * log_p[..., -1]
    return losses.flatten(1).sum(1), (y.sum(-1) + rest).flatten(1).sum(1)


# %%
torch.manual_seed(0)
some_logits, classes = torch.randn(1, 2, 5, 4), torch.tensor([[3, 0, 3, 3, 1], [3, 3, 2, 3, 3]])
some_targets = F.one_hot(classes, 4)[None, ..., :3].float()
total, weight = softmax_losses(some_logits, some_targets)
class_weights = torch.tensor([1.0, 1.0, 1.0, 0.1])
reference = F.cross_entropy(some_logits[0].flatten(0, 1), classes.flatten(), class_weights)
assert abs(total / weight - reference) < 1e-6
(total / weight).item()

# %% [markdown]
# With one query on an object and 99 without, the others have $99\cdot.1=9.9$ times its weight; without
# $\omega$ they would have 99 times. The weight of the no-object class decides how soon an untrained detector
# stops to predict "no object" everywhere:

# %%
#| label: fig-softmax-weight
#| fig-cap: "Share of the object in the gradient of the class loss of 100 untrained queries, one of them matched: with a weight of .1 it is ten times as large."
#| fig-alt: "A falling curve over the weight of the no-object class from .01 to 1, with a dot at .1"
weights_axis = torch.logspace(-2, 0, 50)
shares = 1 / (1 + 99 * weights_axis)
assert abs(shares[-1] - 0.01) < 1e-6
fig, ax = plt.subplots(figsize=(4, 2.2), dpi=80, layout='constrained')
ax.semilogx(weights_axis, 100 * shares)
ax.plot([0.1], [100 / 10.9], 'o')
ax.set(xlabel='weight of the no-object class', ylabel='share of the object in %')
plt.show()

# %% [markdown]
# ## Stages and pseudo labels
#
# `hungarian` and `one_to_many` translate the logits of a detector that gives `scores`, so both stages of the
# matching and the costs of the mining work on probabilities:

# %%
queries = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 0.0, 3.0]]])
places = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.21, 0.2]]])
predictions = dict(pred_logits=queries, pred_boxes=places, scores=queries.softmax(-1)[..., :-1])
truth = [dict(labels=torch.tensor([0]), boxes=torch.tensor([[0.5, 0.5, 0.2, 0.2]]))]
best_query = hungarian(predictions, truth)[0][0].tolist()
several = one_to_many(predictions, truth)[0][0].tolist()
assert best_query == [0] and several == [0, 1]
best_query, several

# %% [markdown]
# | part of Semi-DETR | with softmax |
# |---|---|
# | score of a pseudo label, thresholds | probability of the class, without "no object" |
# | one-to-many metric (score x IoU$^6$) | the same probability; soft targets as in @eq-softmax-loss |
# | mining costs | the matching cost of the detector |
# | denoising queries | none: DETR has none |
# | cross-view queries | as in @sec-detr: a position from the box, no reference |
#
# ## Summary
#
# - Logits with equal probabilities let matching and mining compute with a softmax unchanged.
# - The class cost of DETR is minus the probability of the class.
# - The class loss is a weighted mean over all queries; "no object" has a weight of .1.
# - Soft targets leave the rest of the probability to "no object".
#
# ## Exercises
#
# 1. Which weight of the no-object class gives both kinds of queries equal shares with 5 objects and 100 queries?
# 2. Why is the focal loss not divided by the number of queries?
# 3. Show that the loss of a soft target is smallest where the prediction equals the target.
