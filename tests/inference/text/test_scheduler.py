"""The scheduler by itself, step by step and by hand: who runs, how many tokens, which blocks, and what is kept.

Blocks have 4 tokens. A step is written as (sequence, first position, tokens, logits) of each of its spans.
"""

from collections.abc import Sequence as Tokens

import pytest

from keifu.inference.text.paged.blocks import BlockManager
from keifu.inference.text.request import Request
from keifu.inference.text.sampling_params import SamplingParams
from keifu.inference.text.scheduler import Scheduler, Sequence


class Steps:
    """A scheduler whose steps are recorded; the sampled token is 900 and the sequence's number."""

    def __init__(self, n_blocks: int, max_running: int = 3, step_tokens: int = 8, window: int | None = None):
        self.blocks = BlockManager(n_blocks, 4, window=window)
        self.scheduler = Scheduler(self.blocks, max_running, step_tokens, contiguous=False)
        self.sequences: dict[int, Sequence] = {}

    def add(self, number: int, prompt: Tokens[int], limit: int = 50) -> Sequence:
        request = Request(prompt, SamplingParams(max_tokens=limit), None, 1000, 1000)
        self.sequences[number] = Sequence(number, request, [*prompt])
        self.scheduler.add(self.sequences[number])
        return self.sequences[number]

    def step(self) -> list[tuple[int, int, int, int]]:
        spans = self.scheduler.schedule()
        for span in spans:
            sequence = self.sequences[span.sequence]
            assert [*span.tokens] == sequence.tokens[span.start :][: len(span.tokens)]
            assert len(span.blocks) * 4 >= span.start + len(span.tokens)
            self.scheduler.done(sequence, len(span.tokens))
            sequence.tokens += [900 + span.sequence] * span.wanted
        return [(span.sequence, span.start, len(span.tokens), span.wanted) for span in spans]


def test_running_texts_go_first_and_prompts_share_the_rest_in_turn() -> None:
    """Eight tokens per step, and three sequences; no length is a multiple of another."""
    steps = Steps(40)
    for number, length in enumerate((6, 7, 3, 2)):
        steps.add(number, range(100 * number, 100 * number + length))
    assert steps.step() == [(0, 0, 6, 1), (1, 0, 2, 0)]
    assert steps.step() == [(0, 6, 1, 1), (1, 2, 5, 1), (2, 0, 2, 0)]
    assert steps.step() == [(0, 7, 1, 1), (1, 7, 1, 1), (2, 2, 1, 1)], "the fourth waits for a place"
    assert steps.blocks.free == 40 - (2 + 2 + 1)
    steps.scheduler.remove(steps.sequences[0])
    assert steps.step() == [(1, 8, 1, 1), (2, 3, 1, 1), (3, 0, 2, 1)]
    steps.add(4, [1])
    steps.scheduler.remove(steps.sequences[4])
    assert not steps.scheduler.waiting and [each.number for each in steps.scheduler.running] == [1, 2, 3]


def test_a_prompt_that_has_no_token_left_in_a_step_waits() -> None:
    steps = Steps(40, max_running=4, step_tokens=2)  # at least one token for each
    for number in range(4):
        steps.add(number, [100 * number, 100 * number + 1])
    assert steps.step() == [(0, 0, 2, 1), (1, 0, 2, 1)]
    assert steps.step() == [(0, 2, 1, 1), (1, 2, 1, 1), (2, 0, 2, 1)]
    assert steps.step() == [(0, 3, 1, 1), (1, 3, 1, 1), (2, 2, 1, 1), (3, 0, 1, 0)]
    assert steps.step() == [(0, 4, 1, 1), (1, 4, 1, 1), (2, 3, 1, 1), (3, 1, 1, 1)]


