"""Each Japanese page says what the English one beside it says: its headings, code, pictures, links and numbers."""

import re
from decimal import Decimal
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
    text = in_digits(re.sub(r"\]\([^)]*\)", "]", FENCE.sub("", page)))
    found = re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", text)
    return {number.replace(",", "") for number in found if len(number) > 1}


POWERS = {"million": 6, "billion": 9, "trillion": 12, "M": 6, "B": 9, "T": 12, "万": 4, "億": 8, "兆": 12}
NUMBER = r"(\d+(?:,\d{3})*(?:\.\d+)?) ?"
LARGE = re.compile(rf"(?:{NUMBER}(億|兆) ?)?{NUMBER}({'|'.join(POWERS)})(?![A-Za-z])")


def in_digits(text: str) -> str:
    """Write "300 billion", "300B", "3,000 億" and "11 億 3,000 万" as their digits without zeros at the end."""

    def digits(match: re.Match[str]) -> str:
        pairs = [(match[1], match[2]), (match[3], match[4])]
        terms = [Decimal(number.replace(",", "")) * 10 ** POWERS[unit] for number, unit in pairs if number]
        return f"{sum(terms):.0f}".rstrip("0")

    return LARGE.sub(digits, text)


def test_large_numbers_are_the_same_in_both_units() -> None:
    for english, japanese in (
        ("300 billion", "3,000 億"),
        ("1.13 billion", "11 億 3,000 万"),
        ("70 million", "7,000 万"),
    ):
        assert in_digits(english) == in_digits(japanese) and in_digits(english).isdigit()


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
