"""Reads out of a picture's codes what is true of it, clause by clause, to judge whether a drawing shows what its caption says.

Ridge regression from the code vectors at all positions of all images to each clause's states; the state with the highest value is read. It
is trained on real pictures with their captions, and its right share on real ones that it has not seen says how far its word can be trusted.

Axes: N pictures, S states of a thing, P features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from emu3_vla.documents import Image
from emu3_vla.vision_tokenizer import VisionTokenizer
from emu3_vla.vision_tokenizer.probe import RIDGE

Said = Mapping[str, str]
"""What a caption says: thing → state."""


class StateProbe:
    """looks: the images of each of N moments. said: of each what is true. Raises ValueError for none."""

    def __init__(self, tokenizer: VisionTokenizer, looks: Sequence[Sequence[Image]], said: Sequence[Said]):
        if not looks or len(looks) != len(said):
            raise ValueError(f"{len(looks)} pictures and {len(said)} captions, expected as many of both and at least one")
        self._tokenizer = tokenizer
        features = self._features(looks)
        self._mean = features.mean(0)
        centred = features - self._mean
        self._states = {thing: sorted({each[thing] for each in said if thing in each}) for thing in said[0]}
        targets = [
            torch.tensor([[float(each.get(thing) == state) for state in states] for each in said], dtype=torch.float32)
            for thing, states in self._states.items()
        ]
        self._centres = [target.mean(0) for target in targets]
        targets_NS = torch.cat([target - centre for target, centre in zip(targets, self._centres, strict=True)], 1)
        self._weights = _ridge(centred, targets_NS)

    def read(self, looks: Sequence[Sequence[Image]]) -> list[dict[str, str]]:
        """What is true of each moment."""
        values_NS = (self._features(looks) - self._mean) @ self._weights
        parts = values_NS.split([len(states) for states in self._states.values()], 1)
        chosen = [(part + centre).argmax(1).tolist() for part, centre in zip(parts, self._centres, strict=True)]
        names = list(self._states)
        return [{thing: self._states[thing][index] for thing, index in zip(names, row, strict=True)} for row in zip(*chosen, strict=True)]

    def _features(self, looks: Sequence[Sequence[Image]]) -> torch.Tensor:
        """Code vectors of all images and positions, one after another: float32 (N, P)."""
        codes = torch.stack([torch.cat([torch.from_numpy(image.codes.astype("int64")).flatten() for image in look]) for look in looks])
        with torch.inference_mode():
            return self._tokenizer.vectors(codes.to(self._tokenizer.device)).float().cpu().flatten(1).clone()


def _ridge(features_NP: torch.Tensor, targets_NS: torch.Tensor) -> torch.Tensor:
    """Weights (P, S), by the smaller of the two systems that have the same solution."""
    penalty = RIDGE * features_NP.square().mean() * len(features_NP)
    few = len(features_NP) < features_NP.shape[1]
    gram = (features_NP @ features_NP.T if few else features_NP.T @ features_NP).double()
    gram.diagonal().add_(penalty)
    if few:
        return features_NP.T @ torch.linalg.solve(gram, targets_NS.double()).float()
    return torch.linalg.solve(gram, (features_NP.T @ targets_NS).double()).float()
