# %% [markdown]
# # The trainer {#sec-trainer}
#
# > Train any method on any data: resume exactly, follow pseudo labels, stop at non-finite values.
#
# A training loop is easy to write and hard to trust. This one makes four promises. A run that was stopped, by a
# signal or by an error, and resumed gives the numbers of a run that was not (@sec-stop). A step that is not
# finite leaves a file from which it can be repeated (@sec-capsule). Pseudo labels are compared with hidden
# truth that no method gets. And the folder of a run holds everything that is needed to repeat it.
#
# The loop itself is the last listing, `Trainer.fit`: teacher update, losses, backward, optimiser step, log,
# evaluation, checkpoint.

# %%
#| default_exp train.trainer

# %%
#| export
import contextlib
import json
import time
import warnings
from pathlib import Path
import torch
from semidetr.core import (
    DataError,
    atomic_write,
    is_main,
    pick_device,
    rank,
    rng_state,
    seed_everything,
    stable_hash,
    start_processes,
    world_size,
)
from semidetr.data.loader import SemiLoader
from semidetr.many import rows_of_all
from semidetr.progress import Progress as Bar
from semidetr.matching.matching import NonFiniteError
from semidetr.train.capsule import Policy
from semidetr.train.checkpoint import (
    LAST,
    PREVIOUS,
    RunLog,
    cpu_seconds,
    environment,
    pack_rng,
    peak_memory_mb,
    save_checkpoint,
)
from semidetr.train.card import flat_settings, write_card
from semidetr.train.config import Config, config_hash, to_dict
from semidetr.train.evaluation import evaluate_model, same_rng
from semidetr.train import health
from semidetr.train.machine import choose_amp
from semidetr.train.optim import gradient_norm
from semidetr.train.run_data import RunData, build_data, images_of_roles, resolve
from semidetr.train.step import Step, clip_and_step, total_loss  # noqa: F401 (readers look for them here)
from semidetr.train.stop import RESUME, Stop, keep_progress, on_any_process, owned, refuse_others, stop_gently


# %% [markdown]
# ## State of a run
#
# Weights, moments, random state, position in the data, health window, history: all of it is saved, and
# loading compares the configuration first (@sec-generations). Processes other than the first save only what
# is theirs alone: the random state, the window, the numbers since the last log line, the cache of mixed views
# (@sec-mixing).

# %%
#| export
class BuiltRun(Step):
    "What a configuration builds: data, networks, method, optimiser, monitor"

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
        self.dir, self.device = Path(run_dir), pick_device(cfg.run.device)
        refuse_others(self.dir, self.device)
        cfg, self.stop = choose_amp(cfg, run_dir), Stop()
        self.progress, self.position = progress and is_main(), position
        self.data = build_data(cfg.data, cfg.detector)
        if not len(self.data.labelled):
            raise DataError(
                f'{cfg.data.data}: no labelled image is left to train on; give more percent or a smaller '
                'data.dev'
            )
        cfg, init = resolve(cfg, self.data.classes), cfg.run.init
        seed_everything(cfg.run.seed)
        settings, goes_on = cfg.detector, any((self.dir / x).exists() for x in (LAST, PREVIOUS))
        settings = settings.untrained() if init or goes_on else settings
        self.build(cfg, settings, self.data.labelled, '' if goes_on else init)
        self.health = health.HealthMonitor(self.data.truth, cfg.run.health_window)
        seed_everything(stable_hash(cfg.run.seed, 'train', rank()) % 2**32)  # processes draw differently


# %%
#| export
class RunState(Policy, BuiltRun):
    "What a checkpoint holds; a run whose folder has one continues from it"

    loggers = ()  # subclasses of `Logger`, beside TensorBoard

    def __init__(self, cfg: Config, run_dir, progress: bool = True, position: int = 0):
        super().__init__(cfg, run_dir, progress, position)
        self.roles = images_of_roles(self.data, cfg.run.test)
        if any((self.dir / x).exists() for x in (LAST, PREVIOUS)):
            self.load()

    def state_dict(
        self,
        whole: bool = False,  # also in other processes than the main one
    ) -> dict:  # tensors and plain values
        "All state that this process saves"
        own = dict(
            step=self.step, rng=pack_rng(rng_state()), health=self.health.state_dict(), recent=self.recent
        )
        own |= dict(broken=getattr(self.data.unlabelled, 'broken', []))
        parts = self.method.state_dict()
        if not (whole or is_main()):
            shared = dict(moments=self.optimizer.state_dict()['state']) if self.cfg.optim.sharded else {}
            return own | shared | dict(parts={k: v for k, v in parts.items() if k.endswith('_extra_state')})
        return dict(
            own | self.weights(),
            split=self.data.split.fingerprint,
            roles=self.roles,
            history=self.history,
            spent=self.spent,
            faults=self.faults,
            parts=parts,
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
        )

    def weights(self) -> dict:
        "What `Predictor` needs: configuration, classes and both networks"
        return dict(
            config=to_dict(self.cfg),
            classes=self.data.classes,
            step=self.step,
            student=self.student.state_dict(),
            teacher=self.teacher.state_dict(),
        )

    def _taken(self, saved, own, path):
        pool, broken = self.data.unlabelled, (saved if own is None else own).get('broken', [])
        if any(type(i) is not int or not 0 <= i < len(pool or ()) for i in broken):
            return f"{path}: 'broken' holds something else than positions of unlabelled images"
        if hasattr(pool, 'broken'):
            pool.broken = broken
        return super()._taken(saved, own, path)

    def open_log(self) -> RunLog:
        "The log from this iteration on"
        return RunLog(self.dir, self.step, self.loggers, flat_settings(to_dict(self.cfg)))


