"""Nothing is compiled on installation; everything is declared in pyproject.toml."""

from setuptools import setup

setup()
