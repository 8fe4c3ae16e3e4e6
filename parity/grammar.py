"""The story grammar: small tales with a hero, a goal, a problem, its solution and sums that come out right.

A tale is a pure function of one integer stream. What its end says was fixed by its beginning (who, where, which thing
of which colour, the weather, how many loaves), so a reader that remembers predicts it and one that sees a single token
back cannot. Pronouns agree because hero and friend never share one; "was" and "were" follow the thing; sums are
computed.

A tale's (hero, place, thing) decides its split by a stable hash. The text alone gives the three back (`triple_of`), so
no text of the held-out split can come out of the training split.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

__all__ = [
    "HEROES",
    "NUMBERS",
    "PLACES",
    "THINGS",
    "Stream",
    "Tale",
    "article",
    "is_held_out",
    "mix",
    "tell",
    "triple_of",
]

_T = TypeVar("_T")
_MASK = (1 << 64) - 1

# fmt: off
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)
# fmt: on


class _Say(Protocol):
    """Adds one of the ways to the tale; `more` fills slots from here on."""

    def __call__(self, *ways: str, **more: str) -> None: ...


class _Who(NamedTuple):
    he: str
    him: str
    his: str
    himself: str


class _Place(NamedTuple):
    where: str
    spots: tuple[str, ...]
    deep: str


class _Thing(NamedTuple):
    plural: bool
    purpose: str
    done: str
    harm: str


class _Trade(NamedTuple):
    one: str
    many: str
    tool: str
    mended: str


# Adds a problem and its solution to the tale; takes the stock and returns what is left of it.
_Problem = Callable[[_Say, "Stream", int, _Trade, _Place], int]

_SHE = _Who("she", "her", "her", "herself")
_HE = _Who("he", "him", "his", "himself")

# fmt: off
_WOMEN = ("Ada", "Mira", "Lena", "Tilda", "Ruth", "Nora", "Iris", "Wanda", "Olga", "Petra", "Zoe", "Hanna")
_MEN = ("Otto", "Finn", "Jonas", "Emil", "Bruno", "Karl", "Victor", "Hugo", "Anton", "Leo", "Milo", "Ravi")
# fmt: on
HEROES: dict[str, _Who] = {**dict.fromkeys(_WOMEN, _SHE), **dict.fromkeys(_MEN, _HE)}

PLACES: dict[str, _Place] = {
    "harbour": _Place("in the harbour", ("under the nets", "behind the boats", "beside the crane"), "dock"),
    "forest": _Place("in the forest", ("under the ferns", "behind the oak", "beside the stump"), "pit"),
    "village": _Place("in the village", ("under the bench", "behind the bakery", "beside the fountain"), "well"),
    "valley": _Place("in the valley", ("under the willow", "behind the barn", "beside the brook"), "ditch"),
    "castle": _Place("in the castle", ("under the stairs", "behind the throne", "beside the chimney"), "cellar"),
    "desert": _Place("in the desert", ("under the sand", "behind the dune", "beside the camel"), "hole"),
    "island": _Place("on the island", ("under the palm", "behind the cliff", "beside the shells"), "cave"),
    "mountain": _Place("on the mountain", ("under the snow", "behind the rock", "beside the pine"), "crack"),
    "farm": _Place("on the farm", ("under the hay", "behind the tractor", "beside the trough"), "silo"),
    "market": _Place("at the market", ("under the stall", "behind the cart", "beside the scales"), "drain"),
    "station": _Place("at the station", ("under the platform", "behind the engine", "beside the clock"), "shaft"),
    "lake": _Place("at the lake", ("under the pier", "behind the reeds", "beside the canoe"), "pool"),
}

THINGS: dict[str, _Thing] = {
    "lantern": _Thing(False, "light the path", "lit the path", "had a cracked glass"),
    "key": _Thing(False, "open the gate", "opened the gate", "had a bent end"),
    "map": _Thing(False, "find the way", "found the way", "had a torn corner"),
    "bell": _Thing(False, "call the children", "called the children", "had a split rim"),
    "kettle": _Thing(False, "make the tea", "made the tea", "had a leak"),
    "drum": _Thing(False, "lead the parade", "led the parade", "had a torn skin"),
    "kite": _Thing(False, "win the contest", "won the contest", "had a broken tail"),
    "violin": _Thing(False, "play at the wedding", "played at the wedding", "had a loose string"),
    "umbrella": _Thing(False, "keep the books dry", "kept the books dry", "had a bent rib"),
    "anchor": _Thing(False, "hold the boat", "held the boat", "had a rusty ring"),
    "telescope": _Thing(False, "count the stars", "counted the stars", "had a cracked lens"),
    "wagon": _Thing(False, "carry the wood", "carried the wood", "had a broken wheel"),
    "boots": _Thing(True, "cross the stream", "crossed the stream", "had holes"),
    "scissors": _Thing(True, "cut the ribbon", "cut the ribbon", "had a loose screw"),
    "glasses": _Thing(True, "read the letter", "read the letter", "had a cracked lens"),
    "oars": _Thing(True, "row to the other side", "rowed to the other side", "had broken ends"),
}

_TRADES: dict[str, _Trade] = {
    "baker": _Trade("loaf", "loaves", "warm wax", "sealed"),
    "gardener": _Trade("pear", "pears", "green twine", "tied"),
    "tailor": _Trade("button", "buttons", "long needle", "sewed"),
    "potter": _Trade("cup", "cups", "wet clay", "patched"),
    "farmer": _Trade("egg", "eggs", "strong wire", "bound"),
    "fisher": _Trade("fish", "fish", "thin line", "laced"),
    "smith": _Trade("nail", "nails", "small hammer", "straightened"),
    "painter": _Trade("brush", "brushes", "thick glue", "glued"),
}

_TRAITS = {
    "shy": "asking is easier than it looks",
    "proud": "nobody is too big for a little help",
    "patient": "slow steps also reach the top",
    "curious": "a good question opens many doors",
    "stubborn": "a new plan is no defeat",
    "careful": "looking twice saves a long walk",
    "cheerful": "a song makes the work light",
    "anxious": "most fears are smaller in the morning",
}

_COLOURS = ["red", "blue", "green", "yellow", "white", "black", "orange", "silver"]

_WEATHER = {
    "rain fell on the roofs": "the rain had stopped",
    "snow covered the ground": "the snow had melted",
    "fog hid the sun": "the fog had lifted",
    "a cold wind blew": "the wind had died down",
    "thunder rolled far away": "the thunder was gone",
    "the sun was burning hot": "the air had turned cool",
}

_TIMES = {"morning": "evening", "afternoon": "night", "Monday": "Tuesday", "Friday": "Sunday"}

_THIEVES = ("crow", "goat", "monkey", "puppy", "squirrel", "fox")


def mix(*words: int) -> int:
    """A 64-bit integer from integers: SplitMix64's finalizer over each word in turn (Steele et al., OOPSLA 2014).

    Own arithmetic, because neither Python's nor numpy's generators promise the same choices in every version.
    """
    z = 0
    for word in words:
        z = (z + (word & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        z ^= z >> 31
    return z


class Stream:
    """Choices from a seed; `nats` adds up ln(options), an upper bound on the information in what was told."""

    def __init__(self, *key: int) -> None:
        self._key = mix(*key)
        self._count = 0
        self.nats = 0.0

    def pick(self, options: Sequence[_T]) -> _T:
        """One of the options, all equally likely."""
        self._count += 1
        self.nats += math.log(len(options))
        return options[mix(self._key, self._count) % len(options)]

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return self.pick(range(low, high + 1))


@dataclass(frozen=True)
class Tale:
    """One story: its text, its (hero, place, thing), and the nats of the choices that made it."""

    text: str
    triple: tuple[str, str, str]
    nats: float


def is_held_out(triple: tuple[str, str, str]) -> bool:
    """True for one (hero, place, thing) in eight: the first byte of SHA-256 of "hero|place|thing" modulo 8 is 0."""
    return hashlib.sha256("|".join(triple).encode()).digest()[0] % 8 == 0


def triple_of(text: str) -> tuple[str, str, str]:
    """The (hero, place, thing) that a story tells of: the first name, the first place and the first thing in its text.

    Raises ValueError if the text lacks one of them.
    """
    words = [word.strip(".,?!\"'") for word in text.split()]
    found = [next((word for word in words if word in known), "") for known in (HEROES, PLACES, THINGS)]
    if not all(found):
        raise ValueError(f"text is no story of this grammar: hero, place, thing read as {found}; pass a whole story")
    return found[0], found[1], found[2]


def article(phrase: str) -> str:
    """The phrase with "a" or "an" before it, by its first letter."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _count(number: int, trade: _Trade) -> str:
    return f"{NUMBERS[number]} {trade.one if number == 1 else trade.many}"