# %% [markdown]
# ## Batches and numbers
#
# What a step computes is in @sec-step. Around it there are batches, and numbers for the log.

# %%
#| export
def make_loader(
    cfg: Config,
    data: RunData,
    step: int,  # iteration to start at
    burn_in: bool,  # are unlabelled images left out?
) -> SemiLoader:
    "Loader of a phase; during a burn-in all images of a batch are labelled ones"
    c = cfg.loader
    n, unlabelled, n_unlabelled = c.n_labelled, data.unlabelled, c.n_unlabelled
    if unlabelled is None or not cfg.method.needs_unlabelled:
        unlabelled, n_unlabelled = None, 0
    elif burn_in:
        n, unlabelled, n_unlabelled = n + n_unlabelled, None, 0
    return SemiLoader(
        data.labelled,
        unlabelled,
        n,
        n_unlabelled,
        view=cfg.view,
        seed=cfg.run.seed,
        num_workers=c.num_workers,
        rank=rank(),
        world=world_size(),
        start=step * cfg.optim.accumulate,
        keep_empty=True,  # `build_data` has chosen
        ratio=c.ratio,
        two_views=c.two_views,
        repeat_threshold=c.repeat_threshold,
    )


# %%
#| export
CURVES = ('step', 'loss', 'grad_norm', 'parts_grad_norm')  # numbers of every run that records keep
# losses that are logged: those of the last decoder layer
LOGGED = [
    f'loss_{kind}{term}'
    for kind in ('', 'unsup_')
    for term in ('cls', 'l1', 'giou', 'mds', 'rpn_cls', 'rpn_l1', 'quality')
]


def mean_scalars(
    rows: list,  # scalars of the iterations since the last log line, of all processes
) -> dict:
    "Means for the log: a loss that an iteration does not have counts as 0, other numbers are left out"
    out = {}
    for k in sorted({k for r in rows for k in r}):
        values = [r[k] for r in rows if k in r]
        out[k] = sum(values) / (len(rows) if k.startswith('loss') else len(values))
    return out


# %%
rows = [dict(loss=2.0, loss_unsup_cls=1.0, pseudo_boxes=3.0), dict(loss=4.0)]
assert mean_scalars(rows) == dict(loss=3.0, loss_unsup_cls=0.5, pseudo_boxes=3.0)
mean_scalars(rows)


# %% [markdown]
# ## What surrounds the updates
#
# Batches come from the loader of the phase, numbers go to the log, the bar and the health monitor, and both
# networks are evaluated on the development part now and then. An evaluation may take longer than a scheduler
# waits, so the run is saved before it and after it; if a signal has come, it is left for the next session. After
# an iteration that is not finite, the run stops, goes on or goes back (@sec-capsule-policy).

# %%
#| export
class Session(RunState):
    "What surrounds the updates of a run: batches, and numbers for the log"

    def batches(self):
        "Batches of each iteration that is left, over burn-in and main phase, also after the run went back"
        iters = self.cfg.optim.iters
        burn_in = self.cfg.method.burn_in(iters)
        while self.step < iters:
            last = burn_in if self.step < burn_in else iters
            with same_rng():
                batches = iter(make_loader(self.cfg, self.data, self.step, self.step < burn_in))
            with contextlib.closing(batches):
                self.went_back = False
                while self.step < last and not self.went_back:
                    yield [next(batches) for _ in range(self.cfg.optim.accumulate)]

    def scalars_of(self, result, loss) -> dict:
        "Numbers of a step for the log, before the gradient is clipped"
        terms = {k: v.item() for k, v in result.losses.items() if k in LOGGED}
        scalars = result.scalars | dict(loss=loss.item()) | terms
        if own := list(self.method.parameters()):
            scalars['parts_grad_norm'] = gradient_norm(own) / self.scaler.get_scale()
        return scalars

    def count(self, scalars, boxes, log):
        "Add one iteration to the health monitor and to the log"
        if message := self.health.add(scalars, boxes):
            warnings.warn(message)
        self.recent.append(scalars)
        self.write_due(log)

    def write_due(self, log):
        "Write a line if this iteration has one"
        if self.step % self.cfg.run.log_every == 0 or self.step == self.cfg.optim.iters:
            last = dict(step=self.step, lr=self.optimizer.param_groups[0]['lr'])
            last |= {k: n for k, n in self.faults.items() if n}
            log.write(mean_scalars(rows_of_all(self.recent)) | self.health.summary() | last)
            self.recent = []


