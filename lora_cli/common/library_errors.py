"""Translate exceptions of other libraries that a user can cause into LoraErrors, by one table.

The table matches the class by name and the text by a pattern, so nothing need be imported to
compare. What is not in the table is a bug and keeps its traceback.
"""

from __future__ import annotations

import errno
import linecache
import os
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from lora_cli.common import plain_files
from lora_cli.common.errors import LoraError
from lora_cli.common.missing_packages import suggest_package
from lora_cli.common.shown import quote

LONGEST = 400
"""How many characters of another library's message are shown."""
CONNECTION = "is there a connection? HF_HUB_OFFLINE=1 uses only what is cached"
COPY = "the file is damaged or cut off: copy it again"
DATA = "check data.path and data.split"
MODEL = "check the model's name (a folder, or a name on the hub) and its revision"
SMALLER = "--set training.per_device_train_batch_size=1, or method: qlora"
TEMPLATE = "--set model.chat_template=chatml, or mend the template"
CODE = "--trust-remote-code, if you have read its code and want to run it here"
CUDA = "lora doctor, which tries the devices one by one; CUDA_VISIBLE_DEVICES= trains on the CPU"


class Known(NamedTuple):
    """One kind of failure: the name of the exception's class or of a base of it, a pattern its text
    must contain ("" for any text), and the message and hint for the user.

    In both, {line} is the first telling line of the text, {cause} that of the root cause, and
    {match} what the pattern found.
    """

    kind: str
    words: str
    message: str
    hint: str


def _share(kinds: str, message: str, hint: str) -> list[Known]:
    """Return a row for each kind of failure that is told in the same words."""
    return [Known(kind, "", message, hint) for kind in kinds.split()]


