"""Emu3's text tokenizer: Qwen's byte-level BPE, exactly, from the files that lie in a checkpoint.

    tokenizer = Emu3TextTokenizer.from_pretrained(folder)      # or the path of a *.tiktoken file or a tokenizer.json
    ids = tokenizer.encode("open the drawer")                  # [2508, 279, 26482]

A *.tiktoken file lists the tokens and their ranks, one "<base64> <rank>" a line; BPE always joins the neighbours whose union has the
lowest rank. A tokenizer.json in Transformers' layout holds the same tokens; its splitting rule is not looked at, because the published
weights were trained with the rule below.

Text is normalised to NFC first, as in the original, so decoding gives NFC back. The original reads "<|image start|>" and the like in a
user's text as special ids, so a sentence can forge the structure of a document; here they are plain text unless `specials` is asked for.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import unicodedata
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from emu3_vla.text import BYTES, TextTokenizerError
from emu3_vla.vocabulary import CODEBOOK_SIZE, SPECIALS, VISION_START

TIKTOKEN_FILES = ("emu3.tiktoken", "qwen.tiktoken")
TOKENIZER_JSON = "tokenizer.json"

# What may be joined: contractions, words with one mark before them, single digits, runs of marks, line ends, spaces.
# Source: baaivision/Emu3 emu3/mllm/tokenization_emu3.py, PAT_STR.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_NAMES = {index: name for name, index in SPECIALS.items()}
_SPECIAL = re.compile(r"<\|visual token \d{6}\|>|" + "|".join(map(re.escape, SPECIALS)))


class Emu3TextTokenizer:
    """Text to ids in [0, vocab_size) and back; Emu3's own has 151,643. tokens: bytes of each id, all 256 single bytes among them."""

    def __init__(self, tokens: Sequence[bytes]):
        self._tokens = list(tokens)
        self._ranks = {token: rank for rank, token in enumerate(self._tokens)}
        self.vocab_size = len(self._tokens)
        if len(self._ranks) != len(self._tokens):
            raise TextTokenizerError(f"{len(self._tokens) - len(self._ranks)} tokens occur twice")
        missing = sum(bytes([byte]) not in self._ranks for byte in range(BYTES))
        if missing:
            raise TextTokenizerError(f"{missing} of the 256 single bytes are missing, so there are texts that it cannot write")

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Emu3TextTokenizer:
        """Read a *.tiktoken file or a tokenizer.json, or find either in a checkpoint folder (or in its text_tokenizer/).

        The BPE itself is built when first needed, which takes seconds. Raises FileNotFoundError, TextTokenizerError naming the file.
        """
        file = find_file(Path(path))
        try:
            return cls(_read_json(file) if file.suffix == ".json" else _read_tiktoken(file))
        except TextTokenizerError as error:
            raise TextTokenizerError(f"{file} is damaged or not Emu3's text tokenizer: {error}") from error

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `folder`/emu3.tiktoken (the folder is made if absent)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lines = (b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(self._tokens))
        (folder / TIKTOKEN_FILES[0]).write_bytes(b"".join(lines))

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        """Ids of a text; none for an empty one.

        specials: read the names of specials and "<|visual token 000123|>" as their ids, as the original always does.
        Raises TextTokenizerError for what is not text, half surrogate pairs included.
        """
        if not isinstance(text, str):
            raise TextTokenizerError(f"text is {type(text).__name__}, expected str")
        text = unicodedata.normalize("NFC", text)
        if not specials:
            return self._encode_plain(text)
        ids, done = [], 0
        for match in _SPECIAL.finditer(text):
            index = _special_id(match[0])
            if index is not None:
                ids += [*self._encode_plain(text[done : match.start()]), index]
                done = match.end()
        return ids + self._encode_plain(text[done:])

    def decode(self, ids: Sequence[int], *, skip_specials: bool = False) -> str:
        """The text of ids. Bytes that form no character become U+FFFD; specials their names, or nothing. Raises TextTokenizerError."""
        parts = []
        for index in ids:
            if 0 <= index < self.vocab_size:
                parts.append(self._tokens[index])
            elif (name := _special_name(index)) is None:
                raise TextTokenizerError(f"text id {index} is outside [0, {self.vocab_size}) and no special")
            elif not skip_specials:
                parts.append(name.encode())
        return b"".join(parts).decode("utf-8", errors="replace")

    def _encode_plain(self, text: str) -> list[int]:
        try:
            return self._bpe.encode(text).ids if text else []
        except (UnicodeEncodeError, TypeError) as error:  # what tokenizers raises depends on where the half pair stands
            raise TextTokenizerError(f"text holds half a surrogate pair, which is no character: {text[:60]!r}") from error

    @cached_property
    def _bpe(self) -> Tokenizer:
        """The `tokenizers` library's BPE, told every way in which a token can be joined from two others, lowest ranks first."""
        to_chars = str.maketrans({chr(byte): char for byte, char in _byte_chars().items()})
        chars = [token.decode("latin-1").translate(to_chars) for token in self._tokens]
        rank_of = {token: rank for rank, token in enumerate(chars)}
        merges = []
        for rank, token in enumerate(chars):
            for cut in range(1, len(token)):
                left, right = rank_of.get(token[:cut]), rank_of.get(token[cut:])
                if left is not None and right is not None:
                    merges.append((rank, left, right))
        merges.sort()
        # ignore_merges: a piece of text that is itself a token is taken whole, as tiktoken does, however it would be joined.
        bpe = Tokenizer(models.BPE(rank_of, [(chars[left], chars[right]) for _, left, right in merges], ignore_merges=True))
        split = pre_tokenizers.Split(Regex(_SPLIT), "isolated")
        bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        return bpe


