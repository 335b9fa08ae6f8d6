"""Whatever the logits, nothing malformed comes out: all their mass lies on what the grammar refuses."""

import json

import numpy as np
import pytest
import torch
from block_models import VOCABULARY as COMPACT
from block_models import block_model

from action_tokenizer import FastTokenizer
from action_tokenizer.grammar import ActionGrammar, single_transitions
from emu3_vla.documents import ActionChunk, Begin, End, Image, OpenAction, OpenImage, OpenVideo, Text, Video, parse, write
from emu3_vla.generation.choosing import Ask, Chooser
from emu3_vla.generation.engine import Engine, EngineConfig
from emu3_vla.generation.grammar import Block, Grammar, GrammarError
from emu3_vla.generation.pieces import (
    action_ids,
    actions,
    either,
    free,
    image,
    image_codes,
    literal,
    repeat,
    sentence,
    sequence,
    text,
    video,
    video_codes,
)
from emu3_vla.generation.requests import Request
from emu3_vla.generation.sampling import Sampling
from emu3_vla.vocabulary import Emu3Vocabulary

EMU3 = Emu3Vocabulary(action_size=40)


@pytest.fixture(scope="module")
def fast() -> FastTokenizer:
    random = np.random.default_rng(0)
    chunks = np.cumsum(random.normal(0, 0.1, (200, 4, 3)), axis=1)
    return FastTokenizer.fit(chunks, scale=10, vocab_size=200)


def _adversary(grammar: Grammar, size: int, seed: int, sampling: Sampling) -> list:
    """Items chosen by the engine's chooser from logits whose mass lies on refused ids, with noise among the others."""
    random, state, items = torch.Generator().manual_seed(seed), grammar.start, []
    while not grammar.is_final(state):
        choice = grammar.choice(state)
        if choice.place is not None:
            item = Block(choice.place, tuple(torch.randint(7, (4,), generator=random).tolist()))
        else:
            logits = 3 * torch.randn(size, generator=random)
            logits[~torch.from_numpy(grammar.mask(state, size))] += 1e6
            item = _chooser(logits).choose([Ask(choice, sampling, len(items), torch.ones(1))])[0]
        items.append(item)
        state = grammar.advance(state, item)
    return items


def _chooser(logits: torch.Tensor) -> Chooser:
    """A chooser whose head gives these logits for the state 1."""
    model = torch.nn.Module()
    model.lm_head = torch.nn.Linear(1, len(logits), bias=False)
    model.lm_head.weight = torch.nn.Parameter(logits[:, None])
    return Chooser(model)


SAMPLINGS = pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=5.0, seed=3)], ids=["greedy", "drawn"])


@SAMPLINGS
def test_image(sampling):
    items = _adversary(Grammar(image_codes(EMU3, 3, 5)), EMU3.size, 0, sampling)
    parsed = parse([*write([OpenImage("", 3, 5)], EMU3), *items], EMU3)
    assert [type(part) for part in parsed] == [Image] and parsed[0].codes.shape == (3, 5)
    assert parse(_adversary(Grammar(image(EMU3, 2, 12)), EMU3.size, 1, sampling), EMU3)[0].codes.shape == (2, 12)


@SAMPLINGS
def test_video(sampling):
    items = _adversary(Grammar(video_codes(EMU3, 2, 3, 2)), EMU3.size, 0, sampling)
    parsed = parse([*write([OpenVideo(3, np.ones((1, 3, 2), int))], EMU3), *items], EMU3)
    assert isinstance(parsed[0], Video) and parsed[0].codes.shape == (3, 3, 2)
    assert parse(_adversary(Grammar(video(EMU3, 2, 1, 3)), EMU3.size, 1, sampling), EMU3)[0].codes.shape == (2, 1, 3)


@SAMPLINGS
@pytest.mark.parametrize("block", [1, 2], ids=["codes", "blocks"])
def test_actions_of_either_vocabulary(fast, sampling, block):
    emu3 = Emu3Vocabulary(action_size=fast.vocab_size, block_size=block)
    grammar = Grammar(action_ids(emu3, fast.grammar(horizon=4, action_dim=3)))
    for seed in range(5):
        items = _adversary(grammar, emu3.head_size, seed, sampling)
        (chunk,) = parse([*write([OpenAction()], emu3), *items], emu3)
        assert isinstance(chunk, ActionChunk)
        assert fast.decode([chunk.ids], horizon=4, action_dim=3).shape == (1, 4, 3)


