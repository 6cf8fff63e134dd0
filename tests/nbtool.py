"""Keep one notebook, its text twin and its module together: `nbtool.py export|run|fresh NAME ...`, or
`make nb NB=semi/01_mining`.

export: text twin -> notebook (outputs and cell ids of unchanged cells stay) -> module and index of names.
run:    the same, then execute the notebook in place and clean it, so that the committed outputs are fresh.
fresh:  execute a copy into `runs/book`, which the site shows instead; the committed notebook stays as it is.
check:  say which twins differ from their notebooks.
Without a NAME: all notebooks. Names are paths below nbs/: 00_core, semi/01_mining."""

import contextlib, os, subprocess, sys
from pathlib import Path
import jupytext, nbformat

ROOT = Path(__file__).resolve().parents[1]
NBS, TWINS = ROOT / 'nbs', ROOT / 'nbs' / '_py'
KERNEL = dict(name='python3', display_name='Python 3', language='python')
TWIN_FORMAT = dict(notebook_metadata_filter='-all', cell_metadata_filter='tags,-all')


def notebooks():
    "Every notebook of the book that has a twin: no executed runs, no hidden folders"
    return [
        f
        for f in sorted(NBS.rglob('*.ipynb'))
        if not any(p[0] in '_.' or p == 'runs' for p in f.relative_to(NBS).parts)
    ]


def twin_text(nb_path):
    "The py:percent text that the notebook's source cells stand for"
    nb = jupytext.read(nb_path)
    nb.metadata['jupytext'] = TWIN_FORMAT
    return jupytext.writes(nb, 'py:percent')


def twin_of(path):
    return TWINS / path.relative_to(NBS).with_suffix('.py')


def stale():
    "Notebooks without a twin or with a different one, and twins without a notebook"
    paths = notebooks()
    bad = [f for f in paths if not twin_of(f).exists() or twin_of(f).read_text() != twin_text(f)]
    bad += [t for t in sorted(TWINS.rglob('*.py')) if t not in map(twin_of, paths)]
    return [f'{f.parent.name}/{f.stem}' for f in bad]


@contextlib.contextmanager
def one_at_a_time():
    "Two exports at once would both write the index of names"
    with open(ROOT / '.venv' / '.nb.lock' if (ROOT / '.venv').is_dir() else os.devnull, 'w') as f:
        with contextlib.suppress(ImportError):
            import fcntl

            fcntl.flock(f, fcntl.LOCK_EX)
        yield


def update(name):
    "Bring the text of `nbs/_py/NAME.py` into `nbs/NAME.ipynb`"
    twin, path = TWINS / f'{name}.py', NBS / f'{name}.ipynb'
    new = jupytext.read(twin, fmt='py:percent')
    if path.exists():
        from jupytext.combine import combine_inputs_with_outputs

        new = combine_inputs_with_outputs(
            new, nbformat.read(path, 4), fmt={'extension': '.py', 'format_name': 'percent'}
        )
    new.metadata = nbformat.NotebookNode(kernelspec=KERNEL)
    new.nbformat, new.nbformat_minor = 4, 5
    for i, c in enumerate(new.cells):
        c.setdefault('id', f'c{i:03d}')
        c.metadata = {k: v for k, v in c.metadata.items() if k == 'tags'}
        if c.cell_type == 'code':
            c.setdefault('outputs', [])
            c.setdefault('execution_count', None)
    taken = set()
    for c in new.cells:
        while c['id'] in taken:
            c['id'] += 'x'
        taken.add(c['id'])
    write(new, path)
    format_code(path)
    twin.write_text(twin_text(path))
    return path


def format_code(path):
    "One layout for all code, so that nobody discusses it; the settings are in pyproject.toml"
    ruff = Path(sys.executable).with_name('ruff')
    subprocess.run([ruff, 'format', '--quiet', '--no-cache', path], check=True)


def write(nb, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    from nbdev.clean import clean_nb
    from execnb.nbio import write_nb, dict2nb

    nb = dict2nb(nb)
    clean_nb(nb, clear_all=False, allowed_cell_metadata_keys=['tags'])
    write_nb(nb, path)


def export(path):
    from nbdev.export import nb_export

    if any(
        c.cell_type == 'code' and c.source.lstrip().startswith('#| default_exp')
        for c in nbformat.read(path, 4).cells
    ):
        nb_export(path, lib_path=ROOT / 'semidetr')
        from nbdev.doclinks import _build_modidx

        _build_modidx()


def run(path, timeout=900, to=None):
    from nbclient import NotebookClient

    nb = nbformat.read(path, 4)
    NotebookClient(
        nb, timeout=timeout, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}}
    ).execute()
    write(nb, to or path)


def main(job, names):
    os.chdir(ROOT)
    os.environ.pop('MPLBACKEND', None)  # pictures go into the notebook
    if job == 'check':
        bad = stale()
        return f"text and notebook differ: {', '.join(bad)} (run `make nb NB=name`)" if bad else 0
    if job == 'fresh':
        for name in names:
            path = NBS / f'{name}.ipynb'
            run(path, to=ROOT / 'runs' / 'book' / path.relative_to(ROOT))
        return 0
    for name in names or sorted(str(t.relative_to(TWINS).with_suffix('')) for t in TWINS.rglob('*.py')):
        with one_at_a_time():
            path = update(name)
            export(path)
        if job == 'run':
            run(path)


if __name__ == '__main__':
    if len(sys.argv) < 2 or sys.argv[1] not in ('export', 'run', 'fresh', 'check'):
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], sys.argv[2:]))
