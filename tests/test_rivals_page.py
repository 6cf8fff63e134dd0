"The page of rivals: no record, one seed, seeds that lack arms, three seeds against numbers by hand"

import json
import re
from pathlib import Path

import pytest
from semidetr.lab.report import published
from semidetr.lab.rivals import (
    RIVALS,
    existing,
    finding,
    measured,
    plot_rivals,
    rate_table,
    rival_rows,
    rival_table,
    to_run,
)
from semidetr.lab.study import read_studies

ABLATIONS = Path(__file__).parents[1] / 'nbs' / 'ablations'
COST = {r.detector: (10.0, 2.0) for r in RIVALS}


def arm(ap, lr=1e-3, part='val'):
    shown = dict(AP=ap, AP50=ap + 20, AP_nms=ap + 5)
    own = dict(metrics={part: dict(teacher=shown)}, config=dict(optim=dict(lr=lr)))
    shared = dict(hash='h', commit='c', iterations=300, seconds=60.0, cpu_seconds=60.0, machine='m')
    return shared | own | dict(data=dict(labelled=20, unlabelled=80))


def write(folder, study, seed, **arms):
    path = folder / study / f'seed{seed}.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    arms = {k: v if isinstance(v, dict) else arm(v) for k, v in arms.items()}
    path.write_text(json.dumps(dict(study=study.partition('/')[0], seed=seed, arms=arms)))


def test_without_any_record(tmp_path):
    found = measured(tmp_path)
    text = finding(found, to_run(tmp_path))
    assert found == [] and '\n' not in text
    assert text.startswith(
        'No training of a rival has been run yet. Not complete: `semidetr ablate soft_teacher'
    )
    assert rival_table(found, COST) == '*No training has been run yet.*'
    assert len(plot_rivals(found).axes) == 1 and 'semidetr ablate rival_rates' in rate_table([])


def test_one_seed_has_no_interval(tmp_path):
    write(tmp_path, 'soft_teacher/c20', 0, supervised=20.0, mean_teacher=22.0, soft_teacher=21.0)
    found = measured(tmp_path)
    columns, rows = rival_rows(found, COST)
    assert [row[1] for row in rows] == ['supervised', 'mean teacher', 'Soft Teacher']
    gains = [dict(zip(columns, row))['against supervised'] for row in rows]
    assert gains == ['', '+2.0', '+1.0']
    text = finding(found)
    assert '±' not in text.partition('In brackets')[0] and 'there is one seed' in text


def test_only_seeds_with_both_are_paired(tmp_path):
    "Seed 1 lacks the own method, seed 3 lacks the control; a run that lacks an arm does not stop the page"
    for seed, (a, b) in enumerate([(20.0, 24.0), (30.0, None), (10.0, 16.0), (None, 99.0)]):
        arms = dict(supervised=a, dense_teacher=b)
        write(tmp_path, 'dense_teacher/c50', seed, **{k: v for k, v in arms.items() if v is not None})
    found = measured(tmp_path)
    columns, rows = rival_rows(found, COST)
    own = dict(zip(columns, rows[-1]))
    assert (own['method'], own['seeds'], own['labels'], own['AP with NMS']) == (
        'Dense Teacher',
        3,
        50,
        'built in',
    )
    mean, half = map(float, re.findall(r'[\d.]+', own['against supervised']))
    assert mean == 5.0 and half == pytest.approx(12.706 * 2**0.5 / 2**0.5, abs=0.05)
    assert len(rows) == 2 and 'there is one seed' not in finding(found)
    assert 'Dense Teacher on FCOS 20.0 (+5.0' in finding(found)


def test_detectors_stand_side_by_side(tmp_path):
    "Few labels first; DINO with its NMS"
    for seed in range(3):
        for r in RIVALS:
            for n, study in r.studies.items():
                write(tmp_path, study, seed, supervised=n, **{r.own: n + seed})
    found = measured(tmp_path)
    assert [(m.labels, m.rival.detector) for m in found] == [
        (n, r.detector) for n in (20, 50) for r in RIVALS
    ]
    columns, rows = rival_rows(found, COST)
    nms = [row[columns.index('AP with NMS')] for row in rows if row[0] == 'DINO']
    assert nms == ['25.0', '26.0', '55.0', '56.0'] and len(rows) == 12 and to_run(tmp_path) == ''
    text = finding(found)
    assert 'No training' not in text and text.count('AP with') == 2 and len(plot_rivals(found).axes) == 2


def test_rates(tmp_path):
    write(tmp_path, 'rival_rates', 0, fcos_low=arm(3.0, 5e-4, 'dev'), faster_rcnn_mid=arm(4.0, part='dev'))
    lines = rate_table(existing(tmp_path, 'rival_rates')).splitlines()
    assert lines[2:] == ['| FCOS | 0.0005 | 300 | 1 | 3.0 |', '| Faster R-CNN | 0.001 | 300 | 1 | 4.0 |']


def test_studies_and_published_rows_exist():
    "What the page names is in the files that it reads"
    known, _ = read_studies(ABLATIONS / 'studies.toml')
    assert {'components', 'components_50', 'rival_rates'} <= set(known)
    names = {row['method'] for row in published(ABLATIONS / 'results', 'coco_partial')}
    assert {r.method for r in RIVALS if r.suppresses} <= names
