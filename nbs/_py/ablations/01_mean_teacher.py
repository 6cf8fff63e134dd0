# %% [markdown]
# # Twenty labels, thousands of pictures {#sec-abl-demo}
#
# > What unlabelled images are worth on the built-in scenes: supervised training, mean teacher and Semi-DETR, pair by pair.
#
# All continuations start from the same burn-in checkpoint, keep the same twenty labelled scenes, see twelve images an iteration and run for the same number of iterations; seeds change the labelled scenes, the initial weights and the order of the data. The numbers are those of the averaged network (the teacher; for supervised training the same average of the student), on the test split, without non-maximum suppression. `make book` runs the first seed again and executes this page with what it found.

# %% tags=["parameters"]
results = ''  # folder with results.json; empty: the run of `make book` if there is one, else the committed study

# %%
#| hide
import json
from pathlib import Path
import matplotlib.pyplot as plt
from semidetr.demo import picture, table
from semidetr.draw import COLORS
from IPython.display import Markdown as markdown
from semidetr.pages import markdown_table, write_home
from semidetr.study import paired_difference

# %%
#| hide
committed = Path('results/digits.json')
fresh = Path(results or '../../runs/demo')/'results.json'
study = json.loads(committed.read_text())
mine = json.loads(fresh.read_text()) if fresh.exists() else None

# %% [markdown]
# ## The study

# %%
#| label: tbl-abl-demo-seeds
#| tbl-cap: "COCO AP and AP50 on 300 test scenes, in percent, for each seed of the committed study."
#| echo: false
markdown('\n'.join(table(study)))


# %%
#| echo: false
def get(r, name, k='AP'): return r['arms'][name]['metrics']['val']['teacher'][k]
arms = study['runs'][0]['arms']
others = [n for n in arms if n != 'supervised']
gains = {n: paired_difference([get(r, 'supervised') for r in study['runs']], [get(r, n) for r in study['runs']]) for n in others}
def verdict(name, g):
    each = f"over {g['n']} seeds (standard deviation {g['std']:.1f}; each: "+', '.join(f'{d:+.1f}' for d in g['each'])+')'
    return f"{name.replace('_', ' ')} adds {g['mean']:.1f} AP on average {each}" if min(g['each']) > 0 else f"{name.replace('_', ' ')}: no gain in every seed at this scale, {g['mean']:+.1f} AP on average {each}"
sentence = '; '.join(verdict(n, g) for n, g in gains.items())
assert all(g['n'] >= 3 for g in gains.values()) and gains['mean_teacher']['mean'] >= 2, sentence
cost = ', '.join(f"{n.replace('_', ' ')} {a['cpu_seconds']/60:.1f} CPU-minutes" for n, a in arms.items())
one = arms['mean_teacher']
markdown(f"**Against supervised training, {sentence}.** Scale: {one['data']['labelled']} labelled and {one['data']['unlabelled']} unlabelled scenes of 96 px; "
         f"after the shared burn-in ({study['runs'][0]['burn_in']['cpu_seconds']/60:.1f} CPU-minutes) {cost}; one thread each. "
         f"Commit {one['commit']}, configurations {', '.join(a['hash'] for a in arms.values())}. Which part of Semi-DETR adds what: @sec-abl-components.")

# %%
#| label: fig-abl-demo-gain
#| fig-cap: "Each line is one seed through the methods: seeds differ by as much as methods do, so methods are compared within a seed."
#| fig-alt: "AP of the methods, one line a seed"
#| echo: false
fig, ax = plt.subplots(figsize=(4.5, 2.8), dpi=80)
for r in study['runs']: ax.plot(range(len(arms)), [get(r, n) for n in arms], 'o-', color=COLORS['teacher'])
ax.set(xticks=range(len(arms)), xticklabels=[n.replace('_', ' ') for n in arms], ylabel='AP', xlim=(-.3, len(arms)-.7)); plt.show()

# %% [markdown]
# ## The teacher's labels, against the hidden truth
#
# The method never sees the boxes of the unlabelled scenes; the health monitor (@sec-health) does.

# %%
#| label: fig-abl-demo-health
#| fig-cap: "Pseudo labels of the mean teacher against the hidden truth, over a moving window: at this threshold many boxes are wrong, and many objects are missed."
#| fig-alt: "Precision and recall of the pseudo labels over the iterations"
#| echo: false
fig, ax = plt.subplots(figsize=(5, 2.8), dpi=80)
for r in study['runs']:
    c = r['arms']['mean_teacher']['curve']
    ax.plot(c['step'], c['pseudo_precision'], color=COLORS['teacher'], label='precision' if r is study['runs'][0] else None)
    ax.plot(c['step'], c['pseudo_recall'], color=COLORS['student'], label='recall' if r is study['runs'][0] else None)
ax.set(xlabel='iteration', ylim=(0, 1)); ax.legend(); plt.show()

# %% [markdown]
# ## What they see

# %%
#| label: fig-abl-demo-pictures
#| fig-cap: "The same test scenes: truth and all methods, detections with a score of at least 0.3."
#| fig-alt: "Grid of scenes with true boxes and the detections of all methods"
#| echo: false
picture(mine or study, n=4)

# %%
#| hide
picture(study, n=3).savefig('results/home.png', dpi=90, bbox_inches='tight')
each = [(n, [get(r, n) for r in study['runs']], [get(r, n, 'AP50') for r in study['runs']]) for n in arms]
cells = [[n.replace('_', ' '), f'{sum(a)/len(a):.1f}', f'{sum(b)/len(b):.1f}', ', '.join(f'{x:.1f}' for x in a)] for n, a, b in each]
write_home('results/_home.md', 'nbs/ablations/results/home.png', 'Scenes of the test split: truth, supervised training, mean teacher and Semi-DETR (seed 0), all from the same twenty labelled scenes.',
           'Three scenes with true boxes and the detections of all methods', markdown_table(['method', 'AP', 'AP50', 'AP of each seed'], cells),
           f"Twenty labelled scenes, {len(study['runs'])} seeds, means on 300 test scenes: unlabelled scenes add {gains['mean_teacher']['mean']:.1f} AP through a mean teacher and {gains['semi_detr']['mean']:.1f} through Semi-DETR")

# %% [markdown]
# ## Your run
#
# When this page was last executed by `make book`, its own run gave:

# %%
#| echo: false
markdown('\n'.join(table(mine)) if mine else '*No run of `make book` was found beside this page; the pictures above are those of the committed study.*')

# %% [markdown]
# ## Summary
#
# - With twenty labels the detector is far from what its size allows; unlabelled scenes add several points on average.
# - The gain is paired: same split, same start, same number of images.
# - At this threshold many pseudo labels are wrong, and the student gains all the same.
# - The continuations begin with the ramp of the average, which costs the mean teacher more than Semi-DETR (@sec-abl-components): what both gain over labels alone is safe, the distance between the two is not.
# - To repeat the whole study: `semidetr demo --seed 0 --seed 1 --seed 2`.
