"""The table of vLLM's names: that it has all that this package uses and nothing else, that vLLM has
what it says, and that what is missing is found."""

from __future__ import annotations

import ast
import importlib.util
import pathlib
import re
import zipfile
from collections.abc import Iterator

import pytest

from vllm_kvcrush import hooks
from vllm_kvcrush.compat import check
from vllm_kvcrush.compat.source import Class, Signature, Source, SourceError
from vllm_kvcrush.hooks import Hook
from vllm_kvcrush.tools import cli

ROOT = pathlib.Path(hooks.__file__).parent
DOTTED = {f"{hook.module}.{hook.name}" for hook in hooks.HOOKS}


def rows(*kinds: str) -> list[Hook]:
    return [hook for hook in hooks.HOOKS if hook.kind in kinds]


@pytest.fixture(scope="module")
def vllm() -> Source:
    return Source.installed()


# -- what this package uses ------------------------------------------------------------------------


class File:
    """One file of the package."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        self.module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        # What names of the file are: (module, name) by local name; name "" for modules.
        self.imports: dict[str, tuple[str, str]] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    self.imports[alias.asname or alias.name] = (node.module or "", alias.name)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    bare = "." in alias.name and not alias.asname
                    assert not (bare and alias.name.startswith("vllm.")), f"{path}: {alias.name}"
                    self.imports[alias.asname or alias.name] = (alias.name, "")
        self.classes = {n.name: n for n in ast.walk(self.tree) if isinstance(n, ast.ClassDef)}

    def vllm_name(self, expression: ast.expr) -> tuple[str, str] | None:
        """Returns the name of vLLM that an expression (`Name`, `module.Name`) is, or None."""
        if isinstance(expression, ast.Subscript):
            expression = expression.value
        if isinstance(expression, ast.Constant) and isinstance(expression.value, str):
            expression = ast.parse(expression.value, mode="eval").body
        if isinstance(expression, ast.Name):
            found = self.imports.get(expression.id, ("", ""))
        elif isinstance(expression, ast.Attribute) and isinstance(expression.value, ast.Name):
            module, name = self.imports.get(expression.value.id, ("", ""))
            found = (f"{module}.{name}".rstrip("."), expression.attr)
        else:
            return None
        return found if found[0].split(".")[0] == "vllm" and found[1] else None


FILES = {f.module: f for f in map(File, sorted(ROOT.rglob("*.py")))}


def imported() -> dict[str, pathlib.Path]:
    """Returns the dotted names of vLLM that files import, or read from a module or class that they
    import, with a file for each."""
    found = {}
    for file in FILES.values():
        for module, name in file.imports.values():
            if module.split(".")[0] == "vllm" and name:
                found[f"{module}.{name}"] = file.path
        for node in ast.walk(file.tree):
            if isinstance(node, ast.Attribute) and (place := file.vllm_name(node)):
                found[".".join(place)] = file.path
    return found


def in_releases(name: ast.expr) -> Iterator[ast.expr]:
    """Yields what `compat.NAME` stands for, in each release; anything else stands for itself."""
    if not isinstance(name, ast.Attribute) or ast.unparse(name.value) != "compat":
        yield name
        return
    for module, file in FILES.items():
        if module.startswith("vllm_kvcrush.compat.v"):
            for node in file.tree.body:
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name.attr:
                    yield node.value


def wrap_calls(
    node: ast.AST, loops: dict[str, list[ast.expr]]
) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Yields the owner and the name of each call of `server.wrap`, also in loops over tuples."""
    if isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple):
        loops = {**loops, ast.unparse(node.target): node.iter.elts}
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("wrap", "server.wrap"):
        owners, names = (loops.get(ast.unparse(arg), [arg]) for arg in node.args[:2])
        names = [each for name in names for each in in_releases(name)]
        yield from ((owner, name) for owner in owners for name in names)
    for child in ast.iter_child_nodes(node):
        yield from wrap_calls(child, loops)


def wrapped() -> dict[str, pathlib.Path]:
    """Returns the dotted names of vLLM that are wrapped, except those of `EngineArgs`, with a file
    for each."""
    found = {}
    for file in FILES.values():
        for owner, name in wrap_calls(file.tree, {}):
            place = file.vllm_name(owner)
            assert place and isinstance(name, ast.Constant), (file.path, ast.unparse(owner))
            found[".".join([*place, name.value])] = file.path
    return found


