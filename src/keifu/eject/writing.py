"""Writing of the executed definitions of a model as one file."""

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from keifu.eject.executed import Executed
from keifu.eject.pruning import ModuleText, Pruner, place_of
from keifu.errors import UserError

SHAPES = {"Float", "Int", "Bool", "Num", "Shaped", "UInt8"}
SHAPE_TEXT = '''class Float:
    """Annotation of a tensor with the names of its axes: Float[Tensor, "batch length dim"]."""

    def __class_getitem__(cls, of):
        return of[0]'''
BARE = {"Count": "int", "Natural": "int", "Seed": "int"}  # keifu.ranges; the others are of float
Definition = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign


class Name(NamedTuple):
    """Definition of a module of keifu."""

    module: str
    name: str


class Module:
    """Names of a module of keifu: definitions, and imports."""

    def __init__(self, name: str):
        spec = find_spec(name)
        assert spec is not None and spec.origin is not None
        self.name, self.file = name, spec.origin
        self.source = ModuleText(self.file, Path(self.file).read_text(encoding="utf-8"))
        self.definitions, self.imports = dict[str, Definition](), dict[str, tuple[str, str | None]]()
        for node in self.source.tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                self.definitions[node.name] = node
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    for part in ast.walk(target):
                        if isinstance(part, ast.Name):
                            self.definitions[part.id] = node
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    self.imports[alias.asname or alias.name] = (node.module, alias.name)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    self.imports[alias.asname or alias.name] = (alias.name, None)


