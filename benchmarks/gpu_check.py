"""Everything that only a machine with a GPU can tell, in one run: `make gpu-check`, or

    python benchmarks/gpu_check.py                        on the GPU, at most six minutes
    python benchmarks/gpu_check.py --device cpu --small   every part at a small size on the CPU
    python benchmarks/gpu_check.py --only op dino         some parts

Needs torch and, for the CUDA op, nvcc; no network; installs nothing. What needs a package that is not here is
skipped and named. Each part runs in a process of its own with a time limit of its own; the result, one JSON,
is written again after each of them. The exit code is 1 if a part failed."""

import argparse, contextlib, datetime, importlib.metadata, json, math, os, platform, re, statistics
import subprocess, sys, tempfile, time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# part: seconds, together the six minutes; what a part leaves is shared by those after it
PARTS = dict(build=80, tests=45, op=35, step=40, dino=115, theirs=45)
TOTAL = 360.0
ENDING = 4.0  # seconds of a part's time that are kept for writing its result
SIZE = 800, 1333  # pixels of an image of COCO as detectors are trained
COCO = [(100, 167), (50, 84), (25, 42), (13, 21)]  # its pyramid at strides 8, 16, 32, 64
SMALL_SIZE, SMALL_PYRAMID = (64, 96), [(8, 12), (4, 6), (2, 3), (1, 2)]
BATCHES, SMALL_BATCHES = (1, 2, 4, 8), (2,)
CLASSES, OBJECTS = 80, 7  # of the synthetic images; COCO has 7.3 objects per image


class Skip(Exception):
    "What is missing here"


class TimeIsUp(Exception):
    "The part has used its time"


# --- what all parts share -----------------------------------------------------------------------------------
class Part:
    "Device, sizes, deadline and rows of the part that this process runs"

    def __init__(self, device, small, seconds, save):
        self.device, self.small, self.save = device, small, save
        self.end, self.result = time.monotonic() + seconds - ENDING, dict(rows=[])

    def add(self, **row):
        "One more row, written at once"
        self.result['rows'].append(row)
        self.save(self.result)
        print('  ' + ', '.join(f'{k} {short(v)}' for k, v in row.items() if v is not None), flush=True)

    def check(self, seconds=0.0):
        "TimeIsUp if less than so much time is left"
        if time.monotonic() + seconds > self.end:
            raise TimeIsUp

    def wait(self):
        "Until the device has done everything that was asked of it"
        import torch

        if self.device == 'cuda':
            torch.cuda.synchronize()

    def seconds(self, job):
        "Time of one call"
        self.wait()
        start = time.perf_counter()
        job()
        self.wait()
        return time.perf_counter() - start

    def median_ms(self, jobs, rounds=15, most=3.0):  # {name: milliseconds}
        "Medians of jobs that take turns, after one turn that does not count; `most` seconds or two turns"
        times, end = {name: [] for name in jobs}, None
        for turn in range(1 + (1 if self.small else rounds)):
            for name, job in jobs.items():
                times[name].append(self.seconds(job))
            end = end or time.monotonic() + most
            if turn > 1 and time.monotonic() > end:
                break
        return {name: 1e3 * statistics.median(t[1:]) for name, t in times.items()}

    def peak_mb(self, job, above=False):  # MB; None on the CPU
        "Most memory of tensors during a job; `above`: without what was there before it"
        import torch

        if self.device != 'cuda':
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if above else 0
        job()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def short(v):
    if isinstance(v, dict):
        return '{' + ', '.join(f'{k} {short(x)}' for k, x in v.items()) + '}'
    return f'{v:.3g}' if isinstance(v, float) else str(v)


def plain(x):  # numbers to four significant digits; JSON has no NaN
    "What is written"
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(v) for v in x]
    if isinstance(x, float):
        return float(f'{x:.4g}') if math.isfinite(x) else str(x)
    return x


