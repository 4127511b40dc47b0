"""The quick part of `make infra-test`: each check that takes seconds and installs nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.check.__main__ import CHECKS
from infra.check.check import Check


@pytest.mark.parametrize("check", [c for c in CHECKS if c.quick], ids=lambda c: f"{c.area}: {c.what}")
def test_what_infra_claims(check: Check, tmp_path: Path) -> None:
    assert check.act(tmp_path)
