"""Run a study of nbs/ablations/studies.toml and keep one record a seed.

    python benchmarks/study.py components --seeds 0 1 2
"""
import argparse
from pathlib import Path
from semidetr.study import run_study

if __name__ == '__main__':
    book = Path(__file__).parent.parent/'nbs'/'ablations'
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument('name', help='of the study')
    ask.add_argument('--seeds', type=int, nargs='+', default=[0])
    ask.add_argument('--workers', type=int, default=1, help='runs at a time, one thread each')
    ask.add_argument('--out', type=Path, default=Path('runs/studies'))
    ask.add_argument('--results', type=Path, default=book/'results')
    args = ask.parse_args()
    for r in run_study(book/'studies.toml', args.name, args.out, args.results, args.seeds, args.workers):
        print(r['seed'], {name: round(a['metrics']['val']['teacher']['AP'], 1) for name, a in r['arms'].items()})
