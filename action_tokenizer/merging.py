"""Byte-pair encoding of many words in lockstep: the same ids as applying the merges one after another, found without doing so.

A sequence of tokens is the encoding of its text exactly when every two neighbours, encoded together, stay those two. So a word is read
from the left, longest token first, shortened until it may stand beside the token before it, and stepped back where nothing fits. Each
pass takes one such step in every word at once.

Source: the proof and the single-word algorithm are those of GitHub's rust-gems, crate `bpe` (`encode_via_backtracking`,
`is_valid_token_pair`).
"""

from __future__ import annotations

import numpy as np

_NEVER = np.iinfo(np.int32).max
_BASE = -1
"""Rank of a token that no merge makes: a single byte."""
_PARTED = -2
"""Marks a token that may not stand behind another, until a shorter one is found for it."""


class UnsuitableMerges(ValueError):
    """A merge list outside the conditions of the proof; the caller encodes by applying merges."""


class Merger:
    """The merges of one vocabulary.

    tokens: bytes of every id that encoding can emit, by id. merges: pairs of ids and the id they make, by rank.
    Raises UnsuitableMerges.
    """

    def __init__(self, tokens: dict[int, bytes], merges: list[tuple[int, int, int]], vocab_size: int):
        self._vocab_size = vocab_size
        self._rank, self._left, self._right = _histories(tokens, merges, vocab_size)
        live = {index: text for index, text in tokens.items() if self._rank[index] != _NEVER}
        self._length = np.zeros(vocab_size + 1, np.int64)  # 0 for "no token", -1
        self._length[list(live)] = [len(text) for text in live.values()]
        self._shorter = _shorter(live, vocab_size)
        self._trie = _Trie(live)
        self._fits = self._build_fits(live, merges)

    def encode(self, text: bytes, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all words of `text`, one after another, and the positions in `text` at which their bytes start; both int (K,).

        starts: int64 (W,), ascending, the first 0: where words start. Every byte must be in the vocabulary.
        """
        longest = self._trie.longest(np.frombuffer(text, np.uint8), starts)
        end, position = np.append(starts[1:], len(text)), starts
        blocked = np.zeros(len(text) + 1, bool)  # no encoding of the word so far ends there
        # On the path so far: the token that starts at a position, or -1, and the one that ends there, or V at the start of a word.
        # Off the path they hold what was tried there, which nobody reads: a position is left for good, or written again.
        token_at = np.full(len(text), -1, np.int64)
        token_before = np.full(len(text) + 1, self._vocab_size, np.int64)
        token, before = longest.take(position), token_before.take(position)
        while len(position):
            token = self._fitting(before, token)
            stop = position + self._length.take(token)
            token_at[position] = token
            going = (stop < end).nonzero()[0]
            if len(going) < len(stop):
                position, end, token, before, stop = (array.take(going) for array in (position, end, token, before, stop))
            refused = blocked.take(stop)
            refused |= token < 0
            refused = refused.nonzero()[0]
            kept = position[refused], token[refused], before[refused]
            # Words that took a token go on behind it, with the longest token there.
            token_before[stop] = token
            position, before, token = stop, token, longest.take(stop)
            if len(refused):
                position[refused], token[refused], before[refused] = self._retreat(*kept, blocked, token_at, token_before)
        starts_token = (token_at >= 0).nonzero()[0]
        return token_at[starts_token], starts_token

    def _retreat(self, position, token, before, blocked, token_at, token_before):
        """Replace tokens that end at a blocked position by shorter ones; where none is left, give up the token before.

        int64 (K,): the words' positions, tokens refused there (-1: all), and tokens before. Returns the three to go on with.
        """
        token = np.where(token >= 0, self._shorter[token], -1)
        stuck = (token < 0).nonzero()[0]
        if len(stuck):
            left = position[stuck]
            blocked[left] = True
            token_at[left] = -1
            token[stuck] = before[stuck]
            position[stuck] = left - self._length[before[stuck]]
            before[stuck] = token_before[position[stuck]]
        return position, token, before

    def _fitting(self, before: np.ndarray, token: np.ndarray) -> np.ndarray:
        """The longest of `token` and its shorter ones that may follow `before` (V: nothing), or -1. All int64 (K,)."""
        pairs = token * (self._vocab_size + 1)
        pairs += before
        return self._fits.take(pairs).astype(np.int64)

    def _build_fits(self, live: dict[int, bytes], merges: list[tuple[int, int, int]]) -> np.ndarray:
        """What `_fitting` looks up, by token * (V + 1) + before: int16. Behind nothing (V) all tokens may stand.

        Two tokens stay apart unless a merge takes the end of the first and the beginning of the second while both are there: after they
        were made, and before they went into something larger. A merge therefore parts all pairs of an owner of such an end and an owner of
        such a beginning.
        """
        tokens = np.array(sorted(live), np.int64)
        ends, beginnings = _Spines(tokens, self._rank, self._right), _Spines(tokens, self._rank, self._left)
        fits = np.repeat(np.arange(self._vocab_size, dtype=np.int16)[:, None], self._vocab_size + 1, axis=1)
        for rank, (left, right, _) in enumerate(merges):
            # Of two equal merges the left one is made first, so this one still comes before an equal one inside the second token.
            firsts, seconds = ends.owners(left, rank + 1), beginnings.owners(right, rank)
            fits[seconds[:, None], firsts] = _PARTED
        for token in sorted(live, key=lambda index: len(live[index])):  # shorter tokens are settled before longer ones
            parted, shorter = fits[token] == _PARTED, self._shorter[token]
            fits[token, parted] = fits[shorter, parted] if shorter >= 0 else -1
        return fits.ravel()


class _Spines:
    """The parts that stand at one edge of each token while its merges are made.

    tokens: int64 (K,). inner: the part of a token's last merge that lies at that edge, by token.
    """

    def __init__(self, tokens: np.ndarray, rank: np.ndarray, inner: np.ndarray):
        owner, part, until = tokens, tokens, np.full(len(tokens), _NEVER, np.int64)
        rows = []
        while len(owner):
            rows.append((owner, part, until))
            made = rank[part] != _BASE
            owner, whole = owner[made], part[made]
            part, until = inner[whole], rank[whole]
        owner, part, until = (np.concatenate(column) for column in zip(*rows, strict=True))
        order = np.lexsort((until, part))
        self._owner, self._until = owner[order], until[order]
        self._starts = np.searchsorted(part[order], np.arange(len(rank) + 1))

    def owners(self, part: int, rank: int) -> np.ndarray:
        """The tokens at whose edge `part` stands until a merge of this rank or a later one: int64 (K,)."""
        start, end = self._starts[part], self._starts[part + 1]
        return self._owner[start + np.searchsorted(self._until[start:end], rank) : end]


class _Trie:
    """All tokens by their bytes, for finding the longest at every position of a text."""

    def __init__(self, tokens: dict[int, bytes]):
        used = sorted({byte for text in tokens.values() for byte in text})
        self._symbol = np.zeros(256, np.int64)
        self._symbol[used] = np.arange(len(used))
        children: list[dict[int, int]] = [{}]
        token_of = [-1]
        for index, text in tokens.items():
            node = 0
            for byte in text:
                if byte not in children[node]:
                    children[node][byte] = len(children)
                    children.append({})
                    token_of.append(-1)
                node = children[node][byte]
            token_of[node] = index
        # One column more than symbols: the start of another word, behind which no token goes on. Nodes are named by the place
        # of their row in the flat table, 0 being both the root and "none", since nothing leads back to the root.
        self._width = len(used) + 1
        self._next = np.zeros(len(children) * self._width, np.int64)
        self._longest = np.full(len(children), -1, np.int64)
        for node, following in enumerate(children):  # parents come before their children
            self._longest[node] = token_of[node] if token_of[node] >= 0 else self._longest[node]
            for byte, child in following.items():
                self._next[node * self._width + self._symbol[byte]] = child * self._width
                self._longest[child] = self._longest[node]

    def longest(self, text: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """The longest token from each position to within its word: uint8 (L,) to int64 (L,)."""
        symbols = self._symbol[text]
        onward = np.full(len(text) + 1, self._width - 1)
        onward[:-1] = symbols
        onward[starts] = self._width - 1
        position, node = np.arange(len(text)), self._next.take(symbols)
        last = np.empty_like(position)
        while len(position):
            onward = onward[1:]
            following = self._next.take(node + onward.take(position))
            # Written for all: who goes on is overwritten by its next node.
            last[position] = node
            alive = following.nonzero()[0]
            position, node = position.take(alive), following.take(alive)
        return self._longest.take(last // self._width)


def _shorter(tokens: dict[int, bytes], vocab_size: int) -> np.ndarray:
    """For each token the longest other one that it begins with, or -1: int64 (V,)."""
    by_text = {text: index for index, text in tokens.items()}
    shorter = np.full(vocab_size, -1, np.int64)
    for index, text in tokens.items():
        prefixes = (by_text.get(text[:length], -1) for length in range(len(text) - 1, 0, -1))
        shorter[index] = next((prefix for prefix in prefixes if prefix >= 0), -1)
    return shorter


def _histories(tokens: dict[int, bytes], merges: list[tuple[int, int, int]], vocab_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rank, left and right part of the merge that makes each token: int64 (V,) each.

    Rank _BASE: a single byte. _NEVER: encoding never gives this token. Raises UnsuitableMerges where a merge uses a token that only a
    later one makes.
    """
    rank, left, right = [_NEVER] * vocab_size, [0] * vocab_size, [0] * vocab_size
    for index, text in tokens.items():
        if len(text) == 1:
            rank[index] = _BASE
    rank_of = {(first, second): number for number, (first, second, _) in enumerate(merges)}
    skipped = set()
    for number, (first, second, made) in enumerate(merges):
        if _NEVER in (rank[first], rank[second]):
            skipped |= {token for token in (first, second) if rank[token] == _NEVER}
        # Of two merges that make the same text, the one that its own encoding takes leaves the other nothing to merge.
        elif rank[made] == _NEVER and _meet(first, second, number, rank_of, (rank, left, right)):
            rank[made], left[made], right[made] = number, first, second
    if any(rank[token] != _NEVER for token in skipped):
        raise UnsuitableMerges("a merge uses a token that only a later merge makes")
    return np.array(rank, np.int64), np.array(left, np.int64), np.array(right, np.int64)


def _meet(first: int, second: int, limit: int, rank_of: dict[tuple[int, int], int], histories) -> bool:
    """Whether two tokens come to stand side by side before merge `limit`: undo the merges of both, last first."""
    rank, left, right = histories
    while rank_of.get((first, second), _NEVER) >= limit:
        if rank[first] == rank[second] == _BASE:
            return True
        if rank[first] > rank[second]:
            limit, first = rank[first], right[first]
        else:
            limit, second = rank[second] + 1, left[second]
    return False