def version_of(package):
    "Version of an installed package; None where it is missing"
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(device):
    "GPU, CPU, versions, commit, date"
    import torch

    nvcc, text = '', ''
    with contextlib.suppress(ImportError):
        from semidetr.detectors import build

        nvcc = build._nvcc()
    if nvcc:
        text = subprocess.run([nvcc, '--version'], capture_output=True, text=True).stdout
    commit = ''
    with contextlib.suppress(OSError):  # no git on this machine
        describe = ['git', 'describe', '--always', '--dirty', '--abbrev=12']
        commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    cpu = re.findall(r'model name\s*:\s*(.*)', file_text('/proc/cpuinfo'))
    about = dict(
        gpu=None,
        cpu=cpu[0] if cpu else platform.machine(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads() if device == 'cpu' else None,
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        nvcc=next(iter(re.findall(r'release ([\d.]+)', text)), None),
        packages={name: version_of(name) for name in ('torchvision', 'scipy', 'transformers', 'pytest')},
        commit=commit or None,
        date=datetime.datetime.now().astimezone().isoformat(timespec='minutes'),
    )
    if device == 'cuda':
        p = torch.cuda.get_device_properties(0)
        about['gpu'] = f'{p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}'
        about['cudnn'] = torch.backends.cudnn.version()
    return about


def file_text(path):
    try:
        return Path(path).read_text()
    except OSError:
        return ''


# --- build: the op of this device, and that of the CPU to compare with --------------------------------------
def run_build(part):
    "Build or find the libraries; seconds, and which one is used"
    from semidetr.core import ConfigError
    from semidetr.detectors import build, native

    kinds = ['cpu', 'cuda'] if part.device == 'cuda' else ['cpu']
    failed = []
    for kind in kinds:
        try:
            found = []
            seconds = part.seconds(lambda: found.append(build.build_ops(kind)))
            state = native._load(kind)
            if not state['ready']:
                raise ConfigError(state['reason'])
            megabytes = Path(state['path'] or found[0]).stat().st_size / 1e6
            part.add(kind=kind, seconds=seconds, source=state['source'], MB=megabytes)
        except ConfigError as e:
            part.add(kind=kind, error=str(e))
            failed.append(f'{kind}: {e}')
    compiler = build._nvcc() if part.device == 'cuda' else build._compiler()
    if part.device in [f.split(':')[0] for f in failed]:
        if compiler:
            raise RuntimeError('; '.join(failed))
        raise Skip('; '.join(failed))


# --- tests: those that need a GPU ---------------------------------------------------------------------------
def run_tests(part):
    "All tests with the mark `gpu`, in the files that have one"
    if version_of('pytest') is None:
        raise Skip('the package pytest is missing')
    import xml.etree.ElementTree as xml

    files = [f for f in sorted((ROOT / 'tests').glob('test_*.py')) if 'mark.gpu' in f.read_text()]
    files = [str(f) for f in files if f.name != 'test_gpu_check.py']
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / 'report.xml'
        command = [sys.executable, '-m', 'pytest', '-m', 'gpu', '-q', '--tb=line', f'--junitxml={report}']
        left = max(1.0, part.end - time.monotonic())
        done = subprocess.run(
            [*command, '-p', 'no:cacheprovider', *files],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=left,
        )
        if not report.exists():
            raise RuntimeError(f'pytest ended with exit code {done.returncode}: {last_line(done.stdout)}')
        cases = list(xml.parse(report).getroot().iter('testcase'))
    for case in cases:
        states = [e.tag for e in case if e.tag in ('failure', 'error', 'skipped')]
        why = [(e.get('message') or '').splitlines()[:1] for e in case if e.tag in states]
        row = dict(test=case.get('name'), state=states[0] if states else 'passed')
        part.add(**row, seconds=float(case.get('time')), why=why[0][0] if why and why[0] else None)
    bad = [r['test'] for r in part.result['rows'] if r['state'] in ('failure', 'error')]
    if bad:
        raise RuntimeError('failed: ' + ', '.join(bad))
    if all(r['state'] == 'skipped' for r in part.result['rows']):
        raise Skip(part.result['rows'][0]['why'] if part.result['rows'] else 'no test has the mark gpu')
    if done.returncode not in (0, 5):
        raise RuntimeError(f'pytest ended with exit code {done.returncode}: {last_line(done.stdout)}')


def last_line(text):
    return next((line for line in reversed(text.splitlines()) if line.strip()), 'no output')


# --- op: values, gradients, time, memory --------------------------------------------------------------------
# largest difference that passes, in units of the largest value; the two sides round at different places
LIMITS = dict(float32=1e-4, float16=1e-2, bfloat16=3e-2)


def op_forms(x, dtype, device):  # {name: (leaves, function)}
    "The op and the fused op with their counterparts made of `grid_sample`, on one device"
    from semidetr.detectors import attention, native

    up = lambda t, kind=None: t.to(device, kind)
    value, shapes, ref, wh = up(x['value'], dtype), x['shapes'], up(x['ref']), up(x['wh'])
    B, Q = ref.shape[:2]
    M = value.shape[2]

    def pipeline(v, off, z):
        locations = ref[:, :, None, :, None] + off.to(ref.dtype) / wh[:, None]
        weights = z.to(ref.dtype).softmax(-1).view(B, Q, M, len(shapes), -1)
        return attention.ms_deform_attn_grid(v, shapes, locations, weights)

    ready = (value, up(x['loc']), up(x['weight']))
    raw = (value, up(x['off'], dtype), up(x['logits'], dtype))
    return {
        'op': (ready, lambda v, loc, w: native.native_ms_deform_attn(v, shapes, loc, w)),
        'fused': (raw, lambda v, off, z: native.native_fused_ms_deform_attn(v, shapes, ref, off, z)),
        'grid op': (ready, lambda v, loc, w: attention.ms_deform_attn_grid(v, shapes, loc, w)),
        'grid fused': (raw, pipeline),
    }


def both_ways(leaves, f, grad):  # (output, gradient of each leaf)
    "Forward and backward"
    import torch

    leaves = [t.detach().requires_grad_() for t in leaves]
    out = f(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype)))


