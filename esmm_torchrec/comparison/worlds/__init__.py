"""Impressions whose p(click) and p(conversion | click) are known.

A log shows a conversion only behind a click, so no log can tell which model is right about the
impressions that nobody clicked. A `World` can: it draws for every impression what a click would
have led to, and keeps the probabilities. `draw` gives the impressions as columns of numbers,
`generate` writes them in the raw form of Ali-CCP, their truth beside them. The formulas of the
world are in datasets/synthetic.md.

    catalogue     items, segments, visits: all that grows with users and items
    exposure      who is shown what: profiles, histories, items, crosses
    world         settings, the two probabilities, what comes of each impression
    ali_ccp_text  impressions → bytes of the raw Ali-CCP files
    raw_ids       the raw ids that numbers of a world represent
    files         the folder of a world: raw files, truth.parquet, world.json
    drawn         a world as mapped splits, without raw files on the way
"""

from esmm_torchrec.comparison.worlds.catalogue import Split
from esmm_torchrec.comparison.worlds.drawn import DrawnWorld, draw_mapped
from esmm_torchrec.comparison.worlds.files import GeneratedSplit, GeneratedWorld, generate
from esmm_torchrec.comparison.worlds.world import Block, Simulation, World, draw

__all__ = [
    "Block",
    "DrawnWorld",
    "GeneratedSplit",
    "GeneratedWorld",
    "Simulation",
    "Split",
    "World",
    "draw",
    "draw_mapped",
    "generate",
]
