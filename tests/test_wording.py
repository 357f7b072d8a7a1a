"""Plain English in the source: a short list of openings and words that docstrings, help and messages do not use."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src/keifu"
OPENINGS = re.compile(r"(What|Of|Those|Where|So many|As of|Which)\b(?! is\b)")
WORDS = re.compile(r"\b(beside|bought|in place of|told|so many|all else|verbs?)\b", re.IGNORECASE)
ODD_COMMENT = re.compile(f"#[# ]*{OPENINGS.pattern}|#.*(?i:{WORDS.pattern})")  # perhaps: it may be within a string

# First words of a function's docstring that are no imperative, though ruff's D401 takes them for one.
NO_VERBS = re.compile(
    "(A|An|The|All|Every|Each|One|Both|Its|Their|Whether|How|Why|Where|When|As|For|From|With|Without|Within|Of|In|At|By|To|"
    "No|Nothing|Never|Everything|There|Several|Two|Three|Other|Our|Ours|Theirs|Those|These|Which|What|More|Only)"
)


def sentences(tree: ast.Module, text: str) -> Iterator[str]:
    """Yield the docstrings and strings with a space of a file, and its comments if one of them may break a rule."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.value.strip()
    if not ODD_COMMENT.search(text):  # to split a file into tokens takes longest
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.string.lstrip("# ")


def first_words(tree: ast.Module) -> Iterator[str]:
    """Yield the first word of the docstring of each function; a property's may be a noun."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        is_property = any("property" in ast.unparse(decorator) for decorator in node.decorator_list)
        if (docstring := ast.get_docstring(node)) and not is_property:
            yield docstring.split()[0].rstrip(",.:;")


def odd_sentences(text: str) -> list[str]:
    """Return the sentences and the first words of a file that break a rule."""
    tree = ast.parse(text)
    odd = [sentence for sentence in sentences(tree, text) if OPENINGS.match(sentence) or WORDS.search(sentence)]
    return odd + [f"no imperative: {word}" for word in first_words(tree) if NO_VERBS.fullmatch(word)]


def test_the_source_has_no_odd_sentences() -> None:
    texts = {path.relative_to(SOURCE): path.read_text(encoding="utf-8") for path in sorted(SOURCE.rglob("*.py"))}
    assert [f"{path}: {odd[:90]}" for path, text in texts.items() for odd in odd_sentences(text)] == []


def test_odd_sentences_are_found() -> None:
    """Each rule finds what it is for, in a docstring, a comment and a message."""
    bad = 'def f():\n    """What X does."""\n    raise ValueError("a file beside it")  # in place of another\n'
    assert len(odd_sentences(bad)) == 4
    assert odd_sentences('def f():\n    """Return X next to Y."""\n    # instead of Z\n') == []
    assert odd_sentences('@property\ndef g():\n    """The rate."""\n\ndef h():\n    """How many."""\n') == [
        "no imperative: How"
    ]
