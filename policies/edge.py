"""The vision tokenizer beside the camera: a client that has one sends code ids, 1 kB, where pixels would be 140.

policy = policies.load("ws://gpu-machine:8000", tokenizer="vision_tokenizer/")
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from emu3_vla.data.tokens import content_hash
from emu3_vla.vision_tokenizer import VisionTokenizer


class EdgeTokenizer:
    """A vision tokenizer's folder as RemotePolicy needs it; see policies.client.CodesOf. Raises what VisionTokenizer raises."""

    def __init__(self, folder: str | Path, device: str = "cpu"):
        self._tokenizer = VisionTokenizer.from_pretrained(folder).to(device)
        self.fingerprint = content_hash(Path(folder))
        self.codebook_size = self._tokenizer.codebook_size
        self.cameras = frozenset(self._tokenizer.image_sizes)

    def encode(self, camera: str, image: np.ndarray) -> np.ndarray:
        """Code ids int64 (rows, columns) of an image, uint8 (H, W, 3)."""
        return self._tokenizer.encode_camera(camera, np.asarray(image)[None])[0].cpu().numpy()
