"Studies by one command: finished runs stay untouched, stopped ones resume, failures stop nothing else"

import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import nbformat, pytest
from conftest import ROOT
from semidetr.lab import ablate as A
from semidetr.cli import commands as cli
from semidetr.train.checkpoint import load_checkpoint
from semidetr.train.config import config_hash, override
from semidetr.data.catalog import open_dataset
from test_trainer import TINY

LATER = [
    'optim.iters=48',
    'method.T1=24',
    'method.burn_in_iters=0',
    'run.log_every=1',
    'pseudo.min_score=0',
    'pseudo.top_k=5',
    'mining.init=all',
    'consistency.hidden=8',
]
STUDY = f"""
[toy]
preset = "digits"
base = {json.dumps(TINY)}
burn_in = ["optim.iters=2"]
later = {json.dumps(LATER)}
[toy.arms]
semi_detr = ["method.name=semi_detr"]
supervised = ["method.name=supervised", "optim.iters=2"]
"""
FAKE = """# %% tags=["parameters"]
title = ''
folder = ''
expected = ''
processes = 1
# %%
import json, pathlib, time
place = pathlib.Path(folder)
assert 'fails' not in title, 'first line\\nits last line'
started = time.time(); time.sleep(.5)
log = place.parent.parent/'order.txt'
with log.open('a') as f: f.write(f'{title} {started} {time.time()}\\n')
data = dict(fingerprint='FINGERPRINT', labelled=1, unlabelled=2)
result = dict(name=place.name, hash=expected, data=data, peak_memory_mb=1, iterations=1)
result |= dict(commit='', machine='', seconds=1.0, cpu_seconds=1.0)
result['metrics'] = dict(val=dict(teacher=dict(AP=12.5)))
if 'silent' not in title: (place/'run.json').write_text(json.dumps(result))
"""


def checkout(folder, study=STUDY, fake=False):
    "The files of a checkout that the command needs"
    (folder / 'nbs' / 'ablations').mkdir(parents=True)
    (folder / A.STUDIES).write_text(study)
    if fake:
        import jupytext

        nb = jupytext.reads(
            FAKE.replace(
                'FINGERPRINT',
                open_dataset(
                    next(i for i in TINY if i.startswith('data.data')).partition('=')[2]
                ).fingerprint(),
            ),
            'py:percent',
        )
        nb.metadata['kernelspec'] = dict(name='python3', display_name='Python 3', language='python')
        nbformat.write(nb, folder / A.NOTEBOOK)
    else:
        shutil.copy(ROOT / A.NOTEBOOK, folder / A.NOTEBOOK)
    return folder


@pytest.fixture
def shell(capfd):
    "Run the command in this process: (exit code, stdout, stderr)"

    def call(*args):
        capfd.readouterr()
        with pytest.raises(SystemExit) as e:
            cli.main(['ablate', *map(str, args)])
        return e.value.code, *capfd.readouterr()

    return call


@pytest.fixture
def fake(tmp_path, monkeypatch, shell):
    "A checkout whose run notebook takes half a second, and the command in it"

    def make(study=STUDY):
        monkeypatch.chdir(checkout(tmp_path / 'book', study, fake=True))
        return shell

    return make


def stamps(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob('*') if p.is_file()}


def numbers(path):
    "What must not depend on how a study was run: all of its record but times, memory and the commit"

    def strip(x):
        if isinstance(x, dict):
            return {
                k: strip(v)
                for k, v in x.items()
                if k not in ('seconds', 'cpu_seconds', 'peak_memory_mb', 'commit')
            }
        return [strip(v) for v in x] if isinstance(x, list) else x

    return json.dumps(strip(json.loads(path.read_text())))


# --- real runs -------------------------------------------------------------------------
ENV = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}


