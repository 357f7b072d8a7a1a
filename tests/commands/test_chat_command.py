"""`keifu chat` on a model of a few thousand weights: one answer to a question, and a conversation in a terminal."""

import builtins
import io
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from keifu import checkpoints, cli
from keifu.commands.chat import Chat, print_answer
from keifu.commands.shared import inputs
from keifu.data.chat import conversations
from keifu.data.tokenizers.chat_template import CHATML
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError
from keifu.inference.text.paged.folder import CacheFolder
from keifu.inference.text.sampling_params import SamplingParams
from keifu.models import llama

FEW = ("--max-tokens", "6")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder with a tiny model that writes bytes, and has a chat template."""
    torch.manual_seed(0)
    turns = ["<|im_start|>", "<|im_end|>"]
    learned = train_tokenizer("bpe", ["ab"], 260, special_tokens=turns)
    tokenizer = Tokenizer(learned.backend, {"eos_token": turns[1]}, chat_template=CHATML)
    config = llama.Config(
        vocab_size=tokenizer.vocab_size, context_length=200, dim=16, hidden_dim=32, n_layers=1, n_heads=2
    )
    folder = tmp_path_factory.mktemp("chat")
    checkpoints.save(llama.build(config), tokenizer, folder)
    return str(folder)


def out(capsys: pytest.CaptureFixture, *words: str) -> str:
    cli.main(["chat", *words])
    return capsys.readouterr().out


def pipe(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def refused(capsys: pytest.CaptureFixture, *words: str) -> str:
    with pytest.raises(SystemExit):
        cli.main(["chat", *words])
    return capsys.readouterr().err.strip()


def test_a_question_has_one_answer(model: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [out(capsys, model, "Who?\n\nYou.", *FEW, "--seed", str(seed)) for seed in (1, 2)]
    pipe(monkeypatch, "You.\n")
    answers += [out(capsys, model, "Who?", *FEW)]  # the pipe joins the argument, and is one message
    pipe(monkeypatch, "Who?\n\nYou.\n")
    answers += [out(capsys, model, *FEW)]
    answers += [out(capsys, model, "Who?\n\nYou.", *FEW, "--temperature", "0")]
    assert len(set(answers)) == 1  # greedy, whatever the seed
    assert out(capsys, model, "Who?\n\nYou.", *FEW, "--temperature", "3", "--seed", "4") != answers[0]


def test_json_has_all_that_is_known(model: str, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    question = tmp_path / "question.txt"
    question.write_text("Who?\n")
    told = json.loads(out(capsys, model, "--file", str(question), "-s", "Be brief.", "--json", *FEW))
    _, tokenizer = checkpoints.load(model)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    assert told["prompt_tokens"] == len(tokenizer.render_chat(messages))
    assert told["sampling"]["temperature"] == 0 and told["sampling"]["max_tokens"] == 6
    assert told["text"] + "\n" == out(capsys, model, "Who?", "--system", "Be brief.", *FEW)


def test_generate_gives_a_chat_model_a_message(model: str, capsys: pytest.CaptureFixture) -> None:
    cli.main(["generate", model, "Who?", *FEW])
    assert capsys.readouterr().out == out(capsys, model, "Who?", *FEW)
    cli.main(["generate", model, "Who?", *FEW, "--raw", "--json"])
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == len("Who?")


def test_an_answer_that_is_cut_says_so(model: str, capsys: pytest.CaptureFixture) -> None:
    cli.main(["chat", model, "Who?", "--max-tokens", "1"])
    assert capsys.readouterr().err == "(The answer was cut by --max-tokens.)\n"


def test_a_second_question_about_a_file_uses_what_the_first_stored(
    model: str, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The question comes after the file, and the answers are those to this text without the folder."""
    (tmp_path / "report.txt").write_text("long " * 20)
    options = ("--file", str(tmp_path / "report.txt"), "--cache-folder", str(tmp_path / "prompts"), *FEW)
    written = list[int]()
    write = CacheFolder.write
    monkeypatch.setattr(CacheFolder, "write", lambda *given: written.append(1) or write(*given))
    counts = []
    for question in ("Why?", "When?"):
        assert out(capsys, model, question, *options) == out(capsys, model, f"{'long ' * 20}\n\n{question}", *FEW)
        counts.append(len(written))
    assert counts == [4, 5]  # of the four groups of tokens, only the last one has tokens of the question


