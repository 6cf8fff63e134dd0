"Imports: folders that predict and that train, classes by name, the official Semi-DETR in both stages"

import dataclasses
import json
import shutil
import warnings

import pytest
import torch
from semidetr.core import ConfigError, DataError
from semidetr.detectors import weight_files as W
from semidetr.detectors.backbone import BackboneConfig
from semidetr.detectors.contract import build_detector
from semidetr.detectors.denoising import DenoisingConfig
from semidetr.detectors.detector import DetectorConfig, dino_r50
from semidetr.detectors.detr import DETRConfig
from semidetr.detectors.transformer import TransformerConfig
from semidetr.semi.consistency import Projector
from semidetr.train import trainer as T
from semidetr.train.checkpoint import load_checkpoint
from semidetr.train.config import override
from semidetr.train.imports import import_weights
from semidetr.train.predict import Predictor
from test_cli import shell  # noqa: F401 (a fixture)
from test_trainer import stop_after, tiny

DIGITS = [str(i) for i in range(10)]
COPIES = {'class_head.': 'fc_cls.{j}.', 'box_head.': 'fc_reg.{j}.'}
NAMES = {
    'enc_class_head.': 'fc_enc_cls.',
    'enc_box_head.': 'fc_enc_reg.',
    'transformer.query_content.': 'transformer.tgt_embed.',
}
PROJECTOR = {'convs.0': 'conv1', 'convs.1': 'conv2', 'norms.0': 'bn1', 'norms.1': 'bn2', 'norms.2': 'bn'}


def small_dino(classes, rows):
    "Settings of a DINO that is built in a second"
    backbone = BackboneConfig('resnet18', 'none', (16, 32))
    transformer = TransformerConfig(32, 8, 3, 4, 2, 2, 32, num_queries=20, select_invalid=True)
    return DetectorConfig(classes, backbone, transformer, DenoisingConfig(label_rows=rows))


def official(model, network):
    "A state dict under the names of the official Semi-DETR"
    state = {}
    for key, value in model.state_dict().items():
        if key.startswith('backbone.body.'):
            state[f"{network}.backbone.{key.removeprefix('backbone.body.')}"] = value
            continue
        head = next((k for k in COPIES if key.startswith(k)), None)
        if head:
            for j in range(model.cfg.transformer.dec_layers):
                name = key.replace(head, COPIES[head].format(j=j), 1)
                state[f'{network}.bbox_head.{name}'] = value
            continue
        for ours, theirs in NAMES.items():
            key = theirs + key.removeprefix(ours) if key.startswith(ours) else key
        state[f'{network}.bbox_head.{key}'] = value
    return state


def official_file(path, settings, hidden, classes=None):
    "A synthetic checkpoint of the official code; (student, teacher, projector)"
    torch.manual_seed(0)
    student, teacher = build_detector(settings.untrained()), build_detector(settings.untrained())
    projector = Projector(settings.d_model, hidden)
    for norm in projector.norms:
        norm.running_mean.normal_()
    state = official(student, 'student') | official(teacher, 'teacher')
    for key, value in projector.state_dict().items():
        for ours, theirs in PROJECTOR.items():
            key = theirs + key.removeprefix(ours) if key.startswith(ours + '.') else key
        state[f'projector.{key}'] = value
    meta = dict(iter=100, CLASSES=tuple(classes) if classes else None)
    torch.save(dict(meta=meta, state_dict=state, optimizer={}), path)
    return student, teacher, projector


def equal(module, state):
    own = module.state_dict()
    return own.keys() == state.keys() and all(torch.equal(v, state[k]) for k, v in own.items())


def run_of(settings, *more):
    cfg = tiny('run.test=false', 'consistency.hidden=16', *more, method='semi_detr')
    settings = settings.untrained()
    return dataclasses.replace(cfg, detector=dataclasses.replace(settings, num_classes=0))


@pytest.mark.parametrize('T1', [0, 5], ids=['one-to-one', 'one-to-many'])
def test_training_goes_on_from_the_official_student_teacher_and_projector(T1, tmp_path):
    order = DIGITS[::-1]
    settings = small_dino(10, 12)
    student, teacher, projector = official_file(tmp_path / 'x.pth', settings, 16, order)
    report = import_weights(tmp_path / 'x.pth', tmp_path / 'run')
    assert report.kind == 'official' and report.count('unused') == 0
    saved = load_checkpoint(tmp_path / 'run')
    assert saved['classes'] == order and equal(student, saved['student']) and equal(teacher, saved['teacher'])
    more = (f'method.T1={T1}', 'method.burn_in_iters=0', 'optim.iters=2', f'run.init={tmp_path / "run"}')
    with pytest.warns(UserWarning, match='10 of 10 rows by name'):
        trainer = T.Trainer(run_of(saved_settings(saved, settings), *more), tmp_path / 'new', progress=False)
    assert equal(trainer.method.projector, projector.state_dict())
    for network, source in ((trainer.student, student), (trainer.teacher, teacher)):
        moved = network.class_head.weight.flip(0)
        assert torch.equal(moved, source.class_head.weight)
        assert torch.equal(network.label_enc.weight[:10].flip(0), source.label_enc.weight[:10])
        assert torch.equal(network.transformer.level_embed, source.transformer.level_embed)
    assert not torch.equal(trainer.student.class_head.weight, trainer.teacher.class_head.weight)
    result = trainer.fit()
    assert result['iterations'] == 2


