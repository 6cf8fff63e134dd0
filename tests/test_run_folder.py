"What a run folder holds: every kind from the files that a run, a study or another program leaves there"

import json
import pytest
from semidetr.core import ConfigError, DataError
from semidetr.data.catalog import open_dataset
from semidetr.train import run_folder as F
from semidetr.train.config import config_hash, override, preset, to_dict

DATA = 'digits:n=6,size=64'
CFG = override(preset('digits'), [f'data.data={DATA}'])


def result_of(cfg, **change):
    fingerprint = open_dataset(cfg.data.data, 'train').fingerprint()
    values = dict(hash=config_hash(cfg), config=to_dict(cfg), data=dict(fingerprint=fingerprint), metrics={})
    return values | change


def fill(folder, result=None, config=None, checkpoint=False):
    folder.mkdir()
    if result is not None:
        (folder / 'run.json').write_text(result if isinstance(result, str) else json.dumps(result))
    if config is not None:
        (folder / 'config.json').write_text(json.dumps(to_dict(config)))
    if checkpoint:
        (folder / 'last.pt').write_text('never read')
    return folder


def kind(folder, cfg=CFG):
    state = F.folder_state(cfg, folder)
    assert state.kind in F.KINDS
    assert (state.result is not None) == (state.kind == 'finished')
    assert bool(state.message) == (state.kind in ('other settings', 'other data', 'damaged'))
    assert '\n' not in state.message
    return state.kind


def test_nothing_there(tmp_path):
    assert kind(tmp_path / 'none') == kind(tmp_path) == 'new'
    assert kind(fill(tmp_path / 'a', config=CFG)) == 'new'  # a study wrote it, and the run never began


def test_finished(tmp_path):
    "With or without a checkpoint, whatever config.json says; settings that change no number do not count"
    folder = fill(tmp_path / 'a', result_of(CFG))
    assert kind(folder) == 'finished'
    assert F.folder_state(CFG, folder).result == F.finished(CFG, folder) == result_of(CFG)
    assert kind(folder, override(CFG, ['run.threads=7', 'run.log_every=3'])) == 'finished'
    assert kind(fill(tmp_path / 'b', result_of(CFG), override(CFG, ['optim.lr=1']), True)) == 'finished'


def test_the_result_of_another_run_is_no_result(tmp_path):
    "Without a checkpoint the run starts anew; with one the trainer compares the settings in the checkpoint"
    other = override(CFG, ['run.seed=1'])
    assert kind(fill(tmp_path / 'a', result_of(other))) == 'new'
    assert kind(fill(tmp_path / 'b', result_of(other), checkpoint=True)) == 'stopped'
    assert F.finished(CFG, tmp_path / 'a') is F.finished(CFG, tmp_path / 'b') is None


def test_stopped(tmp_path):
    assert kind(fill(tmp_path / 'a', checkpoint=True)) == 'stopped'
    assert kind(fill(tmp_path / 'b', config=override(CFG, ['run.threads=5']), checkpoint=True)) == 'stopped'


def test_other_settings(tmp_path):
    "Folder, at most three differences, cure"
    changes = ['optim.lr=0.5', 'optim.iters=7', 'run.seed=3', 'loader.n_labelled=2', 'run.threads=5']
    folder = fill(tmp_path / 'a', config=override(CFG, changes[:1]), checkpoint=True)
    assert kind(folder) == 'other settings'
    assert F.folder_state(CFG, folder).message == (
        f'{folder} holds a run with other settings (optim.lr: 0.5 -> 0.001); '
        'choose another --out or delete that folder'
    )
    folder = fill(tmp_path / 'b', config=override(CFG, changes), checkpoint=True)
    message = F.folder_state(CFG, folder).message
    assert message.count(' -> ') == 3 and ' and 2 more)' in message


def test_other_data(tmp_path):
    "The same settings, but the data have changed: in the way only if there is a checkpoint to resume"
    result = result_of(CFG, data=dict(fingerprint='0' * 16))
    assert kind(fill(tmp_path / 'a', result)) == 'new'
    folder = fill(tmp_path / 'b', result, CFG, checkpoint=True)
    assert kind(folder) == 'other data' and str(folder) in F.folder_state(CFG, folder).message
    assert F.finished(CFG, folder) is None


@pytest.mark.parametrize('text', ['{"hash"', '{}', '[]', '', '{"hash": 1, "data": {}}', '\x00'])
def test_damaged(tmp_path, text):
    folder = fill(tmp_path / 'a', text, checkpoint=True)
    assert kind(folder) == 'damaged'
    with pytest.raises(DataError, match=r'run\.json: damaged.*delete'):
        F.finished(CFG, folder)


def test_a_damaged_configuration_names_its_file(tmp_path):
    folder = fill(tmp_path / 'a', checkpoint=True)
    (folder / 'config.json').write_text('{')
    with pytest.raises(ConfigError, match=r'config\.json.*delete this folder'):
        F.folder_state(CFG, folder)


def test_automatic_precision_is_the_one_that_the_run_began_with(tmp_path):
    auto = override(CFG, ['run.amp=auto'])
    for amp in ('off', 'bf16'):
        folder = fill(tmp_path / amp, result_of(override(CFG, [f'run.amp={amp}'])))
        assert kind(folder, auto) == 'finished'
    assert kind(tmp_path / 'bf16') == 'new'


def test_data_are_opened_for_a_result_of_these_settings_only(tmp_path):
    "A folder can be judged where its data are missing, unless there is a result to compare"
    gone = override(CFG, ['data.data=no_such_set'])
    assert kind(fill(tmp_path / 'a', result_of(CFG), checkpoint=True), gone) == 'stopped'
    with pytest.raises(DataError, match='no_such_set'):
        F.folder_state(gone, fill(tmp_path / 'b', result_of(CFG, hash=config_hash(gone))))


def test_a_checkpoint_of_the_same_run():
    F.check_same_run(to_dict(override(CFG, ['run.threads=9'])), CFG, 'f', 'f', 'runs/a')
    with pytest.raises(ConfigError) as e:
        F.check_same_run(to_dict(override(CFG, ['run.seed=1', 'optim.lr=0.5'])), CFG, 'f', 'f', 'runs/a')
    assert str(e.value) == (
        'runs/a: holds a run with other settings (optim.lr: 0.5 -> 0.001; run.seed: 1 -> 0); '
        'choose another folder, or the same settings to go on with it'
    )
    with pytest.raises(DataError) as e:
        F.check_same_run(to_dict(CFG), CFG, 'f', 'g', 'runs/a')
    assert str(e.value) == 'runs/a: the data have changed since this run began; choose another folder'


def test_a_run_with_old_names_of_settings_is_the_same_run(tmp_path):
    "config.json of a study that was started before a setting was renamed"
    values = to_dict(CFG)
    values['criterion']['w_l1'] = values['criterion'].pop('cost_l1')
    (tmp_path / 'last.pt').write_text('')
    (tmp_path / 'config.json').write_text(json.dumps(values))
    assert F.folder_state(CFG, tmp_path).kind == 'stopped'
    F.check_same_run(values, CFG, 'a', 'a', tmp_path)
