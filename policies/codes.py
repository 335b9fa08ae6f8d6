"""Code ids of a vision tokenizer in the place of images: checked, and packed in as few bits as will do. Needs numpy alone.

An observation then has "codes", {camera's observation key: ids (rows, columns), or what `pack_codes` gives}, and "tokenizer", the
fingerprint of the tokenizer that wrote them; ids of another one stand for other pictures.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from policies.wire import CODES, TOKENIZER, InvalidRequest, TokenizerMismatch, brief


def checked_codes(observation: dict[str, Any], tokenizer: dict[str, Any] | None) -> dict[str, np.ndarray]:
    """The code ids in an observation, by camera, each grid of integers; empty where it has none.

    tokenizer: of the policy that reads them: {"fingerprint", "codebook_size", "grids": {camera: [rows, columns]}}; None where it has none.
    Raises TokenizerMismatch for ids of another tokenizer, InvalidRequest for what is no grid of its ids.
    """
    if CODES not in observation:
        return {}
    if tokenizer is None:
        raise InvalidRequest(f"{CODES!r} came, but this policy has no vision tokenizer; send images")
    given, of = observation[CODES], observation.get(TOKENIZER)
    if of != tokenizer["fingerprint"]:
        raise TokenizerMismatch(
            f"the code ids are of tokenizer {brief(of)}, this policy's is {tokenizer['fingerprint']!r}, where they mean other pictures"
        )
    if not isinstance(given, dict):
        raise InvalidRequest(f"{CODES!r} is {type(given).__name__}, expected a map from cameras to code ids")
    return {camera: _checked_grid(camera, codes, tokenizer) for camera, codes in given.items()}


def _checked_grid(camera: Any, codes: Any, tokenizer: dict[str, Any]) -> np.ndarray:
    if camera not in tokenizer["grids"]:
        raise InvalidRequest(f"code ids of camera {brief(camera)}, expected one of {', '.join(tokenizer['grids'])}")
    shape, size = tuple(tokenizer["grids"][camera]), tokenizer["codebook_size"]
    if isinstance(codes, dict):
        codes = unpack_codes(codes, shape, size)
    if not isinstance(codes, np.ndarray) or codes.dtype.kind not in "iu" or codes.shape != shape:
        raise InvalidRequest(f"code ids of {camera} are {brief(codes)}, expected integers of shape {shape}")
    if not 0 <= int(codes.min()) <= int(codes.max()) < size:
        raise InvalidRequest(f"code ids of {camera} lie in [{codes.min()}, {codes.max()}], expected [0, {size})")
    return codes


def pack_codes(codes: np.ndarray, codebook_size: int) -> dict[str, Any]:
    """A grid of code ids in as few bits each as the codebook needs: {"bits", "shape", "packed" uint8 (n,)}.

    codes: integers of any shape in [0, codebook_size). Raises ValueError for others.
    """
    codes = np.asarray(codes)
    if codes.dtype.kind not in "iu" or (codes.size and not 0 <= codes.min() <= codes.max() < codebook_size):
        raise ValueError(f"codes are {codes.dtype} of shape {codes.shape}, expected integers in [0, {codebook_size})")
    bits = max(1, (codebook_size - 1).bit_length())
    places = np.arange(bits - 1, -1, -1)
    spread = (codes.reshape(-1, 1).astype(np.uint32) >> places) & 1
    return {"bits": bits, "shape": list(codes.shape), "packed": np.packbits(spread.astype(np.uint8))}


def unpack_codes(packed: dict[str, Any], shape: tuple[int, ...], codebook_size: int) -> np.ndarray:
    """The inverse of `pack_codes` for a grid of a known shape: uint16 or uint32. Raises InvalidRequest where it is not one."""
    bits, data = packed.get("bits"), packed.get("packed")
    expected = max(1, (codebook_size - 1).bit_length())
    if type(bits) is not int or bits != expected or packed.get("shape") != list(shape):
        raise InvalidRequest(
            f"packed codes of {brief(bits)} bits and shape {brief(packed.get('shape'))}, expected {expected} bits and {list(shape)}"
        )
    number = int(np.prod(shape))
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape != (-(-number * bits // 8),):
        raise InvalidRequest(f"packed codes need {-(-number * bits // 8)} bytes as one uint8 array")
    spread = np.unpackbits(data, count=number * bits).reshape(number, bits)
    codes = spread @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))
    return codes.reshape(shape).astype(np.uint16 if codebook_size <= 2**16 else np.uint32)
