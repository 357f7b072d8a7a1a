"""`keifu chat`: a conversation in the terminal, or one answer to a question."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from keifu.commands.shared import flags
from keifu.commands.shared.conversation import Chat, tell_cut
from keifu.commands.shared.inputs import at_terminal, join_texts, load_writer, notice
from keifu.commands.shared.terminal import no_text
from keifu.commands.shared.writing import SamplingFlags, choose_sampling, print_text
from keifu.errors import UserError
from keifu.generation.text.sampling_params import ANSWER_TOKENS

EXAMPLE = 'keifu chat MODEL "What is the capital of France?"'


@dataclass(frozen=True)
class Options(flags.Packed):
    """Talk with a model: without a question in the terminal, where /help lists the commands, and with one for one
    answer. A file and a pipe are one question too; where there are several of these, an empty line joins them.

    Sampling options that are not given have the model's own values (of its generation_config.json, or of the
    catalogue). Where there are none: chat models are greedy, and base models have temperature 0.8, top-k 40, top-p 0.95
    and min-p 0.05. What is in force is shown in a terminal, and by --json.
    """

    model: flags.Model
    question: Annotated[
        tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[QUESTION]", help="A question, to be answered once.")
    ] = None
    system: Annotated[str | None, tyro.conf.arg(aliases=["-s"])] = None
    """What the model is told before the conversation; unset: what its own chat template says."""
    file: Path | None = None
    """The file that has the question, or what the question is about."""
    json: bool = False
    """Print the answer, tokens, log-probabilities, seed, sampling and the reason for the end as JSON."""
    sampling: Annotated[SamplingFlags, tyro.conf.arg(name="")] = SamplingFlags()


def run(options: Options) -> None:
    """Answers a question, or one after another."""
    question = join_texts(options.question, options.file)
    if not question and (options.json or not at_terminal()):
        no_text(EXAMPLE)
    model, tokenizer = load_writer(options.model, options.weights)
    check_chats(options.model, tokenizer)
    sampling, line = choose_sampling(tokenizer, options.sampling, ANSWER_TOKENS)
    if not question:
        from keifu.generation.text.chat import Conversation

        print(f"{options.model}: {line}.")
        Chat(Conversation(model, tokenizer, options.system), sampling).talk()
        return
    notice(f"{options.model}: {line}.")
    messages = [{"role": "user", "content": question}]
    if options.system is not None:
        messages.insert(0, {"role": "system", "content": options.system})
    reason = print_text(model, tokenizer, tokenizer.render_chat(messages), sampling, options.json, streamed=True)
    tell_cut(reason)


def check_chats(name: str, tokenizer: Any) -> None:
    """Refuses a base model, in the words of the command line."""
    if tokenizer.chat_template is None:
        raise UserError(
            f'{name} is a base model, without a chat template: let it continue a text (keifu generate {name} "..."), '
            f"or teach it to answer (keifu train sft --model {name} --data CHATS.jsonl)."
        )


parse = flags.parser(Options, run, "keifu chat")
