"""The page of the service: each example is a request that the server reads, and names fields that it has."""

import json
import re
import shlex
from pathlib import Path

import pytest

from keifu.inference.text.sampling_params import SETTINGS
from keifu.serving.inspection import InspectRequest, MatchRequest
from keifu.serving.openai.images import ImageGenerationRequest
from keifu.serving.openai.schemas import NUMBERS, ChatRequest, CompletionRequest, ResponseRequest, Sampling
from keifu.serving.openai.vectors import ClassifyRequest, EmbeddingRequest, RerankRequest, SearchRequest
from keifu.serving.protocols.anthropic import MessagesRequest
from keifu.serving.protocols.ollama import OPTIONS, OllamaChat
from keifu.serving.state import ModelRequest
from keifu.serving.translations import TokenizeRequest, TranslationRequest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"(?ms)^### `(/\S+)`\n(.*?)(?=^##)", PAGE))
BODIES = {
    "/v1/chat/completions": ChatRequest, "/v1/responses": ResponseRequest, "/v1/messages": MessagesRequest,
    "/api/chat": OllamaChat, "/v1/completions": CompletionRequest, "/v1/embeddings": EmbeddingRequest,
    "/v1/rerank": RerankRequest, "/v1/search": SearchRequest, "/v1/classify": ClassifyRequest,
    "/v1/translations": TranslationRequest, "/v1/tokenize": TokenizeRequest,
    "/v1/images/generations": ImageGenerationRequest, "/v1/inspect": InspectRequest,
    "/v1/match": MatchRequest, "/v1/models/load": ModelRequest,
}  # fmt: skip


def requests(section: str) -> list[dict]:
    """Return the JSON bodies of the curl commands of a section."""
    blocks = [block for block in re.findall(r"(?ms)^```\n(.*?)^```", section) if "curl " in block]
    texts = [re.sub(r"(?m)^PICTURE=.*\n", "", block).replace("$PICTURE", "iVBORw0KGgo=") for block in blocks]
    words = [shlex.split(command) for text in texts for command in re.split(r"(?m)^(?=curl )", text) if command]
    return [json.loads(each[each.index("-d") + 1]) for each in words if "-d" in each]


@pytest.mark.parametrize("path", BODIES)
def test_a_path_has_fields_a_request_that_is_one_and_an_answer(path: str) -> None:
    section, body = SECTIONS[path], BODIES[path]
    assert requests(section)
    for each in requests(section):
        body.model_validate(each)
    (line,) = re.findall(r"(?m)^Fields: (.*)$", section)
    named = set(re.findall(r"`([a-z_]+)`", line))
    known = {name for name, field in body.model_fields.items()} | {"strength", "image", "mask"}
    main = known - {*Sampling.model_fields} - {"model", "user", "strength", "image", "mask"}
    if path not in ("/v1/responses", "/api/chat"):  # these have settings that change nothing
        assert main - named == set()
    assert "```json\n{" in section


def test_each_sampling_setting_is_named() -> None:
    for path, names in (("/v1/chat/completions", NUMBERS), ("/api/chat", OPTIONS)):
        assert [name for name in names if f"`{name}`" not in SECTIONS[path]] == []
    lines = (ROOT / "docs/parts/sampling.md").read_text(encoding="utf-8").splitlines()
    rows = [(name, row.neutral, row.setting) for name, row in SETTINGS.items() if row.setting.stage]
    expected = [f"| `{name}` | {neutral} | {row.stage} | {row.help} |" for name, neutral, row in rows]
    assert [line for line in expected if line not in lines] == []  # in docs/parts/sampling.md


def test_each_body_has_its_section() -> None:
    assert BODIES.keys() <= SECTIONS.keys()
    assert all("curl " in SECTIONS[path] and " -F " in SECTIONS[path] for path in SECTIONS.keys() - BODIES)  # forms


def test_a_wrong_request_would_be_seen() -> None:
    body = requests('```\ncurl http://x/v1/inspect -d \'{"model": "bert-en", "inputs": "a"}\'\n```\n')[0]
    with pytest.raises(ValueError, match="inputs"):
        InspectRequest.model_validate(body)
