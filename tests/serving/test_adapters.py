"""Adapters as models of their own, and models that clients load from a folder that the server permits."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from serving_toys import Served, byte_tokenizer, running

import keifu
from keifu.checkpoints.lora.peft import adapt, save_adapter
from keifu.commands import serve
from keifu.data.tokenizers.chat_template import CHATML
from keifu.errors import UserError
from keifu.layers.lora import LoraSettings
from keifu.serving.app import Access
from keifu.serving.metrics import Metrics
from keifu.serving.models import ServedModels, describe
from keifu.serving.worker import Limits


@pytest.fixture(scope="module")
def place(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `keeper`, an adapter of the `chat` toy, a damaged model, and a link to a model elsewhere."""
    place = tmp_path_factory.mktemp("permitted")
    model, _ = keifu.load(folder / "chat")
    adapt(model, ["q_proj", "up_proj"], LoraSettings(rank=2, alpha=4.0))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 2.0) if 2 in parameter.shape else None
    save_adapter(model, place / "keeper", str(folder / "chat"))
    (place / "damaged").mkdir()
    (place / "damaged" / "config.json").write_text("{")
    (place / "outside").symlink_to(folder / "base")
    return place


@pytest.fixture(scope="module")
def served(folder: Path, place: Path) -> Iterator[Served]:
    with running([str(folder / "chat")], Limits(), Access(), folder=place) as found:
        yield found


def answer(served: Served, model: str) -> str:
    messages = [{"role": "user", "content": "What is that light?"}]
    body = {"model": model, "messages": messages, "max_tokens": 12, "temperature": 0}
    return served.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]


def test_an_adapter_is_loaded_where_that_is_permitted_and_answers_under_its_name(served: Served, place: Path) -> None:
    before = answer(served, "chat")
    ask = {"model": "keeper", "messages": [{"role": "user", "content": "x"}]}
    assert served.post("/v1/chat/completions", ask).status_code == 404, "a request loads nothing"
    loaded = served.post("/v1/models/load", {"model": "keeper"}).json()
    assert loaded["loaded"] and loaded["uses"][0] == "chat"
    model, tokenizer = keifu.load(place / "keeper")
    alone = keifu.generate(model, tokenizer, "What is that light?", max_tokens=12, temperature=0)
    assert answer(served, "keeper") == alone != before
    assert answer(served, "chat") == before, "the base is as it was"
    assert [each.id for each in served.openai.models.list().data] == ["chat", "keeper"]
    assert served.post("/v1/models/unload", {"model": "keeper"}).json()["loaded"] is False
    assert answer(served, "keeper") == alone


@pytest.mark.parametrize(
    "name", ["../models/base", "outside", "nothing", ".", "..", "", "keeper/../keeper", "a\0b", "/etc"]
)
def test_nothing_outside_of_the_folder_is_loaded(served: Served, name: str) -> None:
    names = set(served.models.descriptions)
    found = served.post("/v1/models/load", {"model": name})
    assert found.status_code in (400, 404) or (not name and found.status_code == 200)
    assert set(served.models.descriptions) == names


def test_a_damaged_model_is_refused_in_a_sentence_and_the_server_goes_on(served: Served) -> None:
    found = served.post("/v1/models/load", {"model": "damaged"})
    assert found.status_code == 400 and "config.json" in found.json()["error"]["message"]
    assert answer(served, "chat")


def test_without_the_permission_no_model_is_loaded(folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    models = ServedModels({"chat": str(folder / "chat")}, Limits(), Metrics())
    models.add_from_folder("keeper")
    assert [*models.descriptions] == ["chat"]


def test_an_adapter_with_a_tokenizer_has_its_template(folder: Path, tmp_path: Path) -> None:
    model, _ = keifu.load(folder / "base")
    adapt(model, ["c_attn"], LoraSettings(rank=2, alpha=4.0))
    save_adapter(model, tmp_path / "tuned", str(folder / "base"))
    assert describe(str(tmp_path / "tuned")).uses[0] == "completion"
    byte_tokenizer().with_chat_template(CHATML).save(tmp_path / "tuned")
    assert describe(str(tmp_path / "tuned")).uses[0] == "chat"


def test_a_lora_that_is_no_adapter_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="--lora is 'a=.*chat', which names no folder of adapters"):
        serve.run(serve.Options(lora=(f"a={folder / 'chat'}",)))