# %%
#| export
class Evaluation(Session):
    "Metrics of a run while it trains"

    def evaluate(
        self,
        ds,  # DetectionDataset with boxes
        nms=None,  # IoU of per-class suppression; None: as `run.eval_nms` says
        both: bool = False,  # count with and without suppression
    ) -> dict:  # {'teacher': metrics, 'student': metrics}
        "COCO metrics of both networks; the teacher is the one that the tables report"
        nms = (self.cfg.run.eval_nms if nms is None else nms) or None
        out = {}
        with self.stop.at_once():
            for which in ('teacher', 'student'):
                text, model = f'evaluate {which}' if self.progress else '', getattr(self, which)
                out[which] = evaluate_model(model, ds, self.cfg.view, self.device, nms, text, both=both)
        return out

    def evaluation_is_due(self) -> bool:
        "Does `run.eval_every` ask for metrics that are not in the history yet?"
        every, last = self.cfg.run.eval_every, self.history[-1]['step'] if self.history else 0
        return self.data.dev is not None and bool(every) and self.step % every == 0 and self.step > last

    def is_asked_to_end(self) -> bool:
        "Has a signal reached any of the processes?"
        return on_any_process(self.stop.is_asked(), self.device)

    def evaluate_dev(
        self,
        progress,  # Progress
    ):
        "Metrics on the development part, into the history; the best teacher so far is kept in best.pt"
        if self.saved != self.step:
            self.spent = progress.time()
            self.save()
        if self.is_asked_to_end():
            raise KeyboardInterrupt(f'stopped after iteration {self.step}; {RESUME}')
        best = max((h['teacher']['AP'] for h in self.history), default=-1.0)
        metrics = self.evaluate(self.data.dev, both=self.step == self.cfg.optim.iters)
        ap = metrics['teacher']['AP']
        if ap > best and is_main():
            save_checkpoint(self.dir / 'best.pt', **self.weights())  # first: a row without it is never mended
        self.history.append(dict(step=self.step, **metrics))
        progress.log.write({'step': self.step, 'AP': ap, 'AP_student': metrics['student']['AP']})
        self.spent = progress.time()
        self.save()


# %%
#| export
class Ending(Evaluation):
    "The result of a run"

    def report(self) -> dict:  # content of run.json
        "Evaluate both networks at the end and write run.json: all that a page may say about this run"
        d, metrics, cpu = self.data, {}, self.device.type == 'cpu'
        last = self.history[-1] if self.history else dict(step=-1)
        if last['step'] == self.step:
            metrics['dev'] = {k: v for k, v in last.items() if k != 'step'}
        elif d.dev is not None:
            metrics['dev'] = self.evaluate(d.dev, both=True)
        if d.val is not None and self.cfg.run.test:
            metrics['val'] = self.evaluate(d.val, both=True)
        counts = {role: len(getattr(d, role) or ()) for role in ('labelled', 'unlabelled', 'dev', 'val')}
        marks = {k: v for k, v in d.marks.items() if k != 'test' or self.cfg.run.test}
        if skipped := len(getattr(d.unlabelled, 'broken', ())):
            marks['skipped'] = skipped  # unlabelled images that could not be read
        faults = dict(non_finite=self.faults) if any(self.faults.values()) else {}
        result = dict(
            name=self.dir.name,
            hash=config_hash(self.cfg),
            config=to_dict(self.cfg),
            **environment(),
            device=str(self.device) if cpu else torch.cuda.get_device_name(self.device),
            data=dict(fingerprint=d.split.fingerprint, classes=d.classes, **counts, **marks),
            iterations=self.step,
            seconds=round(self.spent['seconds'], 1),
            cpu_seconds=round(self.spent['cpu'], 1),
            peak_memory_mb=round(peak_memory_mb()),
            health=self.health.summary(),
            **faults,
            history=self.history,
            curves=[*CURVES, *health.CURVES, *self.method.curves],
            metrics=metrics,
        )
        if is_main():
            atomic_write(self.dir / 'run.json', json.dumps(result, indent=1))
        return result


# %% [markdown]
# ## The loop

