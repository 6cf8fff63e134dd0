# %% [markdown]
# # What a name is for {#sec-docs}
#
# > Read signature, parameters, result and errors of a name from its source, for `help` and the site.
#
# *Why.* The parameters of this package are described where they are declared, in a comment behind each; a
# second list in the docstring would be wrong after the next change. But `help(name)` shows docstrings only. So
# a public name gets the full text when it is first used: its docstring, then what the comments say, read from
# the source. The reference pages of the site are made by the same functions, without importing anything.

# %%
#| default_exp docs

# %%
#| export
import ast
import functools
import importlib.util
import io
import re
import tokenize
from dataclasses import dataclass, replace
from pathlib import Path

# %%
import tempfile
import matplotlib.pyplot as plt


# %% [markdown]
# ## What the source says
#
# A parameter is described by the comment in its line, or by comment lines directly above it; the comment
# behind the colon describes the result.

# %%
#| export
@dataclass(frozen=True)
class Parameter:
    "A parameter of a function, or a field of a dataclass"

    name: str
    kind: str = ''  # its annotation; '' if it has none
    default: str = ''  # as written; '' if it has none
    about: str = ''  # its comment


@dataclass(frozen=True)
class Described:
    "A function, class or constant of a module, as its source describes it"

    name: str  # 'train', 'Run' or 'Run.predictor'
    kind: str  # 'function', 'class', 'method', 'property' or 'value'
    doc: str = ''  # docstring, or the comment of a constant
    parameters: tuple = ()  # of `Parameter`: of a function or of `__init__`, fields of a dataclass
    returns: str = ''  # annotation and comment of the result
    raises: tuple = ()  # names of exceptions that its own lines raise
    bases: tuple = ()  # names of base classes
    methods: tuple = ()  # of `Described`: public methods of a class

    @property
    def described(self) -> list:
        "Its parameters, without the star before those that are given by name"
        return [p for p in self.parameters if p.name != '*']

    @property
    def signature(self) -> str:
        "Name and parameters as in the source: `half(n: int, how: str = 'down')`"
        parts = []
        for p in self.parameters:
            kind = f': {p.kind}' if p.kind else ''
            equals = ' = ' if p.kind else '='
            parts.append(f'{p.name}{kind}{equals}{p.default}' if p.default else f'{p.name}{kind}')
        return self.name if self.kind in ('value', 'property') else f"{self.name}({', '.join(parts)})"


# %%
#| export
def _comments(lines, node):
    "Of a statement and the comment lines above it: {row: comment}, and the rows that hold nothing else"
    first = min([node.lineno, *(d.lineno for d in getattr(node, 'decorator_list', ()))])
    while first > 1 and lines[first - 2].startswith('#'):
        first -= 1
    text = '\n'.join([*lines[first - 1 : node.end_lineno], ''])
    found, alone = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row = token.start[0] + first - 1
            found[row] = token.string.removeprefix('#').strip()
            if not token.line[: token.start[1]].strip():
                alone.add(row)
    return found, alone


def _about(rows, first, last):
    "The comment in these rows, or in the rows directly above"
    found, alone = rows
    if inside := [found[r] for r in range(first, last + 1) if r in found and r not in alone]:
        return ' '.join(inside)
    above, row = [], first - 1
    while row in alone:
        above.insert(0, found[row])
        row -= 1
    return ' '.join(above)


# %%
#| export
def _parameters(node, rows):
    "Parameters of a function, without self and cls"
    a = node.args
    listed = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(listed) - len(a.defaults)) + a.defaults
    listed = [('', arg, d) for arg, d in zip(listed, defaults)]
    if a.vararg or a.kwonlyargs:
        listed.append(('*', a.vararg or ast.arg('', lineno=node.lineno), None))
    listed += [('', arg, d) for arg, d in zip(a.kwonlyargs, a.kw_defaults)]
    if a.kwarg:
        listed.append(('**', a.kwarg, None))
    out = []
    for stars, arg, default in listed:
        if arg.arg in ('self', 'cls') or arg.lineno == node.lineno:
            about = ''  # a signature in one line: its comment is about the result
        else:
            last = (default or arg).end_lineno
            about = _about(rows, arg.lineno, last)
        if arg.arg not in ('self', 'cls'):
            kind = ast.unparse(arg.annotation).strip("'") if arg.annotation else ''
            out.append(Parameter(f'{stars}{arg.arg}', kind, ast.unparse(default) if default else '', about))
    return tuple(out)


