"""Packaging of helix_megatron: two-level attention partitioning for Megatron and DeepSpeed.

Every range ends where the tests end: `scripts/lock.sh` resolves both ends of all of them, and
`scripts/compatibility.sh` runs there (docs/compatibility.md).
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (ROOT / "helix_megatron" / "__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)
TOKENIZERS = "tokenizers>=0.22,<0.24"
TENSORBOARD = "tensorboard>=2.18,<3"
TRANSFORMERS = ["transformers>=5.2,<5.25", "accelerate>=1.1,<1.16"]
DEEPSPEED = ["deepspeed>=0.19,<0.20"]
SERVE = [
    "fastapi>=0.115,<1",
    "uvicorn>=0.32,<1",
    "pydantic>=2.12,<3",
    "prometheus-client>=0.21,<1",
]

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
        "torch>=2.6,<2.16",
        "megatron-core>=0.16.1,<0.20",  # 0.16.1 is the last one for Python 3.11
        "numpy>=1.26,<3",
        "safetensors>=0.4.3,<0.9",
        "packaging>=23,<27",
        "psutil>=6,<8",  # megatron-core's distributed checkpoints import it and do not declare it
        "tqdm>=4.66,<5",
        "rich>=13.7,<16",
        "pyyaml>=6.0.2,<7",
        "matplotlib>=3.9,<4",
    ],
    entry_points={"console_scripts": ["helix = helix_megatron.cli:main"]},
    extras_require={
        "huggingface": TRANSFORMERS,
        "serve": SERVE,
        "data": [TOKENIZERS],
        "tensorboard": [TENSORBOARD],
        "wandb": ["wandb>=0.19,<1"],
        "nvml": ["nvidia-ml-py>=12.560,<14"],
        "deepspeed": DEEPSPEED,
        "test": [
            "pytest>=8.3.3,<10",
            "hypothesis>=6.112,<7",
            TOKENIZERS,
            TENSORBOARD,
            *TRANSFORMERS,
            *DEEPSPEED,
            *SERVE,
            "openai>=2,<4",
            "httpx>=0.27,<1",
            "schemathesis>=4.20,<5",
            "ruff==0.17.5",
            "mypy==2.4.1",
        ],
    },
)
