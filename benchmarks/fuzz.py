"""Fuzz every reader: mutations of valid data sets open with the right boxes, or raise one DataError.

An input is a small valid data set of one format in which one file, or one part of the folder, is changed. It
may open, and then every box is the one that the changed file gives (an oracle below computes it from the
bytes); or it raises a `DataError` (`ConfigError` for settings) of one line that names a file of the set.
The same holds for what is no data set: settings, overrides and options of the command line, splits, index
lists, studies, results, records, logs, checkpoints, weights and notebooks. Other exceptions, wrong boxes,
and inputs that take more than ten seconds or a gigabyte are findings. Input number n of a format depends on
n alone:

    python benchmarks/fuzz.py                      # 300,000 inputs, on all cores
    python benchmarks/fuzz.py --case coco:4711     # one of them, with its traceback
    python benchmarks/fuzz.py --out record.json    # counts, findings, seconds and the first number, in a file
"""

import argparse, io, json, math, os, random, re, resource, shutil, signal, sys, tempfile, time
import traceback, warnings
import xml.etree.ElementTree as ET
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
import torch
from PIL import Image
from safetensors.torch import save_file
from semidetr.cli.terminal import read_options, read_seeds
from semidetr.core import ConfigError, DataError
from semidetr.data.catalog import open_dataset
from semidetr.data.doctor import check_dataset
from semidetr.data.splits import load_split, read_index_list, save_split
from semidetr.data.splits import make_split as make_part
from semidetr.detectors.weight_files import read_weights
from semidetr.lab.ablate import check_notebook, seed_line, steps_done
from semidetr.lab.dry_run import measured_memory
from semidetr.lab.report import arm_table, published, read_records, scale_line, verdicts
from semidetr.lab.study import record as keep_record
from semidetr.lab.study import study_lines
from semidetr.text import read_lines, read_text
from semidetr.train.api import Run
from semidetr.train.checkpoint import load_checkpoint, save_checkpoint
from semidetr.train.config import Config, load_config, override, preset, to_dict
from semidetr.train.exported import from_safetensors
from semidetr.train.predict_files import read_formats

W, H = 16, 12
BOXES = [[2, 3, 5, 4], [8, 1, 6, 9], [1, 6, 3, 5]]  # the first two in image 0, the third in image 1
LIMIT = 10  # seconds of computing for one input
WAIT = 60  # seconds by the clock: what waits for ever, such as for a pipe, computes nothing
MEMORY = 10**9  # bytes that a process may take beyond what it has at its start
CASE = Path(tempfile.gettempdir()) / 'fuzz_case'  # where `--case` leaves its input
THIN = 1e-4  # pixels; in single precision thinner boxes may have no area


OUTSIDE = re.compile(r'(?m)^\s*(train|path)\W*(/|\\|\.\.)|[\s,\["\'](/|\\|\.\.)[\s,\]"\'/]')


class Hang(BaseException):
    "An input took too long"


def _alarm(*_):
    raise Hang()


def alarms(computing, waiting):
    signal.setitimer(signal.ITIMER_PROF, computing)
    signal.setitimer(signal.ITIMER_REAL, waiting)


# --- valid data sets: each function fills a folder; -> files whose content is mutated -------------------
def picture(path, n=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (W, H), (40 * n, 120, 150)).save(path, **options)


def coco_content():
    shared = ((0, 7), (0, 3), (1, 7))
    return dict(
        images=[dict(id=n, file_name=f'{n}.png', width=W, height=H) for n in range(3)],
        annotations=[
            dict(id=k, image_id=n, category_id=c, bbox=b, area=b[2] * b[3], iscrowd=int(k == 2))
            for k, ((n, c), b) in enumerate(zip(shared, BOXES))
        ],
        categories=[dict(id=7, name='dog'), dict(id=3, name='cat')],
    )


def make_coco(root):
    for n in range(3):
        picture(root / f'images/{n}.png', n)
    (root / 'instances_train.json').write_text(json.dumps(coco_content()))
    return ['instances_train.json']


def yolo_row(label, box, *more):
    x, y, w, h = box
    return ' '.join(f'{v:g}' for v in (label, (x + w / 2) / W, (y + h / 2) / H, w / W, h / H, *more))


def make_yolo(root):
    for n in range(3):
        picture(root / f'images/train/{n}.png', n)
    (root / 'labels/train').mkdir(parents=True)
    (root / 'labels/train/0.txt').write_text(f'{yolo_row(0, BOXES[0])}\n{yolo_row(1, BOXES[1])}\n')
    (root / 'labels/train/1.txt').write_text(f'{yolo_row(0, BOXES[2])}\n')
    (root / 'data.yaml').write_text('path: .\ntrain: images/train\nnc: 2\nnames:\n  0: dog\n  1: cat\n')
    return ['labels/train/0.txt', 'labels/train/1.txt']


