"Use of a trained detector: every kind of image, classes, files of results read back, video"

import csv
import json
import sys
import warnings
from fractions import Fraction
import numpy as np
import pytest
import torch
from PIL import Image
import semidetr
from semidetr.boxes import normalize_boxes
from semidetr.core import ConfigError, DataError
from semidetr.detectors.detector import Detector
from semidetr.train.checkpoint import save_checkpoint
from semidetr.train.config import override, preset, to_dict
from semidetr.train.predict import Predictor, as_sample
from semidetr.train.predict_files import _upright, predict_folder, predict_video, read_formats, to_yolo
from semidetr.train.run_data import resolve
from test_cli import shell  # noqa: F401 (a fixture)
from test_predict import files_in, picture, write_images
from test_trainer import TINY

CLASSES = ['cat', 'dog', 'a, b', *'3456789']
BOXES = torch.tensor([[10.0, 6, 50, 30], [20, 10, 40, 44], [0, 0, 12, 12]])  # pixels of a 60 x 80 image
LABELS, SCORES = [1, 0, 2], [0.9, 0.6, 0.5]


class Three(torch.nn.Module):
    "Predicts BOXES, LABELS and SCORES for whatever it sees"

    def forward(self, images, mask):
        p = torch.full((3, 10), 1e-4)
        p[torch.arange(3), torch.tensor(LABELS)] = torch.tensor(SCORES)
        boxes = normalize_boxes(BOXES, (60, 80))
        return dict(
            pred_logits=p.logit().expand(len(images), -1, -1), pred_boxes=boxes.expand(len(images), -1, -1)
        )


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    cfg = resolve(override(preset('digits'), TINY), CLASSES)
    torch.manual_seed(0)
    weights = Detector(cfg.detector).state_dict()
    folder = tmp_path_factory.mktemp('use') / 'run'
    state = dict(config=to_dict(cfg), classes=CLASSES, student=weights, teacher=weights)
    save_checkpoint(folder / 'last.pt', **state)
    return folder


@pytest.fixture(scope='module')
def model(run):
    return Predictor(run, 'cpu', threshold=0.0)


@pytest.fixture
def oracle(run):
    p = Predictor(run, 'cpu')
    p.model = Three()
    return p


# --- kinds of images -------------------------------------------------------------------
def test_all_kinds_of_one_image_agree(model, tmp_path):
    image = picture(1, (60, 90))
    image.save(tmp_path / 'a.png')
    a = np.array(image)
    t = torch.from_numpy(a).permute(2, 0, 1)
    want = model(tmp_path / 'a.png')
    assert len(want['scores'])
    forms = [str(tmp_path / 'a.png'), image, a, a[:, ::-1][:, ::-1], t]
    forms += [t / 255, t.double() / 255, t.half() / 255]
    for form in forms:
        got = model(form)
        assert torch.equal(got['boxes'], want['boxes']) and torch.equal(got['scores'], want['scores'])
    mixed = model(forms)
    assert len(mixed) == len(forms) and all(
        torch.allclose(m['boxes'], want['boxes'], atol=1e-3) for m in mixed
    )


def test_grey(model):
    grey = picture(2, (48, 48)).convert('L')
    want = model(grey)
    a = np.array(grey)
    for form in (a, a[..., None], torch.from_numpy(a)[None], torch.from_numpy(a)[None] / 255):
        assert torch.equal(model(form)['boxes'], want['boxes'])


def test_batches_of_arrays_and_tensors(model):
    images = [np.array(picture(i, (48, 64))) for i in range(3)]
    want = model(images)
    stack = np.stack(images)
    for form in (stack, tuple(images), torch.from_numpy(stack).permute(0, 3, 1, 2) / 255):
        got = model(form, batch=2)
        assert len(got) == 3
        for g, w in zip(got, want):
            assert torch.allclose(g['boxes'], w['boxes'], atol=1e-3) and g['names'] == w['names']


def test_a_tensor_keeps_its_values_and_its_graph():
    t = torch.rand(3, 8, 8, requires_grad=True)
    before = t.detach().clone()
    as_sample(t)
    assert torch.equal(t.detach(), before) and t.grad is None


