# %% [markdown]
# # Qualitative results {#sec-abl-qualitative}
#
# > Look at detections side by side, pseudo labels during training, the sampling points of queries, and the
# > features of queries.

# %% tags=["parameters"]
#| hide
results = 'results'  # folder of results

# %%
#| hide
import json
from pathlib import Path
import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown as markdown
from torchvision.ops import box_iou
from semidetr.draw import compare, draw_boxes, draw_points, show_image
from semidetr.data.catalog import open_dataset
from semidetr.lab.demo import shown_scenes, stored
from semidetr.lab.report import finding, markdown_table

# %%
#| hide
saved = json.loads((Path(results) / 'qualitative.json').read_text())
names = dict(supervised='supervised', mean_teacher='mean teacher', shm_cqc_cpm='Semi-DETR')
scenes = shown_scenes(3)
samples = [scenes[i] for i in range(len(scenes))]


# %%
#| hide
def counts(arm, min_iou=0.5):
    "Number of correct, duplicate and wrong detections in the figure, and of missed objects"
    correct = duplicate = wrong = missed = 0
    for s, d in zip(samples, stored(saved['detections'][arm], scenes)):
        free = torch.ones(len(s.boxes), dtype=torch.bool)  # objects that are not found yet
        for box, label in zip(d['boxes'], d['labels']):
            fits = (box_iou(box[None], s.boxes)[0] >= min_iou) & (s.labels == label)
            new = fits & free
            if new.any():
                correct += 1
                free[new.nonzero()[0]] = False
            elif fits.any():
                duplicate += 1
            else:
                wrong += 1
        missed += int(free.sum())
    return correct, duplicate, wrong, missed


# %%
#| echo: false
told = []
for arm, name in names.items():
    correct, duplicate, wrong, missed = counts(arm)
    told.append(
        f'{name} finds {correct} of {correct + missed} objects (duplicates: {duplicate}, wrong '
        f'boxes: {wrong})'
    )
text = finding('On three test scenes, without NMS and above a score of 0.3: ' + '; '.join(told))
markdown(text)

# %%
#| label: fig-abl-qualitative-scenes
#| fig-cap: "The first three test scenes: ground truth (thin green boxes), and detections with a score of at least 0.3, without NMS."
#| fig-alt: "Grid of three scenes with true boxes and the detections of supervised training, mean teacher and Semi-DETR"
#| echo: false
compare(
    [s.image for s in samples],
    {names[a]: stored(d, scenes) for a, d in saved['detections'].items()},
    [dict(boxes=s.boxes, labels=s.labels) for s in samples],
    scenes.classes,
)

# %%
#| label: tbl-abl-qualitative-scenes
#| tbl-cap: "Detections in the figure above: correct if a true box of the same class has an IoU of at least 0.5, duplicate if that box was already found."
#| echo: false
columns = ['method', 'correct', 'duplicate', 'wrong', 'objects missed']
markdown(markdown_table(columns, [[name, *counts(a)] for a, name in names.items()]))

# %% [markdown]
# ## How it was measured {.fold}
#
# All pictures are of one seed with twenty labels (@sec-abl-components). No network was trained with boxes of
# these scenes: they are the first scenes of the test split and the first unlabelled ones, not a selection.

# %% [markdown]
# ## Pseudo labels during training {.fold}
#
# The teacher's boxes above the threshold on three unlabelled scenes, while the full method trains. The
# student learns from these boxes in strong views; the ground truth is not used.

# %%
#| label: fig-abl-qualitative-training
#| fig-cap: "Rows: scenes. Columns: iterations. Orange: boxes that match a true box of the same class with an IoU of at least 0.5. Blue: all others. Thin green: ground truth, which the method does not use."
#| fig-alt: "Three scenes at five iterations of the training with the teacher's boxes"
#| echo: false
truth, notes = saved['training']['truth'], saved['training']['notes']
unlabelled = open_dataset(saved['training']['data'])
kind = type(unlabelled.ids[0])
size = (1.7 * len(notes), 1.75 * len(truth))
fig, axes = plt.subplots(len(truth), len(notes), figsize=size, dpi=80, layout='constrained')
share = []
for column, note in zip(axes.T, notes):
    correct = 0
    for ax, (i, objects) in zip(column, truth.items()):
        show_image(ax, unlabelled[unlabelled.index_of(kind(i))].image)
        true_boxes, true_labels = torch.tensor(objects['boxes']), torch.tensor(objects['labels'])
        draw_boxes(ax, true_boxes, lw=0.6)
        boxes = torch.tensor(note['found'][i]['boxes']).reshape(-1, 4)
        labels = torch.tensor(note['found'][i]['labels'])
        matches = (box_iou(boxes, true_boxes) >= 0.5) & (labels[:, None] == true_labels)
        ok = matches.any(1)
        draw_boxes(ax, boxes[ok], labels[ok], kind='teacher', classes=unlabelled.classes)
        draw_boxes(ax, boxes[~ok], labels[~ok], kind='student', classes=unlabelled.classes)
        correct += int(ok.sum())
    column[0].set_title(f"iteration {note['step']}", fontsize=9)
    number = sum(len(d['labels']) for d in note['found'].values())
    share.append(f"{correct} of {number} correct at iteration {note['step']}")