def ours_of(file: File, node: ast.ClassDef) -> Iterator[tuple[File, ast.ClassDef]]:
    """Yields a class of the package and those of the package that it inherits from."""
    yield file, node
    for base in node.bases:
        if isinstance(base, ast.Name):
            if base.id in file.classes:
                yield from ours_of(file, file.classes[base.id])
            else:
                module, name = file.imports.get(base.id, ("", ""))
                if module in FILES and name in FILES[module].classes:
                    yield from ours_of(FILES[module], FILES[module].classes[name])


def heirs(vllm: Source) -> Iterator[tuple[list[Class], list[tuple[File, ast.ClassDef]]]]:
    """Yields, for each class of the package that inherits from vLLM's, vLLM's classes, near to far,
    and ours."""
    for file in FILES.values():
        for node in file.classes.values():
            ours = list(ours_of(file, node))
            theirs: list[Class] = []
            for place, each in ours:
                for base in each.bases:
                    if (name := place.vllm_name(base)) is not None:
                        found = vllm.find(*name)
                        assert isinstance(found, Class)
                        theirs += vllm.lineage(found)
            if theirs:
                yield theirs, ours


def own_members(node: ast.ClassDef) -> dict[str, bool]:
    """Returns the names that a class binds in its body, or (False) only as attributes of its
    objects."""
    found: dict[str, bool] = {}
    for each in ast.walk(node):
        if (
            isinstance(each, ast.Attribute)
            and isinstance(each.ctx, ast.Store)
            and isinstance(each.value, ast.Name)
            and each.value.id == "self"
        ):
            found[each.attr] = False
    for item in node.body:
        if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
            found[item.name] = True
        elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            found[item.target.id] = True
        elif isinstance(item, ast.Assign):
            found |= {t.id: True for t in item.targets if isinstance(t, ast.Name)}
    return found


def overrides(vllm: Source) -> Iterator[tuple[list[Class], str, str]]:
    """Yields the members of our classes that vLLM's classes which they inherit from have too."""
    for theirs, ours in heirs(vllm):
        for file, node in ours:
            for name in own_members(node):
                if any(name in cls.members for cls in theirs) or name == "__init__":
                    yield theirs, name, f"{file.path.name}: {node.name}.{name}"


def self_reads(vllm: Source) -> Iterator[tuple[list[Class], str, str]]:
    """Yields the attributes of themselves that our classes read and that are vLLM's."""
    for theirs, ours in heirs(vllm):
        own = {name for _, node in ours for name in own_members(node)}
        for file, node in ours:
            for each in ast.walk(node):
                if (
                    isinstance(each, ast.Attribute)
                    and isinstance(each.value, ast.Name)
                    and each.value.id == "self"
                    and each.attr not in own
                ):
                    yield theirs, each.attr, f"{file.path.name}: {node.name} reads {each.attr}"


def argument_reads() -> Iterator[tuple[tuple[str, str], str, str]]:
    """Yields the attributes that functions read of arguments that are annotated with a class of
    vLLM."""
    for file in FILES.values():
        for function in ast.walk(file.tree):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            arguments = [*function.args.args, *function.args.kwonlyargs]
            known = {
                a.arg: name
                for a in arguments
                if a.annotation is not None and (name := file.vllm_name(a.annotation))
            }
            for each in ast.walk(function):
                if (
                    isinstance(each, ast.Attribute)
                    and isinstance(each.value, ast.Name)
                    and each.value.id in known
                ):
                    where = f"{file.path.name}: {ast.unparse(each)}"
                    yield known[each.value.id], each.attr, where


def known_members(vllm: Source, hooks: list[Hook]) -> dict[tuple[int, str], Hook]:
    """Returns the rows of methods and attributes, by the identity of their class and their name."""
    found = {}
    for hook in hooks:
        owner, _, member = hook.name.rpartition(".")
        try:
            cls = vllm.find(hook.module, owner) if owner else None
        except KeyError:
            assert hook.since, hook  # a module of later releases
            continue
        if isinstance(cls, Class):
            found[id(cls), member] = hook
    return found


def test_every_import_is_in_the_table() -> None:
    missing = {name: path.name for name, path in imported().items() if name not in DOTTED}
    assert not missing, "add these to vllm_kvcrush/hooks.py, with the reason"


