"""Each Japanese page says what the English one beside it says: its headings, code, pictures, links and numbers."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMENT = re.compile(r"(^|\s+)#\s.*$")
PAIRS = [
    (page.with_name(page.name.replace(".ja.md", ".md")), page)
    for page in sorted([*(ROOT / "docs").rglob("*.ja.md"), *ROOT.glob("README.ja.md")])
]


def headings(page: str) -> list[int]:
    """Return the levels of the headings, in order."""
    return [len(marks) for marks in re.findall(r"(?m)^(#+) ", FENCE.sub("", page))]


def blocks(page: str) -> list[list[str]]:
    """Return the lines of each block of code, without comments and without blocks of plain text."""
    found = [text for language, text in FENCE.findall(page) if language != "text"]
    return [[line for each in text.splitlines() if (line := COMMENT.sub("", each).rstrip())] for text in found]


def pictures(page: str) -> list[str]:
    """Return the names of the pictures, in order."""
    return [Path(name).name.replace(".ja.svg", ".svg") for name in re.findall(r"!\[[^\]]*\]\(([^)]*)\)", page)]


def links(page: str) -> list[str]:
    """List where the page's links lead, sorted; to pages in Japanese as to those in English."""
    found = re.findall(r"(?<!!)\[[^\]]*\]\(([^)#\s]+)", FENCE.sub("", page))
    return sorted({link.replace(".ja.md", ".md").replace(".ja.svg", ".svg") for link in found})


def numbers(page: str) -> set[str]:
    """Return numbers of two digits or more, or with a point, outside of code and links."""
    text = re.sub(r"\]\([^)]*\)", "]", FENCE.sub("", page))
    found = re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", text)
    return {number.replace(",", "") for number in found if len(number) > 1}


@pytest.mark.slow  # a contributor's page may land in English; make test-all asks for the translation
def test_every_page_is_there_in_japanese() -> None:
    pages = {page for page in (ROOT / "docs").rglob("*.md") if not page.name.endswith(".ja.md")}
    assert pages - {english for english, _ in PAIRS} == set()


ASPECTS = [headings, blocks, pictures, links, numbers]


@pytest.mark.parametrize("aspect", ASPECTS, ids=lambda each: each.__name__)
@pytest.mark.parametrize(("english", "japanese"), PAIRS, ids=lambda path: path.name)
def test_both_languages_say_the_same(english: Path, japanese: Path, aspect) -> None:
    assert aspect(japanese.read_text(encoding="utf-8")) == aspect(english.read_text(encoding="utf-8"))


LINK = re.compile(r"\]\(([^)#\s:]+)\.md(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", [japanese for _, japanese in PAIRS], ids=lambda path: path.name)
def test_a_japanese_page_links_to_japanese_pages(page: Path) -> None:
    names = set(LINK.findall(page.read_text(encoding="utf-8"))) - {"README"}  # README.ja.md links to the English one
    english = [name for name in names if not name.endswith(".ja") and (page.parent / f"{name}.ja.md").exists()]
    assert english == []


PAGE = "# A\n\n```\nkeifu chat smollm2   # talk\n```\n\n## B\n\n![x](../pictures/x.png) [y](y.md) is 1,024 and 0.5 s.\n"


@pytest.mark.parametrize(
    ("aspect", "was", "becomes"),
    [
        (headings, "## B", "### B"),
        (blocks, "smollm2 ", "smollm3 "),
        (pictures, "x.png", "z.png"),
        (links, "y.md", "z.md"),
        (numbers, "1,024", "1,025"),
        (numbers, "0.5", "0.6"),
    ],
)
def test_a_difference_would_be_seen(aspect, was: str, becomes: str) -> None:
    assert aspect(PAGE.replace(was, becomes)) != aspect(PAGE)


def test_words_may_differ() -> None:
    japanese = PAGE.replace("# talk", "# 会話").replace("is", "は").replace(" and ", "と").replace("y.md", "y.ja.md")
    assert all(aspect(japanese) == aspect(PAGE) for aspect in ASPECTS)


TERMS = {  # one Japanese word for a concept: another word, and the one that the pages use
    "訓練": "学習", "節目": "ランドマーク", "最適化器": "オプティマイザ", "トークナイザー": "トークナイザ",
    "アダプター": "アダプタ", "キーとバリュー": "キーと値", "実行フォルダ": "学習フォルダ", "動詞": "コマンド",
    "をもつ": "を持つ", "〜": "～", "変奏": "バリエーション", "事前モデル": "prior",
    "デコーダー": "デコーダ", "エンコーダー": "エンコーダ", "デフォルト": "既定", "フォルダー": "フォルダ",
    "微調整": "ファインチューニング", "同じ絵": "同じ画像", "サンプラ(?!ー)": "サンプラー",
    "タワー": "塔",
}  # fmt: skip


@pytest.mark.parametrize("page", [japanese for _, japanese in PAIRS], ids=lambda path: path.name)
def test_a_concept_has_one_japanese_word(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert {word: use for word, use in TERMS.items() if re.search(word, text)} == {}


def test_tabs_of_the_service_have_the_pages_names() -> None:
    words = (ROOT / "src/keifu/serving/page/words/ja.js").read_text(encoding="utf-8")
    page = (ROOT / "docs/serving.ja.md").read_text(encoding="utf-8")
    named = [re.search(rf'\b{tab}: "([^"]+)"', words) for tab in ("chat", "look", "translate", "draw", "match", "runs")]
    assert [found[1] for found in named if found and f"- **{found[1]}**" not in page] == []
    assert all(named)
