"Exported detectors: safetensors, transformers, ONNX and torch programs predict what the run predicts"

import dataclasses
import functools
import json
import os
import subprocess
import sys
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import batched_nms
from semidetr.boxes import cxcywh_to_xyxy
from semidetr.core import ConfigError, DataError
from semidetr.data.catalog import open_dataset

from semidetr.detectors.backbone import BackboneConfig
from semidetr.detectors.contract import build_detector, candidate_scores
from semidetr.detectors.deformable_detr import DeformableDETRConfig, deformable_detr_small
from semidetr.detectors.denoising import DenoisingConfig
from semidetr.detectors.detector import DetectorConfig, detector_small
from semidetr.detectors.detr import DETRConfig, detr_small
from semidetr.detectors.from_detr import DETECTORS
from semidetr.semi.fit import detectors_of
from semidetr.semi.methods import SemiDETR
from semidetr.detectors.transformer import TransformerConfig
from semidetr.train.checkpoint import save_checkpoint
from semidetr.train.config import preset, to_dict
from semidetr.train.export import to_safetensors, to_transformers
from semidetr.train.imports import import_weights
from semidetr.train.onnx import SCRIPT, _record, export_run, to_exported, to_onnx, unmatched
from semidetr.train.predict import Predictor, load_model

CLASSES = ['Zelle', 'größer, "a"', '細胞', 'd']
FORMS = ('plain', 'refine', 'two_stage')


def random_network(settings):
    "A detector whose heads, norms and offsets are far from their initial values"
    torch.manual_seed(0)
    model = build_detector(settings.untrained()).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if any(part in name for part in ('embed', 'head', 'sampling', 'norm', 'enc_output')):
            p.add_(torch.randn_like(p) * 0.05)
    for name, b in model.named_buffers():
        if name.endswith('running_var'):
            b.uniform_(0.5, 1.5)
        if name.endswith('running_mean'):
            b.normal_(0, 0.1)
    return model


