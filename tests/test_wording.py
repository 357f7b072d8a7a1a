"""Plain English in the source: no forbidden opening or word in docstrings, comments, option help and messages.

`LEFT` counts what is not rewritten yet, by folder. A number may only fall: lower it when you rewrite a folder.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src/keifu"
OPENINGS = re.compile(r"(What|Of|Those|Where|So many|As of|Which)\b(?! is\b.*\?)")
WORDS = re.compile(r"\b(beside|bought|buys|in place of|told|so many|all else|verbs?)\b", re.IGNORECASE)
ODD_COMMENT = re.compile(f"#[# ]*{OPENINGS.pattern}|#.*(?i:{WORDS.pattern})")  # perhaps: it may be within a string
EXCEPTIONS: dict[str, str] = {}  # a phrase, and the reason why it stays
LEFT: dict[str, int] = {
    "commands": 5, "data": 8, "inference": 4, "native": 1, "serving": 3, "training": 1,
}  # fmt: skip

# First words of a function's docstring that are no imperative, though ruff's D401 takes them for one.
NO_VERBS = re.compile(
    "(A|An|The|All|Every|Each|One|Both|Its|Their|Whether|How|Why|Where|When|As|For|From|With|Without|Within|Of|In|At|By|To|"
    "No|Nothing|Never|Everything|There|Several|Two|Three|Other|Our|Ours|Theirs|Those|These|Which|What|More|Only)"
)
NO_VERBS_LEFT: dict[str, int] = {"inference": 1}


@cache
def nodes(text: str) -> list[ast.AST]:
    """Return all nodes of a file's syntax tree."""
    return [*ast.walk(ast.parse(text))]


@pytest.fixture(scope="module", autouse=True)
def _forget_nodes() -> Iterator[None]:
    """Free the syntax trees after the tests of this file."""
    yield
    nodes.cache_clear()


def sentences(text: str) -> Iterator[str]:
    """Yield the docstrings and strings with a space of a file, and its comments if one of them may break a rule."""
    for node in nodes(text):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.value.strip()
    if not ODD_COMMENT.search(text):  # to split a file into tokens takes longest
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.string.lstrip("# ")


def violations(text: str) -> list[str]:
    """Return the sentences that break a rule."""
    found = (sentence for sentence in sentences(text) if OPENINGS.match(sentence) or WORDS.search(sentence))
    return [sentence for sentence in found if not any(phrase in sentence for phrase in EXCEPTIONS)]


def folder(path: Path) -> str:
    parts = path.relative_to(SOURCE).parts
    return parts[0] if len(parts) > 1 else "files"


FOLDERS = sorted({folder(path) for path in SOURCE.rglob("*.py")})


@cache
def files() -> dict[Path, str]:
    """Return the text of each file of the source."""
    return {path: path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py")}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_has_no_more_odd_sentences_than_are_listed(name: str) -> None:
    texts = {path: text for path, text in files().items() if folder(path) == name}
    found = [f"{path.name}: {odd[:90]}" for path, text in texts.items() for odd in violations(text)]
    assert len(found) <= LEFT.get(name, 0), "\n".join(["rewrite some of these:", *found])


def test_odd_sentences_are_found() -> None:
    """Each rule finds what it is for, in a docstring, a comment and a message."""
    bad = 'def f():\n    """What X does."""\n    raise ValueError("a file beside it")  # in place of another\n'
    assert len(violations(bad)) == 3
    assert violations('def f():\n    """Return X next to Y."""\n    # instead of Z\n') == []


def first_words(text: str) -> Iterator[str]:
    """Yield the first word of the docstring of each function; a property's may be a noun."""
    for node in nodes(text):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        is_property = any("property" in ast.unparse(decorator) for decorator in node.decorator_list)
        if (docstring := ast.get_docstring(node)) and not is_property:
            yield docstring.split()[0].rstrip(",.:;")


@cache
def openings() -> dict[Path, list[str]]:
    """Return the first words of the docstrings of each file of the source."""
    return {path: [*first_words(text)] for path, text in files().items()}


def is_imperative(word: str, words: set[str]) -> bool:
    """Return whether a first word is none of the listed ones, nor the third person of one of `words`: "Trains"."""
    return not NO_VERBS.fullmatch(word) and not (word.endswith("s") and {word[:-1], word[:-2]} & words)


@pytest.mark.parametrize("name", FOLDERS)
def test_docstrings_of_functions_begin_with_an_imperative(name: str) -> None:
    words = {word for found in openings().values() for word in found}
    odd = [
        f"{path.name}: {word}"
        for path, found in openings().items()
        for word in found
        if folder(path) == name and not is_imperative(word, words)
    ]
    assert len(odd) <= NO_VERBS_LEFT.get(name, 0), "\n".join(["begin these with an imperative verb:", *odd])


def test_first_words_that_are_no_imperative_are_found() -> None:
    text = (
        'def f():\n    """Trains it."""\n\n@property\ndef g():\n    """The rate."""\n\ndef h():\n    """How many."""\n'
    )
    assert [*first_words(text)] == ["Trains", "How"]
    assert not is_imperative("Trains", {"Train"}) and not is_imperative("How", set())
    assert is_imperative("Guess", {"Guess", "Train"}) and is_imperative("Train", {"Train"})
