"""The cached trunk computes what Emu3ForCausalLM computes."""

import pytest
import torch

from emu3_vla.generation.cache import CachedTrunk, CacheFull
from emu3_vla.model import BlockEmu3ForCausalLM, build_config
from emu3_vla.vocabulary import CompactVocabulary, ImageGrid

V = CompactVocabulary(text_size=10, action_size=20, codebook_size=7, images=(ImageGrid(name="a", rows=4, columns=4),), block_size=2)


def _model(**changes) -> BlockEmu3ForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4}
    sizes |= {"code_dim": 8, "depth_size": 16, "depth_heads": 2, "initializer_range": 0.2}
    return BlockEmu3ForCausalLM(build_config(V, **(sizes | changes))).eval()


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
