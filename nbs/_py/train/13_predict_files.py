# %% [markdown]
# # Files of detections {#sec-predict-files}
#
# > Write detections of images, folders and videos as JSON, CSV, YOLO rows and pictures.
#
# Whatever reads the detections next has a format of its own: an evaluation script wants COCO's JSON, a
# spreadsheet wants CSV, an annotation tool wants YOLO rows. Each is easy to write and easy to get slightly
# wrong: boxes by their centre instead of their corner, a class number that counts from 1, two images whose rows
# land in the same file. This chapter writes all of them from the same detections, and the lesson cells read
# them back.
#
# | format | file | box | class | score |
# | :--- | :--- | :--- | :--- | :--- |
# | `json` | `detections.json` | $x, y, w, h$ in pixels, from the top left corner | id and name | yes |
# | `csv` | `detections.csv` | $x_1, y_1, x_2, y_2$ in pixels | label and name | yes |
# | `yolo` | `labels/IMAGE.txt`, `classes.txt` | $c_x, c_y, w, h$ as fractions of the image | label | last |

# %%
#| default_exp train.predict_files

# %%
#| hide
import warnings

warnings.filterwarnings('ignore', message='IProgress')

# %%
#| export
import csv
import io
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from semidetr.core import ConfigError, DataError, atomic_write, tell
from semidetr.data.files import read_folder
from semidetr.data.datasets import CocoDataset
from semidetr.train.predict import Predictor, nms_hint

# %%
#| hide
import tempfile
import matplotlib.pyplot as plt
import torch
from PIL import Image
from semidetr.boxes import normalize_boxes
from semidetr.data.catalog import open_dataset
from semidetr.draw import show_image
from semidetr.train.checkpoint import save_checkpoint
from semidetr.train.config import override, preset, to_dict
from semidetr.train.run_data import resolve
from semidetr.detectors.contract import build_detector


# %% [markdown]
# ## COCO's result format
#
# One dictionary per detection: `image_id`, `category_id`, `bbox` as $(x,y,w,h)$ in pixels, `score`. The
# *image id is the file name* below the folder, and the category id is label + 1, because a folder of photos
# defines no other ids. The class name is added for human readers; tools ignore the extra key. Where an
# annotation file exists, its ids can be used instead, and `pycocotools` reads the result directly.

# %%
#| export
def to_coco(
    found: dict,  # boxes (K,4) xyxy pixels, labels (K,), scores (K,), names; from `Predictor`
    image_id,  # file name, or the id in a COCO file
    category_ids=None,  # label -> id; None: label + 1
) -> list:  # of dicts in COCO's result format, boxes xywh pixels
    "Detections of one image as COCO results"
    boxes = found['boxes'].clone()
    boxes[:, 2:] -= boxes[:, :2]
    labels, scores = found['labels'].tolist(), found['scores'].tolist()
    results = []
    for label, name, box, score in zip(labels, found['names'], boxes.tolist(), scores):
        category = label + 1 if category_ids is None else category_ids[label]
        row = dict(image_id=image_id, category_id=category, category=name)
        results.append(row | dict(bbox=[round(x, 2) for x in box], score=round(score, 4)))
    return results


def coco_ids(
    files,  # paths below `folder`
    folder,  # of the images
    path,  # COCO annotation file that names them
    classes: list,  # of the run
):  # (file -> image id, label -> category id)
    "Ids that an annotation file gives to images and classes; `DataError` where it lacks one of them"
    ds = CocoDataset(path, folder)
    by_path = dict(zip(ds.files, ds.ids))
    known = {Path(f).name: i for f, i in by_path.items()} | by_path
    ids = {f: known.get(f, known.get(Path(f).name)) for f in files}
    for f, i in ids.items():
        if i is None:
            raise DataError(f'{path}: does not name the image {f}; leave the file out, or the image')
    for c in classes:
        if c not in ds.classes:
            known = ', '.join(ds.classes[:10])
            raise DataError(f"{path}: does not have the class '{c}' of the run; it has {known}")
    return ids, [ds.cat_ids[ds.classes.index(c)] for c in classes]