def test_every_wrapped_method_is_in_the_table() -> None:
    table = {f"{hook.module}.{hook.name}" for hook in rows("wrap")}
    missing = {name: path.name for name, path in wrapped().items() if name not in table}
    assert not missing, "add these to vllm_kvcrush/hooks.py, with the reason"


def test_every_override_is_in_the_table(vllm: Source) -> None:
    known = known_members(vllm, rows("override"))
    missing = {
        where
        for theirs, name, where in overrides(vllm)
        if not any((id(cls), name) in known for cls in theirs)
    }
    assert not missing, "vLLM has these too: add them to vllm_kvcrush/hooks.py, with the reason"


def test_our_overrides_take_what_the_table_says(vllm: Source) -> None:
    """Names must agree too, since vLLM may give by name what it gives by position today."""
    known = known_members(vllm, rows("override"))
    wrong = {}
    for theirs, ours in heirs(vllm):
        for file, node in ours:
            for item in node.body:
                if not isinstance(item, ast.FunctionDef):
                    continue
                hook = next((h for c in theirs if (h := known.get((id(c), item.name)))), None)
                if hook is None or hook.parameters is None:
                    continue
                bound = not any(ast.unparse(d) == "staticmethod" for d in item.decorator_list)
                given = Signature.of(item.args, bound)
                rest = hook.parameters.endswith("...")
                names = [n.rstrip("=") for n in hook.parameters.split(", ") if n and n != "..."]
                taken = list(given.positional[: len(names)])
                if taken != names[: len(taken)] or (len(taken) < len(names) and not given.args):
                    wrong[f"{file.path.name}: {node.name}.{item.name}"] = str(hook)
                if rest and not given.kwargs:
                    wrong[f"{file.path.name}: {node.name}.{item.name}"] = str(hook)
    assert not wrong


def test_everything_that_our_classes_take_from_vllms_is_in_the_table(vllm: Source) -> None:
    known = known_members(vllm, list(hooks.HOOKS))
    missing = {
        where
        for theirs, name, where in self_reads(vllm)
        if not any((id(cls), name) in known for cls in theirs)
    }
    for (module, name), attribute, where in argument_reads():
        found = vllm.find(module, name)
        assert isinstance(found, Class)
        if not any((id(cls), attribute) in known for cls in vllm.lineage(found)):
            missing.add(where)
    assert not missing, "add these to vllm_kvcrush/hooks.py, with the reason"


