# %% [markdown]
# # The runs of a study {#sec-plan}
#
# > List every run of a study, how far each is, and what is missing, before the first one starts.
#
# A study is a table of settings (@sec-study). Before anything is trained, three questions need an answer:
# which runs does the table define, which of them are finished, and can the others run at all? The command
# that runs a study (@sec-ablate) and its dry run (@sec-dry-run) need the same answers, so they are found
# here, once.

# %%
#| default_exp lab.plan

# %%
#| export
import functools
import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from semidetr.core import ConfigError, SemiDETRError, suggest
from semidetr.data.catalog import open_further
from semidetr.lab.study import branches, load_study
from semidetr.train.config import Config, override
from semidetr.train.run_folder import folder_state
from semidetr.train.run_data import build_data

# %%
#| hide
import tempfile
import matplotlib.pyplot as plt

# %% [markdown]
# ## From a table to runs
#
# A study of $g$ groups, $s$ seeds and $a$ arms is $g \cdot s \cdot (a+1)$ runs: in each group and seed the
# arms wait for their burn-in. Without a burn-in it is $g \cdot s \cdot a$ runs. Every run has a folder; paths are relative to the top folder of the checkout,
# because the path of the burn-in is part of a configuration and thus of its hash.

# %%
#| export
STUDIES = Path('nbs/ablations/studies.toml')  # below the top folder of a checkout


@dataclass(frozen=True)
class Run:
    "One run of a study"

    study: str
    scale: str
    group: str  # '' in a study without groups
    seed: int
    arm: str  # or 'burn_in'
    where: str  # below the folders of runs and of records: study, and group if there is one
    cfg: Config
    folder: Path
    start: Path | None = None  # folder of the burn-in that it waits for

    @property
    def title(self):
        return ' '.join(filter(None, (self.study, self.group, f'seed {self.seed}', self.arm)))

    @property
    def notebook(self):
        return self.folder / 'run.ipynb'


