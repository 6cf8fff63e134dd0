# %% [markdown]
# # One run {#sec-abl-run}
#
# > See what a single run of a study did: its settings, its losses, its metrics.
#
# Every run of every study is this notebook, executed with other parameters. `semidetr ablate` (@sec-ablate)
# writes the configuration into the folder of the run, executes the notebook there, and keeps the executed
# copy as `run.ipynb` beside the checkpoint. Without parameters, as on this page, it trains a tiny detector
# for a few iterations.

# %% tags=["parameters"]
title = 'demonstration'
folder = ''  # of the run, with its config.json; empty: a demonstration of a few iterations
expected = ''  # hash of that configuration
processes = 1  # more than one: started by torchrun, each with its own device

# %%
import json
import subprocess
import sys
import tempfile
from pathlib import Path
import matplotlib.pyplot as plt
from IPython.display import Markdown as markdown
from semidetr.train.config import Config, config_hash, differences, load_config, override, to_dict
from semidetr.core import ConfigError
from semidetr.draw import COLORS
from semidetr.train.machine import prepare
from semidetr.lab.report import markdown_table
from semidetr.lab.study import load_study, record, run_config

# %% [markdown]
# ## Settings
#
# Those that differ from the defaults, which are the paper's wherever it names a value.

# %%
demo = load_study('studies.toml', 'components', 'smoke') if not folder else None
cfg = override(demo['groups'][''], demo['arms']['shm']) if demo else load_config(Path(folder) / 'config.json')
if expected and config_hash(cfg) != expected:
    raise ConfigError(
        f'{folder}: config.json has hash {config_hash(cfg)}, asked for was {expected}; start the study again'
    )
markdown(
    f'**{title}**, hash {config_hash(cfg)}\n\n'
    + '\n'.join(f'* {d}' for d in differences(to_dict(Config()), to_dict(cfg)))
)

# %% [markdown]
# ## The run
#
# A finished run is looked up, a stopped one goes on.

# %%
place = Path(folder or tempfile.mkdtemp())
prepare()
if processes > 1:
    subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc-per-node',
            str(processes),
            '-m',
            'semidetr.cli',
            'train',
            '--config',
            str(place / 'config.json'),
            '--out',
            str(place),
            '--quiet',
        ],
        check=True,
    )
result = run_config(cfg, place, progress=False)
assert result['hash'] == config_hash(cfg)
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
    'pseudo boxes an image': round(health['pseudo_boxes'], 2) if 'pseudo_boxes' in health else 'none',
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
#| fig-cap: "The loss over the iterations, and where there is a teacher, its boxes an image: a method that finds no pseudo labels shows here first."
#| fig-alt: "Loss per iteration, and pseudo boxes per image"
curve = record(result, place)['curve']
fig, ax = plt.subplots(figsize=(6, 2.8), dpi=80)
ax.plot(curve['step'], curve['loss'], color=COLORS['student'])
ax.set(xlabel='iteration', ylabel='loss')
if 'pseudo_boxes' in curve:
    other = ax.twinx()
    other.plot(
        curve['step'],
        [x if x is not None else float('nan') for x in curve['pseudo_boxes']],
        color=COLORS['teacher'],
    )
    other.set(ylabel='pseudo boxes an image', ylim=(0, None))
plt.show()

# %% [markdown]
# ## Summary
#
# - The configuration comes from a file beside the results, and its hash is compared with the one that was
#   asked for.
# - What is shown here is what `run.json` and `log.jsonl` hold; the record of the study keeps the same
#   numbers.
