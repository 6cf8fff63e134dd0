# %% [markdown]
# # Rivals from whatever has been run {#sec-rivals-page}
#
# > Compare detectors and methods from the records that exist, and name the studies that are missing.
#
# *Why.* Soft Teacher and Dense Teacher belong to other detectors than Semi-DETR, so their runs are studies of
# their own. Some of them exist before the others do, with one seed before there are three. A page that needs all
# of them shows nothing for a long time; one that prints what it finds must say what is missing, give no interval
# where one seed allows none, and pair only seeds that both sides have. @sec-abl-rivals is that page, and this
# chapter has its functions.
#
# With $A_s$ and $B_s$ the AP of two methods on one detector after seed $s$, a method is compared with the
# supervised training of its own detector,
#
# $$
# d_s = A_s - B_s ,
# $$ {#eq-rivals-gain}
#
# so that a detector that is better on small images does not count for its method.

# %%
#| default_exp lab.rivals

# %%
#| export
import time
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple
import matplotlib.pyplot as plt
import torch
from semidetr.detectors.contract import build_detector
from semidetr.detectors.from_detr import DETECTORS
from semidetr.lab.report import METHOD_COLORS, difference, markdown_table, plus_minus, read_records
from semidetr.lab.report import spread, values
from semidetr.train.config import override, preset, with_detector

# %%
#| hide
import json
import tempfile
from IPython.display import Markdown as markdown


# %% [markdown]
# ## What is compared
#
# A detector, the method that was made for it, and where its records are. Arms are named after their methods, but
# for Semi-DETR, which is the last step of a study of its parts (@sec-abl-components).

# %%
#| export
class Rival(NamedTuple):
    "A detector with a method of its own, and the studies that trained it"

    detector: str  # a key of `DETECTORS`
    title: str  # of the detector
    own: str  # arm of the method that was made for it
    method: str  # title of that method
    studies: dict  # labelled images -> study and group
    suppresses: bool  # is suppression a part of the detector?

    @property
    def arms(self) -> dict:  # arm -> title
        "Methods in the order in which they are shown"
        return dict(supervised='supervised', mean_teacher='mean teacher') | {self.own: self.method}


RIVALS = (
    Rival(
        'faster_rcnn',
        'Faster R-CNN',
        'soft_teacher',
        'Soft Teacher',
        {20: 'soft_teacher/c20', 50: 'soft_teacher/c50'},
        True,
    ),
    Rival(
        'fcos',
        'FCOS',
        'dense_teacher',
        'Dense Teacher',
        {20: 'dense_teacher/c20', 50: 'dense_teacher/c50'},
        True,
    ),
    Rival('dino', 'DINO', 'shm_cqc_cpm', 'Semi-DETR', {20: 'components', 50: 'components_50'}, False),
)
RATES = 'rival_rates'  # study of the learning rates


# %%
#| export
class Measured(NamedTuple):
    "The records of one detector with one number of labels"

    rival: Rival
    labels: int  # labelled images
    runs: list  # of `read_records`; seeds may lack arms

    def seeds(
        self,
        *arms,  # of the study
    ) -> list:  # records
        "The seeds that have all of these arms"
        return [r for r in self.runs if set(arms) <= set(r['arms'])]


def existing(
    results,  # folder of results
    study: str,  # and group
) -> list:  # of `read_records`; empty where nothing has been run
    "The records of a study that may not have been run"
    some = any((Path(results) / study).glob('seed*.json'))
    return read_records(results, study) if some else []


def measured(
    results,  # folder of results
    rivals=RIVALS,
) -> list:  # of `Measured`, by labels
    "Everything that has been run"
    found = [Measured(r, n, existing(results, s)) for r in rivals for n, s in r.studies.items()]
    return sorted((m for m in found if m.runs), key=lambda m: m.labels)


def to_run(
    results,  # folder of results
    rivals=RIVALS,
) -> str:  # one line of Markdown; '': every study has a record
    "Which studies have no record, and the command that runs them"
    names = dict.fromkeys(
        s.partition('/')[0] for r in rivals for s in r.studies.values() if not existing(results, s)
    )
    return f"Not complete: `semidetr ablate {' '.join(names)}`." if names else ''


# %%
def fabricated(folder, study, seed, **arms):
    "A record with these AP"
    shared = dict(hash='h', commit='c', iterations=300, seconds=60.0, cpu_seconds=60.0, machine='m')
    shared['data'] = dict(labelled=20, unlabelled=80)
    made = {}
    for arm, ap in arms.items():
        shown = dict(AP=ap, AP50=2 * ap, AP_nms=ap + 1)
        made[arm] = shared | dict(config={}, metrics=dict(val=dict(teacher=shown)))
    path = Path(folder) / study / f'seed{seed}.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(study=study.partition('/')[0], seed=seed, arms=made)))


