"Data that could be read in two ways: each has the right reading with a note, or is refused in one line"

import struct, zlib
import numpy as np, pytest
from PIL import Image
from test_situations_formats import BOXES, H, W, coco, picture, right, row, voc, yolo
from semidetr.core import DataError
from semidetr.data import catalog, checks, files
from semidetr.data.catalog import open_dataset
from semidetr.data.checks import check_images
from semidetr.data.datasets import CocoDataset
from semidetr.data.doctor import check_dataset
from semidetr.data.files import load_image, pixel_depth, read_folder, to_rgb
from semidetr.data.formats import resolve_names
from semidetr.data.yolo import yolo_kind
from semidetr.train.predict import as_sample


def refusal(root):
    with pytest.raises(DataError) as e:
        open_dataset(str(root))
    assert len(str(e.value).splitlines()) == 1
    return str(e.value)


# --- YOLO lines --------------------------------------------------------------------------------------------
def test_a_class_given_as_a_word_is_a_label_not_a_position(tmp_path):
    rows = [row(n, b).replace(str(n), name, 1) for n, b, name in zip((0, 1), BOXES, ('dog', 'cat'))]
    ds = open_dataset(str(yolo(tmp_path / 'a', rows, names='{1: cat, 2: dog}')))
    assert [ds.classes[c] for c in ds.annotation(0)['labels']] == ['dog', 'cat']
    yolo(tmp_path / 'b', rows, names='{0: dog, 1: cat, 2: dog}')
    assert "line 1: two labels have the name 'dog'" in refusal(tmp_path / 'b')


def test_boxes_with_confidence_and_the_track_ids_0_and_1(tmp_path):
    extra = [(0.8, 0), (0.9, 1)]
    rows = [row(n, b, *e) for n, (b, e) in enumerate(zip(BOXES, extra))]
    assert 'box with confidence and track id or a triangle' in refusal(yolo(tmp_path / 'a', rows))
    for n, other in enumerate((row(1, BOXES[1], 80, 1), row(1, BOXES[1], 0.9))):  # in percent; no id
        ds = right(open_dataset(str(yolo(tmp_path / f'b{n}', [rows[0], other]))))
        assert any('2 lines hold more than a box' in note for note in ds.notes)


def test_triangles_on_the_border_stay_polygons():
    outside = [0.1, 0.1, 0.4, 0.2, 0.9, 1]  # as a box it leaves the image
    assert yolo_kind([outside])(outside) == 'polygon'
    inside, longer = [0.5, 0.5, 0.2, 0.2, 0.9, 1], [0.1, 0.1, 0.9, 0.1, 0.9, 0.9, 0.1, 0.9]
    assert yolo_kind([inside, longer])(inside) == 'polygon'
    assert 'triangle' in yolo_kind([inside])(inside)


POINTS = np.random.RandomState(0).uniform(0.45, 0.55, (17, 2))
BOX = [0.5, 0.5, 0.2, 0.2]
POSES = {
    '2d': [*BOX, *POINTS.ravel()],
    '2d and confidence': [*BOX, *POINTS.ravel(), 0.9],
    '3d': [*BOX, *(v for p in POINTS for v in (*p, 2))],
    '3d and confidence': [*BOX, *(v for p in POINTS for v in (*p, 2)), 0.9],
    '3d, predicted, and confidence': [*BOX, *(v for p in POINTS for v in (*p, 0.7)), 0.9],
    '3d outside of the box': [0.5, 0.5, 0.01, 0.01, *(v for p in POINTS for v in (*p, 2)), 0.9],
}


@pytest.mark.parametrize('count', [1, 2, 3])
@pytest.mark.parametrize('name', POSES)
def test_one_pose_is_no_polygon(name, count):
    v, numbers = POSES[name], 2 if name.startswith('2d') else 3
    said = yolo_kind([v] * count)(v)
    assert said == 'box' if (name, count) == ('3d', 3) else 'write kpt_shape in data.yaml' in said
    assert yolo_kind([v] * count, [17, numbers])(v) == 'box'
    if len(v) % 2 == 0:
        assert yolo_kind([v] * count, [0, 2])(v) == 'polygon'  # no key points


def test_one_polygon_among_boxes_is_a_polygon():
    v = [0.5, 0.5, 0.6, 0.5, 0.6, 0.6, 0.55, 0.65, 0.5, 0.6]
    assert yolo_kind([v, BOX])(v) == yolo_kind([v, v[:8]])(v) == 'polygon'


# --- folders and names -------------------------------------------------------------------------------------
def test_images_beside_a_folder_named_like_a_split(tmp_path):
    for f in ('a.jpg', 'b.jpg', 'train/c.jpg'):
        picture(tmp_path / f)
    ds = open_dataset(str(tmp_path))
    assert ds.ids == ['a.jpg', 'b.jpg', 'train/c.jpg']
    assert any('train/ lies beside a.jpg, b.jpg and is not taken for a split' in note for note in ds.notes)


