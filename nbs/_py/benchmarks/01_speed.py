# %% [markdown]
# # How fast, and against what {#sec-speed}
#
# > What the native op, the matcher and the whole step gain over transformers' implementation on one machine,
# > which aims they meet and which they miss.
#
# Every figure on this page comes from a file that `make bench` wrote; the page measures nothing. Ours and
# theirs run in one process, on the same inputs and with the same weights, and take turns, so that a slow
# moment of the machine meets both. Before anything is timed, outputs and gradients of both are compared, and
# a difference ends the run. A ratio is the median over the turns, each turn divided by its neighbour; the
# quartiles stand in brackets. One turn warms up and does not count; the garbage collector sleeps.
#
# Theirs is `DeformableDetrForObjectDetection` of Hugging Face's transformers, in float32, as it comes. Ours
# is the same architecture made of this book's modules (@sec-native, @sec-attention, @sec-backbone,
# @sec-transformer, @sec-matching, @sec-losses), which loads their weights by name. The aims were set on
# another machine, whose CPU multiplies bfloat16 matrices in hardware tiles (AMX).

# %%
#| hide
import json
import tomllib
from pathlib import Path
import matplotlib.pyplot as plt
from IPython.display import Markdown as markdown
from semidetr.draw import COLORS
from semidetr.lab.report import markdown_table

# %%
#| hide
home = Path('../../benchmarks')
results = {
    f.stem: json.loads(f.read_text())
    for f in sorted((home / 'results').glob('*.json'))
    if 'part' in json.loads(f.read_text())
}
aims = tomllib.loads((home / 'aims.toml').read_text())['aim']


def rows(part, **match):
    return [r for r in results.get(part, {}).get('rows', []) if all(r.get(k) == v for k, v in match.items())]


def times(r, key='ratio', unit='x'):
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
FORM = {'op': 'op', 'op bf16': 'op, bfloat16', 'fused': 'fused', 'fused bf16': 'fused, bfloat16'}
timed = [r for p in results.values() for r in p['rows'] if 'rounds' in r]
fewest, load = min(r['rounds'] for r in timed), max(p['load'] for p in results.values())

# %% [markdown]
# ## The machine

# %%
#| label: tbl-speed-machine
#| tbl-cap: "Where, when and with what the files were written."
#| echo: false
m, every = results['op']['machine'], [p['machine'] for p in results.values()]
same = all((x['cpu'], x['versions'], x['isa']) == (m['cpu'], m['versions'], m['isa']) for x in every)
assert same, 'the parts were measured on different machines: run `make bench` as a whole'
size = lambda b: f'{b >> 20} MB' if b >= 1 << 20 else f'{b >> 10} kB'
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
            ['turns of each', f"{fewest} or more"],
            ['load of the machine', f'at most {load:.1f}'],
        ],
        'll',
    )
)

# %%
#| echo: false
quiet = load <= 2.5 and fewest >= 9
note = (
    'The machine was quiet.'
    if quiet
    else f'**The machine was not quiet (load {load:.1f}) or the turns were few ({fewest}): take these ratios as a first look.**'
)
amx = (
    ''
    if any('amx' in i for i in m['isa'])
    else ' It has no AMX: what the aims expect of bfloat16 must come from vector instructions here.'
)
markdown(note + amx)


# %% [markdown]
# ## Aims

# %%
#| hide
def judge(aim):
    "(what, aim, measured, share of the aim that is reached, mark)"
    found, upper = rows(aim['part'], **aim['match']), 'at_most' in aim
    limit = aim['at_most' if upper else 'at_least']
    text = f"{'<=' if upper else '>='} {limit:g}x"
    if not found:
        return aim['what'], text, '', None, 'not measured'
    value = found[0]['cost' if upper else 'ratio'][1]
    share = limit / value if upper else value / limit
    return (
        aim['what'],
        text,
        times(found[0], 'cost' if upper else 'ratio'),
        share,
        'met' if share >= 1 else '**missed**',
    )


judged = [judge(a) for a in aims]
missed, met, unknown = ([j for j in judged if j[4] == mark] for mark in ('**missed**', 'met', 'not measured'))

# %%
#| label: tbl-speed-aims
#| tbl-cap: "Aims and what was measured, one thread. Best: the faster of float32 and bfloat16 autocast on this machine."
#| echo: false
markdown(markdown_table(['', 'aim', 'measured', ''], [[j[0], j[1], j[2], j[4]] for j in judged], 'lrrl'))

