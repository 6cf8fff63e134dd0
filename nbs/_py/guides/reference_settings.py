# %% [markdown]
# # Every setting {#sec-ref-settings}
#
# > Look up a setting: its name, its default, what it means and which class reads it.
#
# Settings are given as `group.field=value`: after the options of `semidetr train`, in a file for `--config`, or
# as `settings={'optim.lr': 1e-3}` in Python. Defaults are the paper's; presets change some of them
# (@sec-config), and `semidetr train --show-config` prints all of a run. DETR and Deformable-DETR have settings
# of their own under `detector` (@sec-detr, @sec-deformable-detr). This page is made from the source each time
# the site is built (@sec-describe).

# %%
from semidetr import Config, config_hash

# %%
config_hash(Config())

# %% [markdown]
# <!-- generated: settings -->
