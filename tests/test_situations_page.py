"The page of situations names tests that exist"

import re
from conftest import ROOT

PAGE = (ROOT / 'nbs/guides/situations.qmd').read_text(encoding='utf-8')


def test_every_named_test_exists():
    code = '\n'.join(f.read_text(encoding='utf-8') for f in sorted((ROOT / 'tests').glob('test_*.py')))
    there = set(re.findall(r'^def (test_\w+)', code, re.M))
    named = re.findall(r'`(test_\w+)`', PAGE)
    assert len(named) > 50 and not set(named) - there, set(named) - there


def test_every_row_names_a_test():
    rows = [
        line for line in PAGE.splitlines() if line.startswith('| ') and not line.startswith('| Situation')
    ]
    assert len(rows) > 45 and all(re.search(r'\| (`test_\w+`(, )?)+ \|$', r) for r in rows)
