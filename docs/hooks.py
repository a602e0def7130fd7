"""What the site needs besides docs/: the README as its first page, and links to sources as addresses.

Pages link to each other and to sources by their paths, so that they can be read where the sources are. A link
to a file that is not there is an error.
"""

import re
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PICTURES = ("train.svg", "train-dark.svg")  # of the README, in benchmarks/results

LINK = re.compile(r"""(?<=\]\()[^)\s]+(?=\))|(?<=src=")[^"]+|(?<=srcset=")[^"]+""")


def on_config(config: Any) -> Any:
    """The repository's address, which pyproject.toml has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    config.repo_url = project["urls"]["Repository"]
    config.repo_name = config.repo_url.partition("//")[2].partition("/")[2]
    return config


def on_files(files: Any, config: Any) -> Any:
    """The README and its pictures are pages and files of the site."""
    files.append(File.generated(config, "index.md", abs_src_path=str(README)))
    for name in PICTURES:
        path = ROOT / "benchmarks/results" / name
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The page with its links as they are in the site."""
    folder = ROOT if page.file.src_uri == "index.md" else DOCS

    def target(match: re.Match[str]) -> str:
        link, mark, anchor = match[0].partition("#")
        if not link or "://" in link:
            return match[0]
        path = (folder / link).resolve()
        if not path.exists():
            raise PluginError(f"{page.file.src_uri}: there is no {link}")
        if path.name in PICTURES:
            return path.name
        if path.is_relative_to(DOCS):
            return f"{path.relative_to(DOCS)}{mark}{anchor}"
        kind = "tree" if path.is_dir() else "blob"
        return f"{config.repo_url}/{kind}/main/{path.relative_to(ROOT)}{mark}{anchor}"

    return LINK.sub(target, markdown)
