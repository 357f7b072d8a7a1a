"""`keifu draw`: images from a diffusion model or DALL-E, by text or label. It also reproduces an image from its
record."""

from keifu.commands.shared.drawing_options import Options


def run(options: Options) -> None:
    """Draw the pictures, write the files and print their names."""
    from keifu.commands.shared.drawing import draw

    draw(options)
