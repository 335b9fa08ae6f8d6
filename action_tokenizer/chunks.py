"""Episodes to chunks, one episode in memory at a time.

    episodes = (episode for shard in store.shard_indices() for episode in store.read_shard(shard))
    tokenizer = FastTokenizer.fit(chunks_of(episodes, horizon=10), scale=10, vocab_size=1024)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from action_tokenizer.errors import BadActions
from action_tokenizer.normalizer import ActionNormalizer


def chunks_of(
    episodes: Iterable, *, horizon: int, stride: int = 1, normalizer: ActionNormalizer | None = None
) -> Iterator[np.ndarray]:
    """All chunks of consecutive actions that lie within an episode, an array (N, T, A) per episode.

    episodes: arrays (steps, A), or objects with such an array as `actions`. stride: steps from one chunk's start to the next.
    Episodes shorter than `horizon` give nothing. Raises BadActions.
    """
    if horizon < 1 or stride < 1:
        raise BadActions(f"horizon is {horizon} and stride {stride}, expected positive integers")
    for number, episode in enumerate(episodes):
        actions = np.asarray(getattr(episode, "actions", episode))
        if actions.ndim != 2:
            raise BadActions(f"episode {number} has actions of shape {actions.shape}, expected (steps, A)")
        if len(actions) >= horizon:
            actions = actions if normalizer is None else normalizer.normalize(actions)
            windows = np.lib.stride_tricks.sliding_window_view(actions, horizon, axis=0)[::stride]
            yield np.ascontiguousarray(windows.transpose(0, 2, 1))
