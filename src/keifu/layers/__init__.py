"""What models are made of: attention, Transformer blocks, recurrent networks, U-Net, noise schedules, losses, LoRA."""
