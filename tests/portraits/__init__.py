"""The proving ground: portraits with known attributes, exact masks and true edits."""

from .dataset import demo_case

__all__ = ["demo_case"]
