"""Images: where they come from, how they become batches, what is done to them on the way."""
