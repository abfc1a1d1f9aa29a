"""Makes texts whose facts can only be looked up: people who do not exist, and a register that says where they live.

    python tools/make_planted_text.py --output=planted/text

Every person has a home, a trade and a pet, drawn at random from lists of equal shares, so that whoever has not read the
person's entry in the register guesses one time in as many as a list is long. The files:
  train.jsonl           texts that ask for somebody's entry and then give it
  register.jsonl        the database: an entry for each person of train.jsonl and of valid.jsonl
  valid.jsonl           the same kind of texts about people of whom no text is trained on
  questions.jsonl       their texts up to a value, as prompts, with the value as answer
  late.jsonl            entries of further people, which the register lacks
  late_questions.jsonl  questions for these
"""

import dataclasses
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from absl import flags

from retro_jax import program
from retro_jax.errors import UserError
from retro_jax.files import atomic_write

_OUTPUT = flags.DEFINE_string("output", None, "directory for the files", required=True)
_PEOPLE = flags.DEFINE_integer("people", 1500, "people of train.jsonl", lower_bound=1)
_HELD_OUT = flags.DEFINE_integer("held_out", 100, "people of valid.jsonl", lower_bound=1)
_LATE = flags.DEFINE_integer("late", 20, "people of late.jsonl", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "of names and facts")

FACTS = {
    "Lives in": "Athens Berlin Cairo Dublin Geneva Lima London Madrid Naples Paris Rome Vienna",
    "Works as": "actor baker carpenter cook doctor farmer judge miner painter pilot sailor weaver",
    "Keeps": "bears camels cats cows dogs ducks frogs goats horses lizards owls snakes",
}
_BEGINNINGS = "bal dor fen gal hul jor kel lum mer nov pel quin rav sor tam ul vor wen yar zil"
_ENDINGS = "ak bren dith ef gorn ik lan mos nar oth pim rus sten tuv wick"


@dataclasses.dataclass(frozen=True)
class Person:
    """A name that is nobody else's, and the value of each fact."""

    name: str
    facts: dict[str, str]

    def entry(self) -> str:
        """The person in the register: the name for about a chunk of 32 tokens, by which it is found, then the facts."""
        return (
            f"{self.name}. This is the entry of {self.name} in the register of the valley, and all that is known there "
            f"of {self.name}.{_told(self.facts.items())}"
        )

    def opening(self) -> str:
        """How a text asks for the entry: more than a chunk of 32 tokens, and it tells nothing."""
        return (
            f"{self.name}? Who knows {self.name}? Ask the register of the valley about {self.name}, since the people "
            "who live there have little to tell, and nothing but what follows here:"
        )


def main() -> None:
    generator = random.Random(_SEED.value)
    counts = (_PEOPLE.value, _HELD_OUT.value, _LATE.value)
    people = invent(sum(counts), generator)
    trained, held_out, late = (people[sum(counts[:i]) : sum(counts[: i + 1])] for i in range(len(counts)))
    _write("train", _texts(trained, generator))
    _write("register", _entries(trained + held_out))
    _write("valid", _texts(held_out, generator))
    _write("questions", _questions(held_out))
    _write("late", _entries(late))
    _write("late_questions", _questions(late))


def invent(count: int, generator: random.Random) -> list[Person]:
    """So many people, no two of one name.

    Raises:
      UserError: there are not so many names.
    """
    parts = [first + second for first in _BEGINNINGS.split() for second in _ENDINGS.split()]
    if count > len(parts) ** 2:
        raise UserError(f"{count:,} people are more than there are names, {len(parts) ** 2:,}")
    names = generator.sample(range(len(parts) ** 2), count)
    return [
        Person(
            f"{parts[number // len(parts)].title()} {parts[number % len(parts)].title()}",
            {fact: generator.choice(values.split()) for fact, values in FACTS.items()},
        )
        for number in names
    ]


def _told(facts: Iterable[tuple[str, str]]) -> str:
    return "".join(f" {fact} {value}." for fact, value in facts)


def _entries(people: Sequence[Person]) -> list[dict[str, str]]:
    return [{"id": f"register of {one.name}", "title": one.name, "text": one.entry()} for one in people]


def _texts(people: Sequence[Person], generator: random.Random) -> list[dict[str, str]]:
    """A text about each; facts come in any order, so that where one stands does not give away which it is."""
    return [
        {
            "id": f"text about {one.name}",
            "title": one.name,
            "text": one.opening() + _told(generator.sample(list(one.facts.items()), len(one.facts))),
        }
        for one in people
    ]


def _questions(people: Sequence[Person]) -> list[dict[str, str]]:
    return [
        {"id": f"{fact} of {one.name}", "prompt": f"{one.opening()} {fact}", "answer": value}
        for one in people
        for fact, value in one.facts.items()
    ]


def _write(name: str, rows: Sequence[dict[str, str]]) -> None:
    path = Path(_OUTPUT.value) / f"{name}.jsonl"
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"{path}: {len(rows):,} lines")


if __name__ == "__main__":
    program.run(main)
