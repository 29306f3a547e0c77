"""The nodes of the pack, in the order in which the menu lists them."""

from . import localization, velocity

all_nodes = [*localization.nodes, *velocity.nodes]
