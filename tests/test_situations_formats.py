"Data as people have them: encodings, value types, spellings of names, YOLO rows, layouts; right values"

import json, os, unicodedata
import numpy as np, pytest, torch
from PIL import Image
from semidetr.core import DataError
from semidetr.data.catalog import open_dataset, read_source
from semidetr.data.datasets import CocoDataset, ImageFolder
from semidetr.data.doctor import check_dataset
from semidetr.data.yolo import yolo_kind
from semidetr.text import read_json, read_lines, read_text

W, H = 160, 120
BOXES = [[99, 55, 47, 32], [120, 60, 32, 28]]


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (W, H), (90, 120, 150)).save(path)


def coco(root, edit=None, name='instances_train.json', images='images', encoding='utf-8', files=None):
    files = files or ['000.jpg', '001.jpg']
    data = dict(
        images=[dict(id=n + 1, file_name=f, width=W, height=H) for n, f in enumerate(files)],
        annotations=[
            dict(id=n + 1, image_id=1, category_id=n + 1, bbox=list(b), area=b[2] * b[3], iscrowd=0)
            for n, b in enumerate(BOXES)
        ],
        categories=[dict(id=1, name='square'), dict(id=2, name='bar')],
    )
    if edit:
        edit(data)
    for f in ('000.jpg', '001.jpg'):
        picture(root / images / f)
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(json.dumps(data, ensure_ascii=False).encode(encoding))
    return root


def xyxy(boxes=BOXES):
    return torch.tensor([[x, y, x + w, y + h] for x, y, w, h in boxes]).float()


def right(ds, classes=('square', 'bar'), ignore=(False, False)):
    a = ds.annotation(0)
    assert ds.classes == list(classes) and a['labels'].tolist() == [0, 1]
    assert torch.allclose(a['boxes'], xyxy(), atol=0.01) and a['ignore'].tolist() == list(ignore)
    return ds


def row(c, box, *more):
    x, y, w, h = box
    return ' '.join(f'{v:.8g}' for v in (c, (x + w / 2) / W, (y + h / 2) / H, w / W, h / H, *more))


def yolo(root, rows=None, names='[square, bar]', more='', encoding='utf-8', yaml_encoding='utf-8'):
    for part in ('train', 'val'):
        picture(root / f'images/{part}/{part}0.jpg')
        (root / f'labels/{part}').mkdir(parents=True)
        text = '\r\n'.join(rows or [row(n, b) for n, b in enumerate(BOXES)])
        (root / f'labels/{part}/{part}0.txt').write_bytes(text.encode(encoding))
    text = f'path: .\ntrain: images/train\nval: images/val\nnames: {names}\n{more}'
    (root / 'data.yaml').write_bytes(text.encode(yaml_encoding))
    return root


def voc(root, split='train', difficult=('0', '0'), encoding='utf-8', head='', lists='000\n', image='000.jpg'):
    objects = ''
    for name, word, (x, y, w, h) in zip(('bar', 'square'), difficult, BOXES):
        corners = f'<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax>'
        objects += (
            f'<object><name>{name}</name><difficult>{word}</difficult><bndbox>{corners}</bndbox></object>'
        )
    xml = f'{head}<annotation><filename>{image}</filename>{objects}</annotation>'
    (root / 'Annotations').mkdir(parents=True)
    (root / 'Annotations/000.xml').write_bytes(xml.encode(encoding))
    picture(root / 'JPEGImages' / image)
    if lists is not None:
        (root / 'ImageSets/Main').mkdir(parents=True)
        (root / f'ImageSets/Main/{split}.txt').write_bytes(
            lists if isinstance(lists, bytes) else lists.encode()
        )
    return root


# --- text ------------------------------------------------------------------------------
ENCODINGS = ('utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le', 'utf-16-be', 'utf-32')


@pytest.mark.parametrize('encoding', ENCODINGS)
def test_text(tmp_path, encoding):
    right(open_dataset(str(coco(tmp_path / 'coco', encoding=encoding))))
    right(open_dataset(str(yolo(tmp_path / 'yolo', encoding=encoding, yaml_encoding=encoding))))
    lists = '000\r\n'.encode(encoding)
    right(open_dataset(str(voc(tmp_path / 'voc', lists=lists, encoding=encoding))), ('bar', 'square'))


