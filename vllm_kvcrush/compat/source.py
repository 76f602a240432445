"""Reads the names, signatures and attributes of vLLM from its source. Nothing of it is imported, so
that a release that is not installed can be read from a folder, a wheel, or a recording of either.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import platform
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

PACKAGE = "vllm"


class SourceError(ValueError):
    """There is no vLLM to read; the message is one sentence."""


@dataclass(frozen=True)
class Signature:
    """Parameters of a function or method, without `self` or `cls`.

    Attributes:
        positional: names that may be given by position, in order.
        keyword: names that may be given by keyword only.
        optional: those of both that have a default.
        args, kwargs: whether any further positional or keyword arguments are taken.
    """

    positional: tuple[str, ...] = ()
    keyword: tuple[str, ...] = ()
    optional: frozenset[str] = frozenset()
    args: bool = False
    kwargs: bool = False

    def __str__(self) -> str:
        def shown(name: str) -> str:
            return f"{name}=" if name in self.optional else name

        parts = [shown(name) for name in self.positional]
        if self.args:
            parts.append("*args")
        elif self.keyword:
            parts.append("*")
        parts += [shown(name) for name in self.keyword]
        if self.kwargs:
            parts.append("**kwargs")
        return ", ".join(parts)

    @classmethod
    def parse(cls, text: str) -> Signature:
        """Returns the signature that `text`, made by `str`, describes."""
        positional: list[str] = []
        keyword: list[str] = []
        optional, args, kwargs, after = set(), False, False, False
        for part in filter(None, (p.strip() for p in text.split(","))):
            if part.startswith("**"):
                kwargs = True
            elif part.startswith("*"):
                args, after = len(part) > 1, True
            else:
                name = part.rstrip("=")
                (keyword if after else positional).append(name)
                if part != name:
                    optional.add(name)
        return cls(tuple(positional), tuple(keyword), frozenset(optional), args, kwargs)

    @classmethod
    def of(cls, arguments: ast.arguments, bound: bool) -> Signature:
        """Returns the signature of a function, or, without the first parameter, of a method that is
        `bound`."""
        positional = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
        defaults = positional[len(positional) - len(arguments.defaults) :]
        keyword = [a.arg for a in arguments.kwonlyargs]
        given = zip(keyword, arguments.kw_defaults, strict=True)
        optional = {*defaults, *(name for name, default in given if default is not None)}
        return cls(
            tuple(positional[1:] if bound else positional),
            tuple(keyword),
            frozenset(optional),
            arguments.vararg is not None,
            arguments.kwarg is not None,
        )


class Alias(NamedTuple):
    """A name that stands for one of another module, or with "" for the module itself."""

    module: str
    name: str


@dataclass
class Class:
    """A class of vLLM.

    Attributes:
        bases: those base classes that are vLLM's own.
        members: by name, the signature of a method, or how the constructor takes an attribute:
            "field", "field=" if it has a default, "" if it is no parameter.
    """

    bases: list[Alias] = field(default_factory=list)
    members: dict[str, Signature | str] = field(default_factory=dict)


# What a module's name stands for: a class, a function, another name, or None for any value.
Entry = Class | Signature | Alias | None
Module = dict[str, Entry]


class Source:
    """The modules of one vLLM.

    Args:
        where: what it was read from, for messages.
        version: the version in its own source, or None.
        read: returns a module by its dotted name, or None if there is no such module.
    """

    def __init__(self, where: str, version: str | None, read: Callable[[str], Module | None]):
        self.where, self.version = where, version
        # The modules that were asked for, by their dotted names.
        self.modules: dict[str, Module | None] = {}
        self._read = read

    @classmethod
    def installed(cls) -> Source:
        """Returns the source of the installed vLLM. Raises SourceError if there is none."""
        spec = importlib.util.find_spec(PACKAGE)
        places = list(spec.submodule_search_locations or ()) if spec else []
        if not places:
            raise SourceError("vLLM is not installed.")
        return cls.at(places[0])

    @classmethod
    def at(cls, path: str | Path) -> Source:
        """Returns the source of the vLLM in a wheel, or in a folder that is the package or holds it
        (a repository, an unpacked wheel). Raises SourceError if there is none."""
        path = Path(path)
        try:
            if path.is_file() and path.suffix == ".whl":
                wheel = zipfile.ZipFile(path)
                names = frozenset(wheel.namelist())
                return cls._of_files(
                    str(path), lambda name: wheel.read(name).decode() if name in names else None
                )
            for folder in (path, path.parent):
                if (folder / PACKAGE / "v1").is_dir() and (folder == path or path.name == PACKAGE):
                    return cls._of_files(str(path), functools.partial(_file, folder))
        except (OSError, zipfile.BadZipFile) as error:
            raise SourceError(f"{path} cannot be read: {error}.") from error
        raise SourceError(f"{path} has no vLLM in it: give a source tree, or a wheel.")

    @classmethod
    def _of_files(cls, where: str, text: Callable[[str], str | None]) -> Source:
        def read(module: str) -> Module | None:
            base = module.replace(".", "/")
            for name, package in ((f"{base}.py", False), (f"{base}/__init__.py", True)):
                if (content := text(name)) is not None:
                    return _Reader(module, package).read(_parse(module, content))
            return None

        said = text(f"{PACKAGE}/_version.py") or ""
        version = re.search(r"__version__\s*=.*?'([^']+)'", said)
        return cls(where, version[1] if version else None, read)

    @classmethod
    def recorded(cls, text: str) -> Source:
        """Returns the source that `record` wrote, which has only the names that it was given."""
        content = json.loads(text)
        modules = {name: _decode_module(m) for name, m in content["modules"].items()}
        return cls(f"a recording of vLLM {content['version']}", content["version"], modules.get)

    def record(self, needed: Sequence[tuple[str, str]]) -> str:
        """Returns the classes and functions `needed`, given as (module, name), as JSON with a line
        for each."""
        kept: dict[str, Module] = {}
        for module, name in needed:
            self._keep(module, name, kept)
        lines = []
        for module, entries in sorted(kept.items()):
            of = [
                f"   {json.dumps(name)}: {json.dumps(_encode(entry))}"
                for name, entry in sorted(entries.items())
            ]
            lines.append(f"  {json.dumps(module)}: {{\n" + ",\n".join(of) + "\n  }")
        body = ",\n".join(lines)
        return f'{{\n "version": {json.dumps(self.version)},\n "modules": {{\n{body}\n }}\n}}\n'

    def _keep(self, module: str, name: str, kept: dict[str, Module]) -> None:
        entries = kept.setdefault(module, {})
        found = self.module(module)
        if name in entries:
            return
        if found is None:
            del kept[module]
            return
        if name not in found:
            for key in [key for key in found if key.startswith(f"*{PACKAGE}")]:
                entries[key] = found[key]
                self._keep(key[1:], name, kept)
            if name and self.module(f"{module}.{name}") is not None:
                kept.setdefault(f"{module}.{name}", {})
            return
        entry = entries[name] = found[name]
        if isinstance(entry, Alias):
            self._keep(entry.module, entry.name, kept)
        elif isinstance(entry, Class):
            for base in entry.bases:
                self._keep(base.module, base.name, kept)

    def module(self, name: str) -> Module | None:
        """Returns a module by its dotted name, or None."""
        if name not in self.modules:
            self.modules[name] = self._read(name)
        return self.modules[name]

    def find(self, module: str, name: str) -> Entry:
        """Returns what a module has under a name, wherever that is defined. Raises KeyError if it
        has nothing."""
        for _ in range(16):  # a limit for names that import one another
            entries = self.module(module)
            if entries is None:
                raise KeyError(module)
            if name == "":
                return Alias(module, "")
            if name not in entries:
                return self._find_beside(module, name, entries)
            entry = entries[name]
            if not isinstance(entry, Alias):
                return entry
            module, name = entry
            if module.split(".")[0] != PACKAGE:
                return None  # another package's
        raise KeyError(name)

    def _find_beside(self, module: str, name: str, entries: Module) -> Entry:
        """Returns what a module has under a name that it does not bind itself: through an
        `import *`, or a submodule. Raises KeyError if it has nothing."""
        for all_of in [key[1:] for key in entries if key.startswith(f"*{PACKAGE}")]:
            try:
                return self.find(all_of, name)
            except KeyError:
                continue
        if self.module(f"{module}.{name}") is None:
            raise KeyError(name)
        return Alias(f"{module}.{name}", "")

    def lineage(self, cls: Class) -> Iterator[Class]:
        """Yields a class and the classes that it inherits from, near to far."""
        yield cls
        for base in cls.bases:
            try:
                found = self.find(base.module, base.name)
            except KeyError:
                continue
            if isinstance(found, Class):
                yield from self.lineage(found)

    def member(self, cls: Class, name: str, inherited: bool = True) -> Signature | str:
        """Returns a method's signature, or how the constructor takes an attribute. Raises KeyError
        if the class has no such member."""
        for each in self.lineage(cls) if inherited else (cls,):
            if name in each.members:
                return each.members[name]
        if name == "__init__":
            return self._constructor(cls)
        raise KeyError(name)

    def _constructor(self, cls: Class) -> Signature:
        """Returns the constructor's signature of a class that defines none: that of a data class,
        made of its fields."""
        names: dict[str, bool] = {}
        for each in reversed(list(self.lineage(cls))):
            for name, how in each.members.items():
                if isinstance(how, str) and how:
                    names[name] = how == "field="
        optional = frozenset(name for name, default in names.items() if default)
        return Signature(tuple(names), (), optional)


def _parse(module: str, text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except SyntaxError as error:
        python = platform.python_version()
        raise SourceError(f"{module} cannot be read by Python {python}: {error}.") from error


def _file(folder: Path, name: str) -> str | None:
    path = folder / name
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _encode(entry: Entry) -> Any:
    """Returns an entry as JSON values. A class becomes a list of its bases, its methods'
    parameters, its fields ("=" marks a default), and its other attributes."""
    if isinstance(entry, Alias):
        return ":".join(entry)
    if not isinstance(entry, Class):
        return f"({entry})" if isinstance(entry, Signature) else entry
    fields, others, methods = [], [], {}
    for name, member in entry.members.items():
        if isinstance(member, Signature):
            methods[name] = str(member)
        elif member:
            fields.append(name + member.removeprefix("field"))
        else:
            others.append(name)
    bases = [":".join(base) for base in entry.bases]
    return [" ".join(bases), methods, " ".join(fields), " ".join(others)]


def _decode(entry: Any) -> Entry:
    if isinstance(entry, list):
        bases, methods, fields, others = entry
        members: dict[str, Signature | str] = dict.fromkeys(others.split(), "")
        members |= {f.rstrip("="): "field=" if f[-1] == "=" else "field" for f in fields.split()}
        members |= {name: Signature.parse(text) for name, text in methods.items()}
        return Class([Alias(*base.split(":")) for base in bases.split()], members)
    if isinstance(entry, str):
        return Signature.parse(entry[1:-1]) if entry[0] == "(" else Alias(*entry.split(":"))
    return None


def _decode_module(content: dict[str, Any]) -> Module:
    return {name: _decode(entry) for name, entry in content.items()}


class _Reader:
    """Reads one module.

    Args:
        module: the module's dotted name.
        package: whether it is a package's `__init__`.
    """

    def __init__(self, module: str, package: bool):
        self._module = module
        self._package = module if package else module.rpartition(".")[0]
        self._entries: Module = {}

    def read(self, tree: ast.Module) -> Module:
        """Returns everything that the module's top level binds."""
        for node in _statements(tree.body):
            self._statement(node)
        return self._entries

    def _statement(self, node: ast.stmt) -> None:
        entries = self._entries
        if isinstance(node, ast.ImportFrom):
            module = self._absolute(node)
            for alias in node.names:
                if alias.name == "*":
                    entries[f"*{module}"] = Alias(module, "")
                else:
                    entries[alias.asname or alias.name] = Alias(module, alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name.split(".")[0]
                entries[name] = Alias(alias.name if alias.asname else name, "")
        elif isinstance(node, ast.ClassDef):
            entries[node.name] = self._class(node)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if not _marked(node, "overload"):
                entries[node.name] = Signature.of(node.args, bound=False)
        else:
            for name in _bound(node):
                entries[name] = None

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = self._package.split(".")
        parts = parts[: len(parts) - node.level + 1]
        return ".".join([*parts, node.module] if node.module else parts)

    def _class(self, node: ast.ClassDef) -> Class:
        found = Class()
        for base in node.bases:
            name = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
            if (target := self._target(name)) is not None:
                found.bases.append(target)
        for item in _statements(node.body):
            if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
                self._method(item, found)
            elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                found.members[item.target.id] = _field(item)
            else:
                for name in _bound(item):
                    found.members.setdefault(name, "")
        return found

    def _method(self, node: ast.FunctionDef | ast.AsyncFunctionDef, found: Class) -> None:
        if _marked(node, "overload"):
            return
        if _marked(node, "property", "cached_property", "setter"):
            found.members[node.name] = ""
        else:
            found.members[node.name] = Signature.of(node.args, not _marked(node, "staticmethod"))
        if not (node.args.posonlyargs or node.args.args):
            return
        own = (node.args.posonlyargs or node.args.args)[0].arg
        for each in ast.walk(node):
            if (
                isinstance(each, ast.Attribute)
                and isinstance(each.ctx, ast.Store)
                and isinstance(each.value, ast.Name)
                and each.value.id == own
            ):
                found.members.setdefault(each.attr, "")

    def _target(self, name: str) -> Alias | None:
        """Returns where a base class is defined, or None if it is not vLLM's."""
        first, *middle = name.split(".")
        entry = self._entries.get(first)
        if isinstance(entry, Class):
            return Alias(self._module, name) if not middle else None
        if not isinstance(entry, Alias) or entry.module.split(".")[0] != PACKAGE:
            return None
        if not middle:
            return entry
        module = ".".join(filter(None, [*entry, *middle[:-1]]))
        return Alias(module, middle[-1])


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Yields all statements that may run when a module or a class body runs."""
    for node in body:
        if isinstance(node, ast.If | ast.For | ast.While):
            yield from _statements([*node.body, *node.orelse])
        elif isinstance(node, ast.Try):
            handlers = [statement for handler in node.handlers for statement in handler.body]
            # Later names win, so handlers come first: what is bound if nothing fails stays.
            yield from _statements([*handlers, *node.body, *node.orelse, *node.finalbody])
        elif isinstance(node, ast.With):
            yield from _statements(node.body)
        else:
            yield node


def _bound(node: ast.stmt) -> Iterator[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    for target in targets:
        for each in ast.walk(target) if isinstance(target, ast.expr) else ():
            if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store):
                yield each.id


def _field(node: ast.AnnAssign) -> str:
    kind = ast.unparse(node.annotation)
    value = node.value
    if "ClassVar" in kind or kind.startswith("InitVar"):
        return ""
    if (
        isinstance(value, ast.Call)
        and ast.unparse(value.func).rpartition(".")[2].lower() == "field"
    ):
        given = {k.arg: k.value for k in value.keywords}
        hidden = given.get("init")
        if isinstance(hidden, ast.Constant) and hidden.value is False:
            return ""
        plain = [a for a in value.args if not (isinstance(a, ast.Constant) and a.value is ...)]
        return "field=" if plain or {"default", "default_factory"} & set(given) else "field"
    return "field" if value is None else "field="


def _marked(node: ast.FunctionDef | ast.AsyncFunctionDef, *names: str) -> bool:
    """Returns whether a function has one of these decorators."""
    found = (ast.unparse(d.func if isinstance(d, ast.Call) else d) for d in node.decorator_list)
    return any(name.rpartition(".")[2] in names for name in found)
