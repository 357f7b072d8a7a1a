"""`keifu completion`: a shell script that completes commands, recipes and options."""

from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Literal

import tyro

from keifu.commands.shared import flags
from keifu.commands.shared.command_names import COMMANDS, module_of
from keifu.commands.shared.help_text import Argument, arguments_of
from keifu.commands.shared.recipe_options import stored
from keifu.recipes.files import recipe_names

BASH = """\
_keifu() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" words="" key="${{COMP_WORDS[1]}}"
    [ "$key" = train ] && [ "$COMP_CWORD" -gt 2 ] && key="train ${{COMP_WORDS[2]}}"
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{commands}"
    else
        case "$key" in
{cases}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -o bashdefault -F _keifu keifu"""
ZSH = "autoload -U +X compinit && compinit -u\nautoload -U +X bashcompinit && bashcompinit\n"


@dataclass(frozen=True)
class Options:
    """Shell completion of keifu's commands, recipes and options with the Tab key.

    bash: add `eval "$(keifu completion bash)"` to ~/.bashrc, or zsh with zsh to ~/.zshrc; for fish:
    keifu completion fish > ~/.config/fish/completions/keifu.fish
    """

    shell: Annotated[tyro.conf.Positional[Literal["bash", "zsh", "fish"]], tyro.conf.arg(help="The shell.")]


def script(shell: str, commands: dict[str, str]) -> str:
    """Return the completion script for a shell."""
    plain_commands = [command for command in commands if command not in ("train", "demo")]
    arguments_by_command = {
        command: arguments_of(import_module(module_of(command)).Options) for command in plain_commands
    }
    arguments_by_command |= {f"train {name}": arguments for name, arguments in stored().items()}
    if shell == "fish":
        return "\n".join(_fish(arguments_by_command, commands))
    cases = {key: flags.names_of(arguments) for key, arguments in arguments_by_command.items()} | {
        "train": recipe_names()
    }
    lines = [f'            "{key}") words="{" ".join(words)}";;' for key, words in cases.items()]
    text = BASH.format(commands=" ".join([*commands, "help", "version"]), cases="\n".join(lines))
    return f"{ZSH}{text}" if shell == "zsh" else text


def _fish(arguments_by_command: dict[str, list[Argument]], commands: dict[str, str]) -> list[str]:
    begin = "complete -c keifu -n"
    lines = [f"{begin} __fish_use_subcommand -a {command} -d {_quoted(line)}" for command, line in commands.items()]
    second = "__fish_seen_subcommand_from train; and test (count (commandline -opc)) -eq 2"
    lines.append(f"{begin} {_quoted(second)} -a {_quoted(' '.join(recipe_names()))}")
    for key, arguments in arguments_by_command.items():
        command, _, recipe = key.partition(" ")
        condition = f"__fish_seen_subcommand_from {command}"
        condition += f"; and contains -- {recipe} (commandline -opc)" if recipe else ""
        for argument in arguments:
            for name in flags.names_of([argument]):
                lines.append(f"{begin} {_quoted(condition)} -l {name[2:]} -d {_quoted(argument.help[:80])}")
    return lines


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def run(options: Options) -> None:
    """Print the script."""
    print(script(options.shell, COMMANDS))
