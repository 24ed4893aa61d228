"""Packages sglang_cpu_support and its .pth file, which setuptools has no setting to put into site-packages."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithPth(build_py):
    """Copies the .pth file to the top of the build, from where the wheel takes it to site-packages."""

    def run(self) -> None:
        super().run()
        name = "sglang_cpu_support.pth"
        self.copy_file(str(Path("src", name)), str(Path(self.build_lib, name)))


setup(
    name="sglang-cpu-support",
    version="0.1.0",
    description="What SGLang lacks on a machine without a GPU",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"": "src"},
    packages=["sglang_cpu_support"],
    entry_points={"sglang.srt.plugins": ["cpu_support = sglang_cpu_support.plugin:register"]},
    cmdclass={"build_py": BuildWithPth},
)
