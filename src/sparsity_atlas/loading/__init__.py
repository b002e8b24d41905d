"""How files become a model, whole or refused: `checkpoint` says which they are, `pretrained` loads them."""
