"""Kernels for Hopper (sm_90) in Gluon, with TMA, wgmma and mbarriers. A module has the launchers of its portable twin of that name."""
