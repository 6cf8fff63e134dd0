"Guides and README are correct: commands, options, settings, defaults, `make` targets, keys of the log."

import contextlib, importlib, io, json, re, shlex
from dataclasses import fields, is_dataclass
from pathlib import Path
import pytest
import typer
from conftest import ROOT
from semidetr.train.config import PRESETS, Config, override, preset
from semidetr.semi.methods import METHODS
from semidetr.book.pages import chapter_files, read_book

GUIDES = sorted((ROOT / 'nbs' / 'guides').glob('*.qmd'))
TEXTS = {
    f.relative_to(ROOT).as_posix(): f.read_text(encoding='utf-8')
    for f in [*GUIDES, ROOT / 'index.qmd', ROOT / 'README.md']
}
text_of = pytest.mark.parametrize('name', TEXTS)
importlib.import_module('semidetr.cli.commands')  # registers the commands
APP = typer.main.get_command(importlib.import_module('semidetr.cli.terminal').app)


def shell_lines(text):
    "Commands in the ```bash blocks, continued lines joined, comments removed"
    for block in re.findall(r'^```bash\n(.*?)^```', text, re.S | re.M):
        for line in block.replace('\\\n', ' ').splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def inline_code(text):
    return re.findall(r'(?<!`)`([^`\n]+)`(?!`)', re.sub(r'^```.*?^```', '', text, flags=re.S | re.M))


def commands(text):
    "Arguments of every `semidetr ...` in blocks and in running text, torchrun's included"
    for words in [
        *shell_lines(text),
        *(shlex.split(c) for c in inline_code(text) if c.startswith('semidetr ')),
    ]:
        while words and re.fullmatch(r'[A-Z_]+=\S*', words[0]):
            words = words[1:]
        if words and words[0] == 'torchrun' and 'semidetr.cli' in words:
            yield words[words.index('semidetr.cli') + 1 :]
        elif words and words[0] == 'semidetr':
            yield words[1:]


def parse(args):  # what click says about a command line, without running it: its parameters, or an exception
    name, rest = args[0], args[1:]
    if name == '--version':
        return {}
    command = APP.commands[name]
    with contextlib.redirect_stdout(io.StringIO()):
        return command.make_context(name, list(rest), resilient_parsing=not rest).params


def leaves(cfg, where=''):  # every `group.field` of a configuration, with its value
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        if is_dataclass(value):
            yield from leaves(value, f'{where}{f.name}.')
        else:
            yield where + f.name, value


SETTINGS = dict(leaves(Config()))
GROUPS = {f.name for f in fields(Config())}


def settings_in(text):  # `group.field`, with or without a value, in code that is no file name
    for c in inline_code(text):
        for word in c.split():
            if (
                (m := re.match(r'([a-z0-9_]+(?:\.[a-zA-Z0-9_]+)+)(?==|$)', word))
                and m[1].split('.')[0] in GROUPS
                and not m[1].endswith(('.json', '.yaml'))
            ):
                yield m[1]


def rows(text, label):  # cells of the table with that label
    table = text[: text.index('{#' + label)].rstrip().rsplit('\n\n', 2)[-2]
    return [[c.strip() for c in line.strip('|').split('|')] for line in table.splitlines()[2:]]


@text_of
def test_commands(name):
    "Every subcommand, option and setting on a command line exists and has a value of the right type"
    for args in commands(TEXTS[name]):
        try:
            found = parse(args)
        except Exception as e:
            why = e.format_message() if hasattr(e, 'format_message') else repr(e)
            pytest.fail(f"{name}: semidetr {' '.join(args)}: {why}")
        if args[0] == 'train':
            cfg = override(preset(found['preset'] or 'small'), found['settings'] or [])
            assert not found['method'] or found['method'] in METHODS
            assert cfg.method.T1 <= cfg.optim.iters


def test_there_are_commands():
    assert sum(len(list(commands(t))) for t in TEXTS.values()) > 30


@text_of
def test_settings(name):
    "`group.field` in running text is a setting"
    assert [
        s
        for s in settings_in(TEXTS[name])
        if s not in SETTINGS and not any(k.startswith(s + '.') for k in SETTINGS)
    ] == []


@text_of
def test_values(name):
    "`group.field=value` in running text is accepted"
    for c in inline_code(TEXTS[name]):
        if items := [w for w in c.split() if re.match(r'[a-z]+\.[\w.]+=\S', w) and w.split('.')[0] in GROUPS]:
            override(Config(), items)


