# %% [markdown]
# # The trainer {#sec-trainer}
#
# > Run any method on any data: resume exactly, watch the pseudo labels, stop at the first number that is not
# > one.
#
# A training loop is easy to write and hard to trust. This one makes four promises. A run that was stopped and
# resumed gives the numbers of a run that was not. A loss that is not finite stops the run and keeps the
# batch, the weights and the random state that made it. Pseudo labels are watched against the truth that the
# method never sees. And a run's folder says everything that is needed to repeat it.

# %%
#| default_exp train.trainer

# %%
#| export
import contextlib
import dataclasses
import json
import math
import os
import signal
import time
import warnings
from pathlib import Path
import torch
from tqdm import tqdm
from semidetr.train.checkpoint import (
    RunLog,
    cpu_seconds,
    environment,
    load_checkpoint,
    load_weights,
    pack_rng,
    peak_memory_mb,
    save_checkpoint,
    unpack_rng,
)
from semidetr.train.config import (
    Config,
    DataConfig,
    OptimConfig,
    config_hash,
    differences,
    from_dict,
    to_dict,
)
from semidetr.core import (
    ConfigError,
    DataError,
    all_reduce_mean,
    atomic_write,
    is_main,
    pick_device,
    rank,
    rng_state,
    seed_everything,
    set_rng_state,
    stable_hash,
    start_processes,
    world_size,
)
from semidetr.data.catalog import open_dataset
from semidetr.data.datasets import Joined, Subset, Unlabelled
from semidetr.detectors.detector import Detector
from semidetr.train.evaluation import evaluate_model, same_rng, to_device
from semidetr.train.health import HealthMonitor
from semidetr.data.loader import SemiLoader
from semidetr.train.machine import choose_amp
from semidetr.matching.matching import NonFiniteError
from semidetr.semi.methods import METHODS, StepConfig, method_parts
from semidetr.train.optim import average_gradients, build_optimizer, gradient_norm, lr_factor
from semidetr.data.splits import load_split, make_split
from semidetr.semi.teacher import ema_decay, make_teacher, update_teacher


# %% [markdown]
# ## Data of a run

# %%
#| export
@dataclasses.dataclass
class RunData:
    "The four roles that images play in a run"

    labelled: object  # with boxes
    unlabelled: object  # stripped of every box; may be None
    dev: object  # held out of training: the only part that settings are chosen on
    val: object  # test split, for reported numbers; may be None
    truth: object  # data set that knows the boxes of the unlabelled images, for the health monitor alone
    split: object
    classes: list


def test_split(
    cfg,  # DataConfig
    train=None,  # the training images, if they are open already
):  # (data set or None, why there is none)
    "The images for the reported numbers: `val`, or the val split that `data` brings along; training images are no test split of themselves"
    if cfg.val:
        return open_dataset(cfg.val, 'val'), ''
    try:
        val = open_dataset(cfg.data, 'val')
    except DataError as e:
        return None, str(e)
    train = open_dataset(cfg.data, 'train') if train is None else train
    same = getattr(val, 'where', 0) == getattr(train, 'where', None) and list(val.ids) == list(train.ids)
    return (None, f'{cfg.data}: has no split of its own for testing') if same else (val, '')


def build_data(
    cfg,  # DataConfig
) -> RunData:
    "Open the data sets and divide the training images"
    train = open_dataset(cfg.data, 'train')
    split = (
        load_split(cfg.split_file, train)
        if cfg.split_file
        else make_split(
            train,
            percent=cfg.percent or (None if cfg.count else 100.0),
            count=cfg.count or None,
            fold=cfg.fold,
            dev=cfg.dev,
            seed=cfg.split_seed,
            cover_classes=cfg.cover_classes,
        )
    )
    pick = lambda ids: Subset(train, [train.index_of(i) for i in ids])
    labelled, dev = pick(split.labelled), pick(split.dev) if split.dev else None
    pools = [Unlabelled(pick(split.unlabelled))] if split.unlabelled else []
    if cfg.unlabelled:
        pools.append(Unlabelled(open_dataset(cfg.unlabelled, 'train')))
    unlabelled = Joined(pools) if len(pools) > 1 else pools[0] if pools else None
    return RunData(
        labelled,
        unlabelled,
        dev,
        test_split(cfg, train)[0],
        None if cfg.unlabelled else train,
        split,
        list(train.classes),
    )


