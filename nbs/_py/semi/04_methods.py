# %% [markdown]
# # Methods {#sec-methods}
#
# > What one training step computes: supervised, or with a teacher and unlabelled images.
#
# A *method* decides what is learnt from a batch. It owns its settings, the modules that it trains beside the
# detector, and its step: two networks, a batch and the number of the iteration go in, named losses come out.
# The trainer adds the losses up and knows no method by name, so a new method is a new class in one file, and
# an ablation is another value in its configuration.

# %%
#| default_exp semi.methods

# %%
#| export
import warnings
from dataclasses import dataclass, fields
from typing import NamedTuple
import torch
from semidetr.core import ConfigError, in_range, one_of, suggest
from semidetr.detectors.contract import add_suppressed, has_suppressor, suppressor_on
from semidetr.detectors.group import parallel_group, parallel_parts
from semidetr.matching.losses import set_criterion
from semidetr.matching.matching import stage_of
from semidetr.matching.rescoring import sure_and_doubtful, suppression_loss, suppressor_loss
from semidetr.semi.consistency import (
    Projector,
    consistency_active,
    cross_view_extras,
    cross_view_losses,
    pair_boxes,
)
from semidetr.semi.fit import check_fit
from semidetr.semi.mining import (
    gather_costs,
    initial_boxes,
    matched_costs,
    mine,
    mining_stats,
    mining_threshold,
    monitored_boxes,
)
from semidetr.semi.mixing import build_mixing, mixing_needs
from semidetr.semi.teacher import (
    PseudoConfig,
    fixed_threshold,
    in_both_views,
    keep_boxes,
    pseudo_stats,
    teacher_detections,
    teacher_predict,
    to_original,
    transport,
)
from semidetr.semi.variants import (
    CostMemory,
    box_picker,
    class_memory,
    density_guard,
    earlier_filter,
    hungarian_consistency,
    initial_filter,
    label_filters,
    mixture_solver,
    one_to_many_assigner,
    parallel_advice,
    parallel_stages,
    sup_parallel,
    unsup_parallel,
)

# %%
#| hide
import dataclasses
from types import SimpleNamespace
import matplotlib.pyplot as plt
from semidetr.boxes import denormalize_boxes, transform_boxes
from semidetr.data.augment import ViewConfig
from semidetr.data.catalog import open_dataset
from semidetr.data.datasets import Subset, Unlabelled
from semidetr.data.loader import SemiLoader
from semidetr.detectors.contract import build_detector
from semidetr.detectors.detector import detector_small
from semidetr.draw import draw_boxes, show_image
from semidetr.matching.losses import CriterionConfig
from semidetr.semi.consistency import ConsistencyConfig
from semidetr.semi.mining import MiningConfig
from semidetr.semi.teacher import make_teacher


# %% [markdown]
# ## The contract
#
# What a step returns has three parts: *losses*, whose sum is minimised; *scalars* for the log; and *boxes*
# for the health monitor (@sec-health), the only one that may compare them with hidden truth.

# %%
#| export
class StepResult(NamedTuple):
    "What one step of a method computes"

    losses: dict  # name -> scalar with gradient; names start with loss_
    scalars: dict  # name -> plain number for the log
    boxes: dict  # name -> boxes per image, as `to_original` gives them


class Method(torch.nn.Module):
    """Base class: settings in `cfg`, learnt or remembered state in its submodules and buffers, one `step`

    `guard(targets)` gives the weights of the background of unlabelled images for `set_criterion`, or None.
    """

    views = ('labelled',)  # parts of a batch that `step` reads; of unlabelled images 'weak' and 'strong'
    shown = {}  # scalar -> its name on the progress bar
    curves = ()  # scalars that a record of a study keeps for every logged iteration
    settings = None  # class of its settings, a subclass of `MethodConfig`; None: that class itself

    def __init__(
        self,
        cfg,  # Config of the run
        labelled=None,  # data set of the labelled images
    ):
        super().__init__()
        self.cfg, self.mixing = cfg, build_mixing(cfg, 'weak' in self.views)
        self.guard = density_guard(cfg.method.density_guard, labelled, cfg.detector.num_classes)

    def step(
        self,
        student,  # detector in training mode
        teacher,  # its average, in eval mode
        batch: dict,  # the parts named in `views`; 'weak' and 'strong' are absent during the burn-in
        t: int,  # iteration, counted from 0
    ) -> StepResult:
        "Losses, scalars and boxes of one batch"
        raise NotImplementedError

    @classmethod
    def derived(
        cls,
        cfg,  # Config of the run
    ) -> dict:  # 'group.field' -> (value, the reason in one sentence)
        "Settings that follow from others unless the user sets them"
        return {}


# %% [markdown]
# `MethodConfig` is the group `method` of a configuration. It names the class, and the rest of the package
# asks the class: the loader which views are needed, the commands whether unlabelled images are. A new method
# is a subclass of `MethodConfig` with its settings, and a class that it names as `implementation`; nothing else
# has to change.

