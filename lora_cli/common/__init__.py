"""What every room uses: the exception users see, the screen, files that appear whole, privacy
and remote code.

Its doors, in the order a reader needs them:

    LoraError, UsageError, RejectedError   what is raised where a user can do something about it
    join_errors, find_nearest              several problems as one error; "did you mean …?"
    quote, quote_words                     a path, or all words, in a command line that is shown
    name_in_ollama                         a name for a GGUF file's model that Ollama takes
    spell_count                            a number with what it is of: 1 row, 2 rows
    escape                                 others' text as one line
    show_as                                what messages call a copy by
    say, warn, Progress, format_duration   prose and the progress line, on stderr
    read_json, write_json, write_text      files read within limits, written whole or not at all
    refuse_link, refuse_occupied           folders that must not be written into
    translate_refusals                     a library's complaint about a recipe as a LoraError
    files, ui, library_errors              the rest of these three
    streams                                stdout, stderr and stdin, which take any text
    missing_packages                       the package that an error says is not installed
    library_warnings                       what the libraries warn of, as lines of ours
    stored                                 files of ours read back through a model of what we write
    privacy                                keeps secrets and the home path out of files and messages
    provenance                             the record of what produced an artefact
    remote_code                            whether a model's own code may run
    plain_files                            the door for files and folders of others
    lock, endings, children                one process a place; ends in order; programs end with it
    confined                               strangers' programs in a process with limits
    gguf_values                            the types of values in a GGUF file
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
)
from lora_cli.common.files import read_json, refuse_link, refuse_occupied, write_json, write_text
from lora_cli.common.library_errors import translate_refusals
from lora_cli.common.shown import escape, name_in_ollama, quote, quote_words, show_as, spell_count
from lora_cli.common.ui import Progress, format_duration, say, warn

__all__ = [
    "LoraError",
    "Progress",
    "RejectedError",
    "UsageError",
    "children",
    "confined",
    "devices",
    "endings",
    "escape",
    "files",
    "find_nearest",
    "format_duration",
    "gguf_values",
    "gpu_faults",
    "gpu_memory",
    "join_errors",
    "library_errors",
    "lock",
    "missing_packages",
    "name_in_ollama",
    "plain_files",
    "library_warnings",
    "privacy",
    "provenance",
    "quote",
    "quote_words",
    "read_json",
    "refuse_link",
    "refuse_occupied",
    "remote_code",
    "say",
    "spell_count",
    "stored",
    "streams",
    "show_as",
    "threads",
    "translate_refusals",
    "ui",
    "warn",
    "write_json",
    "write_text",
]
