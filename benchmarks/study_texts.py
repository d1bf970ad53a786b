"""Text for docs/study.md from Debian packages: `python benchmarks/study_texts.py data/study_text`.

Writes OUTPUT/prose.jsonl, English prose (package `anarchism`), and one file for each language, such as OUTPUT/ru.jsonl: manual
pages and translated descriptions of packages. A line is one document, {"id": …, "text": …}: a chapter, a page or the
description of one package. Paragraphs that occurred before, or are shorter than 40 bytes, are left out.

Packages and indices come from the package sources of this Debian system, through apt-get, into OUTPUT/packages; nothing is
installed, and the system's own lists stay as they are. Each package's licence is in its usr/share/doc/*/copyright.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository instead of benchmarks/

import argparse
import gzip
import hashlib
import html
import json
import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser

from configs.errors import UserError
from launch.common import output_folder, run_command

PROSE = "anarchism"
MANUALS = {
    "en": ("manpages", "manpages-dev"),
    "de": ("manpages-de",),
    "fr": ("manpages-fr",),
    "ja": ("manpages-ja", "manpages-ja-dev"),
    "ru": ("manpages-ru",),
    "zh": ("manpages-zh",),
}
LOCALES = {"zh": "zh_CN"}  # what Debian calls a language, if not as above
SHORTEST = 40  # bytes of a paragraph

_SKIPPED = re.compile(r"\.(nf|EX|TS|ie|de)\b")  # tables, examples and macros' own code
_RESUMED = re.compile(r"\.(fi|EE|TE|el|\.)")
_FONTS = re.compile(r"\.(B|I|BR|BI|IR|RB|IB|RI|SM|SB|Nm|Fl|Ar|Xr|Fn|Pa|Em|Va|Li|Dq|Sq|Ic|Cm|Ev|Dv|Er)\s+(.*)")
_ESCAPES = re.compile(r"\\f(\[[^]]*\]|\(..|.)|\\s[-+]?\d+|\\[&|/^,:%c]|\\\*\[[^]]*\]|\\\*\(..|\\m\[[^]]*\]")
_SIGNS = {
    "aq": "'",
    "dq": '"',
    "lq": "“",
    "rq": "”",
    "en": "–",
    "em": "—",
    "co": "©",
    "ti": "~",
    "ha": "^",
    "bu": "•",
    "oq": "‘",
    "cq": "’",
}


class Paragraphs:
    """Keeps the paragraphs that it has not seen yet."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()

    def new(self, paragraphs: Iterable[str]) -> list[str]:
        found = []
        for text in (" ".join(paragraph.split()) for paragraph in paragraphs):
            digest = hashlib.sha256(text.encode()).digest()
            if len(text.encode()) >= SHORTEST and digest not in self.seen:
                self.seen.add(digest)
                found.append(text)
        return found


class Page(HTMLParser):
    """The paragraphs of an HTML page."""

    BREAKS = re.compile("p|div|li|h[1-5]|d[dt]|t[dhr]|blockquote|br|section|[uo]l|table|title|body")
    LEFT_OUT = ("script", "style", "pre", "nav", "head", "footer")

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs, self.depth = [""], 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.depth += tag in self.LEFT_OUT
        if self.BREAKS.fullmatch(tag):
            self.paragraphs.append("")

    def handle_endtag(self, tag: str) -> None:
        self.depth -= tag in self.LEFT_OUT and self.depth > 0
        if self.BREAKS.fullmatch(tag):
            self.paragraphs.append("")

    def handle_data(self, data: str) -> None:
        if not self.depth:
            self.paragraphs[-1] += data


def manual_paragraphs(source: str) -> Iterator[str]:
    """The prose of a manual page in troff's man or mdoc macros, without tables and examples."""
    words: list[str] = []
    skipping = False
    for line in source.split("\n"):
        if _SKIPPED.match(line) or _RESUMED.match(line):
            skipping = bool(_SKIPPED.match(line))
            yield " ".join(words)
            words = []
        elif skipping or line.startswith(('.\\"', "'")):
            continue
        elif fonts := _FONTS.match(line):
            parts = [quoted or plain for quoted, plain in re.findall(r'"([^"]*)"|(\S+)', fonts[2])]
            words.append(plain_troff(("" if len(fonts[1]) == 2 and fonts[1].isupper() else " ").join(parts)))
        elif line.strip() and not line.startswith("."):
            words.append(plain_troff(line))
        else:
            yield " ".join(words)
            words = []
    yield " ".join(words)


def plain_troff(line: str) -> str:
    """A line without troff's escapes."""
    line = _ESCAPES.sub("", line)
    line = re.sub(r"\\\((..)|\\\[(..)\]", lambda found: _SIGNS.get(found[1] or found[2], ""), line)
    return line.replace("\\-", "-").replace("\\e", "\\").replace("\\ ", " ").replace("\\~", " ")


