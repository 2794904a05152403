"""Exceptions of other libraries that a user can cause, as messages of ours: one table, matched by class name.

Names rather than classes, so that nothing need be imported to compare. What is not in the table is a bug and keeps its
traceback.
"""

from __future__ import annotations

import errno

from lora_cli.errors import LoraError

OFFLINE = "is there a connection? HF_HUB_OFFLINE=1 uses only what is cached"
TABLE: dict[str, tuple[str, str]] = {
    # class name: (message, hint); {line} is the first line of the original message
    "GatedRepoError": ("{line}", "ask for access on the model's page, then: hf auth login"),
    "RepositoryNotFoundError": ("{line}", "check the name; for a private repository: hf auth login"),
    "RevisionNotFoundError": ("{line}", "check model.revision or data.revision"),
    "EntryNotFoundError": ("{line}", "check the name and the revision"),
    "DatasetNotFoundError": ("{line}", "check data.path; for a private data set: hf auth login"),
    "DataFilesNotFoundError": ("{line}", "check data.path and data.split"),
    "DatasetGenerationError": ("the data could not be read: {cause}", "check that each row is well formed"),
    "DatasetGenerationCastError": ("the files have different columns: {line}", "name one with data.path"),
    "LocalEntryNotFoundError": ("{line}", OFFLINE),
    "OfflineModeIsEnabled": ("{line}", "unset HF_HUB_OFFLINE"),
    "SafetensorError": ("the weights cannot be read: {line}", "the file is damaged or cut off: copy it again"),
    "OutOfMemoryError": ("out of memory: {line}", "--set training.per_device_train_batch_size=1, or method: qlora"),
    "TemplateError": ("the chat template failed: {line}", "--set model.chat_template=chatml"),
    "TemplateSyntaxError": ("the chat template is not valid: {line}", "--set model.chat_template=chatml"),
    "UndefinedError": ("the chat template failed: {line}", "--set model.chat_template=chatml"),
    "ConnectError": ("no connection to the hub: {line}", OFFLINE),
    "ConnectTimeout": ("no connection to the hub: {line}", OFFLINE),
}
SYSTEM = {
    errno.ENOSPC: "the disk is full",
    errno.EACCES: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a folder was expected",
}


def translate(error: BaseException) -> LoraError | None:
    """What to tell the user, or None when `error` is not known. Looks along the chain of causes too."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    for link in chain:
        for kind in type(link).__mro__:
            if kind.__name__ in TABLE:
                message, hint = TABLE[kind.__name__]
                return LoraError(message.format(line=_line(link), cause=_line(chain[-1])), hint)
    if isinstance(error, OSError) and error.errno in SYSTEM:
        return LoraError(f"{SYSTEM[error.errno]}: {error.filename or _line(error)}", "free or choose another place")
    # transformers raises a bare OSError for a name that is neither a folder nor on the hub, or lacks files
    if type(error) is OSError and error.errno is None:
        return LoraError(_line(error), "check model.name_or_path (a folder, or a name on the hub) and model.revision")
    return None


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
