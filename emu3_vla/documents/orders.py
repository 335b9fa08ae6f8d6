"""Orders in which the codes of a picture, or its blocks, are written.

    order = raster_order(rows, columns)            # the n-th position of the stream holds place order[n], counted row by row
    codes.ravel()[order]                           # grid to stream
    stream[inverse(order)].reshape(rows, columns)  # and back

An order is a permutation, int64 (rows × columns,), of places. The model need not be told which: in one order the position says the place,
and a compact vocabulary's blocks carry the number of their place anyway. `completion_order` is that of inpainting: all that is known
first, then what is missing, from its edge inwards, so that every code is written next to what it must fit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from emu3_vla.documents.segments import DocumentError


def raster_order(rows: int, columns: int) -> np.ndarray:
    """Row by row."""
    return np.arange(rows * columns)


def diagonal_order(rows: int, columns: int) -> np.ndarray:
    """Antidiagonal by antidiagonal from the upper left corner, each from its upper right end: neighbours above and left come before."""
    row, column = np.divmod(np.arange(rows * columns), columns)
    return np.lexsort((row, row + column))


def block_raster_order(rows: int, columns: int, size: int = 4) -> np.ndarray:
    """Squares of size × size places in raster order, and raster order within each; squares at the edges may be cut off."""
    row, column = np.divmod(np.arange(rows * columns), columns)
    return np.lexsort((column, row, column // size, row // size))


def spiral_order(rows: int, columns: int) -> np.ndarray:
    """Clockwise around the edge from the upper left corner, and on inwards."""
    left, order = np.arange(rows * columns).reshape(rows, columns), []
    while left.size:
        order.append(left[0])
        left = np.rot90(left[1:])  # the right edge becomes the upper one
    return np.concatenate(order)


ORDERS: dict[str, Callable[[int, int], np.ndarray]] = {
    "raster": raster_order,
    "diagonal": diagonal_order,
    "block_raster": block_raster_order,
    "spiral": spiral_order,
}


def order_of(name: str, rows: int, columns: int) -> np.ndarray:
    """The order of this name: int64 (rows × columns,). Raises DocumentError for another name or a grid without places."""
    if name not in ORDERS:
        raise DocumentError(f"there is no order {name!r}, only {', '.join(ORDERS)}")
    if rows < 1 or columns < 1:
        raise DocumentError(f"an order of {rows}×{columns} places, expected at least one each way")
    return ORDERS[name](rows, columns)


def permutation(order: str | np.ndarray, rows: int, columns: int) -> np.ndarray:
    """An order given by its name or place by place: int64 (rows × columns,). Raises DocumentError for what is no order of these places."""
    if isinstance(order, str):
        return order_of(order, rows, columns)
    order = np.asarray(order)
    if order.dtype.kind not in "iu" or not np.array_equal(np.sort(order, axis=None), np.arange(rows * columns)) or order.ndim != 1:
        raise DocumentError(f"an order of shape {order.shape} names not each of {rows}×{columns} places once")
    return order.astype(np.int64)


def inverse(order: np.ndarray) -> np.ndarray:
    """Which position of the stream holds each place."""
    positions = np.empty_like(order)
    positions[order] = np.arange(len(order))
    return positions


def completion_order(missing: np.ndarray, name: str = "spiral") -> np.ndarray:
    """Known places in raster order, then the missing ones in the order of this name over the rectangle around them.

    missing: bool (rows, columns), true where a code shall be written. Returns int64 (rows × columns,). Raises DocumentError for a mask of
    another type, or one that leaves nothing to do.
    """
    missing = np.asarray(missing)
    if missing.ndim != 2 or missing.dtype != bool:
        raise DocumentError(f"the mask has shape {missing.shape} and type {missing.dtype}, expected two axes of bool")
    if not missing.any():
        raise DocumentError("the mask is false everywhere: nothing is missing")
    (top, bottom), (left, right) = ((at.min(), at.max() + 1) for at in np.nonzero(missing))
    places = np.arange(missing.size).reshape(missing.shape)[top:bottom, left:right]
    inside = places.ravel()[order_of(name, *places.shape)]
    return np.concatenate([np.flatnonzero(~missing), inside[missing.ravel()[inside]]])
