"""Text encoders with fewer and narrower layers than ComfyUI's own, whose sizes no file can change.

Their widths at the output, their tokenizers and ComfyUI's loaders stay as they are. A server of
the tests loads this file as a custom node (`host.stand_ins`).
"""

from __future__ import annotations

from typing import Any

_CLIP = {"num_hidden_layers": 3, "intermediate_size": 64}
# As many layers as in the true one, by which ComfyUI knows a file of T5-XXL.
_T5 = {"d_ff": 8, "d_kv": 8, "num_heads": 1}
OPTIONS: dict[str, Any] = {
    "clip_l_model_config": _CLIP,
    "clip_g_model_config": _CLIP,
    "t5xxl_model_config": _T5,
}
"""For `model_options` of ComfyUI's text encoders: what to take in place of their configurations."""

NODE_CLASS_MAPPINGS: dict[str, type] = {}


def shrink() -> None:
    """Give the options to all text encoders that are made from now on."""
    from comfy.sd1_clip import SDClipModel

    original = SDClipModel.__init__

    def small(
        self: Any, *args: Any, model_options: dict[str, Any] | None = None, **kw: Any
    ) -> None:
        given = model_options or {}
        # Loaders set the number of positions in the same place.
        sizes = {name: {**config, **given.get(name, {})} for name, config in OPTIONS.items()}
        original(self, *args, model_options={**given, **sizes}, **kw)

    SDClipModel.__init__ = small


if __package__ != "host":
    shrink()
