"The benchmark measures what it claims: equal results before timing, alternating turns, valid result files."

import dataclasses, importlib.util, json, shutil, subprocess, sys, tomllib
import pytest, torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / 'benchmarks'))
import run as runner, timing  # noqa: E402

needs_theirs = pytest.mark.skipif(
    importlib.util.find_spec('transformers') is None,
    reason='transformers is missing: pip install -e .[bench]',
)


def test_turns_alternate():
    calls = []
    jobs = dict(a=lambda: calls.append('a'), b=lambda: calls.append('b') or dict(part=7.0))
    t = timing.interleave(jobs, rounds=3, warm=2)
    assert calls == ['a', 'b'] * 5 and len(t['a']['all']) == 3 and t['b']['part'] == [7.0] * 3


def test_ratio_pairs_neighbours():
    "A slow moment that affects both does not change the ratio; the ratio of medians would not be 2"
    r = timing.compare([2.0, 20.0, 4.0, 8.0], [1.0, 10.0, 2.0, 4.0], case='x')
    assert r['ratio'] == [2.0, 2.0, 2.0] and r['theirs_ms'] == 6000 and r['rounds'] == 4 and r['case'] == 'x'
    assert timing.quartiles([3.0]) == [3.0, 3.0, 3.0]
    assert timing.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == [2.0, 3.0, 4.0]


def test_garbage_collection_is_on_again():
    import gc

    def fault():
        raise ValueError

    with pytest.raises(ValueError):
        timing.interleave(dict(a=fault), warm=0)
    assert gc.isenabled()


def test_results_are_short():
    assert runner.plain(dict(a=[1.23456789, True, 3, None, 'x'])) == dict(a=[1.235, True, 3, None, 'x'])


@needs_theirs
def test_op_check_can_fail(monkeypatch):
    import op
    from semidetr.detectors import native

    if not native.native_available():
        pytest.skip('no native op')
    x = op.inputs([(6, 8), (3, 4)], 2, 5)
    fs = op.forms(x)
    for name in op.BASE:
        assert op.verify(x, fs, name) < (3e-2 if 'bf16' in name else 1e-5)
    leaves, f = fs['op']
    with pytest.raises(AssertionError, match='differs'):
        op.verify(x, fs | {'op': (leaves, lambda *a: 1.01 * f(*a))}, 'op')


@needs_theirs
def test_same_model_as_theirs():
    "Logits, boxes, loss and gradients, with and without padding; a wrong weight is noticed"
    import deformable_detr as dd

    cfg = dataclasses.replace(dd.SIZE, d_model=64, enc_layers=2, dec_layers=2, ffn=96, num_queries=12)
    theirs, ours = dd.twins('tiny', cfg, num_classes=7)
    images, targets = dd.scene(96, 2, num_classes=7, objects=3)
    mask = torch.zeros(2, 96, 96, dtype=torch.bool)
    mask[0, :, 64:] = True
    mask[1, 40:] = True
    for m in (None, mask):
        far = dd.agreement(theirs, ours, images, targets, m)
        assert far['outputs'] < 1e-5 and far['loss'] < 1e-5 and far['gradients'] < 1e-2, far
    with torch.no_grad():
        ours.layers[1].cross_attn.sampling_offsets.bias += 0.1
    assert dd.agreement(theirs, ours, images, targets)['outputs'] > 1e-4


@needs_theirs
def test_every_weight_has_its_place():
    import deformable_detr as dd

    for name, (_, _, widths, _) in dd.RESNETS.items():
        body, rest = dd.convert(dd.build_theirs(name).state_dict())
        assert dd.build_backbone(name, body).channels == list(widths[1:])
        assert not any(k.startswith('model.') for k in (*body, *rest))


@needs_theirs
def test_same_pairs_as_theirs():
    import matcher
    from semidetr.matching.matching import hungarian

    outputs, targets = matcher.batch(3, 40, seed=1)
    theirs = matcher.pairs(matcher.theirs()(outputs, targets))
    assert theirs == matcher.pairs(hungarian(outputs, targets))
    assert [len(p) for p in theirs] == [len(t['labels']) for t in targets]
    assert theirs != matcher.pairs(hungarian(outputs, targets, w_l1=0.0))


def test_thresholds_let_boxes_pass(tmp_path):
    "The teacher's step is timed with about as many pseudo boxes as a scene has objects"
    import semi

    run, batches = semi.make_run(tmp_path, 'digits', 'mean_teacher', batches=2)
    semi.set_thresholds(run, batches)
    step, pseudo_boxes = semi.stepper(run, batches)
    step()
    step()
    assert all(semi.BOXES * 0.5 < n < semi.BOXES * 2 for n in pseudo_boxes), pseudo_boxes
    images = [len(batches[0][k]['targets']) for k in ('labelled', 'weak', 'strong')]
    assert images == [semi.LABELLED, semi.UNLABELLED, semi.UNLABELLED]


