"""The few families that need a word of their own, each with its reason.

A stage hands exactly one tensor to the next: the hidden state [B, T, H]. Where a family carries more than that from
layer to layer, a cut would compute something else than the whole model, often without an error. Such families are
refused, or may be cut only where nothing else crosses the border. What can be told from the configuration is told from
it, so that a new family with the same trait is refused too; names are listed where only the code shows the trait.
"""

from __future__ import annotations

from transformers import PretrainedConfig

_OWN_STATE = "it keeps its recurrent state in a class of its own, which a stage cannot hand out layer by layer"
_MANY_STREAMS = "several residual streams run between its layers, not one hidden state"
_BY_NAME = {
    "blt": "it decodes bytes in patches of changing length, with models inside the model",
    "cpmant": "its layers share one matrix of position biases that is computed from the token ids",
    "diffusion_gemma": "it writes a whole block of text at a time and not one token after another",
    "hrm_text": "it runs its layers in loops",
    "inkling2_text": _MANY_STREAMS,
    "minimax": _OWN_STATE,
    "openai-gpt": "it keeps no cache, so every token would need the whole text again",
    "qwen4_exp_text": "its layers also read the token ids, which do not travel with the hidden state",
    "rwkv": _OWN_STATE,
    "xlstm": _OWN_STATE,
    "zamba": "some of its layers are one shared block, which would have to live on several servers",
    "zamba2": "some of its layers are one shared block, which would have to live on several servers",
    "zaya": "its expert routers read the router of the layer before",
}
# `is_decoder: false` is what these two call themselves, although they read from left to right like any decoder.
_DECODERS_THAT_DENY_IT = {"gpt_neox", "gpt_neox_japanese"}


def cannot_split(config: PretrainedConfig) -> str | None:
    """Why a family cannot be cut between layers, or None when it can. `config` is the text decoder's."""

    def trait(name: str) -> object:
        return getattr(config, name, None)

    if trait("is_encoder_decoder"):
        return "it has an encoder and a decoder, and every decoder layer reads the encoder's output"
    if trait("is_decoder") is False and config.model_type not in _DECODERS_THAT_DENY_IT:
        return "it reads text in both directions (is_decoder is false in its configuration), so it cannot generate"
    if trait("num_kv_shared_layers"):
        return "later layers read the keys and values of earlier ones, and a cut would separate them"
    if trait("hidden_size_per_layer_input"):
        return "every layer also reads the token ids, which do not travel with the hidden state"
    if trait("altup_num_inputs") or trait("hc_mult"):
        return _MANY_STREAMS
    if config.is_heterogeneous:
        return "its layers differ in shape (per_layer_config), which the engine has not been shown to cut exactly"
    return _BY_NAME.get(config.model_type)


def cut_points(config: PretrainedConfig, depth: int) -> list[int]:
    """The borders where a model of this configuration may be cut, with 0 and `depth`."""
    # GLM-5 and kin: a "shared" layer reuses the sparse-attention index that the nearest "full" layer below it found.
    indexers = getattr(config, "indexer_types", None)
    if isinstance(indexers, list | tuple) and len(indexers) == depth:
        return [0, *(border for border in range(1, depth) if indexers[border] == "full"), depth]
    return list(range(depth + 1))
