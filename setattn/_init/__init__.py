"""Parameters from a seed, with the distributions of the papers and of their authors' code.

All of it is made by NumPy, in float32; :func:`setattn.convert_params` takes it elsewhere. What a function here does not
offer is a matter of replacing a part: ``params._replace(ff=())``.
"""

from setattn._init._flamingo import init_gated_cross_attention as init_gated_cross_attention
from setattn._init._flamingo import init_perceiver_resampler as init_perceiver_resampler
from setattn._init._layers import init_attention as init_attention
from setattn._init._layers import init_feed_forward as init_feed_forward
from setattn._init._layers import init_linear as init_linear
from setattn._init._layers import init_norm as init_norm
from setattn._init._perceiver import init_cross_attention as init_cross_attention
from setattn._init._perceiver import init_latent_transformer as init_latent_transformer
from setattn._init._perceiver import init_perceiver as init_perceiver
from setattn._init._perceiver import init_perceiver_io as init_perceiver_io
from setattn._init._set_transformer import init_attention_pool as init_attention_pool
from setattn._init._set_transformer import init_isab as init_isab
from setattn._init._set_transformer import init_mab as init_mab
from setattn._init._set_transformer import init_pma as init_pma
from setattn._init._set_transformer import init_set_transformer as init_set_transformer
