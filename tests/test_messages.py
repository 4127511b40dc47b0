"""Messages say what is known: which file, what it looks like, what was meant, what to write instead."""

# ruff: noqa: E501 - tables of cases, one a line

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import sqlite3
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.orc as orc
import pyarrow.parquet as pq
import pytest
from backports import zstd

from batchq import storage
from batchq.cli import main
from batchq.errors import BatchqError, ConfigError, InputError
from tests.helpers import rows_of, write_jsonl
from tests.inputs import rows, schema_of, write

TABLE = pa.table({"text": ["secret words"] * 3})


def made(kind: str) -> bytes:
    """A file of that kind, as the tools that write it do."""
    sink = io.BytesIO()
    if kind == "parquet":
        pq.write_table(TABLE, sink)
    elif kind == "orc":
        orc.write_table(TABLE, sink)
    elif kind == "arrow file":
        with pa.ipc.new_file(sink, TABLE.schema) as writer:
            writer.write_table(TABLE)
    elif kind == "arrow stream":
        with pa.ipc.new_stream(sink, TABLE.schema) as writer:
            writer.write_table(TABLE)
    elif kind in ("zip", "xlsx"):
        with zipfile.ZipFile(sink, "w") as archive:
            archive.writestr("[Content_Types].xml" if kind == "xlsx" else "rows.jsonl", "secret words")
    elif kind == "tar":
        with tarfile.open(fileobj=sink, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("rows.jsonl"))
    elif kind == "sqlite":
        connection = sqlite3.connect(":memory:")
        connection.execute("create table t (text)")
        return connection.serialize()
    return sink.getvalue()


