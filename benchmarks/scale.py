"""What size costs: opening large annotation files, and the steps before the first picture of `predict`.

For each number of images N, a COCO file of N images and 10 N boxes is written with a fixed seed, beside an
empty file for each image, as opening reads no pixels. It is opened in processes of their own: `parsed` fills
an empty cache, `cached` finds its columns there. The seconds are from the call to the open data set, without
imports; memory is the peak of the process, and how far that is above what the process had before the call.

For `predict`, a folder of N images of 4 x 4 pixels is given, and a stub in place of the network stops at the
first image that it is asked for.

Rows that are in the record and were not measured again stay.

    python benchmarks/scale.py                          # 10^3 .. 10^6 images, 10^2 .. 10^4 files
    python benchmarks/scale.py --images 1000 --files 100 --out record.json
"""

import argparse, io, json, os, random, resource, statistics, subprocess, sys, tarfile, tempfile, time
from pathlib import Path
from timing import machine

BOXES, CLASSES, WIDTH, HEIGHT = 10, 80, 640, 480  # boxes per image; classes; pixels
IMAGES, FILES = (1_000, 10_000, 100_000, 1_000_000), (100, 1_000, 10_000)
RECORD = Path(__file__).parent / 'results' / 'scale.json'


def rows_of(images):  # number of images; -> iterator of text: the parts of a COCO file
    "A synthetic COCO file, a piece at a time"
    rng = random.Random(0)
    yield '{"images": ['
    for i in range(images):
        row = dict(id=i, file_name=f'{i:08}.jpg', width=WIDTH, height=HEIGHT)
        yield (', ' if i else '') + json.dumps(row)
    yield '], "annotations": ['
    for k in range(BOXES * images):
        w, h = rng.uniform(4, 200), rng.uniform(4, 200)
        box = [round(v, 2) for v in (rng.uniform(0, WIDTH - w), rng.uniform(0, HEIGHT - h), w, h)]
        row = dict(id=k, image_id=rng.randrange(images), category_id=rng.randrange(CLASSES), bbox=box)
        yield (', ' if k else '') + json.dumps(row | dict(area=round(w * h, 2), iscrowd=0))
    categories = [dict(id=i, name=f'class {i}') for i in range(CLASSES)]
    yield f'], "categories": {json.dumps(categories)}}}'


def write_set(root, images):  # number of images; -> its annotation file
    "A synthetic COCO data set whose images are empty files"
    (root / 'images').mkdir(parents=True)
    for i in range(images):
        os.close(os.open(root / 'images' / f'{i:08}.jpg', os.O_CREAT | os.O_WRONLY))
    path = root / 'instances_train.json'
    with open(path, 'w') as f:
        f.writelines(rows_of(images))
    return path


def write_pictures(root, files):  # number of files
    "A folder of images of 4 x 4 pixels"
    from PIL import Image

    root.mkdir(parents=True)
    Image.new('RGB', (4, 4), (90, 120, 60)).save(root / '0.png')
    content = (root / '0.png').read_bytes()
    for i in range(files):
        (root / f'{i}.png').write_bytes(content)


def peak_mb():
    "Peak memory of this process in MB of 2^20 bytes"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == 'darwin' else 1024)


def timed(job):  # -> its result, and what it took
    "Call a function"
    before, wall, start = peak_mb(), time.perf_counter(), time.process_time()
    value = job()
    spent = dict(cpu_seconds=time.process_time() - start, seconds=time.perf_counter() - wall)
    return value, spent | dict(peak_mb=peak_mb(), above_mb=peak_mb() - before)


def open_once(root):  # -> counts, seconds and memory in MB
    "Open the data set in this process"
    from semidetr.data.catalog import open_dataset

    open_dataset('digits:n=2,size=64')  # imports and tables that every data set needs
    ds, spent = timed(lambda: open_dataset(str(root)))
    return dict(images=len(ds), boxes=len(ds._packed['boxes'])) | spent


def predict_once(root):  # -> number of files, seconds and memory in MB
    "All that `predict` does before its network is asked for the first image"
    from semidetr.train.predict_files import predict_folder

    class First(Exception):
        pass

    class Stub:
        classes = ['thing']

        def files(self, folder, files, batch, broken, progress):
            raise First(len(files))

    def job():
        try:
            predict_folder(Stub(), root, root / 'out')
        except First as e:
            return e.args[0]

    files, spent = timed(job)
    return dict(files=files) | spent


def pool_once(root):  # -> number of images in one shard, seconds and memory in MB
    "Index a shard, and draw the first image of a pool that is a thousand times as large"
    from semidetr.data.loader import draw_index
    from semidetr.data.shards import ShardImages

    pool, spent = timed(lambda: ShardImages([root / 'pool.tar']))
    drawn, draw = timed(lambda: draw_index(0, 'unlabelled', 1000 * len(pool), 0))
    return dict(images=len(pool), first=drawn) | spent | dict(draw_seconds=draw['cpu_seconds'])


