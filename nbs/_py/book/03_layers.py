# %% [markdown]
# # The layers of the package {#sec-layers}
#
# > See which part of the package may import which, and find the imports that break the rule.
#
# If every module may import every other, after a year each does, and none can be read, tested or replaced
# alone. Here the modules are ordered in layers that follow the data. A module imports only from the layers
# before its own, and within its layer only from earlier chapters. So the book can be read from front to back,
# and the package can be taken apart from the end: the trainer does not depend on studies, the detectors do
# not depend on teachers, and the pages can be left out of the wheel.
#
# Imports may hide inside functions, behind `import_module`, or in a public name from the top of the package.
# The check below reads the syntax tree and finds these, too.

# %%
#| default_exp book.layers

# %%
#| export
import ast
from pathlib import Path

# %%
import tempfile
import matplotlib.pyplot as plt
import numpy as np

# %% [markdown]
# ## The order

# %%
#| export
LAYERS = {  # folder of the package and of the book -> what it holds
    'data': 'files, data sets, splits, views, batches',
    'detectors': 'attention, backbones, encoder and decoder',
    'matching': 'costs, assignments, losses',
    'semi': 'teacher, mining, consistency, methods',
    'train': 'settings, checkpoints, metrics, the training loop',
    'lab': 'studies and their records',
    'cli': 'the commands',
    'book': 'pages and site; not in the wheel',
}


def layer_of(
    module: str,  # 'core' or 'data.files'
) -> int:  # position; the ground floor is 0
    "The layer of a module"
    head, dot, _ = module.partition('.')
    return 1 + list(LAYERS).index(head) if dot else 0


# %% [markdown]
# ## Who imports whom
#
# `imported_modules` resolves relative imports, imports inside functions, `import_module` of a literal, and
# public names (`from semidetr import Trainer` is an import of the trainer).

# %%
#| export
def _targets(node, package, public):
    "Dotted modules that one node of the syntax tree imports, without the name of the package"
    names = []
    if isinstance(node, ast.Call):
        if getattr(node.func, 'attr', getattr(node.func, 'id', '')) == 'import_module':
            names = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    elif isinstance(node, ast.Import):
        names = [a.name for a in node.names]
    elif isinstance(node, ast.ImportFrom):
        above = package[: len(package) - node.level + 1] if node.level else []
        base = '.'.join([*above, *filter(None, [node.module])])
        if base == 'semidetr':
            return [public.get(a.name, a.name) for a in node.names]
        names = [base, *(f'{base}.{a.name}' for a in node.names)]
    return [n.removeprefix('semidetr.') for n in names if n.startswith('semidetr.')]


def imported_modules(
    path,  # a module of the package
    root,  # folder of the package
    public,  # public name -> module, as in `semidetr/__init__.py`
) -> set[str]:  # 'core', 'data.files'; names that are no modules may be among them
    "What a module imports from its own package, wherever in its text"
    package = ['semidetr', *Path(path).relative_to(root).with_suffix('').parts[:-1]]
    tree = ast.parse(Path(path).read_text(encoding='utf-8'))
    return {t for node in ast.walk(tree) for t in _targets(node, package, public)}


def _public_names(root):
    "Public name -> module, read from the table in `semidetr/__init__.py`"
    tree = ast.parse((Path(root) / '__init__.py').read_text(encoding='utf-8'))
    names = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == '_PUBLIC':
            for module, exported in ast.literal_eval(node.value).items():
                names |= dict.fromkeys(exported.split(), module)
    return names


def import_graph(
    root,  # folder of the package
    order=(),  # modules in reading order; others come last
) -> dict[str, set[str]]:  # module -> modules of this package that it imports
    "Which module imports which, from the files of the package"
    root, public = Path(root), _public_names(root)
    files = {}
    for f in root.rglob('*.py'):
        if not f.stem.startswith('_'):
            files['.'.join(f.relative_to(root).with_suffix('').parts)] = f
    place = {m: i for i, m in enumerate(order)}
    names = sorted(files, key=lambda m: (place.get(m, len(place)), m))
    return {m: imported_modules(files[m], root, public) & set(names) - {m} for m in names}


