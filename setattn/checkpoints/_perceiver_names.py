"""What the tensors of a Perceiver are called by transformers, and by the authors' own code in Haiku."""

from __future__ import annotations

from typing import NamedTuple


class Names(NamedTuple):
    """How the tensors of a model are called; of the parts of a layer, relative to it."""

    query_norm: str
    context_norm: str
    cross_ff_norm: str
    self_ff_norm: str
    query: str
    key: str
    value: str
    output: str
    hidden: str
    ff_output: str
    latents: str
    cross: str
    layer: tuple[str, str]  # the first one, the others
    tokens: str
    token_position: str
    token_bias: str
    pixels: str
    pixel_position: str
    pixel_position_project: str
    convolution: str
    patches: str
    decoders: tuple[str, str, str]  # of language, of classes, of flow
    decoder_cross: str
    decoder_queries: str
    decoder_output: str
    several: tuple[str, ...]  # what only a model of several modalities has


TRANSFORMERS = Names(
    query_norm="attention.self.layernorm1",
    context_norm="attention.self.layernorm2",
    cross_ff_norm="layernorm",
    self_ff_norm="layernorm",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    hidden="mlp.dense1",
    ff_output="mlp.dense2",
    latents="embeddings.latents",
    cross="encoder.cross_attention",
    layer=("encoder.self_attends.0", "encoder.self_attends.{}"),
    tokens="input_preprocessor.embeddings.weight",
    token_position="input_preprocessor.position_embeddings.weight",
    token_bias="embedding_decoder.bias",
    pixels="input_preprocessor.convnet_1x1",
    pixel_position="input_preprocessor.position_embeddings.position_embeddings",
    pixel_position_project="input_preprocessor.positions_projection",
    convolution="input_preprocessor.convnet",
    patches="input_preprocessor.conv_after_patches",
    decoders=("decoder", "decoder.decoder", "decoder.decoder"),
    decoder_cross="decoding_cross_attention",
    decoder_queries="output_position_encodings.position_embeddings",
    decoder_output="final_layer",
    several=("decoder.modalities", "decoder.padding", "input_preprocessor.padding", "input_preprocessor.modalities"),
)

AUTHORS = Names(
    query_norm="layer_norm",
    context_norm="layer_norm_1",
    cross_ff_norm="layer_norm_2",
    self_ff_norm="layer_norm_1",
    query="attention/linear",
    key="attention/linear_1",
    value="attention/linear_2",
    output="attention/linear_3",
    hidden="mlp/linear",
    ff_output="mlp/linear_1",
    latents="perceiver_encoder/~/trainable_position_encoding/pos_embs",
    cross="perceiver_encoder/~/cross_attention",
    layer=("perceiver_encoder/~/self_attention", "perceiver_encoder/~/self_attention_{}"),
    tokens="embed/embeddings",
    token_position="trainable_position_encoding/pos_embs",
    token_bias="embedding_decoder/bias",
    pixels="image_preprocessor/~/conv2_d",
    pixel_position="image_preprocessor/~_build_network_inputs/trainable_position_encoding/pos_embs",
    pixel_position_project="image_preprocessor/~_build_network_inputs/position_encoding_projector/linear",
    convolution="image_preprocessor/~/conv2_d_downsample",
    patches="image_preprocessor/patches_linear",
    decoders=("basic_decoder", "classification_decoder/~/basic_decoder", "flow_decoder/~/basic_decoder"),
    decoder_cross="cross_attention",
    decoder_queries="~/trainable_position_encoding/pos_embs",
    decoder_output="output",
    several=("multimodal_preprocessor", "multimodal_decoder", "encoder"),
)