@dataclass
class FileWriter:
    """Collector of the definitions that some entries need, in reading order."""

    executed: Executed
    modules: dict[str, Module] = field(default_factory=dict)
    order: list[Name] = field(default_factory=list)
    imports: set[str] = field(default_factory=set)
    titles: dict[Name, str] = field(default_factory=dict)  # names in the file
    begun: set[Name] = field(default_factory=set)
    resolved: dict[tuple[str, str], "Name | str | None"] = field(default_factory=dict)

    def file(self, entries: list[Name]) -> str:
        """Return the text of all definitions, with the imports before them."""
        for entry in entries:
            self._visit(entry)
        names = [name for name in self.order if not self._is_alias(name) or self._alias_is_whole(name)]
        self.order = names
        self._choose_titles(entries)
        texts = [self._text(name, final=True) for name in names]
        texts = without_unused_types(without_unread_fields(texts))
        body = "\n\n\n".join(self._spaced(texts))
        shapes = sorted(word for word in SHAPES if re.search(rf"\b{word}\[", body))
        if shapes:
            other_shapes = [word for word in shapes if word != "Float"]
            body = (
                SHAPE_TEXT + ("\n\n\n" + " = ".join([*other_shapes, "Float"]) if other_shapes else "") + "\n\n\n" + body
            )
        used_imports = [
            line for line in {*self.imports, "import torch"} if line == "import torch" or self._is_used(line, body)
        ]
        return "\n".join(joined_imports(used_imports)) + "\n\n\n" + body + "\n"

    def _is_used(self, line: str, body: str) -> bool:
        return bool(re.search(rf"\b{re.escape(line.split()[-1])}\b", body))

    def _spaced(self, texts: list[str]) -> Iterator[str]:
        """Join neighbouring assignments, which need no empty lines between them."""
        group = list[str]()
        for text in texts:
            if re.match(r"(class|def|@)", text):
                if group:
                    yield "\n".join(group)
                group = []
                yield text
            else:
                group.append(text)
        if group:
            yield "\n".join(group)

    def module(self, name: str) -> Module:
        """Return a module, read once."""
        if name not in self.modules:
            self.modules[name] = Module(name)
        return self.modules[name]

    def resolve(self, module: str, name: str) -> Name | str | None:
        """Return the definition that a global name of a module refers to, or the import line of another package; None
        for a builtin. Each is looked for once."""
        if (module, name) not in self.resolved:
            self.resolved[module, name] = self._resolve(module, name)
        return self.resolved[module, name]

    def _resolve(self, module: str, name: str) -> Name | str | None:
        here = self.module(module)
        if name in here.definitions:
            return Name(module, name)
        if name not in here.imports:
            return None
        origin, original = here.imports[name]
        if not origin.startswith("keifu"):
            if original is None:
                return f"import {origin}" + (f" as {name}" if name != origin else "")
            return f"from {origin} import {original}" + (f" as {name}" if name != original else "")
        if original is None or find_spec_quietly(f"{origin}.{original}"):
            return Name(f"{origin}.{original}" if original else origin, "")  # a module
        return self.resolve(origin, original)

    def _visit(self, name: Name) -> None:
        if name in self.begun:
            return
        self.begun.add(name)
        text = self._text(name)
        hard, soft = self._needs(name, text)
        for need in (*hard, *soft):
            self._visit(need)
        self.order.append(name)

    def _text(self, name: Name, final: bool = False) -> str:
        """Return the executed part of a definition; final: with the names of the file."""
        module = self.module(name.module)
        node = module.definitions[name.name]
        replace = self._replacing(module, node) if final else lambda node, annotation: None
        pruner = Pruner(module.source, self.executed, replace, lambda node: self._does_nothing(module.name, node))
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            return pruner.assignment(node)
        text = pruner.text(node)
        if final and (title := self.titles.get(name, name.name)) != name.name:
            text = re.sub(rf"^((?:@.*\n)*(?:class|def) ){name.name}\b", rf"\g<1>{title}", text, count=1)
        return text

    def _does_nothing(self, module: str, node: ast.AST) -> bool:
        """Return whether a name is a function or class of keifu of which nothing was executed but raised errors."""
        target = self._target(module, node, set())
        if not isinstance(target, Name) or not target.name:
            return False
        origin = self.module(target.module)
        definition = origin.definitions[target.name]
        if isinstance(definition, ast.ClassDef):
            return not any(self.executed.within(origin.file, place_of(each)) for each in definition.body)
        if not isinstance(definition, ast.FunctionDef):
            return False
        text = Pruner(origin.source, self.executed).text(definition)
        body: list[ast.stmt] = ast.parse(text).body[0].body  # type: ignore[attr-defined]
        return not any(isinstance(each, ast.Return) or stores_outside(each) or calls(each) for each in body)

    def _replacing(self, module: Module, node: ast.AST) -> Callable[[ast.AST, bool], str | None]:
        """Return a function from a name or attribute of a definition to its new text, or None to keep it."""
        scopes = Scopes(node)

        def replace(reference: ast.AST, annotation: bool) -> str | None:
            target = self._target(module.name, reference, scopes.at(reference))
            if not isinstance(target, Name) or not target.name:
                return None
            if target == Name("keifu.errors", "UserError"):
                return "ValueError"
            if target.module == "keifu.ranges":
                return BARE.get(target.name, "float")
            if target not in self.titles:
                return "Any" if annotation or self._is_alias_node(node) else None
            title = self.titles[target]
            return None if isinstance(reference, ast.Name) and reference.id == title else title

        return replace

    def _is_alias_node(self, node: ast.AST) -> bool:
        return isinstance(node, (ast.Assign, ast.AnnAssign))

    def _target(self, module: str, node: ast.AST, local: set[str]) -> Name | str | None:
        """Return what a name, or an attribute of a module, refers to."""
        if isinstance(node, ast.Name):
            return None if node.id in local else self.resolve(module, node.id)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id not in local:
            outer = self.resolve(module, node.value.id)
            if isinstance(outer, Name) and not outer.name:
                return self.resolve(outer.module, node.attr)
        return None

    def _needs(self, name: Name, text: str) -> tuple[list[Name], list[Name]]:
        """Return the definitions that a text needs when it is defined, and those that it needs when it runs. Classes
        in annotations are not needed."""
        tree = ast.parse(text).body[0]
        scopes = Scopes(tree)
        hard, soft = dict[Name, None](), dict[Name, None]()
        for node, is_annotation, is_inside in uses(tree):
            target = self._target(name.module, node, scopes.at(node))
            if isinstance(target, str):
                if target.startswith("from jaxtyping"):
                    continue
                top = target.split()[1].split(".")[0]
                if top not in ("torch", *STANDARD):
                    raise UserError(f"{name.name} of {name.module} needs {top}, so that it cannot be one file.")
                self.imports.add(target)
            elif isinstance(target, Name) and target.name and target.module not in ("keifu.ranges", "keifu.errors"):
                if is_annotation and not self._is_alias(target):
                    self.imports.add("from typing import Any")
                else:
                    (soft if is_inside else hard)[target] = None
        return [*hard], [*soft]

    def _is_alias(self, name: Name) -> bool:
        """Return whether a definition is a name for a type, such as Hidden = Float[Tensor, "..."]."""
        node = self.module(name.module).definitions[name.name]
        if not isinstance(node, ast.Assign):
            return False
        value = node.value
        return isinstance(value, (ast.Subscript, ast.BinOp)) and not any(
            isinstance(part, (ast.Call, ast.Constant)) and not isinstance(getattr(part, "value", ""), str)
            for part in ast.walk(value)
        )

    def _alias_is_whole(self, name: Name) -> bool:
        """Return whether all classes that a type's name stands for are in the file."""
        node = self.module(name.module).definitions[name.name]
        assert isinstance(node, ast.Assign)
        targets = (self._target(name.module, part, set()) for part in ast.walk(node.value))
        inner = [target for target in targets if isinstance(target, Name) and target.name]
        return all(target in self.order or target.module == "keifu.ranges" for target in inner)

    def _choose_titles(self, entries: list[Name]) -> None:
        """Give definitions of the same name different ones, the entries first. Equal types become one."""
        name_of_title, texts, hidden = dict[str, Name](), dict[str, str](), self._hidden()
        for name in [*entries, *(each for each in self.order if each not in entries)]:
            title, text = name.name, re.sub(r"\s+", " ", self._text(name))
            if texts.get(title) == text and self._is_alias(name):
                self.titles[name] = title
                self.order.remove(name)
            else:
                self.titles[name] = longer(name) if title in name_of_title or name in hidden else title
                name_of_title[self.titles[name]], texts[title] = name, text

    def _hidden(self) -> set[Name]:
        """Return the definitions of which one that reads them by their module has a variable of the same name."""
        hidden = set[Name]()
        for name in self.order:
            node = self.module(name.module).definitions[name.name]
            scopes = Scopes(node)
            for part in ast.walk(node):
                if not isinstance(part, ast.Attribute):
                    continue
                local = scopes.at(part)
                target = self._target(name.module, part, local)
                if isinstance(target, Name) and target.name in local:
                    hidden.add(target)
        return hidden


