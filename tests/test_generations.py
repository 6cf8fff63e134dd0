"Checkpoints: changed bits are found, fields are checked, a run falls back to the generation before."

import json, os, shutil, warnings
import pytest, torch
from test_trainer import T, run, same, tiny
from semidetr.core import DataError, SemiDETRError
from semidetr.train import generations as G
from semidetr.train.checkpoint import Damaged, load_checkpoint, read_seal, save_checkpoint


def flip(path, byte, bit=0):
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp('seal') / 'a.pt'
    digest = save_checkpoint(path, a=torch.arange(300), step=3, rng={})
    return path, digest


def test_every_changed_bit_is_found(small, tmp_path):
    path, digest = small
    assert read_seal(path) == digest and load_checkpoint(path)['step'] == 3
    size = path.stat().st_size
    for byte in [*range(0, size, 41), *range(size - 96, size)]:
        copy = shutil.copy(path, tmp_path / 'b.pt')
        flip(tmp_path / 'b.pt', byte, byte % 8)
        with pytest.raises(DataError) as e:
            load_checkpoint(copy)
        assert '\n' not in str(e.value)


@pytest.mark.parametrize('left', [0, 1, 50, 0.3, 0.9, -1, -71, -73, -90])
def test_a_file_that_was_cut_off_is_found(small, tmp_path, left):
    data = small[0].read_bytes()
    n = int(left * len(data)) if isinstance(left, float) else left % len(data)
    (tmp_path / 'b.pt').write_bytes(data[:n])
    with pytest.raises(DataError):
        load_checkpoint(tmp_path / 'b.pt')


def test_a_file_without_a_seal_is_of_an_older_version(tmp_path):
    torch.save(dict(format=1, step=4), tmp_path / 'old.pt')
    assert read_seal(tmp_path / 'old.pt') == '' and load_checkpoint(tmp_path / 'old.pt')['step'] == 4


def test_sealed_files_are_plain_files_of_pytorch(small):
    import zipfile

    assert torch.load(small[0], weights_only=True)['a'].tolist() == list(range(300))
    assert zipfile.ZipFile(small[0]).testzip() is None


# --- fields ---------------------------------------------------------------------------
@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A run with two generations, of steps 3 and 6"
    folder = tmp_path_factory.mktemp('runs') / 'whole'
    run(tiny('run.test=false'), folder)
    (folder / 'run.json').unlink()
    return folder


CHANGES = dict(
    step_too_large=dict(step=10**9),
    step_negative=dict(step=-1),
    step_text=dict(step='6'),
    step_true=dict(step=True),
    no_optimizer=dict(optimizer=None),
    optimizer_empty=dict(optimizer={}),
    student_list=dict(student=[]),
    student_empty=dict(student={}),
    rng_empty=dict(rng={}),
    rng_wrong=dict(rng=dict(python=1, numpy=2, torch=3)),
    health_wrong=dict(health=dict(rows=3, warned=False)),
    history_later=dict(history=[dict(step=7)]),
    history_text=dict(history=['a']),
    spent_nan=dict(spent=dict(seconds=float('nan'), cpu=1.0)),
    spent_less=dict(spent={}),
    recent_number=dict(recent=[3]),
    scaler_none=dict(scaler=None),
    config_list=dict(config=[]),
    parts_text=dict(parts='a'),
)


@pytest.mark.parametrize('name', [*CHANGES, *[f'without {k}' for k in G.FIELDS]])
def test_wrong_fields_are_one_line_and_the_generation_before_is_used(whole, tmp_path, name):
    for file in ('last.pt', 'previous.pt', 'log.jsonl'):
        shutil.copy(whole / file, tmp_path / file)
    state = load_checkpoint(tmp_path / 'last.pt')
    if name in CHANGES:
        state |= CHANGES[name]
    else:
        del state[name.removeprefix('without ')]
    del state['format']
    save_checkpoint(tmp_path / 'last.pt', **state)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        t = T.Trainer(tiny('run.test=false'), tmp_path, progress=False)
    assert t.step == 3
    lines = [str(w.message) for w in said if 'goes on from iteration 3, in previous.pt' in str(w.message)]
    assert len(lines) == 1 and '\n' not in lines[0] and 'last.pt' in lines[0]
    (tmp_path / 'previous.pt').unlink()
    with pytest.raises(SemiDETRError, match='last.pt.*no generation before it') as e:
        T.Trainer(tiny('run.test=false'), tmp_path, progress=False)
    assert '\n' not in str(e.value)


