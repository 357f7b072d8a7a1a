"""What a run leaves and shows: metrics, recipe, samples, the report, the cost said before, and the progress."""

import io
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from training_toys import Sequences, objective, run, settings, toy, weights

from keifu import devices
from keifu.errors import UserError
from keifu.files import sha256
from keifu.models import gpt2
from keifu.training.hardware import cost, flops, precision
from keifu.training.length import Length
from keifu.training.loop import train
from keifu.training.objectives import language_modeling
from keifu.training.optim.optimizers import Optimizers
from keifu.training.run import checkpoint, metrics, progress
from keifu.training.run.report import Curve, chart, write_report
from keifu.training.trainer import Trainer

CPU = torch.device("cpu")


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(file, "png")
    return file.getvalue()


def sample(step: int) -> str | bytes:
    return f"<b>step {step}</b> & 日本語" if step < 12 else picture()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, drawn_curves) -> Path:
    """Return a finished run with texts, pictures, data and a title that HTML must escape."""
    directory = tmp_path_factory.mktemp("run")
    about = {"title": "Counting <fast>", "paper": "Nobody (2026)", "command": "keifu train toy"}
    about |= {"data": [{"name": "counting", "licence": "CC0", "attribution": "J. Doe & co"}]}
    where = run(directory, options={"model": {"dim": 8, "tied": False}})
    where = type(where)(**vars(where) | {"about": about})

    def save(place: Path) -> None:
        (place / "model.safetensors").write_bytes(b"weights")

    with drawn_curves():
        train(toy(), objective, Sequences(), settings(sample_every=4), where, sample, save)
    return directory


def test_metrics_have_every_figure(folder: Path) -> None:
    lines = metrics.read(folder)
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [2, 4, 6, 8, 10, 12]
    names = {"step", "loss", "accuracy", "learning_rate", "gradient_norm", "tokens_per_second"}
    assert names | {"flops_utilisation", "seconds"} == training[0].keys()
    validation = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in validation] == [0, 4, 8, 12], "also before the first step"
    for line in validation:
        assert line["bits_per_byte"] == pytest.approx(line["validation_loss"] / math.log(2) / 1.5)


def test_the_loss_is_the_mean_over_the_steps_since_the_last_line(tmp_path: Path) -> None:
    every, second = tmp_path / "every", tmp_path / "second"
    for directory, log_every in ((every, 1), (second, 2)):
        train(toy(), objective, Sequences(), settings(log_every=log_every), run(directory))
    single = [line["loss"] for line in metrics.read(every) if "loss" in line]
    double = [line["loss"] for line in metrics.read(second) if "loss" in line]
    assert double == pytest.approx([(a + b) / 2 for a, b in zip(single[::2], single[1::2], strict=True)], rel=1e-5)


def test_the_recipe_has_everything_resolved(folder: Path) -> None:
    recipe = json.loads((folder / "recipe.json").read_text())
    assert recipe["settings"]["steps"] == 12 and recipe["options"]["model"]["dim"] == 8
    assert recipe["data_fingerprint"] == "counting" and recipe["finished"] is True
    assert recipe["resolved"]["micro_batch"] == 6 and torch.__version__.startswith(recipe["versions"]["torch"])
    assert recipe["hashes"]["model.safetensors"] == sha256(folder / "model.safetensors")
    assert "state/step-00000012.safetensors" in recipe["hashes"]


def test_samples_are_kept_by_step(folder: Path) -> None:
    assert (folder / "samples/step-00000004.txt").read_text() == "<b>step 4</b> & 日本語"
    assert (folder / "samples/step-00000012.png").read_bytes() == picture()


def test_the_report_shows_all_and_needs_nothing_from_outside(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<script|<link", page)
    for text in (
        "Counting &lt;fast&gt;",
        "&lt;b&gt;step 4&lt;/b&gt; &amp; 日本語",
        "J. Doe &amp; co",
        "CC0",
        "Nobody (2026)",
    ):
        assert text in page
    assert page.count("<svg") == 6 <= page.count("stroke: var(--c0)") and page.count("data:image/png;base64,") == 1
    assert "validation" in page and "prefers-color-scheme: dark" in page and "model.dim" in page
    assert sha256(folder / "model.safetensors") in page


def line_of(svg: str) -> list[tuple[float, float]]:
    """Return the points of the first curve, in pixels."""
    path = re.findall(r'<path d="([^"]*)"\s+style="fill: none; stroke: var\(--c0\)', svg)[0]
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)]


