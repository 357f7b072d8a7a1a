"""The page teaches: heads that show something, a proof, runs that grow, messages and words in the reader's language."""

import base64
import json
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving_toys import running, until

from keifu.locks import hold
from keifu.serving.app import Access
from keifu.serving.page import FOLDER
from keifu.serving.worker import Limits

pytestmark = pytest.mark.slow
IMPORT = "async ([name, what, ...given]) => (await import(name))[what](...given)"


@contextmanager
def opened(browser: Any, url: str, locale: str = "en-GB", width: int = 1280) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": width, "height": 740}, locale=locale)
    page = context.new_page()
    page.goto(url)
    page.wait_for_function("document.querySelector('#language').textContent != ''")
    yield page
    context.close()


def layer(*heads: list[list[float]]) -> dict[str, Any]:
    data = bytes(round(255 * value) for head in heads for row in head for value in row)
    return {"bytes": base64.b64encode(data).decode(), "heads": len(heads)}


def rows_at(places: list[int], length: int) -> list[list[float]]:
    return [[float(column == place) for column in range(length)] for place in places]


CHOICE = """async ([layers, rows, columns, same]) => {
  const { choice, headsOf, isCausal, pattern } = await import('/page/tabs/heads.js');
  const heads = layers.map((each) => headsOf(each, rows.length, columns.length));
  const causal = same && isCausal(heads, rows.length);
  const { layer, head, row } = choice(heads, rows, columns, same, causal);
  return [layer, head, row, same ? pattern(heads[layer][head], rows, causal)?.name : null];
}"""


def test_it_begins_with_a_head_that_copies_before_one_that_looks_back(served: Any, browser: Any) -> None:
    tokens = ["A", " b", " c", ".", " A", " b"]
    before, rests = rows_at([0, 0, 1, 2, 3, 4], 6), rows_at([0] * 6, 6)
    induction = rows_at([0, 0, 0, 0, 1, 2], 6)
    with opened(browser, served.url) as page:
        found = page.evaluate(CHOICE, [[layer(rests, before), layer(rests, induction)], tokens, tokens, True])
        assert found == [1, 1, 5, "induction"]
        found = page.evaluate(CHOICE, [[layer(rests, before), layer(rests, rests)], tokens, tokens, True])
        assert found[:2] == [0, 1] and found[3] == "before"


def test_it_begins_with_an_aligned_head_and_not_with_one_that_rests(served: Any, browser: Any) -> None:
    written, source = [" I", " see", " cats", "."], ["猫", "を", "見る", "</s>"]
    aligned, rests = rows_at([0, 2, 0, 3], 4), rows_at([3] * 4, 4)
    shifted = rows_at([3, 0, 3, 1], 4)
    with opened(browser, served.url) as page:
        found = page.evaluate(CHOICE, [[layer(rests, shifted), layer(aligned, rests)], written, source, False])
    assert found[:2] == [1, 0] and written[found[2]] in (" I", " see", " cats")


def separable(points: list[dict[str, float]]) -> bool:
    """Return whether a line through two of the points, turned a little, parts the signs: by trying many directions."""
    from scipy.optimize import linprog

    rows = [[-p["sign"] * p["x"], -p["sign"] * p["y"], -p["sign"]] for p in points]
    return linprog([0, 0, 0], rows, [-1] * len(rows), bounds=[(None, None)] * 3).status == 0


def points_of(*groups: list[tuple[float, float]]) -> list[dict[str, float]]:
    return [{"x": x, "y": y, "sign": sign} for sign, group in zip((1, -1), groups, strict=True) for x, y in group]


ADVERSARIAL = {
    "xor": points_of([(-1, -1), (1, 1)], [(-1, 1), (1, -1)]),
    "inside": points_of([(0, 0.1)], [(-1, -1), (1, -1), (0, 1)]),
    "in a line": points_of([(-1, 0), (1, 0)], [(0, 0)]),
    "in a line, apart": points_of([(-1, 0), (-0.5, 0)], [(0, 0), (1, 0)]),
    "the same point": points_of([(0.5, 0.5)], [(0.5, 0.5)]),
    "one class": points_of([(0.5, 0.5), (0.1, 0.2)], []),
    "a corner that touches": points_of([(0, 0), (1, 0), (0, 1)], [(0.5, 0.5), (1, 1)]),
    "four in a line, mixed": points_of([(0, 0), (2, 2)], [(1, 1), (3, 3)]),
}


