# %% [markdown]
# # What they see {#sec-abl-qualitative}
#
# > Detections side by side, the teacher's labels through a training, where queries look, and what their
# > features know.
#
# Numbers say how much, pictures say what. All pictures are of one seed with twenty labels
# (@sec-abl-components), of scenes that no network was trained on with boxes: the first of the test split and
# the first without labels, not chosen ones.

# %% tags=["parameters"]
results = 'results'  # folder of results

# %%
#| hide
import json
from pathlib import Path
import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown as markdown
from torchvision.ops import box_iou
from semidetr.data.catalog import open_dataset
from semidetr.lab.demo import shown_scenes, stored
from semidetr.draw import COLORS, compare, draw_boxes, draw_points, show_image
from semidetr.lab.report import markdown_table

# %%
#| hide
seen = json.loads((Path(results) / 'qualitative.json').read_text())
names = dict(supervised='supervised', mean_teacher='mean teacher', shm_cqc_cpm='Semi-DETR')
scenes = shown_scenes(3)
samples = [scenes[i] for i in range(len(scenes))]

# %% [markdown]
# ## The same scenes, three detectors

# %%
#| label: fig-abl-qualitative-scenes
#| fig-cap: "The first three test scenes: truth, and detections with a score of at least .3 and without suppression. Thin green boxes are the truth."
#| fig-alt: "Grid of three scenes with true boxes and the detections of supervised training, mean teacher and Semi-DETR"
#| echo: false
compare(
    [s.image for s in samples],
    {names[a]: stored(d, scenes) for a, d in seen['detections'].items()},
    [dict(boxes=s.boxes, labels=s.labels) for s in samples],
    scenes.classes,
)


# %%
#| hide
def counted(arm, least=0.5):
    "Of the detections shown: right ones, repeated ones, wrong ones; and objects that nothing found"
    right = repeated = wrong = missed = 0
    for s, d in zip(samples, stored(seen['detections'][arm], scenes)):
        free = torch.ones(len(s.boxes), dtype=torch.bool)
        for box, label in zip(d['boxes'], d['labels']):
            fits = (box_iou(box[None], s.boxes)[0] >= least) & (s.labels == label)
            new = fits & free
            right, repeated, wrong = (
                right + int(new.any()),
                repeated + int(fits.any() and not new.any()),
                wrong + int(not fits.any()),
            )
            if new.any():
                free[new.nonzero()[0]] = False
        missed += int(free.sum())
    return right, repeated, wrong, missed


# %%
#| label: tbl-abl-qualitative-scenes
#| tbl-cap: "What is in the picture: a detection is right if it has the class of a true box and overlaps it by half, repeated if that box was found already."
#| echo: false
markdown(
    markdown_table(
        ['method', 'right', 'repeated', 'wrong', 'objects missed'],
        [[name, *counted(a)] for a, name in names.items()],
    )
)

# %% [markdown]
# ## The teacher's labels through a training
#
# The boxes above the threshold, on three scenes without labels, while the full method trains. The student
# learns from strong views of them; of the truth it knows nothing.

# %%
#| label: fig-abl-qualitative-training
#| fig-cap: "Rows: scenes. Columns: iterations. Orange: a box with the class of a true box that it overlaps by half. Blue: any other. Thin green: the truth, which the method does not see."
#| fig-alt: "Three scenes at five times of the training with the teacher's boxes"
#| echo: false
training = seen['training']
unlabelled = open_dataset(training['data'])
fig, axes = plt.subplots(
    len(training['truth']),
    len(training['notes']),
    figsize=(1.7 * len(training['notes']), 1.75 * len(training['truth'])),
    dpi=80,
    layout='constrained',
)
share = []
for j, note in enumerate(training['notes']):
    good = 0
    for ax, (i, truth) in zip(axes[:, j], training['truth'].items()):
        show_image(
            ax,
            unlabelled[unlabelled.index_of(type(unlabelled.ids[0])(i))].image,
            title=None if i != next(iter(training['truth'])) else f"iteration {note['step']}",
        )
        draw_boxes(ax, torch.tensor(truth['boxes']), lw=0.6)
        boxes, labels = (
            torch.tensor(note['found'][i]['boxes']).reshape(-1, 4),
            torch.tensor(note['found'][i]['labels']),
        )
        ok = (
            (box_iou(boxes, torch.tensor(truth['boxes'])) >= 0.5)
            & (labels[:, None] == torch.tensor(truth['labels']))
        ).any(1)
        draw_boxes(ax, boxes[ok], labels[ok], kind='teacher', classes=unlabelled.classes)
        draw_boxes(ax, boxes[~ok], labels[~ok], kind='student', classes=unlabelled.classes)
        good += int(ok.sum())
    share.append(
        f"{good} of {sum(len(d['labels']) for d in note['found'].values())} right at iteration {note['step']}"
    )