# %%
#| export
@dataclass(frozen=True)
class MethodConfig:
    "Which method, and when its parts act; iterations count from 0"

    name: str = 'supervised'  # a key of `METHODS`, e.g. 'mean_teacher' or 'semi_detr'
    burn_in_iters: int = 0  # supervised iterations before the unsupervised losses (official: 0)
    T1: int = 0  # first one-to-one iteration (COCO-Partial: 60k of 120k; Full: 120k of 240k, paper 180k)
    unsup_weight: float = 4.0  # w_u (paper: 4 for COCO-Partial, 2 for COCO-Full)
    unsup_ramp: int = 0  # iterations over which w_u grows from 0 after the burn-in (official: 0)
    unsup_cdn: str = 'stage2'  # denoising queries made of pseudo labels: 'stage2' (code), 'always', 'never'
    # what trains a suppressor on unlabelled images: 'none', the teacher's 'sure' boxes, or what 'nms' keeps
    mds_unsup: str = 'none'
    mds_threshold: float = 0.4  # smallest score of a sure box
    density_guard: float = 0.0  # less background below this share of the boxes per labelled image; 0: off
    group_threshold: float = 0.2  # smallest score of a box for a parallel group or second class head

    def __post_init__(self):
        one_of('method', self, unsup_cdn=('stage2', 'always', 'never'), mds_unsup=('none', 'sure', 'nms'))
        in_range('method', self, density_guard=0)
        self.implementation  # raises for an unknown name

    @property
    def implementation(self) -> type[Method]:
        "The class behind the name"
        if self.name not in METHODS:
            raise ConfigError(f"method.name='{self.name}' is unknown; {suggest(self.name, METHODS)}")
        return METHODS[self.name]

    @property
    def needs_unlabelled(self) -> bool:
        "Does the method learn from unlabelled images?"
        return 'weak' in self.implementation.views

    def named(
        self,
        name: str,  # a key of `METHODS`, or that of these settings
    ) -> 'MethodConfig':
        "The settings of another method; fields that both have keep their values"
        cls = METHODS[name].settings or MethodConfig if name in METHODS else type(self)
        if type(self) is cls:
            return self
        shared = {f.name: getattr(self, f.name) for f in fields(self) if f.name in cls.__dataclass_fields__}
        return cls(**(shared | dict(name=name)))

    def burn_in(
        self,
        iters: int,  # of the run
    ) -> int:
        "Iterations before the first unlabelled image"
        return min(self.burn_in_iters, iters) if self.needs_unlabelled else 0

    def build(
        self,
        cfg,  # Config of the run
        labelled=None,  # data set of the labelled images
    ) -> Method:
        "The method, with fresh state; a warning where a part of the detector is not used as intended"
        if advice := check_fit(cfg, METHODS) or suppressor_advice(cfg) or parallel_advice(cfg):
            warnings.warn(advice, stacklevel=2)
        return self.implementation(cfg, labelled)


# %% [markdown]
# A learned suppressor (@sec-suppressor) needs layers before it that are one-to-many to the end. The commands
# set `method.T1` to the number of iterations; a configuration that says otherwise gets a warning.

# %%
#| export
def suppressor_advice(
    cfg,  # Config of the run
) -> str:  # one line; '' where all is well
    "What to change in a configuration with a learned suppressor"
    return (
        f'method.T1={cfg.method.T1} ends one-to-many matching before optim.iters={cfg.optim.iters}, but the '
        f'suppressor is meant for one-to-many matching throughout; set method.T1={cfg.optim.iters}'
        if suppressor_on(cfg.detector) and cfg.method.T1 < cfg.optim.iters
        else ''
    )


# %% [markdown]
# ## Supervised
#
# $$
# \mathcal{L} = \mathcal{L}_{sup}
# $$ {#eq-methods-sup}
#
# The student sees the labelled views, with denoising queries made of the true boxes; the criterion
# (@sec-losses) matches and compares. With `T1 > 0` the first iterations match one-to-many, in supervised
# training as well: the stage is a property of the run, not of the data.

