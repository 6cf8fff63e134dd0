# %% [markdown]
# # Long trainings on a GPU {#sec-gpu-evidence}
#
# > See what the methods gain at a length that CPUs do not afford, or repeat it on a GPU in nine minutes.

# %%
#| hide
import json
from pathlib import Path
import matplotlib.pyplot as plt
from IPython.display import Markdown as markdown
from semidetr.lab.report import (
    difference,
    finding,
    markdown_table,
    plot_arms,
    spread,
    three_digits,
    values,
    verdict,
)

# %%
#| hide
home = Path('../../benchmarks/results')
on_gpu = (home / 'gpu_evidence.json').exists()
record = json.loads((home / ('gpu_evidence.json' if on_gpu else 'gpu_evidence_cpu.json')).read_text())
assert record['kit'] == 'gpu_evidence' and record['device'] == ('cuda' if on_gpu else 'cpu')
about, runs = record['environment'], record['runs']
ARMS = {
    'burn_in': 'burn-in',
    'supervised': 'supervised',
    'mean_teacher': 'mean teacher',
    'semi_detr': 'Semi-DETR',
    'semi_detr_plus': 'Semi-DETR plus',
}
studies = list(dict.fromkeys(r['study'] for r in runs))
precision = dict(bf16='bfloat16', fp16='float16', off='float32')
control = f"{record['settings']['control']}_fp32"
ARMS[control] = f"{ARMS.get(record['settings']['control'], '')}, float32"


def finished(study):
    "Its runs that reached their end, with metrics, as reports read them: one entry per seed"
    by_seed = {}
    for r in runs:
        if r['study'] == study and r['state'] == 'done' and r['metrics']:
            by_seed.setdefault(r['seed'], {})[r['arm']] = r
    return [dict(seed=seed, arms=arms) for seed, arms in by_seed.items()]


def with_arms(study, *arms):
    "Seeds whose runs of all these arms are there, with the test split"
    return [s for s in finished(study) if all('val' in s['arms'].get(a, {}).get('metrics', {}) for a in arms)]


# %%
#| echo: false
if on_gpu:
    sentence = f"All numbers on this page were measured on one GPU: {about['gpu']}."
else:
    sentence = (
        '**The kit has not run on a GPU yet.** What follows is its smoke scale on a CPU: the same code '
        'with a tiny network and generated scenes for a few iterations. It shows that every part runs; its '
        'AP, times and differences mean nothing.'
    )
if not record['ended']:
    sentence += ' **The record was cut short; it holds what was done until then.**'
for line in record['left_out']:
    sentence += f' **Left out: {line}.**'
markdown(finding(sentence.replace('**', '')))

# %%
#| label: fig-gpu-evidence-arms
#| fig-cap: "AP on the test split by arm; each line is a seed."
#| fig-alt: "For each data set the AP of every arm, one line per seed, without and with suppression"
#| echo: false
complete = [s for s in studies if with_arms(s, 'supervised', 'mean_teacher', 'semi_detr', 'semi_detr_plus')]
fig, axes = plt.subplots(
    1, max(1, len(complete)), figsize=(4.2 * max(1, len(complete)), 2.8), dpi=80, layout='constrained'
)
for study, ax in zip(complete, [axes] if len(complete) < 2 else axes):
    shown = [a for a in ARMS if a != 'burn_in' and with_arms(study, a)]
    named = {a: ARMS[a] for a in shown}
    plot_arms(with_arms(study, *shown), named, 'AP', ax)
    plot_arms(with_arms(study, *shown), named, 'AP_nms', ax, 'grey')
    ax.set(ylabel='AP (grey: with NMS)', title=with_arms(study, *shown)[0]['arms'][shown[0]]['data'])
plt.show()

# %%
#| label: tbl-gpu-evidence-ap
#| tbl-cap: "AP of the teacher in percent (for supervised training the averaged student), without and with suppression, on the development part and the test split; mean and standard deviation over seeds."
#| echo: false
lines = []
for study in studies:
    for arm, name in ARMS.items():
        seeds = [s for s in finished(study) if arm in s['arms']]
        if not seeds:
            continue
        first = seeds[0]['arms'][arm]
        cells = []
        for part in ('dev', 'val'):
            for key in ('AP', 'AP_nms'):
                there = all(part in s['arms'][arm]['metrics'] for s in seeds)
                cells.append(spread(values(seeds, arm, key, part=part)) if there else '')
        lines.append([first['data'], name, first['images']['labelled'], first['iterations'], *cells])
columns = ['data', 'arm', 'labelled', 'iterations', 'dev', 'dev, NMS', 'test', 'test, NMS']
markdown(markdown_table(columns, lines, 'llrrrrrr') if lines else 'No training reached its end.')

