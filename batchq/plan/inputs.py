"""Which objects are a run's input, and whether they still are those that were planned."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

from batchq import input, storage
from batchq.config import Config
from batchq.config.folders import user_conf_dir
from batchq.errors import Changed, InputError, NotFound
from batchq.input import Inputs
from batchq.machine.cache import cache_dir, cache_of
from batchq.records import InputObject, Plan

REPLACED = "is not the file that was planned; put it back, or choose a new output.path"
TOUCHED = (
    "was touched since it was planned: its size and time are the same, but the file system says that it changed. "
    "If only its mode or its place did, or a copy was put back, go on with input.trust_times=true; "
    "else choose a new output.path"
)


def list_inputs(config: Config, path: str | None = None) -> Inputs:
    """What is read: the corpus, or what another path means of the same format. Raises InputError."""
    asked = dataclasses.replace(config.input, path=path, version=None) if path else config.input
    inputs = input.list_input(asked, never(config))
    return dataclasses.replace(inputs, objects=_timed(config, inputs.objects))


def never(config: Config) -> dict[str, str]:
    """Where a run reads no input: its own output, its models, its configuration, and what it caches."""
    models = {"model.path": config.model.path, "gate.baseline": config.gate.baseline or ""}
    conf = user_conf_dir()
    return {
        input.OWN: config.output.path,
        "the cache": str(cache_dir()),
        "quantization.cache": cache_of(config.quantization),
        **{name: path for name, path in models.items() if path and not path.startswith(("hf://", "wheel://"))},
        **({"the configuration": str(conf)} if conf else {}),
    }


def left_out_words(plan: Plan) -> str:
    """What was there and is no input, why: how many files; empty if there was nothing else."""
    words = [f"{count:,} {'file' if count == 1 else 'files'} ({why})" for why, count in plan.left_out.items()]
    if plan.unreadable:
        words.append(f"{len(plan.unreadable):,} unreadable, such as {next(iter(plan.unreadable.values()))}")
    return ", ".join(words)


def obeyed(plan: Plan, config: Config) -> Plan:
    """The stored plan as this run obeys it: with input.trust_times its local files may have been touched."""
    return dataclasses.replace(plan, objects=tuple(_timed(config, list(plan.objects))))


def check_inputs(plan: Plan, config: Config) -> list[str]:
    """Compare the inputs with the plan's; returns the names that appeared since (they are not part of this run).

    Whatever is there beside them can't keep a planned run from going on. Raises Changed if a planned object is gone or
    is another one now.
    """
    try:
        listed = {each.uri: each for each in input.find_input(config.input, never(config)).objects}
    except InputError:  # of the planned objects the store knows more
        listed = {}
    with ThreadPoolExecutor(input.OPENED_AT_ONCE) as threads:
        unlisted = [each.uri for each in plan.objects if each.uri not in listed]
        there = dict(zip(unlisted, threads.map(_there, unlisted), strict=True))
    for planned in plan.objects:
        now = there.get(planned.uri) or listed.pop(planned.uri)
        _check(planned, now.size, now.etag, config.input.trust_times)
    return sorted(each.name for each in listed.values() if each.name not in plan.unreadable)


def _there(uri: str) -> storage.Stat:
    """A planned object that isn't listed any more. Raises Changed if it isn't there either."""
    try:
        return storage.stat(uri)
    except NotFound:
        raise Changed(f"{uri}: was planned and is gone; put it back, or choose a new output.path") from None


def _check(planned: InputObject, size: int, etag: str, trust_times: bool) -> None:
    if size != planned.size or not storage.same(storage.timed(planned.uri, planned.etag), etag):
        raise Changed(f"{planned.uri}: {REPLACED}")
    if not (trust_times or storage.same(planned.etag, etag)):
        raise Changed(f"{planned.uri}: {TOUCHED}")


def _timed(config: Config, objects: list[InputObject]) -> list[InputObject]:
    if not config.input.trust_times:
        return objects
    return [dataclasses.replace(each, etag=storage.timed(each.uri, each.etag)) for each in objects]