def test_aims_pick_one_row_each():
    "An aim that matches no row would pass unnoticed; parts that are not measured yet are marked on the page"
    aims = tomllib.loads((ROOT / 'benchmarks' / 'aims.toml').read_text())['aim']
    for aim in aims:
        assert ('at_least' in aim) != ('at_most' in aim) and aim['part'] in runner.PARTS
        f = ROOT / 'benchmarks' / 'results' / f"{aim['part']}.json"
        if not f.exists():
            continue
        rows = json.loads(f.read_text())['rows']
        found = [r for r in rows if all(r.get(k) == v for k, v in aim['match'].items())]
        assert len(found) == 1 and ('cost' if 'at_most' in aim else 'ratio') in found[0], aim['what']


@needs_theirs
def test_smoke(tmp_path):
    command = [sys.executable, ROOT / 'benchmarks' / 'run.py', '--quick', '--only', 'matcher']
    done = subprocess.run([*command, '--out', tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / 'matcher.json').read_text())
    assert result['quick'] and result['machine']['versions']['torch'] == torch.__version__
    assert all(r['rounds'] == 3 for r in result['rows'])


@pytest.fixture(scope='module')
def short_run(tmp_path_factory):
    "A trainer that took one step, and a function that runs a script on its folder"
    from semidetr.train.trainer import Trainer
    from test_trainer import tiny

    folder = tmp_path_factory.mktemp('short')
    cfg = tiny('optim.iters=1', 'run.test=false', method='supervised')
    trainer = Trainer(cfg, folder / 'r', progress=False)
    trainer.fit()

    def measure(script):
        options = ['--images', '9', '--to', folder / 'out.json']
        command = [sys.executable, ROOT / 'benchmarks' / script, folder / 'r', *options]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads((folder / 'out.json').read_text())[0]

    return trainer, measure


def hidden_boxes(data):
    return [data.truth.annotation(data.truth.index_of(i)) for i in data.unlabelled.ids[:9]]


def test_misplaced_background_of_a_run(short_run):
    "Unlabelled images with hidden truth, every assigner; with true boxes the result is that of the function"
    import misplaced
    from semidetr.matching.assigners import misplaced_background
    from semidetr.matching.matching import assign_o2o, pad_targets

    trainer, measure = short_run
    m, hidden = measure('misplaced.py'), hidden_boxes(trainer.data)
    logits, boxes, targets, cfg = misplaced.predictions(trainer.dir, 9)
    labelled = {str(i) for i in trainer.data.labelled.ids}
    assert [len(a['labels']) for a in hidden] == [len(t['labels']) for t in targets]
    assert not labelled & {str(i) for i in trainer.data.unlabelled.ids[:9]}
    assert m['images'] == 9 and m['objects'] == sum(len(t['labels']) for t in targets) > 0
    assert len(m['rates']) == 5 and all(len(r) == len(m['amounts']) for r in m['rates'].values())
    truth = pad_targets(targets)
    assert m['rates']['Hungarian'][0] == misplaced_background(assign_o2o(logits, boxes, truth), boxes, truth)


def test_objects_labelled_twice(short_run):
    "Boxes, objects, objects with a box and with several, counted box by box"
    from overlaps import overlaps
    from torchvision.ops import box_iou
    from semidetr.data.datasets import Subset
    from semidetr.train.evaluation import detect
    from semidetr.train.predict import load_model

    trainer, _ = short_run
    model, cfg, _ = load_model(trainer.dir)
    found = detect(model, Subset(trainer.data.unlabelled, range(9)), cfg.view, nms=cfg.pseudo.nms)
    scores = torch.cat([d['scores'] for d in found.values()])
    threshold, want = scores.median().item(), dict(boxes=0, objects=0, covered=0, several=0)
    for d, a in zip(found.values(), hidden_boxes(trainer.data)):
        kept = [b for b, s in zip(d['boxes'], d['scores']) if s >= threshold]
        want['boxes'] += len(kept)
        for truth in a['boxes']:
            n = sum(box_iou(truth[None], b[None]).item() >= 0.5 for b in kept)
            want['objects'] += 1
            want['covered'] += n > 0
            want['several'] += n > 1
    got = overlaps(trainer.dir, 9, threshold)
    assert {k: got[k] for k in want} == want and 0 < got['boxes'] < len(scores)
    assert got['hash'] == json.loads((trainer.dir / 'run.json').read_text())['hash']