plt.show()

# %%
#| echo: false
markdown(
    f"In these scenes: {'; '.join(share)}. Precision and recall of this rule over all scenes: @tbl-abl-filters-quality."
)

# %% [markdown]
# ## Where a query looks
#
# A query reads the maps at a few points around its box, and weighs them (@sec-attention). In the last decoder
# layer:

# %%
#| label: fig-abl-qualitative-attention
#| fig-cap: "Sampling points of all heads and levels of the queries that fit the first two objects of a scene best; area: attention weight; frame: the query's own box. Above: supervised training; below: Semi-DETR."
#| fig-alt: "Sampling points of queries on three scenes for two detectors"
#| echo: false
fig, axes = plt.subplots(2, 3, figsize=(6.6, 4.5), dpi=64, layout='constrained')
for row, (arm, found) in zip(axes, seen['attention'].items()):
    for ax, s, queries in zip(row, samples, found.values()):
        show_image(ax, s.image, title=names[arm])
        scale = torch.tensor(s.image.size)
        for q, kind in zip(queries, ('teacher', 'student')):
            draw_boxes(ax, torch.tensor([q['box']]) * scale.repeat(2), kind=kind)
            draw_points(ax, torch.tensor(q['xy']) * scale, q['weights'], kind, size=25)
plt.show()

# %% [markdown]
# ## What the features of a query know
#
# The query that fits an object is a vector of 128 numbers, from which two small heads read class and box. If
# digits of one class lie together, the class head has an easy task. The picture lays them out with t-SNE,
# which keeps neighbours together and nothing else: distances between clusters mean nothing.

# %%
#| label: fig-abl-qualitative-features
#| fig-cap: "Features of the query that fits an object with an IoU of at least .5, on test scenes; colour: true class."
#| fig-alt: "Three clouds of points in ten colours, one for each method"
#| echo: false
fig, axes = plt.subplots(1, 3, figsize=(8.4, 3), dpi=64, layout='constrained')
for ax, (arm, f) in zip(axes, seen['features'].items()):
    drawn = ax.scatter(*zip(*f['plane']), c=f['labels'], cmap='tab10', s=7)
    ax.set(xticks=[], yticks=[])
    ax.set_title(f"{names[arm]}: {len(f['labels'])} of {f['objects']} objects", fontsize=8)
bar = fig.colorbar(drawn, ax=axes, ticks=range(10), shrink=0.8)
bar.set_label('digit')
plt.show()

# %%
#| echo: false
markdown(
    '\n'.join(
        f"* {names[a]}: a query fits {100 * len(f['labels']) / f['objects']:.0f} % of the objects; the five nearest features from the other half of the scenes tell the class of {100 * f['told']:.0f} % of them ({f['asked']} asked)."
        for a, f in seen['features'].items()
    )
    + f"\n\n*{seen['images']} test scenes, seed 0, {seen['labelled']} labelled scenes; configurations {', '.join(r['hash'] for r in seen['arms'].values())}, commit {', '.join(sorted({r['commit'] for r in seen['arms'].values()}))}.*"
)

# %% [markdown]
# ## Summary
#
# - Pictures of a handful of scenes illustrate, they prove nothing; the tables have the proof.
# - To repeat: `semidetr ablate components --seeds 1`, then `python benchmarks/qualitative.py` with its
#   folder.