# %%
#| echo: false
sentence = f"{len(met)} of {len(judged)} aims are met."
if missed:
    sentence += ' Missed: ' + '; '.join(f'{j[0]} ({j[2].split(" ")[0]}, aim {j[1]})' for j in missed) + '.'
if unknown:
    sentence += ' Not measured: ' + '; '.join(j[0] for j in unknown) + '.'
assert len(met) + len(missed) + len(unknown) == len(aims) and ('Missed' in sentence) == any(
    j[3] is not None and j[3] < 1 for j in judged
)
markdown(f'**{sentence}**')

# %%
#| label: fig-speed-aims
#| fig-cap: "Share of each aim that is reached; the line is the aim, orange bars fall short of it."
#| fig-alt: "One horizontal bar for each aim, its length what was measured divided by the aim"
#| echo: false
shown = [j for j in judged if j[3] is not None][::-1]
assert [j[3] < 1 for j in shown] == [j in missed for j in shown]
fig, ax = plt.subplots(figsize=(6, 0.28 * len(shown) + 0.7), dpi=80)
ax.barh(
    [j[0] for j in shown],
    [j[3] for j in shown],
    color=[COLORS['teacher' if j[3] < 1 else 'student'] for j in shown],
)
ax.axvline(1, color='black', lw=1)
ax.tick_params(labelsize=7)
ax.set(xlabel='measured / aim')
plt.show()


# %% [markdown]
# ## The op
#
# *Op*: values, sampling locations and attention weights go in. *Fused*: raw offsets and logits go in, and
# theirs is the same pipeline, softmax and locations included. Encoder: every cell of the pyramid asks;
# decoder: 400 queries ask. Two images at 256 and 512 pixels, one at the size of COCO's images. *Step* is
# forward and backward.

# %%
#| label: tbl-speed-op
#| tbl-cap: "Deformable attention against `MultiScaleDeformableAttention`: milliseconds of theirs and ours in float32, and how many times faster ours is."
#| echo: false
def op_line(case, n, form, q):
    r, low = (
        rows('op', case=case, threads=n, name=form, quantity=q),
        rows('op', case=case, threads=n, name=form + ' bf16', quantity=q),
    )
    return (
        [
            f'{OP[case]}, {threads(n)}',
            f'{form} {q}',
            ms(r[0]['theirs_ms']),
            ms(r[0]['ours_ms']),
            times(r[0]),
            times(low[0]),
        ]
        if r
        else None
    )


lines = [
    op_line(c, n, f, q)
    for c in OP
    for n in (1, 2)
    for f, q in (('op', 'forward'), ('op', 'step'), ('fused', 'step'))
]
markdown(
    markdown_table(
        ['case', 'what', 'theirs, ms', 'ours, ms', 'float32', 'bfloat16'], [x for x in lines if x], 'llrrrr'
    )
)

# %%
#| label: fig-speed-op
#| fig-cap: "Ours is faster in every case, in the encoder, which asks at every cell, by more than in the decoder."
#| fig-alt: "Bars of the speed-up of forward and backward for encoder and decoder at three sizes, for op and fused pipeline in float32 and bfloat16"
#| echo: false
one = rows('op', quantity='step', threads=1)
middle = lambda kind: sorted(r['ratio'][1] for r in one if r['case'].startswith(kind))[
    len([r for r in one if r['case'].startswith(kind)]) // 2
]
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
ax.set(xticks=[x + 0.3 for x in range(len(cases))], ylabel='times faster, 1 thread')
ax.set_xticklabels([OP[c].replace(', ', '\n') for c in cases], fontsize=7)
ax.legend(fontsize=7)
plt.show()

# %%
#| label: tbl-speed-memory
#| tbl-cap: "Extra memory of one forward and backward pass of the encoder's attention, each in a process of its own."
#| echo: false
memory = {r['name']: r['MB'] for r in rows('memory') if r['MB']}
markdown(
    markdown_table(
        ['form', 'MB', 'less by'],
        [
            [
                k,
                f'{v:.0f}',
                f"{memory['theirs' if k.startswith('op') else 'their pipeline'] / v:.1f}x"
                if 'their' not in k
                else '',
            ]
            for k, v in memory.items()
        ],
    )
)

# %% [markdown]
# ### How near to the machine's limits
#
# A pass cannot take less time than its arithmetic at the rate of register-to-register multiply-adds, than its
# taps (four neighbours of each sample, 128 bytes each) at the rate of the L2 cache, and than the memory it
# must touch once. The largest of the three is its floor.

