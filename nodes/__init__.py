"""The nodes of the pack, in the order in which the menu lists them."""

from . import attention, composite, inversion, localization, velocity

all_nodes = [
    node
    for module in (localization, composite, velocity, inversion, attention)
    for node in module.nodes
]
