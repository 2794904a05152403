"""What every room uses: the exception users see, the screen, files that appear whole, privacy
and remote code.

Its doors, in the order a reader needs them:

    LoraError, UsageError, RejectedError   what is raised where a user can do something about it
    join_errors, find_nearest              several problems as one error; "did you mean …?"
    quote                                  a path in a command line that is shown
    say, warn, Progress, format_duration   prose and the progress line, on stderr
    read_json, write_json, write_text      files read within limits, written whole or not at all
    refuse_link, refuse_occupied           folders that must not be written into
    translate_refusals                     a library's complaint about a recipe as a LoraError
    files, ui, library_errors              the rest of these three
    missing_packages                       the package that an error says is not installed
    library_warnings                       what the libraries warn of, as lines of ours
    privacy                                keeps secrets and the home path out of files and messages
    provenance                             the record of what produced an artefact
    remote_code                            whether a model's own code may run
    devices                                the device that models train and answer on
    gpu_faults                             what keeps torch from a GPU, and what one is too old for
    gpu_memory                             how torch's allocator asks a GPU for memory
    threads                                how threads wait, and what other work takes
"""

from lora_cli.common.errors import (
    LoraError,
    RejectedError,
    UsageError,
    find_nearest,
    join_errors,
    quote,
)
from lora_cli.common.files import read_json, refuse_link, refuse_occupied, write_json, write_text
from lora_cli.common.library_errors import translate_refusals
from lora_cli.common.ui import Progress, format_duration, say, warn

__all__ = [
    "LoraError",
    "Progress",
    "RejectedError",
    "UsageError",
    "devices",
    "files",
    "find_nearest",
    "format_duration",
    "gpu_faults",
    "gpu_memory",
    "join_errors",
    "library_errors",
    "missing_packages",
    "library_warnings",
    "privacy",
    "provenance",
    "quote",
    "read_json",
    "refuse_link",
    "refuse_occupied",
    "remote_code",
    "say",
    "threads",
    "translate_refusals",
    "ui",
    "warn",
    "write_json",
    "write_text",
]