def plan(
    path,  # TOML file of studies
    name: str,  # of the study
    scale: str = '',  # as for `load_study`
    seeds=None,  # those of the study if None
    out='runs/studies',  # folder of the runs
    data: str = '',  # data set instead of the study's own
    only: tuple = (),  # names of groups; empty: all
) -> list:  # of Run, each burn-in before its arms
    "All runs of a study; at another scale than its own a study has folders of its own"
    s = load_study(path, name, scale)
    runs = []
    if unknown := sorted(set(only) - set(s['groups'])):
        known = suggest(unknown[0], s['groups']) if any(s['groups']) else 'it has none at all'
        raise ConfigError(f"{path}: study {name} has no group '{unknown[0]}'; {known}")
    places = ('val', 'unlabelled', 'split_file', 'images')
    own = [f'data.data={data}', *(f'data.{k}=' for k in places)] if data else []
    place = lambda study: Path(study if s['home'] else f"{study}-{s['scale']}")
    groups = {g: base for g, base in s['groups'].items() if not only or g in only}
    for (group, base), seed in itertools.product(groups.items(), s['seeds'] if seeds is None else seeds):
        where = place(name) / group
        first = Path(out) / place(s['start']) / group  # folder of the study whose burn-in it is
        made = branches(override(base, own), s['burn_in'], s['arms'], Path(out) / where, seed, first)
        _, start = made.get('burn_in', (None, None))
        for arm, (cfg, folder) in made.items():
            # neither of these two settings is part of the hash
            every = min(cfg.run.checkpoint_every, max(1, cfg.optim.iters // 4))
            cfg = override(cfg, [f'run.threads={cfg.run.threads or 1}', f'run.checkpoint_every={every}'])
            waits_for = None if arm == 'burn_in' else start
            run = Run(name, s['scale'], group, seed, arm, where.as_posix(), cfg, folder, waits_for)
            if cfg.run.amp == 'auto':
                raise ConfigError(
                    f'{path}: {run.title}: run.amp=auto may choose another precision for another arm; '
                    'write off, bf16 or fp16'
                )
            runs.append(run)
    return runs


# %%
#| export
def state(
    run: Run,  # of `plan`
) -> tuple:  # ('finished', 'resumable', 'new' or what is in the way; one line about it, or '')
    "How far a run is (@sec-run-folder); without its executed notebook a finished run counts as resumable"
    found = folder_state(run.cfg, run.folder)
    if found.kind == 'stopped' or (found.kind == 'finished' and not run.notebook.exists()):
        return 'resumable', ''
    return found.kind, f'{run.title}: {found.message}' if found.message else ''


def distinct(
    runs: list,  # of Run
) -> list:  # the first of each folder
    "Each run once: studies may share a burn-in"
    first = {}
    for r in runs:
        first.setdefault(r.folder, r)
    return list(first.values())


# %%
toy_file = Path(tempfile.mkdtemp()) / 'studies.toml'
toy_file.write_text("""
[toy]
preset = "digits"
seeds = [0, 1]
burn_in = ["optim.iters=200"]
later = ["optim.iters=300"]
[toy.arms]
supervised = ["method.name=supervised"]
mean_teacher = ["method.name=mean_teacher"]
""")
toy = plan(toy_file, 'toy')
assert len(toy) == 6 and toy[1].start == toy[0].folder
assert {state(r) for r in toy} == {('new', '')}
[(r.title, str(r.folder), r.cfg.optim.iters) for r in toy[:3]]


# %% [markdown]
# ## Missing data
#
# A data set that is not there is found before the first iteration, not when its run begins an hour later.

# %%
#| export
@functools.cache
def _opening_error(spec, split, images):
    "Why a data set cannot be opened, or ''"
    try:
        open_further(spec, split, images)
    except SemiDETRError as e:
        return str(e)
    return ''


@functools.cache
def open_all(
    data,  # DataConfig
    test: bool = True,  # is the test split needed?
) -> tuple:  # ((labelled images, unlabelled images) or None, lines that say what is missing)
    "Open all data of a run"
    needed = [(data.data, 'train'), (data.unlabelled, 'train')]
    if test:
        needed.insert(1, (data.val or data.data, 'val'))
    errors = [_opening_error(spec, split, data.images) for spec, split in needed if spec]
    if any(errors):
        return None, tuple(filter(None, errors))
    try:
        d = build_data(data)
    except SemiDETRError as e:
        return None, (str(e),)
    return (len(d.labelled), len(d.unlabelled or ())), ()


def without_data(
    runs: list,  # of Run
) -> tuple:  # (folders of runs whose data are missing, or whose burn-in's; one line per cause)
    "Runs that cannot start because data are missing"
    lost, causes = set(), {}
    for r in distinct(runs):
        errors = open_all(replace(r.cfg.data, fold=0), r.cfg.run.test)[1]
        if errors:
            causes.setdefault(errors[0], []).append(r)
        if errors or r.start in lost:
            lost.add(r.folder)
    lines = []
    for why, affected in causes.items():
        more = f' and {len(affected) - 1} more' if len(affected) > 1 else ''
        lines.append(f'{affected[0].title}{more}: {why}')
    return lost, lines


def find_book() -> Path:  # top folder of the checkout
    "The checkout that this is run in"
    for d in (Path.cwd(), *Path.cwd().parents):
        if (d / STUDIES).is_file():
            return d
    raise ConfigError(f'no {STUDIES} here or above; run this in a checkout of the book')


# %% [markdown]
# A study whose second data set is not there: none of its runs can start, and the cause is named once.

# %%
lost_file = toy_file.with_name('lost.toml')
lost_file.write_text("""
[lost]
preset = "digits"
[lost.groups.data]
digits = ["data.count=20"]
mine = ["data.data=no_such_set"]
[lost.arms]
supervised = ["method.name=supervised"]
mean_teacher = ["method.name=mean_teacher"]
""")
lost_runs, causes = without_data(plan(lost_file, 'lost'))
assert len(lost_runs) == 2 and len(causes) == 1 and 'no_such_set' in causes[0]
causes[0].partition(':')[0]

# %%
#| label: fig-plan-order
#| fig-cap: "The runs of a study with two seeds: within a seed the arms wait for the burn-in, seeds do not wait for each other."
#| fig-alt: "Two rows of boxes; in each row an arrow leads from the burn-in to two arms."
fig, ax = plt.subplots(figsize=(6.4, 1.8), dpi=80)
for row, seed in enumerate((0, 1)):
    names = [r.arm for r in toy if r.seed == seed]
    for column, name in enumerate(names):
        x, y = (0, row) if column == 0 else (1, row + 0.22 * (3 - 2 * column))
        style = dict(ha='center', va='center', fontsize=9, bbox=dict(boxstyle='round', facecolor='white'))
        ax.text(x, y, f'seed {seed}: {name}', **style)
        if column:
            ax.annotate('', (0.72, y), (0.25, row), arrowprops=dict(arrowstyle='->'))
ax.set(xlim=(-0.4, 1.4), ylim=(-0.5, 1.5))
ax.set_axis_off()
plt.show()

# %% [markdown]
# ## Summary
#
# - `plan` turns a table into runs, each burn-in before its arms; the path of a run follows from its study,
#   group, seed and arm.
# - `state` says how far a run is, and what in its folder is in the way.
# - `without_data` opens all data once and names what is missing.
#
# ## Exercises
#
# 1. Why is the path of the burn-in part of the hash of its arms? What would you hash instead?