def test_names_in_any_script(tmp_path):
    def edit(d):
        d['categories'][0]['name'] = '方块'
        d['categories'][1]['name'] = 'Häkchen ✓'

    right(open_dataset(str(coco(tmp_path / 'a', edit, encoding='utf-16'))), ('方块', 'Häkchen ✓'))
    names = '["方块", "Häkchen ✓"]'
    right(open_dataset(str(yolo(tmp_path / 'b', names=names))), ('方块', 'Häkchen ✓'))


def test_what_is_no_text_is_one_line(tmp_path):
    yolo(tmp_path, names="['方块', '长条']", yaml_encoding='gbk')
    with pytest.raises(
        DataError, match=r'data.yaml: byte \d+ \(0x.., line 4\) is not UTF-8; save it as UTF-8'
    ):
        open_dataset(str(tmp_path))
    (tmp_path / 'a.txt').write_bytes('für\n'.encode('cp1252'))
    with pytest.raises(DataError, match=r'byte 1 \(0xFC, line 1\)'):
        read_lines(tmp_path / 'a.txt')
    (tmp_path / 'odd.json').write_bytes(b'\xff\xfe{\x00}')
    with pytest.raises(DataError, match='odd.json: byte'):
        read_json(tmp_path / 'odd.json')
    with pytest.raises(DataError, match='no such file'):
        read_text(tmp_path / 'gone')


@pytest.mark.parametrize('name', ['gbk', 'iso-8859-1', 'windows-1252', 'utf-16'])
def test_declared_encodings_of_xml(tmp_path, name):
    word = '方块' if name in ('gbk', 'utf-16') else 'Häkchen'
    voc(tmp_path, encoding=name, head=f'<?xml version="1.0" encoding="{name}"?>')
    path = tmp_path / 'Annotations/000.xml'
    path.write_bytes(path.read_bytes().decode(name).replace('>bar<', f'>{word}<').encode(name))
    assert word in open_dataset(str(tmp_path)).classes


# --- types of values -------------------------------------------------------------------
FLAGS = [('0', '1'), ('false', 'True'), (0, 1.0), ('no', 'yes'), (None, True)]


@pytest.mark.parametrize('off,on', FLAGS)
@pytest.mark.parametrize('key', ['iscrowd', 'ignore', 'difficult'])
def test_flags(tmp_path, key, off, on):
    def edit(d):
        d['annotations'][0][key], d['annotations'][1][key] = off, on

    right(CocoDataset(coco(tmp_path, edit) / 'instances_train.json'), ignore=(False, True))


def test_flags_that_mean_nothing_are_refused(tmp_path):
    coco(tmp_path, lambda d: d['annotations'][1].update(iscrowd='maybe'))
    with pytest.raises(DataError, match="annotation 2 of image 1: iscrowd is 'maybe'; write 0 or 1"):
        open_dataset(str(tmp_path))
    voc(tmp_path / 'voc', difficult=('perhaps', '0'))
    with pytest.raises(DataError, match='000.xml.*perhaps'):
        open_dataset(str(tmp_path / 'voc'))


@pytest.mark.parametrize('word', ['True', '1', 'yes'])
def test_difficult_words(tmp_path, word):
    ds = open_dataset(str(voc(tmp_path, difficult=('False', word))))
    right(ds, ('bar', 'square'), (False, True))


@pytest.mark.parametrize(
    'area,want', [('1504 px', 1504), ('1504', 1504), (1000, 1000), (0.05, 1504), (9e6, 1504), ('much', 1504)]
)
def test_areas(tmp_path, area, want):
    ds = right(open_dataset(str(coco(tmp_path, lambda d: d['annotations'][0].update(area=area)))))
    assert ds.annotation(0)['area'][0] == want
    told = check_dataset(str(tmp_path), quick=True).of('warning', 'area')
    assert bool(told) == (area in (0.05, 9e6, 'much'))