def differences(ours, theirs):  # (of the output, largest of the gradients)
    "In units of the largest value; a sample in 10000 may lie on the border of a cell, where the slope jumps"
    from op import difference

    a, b = ([t.float().cpu() for t in tensors] for tensors in (theirs, ours))
    jumps = a[2].numel() // 10_000
    grads = [difference(s, t, jumps * (i == 1)) for i, (s, t) in enumerate(zip(a[1:], b[1:]))]
    return difference(a[0], b[0]), max(grads)


def run_op(part):
    "Encoder and decoder of an image of COCO in three types: against grid_sample here, and against the CPU"
    import torch
    from op import inputs
    from semidetr.detectors import native

    need_op(part.device)
    pyramid = SMALL_PYRAMID if part.small else COCO
    on_cpu = 'op' if native.native_available(torch.float32, 'cpu') else 'grid'
    part.result['cpu'] = dict(op='native op', grid='grid_sample')[on_cpu]
    part.result['limits'] = LIMITS
    for case, queries in (('encoder', None), ('decoder', 20 if part.small else 900)):
        x = inputs(pyramid, 1, queries)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            name = str(dtype).removeprefix('torch.')
            if dtype not in native._DTYPES[part.device]:
                part.add(case=case, dtype=name, skipped=f'no {part.device} kernel for {name}')
                continue
            op_rows(part, case, name, x, dtype, on_cpu)
    wrong = [f"{r['form']} {r['case']} {r['dtype']}" for r in part.result['rows'] if r.get('ok') is False]
    if wrong:
        raise RuntimeError('differs more than allowed: ' + ', '.join(wrong))


