"""Make what a release consists of: its papers, the wheel, the bill of materials, an audit.

    python scripts/release.py [--out dist]

    papers   CHANGELOG has a section of this version, and `tests/releases/` keeps a run of it
    wheel    the package, built without its dependencies
    sbom     every package of `.venv` with version, licence and hashes (CycloneDX, by cyclonedx-bom)
    audit    known vulnerabilities of the pinned set (pip-audit; asks the advisory service of PyPI)

The tools live in `.cache/release`, so that the environment that is listed is not changed by the
listing. Each step is reported in `release.json`; the audit needs a network, and one that could not
be done is told as such, never as passed. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from environment import CONSTRAINTS, venv_python
from steps import REPOSITORY, Stop, run_step, say, stop_with_message

TOOLS = REPOSITORY / ".cache" / "release"
TOOL_PINS = ("cyclonedx-bom==7.5.0", "pip-audit==2.10.1")
AUDIT_SECONDS = 300


def this_version() -> str:
    """The version the package says it has."""
    text = (REPOSITORY / "qlora_trainer" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if match is None:
        raise Stop("qlora_trainer/__init__.py names no __version__")
    return match.group(1)


def papers(out: Path) -> dict[str, Any]:
    """What must have been written before."""
    version, changelog = this_version(), (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    missing = []
    if f"\n## [{version}]" not in changelog:
        missing.append(f"CHANGELOG.md has no section [{version}]")
    if not (REPOSITORY / "tests" / "releases" / version).is_dir():
        missing.append(f"run scripts/release_run.py tests/releases/{version}")
    return {"done": not missing, "version": version, "missing": missing}


def wheel(out: Path) -> dict[str, Any]:
    """The package as it is installed."""
    shutil.rmtree(REPOSITORY / "build", ignore_errors=True)  # what it holds would be packed again
    pip = [venv_python(), "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run_step("Building the wheel", [*pip, "--wheel-dir", out, REPOSITORY])
    return {"done": True, "files": sorted(path.name for path in out.glob("*.whl"))}


def sbom(out: Path) -> dict[str, Any]:
    """Every package of the environment the tests passed with."""
    file = out / "sbom.cdx.json"
    command = [
        venv_python(TOOLS), "-m", "cyclonedx_py", "environment", "--gather-license-texts",
        "--pyproject", REPOSITORY / "pyproject.toml", "--output-reproducible",
        "--output-format", "JSON", "--output-file", file, venv_python(),
    ]  # fmt: skip
    run_step("Listing every package (SBOM)", command)
    listed = json.loads(file.read_text(encoding="utf-8"))
    return {"done": True, "file": file.name, "packages": len(listed["components"])}


def audit(out: Path) -> dict[str, Any]:
    """Ask for known vulnerabilities of the pinned versions."""
    file = out / "audit.json"
    file.unlink(missing_ok=True)  # of an earlier audit: one that fails now is not to pass by it
    command = [
        str(venv_python(TOOLS)), "-m", "pip_audit", "--requirement", str(CONSTRAINTS), "--no-deps",
        "--disable-pip", "--format", "json", "--output", str(file), "--progress-spinner", "off",
    ]  # fmt: skip
    say("\n== Asking for known vulnerabilities")
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=AUDIT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return {"done": False, "reason": f"no answer within {AUDIT_SECONDS} s"}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["dependencies"]
    except (OSError, ValueError, KeyError):
        return {"done": False, "reason": "\n".join(done.stderr.strip().splitlines()[-3:])}
    return audited(found)


def audited(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What pip-audit's list of packages comes to; one that was not looked up did not pass."""
    skipped = {d["name"]: d["skip_reason"] for d in found if "skip_reason" in d}
    if len(skipped) == len(found):
        reason = next(iter(skipped.values()), "no package was named")
        return {"done": False, "reason": f"none of {len(found)} packages looked up: {reason}"}
    bad = {d["name"]: [v["id"] for v in d["vulns"]] for d in found if d.get("vulns")}
    return {"done": not skipped, "packages": len(found), "skipped": skipped, "vulnerable": bad}


STEPS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "papers": papers,
    "wheel": wheel,
    "sbom": sbom,
    "audit": audit,
}


def main() -> int:
    """Command line: every step, and what came of it."""
    parser = argparse.ArgumentParser(description="Make what a release consists of.")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "dist")
    parser.add_argument("--only", choices=STEPS, nargs="+", default=list(STEPS))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {}
    try:
        if {"sbom", "audit"} & set(arguments.only):
            if not venv_python(TOOLS).exists():
                run_step(f"Making {TOOLS}", [sys.executable, "-m", "venv", TOOLS])
            pip = [venv_python(TOOLS), "-m", "pip", "install", "--quiet", "--no-input"]
            run_step("Installing the release tools", [*pip, *TOOL_PINS])
        for name in arguments.only:
            report[name] = STEPS[name](arguments.out)
            say(f"{name}: {json.dumps(report[name])[:400]}")
    except Stop as error:
        return stop_with_message(error)
    finally:
        text = json.dumps(report, indent=2) + "\n"
        (arguments.out / "release.json").write_text(text, encoding="utf-8")
    clean = all(step["done"] for step in report.values()) and not any(
        step.get("vulnerable") for step in report.values()
    )
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