# %%
#| label: tbl-speed-rates
#| tbl-cap: "Rates of one core, measured by loops that do nothing else."
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
#| tbl-cap: "The float32 op, one thread, against the three floors; distance is measured over the largest of them."
#| echo: false
markdown(
    markdown_table(
        ['case', 'pass', 'arithmetic, ms', 'taps, ms', 'memory, ms', 'ours, ms', 'distance'],
        [
            [
                OP[r['case']],
                r['part'],
                *(ms(r['floor_ms'][k]) for k in ('arithmetic', 'taps', 'memory')),
                ms(r['ours_ms']),
                f"{r['distance']:.1f}x",
            ]
            for r in rows('roofline')
        ],
        'llrrrrr',
    )
)

# %%
#| echo: false
low = rate['mm']['bfloat16'] / rate['mm']['float32']
far = max(rows('roofline'), key=lambda r: r['distance'])
near = min(rows('roofline'), key=lambda r: r['distance'])
assert near['distance'] <= far['distance']
markdown(
    f"**The op stays within {near['distance']:.1f} to {far['distance']:.1f} times its floor, farthest in the {far['part']} pass of the {OP[far['case']]}. "
    f"Matrices in bfloat16 are {low:.1f} times as fast as in float32 here, which bounds what autocast can give.**"
)

# %% [markdown]
# ### How cost grows

# %%
#| label: fig-speed-scaling
#| fig-cap: "Forward and backward of the whole attention pipeline: ours is below theirs at every size of the image, number of queries and batch."
#| fig-alt: "Three log-log plots of milliseconds over side, queries and batch, theirs above ours"
#| echo: false
grown = {axis: rows('scaling', case=axis) for axis in ('side', 'queries', 'batch')}
assert all(r['ours_ms'] < r['theirs_ms'] for rs in grown.values() for r in rs)
fig, axes = plt.subplots(1, 3, figsize=(7, 2.5), dpi=80, sharey=True)
for ax, (axis, rs) in zip(axes, grown.items()):
    x = [r['value'] for r in rs]
    ax.loglog(x, [r['theirs_ms'] for r in rs], '.-', color='grey', label='theirs')
    ax.loglog(x, [r['ours_ms'] for r in rs], '.-', color=COLORS['student'], label='ours')
    ax.set(xlabel=dict(side='side of the image', queries='decoder queries', batch='images')[axis], xticks=x)
    ax.set_xticklabels(x, fontsize=7)
    ax.minorticks_off()
axes[0].set_ylabel('ms, 1 thread')
axes[0].legend(fontsize=7)
plt.tight_layout()
plt.show()


# %% [markdown]
# ## The whole model
#
# Three encoder and three decoder layers of width 128, four levels, 100 queries, losses on every decoder
# layer, frozen norms, stem and first stage fixed, no dropout. A training step is forward, matching and loss,
# backward, clipping, AdamW. Ours runs in channels-last order with the trainer's own optimizer step
# (@sec-trainer).

# %%
#| label: tbl-speed-step
#| tbl-cap: "Against transformers' model in float32; the last column compares logits and boxes before timing."
#| echo: false
def step_line(case, n, q):
    a, b = (rows('step', case=case, threads=n, quantity=q, name=v) for v in ('float32', 'bfloat16'))
    return (
        [
            f"{CASE[case]}, {a[0]['batch']} images, {threads(n)}",
            q,
            ms(a[0]['theirs_ms']),
            ms(a[0]['ours_ms']),
            ms(b[0]['ours_ms']),
            times(a[0]),
            times(b[0]),
            f"{a[0]['error']['outputs']:.0e}",
        ]
        if a
        else None
    )


lines = [step_line(c, n, q) for q in ('training step', 'inference') for c in CASE for n in (1, 2)]
assert all(r['error']['outputs'] < 1e-4 for r in rows('step'))
markdown(
    markdown_table(
        ['case', 'what', 'theirs, ms', 'float32, ms', 'bfloat16, ms', 'float32', 'bfloat16', 'difference'],
        [x for x in lines if x],
        'llrrrrrr',
    )
)

# %%
#| echo: false
alone = rows('step', name='theirs bfloat16')
worst = max(r['error'].get('bfloat16', 0) for r in rows('step'))
assert worst < 2e-2
markdown(
    (
        f"Autocast to bfloat16 alone makes theirs {times(alone[0])} as fast ({CASE[alone[0]['case']]}, training). "
        if alone
        else ''
    )
    + f"The loss of our first step in bfloat16 differs from float32 by at most {100 * worst:.2g} %."
)