def test_action_grammar_permits_what_the_tokenizers_does(fast):
    """The same masks along valid chunks, also where ids count down."""
    own = fast.grammar(horizon=4, action_dim=3)
    emu3 = Emu3Vocabulary(action_size=fast.vocab_size)
    grammar = Grammar(action_ids(emu3, own))
    assert grammar.longest is not None
    for chunk in fast.encode(np.random.default_rng(1).normal(0, 0.2, (20, 4, 3))):
        state, theirs = grammar.start, own.start()
        for index in chunk:
            allowed = np.flatnonzero(grammar.mask(state, emu3.size))
            expected = np.flatnonzero(own.mask(theirs)[:-1])
            np.testing.assert_array_equal(np.sort(emu3.to_actions(allowed)), expected)
            state, theirs = grammar.advance(state, int(emu3.from_actions(np.array(index)))), own.advance(theirs, index)
        assert grammar.choice(state).only == emu3.end_of_chunk


@SAMPLINGS
def test_interleavings(fast, sampling):
    emu3 = Emu3Vocabulary(action_size=fast.vocab_size)
    step = sequence(text(emu3, longest=6), image(emu3, 2, 3))
    chunk = actions(emu3, fast.grammar(horizon=4, action_dim=3))
    grammar = Grammar(sequence(literal(emu3.bos), repeat(either(step, chunk), 1, 4), literal(emu3.eos)))
    seen = set()
    for seed in range(4):
        items = _adversary(grammar, emu3.size, seed, sampling)
        assert len(items) <= grammar.longest
        segments = parse(items, emu3)
        assert isinstance(segments[0], Begin) and isinstance(segments[-1], End)
        inner = segments[1:-1]
        assert all(not isinstance(part, Text) or isinstance(after, Image) for part, after in zip(inner, inner[1:], strict=False))
        seen |= {type(part) for part in inner}
    assert seen >= {Text, Image}


def test_compact_stream_with_blocks():
    own = ActionGrammar(single_transitions(20), horizon=2, action_dim=2)
    grammar = Grammar(sequence(text(COMPACT), image(COMPACT, 4, 4, "a"), actions(COMPACT, own), literal(COMPACT.eos)))
    assert grammar.longest is None, "text without a limit has none"
    items = _adversary(grammar, COMPACT.head_size, 0, Sampling(temperature=9.0))
    ids = [index for item in items for index in ([COMPACT.vision_start + c for c in item.codes] if isinstance(item, Block) else [item])]
    assert [type(part) for part in parse([COMPACT.bos, *ids], COMPACT)] == [Begin, Text, Image, ActionChunk, End]


def test_a_random_model_writes_whole_documents(fast):
    """Through the engine: text, then a picture, then actions, from a model that knows nothing of their forms."""
    model, vocabulary = block_model()
    own = ActionGrammar(single_transitions(20), horizon=2, action_dim=2)
    grammar = Grammar(
        sequence(text(vocabulary, longest=5), image(vocabulary, 4, 4, "a"), actions(vocabulary, own), literal(vocabulary.eos))
    )
    engine = Engine(model, vocabulary, EngineConfig(rows=4, capacity=64))
    requests = [Request(prompt=[Begin()], grammar=grammar, sampling=Sampling(temperature=2.0, seed=seed)) for seed in range(8)]
    for result in engine.generate(requests):
        assert result.finish == "end"
        assert [type(part) for part in result.segments([vocabulary.bos])] == [Begin, Text, Image, ActionChunk, End]


def test_text_within_limits():
    grammar = Grammar(sequence(text(EMU3, least=2, longest=3), literal(EMU3.eos)))
    state = grammar.advance(grammar.advance(grammar.start, 5), 6)
    assert not grammar.allows(grammar.start, EMU3.eos) and grammar.allows(state, EMU3.eos)
    assert grammar.choice(grammar.advance(state, 7)).only == EMU3.eos and grammar.longest == 4
    assert not grammar.allows(state, EMU3.vision_start) and not grammar.allows(state, EMU3.begin_image())