@pytest.mark.parametrize(
    'bad,words',
    [
        (torch.full((3, 8, 8), 200.0), r'\[0, 1\]'),
        (torch.full((3, 8, 8), -0.5), 'not normalised'),
        (torch.full((3, 8, 8), torch.nan), r'\[0, 1\]'),
        (torch.zeros(3, 8, 8, dtype=torch.long), 'uint8'),
        (torch.zeros(8, 8, 3), r'\(3, H, W\)'),
        (torch.zeros(8, 8), r'\(3, H, W\)'),
        (torch.zeros(3, 0, 8), 'at least one pixel'),
        (np.zeros((8, 8, 4), np.uint8), r'\(H, W, 3\)'),
        (np.ones((8, 8, 3), np.float32), 'white'),
        (np.zeros((0, 8, 3), np.uint8), 'at least one pixel'),
        (None, 'NoneType is not an image'),
    ],
    ids=range(11),
)
def test_what_is_ambiguous_is_an_error(bad, words):
    with pytest.raises(DataError, match=words):
        as_sample(bad)


def test_folder(model, tmp_path):
    images = [picture(i, (48, 64)) for i in range(3)]
    write_images(tmp_path / 'in' / 'sub', images)
    (tmp_path / 'in' / 'bad.png').write_text('no')
    with pytest.warns(UserWarning, match='bad.png'):
        found = model(tmp_path / 'in', batch=2)
    assert sorted(found) == ['sub/0.jpg', 'sub/1.jpg', 'sub/2.jpg']
    alone = model(tmp_path / 'in' / 'sub' / '1.jpg')
    assert torch.allclose(found['sub/1.jpg']['boxes'], alone['boxes'], atol=1e-3)
    (tmp_path / 'no').mkdir()
    (tmp_path / 'no' / 'bad.png').write_text('no')
    with pytest.raises(DataError, match='bad.png'):
        model(tmp_path / 'no')


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_on_a_gpu(run):
    image = picture(1, (60, 90))
    a, b = Predictor(run, 'cpu', 0.0)(image), Predictor(run, 'cuda', 0.0)
    t = torch.from_numpy(np.array(image)).permute(2, 0, 1).cuda()
    for found in (b(image), b(t)):
        assert found['boxes'].device.type == 'cpu'
        assert torch.allclose(found['scores'][:5], a['scores'][:5], atol=1e-3)


# --- classes ---------------------------------------------------------------------------
def test_classes(run, oracle):
    assert oracle(picture(0, (60, 80)))['names'] == ['dog', 'cat', 'a, b']
    for keep, want in ((['cat'], ['cat']), (['a, b', 'dog'], ['dog', 'a, b']), (['9'], []), ([], None)):
        p = Predictor(run, 'cpu', classes=keep)
        p.model = Three()
        found = p(picture(0, (60, 80)))
        assert found['names'] == (want if want is not None else ['dog', 'cat', 'a, b'])
        assert len(found['boxes']) == len(found['names']) == len(found['scores'])
    with pytest.raises(ConfigError, match="no class 'cta'; did you mean 'cat'"):
        Predictor(run, 'cpu', classes=['cta'])


