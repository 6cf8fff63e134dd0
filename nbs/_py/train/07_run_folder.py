# %% [markdown]
# # What a run folder holds {#sec-run-folder}
#
# > Tell from its folder whether a run is finished, can be resumed, or must be left alone.
#
# A run that is started twice must not train twice, a run that was stopped must resume, and a folder that
# holds another run must not be overwritten. The trainer, the studies, the dry run and the command line all
# need this answer, and they must agree. It is found here, from three files:
#
# | file | written | what it tells |
# | :--- | :--- | :--- |
# | `run.json` | at the end | hash of the configuration, fingerprint of the data, metrics |
# | `config.json` | by a study, before a run starts | the configuration |
# | `last.pt` | during training | all state, so a run can be resumed |
#
# Two runs are the same if their configurations have the same hash (@sec-config) and their data the same
# fingerprint (@sec-splits). Where the data are does not matter: the same images under another path are the
# same data. `last.pt` holds both, but a checkpoint of a large detector takes seconds to read,
# so `folder_state` only looks whether it is there. The trainer, which has to read it anyway, compares its
# contents with `check_same_run`.

# %%
#| default_exp train.run_folder

# %%
#| export
import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from semidetr.core import ConfigError, DataError, tell
from semidetr.reading import CONFIG, check, read_result, read_small_json
from semidetr.data.catalog import open_dataset, open_further
from semidetr.data.datasets import short_hash
from semidetr.train.checkpoint import LAST, PREVIOUS, load_checkpoint
from semidetr.train.config import config_hash, differences, from_saved, override, to_dict

# %%
#| hide
import json
import tempfile
import matplotlib.pyplot as plt
from semidetr.train.config import preset

# %%
#| export
KINDS = ('new', 'stopped', 'finished', 'other settings', 'other data', 'damaged')
DATA_CHANGED = 'the data have changed since this run began; choose another folder'


@dataclass(frozen=True)
class FolderState:
    "What a run folder holds, compared with one configuration"

    kind: str  # one of KINDS
    result: dict | None = None  # content of run.json if the run is finished
    message: str = ''  # what is in the way, in one line: folder, difference, cure; '' if nothing is


def changed_settings(
    old,  # Config
    new,  # Config
) -> list:  # 'group.field: old -> new'; empty if both have the same hash
    "Settings that make two configurations different runs"
    return [] if config_hash(old) == config_hash(new) else differences(to_dict(old), to_dict(new))


PLACES = ('data', 'images')  # settings of `data` that say where the training images are


def at_places(
    cfg,  # Config
    saved: dict,  # values of `data` in another configuration
    names=PLACES,  # settings of `data`
):  # Config
    "The same configuration, with the same data looked for where another one has them"
    places = {k: saved[k] for k in names if k in saved}
    return replace(cfg, data=replace(cfg.data, **places))


# %% [markdown]
# ## The state of a folder
#
# The order of the questions matters. A result with the right hash and fingerprint settles everything. Without
# it the checkpoint decides: no checkpoint, and there is nothing to resume or to lose.

# %%
#| export
def _read_result(folder):
    "Content of run.json, None if there is no such file, a DataError if it is not the result of a run"
    path = folder / 'run.json'
    if not path.is_file():
        return None
    cure = 'choose another folder, or delete the file, and the run is evaluated again from its checkpoint'
    return read_result(path, cure)


def _read_config(path, cfg):
    "The configuration that a study wrote for a run; its settings may have had other names then"
    cure = 'delete this folder, or choose another --out'
    values = check(CONFIG, read_small_json(path, ConfigError, cure), path, ConfigError, cure)
    try:
        return from_saved(values, like=cfg)
    except ConfigError as e:
        raise ConfigError(f'{path}: {e}; {cure}') from None


def _has_hash(result, cfg):
    "Is this the result of `cfg`? `run.amp=auto` stands for the precision that was chosen when the run began"
    if cfg.run.amp == 'auto':
        chosen = result.get('config', {}).get('run', {}).get('amp', 'auto')
        cfg = override(cfg, [f'run.amp={chosen}'])
    return result['hash'] == config_hash(cfg)


