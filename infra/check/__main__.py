"""Try what infra/ claims: run what can be run on one machine, and hold the rest against its reader's schema.

    python -m infra.check                     # all but images; under 15 minutes on two cores, as root
    python -m infra.check airflow kubernetes  # some areas
    python -m infra.check images              # builds an image: minutes and 2 GB more
    python -m infra.check vllm                # real engines on two hosts: minutes

Installs what it needs into .infra/. Prints a table and ends in exit code 1 unless every check held.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from pathlib import Path

from infra.check import (
    airflow,
    airflow_kubernetes,
    docker,
    hosts,
    images,
    kubernetes,
    prometheus,
    ray_jobs,
    schedules,
    stores,
)
from infra.check.check import Check, Missing

# A module of checks is imported here and its CHECKS are listed, no more.
CHECKS: list[Check] = [
    *airflow.CHECKS,
    *airflow_kubernetes.CHECKS,
    *docker.CHECKS,
    *images.CHECKS,
    *kubernetes.CHECKS,
    *prometheus.CHECKS,
    *schedules.CHECKS,
    *stores.CHECKS,
    *ray_jobs.CHECKS,
    *hosts.CHECKS,
]
APART = ("images", "vllm")  # areas that are tried only when they are named


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    areas = sorted({check.area for check in CHECKS})
    parser.add_argument("areas", nargs="*", help=f"of {', '.join(areas)}")
    parser.add_argument("--quick", action="store_true", help="only what takes seconds and installs nothing")
    args = parser.parse_args()
    if unknown := [area for area in args.areas if area not in areas]:
        parser.error(f"no area {unknown[0]}; there are {', '.join(areas)}")
    asked = [c for c in CHECKS if (c.area in args.areas if args.areas else c.area not in APART)]
    if args.quick:
        asked = [check for check in asked if check.quick]
    print("| area | what | how | seconds | outcome |\n|---|---|---|---|---|")
    failed = 0
    for check in asked:
        began = time.monotonic()
        outcome, held = tried(check)
        failed += not held
        print(
            f"| {check.area} | {check.what} | {check.how.value} | {time.monotonic() - began:.0f} | {outcome} |",
            flush=True,
        )
    print(f"\n{len(asked)} checks, {failed} failed")
    return 1 if failed else 0


def tried(check: Check) -> tuple[str, bool]:
    """What a check says, and whether it held."""
    with tempfile.TemporaryDirectory(prefix=f"batchq-infra-{check.area}-") as work:
        try:
            return check.act(Path(work)), True
        except Missing as error:
            return f"MISSING: {error}", False
        except Exception as error:  # the table goes on
            traceback.print_exc()
            return f"FAILED: {str(error).splitlines()[0] if str(error) else type(error).__name__}", False


if __name__ == "__main__":
    sys.exit(main())
