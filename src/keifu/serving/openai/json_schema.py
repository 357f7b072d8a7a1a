"""Checks of JSON schemas, and additional limits that make answers end.

A small model without limits may write endless properties, digits or strings. So an object with properties is closed
unless the schema says otherwise, as in llama.cpp, and numbers and strings get limits.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from keifu.serving.errors import ApiError

MOST_BYTES = 2**18
MOST_CHARACTERS = 2000  # maximum of a string without maxLength, pattern, format, enum or const
MOST_INTEGER = 10**16 - 1
SMALLEST_STEP = 1e-10  # smallest difference between numbers
LARGEST_LITERAL = 2**63
SURROGATE = re.compile("[\ud800-\udfff]")
BY_NAME = ("properties", "patternProperties", "$defs", "definitions")  # keys whose values are schemas by name
COMBINED = ("allOf", "anyOf", "oneOf")
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


def checked(schema: Any, field: str) -> Any:
    """Return the schema with additional limits. Raises `ApiError` for one that is too large or has invalid values.

    Args:
        schema: the schema of the request.
        field: the field of the request that contains it, for errors.
    """
    try:
        size = len(json.dumps(schema))
        if size > MOST_BYTES:
            raise ApiError(400, f"The schema has {size:,} bytes, of at most {MOST_BYTES:,}.", field, "invalid_schema")
        _check_values(schema, field)
        return narrowed(schema, open_parts=_has_mixed_parts(schema))
    except RecursionError:
        raise ApiError(400, "The schema is nested too deeply.", field, "invalid_schema") from None


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
        raise ApiError(400, "The schema has half a surrogate pair in a string.", field, "invalid_schema")
    elif isinstance(part, float) and not math.isfinite(part):
        raise ApiError(400, f"The schema has the number {part}, which is not finite.", field, "invalid_schema")
    elif isinstance(part, int) and not -LARGEST_LITERAL <= part < LARGEST_LITERAL:
        shown = f"{part:.6g}" if abs(part) < 10**300 else "beyond 1e300"
        raise ApiError(400, f"The schema has the number {shown}, of more than 64 bits.", field, "invalid_schema")


def _has_mixed_parts(part: Any) -> bool:
    """Return whether any object must follow several schemas at once. Then none of them may be closed."""
    if isinstance(part, list):
        return any(map(_has_mixed_parts, part))
    if not isinstance(part, Mapping):
        return False
    combined = [key for key in (*COMBINED, "$ref") if key in part]
    mixed = combined and (len(part.keys() - ALONE) > 1 or len(part.get("allOf", ())) > 1)
    return bool(mixed) or any(map(_has_mixed_parts, part.values()))


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
    for key in ("items", "additionalProperties", "prefixItems", *COMBINED):
        if isinstance(result.get(key), list):
            result[key] = [narrowed(part, open_parts) for part in result[key]]
        elif key in result:
            result[key] = narrowed(result[key], open_parts)
    known = result.get("properties")
    if isinstance(known, Mapping) and not open_parts and not {"patternProperties", "additionalProperties"} & {*result}:
        required = result.get("required")
        if not isinstance(required, list) or all(name in known for name in required):
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
        given = [limit for limit in limits if isinstance(limit, int | float)]
        if all(abs(limit) <= MOST_INTEGER for limit in given):
            bounds |= {} if {"minimum", "exclusiveMinimum"} & {*schema} else {"minimum": -MOST_INTEGER}
            bounds |= {} if {"maximum", "exclusiveMaximum"} & {*schema} else {"maximum": MOST_INTEGER}
        if "number" in kinds and "multipleOf" not in schema and all(limit == int(limit) for limit in given):
            bounds["multipleOf"] = SMALLEST_STEP
    return bounds
