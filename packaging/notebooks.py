"""Make the notebooks (.ipynb, without outputs) from the percent scripts of examples/notebooks: run this file.

The second cell installs keifu if it is missing: from the repository's address (`tool.keifu.repository` of
pyproject.toml), or from the checkout that the notebook is in as long as there is no address. It never installs a name
from a package index, because anybody could register that name. With an address a badge opens the notebook in Colab.
"""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples/notebooks"
CELL = re.compile(r"(?m)^# %%( \[markdown\])?$")
COLAB = "https://colab.research.google.com/"
BADGE = f"[![Open in Colab]({COLAB}assets/colab-badge.svg)]"
LOCAL = "Run this notebook in Jupyter or VS Code, from a checkout of keifu."
FROM_ADDRESS = """\
# keifu, if it is not there yet; a GPU is not needed
import importlib.util

if importlib.util.find_spec("keifu") is None:
    %pip install --quiet git+ADDRESS"""
FROM_CHECKOUT = """\
# keifu, if it is not there yet, from the checkout that this notebook is in; a GPU is not needed
import importlib.util
from pathlib import Path

if importlib.util.find_spec("keifu") is None:
    checkouts = [folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "src/keifu").is_dir()]
    if not checkouts:
        raise ImportError("keifu is not installed. Open this notebook inside a checkout of keifu.")
    %pip install --quiet "{checkouts[0]}"
"""


def notebook(script: str, name: str, address: str) -> str:
    """Return the notebook of a percent script as JSON."""
    parts = CELL.split(script)
    cells = [cell(mark is not None, text) for mark, text in zip(parts[1::2], parts[2::2], strict=True)]
    github = re.fullmatch(r"https://github\.com/([^/]+/[^/]+)", address)
    colab = f"{BADGE}({COLAB}github/{github[1]}/blob/main/examples/notebooks/{name}.ipynb)" if github else LOCAL
    install = FROM_ADDRESS.replace("ADDRESS", address) if address else FROM_CHECKOUT.rstrip()
    first = {"cell_type": "markdown", "metadata": {}, "source": lines(colab)}
    cells = [first, cells[0], code(install), *cells[1:]]
    for number, each in enumerate(cells):
        each["id"] = f"cell-{number}"
    language = {"language_info": {"name": "python"}, "kernelspec": {"display_name": "Python 3", "name": "python3"}}
    content = {"cells": cells, "metadata": language, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, ensure_ascii=False, indent=1, sort_keys=True) + "\n"


def cell(is_text: bool, content: str) -> dict[str, Any]:
    """Return a cell of text, without its comment signs, or of code."""
    if not is_text:
        return code(content.strip("\n"))
    text = re.sub(r"(?m)^# ?", "", content.strip("\n"))
    return {"cell_type": "markdown", "metadata": {}, "source": lines(text)}


def code(content: str) -> dict[str, Any]:
    """Return a cell of code that has not run."""
    return {
        "cell_type": "code",
        "metadata": {},
        "execution_count": None,
        "outputs": [],
        "source": lines(content),
    }


def lines(text: str) -> list[str]:
    """Return lines with their ends, as the format wants them."""
    return text.splitlines(keepends=True)


def repository() -> str:
    """Return the repository's address, as the metadata of the wheel has it."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["keifu"]["repository"].rstrip("/")


def made(script: Path) -> str:
    """Return the notebook of a script of the folder."""
    return notebook(script.read_text("utf-8"), script.stem, repository())


def main() -> None:
    """Write all notebooks."""
    for script in sorted(FOLDER.glob("*.py")):
        script.with_suffix(".ipynb").write_text(made(script), "utf-8")
        print(script.with_suffix(".ipynb").relative_to(ROOT))


if __name__ == "__main__":
    main()
