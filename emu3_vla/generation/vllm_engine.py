"""vLLM behind the engine's interface, for throughput: an exported checkpoint with our grammars as logits processors.

    emu3-vla export checkpoint=... layout=llama output_dir=exported
    engine = VllmEngine("exported", vocabulary, capacity=4096)

vLLM is not among the dependencies: it pins its own torch. Install it in an environment of its own (docs/generation.md), and put this
package's source on its PYTHONPATH; vLLM brings the libraries that emu3_vla.documents and emu3_vla.generation import.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emu3_vla.generation.grammar import Grammar
from emu3_vla.generation.items import items_of
from emu3_vla.generation.requests import END, LENGTH, Request, RequestError, Result
from emu3_vla.vocabulary import Vocabulary


class VllmEngine:
    """folder: an export with layout=llama. capacity: positions of prompt and answer. options: of vllm.LLM, e.g. dtype, seed."""

    name = "vllm"

    def __init__(self, folder: str | Path, vocabulary: Vocabulary | None = None, *, capacity: int = 2048, **options: Any):
        try:
            import vllm

            from emu3_vla.generation.vllm_grammar import GrammarProcessor
        except ImportError as error:
            raise RequestError("engine=vllm needs vLLM: pip install vllm, in an environment of its own, since it pins its torch") from error
        self._vllm, self._vocabulary, self._capacity = vllm, vocabulary, capacity
        self._llm = vllm.LLM(
            model=str(folder), skip_tokenizer_init=True, max_model_len=capacity, logits_processors=[GrammarProcessor], **options
        )
        self._ids = self._llm.llm_engine.model_config.get_vocab_size()

    @classmethod
    def of(cls, checkpoint, *, capacity: int = 2048, **options: Any) -> VllmEngine:
        """For a loaded checkpoint that is an export with layout=llama. Raises RequestError for another."""
        if checkpoint.layout != "llama":
            raise RequestError(
                f"engine=vllm serves exports, and {checkpoint.folder} is none (its layout is {checkpoint.layout!r}); run "
                f"emu3-vla export checkpoint={checkpoint.folder} layout=llama, and open that"
            )
        return cls(checkpoint.folder, checkpoint.vocabulary, capacity=capacity, **options)

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """See Engine.generate. Guidance and lossy decoding are refused; what is drawn comes from vLLM's random stream."""
        prompts = [{"prompt_token_ids": items_of(request.prompt, self._vocabulary, self._ids)} for request in requests]
        settings = [self._settings(request, len(prompt["prompt_token_ids"])) for request, prompt in zip(requests, prompts, strict=True)]
        outputs = self._llm.generate(prompts, settings, use_tqdm=False)
        return [self._result(request, output.outputs[0].token_ids) for request, output in zip(requests, outputs, strict=True)]

    def _settings(self, request: Request, prompt: int) -> Any:
        from emu3_vla.generation.vllm_grammar import ARGUMENT

        if request.guidance is not None or (request.parallel is not None and request.parallel.lossy is not None) or request.stop:
            raise RequestError("engine=vllm has no guidance, no lossy decoding and no stop sequences; use engine=ours for these")
        room = self._capacity - prompt
        longest = request.longest or (request.grammar.longest if request.grammar else None)
        if room < (longest or 1):
            raise RequestError(f"a prompt of {prompt} positions and up to {longest or 1} behind it do not fit {self._capacity}")
        sampling = request.sampling
        return self._vllm.SamplingParams(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=sampling.seed,
            max_tokens=longest or room,
            ignore_eos=True,
            detokenize=False,
            stop_token_ids=_ends(request.grammar),
            extra_args={ARGUMENT: request.grammar.to_dict()} if request.grammar else None,
        )

    def _result(self, request: Request, ids: Sequence[int]) -> Result:
        """vLLM stops at ids that may end the grammar; whether it did, the grammar says."""
        grammar, finish = request.grammar, LENGTH
        if grammar is not None:
            state = grammar.start
            for index in ids:
                state = grammar.advance(state, int(index))
            finish = END if grammar.is_final(state) else LENGTH
        return Result([int(index) for index in ids], finish, len(ids), self._vocabulary)


def _ends(grammar: Grammar | None) -> list[int]:
    """Ids that only ever end the grammar: vLLM can stop at them. A grammar without such an id ends by its length."""
    if grammar is None:
        return []
    ends = grammar.ending_ids()
    if not ends and grammar.longest is None:
        raise RequestError("engine=vllm cannot tell where this grammar ends; let an id that comes nowhere else, such as <eos>, end it")
    return ends
