"""Made-up actions for the tests of this room."""

import numpy as np
from scipy.ndimage import gaussian_filter1d


def smooth_chunks(count: int, horizon: int = 10, action_dim: int = 7, seed: int = 0) -> np.ndarray:
    """Smooth random actions within [-1, 1] with a binary last dimension: float32 (count, horizon, action_dim)."""
    rng = np.random.default_rng(seed)
    chunks = gaussian_filter1d(rng.normal(size=(count, horizon, action_dim)), 2.0, axis=1, mode="nearest")
    chunks = np.clip(chunks * rng.choice([0.0, 1.0, 2.0], size=(count, 1, action_dim)), -1, 1)
    gripper = np.sign(rng.normal(size=(count, 1))) * np.where(np.arange(horizon) < rng.integers(1, 40, (count, 1)), 1, -1)
    chunks[:, :, -1] = gripper
    return chunks.astype(np.float32)
