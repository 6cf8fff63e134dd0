"The pages of situations and of faults name tests that exist"

import re
import pytest
from conftest import ROOT

PAGES = {n: (ROOT / f'nbs/guides/{n}.qmd').read_text(encoding='utf-8') for n in ('situations', 'faults')}
LEAST = dict(situations=45, faults=40)  # rows
page = pytest.mark.parametrize('page', PAGES)


@page
def test_every_named_test_exists(page):
    code = '\n'.join(f.read_text(encoding='utf-8') for f in sorted((ROOT / 'tests').glob('test_*.py')))
    there = set(re.findall(r'^def (test_\w+)', code, re.M))
    named = set(re.findall(r'`(test_\w+)`', PAGES[page]))
    assert len(named) > LEAST[page] and not named - there, named - there


@page
def test_every_row_names_a_test(page):
    lines = PAGES[page].splitlines()
    rows = [r for r in lines if r.startswith('| ') and not r.startswith(('| Situation', '| Fault'))]
    assert len(rows) > LEAST[page] and all(re.search(r'\| (`test_\w+`(, )?)+ \|$', r) for r in rows)
