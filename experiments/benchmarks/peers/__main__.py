"""``python -m experiments.benchmarks.peers`` is the comparison."""

from experiments.benchmarks.peers.comparison import main

if __name__ == "__main__":
    main()
