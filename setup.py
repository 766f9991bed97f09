"""Packaging of mpo-kernels: the packages `mpo_kernels` (needs torch and triton) and `mpo` (needs
the extra `train`)."""

from pathlib import Path

from setuptools import find_packages, setup

TRAIN = [
    "accelerate>=1.0",  # transformers loads the demo model's GGUF file through it
    "datasets>=3.0",  # Parquet files and the hub's datasets
    # first release with managed_gradient_accumulation=false on every ZeRO stage used here
    "deepspeed>=0.19.8",
    "gguf>=0.10",  # reads the demo model
    "matplotlib>=3.7",
    "omegaconf>=2.3",
    "peft>=0.17",
    "py3langid>=0.4",
    "pydantic>=2.7",
    "rich>=13.7",
    "safetensors>=0.4.3",
    "sentencepiece>=0.2",  # the demo model's tokenizer is rebuilt from the GGUF file
    "transformers>=5.0",
    "typer>=0.12",
]
# The peers that are measured beside this package; without them their rows say absent. quack-kernels
# is left to owners of a Hopper GPU.
BENCH = [
    "cut-cross-entropy",
    "liger-kernel",
    "matplotlib>=3.7",
    "pydantic>=2.7",
    "rich>=13.7",
    "trl>=1.0",
    "typer>=0.12",
]
QLORA = ["bitsandbytes>=0.48"]  # model.quantize
TEST = [
    *QLORA,
    "hypothesis>=6.100",
    "mypy>=1.10",
    "pytest>=8.0",
    "pytest-xdist>=3.6",
    "ruff>=0.6",
    "trl==1.16.*",  # its losses, beside which ours are tested; they are private methods
    "types-PyYAML",
]

setup(
    name="mpo-kernels",
    version="0.1.0",
    description=(
        "Fused Triton kernels and a DeepSpeed trainer for MPO, multilingual reward gap optimization"
    ),
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=[
        "triton",
        "kernels",
        "preference optimization",
        "safety",
        "multilingual",
        "deepspeed",
    ],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["mpo", "mpo.*", "mpo_kernels", "mpo_kernels.*"]),
    package_data={
        "mpo": ["py.typed", "recipes/*.yaml", "recipes/demo/*"],
        "mpo_kernels": ["py.typed"],
    },
    # The oldest that was run: torch 2.10 pins triton 3.6. tests/kernels/compiled has a table of
    # each triton.
    install_requires=["torch>=2.10", "triton>=3.6; platform_system == 'Linux'"],
    extras_require={"train": TRAIN, "qlora": QLORA, "test": TEST, "bench": BENCH},
    entry_points={"console_scripts": ["mpo=mpo.__main__:main"]},
)
