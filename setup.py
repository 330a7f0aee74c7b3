import re
import shutil
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent

# The kernels for the CPU: plain C, loaded with ctypes, for the baseline of the processor; when they
# are loaded, their loops choose among further instructions. Optional: where they cannot be built,
# the installation succeeds, and wsbcn_d2 says in one line that it runs in plain PyTorch.
KERNELS = Extension(
    "wsbcn_d2.ops.native_kernels",
    sources=["wsbcn_d2/ops/native_kernels.c"],
    extra_compile_args=[
        "-std=gnu99",
        "-O3",
        "-g0",
        "-fopenmp",
        # The same rounding wherever a formula stands, see the source.
        "-ffp-contract=off",
        # What these give up is not used, and loops become instructions for many values.
        "-fno-math-errno",
        "-fno-trapping-math",
    ],
    extra_link_args=["-fopenmp", "-lm"],
    optional=True,
)


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
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="wsbcn_d2 authors",
    license="MIT",
    project_urls={
        "Paper": "https://arxiv.org/abs/1903.10520",
        "Detectron2": "https://github.com/facebookresearch/detectron2",
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["wsbcn_d2", "wsbcn_d2.*"]),
    package_data={"wsbcn_d2": ["py.typed"]},
    cmdclass={"build_py": BuildWithConfigs},
    ext_modules=[KERNELS],
    python_requires=">=3.10",
    # Detectron2 itself cannot be named here: PyPI does not have it under its own name, so pip would
    # fail even where it is installed from source under another. Importing wsbcn_d2 without it says
    # what to do. These are the packages that we import ourselves, as loose as Detectron2 has them,
    # so that nothing is replaced in an environment that works.
    install_requires=["torch>=2.4", "numpy", "fvcore", "pycocotools"],
    extras_require={
        # The digits and photographs of the dataset that the folder demo makes. It also needs cv2 as
        # parts of Detectron2 do, which like them we do not name: it has several distributions, and
        # installing a second one over the first breaks it.
        "digits": ["scikit-learn"],
        # ONNX files by tools/export_model.py, and the comparison with onnxruntime.
        "export": ["onnx", "onnxruntime"],
        # Weights in .safetensors files.
        "safetensors": ["safetensors"],
        "test": ["pytest", "pytest-timeout", "pytest-xdist"],
        # Further judges of the tests. mmcv-lite brings opencv-python, another distribution of cv2.
        "test-libraries": ["timm", "mmcv-lite"],
        # Exact: another version formats or complains differently. The first three are Detectron2's.
        "dev": ["black==23.3.0", "flake8==6.0.0", "isort==5.12.0", "mypy==1.18.2"],
    },
)