def test_a_proof_is_there_exactly_if_no_line_parts_the_points(served: Any, browser: Any) -> None:
    pytest.importorskip("scipy")
    draw = random.Random(3)
    cases = list(ADVERSARIAL.values())
    for _ in range(200):
        grid = draw.choice([4, 128])  # exact numbers; on a small grid many points are equal or in a line
        place = [(draw.randrange(grid) / grid, draw.randrange(grid) / grid) for _ in range(draw.randrange(2, 9))]
        cut = draw.randrange(len(place) + 1)
        cases.append(points_of(place[:cut], place[cut:]))
    with opened(browser, served.url) as page:
        for points in cases:
            proof = page.evaluate(IMPORT, ["/page/tabs/separation.js", "inseparable", points])
            assert (proof is None) == separable(points), points


def test_the_proof_of_xor_is_in_both_languages_and_adding_points_ends_it(served: Any, browser: Any) -> None:
    for locale, words in (("en-GB", "no line can part these points"), ("ja", "どんな直線でもこの点は分けられません")):
        with opened(browser, served.url, locale) as page:
            page.click("#tab-neuron")
            page.click("#xor")
            page.click("#train")
            until(lambda page=page, words=words: words in page.inner_text("#neuron .told"))
            page.click("#plane", position={"x": 30, "y": 40})
            assert words not in page.inner_text("#neuron .told")


def test_an_empty_chat_has_examples_and_explains_the_lines(served: Any, chat: str, browser: Any) -> None:
    with opened(browser, served.url) as page:
        page.wait_for_selector(".empty .example")
        page.select_option("#model", chat.rpartition("/")[2])
        kinds = [each.partition(":")[0] for each in page.locator(".lines li").all_inner_texts()]
        assert kinds == ["likely", "possible", "surprising"]
        page.click("#show-settings")
        assert page.get_attribute("#temperature", "placeholder") == "0"
        assert page.get_attribute("#max_tokens", "placeholder") == "1024"
        page.fill("#max_tokens", "8")
        page.click("#settings form > button")
        page.click(".example >> nth=0")
        page.wait_for_selector("article.assistant .token")  # without a setting
        assert page.locator(".empty").count() == 0


def test_a_continued_text_shows_its_tokens_too(served: Any, browser: Any) -> None:
    with opened(browser, served.url) as page:
        page.wait_for_selector("#model option", state="attached")
        page.select_option("#model", "base")
        page.click("#show-settings")
        page.fill("#max_tokens", "6")
        page.fill("#temperature", "0")
        page.click("#settings form > button")
        page.fill("#message", "ab")
        page.click("#send")
        page.wait_for_selector("article.assistant .token")
        page.locator("article.assistant .token").first.hover()
        shares = [float(each.split()[0]) for each in page.locator("#alternatives td:last-child").all_inner_texts()]
        assert len(shares) >= 5 and shares == sorted(shares, reverse=True)


def test_a_continued_text_has_its_likeliest_tokens_in_order_and_no_end_token(served: Any, browser: Any) -> None:
    with opened(browser, served.url) as page:
        body = {"index": 0, "text": " 34.", "finish_reason": "stop", "logprobs": {
            "tokens": [" ", "3", "4", ".", "<|endoftext|>"], "token_logprobs": [-0.1] * 5,
            "top_logprobs": [{"1": -3.0, "3": -0.5, "2": -1.0}] * 5, "text_offset": [0] * 5,
        }}  # fmt: skip
        stream = f"data: {json.dumps({'choices': [body], 'seed': 1})}\n\ndata: [DONE]\n\n"
        page.route("**/v1/completions", lambda route: route.fulfill(body=stream, content_type="text/event-stream"))
        page.wait_for_selector("#model option", state="attached")
        page.select_option("#model", "base")
        page.fill("#message", "12")
        page.click("#send")
        page.wait_for_selector("article.assistant .token")
        assert page.locator("article.assistant .text").text_content() == " 34."
        page.locator("article.assistant .token").nth(1).hover()
        assert page.locator("#alternatives td:first-child").all_inner_texts()[:3] == ["3", "2", "1"]