def longer(name: Name) -> str:
    """Return a name with that of its module before it: LlamaConfig, llama_attention."""
    stem = name.module.rpartition(".")[2]
    if name.name[:1].isupper():
        return "".join(part.capitalize() for part in stem.split("_")) + name.name
    return f"{stem}_{name.name.lstrip('_')}"


STANDARD = {
    "math", "functools", "dataclasses", "typing", "collections", "itertools", "enum", "contextlib", "operator",
    "hashlib", "types", "re", "warnings", "json", "sys",
}  # fmt: skip


def find_spec_quietly(name: str) -> bool:
    """Return whether there is a module of this name."""
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def without_unread_fields(texts: list[str]) -> list[str]:
    """Remove fields of dataclasses that no text reads."""
    trees = [ast.parse(text) for text in texts]
    read_names = {part.attr for tree in trees for part in ast.walk(tree) if isinstance(part, ast.Attribute)}
    read_names |= {
        part.value
        for tree in trees
        for part in ast.walk(tree)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    }
    read_names |= {part.arg for tree in trees for part in ast.walk(tree) if isinstance(part, ast.keyword) and part.arg}
    return [
        without_lines(text, unread_lines(tree.body[0], read_names)) if is_dataclass(tree.body[0]) else text
        for text, tree in zip(texts, trees, strict=True)
    ]


def is_dataclass(node: ast.stmt) -> bool:
    """Return whether a statement defines a dataclass."""
    return isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(each) for each in node.decorator_list)


def unread_lines(node: ast.stmt, read_names: set[str]) -> set[int]:
    """Return the lines of a dataclass's fields that are not read."""
    assert isinstance(node, ast.ClassDef)
    fields = [each for each in node.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)]
    unread = [each for each in fields if each.target.id not in read_names]  # type: ignore[union-attr]
    if len(unread) == len(node.body):  # nothing but fields
        unread = unread[1:]
    names = {each.target.id for each in unread}  # type: ignore[union-attr]
    lines = {line for each in unread for line in range(each.lineno, (each.end_lineno or each.lineno) + 1)}
    return lines | lines_about(node, names)


