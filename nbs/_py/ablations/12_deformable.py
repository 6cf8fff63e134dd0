# %% [markdown]
# # Semi-DETR with another detector {#sec-abl-deformable}
#
# > Compare supervised training, the mean teacher and Semi-DETR with two-stage Deformable-DETR and with DINO.
#
# Semi-DETR was published for DINO and for Deformable-DETR. Is its gain that of the method or of the detector?
# Here the detector is two-stage Deformable-DETR (@sec-deformable-detr), in its small size, on the digits with
# twenty labels, from two burn-ins: one as long as that of @sec-abl-components, and one four times as long, whose
# continuations are twice as long. All settings but the detector and these numbers are those of that page, so
# its runs are the comparison with DINO.

# %% tags=["parameters"]
results = 'results'  # folder of results

# %%
#| hide
from statistics import mean
import matplotlib.pyplot as plt
from IPython.display import Markdown as markdown
from semidetr.lab.report import (
    arm_table,
    markdown_table,
    plot_differences,
    read_records,
    scale_line,
    verdicts,
)

# %%
#| hide
names = dict(supervised='supervised', mean_teacher='mean teacher', semi_detr='Semi-DETR')
short, long = (read_records(results, study, list(names)) for study in ('deformable', 'deformable_long'))
dino = read_records(results, 'components', ['supervised', 'mean_teacher', 'shm_cqc_cpm'])
assert all(r['arms'][a]['config']['detector']['form'] == 'two_stage' for r in short + long for a in names)
compared = {a: f'{n} against supervised' for a, n in names.items()}

# %% [markdown]
# ## From the longer burn-in

# %%
#| label: tbl-abl-deformable-long
#| tbl-cap: "COCO AP on 300 test scenes, twenty labels, two-stage Deformable-DETR after a burn-in of 1200 iterations: mean and standard deviation over the seeds; the paired difference to supervised training with its 95 % interval; the cost of a run."
#| echo: false
markdown(arm_table(long, names, 'supervised'))

# %%
#| echo: false
markdown(f"{verdicts(long, compared, 'supervised')}\n\n{scale_line(long, names)}")

# %%
#| label: fig-abl-deformable
#| fig-cap: "Differences to supervised training from the longer burn-in, both arms without NMS and both with NMS; 95 % intervals over the seeds."
#| fig-alt: "Differences of the mean teacher and of Semi-DETR to supervised training, with intervals"
#| echo: false
plot_differences(long, names, 'supervised', ('AP', 'AP_nms'))
plt.show()

# %% [markdown]
# ## From the burn-in of DINO's length

# %%
#| label: tbl-abl-deformable-short
#| tbl-cap: "The same after a burn-in of 300 iterations."
#| echo: false
markdown(arm_table(short, names, 'supervised'))

# %%
#| echo: false
markdown(f"{verdicts(short, compared, 'supervised')}\n\n{scale_line(short, names)}")


# %% [markdown]
# ## The teacher decides
#
# Pseudo labels are the teacher's detections. Deformable-DETR has no denoising queries and learns more slowly
# than DINO, so after equally many iterations its teacher is worse, and so are its pseudo labels:

# %%
#| label: tbl-abl-deformable-teacher
#| tbl-cap: "AP of the burn-in on the development part, and the pseudo labels of Semi-DETR against hidden truth over the whole run; means over the seeds."
#| echo: false
def row(name, records, arm):
    "Burn-in, precision and recall of the pseudo labels, and the gain over supervised training"
    start = mean(r['burn_in']['metrics']['dev']['teacher']['AP'] for r in records)
    quality = [
        mean(r['arms'][arm]['health'][f'pseudo_{k}'] for r in records) for k in ('precision', 'recall')
    ]
    ap = {
        a: mean(r['arms'][a]['metrics']['val']['teacher']['AP'] for r in records) for a in (arm, 'supervised')
    }
    gain = ap[arm] - ap['supervised']
    return [name, f'{start:.1f}', *(f'{q:.2f}' for q in quality), f'{gain:+.1f}']


markdown(
    markdown_table(
        ['detector, burn-in', 'AP of the burn-in', 'precision', 'recall', 'Semi-DETR - supervised (AP)'],
        [
            row('Deformable-DETR, 300 iterations', short, 'semi_detr'),
            row('Deformable-DETR, 1200 iterations', long, 'semi_detr'),
            row('DINO, 300 iterations', dino, 'shm_cqc_cpm'),
        ],
    )
)

# %% [markdown]
# ## Summary
#
# - The detector is the only change against @sec-abl-components, beside the lengths that the tables name.
# - Where an interval includes zero, the computed sentences say that no difference was found.
# - To reproduce: `semidetr ablate deformable deformable_long`.
