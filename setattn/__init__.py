"""Set attention as pure functions, written once against the Python array API."""

from __future__ import annotations

from setattn._attention import attention, attention_weights
from setattn._attention_pool import attention_pool
from setattn._blocks import Plan
from setattn._convert import convert_params
from setattn._errors import (
    ArgumentError,
    CheckpointError,
    DTypeError,
    MaskError,
    NamespaceError,
    OptionError,
    ParameterError,
    ShapeError,
)
from setattn._flamingo import gated_cross_attention
from setattn._init import (
    init_attention,
    init_attention_pool,
    init_cross_attention,
    init_feed_forward,
    init_gated_cross_attention,
    init_isab,
    init_latent_transformer,
    init_linear,
    init_mab,
    init_norm,
    init_perceiver,
    init_perceiver_io,
    init_perceiver_resampler,
    init_pma,
    init_set_transformer,
)
from setattn._mab import mab, sab
from setattn._order import Order
from setattn._params import (
    ISAB,
    MAB,
    PMA,
    Attention,
    AttentionPool,
    CrossAttention,
    FeedForward,
    GatedCrossAttention,
    InputEmbedding,
    LayerNorm,
    LengthScale,
    Linear,
    MeanHead,
    MeanLatents,
    Perceiver,
    PerceiverIO,
    Resampler,
    RMSNorm,
    SelfAttention,
    SetTransformer,
    count_params,
    map_params,
)
from setattn._perceiver import perceiver, perceiver_io
from setattn._perceiver_layers import cross_attention, latent_transformer
from setattn._positions import fourier_features, sincos_features
from setattn._resampler import perceiver_resampler
from setattn._set_transformer import isab, pma, set_transformer
from setattn._trace import Traced, trace
from setattn.checkpoints._block import Block
from setattn.checkpoints._layout import Layout
from setattn.checkpoints._public import layouts, load, save

__version__ = "0.1.0"

__all__ = [
    "ISAB",
    "MAB",
    "PMA",
    "ArgumentError",
    "Attention",
    "AttentionPool",
    "Block",
    "CheckpointError",
    "CrossAttention",
    "DTypeError",
    "FeedForward",
    "GatedCrossAttention",
    "InputEmbedding",
    "LayerNorm",
    "Layout",
    "LengthScale",
    "Linear",
    "MaskError",
    "MeanHead",
    "MeanLatents",
    "NamespaceError",
    "OptionError",
    "Order",
    "ParameterError",
    "Perceiver",
    "PerceiverIO",
    "Plan",
    "RMSNorm",
    "Resampler",
    "SelfAttention",
    "SetTransformer",
    "ShapeError",
    "Traced",
    "attention",
    "attention_pool",
    "attention_weights",
    "convert_params",
    "count_params",
    "cross_attention",
    "fourier_features",
    "gated_cross_attention",
    "init_attention",
    "init_attention_pool",
    "init_cross_attention",
    "init_feed_forward",
    "init_gated_cross_attention",
    "init_isab",
    "init_latent_transformer",
    "init_linear",
    "init_mab",
    "init_norm",
    "init_perceiver",
    "init_perceiver_io",
    "init_perceiver_resampler",
    "init_pma",
    "init_set_transformer",
    "isab",
    "latent_transformer",
    "layouts",
    "load",
    "mab",
    "map_params",
    "perceiver",
    "perceiver_io",
    "perceiver_resampler",
    "pma",
    "sab",
    "save",
    "set_transformer",
    "sincos_features",
    "trace",
]
