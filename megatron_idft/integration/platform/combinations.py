"""Installed packages that declare not to work together; pip installs them side by side all the same."""

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from typing import NamedTuple

from packaging.requirements import Requirement

# Packages of training, verification and export. Megatron-Bridge, for example, caps transformers, and omegaconf wants
# one antlr4 runtime while math-verify's own extras install another.
_EXAMINED = (
    *("torch", "triton", "transformers", "accelerate", "omegaconf", "math-verify", "latex2sympy2_extended"),
    *("megatron-core", "megatron-bridge", "megatron-idft", "nvidia-resiliency-ext"),
    *("transformer-engine", "transformer-engine-torch", "flash-attn", "liger-kernel"),
)


class Conflict(NamedTuple):
    """One requirement of an installed package that another installed package does not meet.

    Attributes:
        wanting: the package that has the requirement, with its version.
        requirement: name and versions, as pip reads them.
        found: the installed version.
    """

    wanting: str
    requirement: str
    found: str


def conflicts(examined: tuple[str, ...] = _EXAMINED) -> Iterator[Conflict]:
    """Every unmet requirement among the installed packages of `examined` and what they need.

    Requirements of extras do not count, nor do packages that are missing: other findings name these.
    """
    for distribution in examined:
        try:
            own_version, lines = version(distribution), requires(distribution) or ()
        except PackageNotFoundError:
            continue
        for requirement in map(Requirement, lines):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            try:
                found = version(requirement.name)
            except PackageNotFoundError:
                continue
            # Containers bring pre-releases, such as 2.9.0a0+nv25.10.
            if not requirement.specifier.contains(found, prereleases=True):
                yield Conflict(f"{distribution} {own_version}", f"{requirement.name}{requirement.specifier}", found)
