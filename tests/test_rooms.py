"""Which room may import which: the arrows go one way, and Megatron is known where the table says."""

import ast
import functools
import itertools
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "megatron_idft"

# Everything may import these; among themselves only in this order.
BASE = ("errors", "console", "progress", "links", "files", "processes", "parsing")
# The library's rooms, and what each may import beside the base.
MAY_IMPORT: dict[str, set[str]] = {
    "statistics": set(),
    "objectives": {"statistics"},
    "objective_table": set(),
    "loss": {"statistics", "objectives"},
    "planning": set(),
    "corpus": set(),
    "data": {"corpus"},
    "checkpoint": set(),
    "inference": {"loss", "statistics"},
    "hinted_decoding": {"corpus", "data", "inference"},
    "integration.platform": {"checkpoint", "data", "inference", "loss"},
    "integration.loss": {
        *("integration.platform", "inference", "loss", "objectives", "objective_table", "statistics"),
    },
    "integration.training": {"integration.platform", "integration.loss", "checkpoint", "data", "statistics"},
    "integration.offline": {
        *("integration.platform", "integration.loss", "integration.training"),
        *("corpus", "data", "hinted_decoding", "inference", "loss", "objectives"),
    },
    "integration.plan": {"integration.platform", "integration.loss", "integration.training", "data", "planning"},
    "integration.script": {"integration.platform", "integration.loss"},
}
TOP = {"cli", "__main__", ""}  # the verbs, and the public names: they may import everything
KNOW_MEGATRON = ("integration", "inference", "checkpoint.bridge", "checkpoint.torch_dist")
KNOW_TORCH = ("statistics", "objectives", "loss", "inference", "integration", "checkpoint", "data")
KNOW_TORCH += ("hinted_decoding.mixing", "cli.convert")
OF_REQUESTS = "inference.requests"  # what hinted_decoding may know of the engine


def name_of(path: Path) -> str:
    """`errors` for megatron_idft/errors.py; "" for the package itself."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "integration" and len(parts) > 1 else parts[0]


def folder(module: str) -> str:
    return module.rpartition(".")[0]


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path, at_the_top_only: bool = False) -> Iterator[str]:
    """Full names of what a module imports; at_the_top_only: when it is itself imported."""
    tree = tree_of(path)
    for node in tree.body if at_the_top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if ours(full) in MODULES else node.module or ""


def ours(full: str) -> str | None:
    return full.removeprefix("megatron_idft").removeprefix(".") if full.split(".")[0] == "megatron_idft" else None


def own_imports(module: str, at_the_top_only: bool = False) -> set[str]:
    found = (ours(full) for full in imported(MODULES[module], at_the_top_only))
    return {name for name in found if name is not None} - {module}


@pytest.mark.parametrize("place", [*BASE, *MAY_IMPORT])
def test_a_room_imports_only_what_it_may(place):
    allowed = set(BASE[: BASE.index(place)]) if place in BASE else {*BASE, place, *MAY_IMPORT[place]}
    modules = [module for module in MODULES if room(module) == place]
    assert modules, f"there is no room {place}"
    for module in modules:
        # The package itself: its version, which is no room's.
        wrong = {name for name in own_imports(module) - {""} if room(name) not in allowed}
        assert not wrong, f"{module} imports {sorted(wrong)}"
        if place == "hinted_decoding":
            assert {name for name in own_imports(module) if room(name) == "inference"} <= {OF_REQUESTS}


def test_every_module_has_a_room():
    assert {room(module) for module in MODULES} == {*BASE, *MAY_IMPORT, *TOP, "integration"}


def test_the_rooms_have_no_circle():
    assert list(TopologicalSorter(MAY_IMPORT).static_order())
    modules = {name: own_imports(name, at_the_top_only=True) for name in MODULES}
    assert list(TopologicalSorter(modules).static_order()), "graphlib.CycleError names the modules otherwise"
    folders: dict[str, set[str]] = {}
    for module in MODULES:
        folders.setdefault(folder(module), set()).update(map(folder, own_imports(module)))
    inside = {name: found - {name} for name, found in folders.items() if "." in name}
    assert list(TopologicalSorter(inside).static_order()), "the folders of a room"


def test_an_import_that_cannot_stand_at_the_top_says_why():
    excused = {}
    for module, path in MODULES.items():
        lines = path.read_text(encoding="utf-8").splitlines()
        for before, line in itertools.pairwise(lines):
            if "noqa: PLC0415" in line:
                reason = line.partition("noqa: PLC0415")[2] or before.partition("# ")[2]
                excused[f"{module}: {line.strip()}"] = reason.strip()
    assert excused and all(excused.values()), [line for line, reason in excused.items() if not reason]


def knows(module: str, library: str) -> bool:
    return any(full.split(".")[0] == library for full in imported(MODULES[module]))


def stands_in(module: str, rooms: tuple[str, ...]) -> bool:
    return any(f"{module}.".startswith(f"{name}.") for name in rooms)


@pytest.mark.parametrize(("library", "rooms"), [("megatron", KNOW_MEGATRON), ("torch", KNOW_TORCH)])
def test_megatron_and_torch_are_known_by_their_rooms_only(library, rooms):
    knowing = {module for module in MODULES if knows(module, library)}
    assert {module for module in knowing if not stands_in(module, rooms)} == set()
    assert {name for name in rooms if not any(stands_in(module, (name,)) for module in knowing)} == set()


def test_every_user_error_stands_in_errors_py():
    import megatron_idft.errors

    base = {name for name, value in vars(megatron_idft.errors).items() if isinstance(value, type)}
    for module, path in MODULES.items():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef) and module != "errors":
                names = {name.id for name in node.bases if isinstance(name, ast.Name)}
                assert not names & base, f"{module}.{node.name}"


def test_every_room_says_what_it_is_what_it_may_import_and_where_to_begin():
    for package in PACKAGE.rglob("__init__.py"):
        if package.parent == PACKAGE:
            continue
        text = ast.get_docstring(tree_of(package)) or ""
        assert "May import" in text and "Begin with" in text and len(text.splitlines()) <= 3, package
        for name in re.findall(r"[\w/]+\.py", text.partition("Begin with")[2]):
            assert (package.parent / name).is_file(), f"{package}: {name}"