def make_yaml(root):
    make_yolo(root)
    (root / 'train.txt').write_text('images/train/0.png\n./images/train/1.png\n')
    (root / 'data.yaml').write_text('train: train.txt\nkpt_shape: [2, 3]\nnames: [dog, cat]\n')
    return ['data.yaml', 'data.yaml', 'train.txt']


def make_beside(root):
    for n in range(2):
        picture(root / f'{n}.jpg', n)
    (root / '0.txt').write_text(f'{yolo_row(0, BOXES[0])}\n{yolo_row(1, BOXES[1])}\n')
    (root / 'classes.txt').write_text('dog\ncat\n')
    return ['0.txt', 'classes.txt']


def make_voc(root):
    (root / 'Annotations').mkdir()
    (root / 'ImageSets/Main').mkdir(parents=True)
    for n, boxes in enumerate((BOXES[:2], BOXES[2:])):
        objects = ''
        for k, (x, y, w, h) in enumerate(boxes):
            corners = f'<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax>'
            objects += f'<object><name>{("dog", "cat")[k]}</name><difficult>{k}</difficult>'
            objects += f'<bndbox>{corners}</bndbox></object>\n'
        size = f'<size><width>{W}</width><height>{H}</height><depth>3</depth></size>'
        text = f'<annotation><filename>{n}.jpg</filename>{size}{objects}</annotation>'
        (root / f'Annotations/{n}.xml').write_text(text)
        picture(root / f'JPEGImages/{n}.jpg', n)
    (root / 'ImageSets/Main/train.txt').write_text('0\n1\n')
    return ['Annotations/0.xml', 'Annotations/0.xml', 'Annotations/1.xml', 'ImageSets/Main/train.txt']


def make_folder(root):
    tag = Image.Exif()
    tag[0x0112] = 6
    picture(root / 'a.jpg', 1, exif=tag)
    picture(root / 'sub/b.png', 2)
    picture(root / 'c.tif', 3)
    picture(root / 'd.webp', 4)
    Image.new('I;16', (W, H), 900).save(root / 'e.png')
    Image.new('P', (W, H), 3).save(root / 'f.gif')
    Image.new('1', (W, H), 1).save(root / 'g.bmp')
    return ['a.jpg', 'sub/b.png', 'c.tif', 'd.webp', 'e.png', 'f.gif', 'g.bmp']


def make_lists(root):
    (root / 'list.txt').write_text('images/a.jpg\nimages/b c.jpg\n')
    return ['list.txt']


def make_settings(root):
    (root / 'config.toml').write_text('[optim]\niters = 40\nlr = 1e-3\n[data]\ndata = "digits"\n')
    return ['config.toml']


def make_split(root):
    make_coco(root)
    save_split(make_part(open_dataset(str(root)), 50, dev=1), root / 'split.json')
    return ['split.json']


def make_settings_json(root):
    values = {k: v for k, v in to_dict(preset('digits')).items() if k in ('data', 'optim', 'run', 'method')}
    (root / 'config.json').write_text(json.dumps(values, indent=1))
    return ['config.json']


def make_overrides(root):
    items = [
        'optim.lr=1e-3',
        'optim.steps=[10,20]',
        'run.amp=off',
        'view.mean=[0.5,0.5,0.5]',
        'data.data=digits',
    ]
    (root / 'overrides.txt').write_text('\n'.join([*items, 'method.T1=3', 'detector.num_classes=4']) + '\n')
    return ['overrides.txt']


def make_options(root):
    words = [
        'seeds 0,2',
        'seeds 3-4',
        'formats json,csv',
        'option timeout_min=600',
        'data digits:n=20,size=96',
    ]
    (root / 'options.txt').write_text('\n'.join(words) + '\n')
    return ['options.txt']


def make_index(root):
    make_coco(root)
    (root / 'ids.json').write_text('[0, 2]')
    (root / 'nested.json').write_text('{"50": {"0": [0]}, "100.0": {"0": [1, 0]}}')
    return ['ids.json', 'nested.json']


def make_studies(root):
    text = '[scales.smoke]\nlater = ["optim.iters=2"]\n[toy]\nabout = "a study"\npreset = "digits"\n'
    text += 'seeds = [0, 1]\nburn_in = ["optim.iters=4"]\n[toy.arms]\nplain = []\nfast = ["optim.lr=1e-3"]\n'
    (root / 'studies.toml').write_text(text + '[more]\nafter = "toy"\narms = {one = ["run.seed=1"]}\n')
    (root / 'results').mkdir()
    (root / 'paper_results.toml').write_text('[table]\nrows = [{name = "a", AP = 40.5}]\n')
    return ['studies.toml', 'studies.toml', 'studies.toml', 'paper_results.toml']


METRICS = dict(AP=41.5, AP50=60.0, AP_nms=41.0, per_class=dict(dog=dict(AP=41.5)))


