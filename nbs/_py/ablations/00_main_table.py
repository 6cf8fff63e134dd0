# %% [markdown]
# # The main table {#sec-abl-main}
#
# > Three methods, two kinds of images, several fractions of labels; and the published table beside it, in its
# > own colour.
#
# Within a row all methods start from the same burn-in checkpoint of a seed, keep the same labelled images,
# and take equally many iterations of equally many images. The detector is DINO (@sec-detector) at a size that
# trains on two cores. Settings were chosen on development parts; test splits were read for these tables. On
# the blood cells Semi-DETR takes its labels by class rates (@eq-mining-rate), which is this book's and not
# the paper's; the mean teacher has one threshold of .3.

# %% tags=["parameters"]
results = 'results'  # folder of results

# %%
#| hide
from pathlib import Path
from statistics import mean
import matplotlib.pyplot as plt
from IPython.display import Markdown as markdown
from semidetr.draw import COLORS
from semidetr.lab.report import markdown_table
from semidetr.lab.report import (
    as_published,
    difference,
    plus_minus,
    published,
    read_records,
    scale_line,
    spread,
    values,
    verdict,
)

# %%
#| hide
digits = dict(
    supervised='supervised', mean_teacher='mean_teacher', semi_detr='shm_cqc_cpm'
)  # method -> arm of the study
cells = dict(supervised='supervised', mean_teacher='mean_teacher', semi_detr='semi_detr')
where = {
    ('digits', '20 scenes'): ('components', digits),
    ('digits', '50 scenes'): ('components_50', digits),
    ('txl_pbc', '1 %'): ('txl_semi/p1', cells),
    ('txl_pbc', '5 %'): ('txl_semi_long/p5', cells),
    ('txl_pbc', '10 %'): ('txl_semi_long/p10', cells),
}
names = dict(supervised='supervised', mean_teacher='mean teacher', semi_detr='Semi-DETR')


def methods_only(study, arms):
    "Records whose arms are called as the methods"
    return [
        r | dict(arms={m: r['arms'][a] for m, a in arms.items()})
        for r in read_records(results, study, list(arms.values()))
    ]


rows = {
    key: methods_only(study, arms) for key, (study, arms) in where.items() if (Path(results) / study).is_dir()
}
assert all(len({r['arms'][m]['iterations'] for r in runs for m in names}) == 1 for runs in rows.values())


# %% [markdown]
# ## Measured here

# %%
#| label: tbl-abl-main
#| tbl-cap: "COCO AP on the test split, averaged network, no suppression: mean and standard deviation over the seeds; gains of Semi-DETR are paired, with their 95 % interval."
#| echo: false
def row_of(key, metric='AP'):
    runs = rows[key]
    return [
        f"{', '.join(key)} ({len(runs)})",
        *(spread(values(runs, m, metric)) for m in names),
        plus_minus(difference(runs, 'semi_detr', 'supervised', metric)),
        plus_minus(difference(runs, 'semi_detr', 'mean_teacher', metric)),
    ]


columns = ['images, labels (seeds)', *names.values(), 'gain over supervised', 'over mean teacher']
markdown(markdown_table(columns, [row_of(key) for key in rows], align='l' + 'r' * 5))

# %%
#| label: tbl-abl-main-nms
#| tbl-cap: "The same with per-class suppression at an IoU of .6. Semi-DETR is made to do without; @sec-abl-nms says what it would take."
#| echo: false
markdown(markdown_table(columns, [row_of(key, 'AP_nms') for key in rows], align='l' + 'r' * 5))


# %%
#| echo: false
def lines_of(key):
    "What may be said about a row"
    runs = rows[key]
    return (
        f"**{key[0]}, {key[1]}**\n\n"
        + '\n'.join(
            f"* {verdict(f'{names[a]} against {names[b]}', difference(runs, a, b))}"
            for a, b in (
                ('mean_teacher', 'supervised'),
                ('semi_detr', 'supervised'),
                ('semi_detr', 'mean_teacher'),
            )
        )
        + '\n\n'
        + scale_line(runs, names)
    )


markdown('\n\n'.join(map(lines_of, rows)))

