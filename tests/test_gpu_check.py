"The GPU kit runs to its end without a GPU, and says what is missing and what ran out of time."

import json, os, subprocess, sys
import pytest, torch
from conftest import ROOT
from semidetr.core import ConfigError
from semidetr.semi.fit import detectors_of
from semidetr.semi.methods import SemiDETR

sys.path.insert(0, str(ROOT / 'benchmarks'))
import gpu_check as G  # noqa: E402


def kit(*options):
    command = [sys.executable, ROOT / 'benchmarks' / 'gpu_check.py', *options]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_small_version_on_the_cpu(tmp_path):
    "Every part reaches its end, and the record has what the page reads"
    done = kit('--device', 'cpu', '--small', '--out', tmp_path / 'r.json')
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    record = json.loads((tmp_path / 'r.json').read_text())
    keys = ('kit', 'device', 'small', 'ok', 'seconds', 'limit_s', 'environment', 'parts')
    assert tuple(record) == keys and record['ok'] and record['device'] == 'cpu' and record['small']
    assert (
        record['seconds'] < record['limit_s'] == 360 and record['environment']['torch'] == torch.__version__
    )
    parts = record['parts']
    assert list(parts) == list(G.PARTS) and sum(G.PARTS.values()) == G.TOTAL
    for part in parts.values():
        assert part['state'] in ('done', 'skipped') and part['seconds'] < part['limit_s']
        assert (part['state'] == 'done') == (part['reason'] is None)
    steps = {r['detector']: r for r in parts['step']['rows']}
    assert set(steps) == set(detectors_of(SemiDETR))
    assert parts['step']['state'] == 'skipped' or all(r['gradient_difference'] < 1e-4 for r in steps.values())
    rows = parts['dino']['rows']
    cases = {(r['method'], r['precision']) for r in rows}
    assert cases == {(m, p) for m in ('supervised', 'semi_detr') for p in ('float32', 'bfloat16')}
    assert all(r['images_per_second'] > 0 and r['peak_MB'] is None for r in rows if 'ms' in r)
    assert all(r['pseudo_boxes'] > 0 for r in rows if r['method'] == 'semi_detr')
    if parts['op']['state'] == 'done':
        forms = {(r['case'], r['form']) for r in parts['op']['rows'] if 'form' in r}
        assert forms == {(c, f) for c in ('encoder', 'decoder') for f in ('op', 'fused')}


def test_the_time_of_a_part_ends(tmp_path, monkeypatch):
    "A part that does not end is stopped; one that looks at the clock keeps its rows"
    result = G.measure('dino', 'cpu', True, 1.0)
    assert result['state'] == 'out of time' and result['rows'] == [] and result['seconds'] < 10
    monkeypatch.setitem(G.RUN, 'op', lambda part: (part.add(case='a'), part.check(60.0)))
    G.child('op', 'cpu', True, 20.0, tmp_path / 'p.json')
    result = json.loads((tmp_path / 'p.json').read_text())
    assert result['state'] == 'out of time' and result['rows'] == [dict(case='a')]


@pytest.mark.parametrize(
    'error, state, reason',
    [
        (G.Skip('no nvcc'), 'skipped', 'no nvcc'),
        (
            ModuleNotFoundError("No module named 'scipy'", name='scipy'),
            'skipped',
            'the package scipy is missing',
        ),
        (ValueError('wrong\nmore'), 'failed', 'ValueError: wrong'),
    ],
    ids=['skip', 'package', 'fault'],
)
def test_how_a_part_ends(tmp_path, monkeypatch, error, state, reason):
    def fail(part):
        raise error

    monkeypatch.setitem(G.RUN, 'op', fail)
    G.child('op', 'cpu', True, 20.0, tmp_path / 'p.json')
    result = json.loads((tmp_path / 'p.json').read_text())
    assert (result['state'], result['reason']) == (state, reason)


@pytest.mark.parametrize('there', [True, False])
def test_a_build_fails_with_a_compiler_and_is_skipped_without(monkeypatch, there):
    from semidetr.detectors import build

    def fail(kind):
        raise ConfigError('the build failed: an error')

    monkeypatch.setattr(build, 'build_ops', fail)
    monkeypatch.setattr(build, '_compiler', lambda: ['c++'] if there else [])
    part = G.Part('cpu', True, 60.0, lambda result: None)
    with pytest.raises(RuntimeError if there else G.Skip, match='the build failed'):
        G.run_build(part)


def test_out_of_memory_is_a_result():
    saved = []
    part = G.Part('cpu', True, 60.0, lambda result: saved.append(len(result['rows'])))

    def fail():
        raise torch.OutOfMemoryError('too large')

    G.measured(part, lambda: fail, 4, method='supervised')
    assert part.result['rows'] == [dict(method='supervised', images=4, out_of_memory=True)] and saved == [1]


def test_a_wrong_op_is_noticed(monkeypatch):
    from semidetr.detectors import native

    if not native.native_available():
        pytest.skip('no native op')
    right = native.native_ms_deform_attn
    monkeypatch.setattr(native, 'native_ms_deform_attn', lambda *a: 1.001 * right(*a))
    monkeypatch.setattr(G, 'SMALL_PYRAMID', [(4, 6), (2, 3), (1, 2), (1, 1)])
    part = G.Part('cpu', True, 60.0, lambda result: None)
    with pytest.raises(RuntimeError, match='differs more than allowed: op encoder float32'):
        G.run_op(part)


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_without_a_gpu():
    done = kit('--device', 'cuda')
    assert done.returncode == 1 and 'torch sees no GPU' in done.stderr
    assert kit('--device', 'cpu').returncode == 1


def test_make_takes_the_python_that_is_there(tmp_path):
    "That of the command line or the environment; nothing is installed"
    env = {k: v for k, v in os.environ.items() if not k.startswith('MAKE')}
    command = ['make', '-n', 'gpu-check', 'PY=./python', 'GPU=--only op']
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.split() == ['./python', 'benchmarks/gpu_check.py', '--only', 'op']
