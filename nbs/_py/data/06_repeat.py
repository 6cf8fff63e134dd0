# %% [markdown]
# # Rare classes are drawn more often {#sec-repeat}
#
# > Draw images of rare classes more often, by factors that need not be whole numbers.
#
# A class may be in three of 20 labelled images. Drawn uniformly, it is a target in 15 % of the
# labelled views, and its scores stay below every threshold for pseudo labels, so unlabelled images do not help
# it either. Repeat-factor sampling draws its images more often. Common implementations round factors up to
# whole numbers, and a factor of 1.003 then doubles an image as one of 1.8 does: all images are doubled and
# nothing has changed. Here factors are rounded at random, so that on average each image is drawn exactly as
# often as its factor says.

# %%
#| default_exp data.repeat

# %%
#| export
import numpy as np
from semidetr.core import stable_hash


# %% [markdown]
# ## The factors
#
# Let $f_c$ be the share of labelled images that have an object of class $c$. With a threshold $t$,
#
# $$ r_c=\max\left(1,\sqrt{t/f_c}\right),\qquad r_I=\max_{c\in I}\,r_c, $$ {#eq-repeat-factor}
#
# and image $I$ is drawn $r_I$ times per epoch on average; an image without objects once. Classes in more than a
# share $t$ of the images keep factor 1, so $t=0$ changes nothing and $t=1$ concerns every class that is not in
# every image.
#
# This changes how often labelled images are *drawn*. What is counted over the data set, such as the boxes per
# image that the filter `class_rate` compares with (@sec-variants), stays as it is: unlabelled images are not
# resampled, so the data set is the right comparison.

# %%
#| export
def labels_of(
    ds,  # data set with boxes
    positions,  # of its images
) -> list:  # per image a set of labels
    "The classes of each image; boxes to be ignored do not count"
    notes = (ds.annotation(i) for i in positions)
    return [set(a['labels'][~a['ignore']].tolist()) for a in notes]


def repeat_factors(
    classes: list,  # per image a set of labels
    threshold: float,  # t, a share of the images
) -> np.ndarray:  # (N,) r_I of at least 1
    "How often each image is drawn per epoch, on average (@eq-repeat-factor; LVIS, Gupta et al. 2019)"
    n, counts = len(classes), {}
    for present in classes:
        for c in present:
            counts[c] = counts.get(c, 0) + 1
    factor = {c: max(1.0, (threshold * n / k) ** 0.5) for c, k in counts.items()}
    return np.array([max((factor[c] for c in present), default=1.0) for present in classes])


# %% [markdown]
# A data set with the frequencies of `txl_pbc`: of 850 images 845 show white blood cells, all show red ones, and
# 268 show platelets.

# %%
cells = [{'WBC', 'RBC', 'Platelet'}] * 268 + [{'WBC', 'RBC'}] * 577 + [{'RBC'}] * 5
factors = repeat_factors(cells, 1.0)
of_class = {name: factors[i].round(6) for name, i in (('Platelet', 0), ('WBC', 300), ('RBC', 849))}
assert of_class == dict(Platelet=1.780910, WBC=1.002954, RBC=1.0)
of_class


# %% [markdown]
# ## Rounded at random
#
# Up to the beginning of epoch $e$ image $I$ is drawn
#
# $$ n_I(e)=\lfloor e\,r_I+u_I\rfloor,\qquad u_I\sim\mathcal{U}[0,1), $$ {#eq-repeat-round}
#
# times, so in epoch $e$ it is drawn $n_I(e+1)-n_I(e)$ times: $\lfloor r_I\rfloor$ or one more, the latter with
# probability $r_I-\lfloor r_I\rfloor$ over the random phase $u_I$. With a new random number in each epoch the
# average would be the same; with a phase, an image of factor 1.78 is in addition never missed for long, and the
# number of draws before an epoch follows from $e$ alone. So draw number $k$ is a function of the seed and $k$,
# and needs no history (@sec-loader).

