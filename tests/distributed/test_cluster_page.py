"""docs/cluster.md: its shell and YAML are whole, and every option in it is one of `keifu train`."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from keifu.commands.shared import flags
from keifu.commands.train import with_folder
from keifu.recipes.language.llama import Recipe

PAGE = (Path(__file__).parents[2] / "docs/cluster.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("script", [text for kind, text in BLOCKS if kind == "bash"])
def test_scripts_are_whole(script: str) -> None:
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert "#SBATCH --nodes=2" in script


@pytest.mark.parametrize("text", [text for kind, text in BLOCKS if kind == "yaml"])
def test_manifests_name_what_they_are(text: str) -> None:
    found = yaml.safe_load(text)
    assert {"apiVersion", "kind", "metadata", "spec"} <= found.keys()
    assert found["kind"] in ("PyTorchJob", "JobSet") and "keifu" in text


def test_every_option_is_one_of_train() -> None:
    known = set(flags.flags(with_folder(Recipe, "llama")))
    own = set(re.findall(r"(?<![\w-])--(?:mesh\.[\w-]+|processes|restarts|resume|out|data)\b", PAGE))
    assert len(own) > 8 and own <= known
