"""A row's gold value -> the label that it means, by one rule: case, spaces around, and how a number is written don't
count."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from batchq.config import TaskConfig
from batchq.errors import RowError
from batchq.task import answers
from batchq.task.answers import folded, number_in

NO_TEXT = frozenset({"", "nan", "<na>"})  # how nulls come out of tables as text
NO_LABEL = NO_TEXT | {"none", "null", "nat"}  # where the answer is free, these may be the answer


class Gold:
    """Reads the column that task.gold names. Thread-safe."""

    def __init__(self, config: TaskConfig) -> None:
        self.column = config.gold
        self.labels = answers.of(config).labels
        alike = Counter(map(folded, self.labels))
        self._folded = {folded(label): label for label in self.labels if alike[folded(label)] == 1}
        self._numbers = {number: label for label in self.labels if (number := number_in(label)) is not None}

    def of(self, columns: Mapping[str, Any]) -> str | None:
        """The label, or the text itself where it means none of them; None for no gold: null, NaN, nothing, or what
        Python can't hold."""
        try:
            value = columns.get(self.column) if self.column else None
        except RowError:
            return None
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return None
        text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
        if text in self.labels:
            return text
        key = folded(text)
        if not self.labels:
            return None if key in NO_TEXT else text
        if (label := self._folded.get(key)) is not None:
            return label
        if (number := number_in(text)) is not None and (label := self._numbers.get(number)) is not None:
            return label
        return None if key in NO_LABEL else text
