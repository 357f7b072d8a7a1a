"""`keifu convert --to web`: a folder with one model that runs in Chromium; other models are refused by name."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from local_server import WAIT, serve

import keifu
from keifu.checkpoints import web
from keifu.cli import main
from keifu.errors import UserError
from keifu.models import gpt2, llama
from keifu.page import kernel

ROOT = Path(__file__).parents[2]
PACKAGED = ROOT / "pretrained/src/keifu_pretrained"


def convert(model: Path, out: Path, *options: str) -> int:
    """Run the command and return its exit status."""
    try:
        main(["convert", str(model), str(out), "--to", "web", *options])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """Save a small LLaMA with gpt-en's tokenizer, and return its folder."""
    tokenizer = keifu.load(PACKAGED / "gpt-en")[1]
    size: dict[str, Any] = {"context_length": 64, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
    torch.manual_seed(2)
    keifu.save(llama.build(llama.Config(tokenizer.vocab_size, **size, n_kv_heads=2)), tokenizer, tmp_path / "toy")
    return tmp_path / "toy"


def test_the_page_runs_in_int8(chromium: Any, toy: Path, tmp_path: Path) -> None:
    assert not convert(toy, tmp_path / "web")
    server = serve(tmp_path / "web")
    page = chromium.new_page(viewport={"width": 390, "height": 800})
    page.set_default_timeout(WAIT)
    page.goto(next(server))
    page.wait_for_selector("[data-live][data-state=idle]")
    page.fill("textarea", "The city")
    page.click("[data-live-run]")
    page.wait_for_selector("[data-live][data-state=done]")
    assert page.locator(".live-bar").count() == 12 and "llama" in page.inner_text(".live-about")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.close()
    next(server, None)


@pytest.mark.parametrize("name", ["gpt-en", "bert-en", "network", pytest.param("ja-en", marks=pytest.mark.slow)])
def test_each_packaged_kind_runs(chromium: Any, tmp_path: Path, name: str) -> None:
    assert not convert(PACKAGED / name, tmp_path / "web")
    assert (tmp_path / "web/live/models/own/model.safetensors").stat().st_size < 0.62 * (
        PACKAGED / name / "model.safetensors"
    ).stat().st_size
    server = serve(tmp_path / "web")
    page = chromium.new_page()
    page.set_default_timeout(WAIT)
    page.goto(next(server))
    page.wait_for_selector("[data-live][data-state=idle]")
    if name != "network":
        page.fill("textarea", "猫はテーブルの下で寝ています。" if name == "ja-en" else "The book was [MASK].")
    page.click("[data-live-run]")
    page.wait_for_selector("[data-live][data-state=done]")
    page.close()
    next(server, None)


def first_words(page: Any, address: str) -> list[str]:
    """Return the candidates that a page names for the next word."""
    page.goto(address)
    page.wait_for_selector("[data-live][data-state=idle]")
    page.fill("textarea", "The city")
    page.click("[data-live-run]")
    page.wait_for_selector("[data-live][data-state=done]")
    return page.locator(".live-bar").all_inner_texts()


def test_a_single_file_opens_from_a_disk(chromium: Any, toy: Path, tmp_path: Path) -> None:
    assert not convert(toy, tmp_path / "web") and not convert(toy, tmp_path / "page.html", "--single-file")
    assert [*tmp_path.glob("page*")] == [tmp_path / "page.html"]
    server, page, asked = serve(tmp_path / "web"), chromium.new_page(), list[str]()
    page.set_default_timeout(WAIT)
    page.on("request", lambda request: asked.append(request.url.partition(":")[0]))
    alone = first_words(page, (tmp_path / "page.html").as_uri())
    assert asked.count("file") == 1 and set(asked) <= {"file", "data"}
    assert page.get_attribute("[data-live]", "data-kernel") == str(kernel.can_compile()).lower()
    assert alone == first_words(page, next(server)) and len(alone) == 12
    page.close()
    next(server, None)


def test_a_single_file_draws(chromium: Any, tmp_path: Path) -> None:
    """The diffusion model's modules are loaded while the page runs."""
    assert not convert(PACKAGED / "digits", tmp_path / "page.html", "--single-file")
    page = chromium.new_page()
    page.set_default_timeout(WAIT)
    page.goto((tmp_path / "page.html").as_uri())
    page.wait_for_selector("[data-live][data-state=idle]")
    page.get_by_label("Steps").fill("2")
    page.click("[data-live-run]")
    page.wait_for_selector("[data-live][data-state=done]")
    page.close()


def test_a_single_file_must_be_a_page(capsys: pytest.CaptureFixture, toy: Path, tmp_path: Path) -> None:
    assert convert(toy, tmp_path / "page", "--single-file") == 1
    assert "ends in .html" in capsys.readouterr().err
    assert convert(toy, tmp_path / "page.html", "--single-file", "--to", "hf") == 1
    assert "add --to web" in capsys.readouterr().err and not [*tmp_path.glob("page*")]


@pytest.mark.parametrize("name", ["f32", "bf16", "int8"])
def test_number_formats(toy: Path, tmp_path: Path, name: str) -> None:
    assert not convert(toy, tmp_path / "web", "--dtype", name)
    model = tmp_path / "web/live/models/own/model.safetensors"
    header = json.loads(model.read_bytes()[8 : 8 + int.from_bytes(model.read_bytes()[:8], "little")])
    expected = {"f32": "F32", "bf16": "BF16", "int8": "I8"}[name]
    assert header["model.embed_tokens.weight"]["dtype"] == expected


def test_int8_is_near_the_matrix(toy: Path) -> None:
    stored = dict(web.in_int8(toy / "model.safetensors"))
    name = "model.embed_tokens.weight"
    original = keifu.load(toy)[0].state_dict()["embedding.weight"].float().numpy()
    near = stored[name].astype(np.float32) * stored[f"{name}_scale"][:, None]
    assert np.abs(near - original).max() <= stored[f"{name}_scale"].max() / 2 + 1e-7


def test_other_models_are_refused_by_name(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert convert(PACKAGED / "emoji-clip", tmp_path / "web") == 1
    assert "does not read clip models" in capsys.readouterr().err and not (tmp_path / "web").exists()
    assert convert(PACKAGED / "network", tmp_path / "web", "--dtype", "q8_0") == 1
    assert "cannot hold q8_0" in capsys.readouterr().err


def test_what_the_engine_does_not_compute_is_refused(tmp_path: Path) -> None:
    tokenizer = keifu.load(PACKAGED / "gpt-en")[1]
    size: dict[str, Any] = {"context_length": 16, "dim": 16, "hidden_dim": 16, "n_layers": 1, "n_heads": 2}
    keifu.save(gpt2.build(gpt2.Config(tokenizer.vocab_size, **size)), tokenizer, tmp_path / "gpt2")
    with pytest.raises(UserError, match="does not read gpt2 models"):
        web.exported_form(tmp_path / "gpt2")
    config = json.loads((PACKAGED / "gpt-en/config.json").read_text("utf-8"))
    for change, reason in (({"hidden_act": "gelu"}, "gelu"), ({"mlp_bias": True}, "biases")):
        (tmp_path / "config.json").write_text(json.dumps(config | change), encoding="utf-8")
        (tmp_path / "model.safetensors").write_bytes(b"")
        with pytest.raises(UserError, match=reason):
            web.exported_form(tmp_path)


def test_the_kinds_are_those_of_the_engine() -> None:
    modules = (ROOT / "src/keifu/page/engine/models.js").read_text("utf-8")
    kinds = set(re.findall(r"(?m)^  (\w+): ", modules.partition("const KINDS")[2].partition("};")[0]))
    assert web.ELEMENTS.keys() - {"DDPMPipeline"} <= kinds