def test_a_pair_stays_a_pair_when_its_run_is_imported_for_other_classes(tmp_path):
    "Student and teacher of the official code differ; training starts each from its own weights"
    settings = small_dino(10, 12)
    student, teacher, _ = official_file(tmp_path / 'x.pth', settings, 16, DIGITS)
    import_weights(tmp_path / 'x.pth', tmp_path / 'run')
    import_weights(tmp_path / 'run', tmp_path / 'turned', to=DIGITS[::-1])
    saved = load_checkpoint(tmp_path / 'turned')
    assert saved['imported']['pair'] and saved['classes'] == DIGITS[::-1]
    with pytest.warns(UserWarning, match='10 of 10 rows by name'):
        run = T.Trainer(run_of(settings, f'run.init={tmp_path / "turned"}'), tmp_path / 'new', progress=False)
    assert equal(run.student, student.state_dict()) and equal(run.teacher, teacher.state_dict())


def saved_settings(saved, like):
    assert saved['config']['detector']['transformer']['num_queries'] == like.transformer.num_queries
    assert saved['config']['detector']['denoising']['label_rows'] == like.denoising.label_rows
    return like


def test_a_projector_of_another_width_is_named(tmp_path):
    settings = small_dino(10, 12)
    official_file(tmp_path / 'x.pth', settings, 24, DIGITS)
    import_weights(tmp_path / 'x.pth', tmp_path / 'run')
    cfg = run_of(settings, f'run.init={tmp_path / "run"}')
    with pytest.raises(DataError, match='consistency.hidden=24'):
        T.Trainer(cfg, tmp_path / 'new', progress=False)


@pytest.mark.slow
def test_a_full_size_official_checkpoint_is_complete_and_runs(tmp_path):
    settings = dino_r50(80).untrained()
    student, teacher, projector = official_file(tmp_path / 'x.pth', settings, 1024)
    report = import_weights(tmp_path / 'x.pth', tmp_path / 'run')
    assert '80 rows taken as those of COCO' in str(report)
    saved = load_checkpoint(tmp_path / 'run')
    assert equal(student, saved['student']) and equal(teacher, saved['teacher'])
    assert equal(projector, {k.removeprefix('projector.'): v for k, v in saved['parts'].items()})
    predictor = Predictor(tmp_path / 'run', 'cpu')
    assert predictor.classes == list(W.COCO_CLASSES)
    images = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        found, wanted = predictor.model(images), teacher.eval()(images)
    assert torch.equal(found['pred_logits'], wanted['pred_logits'])


def test_no_warning_of_a_random_backbone_where_the_weights_come_from_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'empty'))
    settings = small_dino(10, 12)
    official_file(tmp_path / 'x.pth', settings, 16, DIGITS)
    import_weights(tmp_path / 'x.pth', tmp_path / 'run')
    fresh, started = run_of(settings), run_of(settings, f'run.init={tmp_path / "run"}')
    detector = override(fresh, ['detector.backbone.weights=auto']).detector
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        T.Trainer(dataclasses.replace(started, detector=detector), tmp_path / 'new', progress=False)
    assert not [w for w in said if 'ImageNet' in str(w.message)]
    with pytest.warns(UserWarning, match='no ImageNet weights'):
        T.Trainer(dataclasses.replace(fresh, detector=detector), tmp_path / 'other', progress=False)


# --- classes -----------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp('init') / 'whole'
    T.Trainer(tiny('run.test=false', 'optim.iters=2'), folder, progress=False).fit()
    return folder


def start(init, folder):
    return T.Trainer(tiny(f'run.init={init}'), folder, progress=False)


