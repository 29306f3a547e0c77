"""What is to be shown: image encoders, and subjects as they see them."""

from __future__ import annotations

from comfy_api.latest import io

from .host import arguments, image_encoders, subjects, tensor_files, widgets


class LoadImageEncoder(io.ComfyNode):
    """An image encoder of any size."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PinpointLoadImageEncoder",
            display_name="Load Image Encoder",
            category="pinpoint/identity",
            description=(
                "Loads a CLIP or DINOv2 of any size from models/clip_vision, the small ones too "
                "that ComfyUI's Load CLIP Vision does not know."
            ),
            search_aliases=["clip vision", "dinov2", "dino", "vit", "image encoder"],
            inputs=[
                io.Combo.Input(
                    "file_name",
                    options=image_encoders.names(),
                    tooltip="A safetensors file of models/clip_vision.",
                ),
                io.Combo.Input(
                    "activation",
                    options=list(image_encoders.ACTIVATIONS),
                    default="auto",
                    advanced=True,
                    tooltip=(
                        "Of a CLIP, which its file does not tell: OpenAI's have quick_gelu, those "
                        "of LAION and DataComp gelu. auto takes gelu for H, g and bigG."
                    ),
                ),
            ],
            outputs=[
                io.ClipVision.Output(
                    tooltip="For Encode Subject, and for all that takes a CLIP_VISION."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file_name: str, activation: str) -> str:
        """Another file by the same name is another encoder."""
        return f"{tensor_files.fingerprint(image_encoders.path_to(file_name))} {activation}"

    @classmethod
    def execute(cls, file_name: str, activation: str) -> io.NodeOutput:
        arguments.require_valid(cls, locals())
        return io.NodeOutput(image_encoders.load(file_name, activation))


class EncodeSubject(io.ComfyNode):
    """References as image encoders see them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PinpointEncodeSubject",
            display_name="Encode Subject",
            category="pinpoint/identity",
            description=(
                "Looks at reference pictures of a subject with one or two image encoders, for "
                "adapters that bring it into new pictures."
            ),
            search_aliases=["reference", "clip vision encode", "ip adapter", "flexip", "subject"],
            inputs=[
                io.Image.Input(
                    "image", tooltip="One reference or a batch of them; RGB, RGBA or grey."
                ),
                io.ClipVision.Input(
                    "low_encoder", tooltip="Sees details: the DINOv2 that the adapter was made for."
                ),
                io.Combo.Input(
                    "background",
                    options=list(subjects.BACKGROUNDS),
                    default="remove",
                    tooltip=(
                        "With a mask: remove puts each encoder's mean colour outside it, keep "
                        "leaves what is there."
                    ),
                ),
                io.Float.Input(
                    "margin",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "With a mask: how much more than its box is shown on each side, in parts "
                        "of the box's longer side."
                    ),
                ),
                io.Combo.Input(
                    "fit",
                    options=list(subjects.FITS),
                    default="pad",
                    tooltip=(
                        "Encoders read squares. pad shows all of it, with mean colour beside it; "
                        "crop shows the middle."
                    ),
                ),
                io.Combo.Input(
                    "combine",
                    options=list(subjects.COMBINATIONS),
                    default="concatenate",
                    tooltip=(
                        "Of several references: concatenate keeps all, average makes one of them."
                    ),
                ),
                io.ClipVision.Input(
                    "high_encoder",
                    optional=True,
                    tooltip=(
                        "Sees the whole: the CLIP that the adapter was made for. Without it, "
                        "low_encoder does both."
                    ),
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the subject is, 1 = subject; one, or one for each reference.",
                ),
            ],
            outputs=[
                widgets.Subject.Output(display_name="subject", tooltip="For an adapter."),
                io.Image.Output(
                    display_name="picture", tooltip="What low_encoder is shown, at its own size."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        image: io.Image.Type,
        low_encoder: io.ClipVision.Type,
        background: str,
        margin: float,
        fit: str,
        combine: str,
        high_encoder: io.ClipVision.Type | None = None,
        mask: io.Mask.Type | None = None,
    ) -> io.NodeOutput:
        arguments.require_valid(cls, locals())
        framing = subjects.Framing(background, margin, fit)
        return io.NodeOutput(
            *subjects.encoded(image, low_encoder, high_encoder, mask, framing, combine)
        )


nodes = [LoadImageEncoder, EncodeSubject]
