# %% [markdown]
# # Drawing {#sec-draw}
#
# > Draw boxes, matches, sampling points and curves over several seeds, always in the same colours.

# %%
#| default_exp draw

# %%
#| export
import functools
import os
from importlib.util import find_spec
from pathlib import Path
import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from semidetr.core import ConfigError, DataError, suggest, tell

# %%
import matplotlib.pyplot as plt

# %% [markdown]
# ## Why
#
# A semi-supervised detector fails in ways that a loss curve does not show: the teacher detects a shadow as an
# object, the student learns it, and both losses fall. Twelve images show it, if the picture makes clear
# *where* a box *comes from*: the data set, the teacher or the student. So all pictures of this book, of the
# commands and of the reports are made by the functions of this chapter, and a colour means the same
# everywhere.

# %% [markdown]
# ## One colour code
#
# **The colour tells the source, the line style how the box was selected.** The student is blue, the teacher
# orange, the ground truth green. A mined box comes from the teacher as well, so it is orange, but *dashed*:
# its score was too low, and it was kept because of its matching cost. Numbers from papers are grey and
# dotted, so that nobody takes them for results of this book.

# %%
#| export
COLORS = dict(student='#1f77b4', teacher='#ff7f0e', truth='#2ca02c', mined='#ff7f0e', paper='#7f7f7f')
STYLES = dict(student='-', teacher='-', truth='-', mined='--', paper=':')


def _style_of(kind):
    "Colour and line style of a kind"
    if kind not in COLORS:
        raise ConfigError(f"drawing kind '{kind}' is unknown; {suggest(kind, COLORS)}")
    return COLORS[kind], STYLES[kind]


def _ink(color):
    "Black or white, whichever is legible on the colour"
    r, g, b = ImageColor.getrgb(color)
    return 'black' if 0.299 * r + 0.587 * g + 0.114 * b > 140 else 'white'


# %%
#| label: fig-draw-colors
#| fig-cap: "The colour tells where a box comes from, the line style how it was selected."
#| fig-alt: "Five horizontal lines: student blue, teacher orange, truth green, mined orange dashed, paper grey dotted."
fig_colors, ax_colors = plt.subplots(figsize=(3.5, 1.3), dpi=80)
for height, kind in enumerate(COLORS):
    ax_colors.plot([0, 1], [-height, -height], color=COLORS[kind], ls=STYLES[kind], lw=2)
ax_colors.set_yticks(-np.arange(len(COLORS)), list(COLORS))
ax_colors.set_xticks([])
assert COLORS['mined'] == COLORS['teacher'] and STYLES['mined'] != STYLES['teacher']


# %% [markdown]
# ## Any image
#
# Images come as PIL images from a file, as `uint8` arrays, and as the normalised tensors that are the input
# of a detector, $x = (v-\mu)/\sigma$ with the pixel $v\in[0,1]$. The last cannot be drawn without $\mu$ and
# $\sigma$, and a picture in false colours hides faults of the augmentation: so a float image that leaves
# $[0,1]$ is refused unless its normalisation is given, and so is one that contains a NaN.

