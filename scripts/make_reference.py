"""Write the generated pages of docs/reference/, or say which are not as they would be written.

python scripts/make_reference.py [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from scripts.reference import (  # noqa: E402
    artefact_page,
    cli_page,
    environment_page,
    message_page,
)

PAGES = {
    "cli.md": cli_page.make_page,
    "artefacts.md": artefact_page.make_page,
    "messages.md": message_page.make_page,
    "environment.md": environment_page.make_page,
}


def main(check: bool) -> int:
    """Write or check each page; the exit code."""
    stale = []
    for name, make_page in PAGES.items():
        path = ROOT / "docs" / "reference" / name
        text = make_page()
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
    for name in stale:
        print(f"error: docs/reference/{name} is stale; hint: make docs", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv))