def start(book, *args):
    return subprocess.Popen(
        [sys.executable, '-m', 'semidetr.cli', 'ablate', 'toy', '-q', *args],
        cwd=book,
        env=ENV,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # a shell's background jobs ignore SIGINT


def steps(folder):
    return A.steps_done(folder)


def until(ready, process, seconds=600):
    end = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.02)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "The study, two runs at a time, never disturbed"
    book = checkout(tmp_path_factory.mktemp('whole') / 'book')
    p = start(book, '--jobs', '2')
    out, err = p.communicate(timeout=600)
    assert p.returncode == 0 and not err, err
    return book, out


def test_a_study_leaves_notebooks_and_a_record(whole):
    book, out = whole
    path = book / 'nbs/ablations/results/toy/seed0.json'
    r = json.loads(path.read_text())
    assert (
        list(r['arms']) == ['semi_detr', 'supervised']
        and r['burn_in']['iterations'] == 2
        and r['arms']['semi_detr']['curve']['con_boxes'][0] > 0
        and str(path.relative_to(book)) in out
    )
    for arm, a in {'burn_in': r['burn_in'], **r['arms']}.items():
        nb = nbformat.read(book / a['notebook'], 4)
        shown = [o for c in nb.cells for o in c.get('outputs', [])]
        assert a['notebook'] == f'runs/studies/toy/seed0/{arm}/run.ipynb' and any(
            'image/png' in o.get('data', {}) for o in shown
        ), 'no loss curve'
        text = ' '.join(o['data'].get('text/markdown', '') for o in shown if 'data' in o)
        assert a['hash'] in text and 'teacher' in text and 'optim.iters' in text


def test_a_study_leaves_a_page_of_its_runs(whole):
    "Parameters and outputs of every run of the first seed; no label twice; no code of the cells"
    book, _ = whole
    record, page = (
        json.loads((book / 'nbs/ablations/results/toy/seed0.json').read_text()),
        nbformat.read(book / 'nbs/ablations/runs/toy.ipynb', 4),
    )
    nbformat.validate(page)
    runs = {'burn_in': record['burn_in'], **record['arms']}
    heads = [c.source for c in page.cells if c.cell_type == 'markdown']
    assert [h.partition(' {')[0] for h in heads[1:]] == [f'## {arm}, seed 0' for arm in runs]
    labels = [line for c in page.cells for line in c.source.splitlines() if 'label:' in line] + [
        h.rpartition('{')[2] for h in heads
    ]
    assert len(labels) == len(set(labels)) == 3 + 4
    shown = [json.dumps([o['data'] for o in c['outputs']]) for c in page.cells if c.cell_type == 'code']
    assert (
        all(any(a['hash'] in s for s in shown) for a in runs.values())
        and sum('image/png' in s for s in shown) == 3
    )
    assert (
        sum(
            f'folder = "{Path(a["notebook"]).parent.as_posix()}"' in c.source
            for a in runs.values()
            for c in page.cells
        )
        == 3
    )


def test_killed_and_stopped_studies_go_on(whole, tmp_path):
    "SIGKILL of all processes in an arm, then Ctrl-C in the same arm: the numbers of the undisturbed study"
    book = checkout(tmp_path / 'book')
    folder = book / 'runs/studies/toy/seed0'
    arm = folder / 'semi_detr'

    def kernels(p):
        import psutil

        return psutil.Process(p.pid).children(recursive=True)

    p = start(book, '--jobs', '1')
    until(lambda: steps(arm) >= 14, p)
    children = kernels(p)
    os.killpg(p.pid, signal.SIGKILL)
    p.wait()
    end = time.monotonic() + 20
    while any(c.is_running() and c.status() != 'zombie' for c in children):
        assert time.monotonic() < end, 'a kernel outlives its study'
        time.sleep(0.1)
    first = load_checkpoint(arm)['step']
    assert (
        12 <= first < 48
        and not (arm / 'run.json').exists()
        and (folder / 'burn_in' / 'run.ipynb').exists()
        and not (folder / 'supervised').exists()
    )
    before = stamps(folder / 'burn_in')
    again = (arm / 'log.jsonl').stat().st_mtime_ns
    p = start(book, '--jobs', '1')
    until(
        lambda: (arm / 'log.jsonl').stat().st_mtime_ns > again and steps(arm) > first, p
    )  # the log is cut at the checkpoint, and grows again
    os.kill(p.pid, signal.SIGINT)
    out, err = p.communicate(timeout=300)
    second = load_checkpoint(arm)['step']
    assert p.returncode == 130 and 'the same command goes on' in err and first < second < 48, (
        p.returncode,
        first,
        second,
        out,
        err,
    )
    p = start(book, '--jobs', '1')
    out, err = p.communicate(timeout=600)
    assert p.returncode == 0, err
    assert stamps(folder / 'burn_in') == before and numbers(
        book / 'nbs/ablations/results/toy/seed0.json'
    ) == numbers(whole[0] / 'nbs/ablations/results/toy/seed0.json')
    assert (
        not list(folder.rglob('run.part.ipynb'))
        and (arm / 'log.jsonl').read_text()
        == (whole[0] / 'runs/studies/toy/seed0/semi_detr/log.jsonl').read_text()
    )