def op_rows(part, case, name, x, dtype, on_cpu):
    "A row for the op and one for the fused op"
    forms, grad = op_forms(x, dtype, part.device), x['grad'].to(part.device)
    rounded = {k: v.to(dtype).float() if k in ('value', 'off', 'logits') else v for k, v in x.items()}
    cpu = op_forms(rounded, None, 'cpu')
    for form in ('op', 'fused'):
        part.check(2.0)
        jobs = {k: (lambda k=k: both_ways(*forms[k], grad)) for k in (form, f'grid {form}')}
        ours, grid = (job() for job in jobs.values())
        reference = cpu[form if on_cpu == 'op' else f'grid {form}']
        start = time.perf_counter()
        theirs = both_ways(*reference, x['grad'])
        cpu_ms = 1e3 * (time.perf_counter() - start)
        pairs = dict(grid=differences(ours, grid), cpu=differences(ours, theirs))
        ms = part.median_ms(jobs, most=0.8)
        memory = [part.peak_mb(job, above=True) for job in jobs.values()]
        part.add(
            case=case,
            dtype=name,
            form=form,
            values={k: d[0] for k, d in pairs.items()},
            gradients={k: d[1] for k, d in pairs.items()},
            ok=max(v for d in pairs.values() for v in d) < LIMITS[name],
            ms=ms[form],
            grid_ms=ms[f'grid {form}'],
            cpu_ms=cpu_ms,
            MB=memory[0],
            grid_MB=memory[1],
        )


def op_in_use(device):
    "The attention op of this device, for the record"
    import torch
    from semidetr.detectors import native

    ready = native.native_available(torch.float32, device)
    return 'native' if ready else f"plain PyTorch ({native.ops_status()[device]['reason']})"


def need_op(device):
    "The native op of this device; Skip with the reason where there is none"
    import torch
    from semidetr.detectors import native

    if not native.native_available(torch.float32, device):
        raise Skip(f"no native op: {native.ops_status()[device]['reason'] or 'SEMIDETR_OPS=torch'}")


# --- step: each detector once, here and on the CPU ----------------------------------------------------------
def small_detectors():  # {name: (settings, criterion)}
    "Every detection transformer that the commands know, small, with a random ResNet-18"
    from dataclasses import replace
    from semidetr.detectors.backbone import BackboneConfig
    from semidetr.detectors.from_detr import DETECTORS
    from semidetr.matching.losses import CriterionConfig
    from semidetr.semi.fit import structure_of

    made = {}
    for name, named in DETECTORS.items():
        cfg = named.small(5).untrained()
        if structure_of(cfg) != 'queries':
            continue
        body = BackboneConfig('resnet18', 'none', cfg.backbone.out_strides)
        made[name] = replace(cfg, backbone=body), CriterionConfig(**named.criterion)
    return made


@contextlib.contextmanager
def numbers_of_the_cpu():
    "Random numbers come from the generator of the CPU on every device; convolutions in full float32"
    import torch

    def drawn(f):
        def draw(*args, device=None, generator=None, **kw):
            return f(*args, **kw).to(device or 'cpu')

        return draw

    with contextlib.ExitStack() as stack:
        for name in ('rand', 'randn', 'randint'):
            stack.enter_context(mock.patch.object(torch, name, drawn(getattr(torch, name))))
        for owner in (torch.backends.cudnn, torch.backends.cuda.matmul):
            stack.callback(setattr, owner, 'allow_tf32', owner.allow_tf32)
            owner.allow_tf32 = False
        yield


def scene(n, size, classes, seed=0, labelled=True):  # dict(images, mask, targets) on the CPU
    "Random pixels with boxes around them"
    import torch

    g, (h, w) = torch.Generator().manual_seed(seed), size
    targets = []
    for i in range(n):
        t = dict(image_id=i, orig_size=size, size=size, matrix=torch.eye(3, dtype=torch.float64))
        if labelled:
            centre = 0.2 + 0.6 * torch.rand(OBJECTS, 2, generator=g)
            t['boxes'] = torch.cat([centre, 0.05 + 0.3 * torch.rand(OBJECTS, 2, generator=g)], -1)
            t['labels'] = torch.randint(classes, (OBJECTS,), generator=g)
        targets.append(t)
    mask = torch.zeros(n, h, w, dtype=torch.bool)
    return dict(images=torch.randn(n, 3, h, w, generator=g), mask=mask, targets=targets)