# %%
toy_data = build_data(DataConfig(data='digits:n=40', count=6, dev=4))
assert (len(toy_data.labelled), len(toy_data.unlabelled), len(toy_data.dev)) == (6, 30, 4) and len(
    toy_data.unlabelled[0].boxes
) == 0
toy_data.split


# %% [markdown]
# ## State of a run
#
# Weights, moments, random state, position in the data, health window, history: all of it is saved, and
# loading compares the configuration first. Other processes than the first keep only what is theirs, the
# random state.

# %%
#| export
def resolve(
    cfg,  # Config
    classes: list,
):  # Config
    "Fill in what the data decides"
    n = cfg.detector.num_classes
    if n not in (0, len(classes)):
        raise ConfigError(
            f'detector.num_classes={n}, but the data set has {len(classes)} classes; leave it at 0'
        )
    return dataclasses.replace(cfg, detector=dataclasses.replace(cfg.detector, num_classes=len(classes)))


# %%
#| export
class RunState:
    "What a configuration builds, and what a checkpoint holds"

    def __init__(
        self,
        cfg: Config,
        run_dir,  # folder of the run
        progress: bool = True,  # bars
        position: int = 0,  # line of the bar when several runs share a terminal
    ):
        start_processes()
        if cfg.run.threads:
            torch.set_num_threads(cfg.run.threads)
        cfg = choose_amp(cfg, run_dir)
        self.dir, self.progress, self.position, self.device = (
            Path(run_dir),
            progress and is_main(),
            position,
            pick_device(cfg.run.device),
        )
        self.data = build_data(cfg.data)
        if not len(self.data.labelled):
            raise DataError(
                f'{cfg.data.data}: no labelled image is left to train on; give more percent or a smaller data.dev'
            )
        self.cfg = resolve(cfg, self.data.classes)
        seed_everything(cfg.run.seed)
        self.student = Detector(self.cfg.detector).to(
            self.device, memory_format=torch.channels_last
        )  # a third faster on CPUs
        if cfg.run.init:
            load_weights(self.student, load_checkpoint(cfg.run.init)[cfg.run.init_from], cfg.run.init)
        self.teacher = make_teacher(self.student)
        self.parts = method_parts(self.cfg, self.data.labelled).to(self.device)
        self.optimizer = build_optimizer(self.student, cfg.optim, [self.parts])
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=cfg.run.amp == 'fp16')
        self.health = HealthMonitor(self.data.truth, cfg.run.health_window)
        self.step, self.recent, self.history, self.spent = 0, [], [], dict(seconds=0.0, cpu=0.0)
        seed_everything(
            stable_hash(cfg.run.seed, 'train', rank()) % 2**32
        )  # from here on processes draw differently
        if (self.dir / 'last.pt').exists():
            self.load()

    @property
    def own_file(self):
        return self.dir / ('last.pt' if is_main() else f'last.rank{rank()}.pt')

    def state_dict(self) -> dict:
        return run_state(self)

    def save(self):
        save_checkpoint(self.own_file, **self.state_dict())

    def load(self):
        restore(self, load_checkpoint(self.dir / 'last.pt'))


# %%
#| export
def run_state(
    run,  # RunState
) -> dict:  # tensors and plain values
    "All state of a run; processes other than the first keep what is theirs alone"
    own = dict(step=run.step, rng=pack_rng(rng_state()), health=run.health.state_dict(), recent=run.recent)
    if not is_main():
        return own
    return own | dict(
        config=to_dict(run.cfg),
        classes=run.data.classes,
        split=run.data.split.fingerprint,
        history=run.history,
        spent=run.spent,
        student=run.student.state_dict(),
        teacher=run.teacher.state_dict(),
        parts=run.parts.state_dict(),
        optimizer=run.optimizer.state_dict(),
        scaler=run.scaler.state_dict(),
    )