# --- the engine, with a notebook that only pretends ------------------------------------
def test_order_records_and_no_second_time(fake, monkeypatch):
    "An arm waits for its own burn-in alone; two at a time; the same file for one job and for two; no repeats"
    shell = fake()
    code, out, err = shell('toy', '--seeds', '0-1', '--jobs', '2', '-q')
    assert (
        code == 0
        and not err
        and sorted(out.splitlines())
        == [f'nbs/ablations/results/toy/seed{s}.json: semi_detr 12.5, supervised 12.5' for s in (0, 1)]
    )
    rows = {
        ' '.join(l.split()[:-2]): [float(x) for x in l.split()[-2:]]
        for l in Path('runs/studies/toy/order.txt').read_text().splitlines()
    }
    assert len(rows) == 6 and all(
        rows[f'toy seed {s} burn_in'][1] <= rows[f'toy seed {s} {arm}'][0]
        for s in (0, 1)
        for arm in ('semi_detr', 'supervised')
    )
    assert max(sum(a <= t < b for a, b in rows.values()) for t, _ in rows.values()) == 2
    before = stamps(Path())
    code, again, _ = shell('toy', '--seeds', '0,1', '-q')
    assert code == 0 and sorted(again.splitlines()) == sorted(out.splitlines()) and stamps(Path()) == before
    one = {p.name: p.read_text() for p in Path('nbs/ablations/results/toy').iterdir()}
    shutil.rmtree('runs')
    shutil.rmtree('nbs/ablations/results')
    assert shell('toy', '--seeds', '2', '--jobs', '1', '-q')[0] == 0 and one == {
        p.name: p.read_text() for p in Path('nbs/ablations/results/toy').iterdir()
    }


def test_failures_are_named_and_stop_nothing_else(fake):
    shell = fake(STUDY.replace('[toy.arms]', '[toy.arms]\nfails = []\nsilent = []'))
    code, out, err = shell('toy', '-q', '--jobs', '2')
    assert code == 1 and not Path('nbs/ablations/results').exists() and 'Traceback' not in out + err
    assert {p.parent.name for p in Path('runs').rglob('run.ipynb')} == {'burn_in', 'semi_detr', 'supervised'}
    key = config_hash(next(r for r in A.plan(A.STUDIES, 'toy') if r.arm == 'silent').cfg)
    copies = [f'runs/studies/toy/seed0/{arm}/run.part.ipynb' for arm in ('fails', 'silent')]
    assert sorted(err.splitlines()) == [
        f'error: toy seed 0 fails: cell [3]: AssertionError: its last line; executed notebook: {copies[0]}',
        f'error: toy seed 0 silent: the notebook ended without the result of {key}; '
        f'executed notebook: {copies[1]}',
    ]
    assert Path(copies[0]).exists()
    before = stamps(Path('runs/studies/toy/seed0/semi_detr'))
    assert (
        shell('toy', '-q', '--jobs', '2')[0] == 1
        and stamps(Path('runs/studies/toy/seed0/semi_detr')) == before
    )  # failed ones are tried again, finished ones are not


