import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


def read_version() -> str:
    """Reads the version without importing the package, which needs torch and Detectron2."""
    text = (ROOT / "wsbcn_d2" / "version.py").read_text()
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


class BuildWithConfigs(build_py):
    """Puts ``configs`` into the built package, where wsbcn_d2.model_zoo looks for them.

    package_data takes only what is in the folder of the package, and leaves files of an older build
    where they are.
    """

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # wsbcn_d2.model_zoo finds those of the checkout
            return
        target = Path(self.build_lib) / "wsbcn_d2" / "configs"
        shutil.rmtree(target, ignore_errors=True)  # an older build's
        shutil.copytree(ROOT / "configs", target, ignore=shutil.ignore_patterns("__pycache__"))


setup(
    name="wsbcn_d2",
    version=read_version(),
    description="Weight Standardization and Batch-Channel Normalization for Detectron2",
    author="wsbcn_d2 authors",
    license="MIT",
    packages=find_packages(include=["wsbcn_d2", "wsbcn_d2.*"]),
    package_data={"wsbcn_d2": ["py.typed", "ops/native_kernels.c", "ops/extension.cpp"]},
    cmdclass={"build_py": BuildWithConfigs},
    python_requires=">=3.9",
    # Detectron2 itself cannot be named here: PyPI does not have it under its own name, so pip would
    # fail even where it is installed from source under another. Importing wsbcn_d2 without it says
    # what to do. These are the packages that we import ourselves, as loose as Detectron2 has them,
    # so that nothing is replaced in an environment that works.
    install_requires=["torch>=2.0", "numpy", "fvcore", "pycocotools"],
    extras_require={
        # The digits and photographs of the dataset that the quick start makes. It also needs cv2 as
        # parts of Detectron2 do, which like them we do not name: it has several distributions, and
        # installing a second one over the first breaks it.
        "digits": ["scikit-learn"],
        # ONNX files by tools/export_model.py, and the comparison with onnxruntime.
        "export": ["onnx", "onnxruntime"],
        # Weights in .safetensors files.
        "safetensors": ["safetensors"],
        "test": ["pytest", "pytest-timeout", "pytest-xdist"],
        # Further judges of the tests. mmcv-lite brings opencv-python, another distribution of cv2.
        "test-libraries": ["timm", "mmcv-lite", "safetensors"],
        # Exact: another version formats differently. These are Detectron2's.
        "dev": ["black==23.3.0", "flake8==6.0.0", "isort==5.12.0"],
    },
)
