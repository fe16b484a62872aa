"""Put the card and model profiles into the wheel; everything else stands in pyproject.toml.

They live at the repository's top, where people find them. A wheel carries them as
`qlora_trainer/profiles`, an editable install reads them from the repository.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithProfiles(build_py):
    """Build the package, then copy the profiles beside its modules."""

    def run(self) -> None:
        """Copy after the modules, so that the folder of the package is there."""
        super().run()
        if self.editable_mode:
            return
        for part in ("gpus", "models"):
            target = Path(self.build_lib) / "qlora_trainer" / "profiles" / part
            target.mkdir(parents=True, exist_ok=True)
            for file in sorted((Path(__file__).parent / "profiles" / part).glob("*.json")):
                shutil.copyfile(file, target / file.name)


setup(cmdclass={"build_py": BuildWithProfiles})
