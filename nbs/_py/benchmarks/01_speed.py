# %% [markdown]
# # Speed compared with transformers {#sec-speed}
#
# > See how much faster the native op, the matcher and a whole step are than the implementation in Hugging
# > Face transformers on one machine, and which targets they reach.

# %%
#| hide
import json
import tomllib
from pathlib import Path
import matplotlib.pyplot as plt
from IPython.display import Markdown as markdown
from semidetr.draw import COLORS
from semidetr.lab.report import finding, markdown_table

# %%
#| hide
home = Path('../../benchmarks')
contents = {f.stem: json.loads(f.read_text()) for f in sorted((home / 'results').glob('*.json'))}
results = {name: content for name, content in contents.items() if 'part' in content}
aims = tomllib.loads((home / 'aims.toml').read_text())['aim']


def rows(part, **match):
    "Rows of a result file with these values"
    return [r for r in results.get(part, {}).get('rows', []) if all(r.get(k) == v for k, v in match.items())]


def times(r, key='ratio', unit='x'):
    "Median and quartiles"
    return f'{r[key][1]:.3g}{unit} [{r[key][0]:.3g}, {r[key][2]:.3g}]'


def ms(v):
    return f'{v:.3g}' if v < 100 else f'{v:.0f}'


def threads(n):
    return f'{n} thread' + 's' * (n > 1)


CASE = {'tiny': 'half ResNet-18, 256 px', 'r18-512': 'ResNet-18, 512 px', 'r50': 'ResNet-50, 256 px'}
OP = {
    k + s: f'{w}, {t}'
    for k, w in (('enc', 'encoder'), ('dec', 'decoder'))
    for s, t in (('256', '256 px'), ('512', '512 px'), ('COCO', '800 x 1333'))
}
UPSTREAM = {'theirs': 'transformers', 'their pipeline': "transformers' pipeline"}
FORM = {'op': 'op', 'op bf16': 'op, bfloat16', 'fused': 'fused', 'fused bf16': 'fused, bfloat16'}
detector_part = results.pop('detectors')  # a part with a machine of its own (@sec-speed-detectors)
timed = [r for p in results.values() for r in p['rows'] if 'rounds' in r]
fewest, load = min(r['rounds'] for r in timed), max(p['load'] for p in results.values())


# %%
#| hide
def judge(aim):
    "(what, target, measured, share of the target that is reached, mark)"
    found, upper = rows(aim['part'], **aim['match']), 'at_most' in aim
    limit, key = aim['at_most' if upper else 'at_least'], 'cost' if upper else 'ratio'
    text = f"{'<=' if upper else '>='} {limit:g}x"
    if not found:
        return aim['what'], text, '', None, 'not measured'
    value = found[0][key][1]
    share = limit / value if upper else value / limit
    return aim['what'], text, times(found[0], key), share, 'reached' if share >= 1 else '**missed**'


judged = [judge(a) for a in aims]
missed = [j for j in judged if j[4] == '**missed**']
met = [j for j in judged if j[4] == 'reached']
unknown = [j for j in judged if j[4] == 'not measured']

# %%
#| echo: false
sentence = f'{len(met)} of {len(judged)} targets are reached.'
if missed:
    sentence += ' Missed: ' + '; '.join(f'{j[0]} ({j[2].split(" ")[0]}, target {j[1]})' for j in missed) + '.'
if unknown:
    sentence += ' Not measured: ' + '; '.join(j[0] for j in unknown) + '.'
assert len(met) + len(missed) + len(unknown) == len(aims)
assert ('Missed' in sentence) == any(j[3] is not None and j[3] < 1 for j in judged)
fused = rows('op', name='fused', quantity='step', threads=1)
encoder = [r['ratio'][1] for r in fused if r['case'].startswith('enc')]
steps = [r['ratio'][1] for r in rows('step', quantity='training step', name='float32', threads=1)]
text = finding(
    'one thread, float32, forward and backward: the attention pipeline of the encoder is '
    f'{min(encoder):.1f} to '
    f'{max(encoder):.1f} times as fast as that of transformers, a whole training step '
    f'{min(steps):.2f} to {max(steps):.2f} times',
    f'{len(met)} of {len(judged)} targets are reached; {len(missed)} are missed, most of them by '
    'whole steps, '
    'whose convolutions both implementations share',
)
assert sum('step' in j[0] or 'inference' in j[0] for j in missed) > len(missed) / 2
markdown(text)