def moved(part, device):  # a scene on the device
    "Images, mask and boxes; the matrices too, as the trainer does"
    import torch

    up = lambda v: v.to(device) if torch.is_tensor(v) else v
    targets = [{k: up(v) for k, v in t.items()} for t in part['targets']]
    return dict(images=up(part['images']), mask=up(part['mask']), targets=targets)


def losses_and_gradients(model, part, criterion, device):  # ({name: number}, {name: tensor on the CPU})
    "One forward and backward with denoising queries where the detector has them"
    import torch
    from semidetr.matching.losses import set_criterion

    model = model.to(device)
    model.zero_grad()
    here = moved(part, device)
    torch.manual_seed(0)
    outputs = model(here['images'], here['mask'], here['targets'])
    losses = set_criterion(outputs, here['targets'], 'o2o', criterion)
    sum(losses.values()).backward()
    grads = {n: p.grad.cpu().clone() for n, p in model.named_parameters() if p.grad is not None}
    return {k: v.item() for k, v in losses.items()}, grads


def off_the_borders(model):
    "Move the first samples off the borders of cells, where the gradient jumps with the rounding"
    import torch

    for name, p in model.named_parameters():
        if name.endswith('sampling_offsets.bias'):
            with torch.no_grad():
                p.add_(0.1 * torch.randn_like(p))


STEP_LIMITS = dict(loss=1e-3, gradient=1e-2)


def run_step(part):
    "Losses and gradients of every detector: plain PyTorch on the CPU against the op of this device"
    import torch

    size = SMALL_SIZE if part.small else (320, 416)
    part.result |= dict(op=op_in_use(part.device), limits=STEP_LIMITS, size=size, images=2)
    for name, (cfg, criterion) in small_detectors().items():
        part.check(3.0)
        try:
            torch.manual_seed(0)
            model = cfg.build().train()
            off_the_borders(model)
            data = scene(2, size, cfg.num_classes)
            with numbers_of_the_cpu():
                with mock.patch.dict(os.environ, SEMIDETR_OPS='torch'):
                    cpu, cpu_grads = losses_and_gradients(model, data, criterion, 'cpu')
                here, grads = losses_and_gradients(model, data, criterion, part.device)
        except Exception as e:  # the other detectors still count
            part.add(detector=name, ok=False, error=first_line(e))
            continue
        norm = lambda gs: torch.stack([g.double().norm() for g in gs]).norm().item()
        total = norm(cpu_grads.values())
        far = norm([grads[n] - g for n, g in cpu_grads.items()]) / total
        errors = {k: abs(here[k] - v) / max(abs(v), 1e-6) for k, v in cpu.items()}
        worst = max(errors, key=errors.get)
        part.add(
            detector=name,
            losses=len(cpu),
            loss=dict(cpu=sum(cpu.values()), here=sum(here.values())),
            worst_loss=dict(name=worst, difference=errors[worst]),
            gradient_norm=dict(cpu=total, here=norm(grads.values())),
            gradient_difference=far,
            ok=here.keys() == cpu.keys()
            and errors[worst] < STEP_LIMITS['loss']
            and far < STEP_LIMITS['gradient'],
        )
    bad = [r['detector'] for r in part.result['rows'] if not r['ok']]
    if bad:
        raise RuntimeError('differs from the CPU: ' + ', '.join(bad))


def first_line(e):
    return f'{type(e).__name__}: {next(iter(str(e).splitlines()), "")}'[:300]


# --- dino: the network of the paper at the size of COCO -----------------------------------------------------
def precision(device, name):
    "float32, or autocast to bfloat16"
    import torch

    return torch.autocast(device, torch.bfloat16, enabled=name == 'bfloat16')


