"""What it costs to open a large annotation file: CPU seconds and peak memory.

A COCO file of N images and 10 N boxes is written with a fixed seed, beside an empty file for each image, as
opening reads no pixels. Each opening has a process of its own. The seconds are from the call to the open data
set, without imports; memory is the peak of the process, and how far it is above what the process had before
the call. The record holds medians over the openings.

    python benchmarks/open_large.py                                       # 100,000 images
    python benchmarks/open_large.py --images 2000 --out record.json
"""

import argparse, json, os, random, resource, statistics, subprocess, sys, tempfile, time
from pathlib import Path

BOXES, CLASSES, WIDTH, HEIGHT = 10, 80, 640, 480  # boxes per image; classes; pixels


def write_set(root, images):  # number of images; -> its annotation file
    "A synthetic COCO data set whose images are empty files"
    rng = random.Random(0)
    (root / 'images').mkdir(parents=True)
    names = [f'{i:08}.jpg' for i in range(images)]
    for name in names:
        (root / 'images' / name).touch()
    rows = [dict(id=i, file_name=name, width=WIDTH, height=HEIGHT) for i, name in enumerate(names)]
    boxes = []
    for k in range(BOXES * images):
        w, h = rng.uniform(4, 200), rng.uniform(4, 200)
        x, y = rng.uniform(0, WIDTH - w), rng.uniform(0, HEIGHT - h)
        box = [round(v, 2) for v in (x, y, w, h)]
        row = dict(id=k, image_id=rng.randrange(images), category_id=rng.randrange(CLASSES), bbox=box)
        boxes.append(row | dict(area=round(w * h, 2), iscrowd=0))
    categories = [dict(id=i, name=f'class {i}') for i in range(CLASSES)]
    path = root / 'instances_train.json'
    path.write_text(json.dumps(dict(images=rows, annotations=boxes, categories=categories)))
    return path


def peak_mb():
    "Peak memory of this process in MB of 2^20 bytes"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == 'darwin' else 1024)


def open_once(root):  # -> counts, CPU seconds and memory in MB
    "Open the data set in this process"
    from semidetr.data.catalog import open_dataset

    open_dataset('digits:n=2,size=64')  # imports and tables that every data set needs
    before, start = peak_mb(), time.process_time()
    ds = open_dataset(str(root))
    seconds, peak = time.process_time() - start, peak_mb()
    boxes = sum(len(ds.annotation(i)['boxes']) for i in range(len(ds)))
    return dict(images=len(ds), boxes=boxes, seconds=seconds, peak_mb=peak, above_mb=peak - before)


def measure(images, rounds=3):  # -> a record
    "Write the data set and open it in a new process, several times"
    with tempfile.TemporaryDirectory(prefix='open-large-') as folder:
        root = Path(folder) / 'set'
        size = write_set(root, images).stat().st_size
        command, turns = [sys.executable, __file__, '--child', str(root)], []
        for _ in range(rounds):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f'opening failed: {done.stderr.strip()[-400:]}')
            turns.append(json.loads(done.stdout.splitlines()[-1]))
    return summary(turns) | dict(file_mb=round(size / 2**20, 1), load=round(os.getloadavg()[0], 2))


def summary(turns):  # results of `open_once`
    "Medians over the turns, which must have opened the same"
    counts = {(t['images'], t['boxes']) for t in turns}
    if len(counts) > 1:
        sys.exit(f'openings differ: {counts}')
    median = {k: statistics.median(t[k] for t in turns) for k in ('seconds', 'peak_mb', 'above_mb')}
    about = dict(images=turns[0]['images'], boxes=turns[0]['boxes'], rounds=len(turns))
    about |= dict(cpu_seconds=round(median['seconds'], 3))
    about |= dict(peak_mb=round(median['peak_mb']), above_mb=round(median['above_mb']))
    return about | dict(python=sys.version.split()[0])


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--images', type=int, default=100_000, help='how many; ten times as many boxes')
    p.add_argument('--rounds', type=int, default=3, help='openings')
    p.add_argument('--out', type=Path, help='write the record, as JSON')
    p.add_argument('--child', type=Path, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.child:
        print(json.dumps(open_once(a.child)))
        return
    record = measure(a.images, a.rounds)
    print(json.dumps(record))
    if a.out:
        a.out.write_text(json.dumps(record, indent=1) + '\n')


if __name__ == '__main__':
    main()