# %%
#| export
class Supervised(Method):
    "Losses of the labelled images alone (@eq-methods-sup)"

    unread = (
        *(f'method.unsup_{name}' for name in ('weight', 'ramp', 'cdn')),
        *(f'method.{name}' for name in ('burn_in_iters', 'mds_unsup', 'mds_threshold')),
        *(f'method.{name}' for name in ('density_guard', 'group_threshold')),
        *('pseudo', 'mining', 'consistency'),
    )

    def step(self, student, teacher, batch, t):
        part = self.mixing.labelled(batch['labelled'])
        outputs = student(part['images'], part['mask'], part['targets'])
        losses = (
            self.criterion(outputs, part['targets'], t)
            | self.sup_rescoring(outputs, part['targets'])
            | sup_parallel(outputs, part['targets'], self.cfg)
        )
        if 'weak' not in self.views:
            losses |= self.mixing.losses(student, self.criterion, t)
        boxes = sum(len(target['labels']) for target in part['targets'])
        return StepResult(losses, dict(labelled_boxes=boxes / max(1, len(part['targets']))), {})

    def criterion(self, outputs, targets, t, denoising=True, stats=None, background=None):
        "`set_criterion` in the stage of iteration t, with the one-to-many assignment of the settings"
        return set_criterion(
            outputs,
            targets,
            stage_of(t, self.cfg.method.T1),
            self.cfg.criterion,
            denoising,
            stats,
            one_to_many_assigner(self.cfg.criterion),
            background,
        )

    def sup_rescoring(self, outputs, targets):
        "The loss of a learned suppressor on labelled images (@sec-rescoring), if the detector has one"
        if 'suppressed' not in outputs:
            return {}
        cfg, loss = self.cfg.criterion, 0
        if cfg.mds_target != 'nms':
            loss = suppressor_loss(outputs, targets, cfg)['loss_mds']
        if cfg.mds_target != 'match':
            loss = loss + suppression_loss(outputs, cfg)['loss_mds']
        return dict(loss_mds=loss)

    def unsup_rescoring(self, student, outputs, detections, weak, strong):
        "The same on unlabelled images in the strong view, if `method.mds_unsup` says so"
        cfg = self.cfg
        if not has_suppressor(student) or cfg.method.mds_unsup == 'none':
            return {}
        outputs = add_suppressed(student, outputs)
        if cfg.method.mds_unsup == 'nms':
            return suppression_loss(outputs, cfg.criterion)
        moved = transport(detections, weak['targets'], strong['targets'], cfg.pseudo.min_side)
        moved = self.mixing.complete(moved)
        sure, doubtful = sure_and_doubtful(moved, cfg.method.mds_threshold)
        return suppressor_loss(outputs, sure, cfg.criterion, doubtful)

    @classmethod
    def derived(cls, cfg):
        "One-to-many to the end with a learned suppressor, never beside a parallel part; what mixing needs"
        needs = mixing_needs(cfg, 'weak' in cls.views)
        if not suppressor_advice(cfg):
            return needs | parallel_stages(cfg)
        text = 'one-to-many matching to the end, for the learned suppressor'
        return needs | {'method.T1': (cfg.optim.iters, text)}


# %% [markdown]
# ## Mean teacher
#
# $$
# \mathcal{L} = \mathcal{L}_{sup} + w_u\,\mathcal{L}_{unsup}
# $$ {#eq-methods-mt}
#
# $\mathcal{L}_{unsup}$ is the same criterion with the teacher's boxes as targets. During the burn-in $w_u=0$
# and no unlabelled image is used: the boxes of an untrained teacher are almost all wrong, and images without
# any would teach the student that they are empty.

# %%
#| export
def unsup_weight(
    step: int,  # iteration t
    cfg: MethodConfig,
) -> float:  # factor of every unsupervised loss
    "w_u after the burn-in, over a linear ramp if there is one"
    since = step - cfg.burn_in_iters
    if since < 0:
        return 0.0
    return cfg.unsup_weight * min(1.0, (since + 1) / (cfg.unsup_ramp + 1))


# %%
#| export
def weighted(
    losses: dict,  # name -> scalar
    weight: float,
    prefix: str,  # goes behind `loss_`
) -> dict:  # renamed and scaled
    "`loss_cls` becomes `loss_<prefix>_cls`, times `weight`"
    return {f"loss_{prefix}_{k.removeprefix('loss_')}": v * weight for k, v in losses.items()}


def has_denoising(
    stage: str,  # 'o2m' or 'o2o'
    cfg: MethodConfig,
) -> bool:
    "Do pseudo labels make denoising queries? In the published code: in the second stage"
    return cfg.unsup_cdn == 'always' or (cfg.unsup_cdn == 'stage2' and stage == 'o2o')


# %%
renamed = weighted(dict(loss_cls=torch.tensor(2.0), loss_giou_0=torch.tensor(1.0)), 0.5, 'unsup')
assert list(renamed) == ['loss_unsup_cls', 'loss_unsup_giou_0']
renamed


