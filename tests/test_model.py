"""The blocked decoder: causal, exact by the chain rule, and Emu3ForCausalLM underneath."""

from dataclasses import replace

import pytest
import torch
from block_models import block_context, block_model
from transformers import Emu3ForCausalLM

from emu3_vla.documents import NOTHING, SAID, ActionChunk, BlockContext, Image, Text, collate
from emu3_vla.model import BlockEmu3ForCausalLM, block_losses, build_config, token_losses
from emu3_vla.vocabulary import CompactVocabulary, ImageGrid

V = CompactVocabulary(text_size=10, action_size=20, codebook_size=7, images=(ImageGrid(name="a", rows=4, columns=4),), block_size=2)
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def model() -> BlockEmu3ForCausalLM:
    torch.manual_seed(0)
    config = build_config(V, **SIZES, code_dim=8, depth_size=16, depth_layers=2, depth_heads=2, initializer_range=0.3)
    return BlockEmu3ForCausalLM(config).eval()


def _document(first_id=1, code=0, last_id=3):
    codes = torch.arange(16).reshape(4, 4).numpy() % 7
    codes[3, 3] = code
    return [Text([first_id, 2]), Image("a", codes), ActionChunk([5, last_id])]


def test_is_an_emu3_with_its_own_forward(model):
    assert isinstance(model, Emu3ForCausalLM)
    batch = collate([[Text([1, 2, 3])]], V)
    logits = model(input_ids=batch.ids_BL).logits
    torch.testing.assert_close(logits.flatten(0, 1), model.lm_head(model.states(batch)))


def test_later_input_does_not_reach_back(model):
    before, after = (model.states(collate([_document(code=code)], V)) for code in (0, 6))
    last_block = 1 + 2 + 1 + 3  # bos, two text ids, begin of image, three blocks
    torch.testing.assert_close(before[:last_block], after[:last_block])
    assert not torch.allclose(before[last_block:], after[last_block:])


def test_padding_and_neighbours_change_nothing(model):
    alone = model.states(collate([_document()], V))
    batch = collate([_document(), [*_document(first_id=4), Text([1] * 9)]], V)
    together = model.states(batch)[: batch.ids_BL.shape[1]]
    length = 1 + 2 + 5 + 4
    torch.testing.assert_close(together[:length], alone[:length], atol=1e-5, rtol=1e-5)


def test_each_code_is_predicted_from_those_before_it_alone(model):
    states, codes, known = torch.randn(3, 32), torch.randint(0, 7, (3, 4)), block_context(torch.randint(NOTHING, 7, (3, 4)))
    logits = model.depth(states, codes, known)
    for slot in range(4):
        changed = codes.clone()
        changed[:, slot] = (changed[:, slot] + 1) % 7
        again = model.depth(states, changed, known)
        torch.testing.assert_close(again[:, : slot + 1], logits[:, : slot + 1])
        if slot < 3:
            assert not torch.allclose(again[:, slot + 1 :], logits[:, slot + 1 :])


def test_probabilities_of_all_blocks_add_up_to_one(model):
    """The chain rule is exact: summed over every possible block, exp(-loss) is 1."""
    every = torch.cartesian_prod(*[torch.arange(7)] * 4)
    known = block_context(torch.tensor([[2, NOTHING, 0, 6]]).expand(len(every), -1))
    log_p = model.depth(torch.randn(1, 32).expand(len(every), -1), every, known).log_softmax(-1)
    total = log_p.gather(-1, every[..., None]).squeeze(-1).sum(1).exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-4)


def test_written_blocks_are_the_likeliest_codes(model):
    states, known = torch.randn(5, 32), block_context(torch.randint(NOTHING, 7, (5, 4)))
    codes = model.depth.write(states, known, lambda logits: logits.argmax(-1))
    torch.testing.assert_close(model.depth(states, codes, known).argmax(-1), codes)


def test_losses_look_at_supervised_positions(model):
    batch = collate([[*_document()[:2], ActionChunk([5, 3], supervised=False)]], V)
    states = model.states(batch)
    losses, targets, right = token_losses(model, states, batch.targets_BL.flatten())
    assert targets.tolist() == [1, 2, V.begin_image("a"), V.begin_action]
    logits = model.lm_head(states[torch.tensor([0, 1, 2, 7])])
    torch.testing.assert_close(losses, -logits.log_softmax(-1)[range(4), targets])
    assert right.tolist() == (logits.argmax(-1) == targets).tolist()


FORETOLD = [[0, 4, -1], [4, 10, 0]]


def test_numbers_said_before_a_block_are_read_by_its_place():
    model = block_model(foretold=FORETOLD, foretold_size=16)[0]
    model.depth.foretold.begin([torch.linspace(0, 1, 4), torch.linspace(-1, 1, 6)])
    said = torch.full((4, SAID), NOTHING)
    said[:, -2:] = torch.tensor([[1, 8], [1, 9], [8, 1], [NOTHING, 1]])  # the last two are no numbers of these
    known = BlockContext(before_NC=torch.zeros(4, 4, dtype=torch.long), places_N=torch.zeros(4, dtype=torch.long), said_NS=said)
    assert not model.depth.foretold(known).any(), "they count for nothing at first"
    torch.nn.init.normal_(model.depth.foretold.down.weight)
    read, elsewhere = (model.depth.foretold(replace(known, places_N=torch.full((4,), place))) for place in (0, 1))
    assert read.shape == (4, 4, 16)
    assert read[0].all() and not torch.allclose(read[0], read[1]) and not torch.allclose(read[0], elsewhere[0])
    assert not read[2:].any()
    states, codes = torch.randn(1, 32).expand(4, -1), torch.zeros(4, 4, dtype=torch.long)
    logits = model.depth(states, codes, known)
    assert not torch.allclose(logits[0], logits[1]) and torch.equal(logits[2], logits[3])


def test_a_number_from_another_is_read_in_the_world_too():
    """Its waves are those of the sum of both."""
    reads = block_model(foretold=FORETOLD, foretold_size=16)[0].depth.foretold
    first, second = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([-0.3, -0.2, -0.1, 0.0, 0.1, 0.2])
    reads.begin([first, second])
    rows = torch.tensor([[1, 4 + 5], [3, 4 + 3]])  # 0.2 + 0.2 and 0.4 + 0.0
    waves = reads._waves(rows).view(2, 3, -1)
    torch.testing.assert_close(waves[0, 2], waves[1, 2])
    torch.testing.assert_close(waves[:, 2], waves[1, :1].expand(2, -1))


def test_too_many_numbers_cannot_be_foretold():
    with pytest.raises(ValueError, match="33 numbers are foretold, expected at most 32"):
        block_model(foretold=[[0, 2, -1]] * 33)


def test_block_loss_reads_the_state_before_the_block(model):
    batch = collate([_document()], V)
    states = model.states(batch)
    first = model.depth(states[3:4], batch.codes_NC[:1], batch.block_context(slice(1))).log_softmax(-1)  # position 3 holds "begin of image"
    losses = block_losses(model, states, batch, torch.tensor([0]))
    torch.testing.assert_close(losses[0], -first[0, range(4), batch.codes_NC[0]])


def test_saves_and_loads_by_transformers(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = BlockEmu3ForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    batch = collate([_document()], V)
    torch.testing.assert_close(again.states(batch), model.states(batch))
