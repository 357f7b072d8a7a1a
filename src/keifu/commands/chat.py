"""`keifu chat`: a conversation in the terminal, or one answer to a question."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import tyro

from keifu.commands.shared import flags, inputs
from keifu.commands.shared.documents import open_documents, print_cited
from keifu.commands.shared.errors import explain
from keifu.commands.shared.terminal import say
from keifu.commands.shared.writing import SamplingFlags, choose_sampling, print_completion
from keifu.errors import UserError, printable, shell, unknown
from keifu.inference.text.sampling_params import ANSWER_TOKENS, SamplingParams
from keifu.ranges import Share

DIM = "\033[2m{}\033[22m"
if TYPE_CHECKING:
    from keifu.inference.chat.conversation import Conversation
    from keifu.inference.chat.documents import SearchedFolder

EXAMPLE = 'keifu chat MODEL "What is the capital of France?"'


@dataclass(frozen=True)
class Options(flags.Packed):
    """Talk with a model: without a question in the terminal, where /help lists the commands, and with one for one
    answer. A file and a pipe are one question too; if there are several of these, an empty line joins them. With
    --cache-folder the file comes first and the question last, so that the next question finds the file already read.

    Sampling options that are not given have the model's own values (of its generation_config.json, or of the
    catalogue). Where there are none: chat models are greedy, and base models have temperature 0.8, top-k 40, top-p 0.95
    and min-p 0.05. What is in force is shown in a terminal, and by --json.
    """

    model: flags.Model
    question: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[QUESTION]")] = None
    """A question, to be answered once."""
    system: Annotated[str | None, tyro.conf.arg(aliases=["-s"])] = None
    """System prompt. Unset: the one of the chat template."""
    file: Path | None = None
    """The file that has the question, or what the question is about."""
    image: flags.Images = ()
    """File of a picture that the question is about, for a model that sees."""
    json: bool = False
    """Print the answer, tokens, log-probabilities, seed, sampling and the reason for the end as JSON."""
    guesses: flags.Guesses = None
    draft: flags.Drafting = None
    cache_folder: flags.CacheFolder = None
    cache_size: flags.CacheSize = None
    thinking: flags.Thinking = None
    documents: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder of .md, .txt, .rst and .py files. Each message is answered from its nearest passages, cited by file and
    lines, or with "This is not in the documents."."""
    rerank: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """Cross-encoder (a BERT with one label) that sorts the 20 nearest passages of the documents."""
    least_similarity: Share | None = None
    """Cosine similarity of the nearest passage below which the documents have no answer. Unset: 0.49."""
    sampling: Annotated[SamplingFlags, tyro.conf.arg(name="")] = SamplingFlags()


def run(options: Options) -> None:
    """Print the answer to one question, or start a conversation."""
    question = inputs.join_texts(options.question, options.file, argument_last=options.cache_folder is not None)
    if not question and (options.json or options.image or not inputs.at_terminal()):
        inputs.no_text(EXAMPLE)
    folder = inputs.open_cache_folder(options.cache_folder, options.cache_size)
    documents = open_documents(options.documents, options.rerank, options.least_similarity)
    model, tokenizer = inputs.load_writer(options.model, options.weights)
    if tokenizer.chat_template is None:
        name = shell(options.model)
        raise UserError(
            f"{options.model} is a base model, which cannot chat: use keifu generate {name}, or teach it by "
            f"keifu train sft --model {name}."
        )
    sampling, line = choose_sampling(tokenizer, options.sampling, ANSWER_TOKENS)
    from keifu.inference.chat.conversation import Conversation
    from keifu.inference.chat.prompts import sees

    guesses = inputs.proposer(options.draft, options.guesses, options.weights)
    variables = flags.template_variables(options.thinking)
    conversation = Conversation(model, tokenizer, options.system, guesses, variables, folder)
    if not question:
        print(f"{options.model}: {line}.")
        Chat(conversation, sampling, documents).talk()
        return
    inputs.notice(f"{options.model}: {line}.")
    images = inputs.read_pictures(options.image)
    if not images and sees(conversation.config):
        print(f"{options.model} answers questions about pictures: give one with --image FILE.", file=sys.stderr)
    if options.json and documents:
        print_cited(conversation, question, sampling, images, documents)
    elif options.json:
        print_completion(conversation.complete(question, sampling, images), sampling)
    else:
        print_answer(conversation, question, sampling, images, documents=documents)
    tell_cut(conversation.finish_reason)