# %%
#| export
class MeanTeacher(Supervised):
    "Labelled losses plus w_u times the same losses on the teacher's boxes (@eq-methods-mt)"

    unread = ('mining', 'consistency')
    views = ('labelled', 'weak', 'strong')
    shown = {'pseudo_boxes': 'pseudo'}
    curves = ('pseudo_boxes', 'pseudo_score', 'empty_images')

    def step(self, student, teacher, batch, t):
        losses, scalars, _ = super().step(student, teacher, batch, t)
        cfg, weight = self.cfg, unsup_weight(t, self.cfg.method)
        if 'weak' not in batch or weight == 0:
            return StepResult(losses, scalars, {})
        weak, strong = batch['weak'], self.mixing.strong(batch['strong'])
        detections = teacher_predict(teacher, weak, cfg.pseudo)
        pseudo = keep_boxes(detections, [self.confident(d) for d in detections])
        targets = transport(pseudo, weak['targets'], strong['targets'], cfg.pseudo.min_side)
        targets = self.mixing.complete(targets, self.confident)
        denoising = has_denoising(stage_of(t, cfg.method.T1), cfg.method)
        outputs = student(strong['images'], strong['mask'], targets if denoising else None)
        unsup = self.criterion(outputs, targets, t, denoising, None, self.guard(targets))
        unsup |= self.unsup_rescoring(student, outputs, detections, weak, strong) | unsup_parallel(
            outputs, detections, weak['targets'], strong['targets'], cfg
        )
        self.mixing.remember(batch['strong'], detections, weak['targets'], cfg.pseudo.min_side)
        unsup |= self.mixing.losses(student, self.criterion, t, denoising, self.confident)
        losses |= weighted(unsup, weight, 'unsup')
        scalars |= pseudo_stats(detections, pseudo, targets)
        return StepResult(losses, scalars, dict(pseudo=to_original(pseudo, weak['targets'])))

    def confident(self, detection):
        "Which boxes of one image are pseudo labels"
        return fixed_threshold(detection['scores'], self.cfg.pseudo.threshold)


# %% [markdown]
# ## Semi-DETR
#
# $$
# \mathcal{L} = \mathcal{L}_{sup} + w_u\left(\mathcal{L}_{unsup}(B^{sup}) + \mathcal{L}_{con}(B^{con})\right)
# $$ {#eq-methods-semi}
#
# Three things differ from the mean teacher of the paper's baseline (`method.T1=0`). Matching is
# one-to-many for the first $T_1$ iterations, for labelled and unlabelled images alike (@sec-matching). The
# teacher's boxes with high scores for their image ($B^0$) form *two* sets (@sec-mining): $B^{sup}$, reliable
# enough to be targets, and the larger $B^{con}$, which only has to lie where objects are. And $B^{con}$ makes
# cross-view queries, for which the outputs of both decoders must agree (@sec-consistency).
#
# The order of the work saves passes. The published code runs the student's transformer twice on the strong
# view, once without gradient to get the matching costs and once with it, and the teacher's backbone three
# times on the same weak view. Here every image is encoded once. The student's matching queries go through the
# decoder once: their outputs give the costs, and since no matching query attends to an extra one, they are
# also the outputs of the loss. Denoising and cross-view queries follow alone, against the cached states of
# the matching queries (@sec-detector).

# %%
#| export
@torch.no_grad()
def mine_pseudo_labels(
    teacher_out: dict,  # outputs of the teacher on the weak view
    student_out: dict,  # outputs of the student's matching queries on the strong view
    weak: list,  # targets of the weak views
    strong: list,  # targets of the strong views
    cfg,  # Config: `pseudo`, `mining`, `criterion`
    memory: CostMemory | None = None,  # costs of past iterations that join the fit
    rates: torch.nn.Module | None = None,  # of `class_memory`: score per class
) -> dict:  # detections; weak, strong: B^0 in both views; sup, con: masks of B^0; costs, tau, mixture
    "From the teacher's detections to B^sup and B^con (@sec-mining)"
    detections = teacher_detections(teacher_out, weak, cfg.pseudo)
    initial = initial_boxes(detections, initial_filter(cfg.mining, cfg.pseudo.threshold))
    first = keep_boxes(detections, initial)
    moved = transport(first, weak, strong, cfg.pseudo.min_side)
    first = in_both_views(first, moved)  # boxes that left the strong view cannot be matched
    costs = matched_costs(student_out, moved, cfg.criterion)
    pooled = gather_costs(costs)
    if memory is not None:
        pooled = memory.add(pooled)
    tau, mixture = mining_threshold(pooled, mixture_solver(cfg.mining))
    min_scores = None if rates is None else rates.add(detections)
    filters = label_filters(cfg.mining, min_scores)
    sup, con = mine(first, costs, tau, cfg.pseudo.threshold, cfg.mining.union, *filters)
    return dict(
        detections=detections,
        weak=first,
        strong=moved,
        sup=sup,
        con=con,
        costs=costs,
        tau=tau,
        mixture=mixture,
        min_scores=min_scores,
    )


# %% [markdown]
# The cross-view queries of $B^{con}$ need the encoded views of both networks and, for the paper's crossing,
# features of both. With Hungarian correspondence there are no extra queries; the matching queries of the two
# networks are paired instead.

# %%
#| export
class View(NamedTuple):
    "A view after one network: all that further queries need"

    encoded: object  # of `encode`
    outputs: dict  # of the matching queries