def test_messages_of_the_server_are_in_the_language_of_the_page(served: Any, browser: Any) -> None:
    wrong = [
        ("/v1/inspect", {"model": "base", "input": "a" * 200}), ("/v1/inspect", {"model": "base", "input": ""}),
        ("/v1/inspect", {"model": "ddpm", "input": "x"}), ("/v1/inspect", {"model": "none", "input": "x"}),
        ("/v1/inspect", {"model": "translator", "input": "a" * 40}),
        ("/v1/inspect", {"model": "encoder", "input": "a [MASK]"}),
        ("/v1/translations", {"model": "translator", "input": "a" * 40}),
        ("/v1/match", {"model": "clip", "images": ["AAAA"], "texts": ["a"]}),
        ("/v1/match", {"model": "clip", "images": [], "texts": ["a"]}),
        ("/v1/chat/completions", {"model": "chat", "messages": [{"role": "user", "content": "a" * 5000}]}),
        ("/v1/completions", {"model": "base", "prompt": "a" * 5000}),
        ("/v1/images/generations", {"model": "ddpm", "guidance": 2}),
    ]  # fmt: skip
    asking = """async ([path, body]) => {
      const { ask } = await import('/page/api.js');
      try { await ask(path, body); } catch (error) { return error.message; }
    }"""
    for locale in ("ja", "en-GB"):
        with opened(browser, served.url, locale) as page:
            for path, body in wrong:
                told = page.evaluate(asking, [path, body])
                assert told is not None, body
                if locale == "ja":
                    assert re.search("[ぁ-ん]", told) and "（英語）" not in told, (body, told)
                else:
                    assert told == served.post(path, body).json()["error"]["message"]


def test_a_server_with_a_key_asks_for_it(folder: Path, browser: Any) -> None:
    access = Access(keys=("secret",))
    with running([str(folder / "chat")], Limits(), access) as served, opened(browser, served.url) as page:
        page.wait_for_selector("#key-form:visible")
        page.fill("#asked-key", "wrong")
        page.click("#key-form button")
        page.wait_for_selector("#key-form:visible")
        page.fill("#asked-key", "secret")
        page.click("#key-form button")
        page.wait_for_selector("#model option", state="attached")
        assert page.locator("#key-form").is_hidden() and page.locator(".example").count() == 3


@pytest.mark.parametrize("locale", ["ja", "en-GB"])
@pytest.mark.parametrize("width", [390, 1280])
def test_tabs_can_be_reached_and_menus_show_their_words(served: Any, browser: Any, width: int, locale: str) -> None:
    fits = """list => {
      const style = getComputedStyle(list);
      const pen = document.createElement('canvas').getContext('2d');
      pen.font = style.font;
      const room = list.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
      return [list.selectedOptions[0].text, Math.ceil(pen.measureText(list.selectedOptions[0].text).width) <= room + 1];
    }"""
    with opened(browser, served.url, locale, width) as page:
        page.wait_for_selector("#tab-match:visible")
        for tab in page.locator("[role=tab]:visible").all():
            box = tab.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= width
        page.click("#show-settings")
        assert page.locator("#theme").evaluate(fits)[1], page.locator("#theme").evaluate(fits)
        page.click("#settings form > button")
        page.click("#tab-neuron")
        for name in ("kind", "class"):
            assert page.locator(f"#{name}").evaluate(fits)[1]


@pytest.mark.parametrize(("locale", "language"), [("ja", "ja"), ("en-GB", "en")])
def test_each_tab_says_what_is_seen_and_links_to_the_lineage(
    served: Any, browser: Any, locale: str, language: str
) -> None:
    with opened(browser, served.url, locale) as page:
        for name in ("look", "translate", "draw", "match", "neuron", "runs"):
            assert len(page.locator(f"#{name} .see p").text_content()) > 60
            link = page.get_attribute(f"#{name} .see a", "href")
            assert link.startswith(f"/lineage?language={language}")
            anchor = link.partition("#")[2]
            assert not anchor or f'id="{anchor}"' in httpx.get(served.url + link).text


