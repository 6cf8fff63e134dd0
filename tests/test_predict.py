"Prediction: pixels of the file, batches that change nothing, COCO results, folders with broken files"

import contextlib
import io
import json
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from semidetr.boxes import box_iou, normalize_boxes
from semidetr.train.checkpoint import load_checkpoint, save_checkpoint
from semidetr.train.config import override, preset, to_dict
from semidetr.core import ConfigError, DataError
from semidetr.data.catalog import open_dataset
from semidetr.data.datasets import ImageFolder
from semidetr.detectors.detector import Detector
from semidetr.train.evaluation import detect
from semidetr.train.predict import Predictor, as_sample, load_model
from semidetr.train.predict_files import predict_folder, to_coco
from semidetr.train.run_data import resolve
from test_trainer import TINY

SIZES = [(96, 96), (60, 200), (96, 96), (130, 70), (60, 200)]  # (H, W)


def picture(seed, size):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[0] // 8, size[1] // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size[::-1])


@pytest.fixture(scope='module')
def images():
    return [picture(i, s) for i, s in enumerate(SIZES)]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A checkpoint whose two networks differ; the file with the backbone weights does not exist"
    cfg = resolve(override(preset('digits'), TINY), list('0123456789'))
    torch.manual_seed(0)
    networks = [Detector(cfg.detector).state_dict() for _ in range(2)]
    folder = tmp_path_factory.mktemp('predict') / 'run'
    save_checkpoint(
        folder / 'last.pt',
        config=to_dict(override(cfg, ['detector.backbone.weights=gone/weights.pth'])),
        classes=list('0123456789'),
        student=networks[0],
        teacher=networks[1],
    )
    return folder


@pytest.fixture(scope='module')
def model(run):
    return Predictor(run, 'cpu', threshold=0.0)


class Oracle(torch.nn.Module):
    "Predicts given boxes (fractions of the image), class 3, one score each"

    def __init__(self, cxcywh, scores):
        super().__init__()
        self.boxes, self.scores = cxcywh, scores

    def forward(self, images, mask):
        p = torch.full((len(images), len(self.boxes), 10), 1e-4)
        p[..., 3] = torch.tensor(self.scores)
        return dict(pred_logits=p.logit(), pred_boxes=self.boxes.expand(len(images), -1, -1))


def with_oracle(run, cxcywh, scores, **kwargs):
    p = Predictor(run, 'cpu', **kwargs)
    p.model = Oracle(torch.as_tensor(cxcywh), scores)
    return p


def test_boxes_are_pixels_of_the_file(run):
    "x with the width, y with the height, whatever the view's size"
    truth = torch.tensor([[20.0, 6, 120, 30]])
    for h, w in ((60, 200), (600, 2000), (200, 160)):
        p = with_oracle(run, normalize_boxes(truth, (h, w)), [0.9])
        found = p(picture(0, (h, w)))
        assert torch.allclose(found['boxes'], truth, atol=1e-3)
        assert found['names'] == ['3'] and found['labels'].tolist() == [3]


def test_threshold_and_suppression(run):
    two = [[0.5, 0.5, 0.4, 0.4], [0.52, 0.5, 0.4, 0.4], [0.2, 0.2, 0.1, 0.1]]

    def scores(**kwargs):
        return with_oracle(run, two, [0.9, 0.6, 0.2], **kwargs)(picture(0, (96, 96)))['scores'].tolist()

    assert scores() == pytest.approx([0.9, 0.6])
    assert scores(threshold=0.7) == pytest.approx([0.9])
    assert scores(threshold=0.95) == []
    assert scores(nms=0.0) == scores(), 'as on the command line'
    assert scores(threshold=0.1, nms=0.5) == pytest.approx([0.9, 0.2])
    assert scores(threshold=0.1, nms=1.0) == pytest.approx([0.9, 0.6, 0.2])
    for bad in (dict(threshold=1.5), dict(threshold=-0.1), dict(nms=-0.1), dict(nms=2.0)):
        with pytest.raises(ConfigError, match='outside'):
            Predictor(run, 'cpu', **bad)


