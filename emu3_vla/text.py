"""Small byte-level BPE for instructions.

    tokenizer = TextTokenizer.fit(sentences, vocab_size=512)
    ids = tokenizer.encode("open the drawer")

All 256 bytes are in the vocabulary, so every text can be written and comes back exactly. A sentence is encoded as if a space stood
before it: then a word has the same ids at the start of a sentence and inside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

FILE = "tokenizer.json"
BYTES = 256


class TextTokenizerError(ValueError):
    """A tokenizer file that is damaged or foreign, or input that cannot be encoded or decoded."""


class TextTokenizer:
    """Text to ids in [0, vocab_size) and back. There are no special tokens; a vocabulary adds those."""

    def __init__(self, bpe: Tokenizer):
        self._bpe = bpe
        self.vocab_size = bpe.get_vocab_size()

    @classmethod
    def fit(cls, sentences: Iterable[str], *, vocab_size: int = 512, words: Sequence[str] = ()) -> TextTokenizer:
        """Fit on sentences; their order and repetitions do not matter. The vocabulary is smaller where they hold too little.

        words: have one id each beside the `vocab_size`, wherever they stand, such as "<x 17>".
        Raises TextTokenizerError for no sentences or a vocabulary below 256.
        """
        sentences = sorted(set(sentences))
        if not sentences or vocab_size < BYTES:
            raise TextTokenizerError(f"fit on {len(sentences)} sentences with vocab_size={vocab_size}; expected at least one and {BYTES}")
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )
        bpe.train_from_iterator((f" {sentence}" for sentence in sentences), trainer=trainer)
        bpe.add_tokens([AddedToken(word, lstrip=True, normalized=False) for word in words])
        return cls(bpe)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> TextTokenizer:
        """Read `folder`/tokenizer.json. Raises FileNotFoundError, TextTokenizerError."""
        path = Path(folder) / FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no text tokenizer: {FILE} is missing")
        try:
            bpe = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception for every fault of a file
            raise TextTokenizerError(f"{path} is damaged or not a tokenizer: {error}") from error
        missing = [char for char in pre_tokenizers.ByteLevel.alphabet() if bpe.token_to_id(char) is None]
        if missing:
            raise TextTokenizerError(f"{path} lacks {len(missing)} of the 256 bytes; it is no byte-level tokenizer of this program")
        return cls(bpe)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `folder`/tokenizer.json (the folder is made if absent)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._bpe.save(str(folder / FILE))

    def encode(self, text: str) -> list[int]:
        """Ids of a text; none for an empty one. Raises TextTokenizerError for what is not text."""
        if not isinstance(text, str):
            raise TextTokenizerError(f"text is {type(text).__name__}, expected str")
        return self._bpe.encode(f" {text}").ids if text else []

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids. Bytes that form no character become U+FFFD. Raises TextTokenizerError for ids out of range."""
        wrong = [index for index in ids if not 0 <= index < self.vocab_size]
        if wrong:
            raise TextTokenizerError(f"text id {wrong[0]} is outside [0, {self.vocab_size})")
        return self._bpe.decode([int(index) for index in ids], skip_special_tokens=False).removeprefix(" ")
