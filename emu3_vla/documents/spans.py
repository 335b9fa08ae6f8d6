"""Where packed documents stand, and how attention keeps to them.

Attention is computed document by document: those of like length side by side, padded to the longest of them. A row of many documents so
costs the sum of their squares, not the square of the row, and no product ever holds two documents' positions.

Axes: P flattened positions of a batch, D documents, N documents of a group, L positions of its longest.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch

FINEST, FINENESS = 8, 8
"""Lengths in a group differ by less than FINEST positions, or by less than one part in FINENESS of them."""


@dataclass(frozen=True)
class Group:
    """Documents of like length. index_NL: int64, their positions; a shorter one repeats its last. at_K: int64, all their positions, and
    kept_K: int64, where these stand in the flattened index."""

    index_NL: torch.Tensor
    at_K: torch.Tensor
    kept_K: torch.Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Group:
        return Group(*(getattr(self, field.name).to(device, non_blocking=non_blocking) for field in fields(self)))


@dataclass(frozen=True)
class Spans:
    """The documents of a packed batch. starts_D, lengths_D: int64. positions_BL: int64, counted anew from 0 in every document."""

    starts_D: np.ndarray
    lengths_D: np.ndarray
    positions_BL: torch.Tensor
    groups: tuple[Group, ...]

    @classmethod
    def of(cls, starts_D: np.ndarray, lengths_D: np.ndarray, shape: tuple[int, int]) -> Spans:
        """Documents at these places, ascending, of a batch of this shape (rows, positions)."""
        positions = np.zeros(shape[0] * shape[1], np.int64)
        for start, length in zip(starts_D.tolist(), lengths_D.tolist(), strict=True):
            positions[start : start + length] = np.arange(length)
        widths = _widths(lengths_D)
        groups = [_group(starts_D[widths == width], lengths_D[widths == width]) for width in np.unique(widths)]
        return cls(starts_D, lengths_D, torch.from_numpy(positions).view(shape), tuple(groups))

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.starts_D)

    @property
    def squares(self) -> int:
        """Pairs of positions that attention computes: of each document its group's length, squared."""
        return sum(group.index_NL.numel() * group.index_NL.shape[1] for group in self.groups)

    def document_at(self, positions: np.ndarray) -> np.ndarray:
        """Number of the document at each of these positions, which must not be padding."""
        return np.searchsorted(self.starts_D, positions, side="right") - 1

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Spans:
        groups = tuple(group.to(device, non_blocking) for group in self.groups)
        return Spans(self.starts_D, self.lengths_D, self.positions_BL.to(device, non_blocking=non_blocking), groups)


def _widths(lengths: np.ndarray) -> np.ndarray:
    """To what length each document is padded within its group."""
    fineness = np.maximum(FINEST, 2 ** np.floor(np.log2(np.maximum(lengths, 1))).astype(np.int64) // FINENESS)
    return -(-lengths // fineness) * fineness


def _group(starts: np.ndarray, lengths: np.ndarray) -> Group:
    places = np.arange(lengths.max())
    index = starts[:, None] + np.minimum(places, lengths[:, None] - 1)
    kept = np.flatnonzero(places < lengths[:, None])
    return Group(torch.from_numpy(index), torch.from_numpy(index.ravel()[kept]), torch.from_numpy(kept))
