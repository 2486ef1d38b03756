"""One module, one question: what a run's figures owe to one choice of it."""
