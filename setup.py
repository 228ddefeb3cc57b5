"""Packaging of helix_megatron: two-level attention partitioning for Megatron and DeepSpeed."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (ROOT / "helix_megatron" / "__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)
SERVE = ["fastapi", "uvicorn", "pydantic>=2.12", "prometheus-client"]

setup(
    name="helix_megatron",
    version=VERSION,
    description="Attention on more ranks than there are key-value heads, for Megatron and DeepSpeed",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["helix_megatron", "helix_megatron.*"]),
    package_data={
        "helix_megatron": ["py.typed"],
        "helix_megatron.graph.page": ["*.html", "*.css", "*.js"],
    },
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16.1,<0.17",  # newer cores need Python 3.12; see docs/limits.md
        "numpy",
        "safetensors",
        "psutil",  # megatron-core's distributed checkpoints import it and do not declare it
        "tqdm",
        "rich",
        "pyyaml",
        "matplotlib",
    ],
    entry_points={"console_scripts": ["helix = helix_megatron.cli:main"]},
    extras_require={
        "huggingface": ["transformers>=5,<6", "accelerate"],
        "serve": SERVE,
        "data": ["tokenizers"],
        "tensorboard": ["tensorboard"],
        "wandb": ["wandb"],
        "nvml": ["nvidia-ml-py"],
        "deepspeed": ["deepspeed>=0.19,<0.20"],
        "test": [
            "pytest",
            "hypothesis",
            "tokenizers",
            "transformers>=5,<6",
            "accelerate",
            "deepspeed>=0.19,<0.20",
            "tensorboard",
            *SERVE,
            "openai",
            "httpx",
            "schemathesis",
            "ruff==0.17.5",
            "mypy==2.4.1",
        ],
    },
)