# %%
#| export
def _open_train(cfg):
    return open_dataset(cfg.data.data, 'train', images=cfg.data.images)


def _is_moved(result, cfg):
    "Is this the result of `cfg`, with the training images in another place that can be opened?"
    saved = result.get('config', {}).get('data', {})
    if not _has_hash(result, at_places(cfg, saved)):
        return False
    try:
        return bool(len(_open_train(cfg)))
    except DataError:
        return False


def _changed_since(old, cfg, folder):
    "`changed_settings`, without those that say where the same training images are"
    changed = changed_settings(old, cfg)
    if not changed or changed_settings(old, at_places(cfg, to_dict(old)['data'])):
        return changed
    try:
        same = load_checkpoint(folder)['split'] == _open_train(cfg).fingerprint()
    except DataError:
        return changed
    return [] if same else changed


def _same_data(saved, cfg):
    "Are these the data that a result names? Unlabelled and test images that are gone do not count"
    d = cfg.data
    if saved['fingerprint'] != _open_train(cfg).fingerprint():
        return False
    for key, spec, split, mark in (
        ('pool', d.unlabelled, 'train', pool_names),
        ('test', d.val or d.data, 'val', lambda ds: ds.fingerprint()),
    ):
        with contextlib.suppress(DataError):
            if key in saved and saved[key] != mark(open_further(spec, split, d.images)):
                return False
    return True


def pool_names(
    ds,  # unlabelled images of a run, from `data.unlabelled`
) -> str:  # 16 hex digits
    "Changes if an unlabelled image is added or removed"
    return short_hash(list(ds.ids))


# %%
#| export
def folder_state(
    cfg,  # Config
    folder,  # of the run
) -> FolderState:
    "What a folder holds for a run of `cfg`; data are opened only if there is a result of `cfg`"
    folder = Path(folder)
    try:
        result = _read_result(folder)
    except DataError as e:
        return FolderState('damaged', message=str(e))
    same = result is not None and _has_hash(result, cfg)
    if result is not None and (same or _is_moved(result, cfg)) and _same_data(result['data'], cfg):
        return FolderState('finished', result)
    if not any((folder / x).exists() for x in (LAST, PREVIOUS)):
        return FolderState('new')
    written = folder / 'config.json'
    changed = _changed_since(_read_config(written, cfg), cfg, folder) if written.exists() else []
    if changed:
        more = f' and {len(changed) - 3} more' if len(changed) > 3 else ''
        message = (
            f'{folder} holds a run with other settings ({", ".join(changed[:3])}{more}); '
            'choose another --out or delete that folder'
        )
        return FolderState('other settings', message=message)
    if same:
        return FolderState('other data', message=f'{folder}: {DATA_CHANGED}')
    return FolderState('stopped')


def finished(
    cfg,  # Config
    folder,  # of the run
) -> dict:  # content of its run.json, or None
    "The result of a run, if this very configuration was run in this folder, on these very data, to its end"
    state = folder_state(cfg, folder)
    if state.kind == 'damaged':
        raise DataError(state.message)
    return state.result


# %% [markdown]
# Six folders, and what they hold for the same run. The checkpoints are empty files: they are not read.

# %%
toy = override(preset('digits'), ['data.data=digits:n=6,size=64'])
fingerprint = open_dataset(toy.data.data, 'train').fingerprint()
result = dict(hash=config_hash(toy), data=dict(fingerprint=fingerprint), metrics={})
other = to_dict(override(toy, ['optim.lr=0.5']))
folders = {  # name -> its files
    'a': {},
    'b': {'last.pt': ''},
    'c': {'last.pt': '', 'run.json': json.dumps(result)},
    'd': {'last.pt': '', 'config.json': json.dumps(other)},
    'e': {'last.pt': '', 'run.json': json.dumps({**result, 'data': dict(fingerprint='0123')})},
    'f': {'last.pt': '', 'run.json': '{"hash": "01'},
}
root = Path(tempfile.mkdtemp())
for name, files in folders.items():
    (root / name).mkdir()
    for file, text in files.items():
        (root / name / file).write_text(text)
