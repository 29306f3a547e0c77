"""What Learn Identity learns and Apply Identity applies: the PINPOINT_IDENTITY wire type."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torch import Tensor

longest_name = 100
_name = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Identity:
    """A person, thing or attribute that words do not describe.

    Attributes:
        name: "ann" is written `<ann>` in prompts; letters, digits, - and _.
        class_word: what it is an instance of, e.g. "person".
        family: of the model that it was learned with, see `families.name`.
        vectors: learned input embeddings of each text encoder, by the keys of `CLIP.tokenize`,
            (n, width), fp32 on the CPU.
        lora: low-rank change of the model's weights by ComfyUI's names,
            "diffusion_model.<module>.lora_up.weight", ".lora_down.weight" and ".alpha"; empty if
            only a word was learned.
        recipe: how it was learned, for people and for the file's metadata.
    """

    name: str
    class_word: str
    family: str
    vectors: dict[str, Tensor]
    lora: dict[str, Tensor] = field(default_factory=dict)
    recipe: dict[str, str] = field(default_factory=dict)

    def about(self) -> str:
        """What it is, for people, in lines."""
        learned = ", ".join(f"{len(v)} in {key}" for key, v in self.vectors.items()) or "none"
        changed = sum("lora_up" in key for key in self.lora)
        return "\n".join(
            [
                f"<{self.name}>, a {self.class_word}, for {self.family}",
                f"vectors of its word: {learned}; changed weights: {changed}",
                *(f"{key}: {value}" for key, value in self.recipe.items()),
            ]
        )


def require_name(name: str, input_name: str = "name") -> str:
    """A name that can stand in a prompt, without spaces and angle brackets around it.

    Raises:
        ValueError: it has other characters than letters, digits, - and _, none or too many.
    """
    plain = name.strip().removeprefix("<").removesuffix(">")
    if not _name.fullmatch(plain):
        raise ValueError(
            f"{input_name} is '{name}': write a name of letters, digits, - and _, such as ann"
        )
    if len(plain) > longest_name:
        raise ValueError(
            f"{input_name} has {len(plain)} letters: write one of at most {longest_name}"
        )
    return plain