def result_content(ap=41.5):
    return dict(
        hash='0123456789ab',
        commit='abc',
        data=dict(classes=['dog', 'cat'], labelled=3, unlabelled=9, fingerprint='f' * 16),
        metrics=dict(val=dict(teacher=METRICS | dict(AP=ap), student=METRICS)),
        config=to_dict(Config()),
        iterations=40,
        seconds=12.5,
        cpu_seconds=20,
        peak_memory_mb=700.5,
        machine='x86_64',
        health=dict(pseudo_boxes=1.5),
    )


def make_run(root):
    (root / 'run.json').write_text(json.dumps(result_content()))
    rows = [dict(step=n, loss=2.5 / n, pseudo_boxes=1) for n in range(1, 5)]
    (root / 'log.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    return ['run.json', 'log.jsonl']


def make_record(root):
    (root / 'results/toy').mkdir(parents=True)
    for seed in range(2):
        arms = dict(plain=result_content(), fast=result_content(42.5 + seed))
        about = dict(study='toy', seed=seed, burn_in=result_content(), arms=arms)
        (root / f'results/toy/seed{seed}.json').write_text(json.dumps(about))
    return ['results/toy/seed0.json', 'results/toy/seed1.json']


def make_checkpoint(root):
    weights = dict(w=torch.arange(6.0).view(2, 3), b=torch.zeros(2))
    save_checkpoint(root / 'last.pt', step=4, config=dict(run=dict(seed=1)), classes=['dog'], teacher=weights)
    return ['last.pt']


def make_weights(root):
    (root / 'config.json').write_text(json.dumps(dict(model_type='detr', id2label={'0': 'dog'}, d_model=8)))
    save_file(dict(a=torch.zeros(2)), root / 'model-1.safetensors')
    save_file(dict(b=torch.ones(3)), root / 'model-2.safetensors')
    where = dict(a='model-1.safetensors', b='model-2.safetensors')
    (root / 'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=where)))
    return ['config.json', 'model.safetensors.index.json', 'model-1.safetensors']


def make_exported(root):
    about = dict(
        semidetr='1', config=json.dumps(dict(run=dict(seed=1))), classes='["dog", "cat"]', nms='null'
    )
    save_file(dict(a=torch.zeros(2)), root / 'model.safetensors', about)
    return ['model.safetensors']


def make_notebook(root):
    words = "title = ''\nfolder = ''\nexpected = ''\nprocesses = 1\n"
    cell = dict(
        cell_type='code', metadata=dict(tags=['parameters']), source=words.splitlines(True), outputs=[]
    )
    (root / 'run.ipynb').write_text(json.dumps(dict(cells=[cell], metadata={}, nbformat=4)))
    return ['run.ipynb']


# --- mutations of content ---------------------------------------------------------------------------------
NUMBERS = (
    '0 -1 1 7 1.5 1e400 -1e9 nan inf 1e-9 0.5 99999999999 1_5 0x10 ٣ 1,5 -0 +3 007 .5 2147483648'.split()
)
VALUES = [
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    7,
    1.5,
    0.0,
    -0.0,
    1e308,
    math.nan,
    math.inf,
    10**30,
    '',
    ' ',
    '0',
    '1',
]
VALUES += [
    '7',
    '7.0',
    'nan',
    'true',
    'no',
    'maybe',
    'a\nb',
    '\0',
    '\ud800',
    'ä',
    '../x',
    '0.png',
    '.',
    '/',
    [],
    {},
]
VALUES += [[1, 2, 3, 4], [[1]], {'a': 1}, 'x' * 300, '1.png', '2 px', [0, 0, 0, 0], [1, 1, 'a', 2], '‮', '\r']
DEEP = []
for _ in range(300):
    DEEP = [DEEP]
VALUES += [10**400, DEEP, '<script>alert(1)</script>', '\x1b[31mred', '/etc/passwd', '../../../etc/passwd']
WORDS = [
    '',
    '\n',
    ' ',
    '\t',
    '\r',
    '\0',
    ',',
    ':',
    '-',
    '#',
    '"',
    "'",
    '[',
    ']',
    '{',
    '}',
    '&a',
    '*a',
    '<<: ',
]
WORDS += [
    '!!python/object:os.system',
    '| ',
    '> ',
    '%',
    '@',
    '~',
    'null',
    '.',
    '..',
    '/',
    '\\',
    '//',
    'C:',
    'dog',
]
WORDS += [
    '<object>',
    '</object>',
    '<!DOCTYPE a [<!ENTITY b "c">]>',
    '&b;',
    '<![CDATA[',
    ']]>',
    '<!--',
    '-->',
    '<?',
]
ENCODINGS = ('utf-8-sig', 'utf-16', 'utf-16-le', 'utf-16-be', 'utf-32', 'cp1252', 'gbk', 'cp037')


def mutate_bytes(rng, raw):
    a, b = sorted(rng.randrange(len(raw) + 1) for _ in range(2))
    how = rng.randrange(9)
    if how == 0:
        return raw[:a]
    if how == 1:
        return raw[:a] + raw[b:]
    if how == 2:
        return raw[:b] + raw[a:]
    if how == 3:
        return raw[:a] + bytes(rng.randrange(256) for _ in range(rng.randint(1, 8))) + raw[a:]
    if how == 4:
        c = rng.randrange(len(raw) + 1)
        return raw[:c] + raw[a:b] + raw[c:]
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(out)) if out else None
        if at is not None:
            out[at] = rng.randrange(256) if how < 7 else out[at] ^ (1 << rng.randrange(8))
    return bytes(out)


def mutate_text(rng, raw):
    text = raw.decode(errors='replace')
    pieces = re.split(r'([\s,:<>\[\]{}"/=]+)', text)
    at = rng.randrange(len(pieces))
    how = rng.randrange(6)
    if how == 0:
        numbers = [n for n, p in enumerate(pieces) if re.fullmatch(r'-?[\d.]+', p)]
        if numbers:
            pieces[rng.choice(numbers)] = rng.choice(NUMBERS)
    elif how == 1:
        pieces[at] = rng.choice(WORDS)
    elif how == 2:
        pieces.insert(at, rng.choice(WORDS + NUMBERS))
    elif how == 3:
        del pieces[at : at + rng.randint(1, 3)]
    elif how == 4:
        other = rng.randrange(len(pieces))
        pieces[at], pieces[other] = pieces[other], pieces[at]
    else:
        lines = text.split('\n')
        k = rng.randrange(len(lines))
        lines.insert(rng.randrange(len(lines) + 1), lines.pop(k) if rng.random() < 0.5 else lines[k])
        return '\n'.join(lines).encode()
    return ''.join(pieces).encode()


def mutate_encoding(rng, raw):
    text = raw.decode(errors='replace').replace('dog', rng.choice(('dog', 'Häkchen', '方块')))
    return text.encode(rng.choice(ENCODINGS), errors='replace')


def _nodes(x):  # every (container, key) of a JSON value
    keys = list(x) if isinstance(x, dict) else range(len(x)) if isinstance(x, list) else ()
    for k in keys:
        yield x, k
        yield from _nodes(x[k])


def mutate_json(rng, raw):
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError):
        return mutate_bytes(rng, raw)
    where = list(_nodes(data))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not where:
            break
        node, key = rng.choice(where)
        try:
            old = node[key]
        except (KeyError, IndexError):
            continue
        how = rng.randrange(6)
        if how == 0:
            del node[key]
        elif how == 1:
            node[key] = str(old)
        elif how == 2 and isinstance(node, list):
            node.insert(rng.randrange(len(node) + 1), json.loads(json.dumps(old)))
        elif how == 3:
            other, name = rng.choice(where)
            try:
                node[key] = json.loads(json.dumps(other[name]))
            except (KeyError, IndexError):
                pass
        else:
            node[key] = rng.choice(VALUES)
    if rng.random() < 0.05:
        return (b'[' * 100_000) if rng.random() < 0.5 else json.dumps(data).encode() * 2
    return json.dumps(data).encode()


