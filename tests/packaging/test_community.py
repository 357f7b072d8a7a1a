"""Files that a host of repositories reads: workflows, templates, labels, citation, and one place for the address."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

import keifu

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
PAGES = [*ROOT.glob("*.md"), ROOT / "CITATION.cff", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
ADDRESS = re.compile(r"git clone|github\.com/[\w-]+/keifu", re.IGNORECASE)


def read(path: str | Path):
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_the_citation_is_of_this_version() -> None:
    citation = read("CITATION.cff")
    assert citation["version"] == keifu.__version__
    heading = f"## [{keifu.__version__}] - {citation['date-released']}"
    assert heading in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    zenodo = json.loads((ROOT / ".zenodo.json").read_text(encoding="utf-8"))
    assert zenodo["title"] == citation["title"] and zenodo["license"] == citation["license"]
    address = PROJECT["tool"]["keifu"]["repository"]
    assert citation.get("repository-code", "") == address, f"give CITATION.cff the line repository-code: {address}"


def test_the_wheel_of_packaged_models_has_the_licences_of_their_cards_and_no_link_into_the_checkout() -> None:
    text = (ROOT / "pretrained/pyproject.toml").read_text(encoding="utf-8")
    licences = {name.lower() for name in tomllib.loads(text)["project"]["license"].split(" AND ")}
    cards = (ROOT / "pretrained/src/keifu_pretrained").glob("*/README.md")
    assert licences == {yaml.safe_load(card.read_text(encoding="utf-8").split("---\n")[1])["license"] for card in cards}
    assert re.search(r"\]\((?!https://)", (ROOT / "pretrained/README.md").read_text(encoding="utf-8")) is None


def test_no_page_has_an_address_of_its_own() -> None:
    address = PROJECT["tool"]["keifu"]["repository"]
    for page in PAGES:
        found = ADDRESS.search(page.read_text(encoding="utf-8").replace(address or "-", ""))
        assert found is None, f"{page}: {found}"


@pytest.mark.parametrize("text", ["git clone URL", "see https://github.com/someone/keifu"])
def test_an_address_would_be_seen(text: str) -> None:
    assert ADDRESS.search(text)


def test_templates_use_labels_that_there_are() -> None:
    labels = {label["name"] for label in read(".github/labels.yml")}
    forms = [read(path) for path in sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")) if path.stem != "config"]
    assert len(forms) == 3
    assert {label for form in forms for label in form["labels"]} <= labels


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_names_files_that_there_are(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert "uses" in job or job["timeout-minutes"] <= 120
        steps = [step.get("run", "") for step in job.get("steps", [])]
        names = re.findall(r"(?:tests|packaging|src)/[\w/]+\.py|\.ci/run", " ".join(steps))
        assert [name for name in names if not (ROOT / name).exists()] == []
        assert (ROOT / job.get("uses", "README.md")).exists()


def test_the_matrix_begins_at_the_oldest_versions() -> None:
    matrix = read(".github/workflows/ci.yml")["jobs"]["matrix"]["strategy"]["matrix"]
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert matrix["python"][0] == oldest
    torch = next(each for each in PROJECT["project"]["dependencies"] if each.startswith("torch>="))
    assert matrix["torch"][0] == torch.replace(">=", "==") + ".*"
    tested = {*matrix["python"], *(each["python"] for each in matrix["include"])}
    named = {line.split(" :: ")[-1] for line in PROJECT["project"]["classifiers"] if "Python :: 3." in line}
    assert tested == named
