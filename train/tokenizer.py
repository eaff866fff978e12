"""Text to token ids and back: raw bytes by default, or any tokenizer of the `tokenizers` library."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import tokenizers
from jaxtyping import Int32, Integer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

END_OF_TEXT = "<|endoftext|>"

# How the published tokenizers call the token that ends a document, the most specific first.
_END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "<eos>", "</s>")

Ids = Sequence[int | np.integer] | Integer[np.ndarray, " S"]


@runtime_checkable
class Tokenizer(Protocol):
    """What training, evaluation and generation ask of a tokenizer.

    Attributes:
        vocab_size: Number of rows an embedding needs: one more than the largest id.
        end_of_text: Id of the token that separates documents. No text encodes to it.
    """

    vocab_size: int
    end_of_text: int

    def encode(self, text: str) -> Int32[np.ndarray, " S"]:
        """Token ids of `text`, without any special token."""
        ...

    def decode(self, ids: Ids) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, and end-of-text tokens vanish."""
        ...


class ByteTokenizer:
    """The 256 byte values as they are, and one id for the end of a text.

    Example:
        >>> tokenizer = ByteTokenizer()
        >>> tokenizer.encode("é!")
        array([195, 169,  33], dtype=int32)
        >>> tokenizer.decode([195, 169, 33, tokenizer.end_of_text])
        'é!'
    """

    vocab_size = 257
    end_of_text = 256

    def encode(self, text: str) -> Int32[np.ndarray, " S"]:
        """UTF-8 bytes of `text` as ids 0..255."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Ids) -> str:
        """Text of the bytes `ids`; what is not UTF-8 becomes U+FFFD, and end-of-text tokens vanish."""
        return bytes(_without(self.end_of_text, ids)).decode(errors="replace")


class _FileTokenizer:
    """A tokenizer of the `tokenizers` library behind the `Tokenizer` protocol."""

    def __init__(self, inner: tokenizers.Tokenizer, path: str):
        ids = [inner.token_to_id(name) for name in _END_OF_TEXT_NAMES]
        known = [i for i in ids if i is not None]
        if not known:
            raise ValueError(
                f"tokenizer {path} must have a token that ends a text, named one of {_END_OF_TEXT_NAMES}; "
                "it has none: add one, or train a tokenizer with `jmoe-train tokenizer`"
            )
        # Text that spells a special token is text: only the data pipeline may end a document.
        inner.encode_special_tokens = True
        self._inner = inner
        self.end_of_text = known[0]
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> Int32[np.ndarray, " S"]:
        return np.asarray(self._inner.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Ids) -> str:
        return self._inner.decode(_without(self.end_of_text, ids), skip_special_tokens=False)


def _without(end_of_text: int, ids: Ids) -> list[int]:
    return [i for i in np.asarray(ids).tolist() if i != end_of_text]


def load_tokenizer(path: str | None = None) -> Tokenizer:
    """Tokenizer stored at `path`, or the byte tokenizer when there is no path.

    Args:
        path: A JSON file of the `tokenizers` library (Hugging Face's `tokenizer.json`), or None for bytes.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not a tokenizer, or has no end-of-text token.
    """
    if path is None:
        return ByteTokenizer()
    text = Path(path).read_bytes().decode(errors="replace")
    try:
        inner = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # The library raises bare Exception for every malformed file.
        raise ValueError(f"tokenizer {path} must be a JSON file of the tokenizers library: {error}") from error
    return _FileTokenizer(inner, path)


def train_tokenizer(documents: Iterable[bytes], vocab_size: int, path: str) -> Tokenizer:
    """Trains a byte-level BPE tokenizer on `documents`, saves it at `path` and returns it.

    Byte-level: every text encodes without an unknown token and decodes to itself (Radford et al. 2019,
    section 2.2).

    Args:
        documents: UTF-8 texts, such as `Corpus.train`.
        vocab_size: Largest number of tokens, the 256 bytes and the end of text included. A small corpus may
            hold fewer pairs to merge.
        path: JSON file to write, for `load_tokenizer` or any other user of the `tokenizers` library.

    Raises:
        OSError: If the file cannot be written.
        ValueError: If `vocab_size` leaves no room for the bytes.
    """
    if vocab_size < ByteTokenizer.vocab_size:
        raise ValueError(f"vocab_size must be at least {ByteTokenizer.vocab_size}, got {vocab_size}")
    inner = tokenizers.Tokenizer(BPE())
    inner.pre_tokenizer = ByteLevel(add_prefix_space=False)
    inner.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator((document.decode() for document in documents), trainer)
    # The library reports a file it cannot write as a bare Exception; Path gives the reason and the name.
    Path(path).write_text(inner.to_str(pretty=True), encoding="utf-8")
    return load_tokenizer(path)
