"""Packaging of helix_megatron: two-level attention partitioning for Megatron and DeepSpeed.

Every range ends where the tests end: `scripts/lock.sh` resolves both ends of each, and
`scripts/compatibility.sh` runs the tests there (docs/compatibility.md).
"""

import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))

from helix_megatron import __version__  # noqa: E402
from helix_megatron.versions import TESTED  # noqa: E402

HOST = {package: tested.requirement for package, tested in TESTED.items()}
TOKENIZERS = "tokenizers>=0.22,<0.24"
EINOPS = "einops>=0.8.2,<0.9"
TENSORBOARD = "tensorboard>=2.18,<3"
TRANSFORMERS = [HOST["transformers"], HOST["accelerate"]]
SERVE = [
    "fastapi>=0.115,<1",
    HOST["uvicorn"],
    "pydantic>=2.12,<3",
    "prometheus-client>=0.21,<1",
]

setup(
    name="helix_megatron",
    version=__version__,
    description="Attention on more ranks than there are key-value heads, for Megatron and DeepSpeed",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["helix_megatron", "helix_megatron.*"]),
    package_data={
        "helix_megatron": ["py.typed"],
        "helix_megatron.graph.page": ["*.html", "*.css", "*.js"],
        "helix_megatron.plan": ["*.jinja", "*.json"],
        "helix_megatron.training": ["*.jinja"],
    },
    python_requires=">=3.11",
    install_requires=[
        HOST["torch"],
        HOST["megatron-core"],  # 0.16.1 is the last one for Python 3.11
        HOST["safetensors"],
        "blake3>=1.0,<2",
        "numpy>=1.26,<3",
        "psutil>=6,<8",  # megatron-core's distributed checkpoints import it and do not declare it
        "tqdm>=4.66,<5",
        "rich>=13.7,<16",
        "jinja2>=3.1.6,<4",
        "pyyaml>=6.0.2,<7",
        "matplotlib>=3.9,<4",
    ],
    entry_points={"console_scripts": ["helix = helix_megatron.cli:main"]},
    extras_require={
        "huggingface": TRANSFORMERS,
        "serve": SERVE,
        "json": [HOST["llguidance"]],
        "data": [TOKENIZERS],
        "hybrid": [EINOPS],  # megatron-core's Mamba layers import it and do not declare it
        "tensorboard": [TENSORBOARD],
        "wandb": ["wandb>=0.19,<1"],
        "nvml": ["nvidia-ml-py>=12.560,<14"],
        "deepspeed": [HOST["deepspeed"]],
        "test": [
            "pytest>=8.3.3,<10",
            "pytest-xdist>=3.8,<4",
            "hypothesis>=6.112,<7",
            TOKENIZERS,
            EINOPS,
            TENSORBOARD,
            *TRANSFORMERS,
            HOST["deepspeed"],
            *SERVE,
            HOST["llguidance"],
            "openai>=2,<4",
            "httpx>=0.27,<1",
            "schemathesis>=4.20,<5",
            "ruff==0.17.5",
            "mypy==2.4.1",
        ],
    },
)
