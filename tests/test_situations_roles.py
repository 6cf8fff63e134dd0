"Data as people have them: roles that overlap, background images, pixel scales, broken files, classes by name"

import json
import os
import shutil
import warnings
import numpy as np
import pytest
import torch
from PIL import Image
from semidetr.core import DataError
from semidetr.data.catalog import open_dataset
from semidetr.data.checks import image_files, same_files
from semidetr.data.datasets import Subset, Unlabelled
from semidetr.data.files import load_image
from semidetr.data.loader import SemiLoader
from semidetr.train.config import DataConfig, config_hash, override, preset
from semidetr.train.predict import as_sample
from semidetr.train.run_data import build_data, by_name, limits


def noise(path, seed, size=(40, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.RandomState(seed).randint(0, 255, (*size, 3), np.uint8)).save(path)


def coco(path, files, boxes=1, classes=('bar', 'square'), folder=''):
    "A COCO file; `boxes` is a number for every image, or one for each"
    per_image = [boxes] * len(files) if isinstance(boxes, int) else boxes
    images = [dict(id=n, file_name=folder + f, width=40, height=40) for n, f in enumerate(files)]
    anns = []
    for n, count in enumerate(per_image):
        for k in range(count):
            box = [1 + k % 20, 2, 10, 12]
            anns.append(dict(id=len(anns) + 1, image_id=n, category_id=1 + (n + k) % len(classes), bbox=box))
    cats = [dict(id=n + 1, name=c) for n, c in enumerate(classes)]
    path.write_text(json.dumps(dict(images=images, annotations=anns, categories=cats)))


@pytest.fixture
def shop(tmp_path):
    "8 training and 4 test images in one folder `images`, as in many exports"
    names = [f'{n:03}.png' for n in range(8)], [f'v{n:03}.png' for n in range(4)]
    for n, f in enumerate(names[0] + names[1]):
        noise(tmp_path / 'images' / f, n)
    coco(tmp_path / 'instances_train.json', names[0], folder='images/')
    coco(tmp_path / 'instances_val.json', names[1], folder='images/')
    return tmp_path


def quiet_build(**settings):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return build_data(DataConfig(**settings))


def paths(ds):
    return {os.path.realpath(f) for f in image_files(ds)}


def roles_are_disjoint(d):
    pool = paths(d.unlabelled)
    assert len(pool) == len(d.unlabelled)
    for part in (d.labelled, d.dev, d.val):
        assert not pool & paths(part)


# ---- 1: roles


def test_the_folder_of_all_images_gives_no_test_image_to_training(shop):
    d = quiet_build(data=str(shop), unlabelled=str(shop / 'images'), count=3, dev=2)
    roles_are_disjoint(d)
    assert len(d.unlabelled) == 3
    [note] = d.notes
    assert '12 of 12 images leave' in note and '3 labelled' in note and '2 development' in note
    assert '4 test' in note


@pytest.mark.parametrize('kind', ['symlink', 'hardlink', 'copy', 'renamed', 'spelling', 'linked folder'])
def test_every_way_to_name_the_same_file(shop, kind):
    more = shop / 'more'
    noise(more / 'new.png', 99)
    folder = str(more)
    for n in range(4):
        source, target = shop / 'images' / f'v{n:03}.png', more / f'v{n:03}.png'
        if kind == 'symlink':
            target.symlink_to(source)
        elif kind == 'hardlink':
            os.link(source, target)
        elif kind == 'copy':
            shutil.copy(source, target)
        elif kind == 'renamed':
            shutil.copy(source, more / f'x{n}.png')
    if kind == 'spelling':
        folder = str(shop / 'more' / '..' / 'images')
        shutil.copy(more / 'new.png', shop / 'images' / 'new.png')
    if kind == 'linked folder':
        shutil.copy(more / 'new.png', shop / 'images' / 'new.png')
        (shop / 'alias').symlink_to(shop / 'images')
        folder = str(shop / 'alias')
    d = quiet_build(data=str(shop), unlabelled=folder, dev=2)
    assert [os.path.basename(f) for f in image_files(d.unlabelled)] == ['new.png']
    assert any('4 test' in n for n in d.notes)


def test_an_empty_pool_is_an_error(shop):
    with pytest.raises(DataError, match='12 of 12 images leave .* no unlabelled image is left'):
        quiet_build(data=str(shop), unlabelled=str(shop / 'images'), dev=2)


def test_test_images_that_are_also_training_images_are_said(shop):
    shutil.copy(shop / 'images' / '000.png', shop / 'images' / 'v000.png')
    d = quiet_build(data=str(shop), dev=0)
    assert len(d.notes) == 1 and '1 test images are also labelled images' in d.notes[0]


def test_equal_sizes_are_not_equal_files(tmp_path):
    beginnings = b'x' * 20000
    for name, end in (('a', b'1'), ('b', b'2'), ('c', b'1')):
        (tmp_path / name).write_bytes(beginnings + end)
    a, b, c = (tmp_path / name for name in 'abc')
    assert same_files([a], [b, c, None, tmp_path / 'gone']) == {1: 0}
    assert same_files([], [a]) == {} and same_files([a, None], []) == {}


def test_files_without_overlap_keep_their_order(shop):
    noise(shop / 'more' / 'n.png', 50)
    d = build_data(DataConfig(data=str(shop), unlabelled=str(shop / 'more'), count=2, dev=1))
    train = open_dataset(str(shop), 'train')
    assert d.notes == [] and len(d.unlabelled) == 6
    rest = [train.index_of(i) for i in d.split.unlabelled]
    assert image_files(d.unlabelled)[:5] == image_files(Subset(train, rest))


# ---- 2: background images


def drawn(d):
    loader = SemiLoader(d.labelled, n_labelled=2, num_workers=0, keep_empty=True)
    return {d.labelled.ids[i] for t in range(40) for _, i in loader.draws(t)[0]}


@pytest.mark.parametrize('how, expected', [('negatives', 6), ('left_out', 3)])
def test_background_images(tmp_path, how, expected):
    files = [f'{n}.png' for n in range(6)]
    for n, f in enumerate(files):
        noise(tmp_path / 'images' / f, n)
    coco(tmp_path / 'instances_train.json', files, [2, 0, 1, 0, 1, 0])
    d = quiet_build(data=str(tmp_path), dev=0, background=how)
    assert len(d.labelled) == expected and len(drawn(d)) == expected
    assert any('3 labelled images without a box' in n for n in d.notes)
    samples = [d.labelled[i] for i in range(expected)]
    assert sum(len(s.boxes) == 0 for s in samples) == expected - 3


def test_images_with_crowds_only_are_no_negatives(tmp_path):
    for n in range(3):
        noise(tmp_path / 'images' / f'{n}.png', n)
    path = tmp_path / 'instances_train.json'
    coco(path, [f'{n}.png' for n in range(3)], [1, 1, 0])
    data = json.loads(path.read_text())
    data['annotations'][1]['iscrowd'] = 1
    path.write_text(json.dumps(data))
    d = quiet_build(data=str(tmp_path), dev=0)
    assert sorted(d.labelled.ids) == [0, 2]
    assert any('1 labelled images have only boxes to be ignored' in n for n in d.notes)


def test_only_background_images_is_an_error(tmp_path):
    noise(tmp_path / 'images' / '0.png', 0)
    noise(tmp_path / 'images' / '1.png', 1)
    coco(tmp_path / 'instances_train.json', ['0.png', '1.png'], [1, 0])
    train = open_dataset(str(tmp_path), 'train')
    from semidetr.train.run_data import drawn_positions

    assert drawn_positions(train, [0, 1]) == ([0, 1], 1)
    with pytest.raises(DataError, match='no labelled image has a box'):
        drawn_positions(train, [1])


def test_presets_and_hashes_of_the_setting():
    assert preset('small').data.background == preset('digits').data.background == 'negatives'
    assert {preset(p).data.background for p in ('coco-1', 'coco-10', 'coco-full', 'voc')} == {'left_out'}
    for name, other in (('small', 'left_out'), ('coco-10', 'negatives')):
        usual = preset(name)
        assert config_hash(usual) != config_hash(override(usual, [f'data.background={other}']))


def test_without_background_images_batches_are_those_of_before():
    d = build_data(DataConfig(data='digits:n=30', count=12, dev=4))
    train = open_dataset('digits:n=30', 'train')
    before = Subset(train, [train.index_of(i) for i in d.split.labelled])
    a, b = (SemiLoader(x, n_labelled=3, num_workers=0, keep_empty=True) for x in (d.labelled, before))
    assert a.draws(5) == b.draws(5)
    assert torch.equal(a.batch(5)['labelled']['images'], b.batch(5)['labelled']['images'])


# ---- 3: pixel scale


def gray(image):
    return np.asarray(image)[..., 0].tolist()


def test_two_dark_16_bit_images_get_one_scale(tmp_path):
    for name, values in (('a', [[0, 200]]), ('b', [[200, 300]]), ('c', [[512, 65535]])):
        Image.fromarray(np.array(values, np.uint16)).save(tmp_path / f'{name}.png')
    assert [gray(load_image(tmp_path / f'{n}.png')) for n in 'abc'] == [[[0, 0]], [[0, 1]], [[2, 255]]]
    assert [gray(load_image(tmp_path / f'{n}.png', white=400)) for n in 'abc'] == [
        [[0, 128]],
        [[128, 191]],
        [[255, 255]],
    ]


@pytest.mark.parametrize('white', [0, 4095])
def test_paths_objects_and_arrays_of_16_bits_agree(tmp_path, white):
    values = np.linspace(0, 4095, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / 'x.png')
    kinds = [tmp_path / 'x.png', Image.open(tmp_path / 'x.png'), values]
    first, *others = [np.asarray(as_sample(k, white).image) for k in kinds]
    assert first.max() == (255 if white else 15)
    assert all((first == o).all() for o in others)


@pytest.mark.parametrize('white', [1.0, 255.0, 65535.0])
def test_floats_need_white_and_then_agree(tmp_path, white):
    values = np.linspace(0, white, 16, dtype=np.float32).reshape(4, 4)
    Image.fromarray(values).save(tmp_path / 'x.tif')
    kinds = [tmp_path / 'x.tif', Image.open(tmp_path / 'x.tif'), values]
    for k in kinds:
        with pytest.raises(DataError, match='data.white'):
            as_sample(k)
        assert gray(as_sample(k, white).image) == (np.arange(16) * 17).reshape(4, 4).tolist()


def test_white_of_a_run_reaches_all_its_parts(tmp_path):
    for n in range(4):
        (tmp_path / 'images').mkdir(exist_ok=True)
        Image.fromarray(np.full((40, 40), 0.2 * (n + 1), np.float32)).save(tmp_path / 'images' / f'{n}.tif')
    coco(tmp_path / 'instances_train.json', [f'{n}.tif' for n in range(4)])
    with pytest.raises(DataError, match='data.white'):
        quiet_build(data=str(tmp_path), count=1, dev=1).labelled[0]
    d = quiet_build(data=str(tmp_path), count=1, dev=1, white=1.0)
    got = {s.image_id: gray(s.image)[0][0] for p in (d.labelled, d.unlabelled, d.dev) for s in p}
    assert got == {0: 51, 1: 102, 2: 153, 3: 204}


# ---- 9: limits


def test_limits(tmp_path):
    noise(tmp_path / 'images' / '0.png', 0)
    noise(tmp_path / 'images' / '1.png', 1)
    coco(tmp_path / 'instances_train.json', ['0.png', '1.png'], [150, 100])
    ds = open_dataset(str(tmp_path), 'train')
    few, ap = limits(ds, queries=100)
    assert '1 images have more than 100 objects (up to 150)' in few and 'num_queries=150' in few
    assert '--max-dets' in ap
    assert limits(ds, queries=150) == [ap] and limits(Subset(ds, [1]), queries=100) == []


# ---- 12: broken images


@pytest.mark.parametrize('kind', ['cut', 'gone', 'empty'])
def test_a_broken_unlabelled_image_is_skipped_up_to_a_bound(shop, kind):
    more = shop / 'more'
    for n in range(5):
        noise(more / f'{n}.png', 70 + n)
    d = quiet_build(data=str(shop), unlabelled=str(more), dev=2, skip_broken=1)
    strict = quiet_build(data=str(shop), unlabelled=str(more), dev=2, skip_broken=0)

    def spoil(f):
        if kind == 'gone':
            (more / f).unlink()
        else:
            (more / f).write_bytes((more / f).read_bytes()[:900] if kind == 'cut' else b'')

    spoil('3.png')
    with pytest.raises(DataError, match='3.png'):
        strict.unlabelled[3]
    with pytest.warns(UserWarning, match='3.png.*skipped .1 of at most 1'):
        assert d.unlabelled[3].image_id == d.unlabelled.ids[4]
    assert d.unlabelled[3].image_id == d.unlabelled.ids[4]
    spoil('0.png')
    with pytest.raises(DataError, match='0.png.*more than data.skip_broken=1'):
        d.unlabelled[0]


def test_labelled_images_are_never_skipped(shop):
    d = quiet_build(data=str(shop), dev=2, skip_broken=5)
    (shop / 'images' / '000.png').write_bytes(b'')
    (shop / 'images' / '001.png').write_bytes(b'')
    (shop / 'images' / '002.png').write_bytes(b'')
    with pytest.raises(DataError, match='cannot be read'):
        list(d.labelled)


# ---- 15: classes by name


def test_the_same_classes_in_another_order_are_mapped(shop):
    names = [f'v{n:03}.png' for n in range(4)]
    plain = open_dataset(str(shop), 'val')
    coco(shop / 'instances_val.json', names, classes=('square', 'bar'), folder='images/')
    turned = open_dataset(str(shop), 'val')
    d = quiet_build(data=str(shop), dev=2)
    assert d.val.classes == ['bar', 'square'] and 'by name' in d.notes[0]
    for i in range(4):
        name = turned.classes[int(turned.annotation(i)['labels'][0])]
        assert d.val.classes[int(d.val.annotation(i)['labels'][0])] == name
        assert d.val[i].labels.tolist() == d.val.annotation(i)['labels'].tolist()
        assert d.val[i].labels.tolist() != plain[i].labels.tolist()


def test_classes_of_one_side_are_said(shop):
    names = [f'v{n:03}.png' for n in range(4)]
    coco(shop / 'instances_val.json', names, classes=('square', 'ring'), folder='images/')
    d = quiet_build(data=str(shop), dev=2)
    assert "it has no class 'bar'" in d.notes[0] and "the run has no class 'ring'" in d.notes[0]
    assert [d.val.annotation(i)['labels'].tolist() for i in range(4)] == [[1], [], [1], []]
    assert all(len(d.val[i].boxes) == len(d.val[i].labels) for i in range(4))


def test_no_common_class_is_an_error(shop):
    val = open_dataset(str(shop), 'val')
    with pytest.raises(DataError, match='none of its classes'):
        by_name(val, ['dog', 'cat'])
    same = by_name(val, list(val.classes))
    assert same == (val, '') and by_name(Unlabelled(val), ['bar', 'square'])[1] == ''
