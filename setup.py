"""The packages of a wheel; all else is in pyproject.toml, which cannot both find packages and rename one."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["qlora", "qlora.*"]), "qlora.evaluation"],
    package_dir={"qlora.evaluation": "eval"},
)