def mutate_pickle(rng, raw):
    try:
        state = torch.load(io.BytesIO(raw), weights_only=True)
        name = rng.choice(sorted(state.keys() - {'format'}))
        state[name] = rng.choice(VALUES)
        if rng.random() < 0.3:
            del state[name]
        out = io.BytesIO()
        torch.save(state, out)
        return out.getvalue()
    except Exception:  # two mutations of one file
        return mutate_bytes(rng, raw)


def mutate_xml(rng, raw):
    try:
        tree = ET.fromstring(raw)
    except ET.ParseError:
        return mutate_bytes(rng, raw)
    pairs = [(p, c) for p in tree.iter() for c in p]
    parent, child = rng.choice(pairs) if pairs else (tree, tree)
    how = rng.randrange(6)
    if how == 0 and pairs:
        parent.remove(child)
    elif how == 1 and pairs:
        parent.insert(rng.randrange(len(parent) + 1), child)
    elif how == 2:
        child.tag = rng.choice(('object', 'name', 'xmin', 'bndbox', 'part', 'Object', 'annotation'))
    elif how == 3 and pairs:
        other, one = rng.choice(pairs)
        if child not in one.iter() and parent not in child.iter():
            parent.append(one)
    else:
        word = rng.choice(NUMBERS + [v for v in VALUES if isinstance(v, str)])
        child.text = word
    return ET.tostring(tree, encoding='unicode').encode('utf-8', 'surrogatepass')


