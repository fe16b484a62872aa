"""A merge's memory is bounded by its largest tensor, measured from outside in a fresh process."""

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_merging_takes_at_most_three_largest_tensors_and_300_mb(tmp_path, monkeypatch):
    if not Path("/proc/self/status").exists():
        pytest.skip("private memory is read from /proc, which only Linux has")
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    import benchmark_export as benchmark

    benchmark.make_checkpoint(tmp_path, "ci")
    largest = 2 * 32000 * 2048
    for job in ("original", "dequantized"):
        measured = benchmark.measure(job, tmp_path, 1)
        assert measured["peak_private_bytes"] < 3 * largest + 300 * 10**6
        # What no merge that holds the model could do: half of it, and of the largest tensor twice.
        assert measured["peak_private_bytes"] < 2 * largest
