"""Engines by name: they take the same requests and give the same greedy ids.

    engine = open_engine("transformers", emu3_vla.load(folder), rows=2, capacity=512)
    (result,) = engine.generate([request])

    ours            emu3_vla.generation.engine: everything
    transformers    Transformers' own generate(), the reference: plain decoders, one request at a time
    vllm            an exported checkpoint (emu3-vla export layout=llama) in vLLM, for throughput on a GPU: plain decoders
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from emu3_vla.checkpoint import Checkpoint
from emu3_vla.generation.requests import Request, Result

ENGINES = ("ours", "transformers", "vllm")


class GeneratingEngine(Protocol):
    """What every engine can do. name: of ENGINES."""

    name: str

    def generate(self, requests: Sequence[Request]) -> list[Result]: ...


def open_engine(
    name: str, checkpoint: Checkpoint, *, rows: int = 4, capacity: int = 2048, compile: bool = False, int8_draft: bool = False
) -> GeneratingEngine:
    """An engine for a loaded checkpoint. rows, capacity, compile, int8_draft: see EngineConfig; vLLM plans its cache itself, from capacity.

    Raises ValueError for an unknown name or a model that the engine does not serve.
    """
    if name not in ENGINES:
        raise ValueError(f"engine={name!r}, expected one of {', '.join(ENGINES)}")
    if name == "ours":
        from emu3_vla.generation.engine import Engine, EngineConfig

        return Engine.of(checkpoint, EngineConfig(rows=rows, capacity=capacity, compile=compile, int8_draft=int8_draft))
    if name == "transformers":
        from emu3_vla.generation.transformers_engine import TransformersEngine

        return TransformersEngine(checkpoint.model, checkpoint.vocabulary, capacity=capacity)
    from emu3_vla.generation.vllm_engine import VllmEngine

    return VllmEngine.of(checkpoint, capacity=capacity)