def measured(part, make, images, **what):
    """A row with time and memory of the step that `make` returns; out of memory is a result, too

    `make() -> step`; `step() -> numbers to report`."""
    import gc
    import torch

    part.check(6.0)
    numbers, row = {}, dict(what, images=images)
    try:
        step = make()
        numbers = step() or {}
        memory = part.peak_mb(lambda: step())
        ms = part.median_ms(dict(step=lambda: step()), rounds=8, most=1.5)['step']
        row |= dict(ms=ms, images_per_second=1e3 * images / ms, peak_MB=memory)
    except torch.OutOfMemoryError:
        row['out_of_memory'] = True
    step = make = None
    gc.collect()
    if part.device == 'cuda':
        torch.cuda.empty_cache()
    part.add(**row, **numbers)


def train_step(model, losses_of, name, device):  # function without arguments
    "Forward and losses, backward, clip, AdamW"
    import torch

    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-7)
    optimizer.zero_grad(set_to_none=True)

    def step():
        with precision(device, name):
            losses, numbers = losses_of()
        torch.stack([v.float() for v in losses.values()]).sum().backward()
        torch.nn.utils.clip_grad_norm_(params, 0.1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return numbers

    return step


def thresholds(teacher, weak, cfg):  # PseudoConfig
    "Thresholds for an untrained teacher: about OBJECTS boxes per image pass, of six times as many candidates"
    import torch
    from dataclasses import replace
    from semidetr.detectors.contract import class_scores
    from semidetr.semi.teacher import teacher_detections

    with torch.no_grad():
        outputs = teacher(weak['images'], weak['mask'])
        scores = class_scores(outputs).flatten().sort(descending=True).values
        n = OBJECTS * len(weak['targets'])
        cfg = replace(cfg, min_score=float(scores[min(6 * n, len(scores) - 1)]))
        kept = torch.cat([d['scores'] for d in teacher_detections(outputs, weak['targets'], cfg)])
    kept = kept.sort(descending=True).values
    return replace(cfg, threshold=float(kept[min(n, len(kept) - 1)]))


def dino_maker(part, settings, method, batch, name):  # (function that makes the step, images of a step)
    "The step of a method; with Semi-DETR `batch` counts the unlabelled images, with one labelled for four"
    import torch
    from semidetr.matching.losses import CriterionConfig
    from semidetr.semi.consistency import ConsistencyConfig
    from semidetr.semi.methods import MethodConfig
    from semidetr.semi.mining import MiningConfig
    from semidetr.semi.teacher import PseudoConfig, make_teacher, update_teacher

    size = SMALL_SIZE if part.small else SIZE
    semi = method == 'semi_detr'
    labelled = max(1, batch // 4) if semi else batch

    def make():
        torch.manual_seed(0)
        student = settings.build().to(part.device, memory_format=torch.channels_last).train()
        teacher = make_teacher(student) if semi else None
        data = dict(labelled=scene(labelled, size, settings.num_classes))
        if semi:
            data |= {k: scene(batch, size, 0, i, False) for i, k in enumerate(('weak', 'strong'), 1)}
        data = {k: moved(v, part.device) for k, v in data.items()}
        cfg = SimpleNamespace(
            detector=settings,
            criterion=CriterionConfig(),
            method=MethodConfig(method),
            pseudo=thresholds(teacher, data['weak'], PseudoConfig()) if semi else PseudoConfig(),
            mining=MiningConfig(),
            consistency=ConsistencyConfig(),
        )
        rule = cfg.method.build(cfg).to(part.device)

        def losses_of():
            if semi:
                update_teacher(teacher, student, 0.999)
            result = rule.step(student, teacher, data, 0)
            return result.losses, {k: v for k, v in result.scalars.items() if k == 'pseudo_boxes'}

        return train_step(student, losses_of, name, part.device)

    return make, labelled + (batch if semi else 0)


def run_dino(part):
    "Images per second and peak memory of a training step"
    from dataclasses import replace
    from semidetr.detectors.backbone import BackboneConfig
    from semidetr.detectors.detector import detector_small, dino_r50

    if part.small:
        settings = replace(detector_small(5), backbone=BackboneConfig('resnet18', 'none', (8, 16)))
    else:
        settings = dino_r50(CLASSES).untrained()
    part.result |= dict(model='small' if part.small else 'R50', **of_pictures(part))
    for batch in SMALL_BATCHES if part.small else BATCHES:
        for method in ('supervised', 'semi_detr'):
            for name in ('float32', 'bfloat16'):
                make, images = dino_maker(part, settings, method, batch, name)
                measured(part, make, images, method=method, batch=batch, precision=name)


def of_pictures(part):
    "Size, and what float32 means on this GPU"
    import torch

    tf32 = dict(conv=torch.backends.cudnn.allow_tf32, matmul=torch.backends.cuda.matmul.allow_tf32)
    size = SMALL_SIZE if part.small else SIZE
    return dict(size=size, op=op_in_use(part.device), tf32=tf32 if part.device == 'cuda' else None)


# --- theirs: Deformable-DETR of both libraries --------------------------------------------------------------
def run_theirs(part):
    "Training step of Deformable-DETR R50 with the same weights, here and in transformers"
    import torch
    from dataclasses import replace

    if version_of('transformers') is None:
        raise Skip('the package transformers is missing')
    import deformable_detr as dd
    from semidetr.matching.losses import set_criterion

    if part.small:
        name, cfg = 'tiny', replace(dd.SIZE, enc_layers=1, dec_layers=2, num_queries=20)
    else:
        sizes = dict(d_model=256, enc_layers=6, dec_layers=6, ffn=1024, num_queries=300)
        name, cfg = 'resnet50', replace(dd.SIZE, **sizes)
    part.result |= dict(model='small' if part.small else 'R50', **of_pictures(part))
    theirs, ours = (m.to(part.device) for m in dd.twins(name, cfg, CLASSES))
    ours = ours.to(memory_format=torch.channels_last)
    for batch in SMALL_BATCHES if part.small else BATCHES:
        data = moved(scene(batch, part.result['size'], CLASSES), part.device)
        images, targets = data['images'], data['targets']
        losses = dict(
            transformers=lambda: (dict(loss=theirs(images, labels=dd.their_labels(targets)).loss), {}),
            semidetr=lambda: (set_criterion(ours(images), targets, 'o2o', dd.CRITERION), {}),
        )
        for kind in ('float32', 'bfloat16'):
            for who, model in (('transformers', theirs), ('semidetr', ours)):
                make = lambda: train_step(model, losses[who], kind, part.device)
                measured(part, make, batch, library=who, batch=batch, precision=kind)


# --- processes ----------------------------------------------------------------------------------------------
RUN = dict(build=run_build, tests=run_tests, op=run_op, step=run_step, dino=run_dino, theirs=run_theirs)


def child(name, device, small, seconds, out):
    "One part in this process; its result is a file"
    start = time.monotonic()

    def save(result, **more):
        text = json.dumps(plain(result | more), indent=1)
        Path(out).write_text(text)

    part, state = Part(device, small, seconds, save), dict(state='done', reason=None)
    try:
        if device == 'cpu':
            import torch

            torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 1)))
        RUN[name](part)
    except Skip as e:
        state = dict(state='skipped', reason=str(e))
    except ModuleNotFoundError as e:
        state = dict(state='skipped', reason=f'the package {e.name} is missing')
    except (TimeIsUp, subprocess.TimeoutExpired):
        state = dict(
            state='out of time', reason=f'more than {seconds:.0f} s; the rows are those measured until then'
        )
    except Exception as e:
        state = dict(state='failed', reason=first_line(e))
    save(part.result, **state, seconds=time.monotonic() - start)


