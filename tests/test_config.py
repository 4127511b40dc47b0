"""The configuration's fields: each is explained, each range holds, and the groups are found wherever they are."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchq import config as face
from batchq.config import Config, check, conf_dir, fields, folders
from batchq.config.check import check_pricing
from batchq.errors import ConfigError

GROUPS = {field.name: field.default_factory for field in dataclasses.fields(Config)}
RANGED = sorted(name for name, field, _ in fields.leaves(Config()) if "range" in field.metadata)


@pytest.mark.parametrize("group", sorted(GROUPS))
def test_each_field_is_explained_in_a_paragraph(group: str) -> None:
    kind: Any = GROUPS[group]
    docs = fields.docs(kind)
    assert list(docs) == [field.name for field in dataclasses.fields(kind)]
    assert all(docs.values())


def test_a_paragraph_is_one_line() -> None:
    docs = fields.docs(face.QuantizationConfig)
    assert docs["samples"].endswith("never from those that the gate judges by; or from `calibration`.")
    assert docs["smoothing"] == "SmoothQuant's migration strength, 0 to 1."


@pytest.mark.parametrize("name", RANGED)
def test_a_number_out_of_its_range_is_named(name: str, compose: Callable[..., Config]) -> None:
    config = compose()
    path, _, field = name.rpartition(".")
    node = operator.attrgetter(path)(config)
    setattr(node, field, {"H100": -1} if isinstance(getattr(node, field), dict) else -1)
    with pytest.raises(ConfigError, match=rf"^{name}(\.H100)?=-1: "):
        check(config)


def test_every_number_has_a_range_or_is_a_seed() -> None:
    free = {n for n, f, v in fields.leaves(Config()) if str(f.type).startswith(("int", "float")) and n not in RANGED}
    assert free == {"task.seed", "quantization.seed", "gate.seed", "gate.min_gold"}


@pytest.mark.parametrize(
    ("price", "said"), [(0.0, None), (-2.0, "pricing.per_hour.H100=-2: a price can't be negative")]
)
def test_a_price_may_be_nothing_and_not_less(price: float, said: str | None) -> None:
    pricing = face.PricingConfig(per_hour={"H100": price})
    if said is None:
        assert check_pricing(pricing) is pricing
    else:
        with pytest.raises(ConfigError, match=said):
            check_pricing(pricing)


def test_the_groups_are_in_the_package_in_a_wheel_and_beside_it_in_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (conf_dir() / "config.yaml").is_file()
    monkeypatch.setattr(folders, "PACKAGE", tmp_path / "batchq")
    assert conf_dir() == tmp_path / "conf"
    (tmp_path / "batchq/conf").mkdir(parents=True)
    assert conf_dir() == tmp_path / "batchq/conf"


def test_the_face_names_what_it_holds() -> None:
    assert sorted(face.__all__, key=str.lower) and all(hasattr(face, name) for name in face.__all__)
    assert callable(face.check) and callable(face.choices)
