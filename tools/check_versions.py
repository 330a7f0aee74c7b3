#!/usr/bin/env python3
"""Runs the tests with the versions of requirements/versions.yaml, and writes docs/versions.md.

    tools/check_versions.py oldest newest
    tools/check_versions.py --page-only

Every set gets a virtual environment of its own, with Detectron2 compiled from its source (10
minutes and 6 GiB each). What is there already is kept, so that a run that was interrupted goes on.
"""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any, Dict, List

import yaml

from wsbcn_d2.engine.checkpoint import atomic_write

ROOT = Path(__file__).resolve().parents[1]
SETS = ROOT / "requirements" / "versions.yaml"
RESULTS = ROOT / "docs" / "data" / "versions.json"
PAGE = ROOT / "docs" / "versions.md"
BEGIN = "<!-- begin: written by tools/check_versions.py -->"
END = "<!-- end -->"

# Whose versions are in the table.
SHOWN = ("torch", "torchvision", "numpy", "pycocotools")


def main() -> None:
    sets: Dict[str, Dict[str, Any]] = yaml.safe_load(SETS.read_text())
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"of {', '.join(sets)}; default all")
    parser.add_argument(
        "--source",
        default="https://github.com/facebookresearch/detectron2",
        help="source of Detectron2, for git; default: %(default)s",
    )
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "output" / "versions", help="folder for environments"
    )
    parser.add_argument("--page-only", action="store_true", help=f"write {PAGE.name} and stop")
    args = parser.parse_args()
    unknown = sorted(set(args.sets) - set(sets))
    if unknown:
        parser.error(f"{SETS} has no {', '.join(unknown)}, but {', '.join(sets)}")

    failed = []
    for name in [] if args.page_only else args.sets or sets:
        python = make_environment(args.folder.absolute() / name, args.source, sets[name])
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        results[name] = {"detectron2": sets[name]["detectron2"], **run_tests(python)}
        with atomic_write(str(RESULTS), "w") as f:
            json.dump(results, f, indent=1, sort_keys=True)
        write_page()  # which the tests of the next set compare with the results
        if results[name]["failed"]:
            failed.append(name)
    if args.page_only:
        write_page()
    sys.exit(f"Tests failed with: {', '.join(failed)}" if failed else 0)


def write_page() -> None:
    """Shows all results in the page."""
    before, rest = PAGE.read_text().split(BEGIN)
    page = f"{before}{BEGIN}\n\n{table(json.loads(RESULTS.read_text()))}\n\n{END}"
    with atomic_write(str(PAGE), "w") as f:
        f.write(page + rest.split(END)[1])


def make_environment(folder: Path, source: str, versions: Dict[str, Any]) -> Path:
    """Installs what is missing; returns the Python of the environment."""
    python = folder / "bin" / "python"
    log = folder / "install.log"
    complete = folder / "complete"
    if not complete.exists() or json.loads(complete.read_text()) != versions:
        print(f"Installing {folder}; see {log}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "--progress-bar", "off"]
        detectron2 = f"git+{source}@{versions['detectron2']}"
        with open(log, "w") as output:
            for arguments in (
                [*versions["packages"], "wheel", "ninja"],
                # its setup.py imports torch
                [*versions["packages"], "--no-build-isolation", detectron2],
                [
                    *versions["packages"],
                    "opencv-python-headless",
                    "--editable",
                    f"{ROOT}[digits,test]",
                ],
            ):
                command = [*pip, *arguments]
                print("+", *command, file=output, flush=True)
                subprocess.run(command, check=True, stdout=output, stderr=subprocess.STDOUT)
        complete.write_text(json.dumps(versions))
    return python


def run_tests(python: Path) -> Dict[str, Any]:
    """Returns the versions in an environment and how the tests went in it."""
    code = (
        "import importlib.metadata as m, json, platform, torch, detectron2;"
        f"v = {{name: m.version(name) for name in {SHOWN!r}}};"
        "v['python'] = platform.python_version(); print(json.dumps(v))"
    )
    versions = subprocess.run(
        [python, "-c", code], check=True, stdout=subprocess.PIPE, universal_newlines=True
    ).stdout.splitlines()[-1]
    start = time.monotonic()
    with subprocess.Popen(
        [python, "-m", "pytest", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        universal_newlines=True,
    ) as process:
        lines: List[str] = []
        for line in process.stdout or []:
            print(line, end="", flush=True)
            lines.append(line)
    summary = next((line for line in reversed(lines) if re.search(r"\d+ passed", line)), "")
    if process.returncode not in (0, 1) or not summary:
        sys.exit(f"The tests did not run to their end: {python} ended with {process.returncode}.")
    counts = {word: 0 for word in ("passed", "failed", "skipped", "error")}
    for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", summary):
        counts[word] = int(count)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        universal_newlines=True,
    ).stdout.strip()
    return {
        "versions": json.loads(versions),
        "passed": counts["passed"],
        "failed": counts["failed"] + counts["error"],
        "skipped": counts["skipped"],
        "failures": [
            line.split(" - ")[0] for line in lines if line.startswith(("FAILED ", "ERROR tests"))
        ],
        "seconds": round(time.monotonic() - start),
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def table(results: Dict[str, Any]) -> str:
    """Markdown."""
    columns = [
        "set",
        "Detectron2",
        "Python",
        *SHOWN,
        "passed",
        "failed",
        "skipped",
        "minutes",
        "date",
        "commit",
    ]
    rows = [columns, ["---"] * len(columns)]
    for name, result in results.items():
        versions = result["versions"]
        rows.append(
            [
                name,
                result["detectron2"][:8],  # a tag or a commit
                versions["python"],
                *(versions[package] for package in SHOWN),
                *(str(result[key]) for key in ("passed", "failed", "skipped")),
                f"{result['seconds'] / 60:.0f}",
                result["date"],
                result["commit"],
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    main()
