"Weights of other programs: every name of every format, faults that are named, outputs of the originals"

import argparse
import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch
from semidetr.core import DataError
from semidetr.detectors import deformable_detr as dd
from semidetr.detectors import detector as dino
from semidetr.detectors import weight_files as F
from semidetr.detectors import weight_names as N
from semidetr.detectors import weights as W
from semidetr.detectors.backbone import BackboneConfig
from semidetr.detectors.contract import build_detector
from semidetr.detectors.denoising import DenoisingConfig
from semidetr.detectors.detector import DetectorConfig
from semidetr.detectors.transformer import TransformerConfig
from test_deformable_detr import FOLDERS, FULL, all_layers, golden, needs_full, tiny_resnet

OFFICIAL = Path(__file__).parent / 'golden' / 'official_checkpoint_keys.tsv'
FORMATS = {  # key list -> (number of names, kind, what the settings must be)
    'deformable_detr_r50_single': (561, 'deformable_detr', dict(form='plain', levels=4, num_queries=300)),
    'deformable_detr_r50_single_scale': (549, 'deformable_detr', dict(form='plain', levels=1)),
    'deformable_detr_r50_refine': (597, 'deformable_detr', dict(form='refine', ffn=1024, points=4)),
    'deformable_detr_r50_two_stage': (630, 'deformable_detr', dict(form='two_stage', layers=6)),
    'hf_deformable_detr': (585, 'hf_deformable_detr', dict(form='plain', num_queries=300)),
    'hf_deformable_detr_native': (585, 'hf_deformable_detr', dict(form='plain', ffn=1024)),
    'hf_deformable_detr_refine': (621, 'hf_deformable_detr', dict(form='refine')),
    'hf_deformable_detr_two_stage': (654, 'hf_deformable_detr', dict(form='two_stage')),
    'dino_4scale_r50': (626, 'dino', {}),
    'dino_5scale_r50': (630, 'dino', {}),
    'detr_r50': (458, 'detr', dict(num_queries=100, ffn=2048, layers=6)),
    'hf_detr_resnet50': (530, 'hf_detr', dict(num_queries=100, ffn=2048)),
    'hf_detr_resnet50_native': (530, 'hf_detr', dict(num_queries=100, d_model=256)),
}


def meta_state(path):
    "Tensors without data, of the names and shapes of a key list"
    rows = [line.split('\t') for line in path.read_text().splitlines() if line and line[0] != '#'][1:]
    sizes = {name: [int(n) for n in shape.split('x') if n] for name, shape in rows}
    return {name: torch.empty(size, device='meta') for name, size in sizes.items()}


def full_size(name):
    if 'detr_resnet' in name or name == 'detr_r50':
        pytest.importorskip('semidetr.detectors.detr')
    return meta_state(FULL / f'keys_{name}.tsv')


@pytest.fixture
def build_once(monkeypatch):
    "Do not build the same network again for every fault of a file"
    monkeypatch.setattr(W, 'wanted_shapes', wanted_once)


wanted_once = functools.lru_cache(W.wanted_shapes)


def is_copy(name, report):
    "May a file lack this tensor, because it holds the same one elsewhere, or head 0 stands for all?"
    rows = {row.key: row for row in report.rows}
    same = [row for row in report.rows if row.name == rows[name].name]
    return len(same) > 1 and rows[name].status != 'joined'


@needs_full
@pytest.mark.parametrize('name', FORMATS)
def test_every_name_of_a_full_size_file_has_its_place(name, build_once):
    count, kind, expected = FORMATS[name]
    state = full_size(name)
    assert len(state) == count and N.recognise(state) == kind
    done = W.convert(state)
    settings = done.settings
    assert {k: getattr(settings, k) for k in expected} == expected
    assert settings.num_classes == 91 and settings.d_model == 256
    assert {k: tuple(v.shape) for k, v in done.state.items()} == W.wanted_shapes(settings)
    assert len(done.report.rows) == count and done.report.count('unused') == 0
    strides = (4, 8, 16, 32) if '5scale' in name else (8, 16, 32)
    is_single = 'single_scale' in name or kind in ('detr', 'hf_detr')
    assert settings.backbone.name == 'resnet50'
    assert settings.backbone.out_strides == ((32,) if is_single else strides)
    if kind == 'dino':
        assert settings.transformer.num_queries == 900 and settings.denoising.label_rows == 92