def test_a_failed_burn_in_takes_its_arms_along(fake):
    shell = fake(STUDY.replace('toy', 'fails'))
    code, out, err = shell('fails', '-q')
    assert (
        code == 1
        and err.count('\n') == 3
        and err.count('its burn-in failed') == 2
        and 'fails seed 0 burn_in: cell [3]: AssertionError' in err
    )


def test_a_kernel_that_dies_is_a_failure_of_its_run(fake):
    shell = fake()
    text = A.NOTEBOOK.read_text()
    A.NOTEBOOK.write_text(
        text.replace(
            'started = time.time()',
            "import os; started = time.time(); os._exit(1) if 'supervised' in title else None",
        )
    )
    code, out, err = shell('toy', '-q')
    assert code == 1 and err.count('\n') == 1 and 'toy seed 0 supervised: DeadKernelError' in err, err


def test_noise_of_a_kernel_goes_to_a_file(fake):
    "Under load a kernel that ends may print the traceback of a closed socket: not shown, but not lost"
    shell = fake()
    A.NOTEBOOK.write_text(
        A.NOTEBOOK.read_text().replace(
            'started = time.time()',
            "import os, sys; started = time.time(); "
            "os.write(getattr(sys.stderr, '_original_stdstream_copy', None) or 2, b'ZMQError')",
        )
    )
    code, out, err = shell('toy', '-q')
    assert (
        code == 0 and not err and 'ZMQError' in Path('runs/studies/toy/seed0/burn_in/kernel.log').read_text()
    ), err


def test_a_folder_with_another_run_is_not_touched(fake):
    shell = fake()
    run = next(r for r in A.plan(A.STUDIES, 'toy') if r.arm == 'supervised')
    run.folder.mkdir(parents=True)
    (run.folder / 'last.pt').write_text('')
    (run.folder / 'config.json').write_text(json.dumps(A.to_dict(override(run.cfg, ['optim.lr=5']))))
    before = stamps(run.folder)
    code, out, err = shell('toy', '-q')
    changed = f'optim.lr: 5.0 -> {run.cfg.optim.lr}'
    assert code == 1 and stamps(run.folder) == before
    assert err == (
        f'error: toy seed 0 supervised: {run.folder} holds a run with other settings ({changed}); '
        'choose another --out or delete that folder\n'
    )


def test_what_is_in_the_way_stops_one_run_alone(fake):
    "A damaged result, and a stopped run whose data have changed: named by the dry run, and the others run"
    shell = fake()
    runs = {r.arm: r for r in A.plan(A.STUDIES, 'toy')}
    changed = dict(hash=config_hash(runs['semi_detr'].cfg), data=dict(fingerprint='0'), metrics={})
    texts = dict(supervised='{"hash"', semi_detr=json.dumps(changed))
    for arm, text in texts.items():
        runs[arm].folder.mkdir(parents=True)
        (runs[arm].folder / 'run.json').write_text(text)
        (runs[arm].folder / 'last.pt').write_text('')
    lines = [
        f'error: toy seed 0 semi_detr: {runs["semi_detr"].folder}: the data have changed',
        f'error: toy seed 0 supervised: {runs["supervised"].folder}/run.json: damaged',
    ]
    for code, option in ((2, '-n'), (1, '-q')):
        done, out, err = shell('toy', option)
        assert done == code and len(err.splitlines()) == 2, err
        assert all(line.startswith(words) for line, words in zip(sorted(err.splitlines()), lines)), err
    assert runs['burn_in'].notebook.exists() and not Path('nbs/ablations/results').exists()


def test_pages_that_cannot_be_written_are_one_line(fake):
    fake()
    said = []
    A._write_pages(['tyo'], '', 'runs/studies', '', said.append)
    assert len(said) == 1 and said[0].startswith('the pages of executed runs were not written: ')
    assert "has no study 'tyo'" in said[0]


def test_misspelt_parameter_of_the_notebook(fake):
    "papermill would inject a name that nothing reads, and the hash would not be compared"
    shell = fake()
    A.NOTEBOOK.write_text(A.NOTEBOOK.read_text().replace("expected = ''", "expcted = ''"))
    code, out, err = shell('toy', '-q')
    assert (
        code == 2
        and err.count('\n') == 1
        and "train_run.ipynb: the cell with the tag 'parameters' has no 'expected'" in err
        and not Path('runs').exists()
    )


