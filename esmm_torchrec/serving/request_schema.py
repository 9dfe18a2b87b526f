"""JSON Schemas of a request and its response."""

from __future__ import annotations

from typing import Any

from esmm_torchrec.serving.inputs import InputEncoder

MAX_SHOWN_ID = 2**53 - 1
"""Largest integer up to which all integers are exact in every JSON library."""


def request_schema(encoder: InputEncoder) -> dict[str, Any]:
    """Returns the schema of a request: rows, one object per impression, or columns, each with a
    value per impression or one value for all."""
    of_row = {name: _value(encoder, name) for name in encoder.raw_columns}
    of_column = {
        name: {"anyOf": [value, {"type": "array", "items": value}]}
        for name, value in of_row.items()
    }
    rows = {"type": "array", "items": _object(of_row)}
    return {
        "oneOf": [
            {**_object({"rows": rows}), "required": ["rows"]},
            {**_object({"columns": _object(of_column)}), "required": ["columns"]},
        ]
    }


def response_schema(outputs: tuple[str, ...]) -> dict[str, Any]:
    """Returns the schema of a response: columns of scores, and the fingerprint of the model."""
    numbers = {"type": "array", "items": {"type": "number"}}
    scores = {**_object(dict.fromkeys(outputs, numbers)), "required": list(outputs)}
    return {
        **_object({"scores": scores, "model": {"type": "string"}}),
        "required": ["scores", "model"],
    }


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _value(encoder: InputEncoder, name: str) -> dict[str, Any]:
    """Returns the schema of the value of a column for one impression."""
    form = encoder.form_of(name)
    kind = {
        "integer": {"type": "integer", "minimum": -MAX_SHOWN_ID, "maximum": MAX_SHOWN_ID},
        "text": {"type": "string"},
        "number": {"type": "number"},
    }[form.kind]
    if form.is_list:
        return {"type": "array", "items": kind}
    return {"anyOf": [kind, {"type": "null"}]}
