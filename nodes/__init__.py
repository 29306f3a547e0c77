"""The nodes of the pack, in the order in which the menu lists them."""

from . import (
    attention,
    composite,
    identity,
    inversion,
    learning,
    localization,
    null_text,
    prompt_to_prompt,
    velocity,
)

all_nodes = [
    node
    for module in (
        localization,
        composite,
        velocity,
        inversion,
        null_text,
        attention,
        learning,
        identity,
        prompt_to_prompt,
    )
    for node in module.nodes
]