def test_lost_parameters_tag(fake):
    shell = fake()
    A.NOTEBOOK.write_text(A.NOTEBOOK.read_text().replace('"parameters"', '"params"'))
    code, out, err = shell('toy', '-q')
    assert (
        code == 2
        and err.count('\n') == 1
        and 'train_run.ipynb: 0 cells have the tag' in err
        and 'make nb-export' in err
        and not Path('runs').exists()
    )


@pytest.mark.parametrize(
    'args,words',
    [
        (['tyo'], ["no study 'tyo'", "'toy'"]),
        (['toy', '--scale', 'gpu'], ["no scale 'gpu'", 'small']),
        (['toy', '--seeds', 'a'], ['--seeds', '3-4']),
        (['toy', '--seeds', '1-2-3'], ['--seeds']),
        (['toy', '--seeds', '0'], ['--seeds', '0-0']),
        (['toy', '--seeds', '3-1'], ['--seeds']),
        (['toy', '--engine', 'slrum'], ["'slurm'"]),
        (['toy', '--option', 'x'], ['key=value']),
        (['toy', '--option', 'a=1'], ['--engine slurm']),
        (['tyo', 'all'], ["'tyo'"]),
        (['all', '--scale', 'huge'], ['--scale', 'smoke']),
        (['toy', '--engine', 'slurm'], ['submitit']),
    ],
)
def test_mistakes_are_one_line(fake, args, words):
    code, out, err = fake()(*args, '-q')
    assert (
        code == 2
        and err.startswith('error: ')
        and err.count('\n') == 1
        and all(w in err for w in words)
        and not list(Path().rglob('run.ipynb'))
    ), err


def test_precision_is_named(fake):
    "Two machines may choose two precisions, and then two arms differ by more than their method"
    code, out, err = fake(STUDY.replace('"method.name=supervised"', '"run.amp=auto"'))('toy', '-q')
    assert code == 2 and 'toy seed 0 supervised: run.amp=auto' in err and err.count('\n') == 1


def test_wrong_setting_in_the_file(fake):
    code, out, err = fake(STUDY.replace('"method.name=supervised"', '"method.nome=supervised"'))('toy', '-q')
    assert code == 2 and err == (
        'error: nbs/ablations/studies.toml: study toy, supervised: '
        "unknown setting 'method.nome'; did you mean 'method.name'?\n"
    )


@pytest.mark.parametrize(
    'module,extra,args', [('papermill', 'book', []), ('submitit', 'cluster', ['--engine', 'submitit-local'])]
)
def test_without_the_extra(fake, monkeypatch, module, extra, args):
    shell = fake()
    monkeypatch.setitem(sys.modules, module, None)
    code, out, err = shell('toy', '-q', *args)
    assert (
        code == 2
        and err.count('\n') == 1
        and f"needs '{module}'" in err
        and f'[{extra}]' in err
        and not Path('runs').exists()
    )


def test_outside_a_checkout(tmp_path, monkeypatch, shell):
    monkeypatch.chdir(tmp_path)
    code, out, err = shell('toy')
    assert (
        code == 2
        and err == 'error: no nbs/ablations/studies.toml here or above; run this in a checkout of the book\n'
    )


def test_from_a_folder_of_the_checkout_and_to_another_place(fake, monkeypatch, tmp_path):
    "Paths are those seen from the top, wherever the command is given, so that hashes do not change"
    shell = fake()
    hashes = [config_hash(r.cfg) for r in A.plan(A.STUDIES, 'toy')]
    monkeypatch.chdir('nbs/ablations')
    assert shell('toy', '-q')[0] == 0
    record = json.loads(Path('results/toy/seed0.json').read_text())
    assert [record['burn_in']['hash'], *(a['hash'] for a in record['arms'].values())] == hashes and Path(
        '../../runs/studies/toy/seed0/burn_in/run.ipynb'
    ).exists()
    assert shell('toy', '-q', '--out', tmp_path / 'o', '--results', tmp_path / 'r')[0] == 0
    assert json.loads((tmp_path / 'r/toy/seed0.json').read_text())['burn_in']['notebook'] == str(
        tmp_path / 'o/toy/seed0/burn_in/run.ipynb'
    )