def restore(
    run,  # RunState of the same configuration
    saved: dict,  # of `run_state`
):
    "Go on from saved state"
    _same_run(run, saved)
    load_weights(run.student, saved['student'], run.dir)
    load_weights(run.teacher, saved['teacher'], run.dir)
    run.parts.load_state_dict(saved.get('parts', {}))
    run.optimizer.load_state_dict(saved['optimizer'])
    run.scaler.load_state_dict(saved['scaler'])
    run.history, run.spent, run.step = saved['history'], saved['spent'], saved['step']
    if not is_main() and run.own_file.exists():
        saved = load_checkpoint(run.own_file)
    run.recent = saved['recent']
    run.health.load_state_dict(saved['health'])
    set_rng_state(unpack_rng(saved['rng']))


# %%
#| export
def _same_run(run, saved):
    "A run goes on only with the settings and the split that it began with"
    old = from_dict(saved['config'])
    if config_hash(old) != config_hash(run.cfg):
        diff = '; '.join(differences(to_dict(old), to_dict(run.cfg))[:3])
        raise ConfigError(
            f'{run.dir}: holds a run with other settings ({diff}); choose another folder, or the same settings to go on with it'
        )
    if saved['split'] != run.data.split.fingerprint:
        raise DataError(f'{run.dir}: the data have changed since this run began; choose another folder')


def data_parts(
    run,  # RunState
    burn_in: bool,  # are unlabelled images left out?
) -> SemiLoader:  # positioned at the run's iteration
    "Loader of a phase; during a burn-in all images of a batch are labelled ones"
    c, d = run.cfg.loader, run.data
    common = dict(
        view=run.cfg.view,
        seed=run.cfg.run.seed,
        num_workers=c.num_workers,
        rank=rank(),
        world=world_size(),
        start=run.step * run.cfg.optim.accumulate,
    )
    if run.cfg.method.name == 'supervised' or d.unlabelled is None:
        return SemiLoader(d.labelled, None, c.n_labelled, 0, **common)
    if burn_in:
        return SemiLoader(d.labelled, None, c.n_labelled + c.n_unlabelled, 0, **common)
    return SemiLoader(d.labelled, d.unlabelled, c.n_labelled, c.n_unlabelled, ratio=c.ratio, **common)


# %% [markdown]
# What a user is told who starts other settings in the folder of an old run:

# %%
changed = differences(
    to_dict(Config()), to_dict(dataclasses.replace(Config(), optim=OptimConfig(schedule='cosine')))
)
assert any('schedule: constant -> cosine' in c for c in changed)
changed

# %% [markdown]
# ## One step
#
# The gradients of `accumulate` batches add up before the optimiser moves: a single GPU, or a laptop, takes
# the steps of many GPUs, only later. The average over processes is one message after the last batch, so it
# does not matter which parameters a stage leaves unused.
#
# A loss that is not finite ends the run. The file it leaves behind holds the batch, the weights and the
# random state *before* the step, so the failure can be seen again.

# %%
#| export
SHOWN = tuple(
    f'loss_{p}{k}' for p in ('', 'unsup_') for k in ('cls', 'l1', 'giou')
)  # terms of the last layer, for the log


def forward_backward(
    run,  # RunState
    batch: dict,  # on the device
) -> dict:  # stats, with the loss and its main terms as numbers
    "One batch: losses, their sum, gradients"
    cfg, kind = run.cfg, run.cfg.run.amp
    auto = torch.autocast(
        run.device.type, dtype=torch.float16 if kind == 'fp16' else torch.bfloat16, enabled=kind != 'off'
    )
    with auto:
        losses, stats = METHODS[cfg.method.name](
            run.student,
            run.teacher,
            batch,
            run.step,
            StepConfig(cfg.method, cfg.criterion, cfg.pseudo, cfg.mining, cfg.consistency, run.parts),
        )
    total = torch.stack([v.float() for v in losses.values()]).sum()
    if not torch.isfinite(total):
        raise NonFiniteError(
            'not finite: ' + ', '.join(k for k, v in losses.items() if not torch.isfinite(v))
        )
    run.scaler.scale(total / cfg.optim.accumulate).backward()
    return stats | {'loss': total.item()} | {k: v.item() for k, v in losses.items() if k in SHOWN}