CHILD = dict(open=open_once, predict=predict_once, pool=pool_once)


def child(what, root, cache):  # 'open' or 'predict', its folder, folder of the cache or 'off'
    "One measurement in a process of its own"
    command = [sys.executable, __file__, '--child', what, str(root)]
    kept = dict(SEMIDETR_ANNOTATIONS='off') if cache == 'off' else dict(SEMIDETR_CACHE=str(cache))
    env = os.environ | dict(SEMIDETR_ANNOTATIONS='') | kept
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(f'{what} failed: {done.stderr.strip()[-400:]}')
    return json.loads(done.stdout.splitlines()[-1])


MEASURED = ('cpu_seconds', 'seconds', 'draw_seconds', 'peak_mb', 'above_mb')


def summary(turns):  # results of one child, several times
    "Medians over the turns, which must have found the same"
    counts = [{k: v for k, v in t.items() if k not in MEASURED} for t in turns]
    if any(c != counts[0] for c in counts):
        sys.exit(f'turns differ: {counts}')
    median = {k: statistics.median(t[k] for t in turns) for k in MEASURED if k in turns[0]}
    return (
        counts[0]
        | {k: round(v, 3 if 'seconds' in k else 0) for k, v in median.items()}
        | dict(turns=len(turns))
    )


def measure_open(images, rounds):  # -> rows: one for the first opening, one for those with a cache
    "Write a data set, and open it without and with columns in the cache"
    with tempfile.TemporaryDirectory(prefix='scale-') as folder:
        root, cache = Path(folder) / 'set', Path(folder) / 'cache'
        size = write_set(root, images).stat().st_size
        first = summary([child('open', root, cache)])
        again = summary([child('open', root, cache) for _ in range(rounds)])
        kept = sum(f.stat().st_size for f in cache.rglob('*') if f.is_file())
    about = dict(file_mb=round(size / 2**20, 1), cache_mb=round(kept / 2**20, 1))
    return [dict(case='parsed') | about | first, dict(case='cached') | about | again]


def measure_predict(files, rounds):  # -> rows: one
    "Time to the first image of a folder"
    with tempfile.TemporaryDirectory(prefix='scale-') as folder:
        write_pictures(Path(folder) / 'set', files)
        turns = [child('predict', Path(folder) / 'set', 'off') for _ in range(rounds)]
    return [dict(case='predict') | summary(turns)]


def measure_pool(images, rounds):  # -> rows: one
    "Index of a shard of tiny images"
    with tempfile.TemporaryDirectory(prefix='scale-') as folder:
        root = Path(folder) / 'set'
        write_pictures(root, 1)
        content = (root / '0.png').read_bytes()
        with tarfile.open(root / 'pool.tar', 'w') as tar:
            for i in range(images):
                member = tarfile.TarInfo(f'{i:08}.png')
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        return [dict(case='pool') | summary([child('pool', root, 'off') for _ in range(rounds)])]


def merged(rows, old):  # rows of this call, rows of the record that is there
    "Rows that were measured again replace the old ones"
    key = lambda r: (r['case'], r.get('images', r.get('files')))
    new = {key(r) for r in rows}
    return sorted([r for r in old if key(r) not in new] + rows, key=key)


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument(
        '--images', type=int, nargs='*', default=IMAGES, help='of the data sets; ten times as many boxes'
    )
    p.add_argument('--files', type=int, nargs='*', default=FILES, help='of the folders to predict on')
    p.add_argument('--pool', type=int, nargs='*', default=[10_000], help='images of the shards')
    p.add_argument('--rounds', type=int, default=3, help='openings with a cache, and predictions')
    p.add_argument('--out', type=Path, default=RECORD, help='write the record, as JSON')
    p.add_argument('--child', nargs=2, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.child:
        print(json.dumps(CHILD[a.child[0]](Path(a.child[1]))))
        return
    rows = []
    jobs = (measure_pool, a.pool), (measure_predict, a.files), (measure_open, a.images)
    for measure, sizes in jobs:
        for n in sizes:
            found = measure(n, a.rounds)
            rows += found
            print(*map(json.dumps, found), sep='\n', flush=True)
    old = json.loads(a.out.read_text())['rows'] if a.out.exists() else []
    rows = merged(rows, old)
    record = dict(what='scale', machine=machine(), load_after=round(os.getloadavg()[0], 2), rows=rows)
    a.out.write_text(json.dumps(record, indent=1) + '\n')


if __name__ == '__main__':
    main()
