"""What travels between a policy's server and its clients: msgpack with numpy arrays, as openpi's client packs them.

    data = pack({"prompt": "open the drawer", "rgb_static": image})
    observation = unpack(data)

An array is a map of four byte-string keys: b"__ndarray__" True, b"data" (C order), b"dtype" (numpy's `dtype.str`), b"shape". A numpy
scalar has b"__npgeneric__" instead and no shape. A server's answer is a binary message; a text message is an error, "Name: what was wrong".

Nothing that is read is trusted: dtypes are plain numbers and strings, sizes agree with the data, and containers are bounded.
Needs numpy and msgpack alone. Source: openpi-client 0.1.2, whose format this is.
"""

from __future__ import annotations

import re
from typing import Any

import msgpack
import numpy as np

PROMPT, RESET, SEED, TASK = "prompt", "reset", "seed", "task"
BEGIN_CHAIN, EXECUTED, DEADLINE_MS = "begin_chain", "executed", "deadline_ms"
CODES, TOKENIZER = "codes", "tokenizer"
"""Keys of a request beside the observation's own: see docs/serving.md."""

MAX_MESSAGE_BYTES = 8 * 2**20
HEALTH_PATH = "/healthz"
TOKEN_VARIABLE = "EMU3_VLA_TOKEN"
# Containers are Python objects of a hundred bytes each, whatever few bytes of a message they take.
MAX_ITEMS = 50_000
MAX_DIMENSIONS = 16

ARRAY_KINDS, SCALAR_KINDS = "biufmMSU", "biufSU"
# numpy reads whole languages in a dtype's name; these few forms are all that `dtype.str` gives for the kinds above.
DTYPE = re.compile(r"[<>|=]?([biufSU])(\d{1,9})|[<>|=]?([mM])8(\[\d{0,9}(?:Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as|generic)\])?")


class WireError(ValueError):
    """Something that cannot be packed, or bytes that are not what `pack` gives."""


# -- errors that a server answers with, and that a client raises under the same name


class ServingError(RuntimeError):
    """Base of what goes wrong between a client and a policy elsewhere."""


class InvalidRequest(ServingError, ValueError):
    """The request is not one that this policy can answer. Nothing changed; a right one may follow."""


class TokenizerMismatch(InvalidRequest):
    """Code ids of another vision tokenizer than the policy's."""


class DeadlineExceeded(ServingError, TimeoutError):
    """The decision was not ready in time. It was dropped, and so was the past of the client's subtask."""


class ServerBusy(ServingError):
    """More requests wait than the server keeps."""


class PolicyFailed(ServingError):
    """The policy could not decide; the server's own log says why."""


ANSWERED = {kind.__name__: kind for kind in (InvalidRequest, TokenizerMismatch, DeadlineExceeded, ServerBusy, PolicyFailed)}


def error_text(error: ServingError) -> str:
    """The text message that stands for an error of `ANSWERED`."""
    return f"{type(error).__name__}: {error}"


def error_of(text: str) -> ServingError:
    """The error that a text message stands for; of a server that names none we know, a PolicyFailed with its words."""
    name, _, message = text.partition(": ")
    return ANSWERED[name](message) if name in ANSWERED else PolicyFailed(text)


# -- messages


def pack(content: Any) -> bytes:
    """One message. Raises WireError for what has no form in it: object, structured and complex arrays, sets, ..."""
    try:
        return msgpack.packb(content, default=_to_map)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise WireError(f"cannot be packed: {error}") from error


def unpack(data: bytes) -> Any:
    """What `pack` was given, with tuples as lists; arrays are copies that may be written to. Raises WireError."""
    room = _Room()
    try:
        return msgpack.unpackb(
            data,
            object_pairs_hook=room.map,
            list_hook=room.list,
            strict_map_key=True,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_ext_len=0,
        )
    except WireError:
        raise
    except Exception as error:
        # msgpack raises a dozen kinds, UnicodeDecodeError and StackError among them; all mean the same here.
        raise WireError(f"not a whole msgpack message ({type(error).__name__})") from error


class _Room:
    """Counts what one message unpacks to."""

    def __init__(self):
        self.left = MAX_ITEMS

    def list(self, items: list) -> list:
        self._take(len(items))
        return items

    def map(self, pairs: list[tuple[Any, Any]]) -> Any:
        self._take(len(pairs))
        content = dict(pairs)
        if b"__ndarray__" in content:
            return _array(content)
        if b"__npgeneric__" in content:
            return _scalar(content)
        return content

    def _take(self, items: int) -> None:
        self.left -= 1 + items
        if self.left < 0:
            raise WireError(f"more than {MAX_ITEMS} items in lists and maps; send numbers as one array")


def _to_map(value: Any) -> dict[bytes, Any]:
    if isinstance(value, np.ndarray):
        _check_kind(value.dtype, ARRAY_KINDS)
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        _check_kind(value.dtype, SCALAR_KINDS)
        if value.dtype.itemsize > 8 and value.dtype.kind == "f":
            raise WireError(f"a scalar of dtype {value.dtype} has no Python number of its precision; send it as an array")
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise WireError(f"{type(value).__name__} is neither a number, a string, a list, a dict nor a numpy array")


def _check_kind(dtype: np.dtype, kinds: str) -> None:
    if dtype.kind not in kinds or dtype.hasobject:
        raise WireError(f"dtype {dtype} is not carried; numbers, booleans, strings and times are")


def _dtype(name: Any, kinds: str) -> np.dtype:
    if not isinstance(name, str) or not DTYPE.fullmatch(name):
        raise WireError(f"dtype {brief(name)} is not carried; numbers, booleans, strings and times are")
    try:
        dtype = np.dtype(name)
    except (TypeError, ValueError) as error:
        raise WireError(f"no dtype {name!r}") from error
    _check_kind(dtype, kinds)
    if not dtype.itemsize:
        raise WireError(f"dtype {name!r} has no size")
    return dtype


def _array(content: dict) -> np.ndarray:
    dtype, shape, data = _dtype(content.get(b"dtype"), ARRAY_KINDS), content.get(b"shape"), content.get(b"data")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(type(side) is int and 0 <= side < 2**40 for side in shape):
        raise WireError(f"an array's shape is a list of at most {MAX_DIMENSIONS} sizes, not {brief(shape)}")
    if not isinstance(data, bytes):
        raise WireError(f"an array's data is bytes, not {type(data).__name__}")
    expected = dtype.itemsize
    for side in shape:
        expected *= side
    if expected != len(data):
        raise WireError(f"an array {dtype} of shape {tuple(shape)} takes {expected} bytes, but {len(data)} came")
    try:
        return np.frombuffer(data, dtype).reshape(shape).copy() if data else np.empty(shape, dtype)
    except ValueError as error:  # sides beside a zero that no array may have
        raise WireError(f"no array has the shape {tuple(shape)}") from error


def _scalar(content: dict) -> np.generic:
    dtype, value = _dtype(content.get(b"dtype"), SCALAR_KINDS), content.get(b"data")
    if not isinstance(value, bool | int | float | str | bytes):
        raise WireError(f"a scalar's data is a number or a string, not {type(value).__name__}")
    try:
        return dtype.type(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise WireError(f"{brief(value)} is no {dtype}") from error


def brief(value: Any) -> str:
    """What came, in few words, for an error's text."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} of shape {value.shape}"
    if isinstance(value, list) and all(type(item) is int for item in value):
        return f"{value[:8]}"
    if isinstance(value, str | int | float | np.number):
        return f"{type(value).__name__} {str(value)[:40]!r}"
    return type(value).__name__
