"""The bundled example: a small Set Transformer reads handwritten digits as sets of pixels.

``python -m setattn demo`` runs it; ``python -m setattn.demo.train`` is where its weights come from.
"""
