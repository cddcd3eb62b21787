"""The repository's folders are installed under the one name `imedsam`."""

from setuptools import setup

PACKAGES = {
    "imedsam": "modeling_imedsam",
    "imedsam.configuration": "configuration",
    "imedsam.processing": "processing",
    "imedsam.training": "training",
}

setup(
    packages=list(PACKAGES),
    package_dir=PACKAGES,
    package_data={"imedsam": ["py.typed"], "imedsam.training": ["imedsam_metrics/*.py"]},
)