# %% [markdown]
# ## How it was measured {.fold}
#
# The studies of this book train for a few hundred iterations, because they run on CPUs. `make gpu-evidence`
# trains up to 5,000 iterations from a burn-in of up to 1,000, with few labelled images of fod12 and of txl_pbc
# (@sec-abl-txl): supervised, mean teacher, Semi-DETR, and Semi-DETR with a learned suppressor
# (`semi_detr_plus`). All trainings run side by side on one card, a process each. Settings are those of the
# studies `fod12` and `txl_semi`; the stages keep their shares of the iterations.
#
# The comparison is paired: the arms of a data set and seed start from one burn-in and take the same number of
# iterations. That number follows from a measurement. All trainings run at once for a few seconds; the slowest
# one sets the rate $r$ in iterations per second, and with $T$ seconds left for training, $n$ iterations are
# planned:
#
# $$n = \min\left(n_{\max}, \lfloor 0.85\, r\, T \rfloor\right)$$ {#eq-gpu-iterations}
#
# At every twentieth of $n$ the arms wait for each other; if the next part does not fit into the time that is
# left, all of them end there. The kit takes at most nine minutes, needs no network and installs nothing. It
# writes its record whenever a training ends, so a record that was cut short holds what was done. This page
# only reads that record.

# %% [markdown]
# ## The machine and the plan {.fold}

# %%
#| label: tbl-gpu-evidence-machine
#| tbl-cap: "Hardware, versions, date and time of the record."
#| echo: false
spent = ', '.join(f'{k} {v:.0f}' for k, v in record['wall_s'].items())
lines = [
    ['GPU', about['gpu'] or 'none'],
    ['CPU', f"{about['cpu']}, {about['cores']} logical cores"],
    ['torch', f"{about['torch']}, CUDA {about['cuda'] or 'none'}"],
    ['attention op', about.get('op', '')],
    ['precision', precision[record['settings']['amp']]],
    ['commit and date', f"{about['commit']}, {about['date']}"],
    ['seconds', f"{record['seconds']:.0f} of at most {record['limit_s']:.0f}: {spent}"],
]
markdown(markdown_table(['what', 'value'], lines, 'll'))

# %%
#| label: tbl-gpu-evidence-plan
#| tbl-cap: "Plan by data set: trainings at once, rate of the slowest while all of them run, seconds for training, and iterations (in brackets those of the plan, where the time ended earlier)."
#| echo: false
lines = []
for part, plans in record['plan'].items():
    for study, plan in plans.items():
        rate = three_digits(plan['rates'][plan['slowest']])
        taken = str(plan['iterations'])
        if 'ended_at' in plan:
            taken = f"{plan['ended_at']} ({plan['iterations']})"
        lines.append(
            [part, study, len(plan['rates']), plan['slowest'], rate, f"{plan['seconds']:.0f}", taken]
        )
columns = ['part', 'study', 'trainings', 'slowest', 'iterations/s', 'seconds', 'iterations']
markdown(markdown_table(columns, lines, 'llrlrrr') if lines else 'Nothing was planned.')

# %% [markdown]
# ## Differences {.fold}
#
# Pairs of the same seed, without suppression, on the test split.

# %%
#| echo: false
PAIRS = [
    ('mean_teacher', 'supervised'),
    ('semi_detr', 'supervised'),
    ('semi_detr_plus', 'supervised'),
    ('semi_detr', 'mean_teacher'),
    ('semi_detr_plus', 'mean_teacher'),
    (control.removesuffix('_fp32'), control),
]
found_lines = []
for study in studies:
    for arm, base in PAIRS:
        if seeds := with_arms(study, arm, base):
            what = f"{seeds[0]['arms'][arm]['data']}: {ARMS[arm]} against {ARMS[base]}"
            found_lines.append(f'* {verdict(what, difference(seeds, arm, base))}')
markdown('\n'.join(found_lines) or 'No pair of trainings reached its end.')

# %% [markdown]
# ## Cost {.fold}

# %%
#| label: tbl-gpu-evidence-cost
#| tbl-cap: "Every training: precision, iterations, seconds of training (of which waiting for the others), largest GPU memory of tensors in MB, and how it ended."
#| echo: false
lines = []
for r in runs:
    title = f"{r['study']}, seed {r['seed']}: {ARMS.get(r['arm'], r['arm'])}"
    end = ': '.join(filter(None, [r['state'], r.get('reason')]))
    seconds = f"{three_digits(r.get('seconds'))} ({three_digits(r['waited_s'])})" if 'waited_s' in r else ''
    memory = three_digits(r.get('peak_gpu_mb'))
    lines.append([title, precision[r['amp']], r.get('iterations', ''), seconds, memory, end])
columns = ['training', 'precision', 'iterations', 'seconds', 'MB', 'end']
markdown(markdown_table(columns, lines, 'llrrrl') if lines else 'Nothing was trained.')

# %% [markdown]
# ## Reproduce it {.fold}
#
# ```bash
# make gpu-evidence                                    # on the GPU; data from SEMIDETR_DATA
# make gpu-evidence PY=/path/to/python GPU='--data /path/to/data --seeds 0 1'
# make gpu-evidence GPU='--smoke --device cpu'         # every part on the CPU, about a minute
# make nb NB=benchmarks/03_gpu_evidence                # this page, where the book's environment is
# ```
#
# `--seeds` adds trainings at once, so each of them takes fewer iterations. `--amp off` trains in float32. A
# GPU adds some gradients in no fixed order, so a repetition agrees within the noise of training only.
#
# ## Summary

# %%
#| echo: false
ends = [r['state'] for r in runs]
longest = max((r.get('iterations', 0) for r in runs), default=0)
text = f'- {ends.count("done")} of {len(ends)} trainings reached their end; '
text += f'the longest took {longest} iterations.'
if not on_gpu:
    text += '\n- No number on this page comes from a GPU.'
markdown(text)
