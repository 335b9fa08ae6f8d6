"""Chunks of actions to integer DCT coefficients and back: the lossy half of FAST.

Legend: N chunks, T steps (in coefficients: frequencies), A action dimensions. Coefficient arrays are (N, T, A), flattened with the
dimensions inner, so the lowest frequencies of all dimensions come first.

Source: FAST (arXiv 2501.09747, section V) and its published processor (`physical-intelligence/fast`).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from action_tokenizer.errors import BadActions


def check_chunks(chunks) -> np.ndarray:
    """`chunks` as a floating array (N, T, A); (T, A) becomes one chunk. float32 stays float32, since its rounding decides ties.

    Raises BadActions for another number of axes, an axis of length zero, a dtype that is not real numbers, NaN or infinity.
    """
    array = np.asarray(chunks)
    if array.dtype.kind not in "fiu":
        raise BadActions(f"actions have dtype {array.dtype}, expected real numbers")
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3:
        raise BadActions(f"actions have shape {array.shape}, expected (N, T, A) or (T, A): chunks, steps, dimensions")
    if 0 in array.shape:
        raise BadActions(f"actions have shape {array.shape}: nothing to encode; leave empty batches out")
    array = array if array.dtype in (np.float32, np.float64) else array.astype(np.float64)
    if not np.isfinite(array).all():
        chunk, step, dim = np.argwhere(~np.isfinite(array))[0]
        raise BadActions(f"action {array[chunk, step, dim]} in chunk {chunk}, step {step}, dimension {dim}; expected finite numbers")
    return array


def quantize(chunks_NTA: np.ndarray, scale: float) -> np.ndarray:
    """Rounded DCT-II coefficients (orthonormal, along T) times `scale`. Floating (N, T, A) in, int64 (N, T, A) out.

    Computed by scipy in the dtype of the input, as published, so the same coefficients fall on the same side of a tie.
    """
    from scipy.fft import dct  # 0.3 s to import: only who encodes pays for it

    return np.around(dct(chunks_NTA, axis=1, norm="ortho") * scale).astype(np.int64)


def dequantize(coefficients_NTA: np.ndarray, scale: float) -> np.ndarray:
    """Inverse of `quantize` up to its rounding. Integers (N, T, A) in, float64 (N, T, A) out."""
    basis_TF = basis(coefficients_NTA.shape[1])
    return np.matmul(basis_TF, coefficients_NTA / scale)


def coefficient_bound(horizon: int, scale: float, limit: float) -> int:
    """The largest |coefficient| of any chunk of `horizon` steps within [-limit, limit]: the orthonormal DCT keeps lengths."""
    return int(np.ceil(scale * limit * np.sqrt(horizon)))


@lru_cache(maxsize=32)
def basis(horizon: int) -> np.ndarray:
    """The orthonormal DCT-III as a float64 matrix (T, F): actions = basis @ coefficients."""
    steps, frequencies = np.arange(horizon)[:, None], np.arange(horizon)[None]
    basis = np.cos(np.pi * (2 * steps + 1) * frequencies / (2 * horizon)) * np.sqrt(2 / horizon)
    basis[:, 0] = np.sqrt(1 / horizon)
    return basis