def save_run(folder, settings, classes=CLASSES):
    "(network, configuration) of a run that is written to `folder`; the student differs from the teacher"
    model = random_network(settings)
    cfg = dataclasses.replace(preset('digits'), detector=settings)
    student = {k: v + 1 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    content = dict(classes=classes, teacher=model.state_dict(), student=student)
    save_checkpoint(folder / 'last.pt', config=to_dict(cfg), **content)
    return model, cfg


def resnet(form, name='resnet18', **sizes):
    strides = (8, 16) if name == 'resnet18' else (8, 16, 32)
    usual = dict(d_model=32, levels=len(strides) + 1, heads=4, layers=3, ffn=48, num_queries=12)
    return DeformableDETRConfig(4, BackboneConfig(name, out_strides=strides), **usual | sizes, form=form)


def padded(batch, h, w, seed=0):
    "Images and mask; the last image of several is padded at the right and the bottom"
    images = torch.randn(batch, 3, h, w, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(batch, h, w, dtype=torch.bool)
    if batch > 1:
        mask[-1, h * 2 // 3 :] = True
        mask[-1, :, w * 3 // 4 :] = True
        images[-1, :, mask[-1]] = 0
    return images, mask


def outputs(model, images, mask):
    with torch.no_grad():
        found = model(images, mask)
    return candidate_scores(found), found['pred_boxes']


@functools.lru_cache(maxsize=8)
def session_of(path):
    import onnxruntime

    return onnxruntime.InferenceSession(path)


def onnx_outputs(path, images, mask):
    found = session_of(path).run(['scores', 'boxes'], dict(images=images.numpy(), mask=mask.numpy()))
    return [torch.from_numpy(f) for f in found]


LITE0 = BackboneConfig('efficientnet_lite0', out_strides=(8, 16))
TINY = BackboneConfig('timm:test_resnet', 'none', (8, 16))  # 12 convolutions: quick to record
SIZES = dict(d_model=32, n_heads=4, n_levels=3, enc_layers=1, dec_layers=2, ffn=48, num_queries=24)
WAYS = dict(query_content='memory', position_unit='image')  # those of `detector_small`
SMALL = {'dino': DetectorConfig(4, LITE0, TransformerConfig(**SIZES, **WAYS), DenoisingConfig(num=8))}
FEW = dict(d_model=32, heads=4, layers=2, ffn=48, num_queries=24)
for form in FORMS:
    SMALL[form] = dataclasses.replace(deformable_detr_small(4, form), backbone=TINY, **FEW)
SMALL['detr'] = dataclasses.replace(
    detr_small(4), backbone=dataclasses.replace(TINY, out_strides=(8,)), **FEW
)
FIVE = BackboneConfig('timm:test_resnet', 'none', (4, 8, 16, 32))
MORE = SIZES | dict(
    d_model=64, n_levels=5, dec_layers=1
)  # 32 norms of one channel fail on a map of one pixel
SMALL['dino_5scale'] = DetectorConfig(4, FIVE, TransformerConfig(**MORE, **WAYS), DenoisingConfig(num=8))


def detr(name, stride):
    backbone = BackboneConfig(name, out_strides=(stride,))
    return DETRConfig(4, backbone, d_model=48, heads=4, layers=2, enc_layers=1, ffn=40, num_queries=12)


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    "kind -> (network, configuration, folder, ONNX file) of a small detector; each is written once"

    @functools.cache
    def write(kind):
        folder = tmp_path_factory.mktemp(kind)
        model, cfg = save_run(folder, SMALL[kind])
        return model, cfg, folder, to_onnx(folder, folder / 'm.onnx', like=cfg)

    return write


@pytest.fixture(params=SMALL)
def small(request, written):
    return written(request.param)


@pytest.fixture
def dino(written):
    return written('dino')[:3]


@pytest.fixture
def graph(written):
    "ONNX file of the small DINO"
    return written('dino')[3]


# ---------------------------------------------------------------------------------------- safetensors


@pytest.mark.parametrize('which', ['teacher', 'student'])
def test_safetensors_round_trip(dino, tmp_path, which):
    "Bit-identical weights, equal configuration and class names, and no need of the run"
    _, cfg, folder = dino
    path = to_safetensors(folder, tmp_path / 'x.safetensors', which)
    a, a_cfg, a_classes = load_model(folder, which)
    b, b_cfg, b_classes = load_model(path)
    assert a_cfg == b_cfg and a_classes == b_classes == CLASSES
    states = a.state_dict(), b.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(*(s.values() for s in states)))


def test_safetensors_of_detr(tmp_path):
    _, cfg = save_run(tmp_path, SMALL['detr'])
    images, mask = padded(2, 96, 120)
    a, b = (load_model(p)[0] for p in (tmp_path, to_safetensors(tmp_path)))
    assert load_model(tmp_path / 'model.safetensors')[1] == cfg
    assert all(torch.equal(x, y) for x, y in zip(outputs(a, images, mask), outputs(b, images, mask)))


def test_safetensors_metadata_are_readable_by_anyone(dino, tmp_path):
    from safetensors import safe_open

    path = to_safetensors(dino[2], tmp_path / 'x.safetensors')
    with safe_open(path, 'np') as f:
        about = f.metadata()
    assert json.loads(about['classes']) == CLASSES and about['network'] == 'teacher'
    assert json.loads(about['view'])['mean'] == [0.5] * 3 and json.loads(about['view'])['eval_short'] == 96
    assert json.loads(about['config']) == to_dict(dino[1])


def test_predictor_reads_safetensors(dino, tmp_path):
    path = to_safetensors(dino[2], tmp_path / 'x.safetensors')
    image = open_dataset('digits:n=2,size=96', 'val')[0].image
    a, b = (p(image) for p in (Predictor(dino[2], 'cpu', 0.0), Predictor(path, 'cpu', 0.0)))
    assert len(a['scores']) and all(torch.equal(a[k], b[k]) for k in ('boxes', 'scores', 'labels'))


def test_safetensors_that_are_damaged_or_foreign(dino, tmp_path):
    from safetensors.torch import save_file

    path = to_safetensors(dino[2], tmp_path / 'x.safetensors')
    (tmp_path / 'cut.safetensors').write_bytes(path.read_bytes()[:3000])
    save_file({'a': torch.zeros(1)}, tmp_path / 'foreign.safetensors')
    newer = {'semidetr': '99', 'config': '{}', 'classes': '[]'}
    save_file({'a': torch.zeros(1)}, tmp_path / 'newer.safetensors', newer)
    cases = dict(
        cut='not readable', foreign='no configuration of semidetr', newer='upgrade', none='no such file'
    )
    for name, message in cases.items():
        with pytest.raises(DataError, match=message) as e:
            load_model(tmp_path / f'{name}.safetensors')
        assert name in str(e.value) and '\n' not in str(e.value)


# --------------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize(
    'name, form', [('resnet18', 'plain'), ('resnet18', 'refine'), ('resnet50', 'two_stage')]
)
def test_transformers_predicts_the_same(tmp_path, monkeypatch, name, form):
    "from_pretrained misses nothing; logits and boxes of a padded batch agree"
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    library = pytest.importorskip('transformers')
    model, cfg = save_run(tmp_path, resnet(form, name))
    out = to_transformers(tmp_path, like=cfg)
    theirs, info = library.DeformableDetrForObjectDetection.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    images, mask = padded(2, 128, 160)
    with torch.no_grad():
        a, b = model(images, mask), theirs.eval()(pixel_values=images, pixel_mask=(~mask).long())
    assert (a['pred_logits'] - b.logits).abs().max() < 1e-4
    assert (a['pred_boxes'] - b.pred_boxes).abs().max() < 1e-4
    assert float(a['pred_logits'].std()) > 0.05
    assert list(theirs.config.id2label.values()) == CLASSES


@pytest.mark.parametrize('name, stride', [('resnet18', 32), ('resnet50', 16), ('resnet50_dc5', 16)])
def test_transformers_predicts_the_same_as_detr(tmp_path, monkeypatch, name, stride):
    """A width that is no multiple of 32, other depths of encoder and decoder, and a dilated backbone

    The import of the folder gives the same tensors, settings and classes."""
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    library = pytest.importorskip('transformers')
    model, cfg = save_run(tmp_path, detr(name, stride))
    out = to_transformers(tmp_path, like=cfg)
    theirs, info = library.DetrForObjectDetection.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    images, mask = padded(2, 128, 160)
    with torch.no_grad():
        a, b = model(images, mask), theirs.eval()(pixel_values=images, pixel_mask=(~mask).long())
    assert a['pred_logits'].shape == b.logits.shape == (2, 12, 5)
    assert (a['pred_logits'] - b.logits).abs().max() < 1e-4
    assert (a['pred_boxes'] - b.pred_boxes).abs().max() < 1e-4
    assert float(a['pred_logits'].std()) > 0.05
    assert list(theirs.config.id2label.values()) == CLASSES
    processor = library.AutoImageProcessor.from_pretrained(out)
    assert dict(processor.size)['shortest_edge'] == cfg.view.eval_short
    report = import_weights(out, tmp_path / 'back')
    again, again_cfg, classes = load_model(tmp_path / 'back')
    assert report.kind == 'hf_detr' and report.count('unused') == 0 and classes == CLASSES
    assert (again_cfg.detector.backbone.name, again_cfg.detector.backbone.out_strides) == (name, (stride,))
    assert all(torch.equal(t, model.state_dict()[k]) for k, t in again.state_dict().items())


def test_transformers_processor_sees_what_we_see(tmp_path, monkeypatch):
    "The same size of the view, nearly the same pixels"
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    library = pytest.importorskip('transformers')
    from semidetr.data.augment import eval_view
    from semidetr.train.predict import as_sample

    _, cfg = save_run(tmp_path, resnet('plain'))
    processor = library.AutoImageProcessor.from_pretrained(to_transformers(tmp_path, like=cfg))
    image = open_dataset('digits:n=2,size=120', 'val')[0].image
    theirs = processor(image, return_tensors='pt')['pixel_values'][0]
    ours = eval_view(as_sample(image), cfg.view).image
    assert theirs.shape == ours.shape and (theirs - ours).abs().mean() < 0.01


def test_transformers_refuses_what_would_change(tmp_path):
    cases = {
        'no class for this DINO': detector_small(4),
        'drops activation and epsilon': deformable_detr_small(4),
        'multiple of 32': resnet('plain', d_model=40),
        'drops activation': detr_small(4),
        'no dilated backbone': DeformableDETRConfig(
            4, BackboneConfig('resnet50_dc5', out_strides=(16,)), 32, 1
        ),
    }
    for number, (message, settings) in enumerate(cases.items()):
        _, cfg = save_run(tmp_path / str(number), settings)
        with pytest.raises(ConfigError, match=message) as e:
            to_transformers(tmp_path / str(number), like=cfg)
        text = str(e.value)
        assert 'onnx, torch or safetensors' in text and '\n' not in text
        assert not (tmp_path / str(number) / 'transformers').exists()


# ----------------------------------------------------------------------------------------------- ONNX


def test_every_detector_is_written():
    "One of each name, told apart by class, form and number of scales"

    def kind(cfg):
        five = len(cfg.backbone.out_strides) == 4
        return type(cfg), getattr(cfg, 'form', None), five

    names = detectors_of(SemiDETR)  # detection transformers
    assert {kind(cfg) for cfg in SMALL.values()} == {kind(DETECTORS[n].small(4)) for n in names}
    assert len(SMALL) == len(names)


def test_onnx_agrees_at_any_size_and_batch(small):
    "Also smaller than the number of queries, and with padding"
    model, _, _, path = small
    for batch, h, w in ((1, 160, 192), (4, 160, 192), (1, 97, 231), (4, 97, 231), (1, 33, 47)):
        images, mask = padded(batch, h, w, seed=h)
        wanted, got = outputs(model, images, mask), onnx_outputs(path, images, mask)
        assert [g.shape for g in got] == [x.shape for x in wanted]
        assert unmatched(wanted, got) <= 0.01 and unmatched(got, wanted) <= 0.01
        assert (wanted[0].sort(1).values - got[0].sort(1).values).abs().max() < 1e-3


@pytest.mark.parametrize('form', [*FORMS, 'detr'])
def test_recording_leaves_the_network_as_it_was(form):
    "Weights, modes and outputs, of networks with dropout"
    model = random_network(detr('resnet18', 32) if form == 'detr' else resnet(form, layers=1))
    images, mask = padded(2, 96, 120)
    before = outputs(model, images, mask)
    _record(model, None, 17)
    assert not any(m.training for m in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(model, images, mask)))


def test_onnx_on_images(small):
    "The same detections as the run, one by one and in lists of mixed sizes"
    model, cfg, folder, path = small
    scenes = open_dataset('digits:n=3,size=96', 'val')
    images = [scenes[0].image, scenes[1].image.resize((150, 96)), scenes[2].image]
    ours = Predictor(folder, 'cpu', threshold=0.0, like=cfg)
    theirs = Predictor(path, "cpu", 0.0)
    for a, b in zip(ours(images), theirs(images)):
        assert len(a['scores']) == len(b['scores']) > 0
        assert (a['scores'] - b['scores']).abs().max() < 1e-3
    assert theirs(np.asarray(images[0]))['names'] == theirs(images[0])['names']
    assert theirs.classes == CLASSES and set(theirs(images[0])['names']) <= set(CLASSES)
    assert theirs.draw(images[0]).size == images[0].size


@pytest.mark.parametrize('iou, opset', [(0.05, 17), (0.3, 20)])
def test_suppression_inside_equals_suppression_outside(written, tmp_path, iou, opset):
    "Oracle: torchvision's suppression of each image, by class; in the first and last opset"
    import onnx

    _, cfg, folder, graph = written('plain')
    inside = to_onnx(folder, tmp_path / 'b.onnx', nms=iou, opset=opset, like=cfg)
    assert onnx.load(inside).opset_import[0].version == opset
    images, mask = padded(3, 128, 128)
    scores, boxes = onnx_outputs(graph, images, mask)
    kept_scores, same_boxes = onnx_outputs(inside, images, mask)
    assert torch.equal(boxes, same_boxes)
    for s, b, k in zip(scores, boxes, kept_scores):
        corners = cxcywh_to_xyxy(b).clamp(0, 1)
        queries, classes = torch.arange(s.numel()) // s.shape[1], torch.arange(s.numel()) % s.shape[1]
        keep = batched_nms(corners[queries], s.flatten(), classes, iou)
        wanted = torch.zeros(s.numel())
        wanted[keep] = s.flatten()[keep]
        assert torch.equal(wanted.view(s.shape), k)
    assert 0 < (kept_scores > 0).sum() < scores.numel()


def test_onnx_metadata_and_inputs(small):
    import onnx

    _, cfg, _, path = small
    proto = onnx.load(path)
    about = {p.key: p.value for p in proto.metadata_props}
    assert json.loads(about['classes']) == CLASSES and json.loads(about['config']) == to_dict(cfg)
    assert [i.name for i in proto.graph.input] == ['images', 'mask']
    assert [o.name for o in proto.graph.output] == ['scores', 'boxes']
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == 'batch'
    onnx.checker.check_model(proto)


def test_ten_lines_without_the_package(dino, graph, tmp_path):
    "The printed boxes are those of the run; the file is rotated by its EXIF tag"
    photo = tmp_path / 'photo.jpg'
    exif = Image.Exif()
    exif[274] = 6
    open_dataset('digits:n=2,size=96', 'val')[0].image.resize((192, 128)).save(photo, exif=exif, quality=95)
    (tmp_path / 'detect.py').write_text(SCRIPT)
    ours = Predictor(dino[2], 'cpu', threshold=0.0)(photo)
    middle = float(ours['scores'][:6].mean())
    command = [sys.executable, '-I', 'detect.py', graph, photo, str(middle)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'semidetr' not in SCRIPT
    rows = [line.rsplit(' ', 5) for line in done.stdout.splitlines()]
    assert rows and {r[0] for r in rows} <= set(CLASSES)
    best = max(rows, key=lambda r: float(r[1]))
    assert abs(float(best[1]) - float(ours['scores'][0])) < 0.02
    near = (ours['boxes'] - torch.tensor([float(x) for x in best[2:]])).abs().amax(1)
    assert near.min() < 3


def test_a_wrong_graph_is_not_written(dino, tmp_path, monkeypatch):
    "A size that becomes a constant is noticed"
    from semidetr.train import onnx as module

    monkeypatch.setattr(module, '_same_padding', lambda size, k, s: ((k - 1) // 2, (k - 1) // 2 + 2))
    with pytest.raises(ConfigError, match='not written') as e:
        to_onnx(dino[2], tmp_path / 'm.onnx')
    assert '\n' not in str(e.value) and not (tmp_path / 'm.onnx').exists()


def test_onnx_refusals(dino, graph, tmp_path):
    path = graph
    with pytest.raises(ConfigError, match='exported already'):
        to_onnx(path, tmp_path / 'n.onnx')
    with pytest.raises(ConfigError, match='opset=9'):
        to_onnx(dino[2], tmp_path / 'n.onnx', opset=9)
    with pytest.raises(ConfigError, match='outside'):
        to_onnx(dino[2], tmp_path / 'n.onnx', nms=1.5)
    with pytest.raises(DataError, match='no such file'):
        Predictor(tmp_path / 'gone.onnx')
    (tmp_path / 'cut.onnx').write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match='cannot read it'):
        Predictor(tmp_path / 'cut.onnx')
    with pytest.raises(ConfigError, match='outside'):
        Predictor(path, threshold=2)


def test_foreign_onnx(tmp_path):
    import onnx

    shape = onnx.helper.make_tensor_value_info('x', onnx.TensorProto.FLOAT, [1])
    out = onnx.helper.make_tensor_value_info('y', onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node('Relu', ['x'], ['y'])], 'g', [shape], [out])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid('', 17)], ir_version=8)
    onnx.save(model, tmp_path / 'other.onnx')
    with pytest.raises(DataError, match='no class names'):
        Predictor(tmp_path / 'other.onnx')


