"""The promises of the README's section SECURITY, each tried on real folders and real processes."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_trainer.config.settings import RunConfig
from qlora_trainer.errors import UserError
from qlora_trainer.export.companions import companions
from qlora_trainer.run.check import load_run
from tests.run.conftest import make_run, tiny_model, tiny_run

__all__ = ["make_run", "tiny_model"]  # pytest finds fixtures by their names here

Make = Callable[..., RunConfig]
SECRETS = {
    "HF_TOKEN": "hf_" + "s3cretTokenOfTheHub" * 2,
    "HUGGING_FACE_HUB_TOKEN": "hf_" + "olderNameOfTheToken" * 2,
    "WANDB_API_KEY": "5ecre7" * 6 + "feed",
    "AWS_SECRET_ACCESS_KEY": "aws-s3cret-key-of-the-user",
}
NARROW = ("sh", "-c", 'umask 027 && exec "$@"', "sh")  # a mask no test machine has by itself
# Refuses and notes every attempt to reach another machine, in the process and in those it starts
# (Python imports `sitecustomize` by itself); families of addresses 1 and 16 stay on the machine.
WATCH = """
import os, sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto") and arguments[0].family not in (1, 16):
        note = repr(arguments[1:])
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        note = repr(arguments)
    else:
        return
    with open(os.environ["NOTED"], "a") as file:
        file.write(f"{event} {note}\\n")
    raise OSError(101, "Network is unreachable")
sys.addaudithook(watch)
"""


def write_run(run: RunConfig, tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run.model_dump(mode="json")))
    return file


def qlora(
    *arguments: str | Path, environment: dict[str, str], before: tuple[str, ...] = ()
) -> "subprocess.CompletedProcess[str]":
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "HF_", "HUGGING"))}
    words = [*before, sys.executable, "-m", "qlora_trainer", *map(str, arguments)]
    return subprocess.run(
        words, env=kept | environment, capture_output=True, text=True, check=False, timeout=300
    )


@dataclass(frozen=True)
class Walk:
    """What a walk through the commands left: its folder, its words, and how it was cut off."""

    folder: Path
    said: str
    watched: dict[str, str]
    not_cut_off: str | None


def cut_off() -> tuple[tuple[str, ...], str | None]:
    """How a program is started without any network; without a way, why there is none."""
    words = ("unshare", "--net", "--map-root-user")
    if shutil.which(words[0]) is None:
        return (), "there is no `unshare` here to cut the network off with"
    tried = subprocess.run([*words, "true"], capture_output=True, check=False, text=True)
    return (words, None) if tried.returncode == 0 else ((), tried.stderr.strip())


@pytest.fixture(scope="module")
def walk(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Walk:
    """Profile, train, evaluate, export and a refusal: no network, and secrets at hand."""
    place = tmp_path_factory.mktemp("walk")
    (place / "watch").mkdir()
    (place / "watch" / "sitecustomize.py").write_text(WATCH)
    before, reason = cut_off()
    watched = {"PYTHONPATH": str(place / "watch"), "NOTED": str(place / "noted")}
    environment = SECRETS | watched
    environment |= {"WANDB_MODE": "offline", "MPLBACKEND": "Agg", "HOME": str(place)}
    trackers: dict[str, Any] = {"trackers": ["tensorboard", "wandb"]}
    run = tiny_run(tiny_model, place, output=trackers, train={"max_steps": 2})
    file, named = write_run(run, place), place / "<img src=x onerror=alert(1)>"
    named.symlink_to(tiny_model, target_is_directory=True)
    profile = ("profile", file, "--gpu", "rtx-4090-24gb", "--report", place / "page.html",
               "--set", f"model.source={json.dumps(str(named))}")  # fmt: skip
    said = ""
    for code, arguments in (
        (0, profile),
        (0, ("train", file)),
        (0, ("evaluate", run.output.folder)),
        (0, ("export", run.output.folder, "--out", place / "merged")),
        (2, ("train", file, "--restart", "--set", "model.source=nobody/no-such-model")),
    ):
        offline = {} if code == 0 else {"HF_HUB_OFFLINE": "1"}
        done = qlora(*arguments, environment=environment | offline, before=(*before, *NARROW))
        assert done.returncode == code, (arguments, done.stdout[-1500:], done.stderr[-1500:])
        said += done.stdout + done.stderr
    return Walk(place, said, watched, reason)


@pytest.mark.slow
def test_nothing_reaches_for_the_network_unasked(walk: Walk) -> None:
    noted = Path(walk.watched["NOTED"])
    assert not noted.exists(), noted.read_text()
    tried = [sys.executable, "-c", "import socket; socket.create_connection(('localhost', 9))"]
    subprocess.run(tried, env=os.environ | walk.watched, capture_output=True, check=False)
    assert "getaddrinfo" in noted.read_text(), "the watch sees nothing, so it proves nothing"
    noted.unlink()


@pytest.mark.slow
def test_everything_works_with_the_network_cut_off(walk: Walk) -> None:
    if walk.not_cut_off is not None:
        pytest.skip(walk.not_cut_off or "`unshare --net` is refused here, without a word why")
    assert (walk.folder / "merged" / "model.safetensors").is_file()


@pytest.mark.slow
def test_tokens_and_keys_are_written_nowhere(walk: Walk) -> None:
    leaks = [(name, "output") for name, secret in SECRETS.items() if secret in walk.said]
    for path in walk.folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        leaks += [(name, str(path)) for name, value in SECRETS.items() if value.encode() in content]
    assert leaks == []


@pytest.mark.slow
def test_what_a_run_writes_is_as_open_as_the_user_lets_it_be(walk: Walk) -> None:
    modes = {
        path: path.stat().st_mode & 0o777
        for part in ("run", "merged")
        for path in (walk.folder / part).rglob("*")
        if "wandb" not in path.parts
    }
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o640}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o750}
    store = next(path.parent for path in (walk.folder / "cache").rglob("meta.json"))
    assert store.stat().st_mode & 0o077 == 0, "a cache may be shared; the rows are the user's"


@pytest.mark.slow
def test_a_page_escapes_what_it_shows(walk: Walk) -> None:
    text = (walk.folder / "page.html").read_text()
    assert "&lt;img src=x onerror=alert(1)&gt;" in text
    assert "<img" not in text


def copied(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "model"))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# Opens the model of a run file, and says what was refused.
OPEN = """
import sys
from pathlib import Path
from qlora_trainer.errors import UserError
from qlora_trainer.run.check import load_run
from qlora_trainer.training.open_model import open_model
try:
    open_model(load_run(Path(sys.argv[1])))
