# %% [markdown]
# # Weight files and rows of classes {#sec-weight-files}
#
# > Read files of weights without running their code, and move rows of a class head by name.
#
# *Why.* A file of weights comes from somebody else. Two things about it are easy to get wrong, and neither fails
# loudly: a pickle may run code while it is read, and the third row of a class head is a `bird` in one data set
# and a `car` in another. This chapter reads tensors only, and moves rows by the names of classes.

# %%
#| default_exp detectors.weight_files

# %%
#| hide
import warnings

warnings.filterwarnings('ignore', message='IProgress')

# %%
#| export
import argparse
import os
import pickle
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
import torch
from torch import Tensor
from semidetr.core import DataError
from semidetr.data import formats
from semidetr.reading import check, check_fields, read_small_json

# %%
import tempfile
import matplotlib.pyplot as plt


# %% [markdown]
# ## Reading files
#
# A pickle can run any code when it is read. `weights_only=True` allows tensors and plain values; checkpoints of
# Deformable-DETR and DINO also hold their command line as an `argparse.Namespace`, which does no more than
# hold values and is allowed. What needs more is refused. Safetensors hold nothing but tensors.

# %%
#| export
@dataclass
class WeightFile:
    "What a file or a folder holds"

    path: str  # for messages
    state: dict  # name -> tensor; of a run of ours: everything in its checkpoint
    config: dict = field(default_factory=dict)  # content of a config.json next to the weights
    classes: list = None  # names of the class rows, if the file tells them
    others: list = field(default_factory=list)  # what else is in the file: optimizer, epoch, ...
    architecture: str = ''  # name of the network, where timm wrote it: in its config.json or its checkpoint


def _load_pickle(path):
    "Content of a file of `torch.save`, tensors and plain values only"
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as e:
        found = re.search(r'(?:GLOBAL|global|class) [`\']?([\w.]+)', str(e))
        if found is None:
            raise DataError(f'{path}: no file of torch, or a damaged one; fetch the file again') from None
        what = found.group(1)
        raise DataError(
            f'{path}: refused, it needs more than tensors and plain values to be read ({what}), which could '
            'run any code; save its state dict alone where you trust it'
        ) from None
    except Exception as e:
        why = (str(e) or type(e).__name__).splitlines()[0][:100]
        raise DataError(f'{path}: cannot be read as weights ({why}); fetch the file again') from None


def _load_safetensors(path):
    "Tensors of a safetensors file"
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as e:
        raise DataError(f'{path}: not a whole safetensors file ({str(e)[:100]}); fetch it again') from None


# %%
#| export
def _json_object(path):
    "Content of a JSON file that holds one object"
    cure = 'fetch the folder again'
    return check_fields(read_small_json(path, cure=cure), {}, path, cure=cure)


def _config_beside(path):
    "Content of the config.json beside a file of weights, if it describes a network of another library"
    there = path.with_name('config.json')
    config = _json_object(there) if there.is_file() else {}
    return config if {'model_type', 'architecture'} & set(config) else {}


def _load_folder(folder):
    "(tensors, content of config.json) of a folder of `transformers`, whole or in shards"
    if not (folder / 'config.json').is_file():
        raise DataError(f'{folder}: no readable config.json; give a file, or a whole folder')
    config, index = _json_object(folder / 'config.json'), folder / 'model.safetensors.index.json'
    if (folder / 'model.safetensors').is_file():
        return _load_safetensors(folder / 'model.safetensors'), config
    if not index.is_file():
        raise DataError(f'{folder}: holds neither model.safetensors nor {index.name}; fetch the folder again')
    state, where = {}, _json_object(index).get('weight_map')
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise DataError(f'{index}: names no shard of a tensor (weight_map); fetch the folder again')
    if odd := [name for name in where.values() if Path(name).name != name]:
        raise DataError(f'{index}: {odd[0]!r} is no file of this folder; fetch the folder again')
    for name in sorted(set(where.values())):
        if not os.path.isfile(folder / name):  # also false for a name that is too long
            raise DataError(f'{folder}: {name} is missing, {index.name} lists it; fetch the folder again')
        state |= _load_safetensors(folder / name)
    if lost := sorted(set(where) - set(state)):
        raise DataError(f'{folder}: no shard holds {lost[0]}; fetch the folder again')
    return state, config