def find_file(path: Path) -> Path:
    """The file that holds the tokenizer: `path` itself, or what its folder has. Raises FileNotFoundError, TextTokenizerError."""
    if path.is_file():
        return path
    for folder in (path, path / "text_tokenizer"):
        for name in (*TIKTOKEN_FILES, TOKENIZER_JSON):
            if (folder / name).is_file():
                return folder / name
        others = sorted(folder.glob("*.tiktoken"))
        if len(others) > 1:
            raise TextTokenizerError(f"{folder} holds {', '.join(file.name for file in others)}; name the one to read")
        if others:
            return others[0]
    raise FileNotFoundError(f"{path} holds no text tokenizer: expected {', '.join(TIKTOKEN_FILES)} or {TOKENIZER_JSON}")


def _read_tiktoken(path: Path) -> list[bytes]:
    """Tokens in the order of their ranks, which must count from 0 without a gap."""
    tokens = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            encoded, rank = line.split()
            tokens.append(base64.b64decode(encoded, validate=True))
            if int(rank) != len(tokens) - 1:
                raise TextTokenizerError(f"line {number} has rank {int(rank)}, expected {len(tokens) - 1}")
        except (binascii.Error, ValueError) as error:
            reason = error if isinstance(error, TextTokenizerError) else f"line {number} is {line[:40]!r}, expected '<base64> <rank>'"
            raise TextTokenizerError(str(reason)) from error
    return tokens


def _read_json(path: Path) -> list[bytes]:
    """Tokens of Transformers' layout: characters stand for bytes, and specials are listed among the added tokens too."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
        vocabulary = {token: rank for token, rank in content["model"]["vocab"].items() if token not in added}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TextTokenizerError(f"{type(error).__name__}: {error}") from error
    for name in added.keys() & SPECIALS.keys():
        if added[name] != SPECIALS[name]:
            raise TextTokenizerError(f"{name} has id {added[name]}, but Emu3's is {SPECIALS[name]}")
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise TextTokenizerError(f"the ids of its {len(vocabulary)} tokens do not count from 0 without a gap")
    byte_of = {char: byte for byte, char in _byte_chars().items()}
    unknown = next((char for token in vocabulary for char in token if char not in byte_of), None)
    if unknown is not None:
        raise TextTokenizerError(f"its tokens hold {unknown!r}, which stands for no byte; it is not byte-level")
    return [bytes(byte_of[char] for char in token) for token, _ in sorted(vocabulary.items(), key=lambda entry: entry[1])]


def _byte_chars() -> dict[int, str]:
    """The character by which byte-level BPE files write each byte: printable Latin-1 as itself, the others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(BYTES) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + number) for number, byte in enumerate(others)}


def _special_id(name: str) -> int | None:
    """Id of a special or a vision code by its name; None for a code that the codebook lacks."""
    if name in SPECIALS:
        return SPECIALS[name]
    code = int(name.removeprefix("<|visual token ").removesuffix("|>"))
    return VISION_START + code if code < CODEBOOK_SIZE else None


def _special_name(index: int) -> str | None:
    if index in _NAMES:
        return _NAMES[index]
    code = index - VISION_START
    return f"<|visual token {code:06d}|>" if 0 <= code < CODEBOOK_SIZE else None
