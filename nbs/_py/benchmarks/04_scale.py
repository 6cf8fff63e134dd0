# %% [markdown]
# # What size costs {#sec-scale}
#
# > See how long a data set of a million images takes to open and what memory it needs, and plan for more.

# %%
#| hide
import json
from pathlib import Path
import matplotlib.pyplot as plt
from IPython.display import Markdown as markdown
from semidetr.lab.report import finding, markdown_table

# %%
#| hide
record = json.loads(Path('../../benchmarks/results/scale.json').read_text())


def rows(case):
    "Rows of one kind, in the order of their size"
    return [r for r in record['rows'] if r['case'] == case]


parsed, cached, predicted = rows('parsed'), rows('cached'), rows('predict')
[pool] = rows('pool')
largest = cached[-1]
assert [r['images'] for r in parsed] == [r['images'] for r in cached]
assert largest['boxes'] == 10 * largest['images']

# %%
#| echo: false
text = finding(
    f"{largest['images']:,} images with {largest['boxes']:,} boxes open in "
    f"{parsed[-1]['cpu_seconds']:.0f} CPU seconds the first time "
    f"and in {largest['cpu_seconds']:.1f} from the cache, with a peak of {largest['peak_mb']:,.0f} MB",
    f"`predict` begins with {predicted[-1]['files']:,} files after "
    f"{predicted[-1]['cpu_seconds']:.1f} CPU seconds",
)
markdown(text)

# %%
#| label: fig-scale-open
#| fig-cap: "Time and memory grow in proportion to the data set; from the cache, a million images open in less than ten seconds of a core."
#| fig-alt: "Two panels over the number of images on logarithmic axes. Left: CPU seconds, parsed above cached. Right: peak memory in MB, nearly flat up to a hundred thousand images, then rising for the parsed file only."
#| echo: false
fig, axes = plt.subplots(1, 2, figsize=(8, 2.8), dpi=80)
for rs, label in ((parsed, 'parsed'), (cached, 'cached')):
    sides = [r['images'] for r in rs]
    axes[0].loglog(sides, [r['cpu_seconds'] for r in rs], 'o-', label=label)
    axes[1].semilogx(sides, [r['peak_mb'] for r in rs], 'o-', label=label)
axes[0].set(xlabel='images', ylabel='CPU seconds')
axes[1].set(xlabel='images', ylabel='peak, MB', ylim=(0, None))
for ax in axes:
    ax.legend(fontsize=9)
plt.show()

# %%
#| label: tbl-scale-open
#| tbl-cap: "Opening a COCO file with ten boxes per image: CPU seconds and peak memory, parsed and from the cache."
#| echo: false
table = []
for p, c in zip(parsed, cached):
    line = [f'{p["images"]:,}', f'{p["file_mb"]:.0f}', f'{p["cpu_seconds"]:.2f}', f'{c["cpu_seconds"]:.2f}']
    table.append([*line, f'{p["peak_mb"]:.0f}', f'{c["peak_mb"]:.0f}', f'{c["cache_mb"]:.1f}'])
names = ['images', 'file, MB', 'parsed, s', 'cached, s', 'parsed, MB', 'cached, MB', 'cache, MB']
markdown(markdown_table(names, table))

# %% [markdown]
# ## How it was measured {.fold}
#
# `python benchmarks/scale.py` wrote the record of this page. It makes COCO files of up to a million images
# with ten boxes each, and opens each of them in a new process: once with an empty cache, so that the file is
# parsed (@sec-coco), and three times with its columns in the cache (@sec-columns). The images are empty
# files, since opening reads no pixels. Times are CPU seconds, because other work ran on the machine; memory
# is the peak of the process, libraries included.

# %% [markdown]
# ## Predicting {.fold}
#
# Before the first image goes through the network, `semidetr predict` lists the folder, and makes sure that no
# picture overwrites an image. With $n$ files, the time is a constant and a multiple of $n$.

# %%
#| label: fig-scale-predict
#| fig-cap: "The steps of `predict` before its first image are linear in the number of files."
#| fig-alt: "One line over the number of files on logarithmic axes: CPU seconds stay below a second up to a thousand files and rise in proportion from there."
#| echo: false
fig, ax = plt.subplots(figsize=(4.5, 2.6), dpi=80)
ax.loglog([r['files'] for r in predicted], [r['cpu_seconds'] for r in predicted], 'o-')
ax.set(xlabel='files', ylabel='CPU seconds')
plt.show()

# %% [markdown]
# ## A hundred million images {.fold}
#
# The constants of one million images tell what a hundred times as many would take:

# %%
#| label: tbl-scale-plan
#| tbl-cap: "Constants per million images (ten boxes each where there are boxes), and what follows for 10^8."
#| echo: false
million = largest['images'] / 1e6
first = parsed[-1]
constants = {
    'parse, s': first['cpu_seconds'] / million,
    'open from the cache, s': largest['cpu_seconds'] / million,
    'columns, MB': largest['cache_mb'] / million,
    'memory above the libraries when parsed, MB': first['above_mb'] / million,
    'index of shards, s': pool['cpu_seconds'] * 1e6 / pool['images'],
    'order of one epoch, MB': 8.0 * 1e6 / 2**20,
}
plan = [[k, f'{v:,.1f}', f'{100 * v:,.0f}'] for k, v in constants.items()]
markdown(markdown_table(['constant', '10^6 images', '10^8 images'], plan))

# %% [markdown]
# What would have to change, in this order:
#
# 1. *One file.* An annotation file of $10^8$ images is beyond the limit of 4,000 MB that `read_bytes` sets.
#    Annotations in parts, each with columns of its own in the cache, need nothing else: `Columns` are arrays
#    that can be mapped one after another, and parts can be parsed side by side.
# 2. *Names.* Opening compares all names with the listing of their folders, each time. With shards there is no
#    such listing; their index should be kept as columns too, under the digest of the archive.
# 3. *Order of an epoch.* `draw_index` makes a permutation of the whole pool. At $10^8$ it has to be a
#    function of the position, such as a small block cipher over the positions, which takes no memory. That
#    changes the order, so it is a setting.
# 4. *Roles.* Splits hold lists of ids, and `run_data` compares paths as texts, one per image: both become
#    columns of positions.
# 5. *Boxes.* 29 bytes each are 29 GB for $10^9$ boxes: mapped from the disk they take memory only where a
#    batch reads them.
#
# ## Summary
#
# * A million images with ten million boxes open from the cache within 20 seconds of a core and below 3 GB.
# * `predict` begins after a time that is linear in the number of files.
# * $10^8$ images need parts, columns for shards and splits, and an order without a table.

# %%
#| hide
assert largest['images'] == 10**6 and largest['cpu_seconds'] < 20 and largest['peak_mb'] < 3000
assert first['peak_mb'] < 3000
per_file = [r['cpu_seconds'] / r['files'] for r in predicted]
assert per_file[-1] <= per_file[0]
