# %% [markdown]
# # Configuration {#sec-config}
#
# > Every choice of a run in one frozen tree: presets, overrides, files, and a hash that names the run.
#
# Each chapter keeps its own choices in a small frozen dataclass, beside the code that reads them. This
# chapter adds the choices that belong to no algorithm (which data, which optimiser, how long) and puts them
# all into one tree. A tree can be written to a file, read back, changed by `part.field=value`, and hashed:
# two runs with the same hash and the same code give the same numbers.

# %%
#| default_exp train.config

# %%
#| export
import dataclasses
import hashlib
import json
import math
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from semidetr.data.augment import ViewConfig
from semidetr.data.loader import LoaderConfig
from semidetr.semi.consistency import ConsistencyConfig
from semidetr.core import ConfigError, in_range, one_of, suggest
from semidetr.reading import check_fields, excess, read_small_json, read_toml
from semidetr.detectors.contract import suppressor_on
from semidetr.detectors.detector import DetectorConfig, detector_small, dino_r50
from semidetr.detectors.from_detr import named_detector, settings_of_kind
from semidetr.detectors.group import parallel_parts
from semidetr.matching.losses import CriterionConfig
from semidetr.semi.methods import MethodConfig, SemiDETRPlus
from semidetr.semi.mining import MiningConfig
from semidetr.semi.mixing import MixingConfig
from semidetr.semi.teacher import EmaConfig, PseudoConfig


# %% [markdown]
# ## What belongs to no algorithm

# %%
#| export
@dataclass(frozen=True)
class DataConfig:
    "Which images: `data` and its labelled part, `unlabelled` for more images, `val` for the reported numbers"

    data: str = 'digits'  # see `open_dataset`
    unlabelled: str = ''  # another data set or a folder of images, next to the unlabelled part of `data`
    val: str = ''  # test split; empty: the `val` split of `data`
    images: str = ''  # folder of the images of a COCO file; empty: look in the usual places
    percent: float = 0.0  # percent of the training images that keep their labels; 0: use `count`
    count: int = 0  # number of labelled images; 0 with percent 0: all
    shots: int = 0  # number of labelled images of each class, instead of percent and count
    fold: int = 0  # which draw of the labelled images
    split_seed: int = 0  # of all draws that divide the images; another one, another development part
    split_file: str = ''  # a split written by `semidetr split`, instead of percent, count and fold
    dev: int = 100  # images held out of training to choose settings on
    cover_classes: bool = False  # make sure that each class has a labelled image
    background: str = 'negatives'  # labelled images without a box: 'negatives', or 'left_out' as published
    white: float = 0.0  # value of a white pixel in images of more than 8 bits; 0: by the mode (@sec-records)
    skip_broken: int = 10  # unlabelled images that may be unreadable or vanish during training, per process

    def __post_init__(self):
        one_of('data', self, background=('negatives', 'left_out'))
        in_range('data', self, percent=(0, 100), count=0, shots=0, fold=0, dev=0, white=0, skip_broken=0)


# %%
#| export
@dataclass(frozen=True)
class OptimConfig:
    "AdamW, constant rate as in the published code for COCO-Partial and VOC; iterations are optimiser steps"

    iters: int = 120_000  # optimiser steps of the whole run
    lr: float = 1e-4  # learning rate per step, of all but the parts below
    backbone_mult: float = 0.1  # learning rate of the backbone relative to lr
    weight_decay: float = 1e-4  # of AdamW, decoupled from the gradient
    clip: float = 0.1  # largest L2 norm of the gradient; 0: any
    schedule: str = 'constant'  # 'constant', 'cosine' (to 0 at the end), or 'step' (x0.1 at each of `steps`)
    steps: tuple[int, ...] = ()  # iterations of schedule 'step'
    points_mult: float = (
        1.0  # rate of sampling offsets and reference points relative to lr (Deformable-DETR: .1)
    )
    suppressor_mult: float = 0.0  # rate of a learned suppressor relative to lr, clipped alone; 0: as the rest
    warmup: int = 0  # iterations of linear warm-up
    # batches averaged into one step; processes x accumulate = 8 gives the paper's 8 x 5 images
    accumulate: int = 1
    # what losses, slots, noise and mixtures share: all batches of a 'step', or none but those of processes
    normalise: str = 'batch'
    # keep the moments (8 bytes per weight) of a share of the weights in each process; the same numbers
    sharded: bool = False

    def __post_init__(self):
        one_of('optim', self, schedule=('constant', 'cosine', 'step'), normalise=('batch', 'step'))
        in_range(
            'optim',
            self,
            iters=1,
            backbone_mult=0,
            points_mult=0,
            suppressor_mult=0,
            weight_decay=0,
            clip=0,
            warmup=0,
            accumulate=1,
        )
        if not 0 < self.lr < math.inf:
            raise ConfigError(f'optim.lr={self.lr} must be above 0 and finite')