# %%
#| label: fig-speed-step
#| fig-cap: "How many times faster the whole model is than transformers' in float32, one thread: every bar stands above the line of equal speed."
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
ax.set(xticks=[x + 0.2 for x in range(len(pairs))], ylabel='times faster')
ax.legend(fontsize=7)
ax.set_xticklabels([f'{CASE[c]}\n{q}'.replace(', ', '\n') for c, q in pairs], fontsize=7)
plt.show()

# %% [markdown]
# ### What bounds the whole step
#
# Convolutions and matrix products come from the same library on both sides. If all else of our step took no
# time, the ratio would be the one in the last column: no other op, optimizer or loss can bring more at this
# precision.

# %%
#| label: tbl-speed-bound
#| tbl-cap: "Shares of our training step by the profiler, one thread, and the ratio that would be left if only convolutions and matrix products cost time."
#| echo: false
bounds = [
    (s['case'], v, s[v], r[0]['ratio'][1], r[0]['ratio'][1] / (s[v]['convolutions'] + s[v]['matrices']))
    for s in results['step'].get('shares', [])
    for v in ('float32', 'bfloat16')
    if (r := rows('step', case=s['case'], name=v, quantity='training step', threads=1))
]
markdown(
    markdown_table(
        ['case', 'precision', 'convolutions', 'matrices', 'attention', 'rest', 'measured', 'bound'],
        [
            [
                CASE[c],
                v,
                *(f'{100 * s[k]:.0f} %' for k in ('convolutions', 'matrices', 'attention', 'rest')),
                f'{m:.2f}x',
                f'{b:.2f}x',
            ]
            for c, v, s, m, b in bounds
        ],
        'llrrrrrr',
    )
)

# %%
#| echo: false
aimed = {
    (a['match']['case'], a['match']['name']): a['at_least']
    for a in aims
    if a['match'].get('quantity') == 'training step'
}
beyond = [
    f'{CASE[c]} ({b:.2f}x, aim {aimed[c, n]:g}x)'
    for c, v, s, m, b in bounds
    for n in ('float32',)
    if v == n and b < aimed[c, n]
]
markdown(
    '**Aims in float32 that lie beyond this bound on this machine: ' + '; '.join(beyond) + '.**'
    if beyond
    else 'No aim in float32 lies beyond this bound.'
)

# %% [markdown]
# ### Where the memory goes between steps
#
# glibc returns large blocks to the system after use and pays page faults for them at the next step. The
# commands of the Makefile that train switch that off. The ratios above are with the default, as both
# libraries are usually run; these are with memory kept, for both sides.

# %%
#| label: tbl-speed-kept
#| tbl-cap: "Speed-up with glibc's default and with memory kept (`MALLOC_MMAP_MAX_=0` and a high trim threshold), both sides alike, one thread."
#| echo: false
kept = [
    (
        f"{r['quantity']}, {CASE[r['case']]}, {r['name']}",
        rows('step', case=r['case'], quantity=r['quantity'], name=r['name'], threads=1),
        r,
    )
    for r in rows('kept')
    if r['name'] in ('float32', 'bfloat16')
]
kept += [
    (f"matching, {r['name']} of {r['images']} images", rows('matcher', name=r['name'], images=r['images']), r)
    for r in rows('kept')
    if 'images' in r
]
markdown(
    markdown_table(
        ['', 'default', 'kept', 'theirs kept, ms', 'ours kept, ms'],
        [[t, times(a[0]) if a else '', times(r), ms(r['theirs_ms']), ms(r['ours_ms'])] for t, a, r in kept],
    )
)

# %%
#| echo: false
lost = [(t, a[0]['ratio'][1] / r['ratio'][1]) for t, a, r in kept if a]
most = max(lost, key=lambda x: x[1])
markdown(
    f"Keeping memory changes the advantage by a factor of {1 / most[1]:.2f} to {1 / min(x for _, x in lost):.2f}"
    + (f"; {most[0]} loses most." if most[1] > 1.1 else '.')
)

# %% [markdown]
# ## Matching
#
# Their matcher computes the costs of every query of the batch against every object of the batch; ours stays
# within each image (@sec-matching). The assignments are the same, pair by pair, or the run ends.

# %%
#| label: tbl-speed-matcher
#| tbl-cap: "900 queries, 80 classes, about 20 objects an image, against `DeformableDetrHungarianMatcher`."
#| echo: false
markdown(
    markdown_table(
        ['', 'theirs, ms', 'ours, ms', 'faster'],
        [
            [f"{r['name']}, {r['images']} images", ms(r['theirs_ms']), ms(r['ours_ms']), times(r)]
            for r in rows('matcher')
        ],
    )
)

