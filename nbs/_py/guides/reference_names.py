# %% [markdown]
# # Every public name {#sec-ref-names}
#
# > Look up what a function or class of `semidetr` takes, returns and raises, with an example.
#
# `from semidetr import NAME` gives each of these; `help(semidetr.NAME)` shows the same text. A name links to the
# chapter that derives and tests it. Boxes are `xyxy` in pixels unless a line says otherwise, sizes are
# `(H, W)`, scores and thresholds lie in [0, 1], metrics in 0 to 100. Errors that a user can cure are
# `DataError` and `ConfigError`, one line with file, item and cure (@sec-core). This page is made from the
# source each time the site is built (@sec-describe).

# %%
import semidetr

# %%
names = sorted(set(semidetr.__all__) - {'__version__'})
len(names), names[:5]

# %% [markdown]
# <!-- generated: names -->
