"Formats, decoding, refusals, hidden labels, digits scenes; real data sets are used if they are there"

import json, os, pickle
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from semidetr.core import DataError
from semidetr.data.catalog import open_dataset
from semidetr.data.datasets import (
    CocoDataset,
    ImageFolder,
    Sample,
    Subset,
    Unlabelled,
    VocDataset,
    YoloDataset,
)
from semidetr.data.digits import DigitsScenes, glyphs, photos
from semidetr.data.files import load_image, read_size

RNG = np.random.default_rng(0)


def picture(path, w=60, h=40, **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 255, (h, w, 3), dtype=np.uint8)).save(path, **kw)


def base():
    "Three images (one empty), category ids with gaps, one crowd"
    return dict(
        images=[
            dict(id=7, file_name='a.jpg', width=60, height=40),
            dict(id=3, file_name='b.jpg', width=60, height=40),
            dict(id=11, file_name='c.jpg', width=60, height=40),
        ],
        categories=[dict(id=90, name='zebra'), dict(id=1, name='ant'), dict(id=18, name='dog')],
        annotations=[
            dict(id=1, image_id=7, category_id=18, bbox=[1, 2, 10, 20], area=77.0, iscrowd=0),
            dict(id=2, image_id=3, category_id=90, bbox=[5, 5, 5, 5], iscrowd=1),
            dict(id=3, image_id=7, category_id=1, bbox=[50, 30, 12, 10.5], iscrowd=0),
            dict(id=4, image_id=7, category_id=1, bbox=[3, 3, 0, 5], iscrowd=0),
        ],
    )


@pytest.fixture
def coco(tmp_path):
    def make(edit=None, where='instances_train.json', images='images'):
        data = base()
        if edit:
            data = edit(data) or data
        for n in 'abc':
            picture(tmp_path / images / f'{n}.jpg')
        (tmp_path / where).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / where).write_text(json.dumps(data))
        return tmp_path / where

    return make


# --- COCO ------------------------------------------------------------------------------
def test_coco_content(coco):
    ds = CocoDataset(coco())
    assert (ds.ids, ds.classes, ds.cat_ids) == ([7, 3, 11], ['ant', 'dog', 'zebra'], [1, 18, 90])
    s = ds[0]
    assert isinstance(s, Sample) and s.image.mode == 'RGB' and s.size == (40, 60) and s.image_id == 7
    assert s.boxes.tolist() == [[1, 2, 11, 22], [50, 30, 60, 40]]  # clipped; the empty one is dropped
    assert s.boxes.dtype == torch.float32 and s.labels.dtype == torch.int64
    assert s.labels.tolist() == [1, 0] and s.ignore.tolist() == [False, False]
    assert ds.dropped == 1
    assert ds[1].ignore.tolist() == [True] and ds[1].labels.tolist() == [2]
    assert ds[2].boxes.shape == (0, 4) and ds[2].labels.shape == (0,) and ds[2].ignore.dtype == torch.bool
    assert ds.index_of(11) == 2 and ds.annotation(0)['size'] == (40, 60)
    with pytest.raises(DataError, match="'7'"):
        ds.index_of('7')
    with pytest.raises(IndexError):
        ds[3]


def test_annotation_does_not_decode_and_is_a_copy(coco):
    ds = CocoDataset(coco())
    for f in ds.files:
        (ds.folder / f).unlink()
    ds.annotation(0)['boxes'].zero_()
    assert ds.annotation(0)['boxes'].sum() > 0


def test_coco_dict_is_what_pycocotools_reads(coco):
    from pycocotools.coco import COCO

    d = CocoDataset(coco()).coco_dict()
    api = COCO()
    api.dataset = json.loads(json.dumps(d))
    api.createIndex()
    assert sorted(api.getCatIds()) == [1, 2, 3] and sorted(api.getImgIds()) == [3, 7, 11]
    a = api.loadAnns(api.getAnnIds(imgIds=[7]))
    assert [x['bbox'] for x in a] == [[1, 2, 10, 20], [50, 30, 10, 10]]
    assert [x['category_id'] for x in a] == [2, 1]
    assert [x['area'] for x in a] == [77, 100]  # the file's area if it gives one
    assert [x['iscrowd'] for x in api.loadAnns(api.getAnnIds(imgIds=[3]))] == [1]


