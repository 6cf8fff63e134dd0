# %% [markdown]
# # Repeat a failed step {#sec-replay}
#
# > Repeat a step that was not finite, and name the loss, the layer and the images where it began.
#
# A step that is not finite leaves a file (@sec-capsule). This chapter repeats the step from it, on any machine
# with or without a GPU and without the data, and asks two questions. *Is it the same step?* Each loss is
# compared with the recorded one: on the machine of the run they are equal to the last bit. *Where does it
# begin?* The first weight that was not finite before the step; the first module, in the order of computation,
# whose output is not; if all outputs and losses are finite, the first parameter whose gradient is not, in the
# order of the backward pass.

# %%
#| default_exp train.replay

# %%
#| export
import contextlib
import math
import re
from functools import partial
from typing import NamedTuple
import torch
from semidetr.core import ConfigError, DataError, pick_device
from semidetr.matching.matching import NonFiniteError
from semidetr.train.capsule import Policy, Tape, image_ids, state_digest
from semidetr.train.checkpoint import load_checkpoint
from semidetr.train.config import from_saved
from semidetr.train.evaluation import same_rng
from semidetr.train.generations import check_fields
from semidetr.train.health import HealthMonitor
from semidetr.train.step import Step

# %%
#| hide
import tempfile
from pathlib import Path
import matplotlib.pyplot as plt
from semidetr.train.config import override, preset
from semidetr.train.trainer import Trainer

# %% [markdown]
# ## Read the file
#
# It is read like every checkpoint, without running code from it, and its fields are checked before anything is
# built.

# %%
#| export
KINDS = dict(  # fields beyond those of a checkpoint
    batches=list,
    labelled=dict,
    rank=int,
    world=int,
    received=list,
    threads=int,
    device=str,
    losses=list,
    moved=str,
    error=str,
)


def _is_batch(batch):
    "Parts of images and targets, each target with the id of its image?"
    if not isinstance(batch, dict) or not batch:
        return False
    for part in batch.values():
        if not isinstance(part, dict) or not isinstance(part.get('images'), torch.Tensor):
            return False
        targets = part.get('targets')
        if not isinstance(targets, list) or len(targets) != len(part['images']):
            return False
        if not all(isinstance(t, dict) and 'image_id' in t for t in targets):
            return False
    return True


def load_capsule(
    path,  # failed_step_N.pt
) -> dict:
    "The content of the file of a step that was not finite; `DataError` if it is another file, or damaged"
    saved = load_checkpoint(path)
    for name, kind in KINDS.items():
        if name not in saved:
            kinds = 'a checkpoint, or evidence of an older version'
            raise DataError(f"{path}: holds no '{name}': it is {kinds}; give a failed_step_N.pt")
        if type(saved[name]) is not kind:
            raise DataError(f"{path}: damaged ('{name}' is not of type {kind.__name__})")
    check_fields(saved, path)
    sound = dict(
        batches=saved['batches'] and all(map(_is_batch, saved['batches'])),
        losses=len(saved['losses']) <= len(saved['batches']) and all(map(_is_losses, saved['losses'])),
        received=all(isinstance(x, list) and all(map(torch.is_tensor, x)) for x in saved['received']),
        labelled={'counts', 'boxes', 'labels', 'ignore'} <= saved['labelled'].keys(),
        rank=0 <= saved['rank'] < saved['world'],
        threads=0 < saved['threads'] < 4096,
    )
    for name, is_sound in sound.items():
        if not is_sound:
            raise DataError(f"{path}: damaged ('{name}' has another form)")
    return saved


def _is_losses(terms):
    "Numbers by name?"
    numbers = isinstance(terms, dict) and all(torch.is_tensor(v) and v.numel() == 1 for v in terms.values())
    return numbers and all(isinstance(k, str) for k in terms)


# %% [markdown]
# ## Build the step
#
# Networks, method, optimiser and scaler come from the settings, their state from the file. A method is built
# with the annotations of the labelled images, in the place of the data set.

# %%
#| export
class Annotations:
    "Annotations of a data set whose images are not here, from `annotations` (@sec-capsule)"

    has_boxes = True

    def __init__(self, saved: dict):
        counts = saved['counts'].tolist()
        rows = {k: saved[k].split(counts) for k in ('boxes', 'labels', 'ignore')}
        self.rows = [{k: v[i] for k, v in rows.items()} for i in range(len(counts))]

    def __len__(self):
        return len(self.rows)

    def annotation(self, i):
        return self.rows[i]