# %%
#| label: fig-speed-aims
#| fig-cap: "Measured value divided by the target: the line is the target, orange bars miss it."
#| fig-alt: "One horizontal bar per target, its length is the measured value divided by the target"
#| echo: false
shown = [j for j in judged if j[3] is not None][::-1]
assert [j[3] < 1 for j in shown] == [j in missed for j in shown]
fig, ax = plt.subplots(figsize=(6, 0.3 * len(shown) + 0.7), dpi=90, layout='constrained')
ax.barh(
    [j[0] for j in shown], [j[3] for j in shown], color=['#ff7f0e' if j[3] < 1 else '#1f77b4' for j in shown]
)
ax.axvline(1, color='black', lw=1)
ax.tick_params(labelsize=9)
ax.set(xlabel='measured / target')
plt.show()

# %%
#| label: tbl-speed-aims
#| tbl-cap: "Targets and measurements, one thread unless stated. Best: the faster of float32 and bfloat16 autocast on this machine."
#| echo: false
markdown(markdown_table(['', 'target', 'measured', ''], [[j[0], j[1], j[2], j[4]] for j in judged], 'lrrl'))

# %% [markdown]
# ## Limits
#
# Convolutions and matrix products come from the same library in both implementations, so the speed-up of a whole step has a bound that no faster op can exceed. These are times of a CPU; a GPU has its own page (@sec-gpu).

# %%
#| echo: false
quiet = load <= 2.5 and fewest >= 9
note = 'The machine was otherwise idle.'
if not quiet:
    note = f'**Other load ({load:.1f}) or few rounds ({fewest}): these ratios are preliminary.**'
if not any('amx' in i for i in results['op']['machine']['isa']):
    note += ' Its CPU has no AMX, so bfloat16 runs on vector instructions here.'
markdown(note)

# %% [markdown]
# ## How it was measured {.fold}
#
# All numbers on this page come from files that `make bench` wrote; the page itself measures nothing. Both
# implementations run in one process, with the same inputs and the same weights, and alternate, so that a slow
# phase of the machine affects both. Before timing, outputs and gradients of both are compared, and a
# difference ends the benchmark. A speed-up is the median over rounds of the ratio of two consecutive
# measurements, with the quartiles in brackets. The first round is a warm-up and does not count; the garbage
# collector is disabled.
#
# The reference is `DeformableDetrForObjectDetection` of Hugging Face transformers, in float32, with its
# default settings. *Ours* is the same architecture built from this book's modules (@sec-native,
# @sec-attention, @sec-backbone, @sec-transformer, @sec-matching, @sec-losses), which loads the weights of the
# reference by name. The targets were set on another machine, whose CPU multiplies bfloat16 matrices in
# hardware (AMX).

# %% [markdown]
# ## The machine {.fold}

# %%
#| label: tbl-speed-machine
#| tbl-cap: "Hardware, versions and dates of the measurements."
#| echo: false
m, every = results['op']['machine'], [p['machine'] for p in results.values()]
same = all((x['cpu'], x['versions'], x['isa']) == (m['cpu'], m['versions'], m['isa']) for x in every)
assert same, 'the parts were measured on different machines: run `make bench` as a whole'


def size(b):
    "Bytes, for readers"
    return f'{b >> 20} MB' if b >= 1 << 20 else f'{b >> 10} kB'


dates = sorted(x['date'] for x in every)
markdown(
    markdown_table(
        ['what', 'value'],
        [
            ['CPU', f"{m['cpu']}, {m['cores']} logical cores"],
            ['instructions', ', '.join(m['isa'])],
            ['caches', ', '.join(f'{k} {size(b)}' for k, b in m['caches'].items())],
            ['instruction set of torch and of the op', f"{m['torch_isa']}, {m['op']}"],
            ['versions', ', '.join(f'{k} {v}' for k, v in m['versions'].items())],
            ['threads', ' and '.join(map(str, sorted({r['threads'] for r in timed})))],
            ['commit', ', '.join(sorted({x['commit'] or 'unknown' for x in every}))],
            ['date', dates[0] if dates[0] == dates[-1] else f'{dates[0]} to {dates[-1]}'],
            ['rounds per measurement', f'{fewest} or more'],
            ['load average', f'at most {load:.1f}'],
        ],
        'll',
    )
)

