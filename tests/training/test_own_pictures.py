"""Pictures that the trunk reads as the model would write them, while it learns the true ones behind them."""

import block_models
import numpy as np
import pytest
import tiny_tokens
import torch

from emu3_vla.documents import Begin, End, Image, Text, collate
from emu3_vla.generation.engine import Engine, EngineConfig
from emu3_vla.generation.grammar import Grammar
from emu3_vla.generation.pieces import image
from emu3_vla.generation.requests import Request
from emu3_vla.training import own_pictures
from emu3_vla.training.mixture import MixtureConfig


def _documents():
    random = np.random.default_rng(0)
    pictures = [Image("a", random.integers(0, 7, (4, 4))) for _ in range(6)]
    given = Image("a", random.integers(0, 7, (4, 4)), supervised=False)
    return [[Begin(), Text([3]), given, *pictures[:3], End()], [Begin(), Text([4, 5]), *pictures[3:], End()]]


def test_after_as_many_rounds_as_blocks_a_picture_is_what_the_engine_writes():
    model, vocabulary = block_models.block_model()
    documents = [[Begin(), Text([3]), Image("a", np.zeros((4, 4), int))], [Begin(), Text([4, 5]), Image("a", np.ones((4, 4), int))]]
    batch = collate(documents, vocabulary)
    own = own_pictures.with_own(model, batch, 1.0, rounds=4, seeds=[(0,), (1,)])
    requests = [Request(prompt=document[:2], grammar=Grammar(image(vocabulary, 4, 4, "a"))) for document in documents]
    written = Engine(model, vocabulary, config=EngineConfig(rows=2, capacity=32)).generate(requests)
    expected = [block.codes for result in written for block in result.items[1:]]
    assert own.codes_NC.tolist() == [list(codes) for codes in expected]
    assert torch.equal(own.before_NC, batch.before_NC) and torch.equal(batch.codes_NC[:4], torch.zeros(4, 4, dtype=torch.long))


def test_whole_supervised_pictures_are_drawn_document_by_document():
    _, vocabulary = block_models.block_model()
    documents = _documents()
    batch = collate(documents, vocabulary)
    seeds = [(0, 7), (1, 7)]
    assert own_pictures.own_blocks(batch, 1.0, seeds).tolist() == list(range(4, 28)), "the given picture stays"
    chosen = set()
    for seed in range(20):
        blocks = own_pictures.own_blocks(batch, 0.5, [(0, seed), (1, seed)])
        assert torch.equal(blocks.view(-1, 4) % 4, torch.arange(4).expand(len(blocks) // 4, 4)), "pictures are whole"
        alone = own_pictures.own_blocks(collate(documents[1:], vocabulary), 0.5, [(1, seed)])
        assert torch.equal(blocks[blocks >= 16] - 16, alone), "a document's draw does not depend on its neighbours"
        chosen.add(len(blocks) // 4)
    assert len(chosen) > 2 and not len(own_pictures.own_blocks(batch, 0.0, seeds))


def test_training_reads_them_and_stays_reproducible(tiny_store, tmp_path):
    options = {"steps": 2, "context": 448, "batch_size": 2, "validation_fraction": 0.25, "mixture": MixtureConfig(film=1)}
    written = []
    for name, share in {"without": 0.0, "with": 0.5, "again": 0.5}.items():
        folder = tiny_tokens.train(tiny_store.path, tmp_path / name, own_pictures=share, **options)
        written.append((folder / "model" / "model.safetensors").read_bytes())
    without, own, again = written
    assert own == again != without


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"own_pictures is 1.5, expected within \[0, 1\]"):
        tiny_tokens.config(tmp_path, tmp_path, own_pictures=1.5)
