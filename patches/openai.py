"""The first GPT: post-norm, Conv1D projections; the norm and the residuals stay the model's."""

from hf_triton_mlp.patching import MLPSpec

MODULE = "transformers.models.openai.modeling_openai"
SPECS = (
    MLPSpec(
        family="openai",
        layer_class=f"{MODULE}.Block",
        mlp="mlp",
        mlp_class=f"{MODULE}.MLP",
        up="c_fc",
        down="c_proj",
        activation="mlp.act",
    ),
)