@pytest.mark.parametrize('kind', ['dino', 'two_stage', 'detr'])
def test_onnx_on_real_images(written, kind):
    "Twenty photos of blood cells; the weights are random"
    data = os.environ.get('SEMIDETR_DATA')
    if not data:
        pytest.skip('set SEMIDETR_DATA to the folder with txl_pbc')
    photos = open_dataset(f'{data}/txl_pbc', 'val')
    _, cfg, folder, path = written(kind)
    ours, theirs = Predictor(folder, 'cpu', 0.0, like=cfg), Predictor(path, 'cpu', 0.0)
    images = [photos[i].image for i in range(20)]
    for a, b in zip(ours(images, batch=4), theirs(images, batch=4)):
        assert (a['scores'] - b['scores']).abs().max() < 1e-3
        assert (a['boxes'][0] - b['boxes'][0]).abs().max() < 1


# ----------------------------------------------------------------------------- torch, and all formats


def test_torch_programs(written, tmp_path):
    "For batches of any size, or of one; they run in a process that does not import this package"
    batches = [padded(2, 96, 128), padded(1, 128, 96), padded(3, 64, 160)]
    torch.save(batches, tmp_path / 'in.pt')
    kinds = dict(plain=None, detr=None, dino=(2, 96, 128))
    for kind, size in kinds.items():
        _, cfg, folder, _ = written(kind)
        path = to_exported(folder, tmp_path / f'{kind}.pt2', like=cfg, size=size)
        with pytest.raises(ConfigError, match='torch.export.load'):
            Predictor(path)
    code = (
        'import sys, torch\n'
        'batches = torch.load("in.pt")\n'
        'for kind in sys.argv[1:]:\n'
        '    files = {"classes.json": ""}\n'
        '    net = torch.export.load(f"{kind}.pt2", extra_files=files).module()\n'
        '    found = [list(net(*b)) for b in batches[: 1 if kind == "dino" else 3]]\n'
        '    torch.save([found, files["classes.json"]], f"{kind}.pt")\n'
        'assert not any(m.startswith("semidetr") for m in sys.modules)\n'
    )
    command = [sys.executable, '-c', code, *kinds]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-800:]
    for kind in kinds:
        got, classes = torch.load(tmp_path / f'{kind}.pt', weights_only=False)
        assert json.loads(classes) == CLASSES
        assert len(got) == (1 if kind == 'dino' else 3)
        for (images, mask), found in zip(batches, got):
            assert unmatched(outputs(written(kind)[0], images, mask), found) <= 0.01