BOMB = b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x0 "lol">'
BOMB += b''.join(b'<!ENTITY x%d "%s">' % (n + 1, b'&x%d;' % n * 10) for n in range(12))
BOMB += b']><annotation><object><name>&x12;</name></object></annotation>'
YAML_BOMB = b'names: &a0 [dog]\n' + b''.join(
    b'k%d: &a%d [%s]\n' % (n + 1, n + 1, b'*a%d, ' % n * 9) for n in range(12)
)
YAML_BOMB += b'train: *a12\n'


FLOODS = [
    b'[' * 50_000,
    b'{"a":' * 20_000,
    b'a = ' + b'[' * 5000,
    b'.'.join([b'a'] * 3000) + b' = 1',
    b'9' * 6000,
]
FLOODS += [
    b'optim.steps=' + b'[' * 5000,
    b'a: ' * 400 + b'1',
    b'- ' * 3000,
    b'\xff\xfe' + b'[\0' * 900,
    b'\0' * 4000,
]
FLOODS += [b'[' + b'9' * 500 + b']', b'"' * 999, b'1e999', b'NaN', b'null', b'<a>' * 9000, b'-Infinity']


def mutate_content(rng, path):
    raw = path.read_bytes()
    own = {'.json': mutate_json, '.ipynb': mutate_json, '.xml': mutate_xml}.get(path.suffix, mutate_text)
    image = path.suffix in ('.jpg', '.png', '.tif', '.webp', '.gif', '.bmp', '.pt')
    ways = (
        [mutate_bytes, mutate_pickle][: 1 + (path.suffix == '.pt')]
        if image
        else [own, own, own, mutate_text, mutate_bytes, mutate_encoding]
    )
    for _ in range(rng.choice((1, 1, 1, 1, 2, 4))):
        raw = rng.choice(ways)(rng, raw)
    if rng.random() < 0.003:
        raw = {'.xml': BOMB, '.yaml': YAML_BOMB}.get(path.suffix, b'')
    elif rng.random() < 0.01 and not image:
        raw = rng.choice(FLOODS)
    path.write_bytes(raw)


# --- mutations of the folder ------------------------------------------------------------------------------
NAMES = [
    'x\ny.jpg',
    'ä.jpg',
    'a\u0308.jpg',
    ' 0.png',
    '0.PNG',
    '0.jpeg',
    '‮.png',
    "it's.png",
    '.hidden.png',
    '0',
]
NAMES += [
    '-1.png',
    '%20.png',
    'train.json',
    'data.yaml',
    'classes.txt',
    '0.xml',
    'a.csv',
    '0.txt',
    b'\xff.png',
]


def mutate_folder(rng, root):
    entries = sorted(p for p in root.rglob('*'))
    if not entries:
        return
    path = rng.choice(entries)
    how = rng.randrange(9)
    if how in (0, 4, 6, 7) and path.is_dir():
        shutil.rmtree(path)
    elif how in (0, 4, 6, 7):
        path.unlink()
    if how == 1:
        name = rng.choice(NAMES)
        path.rename(os.fsdecode(os.path.join(os.fsencode(path.parent), os.fsencode(name))))
    elif how == 2 and path.is_file():
        shutil.copy(path, path.with_name(rng.choice([n for n in NAMES if isinstance(n, str)])))
    elif how == 3:
        path.rename(path.with_name(path.name.upper() if rng.random() < 0.5 else path.name.title()))
    elif how == 4:
        path.mkdir()
    elif how == 5:
        target = path if path.is_dir() else path.parent
        (target / f'loop{rng.choice(("", ".png", ".json"))}').symlink_to(root)
    elif how == 6:
        path.symlink_to(rng.choice((path, root, root / 'gone', Path('/dev/null'))))
    elif how == 7:
        os.mkfifo(path)
    elif how == 8:
        folder = path if path.is_dir() else path.parent
        name = rng.choice(
            ('a.json', 'train.json', 'a.xml', 'data.yaml', 'classes.txt', 'a.txt', 'a.csv', 'a.png')
        )
        (folder / name).write_bytes(rng.choice((b'', b'{}', b'<a/>', b'[]', b'a\n', b'\xff\xfe', b'\0')))


# --- oracles: the boxes that the changed files give, computed in another way -----------------------------
def clip(box, size):
    x, y, w, h = box
    (H0, W0) = size
    return [min(max(v, 0), m) for v, m in ((x, W0), (y, H0), (x + w, W0), (y + h, H0))]


def _plain(x):  # an id in one spelling
    try:
        number = float(x)
        return str(int(number)) if number.is_integer() else str(number)
    except (TypeError, ValueError, OverflowError):
        return str(x).strip()


FALSE = {'', '-0.0', '[]', '{}', '0', '0.0', 'false', 'no', 'none', 'null', 'n', 'f', 'off'}