def _returns(node, rows):
    "Annotation and comment of the result"
    kind = ast.unparse(node.returns).strip("'") if node.returns else ''
    first = max([node.lineno, *(n.end_lineno for n in ast.walk(node.args) if hasattr(n, 'end_lineno'))])
    start = node.body[0].lineno
    one_line = all(arg.lineno == node.lineno for arg in node.args.args)
    for row in range(first if one_line else first + 1, start):
        if row in rows[0] and row not in rows[1]:
            return f'{kind}: {rows[0][row]}' if kind else rows[0][row]
    return kind


def _raises(node):
    "Names of the exceptions that the lines of a function raise"
    names = []
    for n in ast.walk(node):
        if isinstance(n, ast.Raise) and isinstance(n.exc, ast.Call) and isinstance(n.exc.func, ast.Name):
            names.append(n.exc.func.id)
    return tuple(dict.fromkeys(n for n in names if n[0].isupper()))


# %%
#| export
def _function(node, rows, name, kind):
    made = [d.id for d in node.decorator_list if isinstance(d, ast.Name)]
    kind = 'property' if 'property' in made else kind
    doc = ast.get_docstring(node) or ''
    return Described(name, kind, doc, _parameters(node, rows), _returns(node, rows), _raises(node))


def _class(node, rows):
    "A class with its public methods; fields of a dataclass, or parameters of `__init__`"
    fields, methods, start = [], [], None
    for n in node.body:
        if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name):
            default = ast.unparse(n.value) if n.value else ''
            about = _about(rows, n.lineno, n.end_lineno)
            fields.append(Parameter(n.target.id, ast.unparse(n.annotation), default, about))
        elif isinstance(n, ast.FunctionDef) and n.name == '__init__':
            start = _function(n, rows, node.name, 'method')
        elif isinstance(n, ast.FunctionDef) and (n.name == '__call__' or not n.name.startswith('_')):
            methods.append(_function(n, rows, f'{node.name}.{n.name}', 'method'))
    decorators = [ast.unparse(d) for d in node.decorator_list]
    is_data = any('dataclass' in d for d in decorators)
    parameters = tuple(fields) if is_data else start.parameters if start else ()
    bases = tuple(ast.unparse(b) for b in node.bases)
    doc, raises = ast.get_docstring(node) or '', start.raises if start else ()
    return Described(node.name, 'class', doc, parameters, '', raises, bases, tuple(methods))


# %%
#| export
_AS_FOR = re.compile(r'parameters as for `(\w+)`')


def _filled(d, other):
    "The same, with what another one says of parameters that are not described here"
    known = {p.name: p.about for p in other.parameters}
    filled = [replace(p, about=p.about or known.get(p.name, '')) for p in d.parameters]
    return replace(d, parameters=tuple(filled))


def _as_for(d, out):
    "A function whose docstring says that its parameters are those of another one"
    found = _AS_FOR.search(d.doc)
    return _filled(d, out[found.group(1)]) if found and found.group(1) in out else d


def _inherited(d, out):
    "A class with the parameters and public methods of its bases in the same module"
    for base in (out[b] for b in d.bases if b in out):
        own = {m.name.rpartition('.')[2] for m in d.methods}
        more = [m for m in base.methods if m.name.rpartition('.')[2] not in own]
        d = replace(d, parameters=d.parameters or base.parameters, methods=(*d.methods, *more))
        d = _filled(d, base)
    return d


def describe_source(
    source: str,  # text of a module
) -> dict:  # name -> Described, in the order of the source
    "Public functions, classes and constants of a module, from its text"
    lines, out = source.split('\n'), {}
    for node in ast.parse(source).body:
        name = getattr(node, 'name', getattr(getattr(node, 'targets', [None])[0], 'id', '_'))
        if name.startswith('_'):
            continue
        rows = _comments(lines, node)
        if isinstance(node, ast.FunctionDef):
            out[name] = _function(node, rows, name, 'function')
        elif isinstance(node, ast.ClassDef):
            out[name] = _class(node, rows)
        else:
            out[name] = Described(name, 'value', _about(rows, node.lineno, node.lineno))
    for k, d in out.items():
        out[k] = _as_for(_inherited(d, out), out)
    return out