# %%
strict = dict(
    boxes=torch.tensor([[10.0, 20.0, 40.0, 80.0], [0.0, 0.0, 50.0, 25.0]]),
    labels=torch.tensor([3, 0]),
    scores=torch.tensor([0.9, 0.5]),
    names=['3', '0'],
)
rows = to_coco(strict, 'photo.png')
assert rows[0]['category_id'] == 4 and rows[0]['bbox'] == [10, 20, 30, 60]
rows[0]

# %% [markdown]
# ## Rows of a spreadsheet, rows of YOLO
#
# With an image of size $(H,W)$ the YOLO row of a box holds its label, then
#
# $$ c_x=\frac{x_1+x_2}{2W},\quad c_y=\frac{y_1+y_2}{2H},\quad w=\frac{x_2-x_1}{W},\quad h=\frac{y_2-y_1}{H} $$ {#eq-predict-files-yolo}
#
# and last the score. Six decimals place a box to within a hundredth of a pixel in images of up to 10,000
# pixels.

# %%
#| export
FORMATS = ('json', 'csv', 'yolo')
COLUMNS = ('file', 'frame', 'time', 'class', 'label', 'score', 'x1', 'y1', 'x2', 'y2')  # of the CSV file


def read_formats(
    formats,  # 'json,csv', or a sequence of names
) -> tuple:  # names from FORMATS
    "The formats that are asked for; `ConfigError` names an unknown one"
    parts = formats.split(',') if isinstance(formats, str) else formats
    names = tuple(filter(None, (part.strip().lower() for part in parts)))
    for name in names:
        if name not in FORMATS:
            raise ConfigError(f"format '{name}' is unknown; known: {', '.join(FORMATS)}")
    return names


def to_csv_rows(
    found: dict,  # as for `to_coco`
    file: str,  # image or video
    frame='',  # number of the frame in a video, from 0
    time='',  # of the frame in seconds
) -> list:  # of rows with COLUMNS
    "Detections of one image as rows of a table: corners in pixels"
    rows = []
    labels, scores = found['labels'].tolist(), found['scores'].tolist()
    for label, name, score, box in zip(labels, found['names'], scores, found['boxes'].tolist()):
        rows.append([file, frame, time, name, label, round(score, 4), *(round(x, 2) for x in box)])
    return rows


def to_yolo(
    found: dict,  # as for `to_coco`
    size: tuple,  # (H, W) of the image
) -> str:  # one line per detection: class cx cy w h score; '' without detections
    "Detections of one image as YOLO rows (@eq-predict-files-yolo)"
    h, w = size
    lines = []
    for label, score, box in zip(found['labels'].tolist(), found['scores'].tolist(), found['boxes'].tolist()):
        x1, y1, x2, y2 = box
        values = (x1 + x2) / 2 / w, (y1 + y2) / 2 / h, (x2 - x1) / w, (y2 - y1) / h
        lines.append(' '.join([str(label), *(f'{v:.6f}' for v in values), f'{score:.4f}']) + '\n')
    return ''.join(lines)


# %%
assert to_csv_rows(strict, 'photo.png')[0] == ['photo.png', '', '', '3', 3, 0.9, 10, 20, 40, 80]
assert to_yolo(strict, (100, 50)).splitlines()[1] == '0 0.500000 0.125000 1.000000 0.250000 0.5000'
print(to_yolo(strict, (100, 50)))


# %% [markdown]
# ## Which images, and where to write
#
# No picture is written over a source image, and images in the output folder are not used as sources. Two
# images that differ in their suffix alone, `a.jpg` and `a.png`, keep it in the names of their results.

# %%
#| export
def _places(folder, files):
    "Where files are, links resolved; a folder is resolved once, whatever the number of files in it"
    known, out = {}, []
    for f in map(Path, files):
        if f.parent not in known:
            known[f.parent] = (Path(folder) / f.parent).resolve()
        place = known[f.parent] / f.name
        out.append(place.resolve() if place.is_symlink() else place)
    return out