def test_fingerprint(coco, tmp_path):
    a = CocoDataset(coco()).fingerprint()
    os.rename(tmp_path / 'images', tmp_path / 'pics')
    moved = CocoDataset(tmp_path / 'instances_train.json', tmp_path / 'pics')
    assert moved.fingerprint() == a  # the folder does not count
    edits = [
        lambda d: d['annotations'][0].update(bbox=[1, 2, 10, 21]),
        lambda d: d['annotations'][0].update(category_id=1),
        lambda d: d['images'][2].update(id=12),
        lambda d: d['categories'][0].update(name='Zebra'),
        lambda d: d['images'][2].update(width=61),
        lambda d: d['annotations'][0].update(iscrowd=1),
    ]
    prints = {CocoDataset(coco(e)).fingerprint() for e in edits}
    assert len(prints) == len(edits) and a not in prints


@pytest.mark.parametrize(
    'where,images',
    [
        ('instances_train.json', 'images'),
        ('annotations/instances_train2017.json', 'train2017'),
        ('train/_annotations.coco.json', 'train'),
        ('annotations/instances_train.json', 'images'),
        ('instances_train.json', 'train'),
        ('instances_train.json', '.'),
    ],
)
def test_layouts(coco, tmp_path, where, images):
    coco(where=where, images=images)
    assert open_dataset(str(tmp_path), 'train')[0].size == (40, 60)


def test_sizes_may_be_left_out(coco):
    def edit(d):
        [im.pop('width') for im in d['images']]

    ds = CocoDataset(coco(edit))
    assert ds.annotation(0)['size'] == (40, 60) and ds[0].boxes[1].tolist() == [50, 30, 60, 40]


REFUSED = {
    'negative': (
        lambda d: d['annotations'][0].update(bbox=[10, 2, -3, 4]),
        ['annotation 1 of image 7', 'x2 < x1', 'swap'],
    ),
    'class': (
        lambda d: d['annotations'][0].update(category_id=4),
        ['annotation 1 of image 7', 'class id 4', 'add the category'],
    ),
    'image id': (lambda d: d['images'][1].update(id=7), ['image 7 (b.jpg)', 'used before', 'its own id']),
    'annotation id': (lambda d: d['annotations'][1].update(id=1), ['annotation 1 of image 3', 'used before']),
    'category id': (lambda d: d['categories'][1].update(id=90), ['category 90', 'used before']),
    'unknown image': (lambda d: d['annotations'][1].update(image_id='3'), ["image '3'", 'no such id']),
    'nan': (
        lambda d: d['annotations'][0].update(bbox=[1, 2, float('nan'), 4]),
        ['annotation 1', 'not finite'],
    ),
    'three numbers': (
        lambda d: d['annotations'][0].update(bbox=[1, 2, 3]),
        ['annotation 1', 'not four numbers'],
    ),
    'no bbox': (lambda d: d['annotations'][0].pop('bbox') and None, ['annotation 1', 'not four numbers']),
    'outside': (
        lambda d: d['annotations'][0].update(bbox=[100, 200, 10, 10]),
        ['annotation 1', 'outside the image of 60x40', 'scale'],
    ),
    'list': (lambda d: d['annotations'], ['list', 'one object']),
    'keys': (lambda d: {'shapes': []}, ["'images'", 'one object']),
    'empty images': (lambda d: d.update(images=[]), ['empty']),
    'no file name': (lambda d: d['images'][0].pop('file_name') and None, ['images[0]', 'file_name']),
}


@pytest.mark.parametrize('case', REFUSED)
def test_refused_in_one_line(coco, case):
    edit, words = REFUSED[case]
    path = coco(edit)
    with pytest.raises(DataError) as e:
        CocoDataset(path)
    text = str(e.value)
    assert '\n' not in text and str(path) in text and all(w in text for w in words), text


@pytest.mark.parametrize(
    'content,words',
    [
        ('', ['empty']),
        ('{"images": [\n{"id": 1,}]}', ['line 2', 'not valid JSON']),
        (b'\xff\xfe\x00\x9c', ['not a text file']),
    ],
)
def test_broken_json(tmp_path, content, words):
    f = tmp_path / 'instances_train.json'
    f.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as e:
        CocoDataset(f)
    assert str(f) in str(e.value) and all(w in str(e.value) for w in words)


