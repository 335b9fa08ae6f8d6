"""Completing a region keeps the rest, and writes from the edge inwards given all that is known."""

import numpy as np
import pytest
import small_emu3
import torch
from block_models import block_model

from emu3_vla.documents import Begin, DocumentError, Image, Text, collate
from emu3_vla.generation.completion import Completion
from emu3_vla.generation.engine import Engine, EngineConfig
from emu3_vla.generation.grammar import GrammarError
from emu3_vla.generation.requests import Request
from emu3_vla.vocabulary import Emu3Vocabulary


def test_emu3_codes():
    vocabulary = Emu3Vocabulary()
    engine = Engine(small_emu3.decoder(**small_emu3.PUBLISHED_IDS), vocabulary, EngineConfig(rows=1, capacity=64))
    codes, missing = np.arange(16).reshape(4, 4), np.zeros((4, 4), bool)
    missing[1:3, 1:3] = True
    job = Completion(vocabulary, Image("", codes), missing)
    (result,) = engine.generate([Request(prompt=job.prompt([Begin()]), grammar=job.grammar)])
    whole = job.codes(result.items)
    np.testing.assert_array_equal(whole[~missing], codes[~missing])
    (image,) = result.segments(job.prompt([Begin()]))[1:]  # in the order of the stream
    np.testing.assert_array_equal(image.codes.ravel()[-4:], whole.ravel()[[5, 6, 10, 9]])
    # One pass for what is known, one for each of the four codes but the last.
    assert result.forwards == 1 + 4 + 0 and result.finish == "end"


def test_blocks():
    """What is written is the likeliest given the known blocks: the document in that order, computed by the model itself, agrees."""
    model, vocabulary = block_model()
    engine = Engine(model, vocabulary, EngineConfig(rows=1, capacity=32))
    codes, missing = np.random.default_rng(0).integers(0, 7, (4, 4)), np.zeros((4, 4), bool)
    missing[0, 0] = missing[0, 2] = True
    job = Completion(vocabulary, Image("a", codes), missing)
    (result,) = engine.generate([Request(prompt=job.prompt([Text([1])]), grammar=job.grammar)])
    whole = job.codes(result.items)
    np.testing.assert_array_equal(whole[2:], codes[2:])
    batch = collate([[Text([1]), Image("a", whole, order=job.order)]], vocabulary)
    with torch.no_grad():
        logits = model.depth(model.states(batch)[batch.block_at_N - 1], batch.codes_NC, batch.block_context())
    np.testing.assert_array_equal(logits.argmax(-1)[2:].numpy(), batch.codes_NC[2:].numpy())


def test_refusals():
    vocabulary, image = Emu3Vocabulary(), Image("", np.zeros((4, 4), int))
    with pytest.raises(GrammarError, match=r"mask has shape \(3, 4\), but the image has \(4, 4\) codes"):
        Completion(vocabulary, image, np.ones((3, 4), bool))
    with pytest.raises(DocumentError, match="expected two axes of bool"):
        Completion(vocabulary, image, np.ones((4, 4), int))
    with pytest.raises(DocumentError, match="nothing is missing"):
        Completion(vocabulary, image, np.zeros((4, 4), bool))
    with pytest.raises(DocumentError, match="no order 'zigzag'"):
        Completion(vocabulary, image, np.ones((4, 4), bool), order="zigzag")
