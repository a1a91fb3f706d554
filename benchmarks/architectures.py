"""A catalogue of tiny models, one of each architecture: what a benchmark captures and prunes to see what breaks.

    for architecture in ARCHITECTURES:
        model, inputs = architecture.make()
        model(**inputs)

Random weights from a fixed seed, no hub, in eval mode. Batch 3, sequences of 7 tokens with nothing padded, images
and sounds about as small as the model allows. Nothing global is left changed: the random state is forked. What a
fresh model has at 0 or 1 (biases, norms, class tokens, batch-norm statistics) is randomised too, and matrices are
drawn larger than a fresh model has them: otherwise a lost bias or branch hardly shows in the outputs.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]
Settings = dict[str, Any]
"""Keyword arguments of a configuration; a dictionary among them is those of a part."""

BATCH, TOKENS, TARGETS, VOCABULARY, LABELS = 3, 7, 5, 99, 5
IMAGE_TOKEN = VOCABULARY - 1

SIZES: Settings = {
    # Configurations call one size by many names; each is given those that it declares.
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "n_embed", "embed_dim"), 32),
    **dict.fromkeys(("embedding_size", "input_embedding_size", "output_embedding_size", "projection_dim"), 16),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_inner", "d_ff", "dff", "hidden_dim", "ffn_hidden_size"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers", "encoder_num_hidden_layers"), 2),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers", "decoder_num_hidden_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_encoder_attention_heads", "encoder_num_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_decoder_attention_heads", "decoder_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "rotary_dim", "kv_channels"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_top_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 24),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    **dict.fromkeys(("max_source_positions", "max_target_positions"), 64),
    **dict.fromkeys(("max_encoder_position_embeddings", "max_decoder_position_embeddings"), 64),
    **dict.fromkeys(("vocab_size", "src_vocab_size", "tgt_vocab_size"), VOCABULARY),
    **dict.fromkeys(("initializer_range", "init_std"), 0.2),
    **{"max_2d_position_embeddings": 32, "type_vocab_size": 2, "image_size": 16, "patch_size": 8},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2},
    "use_cache": False,
}


@dataclass(frozen=True)
class Architecture:
    """One row: the model type, what kind of model it is, and what makes (model, keyword arguments of one call)."""

    name: str
    kind: str
    make: Callable[[], tuple[nn.Module, Inputs]]


def _configured(config_class: Any, settings: Settings) -> Any:
    """A configuration with SIZES where it declares one number for them, then the settings; its parts likewise."""
    from transformers import CONFIG_MAPPING

    fields = {field.name: field.default for field in dataclasses.fields(config_class)}
    values = {key: value for key, value in SIZES.items() if not isinstance(fields.get(key, ()), tuple)}
    values |= {"num_labels": LABELS} | settings
    for key, part in config_class.sub_configs.items():
        chosen = dict(settings.get(key, {}))
        part = CONFIG_MAPPING[chosen.pop("model_type")] if "model_type" in chosen else part
        if key in fields and dataclasses.is_dataclass(part):
            values[key] = _configured(part, chosen)
    return config_class(**values)


def _make(model_class: str, settings: Settings, inputs: Callable[[nn.Module], Inputs]) -> tuple[nn.Module, Inputs]:
    import transformers

    maker = getattr(transformers, model_class)
    config = _configured(maker.config_class, settings)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = maker(config).eval()
        example = inputs(model)
        shake(model, example)
    return model, example


def shake(model: nn.Module, inputs: Inputs) -> None:
    """Noise on what is constant; batch norms take the statistics of these inputs, shaken: others drown the signal."""
    for parameter in model.parameters():
        some = parameter.flatten()[:1]
        if parameter.ndim == 1 or (len(some) and bool((parameter == some).all())):  # or all zeros, say
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    model(**inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum
        norm.running_mean.add_(norm.running_var.sqrt() * torch.randn_like(norm.running_mean), alpha=0.2)
        norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.5, 2.0))


def _only(model: nn.Module, offered: Inputs) -> Inputs:
    """What the model takes of it."""
    taken = inspect.signature(model.forward).parameters
    return {name: value for name, value in offered.items() if name in taken}


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _tokens(length: int = TOKENS, seed: int = 1) -> Tensor:
    """(B, T) int64, without the special tokens."""
    return torch.randint(3, IMAGE_TOKEN, (BATCH, length), generator=torch.Generator().manual_seed(seed))


def _text_inputs(model: nn.Module, length: int = TOKENS) -> Inputs:
    """What the model takes of: tokens, their mask, their boxes on the page, and the decoder's tokens."""
    ids = _tokens(length)
    offered = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "bbox": (torch.arange(4 * BATCH * length) % 8).view(BATCH, length, 4).cumsum(dim=-1),  # left to right, down
        "decoder_input_ids": _tokens(TARGETS, seed=2),
    }
    return _only(model, offered)


