# %% [markdown]
# # A model card for every run {#sec-card}
#
# > Write down, in every run folder, what a detector was trained on, how well it does, and where it ends.
#
# *Why.* A folder of weights is passed on, and half a year later nobody knows on which images it was trained,
# whether its AP comes from 300 test images or from ten, and whether somebody chose the settings on these very
# images. All of it stands in `run.json`, which nobody reads. So the end of a training writes `card.md`: data and
# their splits, settings that differ from the defaults, metrics, and limits that follow from the numbers. Nothing
# in it is written by hand.

# %%
#| default_exp train.card

# %%
#| export
import re
from pathlib import Path
from semidetr.core import atomic_write, printable
from semidetr.train.config import Config, to_dict

# %%
import math
import tempfile
import matplotlib.pyplot as plt

# %% [markdown]
# ## Text that stays text
#
# Names of classes, files and folders come from elsewhere. A pipe in one of them would move the columns of a
# table, a `<` would start HTML.

# %%
#| export
_MARKS = re.compile(r'([\\`*_{}\[\]#|~^$@])')


def cell(
    value,  # text, number, list; None: not known
) -> str:  # one line
    "A value as Markdown that shows exactly its text, also in a table"
    if value is None or (isinstance(value, float) and value != value):
        return '-'
    if isinstance(value, float):
        return f'{value:.6g}'
    text = printable(' '.join(str(value).split()))
    return _MARKS.sub(r'\\\1', text.replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;'))


def table(
    head: list,  # titles of the columns
    rows: list,  # of lists of values
    right: int = 0,  # columns at the right end that hold numbers
) -> str:  # Markdown; '' without rows
    "A table whose cells are escaped"
    if not rows:
        return ''
    marks = [':---'] * (len(head) - right) + ['---:'] * right
    lines = [head, *([cell(v) for v in row] for row in rows)]
    lines.insert(1, marks)
    return '\n'.join(f"| {' | '.join(line)} |" for line in lines)


# %%
hostile = table(['class', 'AP'], [['a|b <script>\n`x`', 31.25], ['none', float('nan')]], right=1)
assert hostile.splitlines()[2] == r'| a\|b &lt;script&gt; \`x\` | 31.25 |'
print(hostile)


# %% [markdown]
# ## Settings that differ from the defaults

# %%
#| export
def flat_settings(
    values: dict,  # nested, from `to_dict`
    where: str = '',  # prefix of the names
) -> dict:  # 'group.field' -> value
    "Settings by their dotted names"
    out = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out |= flat_settings(value, f'{where}{key}.')
        else:
            out[f'{where}{key}'] = value
    return out


def changed_from_default(
    values: dict,  # nested settings of a run
) -> list:  # of [name, value, default]; None: the default configuration has no such setting
    "Settings of a run that are not the defaults of `Config`"
    usual = flat_settings(to_dict(Config()))
    return [[k, v, usual.get(k)] for k, v in flat_settings(values).items() if k not in usual or v != usual[k]]


# %%
toy_values = to_dict(Config())
toy_values['optim']['lr'] = 0.01
assert changed_from_default(toy_values) == [['optim.lr', 0.01, 1e-4]]
changed_from_default(toy_values)

# %% [markdown]
# ## Limits that follow from the numbers

# %%
#| export
FEW = 100  # images below which a metric is called uncertain, objects are not counted
PARTS = dict(dev='development part', val='test split')


def limits_of(
    result: dict,  # content of run.json
) -> list:  # sentences
    "What a reader of the metrics must know"
    data, metrics, out = result['data'], result.get('metrics', {}), []
    if 'val' not in metrics:
        out.append(
            'No test split was measured. Settings may have been chosen on the development part, so its '
            'numbers can be too good.'
        )
    for part in metrics:
        if data.get(part, FEW) < FEW:
            out.append(f'The {PARTS.get(part, part)} has {data[part]} images: its numbers are uncertain.')
    last = metrics.get('val') or metrics.get('dev') or {}
    teacher = last.get('teacher', {})
    classes = teacher.get('per_class', {})
    unseen = [c for c, m in classes.items() if not isinstance(m.get('AP'), float) or m['AP'] != m['AP']]
    if unseen:
        out.append(f"Not measured, since no object of them was there: {', '.join(map(cell, unseen[:20]))}.")
    weak = [c for c, m in classes.items() if c not in unseen and m['AP'] < teacher['AP'] / 2]
    if weak:
        out.append(f"Less than half of the mean AP: {', '.join(map(cell, weak[:20]))}.")
    if teacher.get('AP_nms', 0) > teacher.get('AP', 0) + 1:
        gain = teacher['AP_nms'] - teacher['AP']
        out.append(f'It predicts duplicates: suppression (nms=0.6) adds {gain:.1f} AP.')
    return [
        *out,
        'Other cameras, lights and scenes than those of the training images were not measured.',
        'Scores rank detections; they were not calibrated as probabilities.',
    ]


# %%
toy_result = dict(
    name='mine',
    hash='0123456789ab',
    config=toy_values,
    versions=dict(semidetr='0.1.0', torch='2.6.0'),
    device='cpu',
    commit='abc',
    iterations=1200,
    seconds=1800.0,
    data=dict(classes=['cat', 'a|b'], labelled=40, unlabelled=900, dev=30, val=0, fingerprint='00ff'),
    health={},
    metrics=dict(
        dev=dict(
            teacher=dict(
                AP=30.0,
                AP50=52.0,
                AP75=31.0,
                AP_nms=35.5,
                per_class={'cat': dict(AP=48.0, AP50=70.0), 'a|b': dict(AP=12.0, AP50=34.0)},
            )
        )
    ),
)
assert len(limits_of(toy_result)) == 6
limits_of(toy_result)


# %% [markdown]
# ## The card

# %%
#| export
def _data_lines(result):
    "Section on the images"
    d, settings = result['data'], result['config'].get('data', {})
    roles = [
        ['labelled', d.get('labelled'), 'supervised losses'],
        ['unlabelled', d.get('unlabelled'), 'pseudo labels; their boxes, if any, were removed'],
        ['development', d.get('dev'), 'held out; settings may be chosen on it'],
        ['test', d.get('val'), 'reported numbers only' if 'val' in result['metrics'] else 'not measured'],
    ]
    places = {k: settings[k] for k in ('data', 'unlabelled', 'val', 'split_file') if settings.get(k)}
    chosen = [f'{k} {settings[k]:g}' for k in ('percent', 'count', 'shots') if settings.get(k)]
    draw = f"draw {settings.get('fold', 0)}, seed {settings.get('split_seed', 0)}"
    how = f"{', '.join(chosen) or 'all that are not held out'}, {draw}"
    how = 'those of the split file' if settings.get('split_file') else how
    return [
        '## Data',
        table(['role', 'images', 'used for'], roles),
        f"{len(d['classes'])} classes: {', '.join(map(cell, d['classes'][:100]))}.",
        f'Labelled images: {cell(how)}; fingerprint of the data {cell(d.get("fingerprint"))}.',
        table(['setting', 'where'], [[k, v] for k, v in places.items()]),
    ]


def _metric_lines(result):
    "Section on the metrics"
    keys, rows, classes = ('AP', 'AP50', 'AP75', 'AP_nms'), [], {}
    for part, networks in result.get('metrics', {}).items():
        for name, m in networks.items():
            rows.append([PARTS.get(part, part), name, *(_tenth(m.get(k)) for k in keys)])
        classes = networks.get('teacher', {}).get('per_class', classes)
    each = [[c, _tenth(m.get('AP')), _tenth(m.get('AP50'))] for c, m in classes.items()]
    return [
        '## Metrics',
        'COCO metrics in 0 to 100; the teacher is the network to use. AP_nms: with suppression (IoU 0.6).',
        table(['images', 'network', 'AP', 'AP50', 'AP75', 'AP with NMS'], rows, right=4),
        table(['class (teacher, last part above)', 'AP', 'AP50'], each, right=2),
    ]


def _tenth(x):
    return None if x is None or x != x else f'{x:.1f}'


# %%
#| export
def model_card(
    result: dict,  # content of run.json
) -> str:  # Markdown
    "What a detector was trained on, how well it does, and where it ends"
    cfg, v = result['config'], result.get('versions', {})
    method, n = cfg.get('method', {}).get('name'), result.get('iterations')
    h = result.get('health') or {}
    pseudo = [[k, h[k]] for k in ('pseudo_boxes', 'pseudo_precision', 'pseudo_recall') if k in h]
    sections = [
        f"# {cell(result.get('name'))}",
        f"An object detector, trained with semidetr {cell(v.get('semidetr'))}, method {cell(method)}.",
        *_data_lines(result),
        '## Training',
        f"{cell(n)} iterations in {result.get('seconds', 0) / 60:.0f} minutes on "
        f"{cell(result.get('device'))}; "
        f"torch {cell(v.get('torch'))}, commit {cell(result.get('commit'))}, "
        f"settings {cell(result.get('hash'))}.",
        table(['setting', 'value', 'default'], changed_from_default(cfg)),
        table(['last pseudo labels, per image', 'value'], pseudo),
        *_metric_lines(result),
        '## Limits',
        '\n'.join(f'- {line}' for line in limits_of(result)),
        '## Use',
        '```python\nimport semidetr\n\nfound = semidetr.predict(FOLDER_OF_THIS_CARD, "photo.jpg")\n```',
    ]
    return '\n\n'.join(filter(None, sections)) + '\n'


def write_card(
    result: dict,  # content of run.json
    folder,  # of the run
) -> Path:  # of the card
    "Write `card.md` into the folder of a run"
    path = Path(folder) / 'card.md'
    atomic_write(path, model_card(result))
    return path


# %%
card = write_card(toy_result, tempfile.mkdtemp()).read_text()
assert r'a\|b' in card and '| optim.lr | 0.01 | 0.0001 |' in card
assert [line for line in card.splitlines() if line.startswith('## ')][-1] == '## Use'
print(card[:700])

# %%
#| label: fig-card-uncertain
#| fig-cap: "Why the card warns of few images: the standard error of a share of 50 %, such as a recall, from the number of objects it is counted on."
#| fig-alt: "A falling curve: 16 percentage points at ten objects, 5 at a hundred, 1.6 at a thousand"
objects = [10, 30, 100, 300, 1000]
errors = [100 * math.sqrt(0.25 / n) for n in objects]
fig, ax = plt.subplots(figsize=(4.5, 2.2), dpi=80)
ax.plot(objects, errors, 'o-', color='#1f77b4')
ax.set(xscale='log', xlabel='objects', ylabel='standard error (points)')
plt.show()

# %% [markdown]
# ## Summary
#
# - Every run folder gets `card.md`: data, splits, settings, metrics, limits.
# - The limits follow from the numbers: few images, classes without objects, weak classes, duplicates.
# - Texts from files are escaped, so a name cannot change the page.
#
# ## Exercises
#
# 1. Which limit of your own data does the card not know?
# 2. Add the share of images without a box. Which function has to know it?