# %%
#| label: fig-abl-main
#| fig-cap: "What unlabelled images add to supervised training: each point a seed, the bar the mean. Filled: as it is; rings: both suppressed."
#| fig-alt: "Gain in AP of the mean teacher and of Semi-DETR over supervised training, one column a row of the table"
#| echo: false
fig, ax = plt.subplots(figsize=(7.5, 3), dpi=80, layout='constrained')
for i, runs in enumerate(rows.values()):
    for m, shift, color in (
        ('mean_teacher', -0.17, COLORS['student']),
        ('semi_detr', 0.17, COLORS['teacher']),
    ):
        for metric, fill, off in (('AP', color, -0.05), ('AP_nms', 'none', 0.05)):
            each = difference(runs, m, 'supervised', metric)['each']
            ax.plot([i + shift + off] * len(each), each, 'o', color=color, markerfacecolor=fill, markersize=5)
            ax.plot(
                i + shift + off,
                mean(each),
                '_',
                color=color,
                markersize=14,
                markeredgewidth=2,
                label=names[m] if not i and metric == 'AP' else None,
            )
ax.axhline(0, color='black', linewidth=0.8)
ax.set(xticks=range(len(rows)), xticklabels=[f'{d}\n{n}' for d, n in rows], ylabel='AP against supervised')
ax.legend(fontsize=8)
plt.show()


# %% [markdown]
# ## Published
#
# The paper's table for COCO, with one, five and ten percent of its 118 287 training images labelled, and
# detectors more than twenty times the size. Absolute numbers cannot be compared with those above; what a
# method adds to its own supervised row can, with care: the paper trains for 120 000 iterations of 40 images,
# these rows for 180 to 300 of eight or ten, after a burn-in of 300 to 600.

# %%
#| label: tbl-abl-main-paper
#| tbl-cap: "COCO-Partial as published (coloured: not measured here): AP on val2017, mean and standard deviation over five folds."
#| echo: false
def cell(row, i):
    return as_published(f"{row['ap'][i]:.2f}" + (f" ± {row['std'][i]:.2f}" if 'std' in row else ''))


markdown(
    markdown_table(
        ['kind', 'method', '1 %', '5 %', '10 %'],
        [
            [row['category'], row['method'], *(cell(row, i) for i in range(3))]
            for row in published(results, 'coco_partial')
        ],
        align='llrrr',
    )
)

# %%
#| label: tbl-abl-main-steps
#| tbl-cap: "What each method adds to supervised training of the same detector (DINO): coloured as published, the rest measured here. For COCO the mean teacher is the paper's *SSOD baseline*."
#| echo: false
dino = {
    row['method'].rpartition(', ')[2] if ', ' in row['method'] else row['method']: row['ap']
    for row in published(results, 'coco_partial')
    if row['method'] in ('DINO, supervised only', 'DINO, SSOD baseline', 'Semi-DETR (DINO)')
}
gains = [
    [
        'COCO',
        f'{p} %',
        *(
            as_published(f"{dino[m][i] - dino['supervised only'][i]:+.1f}")
            for m in ('SSOD baseline', 'Semi-DETR (DINO)')
        ),
    ]
    for i, p in enumerate((1, 5, 10))
]
gains += [
    [*key, *(plus_minus(difference(runs, m, 'supervised')) for m in ('mean_teacher', 'semi_detr'))]
    for key, runs in rows.items()
]
markdown(markdown_table(['images', 'labels', 'mean teacher', 'Semi-DETR'], gains, align='llrr'))

# %% [markdown]
# The paper's own runs are one command on its machines:
# `semidetr ablate coco_partial --scale gpu --processes 8`, likewise `coco_full` and `voc` (@sec-guide-gpu).
#
# ## Summary
#
# - Rows are studies, columns arms; a later detector or data set is a few lines in `studies.toml`.
# - Where an interval covers zero, the lines say that no difference was found; they are computed.
# - What separates the methods is taken apart in @sec-abl-components (parts), @sec-abl-nms (suppression) and
#   @sec-abl-txl-semi (real images).
# - To repeat: `semidetr ablate components`, `components_50`, `txl_semi`, `txl_semi_long`.