# %% [markdown]
# ## The op {.fold}
#
# *Op*: the inputs are values, sampling locations and attention weights. *Fused*: the inputs are raw offsets
# and logits; the reference then includes softmax and locations as well. Encoder: every cell of the feature
# pyramid is a query; decoder: 400 queries. Batches have two images at 256 and 512 pixels, one at the size of
# COCO images. *Step* is forward and backward.

# %%
#| label: tbl-speed-op
#| tbl-cap: "Deformable attention compared with `MultiScaleDeformableAttention` of transformers: milliseconds in float32, and the speed-up in float32 and bfloat16."
#| echo: false
lines = []
for case in OP:
    for n in (1, 2):
        for form, q in (('op', 'forward'), ('op', 'step'), ('fused', 'step')):
            full = rows('op', case=case, threads=n, name=form, quantity=q)
            low = rows('op', case=case, threads=n, name=form + ' bf16', quantity=q)
            if full:
                what = [f'{OP[case]}, {threads(n)}', f'{form} {q}']
                both_ms = [ms(full[0]['theirs_ms']), ms(full[0]['ours_ms'])]
                lines.append([*what, *both_ms, times(full[0]), times(low[0])])
columns = ['case', 'what', 'transformers, ms', 'ours, ms', 'float32', 'bfloat16']
markdown(markdown_table(columns, lines, 'llrrrr'))