# %% [markdown]
# The tensors lie under a key such as `model` or `state_dict`, next to what training needed. `ema_model` holds
# averaged weights in some files of DINO; the usual ones are taken unless you ask for it.

# %%
#| export
STATE_KEYS = ('model', 'state_dict', 'ema_model', 'state_dict_ema')


def _inner_state(content, path, key):
    "(state dict, other keys) of the content of a file"
    if not isinstance(content, dict):
        raise DataError(f'{path}: holds {type(content).__name__}, no named tensors; save a state dict')
    known = [k for k in STATE_KEYS if isinstance(content.get(k), dict)]
    if key and key not in known:
        raise DataError(f"{path}: holds no '{key}'; it holds {', '.join(map(str, content))[:200]}")
    if 'format' in content and 'config' in content:
        return content, []
    if known:
        key = key or known[0]
        return content[key], [k for k in content if k != key]
    return content, []


def _named_tensors(state, path):
    "The tensors by name, without the prefix of data-parallel training; `DataError` if some are none"
    wrong = [k for k, v in state.items() if not isinstance(k, str) or not isinstance(v, Tensor)]
    if wrong:
        raise DataError(f'{path}: {wrong[0]} is no named tensor; give a file that holds a state dict')
    if all(k.startswith('module.') for k in state):
        return {k.removeprefix('module.'): v for k, v in state.items()}
    return state


# %% [markdown]
# `read_weights` puts this together. It also keeps what a file tells about its classes and its network.

# %%
#| export
def _class_names(classes, path):
    "A list of texts; None, with a line, for an entry of another kind: files name many things `classes`"
    if isinstance(classes, dict) and sorted(classes, key=str) == sorted(range(len(classes)), key=str):
        classes = [classes[n] for n in range(len(classes))]
    if classes is None or (isinstance(classes, list | tuple) and all(isinstance(c, str) for c in classes)):
        return classes and list(classes)
    warnings.warn(f'{path}: its entry for the classes is no list of names, and is left out')


def read_weights(
    path,  # .pth, .pt, .bin or .safetensors; a folder of `transformers`; the folder of a run of ours
    key: str = '',  # 'ema_model' of a file that holds several; '': the first of STATE_KEYS
) -> WeightFile:
    "Read tensors without running code; a one-line `DataError` if that is not possible"
    path, config, others, classes, architecture = Path(path), {}, [], None, ''
    if not path.exists():
        raise DataError(f'{path}: no such file or folder')
    if path.is_dir() and (path / 'last.pt').is_file():
        path = path / 'last.pt'
    if path.is_file() and not path.stat().st_size:
        raise DataError(f'{path}: an empty file; fetch it again')
    if path.is_dir():
        state, config = _load_folder(path)
    elif path.suffix == '.safetensors':
        state, config = _load_safetensors(path), _config_beside(path)
    else:
        content = _load_pickle(path)
        state, others = _inner_state(content, path, key)
        meta = content['meta'] if isinstance(content.get('meta'), dict) else {}
        classes = meta.get('CLASSES') or content.get('classes') or None
        architecture = content['arch'] if isinstance(content.get('arch'), str) else ''
    if not state:
        raise DataError(f'{path}: holds no tensors; give a file that holds a state dict')
    if 'format' not in state:
        state = _named_tensors(state, path)
    classes = _class_names(classes, path)
    if labels := config.get('id2label'):
        check(dict[str, str], labels, f'{path}: id2label', cure='fetch the folder again')
        if odd := [k for k in labels if not k.isdecimal() or len(k) > 9]:
            raise DataError(f'{path}: id2label: {odd[0]!r} is no label; fetch the folder again')
        classes = [name for _, name in sorted(labels.items(), key=lambda item: int(item[0]))]
    check(str | None, config.get('architecture'), f'{path}: architecture', cure='fetch the folder again')
    return WeightFile(str(path), state, config, classes, others, config.get('architecture', architecture))


