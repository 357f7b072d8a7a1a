"""The live elements of the documentation, in Chromium: a first frame, a click, what it shows, and what goes wrong."""

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mkdocs")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs/_site"))

import live as builder  # noqa: E402 (a file of docs/_site)
from local_server import WAIT, serve  # noqa: E402

from keifu.data.classification import points  # noqa: E402
from keifu.data.tokenizers.train import train_tokenizer  # noqa: E402

WIDTHS = {"en": 1280, "ja": 390}
FIRST = {  # elements whose first frame has the numbers that the model computes, and where they are
    "network": ".live-side",
    "gpt-en": ".live-bars",
    "decoding": ".live-body",
    "search": ".live-body",
    "heads": ".live-body",
    "comparison": ".live-body",
    "bert-en": ".live-columns",
    "ja-en": ".live-output",
}
AT_ONCE = "{ const start = setInterval; window.setInterval = (work) => start(work, 0); }"  # no wait between two steps
PIXELS = "[...document.querySelector('canvas').getContext('2d').getImageData(0, 0, 28, 28).data]"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with one page for each element and language, as the hooks of the documentation make them."""
    place = tmp_path_factory.mktemp("site")
    for language, folder in (("en", place), ("ja", place / "ja")):
        folder.mkdir(exist_ok=True)
        for name in builder.FILES:
            page = f'<!doctype html><html lang="{language}"><head><meta name="viewport" content="width=device-width">'
            page += f'<link rel="icon" href="data:,"></head><body><div data-live="{name}"></div></body></html>'
            address = f"{name}.html" if language == "en" else f"ja/{name}.html"
            (place / address).write_text(builder.fill(page, address), encoding="utf-8")
    builder.copy(place)
    return place


@pytest.fixture(scope="module")
def root(site: Path) -> Iterator[str]:
    yield from serve(site)


class Element:
    """A live element in a page of its own, and the addresses that the page asked for."""

    def __init__(self, chromium: Any, root: str, name: str, language: str = "en"):
        self.context = chromium.new_context(viewport={"width": WIDTHS[language], "height": 800})
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT)
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.add_init_script(AT_ONCE)
        self.page.goto(f"{root}/{'' if language == 'en' else 'ja/'}{name}.html")
        self.wait("idle", "error")

    def wait(self, *states: str) -> str:
        """Wait for one of the states and return it."""
        self.page.wait_for_selector(",".join(f"[data-live][data-state={state}]" for state in states))
        return self.state

    @property
    def state(self) -> str:
        return str(self.page.get_attribute("[data-live]", "data-state"))

    @property
    def message(self) -> str:
        return str(self.page.get_attribute("[data-live]", "data-message"))

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))

    def run(self) -> str:
        """Click the button and wait for the end."""
        self.page.click("[data-live-run]")
        return self.wait("done", "error")


@pytest.fixture
def element(chromium: Any, root: str) -> Iterator[Any]:
    """Yield a function that opens an element."""
    opened: list[Element] = []

    def make(name: str, language: str = "en") -> Element:
        opened.append(Element(chromium, root, name, language))
        return opened[-1]

    yield make
    for each in opened:
        each.context.close()
        assert each.errors == []


@pytest.mark.parametrize("language", ["en", pytest.param("ja", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", builder.FILES)
def test_each_element_runs(element, root: str, name: str, language: str) -> None:
    found = element(name, language)
    assert not any("/models/" in address or "kernel.wasm" in address for address in found.requests)
    button, body = found.text("[data-live-run]"), found.text(".live-body")
    size = sum((builder.MODELS / file).stat().st_size for file in builder.FILES[name])
    assert (f"{size / 1e6:.1f} MB" in button) == bool(size)
    assert found.page.locator(".live details").count() == 3 and found.page.locator(".live-about").inner_text()
    first = found.text(FIRST[name]) if name in FIRST else ""
    pixels = found.page.evaluate(PIXELS) if name == "digits" else []
    if name == "emoji":
        found.page.locator("input[aria-label^=Steps], input[aria-label^=ステップ]").fill("4")
    assert found.run() == "done", found.message
    assert found.text(".live-body") != "" and body != ""
    if name in FIRST:
        assert found.text(FIRST[name]) == first != ""
    if name == "digits":
        drawn = found.page.evaluate(PIXELS)
        assert max(abs(a - b) for a, b in zip(pixels, drawn, strict=True)) <= 2 and max(pixels) > 200
    assert found.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert all(address.startswith((root, "data:", "blob:")) for address in found.requests)
    controls = found.page.locator(".live :is(input, textarea, select, canvas[tabindex])")
    assert all(
        controls.nth(i).evaluate("node => node.ariaLabel || node.labels?.length") for i in range(controls.count())
    )


def test_perceptron_learns_and_refuses_xor(element) -> None:
    found = element("perceptron")
    assert found.run() == "done" and "11 corrections" in found.message
    found.page.select_option("select", "xor")
    assert found.run() == "done" and "no line separates" in found.message


def test_a_network_learns_xor_and_one_hidden_unit_does_not(element) -> None:
    found = element("xor")
    first = found.text(".live-matrix")
    assert found.run() == "done" and "500 steps" in found.message
    assert found.text(".live-matrix") != first
    script = """
    async (units) => {
      const { Network } = await import("/live/elements/backpropagation.js");
      const network = new Network(units, 1);
      while (network.steps < 20000 && !network.learned) network.step(2);
      return network.learned;
    }
    """
    assert [found.page.evaluate(script, units) for units in (1, 3, 8)] == [False, True, True]


def test_the_gradients_of_the_page_are_those_of_pytorch(element) -> None:
    script = """
    async () => {
      const { Network } = await import("/live/elements/backpropagation.js");
      const network = new Network(3, 7);
      const read = ({ hidden, bias }) => [
        hidden.map(({ weights }) => weights), hidden.map(({ bias }) => bias), hidden.map(({ out }) => out), bias,
      ];
      return [read(network), read(network.gradients), network.error];
    }
    """
    weights, gradients, error = element("xor").page.evaluate(script)
    first, below, last, above = parameters = [torch.tensor(each, requires_grad=True) for each in weights]
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    y = torch.sigmoid(torch.sigmoid(x @ first.T + below) @ last + above)
    loss = (y - torch.tensor([0.0, 1.0, 1.0, 0.0])).square().sum() / 2
    loss.backward()
    assert loss.item() == pytest.approx(error, abs=1e-6)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, torch.tensor(gradient), atol=1e-6, rtol=1e-4)


def test_the_small_network_has_the_gradients_of_pytorch(element) -> None:
    script = """
    async () => {
      const { SmallNetwork, generator } = await import("/live/small_network.js");
      const network = new SmallNetwork([3, 5, 4, 2], generator(3));
      const below = network.backward(network.forward([0.3, -0.5, 0.8]), [0.7, -0.2]);
      const read = (name) => network.layers.map((layer) => [...layer[name]]);
      return [read("weights"), read("gradient"), [...below]];
    }
    """
    weights, gradients, below = element("points").page.evaluate(script)
    x = state = torch.tensor([0.3, -0.5, 0.8], requires_grad=True)
    parameters = [torch.tensor(each).view(n, -1).requires_grad_() for each, n in zip(weights, (5, 4, 2), strict=True)]
    for depth, each in enumerate(parameters):
        state = state @ each[:, :-1].T + each[:, -1]
        state = state.tanh() if depth < 2 else state
    (state @ torch.tensor([0.7, -0.2])).backward()
    for parameter, gradient in zip([*parameters, x], [*gradients, below], strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.flatten(), torch.tensor(gradient), atol=1e-6, rtol=1e-4)


def test_diffused_points_come_to_the_training_points(element) -> None:
    found = element("points")
    assert found.run() == "done" and "Steps: 2000" in found.text(".live-state")
    script = """
    async (steps) => {
      const { Diffusion } = await import("/live/elements/points.js");
      const model = new Diffusion("ring");
      while (model.steps < steps) model.step();
      return model.draw(150).filter((point) => Math.abs(Math.hypot(...point) - 1) > 0.3).length;
    }
    """
    assert found.page.evaluate(script, 0) > 50
    assert found.page.evaluate(script, 1000) < 15


def test_straight_paths_need_one_step(element) -> None:
    found = element("flow")
    found.page.click("text=Straighten the paths")
    assert found.message == "Learn first, then straighten."
    script = """
    async (steps) => {
      const { Flow } = await import("/live/elements/flow.js");
      const model = new Flow("clusters");
      const learn = () => { while (model.steps < steps) model.step(24); };
      const away = (count) => model.away(model.draw(100, count).map((path) => path.at(-1)));
      learn();
      const before = [away(1), away(8)];
      model.straighten();
      learn();
      return [...before, away(1)];
    }
    """
    one, eight, straight = found.page.evaluate(script, 600)
    assert one > 0.5 and eight < 0.3 and straight < 0.3


def test_beam_search_finds_a_likelier_text_than_the_greedy_one(element) -> None:
    found = element("search")
    found.page.fill("textarea", "The recipe needs")
    assert found.run() == "done"
    greedy, beam, nucleus = (
        float(re.findall(r"-[\d.]+", text)[0]) for text in found.page.locator(".live-state").all_inner_texts()
    )
    assert beam > greedy > nucleus


def test_heads_of_the_encoder_are_shown_and_switched_off(element) -> None:
    found = element("ja-en")
    assert found.run() == "done"
    assert found.page.locator("select option").count() == 1 + 18 + 24
    found.page.select_option("select", "encoder.0.0")
    rows, columns = (found.page.locator(f".live-matrix th[scope={scope}]") for scope in ("row", "col"))
    assert rows.all_inner_texts() == columns.all_inner_texts() != []
    found.page.check("input[type=checkbox]")
    assert found.wait("done") and found.text(".live-output")


def test_the_exact_score_of_the_page_is_that_of_keifu(element) -> None:
    script = """
    async (name) => {
      const { Mixture } = await import("/live/elements/score.js");
      const mixture = new Mixture(name);
      const places = [[0.3, -0.5], [1.1, 0.9], [-0.2, 0.1]];
      return places.map((place) => [0, 1, 2].map((label) => mixture.score(place, 0.4, label)));
    }
    """
    page = element("score").page
    places = torch.tensor([[0.3, -0.5], [1.1, 0.9], [-0.2, 0.1]])
    for name in points.MIXTURES:
        found = torch.tensor(page.evaluate(script, name))
        for label in range(3):
            score = points.mixture(name).score(places, torch.full((3,), 0.4), torch.full((3,), label))
            torch.testing.assert_close(found[:, label], score, atol=1e-4, rtol=1e-4)


def test_points_come_to_their_class_by_sde_and_ode_and_closer_with_guidance(element) -> None:
    found = element("score")
    script = """
    async () => {
      const { ScoreModel } = await import("/live/elements/score.js");
      const model = new ScoreModel("clusters");
      const off = (way, guidance) => {
        const drawn = model.draw(200, 20, way, guidance);
        return drawn.filter((point) => model.mixture.far(point)).length;
      };
      const first = off("sde", 1);
      while (model.steps < 2000) model.step();
      return [first, off("sde", 1), off("ode", 1), off("ode", 4)];
    }
    """
    first, sde, ode, guided = found.page.evaluate(script)
    assert first > 100 and sde < 80 and ode < 80 and guided < ode
    picture = "document.querySelector('canvas').toDataURL()"
    before = found.page.evaluate(picture)
    found.page.locator("input[aria-label^=Steps]").fill("2")
    assert found.page.evaluate(picture) != before


def test_a_slow_discriminator_lets_the_generated_points_collapse(element) -> None:
    script = """
    async (share) => {
      const { Adversaries } = await import("/live/elements/adversaries.js");
      const model = new Adversaries("ring");
      while (model.steps < 1500) model.step(share);
      return model.reached(model.draw(250));
    }
    """
    page = element("adversaries").page
    (reached, near), (collapsed, _) = (page.evaluate(script, share) for share in (1, 0.1))
    assert reached == 8 and near > 0.8 and collapsed <= 3


def test_a_point_is_moved_and_changed_by_keys(element) -> None:
    found = element("perceptron")
    point = found.page.locator(".live-dot").nth(0)
    left = point.evaluate("node => node.style.left")
    point.focus()
    found.page.keyboard.press("ArrowRight")
    assert found.page.locator(".live-dot").nth(0).evaluate("node => node.style.left") != left
    found.page.keyboard.press("Enter")
    assert found.page.locator(".live-dot").nth(0).inner_text() == "1"


def test_each_way_of_decoding_has_its_own_candidates(element) -> None:
    found = element("decoding")
    found.page.fill("textarea", "He was born in London in the United")
    assert found.run() == "done"
    left = """[...document.querySelectorAll('.live-side')].map(
      (side) => [...side.querySelectorAll('.live-share')].filter((node) => node.innerText != '0.0%').length)"""
    every, top_k, top_p, min_p = found.page.evaluate(left)
    assert every >= 3 and (top_k, top_p, min_p) == (5, 1, 1)
    found.page.locator("input[aria-label=Temperature]").fill("0")
    found.page.click("text=Write 30 tokens")
    found.page.wait_for_function(
        "[...document.querySelectorAll('.live-side > p')].every(({ textContent }) => textContent)"
    )
    assert found.wait("done") and found.page.locator(".live-side > p").count() == 4


def test_the_merges_of_the_page_are_those_of_keifu(element) -> None:
    script = """
    async (text) => {
      const { cut, learnPairs } = await import("/live/elements/pairs.js");
      const merges = learnPairs(text);
      return [merges.map(([left, right]) => left + right), cut(text, merges)];
    }
    """
    page = element("pairs").page
    for text in ("she sells sea shells by the sea shore", " low" * 5 + " lower" * 2 + " newest" * 6):
        merges, tokens = page.evaluate(script, text)
        keifu = train_tokenizer("bpe", [text], vocab_size=257 + len(merges))
        names = [keifu.backend.id_to_token(number) for number in range(257, 257 + len(merges))]
        assert names == [merge.replace(" ", "Ġ") for merge in merges]
        assert [keifu.decode([token]) for token in keifu.encode(text)] == tokens


def test_the_ways_of_the_page_are_those_of_pytorch(element) -> None:
    script = """
    async (name) => {
      const { FUNCTIONS, OPTIMIZERS } = await import("/live/elements/descent.js");
      const { slope, start, value } = FUNCTIONS[name];
      return [start, value(...start), ...Object.values(OPTIMIZERS).map((walk) => walk(slope, start, 0.05, 30).at(-1))];
    }
    """
    functions = {
        "valley": lambda x, y: 0.025 * x**2 + y**2,
        "bend": lambda x, y: 0.1 * (1 - x) ** 2 + (y - x**2 / 2) ** 2,
        "two": lambda x, y: 0.5 * (x**2 - 1) ** 2 - 0.15 * x + y**2 / 2 + 0.15,
    }
    optimizers = [
        lambda w: torch.optim.SGD([w], lr=0.05),
        lambda w: torch.optim.SGD([w], lr=0.05, momentum=0.9),
        lambda w: torch.optim.Adam([w], lr=0.05),
    ]
    page = element("descent").page
    for name, function in functions.items():
        start, value, *ends = page.evaluate(script, name)
        assert value == pytest.approx(function(*start))
        for make, end in zip(optimizers, ends, strict=True):
            w = torch.tensor(start, dtype=torch.float64, requires_grad=True)
            optimizer = make(w)
            for _ in range(30):
                optimizer.zero_grad()
                function(*w).backward()
                optimizer.step()
            torch.testing.assert_close(w.detach(), torch.tensor(end, dtype=torch.float64), atol=1e-9, rtol=0)


def test_the_start_of_the_ways_is_moved_by_keys(element) -> None:
    found = element("descent")
    values = found.text(".live-ways")
    found.page.locator("canvas").focus()
    found.page.keyboard.press("ArrowRight")
    assert found.text(".live-ways") != values


def test_a_head_is_enlarged(element) -> None:
    found = element("heads")
    assert found.page.locator(".live-head").count() == 16 and "Layer 3, head 4" in found.text(".live-body")
    found.page.locator(".live-head").nth(0).click()
    assert "Layer 1, head 1" in found.text(".live-body")
    found.page.fill("textarea", "A dog")
    assert found.run() == "done" and found.page.locator(".live-matrix th[scope=row]").count() == 2


def test_words_find_their_pictures(element) -> None:
    found = element("emoji-clip")
    assert found.run() == "done"
    best = """[...document.querySelectorAll('.live-pictures tr')].slice(1).map((row) => {
      const heats = [...row.querySelectorAll('td')].map((cell) => Number(cell.style.getPropertyValue('--heat')));
      return Math.floor(heats.indexOf(Math.max(...heats)) / 3);
    })"""
    assert found.page.evaluate(best) == [0, 1, 2, 3]  # the colours of red, blue, green and yellow
    found.page.click("[aria-label='blue circle']")
    assert found.page.locator(".live-bar").count() == 4
    found.page.fill("textarea", " ")
    assert found.run() == "error" and found.message.endswith(".")


def test_settings_change_what_may_be_drawn(element) -> None:
    found = element("gpt-en")
    assert found.run() == "done"
    assert sum(share != "0.0%" for share in found.page.locator(".live-bar .live-share").all_inner_texts()) == 12
    found.page.locator("input[aria-label^=Top-k]").fill("2")
    few = "[...document.querySelectorAll('.live-share')].filter(node => node.innerText != '0.0%').length == 2"
    found.page.wait_for_function(few)


def test_any_text_is_answered(element) -> None:
    """Nothing, emoji, and more than the context."""
    gpt, bert = element("gpt-en"), element("bert-en")
    for text in ("", "🙂" * 40, "word " * 300):
        gpt.page.fill("textarea", text)
        assert gpt.run() == "done" and gpt.page.locator(".live-bar").count() == 12
        bert.page.fill("textarea", text)
        assert bert.run() == "error" and bert.message.endswith(".")


def test_errors_are_in_the_language_of_the_page(element) -> None:
    found = element("bert-en", "ja")
    found.page.fill("textarea", "word " * 300)
    assert found.run() == "error" and "語を選ぶか" in found.message
    found = element("network", "ja")
    found.page.route("**/model.safetensors", lambda route: route.abort())
    assert found.run() == "error" and found.message.endswith("読み込めませんでした。もう一度試してください。")


def test_every_error_of_the_engine_has_a_japanese_sentence(element) -> None:
    sources = [path.read_text("utf-8") for path in sorted(builder.kernel.ENGINE.glob("*.js"))]
    pattern = r"(?:Error\(|sentence = .*?: )(`(?:[^`$]|\$\{.*?\})*`|\"[^\"]*\")"
    templates = {found[1:-1] for source in sources for found in re.findall(pattern, source)}
    sentences = sorted(re.sub(r"\$\{.*?\}", "7", template) for template in templates)
    sentences += ["models/a.json could not be loaded (404): try again.", "The engine could not start: no workers."]
    assert len(sentences) >= 30
    script = "async (all) => { const { inJapanese } = await import('/live/japanese.js'); return all.map(inJapanese); }"
    translated = element("perceptron").page.evaluate(script, sentences)
    left = [there for here, there in zip(sentences, translated, strict=True) if here == there]
    assert left == []


@pytest.mark.slow
def test_clicks_while_it_computes_do_no_harm(element) -> None:
    found = element("digits")
    assert found.run() == "done"
    for _ in range(5):
        found.page.click("[data-live-run]")
    found.wait("done")
    assert found.run() == "done"


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_damaged_weights_give_a_sentence(element, site: Path, damage: str) -> None:
    file = site / "live/models/network/model.safetensors"
    whole = file.read_bytes()
    file.unlink() if damage == "missing" else file.write_bytes(whole[:300_000])
    found = element("network")
    assert found.run() == "error" and found.message.endswith(".")
    file.write_bytes(whole)
    assert found.run() == "done"


def test_without_its_kernel_the_engine_computes_in_javascript(element, site: Path, tmp_path: Path) -> None:
    kernel = site / "engine/kernel.wasm"
    if kernel.exists():
        shutil.move(kernel, tmp_path / "kernel.wasm")
    found = element("bert-en")
    first = found.text(".live-columns")
    assert found.run() == "done" and found.text(".live-columns") == first
    assert found.page.get_attribute("[data-live]", "data-kernel") == "false"
    if (tmp_path / "kernel.wasm").exists():
        shutil.move(tmp_path / "kernel.wasm", kernel)


def test_an_unknown_element_fails_the_build() -> None:
    with pytest.raises(KeyError):
        builder.fill('<head></head><div data-live="nothing"></div>', "index.html")
    assert builder.fill("<head></head>", "index.html") == "<head></head>"
