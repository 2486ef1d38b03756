"""Ablations: grids of configs, sweeps over them, seeds in one program, tables with their tests."""
