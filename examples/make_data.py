"""Makes the demo's data in `examples/data/`.

    python examples/make_data.py instructions            from the poems that lie there (anyone can rerun this)
    python examples/make_data.py answers                 likewise: demonstrations, and comparisons of answers
    python examples/make_data.py english TOM OPTICKS     from Project Gutenberg's plain-text editions
    python examples/make_data.py poems FILE              from JSON lines {"text", "source"} of chinese-poetry

Everything chosen is chosen by a hash of the poem itself, so a rerun gives the same files. Standard library only.
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
"""A document of English prose is closed at the first paragraph that reaches this length."""
MAX_POEM_CHARACTERS = 1_250_000
"""Poems shipped, in characters: more than the demo's training reads once."""
LEFT_OUT = re.compile(
    r"Gutenberg|Produced by|Proofreading|pgdp|Transcriber|greek letters"
    r"|\[Illustration|\[Footnote|FOOTNOTES|--\+--|\| |nigger"
)
"""Paragraphs of the edition, not of the book; tables, which lose their sense on one line; and a slur."""
TRAIN_PER_FORM, HELD_OUT_PER_FORM = 600, 50
"""Poems of each form that become an instruction."""
COMPARED_PER_FORM = 300
"""Poems of each form, other ones, whose answers are compared."""
ANSWERS_COMPARED = 4
"""Answers of one comparison (InstructGPT: 4 to 9)."""


# -- the four regular forms of Tang verse ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """A regular form: so many verses of so many characters."""

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
    """The form of a poem without its title; None where it is not regular or holds anything but Chinese characters."""
    if not re.fullmatch(r"[\u4e00-\u9fff，。？！\n]+", body):
        return None
    verses = [verse for verse in re.split(r"[，。？！\n]+", body) if verse]
    lengths = {len(verse) for verse in verses}
    return next((form for form in FORMS if form.verses == len(verses) and lengths == {form.characters}), None)


@dataclass(frozen=True)
class Answer:
    """A way to answer, and who gives it: of 100 demonstrations so many are like this."""

    text: str
    """`{form}` stands for the form's name."""
    right: bool
    """Else another form is named."""
    share: int


ANSWERS = (
    Answer("這是一首{form}。", right=True, share=20),
    Answer("{form}", right=True, share=30),
    Answer("這是一首{form}。這是一首{form}。這是一首{form}。", right=True, share=30),
    Answer("這是一首{form}。", right=False, share=10),
    Answer("{form}", right=False, share=5),
    Answer("這是一首{form}。這是一首{form}。這是一首{form}。", right=False, share=5),
)
"""From the best to the worst: people want the right form, then a whole sentence, and nothing twice."""


# -- files -------------------------------------------------------------------------------------------------------------


def read_records(path: Path) -> Iterator[dict[str, str]]:
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    yield from (json.loads(line) for line in text.split("\n") if line)


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write gzipped JSON lines, without a time stamp so that equal records give equal bytes."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_bytes(gzip.compress(lines.encode(), compresslevel=9, mtime=0))


def write_json(path: Path, records: list[dict[str, str]]) -> None:
    path.write_text(json.dumps(records, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def rank(text: str) -> bytes:
    """A key that orders texts as if at random, and always the same way."""
    return hashlib.sha256(text.encode()).digest()


# -- English prose -----------------------------------------------------------------------------------------------------


def paragraphs(book: str) -> Iterator[str]:
    """Yield the book's paragraphs on one line each, except those that are left out."""
    for block in re.split(r"\n\s*\n", book.replace("\r\n", "\n")):
        text = re.sub(r"_|\[[A-Z]\]", "", re.sub(r"\s+", " ", block)).strip()
        if re.search(r"\w", text) and not LEFT_OUT.search(text):
            yield text


def documents(book: str) -> Iterator[str]:
    """Join paragraphs to documents of `DOCUMENT_CHARACTERS` or a little more."""
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


# -- Chinese poems and what is asked about them ------------------------------------------------------------------------


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
    """The Alpaca record of the `number`-th chosen poem of its form."""
    return {"instruction": WORDINGS[number % len(WORDINGS)], "input": body, "output": form.name}


def poems_by_form() -> dict[Form, list[str]]:
    """The bodies of all poems, each form's in an order as if at random."""
    by_form: dict[Form, list[str]] = {form: [] for form in FORMS}
    bodies = {record["text"].partition("\n")[2] for record in read_records(POEMS)}
    for body in sorted(bodies, key=rank):
        form = form_of(body)
        if form is not None:
            by_form[form].append(body)
    return by_form


def make_instructions() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training and held-out instructions; no poem stands in both, and the four forms are equally many."""
    held_out, train = [], []
    for form, poems in poems_by_form().items():
        chosen = poems[: HELD_OUT_PER_FORM + TRAIN_PER_FORM]
        records = [instruction(body, form, number) for number, body in enumerate(chosen)]
        held_out += records[:HELD_OUT_PER_FORM]
        train += records[HELD_OUT_PER_FORM:]
    return sorted(train, key=lambda record: rank(record["input"])), sorted(
        held_out, key=lambda record: rank(record["input"])
    )


# -- answers of all kinds, and which of them people like ---------------------------------------------------------------


def say(answer: Answer, right: str, key: str) -> str:
    """What the answer says of a poem whose form is `right`; `key` chooses among the wrong forms."""
    others = [form.name for form in FORMS if form.name != right]
    named = right if answer.right else others[rank(f"wrong {key}")[0] % len(others)]
    return answer.text.format(form=named)


def demonstration(record: dict[str, str]) -> dict[str, str]:
    """The instruction with an answer of some kind: those who wrote them took more or less trouble."""
    place = int.from_bytes(rank(f"demonstrated {record['input']}")[:4], "big") % sum(item.share for item in ANSWERS)
    for answer in ANSWERS:
        place -= answer.share
        if place < 0:
            break
    return record | {"output": say(answer, record["output"], record["input"])}


def comparison(record: dict[str, str]) -> dict[str, Any]:
    """Answers to the instruction, the best first."""
    asked = f"{record['instruction']}\n{record['input']}"
    shuffled = sorted(ANSWERS, key=lambda answer: rank(f"{answer} {asked}"))
    chosen = sorted(shuffled[:ANSWERS_COMPARED], key=ANSWERS.index)
    return {"prompt": asked, "answers": [say(answer, record["output"], asked) for answer in chosen]}


def make_comparisons() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Comparisons about poems that no demonstration is about, and about the held-out ones."""
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
