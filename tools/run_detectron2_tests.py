#!/usr/bin/env python3
"""Runs Detectron2's own tests without and with this package, and says what differs.

    git clone https://github.com/facebookresearch/detectron2
    tools/run_detectron2_tests.py --detectron2 detectron2 tests/layers tests/modeling

The tests are those of the checkout, which should be of the version that is installed; what they
import is the Detectron2 of the environment. Tests that fail both times are no difference. Exit
status 1 if there is one.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Dict, List


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--detectron2", type=Path, required=True, help="a checkout of it")
    parser.add_argument(
        "tests", nargs="*", default=["tests"], help="files or folders in it; default: all tests"
    )
    args = parser.parse_args()
    checkout = args.detectron2.resolve()
    tests = [checkout / test for test in args.tests]
    for test in tests:
        if not test.exists():
            parser.error(f"--detectron2: expected a checkout of Detectron2, found no {test}")

    without = outcomes("detectron2", checkout, tests)
    present = outcomes("wsbcn_d2", checkout, tests)  # to import it is to register it
    different = sorted(
        f"{test}: {without.get(test, 'missing')} without, {present.get(test, 'missing')} with"
        for test in without.keys() | present.keys()
        if without.get(test) != present.get(test)
    )
    print(f"{len(without)} tests without wsbcn_d2, {len(present)} with; differ: {len(different)}")
    if different:
        sys.exit("\n".join(different))


def outcomes(package: str, checkout: Path, tests: List[Path]) -> Dict[str, str]:
    """Runs tests in a process that has imported a package first.

    Returns:
        For each test "passed", "failure", "error" or "skipped".
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-p", package, "-p", "no:cacheprovider", "-q"]
        command += ["--assert=plain", "--no-summary", "--continue-on-collection-errors"]
        # No settings of a project around the checkout.
        command += ["-c", os.devnull, f"--rootdir={checkout}", f"--junitxml={report}"]
        # Detectron2 is to be imported from the environment, and in both cases from the same place:
        # neither the current folder nor the checkout is where Python looks.
        command += ["--import-mode=importlib", *map(str, tests)]
        print(f"With {package}:", flush=True)
        status = subprocess.run(command, cwd=folder).returncode
        if status > 1:  # other than passed or failed
            sys.exit(f"pytest ended with status {status}")
        found = {}
        for case in ElementTree.parse(report).iter("testcase"):
            tags = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
            found[f"{case.get('classname')}::{case.get('name')}"] = tags[0] if tags else "passed"
        return found


if __name__ == "__main__":
    main()