TABLE = (
    # huggingface_hub
    Known("GatedRepoError", "", "{line}", "ask for access on its page, then: hf auth login"),
    Known("DisabledRepoError", "", "{line}", "the repository was closed: take another"),
    Known(
        "RepositoryNotFoundError",
        "",
        "{line}",
        "check the name; for a private repository: hf auth login",
    ),
    Known("RevisionNotFoundError", "", "{line}", "check model.revision or data.revision"),
    Known("LocalEntryNotFoundError", "", "{line}", CONNECTION),
    Known("EntryNotFoundError", "", "{line}", "check the name and the revision"),
    Known("HFValidationError", "", "{line}", "a name on the hub is OWNER/NAME"),
    Known("LocalTokenNotFoundError", "", "{line}", "hf auth login, or HF_TOKEN in the environment"),
    Known("OfflineModeIsEnabled", "", "{line}", "unset HF_HUB_OFFLINE"),
    Known("FileMetadataError", "", "{line}", CONNECTION),
    Known(
        "HfHubHTTPError",
        r"\b401\b|\b403\b",
        "the hub refused the request: {line}",
        "hf auth login; does the token allow reading?",
    ),
    Known(
        "HfHubHTTPError",
        r"\b429\b",
        "the hub has had too many requests: {line}",
        "wait some minutes, and run it again",
    ),
    Known(
        "HfHubHTTPError",
        "",
        "the hub answered: {line}",
        "try again later; https://status.huggingface.co shows whether it is down",
    ),
    Known(
        "CorruptedCacheException",
        "",
        "the hub's cache is damaged: {line}",
        "hf cache ls lists it, hf cache rm NAME removes it; then run it again",
    ),
    # the network under it
    *_share("ConnectError TimeoutException gaierror", "no connection: {line}", CONNECTION),
    Known("ProxyError", "", "the proxy does not answer: {line}", "check HTTPS_PROXY"),
    Known(
        "SSLError",
        "",
        "no secure connection: {line}",
        "check the machine's clock and certificates (SSL_CERT_FILE)",
    ),
    *_share(
        "RemoteProtocolError ReadError ChunkedEncodingError",
        "the connection broke off: {line}",
        "run it again: files already fetched are kept",
    ),
    Known("TooManyRedirects", "", "the hub leads in a circle: {line}", CONNECTION),
    Known("ConnectionError", "", "{line}", CONNECTION),
    # datasets
    Known(
        "DatasetNotFoundError",
        "",
        "{line}",
        "check data.path; for a private or gated data set: hf auth login",
    ),
    Known("DataFilesNotFoundError", "", "{line}", DATA),
    Known("EmptyDatasetError", "", "{line}", DATA),
    Known(
        "DatasetGenerationCastError",
        "",
        "the files have different columns: {cause}",
        "name one with data.path",
    ),
    Known(
        "DatasetGenerationError",
        "",
        "the data could not be read: {cause}",
        "check that each row is well formed",
    ),
    Known(
        "NonMatchingSplitsSizesError",
        "",
        "the data set is not what its card says: {line}",
        "--set data.revision=COMMIT",
    ),
    Known(
        "NonMatchingChecksumError",
        "",
        "the data set is not what its card says: {line}",
        "--set data.revision=COMMIT",
    ),
    Known("ValueError", r"^Unknown split", "{line}", "check data.split and data.eval_split"),
    Known("ValueError", r"^BuilderConfig", "{line}", "check data.name"),
    Known("ValueError", r"^Config name is missing", "{line}", "set data.name to one of them"),
    Known("ArrowMemoryError", "", "out of memory: {line}", "data.streaming: true"),
    Known(
        "ArrowException",
        "",
        "the data could not be read: {line}",
        "the file is damaged or of another kind",
    ),
    # safetensors
    Known("SafetensorError", "", "the weights cannot be read: {line}", COPY),
    # transformers
    Known("ValueError", r"contains custom code|references custom code", "{line}", CODE),
    Known(
        "ValueError",
        r"^Unrecognized model in|Should have a `model_type` key",
        "{line}",
        "check model.name_or_path: the folder or repository holds no model",
    ),
    Known(
        "ValueError",
        r"model type `(.+?)` but Transformers does not recognize",
        "transformers does not know models of type {match}",
        "pip install -U transformers, if it is a new one; else check model_type in its config.json",
    ),
    Known(
        "ValueError",
        r"Unrecognized configuration class <class '(?:\w+\.)*(\w+)'",
        "{match} does not belong to a model that writes text",
        "give a causal language model, or, for one with an encoder such as T5, task: seq2seq_lm",
    ),
    Known(
        "ValueError",
        r"Couldn't instantiate the backend tokenizer",
        "the model has no tokenizer that can be read",
        "copy tokenizer.json and tokenizer_config.json into its folder",
    ),
    Known(
        "ValueError",
        r"^Tokenizer class",
        "{line}",
        "the tokenizer needs another version of transformers",
    ),
    Known(
        "StrictDataclassError",
        "",
        "the model's config.json has an impossible value: {cause}",
        "copy it again",
    ),
    Known(
        "PanicException",
        "",
        "the tokenizer cannot be used: {line}",
        "its tokenizer.json is damaged: copy it again",
    ),
    # jinja
    Known("TemplateError", "", "the chat template failed: {line}", TEMPLATE),
    # YAML, other than a recipe's
    Known(
        "YAMLError",
        "",
        "a YAML file cannot be read: {line}",
        "is it a model's README.md, or a data set's?",
    ),
    # pathlib
    Known("RuntimeError", "Symlink loop from", "a link leads to itself: {line}", "ls -l shows it"),
    # torch
    *_share("OutOfMemoryError MemoryError", "out of memory: {line}", SMALLER),
    Known(
        "ImportError",
        "failed to map segment|cannot allocate memory",
        "out of memory: {line}",
        "ulimit -v unlimited, or a machine with more memory",
    ),
    Known(
        "RuntimeError",
        r"out of memory|can't allocate memory|not enough memory|unable to mmap",
        "out of memory: {line}",
        SMALLER,
    ),
    Known(
        "RuntimeError",
        r"Found no NVIDIA driver|CUDA driver version is insufficient",
        "{line}",
        CUDA,
    ),
    Known(
        "RuntimeError",
        r"no kernel image is available",
        "this build of torch does not know the GPU: {line}",
        CUDA,
    ),
    Known(
        "RuntimeError",
        r"^CUDA error|cuDNN error|CUBLAS_STATUS|NCCL error",
        "the GPU failed: {line}",
        CUDA,
    ),
    Known(
        "RuntimeError",
        r"PytorchStreamReader failed",
        "a file of torch's cannot be read: {line}",
        COPY,
    ),
    Known(
        "UnpicklingError",
        "",
        "a pickle is refused: {line}",
        "pickles may run code: have it converted to safetensors",
    ),
    # bitsandbytes
    Known(
        "RuntimeError",
        r"CUDA Setup failed|compiled without GPU support",
        "bitsandbytes: {line}",
        "lora doctor",
    ),
    Known(
        "ImportError",
        r"bitsandbytes",
        "{line}",
        "pip install -U bitsandbytes; lora doctor tries it",
    ),
)
SYSTEM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk's quota is used up",
    errno.EFBIG: "a file is larger than this system allows",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a folder was expected",
    errno.EISDIR: "a file was expected, but this is a folder",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "symbolic links form a loop",
    errno.ENOENT: "a file or folder has disappeared",
    errno.EMFILE: "too many files are open",
    errno.ENFILE: "too many files are open",
    errno.EIO: "the disk failed",
    errno.ESTALE: "the network drive is gone",
    errno.ENOMEM: "out of memory",
}
ROOM = {errno.EDQUOT: "quota", errno.EFBIG: "ulimit -f unlimited"}
"""Commands that show how much space is free, where it is not the disk's."""
NO_ROOM = {errno.ENOSPC, *ROOM}
"""What a write ends with that finds no room."""
REMEDIES = {
    errno.EMFILE: "ulimit -n 4096",
    errno.ENFILE: "ulimit -n 4096",
    errno.EIO: "dmesg says more",
}


