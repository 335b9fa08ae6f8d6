"""Transformers' generate() behind the engine's interface: the reference that ours is compared with. Slow, one request at a time.

Greedy ids are identical to ours. What is drawn has the same distribution, but comes from torch's own random stream.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import (
    Emu3ForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from emu3_vla.generation.grammar import Grammar
from emu3_vla.generation.items import items_of
from emu3_vla.generation.pieces import free
from emu3_vla.generation.requests import END, LENGTH, STOP, Request, RequestError, Result
from emu3_vla.generation.walk import GrammarWalk
from emu3_vla.model import BlockEmu3ForCausalLM
from emu3_vla.vocabulary import Vocabulary


class TransformersEngine:
    """model: Emu3ForCausalLM. capacity: positions of prompt and answer."""

    name = "transformers"

    def __init__(self, model: Emu3ForCausalLM, vocabulary: Vocabulary | None = None, *, capacity: int = 2048):
        if isinstance(model, BlockEmu3ForCausalLM):
            raise RequestError("engine=transformers knows no vision blocks; this checkpoint has some, decode it with engine=ours")
        self._model, self._vocabulary, self._capacity = model, vocabulary, capacity
        self._ids = model.config.vocab_size

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """See Engine.generate. `parallel` is not looked at: exact results are the same without, and lossy ones are refused."""
        return [self._one(request) for request in requests]

    @torch.inference_mode()
    def _one(self, request: Request) -> Result:
        if request.parallel is not None and request.parallel.lossy is not None:
            raise RequestError("engine=transformers decodes without loss only; leave lossy out")
        prompt = self._prompt(request.prompt)
        walk = GrammarWalk(request.grammar or Grammar(free(self._ids)))
        longest = walk.grammar.longest if request.longest is None else request.longest
        room = self._capacity - prompt.shape[1] + 1
        if room < (longest or 1):
            raise RequestError(f"a prompt of {prompt.shape[1]} positions and up to {longest or 1} behind it do not fit {self._capacity}")
        ends = _Ends(walk, prompt.shape[1], request.stop)
        torch.manual_seed(request.sampling.seed)
        settings = self._settings(request, longest or room)
        processors = LogitsProcessorList([*self._guidance(request), _Refusals(walk, prompt.shape[1])])
        output = self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=settings,
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([ends]),
        )
        written = output[0, prompt.shape[1] :].tolist()
        return Result(written, ends.finish or LENGTH, len(written), self._vocabulary)

    def _prompt(self, prompt) -> torch.Tensor:
        return torch.tensor([items_of(prompt, self._vocabulary, self._ids)], device=self._model.device)

    def _settings(self, request: Request, longest: int) -> GenerationConfig:
        sampling, draws = request.sampling, {}
        if sampling.temperature > 0:
            draws = {"temperature": sampling.temperature, "top_k": sampling.top_k or 0, "top_p": sampling.top_p}
        # The grammar ends the sequence, not an id by itself.
        return GenerationConfig(max_new_tokens=longest, do_sample=bool(draws), eos_token_id=None, pad_token_id=0, **draws)

    def _guidance(self, request: Request) -> list[LogitsProcessor]:
        if request.guidance is None:
            return []
        negative = self._prompt(request.negative)
        return [UnbatchedClassifierFreeGuidanceLogitsProcessor(request.guidance.scale, self._model, unconditional_ids=negative)]


class _Refusals(LogitsProcessor):
    """Refuses what the grammar does, behind a prompt of `begin` ids."""

    def __init__(self, walk: GrammarWalk, begin: int):
        self._walk, self._begin = walk, begin

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._walk.follow(input_ids[0, self._begin :].tolist())
        return self._walk.refuse(scores[0])[None]


class _Ends(StoppingCriteria):
    """The end of the grammar, or a stop sequence. finish: which."""

    def __init__(self, walk: GrammarWalk, begin: int, stop: tuple[tuple[int, ...], ...]):
        self._walk, self._begin, self._stop, self.finish = walk, begin, stop, None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **unused) -> torch.Tensor:
        written = input_ids[0, self._begin :].tolist()
        self._walk.follow(written)
        if any(tuple(written[-len(stop) :]) == stop for stop in self._stop):
            self.finish = STOP
        elif self._walk.is_final:
            self.finish = END
        return torch.tensor([self.finish is not None], device=input_ids.device)
