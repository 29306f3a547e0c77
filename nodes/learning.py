"""Who is in the picture: learning an identity."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from .host import arguments, curves, lessons, phrases, progress, widgets
from .host.identity import require_name
from .host.learning_settings import LearningSettings

usual_attributes = (
    "hair, smile, makeup, age, glasses, hat, beard, lips, skin, eyes, expression, clothes"
)
"""What edits of portraits change."""
_taken = (
    *(
        "token_steps",
        "token_rate",
        "steps",
        "rate",
        "rank",
        "batch",
        "orthogonality",
        "preservation",
    ),
    *("weighting", "vectors", "update_every", "outside_weight", "preview_every", "seed"),
)
"""Widgets that are settings as they are."""


class LearnIdentity(io.ComfyNode):
    """Learns a word, and a small change of the model, for who or what a picture shows."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PinpointLearnIdentity",
            display_name="Learn Identity",
            category="pinpoint/identity",
            description=(
                "Learns who is in a picture as a word for prompts, such as <ann>, so that edits "
                "and new pictures keep the person while other words change everything else."
            ),
            search_aliases=[
                "s2edit",
                "textual inversion",
                "dreambooth",
                "train lora",
                "learn token",
                "subject",
                "face",
            ],
            # Pictures of several sizes come as a list.
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="From a stock loader: it is loaded a second time."),
                io.Clip.Input("clip", tooltip="The model's text encoders, from a stock loader."),
                io.Vae.Input("vae", tooltip="The model's VAE."),
                io.Image.Input(
                    "image", tooltip="One picture or several, in a batch or a list of any sizes."
                ),
                widgets.prompt(
                    "prompt",
                    "Describes the picture with the class word in it: photo of a person with red "
                    "hair. What it names is not learned. A list has one for each picture.",
                ),
                io.String.Input(
                    "name",
                    default="ann",
                    tooltip="What to call it: ann is written <ann> in prompts.",
                ),
                io.String.Input(
                    "class_word",
                    default="person",
                    tooltip="What it is, as the prompt says it: person, cat, makeup.",
                ),
                io.String.Input(
                    "attributes",
                    multiline=True,
                    default=usual_attributes,
                    tooltip=(
                        "Words, with commas, for what shall stay free to be changed; the learned "
                        "word is kept apart from them. Empty for none."
                    ),
                ),
                *_schedule(),
                *_losses(),
                *_details(),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the person is, 1 = inside. The word acts there only.",
                ),
                widgets.Identity.Input(
                    "identity",
                    optional=True,
                    tooltip=(
                        "One to learn on from, such as one whose learning was stopped. Its vectors "
                        "and rank stay; an empty name takes its name."
                    ),
                ),
            ],
            outputs=[
                widgets.Identity.Output(
                    display_name="identity", tooltip="For Apply Identity and Save Identity."
                ),
                io.Image.Output(
                    display_name="preview", tooltip="The prompt with the identity, from noise."
                ),
                io.Image.Output(display_name="loss_curve", tooltip="The loss of each step."),
                io.String.Output(
                    display_name="report", tooltip="Time, losses, and how free the attributes are."
                ),
            ],
        )

    @classmethod
    def execute(cls, **inputs: list[Any]) -> io.NodeOutput:
        lists = {name: inputs[name] for name in ("image", "prompt")}
        masks = [mask for mask in inputs.get("mask") or [] if mask is not None]
        values = {k: v[0] for k, v in inputs.items() if k not in lists and k != "mask"}
        arguments.require_valid(cls, values)
        model, clip, vae = (values[name] for name in ("model", "clip", "vae"))
        lessons.require_parts(clip, vae)
        settings, start = _settings(values), values.get("identity")
        lessons.require_fitting(model, clip, settings, start)
        material = lessons.Material(lists["image"], masks, lists["prompt"], values["resolution"])
        pictures = material.pictures(model, vae, settings.name, settings.class_word)
        identity, lesson, report = lessons.learn(model, clip, pictures, settings, start)
        shown, why_not = lessons.preview_or(
            material.first(), model, clip, vae, identity, pictures[0], settings
        )
        report += why_not
        curve = curves.drawn(lesson.losses, settings.token_steps)
        progress.show(report)
        return io.NodeOutput(identity, shown, curve, report, ui=ui.PreviewText(report))


