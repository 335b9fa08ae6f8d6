"""Weights in safetensors files: one file or shards with an index, read by their headers, and mapped rather than copied.

    files = WeightFiles.open(folder)        # reads headers; checks that no shard is missing or cut short
    files.tensors["lm_head.weight"].shape
    files.read(["lm_head.weight"])          # tensors that lie in the mapped file until they are written to

Nothing here unpickles: a folder that holds pickled weights alone is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from emu3_vla.checkpoint.errors import CheckpointError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
"""Types that Emu3's parts are published in. I64 is the step counter of the vision tokenizer's batch norms."""

SHARD_BYTES = 4 * 2**30
COPY_BYTES = 32 * 2**20  # of a tensor that is converted, at a time
HEADER_LIMIT = 100_000_000  # bytes; safetensors' own limit


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """What a header says of one tensor."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """The weights of one model folder. tensors: by the name that the files give them."""

    folder: Path
    files: tuple[Path, ...]
    tensors: dict[str, TensorEntry]

    @classmethod
    def open(cls, folder: Path) -> WeightFiles:
        """Read the headers of model.safetensors, or of the shards that model.safetensors.index.json lists.

        Raises FileNotFoundError for a missing file, CheckpointError for a damaged, cut or pickled one; each names the file.
        """
        if (folder / WEIGHTS).is_file():
            return cls(folder=folder, files=(folder / WEIGHTS,), tensors=read_header(folder / WEIGHTS))
        if not (folder / INDEX).is_file():
            raise _no_weights(folder)
        places = _read_index(folder / INDEX)
        files = tuple(folder / name for name in sorted(set(places.values())))
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder / missing[0]} is missing: {len(missing)} of the {len(files)} shards that {INDEX} lists are not there; "
                "download or copy them again"
            )
        tensors: dict[str, TensorEntry] = {}
        for path in files:
            tensors |= {name: entry for name, entry in read_header(path).items() if places.get(name) == path.name}
        absent = sorted(set(places) - set(tensors))
        if absent:
            raise CheckpointError(f"{folder / places[absent[0]]} does not hold {absent[0]}, which {folder / INDEX} looks for there")
        return cls(folder=folder, files=files, tensors=tensors)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.tensors.values())

    def where(self, name: str) -> Path:
        """The file to blame for this tensor: the one that holds it, or the one that should list it."""
        if name in self.tensors:
            return self.tensors[name].file
        return self.files[0] if len(self.files) == 1 else self.folder / INDEX

    def read(
        self, names: Iterable[str], *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors one after another. dtype: of floating-point tensors; default: as stored.

        On the CPU in the stored type a tensor is a private view of the mapped file: it costs memory when it is touched, and writing to it
        leaves the file alone. Otherwise each is copied, and its part of the file is given back before the next.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.tensors[name].file, []).append(name)
        for path, inside in by_file.items():
            yield from _read_file(path, inside, {name: self._target(name, dtype) for name in inside}, torch.device(device))

    def _target(self, name: str, dtype: torch.dtype | None) -> torch.dtype:
        entry = self.tensors[name]
        if entry.dtype not in DTYPES:
            raise CheckpointError(f"{entry.file}: {name} is of type {entry.dtype}, expected one of {', '.join(DTYPES)}")
        stored = DTYPES[entry.dtype]
        return dtype if dtype is not None and stored.is_floating_point else stored


def read_header(path: Path) -> dict[str, TensorEntry]:
    """What a safetensors file holds, from its header alone. Raises CheckpointError for one that is damaged or cut short."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_LIMIT):
            raise CheckpointError(
                f"{path} is damaged or cut short: {size} bytes do not hold the header that a safetensors file starts with"
            )
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            tensors = {name: _entry(path, values) for name, values in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged: its header is not that of a safetensors file ({error})") from error
    promised = 8 + length + sum(entry.nbytes for entry in tensors.values())
    if size != promised:
        raise CheckpointError(f"{path} is damaged or cut short: {size} bytes, its header promises {promised}; copy it again")
    return tensors


def write_weights(folder: Path, weights: dict[str, torch.Tensor], *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write model.safetensors, or shards of at most `shard_bytes` and their index; a tensor is never split."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    room = shard_bytes
    for name, tensor in weights.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    if len(shards) == 1:
        _write_file(folder / WEIGHTS, shards[0])
        return
    places = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_file(folder / file, shard)
        places |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in weights.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=1) + "\n")


def _read_file(path: Path, names: list[str], targets: dict[str, torch.dtype], device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        shared = safe_open(path, "pt")
        for name in names:
            tensor = shared.get_tensor(name)
            if tensor.dtype != targets[name] or device.type != "cpu":
                tensor = _copied(path, name, torch.empty(tensor.shape, dtype=targets[name], device=device))
            yield name, tensor
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or cut short: {error}") from error


def _copied(path: Path, name: str, target: torch.Tensor) -> torch.Tensor:
    """`target`, filled with the tensor `name` of the file.

    Some rows at a time, through a mapping of their own: what was read of it leaves memory with it, so the file and its copy are never both
    whole in memory, not even one tensor's.
    """
    if target.ndim == 0:
        with safe_open(path, "pt") as own:
            return target.copy_(own.get_tensor(name))
    rows = max(1, COPY_BYTES // max(1, target[:1].nbytes))
    for start in range(0, len(target), rows):
        with safe_open(path, "pt") as own:
            target[start : start + rows] = own.get_slice(name)[start : start + rows]
    return target


def _write_file(path: Path, weights: dict[str, torch.Tensor]) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, path, {"format": "pt"})
    path.chmod(0o644)  # safetensors leaves it readable by its owner alone


def _entry(path: Path, values: dict[str, Any]) -> TensorEntry:
    start, end = values["data_offsets"]
    if not 0 <= start <= end:
        raise ValueError(f"offsets {start} to {end}")
    return TensorEntry(file=path, dtype=values["dtype"], shape=tuple(values["shape"]), nbytes=end - start)


def _read_index(path: Path) -> dict[str, str]:
    try:
        places = json.loads(path.read_text())["weight_map"]
        if not places or any(Path(file).name != file or not file.endswith(".safetensors") for file in places.values()):
            raise ValueError("its weight_map names no safetensors files beside it")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        pickled = " Weights in .bin files are pickles, which are never read here." if ".bin" in path.read_text()[:10_000] else ""
        raise CheckpointError(f"{path} is damaged or not an index of safetensors shards: {error}.{pickled}") from error
    return places


def _no_weights(folder: Path) -> Exception:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        return CheckpointError(
            f"{folder / pickles[0]} is a pickle, which can run any code when it is read, so it is refused. Take the safetensors version of "
            f"this checkpoint, or convert it once where that is safe (load it in Transformers and save_pretrained writes {WEIGHTS})"
        )
    return FileNotFoundError(f"{folder} holds no weights: neither {WEIGHTS} nor {INDEX} is there")