PLAIN = b'{"text": "secret words"}\n' * 3
LOOKS = {
    "gzip": (gzip.compress(PLAIN), "gzip: let its name end in .gz"),
    "zstd": (zstd.compress(PLAIN), "zstd: let its name end in .zst"),
    "bzip2": (bz2.compress(PLAIN), "bzip2: let its name end in .bz2"),
    "xz": (lzma.compress(PLAIN), "xz: unpack it"),
    "zip": (made("zip"), "a zip archive: unpack it"),
    "Excel": (made("xlsx"), "an Excel workbook or another Office file: save it as CSV"),
    "old Excel": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "an old Office file, such as .xls: save it as CSV"),
    "tar": (made("tar"), "a tar archive: unpack it"),
    "Parquet": (made("parquet"), "Parquet: let its name end in .parquet"),
    "ORC": (made("orc"), "ORC: convert it"),
    "Avro": (b"Obj\x01\x04\x16avro.schema", "Avro: convert it"),
    "Arrow file": (made("arrow file"), "an Arrow file (Feather): convert it"),
    "Arrow stream": (made("arrow stream"), "an Arrow stream: let its name end in .arrow"),
    "SQLite": (made("sqlite"), "an SQLite database: convert it"),
    "PDF": (b"%PDF-1.7\nsecret words", "a PDF: extract its text"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "a pointer of Git LFS, not the file itself: git lfs pull"),
    "HTML": (b"\n<!DOCTYPE html>\n<html>secret words</html>", "an HTML page, perhaps of a login"),
    "XML": (b'<?xml version="1.0"?>\n<rows>secret words</rows>', "XML: convert it"),
    "a store's error": (b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>', "a store's error message (AccessDenied)"),
    "a JSON array": (b'[{"text": "secret words"},\n{"text": "more"}]\n', "one JSON array: make it one object per line (jq -c '.[]')"),
    "a JSON array over lines": (b'[\n  {"text": "secret words"}\n]\n', "one JSON array"),
    "pretty JSON": (b'{\n  "text": "secret words",\n  "id": 1\n}\n', "JSON over several lines: make it one object per line (jq -c .)"),
    "Python": (b"{'text': 'secret words'}\n" * 3, "Python's way of printing a dict: write it with json.dumps"),
    "CSV": (b"id,text\n1,secret words\n2,more\n", "CSV: let its name end in .csv"),
    "text": (b"secret words\nand more\n", "text: say input.format=text"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOKS)
def test_a_file_that_is_no_jsonl_is_named_with_what_it_looks_like(name: str, tmp_path: Path) -> None:
    data, expected = LOOKS[name]
    path = write(tmp_path / "x.jsonl", data)
    with pytest.raises(InputError) as refused:
        schema_of(path)
    said = str(refused.value)
    assert said.startswith(f"{path}: ") and f"looks like {expected}" in said
    assert "secret" not in said and "\n" not in said


@pytest.mark.parametrize(
    "start", [b"ORCID of the author", b"PARENT said", b"PAR1 is a name", b"BZh", b"Object", b"<b>bold</b>"]
)
def test_a_text_may_begin_as_other_files_do(start: bytes, tmp_path: Path) -> None:
    assert rows(write(tmp_path / "x.txt", start + b"\nmore\n"))[0].columns == {"text": start.decode()}


DAMAGED = {
    "Parquet cut short": ("x.parquet", made("parquet")[:-20], "its end is missing, it was cut short"),
    "Parquet of nothing": ("x.parquet", b"", "it is empty"),
    "gzip for Parquet": ("x.parquet", gzip.compress(PLAIN), "it looks like gzip"),
    "JSON for Parquet": ("x.parquet", b"[" + PLAIN, "it looks like one JSON array"),
    "an encrypted footer": ("x.parquet", b"PARE" + bytes(40) + b"PARE", "encrypted"),
    "a page for Parquet": ("x.parquet", b"<html>secret</html>", "it looks like an HTML page"),
    "plain text in gzip's name": ("x.jsonl.gz", PLAIN, "it isn't packed; take .gz off its name"),
    "zstd in gzip's name": ("x.jsonl.gz", zstd.compress(PLAIN), "it looks like zstd: let its name end in .zst"),
    "gzip in gzip": ("x.jsonl.gz", gzip.compress(gzip.compress(PLAIN)), "looks like gzip"),
    "an Arrow file for a dataset": ("x.arrow", made("arrow file"), "it looks like an Arrow file"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_what_cannot_be_decoded_says_what_it_looks_like(name: str, tmp_path: Path) -> None:
    file, data, expected = DAMAGED[name]
    path = write(tmp_path / file, data)
    with pytest.raises(InputError) as refused:
        schema_of(path)
    said = str(refused.value)
    assert said.startswith(f"{path}: ") and expected in said
    assert "secret" not in said and "\n" not in said


def test_parquet_with_encrypted_columns_says_so(tmp_path: Path) -> None:
    import pyarrow.parquet.encryption as encryption

    class Keys(encryption.KmsClient):  # type: ignore[misc]
        def __init__(self, _: object) -> None:
            super().__init__()

        def wrap_key(self, key: bytes, _: str) -> bytes:
            return key.hex().encode()

        def unwrap_key(self, wrapped: bytes, _: str) -> bytes:
            return bytes.fromhex(wrapped.decode())

    factory = encryption.CryptoFactory(Keys)
    for footer in (True, False):
        settings = encryption.EncryptionConfiguration(
            footer_key="f", column_keys={"c": ["text"]}, plaintext_footer=footer
        )
        keys = factory.file_encryption_properties(encryption.KmsConnectionConfig(), settings)
        path = tmp_path / f"{footer}.parquet"
        with pq.ParquetWriter(path, TABLE.schema, encryption_properties=keys) as writer:
            writer.write_table(TABLE)
        with pytest.raises(InputError, match="encrypted"):
            rows(path)


URIS = {
    "https://bucket.s3.amazonaws.com/x.csv?X-Amz-Signature=abc": "https://: not a store that batchq knows; fetch the file first, with curl -O say",
    "http://host/x.csv": "http://: not a store that batchq knows; fetch the file first",
    "s3a://bucket/x": "s3a://: write s3://",
    "s3n://bucket/x": "s3n://: write s3://",
    "S3://bucket/x": "S3://: write s3://",
    "gcs://bucket/x": "gcs://: write gs://",
    "abfss://container@account.dfs.core.windows.net/x": "abfss://: not a store that batchq knows; write az://container/folder",
    "wasbs://container@account.blob.core.windows.net/x": "write az://container/folder",
    "hdfs://node/x": "hdfs://: not a store that batchq knows; copy it with hdfs dfs -get",
    "dbfs:/mnt/x": "dbfs:/: not a store that batchq knows; on Databricks its path is /dbfs/...",
    "dbfs://mnt/x": "on Databricks its path is /dbfs/...",
    "hf://datasets/a/b": "hf://: not a store that batchq knows; only models come from there",
    "ftp://host/x": "ftp://: not a store that batchq knows; fetch the file first",
    "what://x": "what://: not a store that batchq knows; use a local path, s3://, gs:// or az://",
    "file://data/x.csv": "file:: a local file is its path alone, or file:// and a path that begins with /: file:///data",
    "file:/data/x.csv": "file:: a local file is its path alone",
    "s3:/bucket/x": "s3:: two slashes are missing; write s3://bucket/folder",
    "s3:bucket/x": "s3:: two slashes are missing; write s3://bucket/folder",
}  # fmt: skip


@pytest.mark.parametrize("uri", URIS)
def test_a_name_that_is_no_stores_says_what_to_write(uri: str) -> None:
    with pytest.raises(ConfigError) as refused:
        storage.normalize(uri)
    assert URIS[uri] in str(refused.value)
    assert "abc" not in str(refused.value) and "@" not in str(refused.value)


def test_a_file_may_be_called_as_a_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "s3:x.jsonl", PLAIN)
    assert len(rows("s3:x.jsonl")) == 3
    assert storage.normalize("file:///data/x") == "/data/x"
    assert storage.normalize("2026-01-31T10:00.csv") == str(tmp_path / "2026-01-31T10:00.csv")


@pytest.mark.parametrize("zone", ["Mars/Phobos", "+25:00", "GMT+3"])
def test_a_time_zone_that_is_not_known_names_its_column(zone: str, project: Path, capsys: Any) -> None:
    when = pa.array([0, 1], pa.timestamp("us", tz=zone))
    pq.write_table(pa.table({"text": ["a", "b"], "gold": ["good", "bad"], "when": when}), project / "rows.parquet")
    asked = ["plan", "job=mine", "engine=fake", "input.path=rows.parquet"]
    assert main([*asked, "task.prompt='{{ text }} {{ when }}'"]) == 2
    assert f"batchq: column when: its time zone {zone} isn't known here" in capsys.readouterr().err


# ---- stores ----


class Store(ThreadingHTTPServer):
    """Answers every request alike."""

    def __init__(self, status: int, body: str) -> None:
        super().__init__(("127.0.0.1", 0), Reply)
        self.status, self.body = status, body.encode()


class Reply(BaseHTTPRequestHandler):
    server: Store

    def do_GET(self) -> None:
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(self.server.body)

    do_HEAD = do_PUT = do_GET

    def log_message(self, *_: object) -> None:
        pass


def code(name: str, message: str = "what it says") -> str:
    return f"<?xml version='1.0'?><Error><Code>{name}</Code><Message>{message}</Message></Error>"


REPLIES = {
    "no bucket": (404, code("NoSuchBucket"), "input.path=s3://bucket/x.jsonl: no such bucket"),
    "another region": (301, code("PermanentRedirect"), "the bucket is in another region; set AWS_REGION"),
    "a region, without words": (400, "", "the store answers 400 Bad Request; are AWS_REGION and the endpoint right?"),
    "no permission": (403, code("AccessDenied"), "access denied"),
    "a wrong key": (403, code("InvalidAccessKeyId"), "check the credentials in the environment"),
}  # fmt: skip


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, str], None]]:
    """A store that answers every request with this status and body."""
    servers: list[Store] = []

    def start(status: int, body: str) -> None:
        server = Store(status, body)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "canary-key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-secret")

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("name", REPLIES)
def test_what_a_store_refuses_is_said_in_a_line(name: str, refusing: Callable[[int, str], None]) -> None:
    status, body, expected = REPLIES[name]
    refusing(status, body)
    with pytest.raises(BatchqError) as refused:
        schema_of("s3://bucket/x.jsonl")
    assert expected in str(refused.value) and "\n" not in str(refused.value) and "canary" not in str(refused.value)