# %%
class Evil:
    def __reduce__(self):
        return print, ('code of the file runs',)


with tempfile.TemporaryDirectory() as folder:
    torch.save(dict(model=dict(a=torch.zeros(2)), args=argparse.Namespace(lr=1e-4)), f'{folder}/good.pth')
    torch.save(dict(model=dict(a=torch.zeros(2)), extra=Evil()), f'{folder}/evil.pth')
    good = read_weights(f'{folder}/good.pth')
    try:
        read_weights(f'{folder}/evil.pth')
    except DataError as error:
        refusal = str(error).replace(folder, '')
assert list(good.state) == ['a'] and good.others == ['args'] and 'refused' in refusal
refusal

# %% [markdown]
# ## Rows of classes
#
# A class head has one row per class, and the number of a row means nothing but its place in a list of names.
# Two data sets order their classes differently, one has a class more, and a network that keeps its rows then
# predicts the wrong names with high scores. Rows are therefore moved by name. Let $\rho$ map a new class to the
# old one of the same name. Then
#
# $$
# W'_{c} = \begin{cases} W_{\rho(c)} & c \text{ has an old class of its name} \\ \text{untrained} &
# \text{otherwise} \end{cases}
# $$ {#eq-weights-rows}
#
# for class heads of all layers and of the encoder, their biases, and the label table of denoising. The last
# row of a softmax detector, *no object*, stays the last one.

# %%
#| export
CLASS_ROWS = (
    r'(((suppressor|group)\.)?class_head|enc_class_head|(class_embed|second_head)(\.\d+)?)\.(weight|bias)$'
    r'|label_enc\.weight$'
)


def map_class_rows(
    state: dict,  # of a detector; our names
    old_classes: list,  # names of its rows
    new_classes: list,  # names of the wanted rows
    fresh: dict = None,  # state of an untrained detector with the new classes; needed for new ones
) -> tuple:  # (state with the new rows, sentences about what changed)
    "Move the rows of classes by name (@eq-weights-rows); the same tensors where the names are the same"
    old_classes, new_classes = list(old_classes), list(new_classes)
    if old_classes == new_classes:
        return state, []
    names = [k for k in state if re.match(CLASS_ROWS, k)]
    if not names:
        raise DataError('no tensor with class rows is known in these weights; train with their own classes')
    place = {name: i for i, name in enumerate(old_classes)}
    if twice := [c for c in new_classes if old_classes.count(c) > 1]:
        raise DataError(
            f"class '{twice[0]}' has several rows in these weights; give each row a name of its own"
        )
    kept = [c for c in new_classes if c in place]
    added = [c for c in new_classes if c not in place]
    if added and fresh is None:
        raise DataError(f"class '{added[0]}' is new: an untrained detector is needed for its row")
    out = dict(state)
    for key in names:
        start = None if fresh is None else fresh[key]
        out[key] = _moved(key, state[key], len(old_classes), place, new_classes, start)
    return out, [_sentence(old_classes, new_classes, kept, added)]


# %%
#| export
def _moved(key, old, rows, place, new_classes, fresh):
    "One tensor with its rows, one per old class, at their new places"
    has_background = not key.startswith('label_enc') and len(old) == rows + 1
    others = list(range(rows, len(old)))  # no object, or rows that no class uses
    if fresh is None:
        size = len(new_classes) + len(others)
        fresh = old.new_zeros(size, *old.shape[1:])
    new = fresh.detach().to(old.dtype).clone()
    for i, name in enumerate(new_classes):
        if name in place:
            new[i] = old[place[name]]
    if has_background:
        new[len(new_classes)] = old[rows]
    elif key.startswith('label_enc'):
        for i, j in zip(range(len(new_classes), len(new)), others):
            new[i] = old[j]
    return new


def _sentence(old, new, kept, added):
    "What happened to the rows, in one line"
    lost = [c for c in old if c not in new]
    text = f'classes: {len(kept)} of {len(new)} rows by name'
    if added:
        text += f'; new, untrained: {", ".join(added[:5])}{" ..." if len(added) > 5 else ""}'
    if lost:
        text += f'; left out: {", ".join(map(str, lost[:5]))}{" ..." if len(lost) > 5 else ""}'
    return text