@dataclass(frozen=True)
class RunConfig:
    "Device, precision, evaluation, checkpoints and logs of a run"

    seed: int = 0  # of initial weights, batches, views and noise
    device: str = 'auto'  # auto, cpu, cuda, cuda:N
    amp: str = 'off'  # 'off', 'bf16', 'fp16', or 'auto': what is fastest on this machine (@sec-machine)
    threads: int = 0  # CPU threads; 0: torch's choice
    init: str = ''  # checkpoint whose weights start this run (a burn-in shared by several runs)
    init_from: str = 'teacher'  # which of its two networks
    eval_every: int = 0  # iterations between evaluations on the development part; 0: only at the end
    test: bool = True  # evaluate on the test split at the end; switch it off while choosing settings
    eval_nms: float = 0.0  # IoU of per-class suppression when evaluating; 0: none (DETR needs none)
    checkpoint_every: int = 500  # iterations between checkpoints
    log_every: int = 20  # iterations between lines of the log
    health_window: int = 200  # iterations without pseudo labels before the warning
    non_finite: str = 'stop'  # at NaN or infinity: 'stop', 'skip' the iteration, or 'back' to the checkpoint
    max_skipped: int = 10  # most iterations that 'skip' leaves out, then the run stops

    def __post_init__(self):
        one_of(
            'run',
            self,
            amp=('off', 'bf16', 'fp16', 'auto'),
            init_from=('teacher', 'student'),
            non_finite=('stop', 'skip', 'back'),
        )
        in_range(
            'run',
            self,
            threads=0,
            eval_every=0,
            eval_nms=(0, 1),
            checkpoint_every=1,
            log_every=1,
            health_window=1,
            max_skipped=0,
        )


# %%
#| export
@dataclass(frozen=True)
class Config:
    "All choices of a run"

    data: DataConfig = DataConfig()
    view: ViewConfig = ViewConfig()
    loader: LoaderConfig = LoaderConfig()
    # 0 classes: as many as the data have
    detector: DetectorConfig = field(default_factory=lambda: DetectorConfig(num_classes=0))
    criterion: CriterionConfig = CriterionConfig()
    method: MethodConfig = MethodConfig()
    pseudo: PseudoConfig = PseudoConfig()
    mining: MiningConfig = MiningConfig()
    consistency: ConsistencyConfig = ConsistencyConfig()
    mixing: MixingConfig = MixingConfig()
    ema: EmaConfig = EmaConfig()
    optim: OptimConfig = OptimConfig()
    run: RunConfig = RunConfig()


# %%
assert Config().optim.lr == 1e-4 and Config().method.unsup_weight == 4  # the paper's
Config().loader


# %% [markdown]
# ## To a file and back
#
# Plain dictionaries in between: they can be printed and written as JSON, and an unknown key is an error that
# names the nearest known one. A typing mistake in a learning rate must not train the wrong model for a day.

# %%
#| export
def to_dict(
    cfg,  # a frozen dataclass, nested
) -> dict:  # of plain values; tuples become lists
    "A configuration as plain values"

    def plain(v):
        if isinstance(v, dict):
            return {k: plain(x) for k, x in v.items()}
        return [plain(x) for x in v] if isinstance(v, (list, tuple)) else v

    return plain(dataclasses.asdict(cfg))


def _coerce(value, kind, where):
    "`value` as `kind`, or a ConfigError that names `where`"
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in typing.get_args(kind):
            return None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
        origin = typing.get_origin(kind)
    if (origin or kind) is tuple:
        if not isinstance(value, (list, tuple)):
            value = (value,)
        args = [a for a in typing.get_args(kind) if a is not Ellipsis]
        if not args and any(type(v) not in (int, float) for v in value):
            raise ConfigError(f'{where}={value!r} must hold numbers')
        return tuple(
            _coerce(v, args[min(i, len(args) - 1)], where) if args else v for i, v in enumerate(value)
        )
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind in (int, float, str, bool) and (
        not isinstance(value, kind) or (kind is int and isinstance(value, bool))
    ):
        raise ConfigError(f'{where}={value!r} must be {kind.__name__}')
    return value


