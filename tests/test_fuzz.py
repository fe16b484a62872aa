"""Whatever a stranger hands us: our own errors come out, or nothing. `scripts/fuzz.py` digs on."""

import copy
import gzip
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from fuzz_seeds import SEEDS
from fuzz_targets import TARGETS, run_target, small_tokenizer

TOKENIZER = small_tokenizer()
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def put_at(tree: Any, path: list[int], value: Any) -> Any:
    """The tree with one place in it replaced: numbers choose the way down."""
    if not isinstance(tree, dict | list) or not tree or not path:
        return value
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    key = keys[path[0] % len(keys)]
    changed = copy.copy(tree)
    changed[key] = put_at(tree[key], path[1:], value)
    return changed


@st.composite
def inputs(draw: st.DrawFn, name: str) -> bytes:
    """Anything; or a sound input with a value replaced, or bytes cut, replaced or put in."""
    seeds = SEEDS.get(name)
    if not seeds or draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    seed = draw(st.sampled_from(seeds))
    start = 1 if name == "saved state" else 0
    if seed[start : start + 1] in (b"{", b"[") and name != "chat template" and draw(st.booleans()):
        path = draw(st.lists(st.integers(0, 20), max_size=4))
        changed = put_at(json.loads(seed[start:]), path, draw(TREES))
        return seed[:start] + json.dumps(changed).encode()
    at, end = sorted(draw(st.tuples(*[st.integers(0, len(seed))] * 2)))
    middle = draw(st.binary(max_size=8) | st.text(max_size=8).map(str.encode))
    return seed[:at] + middle + seed[end:]


def lora(**changes: Any) -> bytes:
    return json.dumps({**json.loads(SEEDS["adapter config"][0]), **changes}).encode()


def llama(**changes: Any) -> bytes:
    return json.dumps({**json.loads(SEEDS["gguf config"][0]), **changes}).encode()


DEEP, LONG = "[" * 100_000, "9" * 5000
BROKEN_GZIP = gzip.compress(b'{"text": "a"}' * 99)[:12] + bytes(20)
# Each came out as a traceback, or did not come back, before it was mended.
FOUND = [
    ("rows .jsonl", b'{"text": "a", "label": 1000000000}'),
    ("rows .jsonl", b'{"text": "a", "label": ' + LONG[:400].encode() + b"}"),
    ("rows .jsonl", b'{"text": ' + LONG.encode() + b"}"),
    ("rows .json", b'[{"text": ' + LONG.encode() + b"}]"),
    ("rows .json", b'{"data": [{"title": ' + LONG.encode() + b"}]}"),
    ("rows .jsonl", b'{"text": "a", "label": "' + LONG.encode() + b'"}'),
    ("rows .jsonl", b'{"question": "q", "context": "c", "answer": "c", "answer_start": "--5"}'),
    ("rows .jsonl", b'{"question": "q", "context": "\\ud800", "answer": "c", "answer_start": 9}'),
    ("rows .jsonl", b'{"instruction": "i", "output": "o", "history": 5}'),
    ("rows .jsonl", json.dumps({"messages": DEEP}).encode()),
    ("rows .jsonl", json.dumps({"tokens": DEEP + "]", "tags": "O"}).encode()),
    ("rows .jsonl.gz", BROKEN_GZIP),
    ("chat template", b"{{ 1 / 0 }}"),
    ("chat template", b"{{ range(10 ** 9) }}"),
    ("chat template", b"{{ [] | first }}{{ messages[99] }}"),
    ("chat template", b"{{ strftime_now('\x00') }}"),
    ("run folder", b"null"),
    ("run folder", b'{"step": "1", "kind": 5}'),
    ("adapter config", lora(lora_alpha=10**400)),
    ("adapter config", lora(lora_dropout=10**400)),
    ("adapter config", lora(target_modules="a{99999999999999999999}")),
    ("adapter config", lora(target_modules="(" * 5000 + ")" * 5000)),
    ("adapter config", DEEP.encode()),
    ("index", b'{"weight_map": {"x": "../../etc/passwd"}}'),
    ("model config", DEEP.encode()),
    ("saved state", b"\x02" + DEEP.encode()),
    ("gguf tokenizer", b"{}"),
    ("gguf tokenizer", b"[1]"),
    ("gguf tokenizer", b'{"model": {"vocab": {"a": "0"}, "merges": []}}'),
    ("gguf tokenizer", b'{"model": {"vocab": {"a": 0}, "merges": [5]}}'),
    ("gguf config", llama(vocab_size=10**9)),
    ("gguf config", llama(num_hidden_layers=10**9)),
    ("run file", b"a: &a [*a, *a]\nb: [*a, *a]\n"),
]


@pytest.mark.parametrize(("name", "content"), FOUND, ids=lambda value: str(value)[:40])
def test_what_once_came_out_comes_out_no_more(name: str, content: bytes, tmp_path: Path) -> None:
    run_target(name, content, tmp_path, TOKENIZER)


@pytest.mark.parametrize("name", TARGETS)
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_nothing_but_our_own_errors_comes_out(name: str, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as place:
        run_target(name, data.draw(inputs(name)), Path(place), TOKENIZER)