# %%
toy_source = '''
@dataclass
class Box:
    "A box"
    width: float = 1.0  # in pixels
    # in pixels,
    # downwards
    height: float = 1.0
    def area(self) -> float:  # square pixels
        "Its area"
        return self.width * self.height

def half(
    n: int,  # an even number
    how='down',  # 'down' or 'up'
) -> int:  # the half
    "Half of a number"
    if n % 2: raise ValueError(n)
    return n // 2
'''
described = describe_source(toy_source)
assert [p.about for p in described['Box'].parameters] == ['in pixels', 'in pixels, downwards']
assert described['Box'].methods[0].returns == 'float: square pixels'
assert described['half'].raises == ('ValueError',) and described['half'].returns == 'int: the half'
described['half'].signature


# %% [markdown]
# ## One text for `help`

# %%
#| export
def _paragraph(title, rows):
    return [f'{title}:', *(f'    {row}' for row in rows)] if rows else []


def full_text(d: Described) -> str:
    "Docstring, then parameters, result and errors, each in a line"
    rows = []
    for p in d.described:
        head = f'{p.name}: {p.kind}' if p.kind else p.name
        head += f' = {p.default}' if p.default else ''
        rows.append(f'{head} - {p.about}' if p.about else head)
    parts = [d.doc.strip()] if d.doc else []
    for lines in (
        _paragraph('Parameters', rows),
        _paragraph('Returns', [d.returns] if d.returns else []),
        _paragraph('Raises', [', '.join(d.raises)] if d.raises else []),
    ):
        if lines:
            parts.append('\n'.join(lines))
    return '\n\n'.join(parts)


@functools.cache
def module_names(
    module: str,  # dotted name, e.g. 'semidetr.boxes'
) -> dict:  # name -> Described; {} if there is no source
    "What a module describes; nothing is imported"
    try:
        spec = importlib.util.find_spec(module)
        return describe_source(Path(spec.origin).read_text(encoding='utf-8'))
    except (ImportError, AttributeError, OSError, TypeError, SyntaxError, ValueError, tokenize.TokenError):
        return {}


# %%
assert 'Raises:\n    ValueError' in full_text(described['half'])
print(full_text(described['half']))


# %%
#| export
def document(
    value,  # function or class of this package
):  # the same
    "Put the full text where `help` looks for it; what has no source, or no docstring, stays as it is"
    d = module_names(getattr(value, '__module__', '') or '').get(getattr(value, '__name__', ''))
    if d is None or not isinstance(getattr(value, '__doc__', None), str) or d.kind == 'value':
        return value
    value.__doc__ = full_text(d)
    for m in d.methods:
        found = vars(value).get(m.name.rpartition('.')[2])
        if getattr(found, '__doc__', None) and m.kind == 'method' and hasattr(found, '__code__'):
            found.__doc__ = full_text(m)
    return value


# %%
def area(
    width: float,  # in pixels
) -> float:  # in square pixels
    "Area of a square"
    return width**2


toy_file = Path(tempfile.mkdtemp()) / 'toy_shapes.py'
head = 'def area(\n    width,  # in pixels\n):  # in square pixels\n'
toy_file.write_text(head + '    "Area of a square"\n    return width**2\n')
spec = importlib.util.spec_from_file_location('toy_shapes', toy_file)
toy_shapes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy_shapes)
assert document(area) is area and area.__doc__ == 'Area of a square', 'a notebook has no source file'
texts = describe_source(toy_file.read_text())
full_text(texts['area'])

# %%
#| label: fig-docs-lines
#| fig-cap: "Lines of `help` for some public names: the docstring alone, and with what the comments say."
#| fig-alt: "Two bars per name; the second is longer"
shown = ('describe_source', 'full_text', 'document', 'module_names')
own = module_names('semidetr.docs')
lines = {n: (own[n].doc.count('\n') + 1, full_text(own[n]).count('\n') + 1) for n in shown}
fig, ax = plt.subplots(figsize=(5, 2.2), dpi=80)
ax.barh(list(lines), [b for _, b in lines.values()], color='#aec7e8', label='with comments')
ax.barh(list(lines), [a for a, _ in lines.values()], color='#1f77b4', label='docstring')
ax.set(xlabel='lines')
ax.legend()
plt.show()

# %% [markdown]
# ## Summary
#
# - `describe_source` reads a module's text: docstrings, comments of parameters, results, exceptions.
# - A public name of `semidetr` gets the full text when it is first used, so `help(semidetr.predict)` has
#   everything.
# - Nothing is imported, and nothing is written twice.
#
# ## Exercises
#
# 1. Which errors of a function does `raises` not see?
# 2. Why are comments read with `tokenize` and not with a regular expression?
