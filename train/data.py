"""Text to batches: a corpus split into training and validation documents, and a loader that packs them."""

import functools
import glob
import hashlib
import itertools
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import grain
import numpy as np
from jaxtyping import Bool, Int32

from train.tokenizer import Tokenizer

# Tests and generated tables are half of the standard library and little of its text.
_STDLIB_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}

_JSON_LINES = {".jsonl", ".ndjson"}


class Batch(TypedDict):
    """Sequences for next-token prediction; `make_loader` says what the arrays mean."""

    tokens: Int32[np.ndarray, "*B S"]
    targets: Int32[np.ndarray, "*B S"]
    mask: Bool[np.ndarray, "*B S"]
    segment_ids: Int32[np.ndarray, "*B S"]
    positions: Int32[np.ndarray, "*B S"]


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents to validate on.

    Attributes:
        train: UTF-8 texts.
        validation: UTF-8 texts; no document is in both.
        description: One line for people: where the text comes from and how much there is.
    """

    train: Sequence[bytes]
    validation: Sequence[bytes]
    description: str

    @functools.cached_property
    def num_train_bytes(self) -> int:
        """Size of the training text in bytes."""
        return sum(map(len, self.train))

    @functools.cached_property
    def num_validation_bytes(self) -> int:
        """Size of the validation text in bytes: the denominator of bits per byte."""
        return sum(map(len, self.validation))


def load_corpus(paths: Sequence[str] = (), *, validation_fraction: float = 0.05) -> Corpus:
    """Reads the documents at `paths` into memory and splits them into training and validation.

    A document goes to validation when the hash of its name falls below `validation_fraction`. The name is
    that of the file relative to the folder it was found in, or its last part (and the record's index, in JSON
    lines), so the split is the same on every machine and does not change when documents are added. Both sides
    get at least one document; a text that is all of the corpus is cut, and its end is the validation text.

    Args:
        paths: Text files (one document each), JSON-lines files (`.jsonl`, `.ndjson`: one document a line, in
            the field "text"), folders (searched recursively, hidden files left out) or globs. Files in
            folders and globs that are not UTF-8 text are skipped. Empty: the source files of the running
            interpreter's standard library, without its tests and generated tables.
        validation_fraction: Share of the documents to hold out, between 0 and 1.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If `paths` hold no text, or a file named in `paths` is not what its name says.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must lie between 0 and 1, got {validation_fraction}")
    files = _stdlib_files() if not paths else {k: v for path in paths for k, v in _find_files(path).items()}
    documents: list[tuple[str, bytes]] = []
    num_skipped = 0
    for file, (name, required) in files.items():
        data = file.read_bytes()
        if not _is_text(data):
            if required:
                raise ValueError(f"data file {file} must be UTF-8 text")
            num_skipped += 1
        elif file.suffix in _JSON_LINES:
            documents.extend((f"{name}:{i}", text) for i, text in _json_lines(file, data))
        else:
            documents.append((name, data))
    documents = [(name, text) for name, text in documents if text]
    source = ", ".join(paths) or f"the standard library of Python {sysconfig.get_python_version()}"
    if not documents:
        raise ValueError(f"data must hold some text: found none in {source} ({len(files)} files)")
    train, validation = _split(documents, validation_fraction)
    sizes = [sum(map(len, side)) / 1e6 for side in (train, validation)]
    description = (
        f"{source}: {len(train)} documents ({sizes[0]:.2f} MB) to train on, "
        f"{len(validation)} ({sizes[1]:.2f} MB) to validate on"
    )
    if num_skipped:
        description += f"; {num_skipped} files that are not text skipped"
    return Corpus(train, validation, description)


def _stdlib_files() -> dict[Path, tuple[str, bool]]:
    root = Path(sysconfig.get_path("stdlib"))
    return {
        path: (name, False)
        for path, (name, _) in _files_below(root).items()
        # The build's own settings (_sysconfigdata*.py) hold this machine's paths.
        if path.suffix == ".py"
        and not _STDLIB_EXCLUDED.intersection(path.relative_to(root).parts)
        and not path.name.startswith("_sysconfigdata")
    }


def _find_files(path: str) -> dict[Path, tuple[str, bool]]:
    """Files that `path` stands for, each with its name for the split and whether it must be text."""
    direct = Path(path).expanduser()
    if direct.is_dir():
        found = _files_below(direct)
    elif direct.exists() or not glob.has_magic(path):
        return {direct: (direct.name, True)}
    else:
        found = {
            match: (match.name, False)
            for match in map(Path, sorted(glob.glob(str(direct), recursive=True)))
            if match.is_file()
        }
    if not found:
        raise ValueError(f"data path {path} must name at least one file, found none")
    return found


def _files_below(root: Path) -> dict[Path, tuple[str, bool]]:
    found = {}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith((".", "__pycache__")))
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                found[path] = (path.relative_to(root).as_posix(), False)
    return found


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in data


def _json_lines(file: Path, data: bytes) -> Iterator[tuple[int, bytes]]:
    for i, line in enumerate(data.splitlines()):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            # JSON can spell half of a surrogate pair, which no text encoding can hold.
            yield i, text.encode(errors="replace")
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(
                f'data file {file}, line {i + 1} must be a JSON object with a string field "text"'
            ) from None


