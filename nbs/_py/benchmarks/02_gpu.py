# %% [markdown]
# # On a GPU {#sec-gpu}
#
# > See what is known about the CUDA op and about training on a GPU, and find out the rest in six minutes.

# %%
#| hide
import json
from pathlib import Path
import matplotlib.pyplot as plt
from IPython.display import Markdown as markdown
from semidetr.draw import COLORS
from semidetr.lab.report import finding, markdown_table, three_digits

# %%
#| hide
home = Path('../../benchmarks/results')
on_gpu = (home / 'gpu_check.json').exists()
record = json.loads((home / ('gpu_check.json' if on_gpu else 'gpu_check_cpu.json')).read_text())
assert record['kit'] == 'gpu_check' and record['device'] == ('cuda' if on_gpu else 'cpu')
parts, about = record['parts'], record['environment']
place = 'GPU' if on_gpu else 'CPU'


def rows(part, *keys):
    "Rows of a part that have all of these keys"
    return [r for r in parts.get(part, {}).get('rows', []) if all(k in r for k in keys)]


METHOD = {'supervised': 'supervised', 'semi_detr': 'Semi-DETR'}
dino = rows('dino', 'images')


def pair(d):
    "Two numbers of a row"
    return f'{d["grid"]:.1e}, {d["cpu"]:.1e}'


# %%
#| echo: false
if on_gpu:
    sentence = f"All numbers on this page were measured on one GPU: {about['gpu']}."
else:
    sentence = (
        '**The kit has not run on a GPU yet. What follows is its small version on a CPU: the same code at '
        'small sizes. It shows that every part runs; its times and sizes say nothing about a GPU, and the '
        'CUDA kernels have not been executed on one.**'
    )
markdown(finding(sentence.replace('**', '')))

# %%
#| label: fig-gpu-dino
#| fig-cap: "Images per second of a training step of DINO, by method, batch and precision."
#| fig-alt: "Bars of images per second for the supervised step and the Semi-DETR step in float32 and bfloat16"
#| echo: false
bars = [r for r in dino if 'ms' in r]
assert all(r['images_per_second'] > 0 for r in bars)
names = [f"{METHOD[r['method']]}, batch {r['batch']}, {r['precision']}" for r in bars]
speeds = [r['images_per_second'] for r in bars]
fig, ax = plt.subplots(figsize=(6, 0.28 * len(bars) + 0.8), dpi=80)
colors = [COLORS['student' if r['method'] == 'supervised' else 'teacher'] for r in bars]
ax.barh(names[::-1], speeds[::-1], color=colors[::-1])
ax.tick_params(labelsize=9)
ax.set(xlabel=f'images per second ({place})')
plt.show()


# %%
#| label: tbl-gpu-dino
#| tbl-cap: "DINO: milliseconds of a training step, images per second, peak memory."
#| echo: false
def speed_line(r, *first):
    "A row with times, or what happened instead"
    if r.get('out_of_memory'):
        return [*first, '', '', 'out of memory']
    return [*first, three_digits(r['ms']), three_digits(r['images_per_second']), three_digits(r['peak_MB'])]


lines = [speed_line(r, METHOD[r['method']], r['batch'], r['images'], r['precision']) for r in dino]
columns = ['step', 'batch', 'images', 'precision', 'ms', 'images/s', 'peak, MB']
markdown(markdown_table(columns, lines, 'lrrlrrr'))

# %% [markdown]
# ## How it was measured {.fold}
#
# `make gpu-check` finds out what only a machine with a GPU can tell. It builds the CUDA op (@sec-native) and
# runs the tests that need a GPU. It compares the op with `grid_sample` and with the CPU, in values, gradients,
# time and memory; it compares one training step of every detector with the same step on the CPU. Then it
# measures images per second and peak memory of DINO with a ResNet-50, supervised and as Semi-DETR, and of
# Deformable-DETR beside that of transformers. It takes at most six minutes, needs no network and installs
# nothing; a part that needs a package that is not there is skipped and says so. This page only reads the files
# that it wrote.