# %% [markdown]
# A package of three modules, one of which hides an import in a function:

# %%
toy_package = Path(tempfile.mkdtemp()) / 'semidetr'
toy_texts = {
    '__init__': "_PUBLIC = {'train.trainer': 'Trainer'}",
    'core': '',
    'data/files': 'def read():\n    from semidetr import Trainer',
    'train/trainer': 'from ..core import x',
}
for name, text in toy_texts.items():
    file = toy_package / f'{name}.py'
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
toy_graph = import_graph(toy_package)
assert toy_graph == {'core': set(), 'data.files': {'train.trainer'}, 'train.trainer': {'core'}}
toy_graph


# %% [markdown]
# ## Arrows that point up
#
# Let $\ell(m)$ be the layer of a module and $k(m)$ its place in the reading order. An import of $b$ by $a$ is
# allowed if
#
# $$
# \ell(b) < \ell(a) \quad\text{or}\quad \ell(b) = \ell(a) \text{ and } k(b) < k(a) .
# $$ {#eq-layers-order}

# %%
#| export
def upward_imports(
    graph: dict,  # of `import_graph`
) -> list:  # of pairs (module, what it must not import)
    "Imports that break @eq-layers-order"
    place = {m: (layer_of(m), i) for i, m in enumerate(graph)}
    return [(a, b) for a in graph for b in sorted(graph[a]) if place[b] >= place[a]]


# %%
assert upward_imports(toy_graph) == [('data.files', 'train.trainer')]
upward_imports(toy_graph)


# %% [markdown]
# The package itself. The reading order comes from the folders of the book:

# %%
#| export
def reading_order(
    nbs,  # folder of the notebooks
) -> list[str]:  # modules
    "Modules in the order of layers and chapter numbers"
    modules = []
    for layer in ('', *LAYERS):
        chapters = sorted((Path(nbs) / layer).glob('[0-9]*.ipynb'))
        modules += [f"{layer}.{f.stem.split('_', 1)[1]}".lstrip('.') for f in chapters]
    return modules


# %%
graph = import_graph('../../semidetr', reading_order('..'))
assert upward_imports(graph) == []
counts = {layer: sum(m.startswith(f'{layer}.') for m in graph) for layer in LAYERS}
counts

# %%
#| label: fig-layers-order
#| fig-cap: "Imports between the modules in reading order; lines separate the layers, which are named. No import lies on or above the diagonal: every chapter imports only chapters before it."
#| fig-alt: "A square grid with one row and one column for each module. Filled squares, which mark an import, lie only below the diagonal."
names = list(graph)
matrix = np.array([[b in graph[a] for b in names] for a in names], dtype=float)
fig, ax = plt.subplots(figsize=(6, 5.4), dpi=80)
ax.imshow(matrix, cmap='Blues', vmin=0, vmax=1.3)
ax.plot([-0.5, len(names) - 0.5], [-0.5, len(names) - 0.5], color='.6', lw=0.8)
starts = [i for i in range(1, len(names)) if layer_of(names[i]) != layer_of(names[i - 1])]
for i in starts:
    ax.axhline(i - 0.5, color='.8', lw=0.6)
    ax.axvline(i - 0.5, color='.8', lw=0.6)
ends = [*starts, len(names)]
middles = [(begin + end - 1) / 2 for begin, end in zip([0, *starts], ends)]
layers = [('ground floor', *LAYERS)[layer_of(names[end - 1])] for end in ends]
ax.set_xticks(middles, layers, rotation=90)
ax.set_yticks(middles, layers)
ax.set_xlabel('is imported')
ax.set_ylabel('imports')
plt.tight_layout()
plt.show()

# %% [markdown]
# ## Summary
#
# * Layers follow the data; `LAYERS` is their order, and the folders of the package and of the book have the
#   same names.
# * `import_graph` reads syntax trees, so an import inside a function counts like one at the top.
# * `upward_imports` lists the imports that break @eq-layers-order; a test keeps the list empty.
#
# ## Exercises
#
# 1. Two modules of one layer need each other. Name two ways to break the cycle. Which of them is
#    `data.catalog`?
# 2. Which layers could be packaged on their own, and what would the others have to change?