states = {name: folder_state(toy, root / name) for name in folders}
assert tuple(s.kind for s in states.values()) == KINDS
[s.message.replace(str(root), 'runs') for s in states.values() if s.message]

# %%
#| label: fig-run-folder-kinds
#| fig-cap: "The files of the six folders, and the state that follows from them. Only in the first three can a run start, resume or be looked up; the last three (red) are refused."
#| fig-alt: "A table with one row per folder and a column for each of three files; coloured dots mark the files that are there, and the state is written behind each row."
names = ('run.json', 'config.json', 'last.pt')
colours = {'other settings': '#d62728', 'other data': '#d62728', 'damaged': '#d62728', 'finished': '#2ca02c'}
fig, ax = plt.subplots(figsize=(5.5, 2.2), dpi=80)
for row, (name, state) in enumerate(states.items()):
    columns = [i for i, file in enumerate(names) if file in folders[name]]
    ax.plot(columns, [row] * len(columns), 'o', color=colours.get(state.kind, '#1f77b4'))
    ax.text(2.6, row, state.kind, va='center')
ax.set_xticks(range(3), names)
ax.set_yticks(range(len(states)), states)
ax.set(xlim=(-0.5, 4.2), ylim=(len(states) - 0.4, -0.6), ylabel='folder')
ax.spines[['top', 'right']].set_visible(False)
plt.show()


# %% [markdown]
# ## The checkpoint itself
#
# A run resumes only with the settings and the data that it began with. Otherwise the first half of its curve
# would belong to one experiment and the second half to another. A checkpoint lists the images of each role, so
# the message can say what was added and removed. An image that has other bytes than before may have been
# restored, so it is a note and not an error. Settings that say where the data are may differ, if the images
# are the same.

# %%
#| export
def changed_images(
    old: dict,  # images of one role: dict(ids, bytes, content), from `images_of_roles`
    new: dict,  # the same, today
) -> tuple:  # (what was added, removed or moved; which images have other bytes), '' if nothing
    "Compare the images of one role"
    before, now = set(old['ids']), set(new['ids'])
    parts = []
    for ids, others, what in ((new['ids'], before, 'added'), (old['ids'], now, 'removed')):
        if other := [i for i in ids if i not in others]:
            parts.append(f'{len(other)} {what} (e.g. {other[0]})')
    if not parts and list(old['ids']) != list(new['ids']):
        parts = ['in another order']
    if not parts and old['content'] != new['content']:
        parts = ['other boxes or classes']
    size = dict(zip(old['ids'], old['bytes']))
    other = [i for i, n in zip(new['ids'], new['bytes']) if i in size and n != size[i]]
    return ', '.join(parts), f'{len(other)} (e.g. {other[0]})' if other else ''


def _check_roles(old, new, folder):
    "DataError if the images of a role are others than before; a note if some have other bytes"
    for role, images in old.items():
        if role not in new:
            continue
        changed, rewritten = changed_images(images, new[role])
        if changed:
            raise DataError(
                f'{folder}: the {role} images have changed since this run began: {changed}; restore them, '
                f'or choose another folder (run.init={folder} starts from the weights of this run)'
            )
        if rewritten:
            tell([f'{folder}: {role} images have other bytes than when this run began: {rewritten}'])


# %%
#| export
def _found_again(old, cfg, same, then, now):
    "`cfg` with the places of `old`, wherever these hold the same images"

    def agree(*roles):
        return all(r in then and then[r] == now.get(r) for r in roles)

    names = list(PLACES) if same else []
    if agree('test'):
        names.append('val')
    if old.data.unlabelled and cfg.data.unlabelled and agree('unlabelled'):
        if -1 not in now['unlabelled']['bytes']:  # generated images have no files to compare
            names.append('unlabelled')
    if old.data.split_file and cfg.data.split_file and same:
        if agree('labelled', 'development', 'unlabelled'):
            names.append('split_file')
    cfg, where = at_places(cfg, to_dict(old)['data'], names), 'detector.backbone.weights'
    if _is_same_file(old.run.init, cfg.run.init):
        cfg = override(cfg, [f'run.init={old.run.init}'])
    before, weights = (getattr(getattr(c.detector, 'backbone', None), 'weights', '') for c in (old, cfg))
    return override(cfg, [f'{where}={before}']) if _is_same_file(before, weights) else cfg


