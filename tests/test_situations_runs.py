"Runs that go on: folder of the images, longer runs, data that moved, an unlabelled pool that changed"

import contextlib
import json
import shutil
from pathlib import Path
import pytest
import torch
from test_situations_commands import TINY, pictures, run, train
from test_situations_commands import coco as coco_below
from semidetr.core import ConfigError, DataError, Note
from semidetr.data.catalog import open_dataset, open_further
from semidetr.train.api import Run, evaluate, plan_run
from semidetr.train.config import config_hash, override, preset, to_dict
from semidetr.train.run_data import build_data, images_of_roles
from semidetr.train.run_folder import check_same_run, finished, folder_state
from semidetr.train.trainer import Trainer

SEMI = ['--unlabelled', 'more', '--method', 'mean_teacher', 'method.burn_in_iters=1', 'data.dev=0']


def one_line(result, *words):
    "The error of a command: code 2, one line with these words"
    code, _, err = result
    assert code == 2 and err.count('\n') == 1 and err.startswith('error: '), err
    for word in words:
        assert word in err, (word, err)
    return err


def metrics_of(folder):
    return json.loads((folder / 'run.json').read_text())['metrics']


def coco(path, names, boxes=1):
    "A COCO file whose images are named without a folder"
    path.parent.mkdir(parents=True, exist_ok=True)
    coco_below(path, names, boxes)
    path.write_text(path.read_text().replace('images/', ''))


@pytest.fixture
def shop(tmp_path):
    "Six images with one box each"
    names = [f'{n}.png' for n in range(6)]
    pictures(tmp_path / 'shop' / 'images', names)
    coco(tmp_path / 'shop' / 'instances_train.json', names)
    return tmp_path / 'shop'


@pytest.fixture
def apart(shop):
    "A COCO file whose images lie where nobody looks"
    (shop.parent / 'far').mkdir()
    shutil.move(shop / 'images', shop.parent / 'far' / 'photos')
    return shop, shop.parent / 'far' / 'photos'


# ------------------------------------------------------------------------------ the folder of the images


def test_the_error_names_the_option_and_the_option_works(apart):
    shop, photos = apart
    code, out, _ = run(shop, 'doctor', '.')
    assert code == 2 and '--images FOLDER (setting data.images' in out
    for words in (['split', '-d', '.', '-o', 's.json'], ['train', '-d', '.', '-o', 'x']):
        one_line(run(shop, *words), '--images', 'data.images')
    assert run(shop, 'doctor', '.', '--images', photos, '--out', 'report')[0] == 0
    assert (shop / 'report' / 'contact_sheet.png').is_file()
    assert run(shop, 'split', '-d', '.', '--images', photos, '-o', 's.json', '--count', '2')[0] == 0
    code, _, err = train(shop, '--data', '.', '--images', '../far/photos', 'data.dev=2', iters=2)
    assert code == 0, err
    assert Run(shop / 'run').config.data.images == '../far/photos'
    code, out, err = run(shop, 'eval', '--run', 'run', '--part', 'train', '-q')  # the stored folder
    assert code == 0 and '6 images' in out, err
    moved = photos.with_name('moved')
    photos.rename(moved)
    assert run(shop, 'eval', '--run', 'run', '--part', 'train', '-q')[0] == 2
    for words in (['--part', 'train'], ['--part', 'dev'], ['--data', '.', '--part', 'train']):
        assert run(shop, 'eval', '--run', 'run', '-q', '--images', moved, *words)[0] == 0
    scores = evaluate(shop / 'run', str(shop), 'train', images=moved, device='cpu')
    assert set(scores) == {'teacher', 'student'}


def test_the_folder_of_images_gives_the_same_data(shop):
    before = build_data(plan_run(data=str(shop), settings=['data.dev=0', 'run.test=false']).cfg.data)
    roles = images_of_roles(before)
    assert -1 not in roles['labelled']['bytes']
    photos = shop.parent / 'photos'
    shutil.copytree(shop / 'images', photos)
    shutil.rmtree(shop / 'images')
    plan = plan_run(data=str(shop), images=photos, settings=['data.dev=0', 'run.test=false'])
    after = build_data(plan.cfg.data)
    assert after.split.fingerprint == before.split.fingerprint
    assert images_of_roles(after) == roles
    assert Path(after.labelled[0].path).parent == photos
    given = ['data.dev=0', 'run.test=false', f'data.images={photos}']
    assert plan.cfg == plan_run('', None, given, data=str(shop)).cfg