def coco_oracle(root, ds):
    data = json.loads(read_text(root / 'instances_train.json'))
    names = {_plain(c['id']): c['name'] for c in data['categories']}
    want = {_plain(im['id']): [] for im in data['images']}
    sizes = {_plain(i): ds.annotation(n)['size'] for n, i in enumerate(ds.ids)}
    for a in data.get('annotations') or []:
        x, y, w, h = map(float, a['bbox'])
        image = _plain(a['image_id'])
        flag = any(str(a.get(k, '')).strip().lower() not in FALSE for k in ('iscrowd', 'ignore', 'difficult'))
        box = clip((x, y, w, h), sizes[image])
        if box[2] > box[0] + THIN and box[3] > box[1] + THIN:
            want[image].append((names[_plain(a['category_id'])], flag, box))
    return want


def voc_oracle(root, ds):
    want = {}
    for n, i in enumerate(ds.ids):
        text = read_text(root / f'Annotations/{i}.xml')
        tree = ET.fromstring(re.sub(r'^\s*<\?xml.*?\?>', '', text, flags=re.S))
        want[_plain(i)] = rows = []
        for o in tree.iter('object'):
            corners = [
                [float(e.text) for e in o.findall(f'bndbox/{k}')] for k in ('xmin', 'ymin', 'xmax', 'ymax')
            ]
            assert all(len(c) == 1 for c in corners), 'an object has two corners of a kind'
            x1, y1, x2, y2 = (c[0] for c in corners)
            flag = (o.findtext('difficult') or '0').strip().lower() not in FALSE
            box = clip((x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1), ds.annotation(n)['size'])
            if box[2] > box[0] + THIN and box[3] > box[1] + THIN:
                rows.append(((o.findtext('name') or '').strip(), flag, box))
    return want


def yolo_oracle(root, ds):
    want = {}
    for n, i in enumerate(ds.ids):
        text = Path(i.partition('/')[2]).with_suffix('.txt')
        label = next(
            (f for d in ('labels', 'Labels', 'LABELS', 'images') if (f := root / d / text).is_file()),
            root / text,
        )
        want[_plain(i)] = rows = []
        for line in read_lines(label) if label.is_file() else ():
            words = line.split()
            if len(words) not in (5, 6):
                return None  # polygons and poses have tests of their own
            assert '_' not in line
            x, y, w, h = map(float, words[1:5])
            h0, w0 = ds.annotation(n)['size']
            box = clip(((x - w / 2) * w0, (y - h / 2) * h0, w * w0, h * h0), (h0, w0))
            name = (
                words[0]
                if words[0] in ds.classes and not words[0].isdigit()
                else ds.classes[int(float(words[0]))]
            )
            if box[2] > box[0] + THIN and box[3] > box[1] + THIN:
                rows.append((name, False, box))
    return want


def check_opened(ds, want):
    "Invariants of every data set, and the boxes of the oracle"
    assert len(set(ds.ids)) == len(ds.ids) > 0
    assert not any(re.search('[\x00-\x1f\x7f-\x9f]', c) for c in ds.classes), f'classes {ds.classes!r}'
    for n, i in enumerate(ds.ids):
        try:
            a = ds.annotation(n)
        except DataError as e:
            one_line(e, None)
            continue
        x1, y1, x2, y2 = a['boxes'].double().unbind(1)
        h, w = a['size']
        inside = (x1 >= 0) & (y1 >= 0) & (x1 < x2) & (y1 < y2) & (x2 <= w) & (y2 <= h)
        assert bool(inside.all()), f'boxes of image {i!r} leave it: {a["boxes"].tolist()}'
        assert all(0 <= c < len(ds.classes) for c in a['labels'].tolist())
        if want is not None:
            got = zip(a['labels'].tolist(), a['ignore'].tolist(), a['boxes'].tolist())
            got = [(ds.classes[c].partition(' (id ')[0], g, b) for c, g, b in got]
            got = sorted(row for row in got if min(row[2][2] - row[2][0], row[2][3] - row[2][1]) > THIN)
            wanted = sorted((str(c).partition(' (id ')[0], g, b) for c, g, b in want[_plain(i)])
            same = len(got) == len(wanted) and all(
                p[:2] == q[:2] and all(abs(u - v) < 0.02 for u, v in zip(p[2], q[2]))
                for p, q in zip(got, wanted)
            )
            assert same, f'image {i!r}: boxes {got}, but the file says {wanted}'


def one_line(e, root):
    text = str(e)
    assert len(text.splitlines()) == 1 and not re.search('[\x00-\x1f\u202e\ud800-\udfff]', text), repr(text)
    assert len(text) < 3000, f'{len(text)} characters: {text[:200]!r}'
    assert root is None or '/' in text, f'names no file: {text!r}'


