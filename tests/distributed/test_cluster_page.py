"""docs/cluster.md: its shell and YAML are whole, and every option in it is one of `keifu train`."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from keifu.commands.shared import flags
from keifu.commands.shared.recipe_options import with_folder
from keifu.recipes.language.llama import Recipe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
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


def test_plans_for_this_machine_are_those_that_were_measured() -> None:
    """Each within a fifth, in time and in memory."""
    for name, found in json.loads((ROOT / "docs/results/data/plan.json").read_text()).items():
        pairs = ("planned_seconds", "seconds", "{:.3f}", 1.0), ("planned_bytes", "bytes", "{:.2f}", 1e9)
        cells = [name]
        for planned, measured, form, unit in pairs:
            ratio = found[planned] / found[measured]
            assert 0.8 <= ratio <= 1.2, name
            cells += [form.format(found[planned] / unit), form.format(found[measured] / unit), f"{ratio:.2f}"]
        assert f"| {' | '.join(cells)} |" in PAGE


def test_what_a_save_costs_is_what_was_measured() -> None:
    for found in json.loads((ROOT / "docs/results/data/saving.json").read_text()).values():
        cells = [f"{found[name]:.2f}" for name in ("step", "held_up", "longer")]
        assert f"| {' | '.join(cells)} |" in PAGE