def manuals(folder: Path, language: str) -> Iterator[tuple[str, Iterable[str]]]:
    """(name, paragraphs) of each manual page of a language below `folder`."""
    share = folder / "usr/share/man"
    for path in sorted((share if language == "en" else share / language).glob("man[1-8]/*.gz")):
        if path.is_symlink():
            continue
        try:
            source = gzip.decompress(path.read_bytes()).decode()
        except UnicodeDecodeError:
            continue  # a few old pages are not UTF-8
        if not source.startswith(".so "):
            yield f"man/{path.name.removesuffix('.gz')}", manual_paragraphs(source)


def descriptions(lists: Path, language: str) -> Iterator[tuple[str, Iterable[str]]]:
    """(name, paragraphs) of each package's description in apt's index of a language; those left in English do not count."""
    key = f"Description-{language}"
    for path in sorted(lists.glob(f"*_main_i18n_Translation-{language.replace('_', '%5f')}")):
        for stanza in path.read_text(encoding="utf-8").split("\n\n"):
            fields = dict(re.findall(r"^([\w-]+): ?((?:.*)(?:\n .*)*)", stanza, re.MULTILINE))
            if key in fields:
                first, *rest = fields[key].split("\n")
                body = re.split(r"\n \.\n", "\n".join(["", *rest, ""]))
                yield f"package/{fields.get('Package', '')}", [first, *body]


def fetch(folder: Path, packages: Iterable[str]) -> None:
    """Download and unpack packages below `folder`, those that are not there yet."""
    for name in packages:
        target = folder / name
        if not target.exists():
            command(["apt-get", "download", name], folder)
            (archive,) = folder.glob(f"{name}_*.deb")
            command(["dpkg-deb", "-x", archive.name, f"{name}.part"], folder)
            (folder / f"{name}.part").rename(target)
            archive.unlink()


def fetch_descriptions(folder: Path, languages: Iterable[str]) -> Path:
    """Apt's indices of descriptions, in lists of their own; their folder."""
    lists = folder / "lists"
    if not lists.exists():
        part = folder / "lists.part"
        (part / "partial").mkdir(parents=True, exist_ok=True)
        names = " ".join(f'"{language}";' for language in languages)
        # Images of containers switch translations off in apt.conf.d, which would win over options of the command line.
        settings = f'Dir::Etc::Parts "/dev/null"; Acquire::GzipIndexes "false"; Dir::State::lists "{part.resolve()}";'
        configuration = folder / "apt.conf"
        configuration.write_text(f"{settings} Acquire::Languages {{ {names} }};\n", encoding="utf-8")
        command(["apt-get", "update"], folder, {"APT_CONFIG": str(configuration.resolve())})
        part.rename(lists)
    return lists


def command(words: list[str], folder: Path, variables: dict[str, str] | None = None) -> None:
    """Run a command of apt or dpkg; UserError if it fails."""
    try:
        done = subprocess.run(
            words, cwd=folder, env={**os.environ, **(variables or {})}, capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise UserError(
            f"{words[0]}: not found; this benchmark takes its text from a Debian system's package sources"
        ) from error
    if done.returncode:
        raise UserError(f"{' '.join(words)}: {(done.stderr.strip() or 'failed').splitlines()[-1]}")


def write(path: Path, documents: Iterable[tuple[str, Iterable[str]]]) -> None:
    """One line for each document that has new paragraphs."""
    paragraphs, count, size = Paragraphs(), 0, 0
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8") as file:
        for name, found in documents:
            if kept := paragraphs.new(found):
                text = "\n".join(kept)
                file.write(json.dumps({"id": name, "text": text}, ensure_ascii=False) + "\n")
                count, size = count + 1, size + len(text.encode())
    part.rename(path)
    print(f"{path}: {count:,} documents, {size / 1e6:.1f} MB", flush=True)


def chapters(folder: Path) -> Iterator[tuple[str, Iterable[str]]]:
    """(name, paragraphs) of each HTML page below `folder`."""
    for path in sorted(folder.rglob("html/*.html*")):
        source = path.read_bytes()
        text = (gzip.decompress(source) if path.suffix == ".gz" else source).decode("utf-8", "replace")
        yield path.name.partition(".")[0], [html.unescape(paragraph) for paragraph in Page(text).paragraphs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=output_folder, metavar="OUTPUT", help="folder for the texts; created if it is missing")
    output = parser.parse_args().output
    packages = output / "packages"
    packages.mkdir(exist_ok=True)
    fetch(packages, [PROSE, *(name for names in MANUALS.values() for name in names)])
    lists = fetch_descriptions(packages, [LOCALES.get(name, name) for name in MANUALS])
    write(output / "prose.jsonl", chapters(packages / PROSE))
    for language, names in MANUALS.items():
        local = LOCALES.get(language, language)
        pages = [page for name in names for page in manuals(packages / name, local)]
        write(output / f"{language}.jsonl", [*pages, *descriptions(lists, local)])


if __name__ == "__main__":
    run_command(main)