# %% [markdown]
# ## The machine and the parts {.fold}

# %%
#| label: tbl-gpu-machine
#| tbl-cap: "Hardware, versions and date of the record."
#| echo: false
packages = ', '.join(f'{k} {v or "missing"}' for k, v in about['packages'].items())
cuda = f"torch {about['torch']}, CUDA {about['cuda'] or 'none'}, nvcc {about['nvcc'] or 'none'}"
lines = [
    ['GPU', about['gpu'] or 'none'],
    ['CPU', f"{about['cpu']}, {about['cores']} logical cores"],
    ['torch', cuda],
    ['packages', packages],
    ['commit and date', f"{about['commit']}, {about['date']}"],
]
markdown(markdown_table(['what', 'value'], lines, 'll'))

# %%
#| label: tbl-gpu-parts
#| tbl-cap: "Parts of the kit: how each one ended, and its time."
#| echo: false
WHAT = {
    'build': 'build the op',
    'tests': 'tests that need a GPU',
    'op': 'op: values, gradients, time, memory',
    'step': 'one training step of every detector',
    'dino': 'DINO: images per second and memory',
    'theirs': 'Deformable-DETR beside transformers',
}
assert list(parts) == list(WHAT), 'a record of the page has all parts'
lines = [[WHAT[k], p['state'], p['reason'] or '', f"{p.get('seconds', 0):.0f}"] for k, p in parts.items()]
failed = [WHAT[k] for k, p in parts.items() if p['state'] == 'failed']
assert record['ok'] == (not failed)
markdown(markdown_table(['part', 'end', 'reason', 'seconds'], lines, 'lllr'))

# %%
#| echo: false
text = f"{record['seconds']:.0f} of at most {record['limit_s']:.0f} seconds."
if failed:
    text += f" **Failed: {'; '.join(failed)}.**"
markdown(text)

# %% [markdown]
# ## The op {.fold}
#
# Each form of the op on this device, against two references: `grid_sample` on the same device, and the CPU in
# float32 with the same rounded inputs. Differences are the largest ones in units of the largest value; for the
# gradient of the locations, one sample in 10 000 is left out, since the slope jumps where a sample lies on the
# border of a cell. *Fused* starts from raw offsets and logits. Encoder: every cell of the pyramid is a query.

# %%
#| label: tbl-gpu-op
#| tbl-cap: "The op against `grid_sample` and the CPU: differences of output and gradients (from `grid_sample`, from the CPU), milliseconds of forward and backward, and extra memory in MB (op, `grid_sample`; on a GPU)."
#| echo: false
lines = []
for r in rows('op', 'ms'):
    what = [f"{r['case']}, {r['form']}", r['dtype'], pair(r['values']), pair(r['gradients'])]
    spent = [three_digits(r[k]) for k in ('ms', 'grid_ms', 'cpu_ms')]
    memory = ', '.join(filter(None, (three_digits(r[k]) for k in ('MB', 'grid_MB'))))
    lines.append([*what, *spent, memory])
columns = ['form', 'type', 'output', 'gradients', f'op, {place}', 'grid_sample', 'CPU', 'MB']
markdown(markdown_table(columns, lines, 'llrrrrrr'))

# %%
#| echo: false
wrong = [f"{r['case']}, {r['form']}, {r['dtype']}" for r in rows('op', 'ms') if not r['ok']]
left_out = sorted({r['skipped'] for r in rows('op', 'skipped')})
text = f"**Beyond the limits: {'; '.join(wrong)}.**" if wrong else 'All rows lie within the limits.'
markdown(text + (f" Not measured: {'; '.join(left_out)}." if left_out else ''))

