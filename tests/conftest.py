"What several test files share: the folder of the checkout, a site built from it, a browser."

import functools, http.server, os, shutil, subprocess, sys, threading
from pathlib import Path
import pytest

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('MPLBACKEND', 'Agg')
os.environ.setdefault('SEMIDETR_ANNOTATIONS', 'off')  # data of tests do not fill the cache of the user
ROOT = Path(__file__).resolve().parents[1]
PARTS = [
    'nbs',
    'semidetr',
    'settings.ini',
    'setup.py',
    'pyproject.toml',
    '_quarto.yml',
    'index.qmd',
    'README.md',
    'LICENSE',
]
CHROMIUM = next(
    filter(
        None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable'))
    ),
    None,
)


def copy_book(dest):
    "The files that the book is made from, in a folder that a test may change"
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(
                ROOT / part, dest / part, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints')
            )
        elif (ROOT / part).exists():
            shutil.copy2(ROOT / part, dest / part)
    return dest


@pytest.fixture(scope='session')
def root():
    return ROOT


@pytest.fixture(scope='session')
def site(tmp_path_factory):
    "The site, built as `make site` does, but in a copy"
    book = copy_book(tmp_path_factory.mktemp('book'))
    done = subprocess.run(
        [sys.executable, '-m', 'semidetr.book.site'], cwd=book, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return book / '_docs'


@pytest.fixture(scope='session')
def address(site):
    "A local server for the site"

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()


@pytest.fixture(scope='session')
def browser():
    if not CHROMIUM:
        pytest.skip(
            'no Chromium on the PATH: install it '
            '(Debian and Ubuntu: apt-get install chromium fonts-dejavu-core)'
        )
    playwright = pytest.importorskip('playwright.sync_api', reason='pip install playwright')
    flags = (
        '--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking '
        '--disable-component-update --disable-sync'
    )
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=flags.split())
        yield chromium
        chromium.close()
