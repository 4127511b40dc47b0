"""Where the parts of an output are that `verify` counts, and what lies there that is none of them."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa

from batchq import storage
from batchq.errors import BatchqError
from batchq.output import compaction, layout, objects, parts, receipts
from batchq.output.objects import Compacted, CompactedObject, Rows
from batchq.records import Plan, Receipt

CACHED = 8  # row groups, each of some 64 MiB: shards that are audited side by side lie in one or two


@dataclass(frozen=True, slots=True)
class Own:
    """A part in an object of its own."""

    uri: str

    @property
    def place(self) -> tuple[int, int] | None:
        return layout.parse_part(self.uri)

    def receipt(self) -> Receipt:
        return receipts.read(self.uri)

    def read(self, columns: list[str]) -> pa.Table:
        return parts.read(Rows(self.uri), columns)


@dataclass(frozen=True, slots=True)
class Among:
    """A part's rows in a compacted object, from the row `first` on."""

    uri: str
    object: CompactedObject
    first: int
    said: Receipt

    @property
    def place(self) -> tuple[int, int] | None:
        return (self.said.shard, self.said.part)

    def receipt(self) -> Receipt:
        return self.said

    def read(self, columns: list[str]) -> pa.Table:
        rows, offset = objects.holding(self.object, self.uri, self.first, self.said.usage.rows)
        return _read(rows, tuple(columns)).slice(offset, self.said.usage.rows)


@functools.lru_cache(CACHED)
def _read(rows: Rows, columns: tuple[str, ...]) -> pa.Table:
    return parts.read(rows, list(columns))


Places = Mapping[int, Mapping[int, Own | Among]]  # by shard, by part


def find(output: str, plan: Plan) -> tuple[Places, list[str], int]:
    """(the parts, what is wrong with what lies there, how many objects): of the compacted set, if one is announced."""
    compacted = objects.announced(output)
    return _compacted(output, compacted, plan) if compacted else _parts(output, plan)


def _parts(output: str, plan: Plan) -> tuple[Places, list[str], int]:
    places: dict[int, dict[int, Own | Among]] = defaultdict(dict)
    problems = []
    for stat in storage.list_objects(layout.data(output)):
        place = layout.parse_part(stat.uri)
        if place is None or place[0] >= len(plan.shards):
            problems.append(f"{stat.uri}: is none of this run's objects; readers take it for data")
        else:
            places[place[0]][place[1]] = Own(stat.uri)
    return places, problems, sum(map(len, places.values()))


def _compacted(output: str, compacted: Compacted, plan: Plan) -> tuple[Places, list[str], int]:
    """Each object has to be the one that was announced, to the byte; and parts that are still there hold its rows."""
    places: dict[int, dict[int, Own | Among]] = defaultdict(dict)
    problems = []
    folder = layout.compacted(output, compacted.folder)
    there = {stat.uri: stat.size for stat in storage.list_objects(folder)}
    for obj in compacted.objects:
        uri = storage.join(folder, obj.name)
        if (size := there.pop(uri, None)) is None:
            problems.append(f"{uri}: was announced and isn't there")
            continue
        try:
            if size != obj.size or compaction.digest(uri) != obj.sha256:
                problems.append(f"{uri}: isn't the object that was announced: its bytes are others")
            first = 0
            for said in receipts.read_each(uri):
                if said.part in places[said.shard]:
                    problems.append(f"{uri}: has part {said.part} of shard {said.shard} once more")
                elif said.shard >= len(plan.shards):
                    problems.append(f"{uri}: has rows of a shard that isn't the plan's")
                else:
                    places[said.shard][said.part] = Among(uri, obj, first, said)
                first += said.usage.rows
            if first != sum(obj.groups):
                problems.append(f"{uri}: holds {sum(obj.groups)} rows, and its receipts say {first}")
        except BatchqError as error:
            problems.append(str(error))
    problems += [f"{uri}: is none of this run's objects; readers take it for data" for uri in there]
    try:
        problems += [why for _, why in compaction.differences(output, compacted) if why]
    except BatchqError as error:
        problems.append(str(error))
    return places, problems, len(compacted.objects)