# %%
#| export
class Repeats:
    "How often each image is in each epoch (@eq-repeat-round); epochs differ in length"

    def __init__(
        self,
        factors,  # (N,) r_I of at least 1
        seed: int,  # of the run
    ):
        self.factors = np.asarray(factors, dtype=np.float64)
        h = stable_hash(seed, 'repeat')
        random = np.random.RandomState([h & 0xFFFFFFFF, h >> 32])  # its sequence is frozen
        self.phase = (
            random.randint(2**20, size=len(self.factors)) / 2**20
        )  # sums with whole numbers are exact
        self._last = 0, 0, self.positions(0)

    def before(
        self,
        epoch: int,  # e
    ) -> np.ndarray:  # (N,) int64 draws of each image
        "n_I(e), the draws before an epoch"
        return np.floor(epoch * self.factors + self.phase).astype(np.int64)

    def positions(
        self, epoch: int
    ) -> np.ndarray:  # (M,) positions in [0, N), in order; M differs between epochs
        "The images of an epoch, repeated as often as they are drawn"
        return np.repeat(np.arange(len(self.factors)), self.before(epoch + 1) - self.before(epoch))

    def epoch_of(
        self,
        k: int,  # draw number, 0, 1, 2, ...
    ) -> tuple:  # (epoch, its first draw number, `positions` of the epoch)
        "The epoch that draw number `k` falls into"
        epoch, start, positions = self._last
        if not start <= k < start + len(positions):
            epoch = int(k / self.factors.sum())
            while self.before(epoch).sum() > k:
                epoch -= 1
            while self.before(epoch + 1).sum() <= k:
                epoch += 1
            self._last = epoch, int(self.before(epoch).sum()), self.positions(epoch)
        return self._last


# %% [markdown]
# Over many epochs platelets are in 45 % of the drawn images instead of 31.5 %. Rounded up, all factors above 1
# become 2, and the share stays where it was:

# %%
repeats = Repeats(factors, seed=0)
drawn = repeats.before(1000)
rounded_up = np.ceil(factors)
share = dict(uniform=268 / 850, random=drawn[:268].sum() / drawn.sum(), rounded_up=2 * 268 / rounded_up.sum())
expected = dict(uniform=0.3153, random=0.4498, rounded_up=0.3162)
assert all(abs(share[k] - v) < 1e-4 for k, v in expected.items())
{k: round(float(v), 4) for k, v in share.items()}

# %%
few = Repeats([1.0, 1.25, 2.5], seed=3)
lists = [few.positions(e).tolist() for e in range(4)]
assert [row.count(0) for row in lists] == [1, 1, 1, 1]
assert sum(row.count(1) for row in lists) == 5 and sum(row.count(2) for row in lists) == 10
assert few.epoch_of(len(lists[0]))[:2] == (1, len(lists[0]))
lists

# %%
#| hide
import matplotlib.pyplot as plt

# %%
#| label: fig-repeat-threshold
#| fig-cap: "The share of drawn images with platelets grows with the threshold once it is above the frequency of the class; rounded up, every factor above 1 is 2, and at t=1 nothing is left of the effect."
#| fig-alt: "Share of drawn images with platelets over the threshold: one curve rises smoothly from 32 to 45 percent, one jumps to 48 percent and falls back to 32 percent near one."
thresholds = np.linspace(0, 1, 101)
curves = dict(random=[], ceil=[])
for t in thresholds:
    r = repeat_factors(cells, t)
    curves['random'].append(100 * r[:268].sum() / r.sum())
    curves['ceil'].append(100 * np.ceil(r)[:268].sum() / np.ceil(r).sum())
fig, ax = plt.subplots(figsize=(5, 2.4), dpi=80)
ax.plot(thresholds, curves['random'], color='#1f77b4', label='rounded at random')
ax.plot(thresholds, curves['ceil'], '--', color='grey', label='rounded up')
ax.set(xlabel='threshold t', ylabel='% of draws with platelets')
ax.legend()
plt.show()

# %% [markdown]
# ## Summary
#
# * `loader.repeat_threshold=t` draws an image $r_I$ times per epoch, by the rarest of its classes; 0 is off.
# * Factors are rounded at random, with one phase per image: the average is exact, and any draw can be computed
#   without those before it.
# * Without rare classes all factors are 1, and the draws are those of the plain loader.
# * Only draws of labelled images change; frequencies that are counted over the data set do not.
#
# ## Exercises
#
# 1. A class is in 1 of 25 images, $t=0.16$. How often are its images drawn? And how often are the other classes
#    of these images drawn?
# 2. Why is the factor a square root, and what would $r_c=t/f_c$ do to a class with a single image?
# 3. Show that $n_I(e+1)-n_I(e)$ is $\lfloor r_I\rfloor$ or $\lfloor r_I\rfloor+1$.
