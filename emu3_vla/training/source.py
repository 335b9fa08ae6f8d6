"""Where documents come from: a token store, seen as a vocabulary and two document streams."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emu3_vla.data.tokens import MANIFEST, TEXT, TokenStore
from emu3_vla.text import TextTokenizer
from emu3_vla.training.stream import DocumentStream
from emu3_vla.vocabulary import CompactVocabulary, ImageGrid
from envs.spec import CAMERAS

if TYPE_CHECKING:
    from emu3_vla.training.loop import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Source:
    """A finished token store and the vocabulary that follows from it. horizon, action_dim: shape of a chunk."""

    store: TokenStore
    vocabulary: CompactVocabulary
    horizon: int
    action_dim: int

    @property
    def folder(self) -> Path:
        """Holds the tokenizers that belong into a checkpoint."""
        return self.store.path

    def streams(self, config: TrainConfig) -> tuple[DocumentStream, DocumentStream]:
        """Documents to train on, and held-out ones from other shards."""
        text = TextTokenizer.from_pretrained(self.folder / TEXT)
        train, held_out = (
            DocumentStream(
                episodes,
                vocabulary=self.vocabulary,
                wordings=self.store.metadata["wordings"],
                encode=text.encode,
                chunks=config.chunks,
                horizon=self.horizon,
                batch_size=config.batch_size,
                seed=config.seed,
                asked_fraction=config.asked_fraction,
                questions=config.questions,
            )
            for episodes in self.store.split(config.validation_fraction)
        )
        return train, held_out

    def manifest(self) -> dict[str, Any]:
        """What a checkpoint's provenance says of the store."""
        metadata = self.store.metadata
        digest = hashlib.sha256((self.folder / MANIFEST).read_bytes()).hexdigest()
        return {"sha256": digest, "tokenizers": metadata["hashes"], "totals": metadata["source"]["totals"]}


def open_source(folder: str, block_size: int) -> Source:
    """Open a token store for training with blocks of block_size × block_size codes.

    Raises what TokenStore.open raises, and VocabularyError where the grids are no multiple of the
    block size.
    """
    store = TokenStore.open(folder)
    metadata = store.metadata
    vocabulary = CompactVocabulary(
        text_size=metadata["text_vocab_size"],
        action_size=metadata["action_vocab_size"],
        codebook_size=metadata["codebook_size"],
        images=tuple(_grid(camera, metadata["grids"][camera]) for camera in CAMERAS),
        block_size=block_size,
    )
    return Source(store=store, vocabulary=vocabulary, horizon=metadata["horizon"], action_dim=metadata["action_dim"])


def _grid(camera: str, shape: list[int]) -> ImageGrid:
    return ImageGrid(name=camera, rows=shape[0], columns=shape[1])
