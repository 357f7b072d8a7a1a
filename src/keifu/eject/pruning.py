"""The source text of a definition without what was not executed: branches, methods and operands of `and` and `or`."""

import ast
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import NamedTuple

from keifu.eject.executed import Executed, Place

Replace = Callable[[ast.AST, bool], str | None]  # a name or attribute, and whether it is in an annotation → new text


class Edit(NamedTuple):
    """Text in the place of a range of characters."""

    start: int
    end: int
    text: str


class ModuleText:
    """Text of a module, with its tree, and the characters at which its lines begin."""

    def __init__(self, file: str, text: str):
        self.file, self.text, self.tree = file, text, ast.parse(text)
        self.lines = text.splitlines(keepends=True)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))

    def offset(self, line: int, column: int) -> int:
        """Return the index of a character. `ast` counts columns in bytes of UTF-8."""
        encoded = self.lines[line - 1].encode()[:column]
        return self.starts[line - 1] + len(encoded.decode())

    def span(self, node: ast.AST) -> tuple[int, int]:
        """Return the first index of a node, with its decorators, and the index after it."""
        place = place_of(node)
        return self.offset(place.line, place.column), self.offset(place.end_line, place.end_column)


def place_of(node: ast.AST) -> Place:
    """Return the place of a node, with its decorators."""
    statement: ast.stmt = node  # type: ignore[assignment]
    assert statement.end_lineno is not None and statement.end_col_offset is not None
    first, column = statement.lineno, statement.col_offset
    if decorators := getattr(node, "decorator_list", None):
        first, column = decorators[0].lineno, decorators[0].col_offset - 1
    return Place(first, column, statement.end_lineno, statement.end_col_offset)


