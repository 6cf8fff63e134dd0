"Pages say what the records carry: pairs, intervals, and no claim without one"

import json, math
import pytest
from conftest import ROOT
from semidetr.core import DataError
from semidetr.lab.report import (
    METHOD_COLORS,
    METHOD_NAMES,
    arm_color,
    arm_rows,
    as_published,
    difference,
    finding,
    found,
    plus_minus,
    published,
    read_records,
    scale_line,
    signed,
    sorted_out,
    statement,
    verdict,
    verdicts,
    with_arm,
)


def write(folder, seeds, nms=True):
    "Records of arms a and b; seeds: pairs of AP"
    folder.mkdir(parents=True)
    arm = lambda ap: dict(
        hash='h',
        commit='c',
        cpu_seconds=120,
        seconds=180,
        iterations=7,
        threads=1,
        machine='m',
        data=dict(labelled=3, unlabelled=4),
        metrics=dict(
            val=dict(
                teacher=dict(AP=ap, AP50=ap + 1, per_class={'cat': dict(AP=ap + 2)})
                | ({'AP_nms': ap + 3} if nms else {})
            )
        ),
    )
    for seed, (a, b) in enumerate(seeds):
        (folder / f'seed{seed}.json').write_text(
            json.dumps(dict(seed=seed, burn_in=None, arms=dict(a=arm(a), b=arm(b)) if b else dict(a=arm(a))))
        )
    return folder


def test_interval_by_hand(tmp_path):
    "Differences 1, 2, 3: mean 2, std 1, t_2 = 4.303, half 2.484"
    write(tmp_path / 's', [(10.0, 11.0), (20.0, 22.0), (30.0, 33.0)])
    d = difference(read_records(tmp_path, 's'), 'b', 'a')
    assert (
        d['mean'] == 2
        and d['n'] == 3
        and math.isclose(d['half'], 4.302653 * 1 / 3**0.5, rel_tol=1e-5)
        and not found(d)
    )
    assert verdict('b against a', d) == (
        'b against a: +2.0 AP on average over 3 seeds, 95 % interval ±2.5 (each: +1.0, +2.0, +3.0); '
        'no difference found at this scale.'
    )
    assert plus_minus(d) == '+2.0\u00a0±\u00a02.5'


def test_a_gain_that_is_there(tmp_path):
    write(tmp_path / 's', [(10.0, 12.0), (20.0, 22.1), (30.0, 31.9)])
    d = difference(read_records(tmp_path, 's'), 'b', 'a')
    assert found(d) and verdict('x', d).endswith('+1.9).')


def test_one_seed_has_no_interval(tmp_path):
    write(tmp_path / 's', [(10.0, 12.0)])
    d = difference(read_records(tmp_path, 's'), 'b', 'a')
    assert not found(d) and verdict('x', d) == 'x: +2.0 AP, one seed.' and plus_minus(d) == '+2.0'


def test_seeds_without_an_arm_are_left_out(tmp_path):
    write(tmp_path / 's', [(10.0, 12.0), (20.0, None)])
    assert len(read_records(tmp_path, 's')) == 2 and len(read_records(tmp_path, 's', ['a', 'b'])) == 1
    with pytest.raises(DataError, match='semidetr ablate none'):
        read_records(tmp_path, 'none')
    with pytest.raises(DataError, match='no seed with c'):
        read_records(tmp_path, 's', ['c'])


def variants(folder, seeds, start='h'):
    "Records of one arm v whose burn-in is `start`, after those of `write`"
    write(folder, seeds)
    for p in folder.iterdir():
        r = json.loads(p.read_text())
        p.write_text(
            json.dumps(r | dict(study='more', burn_in=dict(hash=start), arms=dict(v=r['arms']['b'])))
        )


def test_variants_beside_the_reference_of_another_study(tmp_path):
    "Seeds that both have; the reference first; another start is no pair"
    write(tmp_path / 's', [(10.0, 12.0), (20.0, 24.0), (30.0, None)])
    for p in (tmp_path / 's').iterdir():
        p.write_text(json.dumps(json.loads(p.read_text()) | dict(study='s', burn_in=dict(hash='h'))))
    variants(tmp_path / 'more', [(0.0, 11.0), (0.0, 25.0), (0.0, 5.0)])
    runs = with_arm(read_records(tmp_path, 'more'), read_records(tmp_path, 's'), 'b', 'all')
    assert (
        [r['seed'] for r in runs] == [0, 1]
        and [list(r['arms']) for r in runs] == [['all', 'v']] * 2
        and difference(runs, 'v', 'all')['each'] == [-1, 1]
    )
    with pytest.raises(DataError, match='no seed of it has c.*semidetr ablate s'):
        with_arm(read_records(tmp_path, 'more'), read_records(tmp_path, 's'), 'c', 'all')
    variants(tmp_path / 'other', [(0.0, 11.0)], 'another')
    with pytest.raises(DataError, match='seed 0 starts from another burn-in.*semidetr ablate more'):
        with_arm(read_records(tmp_path, 'other'), read_records(tmp_path, 's'), 'b', 'all')