def _sources(source, out):
    "(folder, paths below it) of the images to process; those in the output folder are left out"
    source, out = Path(source), Path(out)
    if not source.exists():
        raise DataError(f'{source}: no such image or folder')
    if source.is_file():
        return source.parent, [source.name]
    found = read_folder(source)
    tell(f'{f.where}: {f.item}' for f in found.faults)
    files = [image['file_name'] for image in found.data['images']]
    if (target := out.resolve()) != source.resolve():
        files = [f for f, place in zip(files, _places(source, files)) if target not in place.parents]
    if not files:
        raise DataError(f'{source}: no image but those in the output folder {out}')
    return source, files


def _names(files, suffix):
    "{file: name of its result}; the suffix of the file stays where two files differ in nothing else"
    stems = [Path(f).with_suffix('').as_posix() for f in files]
    number = Counter(stems)
    return {f: f'{s if number[s] == 1 else f}{suffix}' for f, s in zip(files, stems)}


def _pictures(files, folder, out):
    "{file: picture to write}; `ConfigError` if one of them would overwrite an image"
    paths = {f: Path(out) / name for f, name in _names(files, '.png').items()}
    images, targets = set(_places(folder, files)), list(paths.values())
    results = _places(out, [p.relative_to(out) for p in targets])
    for p, place, there in zip(targets, results, _places(folder, [p.name for p in targets])):
        if place in images or (place == there and there.exists()):
            raise ConfigError(f'{p}: the picture would overwrite an image; choose another output folder')
    return paths


# %%
assert _names(['a.jpg', 'b.jpg', 'a.png'], '.txt')['a.png'] == 'a.png.txt'
_names(['a.jpg', 'b.jpg', 'a.png'], '.txt')


# %% [markdown]
# ## One writer for all formats
#
# `ResultFiles` collects detections. Pictures and YOLO files are written as images arrive; JSON and CSV at the
# end. Each file is written completely or not at all.

# %%
#| export
@dataclass
class ResultFiles:
    "Detections of a source, and the files that hold them"

    out: Path  # folder to write to
    classes: list  # names of the run
    formats: tuple = ('json',)  # from FORMATS
    rows: list = field(default_factory=list)  # COCO results of all images
    found: dict = field(default_factory=dict)  # file, or number of the frame -> detections
    broken: list = field(default_factory=list)  # a line for each file that could not be read
    category_ids: list = None  # label -> id; None: label + 1
    table: list = field(default_factory=list)  # rows of the CSV file

    def add(
        self,
        key,  # file, or number of the frame
        image,  # PIL image
        found: dict,  # its detections
        image_id,  # for the COCO results
        label_file: str,  # name of its YOLO rows below `labels`
        **frame,  # file, frame, time of a frame in a video
    ):
        "Detections of one image"
        self.found[key] = found
        self.rows += [row | frame for row in to_coco(found, image_id, self.category_ids)]
        self.table += to_csv_rows(found, **(frame or dict(file=key)))
        if 'yolo' in self.formats:
            atomic_write(self.out / 'labels' / label_file, to_yolo(found, (image.height, image.width)))

    def picture(self, path, image):
        "Write a PNG file"
        png = io.BytesIO()
        image.save(png, 'PNG')
        atomic_write(path, png.getvalue())

    def places(self) -> list:
        "The file, or the folder, of each format"
        names = dict(json='detections.json', csv='detections.csv', yolo='labels')
        return [self.out / names[f] for f in self.formats]

    def notes(
        self,
        predictor,  # whose detections these are
        prefix: str = '',  # of options in the text: '--' for a command
    ) -> list:
        "Lines about threshold and suppression, where one of them leaves out too much or too little"
        if not self.rows:
            return [f'no score reaches {predictor.threshold:g}; try a lower {prefix}threshold']
        hint = '' if predictor.nms else nms_hint(self.found.values(), predictor.threshold, f'{prefix}nms')
        return [hint] if hint else []

    def write(self):
        "The files that hold all detections"
        if 'json' in self.formats:
            atomic_write(self.out / 'detections.json', json.dumps(self.rows))
        if 'csv' in self.formats:
            text = io.StringIO()
            csv.writer(text, lineterminator='\n').writerows([COLUMNS, *self.table])
            atomic_write(self.out / 'detections.csv', text.getvalue())
        if 'yolo' in self.formats:
            atomic_write(self.out / 'classes.txt', ''.join(f'{name}\n' for name in self.classes))


