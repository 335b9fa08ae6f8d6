"""The engine gives what one-at-a-time decoding by Transformers gives, whoever else is being answered."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import small_emu3
import torch
from block_models import block_model
from transformers import GenerationConfig

from emu3_vla.documents import NOTHING, ActionChunk, Image, OpenImage, Text, collate, from_blocks, parse, write
from emu3_vla.generation import pieces
from emu3_vla.generation.cache import CachedTrunk
from emu3_vla.generation.drafts import repeat_last
from emu3_vla.generation.engine import Engine, EngineConfig, PromptTooLong
from emu3_vla.generation.grammar import Block, Grammar, Ids
from emu3_vla.generation.items import PromptError
from emu3_vla.generation.pieces import free, image, image_codes, literal
from emu3_vla.generation.requests import INT8, Parallel, Request, RequestError
from emu3_vla.generation.sampling import Guidance, Sampling
from emu3_vla.vocabulary import Emu3Vocabulary

SMALL = EngineConfig(rows=4, capacity=128)


@pytest.fixture(scope="module")
def model():
    return small_emu3.decoder()


@pytest.fixture
def engine(model):
    return Engine(model, config=SMALL)


def _prompts(count: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(3, 300, random.integers(1, longest)).tolist() for _ in range(count)]


@torch.inference_mode()
def _generate(model, prompt: list[int], longest: int) -> list[int]:
    settings = GenerationConfig(max_new_tokens=longest, do_sample=False, eos_token_id=2, pad_token_id=0)
    return model.generate(torch.tensor([prompt]), generation_config=settings)[0, len(prompt) :].tolist()


def test_greedy_is_what_transformers_generates_for_200_prompts(model, engine):
    prompts, grammar = _prompts(200), Grammar(free(300, 2))
    results = engine.generate([Request(prompt=prompt, grammar=grammar, longest=8 + number % 8) for number, prompt in enumerate(prompts)])
    for number, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        assert result.ids == _generate(model, prompt, 8 + number % 8)


def test_parallel_decoding_gives_the_same(model):
    """Greedy and drawn, with guidance and without, of whatever window."""
    prompts, negative = _prompts(6, seed=1), _prompts(1, seed=2)[0]
    for sampling in (Sampling(), Sampling(temperature=0.7, top_k=50, top_p=0.9, seed=3)):
        for guidance in (None, Guidance(scale=2.5)):
            options = dict(sampling=sampling, longest=20, guidance=guidance, negative=negative if guidance else None)
            engine = Engine(model, config=EngineConfig(rows=8, capacity=128))
            expected = engine.generate([Request(prompt=prompt, **options) for prompt in prompts])
            for window in (1, 5, 30):
                parallel = Parallel(window=window)
                results = engine.generate([Request(prompt=prompt, parallel=parallel, **options) for prompt in prompts])
                assert [result.items for result in results] == [result.items for result in expected]
                assert all(result.forwards <= alone.forwards for result, alone in zip(results, expected, strict=True))


def test_guesses_of_an_int8_draft_change_the_passes_alone(model):
    """Greedy and drawn, with guidance and without, past ids that the grammar forces, and whatever comes before."""
    pytest.importorskip("numba")
    prompts, negative = _prompts(6, seed=1), _prompts(1, seed=2)[0]

    def forced(builder, state):  # rows of ids, each with its end
        for _ in range(4):
            for _ in range(5):
                state = builder.after(state, Ids(10, 300))
            state = builder.after(state, Ids(7, 8))
        return state

    engine = Engine(model, config=EngineConfig(rows=8, capacity=128, int8_draft=True))
    for sampling in (Sampling(), Sampling(temperature=0.7, top_k=50, top_p=0.9, seed=3)):
        for guidance in (None, Guidance(scale=2.5)):
            options = dict(sampling=sampling, guidance=guidance, negative=negative if guidance else None, grammar=Grammar(forced))
            expected = engine.generate([Request(prompt=prompt, **options) for prompt in prompts])
            for window in (1, 6, 40):
                parallel = Parallel(window=window, draft=INT8)
                results = engine.generate([Request(prompt=prompt, parallel=parallel, **options) for prompt in prompts])
                assert [result.ids for result in results] == [result.ids for result in expected]
                if window == 6:
                    passes, alone = (sum(result.forwards for result in of) for of in (results, expected))
                    assert passes < alone / 2, "most guesses are right"


def test_an_int8_draft_without_numba_say_what_is_missing(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "emu3_vla.generation.int8_draft", raising=False)
    with pytest.raises(ValueError, match=r"int8 drafts need Numba: pip install 'emu3-vla\[int8\]'"):
        Engine(model, config=EngineConfig(capacity=64, int8_draft=True))


def test_an_int8_draft_is_nearly_the_trunk():
    pytest.importorskip("numba")
    from emu3_vla.generation.int8_draft import Int8Trunk

    for activation, key_heads in (("silu", 2), ("relu2", 4)):
        model = small_emu3.decoder(hidden_act=activation, num_key_value_heads=key_heads)
        cache = CachedTrunk(model).cache(rows=3, capacity=32)
        embeddings = torch.randn(24, model.config.hidden_size)
        first, _, last = cache.sequences
        first.extend(embeddings[:20]), last.extend(embeddings[:11])
        guessed = Int8Trunk(model).extend([first, last], [20, 11], embeddings[20:])
        assert (first.length, last.length) == (20, 11)
        for sequence, state in zip((first, last), guessed, strict=True):
            exact = sequence.extend(embeddings[20:])[-1]
            assert torch.linalg.vector_norm(state - exact) < 0.03 * torch.linalg.vector_norm(exact)
    with pytest.raises(ValueError, match="torch.bfloat16 on cpu; an int8 draft is for float32 on a CPU"):
        Int8Trunk(model.bfloat16())


def test_a_result_does_not_depend_on_its_batch(model):
    """Also where rows are few, prompts come in pieces, and prefixes are taken over from other rows."""
    prompts = _prompts(12, seed=4)
    prompts += [prompt[: len(prompt) // 2] + [7, 8, 9] for prompt in prompts]
    requests = [Request(prompt=prompt, longest=10, sampling=Sampling(temperature=1.0, seed=seed)) for seed, prompt in enumerate(prompts)]
    alone = [Engine(model, config=EngineConfig(rows=1, capacity=64)).generate([request])[0].items for request in requests]
    for config in (EngineConfig(rows=1, capacity=64), EngineConfig(rows=3, capacity=64, prefill=5), EngineConfig(rows=9, capacity=128)):
        assert [result.items for result in Engine(model, config=config).generate(requests)] == alone


def test_a_shared_past_is_not_computed_again(model):
    engine, prompt = Engine(model, config=SMALL), _prompts(1, seed=5)[0] * 2
    computed, extend = [], engine._forward
    engine._forward = lambda parts: computed.append(sum(len(part) for _, part in parts)) or extend(parts)
    engine.generate([Request(prompt=prompt, longest=1)])
    engine.generate([Request(prompt=[*prompt, 5, 6], longest=1)])
    first, second = engine.generate([Request(prompt=[*prompt, 5, 6, 7], longest=1), Request(prompt=[*prompt, 5, 6, 8], longest=1)])
    # Of the last two, one goes on where the row stands, the other copies it.
    assert computed == [len(prompt), 2, 2]
    alone = Engine(model, config=SMALL).generate([Request(prompt=[*prompt, 5, 6, last], longest=1) for last in (7, 8)])
    assert [first.items, second.items] == [result.items for result in alone]


def test_stream_gives_items_as_they_come(engine):
    requests = [Request(prompt=prompt, longest=6) for prompt in _prompts(3, seed=6)]
    expected = engine.generate(requests)
    events = list(engine.stream(requests))
    for number, result in enumerate(expected):
        own = [event for event in events if event.number == number]
        assert sum((event.items for event in own), []) == result.items
        assert [event.finish for event in own] == [None] * 5 + ["length"]


def test_a_stream_that_is_left_frees_its_rows(engine):
    requests = [Request(prompt=prompt, longest=50) for prompt in _prompts(6, seed=7)]
    next(engine.stream(requests)), next(iterator := engine.stream(requests))
    iterator.close()
    assert len(engine.generate(requests[:1])[0].items) == 50
    assert not any(lane.busy for lane in engine._lanes)


def test_stop_conditions(engine):
    prompt = _prompts(1, seed=8)[0]
    (whole,) = engine.generate([Request(prompt=prompt, longest=12)])
    stop = tuple(whole.ids[3:5])
    end = next(at for at in range(2, 13) if tuple(whole.ids[at - 2 : at]) == stop)
    (stopped,) = engine.generate([Request(prompt=prompt, longest=12, stop=((1, 1, 1), stop))])
    assert stopped.ids == whole.ids[:end] and stopped.finish == "stop"
    (ended,) = engine.generate([Request(prompt=prompt, grammar=Grammar(free(300, whole.ids[4])))])
    assert ended.finish == "end" and ended.ids == whole.ids[: whole.ids.index(whole.ids[4]) + 1]


def test_sampling_draws_from_the_models_distribution(model, engine):
    """Chi-square over the eight likeliest ids and the rest, 2,000 draws."""
    prompt = _prompts(1, seed=9)[0]
    with torch.inference_mode():
        probabilities = (model(torch.tensor([prompt])).logits[0, -1] / 1.5).softmax(-1)
    top = probabilities.topk(8).indices.tolist()
    drawn = [result.ids[0] for result in engine.generate([_draw(prompt, seed) for seed in range(2000)])]
    expected = np.append(probabilities[top].numpy(), 1 - probabilities[top].sum().item()) * 2000
    observed = np.array([drawn.count(index) for index in top] + [sum(index not in top for index in drawn)])
    assert ((observed - expected) ** 2 / expected).sum() < 26.1, "p < 0.001 at eight degrees of freedom"


def _draw(prompt: list[int], seed: int) -> Request:
    return Request(prompt=prompt, longest=1, sampling=Sampling(temperature=1.5, seed=seed))


def test_parallel_drawing_has_the_models_distribution():
    """Chi-square of pairs of ids over the exact joint distribution of a model of six ids, 2,000 draws with guesses verified together."""
    model = small_emu3.decoder(vocab_size=6)
    engine = Engine(model, config=EngineConfig(rows=16, capacity=16))
    with torch.inference_mode():
        first = model(torch.tensor([[3, 4]])).logits[0, -1].softmax(-1)
        second = torch.stack([model(torch.tensor([[3, 4, index]])).logits[0, -1].softmax(-1) for index in range(6)])
    expected = (first[:, None] * second).numpy() * 2000
    options = dict(prompt=[3, 4], longest=3, parallel=Parallel(window=2))
    results = engine.generate([Request(sampling=Sampling(temperature=1.0, seed=seed), **options) for seed in range(2000)])
    observed = np.zeros((6, 6))
    for result in results:
        observed[result.ids[0], result.ids[1]] += 1
    assert any(result.forwards < 3 for result in results), "some guesses were right"
    is_usual = expected >= 5
    assert ((observed - expected)[is_usual] ** 2 / expected[is_usual]).sum() < 66.6, "p < 0.001 at 35 degrees of freedom"


def test_top_k_and_top_p_limit_what_is_drawn(model, engine):
    prompt = _prompts(1, seed=10)[0]
    with torch.inference_mode():
        probabilities = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    ordered = probabilities.sort(descending=True)
    of_p = set(ordered.indices[: int((ordered.values.cumsum(0) < 0.3).sum()) + 1].tolist())
    for sampling, allowed in ((dict(top_k=3), set(ordered.indices[:3].tolist())), (dict(top_p=0.3), of_p)):
        requests = [Request(prompt=prompt, longest=1, sampling=Sampling(temperature=1.0, seed=seed, **sampling)) for seed in range(200)]
        assert {result.ids[0] for result in engine.generate(requests)} <= allowed


def test_guidance_moves_away_from_the_negative_prompt(model, engine):
    prompt, negative = _prompts(2, seed=11)
    with torch.inference_mode():
        for_it, against = (model(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in (prompt, negative))
    for scale in (0.0, 1.0, 3.0):
        request = Request(prompt=prompt, negative=negative, guidance=Guidance(scale=scale), longest=1)
        assert engine.generate([request])[0].ids == [int((against + scale * (for_it - against)).argmax())]


def test_lossy_decoding_is_faster_and_well_formed(model):
    """Guesses that were computed once count as right: a 4×6 picture in a few passes, whatever it looks like."""
    vocabulary = Emu3Vocabulary()
    engine = Engine(small_emu3.decoder(**small_emu3.PUBLISHED_IDS), vocabulary, EngineConfig(rows=1, capacity=64))
    for rounds in (1, 2):
        parallel, grammar = Parallel(window=12, lossy=rounds), Grammar(image_codes(vocabulary, 4, 6))
        sampling = Sampling(temperature=1.0)
        (result,) = engine.generate([Request(prompt=[OpenImage("", 4, 6)], grammar=grammar, sampling=sampling, parallel=parallel)])
        assert result.finish == "end" and result.forwards <= 1 + 4 * rounds
        assert parse([*write([OpenImage("", 4, 6)], vocabulary), *result.ids], vocabulary)[0].codes.shape == (4, 6)


# -- blocks


@pytest.mark.parametrize("parallel", [None, Parallel(window=3, draft=repeat_last)])
@pytest.mark.parametrize("shown", [0, 1, 2])
def test_blocks_are_written_as_the_depth_decoder_writes_them(shown, parallel):
    """The engine's cached trunk and depth decoder against the model itself, the whole document computed anew for every block, whose
    depth decoder sees the last of the pictures before."""
    model, vocabulary = block_model()
    engine, random = Engine(model, vocabulary, SMALL), np.random.default_rng(shown)
    before = [Text([1, 2, 3]), *(Image("a", random.integers(0, vocabulary.codebook_size, (4, 4))) for _ in range(shown))]
    grammar = Grammar(image_codes(vocabulary, 4, 4, "a"))
    (result,) = engine.generate([Request(prompt=[*before, OpenImage("a", 4, 4)], grammar=grammar, parallel=parallel)])
    codes = from_blocks(np.array([item.codes for item in result.items]), 4, 4)
    with torch.no_grad():
        document = [*before, Image("a", codes), ActionChunk([0])]
        batch = collate([document], vocabulary)
        states = model.states(batch)
        logits = model.depth(states[batch.block_at_N - 1], batch.codes_NC, batch.block_context())
        nothing = replace(batch.block_context(), before_NC=torch.full_like(batch.before_NC, NOTHING))
        forgetful = model.depth(states[batch.block_at_N - 1], batch.codes_NC, nothing)
    np.testing.assert_array_equal(logits.argmax(-1)[-4:].numpy(), batch.codes_NC[-4:].numpy())
    assert torch.equal(logits[-4:], forgetful[-4:]) == (shown == 0), "what was there before matters"
    assert len(result.ids) == 16 and len(result.items) == 4
    assert result.finish == "end"


@pytest.mark.parametrize("parallel", [None, Parallel(window=3, draft=repeat_last)])
@pytest.mark.parametrize("told", [[2, 7], [7, 2], []], ids=["numbers", "others", "before actions"])
def test_blocks_see_the_numbers_that_were_said_before(told, parallel):
    """Those that the request itself wrote, not those before the picture before, nor any from before actions."""
    model, vocabulary = block_model(foretold=[[0, 4, -1], [4, 10, 0]], foretold_size=16)
    torch.nn.init.normal_(model.depth.foretold.down.weight)
    shown = [Text([3, 1, 5]), Image("a", np.arange(16).reshape(4, 4) % 7), *([] if told else [ActionChunk([0])])]
    grammar = Grammar(pieces.sequence(literal(*told), image(vocabulary, 4, 4, "a")))
    (result,) = Engine(model, vocabulary, SMALL).generate([Request(prompt=shown, grammar=grammar, parallel=parallel)])
    codes = np.array([item.codes for item in result.items if isinstance(item, Block)])
    batch = collate([[*shown, *([Text(told)] if told else []), Image("a", from_blocks(codes, 4, 4))]], vocabulary)
    states = model.states(batch)[batch.block_at_N[4:] - 1]
    known = batch.block_context(slice(4, 8))
    untold = replace(known, said_NS=torch.full_like(known.said_NS, NOTHING))
    logits, others = (model.depth(states, batch.codes_NC[4:], each) for each in (known, untold))
    np.testing.assert_array_equal(logits.argmax(-1).numpy(), codes)
    assert torch.equal(logits, others) == (told != [2, 7])


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, seed=5)], ids=["greedy", "drawn"])
def test_blocks_in_parallel_and_with_guidance(sampling):
    model, vocabulary = block_model()
    engine = Engine(model, vocabulary, EngineConfig(rows=6, capacity=64))
    grammar = Grammar(image_codes(vocabulary, 4, 4, "a"))
    for guidance in (None, Guidance(scale=2.0)):
        negative = [OpenImage("a", 4, 4)] if guidance else None
        options = dict(grammar=grammar, sampling=sampling, guidance=guidance, negative=negative)
        prompts = [[Text([number, 2]), OpenImage("a", 4, 4)] for number in range(4)]
        one = engine.generate([Request(prompt=prompt, **options) for prompt in prompts])
        parallel = engine.generate([Request(prompt=prompt, parallel=Parallel(window=3), **options) for prompt in prompts])
        assert [result.items for result in one] == [result.items for result in parallel]


# -- refusals


def test_refusals(model, engine):
    with pytest.raises(RequestError, match="make the engine with int8_draft=True"):
        engine.submit(Request(prompt=[5], parallel=Parallel(draft=INT8)))
    with pytest.raises(RequestError, match="parallel.draft is 'round', expected a function, None, or 'int8'"):
        Parallel(draft="round")
    with pytest.raises(PromptTooLong, match="prompt has 129 positions, but the engine was made for 128"):
        engine.generate([Request(prompt=[5] * 129)])
    with pytest.raises(PromptTooLong, match="prompt of 120 positions and up to 10 .* do not fit the 128"):
        engine.generate([Request(prompt=[5] * 120, longest=10)])
    with pytest.raises(PromptError, match=r"ids lie in \[5, 300\], but the model has 300"):
        engine.generate([Request(prompt=[5, 300])])
    with pytest.raises(PromptError, match="prompt is empty"):
        engine.generate([Request(prompt=[])])
    with pytest.raises(RequestError, match="belong together"):
        Request(prompt=[1], guidance=Guidance(scale=2))
    with pytest.raises(RequestError, match="takes two rows"):
        request = Request(prompt=[1], guidance=Guidance(scale=2), negative=[2])
        Engine(model, config=EngineConfig(rows=1, capacity=8)).generate([request])
    with pytest.raises(RequestError, match="longest is 0"):
        Request(prompt=[1], longest=0)
    with pytest.raises(ValueError, match="made for contexts of 128"):
        Engine(model, config=EngineConfig(capacity=129))
    with pytest.raises(ValueError, match="rows is 0"):
        EngineConfig(rows=0)
    with pytest.raises(RequestError, match="no depth decoder"):
        engine.generate([Request(prompt=[1], grammar=Grammar(image_codes(block_model()[1], 4, 4, "a")))])
    assert not engine._waiting and not engine._running