def _settings(values: dict[str, Any]) -> LearningSettings:
    if values["token_steps"] + values["steps"] == 0:
        raise ValueError("token_steps and steps are both 0, so nothing would be learned: raise one")
    if values["token_steps"] and not values["token_rate"]:
        raise ValueError(
            f"token_rate is 0, so {values['token_steps']} token_steps would change nothing: set "
            "token_steps to 0, or raise token_rate"
        )
    class_word = values["class_word"].strip()
    if not class_word and not values["start_word"].strip():
        raise ValueError(
            "class_word and start_word are both empty, so the word would have no meaning to start "
            "from: write what it is, such as person"
        )
    attributes = phrases.split_phrases(values["attributes"])
    start = values.get("identity")
    name = values["name"].strip() or ("" if start is None else start.name)
    return LearningSettings(
        name=require_name(name),
        class_word=class_word,
        start_word=values["start_word"].strip() or class_word,
        attributes=tuple(a for a in attributes if a.casefold() != class_word.casefold()),
        confined=values["confine_word"],
        saves_memory=values["save_memory"],
        precision=lessons.precision_for(values["model"], widgets.PRECISIONS[values["precision"]]),
        **{name: values[name] for name in _taken},
    )


def _schedule() -> list[io.Input]:
    return [
        io.Int.Input(
            "token_steps",
            default=50,
            min=0,
            max=100000,
            tooltip="First phase: steps in which only the word is learned.",
        ),
        io.Float.Input(
            "token_rate",
            default=0.02,
            min=0.0,
            max=1.0,
            step=0.001,
            tooltip="How fast the word changes, in parts of its size. 0 leaves it as it starts.",
        ),
        io.Int.Input(
            "steps",
            default=150,
            min=0,
            max=100000,
            tooltip=(
                "Second phase: steps in which word and model change together. 0 learns a word "
                "only, as textual inversion does."
            ),
        ),
        widgets.rate(1e-3, "How fast the model changes. Large models need less, such as 0.0002."),
        io.Int.Input(
            "rank",
            default=8,
            min=1,
            max=256,
            tooltip="Of the low-rank change (LoRA) in the layers that read the prompt.",
        ),
        io.Int.Input(
            "batch",
            default=4,
            min=1,
            max=256,
            tooltip="Noised copies of a picture in each step. 1 takes the least memory.",
        ),
    ]


def _losses() -> list[io.Input]:
    return [
        io.Float.Input(
            "orthogonality",
            default=1.0,
            min=0.0,
            max=100.0,
            step=0.01,
            tooltip="How strongly the word is kept apart from the attributes. 0 = not at all.",
        ),
        io.Float.Input(
            "preservation",
            default=1.0,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip=(
                "How strongly the model's response to the prompt's other words is kept, so that "
                "they can still be changed. 0 = not at all, and faster."
            ),
        ),
        io.Boolean.Input(
            "confine_word",
            default=True,
            tooltip="With a mask: the word is seen inside it only, in every block.",
        ),
        io.Float.Input(
            "outside_weight",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="With a mask: how much the picture outside it counts. 0 = not at all.",
        ),
        widgets.weighting(),
    ]


def _details() -> list[io.Input]:
    return [
        widgets.seed("Of the noise to learn from."),
        io.Int.Input(
            "vectors",
            default=1,
            min=1,
            max=32,
            tooltip="Of the word, in each text encoder. More hold more, and fill the prompt.",
        ),
        io.String.Input(
            "start_word",
            default="",
            tooltip="A word whose meaning the learned one starts from. Empty for the class word.",
        ),
        io.Int.Input(
            "update_every",
            default=10,
            min=1,
            max=1000,
            tooltip=(
                "Steps between changes of the word: reading a prompt with gradients costs more "
                "than a step."
            ),
        ),
        io.Int.Input(
            "resolution",
            default=512,
            min=64,
            max=4096,
            step=8,
            tooltip="Pictures of more than its square in pixels are scaled down.",
        ),
        widgets.precision("In which the model computes. auto is bf16 where the device has it."),
        widgets.save_memory(),
        io.Int.Input(
            "preview_every",
            default=25,
            min=0,
            max=10000,
            tooltip="Steps between previews of what the model sees in noise. 0 = none.",
        ),
    ]


nodes = [LearnIdentity]