def test_runs_on_another_disk(fake, tmp_path):
    "A link in place of the folder of runs changes no path, and so no hash"
    shell = fake()
    hashes = [config_hash(r.cfg) for r in A.plan(A.STUDIES, 'toy')]
    (tmp_path / 'disk').mkdir()
    Path('runs').symlink_to(tmp_path / 'disk')
    assert shell('toy', '-q')[0] == 0
    record = json.loads(Path('nbs/ablations/results/toy/seed0.json').read_text())
    assert [record['burn_in']['hash'], *(a['hash'] for a in record['arms'].values())] == hashes and (
        tmp_path / 'disk/studies/toy/seed0/burn_in/run.ipynb'
    ).exists()


def test_smoke_results_stay_out_of_the_book(fake):
    from papermill.iorw import papermill_io

    shell = fake(STUDY + '[scales.smoke]\nlast = ["optim.iters=1"]\n')
    papermill_io.get_handler('local').cwd(
        '/'
    )  # as threads of an earlier command in another folder may leave it
    code, out, err = shell('all', '-q', '--scale', 'smoke')
    assert code == 0, err
    assert (
        not Path('nbs/ablations/results').exists()
        and not Path('nbs/ablations/runs').exists()
        and Path('runs/studies/results/toy-smoke/seed0.json').exists()
    )


MORE = '''
[more]
after = "toy"
later = ["optim.iters=2"]
[more.arms]
mean_teacher = ["method.name=mean_teacher"]
'''


def test_studies_share_a_burn_in(fake):
    "Together or one after the other, the shared burn-in is run once, and each record has it"
    shell = fake(STUDY + MORE)
    code, out, err = shell('toy', 'more', '-n')
    assert code == 0 and out.count(' burn_in ') == 1 and '4 runs' in out, (out, err)
    code, out, err = shell('toy', 'more', '-q', '-j', '2')
    assert code == 0, err
    records = [json.loads(Path(f'nbs/ablations/results/{n}/seed0.json').read_text()) for n in ('toy', 'more')]
    assert (
        records[0]['burn_in'] == records[1]['burn_in']
        and list(records[1]['arms']) == ['mean_teacher']
        and not Path('runs/studies/more/seed0/burn_in').exists()
    )
    assert sum('burn_in' in line for line in Path('runs/studies/toy/order.txt').read_text().splitlines()) == 1
    before = stamps(Path('runs'))
    assert shell('more', '-q')[0] == 0 and stamps(Path('runs')) == before
    shutil.rmtree('runs')
    assert shell('more', '-q')[0] == 0 and {
        str(p.parent.relative_to('runs/studies')) for p in Path('runs').rglob('run.ipynb')
    } == {'toy/seed0/burn_in', 'more/seed0/mean_teacher'}


def test_groups_by_name(fake):
    shell = fake(STUDY + '[toy.groups.labels]\nfew = ["data.count=4"]\nmany = ["data.count=8"]\n')
    page = Path('nbs/ablations/runs/toy.ipynb')
    assert (
        shell('toy', '-q', '--groups', 'many')[0] == 0
        and page.read_text().count('## many') == 3
        and '## few' not in page.read_text()
        and not Path('runs/studies/toy/few').exists()
        and Path('nbs/ablations/results/toy/many/seed0.json').exists()
    )
    code, out, err = shell('toy', '-q', '--groups', 'meny')
    assert (
        code == 2
        and err == "error: nbs/ablations/studies.toml: study toy has no group 'meny'; did you mean 'many'?\n"
    )
    shutil.move('runs/studies/toy/many', 'elsewhere')
    before = page.read_text()
    assert (
        shell('toy', '-q', '--groups', 'few')[0] == 0 and page.read_text() == before
    )  # what was run elsewhere is not thrown out of the page
    shutil.move('elsewhere', 'runs/studies/toy/many')
    for text, said in (
        ('book:\n', True),
        (f'book:\n  appendices:\n    - {page.as_posix()}\n', False),
    ):  # a page that the book does not have
        Path('_quarto.yml').write_text(text)
        assert ('list it under `appendices`' in shell('toy', '-q')[1]) == said
    assert (
        shell('toy', '-q')[0] == 0
        and page.read_text().count('## many') == page.read_text().count('## few') == 3
    )