def encode_decode(
    detector,  # student or teacher
    part: dict,  # images of one view
) -> View:
    "Both halves of a detector, without extra queries"
    encoded = detector.encode(part['images'], part['mask'])
    return View(encoded, detector.decode(encoded))


# %%
#| export
class CrossViewConsistency(Supervised):
    "What Semi-DETR remembers and trains beside the networks, and the consistency of its cross-view queries"

    trains = ('queries',)

    def __init__(self, cfg, labelled=None):
        super().__init__(cfg, labelled)
        mining, consistency = cfg.mining, cfg.consistency
        self.memory = self.projector = None
        self.rates = class_memory(mining, labelled, cfg.detector.num_classes)
        if mining.memory:
            self.memory = CostMemory(mining.memory)
        if consistency.needs_queries:
            self.projector = Projector(
                cfg.detector.d_model,
                consistency.hidden,
                consistency.projector,
                normalise=consistency.normalise,
            )

    def consistency(
        self,
        student,  # detector in training mode
        teacher,  # its average, in eval mode
        student_view: View,  # of the strong views
        teacher_view: View,  # of the weak views
        mined: dict,  # of `mine_pseudo_labels`
        extras: list,  # denoising queries of the student
        views: dict,  # parts 'weak' and 'strong'
        t: int,  # iteration, counted from 0
    ) -> tuple:  # (outputs of the student, losses loss_con_0, ...; none if the consistency is not active)
        "The student's outputs with all extra queries, and the consistency losses (@eq-consistency-loss)"
        c, weak, strong = self.cfg.consistency, views['weak'], views['strong']
        outputs, teacher_out = student_view.outputs, teacher_view.outputs
        active = consistency_active(t, self.cfg.method.T1, c)
        if not active or self.projector is None:
            con = {}
            if active and c.correspondence == 'hungarian':
                con = hungarian_consistency(outputs, teacher_out, weak['targets'], strong['targets'], c)
            return student.decode(student_view.encoded, extras, outputs), con
        con, sup = (keep_boxes(mined['weak'], mined[k]) for k in ('con', 'sup'))
        sizes = [target['size'] for target in weak['targets']]
        picked = box_picker(c)(con, sup, sizes, proposals=mined['detections'])
        pairs = pair_boxes(picked, weak['targets'], strong['targets'], c, self.cfg.pseudo.min_side)
        frames = weak['images'].shape[-2:], strong['images'].shape[-2:]
        queries, same = cross_view_extras(
            self.projector, teacher_view.encoded, student_view.encoded, pairs, frames, c
        )
        outputs = student.decode(student_view.encoded, [*queries, *extras], outputs)
        with torch.no_grad():
            teacher_out = teacher.decode(teacher_view.encoded, same, teacher_out)
        return outputs, cross_view_losses(outputs, teacher_out, c)


# %% [markdown]
# A step puts the parts together, in the order that is described above. `self.mixing` (@sec-mixing) changes the
# strong views, adds boxes of earlier views to the targets and has a loss of its own; it is off by default, and
# then changes nothing. $B^{con}$ holds boxes of this step's images alone.

# %%
#| export
class SemiDETR(CrossViewConsistency):
    "Labelled losses plus w_u times detection losses on B^sup and consistency on B^con (@eq-methods-semi)"

    views = ('labelled', 'weak', 'strong')
    shown = {'pseudo_boxes': 'pseudo'}
    curves = (*MeanTeacher.curves, 'initial_boxes', 'con_boxes', 'loss_con', 'positives_per_object')
    curves += ('cost_threshold', 'cost_mean_low', 'cost_mean_high')

    def step(self, student, teacher, batch, t):
        losses, scalars, _ = super().step(student, teacher, batch, t)
        cfg, weight = self.cfg, unsup_weight(t, self.cfg.method)
        if 'weak' not in batch or weight == 0:
            return StepResult(losses, scalars, {})
        weak, strong = batch['weak'], self.mixing.strong(batch['strong'])
        with torch.no_grad():
            teacher_view = encode_decode(teacher, weak)
        student_view = encode_decode(student, strong)
        mined = mine_pseudo_labels(
            teacher_view.outputs,
            student_view.outputs,
            weak['targets'],
            strong['targets'],
            cfg,
            self.memory,
            self.rates,
        )
        keep = earlier_filter(cfg.mining, cfg.pseudo.threshold, mined['min_scores'])
        targets = self.mixing.complete(keep_boxes(mined['strong'], mined['sup']), keep)
        denoising = has_denoising(stage_of(t, cfg.method.T1), cfg.method)
        extras = parallel_group(student, student_view.encoded) + (
            student.denoise(targets) if denoising else []
        )
        views = dict(weak=weak, strong=strong)
        outputs, con = self.consistency(student, teacher, student_view, teacher_view, mined, extras, views, t)
        unsup = self.criterion(outputs, targets, t, denoising, scalars, self.guard(targets))
        unsup |= self.unsup_rescoring(student, outputs, mined['detections'], weak, strong) | unsup_parallel(
            outputs, mined['detections'], weak['targets'], strong['targets'], cfg
        )
        self.mixing.remember(batch['strong'], mined['detections'], weak['targets'], cfg.pseudo.min_side)
        unsup |= self.mixing.losses(student, self.criterion, t, denoising, keep)
        losses |= weighted(unsup | con, weight, 'unsup')
        if con:
            scalars['loss_con'] = sum(v.item() for v in con.values())
        scalars |= mining_stats(mined, targets)
        return StepResult(losses, scalars, monitored_boxes(mined, weak['targets']))

    @classmethod
    def derived(cls, cfg):
        "One-to-many matching for the first half of the iterations with unlabelled images"
        m, n = cfg.method, cfg.optim.iters
        suppressed = suppressor_on(cfg.detector)
        if suppressed or parallel_parts(cfg.detector):
            return super().derived(cfg) | parallel_stages(cfg, consistency=not suppressed)
        if not m.T1 <= m.burn_in_iters < n:
            return super().derived(cfg)
        T1 = (m.burn_in_iters + n) // 2
        text = (
            f'one-to-many matching for the first half of the {n - m.burn_in_iters} iterations that see '
            'unlabelled images, one-to-one from there on'
        )
        return {'method.T1': (T1, text), **super().derived(cfg)}