def optimizer_step(
    run,  # RunState
) -> float:  # norm of the gradient before clipping
    "Average over processes, clip, move"
    params = [p for g in run.optimizer.param_groups for p in g['params']]
    average_gradients(params)
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(params, run.cfg.optim.clip or math.inf).item()
    if not math.isfinite(norm) and not run.scaler.is_enabled():
        raise NonFiniteError('the gradient is not finite')
    for g in run.optimizer.param_groups:
        g['lr'] = g['base_lr'] * lr_factor(run.step, run.cfg.optim)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    return norm


# %%
#| export
def train_step(
    run,  # RunState
    batches: list,  # `accumulate` batches
) -> dict:  # stats of the last batch
    "Teacher, gradients, student; a step that fails leaves its evidence"
    before = pack_rng(rng_state())
    update_teacher(run.teacher, run.student, ema_decay(run.step, run.cfg.ema, bool(run.cfg.run.init)))
    run.student.train()
    try:
        for batch in batches:
            stats = forward_backward(run, to_device(batch, run.device))
        if own := list(run.parts.parameters()):
            stats['parts_grad_norm'] = gradient_norm(own) / run.scaler.get_scale()
        return stats | dict(grad_norm=optimizer_step(run))
    except NonFiniteError as e:
        path = run.dir / f'failed_step_{run.step}.pt'
        save_checkpoint(path, **{**run.state_dict(), 'rng': before, 'batches': batches})
        ids = {k: [t['image_id'] for t in part['targets']] for k, part in batch.items()}
        raise NonFiniteError(
            f'iteration {run.step}: {e}; images {ids}; batch, weights and random state are in {path}'
        ) from None


# %%
with same_rng():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.ones(3))
(weight * torch.tensor([3.0, 4.0, 0.0])).sum().backward()
assert (
    torch.nn.utils.clip_grad_norm_([weight], 1.0).item() == 5.0 and abs(weight.grad.norm().item() - 1) < 1e-5
)
weight.grad


# %% [markdown]
# ## The whole run

# %%
#| export
def after_step(
    run,  # Trainer
    stats: dict,  # of `train_step`
    log,  # RunLog
    bar,  # tqdm
):
    "Count, watch, log; evaluate on the development part when it is time"
    cfg, run.step = run.cfg.run, run.step + 1
    if message := run.health.add(stats):
        warnings.warn(message)
    run.recent.append({k: v for k, v in stats.items() if isinstance(v, (int, float))})
    if run.step % cfg.log_every == 0 or run.step == run.cfg.optim.iters:
        keys = sorted({k for r in run.recent for k in r})
        mean = {
            k: sum(had) / (len(run.recent) if k.startswith('loss') else len(had))
            for k in keys
            for had in [[r[k] for r in run.recent if k in r]]
        }  # a loss that a step does not have is 0, anything else is not there
        log.write(
            {**mean, **run.health.summary(), 'step': run.step, 'lr': run.optimizer.param_groups[0]['lr']}
        )
        run.recent = []
    shown = dict(loss=f"{stats['loss']:.2f}")
    if 'pseudo_boxes' in stats:
        shown['pseudo'] = f"{stats['pseudo_boxes']:.1f}"
    if cfg.eval_every and run.step % cfg.eval_every == 0 and run.data.dev is not None:
        evaluate_now(run, log)
    if run.history:
        shown['AP'] = f"{run.history[-1]['teacher']['AP']:.1f}"
    bar.set_postfix(shown, refresh=False)
    bar.update()


def evaluate_now(run, log):
    "Metrics on the development part, into the history; the best teacher so far is kept in best.pt"
    best = max((h['teacher']['AP'] for h in run.history), default=-1.0)
    run.history.append(
        dict(step=run.step, **run.evaluate(run.data.dev, both=run.step == run.cfg.optim.iters))
    )
    now = run.history[-1]['teacher']['AP']
    log.write({'step': run.step, 'AP': now, 'AP_student': run.history[-1]['student']['AP']})
    if now > best and is_main():
        save_checkpoint(
            run.dir / 'best.pt',
            config=to_dict(run.cfg),
            classes=run.data.classes,
            step=run.step,
            student=run.student.state_dict(),
            teacher=run.teacher.state_dict(),
        )


