"""Parts of models: attention, Transformer blocks, recurrent networks, U-Net, noise schedules, LoRA, losses."""