def test_the_folder_of_images_of_the_test_split_too(apart):
    "The val split and another COCO file are opened from it as well, if the usual places do not have them"
    shop, photos = apart
    pictures(photos, ['7.png', '8.png'])
    coco(shop / 'instances_val.json', ['7.png', '8.png'])
    d = build_data(plan_run(data=str(shop), images=photos, settings=['data.dev=0']).cfg.data)
    assert len(d.val) == 2 and Path(d.val[0].path).parent == photos
    other = shop.parent / 'other'
    pictures(other / 'images', ['7.png'])
    coco(other / 'instances_val.json', ['7.png'])
    assert Path(open_further(str(other), 'val', photos)[0].path).parent == other / 'images'


def test_a_wrong_folder_of_images_is_refused_at_once(shop):
    pictures(shop.parent / 'wrong', ['x.png'])
    for folder, word in (('../wrong', 'none of its images'), ('nowhere', 'no such image folder')):
        for words in (['doctor', '.'], ['split', '-d', '.', '-o', 's.json'], ['train', '-d', '.', '-o', 'x']):
            code, out, err = run(shop, *words, '--images', folder)
            assert code == 2 and word in out + err, (words, out, err)
    result = run(shop, 'train', '-d', 'digits:n=9', '--images', 'images')
    one_line(result, 'digits:n=9', 'only those need --images')
    pictures(shop / 'plain', ['a.png'])
    with pytest.raises(DataError, match='plain: no COCO file, and only those need --images'):
        open_dataset(str(shop / 'plain'), images=str(shop))


def test_the_folder_of_images_leaves_committed_hashes():
    cfg = preset('coco-1')
    assert config_hash(override(cfg, ['data.images='])) == config_hash(cfg)
    assert config_hash(override(cfg, ['data.images=photos'])) != config_hash(cfg)


# ------------------------------------------------------------------------------ a longer run


def test_a_longer_run_names_init_and_that_works(shop):
    assert train(shop, '--data', '.', 'data.dev=2')[0] == 0
    err = one_line(train(shop, '--data', '.', 'data.dev=2', iters=4), 'optim.iters: 2 -> 4', 'run.init=run')
    assert 'another folder' in err
    assert train(shop, '--data', '.', 'data.dev=2', 'run.init=run', iters=4, out='longer')[0] == 0
    assert Run(shop / 'longer').result['iterations'] == 4
    assert 'run.init' not in one_line(train(shop, '--data', '.', 'data.dev=2', iters=1))  # a shorter one


# ------------------------------------------------------------------------------ data in another place


def test_data_are_recognised_by_content(shop):
    "By another spelling, absolute path or folder a finished run is found, and a stopped one goes on"
    words = ['data.dev=2', 'run.checkpoint_every=1']
    assert train(shop, '--data', '.', *words)[0] == 0
    stamp, found = (shop / 'run' / 'last.pt').stat().st_mtime_ns, metrics_of(shop / 'run')
    for data in ('./', '../' + shop.name, shop):
        assert train(shop, '--data', data, *words)[0] == 0
    moved = shop.parent / 'moved'
    shutil.copytree(shop, moved, ignore=shutil.ignore_patterns('run'))
    assert train(shop, '--data', moved, *words)[0] == 0
    assert (shop / 'run' / 'last.pt').stat().st_mtime_ns == stamp and metrics_of(shop / 'run') == found
    (shop / 'run' / 'run.json').unlink()  # it goes on from its checkpoint
    code, _, err = train(shop, '--data', moved, *words)
    assert code == 0 and not err
    assert metrics_of(shop / 'run') == found and Run(shop / 'run').config.data.data == str(moved)


def test_other_data_are_refused_by_name(shop):
    other = shop.parent / 'other'
    pictures(other / 'images', [f'{i}.png' for i in range(6)])
    coco(other / 'instances_train.json', [f'{i}.png' for i in range(6)], boxes=2)
    words = ['data.dev=2', 'run.checkpoint_every=1']
    assert train(shop, '--data', '.', *words)[0] == 0
    for name in ('result', 'checkpoint'):
        one_line(train(shop, '--data', other, *words), f'data.data: . -> {other}')
        (shop / 'run' / 'run.json').unlink(missing_ok=True)
    shutil.copy(other / 'instances_train.json', shop / 'instances_train.json')
    one_line(train(shop, '--data', '.', *words), 'the data have changed')


