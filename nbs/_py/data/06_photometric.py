# %% [markdown]
# # Strong views of the same geometry {#sec-photometric}
#
# > Change the pixels of a finished view and leave every object where it is.
#
# *Why.* The strong view of Semi-DETR turns, shears and shifts the image; boxes are carried over by a matrix
# (@sec-augment). A method that compares two networks point by point needs both views to agree in every pixel's place:
# same size, same mirroring, same padding. So the strong view is made *of the weak one*, by operations on colours and
# by patches of noise. Its matrix is that of the weak view, exactly.
#
# ## Operations and their probabilities
#
# In this order, those of Dense Teacher and, before it, of Unbiased Teacher: colour jitter (brightness, contrast and
# saturation by a factor in $[.6,1.4]$, hue shifted by up to $.1$ of the circle, in random order) with probability
# $.8$; grey with $.2$; a Gaussian blur with $\sigma\in[.1,2]$ with $.5$; up to three patches of noise with
# $.7$, $.5$ and $.3$, whose share of the area is drawn from $[.05,.2]$ or $[.02,.2]$. If $x$ is the weak view and
# $M$ its matrix,
#
# $$
# x' = f(x), \qquad M' = M .
# $$ {#eq-photometric-matrix}

# %%
#| default_exp data.photometric

# %%
#| export
import math
import random
from dataclasses import replace
import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from semidetr.core import stable_hash
from semidetr.data.augment import View

# %%
import matplotlib.pyplot as plt
from semidetr.data.augment import ViewConfig, weak_view
from semidetr.data.digits import DigitsScenes
from semidetr.draw import draw_boxes, show_image

# %%
#| export
_PATCHES = ((0.7, (0.05, 0.2), (0.3, 3.3)), (0.5, (0.02, 0.2), (0.1, 6.0)), (0.3, (0.02, 0.2), (0.05, 8.0)))


def draw_photometric(
    seed: int,  # the same seed gives the same operations
) -> tuple:  # of (name, value)
    "Draw the operations of a photometric view, without the image"
    r = random.Random(stable_hash('photometric', int(seed))).random
    ops = []
    if r() < 0.8:
        jitter = [(name, 0.6 + 0.8 * r()) for name in ('brightness', 'contrast', 'saturation')]
        jitter.append(('hue', 0.2 * r() - 0.1))
        order = sorted((r(), i) for i in range(4))
        ops += [jitter[i] for _, i in order]
    if r() < 0.2:
        ops.append(('grey', None))
    if r() < 0.5:
        ops.append(('blur', 0.1 + 1.9 * r()))
    for chance, (small, large), (flat, tall) in _PATCHES:
        if r() < chance:
            area, ratio = (
                small + (large - small) * r(),
                math.exp(math.log(flat) + math.log(tall / flat) * r()),
            )
            ops.append(('noise', (area, ratio, r(), r(), int(r() * 2**32))))
    return tuple(ops)


# %%
#| export
def _noise(image, value):
    "Overwrite a patch (share of the area, height / width, relative position) with noise"
    area, ratio, v, u, seed = value
    h, w = image.shape[-2:]
    ph = min(h, max(1, round(math.sqrt(area * h * w * ratio))))
    pw = min(w, max(1, round(math.sqrt(area * h * w / ratio))))
    top, left = int(v * (h - ph + 1)), int(u * (w - pw + 1))
    pixels = 255 * np.random.RandomState(seed).standard_normal((3, ph, pw))
    image[:, top : top + ph, left : left + pw] = torch.from_numpy(pixels.clip(0, 255).astype(np.uint8))
    return image


def photometric(
    image: Tensor,  # (3,H,W) uint8
    name: str,  # of `draw_photometric`
    value,  # its drawn value
) -> Tensor:  # (3,H,W) uint8, a new tensor
    "Apply one operation to the pixels"
    if name == 'noise':
        return _noise(image.clone(), value)
    if name == 'grey':
        return F.rgb_to_grayscale(image, num_output_channels=3)
    if name == 'blur':
        side = min(2 * math.ceil(2 * value) + 1, *(2 * ((s - 1) // 2) + 1 for s in image.shape[-2:]))
        return F.gaussian_blur(image, [side, side], [value, value])
    return getattr(F, f'adjust_{name}')(image, value)


def photometric_view(
    view: View,  # finished, with raw pixels (uint8)
    seed: int,  # as for `draw_photometric`
) -> View:
    "A strong view of the same geometry (@eq-photometric-matrix)"
    ops, image = draw_photometric(seed), view.image
    for name, value in ops:
        image = photometric(image, name, value)
    return replace(view, image=image, ops=(*view.ops, *ops))


# %%
scene = DigitsScenes('train', n=4, size=96)[2]
cfg = ViewConfig(short_sides=(96,), eval_short=96, max_side=160)
weak = weak_view(scene, cfg, 1, raw=True)
strong = [photometric_view(weak, seed) for seed in range(200)]
assert all(torch.equal(s.matrix, weak.matrix) and s.size == weak.size for s in strong)
assert all(s.image.shape == weak.image.shape and s.image.dtype == torch.uint8 for s in strong)
again = photometric_view(weak, 7)
assert torch.equal(again.image, strong[7].image)
shares = {n: sum(n in dict(draw_photometric(i)) for i in range(1000)) / 1000 for n in ('hue', 'grey', 'blur')}
assert all(abs(shares[n] - p) < 0.05 for n, p in dict(hue=0.8, grey=0.2, blur=0.5).items())
shares

# %%
#| label: fig-photometric-views
#| fig-cap: "A weak view and three strong views of the same geometry: the boxes of the weak view fit them all."
#| fig-alt: "Four pictures of the same digits in the same places with other colours, blur and patches of noise; green boxes at the same places."
fig, axes = plt.subplots(1, 4, figsize=(7, 2), dpi=80, layout='constrained')
for ax, v in zip(axes, [weak, *strong[3:6]]):
    show_image(ax, v.image)
    draw_boxes(ax, v.boxes, kind='truth', lw=1)
plt.show()

# %% [markdown]
# `view.strong=photometric` makes the strong views of a run this way (@sec-loader): of unlabelled images, and of
# labelled ones where they are seen twice (`loader.two_views`).
#
# ## Summary
#
# - A photometric view shares size, matrix and boxes with the view that it was made of.
# - Operations are drawn from a seed, as those of all views.
#
# ## Exercises
#
# 1. Which of the operations could hide an object completely?
# 2. Why is the noise seeded by a number among the operations and not drawn when it is applied?
