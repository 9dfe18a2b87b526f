"""Synthetic impressions with known p(click) and p(conversion | click).

Logged conversions follow clicks, so no log can show which model is right about impressions that
were not clicked. A `World` can: it draws, for every impression, whether a click would have led to a
conversion, and keeps the probabilities. `generate` writes the impressions in the raw format of
Ali-CCP, and the truth in a separate file. datasets/synthetic.md has the formulas.

    catalogue     items, segments, visits: everything that grows with users and items
    exposure      the impressions shown: profiles, histories, items, crosses
    world         settings, the two probabilities, clicks and conversions
    fields        values of the fields of Ali-CCP in a world
    ali_ccp_text  impressions → bytes of the raw Ali-CCP files
    files         the folder of a world: raw files, truth.parquet, world.json
    drawn         a world as mapped splits, without raw files
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
