import json
import random
import struct

import pytest
from damage import REGIONS, corrupt, poisoned
from training_process import newest_whole_step, saved_states


def write_state(folder, step):
    import hashlib

    state = folder / "states" / f"step-{step:08d}"
    state.mkdir(parents=True)
    (state / "adapter.safetensors").write_bytes(bytes(range(200)))
    digest = hashlib.sha256(bytes(range(200))).hexdigest()
    (state / "manifest.json").write_text(
        json.dumps({"adapter.safetensors": {"bytes": 200, "sha256": digest}})
    )
    return state


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("name", ["adapter.safetensors", "manifest.json"])
def test_every_damage_makes_a_state_no_longer_whole(tmp_path, region, name):
    write_state(tmp_path, 4)
    assert newest_whole_step(tmp_path) == 4
    corrupt(write_state(tmp_path, 8) / name, region, random.Random(1))
    assert [state.name for state in saved_states(tmp_path)] == ["step-00000004", "step-00000008"]
    assert newest_whole_step(tmp_path) == 4


def test_a_poisoned_weight_is_not_a_number_and_mended_after(tmp_path):
    header = {
        "embed.weight": {"dtype": "BF16", "shape": [100, 100], "data_offsets": [0, 20000]},
        "x.weight": {"dtype": "BF16", "shape": [100, 100], "data_offsets": [20000, 40000]},
    }
    head = json.dumps(header).encode()
    content = struct.pack("<Q", len(head)) + head + bytes(40000)
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with poisoned(tmp_path):
        at = 8 + len(head) + 20000
        assert file.read_bytes()[at : at + 2] == b"\xc0\x7f"
    assert file.read_bytes() == content
