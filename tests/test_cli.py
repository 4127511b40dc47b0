"""The command line: composition as Hydra's users expect it, and one line for each mistake."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import cache_from_source, find_spec
from pathlib import Path

import pytest

from batchq.cli import compose, main
from batchq.config import Config, choices, conf_dir
from batchq.config.compose import compose_each
from batchq.errors import ExitCode
from tests.helpers import rows_of, write_jsonl


@pytest.mark.parametrize("job", sorted(p.stem for p in (conf_dir() / "job").glob("*.yaml")))
def test_every_shipped_job_composes(job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = compose([f"job={job}"])
    assert config.job.name == job
    assert config.task.prompt.strip()


@pytest.mark.parametrize("group", ["model", "quantization", "engine", "cluster", "input", "output", "pricing"])
def test_every_shipped_choice_composes(group: str, compose: Callable[..., Config]) -> None:
    for choice in choices(group):
        given = [f"{group}={choice}"]
        if choice == "hub":
            given += ["model.path=hf://a/b", f"model.revision={'0' * 40}"]
        assert compose(*given)


def test_a_partition_in_a_path_needs_no_quotes(compose: Callable[..., Config]) -> None:
    for path in ("/calls/ds=2026-11-30", "s3://calls/ds=2026-11-30/h=01/*.jsonl", "a=b"):
        assert compose(f"input.path={path}").input.path == path
        assert compose(f'input.path="{path}"').input.path == path
    swept = compose_each(["job=mine", "-m", "output.path=out/ds=1,out/ds=2"])
    assert [c.output.path for c in swept if isinstance(c, Config)] == ["out/ds=1", "out/ds=2"]


MISTAKES = {
    "unknown job": (["job=nope"], "job=nope: no such job; choices are mine"),
    "no job": (["output.path=x"], "job is missing"),
    "unknown key": (
        ["job=mine", "engine.typo=1"],
        "engine.typo: no such field; fields of engine are kind, max_model_len",
    ),
    "unknown key, forced": (["job=mine", "+engine.typo=1"], "engine.typo: no such field"),
    "unknown choice": (["job=mine", "engine=v"], "engine=v: no such engine; choices are fake, vllm"),
    "verb in second place": (["job=mine", "plan"], "plan: the verb comes first"),
    "a comma": (["job=mine", "input.path=a.csv,b.csv"], "input.path: has a comma; a list is"),
    "no such group": (["job=mine", "inptu.path=a"], "there is no inptu; groups are job, task"),
    "output is a file": (["job=mine", "output.path=rows.jsonl"], "output.path=rows.jsonl: is a file"),
    "yes and no": (["job=mine", "task.labels=[true,no]"], "put it in quotes"),
    "unquoted braces": (
        ["job=mine", "task.prompt={{ text }}"],
        "task.prompt: can't be read as Hydra's key=value; quote its value",
    ),
    "unknown verb": (["walk", "job=mine"], "walk: no such verb; verbs are run, plan"),
    "wrong type": (["job=mine", "engine.max_model_len=abc"], "engine.max_model_len"),
    "unknown scheme": (
        ["job=mine", "quantization.scheme=int3"],
        "expected one of [auto, none, fp8, fp8_gptq, fp8_block, int8",
    ),
    "one label": (["job=mine", "task.labels=[a]"], "task.labels=['a']: classify needs at least two labels"),
    "a label twice": (["job=mine", "task.labels=[a,a]"], "each label once"),
    "no output": (["job=mine", "output.path="], "output.path is missing"),
    "negative": (["job=mine", "input.limit=-1"], "input.limit=-1: must be above 0"),
    "missing column": (
        ["job=mine", "task.prompt='{{ txt }}'"],
        "task.prompt uses txt, not a column of the input (did you mean text?); columns are id, text, gold",
    ),
    "broken prompt": (["job=mine", "task.prompt='{{ text'"], "task.prompt, line 1"),
    "missing gold": (["job=mine", "task.gold=truth"], "task.gold=truth: no such column"),
    "missing input": (
        ["job=mine", "input.path=nowhere.jsonl"],
        "nowhere.jsonl: no file, folder or object of that name",
    ),
    "empty input": (["job=mine", "input.path=empty.jsonl"], "the input is empty"),
    "no model": (["job=mine", "model.path=/nowhere"], "/nowhere"),
    "hub model not pinned": (["job=mine", "model.path=hf://a/b"], "revision"),
    "a model's own code": (
        ["job=mine", "model.trust_remote_code=true"],
        "so it takes a second yes; once you have read it, set BATCHQ_TRUST_REMOTE_CODE=",
    ),
    "a model's own code, by the back door": (
        ["job=mine", "+engine.options.trust_remote_code=true"],
        "engine.options.trust_remote_code: say model.trust_remote_code",
    ),
    "column taken": (["job=mine", "task.name=text"], "input column text has the name of an output column"),
    "no cluster": (["job=mine", "cluster.address=127.0.0.1:1"], "cluster.address=127.0.0.1:1"),
    "no name of a job": (["job="], "job=: no such job; choices are mine"),
    "a job of null": (["job=null"], "job=null: no such job; choices are mine"),
    "a job elsewhere": (["job=../mine"], "job=../mine: no such job"),
    "a job in another script": (["job='\"mïne\"'"], "job="),
    "two jobs": (["job=mine", "+job=mine"], "job: job appears more than once"),
    "a group of null": (["job=mine", "quantization=null"], "quantization=null: no such quantization; choices are auto"),
    "a group that is a number": (["job=mine", "gate=5"], "gate=5: no such gate; choices are default, off, strict"),
    "a group that is a list": (["job=mine", "gate=[off,b]"], "gate=b: no such gate"),
    "a group without a file": (["job=mine", "task=null"], "task: field 'task' is not Optional"),
    "a field that can't be null": (
        ["job=mine", "task.labels=null"],
        "task.labels: field 'task.labels' is not Optional",
    ),
    "a key of an option": (
        ["job=mine", "engine.options.x=5"],
        "engine.options.x: engine.options has no such key yet; add it with +engine.options.x=5",
    ),
    "a key of a template": (
        ["job=mine", "model.chat_template.enable_thinking=false"],
        "add it with +model.chat_template.enable_thinking=false",
    ),
    "a key of a list": (["job=mine", "task.labels.x=1"], "invalid literal for int"),
    "a key of nothing": (["job=mine", "a.b.c=1"], "a.b.c: no such field; there is no a; groups are job, task"),
    "an unknown variable": (["job=mine", "input.path=${nothing}"], "input.path: Interpolation key 'nothing' not found"),
    "no key": (["job=mine", "=x"], "=x: a name is missing; say key=value"),
    "nothing": (["job=mine", ""], "'': no such verb; verbs are run, plan"),
    "a flag without its value": (["job=mine", "engine=fake", "--cfg"], "argument --cfg/-c: expected one argument"),
    "an unknown flag": (["job=mine", "--nonsense"], "--nonsense: no such flag; a field is set as key=value"),
    "no such folder": (["job=mine", "--config-dir", "nowhere"], "configuration: Additional config directory"),
    "a sweep with a mistake": (["job=mine", "-m", "engine=fake,no"], "engine=no: no such engine"),
    "not a number": (["job=mine", "cluster.spill_seconds=nan"], "cluster.spill_seconds=nan: must be above 0"),
    "temperature": (["job=mine", "task.temperature=-1"], "task.temperature=-1: can't be negative"),
    "confidence": (["job=mine", "gate.confidence=1"], "gate.confidence=1: between 0 and 1, exclusive"),
    "an empty stop": (["job=mine", "task.stop=['']"], "task.stop: an empty text would end every answer"),
    "a share": (["job=mine", "output.max_error_rate=1.5"], "output.max_error_rate=1.5: between 0 and 1"),
}


@pytest.mark.parametrize("name", sorted(MISTAKES))
def test_a_mistake_is_one_line_and_nothing_is_written(
    name: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(3))
    (project / "empty.jsonl").touch()
    overrides, expected = MISTAKES[name]
    extra = [] if overrides[-1] == "--cfg" or any(o.startswith("engine=") for o in overrides) else ["engine=fake"]
    assert main([*overrides, *extra]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("batchq: ")]
    assert len(lines) == 1
    assert expected in lines[0]
    assert not (project / "out").exists()


FILES = {
    "an open bracket": ("# @package _global_\ntask: {labels: [a, b\njob: x\n", "broken.yaml, line 3"),
    "braces in a plain value": (
        "# @package _global_\ntask:\n  prompt: {{ text }} which?\n",
        "wants quotes or a | block",
    ),
    "a tab": ("# @package _global_\njob:\n\tname: a\n", "tabs can't indent"),
    "no package": ("job: {name: a}\ntask: {prompt: a}\n", "begins with the line # @package _global_"),
    "a typo": (
        "# @package _global_\ntask: {lables: [a, b]}\n",
        "task.lables: no such field; fields of task are kind, prompt",
    ),
    "a group for a name": ("# @package _global_\nmodel: smol\n", "conf/job/broken.yaml: "),
}


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_broken_job_file_is_one_line(name: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, expected = FILES[name]
    (project / "conf/job/broken.yaml").write_text(text)
    assert main(["job=broken", "engine=fake"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
    assert not line.endswith(":")


def test_a_users_own_file_shadows_ours(project: Path) -> None:
    (project / "conf/engine").mkdir()
    (project / "conf/engine/vllm.yaml").write_text("kind: fake\nmax_num_seqs: 7\n")
    assert compose(["job=mine"]).engine.max_num_seqs == 7


def test_an_unrelated_conf_folder_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf/engine").mkdir(parents=True)
    (tmp_path / "conf/engine/vllm.yaml").write_text("nonsense: 1\n")
    monkeypatch.chdir(tmp_path)
    assert compose(["job=sentiment_transcripts"]).engine.kind.value == "vllm"


def test_batchq_conf_names_the_folder(
    project: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    monkeypatch.setenv("BATCHQ_CONF", str(project / "conf"))
    assert compose(["job=mine"]).job.name == "mine"


def batchq(*arguments: str, cwd: Path, streams: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    """`streams`: a shell's redirections, which are applied after ours; `more`: environment."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), **more}
    command = ["sh", "-c", f'exec "$@" {streams}', "sh", sys.executable, "-m", "batchq", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def test_flags_may_stand_between_overrides(project: Path) -> None:
    done = batchq("job=mine", "--cfg", "job", "engine=fake", cwd=project)
    assert done.returncode == 0, done.stderr
    assert "kind: fake" in done.stdout


def test_what_an_encoding_lacks_is_written_in_ascii(project: Path) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(3))
    done = batchq("plan", "job=mine", "engine=fake", 'job.name="größe"', cwd=project, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "batchq \\xb7 plan of gr\\xf6\\xdfe" in done.stdout
    done = batchq("job=mine", 'input.path="größe"', cwd=project, PYTHONIOENCODING="ascii")
    assert done.returncode == 2
    assert "input.path=gr\\xf6\\xdfe" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "streams", "code", "said"),
    [
        (["--help"], ">/dev/full", 1, "batchq: standard output: No space left on device\n"),
        (["plan"], ">/dev/full", 1, "batchq: standard output: No space left on device\n"),
        (["job=mine", "--cfg", "all"], ">/dev/full", 1, "batchq: standard output: No space left on device\n"),
        (["job=no"], ">/dev/full", 2, "batchq: job=no: no such job; choices are mine, sentiment_transcripts\n"),
        (["job=no"], ">&-", 2, "batchq: job=no: no such job; choices are mine, sentiment_transcripts\n"),
        (["job=no"], "2>/dev/full", 2, ""),
        (["job=no"], "2>&-", 2, ""),
        (["plan"], ">&-", 1, "batchq: standard output: it is closed\n"),
        (["plan"], "<&- >&- 2>&-", 1, ""),
        (["--help"], ">/dev/full 2>/dev/full", 1, ""),
    ],
)
def test_a_stream_that_takes_nothing_is_one_line_at_most(
    arguments: list[str], streams: str, code: int, said: str, project: Path
) -> None:
    done = batchq(*arguments, cwd=project, streams=streams)
    assert (done.returncode, done.stderr) == (code, said)