def test_ids_as_text(tmp_path):
    def text(d):
        for a in d['annotations']:
            a.update(image_id=str(a['image_id']), category_id=str(a['category_id']))

    def numbers(d):
        for im in d['images']:
            im['id'] = str(im['id'])

    ds = right(open_dataset(str(coco(tmp_path / 'a', text))))
    assert ds.ids == [1, 2] and any('image_id' in note for note in ds.notes)
    assert right(open_dataset(str(coco(tmp_path / 'b', numbers)))).ids == ['1', '2']
    mixed = coco(tmp_path / 'c', lambda d: d['annotations'][1].update(image_id='1'))
    with pytest.raises(DataError, match="image '1'"):
        open_dataset(str(mixed))


def test_boxes_and_sizes_as_text(tmp_path):
    def edit(d):
        for im in d['images']:
            im.update(width=str(W), height=str(H))
        for a in d['annotations']:
            a['bbox'] = [str(v) for v in a['bbox']]

    right(open_dataset(str(coco(tmp_path, edit))))


@pytest.mark.parametrize('names', [('no', 'yes'), ('007', '1e3'), ('null', 'on'), ('1.0', '12:30')])
def test_class_names_stay_as_written(tmp_path, names):
    right(open_dataset(str(yolo(tmp_path / 'a', names=f'[{names[0]}, {names[1]}]'))), names)
    right(open_dataset(str(yolo(tmp_path / 'b', names=f'\n  0: {names[0]}\n  1: {names[1]}'))), names)


def test_a_number_of_classes_that_names_contradicts_is_refused(tmp_path):
    right(open_dataset(str(yolo(tmp_path / 'a', names='[a, b]\nnc: 2'))), ('a', 'b'))
    with pytest.raises(DataError, match="data.yaml: 'nc' is 3, but 'names' has 2 classes"):
        open_dataset(str(yolo(tmp_path / 'b', names='[a, b]\nnc: 3')))


# --- YOLO rows -------------------------------------------------------------------------
CORNERS = (0.65, 0.5, 0.85, 0.5, 0.85, 0.65, 0.65, 0.65)
ROWS = {
    'confidence': ([(0.801234,), (0.91,)], ''),
    'track id': ([(3,), (17,)], ''),
    'confidence and track id': ([(0.8, 1), (0.9, 12)], ''),
    'pose 2d': ([CORNERS, CORNERS], 'kpt_shape: [4, 2]\n'),
    'pose 3d': ([(0.7, 0.5, 2, 0.8, 0.6, 0)] * 2, 'kpt_shape: [2, 3]\n'),
    'pose 3d and confidence': ([(0.7, 0.5, 2, 0.8, 0.6, 0, 0.9)] * 2, 'kpt_shape: [2, 3]\n'),
}


@pytest.mark.parametrize('case', ROWS)
def test_yolo_boxes_with_more_numbers(tmp_path, case):
    extra, more = ROWS[case]
    rows = [row(n, b, *e) for n, (b, e) in enumerate(zip(BOXES, extra))]
    ds = right(open_dataset(str(yolo(tmp_path, rows, more=more))))
    assert any('more than a box' in note for note in ds.notes)


def test_yolo_polygons_and_mixed_files(tmp_path):
    x, y, w, h = BOXES[1]
    hull = [x / W, y / H, (x + w) / W, y / H, (x + w) / W, (y + h) / H, x / W, (y + h) / H]
    polygon = ' '.join(f'{v:.8g}' for v in (1, *hull))
    ds = right(open_dataset(str(yolo(tmp_path, [row(0, BOXES[0]), polygon]))))
    assert any('train0.txt: line 2 is of another kind than line 1' in note for note in ds.notes)