# %% [markdown]
# ## An image, a folder
#
# `predict_folder` processes an image, or a folder with its subfolders. A file that cannot be decoded is left
# out and reported, and the others are processed; if *none* can be read, nothing is written.

# %%
#| export
def predict_folder(
    predictor: Predictor,  # with network, threshold and suppression
    source,  # image, or folder of images with its subfolders
    out,  # folder for pictures and files
    draw: bool = True,  # write pictures
    ids=None,  # COCO annotation file whose image and category ids to use; None: file names, label + 1
    batch: int = 8,  # maximum number of images per forward pass
    progress=lambda x: x,  # wraps the list of batches
    formats: tuple = ('json',),  # from FORMATS
) -> ResultFiles:  # `rows`: COCO results; `found`: file -> detections; `broken`: lines about unread files
    "Detect objects in every image; write pictures and the files of each format"
    results = ResultFiles(Path(out), predictor.classes, formats)
    folder, files = _sources(source, out)
    image_ids = dict(zip(files, files))
    if ids:
        image_ids, results.category_ids = coco_ids(files, folder, ids, predictor.classes)
    pictures = _pictures(files, folder, out) if draw else {}
    label_files = _names(files, '.txt')
    for f, image, found in predictor.files(folder, files, batch, results.broken, progress):
        results.add(f, image, found, image_ids[f], label_files[f])
        if draw:
            results.picture(pictures[f], predictor.draw(image, found))
    if not results.found:
        others = len(results.broken) - 1
        more = f' (and {others} more; no image of {source} can be read)' if others else ''
        raise DataError(results.broken[0] + more)
    results.write()
    return results


# %% [markdown]
# A tiny, untrained detector, in whose place a stand-in returns the true boxes of the scene that it is given:

# %%
scenes = open_dataset('digits:n=6,size=96', 'val')
small = [
    'detector.backbone.weights=none',
    'detector.transformer.d_model=32',
    'detector.transformer.n_heads=4',
    'detector.transformer.num_queries=20',
    'detector.transformer.ffn=32',
]
tiny = resolve(override(preset('digits'), small), scenes.classes)
home = Path(tempfile.mkdtemp())
weights = build_detector(tiny.detector).state_dict()
save_checkpoint(
    home / 'run' / 'last.pt', config=to_dict(tiny), classes=scenes.classes, student=weights, teacher=weights
)


class Knows(torch.nn.Module):
    "Returns the boxes of the first scene with a score of .9, whatever it sees"

    def forward(self, images, mask):
        s = scenes[0]
        p = torch.full((len(s.boxes), 10), 1e-3)
        p[torch.arange(len(s.boxes)), s.labels] = 0.9
        boxes = normalize_boxes(s.boxes, s.size)
        return dict(
            pred_logits=p.logit().expand(len(images), -1, -1), pred_boxes=boxes.expand(len(images), -1, -1)
        )


predictor = Predictor(home / 'run', 'cpu')
predictor.model = Knows()

# %%
many = home / 'photos'
(many / 'more').mkdir(parents=True)
for i in range(3):
    scenes[0].image.resize((96 + 10 * i, 96)).save(many / ('more' if i else '.') / f'{i}.jpg')
