"""Models of the ``transformers`` package, from small configs and with random weights."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from evaluation.benchmarks.architectures.sample import Sample, sample, seeded, tokens


def _pretrained(model: str, example: Callable, config: dict, **options) -> Callable[[], Sample]:
    """An entry: a class of ``transformers`` by name, with the config that belongs to it."""

    def build() -> nn.Module:
        import transformers

        architecture = getattr(transformers, model)
        return architecture(architecture.config_class(**config | options))

    return partial(sample, build, example)


def _classifier(model: str, config: dict, **options) -> Callable[[], Sample]:
    return _pretrained(f"{model}ForSequenceClassification", _text, config, **options)


def _causal(model: str, config: dict, **options) -> Callable[[], Sample]:
    return _pretrained(f"{model}ForCausalLM", _text, config, **options)


def _generation(model: str, config: dict, **options) -> Callable[[], Sample]:
    return _pretrained(f"{model}ForConditionalGeneration", _texts, config, **options)


def _vision(model: str, config: dict, size: int = 32, **options) -> Callable[[], Sample]:
    example = partial(_image, size)
    return _pretrained(f"{model}ForImageClassification", example, config, **options)


def _text() -> dict[str, Tensor]:
    return {"input_ids": tokens(61, 7)}


def _texts() -> dict[str, Tensor]:
    return {"input_ids": tokens(61, 7), "decoder_input_ids": tokens(61, 5)}


def _image(size: int = 32) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, size, size)}


def _image_and_text() -> dict[str, Tensor]:
    return _image() | _text()


def _wave() -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 210)}


def _spectrum() -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 24, 16)}


def _spectrum_and_text() -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, 18, 26), "decoder_input_ids": tokens(61, 5)}


_LABELS = {"num_labels": 5}
_DEPTH = {"num_hidden_layers": 2, "num_attention_heads": 4}
_SMALL = _LABELS | _DEPTH | {"hidden_size": 32, "intermediate_size": 56}
_IDS = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TEXT = _SMALL | _IDS | {"max_position_embeddings": 23}
_CAUSAL = _TEXT | {"use_cache": False}
_RELATIVE = _TEXT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
_DISTILLED = _LABELS | _IDS | {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 56}
_DISTILLED |= {"max_position_embeddings": 23}
_GROUPED = _CAUSAL | {"num_key_value_heads": 2, "head_dim": 8}
_GPT = _IDS | {"use_cache": False, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 56}
_GPT_NEO = _CAUSAL | {"num_layers": 2, "num_heads": 4}
_GPT_NEO |= {"attention_types": [[["global", "local"], 1]]}
_BART = _IDS | {"use_cache": False, "d_model": 32, "decoder_start_token_id": 2}
_BART |= {"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 56}
_BART |= {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 40}
_WHISPER = _BART | {"num_mel_bins": 18, "max_source_positions": 13, "max_target_positions": 23}
_T5 = _IDS | {"use_cache": False, "d_model": 32, "d_kv": 8, "d_ff": 56}
_T5 |= {"num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
_VIT = _SMALL | {"image_size": 32, "patch_size": 8}
_SWIN = _LABELS | {"image_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16}
_SWIN |= {"depths": [2, 2], "num_heads": [2, 4], "mlp_ratio": 3.0}
_STAGES = _LABELS | {"depths": [2, 2], "hidden_sizes": [16, 32]}
_PYRAMID = _STAGES | {"image_size": 32, "num_encoder_blocks": 2, "num_attention_heads": [2, 4]}
_PYRAMID |= {"mlp_ratios": [2, 3], "sr_ratios": [2, 1], "strides": [4, 2]}
_EFFICIENT = _LABELS | {"width_coefficient": 0.25, "hidden_dim": 320, "kernel_sizes": [3, 5]}
_EFFICIENT |= {"in_channels": [32, 64], "out_channels": [64, 112], "strides": [1, 2]}
_EFFICIENT |= {"num_block_repeats": [1, 2], "expand_ratios": [1, 4], "depthwise_padding": []}
_FOCAL = _STAGES | {"image_size": 32, "embed_dim": 16}
_FOCAL |= {"focal_levels": [2, 2], "focal_windows": [3, 3]}
_MOBILE = _LABELS | {"image_size": 128, "num_attention_heads": 4, "mlp_ratio": 1.5}
_MOBILE |= {"hidden_sizes": [24, 32, 40], "neck_hidden_sizes": [8, 10, 12, 14, 18, 20, 30]}
_LEVIT = _LABELS | {"image_size": 128, "hidden_sizes": [32, 48, 64], "depths": [1, 1, 1]}
_LEVIT |= {"num_attention_heads": [4, 6, 8], "key_dim": [8, 8, 8]}
_CVT = _LABELS | {"embed_dim": [16, 24, 32], "num_heads": [2, 3, 4], "depth": [1, 2, 3]}
_SPEECH = _SMALL | _IDS | {"conv_dim": (10, 18), "conv_kernel": (10, 4), "conv_stride": (5, 2)}
_SPEECH |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 4}
_SPEECH_PRE_NORM = _SPEECH | {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
_AST = _SMALL | {"max_length": 24, "num_mel_bins": 16, "patch_size": 8}
_CLIP = {"text_config": _TEXT | {"projection_dim": 24}, "projection_dim": 24}
_CLIP |= {"vision_config": _VIT | {"intermediate_size": 40, "projection_dim": 24}}

TRANSFORMERS: dict[str, Callable[[], Sample]] = {
    "bert": _classifier("Bert", _TEXT),
    "roberta": _classifier("Roberta", _TEXT),
    "distilbert": _classifier("DistilBert", _DISTILLED),
    "albert": _classifier("Albert", _TEXT, embedding_size=18),
    "electra": _classifier("Electra", _TEXT, embedding_size=18),
    "deberta": _classifier("Deberta", _RELATIVE),
    "deberta_v2": _classifier("DebertaV2", _RELATIVE),
    "mpnet": _classifier("MPNet", _TEXT),
    "squeezebert": _classifier("SqueezeBert", _TEXT, embedding_size=32),
    "modernbert": _classifier("ModernBert", _TEXT, cls_token_id=1, sep_token_id=2),
    "gpt2": _pretrained("GPT2LMHeadModel", _text, _GPT, n_positions=23),
    "gpt_neo": _causal("GPTNeo", _GPT_NEO),
    "gptj": _causal("GPTJ", _GPT, n_positions=23, rotary_dim=4),
    "gpt_neox": _causal("GPTNeoX", _CAUSAL),
    "opt": _causal("OPT", _CAUSAL, ffn_dim=56, word_embed_proj_dim=18),
    "bloom": _causal("Bloom", _GPT, hidden_size=32),
    "falcon": _causal("Falcon", _CAUSAL),
    "llama": _causal("Llama", _GROUPED),
    "mistral": _causal("Mistral", _GROUPED, sliding_window=5),
    "mixtral": _causal(
        "Mixtral", _GROUPED, num_local_experts=3, experts_implementation="batched_mm"
    ),
    "qwen2": _causal("Qwen2", _GROUPED),
    "qwen3": _causal("Qwen3", _GROUPED),
    "gemma": _causal("Gemma", _GROUPED),
    "gemma2": _causal("Gemma2", _GROUPED),
    "phi": _causal("Phi", _CAUSAL),
    "phi3": _causal("Phi3", _GROUPED),
    "olmo2": _causal("Olmo2", _GROUPED),
    "stablelm": _causal("StableLm", _CAUSAL, num_key_value_heads=2),
    "mamba": _causal("Mamba", _IDS, hidden_size=32, num_hidden_layers=2, use_cache=False),
    "t5": _generation("T5", _T5),
    "t5_gated": _generation("T5", _T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "bart": _generation("Bart", _BART, max_position_embeddings=23),
    "pegasus": _generation("Pegasus", _BART, max_position_embeddings=23),
    "vit": _vision("ViT", _VIT),
    "deit": _vision("DeiT", _VIT),
    "beit": _vision("Beit", _VIT, use_relative_position_bias=True, layer_scale_init_value=0.5),
    "dinov2": _vision("Dinov2", _VIT, mlp_ratio=2),
    "dinov2_swiglu": _vision("Dinov2", _VIT, mlp_ratio=2, use_swiglu_ffn=True),
    "swin": _vision("Swin", _SWIN),
    "swinv2": _vision("Swinv2", _SWIN),
    "convnext": _vision("ConvNext", _STAGES, num_stages=2),
    "convnextv2": _vision("ConvNextV2", _STAGES, num_stages=2),
    "resnet": _vision("ResNet", _STAGES, embedding_size=10, hidden_sizes=[24, 40]),
    "bit": _vision("Bit", _STAGES, size=64, embedding_size=24, num_groups=4),
    "regnet": _vision("RegNet", _STAGES, embedding_size=10, hidden_sizes=[16, 24], groups_width=8),
    "mobilenet_v1": _vision("MobileNetV1", _LABELS, depth_multiplier=0.25),
    "mobilenet_v2": _vision("MobileNetV2", _LABELS, depth_multiplier=0.25),
    "efficientnet": _vision("EfficientNet", _EFFICIENT),
    "focalnet": _vision("FocalNet", _FOCAL),
    "segformer": _vision("Segformer", _PYRAMID),
    "poolformer": _vision(
        "PoolFormer", _LABELS, 64, hidden_sizes=[8, 12, 20, 32], depths=[1, 1, 2, 1]
    ),
    "pvt": _vision("Pvt", _PYRAMID, sequence_reduction_ratios=[2, 1], patch_sizes=[4, 2]),
    "pvt_v2": _vision("PvtV2", _PYRAMID, patch_sizes=[7, 3]),
    "mobilevit": _vision("MobileViT", _MOBILE, size=128),
    "levit": _vision("Levit", _LEVIT, size=128),
    "cvt": _vision("Cvt", _CVT),
    "clip": _pretrained("CLIPModel", _image_and_text, _CLIP),
    "clip_vision": _pretrained("CLIPVisionModelWithProjection", _image, _VIT, projection_dim=24),
    "siglip": _pretrained("SiglipVisionModel", _image, _VIT),
    "whisper": _pretrained("WhisperForConditionalGeneration", _spectrum_and_text, _WHISPER),
    "wav2vec2": _pretrained("Wav2Vec2ForCTC", _wave, _SPEECH),
    "hubert": _pretrained("HubertForCTC", _wave, _SPEECH_PRE_NORM),
    "ast": _pretrained("ASTForAudioClassification", _spectrum, _AST),
}


def bert_base() -> Sample:
    """BERT base of ``transformers`` with its default config: 110 million parameters, 16 tokens."""
    from transformers import BertConfig, BertModel

    with seeded():
        return BertModel(BertConfig()).eval(), {"input_ids": tokens(30522, 16)}
