# %% [markdown]
# # Semi-DETR in one sitting {#sec-sitting}
#
# > From image files to one semi-supervised update, and on to a small training, with every tensor in view.
#
# Labelling boxes is slow, photographs are cheap. Semi-DETR trains a detection transformer from a few labelled
# and many unlabelled images: a *teacher*, the average of past weights, labels the unlabelled images; the
# *student* learns from those pseudo labels on strongly augmented views. Most pseudo labels of an early
# teacher are imprecise, and a detection transformer is sensitive to that, because it assigns exactly one query
# to each object. The method has three answers: one-to-many assignment first and one-to-one later, queries that
# must agree between two views, and a mixture model that separates reliable pseudo boxes from the rest.
#
# This chapter walks through one step of it, calling the package as a script would. Each section links to the
# chapter that derives and tests what is used. The images are the built-in scenes of handwritten digits
# (@sec-digits), written to disk as any data set would be.

# %%
import json
import tempfile
from pathlib import Path
import matplotlib.pyplot as plt
import torch
from semidetr import Trainer, open_dataset, preset, strong_view, weak_view
from semidetr.boxes import denormalize_boxes
from semidetr.data.loader import collate
from semidetr.draw import COLORS, draw_boxes, draw_mixture, image_grid, show_image
from semidetr.matching.matching import hungarian, one_to_many
from semidetr.semi.methods import encode_decode, mine_pseudo_labels
from semidetr.semi.teacher import update_teacher
from semidetr.train.config import override
from semidetr.train.evaluation import detect, same_rng
from semidetr.train.trainer import total_loss

# %% [markdown]
# ## Images and boxes on disk
#
# A folder of images and a COCO JSON file. Of 300 scenes, 20 keep their labels, 20 form the development part,
# and 260 lose their boxes: training never gets them (@sec-datasets, @sec-splits).

# %%
home = Path(tempfile.mkdtemp()) / 'digits'
(home / 'images').mkdir(parents=True)
scenes = open_dataset('digits:n=300')
truth = scenes.coco_dict()
for i, image in enumerate(truth['images']):
    image['file_name'] = f'{image["id"]}.png'
    scenes[i].image.save(home / 'images' / image['file_name'])
(home / 'instances_train.json').write_text(json.dumps(truth))
ds = open_dataset(home)
ds, ds[0].labels, ds[0].boxes

# %%
#| label: fig-sitting-data
#| fig-cap: "Four of the scenes with their true boxes: one to six digits each, on photographs."
#| fig-alt: "Four photographs with coloured digits in green boxes."
image_grid([ds[i].image for i in range(4)], [ds[i].boxes for i in range(4)])

# %% [markdown]
# ## A detector that has learnt a little
#
# A preset holds every setting (@sec-config). The first 200 iterations are supervised: the labels of 20 scenes,
# one-to-many assignment until iteration 130, denoising queries made of true boxes. `Trainer` writes a folder with checkpoint, log
# and metrics (@sec-trainer); here it takes about a minute on one core.

# %%
#| slow
common = [f'data.data={home}', 'data.count=20', 'data.dev=20', 'loader.num_workers=0', 'run.test=false']
burn_in = override(
    preset('digits'),
    [*common, 'optim.iters=200', 'optim.lr=2e-3', 'method.T1=130', 'loader.n_labelled=8', 'run.log_every=5'],
)
start = Trainer(burn_in, home / 'runs' / 'burn_in', progress=False).fit()
assert start['data'] | dict(labelled=20, unlabelled=260, dev=20) == start['data']
round(start['metrics']['dev']['teacher']['AP50'], 1)

# %% [markdown]
# ## Two views of one unlabelled image
#
# The teacher gets a *weak* view (resized, perhaps flipped), the student a *strong* one (colour, shear,
# rotation, erased patches). Each view carries the $3\times3$ matrix $M$ that maps pixels of the file to its
# own, so a box moves from weak to strong by $M_s M_w^{-1}$ (@sec-augment).

