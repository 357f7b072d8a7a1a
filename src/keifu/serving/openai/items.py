"""Items in the input of a response (/v1/responses): messages, thoughts, calls, results, references to stored items."""

import json
from typing import Annotated, Any, ClassVar, Literal, NoReturn

from pydantic import AfterValidator, field_validator

from keifu.serving.openai.body import Body, ItemPart, Neutral, content_of

STATUS = ("completed", "incomplete")  # of an item of a conversation


def json_object(text: str) -> str:
    """Return a text after checking that it is a JSON object. An empty text is {}."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError("it must be a JSON object, as text")
    return text or "{}"


class Item(Body):
    """Message in the input of a response."""

    type: Literal["message"] = "message"
    id: str | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ItemPart]
    refused: ClassVar[Neutral] = {"status": STATUS, "phase": ()}
    allows_null: ClassVar[bool] = True

    def plain(self) -> dict[str, Any]:
        """Return the message for chat templates."""
        return {"role": "system" if self.role == "developer" else self.role, **content_of(self.content)}


class ReasoningItem(Body):
    """Thoughts in the input of a response, written by the model earlier."""

    type: Literal["reasoning"]
    id: str | None = None
    content: list[dict[str, Any]] | None = None
    refused: ClassVar[Neutral] = {"status": STATUS, "summary": ([],), "encrypted_content": ()}

    def plain(self) -> dict[str, Any]:
        """Return the thoughts as a message without text."""
        text = "".join(str(part.get("text", "")) for part in self.content or ())
        return {"role": "assistant", "content": "", "reasoning_content": text}


class CallItem(Body):
    """Call in the input of a response, written by the model earlier."""

    type: Literal["function_call"]
    id: str | None = None
    call_id: str
    name: str
    arguments: Annotated[str, AfterValidator(json_object)]
    refused: ClassVar[Neutral] = {"status": STATUS}
    ignored: ClassVar[Neutral] = {"parsed_arguments": ()}
    allows_null: ClassVar[bool] = True

    def plain(self) -> dict[str, Any]:
        """Return the call as a message."""
        call = {"id": self.call_id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}
        return {"role": "assistant", "content": "", "tool_calls": [call]}


class ResultItem(Body):
    """Result of a call: a text, or several."""

    type: Literal["function_call_output"]
    id: str | None = None
    call_id: str
    output: str | list[ItemPart]
    refused: ClassVar[Neutral] = {"status": STATUS}
    allows_null: ClassVar[bool] = True

    @field_validator("output")
    @classmethod
    def _texts(cls, output: str | list[ItemPart]) -> str | list[ItemPart]:
        if not isinstance(output, str) and any(part.url for part in output):
            raise ValueError("a picture is a part of the user's message, and of no result")
        return output

    def plain(self) -> dict[str, Any]:
        """Return the result as a message."""
        return {"role": "tool", **content_of(self.output), "tool_call_id": self.call_id}


class ReferenceItem(Body):
    """Item of a response that the server stored, by its id."""

    type: Literal["item_reference"]
    id: str

    def plain(self) -> NoReturn:
        """Raise an error: `StoredResponses.resolve` replaces references by their items."""
        raise TypeError(self.id)


AnyItem = Item | ReasoningItem | CallItem | ResultItem | ReferenceItem