plt.show()

# %%
#| echo: false
markdown(
    f"In these scenes: {'; '.join(share)}. Precision and recall of this filter over all scenes: "
    '@tbl-abl-filters-quality.'
)

# %% [markdown]
# ## Sampling points of queries {.fold}
#
# A query samples the feature maps at a few points around its box and weights them (@sec-attention). In the
# last decoder layer:

# %%
#| label: fig-abl-qualitative-attention
#| fig-cap: "Sampling points of all heads and levels for the queries that fit the first two objects of a scene best; marker area: attention weight; frame: box of the query. Top: supervised training; bottom: Semi-DETR."
#| fig-alt: "Sampling points of queries on three scenes for two detectors"
#| echo: false
fig, axes = plt.subplots(2, 3, figsize=(6.6, 4.5), dpi=64, layout='constrained')
for row, (arm, found) in zip(axes, saved['attention'].items()):
    for ax, s, queries in zip(row, samples, found.values()):
        show_image(ax, s.image, title=names[arm])
        scale = torch.tensor(s.image.size)
        for q, kind in zip(queries, ('teacher', 'student')):
            draw_boxes(ax, torch.tensor([q['box']]) * scale.repeat(2), kind=kind)
            draw_points(ax, torch.tensor(q['xy']) * scale, q['weights'], kind, size=25)
plt.show()

# %% [markdown]
# ## Features of queries {.fold}
#
# The feature of a query is a vector of 128 numbers, from which two small heads predict class and box. If the
# features of a class lie close together, classification is easy. The figure shows a t-SNE of these features;
# t-SNE preserves neighbourhoods only, so distances between clusters have no meaning.

# %%
#| label: fig-abl-qualitative-features
#| fig-cap: "Features of the queries that fit an object with an IoU of at least 0.5, on test scenes; colour: true class."
#| fig-alt: "Three clouds of points in ten colours, one for each method"
#| echo: false
fig, axes = plt.subplots(1, 3, figsize=(8.4, 3), dpi=64, layout='constrained')
for ax, (arm, f) in zip(axes, saved['features'].items()):
    drawn = ax.scatter(*zip(*f['plane']), c=f['labels'], cmap='tab10', s=7)
    ax.set(xticks=[], yticks=[])
    ax.set_title(f"{names[arm]}: {len(f['labels'])} of {f['objects']} objects", fontsize=9)
bar = fig.colorbar(drawn, ax=axes, ticks=range(10), shrink=0.8)
bar.set_label('digit')
plt.show()

# %%
#| echo: false
lines = [
    f"* {names[a]}: {100 * len(f['labels']) / f['objects']:.0f} % of the objects have a query that fits; "
    'a five-nearest-neighbour classifier on the features of half of the scenes predicts the class correctly '
    f"for {100 * f['told']:.0f} % of the {f['asked']} features of the other half."
    for a, f in saved['features'].items()
]
hashes = ', '.join(r['hash'] for r in saved['arms'].values())
commits = ', '.join(sorted({r['commit'] for r in saved['arms'].values()}))
lines.append(
    f"\n*{saved['images']} test scenes, seed 0, {saved['labelled']} labelled scenes; "
    f'configurations {hashes}, commit {commits}.*'
)
markdown('\n'.join(lines))

# %% [markdown]
# ## Summary
#
# - Pictures of a few scenes illustrate; the evidence is in the tables.
# - To reproduce: `semidetr ablate components --seeds 1`, then `python benchmarks/qualitative.py` with its
#   folder.