def measure(name, device, small, seconds):  # result of the part
    "Start the process of a part, and stop it when its time is over"
    env = dict(os.environ, PYTHONWARNINGS='ignore', HF_HUB_OFFLINE='1', TRANSFORMERS_VERBOSITY='error')
    env['PYTHONPATH'] = os.pathsep.join(p for p in (str(ROOT), os.environ.get('PYTHONPATH')) if p)
    env.pop('SEMIDETR_OPS', None)
    if device == 'cuda':
        env.pop('OMP_NUM_THREADS', None)  # what is compared with the CPU may use all of it
    start, limit = time.monotonic(), f'more than {seconds:.0f} s'
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / 'part.json'
        words = ['--child', name, device, str(int(small)), str(seconds), str(out)]
        process = subprocess.Popen([sys.executable, __file__, *words], env=env, start_new_session=True)
        try:
            code = process.wait(seconds)
        except BaseException as e:
            stop(process)
            if not isinstance(e, subprocess.TimeoutExpired):
                raise
            code = None
        result = json.loads(file_text(out) or '{"rows": []}')
    if 'state' not in result:
        ended = dict(state='failed', reason=f'the process ended with exit code {code}')
        result |= dict(state='out of time', reason=f'{limit}; stopped') if code is None else ended
    return result | dict(seconds=time.monotonic() - start, limit_s=seconds)


