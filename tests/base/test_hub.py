"""Claims of base/hub.py: a folder needs no network, the cache serves offline, the hub is pinned.

The online claims run in a process of their own (the tests themselves are offline) against a small
server on this machine that speaks the hub's protocol.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from qlora_trainer.base.hub import choose_files, resolve_model
from qlora_trainer.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SaveTiny = Callable[..., Path]


def lay_out_cache(cache: Path, name: str, files: dict[str, bytes], refs: tuple[str, ...]) -> Path:
    """A cache as huggingface_hub leaves it: blobs, snapshots that link to them, refs."""
    root = cache / ("models--" + name.replace("/", "--"))
    snapshot = root / "snapshots" / COMMIT
    (root / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    for file, content in files.items():
        blob = root / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / file).symlink_to(blob)
    for ref in refs:
        (root / "refs" / ref).write_text(COMMIT)
    return snapshot


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for source in (str(tmp_path / "owner" / "name"), "owner/name", "./owner/name"):
        model = resolve_model(source)
        assert model.folder == (tmp_path / "owner" / "name").resolve()
        assert (model.source, model.revision) == (source, None)


def test_a_local_folder_has_no_revisions(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.revision = 'main'.*local folder"):
        resolve_model(str(tmp_path), "main")


@pytest.mark.parametrize("source", ["/no/such/folder", "./model", "~/model", "a/b/c", "C:\\model"])
def test_what_looks_like_a_path_is_never_asked_of_the_hub(source: str) -> None:
    with pytest.raises(UserError, match="no such folder"):
        resolve_model(source)


def test_neither_folder_nor_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(UserError, match=r"model\.gguf is a file; name the folder"):
        resolve_model("model.gguf")
    with pytest.raises(UserError, match="neither a folder nor a hub name"):
        resolve_model("my model!")


@pytest.mark.parametrize("revision", [None, "main", "v1", COMMIT])
def test_the_cache_serves_offline_and_pins_the_commit(tmp_path: Path, revision: str | None) -> None:
    snapshot = lay_out_cache(tmp_path, "owner/name", {"config.json": b"{}"}, ("main", "v1"))
    model = resolve_model("owner/name", revision, cache_dir=tmp_path)
    assert model.folder == snapshot
    assert model.revision == COMMIT


def test_a_model_that_is_not_cached_cannot_be_had_offline(tmp_path: Path) -> None:
    lay_out_cache(tmp_path, "owner/name", {"config.json": b"{}"}, ("main",))
    for source, revision in (("owner/other", None), ("owner/name", "v2")):
        with pytest.raises(UserError, match="HF_HUB_OFFLINE forbids fetching it"):
            resolve_model(source, revision, cache_dir=tmp_path)


def test_only_what_a_run_needs_is_chosen() -> None:
    names = [
        "config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "modeling.py",
        "additional_chat_templates/tools.jinja", "original/params.json", "onnx/model.onnx",
        "pytorch_model.bin", "pytorch_model.bin.index.json", "model.safetensors.index.json",
        "model-1.safetensors", "consolidated.safetensors", "README.md", "merges.txt",
    ]  # fmt: skip
    chosen = choose_files(names, ["model-1.safetensors"], trust_remote_code=False)
    assert chosen == [
        "additional_chat_templates/tools.jinja", "chat_template.jinja", "config.json",
        "merges.txt", "model-1.safetensors", "model.safetensors.index.json", "tokenizer.json",
        "tokenizer.model",
    ]  # fmt: skip
    assert "modeling.py" in choose_files(names, [], trust_remote_code=True)


def test_every_kind_of_tokenizer_file_is_chosen() -> None:
    names = ["bpe.codes", "source.spm", "target.spm", "xlnet.tokenizer"]
    assert choose_files(names, [], trust_remote_code=False) == names


class Hub(ThreadingHTTPServer):
    """As much of the hub as a download needs: repositories of files at one commit."""

    repositories: dict[str, dict[str, bytes]]
    requested: list[str]
    claimed_bytes: int | None = None  # what the listing says of every size, if not the truth
    cut_once: set[str]  # files whose first answer breaks off half way

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    """One request to `Hub`."""

    server: Hub

    def log_message(self, *_: Any) -> None:
        """Stay quiet."""

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_json(self, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        parts = path.removeprefix("/api/models/").strip("/").split("/")
        name = "/".join(parts[:2])
        if name == "owner/gated":
            return self.refuse(403, "GatedRepo")
        if name not in self.server.repositories:
            return self.refuse(404, "RepoNotFound")
        files = self.server.repositories[name]
        if name == "owner/walled" and not path.startswith("/api/models/"):
            return self.refuse(403, "")  # as a token without the right to read files
        if not path.startswith("/api/models/"):
            return self.send_file(files, "/".join(parts[4:]))
        if parts[2:3] == ["revision"] and parts[3] not in ("main", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        if parts[2:3] == ["tree"]:
            listing = [
                {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for n, c in files.items()
            ]
            return self.send_json(listing)
        claimed = self.server.claimed_bytes
        siblings = [{"rfilename": n, "size": claimed or len(c)} for n, c in files.items()]
        return self.send_json({"id": name, "sha": COMMIT, "siblings": siblings})

    def send_file(self, files: dict[str, bytes], file: str) -> None:
        if file not in files:
            return self.refuse(404, "EntryNotFound")
        content = files[file]
        start = 0
        if (span := self.headers.get("Range")) and self.command == "GET":
            start = int(span.removeprefix("bytes=").split("-")[0])
        body = content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return None
        self.server.requested.append(f"{file}@{start}")
        if file in self.server.cut_once:
            self.server.cut_once.discard(file)
            body = body[: len(body) // 2]
        self.wfile.write(body)
        return None


@pytest.fixture
def hub(save_tiny: SaveTiny) -> Iterator[Hub]:
    """A running hub with a sound model, one without safetensors, and a gated one."""
    folder = save_tiny("llama", AutoModelForCausalLM, max_shard_size="60KB")
    sound = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    extra = {"pytorch_model.bin": b"pickle", "README.md": b"x", "original/params.json": b"{}",
             "consolidated.safetensors": b"copy"}  # fmt: skip
    server = Hub(("127.0.0.1", 0), Answer)
    server.repositories = {
        "owner/name": sound | extra,
        "owner/single": {"model.safetensors": b""},
        "owner/walled": {"model.safetensors": b""},
        "owner/pickled": {"config.json": b"{}", "pytorch_model.bin": b"pickle"},
    }
    server.requested, server.cut_once = [], set()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


_XET_FAILS = """
import huggingface_hub.file_download
def fail(*_, **__):
    raise RuntimeError({!r})
