"""Writing numbers as words (emu3_vla.number_words), the likeliest at each place, for several sequences at once.

All words are guessed first: what was said last time. The guesses go through the trunk in one pass, and stand as far as they are what would
have been written one by one. What the model says behind a wrong one is the next guess (Jacobi decoding, arXiv 2305.10427): what is seen
depends on the pictures more than on the words before. So a few passes do in place of one a word, and the words are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from emu3_vla.generation.actions import DecodingFailed
from emu3_vla.generation.cache import LEAST_ROWS, CachedSequence, Product
from emu3_vla.number_words import NumberWords, SpelledNumbers


class WordWriter:
    """Of one model. Raises ValueError where a word takes several ids of the text tokenizer."""

    def __init__(self, model: torch.nn.Module, spelled: SpelledNumbers):
        ids_SB = spelled.single_ids()
        if ids_SB is None:
            raise ValueError("the text tokenizer has not every word of the scene as one id; tokenize with one that was fitted with them")
        self.words: NumberWords = spelled.words
        self._ids_SB = torch.from_numpy(ids_SB)
        self._head = Product(model.lm_head.weight[self._ids_SB.flatten()])
        self._embeddings = model.model.embed_tokens.weight

    def begin(self, guess: np.ndarray | None = None) -> Sentence:
        """Words of which none is written. guess: bins that may be right; they change the time alone."""
        somewhere = np.full(len(self.words.names), self.words.bins // 2)
        sentence = Sentence(np.array(somewhere if guess is None else guess, np.int64))
        sentence.ahead = sentence.guess[:-1].tolist()  # nothing stands behind the last
        return sentence

    def ahead(self, sentence: Sentence) -> torch.Tensor:
        """Embeddings (k, H) of its guesses, to go through the trunk with what stands before them."""
        return self._embeddings[self._ids(len(sentence.bins), sentence.ahead)]

    @torch.inference_mode()
    def write_each(
        self, sequences: Sequence[CachedSequence], sentences: Sequence[Sentence], states: Sequence[torch.Tensor]
    ) -> list[np.ndarray]:
        """Write all words behind each sequence: the bins of each, uint16 (S,). The sequences then hold all words but the last.

        sentences: begun, their guesses in the sequences. states: of each (1 + k, H), after what stands before the words and after each
        guess. Raises DecodingFailed.
        """
        states, going = list(states), list(range(len(sentences)))
        while True:
            for number in going:
                self._take(sentences[number], sequences[number], states[number])
            going = [number for number in going if len(sentences[number].bins) < len(self.words.names)]
            if not going:
                return [np.array(sentence.bins, np.uint16) for sentence in sentences]
            parts = [(sequences[number], self._embeddings[self._following(sentences[number])]) for number in going]
            for number, rows in zip(going, sequences[0].trunk.extend_each(parts), strict=True):
                states[number] = rows

    def _take(self, sentence: Sentence, sequence: CachedSequence, states: torch.Tensor) -> None:
        """Words behind these states: the first is certain, each other is if the guess that its state stands on was right."""
        first, ahead = len(sentence.bins), sentence.ahead
        chosen = self._likeliest(states, first)
        right = next((at for at, guess in enumerate(ahead) if guess != chosen[at]), len(ahead))
        sentence.bins += chosen[: right + 1]
        # What was put in behind the last right guess is of a sentence that is not written.
        sequence.truncate(sequence.length - (len(ahead) - right))
        sentence.guess[first : first + len(chosen)] = chosen
        sentence.ahead = sentence.guess[len(sentence.bins) : len(self.words.names) - 1].tolist()

    def _following(self, sentence: Sentence) -> torch.Tensor:
        """The word just written, and the guesses behind it."""
        return self._ids(len(sentence.bins) - 1, [sentence.bins[-1], *sentence.ahead])

    def _ids(self, first: int, bins: list[int]) -> torch.Tensor:
        """Of these bins of the entries from `first` on."""
        return self._ids_SB[torch.arange(first, first + len(bins)), torch.tensor(bins, dtype=torch.long)]

    def _likeliest(self, rows: torch.Tensor, first: int) -> list[int]:
        logits = self._head(F.pad(rows, (0, 0, 0, max(0, LEAST_ROWS - len(rows)))))[: len(rows)].float()
        if not torch.isfinite(logits).all():
            raise DecodingFailed("the model's logits hold NaN or infinity; its weights or its input are broken, and no action was made")
        by_entry = logits.unflatten(1, (len(self.words.names), self.words.bins))
        return [int(by_entry[row, first + row].argmax()) for row in range(len(rows))]


@dataclass
class Sentence:
    """guess: of all bins, int64 (S,). bins: written so far. ahead: guesses that stand in the sequence behind the word last written."""

    guess: np.ndarray
    bins: list[int] = field(default_factory=list)
    ahead: list[int] = field(default_factory=list)
