# %% [markdown]
# # Reference pages made from the source {#sec-describe}
#
# > Write the pages of names, settings and commands from the source each time the site is built.
#
# *Why.* A reference that is written by hand is complete on the day it is written. Here the source is the
# reference: docstrings and comments of parameters (@sec-docs), fields of the settings classes, options of the
# commands. A notebook of the site holds a marker, `<!-- generated: names -->`, and the page filter (@sec-pages)
# puts the text in its place, for both renderers. The package is read and not run, so a build stays quick; only
# the commands are imported, which takes a tenth of a second.

# %%
#| default_exp book.describe

# %%
#| export
import ast
import functools
import json
import re
from importlib.util import find_spec
from pathlib import Path
from semidetr.docs import Described, module_names

# %%
import matplotlib.pyplot as plt


# %% [markdown]
# ## Texts from comments
#
# Comments and docstrings are plain text with `code` in backticks and references such as `@sec-docs`. Whatever
# else Markdown would read as a mark is escaped.

# %%
#| export
def plain(
    text: str,  # a comment or docstring
    in_table: bool = False,  # is a pipe the end of a cell?
) -> str:  # Markdown
    "Plain text as Markdown; `code` and references stay"
    parts = re.split(r'(`[^`]*`)', ' '.join(text.split()))
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r'([*$\\])', r'\\\1', parts[i].replace('<', '&lt;'))
    out = ''.join(parts)
    return out.replace('|', r'\|') if in_table else out


# %%
assert plain('2 * x < `a*b`, a|b', True) == r'2 \* x &lt; `a*b`, a\|b'
plain('rate of `lr`, in [0, 1] (@sec-docs)')

# %% [markdown]
# ## Names
#
# Public is what `from semidetr import ...` offers. For each name: signature, what it does, parameters, result,
# errors, methods, and an example: the first statement in its chapter that calls it.

# %%
#| export
LAYERS = {  # folder -> title of the section
    '': 'Errors, boxes, pictures',
    'data': 'Data',
    'detectors': 'Detectors',
    'matching': 'Matching and losses',
    'train': 'Training and use',
}


def package_folder() -> Path:
    "Where the modules are"
    return Path(find_spec('semidetr').submodule_search_locations[0]).resolve()


def public_modules(
    folder: Path,  # of the package
) -> dict:  # public name -> module without the name of the package
    "The table in `semidetr/__init__.py`"
    for node in ast.parse((folder / '__init__.py').read_text(encoding='utf-8')).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == '_PUBLIC':
            table = ast.literal_eval(node.value)
            return {name: module for module, names in table.items() for name in names.split()}
    return {}


def chapter_of(
    module: str,  # 'train.api'
    nbs: Path,  # folder of the notebooks
) -> Path | None:  # None if there is none
    "The notebook that a module comes from"
    layer, _, name = module.rpartition('.')
    return next(iter(sorted((nbs / layer).glob(f'[0-9]*_{name}.ipynb'))), None)


def _calls(node, name):
    return any(
        isinstance(n, ast.Call) and getattr(n.func, 'attr', getattr(n.func, 'id', '')) == name
        for n in ast.walk(node)
    )


_DATA = "ds = semidetr.open_dataset('digits:n=6,size=64')\n"
_CAUGHT = "try:\n    semidetr.open_dataset('no/such/folder')\nexcept semidetr.{} as e:\n    print(e)"
EXAMPLES = {  # of names that no chapter calls by themselves
    'SemiDETRError': _CAUGHT.format('SemiDETRError'),
    'DataError': _CAUGHT.format('DataError'),
    'DetectionDataset': _DATA + "ds.annotation(0)['labels']",
    'Unlabelled': _DATA + 'semidetr.Unlabelled(ds)[0].boxes  # none',
    'Subset': _DATA + 'semidetr.Subset(ds, [0, 2]).ids',
    'Split': _DATA + 'semidetr.make_split(ds, count=2, dev=1).labelled',
    'eval_view': _DATA + 'semidetr.eval_view(ds[0], semidetr.ViewConfig()).size',
    'EvalLoader': _DATA
    + 'batch = next(iter(semidetr.EvalLoader(ds, semidetr.ViewConfig(eval_short=64), 2)))',
    'Detector': "model = semidetr.build_detector(semidetr.DetectorConfig(num_classes=3))  # a Detector",
    'load_config': "cfg = semidetr.load_config('mine.toml', semidetr.preset('small'))",
    'with_detector': "cfg = semidetr.with_detector(semidetr.preset('small'), 'detr')",
    'Plan': "semidetr.plan_run(data='digits', count=20).notes",
    'Logger': 'class Shown(semidetr.Logger):\n    def write(self, numbers, step):\n        print(numbers)',
}
_RANK = {ast.With: 1, ast.For: 1, ast.Assert: 2, ast.Try: 3}  # plain statements are the best examples


