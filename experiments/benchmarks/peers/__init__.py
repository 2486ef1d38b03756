"""Our training step beside the same networks as other frameworks' users write and train them."""
