"""The wheel: what its build hook chooses, and an installed wheel that runs natively without a compiler."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from email import message_from_bytes
from pathlib import Path
from types import ModuleType
from zipfile import ZipFile

import pytest

import keifu

pytest.importorskip("hatchling", reason="it builds the wheel")
ROOT = Path(__file__).parents[2]
LARGEST = 95_000_000  # bytes of the packaged models' wheel
PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "keifu"
version = "1"
requires-python = ">=3.11"
[tool.hatch.build.targets.wheel]
packages = ["src/keifu"]
[tool.hatch.build.targets.wheel.hooks.custom]
path = "packaging/wheel.py"
"""


def load(name: str) -> ModuleType:
    """Return a module of the folder packaging."""
    spec = importlib.util.spec_from_file_location(f"packaging_{name}", ROOT / f"packaging/{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a project with this build hook and this compiler, whose source is one line."""
    for path in ("packaging/wheel.py", "src/keifu/native/compiler.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    (tmp_path / "src/keifu/__init__.py").write_text("")
    (tmp_path / "src/keifu/native/source").mkdir()
    (tmp_path / "src/keifu/native/source/small.cpp").write_text('extern "C" int answer() { return 42; }')
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    for name in ("KEIFU_WHEEL", "CXX"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def build(root: Path, to: Path, target: str = "wheel") -> subprocess.CompletedProcess[str]:
    """Build a wheel or a source distribution with the environment's variables."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(to)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


def wheel(root: Path) -> Path:
    """Return the only wheel that a build makes."""
    done = build(root, root / "made")
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (root / "made").glob("*.whl")
    return path


def prebuilt(path: Path) -> list[str]:
    return sorted(Path(name).suffix for name in ZipFile(path).namelist() if "/prebuilt/" in name)


@pytest.mark.parametrize("choice", ["native", ""])
def test_with_a_compiler_the_wheel_is_of_this_platform(project: Path, monkeypatch, choice: str) -> None:
    monkeypatch.setenv("KEIFU_WHEEL", choice)
    path = wheel(project)
    tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert path.name == f"keifu-1-py3-none-{tag}.whl"
    assert prebuilt(path) == [".sha256", ".so"]
    assert b"Root-Is-Purelib: false" in ZipFile(path).read("keifu-1.dist-info/WHEEL")


@pytest.mark.parametrize("choice, path", [("pure", None), ("", "/nowhere")])
def test_a_pure_wheel_if_asked_for_or_without_a_compiler(project: Path, monkeypatch, choice: str, path) -> None:
    monkeypatch.setenv("KEIFU_WHEEL", choice)
    if path:
        monkeypatch.setenv("PATH", path)
    made = wheel(project)
    assert made.name == "keifu-1-py3-none-any.whl" and prebuilt(made) == []


@pytest.mark.parametrize(
    "choice, source, said",
    [("native", "int wrong(", "did not build it"), ("natively", "", "KEIFU_WHEEL is 'natively': give native, pure")],
)
def test_what_cannot_be_built_is_an_error(project: Path, monkeypatch, choice: str, source: str, said: str) -> None:
    monkeypatch.setenv("KEIFU_WHEEL", choice)
    (project / "src/keifu/native/source/small.cpp").write_text(source)
    done = build(project, project / "made")
    assert done.returncode != 0 and said in done.stdout + done.stderr
    assert not list((project / "made").glob("*.whl"))


def test_the_name_is_the_one_that_is_looked_for(project: Path) -> None:
    made = load("wheel").compiled(project, project)
    assert made.stem == load("wheel").load_compiler(project).source_key()
    (project / "src/keifu/native/source/small.h").write_text("// more")
    assert made.stem != load("wheel").load_compiler(project).source_key()


def test_links_of_the_long_description() -> None:
    absolute_links = load("metadata").absolute_links
    text = "[a](docs/a.md) ![b](docs/b.png) [c](https://c.org) [d](#d) [![e](docs/e.svg)](docs/e.md)"
    assert absolute_links(text, "") == "a  [c](https://c.org) [d](#d) "
    address = "https://example.org/o/keifu"
    found = absolute_links(text, address)
    assert f"[a]({address}/blob/main/docs/a.md) ![b]({address}/raw/main/docs/b.png) [c](https://c.org)" in found
    assert found.endswith(f"[![e]({address}/raw/main/docs/e.svg)]({address}/blob/main/docs/e.md)")
    assert load("metadata").urls("") == {} and load("metadata").urls(address)["Issues"] == f"{address}/issues"


@pytest.fixture(scope="module")
def pure(tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    """Build the wheel of this tree for any platform."""
    folder = tmp_path_factory.mktemp("pure")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("KEIFU_WHEEL", "pure")
        done = build(ROOT, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    assert path.name == f"keifu-{keifu.__version__}-py3-none-any.whl"
    return ZipFile(path)


def test_the_wheel_has_all_files_of_the_package_and_nothing_else(pure: ZipFile) -> None:
    sources = {path.relative_to(ROOT / "src") for path in (ROOT / "src/keifu").rglob("*") if path.is_file()}
    wanted = {path.as_posix() for path in sources if "__pycache__" not in path.parts}
    for pattern in ("examples/single/*.*", "docs/pictures/**/*.*", "docs/lineage/lineage.json"):
        shown = {f"keifu/{path.relative_to(ROOT).as_posix()}" for path in ROOT.glob(pattern)}
        assert shown
        wanted |= shown
    information = f"keifu-{keifu.__version__}.dist-info/"
    names = {name for name in pure.namelist() if not name.startswith(information)}
    assert names == wanted
    assert f"{information}licenses/LICENSE" in pure.namelist()
    assert sum(entry.compress_size for entry in pure.infolist()) <= LARGEST / 10


def test_the_metadata_of_the_wheel(pure: ZipFile) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    metadata = message_from_bytes(pure.read(f"keifu-{keifu.__version__}.dist-info/METADATA"))
    assert metadata["Version"] == keifu.__version__ and metadata["License-Expression"] == project["license"]
    assert metadata["Requires-Python"] == project["requires-python"]
    assert {*metadata.get_all("Classifier", [])} >= {*project["classifiers"]}
    assert {*metadata.get_all("Provides-Extra", [])} == {*project["optional-dependencies"]}
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert len(required) == len(project["dependencies"])
    description = str(metadata.get_payload())
    assert description.startswith("# keifu") and re.findall(r"\]\((?!https?://)[^)]*\)", description) == []


def test_the_source_distribution_builds_the_same_wheel(pure: ZipFile, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("KEIFU_WHEEL", "pure")
    done = build(ROOT, tmp_path, "sdist")
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path, filter="data")
    again = ZipFile(wheel(tmp_path / archive.name.removesuffix(".tar.gz")))
    contents = [{name: made.read(name) for name in made.namelist()} for made in (pure, again)]
    assert contents[0] == contents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a virtual environment with the two wheels, which uses the dependencies of this one."""
    folder = tmp_path_factory.mktemp("installed")
    for root in (ROOT, ROOT / "pretrained"):
        done = build(root, folder / "dist")
        assert done.returncode == 0, done.stdout + done.stderr
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    wheels = list((folder / "dist").glob("*.whl"))
    options = ["--quiet", "--no-deps", "--no-index", *map(str, wheels)]
    subprocess.run([python, "-m", "pip", "install", *options], check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}))
    site.joinpath("dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return folder


def run(installed: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the environment, whose PATH has no compiler, git or make."""
    programs = installed / "venv/bin"
    settings = {"PATH": str(programs), "KEIFU_CACHE": str(installed / "cache"), "HOME": str(installed)}
    return subprocess.run([programs / command[0], *command[1:]], env=settings, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the programs of an environment are in another folder")
def test_an_installed_wheel_runs_natively_without_a_compiler(installed: Path) -> None:
    sizes = {path.name.split("-")[0]: path.stat().st_size for path in (installed / "dist").glob("*.whl")}
    assert sizes["keifu_pretrained"] <= LARGEST and sizes["keifu"] <= LARGEST / 10
    where = run(installed, "python", "-c", "import keifu.native.library as b; print(b.__file__, b.prebuilt())")
    assert where.stdout.count(str(installed / "venv")) == 2, where.stderr
    said = run(installed, "keifu", "generate", "gpt-en", "The city of", "--max-tokens", "8")
    assert said.returncode == 0 and said.stdout.strip(), said.stderr
    assert "PyTorch generates" not in said.stderr and "Building" not in said.stderr
    english = run(installed, "keifu", "translate", "ja-en", "この川の水はとても冷たい。").stdout.strip()
    assert english == "This river is very cold."
    assert not (installed / "cache/native").exists()
    assert run(installed, "keifu", "lineage").returncode == 0
    assert "class" in run(installed, "keifu", "eject", "gpt2").stdout