# %%
#| export
def to_pil(
    img,  # PIL image; uint8 array or tensor, HWC, CHW or HW; float array or tensor, CHW or HW
    mean=None,  # 3 numbers: float pixels were normalised with (x-mean)/std
    std=None,  # 3 numbers
) -> Image.Image:  # RGB
    "Any image that this package handles, as a PIL image"
    if isinstance(img, Image.Image):
        return img.convert('RGB')
    x = torch.as_tensor(img).detach().cpu()
    if x.ndim == 2:
        x = x[None]
    if x.ndim != 3:
        raise DataError(
            f"an image has 2 or 3 axes, this has shape {tuple(x.shape)}; draw one image of a batch at a time"
        )
    chw, hwc = x.shape[0] in (1, 3), x.shape[-1] in (1, 3)
    if hwc and not (chw and isinstance(img, torch.Tensor)):
        x = x.permute(2, 0, 1)
    elif not chw:
        raise DataError(f"an image has 1 or 3 channels, this has shape {tuple(x.shape)}")
    if x.is_floating_point():
        x = x.float()
        if mean is not None:
            x = x * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
        if not torch.isfinite(x).all():
            raise DataError('the image holds pixels that are NaN or infinite; look at the view that made it')
        if x.numel() and (x.min() < -0.02 or x.max() > 1.02):
            raise DataError(
                f'float pixels run from {x.min():.2f} to {x.max():.2f}, not from 0 to 1; '
                'pass the mean and std they were normalised with'
            )
        x = (x * 255).round().clamp(0, 255)
    return Image.fromarray(x.to(torch.uint8).expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


# %%
rows, columns = np.mgrid[:60, :80]
toy = np.stack([3 * columns, 4 * rows, 128 + 0 * rows], -1).astype(np.uint8)
toy[10:40, 15:45], toy[35:55, 50:75] = (250, 220, 60), (60, 40, 120)
toy_boxes = torch.tensor([[15.0, 10, 45, 40], [50, 35, 75, 55]])
toy_labels, toy_classes = torch.tensor([0, 1]), ['sun', 'box']
normalised = (torch.tensor(toy).permute(2, 0, 1) / 255 - 0.5) / 0.25
for same in (Image.fromarray(toy), torch.tensor(toy), torch.tensor(toy).permute(2, 0, 1)):
    assert (np.asarray(to_pil(same)) == toy).all()
assert (np.asarray(to_pil(normalised, mean=(0.5,) * 3, std=(0.25,) * 3)) == toy).all()
try:
    to_pil(normalised)
except DataError as e:
    refusal = str(e)
refusal


# %%
#| export
def show_image(
    ax,  # matplotlib axes
    img,  # anything `to_pil` takes
    mean=None,  # 3 numbers, for normalised tensors
    std=None,  # 3 numbers, for normalised tensors
    title=None,  # text above
):  # the axes
    "Show an image so that pixel (0,0) covers the square from 0 to 1, as in the coordinates of boxes"
    img = to_pil(img, mean, std)
    ax.imshow(img, extent=(0, img.width, img.height, 0), interpolation='nearest')
    ax.set(xlim=(0, img.width), ylim=(img.height, 0))
    ax.axis('off')
    if title is not None:
        ax.set_title(title, fontsize=8)
    return ax


# %% [markdown]
# The coordinates of boxes refer to pixel edges: a box that fills the image extends from $(0,0)$ to $(W,H)$.
# `imshow` alone would put the centre of the first pixel at 0 and shift every box by half a pixel.

# %%
#| label: fig-draw-show
#| fig-cap: "The axes end where the image ends: 0 to 80, and 60 to 0 downwards."
#| fig-alt: "A toy image: a colour gradient with a yellow square and a violet box."
fig_show, ax_show = plt.subplots(figsize=(2, 1.5), dpi=80)
show_image(ax_show, toy, title='60 rows, 80 columns')
assert (*ax_show.get_xlim(), *ax_show.get_ylim()) == (0, 80, 60, 0)


# %% [markdown]
# ## Boxes
#
# Captions give class and score as far as they are known. A box that is not finite cannot be drawn, but it is
# counted in red: the picture of a broken detector must not look normal. A box with swapped corners, a fault
# of the data that should be visible, is drawn as if they were not swapped.

# %%
#| export
def _floats(x):
    "Anything that holds numbers as a float64 tensor on the CPU; None holds none"
    return torch.as_tensor([] if x is None else x).detach().cpu().double()


def _rows(xyxy):
    "Boxes as lists of four floats with ordered corners, and which of them are finite"
    x = _floats(xyxy).reshape(-1, 4)
    lo, hi = torch.minimum(x[:, :2], x[:, 2:]), torch.maximum(x[:, :2], x[:, 2:])
    return torch.cat([lo, hi], 1).tolist(), torch.isfinite(x).all(1).tolist()


def _caption(i, labels, scores, classes):
    "Text of box `i`: class and score, as far as they are known"
    words = []
    if labels is not None:
        c = int(labels[i])
        words.append(str(classes[c] if classes is not None and 0 <= c < len(classes) else c))
    if scores is not None:
        words.append(f'{float(scores[i]):.2f}')
    return ' '.join(words)


# %%
ordered, is_finite = _rows([[45, 40, 15, 10], [0, 0, float('nan'), 9]])
assert ordered[0] == [15, 10, 45, 40] and is_finite == [True, False] and _rows(None) == ([], [])
_caption(0, toy_labels, [0.9], toy_classes), _caption(1, toy_labels, None, None)


# %%
#| export
def draw_boxes(
    ax,  # matplotlib axes that show the image
    xyxy,  # (N,4) pixels of that image; N may be 0
    labels=None,  # (N,) class indices
    scores=None,  # (N,)
    classes=None,  # names of the classes
    kind: str = 'truth',  # key of `COLORS`
    lw: float = 1.5,  # line width, points
    fontsize: float = 6,  # of the captions
) -> list:  # the rectangles
    "Draw boxes; those that are not finite are counted in red instead of being dropped silently"
    from matplotlib.patches import Rectangle

    color, style = _style_of(kind)
    boxes, finite = _rows(xyxy)
    out = []
    for i, (x1, y1, x2, y2) in enumerate(boxes):
        if not finite[i]:
            continue
        out.append(ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=color, ls=style, lw=lw)))
        text, label = _caption(i, labels, scores, classes), dict(fc=color, ec='none', pad=0.6)
        if text:
            font = dict(fontsize=fontsize, color=_ink(color))
            ax.text(x1, y1, text, va='bottom', clip_on=True, bbox=label, **font)
    if len(out) < len(boxes):
        lost = f'{len(boxes) - len(out)} not finite'
        ax.text(0.02, 0.02, lost, color='red', fontsize=8, transform=ax.transAxes)
    return out