def test_verdicts_of_all_arms(tmp_path):
    "A line an arm but the base; the suppressed difference is taken back by itself"
    write(tmp_path / 's', [(10.0, 12.0), (20.0, 22.1), (30.0, 31.9)])
    runs = read_records(tmp_path, 's')
    for i, r in enumerate(runs):
        r['arms']['b']['metrics']['val']['teacher']['AP_nms'] += 50 * (-1) ** i
    text = verdicts(runs, dict(a='one', b='two'), 'a')
    assert (
        text.startswith('* two: +2.0 AP on average over 3 seeds')
        and text.count('\n') == 0
        and 'no difference found at this scale' not in text
        and text.endswith('(no difference found).')
    )
    assert verdicts(runs[:1], dict(a='one', b='two'), 'a', ['AP']) == '* two: +2.0 AP, one seed.'


def test_students_are_compared_with_students(tmp_path):
    write(tmp_path / 's', [(10.0, 12.0)])
    runs = read_records(tmp_path, 's')
    for arm, ap in (('a', 5.0), ('b', 4.0)):
        runs[0]['arms'][arm]['metrics']['val']['student'] = dict(AP=ap)
    assert difference(runs, 'b', 'a', who='student')['mean'] == -1


@pytest.mark.parametrize('nms', [True, False])
def test_rows(tmp_path, nms):
    write(tmp_path / 'results' / 's', [(10.0, 12.0), (20.0, 24.0)], nms)
    runs, names = read_records(tmp_path / 'results', 's'), dict(a='one', b='two')
    columns, (one, two) = arm_rows(runs, names, 'a', ['cat'])
    assert columns == ['arm', 'AP', 'AP50', 'AP with NMS', 'cat', 'against one', 'CPU-minutes']
    assert (
        two
        == [
            'two',
            '18.0\u00a0±\u00a08.5',
            '19.0',
            '21.0' if nms else 'not counted',
            '20.0',
            plus_minus(difference(runs, 'b', 'a')),
            '2.0',
        ]
        and one[5] == ''
    )
    text = scale_line(runs, names)
    assert text.startswith(
        '*Scale: 2 seeds; 3 labelled and 4 unlabelled images; 7 iterations; 1 thread of m; '
        '8 CPU-minutes for all arms, 12 minutes by the clock one after the other.*\n'
    )
    assert text.count('| `h` | `c` | 7 | 2.0 | 3.0 |') == 4 and '| 0 | two | 12.0 | `h` |' in text
    (tmp_path / '_quarto.yml').write_text('appendices:\n  - nbs/ablations/runs/s.ipynb\n')
    with_page = scale_line([r | dict(study='s') for r in read_records(tmp_path / 'results', 's')], names)
    assert 'Executed runs: @sec-runs-s.' in with_page


def test_published_rows_are_marked():
    rows = published(ROOT / 'nbs/ablations/results', 'components')
    assert (
        [r['ap'][0] for r in rows] == [41.6, 42.7, 43.1, 43.5]
        and 'class="published"' in as_published(41.6)
        and 'not measured here' in as_published(41.6)
    )


def test_nothing_is_minus_zero():
    assert [signed(x) for x in (-0.04, 0.04, -0.06, 0.0, -0.0, 12.34)] == [
        '+0.0',
        '+0.0',
        '-0.1',
        '+0.0',
        '+0.0',
        '+12.3',
    ]
    assert plus_minus(dict(mean=-0.01, half=1.0, n=3)) == '+0.0\u00a0±\u00a01.0'


def test_statements(tmp_path):
    "More, less, nothing found, one seed; and a box that holds them as sentences"
    d = lambda mean, half, n=3: dict(mean=mean, half=half, n=n)
    assert statement('A', 'B', d(2.0, 1.0)) == 'A has 2.0\u00a0±\u00a01.0 AP more than B'
    assert statement('A', 'B', d(-2.0, 1.0)) == 'A has 2.0\u00a0±\u00a01.0 AP less than B'
    assert (
        statement('A', 'B', d(0.5, 1.0))
        == 'no difference was found between A and B (+0.5\u00a0±\u00a01.0 AP)'
    )
    assert statement('A', 'B', d(0.5, math.inf, 1)) == 'A has +0.5 AP against B in the one seed'
    assert finding('one thing', '', 'another.') == '::: {.finding}\nOne thing. Another.\n:::\n'
    write(tmp_path / 's', [(10.0, 12.0), (20.0, 22.1), (30.0, 31.9)])
    runs, names = read_records(tmp_path, 's'), dict(a='one', b='two')
    [better] = sorted_out(runs, names, 'a')
    assert better.startswith('better than one: two (+2.0')
    assert sorted_out(runs, names, 'b')[0].startswith('worse than two: one (-2.0')


def test_a_method_has_one_colour():
    assert set(METHOD_NAMES) == set(METHOD_COLORS) and len(set(METHOD_COLORS.values())) == len(METHOD_NAMES)
    assert (
        arm_color('shm_cqc_cpm') == METHOD_COLORS['semi_detr']
        and arm_color('distilled') == METHOD_COLORS['plus']
    )