def test_the_newest_loses_its_blocks_and_finds_the_oldest_of_them_again() -> None:
    """Four blocks, and a third text in the queue: the first two need a third block at their ninth token."""
    steps = Steps(4, max_running=2, step_tokens=14)
    first, second, late = steps.add(0, range(7)), steps.add(1, range(100, 107)), steps.add(2, [300])
    assert steps.step() == [(0, 0, 7, 1), (1, 0, 7, 1)] and steps.blocks.free == 0
    assert steps.step() == [(0, 7, 1, 1), (1, 7, 1, 1)]
    assert steps.step() == [(0, 8, 1, 1)] and steps.scheduler.preempted == [second]
    assert (second.blocks, second.computed, steps.blocks.free) == ([], 0, 1)
    assert steps.step() == [(0, 9, 1, 1)] and steps.scheduler.preempted == []
    assert [*steps.scheduler.waiting] == [second, late], "nobody overtakes it, though there is a block for one token"
    steps.scheduler.remove(first)
    assert steps.step() == [(1, 4, 5, 1), (2, 0, 1, 1)], "its first block was still there"
    assert second.request.cached == 0, "what it computed itself is no hit of the cache"


def test_of_three_the_newest_goes_and_one_without_a_block_goes_itself() -> None:
    steps = Steps(6, step_tokens=20)
    texts = [steps.add(0, range(7)), steps.add(1, range(100, 105)), steps.add(2, range(200, 205))]
    assert steps.step() == [(0, 0, 7, 1), (1, 0, 5, 1), (2, 0, 5, 1)] and steps.blocks.free == 0
    steps.step()
    assert steps.step() == [(0, 8, 1, 1), (1, 6, 1, 1)] and steps.scheduler.preempted == [texts[2]]
    steps = Steps(4, step_tokens=20)
    texts = [steps.add(0, range(5)), steps.add(1, range(100, 108))]
    assert steps.step() == [(0, 0, 5, 1), (1, 0, 8, 1)] and steps.blocks.free == 0
    assert steps.step() == [(0, 5, 1, 1)] and steps.scheduler.preempted == [texts[1]]


def test_a_text_that_grows_leaves_what_is_cached_while_there_are_empty_blocks() -> None:
    """The block after its own has the beginning of a text that ended; four others are empty."""
    steps = Steps(7)
    steps.add(0, range(4))
    steps.add(1, range(100, 104))
    steps.step()
    assert (steps.sequences[0].blocks, steps.sequences[1].blocks) == ([0], [1])
    steps.scheduler.remove(steps.sequences[1])
    steps.step()
    assert len(steps.sequences[0].blocks) == 2
    steps.add(2, range(100, 106))
    assert steps.step() == [(0, 5, 1, 1), (2, 4, 2, 1)]


def test_a_beginning_is_shared_once_it_is_computed() -> None:
    """Eleven, eight and nine tokens of one beginning: a block is shared if a token remains after it."""
    steps = Steps(40, max_running=9, step_tokens=11)
    steps.add(0, range(11))
    steps.add(1, range(8))
    steps.add(2, range(9))
    assert steps.step() == [(0, 0, 11, 1)]
    assert steps.step() == [(0, 11, 1, 1), (1, 4, 4, 1), (2, 8, 1, 1)]
    assert [each.request.cached for each in steps.sequences.values()] == [0, 4, 8]
    assert steps.sequences[2].blocks[:2] == steps.sequences[0].blocks[:2]
    assert steps.sequences[1].blocks[:1] == steps.sequences[0].blocks[:1]
    assert steps.blocks.free == 40 - (3 + 1 + 1)


def test_one_that_would_compute_the_same_block_waits_and_others_overtake_it() -> None:
    steps = Steps(40, max_running=4, step_tokens=6)
    steps.add(0, range(10))
    steps.add(1, range(9))
    steps.add(2, [500])
    assert steps.step() == [(0, 0, 6, 0)]
    assert steps.step() == [(0, 6, 4, 1), (2, 0, 1, 1)], "the second block of the first two is still being filled"
    assert steps.step() == [(0, 10, 1, 1), (2, 1, 1, 1), (1, 8, 1, 1)]