class Pruner:
    """Writer of the executed part of definitions."""

    def __init__(
        self, source: ModuleText, executed: Executed, replace: Replace = lambda node, annotation: None,
        unused: Callable[[ast.AST], bool] = lambda node: False,
    ):  # fmt: skip
        self.source, self.executed, self.replace, self.unused = source, executed, replace, unused

    def text(self, node: ast.stmt) -> str:
        """Return the text of a definition of the module."""
        start, end = self.source.span(node)
        return self._tidy(self._apply(start, end, [*self._edits(node)]) + self._remark(end))

    def assignment(self, node: ast.stmt) -> str:
        """Return the text of an assignment of the module."""
        start, end = self.source.span(node)
        return self._tidy(self._apply(start, end, [*self._children(node, False)]) + self._remark(end))

    def _remark(self, end: int) -> str:
        """Return the remark at the end of a line."""
        line_end = self.source.text[end : self.source.text.find("\n", end)]
        return line_end if line_end.lstrip().startswith("#") else ""

    @staticmethod
    def _tidy(text: str) -> str:
        """Remove remarks for tools, and empty lines that have become superfluous."""
        text = re.sub(r"  # (fmt: skip|noqa.*|type: ignore.*)$", "", text, flags=re.M)
        return re.sub(r"\n{3,}", "\n\n", text).rstrip()

    def _apply(self, start: int, end: int, edits: list[Edit]) -> str:
        pieces, position = list[str](), start
        for edit in sorted(edits):
            pieces += [self.source.text[position : edit.start], edit.text]
            position = edit.end
        return "".join([*pieces, self.source.text[position:end]])

    def _ran(self, node: ast.AST) -> bool:
        return self.executed.within(self.source.file, place_of(node))

    def _times(self, node: ast.AST) -> int:
        return self.executed.times(self.source.file, place_of(node))

    def _edits(self, node: ast.AST, annotation: bool = False) -> Iterator[Edit]:
        """Yield the edits within a node that is kept."""
        if isinstance(node, (ast.Name, ast.Attribute)) and (new := self.replace(node, annotation)) is not None:
            yield Edit(*self.source.span(node), new)
        elif isinstance(node, ast.Dict):
            yield from self._entries(node)
        elif isinstance(node, ast.IfExp) and self._ran(node.test) and (one := self._only(node.body, node.orelse)):
            yield Edit(*self.source.span(node), self._inner(one))
        elif isinstance(node, ast.BoolOp) and self._ran(node.values[0]):
            ran = [value for value in node.values if self._ran(value)]
            yield from (edit for value in ran for edit in self._edits(value))
            if len(ran) < len(node.values):
                yield Edit(self.source.span(ran[-1])[1], self.source.span(node)[1], "")
        else:
            yield from self._children(node, annotation)

    def _renamed(self, node: ast.AST, annotation: bool) -> Iterator[Edit]:
        """Yield the edits of a node of which nothing is left out."""
        if isinstance(node, (ast.Name, ast.Attribute)) and (new := self.replace(node, annotation)) is not None:
            yield Edit(*self.source.span(node), new)
            return
        for name, value in ast.iter_fields(node):
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, ast.AST):
                    yield from self._renamed(each, annotation or name in ("annotation", "returns"))

    def _entries(self, node: ast.Dict) -> Iterator[Edit]:
        """Yield the edits of a table: entries whose function or class was never used are left out."""
        pairs = [(key, value) for key, value in zip(node.keys, node.values, strict=True) if key is not None]
        if len(pairs) < len(node.keys):  # it spreads another table, of which nothing is known
            yield from self._children(node, False)
            return
        if node.lineno == node.end_lineno and any(self.unused(value) for _, value in pairs):
            used_entries = [
                f"{self._inner(key)}: {self._inner(value)}" for key, value in pairs if not self.unused(value)
            ]
            yield Edit(*self.source.span(node), f"{{{', '.join(used_entries)}}}")
            return
        for key, value in pairs:
            if self.unused(value):
                end = self.source.text.find("\n", self.source.span(value)[1]) + 1
                yield Edit(self.source.starts[key.lineno - 1], end, "")
            else:
                yield from (edit for each in (key, value) for edit in self._edits(each))

    def _only(self, body: ast.AST, orelse: ast.AST) -> ast.AST | None:
        """Return the only one of two nodes that was executed; None if both or neither were."""
        ran = [node for node in (body, orelse) if self._ran(node)]
        return ran[0] if len(ran) == 1 else None

    def _inner(self, node: ast.AST) -> str:
        return self._apply(*self.source.span(node), [*self._edits(node)])

    def _children(self, node: ast.AST, annotation: bool) -> Iterator[Edit]:
        for name, value in ast.iter_fields(node):
            typed = annotation or name in ("annotation", "returns")
            if isinstance(value, ast.AST):
                yield from self._edits(value, annotation=typed)
            elif isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                yield from self._block(node, value)
            elif isinstance(value, list):
                for each in value:
                    if isinstance(each, ast.AST):
                        yield from self._edits(each, annotation=typed)

    def _block(self, parent: ast.AST, statements: list[ast.stmt]) -> Iterator[Edit]:
        """Yield the edits of a body: statements without an executed instruction are left out."""
        in_class = isinstance(parent, ast.ClassDef)
        is_empty, edits = True, list[Edit]()
        for number, statement in enumerate(statements):
            kept_edits = self._statement(statement, in_class, number == 0)
            if kept_edits is None:
                edits.append(Edit(*self._lines(statement), ""))
            else:
                edits += kept_edits
                is_empty = False
        if is_empty:
            edits = [Edit(self.source.span(statements[0])[0], self.source.span(statements[-1])[1], "pass")]
        yield from edits

    def _statement(self, statement: ast.stmt, in_class: bool, first: bool) -> list[Edit] | None:
        """Return the edits of a statement, or None if it is left out."""
        is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        if is_text and first:
            return []
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)) and in_class:
            body = statement.body
            if any(map(self._ran, body)):
                return [*self._children(statement, False)]
            # objects that a module makes when it is imported are not recorded
            return [*self._renamed(statement, False)] if statement.name == "__init__" else None
        if in_class:
            return [*self._children(statement, False)]
        if isinstance(statement, ast.Assert) or not self._ran(statement):
            return None if not isinstance(statement, (ast.Nonlocal, ast.Global, ast.Pass)) else []
        if isinstance(statement, ast.If):
            return self._choice(statement)
        if (
            isinstance(statement, ast.Expr)
            and isinstance(statement.value, ast.Call)
            and self.unused(statement.value.func)
        ):
            return None  # a check that found nothing
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            edits = [*self._children(statement, False)]
            start, end = self.source.span(statement)
            target, _, right = self._apply(start, end, edits).partition(" = ")
            return None if target == right else edits
        return [*self._children(statement, False)]

    def _choice(self, node: ast.If) -> list[Edit] | None:
        """Return the edits of an `if`: one of its bodies in its place if the other one was never executed."""
        body, orelse = self._remains(node.body), self._remains(node.orelse)
        if not body and not orelse:
            return None
        if body and orelse:
            return [*self._children(node, False)]
        if body and self._times(node.test) > self._times(node.body[0]):
            edits = [*self._edits(node.test), *self._block(node, node.body)]
            end = self.source.span(node.body[-1])[1]
            return [*edits, Edit(end, self.source.span(node)[1], "")] if node.orelse else edits
        names = [part for part in ast.walk(node.test) if isinstance(part, ast.NamedExpr)]
        if names and body:
            return [*self._children(node, False)]
        statements = node.body if body else node.orelse
        start = self.source.span(node)[0]
        line_start = self.source.starts[node.lineno - 1]
        indent = self.source.text[line_start:start]
        elif_ = self.source.text[start:].startswith("elif")
        inner = indent + "    " * elif_
        text = self._body_text(statements, inner)
        return [Edit(start, self.source.span(node)[1], f"else:\n{inner}{text}" if elif_ else text)]

    def _remains(self, statements: list[ast.stmt]) -> bool:
        """Return whether any of the statements was executed and does something."""
        return any(self._ran(each) and self._statement(each, False, False) is not None for each in statements)

    def _body_text(self, statements: list[ast.stmt], indent: str) -> str:
        """Return the text of a body at another indentation, without the spaces before its first line."""
        first = statements[0]
        if isinstance(first, ast.If) and len(statements) == 1 and self._begins(first, "elif"):
            edits = self._choice(first)
            start, end = self.source.span(first)
            text = self._apply(start, end, edits or [])
            return text.removeprefix("el") if text.startswith("elif") else text.removeprefix("else:\n").lstrip()
        begin = self.source.starts[first.lineno - 1]
        if self.source.text[begin : self.source.span(first)[0]].strip():  # on the line of its `if`
            begin = self.source.span(first)[0]
        end = self.source.span(statements[-1])[1]
        text = self._apply(begin, end, [*self._block(first, statements)])
        return textwrap.indent(textwrap.dedent(text), indent).strip()

    def _begins(self, node: ast.AST, word: str) -> bool:
        return self.source.text[self.source.span(node)[0] :].startswith(word)

    def _lines(self, statement: ast.stmt) -> tuple[int, int]:
        """Return the range of whole lines of a statement, with a remark above it and empty lines before it."""
        start, end = self.source.span(statement)
        line = place_of(statement).line
        if not self.source.text[self.source.starts[line - 1] : start].strip():
            while line > 1 and self.source.lines[line - 2].lstrip().startswith("#"):
                line -= 1
            while line > 1 and not self.source.lines[line - 2].strip():
                line -= 1
            start = self.source.starts[line - 1]
            newline = self.source.text.find("\n", end)
            end = len(self.source.text) if newline < 0 else newline + 1
        return start, end