# %%
#| export
def report(
    run,  # Trainer at its end
) -> dict:  # content of run.json
    "Evaluate both networks and write run.json: all that a page may say about this run"
    d, metrics = run.data, {}
    last = run.history[-1] if run.history else dict(step=-1)
    if last['step'] == run.step:
        metrics['dev'] = {k: v for k, v in last.items() if k != 'step'}
    elif d.dev is not None:
        metrics['dev'] = run.evaluate(d.dev, both=True)
    if d.val is not None and run.cfg.run.test:
        metrics['val'] = run.evaluate(d.val, both=True)
    result = dict(
        name=run.dir.name,
        hash=config_hash(run.cfg),
        config=to_dict(run.cfg),
        **environment(),
        device=str(run.device) if run.device.type == 'cpu' else torch.cuda.get_device_name(run.device),
        data=dict(
            fingerprint=d.split.fingerprint,
            classes=d.classes,
            labelled=len(d.labelled),
            unlabelled=len(d.unlabelled or ()),
            dev=len(d.dev or ()),
            val=len(d.val or ()),
        ),
        iterations=run.step,
        seconds=round(run.spent['seconds'], 1),
        cpu_seconds=round(run.spent['cpu'], 1),
        peak_memory_mb=round(peak_memory_mb()),
        health=run.health.summary(),
        history=run.history,
        metrics=metrics,
    )
    if is_main():
        atomic_write(run.dir / 'run.json', json.dumps(result, indent=1))
    return result


