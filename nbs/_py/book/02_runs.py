# %% [markdown]
# # Executed runs {#sec-appendix}
#
# > One page a study, made of the run notebooks that papermill executed: what every arm was asked, and what it
# > answered.
#
# A number on a page of results comes from a record, a record from a run, and a run is an executed notebook
# (@sec-abl-run). Those notebooks lie beside their checkpoints, where readers of the site cannot see them. So
# `semidetr ablate` (@sec-ablate) gathers them: for the first seed of a study, the parameters of each run and
# the outputs of its cells, in the order of the arms. The code of the cells is the same in all of them and is
# not repeated.

# %%
#| default_exp book.runs

# %%
#| export
import argparse
import json
import re
import sys
from pathlib import Path
from semidetr.core import atomic_write
from semidetr.book.pages import cell_text, make_cell, split_directives
from semidetr.lab.plan import STUDIES, plan
from semidetr.lab.study import load_study

# %%
#| hide
import tempfile
from types import SimpleNamespace
import matplotlib.pyplot as plt


# %% [markdown]
# ## A run, without its code
#
# What stays of a notebook: the cell with its parameters, and every output. Labels of figures get the name of
# the run, since a book may have each label once.

# %%
#| export
def name_of(
    run,  # `Run` of a study
) -> str:  # letters, digits and hyphens
    "A run in a label"
    return re.sub(r'[^A-Za-z0-9]+', '-', f'{run.group} {run.arm}').strip('-')


def study_of(
    run,  # `Run` of a study
) -> str:  # name of the page
    "The study; at another scale than its own it has another folder, and another page"
    return Path(run.where).parts[0]


def run_cells(
    run,  # finished `Run`
    study: str,  # part of every label
) -> list:  # cells
    "Heading, parameters and outputs of an executed run"
    key, kept = f'{study}-{name_of(run)}'.replace('_', '-'), []
    for c in json.loads(run.notebook.read_text())['cells']:
        if c['cell_type'] != 'code':
            continue
        _, options, code = split_directives(cell_text(c['source']))
        if 'injected-parameters' in c['metadata'].get('tags', []):
            kept.append(make_cell('code', code, outputs=[], execution_count=None))
        if not c['outputs']:
            continue
        options = [re.sub(r'(label:\s*fig-[\w-]+)', rf'\1-{key}', line) for line in options]
        outputs = [o | dict(execution_count=None) if 'execution_count' in o else o for o in c['outputs']]
        kept.append(
            make_cell(
                'code', '\n'.join(['#| echo: false', *options, '...']), outputs=outputs, execution_count=None
            )
        )
    return [
        make_cell(
            'markdown',
            f"## {' '.join(filter(None, (run.group, run.arm)))}, seed {run.seed} {{#sec-runs-{key}}}",
        ),
        *kept,
    ]


# %% [markdown]
# ## A study

# %%
#| export
def executed_page(
    runs: list,  # finished `Run`s of one study
) -> dict:  # a notebook
    "The runs of a study as one page"
    study = study_of(runs[0])
    intro = f"# Executed runs: `{study}` {{#sec-runs-{study.replace('_', '-')}}}\n\n> Parameters and outputs of the run notebooks of this study's first seed.\n\nEach section is one run: the notebook of @sec-abl-run with the parameters shown. Its code is the same for all and stands there."
    cells = [make_cell('markdown', intro), *(c for r in runs for c in run_cells(r, study))]
    for i, c in enumerate(cells):
        c['id'] = f'c{i:04d}'
    return dict(
        cells=cells,
        metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')),
        nbformat=4,
        nbformat_minor=5,
    )


def write_appendix(
    runs: list,  # `Run`s of the first seed of any studies, all groups and arms
    folder,  # of the pages
) -> list:  # paths of the pages that are there
    "One page a study of the runs that were executed; a page is replaced when all of them were"
    paths, studies = [], {}
    for r in runs:
        if study_of(r) in r.folder.parts:
            studies.setdefault(study_of(r), []).append(r)  # not the burn-ins of another study
    for study, own in studies.items():
        path, executed = Path(folder) / f'{study}.ipynb', [r for r in own if r.notebook.is_file()]
        if executed and (executed == own or not path.is_file()):
            text = json.dumps(executed_page(executed), indent=1, sort_keys=True, ensure_ascii=False) + '\n'
            if not path.is_file() or path.read_text(encoding='utf-8') != text:
                atomic_write(path, text)
        if path.is_file():
            paths.append(path)
    return paths


