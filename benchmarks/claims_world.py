"""
A world in which the claims of the paper can be tested, drawn with the scenes of `hf_sugar.world`.

A plot is a hero, one object that every picture shows, and three events, each some objects that join it. A step is a sentence
that tells the event alone ("two large red circles"), and then the picture of event and hero: the sentence says a part of the
next picture, the pictures before it the rest. The three steps in any order are a story, and each telling of it draws its
pictures anew, with everything in other places. So other stories have the steps of a story in another order, or its events
with another hero. Captions, conversations, facts and Winoground-like pairs are the world's own.
"""

import random
from itertools import permutations, product

from datasets import Dataset, concatenate_datasets
from PIL import Image

from hf_sugar.data import stored_image
from hf_sugar.evaluation.tasks import Search
from hf_sugar.world import load_world
from hf_sugar.world.dataset import ROW_FEATURES
from hf_sugar.world.scenes import COLORS, SHAPES, SIZES, Scene, Thing, partition, scenes


STEPS = 3
HEROES = 4  # plots that share their events
ORDERS = list(permutations(range(STEPS)))
THINGS = [thing for words in product(SIZES, COLORS, SHAPES) if not (thing := Thing(*words)).unseen]
Plot = tuple[Thing, tuple[Scene, ...]]  # the hero, the events


def plots(split: str, rng: random.Random, heroes: int = HEROES) -> list[Plot]:
    """Plots that share their events, whose sentences decide of which split they are."""
    while True:
        things = rng.sample(THINGS, STEPS + heroes)
        events = tuple(Scene((thing,), (rng.choice((2, 3)),)) for thing in things[:STEPS])
        if partition(" and ".join(sorted(event.caption for event in events))) == split:
            return [(hero, events) for hero in things[STEPS:]]


def picture(hero: Thing, event: Scene, rng: random.Random) -> Image.Image:
    return Scene((*event.things, hero), (*event.counts, 1)).render(rng)


def telling(plot: Plot, order: tuple[int, ...], rng: random.Random) -> list[str | Image.Image]:
    """Sentences and pictures of a plot, its events in an order."""
    hero, events = plot
    return [part for n in order for part in (events[n].caption, picture(hero, events[n], rng))]


def story_row(slices: list, name: str) -> dict:
    parts = [{"type": "text", "text": s} if isinstance(s, str) else {"type": "image", "text": None} for s in slices]
    images = [stored_image(s) for s in slices if not isinstance(s, str)]
    return {"messages": [{"role": "user", "content": parts}], "images": images, "loss_on": "text", "id": name}


def stories(batches: int, batch_size: int, seed: int) -> Dataset:
    """Training stories. Each eight in a row are two tellings of two plots with the same events, in two orders each."""
    rng, rows = random.Random(f"{seed}/claims/train"), []
    while len(rows) < batches * batch_size:
        orders = rng.sample(ORDERS, 2)
        for plot in plots("train", rng, heroes=2):
            rows += [telling(plot, order, rng) for order in orders for _ in range(2)]
    rows = [story_row(row, f"claims/train:{n}") for n, row in enumerate(rows[: batches * batch_size])]
    return Dataset.from_list(rows, features=ROW_FEATURES)


def training_rows(batches: dict[str, int], batch_size: int, seed: int = 0) -> Dataset:
    """So many batches of each kind, each batch of one kind, kind after kind."""
    return concatenate_datasets(
        [
            stories(count, batch_size, seed)
            if kind == "stories"
            else load_world(kind, "train", count * batch_size, seed=seed)
            for kind, count in batches.items()
        ]
    )


def in_turns(
    rows: Dataset, batches: dict[str, int], batch_size: int, seed: int, without: str | None = None
) -> Dataset:
    """The batches of `training_rows` in random order, without those of a kind."""
    kinds = [kind for kind, count in batches.items() for _ in range(count)]
    turns = [n for n, kind in enumerate(kinds) if kind != without]
    random.Random(seed).shuffle(turns)
    return rows.select([n * batch_size + row for n in turns for row in range(batch_size)])


def views(count: int, seed: int = 0) -> list[list[Image.Image]]:
    """`count` scenes, drawn twice, for an image teacher that agrees with content."""
    rng = random.Random(f"{seed}/claims/views")
    chosen = rng.choices(scenes("train"), k=count)
    return [[scene.render(rng) for scene in chosen] for _ in range(2)]


def held_out_stories(seed: int, groups: int) -> list[list]:
    """One telling of each plot: next images are searched for in these."""
    rng = random.Random(f"{seed}/claims/stories")
    return [telling(plot, rng.choice(ORDERS), rng) for _ in range(groups) for plot in plots("test", rng)]


def held_out_documents(seed: int, groups: int) -> dict[str, Search]:
    """
    Stories searched with other tellings of theirs. In `orders` the same order is right, among the five others, other heroes
    and other events. In `documents` the five other orders are right, and the same order with another hero is not; the own
    order is no candidate.
    """
    rng = random.Random(f"{seed}/claims/documents")
    told = [(plot, order) for _ in range(groups) for plot in plots("test", rng) for order in ORDERS]
    queries, candidates = ([telling(plot, order, rng) for plot, order in told] for _ in range(2))
    own = [{n} for n in range(len(told))]
    plot_of = [n // len(ORDERS) for n in range(len(told))]
    others = [set(range(n * len(ORDERS), (n + 1) * len(ORDERS))) for n in plot_of]
    others = [orders - same for orders, same in zip(others, own)]
    return {
        "orders": Search(queries, candidates, own, plot_of),
        "documents": Search(queries, candidates, others, plot_of, own),
    }