# --- files -----------------------------------------------------------------------------
def test_every_format_gives_the_boxes_back(oracle, tmp_path):
    source = write_images(tmp_path / 'in', [picture(0, (60, 80)), picture(1, (120, 160))], '.png')
    out = tmp_path / 'out'
    results = predict_folder(oracle, source, out, False, formats=('json', 'csv', 'yolo'))
    labels = ['labels/0.txt', 'labels/1.txt']
    assert files_in(out) == ['classes.txt', 'detections.csv', 'detections.json', *labels]
    for n, scale in ((0, 1), (1, 2)):
        want = BOXES * scale
        rows = [r for r in json.loads((out / 'detections.json').read_text()) if r['image_id'] == f'{n}.png']
        xywh = torch.tensor([r['bbox'] for r in rows])
        assert torch.allclose(torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1), want, atol=0.01)
        with open(out / 'detections.csv', newline='', encoding='utf-8') as f:
            table = [r for r in csv.DictReader(f) if r['file'] == f'{n}.png']
        corners = torch.tensor([[float(r[k]) for k in ('x1', 'y1', 'x2', 'y2')] for r in table])
        assert torch.allclose(corners, want, atol=0.01)
        assert [r['class'] for r in table] == ['dog', 'cat', 'a, b'] and table[0]['frame'] == ''
        assert [int(r['label']) for r in table] == LABELS
        lines = [line.split() for line in (out / 'labels' / f'{n}.txt').read_text().splitlines()]
        yolo = torch.tensor([[float(v) for v in line[1:5]] for line in lines])
        size = torch.tensor([80.0, 60, 80, 60]) * scale
        centre = torch.cat([(want[:, :2] + want[:, 2:]) / 2, want[:, 2:] - want[:, :2]], 1)
        assert torch.allclose(yolo * size, centre, atol=1e-3)
        assert [int(line[0]) for line in lines] == LABELS
        assert [float(line[5]) for line in lines] == pytest.approx(SCORES, abs=1e-4)
    assert (out / 'classes.txt').read_text().splitlines() == CLASSES
    assert set(results.found) == {'0.png', '1.png'} and not results.broken


def test_images_of_one_stem_keep_their_rows(oracle, tmp_path):
    source = tmp_path / 'in'
    write_images(source, [picture(0, (60, 80))], '.jpg')
    write_images(source, [picture(0, (60, 80))], '.png')
    predict_folder(oracle, source, tmp_path / 'out', False, formats=('yolo',))
    assert files_in(tmp_path / 'out') == ['classes.txt', 'labels/0.jpg.txt', 'labels/0.png.txt']


def test_no_detection_in_every_format(run, tmp_path):
    source = write_images(tmp_path / 'in', [picture(0, (60, 80))])
    p = Predictor(run, 'cpu', threshold=1.0)
    predict_folder(p, source, tmp_path / 'out', False, formats=('json', 'csv', 'yolo'))
    assert (tmp_path / 'out' / 'labels' / '0.txt').read_text() == ''
    assert len((tmp_path / 'out' / 'detections.csv').read_text().splitlines()) == 1
    assert json.loads((tmp_path / 'out' / 'detections.json').read_text()) == []
    nothing = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0), scores=torch.zeros(0), names=[])
    assert to_yolo(nothing, (4, 4)) == ''


def test_names_of_formats():
    assert read_formats('csv, JSON') == ('csv', 'json') and read_formats('') == ()
    with pytest.raises(ConfigError, match="'xml' is unknown; known: json, csv, yolo"):
        read_formats('json,xml')