def test_a_chart_keeps_its_points_inside_and_drops_what_is_not_finite(drawn_curves) -> None:
    with drawn_curves():
        svg = chart("t", "y", [Curve("a", [(10, 1.0), (20, float("nan")), (30, 5.0)], marked=True), Curve("b", [])])
        endless = chart("t", "y", [Curve("a", [(1, float("inf"))])])
        tiny = chart("t", "y", [Curve("a", [(0, 0.0), (1, 3e-15)])])
        single = chart("t", "y", [Curve("a", [(0, 0.0)])])  # one point, no range on either axis
    points = line_of(svg)
    assert len(points) == 2 and svg.count("<use") == 2
    assert all(0 < x < 480 and 0 < y < 260 for x, y in points) and points[0][1] > points[1][1]
    assert endless == "" and "<use" in single
    assert "<path" in tiny and "nan" not in tiny


def test_many_points_are_averaged(drawn_curves) -> None:
    with drawn_curves():
        svg = chart("t", "y", [Curve("a", [(i, float(i % 3)) for i in range(10_000)])])
    assert 200 < len(line_of(svg)) <= 400


def test_a_missing_logger_is_said_before_training(tmp_path: Path, monkeypatch) -> None:
    for name in ("tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(
            UserError, match=f"{name}=True needs the Python package {name}: run pip install '.\\[logging"
        ):
            train(toy(), objective, Sequences(), settings(**{name: True}), run(tmp_path))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_the_loggers_get_every_figure(tmp_path: Path, monkeypatch) -> None:
    got: list[tuple] = []

    class Writer:
        def __init__(self, directory: str):
            got.append(("open", directory))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            got.append((name, value, step))

        def close(self) -> None:
            got.append(("closed",))

    monkeypatch.setitem(sys.modules, "tensorboard", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    logged = SimpleNamespace(
        log=lambda figures, step: got.append(("wandb", figures, step)), finish=lambda: got.append(("end",))
    )
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: logged))
    train(toy(), objective, Sequences(), settings(tensorboard=True, wandb=True), run(tmp_path))
    line = next(line for line in metrics.read(tmp_path) if "loss" in line)
    assert ("open", str(tmp_path / "tensorboard")) in got and ("loss", line["loss"], 2) in got
    assert ("wandb", {name: value for name, value in line.items() if name != "step"}, 2) in got
    assert got[-2:] == [("closed",), ("end",)]


def trainer(model: torch.nn.Module, aim, optimizer: str = "adamw") -> Trainer:
    return Trainer(model, aim, settings(optimizer=optimizer))


def language_model() -> tuple[torch.nn.Module, gpt2.Config]:
    config = gpt2.Config(vocab_size=97, context_length=32, dim=48, hidden_dim=192, n_layers=3, n_heads=4, dropout=0.0)
    return gpt2.build(config), config


def test_operations_are_those_of_the_papers_formula() -> None:
    model, config = language_model()
    batch = {"tokens": torch.randint(97, (2, 33))}
    counted = flops.count_flops(lambda: language_modeling.causal_language_modeling(model, batch).total.backward()) / 64
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and "positions" not in name)
    attention = 12 * config.n_layers * config.dim * 32  # heads times their width is the model's
    assert counted == 6 * matrices + attention


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_estimate_changes_nothing(optimizer: str) -> None:
    model = toy()
    before, calls = weights(model), model.calls.clone()
    random = torch.get_rng_state()
    tried = trainer(model, objective, optimizer)
    cost.estimate(tried, Sequences().batch(0), None)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(model).items())
    assert torch.equal(model.calls, calls) and torch.equal(torch.get_rng_state(), random)
    assert tried.optimizers.state() == {} and all(p.grad is None for p in model.parameters())


def test_the_estimate_is_near_what_a_step_takes() -> None:
    model, _ = language_model()
    tokens = torch.randint(97, (16, 33))
    tried = trainer(model, language_modeling.causal_language_modeling)
    estimate = cost.estimate(tried, {"tokens": tokens}, None)
    assert estimate.micro_batch == 16 and estimate.units_per_step == 16 * 32
    assert estimate.parameter_bytes == 4 * sum(p.numel() for p in model.parameters())
    assert estimate.optimizer_bytes == pytest.approx(2 * estimate.parameter_bytes, rel=0.01)
    kept, largest = cost.activations(tried, {"tokens": tokens})
    assert kept <= estimate.activation_bytes <= 1.2 * (kept + 2 * largest)


@pytest.mark.parametrize(("free", "rows"), [(1.0, 6), (0.75, 3), (0.45, 2)])
def test_rows_at_a_time_are_what_fits_in_equal_parts(monkeypatch, free: float, rows: int) -> None:
    batch = Sequences().batch(0)
    needs = cost.estimate(trainer(toy(), objective), batch, None)
    fixed = needs.total_bytes - needs.parameter_bytes - needs.row_bytes * 6
    available = int((fixed + 6 * needs.row_bytes * free) / 0.8) + 1
    monkeypatch.setattr("keifu.training.hardware.cost.available_memory", lambda device: available)
    assert cost.estimate(trainer(toy(), objective), batch, None).micro_batch == rows


