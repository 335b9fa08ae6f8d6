"""The published folder layout of a FAST tokenizer, read and checked, and written.

    tokenizer.json            byte-level BPE, as the `tokenizers` library writes it
    processor_config.json     scale, min_token, vocab_size, time_horizon, action_dim
    tokenizer_config.json, special_tokens_map.json      what Transformers' AutoTokenizer wants beside them
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from action_tokenizer.errors import TokenizerFilesError

TOKENIZER_FILE = "tokenizer.json"
PROCESSOR_FILE = "processor_config.json"
_AUTO_MAP = {"AutoProcessor": "processing_action_tokenizer.UniversalActionProcessor"}
_PROCESSOR_CLASS = "UniversalActionProcessor"


@dataclass(frozen=True, kw_only=True)
class ProcessorConfig:
    """What processor_config.json says.

    scale: factor on the coefficients before rounding. min_token: the coefficient written as character 0. horizon, action_dim: shape
    of the chunks that it was fitted on, if it says so.
    """

    scale: float
    min_token: int
    horizon: int | None = None
    action_dim: int | None = None

    def __post_init__(self):
        if not (isinstance(self.scale, (int, float)) and 0 < self.scale < float("inf")):
            raise TokenizerFilesError(f"scale is {self.scale!r}, expected a positive number")
        if not isinstance(self.min_token, int):
            raise TokenizerFilesError(f"min_token is {self.min_token!r}, expected an integer")
        for name in ("horizon", "action_dim"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value > 0):
                raise TokenizerFilesError(f"{name} is {value!r}, expected a positive integer or nothing")


def read(folder: str | Path) -> tuple[Tokenizer, ProcessorConfig]:
    """The BPE and the processor's numbers in `folder`. Raises TokenizerFilesError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise TokenizerFilesError(f"{folder} is not a folder; expected one with {TOKENIZER_FILE} and {PROCESSOR_FILE}")
    values = read_json(folder / PROCESSOR_FILE)
    missing = {"scale", "min_token"} - values.keys()
    if missing:
        raise TokenizerFilesError(f"{folder / PROCESSOR_FILE} lacks {', '.join(sorted(missing))}; is this a FAST processor?")
    config = ProcessorConfig(
        scale=values["scale"],
        min_token=values["min_token"],
        horizon=values.get("time_horizon"),
        action_dim=values.get("action_dim"),
    )
    return _read_bpe(folder / TOKENIZER_FILE), config


def write(folder: str | Path, bpe: Tokenizer, config: ProcessorConfig) -> Path:
    """Write the layout into `folder` (made if needed), each file whole or not at all. Returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    processor = {
        "action_dim": config.action_dim,
        "auto_map": _AUTO_MAP,
        "min_token": config.min_token,
        "processor_class": _PROCESSOR_CLASS,
        "scale": config.scale,
        "time_horizon": config.horizon,
        "vocab_size": bpe.get_vocab_size(),
    }
    tokenizer = {
        "added_tokens_decoder": {},
        "auto_map": _AUTO_MAP,
        # Cleaning up "spaces" would rewrite coefficients whose characters look like English punctuation.
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1000000000000000019884624838656,
        "processor_class": _PROCESSOR_CLASS,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_text(folder / TOKENIZER_FILE, bpe.to_str(pretty=True))
    write_text(folder / "tokenizer_config.json", json.dumps(tokenizer, indent=2))
    write_text(folder / "special_tokens_map.json", "{}")
    write_text(folder / PROCESSOR_FILE, json.dumps(processor, indent=2))
    return folder


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def read_json(path: Path) -> dict:
    """A JSON object. Raises TokenizerFilesError where there is none, or it is cut off."""
    if not path.is_file():
        raise TokenizerFilesError(f"{path} is missing; the folder of a tokenizer or normaliser holds it")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TokenizerFilesError(f"{path} is not JSON ({error}); it is cut off or another file, copy it again") from error
    if not isinstance(values, dict):
        raise TokenizerFilesError(f"{path} holds a JSON {type(values).__name__}, expected an object")
    return values


def _read_bpe(path: Path) -> Tokenizer:
    values = read_json(path)
    problem = _foreign(values)
    if problem:
        raise TokenizerFilesError(f"{path}: {problem}; expected FAST's byte-level BPE")
    try:
        bpe = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises plain Exception
        raise TokenizerFilesError(f"{path} is not a tokenizer that `tokenizers` can read: {error}") from error
    bpe.no_truncation()
    bpe.no_padding()
    return bpe


def _foreign(values: dict) -> str | None:
    """What makes this tokenizer.json not a lossless byte-level BPE, if anything does."""
    model, splitter, decoder = (values.get(key) or {} for key in ("model", "pre_tokenizer", "decoder"))
    if model.get("type") != "BPE" or not model.get("vocab"):
        return f"its model is {model.get('type')!r}"
    if values.get("normalizer") is not None:
        return f"its normaliser {values['normalizer'].get('type')!r} would change coefficients"
    if splitter.get("type") != "ByteLevel" or decoder.get("type") != "ByteLevel":
        return f"its pre-tokenizer is {splitter.get('type')!r} and its decoder {decoder.get('type')!r}"
    if splitter.get("add_prefix_space"):
        return "its pre-tokenizer adds a space, which would be a coefficient"
    if model.get("dropout") or model.get("unk_token") or model.get("byte_fallback"):
        return "its BPE uses dropout, an unknown token or byte fallback"
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return "its BPE marks word parts"
    if sorted(model["vocab"].values()) != list(range(len(model["vocab"]))):
        return "its ids are not 0 .. n-1"
    if values.get("added_tokens"):
        return f"it has {len(values['added_tokens'])} added tokens, which are no coefficients"
    return None