# --- video -----------------------------------------------------------------------------
def make_video(path, n=7, size=(80, 60), times=None):
    av = pytest.importorskip('av')
    with av.open(str(path), 'w') as f:
        stream = f.add_stream('mpeg4', rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, 'yuv420p'
        stream.codec_context.time_base = Fraction(1, 10)
        for i in range(n):
            frame = av.VideoFrame.from_image(Image.new('RGB', size, (30 * i, 90, 120)))
            frame.pts, frame.time_base = (times or range(n))[i], Fraction(1, 10)
            f.mux(stream.encode(frame))
        f.mux(stream.encode(None))
    return path


def read_video(path):
    import av

    with av.open(str(path)) as f:
        return [(round(frame.time, 3), frame.to_image()) for frame in f.decode(video=0)]


def test_video(oracle, tmp_path):
    source = make_video(tmp_path / 'clip.mp4')
    results = predict_video(oracle, source, tmp_path / 'out', batch=3, formats=('json', 'csv', 'yolo'))
    labels = [f'labels/clip_{n:06d}.txt' for n in range(7)]
    files = files_in(tmp_path / 'out')
    assert files == ['classes.txt', 'clip.mp4', 'detections.csv', 'detections.json', *labels]
    rows = json.loads((tmp_path / 'out' / 'detections.json').read_text())
    assert rows == results.rows and len(rows) == 21 and sorted(results.found) == list(range(7))
    assert [r['image_id'] for r in rows[::3]] == [r['frame'] for r in rows[::3]] == list(range(7))
    assert [r['time'] for r in rows[::3]] == pytest.approx([n / 10 for n in range(7)])
    assert rows[0]['file'] == 'clip.mp4' and rows[0]['bbox'] == pytest.approx([10, 6, 40, 24], abs=0.01)
    with open(tmp_path / 'out' / 'detections.csv', newline='') as f:
        table = list(csv.DictReader(f))
    assert [int(r['frame']) for r in table[::3]] == list(range(7)) and table[0]['file'] == 'clip.mp4'
    film, plain = read_video(tmp_path / 'out' / 'clip.mp4'), read_video(source)
    assert [t for t, _ in film] == [t for t, _ in plain]
    changed = np.abs(np.asarray(film[3][1], int) - np.asarray(plain[3][1], int)).max(2) > 60
    ys, xs = np.nonzero(changed)
    assert changed[6:31, 10:12].mean() > 0.5 and not changed[50:, 60:].any()
    assert film[3][1].size == plain[3][1].size and len(ys) == len(xs)


def test_video_with_a_varying_rate_stays_in_step(oracle, tmp_path):
    source = make_video(tmp_path / 'clip.mkv', 5, times=[0, 1, 5, 6, 20])
    predict_video(oracle, source, tmp_path / 'out')
    assert [t for t, _ in read_video(tmp_path / 'out' / 'clip.mp4')] == [0, 0.1, 0.5, 0.6, 2.0]


def test_video_of_odd_size_and_without_a_picture(oracle, tmp_path):
    av = pytest.importorskip('av')
    source = tmp_path / 'clip.avi'
    with av.open(str(source), 'w') as f:
        stream = f.add_stream('ffv1', rate=10)
        stream.width, stream.height, stream.pix_fmt = 81, 61, 'bgr0'
        for i in range(2):
            f.mux(stream.encode(av.VideoFrame.from_image(Image.new('RGB', (81, 61), (90, 90, 90)))))
        f.mux(stream.encode(None))
    predict_video(oracle, source, tmp_path / 'out')
    assert [i.size for _, i in read_video(tmp_path / 'out' / 'clip.mp4')] == [(80, 60)] * 2
    predict_video(oracle, source, tmp_path / 'rows', draw=False, formats=('csv',))
    assert files_in(tmp_path / 'rows') == ['detections.csv']


def test_a_turned_video_is_turned_back():
    class Frame:
        rotation = -90  # a phone held upright

        def to_image(self):
            image = Image.new('RGB', (4, 2))
            image.putpixel((0, 1), (255, 0, 0))  # bottom left
            return image

    image = _upright(Frame())
    assert image.size == (2, 4) and image.getpixel((0, 0)) == (255, 0, 0)  # clockwise: top left


def test_bad_videos(oracle, tmp_path):
    (tmp_path / 'text.mp4').write_text('no video')
    for source, words in ((tmp_path / 'none.mp4', 'no such video'), (tmp_path / 'text.mp4', 'text.mp4')):
        with pytest.raises(DataError, match=words):
            predict_video(oracle, source, tmp_path / 'out')
    clip = make_video(tmp_path / 'clip.mp4')
    before = clip.read_bytes()
    with pytest.raises(ConfigError, match='overwrite'):
        predict_video(oracle, clip, tmp_path)
    assert clip.read_bytes() == before and not (tmp_path / 'out').exists()


def test_a_cut_video_gives_what_can_be_decoded(oracle, tmp_path):
    clip = make_video(tmp_path / 'clip.mkv', 40)
    clip.write_bytes(clip.read_bytes()[:-400])
    results = predict_video(oracle, clip, tmp_path / 'out')
    n = len(results.found)
    assert 0 < n <= 40 and len(read_video(tmp_path / 'out' / 'clip.mp4')) == n


def test_a_failure_leaves_no_half_of_a_video(oracle, tmp_path):
    calls = []
    draw = oracle.draw

    def fail_later(*args):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError('stop')
        return draw(*args)

    oracle.draw = fail_later
    with pytest.raises(RuntimeError):
        predict_video(oracle, make_video(tmp_path / 'clip.mp4'), tmp_path / 'out', batch=2)
    assert files_in(tmp_path / 'out') == []


def test_without_pyav(oracle, tmp_path, monkeypatch):
    (tmp_path / 'clip.mp4').write_bytes(b'')
    monkeypatch.setitem(sys.modules, 'av', None)
    with pytest.raises(ConfigError, match=r"pip install 'semidetr\[video\]'"):
        predict_video(oracle, tmp_path / 'clip.mp4', tmp_path / 'out')


# --- the call and the command ----------------------------------------------------------
def test_predict_of_one_line(run, model, oracle, tmp_path):
    images = [picture(i, (60, 80)) for i in range(2)]
    source = write_images(tmp_path / 'in', images)
    options = dict(threshold=0.0, device='cpu')
    assert torch.equal(semidetr.predict(run, images[0], **options)['boxes'], model(images[0])['boxes'])
    assert len(semidetr.predict(run, images, **options)) == 2
    assert set(semidetr.predict(run, source, **options)) == {'0.jpg', '1.jpg'}
    out = tmp_path / 'out'
    one = semidetr.predict(oracle, source / '0.jpg', out=out, formats=('csv',), draw=False)
    assert one['names'] == ['dog', 'cat', 'a, b'] and files_in(out) == ['detections.csv']
    clip = make_video(tmp_path / 'clip.mp4', 2)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert set(semidetr.predict(oracle, clip, out=tmp_path / 'film')) == {0, 1}
    assert files_in(tmp_path / 'film') == ['clip.mp4', 'detections.json']
    with pytest.raises(ConfigError, match='images in files'):
        semidetr.predict(oracle, images[0], out=out)


def test_a_video_without_out_writes_nothing(oracle, tmp_path, monkeypatch):
    clip = make_video(tmp_path / 'clip.mp4', 3)
    monkeypatch.chdir(tmp_path)
    found = semidetr.predict(oracle, clip)
    assert set(found) == {0, 1, 2} and files_in(tmp_path) == ['clip.mp4']


def test_command(shell, run, tmp_path):  # noqa: F811
    source = write_images(tmp_path / 'in', [picture(i, (60, 80)) for i in range(2)])
    args = ['predict', '--run', run, '--source', source, '-q', '--device', 'cpu', '--threshold', '0']
    more = ['--format', 'csv,yolo', '--no-draw', '--classes', 'cat,dog']
    code, out, _ = shell(*args, '-o', tmp_path / 'a', *more)
    assert code == 0 and 'detections.csv' in out and 'labels' in out
    assert files_in(tmp_path / 'a') == ['classes.txt', 'detections.csv', 'labels/0.txt', 'labels/1.txt']
    with open(tmp_path / 'a' / 'detections.csv', newline='') as f:
        assert {r['class'] for r in csv.DictReader(f)} == {'cat', 'dog'}
    code, _, _ = shell(*args, '-o', tmp_path / 'b', '--classes', 'a, b,', '--no-draw')
    rows = json.loads((tmp_path / 'b' / 'detections.json').read_text())
    assert code == 0 and rows and {r['category'] for r in rows} == {'a, b'}
    for more, words in (
        (['--classes', 'cow'], "no class 'cow'"),
        (['--format', 'xml'], "'xml' is unknown"),
        (['--format', '', '--no-draw'], 'nothing to write'),
    ):
        code, _, err = shell(*args, '-o', tmp_path / 'x', *more)
        assert code == 2 and words in err and err.count('\n') == 1
    assert not (tmp_path / 'x').exists()
    clip = make_video(tmp_path / 'clip.mp4', 3)
    video = ['predict', '--run', run, '-s', clip, '-q', '--threshold', '0', '--device', 'cpu']
    code, out, _ = shell(*video, '-o', tmp_path / 'v', '-f', 'json,csv')
    assert code == 0 and files_in(tmp_path / 'v') == ['clip.mp4', 'detections.csv', 'detections.json']
    code, _, err = shell(*video, '-o', tmp_path / 'w', '--ids', clip)
    assert code == 2 and '--ids' in err
    assert 'lowest score' in shell('predict', '--help')[1]
