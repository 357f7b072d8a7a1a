"""The description at /openapi.json and its page: what schemathesis makes of it is answered as it says."""

from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from serving_toys import WAIT

MODEL = {"embeddings": "encoder", "rerank": "encoder", "translations": "translator", "images": "ddpm", "match": "clip"}
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
SMALL = {**dict.fromkeys(LIMITS, 3), "n": 1, "steps": 2, "size": None, "beam": 2}


def test_each_path_is_described_with_its_errors(served: Any) -> None:
    known = httpx.get(f"{served.url}/openapi.json").json()
    for path, methods in known["paths"].items():
        for each in methods.values():
            assert each["summary"] and {"200", "4XX", "5XX"} <= each["responses"].keys(), path
            assert "422" not in each["responses"]
    assert "/v1/chat/completions" in known["paths"] and "/" not in known["paths"]
    body = known["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert body["properties"]["mask"]["format"] == "binary"


def test_its_page_is_this_servers_own(served: Any) -> None:
    found = httpx.get(f"{served.url}/docs")
    assert found.status_code == 200 and "/page/docs.js" in found.text
    assert "default-src 'none'" in found.headers["content-security-policy"]


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [False, True])
def test_whatever_is_sent_is_answered_as_described(served: Any, folder: Path, wrong: bool) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    mode = schemathesis.GenerationMode.NEGATIVE if wrong else schemathesis.GenerationMode.POSITIVE
    seen: dict[str, set[int]] = {}
    for each in schema.get_all_operations():
        operation = each.ok()
        if wrong and operation.method.lower() != "post":
            continue  # nothing of it can be wrong
        kind = next((MODEL[part] for part in operation.path.split("/") if part in MODEL), "chat")
        strategy = operation.as_strategy(generation_mode=mode)
        seen[operation.path] = statuses(strategy, None if wrong else str(folder / kind), schemathesis.checks)
    assert len(seen) >= 11
    assert wrong or sum(200 in found for found in seen.values()) >= 7, seen


def statuses(strategy: Any, name: str | None, checks: Any) -> set[int]:
    """Return the statuses of a strategy's requests, after checking each answer. Three of four requests name this model
    and need little computation."""
    wanted = [
        checks.not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
        checks.response_schema_conformance,
    ]  # fmt: skip
    names, seen = cycle([name] * 3 + [None]), set()

    @settings(max_examples=25, deadline=None, database=None, derandomize=True, suppress_health_check=[*HealthCheck])
    @given(case=strategy)
    def answered(case: Any) -> None:
        model = next(names)
        if isinstance(case.body, dict) and model is not None:
            case.body = {**case.body, "model": model, **{k: v for k, v in SMALL.items() if k in case.body}}
        response = case.call(timeout=WAIT)
        seen.add(response.status_code)
        case.validate_response(response, checks=wanted)

    answered()
    return seen