made_up = tempfile.mkdtemp()
assert measured(made_up) == [] and 'ablate soft_teacher dense_teacher components' in to_run(made_up)
fabricated(made_up, 'soft_teacher/c20', 0, supervised=20.0, mean_teacher=23.0, soft_teacher=25.0)
for seed, gain in enumerate((4.0, 5.0, 6.0)):
    fabricated(made_up, 'components', seed, supervised=18.0, shm_cqc_cpm=18 + gain)
assert [(m.rival.title, len(m.runs)) for m in measured(made_up)] == [('Faster R-CNN', 1), ('DINO', 3)]
to_run(made_up)


# %% [markdown]
# ## Time and size
#
# The detectors differ in what an image costs, so the table has the CPU time of one image and the number of
# parameters, of the network that the preset of these studies builds. The time is that of the process and not that
# by the clock, on one thread, and includes the suppression of those that have one.

# %%
#| export
def network_cost(
    name: str,  # a key of `DETECTORS`
    side: int = 96,  # pixels of a square image
    repeats: int = 5,  # images; the median counts
) -> tuple:  # (CPU-milliseconds per image, millions of parameters)
    "What the small form of a detector costs, with random weights and 10 classes"
    base = preset('digits')
    cfg = base if name == 'dino' else with_detector(base, name)
    cfg = override(cfg, ['detector.num_classes=10', 'detector.backbone.weights=none'])
    torch.manual_seed(0)
    model, threads, seconds = build_detector(cfg.detector).eval(), torch.get_num_threads(), []
    torch.set_num_threads(1)
    with torch.no_grad():
        for _ in range(repeats + 1):
            start = time.process_time()
            model(torch.rand(1, 3, side, side))
            seconds.append(time.process_time() - start)
    torch.set_num_threads(threads)
    return 1000 * median(seconds[1:]), sum(p.numel() for p in model.parameters()) / 1e6


# %%
cost = {r.detector: network_cost(r.detector, repeats=2) for r in RIVALS}
assert all(ms > 1 and 1 < size < 20 for ms, size in cost.values()) and set(cost) <= set(DETECTORS)
{name: f'{size:.1f} M' for name, (_, size) in cost.items()}


# %% [markdown]
# ## The table and its sentences
#
# A difference of one seed is printed without an interval, and the line below the table says how many seeds there
# are.

# %%
#| export
def rival_rows(
    found: list,  # of `Measured`
    cost: dict,  # detector -> (milliseconds, millions)
) -> tuple:  # headings, rows
    "Detector x method x labels"
    columns = ['detector', 'method', 'labels', 'seeds', 'AP', 'AP50', 'AP with NMS']
    columns += ['against supervised', 'CPU-ms per image', 'parameters (M)']
    rows = []
    for rival, labels, runs in found:
        for arm, title in rival.arms.items():
            here = Measured(rival, labels, runs).seeds(arm)
            if not here:
                continue
            row = [rival.title, title, labels, len(here), spread(values(here, arm))]
            row.append(f"{mean(values(here, arm, 'AP50')):.1f}")
            row.append('built in' if rival.suppresses else f"{mean(values(here, arm, 'AP_nms')):.1f}")
            row.append(gain(Measured(rival, labels, runs), arm))
            ms, size = cost[rival.detector]
            rows.append([*row, f'{ms:.0f}', f'{size:.1f}'])
    return columns, rows


def gain(
    m: Measured,
    arm: str,  # of the study
) -> str:  # '': there is nothing to compare with
    "A method against the supervised training of its detector (@eq-rivals-gain); one seed has no interval"
    both = m.seeds(arm, 'supervised')
    return '' if arm == 'supervised' or not both else plus_minus(difference(both, arm, 'supervised'))


def rival_table(
    found: list,  # of `Measured`
    cost: dict,  # detector -> (milliseconds, millions)
) -> str:  # Markdown
    "The same as a table; one line where nothing has been run"
    columns, rows = rival_rows(found, cost)
    return markdown_table(columns, rows, align='llrrrrrrrr') if rows else '*No training has been run yet.*'


# %%
table = rival_table(measured(made_up), cost)
lines = table.splitlines()
assert len(lines) == 2 + 3 + 2 and '| +5.0 |' in lines[4], 'one seed: no interval'
assert '+5.0\u00a0±\u00a02.5' in lines[-1] and rival_table([], cost).startswith('*No training')
markdown(table)


# %%
#| export
def finding(
    found: list,  # of `Measured`
    missing: str = '',  # of `to_run`
) -> str:  # Markdown: two or three sentences
    "What the records say: the gain of each detector's own method, and how sure that is"
    said, single = {}, False
    for m in found:
        both = m.seeds(m.rival.own, 'supervised')
        if both:
            d = difference(both, m.rival.own, 'supervised')
            single |= d['n'] == 1
            text = (
                f'{m.rival.method} on {m.rival.title} {mean(values(both, m.rival.own)):.1f} ({plus_minus(d)})'
            )
            said.setdefault(m.labels, []).append(text)
    rivals = any(m.rival.suppresses and m.seeds(m.rival.own) for m in found)
    lines = [] if rivals else ['No training of a rival has been run yet.']
    for labels, texts in said.items():
        lines.append(f"AP with {labels} labelled images: {', '.join(texts)}.")
    if said:
        lines.append('In brackets: against supervised training of the same detector.')
    if single:
        lines.append('Where no 95 % interval stands behind ±, there is one seed.')
    return ' '.join([*lines, missing]).strip()