# %%
#| label: fig-draw-boxes
#| fig-cap: "Ground truth, student and a mined box of the teacher on one image; the student's third box is NaN and is counted in red."
#| fig-alt: "A toy image with a yellow square and a violet box. Green, blue and dashed orange rectangles lie around them; red text: 1 not finite."
fig_boxes, ax_boxes = plt.subplots(figsize=(3.6, 2.7), dpi=80)
show_image(ax_boxes, toy)
drawn_truth = draw_boxes(ax_boxes, toy_boxes)
drawn_mined = draw_boxes(ax_boxes, [[47.0, 33, 77, 57]], kind='mined')
predicted = [[13.0, 12, 44, 43], [52, 37, 72, 56], [0, 0, float('nan'), 9]]
drawn = draw_boxes(ax_boxes, predicted, [0, 1, 1], [0.9, 0.6, 0.5], toy_classes, 'student')
assert len(drawn_truth) == 2 and len(drawn) == 2 and draw_boxes(ax_boxes, torch.zeros(0, 4)) == []


# %% [markdown]
# ## Many images
#
# A grid shows a batch. `boxes` has one entry per image; a dict of several such lists draws several kinds over
# each other.

# %%
#| export
def _figure(nrows, ncols, width, height):
    "A closed figure and its axes, so that a cell that ends with it shows it only once"
    import matplotlib.pyplot as plt

    size, layout = (width, max(height, 1)), dict(squeeze=False, layout='constrained')
    fig, axes = plt.subplots(max(nrows, 1), ncols, figsize=size, dpi=80, **layout)
    plt.close(fig)
    for ax in axes.flat:
        ax.axis('off')
    return fig, axes


def _item(x, labels=None, scores=None):
    "(boxes, labels, scores) of a tensor, a dict of them, a sample, or None"
    if x is None:
        return None, None, None
    if isinstance(x, dict):
        return x.get('boxes'), x.get('labels', labels), x.get('scores', scores)
    if hasattr(x, 'boxes'):
        return x.boxes, x.labels, scores
    return x, labels, scores


# %%
assert _item(None) == (None, None, None) and _item({'boxes': toy_boxes})[1:] == (None, None)
_item({'boxes': toy_boxes, 'labels': toy_labels})


