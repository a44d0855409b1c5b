"""`init DIR`: copies of the launch scripts and their examples, for those who have no checkout."""

import filecmp
import shutil
from collections.abc import Sequence
from pathlib import Path

import megatron_idft
from megatron_idft.errors import InitError
from megatron_idft.parsing import Parser

# Folders that are copied out of a checkout; setup.py puts them into the wheel, as the folder `scripts` of the package.
FOLDERS = ("launch", "examples/smoke", "examples/numinamath")
CHECKOUT_ONLY = ("quickstart.sh", "python.sh", "__pycache__")


def _parser() -> Parser:
    parser = Parser(
        "megatron-idft init",
        description="Copies the scripts for one node, torchrun, Slurm and Kubernetes (launch/, with layouts"
        " of models), and the examples that use them, into a folder of yours.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="where launch/ and examples/ shall be")
    parser.add_argument("--force", action="store_true", help="write over files that are there and differ")
    return parser


def main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(list(argv))
    files = copy_scripts(args.folder, args.force)
    print(f"{args.folder}: {files} files. Read {args.folder}/launch/README.md; then, with a model of yours:")
    print(f"    HF_MODEL=/path/to/model TP=1 bash {args.folder}/examples/smoke/run.sh")
    return 0


def copy_scripts(target: Path, force: bool = False) -> int:
    """Copy them into `target` and return the number of files.

    Raises:
        InitError: files there that differ, without `force`; or this installation has no scripts.
    """
    source = _source()
    files = [
        path.relative_to(source)
        for folder in FOLDERS
        for path in sorted((source / folder).rglob("*"))
        if path.is_file() and not set(path.relative_to(source).parts) & set(CHECKOUT_ONLY)
    ]
    changed = [
        str(name)
        for name in files
        if (target / name).exists() and not filecmp.cmp(source / name, target / name, shallow=False)
    ]
    if changed and not force:
        raise InitError(
            f"{target} has other versions of {', '.join(changed)}: choose another folder, or --force to write over them"
        )
    for name in files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
    return len(files)


def _source() -> Path:
    package = Path(megatron_idft.__file__).parent
    for place in (package / "scripts", package.parent):
        if (place / "launch" / "common.sh").is_file():
            return place
    raise InitError(f"{package} was installed without its scripts: pip install --force-reinstall megatron-idft")
