"A method of one's own: a class and its settings; public trainer, log and records know it"

import dataclasses
import json

import pytest
from semidetr import Predictor, Trainer
from semidetr.core import ConfigError, DataError
from semidetr.lab.study import record
from semidetr.semi.methods import METHODS, MeanTeacher, MethodConfig, StepResult
from semidetr.train.config import config_hash, from_dict, override, to_dict
from test_trainer import tiny


# --- the whole method ------------------------------------------------------------------
class BoxesOnly(MeanTeacher):
    "Pseudo labels teach where objects are, not what they are"

    shown = {'kept_terms': 'kept'}
    curves = ('kept_terms',)

    def step(self, student, teacher, batch, t):
        losses, scalars, boxes = super().step(student, teacher, batch, t)
        drop = [k for k in losses if k.startswith('loss_unsup_cls')]
        kept = {
            k: v * (self.cfg.method.strength if 'unsup' in k else 1)
            for k, v in losses.items()
            if k not in drop
        }
        return StepResult(kept, scalars | {'kept_terms': float(len(kept))}, boxes)


@dataclasses.dataclass(frozen=True)
class BoxesOnlyConfig(MethodConfig):
    name: str = 'boxes_only'
    strength: float = 0.5
    implementation = BoxesOnly


# --- the end of the method -------------------------------------------------------------
def settings(**method):
    return dataclasses.replace(tiny('run.test=false'), method=BoxesOnlyConfig(burn_in_iters=2, **method))


def test_it_trains_and_shows_up_everywhere(tmp_path):
    cfg = settings()
    result = Trainer(cfg, tmp_path / 'r', progress=False).fit()
    assert result['config']['method'] | {'name': 'boxes_only', 'strength': 0.5} == result['config']['method']
    assert json.loads((tmp_path / 'r' / 'run.json').read_text())['health']['pseudo_boxes'] > 0
    rows = [json.loads(line) for line in (tmp_path / 'r' / 'log.jsonl').read_text().splitlines()]
    assert rows[-1]['kept_terms'] > 0 and 'loss_unsup_l1' in rows[-1] and 'loss_unsup_cls' not in rows[-1]
    assert record(result, tmp_path / 'r')['curve']['kept_terms'][-1] == rows[-1]['kept_terms']
    assert Predictor(tmp_path / 'r', like=cfg).cfg.method == cfg.method
    with pytest.raises(DataError, match='method.strength.*give `like`'):
        Predictor(tmp_path / 'r')


def test_it_resumes_and_its_settings_count(tmp_path):
    cfg = settings()
    assert Trainer(cfg, tmp_path / 'r', progress=False).fit(until=3) is None
    assert Trainer(cfg, tmp_path / 'r', progress=False).step == 3
    with pytest.raises(ConfigError, match='method.strength: 0.5 -> 1.0'):
        Trainer(settings(strength=1.0), tmp_path / 'r', progress=False)
    assert config_hash(cfg) != config_hash(settings(strength=1.0)) != config_hash(tiny('run.test=false'))


def test_its_settings_are_read_and_overridden_by_name():
    cfg = override(settings(), ['method.strength=2'])
    assert cfg.method.strength == 2.0 and from_dict(to_dict(cfg), settings()) == cfg
    with pytest.raises(ConfigError, match="did you mean 'method.strength'"):
        override(settings(), ['method.strenght=2'])


def test_with_a_name_its_settings_are_reached_from_the_command_line(monkeypatch):
    "A class in `METHODS` brings its settings; the way back drops them"
    monkeypatch.setattr(BoxesOnly, 'settings', BoxesOnlyConfig)
    monkeypatch.setitem(METHODS, 'boxes_only', BoxesOnly)
    cfg = override(tiny(), ['method.name=boxes_only', 'method.strength=2'])
    assert type(cfg.method) is BoxesOnlyConfig and cfg.method.strength == 2.0
    assert cfg.method.burn_in_iters == tiny().method.burn_in_iters
    assert override(cfg, ['method.name=mean_teacher']) == tiny()


def test_classes_with_equal_fields_have_different_hashes():
    @dataclasses.dataclass(frozen=True)
    class Same(MethodConfig):
        implementation = BoxesOnly

    same = dataclasses.replace(tiny(), method=Same(**dataclasses.asdict(tiny().method)))
    assert config_hash(same) != config_hash(tiny())