# %%
#| slow
settings = override(
    burn_in,
    [
        'method.name=semi_detr',
        'method.burn_in_iters=0',
        'method.T1=60',
        'method.unsup_weight=2',
        'optim.iters=120',
        'optim.lr=1e-3',
        'pseudo.threshold=0.3',
        'loader.n_labelled=2',
        'loader.n_unlabelled=6',
        f'run.init={home / "runs" / "burn_in"}',
    ],
)
run = Trainer(settings, home / 'runs' / 'semi_detr', progress=False)
unlabelled = [run.data.unlabelled[i] for i in range(6)]
weak = collate([weak_view(s, settings.view, seed=i) for i, s in enumerate(unlabelled)])
strong = collate([strong_view(s, settings.view, seed=i) for i, s in enumerate(unlabelled)])
weak['images'].shape, strong['images'].shape, strong['targets'][0]['matrix']

# %% [markdown]
# ## Teacher and student
#
# Both are the same network: backbone, encoder, 100 selected queries, decoder (@sec-detector). `encode_decode`
# runs both halves once and keeps what further queries need.

# %%
#| slow
student, teacher = run.student.train(), run.teacher
with torch.no_grad():
    teacher_view, student_view = encode_decode(teacher, weak), encode_decode(student, strong)
{k: tuple(v.shape) for k, v in teacher_view.outputs.items() if torch.is_tensor(v)}

# %% [markdown]
# ## Pseudo labels, and which of them to trust
#
# The teacher's detections with a score of at least mean + standard deviation of their image are candidates,
# $B^0$. Each is matched to the student's predictions in the strong view, and the cost of that match measures
# how far the two networks agree on the box (@sec-mining). Two Gaussians are fitted to the costs of the batch.
# Boxes that cost at most as much as the mode of the component of low costs are mined for the consistency loss.
# Boxes with a score of at least the threshold are targets of all losses.

# %%
#| slow
mined = mine_pseudo_labels(
    teacher_view.outputs, student_view.outputs, weak['targets'], strong['targets'], settings
)
costs = torch.cat(mined['costs'])
counts = dict(
    candidates=len(costs),
    targets=int(torch.cat(mined['sup']).sum()),
    mined=int(torch.cat(mined['con']).sum()),
)
assert counts['candidates'] >= counts['mined'] >= counts['targets']
counts

# %%
#| slow
#| label: fig-sitting-mined
#| fig-cap: "Left: the teacher's boxes in a weak view (orange: targets, dashed: mined for consistency alone). Middle: the targets, carried to the strong view. Right: matching costs of the candidates and the threshold between the two components."
#| fig-alt: "A scene with boxes in its weak view, the same scene distorted with its boxes, and a histogram of costs with two curves."
best = max(range(6), key=lambda i: int(mined['con'][i].sum()))
fig, axes = plt.subplots(1, 3, figsize=(7.5, 2.5), dpi=80)
view = settings.view
show_image(axes[0], weak['images'][best], view.mean, view.std, 'weak: teacher')
sup, con, moved = mined['sup'][best], mined['con'][best], mined['strong'][best]
draw_boxes(axes[0], mined['weak'][best]['boxes'][con & ~sup], kind='mined')
draw_boxes(axes[0], mined['weak'][best]['boxes'][sup], kind='teacher')
show_image(axes[1], strong['images'][best], view.mean, view.std, 'strong: student')
carried = denormalize_boxes(moved['boxes'][sup], strong['targets'][best]['size'])
draw_boxes(axes[1], carried, kind='student')
m = mined['mixture']
fit = m.means.numpy(), m.variances.sqrt().numpy(), m.weights.numpy()
draw_mixture(axes[2], costs, *fit, threshold=float(mined['tau']))
axes[2].set_xlabel('matching cost')
fig.tight_layout()
plt.show()

# %% [markdown]
# ## One-to-many, then one-to-one
#
# While pseudo boxes are imprecise, an object is assigned to several queries: the 6 with the largest
# $\text{score}\cdot\text{IoU}^6$ here, 13 in the paper. A wrong box then costs less. Later each object gets exactly
# one query, so that the final detector needs no suppression of duplicates (@sec-matching).

# %%
#| slow
targets = [
    dict(labels=t['labels'][m], boxes=t['boxes'][m])
    for t, m in zip(mined['strong'], mined['sup'], strict=True)
]
objects = sum(len(t['labels']) for t in targets)
many = sum(len(q) for q, *_ in one_to_many(student_view.outputs, targets, k=settings.criterion.k))
one = sum(len(q) for q, *_ in hungarian(student_view.outputs, targets))
assert one == objects <= many
dict(objects=objects, one_to_many=many, one_to_one=one)

