"""Write the demo's data to `examples/data/`.

    python examples/make_data.py instructions            from the poems in that folder (anyone can rerun this)
    python examples/make_data.py answers                 likewise: demonstrations and comparisons of answers
    python examples/make_data.py english TOM OPTICKS     from Project Gutenberg's plain-text editions
    python examples/make_data.py poems FILE              from JSON lines {"text", "source"} of chinese-poetry

All selections depend on hashes of the poems, so a rerun gives the same files. Needs the standard library only.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "data"
ENGLISH = FOLDER / "english.jsonl.gz"
POEMS = FOLDER / "poems.jsonl.gz"
TRAIN = FOLDER / "instructions.train.json"
HELD_OUT = FOLDER / "instructions.heldout.json"
DEMONSTRATIONS = FOLDER / "demonstrations.jsonl.gz"
COMPARISONS_TRAIN = FOLDER / "comparisons.train.jsonl.gz"
COMPARISONS_HELD_OUT = FOLDER / "comparisons.heldout.jsonl.gz"

DOCUMENT_CHARACTERS = 1200
"""A document of English prose ends with the first paragraph that reaches this length."""
MAX_POEM_CHARACTERS = 1_250_000
"""Size of the shipped poems in characters: more than one epoch of the demo's training reads."""
LEFT_OUT = re.compile(
    r"Gutenberg|Produced by|Proofreading|pgdp|Transcriber|greek letters"
    r"|\[Illustration|\[Footnote|FOOTNOTES|--\+--|\| |nigger"
)
"""Paragraphs of the edition, not of the book; tables, which are meaningless on one line; and a slur."""
TRAIN_PER_FORM, HELD_OUT_PER_FORM = 600, 50
"""Number of poems of each form that become instructions."""
COMPARED_PER_FORM = 300
"""Number of further poems of each form, for which answers are compared."""
ANSWERS_COMPARED = 4
"""Answers per comparison (InstructGPT: 4 to 9)."""


# -- the four regular forms of Tang verse ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """A regular form of verse: the number of verses and of characters per verse."""

    name: str
    verses: int
    characters: int


FORMS = (
    Form("五言絕句", 4, 5),
    Form("七言絕句", 4, 7),
    Form("五言律詩", 8, 5),
    Form("七言律詩", 8, 7),
)
WORDINGS = (
    "這首詩是什麼體裁？",
    "下面的詩屬於哪一種體裁？",
    "請說出這首詩的體裁。",
    "判斷這首詩的體裁。",
)


def form_of(body: str) -> Form | None:
    """Return the form of a poem without its title, or None if it is irregular or has other than Chinese characters."""
    if not re.fullmatch(r"[\u4e00-\u9fff，。？！\n]+", body):
        return None
    verses = [verse for verse in re.split(r"[，。？！\n]+", body) if verse]
    lengths = {len(verse) for verse in verses}
    return next((form for form in FORMS if form.verses == len(verses) and lengths == {form.characters}), None)


@dataclass(frozen=True)
class Answer:
    """A kind of answer, and its share of the demonstrations in percent.

    Its `repr` is hashed to draw comparisons: renaming the class or a field changes the data.
    """

    text: str
    """Text with the placeholder `{form}` for the form's name."""
    right: bool
    """Whether it names the right form; otherwise it names another one."""
    share: int


ANSWERS = (
    Answer("這是一首{form}。", right=True, share=20),
    Answer("{form}", right=True, share=30),
    Answer("這是一首{form}。這是一首{form}。這是一首{form}。", right=True, share=30),
    Answer("這是一首{form}。", right=False, share=10),
    Answer("{form}", right=False, share=5),
    Answer("這是一首{form}。這是一首{form}。這是一首{form}。", right=False, share=5),
)
"""Best first: people prefer the right form, then a whole sentence, then one without repetition."""


# -- files -------------------------------------------------------------------------------------------------------------


def read_records(path: Path) -> Iterator[dict[str, str]]:
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    yield from (json.loads(line) for line in text.split("\n") if line)


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write gzipped JSON lines without a time stamp, so that equal records give equal bytes."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_bytes(gzip.compress(lines.encode(), compresslevel=9, mtime=0))