# %%
text = finding(measured(made_up), to_run(made_up))
assert 'AP with 20 labelled images: Soft Teacher on Faster R-CNN 25.0 (+5.0), Semi-DETR on DINO 23.0' in text
assert 'there is one seed' in text and text.endswith('components_50`.')
assert finding([], 'Not complete: x.') == 'No training of a rival has been run yet. Not complete: x.'
text


# %% [markdown]
# ## Learning rates
#
# A rival with a learning rate that suits another detector is weak by neglect. The sweep is measured on the
# development part, which is not part of the table above.

# %%
#| export
def rate_rows(
    runs: list,  # of `existing`; the study of learning rates
) -> tuple:  # headings, rows
    "AP of each detector on the development part at each learning rate, mean over the seeds"
    arms = dict.fromkeys(a for r in runs for a in r['arms'])
    rows = []
    for arm in arms:
        here = [r for r in runs if arm in r['arms']]
        rate = here[0]['arms'][arm]['config']['optim']['lr']
        detector = next((r.title for r in RIVALS if arm.startswith(r.detector)), arm)
        ap = values(here, arm, part='dev')
        rows.append([detector, f'{rate:g}', here[0]['arms'][arm]['iterations'], len(here), spread(ap)])
    return ['detector', 'learning rate', 'iterations', 'seeds', 'AP (development)'], rows


def rate_table(
    runs: list,  # of `existing`
) -> str:  # Markdown
    "The same as a table; one line where the sweep has not been run"
    if not runs:
        return f'*The sweep of learning rates has not been run yet: `semidetr ablate {RATES}`.*'
    return markdown_table(*rate_rows(runs))


# %%
assert 'semidetr ablate rival_rates' in rate_table([])
swept = dict(iterations=300, config=dict(optim=dict(lr=5e-4)))
swept['metrics'] = dict(dev=dict(teacher=dict(AP=12.0)))
rates = rate_table([dict(seed=0, arms=dict(fcos_low=swept))])
assert rates.splitlines()[-1] == '| FCOS | 0.0005 | 300 | 1 | 12.0 |'
markdown(rates)

# %% [markdown]
# ## The picture

# %%
#| export
_SHADES = [
    METHOD_COLORS[name] for name in ('supervised', 'mean_teacher', 'semi_detr')
]  # the last: own method


def plot_rivals(
    found: list,  # of `Measured`
):
    "AP of every seed, one panel per number of labels; returns the figure"
    labels = sorted({m.labels for m in found}) or [0]
    fig, axes = plt.subplots(
        1,
        len(labels),
        figsize=(4 * len(labels), 2.8),
        dpi=80,
        sharey=True,
        squeeze=False,
        layout='constrained',
    )
    for ax, n in zip(axes[0], labels):
        here = [m for m in found if m.labels == n]
        for x, m in enumerate(here):
            for i, arm in enumerate(m.rival.arms):
                ap, at = values(m.seeds(arm), arm), x + 0.25 * (i - 1)
                ax.plot([at] * len(ap), ap, 'o', color=_SHADES[i], markersize=4)
                if ap:
                    ax.plot(at, mean(ap), '_', color=_SHADES[i], markersize=14, markeredgewidth=2)
        names = [f'{m.rival.title}\n{m.rival.method}' for m in here]
        ax.set(xticks=range(len(here)), title=f'{n} labelled images' if n else 'nothing has been run')
        ax.set_xticklabels(names, fontsize=9)
    axes[0, 0].set_ylabel('AP')
    for color, name in zip(_SHADES, ('supervised', 'mean teacher', "the detector's own method")):
        axes[0, 0].plot([], [], 'o', color=color, label=name)
    axes[0, 0].legend(fontsize=9)
    return fig


# %%
#| label: fig-rivals-made-up
#| fig-cap: "The picture for made-up records: one seed of Soft Teacher and three of Semi-DETR. A point is a seed, a bar the mean."
#| fig-alt: "Two columns of points: three methods on Faster R-CNN, two methods on DINO"
shown = plot_rivals(measured(made_up))
assert len(shown.axes) == 1 and len(plot_rivals([]).axes) == 1
plt.close(plt.gcf())
shown

# %% [markdown]
# ## Summary
#
# - What exists is shown, what does not is named with the command that runs it.
# - A method is compared with supervised training of its own detector, over the seeds that have both.
# - One seed gives a difference and no interval.
#
# ## Exercises
#
# 1. A study has seeds 0 to 2 of one arm and 0 to 4 of the other. How many differences are there?
# 2. Why is AP of Faster R-CNN without suppression not in the table?
# 3. Add a third rival. Which lines change?
