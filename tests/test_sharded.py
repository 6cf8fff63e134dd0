"Moments shared out to the processes: the numbers of a run, its files and its resumes are those without."

import json, warnings
import pytest, torch
from test_many import share, whole
from test_replay import with_nan
from together import run_together
from semidetr.core import rank
from semidetr.train.checkpoint import load_checkpoint
from semidetr.train.config import override
from semidetr.train.generations import OWN, read_parts
from semidetr.train.optim import shares_of
from semidetr.train.replay import replay
from semidetr.train.trainer import Trainer


def begun(folder, sharded, until=None):
    "Begin a run of two processes or go on with it"
    items = 'method.T1=2', 'optim.iters=4', 'data.dev=0', 'run.log_every=1', f'optim.sharded={sharded}'
    trainer = Trainer(share(whole('semi_detr', *items), 2), folder, progress=False)
    trainer.fit(until)
    return trainer


def elements(trainer):
    "How many numbers the moments of this process have"
    return sum(m['exp_avg'].numel() + m['exp_avg_sq'].numel() for m in trainer.optimizer.state.values())


def on_two(folder):
    "Without; stopped, resumed, switched off; switched on; and one that ends with NaN in the second process"
    warnings.simplefilter('ignore')
    counts = dict(all=elements(begun(folder / 'plain', 'false')))
    begun(folder / 'off', 'true', 1)
    counts['resumed'] = elements(begun(folder / 'off', 'true', 2))
    begun(folder / 'off', 'false')
    begun(folder / 'on', 'false', 2)
    counts['share'] = elements(begun(folder / 'on', 'true'))
    (folder / f'{rank()}.json').write_text(json.dumps(counts))
    real = Trainer.batches

    def batches(run):
        for batch in real(run):
            yield with_nan(batch, 'labelled') if rank() == 1 and run.step == 3 else batch

    Trainer.batches = batches
    try:
        begun(folder / 'nan', 'true')
    except Exception as e:
        assert 'iteration 3' in str(e)
    else:
        raise AssertionError('the run with NaN has not ended')


WORKER = """
from pathlib import Path
import test_sharded
from semidetr.core import start_processes
start_processes()
test_sharded.on_two(Path(sys.argv[1]))
"""


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')
    run_together(WORKER, folder)
    return folder


def assert_equal(a, b):
    "Every number of two checkpoints: weights, moments, random state, history"
    assert list(a['optimizer']['state']) == list(b['optimizer']['state'])
    for name in ('student', 'teacher', 'optimizer', 'parts', 'rng', 'health', 'recent', 'history'):
        one, two = (torch.utils._pytree.tree_flatten(x[name]) for x in (a, b))
        assert one[1] == two[1], name
        for x, y in zip(one[0], two[0]):
            assert torch.equal(x, y) if torch.is_tensor(x) else x == y, name


@pytest.mark.parametrize('name', ['on', 'off'])
def test_switched_in_the_middle_a_run_is_the_same_to_the_last_bit(runs, name):
    assert_equal(load_checkpoint(runs / name), load_checkpoint(runs / 'plain'))
    assert (runs / name / 'log.jsonl').read_text() == (runs / 'plain' / 'log.jsonl').read_text()


def test_each_process_keeps_half_of_the_moments(runs):
    counts = [json.loads((runs / f'{n}.json').read_text()) for n in (0, 1)]
    for kind in ('resumed', 'share'):
        assert sum(c[kind] for c in counts) == counts[0]['all'] == counts[1]['all']
        assert max(c[kind] for c in counts) < 0.51 * counts[0]['all']


def test_a_part_has_the_moments_of_its_share_only_while_the_setting_is_on(runs):
    [on], [off] = (read_parts(runs / name, load_checkpoint(runs / name)) for name in ('on', 'off'))
    assert set(on) - set(off) == {'moments'} and set(OWN) <= set(off)
    saved = load_checkpoint(runs / 'on')['optimizer']['state']
    assert 0 < len(on['moments']) < len(saved)
    assert all(torch.equal(m['exp_avg'], saved[i]['exp_avg']) for i, m in on['moments'].items())


def test_a_failure_of_one_process_saves_the_moments_of_both(runs):
    "No message collects them; the step that failed is repeated from the moments of one"
    assert_equal(load_checkpoint(runs / 'nan'), load_checkpoint(runs / 'plain' / 'previous.pt'))
    assert replay(runs / 'nan' / 'failed_step_3.rank1.pt').equal


def test_shares():
    assert shares_of([5, 1, 4, 2], 2) == [[0, 1], [2, 3]]
    assert shares_of([5], 3) == [[0], [], []]


def test_one_process_takes_no_notice(tmp_path):
    cfg = override(whole('supervised', 'optim.iters=1', 'data.dev=0'), ['optim.sharded=true'])
    trainer = Trainer(cfg, tmp_path, progress=False)
    trainer.fit()
    assert len(trainer.optimizer.state) == sum(len(g['params']) for g in trainer.optimizer.param_groups)
    assert 'moments' not in load_checkpoint(tmp_path)