huggingface_hub.file_download.http_get = fail  # as hf_xet ends, which takes its place on the hub
"""
_CLIENT = """
import json, sys
from pathlib import Path
from qlora_trainer.base.hub import resolve_model
from qlora_trainer.errors import UserError
for source, revision in json.loads(sys.argv[1]):
    try:
        model = resolve_model(source, revision, cache_dir=Path(sys.argv[2]))
        print(json.dumps([str(model.folder), model.revision]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def resolve_online(
    endpoint: str, cache: Path, *sources: tuple[str, str | None], before: str = ""
) -> list[Any]:
    environment = os.environ | {
        "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HOME": str(cache / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
    }  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-c", before + _CLIENT, json.dumps(sources), str(cache)],
        capture_output=True, text=True, check=False, timeout=120, env=environment,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_a_hub_model_comes_pinned_whole_and_without_pickles(hub: Hub, tmp_path: Path) -> None:
    cut = next(name for name in hub.repositories["owner/name"] if name.startswith("model-"))
    hub.cut_once.add(cut)
    # huggingface_hub writes pieces of 10 MiB; what is lost in a break is less than one.
    hub.repositories["owner/name"][cut] = bytes(range(256)) * (24 * 2**12)
    cache = tmp_path / "cache"
    ((folder, revision),) = resolve_online(hub.endpoint, cache, ("owner/name", None))
    assert revision == COMMIT
    wanted = {
        name
        for name in hub.repositories["owner/name"]
        if not name.startswith(("pytorch", "README", "original", "consolidated"))
    }
    assert {path.name for path in Path(folder).iterdir()} == wanted
    for name in wanted:
        assert (Path(folder) / name).read_bytes() == hub.repositories["owner/name"][name]
    fetched = {request.split("@")[0] for request in hub.requested}
    assert fetched == wanted
    starts = [int(r.split("@")[1]) for r in hub.requested if r.startswith(cut)]
    assert starts == [0, 10 * 2**20]  # resumed where it broke off
    assert resolve_model("owner/name", cache_dir=cache).revision == COMMIT  # and offline from then


def test_refusals_of_the_hub_say_what_to_do(hub: Hub, tmp_path: Path) -> None:
    gated, missing, revision, pickled, walled = resolve_online(
        hub.endpoint,
        tmp_path / "cache",
        ("owner/gated", None),
        ("owner/mising", None),
        ("owner/name", "v9"),
        ("owner/pickled", None),
        ("owner/walled", None),
    )
    assert f"owner/gated is gated: accept its conditions at {hub.endpoint}/owner/gated" in gated
    assert "hf auth login" in gated
    assert "owner/mising is not on the hub, or is private" in missing
    assert "owner/name has no revision 'v9'" in revision
    assert "owner/pickled has no safetensors weights, only: pytorch_model.bin" in pickled
    assert "owner/walled: the hub refuses access (403); run `hf auth login`" in walled
    assert hub.requested == []


@pytest.mark.parametrize("shard", ["*.bin", "../x.safetensors"])
def test_an_index_cannot_ask_for_other_files(hub: Hub, tmp_path: Path, shard: str) -> None:
    weight_map = {"a.weight": "model-1.safetensors", "b.weight": shard}
    hub.repositories["owner/strange"] = {
        "config.json": b"{}", "pytorch_model.bin": b"pickle", "model-1.safetensors": b"",
        "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode(),
    }  # fmt: skip
    (text,) = resolve_online(hub.endpoint, tmp_path / "cache", ("owner/strange", None))
    assert "owner/strange: model.safetensors.index.json cannot be followed" in text
    assert shard in text
    assert hub.requested == ["model.safetensors.index.json@0"]  # and no weight


def test_a_disk_that_is_too_small_is_said_before_the_first_byte(hub: Hub, tmp_path: Path) -> None:
    hub.claimed_bytes = 2**60
    (text,) = resolve_online(hub.endpoint, tmp_path / "cache", ("owner/single", None))
    assert "owner/single: 1048576.0 TiB are still to come" in text
    assert "set HF_HOME to another disk" in text
    assert hub.requested == []


def test_without_a_network_the_cache_serves_and_else_the_way_out_is_said(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    snapshot = lay_out_cache(cache, "owner/name", {"config.json": b"{}"}, ("main",))
    nowhere = "http://127.0.0.1:9"  # the discard port: nobody answers
    cached, missing = resolve_online(nowhere, cache, ("owner/name", None), ("owner/other", None))
    assert cached == [str(snapshot), COMMIT]
    assert "owner/other (revision main) is not in the cache" in missing
    assert "the hub cannot be reached" in missing
    assert "a download resumes" in missing


@pytest.mark.parametrize("name", ["owner/name", "owner/single"])  # the index, the weights
def test_what_xet_raises_is_told_like_any_other_failure(
    hub: Hub, tmp_path: Path, name: str
) -> None:
    lost = "Task error: File reconstruction error: CAS Client Error: error sending request"
    full = "Data processing error: I/O error: No space left on device (os error 28)"
    (network,) = resolve_online(
        hub.endpoint, tmp_path / "a", (name, None), before=_XET_FAILS.format(lost)
    )
    assert f"{name} cannot be fetched (RuntimeError: {lost}); check the network" in network
    (disk,) = resolve_online(
        hub.endpoint, tmp_path / "b", (name, None), before=_XET_FAILS.format(full)
    )
    assert f"{name}: the disk is full" in disk


def test_a_pinned_commit_that_is_here_whole_is_not_asked_for(hub: Hub, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    files = hub.repositories["owner/name"]
    files["tokenizer.json"] = b"{}"
    ((folder, _),) = resolve_online(hub.endpoint, cache, ("owner/name", COMMIT))
    del hub.repositories["owner/name"]  # renamed, made private, or out of the rate limit
    pinned, newest = resolve_online(
        hub.endpoint, cache, ("owner/name", COMMIT), ("owner/name", None)
    )
    assert pinned == [folder, COMMIT]
    assert "owner/name is not on the hub, or is private" in newest
    hub.repositories["owner/name"] = files
    shard = next(path for path in Path(folder).iterdir() if path.name.startswith("model-"))
    for lost in (shard, Path(folder) / "tokenizer.json"):
        content = lost.read_bytes()
        lost.unlink()
        assert resolve_online(hub.endpoint, cache, ("owner/name", COMMIT)) == [[folder, COMMIT]]
        assert lost.read_bytes() == content  # from the hub
