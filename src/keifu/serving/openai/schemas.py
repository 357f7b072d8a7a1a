"""Bodies of requests.

Every field has an effect, is ignored, or is refused by name. An unknown name is refused with the nearest known one. A
field of OpenAI's API that asks for a different answer is refused. A field that is only a hint is ignored and named in a
header of the answer; the option --strict refuses it, unless its value has no effect.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, create_model, field_validator, model_validator

from keifu.errors import unknown
from keifu.inference.text.sampling_params import SETTINGS, SamplingOptions
from keifu.serving.openai.body import Body, Neutral, Part, about, content_of
from keifu.serving.openai.constraints import ANY_OBJECT
from keifu.serving.openai.items import AnyItem, json_object
from keifu.serving.openai.tools import ToolUse

MAX_CHOICES, MAX_MESSAGES, MAX_BIASES = 128, 10_000, 1024
HINTS: Neutral = {  # fields of OpenAI's API for its servers
    "metadata": ({},), "prompt_cache_key": (), "prompt_cache_retention": (), "safety_identifier": (),
    "service_tier": ("auto", "default"),
}  # fmt: skip
ADDED: Neutral = {  # fields that clients add to the messages and calls of an answer
    "parsed": (), "parsed_arguments": (), "provider_specific_fields": (), "cache_control": (),
}  # fmt: skip


TemplateOptions = Annotated[dict[str, bool | int | float | str], Field(max_length=16)]


class Texts(Body):
    """Body with one text for a model, or several."""

    model: str = ""
    input: str | Annotated[list[str], Field(min_length=1, max_length=2048)]

    @property
    def texts(self) -> list[str]:
        """Texts as a list."""
        return [self.input] if isinstance(self.input, str) else self.input


class StreamOptions(Body):
    """Options of a stream. include_usage: whether a last event has the numbers of tokens."""

    include_usage: bool = False
    refused: ClassVar[Neutral] = {"include_obfuscation": (False,)}


NUMBERS: dict[str, Any] = {  # settings that are one number, by name: their types
    name: row.number_type for name, row in SETTINGS.items() if row.setting.on_command_line and row.number_type
}
NUMBER_FIELDS: dict[str, Any] = {
    name: (number_type | None, Field(None, description=SETTINGS[name].setting.help))
    for name, number_type in NUMBERS.items()
}
Numbers: Any = create_model("Numbers", __base__=Body, **NUMBER_FIELDS)


class Sampling(Numbers):
    """Fields of all bodies that generate text. Unset ones have the model's defaults."""

    model: str = ""
    logit_bias: Annotated[dict[str, float], Field(max_length=MAX_BIASES)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=512)] | None = None

    @field_validator("logit_bias")
    @classmethod
    def _ids(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        if wrong := [token[:20] for token in bias or () if not (token.isdecimal() and len(token) < 20)]:
            raise ValueError(f"its names must be ids of tokens, and {wrong[0]!r} is none")
        return bias

    def options(self) -> SamplingOptions:
        """Return the fields of `SamplingParams` that were given."""
        names = SETTINGS.keys() & type(self).model_fields.keys() - {"logit_bias"}
        options: Any = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.logit_bias:
            options["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
        return options

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class FunctionCall(Body):
    """Call of a function, written by the model. `arguments` is JSON."""

    name: str
    arguments: Annotated[str, AfterValidator(json_object)]
    ignored: ClassVar[Neutral] = ADDED
    allows_null: ClassVar[bool] = True


class ToolCall(Body):
    """Call of a tool."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None
    ignored: ClassVar[Neutral] = ADDED
    allows_null: ClassVar[bool] = True


class Message(Body):
    """Message of a conversation. The role "developer" means "system"."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refused: ClassVar[Neutral] = {"audio": (), "function_call": ()}
    ignored: ClassVar[Neutral] = ADDED | {"annotations": ([],), "reasoning": (), "refusal": ()}
    allows_null: ClassVar[bool] = True

    @model_validator(mode="after")
    def _has_content(self) -> "Message":
        if self.content is None and not self.tool_calls:
            raise ValueError(f"a message of the role {self.role!r} needs content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls are the assistant's, and the role is {self.role!r}")
        return self

    def plain(self) -> dict[str, Any]:
        """Return the message for chat templates. Its parts are joined by line breaks."""
        message = {"role": "system" if self.role == "developer" else self.role, **content_of(self.content)}
        calls = [call.model_dump(exclude={"index"}) for call in self.tool_calls or ()] or None
        message |= {"name": self.name, "tool_calls": calls, "tool_call_id": self.tool_call_id}
        message |= {"reasoning_content": self.reasoning_content}
        return {name: value for name, value in message.items() if value is not None}


class Function(Body):
    """Function that may be called. parameters: JSON schema of its arguments, which they follow also without
    `strict`."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @field_validator("parameters")
    @classmethod
    def _object(cls, parameters: dict[str, Any] | None) -> dict[str, Any] | None:
        if parameters and parameters.get("type", "object") != "object":
            raise ValueError("it must be the schema of an object")
        return parameters


class Tool(Body):
    """Tool of /v1/chat/completions."""

    type: Literal["function"]
    function: Function


class FunctionName(Body):
    """Name of a function."""

    name: str


class NamedTool(Body):
    """Tool that must be called."""

    type: Literal["function"]
    function: FunctionName


class FlatTool(Function):
    """Tool of /v1/responses."""

    type: Literal["function"]


class FlatNamedTool(FunctionName):
    """Tool that must be called, in /v1/responses."""

    type: Literal["function"]


class AllowedFunction(Body):
    """Function among those that may be called."""

    type: Literal["function"]
    function: FunctionName


class Allowed(Body):
    """Functions that may be called, and whether one must be."""

    mode: Literal["auto", "required"]
    tools: list[AllowedFunction]


class AllowedTools(Body):
    """Choice among some of the tools of /v1/chat/completions."""

    type: Literal["allowed_tools"]
    allowed_tools: Allowed


class FlatAllowedTools(Body):
    """Choice among some of the tools of /v1/responses."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[FlatNamedTool]


def some_of(functions: Sequence[Function], names: Sequence[str]) -> list[Function]:
    """Return the functions of these names. Raises `ValueError` for an unknown name."""
    by_name = {function.name: function for function in functions}
    for name in names:
        if name not in by_name:
            raise ValueError(
                f"tool_choice allows a function that is none of the tools. {unknown('function', name, by_name)}"
            )
    return [by_name[name] for name in dict.fromkeys(names)]


def tool_use(functions: Sequence[Function], choice: Any, name: str | None, parallel: bool | None) -> ToolUse | None:
    """Return the functions that the model may call, or None.

    Args:
        functions: all functions of the request.
        choice: the field tool_choice.
        name: the name of the function that must be called, if any.
        parallel: the field parallel_tool_calls. Unset, an answer that must call has one call.
    """
    names_of_functions = [function.name for function in functions]
    if len(set(names_of_functions)) < len(names_of_functions):
        raise ValueError("tools has two functions of one name")
    if name is not None and name not in names_of_functions:
        raise ValueError(
            f"tool_choice names a function that is none of the tools. {unknown('function', name, names_of_functions)}"
        )
    if choice == "required" and not names_of_functions:
        raise ValueError("tool_choice is required, and there are no tools")
    if not names_of_functions or choice == "none":
        return None
    described = [function.model_dump(exclude_none=True, exclude={"strict", "type"}) for function in functions]
    if parallel is None:  # a small model repeats a call that it may repeat
        parallel = choice != "required"
    return ToolUse(described, name or choice or "auto", bool(parallel) and name is None)


class JsonSchema(Body):
    """Named schema. The answer always follows it, also without `strict`."""

    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")] = {"type": "object"}
    strict: bool | None = None


class ResponseFormat(Body):
    """Format of an answer: any text, any JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type json_schema, which needs it")
        return self

    @property
    def schema(self) -> dict[str, Any] | None:
        """Schema that the answer must follow; None for any text."""
        if self.json_schema is not None:
            return self.json_schema.schema_
        return ANY_OBJECT if self.type == "json_object" else None


class Document(Body):
    """Document that an answer may cite. title: its name in citations, "document N" unless given."""

    text: Annotated[str, Field(max_length=2**21)]
    title: Annotated[str, Field(max_length=200, pattern=r"^[^\[\]\x00-\x1f]*$")] | None = None


class ChatRequest(Sampling):
    """POST /v1/chat/completions. documents: the answer is from them, with citations."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None
    documents: Annotated[list[Document], Field(min_length=1, max_length=256)] | None = None
    refused: ClassVar[Neutral] = {
        "audio": (), "function_call": ("auto", "none"), "functions": ([],), "lora": ([],), "modalities": (["text"],),
        "web_search_options": (),
    }  # fmt: skip
    ignored: ClassVar[Neutral] = HINTS | {
        "prediction": (), "reasoning_effort": ("none",), "store": (False,), "verbosity": ("medium",),
    }  # fmt: skip

    @model_validator(mode="after")
    def _agree(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
        if self.documents and ((self.response_format and self.response_format.schema) or self.tools):
            raise ValueError("documents has citations in the text of the answer: leave out response_format and tools")
        self.tool_use()
        return self

    @property
    def titled_texts(self) -> list[tuple[str, str]]:
        """Title and text of each document. A title that was there before gets its number."""
        titles = list[str]()
        for number, each in enumerate(self.documents or (), 1):
            title = each.title or f"document {number}"
            titles.append(f"{title} ({number})" if title in titles else title)
        return list(zip(titles, (each.text for each in self.documents or ()), strict=True))

    def tool_use(self) -> ToolUse | None:
        """Return the functions that may be called, or None."""
        name = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        functions, choice = [tool.function for tool in self.tools or ()], self.tool_choice
        if isinstance(choice, AllowedTools):
            functions = some_of(functions, [tool.function.name for tool in choice.allowed_tools.tools])
            choice = choice.allowed_tools.mode
        return tool_use(functions, choice, name, self.parallel_tool_calls)

    def options(self) -> SamplingOptions:
        """Return the options of `Sampling`, and those of this body."""
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        top = {"log_probabilities": bool(self.logprobs), "top_log_probabilities": self.top_logprobs or 0}
        return {**super().options(), **({} if limit is None else {"max_tokens": limit}), **top}  # type: ignore[return-value]


class TextFormat(JsonSchema):
    """`ResponseFormat` whose schema is in the same object."""

    type: Literal["text", "json_object", "json_schema"]
    name: str = ""

    @model_validator(mode="after")
    def _has_schema(self) -> "TextFormat":
        if self.type == "json_schema" and "schema_" not in self.model_fields_set:
            raise ValueError("the type json_schema needs a schema")
        return self

    @property
    def followed(self) -> dict[str, Any] | None:
        """Schema that the answer must follow; None for any text."""
        return None if self.type == "text" else self.schema_ if self.type == "json_schema" else ANY_OBJECT


class ResponseText(Body):
    """Format of a response's text."""

    format: TextFormat | None = None
    ignored: ClassVar[Neutral] = {"verbosity": ("medium",)}


Key = Annotated[str, Field(max_length=64)]  # OpenAI's limits
Value = Annotated[str, Field(max_length=512)]


class ResponseRequest(Sampling):
    """POST /v1/responses. store: whether to keep the response in memory, for `previous_response_id` and GET."""

    input: str | Annotated[list[AnyItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    metadata: Annotated[dict[Key, Value], Field(max_length=16)] | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    text: ResponseText | None = None
    tools: Annotated[list[FlatTool], Field(max_length=128)] | None = None
    tool_choice: Literal["auto", "none", "required"] | FlatNamedTool | FlatAllowedTools | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None
    refused: ClassVar[Neutral] = {
        "background": (False,), "conversation": (), "lora": ([],), "max_tokens": (), "n": (1,), "prompt": (),
        "stream_options": ({}, {"include_obfuscation": False}), "top_logprobs": (0,),
    }  # fmt: skip
    ignored: ClassVar[Neutral] = {name: values for name, values in HINTS.items() if name != "metadata"} | {
        "include": ([],), "max_tool_calls": (), "reasoning": (), "truncation": ("disabled",),
    }  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _has_no_logprobs(cls, data: Any) -> Any:
        """Refuse log-probabilities. The other additions are those of tools that only OpenAI's servers run."""
        include = data.get("include") if isinstance(data, dict) else None
        if isinstance(include, list) and "message.output_text.logprobs" in include:
            text = "include asks for logprobs, which this path has not: ask /v1/chat/completions, or leave it out."
            raise about("refused_field", "include", text)
        return data

    def options(self) -> SamplingOptions:
        """Return the options of `Sampling`, and those of this body."""
        options = super().options()
        return options if self.max_output_tokens is None else {**options, "max_tokens": self.max_output_tokens}

    @property
    def messages(self) -> list[dict[str, Any]]:
        """Input as messages. Calls are added to the assistant message before them, thoughts to the one after them."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        messages: list[dict[str, Any]] = []
        for message in (item.plain() for item in self.input):
            last = messages[-1] if messages and messages[-1]["role"] == "assistant" else {}
            if "tool_calls" in message and last:
                last["tool_calls"] = [*last.get("tool_calls", ()), *message["tool_calls"]]
            elif message["role"] == "assistant" and "reasoning_content" in last and not last["content"]:
                thoughts = last["reasoning_content"] + message.get("reasoning_content", "")
                last |= {"content": message["content"], "reasoning_content": thoughts}
            else:
                messages.append(message)
        return messages

    @model_validator(mode="after")
    def _tools_agree(self) -> "ResponseRequest":
        self.tool_use()
        return self

    def tool_use(self) -> ToolUse | None:
        """Return the functions that may be called, or None."""
        name = self.tool_choice.name if isinstance(self.tool_choice, FlatNamedTool) else None
        functions: Sequence[Function] = self.tools or ()
        choice = self.tool_choice
        if isinstance(choice, FlatAllowedTools):
            functions, choice = some_of(functions, [tool.name for tool in choice.tools]), choice.mode
        return tool_use(functions, choice, name, self.parallel_tool_calls)

    @property
    def schema(self) -> dict[str, Any] | None:
        """Schema that the text must follow; None for any text."""
        return self.text.format.followed if self.text and self.text.format else None

    @property
    def form(self) -> dict[str, Any]:
        """Format of the text, as it is repeated in the response."""
        text_format = self.text and self.text.format
        if text_format and text_format.type == "json_schema":
            return text_format.model_dump(by_alias=True)
        return {"type": text_format.type if text_format else "text"}


class CompletionRequest(Sampling):
    """POST /v1/completions. prompt: a text, several texts, the ids of one, or those of several."""

    prompt: str | list[int] | Annotated[list[str] | list[list[int]], Field(min_length=1, max_length=MAX_CHOICES)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    refused: ClassVar[Neutral] = {"best_of": (1,), "lora": ([],), "suffix": ("",)}
    ignored: ClassVar[Neutral] = HINTS

    def options(self) -> SamplingOptions:
        """Return the options of `Sampling`. The default of max_tokens is OpenAI's, 16."""
        top = {"log_probabilities": self.logprobs is not None, "top_log_probabilities": self.logprobs or 0}
        options = {"max_tokens": 16, **super().options(), **top}
        return options | ({"max_tokens": 1} if self.only_echoes else {})  # type: ignore[return-value]

    @property
    def only_echoes(self) -> bool:
        """Whether the answer is the prompts and their scores alone."""
        return bool(self.echo) and self.max_tokens == 0

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts as a list."""
        prompt: Any = self.prompt
        return [*prompt] if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
