"""Nothing of the user's is changed: random files of all formats, labelled, and each value looked up in the output."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tables import FORMATS
from tests.unchanged import Bench


@pytest.mark.parametrize("format", FORMATS)
def test_every_value_of_the_users_comes_back(format: str, tiny: Path, tmp_path: Path) -> None:
    Bench(tiny, tmp_path).try_examples(format, 25, seed=0)