(many / 'cut.jpg').write_bytes((many / '0.jpg').read_bytes()[:700])
results = predict_folder(predictor, many, home / 'out', formats=FORMATS)
written = sorted(p.relative_to(home / 'out').as_posix() for p in (home / 'out').rglob('*.*'))
assert {r['image_id'] for r in results.rows} == {'0.jpg', 'more/1.jpg', 'more/2.jpg'}
assert len(results.broken) == 1 and 'cut.jpg' in results.broken[0]
written

# %% [markdown]
# Read back, every format gives the boxes of the scene:

# %%
truth = scenes[0].boxes
from_json = [r['bbox'] for r in json.loads((home / 'out' / 'detections.json').read_text())]
with open(home / 'out' / 'detections.csv', newline='') as f:
    from_csv = [[float(r[k]) for k in ('x1', 'y1', 'x2', 'y2')] for r in csv.DictReader(f)]
yolo_lines = (home / 'out' / 'labels' / '0.txt').read_text().splitlines()
from_yolo = torch.tensor([[float(v) for v in line.split()[1:5]] for line in yolo_lines]) * 96
n = len(truth)
xywh = torch.tensor(from_json[:n])
centres = from_yolo[:, :2]
assert torch.allclose(torch.tensor(from_csv[:n]).sort(0).values, truth.sort(0).values, atol=0.01)
assert torch.allclose((xywh[:, :2] + xywh[:, 2:] / 2).sort(0).values, centres.sort(0).values, atol=0.01)
yolo_lines[0]

# %% [markdown]
# ## Video
#
# A video is read with [PyAV](https://pyav.basswood-io.com), which comes with the extra `video`. Frames count
# from 0; each row has its number and its time in seconds. The annotated video keeps the times of the frames, so
# a recording with a varying rate stays in step; an odd width or height loses its last column or row, because
# the codec takes even numbers. A frame that cannot be decoded is reported; decoding ends there,
# and the results of the frames before it are written.

# %%
#| export
VIDEO_SUFFIXES = ('.mp4', '.avi', '.mov', '.mkv', '.webm', '.m4v', '.mpg', '.mpeg', '.wmv')


def is_video(
    path,  # file or folder
) -> bool:
    "Does the name of a file end like that of a video?"
    return Path(path).suffix.lower() in VIDEO_SUFFIXES and not Path(path).is_dir()


def _frames(container, path, broken):
    "Decoded frames; an error of the decoder becomes a line, and ends them"
    n = 0
    try:
        for frame in container.decode(video=0):
            yield frame
            n += 1
    except Exception as e:  # the decoder has many kinds; what it says is reported
        if not type(e).__module__.startswith('av.'):
            raise
        broken.append(f'{path}: frame {n} cannot be decoded ({e}); the frames before it are processed')


def _upright(frame):
    "The frame as a PIL image, turned as the video says"
    image = frame.to_image()
    turn = getattr(frame, 'rotation', 0) % 360
    return image.rotate(turn, expand=True) if turn else image


# %%
#| export
class _Film:
    "Video file that is written beside its place and moved there when it is complete"

    def __init__(self, path, stream):
        self.path, self.stream, self.encoder = path, stream, None
        self.temporary = path.with_name(f'.{path.stem}.{os.getpid()}.tmp.mp4')

    def open(self, image):
        "Start encoding: the first frame gives the size, made even as the codec requires"
        import av

        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = av.open(str(self.temporary), 'w')
        rate = self.stream.average_rate or Fraction(25)
        codec = 'libx264' if 'libx264' in av.codecs_available else 'mpeg4'
        self.encoder = self.file.add_stream(codec, rate=rate)
        self.encoder.width, self.encoder.height = image.width // 2 * 2, image.height // 2 * 2
        self.encoder.pix_fmt = 'yuv420p'
        self.encoder.codec_context.time_base = self.stream.time_base

    def add(self, image, pts):
        "One picture, shown at `pts` in units of the stream's time base"
        import av

        if self.encoder is None:
            self.open(image)
        size = self.encoder.width, self.encoder.height
        frame = av.VideoFrame.from_image(image.crop((0, 0, *size)))
        frame.pts, frame.time_base = pts, self.stream.time_base
        self.file.mux(self.encoder.encode(frame))

    def close(self, complete):
        "Finish the file, or remove it"
        if self.encoder is not None:
            if complete:
                self.file.mux(self.encoder.encode(None))
            self.file.close()
            if complete:
                os.replace(self.temporary, self.path)
        self.temporary.unlink(missing_ok=True)


