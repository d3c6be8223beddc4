"""What a folder of weights is: full fine-tune or adapter, whose base, which names; no transformers."""