class Repeated(Policy, Step):
    "The step of a capsule"

    def __init__(
        self,
        saved: dict,  # from `load_capsule`
        path,  # of it, for messages
        device='cpu',
        like=None,  # Config with settings classes of your own, if the run has such
    ):
        self.device, self.batches = pick_device(device), saved['batches']
        self.place = saved['rank'], saved['world']
        try:
            cfg = from_saved(saved['config'], like)
            check_fields(saved, path, cfg.optim.iters)
            self.build(cfg, cfg.detector.untrained(), Annotations(saved['labelled']))
        except ConfigError as e:
            why = 'written by another version of semidetr, or with settings classes of its own (give `like`)'
            raise DataError(f'{path}: {e}; {why}') from None
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as e:
            raise DataError(f'{path}: the step cannot be built from it ({type(e).__name__}: {e})') from e
        self.health, self.tape, self.moved = HealthMonitor(), Tape(saved['received']), ''
        if fault := self._taken(saved, None, path):
            raise DataError(fault)

    def compute(self) -> str:  # the error, '' if all is finite
        "The step up to the update; afterwards everything is as before it, but for the losses"
        self.snapshot.take()
        try:
            with self.tape.playing(*self.place):
                self.passes(self.batches)
            self.own_norm = None
            self.update()
        except NonFiniteError as e:
            self.moved = state_digest(self)
            return str(e)
        finally:
            self.snapshot.back()
        return ''


# %% [markdown]
# ## Find the beginning
#
# `Watch` looks at the output of every module, inner ones first, since they end first; and at every gradient as
# it comes. The step is computed twice: once as it was, for the numbers, and once watched, because a module that
# is watched may be computed in another way.

# %%
#| export
def first_not_finite(
    output,  # of a module: tensors in lists, tuples, dicts and objects
):  # a tensor with NaN or infinity, None without one
    "The first tensor of an output that is not finite"
    if isinstance(output, torch.Tensor):
        return output if output.is_floating_point() and not output.isfinite().all() else None
    if isinstance(output, dict):
        output = output.values()
    elif not isinstance(output, (list, tuple)):
        output = getattr(output, '__dict__', {}).values()
    return next((t for t in map(first_not_finite, output) if t is not None), None)


def _same(a, b):
    "Equal, where NaN equals NaN?"
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


# %%
toy = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(2, 1)))
toy[1][1].weight.data[0, 0] = math.inf
seen = [name for name, m in toy.named_modules() if first_not_finite(m(torch.ones(1, 2))) is not None]
assert first_not_finite(dict(a=[torch.ones(2), (torch.tensor([1, math.nan]),)])).isnan().any()
seen


# %%
#| export
class Watch:
    "The first module of a step whose output is not finite, and the first gradient"

    def __init__(
        self,
        run,  # Repeated
    ):
        self.run, self.layer, self.gradient, self.images = run, '', '', []
        self.largest, self.fed, self.handles = (0.0, ''), None, []
        for kind in ('student', 'teacher', 'method'):
            network = getattr(run, kind)
            for name, module in network.named_modules(prefix=kind):
                self.handles.append(module.register_forward_hook(partial(self.see, name)))
            for name, p in network.named_parameters(prefix=kind):
                if p.requires_grad:
                    self.handles.append(p.register_hook(partial(self.see_gradient, name)))
            if hasattr(network, 'backbone'):
                self.handles.append(network.backbone.register_forward_pre_hook(self.feed))

    def feed(self, module, args):
        "Which images the networks get; None if they are mixtures"
        parts = [p for batch in self.run.suspect for p in batch.values()]
        here = [p['targets'] for p in parts if _same(p['images'].to(args[0].device), args[0])]
        self.fed = [t['image_id'] for t in here[0]] if here else None

    def see(self, name, module, args, output):
        bad = None if self.layer else first_not_finite(output)
        if bad is None:
            return
        self.layer = name
        if self.fed and bad.ndim > 1 and len(bad) == len(self.fed):
            finite = bad.flatten(1).isfinite().all(1).tolist()
            self.images = [i for i, ok in zip(self.fed, finite) if not ok]

    def see_gradient(self, name, g):
        if not g.isfinite().all():
            self.gradient = self.gradient or name
        self.largest = max(self.largest, (float(g.detach().abs().max()), name))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


# %% [markdown]
# ## The result

# %%
#| export
class Replay(NamedTuple):
    "A step that was repeated"

    step: int  # iteration
    rank: int  # of the process, of so many:
    world: int
    rows: list  # (number of the batch, loss, recorded, replayed); None where one has no such loss
    recorded: str  # error
    replayed: str  # error, '' if all is finite
    term: str  # first loss that is not finite, or term of the matching; '' for a gradient
    weight: str  # first weight that was not finite before the step; '' if all were
    layer: str  # first module whose output is not finite; '' if all are finite
    gradient: str  # first parameter whose gradient is not finite; '' if it did not come to that
    images: list  # ids; all of the batch if there is no hint at single ones
    same_state: bool  # are teacher, running statistics and random state after the failure those of then?

    @property
    def equal(self) -> bool:
        "Is everything equal to the last bit: each loss, the error, the state when it came?"
        same = all(a is not None and b is not None and _bits(a) == _bits(b) for *_, a, b in self.rows)
        return same and self.recorded == self.replayed and self.same_state