def test_the_cost_is_said_before_the_first_step(tmp_path: Path, capsys) -> None:
    train(toy(), objective, Sequences(), settings(), run(tmp_path))
    place, estimate, begins, first, *others = capsys.readouterr().err.splitlines()
    device = r"On cpu, (1 thread|\d+ threads), matrix products in float32"
    assert re.fullmatch(rf"{device}; measuring the time and the memory of a step \.\.\.", place)
    assert estimate.startswith("483 parameters; 12 steps of 30 tokens, 360 in all: about ")
    assert " s, validations and samples not included, and " in estimate
    assert begins.startswith("step 0  validation loss")
    assert first.startswith("483 parameters; 12 steps of 30 tokens, 360 in all: about ")
    assert re.search(r" s, validations and samples included, and .* kB of memory \(", first)
    assert any(line.startswith("step 4  validation loss") for line in others)
    assert others[-1].startswith("Done: 12 steps in")


def test_the_peak_is_the_fastest_of_several_products(monkeypatch) -> None:
    times = iter([3.0, 2.0, 4.0])
    asked = iter([0.0, 0.05, 0.1, 9.0])
    monkeypatch.setattr(flops, "time_call", lambda work, device: next(times))
    monkeypatch.setattr(flops, "perf_counter", lambda: next(asked))  # of this module alone: other threads run on
    assert flops.measure_peak(CPU, torch.float32) == 2 * 1024**3 / 2.0
    assert next(times, None) is None


def test_the_peak_is_measured_once(monkeypatch) -> None:
    measured = iter([5.0])
    monkeypatch.setattr(flops, "measure_peak", lambda *given: next(measured))
    flops.matmul_peak.cache_clear()
    assert [flops.matmul_peak(CPU, torch.float32) for _ in range(2)] == [5.0, 5.0]
    flops.matmul_peak.cache_clear()


@pytest.mark.parametrize(("again", "shown"), [(1e30, True), (1.0, False)])
def test_no_run_uses_more_than_the_peak(tmp_path: Path, monkeypatch, again: float, shown: bool) -> None:
    """A peak that was measured beside other work is measured again; if it is still too low, no share is shown."""
    monkeypatch.setattr("keifu.training.recorder.peak", lambda *given: 1.0)
    monkeypatch.setattr("keifu.training.recorder.measure_peak", lambda *given: again)
    train(toy(), objective, Sequences(), settings(), run(tmp_path))
    shares = [line["flops_utilisation"] for line in metrics.read(tmp_path) if "flops_utilisation" in line]
    assert bool(shares) == shown and all(0 < share <= 1 for share in shares)


def test_bfloat16_is_used_where_the_processor_has_it(monkeypatch) -> None:
    for flags, expected in (("avx512f avx512_bf16", torch.bfloat16), ("avx2 fma amx_bf16", torch.bfloat16)):
        monkeypatch.setattr(devices, "processor", lambda field, flags=flags: flags)
        assert precision.resolve_dtype("auto", CPU) == expected
    monkeypatch.setattr(devices, "processor", lambda field: "avx2 avx512f")
    assert precision.resolve_dtype("auto", CPU) == torch.float32
    assert precision.resolve_dtype("bfloat16", CPU) == torch.bfloat16


@pytest.mark.parametrize(("flags", "expected"), [("avx512_bf16", torch.bfloat16), ("avx2 fma", torch.float32)])
def test_muon_multiplies_bfloat16_only_where_the_processor_does(flags: str, expected: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(devices, "processor", lambda field: flags)
    model = gpt2.build(gpt2.Config(vocab_size=8, dim=8, n_layers=1, n_heads=1))
    muon: Any = Optimizers(model, settings(optimizer="muon", precision="auto")).all["muon"]
    assert muon.dtype == expected


def test_bfloat16_steps_keep_the_weights_in_float32(tmp_path: Path) -> None:
    model = toy()
    seen = []
    model.head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    train(model, objective, Sequences(), settings(precision="bfloat16", steps=2, warmup=0), run(tmp_path))
    assert set(seen) == {torch.bfloat16}
    assert {tensor.dtype for tensor in weights(model).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.96, "10 s"), (99, "99 s"), (187, "3:07 min"), (9000, "2:30 h"), (280_000, "3 d 5 h")],
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert progress.format_seconds(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(999, "999 bytes"), (1e3, "1 kB"), (1_234_567, "1.23 MB"), (5e12, "5 TB")])
def test_amounts_are_readable(value: float, text: str) -> None:
    assert progress.format_bytes(value) == text


