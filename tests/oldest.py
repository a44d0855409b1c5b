"""Prints pip constraints: of everything that setup.py names, the oldest release that it admits."""

from importlib.metadata import requires

from packaging.requirements import Requirement

for line in requires("megatron-idft") or ():
    requirement = Requirement(line)
    for specifier in requirement.specifier:
        if specifier.operator == ">=":
            print(f"{requirement.name}=={specifier.version}.*")