def write_json(path: Path, records: list[dict[str, str]]) -> None:
    path.write_text(json.dumps(records, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def rank(text: str) -> bytes:
    """Return a sorting key that gives texts a pseudo-random, reproducible order."""
    return hashlib.sha256(text.encode()).digest()


# -- English prose -----------------------------------------------------------------------------------------------------


def paragraphs(book: str) -> Iterator[str]:
    """Yield the book's paragraphs, each as one line, except those that match `LEFT_OUT`."""
    for block in re.split(r"\n\s*\n", book.replace("\r\n", "\n")):
        text = re.sub(r"_|\[[A-Z]\]", "", re.sub(r"\s+", " ", block)).strip()
        if re.search(r"\w", text) and not LEFT_OUT.search(text):
            yield text


def documents(book: str) -> Iterator[str]:
    """Join paragraphs into documents of at least `DOCUMENT_CHARACTERS`, except the last."""
    document: list[str] = []
    for paragraph in paragraphs(book):
        document.append(paragraph)
        if sum(map(len, document)) >= DOCUMENT_CHARACTERS:
            yield "\n".join(document)
            document = []
    if document:
        yield "\n".join(document)


def make_english(tom_sawyer: Path, opticks: Path) -> None:
    books = (("The Adventures of Tom Sawyer", tom_sawyer), ("Opticks", opticks))
    write_records(
        ENGLISH,
        [
            {"text": text, "source": title}
            for title, path in books
            for text in documents(path.read_text(encoding="utf-8"))
        ],
    )


# -- Chinese poems and questions about them ----------------------------------------------------------------------------


def make_poems(source: Path, target: Path = POEMS) -> None:
    """Keep Tang poems of the four forms, each body once, up to `MAX_POEM_CHARACTERS`."""
    chosen: dict[str, str] = {}
    for record in read_records(source):
        title, _, body = record["text"].partition("\n")
        if record["source"] == "全唐诗" and title.strip() and form_of(body) is not None:
            chosen.setdefault(body, record["text"].strip())
    size = 0
    kept = []
    for body in sorted(chosen, key=rank):
        size += len(chosen[body])
        if size > MAX_POEM_CHARACTERS:
            break
        kept.append({"text": chosen[body], "source": "全唐詩"})
    write_records(target, kept)


def instruction(body: str, form: Form, number: int) -> dict[str, str]:
    """Return the Alpaca record of the poem with index `number` among the chosen ones of its form."""
    return {"instruction": WORDINGS[number % len(WORDINGS)], "input": body, "output": form.name}


def poems_by_form() -> dict[Form, list[str]]:
    """Return the bodies of all poems by form, in pseudo-random order."""
    by_form: dict[Form, list[str]] = {form: [] for form in FORMS}
    bodies = {record["text"].partition("\n")[2] for record in read_records(POEMS)}
    for body in sorted(bodies, key=rank):
        form = form_of(body)
        if form is not None:
            by_form[form].append(body)
    return by_form


def make_instructions() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return training and held-out instructions about distinct poems, equally many of each form."""
    held_out, train = [], []
    for form, poems in poems_by_form().items():
        chosen = poems[: HELD_OUT_PER_FORM + TRAIN_PER_FORM]
        records = [instruction(body, form, number) for number, body in enumerate(chosen)]
        held_out += records[:HELD_OUT_PER_FORM]
        train += records[HELD_OUT_PER_FORM:]
    return sorted(train, key=lambda record: rank(record["input"])), sorted(
        held_out, key=lambda record: rank(record["input"])
    )


# -- answers of all kinds, and preferences among them ------------------------------------------------------------------


def answer_text(answer: Answer, right: str, key: str) -> str:
    """Return the answer's text about a poem of the form `right`; `key` selects among the wrong forms."""
    others = [form.name for form in FORMS if form.name != right]
    named = right if answer.right else others[rank(f"wrong {key}")[0] % len(others)]
    return answer.text.format(form=named)


def demonstration(record: dict[str, str]) -> dict[str, str]:
    """Return the instruction with an answer whose kind is drawn by the shares: quality varies, as among annotators."""
    place = int.from_bytes(rank(f"demonstrated {record['input']}")[:4], "big") % sum(item.share for item in ANSWERS)
    for answer in ANSWERS:
        place -= answer.share
        if place < 0:
            break
    return record | {"output": answer_text(answer, record["output"], record["input"])}


def comparison(record: dict[str, str]) -> dict[str, Any]:
    """Return the instruction as a prompt with some answers, best first."""
    prompt = f"{record['instruction']}\n{record['input']}"
    shuffled = sorted(ANSWERS, key=lambda answer: rank(f"{answer} {prompt}"))
    chosen = sorted(shuffled[:ANSWERS_COMPARED], key=ANSWERS.index)
    return {"prompt": prompt, "answers": [answer_text(answer, record["output"], prompt) for answer in chosen]}


def make_comparisons() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return comparisons about poems without demonstrations, and about the held-out poems."""
    first = HELD_OUT_PER_FORM + TRAIN_PER_FORM
    train = [
        instruction(body, form, number)
        for form, poems in poems_by_form().items()
        for number, body in enumerate(poems[first : first + COMPARED_PER_FORM])
    ]
    _, held_out = make_instructions()
    return [comparison(record) for record in sorted(train, key=lambda item: rank(item["input"]))], [
        comparison(record) for record in held_out
    ]


def make_answers(folder: Path = FOLDER) -> None:
    train, held_out = make_comparisons()
    write_records(folder / DEMONSTRATIONS.name, [demonstration(record) for record in make_instructions()[0]])
    write_records(folder / COMPARISONS_TRAIN.name, train)
    write_records(folder / COMPARISONS_HELD_OUT.name, held_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("instructions")
    commands.add_parser("answers")
    english = commands.add_parser("english")
    english.add_argument("tom_sawyer", type=Path)
    english.add_argument("opticks", type=Path)
    commands.add_parser("poems").add_argument("source", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "english":
        make_english(arguments.tom_sawyer, arguments.opticks)
    elif arguments.command == "poems":
        make_poems(arguments.source)
    elif arguments.command == "answers":
        make_answers()
    else:
        train, held_out = make_instructions()
        write_json(TRAIN, train)
        write_json(HELD_OUT, held_out)


if __name__ == "__main__":
    main()