@pytest.mark.parametrize("vocabulary", [EMU3, COMPACT], ids=["emu3", "compact"])
def test_ids_that_may_not_come_do_not(vocabulary):
    """In a text, and in a sentence, whose end they are not either."""
    for piece in (text(vocabulary, without=[3, 5]), sentence(vocabulary, np.array([5, 6]), without=[3, 5])):
        grammar = Grammar(sequence(piece, literal(vocabulary.eos)))
        assert [grammar.allows(grammar.start, index) for index in (3, 4, 5, 6)] == [False, True, False, True]
    assert grammar.allows(grammar.advance(grammar.start, 6), vocabulary.eos)


def test_codes_that_are_given_are_written():
    given = np.array([[3, -1], [-1, 7]])
    grammar = Grammar(image_codes(EMU3, 2, 2, given=given))
    items = _adversary(grammar, EMU3.size, 0, Sampling(temperature=1.0))
    codes = parse([*write([OpenImage("", 2, 2)], EMU3), *items], EMU3)[0].codes
    assert codes[0, 0] == 3 and codes[1, 1] == 7


def test_a_rows_choice_is_a_slice_of_the_head():
    grammar = Grammar(image_codes(EMU3, 90, 68))
    choice = grammar.choice(grammar.start)
    assert (choice.start, choice.stop, choice.mask) == (EMU3.vision_start, EMU3.size, None)
    assert grammar.longest == 90 * 69 + 2 and len(grammar.choices) <= 5


def test_a_grammar_travels_as_numbers(fast):
    """Through JSON, with the same masks along every path of an adversary."""
    own = fast.grammar(horizon=4, action_dim=3)
    emu3 = Emu3Vocabulary(action_size=fast.vocab_size, block_size=2)
    grammar = Grammar(sequence(text(emu3, longest=2), image(emu3, 2, 4), actions(emu3, own)))
    again = Grammar.from_dict(json.loads(json.dumps(grammar.to_dict())))
    assert again.longest == grammar.longest
    items = _adversary(grammar, emu3.head_size, 0, Sampling(temperature=9.0))
    states = [grammar.start, again.start]
    for item in items:
        np.testing.assert_array_equal(*(one.mask(state, emu3.head_size) for one, state in zip((grammar, again), states, strict=True)))
        states = [one.advance(state, item) for one, state in zip((grammar, again), states, strict=True)]
    assert again.is_final(states[1])
    with pytest.raises(GrammarError, match="no grammar that to_dict wrote: KeyError"):
        Grammar.from_dict({"labels": []})


def test_refusals(fast):
    with pytest.raises(GrammarError, match="two pieces may begin with id 0"):
        Grammar(sequence(either(text(EMU3), text(EMU3, longest=3)), literal(EMU3.eos)))
    with pytest.raises(GrammarError, match="can go on where it can also end"):
        Grammar(text(EMU3))
    with pytest.raises(GrammarError, match="may not come next"):
        Grammar(literal(5)).advance(Grammar(literal(5)).start, 6)
    with pytest.raises(GrammarError, match=r"given codes have shape \(2, 3\), expected \(2, 2\)"):
        image_codes(EMU3, 2, 2, given=np.zeros((2, 3), int))
    with pytest.raises(GrammarError, match="where a position holds one code"):
        image_codes(COMPACT, 4, 4, "a", given=np.zeros((4, 4), int))
    with pytest.raises(GrammarError, match="40"):
        action_ids(EMU3, fast.grammar(horizon=4, action_dim=3))
    with pytest.raises(GrammarError, match="no videos"):
        video_codes(COMPACT, 1, 4, 4)
    with pytest.raises(ValueError, match="0×3"):
        image_codes(EMU3, 0, 3)
    with pytest.raises(ValueError, match="1000000"):
        image(EMU3, 10**6, 10)
    with pytest.raises(GrammarError, match="8000000000 codes, more than 1048576"):
        image_codes(EMU3, 80_000, 100_000)
    with pytest.raises(GrammarError, match="more than 1048576"):
        video_codes(EMU3, 10**5, 100, 100)
    with pytest.raises(GrammarError, match="allows nothing"):
        Grammar(literal())
    with pytest.raises(GrammarError, match="4 to 3 times"):
        repeat(literal(1), 4, 3)
    assert Grammar(free(10)).longest is None
