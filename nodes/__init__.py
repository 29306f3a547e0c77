"""The nodes of the pack, in the order in which the menu lists them."""

from . import (
    adapter_training,
    adapters,
    attention,
    changes,
    composite,
    identity,
    inversion,
    ip_adapters,
    learning,
    localization,
    metrics,
    null_text,
    prompt_to_prompt,
    subjects,
    velocity,
)

all_nodes = [
    node
    for module in (
        localization,
        composite,
        changes,
        velocity,
        inversion,
        null_text,
        attention,
        learning,
        identity,
        subjects,
        adapters,
        ip_adapters,
        adapter_training,
        prompt_to_prompt,
        metrics,
    )
    for node in module.nodes
]
