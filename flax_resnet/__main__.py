"""``python -m flax_resnet``."""

from flax_resnet.cli.app import command

if __name__ == "__main__":
    command()
