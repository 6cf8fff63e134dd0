"Backbones of torchvision and timm: every tensor has its place, faults are named, training starts from them"

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from semidetr.core import ConfigError, DataError
from semidetr.detectors import backbone_weights as W
from semidetr.detectors.backbone import BackboneConfig, build_backbone, lite0_weights
from semidetr.detectors.weight_files import read_weights
from semidetr.train import trainer as T
from semidetr.train.checkpoint import load_checkpoint
from semidetr.train.config import load_config, override, preset
from semidetr.train.imports import import_weights
from semidetr.train.predict import Predictor
from test_trainer import TINY, tiny

CONFIG = dict(architecture='convnext_atto', pretrained_cfg=dict(mean=[0.4] * 3, std=[0.2] * 3))


def folder_of_timm(path, model, **config):
    path.mkdir()
    save_file(model.state_dict(), path / 'model.safetensors')
    (path / 'config.json').write_text(json.dumps(config))
    return path


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "Name of a case -> file; random weights"
    folder = tmp_path_factory.mktemp('files')
    torch.manual_seed(0)
    resnet = torchvision.models.resnet18().state_dict()
    torch.save(resnet, folder / 'torchvision.pth')
    save_file(resnet, folder / 'torchvision.safetensors')
    old = {k: v for k, v in resnet.items() if not k.endswith('num_batches_tracked')}
    torch.save(old, folder / 'old.pth')
    torch.save(timm.create_model('resnet34').state_dict(), folder / 'timm.pth')
    wrapped = {f'module.{k}': v for k, v in resnet.items()}
    torch.save(dict(model=wrapped, epoch=3), folder / 'parallel.pth')
    inner = {f'backbone.{k}': v for k, v in resnet.items() if not k.startswith('fc.')}
    torch.save(dict(state_dict=inner), folder / 'backbone.pth')
    lite = timm.create_model('tf_efficientnet_lite0')
    torch.save(dict(state_dict=lite.state_dict(), arch='tf_efficientnet_lite0'), folder / 'lite.pth')
    shutil.copy(lite0_weights(), folder / 'package.pth')
    folder_of_timm(folder / 'convnext', timm.create_model('convnext_atto'), **CONFIG)
    return folder


CASES = {  # file -> (backbone, tensors that are used)
    'torchvision.pth': ('resnet18', 75),
    'torchvision.safetensors': ('resnet18', 75),
    'old.pth': ('resnet18', 75),
    'timm.pth': ('resnet34', 145),
    'parallel.pth': ('resnet18', 75),
    'backbone.pth': ('resnet18', 75),
    'lite.pth': ('efficientnet_lite0', 198),
    'package.pth': ('efficientnet_lite0', 198),
    'convnext': ('timm:convnext_atto', 102),
}


@pytest.mark.parametrize('name', CASES)
def test_every_tensor_of_file_and_detector_is_accounted_for(name, files, tmp_path):
    backbone, used = CASES[name]
    path = files / name / 'model.safetensors' if name == 'convnext' else files / name
    report = import_weights(files / name, tmp_path / 'run')
    saved = load_checkpoint(tmp_path / 'run')
    own, network = saved['student'], saved['config']['detector']['backbone']
    assert network['name'] == backbone and report.count('renamed') == used
    assert report.count('renamed') + report.count('unused') == len(report.rows)
    assert all(row.why for row in report.rows if row.status == 'unused')
    taken = [row.name for row in report.rows if row.status == 'renamed']
    assert sorted(taken + report.fresh) == sorted(own)
    counters = {k for k in report.fresh if k.endswith('num_batches_tracked')}
    assert not any(k.startswith('backbone.') for k in set(report.fresh) - counters)
    loader = build_backbone(BackboneConfig(backbone, str(path), tuple(network['out_strides'])))
    for key, value in loader.state_dict().items():
        assert torch.equal(own[f'backbone.{key}'], value) or key.endswith('num_batches_tracked')
    text = json.loads((tmp_path / 'run' / 'report.json').read_text())
    assert len(text['rows']) == len(report.rows) and text['fresh'] == report.fresh


def test_the_report_names_what_it_does(files, tmp_path):
    report = import_weights(files / 'torchvision.pth', tmp_path / 'run', classes=['cat', 'dog'])
    lines = str(report).splitlines()
    assert '122 tensors' in lines[0] and '75 renamed, 47 unused; none missing' in lines[0]
    assert lines[1].startswith('fresh: 122 tensors of the rest of the detector (box_head, class_head')
    assert 'unused: fc.weight and 1 more (head for classes)' in lines
    assert 'stride 16)' in str(report) and 'next: semidetr train --preset small' in lines[-1]
    assert load_checkpoint(tmp_path / 'run')['classes'] == ['cat', 'dog']
    assert report.rows[0].shape == (64, 3, 7, 7)