# %%
#| export
def predict_video(
    predictor: Predictor,  # with network, threshold and suppression
    source,  # video file
    out,  # folder for the annotated video and files
    draw: bool = True,  # write the annotated video
    batch: int = 8,  # frames per forward pass
    progress=lambda x: x,  # wraps the frames
    formats: tuple = ('json',),  # from FORMATS
) -> ResultFiles:  # `rows`: COCO results with frame and time; `found`: frame -> detections
    "Detect objects in every frame of a video; the image id of a frame is its number"
    source, out = Path(source), Path(out)
    if not source.is_file():
        raise DataError(f'{source}: no such video')
    try:
        import av
    except ImportError:
        raise ConfigError(f"{source}: videos need PyAV; pip install 'semidetr[video]'") from None
    results, film_path = ResultFiles(out, predictor.classes, formats), out / f'{source.stem}.mp4'
    if draw and film_path.resolve() == source.resolve():
        raise ConfigError(f'{film_path}: the result would overwrite the video; choose another output folder')
    try:
        container = av.open(str(source))
    except (OSError, av.FFmpegError) as e:
        raise DataError(
            f'{source}: cannot be read as a video ({e.strerror}); restore it or leave it out'
        ) from None
    with container:
        if not container.streams.video:
            raise DataError(f'{source}: has no pictures; give a video')
        film = _Film(film_path, container.streams.video[0])
        complete = False
        try:
            for frames in _groups(progress(_frames(container, source, results.broken)), batch):
                _one_group(predictor, frames, results, source, film if draw else None)
            if not results.found:
                raise DataError(results.broken[0] if results.broken else f'{source}: has no frames')
            complete = True
        finally:
            film.close(complete)
    results.write()
    return results


# %%
#| export
def _groups(items, size):
    "Lists of at most `size` items of an iterator"
    group = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _one_group(predictor, frames, results, source, film):
    "Detections of some frames, into the results and the video"
    images = [_upright(frame) for frame in frames]
    for frame, image, found in zip(frames, images, predictor(images, len(images))):
        n = len(results.found)
        time = round(frame.time, 3) if frame.time is not None else None
        name = f'{source.stem}_{n:06d}.txt'
        results.add(n, image, found, n, name, file=source.name, frame=n, time=time)
        if film is not None:
            film.add(predictor.draw(image, found), frame.pts)


# %%
assert [len(g) for g in _groups(iter(range(7)), 3)] == [3, 3, 1]
is_video('holiday.MP4'), is_video('holiday.jpg')

# %%
#| label: fig-predict-files-picture
#| fig-cap: "A picture that is written for an image, and the boxes of its YOLO rows (dots: their centres): both describe the same objects."
#| fig-alt: "A scene with handwritten digits, an orange box around each, and a dot in the middle of every box"
fig, ax = plt.subplots(figsize=(2.6, 2.6), dpi=90)
show_image(ax, Image.open(home / 'out' / '0.png'))
ax.plot(*centres.numpy().T, 'o', color='#d62728')
plt.show()

# %% [markdown]
# ## Summary
#
# - JSON in COCO's result format, CSV with corners in pixels, YOLO rows with fractions: one writer, the same
#   detections.
# - A broken file is reported and left out; file names are image ids unless an annotation file gives others.
# - A video gives rows with the number and the time of the frame, and an annotated copy.
#
# ## Exercises
#
# 1. An evaluation script counts classes from 0. Which of the three formats can it read without a change?
# 2. How much does rounding to six decimals move a box in an image of 20,000 pixels?
# 3. Write the rows of a video so that equal objects of neighbouring frames share a number.
