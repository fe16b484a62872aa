"""A real run that gets no more memory from the system ends with a message, and then goes on."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from qlora_trainer.training.log import read_metrics
from tests.run.conftest import tiny_model, tiny_run

__all__ = ["tiny_model"]  # pytest finds fixtures by their names here


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of a running process")
def test_a_run_without_memory_says_so_and_keeps_its_states(
    tiny_model: Path, tmp_path: Path
) -> None:
    import resource

    data = tmp_path / "long.jsonl"
    told = " ".join(map(str, range(100, 129)))
    data.write_text("".join(json.dumps({"text": f"{n} {told}"}) + "\n" for n in range(32)))
    run = tiny_run(
        tiny_model,
        tmp_path,
        data={"train": str(data)},
        # logits of more than 32 MiB, which the C library asks of the system every time
        train={"max_steps": 4000, "micro_batch_size": 8, "loss_chunk_tokens": 1024},
        output={"folder": str(tmp_path / "run"), "save_every_steps": 1},
    )
    file, folder = tmp_path / "run.yaml", Path(run.output.folder)
    file.write_text(yaml.safe_dump(run.model_dump(mode="json")))
    with subprocess.Popen(
        [sys.executable, "-m", "qlora_trainer", "train", str(file)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        try:
            while len(read_metrics(folder / "metrics.jsonl")) < 2 and process.poll() is None:
                time.sleep(0.02)
            assert process.poll() is None, process.communicate()[1]
            # Less than it has: every request for more fails, at once.
            resource.prlimit(process.pid, resource.RLIMIT_AS, (2**28, 2**28))
            said = " ".join(process.communicate(timeout=300)[1].split())
        finally:
            process.kill()
    assert process.returncode == 2, said
    assert "the system gives this process no more memory" in said or "out of memory" in said
    assert "Traceback" not in said
    assert list((folder / "states").glob("step-*"))
