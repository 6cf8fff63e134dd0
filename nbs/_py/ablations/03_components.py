# %% [markdown]
# # The parts of Semi-DETR {#sec-abl-components}
#
# > What hybrid matching, cross-view consistency and mining each add on the built-in scenes, seed by seed.
#
# The arms are cumulative, as in the component table of the paper: supervised training, a mean teacher, then stage-wise hybrid matching (SHM, @sec-matching), cross-view query consistency on the trusted boxes (CQC, @sec-consistency), and mining of more boxes for it (CPM, @sec-mining). Within a seed all arms start from one burn-in checkpoint, keep the same twenty labelled scenes, and take the same number of iterations and images. Settings were chosen on the development part of seed 0; the test split was read for this table.

# %% tags=["parameters"]
results = 'results/components'  # folder with one JSON a seed

# %%
#| hide
import json
from pathlib import Path
from statistics import mean, stdev
import matplotlib.pyplot as plt
from IPython.display import Markdown as markdown
from scipy.stats import t as student_t
from semidetr.draw import COLORS
from semidetr.pages import markdown_table
from semidetr.study import paired_difference

# %%
#| hide
runs = [json.loads(p.read_text()) for p in sorted(Path(results).glob('seed*.json'))]
names = dict(supervised='supervised', mean_teacher='mean teacher', shm='+ SHM', shm_cqc='+ SHM + CQC', shm_cqc_cpm='+ SHM + CQC + CPM')
def get(arm, key='AP', who='teacher'): return [r['arms'][arm]['metrics']['val'][who][key] for r in runs]
def interval(d):
    "Half width of the 95 % interval of a mean of paired differences"
    return student_t.ppf(.975, d['n']-1)*d['std']/d['n']**.5
difference = {arm: paired_difference(get('mean_teacher'), get(arm)) for arm in names if arm != 'mean_teacher'}

# %% [markdown]
# ## The table

# %%
#| label: tbl-abl-components
#| tbl-cap: "COCO AP on 300 test scenes, in percent, without suppression: mean and standard deviation over the seeds, and the paired difference to the mean teacher with its 95 % interval."
#| echo: false
rows = []
for arm, name in names.items():
    d = difference.get(arm)
    rows.append([name, f'{mean(get(arm)):.1f} ± {stdev(get(arm)):.1f}', f"{mean(get(arm, 'AP50')):.1f}", f"{mean(get(arm, who='student')):.1f}", ', '.join(f'{x:.1f}' for x in get(arm)),
                 f"{d['mean']:+.1f} ± {interval(d):.1f}" if d else '', f"{mean(r['arms'][arm]['cpu_seconds'] for r in runs)/60:.1f}"])
markdown(markdown_table(['arm', 'AP', 'AP50', 'AP of the student', 'AP of each seed', 'against mean teacher', 'CPU-minutes'], rows))


# %%
#| echo: false
def verdict(arm, base):
    d = paired_difference(get(base), get(arm))
    half, what = interval(d), f"{names[arm].removeprefix('+ ')} against {names[base].removeprefix('+ ')}: {d['mean']:+.1f} AP on average over {d['n']} seeds, 95 % interval ±{interval(d):.1f} (each: "+', '.join(f'{x:+.1f}' for x in d['each'])+')'
    return what+('.' if abs(d['mean']) > half else '; no difference found at this scale.')
first, chain = runs[0]['arms']['shm_cqc_cpm'], list(names)
lines = [verdict('shm_cqc_cpm', 'supervised'), *(verdict(b, a) for a, b in zip(chain, chain[1:]))]
same = {k: {r['arms'][a]['iterations'] for r in runs for a in names} for k in ('iterations',)}
assert len(runs) >= 3 and same['iterations'] == {300}
markdown('\n'.join(f'* {line}' for line in lines)+f"\n\nScale: {first['data']['labelled']} labelled and {first['data']['unlabelled']} unlabelled scenes of 96 px, {first['iterations']} iterations after a burn-in of "
         f"{runs[0]['burn_in']['iterations']} ({mean(r['burn_in']['cpu_seconds'] for r in runs)/60:.1f} CPU-minutes), one thread. Commit {first['commit']}; configurations of seed {runs[0]['seed']}: "
         +', '.join(f"{names[a]} {runs[0]['arms'][a]['hash']}" for a in names)+'.')

