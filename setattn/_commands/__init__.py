"""The commands ``inspect``, ``run`` and ``convert``, and what all commands share. The library never imports them."""
