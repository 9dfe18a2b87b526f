"""Impressions whose p(click) and p(conversion | click) are known.

A log shows a conversion only behind a click, so no log can tell which model is right about the
impressions that nobody clicked. A `World` can: it draws for every impression what a click would
have led to, and keeps the probabilities. `generate` writes the impressions in the raw form of
Ali-CCP, their truth beside them. The formulas of the world are in datasets/synthetic.md.

    catalogue     items, segments, visits: all that grows with users and items
    exposure      who is shown what: profiles, histories, items, crosses
    world         settings, the two probabilities, what comes of each impression
    fields        what the fields of Ali-CCP hold in a world
    ali_ccp_text  impressions → bytes of the raw Ali-CCP files
    files         the folder of a world: raw files, truth.parquet, world.json
    drawn         a world as mapped splits, without raw files on the way
"""

from esmm_torchrec.comparison.worlds.drawn import DrawnWorld, draw_mapped
from esmm_torchrec.comparison.worlds.files import GeneratedWorld, generate
from esmm_torchrec.comparison.worlds.world import Block, Simulation, World

__all__ = [
    "Block",
    "DrawnWorld",
    "GeneratedWorld",
    "Simulation",
    "World",
    "draw_mapped",
    "generate",
]