@pytest.mark.parametrize('detector', ['dino', 'detr'])
def test_a_resnet50_gets_the_detector_of_the_release(detector, tmp_path):
    network = torchvision.models.resnet50()
    torch.save(network.state_dict(), tmp_path / 'r.pth')
    report = import_weights(tmp_path / 'r.pth', tmp_path / 'run', detector=detector)
    saved = load_checkpoint(tmp_path / 'run')
    settings = saved['config']['detector']
    assert settings.get('kind', 'dino') in detector and 'preset coco-10' in str(report)
    assert report.count('renamed') == 265  # all but 53 counters and the two tensors of `fc`
    last = saved['teacher']['backbone.body.layer4.2.conv3.weight']
    assert torch.equal(last, network.layer4[2].conv3.weight)
    predictor = import_predictor(tmp_path / 'run')
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        x = network.eval().maxpool(network.relu(network.bn1(network.conv1(images))))
        wanted = network.layer4(network.layer3(network.layer2(network.layer1(x))))
        found = predictor.model.backbone(images)[-1]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


def import_predictor(folder):
    with pytest.warns(UserWarning, match='only its backbone is trained'):
        return Predictor(folder, 'cpu')


# --- faults ------------------------------------------------------------------------------------
def damaged(state, key, how):
    if how == 'missing':
        return {k: v for k, v in state.items() if k != key}
    if how == 'renamed':
        return {k + 'x' if k == key else k: v for k, v in state.items()}
    return state | {key: torch.zeros([n + 1 for n in state[key].shape])}


@pytest.mark.parametrize('how', ['missing', 'renamed', 'reshaped'])
@pytest.mark.parametrize(
    'name,key',
    [
        ('torchvision.pth', 'conv1.weight'),
        ('torchvision.pth', 'layer2.0.bn2.running_var'),
        ('torchvision.pth', 'layer4.1.conv2.weight'),
        ('timm.pth', 'layer3.5.conv1.weight'),
        ('lite.pth', 'blocks.4.1.conv_pwl.weight'),
        ('package.pth', '_blocks.15._bn1.running_mean'),
        ('package.pth', '_conv_stem.weight'),
    ],
)
def test_one_damaged_tensor_is_named_and_nothing_is_written(name, key, how, files, tmp_path):
    content = torch.load(files / name, weights_only=True)
    state = damaged(content.get('state_dict', content), key, how)
    torch.save(state, tmp_path / 'x.pth')
    with pytest.raises(DataError) as error:
        import_weights(tmp_path / 'x.pth', tmp_path / 'run')
    text = str(error.value)
    assert ('missing ' + key if how != 'reshaped' else key + ' is (') in text and '\n' not in text
    assert ('unknown ' + key + 'x' in text) == (how == 'renamed') and not (tmp_path / 'run').exists()


@pytest.mark.parametrize('how', ['missing', 'renamed', 'reshaped'])
def test_one_damaged_tensor_of_timm_is_named(how, tmp_path):
    state = damaged(timm.create_model('convnext_atto').state_dict(), 'stages.2.downsample.1.weight', how)
    save_file(state, tmp_path / 'x.safetensors')
    with pytest.raises(DataError, match='stages.2.downsample.1.weight'):
        import_weights(tmp_path / 'x.safetensors', tmp_path / 'run', backbone='timm:convnext_atto')


def test_another_network_with_the_same_names_is_no_resnet50(tmp_path):
    torch.save(torchvision.models.resnext50_32x4d().state_dict(), tmp_path / 'x.pth')
    with pytest.raises(DataError, match=r'layer1.0.conv1.weight is \(128, .* --backbone timm:NAME'):
        import_weights(tmp_path / 'x.pth', tmp_path / 'run')


def test_a_network_that_the_names_do_not_tell_is_asked_for(files, tmp_path):
    path = tmp_path / 'alone.safetensors'
    shutil.copy(files / 'convnext' / 'model.safetensors', path)
    with pytest.raises(DataError, match='name it: --backbone timm:NAME'):
        import_weights(path, tmp_path / 'run')
    with pytest.raises(ConfigError, match="no model 'convnext_ato'"):
        import_weights(path, tmp_path / 'run', backbone='timm:convnext_ato')
    with pytest.raises(ConfigError, match='deter'):
        import_weights(path, tmp_path / 'run', backbone='timm:convnext_atto', detector='deter')
    assert not (tmp_path / 'run').exists()
    report = import_weights(path, tmp_path / 'run', backbone='timm:convnext_atto', detector='detr')
    assert report.kind == 'backbone' and 'under detr' in str(report)