def test_submitit_on_this_machine(fake):
    "The same command through submitit's local executor: runs, records, failures"
    pytest.importorskip('submitit')
    shell = fake(STUDY.replace('supervised =', 'fails ='))
    code, out, err = shell(
        'toy', '-q', '--engine', 'submitit-local', '--jobs', '2', '--option', 'timeout_min=60'
    )
    assert code == 1 and err == (
        'error: toy seed 0 fails: cell [3]: AssertionError: its last line; '
        'executed notebook: runs/studies/toy/seed0/fails/run.part.ipynb\n'
    )
    assert {p.parent.name for p in Path('runs').rglob('run.ipynb')} == {'burn_in', 'semi_detr'} and list(
        Path('runs/studies/jobs').iterdir()
    )


# --- the dry run -----------------------------------------------------------------------
def test_a_job_that_dies_is_a_failure_of_its_run(tmp_path):
    "An engine whose job raises: one line with the run, and the other runs go on"

    class Engine:
        def submit(self, run, *args):
            self.run = run
            return Job(run)

    class Job:
        def __init__(self, run):
            self.run = run

        def done(self):
            return True

        def result(self):
            if self.run.arm == 'supervised':
                raise RuntimeError('the machine was taken away\nits long log')
            return ''

    book = checkout(tmp_path / 'book')
    failed = A.drive(A.plan(book / A.STUDIES, 'toy'), Engine(), limit=2, pause=0)
    assert list(failed.values()) == ['toy seed 0 supervised: RuntimeError: the machine was taken away']


def test_dry_run_says_what_would_run_and_writes_nothing(fake):
    shell = fake()
    assert shell('toy', '-q', '--seeds', '1')[0] == 0
    shutil.rmtree('runs/studies/toy/seed0/supervised')
    arm = Path('runs/studies/toy/seed0/semi_detr')
    (arm / 'run.json').unlink()
    (arm / 'last.pt').write_text('')
    before = stamps(Path())
    code, out, err = shell('toy', '-n', '--seeds', '0-1', '--processes', '2')
    rows = out.splitlines()
    assert (
        code == 0
        and not err
        and stamps(Path()) == before
        and len(rows) == 8
        and rows[-1].startswith('6 runs')
    )
    key = {r.title: config_hash(r.cfg) for r in A.plan(A.STUDIES, 'toy', seeds=[0, 1])}
    assert all(row.startswith(title) and h in row for row, (title, h) in zip(rows[1:], key.items()))
    assert [next(w for w in ('finished', 'resumable', 'new') if w in row) for row in rows[1:-1]] == [
        'finished',
        'resumable',
        'new',
        'new',
        'new',
        'new',
    ]
    assert (
        '  48          8              6 / 30 ' in rows[2]
        and '  2           4              6 / 30 ' in rows[3]
        and '1 MB measured' in rows[2]
        and 'about 0.9 GB' in rows[-2]
    )


def test_dry_run_names_missing_data_once_and_shows_all_runs(fake):
    shell = fake()
    code, out, err = shell('toy', '-n', '--seeds', '0-1', '--data', 'no_such_set')
    assert (
        code == 2
        and out.count('no data') == 6
        and err.count('\n') == 1
        and "data set 'no_such_set'" in err
        and 'SEMIDETR_DATA' in err
    )


