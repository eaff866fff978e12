import functools
import itertools
import json
import sysconfig
from pathlib import Path

import jax
import numpy as np
import pytest

from train.data import load_corpus, make_loader
from train.tokenizer import ByteTokenizer, train_tokenizer

TOKENIZER = ByteTokenizer()
END = TOKENIZER.end_of_text


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "texts"
    for i in range(60):
        path = root / f"part{i % 3}" / f"text{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text number {i}")
    return root


@pytest.fixture
def documents():
    rng = np.random.default_rng(0)
    return [rng.integers(97, 123, size, dtype=np.uint8).tobytes() for size in (5, 1, 40, 3, 16, 7, 90, 2)]


load = functools.partial(make_loader, tokenizer=TOKENIZER, batch_size=3, sequence_length=16, seed=7)


def rows(batches):
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


# The corpus.


def test_the_default_corpus_is_the_standard_library_without_its_tests():
    corpus = load_corpus()
    texts = {*corpus.train, *corpus.validation}
    stdlib = Path(sysconfig.get_path("stdlib"))
    assert (stdlib / "argparse.py").read_bytes() in texts
    assert (stdlib / "json" / "decoder.py").read_bytes() in texts
    assert (stdlib / "encodings" / "cp1250.py").read_bytes() not in texts
    assert corpus.num_train_bytes == sum(map(len, corpus.train)) > 4e6
    share = corpus.num_validation_bytes / (corpus.num_train_bytes + corpus.num_validation_bytes)
    assert 0.01 < share < 0.1
    assert "standard library" in corpus.description


def test_the_split_depends_on_names_alone(folder, tmp_path):
    first = load_corpus([str(folder)], validation_fraction=0.3)
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    second = load_corpus([str(moved)], validation_fraction=0.3)
    assert (first.train, first.validation) == (second.train, second.validation)
    (moved / "new.txt").write_text("one more")
    third = load_corpus([str(moved)], validation_fraction=0.3)
    assert set(third.validation) - {b"one more"} == set(first.validation)
    assert set(first.train).isdisjoint(first.validation)
    assert len(first.train) + len(first.validation) == 60
    assert 8 <= len(first.validation) <= 28


def test_a_glob_and_overlapping_paths_name_each_file_once(folder):
    corpus = load_corpus([f"{folder}/**/*.txt", str(folder), str(folder / "part0" / "text0.txt")])
    assert len(corpus.train) + len(corpus.validation) == 60


def test_folders_skip_what_is_hidden_or_not_text(folder):
    (folder / ".hidden").write_text("hidden")
    (folder / "picture.png").write_bytes(b"\x89PNG\xff\x00")
    (folder / "empty.txt").write_text("")
    corpus = load_corpus([str(folder)])
    assert len(corpus.train) + len(corpus.validation) == 60
    assert "1 files that are not text skipped" in corpus.description


def test_json_lines_hold_one_document_a_line(tmp_path):
    path = tmp_path / "texts.jsonl"
    texts = [f"text {i}, naïve\u2028\n" for i in range(40)]
    path.write_text("\n\n".join(json.dumps({"text": text, "id": 1}, ensure_ascii=False) for text in texts))
    corpus = load_corpus([str(path)], validation_fraction=0.2)
    assert sorted([*corpus.train, *corpus.validation]) == sorted(text.encode() for text in texts)
    assert 2 <= len(corpus.validation) <= 16


def test_half_a_surrogate_pair_in_json_becomes_a_question_mark(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a\\ud800b"}\n' * 2)
    corpus = load_corpus([str(path)])
    assert [*corpus.train, *corpus.validation] == [b"a?b"] * 2


@pytest.mark.parametrize("line", ['{"body": "x"}', '{"text": 3}', "[1]", "{"])
def test_a_bad_json_line_is_named(tmp_path, line):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "good"}\n' + line)
    with pytest.raises(ValueError, match=r'texts\.jsonl, line 2 must be a JSON object with a string field "text"'):
        load_corpus([str(path)])


def test_a_single_text_is_cut_and_its_end_held_out(tmp_path):
    path = tmp_path / "book.txt"
    text = "é" * 1000 + "ab" * 500
    path.write_text(text)
    corpus = load_corpus([str(path)], validation_fraction=0.1)
    assert (corpus.train[0] + corpus.validation[0]).decode() == text
    assert corpus.validation == [b"ab" * 100]


