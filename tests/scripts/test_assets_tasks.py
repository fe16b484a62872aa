import gzip
import io
import json
import tarfile
import zipfile

import assets_images
import assets_translation
import pytest
from PIL import Image
from steps import Stop

CATALOGUE = r"""
msgid ""
msgstr "Project-Id-Version: django\n"

#: a.py:1
msgid "Save and \"go\""
msgstr ""
"Sichern und "
"\"los\""

#, fuzzy
msgid "Old"
msgstr "Alt"

msgid "%d day"
msgid_plural "%d days"
msgstr[0] "%d Tag"

msgid "Untranslated"
msgstr ""

msgid "Yes"
msgstr "Ja"
"""


def test_pairs_are_read_out_of_catalogues(tmp_path):
    wheel = tmp_path / "django.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for app in ("a", "b"):
            archive.writestr(f"{app}/locale/de/LC_MESSAGES/django.po", CATALOGUE)
        archive.writestr("a/locale/fr/LC_MESSAGES/django.po", CATALOGUE.replace("Ja", "Oui"))
    expected = [('Save and "go"', 'Sichern und "los"'), ("Yes", "Ja")]
    assert assets_translation.read_pairs(wheel, "de") == expected
    assert assets_translation.read_pairs(wheel, "fr")[1] == ("Yes", "Oui")


def idx(header: bytes, content: bytes) -> bytes:
    return gzip.compress(header + content)


@pytest.fixture
def package(tmp_path):
    """A Debian package with two pictures, as `ar` and `tar` write it."""
    files = {}
    for kind in ("train", "t10k"):
        pixels = bytes([9]) * 784 + bytes([200]) * 784
        files[f"{kind}-images-idx3-ubyte.gz"] = idx(bytes(16), pixels)
        files[f"{kind}-labels-idx1-ubyte.gz"] = idx(bytes(8), bytes([9, 0]))
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w:xz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./usr/share/datasets/fashion-mnist/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    parts = [("debian-binary", b"2.0"), ("data.tar.xz", tar.getvalue())]
    content = b"!<arch>\n"
    for name, part in parts:
        content += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(part):<10}`\n".encode()
        content += part + b"\n" * (len(part) % 2)
    path = tmp_path / "fashion.deb"
    path.write_bytes(content)
    return path


def test_pictures_are_written_beside_rows_that_name_them(package, tmp_path):
    assets_images.write_pictures(package, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert rows == [
        {"image": "train-00000.png", "label": "ankle boot"},
        {"image": "train-00001.png", "label": "t-shirt"},
    ]
    assert Image.open(tmp_path / "train-00001.png").getpixel((3, 3)) == 200
    assert (tmp_path / "eval-00001.png").is_file()


def test_half_a_package_is_refused(package):
    package.write_bytes(package.read_bytes()[:72])
    with pytest.raises(Stop, match="not a whole Debian package"):
        assets_images.read_debian(package)
