"""From weight files to modules without a second copy: built on the meta device, then given the tensors as they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import Emu3ForCausalLM, Emu3TextConfig, Emu3TextModel, PreTrainedModel

from emu3_vla.checkpoint.errors import CheckpointError
from emu3_vla.checkpoint.layouts import CONFIG
from emu3_vla.checkpoint.weights import WeightFiles

HEAD = "lm_head.weight"
TRUNK = "model."


def build_decoder(
    kind: type[PreTrainedModel],
    config: Emu3TextConfig,
    files: WeightFiles,
    names: Mapping[str, str],
    *,
    device: str | torch.device,
    dtype: torch.dtype | None,
) -> PreTrainedModel:
    """A decoder of class `kind` with the weights of `files`, in evaluation mode.

    names: parameter name → name in the files. dtype: of the parameters; default: as stored. Buffers keep float32, because rotary
    frequencies rounded to bfloat16 misplace far positions. Raises CheckpointError for a weight that is missing, too many or of
    another shape.
    """
    with torch.device("meta"):
        try:
            model = kind(config)
        except (ValueError, AssertionError, KeyError, TypeError, ZeroDivisionError) as error:
            raise CheckpointError(f"{files.folder / CONFIG} describes no decoder that can be built: {error}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = bool(config.tie_word_embeddings) and HEAD in expected
    if tied:  # the head is the embedding: it is not read, whether or not the files repeat it
        expected.pop(HEAD)
        names = {name: source for name, source in names.items() if name != HEAD}
    check_weights(files, names, expected)
    fill(model, files, names, device=device, dtype=dtype)
    trunk = model if isinstance(model, Emu3TextModel) else model.model
    # Not a weight: it was computed on the meta device, so it is computed again where it will be used.
    trunk.rotary_emb = type(trunk.rotary_emb)(config=config).to(device)
    if tied:
        model.lm_head.weight = trunk.embed_tokens.weight
    return model.eval()


def fill(
    module: nn.Module,
    files: WeightFiles,
    names: Mapping[str, str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> None:
    """Give a module on the meta device its weights. names: name in the module → name in the files."""
    sources = {source: name for name, source in names.items()}
    state = {sources[source]: tensor for source, tensor in files.read(sources, device=device, dtype=dtype)}
    module.load_state_dict(state, strict=False, assign=True)


def check_weights(files: WeightFiles, names: Mapping[str, str], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Names and shapes against those of the module. Raises CheckpointError naming the file and the first that is wrong."""
    found = {name: files.tensors[source].shape for name, source in names.items()}
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            raise CheckpointError(
                f"{files.where(names.get(name, name))} does not fit its configuration: {names.get(name, name)} is "
                f"{found.get(name, 'absent')}, expected {expected.get(name, 'absent')}"
            )


def read_weights(path: Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """All weights of a folder, mapped, under the names that they have there, checked against `expected`."""
    files = WeightFiles.open(path)
    check_weights(files, {name: name for name in files.tensors}, expected)
    return dict(files.read(files.tensors))


def decoder_kind(names: Mapping[str, str], config: Emu3TextConfig) -> tuple[type[PreTrainedModel], dict[str, str]]:
    """Emu3ForCausalLM, or Emu3TextModel for weights that have no output head and do not share the embedding; and `names` in its terms."""
    if HEAD in names or config.tie_word_embeddings:
        return Emu3ForCausalLM, dict(names)
    return Emu3TextModel, {name.removeprefix(TRUNK): source for name, source in names.items()}