def test_every_setting_that_the_gate_asks_for_is_in_the_table() -> None:
    """Otherwise a setting that vLLM renames would not be refused any more."""
    owners = ("Config", "Attention", "Impl")
    known = {
        n for hook in hooks.HOOKS for o, _, n in [hook.name.rpartition(".")] if o.endswith(owners)
    }
    paths = set()
    for node in ast.walk(FILES["vllm_kvcrush.gate"].tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        first = node.args[0] if node.args else None
        if node.func.id == "_get" and isinstance(first, ast.Name) and first.id == "text":
            continue  # a model's configuration, which is not vLLM's
        if node.func.id in ("_get", "_set", "_above"):
            texts = [a.value for a in node.args if isinstance(a, ast.Constant)]
            paths |= {t for t in texts if isinstance(t, str)}
    assert len(paths) > 30
    asked = {part for path in paths for part in path.partition("hf_text_config.")[0].split(".")}
    words = {"decoder", "auto", "cpu", ""}  # defaults
    assert not asked - known - words


def test_dotted_names_are_in_the_table() -> None:
    for file in FILES.values():
        if file.module == "vllm_kvcrush.hooks":
            continue
        for node in ast.walk(file.tree):
            text = node.value if isinstance(node, ast.Constant) else None
            if isinstance(text, str) and re.fullmatch(r"vllm\.v1(\.\w+)+", text):
                assert text in DOTTED, file.path


def test_nothing_is_in_the_table_that_nobody_uses(vllm: Source) -> None:
    files = [file for name, file in FILES.items() if name != "vllm_kvcrush.hooks"]
    said: set[str] = set()
    for file in files:
        for node in ast.walk(file.tree):
            if isinstance(node, ast.Attribute):
                said.add(node.attr)
            elif isinstance(node, ast.keyword) and node.arg:
                said.add(node.arg)
            elif isinstance(node, ast.ImportFrom | ast.Import):
                said |= {alias.name for alias in node.names}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                said |= set(re.findall(r"\w+", node.value)) if len(node.value) < 80 else set()
    overridden = {(id(c), name) for theirs, name, _ in overrides(vllm) for c in theirs}
    names, wraps = imported(), wrapped()
    unused = []
    for hook in hooks.HOOKS:
        owner, _, member = hook.name.rpartition(".")
        if hook.kind in ("import", "subclass"):
            used = f"{hook.module}.{hook.name}" in names
        elif hook.kind == "override":
            used = (id(vllm.find(hook.module, owner)), member) in overridden
        elif hook.kind == "wrap":
            used = owner == "EngineArgs" or f"{hook.module}.{hook.name}" in wraps
        else:
            used = member in said
        if not used:
            unused.append(f"{hook.kind} {hook.module}.{hook}")
    assert not unused, "delete these from vllm_kvcrush/hooks.py"


def test_every_row_says_why_once() -> None:
    for hook in hooks.HOOKS:
        assert re.fullmatch(r"[A-Z`v].*[\w)]\.", hook.why), hook
    keys = [(h.kind, h.module, h.name, h.since) for h in hooks.HOOKS]
    assert len(set(keys)) == len(keys)


# -- what a vLLM has -------------------------------------------------------------------------------


def test_the_installed_vllm_has_all_of_it(vllm: Source) -> None:
    assert vllm.version
    assert not [finding for finding in check.check(vllm) if finding.problem]
    assert check.refusal() is None


RECORDED = pathlib.Path(__file__).parent.parent / "data" / "vllm_0_33_hooks.json"


def test_vllm_0_33_has_all_of_it() -> None:
    """This reads a recording of the names and signatures in its wheel, which CI need not have."""
    source = Source.recorded(RECORDED.read_text(encoding="utf-8"))
    assert source.version == "0.33.0"
    wrong = {f"{f.hook.module}.{f.hook}": f.problem for f in check.check(source) if f.problem}
    assert not wrong, (
        "vLLM 0.33 has these not, or not so; or they are new here, and the recording must be made "
        "again: see docs/vllm.md"
    )


# A vLLM of a few lines, which has everything that these hooks expect.
VLLM = {
    "vllm/v1/__init__.py": "",
    "vllm/_version.py": "__version__ = version = '0.32.7'\n",
    "vllm/base.py": """
import abc

class Base(abc.ABC):
    limit: int = 3

    def __init__(self, config):
        self.config, self.rest = config, None
        self.size: int = 4

    @property
    def name(self): ...

    @staticmethod
    def pages(count): ...

    def run(self, step, *, fast=False): ...
""",
    "vllm/engine.py": """
from __future__ import annotations

from typing import ClassVar

from dataclasses import dataclass, field

from . import base
from .base import *

try:
    import uvloop
except ImportError:
    def fallback(a, b=1, /, c=2): ...

if True:
    class Engine(base.Base):
        async def step(self, output, mode=None): ...

@dataclass
class Output:
    kind: ClassVar[int] = 1
    ids: list[int]
    made: int = field(init=False, default=0)
    extra: dict = field(default_factory=dict)
""",
    "vllm/api/__init__.py": "from vllm.engine import Engine as Core, Output\n",
}
FAKE = tuple(
    Hook(kind, "vllm." + place.split(":")[0], place.split(":")[1], parameters, "Why.")
    for kind, place, parameters in (
        ("import", "engine:Engine", None),
        ("subclass", "api:Core", None),
        ("override", "api:Core.step", "output, mode="),
        ("override", "engine:Engine.run", "step, *, fast="),
        ("override", "engine:Engine.name", None),
        ("attribute", "engine:Engine.size", None),
        ("attribute", "engine:Engine.rest", None),
        ("attribute", "engine:Engine.limit", None),
        ("wrap", "base:Base.run", "step, ..."),
        ("call", "base:Base.pages", "count"),
        ("call", "engine:Base", "config"),
        ("call", "engine:fallback", "a, b="),
        ("call", "engine:Output", "*, ids, extra"),
        ("import", "api:Output", None),
    )
)


@pytest.fixture
def fake(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    for name, text in VLLM.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(hooks, "HOOKS", FAKE)
    return tmp_path


def changed(folder: pathlib.Path, name: str, old: str, new: str) -> dict[str, str]:
    """Returns what is found wrong when a file is changed."""
    path = folder / "vllm" / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return {f.hook.name: f.problem for f in check.check(Source.at(folder)) if f.problem}


def test_a_tree_a_package_a_wheel_and_a_recording_are_one(fake: pathlib.Path) -> None:
    wheel = fake / "vllm-0.32.7-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        for name, text in VLLM.items():
            file.writestr(name, text)
    sources = [Source.at(fake), Source.at(fake / "vllm"), Source.at(str(wheel))]
    sources.append(Source.recorded(check.record(sources[0])))
    found = [check.check(source) for source in sources]
    assert not [finding for finding in found[0] if finding.problem]
    assert found[1:] == found[:1] * 3
    assert {source.version for source in sources} == {"0.32.7"}
    shown = {finding.hook.name: finding.found for finding in found[0] if finding.found}
    assert shown["Engine.run"] == "(step, *, fast=)"
    assert shown["Output"] == "(ids, extra=)"
    assert shown["fallback"] == "(a, b=, c=)"
    with pytest.raises(SourceError, match="has no vLLM in it"):
        Source.at(fake / "vllm" / "api")


@pytest.mark.parametrize(
    ("file", "old", "new", "wrong"),
    [
        ("engine.py", "(self, output, mode=None)", "(self, output)", {}),
        ("engine.py", "(self, output, mode=None)", "(self, result)", {"Core.step"}),
        ("engine.py", "mode=None)", "mode=None, more=None)", {"Core.step"}),
        ("engine.py", "mode=None)", "mode=None, **more)", {"Core.step"}),
        ("engine.py", "output, mode=None)", "mode, output)", {"Core.step"}),
        ("engine.py", "async def step", "async def steps", {"Core.step"}),
        ("engine.py", "class Engine(base.Base)", "class Engine", {"Engine.run", "Engine.name",
         "Engine.size", "Engine.rest", "Engine.limit"}),
        ("engine.py", "ids: list[int]", "numbers: list[int]", {"Output"}),
        ("engine.py", "ids: list[int]", "ids: list[int]\n    more: int", {"Output"}),
        ("engine.py", "ids: list[int]", "ids: list[int]\n    more: int = 1", {}),
        ("engine.py", "from .base import *", "", {"Base"}),
        ("engine.py", "(a, b=1", "(a, b", {}),
        ("engine.py", "(a, b=1, /, c=2)", "(b, a)", {"fallback"}),
        ("base.py", "self.size: int = 4", "", {"Engine.size"}),
        ("base.py", "self.config, self.rest", "self.config, self.others", {"Engine.rest"}),
        ("base.py", "limit: int = 3", "", {"Engine.limit"}),
        ("base.py", "step, *, fast=False", "step, *, fast=False, slow=True", {"Engine.run"}),
        ("base.py", "step, *, fast=False", "fast", {"Engine.run", "Base.run"}),
        ("base.py", "def run(self, step, *, fast=False): ...", "run = property()", {"Engine.run",
         "Base.run"}),
        ("base.py", "pages(count)", "pages(count, size)", {"Base.pages"}),
        ("base.py", "pages(count)", "pages(count, size=1)", {}),
        ("base.py", "(self, config)", "(self)", {"Base"}),
        ("api/__init__.py", "Engine as Core, Output", "Engine as Core", {"Output"}),
        ("api/__init__.py", "Engine as Core", "nothing as Core", {"Core", "Core.step"}),
        ("api/__init__.py", "from vllm.engine", "from vllm.gone", {"Core", "Core.step", "Output"}),
    ],
)  # fmt: skip
def test_what_is_not_as_it_was_is_found(
    fake: pathlib.Path, file: str, old: str, new: str, wrong: set[str]
) -> None:
    assert set(changed(fake, file, old, new)) == set(wrong)


def test_what_is_wrapped_is_wrapped_where_it_is(
    fake: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inherited = Hook("wrap", "vllm.engine", "Engine.run", "step, ...", "Why.")
    monkeypatch.setattr(hooks, "HOOKS", (inherited,))
    (finding,) = check.check(Source.at(fake))
    assert finding.problem == "is missing"


def test_rows_of_other_releases_are_left_out(
    fake: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans = [(None, None), (None, (0, 32)), ((0, 33), None), ((0, 30), (0, 31))]
    table = [Hook("import", "vllm.engine", "Engine", None, str(span), *span) for span in spans]
    monkeypatch.setattr(hooks, "HOOKS", tuple(table))

    def kept(version: str | None) -> list[int]:
        source = Source.at(fake)
        source.version = version
        return [table.index(finding.hook) for finding in check.check(source)]

    assert kept("0.32.7") == [0, 1]
    assert kept("0.33.0") == kept("0.41") == [0, 2]
    assert kept("0.31.1") == [0, 1, 3]
    assert kept(None) == kept("dev") == [0, 2], "a checkout is newer than all"


@pytest.fixture
def unknown(fake: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """Makes the installed vLLM one that somebody changed."""
    changed(fake, "engine.py", "async def step(self, output", "async def step(self, result, output")
    changed(fake, "base.py", "self.size: int = 4", "")
    monkeypatch.setattr(Source, "installed", lambda: Source.at(fake))
    check.refusal.cache_clear()
    yield fake
    check.refusal.cache_clear()


def test_a_changed_vllm_is_refused_in_one_sentence(unknown: pathlib.Path) -> None:
    sentence = check.refusal()
    assert sentence is not None and "\n" not in sentence
    assert "vllm.api.Core.step takes (result, output, mode=)" in sentence
    assert "output is expected at place 1 (and 1 more)" in sentence
    assert "start without --kv-policy" in sentence and "doctor --hooks" in sentence


def test_no_vllm_is_a_sentence_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check.refusal.cache_clear()
    assert check.refusal() == "vLLM is not installed."
    check.refusal.cache_clear()


def test_doctor_shows_the_table(
    unknown: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor", "--hooks"]) == 1
    out = capsys.readouterr().out
    assert "`vllm.engine`\n\n| hook | kind | found | |\n" in out
    assert "| Core.step | override | (result, output, mode=) | changed |" in out
    assert "| Engine.size | attribute |  | missing |" in out
    assert "| Base.pages | call | (count) | ok |" in out
    assert "Changed: vLLM 0.32.7 lacks 2 of the 14 names (0 private)" in out
    assert "- vllm.engine.Engine.size is missing. What for: Why." in out

    whole, recording = tmp_path / "whole", tmp_path / "hooks.json"
    for name, text in VLLM.items():
        (whole / name).parent.mkdir(parents=True, exist_ok=True)
        (whole / name).write_text(text)
    assert cli.main(["doctor", "--hooks", str(whole), "--record", str(recording)]) == 0
    assert capsys.readouterr().out.endswith(
        "OK: vLLM 0.32.7 has all 14 names (0 private) that vllm-kvcrush relies on.\n"
    )
    assert check.check(Source.recorded(recording.read_text())) == check.check(Source.at(whole))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--hooks", "/nowhere"], "/nowhere has no vLLM in it"),
        (["--hooks", __file__], "has no vLLM in it"),
        (["--record", "x.json"], "give both"),
    ],
)
def test_doctor_says_what_it_cannot_read(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor", *argv]) == 2
    said = capsys.readouterr()
    assert words in said.err and said.err.count("\n") == 1 and not said.out


def test_a_bad_wheel_is_a_sentence(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = tmp_path / "vllm.whl"
    wheel.write_text("not a wheel")
    assert cli.main(["doctor", "--hooks", str(wheel)]) == 2
    assert "cannot be read: File is not a zip file." in capsys.readouterr().err


def test_a_tree_for_a_newer_python_is_a_sentence(fake: pathlib.Path) -> None:
    with pytest.raises(SourceError, match=r"vllm\.engine cannot be read by Python 3"):
        changed(fake, "engine.py", "if True:", "if True then:")


def test_signatures_survive_being_written() -> None:
    for text in ("", "a, b=", "a, *, b", "a, *args, b=, **kwargs", "*args", "*, a"):
        assert str(Signature.parse(text)) == text


def test_private_names_are_marked() -> None:
    private = {h.name for h in hooks.HOOKS if h.private}
    assert "Scheduler._free_request" in private and "Scheduler.schedule" not in private
    assert not any(name.endswith("__init__") for name in private)
