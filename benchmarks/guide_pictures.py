"""The drawings of the guides: `python benchmarks/guide_pictures.py` writes them into nbs/guides."""

from pathlib import Path
import matplotlib

matplotlib.use('agg')
import matplotlib.pyplot as plt
from semidetr.draw import COLORS
from semidetr.train.config import preset

HERE = Path(__file__).resolve().parents[1] / 'nbs' / 'guides'
BLUE, ORANGE, GREEN = COLORS['student'], COLORS['teacher'], COLORS['truth']
plt.rcParams.update({'font.size': 11})


def canvas(width, height, aspect='auto'):
    "Axes without a frame"
    fig, ax = plt.subplots(figsize=(width, height), dpi=110, layout='constrained')
    ax.set_axis_off()
    ax.set_aspect(aspect)
    return fig, ax


def block(ax, x, y, text, color, width=1.0, height=0.8):
    "A coloured rectangle with a word in it"
    ax.add_patch(plt.Rectangle((x, y), width, height, facecolor=color, edgecolor='white', linewidth=1.5))
    ax.text(x + width / 2, y + height / 2, text, ha='center', va='center', color='white')


def situations():
    "Three layouts that are read in place"
    trees = {
        'COCO': 'data/\n  instances_train.json\n  instances_val.json\n  images/\n    0001.jpg',
        'Pascal VOC': 'data/\n  Annotations/0001.xml\n  JPEGImages/0001.jpg\n  ImageSets/Main/train.txt',
        'YOLO': 'data/\n  data.yaml\n  images/train/\n    0001.jpg\n  labels/train/0001.txt',
    }
    fig, ax = canvas(6.4, 1.9)
    for i, (name, tree) in enumerate(trees.items()):
        ax.text(i, 1, name, va='top', fontweight='bold', color=BLUE)
        ax.text(i, 0.82, tree, va='top', family='monospace', fontsize=10, linespacing=1.35)
    ax.set(xlim=(0, 2.95), ylim=(0, 1))
    return fig


def faults():
    "A run that is killed and continued beside one that is not"
    fig, ax = canvas(6.4, 1.7)
    for y, name, parts in (
        (1.1, 'unbroken', [(0, 10, BLUE)]),
        (0, 'killed, same\ncommand again', [(0, 6.4, BLUE), (6, 4, BLUE)]),
    ):
        for i, (start, length, color) in enumerate(parts):
            ax.add_patch(
                plt.Rectangle(
                    (start, y + 0.07 * i), length, 0.42, facecolor=color, alpha=0.85, edgecolor='white'
                )
            )
        ax.text(-0.2, y + 0.22, name, ha='right', va='center')
    for x in range(0, 11, 2):
        ax.plot([x, x], [-0.15, 1.65], ':', color='grey', linewidth=1)
        ax.text(x, -0.2, 'saved', ha='center', va='top', fontsize=9.5, color='grey')
    ax.plot(6.4, 0.21, 'X', color=ORANGE, markersize=13)
    ax.text(6.6, 0.72, 'killed', color=ORANGE, va='center')
    ax.text(10.1, 0.8, 'same\nnumbers', va='center', color=GREEN)
    ax.set(xlim=(-2.6, 11.6), ylim=(-0.6, 1.7))
    return fig


def one_gpu():
    "Eight batches on eight GPUs, or one after another on one"
    fig, ax = canvas(6.4, 2.6)
    for i in range(8):
        block(ax, 0, 7.2 - 0.9 * i, f'GPU {i}: batch {i + 1}', BLUE, 2.6)
        block(ax, 4.4 + 0.72 * i, 4.0, str(i + 1), BLUE, 0.72)
    ax.text(4.4, 5.2, 'one GPU, optim.accumulate=8', va='bottom')
    ax.text(
        4.4,
        3.6,
        'one step of the optimiser after eight batches:\nthe same images, about eight times as long',
        va='top',
        color=GREEN,
    )
    ax.text(0, 8.4, 'eight GPUs', va='bottom')
    ax.set(xlim=(0, 10.6), ylim=(0.6, 9.2))
    return fig


def gpus():
    "Forty images of one step on 1, 2 and 8 GPUs"
    cfg = preset('coco-10')
    batch = cfg.loader.n_labelled + cfg.loader.n_unlabelled
    fig, ax = canvas(6.4, 2.1)
    for row, (n, accumulate) in enumerate(((1, 8), (2, 4), (8, 1))):
        y = 2.2 * (2 - row)
        ax.text(-0.3, y + 0.45, f'{n} GPU' + 's' * (n > 1), ha='right', va='center')
        for i in range(8):
            color = plt.cm.viridis(0.15 + 0.7 * (i // accumulate) / max(n - 1, 1))
            for j in range(batch):
                x = 1.15 * i + 0.2 * j
                ax.add_patch(plt.Rectangle((x, y), 0.18, 0.9, facecolor=color))
        ax.text(9.3, y + 0.45, f'{accumulate} x', va='center')
    ax.text(
        0,
        5.75,
        f'{8 * batch} images per step; colour: the GPU; right: batches one after another',
        va='bottom',
        fontsize=10.5,
    )
    ax.set(xlim=(-1.7, 10.2), ylim=(-0.2, 6.4))
    return fig


def cluster():
    "What waits for what"
    fig, ax = canvas(6.4, 1.9)
    block(ax, 0, 1.0, 'burn-in', 'grey', 2.2)
    for i, (name, color) in enumerate(
        (('supervised', '#6b6b6b'), ('mean teacher', ORANGE), ('Semi-DETR', BLUE))
    ):
        y = 2.1 - 1.1 * i
        block(ax, 3.6, y, name, color, 2.8)
        ax.annotate('', (3.55, y + 0.4), (2.25, 1.4), arrowprops=dict(arrowstyle='->'))
        ax.annotate('', (7.75, 1.4), (6.45, y + 0.4), arrowprops=dict(arrowstyle='->'))
    block(ax, 7.8, 1.0, 'record', GREEN, 2.2)
    ax.text(5, 3.1, 'one job each, in any order, on any node', ha='center', va='bottom')
    ax.set(xlim=(0, 10), ylim=(-0.2, 3.6))
    return fig


def from_the_paper():
    "The stages of a run"
    cfg = preset('coco-10')
    end, middle = cfg.optim.iters, cfg.method.T1
    fig, ax = canvas(6.4, 1.7)
    block(ax, 0, 0, 'one-to-many, consistency, mining', BLUE, middle / end * 10)
    block(ax, middle / end * 10, 0, 'one-to-one', '#17517a', 10 - middle / end * 10)
    for x, text in ((0, '0'), (middle / end * 10, f'$T_1$ = {middle:,}'), (10, f'{end:,}')):
        ax.text(x, -0.15, text, ha='center', va='top')
    ax.annotate(
        'teacher: moving average of the student, labels the unlabelled images',
        (5, 0.95),
        ha='center',
        color=ORANGE,
    )
    ax.annotate('', (10, 1.45), (0, 1.45), arrowprops=dict(arrowstyle='->', color=ORANGE))
    ax.set(xlim=(-0.6, 10.9), ylim=(-0.7, 1.6))
    return fig


if __name__ == '__main__':
    for make in (situations, faults, one_gpu, gpus, cluster, from_the_paper):
        figure = make()
        figure.savefig(HERE / f'{make.__name__}.png')
        print(HERE / f'{make.__name__}.png')