def test_batches_equal_single_images(model, images):
    alone = [model(i) for i in images]
    for together in (model(images), model(images, batch=1), list(reversed(model(images[::-1], batch=2)))):
        for a, b in zip(alone, together):
            assert len(a['scores']) and a['names'] == b['names']
            for k in ('boxes', 'scores'):
                assert torch.allclose(a[k], b[k], atol=1e-4)
    assert model([]) == []


def test_agrees_with_evaluation(model, images, tmp_path):
    "What `eval` measures is what `predict` shows"
    for n in (0, 2):
        images[n].save(tmp_path / f'{n}.png')
    found = detect(model.model, ImageFolder(tmp_path), model.cfg.view)
    for n in (0, 2):
        a, b = found[f'{n}.png'], model(tmp_path / f'{n}.png')
        assert torch.allclose(a['boxes'], b['boxes'], atol=1e-3) and torch.equal(a['labels'], b['labels'])


def test_detections_are_inside_and_sorted(model, images):
    for image, d in zip(images, model(images)):
        assert (d['boxes'] >= 0).all() and (d['boxes'] <= torch.tensor(image.size * 2)).all()
        assert (d['scores'].diff() <= 0).all()
    thin = Predictor.__new__(Predictor)
    thin.__dict__ = {**model.__dict__, 'nms': 0.3}
    for d in thin(images):
        overlap = box_iou(d['boxes'], d['boxes']).fill_diagonal_(0)
        assert overlap[d['labels'][:, None] == d['labels']].max() <= 0.3 + 1e-5


def test_both_networks(run, images):
    a, b = (Predictor(run, 'cpu', 0.0, which=w)(images[0])['scores'] for w in ('teacher', 'student'))
    assert not torch.allclose(a, b)
    for w in ('teacher', 'student'):
        loaded = load_model(run, w)[0].state_dict()
        assert all(torch.equal(v, loaded[k]) for k, v in load_checkpoint(run)[w].items())
    with pytest.raises(ConfigError, match='student, teacher'):
        Predictor(run, 'cpu', which='master')


def test_broken_checkpoints_are_named(run, tmp_path):
    state = load_checkpoint(run)
    (tmp_path / 'empty.pt').write_bytes(b'')
    with pytest.raises(DataError, match='empty.pt'):
        load_checkpoint(tmp_path / 'empty.pt')
    for name, content, words in (
        ('part', dict(step=1), "holds no 'config'"),
        ('other', {**state, 'config': {**state['config'], 'magic': 1}}, "magic.*another version"),
        ('thin', {**state, 'teacher': {}}, 'missing'),
    ):
        save_checkpoint(tmp_path / f'{name}.pt', **{k: v for k, v in content.items() if k != 'format'})
        with pytest.raises(DataError, match=words) as e:
            Predictor(tmp_path / f'{name}.pt', 'cpu')
        assert name in str(e.value)
    (tmp_path / 'cut.pt').write_bytes((run / 'last.pt').read_bytes()[:5000])
    with pytest.raises(DataError, match='cut.pt.*damaged'):
        load_model(tmp_path / 'cut.pt')
    with pytest.raises(DataError, match='no checkpoint'):
        load_model(tmp_path)


def test_every_kind_of_image(model, tmp_path):
    image = picture(3, (60, 90))
    image.save(tmp_path / 'a.png')
    forms = tmp_path / 'a.png', str(tmp_path / 'a.png'), image, np.asarray(image)
    boxes = [model(form)['boxes'] for form in forms]
    assert all(torch.equal(boxes[0], b) for b in boxes)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / 'turned.jpg', exif=exif)
    Image.fromarray(np.full((40, 50), 30000, np.uint16)).save(tmp_path / 'deep.png')
    image.convert('RGBA').save(tmp_path / 'alpha.png')
    assert as_sample(tmp_path / 'turned.jpg').size == (90, 60)
    assert as_sample(tmp_path / 'alpha.png').image.mode == 'RGB'
    assert 100 < np.asarray(as_sample(tmp_path / 'deep.png').image).mean() < 130