def test_a_changed_bit_costs_one_generation_and_no_number(whole, tmp_path):
    for file in ('last.pt', 'previous.pt', 'log.jsonl'):
        shutil.copy(whole / file, tmp_path / file)
    flip(tmp_path / 'last.pt', (tmp_path / 'last.pt').stat().st_size // 2)
    with pytest.warns(UserWarning, match='digest does not match.*goes on from iteration 3'):
        t = T.Trainer(tiny('run.test=false'), tmp_path, progress=False)
    t.fit()
    assert same(load_checkpoint(tmp_path), load_checkpoint(whole))
    assert (tmp_path / 'log.jsonl').read_text() == (whole / 'log.jsonl').read_text()


def test_predicting_from_a_damaged_run_uses_the_generation_before(whole, tmp_path):
    for file in ('last.pt', 'previous.pt'):
        shutil.copy(whole / file, tmp_path / file)
    flip(tmp_path / 'last.pt', 4000)
    with pytest.warns(UserWarning, match='previous.pt is used, of iteration 3'):
        assert load_checkpoint(tmp_path)['step'] == 3


# --- several processes ----------------------------------------------------------------
def generation(folder, step, kept=()):
    digest = save_checkpoint(folder / 'next.rank1.pt', step=step, rng={}, health={}, recent=[])
    G.commit(folder, dict(step=step), [digest], kept)
    return [digest]


class Killed(BaseException):
    pass


def killed(monkeypatch, folder, step, kept, renames):
    "A generation whose process is killed after so many renames"
    real, calls = os.replace, []

    def replace(a, b):
        calls.append(a)
        if 'last' in str(b) or 'previous' in str(b):
            if len(calls) > renames:
                raise Killed
        real(a, b)

    with monkeypatch.context() as m:
        m.setattr(G.os, 'replace', replace)
        try:
            generation(folder, step, kept)
        except Killed:
            pass


def usable(folder):
    "(step, digests of its parts or None if it is the previous one) of the newest generation that is whole"
    for name in ('last.pt', 'previous.pt'):
        try:
            saved = load_checkpoint(folder / name)
            assert [p['step'] for p in G.read_parts(folder, saved)] == [saved['step']]
            return saved['step'], saved['ranks'] if name == 'last.pt' else None
        except DataError:
            continue
    return None, None


@pytest.mark.parametrize('damaged', [False, True])
def test_two_kills_in_a_row_leave_a_whole_generation(tmp_path, monkeypatch, damaged):
    "Each after any number of renames, also if the newest main file is damaged before the second"
    steps = set()
    for first in range(1, 8):
        for second in range(1, 8):
            folder = tmp_path / f'{first}{second}'
            folder.mkdir()
            generation(folder, 20, generation(folder, 10))
            killed(monkeypatch, folder, 30, load_checkpoint(folder)['ranks'], first)
            if damaged and usable(folder)[0] == 30:
                flip(folder / 'last.pt', 100)
            step, kept = usable(folder)
            killed(monkeypatch, folder, 40, kept, second)
            assert usable(folder)[0] in (step, 40), (first, second)
            steps.add(usable(folder)[0])
    assert steps == ({20, 40} if damaged else {20, 30, 40})


def test_a_part_is_found_by_its_digest(tmp_path, monkeypatch):
    "Killed while process 0 writes: the part of the old generation has another name already"
    generation(tmp_path, 20, generation(tmp_path, 10))
    monkeypatch.setattr(G, 'rank', lambda: 1)
    monkeypatch.setattr(G, 'is_main', lambda: False)
    assert G.read_generation(tmp_path)[1]['step'] == 20
    assert G.read_generation(tmp_path, 'previous.pt')[1]['step'] == 10
    save_checkpoint(tmp_path / 'next.rank1.pt', step=30)
    G._keep(tmp_path, 1)
    (tmp_path / 'next.rank1.pt').replace(tmp_path / 'last.rank1.pt')  # and here it is killed
    saved, own = G.read_generation(tmp_path)
    assert saved['step'] == own['step'] == 20
    (tmp_path / 'previous.rank1.pt').unlink()
    with pytest.raises(Damaged, match='part of process 1.*iteration 20 is gone'):
        G.read_generation(tmp_path)


def test_parts_of_an_older_version_must_be_of_the_same_step(tmp_path, monkeypatch):
    monkeypatch.setattr(G, 'rank', lambda: 1)
    monkeypatch.setattr(G, 'is_main', lambda: False)
    save_checkpoint(tmp_path / 'last.pt', step=20)
    save_checkpoint(tmp_path / 'last.rank1.pt', step=20)
    assert G.read_generation(tmp_path)[1]['step'] == 20
    save_checkpoint(tmp_path / 'last.rank1.pt', step=10)
    with pytest.warns(UserWarning, match='last.rank1.pt: not of iteration 20'):
        assert G.read_generation(tmp_path)[1] is None


def test_file_systems_without_links(tmp_path, monkeypatch):
    def no_link(*_):
        raise OSError('no links here')

    monkeypatch.setattr(G.os, 'link', no_link)
    for step in (1, 2):
        G.save_generation(tmp_path, dict(step=step))
    assert [load_checkpoint(tmp_path / n)['step'] for n in ('last.pt', 'previous.pt')] == [2, 1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ['last.pt', 'previous.pt']


def test_json_numbers_of_the_log_are_those_of_the_generation(whole):
    rows = [json.loads(x)['step'] for x in (whole / 'log.jsonl').read_text().splitlines()]
    assert rows == [2, 4, 6] and load_checkpoint(whole / 'previous.pt')['step'] == 3