def test_statistics_of_pixels_are_those_of_the_weights(files, tmp_path):
    import_weights(files / 'convnext', tmp_path / 'a')
    import_weights(files / 'lite.pth', tmp_path / 'b')
    import_weights(files / 'timm.pth', tmp_path / 'c')
    views = [load_checkpoint(tmp_path / name)['config']['view'] for name in 'abc']
    assert [tuple(v['mean']) for v in views] == [(0.4,) * 3, (0.5,) * 3, (0.485, 0.456, 0.406)]
    starts = [json.loads((tmp_path / name / 'start.json').read_text()) for name in 'abc']
    assert [s['view']['std'] for s in starts] == [list(v['std']) for v in views]


def test_padding_that_no_file_tells_is_said(files, tmp_path):
    state = torch.load(files / 'lite.pth', weights_only=True)['state_dict']
    torch.save(state, tmp_path / 'x.pth')
    assert 'taken as tf_efficientnet_lite0' in str(import_weights(tmp_path / 'x.pth', tmp_path / 'a'))
    torch.save(dict(state_dict=state, arch='efficientnet_lite0'), tmp_path / 'y.pth')
    report = import_weights(tmp_path / 'y.pth', tmp_path / 'b')
    assert 'backbone timm:efficientnet_lite0' in str(report) and 'taken as' not in str(report)


# --- training ----------------------------------------------------------------------------------
def test_training_takes_the_backbone_and_keeps_its_own_rest(files, tmp_path):
    import_weights(files / 'package.pth', tmp_path / 'start')
    weights = load_checkpoint(tmp_path / 'start')['student']
    alone = T.Trainer(tiny(), tmp_path / 'a', progress=False)
    with pytest.warns(UserWarning, match='a backbone alone: its 198 tensors are loaded'):
        run = T.Trainer(tiny(f'run.init={tmp_path / "start"}'), tmp_path / 'b', progress=False)
    assert run.cfg.detector.d_model == 32  # not that of the folder: only the backbone must fit
    for network in (run.student, run.teacher):
        for key, value in network.state_dict().items():
            same = weights[key] if key.startswith('backbone.') else alone.student.state_dict()[key]
            assert torch.equal(value, same)
    assert not torch.equal(
        alone.student.backbone.body.conv_stem.weight, run.student.backbone.body.conv_stem.weight
    )
    assert run.fit()['iterations'] == 6


def test_a_backbone_alone_is_imported_once(files, tmp_path):
    "Its detector is untrained: rows of classes would be moved for nothing"
    import_weights(files / 'torchvision.pth', tmp_path / 'start')
    for to in (None, ['a', 'b']):
        with pytest.raises(DataError, match='only its backbone is trained; give the file') as e:
            import_weights(tmp_path / 'start', tmp_path / 'again', to=to)
        assert str(tmp_path / 'start') in str(e.value) and not (tmp_path / 'again').exists()


def test_start_json_sets_what_a_preset_does_not(files, tmp_path):
    import_weights(files / 'torchvision.pth', tmp_path / 'start')
    cfg = load_config(tmp_path / 'start' / 'start.json', preset('digits'))
    assert cfg.detector.backbone == BackboneConfig('resnet18', 'none', (8, 16))
    cfg = override(cfg, [s for s in TINY if 'backbone' not in s])
    with pytest.warns(UserWarning, match='a backbone alone: its 75'):
        run = T.Trainer(cfg, tmp_path / 'run', progress=False)
    assert torch.equal(run.student.backbone.body.conv1.weight, torch.load(files / 'old.pth')['conv1.weight'])
    other = override(cfg, ['detector.backbone.out_strides=[8, 16, 32]'])
    with pytest.raises(DataError, match='layer4'):
        T.Trainer(other, tmp_path / 'other', progress=False)


@pytest.mark.parametrize('name', ['torchvision.pth', 'torchvision.safetensors', 'parallel.pth'])
def test_a_file_is_still_a_setting(name, files):
    wanted = torch.load(files / 'old.pth')
    own = build_backbone(BackboneConfig('resnet18', str(files / name), (32,))).body.state_dict()
    assert own and all(torch.equal(v, wanted[k]) for k, v in own.items())


# --- files that are none -------------------------------------------------------------------------
class Evil:
    def __reduce__(self):
        return Path.touch, (Path('evil'),)


