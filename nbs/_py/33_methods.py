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
    burn_in:int = 0 # supervised iterations before the unsupervised losses (official: 0)
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
    since = step-cfg.burn_in
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
