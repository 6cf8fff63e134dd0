# %% [markdown]
# # One run {#sec-abl-run}
#
# > See the settings, losses and metrics of a single run of a study.
#
# Each run of a study is this notebook, executed with its own parameters. `semidetr ablate` (@sec-ablate)
# writes the configuration into the folder of the run, executes the notebook, and keeps the executed copy as
# `run.ipynb` beside the checkpoint. Without parameters, as on this page, the notebook trains a tiny detector
# for a few iterations.

# %% tags=["parameters"]
title = 'demonstration'
folder = ''  # folder of the run, with config.json; empty: a demonstration of a few iterations
expected = ''  # hash of that configuration
processes = 1  # more than one: started with torchrun, one device per process

# %%
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
import matplotlib.pyplot as plt
from IPython.display import Markdown as markdown
from semidetr.core import ConfigError
from semidetr.draw import COLORS
from semidetr.train.config import Config, config_hash, differences, load_config, override, to_dict
from semidetr.train.machine import prepare
from semidetr.lab.report import cell_text, markdown_table
from semidetr.lab.study import load_study, record, run_config

# %% [markdown]
# ## Settings
#
# The settings that differ from the defaults.

# %%
demo = load_study('studies.toml', 'components', 'smoke') if not folder else None
cfg = override(demo['groups'][''], demo['arms']['shm']) if demo else load_config(Path(folder) / 'config.json')
key = config_hash(cfg)
if expected and key != expected:
    raise ConfigError(
        f'{folder}: config.json has hash {key}, asked for was {expected}; start the study again'
    )
changes = '\n'.join(f'* {cell_text(d)}' for d in differences(to_dict(Config()), to_dict(cfg)))
markdown(f'**{cell_text(title)}**, hash {key}\n\n{changes}')

# %% [markdown]
# ## The run
#
# The result of a finished run is read; a stopped run is resumed.

# %%
place = Path(folder or tempfile.mkdtemp())
prepare()
if processes > 1:
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone']
    command = ['--nproc-per-node', str(processes), '-m', 'semidetr.cli', 'train']
    options = ['--config', str(place / 'config.json'), '--out', str(place), '--quiet']
    subprocess.run([*launcher, *command, *options], check=True)
with warnings.catch_warnings(record=True) as said:
    result = run_config(cfg, place, progress=False)
for w in said:
    print(f'note: {w.message}')
assert result['hash'] == key
health = result.get('health') or {}
facts = {
    'iterations': result['iterations'],
    'labelled images': result['data']['labelled'],
    'unlabelled images': result['data']['unlabelled'],
    'minutes': round(result['seconds'] / 60, 1),
    'CPU-minutes': round(result['cpu_seconds'] / 60, 1),
    'peak memory in MB': result['peak_memory_mb'],
    'device': result['device'],
    'commit': result['commit'],
    'pseudo boxes per image': round(health['pseudo_boxes'], 2) if 'pseudo_boxes' in health else 'none',
}
markdown(markdown_table(['', 'value'], list(facts.items())))

# %% [markdown]
# ## Metrics

# %%
rows = [
    [part, who, *(f'{m[k]:.1f}' for k in ('AP', 'AP50', 'AP75'))]
    for part, name in (('dev', 'development part'), ('val', 'test split'))
    for who, m in result['metrics'].get(part, {}).items()
]
markdown(markdown_table(['part', 'network', 'AP', 'AP50', 'AP75'], rows))

# %%
#| label: fig-abl-run-curve
#| fig-cap: "The loss over the iterations and, where there is a teacher, its pseudo boxes per image: a method without pseudo labels is first noticed here."
#| fig-alt: "Loss per iteration, and pseudo boxes per image"
curve = record(result, place)['curve']
fig, ax = plt.subplots(figsize=(6, 2.8), dpi=80)
ax.plot(curve['step'], curve['loss'], color=COLORS['student'])
ax.set(xlabel='iteration', ylabel='loss')
if 'pseudo_boxes' in curve:
    boxes = [float('nan') if x is None else x for x in curve['pseudo_boxes']]
    right = ax.twinx()
    right.plot(curve['step'], boxes, color=COLORS['teacher'])
    right.set(ylabel='pseudo boxes per image', ylim=(0, None))
plt.show()

# %% [markdown]
# ## Summary
#
# - The configuration is read from a file beside the results, and its hash is compared with the expected one.
# - This page shows the content of `run.json` and `log.jsonl`; the record of the study has the same numbers.