def _is_same_file(old, new):
    "Is a file that a run started from the same by another path, or has it moved? The latter is said"
    if not old or not new or old == new or not os.path.exists(new):
        return False
    if os.path.exists(old):
        return os.path.samefile(old, new)
    if Path(old).name != Path(new).name:
        return False
    tell([f'{old} is gone; {new} has the same name and is taken for it (a resumed run does not read it)'])
    return True


def _longer(old, cfg, folder):
    "What to do instead of training a run for longer"
    if cfg.optim.iters <= old.optim.iters:
        return ''
    return (
        f'; to train for more than its {old.optim.iters} iterations, start from its weights in another '
        f'folder: run.init={folder}'
    )


# %%
#| export
def check_same_run(
    old: dict,  # settings in the checkpoint, as plain values
    cfg,  # Config that is to resume it
    old_data: str,  # fingerprint of the split in the checkpoint
    data: str,  # fingerprint of the split of `cfg`
    folder,  # of the run, for the message
    old_roles: dict | None = None,  # role -> images in the checkpoint; None: it is older than these lists
    roles: dict | None = None,  # role -> images of `cfg`, from `images_of_roles`
):
    "ConfigError or DataError if a checkpoint belongs to another run than `cfg`"
    saved, then, now = from_saved(old, like=cfg), old_roles or {}, roles or {}
    if changed := changed_settings(saved, _found_again(saved, cfg, old_data == data, then, now)):
        raise ConfigError(
            f'{folder}: holds a run with other settings ({"; ".join(changed[:3])}); choose another folder, '
            f'or the same settings to go on with it{_longer(saved, cfg, folder)}'
        )
    if old_data != data:
        raise DataError(f'{folder}: {DATA_CHANGED}')
    _check_roles(then, now, folder)


# %%
refusals = []
for old, old_data in ((to_dict(toy), fingerprint), (other, fingerprint), (to_dict(toy), '0123')):
    try:
        check_same_run(old, toy, old_data, fingerprint, 'runs/mine')
    except (ConfigError, DataError) as e:
        refusals.append(str(e))
assert len(refusals) == 2
refusals

# %%
three = dict(ids=['a.png', 'b.png', 'c.png'], bytes=[700, 800, 900], content='')
two = dict(ids=['a.png', 'b.png'], bytes=[700, 800], content='')
lines = []
moved, longer = override(toy, ['data.data=elsewhere']), override(toy, ['optim.iters=9000'])
for cfg, then, now in ((moved, two, two), (toy, three, two), (longer, two, two)):
    try:
        check_same_run(
            to_dict(toy), cfg, '01', '01', 'runs/mine', dict(unlabelled=then), dict(unlabelled=now)
        )
    except (ConfigError, DataError) as e:
        lines.append(str(e))
assert len(lines) == 2 and '1 removed' in lines[0] and 'run.init=runs/mine' in lines[1]
lines

# %% [markdown]
# ## Summary
#
# - `folder_state` compares a folder with a configuration: new, stopped, finished, other settings, other data,
#   or damaged.
# - A finished run is looked up by its hash and the fingerprint of its data; a checkpoint is not read for it.
# - `check_same_run` compares the contents of a checkpoint, when the trainer has read it: settings, training
#   data, and the images of each role. Data in another place are the same if their content is, and files of
#   weights if their name is.
# - Who may write into a folder is said in @sec-lock, how a run ends before its end in @sec-stop.
#
# ## Exercises
#
# 1. Why does `run.amp=auto` need a rule of its own? What would happen on two machines without it?
# 2. A folder holds `last.pt` and a `run.json` with another hash, but no `config.json`. What does
#    `folder_state` answer, and who notices the difference?
