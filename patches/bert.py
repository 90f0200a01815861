"""BERT and others like it: the MLP lies in two modules, the second of which adds the residual."""

from typing import Any

from torch import Tensor, nn

from hf_triton_mlp.mlp import FusedLayer
from hf_triton_mlp.patching import MLPSpec
from hf_triton_mlp.reading import is_plain


class FusedBertLayer(FusedLayer):
    """BertLayer whose MLP and residual are one TritonMLP call; the norm behind them is called."""

    joins_attention = False

    intermediate: Any
    output: Any

    #: The norm in front of the MLP, where there is none behind.
    norm_path: str | None = None

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        x = attention_output
        norm = None if self.norm_path is None else self.get_submodule(self.norm_path)
        rest = None
        if self.adds_nothing():
            rest = self.mlp.fuse(x, norm, (self.intermediate.dense, None, self.output.dense))
        if rest is None:
            original: Any = super()
            return original.feed_forward_chunk(x)
        return self.output.LayerNorm(rest(x, x)) if norm is None else rest(x, None)

    def adds_nothing(self) -> bool:
        """Whether the two modules do what their family's do, in which dropout does nothing."""
        assert self.original_class is not None
        for part in (self.intermediate, self.output):
            cls = type(part)
            if cls.__module__ != self.original_class.__module__ or not is_plain(part, cls):
                return False
        dropout = getattr(self.output, "dropout", None)
        if dropout is not None and (dropout.training or not is_plain(dropout, nn.Dropout)):
            return False
        return self.mlp.has_activation(self.intermediate.intermediate_act_fn)


class FusedMegatronBertLayer(FusedBertLayer):
    """MegatronBertLayer whose second norm, MLP and residual are one TritonMLP call."""

    norm_path = "ln"


class FusedRobertaPreLayerNormLayer(FusedBertLayer):
    """RobertaPreLayerNormLayer whose second norm, MLP and residual are one TritonMLP call."""

    norm_path = "intermediate.LayerNorm"


class FusedXLMRobertaXLLayer(FusedBertLayer):
    """XLMRobertaXLLayer whose second norm, MLP and residual are one TritonMLP call."""

    norm_path = "LayerNorm"


#: Families with BERT's layer: (family, layer).
LAYERS = (
    ("align", "AlignTextLayer"),
    ("altclip", "AltRobertaLayer"),
    ("bert", "BertLayer"),
    ("bert_generation", "BertGenerationLayer"),
    ("big_bird", "BigBirdLayer"),
    ("blip_text", "BlipTextLayer"),
    ("bridgetower", "BridgeTowerTextLayer"),
    ("bros", "BrosLayer"),
    ("camembert", "CamembertLayer"),
    ("canine", "CanineLayer"),
    ("chinese_clip", "ChineseCLIPTextLayer"),
    ("clap", "ClapTextLayer"),
    ("data2vec_text", "Data2VecTextLayer"),
    ("electra", "ElectraLayer"),
    ("ernie", "ErnieLayer"),
    ("git", "GitLayer"),
    ("layoutlm", "LayoutLMLayer"),
    ("layoutlmv2", "LayoutLMv2Layer"),
    ("layoutlmv3", "LayoutLMv3Layer"),
    ("luke", "LukeLayer"),
    ("markuplm", "MarkupLMLayer"),
    ("mra", "MraLayer"),
    ("nystromformer", "NystromformerLayer"),
    ("rembert", "RemBertLayer"),
    ("roberta", "RobertaLayer"),
    ("roc_bert", "RoCBertLayer"),
    ("roformer", "RoFormerLayer"),
    ("splinter", "SplinterLayer"),
    ("tapas", "TapasLayer"),
    ("visual_bert", "VisualBertLayer"),
    ("xlm_roberta", "XLMRobertaLayer"),
    ("yoso", "YosoLayer"),
)

#: Where the folder of a family has another name.
FOLDERS = {"blip_text": "blip", "data2vec_text": "data2vec"}


def _spec(family: str, layer: str, fused_layer: type[FusedBertLayer] = FusedBertLayer) -> MLPSpec:
    folder = FOLDERS.get(family, family)
    return MLPSpec(
        family=family,
        layer_class=f"transformers.models.{folder}.modeling_{family}.{layer}",
        fused_layer=fused_layer,
        attention="attention.self",
        mlp=None,
        up="intermediate.dense",
        down="output.dense",
        activation="intermediate.intermediate_act_fn",
        norm=lambda layer: fused_layer.norm_path,
    )


SPECS = (
    *(_spec(*names) for names in LAYERS),
    _spec("megatron_bert", "MegatronBertLayer", FusedMegatronBertLayer),
    _spec("roberta_prelayernorm", "RobertaPreLayerNormLayer", FusedRobertaPreLayerNormLayer),
    _spec("xlm_roberta_xl", "XLMRobertaXLLayer", FusedXLMRobertaXLLayer),
)