def tell(stream: Stream, held_out: bool) -> Tale:
    """One tale from the stream, its triple drawn until it lies in the wanted split."""
    while True:
        nats = stream.nats  # what a rejected draw cost is no information in the text
        triple = (stream.pick(tuple(HEROES)), stream.pick(tuple(PLACES)), stream.pick(tuple(THINGS)))
        if is_held_out(triple) == held_out:
            break
        stream.nats = nats
    hero, place_name, thing_name = triple
    who, place, thing = HEROES[hero], PLACES[place_name], THINGS[thing_name]
    # The friend has the other pronoun, so "she" and "he" each mean one person.
    friend = stream.pick([name for name, other in HEROES.items() if other is not who])
    fwho = HEROES[friend]
    trade_name, ftrade_name = stream.pick(tuple(_TRADES)), stream.pick(tuple(_TRADES))
    trade, ftrade = _TRADES[trade_name], _TRADES[ftrade_name]
    trait, colour = stream.pick(tuple(_TRAITS)), stream.pick(_COLOURS)
    weather, time = stream.pick(tuple(_WEATHER)), stream.pick(tuple(_TIMES))
    stock = stream.between(6, 12)
    slots = {
        "hero": hero, "he": who.he, "He": who.he.capitalize(), "him": who.him, "his": who.his,
        "His": who.his.capitalize(), "himself": who.himself,
        "friend": friend, "fhe": fwho.he, "fHe": fwho.he.capitalize(), "fhim": fwho.him, "fhis": fwho.his,
        "trait": trait, "a_trait": article(trait), "lesson": _TRAITS[trait],
        "trade": trade_name, "a_trade": article(trade_name), "a_ftrade": article(ftrade_name), "ftrade": ftrade_name,
        "where": place.where, "deep": place.deep, "place": place_name,
        "thing": f"{colour} {thing_name}", "noun": thing_name, "purpose": thing.purpose, "done": thing.done,
        "a_thing": f"{colour} {thing_name}" if thing.plural else article(f"{colour} {thing_name}"),
        "harm": thing.harm, "harms": thing.harm.replace("had", "have" if thing.plural else "has", 1),
        "it": "they" if thing.plural else "it", "It": "They" if thing.plural else "It",
        "them": "them" if thing.plural else "it", "was": "were" if thing.plural else "was",
        "are": "are" if thing.plural else "is",
        "weather": weather, "Weather": weather[0].upper() + weather[1:], "calm": _WEATHER[weather],
        "time": time, "later": _TIMES[time], "stock": _count(stock, trade), "goods": trade.many,
        "tool": ftrade.tool, "mended": ftrade.mended,
    }  # fmt: skip

    told: list[str] = []

    def say(*ways: str, **more: str) -> None:
        slots.update(more)
        told.append(stream.pick(ways).format(**slots))

    say(
        "Long ago {hero} was {a_trait} {trade} who lived {where}.",
        "Once there was {a_trait} {trade} called {hero}, who lived {where}.",
        "In a little house {where} lived {hero}, {a_trait} {trade}.",
        "There lived {a_trait} {trade} {where}, and {his} name was {hero}.",
    )
    say(
        "{He} had {a_thing} to {purpose}, and {stock} to sell.",
        "{He} owned {a_thing}, which {he} needed to {purpose}, and {his} basket held {stock}.",
        "To {purpose}, {he} kept {a_thing} by the door, next to {stock}.",
        "In {his} bag {was} {a_thing} to {purpose} and {stock}."
        if thing.plural
        else "In {his} bag there was {a_thing} to {purpose}, and there were {stock}.",
    )
    say(
        "One {time} {weather}.",
        "On that {time}, {weather}.",
        "It was {time}, and {weather}.",
        "{Weather} on the {time} when it all began.",
    )
    left = stream.pick(_PROBLEMS)(say, stream, stock, trade, place)
    say(
        "So in the end {hero} {done} after all.",
        "With the {thing}, {hero} {done} that same day.",
        "Before the {later} was over, {hero} {done}.",
        "Then {he} took the {thing} and {done}, as {he} had hoped.",
    )
    say(
        "When {later} came, {calm}, and {hero} had {left}.",
        "By {later} {calm}. {hero} counted {his} {goods}: {left}.",
        "That {later} {calm}, and in {his} basket {he} found {left}.",
        left=_count(left, trade) if left else f"no {trade.many}",
    )
    say(
        "The {trait} {trade} had learned that {lesson}.",
        '"Now I know," said {hero}, "that {lesson}."',
        "{friend} smiled at the {trait} {trade}: {lesson}.",
        "And so {hero} saw that {lesson}.",
    )
    return Tale(" ".join(told), triple, stream.nats)


