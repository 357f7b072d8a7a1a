"""The central part of a single-file edition on the page of its landmark: `python docs/_site/singles.py` renews it.

A page has the mark `<!-- part of FILE: NAME, NAME -->` before a block of code; a name is a function, a class or a
method (`Class.method`) of the file.
"""

import ast
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
MARK = re.compile(r"(?ms)^<!-- part of ([\w/.]+): ([\w., ]+) -->\n(?:\n```py\n.*?^```\n)?")


def definition(source: str, name: str) -> str:
    """Return the lines of a function, class or method with its decorators, without indentation."""
    body = ast.parse(source).body
    for part in name.split("."):
        named = [node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == part]
        if not named:
            raise ValueError(f"The file defines no {name!r}.")
        body = named[0].body
    first = min([named[0].lineno, *(decorator.lineno for decorator in named[0].decorator_list)])
    return textwrap.dedent("\n".join(source.splitlines()[first - 1 : named[0].end_lineno]))


def fill(page: str) -> str:
    """Return a page whose marked blocks have the code of the files that they name."""

    def block(found: re.Match[str]) -> str:
        source = (ROOT / found[1]).read_text(encoding="utf-8")
        code = "\n\n\n".join(definition(source, name.strip()) for name in found[2].split(","))
        return f"<!-- part of {found[1]}: {found[2]} -->\n\n```py\n{code}\n```\n"

    return MARK.sub(block, page)


if __name__ == "__main__":
    for path in sorted((ROOT / "docs").rglob("*.md")):
        page = path.read_text(encoding="utf-8")
        if fill(page) != page:
            path.write_text(fill(page), encoding="utf-8")
            print(path.relative_to(ROOT))