def example_of(
    name: str,  # of a function or class
    notebook: Path | None,  # its chapter
    most: int = 12,  # lines
) -> str:  # code; '' if there is none
    "The plainest statement outside the exported cells that calls a name, the first of several"
    cells, found = json.loads(notebook.read_text(encoding='utf-8'))['cells'] if notebook else [], []
    for c in cells:
        source = ''.join(c['source'])
        if c['cell_type'] != 'code' or re.search(r'^#\| *(export|hide|default_exp)', source, re.M):
            continue
        for node in ast.parse(source).body:
            text = ast.get_source_segment(source, node) or ''
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) and _calls(node, name):
                found += [(_RANK.get(type(node), 0), text)] if text.count('\n') < most else []
    return min(found, key=lambda pair: pair[0], default=(0, ''))[1]


# %%
names = public_modules(package_folder())
assert names['Predictor'] == 'train.predict'
example_of('box_iou', chapter_of('boxes', package_folder().parent / 'nbs'))


# %%
#| export
def _signature(d, width=100):
    "The signature, one parameter per line where it is long"
    if len(d.signature) <= width:
        return d.signature
    inside = d.signature[len(d.name) + 1 : -1]
    parts, depth, start = [], 0, 0
    for i, c in enumerate(inside):
        depth += (c in '([{') - (c in ')]}')
        if c == ',' and depth == 0:
            parts.append(inside[start:i].strip())
            start = i + 1
    parts.append(inside[start:].strip())
    return '\n'.join([f'{d.name}(', *(f'    {p},' for p in parts), ')'])


def _parameter(p):
    what = f' ({plain(p.kind)})' if p.kind else ''
    default = f', default `{p.default}`' if p.default else ''
    return f'- `{p.name}`{what}{default}{": " + plain(p.about) if p.about else ""}'


def name_lines(
    d: Described,
    module: str,  # 'train.api'
    example: str = '',  # code
    level: int = 3,  # of the heading
) -> list:  # paragraphs of Markdown
    "The entry of one name"
    out = [f"{'#' * level} {d.name} {{#ref-{d.name.lower()} .unnumbered}}"]
    out.append(f'```python\n{_signature(d)}\n```')
    out += [plain(part) for part in d.doc.split('\n\n')]
    if d.described:
        out.append('\n'.join(map(_parameter, d.described)))
    if d.returns:
        out.append(f'Returns {plain(d.returns)}.')
    if d.raises:
        out.append(f"Raises {', '.join(f'`{r}`' for r in d.raises)}.")
    listed = []
    for m in d.methods:
        call = m.signature.partition('.')[2].replace('__call__', d.name.lower())
        returns = f'; returns {plain(m.returns)}' if m.returns else ''
        listed.append(f"- `{call}`: {plain(m.doc.partition(chr(10))[0])}{returns}")
    if listed:
        out.append('\n'.join(listed))
    if example:
        out.append(f'```python\n{example}\n```')
    return [*out, f'Source and tests of the idea: `semidetr.{module}.{d.name}`.']


# %%
toy_entry = name_lines(module_names('semidetr.boxes')['box_iou'], 'boxes')
assert toy_entry[0] == '### box_iou {#ref-box_iou .unnumbered}' and toy_entry[1].startswith(
    '```python\nbox_iou('
)
print('\n\n'.join(toy_entry))


# %%
#| export
def names_page() -> list:  # paragraphs of Markdown
    "Every public name"
    folder = package_folder()
    modules, out = public_modules(folder), []
    for layer, title in LAYERS.items():
        out.append(f'## {title}')
        for name, module in modules.items():
            d = module_names(f'semidetr.{module}').get(name)
            if module.rpartition('.')[0] != layer or d is None:
                continue
            example = EXAMPLES.get(name) or example_of(name, chapter_of(module, folder.parent / 'nbs'))
            out += name_lines(d, module, example)
        if layer == 'train':
            d = module_names('semidetr.train.api')['train']
            example = example_of('train', chapter_of('train.api', folder.parent / 'nbs'))
            out += name_lines(d, 'train.api', example)
    return out


# %%
all_names = names_page()
headed = [p.split()[1] for p in all_names if p.startswith('### ')]
assert set(headed) == {*public_modules(package_folder()), 'train'}
len(headed)


# %% [markdown]
# ## Settings
#
# A field of `Config` is a group, and a group may hold groups. The class of a field is looked up where the
# module of the class around it imports it from.

# %%
#| export
@functools.cache
def _imported(module):
    "{name: module it is imported from} of one module of the package"
    path = package_folder() / f"{module.replace('.', '/')}.py"
    found = {}
    for node in ast.parse(path.read_text(encoding='utf-8')).body:
        if isinstance(node, ast.ImportFrom):
            parents = module.split('.')[: -node.level] if node.level else []
            base = '.'.join([*parents, *filter(None, [node.module])]).removeprefix('semidetr.')
            found |= {a.asname or a.name: base for a in node.names}
    return found


