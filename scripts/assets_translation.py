"""Real pairs to translate: Django's interface texts in English, German, French and Spanish.

    python scripts/assets_translation.py

They lie in gettext catalogues inside the package `django` (BSD-3-Clause), one version of which is
pinned; nothing of it is run. Entries marked fuzzy or with plural forms are left out. Most are short
(labels, messages): enough to see a model learn, not a benchmark of translation.

    .cache/data/django-en-{de,fr,es}/{train,eval}.jsonl     {"source": English, "target": ...}
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
from pathlib import Path

from asset_files import Package, Product, run_script, sha256_of_text, write_jsonl

DJANGO = Package(
    "django",
    "5.2.19",
    "django-5.2.19-py3-none-any.whl",
    "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00",
    8,
)
LANGUAGES = ("de", "fr", "es")
HELD_OUT = 100
_TEXT = re.compile(r'"((?:[^"\\]|\\.)*)"')


def read_pairs(wheel: Path, language: str) -> list[tuple[str, str]]:
    """English and translated texts, each pair once, in the order of the catalogues."""
    found: dict[tuple[str, str], None] = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(f"/locale/{language}/LC_MESSAGES/django.po"):
                for entry in archive.read(name).decode("utf-8").split("\n\n"):
                    if pair := read_entry(entry):
                        found[pair] = None
    return list(found)


def read_entry(entry: str) -> tuple[str, str] | None:
    r"""Source and translation of one gettext entry; None where it has none that is sure.

    >>> read_entry('#: a.py:1\nmsgid "Save"\nmsgstr "Sichern"')
    ('Save', 'Sichern')
    >>> read_entry('#, fuzzy\nmsgid "Save"\nmsgstr "Rettung"') is None
    True
    """
    if "#, fuzzy" in entry or "msgid_plural" in entry:
        return None
    source, target = (_field(entry, name) for name in ("msgid", "msgstr"))
    return (source, target) if source and target else None


def _field(entry: str, name: str) -> str:
    match = re.search(rf'^{name} ((?:"(?:[^"\\]|\\.)*"\s*)+)', entry, re.MULTILINE)
    parts = _TEXT.findall(match[1]) if match else []
    return "".join(json.loads(f'"{part}"') for part in parts).strip()


def pairs_of(language: str) -> Product:
    """The product of one language."""

    def write(package: Package, folder: Path, _: Path) -> None:
        pairs = sorted(read_pairs(package.path, language), key=lambda p: sha256_of_text(p[0]))
        rows = [{"source": source, "target": target} for source, target in pairs]
        write_jsonl(folder / "eval.jsonl", rows[:HELD_OUT])
        write_jsonl(folder / "train.jsonl", rows[HELD_OUT:])

    return Product(
        f"data/django-en-{language}",
        DJANGO,
        1,
        f"Interface texts of Django 5.2.19, English and {language}, BSD-3-Clause, (c) Django "
        "Software Foundation and its translators.",
        write,
    )


PRODUCTS = tuple(pairs_of(language) for language in LANGUAGES)


if __name__ == "__main__":
    sys.exit(run_script(PRODUCTS))
