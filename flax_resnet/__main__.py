"""``python -m flax_resnet``."""

from flax_resnet.command import command

if __name__ == "__main__":
    command()
