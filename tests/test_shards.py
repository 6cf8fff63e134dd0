"Unlabelled images in tar files: the same images, draws and batches as from a folder; damaged archives."

import io, json, os, random, tarfile
import pytest, torch
from PIL import Image
from semidetr.core import DataError
from semidetr.data import shards
from semidetr.data.augment import ViewConfig
from semidetr.data.catalog import open_dataset, read_source
from semidetr.data.datasets import ImageFolder, Joined, Subset, Unlabelled
from semidetr.data.digits import DigitsScenes
from semidetr.data.doctor import check_dataset
from semidetr.data.files import read_size
from semidetr.data.loader import SemiLoader
from semidetr.data.shards import ShardImages, index_shard, shard_range
from semidetr.train.config import DataConfig
from semidetr.train.run_data import SkipBroken, build_data, with_white

SIZES = [(40 + 3 * n, 33 + n % 4) for n in range(11)]


def add(tar, name, content=b'x', **fields):
    "A member of an archive"
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for k, v in fields.items():
        setattr(member, k, v)
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def both(tmp_path):
    "The same eleven images as a folder and as three shards"
    rng, names = random.Random(0), []
    for n, size in enumerate(SIZES):
        names.append(f'{n:02}.{"png" if n % 2 else "jpg"}')
        path = tmp_path / 'photos' / names[-1]
        path.parent.mkdir(exist_ok=True)
        Image.frombytes('RGB', size, rng.randbytes(3 * size[0] * size[1])).save(path)
    (tmp_path / 'tars').mkdir()
    for k, part in enumerate((names[:4], names[4:5], names[5:])):
        with tarfile.open(tmp_path / f'tars/pool-{k:03}.tar', 'w') as tar:
            for name in part:
                add(tar, name, (tmp_path / 'photos' / name).read_bytes())
    return tmp_path / 'photos', tmp_path / 'tars'


def loader(pool, **more):
    labelled = DigitsScenes(n=4, size=64)
    view = ViewConfig(short_sides=(48, 56), max_side=80, eval_short=48, erase_patches=(0, 1))
    return SemiLoader(labelled, Unlabelled(pool), 1, 3, view, seed=3, **(dict(num_workers=0) | more))


def equal(a, b):
    "Two batches"
    assert a.keys() == b.keys() == {'labelled', 'weak', 'strong'}
    for part in a:
        assert torch.equal(a[part]['images'], b[part]['images']) and torch.equal(
            a[part]['mask'], b[part]['mask']
        )
        for s, t in zip(a[part]['targets'], b[part]['targets']):
            assert (
                s['image_id'] == t['image_id']
                and torch.equal(s['matrix'], t['matrix'])
                and s['size'] == t['size']
            )


@pytest.mark.parametrize('given', ['folder', 'range', 'file'])
def test_batches_are_those_of_a_folder(both, given):
    photos, tars = both
    spec = dict(folder=tars, range=tars / 'pool-{000..002}.tar', file=tars / 'all.tar')[given]
    if given == 'file':
        with tarfile.open(spec, 'w') as tar:
            tar.add(photos, arcname='.')  # './00.jpg', and an entry for the folder
    pool, folder = open_dataset(str(spec)), open_dataset(str(photos))
    assert isinstance(pool, ShardImages) and sorted(pool.ids) == list(folder.ids) and pool.notes == []
    if given == 'file':  # in the order of the archive
        folder = Subset(folder, [folder.index_of(i) for i in pool.ids])
    first, second = loader(folder), loader(pool)
    for t in range(9):  # more than two epochs
        equal(next(first), next(second))


@pytest.mark.parametrize('workers', [0, 2])
def test_a_run_goes_on_in_the_middle(both, workers):
    _, tars = both
    whole, pool = loader(open_dataset(str(tars))), open_dataset(str(tars))
    expected = [next(whole) for _ in range(7)]
    with loader(pool, num_workers=workers) as first:
        for t in range(4):
            equal(next(first), expected[t])
        state = first.state_dict()
    with loader(open_dataset(str(tars)), num_workers=workers) as again:
        again.load_state_dict(state)
        for t in range(4, 7):
            equal(next(again), expected[t])


def test_two_processes_share_the_pool(both):
    _, tars = both
    drawn = [
        loader(open_dataset(str(tars)), rank=rank, world=2).draws(t)[1] for t in range(4) for rank in range(2)
    ]
    numbers = sorted(k for part in drawn for k, _ in part)
    assert numbers == list(range(24)) and {i for part in drawn for _, i in part} == set(range(11))