def test_an_option_that_cannot_act_is_told(model: str, capsys: pytest.CaptureFixture) -> None:
    cli.main(["chat", model, "Who?", *FEW, "--top-p", "0.5"])
    assert "--top-p changes nothing at temperature 0: give --temperature too." in capsys.readouterr().err


def test_a_base_model_is_refused_in_the_words_of_the_command_line(
    model: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    base, tokenizer = checkpoints.load(model)
    checkpoints.save(base, tokenizer.with_chat_template(None), tmp_path)
    told = refused(capsys, str(tmp_path), "Who?")
    assert "is a base model" in told and f"keifu generate {tmp_path}" in told and "keifu train sft" in told


def test_no_question_is_refused_in_a_pipe(model: str, capsys: pytest.CaptureFixture) -> None:
    assert refused(capsys, model) == refused(capsys, model, "--json")
    assert refused(capsys, model).startswith("There is no text: write it after the model (keifu chat MODEL")


class Echo:
    """A conversation that answers with what it heard, and fails where it hears so."""

    def __init__(self) -> None:
        self.messages: list[dict[str, str]] = []
        self.seeds: list[int] = []
        self.temperatures: list[float] = []
        self.system: str | None = None
        self.finish_reason, self.thinking = "stop", False

    def reset(self) -> None:
        self.messages = []

    def instruct(self, system: str) -> None:
        self.system = system

    def restore(self, messages: list[dict[str, str]]) -> None:
        self.messages = messages

    def take_back(self) -> dict[str, str]:
        if not self.messages:
            raise UserError("There is no message to answer again: ask something first.")
        message, self.messages = self.messages[-2], self.messages[:-2]
        return message

    def answer(
        self, text: str, settings: SamplingParams, images: Sequence[Any] = (), prompt: str | None = None
    ) -> Iterator[str]:
        assert prompt is None  # without documents the model reads the message
        self.seeds.append(settings.seed or 0)
        self.temperatures.append(settings.temperature)
        if text == "fail":
            raise UserError("It does not fit.")
        if text == "interrupt":
            raise KeyboardInterrupt
        self.messages = [*self.messages, {"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
        yield f"{len(self.messages) // 2}:"
        yield text


@pytest.fixture
def typing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs a chat with these typed lines. A line that is an exception is raised."""

    def go(*lines: str | type[BaseException]) -> Echo:
        rest = iter(lines)

        def read(prompt: str = "") -> str:
            line = next(rest, EOFError)
            if not isinstance(line, str):
                raise line
            return line

        monkeypatch.setattr(builtins, "input", read)
        echo: Any = Echo()
        Chat(echo, SamplingParams(seed=7)).talk()
        assert next(rest, None) is None or lines[-1] == "unread"
        return echo

    return go


def test_messages_are_answered_until_the_person_leaves(typing: Any, capsys: pytest.CaptureFixture) -> None:
    for way in ("/bye", "/exit", "/quit"):
        echo = typing("a", "", "  ", " /b", way, "unread")
        assert capsys.readouterr().out.splitlines()[1:] == ["1:a", "2:/b"]
        assert echo.seeds == [7, 8]
    typing("a")  # the end of input


def test_a_message_of_several_lines(typing: Any) -> None:
    echo = typing('"""one', "/two", 'three"""', "four\\", "/five", '"""six"""', '"""', "", "seven", '"""')
    asked = [each["content"] for each in echo.messages if each["role"] == "user"]
    assert asked == ["one\n/two\nthree", "four\n/five", "six", "seven"]


def test_ctrl_c_takes_back_what_was_typed_and_leaves_at_the_second_time(typing: Any) -> None:
    stop = KeyboardInterrupt
    assert len(typing('"""one', stop, "a", stop, "b", stop, stop, "unread").messages) == 4
    assert typing('"""one').messages == []


def test_errors_end_the_answer_and_not_the_conversation(
    typing: Any, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    below = f"/save {tmp_path}/file/a.jsonl"  # which no system allows
    typing("fail", "interrupt", below, "/load nowhere.jsonl", "a", "/save", below)
    told = capsys.readouterr()
    assert "1:a\n" in told.out
    assert told.err.splitlines()[:3] == [
        "It does not fit.",
        "Stopped.",
        "There is nothing to save yet: ask something first.",
    ]
    assert "nowhere.jsonl" in told.err.splitlines()[3] and "/save needs the name of a file" in told.err
    assert "Traceback" not in told.err and len(told.err.splitlines()) == 6


def test_an_unknown_command_is_answered_with_the_nearest_and_not_sent(
    typing: Any, capsys: pytest.CaptureFixture
) -> None:
    assert typing("/hlep", "/rest").messages == []
    told = capsys.readouterr().err
    assert "There is no command '/hlep'. Did you mean '/help'?" in told and "Did you mean '/reset'?" in told


def test_help_lists_every_command(typing: Any, capsys: pytest.CaptureFixture) -> None:
    typing("/help", "/?")
    told = capsys.readouterr().out
    for name in (
        "/help",
        "/system TEXT",
        "/save FILE",
        "/load FILE",
        "/retry",
        "/temperature NUMBER",
        "/reset",
        "/bye",
    ):
        assert told.count(f"\n{name}") == 2


def test_an_answer_is_asked_for_again_with_another_seed(typing: Any, capsys: pytest.CaptureFixture) -> None:
    echo = typing("/retry", "a", "/retry", "/retry", "b")
    assert [message["content"] for message in echo.messages] == ["a", "yes", "b", "yes"]
    assert len(set(echo.seeds)) == 4
    assert "There is no message to answer again" in capsys.readouterr().err


def test_the_temperature_can_be_changed(typing: Any, capsys: pytest.CaptureFixture) -> None:
    echo = typing(
        "a", "/temperature 0.5", "b", "/temperature hot", "/temperature -1", "/temperature nan", "/temperature", "c"
    )
    assert echo.temperatures[1:] == [0.5, 0.5] and echo.temperatures[0] != 0.5
    said = capsys.readouterr()
    assert said.out.count("The temperature is 0.5.") == 2
    assert "/temperature needs a number, such as /temperature 0.8, and not 'hot'" in said.err
    assert said.err.count("temperature must be") == 2


def test_one_question_and_a_conversation_get_the_same_answer(
    model: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*FEW, "--temperature", "1", "--seed", "4", "--system", "Be brief.")
    once = out(capsys, model, "Who?", *words)
    told = json.loads(out(capsys, model, "Who?", *words, "--json"))
    lines = iter(["Who?", "/retry"])
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(builtins, "input", lambda *_: next(lines, "/bye"))
    talked = out(capsys, model, *words)
    assert once == told["text"] + "\n" and once in talked
    assert talked.count("\n") > once.count("\n") + 2


def test_a_retry_in_which_nothing_is_written_keeps_the_conversation(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from keifu.inference.chat.conversation import Conversation

    talk = Conversation(*checkpoints.load(model))
    chat = Chat(talk, SamplingParams(max_tokens=3, temperature=1.0, seed=1))
    chat.hear("Who?")
    before = talk.messages
    monkeypatch.setattr(talk.engine, "step", lambda: (_ for _ in ()).throw(KeyboardInterrupt()))
    chat.hear("/retry")
    assert talk.messages == before and len(before) == 2


def test_what_the_model_is_told_can_be_changed(typing: Any, capsys: pytest.CaptureFixture) -> None:
    assert typing("/system", "/system Be  brief.", "/system").system == "Be  brief."
    assert capsys.readouterr().out.splitlines().count("Be  brief.") == 2


def test_a_conversation_is_saved_and_gone_on_with(typing: Any, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    kept = typing("a", f"/save {file}", "b", f"/save {file}").messages
    assert [*conversations.read(str(file))] == [kept]  # data for supervised fine-tuning
    longer = typing(f"/load {file}", "c", f"/save {file}").messages
    assert longer[:4] == kept and [*conversations.read(str(file))] == [longer], "the file is the conversation's own"
    typing("a", f"/save {file}", "/reset")
    assert f"There is already a {file}" in capsys.readouterr().err
    whole = tmp_path / "talk.json"
    assert typing("a", f"/save {whole}", "/reset", f"/load {whole}").messages == kept[:2]
    assert typing("a", "/reset").messages == []


@pytest.mark.parametrize("content", ['{"messages": []}', '{"messages": [{"role": "robot", "content": "a"}]}', "{", ""])
def test_a_file_that_is_no_conversation_is_refused(
    content: str, typing: Any, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    assert len(typing("a", f"/load {tmp_path / 'a.jsonl'}").messages) == 2
    assert "a.jsonl" in capsys.readouterr().err


def test_a_terminal_without_readline_works(typing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "readline", None)  # as on Windows: its import fails
    inputs.edit_lines()
    assert len(typing("a").messages) == 2


class Terminal:
    """A process on a pseudo-terminal: what is typed, and what is seen."""

    def __init__(self, *words: str):
        import pty

        self.end, other = pty.openpty()
        code = f"from keifu.cli import main; main({list(words)!r})"
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "dumb", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=other, stdout=other, stderr=other, env=env, start_new_session=True
        )
        os.close(other)
        self.seen = ""

    def see(self, text: str, seconds: float = 300) -> str:
        """Wait until this text appears after the earlier output, and return the new output."""
        until, new = time.monotonic() + seconds, ""
        while text not in new:
            if not select.select([self.end], [], [], max(0, until - time.monotonic()))[0]:
                raise AssertionError(f"{text!r} did not come, but {new!r}")
            new += os.read(self.end, 1).decode(errors="replace")
        self.seen += new
        return new

    def type(self, line: str) -> None:
        os.write(self.end, f"{line}\n".encode())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_a_real_terminal(model: str, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    terminal = Terminal("chat", model, *FEW, "--temperature", "1", "--seed", "3")
    try:
        assert f"Loading {model} ..." in terminal.see("seed 3 (keifu's settings for a chat model except --temperature)")
        terminal.see("/bye leaves.")
        terminal.see("> ")
        terminal.type('"""Hello')
        terminal.see("... ")
        terminal.type('you"""')
        terminal.see("> ")
        terminal.type("/hepl")
        assert "Did you mean '/help'?" in terminal.see("> ")
        terminal.type(f"/save {file}")
        assert "2 messages" in terminal.see("> ")
        terminal.type("/bye")
        assert terminal.process.wait(300) == 0
    finally:
        terminal.process.kill()
        os.close(terminal.end)
    [messages] = conversations.read(str(file))
    assert [each["role"] for each in messages] == ["user", "assistant"] and messages[0]["content"] == "Hello\nyou"


@pytest.mark.parametrize(("terminal", "shown"), [(True, True), (True, False), (False, True)])
def test_thoughts_are_dimmed_or_counted_in_a_terminal_alone(
    terminal: bool, shown: bool, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk: Any = SimpleNamespace(thinking=False, answer=lambda *_: iter(["<thi", "nk>So", ".</think>", "\nYes", "."]))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    print_answer(talk, "Hi", SamplingParams(), (), shown)
    said = capsys.readouterr().out
    assert said.endswith("Yes.\n")
    assert ("So" in said) == (terminal and shown) and ("3 characters" in said) == (terminal and not shown)
    assert terminal or said == "Yes.\n"


def test_thoughts_can_be_hidden(model: str, capsys: pytest.CaptureFixture) -> None:
    from keifu.inference.chat.conversation import Conversation

    chat = Chat(Conversation(*checkpoints.load(model)), SamplingParams(seed=1))
    for word in ("hidden", "shown"):
        chat.hear("/thoughts")
        assert f"Thoughts are {word}." in capsys.readouterr().out
    assert "has no option enable_thinking" in refused(capsys, model, "Hi", "--thinking", "on")