# %%
#| export
def image_grid(
    images,  # list of anything `to_pil` takes
    boxes=None,  # per image (N,4) xyxy pixels, {'boxes','labels','scores'} or None; or {kind: such a list}
    labels=None,  # per image (N,), for boxes given as tensors
    scores=None,  # per image (N,), for boxes given as tensors
    classes=None,  # names of the classes
    kind: str = 'truth',  # of the boxes, key of `COLORS`
    titles=None,  # one text per image
    ncols: int = 4,  # images per row
    cell: float = 1.5,  # side of a cell, inches
    mean=None,  # 3 numbers, for normalised tensors
    std=None,  # 3 numbers, for normalised tensors
):  # matplotlib Figure
    "Images in rows, with their boxes"
    images = list(images)
    ncols = max(1, min(ncols, len(images)))
    nrows = -(-len(images) // ncols)
    fig, axes = _figure(nrows, ncols, ncols * cell, nrows * (cell + 0.2 * (titles is not None)))
    layers = boxes if isinstance(boxes, dict) else {kind: boxes}
    at = lambda rows, i: None if rows is None else rows[i]
    for i, (ax, img) in enumerate(zip(axes.flat, images)):
        show_image(ax, img, mean, std, at(titles, i))
        for k, rows in layers.items():
            draw_boxes(ax, *_item(at(rows, i), at(labels, i), at(scores, i)), classes, k)
    return fig


# %%
#| label: fig-draw-grid
#| fig-cap: "A grid of images with two boxes, one box and no box; the first image has two layers."
#| fig-alt: "Three toy images in a row, titled two, one and none, with two, one and no green boxes; the first has a blue box too."
by_kind = dict(
    truth=[toy_boxes, torch.tensor([[35.0, 10, 65, 40]]), None], student=[[[12.0, 12, 44, 43]], None, None]
)
image_grid([toy, toy[:, ::-1].copy(), toy], by_kind, titles=['two', 'one', 'none'])


# %% [markdown]
# Reports compare models on the *same* images. The ground truth is in the first column and, as thin lines,
# below every prediction, so that a missed object shows as a green box with nothing over it.

# %%
#| export
def compare(
    images,  # list of images, {image_id: image}, or list of samples (with .image, .image_id, .boxes, .labels)
    predictions: dict,  # {model: detections by image id, or a list of them in the order of the images}
    truth=None,  # the same with {'boxes','labels'}; None: that of the samples, if they are samples
    classes=None,  # names of the classes
    threshold: float = 0.3,  # lowest score that is drawn
    kinds: dict = None,  # {model: kind}; default: the name if it is a kind, else student
    cell: float = 1.5,  # side of a cell, inches
    mean=None,  # 3 numbers, for normalised tensors
    std=None,  # 3 numbers, for normalised tensors
):  # matplotlib Figure
    "One row per image, one column per model; the ground truth is first and, thin, below every prediction"
    if not isinstance(images, dict):
        images = {getattr(s, 'image_id', i): s for i, s in enumerate(images)}
    if truth is None:
        truth = {k: s for k, s in images.items() if hasattr(s, 'boxes')}
    ncols = 1 + len(predictions)
    fig, axes = _figure(len(images), ncols, ncols * cell, len(images) * cell + 0.2)
    for i, (key, s) in enumerate(images.items()):
        at = lambda rows: rows.get(key) if isinstance(rows, dict) else rows[i]  # of this image
        for name, ax in zip(['truth', *predictions], axes[i]):
            show_image(ax, getattr(s, 'image', s), mean, std, None if i else name)
        boxes, labels, _ = _item(at(truth))
        draw_boxes(axes[i, 0], boxes, labels, None, classes)
        for (name, detections), ax in zip(predictions.items(), axes[i, 1:]):
            draw_boxes(ax, boxes, lw=0.8)
            kind = (kinds or {}).get(name, name if name in COLORS else 'student')
            draw_boxes(ax, *_above(_item(at(detections)), threshold), classes, kind)
    return fig


def _above(item, threshold):
    "The rows of (boxes, labels, scores) whose score is not below the threshold; a NaN score stays visible"
    boxes, labels, scores = item
    if boxes is None or scores is None:
        return item
    keep = ~(torch.as_tensor(scores) < threshold)
    return [None if x is None else torch.as_tensor(x)[keep] for x in item]


# %%
#| label: fig-draw-compare
#| fig-cap: "The supervised model misses the violet box, the student finds both objects; detections below the threshold are not drawn."
#| fig-alt: "One row of three toy images: truth with two green boxes; supervised with one blue box; student with two blue boxes."
one = {'boxes': torch.tensor([[14.0, 9, 43, 42]]), 'labels': torch.tensor([0]), 'scores': torch.tensor([0.8])}
two = {
    'boxes': torch.tensor([[14.0, 11, 46, 41], [49, 36, 74, 54], [0, 0, 9, 9]]),
    'labels': torch.tensor([0, 1, 1]),
    'scores': torch.tensor([0.9, 0.7, 0.1]),
}
table = compare(
    {7: toy},
    {'supervised': {7: one}, 'student': {7: two}},
    {7: {'boxes': toy_boxes, 'labels': toy_labels}},
    toy_classes,
)
assert [len(panel.patches) for panel in table.axes] == [2, 2 + 1, 2 + 2]
assert [panel.get_title() for panel in table.axes] == ['truth', 'supervised', 'student']
table


# %% [markdown]
# ## Without a figure
#
# The prediction command and the doctor write images and need neither axes nor margins. The frame is drawn on
# the first and the last pixel that the box touches. Pillow's own font has the letters of English; for other
# scripts the fonts of matplotlib and of the system are tried.

# %%
#| export
def _touched(box, size):
    "First and last pixel that a box touches in an image of (width, height), clipped to it: x1, y1, x2, y2"
    x1, y1, x2, y2 = (min(max(v, 0), side) for v, side in zip(box, size * 2))
    x1, y1 = min(int(x1), size[0] - 1), min(int(y1), size[1] - 1)
    return x1, y1, max(int(np.ceil(x2)) - 1, x1), max(int(np.ceil(y2)) - 1, y1)


_FONT_FOLDERS = (
    '/usr/share/fonts',
    '/usr/local/share/fonts',
    '~/.fonts',
    '~/.local/share/fonts',
    '/System/Library/Fonts',
    '/Library/Fonts',
    'C:/Windows/Fonts',
)


def _font_files():
    "Font files of $SEMIDETR_FONT, of matplotlib and of the system, in this order"
    if own := os.environ.get('SEMIDETR_FONT'):
        yield own
    if found := find_spec('matplotlib'):
        yield Path(found.origin).parent / 'mpl-data' / 'fonts' / 'ttf' / 'DejaVuSans.ttf'
    for folder in _FONT_FOLDERS:
        files = sorted(Path(folder).expanduser().rglob('*'))
        yield from (f for f in files if f.suffix.lower() in ('.ttf', '.otf', '.ttc'))


def _shows(font, text):
    "Has the font a glyph for every character?"
    missing = bytes(font.getmask('\uffff'))
    return all(c.isspace() or bytes(font.getmask(c)) != missing for c in set(text))


@functools.lru_cache(maxsize=512)
def font_for(
    text: str,  # a class name
    size: int,  # height in pixels
):  # PIL font, or None if no font here has every character
    "Pillow's own font if it shows the text, else the first font that does"
    own, font = os.environ.get('SEMIDETR_FONT'), ImageFont.load_default(size)
    if text.isascii() or _shows(font, text):
        return font
    for file in _font_files():
        try:
            font = ImageFont.truetype(str(file), size)
        except OSError:
            if file == own:
                raise ConfigError(
                    f'SEMIDETR_FONT={own}: cannot be read as a font; give a .ttf, .otf or .ttc file'
                ) from None
            continue
        if _shows(font, text):
            return font
    return None


# %%
assert font_for('cat', 12) is not None
assert font_for('Größe', 12) is None or _shows(font_for('Größe', 12), 'Größe')
font_for('\uffff', 12)


# %%
#| export
def _drawn_caption(i, labels, scores, classes, size):
    "(Text, font) of box `i`; a class name that no font shows is drawn as its number, and a note says so"
    text, name = _caption(i, labels, scores, classes), _caption(i, labels, None, classes)
    if font := font_for(name, size):
        return text, font
    tell(
        [
            f"no font here shows the class name '{name}', which is drawn as #{int(labels[i])}; set the "
            'environment variable SEMIDETR_FONT to a font file that does'
        ]
    )
    return f'#{int(labels[i])} {_caption(i, None, scores, classes)}'.strip(), ImageFont.load_default(size)


def draw_on_image(
    img,  # PIL image, or anything `to_pil` takes
    xyxy,  # (N,4) pixels; N may be 0
    labels=None,  # (N,) class indices
    scores=None,  # (N,)
    classes=None,  # names of the classes
    kind: str = 'student',  # key of `COLORS`
    width: int = None,  # line width in pixels; default grows with the image
) -> Image.Image:  # a new RGB image of the same size
    "Boxes drawn into a copy of the image, without matplotlib; parts outside of it are drawn on its border"
    color, style = _style_of(kind)
    img, (boxes, finite) = to_pil(img).copy(), _rows(xyxy)
    width = width or max(1, round(min(img.size) / 200))
    frames, corners = np.zeros((img.height, img.width), bool), {}
    for i, box in enumerate(boxes):
        if finite[i]:
            x1, y1, x2, y2 = _touched(box, img.size)
            inside = frames[y1 : y2 + 1, x1 : x2 + 1]
            inside[:width] = inside[-width:] = inside[:, :width] = inside[:, -width:] = True
            corners[i] = x1, y1
    if style != '-':  # stripes along both axes
        frames &= np.add.outer(np.arange(img.height), np.arange(img.width)) // (4 * width) % 2 == 0
    img.paste(color, mask=Image.fromarray(frames * np.uint8(255)))
    draw, size = ImageDraw.Draw(img), max(9, round(min(img.size) / 40))
    for i, (x1, y1) in corners.items():
        text, font = _drawn_caption(i, labels, scores, classes, size)
        if not text:
            continue
        w, h = draw.textbbox((0, 0), text, font=font)[2:]
        x, y = max(0, min(x1, img.width - w)), max(0, y1 - h - 1)
        draw.rectangle((x, y, x + w, y + h), fill=color)
        draw.text((x, y), text, fill=_ink(color), font=font)
    if not all(finite):
        draw.text((1, 1), f'{finite.count(False)} not finite', fill='red', font=ImageFont.load_default(size))
    return img


# %%
#| label: fig-draw-burnt
#| fig-cap: "Mined boxes drawn into the pixels of an image, with class and score."
#| fig-alt: "The toy image with two dashed orange frames and the captions sun 0.90 and box 0.40."
marked, orange = draw_on_image(toy, toy_boxes, kind='teacher'), ImageColor.getrgb(COLORS['teacher'])
assert marked.size == (80, 60) and marked.getpixel((15, 10)) == marked.getpixel((44, 39)) == orange
assert marked.getpixel((45, 40)) == tuple(toy[40, 45])
assert draw_on_image(toy, torch.zeros(0, 4)).tobytes() == to_pil(toy).tobytes()
enlarged = Image.fromarray(toy).resize((240, 180))
draw_on_image(enlarged, 3 * toy_boxes, toy_labels, [0.9, 0.4], toy_classes, 'mined', width=2)


# %% [markdown]
# ## Results of several seeds
#
# A single run proves little. With $y_r$ the value of run $r$ of $R$, at a step or at the end, every plot
# shows
#
# $$ \bar y = \frac1R\sum_{r=1}^{R} y_r, \qquad s = \sqrt{\frac{1}{R-1}\sum_{r=1}^{R}(y_r-\bar y)^2} $$ {#eq-draw-spread}
#
# as line and band, and $n=R$ in its legend. $s$ is the standard deviation of the runs, not the standard error
# of the mean, which is $s/\sqrt R$. For one run there is no band, and a NaN in any run leaves a gap.

# %%
#| export
def curve(
    ax,  # matplotlib axes
    x,  # (T,) steps
    y_runs,  # (R,T), one row per seed; or (T,)
    label: str = '',  # name in the legend; the number of seeds is added
    kind: str = 'student',  # key of `COLORS`
    color=None,  # another colour, if there are more curves than kinds
):
    "Mean over the seeds as a line, one sample standard deviation as a band; a NaN leaves a gap"
    kind_color, style = _style_of(kind)
    color = color or kind_color
    runs = [np.atleast_1d(np.asarray(r, float)) for r in y_runs]
    if runs and np.ndim(y_runs[0]) == 0:
        runs = [np.concatenate(runs)]
    for r in runs:
        if len(r) != len(x):
            raise DataError(f"curve '{label}': {len(x)} steps but a run of {len(r)} values")
    mean = np.mean(runs, 0) if runs else np.full(len(x), np.nan)
    (line,) = ax.plot(x, mean, style, color=color, lw=1.5, label=f'{label} (n={len(runs)})')
    if len(runs) > 1:
        sd = np.std(runs, 0, ddof=1)
        ax.fill_between(x, mean - sd, mean + sd, color=color, alpha=0.2, lw=0)
    return line


# %%
#| label: fig-draw-curve
#| fig-cap: "Three seeds per curve. The bands overlap until step 55: up to there it is not clear which one is better."
#| fig-alt: "Two rising curves with bands; the orange one ends above the blue one."
steps = np.arange(0, 101, 5)
toy_runs = {
    kind: [top * (1 - np.exp(-steps / 40)) + 2 * np.sin(steps / 30 + 3 * seed) for seed in range(3)]
    for kind, top in (('student', 30), ('teacher', 36))
}
fig_curve, ax_curve = plt.subplots(figsize=(4.5, 2.6), dpi=80)
lines = [curve(ax_curve, steps, y, kind, kind) for kind, y in toy_runs.items()]
ax_curve.set(xlabel='step', ylabel='AP')
ax_curve.legend()
mean = {kind: np.mean(y, 0) for kind, y in toy_runs.items()}
std = {kind: np.std(y, 0, ddof=1) for kind, y in toy_runs.items()}
overlap = mean['student'] + std['student'] >= mean['teacher'] - std['teacher']
assert steps[overlap].max() == 55
assert np.allclose(lines[0].get_ydata(), mean['student']) and lines[0].get_label() == 'student (n=3)'


# %% [markdown]
# The results of a study, next to the numbers of a paper. Every seed is a dot, so that a mean cannot hide that
# one of three runs failed.

# %%
#| export
def dots(
    ax,  # matplotlib axes
    results: dict,  # {name: values of its seeds}, drawn from top to bottom
    paper: dict = None,  # {name: published value}
    kinds: dict = None,  # {name: key of `COLORS`}; default student
    unit: str = 'AP',  # label of the axis
):
    "Every seed as a dot, mean and standard deviation as a bar with n, published numbers as a grey ring"
    for i, (name, values) in enumerate(results.items()):
        v, color = np.asarray(list(values), float), _style_of((kinds or {}).get(name, 'student'))[0]
        if len(v):
            std = v.std(ddof=1) if len(v) > 1 else None
            ax.errorbar(v.mean(), i, xerr=std, fmt='|', ms=12, capsize=3, color=color)
        ax.plot(v, np.full(len(v), i), 'o', ms=4, alpha=0.5, mec='none', color=color)
        if name in (paper or {}):
            ax.plot(paper[name], i, 'o', mfc='none', color=COLORS['paper'])
    ax.set_yticks(range(len(results)), [f'{k} (n={len(list(v))})' for k, v in results.items()])
    ax.set(xlabel=unit, ylim=(len(results) - 0.5, -0.5))
    return ax


# %%
#| label: fig-draw-dots
#| fig-cap: "Toy numbers: each seed, mean and standard deviation, and a published value as a grey ring."
#| fig-alt: "Three rows with dots, a bar with caps, and for the last row a grey ring."
fig_dots, ax_dots = plt.subplots(figsize=(4.5, 1.8), dpi=80, layout='constrained')
toy_results = {'supervised': [20.1, 21.0, 19.2], 'mean teacher': [24.5, 25.5, 21.0], 'Semi-DETR': [27.0]}
dots(ax_dots, toy_results, paper={'Semi-DETR': 30.5}, kinds={'mean teacher': 'teacher'})
tick_texts = [t.get_text() for t in ax_dots.get_yticklabels()]
assert tick_texts == ['supervised (n=3)', 'mean teacher (n=3)', 'Semi-DETR (n=1)']


# %% [markdown]
# ## Matches, sampling points, mixtures
#
# Three pictures that later chapters need more than once: which boxes are matched (@sec-matching), where an
# attention head samples (@sec-attention), and how a mixture separates matching costs when pseudo boxes are
# mined (@sec-mining).

# %%
#| export
def draw_matches(
    ax,  # matplotlib axes that show the image
    a,  # (N,4) xyxy, e.g. predictions
    b,  # (M,4) xyxy, e.g. truth
    pairs,  # (indices into a, indices into b), as a matcher returns them
    weights=None,  # one number in [0,1] for each pair: opacity of its line
    kinds=('student', 'truth'),  # of a and of b
) -> list:  # the lines
    "Join the centres of matched boxes"
    mid = [[((r[0] + r[2]) / 2, (r[1] + r[3]) / 2) for r in _rows(x)[0]] for x in (a, b)]
    draw_boxes(ax, a, kind=kinds[0], lw=1)
    draw_boxes(ax, b, kind=kinds[1], lw=1)
    out = []
    for n, (i, j) in enumerate(zip(*pairs[:2])):
        (x1, y1), (x2, y2) = mid[0][int(i)], mid[1][int(j)]
        alpha = 1.0 if weights is None else min(max(float(weights[n]), 0.05), 1.0)
        out += ax.plot([x1, x2], [y1, y2], '-o', color='black', lw=1.2, ms=2.5, alpha=alpha)
    return out


# %%
#| label: fig-draw-matches
#| fig-cap: "Two predictions are joined to the objects they are matched to; the third is unmatched."
#| fig-alt: "Three blue boxes and two green ones on the toy image; black lines join the centres of two pairs."
fig_match, ax_match = plt.subplots(figsize=(3, 2.2), dpi=80)
show_image(ax_match, toy)
proposals = torch.tensor([[3.0, 20, 30, 45], [40, 20, 70, 40], [60, 2, 70, 12]])
joins = draw_matches(ax_match, proposals, toy_boxes, ([0, 1], [0, 1]))
assert len(joins) == 2 and joins[0].get_xydata().tolist() == [[16.5, 32.5], [30.0, 25.0]]


# %%
#| export
def draw_points(
    ax,  # matplotlib axes that show the image
    xy,  # (N,2) pixels
    weights=None,  # (N,) attention weights: area of the dots
    kind: str = 'student',  # key of `COLORS`
    size: float = 60.0,  # area of the largest dot, points squared
):
    "Sampling points of an attention head; the area of a dot is proportional to its weight"
    xy = _floats(xy).reshape(-1, 2).numpy()
    w = np.ones(len(xy)) if weights is None else _floats(weights).reshape(-1).numpy()
    area, color = size * w / max(w.max(initial=0), 1e-12), _style_of(kind)[0]
    return ax.scatter(xy[:, 0], xy[:, 1], s=area, color=color, edgecolor='white', lw=0.5, zorder=3)


# %%
#| label: fig-draw-points
#| fig-cap: "An attention head that attends to the middle of the square: the area of a dot is its weight."
#| fig-alt: "Four blue dots of different size on the toy image, the largest in the middle of the yellow square."
fig_points, ax_points = plt.subplots(figsize=(3, 2.2), dpi=80)
show_image(ax_points, toy)
spots = draw_points(ax_points, [[30.0, 25], [20, 15], [40, 15], [62, 45]], [0.5, 0.25, 0.2, 0.05])
assert np.allclose(spots.get_sizes(), [60, 30, 24, 6])


# %%
#| export
def draw_mixture(
    ax,  # matplotlib axes
    values,  # (N,) e.g. matching costs
    means=(),  # (K,) of the Gaussians
    stds=(),  # (K,)
    weights=(),  # (K,) sum 1
    threshold: float = None,  # drawn as a vertical line
    bins: int = 20,  # of the histogram
):
    "Histogram, the Gaussians fitted to the values, and the threshold"
    v = _floats(values).reshape(-1).numpy()
    if len(v):
        ax.hist(v, bins=bins, density=True, color=COLORS['paper'], alpha=0.4)
    marks = np.concatenate([v, np.asarray(means, float)])
    if len(marks):
        g = np.linspace(marks.min() - 1e-3, marks.max() + 1e-3, 300)
        for m, s, w in zip(means, stds, weights):
            density = w * np.exp(-0.5 * ((g - m) / s) ** 2) / (s * np.sqrt(2 * np.pi))
            ax.plot(g, density, color=COLORS['student'])
    if threshold is not None:
        ax.axvline(float(threshold), color=COLORS['mined'], ls=STYLES['mined'])
    return ax


# %%
#| label: fig-draw-mixture
#| fig-cap: "Costs of ten reliable and six unreliable boxes, two Gaussians, and a threshold between them (toy numbers)."
#| fig-alt: "A grey histogram with two humps, two blue bell curves over them and a dashed orange vertical line between."
costs = np.concatenate([np.linspace(-4.4, -3.6, 10), np.linspace(-1.5, 0.5, 6)])
fig_mix, ax_mix = plt.subplots(figsize=(4, 2.2), dpi=80)
low, high = costs[:10], costs[10:]
fitted = [low.mean(), high.mean()], [low.std(), high.std()], [10 / 16, 6 / 16]
draw_mixture(ax_mix, costs, *fitted, threshold=-3.6)
ax_mix.set(xlabel='matching cost')
assert len(ax_mix.lines) == 3

# %% [markdown]
# ## Summary
#
# * Blue is the student, orange the teacher, green the ground truth; dashed is a mined box, grey and dotted a
#   number from a paper.
# * `show_image` and `to_pil` take every kind of image, and refuse normalised ones if the normalisation is not
#   given.
# * `draw_boxes`, `image_grid` and `compare` are for figures; `draw_on_image` writes pixels without
#   matplotlib.
# * `curve` and `dots` show the mean, the standard deviation over seeds and $n$.
# * Boxes that are not finite are counted in red and never dropped silently.
#
# ## Exercises
#
# 1. Draw a batch of strong views with their boxes by `image_grid`. Which of the four geometric operations can
#    you recognise?
# 2. `dots` draws the standard deviation of the seeds. With three seeds, how far apart must two means be for
#    the difference to be significant?
# 3. Give `compare` the detections of student and teacher of one checkpoint and set `threshold` to 0.05. What
#    do the detections with low scores have in common?