@needs_full
@pytest.mark.parametrize('name', FORMATS)
def test_a_missing_renamed_or_reshaped_tensor_is_named(name, build_once):
    state = full_size(name)
    report = W.convert(state).report
    alone = [k for k in state if not is_copy(k, report)]
    for key in [*alone[:: len(alone) // 4], alone[-1]]:
        with pytest.raises(DataError) as error:
            W.convert({k: v for k, v in state.items() if k != key})
        assert f'missing {key}' in str(error.value)
        with pytest.raises(DataError) as error:
            W.convert({k + 'x' if k == key else k: v for k, v in state.items()})
        assert key in str(error.value) and '\n' not in str(error.value)
    inner = [k for k in alone if '.layer2.' in k or '.stages.1.' in k or '.encoder.layers.1.' in k]
    for key in inner[:: len(inner) // 2]:
        odd = torch.empty([n + 1 for n in state[key].shape], device='meta')
        with pytest.raises(DataError) as error:
            W.convert(state | {key: odd})
        assert key in str(error.value)


# --- the official Semi-DETR -----------------------------------------------------------------
def official():
    "Names of both networks and the projector; a ResNet-18 and two layers"
    backbone = build_detector(DetectorConfig(3, BackboneConfig('resnet18', 'none', (8, 16, 32)))).backbone
    state = {k: v for k, v in meta_state(OFFICIAL).items() if k.startswith('student.')}
    for k, v in backbone.state_dict().items():
        state[f"student.backbone.{k.removeprefix('body.')}"] = v.to('meta')
        counter = k.replace('running_var', 'num_batches_tracked')
        if counter != k:
            state[f"student.backbone.{counter.removeprefix('body.')}"] = torch.empty((), device='meta')
    for level, width in enumerate((128, 256, 512, 512)):
        kernel = 3 if level == 3 else 1
        key = f'student.bbox_head.input_proj.{level}.0.weight'
        state[key] = torch.empty(256, width, kernel, kernel, device='meta')
    state |= {k.replace('student.', 'teacher.', 1): v for k, v in state.items()}
    return state | {k: v for k, v in meta_state(OFFICIAL).items() if k.startswith('projector.')}


def test_every_name_of_the_official_checkpoint_has_its_place():
    done = W.convert(official())
    wanted = W.wanted_shapes(done.settings)
    for state in (done.state, done.teacher):
        assert {k: tuple(v.shape) for k, v in state.items()} == wanted
    from semidetr.semi.consistency import Projector

    projector = {f'projector.{k}': v.shape for k, v in Projector(256).state_dict().items()}
    assert {k: v.shape for k, v in done.parts.items()} == projector
    assert done.settings.denoising.label_rows == 82 and done.settings.num_classes == 5
    assert done.report.count('unused') == 40  # counters of 20 batch norms of each network


@pytest.mark.parametrize(
    'key',
    [
        'student.bbox_head.transformer.level_embed',
        'teacher.bbox_head.fc_enc_cls.bias',
        'teacher.backbone.layer3.0.conv1.weight',
        'projector.bn1.weight',
        'projector.fc1.bias',
        'student.bbox_head.label_enc.weight',
    ],
)
def test_a_missing_tensor_of_the_official_checkpoint_is_named(key, build_once):
    state = official()
    with pytest.raises(DataError, match=f'missing {key}'):
        W.convert({k: v for k, v in state.items() if k != key})
    with pytest.raises(DataError, match=f'{key}'):
        W.convert({k + '_' if k == key else k: v for k, v in state.items()})


def test_a_checkpoint_without_a_network_is_refused():
    for part in ('student', 'teacher', 'projector'):
        state = {k: v for k, v in official().items() if not k.startswith(part)}
        with pytest.raises(DataError, match=f'missing {part}'):
            W.convert(state)


# --- values ----------------------------------------------------------------------------------
def hf(folder):
    return F.read_weights(FULL / folder / 'hf')


@needs_full
@pytest.mark.parametrize('form', FOLDERS)
def test_deformable_detr_of_both_programs_gives_the_outputs_of_the_original(form, monkeypatch):
    monkeypatch.setattr(dd, 'build_backbone', tiny_resnet)
    settings, state, io = golden(form)
    own = dict(backbone=settings.backbone)
    original = W.convert(state, heads=settings.heads, **own)
    same = dataclasses.replace(original.settings, num_queries=settings.num_queries)
    assert same == settings
    file = hf(FOLDERS[form])
    other = W.convert(file.state, file.config, **own)
    assert other.settings == settings and file.classes == [f'class{i}' for i in range(7)]
    assert other.state.keys() == original.state.keys()
    assert all(torch.equal(v, other.state[k]) for k, v in original.state.items())
    model = build_detector(settings).eval()
    model.load_state_dict(other.state)
    with torch.no_grad():
        out = model(io['images'].float(), io['mask'])
    for key in ('pred_logits', 'pred_boxes'):
        torch.testing.assert_close(all_layers(out, key), io[key], rtol=0, atol=1e-4)


@needs_full
def test_detr_of_both_programs_gives_the_outputs_of_the_original(monkeypatch):
    detr = pytest.importorskip('semidetr.detectors.detr')
    from safetensors.torch import load_file

    monkeypatch.setattr(detr, 'build_backbone', tiny_resnet)
    folder = FULL / 'detr_a'
    io = load_file(folder / 'io.safetensors')
    backbone = BackboneConfig('resnet50', 'none', (32,))
    original = W.convert(load_file(folder / 'original.safetensors'), heads=4, backbone=backbone)
    file = hf('detr_a')
    other = W.convert(file.state, file.config, backbone=backbone)
    assert other.settings == original.settings and other.report.count('joined') == 36
    assert all(torch.equal(v, other.state[k]) for k, v in original.state.items())
    model = build_detector(other.settings).eval()
    model.load_state_dict(other.state)
    with torch.no_grad():
        out = model(io['images'].float(), io['mask'])
    for key in ('pred_logits', 'pred_boxes'):
        torch.testing.assert_close(all_layers(out, key), io[key], rtol=0, atol=1e-4)


@needs_full
def test_dino_gives_the_outputs_of_the_original(monkeypatch):
    from safetensors.torch import load_file

    monkeypatch.setattr(dino, 'build_backbone', tiny_resnet)
    folder = FULL / 'dino_a'
    io, state = load_file(folder / 'io.safetensors'), load_file(folder / 'original.safetensors')
    done = W.convert(state, heads=4, backbone=BackboneConfig('resnet50', 'none', (8, 16, 32)))
    model = build_detector(done.settings).eval()
    model.load_state_dict(done.state)
    with torch.no_grad():
        out = model(io['images'].float(), io['mask'])
    for key in ('pred_logits', 'pred_boxes'):
        torch.testing.assert_close(all_layers(out, key), io[key], rtol=0, atol=1e-4)


# --- heads -----------------------------------------------------------------------------------
def small_state(form):
    "A small random Deformable-DETR under the original names"
    sizes = dict(d_model=32, levels=2, points=2, layers=3, ffn=16, num_queries=300)
    backbone = BackboneConfig('resnet18', 'none', (16, 32))
    settings = dd.DeformableDETRConfig(4, backbone, **sizes, form=form)
    torch.manual_seed(1)
    model = build_detector(settings)
    for p in [*model.class_embed.parameters(), *model.bbox_embed.parameters()]:
        torch.nn.init.normal_(p)
    state = {k.replace('backbone.body.', 'backbone.0.body.'): v for k, v in model.state_dict().items()}
    heads = [k for k in state if k.startswith(('class_embed', 'bbox_embed'))]
    if form == 'plain':
        state |= {k.replace('.0.', f'.{j}.', 1): state[k] for k in heads for j in (1, 2)}
    else:
        state |= {f'transformer.decoder.{k}': state[k] for k in heads if form == 'two_stage' or k[0] == 'b'}
    return settings, model.state_dict(), state


@pytest.mark.parametrize('form', ['plain', 'refine', 'two_stage'])
def test_copies_of_heads_may_be_left_out_but_must_not_differ(form):
    settings, wanted, state = small_state(form)
    done = W.convert(state)
    assert done.settings == dataclasses.replace(settings, backbone=done.settings.backbone)
    assert all(torch.equal(v, wanted[k]) for k, v in done.state.items())
    copy = 'class_embed.2.bias' if form == 'plain' else 'transformer.decoder.bbox_embed.1.layers.0.bias'
    fewer = W.convert({k: v for k, v in state.items() if k != copy})
    assert all(torch.equal(v, wanted[k]) for k, v in fewer.state.items())
    with pytest.raises(DataError, match='differs from its copy'):
        W.convert(state | {copy: state[copy] + 1})


def test_heads_that_do_not_divide_the_offsets_are_asked_for():
    "Levels 2 and points 2 of 8 heads are 64 offsets: 4 heads have 4 points, 3 heads have none"
    _, _, state = small_state('plain')
    assert W.convert(state).settings.points == 2 and W.convert(state, heads=4).settings.points == 4
    with pytest.raises(DataError, match='64 sampling offsets do not fit 3 heads; give heads=M'):
        W.convert(state, heads=3)


def test_head_zero_serves_all_layers_where_it_is_alone():
    _, wanted, state = small_state('refine')
    tied = {k: v for k, v in state.items() if not k.startswith(('class_embed.1', 'class_embed.2'))}
    done = W.convert(tied)
    assert torch.equal(done.state['class_embed.2.bias'], wanted['class_embed.0.bias'])
    assert len(done.report.filled) == 4
    with pytest.raises(DataError, match='missing class_embed.1.bias'):
        W.convert({k: v for k, v in state.items() if k != 'class_embed.1.bias'})


# --- rows ------------------------------------------------------------------------------------
def small_dino(classes):
    backbone = BackboneConfig('efficientnet_lite0', 'none', (16,))
    transformer = TransformerConfig(32, 4, 1, 2, 1, 2, 32, num_queries=9)
    torch.manual_seed(len(classes))
    model = build_detector(DetectorConfig(len(classes), backbone, transformer, DenoisingConfig(num=4)))
    torch.nn.init.normal_(model.class_head.weight)
    torch.nn.init.normal_(model.enc_class_head.weight)
    return model.eval()


@pytest.mark.parametrize(
    'new',
    [['c', 'a', 'b'], ['d', 'b', 'a', 'c'], ['b', 'c'], ['x', 'c']],
    ids=['order', 'more', 'less', 'both'],
)
def test_logits_follow_the_names_of_classes(new):
    "The same decoder: each class that both have keeps its logits, whatever its number"
    old = ['a', 'b', 'c']
    before, after = small_dino(old), small_dino(new)
    untrained = {k: v.clone() for k, v in after.state_dict().items()}
    state, notes = F.map_class_rows(before.state_dict(), old, new, untrained)
    after.load_state_dict(state)
    hs = torch.randn(5, 32)
    for head in ('class_head', 'enc_class_head'):
        x, y = getattr(before, head)(hs), getattr(after, head)(hs)
        for i, name in enumerate(new):
            if name in old:
                torch.testing.assert_close(y[:, i], x[:, old.index(name)])
            else:
                assert torch.equal(getattr(after, head).bias[i], untrained[f'{head}.bias'][i])
                assert torch.equal(getattr(after, head).weight[i], untrained[f'{head}.weight'][i])
    for i, name in enumerate(new):
        if name in old:
            assert torch.equal(after.label_enc.weight[i], before.label_enc.weight[old.index(name)])
    assert len(notes) == 1 and '\n' not in notes[0]
    assert all(name in notes[0] for name in set(new) ^ set(old))


def test_same_names_return_the_same_tensors():
    state = small_dino(['a', 'b']).state_dict()
    assert F.map_class_rows(state, ['a', 'b'], ('a', 'b')) == (state, [])


def test_no_object_stays_last():
    old = {'class_embed.weight': torch.arange(8.0).view(4, 2), 'class_embed.bias': torch.arange(4.0)}
    fresh = {'class_embed.weight': -torch.ones(5, 2), 'class_embed.bias': -torch.ones(5)}
    new, _ = F.map_class_rows(old, ['a', 'b', 'c'], ['d', 'c', 'b', 'a'], fresh)
    assert new['class_embed.bias'].tolist() == [-1, 2, 1, 0, 3]
    assert new['class_embed.weight'][4].tolist() == [6, 7]


def test_ids_of_coco_are_those_of_the_data_set():
    names = F.coco_id_names()
    known = {
        1: 'person',
        11: 'fire hydrant',
        13: 'stop sign',
        27: 'backpack',
        44: 'bottle',
        67: 'dining table',
    }
    known |= {70: 'toilet', 72: 'tv', 82: 'refrigerator', 84: 'book', 90: 'toothbrush'}
    assert {i: names[i] for i in known} == known and len(set(names)) == 81
    assert [i for i, n in enumerate(names) if n == 'N/A'] == list(F.COCO_UNUSED)


# --- files -----------------------------------------------------------------------------------
class Evil:
    def __reduce__(self):
        return Path.touch, (Path('evil'),)


def test_a_pickle_that_needs_more_is_refused_and_its_code_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(model=dict(a=torch.zeros(1)), x=Evil()), 'bad.pth')
    with pytest.raises(DataError, match='refused') as error:
        F.read_weights('bad.pth')
    assert 'getattr' in str(error.value) and not Path('evil').exists() and '\n' not in str(error.value)
    args = argparse.Namespace(lr=1e-4)
    torch.save(dict(model=dict(a=torch.zeros(1)), ema_model=dict(a=torch.ones(1)), args=args), 'good.pth')
    assert F.read_weights('good.pth').state['a'] == 0
    assert F.read_weights('good.pth', 'ema_model').state['a'] == 1
    Path('cut.pth').write_bytes(Path('good.pth').read_bytes()[:200])
    for name in ('cut.pth', 'none.pth'):
        with pytest.raises(DataError, match=name):
            F.read_weights(name)


def test_shards_of_transformers_are_read_as_one(tmp_path):
    from safetensors.torch import save_file

    save_file(dict(a=torch.zeros(1)), tmp_path / 'x1.safetensors')
    save_file(dict(b=torch.ones(1)), tmp_path / 'x2.safetensors')
    where = dict(a='x1.safetensors', b='x2.safetensors')
    (tmp_path / 'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=where)))
    (tmp_path / 'config.json').write_text(json.dumps(dict(id2label={'1': 'dog', '0': 'cat'})))
    file = F.read_weights(tmp_path)
    assert sorted(file.state) == ['a', 'b'] and file.classes == ['cat', 'dog']
    (tmp_path / 'x2.safetensors').unlink()
    with pytest.raises(DataError, match='x2.safetensors'):
        F.read_weights(tmp_path)


def test_a_file_of_tensors_is_read_with_the_config_beside_it(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / 'model.safetensors'
    save_file(dict(a=torch.zeros(1)), path)
    for config, read in ((dict(model_type='detr', id2label={'0': 'cat'}), True), (dict(optim={}), False)):
        (tmp_path / 'config.json').write_text(json.dumps(config))
        assert F.read_weights(path).config == (config if read else {})
        assert F.read_weights(path).classes == (['cat'] if read else None)


@pytest.mark.parametrize('name', ['config.json', 'model.safetensors.index.json'])
@pytest.mark.parametrize('text', ['{"weight_map": ', '[1]', '{"weight_map": [1]}', '', '\xff'])
def test_damaged_json_of_a_folder_is_one_line(tmp_path, name, text):
    (tmp_path / 'config.json').write_text('{}')
    (tmp_path / name).write_text(text, encoding='latin-1')
    with pytest.raises(DataError) as e:
        F.read_weights(tmp_path)
    assert '\n' not in str(e.value) and str(tmp_path) in str(e.value)


def test_two_stage_folders_of_transformers_have_as_many_queries_as_proposals():
    config = dict(two_stage=True, with_box_refine=True, num_queries=300, two_stage_num_proposals=100)
    assert W._from_config(config, 'x')['queries'] == 100
    assert W._from_config(config | dict(two_stage=False), 'x')['queries'] == 300


def test_repeated_names_of_rows():
    "They count as rows, and a wanted one is refused"
    head = {'class_embed.bias': torch.arange(4.0)}
    fresh = {'class_embed.bias': torch.full((2,), -9.0)}
    new, _ = F.map_class_rows(head, ['x', 'x', 'b'], ['b'], fresh)
    assert new['class_embed.bias'].tolist() == [2, 3]
    with pytest.raises(DataError, match="'x' has several rows"):
        F.map_class_rows(head, ['x', 'x', 'b'], ['x'], fresh)


@pytest.mark.parametrize('name', ['resnet18', 'resnet50'])
def test_a_backbone_alone_is_sent_where_it_belongs(name):
    import torchvision

    with torch.device('meta'):
        state = getattr(torchvision.models, name)().state_dict()
    with pytest.raises(DataError, match='detector.backbone.weights=r.pth'):
        W.convert(state, origin='r.pth')
