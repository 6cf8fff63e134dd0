# %% [markdown]
# # The doctor {#sec-doctor}
#
# > Find every fault of a data set in one pass, with file, item and cure, before a training run finds the first.

# %%
#| default_exp doctor

# %%
#| export
import hashlib
import json
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm
from semidetr.core import DataError, stable_hash
from semidetr.datasets import DetectionDataset, FileDataset, open_dataset, read_source
from semidetr.draw import draw_on_image
from semidetr.records import Fault, Source, image_orientation, load_image, read_size, reason


# %%
#| export
_LEVELS = ('error', 'warning', 'info')

@dataclass
class Report:
    "What the doctor found"
    name:str # of the data set
    where:str # annotation file or folder
    counts:dict=field(default_factory=dict) # images, boxes, ignored, without boxes, decoded ...
    histogram:dict=field(default_factory=dict) # class -> boxes that are not to be ignored
    box_sizes:dict=field(default_factory=dict) # quantile -> square root of the area, pixels
    faults:list[Fault]=field(default_factory=list)

    def of(self,
        level:str=None, # 'error', 'warning', 'info'; None: any
        kind:str=None, # None: any
    )->list[Fault]:
        "Faults of one level or kind"
        return [f for f in self.faults if level in (None, f.level) and kind in (None, f.kind)]
    @property
    def exit_code(self)->int: # 2: there are errors; 0: fit to train on, perhaps with warnings
        return 2 if self.of('error') else 0
    def to_json(self)->str:
        "Everything, for a machine"
        kinds = {k: Counter(f.kind for f in self.of(k)) for k in _LEVELS}
        return json.dumps(asdict(self) | dict(exit_code=self.exit_code, kinds=kinds), indent=1)
    def to_text(self,
        most:int=3, # faults shown of each kind; the rest is counted
    )->str:
        "Everything, for a person: numbers first, then the faults, worst first"
        return '\n'.join([f'{self.name} ({self.where})', *_number_lines(self), *_fault_lines(self, most)])
    __str__ = to_text


# %%
#| export
def _number_lines(r):
    if r.counts: yield '  '+', '.join(f'{v:,} {k}' for k, v in r.counts.items())
    if r.box_sizes: yield '  box size (square root of the area, px): '+', '.join(f'{k} {v:.0f}' for k, v in r.box_sizes.items())
    top = max(r.histogram.values(), default=0)
    rows = sorted(r.histogram.items(), key=lambda kv: -kv[1])
    for name, n in rows[:20]: yield f"  {name[:24]:<24} {n:>8,} {'#'*math.ceil(40*n/top) if top else ''}"
    if len(rows) > 20: yield f'  ... and {len(rows)-20} classes more, {sum(n for _, n in rows[20:]):,} boxes'

def _fault_lines(r, most):
    for level in _LEVELS:
        for kind, n in Counter(f.kind for f in r.of(level)).most_common():
            yield f'{level}: {kind} ({n:,})'
            yield from (f'    {f}' for f in r.of(level, kind)[:most])
            if n > most: yield f'    ... and {n-most:,} more'
    n = {k: len(r.of(k)) for k in _LEVELS}
    verdict = 'not fit for training' if n['error'] else 'fit for training'
    yield f"{verdict}: {n['error']:,} errors, {n['warning']:,} warnings, {n['info']:,} notes"


# %%
#| export
def _statistics(data): # COCO dict, perhaps faulty -> counts, histogram, box sizes
    rows = lambda k: [x for x in data.get(k) or [] if isinstance(x, dict)] if isinstance(data, dict) and isinstance(data.get(k), list) else []
    anns, names = rows('annotations'), {str(c.get('id')): str(c.get('name')) for c in rows('categories')}
    crowd = [bool(a.get('iscrowd') or a.get('ignore') or a.get('difficult')) for a in anns]
    seen = Counter(str(a.get('category_id')) for a, c in zip(anns, crowd) if not c)
    histogram = {name: seen.get(c, 0) for c, name in names.items()}
    boxes = [a['bbox'] for a in anns if _is_box(a.get('bbox'))]
    side = [math.sqrt(b[2]*b[3]) for b in boxes if b[2] > 0 and b[3] > 0 and math.isfinite(b[2]*b[3])]
    sizes = dict(zip(('5 %', '25 %', 'median', '75 %', '95 %'), np.quantile(side, [.05, .25, .5, .75, .95]).tolist())) if side else {}
    filled = {str(a.get('image_id')) for a in anns}
    counts = {'images': len(rows('images')), 'boxes': len(anns), 'ignored boxes': sum(crowd), 'classes': len(names),
              'images without a box': sum(str(im.get('id')) not in filled for im in rows('images'))}
    return counts, histogram, sizes