def _split(documents: list[tuple[str, bytes]], fraction: float) -> tuple[list[bytes], list[bytes]]:
    if len(documents) == 1:
        text = documents[0][1].decode()
        cut = len(text) - max(1, round(fraction * len(text)))
        if cut == 0:
            raise ValueError("data must hold more than one character, to train on some and validate on others")
        return [text[:cut].encode()], [text[cut:].encode()]
    hashes = [_hash(name) for name, _ in documents]
    order = sorted(range(len(documents)), key=hashes.__getitem__)
    num_validation = min(max(1, sum(h < fraction for h in hashes)), len(documents) - 1)
    held_out = set(order[:num_validation])
    train = [text for i, (_, text) in enumerate(documents) if i not in held_out]
    validation = [text for i, (_, text) in enumerate(documents) if i in held_out]
    return train, validation


def _hash(name: str) -> float:
    """A number in [0, 1) that depends on `name` alone."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) / 2**64


class _PackedSequences:
    """Random access to the sequences of a corpus: documents laid end to end, cut every S tokens.

    Each document is led by an end-of-text token, and one more closes the last, so that the target of each
    place is the input of the next: every token of every document, and its end, is predicted exactly once.
    """

    def __init__(self, documents: Sequence[bytes], tokenizer: Tokenizer, sequence_length: int):
        dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
        end = np.array([tokenizer.end_of_text], dtype)
        pieces = ((end, tokenizer.encode(document.decode()).astype(dtype)) for document in documents)
        self._stream = np.concatenate([*itertools.chain.from_iterable(pieces), end])
        self._starts = np.flatnonzero(self._stream[:-1] == tokenizer.end_of_text)
        self._length = sequence_length
        self._places = np.arange(sequence_length)

    def __len__(self) -> int:
        return -(-(len(self._stream) - 1) // self._length)

    def __getitem__(self, index: int | None) -> Batch:
        """The sequence of a number; padding alone for None."""
        begin = len(self._stream) if index is None else index * self._length
        window = self._stream[begin : begin + self._length + 1]
        size = max(len(window) - 1, 0)
        first, last = np.searchsorted(self._starts, (begin, begin + size))
        starts = np.append(0, self._starts[first:last] - begin)
        starts = starts[1:] if last > first and starts[1] == 0 else starts
        lengths = np.diff(starts, append=size)
        batch = Batch(
            tokens=np.zeros(self._length, np.int32),
            targets=np.zeros(self._length, np.int32),
            mask=self._places < size,
            segment_ids=np.zeros(self._length, np.int32),
            positions=np.zeros(self._length, np.int32),
        )
        batch["tokens"][:size] = window[:-1]
        batch["targets"][:size] = window[1:]
        batch["segment_ids"][:size] = np.repeat(np.arange(1, len(starts) + 1), lengths)
        batch["positions"][:size] = self._places[:size] - np.repeat(starts, lengths)
        return batch


def make_loader(
    documents: Sequence[bytes],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    sequence_length: int,
    seed: int = 0,
    shuffle: bool = True,
    num_epochs: int | None = None,
    rows: np.ndarray | None = None,
) -> grain.IterDataset[Batch]:
    """Batches of packed sequences for next-token prediction.

    Documents are laid end to end with end-of-text tokens between them and cut every `sequence_length` tokens;
    the sequences are shuffled, differently in each epoch. A document's first token is predicted from
    end-of-text alone. Every token, and the end of every document, is a target exactly once an epoch, so the
    summed loss of an epoch over the size of the text in bytes is an exact number of bits per byte.

    A batch is a dict of arrays of shape [B, S]:

    - `tokens`, `targets` (int32): inputs, and the token that follows each.
    - `mask` (bool): False where a batch is padded, which only the last batch of a finite loader is.
    - `segment_ids` (int32): 1, 2, ... for the documents of a sequence, which attention must keep apart; 0 in
      padding.
    - `positions` (int32): places inside the segment, from 0.

    Args:
        documents: UTF-8 texts. They are encoded at once and kept in memory, 2 bytes a token (4 with a
            vocabulary of more than 65,536).
        tokenizer: What encodes them.
        batch_size: Sequences in a batch, B.
        sequence_length: Tokens in a sequence, S.
        seed: Seed of the shuffling, 0 <= seed < 2**32.
        shuffle: Whether to shuffle the sequences; False keeps their order.
        num_epochs: How often to go through the documents; None goes on for ever.
        rows: Which sequences of each batch to read, for a process that shares it with others; all if None.

    Returns:
        A grain dataset, read ahead by a background thread. `iter(loader)` starts at the first batch and gives
        an iterator whose `get_state()` is a small JSON-serialisable dict: `set_state` on another iterator of
        an equal loader continues with exactly the next batch, in constant time.

    Raises:
        ValueError: If there are no documents, or a size is not positive.
    """
    for name, value in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}")
    if not documents:
        raise ValueError("documents must hold at least one text, got none")
    sequences = _PackedSequences(documents, tokenizer, sequence_length)
    rows = np.arange(batch_size) if rows is None else rows
    numbers = grain.MapDataset.range(len(sequences))
    if shuffle:
        numbers = numbers.shuffle(seed)

    def read(batch: Sequence[int]) -> Batch:
        padded = [*batch, *[None] * (batch_size - len(batch))]  # the last batch of all may be shorter
        chosen = [sequences[padded[row]] for row in rows]
        return Batch(**{name: np.stack([sequence[name] for sequence in chosen]) for name in Batch.__annotations__})

    batches = numbers.repeat(num_epochs).batch(batch_size, batch_fn=list).map(read)
    return batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8))
