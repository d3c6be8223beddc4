"""Language models that write their answers: what the suite of LoRA experts is made of."""