def test_yolo_rows_that_cannot_be_read(tmp_path):
    yolo(tmp_path, [row(0, BOXES[0], *CORNERS, 0.5, 0.5)], more='kpt_shape: [4, 2]\n')
    with pytest.raises(
        DataError, match='train0.txt: line 1: 14 numbers after the class, but kpt_shape means 12'
    ):
        open_dataset(str(tmp_path))
    points = [0.5, 0.5, 0.4, 0.4, 0.45, 0.45, 0.55, 0.45, 0.55, 0.55]
    assert 'write kpt_shape' in yolo_kind([points] * 3)(points)
    for n, bad in enumerate(('nan .5 .5 .2 .2', '0 .5 .5 inf .2', '0.5 .5 .5 .2 .2', 'x')):
        with pytest.raises(DataError, match='train0.txt: line 1'):
            open_dataset(str(yolo(tmp_path / str(n), [bad])))


# --- names of images -------------------------------------------------------------------
@pytest.mark.parametrize(
    'name',
    [
        'images\\000.jpg',
        '../images/000.jpg',
        ' 000.jpg ',
        '000.JPG',
        '000.png',
        'C:\\photos\\000.jpg',
        'x/000.jpg',
    ],
)
def test_other_spellings_are_found_and_said(tmp_path, name):
    ds = right(open_dataset(str(coco(tmp_path, files=[name, '001.jpg']))))
    assert ds[0].path.endswith('000.jpg')
    if not os.path.exists(tmp_path / 'images' / name):
        assert any('another spelling' in note for note in ds.notes)


def test_unicode_forms(tmp_path):
    name = unicodedata.normalize('NFD', 'Käfer.jpg')
    picture(tmp_path / 'images' / unicodedata.normalize('NFC', name))
    assert len(open_dataset(str(coco(tmp_path, files=[name, '001.jpg'])))[0].boxes) == 2


def test_ambiguous_names_are_refused(tmp_path):
    for folder in ('a', 'b'):
        picture(tmp_path / 'images' / folder / 'x.jpg')
    coco(tmp_path, files=['c/x.jpg', '001.jpg'])
    with pytest.raises(DataError, match='a/x.jpg and b/x.jpg fit'):
        open_dataset(str(tmp_path))
    coco(tmp_path / 'two', files=['p/000.jpg', 'q/000.jpg', '001.jpg'])
    with pytest.raises(DataError, match='the only file that fits is 000.jpg of record'):
        open_dataset(str(tmp_path / 'two'))


def test_voc_names(tmp_path):
    lists = 'JPEGImages/000.jpg  1\n'
    right(open_dataset(str(voc(tmp_path / 'a', lists=lists))), ('bar', 'square'))
    root = voc(tmp_path / 'b', image='000.png')
    picture(root / 'JPEGImages/000.jpg')  # the record names the PNG
    assert open_dataset(str(root))[0].path.endswith('000.png')
    path = root / 'Annotations/000.xml'
    path.write_text(path.read_text().replace('000.png', 'other.png'))
    with pytest.raises(DataError, match='000.jpg and 000.png fit'):
        open_dataset(str(root))


# --- folders ---------------------------------------------------------------------------
def test_links_and_skipped_files(tmp_path):
    for f in ('photos/a.jpg', 'disk/cam/b.jpg', 'disk/cam/c.avif'):
        picture(tmp_path / f)
    (tmp_path / 'photos/cam1').symlink_to(tmp_path / 'disk/cam')
    (tmp_path / 'photos/loop').symlink_to(tmp_path / 'photos')
    (tmp_path / 'photos/d.heic').write_bytes(b'x')
    (tmp_path / 'only').mkdir()
    (tmp_path / 'only/cam1').symlink_to(tmp_path / 'disk/cam')
    ds = ImageFolder(tmp_path / 'photos')
    assert ds.ids == ['a.jpg', 'cam1/b.jpg', 'cam1/c.avif'] and ds[2].size == (H, W)
    assert any('1 .heic' in note for note in ds.notes)
    assert ImageFolder(tmp_path / 'only').ids == ['cam1/b.jpg', 'cam1/c.avif']