# %% [markdown]
# A setting may get a better name, and its hash must not change with it. One table holds the names that
# settings had when the first records were written. Hashes are computed with the old names, saved configurations
# are read with either, and an old name in a new configuration is an error that gives the new one.

# %%
#| export
RENAMED = {  # frozen: today's name -> the name in hashes and in files written before
    'criterion.cost_l1': 'criterion.w_l1',
    'criterion.loss_l1': 'criterion.l1_weight',
}
_TODAY = {old: name for name, old in RENAMED.items()}


def _renamed(values, names):
    "`values` with the keys that `names` lists (group.field -> group.field) called by their other name"
    values = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}
    for name, other in names.items():
        group, key = name.split('.')
        if key in values.get(group, {}):
            values[group][other.split('.')[1]] = values[group].pop(key)
    return values


# %%
#| export
def from_dict(
    values: dict,  # nested plain values; keys that are left out keep the default of `base`
    base=None,  # configuration to change; the defaults of `Config` if None
    where: str = '',  # prefix of the error messages
):  # a configuration of the same class as `base`
    "A configuration from plain values; unknown keys and wrong types are errors"
    base = Config() if base is None else base
    hints = typing.get_type_hints(type(base))
    new = {}
    for k, v in values.items():
        name = f'{where}{k}'
        if k not in hints:
            now = _TODAY.get(name)
            cure = f"it is called '{now}' now" if now else suggest(k, hints, where)
            raise ConfigError(f"unknown setting '{name}'; {cure}")
        old = getattr(base, k)
        if name == 'method' and isinstance(v, dict) and isinstance(v.get('name'), str):
            old = old.named(v['name'])
        if (
            name == 'detector'
            and isinstance(v, dict)
            and isinstance(v.get('kind'), str)
            and v['kind'] != getattr(old, 'kind', None)
        ):
            old = settings_of_kind(v['kind'])
        if dataclasses.is_dataclass(old):
            if not isinstance(v, dict):
                first = next(iter(typing.get_type_hints(type(old))))
                raise ConfigError(f"'{name}' is a group of settings: give {name}.{first}=...")
            new[k] = from_dict(v, old, f'{name}.')
        else:
            new[k] = _coerce(v, hints[k], name)
    return dataclasses.replace(base, **new)


def from_saved(
    values: dict,  # of a checkpoint, a run.json or a record; names of settings may be older
    like=None,  # Config whose method and detector have settings of their own classes
) -> Config:
    "The configuration that a run was saved with; settings newer than the file have their defaults"
    base = Config()
    if like is not None:
        base = dataclasses.replace(
            base, method=type(like.method)(), detector=type(like.detector)(num_classes=0)
        )
    return from_dict(_renamed(values, _TODAY), base)


# %%
#| export
def _parse(text: str):
    "`3`, `1e-3`, `true`, `[1,2]`, `'x'` as Python values; anything else is a string"
    for read in (json.loads, float, lambda t: tomllib.loads(f'v={t}')['v']):
        try:
            return read(text)
        except (ValueError, RecursionError):
            continue
    return text


def override(
    cfg,  # Config
    items,  # strings `group.field=value`; `detector=NAME` is another detector (`with_detector`)
):  # Config
    "Change single settings by name, as on the command line: `optim.lr=1e-3`"
    for item in items:
        key, eq, text = item.partition('=')
        if not eq:
            raise ConfigError(f"'{item}' is not of the form group.field=value, e.g. optim.lr=1e-3")
        if key.strip() == 'detector':
            cfg = with_detector(cfg, text.strip())
            continue
        value, path = _parse(text[:10_000]), key.strip().split('.')
        if what := excess(value) or ('too long' if len(item) > 10_000 or len(path) > 9 else ''):
            raise ConfigError(f"'{item[:60]}': {what}; write group.field=value, e.g. optim.lr=1e-3")
        old = cfg
        for p in path[:-1]:
            old = getattr(old, p, None)
        if isinstance(getattr(old, path[-1], None), str) and not isinstance(value, str):
            value = text
        for p in reversed(path):
            value = {p: value}
        cfg = from_dict(value, cfg)
    return cfg


