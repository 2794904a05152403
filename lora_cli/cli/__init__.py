"""The command line: one verb, one short function, heavy imports inside it. Errors are rendered here
only."""

from __future__ import annotations

import re
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer

from lora_cli import __version__
from lora_cli.cli import (
    adapter_verbs,
    answer_verbs,
    draft_verbs,
    evaluate_verbs,
    gguf_verbs,
    help_verbs,
    import_verbs,
    onnx_verbs,
    publish_verbs,
    report_verbs,
    serve_verbs,
    training_verbs,
    usage,
)
from lora_cli.common import (
    LoraError,
    UsageError,
    endings,
    library_errors,
    privacy,
    streams,
    threads,
    ui,
)
from lora_cli.distributed import ranks

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["--help", "-h"]},
    pretty_exceptions_enable=False,
    help="Fine-tune language models with LoRA, QLoRA and DoRA; merge and export what was trained.",
)
for group in (
    draft_verbs,
    training_verbs,
    import_verbs,
    adapter_verbs,
    gguf_verbs,
    onnx_verbs,
    serve_verbs,
    answer_verbs,
    report_verbs,
    evaluate_verbs,
    publish_verbs,
    help_verbs,
):
    app.add_typer(group.verbs)

BUG = 70
INTERRUPTED = 128 + signal.SIGINT
"""Exit status of a bug: EX_SOFTWARE of sysexits.h."""


def _find_base(error: type[Exception], name: str) -> type[Exception]:
    """Return the class of this name that `error` derives from. ImportError where there is none."""
    for base in error.__mro__:
        if base.__name__ == name:
            return base
    raise ImportError(f"{error.__name__} is no {name}: lora does not know this typer")


# typer keeps its click to itself; a wrong option or argument is this base of what it does export
USAGE_ERROR: Any = _find_base(typer.BadParameter, "UsageError")


def _version(show: bool) -> None:
    if show:
        ui.report(f"lora {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


def _refuse_unusable(stdout: object, words: Sequence[str]) -> None:
    """Raise LoraError where there is nowhere to write results to, or a word is no text: it could
    stand in no record, and no model could read it."""
    if stdout is None:
        raise LoraError("standard output is closed", "leave it open, or > /dev/null")
    for word in words:
        if re.search("[\ud800-\udfff]", word):
            raise UsageError(f"{word} is not UTF-8", "rename it, or type it as UTF-8")


def main() -> NoReturn:
    """Run the command line: exit 0, 1 for a failed run, 2 for wrong usage, 70 for a bug, 129 by
    SIGHUP, 130 when interrupted, 143 by SIGTERM."""
    endings.listen()
    streams.open_streams()
    threading.excepthook = lambda ended: ui.say(
        *_list_traceback(ended.exc_value or ended.exc_type())
    )
    sys.unraisablehook = lambda ended: ui.say(*_list_traceback(ended.exc_value or ended.exc_type()))
    threads.bound_spinning()
    try:
        _refuse_unusable(sys.stdout, sys.argv[1:])
        status = app(prog_name="lora", standalone_mode=False)
        if status == INTERRUPTED:  # typer makes that of KeyboardInterrupt
            ui.say("interrupted")
        sys.exit(status)
    except LoraError as error:
        _fail(error)
    except typer.Abort:
        ui.say("interrupted")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        sys.exit(1)
    except USAGE_ERROR as error:
        if len(sys.argv) == 1:  # no command at all: the message is the help
            begin = f"Begin with: {usage.suggest_recipe()}"
            ui.say(*error.format_message().splitlines(), begin)
            sys.exit(2)
        _fail(usage.explain(error))
    except BaseException as error:
        _explain(error)


def _explain(error: BaseException) -> NoReturn:
    """Say what a library's exception means, or report it as a bug. What is no error goes on."""
    if not isinstance(error, Exception) and not library_errors.is_panic(error):
        raise error
    known = library_errors.translate(error)
    if ranks.count() > 1 and ranks.is_torn(error):
        known = LoraError("another process of this run has ended", "it says why")
    if known is None:
        _report(error)
    _fail(known, error)


def _list_traceback(error: BaseException) -> list[str]:
    """Return the lines that say where an error came from; those of what it says itself are
    indented."""
    text = privacy.mask_secrets(privacy.replace_home("".join(traceback.format_exception(error))))
    ours = ("  ", "Traceback ")
    return [line if line.startswith(ours) else f"  {line}" for line in text.splitlines()]


def _report(error: BaseException) -> NoReturn:
    """Say that what nobody has thought of is a bug: its traceback, and how to report it."""
    bug = (
        "",
        f"This is a bug in lora {__version__}, not a mistake of yours. Please report it with the "
        "lines above, the",
        "command, the recipe, and what `lora doctor --json` prints. Tokens and your home folder "
        "are left out above.",
    )
    _end([*_list_traceback(error), *bug], BUG, error)


def _fail(error: LoraError, cause: BaseException | None = None) -> NoReturn:
    _end(ui.list_lines(error), error.exit_code, cause or error)


def _end(lines: Sequence[str], status: int, error: BaseException) -> NoReturn:
    """End by an error: say it, unless this is one of several processes and another does."""
    if not ranks.tell_failure(lines, status, error):
        ui.say(*lines)
    sys.exit(status)