except UserError as error:
    print(error)
"""


def refusal_to_open(file: Path, modules: Path) -> str:
    """What is said of a model in a process of its own: transformers reads the place at import."""
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(file)],
        env=os.environ | {"HF_MODULES_CACHE": str(modules)},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("consent", [False, True])
def test_code_of_a_model_runs_by_consent_only(
    make_run: Make, tiny_model: Path, tmp_path: Path, consent: bool
) -> None:
    model, ran, modules = copied(tiny_model, tmp_path), tmp_path / "ran", tmp_path / "modules"
    (model / "mine.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        f"Path({str(ran)!r}).write_text('code of the model ran')\n"
        "class MyConfig(LlamaConfig):\n    model_type = 'mine'\n"
        "class MyModel(LlamaForCausalLM):\n    config_class = MyConfig\n"
        "class MyTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    classes = {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"}
    edit(model / "config.json", auto_map=classes, model_type="mine")
    edit(
        model / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "mine.MyTokenizer"]},
        tokenizer_class="MyTokenizer",
    )
    file = write_run(make_run(model={"source": str(model), "trust_remote_code": consent}), tmp_path)
    refusal = refusal_to_open(file, modules)
    if consent:
        assert refusal == ""
        assert ran.exists(), "the trap does not work"
        assert list(modules.rglob("mine.py")), "the code was kept elsewhere"
    else:
        assert "set model.trust_remote_code = true" in refusal
        edit(model / "config.json", model_type="llama")  # known: taken from transformers
        assert "trust_remote_code" in refusal_to_open(file, modules)
        assert not ran.exists()


def test_links_out_of_a_folder_are_not_copied_into_an_export(tmp_path: Path) -> None:
    secret = tmp_path / "id_rsa"
    secret.write_text("private key")
    model = tmp_path / "model"
    (model / "additional_chat_templates").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "tokenizer.json").write_text("{}")
    (model / "vocab.txt").symlink_to("tokenizer.json")
    assert companions(model, None).keys() == {
        "additional_chat_templates", "tokenizer.json", "vocab.txt"
    }  # fmt: skip
    (model / "notes.txt").symlink_to(secret)
    (model / "additional_chat_templates" / "a.jinja").symlink_to(secret)
    with pytest.raises(UserError, match=r"(?s)\(2 faults\).*a\.jinja: leads to .*id_rsa.*notes\.t"):
        companions(model, None)


def test_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "cafe").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/cafe")
    assert companions(snapshot, None).keys() == {"tokenizer.json"}


def test_the_run_file_it_leaves_holds_settings_alone(make_run: Make, tmp_path: Path) -> None:
    file = write_run(make_run(), tmp_path)
    file.write_text(file.read_text() + "hf_token: hf_abcdefgh\n")
    with pytest.raises(UserError, match="hf_token") as refused:
        load_run(file)
    assert "hf_abcdefgh" not in str(refused.value)