# %%
old_head = {'class_head.weight': torch.eye(3), 'class_head.bias': torch.tensor([1.0, 2.0, 3.0])}
untrained = {'class_head.weight': torch.zeros(3, 3), 'class_head.bias': torch.full((3,), -4.6)}
moved, notes = map_class_rows(old_head, ['cat', 'dog', 'cow'], ['cow', 'cat', 'owl'], untrained)
assert moved['class_head.bias'].tolist()[:2] == [3.0, 1.0] and 'owl' in notes[0] and 'dog' in notes[0]
notes

# %%
#| label: fig-weights-rows
#| fig-cap: "Rows of a class head before and after: `cow` and `cat` move with their names, `owl` is untrained, `dog` is left out."
#| fig-alt: "Two 3x3 matrices side by side; the rows of the second are the third and the first of the other, and an empty one."
fig, axes = plt.subplots(1, 2, figsize=(4, 1.8), dpi=80, layout='constrained')
panels = ((old_head, ['cat', 'dog', 'cow'], 'in the file'), (moved, ['cow', 'cat', 'owl'], 'for the data'))
for ax, (head, labels, title) in zip(axes, panels):
    ax.imshow(head['class_head.weight'], cmap='Greys', vmin=0, vmax=1.5)
    ax.set_yticks(range(3), labels)
    ax.set_xticks([])
    ax.set_title(title)
plt.show()

# %% [markdown]
# ## The ids of COCO
#
# The releases trained on COCO have a row for each category id up to 90, ten of which no image uses; row 0
# is not used either. Data sets number the 80 classes without gaps.

# %%
#| export
COCO_CLASSES = tuple(
    'person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,'
    'parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,'
    'tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,'
    'tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,'
    'hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,'
    'keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,'
    'hair drier,toothbrush'.split(',')
)
COCO_UNUSED = (0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83)  # ids below 91 without images
VOC_CLASSES = tuple(formats.VOC_CLASSES)


def coco_id_names() -> list:  # 91 names; 'N/A' where no image has the id
    "Names of the rows of a head that is indexed by category ids"
    names, used = ['N/A'] * 91, [i for i in range(91) if i not in COCO_UNUSED]
    for i, name in zip(used, COCO_CLASSES):
        names[i] = name
    return names


def row_names(
    rows: int,  # of the class head, without no object
    known: list = None,  # names that the file or the user gives
    origin: str = '',  # for the error
) -> tuple:  # (name of each row; 'N/A': not used, sentences about what was assumed)
    "Names of the rows of a class head"
    if known and list(known) == list(COCO_CLASSES) and rows == 91:
        return coco_id_names(), []
    if known and len(known) != rows:
        raise DataError(f'{origin}: {rows} rows of classes, but {len(known)} names; give one name per row')
    if known:
        return list(known), []
    guesses = {91: (coco_id_names(), 'ids of COCO'), 80: (COCO_CLASSES, 'COCO'), 20: (VOC_CLASSES, 'VOC')}
    if rows in guesses:
        names, what = guesses[rows]
        return list(names), [f'no names of classes in the file: {rows} rows taken as those of {what}']
    names = [f'class {i}' for i in range(rows)]
    return names, [f"no names of classes in the file: called 'class 0' to 'class {rows - 1}'; give `classes`"]


# %%
by_id = coco_id_names()
assert (
    len(COCO_CLASSES) == 80
    and by_id[1] == 'person'
    and by_id[90] == 'toothbrush'
    and by_id[13] == 'stop sign'
)
row_names(91)[1]

# %% [markdown]
# ## Summary
#
# - Files are read without running code; a pickle that needs more is refused.
# - Rows of classes move by name; new classes start untrained, and one sentence says so.
# - Rows that are indexed by ids of COCO get the names of its 80 classes.
#
# ## Exercises
#
# 1. Why is `argparse.Namespace` harmless, and a class with a `__setstate__` of its own not?
# 2. Two data sets call the same thing `tv` and `tvmonitor`. What happens to the row, and what could you do?