# %% [markdown]
# ## Semi-DETR without duplicates
#
# The paper ends with one-to-one matching to be free of suppression. `SemiDETRPlus` stays with one-to-many
# matching, which trains the better detector, and leaves the duplicates to a learned suppressor
# (@sec-suppressor), trained on every image to do what suppression does (@sec-rescoring). It is the step of
# Semi-DETR with other settings; why each has its value is measured in @sec-abl-plus. The commands and
# `plan_run` (@sec-api) set them. A configuration without them gets a warning.

# %%
#| export
class SemiDETRPlus(SemiDETR):
    "Semi-DETR, one-to-many to the end, with a learned suppressor (@sec-abl-plus)"

    bundle = {
        'detector.suppressor.head': ('residual', 'lowers the scores of duplicates'),
        'detector.suppressor.overlap': ('true', 'it sees by how much boxes overlap'),
        'detector.suppressor.detach': ('true', 'it leaves the training of the layers below it alone'),
        'criterion.mds_target': ('nms', 'it learns what suppression keeps'),
        'method.mds_unsup': ('nms', 'on unlabelled images too'),
        'optim.suppressor_mult': (10, 'at a rate of its own'),
    }

    def __init__(self, cfg, labelled=None):
        super().__init__(cfg, labelled)
        if not suppressor_on(cfg.detector):
            cures = (
                'DINO and Deformable-DETR can have one, this detector cannot',
                'set detector.suppressor.head=residual',
            )
            cure = cures[hasattr(cfg.detector, 'suppressor')]
            text = f'semi_detr_plus without a learned suppressor is Semi-DETR; {cure}'
            warnings.warn(text, stacklevel=2)

    @classmethod
    def derived(cls, cfg):
        "Settings of the suppressor, and one-to-many matching to the end"
        if not hasattr(cfg.detector, 'suppressor'):
            return super().derived(cfg)
        text = 'one-to-many matching to the end; the learned suppressor removes duplicates'
        return super().derived(cfg) | cls.bundle | {'method.T1': (cfg.optim.iters, text)}

    @classmethod
    def items(
        cls,
        cfg,  # Config of the run
    ) -> list:  # of 'group.field=value'
        "Overrides that turn a configuration into one of this method"
        return ['method.name=semi_detr_plus', *(f'{k}={v}' for k, (v, _) in cls.derived(cfg).items())]


METHODS = {
    'supervised': Supervised,
    'mean_teacher': MeanTeacher,
    'semi_detr': SemiDETR,
    'semi_detr_plus': SemiDETRPlus,
}
WITH_UNLABELLED = 'mean_teacher'  # default method where unlabelled images are given

# %% [markdown]
# ## One step in detail
#
# A tiny detector, two labelled and two unlabelled scenes. The threshold is set so low that an untrained
# teacher labels something.

