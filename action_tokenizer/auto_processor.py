"""The module that Transformers' AutoProcessor loads beside a tokenizer's files, as text: it runs without this package.

Written on request only (`FastTokenizer.save_pretrained(folder, processor_code=True)`), since a folder that holds code asks its reader for
trust (`trust_remote_code=True`), and nothing else in this program needs it.
"""

FILE = "processing_action_tokenizer.py"

SOURCE = '''\
"""FAST action tokenizer for AutoProcessor.from_pretrained(folder, trust_remote_code=True). Needs numpy, scipy and transformers."""

import numpy as np
from scipy.fft import dct, idct
from transformers.processing_utils import ProcessorMixin


class UniversalActionProcessor(ProcessorMixin):
    """Chunks of actions (N, T, A) to lists of ids, and back. Source: FAST, arXiv 2501.09747."""

    attributes = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer, scale=10, vocab_size=1024, min_token=0, action_dim=None, time_horizon=None):
        self.scale, self.vocab_size, self.min_token = scale, vocab_size, min_token
        self.action_dim, self.time_horizon = action_dim, time_horizon
        super().__init__(tokenizer)

    def __call__(self, action_chunk):
        """Real (N, T, A) or (T, A), normalised, to N lists of ids. Raises ValueError for what the vocabulary cannot write."""
        chunks = np.asarray(action_chunk)
        chunks = chunks[None] if chunks.ndim == 2 else chunks
        coefficients = np.around(dct(chunks, axis=1, norm="ortho") * self.scale).astype(int)
        ids = [self._encode(chunk.flatten()) for chunk in coefficients]
        return ids

    def decode(self, tokens, *, time_horizon=None, action_dim=None):
        """N lists of ids to float64 (N, T, A). Raises ValueError for a list that does not hold T times A coefficients."""
        shape = (time_horizon or self.time_horizon, action_dim or self.action_dim)
        if None in shape:
            raise ValueError("time_horizon and action_dim are not in the files; pass both")
        return np.stack([self._decode(list(row), shape) for row in tokens])

    def _encode(self, coefficients):
        points = coefficients - self.min_token
        if points.min() < 0:
            raise ValueError(f"coefficient {coefficients.min()} is below the least of this tokenizer, {self.min_token}")
        text = "".join(map(chr, points))
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if self._text(ids) != text:
            raise ValueError(f"coefficients {sorted(set(coefficients.tolist()))} hold some that the vocabulary lacks")
        return ids

    def _decode(self, ids, shape):
        text = self._text(ids)
        if len(text) != shape[0] * shape[1] or "\\ufffd" in text:
            raise ValueError(f"{len(ids)} ids hold {len(text)} coefficients or broken ones, expected {shape[0]} times {shape[1]}")
        coefficients = np.array([ord(char) for char in text]).reshape(shape) + self.min_token
        return idct(coefficients / self.scale, axis=0, norm="ortho")

    def _text(self, ids):
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
'''