@pytest.mark.parametrize(("value", "text"), [(999, "999"), (999_499, "999 k"), (999_700, "1 M"), (1_234_567, "1.23 M")])
def test_counts_are_readable(value: int, text: str) -> None:
    assert progress.format_count(value) == text


def test_a_terminal_gets_a_bar_and_a_pipe_plain_lines(monkeypatch) -> None:
    for terminal in (True, False):
        stream = io.StringIO()
        monkeypatch.setattr(stream, "isatty", lambda terminal=terminal: terminal)
        monkeypatch.setattr("sys.stderr", stream)
        monkeypatch.setenv("TERM", "xterm")
        with progress.Display(20, "tokens") as display:
            display.advance(10)
            display.show({"loss": 2.5, "tokens_per_second": 1234.0, "flops_utilisation": 0.41, "seconds_left": 83.0})
            display.note("a [note] that stays")
        text = stream.getvalue()
        assert "loss 2.5  1,234 tokens/s  41% of peak  83 s left" in text and "a [note] that stays" in text
        assert ("\x1b[" in text) == terminal
        assert ("step 10/20  loss" in text) == (not terminal)


ODD_CHARTS = (
    '"x"', '[{"title": "a", "y_label": "b", "curves": [{"name": "c", "points": [1]}]}]', "[1]", "{",
    '[{"title": "a", "y_label": true, "curves": [{"name": "c", "points": [[1, 2]]}]}]',
)  # fmt: skip


def test_odd_files_in_the_folder_do_not_end_a_finished_run(tmp_path: Path, drawn_curves) -> None:
    """A sample that is not UTF-8, and charts that are none: the report is written without them."""
    train(toy(), objective, Sequences(), settings(), run(tmp_path))
    (tmp_path / "samples").mkdir(exist_ok=True)
    (tmp_path / "samples" / "step-00000000.txt").write_bytes(b"\xff<b>")
    for charts in ODD_CHARTS:
        (tmp_path / "curves.json").write_text(charts)
        with drawn_curves():
            train(toy(), objective, Sequences(), settings(), run(tmp_path, resume=True))
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert "curves.json is not a list of charts, and is left out" in page and "\ufffd&lt;b&gt;" in page, charts


def test_a_damaged_cost_of_a_recipe_is_one_sentence(tmp_path: Path) -> None:
    train(toy(), objective, Sequences(), settings(), run(tmp_path))
    content = json.loads((tmp_path / "recipe.json").read_text())
    for value in ([1, 2], "x", {}):
        content["cost"]["row_bytes"] = value
        (tmp_path / "recipe.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"recipe.json is damaged, or of a form that keifu does not read"):
            write_report(tmp_path)


def test_an_extension_that_would_learn_nothing_is_refused_with_a_useful_number(tmp_path: Path) -> None:
    short = settings(steps=40, schedule="cosine", final_ratio=0.0, warmup=2)
    train(toy(), objective, Sequences(), short, run(tmp_path))
    with pytest.raises(UserError, match=r"from 40 to 44 steps would learn next to nothing.*Give --steps \d+ or more"):
        train(toy(), objective, Sequences(), replace(short, steps=44), run(tmp_path, resume=True))
    useful = Length(40).useful_steps(short, 40)
    assert 44 < useful < 60
    for steps, enough in ((useful - 3, False), (useful, True)):
        share = Length(40).changed(40, steps, 2).mean_share(short, 40)
        assert (share >= 0.02) == enough
    train(toy(), objective, Sequences(), replace(short, steps=useful), run(tmp_path, resume=True))
    assert checkpoint.steps(tmp_path)[-1] == useful


BUSY = " (the machine is busy: a load of 16.0 on 2 processors)"


@pytest.mark.parametrize(("load", "said"), [(16.0, BUSY), (1.0, "")])
def test_a_plan_that_is_cut_is_said_with_the_reason(tmp_path, monkeypatch, capsys, load: float, said: str) -> None:
    """`--minutes` on a machine that other work slows down: the run ends in time, and says that it learned nothing."""
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("keifu.training.pace.Clock.fitting", lambda clock, step, planned, pace: 38)
    monkeypatch.setattr("keifu.training.pace.Clock.steps", lambda clock, step, planned: 2)
    train(toy(), objective, Sequences(), settings(steps=40, minutes=1.0), run(tmp_path))
    shown = capsys.readouterr().err
    assert f"Only 2 of 38 steps fit into 60 s{said}." in shown
    assert f"Out of time: 2 steps of 38 made{said}. The model has learned next to nothing" in shown
    assert "Done: " not in shown