def print_answer(
    conversation: "Conversation", message: str, sampling: SamplingParams, images: Sequence[Any] = (),
    thoughts: bool = True, documents: "SearchedFolder | None" = None,
) -> None:  # fmt: skip
    """Print the answer to a message while it is written. A terminal also shows the model's thoughts, dimmed, or how
    long they took; other outputs never get them. documents: the answer is from them, with citations."""
    from keifu.data.chat.thoughts import ThoughtSplitter
    from keifu.inference.chat.citations import Citer, with_marks
    from keifu.inference.chat.documents import NOT_FOUND

    grounding = documents.ground(message) if documents else None
    if grounding and not grounding.passages:
        conversation.record(message, NOT_FOUND)
        say(NOT_FOUND)
        return
    citer = Citer(grounding.passages) if grounding else None
    prompt = grounding.prompt(message) if grounding else None
    pieces, length = conversation.answer(message, sampling, images, prompt), 0
    splitter, terminal = ThoughtSplitter(conversation.thinking), sys.stdout.isatty()
    try:
        for piece in chain(pieces, [None]):
            thought, text = splitter.end() if piece is None else splitter(piece)
            length += len(thought)
            if thought and thoughts and terminal:
                print(DIM.format(printable(thought)), end="", flush=True)
            if length and terminal and (text or piece is None):
                hidden = DIM.format(f"({length:,} characters of thoughts; /thoughts shows them)")
                print("\n" if thoughts else hidden)
                length = 0
            say(with_marks(citer.push(text, piece is None)) if citer else text, end="")
    finally:
        print(flush=True)


HINT = '/help lists the commands, """ begins a text of several lines, Ctrl-C stops an answer, /bye leaves.'
NOTES = (
    'Lines between """ and """ are one message; a backslash at the end of a line continues it too.',
    "A line that begins with a space is a message, even if a slash comes next.",
)
SAME = {"/exit": "/bye", "/quit": "/bye", "/?": "/help"}  # names of these commands in other tools
CUT = {"length": "--max-tokens", "context": "the model's context, which is full"}


class Command(NamedTuple):
    """Command of a conversation: its argument, a short description, and its function."""

    argument: str
    about: str
    act: Callable[[str], None]


