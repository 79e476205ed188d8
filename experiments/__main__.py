"""The command `diffjax`: `diffjax train --config=digits` is `python -m experiments.train`."""

import ast
import difflib
import re
import runpy
import sys
from pathlib import Path

_FOLDER = Path(__file__).parent


def main() -> int:
    """Runs the executable that the first argument names, with the other arguments."""
    found = commands()
    name, *rest = sys.argv[1:] or ["--help"]
    name = name.replace("-", "_") if not name.startswith("-") else name
    if name in ("--help", "-h", "-help", "help"):
        print("diffjax COMMAND --flag=value …; diffjax COMMAND --help describes one.\n")
        width = max(map(len, found))
        print("\n".join(f"  {command:<{width}}  {about}" for command, about in found.items()))
        return 0
    if name == "--version":
        import diffjax

        print(f"diffjax {diffjax.__version__}")
        return 0
    if name not in found:
        near = difflib.get_close_matches(name, found, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "diffjax --help lists them"
        print(f"error: no command is called {name!r}; {hint}", file=sys.stderr)
        return 2
    # As with `python -m`, modules of the current folder can be named in configs.
    if "" not in sys.path:
        sys.path.append("")
    sys.argv = [f"diffjax {name}", *rest]
    runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)
    return 0


def commands() -> dict[str, str]:
    """All executables of this folder, with the first line of their docstrings.

    Example:
        >>> "train" in commands(), "cli" in commands()
        (True, False)
    """
    files = {file.stem: file for file in _FOLDER.glob("*.py")}
    files |= {
        file.parent.name: file.with_name("__init__.py") for file in _FOLDER.glob("*/__main__.py")
    }
    found = {}
    for name, file in sorted(files.items()):
        text = file.read_text(encoding="utf-8")
        if file.stem == "__init__" or '\nif __name__ == "__main__":' in text:
            first = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
            found[name] = re.split(r"[.:] |\.$", first)[0]
    return found


if __name__ == "__main__":
    sys.exit(main())