def test_names_in_the_folder_of_data_sets(both, monkeypatch):
    _, tars = both
    monkeypatch.setenv('SEMIDETR_DATA', str(tars.parent))
    assert len(open_dataset('tars/pool-{000..002}.tar')) == len(open_dataset('tars')) == 11
    with pytest.raises(DataError, match='pool-003.tar: no such file; give shards that exist'):
        open_dataset('tars/pool-{000..003}.tar')


def test_ranges():
    assert shard_range('a/b-{08..11}-x.tar') == [
        'a/b-08-x.tar',
        'a/b-09-x.tar',
        'a/b-10-x.tar',
        'a/b-11-x.tar',
    ]
    assert shard_range('a.tar') is shard_range('{a..b}.tar') is shard_range('{1..2}.zip') is None
    for wrong in ('{3..2}.tar', '{0..999999999}.tar'):
        with pytest.raises(DataError, match='shards; give 1 to 100,000'):
            shard_range(wrong)


def test_what_is_left_out_is_counted_and_said(both, tmp_path):
    photos, _ = both
    picture, path = (photos / '00.jpg').read_bytes(), tmp_path / 'mixed.tar'
    with tarfile.open(path, 'w', format=tarfile.GNU_FORMAT) as tar:
        add(tar, 'a/', b'', type=tarfile.DIRTYPE)
        add(tar, 'a/1.jpg', picture)
        add(tar, 'a/1.json')
        add(tar, 'a/1.cls')
        add(tar, 'a/2.json')
        add(tar, 'a/.hidden.jpg', picture)
        add(tar, '__MACOSX/a.jpg', picture)
        add(tar, 'link.jpg', b'', type=tarfile.SYMTYPE, linkname='/etc/passwd')
        add(tar, 'hard.jpg', b'', type=tarfile.LNKTYPE, linkname='a/1.jpg')
        add(tar, 'pipe.jpg', b'', type=tarfile.FIFOTYPE)
        add(tar, '../../x\x1b[31m.png', picture)
        add(tar, 'n' * 150 + '.JPG', picture)
    ds = open_dataset(str(path))
    assert list(ds.ids) == ['a/1.jpg', '../../x\\x1b[31m.png', 'n' * 150 + '.JPG']
    assert all(ds[i].image.size == SIZES[0] for i in range(3))
    assert len(ds.notes) == 1 and 'not read as images: 3 links or devices, 2 .json, 1 .cls' in ds.notes[0]
    report = check_dataset(str(path))
    assert [f.kind for f in report.faults if f.level != 'info'][:1] == ['skipped-files'] and not report.errors
    assert report.counts['images'] == 3 and sum(f.kind == 'duplicate-image' for f in report.faults) == 2


def test_images_beside_archives_are_a_folder(both):
    photos, tars = both
    (photos / 'old.tar').write_bytes((tars / 'pool-000.tar').read_bytes())
    ds = open_dataset(str(photos))
    assert not isinstance(ds, ShardImages) and len(ds) == 11 and '1 .tar' in ds.notes[0]


@pytest.mark.parametrize('size', [0, 100, 511, 700, 2000, -11_000, -12_000])
def test_an_archive_that_breaks_off(both, tmp_path, size):
    _, tars = both
    raw = (tars / 'pool-000.tar').read_bytes()
    path = tmp_path / 'cut.tar'
    path.write_bytes(raw[:size])
    try:
        ds = open_dataset(str(path))
    except DataError as e:
        assert str(path) in str(e) and '\n' not in str(e) and size in (0, 100, 511, 700, 2000)
        return
    assert any('break off' in note for note in ds.notes)
    for i in range(len(ds)):
        ds[i]  # what is listed can be read


def test_random_damage_is_a_line_or_nothing(both, tmp_path):
    _, tars = both
    raw, rng, path = (tars / 'pool-002.tar').read_bytes(), random.Random(2), tmp_path / 'damaged.tar'
    for _ in range(300):
        new = bytearray(raw)
        for _ in range(rng.choice([1, 3, 30])):
            at = rng.randrange(0, len(new), 512) + rng.randrange(512 if rng.random() < 0.2 else 160)
            new[min(at, len(new) - 1)] = rng.randrange(256)
        path.write_bytes(new[: rng.choice([len(new), rng.randrange(len(new))])])
        try:
            ds = ShardImages([path])
            for i in range(len(ds)):
                ds[i]
        except DataError as e:
            assert '\n' not in str(e)


@pytest.mark.parametrize('mode', ['w:gz', 'w:xz'])
def test_a_compressed_archive_is_refused(both, tmp_path, mode):
    with tarfile.open(tmp_path / 'a.tar', mode) as tar:
        add(tar, 'a.jpg')
    with pytest.raises(DataError, match='a shard is a plain tar file, not a compressed one'):
        open_dataset(str(tmp_path / 'a.tar'))