def _meet(say: _Say) -> None:
    say(
        "{He} went to {his} friend {friend}, {a_ftrade}.",
        "Down the road {he} met {friend}, {a_ftrade}.",
        "{friend}, {a_ftrade} and an old friend, came by.",
        "{He} knocked at the door of {friend}, {a_ftrade}.",
    )


def _give(say: _Say, stream: Stream, left: int, trade: _Trade) -> int:
    gift = stream.between(1, left - 1)
    say(
        "{hero} thanked {fhim} with {gift}, which left {rest}.",
        '"Take {gift}," said {hero}, and {he} kept {rest}.',
        "For this {friend} got {gift}, and {hero} still had {rest}.",
        "{hero} had {before} and gave {fhim} {gift}, so {rest} remained.",
        before=NUMBERS[left],
        gift=_count(gift, trade),
        rest=NUMBERS[left - gift],
    )
    return left - gift


def _lost(say: _Say, stream: Stream, left: int, trade: _Trade, place: _Place) -> int:
    say(
        "When {he} wanted to {purpose}, the {thing} {was} gone.",
        "But the {thing} {was} nowhere to be seen, and how could {he} {purpose} now?",
        "{hero} looked for the {thing}, but {it} {was} not there.",
        "But somebody had taken the {thing} in the dark.",
    )
    _meet(say)
    say(
        '"Have you seen my {thing}?" asked {hero}.',
        '"I have lost my {thing}," said {hero}.',
        '"Where {are} my {thing}?" {he} cried.',
        '"Without my {thing} I cannot {purpose}," {he} said.',
    )
    say(
        '"No," said {friend}, "but I saw a {thief} {spot}."',
        '"A {thief} ran past me," {fhe} said. "Look {spot}."',
        '"Perhaps the {thief} that sleeps {spot} knows more," said {friend}.',
        '{friend} thought for a while. "The {thief} hides what it steals {spot}," {fhe} said.',
        thief=stream.pick(_THIEVES),
        spot=stream.pick(place.spots),
    )
    say(
        "They walked there together, and {spot} lay the {thing}, just as {friend} had said.",
        "{hero} looked {spot}, and there {it} {was}: the {thing}.",
        "And truly, {spot} the {thief} sat with the {thing}, and it let {hero} take {them} back.",
        "The {thief} ran off when {hero} came, and the {thing} {was} still {spot}.",
    )
    return _give(say, stream, left, trade)