def test_a_test_split_that_changed_is_refused(shop):
    pictures(shop / 'images', ['7.png'])
    coco(shop / 'instances_val.json', ['7.png'])
    words = ['train', '--data', '.', '--iters', 2, '-q', '-o', 'run', 'data.dev=2']
    words += [t for t in TINY if t != 'run.test=false']
    assert run(shop, *words)[0] == 0
    assert len(Run(shop / 'run').result['data']['test']) == 16
    coco(shop / 'instances_val.json', ['7.png'], boxes=2)
    for _ in ('result', 'checkpoint'):
        one_line(run(shop, *words), 'test images have changed', 'other boxes')
        (shop / 'run' / 'run.json').unlink(missing_ok=True)


def settings(shop, *more):
    items = [f'data.data={shop}', 'data.dev=1', 'data.count=2', 'optim.iters=2', 'method.name=mean_teacher']
    items += ['method.burn_in_iters=1', *(t for t in TINY if t != 'run.test=false'), *more]
    return override(preset('small'), items)


def test_every_place_is_recognised(shop):
    "Unlabelled images, test split and split file under other paths; a test split with other boxes is refused"
    pictures(shop / 'images', ['7.png'])
    coco(shop / 'val' / 'instances_val.json', ['7.png'])
    (shop / 'val' / 'images').symlink_to(shop / 'images')
    pictures(shop / 'more', ['a.png', 'b.png'])
    assert run(shop, 'split', '-d', '.', '--count', 2, '--dev', 1, '-o', 's.json')[0] == 0
    places = [f'data.unlabelled={shop}/more', f'data.val={shop}/val', f'data.split_file={shop}/s.json']
    cfg = settings(shop, *places, 'data.count=0')
    Trainer(cfg, shop / 'run', progress=False).save()
    new = shop.parent / 'new'
    shutil.copytree(shop, new)
    moved = settings(new, *(p.replace(str(shop), str(new)) for p in places), 'data.count=0')
    Trainer(moved, shop / 'run', progress=False)
    val = new / 'val' / 'instances_val.json'
    text = val.read_text()
    coco(val, ['7.png'], boxes=2)
    with pytest.raises(ConfigError, match=r'data.val: .*/val -> .*/val\)'):
        Trainer(moved, shop / 'run', progress=False)
    val.write_text(text)
    pictures(new / 'more', ['c.png'])
    with pytest.raises(ConfigError, match='data.unlabelled: .*more -> .*more'):
        Trainer(moved, shop / 'run', progress=False)
    (shop / 'val' / 'instances_val.json').write_text(text.replace('[', '[ '))  # the same content
    Trainer(cfg, shop / 'run', progress=False)
    coco(shop / 'val' / 'instances_val.json', ['7.png'], boxes=2)
    with pytest.raises(DataError, match='test images have changed .*other boxes'):
        Trainer(cfg, shop / 'run', progress=False)


def test_generated_pools_are_other_data():
    "They have no files to compare, so another name is another pool"
    cfg = override(preset('digits'), ['data.data=digits:n=12,size=64', 'data.count=4', 'data.dev=2'])
    pools = [override(cfg, [f'data.unlabelled=digits:n=5,size=64,seed={s}']) for s in (1, 2)]
    roles = [images_of_roles(build_data(c.data), test=False) for c in pools]
    check_same_run(to_dict(pools[0]), pools[0], 'x', 'x', 'runs/a', roles[0], roles[0])
    with pytest.raises(ConfigError, match='data.unlabelled: .*seed=1 -> .*seed=2'):
        check_same_run(to_dict(pools[0]), pools[1], 'x', 'x', 'runs/a', roles[0], roles[1])


def test_a_study_finds_its_data_again(shop):
    "config.json of a study names another path; the checkpoint decides"
    cfg = settings(shop)
    Trainer(cfg, shop / 'run', progress=False).save()
    (shop / 'run' / 'config.json').write_text(json.dumps(to_dict(cfg)))
    new = shop.parent / 'new'
    shutil.copytree(shop, new, ignore=shutil.ignore_patterns('run'))
    assert folder_state(settings(new), shop / 'run').kind == 'stopped'
    coco(new / 'instances_train.json', [f'{i}.png' for i in range(6)], boxes=2)
    state = folder_state(settings(new), shop / 'run')
    assert state.kind == 'other settings' and 'data.data' in state.message


# ------------------------------------------------------------------------------ the unlabelled pool


@pytest.fixture
def stopped(shop):
    "A run of two iterations without a result, with a pool of three files"
    pictures(shop / 'more', ['a.png', 'b.png', 'c.png'])
    assert train(shop, '--data', '.', *SEMI)[0] == 0
    return shop


