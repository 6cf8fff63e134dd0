"""A whole training step and a whole inference against transformers' `DeformableDetrForObjectDetection`.

Both have the same weights and get the same images."""

import contextlib, os
import torch
from semidetr.train.config import OptimConfig
from semidetr.matching.losses import set_criterion
from semidetr.train.optim import build_optimizer, lr_factor
from semidetr.train.trainer import clip_and_step
import matcher
from deformable_detr import CRITERION, agreement, scene, their_labels, twins
from timing import compare, interleave, need_op

# case: backbone, side of the images, batch
CASES = {'tiny': ('tiny', 256, 4), 'r50': ('resnet50', 256, 2), 'r18-512': ('resnet18', 512, 2)}
INFERENCE = 'tiny', 'r50'  # cases whose inference is timed too
TWO_THREADS = 'tiny', 'r50'  # cases that are repeated with more threads
# of ours; theirs runs in float32
VARIANTS = {'float32': contextlib.nullcontext, 'bfloat16': lambda: torch.autocast('cpu', torch.bfloat16)}
LIMIT = 1e-4  # of the outputs, before anything is timed
OPTIM = OptimConfig(lr=1e-5, clip=0.1)


def their_step(model):
    "Forward with loss, backward, clip, AdamW"
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = []
    for is_backbone, mult in ((False, 1.0), (True, OPTIM.backbone_mult)):
        params = [p for n, p in named if ('backbone' in n) == is_backbone]
        groups.append(dict(params=params, lr=OPTIM.lr * mult))
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
    optimizer, scaler = build_optimizer(model, OPTIM), torch.amp.GradScaler('cpu', enabled=False)
    factor = lr_factor(0, OPTIM)

    def step(variant, images, targets):
        our_loss(model, variant, images, targets).backward()
        clip_and_step(optimizer, scaler, OPTIM.clip, factor)

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
    jobs = {'theirs': lambda: step(images, targets)}
    for name, variant in VARIANTS.items():
        jobs[name] = lambda v=variant: mine(v, images, targets)
    if both:
        jobs['theirs bfloat16'] = lambda: step(images, targets, VARIANTS['bfloat16'])
    t = interleave(jobs, rounds)
    rows = rows_of(t, **what)
    if both:
        low = compare(t['theirs']['all'], t['theirs bfloat16']['all'], name='theirs bfloat16', **what)
        rows.insert(0, low)
    return rows


# by a part of the operator's name, in this order
GROUPS = ('convolutions', 'conv'), ('matrices', 'mm'), ('attention', 'ms_deform')


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
    "Shares of the time of our training step"
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

    jobs = {'theirs': lambda: theirs(images) and None}
    for name, variant in VARIANTS.items():
        jobs[name] = lambda v=variant: run(v)
    return rows_of(interleave(jobs, rounds), quantity='inference', **what)


def run_kept(threads, quick, say):
    "The smallest case and one matching, in a process that keeps its memory"
    rounds = 3 if quick else 15
    steps = run(threads, True, say, rounds, alone=False)['rows']
    return dict(rows=steps + matcher.rows(threads, say, rounds))


def run(threads, quick, say, rounds=None, alone=True):  # alone: time autocast for theirs, too
    "Rows of all cases"
    need_op()
    rows, shares, rounds = [], [], rounds or (3 if quick else 15)
    if quick:
        cases = ['tiny']
    else:
        cases = CASES if threads == 1 else TWO_THREADS
    for case in cases:
        name, side, batch = CASES[case]
        theirs, ours = twins(name)
        ours = ours.to(memory_format=torch.channels_last)  # as the trainer does
        images, targets = scene(side, batch)
        error = agreement(theirs, ours, images, targets)
        with torch.no_grad():
            full, low = (our_loss(ours, v, images, targets) for v in VARIANTS.values())
        error['bfloat16'] = float((low - full).abs() / full)
        limits = dict(outputs=LIMIT, loss=LIMIT, gradients=1e-2, bfloat16=2e-2)
        assert all(error[k] < limit for k, limit in limits.items()), f'{case}: {error}'
        what = dict(case=case, threads=threads, side=side, batch=batch, error=error)
        what['parameters'] = sum(p.numel() for p in ours.parameters())
        new = inference_rows(theirs, ours, images, rounds, **what) if case in INFERENCE else []
        both = alone and case == 'tiny' and threads == 1
        new += train_rows(theirs, ours, images, targets, rounds, both, **what)
        texts = [f"{r['quantity']} {r['name']} {r['ratio'][1]:.2f}x" for r in new]
        say(f"step {case}: {', '.join(texts)} ({new[-1]['theirs_ms']:.0f} -> {new[-1]['ours_ms']:.0f} ms)")
        rows += new
        if threads == 1:
            shares.append(dict(case=case, **profile(ours, images, targets)))
    return dict(rows=rows, shares=shares)
