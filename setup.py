"""What pyproject.toml cannot say: conf/ lies beside the packages here, and inside of experiments/ in a wheel."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["minidist*", "backends*", "experiments*"]), "experiments.conf"],
    package_dir={"experiments.conf": "conf"},
    package_data={"experiments.drawing": ["*.html"], "experiments.conf": ["**/*.yaml"]},
)