def test_no_image_in_archives(tmp_path):
    with tarfile.open(tmp_path / 'a.tar', 'w') as tar:
        add(tar, 'a.txt')
    with pytest.raises(DataError, match='no image in 1 tar files'):
        open_dataset(str(tmp_path / 'a.tar'))
    with pytest.raises(DataError, match='--images'):
        open_dataset(str(tmp_path / 'a.tar'), images=str(tmp_path))
    os.mkfifo(tmp_path / 'p.tar')
    with pytest.raises(DataError, match='pipe or a device'):
        open_dataset(str(tmp_path / 'p.tar'))
    with pytest.raises(DataError, match='no such file'):
        index_shard(tmp_path / 'p.tar')


def test_a_broken_image_can_be_skipped(both, tmp_path):
    photos, _ = both
    path = tmp_path / 'b.tar'
    with tarfile.open(path, 'w') as tar:
        add(tar, 'a.jpg', (photos / '00.jpg').read_bytes())
        add(tar, 'b.jpg', b'no image')
    ds = open_dataset(str(path))
    with pytest.raises(DataError, match=r"b.tar: image 'b.jpg' cannot be read .*data.skip_broken=1"):
        ds[1]
    assert check_dataset(str(path)).errors[0].kind == 'unreadable-image'
    with pytest.warns(UserWarning, match='skipped'):
        assert SkipBroken(Unlabelled(ds), 1)[1].size == ds[0].size


def test_a_name_that_occurs_twice(both):
    _, tars = both
    path = tars / 'pool-001.tar'
    ds = ShardImages([path, path, path])
    assert (
        ds.ids == ['04.jpg', 'pool-001.tar/04.jpg', 'pool-001.tar/2/04.jpg'] and ds.index_of(ds.ids[2]) == 2
    )


def test_limits_and_white(both, tmp_path, monkeypatch):
    photos, tars = both
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1500)
    ds = open_dataset(str(tars))
    with pytest.raises(DataError, match='too large, not broken'):
        ds[5]
    monkeypatch.setattr(shards, '_LARGEST', 10)
    with pytest.raises(DataError, match='no image'):
        open_dataset(str(tars))
    monkeypatch.undo()
    Image.new('I', (50, 50), 900).save(tmp_path / 'deep.tif')
    with tarfile.open(tmp_path / 'deep.tar', 'w') as tar:
        tar.add(tmp_path / 'deep.tif', arcname='deep.tif')
    deep = open_dataset(str(tmp_path / 'deep.tar'))
    with pytest.raises(DataError, match='set data.white'):
        deep[0]
    assert with_white(deep, 1000)[0].image.getpixel((0, 0)) == (230, 230, 230)


def test_shards_join_other_images(both):
    photos, tars = both
    pool = Joined([Unlabelled(ImageFolder(photos)), Unlabelled(open_dataset(str(tars)))])
    assert len(pool) == 22 and len(set(pool.ids)) == 22
    assert pool[11].image.tobytes() == pool[0].image.tobytes()
    assert read_source(str(tars)).data['images'][0]['file_name'] == '00.jpg'


def test_images_of_other_roles_leave_a_pool_in_shards(both, tmp_path):
    "By their bytes, whatever their names are; one of equal size with other bytes stays"
    photos, tars = both
    data, images = tmp_path / 'data', [sorted(photos.iterdir())[k] for k in (0, 4, 7)]
    for part, chosen in (('train', images[:2]), ('val', images[2:])):
        rows = [dict(id=k, file_name=f'{part}/new {k}.png', width=48, height=48) for k in range(len(chosen))]
        for row, image in zip(rows, chosen):
            path = data / 'images' / row['file_name']
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image.read_bytes())
            row['height'], row['width'] = read_size(path)
        boxes = [dict(id=k, image_id=k, category_id=1, bbox=[1, 1, 9, 9]) for k in range(len(rows))]
        content = dict(images=rows, annotations=boxes, categories=[dict(id=1, name='x')])
        (data / f'instances_{part}.json').write_text(json.dumps(content))
    twin = bytearray(images[1].read_bytes())
    twin[-1] ^= 1
    with tarfile.open(tars / 'pool-000.tar', 'a') as tar:
        add(tar, 'twin.jpg', bytes(twin))
    made = build_data(DataConfig(data=str(data), unlabelled=str(tars), dev=0))
    assert len(made.unlabelled) == 12 - 3 and 'twin.jpg' in list(made.unlabelled.ids)
    (line,) = [n for n in made.notes if 'leave the unlabelled pool' in n]
    assert '3 of 12 images' in line and '2 labelled, 1 test' in line
    assert f"{tars / 'pool-000.tar'}: 00.jpg is {data / 'images/train/new 0.png'}" in line
