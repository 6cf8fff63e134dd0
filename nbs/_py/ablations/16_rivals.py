# %% [markdown]
# # Rivals under one roof {#sec-abl-rivals}
#
# > Compare Soft Teacher on Faster R-CNN and Dense Teacher on FCOS with Semi-DETR, on the same labels.

# %% tags=["parameters"]
#| hide
results = 'results'  # folder of results

# %%
#| hide
import matplotlib.pyplot as plt
from IPython.display import Markdown as markdown
from semidetr.lab.report import as_published, markdown_table, published, scale_line
from semidetr.lab.report import finding as boxed
from semidetr.lab.rivals import (
    RATES,
    RIVALS,
    existing,
    finding,
    measured,
    network_cost,
    plot_rivals,
    rate_table,
    rival_table,
    to_run,
)

# %%
#| echo: false
found = measured(results)
markdown(boxed(finding(found, to_run(results))))

# %%
#| label: fig-abl-rivals
#| fig-cap: "AP on the test split: a point is a seed, a bar the mean over the seeds."
#| fig-alt: "One panel per number of labelled images; in each, one group of columns per detector with supervised training, the mean teacher, and the method made for it"
#| echo: false
shown = plot_rivals(found)
plt.close(shown)
shown

# %%
#| label: tbl-abl-rivals
#| tbl-cap: "Detector, method and labels: mean and standard deviation over the seeds of AP, AP50, AP with per-class NMS (Faster R-CNN and FCOS always suppress), the paired difference to supervised training of the same detector with its 95 % interval (one seed: none), CPU time of one 96 px image on one thread, and parameters."
#| echo: false
cost = {rival.detector: network_cost(rival.detector) for rival in RIVALS}
markdown(rival_table(found, cost))

# %% [markdown]
# ## What is compared {.fold}
#
# The two rivals come from convolutional detectors: Soft Teacher asks the box head about regions
# (@sec-soft-teacher), Dense Teacher compares points without any pseudo box (@sec-dense-teacher). Here they share
# labels, views, loader, trainer and evaluation with our DINO. All numbers are of the digits scenes (@sec-digits), test
# split, averaged network. The iterations that each detector gets are printed below the table.

# %%
#| echo: false
lines = []
for rival, labels, runs in found:
    seeds = [r for r in runs if set(rival.arms) <= set(r['arms'])]
    if seeds:
        lines.append(f'**{rival.title}, {labels} labelled images.** {scale_line(seeds, rival.arms)}')
markdown('\n\n'.join(lines))

# %% [markdown]
# The detectors are small and train for hundreds of iterations, not for the hundreds of thousands of the papers. A
# detector that suppresses cannot be read without suppression, so AP with NMS is the column of DINO that compares
# with theirs. The CPU time is measured when this page is executed.
#
# ## Learning rates {.fold}

# %%
#| label: tbl-abl-rivals-rates
#| tbl-cap: "AP on the development part after supervised training with each learning rate."
#| echo: false
markdown(rate_table(existing(results, RATES)))

# %% [markdown]
# ## Published {.fold}

# %%
#| label: tbl-abl-rivals-paper
#| tbl-cap: "COCO-Partial as published (coloured: published, not measured here): AP on val2017 with 1, 5 and 10 % of the labels."
#| echo: false
named = ('Soft Teacher', 'Dense Teacher', 'DINO, supervised only', 'DINO, SSOD baseline', 'Semi-DETR (DINO)')
rows = [
    [row['method'], *(as_published(f'{ap:.2f}') for ap in row['ap'])]
    for row in published(results, 'coco_partial')
    if row['method'] in named
]
assert len(rows) == len(named)
markdown(markdown_table(['method', '1 %', '5 %', '10 %'], rows, align='lrrr'))

# %% [markdown]
# The published rows have other detectors, sizes and schedules, and the row of Dense Teacher is that with short
# sides of 400 to 1200 px.
#
# ## Summary
#
# - Three detectors, their methods, one set of labels: @tbl-abl-rivals.
# - Whether the policy or the detector makes a difference can be asked with the label policies of the rivals on
#   DINO (@sec-policies).
# - To reproduce: `semidetr ablate rival_rates soft_teacher dense_teacher components components_50`.
