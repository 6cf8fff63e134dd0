# %% [markdown]
# # Methods {#sec-methods}
#
# > What one training step computes: supervised, or with a teacher and unlabelled images.
#
# The trainer knows nothing of teachers and pseudo labels. It hands a *method* the two networks, a batch and the number of the step, and gets back named losses to add up and statistics to log. So a new method is a new function, and an ablation is another value in its configuration.

# %%
#| default_exp methods

# %%
#| export
from dataclasses import dataclass
import torch
from semidetr.boxes import transform_boxes
from semidetr.core import ConfigError, suggest
from semidetr.losses import CriterionConfig, set_criterion
from semidetr.matching import stage_of
from semidetr.teacher import PseudoConfig, fixed_threshold, keep_boxes, teacher_detections, transport


# %%
#| export
@dataclass(frozen=True)
class MethodConfig:
    "Which method, and when its parts act; iterations count from 0"
    name:str = 'supervised' # 'supervised' or 'mean_teacher'
    burn_in_iters:int = 0 # supervised iterations before the unsupervised losses (official: 0)
    T1:int = 0 # first iteration of one-to-one matching; one-to-many before it (paper: half of the run)
    unsup_weight:float = 4. # w_u (paper: 4 for COCO-Partial, 2 for COCO-Full)
    unsup_ramp:int = 0 # iterations over which w_u grows from 0 after the burn-in (official: 0)
    unsup_cdn:str = 'stage2' # denoising queries made of pseudo labels: 'stage2' (code), 'always', 'never'

    def __post_init__(self):
        if self.name not in METHODS: raise ConfigError(f"method.name='{self.name}' is unknown; {suggest(self.name, METHODS)}")
        if self.unsup_cdn not in ('stage2', 'always', 'never'):
            raise ConfigError(f"method.unsup_cdn='{self.unsup_cdn}' is unknown; known: always, never, stage2")

@dataclass(frozen=True)
class StepConfig:
    "All that a method needs to know"
    method:MethodConfig = None
    criterion:CriterionConfig = CriterionConfig()
    pseudo:PseudoConfig = PseudoConfig()


# %% [markdown]
# ## Supervised
#
# $$
# \mathcal{L} = \mathcal{L}_{sup}
# $$ {#eq-methods-sup}
#
# The student sees the labelled views, with denoising queries made of the true boxes; the criterion (@sec-losses) matches and compares. With `T1 > 0` the first iterations match one-to-many, for supervised training as well: the stage is a property of the run, not of the data.

# %%
#| export
def supervised(
    student, # Detector in training mode
    teacher, # not used
    batch:dict, # needs `labelled`
    step:int, # iteration t
    cfg:StepConfig,
): # (losses: dict of scalars whose keys start with loss_, stats: dict)
    "Losses of the labelled images alone (@eq-methods-sup)"
    part = batch['labelled']
    outputs = student(part['images'], part['mask'], part['targets'])
    losses = set_criterion(outputs, part['targets'], stage_of(step, cfg.method.T1), cfg.criterion)
    return losses, dict(labelled_boxes=sum(len(t['labels']) for t in part['targets'])/max(1, len(part['targets'])))


# %% [markdown]
# ## Mean teacher
#
# $$
# \mathcal{L} = \mathcal{L}_{sup} + w_u\,\mathcal{L}_{unsup}
# $$ {#eq-methods-mt}
#
# $\mathcal{L}_{unsup}$ is the same criterion with the teacher's boxes for targets. During the burn-in $w_u=0$ and no unlabelled image is looked at: a teacher that has learnt nothing would only teach the student that images are empty.

# %%
#| export
def unsup_weight(
    step:int, # iteration t
    cfg:MethodConfig,
)->float: # factor of every unsupervised loss
    "w_u after the burn-in, over a linear ramp if one is asked for"
    since = step-cfg.burn_in_iters
    if since < 0: return 0.
    return cfg.unsup_weight*min(1., (since+1)/(cfg.unsup_ramp+1))