def test_export_run_writes_each_format(tmp_path):
    "Under its usual name or where it is told to, and over what is there only if that is said"
    _, cfg = save_run(tmp_path, resnet('two_stage', layers=1))
    for format in ('safetensors', 'transformers'):
        assert export_run(tmp_path, format, tmp_path / 'sub' / format, like=cfg).exists()
    for format, name in dict(onnx='model.onnx', safetensors='model.safetensors').items():
        (tmp_path / name).write_text('old')
        with pytest.raises(ConfigError, match='exists already') as e:
            export_run(tmp_path / 'last.pt', format, like=cfg)
        assert name in str(e.value) and (tmp_path / name).read_text() == 'old'
        assert export_run(tmp_path, format, like=cfg, overwrite=True) == tmp_path / name
        assert (tmp_path / name).stat().st_size > 1000
    assert export_run(tmp_path, 'transformers', like=cfg) == tmp_path / 'transformers'
    with pytest.raises(ConfigError, match='exists already'):
        export_run(tmp_path, 'transformers', like=cfg)
    assert export_run(tmp_path, 'transformers', like=cfg, overwrite=True).is_dir()
    with pytest.raises(ConfigError, match="did you mean 'onnx'"):
        export_run(tmp_path, 'onx')
    with pytest.raises(ConfigError, match='onnx only'):
        export_run(tmp_path, 'safetensors', nms=0.5)
    with pytest.raises(DataError, match='no checkpoint'):
        export_run(tmp_path / 'nothing', 'onnx')


@pytest.mark.parametrize('missing, format', [('onnx', 'onnx'), ('safetensors.torch', 'safetensors')])
def test_a_missing_library_is_named(dino, tmp_path, monkeypatch, missing, format):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=r"pip install 'semidetr\[export\]'") as e:
        export_run(dino[2], format, tmp_path / 'x')
    assert '\n' not in str(e.value) and not (tmp_path / 'x').exists()


def test_a_missing_onnxruntime_is_named(graph, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(ConfigError, match='onnxruntime'):
        Predictor(graph)