# --- one input --------------------------------------------------------------------------------------------
FORMATS = {  # format: (share of the inputs, maker, oracle)
    'coco': (30, make_coco, coco_oracle),
    'yolo': (15, make_yolo, yolo_oracle),
    'yaml': (10, make_yaml, None),
    'beside': (5, make_beside, None),
    'voc': (15, make_voc, voc_oracle),
    'folder': (12, make_folder, None),
    'lists': (4, make_lists, None),
    'settings': (15, make_settings, None),
    'settings_json': (15, make_settings_json, None),
    'overrides': (20, make_overrides, None),
    'options': (10, make_options, None),
    'split': (10, make_split, None),
    'index': (15, make_index, None),
    'studies': (10, make_studies, None),
    'run': (20, make_run, None),
    'record': (10, make_record, None),
    'checkpoint': (8, make_checkpoint, None),
    'weights': (12, make_weights, None),
    'exported': (8, make_exported, None),
    'notebook': (10, make_notebook, None),
}
DATA = ('coco', 'yolo', 'yaml', 'beside', 'voc', 'folder')  # formats that `open_dataset` reads
PLACELESS = ('overrides', 'options')  # what is typed has no file
COLUMNS = dict(plain='plain', fast='fast')


def lines_of(path):  # as a shell would pass them
    try:
        return path.read_text(errors='surrogateescape').split('\n')[:-1]
    except OSError:
        return []


def read_typed(root):
    for line in lines_of(root / 'options.txt'):
        what, _, text = line.partition(' ')
        if what == 'seeds':
            read_seeds(text)
        elif what == 'formats':
            read_formats(text)
        elif what == 'option':
            read_options([text])
        elif what == 'data' and text.startswith('digits'):
            open_dataset(text, data_root=str(root))


def read_indices(root):
    ds = open_dataset(str(root))
    read_index_list(root / 'ids.json', ds, convention='ids')
    read_index_list(root / 'nested.json', ds, percent=50, fold=0)


def read_run(root):
    run = Run(root)
    steps_done(root)
    keep_record(run.result, root)
    return run.config, run.hash, run.metrics


def read_study(root):
    study_lines(root / 'studies.toml')
    published(root / 'results', 'table')


def read_seed(root):
    said = []
    measured_memory(root / 'results', said.append)
    assert all(len(line.splitlines()) == 1 for line in said)
    runs = read_records(root / 'results', 'toy', list(COLUMNS))
    for path in sorted((root / 'results/toy').glob('seed*.json')):
        seed_line(path)
    text = arm_table(runs, COLUMNS, 'plain') + verdicts(runs, COLUMNS, 'plain') + scale_line(runs, COLUMNS)
    assert '<script' not in text.lower(), 'a live tag on the page'


OTHERS = {  # what is no data set -> how it is read
    'settings': lambda root: load_config(root / 'config.toml'),
    'settings_json': lambda root: load_config(root / 'config.json'),
    'overrides': lambda root: override(preset('digits'), lines_of(root / 'overrides.txt')),
    'options': read_typed,
    'split': lambda root: load_split(root / 'split.json', open_dataset(str(root))),
    'index': read_indices,
    'studies': read_study,
    'run': read_run,
    'record': read_seed,
    'checkpoint': lambda root: (load_checkpoint(root / 'last.pt'), read_weights(root / 'last.pt')),
    'weights': read_weights,
    'exported': lambda root: from_safetensors(root / 'model.safetensors'),
    'notebook': lambda root: check_notebook(root / 'run.ipynb'),
}


def read_input(kind, root):
    "Read one input as the commands do; -> what happened"
    if kind == 'lists':
        return f'{len(read_lines(root / "list.txt")) > 0}'
    if kind in OTHERS:
        OTHERS[kind](root)
        return 'opened'
    ds = open_dataset(str(root), 'train')
    oracle = FORMATS[kind][2]
    want = None
    if oracle is not None and type(ds).__name__ == 'FileDataset' and ds.has_boxes:
        try:
            want = oracle(root, ds)
        except OSError:  # another file than the one that the oracle knows
            want = None
    check_opened(ds, want)
    for n in range(len(ds)):
        try:
            ds[n]
        except DataError as e:
            one_line(e, root)
    return 'opened with notes' if ds.notes else 'opened'


