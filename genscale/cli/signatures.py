"""What a constructor takes, read from its source text.

Checking a command line must not cost the import of torch (1 s) or lightning (2 to 5 s), so the
file that holds a ``_target_`` is found and parsed, never run. Re-exports are followed.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

_MAX_HOPS = 12  # re-exports followed from one name; real packages need three


@dataclass(frozen=True, slots=True)
class Signature:
    """The keyword arguments of a constructor or function.

    Args:
        target: dotted path of the callable.
        parameters: name -> source text of its default, None where it has none.
        accepts_any: it has ``**kwargs``.
    """

    target: str
    parameters: dict[str, str | None]
    accepts_any: bool = False

    def __contains__(self, name: str) -> bool:
        return self.accepts_any or name in self.parameters

    def __str__(self) -> str:
        words = [n if d is None else f"{n}={d}" for n, d in self.parameters.items()]
        return f"{self.target}({', '.join([*words, *(['**kwargs'] if self.accepts_any else [])])})"


def read_signature(target: str) -> Signature | None:
    """Read the signature of ``package.module.Name`` without importing anything.

    Returns:
        None where the source cannot be found or does not say, for example in compiled modules.
    """
    parts = target.split(".")
    for split in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:split])
        if _source_file(module) is not None:
            return _signature(module, parts[split:], target)
    return None


def _signature(module: str, names: list[str], target: str) -> Signature | None:
    """Read a class, a function, or a method of a class."""
    found = _definition(module, names[0])
    if found is None or len(names) > 2:
        return None
    home, node = found
    if len(names) == 2:
        method = _method(node, names[1]) if isinstance(node, ast.ClassDef) else None
        return _of_function(method, target, bound=True) if method else None
    if isinstance(node, ast.ClassDef):
        return _of_class(home, node, target)
    return _of_function(node, target, bound=False)


def _of_class(
    module: str, node: ast.ClassDef, target: str, hops: int = _MAX_HOPS
) -> Signature | None:
    constructor = _method(node, "__init__")
    if constructor is not None:
        return _of_function(constructor, target, bound=True)
    inherited = _inherited(module, node, target, hops)
    if not any("dataclass" in ast.unparse(d) for d in node.decorator_list):
        return inherited
    fields = dict(inherited.parameters) if inherited else {}
    for statement in node.body:
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        default = None if statement.value is None else ast.unparse(statement.value)
        if "ClassVar" in ast.unparse(statement.annotation) or "init=False" in (default or ""):
            continue
        fields[statement.target.id] = default
    return Signature(target, fields)


def _inherited(module: str, node: ast.ClassDef, target: str, hops: int) -> Signature | None:
    """Read the constructor of the first base whose source says."""
    for base in node.bases if hops else ():
        if isinstance(base, ast.Subscript):  # Generic[T]
            base = base.value
        if isinstance(base, ast.Name):
            found = _definition(module, base.id, hops - 1)
            if found is not None and isinstance(found[1], ast.ClassDef):
                signature = _of_class(found[0], found[1], target, hops - 1)
                if signature is not None:
                    return signature
    return None


def _of_function(
    node: ast.FunctionDef | ast.AsyncFunctionDef, target: str, *, bound: bool
) -> Signature:
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    first_default = len(positional) - len(arguments.defaults)
    parameters: dict[str, str | None] = {}
    for index, argument in enumerate(positional):
        if index < len(arguments.posonlyargs) or (bound and index == 0):
            continue  # cannot be given by name
        has_default = index >= first_default
        parameters[argument.arg] = (
            ast.unparse(arguments.defaults[index - first_default]) if has_default else None
        )
    for argument, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        parameters[argument.arg] = None if value is None else ast.unparse(value)
    return Signature(target, parameters, accepts_any=arguments.kwarg is not None)


def _method(node: ast.ClassDef, name: str) -> ast.FunctionDef | None:
    """Return the method; the last of several, as overloads precede what they describe."""
    found = [s for s in node.body if isinstance(s, ast.FunctionDef) and s.name == name]
    return found[-1] if found else None


Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _definition(module: str, name: str, hops: int = _MAX_HOPS) -> tuple[str, Definition] | None:
    """Find where a module's name is defined; imports of it are followed ``hops`` times."""
    file = _source_file(module)
    if file is None or hops < 1:
        return None
    statements = list(_statements(_parse(file).body))
    for statement in reversed(statements):  # the last definition is the one that counts
        if isinstance(statement, Definition) and statement.name == name:
            return module, statement
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for statement in reversed(statements):
        if not isinstance(statement, ast.ImportFrom):
            continue
        for alias in statement.names:
            if (alias.asname or alias.name) == name:
                source = _imported_module(statement, package)
                found = _definition(source, alias.name, hops - 1)
                if found is not None:
                    return found
    return None


def _imported_module(statement: ast.ImportFrom, package: str) -> str:
    """Return the absolute name of the module that ``from ... import`` names."""
    if statement.level == 0:
        return statement.module or ""
    parts = package.split(".")
    base = parts[: len(parts) - (statement.level - 1)]
    return ".".join([*base, *([statement.module] if statement.module else [])])


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield a module's statements, those under ``if`` and ``try`` included."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try):
            yield from _statements(statement.body)
            yield from _statements(statement.orelse)


@lru_cache(maxsize=64)
def _parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _source_file(module: str) -> Path | None:
    """Find a module's source; no package is imported on the way, unlike in ``find_spec``."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not rest:
        origin = Path(spec.origin) if spec.origin else None
        return origin if origin and origin.suffix == ".py" else None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    for index, part in enumerate(rest):
        last = index == len(rest) - 1
        for folder in folders:
            if (folder / part / "__init__.py").is_file():
                if last:
                    return folder / part / "__init__.py"
                folders = [folder / part]
                break
            if last and (folder / f"{part}.py").is_file():
                return folder / f"{part}.py"
        else:
            folders = [folder / part for folder in folders if (folder / part).is_dir()]
    return None