def _text(kind: str, name: str, model_class: str, *, length: int = TOKENS, **settings: Any) -> Architecture:
    """Reads tokens, and writes them if it has a decoder."""
    return Architecture(name, kind, partial(_make, model_class, settings, partial(_text_inputs, length=length)))


_encoder = partial(_text, "text encoder")
_decoder = partial(_text, "decoder")
_mixture = partial(_text, "mixture of experts")
_translator = partial(_text, "encoder-decoder")


def _sound(name: str, model_class: str, *shape: int, kind: str = "audio", **settings: Any) -> Architecture:
    """Hears a wave of 400 samples, or something of that shape; writes tokens if it has a decoder."""

    def inputs(model: nn.Module) -> Inputs:
        sound = random(BATCH, *(shape or (400,)))
        words = _tokens(TARGETS, seed=2)
        return _only(model, {"input_values": sound, "input_features": sound, "decoder_input_ids": words})

    return Architecture(name, kind, partial(_make, model_class, settings, inputs))


_listener = partial(_sound, kind="encoder-decoder")


def _image(name: str, model_class: str, side: int = 16, *, frames: int = 0, **settings: Any) -> Architecture:
    """Sees a square image, or a video of that many frames; one that masks at random is told its noise."""

    def inputs(model: nn.Module) -> Inputs:
        pixels = random(BATCH, frames, 3, side, side) if frames else random(BATCH, 3, side, side)
        return _only(model, {"pixel_values": pixels, "noise": random(BATCH, (side // 4) ** 2)})  # patches of 4

    return Architecture(name, "vision", partial(_make, model_class, {"image_size": side} | settings, inputs))


def _pair(name: str, model_class: str, side: int = 16, **settings: Any) -> Architecture:
    """Reads text and sees an image in one call; the text starts with the image's places if it has any."""

    def inputs(model: nn.Module) -> Inputs:
        example = _text_inputs(model) | {"pixel_values": random(BATCH, 3, side, side)}
        if getattr(model.config, "image_token_id", None) == IMAGE_TOKEN:
            example["input_ids"][:, : (side // SIZES["patch_size"]) ** 2] = IMAGE_TOKEN
        return example

    return Architecture(name, "multimodal", partial(_make, model_class, settings, inputs))


def _plain(row: Callable[..., Architecture], classes: dict[str, str]) -> tuple[Architecture, ...]:
    """Rows that need no more settings: model type to model class."""
    return tuple(row(name, model_class) for name, model_class in classes.items())


# fmt: off
_STAGES: Settings = {"hidden_sizes": [16, 32], "depths": [1, 1]}
_TWO_STAGES: Settings = _STAGES | {"num_stages": 2, "patch_size": 4}
_OUTPUTS: Settings = {"out_features": ["stage1", "stage2"]}
_PYRAMID: Settings = _STAGES | {
    "num_encoder_blocks": 2, "num_attention_heads": (2, 4), "mlp_ratios": (2, 2), "decoder_hidden_size": 16,
    "patch_sizes": (7, 3), "strides": (4, 2), "sr_ratios": (2, 1), "sequence_reduction_ratios": (2, 1),
}
_WINDOWS: Settings = {"embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4), "window_size": 2, "patch_size": 4}
_CONVOLUTIONS: Settings = {
    "in_channels": (80, 80), "out_channels": (80, 160), "kernel_sizes": (3, 5), "strides": (1, 2), "image_size": 32,
    "num_block_repeats": (1, 1), "expand_ratios": (1, 4), "width_coefficient": 0.1, "hidden_dim": 128,
    "depth_coefficient": 1.0,
}
_NECK: Settings = {"reassemble_factors": (2, 1), "neck_hidden_sizes": (8, 8), "fusion_hidden_size": 8}
_WAVES: Settings = {
    "conv_dim": (8, 8), "conv_kernel": (8, 3), "conv_stride": (4, 2), "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
_LATENT: Settings = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_STATE: Settings = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_chunk_size": 8}
_DELTA: Settings = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
_DEBERTA: Settings = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
_WIDE: Settings = {"hidden_size": 64}

ARCHITECTURES: tuple[Architecture, ...] = (
    *_plain(_encoder, {
        "bert": "BertModel", "roberta": "RobertaModel", "distilbert": "DistilBertModel", "albert": "AlbertModel",
        "electra": "ElectraModel", "mpnet": "MPNetModel", "xlm-roberta": "XLMRobertaModel", "ernie": "ErnieModel",
        "xlm-roberta-xl": "XLMRobertaXLModel", "camembert": "CamembertModel", "roformer": "RoFormerModel",
        "convbert": "ConvBertModel", "layoutlm": "LayoutLMModel", "modernbert": "ModernBertModel", "esm": "EsmModel",
        "rembert": "RemBertModel", "splinter": "SplinterModel", "fnet": "FNetModel", "ibert": "IBertModel",
        "megatron-bert": "MegatronBertModel", "roberta-prelayernorm": "RobertaPreLayerNormModel", "xlm": "XLMModel",
        "mra": "MraModel", "yoso": "YosoModel", "bert-generation": "BertGenerationEncoder", "tapas": "TapasModel",
        "data2vec-text": "Data2VecTextModel", "nomic_bert": "NomicBertModel", "eurobert": "EuroBertModel",
        "jina_embeddings_v3": "JinaEmbeddingsV3Model",
    }),
    _encoder("deberta", "DebertaModel", **_DEBERTA),
    _encoder("deberta-v2", "DebertaV2Model", **_DEBERTA),
    _encoder("funnel", "FunnelModel", block_sizes=[1, 1], num_decoder_layers=1),
    _encoder("squeezebert", "SqueezeBertModel", embedding_size=32),
    _encoder("mobilebert", "MobileBertModel", intra_bottleneck_size=16, num_feedforward_networks=2),
    _encoder("nystromformer", "NystromformerModel", segment_means_seq_len=7, num_landmarks=7),
    _encoder("lilt", "LiltModel", hidden_size=48),
    _encoder("bros", "BrosModel", hidden_size=64),
    _encoder("xmod", "XmodModel", default_language="en_XX"),
    _encoder("big_bird", "BigBirdModel", attention_type="original_full"),
    _encoder("longformer", "LongformerModel", attention_window=4, length=8),
    _encoder("xlnet", "XLNetModel", use_mems_eval=False),
    _encoder("canine", "CanineModel", num_hash_buckets=64, local_transformer_stride=8, length=8),
    _encoder("reformer", "ReformerModel", attn_layers=["local", "local"], attention_head_size=8, feed_forward_size=64,
             axial_pos_shape=(8, 8), axial_pos_embds_dim=(16, 16), local_attn_chunk_length=4, length=8),

    *_plain(_decoder, {
        "gpt2": "GPT2LMHeadModel", "gptj": "GPTJForCausalLM", "gpt_neox": "GPTNeoXForCausalLM",
        "gpt_bigcode": "GPTBigCodeForCausalLM", "bloom": "BloomForCausalLM", "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
        "gemma": "GemmaForCausalLM", "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM",
        "phi": "PhiForCausalLM", "phi3": "Phi3ForCausalLM", "falcon": "FalconForCausalLM", "mpt": "MptForCausalLM",
        "stablelm": "StableLmForCausalLM", "starcoder2": "Starcoder2ForCausalLM", "cohere": "CohereForCausalLM",
        "cohere2": "Cohere2ForCausalLM", "olmo": "OlmoForCausalLM", "olmo2": "Olmo2ForCausalLM",
        "granite": "GraniteForCausalLM", "codegen": "CodeGenForCausalLM", "xglm": "XGLMForCausalLM",
        "biogpt": "BioGptForCausalLM", "persimmon": "PersimmonForCausalLM", "glm": "GlmForCausalLM",
        "glm4": "Glm4ForCausalLM", "smollm3": "SmolLM3ForCausalLM", "nemotron": "NemotronForCausalLM",
        "helium": "HeliumForCausalLM", "apertus": "ApertusForCausalLM", "exaone4": "Exaone4ForCausalLM",
        "ernie4_5": "Ernie4_5ForCausalLM", "seed_oss": "SeedOssForCausalLM", "bitnet": "BitNetForCausalLM",
        "diffllama": "DiffLlamaForCausalLM", "nanochat": "NanoChatForCausalLM", "doge": "DogeForCausalLM",
        "modernbert-decoder": "ModernBertDecoderForCausalLM", "openai-gpt": "OpenAIGPTLMHeadModel",
        "ctrl": "CTRLLMHeadModel", "trocr": "TrOCRForCausalLM", "imagegpt": "ImageGPTForCausalImageModeling",
        "rwkv": "RwkvForCausalLM", "mamba": "MambaForCausalLM", "falcon_mamba": "FalconMambaForCausalLM",
    }),
    _decoder("gpt_neo", "GPTNeoForCausalLM", attention_types=[[["global", "local"], 1]]),
    _decoder("opt", "OPTForCausalLM", word_embed_proj_dim=32),
    _decoder("minicpm3", "MiniCPM3ForCausalLM", **_LATENT),
    _decoder("lfm2", "Lfm2ForCausalLM", layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    _decoder("recurrent_gemma", "RecurrentGemmaForCausalLM", block_types=["recurrent", "attention"]),
    _decoder("mamba2", "Mamba2ForCausalLM", num_heads=8, state_size=16, n_groups=2, chunk_size=8),
    _decoder("bamba", "BambaForCausalLM", attn_layer_indices=[1], **_STATE),
    _decoder("falcon_h1", "FalconH1ForCausalLM", mamba_d_ssm=64, **_STATE),

    *_plain(_mixture, {
        "mixtral": "MixtralForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM",
        "olmoe": "OlmoeForCausalLM", "granitemoe": "GraniteMoeForCausalLM", "gpt_oss": "GptOssForCausalLM",
        "granitemoeshared": "GraniteMoeSharedForCausalLM", "phimoe": "PhimoeForCausalLM", "jamba": "JambaForCausalLM",
        "ernie4_5_moe": "Ernie4_5_MoeForCausalLM", "glm4_moe": "Glm4MoeForCausalLM", "jetmoe": "JetMoeForCausalLM",
        "hunyuan_v1_moe": "HunYuanMoEV1ForCausalLM", "minimax": "MiniMaxForCausalLM",
        "flex_olmo": "FlexOlmoForCausalLM", "llama4_text": "Llama4ForCausalLM",
        "switch_transformers": "SwitchTransformersForConditionalGeneration",
        "nllb-moe": "NllbMoeForConditionalGeneration",
    }),
    _mixture("granitemoehybrid", "GraniteMoeHybridForCausalLM", layer_types=["mamba", "attention"], **_STATE),
    _mixture("deepseek_v2", "DeepseekV2ForCausalLM", first_k_dense_replace=1, **_LATENT),
    _mixture("deepseek_v3", "DeepseekV3ForCausalLM", first_k_dense_replace=1, n_group=2, topk_group=1, **_LATENT),
    _mixture("dbrx", "DbrxForCausalLM", attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0}),
    _mixture("dots1", "Dots1ForCausalLM", n_shared_experts=1),
    _mixture("lfm2_moe", "Lfm2MoeForCausalLM", layer_types=["conv", "full_attention"], num_dense_layers=1),
    _mixture("qwen3_next", "Qwen3NextForCausalLM", **_DELTA),

    *_plain(_translator, {
        "t5": "T5ForConditionalGeneration", "mt5": "MT5ForConditionalGeneration",
        "umt5": "UMT5ForConditionalGeneration", "bart": "BartForConditionalGeneration", "marian": "MarianMTModel",
        "mbart": "MBartForConditionalGeneration", "plbart": "PLBartForConditionalGeneration",
        "pegasus": "PegasusForConditionalGeneration", "blenderbot": "BlenderbotForConditionalGeneration",
        "blenderbot-small": "BlenderbotSmallForConditionalGeneration", "m2m_100": "M2M100ForConditionalGeneration",
        "fsmt": "FSMTForConditionalGeneration", "prophetnet": "ProphetNetForConditionalGeneration",
    }),
    _translator("longt5", "LongT5ForConditionalGeneration", local_radius=3),
    _translator("pegasus_x", "PegasusXForConditionalGeneration", block_size=4, num_global_tokens=4),
    _translator("bigbird_pegasus", "BigBirdPegasusForConditionalGeneration", attention_type="original_full"),
    _translator("led", "LEDForConditionalGeneration", attention_window=4),
    _listener("whisper", "WhisperForConditionalGeneration", 8, 32, num_mel_bins=8, max_source_positions=16),
    _listener("speech_to_text", "Speech2TextForConditionalGeneration", 32, 8, input_feat_per_channel=8,
              conv_channels=16),
    _listener("moonshine", "MoonshineForConditionalGeneration", 2048),

    *_plain(_image, {
        "vit": "ViTForImageClassification", "deit": "DeiTForImageClassification",
        "beit": "BeitForImageClassification", "data2vec-vision": "Data2VecVisionForImageClassification",
        "dinov2": "Dinov2ForImageClassification", "dinov3_vit": "DINOv3ViTModel", "vitdet": "VitDetModel",
        "vit_msn": "ViTMSNForImageClassification", "ijepa": "IJepaForImageClassification",
        "dinov2_with_registers": "Dinov2WithRegistersForImageClassification",
    }),
    _image("dinov3_convnext", "DINOv3ConvNextModel", 32, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]),
    _image("vit_mae", "ViTMAEModel", patch_size=4),
    _image("yolos", "YolosForObjectDetection", image_size=(16, 16), num_detection_tokens=5),
    _image("detr", "DetrForObjectDetection", 32, num_queries=5,
           backbone_config={"model_type": "resnet", "embedding_size": 8} | _STAGES),
    _image("upernet", "UperNetForSemanticSegmentation", use_auxiliary_head=False,
           backbone_config={"model_type": "convnext"} | _TWO_STAGES | _OUTPUTS),
    _image("depth_anything", "DepthAnythingForDepthEstimation", reassemble_hidden_size=32, head_hidden_size=8,
           backbone_config={"model_type": "dinov2", "reshape_hidden_states": False} | _OUTPUTS, **_NECK),
    _image("dpt", "DPTForDepthEstimation", backbone_out_indices=(0, 1), neck_ignore_stages=(), **_NECK),
    _image("swin", "SwinForImageClassification", **_WINDOWS),
    _image("swinv2", "Swinv2ForImageClassification", **_WINDOWS),
    _image("swin2sr", "Swin2SRForImageSuperResolution", 8, embed_dim=16, depths=(2,), num_heads=(2,), window_size=4,
           patch_size=1, upsampler="pixelshuffledirect"),
    _image("hiera", "HieraForImageClassification", 32, image_size=(32, 32), patch_size=(7, 7), embed_dim=16,
           depths=(1, 1), num_heads=(1, 2), num_query_pool=1, masked_unit_size=(4, 4),
           masked_unit_attention=(True, False)),
    _image("convnext", "ConvNextForImageClassification", **_TWO_STAGES),
    _image("convnextv2", "ConvNextV2ForImageClassification", **_TWO_STAGES),
    _image("resnet", "ResNetForImageClassification", 32, embedding_size=8, **_STAGES),
    _image("regnet", "RegNetForImageClassification", 32, embedding_size=8, groups_width=8, **_STAGES),
    _image("bit", "BitForImageClassification", 32, embedding_size=8, num_groups=4, **_STAGES),
    _image("mobilenet_v1", "MobileNetV1ForImageClassification", 32, depth_multiplier=0.1),
    _image("mobilenet_v2", "MobileNetV2ForImageClassification", 32, depth_multiplier=0.1, finegrained_output=False),
    _image("mobilevit", "MobileViTForImageClassification", 32, hidden_sizes=(16, 16, 16), expand_ratio=2.0,
           neck_hidden_sizes=(8, 8, 8, 16, 16, 16, 32), patch_size=2),
    _image("mobilevitv2", "MobileViTV2ForImageClassification", 64, base_attn_unit_dims=(8, 8, 8),
           n_attn_blocks=(1, 1, 1), width_multiplier=0.1, patch_size=2),
    _image("efficientnet", "EfficientNetForImageClassification", 32, **_CONVOLUTIONS),
    _image("poolformer", "PoolFormerForImageClassification", 32, padding=(2, 1), **_PYRAMID),
    _image("segformer", "SegformerForImageClassification", 32, **_PYRAMID),
    _image("pvt", "PvtForImageClassification", 32, **_PYRAMID | {"patch_sizes": (4, 2)}),
    _image("pvt_v2", "PvtV2ForImageClassification", 32, **_PYRAMID),
    _image("glpn", "GLPNForDepthEstimation", 32, **_PYRAMID),
    _image("levit", "LevitForImageClassification", 64, hidden_sizes=(16, 24, 32), depths=(1, 1, 1),
           num_attention_heads=(2, 2, 2), key_dim=(8, 8, 8), patch_size=16),
    _image("cvt", "CvtForImageClassification", 32, embed_dim=(8, 16, 32), num_heads=(1, 2, 4), depth=(1, 2, 3)),
    _image("focalnet", "FocalNetForImageClassification", embed_dim=16, focal_levels=(2, 2), focal_windows=(3, 3),
           patch_size=4, **_STAGES),
    _image("swiftformer", "SwiftFormerForImageClassification", 32, embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1)),
    _image("hgnet_v2", "HGNetV2ForImageClassification", 32, stem_channels=(3, 8, 8), stage_in_channels=(8, 16),
           stage_mid_channels=(8, 8), stage_out_channels=(16, 32), stage_num_blocks=(1, 1),
           stage_downsample=(False, True), stage_downsample_strides=(2, 2), stage_light_block=(False, True),
           stage_kernel_size=(3, 5), stage_numb_of_layers=(2, 2), **_STAGES),
    _image("videomae", "VideoMAEForVideoClassification", frames=2, num_frames=2),
    _image("vivit", "VivitForVideoClassification", frames=2, num_frames=2, tubelet_size=(2, 8, 8)),
    _image("timesformer", "TimesformerForVideoClassification", frames=2, num_frames=2),

    *_plain(partial(_sound, **_WAVES), {
        "wav2vec2": "Wav2Vec2Model", "hubert": "HubertModel", "wavlm": "WavLMModel", "unispeech": "UniSpeechModel",
        "unispeech-sat": "UniSpeechSatModel", "sew": "SEWModel", "sew-d": "SEWDModel",
        "wav2vec2-conformer": "Wav2Vec2ConformerModel",
    }),
    _sound("data2vec-audio", "Data2VecAudioModel", **_WAVES | {"num_conv_pos_embeddings": 1}),
    _sound("wav2vec2-bert", "Wav2Vec2BertModel", 7, 8, feature_projection_input_dim=8),
    _sound("parakeet_ctc", "ParakeetForCTC", 32, 16,
           encoder_config={"num_mel_bins": 16, "subsampling_conv_channels": 8}),
    _sound("audio-spectrogram-transformer", "ASTForAudioClassification", 16, 16, max_length=16, num_mel_bins=16),

    *_plain(_pair, {
        "clip": "CLIPModel", "siglip": "SiglipModel", "chinese_clip": "ChineseCLIPModel", "altclip": "AltCLIPModel",
        "metaclip_2": "MetaClip2Model", "blip": "BlipForImageTextRetrieval", "flava": "FlavaModel",
        "owlvit": "OwlViTModel", "owlv2": "Owlv2Model", "git": "GitForCausalLM", "aimv2": "Aimv2Model",
    }),
    _pair("clipseg", "CLIPSegForImageSegmentation", extract_layers=(0, 1), reduce_dim=16, decoder_intermediate_size=32),
    _pair("groupvit", "GroupViTModel", projection_intermediate_dim=32,
          vision_config={"depths": (1, 1), "num_group_tokens": (4, 0), "num_output_groups": (4, 4)}),
    _pair("align", "AlignModel", 32, vision_config=_CONVOLUTIONS),
    _pair("bridgetower", "BridgeTowerModel", text_config=_WIDE, vision_config=_WIDE, **_WIDE),
    _pair("vision-text-dual-encoder", "VisionTextDualEncoderModel", text_config={"model_type": "bert"},
          vision_config={"model_type": "vit"}),
    _pair("layoutlmv3", "LayoutLMv3Model", input_size=16, coordinate_size=6, shape_size=4),
    _pair("llava", "LlavaForConditionalGeneration", image_token_index=IMAGE_TOKEN,
          vision_config={"model_type": "clip_vision_model"}, text_config={"model_type": "llama"}),
    _pair("paligemma", "PaliGemmaForConditionalGeneration", image_token_index=IMAGE_TOKEN, projection_dim=32,
          vision_config={"model_type": "siglip_vision_model"}, text_config={"model_type": "gemma"}),
)
# fmt: on