def test_the_teacher_of_a_run_is_followed_once_more(short_run, tmp_path):
    "At the start and at the end, on unlabelled scenes; a run that ends with another teacher is refused"
    import qualitative

    trainer, _ = short_run
    followed = qualitative.through_training(trainer.dir, times=2, images=2)
    ids = [str(i) for i in trainer.data.unlabelled.ids[:2]]
    assert [n['step'] for n in followed['notes']] == [0, 1]
    assert list(followed['truth']) == list(followed['notes'][0]['found']) == ids
    shutil.copytree(trainer.dir, tmp_path / 'other')
    state = torch.load(tmp_path / 'other' / 'last.pt', weights_only=True)
    next(v for v in state['teacher'].values() if v.is_floating_point()).add_(1)
    torch.save(state, tmp_path / 'other' / 'last.pt')
    with pytest.raises(AssertionError, match='the teacher is another one'):
        qualitative.through_training(tmp_path / 'other', times=2, images=2)


def test_points_and_features_of_queries(short_run):
    "The recorded points give the output of the last cross-attention; one feature and one label per object"
    import qualitative
    from semidetr.detectors.attention import ms_deform_attn
    from semidetr.data.datasets import Subset
    from semidetr.data.loader import EvalLoader
    from semidetr.train.predict import load_model

    trainer, _ = short_run
    ds = Subset(trainer.data.truth, range(12))
    model, cfg, _ = load_model(trainer.dir)
    layer, recorded = model.transformer.decoder.layers[-1].cross_attn, {}
    layer.register_forward_hook(lambda m, args, out: recorded.update(value=args[2], shapes=args[3], out=out))
    part = next(iter(EvalLoader(ds, cfg.view, 1)))
    model(part['images'], part['mask'])
    *_, xy, weights = next(iter(qualitative.decoded(trainer.dir, ds)))
    split = (1, len(xy), layer.n_heads, layer.n_levels, layer.n_points)
    value = layer.value_proj(recorded['value']).view(1, -1, layer.n_heads, layer.d_model // layer.n_heads)
    read = ms_deform_attn(value, recorded['shapes'], xy.view(*split, 2), weights.view(split))
    torch.testing.assert_close(layer.output_proj(read), recorded['out'], rtol=1e-4, atol=1e-5)
    points = qualitative.attention_points(trainer.dir, ds, 1)
    f = qualitative.query_features(trainer.dir, ds, min_iou=0)
    objects = [len(ds.annotation(i)['labels']) for i in range(12)]
    assert [len(q) for q in points.values()] == [min(n, 1) for n in objects]
    assert f['objects'] == len(f['plane']) == len(f['labels']) == sum(objects)
    assert 0 <= f['told'] <= 1 and f['asked'] == sum(objects[6:])


def test_thresholds_of_a_run(short_run):
    "Precision and recall of each class as counted by hand; a lower threshold gives no fewer boxes"
    import thresholds

    trainer, measure = short_run
    t, hidden = measure('thresholds.py'), hidden_boxes(trainer.data)
    labelled = trainer.data.labelled
    labels = torch.cat([labelled.annotation(i)['labels'] for i in range(len(labelled))])
    assert list(t['labelled'].values()) == labels.bincount(minlength=len(t['labelled'])).tolist()
    assert t['images'] == 9 and t['labelled_images'] == len(labelled)
    assert t['thresholds'] == thresholds.THRESHOLDS
    for c, counted in enumerate(t['classes'].values()):
        assert counted['objects'] == sum(int((a['labels'] == c).sum()) for a in hidden)
    assert all(a >= b for c in t['classes'].values() for a, b in zip(c['boxes'], c['boxes'][1:]))

    class Truth:  # two objects of class 0, one of class 1
        def index_of(self, i):
            return i

        def annotation(self, i):
            boxes = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60], [80, 80, 90, 90]])
            return dict(boxes=boxes, labels=torch.tensor([0, 0, 1]), ignore=torch.zeros(3, dtype=torch.bool))

    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [80, 80, 90, 90]])
    scores = torch.tensor([0.9, 0.3, 0.1])
    found = [dict(image_id=0, boxes=boxes, labels=torch.tensor([0, 0, 1]), scores=scores)]
    assert thresholds.counts(found, Truth(), 0.2, 0) == [1, 2, 2]
    assert thresholds.counts(found, Truth(), 0.5, 0) == [1, 1, 2]
    assert thresholds.counts(found, Truth(), 0.2, 1) == [0, 0, 1]


def test_a_short_run_is_watched(tmp_path):
    "The kit of the page on long runs, at 20 iterations: readings of main process and workers, a valid record"
    import endurance

    row = endurance.watch('tiny', 20, 0.3)
    assert row['iterations'] == 20 and row['rows'][-1]['iteration'] == 20
    assert all(r['main_mb'] <= r['all_mb'] for r in row['rows'])
    busy = [r for r in row['rows'] if r['processes'] == 3]  # with both workers
    assert busy and all(r['handles'] > 3 and r['threads'] >= 1 and r['main_mb'] > 100 for r in busy)
    rows = [dict(all_mb=i, handles=-i, iteration=i) for i in range(1000)]
    kept = [r['iteration'] for r in endurance.thinned(rows, 100)]
    assert kept[0] == 0 and kept[-1] == 999 and len(kept) <= 103
