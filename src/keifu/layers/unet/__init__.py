"""The U-Net and its parts."""