# %%
#| label: fig-speed-op
#| fig-cap: "Our op is faster in every case, and the speed-up in the encoder, where every cell is a query, is larger than in the decoder."
#| fig-alt: "Bars of the speed-up of forward and backward for encoder and decoder at three sizes, for op and fused pipeline in float32 and bfloat16"
#| echo: false
def middle(kind):
    "The median speed-up of encoder or decoder"
    ratios = [r['ratio'][1] for r in rows('op', quantity='step', threads=1) if r['case'].startswith(kind)]
    return sorted(ratios)[len(ratios) // 2]


assert min(r['ratio'][1] for r in rows('op')) > 1 and middle('enc') > middle('dec')
cases = [c for c in OP if rows('op', case=c)]
fig, ax = plt.subplots(figsize=(6, 2.8), dpi=80)
for i, form in enumerate(FORM):
    r = [rows('op', case=c, quantity='step', threads=1, name=form)[0]['ratio'] for c in cases]
    ax.bar(
        [x + 0.2 * i for x in range(len(r))],
        [q[1] for q in r],
        0.19,
        yerr=[[q[1] - q[0] for q in r], [q[2] - q[1] for q in r]],
        label=FORM[form],
        color=plt.cm.Blues(0.4 + 0.18 * i),
        error_kw=dict(lw=0.8),
    )
ax.set(xticks=[x + 0.3 for x in range(len(cases))], ylabel='speed-up, 1 thread')
ax.set_xticklabels([OP[c].replace(', ', '\n') for c in cases], fontsize=9)
ax.legend(fontsize=9)
plt.show()

# %%
#| label: tbl-speed-memory
#| tbl-cap: "Extra memory of one forward and backward pass of the encoder's attention, each measured in its own process."
#| echo: false
memory = {r['name']: r['MB'] for r in rows('memory') if r['MB']}
lines = []
for name, used in memory.items():
    reference = 'theirs' if name.startswith('op') else 'their pipeline'
    saving = '' if name in UPSTREAM else f'{memory[reference] / used:.1f}x'
    lines.append([UPSTREAM.get(name, name), f'{used:.0f}', saving])
markdown(markdown_table(['form', 'MB', 'reduction'], lines))

# %% [markdown]
# ### Distance from the hardware limits {.fold}
#
# A pass takes at least as long as its arithmetic at the rate of register-to-register multiply-adds, as its
# taps (four neighbours of each sample, 128 bytes each) at the bandwidth of the L2 cache, and as reading or
# writing its memory once. The largest of these three times is its lower bound.

# %%
#| label: tbl-speed-rates
#| tbl-cap: "Rates of one core, measured with dedicated loops."
#| echo: false
rate = results['roofline']['rates']
markdown(
    markdown_table(
        ['what', 'rate'],
        [
            *([f'read, {k} ({size(rate["bytes"][k])})', f'{v:.0f} GB/s'] for k, v in rate['read'].items()),
            ['copy in memory', f"{rate['copy']:.0f} GB/s"],
            ['multiply-add, float32', f"{rate['fma']:.0f} GFLOP/s"],
            *([f'`torch.mm`, {k}', f'{v:.0f} GFLOP/s'] for k, v in rate['mm'].items()),
        ],
    )
)

# %%
#| label: tbl-speed-roof
#| tbl-cap: "The float32 op, one thread, and its three lower bounds; ratio: measured time divided by the largest of them."
#| echo: false
lines = []
for r in rows('roofline'):
    bounds = [ms(r['floor_ms'][k]) for k in ('arithmetic', 'taps', 'memory')]
    lines.append([OP[r['case']], r['part'], *bounds, ms(r['ours_ms']), f"{r['distance']:.1f}x"])
columns = ['case', 'pass', 'arithmetic, ms', 'taps, ms', 'memory, ms', 'ours, ms', 'ratio']
markdown(markdown_table(columns, lines, 'llrrrrr'))

# %%
#| echo: false
low = rate['mm']['bfloat16'] / rate['mm']['float32']
far = max(rows('roofline'), key=lambda r: r['distance'])
near = min(rows('roofline'), key=lambda r: r['distance'])
assert near['distance'] <= far['distance']
markdown(
    f"**The op takes {near['distance']:.1f} to {far['distance']:.1f} times its lower bound, "
    f"the most in the {far['part']} pass of the {OP[far['case']]}. "
    f'Matrix products in bfloat16 are {low:.1f} times as fast as in float32 here, '
    'which limits the gain from autocast.**'
)

# %% [markdown]
# ### Scaling {.fold}

# %%
#| label: fig-speed-scaling
#| fig-cap: "Forward and backward of the whole attention pipeline: ours takes less time for every image size, number of queries and batch size."
#| fig-alt: "Three log-log plots of milliseconds over side, queries and batch, transformers above ours"
#| echo: false
axis_labels = dict(side='side of the image', queries='decoder queries', batch='images')
scaling = {axis: rows('scaling', case=axis) for axis in axis_labels}
assert all(r['ours_ms'] < r['theirs_ms'] for rs in scaling.values() for r in rs)
fig, axes = plt.subplots(1, 3, figsize=(7, 2.5), dpi=80, sharey=True)
for ax, (axis, rs) in zip(axes, scaling.items()):
    x = [r['value'] for r in rs]
    ax.loglog(x, [r['theirs_ms'] for r in rs], '.-', color='grey', label='transformers')
    ax.loglog(x, [r['ours_ms'] for r in rs], '.-', color=COLORS['student'], label='ours')
    ax.set(xlabel=axis_labels[axis], xticks=x)
    ax.set_xticklabels(x, fontsize=9)
    ax.minorticks_off()
axes[0].set_ylabel('ms, 1 thread')
axes[0].legend(fontsize=9)
plt.tight_layout()
plt.show()


# %% [markdown]
# ## The whole model {.fold}
#
# Three encoder and three decoder layers of width 128, four levels, 100 queries, losses on every decoder
# layer, frozen batch norm, stem and first stage frozen, no dropout. A training step is forward, matching and
# losses, backward, gradient clipping, and AdamW. Ours runs in channels-last memory format with the trainer's
# own optimiser step (@sec-trainer).

# %%
#| label: tbl-speed-step
#| tbl-cap: "The whole model compared with transformers' model in float32: milliseconds and speed-up; the last column is the largest difference of logits and boxes before timing."
#| echo: false
def step_line(case, n, q):
    "One row, or nothing where the case was not measured"
    full, low = (rows('step', case=case, threads=n, quantity=q, name=v) for v in ('float32', 'bfloat16'))
    if not full:
        return []
    a, b = full[0], low[0]
    each_ms = [ms(a['theirs_ms']), ms(a['ours_ms']), ms(b['ours_ms'])]
    error = f"{a['error']['outputs']:.0e}"
    return [[f"{CASE[case]}, {a['batch']} images, {threads(n)}", q, *each_ms, times(a), times(b), error]]


assert all(r['error']['outputs'] < 1e-4 for r in rows('step'))
lines = []
for q in ('training step', 'inference'):
    for case in CASE:
        lines += step_line(case, 1, q) + step_line(case, 2, q)
columns = ['case', 'what', 'transformers, ms', 'ours, float32, ms', 'ours, bfloat16, ms']
columns += ['float32', 'bfloat16', 'difference']
markdown(markdown_table(columns, lines, 'llrrrrrr'))

# %%
#| echo: false
worst = max(r['error'].get('bfloat16', 0) for r in rows('step'))
assert worst < 2e-2
lines = [
    f"Autocast to bfloat16 alone makes transformers' model {times(r)} as fast ({CASE[r['case']]}, training)."
    for r in rows('step', name='theirs bfloat16')[:1]
]
lines.append(f'The loss of our first step in bfloat16 differs from float32 by at most {100 * worst:.2g} %.')
markdown(' '.join(lines))

# %%
#| label: fig-speed-step
#| fig-cap: "Speed-up of the whole model over transformers' model in float32, one thread: every bar is above 1, the line of equal speed."
#| fig-alt: "Bars of the speed-up of training step and inference for three backbones in float32 and bfloat16"
#| echo: false
pairs = [
    (c, q)
    for q in ('training step', 'inference')
    for c in CASE
    if rows('step', case=c, quantity=q, threads=1)
]
assert min(r['ratio'][1] for r in rows('step', threads=1) if r['name'] in ('float32', 'bfloat16')) > 1
fig, ax = plt.subplots(figsize=(6.5, 2.8), dpi=80)
for i, (v, color) in enumerate((('float32', COLORS['student']), ('bfloat16', COLORS['truth']))):
    r = [rows('step', case=c, quantity=q, threads=1, name=v)[0]['ratio'] for c, q in pairs]
    ax.bar(
        [x + 0.4 * i for x in range(len(r))],
        [q[1] for q in r],
        0.38,
        yerr=[[q[1] - q[0] for q in r], [q[2] - q[1] for q in r]],
        label=v,
        color=color,
        error_kw=dict(lw=0.8),
    )
ax.axhline(1, color='grey', lw=0.8)
ax.set(xticks=[x + 0.2 for x in range(len(pairs))], ylabel='speed-up')
ax.legend(fontsize=9)
ax.set_xticklabels([f'{CASE[c]}\n{q}'.replace(', ', '\n') for c, q in pairs], fontsize=9)
plt.show()

# %% [markdown]
# ### What limits the whole step {.fold}
#
# Convolutions and matrix products come from the same library in both implementations. If everything else in
# our step took no time, the speed-up would be that in the last column: no faster op, optimiser or loss can
# exceed it at this precision.

# %%
#| label: tbl-speed-bound
#| tbl-cap: "Shares of our training step according to the profiler, one thread; measured speed-up, and its bound if only convolutions and matrix products took time."
#| echo: false
kinds = ['convolutions', 'matrices', 'attention', 'rest']
lines, bounds = [], {}  # (case, precision) -> bound
for entry in results['step'].get('shares', []):
    case = entry['case']
    for v in ('float32', 'bfloat16'):
        found, share = rows('step', case=case, name=v, quantity='training step', threads=1), entry[v]
        if found:
            ratio = found[0]['ratio'][1]
            bound = bounds[case, v] = ratio / (share['convolutions'] + share['matrices'])
            shares = [f'{100 * share[k]:.0f} %' for k in kinds]
            lines.append([CASE[case], v, *shares, f'{ratio:.2f}x', f'{bound:.2f}x'])
markdown(markdown_table(['case', 'precision', *kinds, 'measured', 'bound'], lines, 'llrrrrrr'))

# %%
#| echo: false
beyond = []
for aim in aims:
    match = aim['match']
    if match.get('quantity') == 'training step' and match['name'] == 'float32':
        bound = bounds.get((match['case'], 'float32'))
        if bound and bound < aim['at_least']:
            beyond.append(f"{CASE[match['case']]} ({bound:.2f}x, target {aim['at_least']:g}x)")
if beyond:
    sentence = f"**Targets in float32 that lie beyond this bound on this machine: {'; '.join(beyond)}.**"
else:
    sentence = 'No target in float32 lies beyond this bound.'
markdown(sentence)

# %% [markdown]
# ### Memory between steps {.fold}
#
# After use, glibc returns large blocks to the system, and the next step pays page faults to get them again.
# The commands of the Makefile that train switch this off. The speed-ups above are measured with the default,
# as both libraries are usually run; those below keep the memory, in both implementations.

# %%
#| label: tbl-speed-kept
#| tbl-cap: "Speed-up with glibc's default and with memory kept (`MALLOC_MMAP_MAX_=0` and a high trim threshold), one thread."
#| echo: false
models = [r for r in rows('kept') if r['name'] in ('float32', 'bfloat16')]
matchers = [r for r in rows('kept') if 'images' in r]
lines, lost = [], {}  # what -> speed-up by default over speed-up with memory kept
for r in models + matchers:
    if 'images' in r:
        what = f"matching, {r['name']} of {r['images']} images"
        default = rows('matcher', name=r['name'], images=r['images'])
    else:
        what = f"{r['quantity']}, {CASE[r['case']]}, {r['name']}"
        default = rows('step', case=r['case'], quantity=r['quantity'], name=r['name'], threads=1)
    if default:
        lost[what] = default[0]['ratio'][1] / r['ratio'][1]
    by_default = times(default[0]) if default else ''
    lines.append([what, by_default, times(r), ms(r['theirs_ms']), ms(r['ours_ms'])])
columns = ['', 'default', 'kept', 'transformers kept, ms', 'ours kept, ms']
markdown(markdown_table(columns, lines))

# %%
#| echo: false
most = max(lost, key=lost.get)
tail = f'; *{most}* loses most.' if lost[most] > 1.1 else '.'
markdown(
    f'Keeping memory changes the speed-up by a factor of {1 / lost[most]:.2f} '
    f'to {1 / min(lost.values()):.2f}{tail}'
)

# %% [markdown]
# ## Matching {.fold}
#
# The matcher of transformers computes the cost of every query of the batch with every object of the batch;
# ours stays within each image (@sec-matching). The assignments must be identical, or the benchmark ends.

# %%
#| label: tbl-speed-matcher
#| tbl-cap: "900 queries, 80 classes, about 20 objects per image, compared with `DeformableDetrHungarianMatcher`."
#| echo: false
lines = [
    [f"{r['name']}, {r['images']} images", ms(r['theirs_ms']), ms(r['ours_ms']), times(r)]
    for r in rows('matcher')
]
markdown(markdown_table(['', 'transformers, ms', 'ours, ms', 'speed-up'], lines))

# %%
#| echo: false
spent = results['matcher']['parts']
largest = max(spent, key=spent.get)
each = ', '.join(f'{k} {v:.1f} ms' for k, v in spent.items())
markdown(f'Our time for one layer of 16 images: {each}. The largest part is the {largest}.')

# %% [markdown]
# ## The cost of a teacher {.fold}
#
# On the built-in scenes (preset `digits`, @sec-config): a step with 4 labelled and 8 unlabelled images
# compared with a supervised step with 12 labelled ones, in the trainer. An untrained teacher has low scores,
# so the thresholds are set such that about as many boxes pass as there are objects.

# %%
#| label: tbl-speed-semi
#| tbl-cap: "Cost of a step relative to a supervised step with the same number of images, one thread."
#| echo: false
names = dict(mean_teacher='mean teacher', semi_detr='Semi-DETR')
lines = []
for r in rows('semi', quantity='cost of a step'):
    what = f"{names.get(r['name'], r['name'])}, {r['stage']}"
    boxes = f"{r['pseudo_boxes'] or 0:.1f}"
    lines.append([what, ms(r['theirs_ms']), ms(r['ours_ms']), times(r, 'cost'), boxes])
columns = ['method and stage', 'supervised, ms', 'method, ms', 'cost', 'pseudo boxes per image']
markdown(markdown_table(columns, lines))

# %%
#| label: tbl-speed-native
#| tbl-cap: "The supervised step with `SEMIDETR_OPS=torch` and with the native op, in two alternating processes, one thread."
#| echo: false
lines = [[r['case'], ms(r['theirs_ms']), ms(r['ours_ms']), times(r)] for r in rows('semi', name='native op')]
markdown(markdown_table(['preset', 'plain PyTorch, ms', 'native, ms', 'speed-up'], lines))

# %% [markdown]
# ## Every detector {#sec-speed-detectors .fold}
#
# The detectors of the book (@sec-detector, @sec-deformable-detr) compared with their counterparts in
# transformers, at equal sizes: width 128, three encoder and three decoder layers, 100 queries, a ResNet-18 with
# random weights whose stem and first stage are frozen. Here the weights of both sides differ. transformers has
# no DINO; its two-stage Deformable-DETR stands beside ours, which computes denoising queries on top of that.

# %%
#| label: tbl-speed-detectors
#| tbl-cap: "Training step and inference of every detector compared with transformers, float32, in alternation."
#| echo: false
lines = []
for r in detector_part['rows']:
    counts = r['parameters']
    assert abs(counts['ours'] / counts['theirs'] - 1) < 0.02
    case = f"{r['side']} px, {r['batch']} images, {threads(r['threads'])}"
    name = r['name'] if r['name'] == r['counterpart'] else f"{r['name']} and {r['counterpart']}"
    lines.append([name, f"{r['quantity']}, {case}", ms(r['theirs_ms']), ms(r['ours_ms']), times(r)])
columns = ['detector', 'what', 'transformers, ms', 'ours, ms', 'speed-up']
markdown(markdown_table(columns, lines, 'llrrr'))

# %%
#| echo: false
about = detector_part['machine']
text = f"Measured on {about['cpu']}, commit {about['commit']}, {about['date']}, "
text += f"load average at most {detector_part['load']:.1f}."
markdown(text + (' **Other load: these ratios are preliminary.**' if detector_part['load'] > 2.5 else ''))

# %% [markdown]
# ## Does training give the same result? {.fold}
#
# The native op rounds differently from plain PyTorch, and training amplifies rounding differences. So the
# demonstration of the first release was trained again with `SEMIDETR_OPS=torch`: same split, same seed, same
# number of iterations.

# %%
#| label: tbl-speed-quality
#| tbl-cap: "COCO AP of the averaged network on 300 test scenes, in percent, twenty labels: the native op and plain PyTorch."
#| echo: false
book = Path('../ablations/results')
native, plain = (
    json.loads((book / f'digits_{k}.json').read_text())['runs'] for k in ('native_op', 'plain_torch')
)


def ap(run, arm):
    return run['arms'][arm]['metrics']['val']['teacher']['AP']


by_seed = {r['seed']: r for r in native}
lines, worst = [], 0
for r in plain:
    for arm in r['arms']:
        with_op, without = ap(by_seed[r['seed']], arm), ap(r, arm)
        worst = max(worst, abs(without - with_op))
        row = [r['seed'], arm.replace('_', ' '), f'{with_op:.1f}', f'{without:.1f}']
        lines.append([*row, f'{without - with_op:+.1f}'])
of_seeds = [ap(r, 'supervised') for r in native]
spread = max(of_seeds) - min(of_seeds)
assert worst < spread, 'the op changes what is learnt'
columns = ['seed', 'arm', 'native op', 'plain PyTorch', 'difference']
markdown(markdown_table(columns, lines, 'llrrr'))

# %%
#| echo: false
markdown(f'The largest difference is {worst:.1f} AP; seeds of one arm differ by up to {spread:.1f} AP.')

# %% [markdown]
# ## Reproduce it {.fold}
#
# ```bash
# make bench                                          # everything, then this page
# make bench BENCH=--quick                            # a quick trial, results in build/bench/
# .venv/bin/python benchmarks/run.py --only op step   # some parts
# ```
#
# The package transformers is part of the extra `[bench]`, which `make bench` installs; no weights are
# downloaded. Nothing here was run on a GPU (@sec-gpu).
#
# ## Summary

# %%
#| echo: false
best = max(rows('step', name='best', threads=1), key=lambda r: r['ratio'][1])
saved = memory['their pipeline'] / memory['fused']
markdown(
    f'- The attention pipeline of the encoder needs {saved:.0f} times less extra memory.\n'
    f"- The whole model is at most {best['ratio'][1]:.1f} times as fast "
    f"({best['quantity']}, {CASE[best['case']]}, {best['variant']}).\n"
    '- Single targets and their measurements: @tbl-speed-aims.'
)
