"""What a release consists of: its papers are written, and an audit is never taken for passed."""

from pathlib import Path

import release


def test_the_papers_of_this_version_are_written(tmp_path: Path) -> None:
    assert release.papers(tmp_path)["missing"] == []


def test_a_version_without_papers_is_told_what_to_write(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(release, "this_version", lambda: "99.0.0")
    found = release.papers(tmp_path)
    assert not found["done"]
    assert found["missing"] == [
        "CHANGELOG.md has no section [99.0.0]",
        "run scripts/release_run.py tests/releases/99.0.0",
    ]


def test_an_audit_names_what_is_vulnerable_and_what_it_could_not_look_up() -> None:
    good = {"name": "torch", "version": "2", "vulns": []}
    bad = {"name": "leaky", "version": "1", "vulns": [{"id": "PYSEC-1"}]}
    unknown = {"name": "ours", "skip_reason": "not on PyPI"}
    found = release.audited([good, bad])
    assert found["done"]
    assert found["vulnerable"] == {"leaky": ["PYSEC-1"]}
    found = release.audited([good, unknown])
    assert not found["done"]
    assert found["skipped"] == {"ours": "not on PyPI"}


def test_an_audit_without_a_way_to_the_advisories_has_not_been_done() -> None:
    found = release.audited([{"name": "torch", "skip_reason": "not on PyPI"}])
    assert found == {"done": False, "reason": "none of 1 packages looked up: not on PyPI"}
