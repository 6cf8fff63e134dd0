# %% [markdown]
# # Which method trains which detector {#sec-fit}
#
# > Tell from the settings whether a method can train a detector, and which settings the two do not read.
#
# *Why.* Supervised training and a mean teacher need boxes and a loss for boxes; every detector has both. Other
# methods look inside: Semi-DETR reads the matching costs of queries and adds queries of its own, Soft Teacher
# asks the box head about regions, Dense Teacher compares points. With a detector that lacks the part such a method
# fails in the middle of a step, or, worse, trains without the part that gives it its name. So each method says
# what it needs, each detector says what it has, and a pair that does not fit is refused before any image is
# opened. A setting that neither of the two reads is milder, but as silent: the run is that without it.
#
# ## What a detector has, what a method needs
#
# Settings of a detector have a `structure` $d\in\{$`queries`, `regions`, `points`$\}$ (@sec-pyramid); a detector
# that says nothing has queries. A method has a tuple $T$ of structures that it `trains`; one that says nothing
# trains all. The pair fits if
#
# $$
# d \in T .
# $$ {#eq-fit-pair}

# %%
#| default_exp semi.fit

# %%
#| export
from semidetr.core import ConfigError
from semidetr.detectors.contract import suppressor_on
from semidetr.detectors.from_detr import DETECTORS
from semidetr.detectors.group import parallel_parts

# %%
from dataclasses import dataclass
from types import SimpleNamespace as Space
import matplotlib.pyplot as plt

# %%
#| export
STRUCTURES = ('queries', 'regions', 'points')


def structure_of(
    settings,  # of a detector
) -> str:  # one of `STRUCTURES`
    "How a detector predicts"
    return getattr(settings, 'structure', 'queries')


def trained_by(
    method,  # class of a method
) -> tuple:  # of `STRUCTURES`
    "The structures that a method trains"
    return getattr(method, 'trains', STRUCTURES)


def detectors_of(
    method,  # class of a method
) -> list:  # keys of `DETECTORS`
    "Names of the detectors that a method trains (@eq-fit-pair)"
    wanted = trained_by(method)
    return [name for name, d in DETECTORS.items() if structure_of(d.small(0)) in wanted]


def methods_of(
    settings,  # of a detector
    methods: dict,  # name -> class of a method
) -> list:  # keys of `methods`
    "Names of the methods that train a detector (@eq-fit-pair)"
    return [name for name, m in methods.items() if structure_of(settings) in trained_by(m)]


# %%
@dataclass(frozen=True)
class OnPoints:
    num_classes: int = 0
    structure = 'points'


some = dict(any_boxes=Space(), by_queries=Space(trains=('queries',)), by_points=Space(trains=('points',)))
found = methods_of(OnPoints(), some)
assert found == ['any_boxes', 'by_points'] and detectors_of(some['by_points']) == ['fcos']
assert set(detectors_of(some['any_boxes'])) == set(DETECTORS)
found, detectors_of(some['by_queries'])


# %% [markdown]
# `check_fit` also refuses settings that a detector with its own assignment would not read: the criterion's soft
# targets and the density guard (@sec-thresholds) act on matched queries. Mixed views (@sec-mixing) would break the
# correspondence of regions and of points, so methods that need it say `mixes = False`.

# %%
#| export
def _named(settings):
    "What users call a detector"
    return getattr(settings, 'kind', 'dino' if hasattr(settings, 'denoising') else type(settings).__name__)


def check_fit(
    cfg,  # Config of a run
    methods: dict,  # name -> class of a method
) -> str:  # '': nothing to say
    "`ConfigError` where the method of a run cannot train its detector, or a setting would have no effect"
    m, d, method = cfg.method, cfg.detector, cfg.method.implementation
    if structure_of(d) not in trained_by(method):
        fitting = ', '.join(detectors_of(method)) or 'no detector with a name'
        others = ', '.join(methods_of(d, methods))
        raise ConfigError(
            f'method {m.name} does not train {_named(d)}: it trains {fitting}; '
            f'{_named(d)} is trained by {others}'
        )
    wanted = getattr(method, 'settings', None)
    if wanted is not None and not isinstance(m, wanted):
        raise ConfigError(
            f"method {m.name}: its settings are a {wanted.__name__}; give that, or 'method.name={m.name}'"
        )
    if structure_of(d) != 'queries':
        soft = cfg.criterion.soft_targets
        for name, given in {'method.density_guard': m.density_guard, 'criterion.soft_targets': soft}.items():
            if given:
                raise ConfigError(f'{name} is for detectors with queries; {_named(d)} does not read it')
    if not getattr(method, 'mixes', True) and cfg.mixing.on:
        raise ConfigError(f'method {m.name} compares places in two views: leave mixing out')
    return ''