# %%
#| export
@contextlib.contextmanager
def stop_gently():
    "The first Ctrl-C or SIGTERM ends the run after the current iteration, with a checkpoint; a second one ends it at once"
    asked, old = [], {}

    def note(sig, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(sig)

    try:
        for sig in (signal.SIGINT, signal.SIGTERM):
            old[sig] = signal.signal(sig, note)
    except ValueError:
        pass  # not the main thread: signals stay as they are
    try:
        yield asked
    finally:
        for sig, handler in old.items():
            signal.signal(sig, handler)


# %%
#| export
class Trainer(RunState):
    "Run a configuration: `Trainer(cfg, 'runs/mine').fit()`; a folder that holds a stopped run is gone on with"

    def steps(self):
        "Batches of each iteration that is left, over burn-in and main phase"
        burn = (
            0
            if self.cfg.method.name == 'supervised'
            else min(self.cfg.method.burn_in_iters, self.cfg.optim.iters)
        )
        for burn_in, last in ((True, burn), (False, self.cfg.optim.iters)):
            if self.step >= last:
                continue
            with same_rng():
                batches = iter(data_parts(self, burn_in))
            with contextlib.closing(batches):
                while self.step < last:
                    yield [next(batches) for _ in range(self.cfg.optim.accumulate)]

    def evaluate(
        self,
        ds,  # DetectionDataset with boxes
        nms=None,  # IoU of per-class suppression; None: as `run.eval_nms` says
        both: bool = False,  # count with and without suppression
    ) -> dict:  # {'teacher': metrics, 'student': metrics}
        "COCO metrics of both networks; the teacher is the one that the tables report"
        nms = (self.cfg.run.eval_nms if nms is None else nms) or None
        return {
            w: evaluate_model(
                getattr(self, w),
                ds,
                self.cfg.view,
                self.device,
                nms,
                f'evaluate {w}' if self.progress else '',
                both=both,
            )
            for w in ('teacher', 'student')
        }

    def fit(self) -> dict:  # content of run.json
        "Train to the end, evaluate on the development part and the test split, write run.json"
        log, bar = (
            RunLog(self.dir, self.step),
            tqdm(
                total=self.cfg.optim.iters,
                initial=self.step,
                desc=self.dir.name,
                disable=not self.progress,
                position=self.position,
                unit='it',
            ),
        )
        clock = (time.perf_counter() - self.spent['seconds'], cpu_seconds() - self.spent['cpu'])
        with (
            stop_gently() as stop,
            contextlib.closing(log),
            contextlib.closing(bar),
            contextlib.closing(self.steps()) as steps,
        ):
            for batches in steps:
                after_step(self, train_step(self, batches), log, bar)
                self.spent = dict(seconds=time.perf_counter() - clock[0], cpu=cpu_seconds() - clock[1])
                asked = (
                    bool(stop)
                    if world_size() == 1
                    else bool(all_reduce_mean(torch.tensor(float(bool(stop)), device=self.device)))
                )  # a signal may reach one process before the others
                if asked or self.step % self.cfg.run.checkpoint_every == 0:
                    self.save()
                if asked:
                    raise KeyboardInterrupt(
                        f'stopped after iteration {self.step}; the same command goes on from there'
                    )
        self.save()
        return report(self)


# %% [markdown]
# ## A run, stopped and resumed
#
# Six iterations of a tiny detector on tiny scenes; then the same run, stopped after three and gone on with.
# All weights must agree to the last bit.

# %%
#| hide
import tempfile
import matplotlib.pyplot as plt
from semidetr.train.config import override, preset

# %%
tiny = override(
    preset('digits'),
    [
        'data.data=digits:n=40,size=64',
        'data.count=6',
        'data.dev=4',
        'view.short_sides=[64]',
        'view.eval_short=64',
        'optim.iters=6',
        'method.name=mean_teacher',
        'method.burn_in_iters=2',
        'pseudo.threshold=0.005',
        'loader.n_labelled=2',
        'loader.n_unlabelled=2',
        'loader.num_workers=0',
        'run.test=false',
        'run.log_every=1',
        'detector.backbone.weights=none',
        'detector.transformer.d_model=32',
        'detector.transformer.n_heads=4',
        'detector.transformer.ffn=32',
        'detector.transformer.num_queries=20',
        'detector.denoising.num=8',
    ],
)
folder = Path(tempfile.mkdtemp())
whole = Trainer(tiny, folder / 'whole', progress=False)
whole.fit()
broken = Trainer(tiny, folder / 'broken', progress=False)
log, bar = RunLog(broken.dir), tqdm(disable=True)
with contextlib.closing(broken.steps()) as steps:
    for batches in steps:
        after_step(broken, train_step(broken, batches), log, bar)
        if broken.step == 3:
            broken.save()
            break
resumed = Trainer(tiny, folder / 'broken', progress=False)
assert resumed.step == 3
resumed.fit()
equal = [
    torch.equal(a, b)
    for a, b in zip(whole.student.state_dict().values(), resumed.student.state_dict().values())
]
assert all(equal)
len(equal), all(equal)

# %%
#| label: fig-trainer-resume
#| fig-cap: "The loss of the resumed run (dots) lies on that of the unbroken one (line); the burn-in ends after two iterations, where the unsupervised terms come in."
#| fig-alt: "Loss per iteration of an unbroken and of a resumed run"
curve = lambda name: [json.loads(l)['loss'] for l in (folder / name / 'log.jsonl').read_text().splitlines()]
fig, ax = plt.subplots(figsize=(5, 2.6), dpi=80)
ax.plot(range(1, 7), curve('whole'), color='#1f77b4', label='unbroken')
ax.plot(range(1, 7), curve('broken'), 'o', color='#ff7f0e', label='stopped after 3, resumed')
ax.set(xlabel='iteration', ylabel='loss')
ax.legend()
plt.show()

# %% [markdown]
# Another configuration in the same folder is refused, with the difference:

# %%
try:
    Trainer(override(tiny, ['optim.lr=5e-4']), folder / 'broken', progress=False)
except ConfigError as e:
    message = str(e).replace(str(folder), 'runs')
assert 'optim.lr' in message
message

# %% [markdown]
# ## Summary
#
# - `Trainer(cfg, folder).fit()` runs any method; the folder tells everything about the run.
# - Stopping is part of training: one signal, one checkpoint, and the same command goes on, bit for bit.
# - A loss or gradient that is not finite ends the run and leaves its evidence.
# - Gradients accumulate over batches and average over processes, so the recipe for 8 GPUs runs on one.
#
# ## Exercises
#
# 1. Why is the random state put back after worker processes are started?
# 2. With 8 processes and 5 images each, what `accumulate` gives one process the same step?
# 3. What would go wrong if a resumed run appended to its log without cutting it first?