def test_the_description_of_the_api_is_a_page(served: Any, browser: Any) -> None:
    page = browser.new_page()
    page.goto(f"{served.url}/docs")
    page.wait_for_selector("#paths h2:has-text('GET /v1/runs')")
    page.close()


def line(step: int, **figures: float) -> str:
    return json.dumps({"step": step, **figures}) + "\n"


def test_a_run_is_followed_while_it_grows_and_nothing_else_can_be_read(
    folder: Path, browser: Any, tmp_path: Path
) -> None:
    run = tmp_path / "runs/my run"
    run.mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/metrics.jsonl").write_text(line(1, loss=9.0))
    (run / "metrics.jsonl").write_text(line(1, loss=4.0) + line(2, loss=3.5, validation_loss=3.6) + '{"step": 3, "lo')
    (run / "recipe.json").write_text("{}")
    (tmp_path / "runs/linked").symlink_to(tmp_path / "secret")
    (tmp_path / "runs/odd").mkdir()
    (tmp_path / "runs/odd/metrics.jsonl").symlink_to(run / "recipe.json")
    with running([str(folder / "clip")], Limits(), Access(runs=tmp_path / "runs")) as served:
        listed = httpx.get(f"{served.url}/v1/runs").json()["data"]
        assert [each["id"] for each in listed] == ["my run"]
        for name in ("linked", "odd", "..", "%2e%2e", "..%2Fsecret", "my run%2Frecipe.json", "none"):
            assert httpx.get(f"{served.url}/v1/runs/{name}").status_code == 404, name
        first = httpx.get(f"{served.url}/v1/runs/my run").json()
        assert not first["running"]
        assert [json.loads(text)["step"] for text in first["lines"]] == [1, 2]
        with opened(browser, f"{served.url}/#runs") as page:
            page.wait_for_selector("#runs .chart")
            assert "validation: 3.6000" in page.inner_text("#runs .keys")
            assert "ended or was stopped" in page.inner_text("#runs")
            with hold(run):
                until(lambda: "looking again every 2 s" in page.inner_text("#runs"))
            ends = page.locator("#runs .chart text").evaluate_all(
                "all => all.map(e => [e.getBoundingClientRect().left, e.getBoundingClientRect().right])"
            )
            box = page.locator("#runs .chart").bounding_box()
            assert all(box["x"] - 1 <= left and right <= box["x"] + box["width"] + 1 for left, right in ends)
            with (run / "metrics.jsonl").open("a") as file:
                file.write('ss": 2.5}\n' + line(4, loss=1.25))
            until(lambda: "training: 1.2500" in page.inner_text("#runs .keys"))
            assert page.locator("#runs .line.training").get_attribute("points").count(",") == 4
            (run / "metrics.jsonl").write_text(line(1, loss=7.0))  # it begins again
            until(lambda: "training: 7.0000" in page.inner_text("#runs .keys"))
            assert page.locator("#runs .line.training").get_attribute("points").count(",") == 1


def test_a_server_with_a_key_guards_the_runs(folder: Path, tmp_path: Path) -> None:
    with running([str(folder / "clip")], Limits(), Access(keys=("secret",), runs=tmp_path)) as served:
        assert httpx.get(f"{served.url}/v1/runs").status_code == 401


def test_a_switch_of_language_keeps_what_is_shown(served: Any, browser: Any) -> None:
    with opened(browser, f"{served.url}/#look") as page:
        page.wait_for_selector("#look:visible")
        page.select_option("#look [name=model]", "base")
        page.fill("#look [name=input]", "abab")
        page.click("#look form button:not([type])")
        page.wait_for_selector("#look .map")
        assert "Attention weight" in page.inner_text("#look .scale")
        page.click("#language")
        assert "注意の重み" in page.inner_text("#look .scale") and page.locator("#look .map").count() == 1


def test_every_text_of_the_page_is_short() -> None:
    english = (FOLDER / "words/en.js").read_text(encoding="utf-8")
    for text in re.findall(r'See: "(.*?)",\n', english):
        for sentence in re.split(r"(?<=\.) |: ", text):
            assert len(sentence.split()) <= 25, sentence
