"""LoRA adapters in PEFT's, diffusers' and kohya's formats."""
