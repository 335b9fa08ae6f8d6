"""The cached trunk computes what Emu3ForCausalLM computes."""

import pytest
import torch
from block_models import block_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Emu3ForCausalLM, Emu3TextConfig

from emu3_vla.generation.cache import ATTENTION_CELLS, CachedTrunk, CacheFull, cache_bytes
from emu3_vla.model import BlockEmu3ForCausalLM


def _model(**changes) -> BlockEmu3ForCausalLM:
    return block_model(**changes)[0]


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2}, {"hidden_act": "relu2"}], ids=["plain", "grouped", "relu2"])
@torch.no_grad()
def test_prefill_and_decode_agree_with_the_whole(changes):
    model, embeddings = _model(**changes), torch.randn(20, 32)
    expected = model.model(inputs_embeds=embeddings[None]).last_hidden_state[0]
    trunk = CachedTrunk(model).sequence(20)
    parts = [trunk.extend(embeddings[:7]), trunk.extend(embeddings[7:12])]
    parts += [trunk.extend(embeddings[at : at + 1]) for at in range(12, 20)]
    torch.testing.assert_close(torch.cat(parts), expected, atol=1e-5, rtol=1e-5)


def test_truncated_prefix_is_as_good_as_new():
    trunk, embeddings = CachedTrunk(_model()).sequence(20), torch.randn(10, 32)
    first = trunk.extend(embeddings)
    trunk.truncate(4)
    trunk.extend(torch.randn(9, 32))
    trunk.truncate(4)
    torch.testing.assert_close(trunk.extend(embeddings[4:]), first[4:], atol=1e-5, rtol=1e-5)


def test_refusals():
    trunk = CachedTrunk(_model()).sequence(5)
    with pytest.raises(CacheFull, match="6 positions, but the cache holds 5"):
        trunk.extend(torch.zeros(6, 32))
    trunk.extend(torch.zeros(3, 32))
    with pytest.raises(ValueError, match="cannot keep 4 positions of 3"):
        trunk.truncate(4)
    with pytest.raises(ValueError, match="default rotary positions"):
        CachedTrunk(_model(mlp_bias=True)).sequence(5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [True, False])
def test_a_sequence_does_not_depend_on_those_beside_it(dtype, packed):
    """Bit for bit, and also where they are many and long."""
    trunk = CachedTrunk(_model(hidden_size=64, intermediate_size=160).to(dtype), packed=packed)
    embeddings = torch.randn(6, 64).to(dtype)

    def extended(others: list[int]) -> torch.Tensor:
        cache = trunk.cache(1 + len(others), 80)
        own, *beside = cache.sequences
        states = []
        for at, new in ((0, 4), (4, 1), (5, 1)):
            parts = [(sequence, torch.randn(size, 64).to(dtype)) for sequence, size in zip(beside, others, strict=True)]
            states.append(trunk.extend_each([*parts, (own, embeddings[at : at + new])])[-1])
        return torch.cat(states)

    alone = extended([])
    for others in ([1], [1, 1, 1], [20, 3], [1] * 17):
        assert torch.equal(extended(others), alone)


def test_nothing_but_the_cache_grows_with_the_context():
    """Emu3's 8 B shape at 131,072 positions: the cache is exactly its bound. Beside a small model's cache of that length,
    the last piece of a prompt needs no tensor larger than the attention's workspace."""
    config = Emu3TextConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8)
    bound = cache_bytes(config, rows=1, capacity=131_072, dtype=torch.bfloat16)
    assert bound == 131_072 * 32 * 8 * 128 * 2 * 2 == 16 * 2**30
    with torch.device("meta"):
        trunk = CachedTrunk(Emu3ForCausalLM(config).to(torch.bfloat16))
        assert trunk.cache(1, 131_072).bytes == bound

    trunk = CachedTrunk(_model(num_hidden_layers=1))
    beside = []
    for capacity in (2**14, 2**17):
        with _Allocations() as made:
            sequence = trunk.sequence(capacity)
            sequence.length = capacity - 64  # as if all but the last piece of a prompt had been put in
            sequence.extend(torch.zeros(64, 32))
        cache = cache_bytes(trunk.config, rows=1, capacity=capacity, dtype=torch.float32)
        large = [size for size in made.sizes if size > 2**20 and size != cache // 2]
        beside.append(max(large, default=0))
    assert beside[1] <= ATTENTION_CELLS * 4


class _Allocations(TorchDispatchMode):
    """Bytes of every tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.layout == torch.strided and not made._is_view():
            self.sizes.append(made.nbytes)
        return made
