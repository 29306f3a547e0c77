"""Who is in the picture, by adapters: FlexIP's, trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.utils
import torch
from comfy_api.latest import io, ui
from PIL import Image

from .host import (
    adapter_files,
    arguments,
    curves,
    flexip_folders,
    flexip_runs,
    lessons,
    progress,
    tensor_files,
    widgets,
)
from .host.flexip_pairs import AUGMENTATIONS, Encoders
from .host.flexip_runs import Plan
from .host.flexip_settings import TrainingSettings

_taken = ("steps", "batch", "rate", "drop_subject", "drop_text", "drop_both", "mode", "average")
"""Widgets that are settings as they are."""
_sizes = ("width", "detail_tokens", "global_tokens", "detail_depth", "global_depth", "text_depth")
_head_width = 64


class TrainFlexIP(io.ComfyNode):
    """Trains an adapter that brings a subject into new pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PinpointTrainFlexIP",
            display_name="Train FlexIP Adapter",
            category="pinpoint/identity",
            description=(
                "Trains a FlexIP adapter from pairs of pictures of the same subject, while the "
                "model and all encoders stay as they are."
            ),
            search_aliases=["flexip", "ip-adapter training", "train adapter", "subject"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="From a stock loader: it is loaded a second time."),
                io.Clip.Input("clip", tooltip="The model's text encoders."),
                io.Vae.Input("vae", tooltip="The model's VAE."),
                io.ClipVision.Input(
                    "low_encoder", tooltip="Sees details: DINOv2, from Load Image Encoder."
                ),
                io.ClipVision.Input(
                    "high_encoder", tooltip="Sees the whole: CLIP, from Load Image Encoder."
                ),
                io.String.Input(
                    "folder",
                    default="flexip",
                    tooltip=(
                        "In ComfyUI's input folder, with pictures in invariant, and in variant a "
                        "folder for each subject; a text file beside each picture says what it "
                        "shows."
                    ),
                ),
                io.String.Input(
                    "file_name",
                    default="flexip",
                    tooltip="What the adapter is called in models/flexip.",
                ),
                *_schedule(),
                *_pairs(),
                *_network(),
                *_details(),
            ],
            outputs=[
                widgets.Adapter.Output(
                    display_name="adapter", tooltip="For Apply FlexIP Adapter; it is saved, too."
                ),
                io.Image.Output(display_name="loss_curve", tooltip="The loss of each step."),
                io.Image.Output(
                    display_name="validation",
                    tooltip="A caption with its reference, at gamma 0.3, 0.5 and 0.7.",
                ),
                io.String.Output(
                    display_name="report", tooltip="Pictures, time, losses, and where it is saved."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str, **inputs: Any) -> str:
        """Other pictures make another adapter."""
        return flexip_folders.fingerprint(flexip_folders.inside_input(folder))

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        arguments.require_valid(cls, inputs)
        model, clip, vae = (inputs[name] for name in ("model", "clip", "vae"))
        lessons.require_parts(clip, vae)
        root = flexip_folders.inside_input(inputs["folder"])
        path = place_of(inputs["file_name"])
        encoders = Encoders(model, clip, vae, inputs["low_encoder"], inputs["high_encoder"])
        outcome = flexip_runs.train(
            encoders, root, plan_of(inputs), path, _OnNode(), resume=inputs["resume"]
        )
        progress.show(outcome.report)
        return io.NodeOutput(
            adapter_files.load_file(path),
            curves.drawn(outcome.losses),
            outcome.pictures,
            outcome.report,
            ui=ui.PreviewText(outcome.report),
        )


class _OnNode:
    """Shows on the node how a training goes; see `flexip_runs.Watcher`."""

    def tell(self, text: str) -> None:
        """Write it."""
        progress.show(text)

    def show(self, step: int, steps: int, pictures: torch.Tensor) -> None:
        """Preview them side by side."""
        row = torch.cat(list(pictures[..., :3]), 1).clamp(0, 1)
        image = Image.fromarray((row * 255).round().byte().numpy())
        bar = comfy.utils.ProgressBar(steps)
        bar.update_absolute(step, steps, ("JPEG", image, 1024))


def place_of(file_name: str) -> Path:
    """Where an adapter is saved.

    Raises:
        ValueError: a name that leads out of models/flexip, or is that of a training's state.
    """
    name = file_name.strip().removesuffix(tensor_files.suffix)
    if f"{name}{tensor_files.suffix}".endswith(adapter_files.state_suffix):
        raise ValueError(
            f"file_name is '{file_name}': names that end with .state are of trainings to go on "
            "from, write another"
        )
    return tensor_files.place_of(adapter_files.folder, name)


def plan_of(values: dict[str, Any]) -> Plan:
    """What the widgets ask for.

    Raises:
        ValueError: values that do not go together.
    """
    for kind in ("invariant", "variant"):
        low, high = (values[f"gamma_{kind}_{end}"] for end in ("low", "high"))
        if low > high:
            raise ValueError(
                f"gamma_{kind}_low is {low:g} and gamma_{kind}_high {high:g}: swap them"
            )
    dropped = sum(values[f"drop_{what}"] for what in ("subject", "text", "both"))
    if dropped > 1:
        raise ValueError(
            f"drop_subject, drop_text and drop_both add up to {dropped:g}: lower them to 1 or less"
        )
    if values["width"] % _head_width:
        raise ValueError(
            f"width is {values['width']}: choose a multiple of {_head_width}, the width of a head"
        )
    precision = lessons.precision_for(values["model"], widgets.PRECISIONS[values["precision"]])
    settings = TrainingSettings(
        warm_up=min(200, values["steps"] // 10),
        gamma_invariant=(values["gamma_invariant_low"], values["gamma_invariant_high"]),
        gamma_variant=(values["gamma_variant_low"], values["gamma_variant_high"]),
        weighting=values["weighting"],
        precision=precision,
        saves_memory=values["save_memory"],
        seed=values["seed"],
        **{name: values[name] for name in _taken},
    )
    return Plan(
        settings,
        sizes={name: values[name] for name in _sizes},
        resolution=values["resolution"],
        augmentation=values["augmentation"],
        invariant_share=values["invariant_share"],
        validate_every=values["validate_every"],
    )


def _schedule() -> list[io.Input]:
    return [
        io.Int.Input(
            "steps", default=2000, min=1, max=10000000, tooltip="How often weights are changed."
        ),
        io.Int.Input("batch", default=4, min=1, max=1024, tooltip="Pairs in each step."),
        widgets.rate(1e-4, "How fast the adapter changes. It falls to nothing towards the end."),
        io.Float.Input(
            "average",
            default=0.999,
            min=0.0,
            max=0.99999,
            step=0.0001,
            round=0.00001,
            tooltip=(
                "Decay of the running average of the weights, which is what is saved. 0 saves the "
                "last ones."
            ),
        ),
    ]


def _pairs() -> list[io.Input]:
    return [
        widgets.part("invariant_share", 0.5, "How often reference and goal are the same picture."),
        widgets.part("gamma_invariant_low", 0.6, "Least gamma of pairs of the same picture."),
        widgets.part("gamma_invariant_high", 1.0, "Most gamma of pairs of the same picture."),
        widgets.part("gamma_variant_low", 0.2, "Least gamma of pairs of different pictures."),
        widgets.part("gamma_variant_high", 0.6, "Most gamma of pairs of different pictures."),
        widgets.part("drop_subject", 0.05, "Share of pairs without their reference."),
        widgets.part("drop_text", 0.05, "Share of pairs without their caption."),
        widgets.part("drop_both", 0.05, "Share of pairs without either, for guidance."),
        io.Combo.Input(
            "augmentation",
            options=list(AUGMENTATIONS),
            default="flip and crop",
            tooltip="What is done to the reference where it is the same picture as the goal.",
        ),
        io.Int.Input(
            "resolution",
            default=512,
            min=64,
            max=4096,
            step=8,
            tooltip="Side of the squares to learn to make, from the middle of the pictures.",
        ),
    ]


def _network() -> list[io.Input]:
    return [
        io.Combo.Input(
            "mode",
            options=["literal", "linear"],
            default="literal",
            tooltip=(
                "How gamma acts. Literal scales tokens and joins them, as the paper draws it; "
                "linear reads each branch by itself and adds them by gamma."
            ),
        ),
        io.Int.Input(
            "width",
            default=768,
            min=64,
            max=4096,
            step=_head_width,
            tooltip="Of the adapter's tokens.",
        ),
        io.Int.Input(
            "detail_tokens", default=16, min=1, max=1024, tooltip="For details of a reference."
        ),
        io.Int.Input(
            "global_tokens", default=4, min=1, max=256, tooltip="For a reference as a whole."
        ),
        io.Int.Input("detail_depth", default=4, min=1, max=64, tooltip="Layers that read details."),
        io.Int.Input(
            "global_depth", default=2, min=1, max=64, tooltip="Layers that read the whole."
        ),
        io.Int.Input(
            "text_depth",
            default=2,
            min=1,
            max=64,
            tooltip="Layers in which the caption reads the reference.",
        ),
    ]


def _details() -> list[io.Input]:
    return [
        widgets.weighting(),
        widgets.precision(
            "In which the model computes; the adapter has fp32. auto is bf16 where the device has "
            "it."
        ),
        widgets.save_memory(),
        widgets.seed("Of the adapter's first weights, of pairs, gammas and noise."),
        io.Int.Input(
            "validate_every",
            default=250,
            min=0,
            max=1000000,
            tooltip="Steps between validation pictures. 0 makes none.",
        ),
        io.Boolean.Input(
            "resume",
            default=True,
            tooltip=(
                "Go on with a training of this file name that was stopped, or that shall have "
                "more steps. Off begins anew."
            ),
        ),
    ]


nodes = [TrainFlexIP]
