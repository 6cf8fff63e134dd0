"Studies as data: overrides are checked before the first run, records are kept a seed at a time, finished runs are looked up"
import json
from pathlib import Path
import pytest
from semidetr.core import ConfigError
import semidetr.demo as demo
from semidetr.config import override
from semidetr.study import load_study, run_study
from test_trainer import TINY

BOOK = Path(__file__).parent.parent/'nbs'/'ablations'/'studies.toml'

def write(tmp_path, **change):
    study = {'preset': '"digits"', 'base': json.dumps(TINY), 'burn_in': '["optim.iters=2"]', 'later': '["optim.iters=2", "method.T1=1", "mining.init=all", "pseudo.threshold=.02", "pseudo.min_score=0", "consistency.hidden=8"]', **change}
    text = '[toy]\n'+''.join(f'{k} = {v}\n' for k, v in study.items() if v)+'[toy.arms]\nsupervised = ["method.name=supervised"]\nsemi_detr = ["method.name=semi_detr", "loader.n_labelled=1", "loader.n_unlabelled=1"]\n'
    (tmp_path/'studies.toml').write_text(text)
    return tmp_path/'studies.toml'

@pytest.mark.parametrize('change,words', [(dict(later='["optim.iter=2"]'), ['toy', 'supervised', 'optim.iter', 'iters']), (dict(burn_in='["method.name=semi"]'), ['burn_in', 'semi_detr']),
    (dict(preset=''), ['lacks preset']), (dict(preset='"digit"'), ['digits']), (dict(base='[1'), ['studies.toml'])])
def test_mistakes_are_found_before_the_first_run(tmp_path, change, words):
    with pytest.raises(ConfigError) as e: load_study(write(tmp_path, **change), 'toy')
    assert all(w in str(e.value) for w in words) and '\n' not in str(e.value)

def test_unknown_study_and_file(tmp_path):
    with pytest.raises(ConfigError, match='components'): load_study(BOOK, 'component')
    with pytest.raises(ConfigError, match='no such file'): load_study(tmp_path/'none.toml', 'toy')

def test_the_studies_of_the_book_are_valid():
    import tomllib
    for name in tomllib.loads(BOOK.read_text()): assert load_study(BOOK, name)['arms']

def test_run_keep_and_look_up(tmp_path):
    path = write(tmp_path)
    a = run_study(path, 'toy', tmp_path/'runs', tmp_path/'results', (0,), progress=False)
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path/'runs').rglob('last.pt')}
    b = run_study(path, 'toy', tmp_path/'runs', tmp_path/'results', (0,), progress=False)
    assert json.dumps(a) == json.dumps(b) and len(stamps) == 3 and stamps == {p: p.stat().st_mtime_ns for p in (tmp_path/'runs').rglob('last.pt')}
    kept = json.loads((tmp_path/'results'/'toy'/'seed0.json').read_text())
    assert kept['seed'] == 0 and set(kept['arms']) == {'supervised', 'semi_detr'} and kept['arms']['semi_detr']['curve']['con_boxes'][-1] > 0
    assert kept['arms']['semi_detr']['iterations'] == 2 and kept['burn_in']['hash'] != kept['arms']['supervised']['hash']

def test_the_demonstration_is_part_of_the_component_study():
    "One set of settings, written in the package and in the file of studies: they may not drift apart"
    study = load_study(BOOK, 'components')
    assert study['burn_in'] == demo.BURN_IN
    for arm, name in dict(supervised='supervised', mean_teacher='mean_teacher', semi_detr='shm_cqc_cpm').items():
        mine, theirs = (override(study['base'], [*items, 'loader.n_unlabelled=8', 'method.unsup_weight=2', 'pseudo.threshold=0.3']) for items in (demo.LATER+demo.ARMS[arm], study['arms'][name]))
        assert mine == theirs, arm

def test_demonstration_runs_every_arm_and_other_settings_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, 'preset', lambda name, base=demo.preset: override(base(name), TINY))
    monkeypatch.setattr(demo, 'BURN_IN', ['optim.iters=1'])
    monkeypatch.setattr(demo, 'LATER', ['method.T1=0', 'optim.iters=1'])
    monkeypatch.setattr(demo, 'shown_scenes', lambda n=6, f=demo.shown_scenes: f(2))
    said, folders = [], []
    for labels in (6, 6, 5):
        result = demo.run_demo(tmp_path, labels, progress=False, workers=1, say=said.append)
        folders.append({p.name for p in tmp_path.iterdir() if p.is_dir()})
    assert list(result['runs'][0]['arms']) == ['supervised', 'mean_teacher', 'semi_detr'] and (tmp_path/'detections.png').exists()
    assert len(folders[1]) == 1 and folders[0] == folders[1] and len(folders[2]) == 2 # found again; other settings get their own folder
    assert any('semi detr' in line for line in said)

def test_auto_precision_is_chosen_once_and_kept(tmp_path, monkeypatch):
    import semidetr.machine as machine
    from semidetr.study import run_config
    cfg = override(demo.preset('digits'), [*TINY, 'method.name=supervised', 'run.device=cpu', 'run.amp=auto', 'optim.iters=1'])
    used = []
    for speed in (2., .5): # a machine that is fast in bfloat16 begins; a slow one is asked again
        monkeypatch.setattr(machine, 'bf16_speed', lambda device, s=speed: s)
        used.append(run_config(cfg, tmp_path/'a', progress=False))
    assert used[0]['hash'] == used[1]['hash'] and used[0]['config']['run']['amp'] == 'bf16'
    assert run_config(cfg, tmp_path/'b', progress=False)['config']['run']['amp'] == 'off'