def test_the_same_classes_start_bit_for_bit_without_a_word(whole, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        run = start(whole, tmp_path / 'a')
    saved = load_checkpoint(whole)
    assert equal(run.student, saved['teacher']) and equal(run.teacher, saved['teacher'])


def test_import_of_a_run_for_other_classes(whole, tmp_path):
    to = ['7', 'x', '2']
    report = import_weights(whole, tmp_path / 'out', to=to)
    assert 'new, untrained: x' in str(report) and 'left out: 0' in str(report)
    predictor = Predictor(tmp_path / 'out', 'cpu')
    old = load_checkpoint(whole)['teacher']
    assert predictor.classes == to
    assert torch.equal(predictor.model.class_head.weight[0], old['class_head.weight'][7])
    assert torch.equal(predictor.model.class_head.bias[2], old['class_head.bias'][2])
    text = json.loads((tmp_path / 'out' / 'report.json').read_text())
    assert text['classes'] == to and len(text['rows']) == len(old)
    with pytest.raises(DataError, match='holds a run already'):
        import_weights(whole, tmp_path / 'out')


@pytest.mark.parametrize(
    'options',
    [
        dict(classes=DIGITS),
        dict(heads=4),
        dict(dilated=True),
        dict(detector='detr'),
        dict(backbone='resnet18'),
    ],
    ids=lambda o: next(iter(o)),
)
def test_what_a_run_tells_itself_is_not_taken_from_options(options, whole, tmp_path):
    with pytest.raises(ConfigError, match=f'a run tells its {next(iter(options))} itself') as e:
        import_weights(whole, tmp_path / 'out', to=['7'], **options)
    assert str(whole) in str(e.value) and '\n' not in str(e.value)
    assert not (tmp_path / 'out').exists()


def test_a_dilated_backbone_is_taken_where_the_command_says_so(shell, tmp_path):  # noqa: F811
    "No name or shape tells it (DC5); the weights are the same, the map is twice as large"
    backbone = BackboneConfig('resnet50', 'none', (32,))
    model = build_detector(DETRConfig(2, backbone, d_model=32, heads=4, layers=1, ffn=16, num_queries=5))
    state = {k.replace('backbone.body.', 'backbone.0.body.'): v for k, v in model.state_dict().items()}
    torch.save(dict(model=state), tmp_path / 'detr.pth')
    found, line = {}, ['import', tmp_path / 'detr.pth', '--heads', 4, '--classes', 'a,b', '-o']
    for name, more in dict(plain=[], dilated=['--dilated']).items():
        code, out, err = shell(*line, tmp_path / name, *more)
        assert code == 0, err
        assert ('with one, give --dilated' in out) == (name == 'plain')
        found[name] = Predictor(tmp_path / name, 'cpu').model.eval()
    backbones = {name: m.cfg.backbone for name, m in found.items()}
    assert (backbones['plain'].name, backbones['plain'].out_strides) == ('resnet50', (32,))
    assert (backbones['dilated'].name, backbones['dilated'].out_strides) == ('resnet50_dc5', (16,))
    assert equal(found['plain'], found['dilated'].state_dict()) and equal(found['plain'], model.state_dict())


def test_a_run_goes_on_without_the_run_that_it_began_with(whole, tmp_path):
    "Its own checkpoint holds all weights; nothing is said, and the end is that of an unbroken run"
    source = shutil.copytree(whole, tmp_path / 'source')
    cfg = tiny('run.test=false', 'optim.iters=4', f'run.init={source}')
    T.Trainer(cfg, tmp_path / 'unbroken', progress=False).fit()
    run = T.Trainer(cfg, tmp_path / 'run', progress=False)
    stop_after(run, 2)
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    shutil.rmtree(source)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        again = T.Trainer(cfg, tmp_path / 'run', progress=False)
    assert again.fit()['iterations'] == 4
    wanted = load_checkpoint(tmp_path / 'unbroken')
    assert equal(again.student, wanted['student']) and equal(again.teacher, wanted['teacher'])


def test_rows_of_coco_ids_become_those_of_eighty_classes(tmp_path):
    "A DINO with 91 rows and 92 labels, as released"
    torch.manual_seed(0)
    settings = small_dino(91, 92)
    model = build_detector(settings)
    state = {}
    for key, value in model.state_dict().items():
        key = key.replace('backbone.body.', 'backbone.0.body.')
        key = key.replace('transformer.query_content.', 'transformer.tgt_embed.')
        key = key.replace('enc_class_head.', 'transformer.enc_out_class_embed.')
        key = key.replace('enc_box_head.', 'transformer.enc_out_bbox_embed.')
        for ours, theirs in (('class_head.', 'class_embed'), ('box_head.', 'bbox_embed')):
            if key.startswith(ours):
                rest = key.removeprefix(ours)
                state |= {
                    f'{p}{theirs}.{j}.{rest}': value for p in ('', 'transformer.decoder.') for j in (0, 1)
                }
                key = None
                break
        if key:
            state[key] = value
    torch.save(dict(model=state, epoch=11), tmp_path / 'dino.pth')
    report = import_weights(tmp_path / 'dino.pth', tmp_path / 'run')
    assert 'ids of COCO' in str(report) and 'not used: epoch' in str(report)
    predictor = Predictor(tmp_path / 'run', 'cpu')
    assert predictor.classes == list(W.COCO_CLASSES) and predictor.cfg.detector.denoising.label_rows == 82
    rows = [i for i in range(91) if i not in W.COCO_UNUSED]
    new = predictor.model
    assert torch.equal(new.class_head.weight, model.class_head.weight[rows])
    assert torch.equal(new.enc_class_head.bias, model.enc_class_head.bias[rows])
    assert torch.equal(new.label_enc.weight[:80], model.label_enc.weight[rows])
    with pytest.raises(DataError, match='91 rows of classes, but 2 names'):
        import_weights(tmp_path / 'dino.pth', tmp_path / 'other', classes=['a', 'b'])
    assert not (tmp_path / 'other').exists()