def test_what_is_no_image(tmp_path):
    (tmp_path / 'a.txt').write_text('no')
    for bad, words in (
        (tmp_path / 'none.jpg', 'none.jpg.*no such file'),
        (tmp_path / 'a.txt', 'a.txt'),
        (np.zeros((4, 4, 3)), 'uint8'),
        (np.zeros((3, 4, 4), np.uint8), 'H, W, 3'),
        (7, 'int is not an image'),
    ):
        with pytest.raises(DataError, match=words):
            as_sample(bad)


def write_images(folder, images, suffix='.jpg'):
    folder.mkdir(parents=True, exist_ok=True)
    for n, i in enumerate(images):
        i.save(folder / f'{n}{suffix}')
    return folder


def files_in(folder):
    "Names of the files in a folder and below it"
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file())


def load_results(truth, results):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        return coco.loadRes(results)


def test_folder(model, images, tmp_path):
    "Pictures of the right size in the tree of the source; results that pycocotools loads; no other file"
    source = write_images(tmp_path / 'in', images[:2])
    write_images(source / 'sub', images[2:])
    out = tmp_path / 'out'
    found = predict_folder(model, source, out)
    results, broken = found.rows, found.broken
    assert files_in(out) == ['0.png', '1.png', 'detections.json', 'sub/0.png', 'sub/1.png', 'sub/2.png']
    assert not broken
    assert json.loads((out / 'detections.json').read_text()) == results
    drawn = np.asarray(Image.open(out / '1.png'), int)
    plain = np.asarray(Image.open(source / '1.jpg'), int)
    assert drawn.shape == plain.shape and np.abs(drawn - plain).max() > 50
    files = {r['image_id'] for r in results}
    assert files == {'0.jpg', '1.jpg', 'sub/0.jpg', 'sub/1.jpg', 'sub/2.jpg'}
    categories = [dict(id=n + 1, name=str(n)) for n in range(10)]
    truth = dict(info={}, images=[dict(id=f) for f in files], categories=categories, annotations=[])
    assert len(load_results(truth, results).anns) == len(results)
    assert all(r['category'] == str(r['category_id'] - 1) for r in results)
    alone = model(source / '1.jpg')
    rows = [r for r in results if r['image_id'] == '1.jpg']
    xywh = torch.tensor([r['bbox'] for r in rows])
    assert torch.allclose(torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1), alone['boxes'], atol=0.02)
    assert [r['score'] for r in rows] == pytest.approx(alone['scores'].tolist(), abs=1e-4)


def test_ids_of_an_annotation_file(model, images, tmp_path):
    source = write_images(tmp_path / 'in', images[:2])
    cats = [dict(id=90 - n, name=str(n)) for n in range(10)]
    rows = [dict(id=70 + n, file_name=f'{n}.jpg', height=h, width=w) for n, (h, w) in enumerate(SIZES[:2])]
    truth = dict(info={}, images=rows, annotations=[], categories=cats)
    (tmp_path / 't.json').write_text(json.dumps(truth))
    results = predict_folder(model, source, tmp_path / 'out', False, tmp_path / 't.json').rows
    assert {r['image_id'] for r in results} == {70, 71}
    assert all(r['category_id'] == 90 - int(r['category']) for r in results)
    assert len(load_results(truth, results).anns) == len(results)
    assert files_in(tmp_path / 'out') == ['detections.json']
    for change, words in (
        (dict(images=truth['images'][:1]), '1.jpg'),
        (dict(categories=cats[:-1]), "class '9'"),
    ):
        (tmp_path / 't.json').write_text(json.dumps({**truth, **change}))
        with pytest.raises(DataError, match=words):
            predict_folder(model, source, tmp_path / 'new', ids=tmp_path / 't.json')
    assert not (tmp_path / 'new').exists()


