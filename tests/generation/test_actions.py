"""Constrained decoding: whatever the weights, what is written decodes to one chunk of the right shape."""

import numpy as np
import pytest
import torch

from action_tokenizer import FastTokenizer
from emu3_vla.checkpoint import load
from emu3_vla.generation.actions import WINDOW, ActionWriter, DecodingFailed
from emu3_vla.generation.cache import CachedTrunk


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint):
    return load(tiny_checkpoint, dtype=torch.float32)


def _writer(loaded, **options) -> ActionWriter:
    grammar = loaded.action_tokenizer.grammar(horizon=10, action_dim=7)
    return ActionWriter(loaded.model, loaded.vocabulary, grammar, **options)


def _state(loaded, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(loaded.model.config.hidden_size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
def test_every_chunk_decodes(loaded, temperature):
    writer, tokenizer = _writer(loaded, temperature=temperature), loaded.action_tokenizer
    assert isinstance(tokenizer, FastTokenizer)
    for seed in range(10):
        trunk = CachedTrunk(loaded.model).sequence(200)
        written = writer.write(trunk, _state(loaded, seed, scale=3), torch.Generator().manual_seed(seed))
        assert tokenizer.decode([written.ids], horizon=10, action_dim=7).shape == (1, 10, 7)
        assert trunk.length == len(written.ids) - 1
        assert len(written.entropy) == len(written.ids) and min(written.entropy) >= 0
        assert 0 <= written.probability <= 1


def test_the_same_seed_draws_the_same_ids(loaded):
    writer, trunk = _writer(loaded, temperature=2.0), CachedTrunk(loaded.model)
    drawn = [writer.write(trunk.sequence(200), _state(loaded, 0), torch.Generator().manual_seed(seed)).ids for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_greedy_takes_the_likeliest_permitted_id(loaded):
    grammar = loaded.action_tokenizer.grammar(horizon=10, action_dim=7)
    state, vocabulary = _state(loaded, 3), loaded.vocabulary
    logits = loaded.model.lm_head(state)[vocabulary.action_start : vocabulary.end_of_chunk + 1].detach().numpy()
    best = int(np.where(grammar.mask(grammar.start()), logits, -np.inf).argmax())
    assert _writer(loaded).write(CachedTrunk(loaded.model).sequence(200), state).ids[0] == best


def test_guesses_change_nothing_but_the_time(loaded):
    """Right ones, wrong ones, and ids that the grammar refuses: the chunk is as without."""
    writer, trunk = _writer(loaded), CachedTrunk(loaded.model)
    for seed in range(5):
        state = _state(loaded, seed, scale=3)
        alone, sequence = writer.write(trunk.sequence(300), state), trunk.sequence(300)
        tail = np.random.default_rng(seed).integers(0, loaded.vocabulary.action_size, 100).tolist()
        for guess in (alone.ids, alone.ids[:3] + tail, tail, alone.ids[1:], []):
            sequence.truncate(0)
            chunk = writer.begin(guess)
            states = torch.cat([state[None], sequence.extend(writer.ahead(chunk))]) if chunk.ahead else state[None]
            passes = _count_passes(trunk)
            (guessed,) = writer.write_each([sequence], [chunk], [states], [None])
            assert guessed.ids == alone.ids and sequence.length == len(alone.ids) - 1
            assert guessed.entropy == pytest.approx(alone.entropy, rel=1e-4)
            assert guessed.probability == pytest.approx(alone.probability, rel=1e-3)
            assert len(passes) <= len(alone.ids) - 1
            if guess is alone.ids:
                assert len(passes) == -(-len(alone.ids) // (WINDOW + 1)) - 1


@pytest.mark.parametrize("rounds", [1, 2])
def test_lossy_chunks_are_whole_and_take_fewer_passes(loaded, rounds):
    """Whatever was guessed. What the sequence holds is what was written, as far as it goes."""
    exact, writer, trunk = _writer(loaded), _writer(loaded, lossy=rounds), CachedTrunk(loaded.model)
    fewer = compared = 0
    for seed in range(5):
        state = _state(loaded, seed, scale=3)
        tail = np.random.default_rng(seed).integers(0, loaded.vocabulary.action_size, 100).tolist()
        alone, counts = exact.write(trunk.sequence(300), state), []
        for each in (exact, writer):
            sequence = trunk.sequence(300)
            chunk = each.begin(alone.ids[:2] + tail)
            states = torch.cat([state[None], sequence.extend(each.ahead(chunk))]) if chunk.ahead else state[None]
            passes = _count_passes(trunk)
            (written,) = each.write_each([sequence], [chunk], [states], [None])
            counts.append(len(passes))
            del trunk.extend_each
        assert loaded.action_tokenizer.decode([written.ids], horizon=10, action_dim=7).shape == (1, 10, 7)
        assert len(written.entropy) == len(written.ids) and 0 <= written.probability <= 1
        assert sequence.length < len(written.ids) and counts[1] <= counts[0]
        fewer += counts[1] < counts[0]
        if sequence.length:
            weight, again = loaded.model.model.embed_tokens.weight.detach(), trunk.sequence(300)
            again.extend(weight[loaded.vocabulary.action_start + torch.tensor(written.ids[: sequence.length])])
            torch.testing.assert_close(sequence.extend(weight[:1]), again.extend(weight[:1]))
            compared += 1
    assert fewer and compared


def test_lossy_writing_that_cannot_be_is_refused(loaded):
    for options in ({"lossy": 0}, {"lossy": 1, "temperature": 1.0}):
        with pytest.raises(ValueError, match="lossy is [01], expected at least 1 round, at temperature=0 and without int8_draft"):
            _writer(loaded, **options)


def _count_passes(trunk: CachedTrunk) -> list:
    passes, extend = [], CachedTrunk.extend_each
    trunk.extend_each = lambda parts: passes.append(parts) or extend(trunk, parts)
    return passes


def test_logits_that_are_no_numbers_make_no_action(loaded):
    with pytest.raises(DecodingFailed, match="NaN or infinity"):
        _writer(loaded).write(CachedTrunk(loaded.model).sequence(200), torch.full((loaded.model.config.hidden_size,), torch.nan))


def test_negative_temperature_is_refused(loaded):
    with pytest.raises(ValueError, match="temperature is -1"):
        _writer(loaded, temperature=-1)