def _bits(x):
    "A number of which two are equal if all bits are, except for those of NaN"
    return float(x).hex()


# %%
#| export
def replay_lines(found: Replay) -> list:  # text
    "What the command `semidetr replay` prints"
    place = f', process {found.rank} of {found.world}' if found.world > 1 else ''
    out = [f'iteration {found.step}{place}: {found.recorded}']
    width = max([4, *(len(name) for _, name, *_ in found.rows)])
    if found.rows:
        out.append(f'batch  {"loss":{width}}  {"recorded":>15}  {"replayed":>15}')
    for batch, name, *values in found.rows:
        a, b = ('-' if v is None else f'{v:.9g}' for v in values)
        mark = '' if None not in values and _bits(values[0]) == _bits(values[1]) else '  differs'
        out.append(f'{batch:5}  {name:{width}}  {a:>15}  {b:>15}{mark}')
    return [*out, _comparison(found), *_findings(found)]


def _comparison(found):
    n = f'{len(found.rows)} losses,' if found.rows else 'no loss came before it;'
    if not found.replayed:
        return 'the fault does not replay: all is finite'
    if found.equal:
        return f'the fault replays, bit for bit: {n} the error, and the state when it came'
    why = 'another machine, device or version of PyTorch rounds in another way'
    return f'the fault replays, but not bit for bit ({why}): {found.replayed}'


def _findings(found):
    if not found.replayed:
        return []
    out = [f'first term that is not finite: {found.term}'] if found.term else []
    if found.weight:
        out.append(f'first weight that was not finite before the step: {found.weight}')
    out.append(f'first layer with an output that is not finite: {found.layer or "none"}')
    if found.gradient:
        out.append(f'first gradient that is not finite: {found.gradient}')
    return [*out, f'images: {", ".join(map(str, found.images))}']


# %%
#| export
def _suspects(run, watch, error):
    "Images with pixels or boxes that are not finite, or with such an output, or named in the error; else all"
    bad = []
    for part in (p for batch in run.suspect for p in batch.values()):
        for image, t in zip(part['images'], part['targets']):
            if first_not_finite([image, t]) is not None:
                bad.append(t['image_id'])
    everything = [i for ids in image_ids(run.suspect).values() for i in ids]
    named = re.match(r'image (.+) \(number \d+ of the batch\)', error)
    named = [i for i in everything if named and str(i) == named[1]]
    return list(dict.fromkeys(bad or watch.images or named or everything))


def _first_term(losses, error):
    "The first loss that is not finite, or the term of the matching that the error names"
    bad = [k for k, v in losses.items() if not v.isfinite()]
    named = re.search(r"the term '(\w+)' of the matching", error)
    return bad[0] if bad else f'{named[1]} of the matching' if named else ''


def _first_weight(run):
    "The first parameter or buffer that is not finite"
    for kind in ('student', 'teacher', 'method'):
        for name, value in getattr(run, kind).state_dict().items():
            if first_not_finite([value]) is not None:
                return f'{kind}.{name}'
    return ''


def _rows(recorded, replayed):
    "The losses of both, side by side"
    out = []
    for n in range(max(len(recorded), len(replayed))):
        a, b = (x[n] if n < len(x) else {} for x in (recorded, replayed))
        for k in dict.fromkeys([*a, *b]):
            out.append((n, k, *(float(x[k]) if k in x else None for x in (a, b))))
    return out


def _all_finite(terms):
    return bool(terms) and all(v.isfinite() for v in terms.values())


# %%
assert (
    _first_term(dict(loss_a=torch.ones(())), "layer 0: the term 'cls' of the matching is")
    == 'cls of the matching'
)
_rows([dict(loss_a=torch.tensor(1.0))], [dict(loss_a=torch.tensor(1.0), loss_b=torch.tensor(2.0))])


# %%
#| export
@contextlib.contextmanager
def _as_recorded(threads):
    "The number of threads inside; random state and threads are those of before afterwards"
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with same_rng():
            yield
    finally:
        torch.set_num_threads(before)