def test_missing_data_are_one_line_before_anything_starts(fake):
    "Only what needs them is left out; no record of a seed without all of its arms"
    shell = fake(
        STUDY.replace(
            '[toy.arms]', '[toy.groups.data]\nhere = []\ngone = ["data.data=no_such_set"]\n[toy.arms]'
        )
    )
    code, out, err = shell('toy', '-q', '--jobs', '2')
    assert (
        code == 1
        and err.count('\n') == 1
        and 'toy gone seed 0 burn_in and 2 more: ' in err
        and 'no_such_set' in err
    )
    assert [p.as_posix() for p in Path('nbs/ablations/results').rglob('seed*.json')] == [
        'nbs/ablations/results/toy/here/seed0.json'
    ] and not Path('runs/studies/toy/gone').exists()


def test_other_data_leave_the_records_of_the_book_alone(fake):
    shell = fake()
    own, digits = (
        Path('nbs/ablations/results/toy/seed0.json'),
        next(i for i in TINY if i.startswith('data.data')).partition('=')[2],
    )
    own.parent.mkdir(parents=True)
    own.write_text('{}')
    code, out, err = shell('toy', '-q', '--jobs', '2', '--data', digits, '--out', 'mine')
    assert (
        code == 0
        and own.read_text() == '{}'
        and Path('mine/results/toy/seed0.json').is_file()
        and not Path('nbs/ablations/runs').exists()
    ), err


def test_dry_run_names_what_is_in_the_way(fake):
    "A folder with other settings, a damaged record, a notebook without its tag"
    shell = fake()
    run = next(r for r in A.plan(A.STUDIES, 'toy') if r.arm == 'supervised')
    run.folder.mkdir(parents=True)
    (run.folder / 'last.pt').write_text('')
    (run.folder / 'config.json').write_text(json.dumps(A.to_dict(override(run.cfg, ['optim.lr=5']))))
    for i, text in enumerate(['{"burn_in": {', '', '{}', '[]']):
        p = Path(f'nbs/ablations/results/old/seed{i}.json')
        p.parent.mkdir(parents=True, exist_ok=True)
        p.write_text(text)
    code, out, err = shell('toy', '-n')
    assert (
        code == 2
        and err.count('\n') == 1
        and f'optim.lr: 5.0 -> {run.cfg.optim.lr}' in err
        and out.count('damaged record') == 4
        and 'old/seed2.json' in out
    )
    A.NOTEBOOK.write_text('{')
    code, out, err = shell('toy', '-n')
    assert code == 2 and err.count('\n') == 1 and 'train_run.ipynb' in err and 'make nb-export' in err


def test_without_a_name_studies_are_listed(fake):
    code, out, err = fake(STUDY.replace('[toy]', '[toy]\nabout = "what it is"'))()
    assert code == 0 and out.splitlines() == ['toy: what it is', '    2 arms, 1 seeds; scales small, smoke']


def test_all_means_the_studies_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.chdir(
        checkout(
            tmp_path / 'book',
            STUDY
            + STUDY.replace('toy', 'big').replace('preset', 'scale = "gpu"\npreset')
            + STUDY.replace('toy', 'split').replace(
                '[split.arms]', '[split.groups.labels]\np1 = []\n[split.arms]'
            ),
        )
    )
    assert (
        A.pick_studies(A.STUDIES, ['all']) == ['toy', 'split']
        and A.pick_studies(A.STUDIES, ['all'], 'gpu') == ['big']
        and A.pick_studies(A.STUDIES, ['all'], '', ('p1',)) == ['split']
    )


def test_sigterm_is_ctrl_c():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), A.stoppable():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) == before


def test_failed_processes_say_why(tmp_path):
    "Of torchrun's own words only the command and a number would be left"
    (tmp_path / 'kernel.log').write_text('error: data set gone: nothing there\nTraceback\nelastic failed\n')

    class E:
        ename, evalue = 'CalledProcessError', 'Command [...] returned non-zero exit status 1.'

    assert A._why(E, tmp_path) == f"data set gone: nothing there (all of it: {tmp_path / 'kernel.log'})"
    assert A._why(E, tmp_path / 'none').startswith('CalledProcessError: Command')