def test_a_pool_that_changed_is_refused(stopped):
    for result in (True, False):
        if not result:
            (stopped / 'run' / 'run.json').unlink()
        assert train(stopped, '--data', '.', *SEMI)[0] == 0
        if not result:
            (stopped / 'run' / 'run.json').unlink()
        kept = (stopped / 'more' / 'a.png').read_bytes()
        (stopped / 'more' / 'a.png').unlink()
        pictures(stopped / 'more', ['x.png', 'y.png'])
        err = one_line(train(stopped, '--data', '.', *SEMI), 'unlabelled images have changed', 'restore them')
        assert '2 added (e.g. x.png)' in err and '1 removed (e.g. a.png)' in err and 'run.init=run' in err
        for name in ('x.png', 'y.png'):
            (stopped / 'more' / name).unlink()
        (stopped / 'more' / 'a.png').write_bytes(kept)  # the cure
        assert train(stopped, '--data', '.', *SEMI)[0] == 0


def test_a_pool_in_another_place_goes_on(stopped):
    (stopped / 'run' / 'run.json').unlink()
    (stopped / 'more').rename(stopped / 'pool')
    words = ['pool' if w == 'more' else w for w in SEMI]
    assert train(stopped, '--data', '.', *words)[0] == 0
    (stopped / 'run' / 'run.json').unlink()
    pictures(stopped / 'pool', ['x.png'])
    shutil.copytree(stopped / 'pool', stopped / 'third')
    words = ['third' if w == 'more' else w for w in SEMI]
    one_line(train(stopped, '--data', '.', *words), 'data.unlabelled: pool -> third')


def test_other_bytes_are_said(stopped):
    "A file of the same name may have been restored: a note, not an error"
    (stopped / 'run' / 'run.json').unlink()
    pictures(stopped / 'more', ['b.png'], size=32)
    code, out, err = train(stopped, '--data', '.', *SEMI)
    assert code == 0 and 'unlabelled images have other bytes' in out and '1 (e.g. b.png)' in out, err


def test_runs_without_the_lists_go_on(stopped):
    "They were written before the images of each role were stored"
    for name in ('last.pt',):
        state = torch.load(stopped / 'run' / name, weights_only=True)
        assert len(state.pop('roles')['unlabelled']['ids']) == 3
        torch.save(state, stopped / 'run' / name)
    result = json.loads((stopped / 'run' / 'run.json').read_text())
    assert len(result['data'].pop('pool')) == 16
    (stopped / 'run' / 'run.json').write_text(json.dumps(result))
    pictures(stopped / 'more', ['x.png'])
    assert train(stopped, '--data', '.', *SEMI)[0] == 0  # the result
    (stopped / 'run' / 'run.json').unlink()
    assert train(stopped, '--data', '.', *SEMI)[0] == 0  # the checkpoint
    (stopped / 'run' / 'run.json').unlink()
    pictures(stopped / 'more', ['y.png'])
    one_line(train(stopped, '--data', '.', *SEMI), '1 added (e.g. y.png)')  # stored since then


def test_a_result_outlives_its_pool(stopped):
    shutil.rmtree(stopped / 'more')
    cfg = Run(stopped / 'run').config
    with contextlib.chdir(stopped):
        assert finished(cfg, Path('run'))['metrics'] == metrics_of(stopped / 'run')


def test_labelled_and_development_images_count_too():
    one = dict(ids=[1, 2], bytes=[5, 6], content='')
    cfg = preset('digits')
    for role in ('labelled', 'unlabelled', 'development', 'test'):
        for now, word in (
            (dict(one, ids=[2, 3]), r'1 added \(e.g. 3\), 1 removed \(e.g. 1\)'),
            (dict(one, ids=[2, 1], bytes=[6, 5]), 'in another order'),
            (dict(one, content='ab'), 'other boxes'),
        ):
            with pytest.raises(DataError, match=f'runs/a: the {role} images have changed .*{word}'):
                check_same_run(to_dict(cfg), cfg, 'x', 'x', 'runs/a', {role: one}, {role: now})
        with pytest.warns(Note, match=f'{role} images have other bytes .*1 .e.g. 2'):
            now = dict(one, bytes=[5, 7])
            check_same_run(to_dict(cfg), cfg, 'x', 'x', 'runs/a', {role: one}, {role: now})
    check_same_run(to_dict(cfg), cfg, 'x', 'x', 'runs/a', dict(test=one), {})  # the test is switched off now
