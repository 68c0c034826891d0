"""MkDocs hooks that keep the site self-contained.

Equations in ```math blocks become MathML, which browsers draw without a script. A link from a page
to a file outside docs/ becomes a link to a page with that file's text. Nothing is downloaded.
"""

import dataclasses
import importlib
import logging
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\((\.\./[^)#\s]+)\)")
OPTIONS = re.compile(r"^<!-- options: (\S+) (\w+) -->$", re.MULTILINE)
LANGUAGES = {".py": "python", ".md": "markdown", ".cpp": "cpp", ".h": "cpp", ".toml": "toml"}
log = logging.getLogger("mkdocs.hooks")


def on_config(config):
    def math(source, language, css_class, options, md, **rest):
        return f'<div class="math">{convert(source, display="block")}</div>'

    fence = {"name": "math", "class": "math", "format": math}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    return config


def on_files(files, config):
    for page in [file for file in files if file.src_uri.endswith(".md")]:
        for link in LINK.findall(Path(page.abs_src_path).read_text(encoding="utf-8")):
            target = outside(page.src_uri, link)
            if target is None or not (ROOT / target).is_file():
                continue
            elif Path(target).suffix == ".png":
                add(files, File.generated(config, target, abs_src_path=str(ROOT / target)))
            else:
                text = (ROOT / target).read_text(encoding="utf-8")
                language = LANGUAGES.get(Path(target).suffix, "text")
                content = f"# {target}\n\n~~~~~{language}\n{text}\n~~~~~\n"
                add(files, File.generated(config, source_uri(target), content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    def link(match):
        target = outside(page.file.src_uri, match[1])
        if target is None:
            return match[0]
        if not (ROOT / target).is_file():
            log.warning(f"{page.file.src_uri} links to {target}, which is not a file")
        uri = target if target.endswith(".png") else source_uri(target)
        return f"]({posixpath.relpath(uri, posixpath.dirname(page.file.src_uri))})"

    markdown = OPTIONS.sub(lambda match: options_table(*match.groups()), markdown)
    return LINK.sub(link, markdown)


def add(files, file):
    if files.get_file_from_path(file.src_uri) is None:
        files.append(file)


def source_uri(target):
    return f"source/{target}" if target.endswith(".md") else f"source/{target}.md"


def outside(page, link):
    """The path from the repository's root of a link that leaves docs/, else None."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return None if path.startswith("docs/") else path


def options_table(module, name):
    """The fields that a config class declares itself, as a Markdown table."""
    config = getattr(importlib.import_module(module), name)
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(config):
        if field.name in vars(config)["__annotations__"]:
            missing = field.default is dataclasses.MISSING
            default = field.default_factory() if missing else field.default
            shown = f"`{default}`" if isinstance(default, (str, float, int)) else ""
            meaning = [field.metadata.get("help", "")]
            choices = ", ".join(f"`{x}`" for x in field.metadata.get("choices") or ())
            meaning += [choices and f"one of {choices}"]
            meaning += [f"in {field.metadata['within']}" if field.metadata.get("within") else ""]
            text = "; ".join(filter(None, meaning)).replace("|", "/")
            rows.append(f"| `{field.name}` | {shown} | {text} |")
    return "\n".join(rows)