def to_original(
    detections:list, # per image, pixels of a view
    targets:list, # of that view
)->list: # per image: image_id, boxes in pixels of the file, labels, scores
    "Take boxes back to the pixels of the image file, where the hidden truth lives"
    out = []
    for d, t in zip(detections, targets):
        boxes, _ = transform_boxes(d['boxes'], torch.linalg.inv(t['matrix'].double()), t['orig_size'], 0.)
        out.append(dict(image_id=t['image_id'], boxes=boxes.cpu(), labels=d['labels'].cpu(), scores=d['scores'].cpu()))
    return out


# %%
#| export
def weighted(
    losses:dict, # name -> scalar
    weight:float,
    prefix:str, # goes behind `loss_`
)->dict: # renamed and scaled
    "`loss_cls` becomes `loss_<prefix>_cls`, times `weight`"
    return {f"loss_{prefix}_{k.removeprefix('loss_')}": v*weight for k, v in losses.items()}

@torch.no_grad()
def look(
    teacher,
    part:dict, # the weak views
    cfg:PseudoConfig,
)->list: # per image detections of `teacher_detections`
    "What the teacher sees"
    return teacher_detections(teacher(part['images'], part['mask']), part['targets'], cfg)


# %%
#| export
def mean_teacher(
    student, # Detector in training mode
    teacher, # its average, in eval mode
    batch:dict, # `labelled`, and `weak` and `strong` when there are unlabelled images
    step:int, # iteration t
    cfg:StepConfig,
): # (losses, stats)
    "Labelled losses plus w_u times the same losses on the teacher's boxes (@eq-methods-mt)"
    losses, stats = supervised(student, teacher, batch, step, cfg)
    weight = unsup_weight(step, cfg.method)
    if 'weak' not in batch or weight == 0: return losses, stats
    weak, strong = batch['weak'], batch['strong']
    seen = look(teacher, weak, cfg.pseudo)
    pseudo = keep_boxes(seen, [fixed_threshold(d['scores'], cfg.pseudo.threshold) for d in seen])
    targets = transport(pseudo, weak['targets'], strong['targets'], cfg.pseudo.min_side)
    stage = stage_of(step, cfg.method.T1)
    cdn = cfg.method.unsup_cdn == 'always' or (cfg.method.unsup_cdn == 'stage2' and stage == 'o2o')
    outputs = student(strong['images'], strong['mask'], targets if cdn else None)
    losses |= weighted(set_criterion(outputs, targets, stage, cfg.criterion, denoising=cdn), weight, 'unsup')
    return losses, stats | pseudo_stats(seen, pseudo, targets) | dict(pseudo=to_original(pseudo, weak['targets']))


# %%
#| export
def pseudo_stats(
    seen:list, # the teacher's detections
    pseudo:list, # those that passed the filter
    targets:list, # those that are left in the strong view
)->dict: # plain numbers
    "How much the teacher said and how sure it was"
    n = max(1, len(seen))
    scores = torch.cat([p['scores'] for p in pseudo]) if pseudo else torch.zeros(0)
    return dict(pseudo_boxes=sum(len(p['scores']) for p in pseudo)/n,
                strong_boxes=sum(len(t['labels']) for t in targets)/n,
                pseudo_score=float(scores.mean()) if len(scores) else 0.,
                empty_images=sum(len(p['scores']) == 0 for p in pseudo)/n,
                top_score=sum(float(d['scores'].max()) if len(d['scores']) else 0. for d in seen)/n)

METHODS = dict(supervised=supervised, mean_teacher=mean_teacher)

# %% [markdown]
# ## One step, looked at
#
# A tiny detector, two labelled and two unlabelled scenes. The threshold is set so low that an untrained teacher labels something.

# %%
#| hide
import dataclasses
import matplotlib.pyplot as plt
from semidetr.augment import ViewConfig
from semidetr.boxes import denormalize_boxes
from semidetr.datasets import Subset, Unlabelled, open_dataset
from semidetr.detector import Detector, detector_small
from semidetr.draw import COLORS, draw_boxes, show_image
from semidetr.loader import SemiLoader
from semidetr.teacher import make_teacher

