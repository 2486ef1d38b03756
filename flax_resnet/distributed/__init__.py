"""Several devices, processes and hosts as one run."""