# %%
torch.manual_seed(0)
scenes = open_dataset('digits:n=40', 'train')
view = ViewConfig(short_sides=(96,), eval_short=96, max_side=160, mean=(0.5,) * 3, std=(0.5,) * 3)
loader = SemiLoader(Subset(scenes, range(4)), Unlabelled(scenes, range(4, 40)), 2, 2, view, num_workers=0)
batch = next(iter(loader))
tiny = detector_small(10)
tiny = dataclasses.replace(
    tiny.untrained(),
    transformer=dataclasses.replace(tiny.transformer, num_queries=20, d_model=32, n_heads=4, ffn=64),
)
student = build_detector(tiny).train()
teacher = make_teacher(student)
run_cfg = SimpleNamespace(  # the groups of a configuration (@sec-config) that methods read
    method=MethodConfig('mean_teacher', burn_in_iters=10, unsup_weight=4.0),
    criterion=CriterionConfig(),
    pseudo=PseudoConfig(threshold=0.0105),
    mining=MiningConfig(),
    consistency=ConsistencyConfig(hidden=32),
    detector=tiny,
)
mean_teacher = run_cfg.method.build(run_cfg)
losses, scalars, boxes = mean_teacher.step(student, teacher, batch, 10)
assert scalars['pseudo_boxes'] > 0 and len(boxes['pseudo']) == 2
assert any('unsup' in k for k in losses) and all(torch.isfinite(v) for v in losses.values())
{k: round(v.item(), 3) for k, v in losses.items() if k.endswith(('_cls', '_l1', '_giou'))}

# %% [markdown]
# The unlabelled part of a batch holds no boxes, whatever the data set knows. In the burn-in the method uses
# nothing but the labelled part:

# %%
assert all('boxes' not in t for t in batch['weak']['targets'] + batch['strong']['targets'])
early = mean_teacher.step(student, teacher, batch, 9)
assert not any('unsup' in k for k in early.losses) and early.boxes == {}
sorted(early.losses)[:6]

# %% [markdown]
# A Semi-DETR step of the same networks, in its first stage. The passes are counted at the backbones: the
# student sees the labelled and the strong views, the teacher the weak ones, each once.

# %%
run_cfg.method = MethodConfig('semi_detr', burn_in_iters=10, T1=20)
semi_detr = run_cfg.method.build(run_cfg)
passes = dict(student=0, teacher=0)


def count(name):
    def hook(*_):
        passes[name] += 1

    return hook


hooks = [
    m.backbone.register_forward_hook(count(name)) for name, m in (('student', student), ('teacher', teacher))
]
first_stage = semi_detr.step(student, teacher, batch, 10)
for h in hooks:
    h.remove()
assert passes == dict(student=2, teacher=1)
assert first_stage.scalars['con_boxes'] >= first_stage.scalars['pseudo_boxes'] > 0
passes, {k: round(v.item(), 3) for k, v in first_stage.losses.items() if 'con' in k}

# %% [markdown]
# In the second stage there is no consistency loss, and pseudo labels make denoising queries:

# %%
late = semi_detr.step(student, teacher, batch, 20)
assert not any('con' in k for k in late.losses) and any('unsup_cls_dn' in k for k in late.losses)
sorted({k.rsplit('_', 1)[0] for k in late.losses if 'unsup' in k and '_dn_' in k})


# %% [markdown]
# A method of one's own is a class and its settings. This one is the mean teacher without the class loss on
# pseudo labels:

# %%
class BoxesOnly(MeanTeacher):
    "Pseudo labels teach where objects are, not what they are"

    def step(self, student, teacher, batch, t):
        losses, scalars, boxes = super().step(student, teacher, batch, t)
        kept = {k: v for k, v in losses.items() if not k.startswith('loss_unsup_cls')}
        return StepResult(kept, scalars, boxes)


@dataclass(frozen=True)
class BoxesOnlyConfig(MethodConfig):
    name: str = 'boxes_only'
    implementation = BoxesOnly


run_cfg.method = BoxesOnlyConfig(burn_in_iters=10)
without_classes = run_cfg.method.build(run_cfg).step(student, teacher, batch, 10)
assert run_cfg.method.needs_unlabelled and 'loss_unsup_l1' in without_classes.losses
[k for k in without_classes.losses if k.startswith('loss_unsup_') and '_dn' not in k][:4]

# %% [markdown]
# Boxes travel with the views. Here true boxes stand in for a perfect teacher: drawn in the weak view, carried
# to the strong view by @eq-teacher-transport.

# %%
#| label: fig-methods-views
#| fig-cap: "The teacher's boxes in the weak view (left) become the student's targets in the strong view (right), through flip, shift, shear and rotation."
#| fig-alt: "Two scenes in weak and strong views with the same boxes"
fig, axes = plt.subplots(2, 2, figsize=(4, 4), dpi=80)
weak, strong = batch['weak'], batch['strong']
for i, row in enumerate(axes):
    w, s = weak['targets'][i], strong['targets'][i]
    truth = scenes.annotation(scenes.index_of(w['image_id']))
    in_weak, _ = transform_boxes(truth['boxes'], w['matrix'], w['size'])
    perfect = [dict(boxes=in_weak, labels=truth['labels'], scores=torch.ones(len(in_weak)))]
    (carried,) = transport(perfect, [w], [s])
    show_image(row[0], weak['images'][i], view.mean, view.std)
    draw_boxes(row[0], in_weak, kind='teacher')
    show_image(row[1], strong['images'][i], view.mean, view.std)
    draw_boxes(row[1], denormalize_boxes(carried['boxes'], s['size']), kind='student')