def translate(error: BaseException) -> LoraError | None:
    """Return the LoraError to show for `error`, or None when the table does not know it.

    Looks along the chain of causes too.
    """
    chain = list(_walk_causes(error))
    if any("No space left" in str(link) or "os error 28" in str(link) for link in chain):
        return _name_full_disk(chain)
    if any(str(link).endswith("(os error 27)") for link in chain):  # Rust's; ours are OSErrors
        return LoraError("a file is larger than this system allows", "ulimit -f unlimited")
    for link in chain:
        kinds = [kind.__name__ for kind in type(link).__mro__]
        for known in TABLE:
            if known.kind in kinds and (found := re.search(known.words, str(link))):
                parts = {
                    "line": _first_telling_line(link),
                    "cause": _first_telling_line(chain[-1]),
                    "match": found[found.re.groups and 1],
                }
                hint = known.hint
                if hint == CONNECTION and os.environ.get("HF_HUB_OFFLINE", "0") != "0":
                    hint = "unset HF_HUB_OFFLINE, or fetch it where there is a connection"
                return LoraError(known.message.format(**parts), hint.format(**parts))
        if isinstance(link, ImportError) and (command := suggest_package(link)):
            return LoraError(f"a package is missing: {_first_telling_line(link)}", command)
    return _translate_os_error(error) if isinstance(error, OSError) else None


def is_panic(error: BaseException) -> bool:
    """Return whether it is how a library in Rust, such as tokenizers, says that it met what it
    holds impossible. It is no Exception, but the library can be used again."""
    return type(error).__name__ == "PanicException"