def test_a_region_that_the_store_names_is_said(refusing: Callable[[int, str], None]) -> None:
    refusing(400, code("AuthorizationHeaderMalformed", "the region 'us-east-1' is wrong; expecting 'eu-west-1'"))
    with pytest.raises(BatchqError, match="the bucket is in another region eu-west-1; set AWS_REGION"):
        list(storage.list_objects("s3://bucket/x"))


def test_a_file_of_nearly_that_name_is_named(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", PLAIN)
    with pytest.raises(InputError, match=r"no file, folder or object of that name; did you mean rows\.jsonl\?"):
        schema_of(tmp_path / "row.jsonl")


# ---- the command line ----

MEANT = {
    "a list cut at a blank": (["job=mine", "task.labels=[good,", "bad]"], "task.labels=[good, bad]: a shell cuts at blanks; put quotes around all of it: 'task.labels=[good, bad]'"),
    "a text cut at a blank": (["job=mine", "input.path=a", "b"], "b: no such verb; if it belongs to input.path, put quotes around all of it: 'input.path=a b'"),
    "blanks around =": (["job=mine", "input.limit", "=", "5"], "input.limit: no blanks around =; say input.limit=VALUE"),
    "a blank before =": (["job=mine", "input.limit", "=5"], "input.limit: no blanks around =; say input.limit=5"),
    "a blank after =": (["job=mine", "input.limit=", "5"], "input.limit= 5: no blanks around =; say input.limit=5"),
    "a flag for a field": (["job=mine", "--input.path=x"], "--input.path=x: a field is set without dashes: input.path=x"),
    "a flag for a field's last name": (["job=mine", "--limit", "10"], "--limit: a field is set without dashes: input.limit=VALUE"),
    "a flag with dashes inside": (["job=mine", "--max-model-len=10"], "a field is set without dashes: engine.max_model_len=10"),
    "a flag for the job": (["--job", "mine"], "--job: a field is set without dashes: job=VALUE"),
    "an unknown flag": (["job=mine", "--verbose"], "--verbose: no such flag; a field is set as key=value, without dashes"),
    "a colon": (["job:", "mine"], "job:: on the command line it is job=mine"),
    "a colon without a blank": (["job:mine"], "job:mine: on the command line it is job=mine"),
    "a job without its key": (["mine"], "mine: a job is named as job=mine"),
    "a verb, nearly": (["staus", "job=mine"], "did you mean status?"),
    "a field without a value": (["job=mine", "input.limit"], "input.limit: its value is missing; say input.limit=VALUE"),
    "a job's path": (["job=conf/job/mine.yaml"], "say job=mine: a name in conf/job, without a path and .yaml"),
    "a job, nearly": (["job=mnie"], "did you mean mine?"),
    "a model of the hub": (["job=mine", "model=meta-llama/Llama-3.1-8B"], "a model of the hub is model=hub model.path=hf://OWNER/NAME"),
    "a model's folder": (["job=mine", "model=/models/x"], "a local one model=folder model.path=FOLDER"),
    "a file for the input": (["job=mine", "input=data.csv"], "or did you mean input.path=data.csv?"),
    "a folder for the output": (["job=mine", "output=out/x"], "or did you mean output.path=out/x?"),
    "a budget": (["job=mine", "pricing=20"], "or did you mean pricing.budget=20?"),
    "a scheme in capitals": (["job=mine", "quantization=FP8"], "did you mean fp8?"),
    "an engine, nearly": (["job=mine", "engine=vlm"], "engine=vlm: no such engine; choices are fake, vllm; did you mean vllm?"),
    "a field, nearly": (["job=mine", "task.promt=x"], "did you mean task.prompt?"),
    "a group, nearly": (["job=mine", "inputs.path=x"], "did you mean"),
    "a field without its group": (["job=mine", "limit=3"], "limit: no such field; groups are job, task, model, quantization, gate, engine, cluster, input, output, pricing, tune, clean, log, metrics, events, run; did you mean input.limit?"),
    "a field of several groups": (["job=mine", "seed=3"], "did you mean task.seed or quantization.seed or gate.seed?"),
    "a field of the dialect, nearly": (["job=mine", "input.csv.delim=x"], "did you mean input.csv.delimiter?"),
    "a dict of options": (["job=mine", "engine.options={x: 5}"], "engine.options: on the command line add each key for itself, as +engine.options.KEY=VALUE"),
    "a dict of a template": (["job=mine", "model.chat_template={x: 5}"], "model.chat_template: on the command line add each key for itself"),
    "a key of a price": (["job=mine", "pricing.per_hour.X9=3"], "pricing.per_hour has no such key yet; add it with +pricing.per_hour.X9=3"),
    "a key with blanks": (["job=mine", "pricing.per_hour.NVIDIA H100=3"], "a key with blanks can't stand on the command line"),
    "a nested key of an option": (["job=mine", "engine.options.hf_overrides.x=5"], "add it with +engine.options.hf_overrides.x=5"),
    "a list in round brackets": (["job=mine", "task.labels=(a,b)"], "task.labels: a list is written with brackets: 'task.labels=[a,b]'"),
    "a text for a list": (["job=mine", "input.columns=text"], "a list is input.columns=[text]"),
    "a group without choices": (["job=mine", "task=sentiment"], "task has no choices, its fields are set one by one, as task.FIELD=VALUE"),
    "= and braces in a value": (["job=mine", "task.prompt=a={b}"], "task.prompt: can't be read as Hydra's key=value; quote its value twice, for the shell too: 'task.prompt=\"...\"'"),
    "a semicolon": (["job=mine", "input.csv.delimiter=;"], "input.csv.delimiter: say a word for the character: comma, semicolon, tab"),
    "a comma for a delimiter": (["job=mine", "input.csv.delimiter=,"], "input.csv.delimiter: say a word for the character: comma"),
    "a format, nearly": (["job=mine", "input.format=json"], "did you mean jsonl?"),
    "a kind, nearly": (["job=mine", "task.kind=classification"], "did you mean classify?"),
    "none for null": (["job=mine", "input.limit=none"], "for no value say input.limit=null"),
}  # fmt: skip

COLUMNS = {
    "gold": ("task.gold=golds", "task.gold=golds: no such column; columns are id, text, gold; did you mean gold?"),
    "id": ("input.id=ID", "input.id=ID: no such column; columns are id, text, gold; did you mean id?"),
    "output": ("output.columns=[texts]", "which is no column; columns are id, text, gold; did you mean text?"),
    "input": ("input.columns=[txt,gold]", "no column txt in the input; there are id, text, gold; did you mean text?"),
    "prompt": ("task.prompt='{{ txt }}'", "did you mean text?"),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_that_is_nearly_right_says_what_was_meant(name: str, project: Path, capsys: Any) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(3))
    override, expected = COLUMNS[name]
    assert main(["plan", "job=mine", "engine=fake", override]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("name", MEANT)
def test_a_command_that_is_nearly_right_says_what_was_meant(
    name: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, expected = MEANT[name]
    assert main(arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("batchq: ") and expected in line