# %%
#| label: fig-abl-components
#| fig-cap: "Each line is one seed through the arms: what a part adds is smaller than what separates two seeds, which is why arms are compared within a seed."
#| fig-alt: "AP of every arm, one line a seed"
#| echo: false
fig, ax = plt.subplots(figsize=(6, 3), dpi=80)
for i, r in enumerate(runs): ax.plot(range(len(names)), [get(a)[i] for a in names], 'o-', color=COLORS['teacher'], alpha=.5+.5*i/len(runs))
ax.plot(range(len(names)), [mean(get(a)) for a in names], 'k--', label='mean')
ax.set(xticks=range(len(names)), ylabel='AP'); ax.set_xticklabels([n.replace(' + ', '\n+ ') for n in names.values()], fontsize=7); ax.legend(); plt.show()


# %% [markdown]
# ## Are the parts alive?
#
# A method can pass every test and still do nothing in a run. So the logs are asked: mining must find boxes that the threshold alone would miss, the consistency loss must reach its projector with a gradient, and one-to-many matching must give an object several queries.

# %%
#| echo: false
def curve(r, key, arm='shm_cqc_cpm'): return [x for x in r['arms'][arm]['curve'].get(key, []) if x is not None]
T1 = first['config']['method']['T1']
stage = [[s < T1 for s in r['arms']['shm_cqc_cpm']['curve']['step']] for r in runs]
def early(r, key, st): return [x for x, s in zip(r['arms']['shm_cqc_cpm']['curve'][key], st) if s and x is not None]
positives = mean(mean(early(r, 'positives_per_object', st)) for r, st in zip(runs, stage))
con, sup = mean(mean(curve(r, 'con_boxes')) for r in runs), mean(mean(curve(r, 'pseudo_boxes')) for r in runs)
pull = min(min(early(r, 'parts_grad_norm', st)) for r, st in zip(runs, stage))
k = first['config']['criterion']['k']
assert con > sup and pull > 0 and k/2 < positives <= k
markdown(f'The full method keeps {sup:.1f} boxes an image as labels and asks for consistency on {con:.1f}; the smallest logged norm of the projector gradient in the first stage is {pull:.2g}; '
         f'an object has {positives:.1f} positive queries in the first stage, of k={k}.')

# %%
#| label: fig-abl-components-mining
#| fig-cap: "Left: mined boxes find more of the objects than the trusted ones, at lower precision. Right: the threshold follows the mean of the low-cost component down."
#| fig-alt: "Precision and recall of both sets of boxes, and the cost threshold between the means of the mixture, over the iterations"
#| echo: false
fig, axes = plt.subplots(1, 2, figsize=(7, 2.8), dpi=80)
c = first['curve']
for key, kind in (('pseudo', 'teacher'), ('mined', 'student')):
    axes[0].plot(c['step'], c[f'{key}_precision'], color=COLORS[kind], label=f'{key}: precision'); axes[0].plot(c['step'], c[f'{key}_recall'], '--', color=COLORS[kind], label=f'{key}: recall')
for key, line in (('cost_mean_low', ':'), ('cost_threshold', '-'), ('cost_mean_high', ':')): axes[1].plot(c['step'], c[key], line, label=key.removeprefix('cost_').replace('_', ' '))
for ax in axes: ax.set_xlabel('iteration'); ax.legend(fontsize=7)
axes[0].set_ylim(0, 1); axes[1].set_ylabel('matching cost'); fig.tight_layout(); plt.show()

# %% [markdown]
# ## Summary
#
# - Every arm differs from its neighbour by one part, and from its seed's other arms by nothing else.
# - The lines above are computed from the records; where an interval covers zero, they say that no difference was found.
# - To repeat a seed: `python benchmarks/study.py components --seeds 0`.