def _is_box(b): return isinstance(b, list|tuple) and len(b) == 4 and all(isinstance(v, int|float) for v in b)

def _content_faults(data, where, counts, histogram): # what is not wrong in any one entry, but worth knowing
    if not isinstance(data, dict) or not isinstance(data.get('images'), list): return
    if not data.get('annotations'):
        if 'annotations' in data: yield Fault('warning', 'no-annotations', where, 'there is no annotation', 'fit as unlabelled data; to learn from it, add boxes')
        return
    empty = counts['images without a box']
    if empty: yield Fault('info', 'images-without-boxes', where, f'{empty:,} of {counts["images"]:,} images have no box', 'fine if nothing is on them; otherwise their annotations are missing')
    for name, n in histogram.items():
        if n == 0: yield Fault('warning', 'class-never-seen', where, f"class '{name}' has no box that counts", 'its AP is undefined; delete the class or add examples')
    ids = sorted(c['id'] for c in data['categories'] if isinstance(c, dict) and isinstance(c.get('id'), int))
    if ids and ids not in (list(range(len(ids))), list(range(1, len(ids)+1))):
        yield Fault('warning', 'gaps-in-class-ids', where, f'{len(ids)} class ids between {ids[0]} and {ids[-1]}', 'handled: labels are contiguous inside, `cat_ids` keeps the ids')
    same = Counter((str(a.get('image_id')), str(a.get('category_id')), str(a.get('bbox'))) for a in data['annotations'] if isinstance(a, dict))
    for (image_id, cat, box), n in same.items():
        if n > 1: yield Fault('warning', 'repeated-box', where, f'image {image_id}: box {box} of class id {cat} stands there {n} times', 'keep one')


# %%
#| export
def _look(job): # one image file -> (content hash or None, fault or None)
    path, image_id, size, where, quick = job
    bad = lambda level, kind, what, cure: Fault(level, kind, str(path), f'image {image_id!r}: {what}', cure)
    try:
        if quick: return None, _size_fault(read_size(path), size, bad, path, where)
        img = load_image(path, size)
    except FileNotFoundError: return None, bad('error', 'missing-image', 'no such file', f'restore it, or delete its entry from {where}')
    except Exception as e: return None, bad('error', 'unreadable-image', f'cannot be decoded ({reason(e)})', f'restore it, or delete its entry from {where}')
    digest = hashlib.blake2b(img.tobytes(), digest_size=12, key=repr(img.size).encode()).hexdigest()
    return digest, _size_fault((img.height, img.width), size, bad, path, where)

def _size_fault(found, said, bad, path, where):
    if said and tuple(found) != tuple(said) and not (image_orientation(path) != 1 and tuple(found) == tuple(said)[::-1]):
        return bad('error', 'size-mismatch', f'is {found[0]}x{found[1]}, but {where} says {said[0]:g}x{said[1]:g} (height x width)', 'its boxes would be wrong: correct the entry or restore the image')
    if min(found) < 32: return bad('warning', 'tiny-image', f'is {found[0]}x{found[1]}', 'too small for a detector; leave it out')
    if image_orientation(path) != 1: return bad('info', 'exif-rotated', 'carries an EXIF rotation', 'handled: it is turned unless only the raw size agrees with the annotations; look at the contact sheet')

def check_images(
    source:Source, # images and where they are
    quick:bool=False, # look at the headers only; no content hashes then
    threads:int=4, # decoders
    progress:bool|None=None, # bar; None: on a terminal
)->tuple[dict,list[Fault]]: # image id -> content hash; faults
    "Open every image file"
    images = source.data.get('images') if isinstance(source.data, dict) else None
    images = [im for im in images or [] if isinstance(im, dict) and isinstance(im.get('file_name'), str)] if isinstance(images, list) else []
    size = lambda im: (im['height'], im['width']) if all(isinstance(im.get(k), int|float) and im[k] > 0 for k in ('height', 'width')) else None
    jobs = [(Path(source.folder)/im['file_name'], im.get('id'), size(im), source.where, quick) for im in images]
    with ThreadPoolExecutor(threads) as pool:
        found = list(tqdm(pool.map(_look, jobs), total=len(jobs), desc=f'images of {source.name}', unit='img', disable=None if progress is None else not progress))
    hashes = {str(im.get('id')): h for im, (h, _) in zip(images, found) if h}
    return hashes, [f for _, f in found if f]


