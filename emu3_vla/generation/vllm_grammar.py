"""Our grammars as a logits processor of vLLM: LLM(..., logits_processors=[GrammarProcessor]).

A request carries its grammar as numbers in SamplingParams.extra_args["emu3_vla_grammar"] (Grammar.to_dict), since vLLM samples in another
process. Runs where vLLM is installed, which need not be the environment that wrote the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from emu3_vla.generation.grammar import Grammar
from emu3_vla.generation.walk import GrammarWalk

ARGUMENT = "emu3_vla_grammar"


class GrammarProcessor(AdapterLogitsProcessor):
    """Refuses what each request's grammar refuses; requests without one are left alone."""

    @classmethod
    def validate_params(cls, params: SamplingParams) -> None:
        if ARGUMENT in (params.extra_args or {}):
            Grammar.from_dict(params.extra_args[ARGUMENT])

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Callable[[list[int], torch.Tensor], torch.Tensor] | None:
        values = (params.extra_args or {}).get(ARGUMENT)
        if values is None:
            return None
        walk = GrammarWalk(Grammar.from_dict(values))

        def process(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            walk.follow(output_ids)
            return walk.refuse(logits)

        return process
