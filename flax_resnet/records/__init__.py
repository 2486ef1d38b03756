"""What runs write down and read back: files, configs as JSON values, and provenance."""
