"""On a GPU the engine writes what it writes on a CPU."""

import block_models
import pytest
import small_emu3
import torch

from emu3_vla.documents import Begin, Text
from emu3_vla.generation.engine import Engine, EngineConfig
from emu3_vla.generation.grammar import Grammar
from emu3_vla.generation.pieces import image, sequence
from emu3_vla.generation.requests import Parallel, Request
from emu3_vla.generation.sampling import Guidance

pytestmark = pytest.mark.gpu


def _written(model, requests, vocabulary=None, **options):
    engine = Engine(model, vocabulary, config=EngineConfig(rows=4, capacity=128, **options))
    return [result.items for result in engine.generate(requests)]


@pytest.mark.parametrize("compile", [False, True])
def test_ids_are_the_cpus(compile):
    """Greedy, guessed and verified, and guided; layer by layer, and as CUDA graphs."""
    model = small_emu3.decoder(num_hidden_layers=2)
    requests = [Request(prompt=[5 + number] * (2 + 3 * number), longest=12, parallel=Parallel(window=3)) for number in range(3)]
    requests.append(Request(prompt=[7, 8, 9], negative=[7], guidance=Guidance(scale=2.0), longest=8))
    expected = _written(model, requests)
    assert _written(model.cuda(), requests, compile=compile) == expected


def test_blocks_are_the_cpus():
    model, vocabulary = block_models.block_model()
    grid = vocabulary.images[0]
    grammar = Grammar(sequence(*[image(vocabulary, grid.rows, grid.columns, grid.name)] * 2))
    requests = [Request(prompt=[Begin(), Text([3, 4 + number])], grammar=grammar) for number in range(2)]
    with torch.inference_mode():
        expected = _written(model, requests, vocabulary)
        assert _written(model.cuda(), requests, vocabulary) == expected