def test_a_reader_that_left_is_no_error(project: Path) -> None:
    done = batchq("plan", cwd=project, streams="| true")
    assert (done.stdout, done.stderr) == ("", "")


def test_nobody_hears_of_it_and_the_plan_is_made(project: Path) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(3))
    done = batchq("plan", "job=mine", "engine=fake", cwd=project, streams="2>&-")
    assert done.returncode == 0 and "plan of mine" in done.stdout


def test_cfg_job_prints_the_configuration_and_leaves_nothing_behind(project: Path) -> None:
    done = batchq("job=mine", "engine.max_model_len=77", "--cfg", "job", cwd=project)
    assert done.returncode == 0, done.stderr
    assert "max_model_len: 77" in done.stdout
    assert [p.name for p in project.iterdir()] == ["conf"]


def test_a_sweep_runs_each_and_returns_the_worst_code(project: Path) -> None:
    write_jsonl(project / "rows.jsonl", rows_of(3))
    done = batchq("plan", "job=mine", "-m", "engine=fake", "input.limit=1,2,-1", cwd=project)
    assert done.returncode == 2
    assert done.stdout.count("batchq · plan of mine") == 2
    assert "input.limit=-1: must be above 0" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in project.iterdir()) == ["conf", "rows.jsonl"]


def test_doctor_says_when_every_process_compiles_vllm_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path))
    assert main(["doctor"]) == 0
    assert "vllm has no bytecode" in capsys.readouterr().out
    vllm = find_spec("vllm")
    assert vllm and vllm.origin
    compiled = Path(cache_from_source(vllm.origin))
    compiled.parent.mkdir(parents=True)
    compiled.touch()
    assert main(["doctor"]) == 0
    assert "bytecode" not in capsys.readouterr().out


def test_every_exit_code_has_words_in_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out.partition("exit codes\n")[2].partition("\n\n")[0].splitlines()
    assert [line.split()[0] for line in listed] == [str(int(code)) for code in ExitCode] == list("01234567")


def test_doctor_needs_no_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert "ray 2." in capsys.readouterr().out


def test_the_fake_engine_needs_no_weights(
    compose: Callable[..., Config], project: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = project / "tokenizer"
    folder.mkdir()
    for file in [*tiny.glob("*.json"), *tiny.glob("*.jinja")]:
        if "index" not in file.name:
            shutil.copy(file, folder)
    write_jsonl(project / "rows.jsonl", rows_of(5))
    asked = ["job=mine", f"model.path={folder}"]
    assert main(["plan", *asked, "engine=fake"]) == 0 and "0.00 GB of weights" in capsys.readouterr().out
    assert main([*asked, "engine=fake"]) == 0 and "5 = 5 answers" in capsys.readouterr().out
    assert main(["plan", *asked, "engine=vllm"]) == 2
    assert "no *.safetensors there; batchq loads safetensors only" in capsys.readouterr().err