# %%
torch.manual_seed(0)
scenes = open_dataset('digits:n=40', 'train')
view = ViewConfig(short_sides=(96,), eval_short=96, max_side=160, mean=(.5,)*3, std=(.5,)*3)
loader = SemiLoader(Subset(scenes, range(4)), Unlabelled(scenes, range(4, 40)), 2, 2, view, num_workers=0)
batch = next(iter(loader))
tiny = detector_small(10)
tiny = dataclasses.replace(tiny, backbone=dataclasses.replace(tiny.backbone, weights='none'),
                           transformer=dataclasses.replace(tiny.transformer, num_queries=20, d_model=32, n_heads=4, ffn=64))
student = Detector(tiny).train()
teacher = make_teacher(student)
step_cfg = StepConfig(MethodConfig('mean_teacher', burn_in_iters=10, unsup_weight=4.), pseudo=PseudoConfig(threshold=.0105))
losses, stats = mean_teacher(student, teacher, batch, 10, step_cfg)
assert stats['pseudo_boxes'] > 0 and any('unsup' in k for k in losses) and all(torch.isfinite(v) for v in losses.values())
{k: round(v.item(), 3) for k, v in losses.items() if k.endswith(('_cls', '_l1', '_giou'))}

# %% [markdown]
# The unlabelled part of a batch holds no boxes, whatever the data set knows. In the burn-in the method looks at nothing but the labelled part:

# %%
assert all('boxes' not in t for t in batch['weak']['targets']+batch['strong']['targets'])
early, _ = mean_teacher(student, teacher, batch, 9, step_cfg)
assert not any('unsup' in k for k in early)
sorted(early)[:6]

# %% [markdown]
# Boxes travel with the views. Here true boxes stand in for a teacher that sees perfectly: drawn in the weak view, carried to the strong view by @eq-teacher-transport.

# %%
#| label: fig-methods-views
#| fig-cap: "What the teacher says about the weak view (left) becomes the student's target in the strong view (right), through flip, shift, shear and rotation."
#| fig-alt: "Two scenes in weak and strong views with the same boxes"
fig, axes = plt.subplots(2, 2, figsize=(4, 4), dpi=80)
for row, w, s, wi, si in zip(axes, batch['weak']['targets'], batch['strong']['targets'], batch['weak']['images'], batch['strong']['images']):
    truth = scenes.annotation(scenes.index_of(w['image_id']))
    in_weak, _ = transform_boxes(truth['boxes'], w['matrix'], w['size'])
    seen = [dict(boxes=in_weak, labels=truth['labels'], scores=torch.ones(len(in_weak)))]
    carried = transport(seen, [w], [s])[0]
    for ax, image, boxes, kind in ((row[0], wi, in_weak, 'teacher'), (row[1], si, denormalize_boxes(carried['boxes'], s['size']), 'student')):
        show_image(ax, image, view.mean, view.std); draw_boxes(ax, boxes, kind=kind)
axes[0, 0].set_title('weak: teacher'); axes[0, 1].set_title('strong: student'); fig.tight_layout(); plt.show()

# %%
#| label: fig-methods-weight
#| fig-cap: "The unsupervised weight is zero in the burn-in; a ramp lets a young teacher's mistakes in slowly."
#| fig-alt: "Unsupervised weight over the iterations, without and with a ramp"
fig, ax = plt.subplots(figsize=(5, 2.4), dpi=80)
for ramp in (0, 200): ax.plot([unsup_weight(t, MethodConfig('mean_teacher', burn_in_iters=100, unsup_ramp=ramp)) for t in range(500)], label=f'unsup_ramp={ramp}')
ax.set(xlabel='iteration', ylabel='w_u'); ax.legend(); plt.show()

# %% [markdown]
# ## Summary
#
# - A method is a function of student, teacher, batch and step; the trainer only adds its losses up.
# - Supervised training and the mean teacher share one criterion; the teacher's boxes simply take the place of the truth.
# - Pseudo labels are made on the weak view and learnt on the strong one.
# - Nothing of the hidden truth is in the batch; statistics leave the step so that the monitor can compare.
#
# ## Exercises
#
# 1. What does an unlabelled image without any pseudo label teach the student?
# 2. Which losses change when `unsup_cdn` goes from `stage2` to `never`?
# 3. Write a method that uses the teacher's boxes only where two teachers of different age agree.