# %%
#| export
def read_config(
    path,  # .toml or .json
) -> dict:  # nested values; their names and types are not yet checked
    "Content of a configuration file"
    path = Path(path)
    if not path.exists():
        raise ConfigError(f'{path}: no such configuration file')
    values = (read_small_json if path.suffix == '.json' else read_toml)(path, ConfigError)
    return check_fields(values, {}, path, ConfigError)


def load_config(
    path,  # .toml or .json
    base=None,  # Config that the file changes
):  # Config
    "Read a configuration file; it needs to hold only what differs from `base`"
    values = read_config(path)
    try:
        return from_dict(values, base)
    except ConfigError as e:
        raise ConfigError(f'{path}: {e}') from None


def differences(
    a: dict,  # nested plain values
    b: dict,  # likewise
    where: str = '',
) -> list:  # 'group.field: old -> new'
    "What differs between two configurations"
    out = []
    for k in a:
        if isinstance(a[k], dict):
            out += differences(a[k], b.get(k, {}), f'{where}{k}.')
        elif a[k] != b.get(k):
            out.append(f'{where}{k}: {a[k]} -> {b.get(k)}')
    return out


# %%
#| export
LEGACY_DEFAULTS = {  # settings newer than the first records -> does their value leave a run as it was?
    'optim.normalise': lambda c: c.optim.normalise == 'batch' or c.optim.accumulate == 1,
    'optim.points_mult': lambda c: c.optim.points_mult == 1,
    'criterion.cost_cls': lambda c: c.criterion.cost_cls == 0,
    'criterion.normalise': lambda c: c.criterion.normalise == 'all',
    'consistency.normalise': lambda c: c.consistency.normalise == 'all',
    'criterion.class_cost': lambda c: c.criterion.class_cost == 'focal',
    'criterion.no_object': lambda c: c.criterion.no_object == 0.1,
    'pseudo.cross_nms': lambda c: c.pseudo.cross_nms >= 1,
    'mining.rate_window': lambda c: 'class_rate' not in (c.mining.sup_filter, c.mining.con_filter),
    'ema.start': lambda c: c.ema.start == 0 or (c.ema.start < 0 and not c.run.init),
    'ema.copy': lambda c: c.ema.copy == 0,
    'view.strong': lambda c: c.view.strong == 'geometric',
    'data.background': lambda c: c.data.background == 'negatives',  # no record's data have background images
    'data.shots': lambda c: c.data.shots == 0,
    'data.white': lambda c: c.data.white == 0,
    'data.images': lambda c: not c.data.images,
    'criterion.soft_targets': lambda c: not c.criterion.soft_targets,
    'criterion.w_position': lambda c: c.criterion.cls_loss != 'position',
    'criterion.w_position_dn': lambda c: c.criterion.cls_loss != 'position',
    'method.density_guard': lambda c: c.method.density_guard == 0,
    'detector.group': lambda c: 'group' not in parallel_parts(c.detector),
    'detector.second_head': lambda c: 'second_head' not in parallel_parts(c.detector),
    'criterion.w_group': lambda c: not parallel_parts(c.detector),
    'method.group_threshold': lambda c: not parallel_parts(c.detector),
    **dict.fromkeys(
        (
            'detector.suppressor',
            'criterion.w_mds',
            'criterion.mds_cost',
            'criterion.mds_target',
            'optim.suppressor_mult',
            'method.mds_unsup',
            'method.mds_threshold',
        ),
        lambda c: not suppressor_on(c.detector),
    ),
    'loader.two_views': lambda c: not c.loader.two_views,
    'loader.repeat_threshold': lambda c: c.loader.repeat_threshold == 0,
    **dict.fromkeys(
        (f'mixing.{f.name}' for f in dataclasses.fields(MixingConfig)), lambda c: not c.mixing.on
    ),
}
UNHASHED = (  # settings that cannot change a number of a run with the same images and finite values
    'data.skip_broken',
    'run.non_finite',
    'run.max_skipped',
    'optim.sharded',
    'run.device',
    'run.threads',
    'run.log_every',
    'run.checkpoint_every',
    'loader.num_workers',
    'detector.num_classes',
    'run.test',
)


