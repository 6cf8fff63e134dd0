# %% [markdown]
# # The images of a run {#sec-run-data}
#
# > Divide a data set into the parts that a run may learn from, choose on, and report on.
#
# A semi-supervised result depends on which images had labels, and is worth nothing if one of the others leaked
# its boxes. The training images are divided once (@sec-splits), and each part has one role:
#
# | part | boxes | used for |
# | :--- | :--- | :--- |
# | `labelled` | yes | supervised losses |
# | `unlabelled` | removed | pseudo labels |
# | `dev` | yes | choosing settings; never trained on |
# | `val` | yes | reported numbers only |
# | `truth` | of the unlabelled images | the health monitor only (@sec-health) |
#
# The classes and the number of classes follow from the data, not from a setting.

# %%
#| default_exp train.run_data

# %%
#| export
import dataclasses
from semidetr.core import ConfigError, DataError
from semidetr.data.catalog import open_dataset
from semidetr.data.datasets import Joined, Subset, Unlabelled
from semidetr.data.splits import load_split, make_split
from semidetr.train.config import DataConfig

# %%
from semidetr.draw import image_grid
from semidetr.train.config import preset


# %%
#| export
@dataclasses.dataclass
class RunData:
    "The images of a run by their roles; each part but the split and the classes is a data set"

    labelled: object  # with boxes
    unlabelled: object  # stripped of every box; may be None
    dev: object  # held out of training: the only part that settings are chosen on
    val: object  # test split, for reported numbers; may be None
    truth: object  # data set that knows the boxes of the unlabelled images, for the health monitor alone
    split: object  # `Split` that divided the training images
    classes: list  # names, in the order of the labels


def test_split(
    cfg,  # DataConfig
    train=None,  # the training images, if they are open already
):  # (data set or None, why there is none)
    "Images for the reported numbers: `val`, or the val split of `data` if that is not the training set again"
    if cfg.val:
        return open_dataset(cfg.val, 'val'), ''
    try:
        val = open_dataset(cfg.data, 'val')
    except DataError as e:
        return None, str(e)
    train = open_dataset(cfg.data, 'train') if train is None else train
    # the defaults differ, so data sets that lack `where` are never the same
    same_place = getattr(val, 'where', 0) == getattr(train, 'where', None)
    if same_place and list(val.ids) == list(train.ids):
        return None, f'{cfg.data}: has no split of its own for testing'
    return val, ''


def build_data(
    cfg,  # DataConfig
) -> RunData:
    "Open the data sets and divide the training images"
    train = open_dataset(cfg.data, 'train')
    if cfg.split_file:
        split = load_split(cfg.split_file, train)
    else:
        percent, count = cfg.percent or None, cfg.count or None
        if percent is None and count is None:
            percent = 100.0
        split = make_split(train, percent, count, cfg.fold, cfg.dev, cfg.split_seed, cfg.cover_classes)

    def pick(ids):
        return Subset(train, [train.index_of(i) for i in ids])

    pools = [Unlabelled(pick(split.unlabelled))] if split.unlabelled else []
    if cfg.unlabelled:
        pools.append(Unlabelled(open_dataset(cfg.unlabelled, 'train')))
    unlabelled = pools[0] if pools else None
    if len(pools) > 1:
        unlabelled = Joined(pools)
    return RunData(
        labelled=pick(split.labelled),
        unlabelled=unlabelled,
        dev=pick(split.dev) if split.dev else None,
        val=test_split(cfg, train)[0],
        truth=None if cfg.unlabelled else train,
        split=split,
        classes=list(train.classes),
    )


# %%
toy_data = build_data(DataConfig(data='digits:n=40', count=6, dev=4))
assert (len(toy_data.labelled), len(toy_data.unlabelled), len(toy_data.dev)) == (6, 30, 4)
assert len(toy_data.unlabelled[0].boxes) == 0
toy_data.split


# %%
#| export
def resolve(
    cfg,  # Config
    classes: list,
):  # Config
    "Fill in what the data decides"
    n = cfg.detector.num_classes
    if n not in (0, len(classes)):
        raise ConfigError(
            f'detector.num_classes={n}, but the data set has {len(classes)} classes; leave it at 0'
        )
    return dataclasses.replace(cfg, detector=dataclasses.replace(cfg.detector, num_classes=len(classes)))


# %%
#| label: fig-run-data-parts
#| fig-cap: "One scene of each part as training gets it: the unlabelled one has no boxes, though its file has."
#| fig-alt: "Three scenes; the first and the third with green boxes, the middle one without."
parts = [toy_data.labelled[0], toy_data.unlabelled[0], toy_data.dev[0]]
image_grid(
    [s.image for s in parts], [s.boxes for s in parts], titles=['labelled', 'unlabelled', 'dev'], ncols=3
)

# %%
resolved = resolve(preset('digits'), toy_data.classes)
assert resolved.detector.num_classes == 10
resolved.detector.num_classes

# %% [markdown]
# ## Summary
#
# - `build_data` opens everything that `DataConfig` names and gives each image one role.
# - Unlabelled images have no boxes; only the health monitor gets the data set that knows them.
# - A `val` split that is the training set again does not count as a test split.
# - `resolve` takes the number of classes from the data.
#
# ## Exercises
#
# 1. Why is `truth` None when more unlabelled images come from another folder?
# 2. Two runs use the same `split_seed` and different folds. Which parts are equal?