def test_two_texts_give_one_to_each_side(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    corpus = load_corpus([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], validation_fraction=0.001)
    assert len(corpus.train) == len(corpus.validation) == 1


def test_paths_without_text_are_refused_by_name(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(FileNotFoundError, match=r"missing\.txt"):
        load_corpus([str(tmp_path / "missing.txt")])
    with pytest.raises(ValueError, match=r"nothing\*\.txt must name at least one file"):
        load_corpus([str(tmp_path / "nothing*.txt")])
    with pytest.raises(ValueError, match="folder must name at least one file"):
        load_corpus([str(tmp_path / "folder")])
    with pytest.raises(ValueError, match=r"must hold some text: found none in .*empty\.txt"):
        load_corpus([str(tmp_path / "empty.txt")])
    with pytest.raises(ValueError, match=r"latin\.txt must be UTF-8 text"):
        load_corpus([str(tmp_path / "latin.txt")])


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_a_validation_fraction_outside_its_range_is_refused(fraction):
    with pytest.raises(ValueError, match="validation_fraction must lie between 0 and 1"):
        load_corpus(validation_fraction=fraction)


# The loader.


def test_an_epoch_predicts_every_byte_and_every_end_once_in_order(documents):
    batches = list(load(documents, shuffle=False, num_epochs=1))
    assert {array.shape for array in jax.tree.leaves(batches)} == {(3, 16)}
    epoch = rows(batches)
    expected = [i for document in documents for i in (*document, END)]
    assert epoch["targets"][epoch["mask"]].tolist() == expected
    assert epoch["tokens"][epoch["mask"]].tolist() == [END, *expected[:-1]]
    assert epoch["mask"].sum() == sum(map(len, documents)) + len(documents)
    assert {name: array.dtype for name, array in epoch.items()} == {
        name: bool if name == "mask" else np.int32 for name in epoch
    }


def test_segments_and_positions_start_anew_at_each_document_and_sequence(documents):
    for batch in load(documents, shuffle=False, num_epochs=1):
        for tokens, mask, segments, positions in zip(
            batch["tokens"], batch["mask"], batch["segment_ids"], batch["positions"], strict=True
        ):
            segment, position = 0, -1
            for i in range(len(tokens)):
                if not mask[i]:
                    segment, position = 0, 0
                elif i == 0 or tokens[i] == END:
                    segment, position = segment + 1, 0
                else:
                    position += 1
                assert (segments[i], positions[i]) == (segment, position)


def test_shuffling_reorders_the_sequences_differently_in_each_epoch(documents):
    plain = rows(list(load(documents, shuffle=False, num_epochs=1)))["targets"]
    num_sequences = -(-(sum(map(len, documents)) + len(documents)) // 16)
    shuffled = rows(list(load(documents, num_epochs=2)))["targets"]
    first, second = shuffled[:num_sequences].tolist(), shuffled[num_sequences : 2 * num_sequences].tolist()
    plain = plain[:num_sequences].tolist()
    assert sorted(first) == sorted(second) == sorted(plain)
    assert first != second != plain != first


def test_a_seed_fixes_the_order_and_another_changes_it(documents):
    first, again, other = (
        [batch["tokens"].tolist() for batch in itertools.islice(load(documents, seed=seed), 5)] for seed in (1, 1, 2)
    )
    assert first == again != other


def test_a_saved_state_continues_with_exactly_the_next_batch(documents):
    # An epoch is under four batches, so the states lie in several epochs.
    expected = [batch["tokens"] for batch in itertools.islice(load(documents), 14)]
    iterator = iter(load(documents))
    for i in range(10):
        state = json.loads(json.dumps(iterator.get_state()))
        assert len(json.dumps(state)) < 200
        resumed = iter(load(documents))
        resumed.set_state(state)
        for j in range(i, i + 3):
            np.testing.assert_array_equal(next(resumed)["tokens"], expected[j])
        next(iterator)


def test_a_finite_loader_pads_its_last_batch_and_can_be_read_again(documents):
    loader = load(documents, shuffle=False, num_epochs=1, batch_size=8)
    first, second = list(loader), list(loader)
    assert [len(batches) for batches in (first, second)] == [2, 2]
    last = first[-1]
    assert last["mask"].any()
    for name in ("tokens", "targets", "segment_ids", "positions"):
        assert not last[name][~last["mask"]].any()
        np.testing.assert_array_equal(last[name], second[-1][name])


def test_a_trained_tokenizer_feeds_the_loader(tmp_path, documents):
    tokenizer = train_tokenizer(documents, 280, str(tmp_path / "bpe.json"))
    epoch = rows(list(make_loader(documents, tokenizer, batch_size=2, sequence_length=8, shuffle=False, num_epochs=1)))
    targets = epoch["targets"][epoch["mask"]]
    texts = np.split(targets, np.flatnonzero(targets == tokenizer.end_of_text) + 1)
    assert [tokenizer.decode(text).encode() for text in texts[:-1]] == documents


def test_sizes_below_one_and_missing_documents_are_refused(documents):
    with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
        load(documents, batch_size=0)
    with pytest.raises(ValueError, match="sequence_length must be positive, got -1"):
        load(documents, sequence_length=-1)
    with pytest.raises(ValueError, match="documents must hold at least one text"):
        load([])