def test_blocks_before_the_window_are_free_again() -> None:
    """A token sees three: at position n the first one seen is n - 2."""
    steps = Steps(10, step_tokens=5, window=3)
    text = steps.add(0, range(9))
    found = []
    for _ in range(6):
        steps.step()
        found.append((text.computed, text.passed, 10 - steps.blocks.free))
    # admitted with blocks for a step and a window: 8 tokens; position 6 is the first that does not see block 0
    assert found == [(5, 0, 2), (9, 1, 2), (10, 2, 1), (11, 2, 1), (12, 2, 1), (13, 2, 2)]
    steps.scheduler.remove(text)
    assert steps.blocks.free == 10


def test_after_a_restart_all_come_in_their_order_before_those_who_wait() -> None:
    steps = Steps(40, max_running=2, step_tokens=20)
    for number in range(3):
        steps.add(number, range(100 * number, 100 * number + 5))
    steps.step()
    assert [each.number for each in steps.scheduler.restart()] == [0, 1]
    assert [each.number for each in steps.scheduler.waiting] == [0, 1, 2] and not steps.scheduler.running
    assert steps.blocks.free == 40


def test_the_guess_is_what_followed_the_last_time() -> None:
    """The last three tokens stand twice before, and other tokens follow; a guess leaves room for the next token."""
    text = Steps(40).add(0, [1, 2, 3, 7, 1, 2, 3, 8, 9, 1, 2, 3], limit=4)
    text.guess(2)
    assert text.guesses == [8, 9]
    text.guess(9)
    assert text.guesses == [8, 9, 1] and text.room == 3
    text.tokens += [8]
    text.guess(2)
    assert text.guesses == [9, 1]
    text.tokens += [5]
    text.guess(2)
    assert text.guesses == []


def test_guesses_are_computed_with_the_last_token_as_long_as_a_step_has_room() -> None:
    steps = Steps(40, step_tokens=4)
    first, second = steps.add(0, [1, 2, 1]), steps.add(1, [101, 102])
    assert steps.step() == [(0, 0, 3, 1), (1, 0, 1, 0)]
    first.guesses, second.guesses = [7, 8, 9, 10], [7]
    [one] = steps.scheduler.schedule()
    assert (one.tokens, one.start, one.wanted) == ([900, 7, 8, 9], 3, 4), "four tokens, and nothing is left of the step"
    assert second.guesses == [7], "its turn has not come"
    assert len(one.blocks) == 2, "for seven positions"
    steps = Steps(40, max_running=2, step_tokens=3)
    first, second = steps.add(0, [1]), steps.add(1, [101, 102, 103, 104, 105])
    assert steps.step() == [(0, 0, 1, 1), (1, 0, 2, 0)]
    second.guesses = [7]
    assert steps.step() == [(0, 1, 1, 1), (1, 2, 2, 0)] and second.guesses == [], "a prompt has none"
    assert steps.step() == [(0, 2, 1, 1), (1, 4, 1, 1)]
    first.guesses, second.guesses = [8], [7]
    assert [span.tokens for span in steps.scheduler.schedule()] == [[900, 8], [901]], "nothing is left for its guess"


@pytest.mark.parametrize(
    ("tokens", "limit", "written", "room"),
    [(10, 50, 0, 128), (600, 100, 0, 256), (500, 13, 0, 256), (300, 300, 0, 256), (700, 300, 299, 256)],
)
def test_room_is_a_power_of_two_that_the_rest_of_the_answer_fits(
    tokens: int, limit: int, written: int, room: int
) -> None:
    """At least 512 tokens, and at most 256 beyond those that there are; 4 in a block."""
    scheduler = Scheduler(BlockManager(999, 4), 1, 1, contiguous=True)
    request = Request(range(tokens), SamplingParams(max_tokens=limit), None, 1000, 1000)
    request.tokens = [1] * written
    assert scheduler._room(Sequence(0, request, [*request.prompt, *request.tokens])) == room