def test_a_folder_named_like_a_split(tmp_path):
    for f in ('bus/a.jpg', 'bicycle/b.jpg', 'train/c.jpg'):
        picture(tmp_path / 'x' / f)
    ds = open_dataset(str(tmp_path / 'x'))
    assert ds.ids == ['bicycle/b.jpg', 'bus/a.jpg', 'train/c.jpg']
    assert any('not taken for a split' in note for note in ds.notes)
    for f in ('train/a.jpg', 'val/b.jpg'):
        picture(tmp_path / 'y' / f)
    assert open_dataset(str(tmp_path / 'y')).ids == ['a.jpg']
    assert open_dataset(str(tmp_path / 'y'), 'val').ids == ['b.jpg']


# --- layouts ---------------------------------------------------------------------------
def test_coco_layouts(tmp_path):
    right(open_dataset(str(coco(tmp_path / 'ls', name='result.json'))))
    right(open_dataset(str(coco(tmp_path / 'cvat', name='annotations/instances_default.json'))))
    right(
        open_dataset(str(coco(tmp_path / 'upper', name='Annotations/instances_train.json', images='Images')))
    )
    rf = coco(tmp_path / 'rf', name='train/_annotations.coco.json', images='train')
    coco(tmp_path / 'rf', name='valid/_annotations.coco.json', images='valid')
    right(open_dataset(str(rf / 'train')))
    right(open_dataset(str(rf / 'valid'), 'val'))
    with pytest.raises(DataError, match="no annotation file for the split 'val'"):
        open_dataset(str(rf / 'train'), 'val')
    name = 'annotations/semi_supervised/instances_train2017.1@10.json'
    mm = coco(tmp_path / 'mm', name=name, images='train2017')
    right(open_dataset(str(mm / name)))
    with pytest.raises(DataError, match='give one of these files'):
        open_dataset(str(mm))


def test_voc_layouts(tmp_path):
    root = voc(tmp_path / 'a', lists=None)
    right(open_dataset(str(root)), ('bar', 'square'))
    with pytest.raises(DataError, match="no list for the split 'val'"):
        open_dataset(str(root), 'val')
    os.rename(root / 'Annotations', root / 'annotations')
    os.rename(root / 'JPEGImages', root / 'images')
    right(open_dataset(str(root)), ('bar', 'square'))
    flat = voc(tmp_path / 'b', lists=None)
    os.rename(flat / 'Annotations/000.xml', flat / 'JPEGImages/000.xml')
    right(open_dataset(str(flat / 'JPEGImages')), ('bar', 'square'))
    (tmp_path / 'c').mkdir()
    (tmp_path / 'c/annotations.xml').write_text('<annotations><image/></annotations>')
    with pytest.raises(DataError, match="CVAT's own XML"):
        open_dataset(str(tmp_path / 'c'))


def test_yolo_layouts(tmp_path):
    upper = yolo(tmp_path / 'a')
    os.rename(upper / 'images', upper / 'Images')
    os.rename(upper / 'labels', upper / 'Labels')
    right(open_dataset(str(upper)))  # data.yaml still has images/train
    beside = yolo(tmp_path / 'b')
    os.rename(beside / 'labels/train/train0.txt', beside / 'images/train/train0.txt')
    right(open_dataset(str(beside)))
    right(open_dataset(str(beside / 'data.yaml'), 'val'))
    lost = yolo(tmp_path / 'c')
    os.rename(lost / 'labels', lost / 'texts')
    with pytest.raises(
        DataError, match='no image has a label file, but 1 lie elsewhere, such as texts/train'
    ):
        open_dataset(str(lost))
    picture(tmp_path / 'd/a.jpg')
    (tmp_path / 'd/a.txt').write_text('\n'.join(row(n, b) for n, b in enumerate(BOXES)))
    assert any('annotation files beside' in n for n in open_dataset(str(tmp_path / 'd')).notes)
    (tmp_path / 'd/classes.txt').write_text('square\nbar\n')
    right(open_dataset(str(tmp_path / 'd')))


def test_doctor_never_compares_a_set_with_itself(tmp_path):
    coco(tmp_path, name='result.json')
    report = check_dataset(str(tmp_path), progress=False)
    assert not report.of(kind='shared-image') and report.exit_code == 0
    assert np.isclose(report.counts['boxes'], 2) and read_source(tmp_path).where.endswith('result.json')