def replay(
    path,  # failed_step_N.pt in the folder of a run
    device='cpu',  # where to compute it, as for `pick_device`
    like=None,  # Config with settings classes of your own, if the run has such
) -> Replay:
    "Repeat a step that was not finite; `DataError` for a file from which that is impossible"
    saved = load_capsule(path)
    with _as_recorded(saved['threads']):
        run = Repeated(saved, path, device, like)
        try:
            error = run.compute()
            losses = [{k: v.cpu() for k, v in terms.items()} for terms in run.losses]
            weight, moved = _first_weight(run) if error else '', run.moved
            with Watch(run) as watch:
                if error:
                    run.compute()
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as e:
            why = f'{type(e).__name__}: {str(e).splitlines()[0][:100] if str(e) else ""}'
            raise DataError(f'{path}: the step cannot be repeated ({why})') from e
    is_gradient = error and len(losses) == len(run.batches) and all(map(_all_finite, losses))
    largest = f'none; their norm is not, the largest is that of {watch.largest[1]}'
    return Replay(
        step=saved['step'],
        rank=saved['rank'],
        world=saved['world'],
        rows=_rows(saved['losses'], losses),
        recorded=saved['error'],
        replayed=error,
        term=_first_term(losses[-1] if losses else {}, error) if error else '',
        weight=weight,
        layer=watch.layer,
        gradient=(watch.gradient or largest) if is_gradient else '',
        images=_suspects(run, watch, error) if error else [],
        same_state=moved == saved['moved'],
    )


# %% [markdown]
# ## A weight that is NaN
#
# A tiny run of two iterations. Then one weight of its transformer is set to NaN, and the third fails:

# %%
tiny = override(
    preset('digits'),
    [
        'data.data=digits:n=24,size=64',
        'data.count=6',
        'data.dev=0',
        'view.short_sides=[64]',
        'view.eval_short=64',
        'optim.iters=4',
        'method.name=mean_teacher',
        'method.burn_in_iters=1',
        'pseudo.threshold=0.005',
        'loader.n_labelled=2',
        'loader.n_unlabelled=2',
        'loader.num_workers=0',
        'run.test=false',
        'detector.backbone.weights=none',
        'detector.transformer.d_model=32',
        'detector.transformer.n_heads=4',
        'detector.transformer.ffn=32',
        'detector.transformer.num_queries=20',
        'detector.denoising.num=8',
    ],
)
folder = Path(tempfile.mkdtemp())
run = Trainer(tiny, folder / 'weight', progress=False)
run.fit(until=2)
spoilt = next(n for n, _ in run.student.named_parameters() if n.endswith('linear2.weight'))
with torch.no_grad():
    run.student.get_parameter(spoilt)[0, 0] = math.nan
try:
    run.fit()
except NonFiniteError as e:
    message = str(e).replace(str(folder), 'runs')
found = replay(folder / 'weight' / 'failed_step_2.pt')
assert found.equal and found.weight == f'student.{spoilt}' and found.weight.startswith(found.layer)
spoilt, message, replay_lines(found)

# %% [markdown]
# In another run a loss becomes infinite, because its weight is larger than the largest number of float32. Every
# layer is finite, and every loss is repeated to the last bit:

# %%
try:
    Trainer(override(tiny, ['criterion.loss_l1=1e39']), folder / 'loss', progress=False).fit()
except NonFiniteError:
    pass
found_loss = replay(folder / 'loss' / 'failed_step_0.pt')
assert found_loss.equal and found_loss.layer == '' and 'l1' in found_loss.term
print('\n'.join(replay_lines(found_loss)))

# %%
#| label: fig-replay-losses
#| fig-cap: "Losses of the step whose weight of the L1 loss is 1e39: recorded and replayed values are the same, those that are infinite are left out."
#| fig-alt: "Pairs of dots, one for each loss, that lie on each other"
finite_rows = [row for row in found_loss.rows if math.isfinite(row[2])]
fig, ax = plt.subplots(figsize=(5, 3.2), dpi=80)
names = [row[1] for row in finite_rows]
ax.plot([row[2] for row in finite_rows], names, 'o', color='#1f77b4', markersize=9, label='recorded')
ax.plot([row[3] for row in finite_rows], names, '.', color='#ff7f0e', label='replayed')
ax.set(xlabel='loss')
ax.legend()
plt.show()

# %% [markdown]
# ## Summary
#
# - `semidetr replay FILE`, or `replay(path)`, repeats a failed step without the data and without a GPU.
# - The losses are compared with the recorded ones bit for bit, and a difference is said.
# - The first layer, gradient, loss and the images are named; the rest is as before the call.
#
# ## Exercises
#
# 1. The first layer with NaN lies in the teacher, and the student is finite. What can have happened?
# 2. Why are outputs watched in a second computation, and not in the first?