@text_of
def test_make_targets(name):
    "`make x` is a target of the Makefile or of what it includes"
    rules = ''.join(f.read_text() for f in (ROOT / 'Makefile', ROOT / 'semidetr' / 'csrc' / 'ops.mk'))
    known = set(re.findall(r'^([a-z][\w-]*):', rules, re.M))
    targets = [w for words in shell_lines(TEXTS[name]) if words[0] == 'make' for w in words[1:]]
    targets += [w for c in inline_code(TEXTS[name]) if re.match(r'make \w', c) for w in c.split()[1:]]
    assert [w for w in targets if '=' not in w and w not in known] == []


def test_studies_and_groups():
    "Names after `semidetr ablate` are studies, groups are theirs"
    import tomllib

    studies = tomllib.loads((ROOT / 'nbs' / 'ablations' / 'studies.toml').read_text())
    count = 0
    for text in TEXTS.values():
        for args in commands(text):
            if args[0] != 'ablate' or len(args) == 1 or args[1].isupper():
                continue
            found = parse(args)
            count += 1
            for s in found['study']:
                assert s == 'all' or s in studies, s
                groups = {g for axis in studies.get(s, {}).get('groups', {}).values() for g in axis}
                assert set(filter(None, found['groups'].split(','))) <= groups
    assert count >= 4


def test_switches_have_the_defaults_they_say():
    for setting, default, *_ in rows(TEXTS['nbs/guides/from_the_paper.qmd'], 'tbl-paper-switches'):
        assert str(SETTINGS[setting.strip('`')]) == default.strip('`'), setting


def test_presets_are_as_the_table_says():
    table = rows(TEXTS['nbs/guides/one_gpu.qmd'], 'tbl-guide-presets')
    assert {r[0].strip('`') for r in table} == {
        n for n in PRESETS if preset(n).detector.transformer.num_queries == 900
    }
    for name, batch, iters, T1, weight in table:
        c = preset(name.strip('`'))
        assert (
            f'{c.loader.n_labelled}, {c.loader.n_unlabelled}',
            c.optim.iters,
            c.method.T1,
            c.method.unsup_weight,
        ) == (batch, int(iters), int(T1), float(weight))


def test_keys_of_the_log():
    "Each key in the table is written by some module"
    code = ''.join(f.read_text() for f in (ROOT / 'semidetr').rglob('*.py'))
    keys = [
        k.strip('` ')
        for r in rows(TEXTS['nbs/guides/own_data.qmd'], 'tbl-guide-log')
        for k in r[0].split(',')
    ]
    assert len(keys) > 10
    made = {f'loss_{k}' for k in ('cls', 'l1', 'giou')} | {f'pseudo_{k}' for k in ('precision', 'recall')}
    assert [k for k in keys if k not in made and not re.search(rf"\b{k}(=|'|\")", code)] == []


def test_measured_minutes():
    "The one duration that is named comes from a committed run"
    r = json.loads((ROOT / 'nbs' / 'ablations' / 'results' / 'txl_pbc' / 'supervised_5.json').read_text())
    text = TEXTS['nbs/guides/own_data.qmd']
    iterations, minutes = re.search(
        r'(\d+) iterations with eight images each took (\d+) minutes', text
    ).groups()
    assert (r['iterations'], round(r['seconds'] / 60), r['config']['loader']['n_labelled']) == (
        int(iterations),
        int(minutes),
        8,
    )
    assert r['threads'] == 1 and 1000 < r['peak_memory_mb'] < 1300


def test_every_page_is_in_the_book():
    listed = [f for f in chapter_files(read_book(ROOT)) if f.startswith('nbs/guides/') and f.endswith('.qmd')]
    assert sorted(listed) == [f.relative_to(ROOT).as_posix() for f in GUIDES]


@pytest.mark.parametrize('path', GUIDES, ids=lambda f: f.stem)
def test_opening(path):
    "Title with a label, then what the reader can do afterwards, as in every chapter"
    first, second = [line for line in path.read_text().splitlines() if line.strip()][:2]
    assert re.fullmatch(r'# \S.* \{#sec-[\w-]+\}', first) and second.startswith('> ')
    assert re.search(r'@sec-', path.read_text()), 'a guide leads into the chapters'


def test_glossary_is_sorted():
    words = re.findall(r'^\*\*(.+?)\.\*\*', TEXTS['nbs/guides/glossary.qmd'], re.M)
    assert len(words) > 30 and words == sorted(
        words, key=lambda w: re.sub(r'[^a-z ]', '', w.lower().replace('-', ' '))
    )
    for entry in re.findall(r'^\*\*.+$', TEXTS['nbs/guides/glossary.qmd'], re.M):
        assert '@sec-' in entry, entry


def test_files_named_in_code_exist():
    "Links of the README to files of the checkout"
    for target in re.findall(r'\]\((?!http)([^)#]+)\)', TEXTS['README.md']):
        assert (ROOT / Path(target)).exists(), target