# %% [markdown]
# ## One update
#
# A batch with labelled images and both views of unlabelled ones goes through the method's step (@sec-methods):
# supervised losses, the same losses on pseudo labels, and the consistency of cross-view queries
# (@sec-consistency), whose content comes from image features inside the mined boxes. Their sum is minimised;
# then the teacher follows the student by an exponential moving average (@sec-teacher).

# %%
#| slow
with same_rng():
    batch = next(run.batches())[0]
losses, scalars, _ = run.method.step(student, teacher, batch, t=0)
total_loss(losses).backward()
run.optimizer.step()
run.optimizer.zero_grad()
update_teacher(teacher, student, decay=0.99)
parts = {'supervised': 'loss_cls', 'pseudo labels': 'loss_unsup_cls', 'consistency': 'loss_unsup_con_0'}
assert all(k in losses for k in parts.values())
{name: round(losses[k].item(), 3) for name, k in parts.items()}

# %% [markdown]
# ## A small training
#
# The same, 120 times, from the burn-in's checkpoint, and for comparison a supervised run with as many images
# per step. One short run with one seed shows how to compare, not by how much the method gains; that is on
# @sec-abl-components, with five seeds.

# %%
#| slow
supervised = override(settings, ['method.name=supervised', 'method.T1=0', 'loader.n_labelled=8'])
results = {
    name: Trainer(cfg, home / 'runs' / name, progress=False).fit()
    for name, cfg in (('semi_detr', settings), ('supervised', supervised))
}
{name: round(r['metrics']['dev']['teacher']['AP50'], 1) for name, r in results.items()}

# %%
#| slow
#| label: fig-sitting-curve
#| fig-cap: "Losses of the semi-supervised run and pseudo boxes per image. After iteration 60 matching is one-to-one, which the class losses show."
#| fig-alt: "Two panels: supervised and unsupervised class loss over iterations; pseudo boxes per image over iterations."
rows = [json.loads(line) for line in (home / 'runs' / 'semi_detr' / 'log.jsonl').read_text().splitlines()]
rows = [r for r in rows if 'loss' in r]
fig, axes = plt.subplots(1, 2, figsize=(7, 2.4), dpi=80)
for key, color, name in (
    ('loss_cls', COLORS['truth'], 'labels'),
    ('loss_unsup_cls', COLORS['teacher'], 'pseudo labels'),
):
    axes[0].plot([r['step'] for r in rows], [r[key] for r in rows], color=color, label=name)
axes[0].set(xlabel='iteration', ylabel='class loss')
axes[0].legend()
axes[1].plot([r['step'] for r in rows], [r['pseudo_boxes'] for r in rows], color=COLORS['teacher'])
axes[1].plot([r['step'] for r in rows], [r['labelled_boxes'] for r in rows], color=COLORS['truth'])
axes[1].set(xlabel='iteration', ylabel='boxes per image', ylim=(0, None))
axes[1].legend(['pseudo labels', 'labels'])
fig.tight_layout()
plt.show()

# %%
#| slow
#| label: fig-sitting-found
#| fig-cap: "Detections above .3 of the trained teacher on four scenes of the development part (blue) and the true boxes (green)."
#| fig-alt: "Four scenes with blue detections and green true boxes."
trained = Trainer(settings, home / 'runs' / 'semi_detr', progress=False)
dev = trained.data.dev
found = detect(trained.teacher, dev, settings.view)
shown = [dev[i] for i in range(4)]
sure = [found[s.image_id]['boxes'][found[s.image_id]['scores'] > 0.3] for s in shown]
image_grid([s.image for s in shown], dict(truth=[s.boxes for s in shown], student=sure))

# %% [markdown]
# ## Summary
#
# - Data are images and a COCO file; the split decides which labels exist.
# - Teacher and student share one architecture; the teacher labels weak views, the student learns on strong
#   ones, and boxes move between them by a matrix.
# - Mining compares each pseudo box with the student's predictions; a mixture of two Gaussians sets the
#   threshold.
# - Assignment is one-to-many first and one-to-one later.
# - All of it is one call: `Trainer(settings, folder).fit()`, or `semidetr train --method semi_detr`.
#
# ## Exercises
#
# 1. Set `method.T1=0`: which losses change in the first iteration, and how many positives are left?
# 2. Replace `pseudo.threshold=0.3` by .05 and by .6. What happens to the number of targets in the first batch?
# 3. Swap the roles of weak and strong views. Why do the pseudo labels get worse?