def bad_files(folder):
    "file -> what the error must say"
    state = torchvision.models.resnet18().state_dict()
    (folder / 'empty.pth').write_bytes(b'')
    (folder / 'empty.safetensors').write_bytes(b'')
    (folder / 'text.pth').write_text('these are no weights')
    (folder / 'picture.pth').write_bytes(b'\xff\xd8\xff\xe0\x00\x10JFIF' + bytes(200))
    (folder / 'text.safetensors').write_text('these are no weights')
    torch.save(dict(model=state, more=Evil()), folder / 'evil.pth')
    torch.save(torchvision.models.resnet18(), folder / 'module.pth')
    torch.save({}, folder / 'nothing.pth')
    torch.save([1, 2], folder / 'list.pth')
    torch.save(dict(lr=1.0), folder / 'numbers.pth')
    torch.save({3: torch.zeros(1)}, folder / 'keys.pth')
    torch.save(dict(state_dict=dict(model=state)), folder / 'nested.pth')
    torch.save(dict(bert=torch.zeros(1)), folder / 'other.pth')
    whole = {k: v.to(torch.int8) if k == 'layer1.0.conv1.weight' else v for k, v in state.items()}
    torch.save(whole, folder / 'int8.pth')
    state['layer2.0.conv1.weight'] = state['layer2.0.conv1.weight'] / 0
    torch.save(state, folder / 'infinite.pth')
    (folder / 'hf').mkdir()
    save_file(dict(a=torch.zeros(1)), folder / 'hf' / 'model.safetensors')
    return {
        'empty.pth': 'an empty file',
        'empty.safetensors': 'an empty file',
        'text.pth': 'cannot be read as weights',
        'picture.pth': 'no file of torch',
        'text.safetensors': 'not a whole safetensors file',
        'evil.pth': 'refused',
        'module.pth': 'refused.*ResNet',
        'nothing.pth': 'holds no tensors',
        'list.pth': 'holds list',
        'numbers.pth': 'lr is no named tensor',
        'keys.pth': '3 is no named tensor',
        'nested.pth': 'model is no named tensor',
        'other.pth': 'other.pth.*bert',
        'int8.pth': 'layer1.0.conv1.weight has whole numbers',
        'infinite.pth': 'layer2.0.conv1.weight.* not finite',
        'hf': 'no readable config.json',
    }


def test_a_file_that_holds_no_weights_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, words in bad_files(tmp_path).items():
        with pytest.raises(DataError, match=words) as error:
            import_weights(tmp_path / name, tmp_path / 'run')
        text = str(error.value)
        assert name in text and '\n' not in text and len(text) < 500
    assert not (tmp_path / 'run').exists() and not Path('evil').exists()


def test_settings_of_a_backbone_are_refused_for_a_whole_detector(tmp_path):
    state = {'transformer.encoder.layers.0.self_attn.sampling_offsets.weight': torch.zeros(1)}
    torch.save(state, tmp_path / 'x.pth')
    for given in (dict(detector='detr'), dict(backbone='resnet50')):
        with pytest.raises(ConfigError, match='read off from the original Deformable-DETR'):
            import_weights(tmp_path / 'x.pth', tmp_path / 'run', **given)


# --- the command ---------------------------------------------------------------------------------
def test_the_command_imports_a_backbone(files, tmp_path, capsys):
    from semidetr.cli import commands, terminal

    assert commands
    home = tmp_path / 'home'
    home.mkdir()
    line = f'semidetr import {files}/parallel.pth -o {tmp_path}/run'
    assert terminal.shell(f'{line} --detector deformable_detr_refine --classes a,b', home=home) == 0
    out = capsys.readouterr().out
    assert '75 renamed, 47 unused' in out and 'not used: epoch' in out and 'start.json' in out
    saved = load_checkpoint(tmp_path / 'run')
    assert saved['config']['detector']['form'] == 'refine' and saved['classes'] == ['a', 'b']
    assert terminal.shell(line, home=home) == 2


def test_rules_of_lite0_agree_with_the_order_of_its_tensors():
    from semidetr.detectors.backbone import _read_state, match_by_order

    package = _read_state(lite0_weights())
    by_order = match_by_order(W.whole_network('efficientnet_lite0'), package)
    rules = W.lite0_rules()
    assert [W._named(k, rules) for k in package] == list(by_order) and len(by_order) == 296


def test_a_checkpoint_of_timm_with_its_command_line_is_a_file_of_weights(tmp_path):
    "By both ways in: the command line is an argparse.Namespace"
    import argparse

    weights = dict(
        state_dict={'conv1.weight': torch.zeros(1)}, args=argparse.Namespace(lr=1), arch='resnet18'
    )
    torch.save(weights, tmp_path / 'x.pth')
    from semidetr.detectors.backbone import _read_state

    assert list(_read_state(tmp_path / 'x.pth')) == ['conv1.weight']
    assert list(read_weights(tmp_path / 'x.pth').state) == ['conv1.weight']
