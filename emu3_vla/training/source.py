"""Where documents come from: a token store, seen as a vocabulary and two document streams."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emu3_vla.data.tokens import MANIFEST, TEXT, TokenizedEpisode, TokenStore, text_tokenizer
from emu3_vla.number_words import NumberWords, SpelledNumbers
from emu3_vla.training.kinds import PICTURED, Material
from emu3_vla.training.mixture import MixtureStream
from emu3_vla.training.stream import DocumentStream, encoded_wordings
from emu3_vla.vocabulary import CODEBOOK_SIZE, TEXT_SIZE, CompactVocabulary, Emu3Vocabulary, ImageGrid, Vocabulary, VocabularyError
from envs.spec import CAMERAS, ActionUnits

if TYPE_CHECKING:
    from emu3_vla.training.loop import TrainConfig


Stream = DocumentStream | MixtureStream


@dataclass(frozen=True, kw_only=True)
class Source:
    """A finished token store and the vocabulary that follows from it. horizon, action_dim: shape of a chunk."""

    store: TokenStore
    vocabulary: Vocabulary
    horizon: int
    action_dim: int

    @property
    def units(self) -> ActionUnits:
        """What an action of 1 is."""
        return ActionUnits(**self.store.metadata.get("actions", {}))

    @property
    def folder(self) -> Path:
        """Holds the tokenizers that belong into a checkpoint."""
        return self.store.path

    def streams(self, config: TrainConfig) -> tuple[Stream, Stream]:
        """Documents to train on, and held-out ones from other shards."""
        if config.context:
            train, held_out = (self._mixture(config, episodes) for episodes in self.store.split(config.validation_fraction))
            return train, held_out
        text = text_tokenizer(self.folder / TEXT)
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
                states=self.states(),
                scenes=self.scenes(),
                scene_fraction=config.scene_fraction,
            )
            for episodes in self.store.split(config.validation_fraction)
        )
        return train, held_out

    def _mixture(self, config: TrainConfig, episodes: list[TokenizedEpisode]) -> MixtureStream:
        encode = text_tokenizer(self.folder / TEXT).encode
        material = Material(
            episodes=episodes,
            texts=encoded_wordings(episodes, self.store.metadata["wordings"], encode),
            vocabulary=self.vocabulary,
            horizon=self.horizon,
            chunks=config.chunks,
            moments=config.mixture.moments,
            questions=config.questions,
            states=self.states(),
            scenes=self.scenes(),
            scene_fraction=config.scene_fraction,
            scene_first=config.scene_first and bool(PICTURED & config.mixture.shares().keys()),
            scene_asked=bool(config.scene_fraction or config.scene_first) and self.store.scene_words is not None,
        )
        return MixtureStream(material, config.mixture.shares(), context=config.context, rows=config.batch_size, seed=config.seed)

    def states(self) -> SpelledNumbers | None:
        """How the arm's state is said in ids, where it is."""
        return self._spelled(self.store.state_words)

    def scenes(self) -> SpelledNumbers | None:
        """How what there is to see is said in ids, where it is."""
        return self._spelled(self.store.scene_words)

    def _spelled(self, words: NumberWords | None) -> SpelledNumbers | None:
        return words.spelled(text_tokenizer(self.folder / TEXT).encode) if words else None

    def manifest(self) -> dict[str, Any]:
        """What a checkpoint's provenance says of the store."""
        metadata, source = self.store.metadata, self.store.metadata["source"]
        digest = hashlib.sha256((self.folder / MANIFEST).read_bytes()).hexdigest()
        said = [{name: value for name, value in of_store.items() if name != "wordings"} for of_store in source.get("metadata", [])]
        shards = map(len, metadata.get("shard_groups", []))
        episodes = [
            {"store": store, "shards": count} | of_store
            for store, count, of_store in zip(source.get("episodes", []), shards, said, strict=True)
        ]
        return {"sha256": digest, "tokenizers": metadata["hashes"], "totals": source["totals"], "episodes": episodes}


def open_source(folder: str, block_size: int) -> Source:
    """Open a token store for training with blocks of block_size × block_size codes.

    The vocabulary is Emu3's own where the text tokenizer is.
    Raises what TokenStore.open raises, and VocabularyError where the grids are no multiple of the block size, or the store mixes Emu3's
    text tokenizer with another codebook.
    """
    store = TokenStore.open(folder)
    vocabulary = _vocabulary(store.metadata, block_size)
    return Source(store=store, vocabulary=vocabulary, horizon=store.metadata["horizon"], action_dim=store.metadata["action_dim"])


def _vocabulary(metadata: dict[str, Any], block_size: int) -> Vocabulary:
    if metadata["text_vocab_size"] == TEXT_SIZE:
        if metadata["codebook_size"] != CODEBOOK_SIZE or block_size != 1:
            raise VocabularyError(
                f"the token store has Emu3's text tokenizer, {metadata['codebook_size']} codes, and model.block_size={block_size}; "
                f"Emu3's vocabulary has {CODEBOOK_SIZE} codes, one a position: tokenize with its vision tokenizer, use model.block_size=1"
            )
        return Emu3Vocabulary(action_size=metadata["action_vocab_size"])
    return CompactVocabulary(
        text_size=metadata["text_vocab_size"],
        action_size=metadata["action_vocab_size"],
        codebook_size=metadata["codebook_size"],
        images=tuple(_grid(camera, metadata["grids"][camera]) for camera in CAMERAS),
        block_size=block_size,
    )


def _grid(camera: str, shape: list[int]) -> ImageGrid:
    return ImageGrid(name=camera, rows=shape[0], columns=shape[1])