def test_missing_image_folder(coco, tmp_path):
    path = coco()
    os.rename(tmp_path / 'images', tmp_path / 'elsewhere')
    with pytest.raises(DataError, match='a.jpg was not found in .*images.*--images FOLDER'):
        CocoDataset(path)
    with pytest.raises(DataError, match='no such image folder: .*nowhere'):
        CocoDataset(path, tmp_path / 'nowhere')
    assert CocoDataset(path, tmp_path / 'elsewhere')[0].size == (40, 60)


def test_bad_image_files(coco):
    ds = CocoDataset(coco())
    a, b, c = (ds.folder / f for f in ds.files)
    a.write_bytes(a.read_bytes()[: len(a.read_bytes()) // 2])
    b.unlink()
    picture(c, 50, 40)
    for i, words in (
        (0, ['a.jpg', 'image 7', 'cannot be read', 'restore']),
        (1, ['b.jpg', 'image 3', 'no such file']),
        (2, ['c.jpg', 'image 11', '40x50', '40x60']),
    ):
        with pytest.raises(DataError) as e:
            ds[i]
        assert all(w in str(e.value) for w in words), str(e.value)


def test_duplicate_class_names_stay_apart(coco):
    ds = CocoDataset(coco(lambda d: d['categories'][0].update(name='dog')))
    assert ds.classes == ['ant', 'dog (id 18)', 'dog (id 90)']


def test_file_without_annotations_is_unlabelled(coco):
    for edit in (lambda d: d.update(annotations=[]), lambda d: d.pop('annotations') and None):
        ds = CocoDataset(coco(edit))
        assert not ds.has_boxes and len(ds) == 3 and ds[0].boxes.shape == (0, 4)


# --- decoding --------------------------------------------------------------------------
@pytest.mark.parametrize(
    'mode,name',
    [
        ('L', 'x.png'),
        ('L', 'x.jpg'),
        ('1', 'x.png'),
        ('P', 'x.png'),
        ('RGBA', 'x.png'),
        ('LA', 'x.png'),
        ('CMYK', 'x.jpg'),
        ('RGB', 'x.webp'),
        ('RGB', 'x.tif'),
    ],
)
def test_modes(tmp_path, mode, name):
    ramp = Image.fromarray(np.tile(np.arange(0, 240, 4, dtype=np.uint8), (30, 1))).convert('RGB')
    (ramp.convert('P', palette=Image.Palette.ADAPTIVE) if mode == 'P' else ramp.convert(mode)).save(
        tmp_path / name
    )
    img = load_image(tmp_path / name)
    assert img.mode == 'RGB' and img.size == (60, 30)
    if mode != '1':
        assert np.abs(np.asarray(img, float) - np.asarray(ramp, float)).mean() < 8


def test_sixteen_bits_are_scaled(tmp_path):
    Image.fromarray(np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)).save(tmp_path / 'x.png')
    a = np.asarray(load_image(tmp_path / 'x.png'))
    assert a.shape == (8, 8, 3) and a.max() == 255
    assert 120 < a.mean() < 135  # a plain convert would give white


def exif(o):
    e = Image.Exif()
    e[0x0112] = o
    return e


@pytest.mark.parametrize('o', range(1, 9))
def test_exif_agrees_with_pillow(tmp_path, o):
    from PIL import ImageOps

    picture(tmp_path / 'x.png', 50, 20, exif=exif(o))
    want = ImageOps.exif_transpose(Image.open(tmp_path / 'x.png'))
    assert np.array_equal(np.asarray(load_image(tmp_path / 'x.png')), np.asarray(want)) and read_size(
        tmp_path / 'x.png'
    ) == (want.height, want.width)


def test_exif_against_the_annotations(tmp_path):
    picture(tmp_path / 'x.jpg', 50, 20, exif=exif(6))
    assert load_image(tmp_path / 'x.jpg', (50, 20)).size == (20, 50)  # boxes were drawn on the upright image
    assert load_image(tmp_path / 'x.jpg', (20, 50)).size == (50, 20)  # ... on the raw one
    assert load_image(tmp_path / 'x.jpg').size == (20, 50)


# --- VOC -------------------------------------------------------------------------------
def voc(root, objects, ids=('000001', '000002'), splits=('trainval',)):
    for i in ids:
        picture(root / 'JPEGImages' / f'{i}.jpg')
        rows = ''
        for name, box, difficult in objects if i == ids[0] else []:
            corners = ''.join(f'<{k}>{v}</{k}>' for k, v in zip(('xmin', 'ymin', 'xmax', 'ymax'), box))
            mark = '' if difficult is None else f'<difficult>{difficult}</difficult>'
            rows += f'<object><name>{name}</name>{mark}<bndbox>{corners}</bndbox></object>'
        (root / 'Annotations').mkdir(exist_ok=True)
        (root / 'Annotations' / f'{i}.xml').write_text(
            f'<annotation><filename>{i}.jpg</filename><size><width>60</width><height>40</height>'
            f'<depth>3</depth></size>{rows}</annotation>'
        )
    (root / 'ImageSets/Main').mkdir(parents=True, exist_ok=True)
    for s in splits:
        (root / f'ImageSets/Main/{s}.txt').write_text('\n'.join(ids) + '\n')
    return root


def test_voc(tmp_path):
    root = voc(
        tmp_path, [('dog', (1, 1, 60, 40), 0), ('person', (11, 6, 20, 15), 1), ('dog', (5, 5, 5, 9), None)]
    )
    ds = VocDataset(root)
    s = ds[0]
    assert ds.ids == ['000001', '000002'] and len(ds.classes) == 20 and ds.classes[11] == 'dog'
    boxes = [[0, 0, 60, 40], [10, 5, 20, 15], [4, 4, 5, 9]]
    assert s.boxes.tolist() == boxes  # 1..60 is the whole width; one pixel is one pixel wide
    assert s.labels.tolist() == [11, 14, 11] and s.ignore.tolist() == [False, True, False]
    assert len(ds[1].boxes) == 0
    assert VocDataset(root, keep_difficult=False)[0].ignore.tolist() == [False, False]
    assert open_dataset(str(root), 'train').ids == ds.ids  # falls back to trainval
    with pytest.raises(DataError, match="split 'test'; found trainval.txt"):
        open_dataset(str(root), 'test')


def test_voc_own_classes(tmp_path):
    root = voc(tmp_path, [('wheel', (1, 1, 5, 5), 0), ('axle', (1, 1, 9, 9), 0)])
    assert VocDataset(root).classes == ['axle', 'wheel'] and VocDataset(root)[0].labels.tolist() == [1, 0]
    assert VocDataset(root, classes=['wheel', 'axle'])[0].labels.tolist() == [0, 1]
    with pytest.raises(DataError, match="class id 'axle' is not among"):
        VocDataset(root, classes=['wheel'])


def test_voc_faults(tmp_path):
    root = voc(tmp_path, [('dog', (9, 1, 5, 5), 0)])
    with pytest.raises(DataError, match='x2 < x1'):
        VocDataset(root)
    (root / 'Annotations/000001.xml').write_text('<annotation><object>')
    with pytest.raises(DataError, match=r"000001.xml: image '000001'"):
        VocDataset(root)
    (root / 'Annotations/000001.xml').unlink()
    with pytest.raises(DataError, match=r"000001.xml: image '000001': no such file"):
        VocDataset(root)


# --- YOLO and folders ------------------------------------------------------------------
def test_yolo(tmp_path):
    picture(tmp_path / 'images/train/a.jpg', 100, 50)
    picture(tmp_path / 'images/train/b.jpg', 100, 50)
    (tmp_path / 'labels/train').mkdir(parents=True)
    (tmp_path / 'labels/train/a.txt').write_text('1 0.5 0.5 0.2 0.4\n0 0.1 0.2 0.3 0.2 0.3 0.6 0.1 0.6\n')
    (tmp_path / 'data.yaml').write_text(
        'path: .\ntrain: images/train\nval: images/val\nnames: {0: cat, 1: dog}\n'
    )
    for ds in (YoloDataset(tmp_path), open_dataset(str(tmp_path))):
        assert ds.classes == ['cat', 'dog'] and ds.ids == ['images/train/a.jpg', 'images/train/b.jpg']
        assert torch.allclose(ds[0].boxes, torch.tensor([[40.0, 15, 60, 35], [10, 10, 30, 30]]))
        assert ds[0].labels.tolist() == [1, 0] and len(ds[1].boxes) == 0
    with pytest.raises(DataError, match="names 'images/val' for val, which is not there"):
        open_dataset(str(tmp_path), 'val')
    with pytest.raises(DataError, match="no split 'test'"):
        open_dataset(str(tmp_path), 'test')
    (tmp_path / 'labels/train/a.txt').write_text('1 0.5 0.5 0.2\n')
    with pytest.raises(DataError, match=r"a.txt: line 1: '1 0.5 0.5 0.2'"):
        YoloDataset(tmp_path)
    (tmp_path / 'labels/train/a.txt').write_text('2 0.5 0.5 0.2 0.2\n')
    with pytest.raises(DataError, match='class id 2 is not among'):
        YoloDataset(tmp_path)


def test_folder(tmp_path):
    for f in ('b.jpg', 'a.PNG', 'sub/a.jpg', 'sub/a.png', '.hidden/x.jpg', '__MACOSX/y.jpg'):
        picture(tmp_path / f, 33, 44)
    (tmp_path / 'notes.txt').write_text('no image')
    ds = ImageFolder(tmp_path)
    assert ds.ids == ['a.PNG', 'b.jpg', 'sub/a.jpg', 'sub/a.png'] and not ds.has_boxes and ds.classes == []
    assert ds[3].size == (44, 33) and ds[3].boxes.shape == (0, 4) and ds.annotation(0)['size'] == (44, 33)
    assert ds.coco_dict()['images'][2]['id'] == 'sub/a.jpg' and ds.coco_dict()['annotations'] == []
    assert open_dataset(str(tmp_path)).ids == ds.ids
    (tmp_path / 'b.jpg').write_bytes(b'nothing')
    with pytest.raises(DataError, match="b.jpg: image 'b.jpg' cannot be read"):
        ds[1]
    with pytest.raises(DataError, match="b.jpg: image 'b.jpg' cannot be read"):
        ds.annotation(1)


# --- open_dataset ----------------------------------------------------------------------
def test_open_by_name_and_what_it_says_if_not(coco, tmp_path, monkeypatch):
    coco(where='cells/instances_train.json', images='cells/images')
    monkeypatch.delenv('SEMIDETR_DATA', raising=False)
    with pytest.raises(DataError) as e:
        open_dataset('cells')
    assert all(w in str(e.value) for w in ('SEMIDETR_DATA is not set', str(Path('cells').absolute())))
    monkeypatch.setenv('SEMIDETR_DATA', str(tmp_path))
    assert len(open_dataset('cells')) == 3
    with pytest.raises(DataError) as e:
        open_dataset('cell')
    assert "did you mean 'cells'" in str(e.value) and str(tmp_path / 'cell') in str(e.value)
    monkeypatch.setenv('SEMIDETR_DATA', '/nowhere')
    assert len(open_dataset('cells', data_root=tmp_path)) == 3
    assert len(open_dataset(str(tmp_path / 'cells/instances_train.json'))) == 3


def test_a_missing_split_is_not_taken_for_a_folder_of_images(coco, tmp_path):
    coco()
    with pytest.raises(DataError, match="split 'val'; found instances_train.json"):
        open_dataset(str(tmp_path), 'val')


def test_empty_folder(tmp_path):
    with pytest.raises(DataError, match='no image found'):
        open_dataset(str(tmp_path))


def test_open_digits():
    ds = open_dataset('digits:n=5,size=64', 'val')
    assert len(ds) == 5 and ds.split == 'val' and ds[0].size == (64, 64)
    for bad in ('digits:sise=3', 'digits:n=many', 'digits:n=0', 'digits:size=8'):
        with pytest.raises(DataError):
            open_dataset(bad)
    with pytest.raises(DataError, match='train, val, test'):
        open_dataset('digits', 'trainval')


# --- parts, and labels that stay hidden ------------------------------------------------
def test_subset(coco):
    ds = CocoDataset(coco())
    sub = Subset(ds, [2, 0])
    assert sub.ids == [11, 7] and sub[1].boxes.tolist() == ds[0].boxes.tolist() and sub.index_of(7) == 1
    assert sub.fingerprint() != ds.fingerprint()
    assert {a['image_id'] for a in sub.coco_dict()['annotations']} == {7}
    for bad in ([3], [-1]):
        with pytest.raises(DataError, match='does not exist'):
            Subset(ds, bad)
    assert len(Subset(ds, [])) == 0


def every_tensor(x, depth=0, visited=None):
    "Every tensor and array that can be reached through public attributes and containers"
    visited = set() if visited is None else visited
    if id(x) in visited or depth > 6:
        return
    visited.add(id(x))
    if isinstance(x, (torch.Tensor, np.ndarray)):
        yield x
    elif isinstance(x, dict):
        for v in x.values():
            yield from every_tensor(v, depth + 1, visited)
    elif isinstance(x, (list, tuple)):
        for v in x:
            yield from every_tensor(v, depth + 1, visited)
    elif hasattr(x, '__dict__') and not isinstance(x, (Image.Image, type)):
        for k, v in vars(x).items():
            if not k.startswith('_'):
                yield from every_tensor(v, depth + 1, visited)


@pytest.mark.parametrize(
    'wrap',
    [
        lambda d: Unlabelled(d),
        lambda d: Unlabelled(d, [0, 1]),
        lambda d: Subset(Unlabelled(d), [0]),
        lambda d: Unlabelled(Subset(d, [1, 0])),
        lambda d: Unlabelled(Unlabelled(d)),
    ],
)
@pytest.mark.parametrize('kind', ['coco', 'digits'])
def test_unlabelled_never_gives_a_box(coco, wrap, kind):
    full = CocoDataset(coco()) if kind == 'coco' else DigitsScenes(n=4)
    assert sum(len(full.annotation(i)['boxes']) for i in range(2)) > 0
    ds = wrap(full)
    assert ds.has_boxes is False and ds.coco_dict()['annotations'] == []
    for i in range(len(ds)):
        a, s = ds.annotation(i), ds[i]
        assert s.image.tobytes() == full[full.index_of(s.image_id)].image.tobytes()  # the picture is the same
        assert a['boxes'].shape == (0, 4) and all(len(a[k]) == 0 for k in ('labels', 'ignore', 'area'))
        assert a['size'] == s.size
        assert s.boxes.shape == (0, 4) and len(s.labels) == len(s.ignore) == 0
    assert all(t.size == 0 if isinstance(t, np.ndarray) else t.numel() == 0 for t in every_tensor(ds))
    public = {n for n in dir(ds) if not n.startswith('_')}
    known = 'annotation classes coco_dict fingerprint has_boxes ids index_of indices name'
    assert public <= set(known.split()), public


def test_unlabelled_files_hold_no_box_in_memory(coco):
    full = CocoDataset(coco())
    inner = Unlabelled(full)._ds
    assert all(len(v) == 0 for v in inner._packed.values()) and len(full[0].boxes) == 2


# --- workers ---------------------------------------------------------------------------
def first_boxes(ds):
    return ds[0].boxes.tolist()


def test_picklable_and_usable_in_a_worker(coco):
    full = CocoDataset(coco())
    for ds in (full, Subset(full, [0]), Unlabelled(full), DigitsScenes(n=3)):
        ds[0]
        twin = pickle.loads(pickle.dumps(ds))
        assert first_boxes(twin) == first_boxes(ds) and twin.fingerprint() == ds.fingerprint()
    open_files = os.listdir('/proc/self/fd') if os.path.isdir('/proc/self/fd') else []
    for _ in range(20):
        CocoDataset(coco())[0]
    if open_files:
        assert len(os.listdir('/proc/self/fd')) <= len(open_files) + 2
    loader = torch.utils.data.DataLoader(CocoDataset(coco()), batch_size=None, num_workers=1, collate_fn=None)
    assert [s.image_id for s in loader] == [7, 3, 11]


# --- digits scenes ---------------------------------------------------------------------
def test_scene_is_a_function_of_its_number():
    a, b = DigitsScenes(n=40), DigitsScenes(n=20)
    late = a[17]
    [a[i] for i in (3, 9)]
    assert a[17].image.tobytes() == late.image.tobytes() == b[17].image.tobytes()
    assert torch.equal(b[17].boxes, late.boxes)
    assert torch.equal(a.annotation(17)['boxes'], late.boxes)
    assert torch.equal(a.annotation(17)['labels'], late.labels)
    for other in (DigitsScenes(n=20, seed=1), DigitsScenes('val', n=20)):
        assert other[17].image.tobytes() != late.image.tobytes()
    state = torch.get_rng_state()
    np_state = np.random.get_state()[1].copy()
    a[5]  # draws from no global generator
    assert torch.equal(state, torch.get_rng_state()) and (np_state == np.random.get_state()[1]).all()


def test_scene_content():
    ds = DigitsScenes(n=200)
    n = [len(ds.annotation(i)['labels']) for i in range(200)]
    assert min(n) >= 1 and max(n) == 6 and 3 < np.mean(n) < 4
    boxes = torch.cat([ds.annotation(i)['boxes'] for i in range(200)])
    labels = torch.cat([ds.annotation(i)['labels'] for i in range(200)])
    side = (boxes[:, 2:] - boxes[:, :2]).amax(1) / 96
    assert boxes.min() >= 0 and boxes.max() <= 96
    assert side.min() > 0.15 and side.max() < 0.48 and side.std() > 0.05
    assert labels.bincount(minlength=10).min() > 30 and ds.classes == list('0123456789')


def test_boxes_are_tight_to_the_ink():
    from semidetr.data import digits

    ds = DigitsScenes(n=60)
    for i in range(60):
        n, rng, objects = ds._layout(i)
        empty = np.asarray(digits.background(rng, ds.split, ds.size), int)
        drawn = np.abs(np.asarray(ds[i].image, int) - empty).max(2) > 0
        cover = np.zeros_like(drawn)
        for _, (x1, y1, x2, y2), ink in objects:
            cover[y1:y2, x1:x2] = True
            assert ink.getbbox() == (0, 0, x2 - x1, y2 - y1)  # ink touches all four sides
        assert not (drawn & ~cover).any() and drawn.any()  # nothing is drawn beside the boxes


def test_splits_share_no_digit_and_no_background():
    from semidetr.data.digits import _BANDS
    from sklearn.datasets import load_digits

    splits = ('train', 'val', 'test')
    assert sum(len(glyphs(s)) for s in splits) == len(load_digits().target)
    ink = {s: {g.tobytes() for _, g in glyphs(s)} for s in splits}
    assert not (ink['train'] & ink['val'] or ink['train'] & ink['test'] or ink['val'] & ink['test'])
    assert [_BANDS[s] for s in splits] == [(0, 0.5), (0.5, 0.75), (0.75, 1)]  # bands that only touch
    assert min(sum(photos(s)[k][0].width for s in splits) for k in range(len(photos('train')))) > 400
    ids = [set(DigitsScenes(s).ids) for s in splits]
    assert not (ids[0] & ids[1] or ids[0] & ids[2] or ids[1] & ids[2])


def test_digits_fingerprint():
    variants = ({}, {'n': 5}, {'size': 64}, {'seed': 1}, {'split': 'val'})
    assert len({DigitsScenes(**k).fingerprint() for k in variants}) == 5
    assert Subset(DigitsScenes(n=9), [1, 2]).fingerprint() == Subset(DigitsScenes(n=9), [1, 2]).fingerprint()


# --- real data, if there ---------------------------------------------------------------
REAL = next(
    (
        p
        for p in (os.environ.get('SEMIDETR_DATA'), Path(__file__).parents[2] / 'shared' / 'data')
        if p and Path(p).is_dir()
    ),
    None,
)


@pytest.mark.skipif(REAL is None, reason='SEMIDETR_DATA is not set')
@pytest.mark.parametrize(
    'name,split,images,boxes,ignored,classes',
    [
        ('coco_mini', 'train', 221, 2057, 22, 80),
        ('coco_mini', 'val', 134, 1192, 14, 80),
        ('txl_pbc', 'train', 850, 14987, 0, 3),
        ('txl_pbc', 'val', 244, 4331, 0, 3),
        ('voc07_mini', 'train', 1600, 4667, 900, 20),
        ('voc07_mini', 'val', 500, 1594, 347, 20),
    ],
)
def test_real(name, split, images, boxes, ignored, classes):
    if not (Path(REAL) / name).is_dir():
        pytest.skip(f'no {name} in {REAL}')
    ds = open_dataset(name, split, REAL)
    assert (len(ds), len(ds.classes), ds.dropped) == (images, classes, 0)
    anns = [ds.annotation(i) for i in range(len(ds))]
    assert (
        sum(len(a['boxes']) for a in anns) == boxes and sum(int(a['ignore'].sum()) for a in anns) == ignored
    )
    s = ds[len(ds) // 2]
    assert s.image.mode == 'RGB' and s.size == ds.annotation(len(ds) // 2)['size']