@contextmanager
def translate_file_errors(
    what: str, hint: str, but: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Wrap a library's reading of somebody else's file: whatever it raises there means it refuses
    the file.

    Raise LoraError saying that `what` could not be done and why, with the table's hint or else
    `hint`. What the table knows of this machine, and exceptions that `but` names, pass through.
    """
    try:
        yield
    except BaseException as error:
        known = None if is_panic(error) else translate(error)
        if not is_panic(error) and (
            not isinstance(error, Exception)
            or isinstance(error, (LoraError, *but))
            or (known is not None and isinstance(error, OF_MACHINE))
        ):
            raise
        said = known.message if known else f"{type(error).__name__}: {_first_telling_line(error)}"
        raise LoraError(f"{what}: {said}", known.hint if known else hint) from error


OF_MACHINE = (OSError, MemoryError, RuntimeError)
"""What the table knows of them is of disks, connections, memory and GPUs, not of a file."""


PACKAGE = Path(__file__).parent.parent
ON_PURPOSE = (ValueError, TypeError, ImportError, ArithmeticError)
"""What the libraries raise on purpose. Such an exception is a refusal even where the recipe sets
none of their own fields."""
SHOWN = 3


@contextmanager
def translate_refusals(
    passed_on: Sequence[str], has_begun: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Turn a library's complaint about a recipe value into a LoraError that names the values
    `passed_on` to it.

    A recipe reaches every field of PEFT's, TRL's and transformers' configurations. lora checks that
    the configurations can be built. Other mistakes in a value, such as the name of a scheduler's
    argument, come to light when a library first uses it, as an exception of any type. Once
    `has_begun()` is true, an exception is not a refusal any more. One raised by a line of lora's
    own is a bug of lora's and passes through.
    """
    try:
        yield
    except Exception as error:
        known = isinstance(error, LoraError) or translate(error) is not None
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        ours = PACKAGE in Path(frame.f_code.co_filename).parents
        if known or ours or has_begun() or not (passed_on or isinstance(error, ON_PURPOSE)):
            raise
        raise blame(error, _find_blamed(error, passed_on)) from error


def blame(
    error: Exception,
    keys: Sequence[str],
    hint: str | None = None,
    kind: type[LoraError] = LoraError,
) -> LoraError:
    """Return a library's refusal as an error of the recipe's `keys` (`file:line: section.key`).

    A package that is missing is the hint before any other.
    """
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    library = str(frame.f_globals.get("__name__")).partition(".")[0]
    said = " ".join(f"{type(error).__name__}: {error}".split())
    hint = suggest_package(error) or hint
    if len(keys) == 1:
        return kind(f"{keys[0]} was rejected by {library}: {said}", hint or "change or remove it")
    listed = f"change or remove {' or '.join(keys[:SHOWN])}" if keys else "lora doctor"
    return kind(f"{library} rejected this recipe: {said}", hint or listed)


def _find_blamed(error: Exception, passed_on: Sequence[str]) -> list[str]:
    """Return those of the values `passed_on` that the error speaks of, or that a call on the way to
    it passes by name; where there are none, those that a function on the way reads."""
    said = [str(error)]
    for each in traceback.extract_tb(error.__traceback__):
        if PACKAGE in Path(each.filename).parents:
            continue
        first, last = each.lineno or 0, each.end_lineno or each.lineno or 0
        said += [linecache.getline(each.filename, number) for number in range(first, last + 1)]
    codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    theirs = [code for code in codes if PACKAGE not in Path(code.co_filename).parents]
    for words in (
        set(re.findall(r"\w+", " ".join(said))),
        {name for code in theirs for name in code.co_names},
    ):
        fields = {key: key.rpartition(".")[2] for key in passed_on}
        # torch calls its loader's options without the prefix that Trainer gives them
        blamed = [
            key for key, name in fields.items() if {name, name.removeprefix("dataloader_")} & words
        ]
        if blamed:
            return blamed
    return []


def _translate_os_error(error: OSError) -> LoraError | None:
    """Return the LoraError for a failure of the system, or None for one that we do not expect."""
    if error.errno == errno.ENOSPC:
        return _name_full_disk([error])
    if error.errno in ROOM:
        return LoraError(SYSTEM[error.errno], f"{ROOM[error.errno]}, make room, and run it again")
    if error.errno in SYSTEM:
        hint = REMEDIES.get(error.errno, "choose another place")
        if error.errno not in REMEDIES and (file := _name_file(error)):
            hint = f"ls -ld {quote(plain_files.find_existing(Path(file)))}"
        return LoraError(
            f"{SYSTEM[error.errno]}: {error.filename or _first_telling_line(error)}", hint
        )
    # transformers raises a bare OSError for a name that is neither a folder nor on the hub, and for
    # a model that lacks files
    if type(error) is OSError and error.errno is None:
        return LoraError(_first_telling_line(error), MODEL)
    return None


def _name_full_disk(chain: Sequence[BaseException]) -> LoraError:
    """Return the error for a disk without room, and which one it is where an error says that."""
    file = next(filter(None, map(_name_file, chain)), None)
    if file is None:
        return LoraError("the disk is full", "df -h, make room, and run it again")
    look = f"df -h {quote(plain_files.find_existing(Path(file)))}"
    return LoraError(f"the disk is full: {file}", f"{look}, make room, and run it again")


def _name_file(error: BaseException) -> str | None:
    """Return the file that a failure of the system names; it may name none, or a number."""
    named = getattr(error, "filename", None)
    return os.fsdecode(named) if named and isinstance(named, (str, bytes)) else None


def _walk_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error, then what caused it, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _first_telling_line(error: BaseException) -> str:
    """Return the first line that says more than an HTTP status."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not re.match(r"\d{3} (Client|Server) Error", line)]
    first = (telling or lines or [type(error).__name__])[0]
    return first if len(first) <= LONGEST else f"{first[: LONGEST - 1]}…"
