"""Exceptions of other libraries that a user can cause, as messages of ours: one table, matched by class name.

Names rather than classes, so that nothing need be imported to compare. What is not in the table is a bug and keeps its
traceback.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

from lora_cli.errors import LoraError

CONNECTION = "is there a connection? HF_HUB_OFFLINE=1 uses only what is cached"
TEMPLATE = "--set model.chat_template=chatml, or mend the template"
# class name -> (message, hint); {line} is the first telling line of the original message, {cause} that of its root
TABLE: dict[str, tuple[str, str]] = {
    "GatedRepoError": ("{line}", "ask for access on its page, then: hf auth login"),
    "RepositoryNotFoundError": ("{line}", "check the name; for a private repository: hf auth login"),
    "RevisionNotFoundError": ("{line}", "check model.revision or data.revision"),
    "EntryNotFoundError": ("{line}", "check the name and the revision"),
    "HFValidationError": ("{line}", "a name on the hub is OWNER/NAME"),
    "LocalEntryNotFoundError": ("{line}", CONNECTION),
    "OfflineModeIsEnabled": ("{line}", "unset HF_HUB_OFFLINE"),
    "DatasetNotFoundError": ("{line}", "check data.path; for a private or gated data set: hf auth login"),
    "DataFilesNotFoundError": ("{line}", "check data.path and data.split"),
    "EmptyDatasetError": ("{line}", "check data.path and data.split"),
    "DatasetGenerationCastError": ("the files have different columns: {cause}", "name one with data.path"),
    "DatasetGenerationError": ("the data could not be read: {cause}", "check that each row is well formed"),
    "SafetensorError": ("the weights cannot be read: {line}", "the file is damaged or cut off: copy it again"),
    "OutOfMemoryError": ("out of memory: {line}", "--set training.per_device_train_batch_size=1, or method: qlora"),
    "TemplateError": ("the chat template failed: {line}", TEMPLATE),
    "ArrowInvalid": ("the data could not be read: {line}", "the file is damaged or of another kind"),
    "ConnectError": ("no connection: {line}", CONNECTION),
    "TimeoutException": ("no connection: {line}", CONNECTION),
    "ConnectionError": ("{line}", CONNECTION),
}
# Plain ValueErrors, told apart by how they begin
WORDS = {
    "Unrecognized model in": "check model.name_or_path: the folder or repository holds no model",
    "Couldn't instantiate the backend tokenizer": "the model's folder or repository holds no usable tokenizer",
    "Unknown split": "check data.split and data.eval_split",
    "BuilderConfig": "check data.name",
    "Config name is missing": "set data.name to one of them",
    "Tokenizer class": "the tokenizer needs another version of transformers",
}
SYSTEM = {
    errno.ENOSPC: "the disk is full",
    errno.EACCES: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a folder was expected",
}


def translate(error: BaseException) -> LoraError | None:
    """What to tell the user, or None when `error` is not known. Looks along the chain of causes too."""
    chain = list(_chain(error))
    if any("No space left" in str(link) or "os error 28" in str(link) for link in chain):
        return LoraError("the disk is full", "df -h, make room, and run it again")
    for link in chain:
        for kind in type(link).__mro__:
            if kind.__name__ in TABLE:
                message, hint = TABLE[kind.__name__]
                return LoraError(message.format(line=_line(link), cause=_line(chain[-1])), hint)
    if isinstance(error, OSError) and error.errno in SYSTEM:
        return LoraError(f"{SYSTEM[error.errno]}: {error.filename or _line(error)}", "free or choose another place")
    # transformers raises a bare OSError for a name that is neither a folder nor on the hub, or lacks files
    if type(error) is OSError and error.errno is None:
        return LoraError(_line(error), "check the model's name (a folder, or a name on the hub) and its revision")
    for start, hint in WORDS.items():
        if isinstance(error, ValueError) and str(error).startswith(start):
            return LoraError(_line(error), hint)
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, then what it says caused it."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _line(error: BaseException) -> str:
    """The first line that says more than an HTTP status."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not re.match(r"\d{3} (Client|Server) Error", line)]
    return (telling or lines or [type(error).__name__])[0]