def config_hash(
    cfg,  # Config
) -> str:  # 12 hex digits
    "Name of a configuration: equal for equal choices, whenever and on whatever machine it is computed"
    values = _renamed(to_dict(cfg), RENAMED)
    for group, usual in (('method', MethodConfig), ('detector', DetectorConfig)):
        if type(getattr(cfg, group)) is not usual:  # two classes may have the same fields
            values[group]['class'] = type(getattr(cfg, group)).__name__
    left_out = [*UNHASHED, *(name for name, unchanged in LEGACY_DEFAULTS.items() if unchanged(cfg))]
    for name in left_out:
        group, key = name.split('.')
        values.get(group, {}).pop(key, None)
    values = {group: v for group, v in values.items() if v}  # groups newer than the first records
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


# %%
assert override(Config(), ['optim.lr=1e-3', 'optim.steps=[10, 20]']).optim.steps == (10, 20)
config_hash(Config())


# %% [markdown]
# ## Presets
#
# A preset is a starting point for a kind of data and a kind of machine. `small` is meant for a data set of
# your own on a laptop; `digits` for the built-in scenes; the `coco` and `voc` presets hold the paper's
# settings for 8 GPUs.
#
# With one GPU keep the number of images in a step: `accumulate` batches of `n_labelled + n_unlabelled` images
# on one process, in place of 8 processes x 5.

# %%
#| export
def _digits() -> Config:
    "Built-in scenes of 96 px: minutes on one core"
    return Config(
        data=DataConfig(data='digits', count=20, dev=100),
        loader=LoaderConfig(4, 8, 'fixed', 1),
        detector=detector_small(0),
        view=ViewConfig(
            short_sides=(80, 88, 96, 104, 112),
            eval_short=96,
            max_side=160,
            flip=0.0,  # a mirrored digit is another one
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
        ),
        criterion=CriterionConfig(k=6, cls_loss='varifocal'),
        ema=EmaConfig(decay=0.99),
        consistency=ConsistencyConfig(hidden=256),
        method=MethodConfig(unsup_weight=1.0, burn_in_iters=400, T1=250),
        optim=OptimConfig(iters=800, lr=1e-3, backbone_mult=0.2, clip=1.0),
        run=RunConfig(threads=1),
    )


def _small() -> Config:
    "Your own images on a laptop: about 208 px, EfficientNet-Lite0, half an hour on one core"
    base = _digits()
    big = dataclasses.replace(
        base.detector, transformer=dataclasses.replace(base.detector.transformer, num_queries=300)
    )
    return dataclasses.replace(
        base,
        data=DataConfig(data=''),
        detector=big,
        criterion=dataclasses.replace(base.criterion, k=4),
        view=dataclasses.replace(
            base.view, short_sides=(176, 192, 208, 224), eval_short=208, max_side=360, flip=0.5
        ),
        method=dataclasses.replace(base.method, burn_in_iters=500, T1=500),
        optim=dataclasses.replace(base.optim, iters=1200, schedule='cosine'),
    )


# %%
#| export
def _coco(percent, unsup_weight=4.0, iters=120_000, T1=60_000, **data) -> Config:
    "The paper's settings: DINO, ResNet-50, 8 processes of 5 images"
    return Config(
        data=DataConfig(data='', percent=percent, dev=0, background='left_out', **data),
        detector=dino_r50(0),
        loader=LoaderConfig(1, 4, 'binomial', 4),
        method=MethodConfig('semi_detr', unsup_weight=unsup_weight, T1=T1),
        optim=OptimConfig(iters=iters),
        run=RunConfig(checkpoint_every=4000, log_every=50),
    )


def _coco_full() -> Config:
    "COCO-Full: all of train2017 labelled, unlabeled2017 without labels, 8 processes of 8 images"
    cfg = _coco(0.0, 2.0, 240_000, 120_000)
    return dataclasses.replace(
        cfg,
        loader=LoaderConfig(4, 4, 'binomial', 4),
        optim=OptimConfig(iters=240_000, schedule='step', steps=(120_000, 160_000)),
    )


PRESETS = {
    'digits': _digits,
    'small': _small,
    'digits-plus': lambda: override(cfg := _digits(), SemiDETRPlus.items(cfg)),
    'small-plus': lambda: override(cfg := _small(), SemiDETRPlus.items(cfg)),
    'coco-1': lambda: _coco(1.0),
    'coco-5': lambda: _coco(5.0),
    'coco-10': lambda: _coco(10.0),
    'coco-full': _coco_full,
    'voc': lambda: _coco(0.0, 4.0, 80_000, 40_000),
}


