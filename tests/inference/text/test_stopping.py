"""Stop strings: where the text ends, and that it does not matter how the text was cut into pieces."""

import pytest
from hypothesis import given, settings, strategies as st

from keifu.inference.text.request import StopText


def run(stops: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    """Return the output of each piece and of the final flush, and whether a stop string came."""
    text, out = StopText(stops), []
    for piece in pieces:
        out.append(text.push(piece))
        if text.is_stopped:
            break
    return [*out, text.flush()], text.is_stopped


@pytest.mark.parametrize(
    ("stops", "pieces", "out"),
    [
        (["END"], ["one E", "N", "D two"], ["one ", "", "", ""]),
        (["END"], ["one E", "N", "d two"], ["one ", "", "ENd two", ""]),
        (["END"], ["one E"], ["one ", "E"]),
        (["\n\n"], ["a\n", "b\n", "\nc"], ["a", "\nb", "", ""]),
        (["。」"], ["「はい。", "」と"], ["「はい", "", ""]),
        (["aab"], ["aa", "ab"], ["", "a", ""]),
        ([], ["anything", " goes"], ["anything", " goes", ""]),
    ],
)
def test_text_is_held_back_no_more_than_it_must_be(stops: list[str], pieces: list[str], out: list[str]) -> None:
    assert run(stops, pieces)[0] == out


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.lists(st.text("abc", max_size=5), max_size=8))
def test_pieces_do_not_matter(stops: list[str], pieces: list[str]) -> None:
    whole = "".join(pieces)
    ends = [end for end in range(len(whole) + 1) if any(whole[:end].endswith(stop) for stop in stops)]
    out, found = run(stops, pieces)
    assert found == bool(ends)
    if ends:  # the text ends before the longest stop string that is complete at the first such place
        stop = max((stop for stop in stops if whole[: ends[0]].endswith(stop)), key=len)
        assert "".join(out) == whole[: ends[0] - len(stop)]
    else:
        assert "".join(out) == whole
