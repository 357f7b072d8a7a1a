"""The rules that keep the tree small and in order, read off its syntax; each is shown to be able to fail."""

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src"
MOST_FILES = 15  # in a folder, in addition to __init__.py
PARTS = {  # each part, and those it may import; a part may also import what those may
    "layers": {"torch, errors and ranges only"},
    "models": {"layers"},
    "data": {"floor"},
    "training": {"layers", "data"},
    "native": {"layers"},
    "inference": {"layers", "data", "native"},
    "distributed": {"layers", "training"},
    "eject": {"layers", "models"},
    "alignment": {"training", "inference"},
    "evaluation": {"training", "inference"},
    "checkpoints": {"models", "data", "native", "page"},
    "recipes": {"models", "checkpoints", "training", "inference", "alignment", "evaluation"},
    "page": {"floor"},
    "serving": {"inference", "checkpoints", "evaluation"},
    "commands": {"recipes", "serving", "distributed", "eject"},
    "cli": {"commands"},
    "interface": {"recipes"},
    "lm_eval": {"checkpoints", "evaluation"},
    "keifu": {"cli", "interface"},
    "__main__": {"cli"},
    "floor": set(),
}
FLOOR = {
    "devices", "errors", "files", "folders", "lineage", "locks", "memory", "processes", "ranges", "threads", 
    "untrusted", "__version__",
}  # fmt: skip


@dataclass(eq=False)
class File:
    """A source file: its module's name, its text, and that text parsed."""

    module: str
    text: str
    package: bool = False  # a folder's __init__.py

    @cached_property
    def tree(self) -> ast.Module:
        """Its syntax, parsed once."""
        return ast.parse(self.text)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """All nodes of the syntax, in the order of `ast.walk`."""
        return list(ast.walk(self.tree))

    @property
    def part(self) -> str:
        """The part of keifu it belongs to: `keifu.data.text.token_shards` to data, the package's own file to keifu."""
        return part_of(self.module)


def part_of(module: str) -> str:
    first = (module.split(".") + ["keifu"])[1]
    return "floor" if first in FLOOR else first


@cache
def source() -> list[File]:
    names = {path: ".".join(path.relative_to(SOURCE).with_suffix("").parts) for path in sorted(SOURCE.rglob("*.py"))}
    return [
        File(name.removesuffix(".__init__"), path.read_text(encoding="utf-8"), path.name == "__init__.py")
        for path, name in names.items()
    ]


