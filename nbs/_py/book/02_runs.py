# %% [markdown]
# # Executed runs {#sec-appendix}
#
# > Make one page per study of its executed run notebooks: parameters and outputs of every arm.
#
# A number on a page of results comes from a record, a record from a run, and a run is an executed notebook
# (@sec-abl-run). Those notebooks lie beside their checkpoints, where readers of the site cannot see them. So
# `semidetr ablate` (@sec-ablate) collects them: for the first seed of a study, the parameters of each run and
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
from semidetr.book.pages import cell_text, make_cell, split_directives
from semidetr.core import SemiDETRError, atomic_write
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
# Two things of a notebook are kept: the cell with its parameters, and every output. Labels of figures get the
# name of the run, since a book may have each label once.

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
    key = f'{study}-{name_of(run)}'.replace('_', '-')
    title = ' '.join(filter(None, (run.group, run.arm)))
    cells = [make_cell('markdown', f'## {title}, seed {run.seed} {{#sec-runs-{key}}}')]
    for c in json.loads(run.notebook.read_text())['cells']:
        if c['cell_type'] != 'code':
            continue
        _, options, code = split_directives(cell_text(c['source']))
        if 'injected-parameters' in c['metadata'].get('tags', []):
            cells.append(make_cell('code', code, outputs=[], execution_count=None))
        if not c['outputs']:
            continue
        options = [re.sub(r'(label:\s*fig-[\w-]+)', rf'\1-{key}', line) for line in options]
        source = '\n'.join(['#| echo: false', *options, '...'])
        outputs = [o | dict(execution_count=None) if 'execution_count' in o else o for o in c['outputs']]
        cells.append(make_cell('code', source, outputs=outputs, execution_count=None))
    return cells


# %% [markdown]
# ## A study

# %%
#| export
INTRO = """# Executed runs: `{study}` {{#sec-runs-{label}}}

> Parameters and outputs of the run notebooks of this study's first seed.

Each section is one run: the notebook of @sec-abl-run with the parameters shown. \
Its code is the same for all and stands there."""


def executed_page(
    runs: list,  # finished `Run`s of one study
) -> dict:  # a notebook
    "The runs of a study as one page"
    study = study_of(runs[0])
    cells = [make_cell('markdown', INTRO.format(study=study, label=study.replace('_', '-')))]
    for run in runs:
        cells += run_cells(run, study)
    for i, c in enumerate(cells):
        c['id'] = f'c{i:04d}'
    kernel = dict(name='python3', display_name='python3', language='python')
    return dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)


def write_appendix(
    runs: list,  # `Run`s of the first seed of any studies, all groups and arms
    folder,  # of the pages
) -> list:  # paths of the pages that are there
    "One page per study of the runs that were executed; a page is replaced when all of them were"
    paths, studies = [], {}
    for r in runs:
        if study_of(r) in r.folder.parts:  # not the burn-ins of another study
            studies.setdefault(study_of(r), []).append(r)
    for study, own in studies.items():
        path = Path(folder) / f'{study}.ipynb'
        executed = [r for r in own if r.notebook.is_file()]
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
toy_cells = [
    make_cell('markdown', '# One run {#sec-abl-run}'),
    dict(make_cell('code', 'seed = 0', outputs=[]), metadata=dict(tags=['injected-parameters'])),
    make_cell('code', '#| label: fig-curve\nplot()', outputs=[output]),
    make_cell('code', 'nothing()', outputs=[]),
]
(toy / 'run.ipynb').write_text(json.dumps(dict(cells=toy_cells)))
toy_run = SimpleNamespace(
    where='toy_study/p1', group='p1', arm='a', seed=0, folder=toy, notebook=toy / 'run.ipynb'
)
page = executed_page([toy_run])
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
    "`python -m semidetr.book.runs NAME ...`: write the pages, and name those that the book does not list"
    ap = argparse.ArgumentParser(
        prog='python -m semidetr.book.runs', description='Write one page of executed runs for each study'
    )
    ap.add_argument('names', nargs='+', metavar='STUDY')
    ap.add_argument('--scale', default='', help="of the runs; default: the study's own")
    ap.add_argument('--out', default='runs/studies', help='folder of the runs')
    ap.add_argument('--data', default='', help="data set that the runs were given instead of the study's own")
    a = ap.parse_args(argv)
    firsts = []
    try:
        for name in a.names:
            seeds = load_study(STUDIES, name, a.scale)['seeds'][:1]
            firsts += plan(STUDIES, name, a.scale, seeds, a.out, a.data)
    except SemiDETRError as e:
        print(e, file=sys.stderr)
        return 2
    pages = write_appendix(firsts, STUDIES.parent / 'runs')
    book = Path('_quarto.yml')
    if not book.is_file():
        return 0
    listed = book.read_text(encoding='utf-8')
    for page in pages:
        if page.as_posix() not in listed:
            cure = 'list it under `appendices` in _quarto.yml to have it in the book'
            print(f'{page}: the executed runs; {cure}')
    return 0


# %%
#| export
if __name__ == '__main__' and globals().get('__spec__'):
    sys.exit(main())

# %%
#| label: fig-appendix-way
#| fig-cap: "From a configuration to a number on a page. Both ends show the hash of the configuration: the table of the page, and the executed notebook."
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
# - A reader can follow a number from the page to its record, to its hash, and to the notebook behind it.
# - The pages are generated; those that `_quarto.yml` lists under `appendices` are part of the book, and pages
#   of results link to them.
#
# ## Exercises
#
# 1. Find the run of the mean teacher of one study, and check that its hash is the one below the table of
#    results.
