"""Rendered scenes: what is in them, what can be said and asked about them, and how they look.

A scene holds two objects and their relation, or up to four objects in one or two groups. Everything is said in the words of
`COLORS`, `SHAPES` and `SIZES`, so that a caption determines the scene and only positions and lighting are left to chance.
"""

import math
import random
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from itertools import product

from PIL import Image, ImageDraw


COLORS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (240, 215, 40),
    "green": (40, 150, 60),
    "cyan": (60, 205, 220),
    "blue": (40, 70, 210),
    "purple": (150, 60, 190),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 0.145, "large": 0.215}  # half the width of the object, as a share of the image
NUMBERS = ("zero", "one", "two", "three", "four")
SPLITS = ("train", "validation", "test", "test_unseen")

UNSEEN_PAIRS = frozenset((color, SHAPES[5 * i % 6]) for i, color in enumerate(COLORS))
"""Combinations of a colour and a shape that no training, validation or test scene shows: every colour lacks one shape."""

# row, column
CORNERS = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}


@dataclass(frozen=True)
class Thing:
    """One object, described by three words."""

    size: str
    color: str
    shape: str

    def __str__(self) -> str:
        return f"{self.size} {self.color} {self.shape}"

    @property
    def noun(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def unseen(self) -> bool:
        return (self.color, self.shape) in UNSEEN_PAIRS


def plural(noun: str, count: int) -> str:
    return noun if count == 1 else noun + ("es" if noun.endswith("s") else "s")


def article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def partition(text: str) -> str:
    """`train` (70 %), `validation` (10 %) or `test` (20 %), by a hash of `text`."""
    bucket = zlib.crc32(text.encode()) % 10
    return "train" if bucket < 7 else "validation" if bucket == 7 else "test"


@dataclass(frozen=True)
class Scene:
    """What an image shows: one or two kinds of object, and how many of each. With a relation, `"left"` or `"above"`, the
    left or upper one stands first; without, objects lie anywhere."""

    things: tuple[Thing, ...]
    counts: tuple[int, ...]
    relation: str | None = None

    @cached_property
    def caption(self) -> str:
        """The canonical caption: objects in reading order, or the larger group first."""
        if self.relation:
            first, second = map(article, map(str, self.things))
            return f"{first} {'to the left of' if self.relation == 'left' else 'above'} {second}"
        groups = zip(self.things, self.counts, strict=True)
        return " and ".join(f"{NUMBERS[n]} {plural(str(thing), n)}" for thing, n in groups)

    @property
    def words(self) -> list[str]:
        return sorted(self.caption.split())

    @cached_property
    def split(self) -> str:
        """Where the scene belongs, by the bag of words of its caption, which no other split shares."""
        return "test_unseen" if any(thing.unseen for thing in self.things) else partition(" ".join(self.words))

    def swapped(self, attribute: str) -> "Scene":
        """The scene whose two objects have exchanged `"size"`, `"color"`, `"shape"`, or (`"thing"`) places."""
        first, second = self.things
        if attribute == "thing":
            return replace(self, things=(second, first))
        one, two = getattr(first, attribute), getattr(second, attribute)
        return replace(self, things=(replace(first, **{attribute: two}), replace(second, **{attribute: one})))

    def place(self, rng: random.Random) -> list[tuple[Thing, float, float]]:
        """Positions (centres, as shares of the image) at which the objects do not touch and the relation holds."""
        if self.relation:
            along = (rng.uniform(0.22, 0.28), rng.uniform(0.72, 0.78))
            across = (rng.uniform(0.34, 0.66), rng.uniform(0.34, 0.66))
            xs, ys = (along, across) if self.relation == "left" else (across, along)
            return list(zip(self.things, xs, ys, strict=True))
        objects = [thing for thing, n in zip(self.things, self.counts, strict=True) for _ in range(n)]
        corners = rng.sample(list(CORNERS.values()), len(objects))
        return [in_corner(thing, corner, rng) for thing, corner in zip(objects, corners, strict=True)]

    def render(self, rng: random.Random, image_size: int = 32) -> Image.Image:
        return render(self.place(rng), rng, image_size)

    def question(self, rng: random.Random) -> tuple[str, str]:
        """A question about the scene and its answer."""
        return rng.choice(_RELATION_QUESTIONS if self.relation else _COUNT_QUESTIONS)(self, rng)


def in_corner(thing: Thing, corner: tuple[int, int], rng: random.Random) -> tuple[Thing, float, float]:
    row, column = corner
    return thing, 0.25 + 0.5 * column + rng.uniform(-0.03, 0.03), 0.25 + 0.5 * row + rng.uniform(-0.03, 0.03)


@lru_cache
def scenes(split: str) -> tuple[Scene, ...]:
    """Every scene of a split, in a fixed order."""
    things = [Thing(*words) for words in product(SIZES, COLORS, SHAPES)]
    found = []
    for first in things:
        found += [Scene((first,), (n,)) for n in (2, 3, 4)]
        for second in things:
            if first != second:
                found += [Scene((first, second), (1, 1), relation) for relation in ("left", "above")]
                found += [Scene((first, second), (n, 1)) for n in (2, 3)]
    return tuple(scene for scene in found if scene.split == split)


# --- questions -----------------------------------------------------------------------------------------------------


def _pick(scene: Scene, rng: random.Random) -> tuple[Thing, int]:
    i = rng.randrange(len(scene.things))
    return scene.things[i], scene.counts[i]


def _ask_attribute(attribute: str, scene: Scene, rng: random.Random) -> tuple[str, str]:
    thing, n = _pick(scene, rng)
    named_by = [name for name in ("color", "shape") if name != attribute]
    if sum(all(getattr(t, a) == getattr(thing, a) for a in named_by) for t in scene.things) > 1:
        return _ask_presence(scene, rng)  # they name two kinds of object
    names = {"color": plural(thing.shape, n), "shape": f"{thing.color} {plural('object', n)}"}
    name = names.get(attribute, plural(thing.noun, n))
    return f"What {attribute} {'is' if n == 1 else 'are'} the {name}?", getattr(thing, attribute)


def _ask_count(scene: Scene, rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.3:
        return "How many objects are there?", NUMBERS[sum(scene.counts)]
    thing, _ = _pick(scene, rng)
    attribute = rng.choice(("color", "shape"))
    value = getattr(thing, attribute)
    n = sum(n for t, n in zip(scene.things, scene.counts, strict=True) if getattr(t, attribute) == value)
    noun = f"{value} objects" if attribute == "color" else plural(value, 2)
    return f"How many {noun} are there?", NUMBERS[n]


def _ask_presence(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Half of the questions are about an object that is there, the others about one that differs in one word."""
    thing, _ = _pick(scene, rng)
    if rng.random() < 0.5:
        attribute, words = rng.choice((("color", tuple(COLORS)), ("shape", SHAPES)))
        thing = replace(thing, **{attribute: rng.choice([w for w in words if w != getattr(thing, attribute)])})
        # an unseen pair in a question would always be answered "no" in training
        if thing.unseen and scene.split != "test_unseen":
            return _ask_presence(scene, rng)
    there = any(t.noun == thing.noun for t in scene.things)
    return f"Is there {article(thing.noun)}?", "yes" if there else "no"


def _ask_relation(where: bool, scene: Scene, rng: random.Random) -> tuple[str, str]:
    if scene.things[0].noun == scene.things[1].noun:
        return _ask_presence(scene, rng)
    sides, of = (("to the left", "to the right"), " of") if scene.relation == "left" else (("above", "below"), "")
    first = int(rng.random() >= 0.5)
    one, two, side = scene.things[first].noun, scene.things[1 - first].noun, sides[first]
    if where:
        return f"Where is the {one} relative to the {two}?", side
    asked = rng.choice(sides)
    return f"Is the {one} {asked}{of} the {two}?", "yes" if asked == side else "no"


_EITHER = (*(partial(_ask_attribute, name) for name in ("color", "shape", "size")), _ask_presence)
_RELATION_QUESTIONS = (*_EITHER, partial(_ask_relation, True), partial(_ask_relation, False))
_COUNT_QUESTIONS = (*_EITHER, _ask_count, _ask_count)


# --- stories -------------------------------------------------------------------------------------------------------


def story(split: str, rng: random.Random) -> list[tuple[str, list[tuple[Thing, float, float]]]]:
    """Three to six steps, each a sentence and the objects (with their positions) of the image that follows it. A sentence
    tells what changes and no more ("It grows."). A story belongs to the split of its first sentence."""
    unseen = split == "test_unseen"
    while True:
        shapes = rng.sample(SHAPES, 4)
        state = {}
        for shape in shapes[: rng.choice((1, 2))]:
            thing = Thing(rng.choice(list(SIZES)), rng.choice(list(COLORS)), shape)
            state[shape] = (thing, rng.choice([c for c in CORNERS if c not in [at for _, at in state.values()]]))
        sentence = _sentence(
            " and ".join(f"{article(str(thing))} is in the {corner} corner" for thing, corner in state.values())
        )
        if any(thing.unseen for thing, _ in state.values()) == unseen and (unseen or partition(sentence) == split):
            break
    steps = []
    spoken = shapes[0] if len(state) == 1 else None
    for step in range(rng.randint(3, 6)):
        if step:
            sentence, spoken = _change(state, shapes, spoken, unseen, rng)
        steps.append((sentence, [in_corner(thing, CORNERS[corner], rng) for thing, corner in state.values()]))
    return steps


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _change(
    state: dict, shapes: list[str], spoken: str | None, unseen: bool, rng: random.Random
) -> tuple[str, str | None]:
    """Changes `state` in place by one event. Returns the sentence and the shape that "it" may stand for afterwards."""
    taken = {corner for _, corner in state.values()}
    absent = [shape for shape in shapes if shape not in state]
    events = ["move", "move", "resize", "color"]
    if absent and len(state) < 3:
        events += ["appear", "appear"]
    if len(state) > 1:
        events += ["leave"]
    event = rng.choice(events)

    if event == "appear":
        shape = rng.choice(absent)
        color = rng.choice([c for c in COLORS if unseen or (c, shape) not in UNSEEN_PAIRS])
        corner = rng.choice([c for c in CORNERS if c not in taken])
        state[shape] = (Thing(rng.choice(list(SIZES)), color, shape), corner)
        return _sentence(f"{article(str(state[shape][0]))} appears in the {corner} corner"), shape

    shape = rng.choice(list(state))
    name = "it" if shape == spoken and rng.random() < 0.5 else f"the {shape}"
    thing, corner = state[shape]
    if event == "leave":
        del state[shape]
        return _sentence(f"{name} leaves"), None
    if event == "move":
        row, column = CORNERS[corner]
        there = {"up": (0, column), "down": (1, column), "to the left": (row, 0), "to the right": (row, 1)}
        # two of the three other corners lie one step away; with at most three objects one of all is free
        ways = [(way, c) for way, at in there.items() for c in CORNERS if CORNERS[c] == at and c not in taken]
        if ways:
            way, corner = rng.choice(ways)
            state[shape] = (thing, corner)
            return _sentence(f"{name} moves {way}"), shape
        event = "resize"
    if event == "resize":
        grows = thing.size == "small"
        state[shape] = (replace(thing, size="large" if grows else "small"), corner)
        return _sentence(f"{name} {'grows' if grows else 'shrinks'}"), shape
    color = rng.choice([c for c in COLORS if c != thing.color and (unseen or (c, shape) not in UNSEEN_PAIRS)])
    state[shape] = (replace(thing, color=color), corner)
    return _sentence(f"{name} turns {color}"), shape


# --- rendering -----------------------------------------------------------------------------------------------------

_STAR = [(r * math.sin(math.pi * k / 5), -r * math.cos(math.pi * k / 5)) for k, r in enumerate((1.1, 0.45) * 5)]
_POLYGONS = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -0.95), (1, 0.8), (-1, 0.8)],
    "star": [(max(-1, min(1, x)), max(-1, min(1, y))) for x, y in _STAR],
    "cross": [
        *((-1, -0.35), (-0.35, -0.35), (-0.35, -1), (0.35, -1), (0.35, -0.35), (1, -0.35)),
        *((1, 0.35), (0.35, 0.35), (0.35, 1), (-0.35, 1), (-0.35, 0.35), (-1, 0.35)),
    ],
}
_OVERSAMPLING = 4


def render(placed: Iterable[tuple[Thing, float, float]], rng: random.Random, image_size: int = 32) -> Image.Image:
    """Draws objects with the centres `(x, y)`, as shares of width and height, on a light ground. The brightness of the
    ground and of the colours varies a little."""
    width = image_size * _OVERSAMPLING
    ground = rng.randint(232, 255)
    image = Image.new("RGB", (width, width), (ground, ground, ground))
    draw = ImageDraw.Draw(image)
    for thing, x, y in placed:
        light = rng.uniform(0.9, 1.05)
        fill = tuple(min(255, round(light * value)) for value in COLORS[thing.color])
        x, y, radius = x * width, y * width, SIZES[thing.size] * width
        box = (x - radius, y - radius, x + radius, y + radius)
        if thing.shape == "circle":
            draw.ellipse(box, fill=fill)
        elif thing.shape == "ring":
            draw.ellipse(box, outline=fill, width=round(0.42 * radius))
        else:
            draw.polygon([(x + radius * dx, y + radius * dy) for dx, dy in _POLYGONS[thing.shape]], fill=fill)
    return image.reduce(_OVERSAMPLING)