@pytest.mark.parametrize('names', [('a.jpg', 'x/b.jpg'), ('a.jpg', 'train/b.jpg')])
def test_a_folder_of_images_is_walked_once(tmp_path, names, monkeypatch):
    for f in names:
        picture(tmp_path / f)
    walked, walk = [], files.files_under
    for module in (files, catalog):
        monkeypatch.setattr(module, 'files_under', lambda root: walked.append(root) or walk(root))
    assert open_dataset(str(tmp_path)).ids == list(names) and len(walked) == 1


def test_lines_of_a_list_that_name_another_folder(tmp_path):
    picture(tmp_path / 'x.jpg')
    (tmp_path / 'data.yaml').write_text('train: train.txt\nnames: [dog]\n')
    (tmp_path / 'train.txt').write_text('other/x.jpg\n')
    ds = open_dataset(str(tmp_path))
    assert ds.ids == ['x.jpg'] and any("'other/x.jpg' as x.jpg" in note for note in ds.notes)
    (tmp_path / 'train.txt').write_text('./x.jpg\n')
    assert open_dataset(str(tmp_path)).notes == []
    (tmp_path / 'lists').mkdir()
    (tmp_path / 'data.yaml').write_text('train: lists/train.txt\nnames: [dog]\n')
    (tmp_path / 'lists/train.txt').write_text('../other/x.jpg\n')
    picture(tmp_path / 'other/x.jpg')
    assert open_dataset(str(tmp_path)).ids == ['other/x.jpg']
    (tmp_path / 'lists/train.txt').write_text('/gone/x.jpg\n')
    picture(tmp_path / 'gone/x.jpg')
    assert 'gone/x.jpg and ' in refusal(tmp_path)


def test_xml_whose_name_and_filename_are_two_images(tmp_path):
    root = voc(tmp_path / 'a')
    path = root / 'Annotations/000.xml'
    path.write_text(path.read_text().replace('000.jpg', 'abc.jpg'))
    assert open_dataset(str(root)).notes == []  # abc.jpg is not there
    picture(root / 'JPEGImages/abc.jpg')
    assert "image '000': 000.jpg and abc.jpg fit" in refusal(root)
    (root / 'Annotations/abc.xml').write_text(path.read_text())  # abc.jpg has its own record
    ds = open_dataset(str(root))
    assert ds[0].path.endswith('000.jpg') and any("'abc.jpg' as 000.jpg" in note for note in ds.notes)


def test_one_file_under_two_spellings(tmp_path):
    for f in ('000.jpg', '001.jpg'):
        picture(tmp_path / f)
    new, faults = resolve_names(tmp_path, ['./000.jpg', 'x/000.jpg', '001.jpg'], 'list')
    assert new == {} and [f.kind for f in faults] == ['ambiguous-image']
    assert "the only file that fits is 000.jpg of record './000.jpg'" in str(faults[0])


def test_suffixes_are_listed_once(tmp_path, monkeypatch):
    root, calls = voc(tmp_path), []
    for n in range(20):
        picture(root / f'JPEGImages/{n:03d}.jpg')
    formats = open_dataset.__globals__['read_voc'].__globals__
    known = formats['image_suffixes']
    monkeypatch.setitem(formats, 'image_suffixes', lambda: calls.append(1) or known())
    open_dataset(str(root))
    assert len(calls) == 1


# --- pixels ------------------------------------------------------------------------------------------------
def big_endian(path, values):
    "A grey TIFF of 16 bits, the highest byte first"
    h, w = values.shape
    tags = [
        (256, w),
        (257, h),
        (258, 16),
        (259, 1),
        (262, 1),
        (273, 200),
        (277, 1),
        (278, h),
        (279, 2 * h * w),
    ]
    entries = b''.join(struct.pack('>HHII', t, 4, 1, v) for t, v in tags)
    head = b'MM\0*' + struct.pack('>IH', 8, len(tags)) + entries + bytes(4)
    path.write_bytes(head.ljust(200, b'\0') + values.astype('>u2').tobytes())


def deep_colours(path, values):
    "A PNG of 16 bits per colour"

    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    h, w = values.shape[:2]
    lines = b''.join(b'\0' + line.astype('>u2').tobytes() for line in values)
    head = chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 16, 2, 0, 0, 0))
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + head + chunk(b'IDAT', zlib.compress(lines)) + chunk(b'IEND', b''))


def kinds_of(path):
    source = read_folder(path)
    return [(f.kind, f.item, f.cure) for f in check_images(source, progress=False)[1]]


def test_a_dark_big_endian_tiff_is_not_broken(tmp_path):
    big_endian(tmp_path / 'a.tif', np.random.RandomState(0).randint(0, 300, (40, 40)))
    with Image.open(tmp_path / 'a.tif') as img:
        assert img.mode == 'I;16B'
    [(kind, _, cure)] = kinds_of(tmp_path)
    assert kind == 'constant-image' and 'data.white, e.g. to 299' in cure


