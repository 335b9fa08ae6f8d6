"""Compiled steps compute what the others compute."""

import pytest
import small_emu3

from emu3_vla.generation.engine import Engine, EngineConfig
from emu3_vla.generation.requests import Parallel, Request


@pytest.mark.slow
def test_compiled_steps_give_the_same_items():
    model = small_emu3.decoder(num_hidden_layers=1)
    requests = [Request(prompt=[5 + number] * (2 + 3 * number), longest=6, parallel=Parallel(window=1)) for number in range(3)]
    expected = Engine(model, config=EngineConfig(rows=2, capacity=32)).generate(requests)
    compiled = Engine(model, config=EngineConfig(rows=2, capacity=32, compile=True))
    assert [result.items for result in compiled.generate(requests)] == [result.items for result in expected]