# %%
toy = Path(tempfile.mkdtemp())
output = dict(output_type='execute_result', execution_count=1, metadata={}, data={'text/markdown': ['fine']})
(toy / 'run.ipynb').write_text(
    json.dumps(
        dict(
            cells=[
                make_cell('markdown', '# One run {#sec-abl-run}'),
                dict(make_cell('code', 'seed = 0', outputs=[]), metadata=dict(tags=['injected-parameters'])),
                make_cell('code', '#| label: fig-curve\nplot()', outputs=[output]),
                make_cell('code', 'nothing()', outputs=[]),
            ]
        )
    )
)
page = executed_page(
    [
        SimpleNamespace(
            study='toy_study',
            where='toy_study/p1',
            group='p1',
            arm='a',
            seed=0,
            folder=toy,
            notebook=toy / 'run.ipynb',
        )
    ]
)
assert [c['source'] for c in page['cells'][2:]] == [
    'seed = 0',
    '#| echo: false\n#| label: fig-curve-toy-study-p1-a\n...',
]
[c['source'].splitlines()[0] for c in page['cells']]


# %% [markdown]
# `semidetr ablate` calls this module as a program when the records of the book have changed, because the book
# is not part of the installed package.

# %%
#| export
def main(
    argv=None,  # names of studies and the options below; None: those of the process
) -> int:  # exit code
    "`python -m semidetr.book.runs NAME ...`: write the pages of these studies, in a checkout; say which the book does not list"
    ap = argparse.ArgumentParser(
        prog='python -m semidetr.book.runs', description='Write one page of executed runs for each study'
    )
    ap.add_argument('names', nargs='+', metavar='STUDY')
    ap.add_argument('--scale', default='', help="of the runs; default: the study's own")
    ap.add_argument('--out', default='runs/studies', help='folder of the runs')
    ap.add_argument('--data', default='', help="data set that the runs were given instead of the study's own")
    a, firsts = ap.parse_args(argv), []
    for name in a.names:
        firsts += plan(STUDIES, name, a.scale, load_study(STUDIES, name, a.scale)['seeds'][:1], a.out, a.data)
    listed = Path('_quarto.yml').read_text(encoding='utf-8')
    for page in write_appendix(firsts, STUDIES.parent / 'runs'):
        if page.as_posix() not in listed:
            print(
                f'{page}: the executed runs; list it under `appendices` in _quarto.yml to have it in the book'
            )
    return 0


# %%
#| export
if __name__ == '__main__' and globals().get('__spec__'):
    sys.exit(main())

# %%
#| label: fig-appendix-way
#| fig-cap: "The way of a number. What the two ends have in common is the hash of the configuration: a page shows it, and so does the executed notebook."
#| fig-alt: "Boxes and arrows: configuration, run notebook, record of the seed, table of a page; and from the run notebook to the appendix"
fig, ax = plt.subplots(figsize=(7, 1.9), dpi=80)
boxes = {
    'configuration\nand its hash': (0, 1),
    'executed\nrun notebook': (1, 1),
    'record\nof the seed': (2, 1),
    'table\nof a page': (3, 1),
    'page of\nexecuted runs': (2, 0),
}
for name, (x, y) in boxes.items():
    ax.text(x, y, name, ha='center', va='center', fontsize=9, bbox=dict(boxstyle='round', facecolor='white'))
for (x, y), (u, v) in (((0, 1), (1, 1)), ((1, 1), (2, 1)), ((2, 1), (3, 1)), ((1, 1), (2, 0))):
    ax.annotate('', (u - 0.36, v), (x + 0.36, y - 0.12 * (v < y)), arrowprops=dict(arrowstyle='->'))
ax.annotate('', (3, 0.78), (2.36, 0), arrowprops=dict(arrowstyle='<-', linestyle=':'))
ax.set(xlim=(-0.5, 3.5), ylim=(-0.5, 1.5))
ax.set_axis_off()
plt.show()

# %% [markdown]
# ## Summary
#
# - A reader can follow a number from the page to its record, to its hash, and to the notebook that made it.
# - The pages are generated; those that `_quarto.yml` lists under `appendices` are part of the book, and pages
#   of results link to them.
#
# ## Exercises
#
# 1. Find the run of the mean teacher of one study, and check that its hash is the one below the table of
#    results.