def test_an_image_of_one_colour_is_constant(tmp_path):
    Image.new('RGB', (40, 40), (255, 0, 0)).save(tmp_path / 'red.png')
    [(kind, item, _)] = kinds_of(tmp_path)
    assert kind == 'constant-image' and 'between 255 and 255, 0 and 0 of 255' in item
    Image.fromarray(np.tile(np.uint8([[[255, 0, 0], [255, 9, 0]]]), (40, 20, 1))).save(tmp_path / 'red.png')
    assert kinds_of(tmp_path) == []


def tiff_colours(path, values):
    tifffile = pytest.importorskip('tifffile')
    tifffile.imwrite(path, values, photometric='rgb')


@pytest.mark.parametrize('suffix,write', [('.png', deep_colours), ('.tif', tiff_colours)])
def test_colours_of_16_bits_have_their_own_white(tmp_path, suffix, write):
    path = tmp_path / f'a{suffix}'
    values = np.random.RandomState(0).randint(0, 65536, (40, 40, 3)).astype(np.uint16)
    write(path, values)
    decoded = Image.open(path)
    decoded.load()
    assert pixel_depth(path) == '16 bits'
    assert all((np.asarray(as_sample(k).image) == values >> 8).all() for k in (path, decoded, values))
    for kind in (path, Image.open(path), decoded):
        near = np.asarray(as_sample(kind, 65535).image, int) - np.asarray(as_sample(values, 65535).image, int)
        assert abs(near).max() <= 1
        with pytest.raises(DataError, match='colours of 16 bits .* 65535 as white, not 4095') as e:
            as_sample(kind, 4095)
        assert len(str(e.value).splitlines()) == 1
    assert as_sample(values, 4095).image.getextrema()[0][1] == 255
    ds = open_dataset(str(tmp_path))
    ds.white = 4095
    with pytest.raises(DataError, match='colours of 16 bits'):
        ds[0]


def test_dark_colours_of_16_bits_are_said(tmp_path):
    deep_colours(tmp_path / 'a.png', np.random.RandomState(0).randint(0, 2000, (40, 40, 3)))
    [(kind, _, cure)] = kinds_of(tmp_path)
    assert kind == 'constant-image' and '65535 is white' in cure and 'data.white' not in cure
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (40, 40, 3), np.uint8)).save(tmp_path / 'b.png')
    assert 'mixed-depths' in [k for k, _, _ in kinds_of(tmp_path)]


def test_eight_bits_ignore_white(tmp_path):
    photo = Image.fromarray(np.random.RandomState(0).randint(0, 256, (8, 8, 3), np.uint8))
    for name in ('a.png', 'a.tif', 'a.bmp', 'a.webp'):
        photo.save(tmp_path / name)
        assert (
            np.asarray(load_image(tmp_path / name, white=4095))
            == np.asarray(to_rgb(Image.open(tmp_path / name)))
        ).all()


@pytest.mark.parametrize('quick', [False, True])
def test_the_doctor_opens_an_image_once(tmp_path, quick, monkeypatch):
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (40, 40, 3), np.uint8)).save(tmp_path / 'a.png')
    source, opened, read = read_folder(tmp_path), [], files.open_image
    for module in (files, checks):
        monkeypatch.setattr(module, 'open_image', lambda path: opened.append(path) or read(path))
    assert check_images(source, quick=quick, progress=False)[1] == [] and len(opened) == 1


# --- areas -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    'area', ['1_5', [3], True, float('nan'), float('inf'), -4, 10**400, {}, ' ', '9' * 400]
)
def test_an_area_that_is_warned_of_is_not_used(tmp_path, area):
    def edit(d):
        d['annotations'][0]['area'] = area

    ds = right(CocoDataset(coco(tmp_path, edit) / 'instances_train.json'))
    assert ds.annotation(0)['area'].tolist() == [w * h for _, _, w, h in BOXES]
    [told] = check_dataset(str(tmp_path), quick=True).of('warning', 'area')
    assert 'annotation 1 of image 1: area' in told.item


@pytest.mark.parametrize('area', [None, 0, 0.0, ''])
def test_no_area_needs_no_warning(tmp_path, area):
    ds = CocoDataset(coco(tmp_path, lambda d: d['annotations'][0].update(area=area)) / 'instances_train.json')
    assert ds.annotation(0)['area'].tolist() == [w * h for _, _, w, h in BOXES]
    assert not check_dataset(str(tmp_path), quick=True).of('warning', 'area')


def test_the_area_of_a_clipped_box_is_checked_too(tmp_path):
    coco(tmp_path, lambda d: d['annotations'][0].update(bbox=[W - 20, H - 20, 40, 40], area=9e6))
    found = check_dataset(str(tmp_path), quick=True)
    assert len(found.of('warning', 'area')) == len(found.of('warning', 'overhang')) == 1
    assert open_dataset(str(tmp_path)).annotation(0)['area'][0] == 400