# %%
#| export
def _same_images(hashes, where): # within one set
    first = {}
    for image_id, h in hashes.items():
        if h in first: yield Fault('warning', 'duplicate-image', where, f'image {image_id} is pixel for pixel image {first[h]}', 'keep one: a copy in another split would leak')
        first.setdefault(h, image_id)

def _between(a, b, hashes_a, hashes_b): # two sets that should have no image in common
    names = lambda s: [str(c.get('name')) for c in sorted((c for c in s.data.get('categories') or [] if isinstance(c, dict)), key=lambda c: (isinstance(c.get('id'), str), c.get('id') or 0))]
    na, nb = names(a), names(b)
    if na and nb and na != nb:
        differ = [f"only in {s.where}: {', '.join(sorted(only)[:5])}" for s, only in ((a, set(na)-set(nb)), (b, set(nb)-set(na))) if only] or ['same names, another order']
        yield Fault('error', 'class-mismatch', b.where, f"classes differ from those of {a.where} ({'; '.join(differ)})", 'give both files the same categories')
    level = 'error' if b.data.get('annotations') else 'warning'
    where_is = {h: k for k, h in hashes_a.items()}
    for k, h in hashes_b.items():
        if h in where_is: yield Fault(level, 'shared-image', b.where, f'image {k} is pixel for pixel image {where_is[h]} of {a.where}', 'take it out of one of the two')
    ids = lambda s: {str(im.get('id')): im.get('file_name') for im in s.data.get('images') or [] if isinstance(im, dict)}
    ia, ib = ids(a), ids(b)
    both = ia.keys() & ib.keys()
    files = [k for k in both if ia[k] == ib[k]]
    if files: yield Fault('warning', 'shared-file-name', b.where, f'{len(files):,} images share id and file name with {a.where}, e.g. {files[0]} ({ia[files[0]]})', 'are they the same images? then the two sets overlap')
    elif both: yield Fault('info', 'shared-ids', b.where, f'{len(both):,} image ids also occur in {a.where}, with other files', 'harmless as long as the two files are not merged')

def split_faults(
    path, # JSON with lists of image ids: labelled, unlabelled, dev
    ids, # image ids of the data set
    hashes:dict, # image id -> content hash, may be empty
    fingerprint:str|None=None, # of the data set, if it can be loaded
): # iterator of Fault
    "Overlaps between the parts of a split, by id and by content, and ids that do not exist"
    try: split = json.loads(Path(path).read_text())
    except (OSError, ValueError) as e: yield Fault('error', 'bad-split', str(path), f'cannot be read ({reason(e)})', 'make it again'); return
    parts = {k: split[k] for k in ('labelled', 'unlabelled', 'dev') if isinstance(split, dict) and isinstance(split.get(k), list)}
    if 'labelled' not in parts: yield Fault('error', 'bad-split', str(path), "has no list 'labelled'", 'this is not a split file'); return
    if fingerprint and split.get('fingerprint') not in (None, '', fingerprint): yield Fault('error', 'stale-split', str(path), f"was made for data {split['fingerprint']}, this is {fingerprint}", 'make it again for this data set')
    owner, known = {}, set(ids)
    for part, members in parts.items():
        for m in members:
            if m not in known: yield Fault('error', 'unknown-split-id', str(path), f'{part}: no image with id {m!r}', 'make the split again for this data set')
            for key in (m, hashes.get(str(m))):
                if key is None: continue
                at = owner.setdefault(key, (part, m))
                if at == (part, m): continue
                if at[0] != part: yield Fault('error', 'split-overlap', str(path), f'image {m!r} of {part} is also {at[1]!r} of {at[0]}', 'an image belongs to one part only')
                break


# %%
#| export
def _source(spec, split, data_root): # -> Source; what cannot be opened becomes a source with one fault
    if isinstance(spec, Source): return spec
    if not isinstance(spec, DetectionDataset) and str(spec).partition(':')[0] == 'digits' and not Path(str(spec)).exists(): spec = open_dataset(spec, split)
    if isinstance(spec, FileDataset): spec = spec.source_again()
    if isinstance(spec, DetectionDataset): return Source(spec.name, spec.name, spec.coco_dict())
    if isinstance(spec, Source): return spec
    try: return read_source(spec, split, data_root)
    except DataError as e: return Source(str(spec), str(spec), None, faults=[Fault('error', 'cannot-open', *_cut(str(e), str(spec)))])

def check_dataset():
    pass
