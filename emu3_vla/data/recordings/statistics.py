"""Statistics of each episode and of all together, in the form that LeRobot's policies normalise by."""

from __future__ import annotations

import numpy as np

MOST_FRAMES = 100
LARGEST_SIDE = 150


def statistics(values: np.ndarray) -> dict[str, list]:
    """min, max, mean, std and count over the steps, of each entry."""
    numbers = values.reshape(len(values), *(values.shape[1:] or (1,))).astype(np.float64)
    return {
        "min": numbers.min(axis=0).tolist(),
        "max": numbers.max(axis=0).tolist(),
        "mean": numbers.mean(axis=0).tolist(),
        "std": numbers.std(axis=0).tolist(),
        "count": [len(numbers)],
    }


class PictureStatistics:
    """The same of each colour in [0, 1], from up to MOST_FRAMES frames of an episode, seen while they go by."""

    def __init__(self, length: int):
        self.chosen = np.unique(np.linspace(0, length - 1, min(length, MOST_FRAMES)).round().astype(int))
        self.step = 0
        self.counts = np.zeros((3, 256), np.int64)  # pixels of each value

    def see(self, block: np.ndarray) -> None:
        local = self.chosen[(self.chosen >= self.step) & (self.chosen < self.step + len(block))] - self.step
        self.step += len(block)
        coarse = max(1, max(block.shape[1:3]) // LARGEST_SIDE)
        for channel in range(3):
            self.counts[channel] += np.bincount(block[local, ::coarse, ::coarse, channel].ravel(), minlength=256)

    def result(self) -> dict[str, list]:
        values, pixels = np.arange(256) / 255, self.counts.sum(axis=1)
        mean = self.counts @ values / pixels
        std = np.sqrt(np.maximum(self.counts @ values**2 / pixels - mean**2, 0))
        seen = self.counts > 0
        shaped = {"min": values[seen.argmax(axis=1)], "max": values[255 - seen[:, ::-1].argmax(axis=1)], "mean": mean, "std": std}
        return {name: numbers.reshape(3, 1, 1).tolist() for name, numbers in shaped.items()} | {"count": [len(self.chosen)]}


def joined(statistics: list[dict[str, dict[str, list]]]) -> dict[str, dict[str, list]]:
    """Statistics of all episodes from each one's."""
    return {key: _joined([episode[key] for episode in statistics]) for key in statistics[0]} if statistics else {}


def _joined(parts: list[dict[str, list]]) -> dict[str, list]:
    counts = np.array([part["count"][0] for part in parts], np.float64)
    means, stds = (np.array([part[name] for part in parts], np.float64) for name in ("mean", "std"))
    weights = (counts / counts.sum()).reshape(-1, *[1] * (means.ndim - 1))
    mean = (weights * means).sum(axis=0)
    variance = (weights * (stds**2 + (means - mean) ** 2)).sum(axis=0)
    return {
        "min": np.min([part["min"] for part in parts], axis=0).tolist(),
        "max": np.max([part["max"] for part in parts], axis=0).tolist(),
        "mean": mean.tolist(),
        "std": np.sqrt(variance).tolist(),
        "count": [int(counts.sum())],
    }