def lines_about(node: ast.ClassDef, names: set[str]) -> set[int]:
    """Return the lines of a docstring's list of attributes that describe only these names."""
    first = node.body[0]
    if not (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and "Attributes:" in str(first.value.value)
    ):
        return set()
    lines, dropped, inside = set[int](), False, False
    for number, line in enumerate(str(first.value.value).split("\n"), first.lineno):
        inside = (inside or "Attributes:" in line) and bool(line.strip())
        if inside and (entry := re.match(r"\s+(\w+(?:, \w+)*): ", line)):
            dropped = set(entry[1].split(", ")) <= names
        if inside and dropped:
            lines.add(number)
    return lines


def without_unused_types(texts: list[str]) -> list[str]:
    """Remove names of types that no other text has."""
    remaining_texts = texts
    for text in texts:
        if name := re.match(r"(\w+) = [^(]*$", text):
            other_texts = "\n".join(other for other in remaining_texts if other is not text)
            if not re.search(rf"\b{name[1]}\b", other_texts):
                remaining_texts = [other for other in remaining_texts if other is not text]
    return remaining_texts


def without_lines(text: str, lines: set[int]) -> str:
    """Return a text without some of its lines, numbered from 1."""
    remaining_lines = [line for number, line in enumerate(text.split("\n"), 1) if number not in lines]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(remaining_lines)).rstrip()


def stores_outside(node: ast.AST) -> bool:
    """Return whether a statement changes anything but local variables."""
    return any(
        isinstance(part, (ast.Attribute, ast.Subscript)) and isinstance(part.ctx, ast.Store) for part in ast.walk(node)
    )


def calls(node: ast.AST) -> bool:
    """Return whether a statement is a call, such as one that changes its argument, or has an inner body."""
    is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    return is_call or isinstance(node, (ast.For, ast.While, ast.With, ast.If, ast.Try))


def joined_imports(lines: list[str]) -> list[str]:
    """Return import lines in order, with one line for each package."""
    joined = dict[str, list[str]]()
    for line in lines:
        package, _, name = line.partition(" import ")
        joined.setdefault(package, []).append(name)
    merged = [
        f"{package} import {', '.join(sorted(names))}" if names[0] else package for package, names in joined.items()
    ]
    return sorted(merged, key=import_order)


def import_order(line: str) -> tuple[bool, bool, str]:
    """Return a key that sorts imports: the standard library first, then torch."""
    return line.split()[1].startswith("torch"), line.startswith("from"), line.lower()


class Scopes:
    """Names that are local at each line of a definition: those of its function, or of its method."""

    def __init__(self, node: ast.AST):
        body = node.body if isinstance(node, ast.ClassDef) else [node]
        functions = [each for each in body if isinstance(each, ast.FunctionDef)]
        self.ranges = [(each.lineno, each.end_lineno or each.lineno, local_names(each)) for each in functions]
        self.rest = set[str]() if functions or isinstance(node, ast.ClassDef) else local_names(node)

    def at(self, node: ast.AST) -> set[str]:
        """Return the names that are local where a node is."""
        line = node.lineno  # type: ignore[attr-defined]
        return next((names for first, last, names in self.ranges if first <= line <= last), self.rest)


def local_names(node: ast.AST) -> set[str]:
    """Return the names that a definition binds within its functions: arguments, variables and inner functions."""
    names = set[str]()
    for part in ast.walk(node):
        if isinstance(part, (ast.FunctionDef, ast.Lambda)):
            arguments = part.args
            every = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg)
            names |= {argument.arg for argument in every if argument is not None}
            for inner in ast.walk(part):
                if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                    names.add(inner.id)
                elif isinstance(inner, ast.FunctionDef) and inner is not part:
                    names.add(inner.name)
        elif isinstance(part, ast.comprehension):
            names |= {inner.id for inner in ast.walk(part.target) if isinstance(inner, ast.Name)}
    return names


def uses(node: ast.AST, annotation: bool = False, inside: bool = False) -> Iterator[tuple[ast.AST, bool, bool]]:
    """Yield each name and attribute that is read, whether it is in an annotation, and whether it is in a function's
    body."""
    if isinstance(node, ast.Attribute) or (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)):
        yield node, annotation, inside
    for name, value in ast.iter_fields(node):
        typed = annotation or name in ("annotation", "returns")
        deeper = inside or (name == "body" and isinstance(node, (ast.FunctionDef, ast.Lambda)))
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, ast.AST):
                yield from uses(each, typed, deeper)
