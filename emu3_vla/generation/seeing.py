"""What a policy says that it sees of single moments, without acting: in its own words, each moment by itself and without a past."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from emu3_vla.checkpoint import Checkpoint
from emu3_vla.documents import Segment, Text, length_of
from emu3_vla.generation.cache import CachedTrunk
from emu3_vla.generation.items import embed
from emu3_vla.generation.words import WordWriter
from emu3_vla.number_words import NumberWords, StateWords


class Seer:
    """Of a checkpoint that was trained to say what it sees. Raises ValueError for another."""

    def __init__(self, checkpoint: Checkpoint):
        settings, self._encode = checkpoint.policy, checkpoint.text_tokenizer.encode
        if settings is None or not settings.scene:
            raise ValueError(
                f"{checkpoint.folder} says nothing of what it sees before it acts; a policy does that was trained with scene_fraction"
            )
        self._model, self._vocabulary = checkpoint.model, checkpoint.vocabulary
        self._states = StateWords.of(settings.state).spelled(self._encode) if settings.state else None
        self._writer = WordWriter(self._model, NumberWords.of(settings.scene).spelled(self._encode))
        self._trunk = CachedTrunk(self._model)

    @torch.inference_mode()
    def see(self, instruction: str, looks: Sequence[Sequence[Segment]], state_FS: np.ndarray | None) -> np.ndarray:
        """Bins of its words for each of F moments: uint16 (F, S).

        looks: images of each moment. state_FS: bins of the arm's state at each, where the policy is told it. Raises DecodingFailed.
        """
        text = Text(self._encode(instruction))
        told = length_of([text], self._vocabulary)
        felt = [[Text(self._states.ids(bins))] for bins in state_FS] if self._states else [[]] * len(looks)
        sequences, parts, sentences = [], [], [self._writer.begin() for _ in looks]
        for look, said, sentence in zip(looks, felt, sentences, strict=True):
            embedded = embed(self._model, self._vocabulary, [text, *look, *said])
            # The instruction apart from the rest, as a policy reads it, so that every bit is the same.
            known, seen = embedded[:told], embedded[told:]
            sequence = self._trunk.sequence(len(embedded) + len(self._writer.words.names))
            sequence.extend(known)
            sequences.append(sequence)
            parts.append((sequence, torch.cat([seen, self._writer.ahead(sentence)])))
        states = [rows[-1 - len(one.ahead) :] for rows, one in zip(self._trunk.extend_each(parts), sentences, strict=True)]
        return np.stack(self._writer.write_each(sequences, sentences, states))
