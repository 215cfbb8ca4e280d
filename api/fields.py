"""What the fields of request bodies have in common: strictness, text that is text, schemas."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict
from pydantic_core import PydanticCustomError

MAX_VALUES = 100_000  # of one body; each costs some 10 µs, in which no stream goes on


def countable(body: Any) -> Any:
    """Refuses a body of so many values that reading it would hold up everybody else."""
    left, n = [body], 1
    while left:
        value = left.pop()
        inner = value.values() if isinstance(value, dict) else value
        if isinstance(value, (dict, list)):
            n += len(value)
            if n > MAX_VALUES:
                raise mismatch("body", f"has more than {MAX_VALUES} values")
            left += [x for x in inner if isinstance(x, (dict, list))]
    return body


class Strict(BaseModel):
    """A field that is not known is refused by name."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def whole(text: str) -> str:
    """JSON can carry half a character (\\ud800); no tokenizer can read it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("a lone surrogate is no text") from error
    return text


def schema(value: Any) -> str:
    """As text: later it would be too deep in the stack for what was just not too deep to parse."""
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    try:
        return json.dumps(value)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


WholeText = Annotated[str, AfterValidator(whole)]
JsonSchema = Annotated[str, BeforeValidator(schema)]


def mismatch(param: str, message: str) -> PydanticCustomError:
    """Of fields that are each valid; api.errors names the field by `param`."""
    return PydanticCustomError("mismatch", "{message}", {"param": param, "message": message})


def unfit(message: str) -> PydanticCustomError:
    """Of one field, which pydantic names."""
    return PydanticCustomError("unfit", "{message}", {"message": message})
