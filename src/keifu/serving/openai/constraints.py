"""Constraints of an answer: a grammar, for example of a JSON schema, defines the allowed tokens at each position
(llguidance).

A small model without limits may write endless properties, digits or strings. So an object with properties is closed
unless the schema says otherwise, as in llama.cpp, and numbers and strings get limits.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from torch import Tensor

from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.serving.errors import ApiError

# Otherwise a small model might write endless white space.
LAYOUT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
BITS = torch.arange(8, dtype=torch.uint8)
MOST_BYTES = 2**18  # of all schemas of a request
MOST_PARTS = 5000  # schemas of a request, with those inside them
MOST_PROPERTIES = 1000  # of one object: the time of compiling grows with the square of their number
LIMITS = LLParserLimits(max_grammar_size=200_000, verbose_errors=False)
MOST_CHARACTERS = 2000  # maximum of a string without maxLength, pattern, format, enum or const
MOST_ITEMS = 1000  # maximum of a list without maxItems
MOST_INTEGER = 10**16 - 1
SMALLEST_STEP = 1e-10  # smallest difference between numbers
LARGEST_LITERAL = 2**63
SURROGATE = re.compile("[\ud800-\udfff]")
BY_NAME = ("properties", "patternProperties", "$defs", "definitions")  # keys whose values are schemas by name
COMBINED = ("allOf", "anyOf", "oneOf")
INSIDE = ("items", "additionalProperties", "prefixItems", *COMBINED)  # keys whose values are a schema or a list of them
ALONE = {"$defs", "definitions", "title", "description", "default", "examples", "$schema", "$id"}  # no limits
LIMITED = {"enum", "const"}
VALUE = {"$ref": "#/$defs/value"}
ANY_OBJECT: dict[str, Any] = {
    "type": "object",
    "additionalProperties": VALUE,
    "$defs": {
        "value": {
            "anyOf": [
                {"type": ["string", "integer", "number", "boolean", "null"]},
                {"type": "array", "items": VALUE},
                {"type": "object", "additionalProperties": VALUE},
            ]
        }
    },
}


class GrammarConstraint:
    """Constraint of one text. vocab_size: of the model; its last ids may be missing in the tokenizer."""

    def __init__(self, matcher: LLMatcher, vocab_size: int):
        self.matcher, self.vocab_size = matcher, vocab_size

    def allowed(self) -> Bool[Tensor, " vocab"]:
        """Return a mask of the tokens that may come next. At the end of the grammar, these are the tokens that end the
        text."""
        packed = torch.frombuffer(bytearray(self.matcher.compute_bitmask()), dtype=torch.uint8)
        mask = ((packed[:, None] >> BITS) & 1).bool().flatten()[: self.vocab_size]
        return torch.nn.functional.pad(mask, (0, self.vocab_size - len(mask)))

    def accept(self, token: int) -> None:
        """Advance the grammar's state by this token."""
        self.matcher.consume_token(token)


@lru_cache(maxsize=16)
def _vocabulary(tokenizer: Tokenizer) -> LLTokenizer:
    """Convert the tokenizer for llguidance, which takes a second."""
    described = json.dumps(tokenizer.description())
    return LLTokenizer(described, n_vocab=tokenizer.vocab_size, eos_token=[*tokenizer.stop_ids])


class Grammar(NamedTuple):
    """Grammar of a text in llguidance's format, and the request's field for which it was made."""

    source: str
    field: str


def schema_grammar(schema: Any) -> Grammar:
    """Return the grammar of JSON that follows a schema. See `checked` for unsupported schemas."""
    (grammar_schema,) = checked([schema], "response_format")
    return Grammar(LLMatcher.grammar_from_json_schema(grammar_schema, overrides=LAYOUT), "response_format")


def constraints(grammar: Grammar, tokenizer: Tokenizer, vocab_size: int) -> Callable[[], GrammarConstraint]:
    """Compile a grammar once, and return a function that creates a constraint for each text.

    Raises `ApiError`, with the reason, for a schema that cannot be satisfied or has unsupported keywords.
    """
    if not tokenizer.stop_ids:
        text = "This model has no token that ends a text, so none can be held to a schema: choose another model."
        raise ApiError(400, text, grammar.field, "no_end_token")
    compiled = LLMatcher(_vocabulary(tokenizer), grammar.source, log_level=0, limits=LIMITS)
    if compiled.is_error():
        reason = " ".join(compiled.get_error().split()).rstrip(".")
        raise invalid(f"The schema cannot be followed: {reason}.", grammar.field)
    return lambda: GrammarConstraint(compiled.deep_copy(), vocab_size)


def invalid(message: str, field: str) -> ApiError:
    """Return the error for a schema in this field of the request."""
    return ApiError(400, message, field, "invalid_schema")


def checked(schemas: Sequence[Any], field: str) -> list[Any]:
    """Return schemas with additional limits. Raises `ApiError` if they are too large or have invalid values.

    Args:
        schemas: all schemas of the request's field.
        field: the field of the request that contains them, for errors.
    """
    try:
        if (size := sum(len(json.dumps(schema)) for schema in schemas)) > MOST_BYTES:
            raise invalid(f"The schema has {size:,} bytes, of at most {MOST_BYTES:,}.", field)
        for schema in schemas:
            _check_values(schema, field)
        if (count := sum(_check_keywords(schema, field) for schema in schemas)) > MOST_PARTS:
            raise invalid(f"The schema has {count:,} parts, of at most {MOST_PARTS:,}: make it smaller.", field)
        return [narrowed(schema, open_parts=_has_mixed_parts(schema)) for schema in schemas]
    except RecursionError:
        raise invalid("The schema is nested too deeply.", field) from None


