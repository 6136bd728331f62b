"""What pyproject.toml can't say: the wheel's start-up file stands beside the package, not in it."""

from pathlib import Path
from shutil import copyfile

from setuptools import setup
from setuptools.command.build_py import build_py

STARTUP = "dip_megatron_startup.pth"


class WithStartup(build_py):
    """Also copies the start-up file (see ``dip_megatron/startup.py``)."""

    def run(self) -> None:
        """Build the package, then add the file."""
        super().run()
        if not self.editable_mode:
            copyfile(Path(__file__).with_name(STARTUP), Path(self.build_lib) / STARTUP)


setup(cmdclass={"build_py": WithStartup})
