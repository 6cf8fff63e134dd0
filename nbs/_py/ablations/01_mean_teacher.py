# %% [markdown]
# # Twenty labels, thousands of pictures {#sec-abl-demo}
#
# > What unlabelled images are worth on the built-in scenes: supervised against mean teacher, pair by pair.
#
# Both continuations start from the same burn-in checkpoint, keep the same twenty labelled scenes, see twelve images an iteration and run for the same number of iterations; seeds change the labelled scenes, the initial weights and the order of the data. The numbers are those of the averaged network (the teacher; for supervised training the same average of the student), on the test split, without non-maximum suppression. `make book` runs the first seed again and executes this page with what it found.

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
committed = Path('results/digits_mean_teacher.json')
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
get = lambda r, name, k='AP': r['arms'][name]['metrics']['val']['teacher'][k]
gain = paired_difference([get(r, 'supervised') for r in study['runs']], [get(r, 'mean_teacher') for r in study['runs']])
arm = study['runs'][0]['arms']
holds = gain['mean'] >= 2
sentence = (f"Unlabelled scenes add {gain['mean']:.1f} AP on average over {gain['n']} seeds (standard deviation {gain['std']:.1f}; each: "
            + ', '.join(f'{d:+.1f}' for d in gain['each']) + ').' if holds else f"No gain of 2 AP was found at this scale: {gain['mean']:+.1f} on average over {gain['n']} seeds.")
assert gain['n'] >= 3 and holds and min(gain['each']) > 0, sentence
assert max(get(r, 'supervised') for r in study['runs'])-min(get(r, 'supervised') for r in study['runs']) > gain['mean'] # the caption below
cost = ', '.join(f"{n.replace('_', ' ')} {a['cpu_seconds']/60:.1f} CPU-minutes" for n, a in arm.items())
markdown(f"**{sentence}** Scale: {arm['mean_teacher']['data']['labelled']} labelled and {arm['mean_teacher']['data']['unlabelled']} unlabelled scenes of 96 px; "
         f"after the shared burn-in ({study['runs'][0]['burn_in']['cpu_seconds']/60:.1f} CPU-minutes) {cost}; one thread each. "
         f"Commit {arm['mean_teacher']['commit']}, configurations {', '.join(a['hash'] for a in arm.values())}.")

# %%
#| label: fig-abl-demo-gain
#| fig-cap: "Each line is one seed from supervised to mean teacher: the seeds differ by more than the methods, and every pair rises."
#| fig-alt: "AP of supervised and mean teacher training, one line a seed"
#| echo: false
fig, ax = plt.subplots(figsize=(4, 2.8), dpi=80)
for r in study['runs']: ax.plot([0, 1], [get(r, 'supervised'), get(r, 'mean_teacher')], 'o-', color=COLORS['teacher'], label=None)
ax.set(xticks=[0, 1], xticklabels=['supervised', 'mean teacher'], ylabel='AP', xlim=(-.3, 1.3)); plt.show()

# %% [markdown]
# ## The teacher's labels, against the hidden truth
#
# The method never sees the boxes of the unlabelled scenes; the health monitor (@sec-health) does.

# %%
#| label: fig-abl-demo-health
#| fig-cap: "Pseudo labels against the hidden truth, over a moving window: the low threshold keeps many wrong boxes and finds about half of the objects."
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
#| fig-cap: "The same test scenes: truth, supervised and mean teacher, all detections with a score of at least 0.3."
#| fig-alt: "Grid of scenes with true boxes and the detections of both methods"
#| echo: false
picture(mine or study); plt.show()

# %%
#| hide
picture(study, n=3).savefig('results/home.png', dpi=90, bbox_inches='tight')
both = [(n, [get(r, n) for r in study['runs']], [get(r, n, 'AP50') for r in study['runs']]) for n in ('supervised', 'mean_teacher')]
cells = [[n.replace('_', ' '), f'{sum(a)/len(a):.1f}', f'{sum(b)/len(b):.1f}', ', '.join(f'{x:.1f}' for x in a)] for n, a, b in both]
write_home('results/_home.md', 'nbs/ablations/results/home.png', 'Scenes of the test split: truth, supervised and mean teacher (seed 0), both from the same twenty labelled scenes.',
           'Three scenes with true boxes and the detections of both methods', markdown_table(['method', 'AP', 'AP50', 'AP of each seed'], cells),
           f"Twenty labelled scenes, {gain['n']} seeds, means on 300 test scenes: the unlabelled ones add {gain['mean']:.1f} AP")

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
# - With twenty labels the detector is far from what its size allows; every seed gains from unlabelled scenes.
# - The gain is paired: same split, same start, same number of images.
# - At this threshold many pseudo labels are wrong, and the student gains all the same.
# - To repeat the whole study: `semidetr demo --seed 0 --seed 1 --seed 2`.