def test_broken_images_are_left_out(model, images, tmp_path):
    source = write_images(tmp_path / 'in', images)
    (source / '0.jpg').write_bytes((source / '0.jpg').read_bytes()[:600])
    (source / '3.jpg').write_bytes(b'')
    found = predict_folder(model, source, tmp_path / 'out', batch=2)
    results, broken = found.rows, found.broken
    assert files_in(tmp_path / 'out') == ['1.png', '2.png', '4.png', 'detections.json']
    assert len(broken) == 2 and '0.jpg' in broken[0] and '3.jpg' in broken[1]
    assert {r['image_id'] for r in results} == {'1.jpg', '2.jpg', '4.jpg'}
    for n in (1, 2, 4):
        (source / f'{n}.jpg').unlink()
    with pytest.raises(DataError, match='0.jpg.*1 more'):
        predict_folder(model, source, tmp_path / 'none')
    with pytest.raises(DataError, match='0.jpg'):
        predict_folder(model, source / '0.jpg', tmp_path / 'none')
    assert not (tmp_path / 'none').exists()


def test_output_beside_and_inside_the_source(model, images, tmp_path):
    "Pictures in the output folder are not used as sources, and none is written over a source"
    source = write_images(tmp_path / 'in', images[:2])
    first = predict_folder(model, source, source / 'out').rows
    again = predict_folder(model, source, source / 'out').rows
    assert first == again and {r['image_id'] for r in again} == {'0.jpg', '1.jpg'}
    one = tmp_path / 'one'
    one.mkdir()
    images[0].save(one / 'a.png')
    before = (one / 'a.png').read_bytes()
    for s in (one, one / 'a.png'):
        with pytest.raises(ConfigError, match='overwrite'):
            predict_folder(model, s, one)
    assert (one / 'a.png').read_bytes() == before and files_in(one) == ['a.png']
    images[1].save(one / 'a.jpg')
    predict_folder(model, one, tmp_path / 'twins')
    assert files_in(tmp_path / 'twins') == ['a.jpg.png', 'a.png.png', 'detections.json']
    with pytest.raises(DataError, match='no such'):
        predict_folder(model, tmp_path / 'nowhere', tmp_path / 'x')
    (tmp_path / 'bare').mkdir()
    with pytest.raises(DataError, match='no image'):
        predict_folder(model, tmp_path / 'bare', tmp_path / 'x')


def test_no_detection_is_an_empty_list(run, images, tmp_path):
    p = Predictor(run, 'cpu', threshold=0.99)
    found = p(images[0])
    assert found['boxes'].shape == (0, 4) and found['names'] == [] and to_coco(found, 'x') == []
    assert p.draw(images[0]).size == images[0].size
    images[0].save(tmp_path / 'a.png')
    results = predict_folder(p, tmp_path / 'a.png', tmp_path / 'out')
    assert (results.rows, results.broken) == ([], [])
    assert json.loads((tmp_path / 'out' / 'detections.json').read_text()) == []


def test_detections_of_a_trained_detector_score(tmp_path):
    "End to end: overfit two scenes, and find their digits"
    from semidetr.train.trainer import Trainer

    cfg = override(
        preset('digits'),
        [
            'data.data=digits:n=2,size=64',
            'data.dev=0',
            'data.count=0',
            'method.name=supervised',
            'run.test=false',
            'view.short_sides=[64]',
            'view.eval_short=64',
            'view.flip=0',
            'optim.iters=120',
            'optim.lr=2e-3',
            'loader.n_labelled=2',
            'loader.num_workers=0',
            'optim.schedule=cosine',
            'detector.transformer.num_queries=30',
            'ema.decay=.9',
        ],
    )
    Trainer(cfg, tmp_path / 'r', progress=False).fit()
    p, ds = Predictor(tmp_path / 'r', 'cpu', threshold=0.3), open_dataset('digits:n=2,size=64', 'train')
    hits = total = 0
    for s in ds:
        d = p(s.image)
        ok = (box_iou(d['boxes'], s.boxes) > 0.5) & (d['labels'][:, None] == s.labels)
        hits, total = hits + int(ok.any(0).sum()), total + len(s.labels)
    assert hits >= 0.8 * total