def imports(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Yield every module that these nodes import; of `from a import b` both a and a.b, since b may be a module."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are written in full"
            yield from [node.module or ""] if node.module != "keifu" else []
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            name = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            if isinstance(name, ast.Constant):  # a name that is computed as a whole cannot be read here
                yield str(name.value).rstrip(".")


def may_import(part: str) -> set[str]:
    below = PARTS[part] & PARTS.keys()
    return {part, *below, *(lower for one in below for lower in may_import(one))}


def wrong_directions(files: list[File]) -> list[str]:
    """Return the imports of parts that are not below, lazy ones included, and forbidden imports of layers."""
    wrong = []
    for file in files:
        allowed = may_import(file.part) | ({"floor"} if file.part != "layers" else set())
        for name in imports(iter(file.nodes)):
            if name.startswith(("keifu.errors", "keifu.ranges")):
                continue
            if name == "keifu" or (name.startswith("keifu.") and part_of(name) not in allowed):
                wrong.append(f"{file.module} imports {name}")
            if file.part == "layers" and name.split(".")[0] in ("numpy", "transformers", "tokenizers", "safetensors"):
                wrong.append(f"{file.module} imports {name}")
    return wrong


def cycles(files: list[File]) -> list[str]:
    """Return files that, by imports at the head of modules, come back to themselves."""
    modules = {file.module for file in files}
    edges = {file.module: set(imports(iter(file.tree.body))) & modules - {file.module} for file in files}
    reached = {module: set(targets) for module, targets in edges.items()}
    while True:
        further = {m: targets.union(*(reached[t] for t in targets)) for m, targets in reached.items()}
        if further == reached:
            break
        reached = further
    return [module for module, targets in reached.items() if module in targets]


def pairs_of_files(files: list[File]) -> list[str]:
    """Return pairs of files that import each other, by imports inside functions too. A folder's __init__.py is free."""
    modules = {file.module for file in files if not file.package}
    imported = {file.module: set(imports(iter(file.nodes))) & modules for file in files if not file.package}
    return [f"{a} and {b}" for a, names in imported.items() for b in sorted(names) if a < b and a in imported[b]]


def functions(files: list[File]) -> dict[str, int]:
    """Return lines of every function from its `def` to its end, by module and name."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [(file, node) for file in files for node in file.nodes if isinstance(node, kinds)]
    return {f"{f.module}.{n.name}:{n.lineno}": (n.end_lineno or n.lineno) - n.lineno + 1 for f, n in found}


def long_files(files: list[File]) -> list[str]:
    counts = {file.module: len(file.text.splitlines()) for file in files}
    return [f"{module}: {lines} lines" for module, lines in counts.items() if lines > 500]


def long_functions(files: list[File]) -> list[str]:
    return [f"{name}: {lines} lines" for name, lines in functions(files).items() if lines > 60]


def crowded_folders(files: list[File]) -> list[str]:
    """Return folders with too many files."""
    counts = Counter(file.module.rpartition(".")[0] for file in files if not file.package)
    return [f"{folder}: {n} files" for folder, n in counts.items() if n > MOST_FILES]


def model_kinds(files: list[File]) -> tuple[set[str], set[str]]:
    """Return the names by which code could ask for a model's kind: classes of model files, and names of families."""
    own = [file for file in files if re.fullmatch(r"keifu\.models\.(?!hf|sizes)[a-z][\w.]*", file.module)]
    nodes = [node for file in own for node in file.nodes]
    classes = {node.name for node in nodes if isinstance(node, ast.ClassDef)}
    tables = [n.value for n in nodes if isinstance(n, ast.Assign) and names_in(n.targets[0]) == {"MODEL_TYPES"}]
    published = {key for table in tables for key in texts_in(table)}
    names = {"_".join(dict.fromkeys(file.module.split(".")[2:])) for file in own}
    return classes | {"DecoderLM"}, names | published


def names_in(node: ast.AST) -> set[str]:
    """Return the identifiers and attributes inside an expression."""
    inside = list(ast.walk(node))
    return {n.id for n in inside if isinstance(n, ast.Name)} | {n.attr for n in inside if isinstance(n, ast.Attribute)}


def texts_in(node: ast.AST) -> set[str]:
    return {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def asks_for_kind(node: ast.AST, classes: set[str], kinds: set[str]) -> bool:
    """Return whether an expression compares or tests the kind of a model: its class, its `model_type`, its family's
    name."""
    fields = {"model_type", "architectures", "family"}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "issubclass"):
        return bool(names_in(node.args[1]) & classes)
    if isinstance(node, ast.Compare):
        of_type = "type" in names_in(node) and names_in(node) & classes
        return bool(of_type or (names_in(node) | texts_in(node)) & fields or texts_in(node) & kinds)
    if isinstance(node, ast.Match):
        patterns = [case.pattern for case in node.cases]
        named = any(names_in(pattern) & classes or texts_in(pattern) & kinds for pattern in patterns)
        return named or bool((names_in(node.subject) | texts_in(node.subject)) & fields)
    return False


def branches_on_kind(files: list[File]) -> list[str]:
    """Return places outside checkpoints/ that ask which model they have.

    A model's file may read and write the dialects of its own published config: there, `to_published` and functions that
    take a `json` are free. In data, which can know no model, the names of families are those of their tokenizers.
    """
    classes, kinds = model_kinds(files)
    wrong = []
    for file in (file for file in files if file.part != "checkpoints"):
        own = [n for n in file.tree.body if isinstance(n, ast.FunctionDef) and file.part == "models"]
        translators = [n for n in own if n.name == "to_published" or "json" in {a.arg for a in n.args.args}]
        free = {id(inner) for translator in translators for inner in ast.walk(translator)}
        named = kinds if file.part != "data" else set()
        found = [n for n in file.nodes if id(n) not in free and asks_for_kind(n, classes, named)]
        wrong += [f"{file.module}:{node.lineno}" for node in found]
    return wrong


def unpickling(files: list[File]) -> list[str]:
    """Return the uses of pickle, of libraries that unpickle for others, and of torch.save and torch.load."""
    wrong = []
    for file in files:
        modules = {name.split(".")[0] for name in imports(iter(file.nodes))}
        wrong += [f"{file.module} imports {name}" for name in modules & {"pickle", "dill", "joblib", "shelve"}]
        calls = {ast.unparse(node) for node in file.nodes if isinstance(node, ast.Attribute)}
        wrong += [f"{file.module} uses {name}" for name in calls & {"torch.load", "torch.save"}]
    return wrong


def without_docstring(files: list[File]) -> list[str]:
    return [file.module for file in files if file.text.strip() and not ast.get_docstring(file.tree)]


def function(lines: int) -> str:
    return "def long():\n" + "    pass\n" * (lines - 1)


SHARED_NAMES = {"Config": "keifu.models.", "Recipe": "keifu.recipes.", "Options": "keifu.commands."}  # one in each file


def class_names_used_twice(files: list[File]) -> list[str]:
    """Return public classes of one name in several files; `SHARED_NAMES` are one form in every file of a folder."""
    modules: dict[str, list[str]] = defaultdict(list)
    for file in files:
        names = {node.name for node in file.tree.body if isinstance(node, ast.ClassDef)}
        for name in names:
            if not name.startswith("_") and not file.module.startswith(SHARED_NAMES.get(name, " ")):
                modules[name].append(file.module)
    return [f"{name}: {', '.join(where)}" for name, where in modules.items() if len(where) > 1]


BAD = {  # for each rule the smallest tree that breaks it
    wrong_directions: [File("keifu.layers.a", "def f():\n    from keifu.models import gpt2")],
    cycles: [File("keifu.data.a", "import keifu.data.b"), File("keifu.data.b", "from keifu.data import a")],
    pairs_of_files: [
        File("keifu.data.a", "def f():\n    import keifu.data.b"),
        File("keifu.data.b", "from keifu.data import a"),
    ],
    long_files: [File("keifu.a", "\n" * 501)],
    long_functions: [File("keifu.a", function(61))],
    crowded_folders: [File(f"keifu.data.a{number}", "") for number in range(MOST_FILES + 1)],
    branches_on_kind: [File("keifu.models.zebra", "class Zebra: ..."), File("keifu.data.a", "isinstance(y, Zebra)")],
    unpickling: [File("keifu.a", "import torch\ntorch.load(path)")],
    without_docstring: [File("keifu.a", "x = 1")],
    class_names_used_twice: [File("keifu.data.a", "class Config: ..."), File("keifu.data.b", "class Config: ...")],
}


@pytest.mark.parametrize("rule", BAD, ids=lambda rule: rule.__name__)
def test_tree_keeps_the_rule(rule) -> None:
    assert rule(source()) == []


@pytest.mark.parametrize("rule", BAD, ids=lambda rule: rule.__name__)
def test_rule_can_fail(rule) -> None:
    assert len(rule(BAD[rule])) >= 1


@pytest.mark.parametrize(
    "line",
    [
        "if config.model_type == 'x': pass",
        "y = 1 if config['model_type'] in ('x',) else 2",
        "y = name == 'zebra'",
        "y = type(model) is Zebra",
        "y = isinstance(model, (int, zebra.Zebra))",
        "match kind:\n    case 'zebra': pass",
        "match model:\n    case Zebra(): pass",
    ],
)
def test_each_way_to_ask_for_a_kind_is_seen(line: str) -> None:
    zebra = File("keifu.models.zebra", "class Zebra: ...")
    assert branches_on_kind([zebra, File("keifu.training.a", line)]) == ["keifu.training.a:1"]
    assert branches_on_kind([zebra, File("keifu.checkpoints.a", line)]) == []


def test_a_model_may_read_its_own_published_config_and_no_more() -> None:
    zebra = "class Zebra: ...\ndef {}: return {}['model_type'] == 'zebra'"
    assert branches_on_kind([File("keifu.models.zebra", zebra.format("from_published(json)", "json"))]) == []
    assert branches_on_kind([File("keifu.models.zebra", zebra.format("build(config)", "config"))]) != []
    assert branches_on_kind([File("keifu.training.a", zebra.format("from_published(json)", "json"))]) != []


def test_one_file_a_part() -> None:
    assert {file.part for file in source()} <= PARTS.keys()


@pytest.mark.parametrize("name", ["keifu", "keifu.recipes", "keifu.training.loop", "keifu.serving"])
def test_data_imports_nothing_above(name: str) -> None:
    assert wrong_directions([File("keifu.data.a", f"import {name}")]) == [f"keifu.data.a imports {name}"]


def test_the_floor_is_everyones() -> None:
    assert wrong_directions([File("keifu.data.a", "from keifu import files, __version__")]) == []
    assert wrong_directions([File("keifu.data.a", "from keifu import load")]) == ["keifu.data.a imports keifu.load"]
    for name in ("'keifu'", "'keifu.models.gpt2'", "f'keifu.models.{name}'"):
        lazy = File("keifu.data.a", f"def f(name):\n    return import_module({name}).load")
        assert len(wrong_directions([lazy])) == 1
