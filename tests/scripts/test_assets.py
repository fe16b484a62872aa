import hashlib

import asset_files
import pytest
from asset_files import Package, Product, is_whole, make
from steps import Stop
from transformers import AutoTokenizer


@pytest.fixture
def product(tmp_path, monkeypatch):
    monkeypatch.setattr(asset_files, "CACHE", tmp_path)
    source = b"source package"
    package = Package("toy", "1.0", "toy-1.0.tar.gz", hashlib.sha256(source).hexdigest(), 0.1)
    package.path.parent.mkdir()
    package.path.write_bytes(source)

    def write(package, folder, python):
        (folder / "rows.txt").write_bytes(package.path.read_bytes())

    return Product("data/toy", package, 1, "a licence", write)


def test_a_made_folder_is_whole_and_says_its_licence(product, tmp_path):
    assert not is_whole(product)
    make(product, tmp_path)
    assert is_whole(product)
    assert '"a licence"' in product.manifest.read_text()
    assert [path.name for path in product.path.iterdir()] == ["rows.txt"]  # an export copies all
    assert {path.name for path in product.path.parent.iterdir()} == {"toy", "toy.manifest.json"}


@pytest.mark.parametrize("harm", ["change", "cut", "lose", "old recipe", "no manifest"])
def test_harm_is_noticed_and_repaired(product, tmp_path, harm):
    make(product, tmp_path)
    rows = product.path / "rows.txt"
    if harm == "change":
        rows.write_bytes(b"source pakcage")
    elif harm == "cut":
        rows.write_bytes(b"")
    elif harm == "lose":
        rows.unlink()
    elif harm == "old recipe":
        text = product.manifest.read_text()
        product.manifest.write_text(text.replace('"recipe": 1', '"recipe": 0'))
    else:
        product.manifest.unlink()
    assert not is_whole(product)
    make(product, tmp_path)
    assert is_whole(product)
    assert rows.read_bytes() == b"source package"


def test_a_failed_conversion_leaves_the_place_empty(product, tmp_path):
    def fail(*_):
        raise Stop("disk full")

    with pytest.raises(Stop, match="disk full"):
        make(Product("data/toy", product.package, 1, "a licence", fail), tmp_path)
    assert list(product.path.parent.iterdir()) == []


def test_the_right_package_file_is_not_downloaded_again(product, tmp_path):
    asset_files.fetch(product.package, tmp_path / "no-such-python")


def test_a_broken_package_file_is_downloaded_again(product, tmp_path):
    product.package.path.write_bytes(b"half a download")
    with pytest.raises(Stop, match="no-such-python could not be started"):
        asset_files.fetch(product.package, tmp_path / "no-such-python")


@pytest.mark.parametrize(("name", "said"), [("toy-1.0.tar.gz", "sha256 is"), ("toy.zip", "gave")])
def test_another_file_than_the_pinned_one_is_not_used(product, tmp_path, name, said):
    class Elsewhere(Package):
        def download(self, python, folder):
            (folder / name).write_bytes(b"another file")

    pinned = product.package
    package = Elsewhere("toy", "1.0", pinned.file, pinned.sha256, 0.1)
    pinned.path.unlink()
    with pytest.raises(Stop, match=said):
        asset_files.fetch(package, tmp_path)
    assert list(pinned.path.parent.iterdir()) == []


def test_only_what_is_not_whole_is_brought(product, tmp_path, capsys):
    asset_files.bring([product], tmp_path)
    assert "making .cache/data/toy" in capsys.readouterr().out
    asset_files.bring([product], tmp_path)
    assert "data/toy is there and whole" in capsys.readouterr().out


def test_the_real_tokenizer_sees_every_digit_alone_as_its_own_does(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokens = tokenizer.tokenize("In 2023 ab12cd")
    assert tokens == ["In", "Ġ", "2", "0", "2", "3", "Ġab", "1", "2", "cd"]