def _broken(say: _Say, stream: Stream, left: int, trade: _Trade, place: _Place) -> int:
    say(
        "When {he} picked up the {thing}, {it} fell to the floor, and now {it} {harm}.",
        "But the {thing} {harm}, and so {he} could not {purpose}.",
        "{hero} saw that the {thing} {harm}.",
        "That day {he} found out that the {thing} {harm}.",
    )
    _meet(say)
    say(
        '"Can you help me?" asked {hero}. "My {noun} {harms}."',
        '"Look, the {noun} {harms}," said {hero}, "and I want to {purpose}."',
        '"I must {purpose}," said {hero}, "but the {noun} {harms}."',
        '"What a pity about the {noun}!" {fhe} said.',
    )
    price = stream.between(1, left - 1)
    say(
        '"A {ftrade} can mend {them}," said {friend}, "for {price}."',
        '"Give me {price}," said {friend}, "and I will mend {them}."',
        '"That is easy for a {ftrade}," {fhe} said. "It costs {price}."',
        '{friend} nodded. "I ask {price} for the work," {fhe} said.',
        price=_count(price, trade),
    )
    say(
        "{fHe} took {fhis} {tool} and {mended} the {noun} until {it} {was} as good as new.",
        "With {fhis} {tool}, {friend} {mended} the {thing} in no time.",
        "{friend} {mended} {them} with the {tool} that every {ftrade} has.",
        "Out came the {tool}, and soon {fhe} had {mended} the {thing}.",
    )
    say(
        "{hero} paid {price} and kept {rest}.",
        "{hero} paid the {price}, and of {before} there remained {rest}.",
        "From {before} {goods} {hero} took {price} for {fhim}; {rest} stayed in the basket.",
        "{His} {before} {goods} became {rest}, for a promise is a promise.",
        before=NUMBERS[left],
        rest=NUMBERS[left - price],
    )
    return left - price