# %%
#| export
class Progress:
    "Log file, bar and clock of a run"

    def __init__(self, run):
        self.log, self.spent = run.open_log(), run.spent
        self.start = time.perf_counter(), cpu_seconds()
        bar = dict(total=run.cfg.optim.iters, initial=run.step, desc=run.dir.name, unit='it')
        self.bar = Bar(**bar, show=run.progress, position=run.position)

    def time(self) -> dict:  # seconds and CPU-seconds of the run, earlier sessions included
        seconds, cpu = time.perf_counter() - self.start[0], cpu_seconds() - self.start[1]
        return dict(seconds=self.spent['seconds'] + seconds, cpu=self.spent['cpu'] + cpu)

    def show(self, run, scalars):
        "One iteration on the bar"
        shown = dict(loss=f"{scalars['loss']:.2f}") if scalars else {}
        for key, name in run.method.shown.items():
            if key in scalars:
                shown[name] = f'{scalars[key]:.1f}'
        if run.history:
            shown['AP'] = f"{run.history[-1]['teacher']['AP']:.1f}"
        self.bar.values(shown)
        self.bar.update(run.step - self.bar.n)

    def rewind(self, run):
        "The run went back: so does its log"
        self.log.close()
        self.log = run.open_log()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()
        self.log.close()


# %%
#| export
class Iteration(Ending):
    "One iteration of a run"

    def iterate(
        self,
        accumulated,  # batches of one optimiser step
        progress,  # Progress
    ):
        "One iteration, from the update of the teacher to the line in the log and to metrics that are due"
        scalars, policy = {}, self.cfg.run.non_finite
        self.snapshot.take()
        try:
            with self.tape.recording(self.device, together=policy != 'stop'):
                result, loss = self.passes(accumulated)
            self.average()
            scalars = self.scalars_of(result, loss)
            with self.stop.hold():
                scalars['grad_norm'] = self.update()
                self.step += 1
                self.snapshot.done()
                self.count(scalars, result.boxes, progress.log)
        except NonFiniteError as e:
            self.after_failure(e, accumulated)
            if self.went_back:
                progress.rewind(self)
            else:
                self.write_due(progress.log)
        if self.evaluation_is_due():
            self.evaluate_dev(progress)
        progress.show(self, scalars)


# %%
#| export
class Trainer(Iteration):
    """Run a configuration: `Trainer(cfg, 'runs/mine').fit()`; a stopped run in that folder is continued.

    `cfg` is taken as it is. `plan_run` (@sec-run-plan) makes the one that the command trains, with what
    follows from data, length and method.

    Example: `Trainer(plan_run(data='photos', percent=5).cfg, 'runs/mine').fit()`
    """

    def fit(
        self,
        until: int | None = None,  # iteration to stop after, with a checkpoint; None: train to the end
    ) -> dict | None:  # content of run.json; None if it was stopped at `until`
        "Train, evaluate on the development part and the test split, write run.json"
        with stop_gently() as self.stop, owned(self), keep_progress(self, self.stop):
            if self.cfg.run.non_finite == 'back' and self.stamp is None:
                self.save()  # there must be something to go back to
            batches = self.batches()
            with Progress(self) as progress:
                with contextlib.closing(batches):
                    if self.recent:
                        self.write_due(progress.log)  # it could not be written when the run was saved
                    if self.evaluation_is_due():
                        self.evaluate_dev(progress)  # it was interrupted after the run was saved
                    for accumulated in batches:
                        self.iterate(accumulated, progress)
                        self.stop_if_lost()
                        self.spent = progress.time()
                        stopped = self.is_asked_to_end()
                        due = stopped or self.step == until or self.step % self.cfg.run.checkpoint_every == 0
                        if self.went_back or (due and self.saved != self.step):
                            self.save()
                        if stopped:
                            raise KeyboardInterrupt(f'stopped after iteration {self.step}; {RESUME}')
                        if self.step == until:
                            return None
                progress.bar.close()
                if self.saved != self.step:
                    self.save()
                result = self.report()
                progress.log.results(result['metrics'], self.step)
            if is_main():
                write_card(result, self.dir)
            return result


# %% [markdown]
# ## A run, stopped and resumed
#
# Six iterations of a tiny detector on tiny scenes; then the same run, stopped after three and continued. All
# weights must agree to the last bit.

# %%
#| hide
import tempfile
from semidetr.core import ConfigError
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
Trainer(tiny, folder / 'broken', progress=False).fit(until=3)
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
# - Stopping is part of training: one signal, one checkpoint, and the same command continues bit for bit.
# - A loss or gradient that is not finite leaves its evidence; the run stops, leaves the step out or goes back.
# - Gradients accumulate over batches and average over processes, so the recipe for 8 GPUs runs on one.
#
# ## Exercises
#
# 1. Why is the random state put back after worker processes are started?
# 2. With 8 processes and 5 images each, what `accumulate` gives one process the same step?
# 3. What would go wrong if a resumed run appended to its log without cutting it first?
