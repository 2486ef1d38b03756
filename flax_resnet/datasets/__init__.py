"""Where images come from: tfds sets and folders, read as random-access sources."""
