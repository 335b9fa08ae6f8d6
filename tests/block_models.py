"""Small random models with vision blocks."""

import torch

from emu3_vla.documents import NOTHING, SAID, BlockContext
from emu3_vla.model import BlockEmu3ForCausalLM, build_config
from emu3_vla.vocabulary import CompactVocabulary, ImageGrid

VOCABULARY = CompactVocabulary(
    text_size=10, action_size=20, codebook_size=7, images=(ImageGrid(name="a", rows=4, columns=4),), block_size=2
)


def block_model(**changes) -> tuple[BlockEmu3ForCausalLM, CompactVocabulary]:
    """Weights with more spread than at the start of training, so that logits differ."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4}
    sizes |= {"code_dim": 8, "depth_size": 16, "depth_heads": 2, "initializer_range": 0.2}
    return BlockEmu3ForCausalLM(build_config(VOCABULARY, **(sizes | changes))).eval(), VOCABULARY


def block_context(before_NC: torch.Tensor) -> BlockContext:
    """Of blocks at which these codes stood before, at the first place, and of which nothing was said."""
    places, said = torch.zeros(len(before_NC), dtype=torch.long), torch.full((len(before_NC), SAID), NOTHING)
    return BlockContext(before_NC=before_NC, places_N=places, said_NS=said)
