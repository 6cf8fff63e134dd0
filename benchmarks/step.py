"""A whole training step and a whole inference against transformers' `DeformableDetrForObjectDetection`, same weights, same images."""

import contextlib, os, types
import torch
from semidetr.train.config import OptimConfig
from semidetr.matching.losses import set_criterion
from semidetr.train.optim import build_optimizer
from semidetr.train.trainer import optimizer_step
import matcher
from deformable_detr import CRITERION, agreement, scene, their_labels, twins
from timing import compare, interleave, need_op

CASES = {
    'tiny': ('tiny', 256, 4),
    'r50': ('resnet50', 256, 2),
    'r18-512': ('resnet18', 512, 2),
}  # backbone, side of the images, batch
INFERENCE, TWO_THREADS = (
    ('tiny', 'r50'),
    ('tiny', 'r50'),
)  # cases whose inference is timed too; cases that are repeated with more threads
VARIANTS = {
    'float32': contextlib.nullcontext,
    'bfloat16': lambda: torch.autocast('cpu', torch.bfloat16),
}  # ours; theirs runs in float32
LIMIT = 1e-4  # of the outputs, before anything is timed
OPTIM = OptimConfig(lr=1e-5, clip=0.1)


def their_step(model):
    "Forward with loss, backward, clip, AdamW"
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        dict(params=[p for n, p in named if ('backbone' in n) == b], lr=OPTIM.lr * m)
        for b, m in ((False, 1.0), (True, OPTIM.backbone_mult))
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=OPTIM.weight_decay)

    def step(images, targets, variant=contextlib.nullcontext):
        with variant():
            loss = model(images, labels=their_labels(targets)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in named], OPTIM.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def our_loss(model, variant, images, targets):
    with variant():
        losses = set_criterion(model(images), targets, 'o2o', CRITERION)
    return torch.stack([v.float() for v in losses.values()]).sum()


def our_step(model):
    "The same with the trainer's own optimizer step; a function for each variant"
    run = types.SimpleNamespace(
        optimizer=build_optimizer(model, OPTIM),
        scaler=torch.amp.GradScaler('cpu', enabled=False),
        cfg=types.SimpleNamespace(optim=OPTIM),
        step=0,
    )

    def step(variant, images, targets):
        our_loss(model, variant, images, targets).backward()
        optimizer_step(run)

    return step


def rows_of(times, **what):
    "A row for each variant, and one for the best of them"
    rows = [compare(times['theirs']['all'], times[v]['all'], name=v, **what) for v in VARIANTS]
    best = max(rows, key=lambda r: r['ratio'][1])
    return [*rows, {**best, 'name': 'best', 'variant': best['name']}]


def train_rows(theirs, ours, images, targets, rounds, both, **what):
    theirs.train()
    ours.train()
    step, mine, what = their_step(theirs), our_step(ours), dict(quantity='training step', **what)
    jobs = {'theirs': lambda: step(images, targets)} | {
        n: (lambda v=v: mine(v, images, targets)) for n, v in VARIANTS.items()
    }
    if both:
        jobs['theirs bfloat16'] = lambda: step(images, targets, VARIANTS['bfloat16'])
    t = interleave(jobs, rounds)
    return (
        [compare(t['theirs']['all'], t['theirs bfloat16']['all'], name='theirs bfloat16', **what)]
        if both
        else []
    ) + rows_of(t, **what)


GROUPS = (
    ('convolutions', 'conv'),
    ('matrices', 'mm'),
    ('attention', 'ms_deform'),
)  # by a part of the operator's name, in this order


@contextlib.contextmanager
def silent():
    "The profiler's library writes to the error stream"
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def profile(ours, images, targets):  # {variant: {group: share of the time}}
    "Where the time of our training step goes"
    out, step = {}, our_step(ours.train())
    for name, variant in VARIANTS.items():
        step(variant, images, targets)
        with silent(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as p:
            step(variant, images, targets)
        spent = dict.fromkeys([*(g for g, _ in GROUPS), 'rest'], 0.0)
        for e in p.key_averages():
            spent[next((g for g, part in GROUPS if part in e.key), 'rest')] += e.self_cpu_time_total
        out[name] = {k: v / sum(spent.values()) for k, v in spent.items()}
    return out


@torch.inference_mode()
def inference_rows(theirs, ours, images, rounds, **what):
    theirs.eval()
    ours.eval()

    def run(variant):
        with variant():
            ours(images)

    return rows_of(
        interleave(
            {'theirs': lambda: theirs(images) and None}
            | {n: (lambda v=v: run(v)) for n, v in VARIANTS.items()},
            rounds,
        ),
        quantity='inference',
        **what,
    )


def run_kept(threads, quick, say):
    "The smallest case and one matching, in a process that keeps its memory"
    return dict(
        rows=run(threads, True, say, 3 if quick else 15, alone=False)['rows']
        + matcher.rows(threads, say, 3 if quick else 15)
    )


def run(threads, quick, say, rounds=None, alone=True):  # alone: what autocast does for theirs, too
    "Rows of all cases"
    need_op()
    rows, shares, rounds = [], [], rounds or (3 if quick else 15)
    for case, (name, side, batch) in CASES.items():
        if case not in (('tiny',) if quick else CASES if threads == 1 else TWO_THREADS):
            continue
        theirs, ours = twins(name)
        ours = ours.to(memory_format=torch.channels_last)  # as the trainer does
        images, targets = scene(side, batch)
        error = agreement(theirs, ours, images, targets)
        with torch.no_grad():
            full, low = (our_loss(ours, v, images, targets) for v in VARIANTS.values())
        error['bfloat16'] = float((low - full).abs() / full)
        assert (
            error['outputs'] < LIMIT
            and error['loss'] < LIMIT
            and error['gradients'] < 1e-2
            and error['bfloat16'] < 2e-2
        ), f'{case}: {error}'
        what = dict(
            case=case,
            threads=threads,
            side=side,
            batch=batch,
            error=error,
            parameters=sum(p.numel() for p in ours.parameters()),
        )
        new = (
            inference_rows(theirs, ours, images, rounds, **what) if case in INFERENCE else []
        ) + train_rows(
            theirs, ours, images, targets, rounds, alone and case == 'tiny' and threads == 1, **what
        )
        say(
            f'step {case}: '
            + ', '.join(f"{r['quantity']} {r['name']} {r['ratio'][1]:.2f}x" for r in new)
            + f" ({new[-1]['theirs_ms']:.0f} -> {new[-1]['ours_ms']:.0f} ms)"
        )
        rows += new
        if threads == 1:
            shares.append(dict(case=case, **profile(ours, images, targets)))
    return dict(rows=rows, shares=shares)