def stop(process):
    "End the part and what it started, a compiler or the tests"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


def record(args, device, small, started, about, parts):  # content of the file
    ok = all(p['state'] != 'failed' for p in parts.values())
    return dict(
        kit='gpu_check',
        device=device,
        small=small,
        ok=ok,
        seconds=time.monotonic() - started,
        limit_s=args.seconds,
        environment=about,
        parts=parts,
    )


def main(argv=None):  # exit code
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument('--device', choices=('auto', 'cuda', 'cpu'), default='auto')
    ask.add_argument('--small', action='store_true', help='small sizes, which a CPU manages in a minute')
    ask.add_argument(
        '--only', nargs='+', choices=PARTS, default=list(PARTS), metavar='PART', help=', '.join(PARTS)
    )
    ask.add_argument('--seconds', type=float, default=TOTAL, help='at most so many in all')
    ask.add_argument(
        '--out', type=Path, help='default: benchmarks/results/gpu_check.json, or gpu_check_cpu.json'
    )
    ask.add_argument('--child', nargs=5, help=argparse.SUPPRESS)
    args = ask.parse_args(argv)
    sys.path.insert(0, str(ROOT))
    if args.child:
        name, device, small, seconds, out = args.child
        child(name, device, small == '1', float(seconds), out)
        return 0
    started = time.monotonic()
    if version_of('torch') is None:
        print('gpu-check: nothing to do, the package torch is missing', file=sys.stderr)
        return 1
    import torch

    has_gpu = torch.cuda.is_available()
    if args.device == 'cuda' and not has_gpu:
        print(
            'gpu-check: torch sees no GPU; --device cpu --small runs every part on the CPU', file=sys.stderr
        )
        return 1
    device, small = args.device, args.small
    if device == 'auto':
        device = 'cuda' if has_gpu else 'cpu'
        if not has_gpu:
            small = True
            print('gpu-check: torch sees no GPU; every part runs at a small size on the CPU', flush=True)
    elif device == 'cpu' and not small:
        print('gpu-check: on the CPU only with --small', file=sys.stderr)
        return 1
    name = 'gpu_check.json' if device == 'cuda' else 'gpu_check_cpu.json'
    out = args.out or HERE / 'results' / name
    out.parent.mkdir(parents=True, exist_ok=True)
    about, parts = environment(device), {}
    wanted = [name for name in PARTS if name in args.only]
    for i, name in enumerate(wanted):
        left = args.seconds - (time.monotonic() - started)
        limit = left * PARTS[name] / sum(PARTS[n] for n in wanted[i:])
        print(f'{name}: at most {limit:.0f} s', flush=True)
        if limit < 2 * ENDING:
            parts[name] = dict(state='out of time', reason='nothing was left of the time in all', rows=[])
        else:
            parts[name] = measure(name, device, small, limit)
        p = parts[name]
        print(f"{name}: {p['state']}" + (f", {p['reason']}" if p['reason'] else ''), flush=True)
        content = record(args, device, small, started, about, parts)
        out.write_text(json.dumps(plain(content), indent=1) + '\n')
    print(f'gpu-check: {content["seconds"]:.0f} s, written to {out}')
    return 0 if content['ok'] else 1


if __name__ == '__main__':
    sys.exit(main())