axes[0, 0].set_title('weak: teacher')
axes[0, 1].set_title('strong: student')
fig.tight_layout()
plt.show()

# %%
#| label: fig-methods-weight
#| fig-cap: "The unsupervised weight is zero in the burn-in; a ramp limits the harm of an early teacher's mistakes."
#| fig-alt: "Unsupervised weight over the iterations, without and with a ramp"
fig, ax = plt.subplots(figsize=(5, 2.4), dpi=80)
for ramp in (0, 200):
    settings = MethodConfig('mean_teacher', burn_in_iters=100, unsup_ramp=ramp)
    ax.plot([unsup_weight(t, settings) for t in range(500)], label=f'unsup_ramp={ramp}')
ax.set(xlabel='iteration', ylabel='w_u')
ax.legend()
plt.show()

# %% [markdown]
# ## Where paper and code differ
#
# The published numbers were made with the published code, and the two differ in more than details. The
# default here is the code, except where a row says otherwise; every difference is a setting.
#
# | setting | default: the code | other value | see |
# |---|---|---|---|
# | `method.burn_in_iters` | 0: pseudo labels from the first iteration | N supervised iterations first (ours, for small data) | @sec-methods |
# | `method.unsup_cdn` | `stage2`: pseudo labels make denoising queries after $T_1$ | `always`, `never`; the paper is silent | @sec-denoising |
# | `criterion.loss_l1` | 10: two logged parts are added once more | 5: the paper's weight | @sec-losses |
# | `criterion.enc_labels` | `zero`: the encoder output learns object or not | `true`: classes, as DINO | @sec-losses |
# | `consistency.cross` | `one`: the teacher's features make the queries of both decoders | `swap`: each decoder gets the other view's (paper); `both` | @sec-consistency |
# | `consistency.norm` | true: directions are compared, times 10 | false: plain MSE, with `consistency.weight` $=1/w_u$ (paper: $w_c=1$, which $w_u$ does not multiply) | @sec-consistency |
# | `consistency.until` | `T1`: first stage only | `end`: the whole training (paper) | @sec-consistency |
# | `consistency.groups` | 1; the code has 5 identical groups, which change neither loss nor gradient | 5 | @sec-consistency |
# | `consistency.projector` | `code`: two convolutions, two linear layers | `mlp` (paper) | @sec-consistency |
# | `consistency.slot_weights` | `code`: one product of means for all slots | `slots`: what the code meant | @sec-consistency |
# | `criterion.normalise` | `all`: class losses of one-to-one matching are divided by the objects of all processes (ours; on one process the same) | `process`: by those of each process, as in the code | @sec-many |
# | `consistency.normalise` | `all`: means and batch norms over the boxes of all processes (ours) | `process`: of each process, as in the code | @sec-many |
# | `mining.init` | `mean_std`: scores of at least mean + std of their image | `score`: the threshold .4 (paper) | @sec-mining |
# | `mining.union` | true: $B^{con}$ includes $B^{sup}$ | false: the mined boxes alone (paper) | @sec-mining |
# | `mining.solver` | `torch`: all mixtures at once | `sklearn`: the library that the code calls, with equal results | @sec-mining |
# | `pseudo.cross_nms` | 1: suppression class by class | e.g. .6: one box per place, whatever its class (ours, where objects do not overlap) | @sec-teacher |
# | `pseudo.min_side` | 1 pixel: boxes that leave the strong view are dropped (ours) | -1: kept, as in the code, where they become targets without area | @sec-teacher |
# | `detector.transformer.select_invalid` | false: tokens of padding and border do not compete for queries (ours) | true: the code | @sec-transformer |
# | `loader.ratio` | `binomial`: the share of labelled images varies | `fixed` (paper) | @sec-loader |
# | `detector.denoising.box_noise` | .4 | 1: other DINO implementations | @sec-denoising |

# %% [markdown]
# ## Summary
#
# - A method is a class with settings, state and a step; the trainer adds its losses up and knows no names.
# - Supervised training, mean teacher and Semi-DETR share one criterion; the teacher's boxes replace the
#   truth.
# - Semi-DETR encodes each view once: costs, losses, denoising and consistency all come from that.
# - Pseudo labels are made on the weak view and learnt on the strong one.
# - No hidden truth is in the batch; boxes leave the step so that the monitor can compare.
# - What each number and each switch does to a training: @sec-abl-hyper, @sec-abl-fidelity.
#
# ## Exercises
#
# 1. What does an unlabelled image without any pseudo label teach the student?
# 2. Which losses change when `unsup_cdn` goes from `stage2` to `never`?
# 3. Write a method that uses the teacher's boxes only where teachers of two decays agree.