def _fallen(say: _Say, stream: Stream, left: int, trade: _Trade, place: _Place) -> int:
    mine, yours = stream.between(2, 8), stream.between(2, 8)
    say(
        "On the way the {thing} slipped from {his} hand and fell into the {deep}.",
        "{hero} stumbled, and the {thing} dropped into the {deep}.",
        "Then the {thing} fell into the {deep}, deeper than {he} could reach.",
        "A {thief} jumped up, and {hero} let the {thing} fall into the {deep}.",
        thief=stream.pick(_THIEVES),
    )
    say(
        "The {deep} was {total} steps deep, but {his} rope was only {mine} steps long.",
        "It was {total} steps down, and {hero} had {mine} steps of rope.",
        "{His} rope of {mine} steps was too short for a {deep} of {total}.",
        total=NUMBERS[mine + yours],
        mine=NUMBERS[mine],
        yours=NUMBERS[yours],
    )
    _meet(say)
    say(
        '"How long is your rope?" asked {friend}. "{Mine} steps," said {hero}, "and the {deep} has {total}."',
        '"How much is missing?" {fhe} asked. "{Yours} steps," said {hero}.',
        '"My {noun} fell into the {deep}," said {hero}. "{Yours} more steps, and I could reach {them}."',
        Mine=NUMBERS[mine].capitalize(),
        Yours=NUMBERS[yours].capitalize(),
    )
    say(
        '"I have {yours} steps of rope," said {friend}, and they tied the two together.',
        "{friend} brought {yours} steps of rope, and {mine} and {yours} make {total}.",
        '"Then my {yours} steps will do," {fhe} said, and the long rope reached the ground.',
    )
    say(
        "Slowly they pulled, and up came the {thing}.",
        "{hero} climbed down and came back with the {thing}.",
        "Soon the {thing} {was} in {his} hands again.",
        "{It} {was} wet and dusty, but {it} {was} the {thing} that {he} loved.",
    )
    return _give(say, stream, left, trade)


def _lent(say: _Say, stream: Stream, left: int, trade: _Trade, place: _Place) -> int:
    more, days = stream.between(2, 8), stream.between(2, 9)
    say(
        "But {he} had lent the {thing} to {friend}, {a_ftrade}, {days} days ago.",
        "The {thing} {was} not at home, for {friend}, {a_ftrade}, had borrowed {them} for {days} days.",
        "{friend}, {a_ftrade}, had asked for the {thing} and kept {them} {days} days.",
        days=NUMBERS[days],
    )
    say(
        "{He} walked to {fhis} house, where {friend} stood with the {tool} in {fhis} hand.",
        "{hero} found {fhim} at work with the {tool}.",
        "After a long search {he} saw {fhim} and {fhis} {tool}.",
    )
    say(
        '"I need my {thing} to {purpose}," said {hero}.',
        '"May I have my {thing} back?" asked {hero}.',
        '"You have had my {noun} for {days} days," said {hero}, "and now I must {purpose}."',
    )
    say(
        '"Forgive me," said {friend}. "I put {them} {spot} and forgot."',
        '"Oh dear," {fhe} said, "{it} {are} {spot}, where I left {them}."',
        '"Come," said {friend}, "I keep {them} {spot}."',
        spot=stream.pick(place.spots),
    )
    say(
        "They went to look, and {spot} {it} {was}, clean and {shine}.",
        "And {spot} stood the {noun}, {shine} as ever.",
        "{It} {was} still there, {spot}, and {shine} too.",
        shine=stream.pick(("bright", "dry", "whole")),
    )
    say(
        "As thanks {friend} gave {more}, so {before} became {rest}.",
        '"Take {more} for the long wait," {fhe} said, and now {hero} had {rest}.',
        "{fHe} added {more} to the {before} that {hero} had, and that made {rest}.",
        before=NUMBERS[left],
        more=_count(more, trade),
        rest=NUMBERS[left + more],
    )
    return left + more


_PROBLEMS: tuple[_Problem, ...] = (_lost, _broken, _fallen, _lent)