# %%
#| echo: false
spent = results['matcher']['parts']
largest = max(spent, key=spent.get)
assert spent[largest] == max(spent.values())
markdown(
    'Where our time goes, one layer of 16 images: '
    + ', '.join(f'{k} {v:.1f} ms' for k, v in spent.items())
    + f'. Most is the {largest}.'
)

# %% [markdown]
# ## What a teacher costs
#
# On the built-in scenes (preset `digits`, @sec-config): a step with 4 labelled and 8 unlabelled images
# against a supervised step with 12 labelled ones, through the trainer. An untrained teacher is sure of
# nothing, so the thresholds are set such that as many boxes pass as there are objects.

# %%
#| label: tbl-speed-semi
#| tbl-cap: "Cost of a step in supervised steps of as many images, one thread."
#| echo: false
markdown(
    markdown_table(
        ['method and stage', 'supervised, ms', 'method, ms', 'cost', 'pseudo boxes an image'],
        [
            [
                f"{dict(mean_teacher='mean teacher', semi_detr='Semi-DETR').get(r['name'], r['name'])}, {r['stage']}",
                ms(r['theirs_ms']),
                ms(r['ours_ms']),
                times(r, 'cost'),
                f"{r['pseudo_boxes'] or 0:.1f}",
            ]
            for r in rows('semi', quantity='cost of a step')
        ],
    )
)

# %%
#| label: tbl-speed-native
#| tbl-cap: "The supervised step with `SEMIDETR_OPS=torch` and with the native op, in two processes that take turns, one thread."
#| echo: false
markdown(
    markdown_table(
        ['preset', 'plain PyTorch, ms', 'native, ms', 'faster'],
        [[r['case'], ms(r['theirs_ms']), ms(r['ours_ms']), times(r)] for r in rows('semi', name='native op')],
    )
)

# %% [markdown]
# ## Does it learn the same?
#
# The native op rounds differently from plain PyTorch, and training multiplies rounding. So the demonstration
# of the first release was trained once more with `SEMIDETR_OPS=torch`: same split, same seed, same number of
# iterations.

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


twins = [(r, next(n for n in native if n['seed'] == r['seed'])) for r in plain]
quality = [
    [
        str(r['seed']),
        arm.replace('_', ' '),
        f'{ap(n, arm):.1f}',
        f'{ap(r, arm):.1f}',
        f'{ap(r, arm) - ap(n, arm):+.1f}',
    ]
    for r, n in twins
    for arm in r['arms']
]
spread = max(ap(r, 'supervised') for r in native) - min(ap(r, 'supervised') for r in native)
worst = max(abs(ap(r, arm) - ap(n, arm)) for r, n in twins for arm in r['arms'])
assert worst < spread, 'the op changes what is learnt'
markdown(
    markdown_table(['seed', 'arm', 'native op', 'plain PyTorch', 'difference'], quality, 'llrrr')
    + f"\n\nThe largest difference is {worst:.1f} AP; seeds of one arm lie {spread:.1f} AP apart."
)

# %% [markdown]
# ## Repeat it
#
# ```bash
# make bench                                    # everything, then this page
# make bench BENCH=--quick                      # a smoke version, results in build/bench/
# .venv/bin/python benchmarks/run.py --only op step   # some parts
# ```
#
# transformers comes with the extra `[bench]`, which `make bench` installs; no weights are downloaded. Nothing
# here ran on a GPU.
#
# ## Summary

# %%
#| echo: false
best = max(rows('step', name='best', threads=1), key=lambda r: r['ratio'][1])
encoder = [
    r['ratio'][1] for r in rows('op', name='fused', quantity='step', threads=1) if r['case'].startswith('enc')
]
points = [
    f"- The attention pipeline of the encoder is {min(encoder):.0f} to {max(encoder):.0f} times as fast as transformers', forward and backward, in one thread, with "
    f"{memory['their pipeline'] / memory['fused']:.0f} times less extra memory.",
    f"- The whole model gains at most {best['ratio'][1]:.1f}x ({best['quantity']}, {CASE[best['case']]}, {best['variant']}): what remains are convolutions and matrices that both sides share.",
    f"- {len(met)} of {len(judged)} aims are met (@tbl-speed-aims)"
    + (f', {len(missed)} are missed.' if missed else '.'),
]
assert ('missed' in points[-1]) == bool(missed)
markdown('\n'.join(points))