def settings_of(
    name: str = 'Config',  # a settings class
    module: str = 'train.config',  # where it is defined
    where: str = '',  # prefix of the names
) -> list:  # of (dotted name, default, meaning, module, class)
    "All settings of a class, those of its groups too"
    known, rows = module_names(f'semidetr.{module}'), []
    for p in known[name].parameters:
        kind = p.kind.strip("'")
        home = module if kind in known else _imported(module).get(kind, '')
        group = module_names(f'semidetr.{home}').get(kind) if home else None
        if group is not None and group.kind == 'class' and kind.endswith('Config'):
            rows += settings_of(kind, home, f'{where}{p.name}.')
        else:
            rows.append((f'{where}{p.name}', p.default, p.about, module, name))
    return rows


def settings_page() -> list:  # paragraphs of Markdown
    "Every setting of `Config`: name, default, meaning and where it is read"
    out, last = [], None
    for name, default, about, module, kind in settings_of():
        group = name.rpartition('.')[0]
        if group != last:
            out += [
                f'## {group} {{#ref-set-{group.replace(".", "-")} .unnumbered}}',
                f'Defined in `semidetr.{module}.{kind}`.',
            ]
            out.append('| setting | default | meaning |\n| :--- | :--- | :--- |')
            last = group
        out[-1] += f'\n| `{name}` | `{default}` | {plain(about, in_table=True)} |'
    return out


# %%
rows = settings_of()
values = {name: default for name, default, *_ in rows}
assert values['optim.lr'] == '0.0001' and 'detector.transformer.d_model' in values
assert len({name for name, *_ in rows}) == len(rows)
without = [name for name, _, about, *_ in rows if not about]
len(rows), without[:8]


# %% [markdown]
# ## Commands

# %%
#| export
def commands_page() -> list:  # paragraphs of Markdown
    "Every command: what it does, arguments and options"
    import typer
    from semidetr.cli import commands  # noqa: F401 (importing registers them)
    from semidetr.cli.terminal import app

    out = []
    for name, command in typer.main.get_command(app).commands.items():
        if not command.callback.__module__.startswith('semidetr.cli'):
            continue
        out.append(f'## semidetr {name} {{#ref-cmd-{name} .unnumbered}}')
        for part in (command.help or '').split('\n\n'):
            text = ' '.join(part.split())
            example = text.removeprefix('Example: ')
            out.append(f'```bash\n{example}\n```' if example != text else plain(text))
        rows = []
        for p in command.params:
            flags = (
                ', '.join([*p.opts, *p.secondary_opts]) if p.param_type_name == 'option' else p.name.upper()
            )
            default = (
                '' if p.default in (None, '', False) or callable(p.default) else f', default `{p.default}`'
            )
            rows.append(f'- `{flags}`{default}: {plain(getattr(p, "help", None) or "")}')
        out.append('\n'.join(rows))
    return out


# %%
pages_of_commands = commands_page()
assert any(p.startswith('## semidetr train') for p in pages_of_commands)
len([p for p in pages_of_commands if p.startswith('## ')])

# %% [markdown]
# ## In the place of a marker

# %%
#| export
GENERATED = dict(names=names_page, settings=settings_page, commands=commands_page)
MARKER = re.compile(r'^<!-- generated: (\w+) -->$', re.M)


def fill_markers(
    nb: dict,  # a notebook as JSON
) -> dict:  # the same, the text of each marker in its place
    "Put generated pages where a notebook has their markers"
    cells = []
    for c in nb['cells']:
        found = MARKER.search(''.join(c['source'])) if c['cell_type'] == 'markdown' else None
        if found is None:
            cells.append(c)
            continue
        text = '\n\n'.join(GENERATED[found.group(1)]())
        for i, part in enumerate(re.split(r'\n\n(?=## )', text)):
            cells.append(dict(cell_type='markdown', metadata={}, source=part, id=f'{found.group(1)}{i:03d}'))
    return nb if len(cells) == len(nb['cells']) else {**nb, 'cells': cells}


# %%
toy_nb = dict(cells=[dict(cell_type='markdown', metadata={}, source=['<!-- generated: commands -->'])])
filled = fill_markers(toy_nb)['cells']
assert filled[0]['source'].startswith('## semidetr doctor') and fill_markers(dict(cells=[])) == dict(cells=[])
len(filled)

# %%
#| label: fig-describe-settings
#| fig-cap: "Settings per group, as the page of settings lists them."
#| fig-alt: "Horizontal bars, one for each group of settings"
groups = {}
for name, *_ in rows:
    groups[name.partition('.')[0]] = groups.get(name.partition('.')[0], 0) + 1
fig, ax = plt.subplots(figsize=(5, 3), dpi=80)
ax.barh(list(groups), list(groups.values()), color='#1f77b4')
ax.invert_yaxis()
ax.set(xlabel='settings')
plt.show()

# %% [markdown]
# ## Summary
#
# - Three pages of the site are made from the source when it is built: names, settings, commands.
# - `help(semidetr.predict)` shows what the page of names shows, because both read the same comments.
# - A public name, or a setting, without a description fails a test.
#
# ## Exercises
#
# 1. Why is the example of a name taken from its chapter and not written into its docstring?
# 2. What would the page of settings show if a group were made by a function?
