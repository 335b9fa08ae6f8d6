"""Engines by name give the same greedy ids."""

import importlib.util
import json
import os
import subprocess
from pathlib import Path

import pytest
import small_emu3
import torch
from block_models import block_model

import emu3_vla
from action_tokenizer.grammar import ActionGrammar, single_transitions
from emu3_vla.documents import OpenImage
from emu3_vla.export import export
from emu3_vla.generation.engine import Engine, EngineConfig
from emu3_vla.generation.engines import open_engine
from emu3_vla.generation.grammar import Grammar
from emu3_vla.generation.pieces import action_ids, free, image_codes, literal
from emu3_vla.generation.requests import Parallel, Request, RequestError
from emu3_vla.generation.sampling import Guidance, Sampling
from emu3_vla.generation.transformers_engine import TransformersEngine
from emu3_vla.generation.vllm_engine import VllmEngine
from emu3_vla.generation.walk import GrammarWalk
from emu3_vla.vocabulary import Emu3Vocabulary


@pytest.fixture(scope="module")
def engines():
    model = small_emu3.decoder(**small_emu3.PUBLISHED_IDS)
    vocabulary = Emu3Vocabulary(action_size=40)
    return Engine(model, vocabulary, EngineConfig(rows=2, capacity=96)), TransformersEngine(model, vocabulary, capacity=96)


def _requests() -> list[Request]:
    vocabulary = Emu3Vocabulary(action_size=40)
    chunk = Grammar(action_ids(vocabulary, ActionGrammar(single_transitions(40), horizon=3, action_dim=2)))
    opened = [OpenImage("", 2, 3)]
    return [
        Request(prompt=[vocabulary.bos, 7, 8, vocabulary.begin_action], grammar=chunk),
        Request(prompt=opened, grammar=Grammar(image_codes(vocabulary, 2, 3))),
        Request(prompt=[vocabulary.bos, 5], negative=[vocabulary.bos, 9], guidance=Guidance(scale=3.0), grammar=chunk),
        Request(prompt=[vocabulary.bos, 5, 6], grammar=Grammar(free(Emu3Vocabulary.size, 11)), longest=6),
    ]


def test_transformers_gives_the_same_greedy_ids(engines):
    ours, theirs = (engine.generate(_requests()) for engine in engines)
    assert [result.ids for result in ours] == [result.ids for result in theirs]
    assert [result.finish for result in ours] == [result.finish for result in theirs] == ["end", "end", "end", "length"]


def test_transformers_stops_where_ours_does(engines):
    whole = engines[0].generate(_requests()[3:])[0].ids
    request = Request(prompt=[Emu3Vocabulary.bos, 5, 6], longest=6, stop=(tuple(whole[1:3]),))
    ours, theirs = (engine.generate([request])[0] for engine in engines)
    assert ours.ids == theirs.ids and ours.finish == theirs.finish == "stop"


def test_transformers_draws_what_the_grammar_allows(engines):
    (result,) = engines[1].generate([Request(prompt=[1], grammar=Grammar(free(20, 19)), sampling=Sampling(temperature=2.0), longest=9)])
    assert max(result.ids) < 20


def test_refusals(tmp_path):
    small_emu3.write_baai(tmp_path / "baai", small_emu3.decoder())
    loaded = emu3_vla.load(tmp_path / "baai")
    assert open_engine("ours", loaded, rows=1, capacity=16).name == "ours"
    with pytest.raises(ValueError, match="engine='tensorrt', expected one of ours, transformers, vllm"):
        open_engine("tensorrt", loaded)
    with pytest.raises(RequestError, match="knows no vision blocks"):
        TransformersEngine(block_model()[0])
    with pytest.raises(RequestError, match="do not fit 16"):
        open_engine("transformers", loaded, capacity=16).generate([Request(prompt=[5] * 10, longest=10)])
    with pytest.raises(RequestError, match="without loss only"):
        open_engine("transformers", loaded).generate([Request(prompt=[5], longest=1, parallel=Parallel(lossy=1))])


# -- vLLM, in an environment of its own


VLLM = """
import json, sys
from emu3_vla.generation.grammar import Grammar
from emu3_vla.generation.requests import Request
from emu3_vla.generation.vllm_engine import VllmEngine

if __name__ == "__main__":
    folder, asked = sys.argv[1], json.load(sys.stdin)
    engine = VllmEngine(folder, capacity=96, dtype="float32", enforce_eager=True)
    requests = [Request(prompt=prompt, grammar=Grammar.from_dict(grammar)) for prompt, grammar in asked]
    print("IDS", json.dumps([[result.ids, result.finish] for result in engine.generate(requests)]))
"""


def test_vllm_writes_within_the_grammars(tmp_path):
    """An exported checkpoint in vLLM: an action chunk and an image, the same greedy ids as ours."""
    python = os.environ.get("EMU3_VLA_VLLM_PYTHON")
    if not python:
        pytest.skip("EMU3_VLA_VLLM_PYTHON names no Python of an environment with vLLM")
    # vLLM's kernels want heads of a usual width.
    model = small_emu3.decoder(**small_emu3.PUBLISHED_IDS | {"hidden_size": 128, "num_attention_heads": 2})
    small_emu3.write_baai(tmp_path / "baai", model)
    export(emu3_vla.load(tmp_path / "baai"), tmp_path / "exported", layout="llama")
    vocabulary = Emu3Vocabulary(action_size=40)
    ours = Engine(model, vocabulary, EngineConfig(rows=2, capacity=96))
    requests = _requests()[:2]
    prompts = [requests[0].prompt, [index for index in ours._items(requests[1].prompt)]]
    asked = [[prompt, request.grammar.to_dict()] for prompt, request in zip(prompts, requests, strict=True)]
    (tmp_path / "ask.py").write_text(VLLM)
    result = subprocess.run(
        [python, str(tmp_path / "ask.py"), str(tmp_path / "exported")],
        input=json.dumps(asked),
        # GiB of the cache: by itself vLLM takes most of what there is.
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    answers = json.loads(next(line for line in result.stdout.splitlines() if line.startswith("IDS "))[4:])
    assert answers == [[answer.ids, "end"] for answer in ours.generate(requests)]


def test_a_grammar_can_be_followed_from_outside():
    """As vLLM's processor does: masks behind what was written, from the start again after a preemption, nothing behind the end."""
    walk = GrammarWalk(Grammar(literal(3, 4)))
    for written, allowed in (([], [3]), ([3], [4]), ([3, 4], [0, 1, 2, 3, 4]), ([3, 4, 9], [0, 1, 2, 3, 4]), ([], [3])):
        walk.follow(written)
        assert torch.isfinite(walk.refuse(torch.zeros(5))).nonzero().flatten().tolist() == allowed
    assert Grammar(literal(3, 4)).ending_ids() == [4] and Grammar(literal(4, 4)).ending_ids() == []


def test_vllm_that_is_not_there_says_so(tmp_path):
    if importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed here")
    with pytest.raises(RequestError, match="engine=vllm needs vLLM: pip install vllm"):
        VllmEngine(tmp_path)
    small_emu3.write_baai(tmp_path / "baai", small_emu3.decoder())
    with pytest.raises(RequestError, match="serves exports, and .* is none .*layout=llama"):
        open_engine("vllm", emu3_vla.load(tmp_path / "baai"))
