"""The names and shapes of SigLIP's pooling head, the file that stands for all where the layout does not matter."""

from __future__ import annotations

D, F, HEADS = 8, 12, 2
SHAPES = {
    "probe": (1, 1, D),
    "attention.in_proj_weight": (3 * D, D),
    "attention.in_proj_bias": (3 * D,),
    "attention.out_proj.weight": (D, D),
    "attention.out_proj.bias": (D,),
    "layernorm.weight": (D,),
    "layernorm.bias": (D,),
    "mlp.fc1.weight": (F, D),
    "mlp.fc1.bias": (F,),
    "mlp.fc2.weight": (D, F),
    "mlp.fc2.bias": (D,),
}
PREFIX = "vision_model.head."