# %% [markdown]
# ## One training step of every detector {.fold}
#
# Forward, matching and losses, and backward of each detector with random weights, once in plain PyTorch on the
# CPU and once with the op of this device. Both get the same images, the same boxes and the same random
# numbers; convolutions and matrix products use full float32.

# %%
#| label: tbl-gpu-step
#| tbl-cap: "Losses and gradients of the same step: total loss, largest relative difference of a single loss, norm of the gradient, and norm of the difference of both gradients divided by it."
#| echo: false
lines = []
for r in rows('step', 'loss'):
    worst = f"{r['worst_loss']['difference']:.1e}"
    norms = [three_digits(r['gradient_norm'][k]) for k in ('cpu', 'here')]
    far = f"{r['gradient_difference']:.1e}"
    lines.append([r['detector'], three_digits(r['loss']['cpu']), worst, *norms, far])
columns = ['detector', 'loss', 'difference', 'gradient, plain', 'gradient, op', 'difference']
markdown(markdown_table(columns, lines))

# %%
#| echo: false
broken = [f"{r['detector']}: {r['error']}" for r in rows('step', 'error')]
apart = [r['detector'] for r in rows('step', 'loss') if not r['ok']]
text = f"**Beyond the limits: {', '.join(apart)}.**" if apart else 'All rows lie within the limits.'
markdown(text + (f" **Not run: {'; '.join(broken)}.**" if broken else ''))

# %% [markdown]
# ## Images per second {.fold}
#
# A training step: forward and losses, backward, clipping, AdamW. *Semi-DETR* adds the teacher's pass over weak
# views, the student's over strong ones, mining and consistency; its batch counts the unlabelled images, to
# which one labelled image for every four (at least one) is added, and images per second count both kinds. An
# untrained teacher has low scores, so the thresholds are set such that about seven boxes per image pass.

# %%
#| echo: false
text = ''
if lines:
    p = parts['dino']
    text = f"Model: {p['model']}; images of {p['size'][0]} x {p['size'][1]} pixels; op: {p['op']}."
    tf32 = p['tf32'] or {}
    used = [k for k, on in tf32.items() if on]
    text += f" TF32 in float32: {', '.join(used) or 'none'}." if tf32 else ''
markdown(text)

# %%
#| label: tbl-gpu-theirs
#| tbl-cap: "Deformable-DETR (one stage, no refinement) of both libraries with the same weights: milliseconds of a training step, images per second, peak memory."
#| echo: false
theirs = rows('theirs', 'library')
lines = [speed_line(r, r['library'], r['batch'], r['precision']) for r in theirs]
columns = ['library', 'batch', 'precision', 'ms', 'images/s', 'peak, MB']
missing = '' if lines else parts['theirs']['reason']
markdown(markdown_table(columns, lines, 'lrlrrr') if lines else f'Not measured: {missing}.')

# %% [markdown]
# ## Reproduce it {.fold}
#
# ```bash
# make gpu-check                             # on the GPU; writes benchmarks/results/gpu_check.json
# make gpu-check PY=/path/to/python          # with the Python whose torch sees the GPU
# make gpu-check GPU='--only op step'        # some parts; for a look, add --out FILE
# make gpu-check GPU='--device cpu --small'  # every part on the CPU, a minute
# make nb NB=benchmarks/02_gpu               # this page, where the book's environment is
# ```
#
# The op needs torch and nvcc. The detectors also need torchvision and scipy, the tests need pytest, and the
# comparison needs transformers. A part that runs out of time keeps the rows that it has.
#
# ## Summary

# %%
#| echo: false
ends = [p['state'] for p in parts.values()]
agree = [r['ok'] for r in rows('op', 'ok') + rows('step', 'ok')]
text = f'- {ends.count("done")} of {len(ends)} parts ran to their end on a {place}; '
text += f'{sum(agree)} of {len(agree)} comparisons agree within their limits.'
if not on_gpu:
    text += '\n- No number on this page comes from a GPU.'
markdown(text)
