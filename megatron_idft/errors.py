"""Every error that its reader can mend: the message names what is wrong, where, and the remedy."""

import json
import os
from pathlib import Path
from typing import Any

VERBOSE = "MEGATRON_IDFT_VERBOSE"
RAW_EXCERPT = 500  # characters of a bad record that are kept
ABSENT = "(absent)"  # in one of two settings that are compared


def verbose() -> bool:
    """Whether tracebacks and all that Megatron prints of its arguments are wanted on the console."""
    return os.environ.get(VERBOSE, "0") not in ("", "0")


class UserError(Exception):
    """Input, flags or an installation that cannot be used. The programs show its message, which names the remedy."""

    exit_code = 2


class InputError(UserError, ValueError):
    """A file or setting that cannot be used as it is."""


class ArgumentError(UserError, ValueError):
    """Flags that cannot be used, or not together."""


# ---- records and corpora


class RecordError(UserError, ValueError):
    """A record that cannot be used: which file, line (row in Parquet), field, and why."""

    def __init__(self, file: str, line: int, field: str, message: str, raw: str = ""):
        self.file, self.line, self.raw = file, line, raw[:RAW_EXCERPT]
        self.field, self.message = _shortened(field, 200), _shortened(message, 1000)  # both may quote the record
        at = f", {self.field}" if field else ""
        super().__init__(f"{file}, {'row' if file.endswith('.parquet') else 'line'} {line}{at}: {self.message}")

    def parts(self) -> dict[str, Any]:
        """The arguments that make this error again."""
        return {key: getattr(self, key) for key in ("file", "line", "field", "message", "raw")}

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:  # the default would call __init__ with only the text
        return type(self), tuple(self.parts().values())


def _shortened(text: str, longest: int) -> str:
    """Without its middle where it is too long: the remedy stands at its end."""
    return text if len(text) <= longest else f"{text[: longest // 2]} … {text[3 - longest // 2 :]}"


class SelectionError(InputError):
    """An expression that cannot be used, or a record that it cannot be applied to."""


class LedgerError(UserError, RuntimeError):
    """The folder cannot be used: not writable, full, damaged, or it belongs to another job."""


class SettingsMismatch(LedgerError):
    """The folder belongs to a job with other settings. `differences`: key -> (value in the folder, value now)."""

    def __init__(self, folder: Path, differences: dict[str, tuple[Any, Any]]):
        self.folder, self.differences = folder, differences
        rows = [f"  {key}: {_show(old)} in the folder, {_show(new)} now" for key, (old, new) in differences.items()]
        super().__init__(
            f"{folder} was begun with other settings:\n" + "\n".join(rows) + "\nName another output folder for these "
            "settings, or go on with those of the folder."
        )

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(self), (self.folder, self.differences)


def _show(value: Any) -> str:
    text = value if value == ABSENT else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else text[:200] + "…"


class WorkerError(UserError):
    """A process that cannot be started; the message names what it was to run."""


# ---- data for training


class TemplateError(UserError, ValueError):
    """The template itself is at fault: it cannot be used with these conversations. States the remedy."""


class EndlessTemplateError(TemplateError):
    """The template does not end, or would not in a lifetime."""


class ConversationError(UserError, ValueError):
    """One conversation cannot be encoded, and the conversation is at fault: a bad record, in the words of `corpus`."""


class PrepareError(UserError, RuntimeError):
    """`prepare` cannot go on: a process died, the disk is full. Finished work is kept."""


# ---- models and checkpoints


class ConversionError(InputError):
    """A model or checkpoint that cannot be converted as it is; the message names everything found and the remedy."""


class UnknownFamilyError(ConversionError):
    """config.json names a model_type without a table in `checkpoint/families.py`."""


class DamagedCheckpointError(InputError):
    """A checkpoint whose files are not those that were saved; the message names them and the remedy."""


class UnsafeCheckpointError(InputError):
    """A checkpoint that names code or files which no writer of checkpoints names; the message says which."""


class UnsupportedModelError(UserError, RuntimeError):
    """The model's loss cannot be replaced; the message names the remedy."""


class UnservedModelError(UserError, RuntimeError):
    """The model or layout cannot be decoded from; the message names each reason and its remedy."""


class NonFiniteLogitsError(UserError, FloatingPointError):
    """The model's logits have no distribution: NaN or infinite."""


# ---- machines and launches


class InstallationError(UserError, RuntimeError):
    """Megatron is missing, mixed from two places, or of a version that is not served; the message names the remedy."""


class MissingLibraryError(UserError, RuntimeError):
    """A flag asks for a library that is not there; the message names the remedy."""


class BrokenLibraryError(UserError, RuntimeError):
    """A library is installed that ends every process that imports Megatron; the message names the remedy."""


class GraphRegistrationError(UserError, RuntimeError):
    """The environment lets captured collectives read unmapped memory; the message names the variables."""


class UnsupportedOnCPUError(UserError, RuntimeError):
    """Something that was asked for needs a GPU, or CPU mode came too late; the message names the remedy."""


class LaunchError(UserError):
    """Processes that do not know of each other; the message names the remedy."""


class ChangedScheduleError(UserError):
    """A training is continued with flags that its learning-rate schedule does not allow."""


class TrainingStoppedError(UserError):
    """A training that a fault or a signal has ended. The message says what happened and what to do."""

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


class LostRankError(TrainingStoppedError):
    """A training that has ended on this rank because another rank is gone: that one knows the cause."""


class PlanError(InputError):
    """A training that cannot be started, or whose memory nobody has derived; the message names the remedy."""


class InitError(UserError):
    """`init` has copied nothing; the message says why and what to do."""
