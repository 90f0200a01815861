"""BART, Whisper and more decoders like OPT's, most of which may look at an encoder."""

from hf_triton_mlp.patching import MLPSpec

from .opt import FusedOPTDecoderLayer


class FusedPreNormLayer(FusedOPTDecoderLayer):
    """WhisperDecoderLayer whose last attention residual, norm, MLP and residual are one call."""

    do_layer_norm_before = True


class FusedPostNormLayer(FusedOPTDecoderLayer):
    """BartDecoderLayer whose last attention residual, norm, MLP and residual are one call."""

    do_layer_norm_before = False


PRE_NORM = (
    ("bigbird_pegasus", "BigBirdPegasus"),
    ("biogpt", "BioGpt"),
    ("blenderbot", "Blenderbot"),
    ("m2m_100", "M2M100"),
    ("mbart", "MBart"),
    ("musicgen", "Musicgen"),
    ("pegasus", "Pegasus"),
    ("pegasus_x", "PegasusX"),
    ("speech_to_text", "Speech2Text"),
    ("whisper", "Whisper"),
    ("xglm", "XGLM"),
)
POST_NORM = (
    ("bart", "Bart"),
    ("blenderbot_small", "BlenderbotSmall"),
    ("marian", "Marian"),
    ("plbart", "PLBart"),
)


def _spec(family: str, name: str, *, before: bool) -> MLPSpec:
    return MLPSpec(
        family=family,
        layer_class=f"transformers.models.{family}.modeling_{family}.{name}DecoderLayer",
        fused_layer=FusedPreNormLayer if before else FusedPostNormLayer,
        attention="self_attn",
        mlp=None,
        up="fc1",
        down="fc2",
        activation="activation_fn",
        norm=lambda layer: "final_layer_norm" if before else "self_attn_layer_norm",
        pre_norm=lambda layer: before,
    )


SPECS = (
    *(_spec(*names, before=True) for names in PRE_NORM),
    *(_spec(*names, before=False) for names in POST_NORM),
)
