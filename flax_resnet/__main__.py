"""``python -m flax_resnet``."""

from flax_resnet.main import command

if __name__ == "__main__":
    command()
