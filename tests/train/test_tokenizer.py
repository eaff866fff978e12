import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.tokenizer import END_OF_TEXT, ByteTokenizer, load_tokenizer, train_tokenizer

DOCUMENTS = [f"def function_{i}(x):\n    return x + {i}\n".encode() for i in range(50)]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return train_tokenizer(DOCUMENTS, 300, str(tmp_path_factory.mktemp("tokenizer") / "bpe.json"))


def test_bytes_are_their_own_ids():
    tokenizer = load_tokenizer()
    ids = tokenizer.encode("aé")
    assert ids.dtype == np.int32
    assert ids.tolist() == list("aé".encode())
    assert tokenizer.end_of_text == 256
    assert tokenizer.vocab_size == 257


@given(st.text())
def test_bytes_give_every_text_back(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decoding_replaces_broken_characters_and_leaves_out_the_end_of_text():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(np.array([104, 105, 256, 0xC3, 33])) == "hi\N{REPLACEMENT CHARACTER}!"


@given(text=st.text())
def test_a_trained_tokenizer_gives_every_text_back(bpe, text):
    ids = bpe.encode(text)
    assert bpe.end_of_text not in ids
    assert bpe.decode([*ids, bpe.end_of_text]) == text


def test_a_trained_tokenizer_learns_the_words_of_its_documents(bpe):
    assert bpe.vocab_size == 300
    document = DOCUMENTS[0].decode()
    assert len(bpe.encode(document)) < len(document) / 2


def test_text_that_spells_the_end_of_text_does_not_end_it(bpe):
    assert bpe.end_of_text not in bpe.encode(END_OF_TEXT)
    assert bpe.decode(bpe.encode(END_OF_TEXT)) == END_OF_TEXT


def test_training_twice_gives_the_same_file(tmp_path):
    paths = [tmp_path / name for name in ("first.json", "second.json")]
    for path in paths:
        train_tokenizer(DOCUMENTS, 280, str(path))
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_vocabulary_too_small_for_the_bytes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vocab_size must be at least 257, got 256"):
        train_tokenizer(DOCUMENTS, 256, str(tmp_path / "bpe.json"))


def test_files_that_hold_no_usable_tokenizer_are_refused_by_name(bpe, tmp_path):
    with pytest.raises(OSError, match=r"missing\.json"):
        load_tokenizer(str(tmp_path / "missing.json"))
    with pytest.raises(OSError, match="no_such_folder"):
        train_tokenizer(DOCUMENTS, 280, str(tmp_path / "no_such_folder" / "bpe.json"))

    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    with pytest.raises(ValueError, match=r"broken\.json must be a JSON file of the tokenizers library"):
        load_tokenizer(str(broken))

    endless = tmp_path / "endless.json"
    train_tokenizer(DOCUMENTS, 257, str(endless))
    content = json.loads(endless.read_text())
    content["added_tokens"] = []
    content["model"]["vocab"]["word"] = content["model"]["vocab"].pop(END_OF_TEXT)
    endless.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"endless\.json must have a token that ends a text"):
        load_tokenizer(str(endless))
