# %% [markdown]
# # Every command {#sec-ref-commands}
#
# > Look up the options of a command.
#
# `semidetr COMMAND --help` prints the same. A mistake in the input is one line on the error stream and exit
# code 2; Ctrl-C ends with exit code 130 and a line that says how to resume (@sec-terminal). This page is made
# from the source each time the site is built (@sec-describe).

# %%
import semidetr

# %%
f'semidetr {semidetr.__version__}'

# %% [markdown]
# <!-- generated: commands -->
