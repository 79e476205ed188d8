"""Pages that MkDocs is given beside those of `docs/`: the notebooks, and a reference of docstrings.

The reference has one page a room of the library and one a folder in a room. A notebook's page has
its cells and the outputs that are stored in it; nothing is executed.
"""

import ast
import base64
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

DOCS = Path(__file__).parents[1]
LIBRARY = DOCS.parent / "diffjax"


def rooms() -> dict[str, list[Path]]:
    """The modules of each room, and of each folder in one: `{"diffjax.models.dit": [...]}`."""
    found: dict[str, list[Path]] = {}
    for file in sorted(LIBRARY.rglob("*.py")):
        room = found.setdefault(".".join(file.relative_to(LIBRARY.parent).parent.parts), [])
        if not file.stem.startswith("_"):
            room.append(file)
    return found


def address(room: str) -> str:
    """Where the page of a room is."""
    return f"reference/{room}.md"


def first_line(file: Path) -> str:
    """The first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "").partition("\n")[0]


def room_page(room: str, modules: list[Path]) -> str:
    """The Markdown of a room: its docstring, a list of its modules, and all that they define."""
    names = {f"{room}.{file.stem}": file for file in modules}
    heading = "    options: {show_root_heading: false, show_root_toc_entry: false, members: false}"
    lines = [f"# {room}", "", f"::: {room}", heading, ""]
    lines += [f"- [{file.stem}](#{name}): {first_line(file)}" for name, file in names.items()]
    for name in names:
        lines += ["", f"::: {name}"]
    return "\n".join(lines) + "\n"


def to_pages(text: str) -> str:
    """Text whose links to notebooks are links to their pages."""
    return re.sub(r"(\]\([\w/]+)\.ipynb\)", r"\1.md)", text)


def notebook_page(notebook: Path, config: Any) -> list[File]:
    """The page of a notebook, and the pictures in it."""
    name = notebook.stem
    lines, pictures = [], []

    def fenced(text: str, kind: str) -> None:
        lines.extend(["", f"``` {{ {kind} }}", text.rstrip("\n"), "```", ""])

    for cell in json.loads(notebook.read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            lines += ["", to_pages(source), ""]
            continue
        fenced(source, ".python")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if picture := data.get("image/png"):
                place = f"notebooks/{name}_{len(pictures)}.png"
                content = base64.b64decode("".join(picture))
                pictures.append(File.generated(config, place, content=content))
                lines += [f"![Output of the cell above]({Path(place).name})", ""]
            elif text := output.get("text") or data.get("text/plain"):
                fenced("".join(text), ".text .output")
    lines += ["", f"This page is a notebook: [{notebook.name}]({notebook.name}).", ""]
    page = File.generated(config, f"notebooks/{name}.md", content="\n".join(lines))
    return [page, *pictures]


def on_config(config: Any) -> Any:
    """Adds the rooms to the navigation."""
    groups: dict[str, list[Any]] = {}
    for room in rooms():
        top = ".".join(room.split(".")[:2])
        groups.setdefault(top, []).append({room.removeprefix("diffjax."): address(room)})
    library = [
        pages[0] if len(pages) == 1 else {top.removeprefix("diffjax."): pages}
        for top, pages in groups.items()
    ]
    reference = next(group["Reference"] for group in config.nav if "Reference" in group)
    reference.append({"The library": library})
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Pages link to pages; a notebook's own page alone links to the file."""
    return markdown if page.file.src_uri.startswith("notebooks/") else to_pages(markdown)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages themselves."""
    for room, modules in rooms().items():
        files.append(File.generated(config, address(room), content=room_page(room, modules)))
    for notebook in sorted(DOCS.glob("notebooks/*.ipynb")):
        for file in notebook_page(notebook, config):
            files.append(file)
    return files
