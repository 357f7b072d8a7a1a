"""The Dockerfile, the workflow and the pre-commit hooks ask for files and commands that there are."""

import json
import os
import re
import shlex
import tomllib
from pathlib import Path

import yaml

from keifu.cli import parse

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")


def instructions(name: str) -> list[str]:
    return re.findall(rf"(?m)^{name} (.*)$", DOCKERFILE)


def is_copied(path: str, copied: list[str]) -> bool:
    return any(path == each or path.startswith(f"{each}/") for each in copied)


def test_the_image_has_what_the_wheel_is_built_from() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    copied = [each.removeprefix("./").rstrip("/") for line in instructions("COPY") for each in line.split()[:-1]]
    hooks = [project["tool"]["hatch"]["metadata"]["hooks"], wheel["hooks"]]
    needed = [*wheel["force-include"], *wheel["packages"], "pyproject.toml", "README.md"]
    needed += [hook["custom"]["path"] for hook in hooks]
    assert [path for path in needed if not is_copied(path, copied)] == []
    assert [path for path in copied if not (ROOT / path).exists()] == []


def test_a_file_that_is_not_copied_would_be_seen() -> None:
    assert is_copied("docs/pictures", ["src", "docs/pictures"]) and is_copied("src/keifu", ["src"])
    assert not is_copied("docs/pictures", ["docs/pictures.md", "docs/lineage"])


def test_the_image_runs_commands_that_there_are() -> None:
    (entry,), (default,) = instructions("ENTRYPOINT"), instructions("CMD")
    runs = [line for line in instructions("RUN") if line.startswith("keifu ")]
    assert runs
    for words in [[*json.loads(entry), *json.loads(default)], *map(shlex.split, runs)]:
        assert words[0] == "keifu"
        assert callable(parse(words[1:]))


def test_the_workflow_runs_a_script_that_there_is() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    (script,) = [step["run"] for step in workflow["jobs"]["run"]["steps"] if "run" in step]
    assert os.access(ROOT / script, os.X_OK)


def test_hooks_name_tests_that_there_are() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    files = [word for hook in hooks for word in hook["entry"].split() if word.startswith("tests/")]
    assert files and [name for name in files if not (ROOT / name).is_file()] == []