class Chat:
    """Conversation at the terminal: reads messages and commands, and prints answers.

    sampling: with a seed. Each further answer uses the next seed, so a repeated question can get another answer. The
    first seed reproduces the whole conversation. documents: those that the answers are from.
    """

    def __init__(
        self, conversation: "Conversation", sampling: SamplingParams, documents: "SearchedFolder | None" = None
    ):
        self.conversation, self.sampling, self.documents = conversation, sampling, documents
        self.over, self.shows_thoughts = False, True
        self.files: set[Path] = set()  # files in which this conversation was saved
        self.images: list[Any] = []  # pictures for the next message
        self.commands = {
            "/help": Command("", "list the commands", self._help),
            "/system": Command("TEXT", "change the system prompt; without a text, show it", self._system),
            "/image": Command("FILE", "show a picture with the next message, to a model that sees", self._image),
            "/save": Command("FILE", "write the conversation; a .jsonl file is data for keifu train sft", self._save),
            "/load": Command("FILE", "go on with a conversation that was saved", self._load),
            "/retry": Command("", "answer the last message once more, with another seed", self._retry),
            "/temperature": Command("NUMBER", "set the temperature; without a number, show it", self._temperature),
            "/thoughts": Command("", "show thoughts, dimmed, or only how long they are", self._thoughts),
            "/reset": Command("", "forget the messages, but not the system prompt", self._reset),
            "/bye": Command("", "leave, as /exit and Ctrl-D do", self._leave),
        }

    def talk(self) -> None:
        """Chat until the user leaves: by /bye, by the end of input, or by Ctrl-C twice at the prompt."""
        inputs.edit_lines()
        print(HINT)
        stopped = False  # whether the last input was Ctrl-C
        while not self.over:
            try:
                line = input("> ")
            except KeyboardInterrupt:
                print("\n" if stopped else "\n/bye, Ctrl-D or Ctrl-C once more leaves.")
                self.over, stopped = stopped, True
            except EOFError:
                print()
                self.over = True
            else:
                stopped = False
                self.hear(line)

    def hear(self, line: str) -> None:
        """Run a command, or answer a message that begins with this line. Errors are printed on stderr, and the
        conversation continues."""
        try:
            if line.startswith("/"):
                self._obey(line)
            elif message := self._read_message(line).strip():
                images, self.images = self.images, []
                self._answer(message, images)
        except EOFError:  # end of input inside a message of several lines
            print()
            self.over = True
        except BrokenPipeError:
            raise
        except (UserError, OSError) as error:
            print(explain(error), file=sys.stderr)
        except KeyboardInterrupt:
            print("Stopped.", file=sys.stderr)

    def _read_message(self, line: str) -> str:
        """Return the message that begins with this line, reading its further lines. Return "" after Ctrl-C."""
        try:
            return inputs.read_rest(line)
        except KeyboardInterrupt:
            print()
            return ""

    def _obey(self, line: str) -> None:
        word, _, argument = line.partition(" ")
        name = SAME.get(word, word)
        if name not in self.commands:
            raise unknown("command", word, self.commands)
        if self.commands[name].argument == "FILE" and not argument.strip():
            raise UserError(f"{name} needs the name of a file, such as {name} talk.jsonl.")
        self.commands[name].act(argument.strip())

    def _answer(self, message: str, images: Sequence[Any] = ()) -> None:
        print_answer(self.conversation, message, self.sampling, images, self.shows_thoughts, self.documents)
        self.sampling = replace(self.sampling, seed=(self.sampling.seed or 0) + 1)
        tell_cut(self.conversation.finish_reason)

    def _image(self, name: str) -> None:
        self.images += inputs.read_pictures([Path(name).expanduser()])
        print(f"The next message has {len(self.images)} pictures." if self.images[1:] else f"{name} comes next.")

    def _help(self, _: str) -> None:
        for name, command in self.commands.items():
            print(f"{f'{name} {command.argument}':20}{command.about}")
        print(*NOTES, sep="\n")

    def _system(self, text: str) -> None:
        if text:
            self.conversation.instruct(text)
        print(self.conversation.system or "(The model reads the system prompt of its chat template, if that has one.)")

    def _save(self, name: str) -> None:
        """Write the conversation to a file as JSON. Only a file that this conversation has written is replaced."""
        from keifu.files import write_atomic

        path = Path(name).expanduser().resolve()
        messages = self.conversation.messages
        if not any(message["role"] == "assistant" for message in messages):
            raise UserError("There is nothing to save yet: ask something first.")
        if any("images" in message for message in messages):
            raise UserError("A conversation with pictures cannot be saved: the file would hold its text alone.")
        if path.exists() and path not in self.files:
            raise UserError(f"There is already a {name}: choose another name.")
        text = json.dumps({"messages": messages}, ensure_ascii=False)
        write_atomic(path, (f"[{text}]" if path.suffix.lower() == ".json" else text) + "\n")
        self.files.add(path)
        print(f"Wrote {name}: {len(messages)} messages.")

    def _load(self, name: str) -> None:
        from keifu.data.chat.conversations import objects, validate_messages

        path = Path(name).expanduser().resolve()
        records = objects(path, "conversation")
        if len(records) != 1:
            raise UserError(f"{name} holds {len(records)} conversations: /load reads a file that /save has written.")
        [(place, record)] = records
        messages = validate_messages(record.get("messages"), place)
        self.conversation.restore(messages)
        self.files.add(path)
        say(f"Read {name}: {len(messages)} messages. The last answer was:\n{messages[-1]['content']}")

    def _retry(self, _: str) -> None:
        if not self.sampling.temperature:
            print("(At temperature 0 the answer is the same again: /temperature 0.8 changes that.)", file=sys.stderr)
        before = self.conversation.messages
        message = self.conversation.take_back()
        try:
            self._answer(message["content"], message.get("images", ()))
        finally:
            if len(self.conversation.messages) < len(before):  # no answer was written
                self.conversation.messages = before

    def _temperature(self, text: str) -> None:
        if text:
            try:
                temperature = float(text)
            except ValueError:
                raise UserError(f"/temperature needs a number, such as /temperature 0.8, and not {text!r}.") from None
            self.sampling = replace(self.sampling, temperature=temperature)
        print(f"The temperature is {self.sampling.temperature:g}.")

    def _thoughts(self, _: str) -> None:
        self.shows_thoughts = not self.shows_thoughts
        print(f"Thoughts are {'shown' if self.shows_thoughts else 'hidden'}.")

    def _reset(self, _: str) -> None:
        self.conversation.reset()
        self.files.clear()
        print("The conversation is forgotten.")

    def _leave(self, _: str) -> None:
        self.over = True


def tell_cut(reason: str | None) -> None:
    """Print on stderr why an answer ended early, if it did."""
    if reason in CUT:
        print(f"(The answer was cut by {CUT[reason]}.)", file=sys.stderr)