def preset(
    name: str,  # see `PRESETS`
) -> Config:
    "A configuration by name"
    if name not in PRESETS:
        raise ConfigError(f"preset '{name}' is unknown; {suggest(name, PRESETS)}")
    return PRESETS[name]()


def with_detector(
    cfg: Config,  # of any preset
    name: str,  # a key of `DETECTORS`
) -> Config:
    """The same configuration with another detector, in its small size where `cfg` has a small backbone.

    In full size criterion and learning rates are those of the release; in small size the criterion stays, but
    for DETR, whose class cost and hard targets belong to its softmax (@sec-softmax). `ConfigError` if `cfg`
    has another detector than DINO already: criterion and rates that came with it would stay.
    """
    named, c, old = named_detector(name), cfg.criterion, cfg.detector
    if not isinstance(old, (DetectorConfig, type(named.small(0)))):
        raise ConfigError(
            f'detector={name}: the settings have a {type(old).__name__} already; start from a preset'
        )
    if 'resnet' in old.backbone.name:
        new, criterion = named.full(0), dataclasses.replace(c, **named.criterion)
        rates = dict(lr=2e-4, points_mult=0.1) if name.startswith('deformable') else {}
        optim = dataclasses.replace(cfg.optim, **rates)
        return dataclasses.replace(cfg, detector=new, criterion=criterion, optim=optim)
    new = named.small(0)
    if old.backbone.name == new.backbone.name:
        backbone = dataclasses.replace(new.backbone, weights=old.backbone.weights)
        new = dataclasses.replace(new, backbone=backbone)
    queries = getattr(old, 'num_queries', 0) or getattr(getattr(old, 'transformer', 0), 'num_queries', 0)
    if named.softmax:
        c = dataclasses.replace(c, cls_loss='focal', class_cost='probability', w_cls=1.0)
    elif hasattr(new, 'num_queries'):
        new = dataclasses.replace(new, num_queries=queries)
    elif hasattr(new, 'transformer'):
        new = dataclasses.replace(new, transformer=dataclasses.replace(new.transformer, num_queries=queries))
    return dataclasses.replace(cfg, detector=new, criterion=c)


# %% [markdown]
# ## In use
#
# For an unknown name the error gives the nearest known one, for a wrong type the right one, for a number
# outside the allowed range that range:

# %%
messages = []
for item in ('optim.lrr=1e-3', 'optim.iters=many', 'method.name=mean_techer', 'optim.iters=0', 'ema.decay=5'):
    try:
        override(preset('digits'), [item])
    except ConfigError as e:
        messages.append(str(e))
assert len(messages) == 5 and 'lr' in messages[0]
messages

# %% [markdown]
# To a dictionary and back is the identity, and the hash follows every choice that can change a number:

# %%
mine = override(preset('digits'), ['optim.lr=2e-3', 'view.short_sides=[80, 96]'])
assert from_dict(json.loads(json.dumps(to_dict(mine)))) == mine
assert config_hash(override(mine, ['run.device=cpu'])) == config_hash(mine) != config_hash(preset('digits'))
config_hash(mine)

# %%
#| hide
import matplotlib.pyplot as plt

# %%
#| label: fig-config-size
#| fig-cap: "The same tree from a laptop to eight GPUs: number of images used in a run, by preset (log scale)."
#| fig-alt: "Bar chart of the number of images in a run of each preset"
images = {}
for name in PRESETS:
    c = preset(name)
    processes = 1 if c.detector.transformer.num_queries < 900 else 8
    batch_size = c.loader.n_labelled + c.loader.n_unlabelled
    images[name] = c.optim.iters * c.optim.accumulate * batch_size * processes
fig, ax = plt.subplots(figsize=(5, 2.4), dpi=80)
ax.barh(list(images), list(images.values()), color='#1f77b4')
ax.set(xscale='log', xlabel='images')
ax.invert_yaxis()
plt.show()

# %% [markdown]
# ## Summary
#
# - Every choice is a documented field of a frozen dataclass, written once.
# - `part.field=value` changes one choice; a TOML or JSON file changes several.
# - Unknown keys, wrong types and impossible numbers are errors that name the cure.
# - The hash names a run; results are stored and found under it.
#
# ## Exercises
#
# 1. Which settings would you add to `UNHASHED`, and how would you prove that they change no number?
# 2. Write a TOML file for one GPU with the effective batch of the paper.
# 3. Why are the dataclasses frozen?