def run_case(kind, number, base, scratch, keep=False):
    "One input; -> (what happened, finding or None)"
    rng = random.Random(f'{kind}:{number}')
    root = Path(scratch) / 'toy'
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(base[kind][0], root, symlinks=True)
    for _ in range(rng.choice((1, 1, 1, 2))):
        if rng.random() < 0.12 and kind not in ('lists', *PLACELESS):
            try:
                mutate_folder(rng, root)
            except OSError:  # a second change of what is gone, or two names that are one file
                pass
        else:
            path = root / rng.choice(base[kind][1])
            if path.is_file():
                mutate_content(rng, path)
    if (root / 'data.yaml').is_file() and OUTSIDE.search((root / 'data.yaml').read_text(errors='replace')):
        return 'leads outside', None  # such as `train: /`, which would read all of this computer
    alarms(LIMIT, WAIT)
    try:
        result = read_input(kind, root)
        if kind in DATA and rng.random() < 0.04:
            report = check_dataset(str(root), quick=rng.random() < 0.5, progress=False)
            str(report)
        return result, None
    except (DataError, ConfigError) as e:
        alarms(0, 0)
        try:
            one_line(e, None if kind in PLACELESS else root)
        except AssertionError as a:
            return 'finding', f'{type(e).__name__}: {a}'
        return type(e).__name__, None
    except BaseException as e:
        if isinstance(e, KeyboardInterrupt):
            raise
        if keep:
            traceback.print_exc()
        frames = [f for f in traceback.extract_tb(e.__traceback__) if 'semidetr' in f.filename]
        place = f'{Path(frames[-1].filename).name}:{frames[-1].name}' if frames else '?'
        return 'finding', f'{type(e).__name__} in {place}: {str(e)[:300]!r}'
    finally:
        alarms(0, 0)


def run_many(cases):
    "Several inputs, one after another; -> (counts of what happened, {case: finding})"
    warnings.simplefilter('ignore')
    signal.signal(signal.SIGALRM, _alarm)
    signal.signal(signal.SIGPROF, _alarm)
    counts, findings, base = Counter(), {}, {}
    place = '/dev/shm' if os.access('/dev/shm', os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix='fuzz-', dir=place) as scratch:
        for kind, number in cases:
            if kind not in base:
                root = Path(scratch) / 'base' / kind
                root.mkdir(parents=True)
                base[kind] = root, FORMATS[kind][1](root)
            result, finding = run_case(kind, number, base, scratch, keep=len(cases) == 1)
            counts[kind, result] += 1
            if finding:
                findings[f'{kind}:{number}'] = finding
            if finding and len(cases) == 1:
                shutil.rmtree(CASE, ignore_errors=True)
                shutil.copytree(Path(scratch) / 'toy', CASE, symlinks=True)
    return counts, findings


def all_cases(inputs, first=0):  # shares of the formats; the numbers of a format count from `first`
    total = sum(share for share, _, _ in FORMATS.values())
    for kind, (share, _, _) in FORMATS.items():
        for n in range(math.ceil(inputs * share / total)):
            yield kind, first + n


def record(counts, findings, seconds, cpu_seconds, first):
    "What a run of the fuzzer leaves: the inputs of each format number from `first`"
    kinds = {}
    for (kind, result), n in sorted(counts.items()):
        kinds.setdefault(kind, {})[result] = n
    about = dict(inputs=sum(counts.values()), first=first, seconds=seconds, cpu_seconds=cpu_seconds)
    about['python'] = sys.version.split()[0]
    return dict(**about, formats=kinds, findings=dict(sorted(findings.items())))


def bound_memory():
    "A process that takes a gigabyte more than at its start runs out of memory, which is a finding"
    pages = int(Path('/proc/self/statm').read_text().split()[0]) if Path('/proc/self/statm').is_file() else 0
    if pages:
        most = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--inputs', type=int, default=300_000, help='how many')
    p.add_argument('--first', type=int, default=0, help='number of the first input of each format')
    p.add_argument('--case', help='one input, such as coco:4711')
    p.add_argument('--out', type=Path, help='write a record of counts, findings and seconds, as JSON')
    p.add_argument('--jobs', type=int, default=os.cpu_count(), help='processes')
    a = p.parse_args()
    if a.case:
        kind, number = a.case.split(':')
        counts, findings = run_many([(kind, int(number))])
        print(dict(counts), *findings.items(), sep='\n')
        return bool(findings)
    cases = list(all_cases(a.inputs, a.first))
    parts, start = [cases[n::50] for n in range(50)], time.perf_counter()
    counts, findings = Counter(), {}
    with ProcessPoolExecutor(a.jobs, initializer=bound_memory) as pool:
        for done, found in pool.map(run_many, parts):
            counts += done
            findings |= found
    for (kind, result), n in sorted(counts.items()):
        print(f'{kind:13} {result:18} {n:7}')
    by_kind = Counter(re.sub(r'\d+', 'N', f)[:110] for f in findings.values())
    for text, n in by_kind.most_common(40):
        case = next(c for c, f in findings.items() if re.sub(r'\d+', 'N', f)[:110] == text)
        print(f'{n:6} {case:14} {findings[case][:400]}')
    seconds = round(time.perf_counter() - start)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = round(used.ru_utime + used.ru_stime)
    print(f'{sum(counts.values())} inputs, {len(findings)} findings, {seconds} s, {cpu_seconds} CPU-s')
    if a.out:
        a.out.write_text(json.dumps(record(counts, findings, seconds, cpu_seconds, a.first), indent=1) + '\n')
    return bool(findings)


if __name__ == '__main__':
    sys.exit(main())