# %%
run = Space(
    method=Space(name='by_queries', implementation=some['by_queries'], density_guard=0.0),
    detector=OnPoints(),
    criterion=Space(soft_targets=False),
    mixing=Space(on=False),
)
try:
    check_fit(run, some)
except ConfigError as error:
    message = str(error)
assert message.startswith('method by_queries does not train OnPoints: it trains dino, ')
assert message.endswith('OnPoints is trained by any_boxes, by_points')
message

# %%
#| label: fig-fit-pairs
#| fig-cap: "Pairs of the three toy methods and all detectors: each structure has methods of its own, and those that need only boxes train everything."
#| fig-alt: "A grid of three columns and one row per detector; filled cells are pairs that fit."
fig, ax = plt.subplots(figsize=(5, 2.6), dpi=80, layout='constrained')
grid = [[name in detectors_of(m) for m in some.values()] for name in DETECTORS]
ax.imshow(grid, cmap='Blues', vmin=0, vmax=1.4, aspect='auto')
ax.set_xticks(range(len(some)), some, fontsize=9)
ax.set_yticks(range(len(DETECTORS)), DETECTORS, fontsize=9)
plt.show()

# %% [markdown]
# ## Settings without effect
#
# Groups of settings are shared by all detectors and methods, and no pair reads all of them. Faster R-CNN and FCOS
# bring their own losses, so weights of the criterion change nothing there; mining and consistency belong to
# Semi-DETR. Such a setting is no fault in a preset or in a file that serves several runs. It is one where a user
# gave it for this run and waits for its effect, so the names that were given, and no others, are compared with
# those that are not read. A method lists in `unread` what it never reads, whatever the detector. The list is not
# inherited, since a subclass may read more: a method without one of its own reads all.

# %%
#| export
_SUPPRESSOR = ('w_mds', 'mds_cost', 'mds_target')


def unread(
    cfg,  # Config of a run
) -> list:  # of 'group' or 'group.field'
    "Settings that a detector and a method do not read"
    d, names = cfg.detector, [*vars(cfg.method.implementation).get('unread', ())]
    if structure_of(d) != 'queries':
        names += ['criterion', 'method.T1', 'method.unsup_cdn']
    if not hasattr(d, 'denoising'):
        names += ['criterion.w_dn', 'criterion.w_position_dn', 'method.unsup_cdn']
    if not suppressor_on(d):
        names += ['optim.suppressor_mult', 'method.mds_unsup', 'method.mds_threshold']
        names += [f'criterion.{name}' for name in _SUPPRESSOR]
    if not parallel_parts(d):
        names += ['criterion.w_group', 'method.group_threshold']
    return names


def without_effect(
    cfg,  # Config of a run
    given,  # names of the settings that the user gave, 'group.field'
) -> list:  # of one line for the user, or of none
    "Say which of the given settings change nothing with this detector and this method"
    names = unread(cfg)
    lost = sorted(g for g in given if any(g == name or g.startswith(f'{name}.') for name in names))
    if not lost:
        return []
    return [f"no effect with {_named(cfg.detector)} and {cfg.method.name}: {', '.join(lost)}"]


# %%
by_points, by_boxes = type('Points', (), dict(unread=('pseudo.nms',))), type('Boxes', (), {})
points = Space(detector=OnPoints(), method=Space(name='by_points', implementation=by_points))
line = without_effect(points, {'criterion.k', 'pseudo.nms', 'pseudo.threshold', 'optim.lr'})
assert line == ['no effect with OnPoints and by_points: criterion.k, pseudo.nms']
assert without_effect(points, {'optim.lr'}) == []
dino = Space(detector=DETECTORS['dino'].small(0), method=Space(name='any_boxes', implementation=by_boxes))
assert without_effect(dino, {'criterion.k', 'detector.denoising.num', 'pseudo.nms'}) == []
without_effect(dino, {'optim.suppressor_mult', 'criterion.k'})

# %% [markdown]
# ## Summary
#
# - A method says which structures it trains, a detector which structure it has.
# - A pair that does not fit is refused in one line, with the names of those that do.
# - A given setting that neither of the two reads is named in one line; what a preset brings is not.
#
# ## Exercises
#
# 1. What would Semi-DETR need from a detector on points to train it?
# 2. Add a structure `masks`. Which of the functions change?
# 3. A method of your own has no list `unread`. What does its user not learn?
