"""What a configuration says about text, made real: corpus, tokenizer, and batches on the device."""

from collections.abc import Sequence

import grain

from train.config import TrainConfig
from train.data import Batch, Corpus, load_corpus, make_loader
from train.mesh import Placement
from train.step import DeviceBatch
from train.tokenizer import Tokenizer, load_tokenizer


def corpus_of(config: TrainConfig) -> Corpus:
    """Documents to train and to validate on.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If there is no text in what `config.data` names.
    """
    return load_corpus(config.data, validation_fraction=config.validation_fraction)


def tokenizer_of(config: TrainConfig) -> Tokenizer:
    """The tokenizer, whose ids the model's embedding can hold.

    Raises:
        OSError: If its file cannot be read.
        ValueError: If it is not a tokenizer, or has more ids than `config.model.vocab_size`.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    if config.model.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size must be at least {tokenizer.vocab_size}, the size of the tokenizer, "
            f"got {config.model.vocab_size}: pass --model.vocab-size {tokenizer.vocab_size}"
        )
    return tokenizer


def train_loader(
    config: TrainConfig, corpus: Corpus, tokenizer: Tokenizer, placement: Placement
) -> grain.IterDataset[DeviceBatch]:
    """Endless batches of the training documents, put on the devices by threads ahead of the step."""
    loader = make_loader(
        corpus.train,
        tokenizer,
        batch_size=config.batch_size,
        sequence_length=config.sequence_length,
        seed=config.seed,
        rows=placement.rows(config.batch_size),
    )
    return _on_devices(loader, placement, config.batch_size)


def validation_loader(
    config: TrainConfig, corpus: Corpus, tokenizer: Tokenizer, placement: Placement
) -> grain.IterDataset[DeviceBatch]:
    """The validation documents once, shuffled: the first few batches are a fair sample."""
    batch_size = config.batch_size // config.accumulation_steps
    loader = make_loader(
        corpus.validation,
        tokenizer,
        batch_size=batch_size,
        sequence_length=config.sequence_length,
        num_epochs=1,
        rows=placement.rows(batch_size),
    )
    return _on_devices(loader, placement, batch_size)


def _on_devices(
    loader: grain.IterDataset[Batch], placement: Placement, batch_size: int
) -> grain.IterDataset[DeviceBatch]:
    """Has one thread read batches, and another put them on the devices, ahead of who asks for them."""
    read = grain.experimental.ThreadPrefetchIterDataset(loader, prefetch_buffer_size=4)
    put = read.map(lambda batch: placement.put(batch, batch_size))
    return grain.experimental.ThreadPrefetchIterDataset(put, prefetch_buffer_size=2)


def tokens_per_byte(documents: Sequence[bytes], tokenizer: Tokenizer) -> float:
    """Targets that a byte of text stands for, the ends of documents among them."""
    num_tokens = sum(len(tokenizer.encode(document.decode())) + 1 for document in documents)
    return num_tokens / sum(map(len, documents))
