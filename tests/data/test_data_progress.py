"""The progress display where nobody watches: a few plain lines."""

from keifu.data.progress import counting


def test_a_pipe_gets_a_line_at_each_tenth_and_one_at_the_end(capfd) -> None:
    with counting("words", 2_000_000) as advance:
        for reached in range(0, 2_000_001, 10_000):
            advance(reached)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 11 and lines[0] == "words: 0.2 of 2.0 MB" and lines[-1].startswith("words: done, 2.0 MB in ")


def test_small_amounts_keep_their_unit(capfd) -> None:
    with counting("words", 40, "characters") as advance:
        advance(40)
    assert capfd.readouterr().err.splitlines()[0] == "words: 40 of 40 characters"