def _inside(schema: Any) -> Iterator[Any]:
    """Yield the schemas that are directly inside a schema whose keywords are checked."""
    if isinstance(schema, Mapping):
        for key in BY_NAME:
            yield from schema.get(key, {}).values()
        for key in INSIDE:
            part = schema.get(key, [])
            yield from part if isinstance(part, list) else [part]


def _check_keywords(schema: Any, field: str) -> int:
    """Return the number of schemas in a schema. Raises `ApiError` for a keyword whose value has the wrong type."""
    if isinstance(schema, Mapping):
        for key in BY_NAME:
            if not isinstance(schemas := schema.get(key, {}), Mapping):
                raise invalid(f"The schema's {key} is {_short(schemas)}: it must be an object of schemas.", field)
            if len(schemas) > MOST_PROPERTIES:
                text = f"An object of the schema has {len(schemas):,} {key}, of at most {MOST_PROPERTIES:,}."
                raise invalid(text, field)
        for key in COMBINED:
            if not isinstance(schema.get(key, []), list):
                raise invalid(f"The schema's {key} is {_short(schema[key])}: it must be a list of schemas.", field)
        for key in ("type", "required"):
            names = [schema[key]] if key == "type" and isinstance(schema.get(key), str) else schema.get(key, [])
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise invalid(f"The schema's {key} is {_short(schema[key])}: it must be a list of names.", field)
    elif not isinstance(schema, bool):
        raise invalid(f"The schema has {_short(schema)}, which must be a schema: an object, true or false.", field)
    return 1 + sum(_check_keywords(part, field) for part in _inside(schema))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _check_values(part: Any, field: str) -> None:
    """Raise an error for numbers and characters that JSON cannot represent."""
    if isinstance(part, Mapping):
        for name, value in part.items():
            _check_values(name, field)
            _check_values(value, field)
    elif isinstance(part, list):
        for value in part:
            _check_values(value, field)
    elif isinstance(part, str) and SURROGATE.search(part):
        raise invalid("The schema has half a surrogate pair in a string.", field)
    elif isinstance(part, float) and not math.isfinite(part):
        raise invalid(f"The schema has the number {part}, which is not finite.", field)
    elif isinstance(part, int) and not -LARGEST_LITERAL <= part < LARGEST_LITERAL:
        number = f"{part:.6g}" if abs(part) < 10**300 else "beyond 1e300"
        raise invalid(f"The schema has the number {number}, of more than 64 bits.", field)


def _has_mixed_parts(schema: Any) -> bool:
    """Return whether any object must follow several schemas at once. Then none of them may be closed."""
    if not isinstance(schema, Mapping):
        return False
    combined = [key for key in (*COMBINED, "$ref") if key in schema]
    mixed = combined and (len(schema.keys() - ALONE) > 1 or len(schema.get("allOf", ())) > 1)
    return bool(mixed) or any(map(_has_mixed_parts, _inside(schema)))


def narrowed(schema: Any, open_parts: bool) -> Any:
    """Return the schema with closed objects and limits for numbers and strings.

    Args:
        schema: a schema, or `True` or `False`.
        open_parts: whether objects stay open, because they may be parts of a combination.
    """
    if not isinstance(schema, Mapping):
        return schema
    result = dict(schema)
    for key in BY_NAME:
        if isinstance(result.get(key), Mapping):
            result[key] = {name: narrowed(part, open_parts) for name, part in result[key].items()}
    for key in INSIDE:
        if isinstance(result.get(key), list):
            result[key] = [narrowed(part, open_parts) for part in result[key]]
        elif key in result:
            result[key] = narrowed(result[key], open_parts)
    properties = result.get("properties")
    if (
        isinstance(properties, Mapping)
        and not open_parts
        and not {"patternProperties", "additionalProperties"} & {*result}
    ):
        required = result.get("required")
        if not isinstance(required, list) or all(name in properties for name in required):
            result["additionalProperties"] = False
    return result if LIMITED & {*result} else result | _bounds(result)


def _bounds(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return additional limits for the values of a schema."""
    types = schema.get("type")
    kinds = types if isinstance(types, list) else [types]
    bounds: dict[str, Any] = {}
    if "string" in kinds and not {"maxLength", "pattern", "format"} & {*schema}:
        bounds["maxLength"] = MOST_CHARACTERS
        if isinstance(schema.get("minLength"), int):
            bounds["maxLength"] = max(MOST_CHARACTERS, schema["minLength"])
    if {"integer", "number"} & {*filter(None, kinds)}:
        limits = [schema.get(key) for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")]
        numbers = [limit for limit in limits if isinstance(limit, int | float)]
        if all(abs(limit) <= MOST_INTEGER for limit in numbers):
            bounds |= {} if {"minimum", "exclusiveMinimum"} & {*schema} else {"minimum": -MOST_INTEGER}
            bounds |= {} if {"maximum", "exclusiveMaximum"} & {*schema} else {"maximum": MOST_INTEGER}
        if "number" in kinds and "multipleOf" not in schema and all(limit == int(limit) for limit in numbers):
            bounds["multipleOf"] = SMALLEST_STEP
    if "array" in kinds and "maxItems" not in schema:
        least_counts = schema.get("minItems", 0), len(schema.get("prefixItems") or ())
        bounds["maxItems"] = max(MOST_ITEMS, *(count for count in least_counts if isinstance(count, int)))
    return bounds
